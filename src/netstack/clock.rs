//! The time that smoltcp is told: what passes while this process runs.
//!
//! A process that is stopped, or whose container is frozen, cannot be heard nor hear, while the machine's clocks go on:
//! by them every peer would have been silent for so long. (In a machine that sleeps they stand still.)

use std::time::{Duration, Instant};

/// What was due, and is so late, was due while nothing ran here.
const STOOD_STILL: Duration = Duration::from_secs(1);

/// smoltcp's clock.
pub(super) struct Clock {
    /// When it began, and all pauses later.
    epoch: Instant,
    /// When it was last looked at for pauses.
    latest: Instant,
}

impl Clock {
    pub(super) fn new(now: Instant) -> Self {
        Self { epoch: now, latest: now }
    }

    /// What it shows.
    pub(super) fn at(&self, now: Instant) -> smoltcp::time::Instant {
        let micros = i64::try_from(now.saturating_duration_since(self.epoch).as_micros()).unwrap_or(i64::MAX);
        smoltcp::time::Instant::from_micros(micros)
    }

    /// When it will show that.
    pub(super) fn when(&self, at: smoltcp::time::Instant) -> Instant {
        self.epoch + Duration::from_micros(u64::try_from(at.total_micros()).unwrap_or(0))
    }

    /// Leaves out a time in which nothing ran, if what was `due` is late for that. Whether it did.
    pub(super) fn skip_pause(&mut self, due: Option<Instant>, now: Instant) -> bool {
        let since = due.map(|due| due.max(self.latest));
        self.latest = self.latest.max(now);
        let late = since.map(|since| now.saturating_duration_since(since)).unwrap_or_default();
        let paused = late >= STOOD_STILL;
        if paused {
            self.epoch += late;
        }
        paused
    }
}

#[cfg(test)]
mod tests {
    use smoltcp::socket::tcp;

    use super::super::tests::World;
    use super::*;

    #[test]
    fn connections_outlive_a_pause_in_which_nothing_ran() {
        for hours in [1, 24] {
            let mut world = World::new(0);
            let id = world.connect();
            world.run(Duration::from_secs(10));
            // Something is on its way when everything stops.
            world.stack.with_tcp(id, |socket| socket.send_slice(b"before")).unwrap().unwrap();
            world.stack.touch(id);
            world.loss = 1;
            world.run(Duration::from_millis(50));
            world.loss = 0;
            world.now += Duration::from_secs(3_600 * hours);
            world.run(Duration::from_secs(2));
            assert_eq!(world.stack.with_tcp(id, |socket| socket.state()), Some(tcp::State::Established));
            assert_eq!(world.carry(id, b" and after"), b"before and after");
        }
    }

    #[test]
    fn a_peer_that_is_gone_after_a_pause_is_still_noticed() {
        let mut world = World::new(0);
        let id = world.connect();
        world.loss = 1;
        world.now += Duration::from_secs(3_600);
        world.run(Duration::from_secs(300));
        assert_ne!(world.stack.with_tcp(id, |socket| socket.state()), Some(tcp::State::Established));
    }
}
