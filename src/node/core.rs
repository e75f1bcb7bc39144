//! The data plane in one place: engine, netstack and the sockets that carry out what they say.
//!
//! Everything here runs on the data thread. Proxy tasks and the driver share it by a `RefCell` that nobody holds over
//! an `await`. Whoever changes something calls [`Core::pump`], which sends what is to be sent at once: handing it to
//! another task first would cost a scheduler pass for every message.

mod budget;
mod flows;
mod link;
mod outputs;
mod paths;
mod told;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tracing::trace;

use self::outputs::Shed;
use super::outbox::Outbox;
use super::regions;
use super::relays::Relays;
use crate::control::HostReport;
use crate::engine::{Engine, Flow, Protocol};
use crate::key::{NodePrivate, NodePublic};
use crate::netmap::{Netmap, NodeId, RegionId};
use crate::netstack::{Again, FlowId, Netstack, OpenError};
use crate::transport::derp::{ConnectionId, Event};
use crate::transport::link::State as LinkState;
use crate::transport::udp::{ReceiveBuffers, Udp};
use crate::transport::underlay::Underlay;
use crate::wire::tsmp::Reason;

/// Rounds of egress in one pump before the driver has its turn: a flow that could send for ever must not keep it.
const ROUNDS: usize = 64;

/// A shared handle to the data plane.
pub(super) type Shared = Rc<RefCell<Core>>;

/// What the core needs of the outside.
pub(super) struct Parts {
    pub(super) engine: Engine,
    pub(super) netstack: Netstack,
    pub(super) outbox: Outbox,
    pub(super) relays: Relays,
    pub(super) underlay: Underlay,
    pub(super) control: tokio::runtime::Handle,
    pub(super) probes: mpsc::Sender<regions::Probed>,
    pub(super) report: watch::Sender<HostReport>,
}

/// The data plane.
pub(super) struct Core {
    parts: Parts,
    buffers: ReceiveBuffers,
    newest: Option<Arc<Netmap>>,
    /// The same, once engine and netstack have taken it over.
    netmap: watch::Sender<Option<Arc<Netmap>>>,
    /// Addresses that are agreed upon with one peer each.
    transits: BTreeMap<IpAddr, NodeId>,
    /// Who hears of those that their peer does not know.
    unknown_transits: Option<mpsc::Sender<IpAddr>>,
    /// Flows that a peer's filter has rejected.
    rejected: HashMap<FlowId, Reason>,
    by_flow: HashMap<Flow, FlowId>,
    /// Who waits for the answer to a ping inside the tunnel, by its token.
    pongs: HashMap<[u8; 8], oneshot::Sender<u16>>,
    /// Wakes the driver, whose next deadline may have come nearer.
    wake: Rc<Notify>,
    /// Wakes those who wait for a peer.
    pub(super) peer_changed: Rc<Notify>,
    /// What the driver's timer is set to.
    armed: Option<Instant>,
    /// What became of the machine's network.
    link: LinkState,
    /// When the UDP sockets were last bound anew.
    rebound_at: Option<Instant>,
    shed: Shed,
    /// What was said of paths to peers.
    told: told::Told,
}

