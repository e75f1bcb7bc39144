//! A TCP stream that knows the network it was made on: it ends when its own address is gone, or would not be chosen any
//! more on another default route, and is asked for a sign of life when the way may be another all the same.
//!
//! TCP by itself would send into nothing for a quarter of an hour, where a NAT or firewall has forgotten the connection:
//! the kernel is told how long what is sent may go unacknowledged. When the network moves it asks for a few seconds, by
//! keepalives and a lower limit. Source: Tailscale, wgengine/magicsock, `maybeCloseDERPsOnRebind`, which does so for DERP
//! with pings of its own.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl, set_tcp_user_timeout,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};
use tokio_util::sync::ReusableBoxFuture;

use super::snapshot::addresses_now;
use super::{News, State};
use crate::transport::interfaces::are_siblings;

/// How long the other side may take to answer a keepalive. Source: Tailscale, the same, which waits 3 s for its pings.
const ANSWER: Duration = Duration::from_secs(3);
/// How long something may go unacknowledged meanwhile, and when the stream is left in peace again.
const PROMPT: (u32, Duration) = (4_000, Duration::from_secs(8));
/// The same for a stream that takes no more. The other side may merely be full, which the kernel counts as if it did not
/// answer; so it has longer than a relay may take nothing.
const PATIENT: (u32, Duration) = (16_000, Duration::from_secs(20));

/// Why a stream ended whose address is gone.
const GONE: &str = "the address it came from is gone";

/// The kernel is asking.
struct Probe {
    patient: bool,
    until: Pin<Box<Sleep>>,
}

/// The stream.
pub(in crate::transport) struct Tied {
    stream: TcpStream,
    /// Its ends.
    local: Option<IpAddr>,
    remote: Option<SocketAddr>,
    news: ReusableBoxFuture<'static, (News, State)>,
    /// How many moves, and changes of default routes, it has seen.
    moves: u64,
    routes: u64,
    probe: Option<Probe>,
    /// Whether the last write has to wait.
    is_full: bool,
    /// How many milliseconds something may go unacknowledged while nothing is asked and the stream is not full.
    at_rest_ms: u32,
    /// Why it ended.
    gone: Option<&'static str>,
}

impl Tied {
    /// Of a stream whose connecting began no sooner than the news, and to which nothing that is sent goes unacknowledged
    /// for longer than `at_rest`.
    pub(in crate::transport) fn new(stream: TcpStream, news: News, at_rest: Duration) -> Self {
        let local = stream.local_addr().ok().map(|local| local.ip());
        let remote = stream.peer_addr().ok();
        let (moves, routes) = (news.moves, news.routes);
        let news = ReusableBoxFuture::new(wait(news));
        let at_rest_ms = u32::try_from(at_rest.as_millis()).unwrap_or(u32::MAX);
        let tied =
            Self { stream, local, remote, news, moves, routes, probe: None, is_full: false, at_rest_ms, gone: None };
        tied.rest();
        tied
    }

