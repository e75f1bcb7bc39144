//! What the underlay does to packets.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Where nobody is.
pub(crate) const FORGER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 18, 0, 66)), 666);

/// What the underlay does to packets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weather {
    /// Of a hundred datagrams, those that are lost.
    pub(crate) lost: u32,
    /// Of a hundred datagrams, those that come twice.
    pub(crate) doubled: u32,
    /// Of a hundred datagrams, those of which an altered copy comes, from the same address or from [`FORGER`].
    pub(crate) forged: u32,
    /// One way, in milliseconds; anything between these, so that packets overtake each other.
    pub(crate) delay: (u64, u64),
}

impl Weather {
    pub(crate) const CALM: Self = Self { lost: 0, doubled: 0, forged: 0, delay: (10, 10) };
}

/// Something that is lost once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lost {
    /// A request to a STUN server.
    Stun,
    /// A call of node 0.
    Call,
    /// A pong of Tailscale's client.
    Pong,
}
