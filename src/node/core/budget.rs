//! How many lines all peers together may have: a relay that fails takes a thousand of them at once.

use std::fmt;
use std::time::{Duration, Instant};

use super::told::{News, Way};

/// Lines that may follow each other at once: more are not read one by one.
const BURST: u32 = 10;
/// How long until one more may.
const REFILL: Duration = Duration::from_secs(10);

/// Lines left, and what those would have said that there was none left for.
#[derive(Debug)]
pub(super) struct Budget {
    left: u32,
    /// When the lines left were counted; before the first, never.
    counted_at: Option<Instant>,
    more: More,
}

/// How many more peers' ways have changed, by what became of them.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct More {
    pub(super) direct: u64,
    pub(super) relayed: u64,
    pub(super) unreachable: u64,
    /// In reach again, having been said not to be.
    pub(super) again: u64,
}

impl More {
    /// Whether a warning is among them, or the end of one.
    pub(super) fn warns(&self) -> bool {
        self.unreachable > 0 || self.again > 0
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self { left: BURST, counted_at: None, more: More::default() }
    }
}

impl Budget {
    /// Whether a line of its own may be said; else it is summed up with others later.
    pub(super) fn may_say(&mut self, news: News, now: Instant) -> bool {
        self.refill(now);
        if self.more == More::default() && self.left > 0 {
            self.left -= 1;
            return true;
        }
        match news {
            News::Way(Way::Direct) => self.more.direct += 1,
            News::Way(Way::Relay) => self.more.relayed += 1,
            News::Way(Way::Nothing) => self.more.unreachable += 1,
            News::Again(_) => self.more.again += 1,
        }
        false
    }

    /// What is to be summed up by now.
    pub(super) fn sum_up(&mut self, now: Instant) -> Option<More> {
        self.refill(now);
        if self.more == More::default() || self.left == 0 {
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.more))
    }

    /// When something is to be summed up.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.counted_at.filter(|_| self.more != More::default()).map(|at| at + REFILL)
    }

    fn refill(&mut self, now: Instant) {
        let counted_at = self.counted_at.get_or_insert(now);
        while self.left < BURST && now >= *counted_at + REFILL {
            self.left += 1;
            *counted_at += REFILL;
        }
        if self.left == BURST {
            *counted_at = now;
        }
    }
}

impl fmt::Display for More {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { direct, relayed, unreachable, again } = self;
        write!(f, "{direct} direct, {relayed} by a relay, {unreachable} out of reach, {again} in reach again")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines of `seconds` in which `peers` have one each second: those of their own, and what the others sum up to.
    fn lines(budget: &mut Budget, start: Instant, seconds: u64, peers: u64) -> (u64, Vec<u64>) {
        let (mut own, mut sums) = (0, Vec::new());
        for now in (0..seconds).map(|second| start + Duration::from_secs(second)) {
            sums.extend(budget.sum_up(now).map(|more| more.unreachable));
            own += (0..peers).map(|_| u64::from(budget.may_say(News::Way(Way::Nothing), now))).sum::<u64>();
            assert!(budget.next_deadline().is_none_or(|at| at > now));
        }
        (own, sums)
    }

    #[test]
    fn thousand_peers_that_fail_at_once_have_ten_lines_and_one_for_the_rest() {
        let (mut budget, now) = (Budget::default(), Instant::now());
        assert_eq!(lines(&mut budget, now, 1, 1_000), (10, vec![]));
        assert_eq!(budget.next_deadline(), Some(now + REFILL));
        assert_eq!(lines(&mut budget, now + REFILL, 60, 0), (0, vec![990]));
        assert_eq!(budget.next_deadline(), None);
    }

    #[test]
    fn peers_that_change_all_the_time_have_a_line_in_ten_seconds_that_counts_them_all() {
        let (own, sums) = lines(&mut Budget::default(), Instant::now(), 3_601, 100);
        assert_eq!((own, sums.len()), (10, 360));
        assert_eq!(own + sums.iter().sum::<u64>(), 360_000);
    }

    #[test]
    fn ends_of_outages_are_summed_up_as_loud_as_those() {
        let (mut budget, now) = (Budget::default(), Instant::now());
        lines(&mut budget, now, 1, 10);
        assert!(!budget.may_say(News::Way(Way::Direct), now));
        assert!(!budget.sum_up(now + REFILL).unwrap().warns());
        assert!(!budget.may_say(News::Again(None), now + REFILL));
        let more = budget.sum_up(now + 2 * REFILL).unwrap();
        assert!(more.warns());
        assert_eq!(more.to_string(), "0 direct, 0 by a relay, 0 out of reach, 1 in reach again");
    }

    #[test]
    fn after_a_quiet_time_each_peer_has_its_line_again() {
        let (mut budget, now) = (Budget::default(), Instant::now());
        lines(&mut budget, now, 1, 1_000);
        assert_eq!(lines(&mut budget, now + Duration::from_secs(600), 1, 0), (0, vec![990]));
        assert_eq!(lines(&mut budget, now + Duration::from_secs(610), 1, 10), (10, vec![]));
    }
}
