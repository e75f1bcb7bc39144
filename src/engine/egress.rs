//! What waits to be sent: datagrams gathered into batches that one system call sends, and everything else in order.
//!
//! Consecutive segments of one size to one destination share a batch (UDP GSO); a shorter one may only be the last.
//! A batch is open until it is full, another size comes, or the driver polls. Buffers come back by `recycle`, so
//! that a flow in steady state allocates nothing.

use std::collections::VecDeque;
use std::net::SocketAddr;

use super::Output;
use crate::key::NodePublic;
use crate::netmap::RegionId;

/// The kernel takes 64 segments; beyond 48 nothing gets faster, and the queues below us get burstier.
const SEGMENTS: usize = 48;
/// The bytes of a batch: one send is a UDP datagram to the kernel, which ends at 65,507.
pub(super) const BATCH_LENGTH: usize = 65_000;
/// What a batch buffer holds; a little more than [`BATCH_LENGTH`] for [`ROOM`].
const BATCH_CAPACITY: usize = 65_536;
/// The least room a writer gets, since boringtun may want to write an initiation wherever it may write data.
const ROOM: usize = 148;
/// Buffers kept of each kind.
const POOLED: usize = 64;
/// A DERP packet's buffer: an inner packet of 1,280 bytes with WireGuard's 32.
const PACKET_CAPACITY: usize = 1_536;

/// A batch that may still grow.
#[derive(Debug)]
struct Batch {
    destination: SocketAddr,
    contents: Vec<u8>,
    segment: usize,
}

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Egress {
    open: Vec<Batch>,
    ready: VecDeque<Output>,
    batches: Vec<Vec<u8>>,
    packets: Vec<Vec<u8>>,
}

impl Egress {
    /// Queues what is no datagram.
    pub(super) fn push(&mut self, output: Output) {
        self.ready.push_back(output);
    }

    /// The next thing to do.
    pub(super) fn poll(&mut self) -> Option<Output> {
        if let Some(output) = self.ready.pop_front() {
            return Some(output);
        }
        (!self.open.is_empty()).then(|| self.open.remove(0).into_output())
    }

    /// Takes a sent buffer back.
    pub(super) fn recycle(&mut self, mut buffer: Vec<u8>) {
        let pool = if buffer.capacity() >= BATCH_CAPACITY { &mut self.batches } else { &mut self.packets };
        if buffer.capacity() >= PACKET_CAPACITY && pool.len() < POOLED {
            buffer.clear();
            pool.push(buffer);
        }
    }

    /// Queues a datagram of exactly `length` bytes (at most [`BATCH_LENGTH`]) that `write` puts into its place; when
    /// it fails, nothing is queued. Gives the datagram back for a copy to another path.
    pub(super) fn udp(
        &mut self,
        destination: SocketAddr,
        length: usize,
        write: impl FnOnce(&mut [u8]) -> bool,
    ) -> Option<&[u8]> {
        let index = self.batch_for(destination, length);
        let contents = &mut self.open[index].contents;
        let start = contents.len();
        contents.resize(start + length.max(ROOM), 0);
        let written = write(&mut contents[start..]);
        contents.truncate(if written { start + length } else { start });
        if contents.is_empty() {
            let batch = self.open.remove(index);
            self.recycle(batch.contents);
        }
        written.then(|| &self.open[index].contents[start..])
    }

    /// Queues a packet of exactly `length` bytes for a peer behind a DERP region.
    pub(super) fn derp(
        &mut self,
        region: RegionId,
        to: NodePublic,
        length: usize,
        write: impl FnOnce(&mut [u8]) -> bool,
    ) -> bool {
        let mut packet = self.packets.pop().unwrap_or_else(|| Vec::with_capacity(PACKET_CAPACITY));
        packet.resize(length.max(ROOM), 0);
        if !write(&mut packet) {
            self.recycle(packet);
            return false;
        }
        packet.truncate(length);
        self.ready.push_back(Output::Derp { region, to, packet });
        true
    }

    /// Queues a datagram and a copy of it for DERP.
    pub(super) fn both(
        &mut self,
        destination: SocketAddr,
        (region, to): (RegionId, NodePublic),
        length: usize,
        write: impl FnOnce(&mut [u8]) -> bool,
    ) -> bool {
        let mut packet = self.packets.pop().unwrap_or_else(|| Vec::with_capacity(PACKET_CAPACITY));
        let Some(datagram) = self.udp(destination, length, write) else {
            return false;
        };
        packet.extend_from_slice(datagram);
        self.ready.push_back(Output::Derp { region, to, packet });
        true
    }

