//! Why a target was not reached, by what somebody can do about it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::NodeError;
use super::target::Host;
use crate::lapse::Lapse;
use crate::netmap::is_internet;

/// Why a target was not reached.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DialError {
    /// The node has not joined within `hold_timeout`; carries what it waits for.
    #[error("the node has not joined the tailnet within {}", Lapse(*.limit))]
    NotJoined {
        /// The hold limit.
        limit: Duration,
        /// Why, once the node has failed for good.
        cause: Option<Arc<NodeError>>,
    },
    /// No tailnet route or name covers the target, so it would leave by the public internet.
    #[error("{host} is not in the tailnet; it would be {}", outside(.host))]
    Public {
        /// The host.
        host: Host,
    },
    /// The name gave no address.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// The name has addresses, or the address was asked, but no route covers it.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// Nothing comes from the peer that owns the route.
    #[error("{peer} did not answer{} in {}{}", handshakes(*.tries), Lapse(*.waited), .gap.map(Gap::told).unwrap_or_default())]
    PeerSilent {
        /// The peer's name.
        peer: String,
        /// Handshakes that went out to it, where it is known that they did.
        tries: u64,
        /// How long.
        waited: Duration,
        /// Why no packet of ours reaches it, where that is known.
        gap: Option<Gap>,
    },
    /// Nothing answered the SYN, and nothing says that the peer is gone.
    #[error("{}{address} did not answer in {}", there(.peer, *.unheard), Lapse(*.waited))]
    Unanswered {
        /// The peer's name.
        peer: String,
        /// The address that was dialled.
        address: SocketAddr,
        /// How long.
        waited: Duration,
        /// How long nothing has come from the peer, where nothing came during the dial.
        unheard: Option<Duration>,
    },
    /// The peer's packet filter refused the connection (TSMP).
    #[error("{peer} rejected the connection: {reason}")]
    Rejected {
        /// The peer's name.
        peer: String,
        /// The TSMP reason in words.
        reason: String,
    },
    /// The target refused with a RST.
    #[error("{address} refused the connection")]
    Refused {
        /// The address that was dialled.
        address: SocketAddr,
    },
    /// A limit of ours or of the system's is reached.
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    /// A host that `--direct-allow` names was not reached outside the tailnet.
    #[error(transparent)]
    Direct(#[from] DirectError),
}

/// What a host is where the tailnet does not have it.
fn outside(host: &Host) -> &'static str {
    match host {
        Host::Ip(ip) if is_near(*ip) => "this machine or its link",
        Host::Ip(ip) if is_private(*ip) => "in a network around this machine",
        Host::Ip(ip) if !is_internet(*ip) => "no single host's (multicast or reserved)",
        Host::Ip(_) | Host::Name(_) => "public",
    }
}

fn is_private(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_private(),
        IpAddr::V6(ip) => ip.is_unique_local(),
    }
}

/// Whether an address means this machine or its link, where clouds keep their metadata.
pub(super) fn is_near(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local() || ip.is_unspecified(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified(),
    }
}

/// What is known of a peer behind which nothing answered. A live one whose target is silent is heard at the latest
/// when it acknowledges with a keepalive, after ten seconds: a shorter dial may not have seen it.
/// Source: WireGuard, 6.5 (passive keepalive).
fn there(peer: &str, unheard: Option<Duration>) -> String {
    match unheard {
        None => format!("the tunnel to {peer} is up, but "),
        Some(lapse) => format!("nothing has come from {peer} for {}: ", Lapse(lapse)),
    }
}

fn handshakes(tries: u64) -> String {
    match tries {
        0 => String::new(),
        1 => " a WireGuard handshake".to_owned(),
        _ => format!(" {tries} WireGuard handshakes"),
    }
}

/// Why no packet leaves for a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gap {
    /// No direct path works, and relays are not to be used.
    Direct {
        /// Whether no STUN server answers either.
        udp_blocked: bool,
    },
    /// No connected relay leads to it, and direct paths are not to be used.
    Relay,
    /// Neither a direct path works, nor does a connected relay lead to it.
    Both,
}

impl Gap {
    pub(super) fn told(self) -> &'static str {
        match self {
            Self::Direct { udp_blocked: true } => {
                "; no UDP comes back from anywhere, and --transport direct allows no relay"
            }
            Self::Direct { udp_blocked: false } => {
                "; no direct path to it works, and --transport direct allows no relay"
            }
            Self::Relay => "; no connected relay leads to it, and --transport derp allows no direct path",
            Self::Both => "; no direct path to it works, and no connected relay leads to it",
        }
    }
}

