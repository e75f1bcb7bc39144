//! What was said of each peer, and what is to be said of it next: one line for each change that lasts.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::budget::Budget;
use crate::key::NodePublic;
use crate::netmap::Netmap;

/// A peer has at most one line in so long, and beside it the end of what that one warned of, which comes at once. What it
/// says then is how things are by then.
const PAUSE: Duration = Duration::from_secs(10);
/// What may get better by itself is said once it has not: a direct path is found after the relay has carried something,
/// and a relay that restarts is back.
const SETTLE: Duration = Duration::from_secs(5);

/// What was to be said so long ago was to be said while the machine slept: everything has to settle again.
const SLEPT: Duration = Duration::from_secs(2);

/// By which kind of way packets reach a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Direct,
    Relay,
    Nothing,
}

/// What is to be said of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// This is its way now.
    Way(Way),
    /// It is in reach again, having been said not to be; by which way, where that can be told.
    Again(Option<Way>),
}

/// What was said of each peer.
#[derive(Debug, Default)]
pub(super) struct Told {
    peers: HashMap<NodePublic, Peer>,
    /// The peers with something unsaid, by when it is due.
    due: BTreeSet<(Instant, NodePublic)>,
    pub(super) budget: Budget,
}

#[derive(Debug, Default)]
struct Peer {
    /// Connections that lead to it.
    flows: usize,
    said: Option<Way>,
    said_at: Option<Instant>,
    unsaid: Option<(Way, Instant)>,
    /// It let somebody wait in vain, and nothing has come from it since.
    silent: bool,
    /// It was said to be out of reach, and not yet that it no longer is.
    missed: bool,
}

impl Peer {
    /// What is wrong with it is over, or nobody's business any more: the next time it is news again.
    fn pardon(&mut self) {
        self.silent = false;
        self.said = self.said.filter(|way| *way != Way::Nothing);
    }
}

impl Told {
    /// A connection leads to the peer.
    pub(super) fn open(&mut self, peer: NodePublic) {
        self.peers.entry(peer).or_default().flows += 1;
    }

    /// A connection to the peer is no more.
    pub(super) fn close(&mut self, peer: &NodePublic) {
        if let Some(known) = self.peers.get_mut(peer) {
            known.flows = known.flows.saturating_sub(1);
        }
    }

    /// Routes have changed: counts anew which peers the connections to `remotes` lead to, and forgets those that are gone.
    pub(super) fn follow(&mut self, netmap: &Netmap, remotes: impl Iterator<Item = IpAddr>) {
        self.peers.retain(|peer, known| {
            known.flows = 0;
            netmap.peer_by_key(peer).is_some()
        });
        self.due.retain(|(_, peer)| self.peers.contains_key(peer));
        for route in remotes.filter_map(|remote| netmap.route(remote)) {
            self.open(route.peer.key);
        }
    }

    /// Peers that connections lead to.
    pub(super) fn in_use(&self) -> impl Iterator<Item = &NodePublic> {
        self.peers.iter().filter(|(_, known)| known.flows > 0).map(|(peer, _)| peer)
    }

    /// Packets to a peer go that way now; `None` where nothing can be told. `heard` is whether it surely answers.
    /// What to say now, if anything; what is put off is asked for again when it is due.
    pub(super) fn note(&mut self, peer: NodePublic, way: Option<Way>, heard: bool, now: Instant) -> Option<News> {
        let known = self.peers.get_mut(&peer)?;
        if heard && way != Some(Way::Nothing) {
            known.pardon();
            if known.missed {
                return self.note_again(peer, way, now);
            }
        }
        let way = if known.silent { Some(Way::Nothing) } else { way.filter(|_| known.flows > 0) };
        let Some(way) = way else {
            self.forget(&peer);
            return None;
        };
        let due = match known.unsaid {
            _ if known.said == Some(way) => None,
            Some((unsaid, at)) if unsaid == way => {
                Some(if now.saturating_duration_since(at) > SLEPT { now + SETTLE } else { at })
            }
            _ => {
                let at_once =
                    way == Way::Direct || (known.said, way) == (Some(Way::Direct), Way::Relay) || known.silent;
                let settled = if at_once { now } else { now + SETTLE };
                Some(known.said_at.map_or(settled, |at| settled.max(at + PAUSE)))
            }
        };
        let says = due.is_some_and(|at| at <= now);
        if says {
            (known.said, known.said_at) = (Some(way), Some(now));
            known.missed |= way == Way::Nothing;
        }
        self.put_off(peer, due.filter(|_| !says).map(|at| (way, at)));
        says.then_some(News::Way(way))
    }

