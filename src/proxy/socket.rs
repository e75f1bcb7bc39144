//! A client's socket: what the HTTP library reads and writes through, and how we learn that the client has gone.
//!
//! The library answers a head that it cannot read with a bare status. Such an answer is told from ours by its time: it
//! comes while no request is with us. It is not written, and a whole answer takes its place.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use super::stats::{Stats, Unfinished};
use crate::node::client::vanished;

/// Ends when `client` has reset its connection, or no longer answers after it closed it. A client that has closed its
/// sending side alone still waits for its answer, and is waited for.
pub(super) async fn gone(client: &TcpStream) {
    // What is asked for with urgent data is the end of the sending side, which `READABLE` would also give for data.
    match client.ready(Interest::PRIORITY | Interest::ERROR).await {
        Ok(ready) if !ready.is_error() => {}
        Ok(_) | Err(_) => return,
    }
    vanished(client).await;
}

/// Reads in a row of what nobody wants, before others have their turn.
const READS: usize = 16;

/// Ends when `client` has closed its connection, in whatever way, or no longer answers. What it sends is thrown away.
/// May be cancelled and called again.
pub(super) async fn ended(client: &TcpStream) {
    let mut scrap = [0; 256];
    while client.readable().await.is_ok() {
        for _ in 0..READS {
            match client.try_read(&mut scrap) {
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Ok(0) | Err(_) => return,
            }
        }
        tokio::task::yield_now().await;
    }
}

/// Whether a client is owed an answer of ours, or an answer is being written.
#[derive(Debug)]
pub(super) struct Due {
    stats: Arc<Stats>,
    owed: Mutex<Owed>,
}

#[derive(Debug)]
enum Owed {
    Nothing,
    Answer { _counted: Unfinished },
    LastBytes { _counted: Unfinished },
}

impl Due {
    pub(super) fn new(stats: Arc<Stats>) -> Self {
        Self { stats, owed: Mutex::new(Owed::Nothing) }
    }

    /// A request is with us.
    pub(super) fn asked(&self) {
        *self.owed() = Owed::Answer { _counted: self.stats.unfinished() };
    }

    /// The last of the answer is with the HTTP library.
    pub(super) fn told(&self) {
        *self.owed() = Owed::LastBytes { _counted: self.stats.unfinished() };
    }

    /// All that the HTTP library had is written.
    fn written(&self) {
        let mut owed = self.owed();
        if matches!(*owed, Owed::LastBytes { .. }) {
            *owed = Owed::Nothing;
        }
    }

    /// Whether the client is between two requests.
    pub(super) fn is_nothing(&self) -> bool {
        matches!(*self.owed(), Owed::Nothing)
    }

    fn owed(&self) -> MutexGuard<'_, Owed> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's socket under an HTTP connection. Shared, so that a last answer can be written once the connection on top
/// has given up; by `Arc`, because an upgrade wants what it carries to be `Send`.
#[derive(Debug)]
pub(super) struct SharedSocket {
    client: Arc<TcpStream>,
    due: Arc<Due>,
    /// Read before the HTTP connection was there.
    prefix: Bytes,
}

impl SharedSocket {
    pub(super) fn new(client: Arc<TcpStream>, due: Arc<Due>, prefix: Bytes) -> Self {
        Self { client, due, prefix }
    }

    /// What was read ahead and not asked for.
    pub(super) fn into_unread(self) -> Bytes {
        self.prefix
    }
}

impl AsyncRead for SharedSocket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.prefix.is_empty() {
            let length = self.prefix.len().min(buf.remaining());
            buf.put_slice(&self.prefix[..length]);
            self.prefix.advance(length);
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(self.client.poll_read_ready(cx))?;
            match self.client.try_read_buf(buf) {
                Ok(_) => return Poll::Ready(Ok(())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for SharedSocket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.due.is_nothing() {
            return Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()));
        }
        loop {
            ready!(self.client.poll_write_ready(cx))?;
            match self.client.try_write_vectored(slices) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.due.written();
        Poll::Ready(Ok(()))
    }

    /// Leaves the socket open: whoever shares it has the last word, and closes it.
    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::sockopt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::proxy::Config;
    use crate::proxy::bed::{self, asked, expect_bytes, read_head};

