//! Disco messages in and out.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Instant;

use crypto_box::SalsaBox;
use rand::Rng;

use super::peer::{Heard, Probe};
use super::{Magicsock, Via, silence};
use crate::engine::roster::{Entry, Roster, Slot};
use crate::engine::stats::Dropped;
use crate::engine::{Output, Transport};
use crate::key::DiscoPublic;
use crate::netmap::RegionId;
use crate::wire::disco::{self, Message, TxId};

/// What a pong names as our address when the ping came by DERP; the port is the region.
/// Source: Tailscale, tailcfg, `DerpMagicIP`.
const DERP_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 3, 3, 40);

impl Magicsock {
    /// Takes a disco packet.
    ///
    /// # Errors
    /// Why nothing came of it.
    pub(in crate::engine) fn handle_disco(
        &mut self,
        via: Via,
        packet: &mut [u8],
        roster: &Roster,
        now: Instant,
    ) -> Result<(), Dropped> {
        let sender = disco::sender(packet).map_err(|_| Dropped::Malformed)?;
        let holders: Vec<Slot> = roster.with_disco(&sender).collect();
        let slot = match via {
            Via::Udp(_) => holders.first().copied(),
            Via::Derp(_, node) => roster.slot(&node).filter(|slot| holders.contains(slot)),
        };
        let slot = slot.ok_or(Dropped::Stranger)?;
        let entry = roster.entry(slot).ok_or(Dropped::Stranger)?;
        let message = match disco::open(packet, self.shared(slot, entry, sender, now)) {
            Ok(message) => message,
            Err(crate::wire::Malformed::Unsealed) => return Err(Dropped::Forged),
            Err(_) => return Err(Dropped::Malformed),
        };
        match (message, via) {
            (Message::Ping { tx, .. }, Via::Derp(region, _)) => {
                let source = SocketAddr::new(IpAddr::V4(DERP_ADDRESS), u16::try_from(region).unwrap_or_default());
                self.send_derp(slot, entry, &Message::Pong { tx, source }, region, now);
            }
            (Message::Ping { tx, node }, Via::Udp(from)) => {
                // A node that is shared twice has one disco key and two node keys.
                let named = node.and_then(|node| roster.slot(&node)).filter(|slot| holders.contains(slot));
                let slot = named.unwrap_or(slot);
                let entry = roster.entry(slot).ok_or(Dropped::Stranger)?;
                self.handle_ping(slot, entry, tx, from, now);
            }
            (Message::Pong { tx, source }, _) => self.handle_pong(&holders, (tx, source), roster, now),
            (Message::CallMeMaybe { endpoints }, Via::Derp(..)) => {
                if self.transport != Transport::Derp {
                    let probe = self.place(slot, entry, now).path.handle_call(&endpoints, now);
                    self.probe(slot, entry, probe, now);
                }
            }
            (Message::CallMeMaybe { .. }, Via::Udp(_)) | (Message::Other(_), _) => return Err(Dropped::Unknown),
        }
        Ok(())
    }

    /// A discovery round.
    pub(in crate::engine) fn discover(&mut self, slot: Slot, entry: &Entry, now: Instant) {
        if self.transport == Transport::Derp || entry.disco.is_none() {
            return;
        }
        let probe = self.place(slot, entry, now).path.discover(now);
        self.probe(slot, entry, probe, now);
    }

    /// Does what a path wants done.
    pub(super) fn probe(&mut self, slot: Slot, entry: &Entry, probe: Probe, now: Instant) {
        if entry.disco.is_none() || self.transport == Transport::Derp {
            return;
        }
        for to in probe.ping {
            self.ping(slot, entry, to, now);
        }
        if let Some(since) = probe.doubt {
            self.netcheck.doubt(since);
        }
        if probe.call {
            self.call(slot, entry, now);
        }
    }

