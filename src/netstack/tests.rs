//! The stack against plain smoltcp on the other side, over a wire that loses what it is told to.

use std::net::Ipv4Addr;
use std::time::Duration;

use proptest::prelude::*;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{self, State};
use smoltcp::wire::TcpPacket;

use super::ports::endpoint;
use super::*;

pub(super) const OURS: &str = "100.64.0.2";
pub(super) const THEIRS: &str = "100.64.0.1:80";

/// Both ends, the packets between them, and a clock.
pub(super) struct World {
    pub(super) stack: Netstack,
    iface: Interface,
    sockets: SocketSet<'static>,
    server: SocketHandle,
    start: Instant,
    pub(super) now: Instant,
    to_server: VecDeque<Vec<u8>>,
    sent: usize,
    /// Every so many packets, one is lost; 0 for none.
    pub(super) loss: usize,
    /// How our packets leave.
    carrier: Option<Carrier>,
    /// Whether our SYN's window scale reaches the server, which then answers with its own.
    scales: bool,
}

impl World {
    pub(super) fn new(loss: usize) -> Self {
        let start = Instant::now();
        let mut stack = Netstack::new(7, start);
        stack.set_addresses(&[OURS.parse().unwrap(), "fd7a:115c:a1e0::2".parse().unwrap()]);
        let (mut scratch, mut nowhere) = ([0; MTU], |_: &mut [u8]| {});
        let mut device = Device::new(None, &mut scratch, &mut nowhere);
        let mut iface = Interface::new(Config::new(HardwareAddress::Ip), &mut device, smoltcp::time::Instant::ZERO);
        iface.update_ip_addrs(|list| list.push("100.64.0.1/32".parse().unwrap()).unwrap());
        let ring = || tcp::SocketBuffer::new(vec![0; 256 << 10]);
        let mut socket = tcp::Socket::new(ring(), ring());
        socket.listen(80).unwrap();
        let mut sockets = SocketSet::new(Vec::new());
        let server = sockets.add(socket);
        let to_server = VecDeque::new();
        let (carrier, scales) = (None, true);
        Self { stack, iface, sockets, server, start, now: start, to_server, sent: 0, loss, carrier, scales }
    }

    pub(super) fn connect(&mut self) -> FlowId {
        let id = self.stack.connect(OURS.parse().unwrap(), THEIRS.parse().unwrap()).unwrap();
        self.run(Duration::from_secs(1));
        id
    }

    pub(super) fn server(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.server)
    }

    fn lost(&mut self) -> bool {
        self.sent += 1;
        self.loss != 0 && self.sent.is_multiple_of(self.loss)
    }

    /// Lets both ends talk for a while, a millisecond at a time.
    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step();
            self.now += Duration::from_millis(1);
        }
    }

    fn step(&mut self) {
        self.stack.handle_timeout(self.now);
        let (out, carrier, scales) = (&mut self.to_server, self.carrier, self.scales);
        while self.stack.egress(self.now, &mut |packet| {
            let mut packet = packet.to_vec();
            if !scales && packet[33] & 0x02 != 0 {
                strip_scale(&mut packet);
            }
            out.push_back(packet);
            carrier
        }) {}
        let time = Clock::new(self.start).at(self.now);
        let mut replies = Vec::new();
        let mut scratch = [0; MTU];
        for packet in std::mem::take(&mut self.to_server) {
            if self.lost() {
                continue;
            }
            let mut reply = |packet: &mut [u8]| replies.push(packet.to_vec());
            let mut device = Device::new(Some(&packet), &mut scratch, &mut reply);
            self.iface.poll_ingress_single(time, &mut device, &mut self.sockets);
        }
        replies.extend(self.server_sends());
        for mut packet in replies {
            if !self.lost() {
                self.stack.handle_packet(&mut packet, self.now);
            }
        }
    }

    /// What the server has to send.
    pub(super) fn server_sends(&mut self) -> Vec<Vec<u8>> {
        let (mut packets, mut scratch) = (Vec::new(), [0; MTU]);
        let mut keep = |packet: &mut [u8]| packets.push(packet.to_vec());
        let mut device = Device::new(None, &mut scratch, &mut keep);
        let time = Clock::new(self.start).at(self.now);
        while self.iface.poll_egress(time, &mut device, &mut self.sockets)
            == smoltcp::iface::PollResult::SocketStateChanged
        {}
        packets
    }

    /// Sends `octets` from our side, and returns what the server got.
    pub(super) fn carry(&mut self, id: FlowId, octets: &[u8]) -> Vec<u8> {
        let (mut sent, mut got) = (0, Vec::new());
        for _ in 0..60_000 {
            if sent < octets.len() {
                sent += self.stack.with_tcp(id, |socket| socket.send_slice(&octets[sent..])).unwrap().unwrap();
                self.stack.touch(id);
            }
            self.run(Duration::from_millis(1));
            while self.server().can_recv() {
                self.server().recv(|ring| (ring.len(), got.extend_from_slice(ring))).unwrap();
            }
            if got.len() == octets.len() {
                break;
            }
        }
        got
    }
}

