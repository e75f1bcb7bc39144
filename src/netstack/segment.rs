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

    /// Source: RFC 1624, 3 (equation 3).
    pub(super) fn set_window(&mut self, window: u16) {
        let sum = u32::from(!self.half(16)) + u32::from(!self.window()) + u32::from(window);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        self.tcp[14..16].copy_from_slice(&window.to_be_bytes());
        self.tcp[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }

    /// The window scale option of a SYN; more than 14 is 14. Source: RFC 7323, 2.2 and 2.3.
    pub(super) fn scale(&self) -> Option<u8> {
        let mut options = &self.tcp[20..self.header()];
        while let [kind, rest @ ..] = options {
            options = match (kind, rest) {
                (0, _) => break,
                (1, rest) => rest,
                (3, [3, shift, ..]) => return Some((*shift).min(14)),
                (_, [length, ..]) if *length >= 2 => options.get(usize::from(*length)..).unwrap_or_default(),
                _ => break,
            };
        }
        None
    }
}
