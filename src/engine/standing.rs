//! Which of the peers that serve the same prefix is used: who of them is silent, and who is how far away.
//!
//! A peer that got packets and sends nothing back may have nothing to say, so it is asked: first inside the tunnel,
//! then by a handshake, which a peer that lost its sessions answers too. One that answers no handshake is silent
//! until it is heard again, and then comes after those that never were, until it has answered for a while. Peers
//! without rival are never asked: nothing would follow from it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::roster::{Change, Slot};
use super::{Engine, Output, PathStatus};
use crate::key::NodePublic;
use crate::netmap::{Measured, Netmap, NodeId, Standing, Voice};
use crate::wire::{ip, tsmp};

/// A peer that got packets and sent nothing for so long is asked inside the tunnel; half of that later, by a handshake.
const ASK_AFTER: Duration = Duration::from_millis(400);
/// A handshake without answer for so long means silence; it was sent three times by then, two of them long enough ago.
const SILENT_AFTER: Duration = Duration::from_millis(750);
/// The same after a region has said that it does not have the peer: it was sent anew then.
const SILENT_AFTER_GONE: Duration = Duration::from_millis(300);
/// The same as long as no way leads to the peer, since its region is being connected, and for one that we have had no
/// session with: it may not have heard of us yet. Either may take that long.
const PATIENCE: Duration = Duration::from_secs(3);
/// A peer that was silent takes its routes back only when it has answered everything for so long: each change of the
/// route breaks what is open by the router before, and a network that comes and goes would do so every time.
const PROBATION: Duration = Duration::from_secs(30);
/// So often it is asked meanwhile.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// How often peers with rivals are looked at while one of them has a tunnel.
const LOOK_EVERY: Duration = Duration::from_millis(240);

/// What is remembered of peers with rivals.
#[derive(Debug, Default)]
pub(super) struct Rivalry {
    standing: Standing,
    rivals: BTreeMap<Slot, Rival>,
    /// When our home region was last found unconnected, and nobody was heard: that says nothing of anybody.
    deaf_at: Option<Instant>,
    deaf: bool,
    look_at: Option<Instant>,
}

impl Rivalry {
    pub(super) fn next_deadline(&self) -> Option<(Instant, &'static str)> {
        self.look_at.map(|at| (at, "peers with rivals"))
    }
}

/// A peer that serves a prefix which another serves too.
#[derive(Debug)]
struct Rival {
    id: NodeId,
    state: State,
    /// Which silence it was last asked about.
    asked: Option<Instant>,
    /// When its region said that it is not there; `None` once it was heard again.
    gone: Option<Instant>,
}

impl Rival {
    fn new(id: NodeId) -> Self {
        Self { id, state: State::Heard, asked: None, gone: None }
    }
}

/// Whether a peer answers: [`Voice`], and since when.
#[derive(Debug, Clone, Copy)]
enum State {
    Heard,
    Regained { since: Instant, asked: Instant },
    Silent { since: Instant },
}

impl State {
    fn voice(self) -> Voice {
        match self {
            Self::Heard => Voice::Heard,
            Self::Regained { .. } => Voice::Regained,
            Self::Silent { .. } => Voice::Silent,
        }
    }
}