    /// The open batch that takes a segment of this length next, after closing one that cannot.
    fn batch_for(&mut self, destination: SocketAddr, length: usize) -> usize {
        if let Some(index) = self.open.iter().position(|batch| batch.destination == destination) {
            if self.open[index].takes(length) {
                return index;
            }
            let full = self.open.remove(index);
            self.ready.push_back(full.into_output());
        }
        let contents = self.batches.pop().unwrap_or_else(|| Vec::with_capacity(BATCH_CAPACITY));
        self.open.push(Batch { destination, contents, segment: length });
        self.open.len() - 1
    }
}

impl Batch {
    /// A batch whose last segment is short has no whole number of segments, and is closed by that.
    fn takes(&self, length: usize) -> bool {
        let whole = self.contents.len().is_multiple_of(self.segment);
        let segments = self.contents.len() / self.segment;
        length <= self.segment && whole && segments < SEGMENTS && self.contents.len() + length <= BATCH_LENGTH
    }

    fn into_output(self) -> Output {
        Output::Udp { destination: self.destination, contents: self.contents, segment: self.segment }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn destination(port: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], port))
    }

    fn put(egress: &mut Egress, port: u16, length: usize) {
        egress.udp(destination(port), length, |room| {
            room[..length].fill(length as u8);
            true
        });
    }

    fn drain(egress: &mut Egress) -> Vec<(u16, usize, usize)> {
        let mut sent = Vec::new();
        while let Some(output) = egress.poll() {
            let Output::Udp { destination, contents, segment } = output else { panic!("only datagrams were queued") };
            sent.push((destination.port(), contents.len(), segment));
            egress.recycle(contents);
        }
        sent
    }

    #[test]
    fn a_shorter_segment_ends_a_batch_and_a_longer_one_starts_another() {
        let mut egress = Egress::default();
        for length in [1312, 1312, 100, 100, 1312] {
            put(&mut egress, 1, length);
        }
        assert_eq!(drain(&mut egress), [(1, 2724, 1312), (1, 100, 100), (1, 1312, 1312)]);
    }

    #[test]
    fn batches_end_at_48_segments_or_65000_bytes() {
        let mut egress = Egress::default();
        (0..50).for_each(|_| put(&mut egress, 1, 1312));
        assert_eq!(drain(&mut egress), [(1, 48 * 1312, 1312), (1, 2 * 1312, 1312)]);
        (0..10).for_each(|_| put(&mut egress, 1, 9000));
        assert_eq!(drain(&mut egress), [(1, 7 * 9000, 9000), (1, 3 * 9000, 9000)]);
    }

    #[test]
    fn destinations_do_not_share_a_batch() {
        let mut egress = Egress::default();
        for port in [1, 2, 1, 2] {
            put(&mut egress, port, 200);
        }
        assert_eq!(drain(&mut egress), [(1, 400, 200), (2, 400, 200)]);
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let mut egress = Egress::default();
        assert!(egress.udp(destination(1), 100, |_| false).is_none());
        assert!(egress.poll().is_none());
        put(&mut egress, 1, 100);
        assert!(egress.udp(destination(1), 100, |_| false).is_none());
        assert_eq!(drain(&mut egress), [(1, 100, 100)]);
    }

    #[test]
    fn buffers_are_used_again() {
        let mut egress = Egress::default();
        put(&mut egress, 1, 1312);
        let Some(Output::Udp { contents, .. }) = egress.poll() else { panic!("a datagram was queued") };
        let address = contents.as_ptr();
        egress.recycle(contents);
        put(&mut egress, 1, 1312);
        let Some(Output::Udp { contents, .. }) = egress.poll() else { panic!("a datagram was queued") };
        assert_eq!(contents.as_ptr(), address);
    }

    proptest! {
        #[test]
        fn every_segment_leaves_in_order(lengths in prop::collection::vec(prop_oneof![Just(1312usize), 1usize..1500], 1..200)) {
            let mut egress = Egress::default();
            for (index, length) in lengths.iter().enumerate() {
                egress.udp(destination(1), *length, |room| {
                    room[..*length].fill(index as u8);
                    true
                });
            }
            let mut left = Vec::new();
            while let Some(Output::Udp { contents, segment, .. }) = egress.poll() {
                prop_assert!(contents.len() <= BATCH_LENGTH && contents.len().div_ceil(segment) <= SEGMENTS);
                left.extend(contents.chunks(segment).map(|part| (part[0], part.len())));
                prop_assert!(contents.chunks(segment).all(|part| part.iter().all(|byte| *byte == part[0])));
            }
            let expected: Vec<_> = lengths.iter().enumerate().map(|(index, length)| (index as u8, *length)).collect();
            prop_assert_eq!(left, expected);
        }
    }
}
