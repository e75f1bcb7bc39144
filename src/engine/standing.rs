//! Which of the peers that serve the same prefix is used: who of them is silent, and who is how far away.
//!
//! A peer that got packets and sends nothing back may have nothing to say, so it is asked: first inside the tunnel,
//! then by a handshake, which a peer that lost its sessions answers too. One that answers no handshake is silent
//! until it is heard again. Peers without rival are never asked: nothing would follow from it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::roster::{Change, Slot};
use super::{Engine, Output, PathStatus};
use crate::netmap::{Measured, Netmap, NodeId, Standing};
use crate::wire::{ip, tsmp};

/// A peer that got packets and sent nothing for so long is asked inside the tunnel; half of that later, by a handshake.
const ASK_AFTER: Duration = Duration::from_millis(400);
/// A handshake without answer for so long means silence; it was sent three times by then, two of them long enough ago.
const SILENT_AFTER: Duration = Duration::from_millis(750);
/// As long as no way leads to the peer, since its region is being connected: a connection may take that long.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is remembered of peers with rivals.
#[derive(Debug, Default)]
pub(super) struct Rivalry {
    standing: Standing,
    rivals: BTreeMap<Slot, Rival>,
}

/// A peer that serves a prefix which another serves too.
#[derive(Debug)]
struct Rival {
    id: NodeId,
    /// Since when it is silent.
    silent_since: Option<Instant>,
    /// Which silence it was last asked about.
    asked: Option<Instant>,
}

impl Engine {
    /// Takes over who has rivals in a netmap that the roster holds already. Where control has news of a peer, it gets
    /// another chance.
    pub(super) fn set_rivals(&mut self, netmap: &Netmap, changes: &[Change]) {
        let mut known = std::mem::take(&mut self.rivalry.rivals);
        for change in changes {
            let slot = match change {
                Change::Removed(slot) | Change::Restarted(slot) => *slot,
                Change::Updated(slot) if self.came_online(*slot, netmap) => *slot,
                Change::Updated(_) => continue,
            };
            if let Some(rival) = known.remove(&slot) {
                self.rivalry.standing.set_silent(rival.id, false);
            }
        }
        for id in netmap.rivals() {
            if let Some(slot) = netmap.peers.get(id).and_then(|peer| self.roster.slot(&peer.key)) {
                let rival = known.remove(&slot).filter(|rival| rival.id == *id);
                let rival = rival.unwrap_or(Rival { id: *id, silent_since: None, asked: None });
                self.rivalry.rivals.insert(slot, rival);
            }
        }
        self.rivalry.standing.retain(netmap.rivals());
    }

    fn came_online(&self, slot: Slot, netmap: &Netmap) -> bool {
        let Some(entry) = self.roster.entry(slot) else {
            return false;
        };
        let online = |netmap: &Netmap| netmap.peers.get(&entry.peer.id).and_then(|peer| peer.online) == Some(true);
        online(netmap) && !self.netmap.as_ref().is_some_and(|before| online(before))
    }

    /// Uses the routes of `netmap`, in the order of what is known of peers. Packets that wait for a peer go where
    /// they belong now.
    pub(super) fn set_routes(&mut self, netmap: Arc<Netmap>, now: Instant) {
        self.measure_rivals(now);
        let rivals = !netmap.rivals().is_empty();
        self.netmap = Some(if rivals { Arc::new(netmap.with_standing(&self.rivalry.standing)) } else { netmap });
        self.last_route = None;
        let (Some(netmap), roster) = (self.netmap.as_ref(), &self.roster) else {
            return;
        };
        let moved = self.wireguard.unstage_if(|slot, packet| {
            let route = ip::destination(packet).and_then(|destination| netmap.route(destination));
            route.is_some_and(|route| roster.slot(&route.peer.key) != Some(slot))
        });
        for packet in moved {
            // A packet whose new route ends before it is sent has none, like any other.
            let _ = self.handle_outbound(&packet, now);
        }
    }

    /// The standing has changed: so has the order.
    fn reorder(&mut self, now: Instant) {
        if let Some(netmap) = self.netmap.clone() {
            self.set_routes(netmap, now);
            self.egress.push(Output::RoutesChanged);
        }
    }

