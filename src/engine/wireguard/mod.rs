//! WireGuard: one boringtun `Tunn` for each peer that is in use, and everything that is peculiar about boringtun.
//!
//! - `Tunn` queues packets while it has no session, but flushes that queue only where it initiated. So packets are
//!   staged here, and `encapsulate` is called with a session only.
//! - It repeats an unanswered initiation after 5 s; here the first handshake is repeated after 250 ms, then ever later.
//!   A responder forgets the session of an initiation as soon as the next one arrives, so the answer to an initiation
//!   that has a successor is no session to send on: the successor's answer is.
//! - It reads the clock itself: its timers need a call a quarter second, and virtual time does not reach them.
//! - It panics when a buffer is short: [`SCRATCH_LENGTH`] and the writers' room are sized for its worst case.
//! - A receiver index is the slot in the upper 24 bits and the session in the lower 8.
//! - Handshakes share one `RateLimiter`. By DERP there is no source address that a cookie could prove, so under load
//!   those are dropped.

mod receive;
mod staged;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

pub(super) use self::receive::Received;
use super::roster::Slot;
use crate::key::{NodePrivate, NodePublic};

/// What encryption adds to an inner packet: header, counter and tag. boringtun does not pad.
pub(super) const OVERHEAD: usize = 32;
/// A buffer that holds whatever boringtun may write: a datagram of DERP is 64 KiB at most.
pub(super) const SCRATCH_LENGTH: usize = 65_536 + 256;
/// How often the timers of tunnels are looked at; a random tenth less, so that peers' keepalives do not march in step.
const TICK: Duration = Duration::from_millis(250);
/// When an initiation is repeated first; twice as long each time.
const RETRY_FIRST: Duration = Duration::from_millis(250);
/// How late it is repeated at most. Below boringtun's 5 s, so that boringtun never repeats one of these itself.
const RETRY_MOST: Duration = Duration::from_secs(4);
/// When a handshake is given up. Source: the WireGuard paper, section 6.1, Rekey-Attempt-Time.
const ATTEMPT: Duration = Duration::from_secs(90);
/// A tunnel without session and without anything to do is kept that long for the peer's confirmation.
const IDLE: Duration = Duration::from_secs(15);
/// Handshake messages a second before cookies are demanded; each initiation is counted twice.
const HANDSHAKES_A_SECOND: u64 = 200;

/// A first handshake that waits for its answer.
#[derive(Debug)]
struct Attempt {
    started: Instant,
    retry_at: Instant,
    retry_in: Duration,
    /// The receiver index that the answer to the newest initiation carries.
    newest: u32,
    /// There was no way to send the newest initiation.
    stuck: bool,
}

/// An active peer's tunnel.
struct Tunnel {
    tunn: Tunn,
    /// Whether there is a session that the peer is known to hold too.
    usable: bool,
    attempt: Option<Attempt>,
    /// When a handshake message last went out or anything authentic came in.
    touched: Instant,
}

/// What is remembered of a peer whether or not it has a tunnel.
#[derive(Default)]
struct Place {
    tunnel: Option<Box<Tunnel>>,
    staged: VecDeque<(Instant, Vec<u8>)>,
    counters: Counters,
    /// When the first packet went out after which nothing authentic has come in.
    unheard_since: Option<Instant>,
    /// When something authentic last came in.
    heard: Option<Instant>,
}

/// A peer's numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) handshakes_sent: u64,
    pub(super) last_handshake: Option<Instant>,
    pub(super) sent_bytes: u64,
    pub(super) received_bytes: u64,
}

/// All tunnels, by the peer's slot.
pub(super) struct WireGuard {
    private: StaticSecret,
    public: PublicKey,
    limiter: Arc<RateLimiter>,
    limiter_reset: Instant,
    places: Vec<Place>,
    active: BTreeSet<Slot>,
    rng: StdRng,
    tick_at: Option<Instant>,
    /// No retry is due before.
    retry_at: Option<Instant>,
    outbox: VecDeque<(Slot, Vec<u8>)>,
    established: VecDeque<Slot>,
    staged_dropped: u64,
    message: Box<[u8; 256]>,
}

