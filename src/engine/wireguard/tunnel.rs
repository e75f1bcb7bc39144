//! One peer's sessions: which of them packets go out by, and how old each is.
//!
//! A handshake of ours has a `Tunn` of its own, and so has its session: a `Tunn` with several sends by the one it last
//! received by, and would fall back to the session before when packets are reordered. The peer's handshakes share
//! one, since it remembers their newest timestamp against replays, and the peer's own packets say by which to send.

use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};

use super::attempt::Attempt;
use super::generation_of;
use super::receive::reason;
use crate::engine::stats::Dropped;
use crate::key::NodePublic;

/// Who initiated a session makes another when it sends and the session is so old; up to [`REKEY_JITTER`] later, since
/// two that began together would do it together. Source: the WireGuard paper, section 6.1, Rekey-After-Time.
const REKEY_ON_SEND: Duration = Duration::from_secs(120);
/// See there.
pub(super) const REKEY_JITTER: Duration = Duration::from_secs(3);
/// The same when it receives. Source: the same, section 6.2, Reject-After-Time less Keepalive- and Rekey-Timeout.
const REKEY_ON_RECEIVE: Duration = Duration::from_secs(165);
/// Who did not initiate it makes another when it sends and the session is so old, unlike in the paper: where handshakes
/// crossed, both ends may send by the session that the other initiated.
const REKEY_INSTEAD: Duration = Duration::from_secs(170);
/// After that nothing goes or comes by a session. Source: the same, Reject-After-Time.
const REJECT: Duration = Duration::from_secs(180);
/// Sessions of the peer's making that its `Tunn` holds.
const THEIRS: u32 = 8;
/// Sessions of ours: the one in use, and the one before it, by which packets may still come.
const OURS: usize = 2;
/// Receiver indexes of a slot are told apart by three bits: 0 for those of the peer's making, the others in turn.
pub(super) const GENERATIONS: u32 = 8;

/// A session.
struct Session {
    /// By which the peer names it.
    index: u32,
    /// When its initiation went out where it is ours, else when we answered: both ends see sessions begin in this order.
    born: Instant,
    /// Whether the peer is known to hold it too.
    confirmed: bool,
    /// When a packet on its way out has us make another.
    rekey_at: Instant,
    /// `None` where it is the peer's making.
    tunn: Option<Box<Tunn>>,
}

/// What a packet was.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Opened {
    /// The inner packet's bytes, at the start of the scratch buffer; 0 for a keepalive.
    pub(super) length: usize,
    /// It is the first by a session that the peer made.
    pub(super) established: bool,
    /// There was no session to send by, and now there is this one.
    pub(super) resumed: bool,
    /// The session is so old that another is needed.
    pub(super) rekey: bool,
}

/// An active peer's tunnel.
pub(super) struct Tunnel {
    pub(super) key: NodePublic,
    /// The peer's handshakes.
    incoming: Option<Box<Tunn>>,
    sessions: Vec<Session>,
    /// The receiver index of the session in use.
    sending: Option<u32>,
    pub(super) attempt: Option<Attempt>,
    generation: u32,
    /// The receiver index of the newest session of the peer's making.
    newest_theirs: u32,
    /// When a handshake message last went out or anything authentic came in.
    pub(super) touched: Instant,
    /// When a keepalive is due, since something came in and nothing went out.
    pub(super) keepalive_at: Option<Instant>,
}

impl Tunnel {
    pub(super) fn new(key: NodePublic, now: Instant) -> Self {
        Self {
            key,
            incoming: None,
            sessions: Vec::new(),
            sending: None,
            attempt: None,
            generation: 0,
            newest_theirs: 0,
            touched: now,
            keepalive_at: None,
        }
    }

    /// Whether there is a session that the peer is known to hold too.
    pub(super) fn is_usable(&self, now: Instant) -> bool {
        self.in_use().is_some_and(|session| session.is_alive(now))
    }

    /// The number that tells the next handshake of ours from those before, and from the at most [`OURS`] sessions.
    pub(super) fn next_generation(&mut self) -> u32 {
        loop {
            self.generation = self.generation % (GENERATIONS - 1) + 1;
            let mut ours = self.sessions.iter().filter(|session| session.tunn.is_some());
            if ours.all(|session| generation_of(session.index) != self.generation) {
                return self.generation;
            }
        }
    }

    /// The `Tunn` of the peer's handshakes.
    pub(super) fn incoming(&mut self, make: impl FnOnce() -> Box<Tunn>) -> &mut Tunn {
        self.incoming.get_or_insert_with(make)
    }

    /// The `Tunn` whose handshake message carried this index.
    pub(super) fn author(&mut self, index: u32) -> Option<&mut Tunn> {
        match generation_of(index) {
            0 => self.incoming.as_deref_mut(),
            generation => self.attempt.as_mut().filter(|it| it.generation == generation).map(Attempt::tunn),
        }
    }

