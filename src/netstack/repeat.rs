//! What a connection sends again at once when what it sent of late may be lost, and would arrive now: its SYN, while that
//! is not answered, or the segment that it repeated last.
//!
//! TCP itself waits before each further try for twice as long, up to a minute, and is not told that the way has changed.
//! A segment that was sent once is repeated soon enough.

use super::segment::Segment;

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

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use smoltcp::socket::tcp::State;

    use super::super::Again;
    use super::super::tests::{OURS, THEIRS, World};

    #[test]
    fn a_syn_that_went_to_another_router_is_repeated_at_once_as_it_was() {
        let mut world = World::new(1);
        let id = world.stack.connect(OURS.parse().unwrap(), THEIRS.parse().unwrap()).unwrap();
        let packets = |world: &mut World| {
            let mut packets = Vec::new();
            world.stack.egress(world.now, &mut |packet| {
                packets.push(packet.to_vec());
                None
            });
            packets
        };
        let first = packets(&mut world);
        world.stack.repeat(Again::Syns, |_| false);
        assert_eq!((first.len(), packets(&mut world).len()), (1, 0));
        world.stack.repeat(Again::Everything, |remote| remote == THEIRS.parse::<SocketAddr>().unwrap().ip());
        assert_eq!(packets(&mut world), first);
        world.loss = 0;
        world.run(Duration::from_secs(2));
        assert_eq!(world.stack.with_tcp(id, |socket| socket.state()), Some(State::Established));
        world.stack.repeat(Again::Everything, |_| true);
        assert!(packets(&mut world).is_empty(), "an open connection has no SYN to repeat");
    }

    /// Ten seconds after a connection went silent its next try is 12.8 s away; the way that works again is used at once.
    #[test]
    fn a_segment_that_was_repeated_in_vain_is_sent_again_when_the_way_changes() {
        let mut world = World::new(0);
        let id = world.connect();
        world.loss = 1;
        world.stack.with_tcp(id, |socket| socket.send_slice(b"lost")).unwrap().unwrap();
        world.stack.touch(id);
        world.run(Duration::from_millis(150));
        world.stack.repeat(Again::Everything, |_| true);
        assert!(!world.stack.has_work(), "what was sent once may still arrive");
        world.run(Duration::from_secs(10));
        world.loss = 0;
        world.stack.repeat(Again::Syns, |_| true);
        world.stack.repeat(Again::Everything, |_| false);
        assert!(!world.stack.has_work());
        world.stack.repeat(Again::Everything, |_| true);
        world.run(Duration::from_millis(20));
        let mut got = [0; 8];
        assert_eq!(world.server().recv_slice(&mut got), Ok(4));
        world.stack.repeat(Again::Everything, |_| true);
        assert!(!world.stack.has_work(), "it is acknowledged");
        let octets = vec![7; 100_000];
        assert_eq!(world.carry(id, &octets), octets);
    }
}