impl WireGuard {
    pub(super) fn new(key: &NodePrivate, seed: [u8; 32], now: Instant) -> Self {
        let private = StaticSecret::from(*key.as_bytes());
        let public = PublicKey::from(&private);
        Self {
            limiter: Arc::new(RateLimiter::new(&public, HANDSHAKES_A_SECOND)),
            limiter_reset: now,
            private,
            public,
            places: Vec::new(),
            active: BTreeSet::new(),
            rng: StdRng::from_seed(seed),
            tick_at: None,
            retry_at: None,
            outbox: VecDeque::new(),
            established: VecDeque::new(),
            staged_dropped: 0,
            message: Box::new([0; 256]),
        }
    }

    /// Ends all tunnels: new ones are made with this key. Returns the peers whose tunnels were in use.
    pub(super) fn set_key(&mut self, key: &NodePrivate, now: Instant) -> Vec<Slot> {
        self.private = StaticSecret::from(*key.as_bytes());
        self.public = PublicKey::from(&self.private);
        self.limiter = Arc::new(RateLimiter::new(&self.public, HANDSHAKES_A_SECOND));
        self.limiter_reset = now;
        for place in &mut self.places {
            place.tunnel = None;
        }
        (self.tick_at, self.retry_at) = (None, None);
        self.outbox.clear();
        self.established.clear();
        std::mem::take(&mut self.active).into_iter().collect()
    }

    /// Forgets a peer.
    pub(super) fn remove(&mut self, slot: Slot) {
        if let Some(place) = self.places.get_mut(slot) {
            self.staged_dropped += place.staged.len() as u64;
            *place = Place::default();
        }
        self.active.remove(&slot);
    }

    /// The peer has forgotten its sessions: ours goes, and if it was in use, a new one is made at once.
    pub(super) fn restart(&mut self, slot: Slot, key: &NodePublic, now: Instant) {
        let in_use = self.is_usable(slot);
        if let Some(place) = self.places.get_mut(slot) {
            place.tunnel = None;
            place.unheard_since = None;
        }
        self.active.remove(&slot);
        if in_use {
            self.initiate(slot, key, now);
        }
    }

    /// Whether [`encrypt`](Self::encrypt) may be called.
    pub(super) fn is_usable(&self, slot: Slot) -> bool {
        self.places.get(slot).and_then(|place| place.tunnel.as_ref()).is_some_and(|tunnel| tunnel.usable)
    }

