//! How fast a relay lets us send, and what of it is used up.

use std::time::Duration;

use serde::Deserialize;
use tokio::time::Instant;

/// What the relay says of its limits, sealed to our key. Source: Tailscale, derp, `ServerInfo`.
#[derive(Debug, Default, Deserialize)]
pub(super) struct ServerInfo {
    #[serde(default, rename = "TokenBucketBytesPerSecond")]
    pub(super) bytes_per_second: u64,
    #[serde(default, rename = "TokenBucketBytesBurst")]
    burst: u64,
}

/// A relay's limits, none until it tells them, and what was sent under them.
#[derive(Debug)]
pub(super) struct Limits {
    info: ServerInfo,
    /// When what was sent counts as paid.
    paid_at: Instant,
}

impl Limits {
    /// Of a relay to which nothing was sent.
    pub(super) fn new(info: ServerInfo, now: Instant) -> Self {
        Self { info, paid_at: now }
    }

    /// So many octets were sent.
    pub(super) fn charge(&mut self, octets: usize, now: Instant) {
        if self.info.bytes_per_second > 0 {
            let seconds = octets as f64 / self.info.bytes_per_second as f64;
            self.paid_at = self.paid_at.max(now) + Duration::from_secs_f64(seconds);
        }
    }

    /// When more may be sent: so much is not yet paid that the burst does not cover it.
    pub(super) fn sends_at(&self, now: Instant) -> Instant {
        let ServerInfo { bytes_per_second, burst } = self.info;
        // Without limits the quotient is no number, and a burst may last longer than any time.
        let saved = Duration::try_from_secs_f64(burst as f64 / bytes_per_second as f64).unwrap_or(Duration::MAX);
        now + self.paid_at.saturating_duration_since(now).saturating_sub(saved)
    }
}
