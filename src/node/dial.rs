//! From a target to a stream: who decides its name, whether a route covers it, and the connection itself.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::info;

use super::core::Shared;
use super::resolve::ResolveError;
use super::tunnel::{ConnectFailure, TunnelStream};
use super::{Inner, NodeError, State, Stream, direct};
use crate::key::NodePublic;
use crate::netmap::{Netmap, tailnet_range};

/// A host as a client names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// A DNS name, as given.
    Name(String),
    /// An address.
    Ip(IpAddr),
}

/// What a client wants to reach.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// The host.
    pub host: Host,
    /// The TCP port.
    pub port: u16,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Ip(IpAddr::V4(ip)) => write!(f, "{ip}"),
            Self::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// A destination that the user lets out of the tailnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DirectRule {
    /// This name alone, lower case, without trailing dot.
    Name(String),
    /// Every name below this suffix, given as `*.suffix`; not the suffix itself.
    Suffix(String),
    /// Addresses inside this prefix.
    Net(IpNet),
}

impl DirectRule {
    /// Whether the rule lets `host` out.
    pub fn allows(&self, host: &Host) -> bool {
        match (self, host) {
            (Self::Name(rule), Host::Name(name)) => name.trim_end_matches('.').eq_ignore_ascii_case(rule),
            (Self::Suffix(rule), Host::Name(name)) => {
                let name = name.trim_end_matches('.').to_ascii_lowercase();
                name.strip_suffix(rule.as_str()).is_some_and(|head| head.len() > 1 && head.ends_with('.'))
            }
            (Self::Net(net), Host::Ip(ip)) => net.contains(ip),
            (Self::Name(_) | Self::Suffix(_), Host::Ip(_)) | (Self::Net(_), Host::Name(_)) => false,
        }
    }
}

/// Why a target was not reached.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DialError {
    /// The node has not joined within `hold_timeout`; carries what it waits for.
    #[error("the node has not joined the tailnet within {limit:?}")]
    NotJoined {
        /// The hold limit.
        limit: Duration,
        /// Why, once the node has failed for good.
        cause: Option<Arc<NodeError>>,
    },
    /// No tailnet route or name covers the target, so it would leave by the public internet.
    #[error("{host} is not in the tailnet; it would be public")]
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
    /// The peer that owns the route never answered a handshake.
    #[error("{peer} did not answer {tries} WireGuard handshakes in {waited:?}")]
    PeerSilent {
        /// The peer's name.
        peer: String,
        /// Handshakes sent.
        tries: u64,
        /// How long.
        waited: Duration,
    },
    /// The peer is there, but nothing answered the SYN.
    #[error("the tunnel to {peer} is up, but {address} did not answer in {waited:?}")]
    Unanswered {
        /// The peer's name.
        peer: String,
        /// The address that was dialled.
        address: SocketAddr,
        /// How long.
        waited: Duration,
    },
    /// The peer's packet filter refused the connection (TSMP).
    #[error("{peer} rejected the connection: {reason}")]
    Rejected {
        /// The peer's name.
        peer: String,
        /// The TSMP reason in words.
        reason: String,
    },
    /// The target refused with a RST, or an allowed direct connection failed.
    #[error("{address} refused the connection")]
    Refused {
        /// The address that was dialled.
        address: SocketAddr,
    },
    /// The system has no memory for another connection.
    #[error("no memory for another connection")]
    OutOfMemory,
    /// A limit of ours: no local port is free for that destination.
    #[error("no local port is free for {address}")]
    PortsExhausted {
        /// The address that was dialled.
        address: SocketAddr,
    },
}

/// Why an address that belongs to the tailnet has no usable route.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// No peer serves the address: a tailnet address without a node, or a subnet that nobody (any longer) routes.
    #[error("no peer routes {address}")]
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
    /// We have no address of that family.
    #[error("this node has no {family} address for {address}")]
    Family {
        /// The address.
        address: IpAddr,
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
}