    /// A peer that was said to be out of reach answers: nobody shall believe in it any longer.
    fn note_again(&mut self, peer: NodePublic, way: Option<Way>, now: Instant) -> Option<News> {
        let known = self.peers.get_mut(&peer)?;
        (known.said, known.said_at, known.missed) = (way, Some(now), false);
        self.put_off(peer, None);
        Some(News::Again(way))
    }

    /// A peer did not answer somebody who waited for it. What to say now, if anything.
    pub(super) fn note_silent(&mut self, peer: NodePublic, now: Instant) -> Option<News> {
        let known = self.peers.entry(peer).or_default();
        known.silent = true;
        if known.unsaid.is_some_and(|(way, _)| way == Way::Nothing) {
            // It was to settle; now it has.
            self.put_off(peer, None);
        }
        self.note(peer, Some(Way::Nothing), false, now)
    }

    /// A peer answered somebody. Whether it was said to be out of reach.
    pub(super) fn note_answer(&mut self, peer: &NodePublic) -> bool {
        let Some(known) = self.peers.get_mut(peer) else { return false };
        let wrong = known.silent || known.missed || known.said == Some(Way::Nothing);
        known.pardon();
        wrong
    }

    /// Nothing is to be said of the peer, and what was wrong with it is news when it is so again.
    pub(super) fn forget(&mut self, peer: &NodePublic) {
        if let Some(known) = self.peers.get_mut(peer) {
            known.pardon();
            self.put_off(*peer, None);
        }
    }

    /// What is to be said of a peer in use is seen at that time.
    pub(super) fn look_again(&mut self, peer: &NodePublic, at: Instant) {
        if self.peers.get(peer).is_some_and(|known| known.flows > 0) {
            self.put_off(*peer, Some((Way::Nothing, at)));
        }
    }

    /// The same, of one that is silent: nothing else tells when it is back by a relay.
    pub(super) fn watch(&mut self, peer: &NodePublic, at: Instant) {
        if self.peers.get(peer).is_some_and(|known| known.silent && known.unsaid.is_none()) {
            self.look_again(peer, at);
        }
    }

    fn put_off(&mut self, peer: NodePublic, unsaid: Option<(Way, Instant)>) {
        let Some(known) = self.peers.get_mut(&peer) else { return };
        if let Some((_, at)) = std::mem::replace(&mut known.unsaid, unsaid) {
            self.due.remove(&(at, peer));
        }
        self.due.extend(unsaid.map(|(_, at)| (at, peer)));
    }

    /// Peers of which something is to be said by now.
    pub(super) fn due(&self, now: Instant) -> Vec<NodePublic> {
        self.due.iter().take_while(|(at, _)| *at <= now).map(|(_, peer)| *peer).collect()
    }

    /// When something may have to be said.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at).into_iter().chain(self.budget.next_deadline()).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::NodePrivate;

    /// What is told of one peer, and that one.
    fn one_in_use() -> (Told, NodePublic) {
        let (mut told, key) = (Told::default(), NodePrivate::random().public());
        told.open(key);
        (told, key)
    }

    /// What is said when a peer's way is each of these from its second on, up to a minute.
    fn said(ways: &[(u64, Way)]) -> Vec<(u64, News)> {
        let ((mut told, key), start) = (one_in_use(), Instant::now());
        let mut lines = Vec::new();
        for second in 0..60 {
            let now = start + Duration::from_secs(second);
            for (_, way) in ways.iter().filter(|(at, _)| *at == second) {
                lines.extend(told.note(key, Some(*way), false, now).map(|news| (second, news)));
            }
            let way = ways.iter().rfind(|(at, _)| *at <= second).map(|(_, way)| *way);
            if told.due(now) == [key] {
                lines.extend(told.note(key, way, false, now).map(|news| (second, news)));
            }
            assert!(told.next_deadline().is_none_or(|at| at > now));
        }
        lines
    }

