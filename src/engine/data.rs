//! The way of a packet through the machines: in from a datagram or DERP, out into a batch or a DERP packet.

use std::net::IpAddr;
use std::time::Instant;

use super::inbound::Verdict;
use super::magicsock::{Via, Ways};
use super::roster::Slot;
use super::stats::Dropped;
use super::wireguard::{OVERHEAD, Received, SCRATCH_LENGTH};
use super::{Engine, NoRoute, Output};
use crate::netmap::Carrier;
use crate::wire::{Kind, classify, ip, tsmp};

impl Engine {
    /// Everything that UDP and DERP share; the length of the admitted packet in the scratch buffer.
    pub(super) fn handle_packet(&mut self, via: Via, packet: &mut [u8], now: Instant) -> Option<usize> {
        let outcome = match classify(packet) {
            Kind::WireGuard => self.handle_wireguard(via, packet, now),
            Kind::Disco => self.magicsock.handle_disco(via, packet, &self.roster, now).map(|()| None),
            Kind::Stun | Kind::Geneve | Kind::Unknown => Err(Dropped::Unknown),
        };
        match outcome {
            Ok(Some(length)) => {
                self.stats.delivered += 1;
                Some(length)
            }
            Ok(None) => {
                self.settle(now);
                None
            }
            Err(reason) => {
                self.stats.drop(reason, 1);
                None
            }
        }
    }

    fn handle_wireguard(&mut self, via: Via, message: &[u8], now: Instant) -> Result<Option<usize>, Dropped> {
        let source = match via {
            Via::Udp(from) => Some(from.ip()),
            Via::Derp(..) => None,
        };
        if message.len() > SCRATCH_LENGTH {
            return Err(Dropped::TooLong);
        }
        let received = self.wireguard.receive(source, message, &self.roster, &mut self.scratch, now);
        // The packet that proves a new session also sets free what waits for it, before any answer.
        match received {
            Received::Packet(slot, length) => {
                self.flush_established(now);
                self.judge(slot, length, now)
            }
            Received::Handled => Ok(None),
            Received::Cookie(length) => {
                if let Via::Udp(to) = via {
                    let contents = self.scratch[..length].to_vec();
                    self.egress.push(Output::Udp { destination: to, segment: length, contents });
                }
                Ok(None)
            }
            Received::Dropped(reason) => Err(reason),
        }
    }

    fn judge(&mut self, slot: Slot, length: usize, now: Instant) -> Result<Option<usize>, Dropped> {
        let (Some(netmap), Some(entry)) = (self.netmap.as_ref(), self.roster.entry(slot)) else {
            return Err(Dropped::Stranger);
        };
        match self.inbound.judge(netmap, &entry.peer, &self.scratch[..length]) {
            Verdict::Admit(length) => Ok(Some(length)),
            Verdict::Drop(reason) => Err(reason),
            Verdict::Tsmp(header, message) => {
                self.handle_tsmp(slot, &header, message, now);
                Ok(None)
            }
        }
    }

    fn handle_tsmp(&mut self, slot: Slot, header: &ip::Header, message: tsmp::Message, now: Instant) {
        self.stats.tsmp += 1;
        match message {
            tsmp::Message::Reject { protocol, reason, source_port, destination_port, maybe_broken } => {
                let flow = self.inbound.rejected(header, protocol, (source_port, destination_port));
                if let Some(flow) = flow.filter(|_| !maybe_broken) {
                    self.egress.push(Output::Rejected { flow, reason });
                }
            }
            tsmp::Message::Ping(token) => {
                let pong = tsmp::Message::Pong { token, peerapi_port: 0 }.encode();
                if let Some(packet) = ip::build(ip::protocol::TSMP, header.destination, header.source, &pong) {
                    self.send_data(slot, &packet, now);
                }
            }
            tsmp::Message::DiscoAdvertisement(key) if !key.is_zero() => {
                self.roster.set_disco(slot, key);
            }
            tsmp::Message::Pong { token, peerapi_port } => self.egress.push(Output::Pong { token, peerapi_port }),
            tsmp::Message::DiscoAdvertisement(_) => {}
        }
    }

