//! TCP timestamps: every segment says when it leaves, and the peer learns the round trip from the answer to each.
//!
//! Without them a sender measures nothing by segments that it repeats, keeps the pause that it doubled with each, and
//! after an outage waits that long again for the next loss. smoltcp sends and echoes the option, but counts it to no
//! segment's size and has no clock; so a peer's segment size is lowered by it, and the time is set on the way out.

use smoltcp::time::Instant;

use super::device::MTU;
use super::segment::Segment;

/// What the option takes of every header, padding included. Source: RFC 7323, appendix A.
const OPTION: u16 = 12;

/// Gives smoltcp a value, which turns the option on; [`stamp`] replaces it.
pub(super) const PLACEHOLDER: fn() -> u32 = || 0;

/// The clock that peers see, one for all connections: a port that is used anew goes on where it was.
pub(super) struct Timestamps {
    offset: u32,
}

impl Timestamps {
    /// `seed` makes the clock's beginning unguessable, and cannot be told from it. Source: RFC 7323, 5.4 and 7.1.
    pub(super) fn new(seed: u64) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, &seed.to_be_bytes());
        let offset = digest.as_ref().iter().take(4).fold(0, |offset, octet| offset << 8 | u32::from(*octet));
        Self { offset }
    }

    /// What the clock shows: milliseconds, as Linux has it. While nothing ran it stood still, as smoltcp's does.
    pub(super) fn at(&self, time: Instant) -> u32 {
        self.offset.wrapping_add(time.total_millis() as u32)
    }
}

/// A packet leaves when the clock shows `value`. One that leaves again says so: the peer might take it for an old one.
/// Source: RFC 7323, 5.3.
pub(super) fn stamp(packet: &mut [u8], value: u32) {
    if let Some(mut segment) = Segment::of(packet) {
        segment.set_timestamp(value);
    }
}

/// A packet has come: if both sides will send timestamps, leaves room for them in our segments. Source: RFC 6691, 2.
pub(super) fn leave_room(packet: &mut [u8]) {
    const TCP_HEADER: u16 = 20;
    let ip_header = if packet.first().is_some_and(|octet| octet >> 4 == 4) { 20 } else { 40 };
    let most = MTU as u16 - ip_header - TCP_HEADER;
    if let Some(mut segment) = Segment::of(packet).filter(|segment| segment.is_syn() && segment.has_timestamp()) {
        // A size of zero smoltcp refuses.
        segment.map_segment_size(|size| size.min(most).saturating_sub(OPTION).max(size.min(1)));
    }
}

#[cfg(test)]
mod tests;
