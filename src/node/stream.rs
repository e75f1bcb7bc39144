//! A connection to a target, through the tunnel or, where the user allowed it, outside.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

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

/// What a splice carried, and how it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Spliced {
    /// Bytes from the client to the target.
    pub sent: u64,
    /// Bytes from the target to the client.
    pub received: u64,
    /// Whether the target reset the connection.
    pub reset: bool,
}

impl Stream {
    /// Carries bytes both ways between `client` and the target until both directions have ended. A half-close is
    /// passed on as a half-close. Whatever else ends it before the target has ended its side, a reset, a drop of this
    /// future, or the end of the process, resets the client (`SO_LINGER` 0): a FIN would tell it that all came. `early`
    /// is what the client sent before.
    ///
    /// # Errors
    /// Only when `client` itself fails before anything ended.
    pub async fn splice(self, client: TcpStream, early: &[u8]) -> io::Result<Spliced> {
        match self {
            Self::Tunnel(tunnel) => tunnel.splice(client, early).await,
            // Boxed: few go this way, and all others would carry its buffers.
            Self::Direct(tcp) => Box::pin(direct::splice(tcp, client, early)).await,
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