    /// Asks a peer by DERP to ping us, now or as soon as we know our endpoints.
    pub(super) fn call(&mut self, slot: Slot, entry: &Entry, now: Instant) {
        let Some(region) = self.relay(slot, entry) else {
            return;
        };
        // Two ways to a relay and back: ours and the peer's.
        let limit = silence::pong_limit(self.netcheck.region_latency(region, now).unwrap_or_default());
        if let Some(seen) = self.place(slot, entry, now).path.take_back(limit, now) {
            // What one call names and the next does not is deleted, and with it the path that the peer trusts: it
            // answers by the relay until we are reached anew. That does not wait until we know where we are now.
            let told = self.netcheck.addresses().into_iter().chain(seen).collect();
            for endpoints in [told, Vec::new()] {
                self.send_derp(slot, entry, &Message::CallMeMaybe { endpoints }, region, now);
            }
            self.reschedule(slot);
        }
        if !self.netcheck.freshen(now) {
            self.calls.insert(slot);
            return;
        }
        let endpoints = self.netcheck.addresses();
        if !endpoints.is_empty() {
            self.send_derp(slot, entry, &Message::CallMeMaybe { endpoints }, region, now);
            self.place(slot, entry, now).path.note_call(now);
            self.reschedule(slot);
        }
    }

    fn handle_ping(&mut self, slot: Slot, entry: &Entry, tx: TxId, from: SocketAddr, now: Instant) {
        let path = &mut self.place(slot, entry, now).path;
        let heard = path.handle_ping(from, tx, now);
        if heard == Heard::Copy {
            return;
        }
        let verify = if heard == Heard::New { path.verify(now) } else { None };
        let ping_back = path.answer_with_ping(&from, now);
        self.send_udp(slot, entry, &Message::Pong { tx, source: from }, from, now);
        for to in ping_back.then_some(from).into_iter().chain(verify) {
            self.ping(slot, entry, to, now);
        }
    }

    fn handle_pong(&mut self, holders: &[Slot], (tx, source): (TxId, SocketAddr), roster: &Roster, now: Instant) {
        for slot in holders {
            let (Some(entry), Some(place)) = (roster.entry(*slot), self.places.get_mut(*slot).and_then(Option::as_mut))
            else {
                continue;
            };
            let answered = place.path.handle_pong(tx, source, now);
            if answered.better {
                self.path_up.push_back(*slot);
                self.outputs.push_back(Output::PeerChanged { peer: entry.peer.key });
            }
            if answered.remapped {
                self.netcheck.doubt_mapping(source, now);
                let round = place.path.discover(now);
                self.probe(*slot, entry, round, now);
            }
            if answered.restored {
                self.resend(*slot, entry);
            }
        }
    }

    fn ping(&mut self, slot: Slot, entry: &Entry, to: SocketAddr, now: Instant) {
        if !self.netcheck.has_family(to.is_ipv6()) {
            return;
        }
        let tx = TxId(self.rng.random());
        let message = Message::Ping { tx, node: Some(self.node) };
        if !self.send_udp(slot, entry, &message, to, now) {
            return;
        }
        self.place(slot, entry, now).path.note_ping(tx, to, now);
        self.reschedule(slot);
    }

    fn send_udp(&mut self, slot: Slot, entry: &Entry, message: &Message, to: SocketAddr, now: Instant) -> bool {
        let Some(contents) = self.seal(slot, entry, message, now) else {
            return false;
        };
        self.outputs.push_back(Output::Udp { destination: to, segment: contents.len(), contents });
        true
    }

    fn send_derp(&mut self, slot: Slot, entry: &Entry, message: &Message, region: RegionId, now: Instant) {
        let Some(packet) = self.seal(slot, entry, message, now) else {
            return;
        };
        self.relays.touch(region, now);
        self.outputs.push_back(Output::Derp { region, to: entry.peer.key, packet });
    }

    fn seal(&mut self, slot: Slot, entry: &Entry, message: &Message, now: Instant) -> Option<Vec<u8>> {
        let (nonce, public) = (self.rng.random(), self.public);
        let shared = self.shared(slot, entry, entry.disco?, now);
        Some(disco::seal(message, &public, shared, nonce))
    }

    /// The box for a peer's disco key, computed when that key is first used.
    fn shared(&mut self, slot: Slot, entry: &Entry, theirs: DiscoPublic, now: Instant) -> &SalsaBox {
        let ours = self.private.clone();
        let shared = &mut self.place(slot, entry, now).shared;
        if shared.as_ref().is_none_or(|(key, _)| *key != theirs) {
            *shared = None;
        }
        let (_, shared) = shared.get_or_insert_with(|| (theirs, disco::shared_key(&ours, &theirs)));
        shared
    }
}
