//! Magicsock: which way a packet takes to its peer, by UDP or by which DERP region.
//!
//! Named after Tailscale's package, whose behaviour on the wire this follows. WireGuard never learns addresses here:
//! only disco's pongs choose a UDP path. Source: Tailscale, wgengine/magicsock.

mod derp;
mod disco;
mod endpoints;
mod exchange;
mod home;
mod netcheck;
mod peer;
mod rank;
mod relayed;
mod round;
mod silence;
mod timers;

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crypto_box::SalsaBox;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use self::derp::{Action, Relays};
pub use self::endpoints::LocalEndpoints;
use self::netcheck::Netcheck;
pub use self::netcheck::{HostState, HttpsProbe};
use self::peer::Path;
use super::roster::{Change, Entry, Roster, Slot};
use super::{Output, PathStatus, Transport};
use crate::key::{DiscoPrivate, DiscoPublic, NodePublic};
use crate::netmap::{Netmap, RegionId};
use crate::wire::stun;
use crate::wire::tailcfg::derp::DerpMap;

/// How a packet came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Via {
    /// From this address.
    Udp(SocketAddr),
    /// By this region, from this node: the server vouches for the key.
    Derp(RegionId, NodePublic),
}

/// The ways that a packet takes now; both while a UDP path is in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Ways {
    pub(super) udp: Option<SocketAddr>,
    pub(super) derp: Option<RegionId>,
}

/// What is known of one peer in use.
struct Place {
    path: Path,
    /// The box that our disco key and this one of the peer make.
    shared: Option<(DiscoPublic, SalsaBox)>,
    /// Which of the endpoints of a peer without disco is tried.
    rotation: usize,
    /// Whether its region has said PeerGone since it last brought something of the peer's, and when what was sent
    /// before was last sent again for that.
    gone: bool,
    resent_at: Option<Instant>,
    /// The peer's home when that was last looked at, and whether it has moved since all was last sent again.
    home: Option<RegionId>,
    moved: bool,
}

/// All paths.
pub(super) struct Magicsock {
    transport: Transport,
    node: NodePublic,
    private: DiscoPrivate,
    public: DiscoPublic,
    rng: StdRng,
    map: Arc<DerpMap>,
    places: Vec<Option<Box<Place>>>,
    /// Slots whose paths have deadlines.
    active: BTreeSet<Slot>,
    /// No path has anything to do before.
    wake_at: Option<Instant>,
    relays: Relays,
    netcheck: Netcheck,
    /// Peers to be called as soon as our endpoints are fresh, and since when they wait.
    calls: BTreeSet<Slot>,
    settled_at: Option<Instant>,
    path_up: VecDeque<Slot>,
    outputs: VecDeque<Output>,
}

impl Magicsock {
    pub(super) fn new(transport: Transport, node: NodePublic, private: DiscoPrivate, seed: [u8; 32]) -> Self {
        let mut rng = StdRng::from_seed(seed);
        Self {
            transport,
            node,
            public: private.public(),
            private,
            map: Arc::default(),
            places: Vec::new(),
            active: BTreeSet::new(),
            wake_at: None,
            relays: Relays::default(),
            netcheck: Netcheck::new(transport, node, rng.random()),
            rng,
            calls: BTreeSet::new(),
            settled_at: None,
            path_up: VecDeque::new(),
            outputs: VecDeque::new(),
        }
    }

    /// We are known by this key from now on.
    pub(super) fn set_node_key(&mut self, node: NodePublic) {
        self.node = node;
    }

    pub(super) fn host_state(&self) -> &HostState {
        self.netcheck.host()
    }

    pub(super) fn handle_netmap(&mut self, netmap: &Netmap, changes: &[Change], roster: &Roster, now: Instant) {
        for change in changes {
            match change {
                Change::Removed(slot) => {
                    if let Some(place) = self.places.get_mut(*slot) {
                        *place = None;
                    }
                    self.active.remove(slot);
                    self.calls.remove(slot);
                }
                Change::Updated(slot) | Change::Restarted(slot) => {
                    let place = self.places.get_mut(*slot).and_then(Option::as_mut);
                    if let (Some(place), Some(entry)) = (place, roster.entry(*slot)) {
                        place.path.set_endpoints(&entry.peer.endpoints, now);
                        if matches!(change, Change::Restarted(_)) {
                            place.path.doubt();
                        }
                        self.follow_home(*slot, entry, now);
                        self.reschedule(*slot);
                    }
                }
            }
        }
        if self.map != netmap.derp {
            let old = std::mem::replace(&mut self.map, netmap.derp.clone());
            for (id, _) in old.regions.iter().filter(|(id, region)| self.map.regions.get(id) != Some(region)) {
                self.relays.close(*id);
            }
            self.netcheck.set_map(&netmap.derp, now);
        }
        self.follow_netcheck(roster, now);
    }

