//! TCP's header inside a packet: what the windows, the repetitions and the timestamps read and rewrite.

/// The TCP header of a whole IP packet, and what follows it.
pub(super) struct Segment<'p> {
    tcp: &'p mut [u8],
}

impl<'p> Segment<'p> {
    /// The segment, if the packet is one of TCP and its header is whole.
    pub(super) fn of(packet: &'p mut [u8]) -> Option<Self> {
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

    pub(super) fn sequence(&self) -> u32 {
        self.word(4)
    }

    pub(super) fn acknowledged(&self) -> u32 {
        self.word(8)
    }

    fn header(&self) -> usize {
        usize::from(self.tcp[12] >> 4) * 4
    }

    pub(super) fn is_syn(&self) -> bool {
        self.tcp[13] & 0x02 != 0
    }

    /// SYN and ACK without RST and FIN.
    pub(super) fn is_syn_ack(&self) -> bool {
        self.tcp[13] & 0x17 == 0x12
    }

    pub(super) fn acknowledges(&self, awaited: u32) -> bool {
        self.tcp[13] & 0x10 != 0 && self.acknowledged().wrapping_sub(awaited) as i32 >= 0
    }

    pub(super) fn reaches_beyond(&self, edge: u32) -> bool {
        self.length() > 0 && self.end().wrapping_sub(edge) as i32 > 0
    }

    /// Sequence numbers that it takes: its octets, and its SYN.
    pub(super) fn length(&self) -> u32 {
        (self.tcp.len() - self.header()) as u32 + u32::from(self.is_syn())
    }

    /// The sequence number after its last.
    pub(super) fn end(&self) -> u32 {
        self.sequence().wrapping_add(self.length())
    }

    pub(super) fn window(&self) -> u16 {
        self.half(14)
    }

    pub(super) fn set_window(&mut self, window: u16) {
        self.replace(14, &window.to_be_bytes());
    }

    /// The window scale option of a SYN; more than 14 is 14. Source: RFC 7323, 2.2 and 2.3.
    pub(super) fn scale(&self) -> Option<u8> {
        self.option(3, 3, 20).map(|at| self.tcp[at].min(14))
    }

    /// Whether it has the timestamps option. Source: RFC 7323, 3.2.
    pub(super) fn has_timestamp(&self) -> bool {
        self.timestamp().is_some()
    }

    /// Says when it leaves, if it has the timestamps option.
    pub(super) fn set_timestamp(&mut self, value: u32) {
        if let Some(at) = self.timestamp() {
            self.replace(at, &value.to_be_bytes());
        }
    }

    fn timestamp(&self) -> Option<usize> {
        self.option(8, 10, 20)
    }

    /// Replaces a SYN's segment size, each if it names several. Source: RFC 9293, 3.2.
    pub(super) fn map_segment_size(&mut self, map: impl Fn(u16) -> u16) {
        let mut next = self.option(2, 4, 20);
        while let Some(at) = next {
            self.replace(at, &map(self.half(at)).to_be_bytes());
            next = self.option(2, 4, at + 2);
        }
    }

    /// Where the value of the first option of that kind and length is, seen from one that begins at `at`.
    fn option(&self, kind: u8, length: usize, mut at: usize) -> Option<usize> {
        let header = self.tcp.get(..self.header())?;
        loop {
            at += match *header.get(at)? {
                0 => return None,
                1 => 1,
                other => match usize::from(*header.get(at + 1)?) {
                    0 | 1 => return None,
                    taken if other == kind && taken == length => return (at + taken <= header.len()).then_some(at + 2),
                    taken => taken,
                },
            };
        }
    }

    /// Replaces octets and corrects the checksum, in which an octet at an odd place is the lower half of a word.
    /// Source: RFC 1624, 3 (equation 3).
    fn replace(&mut self, at: usize, octets: &[u8]) {
        let mut sum = u32::from(!self.half(16));
        for (place, new) in (at..).zip(octets.iter().copied()) {
            let old = std::mem::replace(&mut self.tcp[place], new);
            let shift = if place % 2 == 0 { 8 } else { 0 };
            sum += u32::from(!(u16::from(old) << shift)) + (u32::from(new) << shift);
        }
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        self.tcp[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
}
