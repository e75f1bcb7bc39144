//! The UDP sockets of the node: batches in by GRO, batches out by GSO.
//!
//! One socket a family, both on the same port. `IP_MTU_DISCOVER` is set back to the system's habit, since quinn-udp
//! forbids fragments and a tunnel packet may meet a path below 1,360 octets.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use rustix::io::Errno;
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover, set_ipv6_v6only,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// What we ask of the kernel for each direction, in octets; it gives what `net.core.[rw]mem_max` allows.
const SOCKET_BUFFER: usize = 7 << 20;
/// What the kernel says of a batch that it cannot cut. Source: quinn-udp, unix.rs, `send`.
const EIO: i32 = Errno::IO.raw_os_error();
const EINVAL: i32 = Errno::INVAL.raw_os_error();
/// Receive buffers handed to the kernel at once.
const RECEIVE_BUFFERS: usize = 8;
/// The most octets that GRO puts into one of them.
const RECEIVE_BUFFER: usize = 64 << 10;

/// Why datagrams did not leave, by what is to be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum SocketError {
    /// Nothing was sent: try again once the socket is writable.
    #[error("the socket is full")]
    Full,
    /// The machine is short of buffers: they are lost, as in any network (ENOBUFS, ENOMEM).
    #[error("the machine has no room for them")]
    Crowded,
    /// No way leads to the destination now, or a firewall of this machine lets none be taken: another path may do
    /// (ENETUNREACH, EHOSTUNREACH, ENETDOWN, EADDRNOTAVAIL, EPERM, EACCES and whatever else is about one destination).
    #[error("the destination cannot be reached from here")]
    Unreachable,
    /// One is longer than can be (EMSGSIZE).
    #[error("a datagram is too long")]
    TooLong,
    /// Nothing will leave by this socket any more, or arrive: others must be bound (EBADF, ENOTSOCK, EPIPE, ENOTCONN,
    /// ECONNABORTED: somebody shut it, or the administrator destroyed it).
    #[error("the socket is dead")]
    Dead,
}

impl From<io::Error> for SocketError {
    fn from(error: io::Error) -> Self {
        match Errno::from_io_error(&error) {
            Some(Errno::AGAIN) => Self::Full,
            Some(Errno::NOBUFS | Errno::NOMEM) => Self::Crowded,
            Some(Errno::MSGSIZE) => Self::TooLong,
            Some(Errno::BADF | Errno::NOTSOCK | Errno::PIPE | Errno::NOTCONN | Errno::CONNABORTED) => Self::Dead,
            // The runtime says so by itself, while it knows that the socket is full.
            None if error.kind() == io::ErrorKind::WouldBlock => Self::Full,
            Some(_) | None => Self::Unreachable,
        }
    }
}

/// The sockets, at least one of them.
pub struct Udp {
    v4: Option<Socket>,
    v6: Option<Socket>,
}

struct Socket {
    io: UdpSocket,
    state: UdpSocketState,
}

/// Where received datagrams land; reused for every call.
pub struct ReceiveBuffers {
    /// All of them in one piece: so large a one the allocator takes from the system for itself, and of that only the
    /// pages that datagrams have reached are in memory.
    octets: Vec<u8>,
}

impl Default for ReceiveBuffers {
    fn default() -> Self {
        Self { octets: vec![0; RECEIVE_BUFFERS.min(BATCH_SIZE) * RECEIVE_BUFFER] }
    }
}