    pub(super) fn set_local_endpoints(&mut self, local: LocalEndpoints, roster: &Roster, now: Instant) {
        self.netcheck.set_local_endpoints(local, now);
        self.follow_netcheck(roster, now);
    }

    /// Our network is another: see [`Engine::handle_move`](crate::engine::Engine::handle_move).
    pub(super) fn handle_move(&mut self, local: LocalEndpoints, roster: &Roster, now: Instant) {
        self.netcheck.handle_move(local, now);
        self.follow_netcheck(roster, now);
        for slot in 0..self.places.len() {
            let (Some(entry), Some(place)) = (roster.entry(slot), self.places[slot].as_mut()) else {
                continue;
            };
            place.path.retract(now);
            place.path.doubt();
            if place.path.is_active(now) {
                self.discover(slot, entry, now);
                self.reschedule(slot);
            }
        }
    }

    /// Nothing can be sent to that address now: who is reached there is looked for, and a server there is not waited for.
    pub(super) fn handle_unreachable(&mut self, addr: SocketAddr, roster: &Roster, now: Instant) {
        self.netcheck.handle_unreachable(addr, now);
        self.follow_netcheck(roster, now);
        let slots: Vec<Slot> = self.active.iter().copied().collect();
        for slot in slots {
            let Some(entry) = roster.entry(slot) else { continue };
            let relay = self.relay(slot, entry).filter(|region| self.relays.is_connected(*region));
            let relayed = relay.is_some() && self.transport != Transport::Direct;
            let place = self.places.get_mut(slot).and_then(Option::as_mut);
            if let Some(news) = place.and_then(|place| place.path.handle_refused(addr, relayed, now)) {
                if news.resend {
                    self.resend(slot, entry);
                }
                self.probe(slot, entry, news.probe, now);
                self.reschedule(slot);
            }
        }
    }

    /// The ways for a packet that goes out now; counts as use of the peer, and looks for better ways when needed.
    pub(super) fn ways(&mut self, slot: Slot, entry: &Entry, now: Instant) -> Ways {
        self.netcheck.note_use(now);
        let transport = self.transport;
        let place = self.place(slot, entry, now);
        if entry.peer.wireguard_only {
            let endpoints = &entry.peer.endpoints;
            let turn = place.rotation.checked_rem(endpoints.len());
            let udp = turn.and_then(|turn| endpoints.get(turn).copied()).filter(|_| transport != Transport::Derp);
            return Ways { udp, derp: None };
        }
        let sent = place.path.note_send(now);
        let best = place.path.best(now);
        if sent.rescheduled {
            self.reschedule(slot);
        }
        if sent.discover {
            self.discover(slot, entry, now);
        }
        let (udp, relayed) = match (transport, best) {
            (Transport::Derp, _) | (Transport::Auto, None) => (None, true),
            (Transport::Direct, best) => (best.map(|(best, _)| best.addr), false),
            (Transport::Auto, Some((best, trusted))) => (Some(best.addr), !trusted),
        };
        let derp = if relayed { self.relay(slot, entry) } else { None };
        if let Some(region) = derp {
            self.relays.touch(region, now);
        }
        Ways { udp, derp }
    }

    /// An initiation goes out: a peer without disco gets it at its next endpoint.
    pub(super) fn note_initiation(&mut self, slot: Slot) {
        if let Some(place) = self.places.get_mut(slot).and_then(Option::as_mut) {
            place.rotation = place.rotation.wrapping_add(1);
        }
    }

    /// A session with the peer has begun, or a handshake has no way to it.
    pub(super) fn look_again(&mut self, slot: Slot, now: Instant) {
        if let Some(place) = self.places.get_mut(slot).and_then(Option::as_mut) {
            place.path.look_again(now);
        }
    }

    pub(super) fn handle_stun(
        &mut self,
        transaction: &stun::TransactionId,
        us: SocketAddr,
        roster: &Roster,
        now: Instant,
    ) -> bool {
        let expected = self.netcheck.handle_stun(transaction, us, now);
        self.follow_netcheck(roster, now);
        expected
    }

