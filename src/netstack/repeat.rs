//! What a connection sends again at once when what it sent of late may be lost, and would arrive now: its SYN, while that
//! is not answered, or the segment that it repeated last.
//!
//! TCP itself waits before each further try for twice as long, up to a minute, and is not told that the way has changed.
//! A segment that was sent once is repeated soon enough.

use super::window::Segment;

/// One connection's segment to repeat.
#[derive(Debug, Default)]
pub(super) struct Repeat {
    /// The sequence number after the last that was sent.
    sent: Option<u32>,
    /// A packet, and what acknowledges it.
    kept: Option<(Vec<u8>, u32)>,
}

impl Repeat {
    /// A packet leaves.
    pub(super) fn note_sent(&mut self, packet: &mut [u8]) {
        let Some(segment) = Segment::of(packet).filter(|segment| segment.length() > 0) else { return };
        let (first, end) = (segment.is_syn(), segment.end());
        if first || self.sent.is_some_and(|sent| end.wrapping_sub(sent) as i32 <= 0) {
            self.kept = Some((packet.to_vec(), end));
        } else {
            self.sent = Some(end);
        }
    }

    /// A packet has come.
    pub(super) fn note_received(&mut self, packet: &mut [u8]) {
        if let Some((_, end)) = &self.kept
            && Segment::of(packet).is_some_and(|segment| segment.acknowledges(*end))
        {
            self.kept = None;
        }
    }

    /// The packet that still waits for its acknowledgement.
    pub(super) fn pending(&self) -> Option<&[u8]> {
        self.kept.as_ref().map(|(packet, _)| packet.as_slice())
    }
}