    #[test]
    fn relay_before_the_first_direct_path_is_said_only_when_it_lasts() {
        assert_eq!(said(&[(0, Way::Relay), (1, Way::Direct)]), [(1, News::Way(Way::Direct))]);
        assert_eq!(said(&[(0, Way::Relay), (3, Way::Relay)]), [(5, News::Way(Way::Relay))]);
    }

    #[test]
    fn loss_of_a_direct_path_is_said_at_once_and_loss_of_all_once_it_lasts() {
        let lost = [(0, Way::Direct), (20, Way::Relay), (40, Way::Nothing), (41, Way::Relay), (42, Way::Nothing)];
        let lines = [(0, Way::Direct), (20, Way::Relay), (47, Way::Nothing)];
        assert_eq!(said(&lost), lines.map(|(second, way)| (second, News::Way(way))));
    }

    #[test]
    fn path_that_flaps_has_one_line_in_ten_seconds_and_the_last_is_true() {
        let flaps: Vec<_> =
            (0..25).map(|second| (second, if second % 2 == 0 { Way::Direct } else { Way::Relay })).collect();
        let lines = said(&flaps);
        assert!(lines.windows(2).all(|pair| pair[1].0 - pair[0].0 >= 10), "{lines:?}");
        assert_eq!(lines.last().unwrap().1, News::Way(Way::Direct));
    }

    #[test]
    fn silence_met_by_a_dial_is_said_once_until_the_peer_is_back() {
        let ((mut told, key), now) = (one_in_use(), Instant::now());
        assert_eq!(told.note_silent(key, now), Some(News::Way(Way::Nothing)));
        assert_eq!(told.note_silent(key, now + PAUSE), None);
        assert_eq!(told.note(key, Some(Way::Relay), false, now + PAUSE), None, "a path is no answer");
        assert_eq!(told.note(key, Some(Way::Direct), true, now + PAUSE), Some(News::Again(Some(Way::Direct))));
        assert_eq!(told.note_silent(key, now + 2 * PAUSE), Some(News::Way(Way::Nothing)));
    }

    #[test]
    fn later_silence_is_said_though_the_peer_was_back_by_a_relay_for_a_moment_only() {
        let ((mut told, key), mut now) = (one_in_use(), Instant::now());
        type Back = fn(&mut Told, NodePublic, Instant);
        let ways_back: [(&str, Back); 3] = [
            ("session", |told, key, now| assert!(told.note(key, Some(Way::Relay), true, now).is_some())),
            ("answer", |told, key, _| assert!(told.note_answer(&key))),
            ("unused", |told, key, _| told.forget(&key)),
        ];
        for (name, back) in ways_back {
            assert_eq!(told.note_silent(key, now), Some(News::Way(Way::Nothing)), "before {name}");
            back(&mut told, key, now + Duration::from_secs(1));
            now += 2 * PAUSE;
        }
        assert_eq!(told.note_silent(key, now), Some(News::Way(Way::Nothing)));
    }

    #[test]
    fn silence_too_soon_after_another_line_is_said_later_though_the_dial_is_over_by_then() {
        let ((mut told, key), now) = (one_in_use(), Instant::now());
        assert_eq!(told.note(key, Some(Way::Direct), true, now), Some(News::Way(Way::Direct)));
        assert_eq!(told.note_silent(key, now + SETTLE), None);
        told.close(&key);
        assert_eq!(told.next_deadline(), Some(now + PAUSE));
        assert_eq!(told.note(key, Some(Way::Relay), false, now + PAUSE), Some(News::Way(Way::Nothing)));
    }

    #[test]
    fn peer_that_no_connection_uses_is_not_told_of() {
        let ((mut told, key), now) = (one_in_use(), Instant::now());
        told.open(key);
        told.close(&key);
        assert_eq!(told.in_use().collect::<Vec<_>>(), [&key]);
        assert_eq!(told.note(key, Some(Way::Relay), false, now), None);
        told.close(&key);
        assert_eq!(told.in_use().count(), 0);
        assert_eq!(told.due(now + SETTLE), [key]);
        assert_eq!(told.note(key, Some(Way::Relay), false, now + SETTLE), None);
        assert_eq!(told.next_deadline(), None);
        assert_eq!(told.note(key, Some(Way::Direct), true, now + SETTLE), None);
    }