    /// Looks for news of the network.
    ///
    /// # Errors
    /// When the stream's own address is gone, or packets to the other side leave from another one now.
    fn follow(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while let Poll::Ready((news, state)) = self.news.poll(cx) {
            self.news.set(wait(news));
            if self.local.is_some_and(|local| state.is_gone(local, addresses_now)) {
                self.gone = Some(GONE);
            }
            let rerouted = std::mem::replace(&mut self.routes, state.routes) != state.routes;
            if std::mem::replace(&mut self.moves, state.moves) != state.moves {
                self.judge(rerouted);
            }
        }
        if let Some(why) = self.gone {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, why));
        }
        if let Some(probe) = &mut self.probe
            && probe.until.as_mut().poll(cx).is_ready()
        {
            self.probe = None;
            // A stream that does not take them back is only asked more often than needed.
            let _ = set_socket_keepalive(&self.stream, false);
            self.rest();
        }
        Ok(())
    }

    /// The way may be another. By another default route, what would be dialled from another address now is: packets
    /// from this one may be lost on the new way, and who has moved does not want the old one. Otherwise another choice
    /// means little, and so does that of an address of the same interface and network: of several IPv6 addresses the
    /// kernel prefers ever newer ones, while the old ones still serve.
    fn judge(&mut self, rerouted: bool) {
        let chosen = self.remote.and_then(source_for);
        let is_as_good = |chosen| self.local.is_some_and(|local| chosen == local || are_siblings(chosen, local));
        if rerouted && chosen.is_some_and(|chosen| !is_as_good(chosen)) {
            self.gone = self.gone.or(Some("packets leave from another address now"));
        } else {
            self.ask();
        }
    }

    /// Has the kernel find out whether the other side is still there. Where it cannot, the protocols above will.
    fn ask(&mut self) {
        let patient = self.is_full;
        let (acknowledge_ms, limit) = if patient { PATIENT } else { PROMPT };
        let asked = || -> rustix::io::Result<()> {
            set_tcp_keepidle(&self.stream, Duration::from_secs(1))?;
            set_tcp_keepintvl(&self.stream, ANSWER)?;
            set_tcp_keepcnt(&self.stream, 1)?;
            set_tcp_user_timeout(&self.stream, acknowledge_ms)?;
            set_socket_keepalive(&self.stream, true)
        };
        if asked().is_ok() {
            self.probe = Some(Probe { patient, until: Box::pin(sleep(limit)) });
        }
    }

    /// Sets the limit for when nothing is asked. Where the kernel refuses, the protocols above find out, later.
    fn rest(&self) {
        let limit_ms = if self.is_full { self.at_rest_ms.max(PATIENT.0) } else { self.at_rest_ms };
        let _ = set_tcp_user_timeout(&self.stream, limit_ms);
    }

    /// Gives a stream more time while it is full.
    fn note_write<T>(&mut self, written: Poll<T>) -> Poll<T> {
        let was_full = std::mem::replace(&mut self.is_full, written.is_pending());
        match &self.probe {
            None if was_full != self.is_full => self.rest(),
            Some(probe) if self.is_full && !probe.patient => self.ask(),
            _ => {}
        }
        written
    }
}

