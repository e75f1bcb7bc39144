//! A connection to a target, through the tunnel or, where the user allowed it, outside.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::direct;
use super::tunnel::TunnelStream;

/// A connection whose target has answered. Lives on the data thread (it is not `Send`).
pub enum Stream {
    /// Through the tunnel.
    Tunnel(TunnelStream),
    /// Outside the tailnet, as `--direct-allow` permits.
    Direct(TcpStream),
}

/// A connection in which nothing has moved for so long, and nothing waits to, counts as idle. More cannot be told of what
/// is opaque: its target may still be thinking. An outage of a path, a router or a relay ends sooner, and browsers keep
/// for minutes what they do not use.
const IDLE_AFTER: Duration = Duration::from_secs(10);

/// What a splice has carried so far: whoever drops it in the middle wants to know, too.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Carried {
    /// Bytes from the client to the target.
    pub sent: Cell<u64>,
    /// Bytes from the target to the client.
    pub received: Cell<u64>,
    /// When the last of them were.
    pub(super) moved_at: Cell<Option<Instant>>,
    /// Whether more was surely to come when the splice was dropped: it held bytes, or a client that has sent its last
    /// waited for its answer. Of a target outside the tailnet that is not known.
    pub(super) pending: Cell<bool>,
}

impl Carried {
    pub(super) fn add_sent(&self, bytes: usize) {
        self.sent.set(self.sent.get() + bytes as u64);
    }

    pub(super) fn add_received(&self, bytes: usize) {
        self.received.set(self.received.get() + bytes as u64);
    }

    /// Bytes move now, be it by other hands than the splice's.
    pub fn note_moved(&self, now: Instant) {
        self.moved_at.set(Some(now));
    }

    /// Bytes of both directions.
    pub(super) fn total(&self) -> u64 {
        self.sent.get() + self.received.get()
    }

    /// Whether it was idle when it was dropped, at `now`: then nothing is known to be lost.
    pub fn was_idle(&self, now: Instant) -> bool {
        let lately = self.moved_at.get().is_some_and(|at| now.saturating_duration_since(at) < IDLE_AFTER);
        !lately && !self.pending.get()
    }
}

/// How a splice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Both directions did, in peace.
    Closed,
    /// The target reset the connection.
    Reset,
}

impl Stream {
    /// Carries bytes both ways between `client` and the target until both directions have ended. A half-close is
    /// passed on as a half-close. Whatever else ends it before the target has ended its side, a reset, a drop of this
    /// future, or the end of the process, resets the client (`SO_LINGER` 0): a FIN would tell it that all came. `early`
    /// is what the client sent before; `carried` grows as bytes pass.
    ///
    /// # Errors
    /// Only when `client` itself fails before both directions have ended.
    pub async fn splice(self, client: TcpStream, early: &[u8], carried: &Carried) -> io::Result<Ended> {
        match self {
            Self::Tunnel(tunnel) => tunnel.splice(client, early, carried).await,
            // Boxed: few go this way, and all others would carry its buffers.
            Self::Direct(tcp) => Box::pin(direct::splice(tcp, client, early, carried)).await,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel(tunnel) => Pin::new(tunnel).poll_read(cx, buf),
            Self::Direct(tcp) => Pin::new(tcp).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tunnel(tunnel) => Pin::new(tunnel).poll_write(cx, buf),
            Self::Direct(tcp) => Pin::new(tcp).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel(tunnel) => Pin::new(tunnel).poll_flush(cx),
            Self::Direct(tcp) => Pin::new(tcp).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel(tunnel) => Pin::new(tunnel).poll_shutdown(cx),
            Self::Direct(tcp) => Pin::new(tcp).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_idle_once_nothing_has_moved_for_ten_seconds_and_nothing_is_to_come() {
        let (carried, now) = (Carried::default(), Instant::now());
        assert!(carried.was_idle(now), "nothing ever moved");
        carried.moved_at.set(Some(now));
        assert!(!carried.was_idle(now + Duration::from_millis(9_999)));
        assert!(carried.was_idle(now + Duration::from_secs(10)));
        carried.pending.set(true);
        assert!(!carried.was_idle(now + Duration::from_secs(10)));
    }
}
