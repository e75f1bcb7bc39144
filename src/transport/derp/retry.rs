//! When a region that was lost is tried again: nearly at once, then at growing intervals, or as the relay wishes; but
//! soon where packets wait for a relay that is out of reach.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::DerpError;
use crate::transport::backoff::Backoff;
use crate::transport::error::UnderlayError;
use crate::transport::link::News;

/// A connection that ends sooner was none: who is turned away after each admission must not come back at once for ever.
const STEADY: Duration = Duration::from_secs(10);
/// The most that a relay's wishes are heeded: what it asks for is meant to be seconds.
/// Source: Tailscale, derp, `ServerRestartingMessage`.
const WISH_LIMIT: Duration = Duration::from_secs(30);
/// The first pause, and the longest. Source: the longest is that of Tailscale, wgengine/magicsock, `runDerpReader`.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Between tries while a relay restarts that has asked to be tried.
const EAGER: Duration = Duration::from_millis(250);
/// The same, up to twice as long, while packets wait for a relay that cannot be reached: to be back ten seconds after the
/// network is costs whoever waits for a name all the time that it has. A try costs the relay nothing as long as it fails.
const WANTED: Duration = Duration::from_secs(1);

/// The pauses between a region's connections.
pub(super) struct Retry {
    backoff: Backoff,
    eager: Backoff,
    /// Until when the relay is to be tried, once it is back.
    eager_until: Option<Instant>,
    /// When the relay wants us back.
    reconnect_in: Option<Duration>,
    /// The pauses while packets wait.
    wanted: Backoff,
    /// Whether the relay could not be reached, rather than turned us away.
    out_of_reach: bool,
}

impl Retry {
    pub(super) fn new() -> Self {
        let backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let (eager, wanted) = (Backoff::new(EAGER, 2 * EAGER), Backoff::new(WANTED, 2 * WANTED));
        Self { backoff, eager, eager_until: None, reconnect_in: None, wanted, out_of_reach: false }
    }

    /// A connection could not be made, or has ended after so long.
    pub(super) fn note_loss(&mut self, error: &DerpError, lived: Duration) {
        if lived >= STEADY {
            self.backoff.reset();
        }
        self.out_of_reach = error.is_out_of_reach();
        if let DerpError::Restarting { reconnect_in, try_for, .. } = error {
            let reconnect_in = (*reconnect_in).min(WISH_LIMIT);
            self.reconnect_in = Some(reconnect_in);
            self.eager_until = Some(Instant::now() + reconnect_in + (*try_for).min(WISH_LIMIT));
        }
    }

    /// Waits until the next try is due, of which so much was spent with the last one. On another network the tries begin
    /// anew, unless it is the relay that wishes for the pause. `wanted` ends when packets wait.
    pub(super) async fn pause(&mut self, link: &mut News, spent: Duration, wanted: impl Future<Output = ()>) {
        let wished = self.reconnect_in.is_some();
        let (delay, soon) = (self.next_delay(), self.wanted.next_delay());
        // Packets that are sent into nothing are repeated ever more rarely: a new try after a long one finds a relay
        // sooner that is back.
        let left = if wished { delay } else { delay.saturating_sub(spent).max(FIRST_PAUSE) };
        tokio::select! {
            () = sleep(left) => {}
            _ = async { tokio::join!(wanted, sleep(soon)) }, if !wished && self.out_of_reach => {}
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

impl DerpError {
    /// Whether nothing of the relay's answered, or no longer does.
    pub(super) fn is_out_of_reach(&self) -> bool {
        match self {
            DerpError::Underlay(
                UnderlayError::Resolve { .. } | UnderlayError::Connect { .. } | UnderlayError::ProxyUnreached { .. },
            )
            | DerpError::Silent { .. } => true,
            // A load balancer that ends each connection has an answer too, as has a proxy that refuses.
            DerpError::Underlay(
                UnderlayError::Ended { .. } | UnderlayError::Tls { .. } | UnderlayError::Proxy { .. },
            )
            | DerpError::Upgrade { .. }
            | DerpError::Protocol { .. }
            | DerpError::Closed { .. }
            | DerpError::Restarting { .. }
            | DerpError::Empty => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::io;

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
        assert!((15..=25).contains(&tries), "{tries} tries in a minute");
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
        assert!((LONGEST_PAUSE / 2..=LONGEST_PAUSE).contains(&later), "{later:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn another_network_shortens_a_pause_to_the_first_but_not_a_relays_wish() {
        let (mut retry, (link, move_once)) = (Retry::new(), Link::moving());
        let paused = async |retry: &mut Retry| {
            let (mut news, start) = (link.news(), Instant::now());
            move_once();
            retry.pause(&mut news, Duration::ZERO, pending()).await;
            start.elapsed()
        };
        while retry.next_delay() < LONGEST_PAUSE / 2 {}
        let first = Duration::from_millis(50)..Duration::from_millis(110);
        assert!(first.contains(&paused(&mut retry).await));
        let (reconnect_in, try_for) = (Duration::from_secs(3), Duration::from_secs(2));
        let restarts = DerpError::Restarting { host: "relay".to_owned(), reconnect_in, try_for };
        retry.note_loss(&restarts, Duration::ZERO);
        assert!(paused(&mut retry).await >= reconnect_in);
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_out_of_reach_is_tried_soon_where_packets_wait_but_not_one_that_turns_us_away() {
        let silent = DerpError::Silent { host: "relay".to_owned(), limit: WANTED };
        let paused = async |error: &DerpError, wanted: bool| {
            let (mut retry, mut news) = (Retry::new(), Link::moving().0.news());
            while retry.next_delay() < LONGEST_PAUSE / 2 {}
            retry.note_loss(error, Duration::ZERO);
            let start = Instant::now();
            let packets = async { if wanted { sleep(WANTED / 2).await } else { pending().await } };
            retry.pause(&mut news, Duration::ZERO, packets).await;
            start.elapsed()
        };
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let host = || "relay".to_owned();
        let proxy = Box::new(UnderlayError::Connect { host: host(), source: refused() });
        let unreached = UnderlayError::ProxyUnreached { proxy: host(), source: proxy }.into();
        for error in [&silent, &unreached] {
            assert!((WANTED..=2 * WANTED).contains(&paused(error, true).await), "{error}");
        }
        let ended = UnderlayError::Ended { host: host(), source: io::ErrorKind::ConnectionReset.into() }.into();
        for (error, wanted) in [(silent, false), (closed(), true), (ended, true)] {
            assert!(paused(&error, wanted).await >= LONGEST_PAUSE / 2, "{error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_try_took_is_no_part_of_the_pause_after_it() {
        let (mut retry, link) = (Retry::new(), Link::default());
        while retry.next_delay() < LONGEST_PAUSE / 2 {}
        for (spent, pauses) in [(10, 50..=51), (2, 500..=3_001), (0, 2_500..=5_001)] {
            let start = Instant::now();
            retry.pause(&mut link.news(), Duration::from_secs(spent), pending()).await;
            assert!(pauses.contains(&start.elapsed().as_millis()), "{:?} after {spent} s", start.elapsed());
        }
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
