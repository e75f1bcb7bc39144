//! TCP and UDP inside the tunnel: one smoltcp `SocketSet` a flow, one `Interface` for all.
//!
//! smoltcp looks through a whole set for every packet; with a set a flow that search has length one, so a thousand idle
//! connections cost the busy one nothing, and every flow gets its turn. Flows are found by their addresses and ports.
//! Only what we opened is here: a packet of no flow is not answered at all.

mod clock;
mod device;
mod flow;
mod ports;
mod repeat;
mod rings;
mod segment;
mod timestamps;
mod window;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use smoltcp::iface::Interface;
use smoltcp::socket::{tcp, udp};
use smoltcp::wire::{HardwareAddress, IpCidr};

use clock::Clock;
use device::{Device, MTU};
pub use flow::{Again, FlowId};
use flow::{Flow, FlowKey, Kind};
use ports::Ports;
use rings::Budget;
use timestamps::Timestamps;

use crate::netmap::Carrier;

/// Segments that one flow may send before the next has its turn: one GSO batch.
const QUANTUM: usize = 48;

/// Packets that one round may send before the sockets below are asked whether they take more.
const ROUND: usize = 512;

/// The most octets of a datagram's payload to `remote`: inside the tunnel nothing is fragmented, and what is longer
/// smoltcp drops without a word. Source: RFC 791, 3.1; RFC 8200, 3; RFC 768 (the three headers).
pub fn datagram_limit(remote: IpAddr) -> usize {
    const UDP_HEADER: usize = 8;
    let ip_header = if remote.is_ipv4() { 20 } else { 40 };
    MTU - ip_header - UDP_HEADER
}

/// Why a flow was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Every local port is in use for that destination.
    #[error("all local ports are in use for this destination")]
    PortsExhausted,
    /// Nothing can be at the remote address or port, or the local address is of another family.
    #[error("no packet can be sent there")]
    Unaddressable,
    /// The system has no memory for its rings.
    #[error("no memory for another connection: {0}")]
    Memory(#[from] std::io::Error),
}

/// The stack. Pure: packets and `now` come in, packets go out by a closure.
pub struct Netstack {
    iface: Interface,
    clock: Clock,
    timestamps: Timestamps,
    addresses: Vec<IpAddr>,
    flows: HashMap<FlowId, Flow>,
    by_key: HashMap<FlowKey, FlowId>,
    next_id: u64,
    ports: Ports,
    budget: Budget,
    /// Flows that may have something to send.
    dirty: VecDeque<FlowId>,
    timers: BTreeSet<(Instant, FlowId)>,
    /// Answers that smoltcp made while it took a packet in.
    replies: Vec<Vec<u8>>,
    scratch: Box<[u8; MTU]>,
    removed: VecDeque<FlowKey>,
    unread: u64,
}

impl Netstack {
    /// A stack without addresses. `seed` makes sequence numbers and ports unguessable.
    pub fn new(seed: u64, now: Instant) -> Self {
        let mut config = smoltcp::iface::Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut scratch = Box::new([0; MTU]);
        let mut nowhere = |_: &mut [u8]| {};
        let mut device = Device::new(None, &mut scratch[..], &mut nowhere);
        let iface = Interface::new(config, &mut device, smoltcp::time::Instant::ZERO);
        Self {
            iface,
            clock: Clock::new(now),
            timestamps: Timestamps::new(seed),
            addresses: Vec::new(),
            flows: HashMap::new(),
            by_key: HashMap::new(),
            next_id: 0,
            ports: Ports::new(seed),
            budget: Budget::default(),
            dirty: VecDeque::new(),
            timers: BTreeSet::new(),
            replies: Vec::new(),
            scratch,
            removed: VecDeque::new(),
            unread: 0,
        }
    }

    /// Takes over the node's addresses. Flows from an address that is gone keep it until their owners let go of them,
    /// or their timeouts end them.
    pub fn set_addresses(&mut self, addresses: &[IpAddr]) {
        addresses.clone_into(&mut self.addresses);
        self.list_addresses(None);
    }

    /// Tells smoltcp which addresses are ours: the node's, `new`, and those that flows use because their peers know us
    /// by them. smoltcp's list holds eight, so that of the latter six may be in use at once.
    fn list_addresses(&mut self, new: Option<IpAddr>) {
        let used: BTreeSet<IpAddr> = self.by_key.keys().map(|key| key.local.ip()).collect();
        let used = used.into_iter().filter(|address| !self.addresses.contains(address) && Some(*address) != new);
        // smoltcp panics at an address that no host can have.
        let all = self.addresses.iter().copied().chain(new).chain(used).filter(|address| is_unicast(*address));
        self.iface.update_ip_addrs(|list| {
            list.clear();
            for address in all {
                // One that finds no room is not ours, and its flows end by their timeouts.
                let _ = list.push(IpCidr::new(address.into(), if address.is_ipv4() { 32 } else { 128 }));
            }
        });
    }