    /// Whether the peer's next session would take the place of the one in use, although nobody has confirmed it yet.
    pub(super) fn is_full(&self, now: Instant) -> bool {
        let place = self.newest_theirs.wrapping_add(1) % THEIRS;
        let in_use = self.in_use().filter(|session| session.is_alive(now));
        in_use.is_some_and(|session| session.tunn.is_none() && session.index % THEIRS == place)
    }

    /// Whether nothing is known of the peer's handshakes: the next one may be forged.
    pub(super) fn is_fresh(&self) -> bool {
        self.incoming.is_none()
    }

    /// The peer's handshake was forged, and there was none before.
    pub(super) fn forget_incoming(&mut self) {
        self.incoming = None;
    }

    /// Writes a packet, or a keepalive, into `room`, which is long enough for it. How long the result is, and whether
    /// another session is needed.
    pub(super) fn seal(&mut self, packet: &[u8], room: &mut [u8], now: Instant) -> Option<(usize, bool)> {
        let sending = self.sending?;
        let session = self.sessions.iter_mut().find(|session| session.index == sending)?;
        if !session.is_alive(now) {
            return None;
        }
        let rekey = session.rekey_at <= now;
        let tunn = session.tunn.as_deref_mut().or(self.incoming.as_deref_mut())?;
        let TunnResult::WriteToNetwork(sealed) = tunn.encapsulate(packet, room) else {
            return None;
        };
        self.keepalive_at = None;
        Some((sealed.len(), rekey && self.attempt.is_none()))
    }

    /// Opens a data packet into `scratch`.
    ///
    /// # Errors
    /// Why nothing came of it.
    pub(super) fn open(
        &mut self,
        index: u32,
        message: &[u8],
        scratch: &mut [u8],
        now: Instant,
    ) -> Result<Opened, Dropped> {
        let session = self.sessions.iter_mut().find(|session| session.index == index);
        let session = session.filter(|session| session.is_alive(now)).ok_or(Dropped::NoSession)?;
        let theirs = session.tunn.is_none();
        let tunn = session.tunn.as_deref_mut().or(self.incoming.as_deref_mut()).ok_or(Dropped::NoSession)?;
        let length = match tunn.decapsulate(None, message, scratch) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => packet.len(),
            TunnResult::Done => 0,
            TunnResult::Err(error) => return Err(reason(&error)),
            TunnResult::WriteToNetwork(_) => return Err(Dropped::Malformed),
        };
        let established = !std::mem::replace(&mut session.confirmed, true);
        let rekey = !theirs && now.duration_since(session.born) >= REKEY_ON_RECEIVE;
        let rekey = rekey && self.sending == Some(index) && self.attempt.is_none();
        let born = session.born;
        let in_use = self.in_use().filter(|session| session.is_alive(now));
        let resumed = in_use.is_none();
        let newer = established && in_use.is_some_and(|session| session.born <= born);
        // Their `Tunn` sends by the session that it last received by.
        if resumed || newer || (theirs && in_use.is_some_and(|session| session.tunn.is_none())) {
            self.sending = Some(index);
        }
        self.touched = now;
        Ok(Opened { length, established, resumed, rekey })
    }

    /// The peer's handshake has made a session, which it has not confirmed yet.
    pub(super) fn add_theirs(&mut self, index: u32, jitter: Duration, now: Instant) {
        let rekey_at = now + REKEY_INSTEAD + jitter;
        let ring = |session: &Session| session.tunn.is_none() && session.index % THEIRS == index % THEIRS;
        self.sessions.retain(|session| session.is_alive(now) && !ring(session));
        self.sessions.push(Session { index, born: now, confirmed: false, rekey_at, tunn: None });
        self.newest_theirs = index;
    }

    /// Our handshake has made a session: it is the one to send by.
    pub(super) fn add_ours(&mut self, index: u32, attempt: Attempt, jitter: Duration, now: Instant) {
        let (tunn, born) = attempt.into_session(now);
        let rekey_at = now + REKEY_ON_SEND + jitter;
        let mut ours = self.sessions.iter().filter(|session| session.tunn.is_some()).count();
        self.sessions.retain(|session| {
            let superfluous = session.tunn.is_some() && ours >= OURS;
            ours -= usize::from(superfluous);
            session.is_alive(now) && !superfluous
        });
        self.sessions.push(Session { index, born, confirmed: true, rekey_at, tunn: Some(tunn) });
        self.sending = Some(index);
    }

    /// Forgets sessions that are too old.
    pub(super) fn expire(&mut self, now: Instant) {
        self.sessions.retain(|session| session.is_alive(now));
    }

    /// When the oldest session ends.
    pub(super) fn expires_at(&self) -> Option<Instant> {
        self.sessions.iter().map(|session| session.born + REJECT).min()
    }

    fn in_use(&self) -> Option<&Session> {
        self.sessions.iter().find(|session| Some(session.index) == self.sending)
    }
}

impl Session {
    fn is_alive(&self, now: Instant) -> bool {
        now.duration_since(self.born) < REJECT
    }
}
