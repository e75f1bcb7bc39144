//! What the data plane knows of peers and control does not: who is silent, and who is how far away.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::NodeId;

/// Peers nearer than that are equally near.
const NEAR: Duration = Duration::from_millis(10);
/// Beyond [`NEAR`], a class of latencies ends at one and a half times where it begins: what differs less than that is
/// not worth another route, which breaks what is open by the old one.
const CLASS: (u32, u32) = (3, 2);
/// A peer leaves its class only when its latency is a quarter beyond it, so that jitter moves nobody.
const SLACK: (u32, u32) = (5, 4);
/// What is farther away than the last class begins (a minute) is in it.
const CLASSES: u8 = 22;

/// How far away a peer is, in classes that matter; less is nearer, and an unknown distance is the farthest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LatencyClass(u8);

impl LatencyClass {
    const UNKNOWN: Self = Self(u8::MAX);

    fn of(latency: Duration) -> Self {
        let mut end = NEAR;
        let classes = (0..CLASSES).take_while(|_| {
            let beyond = latency >= end;
            end = end * CLASS.0 / CLASS.1;
            beyond
        });
        Self(classes.count() as u8)
    }

    /// Whether a peer of this class that is now so far away stays in it.
    fn holds(self, latency: Duration) -> bool {
        (Self::of(latency * SLACK.1 / SLACK.0)..=Self::of(latency * SLACK.0 / SLACK.1)).contains(&self)
    }
}

/// How a latency was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measured {
    /// To the peer's home region only, as netcheck does. Counts until the peer itself was measured once: that it
    /// has no direct path just now does not bring it nearer.
    Region,
    /// To the peer, by a direct path.
    Direct,
}

/// Whether a peer answers. Less is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Voice {
    /// It answers, or nobody has asked it.
    #[default]
    Heard,
    /// It was silent, and has not been heard for long enough since to take its routes back: each change breaks what is
    /// open by the router before.
    Regained,
    /// It does not answer.
    Silent,
}

/// What is known of peers that serve the same prefix as another. See [`Netmap::route`](super::Netmap::route).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Standing {
    /// Of those that are not simply heard.
    voices: BTreeMap<NodeId, Voice>,
    latencies: BTreeMap<NodeId, (LatencyClass, Measured)>,
}

impl Standing {
    /// Notes whether a peer answers. Whether that is news.
    pub fn set_voice(&mut self, id: NodeId, voice: Voice) -> bool {
        let before = match voice {
            Voice::Heard => self.voices.remove(&id),
            Voice::Regained | Voice::Silent => self.voices.insert(id, voice),
        };
        before.unwrap_or_default() != voice
    }

    /// Whether a peer answers.
    pub fn voice(&self, id: NodeId) -> Voice {
        self.voices.get(&id).copied().unwrap_or_default()
    }

    /// Notes how far away a peer is. Whether that is news: small differences are not.
    pub fn set_latency(&mut self, id: NodeId, latency: Duration, measured: Measured) -> bool {
        let new = (LatencyClass::of(latency), measured);
        let keeps = |(class, by): &(LatencyClass, Measured)| match (by, measured) {
            (Measured::Direct, Measured::Region) => true,
            (Measured::Region, Measured::Direct) => false,
            (Measured::Region, Measured::Region) | (Measured::Direct, Measured::Direct) => class.holds(latency),
        };
        if self.latencies.get(&id).is_some_and(keeps) {
            return false;
        }
        self.latencies.insert(id, new).is_none_or(|(class, _)| class != new.0)
    }

    /// Forgets everybody else.
    pub fn retain(&mut self, peers: &BTreeSet<NodeId>) {
        self.voices.retain(|id, _| peers.contains(id));
        self.latencies.retain(|id, _| peers.contains(id));
    }

    pub(super) fn latency(&self, id: NodeId) -> LatencyClass {
        self.latencies.get(&id).map_or(LatencyClass::UNKNOWN, |(class, _)| *class)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn jitter_moves_nobody_and_a_real_change_does() {
        let mut standing = Standing::default();
        assert!(standing.set_latency(1, millis(14), Measured::Direct));
        let class = standing.latency(1);
        for jitter in [15, 18, 14, 9, 13] {
            assert!(!standing.set_latency(1, millis(jitter), Measured::Direct), "{jitter} ms");
        }
        assert!(standing.set_latency(1, millis(40), Measured::Direct));
        assert!(standing.latency(1) > class);
    }

    #[test]
    fn a_region_says_nothing_of_a_peer_that_was_measured_itself() {
        let mut standing = Standing::default();
        assert!(standing.set_latency(1, millis(5), Measured::Region));
        assert!(standing.set_latency(1, millis(80), Measured::Direct));
        assert!(!standing.set_latency(1, millis(5), Measured::Region));
        assert_eq!(standing.latency(1), LatencyClass::of(millis(80)));
    }

    #[test]
    fn who_is_not_asked_about_is_forgotten() {
        let mut standing = Standing::default();
        let silent = Voice::Silent;
        assert!(standing.set_voice(1, silent) && !standing.set_voice(1, silent) && standing.set_voice(2, silent));
        standing.retain(&BTreeSet::from([2]));
        assert_eq!((standing.voice(1), standing.voice(2)), (Voice::Heard, silent));
        assert!(standing.set_voice(2, Voice::Regained) && standing.set_voice(2, Voice::Heard));
        assert!(!standing.set_voice(2, Voice::Heard));
        assert_eq!(standing, Standing::default());
    }

    proptest! {
        #[test]
        fn classes_rise_with_latency_and_hold_what_they_are_of(a in 0u64..200_000, b in 0u64..200_000) {
            let (near, far) = (millis(a.min(b)), millis(a.max(b)));
            prop_assert!(LatencyClass::of(near) <= LatencyClass::of(far));
            prop_assert!(LatencyClass::of(far) < LatencyClass::UNKNOWN);
            prop_assert!(LatencyClass::of(near).holds(near));
        }
    }
}