/// How long the first address of a target has to answer before the next is tried beside it.
/// Source: RFC 8305, 8 (connection attempt delay); Tailscale uses 300 ms too.
const NEXT_ADDRESS: Duration = Duration::from_millis(300);

/// See [`Node::dial`](super::Node::dial).
pub(super) async fn dial(node: &Inner, target: &Target) -> Result<Stream, DialError> {
    if node.config.direct_allow.iter().any(|rule| rule.allows(&target.host)) {
        info!(port = target.port, "dialled outside the tailnet, as --direct-allow permits");
        return direct::connect(target, node.config.dial_timeout).await.map(Stream::Direct);
    }
    let netmap = joined(node).await?;
    let deadline = Instant::now() + node.config.dial_timeout;
    let addresses = match &target.host {
        Host::Ip(ip) => vec![*ip],
        Host::Name(name) => node.resolvers.resolve(&node.core, &netmap, name).await?,
    };
    // The newest netmap counts: a route may have come or gone while the name was asked.
    let netmap = node.netmap.borrow().clone().unwrap_or(netmap);
    let routed = routed(&netmap, node, target, &addresses)?;
    connect_any(node, &netmap, target.port, routed, deadline).await.map(Stream::Tunnel)
}

/// Waits until the node is in, at most `hold_timeout`.
async fn joined(node: &Inner) -> Result<Arc<Netmap>, DialError> {
    let limit = node.config.hold_timeout;
    let mut state = node.state.clone();
    let waited = timeout(limit, state.wait_for(|state| !matches!(state, State::Joining { .. }))).await;
    if let Ok(Ok(state)) = &waited
        && let State::Failed(cause) = &**state
    {
        return Err(DialError::NotJoined { limit, cause: Some(cause.clone()) });
    }
    drop(waited);
    node.netmap.borrow().clone().ok_or(DialError::NotJoined { limit, cause: None })
}

/// The addresses that a route covers, IPv4 first as everybody does inside a tailnet. If there is none, why.
fn routed(netmap: &Netmap, node: &Inner, target: &Target, addresses: &[IpAddr]) -> Result<Vec<IpAddr>, DialError> {
    let mut routed: Vec<IpAddr> = addresses
        .iter()
        .copied()
        .filter(|ip| netmap.route(*ip).is_some() && node.core.borrow().source_for(*ip).is_some())
        .collect();
    routed.sort_by_key(|ip| ip.is_ipv6());
    if !routed.is_empty() {
        return Ok(routed);
    }
    let Some(&address) = addresses.first() else { return Err(DialError::Public { host: target.host.clone() }) };
    Err(match &target.host {
        _ if netmap.route(address).is_some() => {
            RouteError::Family { address, family: if address.is_ipv4() { "IPv4" } else { "IPv6" } }.into()
        }
        Host::Ip(_) => unrouted(netmap, address),
        Host::Name(name) => {
            let why = unrouted(netmap, address);
            let public = matches!(why, DialError::Public { .. });
            if public { RouteError::Answer { name: name.clone(), address }.into() } else { why }
        }
    })
}

/// Why no route covers an address: it was withdrawn, belongs to the tailnet all the same, or is public.
fn unrouted(netmap: &Netmap, address: IpAddr) -> DialError {
    if let Some(peer) = netmap.peer_by_ip(address) {
        return RouteError::Offline { address, router: peer.name.clone() }.into();
    }
    if netmap.was_routed(address) {
        return RouteError::Withdrawn { address }.into();
    }
    if tailnet_range(address) {
        return RouteError::None { address }.into();
    }
    DialError::Public { host: Host::Ip(address) }
}