    #[test]
    fn end_of_an_outage_that_was_said_is_said_once_though_nobody_uses_the_peer_by_then() {
        for way in [Some(Way::Direct), Some(Way::Relay), None] {
            let ((mut told, key), now) = (one_in_use(), Instant::now());
            assert_eq!(told.note(key, way, true, now), way.filter(|way| *way == Way::Direct).map(News::Way));
            assert!(told.note_silent(key, now + PAUSE).is_some());
            told.close(&key);
            assert_eq!(told.note(key, Some(Way::Relay), false, now + PAUSE), None, "a path is no answer");
            assert_eq!(told.note(key, way, true, now + PAUSE), Some(News::Again(way)));
            assert_eq!(told.note(key, way, true, now + 3 * PAUSE), None);
            assert_eq!(told.next_deadline(), None);
        }
    }

    #[test]
    fn peer_that_comes_and_goes_has_one_warning_in_ten_seconds_and_each_its_end() {
        let ((mut told, key), start) = (one_in_use(), Instant::now());
        let mut lines = Vec::new();
        for second in 0..300 {
            let now = start + Duration::from_secs(second);
            let news = match second % 14 {
                0 => told.note_silent(key, now),
                7 => told.note(key, Some(Way::Relay), true, now),
                _ if told.due(now) != [key] => None,
                phase => told.note(key, Some(Way::Relay), phase > 7, now),
            };
            lines.extend(news.map(|news| (second, news)));
        }
        let ends = |(_, news): &(u64, News)| matches!(news, News::Again(_));
        let in_time = |pair: &[(u64, News)]| ends(&pair[1]) || pair[1].0 - pair[0].0 >= 10;
        assert!(lines.windows(2).all(in_time), "{lines:?}");
        assert!(lines.iter().filter(|line| ends(line)).count() > 5, "{lines:?}");
        assert!(!ends(&lines[0]) && !lines.windows(2).any(|pair| ends(&pair[0]) && ends(&pair[1])), "{lines:?}");
    }

    #[test]
    fn what_is_looked_at_again_is_told_as_it_is_by_then() {
        let ((mut told, key), now) = (one_in_use(), Instant::now());
        assert_eq!(told.note(key, Some(Way::Direct), true, now), Some(News::Way(Way::Direct)));
        let (looked, later) = (now + PAUSE, now + 2 * PAUSE);
        told.look_again(&key, looked);
        assert_eq!(told.due(looked), [key]);
        assert_eq!(told.note_silent(key, looked), Some(News::Way(Way::Nothing)));
        told.watch(&key, later);
        assert_eq!(told.due(later), [key]);
        assert_eq!(told.note(key, Some(Way::Relay), false, later), None, "a path is no answer");
        told.watch(&key, later);
        assert_eq!(told.note(key, Some(Way::Relay), true, later), Some(News::Again(Some(Way::Relay))));
        assert_eq!(told.next_deadline(), None);
        told.close(&key);
        told.look_again(&key, later);
        assert_eq!(told.next_deadline(), None, "nobody uses it");
        assert!(told.note_silent(key, later).is_none());
        told.put_off(key, None);
        told.watch(&key, later);
        assert_eq!(told.next_deadline(), None, "nobody uses it");
    }

    #[test]
    fn what_was_to_be_said_during_a_sleep_settles_again() {
        let ((mut told, key), start) = (one_in_use(), Instant::now());
        assert_eq!(told.note(key, Some(Way::Nothing), false, start), None);
        let awake = start + Duration::from_secs(60);
        assert_eq!(told.due(awake), [key]);
        assert_eq!(told.note(key, Some(Way::Nothing), false, awake), None);
        assert_eq!(told.next_deadline(), Some(awake + SETTLE));
        assert_eq!(told.note(key, Some(Way::Nothing), false, awake + SETTLE), Some(News::Way(Way::Nothing)));
    }
}
