//! When handshakes of ours begin, and how their initiations get out.

use std::time::Instant;

use super::WireGuard;
use super::attempt::{Attempt, Purpose};
use crate::engine::roster::Slot;
use crate::key::NodePublic;

impl WireGuard {
    /// Starts a handshake unless there is a session or a handshake under way.
    pub(in crate::engine) fn initiate(&mut self, slot: Slot, key: &NodePublic, now: Instant) {
        if !self.is_usable(slot, now) {
            self.renew(slot, key, now);
        }
    }

    /// Starts a handshake unless one is under way; a session that there is stays in use.
    pub(in crate::engine) fn renew(&mut self, slot: Slot, key: &NodePublic, now: Instant) {
        let usable = self.is_usable(slot, now);
        if let Some(attempt) = self.tunnel(slot, key, now).attempt.as_mut() {
            attempt.doubt(now);
            self.reschedule(slot, now);
            return;
        }
        self.begin(slot, if usable { Purpose::Doubt } else { Purpose::First }, now);
    }

    /// Starts a handshake that only another session ends, for a peer that may have forgotten the one in use.
    pub(in crate::engine) fn replace(&mut self, slot: Slot, now: Instant) {
        match self.attempt(slot) {
            Some(attempt) if attempt.purpose == Purpose::Anew => {}
            Some(attempt) => {
                attempt.insist(now);
                self.reschedule(slot, now);
            }
            None => self.begin(slot, Purpose::Anew, now),
        }
    }

    /// The initiation could not be sent: no way leads to the peer yet.
    pub(in crate::engine) fn note_stuck(&mut self, slot: Slot) {
        if let Some(attempt) = self.attempt(slot) {
            attempt.stuck = true;
        }
    }

    /// A path to the peer has come up: an initiation that had none need not wait longer. One that is on its way
    /// already is not repeated, since two peers that both do so lose each other's answers.
    pub(in crate::engine) fn hurry(&mut self, slot: Slot, now: Instant) {
        if let Some(attempt) = self.attempt(slot).filter(|attempt| attempt.stuck) {
            attempt.hurry(now);
            self.send_initiation(slot, now);
        }
    }

    fn attempt(&mut self, slot: Slot) -> Option<&mut Attempt> {
        self.places.get_mut(slot)?.tunnel.as_mut()?.attempt.as_mut()
    }

    /// The session is old, and another one is needed.
    pub(super) fn rekey(&mut self, slot: Slot, now: Instant) {
        self.begin(slot, Purpose::Age, now);
        // Nobody asks for messages after a packet.
        self.wake(now);
    }

    /// Begins a handshake in a tunnel that has none under way.
    pub(super) fn begin(&mut self, slot: Slot, purpose: Purpose, now: Instant) {
        let Some(tunnel) = self.places[slot].tunnel.as_mut() else {
            return;
        };
        let (key, generation) = (tunnel.key, tunnel.next_generation());
        let tunn = self.tunn(slot, &key, generation);
        if let Some(tunnel) = self.places[slot].tunnel.as_mut() {
            tunnel.attempt = Some(Attempt::new(tunn, generation, purpose, now));
        }
        self.send_initiation(slot, now);
    }

    pub(super) fn send_initiation(&mut self, slot: Slot, now: Instant) {
        let Self { places, rng, message, .. } = self;
        let place = &mut places[slot];
        let Some(tunnel) = place.tunnel.as_mut() else {
            return;
        };
        let Some(initiation) = tunnel.attempt.as_mut().and_then(|it| it.initiate(rng, &mut message[..], now)) else {
            return;
        };
        tunnel.touched = now;
        place.counters.handshakes_sent += 1;
        self.outbox.push_back((slot, initiation));
        self.reschedule(slot, now);
    }
}