    /// Looks whether peers with rivals have fallen silent, or are heard again.
    pub(super) fn examine_rivals(&mut self, now: Instant) {
        let slots: Vec<Slot> = self.rivalry.rivals.keys().copied().collect();
        let mut news = self.measure_rivals(now);
        for slot in slots {
            news |= self.examine(slot, now);
        }
        if news {
            self.reorder(now);
        }
    }

    /// A region says that it does not have the peer. If that was the only way, and something is on its way, the peer
    /// is silent.
    pub(super) fn note_peer_gone(&mut self, slot: Slot, region: u32, now: Instant) {
        let waits = self.wireguard.asking_since(slot).or(self.wireguard.unheard_since(slot)).is_some();
        let Some(entry) = self.roster.entry(slot).filter(|_| waits) else {
            return;
        };
        let only_way = self.magicsock.status(slot, entry, now) == PathStatus::Derp { region };
        if only_way && self.set_silent(slot, Some(now)) {
            self.reorder(now);
        }
    }

    /// Whether the peer's silence has begun or ended.
    fn examine(&mut self, slot: Slot, now: Instant) -> bool {
        let (Some(rival), Some(entry)) = (self.rivalry.rivals.get_mut(&slot), self.roster.entry(slot)) else {
            return false;
        };
        if let Some(since) = rival.silent_since {
            let heard = self.wireguard.heard(slot).is_some_and(|heard| heard > since);
            return heard && self.set_silent(slot, None);
        }
        if let Some(asking) = self.wireguard.asking_since(slot) {
            let limit = if self.magicsock.is_open(slot, entry, now) { SILENT_AFTER } else { PATIENCE };
            return now.duration_since(asking) >= limit && self.set_silent(slot, Some(now));
        }
        let Some(unheard) = self.wireguard.unheard_since(slot) else {
            return false;
        };
        let waited = now.duration_since(unheard);
        let key = entry.peer.key;
        if waited >= ASK_AFTER && rival.asked != Some(unheard) && !entry.peer.wireguard_only {
            rival.asked = Some(unheard);
            self.ask(slot, now);
        } else if waited >= ASK_AFTER * 3 / 2 {
            self.wireguard.renew(slot, &key, now);
            self.settle(now);
        }
        false
    }

    /// Sends a ping inside the tunnel. Whatever comes back is answer enough.
    fn ask(&mut self, slot: Slot, now: Instant) {
        let (Some(netmap), Some(entry)) = (self.netmap.as_ref(), self.roster.entry(slot)) else {
            return;
        };
        let ping = tsmp::Message::Ping([0; 8]).encode();
        let to = entry.peer.addresses.iter().copied();
        let packet = to
            .filter_map(|to: IpAddr| Some((netmap.source_for(to)?, to)))
            .find_map(|(from, to)| ip::build(ip::protocol::TSMP, from, to, &ping));
        if let Some(packet) = packet {
            self.send_data(slot, &packet, now);
        }
    }

    fn set_silent(&mut self, slot: Slot, since: Option<Instant>) -> bool {
        let Some(rival) = self.rivalry.rivals.get_mut(&slot) else {
            return false;
        };
        rival.silent_since = since;
        self.rivalry.standing.set_silent(rival.id, since.is_some())
    }

    /// Measures peers with rivals by what is known anyway. Whether there is news.
    fn measure_rivals(&mut self, now: Instant) -> bool {
        let mut news = false;
        for (slot, rival) in &self.rivalry.rivals {
            let Some(entry) = self.roster.entry(*slot) else {
                continue;
            };
            let measured = match self.magicsock.status(*slot, entry, now) {
                PathStatus::Direct { rtt, .. } => Some((rtt, Measured::Direct)),
                PathStatus::Derp { .. } | PathStatus::None => {
                    let region = entry.peer.home_derp;
                    let latency = region.and_then(|region| self.magicsock.region_latency(region, now));
                    latency.map(|latency| (latency, Measured::Region))
                }
            };
            if let Some((latency, measured)) = measured {
                news |= self.rivalry.standing.set_latency(rival.id, latency, measured);
            }
        }
        news
    }
}
