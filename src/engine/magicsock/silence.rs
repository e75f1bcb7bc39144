//! When a peer that does not answer puts its path in doubt, long before trust in it ends.
//!
//! Whoever gets packets answers sooner or later, if only by acknowledging them. When nothing has come back for a while
//! the best address is pinged, and once more; if both stay unanswered, packets go by the relay as well and the peer is
//! told where we are now. A path that is merely quiet costs one ping and its pong each time it falls silent. Tailscale's
//! client goes on sending into a dead path until its trust in it ends, 6.5 s after the last pong.

use std::time::{Duration, Instant};

/// A peer is silent that has sent nothing for so long, and two round trips, after a packet went out: longer than TCP
/// delays an acknowledgement (500 ms at most, by RFC 9293, 3.8.6.3).
const SILENT: Duration = Duration::from_millis(500);
/// A pong that takes so long, and two round trips, is late. Machines under load stand still for less.
const LATE: Duration = Duration::from_millis(250);
/// Pings that must stay unanswered: one may be lost.
const PINGS: u32 = 2;

/// How long a pong of an address with this latency may take.
pub(super) fn pong_limit(latency: Duration) -> Duration {
    LATE + latency * 2
}

/// What the time has come for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing.
    Wait,
    /// Ping the best address.
    Ask,
    /// It is in doubt: the peer has been silent since then.
    Doubt(Instant),
}

/// The watch over one peer's best address.
#[derive(Debug, Default)]
pub(super) struct Silence {
    look_at: Option<Instant>,
    /// When the silence began because of which pings went out, and how many that no pong has answered.
    asked: Option<(Instant, u32)>,
    /// The beginning of the silence that a pong has explained: the path works, and the peer has nothing to say.
    explained: Option<Instant>,
}

impl Silence {
    /// A packet goes out by an address of this latency. Whether there is a deadline now where there was none.
    pub(super) fn note_send(&mut self, latency: Duration, now: Instant) -> bool {
        let begins = self.look_at.is_none();
        self.look_at.get_or_insert(now + silent_after(latency));
        begins
    }

    /// Whether a ping is out because the peer does not answer packets.
    pub(super) fn is_asking(&self) -> bool {
        self.asked.is_some()
    }

    /// The best address has answered.
    pub(super) fn note_pong(&mut self) {
        self.explained = self.asked.take().map(|(since, _)| since).or(self.explained);
    }

    /// Looks, if it is time, at an address of this latency, if one is trusted, and at since when its peer is silent.
    pub(super) fn handle_timeout(&mut self, trusted: Option<Duration>, unheard: Option<Instant>, now: Instant) -> Step {
        if self.look_at.is_none_or(|at| at > now) {
            return Step::Wait;
        }
        let (Some(latency), Some(since)) = (trusted, unheard.filter(|since| self.explained != Some(*since))) else {
            // The next packet on its way out begins anew.
            (self.look_at, self.asked) = (None, None);
            return Step::Wait;
        };
        let silent_at = since + silent_after(latency);
        if silent_at > now {
            (self.look_at, self.asked) = (Some(silent_at), None);
            return Step::Wait;
        }
        let asked = self.asked.filter(|(before, _)| *before == since).map_or(0, |(_, asked)| asked);
        if asked == PINGS {
            *self = Self::default();
            return Step::Doubt(since);
        }
        self.asked = Some((since, asked + 1));
        self.look_at = Some(now + pong_limit(latency));
        Step::Ask
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.look_at
    }
}

fn silent_after(latency: Duration) -> Duration {
    SILENT + latency * 2
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(20);

    fn at(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    /// What a silence that began at `start` leads to by the deadlines, until nothing is left to do.
    fn follow(silence: &mut Silence, start: Instant) -> Vec<(Duration, Step)> {
        let mut steps = Vec::new();
        while let Some(now) = silence.next_deadline() {
            steps.push((now - start, silence.handle_timeout(Some(RTT), Some(start), now)));
        }
        steps
    }

    #[test]
    fn two_pings_that_nobody_answers_put_a_path_in_doubt_within_a_second() {
        let (start, mut silence) = (Instant::now(), Silence::default());
        assert!(silence.note_send(RTT, start) && !silence.note_send(RTT, start));
        let (silent, late) = (silent_after(RTT), pong_limit(RTT));
        let expected = [(silent, Step::Ask), (silent + late, Step::Ask), (silent + late * 2, Step::Doubt(start))];
        assert_eq!(follow(&mut silence, start), expected);
        assert!(silent + late * 2 < Duration::from_millis(1_200));
    }

    #[test]
    fn a_pong_explains_a_silence_until_the_next_one() {
        let (start, mut silence) = (Instant::now(), Silence::default());
        silence.note_send(RTT, start);
        assert_eq!(silence.handle_timeout(Some(RTT), Some(start), at(start, 540)), Step::Ask);
        silence.note_pong();
        silence.note_send(RTT, at(start, 700));
        assert!(follow(&mut silence, start).iter().all(|(_, step)| *step == Step::Wait));
        let next = at(start, 2_000);
        silence.note_send(RTT, next);
        assert_eq!(follow(&mut silence, next).last().map(|(_, step)| *step), Some(Step::Doubt(next)));
    }

    #[test]
    fn a_peer_that_answers_is_not_asked() {
        let (start, mut silence) = (Instant::now(), Silence::default());
        silence.note_send(RTT, start);
        assert_eq!(silence.handle_timeout(Some(RTT), Some(at(start, 400)), at(start, 540)), Step::Wait);
        assert_eq!(silence.next_deadline(), Some(at(start, 940)));
        assert_eq!(silence.handle_timeout(Some(RTT), None, at(start, 940)), Step::Wait);
        assert_eq!(silence.next_deadline(), None, "whoever sends nothing has nothing to look at");
    }
}
