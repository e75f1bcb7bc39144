//! What the engine counts. Plain fields that only grow; `admin` renders them.

/// Why a packet was not delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// No protocol of a tailnet, or one that we do not speak (peer relays).
    Unknown,
    /// A WireGuard, disco, STUN, TSMP or IP packet that does not parse.
    Malformed,
    /// From a node that the netmap does not hold, or a disco key that belongs to nobody.
    Stranger,
    /// WireGuard for a session that we do not hold (any more).
    NoSession,
    /// It does not authenticate.
    Forged,
    /// Its WireGuard counter came already: the second of two copies, or a replay.
    Duplicate,
    /// Too many handshakes at once.
    UnderLoad,
    /// The inner source does not belong to the peer that sent it.
    SpoofedSource,
    /// The inner destination is none of our addresses.
    NotForUs,
    /// It belongs to no flow that we opened.
    Unsolicited,
    /// An IP fragment.
    Fragment,
    /// No address of the tailnet routes there.
    NoRoute,
    /// Neither a UDP path nor a DERP region leads to the peer.
    NoPath,
    /// It waited for a handshake too long, or too many waited.
    Staged,
    /// Longer than a datagram can be.
    TooLong,
}

/// Packets and bytes since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Inner packets that were admitted to the netstack.
    pub delivered: u64,
    /// Inner packets that were encrypted and sent.
    pub sent: u64,
    /// Sent packets that went by UDP.
    pub sent_udp: u64,
    /// Sent packets that went by DERP; a packet sent both ways counts in both.
    pub sent_derp: u64,
    /// Handshake initiations sent.
    pub handshakes: u64,
    /// TSMP messages consumed.
    pub tsmp: u64,
    /// Dropped: [`Dropped::Unknown`].
    pub dropped_unknown: u64,
    /// Dropped: [`Dropped::Malformed`].
    pub dropped_malformed: u64,
    /// Dropped: [`Dropped::Stranger`].
    pub dropped_stranger: u64,
    /// Dropped: [`Dropped::NoSession`].
    pub dropped_no_session: u64,
    /// Dropped: [`Dropped::Forged`].
    pub dropped_forged: u64,
    /// Dropped: [`Dropped::Duplicate`].
    pub dropped_duplicate: u64,
    /// Dropped: [`Dropped::UnderLoad`].
    pub dropped_under_load: u64,
    /// Dropped: [`Dropped::SpoofedSource`].
    pub dropped_spoofed_source: u64,
    /// Dropped: [`Dropped::NotForUs`].
    pub dropped_not_for_us: u64,
    /// Dropped: [`Dropped::Unsolicited`].
    pub dropped_unsolicited: u64,
    /// Dropped: [`Dropped::Fragment`].
    pub dropped_fragment: u64,
    /// Dropped: [`Dropped::NoRoute`].
    pub dropped_no_route: u64,
    /// Dropped: [`Dropped::NoPath`].
    pub dropped_no_path: u64,
    /// Dropped: [`Dropped::Staged`].
    pub dropped_staged: u64,
    /// Dropped: [`Dropped::TooLong`].
    pub dropped_too_long: u64,
}

impl Stats {
    /// Counts packets dropped for one reason.
    pub(super) fn drop(&mut self, reason: Dropped, packets: u64) {
        let counter = match reason {
            Dropped::Unknown => &mut self.dropped_unknown,
            Dropped::Malformed => &mut self.dropped_malformed,
            Dropped::Stranger => &mut self.dropped_stranger,
            Dropped::NoSession => &mut self.dropped_no_session,
            Dropped::Forged => &mut self.dropped_forged,
            Dropped::Duplicate => &mut self.dropped_duplicate,
            Dropped::UnderLoad => &mut self.dropped_under_load,
            Dropped::SpoofedSource => &mut self.dropped_spoofed_source,
            Dropped::NotForUs => &mut self.dropped_not_for_us,
            Dropped::Unsolicited => &mut self.dropped_unsolicited,
            Dropped::Fragment => &mut self.dropped_fragment,
            Dropped::NoRoute => &mut self.dropped_no_route,
            Dropped::NoPath => &mut self.dropped_no_path,
            Dropped::Staged => &mut self.dropped_staged,
            Dropped::TooLong => &mut self.dropped_too_long,
        };
        *counter += packets;
    }
}