/// Takes the window scale out of an IPv4 packet's SYN.
fn strip_scale(packet: &mut [u8]) {
    let at = 40 + packet[40..].windows(2).position(|option| option == [3, 3]).unwrap();
    packet[at..at + 3].fill(1);
    let addresses: [Ipv4Addr; 2] = [OURS.parse().unwrap(), "100.64.0.1".parse().unwrap()];
    TcpPacket::new_unchecked(&mut packet[20..]).fill_checksum(&addresses[0].into(), &addresses[1].into());
}

#[test]
fn a_relayed_connection_carries_as_much_whether_or_not_the_peer_scales() {
    for scales in [true, false] {
        let mut world = World::new(0);
        (world.carrier, world.scales) = (Some(Carrier::Relay(1)), scales);
        let id = world.connect();
        let (octets, mut sent, mut got) = (vec![7; 1_000_000], 0, 0);
        let start = world.now;
        while got < octets.len() && world.now - start < Duration::from_secs(10) {
            sent += world.server().send_slice(&octets[sent..]).unwrap();
            world.step();
            world.now += Duration::from_millis(1);
            let take = |socket: &mut tcp::Socket<'_>| socket.recv(|ring| (ring.len(), ring.len())).unwrap();
            got += world.stack.with_tcp(id, take).unwrap();
            world.stack.touch(id);
        }
        assert_eq!(got, octets.len(), "scales: {scales}");
        assert!(world.now - start < Duration::from_millis(200), "scales: {scales}, {:?}", world.now - start);
    }
}

#[test]
fn octets_arrive_whole_and_in_order_although_packets_are_lost() {
    for loss in [0, 50, 7] {
        let mut world = World::new(loss);
        let id = world.connect();
        let octets: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
        assert!(world.carry(id, &octets) == octets, "one of {loss} packets lost");
    }
}

#[test]
fn our_half_close_reaches_the_server_and_its_answer_still_comes() {
    let mut world = World::new(0);
    let id = world.connect();
    world.stack.with_tcp(id, |socket| socket.close());
    world.stack.touch(id);
    world.run(Duration::from_millis(50));
    assert_eq!(world.server().state(), State::CloseWait);
    world.server().send_slice(b"late").unwrap();
    world.run(Duration::from_millis(50));
    let mut answer = [0; 4];
    assert_eq!(world.stack.with_tcp(id, |socket| socket.recv_slice(&mut answer)).unwrap(), Ok(4));
    assert_eq!(&answer, b"late");
}

#[test]
fn a_reset_is_told_from_an_end() {
    let mut world = World::new(0);
    let id = world.connect();
    world.server().abort();
    world.run(Duration::from_millis(50));
    let seen = world.stack.with_tcp(id, |socket| (socket.state(), socket.recv(|_| (0, ()))));
    assert_eq!(seen, Some((State::Closed, Err(tcp::RecvError::InvalidState))));
}

#[test]
fn a_refused_connection_closes_at_once() {
    let mut world = World::new(0);
    let id = world.stack.connect(OURS.parse().unwrap(), "100.64.0.1:81".parse().unwrap()).unwrap();
    world.run(Duration::from_millis(50));
    assert_eq!(world.stack.with_tcp(id, |socket| socket.state()), Some(State::Closed));
}

