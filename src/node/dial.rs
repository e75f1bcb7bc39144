//! From a target to a stream: who decides its name, whether a route covers it, and the connection itself.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::{timeout, timeout_at};
use tracing::info;

use super::core::Shared;
use super::error::ResolveError;
pub use super::error::{DialError, DirectError, Exhausted, RouteError};
use super::resolve::{Ask, By, Resolved};
pub use super::target::{DirectRule, Host, Target};
use super::tunnel::{ConnectFailure, TunnelStream};
use super::{Inner, State, Stream, direct};
use crate::key::NodePublic;
use crate::netmap::{Netmap, tailnet_range};
use crate::transport::race::race;

/// How long a peer has to answer that control calls offline: control may be late, but seldom is.
const OFFLINE_LIMIT: Duration = Duration::from_secs(5);
/// How long the first address of a target has to answer before the next is tried beside it.
/// Source: RFC 8305, 8 (connection attempt delay); Tailscale uses 300 ms too.
const NEXT_ADDRESS: Duration = Duration::from_millis(300);

/// Where a target is.
pub(super) enum Place {
    /// At these addresses, which routes cover; at least one.
    Tunnel(Arc<Netmap>, Vec<IpAddr>),
    /// Outside the tailnet, where the user allowed it.
    Outside(Arc<Netmap>),
}

/// See [`Node::dial`](super::Node::dial).
pub(super) async fn dial(node: &Inner, target: &Target) -> Result<Stream, DialError> {
    let netmap = joined(node).await?;
    let deadline = Instant::now() + node.config.dial_timeout;
    match locate(node, netmap, target, deadline).await? {
        Place::Tunnel(netmap, addresses) => {
            connect_any(node, &netmap, target.port, addresses, deadline).await.map(Stream::Tunnel)
        }
        Place::Outside(netmap) => direct::connect(&netmap, target, deadline).await.map(Stream::Direct),
    }
}

/// Says where `target` is: for TCP and UDP alike, and the only place where anything is let out of the tailnet.
pub(super) async fn locate(
    node: &Inner,
    netmap: Arc<Netmap>,
    target: &Target,
    deadline: Instant,
) -> Result<Place, DialError> {
    if node.config.direct_allow.iter().any(|rule| rule.allows(&target.host)) && is_outside(node, &netmap, &target.host)?
    {
        info!(port = target.port, "dialled outside the tailnet, as --direct-allow permits");
        return Ok(Place::Outside(netmap));
    }
    let resolved = match &target.host {
        Host::Ip(ip) => Resolved { addresses: vec![ip.to_canonical()], by: By::Tailnet, remembered: false },
        Host::Name(name) => resolve(node, &netmap, name, deadline).await?,
    };
    // The newest netmap counts: a route may have come or gone while the name was asked.
    let netmap = node.netmap.borrow().clone().unwrap_or(netmap);
    let routed = routed(&netmap, node, target, &resolved)?;
    Ok(Place::Tunnel(netmap, routed))
}

/// Whether nobody in the tailnet knows `host`: only then may a rule let it out. What the tailnet names, routes or has
/// once routed is never dialled outside, whatever the rules say.
fn is_outside(node: &Inner, netmap: &Netmap, host: &Host) -> Result<bool, DialError> {
    match host {
        Host::Ip(ip) => Ok(is_public(netmap, ip.to_canonical())),
        Host::Name(name) => node.resolvers.is_outside(netmap, name),
    }
}

/// Whether an address is neither the tailnet's own, nor routed, nor was routed in this run.
pub(super) fn is_public(netmap: &Netmap, ip: IpAddr) -> bool {
    !tailnet_range(ip) && netmap.route(ip).is_none() && !netmap.was_routed(ip)
}

/// Asks for a name, no longer than the dial may take.
async fn resolve(node: &Inner, netmap: &Arc<Netmap>, name: &str, deadline: Instant) -> Result<Resolved, DialError> {
    let asked = node.resolvers.resolve(netmap, name, Ask::Remembered);
    match timeout_at(deadline.into(), asked).await {
        Ok(resolved) => resolved,
        Err(_) => {
            let (resolver, limit) = ("the tailnet's resolvers".to_owned(), node.config.dial_timeout);
            Err(ResolveError::Silent { name: name.to_owned(), resolver, limit }.into())
        }
    }
}

/// Waits until the node is in, at most `hold_timeout`.
pub(super) async fn joined(node: &Inner) -> Result<Arc<Netmap>, DialError> {
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
fn routed(netmap: &Netmap, node: &Inner, target: &Target, resolved: &Resolved) -> Result<Vec<IpAddr>, DialError> {
    let (covered, mut routed): (Vec<IpAddr>, Vec<IpAddr>) = resolved
        .addresses
        .iter()
        .map(IpAddr::to_canonical)
        .filter(|ip| netmap.route(*ip).is_some())
        .partition(|ip| node.core.borrow().source_for(*ip).is_none());
    routed.sort_by_key(|ip| ip.is_ipv6());
    if !routed.is_empty() {
        return Ok(routed);
    }
    if let Some(&address) = covered.first() {
        let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
        return Err(RouteError::Family { address, family }.into());
    }
    let public = || DialError::Public { host: target.host.clone() };
    let Some(&address) = resolved.addresses.first() else { return Err(public()) };
    let why = unrouted(netmap, address.to_canonical());
    Err(match &target.host {
        Host::Name(_) if resolved.by == By::Default && matches!(why, DialError::Public { .. }) => public(),
        Host::Name(name) if matches!(why, DialError::Public { .. }) => {
            RouteError::Answer { name: name.clone(), address }.into()
        }
        Host::Name(_) | Host::Ip(_) => why,
    })
}

/// Why no route covers an address: it was withdrawn, belongs to the tailnet all the same, or is public.
fn unrouted(netmap: &Netmap, address: IpAddr) -> DialError {
    if netmap.self_node.addresses.contains(&address) {
        return RouteError::Own { address }.into();
    }
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
    let attempts = addresses.into_iter().map(|ip| async move {
        tokio::select! {
            connected = connect(&node.core, netmap, SocketAddr::new(ip, port), deadline) => connected,
            error = withdrawal(node.netmap.clone(), ip) => Err(error),
        }
    });
    let first = |failures: Vec<DialError>| {
        failures.into_iter().next().expect("there is at least one address, and each one's failure is kept")
    };
    race(attempts, NEXT_ADDRESS).await.map_err(first)
}

/// Waits until no route covers `ip` any more: whoever dials it need not wait for its silence.
async fn withdrawal(mut newest: watch::Receiver<Option<Arc<Netmap>>>, ip: IpAddr) -> DialError {
    let gone = |netmap: &Option<Arc<Netmap>>| netmap.as_ref().is_some_and(|netmap| netmap.route(ip).is_none());
    let found = newest.wait_for(gone).await.ok().and_then(|netmap| netmap.clone());
    match found {
        Some(netmap) => unrouted(&netmap, ip),
        None => std::future::pending().await,
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
    let mut limit = deadline.saturating_duration_since(begun);
    if peer.online == Some(false) && !has_session(core, &peer.key) {
        limit = limit.min(OFFLINE_LIMIT);
    }
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
        ConnectFailure::Ports => Exhausted::Ports { address }.into(),
        ConnectFailure::Memory => Exhausted::Memory.into(),
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
