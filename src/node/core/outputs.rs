//! What the engine says is carried out here: datagrams to their sockets, packets to their relays, news to who waits.

use std::net::IpAddr;
use std::time::Instant;

use tracing::debug;

use super::Core;
use crate::engine::{HttpsProbe, Output};
use crate::key::NodePublic;
use crate::netmap::RegionId;
use crate::netstack::Again;
use crate::node::outbox::Batch;
use crate::node::{probe, regions};
use crate::transport::derp::Packet;
use crate::wire::tsmp::Reason;

/// What was dropped beside the engine and the UDP sockets.
#[derive(Debug, Default)]
pub(super) struct Shed {
    /// Packets that found no connection to their region, or its queue full.
    pub(super) relayed: u64,
    /// Pings of relays that found too much unwritten.
    pub(super) pings: u64,
    /// Questions to resolvers that were too long for a datagram, or found the flow's ring full.
    pub(super) questions: u64,
}

impl Core {
    /// A resolver's question was not sent.
    pub(in crate::node) fn note_unasked(&mut self) {
        self.shed.questions += 1;
    }

    /// Does all that the engine has said since the last time.
    pub(super) fn execute_outputs(&mut self, now: Instant) {
        while let Some(output) = self.parts.engine.poll_output() {
            match output {
                Output::Udp { destination, contents, segment } => {
                    let sent = self.parts.outbox.send(Batch { destination, contents, segment });
                    sent.into_iter().for_each(|buffer| self.parts.engine.recycle(buffer));
                }
                Output::Derp { region, to, packet } => self.send_derp(region, to, packet),
                Output::ConnectDerp { region, home } => self.connect_region(region, home),
                Output::CloseDerp { region } => self.parts.relays.close(region),
                Output::ProbeHttps(probe) => self.probe(probe),
                Output::ResolveStun { region, host, port } => {
                    let probes = self.parts.probes.clone();
                    self.parts.control.spawn(regions::resolve_stun(region, host, port, probes));
                }
                Output::HostChanged(state) => {
                    self.parts.report.send_replace(regions::report(&state));
                    self.parts.relays.set_home(state.home);
                }
                Output::Rejected { flow, reason } => {
                    if reason == Reason::UnknownTransit && self.is_told(flow.remote.ip()) {
                        continue;
                    }
                    if let Some(id) = self.by_flow.get(&flow) {
                        self.rejected.insert(*id, reason);
                        self.peer_changed.notify_waiters();
                    }
                }
                Output::Pong { token, peerapi_port } => {
                    if let Some(waiting) = self.pongs.remove(&token) {
                        // Whoever asked may have run out of patience.
                        let _ = waiting.send(peerapi_port);
                    }
                }
                Output::RoutesChanged => self.publish(),
                Output::Resend { peer } => self.resend(&peer),
                Output::PeerChanged { peer } => {
                    self.say_path(&peer, now);
                    self.peer_changed.notify_waiters();
                }
            }
        }
    }

    /// Has the connections through a peer send again what waits for an acknowledgement.
    fn resend(&mut self, key: &NodePublic) {
        let Some(netmap) = self.parts.engine.netmap().cloned() else { return };
        let by_it = |remote| netmap.route(remote).is_some_and(|route| route.peer.key == *key);
        self.parts.netstack.repeat(Again::Everything, by_it);
    }

    /// Whether somebody hears that the peer of a transit address does not know it.
    fn is_told(&self, remote: IpAddr) -> bool {
        let unknown = self.unknown_transits.as_ref().filter(|_| self.transits.contains_key(&remote));
        unknown.is_some_and(|unknown| unknown.try_send(remote).is_ok())
    }

    /// The run is over: no relay is spoken with any more. Says what was counted.
    pub(in crate::node) fn stop(&mut self) {
        self.parts.relays.close_all();
        let (stats, lost, shed) = (self.parts.engine.stats(), &self.parts.outbox.lost, &self.shed);
        let (unread, link_changes) = (self.parts.netstack.unread(), self.link.changes);
        debug!(?stats, ?lost, ?shed, unread, link_changes, "data plane stopped");
    }

    /// Sends what the sockets did not take before.
    pub(super) fn flush_outbox(&mut self) {
        let engine = &mut self.parts.engine;
        self.parts.outbox.flush(|buffer| engine.recycle(buffer));
    }

    fn send_derp(&mut self, region: RegionId, to: NodePublic, packet: Vec<u8>) {
        if !self.parts.relays.send(region, Packet { peer: to, contents: packet }) {
            self.shed.relayed += 1;
        }
    }

    /// Connects to a region, or anew.
    pub(super) fn connect_region(&mut self, region: RegionId, home: bool) {
        if let Some(relays) = self.relays(region) {
            self.parts.relays.connect(region, relays, home);
        }
    }

    fn relays(&self, region: RegionId) -> Option<Vec<crate::transport::derp::Relay>> {
        Some(regions::relays(self.newest.as_ref()?.derp.regions.get(&region)?))
    }

    fn probe(&self, of: HttpsProbe) {
        let relays = self.relays(of.region).unwrap_or_default();
        let (underlay, probes) = (self.parts.underlay.clone(), self.parts.probes.clone());
        self.parts.control.spawn(probe::https(of, relays, underlay, probes));
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;
    use crate::node::bed::core;
    use crate::node::bridge::Tunnel;
    use crate::node::dial::bed::{CONNECTOR, Tailnet};

    #[tokio::test(flavor = "local")]
    async fn a_question_that_is_not_sent_is_counted() {
        let now = Instant::now();
        let core = Rc::new(RefCell::new(core(now)));
        core.borrow_mut().handle_netmap(Tailnet::new().map(&[], &[], &[]), now);
        let resolver = (CONNECTOR.parse::<IpAddr>().unwrap(), 53).into();
        let flow = Tunnel::start(core.clone()).open_udp(resolver).await.unwrap();
        for octets in [100, 2_000, 100] {
            flow.send(vec![0; octets]).await.unwrap();
        }
        let counted = async {
            while core.borrow().shed.questions == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(5), counted).await.expect("one is not sent");
        assert_eq!(core.borrow().shed.questions, 1);
    }
}