/// What has run out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Exhausted {
    /// No local port is free for that destination.
    #[error("no local port is free for {address}")]
    Ports {
        /// The address that was dialled.
        address: SocketAddr,
    },
    /// The system has no memory for another connection.
    #[error("no memory for another connection")]
    Memory,
}

/// Why a host outside the tailnet was not reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DirectError {
    /// It did not answer in time.
    #[error("{address} did not answer outside the tailnet")]
    Silent {
        /// The address that was dialled first.
        address: SocketAddr,
    },
    /// It refused.
    #[error("{address} refused the connection outside the tailnet")]
    Refused {
        /// The address that was dialled first.
        address: SocketAddr,
    },
    /// The operating system could not reach it.
    #[error("{address} cannot be reached outside the tailnet: {detail}")]
    Failed {
        /// The address that was dialled first.
        address: SocketAddr,
        /// What the operating system said.
        detail: String,
    },
}

/// Why an address that belongs to the tailnet has no usable route.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// No peer serves the address: a tailnet address without a node, or a subnet that nobody (any longer) routes.
    #[error("no node that this one may see has or routes {address}")]
    None {
        /// The address.
        address: IpAddr,
    },
    /// A route for it was there earlier in this run, and was withdrawn.
    #[error("the route to {address} was withdrawn")]
    Withdrawn {
        /// The address.
        address: IpAddr,
    },
    /// Only peers that control calls offline serve it.
    #[error("{router} routes {address} but is offline")]
    Offline {
        /// The address.
        address: IpAddr,
        /// The router's name.
        router: String,
    },
    /// A name that the tailnet resolves gave only addresses that no peer routes.
    #[error("{name} resolves to {address}, which no peer routes")]
    Answer {
        /// The name.
        name: String,
        /// The first such address.
        address: IpAddr,
    },
    /// It is this node's own address: a connection to it would come back to us.
    #[error("{address} is this node itself")]
    Own {
        /// The address.
        address: IpAddr,
    },
    /// An app connector answered for a name, but its route to the answer did not come in time.
    #[error("{connectors} answered for {name}, but routes none of its addresses ({addresses}) after {}", Lapse(*.waited))]
    Connector {
        /// The name.
        name: String,
        /// Its addresses, as the connector gave them.
        addresses: String,
        /// The names of those who serve the name.
        connectors: String,
        /// How long the route was waited for.
        waited: Duration,
    },
    /// An app connector answered for a name, but no subnet route is accepted.
    #[error("{name} is an app connector's ({addresses}), but --accept-routes is off")]
    ConnectorIgnored {
        /// The name.
        name: String,
        /// Its addresses, as the connector gave them.
        addresses: String,
    },
    /// The connectors of an app agree to no transit address.
    #[error("no transit address for {name} of the app {app}: {detail}")]
    Transit {
        /// The name.
        name: String,
        /// The app that it belongs to.
        app: String,
        /// What each connector said, or why none was asked.
        detail: String,
    },
    /// We have no address of that family.
    #[error("this node has no {family} address for {address}")]
    Family {
        /// The address.
        address: IpAddr,
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
}

/// Why a name has no address to dial.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// The resolvers say that the name does not exist.
    #[error("{name} does not exist, says {resolver}")]
    NxDomain {
        /// The name.
        name: String,
        /// Who said so.
        resolver: String,
    },
    /// The name exists but has neither A nor AAAA.
    #[error("{name} has no address, says {resolver}")]
    NoAddress {
        /// The name.
        name: String,
        /// Who said so.
        resolver: String,
    },
    /// A resolver failed: SERVFAIL, REFUSED and the like.
    #[error("{resolver} answered {rcode} for {name}")]
    Failed {
        /// The name.
        name: String,
        /// Who answered.
        resolver: String,
        /// The response code's name.
        rcode: String,
    },
    /// No resolver answered in time.
    #[error("no answer for {name} from {resolver} within {}", Lapse(*.limit))]
    Silent {
        /// The name.
        name: String,
        /// Who was asked, all of them.
        resolver: String,
        /// The limit.
        limit: Duration,
    },
    /// No resolver can be reached, or none may be asked from here.
    #[error("resolver {resolver} for {name} cannot be reached: {detail}")]
    Unreachable {
        /// The name.
        name: String,
        /// The resolver.
        resolver: String,
        /// Why not.
        detail: String,
    },
    /// An app connector, or an exit node, does not let this node ask it.
    #[error("{connector} does not let this node ask for {name}")]
    ConnectorRefused {
        /// The name.
        name: String,
        /// The connector's name and address.
        connector: String,
    },
    /// The text cannot be a DNS name.
    #[error("not a DNS name: {detail}")]
    BadName {
        /// What is wrong with it.
        detail: String,
    },
}
