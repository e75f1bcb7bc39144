//! How long to wait between tries: growing, capped, jittered so that many runs do not come back at once.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// The pauses of one loop of tries.
pub struct Backoff {
    builder: ExponentialBuilder,
    delays: ExponentialBackoff,
}

impl Backoff {
    /// Pauses that begin at `first` (up to twice as long, by jitter), double, and end at `cap`.
    pub fn new(first: Duration, cap: Duration) -> Self {
        let builder =
            ExponentialBuilder::new().with_min_delay(first).with_max_delay(cap).without_max_times().with_jitter();
        Self { builder, delays: builder.build() }
    }

    /// The next pause.
    pub fn next_delay(&mut self) -> Duration {
        self.delays.next().expect("the pauses have no end")
    }

    /// Begins anew, after a success.
    pub fn reset(&mut self) {
        self.delays = self.builder.build();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_cap_and_begin_anew_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
        let first = backoff.next_delay();
        assert!(first >= Duration::from_millis(100) && first <= Duration::from_millis(200));
        let last = (0..20).map(|_| backoff.next_delay()).last().unwrap();
        assert!(last >= Duration::from_secs(2) && last <= Duration::from_secs(4));
        backoff.reset();
        assert!(backoff.next_delay() <= Duration::from_millis(200));
    }
}
