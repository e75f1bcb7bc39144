//! What a connection through a relay may have in flight: no more than the queues on its way hold.
//!
//! A relay keeps 32 packets for a client and drops what is beyond them, and so does a tailscaled that writes to one; TCP
//! learns of that only by losses, and one download had two fifths of its segments sent again. So both windows of such
//! a connection, that which we announce and that which the peer does, are held to those packets, or on a longer way to
//! what a fast relay carries in a round trip. Source: Tailscale, derp/derpserver, `getPerClientSendQueueDepth`;
//! wgengine/magicsock, `bufferedDerpWritesBeforeDrop`.

use std::time::{Duration, Instant};

use crate::netmap::RegionId;

/// What the shortest queue holds: 32 packets of 1,280 octets, without one for whoever else sends there.
const QUEUE: usize = 31 * 1_240;
/// Octets a second that a relay carries of one connection. Where the round trip is longer than the queue lasts at that
/// rate, the window is this times the round trip: losses are rare there, and a small window would rule the rate.
const RATE: f64 = 20e6;

/// The window scale of our SYNs follows from the receive ring. Source: RFC 7323, 2.2.
pub(super) const fn shift_of(ring: usize) -> u8 {
    (usize::BITS - ring.leading_zeros()).saturating_sub(16) as u8
}

/// Both windows of a TCP connection.
#[derive(Debug, Default)]
pub(super) struct Window {
    /// By which relay the last packet left.
    relay: Option<RegionId>,
    /// Packets that left, up to two: the first may have waited for a handshake, and does not tell the way.
    sent: u8,
    /// The shortest round trip on this way.
    round_trip: Option<Duration>,
    /// An octet whose acknowledgement is awaited, and since when.
    timed: Option<(u32, Instant)>,
    /// The peer's window scale.
    peer_shift: u8,
    /// The end of the window that we have announced; it never moves back. Source: RFC 9293, 3.8.6.
    edge: Option<u32>,
}

impl Window {
    /// A packet left by this relay, or not by one.
    pub(super) fn note_way(&mut self, relay: Option<RegionId>) {
        if self.relay != relay && (self.relay.is_some() || self.sent > 1) {
            (self.round_trip, self.timed) = (None, None);
        }
        self.relay = relay;
        self.sent = self.sent.saturating_add(1).min(2);
    }

    /// A packet that is about to leave: announces no more than the limit.
    pub(super) fn handle_outbound(&mut self, packet: &mut [u8], own_shift: u8, now: Instant) {
        let Some(mut segment) = Segment::of(packet) else { return };
        if self.timed.is_none() && segment.length() > 0 {
            self.timed = Some((segment.sequence().wrapping_add(segment.length()), now));
        }
        if segment.is_syn() {
            return;
        }
        let acknowledged = segment.acknowledged();
        let announced = usize::from(segment.window()) << own_shift;
        let promised = self.edge.map_or(0, |edge| edge.wrapping_sub(acknowledged) as i32);
        let promised = usize::try_from(promised).unwrap_or(0);
        let window = self.limit().map_or(announced, |limit| announced.min(limit.max(promised)));
        if window < announced {
            // Rounded up: what was promised stays.
            segment.set_window(u16::try_from(window.div_ceil(1 << own_shift)).unwrap_or(u16::MAX));
        }
        if window > promised {
            self.edge = Some(acknowledged.wrapping_add(window as u32));
        }
    }

    /// A packet that has come: the peer's window is no more than the limit to us.
    pub(super) fn handle_inbound(&mut self, packet: &mut [u8], now: Instant) {
        let Some(mut segment) = Segment::of(packet) else { return };
        if let Some((awaited, since)) = self.timed
            && segment.acknowledged().wrapping_sub(awaited) as i32 >= 0
        {
            let taken = now.saturating_duration_since(since);
            self.round_trip = Some(self.round_trip.map_or(taken, |known| known.min(taken)));
            self.timed = None;
        }
        if segment.is_syn() {
            self.peer_shift = segment.scale();
            return;
        }
        if let Some(limit) = self.limit()
            && usize::from(segment.window()) << self.peer_shift > limit
        {
            segment.set_window((limit >> self.peer_shift) as u16);
        }
    }

    /// The most octets in flight; `None` on a direct path, and until the round trip is known.
    fn limit(&self) -> Option<usize> {
        let round_trip = self.round_trip.filter(|_| self.relay.is_some())?;
        Some(((round_trip.as_secs_f64() * RATE) as usize).max(QUEUE))
    }
}

/// The TCP header of a whole IP packet, and what follows it.
struct Segment<'p> {
    tcp: &'p mut [u8],
}

