//! What a path tells the machine that holds it.

use std::net::SocketAddr;
use std::time::Instant;

/// What to send because of something that happened.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::engine::magicsock) struct Probe {
    /// Ping these.
    pub(in crate::engine::magicsock) ping: Vec<SocketAddr>,
    /// Ask the peer by DERP to ping us.
    pub(in crate::engine::magicsock) call: bool,
    /// A path that worked is in doubt since then: our own NAT may be why.
    pub(in crate::engine::magicsock) doubt: Option<Instant>,
}

/// What became of a path.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::engine::magicsock) struct News {
    /// The best address was given up.
    pub(in crate::engine::magicsock) lost: bool,
    /// What was sent of late may not have arrived, and would now.
    pub(in crate::engine::magicsock) resend: bool,
    /// What to send.
    pub(in crate::engine::magicsock) probe: Probe,
}

/// What a pong tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::engine::magicsock) struct Answered {
    /// The best address is another now, or trusted again.
    pub(in crate::engine::magicsock) better: bool,
    /// No address was trusted before, nor was what was sent since then sent again by the relay.
    pub(in crate::engine::magicsock) restored: bool,
    /// The peer sees us elsewhere than before: our NAT maps us anew, and what it sends to where we were is lost.
    pub(in crate::engine::magicsock) remapped: bool,
}

/// What a ping of the peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine::magicsock) enum Heard {
    /// A copy of one that was answered.
    Copy,
    /// One from an address that we knew.
    Known,
    /// The first from an address that nobody had named.
    New,
}

/// What a packet on its way out means for its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine::magicsock) struct Sent {
    /// The path has a new deadline.
    pub(in crate::engine::magicsock) rescheduled: bool,
    /// A discovery round is due.
    pub(in crate::engine::magicsock) discover: bool,
}
