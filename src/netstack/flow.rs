//! One flow: its addresses, its socket alone in a set, its timer.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use smoltcp::iface::{Context, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::socket::{AnySocket, tcp, udp};
use smoltcp::time::Duration;

use super::OpenError;
use super::device::Device;
use super::ports::endpoint;
use super::repeat::Repeat;
use super::rings::{Sizes, Sockets};
use super::timestamps;
use super::window::Window;
use crate::netmap::Carrier;

/// Datagrams and octets that a UDP flow holds each way: so many come through of a burst that is answered at once (with
/// 16, a burst of 32 lost 19). Each may be as long as a packet permits. The pages cost nothing until they are used.
const UDP_DATAGRAMS: usize = 64;
const UDP_OCTETS: usize = 80 << 10;
/// The shortest retransmission timeout. Source: Linux, `TCP_RTO_MIN`.
const MIN_RTO: Duration = Duration::from_millis(200);
/// A connection whose data nobody acknowledges for so long is dead.
const DEAD_AFTER: Duration = Duration::from_secs(180);
/// An idle connection asks so often whether its peer is still there, so that a peer that vanished is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(75);

/// A flow's number; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowId(pub(super) u64);

/// TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Tcp,
    Udp,
}

/// What a packet of the flow is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FlowKey {
    pub(super) kind: Kind,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
}

impl FlowKey {
    /// The flow that an inbound packet belongs to, if it is whole enough to tell.
    pub(super) fn of_inbound(packet: &[u8]) -> Option<Self> {
        let (protocol, source, destination, payload) = match packet.first()? >> 4 {
            4 => {
                let header = usize::from(packet[0] & 0x0f) * 4;
                let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
                let destination: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
                (*packet.get(9)?, IpAddr::from(source), IpAddr::from(destination), packet.get(header..)?)
            }
            6 => {
                let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
                let destination: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
                (*packet.get(6)?, IpAddr::from(source), IpAddr::from(destination), packet.get(40..)?)
            }
            _ => return None,
        };
        let kind = match protocol {
            6 => Kind::Tcp,
            17 => Kind::Udp,
            _ => return None,
        };
        let port = |at: usize| Some(u16::from_be_bytes([*payload.get(at)?, *payload.get(at + 1)?]));
        Some(Self { kind, remote: SocketAddr::new(source, port(0)?), local: SocketAddr::new(destination, port(2)?) })
    }
}

/// What to send again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// The SYNs of connections that have had no answer.
    Syns,
    /// These, and the segments that open connections have repeated in vain.
    Everything,
}

pub(super) struct Flow {
    pub(super) key: FlowKey,
    sockets: Sockets,
    handle: SocketHandle,
    /// Of a connection's rings.
    pub(super) sizes: Option<Sizes>,
    /// Whether it is on the list of those that may have something to send.
    pub(super) dirty: bool,
    /// When smoltcp wants it polled.
    pub(super) due: Option<Instant>,
    released: bool,
    /// What it may have in flight.
    pub(super) window: Window,
    /// What it sends again when the way has changed.
    repeat: Repeat,
}

impl Flow {
    /// A TCP connection whose SYN is about to leave.
    pub(super) fn connect(
        context: &mut Context,
        local: SocketAddr,
        remote: SocketAddr,
        sizes: Sizes,
    ) -> Result<Self, OpenError> {
        let (mut handle, mut connected) = (SocketHandle::default(), Ok(()));
        let sockets = Sockets::build(sizes.receive, sizes.send, |receive, send| {
            let mut socket = tcp::Socket::new(tcp::SocketBuffer::new(receive), tcp::SocketBuffer::new(send));
            tune(&mut socket);
            connected = socket.connect(context, endpoint(remote), endpoint(local));
            alone(socket, &mut handle)
        })?;
        connected.map_err(|_| OpenError::Unaddressable)?;
        Ok(Self { sizes: Some(sizes), ..Self::new(Kind::Tcp, local, remote, sockets, handle) })
    }