    /// Begins a TCP connection from `local` to `remote`. The SYN leaves with the next [`egress`](Self::egress).
    ///
    /// # Errors
    /// [`OpenError`] when a limit of ours or of the system's is reached, or there is no such destination.
    pub fn connect(&mut self, local: IpAddr, remote: SocketAddr) -> Result<FlowId, OpenError> {
        addressable(local, remote)?;
        let by_key = &self.by_key;
        let key_for = |port| FlowKey { kind: Kind::Tcp, local: SocketAddr::new(local, port), remote };
        let port = self.ports.choose(|port| by_key.contains_key(&key_for(port)))?;
        let sizes = self.budget.take(remote.ip());
        let flow = Flow::connect(self.iface.context(), SocketAddr::new(local, port), remote, sizes)
            .inspect_err(|_| self.budget.give_back(sizes))?;
        Ok(self.insert(flow))
    }

    /// Opens a UDP flow from `local` to `remote`.
    ///
    /// # Errors
    /// [`OpenError`] when a limit of ours or of the system's is reached, or there is no such destination.
    pub fn open_udp(&mut self, local: IpAddr, remote: SocketAddr) -> Result<FlowId, OpenError> {
        addressable(local, remote)?;
        let by_key = &self.by_key;
        let key_for = |port| FlowKey { kind: Kind::Udp, local: SocketAddr::new(local, port), remote };
        let port = self.ports.choose(|port| by_key.contains_key(&key_for(port)))?;
        Ok(self.insert(Flow::udp(SocketAddr::new(local, port), remote)?))
    }

    fn insert(&mut self, flow: Flow) -> FlowId {
        let local = flow.key.local.ip();
        if !self.iface.has_ip_addr(local) {
            self.list_addresses(Some(local));
        }
        let id = FlowId(self.next_id);
        self.next_id += 1;
        self.by_key.insert(flow.key, id);
        self.flows.insert(id, flow);
        self.touch(id);
        id
    }

    /// A flow's local and remote address; `None` once it is removed.
    pub fn addresses_of(&self, id: FlowId) -> Option<(SocketAddr, SocketAddr)> {
        self.flows.get(&id).map(|flow| (flow.key.local, flow.key.remote))
    }

    /// Runs `act` on the TCP socket of a flow; `None` once it is removed. Call [`touch`](Self::touch) after a change.
    pub fn with_tcp<T>(&mut self, id: FlowId, act: impl FnOnce(&mut tcp::Socket<'_>) -> T) -> Option<T> {
        self.flows.get_mut(&id)?.with_tcp(act)
    }

    /// Runs `act` on the UDP socket of a flow; `None` once it is removed. Call [`touch`](Self::touch) after a change.
    pub fn with_udp<T>(&mut self, id: FlowId, act: impl FnOnce(&mut udp::Socket<'_>) -> T) -> Option<T> {
        self.flows.get_mut(&id)?.with_udp(act)
    }

    /// Puts a flow on the list of those that may have something to send.
    pub fn touch(&mut self, id: FlowId) {
        if let Some(flow) = self.flows.get_mut(&id)
            && !flow.dirty
        {
            flow.dirty = true;
            self.dirty.push_back(id);
        }
    }

    /// Sends again what waits for an acknowledgement from a remote address to which the way `is_another` now: it went
    /// by the way before, and would be repeated only after TCP's pause, which doubles with each try.
    pub fn repeat(&mut self, what: Again, is_another: impl Fn(IpAddr) -> bool) {
        for flow in self.flows.values_mut() {
            let remote = flow.key.remote.ip();
            // Few connections wait, and each look at the routes costs two searches.
            if let Some(packet) = flow.pending(what)
                && is_another(remote)
            {
                self.replies.push(packet.to_vec());
            }
        }
    }

    /// Lets go of a flow. A TCP connection that is still open gets a RST with the next egress; one that was closed
    /// well goes on in the background until its last FIN is answered.
    pub fn release(&mut self, id: FlowId) {
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.release();
            self.touch(id);
        }
    }

    /// Takes a packet from the tunnel. Returns the flow that it belongs to, or `None`: it is dropped then.
    pub fn handle_packet(&mut self, packet: &mut [u8], now: Instant) -> Option<FlowId> {
        self.skip_pause(now);
        let id = *self.by_key.get(&FlowKey::of_inbound(packet)?)?;
        let flow = self.flows.get_mut(&id)?;
        let known = flow.window.round_trip().is_some();
        flow.note_ingress(packet, now);
        if let Some(trip) = flow.window.round_trip().filter(|_| !known) {
            self.budget.note_round_trip(flow.key.remote.ip(), trip);
        }
        let (first, waiting) = (self.replies.len(), flow.waiting());
        let replies = &mut self.replies;
        let mut reply = |packet: &mut [u8]| replies.push(packet.to_vec());
        let mut device = Device::new(Some(packet), &mut self.scratch[..], &mut reply);
        let (iface, time) = (&mut self.iface, self.clock.at(now));
        flow.with_set(|set| iface.poll_ingress_single(time, &mut device, set));
        self.unread += u64::from(waiting.is_some() && flow.waiting() == waiting);
        self.replies[first..].iter_mut().for_each(|reply| flow.announce(reply, now));
        self.touch(id);
        Some(id)
    }

    /// Gives flows that have something to send their turns, each at most 48 packets, until about `ROUND` packets
    /// are out; `send` takes each packet, and says how it leaves, if it can tell. Returns whether more waits.
    pub fn egress(&mut self, now: Instant, send: &mut dyn FnMut(&[u8]) -> Option<Carrier>) -> bool {
        self.skip_pause(now);
        let time = self.clock.at(now);
        let stamp = self.timestamps.at(time);
        for mut packet in self.replies.drain(..) {
            timestamps::stamp(&mut packet, stamp);
            send(&packet);
        }
        let mut left = ROUND;
        for _ in 0..self.dirty.len() {
            if left == 0 {
                break;
            }
            let Some(id) = self.dirty.pop_front() else { break };
            let Some(flow) = self.flows.get_mut(&id) else { continue };
            flow.dirty = false;
            let mut sent = QUANTUM;
            while sent > 0 && flow.send_one(&mut self.iface, (now, time, stamp), &mut self.scratch[..], send) {
                sent -= 1;
            }
            left = left.saturating_sub(QUANTUM - sent);
            if sent == 0 || flow.abandoned() {
                self.touch(id);
            } else if flow.finished() {
                self.remove(id);
            } else {
                self.schedule(id, now);
            }
        }
        !self.dirty.is_empty()
    }

    /// Sets a flow's timer to when smoltcp wants it polled again.
    fn schedule(&mut self, id: FlowId, now: Instant) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let (iface, time) = (&mut self.iface, self.clock.at(now));
        let due = flow.with_set(|set| iface.poll_at(time, set)).map(|at| self.clock.when(at).max(now));
        if flow.due == due {
            return;
        }
        if let Some(old) = std::mem::replace(&mut flow.due, due) {
            self.timers.remove(&(old, id));
        }
        if let Some(due) = due {
            self.timers.insert((due, id));
        }
    }

