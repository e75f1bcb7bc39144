//! How many handshake messages are answered, and which must first prove their source address by a cookie.
//!
//! boringtun's `RateLimiter` counts by the clock. So there are two, one that never demands cookies and one that always
//! does, and which one is asked is decided here, in the engine's time. By DERP there is no source address that a
//! cookie could prove, so under load those are dropped; hence they are counted apart from what comes by UDP, and only
//! those whose mac1 says that the sender knows our public key.

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

/// Handshake messages in the current window.
struct Counter {
    since: Instant,
    count: u32,
}

impl Counter {
    /// Counts one; whether there have been too many.
    fn count(&mut self, now: Instant) -> bool {
        if now.duration_since(self.since) >= WINDOW {
            (self.since, self.count) = (now, 0);
        }
        self.count = self.count.saturating_add(1);
        self.count > MOST_A_SECOND
    }
}

/// The counters.
pub(super) struct Load {
    calm: Arc<RateLimiter>,
    strict: RateLimiter,
    udp: Counter,
    derp: Counter,
}

impl Load {
    pub(super) fn new(public: &PublicKey, now: Instant) -> Self {
        let calm = Arc::new(RateLimiter::new(public, u64::MAX));
        let counter = || Counter { since: now, count: 0 };
        Self { calm, strict: RateLimiter::new(public, 0), udp: counter(), derp: counter() }
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
        let counter = if source.is_some() { &mut self.udp } else { &mut self.derp };
        let mut verdict = self.calm.verify_packet(source, message, reply);
        if verdict.is_ok() && counter.count(now) {
            verdict = self.strict.verify_packet(source, message, reply);
        }
        match verdict {
            Ok(packet) => Verdict::Proven(packet),
            Err(TunnResult::WriteToNetwork(cookie)) => Verdict::Cookie(cookie.len()),
            Err(TunnResult::Err(error)) => Verdict::Dropped(reason(&error)),
            Err(_) => Verdict::Dropped(Dropped::Malformed),
        }
    }
}
