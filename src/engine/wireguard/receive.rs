//! WireGuard messages in.
//!
//! The newest timestamp of a peer's initiations goes with its tunnel, so one from before can be replayed then. It makes
//! a tunnel that ends by itself, and is no sign of life: only data and answers are.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet, Tunn, TunnResult};
use rand::Rng;

use super::attempt::{Attempt, Purpose};
use super::load::Verdict;
use super::tunnel::REKEY_JITTER;
use super::{KEEPALIVE, WireGuard, generation_of, slot_of};
use crate::engine::roster::{Roster, Slot};
use crate::engine::stats::Dropped;
use crate::key::NodePublic;

/// What became of a WireGuard message.
#[derive(Debug)]
pub(in crate::engine) enum Received {
    /// An inner packet of this length is at the start of the scratch buffer.
    Packet(Slot, usize),
    /// A handshake message or a keepalive that has been dealt with.
    Handled,
    /// A cookie of this length, at the start of the scratch buffer, is to go back to the sender's address.
    Cookie(usize),
    /// Nothing came of it.
    Dropped(Dropped),
}

impl WireGuard {
    /// Takes a message from a UDP source, or from DERP without one; the result is in `scratch`.
    pub(in crate::engine) fn receive(
        &mut self,
        source: Option<IpAddr>,
        message: &[u8],
        roster: &Roster,
        scratch: &mut [u8],
        now: Instant,
    ) -> Received {
        assert!(scratch.len() >= message.len().max(256), "the scratch buffer holds any datagram");
        match Tunn::parse_incoming_packet(message) {
            Ok(Packet::PacketData(data)) => self.receive_data(data.receiver_idx, message, scratch, now),
            Ok(Packet::PacketCookieReply(cookie)) => self.receive_cookie(cookie.receiver_idx, message, scratch),
            Ok(Packet::HandshakeInit(_) | Packet::HandshakeResponse(_)) => {
                match self.load.judge(source, message, scratch, now) {
                    Verdict::Proven(packet) => self.receive_handshake(&packet, source, message, roster, now),
                    Verdict::Cookie(length) => Received::Cookie(length),
                    Verdict::Dropped(reason) => Received::Dropped(reason),
                }
            }
            Err(_) => Received::Dropped(Dropped::Malformed),
        }
    }

    fn receive_data(&mut self, index: u32, message: &[u8], scratch: &mut [u8], now: Instant) -> Received {
        let slot = slot_of(index);
        let Some(place) = self.places.get_mut(slot) else {
            return Received::Dropped(Dropped::NoSession);
        };
        let Some(tunnel) = place.tunnel.as_mut() else {
            return Received::Dropped(Dropped::NoSession);
        };
        let opened = match tunnel.open(index, message, scratch, now) {
            Ok(opened) => opened,
            Err(reason) => return Received::Dropped(reason),
        };
        place.counters.received_bytes += opened.length as u64;
        place.heard = Some(now);
        place.unheard_since = None;
        // A session that carries data needs no other, unless it is old or may come from before a sleep; and there is
        // one in use now, if only this.
        let content = |attempt: &Attempt| matches!(attempt.purpose, Purpose::First | Purpose::Doubt);
        tunnel.attempt.take_if(|attempt| opened.established || content(attempt));
        if opened.established {
            place.counters.last_handshake = Some(now);
        }
        if opened.established || opened.resumed {
            self.established.push_back(slot);
        }
        if opened.length > 0 && tunnel.keepalive_at.is_none() {
            tunnel.keepalive_at = Some(now + KEEPALIVE);
            self.wake(now + KEEPALIVE);
        }
        if opened.rekey {
            self.rekey(slot, now);
        }
        if opened.length == 0 { Received::Handled } else { Received::Packet(slot, opened.length) }
    }

    fn receive_handshake(
        &mut self,
        packet: &Packet<'_>,
        source: Option<IpAddr>,
        message: &[u8],
        roster: &Roster,
        now: Instant,
    ) -> Received {
        match packet {
            Packet::HandshakeResponse(response) => self.receive_response(response.receiver_idx, source, message, now),
            Packet::HandshakeInit(initiation) => {
                // Whose it is stands in it.
                let Ok(half) = parse_handshake_anon(&self.private, &self.public, initiation) else {
                    return Received::Dropped(Dropped::Forged);
                };
                let key = NodePublic::from_bytes(half.peer_static_public);
                match roster.slot(&key) {
                    Some(slot) => self.receive_initiation(slot, &key, source, message, now),
                    None => Received::Dropped(Dropped::Stranger),
                }
            }
            Packet::PacketCookieReply(_) | Packet::PacketData(_) => Received::Dropped(Dropped::Malformed),
        }
    }

