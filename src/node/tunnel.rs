//! A TCP connection inside the tunnel, as the data thread sees it.

pub(super) mod flow;

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use smoltcp::socket::tcp;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;

use self::flow::Unopened;
use super::client::{end_by_reset, end_in_peace, has_reset, keep_asking};
use super::core::Shared;
use super::stream::{Carried, Ended};
use crate::netstack::FlowId;
use crate::transport::turn;
use crate::wire::tsmp::Reason;

/// Octets that one direction may carry before other tasks have their turn.
const TURN: usize = 1 << 20;

/// A flow that is released when it is dropped.
pub(super) struct Handle {
    pub(super) core: Shared,
    pub(super) id: FlowId,
}

impl Drop for Handle {
    fn drop(&mut self) {
        // A task that is dropped while the core is borrowed cannot be one of ours: nobody holds it over an await.
        if let Ok(mut core) = self.core.try_borrow_mut() {
            core.release(self.id, Instant::now());
        }
    }
}

/// Why a connection inside the tunnel was not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ConnectFailure {
    /// There is no flow to begin with.
    Unopened(Unopened),
    /// A RST came.
    Refused,
    /// The peer's filter said so.
    Rejected(Reason),
    /// Nothing came in time.
    Unanswered,
}

impl From<Unopened> for ConnectFailure {
    fn from(unopened: Unopened) -> Self {
        Self::Unopened(unopened)
    }
}

/// An open TCP connection inside the tunnel.
pub struct TunnelStream {
    handle: Handle,
}

impl TunnelStream {
    /// Connects to `remote`, within `limit`.
    pub(super) async fn connect(core: &Shared, remote: SocketAddr, limit: Duration) -> Result<Self, ConnectFailure> {
        let id = core.borrow_mut().connect(remote, Instant::now()).map_err(Unopened::from)?.ok_or(Unopened::Family)?;
        let handle = Handle { core: core.clone(), id };
        let rejected = core.borrow().peer_changed.clone();
        let established = async {
            loop {
                let notified = rejected.notified();
                if let Some(reason) = core.borrow().rejection(id) {
                    return Err(ConnectFailure::Rejected(reason));
                }
                tokio::select! {
                    outcome = poll_fn(|cx| poll_established(core, id, cx)) => return outcome,
                    () = notified => {}
                }
            }
        };
        timeout(limit, established).await.map_err(|_| ConnectFailure::Unanswered)??;
        Ok(Self { handle })
    }

    /// See [`Stream::splice`](super::Stream::splice).
    pub(super) async fn splice(self, client: TcpStream, early: &[u8], carried: &Carried) -> io::Result<Ended> {
        end_by_reset(&client);
        let (up, down) = (Half::Open, Half::Open);
        let mut splice = Splice { tunnel: &self, client: &client, early, up, full: false, down, carried };
        // Of a client that has closed its sending side, or whose target takes nothing now, nothing is read, so that
        // somebody else must see its end. Boxed: most never come there.
        let mut reset = None;
        let ended = poll_fn(|cx| match splice.poll(cx) {
            Poll::Pending if splice.full || splice.up == Half::Ended => {
                let reset = reset.get_or_insert_with(|| Box::pin(has_reset(&client)));
                reset.as_mut().poll(cx).map(|()| Err(io::ErrorKind::ConnectionReset.into()))
            }
            ended @ (Poll::Pending | Poll::Ready(_)) => ended,
        });
        ended.await
    }

