//! The UDP sockets of the node: batches in by GRO, batches out by GSO.
//!
//! One socket a family, both on the same port. `IP_MTU_DISCOVER` is set back to the system's habit, since quinn-udp
//! forbids fragments and a tunnel packet may meet a path below 1,360 octets.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::task::{Context, Poll};

use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover, set_ipv6_v6only,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// What we ask of the kernel for each direction, in octets; it gives what `net.core.[rw]mem_max` allows.
const SOCKET_BUFFER: usize = 7 << 20;
/// Receive buffers handed to the kernel at once.
const RECEIVE_BUFFERS: usize = 8;
/// The most octets that GRO puts into one of them.
const RECEIVE_BUFFER: usize = 64 << 10;

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
    octets: Vec<Vec<u8>>,
}

impl Default for ReceiveBuffers {
    fn default() -> Self {
        Self { octets: (0..RECEIVE_BUFFERS.min(BATCH_SIZE)).map(|_| vec![0; RECEIVE_BUFFER]).collect() }
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

    /// Hands every datagram that waits, a batch of each socket at most, to `each`. Returns how many there were.
    pub fn receive(&self, buffers: &mut ReceiveBuffers, mut each: impl FnMut(SocketAddr, &mut [u8])) -> usize {
        self.sockets().map(|socket| socket.receive(buffers, &mut each)).sum()
    }

    /// Sends `contents`, cut into datagrams of `segment` octets (the last may be shorter), in one call.
    ///
    /// # Errors
    /// `WouldBlock` when the socket is full: nothing was sent, try again once writable. Other errors concern this
    /// destination: it cannot be reached now.
    pub fn send(&self, destination: SocketAddr, contents: &[u8], segment: usize) -> io::Result<()> {
        let socket = if destination.is_ipv4() { &self.v4 } else { &self.v6 };
        let socket = socket.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let segments = contents.len().div_ceil(segment.max(1));
        let most = socket.state.max_gso_segments().max(1);
        if segments <= most {
            return socket.send(destination, contents, segment);
        }
        // Without GSO the batch goes out piece by piece; a full socket then loses the rest, as any network may.
        let mut pieces = contents.chunks(segment * most);
        if let Some(first) = pieces.next() {
            socket.send(destination, first, segment)?;
        }
        for piece in pieces {
            match socket.send(destination, piece, segment) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
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

    fn receive(&self, buffers: &mut ReceiveBuffers, each: &mut impl FnMut(SocketAddr, &mut [u8])) -> usize {
        let mut metas = [RecvMeta::default(); RECEIVE_BUFFERS];
        let mut slices = buffers.octets.iter_mut().map(|octets| IoSliceMut::new(octets)).collect::<Vec<_>>();
        let mut count = 0;
        let _ = self.io.try_io(Interest::READABLE, || {
            count = self.state.recv((&self.io).into(), &mut slices, &mut metas)?;
            // A batch that is not full has emptied the socket: what comes then is a new event, and asking whether
            // there is more would be a second call for each datagram that comes alone.
            if count < slices.len() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        drop(slices);
        let mut datagrams = 0;
        for (meta, octets) in metas.iter().zip(&mut buffers.octets).take(count) {
            if meta.len == 0 || meta.stride == 0 {
                continue;
            }
            for datagram in octets[..meta.len].chunks_mut(meta.stride) {
                each(meta.addr, datagram);
                datagrams += 1;
            }
        }
        datagrams
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
            receiver.receive(&mut buffers, |_, datagram| got.push(datagram.to_vec()));
        }
        assert_eq!(got, [&batch[..100], &batch[100..200], &batch[200..]]);
    }
}