    /// A UDP flow.
    pub(super) fn udp(local: SocketAddr, remote: SocketAddr) -> Result<Self, OpenError> {
        let (mut handle, mut bound) = (SocketHandle::default(), Ok(()));
        let sockets = Sockets::build(UDP_OCTETS, UDP_OCTETS, |receive, send| {
            let ring = |octets| udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; UDP_DATAGRAMS], octets);
            let mut socket = udp::Socket::new(ring(receive), ring(send));
            bound = socket.bind(endpoint(local));
            alone(socket, &mut handle)
        })?;
        bound.map_err(|_| OpenError::Unaddressable)?;
        Ok(Self::new(Kind::Udp, local, remote, sockets, handle))
    }

    fn new(kind: Kind, local: SocketAddr, remote: SocketAddr, sockets: Sockets, handle: SocketHandle) -> Self {
        let key = FlowKey { kind, local, remote };
        let (window, repeat) = (Window::default(), Repeat::default());
        Self { key, sockets, handle, sizes: None, dirty: false, due: None, released: false, window, repeat }
    }

    /// Runs `act` on the socket set.
    pub(super) fn with_set<T>(&mut self, act: impl FnOnce(&mut SocketSet<'_>) -> T) -> T {
        self.sockets.with_dependent_mut(|_, set| act(set))
    }

    /// Runs `act` on the TCP socket, if that is what it is.
    pub(super) fn with_tcp<T>(&mut self, act: impl FnOnce(&mut tcp::Socket<'_>) -> T) -> Option<T> {
        let handle = self.handle;
        (self.key.kind == Kind::Tcp).then(|| self.with_set(|set| act(set.get_mut(handle))))
    }

    /// Runs `act` on the UDP socket, if that is what it is.
    pub(super) fn with_udp<T>(&mut self, act: impl FnOnce(&mut udp::Socket<'_>) -> T) -> Option<T> {
        let handle = self.handle;
        (self.key.kind == Kind::Udp).then(|| self.with_set(|set| act(set.get_mut(handle))))
    }

    /// Sends one packet, if there is one: by the clocks of the system, of smoltcp and of timestamps.
    pub(super) fn send_one(
        &mut self,
        iface: &mut Interface,
        (now, time, stamp): (Instant, smoltcp::time::Instant, u32),
        scratch: &mut [u8],
        send: &mut dyn FnMut(&[u8]) -> Option<Carrier>,
    ) -> bool {
        let (mut window, mut repeat) = (std::mem::take(&mut self.window), std::mem::take(&mut self.repeat));
        let mut leave = |packet: &mut [u8]| {
            window.handle_outbound(packet, now);
            timestamps::stamp(packet, stamp);
            repeat.note_sent(packet);
            window.note_way(send(packet));
        };
        let mut device = Device::new(None, scratch, &mut leave);
        let sent = self.with_set(|set| iface.poll_egress(time, &mut device, set) == PollResult::SocketStateChanged);
        (self.window, self.repeat) = (window, repeat);
        sent
    }

    /// Has an answer that smoltcp made on the spot announce no more than the others.
    pub(super) fn announce(&mut self, reply: &mut [u8], now: Instant) {
        self.window.handle_outbound(reply, now);
    }

    /// A packet is about to be taken in.
    pub(super) fn note_ingress(&mut self, packet: &mut [u8], now: Instant) {
        self.window.handle_inbound(packet, now);
        timestamps::leave_room(packet);
        self.repeat.note_received(packet);
    }

    /// What waits in a UDP flow to be read: octets, and whether there is anything.
    pub(super) fn waiting(&mut self) -> Option<(usize, bool)> {
        self.with_udp(|socket| (socket.recv_queue(), socket.can_recv()))
    }

    /// What is to be sent again when the way has changed.
    pub(super) fn pending(&mut self, what: Again) -> Option<&[u8]> {
        // Few have anything, and to ask a socket takes entering its set.
        self.repeat.pending()?;
        let state = self.with_tcp(|socket| socket.state())?;
        let waits = match (state, what) {
            (tcp::State::Closed | tcp::State::TimeWait | tcp::State::Listen, _) => false,
            (tcp::State::SynSent, _) | (_, Again::Everything) => true,
            (_, Again::Syns) => false,
        };
        self.repeat.pending().filter(|_| waits)
    }

    /// Nobody holds the flow any more: a connection that both sides have closed may end in peace, any other is aborted.
    pub(super) fn release(&mut self) {
        self.released = true;
        self.with_tcp(|socket| match socket.state() {
            // What was sent before our FIN is still on its way.
            tcp::State::Closed
            | tcp::State::FinWait1
            | tcp::State::Closing
            | tcp::State::LastAck
            | tcp::State::TimeWait => {}
            tcp::State::Listen
            | tcp::State::SynSent
            | tcp::State::SynReceived
            | tcp::State::Established
            | tcp::State::FinWait2
            | tcp::State::CloseWait => socket.abort(),
        });
    }

    /// Aborts a released connection whose data have all arrived but whose peer goes on: nobody reads here any more.
    pub(super) fn abandoned(&mut self) -> bool {
        let goes_on = |socket: &mut tcp::Socket<'_>| {
            let waits = socket.state() == tcp::State::FinWait2;
            if waits {
                socket.abort();
            }
            waits
        };
        self.released && self.with_tcp(goes_on).unwrap_or(false)
    }

    /// Whether nothing will ever come of it again. A connection in TIME-WAIT is done: its port rests because ports
    /// are used in turn.
    pub(super) fn finished(&mut self) -> bool {
        let over = |socket: &mut tcp::Socket<'_>| matches!(socket.state(), tcp::State::Closed | tcp::State::TimeWait);
        self.released && self.with_tcp(over).unwrap_or(true)
    }
}

/// A set that never grows: one flow, one socket.
fn alone<'m>(socket: impl AnySocket<'m>, handle: &mut SocketHandle) -> SocketSet<'m> {
    let mut set = SocketSet::new(Vec::with_capacity(1));
    *handle = set.add(socket);
    set
}

/// The settings of every connection. The first three are the fork's own: without them the crate is plain smoltcp.
fn tune(socket: &mut tcp::Socket<'_>) {
    socket.set_sack_recovery(true);
    socket.set_min_rto(MIN_RTO);
    socket.set_congestion_control(tcp::CongestionControl::Cubic);
    socket.set_tsval_generator(Some(timestamps::PLACEHOLDER));
    socket.set_timeout(Some(DEAD_AFTER));
    socket.set_keep_alive(Some(KEEP_ALIVE));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::World;
    use super::*;

    /// A half-closed download may pause for as long as its server is there; the reader hears of one that is not.
    #[test]
    fn a_peer_that_vanishes_while_we_wait_for_its_end_is_noticed() {
        let mut world = World::new(0);
        let id = world.connect();
        world.stack.with_tcp(id, |socket| socket.close());
        world.stack.touch(id);
        world.run(std::time::Duration::from_secs(200));
        let state = |world: &mut World| world.stack.with_tcp(id, |socket| socket.state());
        assert_eq!(state(&mut world), Some(tcp::State::FinWait2));
        world.loss = 1;
        world.run((DEAD_AFTER + KEEP_ALIVE).into());
        assert_eq!(state(&mut world), Some(tcp::State::Closed));
    }

    proptest! {
        #[test]
        fn any_bytes_belong_to_a_flow_or_to_none(packet in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = FlowKey::of_inbound(&packet);
        }
    }
}
