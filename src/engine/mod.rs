//! The engine: inner IP packets to encrypted datagrams and back. Pure: bytes and `now` come in, [`Output`]s go out.
//!
//! Out: a route names the peer, [`wireguard`] encrypts into a batch of the way that [`magicsock`] chose, or stages
//! the packet and starts a handshake. In: a datagram is classified, decrypted into the scratch buffer and judged by
//! [`inbound`]; what is admitted is lent to the caller. A data packet neither allocates nor waits.

mod egress;
mod inbound;
mod magicsock;
mod roster;
mod stats;
#[cfg(test)]
mod tests;
mod wireguard;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use self::egress::{BATCH_LENGTH, Egress};
pub use self::inbound::{Flow, Protocol};
use self::inbound::{Inbound, Verdict};
pub use self::magicsock::HostState;
use self::magicsock::{Magicsock, Via};
use self::roster::{Roster, Slot};
pub use self::stats::{Dropped, Stats};
use self::wireguard::{OVERHEAD, Received, SCRATCH_LENGTH, WireGuard};
use crate::key::{DiscoPrivate, NodePrivate, NodePublic};
use crate::netmap::{Netmap, RegionId};
use crate::wire::{Kind, classify, ip, stun, tsmp};

/// By which ways packets may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// By UDP where a path works, by DERP where none does.
    #[default]
    Auto,
    /// By UDP alone; DERP carries only what two nodes must tell each other to find a path.
    Direct,
    /// By DERP alone: no UDP at all, not even STUN.
    Derp,
}

/// What an engine needs to begin.
#[derive(Debug, Clone)]
pub struct Config {
    /// Our WireGuard and DERP identity.
    pub node_key: NodePrivate,
    /// Our identity in path discovery.
    pub disco_key: DiscoPrivate,
    /// What chance is derived from; handshakes alone ask the operating system.
    pub seed: [u8; 32],
    /// By which ways packets may go.
    pub transport: Transport,
}

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Send segments of `segment` bytes to one destination; the last may be shorter.
    /// Give `contents` back by [`Engine::recycle`].
    Udp {
        /// Where to.
        destination: SocketAddr,
        /// The segments, one after the other.
        contents: Vec<u8>,
        /// The bytes of each.
        segment: usize,
    },
    /// Send a packet to a peer by a region. Give `packet` back by [`Engine::recycle`].
    Derp {
        /// The region.
        region: RegionId,
        /// The peer.
        to: NodePublic,
        /// At most 64 KiB.
        packet: Vec<u8>,
    },
    /// Connect this region, or keep it connected, until [`Output::CloseDerp`].
    ConnectDerp {
        /// The region.
        region: RegionId,
        /// Whether it is our home, of which its server is told.
        home: bool,
    },
    /// Close a region.
    CloseDerp {
        /// The region.
        region: RegionId,
    },
    /// Resolve the name of a STUN server; answered by [`Engine::handle_stun_address`].
    ResolveStun {
        /// The region.
        region: RegionId,
        /// The name.
        host: String,
        /// The port, to go with the addresses.
        port: u16,
    },
    /// Measure a region by HTTPS; answered by [`Engine::handle_https_latency`].
    ProbeHttps {
        /// The region.
        region: RegionId,
    },
    /// Tell control.
    HostChanged(HostState),
    /// A peer refused a flow that we opened.
    Rejected {
        /// The flow.
        flow: Flow,
        /// Why.
        reason: tsmp::Reason,
    },
    /// A handshake with the peer is complete, or its path is another.
    PeerChanged {
        /// The peer.
        peer: NodePublic,
    },
}

/// No peer serves an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no peer of the tailnet routes this address")]
pub struct NoRoute;

/// How packets reach a peer now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathStatus {
    /// By UDP.
    Direct {
        /// The peer's address.
        addr: SocketAddr,
        /// The newest ping's round trip.
        rtt: Duration,
    },
    /// By this region.
    Derp {
        /// The region.
        region: RegionId,
    },
    /// Not at all.
    None,
}

/// What is known of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerStatus {
    /// Handshake initiations sent.
    pub handshakes_sent: u64,
    /// When a handshake was last completed.
    pub last_handshake: Option<Instant>,
    /// Whether there is a session right now.
    pub established: bool,
    /// The present path.
    pub path: PathStatus,
    /// Inner bytes sent.
    pub sent_bytes: u64,
    /// Inner bytes received.
    pub received_bytes: u64,
}

/// The machine.
pub struct Engine {
    netmap: Option<Arc<Netmap>>,
    roster: Roster,
    wireguard: WireGuard,
    magicsock: Magicsock,
    inbound: Inbound,
    egress: Egress,
    transport: Transport,
    scratch: Box<[u8]>,
    stats: Stats,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("transport", &self.transport).field("stats", &self.stats).finish_non_exhaustive()
    }
}

