//! After the reply: the bytes of a tunnel, and the end of a connection that got none.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::stats::{Stats, Unfinished};
use crate::fault::{self, Fault};
use crate::node::client::end_in_peace;
use crate::node::{Carried, Ended, Stream, Target};

/// How long a client that we have answered may take to close. Closing with unread bytes in our socket would make the
/// kernel send a reset, and a reset may overtake the answer.
const FAREWELL: Duration = Duration::from_secs(1);

/// A target and what the client, or the target behind an upgrade, has already said.
pub(super) struct Tunnel {
    pub(super) target: Target,
    pub(super) stream: Stream,
    /// Bytes that the target sent after the head of its 101.
    pub(super) received: Bytes,
}

/// A tunnel with both its ends.
pub(super) struct Opened {
    pub(super) tunnel: Tunnel,
    pub(super) client: TcpStream,
    /// What the client sent before our reply.
    pub(super) early: Vec<u8>,
}

impl Opened {
    /// Carries bytes until both directions have ended.
    pub(super) async fn carry(self, stats: &Arc<Stats>) {
        let Self { tunnel: Tunnel { target, stream, received }, mut client, early } = self;
        let mut counted = Counted { stats, carried: Carried::default(), ended: false, _unfinished: stats.unfinished() };
        if !received.is_empty() {
            counted.carried.note_moved(Instant::now());
        }
        if client.write_all(&received).await.is_err() {
            counted.ended = true;
            return;
        }
        counted.carried.received.set(received.len() as u64);
        // It may share a whole read buffer.
        drop(received);
        let ended = stream.splice(client, &early, &counted.carried).await;
        counted.ended = true;
        let ended = match ended {
            Ok(ended) => ended,
            Err(error) => {
                tracing::debug!(%error, "client gone");
                return;
            }
        };
        if ended == Ended::Reset {
            let fault = Fault { row: &fault::UPSTREAM_CLOSED, detail: format!("{target} reset the connection") };
            stats.failed(&fault, Some((target.host.to_string(), target.port)));
        }
    }
}

/// Adds what a tunnel carried to the counters at its end, also where the run cuts it.
struct Counted<'s> {
    stats: &'s Stats,
    carried: Carried,
    /// Whether it ended by itself.
    ended: bool,
    _unfinished: Unfinished,
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let (sent, received) = (self.carried.sent.get(), self.carried.received.get());
        self.stats.bytes_carried(sent, received);
        if !self.ended && self.carried.was_idle(Instant::now()) {
            self.stats.cut_idle();
        }
        tracing::debug!(sent, received, "tunnel closed");
    }
}

/// Closes a connection so that the answer on its way arrives: our end first, then the client's, bounded.
pub(super) async fn farewell(mut client: TcpStream) {
    // Until here the connection may have been one to be reset, however it ended.
    end_in_peace(&client);
    if client.shutdown().await.is_err() {
        return;
    }
    // On the heap: in the future it would be in every connection's memory for as long as it is open.
    let mut scrap = vec![0; 4096];
    let _ = timeout(FAREWELL, async { while matches!(client.read(&mut scrap).await, Ok(1..)) {} }).await;
}

#[cfg(test)]
mod tests {
    use rustix::net::sockopt;
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;
    use crate::node::client::end_by_reset;
    use crate::proxy::bed;

    #[test]
    fn what_is_on_its_way_at_the_farewell_arrives() {
        const MUCH: usize = 128 << 10;
        bed::run(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let dialling = TcpSocket::new_v4().unwrap();
            // So that most of it is still with us at the end.
            dialling.set_recv_buffer_size(4 << 10).unwrap();
            let mut client = dialling.connect(listener.local_addr().unwrap()).await.unwrap();
            let mut near = listener.accept().await.unwrap().0;
            sockopt::set_socket_send_buffer_size(&near, 3 * MUCH).unwrap();
            end_by_reset(&near);
            near.write_all(&vec![7; MUCH]).await.unwrap();
            client.shutdown().await.unwrap();
            farewell(near).await;
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            assert_eq!(answer.len(), MUCH);
        });
    }
}