    #[test]
    fn half_close_is_not_the_end_but_has_the_client_probed() {
        bed::run(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let near = listener.accept().await.unwrap().0;
            client.write_all(b"unread").await.unwrap();
            let mut ended = std::pin::pin!(gone(&near));
            assert!(bed::settled(&mut ended).await.is_none());
            assert!(!sockopt::socket_keepalive(&near).unwrap());
            client.shutdown().await.unwrap();
            assert!(bed::settled(&mut ended).await.is_none());
            assert!(sockopt::socket_keepalive(&near).unwrap());
            client.set_zero_linger().unwrap();
            drop(client);
            ended.await;
        });
    }

    #[test]
    fn client_that_resets_ends_the_dial_that_it_asked_for() {
        bed::run(async {
            let (bed, silent) = (bed::start(Config::default()), bed::Silent::new().await);
            let port = silent.address.port().to_be_bytes();
            for request in [
                vec![5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, port[0], port[1]],
                format!("CONNECT {} HTTP/1.1\r\n\r\n", silent.address).into_bytes(),
                format!("GET http://{}/ HTTP/1.1\r\n\r\n", silent.address).into_bytes(),
            ] {
                let mut client = bed.connect().await;
                client.write_all(&request).await.unwrap();
                bed::settle().await;
                assert_eq!(bed.stats.counters().active, 1);
                client.set_zero_linger().unwrap();
                drop(client);
                bed.until_closed().await;
            }
            assert!(bed.codes().is_empty());
        });
    }

    #[test]
    fn client_that_resets_ends_its_request_before_and_in_the_answer() {
        bed::run(async {
            let bed = bed::start(Config::default());
            for answer in ["", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"] {
                let (mut client, mut target) = asked(&bed, "GET http://TARGET/ HTTP/1.1\r\n\r\n").await;
                read_head(&mut target).await;
                target.write_all(answer.as_bytes()).await.unwrap();
                expect_bytes(&mut client, &answer.as_bytes()[..answer.len().min(9)]).await;
                client.set_zero_linger().unwrap();
                drop(client);
                assert!(matches!(target.read(&mut [0]).await, Ok(0) | Err(_)));
                bed.until_closed().await;
            }
        });
    }

    #[test]
    fn client_that_half_closes_gets_its_answer() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let (mut client, mut target) = asked(&bed, "GET http://TARGET/ HTTP/1.1\r\n\r\n").await;
            client.shutdown().await.unwrap();
            read_head(&mut target).await;
            bed::settle().await;
            target.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi").await.unwrap();
            assert!(read_head(&mut client).await.starts_with("HTTP/1.1 200 "));
            expect_bytes(&mut client, b"hi").await;
        });
    }

    #[test]
    fn heads_that_the_http_library_refuses_get_our_answer() {
        bed::run(async {
            let bed = bed::start(Config { head_limit: 8 * 1024, ..Config::default() });
            let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a:b\r\n".repeat(1_100));
            let large = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(20 * 1024));
            for (head, status) in [
                (many.as_str(), "431"),
                (large.as_str(), "431"),
                ("GET / HTTP/1.1\r\nno colon\r\n\r\n", "400"),
                ("G@T / HTTP/1.1\r\n\r\n", "400"),
                ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400"),
            ] {
                let answer = bed.ask_text(head).await;
                assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
                assert_eq!(answer.matches("x-tailcar-error: TC-").count(), 1, "{answer}");
                let answer = bed.ask_text(&format!("GET / HTTP/1.1\r\nHost: a\r\n\r\n{head}")).await;
                assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
                assert_eq!(answer.matches("HTTP/1.1 ").count(), 2, "{answer}");
                assert!(answer.contains(&format!("}}HTTP/1.1 {status} ")), "{answer}");
                assert_eq!(answer.matches("x-tailcar-error: TC-").count(), 2, "{answer}");
            }
        });
    }

    #[test]
    fn many_small_fields_are_carried() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let request = format!("GET http://TARGET/ HTTP/1.1\r\n{}\r\n", "a: bcd\r\n".repeat(900));
            let (_client, mut target) = asked(&bed, &request).await;
            assert_eq!(read_head(&mut target).await.matches("a: bcd\r\n").count(), 900);
        });
    }
}