/// Connects to whichever address answers first; each next one joins in after a pause, or when one before it has failed.
async fn connect_any(
    node: &Inner,
    netmap: &Arc<Netmap>,
    port: u16,
    addresses: Vec<IpAddr>,
    deadline: Instant,
) -> Result<TunnelStream, DialError> {
    let mut tries = JoinSet::new();
    let mut waiting = addresses.into_iter();
    let mut first_error = None;
    loop {
        if let Some(ip) = waiting.next() {
            let (core, netmap) = (node.core.clone(), netmap.clone());
            tries.spawn_local(async move { connect(&core, &netmap, SocketAddr::new(ip, port), deadline).await });
        } else if tries.is_empty() {
            return Err(first_error.expect("there is at least one address, and each one's failure is kept"));
        }
        let ended = if waiting.len() > 0 {
            timeout(NEXT_ADDRESS, tries.join_next()).await.ok().flatten()
        } else {
            tries.join_next().await
        };
        match ended {
            Some(Ok(Ok(stream))) => return Ok(stream),
            Some(Ok(Err(error))) => {
                first_error.get_or_insert(error);
            }
            Some(Err(_)) | None => {}
        }
    }
}

/// Connects to one address, and says why it failed by what is known of the peer that serves it.
async fn connect(
    core: &Shared,
    netmap: &Netmap,
    address: SocketAddr,
    deadline: Instant,
) -> Result<TunnelStream, DialError> {
    let begun = Instant::now();
    let Some(route) = netmap.route(address.ip()) else { return Err(unrouted(netmap, address.ip())) };
    let peer = route.peer.clone();
    let handshakes_before = handshakes(core, &peer.key);
    let limit = deadline.saturating_duration_since(begun);
    let failure = match TunnelStream::connect(core, address, limit).await {
        Ok(stream) => return Ok(stream),
        Err(failure) => failure,
    };
    let (name, waited) = (peer.name.clone(), begun.elapsed());
    Err(match failure {
        ConnectFailure::Family => {
            let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
            RouteError::Family { address: address.ip(), family }.into()
        }
        ConnectFailure::Ports => DialError::PortsExhausted { address },
        ConnectFailure::Memory => DialError::OutOfMemory,
        ConnectFailure::Refused => DialError::Refused { address },
        ConnectFailure::Rejected(reason) => DialError::Rejected { peer: name, reason: reason.to_string() },
        ConnectFailure::Unanswered if has_session(core, &peer.key) => {
            DialError::Unanswered { peer: name, address, waited }
        }
        ConnectFailure::Unanswered if peer.online == Some(false) => {
            RouteError::Offline { address: address.ip(), router: name }.into()
        }
        ConnectFailure::Unanswered => {
            let tries = handshakes(core, &peer.key).saturating_sub(handshakes_before);
            DialError::PeerSilent { peer: name, tries, waited }
        }
    })
}

/// Handshakes sent to a peer so far.
fn handshakes(core: &Shared, peer: &NodePublic) -> u64 {
    core.borrow_mut().engine().peer_status(peer, Instant::now()).map_or(0, |status| status.handshakes_sent)
}

/// Whether WireGuard has a session with a peer right now.
fn has_session(core: &Shared, peer: &NodePublic) -> bool {
    core.borrow_mut().engine().peer_status(peer, Instant::now()).is_some_and(|status| status.established)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(text: &str) -> Host {
        text.parse().map_or_else(|_| Host::Name(text.to_owned()), Host::Ip)
    }

    #[test]
    fn a_direct_rule_lets_out_what_it_names_and_no_more() {
        let name = DirectRule::Name("cdn.example".into());
        assert!(name.allows(&host("CDN.example.")) && !name.allows(&host("x.cdn.example")));
        let suffix = DirectRule::Suffix("example".into());
        assert!(suffix.allows(&host("a.example")) && suffix.allows(&host("a.b.EXAMPLE")));
        assert!(
            !suffix.allows(&host("example"))
                && !suffix.allows(&host("badexample"))
                && !suffix.allows(&host(".example"))
        );
        let net = DirectRule::Net("192.0.2.0/24".parse().unwrap());
        assert!(net.allows(&host("192.0.2.9")) && !net.allows(&host("192.0.3.9")) && !net.allows(&host("a.example")));
    }

    #[test]
    fn targets_print_as_authorities() {
        assert_eq!(Target { host: host("::1"), port: 80 }.to_string(), "[::1]:80");
        assert_eq!(Target { host: host("a.example"), port: 443 }.to_string(), "a.example:443");
    }
}