    /// Runs `act` on the socket; `None` once the flow is gone.
    fn with<T>(&self, act: impl FnOnce(&mut tcp::Socket<'_>) -> T) -> Option<T> {
        self.handle.core.borrow_mut().netstack().with_tcp(self.handle.id, act)
    }

    /// Sends what was put into the socket.
    fn pump(&self, now: Instant) {
        self.handle.core.borrow_mut().touch(self.handle.id, now);
    }

    /// Whether bytes wait in the flow: for the target's acknowledgement, or to be read.
    fn holds_any(&self) -> bool {
        let Ok(mut core) = self.handle.core.try_borrow_mut() else { return false };
        let waits = |socket: &mut tcp::Socket<'_>| socket.send_queue() > 0 || socket.recv_queue() > 0;
        core.netstack().with_tcp(self.handle.id, waits).unwrap_or(false)
    }
}

fn poll_established(core: &Shared, id: FlowId, cx: &mut Context<'_>) -> Poll<Result<(), ConnectFailure>> {
    let state = core.borrow_mut().netstack().with_tcp(id, |socket| {
        socket.register_send_waker(cx.waker());
        socket.register_recv_waker(cx.waker());
        socket.state()
    });
    match state {
        Some(tcp::State::Closed) | None => Poll::Ready(Err(ConnectFailure::Refused)),
        Some(tcp::State::SynSent | tcp::State::SynReceived | tcp::State::Listen) => Poll::Pending,
        Some(
            tcp::State::Established
            | tcp::State::FinWait1
            | tcp::State::FinWait2
            | tcp::State::CloseWait
            | tcp::State::Closing
            | tcp::State::LastAck
            | tcp::State::TimeWait,
        ) => Poll::Ready(Ok(())),
    }
}

/// One direction of a splice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Half {
    Open,
    Ended,
    Reset,
}

/// Bytes both ways between a kernel socket and a flow's rings, without a buffer between: what is read goes into the
/// ring, what is written comes from it. A full ring is a closed window, and that is all the back-pressure there is.
struct Splice<'s> {
    tunnel: &'s TunnelStream,
    client: &'s TcpStream,
    early: &'s [u8],
    up: Half,
    /// Whether the ring had no room when there was last something to do.
    full: bool,
    down: Half,
    carried: &'s Carried,
}

impl Splice<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Ended>> {
        let before = self.carried.total();
        let moved_up = self.poll_up(cx);
        let moved_down = self.poll_down(cx);
        let now = Instant::now();
        if self.carried.total() != before {
            self.carried.note_moved(now);
        }
        self.tunnel.pump(now);
        if moved_up? || moved_down? {
            turn::end(cx);
        }
        match (self.up, self.down) {
            (_, Half::Reset) => Poll::Ready(Ok(Ended::Reset)),
            (Half::Ended, Half::Ended) => Poll::Ready(Ok(Ended::Closed)),
            (Half::Open | Half::Ended | Half::Reset, Half::Open | Half::Ended) => Poll::Pending,
        }
    }

    /// From the client into the tunnel. Returns whether more could be carried at once.
    fn poll_up(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let mut carried = 0;
        self.full = false;
        while self.up == Half::Open {
            if carried >= TURN {
                return Ok(true);
            }
            let room = self.tunnel.with(|socket| {
                // Also the death of a connection in which nothing moves is told by this waker.
                socket.register_send_waker(cx.waker());
                (socket.may_send(), socket.can_send())
            });
            match room {
                Some((true, true)) => {}
                Some((true, false)) => {
                    self.full = true;
                    return Ok(false);
                }
                // Why it closed shows on the way down, once everything that came has been read.
                Some((false, _)) | None => {
                    self.end_up();
                    return Ok(false);
                }
            }
            let Some(count) = self.carry_up(cx)? else { return Ok(false) };
            carried += count;
        }
        Ok(false)
    }

    /// Nothing more is read of the client, so that only its kernel can tell whether it is still there.
    fn end_up(&mut self) {
        self.up = Half::Ended;
        keep_asking(self.client);
    }

    /// Fills the ring once: `None` when the client has nothing now, 0 when it has ended.
    fn carry_up(&mut self, cx: &mut Context<'_>) -> io::Result<Option<usize>> {
        if !self.early.is_empty() {
            let sent = self.tunnel.with(|socket| socket.send_slice(self.early).unwrap_or(0)).unwrap_or(0);
            self.early = &self.early[sent..];
            self.carried.add_sent(sent);
            return Ok(Some(sent));
        }
        match self.client.poll_read_ready(cx) {
            Poll::Ready(ready) => ready?,
            Poll::Pending => return Ok(None),
        }
        let client = self.client;
        let read = self.tunnel.with(|socket| {
            socket.send(|ring| match read_once(client, ring) {
                Ok(count) => (count, Ok(count)),
                Err(error) => (0, Err(error)),
            })
        });
        match read {
            Some(Ok(Ok(0))) => {
                self.tunnel.with(|socket| socket.close());
                self.end_up();
                Ok(Some(0))
            }
            Some(Ok(Ok(count))) => {
                self.carried.add_sent(count);
                Ok(Some(count))
            }
            Some(Ok(Err(error))) if error.kind() == io::ErrorKind::WouldBlock => Ok(Some(0)),
            Some(Ok(Err(error))) => Err(error),
            Some(Err(_)) | None => Ok(Some(0)),
        }
    }

    /// From the tunnel to the client. Returns whether more could be carried at once.
    fn poll_down(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let mut carried = 0;
        while self.down == Half::Open {
            if carried >= TURN {
                return Ok(true);
            }
            let state = self.tunnel.with(|socket| {
                if !socket.can_recv() && socket.may_recv() {
                    socket.register_recv_waker(cx.waker());
                }
                (socket.can_recv(), socket.may_recv(), finished(socket))
            });
            match state {
                Some((true, ..)) => {}
                Some((false, true, _)) => return Ok(false),
                Some((false, false, true)) => {
                    self.down = Half::Ended;
                    rustix::net::shutdown(self.client, rustix::net::Shutdown::Write)?;
                    // The answer is whole from here on, much of it perhaps still in the kernel: no end may purge that.
                    end_in_peace(self.client);
                    return Ok(false);
                }
                Some((false, false, false)) | None => {
                    self.down = Half::Reset;
                    return Ok(false);
                }
            }
            match self.client.poll_write_ready(cx) {
                Poll::Ready(ready) => ready?,
                Poll::Pending => return Ok(false),
            }
            let client = self.client;
            let written = self.tunnel.with(|socket| {
                socket.recv(|ring| match client.try_write(ring) {
                    Ok(count) => (count, Ok(count)),
                    Err(error) => (0, Err(error)),
                })
            });
            match written {
                Some(Ok(Ok(count))) => {
                    self.carried.add_received(count);
                    carried += count;
                }
                Some(Ok(Err(error))) if error.kind() == io::ErrorKind::WouldBlock => {}
                Some(Ok(Err(error))) => return Err(error),
                Some(Err(_)) | None => {}
            }
        }
        Ok(false)
    }
}

