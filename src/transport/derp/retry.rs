//! When a region that was lost is tried again: nearly at once, then at growing intervals, or as the relay wishes.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::DerpError;
use crate::transport::backoff::Backoff;
use crate::transport::link::News;

/// A connection that ends sooner was none: who is turned away after each admission must not come back at once for ever.
const STEADY: Duration = Duration::from_secs(10);
/// The most that a relay's wishes are heeded: what it asks for is meant to be seconds.
/// Source: Tailscale, derp, `ServerRestartingMessage`.
const WISH_LIMIT: Duration = Duration::from_secs(30);
/// Between tries while a relay restarts that has asked to be tried.
const EAGER: Duration = Duration::from_millis(250);

/// The pauses between a region's connections.
pub(super) struct Retry {
    backoff: Backoff,
    eager: Backoff,
    /// Until when the relay is to be tried, once it is back.
    eager_until: Option<Instant>,
    /// When the relay wants us back.
    reconnect_in: Option<Duration>,
}

impl Retry {
    pub(super) fn new() -> Self {
        let backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
        Self { backoff, eager: Backoff::new(EAGER, EAGER), eager_until: None, reconnect_in: None }
    }

    /// A connection could not be made, or has ended after so long.
    pub(super) fn note_loss(&mut self, error: &DerpError, lived: Duration) {
        if lived >= STEADY {
            self.backoff.reset();
        }
        if let DerpError::Restarting { reconnect_in, try_for, .. } = error {
            let reconnect_in = (*reconnect_in).min(WISH_LIMIT);
            self.reconnect_in = Some(reconnect_in);
            self.eager_until = Some(Instant::now() + reconnect_in + (*try_for).min(WISH_LIMIT));
        }
    }

    /// Waits until the next try is due. On another network the tries begin anew, unless it is the relay that wishes
    /// for the pause.
    pub(super) async fn pause(&mut self, link: &mut News) {
        let wished = self.reconnect_in.is_some();
        tokio::select! {
            () = sleep(self.next_delay()) => {}
            () = link.moved(), if !wished => {
                self.backoff.reset();
                sleep(self.next_delay()).await;
            }
        }
    }

    /// How long to wait now.
    fn next_delay(&mut self) -> Duration {
        if let Some(wish) = self.reconnect_in.take() {
            // A relay that names no time still restarts with everybody else's connections lost at the same moment.
            return wish.max(self.backoff.next_delay());
        }
        match self.eager_until {
            Some(until) if Instant::now() < until => self.eager.next_delay(),
            _ => self.backoff.next_delay(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::link::Link;

    fn closed() -> DerpError {
        DerpError::Closed { host: "relay".to_owned(), detail: "closed".to_owned() }
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_turned_away_after_each_admission_comes_back_ever_more_rarely() {
        let mut retry = Retry::new();
        let mut tries = 0;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(60) {
            retry.note_loss(&closed(), Duration::from_secs(1));
            sleep(retry.next_delay()).await;
            tries += 1;
        }
        assert!((8..=20).contains(&tries), "{tries} tries in a minute");
        retry.note_loss(&closed(), STEADY);
        assert!(retry.next_delay() <= Duration::from_millis(100));
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_that_restarts_is_tried_when_and_for_as_long_as_it_wishes() {
        let mut retry = Retry::new();
        let (reconnect_in, try_for) = (Duration::from_secs(3), Duration::from_secs(2));
        let restarts = DerpError::Restarting { host: "relay".to_owned(), reconnect_in, try_for };
        retry.note_loss(&restarts, Duration::from_secs(60));
        assert_eq!(retry.next_delay(), reconnect_in);
        sleep(reconnect_in).await;
        let start = Instant::now();
        let mut tries = 0;
        while start.elapsed() < try_for {
            retry.note_loss(&closed(), Duration::ZERO);
            let delay = retry.next_delay();
            assert!((EAGER..=2 * EAGER).contains(&delay), "{delay:?}");
            sleep(delay).await;
            tries += 1;
        }
        assert!(tries >= 4, "{tries}");
        let later = (0..10).map(|_| retry.next_delay()).last().unwrap();
        assert!(later >= Duration::from_secs(5), "{later:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn another_network_shortens_a_pause_to_the_first_but_not_a_relays_wish() {
        let (mut retry, (link, move_once)) = (Retry::new(), Link::moving());
        let paused = async |retry: &mut Retry| {
            let (mut news, start) = (link.news(), Instant::now());
            move_once();
            retry.pause(&mut news).await;
            start.elapsed()
        };
        while retry.next_delay() < Duration::from_secs(5) {}
        let first = Duration::from_millis(50)..Duration::from_millis(110);
        assert!(first.contains(&paused(&mut retry).await));
        let (reconnect_in, try_for) = (Duration::from_secs(3), Duration::from_secs(2));
        let restarts = DerpError::Restarting { host: "relay".to_owned(), reconnect_in, try_for };
        retry.note_loss(&restarts, Duration::ZERO);
        assert!(paused(&mut retry).await >= reconnect_in);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wish_for_hours_is_not_heeded() {
        let mut retry = Retry::new();
        let (reconnect_in, try_for) = (Duration::from_secs(4_000_000), Duration::from_secs(4_000_000));
        let restarts = DerpError::Restarting { host: "relay".to_owned(), reconnect_in, try_for };
        retry.note_loss(&restarts, Duration::ZERO);
        assert_eq!(retry.next_delay(), WISH_LIMIT);
    }
}