    /// The peers to whom there is a session.
    pub(super) fn usable(&self) -> impl Iterator<Item = Slot> + use<'_> {
        self.active.iter().copied().filter(|slot| self.is_usable(*slot))
    }

    /// Encrypts into `room`, which has [`OVERHEAD`] bytes more than the packet and 148 at least. False when there is no
    /// session.
    pub(super) fn encrypt(&mut self, slot: Slot, packet: &[u8], room: &mut [u8], now: Instant) -> bool {
        let Some(place) = self.places.get_mut(slot) else {
            return false;
        };
        let Some(tunnel) = place.tunnel.as_mut().filter(|tunnel| tunnel.usable) else {
            return false;
        };
        assert!(room.len() >= (packet.len() + OVERHEAD).max(148), "the batch reserves room for boringtun's worst case");
        place.counters.sent_bytes += packet.len() as u64;
        place.unheard_since.get_or_insert(now);
        matches!(tunnel.tunn.encapsulate(packet, room), TunnResult::WriteToNetwork(_))
    }

    /// Starts a handshake unless there is a session or a handshake under way.
    pub(super) fn initiate(&mut self, slot: Slot, key: &NodePublic, now: Instant) {
        if !self.tunnel(slot, key, now).usable {
            self.renew(slot, key, now);
        }
    }

    /// Starts a handshake unless one is under way; a session that there is stays in use.
    pub(super) fn renew(&mut self, slot: Slot, key: &NodePublic, now: Instant) {
        let tunnel = self.tunnel(slot, key, now);
        if tunnel.attempt.is_some() {
            return;
        }
        tunnel.attempt = Some(Attempt { started: now, retry_at: now, retry_in: RETRY_FIRST, newest: 0, stuck: false });
        self.send_initiation(slot, now);
    }

    /// The initiation could not be sent: no way leads to the peer yet.
    pub(super) fn note_stuck(&mut self, slot: Slot) {
        if let Some(attempt) = self.attempt(slot) {
            attempt.stuck = true;
        }
    }

    /// A path to the peer has come up: an initiation that had none need not wait longer. One that is on its way
    /// already is not repeated, since two peers that both do so lose each other's answers.
    pub(super) fn hurry(&mut self, slot: Slot, now: Instant) {
        if let Some(attempt) = self.attempt(slot).filter(|attempt| attempt.stuck) {
            attempt.retry_in = RETRY_FIRST;
            self.send_initiation(slot, now);
        }
    }

    /// Peers whose session has become usable since the last call.
    pub(super) fn poll_established(&mut self) -> Option<Slot> {
        self.established.pop_front()
    }

    /// Handshake messages and keepalives to send.
    pub(super) fn poll_message(&mut self) -> Option<(Slot, Vec<u8>)> {
        self.outbox.pop_front()
    }

    /// Since when a handshake has been waiting for its answer.
    pub(super) fn asking_since(&self, slot: Slot) -> Option<Instant> {
        Some(self.places.get(slot)?.tunnel.as_ref()?.attempt.as_ref()?.started)
    }

    /// When the first packet went out after which nothing authentic has come in.
    pub(super) fn unheard_since(&self, slot: Slot) -> Option<Instant> {
        self.places.get(slot)?.unheard_since
    }

    /// When something authentic last came in.
    pub(super) fn heard(&self, slot: Slot) -> Option<Instant> {
        self.places.get(slot)?.heard
    }

    /// Whether anything authentic has come from anybody after `since`.
    pub(super) fn is_anybody_heard_since(&self, since: Instant) -> bool {
        self.places.iter().any(|place| place.heard.is_some_and(|heard| heard > since))
    }

    pub(super) fn counters(&self, slot: Slot) -> Counters {
        self.places.get(slot).map(|place| place.counters).unwrap_or_default()
    }

    /// Whether it was time to look at the tunnels.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> bool {
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry(now);
        }
        let ticks = self.tick_at.is_some_and(|at| at <= now);
        if ticks {
            self.reset_limiter(now);
            let slots: Vec<Slot> = self.active.iter().copied().collect();
            slots.into_iter().for_each(|slot| self.tick(slot, now));
            self.tick_at = (!self.active.is_empty()).then(|| now + self.jittered_tick());
        }
        ticks
    }

    pub(super) fn next_deadline(&self) -> Option<(Instant, &'static str)> {
        let tick = self.tick_at.map(|at| (at, "wireguard timers"));
        let retry = self.retry_at.map(|at| (at, "handshake retry"));
        tick.into_iter().chain(retry).min_by_key(|(at, _)| *at)
    }

    /// The peer's tunnel, made if there is none.
    fn tunnel(&mut self, slot: Slot, key: &NodePublic, now: Instant) -> &mut Tunnel {
        if self.places.len() <= slot {
            self.places.resize_with(slot + 1, Place::default);
        }
        self.active.insert(slot);
        if self.tick_at.is_none() {
            self.tick_at = Some(now + self.jittered_tick());
        }
        self.places[slot].tunnel.get_or_insert_with(|| {
            let theirs = PublicKey::from(*key.as_bytes());
            let tunn = Tunn::new(self.private.clone(), theirs, None, None, slot as u32, Some(self.limiter.clone()));
            Box::new(Tunnel { tunn, usable: false, attempt: None, touched: now })
        })
    }

    fn attempt(&mut self, slot: Slot) -> Option<&mut Attempt> {
        self.places.get_mut(slot)?.tunnel.as_mut()?.attempt.as_mut()
    }

    fn send_initiation(&mut self, slot: Slot, now: Instant) {
        let place = &mut self.places[slot];
        let Some(tunnel) = place.tunnel.as_mut() else {
            return;
        };
        let TunnResult::WriteToNetwork(initiation) =
            tunnel.tunn.format_handshake_initiation(&mut self.message[..], true)
        else {
            return;
        };
        if let (Some(attempt), Some(index)) = (tunnel.attempt.as_mut(), sender_index(initiation)) {
            attempt.newest = index;
            attempt.stuck = false;
            attempt.retry_at = now + attempt.retry_in;
            attempt.retry_in = (attempt.retry_in * 2).min(RETRY_MOST);
            self.retry_at = Some(self.retry_at.map_or(attempt.retry_at, |at| at.min(attempt.retry_at)));
        }
        tunnel.touched = now;
        place.counters.handshakes_sent += 1;
        self.outbox.push_back((slot, initiation.to_vec()));
    }

    /// Repeats the first handshakes that are due, and finds out when the next one is.
    fn retry(&mut self, now: Instant) {
        self.retry_at = None;
        let mut due = Vec::new();
        for slot in self.active.iter().copied() {
            let Some(attempt) = self.places[slot].tunnel.as_ref().and_then(|tunnel| tunnel.attempt.as_ref()) else {
                continue;
            };
            if attempt.retry_at <= now {
                due.push((slot, now.duration_since(attempt.started) >= ATTEMPT));
            } else {
                self.retry_at = Some(self.retry_at.map_or(attempt.retry_at, |at| at.min(attempt.retry_at)));
            }
        }
        for (slot, hopeless) in due {
            if hopeless { self.drop_tunnel(slot) } else { self.send_initiation(slot, now) }
        }
    }

    fn tick(&mut self, slot: Slot, now: Instant) {
        let place = &mut self.places[slot];
        let Some(tunnel) = place.tunnel.as_mut() else {
            return;
        };
        match tunnel.tunn.update_timers(&mut self.message[..]) {
            TunnResult::WriteToNetwork(message) => {
                tunnel.touched = now;
                if message.first() == Some(&1) {
                    place.counters.handshakes_sent += 1;
                }
                self.outbox.push_back((slot, message.to_vec()));
            }
            TunnResult::Err(WireGuardError::ConnectionExpired) => return self.drop_tunnel(slot),
            TunnResult::Err(_)
            | TunnResult::Done
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => {}
        }
        tunnel.usable = tunnel.usable && tunnel.tunn.time_since_last_handshake().is_some();
        if !tunnel.usable && tunnel.attempt.is_none() && now.duration_since(tunnel.touched) >= IDLE {
            self.drop_tunnel(slot);
        }
    }

    /// Ends a tunnel but keeps what is known of the peer.
    fn drop_tunnel(&mut self, slot: Slot) {
        let place = &mut self.places[slot];
        place.tunnel = None;
        place.unheard_since = None;
        self.staged_dropped += place.staged.drain(..).count() as u64;
        self.active.remove(&slot);
    }

    fn jittered_tick(&mut self) -> Duration {
        TICK - TICK.mul_f64(self.rng.random_range(0.0..0.1))
    }

    fn reset_limiter(&mut self, now: Instant) {
        if now.duration_since(self.limiter_reset) >= Duration::from_secs(1) {
            self.limiter_reset = now;
            self.limiter.reset_count();
        }
    }
}

/// The index by which the answer to an initiation will name us.
fn sender_index(initiation: &[u8]) -> Option<u32> {
    initiation.get(4..8)?.first_chunk().copied().map(u32::from_le_bytes)
}