impl Drop for Splice<'_> {
    fn drop(&mut self) {
        let waits = !self.early.is_empty() || (self.up, self.down) == (Half::Ended, Half::Open);
        self.carried.pending.set(waits || self.tunnel.holds_any());
    }
}

/// Reads once. What comes short of the room has emptied the socket, as tokio's own `poll_read` takes it, too: more is a
/// new event, and a second call for each small message would only hear that there is none.
fn read_once(client: &TcpStream, room: &mut [u8]) -> io::Result<usize> {
    let mut count = 0;
    let read = client.try_io(Interest::READABLE, || {
        count = client.try_read(room)?;
        if 0 < count && count < room.len() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    if count == 0 { read.map(|()| 0) } else { Ok(count) }
}

/// Whether the target ended its side in peace: everything came, then its FIN.
fn finished(socket: &mut tcp::Socket<'_>) -> bool {
    matches!(socket.recv(|_| (0, ())), Err(tcp::RecvError::Finished))
}

impl AsyncRead for TunnelStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let outcome = self.with(|socket| {
            match socket.recv(|ring| {
                let count = ring.len().min(buf.remaining());
                buf.put_slice(&ring[..count]);
                (count, count)
            }) {
                Ok(0) => {
                    socket.register_recv_waker(cx.waker());
                    Poll::Pending
                }
                Ok(_) | Err(tcp::RecvError::Finished) => Poll::Ready(Ok(())),
                Err(tcp::RecvError::InvalidState) => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            }
        });
        let outcome = outcome.unwrap_or_else(|| Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())));
        if outcome.is_ready() {
            // The window has opened.
            self.pump(Instant::now());
        }
        outcome
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = self.with(|socket| match socket.send_slice(octets) {
            Ok(0) if !octets.is_empty() => {
                socket.register_send_waker(cx.waker());
                Poll::Pending
            }
            Ok(count) => Poll::Ready(Ok(count)),
            Err(tcp::SendError::InvalidState) => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
        });
        self.pump(Instant::now());
        outcome.unwrap_or_else(|| Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|socket| socket.close());
        self.pump(Instant::now());
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests;