impl Engine {
    /// An engine without netmap: it routes nothing and knows nobody.
    pub fn new(config: Config, now: Instant) -> Self {
        let mut rng = StdRng::from_seed(config.seed);
        let node = config.node_key.public();
        Self {
            netmap: None,
            roster: Roster::default(),
            wireguard: WireGuard::new(&config.node_key, rng.random(), now),
            magicsock: Magicsock::new(config.transport, node, config.disco_key, rng.random()),
            inbound: Inbound::default(),
            egress: Egress::default(),
            transport: config.transport,
            scratch: vec![0; SCRATCH_LENGTH].into_boxed_slice(),
            stats: Stats::default(),
        }
    }

    /// Takes a new netmap over: tunnels of peers that are gone or have other keys end; endpoints, disco keys, homes and
    /// the DERP map are followed.
    pub fn handle_netmap(&mut self, netmap: Arc<Netmap>, now: Instant) {
        let changes = self.roster.handle_netmap(&netmap);
        for change in &changes {
            if let roster::Change::Removed(slot) = change {
                self.wireguard.remove(*slot);
            }
        }
        self.magicsock.handle_netmap(&netmap, &changes, &self.roster, now);
        self.netmap = Some(netmap);
        self.settle(now);
    }

    /// Takes a datagram of one of the UDP sockets, and lends out the inner packet that it held, if it is admitted.
    pub fn handle_udp<'a>(
        &'a mut self,
        from: SocketAddr,
        datagram: &'a mut [u8],
        now: Instant,
    ) -> Option<&'a mut [u8]> {
        if self.transport == Transport::Derp {
            self.stats.drop(Dropped::Unknown, 1);
            return None;
        }
        let from = SocketAddr::new(from.ip().to_canonical(), from.port());
        if classify(datagram) == Kind::Stun {
            let expected = stun::parse_response(datagram)
                .is_ok_and(|(transaction, us)| self.magicsock.handle_stun(&transaction, us, &self.roster, now));
            if !expected {
                self.stats.drop(Dropped::Stranger, 1);
            }
            return None;
        }
        let length = self.handle_packet(Via::Udp(from), datagram, now)?;
        Some(&mut self.scratch[..length])
    }

    /// Takes a packet of a DERP region, and lends out the inner packet that it held, if it is admitted.
    pub fn handle_derp<'a>(
        &'a mut self,
        region: RegionId,
        from: NodePublic,
        packet: &'a mut [u8],
        now: Instant,
    ) -> Option<&'a mut [u8]> {
        let Some(slot) = self.roster.slot(&from) else {
            self.stats.drop(Dropped::Stranger, 1);
            return None;
        };
        if let Some(entry) = self.roster.entry(slot) {
            self.magicsock.note_derp(slot, entry, region, now);
        }
        let length = self.handle_packet(Via::Derp(region, from), packet, now)?;
        Some(&mut self.scratch[..length])
    }

    /// A region says that the peer is not there (any more).
    pub fn handle_derp_peer_gone(&mut self, region: RegionId, peer: NodePublic) {
        if let Some(slot) = self.roster.slot(&peer) {
            self.magicsock.handle_derp_peer_gone(region, slot);
        }
    }

    /// A region is connected: its server has said so.
    pub fn handle_derp_connected(&mut self, region: RegionId, now: Instant) {
        self.magicsock.handle_derp_connected(region, true, &self.roster, now);
    }

    /// A region's connection broke. The driver goes on connecting it until [`Output::CloseDerp`].
    pub fn handle_derp_lost(&mut self, region: RegionId, now: Instant) {
        self.magicsock.handle_derp_connected(region, false, &self.roster, now);
    }

    /// The addresses of a STUN server; none when its name does not resolve.
    pub fn handle_stun_address(&mut self, region: RegionId, servers: Vec<SocketAddr>, now: Instant) {
        self.magicsock.handle_stun_address(region, servers, &self.roster, now);
    }

    /// A region's latency by HTTPS; `None` when it did not answer.
    pub fn handle_https_latency(&mut self, region: RegionId, latency: Option<Duration>, now: Instant) {
        self.magicsock.handle_https_latency(region, latency, &self.roster, now);
    }

    /// Our interfaces' addresses with the bound ports. Others than before mean that our network changed.
    pub fn set_local_endpoints(&mut self, endpoints: Vec<SocketAddr>, now: Instant) {
        self.magicsock.set_local_endpoints(endpoints, &self.roster, now);
    }

    /// Sends an inner packet whose source is one of our addresses, or keeps it for a handshake.
    ///
    /// # Errors
    /// [`NoRoute`] when no peer serves its destination.
    pub fn handle_outbound(&mut self, packet: &[u8], now: Instant) -> Result<(), NoRoute> {
        let Some(slot) = ip::destination(packet).and_then(|destination| self.slot_for(destination)) else {
            self.stats.drop(Dropped::NoRoute, 1);
            return Err(NoRoute);
        };
        if packet.len() > BATCH_LENGTH - OVERHEAD {
            self.stats.drop(Dropped::TooLong, 1);
            return Ok(());
        }
        if self.wireguard.is_usable(slot) {
            self.send_data(slot, packet, now);
            return Ok(());
        }
        if let Some(entry) = self.roster.entry(slot) {
            self.wireguard.stage(slot, &entry.peer.key, packet, now);
        }
        self.settle(now);
        Ok(())
    }

    /// Admits what answers a flow, until [`close_flow`](Self::close_flow).
    pub fn open_flow(&mut self, flow: Flow) {
        self.inbound.open(flow);
    }

    /// Admits it no longer.
    pub fn close_flow(&mut self, flow: &Flow) {
        self.inbound.close(flow);
    }

    /// Starts the handshake and the search for a path now, for a peer that will be needed.
    pub fn warm(&mut self, peer: NodePublic, now: Instant) {
        if let Some(slot) = self.roster.slot(&peer) {
            self.wireguard.initiate(slot, &peer, now);
            self.settle(now);
        }
    }

    /// Does what time demands; see [`next_deadline`](Self::next_deadline).
    pub fn handle_timeout(&mut self, now: Instant) {
        self.wireguard.handle_timeout(now);
        self.magicsock.handle_timeout(&self.roster, now);
        self.settle(now);
    }

    /// The next thing to do. Ask until there is none, after every batch of calls of the others.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.magicsock.poll_output().or_else(|| self.egress.poll())
    }

    /// When to call [`handle_timeout`](Self::handle_timeout), and why. It may turn out that nothing is to do then.
    pub fn next_deadline(&self) -> Option<(Instant, &'static str)> {
        let deadlines = [self.wireguard.next_deadline(), self.magicsock.next_deadline()];
        deadlines.into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// What is known of a peer; `None` if the netmap does not hold it.
    pub fn peer_status(&self, peer: &NodePublic, now: Instant) -> Option<PeerStatus> {
        let slot = self.roster.slot(peer)?;
        let entry = self.roster.entry(slot)?;
        let counters = self.wireguard.counters(slot);
        Some(PeerStatus {
            handshakes_sent: counters.handshakes_sent,
            last_handshake: counters.last_handshake,
            established: self.wireguard.is_usable(slot),
            path: self.magicsock.status(slot, entry, now),
            sent_bytes: counters.sent_bytes,
            received_bytes: counters.received_bytes,
        })
    }

    /// What control is told of us.
    pub fn host_state(&self) -> &HostState {
        self.magicsock.host_state()
    }

    /// Takes the buffer of a sent [`Output`] back.
    pub fn recycle(&mut self, buffer: Vec<u8>) {
        self.egress.recycle(buffer);
    }

    /// What was counted.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    fn slot_for(&self, destination: IpAddr) -> Option<Slot> {
        let route = self.netmap.as_ref()?.route(destination)?;
        self.roster.slot(&route.peer.key)
    }

    /// Everything that UDP and DERP share; the length of the admitted packet in the scratch buffer.
    fn handle_packet(&mut self, via: Via, packet: &mut [u8], now: Instant) -> Option<usize> {
        let outcome = match classify(packet) {
            Kind::WireGuard => self.handle_wireguard(via, packet, now),
            Kind::Disco => self.magicsock.handle_disco(via, packet, &self.roster, now).map(|()| None),
            Kind::Stun | Kind::Geneve | Kind::Unknown => Err(Dropped::Unknown),
        };
        match outcome {
            Ok(Some(length)) => {
                self.stats.delivered += 1;
                Some(length)
            }
            Ok(None) => {
                self.settle(now);
                None
            }
            Err(reason) => {
                self.stats.drop(reason, 1);
                None
            }
        }
    }

    fn handle_wireguard(&mut self, via: Via, message: &[u8], now: Instant) -> Result<Option<usize>, Dropped> {
        let source = match via {
            Via::Udp(from) => Some(from.ip()),
            Via::Derp(..) => None,
        };
        if message.len() > SCRATCH_LENGTH {
            return Err(Dropped::TooLong);
        }
        let received = self.wireguard.receive(source, message, &self.roster, &mut self.scratch, now);
        // The packet that proves a new session also sets free what waits for it, before any answer.
        match received {
            Received::Packet(slot, length) => {
                self.flush_established(now);
                self.judge(slot, length, now)
            }
            Received::Handled => Ok(None),
            Received::Cookie(length) => {
                if let Via::Udp(to) = via {
                    let contents = self.scratch[..length].to_vec();
                    self.egress.push(Output::Udp { destination: to, segment: length, contents });
                }
                Ok(None)
            }
            Received::Dropped(reason) => Err(reason),
        }
    }

    fn judge(&mut self, slot: Slot, length: usize, now: Instant) -> Result<Option<usize>, Dropped> {
        let (Some(netmap), Some(entry)) = (self.netmap.as_ref(), self.roster.entry(slot)) else {
            return Err(Dropped::Stranger);
        };
        match self.inbound.judge(netmap, &entry.peer, &self.scratch[..length]) {
            Verdict::Admit(length) => Ok(Some(length)),
            Verdict::Drop(reason) => Err(reason),
            Verdict::Tsmp(header, message) => {
                self.handle_tsmp(slot, &header, message, now);
                Ok(None)
            }
        }
    }

    fn handle_tsmp(&mut self, slot: Slot, header: &ip::Header, message: tsmp::Message, now: Instant) {
        self.stats.tsmp += 1;
        match message {
            tsmp::Message::Reject { protocol, reason, source_port, destination_port, maybe_broken } => {
                let flow = self.inbound.rejected(header, protocol, (source_port, destination_port));
                if let Some(flow) = flow.filter(|_| !maybe_broken) {
                    self.egress.push(Output::Rejected { flow, reason });
                }
            }
            tsmp::Message::Ping(token) => {
                let pong = tsmp::Message::Pong { token, peerapi_port: 0 }.encode();
                if let Some(packet) = ip::build(ip::protocol::TSMP, header.destination, header.source, &pong) {
                    self.send_data(slot, &packet, now);
                }
            }
            tsmp::Message::DiscoAdvertisement(key) if !key.is_zero() => {
                self.roster.set_disco(slot, key);
            }
            tsmp::Message::DiscoAdvertisement(_) | tsmp::Message::Pong { .. } => {}
        }
    }

    /// Encrypts a packet into the way, or both ways, that it takes now.
    fn send_data(&mut self, slot: Slot, packet: &[u8], now: Instant) {
        let Some(entry) = self.roster.entry(slot) else {
            return;
        };
        let ways = self.magicsock.ways(slot, entry, now);
        let length = packet.len() + OVERHEAD;
        let Self { wireguard, egress, stats, .. } = self;
        let sealed = match (ways.udp, ways.derp) {
            (None, None) => return stats.drop(Dropped::NoPath, 1),
            (None, Some(region)) => {
                stats.sent_derp += 1;
                egress.derp(region, entry.peer.key, length, |room| wireguard.encrypt(slot, packet, room))
            }
            (Some(to), None) => {
                stats.sent_udp += 1;
                egress.udp(to, length, |room| wireguard.encrypt(slot, packet, room)).is_some()
            }
            (Some(to), Some(region)) => {
                stats.sent_udp += 1;
                stats.sent_derp += 1;
                egress.both(to, (region, entry.peer.key), length, |room| wireguard.encrypt(slot, packet, room))
            }
        };
        if sealed { stats.sent += 1 } else { stats.drop(Dropped::NoSession, 1) }
    }

    /// Sends a handshake message or keepalive as it is.
    fn send_message(&mut self, slot: Slot, message: &[u8], now: Instant) {
        let Some(entry) = self.roster.entry(slot) else {
            return;
        };
        if message.first() == Some(&1) {
            self.stats.handshakes += 1;
            self.magicsock.note_initiation(slot);
        }
        let ways = self.magicsock.ways(slot, entry, now);
        let copy = |room: &mut [u8]| {
            room[..message.len()].copy_from_slice(message);
            true
        };
        if let Some(to) = ways.udp {
            self.egress.udp(to, message.len(), copy);
        }
        if let Some(region) = ways.derp {
            self.egress.derp(region, entry.peer.key, message.len(), copy);
        }
        if ways == magicsock::Ways::default() {
            self.stats.drop(Dropped::NoPath, 1);
            self.wireguard.note_stuck(slot);
        }
    }

    /// Drains what the machines below have for each other.
    fn settle(&mut self, now: Instant) {
        while let Some(slot) = self.magicsock.poll_path_up() {
            self.wireguard.hurry(slot, now);
        }
        while let Some((slot, message)) = self.wireguard.poll_message() {
            self.send_message(slot, &message, now);
        }
        self.flush_established(now);
        self.stats.drop(Dropped::Staged, self.wireguard.take_staged_dropped());
    }

    /// Sends what waited for sessions that are usable now.
    fn flush_established(&mut self, now: Instant) {
        while let Some(slot) = self.wireguard.poll_established() {
            while let Some(packet) = self.wireguard.unstage(slot, now) {
                self.send_data(slot, &packet, now);
            }
            if let Some(entry) = self.roster.entry(slot) {
                self.egress.push(Output::PeerChanged { peer: entry.peer.key });
            }
        }
    }
}