#[test]
fn a_released_connection_is_reset_and_forgotten() {
    let mut world = World::new(0);
    let id = world.connect();
    assert_eq!(world.server().state(), State::Established);
    world.stack.release(id);
    world.run(Duration::from_millis(50));
    assert_eq!(world.server().state(), State::Closed);
    assert_eq!((world.stack.flow_count(), world.stack.next_deadline()), (0, None));
    let (udp, _, remote) = world.stack.poll_removed().unwrap();
    assert_eq!((udp, remote), (false, THEIRS.parse().unwrap()));
}

#[test]
fn a_packet_of_no_flow_is_not_answered() {
    let mut world = World::new(0);
    world.connect();
    let mut stranger = Vec::new();
    let mut other = World::new(0);
    let id = other.stack.connect(OURS.parse().unwrap(), "100.64.0.9:80".parse().unwrap()).unwrap();
    other.stack.egress(other.now, &mut |packet| {
        stranger = packet.to_vec();
        None
    });
    assert!(other.stack.addresses_of(id).is_some());
    assert_eq!(world.stack.handle_packet(&mut stranger, world.now), None);
    let mut answers = 0;
    world.stack.egress(world.now, &mut |_| {
        answers += 1;
        None
    });
    assert_eq!(answers, 0);
}

#[test]
fn packets_keep_to_the_tunnels_mtu() {
    let mut world = World::new(0);
    let id = world.connect();
    world.stack.with_tcp(id, |socket| socket.send_slice(&[0; 100_000])).unwrap().unwrap();
    world.stack.touch(id);
    let mut longest = 0;
    world.stack.egress(world.now, &mut |packet| {
        longest = longest.max(packet.len());
        None
    });
    assert_eq!(longest, MTU);
}

#[test]
fn one_flow_does_not_keep_another_from_its_turn() {
    let mut world = World::new(0);
    let first = world.connect();
    let remote = "[fd7a:115c:a1e0::1]:80".parse().unwrap();
    let local = "fd7a:115c:a1e0::2".parse().unwrap();
    world.stack.with_tcp(first, |socket| socket.send_slice(&[0; 500_000])).unwrap().unwrap();
    world.stack.touch(first);
    world.stack.connect(local, remote).unwrap();
    let mut versions = Vec::new();
    world.stack.egress(world.now, &mut |packet| {
        versions.push(packet[0] >> 4);
        None
    });
    assert!(versions.contains(&6) && versions.len() <= QUANTUM + 1, "{} packets", versions.len());
}

#[test]
fn longest_datagram_is_one_packet_and_nothing_longer_is_any() {
    for (local, remote) in [(OURS, "100.64.0.1:53"), ("fd7a:115c:a1e0::2", "[fd7a:115c:a1e0::1]:53")] {
        let (mut world, remote): (_, SocketAddr) = (World::new(0), remote.parse().unwrap());
        let id = world.stack.open_udp(local.parse().unwrap(), remote).unwrap();
        let mut lengths = |octets: usize| {
            let to = smoltcp::wire::IpEndpoint::new(remote.ip().into(), remote.port());
            world.stack.with_udp(id, |socket| socket.send_slice(&vec![7; octets], to)).unwrap().unwrap();
            world.stack.touch(id);
            let mut lengths = Vec::new();
            world.stack.egress(world.now, &mut |packet| {
                lengths.push(packet.len());
                None
            });
            lengths
        };
        assert_eq!(lengths(datagram_limit(remote.ip())), [MTU], "{remote}");
        assert!(lengths(datagram_limit(remote.ip()) + 1).is_empty(), "{remote}");
    }
}

#[test]
fn a_flow_from_an_address_that_only_its_peer_knows_us_by_is_answered() {
    let mut world = World::new(0);
    for last in 1..=9 {
        let known_as = IpAddr::from([100, 64, 9, last]);
        let id = world.stack.connect(known_as, THEIRS.parse().unwrap()).unwrap();
        world.run(Duration::from_millis(50));
        assert_eq!(world.stack.with_tcp(id, |socket| socket.state()), Some(State::Established), "{known_as}");
        world.server().abort();
        world.run(Duration::from_millis(50));
        world.server().listen(80).unwrap();
        world.stack.release(id);
        world.run(Duration::from_millis(50));
    }
    assert_eq!(world.stack.flow_count(), 0);
}