/// The address that the kernel chooses for packets to `remote`; nothing is sent. `None` without a route.
fn source_for(remote: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = if remote.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(remote).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

async fn wait(mut news: News) -> (News, State) {
    let state = news.next().await;
    (news, state)
}

impl AsyncRead for Tied {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.follow(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Tied {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.follow(cx)?;
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.note_write(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.follow(cx)?;
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.note_write(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rustix::net::sockopt::{socket_keepalive, tcp_user_timeout};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::sync::watch;
    use tokio::time::timeout;

    use super::*;
    use crate::transport::link::Link;

    const AT_REST: (Duration, u32) = (Duration::from_secs(5), 5_000);

    async fn connected(link: &Link) -> (Tied, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (Tied::new(stream, link.news(), AT_REST.0), listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn a_stream_ends_with_its_address_and_at_once() {
        let out = watch::Sender::new(State::default());
        let (mut tied, _other) = connected(&Link { state: out.subscribe() }).await;
        // Loopback never goes; so it is given another.
        tied.local = Some("192.0.2.1".parse().unwrap());
        let mut octet = [0];
        assert!(timeout(Duration::from_millis(20), tied.read(&mut octet)).await.is_err());
        let reading = tokio::spawn(async move { tied.read(&mut [0]).await.map_err(|error| error.kind()) });
        tokio::task::yield_now().await;
        let left = BTreeSet::from(["192.0.2.2".parse().unwrap()]);
        out.send_replace(State { changes: 1, moves: 1, addresses: Some(left.into()), ..State::default() });
        let ended = timeout(Duration::from_secs(5), reading).await.unwrap().unwrap();
        assert_eq!(ended, Err(io::ErrorKind::ConnectionAborted));
    }

    #[tokio::test]
    async fn a_stream_ends_when_packets_leave_from_another_address_by_another_route() {
        let out = watch::Sender::new(State::default());
        let (mut tied, _other) = connected(&Link { state: out.subscribe() }).await;
        // Towards loopback the kernel chooses loopback.
        tied.local = Some("192.0.2.1".parse().unwrap());
        out.send_modify(|state| state.moves = 1);
        assert!(timeout(Duration::from_millis(20), tied.read(&mut [0])).await.is_err(), "the route is the same");
        out.send_modify(|state| (state.moves, state.routes) = (2, 1));
        assert_eq!(tied.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(tied.write(&[0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    }

    #[tokio::test]
    async fn what_changed_while_the_stream_was_dialled_counts() {
        let out = watch::Sender::new(State::default());
        let news = Link { state: out.subscribe() }.news();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        out.send_modify(|state| state.moves = 1);
        let mut tied = Tied::new(stream, news, AT_REST.0);
        assert!(timeout(Duration::from_millis(20), tied.read(&mut [0])).await.is_err());
        assert!(tied.probe.is_some());
    }

    #[tokio::test]
    async fn a_stream_whose_way_may_be_another_is_asked_for_a_while() {
        let out = watch::Sender::new(State::default());
        let (mut tied, other) = connected(&Link { state: out.subscribe() }).await;
        let asked = |tied: &Tied| (socket_keepalive(&tied.stream).unwrap(), tcp_user_timeout(&tied.stream).unwrap());
        out.send_modify(|state| state.changes = 1);
        assert!(timeout(Duration::from_millis(20), tied.read(&mut [0])).await.is_err());
        assert_eq!(asked(&tied), (false, AT_REST.1), "a new address moves nothing");
        out.send_modify(|state| state.moves = 1);
        assert!(timeout(Duration::from_millis(20), tied.read(&mut [0])).await.is_err());
        assert_eq!(asked(&tied), (true, PROMPT.0));
        tied.probe.as_mut().unwrap().until = Box::pin(sleep(Duration::ZERO));
        assert!(timeout(Duration::from_millis(20), tied.read(&mut [0])).await.is_err());
        assert_eq!(asked(&tied), (false, AT_REST.1));
        drop(other);
        assert_eq!(tied.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_stream_is_given_more_time_while_it_is_full() {
        let (mut tied, mut other) = connected(&Link::default()).await;
        assert_eq!(tcp_user_timeout(&tied.stream).unwrap(), AT_REST.1);
        let octets = vec![0; 1 << 20];
        let mut sent = 0;
        while let Ok(written) = timeout(Duration::from_millis(50), tied.write(&octets)).await {
            sent += written.unwrap();
        }
        assert_eq!(tcp_user_timeout(&tied.stream).unwrap(), PATIENT.0);
        other.read_exact(&mut vec![0; sent]).await.unwrap();
        tied.write_all(b"more").await.unwrap();
        assert_eq!(tcp_user_timeout(&tied.stream).unwrap(), AT_REST.1);
    }

    #[tokio::test]
    async fn a_stream_whose_other_side_is_full_has_more_time() {
        let out = watch::Sender::new(State::default());
        let (mut tied, _other) = connected(&Link { state: out.subscribe() }).await;
        out.send_modify(|state| state.moves = 1);
        assert!(timeout(Duration::from_millis(20), tied.read(&mut [0])).await.is_err());
        assert_eq!(tcp_user_timeout(&tied.stream).unwrap(), PROMPT.0);
        let octets = vec![0; 1 << 20];
        while timeout(Duration::from_millis(50), tied.write(&octets)).await.is_ok() {}
        assert_eq!(tcp_user_timeout(&tied.stream).unwrap(), PATIENT.0);
        out.send_modify(|state| state.moves = 2);
        assert!(timeout(Duration::from_millis(20), tied.read(&mut [0])).await.is_err());
        assert_eq!(tcp_user_timeout(&tied.stream).unwrap(), PATIENT.0, "it is still full");
    }
}