impl Udp {
    /// Binds a port that the system chooses, for IPv4 and, with the same number where it is free, IPv6.
    ///
    /// # Errors
    /// When neither family can be bound.
    pub fn bind() -> io::Result<Self> {
        let v4 = Socket::bind(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        let port = v4.as_ref().map_or(0, Socket::port);
        let any = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
        let v6 = Socket::bind(any, port).or_else(|_| Socket::bind(any, 0));
        match (v4, v6) {
            (Err(error), Err(_)) => Err(error),
            (v4, v6) => Ok(Self { v4: v4.ok(), v6: v6.ok() }),
        }
    }

    /// As on a machine that has no IPv6.
    #[cfg(test)]
    pub(crate) fn without_v6(self) -> Self {
        Self { v6: None, ..self }
    }

    /// The port of each family's socket.
    pub fn ports(&self) -> (Option<u16>, Option<u16>) {
        (self.v4.as_ref().map(Socket::port), self.v6.as_ref().map(Socket::port))
    }

    /// Ready when a datagram waits on either socket.
    ///
    /// # Errors
    /// When the runtime is shutting down.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        for socket in self.sockets() {
            if let Poll::Ready(ready) = socket.io.poll_recv_ready(cx) {
                return Poll::Ready(ready);
            }
        }
        Poll::Pending
    }

    /// Ready when the socket that datagrams to `destination` leave by takes some again.
    ///
    /// # Errors
    /// When the runtime is shutting down.
    pub fn poll_writable(&self, destination: SocketAddr, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let socket = if destination.is_ipv4() { &self.v4 } else { &self.v6 };
        socket.as_ref().map_or(Poll::Ready(Ok(())), |socket| socket.io.poll_send_ready(cx))
    }

    /// Hands every datagram that waits, a batch of each socket at most, to `each`.
    ///
    /// # Errors
    /// [`SocketError::Dead`] when a socket is; what the other had has been handed over.
    pub fn receive(
        &self,
        buffers: &mut ReceiveBuffers,
        mut each: impl FnMut(SocketAddr, &mut [u8]),
    ) -> Result<(), SocketError> {
        let received = [&self.v4, &self.v6].map(|socket| match socket {
            Some(socket) => socket.receive(buffers, &mut each),
            None => Ok(()),
        });
        // Other errors are about a datagram of the past.
        let dead =
            |received: io::Result<()>| received.is_err_and(|error| SocketError::from(error) == SocketError::Dead);
        if received.into_iter().any(dead) { Err(SocketError::Dead) } else { Ok(()) }
    }

    /// Sends `contents`, cut into datagrams of `segment` octets (the last may be shorter), in one call.
    ///
    /// # Errors
    /// [`SocketError`]: at [`Full`](SocketError::Full) nothing was sent; after others part of it may have been.
    pub fn send(&self, destination: SocketAddr, contents: &[u8], segment: usize) -> Result<(), SocketError> {
        let socket = if destination.is_ipv4() { &self.v4 } else { &self.v6 };
        let socket = socket.as_ref().ok_or(SocketError::Unreachable)?;
        let segments = contents.len().div_ceil(segment.max(1));
        if segments <= socket.state.max_gso_segments().max(1) {
            match socket.send(destination, contents, segment) {
                // An interface that takes no such batches, of which the state has taken note: piece by piece, then.
                Err(error) if segments > 1 && matches!(error.raw_os_error(), Some(EIO | EINVAL)) => {}
                sent => return Ok(sent?),
            }
        }
        // A full socket then loses the rest, as any network may.
        let most = socket.state.max_gso_segments().max(1);
        let mut pieces = contents.chunks(segment * most);
        if let Some(first) = pieces.next() {
            socket.send(destination, first, segment)?;
        }
        for piece in pieces {
            match socket.send(destination, piece, segment).map_err(SocketError::from) {
                Err(SocketError::Full) => break,
                sent => sent?,
            }
        }
        Ok(())
    }

    fn sockets(&self) -> impl Iterator<Item = &Socket> {
        self.v4.iter().chain(&self.v6)
    }
}

impl Socket {
    fn bind(ip: IpAddr, port: u16) -> io::Result<Self> {
        let family = if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let fd = socket_with(family, SocketType::DGRAM, flags, None)?;
        if ip.is_ipv6() {
            set_ipv6_v6only(&fd, true)?;
        }
        bind(&fd, &SocketAddr::new(ip, port))?;
        let io = UdpSocket::from_std(fd.into())?;
        let state = UdpSocketState::new((&io).into())?;
        // The kernel may give less than is asked; it says no error then.
        let _ = state.set_send_buffer_size((&io).into(), SOCKET_BUFFER);
        let _ = state.set_recv_buffer_size((&io).into(), SOCKET_BUFFER);
        if ip.is_ipv4() {
            set_ip_mtu_discover(&io, Ipv4PathMtuDiscovery::DONT)?;
        } else {
            set_ipv6_mtu_discover(&io, Ipv6PathMtuDiscovery::DONT)?;
        }
        Ok(Self { io, state })
    }

    fn port(&self) -> u16 {
        self.io.local_addr().map_or(0, |address| address.port())
    }