impl Engine {
    /// Takes over who has rivals in a netmap that the roster holds already. Where control has news of a peer, it gets
    /// another chance: it counts as heard again, and is asked.
    pub(super) fn set_rivals(&mut self, netmap: &Netmap, changes: &[Change], now: Instant) {
        let mut known = std::mem::take(&mut self.rivalry.rivals);
        let mut returned = Vec::new();
        for change in changes {
            match change {
                Change::Removed(slot) => {
                    if let Some(rival) = known.remove(slot) {
                        self.rivalry.standing.set_voice(rival.id, Voice::Heard);
                    }
                }
                Change::Restarted(slot) => returned.push(*slot),
                Change::Updated(slot) if self.came_online(*slot, netmap) => returned.push(*slot),
                Change::Updated(_) => {}
            }
        }
        for id in netmap.rivals() {
            if let Some(slot) = netmap.peers.get(id).and_then(|peer| self.roster.slot(&peer.key)) {
                let rival = known.remove(&slot).filter(|rival| rival.id == *id);
                self.rivalry.rivals.insert(slot, rival.unwrap_or_else(|| Rival::new(*id)));
            }
        }
        self.rivalry.standing.retain(netmap.rivals());
        for slot in returned {
            self.regain(slot, now);
        }
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

    /// Peers with rivals are looked at from now on, if one of them is in use.
    pub(super) fn begin_watch(&mut self, now: Instant) {
        if self.rivalry.look_at.is_none() && self.rivalry.rivals.keys().any(|slot| self.wireguard.is_active(*slot)) {
            self.rivalry.look_at = Some(now + LOOK_EVERY);
        }
    }

    /// Looks at them when it is time to.
    pub(super) fn watch_rivals(&mut self, now: Instant) {
        if self.rivalry.look_at.take_if(|at| *at <= now).is_some() {
            self.examine_rivals(now);
            self.begin_watch(now);
        }
    }

    /// Looks whether peers with rivals have fallen silent, or are heard again.
    fn examine_rivals(&mut self, now: Instant) {
        let slots: Vec<Slot> = self.rivalry.rivals.keys().copied().collect();
        self.note_deafness(&slots, now);
        let mut news = self.measure_rivals(now);
        for slot in slots {
            news |= self.examine(slot, now);
        }
        if news {
            self.reorder(now);
        }
    }

    /// Looks whether anybody could be heard at all. Who was asked in vain is asked anew once that is so.
    fn note_deafness(&mut self, slots: &[Slot], now: Instant) {
        let lately = now.checked_sub(SILENT_AFTER).unwrap_or(now);
        let deaf = self.magicsock.is_deaf() && !self.wireguard.is_anybody_heard_since(lately);
        let ended = std::mem::replace(&mut self.rivalry.deaf, deaf) && !deaf;
        if deaf || ended {
            self.rivalry.deaf_at = Some(now);
        }
        for slot in slots.iter().filter(|_| ended) {
            if let (Some(entry), Some(_)) = (self.roster.entry(*slot), self.wireguard.asking_since(*slot)) {
                let key = entry.peer.key;
                self.insist(*slot, &key, now);
            }
        }
    }

    /// A region says that it does not have the peer. If that was the only way, and something is on its way, the peer is
    /// asked anew at once, and has little time: it may just be connecting the region again.
    pub(super) fn note_peer_gone(&mut self, slot: Slot, region: u32, now: Instant) {
        let waits = self.wireguard.asking_since(slot).or(self.wireguard.unheard_since(slot)).is_some();
        let Some(entry) = self.roster.entry(slot).filter(|_| waits) else {
            return;
        };
        let only_way = self.magicsock.status(slot, entry, now) == PathStatus::Derp { region };
        let Some(rival) = self.rivalry.rivals.get_mut(&slot).filter(|rival| only_way && rival.gone.is_none()) else {
            return;
        };
        rival.gone = Some(now);
        let key = entry.peer.key;
        self.insist(slot, &key, now);
    }

    /// Sends a handshake at once: one that is under way is lost.
    fn insist(&mut self, slot: Slot, key: &NodePublic, now: Instant) {
        self.wireguard.note_stuck(slot);
        self.wireguard.hurry(slot, now);
        self.wireguard.renew(slot, key, now);
        self.settle(now);
    }

    /// Whether the peer's silence has begun or ended.
    fn examine(&mut self, slot: Slot, now: Instant) -> bool {
        let heard = self.wireguard.heard(slot);
        let Some(rival) = self.rivalry.rivals.get_mut(&slot) else {
            return false;
        };
        if rival.gone.is_some_and(|gone| heard.is_some_and(|heard| heard > gone)) {
            rival.gone = None;
        }
        let state = rival.state;
        match state {
            State::Silent { since } => heard.is_some_and(|heard| heard > since) && self.regain(slot, now),
            State::Regained { .. } | State::Heard if self.is_silent(slot, now) => {
                self.set_state(slot, State::Silent { since: now })
            }
            State::Regained { since, asked } => self.probe(slot, since, asked, now),
            State::Heard => false,
        }
    }

    /// Whether a peer has left a handshake unanswered for too long. Begins one where packets got no answer.
    fn is_silent(&mut self, slot: Slot, now: Instant) -> bool {
        let (Some(rival), Some(entry)) = (self.rivalry.rivals.get_mut(&slot), self.roster.entry(slot)) else {
            return false;
        };
        if let Some(asking) = self.wireguard.asking_since(slot) {
            let chance = match rival.state {
                State::Regained { since, .. } => Some(since),
                State::Heard | State::Silent { .. } => None,
            };
            let since = [Some(asking), chance, self.rivalry.deaf_at].into_iter().flatten().fold(asking, Instant::max);
            if let Some(gone) = rival.gone {
                return now.duration_since(since.max(gone)) >= SILENT_AFTER_GONE;
            }
            let open = self.magicsock.is_open(slot, entry, now);
            let met = self.wireguard.counters(slot).last_handshake.is_some();
            let limit = if open && met { SILENT_AFTER } else { PATIENCE };
            return now.duration_since(since) >= limit;
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

    /// Asks a peer that was silent now and then, and gives it its rank back once it has answered for long enough.
    fn probe(&mut self, slot: Slot, since: Instant, asked: Instant, now: Instant) -> bool {
        let heard = self.wireguard.heard(slot);
        if heard.is_some_and(|heard| heard.saturating_duration_since(since) >= PROBATION) {
            return self.set_state(slot, State::Heard);
        }
        if self.wireguard.unheard_since(slot).is_some_and(|unheard| now.duration_since(unheard) >= ASK_AFTER) {
            self.set_state(slot, State::Regained { since: now, asked });
        } else if now.duration_since(asked) >= ASK_EVERY {
            self.set_state(slot, State::Regained { since, asked: now });
            self.ask(slot, now);
        }
        false
    }

    /// A silent peer was heard, or control has news of it. Whether it was silent.
    fn regain(&mut self, slot: Slot, now: Instant) -> bool {
        let silent = |rival: &&mut Rival| matches!(rival.state, State::Silent { .. });
        let Some(rival) = self.rivalry.rivals.get_mut(&slot).filter(silent) else {
            return false;
        };
        rival.gone = None;
        self.set_state(slot, State::Regained { since: now, asked: now });
        self.ask(slot, now);
        true
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
        let key = entry.peer.key;
        match packet {
            Some(packet) if self.wireguard.is_usable(slot, now) => drop(self.send_data(slot, &packet, now)),
            _ => self.insist(slot, &key, now),
        }
    }

    /// Whether that is news for the order.
    fn set_state(&mut self, slot: Slot, state: State) -> bool {
        let Some(rival) = self.rivalry.rivals.get_mut(&slot) else {
            return false;
        };
        rival.state = state;
        self.rivalry.standing.set_voice(rival.id, state.voice())
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
