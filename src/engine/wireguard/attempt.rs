//! A handshake that we have begun: when it is repeated, and what ends it.
//!
//! A peer that has not heard of us yet drops the first initiation, and may know us a moment later: the first
//! [`EAGER`] seconds it gets one each quarter second, so that it is met at most that long after it knows our key.
//! A responder forgets the session of an initiation as soon as the next one arrives, so only the answer to the newest
//! initiation makes a session; that to an older one says how long the newest one's takes, and is waited for.

use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use rand::Rng;
use rand::rngs::StdRng;

/// How long a handshake without session is repeated each [`EAGER_PAUSE`]: control tells peers of a new node within
/// that time. 20 to 25 datagrams of 148 bytes.
const EAGER: Duration = Duration::from_secs(5);
/// The longest pause meanwhile.
const EAGER_PAUSE: Duration = Duration::from_millis(250);
/// The first pause where a session still serves.
const CALM_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause. Source: the WireGuard paper, section 6.1, Rekey-Timeout, is 5 s.
const PAUSE_MOST: Duration = Duration::from_secs(4);
/// When a handshake is given up. Source: the same, Rekey-Attempt-Time.
const GIVE_UP: Duration = Duration::from_secs(90);
/// How much of a pause chance may take away: two nodes that begin together do not march in step.
const JITTER: f64 = 0.2;
/// How many initiations of a handshake are waited for longer than their pause. An answer to an older one may be forged
/// by whoever knows our public key, so that many pauses of [`PAUSE_MOST`] are what a forger can cost us.
const WAITS: u8 = 2;

/// Why a handshake is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// There is no session.
    First,
    /// The peer is not heard: any sign of life ends the doubt.
    Doubt,
    /// The session is old: only another one will do.
    Age,
    /// The peer may have forgotten the session: only another one will do, and soon.
    Anew,
}

/// The handshake.
pub(super) struct Attempt {
    tunn: Box<Tunn>,
    pub(super) generation: u32,
    pub(super) purpose: Purpose,
    pub(super) started: Instant,
    pub(super) retry_at: Instant,
    /// There was no way to send the newest initiation.
    pub(super) stuck: bool,
    pause: Duration,
    /// Initiations that may still be waited for longer.
    waits: u8,
    /// Whether the newest one is.
    waiting: bool,
    /// The receiver index that each initiation's answer carries, and when it was sent.
    sent: Vec<(u32, Instant)>,
}

impl Attempt {
    /// A handshake whose first initiation is to be made at once, in a `Tunn` of its own.
    pub(super) fn new(tunn: Box<Tunn>, generation: u32, purpose: Purpose, now: Instant) -> Self {
        let pause = if purpose == Purpose::Age { CALM_PAUSE } else { EAGER_PAUSE };
        Self {
            tunn,
            generation,
            purpose,
            started: now,
            retry_at: now,
            stuck: false,
            pause,
            waits: WAITS,
            waiting: false,
            sent: Vec::new(),
        }
    }

    /// The next initiation.
    pub(super) fn initiate(&mut self, rng: &mut StdRng, message: &mut [u8], now: Instant) -> Option<Vec<u8>> {
        let TunnResult::WriteToNetwork(initiation) = self.tunn.format_handshake_initiation(message, true) else {
            return None;
        };
        let index = initiation.get(4..8)?.first_chunk().copied().map(u32::from_le_bytes)?;
        self.sent.push((index, now));
        (self.stuck, self.waiting) = (false, false);
        let eager = self.purpose != Purpose::Age && now.duration_since(self.started) < EAGER;
        self.retry_at = now + self.pause.mul_f64(1.0 - rng.random_range(0.0..JITTER));
        if !eager {
            self.pause = (self.pause * 2).min(PAUSE_MOST);
        }
        Some(initiation.to_vec())
    }

    /// A session is not old but in doubt: the same handshake has to be quick now.
    pub(super) fn doubt(&mut self, now: Instant) {
        if self.purpose == Purpose::Age {
            (self.purpose, self.started, self.retry_at, self.pause) = (Purpose::Doubt, now, now, EAGER_PAUSE);
        }
    }

    /// Only another session will do: the same handshake has to be made whatever is heard meanwhile, and at once.
    pub(super) fn insist(&mut self, now: Instant) {
        (self.purpose, self.started, self.retry_at, self.pause) = (Purpose::Anew, now, now, EAGER_PAUSE);
    }

    /// It has a way now, or is lost: as if it began.
    pub(super) fn hurry(&mut self, now: Instant) {
        (self.retry_at, self.pause) = (now, EAGER_PAUSE);
    }

    pub(super) fn is_hopeless(&self, now: Instant) -> bool {
        now.duration_since(self.started) >= GIVE_UP
    }

    pub(super) fn is_newest(&self, index: u32) -> bool {
        self.sent.last().is_some_and(|(newest, _)| *newest == index)
    }

    /// An answer to an older initiation, as far as can be told: a `Tunn` opens those to its newest two only.
    pub(super) fn note_old_answer(&mut self, index: u32, now: Instant) {
        let (Some((_, at)), Some((_, newest))) = (self.sent.iter().find(|(it, _)| *it == index), self.sent.last())
        else {
            return;
        };
        if self.waiting || self.waits == 0 {
            return;
        }
        (self.waiting, self.waits) = (true, self.waits - 1);
        let round_trip = now.duration_since(*at);
        let patience = (round_trip + round_trip / 2).min(PAUSE_MOST);
        self.retry_at = self.retry_at.max(*newest + patience);
    }

    /// The `Tunn` of the handshake.
    pub(super) fn tunn(&mut self) -> &mut Tunn {
        &mut self.tunn
    }

    /// It has become a session: of this `Tunn`, asked for at this time.
    pub(super) fn into_session(self, now: Instant) -> (Box<Tunn>, Instant) {
        (self.tunn, self.sent.last().map_or(now, |(_, at)| *at))
    }
}
