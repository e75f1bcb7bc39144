//! How long we have not run: the machine was suspended, or this process stopped.
//!
//! `CLOCK_BOOTTIME` goes on while the machine sleeps, unlike the clock that timers go by. Whoever means to look every
//! [`TICK`] and finds that much more has passed has slept, in whichever way.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::{SETTLE_MOST, TICK};

/// Below this a machine is merely busy, and no relay or NAT has lost its patience.
const WORTH_TELLING: Duration = Duration::from_secs(3);

/// When we last looked.
pub(super) struct Clock {
    last: Duration,
}

impl Clock {
    pub(super) fn start() -> Self {
        Self { last: boot_time() }
    }

    /// How long we have not run since the last call, which is due at least every [`TICK`] and [`SETTLE_MOST`].
    pub(super) fn missed(&mut self) -> Option<Duration> {
        self.note(boot_time())
    }

    fn note(&mut self, now: Duration) -> Option<Duration> {
        let passed = now.saturating_sub(std::mem::replace(&mut self.last, now));
        Some(passed.saturating_sub(TICK + SETTLE_MOST)).filter(|missed| *missed >= WORTH_TELLING)
    }
}

/// Since the machine was started, its sleep included.
fn boot_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_look_is_a_sleep_and_a_busy_machine_is_none() {
        let seconds = Duration::from_secs;
        let mut clock = Clock { last: seconds(100) };
        assert_eq!(clock.note(seconds(102)), None);
        assert_eq!(clock.note(seconds(107)), None);
        assert_eq!(clock.note(seconds(113)), Some(seconds(3)));
        assert_eq!(clock.note(seconds(115)), None, "it is told once");
        assert_eq!(clock.note(seconds(115 + 8 * 3600)), Some(seconds(8 * 3600 - 3)));
        assert_eq!(clock.note(seconds(0)), None, "a clock that went back says nothing");
    }

    #[test]
    fn the_boot_clock_goes_on() {
        let before = boot_time();
        assert!(before > Duration::ZERO && boot_time() >= before);
    }
}
