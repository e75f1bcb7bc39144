//! What goes into an engine once, and what comes out of it.

use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{Flow, HostState, HttpsProbe};
use crate::key::{DiscoPrivate, NodePrivate, NodePublic};
use crate::netmap::RegionId;
use crate::wire::tsmp;

/// By which ways packets may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// By UDP where a path works, by DERP where none does.
    #[default]
    Auto,
    /// By UDP alone; DERP carries only what two nodes must tell each other to find a path.
    Direct,
    /// By DERP alone: no UDP at all, not even STUN.
    Derp,
}

/// What an engine needs to begin.
#[derive(Debug, Clone)]
pub struct Config {
    /// Our WireGuard and DERP identity.
    pub node_key: NodePrivate,
    /// Our identity in path discovery.
    pub disco_key: DiscoPrivate,
    /// What chance is derived from; handshakes alone ask the operating system.
    pub seed: [u8; 32],
    /// By which ways packets may go.
    pub transport: Transport,
}

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Send segments of `segment` bytes to one destination; the last may be shorter.
    /// Give `contents` back by [`Engine::recycle`](super::Engine::recycle).
    Udp {
        /// Where to.
        destination: SocketAddr,
        /// The segments, one after the other.
        contents: Vec<u8>,
        /// The bytes of each.
        segment: usize,
    },
    /// Send a packet to a peer by a region. Give `packet` back by [`Engine::recycle`](super::Engine::recycle).
    Derp {
        /// The region.
        region: RegionId,
        /// The peer.
        to: NodePublic,
        /// At most 64 KiB.
        packet: Vec<u8>,
    },
    /// Connect this region, or keep it connected, until [`Output::CloseDerp`].
    ConnectDerp {
        /// The region.
        region: RegionId,
        /// Whether it is our home, of which its server is told.
        home: bool,
    },
    /// Close a region.
    CloseDerp {
        /// The region.
        region: RegionId,
    },
    /// Resolve the name of a STUN server; answered by [`Engine::handle_stun_address`](super::Engine::handle_stun_address).
    ResolveStun {
        /// The region.
        region: RegionId,
        /// The name.
        host: String,
        /// The port, to go with the addresses.
        port: u16,
    },
    /// Measure a region by HTTPS; answered by [`Engine::handle_https_latency`](super::Engine::handle_https_latency).
    ProbeHttps(HttpsProbe),
    /// Tell control.
    HostChanged(HostState),
    /// A peer refused a flow that we opened.
    Rejected {
        /// The flow.
        flow: Flow,
        /// Why.
        reason: tsmp::Reason,
    },
    /// A peer answered [`Engine::ping`](super::Engine::ping).
    Pong {
        /// The ping's token.
        token: [u8; 8],
        /// The peer's PeerAPI port; 0 for none.
        peerapi_port: u16,
    },
    /// Of several peers that serve the same prefix another is used now; see [`Engine::netmap`](super::Engine::netmap).
    RoutesChanged,
    /// What was sent to the peer of late may be lost and would arrive now: whoever awaits an answer sends again.
    Resend {
        /// The peer.
        peer: NodePublic,
    },
    /// A handshake with the peer is complete, or its path is another.
    PeerChanged {
        /// The peer.
        peer: NodePublic,
    },
}

/// No peer serves an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no peer of the tailnet routes this address")]
pub struct NoRoute;

/// How packets reach a peer now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathStatus {
    /// By UDP.
    Direct {
        /// The peer's address.
        addr: SocketAddr,
        /// The newest ping's round trip.
        rtt: Duration,
    },
    /// By this region.
    Derp {
        /// The region.
        region: RegionId,
    },
    /// Not at all.
    None,
}

impl fmt::Display for PathStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct { addr, .. } => addr.fmt(f),
            Self::Derp { region } => write!(f, "derp {region}"),
            Self::None => f.write_str("none"),
        }
    }
}

/// What is known of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerStatus {
    /// Handshake initiations sent.
    pub handshakes_sent: u64,
    /// When a handshake was last completed.
    pub last_handshake: Option<Instant>,
    /// Whether there is a session right now.
    pub established: bool,
    /// When data or an answer last came from it.
    pub heard: Option<Instant>,
    /// Since then a handshake is unanswered, however old a session there is.
    pub asking_since: Option<Instant>,
    /// Since then packets have gone out to it, and nothing has come back.
    pub unheard_since: Option<Instant>,
    /// The present path.
    pub path: PathStatus,
    /// Whether a packet would leave by it.
    pub open: bool,
    /// Inner bytes sent.
    pub sent_bytes: u64,
    /// Inner bytes received.
    pub received_bytes: u64,
}
