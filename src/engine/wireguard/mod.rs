//! WireGuard: tunnels of boringtun's `Tunn`s, one for each peer that is in use, and everything that is peculiar about
//! boringtun.
//!
//! - It reads the clock itself, for its timers and its rate limiter, so virtual time would not reach them; it calls a
//!   handshake expired that began 90 s after the peer's last one; and it repeats an unanswered one only after 5 s. So
//!   `update_timers` is never called: rekey, expiry, keepalives and repeats are here, in the engine's time, and cost
//!   an idle peer nothing. boringtun's `mock-instant` would freeze the clock of every binary that a test run builds.
//!   What still comes of the clock is a handshake's timestamp.
//! - Without its timers a `Tunn` sends by the session that it last received by: see [`tunnel`].
//! - It queues packets while it has no session, but flushes that queue only where it initiated. So packets are
//!   staged here, and `encapsulate` is called with a session only.
//! - It panics when a buffer is short: [`SCRATCH_LENGTH`] and the writers' room are sized for its worst case.
//! - A receiver index is, from the top, the slot in 21 bits, the handshake's generation in 3, its messages in 8.

mod attempt;
mod initiate;
mod load;
mod receive;
mod staged;
mod tunnel;

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use boringtun::noise::Tunn;
use boringtun::x25519::{PublicKey, StaticSecret};
use rand::SeedableRng;
use rand::rngs::StdRng;

use self::attempt::Purpose;
use self::load::Load;
pub(super) use self::receive::Received;
use self::tunnel::{GENERATIONS, Tunnel};
use super::roster::Slot;
use crate::key::{NodePrivate, NodePublic};

/// What encryption adds to an inner packet: header, counter and tag. boringtun does not pad.
pub(super) const OVERHEAD: usize = 32;
/// A buffer that holds whatever boringtun may write: a datagram of DERP is 64 KiB at most.
pub(super) const SCRATCH_LENGTH: usize = 65_536 + 256;
/// Who has received data and has nothing to send says so after that time. Source: the WireGuard paper, section 6.5,
/// Keepalive-Timeout.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Who has sent data and heard nothing for so long doubts the session: a peer that held it would have sent a keepalive.
/// Source: the same, Keepalive-Timeout and Rekey-Timeout.
const DOUBT: Duration = Duration::from_secs(15);
/// A tunnel without session and without anything to do is kept that long for the peer's confirmation.
const IDLE: Duration = Duration::from_secs(15);

