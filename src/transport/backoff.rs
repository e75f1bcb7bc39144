//! How long to wait between tries: growing, capped, jittered so that many runs do not come back at once.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// The pauses of one loop of tries.
pub struct Backoff {
    builder: ExponentialBuilder,
    delays: ExponentialBackoff,
}

impl Backoff {
    /// Pauses that begin at `first` (up to twice as long, by jitter), double, and end between half of `cap` and `cap`,
    /// which none exceeds. `cap` is twice `first` at least, so that those of equal length have their jitter too.
    pub fn new(first: Duration, cap: Duration) -> Self {
        // The jitter lengthens each by anything up to itself.
        let longest = (cap / 2).max(first);
        let builder =
            ExponentialBuilder::new().with_min_delay(first).with_max_delay(longest).without_max_times().with_jitter();
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
        let (first, cap) = (Duration::from_millis(100), Duration::from_secs(2));
        let mut backoff = Backoff::new(first, cap);
        assert!((first..=2 * first).contains(&backoff.next_delay()));
        let delays: Vec<_> = (0..200).map(|_| backoff.next_delay()).collect();
        assert!(delays.iter().all(|delay| *delay <= cap), "{delays:?}");
        // Not all the same, so that many runs come back at many times.
        let later = &delays[20..];
        assert!(later.iter().all(|delay| *delay >= cap / 2), "{delays:?}");
        assert!(later.iter().max() > later.iter().min().map(|least| *least * 5 / 4).as_ref(), "{delays:?}");
        backoff.reset();
        assert!(backoff.next_delay() <= 2 * first);
    }
}
