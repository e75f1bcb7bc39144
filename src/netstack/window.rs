//! What a connection through a relay may have in flight: no more than the queues on its way hold.
//!
//! A relay keeps 32 packets for a client and drops what is beyond them, and so does a tailscaled that writes to one;
//! TCP learns of that only by losses, and one download had two fifths of its segments sent again. So both windows of
//! such a connection, that which we announce and that which the peer does, are held to those packets, or on a longer
//! way to what a fast relay carries in a round trip. The peer's opens by steps, so that packets leave together.
//! Each has them for itself: fifty downloads lose a twentieth of their segments, and are as fast together as one alone.
//! With a fiftieth each, two packets at least, they lost half as many and were slower, and uploads had half the rate.
//! Source: Tailscale, derp/derpserver, `getPerClientSendQueueDepth`; wgengine/magicsock, `bufferedDerpWritesBeforeDrop`.

use std::time::{Duration, Instant};

use super::segment::Segment;
use crate::netmap::Carrier;

/// What a packet of 1,280 octets carries at most beside timestamps, by IPv4.
const SEGMENT: usize = 1_228;
/// What the shortest queue holds: 32 packets, without one for whoever else sends there.
const QUEUE: usize = 31 * SEGMENT;
/// By how much the peer's window opens at once: a quarter of it. An acknowledgement of two packets that lets two more
/// leave costs every process on the way a record and a wake-up; three quarters are on their way meanwhile.
const STEP: i32 = 8 * SEGMENT as i32;
/// Octets a second that a relay carries of one connection. Where the round trip is longer than the queue lasts at that
/// rate, the window is this times the round trip: losses are rare there, and a small window would rule the rate.
const RATE: f64 = 20e6;

/// Both windows of a TCP connection.
#[derive(Debug, Default)]
pub(super) struct Window {
    /// How the last packet left of which that is known.
    carrier: Option<Carrier>,
    /// The shortest round trip on this way.
    round_trip: Option<Duration>,
    /// An octet whose acknowledgement is awaited, and since when.
    timed: Option<(u32, Instant)>,
    /// An end of our window that was moved, and when: what lies beyond it cannot come sooner than a round trip later.
    widened: Option<(u32, Instant)>,
    /// The end of the peer's window as smoltcp knows it, where it is the limit that ends it.
    granted: Option<u32>,
    syn: Option<Syn>,
    open: Option<Open>,
}

/// What our SYN said.
#[derive(Debug)]
struct Syn {
    /// What its answer acknowledges.
    answer: u32,
    window: u16,
    scale: Option<u8>,
}

/// What both sides' SYNs have settled.
#[derive(Debug)]
struct Open {
    /// The shifts of both windows: 0 unless both SYNs had the option. Source: RFC 7323, 2.2.
    own_shift: u8,
    peer_shift: u8,
    /// The end of the window that we have announced; it never moves back. Source: RFC 9293, 3.8.6.
    edge: u32,
}

impl Window {
    /// A packet left this way. `None` tells nothing: it waits for a handshake, or went both ways.
    pub(super) fn note_way(&mut self, carrier: Option<Carrier>) {
        let Some(carrier) = carrier else { return };
        if self.carrier.is_some_and(|known| known != carrier) {
            (self.round_trip, self.timed, self.widened, self.granted) = (None, None, None, None);
        }
        self.carrier = Some(carrier);
    }

    /// A packet that is about to leave: announces no more than the limit.
    pub(super) fn handle_outbound(&mut self, packet: &mut [u8], now: Instant) {
        let Some(mut segment) = Segment::of(packet) else { return };
        if self.timed.is_none() && segment.length() > 0 {
            self.timed = Some((segment.end(), now));
        }
        if segment.is_syn() {
            self.syn = Some(Syn { answer: segment.end(), window: segment.window(), scale: segment.scale() });
            return;
        }
        let limit = self.limit();
        let Some(open) = &mut self.open else { return };
        let acknowledged = segment.acknowledged();
        let announced = usize::from(segment.window()) << open.own_shift;
        let promised = usize::try_from(open.edge.wrapping_sub(acknowledged) as i32).unwrap_or(0);
        // Rounded up: what was promised stays.
        let held = |limit: usize| announced.min(limit.max(promised).next_multiple_of(1 << open.own_shift));
        let window = limit.map_or(announced, held);
        if window < announced {
            segment.set_window((window >> open.own_shift) as u16);
        }
        if window > promised {
            // Into a closed window the peer sends an octet now and then, which would pass for a quick answer.
            if limit.is_some() && promised > 0 && self.widened.is_none() {
                self.widened = Some((open.edge, now));
            }
            open.edge = acknowledged.wrapping_add(window as u32);
        }
    }

    /// A packet that has come: the peer's window is no more than the limit to us.
    pub(super) fn handle_inbound(&mut self, packet: &mut [u8], now: Instant) {
        let Some(mut segment) = Segment::of(packet) else { return };
        if let Some((_, since)) = self.timed.take_if(|(awaited, _)| segment.acknowledges(*awaited)) {
            self.note_round_trip(now.saturating_duration_since(since));
        }
        if let Some((_, since)) = self.widened.take_if(|(edge, _)| segment.reaches_beyond(*edge)) {
            self.note_round_trip(now.saturating_duration_since(since));
        }
        if segment.is_syn() {
            self.open = self.open.take().or_else(|| self.syn.as_ref()?.answered_by(&segment));
            return;
        }
        let (Some(limit), Some(open)) = (self.limit(), &self.open) else { return };
        if usize::from(segment.window()) << open.peer_shift <= limit {
            self.granted = None;
            return;
        }
        let acknowledged = segment.acknowledged();
        let end = acknowledged.wrapping_add(limit as u32);
        let granted = self.granted.get_or_insert(end);
        if end.wrapping_sub(*granted) as i32 >= STEP {
            *granted = end;
        }
        let window = (granted.wrapping_sub(acknowledged) as usize).min(limit);
        segment.set_window((window >> open.peer_shift) as u16);
    }

    /// The shortest round trip on this way, if one was measured.
    pub(super) fn round_trip(&self) -> Option<Duration> {
        self.round_trip
    }

    fn note_round_trip(&mut self, taken: Duration) {
        self.round_trip = Some(self.round_trip.map_or(taken, |known| known.min(taken)));
    }

    /// The most octets in flight; `None` on a direct path, and until the way is known.
    fn limit(&self) -> Option<usize> {
        let Some(Carrier::Relay(_)) = self.carrier else { return None };
        let round_trip = self.round_trip.unwrap_or_default();
        Some(((round_trip.as_secs_f64() * RATE) as usize).max(QUEUE))
    }
}

impl Syn {
    /// What holds from now on, if this is the SYN-ACK.
    fn answered_by(&self, segment: &Segment<'_>) -> Option<Open> {
        if !segment.is_syn_ack() || segment.acknowledged() != self.answer {
            return None;
        }
        let (own_shift, peer_shift) = self.scale.zip(segment.scale()).unwrap_or((0, 0));
        // A SYN's window is not scaled.
        let edge = segment.sequence().wrapping_add(1).wrapping_add(u32::from(self.window));
        Some(Open { own_shift, peer_shift, edge })
    }
}

#[cfg(test)]
mod tests;