/// What is remembered of a peer whether or not it has a tunnel.
#[derive(Default)]
struct Place {
    tunnel: Option<Box<Tunnel>>,
    staged: VecDeque<(Instant, Vec<u8>)>,
    counters: Counters,
    /// When the first packet went out after which neither data nor an answer has come in.
    unheard_since: Option<Instant>,
    /// When data or an answer last came in.
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
    load: Load,
    places: Vec<Place>,
    active: BTreeSet<Slot>,
    rng: StdRng,
    /// No tunnel has anything to do before.
    wake_at: Option<Instant>,
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
            load: Load::new(&public, now),
            private,
            public,
            places: Vec::new(),
            active: BTreeSet::new(),
            rng: StdRng::from_seed(seed),
            wake_at: None,
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
        self.load = Load::new(&self.public, now);
        for place in &mut self.places {
            place.tunnel = None;
        }
        self.wake_at = None;
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
        self.forget_messages(slot);
    }

    /// The peer has forgotten its sessions: ours goes, and if it was in use or asked for, a new one is made at once.
    pub(super) fn restart(&mut self, slot: Slot, key: &NodePublic, now: Instant) {
        let Some(place) = self.places.get_mut(slot) else {
            return;
        };
        place.unheard_since = None;
        let tunnel = place.tunnel.take();
        let wanted = tunnel.is_some_and(|tunnel| tunnel.attempt.is_some() || tunnel.is_usable(now));
        let wanted = wanted || !place.staged.is_empty();
        self.forget_messages(slot);
        if wanted {
            self.initiate(slot, key, now);
        }
    }

    /// What a tunnel that is gone had to say.
    fn forget_messages(&mut self, slot: Slot) {
        self.active.remove(&slot);
        self.outbox.retain(|(it, _)| *it != slot);
        self.established.retain(|it| *it != slot);
    }

    /// Whether [`encrypt`](Self::encrypt) may be called.
    pub(super) fn is_usable(&self, slot: Slot, now: Instant) -> bool {
        self.places.get(slot).and_then(|place| place.tunnel.as_ref()).is_some_and(|tunnel| tunnel.is_usable(now))
    }

    /// The peers to whom there is a session.
    pub(super) fn usable(&self, now: Instant) -> impl Iterator<Item = Slot> {
        self.active.iter().copied().filter(move |slot| self.is_usable(*slot, now))
    }

    /// Encrypts into `room`, which has [`OVERHEAD`] bytes more than the packet and 148 at least. False when there is no
    /// session.
    pub(super) fn encrypt(&mut self, slot: Slot, packet: &[u8], room: &mut [u8], now: Instant) -> bool {
        let Some(place) = self.places.get_mut(slot) else {
            return false;
        };
        assert!(room.len() >= (packet.len() + OVERHEAD).max(148), "the batch reserves room for boringtun's worst case");
        let Some((_, rekey)) = place.tunnel.as_mut().and_then(|tunnel| tunnel.seal(packet, room, now)) else {
            return false;
        };
        place.counters.sent_bytes += packet.len() as u64;
        if place.unheard_since.is_none() {
            place.unheard_since = Some(now);
            self.wake(now + DOUBT);
        }
        if rekey {
            self.rekey(slot, now);
        }
        true
    }

    /// Peers whose session has become usable since the last call.
    pub(super) fn poll_established(&mut self) -> Option<Slot> {
        self.established.pop_front()
    }

    /// Handshake messages and keepalives to send.
    pub(super) fn poll_message(&mut self) -> Option<(Slot, Vec<u8>)> {
        self.outbox.pop_front()
    }

    /// Since when a handshake has been waiting for its answer, or for any sign of life. One that only replaces an old
    /// session does not count: the session still tells whether the peer is there.
    pub(super) fn asking_since(&self, slot: Slot) -> Option<Instant> {
        let place = self.places.get(slot)?;
        let attempt = place.tunnel.as_ref()?.attempt.as_ref()?;
        let since = place.heard.map_or(attempt.started, |heard| heard.max(attempt.started));
        (attempt.purpose != Purpose::Age).then_some(since)
    }

    /// When the first packet went out after which neither data nor an answer has come in.
    pub(super) fn unheard_since(&self, slot: Slot) -> Option<Instant> {
        self.places.get(slot)?.unheard_since
    }

    /// When data or an answer last came in.
    pub(super) fn heard(&self, slot: Slot) -> Option<Instant> {
        self.places.get(slot)?.heard
    }

    /// Whether data or an answer has come from anybody after `since`.
    pub(super) fn is_anybody_heard_since(&self, since: Instant) -> bool {
        self.places.iter().any(|place| place.heard.is_some_and(|heard| heard > since))
    }

    /// Whether the peer has a tunnel.
    pub(super) fn is_active(&self, slot: Slot) -> bool {
        self.active.contains(&slot)
    }

    pub(super) fn counters(&self, slot: Slot) -> Counters {
        self.places.get(slot).map(|place| place.counters).unwrap_or_default()
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        if self.wake_at.is_none_or(|at| at > now) {
            return;
        }
        self.wake_at = None;
        let slots: Vec<Slot> = self.active.iter().copied().collect();
        for slot in slots {
            self.look_after(slot, now);
            self.reschedule(slot, now);
        }
    }

    pub(super) fn next_deadline(&self) -> Option<(Instant, &'static str)> {
        self.wake_at.map(|at| (at, "wireguard timers"))
    }

    /// The peer's tunnel, made if there is none.
    fn tunnel(&mut self, slot: Slot, key: &NodePublic, now: Instant) -> &mut Tunnel {
        if self.places.len() <= slot {
            self.places.resize_with(slot + 1, Place::default);
        }
        self.active.insert(slot);
        self.places[slot].tunnel.get_or_insert_with(|| Box::new(Tunnel::new(*key, now)))
    }

    fn tunn(&self, slot: Slot, key: &NodePublic, generation: u32) -> Box<Tunn> {
        let theirs = PublicKey::from(*key.as_bytes());
        let index = slot as u32 * GENERATIONS + generation;
        Box::new(Tunn::new(self.private.clone(), theirs, None, None, index, Some(self.load.calm())))
    }

    /// Does what is due for one peer.
    fn look_after(&mut self, slot: Slot, now: Instant) {
        let place = &mut self.places[slot];
        let Some(tunnel) = place.tunnel.as_mut() else {
            return;
        };
        tunnel.expire(now);
        let usable = tunnel.is_usable(now);
        if tunnel.keepalive_at.is_some_and(|at| at <= now) {
            tunnel.keepalive_at = None;
            if let Some((length, _)) = tunnel.seal(&[], &mut self.message[..], now) {
                self.outbox.push_back((slot, self.message[..length].to_vec()));
            }
        }
        if let Some(attempt) = tunnel.attempt.as_ref() {
            if attempt.retry_at > now {
                return;
            }
            if !attempt.is_hopeless(now) {
                return self.send_initiation(slot, now);
            }
            // Only something new to send begins again.
            tunnel.attempt = None;
            place.unheard_since = None;
            if !usable {
                self.drop_tunnel(slot);
            }
        } else if usable && place.unheard_since.is_some_and(|since| now.duration_since(since) >= DOUBT) {
            self.begin(slot, Purpose::Doubt, now);
        } else if !usable && now.duration_since(tunnel.touched) >= IDLE {
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

    /// Sees to it that what one peer needs next is done in time.
    fn reschedule(&mut self, slot: Slot, now: Instant) {
        let Some(place) = self.places.get(slot) else {
            return;
        };
        let Some(tunnel) = place.tunnel.as_ref() else {
            return;
        };
        let usable = tunnel.is_usable(now);
        let asking = tunnel.attempt.as_ref().map(|attempt| attempt.retry_at);
        let doubt = place.unheard_since.map(|since| since + DOUBT).filter(|_| usable && asking.is_none());
        let idle = (!usable && asking.is_none()).then(|| tunnel.touched + IDLE);
        let all = [asking, doubt, idle, tunnel.keepalive_at, tunnel.expires_at()];
        if let Some(at) = all.into_iter().flatten().min() {
            self.wake(at);
        }
    }

    fn wake(&mut self, at: Instant) {
        self.wake_at = Some(self.wake_at.map_or(at, |before| before.min(at)));
    }
}

/// Whose receiver index it is.
fn slot_of(index: u32) -> Slot {
    (index >> 8) as Slot / GENERATIONS as Slot
}

/// Of which handshake.
fn generation_of(index: u32) -> u32 {
    (index >> 8) % GENERATIONS
}