    pub(super) fn handle_stun_address(
        &mut self,
        region: RegionId,
        servers: Vec<SocketAddr>,
        roster: &Roster,
        now: Instant,
    ) {
        self.netcheck.handle_stun_address(region, servers, now);
        self.follow_netcheck(roster, now);
    }

    pub(super) fn handle_https_latency(
        &mut self,
        of: HttpsProbe,
        latency: Option<Duration>,
        roster: &Roster,
        now: Instant,
    ) {
        self.netcheck.handle_https_latency(of, latency, now);
        self.follow_netcheck(roster, now);
    }

    pub(super) fn poll_output(&mut self) -> Option<Output> {
        if let Some(action) = self.relays.poll_action() {
            return Some(match action {
                Action::Connect(region, home) => Output::ConnectDerp { region, home },
                Action::Close(region) => Output::CloseDerp { region },
            });
        }
        self.outputs.pop_front().or_else(|| self.netcheck.poll_output())
    }

    /// Peers that can be reached now and could not, or not as well, before.
    pub(super) fn poll_path_up(&mut self) -> Option<Slot> {
        self.path_up.pop_front()
    }

    pub(super) fn status(&self, slot: Slot, entry: &Entry, now: Instant) -> PathStatus {
        let best = self.places.get(slot).and_then(Option::as_ref).and_then(|place| place.path.best(now));
        match (best, self.relay(slot, entry)) {
            (Some((best, true)), _) | (Some((best, false)), None) => {
                PathStatus::Direct { addr: best.addr, rtt: best.latency }
            }
            (_, Some(region)) if self.transport != Transport::Direct => PathStatus::Derp { region },
            _ => PathStatus::None,
        }
    }

    /// Whether a packet to the peer would leave now: a UDP path answers, or its region is connected.
    pub(super) fn is_open(&self, slot: Slot, entry: &Entry, now: Instant) -> bool {
        match self.status(slot, entry, now) {
            PathStatus::Direct { .. } => true,
            PathStatus::Derp { region } => self.relays.is_connected(region),
            PathStatus::None => entry.peer.wireguard_only,
        }
    }

    /// Whether our home region is not connected: those that have no other way to us are not heard.
    pub(super) fn is_deaf(&self) -> bool {
        let lost = |home| !self.relays.is_connected(home);
        self.transport != Transport::Direct && self.netcheck.host().home.is_some_and(lost)
    }

    /// Our latency to a region, as far as netcheck measured it lately.
    pub(super) fn region_latency(&self, region: RegionId, now: Instant) -> Option<Duration> {
        self.netcheck.region_latency(region, now)
    }

    /// The region that leads to the peer. Source: Tailscale, wgengine/magicsock, `derpWriteChanForRegion`.
    fn relay(&self, slot: Slot, entry: &Entry) -> Option<RegionId> {
        let path = self.places.get(slot).and_then(Option::as_ref).map(|place| &place.path);
        let replies_by = path.and_then(|path| path.replies_by).filter(|region| self.relays.is_connected(*region));
        let heard_by = path.and_then(|path| path.heard_by);
        let known = |region: &RegionId| self.map.regions.contains_key(region);
        replies_by.or(entry.peer.home_derp.filter(known)).or(heard_by).filter(known)
    }

    fn place(&mut self, slot: Slot, entry: &Entry, now: Instant) -> &mut Place {
        if self.places.len() <= slot {
            self.places.resize_with(slot + 1, || None);
        }
        self.places[slot].get_or_insert_with(|| {
            let mut path = Path::default();
            path.set_endpoints(&entry.peer.endpoints, now);
            Box::new(Place {
                path,
                shared: None,
                rotation: 0,
                gone: false,
                resent_at: None,
                home: entry.peer.home_derp,
                moved: false,
            })
        })
    }

    /// Takes over what netcheck concluded: our home, and endpoints fresh enough for those who wait to be called.
    fn follow_netcheck(&mut self, roster: &Roster, now: Instant) {
        let home = self.netcheck.host().home;
        self.relays.set_home(home, now);
        self.netcheck.set_home_alive(home.is_some_and(|home| self.relays.is_connected(home)), now);
        for region in self.netcheck.take_retried() {
            self.relays.touch(region, now);
        }
        if self.settled_at == self.netcheck.settled_at() {
            return;
        }
        self.settled_at = self.netcheck.settled_at();
        for slot in std::mem::take(&mut self.calls) {
            if let Some(entry) = roster.entry(slot) {
                self.call(slot, entry, now);
            }
        }
    }
}