    fn remove(&mut self, id: FlowId) {
        let Some(flow) = self.flows.remove(&id) else { return };
        self.by_key.remove(&flow.key);
        self.removed.push_back(flow.key);
        if let Some(sizes) = flow.sizes {
            self.budget.give_back(sizes);
        }
        // The shortest of its life: the first one had a handshake in it, perhaps, or a relay.
        if let Some(trip) = flow.window.round_trip() {
            self.budget.note_round_trip(flow.key.remote.ip(), trip);
        }
        if let Some(due) = flow.due {
            self.timers.remove(&(due, id));
        }
        let local = flow.key.local.ip();
        if !self.addresses.contains(&local) && !self.by_key.keys().any(|key| key.local.ip() == local) {
            self.list_addresses(None);
        }
    }

    /// When [`handle_timeout`](Self::handle_timeout) is to be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.timers.first().map(|(due, _)| *due)
    }

    /// Wakes the flows whose time has come; they send with the next [`egress`](Self::egress).
    pub fn handle_timeout(&mut self, now: Instant) {
        self.skip_pause(now);
        self.wake_due(now);
    }

    fn skip_pause(&mut self, now: Instant) {
        if self.clock.skip_pause(self.next_deadline(), now) {
            self.wake_due(now);
        }
    }

    fn wake_due(&mut self, now: Instant) {
        while let Some(&(due, id)) = self.timers.first()
            && due <= now
        {
            self.timers.pop_first();
            if let Some(flow) = self.flows.get_mut(&id) {
                flow.due = None;
            }
            self.touch(id);
        }
    }

    /// Whether a flow has something to send that no [`egress`](Self::egress) has seen yet.
    pub fn has_work(&self) -> bool {
        !self.dirty.is_empty() || !self.replies.is_empty()
    }

    /// Datagrams that a flow did not take: whoever reads there is slow, and its ring was full; or they were damaged. An
    /// empty one that came while others waited counts as well: a ring tells of its octets alone.
    pub fn unread(&self) -> u64 {
        self.unread
    }

    /// The next flow that has ended since the last call: whether it was UDP, its local and its remote address.
    pub fn poll_removed(&mut self) -> Option<(bool, SocketAddr, SocketAddr)> {
        self.removed.pop_front().map(|key| (key.kind == Kind::Udp, key.local, key.remote))
    }

    /// How many flows there are, those that are ending included.
    pub fn flow_count(&self) -> usize {
        self.flows.len()
    }
}

/// Whether packets can go from `local` to `remote`: smoltcp panics at others, or drops them without a word.
fn addressable(local: IpAddr, remote: SocketAddr) -> Result<(), OpenError> {
    let same_family = local.is_ipv4() == remote.is_ipv4();
    let fits = same_family && remote.port() != 0 && is_unicast(local) && is_unicast(remote.ip());
    if fits { Ok(()) } else { Err(OpenError::Unaddressable) }
}

/// Whether an address can be one host's.
fn is_unicast(ip: IpAddr) -> bool {
    let broadcast = ip == IpAddr::V4(std::net::Ipv4Addr::BROADCAST);
    !ip.is_unspecified() && !ip.is_multicast() && !broadcast
}

#[cfg(test)]
mod tests;
