//! Which paths are said aloud: those of peers that a connection uses, once for each change that lasts.
//!
//! A peer that stays idle is nobody's business, and a path that is about to become a better one is not news.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::Core;
use crate::engine::PathStatus;
use crate::key::NodePublic;

/// A peer has at most one line in so long. What it says then is how things are by then.
const PAUSE: Duration = Duration::from_secs(10);
/// What may get better by itself is said once it has not: a direct path is found after the relay has carried something,
/// and a relay that restarts is back.
const SETTLE: Duration = Duration::from_secs(5);

/// By which kind of way packets reach a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Direct,
    Relay,
    Nothing,
}

/// What was said of each peer.
#[derive(Debug, Default)]
pub(super) struct Told {
    peers: HashMap<NodePublic, Peer>,
    next: Option<Instant>,
}

#[derive(Debug, Default)]
struct Peer {
    said: Option<(Way, Instant)>,
    unsaid: Option<(Way, Instant)>,
}

impl Told {
    /// Packets to a peer in use go that way now. Whether to say so now; else it is asked for again when that is due.
    fn note(&mut self, peer: NodePublic, way: Way, now: Instant) -> bool {
        let known = self.peers.entry(peer).or_default();
        let said = known.said.map(|(way, _)| way);
        known.unsaid = match known.unsaid.filter(|(unsaid, _)| *unsaid == way) {
            _ if said == Some(way) => None,
            Some(unsaid) => Some(unsaid),
            None => {
                let at_once = way == Way::Direct || (said == Some(Way::Direct) && way == Way::Relay);
                let settled = if at_once { now } else { now + SETTLE };
                Some((way, known.said.map_or(settled, |(_, at)| settled.max(at + PAUSE))))
            }
        };
        let due = known.unsaid.take_if(|(_, at)| *at <= now).is_some();
        if due {
            known.said = Some((way, now));
        }
        self.schedule();
        due
    }

    /// A peer did not answer somebody who waited for it. Whether to say so.
    fn note_silent(&mut self, peer: NodePublic, now: Instant) -> bool {
        let known = self.peers.entry(peer).or_default();
        let before = known.said.replace((Way::Nothing, now)).map(|(way, _)| way);
        known.unsaid = None;
        self.schedule();
        before != Some(Way::Nothing)
    }

    /// No connection uses the peer any more.
    fn forget(&mut self, peer: &NodePublic) {
        if let Some(known) = self.peers.get_mut(peer) {
            known.unsaid = None;
            self.schedule();
        }
    }

    /// Keeps what is known of these peers alone.
    fn retain(&mut self, there: impl Fn(&NodePublic) -> bool) {
        self.peers.retain(|peer, _| there(peer));
        self.schedule();
    }

    fn due(&self, now: Instant) -> Vec<NodePublic> {
        let due = |peer: &Peer| peer.unsaid.is_some_and(|(_, at)| at <= now);
        self.peers.iter().filter(|(_, peer)| due(peer)).map(|(key, _)| *key).collect()
    }

    fn schedule(&mut self) {
        self.next = self.peers.values().filter_map(|peer| peer.unsaid.map(|(_, at)| at)).min();
    }

    /// When something may have to be said.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.next
    }
}

impl Core {
    /// Says how packets reach a peer now, where that is news.
    pub(super) fn say_path(&mut self, key: &NodePublic, now: Instant) {
        let engine = &self.parts.engine;
        let peer = engine.netmap().and_then(|netmap| netmap.peer_by_key(key));
        let (Some(peer), Some(status)) = (peer, engine.peer_status(key, now)) else {
            return self.told.forget(key);
        };
        let (peer, path) = (peer.name.as_str(), status.path);
        debug!(peer, %path, "peer's path");
        if !self.peers_in_use().contains(key) {
            return self.told.forget(key);
        }
        let way = match path {
            PathStatus::Derp { .. } if status.open => Way::Relay,
            PathStatus::Direct { .. } => Way::Direct,
            // A peer without disco has no path that could be told, and is sent to all the same.
            PathStatus::None if status.open => return self.told.forget(key),
            PathStatus::Derp { .. } | PathStatus::None => Way::Nothing,
        };
        if !self.told.note(*key, way, now) {
            return;
        }
        match way {
            Way::Direct => info!(peer, %path, "peer is reached directly"),
            Way::Relay => info!(peer, %path, "peer is reached by a relay"),
            Way::Nothing => warn!(peer, "peer cannot be reached any more: no path to it works"),
        }
    }