    /// Asks the peer behind `remote` for a sign of life inside the tunnel, answered by [`Output::Pong`].
    ///
    /// # Errors
    /// [`NoRoute`] when no peer serves the address, or we have none of its family.
    pub fn ping(&mut self, remote: IpAddr, token: [u8; 8], now: Instant) -> Result<(), NoRoute> {
        let source = self.netmap.as_ref().and_then(|netmap| netmap.source_for(remote)).ok_or(NoRoute)?;
        let ping = tsmp::Message::Ping(token).encode();
        let packet = ip::build(ip::protocol::TSMP, source, remote, &ping).ok_or(NoRoute)?;
        self.handle_outbound(&packet, now).map(drop)
    }

    /// Encrypts a packet into the way, or both ways, that it takes now. Returns the way if it is one.
    pub(super) fn send_data(&mut self, slot: Slot, packet: &[u8], now: Instant) -> Option<Carrier> {
        let entry = self.roster.entry(slot)?;
        let ways = self.magicsock.ways(slot, entry, now);
        let length = packet.len() + OVERHEAD;
        let Self { wireguard, egress, stats, .. } = self;
        let sealed = match (ways.udp, ways.derp) {
            (None, None) => {
                stats.drop(Dropped::NoPath, 1);
                return None;
            }
            (None, Some(region)) => {
                stats.sent_derp += 1;
                egress.derp(region, entry.peer.key, length, |room| wireguard.encrypt(slot, packet, room, now))
            }
            (Some(to), None) => {
                stats.sent_udp += 1;
                egress.udp(to, length, |room| wireguard.encrypt(slot, packet, room, now)).is_some()
            }
            (Some(to), Some(region)) => {
                stats.sent_udp += 1;
                stats.sent_derp += 1;
                egress.both(to, (region, entry.peer.key), length, |room| wireguard.encrypt(slot, packet, room, now))
            }
        };
        if sealed {
            stats.sent += 1
        } else {
            stats.drop(Dropped::NoSession, 1)
        }
        match (ways.udp, ways.derp) {
            (Some(_), None) => Some(Carrier::Direct),
            (None, Some(region)) => Some(Carrier::Relay(region)),
            _ => None,
        }
    }

    /// Sends a handshake message or keepalive as it is.
    fn send_message(&mut self, slot: Slot, message: &[u8], now: Instant) {
        let Some(entry) = self.roster.entry(slot) else {
            return;
        };
        if message.first() == Some(&1) {
            self.stats.handshakes += 1;
            self.magicsock.note_initiation(slot);
        }
        let ways = self.magicsock.ways(slot, entry, now);
        let copy = |room: &mut [u8]| {
            room[..message.len()].copy_from_slice(message);
            true
        };
        if let Some(to) = ways.udp {
            self.egress.udp(to, message.len(), copy);
        }
        if let Some(region) = ways.derp {
            self.egress.derp(region, entry.peer.key, message.len(), copy);
        }
        if ways == Ways::default() {
            self.stats.drop(Dropped::NoPath, 1);
            self.wireguard.note_stuck(slot);
            self.magicsock.look_again(slot, now);
        }
    }

    /// Drains what the machines below have for each other.
    pub(super) fn settle(&mut self, now: Instant) {
        while let Some(slot) = self.magicsock.poll_path_up() {
            self.wireguard.hurry(slot, now);
        }
        while let Some((slot, message)) = self.wireguard.poll_message() {
            self.send_message(slot, &message, now);
        }
        self.flush_established(now);
        self.stats.drop(Dropped::Staged, self.wireguard.take_staged_dropped());
        self.begin_watch(now);
    }

    /// Sends what waited for sessions that are usable now.
    fn flush_established(&mut self, now: Instant) {
        while let Some(slot) = self.wireguard.poll_established() {
            self.magicsock.look_again(slot, now);
            while let Some(packet) = self.wireguard.unstage(slot, now) {
                self.send_data(slot, &packet, now);
            }
            if let Some(entry) = self.roster.entry(slot) {
                self.egress.push(Output::PeerChanged { peer: entry.peer.key });
            }
        }
    }
}
