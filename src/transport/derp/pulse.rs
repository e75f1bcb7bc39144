//! Whether a relay lives: it is asked when it has carried something and then falls silent.
//!
//! That the kernel of its machine, or a proxy before it, acknowledges what is sent does not mean that it is read. A relay
//! that does not answer is doubted first and given up much later: an answer may also wait behind what we or others have
//! sent into a slow line, where a new connection would fare worse. Whatever comes is a sign of life, and so is that
//! the socket takes more after it was full. Where the network moved, what was sent before may be lost, and a new
//! connection is made soon.

use std::time::Duration;

use tokio::time::Instant;

/// A relay that has carried something, and from which then nothing came for so long, is pinged once.
const QUIET: Duration = Duration::from_secs(2);
/// When it is doubted for want of an answer. Source: Tailscale, wgengine/magicsock, `maybeCloseDERPsOnRebind` (3 s).
const ANSWER: Duration = Duration::from_secs(3);
/// When a doubt is no moment any more, and users are told: a home is left by then.
const LASTS: Duration = Duration::from_secs(8);
/// When it is given up: as late as one that takes nothing.
const PATIENCE: Duration = super::WRITE_LIMIT;

/// What is known of a relay's life.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    /// When the relay is pinged, unless something comes before.
    ping_at: Option<Instant>,
    /// The question without an answer.
    asked: Option<Asked>,
    doubted: bool,
    /// Whether that was told.
    told: bool,
}

#[derive(Debug, Clone, Copy)]
struct Asked {
    /// Since when its answer is waited for.
    since: Instant,
    /// When the relay is given up.
    ends_at: Instant,
}

impl Asked {
    fn new(now: Instant, patience: Duration) -> Self {
        Self { since: now, ends_at: now + patience }
    }
}

/// What is to be done now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Send a ping.
    Ping,
    /// Nobody should rely on the relay, until something comes.
    Doubt,
    /// Users should know that the relay is doubted.
    Tell,
    /// The relay is gone: it was silent for so long.
    GiveUp(Duration),
}

impl Pulse {
    /// A packet is sent by the relay.
    pub(super) fn note_sent(&mut self, now: Instant) {
        if self.asked.is_none() {
            self.ping_at.get_or_insert(now + QUIET);
        }
    }

    /// Packets came by the relay.
    pub(super) fn note_carried(&mut self, now: Instant) {
        self.ping_at = Some(now + QUIET);
    }

    /// Something came from the relay. Returns whether it was doubted.
    pub(super) fn note_heard(&mut self) -> bool {
        if self.asked.take().is_some() {
            self.ping_at = None;
        }
        self.end_doubt()
    }

    /// The socket was full and takes more: the answer is waited for anew. Returns whether the relay was doubted.
    pub(super) fn note_taken(&mut self, now: Instant) -> bool {
        if let Some(asked) = &mut self.asked {
            *asked = Asked::new(now, PATIENCE);
        }
        self.end_doubt()
    }

    fn end_doubt(&mut self) -> bool {
        self.told = false;
        std::mem::take(&mut self.doubted)
    }

    /// The way to the relay may be another: it is asked at once. One that was full has more time. A question without an
    /// answer stays open: networks that come and go all the time keep no dead relay.
    pub(super) fn note_moved(&mut self, full: bool, now: Instant) {
        self.ping_at = Some(now);
        let new = Asked::new(now, if full { PATIENCE } else { ANSWER });
        let asked = self.asked.get_or_insert(new);
        asked.ends_at = asked.ends_at.min(new.ends_at);
    }

    /// When [`due`](Self::due) may have something.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let asked = self.asked.as_ref().map(|asked| match (self.doubted, self.told) {
            (false, _) => asked.ends_at.min(asked.since + ANSWER),
            (true, false) => asked.ends_at.min(asked.since + LASTS),
            (true, true) => asked.ends_at,
        });
        [self.ping_at, asked].into_iter().flatten().min()
    }

    /// What is due; to be asked until it says nothing.
    pub(super) fn due(&mut self, now: Instant) -> Option<Due> {
        if self.ping_at.take_if(|at| *at <= now).is_some() {
            self.asked.get_or_insert(Asked::new(now, PATIENCE));
            return Some(Due::Ping);
        }
        let Asked { since, ends_at } = self.asked?;
        if ends_at <= now {
            return Some(Due::GiveUp(ends_at - since));
        }
        let doubts = since + ANSWER <= now && !self.doubted;
        self.doubted |= doubts;
        if doubts {
            return Some(Due::Doubt);
        }
        let tells = self.doubted && since + LASTS <= now && !self.told;
        self.told |= tells;
        tells.then_some(Due::Tell)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_relay_is_asked_doubted_told_of_and_given_up() {
        let start = Instant::now();
        let mut pulse = Pulse::default();
        pulse.note_sent(start);
        for (second, due) in [(2, Due::Ping), (5, Due::Doubt), (10, Due::Tell), (17, Due::GiveUp(PATIENCE))] {
            let now = start + Duration::from_secs(second);
            assert_eq!((pulse.deadline(), pulse.due(now)), (Some(now), Some(due)));
            assert!(second == 17 || pulse.due(now).is_none(), "once");
        }
    }
}