impl Core {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            parts,
            buffers: ReceiveBuffers::default(),
            newest: None,
            netmap: watch::Sender::new(None),
            transits: BTreeMap::new(),
            unknown_transits: None,
            rejected: HashMap::new(),
            by_flow: HashMap::new(),
            pongs: HashMap::new(),
            wake: Rc::new(Notify::new()),
            peer_changed: Rc::new(Notify::new()),
            armed: None,
            link: LinkState::default(),
            rebound_at: None,
            shed: Shed::default(),
            told: told::Told::default(),
        }
    }

    /// Wakes the driver.
    pub(super) fn waker(&self) -> Rc<Notify> {
        self.wake.clone()
    }

    /// The home region once its relay has admitted us.
    pub(super) fn home(&self) -> watch::Receiver<Option<RegionId>> {
        self.parts.relays.home()
    }

    /// What control is told of our network.
    pub(super) fn reports(&self) -> watch::Receiver<HostReport> {
        self.parts.report.subscribe()
    }

    /// The UDP sockets, for the driver to wait on. Dead ones are always ready, and it would do nothing else.
    pub(super) fn udp(&self) -> Option<Rc<Udp>> {
        self.parts.outbox.udp().filter(|_| !self.parts.outbox.is_dead())
    }

    /// Where the first batch goes that a UDP socket did not take.
    pub(super) fn blocked(&self) -> Option<SocketAddr> {
        self.parts.outbox.blocked()
    }

    /// The engine, for questions about peers.
    pub(super) fn engine(&mut self) -> &mut Engine {
        &mut self.parts.engine
    }

    /// The TCP and UDP of the tunnel.
    pub(super) fn netstack(&mut self) -> &mut Netstack {
        &mut self.parts.netstack
    }

    /// When the driver has to call [`handle_timeout`](Self::handle_timeout). It is woken when that comes nearer.
    pub(super) fn arm(&mut self) -> Option<Instant> {
        self.armed = self.deadline();
        self.armed
    }

    fn deadline(&self) -> Option<Instant> {
        let engine = self.parts.engine.next_deadline().map(|(at, _)| at);
        let (netstack, told) = (self.parts.netstack.next_deadline(), self.told.next_deadline());
        [engine, netstack, self.rebind_at(), told].into_iter().flatten().min()
    }

    /// Takes over a new netmap.
    pub(super) fn handle_netmap(&mut self, netmap: Arc<Netmap>, now: Instant) {
        self.parts.netstack.set_addresses(&netmap.self_node.addresses);
        self.newest = Some(netmap);
        self.go_by_newest(now);
    }

    fn go_by_newest(&mut self, now: Instant) {
        let Some(newest) = &self.newest else { return };
        let netmap = match self.transits.is_empty() {
            true => newest.clone(),
            false => Arc::new(newest.with_transits(&self.transits)),
        };
        self.parts.engine.handle_netmap(netmap, now);
        self.publish();
        self.pump(now);
    }

    /// Has each of these addresses lead to its peer alone, and no others any more.
    pub(super) fn set_transits(&mut self, transits: BTreeMap<IpAddr, NodeId>, now: Instant) {
        if self.transits != transits {
            self.transits = transits;
            self.go_by_newest(now);
        }
    }

    /// Tells of transit addresses that their peer does not know, instead of rejecting flows to them.
    pub(super) fn tell_unknown_transits(&mut self, unknown: mpsc::Sender<IpAddr>) {
        self.unknown_transits = Some(unknown);
    }

    /// Begins connections to `remote` anew that have had no answer.
    pub(super) fn repeat_syns(&mut self, remote: IpAddr, now: Instant) {
        self.parts.netstack.repeat(Again::Syns, |ip| ip == remote);
        self.pump(now);
    }

    /// Whether any flow to `remote` is open.
    pub(super) fn has_flow_to(&self, remote: IpAddr) -> bool {
        self.by_flow.keys().any(|flow| flow.remote.ip() == remote)
    }

    /// Rejects every flow to `remote`.
    pub(super) fn reject(&mut self, remote: IpAddr, reason: Reason) {
        let flows = self.by_flow.iter().filter(|(flow, _)| flow.remote.ip() == remote);
        self.rejected.extend(flows.map(|(_, id)| (*id, reason)));
        self.peer_changed.notify_waiters();
    }

    /// Shows everybody the routes that the engine uses now, and repeats what the routers before may have lost.
    fn publish(&mut self) {
        let Some(netmap) = self.parts.engine.netmap().cloned() else { return };
        let before = self.netmap.send_replace(Some(netmap.clone()));
        self.told.follow(&netmap, self.by_flow.keys().map(|flow| flow.remote.ip()));
        if let Some(before) = before.filter(|before| !Arc::ptr_eq(before, &netmap)) {
            let router = |netmap: &Netmap, ip| netmap.route(ip).map(|route| route.peer.key);
            self.parts.netstack.repeat(Again::Syns, |remote| {
                let (old, new) = (router(&before, remote), router(&netmap, remote));
                new.is_some() && old != new
            });
        }
    }

    /// Begins anew with a node key: relays and peers learn of it by new connections and handshakes. The connections
    /// inside the tunnel go on.
    pub(super) fn handle_node_key(&mut self, key: &NodePrivate, now: Instant) {
        self.parts.engine.set_node_key(key, now);
        for region in self.parts.relays.set_key(key.clone()) {
            self.parts.engine.handle_derp_lost(region, now);
            let home = self.parts.engine.host_state().home;
            self.parts.relays.set_admitted(region, false, home);
            self.connect_region(region, home == Some(region));
        }
        self.pump(now);
    }

    /// Control has accepted a report of our network.
    pub(super) fn handle_accepted(&mut self, report: &HostReport, now: Instant) {
        self.parts.engine.note_told(regions::told_home(report), now);
        self.pump(now);
    }

    /// The newest netmap that the data plane goes by: what it shows can be dialled.
    pub(super) fn netmap(&self) -> watch::Receiver<Option<Arc<Netmap>>> {
        self.netmap.subscribe()
    }

    /// Opens a TCP flow; the SYN leaves at once.
    pub(super) fn connect(&mut self, remote: SocketAddr, now: Instant) -> Result<Option<FlowId>, OpenError> {
        let Some(local) = self.source_for(remote.ip()) else { return Ok(None) };
        let id = self.parts.netstack.connect(local, remote)?;
        self.open_flow(id, Protocol::Tcp);
        self.pump(now);
        Ok(Some(id))
    }

    /// Opens a UDP flow.
    pub(super) fn open_udp(&mut self, remote: SocketAddr) -> Result<Option<FlowId>, OpenError> {
        let Some(local) = self.source_for(remote.ip()) else { return Ok(None) };
        let id = self.parts.netstack.open_udp(local, remote)?;
        self.open_flow(id, Protocol::Udp);
        Ok(Some(id))
    }

    /// Lets go of a flow.
    pub(super) fn release(&mut self, id: FlowId, now: Instant) {
        self.parts.netstack.release(id);
        self.rejected.remove(&id);
        self.pump(now);
    }

    /// Why a peer rejected a flow, if it did.
    pub(super) fn rejection(&self, id: FlowId) -> Option<Reason> {
        self.rejected.get(&id).copied()
    }

    /// The address that packets to `remote` leave from.
    fn source_for(&self, remote: IpAddr) -> Option<IpAddr> {
        self.parts.engine.netmap()?.source_for(remote)
    }

    /// Takes what waits on the UDP sockets.
    pub(super) fn handle_readable(&mut self, now: Instant) {
        let Some(udp) = self.parts.outbox.udp() else { return };
        let (engine, netstack) = (&mut self.parts.engine, &mut self.parts.netstack);
        let received = udp.receive(&mut self.buffers, |from, datagram| {
            if let Some(packet) = engine.handle_udp(from, datagram, now) {
                netstack.handle_packet(packet, now);
            }
        });
        if received.is_err() {
            self.parts.outbox.note_dead();
        }
        self.pump(now);
    }

    /// Takes what a relay says, unless its connection was replaced meanwhile.
    pub(super) fn handle_derp(&mut self, id: ConnectionId, event: Event, now: Instant) {
        if !self.parts.relays.is_current(id) {
            return;
        }
        let (engine, netstack, region) = (&mut self.parts.engine, &mut self.parts.netstack, id.region);
        let works = match event {
            Event::Connected | Event::Answers => Some(true),
            Event::Doubted | Event::Lost(_) => Some(false),
            Event::Packets(_) | Event::Unanswered(_) | Event::PeerGone(..) => None,
        };
        match event {
            Event::Connected => engine.handle_derp_connected(region, now),
            Event::Lost(_) => engine.handle_derp_lost(region, now),
            Event::Doubted => engine.handle_derp_doubt(region, true, now),
            Event::Answers => engine.handle_derp_doubt(region, false, now),
            Event::Packets(packets) => {
                for (peer, mut packet) in packets {
                    if let Some(inner) = engine.handle_derp(region, peer, &mut packet, now) {
                        netstack.handle_packet(inner, now);
                    }
                }
            }
            Event::Unanswered(pings) => self.shed.pings += pings,
            Event::PeerGone(peer, _) => engine.handle_derp_peer_gone(region, peer, now),
        }
        if let Some(works) = works {
            self.parts.relays.set_admitted(region, works, self.parts.engine.host_state().home);
            self.say_paths(now);
        }
        self.pump(now);
    }

    /// Takes the outcome of a probe that the engine asked for.
    pub(super) fn handle_probe(&mut self, probed: regions::Probed, now: Instant) {
        match probed {
            regions::Probed::Https(of, latency) => self.parts.engine.handle_https_latency(of, latency, now),
            regions::Probed::Stun(region, addresses) => self.parts.engine.handle_stun_address(region, addresses, now),
        }
        self.pump(now);
    }

    /// Does what time demands.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.parts.engine.handle_timeout(now);
        self.parts.netstack.handle_timeout(now);
        self.rebind_if_dead(now);
        self.say_due_paths(now);
        self.pump(now);
    }

    /// Pings the peer behind `remote` inside the tunnel; its PeerAPI port comes back. `None` without a route.
    pub(super) fn ping(&mut self, remote: IpAddr, now: Instant) -> Option<oneshot::Receiver<u16>> {
        let token = rand::random();
        let (waiting, answer) = oneshot::channel();
        self.pongs.retain(|_, waiting| !waiting.is_closed());
        self.parts.engine.ping(remote, token, now).ok()?;
        self.pongs.insert(token, waiting);
        self.pump(now);
        Some(answer)
    }

    /// Starts a handshake with a peer, so that it is done when the first packet comes.
    pub(super) fn warm(&mut self, peer: NodePublic, now: Instant) {
        self.parts.engine.warm(peer, now);
        self.pump(now);
    }

    /// Marks a flow as changed, and sends.
    pub(super) fn touch(&mut self, id: FlowId, now: Instant) {
        self.parts.netstack.touch(id);
        self.pump(now);
    }

    /// Sends until nothing is left to send or the sockets are full.
    pub(super) fn pump(&mut self, now: Instant) {
        self.flush_outbox();
        for _ in 0..ROUNDS {
            let mut more = false;
            if self.parts.outbox.blocked().is_none() {
                let (engine, netstack) = (&mut self.parts.engine, &mut self.parts.netstack);
                more = netstack.egress(now, &mut |packet| {
                    let sent = engine.handle_outbound(packet, now);
                    sent.inspect_err(|error| trace!(%error, "packet without a route")).ok().flatten()
                });
            }
            self.execute_outputs(now);
            self.heed_failures(now);
            if !more || self.parts.outbox.blocked().is_some() {
                break;
            }
        }
        self.forget_removed();
        self.schedule(now);
    }

    fn schedule(&mut self, now: Instant) {
        let nearer = self.deadline().is_some_and(|new| self.armed.is_none_or(|armed| new < armed));
        let (blocked, newly) = (self.parts.outbox.blocked().is_some(), self.parts.outbox.is_newly_blocked());
        // A full socket is waited for; asking it again and again would keep the runtime from hearing that it is not.
        if nearer || newly || self.must_rebind(now) || (!blocked && self.parts.netstack.has_work()) {
            self.wake.notify_one();
        }
    }
}
