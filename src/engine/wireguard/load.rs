//! How many handshake messages are answered, and which must first prove their source address by a cookie.
//!
//! boringtun's `RateLimiter` counts by the clock. So there are two, one that never demands cookies and one that always
//! does, and which one is asked is decided here, in the engine's time. By DERP there is no source address that a
//! cookie could prove, so under load those are dropped.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, TunnResult};
use boringtun::x25519::PublicKey;

use super::receive::reason;
use crate::engine::stats::Dropped;

/// Handshake messages a second before cookies are demanded: opening one costs about 0.2 ms.
const MOST_A_SECOND: u32 = 100;
/// What is counted together.
const WINDOW: Duration = Duration::from_secs(1);

/// What a handshake message is worth.
pub(super) enum Verdict<'a> {
    /// To be opened.
    Proven(Packet<'a>),
    /// To be answered by a cookie of this length.
    Cookie(usize),
    /// To be dropped.
    Dropped(Dropped),
}

/// The counters.
pub(super) struct Load {
    calm: Arc<RateLimiter>,
    strict: RateLimiter,
    since: Instant,
    count: u32,
}

impl Load {
    pub(super) fn new(public: &PublicKey, now: Instant) -> Self {
        let calm = Arc::new(RateLimiter::new(public, u64::MAX));
        Self { calm, strict: RateLimiter::new(public, 0), since: now, count: 0 }
    }

    /// The limiter of tunnels: what comes there has been judged here.
    pub(super) fn calm(&self) -> Arc<RateLimiter> {
        self.calm.clone()
    }

    /// Judges a handshake message; a cookie is written to `reply`.
    pub(super) fn judge<'a>(
        &mut self,
        source: Option<IpAddr>,
        message: &'a [u8],
        reply: &mut [u8],
        now: Instant,
    ) -> Verdict<'a> {
        if now.duration_since(self.since) >= WINDOW {
            (self.since, self.count) = (now, 0);
        }
        self.count = self.count.saturating_add(1);
        let limiter = if self.count > MOST_A_SECOND { &self.strict } else { &*self.calm };
        let verdict = limiter.verify_packet(source, message, reply);
        match verdict {
            Ok(packet) => Verdict::Proven(packet),
            Err(TunnResult::WriteToNetwork(cookie)) => Verdict::Cookie(cookie.len()),
            Err(TunnResult::Err(error)) => Verdict::Dropped(reason(&error)),
            Err(_) => Verdict::Dropped(Dropped::Malformed),
        }
    }
}
