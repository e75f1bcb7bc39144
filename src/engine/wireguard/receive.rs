//! WireGuard messages in.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet, Tunn, TunnResult};
use rand::Rng;

use super::WireGuard;
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
            Ok(Packet::HandshakeInit(_)) => self.receive_initiation(source, message, roster, scratch, now),
            Ok(Packet::HandshakeResponse(response)) => {
                self.receive_response(response.receiver_idx, source, message, scratch, now)
            }
            Ok(Packet::PacketCookieReply(cookie)) => self.receive_cookie(cookie.receiver_idx, message, scratch),
            Err(_) => Received::Dropped(Dropped::Malformed),
        }
    }

    fn receive_data(&mut self, index: u32, message: &[u8], scratch: &mut [u8], now: Instant) -> Received {
        let slot = (index >> 8) as Slot;
        let Some(place) = self.places.get_mut(slot) else {
            return Received::Dropped(Dropped::NoSession);
        };
        let Some(tunnel) = place.tunnel.as_mut() else {
            return Received::Dropped(Dropped::NoSession);
        };
        let received = match tunnel.tunn.decapsulate(None, message, scratch) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                place.counters.received_bytes += packet.len() as u64;
                Received::Packet(slot, packet.len())
            }
            TunnResult::Done => Received::Handled,
            TunnResult::Err(error) => return Received::Dropped(reason(&error)),
            TunnResult::WriteToNetwork(_) => return Received::Dropped(Dropped::Malformed),
        };
        tunnel.touched = now;
        place.heard = Some(now);
        place.unheard_since = None;
        // A session that carries data needs no other, whatever made us ask for one.
        tunnel.attempt = None;
        if !tunnel.usable {
            tunnel.usable = true;
            place.counters.last_handshake = Some(now);
            self.established.push_back(slot);
        }
        received
    }

    /// The answer to an initiation whose sender nobody knows yet.
    fn receive_initiation(
        &mut self,
        source: Option<IpAddr>,
        message: &[u8],
        roster: &Roster,
        scratch: &mut [u8],
        now: Instant,
    ) -> Received {
        self.reset_limiter(now);
        let mut cookie = [0; 64];
        let parsed = match self.limiter.verify_packet(source, message, &mut cookie) {
            Ok(parsed) => parsed,
            Err(TunnResult::WriteToNetwork(cookie)) => {
                scratch[..cookie.len()].copy_from_slice(cookie);
                return Received::Cookie(cookie.len());
            }
            Err(TunnResult::Err(error)) => return Received::Dropped(reason(&error)),
            Err(_) => return Received::Dropped(Dropped::Malformed),
        };
        let Packet::HandshakeInit(initiation) = parsed else {
            return Received::Dropped(Dropped::Malformed);
        };
        let Ok(half) = parse_handshake_anon(&self.private, &self.public, &initiation) else {
            return Received::Dropped(Dropped::Forged);
        };
        let key = NodePublic::from_bytes(half.peer_static_public);
        let Some(slot) = roster.slot(&key) else {
            return Received::Dropped(Dropped::Stranger);
        };
        let fresh = !self.active.contains(&slot);
        let patience = Duration::from_secs_f64(self.rng.random_range(1.0..1.3));
        let tunnel = self.tunnel(slot, &key, now);
        match tunnel.tunn.decapsulate(source, message, scratch) {
            TunnResult::WriteToNetwork(reply) if reply.len() == 64 => Received::Cookie(reply.len()),
            TunnResult::WriteToNetwork(reply) => {
                tunnel.touched = now;
                // The peer is there and its own handshake is about to be confirmed: ours can wait for that, and not
                // both just as long.
                if let Some(attempt) = tunnel.attempt.as_mut() {
                    attempt.retry_at = attempt.retry_at.max(now + patience);
                }
                let reply = reply.to_vec();
                self.places[slot].heard = Some(now);
                self.places[slot].unheard_since = None;
                self.outbox.push_back((slot, reply));
                Received::Handled
            }
            TunnResult::Err(error) => {
                // Only now is the sender proven; a forged one shall not cost us a tunnel.
                if fresh {
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

    fn receive_response(
        &mut self,
        index: u32,
        source: Option<IpAddr>,
        message: &[u8],
        scratch: &mut [u8],
        now: Instant,
    ) -> Received {
        self.reset_limiter(now);
        let slot = (index >> 8) as Slot;
        let Some(place) = self.places.get_mut(slot) else {
            return Received::Dropped(Dropped::NoSession);
        };
        let Some(tunnel) = place.tunnel.as_mut() else {
            return Received::Dropped(Dropped::NoSession);
        };
        match tunnel.tunn.decapsulate(source, message, scratch) {
            TunnResult::WriteToNetwork(cookie) if cookie.len() == 64 => Received::Cookie(cookie.len()),
            TunnResult::WriteToNetwork(keepalive) => {
                tunnel.touched = now;
                if tunnel.attempt.as_ref().is_some_and(|attempt| attempt.newest != index) {
                    return Received::Handled;
                }
                tunnel.attempt = None;
                place.heard = Some(now);
                place.unheard_since = None;
                place.counters.last_handshake = Some(now);
                self.outbox.push_back((slot, keepalive.to_vec()));
                tunnel.usable = true;
                self.established.push_back(slot);
                Received::Handled
            }
            TunnResult::Err(error) => Received::Dropped(reason(&error)),
            TunnResult::Done | TunnResult::WriteToTunnelV4(..) | TunnResult::WriteToTunnelV6(..) => {
                Received::Dropped(Dropped::Malformed)
            }
        }
    }

    fn receive_cookie(&mut self, index: u32, message: &[u8], scratch: &mut [u8]) -> Received {
        let slot = (index >> 8) as Slot;
        let Some(tunnel) = self.places.get_mut(slot).and_then(|place| place.tunnel.as_mut()) else {
            return Received::Dropped(Dropped::NoSession);
        };
        match tunnel.tunn.decapsulate(None, message, scratch) {
            TunnResult::Err(error) => Received::Dropped(reason(&error)),
            TunnResult::Done
            | TunnResult::WriteToNetwork(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => Received::Handled,
        }
    }
}

fn reason(error: &WireGuardError) -> Dropped {
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