    /// Says that a peer did not answer a dial.
    pub(in crate::node) fn say_silent(&mut self, key: &NodePublic, name: &str, now: Instant) {
        if self.told.note_silent(*key, now) {
            warn!(peer = name, "peer cannot be reached: it does not answer");
        }
    }

    /// Says what has become of the paths to all peers in use: a relay has come or gone.
    pub(super) fn say_paths(&mut self, now: Instant) {
        for key in self.peers_in_use() {
            self.say_path(&key, now);
        }
    }

    /// Says what was put off until now.
    pub(super) fn say_due_paths(&mut self, now: Instant) {
        if self.told.next_deadline().is_some_and(|at| at <= now) {
            self.told.due(now).iter().for_each(|key| self.say_path(key, now));
        }
    }

    /// Forgets what was said of peers that are no more.
    pub(super) fn forget_paths(&mut self) {
        if let Some(netmap) = self.parts.engine.netmap() {
            self.told.retain(|key| netmap.peer_by_key(key).is_some());
        }
    }

    /// Peers that connections lead to.
    fn peers_in_use(&self) -> BTreeSet<NodePublic> {
        let Some(netmap) = self.parts.engine.netmap() else { return BTreeSet::new() };
        let peer = |remote| netmap.route(remote).map(|route| route.peer.key);
        self.by_flow.keys().filter_map(|flow| peer(flow.remote.ip())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::NodePrivate;

    /// What is said when a peer's way is each of these from its second on, up to a minute.
    fn said(ways: &[(u64, Way)]) -> Vec<(u64, Way)> {
        let (mut told, key, start) = (Told::default(), NodePrivate::random().public(), Instant::now());
        let mut lines = Vec::new();
        for second in 0..60 {
            let now = start + Duration::from_secs(second);
            for (_, way) in ways.iter().filter(|(at, _)| *at == second) {
                if told.note(key, *way, now) {
                    lines.push((second, *way));
                }
            }
            let way = ways.iter().rfind(|(at, _)| *at <= second).map(|(_, way)| *way);
            if let Some(way) = way.filter(|_| told.due(now) == [key])
                && told.note(key, way, now)
            {
                lines.push((second, way));
            }
            assert!(told.next_deadline().is_none_or(|at| at > now));
        }
        lines
    }

    #[test]
    fn relay_before_the_first_direct_path_is_said_only_when_it_lasts() {
        assert_eq!(said(&[(0, Way::Relay), (1, Way::Direct)]), [(1, Way::Direct)]);
        assert_eq!(said(&[(0, Way::Relay), (3, Way::Relay)]), [(5, Way::Relay)]);
    }

    #[test]
    fn loss_of_a_direct_path_is_said_at_once_and_loss_of_all_once_it_lasts() {
        let lost = [(0, Way::Direct), (20, Way::Relay), (40, Way::Nothing), (41, Way::Relay), (42, Way::Nothing)];
        assert_eq!(said(&lost), [(0, Way::Direct), (20, Way::Relay), (47, Way::Nothing)]);
    }

    #[test]
    fn path_that_flaps_has_one_line_in_ten_seconds_and_the_last_is_true() {
        let flaps: Vec<_> =
            (0..25).map(|second| (second, if second % 2 == 0 { Way::Direct } else { Way::Relay })).collect();
        let lines = said(&flaps);
        assert!(lines.windows(2).all(|pair| pair[1].0 - pair[0].0 >= 10), "{lines:?}");
        assert_eq!(lines.last().unwrap().1, Way::Direct);
    }

    #[test]
    fn silence_met_by_a_dial_is_said_once_until_the_peer_is_back() {
        let (mut told, key, now) = (Told::default(), NodePrivate::random().public(), Instant::now());
        assert!(told.note_silent(key, now) && !told.note_silent(key, now));
        assert!(told.note(key, Way::Direct, now + PAUSE));
        assert!(told.note_silent(key, now + PAUSE));
        told.retain(|_| false);
        assert!(told.note_silent(key, now + PAUSE));
    }
}