impl<'p> Segment<'p> {
    /// The segment, if the packet is one of TCP and its header is whole.
    fn of(packet: &'p mut [u8]) -> Option<Self> {
        let (protocol, start) = match packet.first()? >> 4 {
            4 => (*packet.get(9)?, usize::from(packet[0] & 0x0f) * 4),
            6 => (*packet.get(6)?, 40),
            _ => return None,
        };
        let tcp = packet.get_mut(start..).filter(|tcp| protocol == 6 && tcp.len() >= 20)?;
        let header = usize::from(tcp[12] >> 4) * 4;
        (20..=tcp.len()).contains(&header).then_some(Self { tcp })
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.tcp[at], self.tcp[at + 1], self.tcp[at + 2], self.tcp[at + 3]])
    }

    fn half(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.tcp[at], self.tcp[at + 1]])
    }

    fn sequence(&self) -> u32 {
        self.word(4)
    }

    fn acknowledged(&self) -> u32 {
        self.word(8)
    }

    fn header(&self) -> usize {
        usize::from(self.tcp[12] >> 4) * 4
    }

    fn is_syn(&self) -> bool {
        self.tcp[13] & 0x02 != 0
    }

    /// Sequence numbers that it takes: its octets, and its SYN.
    fn length(&self) -> u32 {
        (self.tcp.len() - self.header()) as u32 + u32::from(self.is_syn())
    }

    fn window(&self) -> u16 {
        self.half(14)
    }

    /// Source: RFC 1624, 3 (equation 3).
    fn set_window(&mut self, window: u16) {
        let sum = u32::from(!self.half(16)) + u32::from(!self.window()) + u32::from(window);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        self.tcp[14..16].copy_from_slice(&window.to_be_bytes());
        self.tcp[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }

    /// The window scale option of a SYN; none is 0, and more than 14 is 14. Source: RFC 7323, 2.2 and 2.3.
    fn scale(&self) -> u8 {
        let mut options = &self.tcp[20..self.header()];
        while let [kind, rest @ ..] = options {
            options = match (kind, rest) {
                (0, _) => break,
                (1, rest) => rest,
                (3, [3, shift, ..]) => return (*shift).min(14),
                (_, [length, ..]) if *length >= 2 => options.get(usize::from(*length)..).unwrap_or_default(),
                _ => break,
            };
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smoltcp::wire::{Ipv4Address, TcpPacket};

    use super::*;

    /// A segment in an IPv4 packet with a right checksum.
    fn packet(flags: u8, sequence: u32, acknowledged: u32, window: u16, payload: usize) -> Vec<u8> {
        let mut packet = vec![0; 20 + 20 + payload];
        (packet[0], packet[9], packet[32], packet[33]) = (0x45, 6, 0x50, flags);
        packet[24..28].copy_from_slice(&sequence.to_be_bytes());
        packet[28..32].copy_from_slice(&acknowledged.to_be_bytes());
        packet[34..36].copy_from_slice(&window.to_be_bytes());
        let (from, to) = (Ipv4Address::UNSPECIFIED, Ipv4Address::UNSPECIFIED);
        TcpPacket::new_unchecked(&mut packet[20..]).fill_checksum(&from.into(), &to.into());
        packet
    }

    fn window_of(packet: &[u8]) -> usize {
        let tcp = TcpPacket::new_checked(&packet[20..]).unwrap();
        let (from, to) = (Ipv4Address::UNSPECIFIED, Ipv4Address::UNSPECIFIED);
        assert!(tcp.verify_checksum(&from.into(), &to.into()));
        usize::from(tcp.window_len()) << 5
    }

    /// A connection whose SYN was answered after `round_trip`, with an ACK that left by `relay`.
    fn opened(relay: Option<RegionId>, round_trip: Duration) -> (Window, Instant) {
        let (mut window, start) = (Window::default(), Instant::now());
        window.handle_outbound(&mut packet(0x02, 0, 0, 65_535, 0), 5, start);
        window.note_way(None);
        window.handle_inbound(&mut packet(0x12, 0, 1, 65_535, 0), start + round_trip);
        window.handle_outbound(&mut packet(0x10, 1, 1, 0x7fff, 0), 5, start + round_trip);
        window.note_way(relay);
        (window, start)
    }

    fn announced(window: &mut Window, acknowledged: u32, now: Instant) -> usize {
        let mut ack = packet(0x10, 1, acknowledged, 0x7fff, 0);
        window.handle_outbound(&mut ack, 5, now);
        window_of(&ack)
    }

    #[test]
    fn a_relayed_window_is_what_the_queue_holds_once_what_was_promised_is_used() {
        let (mut window, now) = opened(Some(1), Duration::from_micros(300));
        // All of the ring was announced before the way was known.
        assert_eq!(announced(&mut window, 1, now), 0x7fff << 5);
        assert_eq!(announced(&mut window, 1_000_001, now), ((0x7fff << 5) - 1_000_000_usize).next_multiple_of(32));
        let settled = announced(&mut window, 1_048_545, now);
        assert!((QUEUE..QUEUE + 32).contains(&settled), "{settled}");
    }

    #[test]
    fn a_long_way_and_a_direct_path_keep_their_window() {
        let (mut window, now) = opened(Some(1), Duration::from_millis(60));
        assert_eq!(announced(&mut window, 1_048_545, now), 0x7fff << 5);
        let (mut window, now) = opened(None, Duration::from_micros(300));
        assert_eq!(announced(&mut window, 1_048_545, now), 0x7fff << 5);
    }

    #[test]
    fn the_peers_window_is_held_too_and_freed_by_another_way() {
        let (mut window, now) = opened(Some(1), Duration::from_micros(300));
        let inbound = |window: &mut Window| {
            let mut ack = packet(0x10, 1, 1, 60_000, 0);
            window.handle_inbound(&mut ack, now);
            usize::from(TcpPacket::new_checked(&ack[20..]).unwrap().window_len())
        };
        assert_eq!(inbound(&mut window), QUEUE);
        window.note_way(Some(2));
        assert_eq!(inbound(&mut window), 60_000);
    }

    #[test]
    fn the_scale_is_found_among_the_options() {
        let mut syn = packet(0x12, 0, 1, 65_535, 12);
        syn[32] = 0x80;
        syn[40..52].copy_from_slice(&[2, 4, 5, 0, 1, 3, 3, 7, 4, 2, 0, 0]);
        assert_eq!(Segment::of(&mut syn).unwrap().scale(), 7);
        assert_eq!(shift_of(1 << 20), 5);
    }

    proptest! {
        #[test]
        fn any_bytes_are_left_alone_or_keep_their_length(mut bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let (mut window, now) = opened(Some(1), Duration::from_micros(300));
            window.handle_outbound(&mut bytes, 5, now);
            window.handle_inbound(&mut bytes, now);
        }
    }
}