    fn receive(&self, buffers: &mut ReceiveBuffers, each: &mut impl FnMut(SocketAddr, &mut [u8])) -> io::Result<()> {
        let mut metas = [RecvMeta::default(); RECEIVE_BUFFERS];
        let mut slices = buffers.octets.chunks_exact_mut(RECEIVE_BUFFER).map(IoSliceMut::new).collect::<Vec<_>>();
        let mut count = 0;
        let received = self.io.try_io(Interest::READABLE, || {
            count = self.state.recv((&self.io).into(), &mut slices, &mut metas)?;
            // A batch that is not full has emptied the socket: what comes then is a new event, and asking whether
            // there is more would be a second call for each datagram that comes alone.
            if count < slices.len() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        if count == 0 && self.is_shut() {
            return Err(Errno::NOTCONN.into());
        }
        drop(slices);
        for (meta, octets) in metas.iter().zip(buffers.octets.chunks_exact_mut(RECEIVE_BUFFER)).take(count) {
            if meta.len == 0 || meta.stride == 0 {
                continue;
            }
            for datagram in octets[..meta.len].chunks_mut(meta.stride) {
                each(meta.addr, datagram);
            }
        }
        received
    }

    /// Whether somebody shut it. It stays ready then, without anything to read.
    fn is_shut(&self) -> bool {
        let ready = pin!(self.io.ready(Interest::READABLE));
        match ready.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(ready) => ready.is_ok_and(|ready| ready.is_read_closed()),
            Poll::Pending => false,
        }
    }

    fn send(&self, destination: SocketAddr, contents: &[u8], segment: usize) -> io::Result<()> {
        let segment_size = (contents.len() > segment).then_some(segment);
        let transmit = Transmit { destination, ecn: None, contents, segment_size, src_ip: None };
        self.io.try_io(Interest::WRITABLE, || self.state.try_send((&self.io).into(), &transmit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_batch_arrives_as_the_datagrams_it_was_cut_into() {
        let (sender, receiver) = (Udp::bind().unwrap(), Udp::bind().unwrap());
        let to = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), receiver.ports().0.unwrap());
        let batch: Vec<u8> = (0..250u8).collect();
        std::future::poll_fn(|cx| sender.poll_writable(to, cx)).await.unwrap();
        sender.send(to, &batch, 100).unwrap();

        let mut got = Vec::new();
        let mut buffers = ReceiveBuffers::default();
        while got.len() < 3 {
            std::future::poll_fn(|cx| receiver.poll_readable(cx)).await.unwrap();
            receiver.receive(&mut buffers, |_, datagram| got.push(datagram.to_vec())).unwrap();
        }
        assert_eq!(got, [&batch[..100], &batch[100..200], &batch[200..]]);
    }

    #[tokio::test]
    async fn a_socket_that_somebody_shut_is_ready_for_ever_and_dead_when_it_is_read() {
        let (udp, mut buffers) = (Udp::bind().unwrap(), ReceiveBuffers::default());
        assert_eq!(udp.receive(&mut buffers, |_, _| ()), Ok(()), "nothing is there yet");
        // It fails, as the socket is not connected, and shuts it all the same.
        let _ = rustix::net::shutdown(&udp.v4.as_ref().unwrap().io, rustix::net::Shutdown::Both);
        std::future::poll_fn(|cx| udp.poll_readable(cx)).await.unwrap();
        assert_eq!(udp.receive(&mut buffers, |_, _| ()), Err(SocketError::Dead));
    }

    #[tokio::test]
    async fn an_error_says_what_is_to_be_done_about_it() {
        let udp = Udp::bind().unwrap();
        let loopback = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9);
        let broadcast = SocketAddr::new(IpAddr::V4(Ipv4Addr::BROADCAST), 9);
        std::future::poll_fn(|cx| udp.poll_writable(loopback, cx)).await.unwrap();
        assert_eq!(udp.send(broadcast, &[0; 9], 9), Err(SocketError::Unreachable));
        assert_eq!(udp.send(loopback, &[0; 70_000], 70_000), Err(SocketError::TooLong));
        assert_eq!(udp.send(loopback, &[0; 9], 9), Ok(()));
        // It fails, as the socket is not connected, and shuts it all the same.
        let _ = rustix::net::shutdown(&udp.v4.as_ref().unwrap().io, rustix::net::Shutdown::Both);
        assert_eq!(udp.send(loopback, &[0; 9], 9), Err(SocketError::Dead));
        let of = |errno: Errno| SocketError::from(io::Error::from(errno));
        assert_eq!(of(Errno::NOBUFS), SocketError::Crowded);
        for errno in [Errno::NETUNREACH, Errno::HOSTUNREACH, Errno::NETDOWN, Errno::ADDRNOTAVAIL, Errno::PERM] {
            assert_eq!(of(errno), SocketError::Unreachable, "{errno}");
        }
    }
}
