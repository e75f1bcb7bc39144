//! The engine: inner IP packets to encrypted datagrams and back. Pure: bytes and `now` come in, [`Output`]s go out.
//!
//! Out: a route names the peer, `wireguard` encrypts into a batch of the way that `magicsock` chose, or stages
//! the packet and starts a handshake. In: a datagram is classified, decrypted into the scratch buffer and judged by
//! `inbound`; what is admitted is lent to the caller. A data packet neither allocates nor waits.

mod data;
mod egress;
mod inbound;
mod link;
mod magicsock;
mod output;
mod roster;
mod standing;
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
use self::inbound::Inbound;
pub use self::inbound::{Flow, Protocol};
pub use self::magicsock::{HostState, HttpsProbe, LocalEndpoints};
use self::magicsock::{Magicsock, Via};
pub use self::output::{Config, NoRoute, Output, PathStatus, PeerStatus, Transport};
use self::roster::{Change, Roster, Slot};
use self::standing::Rivalry;
pub use self::stats::{Dropped, Stats};
use self::wireguard::{OVERHEAD, SCRATCH_LENGTH, WireGuard};
use crate::key::{NodePrivate, NodePublic};
use crate::netmap::{Carrier, Netmap, RegionId};
use crate::wire::{Kind, classify, ip, stun};

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
    /// The last destination and who serves it: packets come in runs.
    last_route: Option<(IpAddr, Slot)>,
    /// How peers that serve the same prefix rank.
    rivalry: Rivalry,
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
            last_route: None,
            rivalry: Rivalry::default(),
            stats: Stats::default(),
        }
    }

    /// Takes a new netmap over: tunnels of peers that are gone or have other keys end; endpoints, disco keys, homes and
    /// the DERP map are followed.
    pub fn handle_netmap(&mut self, netmap: Arc<Netmap>, now: Instant) {
        let changes = self.roster.handle_netmap(&netmap);
        for change in &changes {
            match change {
                Change::Removed(slot) => self.wireguard.remove(*slot),
                Change::Restarted(slot) => {
                    if let Some(entry) = self.roster.entry(*slot) {
                        self.wireguard.restart(*slot, &entry.peer.key, now);
                    }
                }
                Change::Updated(_) => {}
            }
        }
        self.magicsock.handle_netmap(&netmap, &changes, &self.roster, now);
        self.set_rivals(&netmap, &changes, now);
        self.set_routes(netmap, now);
        self.settle(now);
    }

    /// The newest netmap, with peers that serve the same prefix in the order in which they are used now. It is
    /// another than that taken over, and changes at [`Output::RoutesChanged`].
    pub fn netmap(&self) -> Option<&Arc<Netmap>> {
        self.netmap.as_ref()
    }

    /// Our node key is another, or peers have forgotten it: all sessions end, and those that were in use begin anew.
    pub fn set_node_key(&mut self, key: &NodePrivate, now: Instant) {
        self.magicsock.set_node_key(key.public());
        for slot in self.wireguard.set_key(key, now) {
            if let Some(entry) = self.roster.entry(slot) {
                self.wireguard.initiate(slot, &entry.peer.key, now);
            }
        }
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
        let length = self.handle_packet(Via::Derp(region, from), packet, now);
        // Only what the peer itself has sealed, and now, says that it is there.
        if let Some(entry) = self.roster.entry(slot).filter(|_| self.wireguard.heard(slot) == Some(now)) {
            self.magicsock.note_back(slot, entry, now);
        }
        Some(&mut self.scratch[..length?])
    }

    /// A region says that the peer is not there (any more).
    pub fn handle_derp_peer_gone(&mut self, region: RegionId, peer: NodePublic, now: Instant) {
        let Some(slot) = self.roster.slot(&peer) else { return };
        if let Some(entry) = self.roster.entry(slot) {
            self.magicsock.handle_derp_peer_gone(region, slot, entry, now);
        }
        self.note_peer_gone(slot, region, now);
    }

    /// A region is connected: its server has said so.
    pub fn handle_derp_connected(&mut self, region: RegionId, now: Instant) {
        self.magicsock.handle_derp_connected(region, true, &self.roster, now);
    }

    /// Control has been told that we live there; until then peers are sent to the home before.
    pub fn note_told(&mut self, home: Option<RegionId>, now: Instant) {
        self.magicsock.note_told(home, now);
    }

    /// A region's connection broke. The driver goes on connecting it until [`Output::CloseDerp`].
    pub fn handle_derp_lost(&mut self, region: RegionId, now: Instant) {
        self.magicsock.handle_derp_connected(region, false, &self.roster, now);
    }

    /// A region that is connected is doubted, or answers again. It has lost nothing so far.
    pub fn handle_derp_doubt(&mut self, region: RegionId, doubted: bool, now: Instant) {
        self.magicsock.handle_derp_doubt(region, doubted, &self.roster, now);
    }

    /// The addresses of a STUN server; none when its name does not resolve.
    pub fn handle_stun_address(&mut self, region: RegionId, servers: Vec<SocketAddr>, now: Instant) {
        self.magicsock.handle_stun_address(region, servers, &self.roster, now);
    }

    /// What came of a probe: the region's latency by HTTPS; `None` when it did not answer.
    pub fn handle_https_latency(&mut self, of: HttpsProbe, latency: Option<Duration>, now: Instant) {
        self.magicsock.handle_https_latency(of, latency, &self.roster, now);
    }

    /// Our interfaces' addresses with the bound ports, where the ways that packets take are as before; see
    /// [`handle_move`](Self::handle_move).
    pub fn set_local_endpoints(&mut self, endpoints: LocalEndpoints, now: Instant) {
        self.magicsock.set_local_endpoints(endpoints, &self.roster, now);
    }

    /// Sends an inner packet whose source is one of our addresses, or keeps it for a handshake. Returns how it leaves,
    /// `None` if it does not yet, or both ways.
    ///
    /// # Errors
    /// [`NoRoute`] when no peer serves its destination.
    pub fn handle_outbound(&mut self, packet: &[u8], now: Instant) -> Result<Option<Carrier>, NoRoute> {
        let Some(slot) = ip::destination(packet).and_then(|destination| self.slot_for(destination)) else {
            self.stats.drop(Dropped::NoRoute, 1);
            return Err(NoRoute);
        };
        if packet.len() > BATCH_LENGTH - OVERHEAD {
            self.stats.drop(Dropped::TooLong, 1);
            return Ok(None);
        }
        if self.wireguard.is_usable(slot, now) {
            return Ok(self.send_data(slot, packet, now));
        }
        if let Some(entry) = self.roster.entry(slot) {
            self.wireguard.stage(slot, &entry.peer.key, packet, now);
        }
        self.settle(now);
        Ok(None)
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
            if let Some(entry) = self.roster.entry(slot) {
                // Where there is a session already, the path may still be asleep.
                self.magicsock.ways(slot, entry, now);
            }
        }
    }

    /// Does what time demands; see [`next_deadline`](Self::next_deadline).
    pub fn handle_timeout(&mut self, now: Instant) {
        self.wireguard.handle_timeout(now);
        let wireguard = &self.wireguard;
        let (unheard, heard) = (|slot| wireguard.unheard_since(slot), |slot| wireguard.heard(slot));
        self.magicsock.handle_timeout(&self.roster, unheard, heard, now);
        self.settle(now);
        self.watch_rivals(now);
    }

    /// The next thing to do. Ask until there is none, after every batch of calls of the others.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.magicsock.poll_output().or_else(|| self.egress.poll())
    }

    /// When to call [`handle_timeout`](Self::handle_timeout), and why. It may turn out that nothing is to do then.
    pub fn next_deadline(&self) -> Option<(Instant, &'static str)> {
        let deadlines = [self.wireguard.next_deadline(), self.magicsock.next_deadline(), self.rivalry.next_deadline()];
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
            established: self.wireguard.is_usable(slot, now),
            heard: self.wireguard.heard(slot),
            asking_since: self.wireguard.asking_since(slot),
            unheard_since: self.wireguard.unheard_since(slot),
            path: self.magicsock.status(slot, entry, now),
            open: self.magicsock.is_open(slot, entry, now),
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

    fn slot_for(&mut self, destination: IpAddr) -> Option<Slot> {
        if let Some((_, slot)) = self.last_route.filter(|(last, _)| *last == destination) {
            return Some(slot);
        }
        let route = self.netmap.as_ref()?.route(destination)?;
        let slot = self.roster.slot(&route.peer.key)?;
        self.last_route = Some((destination, slot));
        Some(slot)
    }
}