#[test]
fn address_that_is_not_the_nodes_is_ours_as_long_as_a_flow_uses_it() {
    let mut stack = World::new(0).stack;
    let now = Instant::now();
    let masked: IpAddr = "100.99.0.1".parse().unwrap();
    let flows = [0; 2].map(|_| stack.open_udp(masked, THEIRS.parse().unwrap()).unwrap());
    for (id, used) in flows.into_iter().zip([true, false]) {
        assert!(stack.iface.has_ip_addr(masked));
        stack.release(id);
        stack.egress(now, &mut |_| None);
        assert_eq!(stack.iface.has_ip_addr(masked), used);
    }
    assert!(stack.iface.has_ip_addr(OURS.parse::<IpAddr>().unwrap()));
}

/// Addresses of every kind, also those that no host can have.
fn any_ip() -> impl Strategy<Value = IpAddr> {
    let v4 = any::<[u8; 4]>().prop_map(IpAddr::from);
    let v6 = any::<[u8; 16]>().prop_map(IpAddr::from);
    let mapped = any::<[u8; 4]>().prop_map(|ip| Ipv4Addr::from(ip).to_ipv6_mapped().into());
    let special = ["0.0.0.0", "::", "::ffff:0.0.0.0", "255.255.255.255", "224.0.0.1", "ff02::1", OURS, "127.0.0.1"];
    prop_oneof![v4, v6, mapped, prop::sample::select(special.map(|ip| ip.parse().unwrap()).to_vec())]
}

#[test]
fn a_datagram_that_finds_a_full_ring_is_counted() {
    let mut stack = World::new(0).stack;
    let id = stack.open_udp(OURS.parse().unwrap(), THEIRS.parse().unwrap()).unwrap();
    let (local, remote) = stack.addresses_of(id).unwrap();
    let header = [remote.port(), local.port(), 8 + 100, 0].map(u16::to_be_bytes).concat();
    let answer = [header, vec![7; 100]].concat();
    let answer = crate::wire::ip::build(17, remote.ip(), local.ip(), &answer).unwrap();
    let put = |stack: &mut Netstack| stack.handle_packet(&mut answer.clone(), Instant::now());
    let taken = (0..10_000).take_while(|_| put(&mut stack).is_some() && stack.unread() == 0).count();
    assert!((1..10_000).contains(&taken));
    stack.with_udp(id, |socket| socket.recv().map(drop)).unwrap().unwrap();
    put(&mut stack);
    assert_eq!(stack.unread(), 1, "there was room");
    put(&mut stack);
    assert_eq!(stack.unread(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn whatever_the_addresses_nothing_panics(
        own in any_ip(),
        local in prop_oneof![Just(OURS.parse().unwrap()), Just("fd7a:115c:a1e0::2".parse().unwrap()), any_ip()],
        remote in (any_ip(), prop_oneof![Just(0), any::<u16>()]),
    ) {
        let now = Instant::now();
        let mut stack = Netstack::new(7, now);
        stack.set_addresses(&[OURS.parse().unwrap(), own]);
        let remote = SocketAddr::from(remote);
        let tcp = stack.connect(local, remote);
        let udp = stack.open_udp(local, remote);
        let fits = remote.port() != 0 && local.is_ipv4() == remote.is_ipv4() && is_unicast(local) && is_unicast(remote.ip());
        prop_assert_eq!((tcp.is_ok(), udp.is_ok()), (fits, fits));
        if let Ok(id) = udp {
            stack.with_udp(id, |socket| socket.send_slice(b"x", endpoint(remote)).unwrap()).unwrap();
            stack.touch(id);
        }
        let mut sent = 0;
        while stack.egress(now, &mut |_| { sent += 1; None }) {}
        prop_assert_eq!(sent, if fits { 2 } else { 0 });
    }
}