    fn receive_initiation(
        &mut self,
        slot: Slot,
        key: &NodePublic,
        source: Option<IpAddr>,
        message: &[u8],
        now: Instant,
    ) -> Received {
        let asleep = !self.active.contains(&slot);
        let mut tunn = None;
        let fresh = self.tunnel(slot, key, now).is_fresh();
        if fresh {
            tunn = Some(self.tunn(slot, key, 0));
        }
        let jitter = REKEY_JITTER.mul_f64(self.rng.random_range(0.0..1.0));
        let patience = Duration::from_secs_f64(self.rng.random_range(1.0..1.3));
        let Self { places, message: room, .. } = self;
        let Some(tunnel) = places[slot].tunnel.as_mut() else {
            return Received::Dropped(Dropped::NoSession);
        };
        if tunnel.is_full(now) {
            // A handshake of ours makes room, and serves a peer that has lost its sessions just as well.
            self.replace(slot, now);
            return Received::Handled;
        }
        let incoming = tunnel.incoming(|| tunn.take().expect("a fresh tunnel's was just made"));
        match incoming.decapsulate(source, message, &mut room[..]) {
            TunnResult::WriteToNetwork(reply) => {
                let reply = reply.to_vec();
                if let Some(index) = sender_index(&reply) {
                    tunnel.add_theirs(index, jitter, now);
                }
                tunnel.touched = now;
                // The peer is there and its own handshake is about to be confirmed: ours can wait for that, and not
                // both just as long.
                if let Some(attempt) = tunnel.attempt.as_mut() {
                    attempt.retry_at = attempt.retry_at.max(now + patience);
                }
                self.outbox.push_back((slot, reply));
                self.reschedule(slot, now);
                Received::Handled
            }
            TunnResult::Err(error) => {
                // Only now is the sender proven; a forged one shall not cost us a tunnel.
                if fresh {
                    tunnel.forget_incoming();
                }
                if asleep {
                    self.places[slot].tunnel = None;
                    self.active.remove(&slot);
                }
                Received::Dropped(reason(&error))
            }
            TunnResult::Done | TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => {
                Received::Dropped(Dropped::Malformed)
            }
        }
    }

    fn receive_response(&mut self, index: u32, source: Option<IpAddr>, message: &[u8], now: Instant) -> Received {
        let slot = slot_of(index);
        let jitter = REKEY_JITTER.mul_f64(self.rng.random_range(0.0..1.0));
        let Self { places, message: room, .. } = self;
        let Some(place) = places.get_mut(slot) else {
            return Received::Dropped(Dropped::NoSession);
        };
        let Some(tunnel) = place.tunnel.as_mut() else {
            return Received::Dropped(Dropped::NoSession);
        };
        let Some(mut attempt) = tunnel.attempt.take_if(|attempt| attempt.generation == generation_of(index)) else {
            return Received::Dropped(Dropped::NoSession);
        };
        if !attempt.is_newest(index) {
            attempt.note_old_answer(index, now);
            tunnel.attempt = Some(attempt);
            return Received::Handled;
        }
        match attempt.tunn().decapsulate(source, message, &mut room[..]) {
            TunnResult::WriteToNetwork(keepalive) => {
                self.outbox.push_back((slot, keepalive.to_vec()));
                tunnel.touched = now;
                tunnel.keepalive_at = None;
                tunnel.add_ours(index, attempt, jitter, now);
                place.heard = Some(now);
                place.unheard_since = None;
                place.counters.last_handshake = Some(now);
                self.established.push_back(slot);
                self.reschedule(slot, now);
                Received::Handled
            }
            TunnResult::Err(error) => {
                tunnel.attempt = Some(attempt);
                Received::Dropped(reason(&error))
            }
            TunnResult::Done | TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => {
                tunnel.attempt = Some(attempt);
                Received::Dropped(Dropped::Malformed)
            }
        }
    }

    fn receive_cookie(&mut self, index: u32, message: &[u8], scratch: &mut [u8]) -> Received {
        let Some(tunnel) = self.places.get_mut(slot_of(index)).and_then(|place| place.tunnel.as_mut()) else {
            return Received::Dropped(Dropped::NoSession);
        };
        let Some(author) = tunnel.author(index) else {
            return Received::Dropped(Dropped::NoSession);
        };
        match author.decapsulate(None, message, scratch) {
            TunnResult::Err(error) => Received::Dropped(reason(&error)),
            TunnResult::Done
            | TunnResult::WriteToNetwork(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => Received::Handled,
        }
    }
}

/// The index by which the answer to a handshake message will name us.
fn sender_index(message: &[u8]) -> Option<u32> {
    message.get(4..8)?.first_chunk().copied().map(u32::from_le_bytes)
}

pub(super) fn reason(error: &WireGuardError) -> Dropped {
    match error {
        WireGuardError::DuplicateCounter | WireGuardError::InvalidCounter => Dropped::Duplicate,
        WireGuardError::UnderLoad => Dropped::UnderLoad,
        WireGuardError::NoCurrentSession
        | WireGuardError::WrongIndex
        | WireGuardError::UnexpectedPacket
        | WireGuardError::ConnectionExpired => Dropped::NoSession,
        WireGuardError::InvalidMac
        | WireGuardError::InvalidAeadTag
        | WireGuardError::WrongKey
        | WireGuardError::InvalidTai64nTimestamp
        | WireGuardError::WrongTai64nTimestamp => Dropped::Forged,
        WireGuardError::DestinationBufferTooSmall
        | WireGuardError::IncorrectPacketLength
        | WireGuardError::WrongPacketType
        | WireGuardError::InvalidPacket
        | WireGuardError::LockFailed => Dropped::Malformed,
    }
}
