//! From a target to a stream: who decides its name, whether a route covers it, and the connection itself.

#[cfg(test)]
pub(super) mod bed;
mod connect;
mod route;
#[cfg(test)]
mod tests;
mod wait;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{timeout, timeout_at};

pub(super) use self::connect::{NEXT_ADDRESS, Verdict, unopened, verdict};
pub(super) use self::route::{is_public, no_family};
pub(super) use self::wait::WiderRoutes;
use self::wait::{Sought, until_routed};
use super::error::ResolveError;
pub use super::error::{DialError, DirectError, Exhausted, Gap, RouteError};
use super::resolve::{Ask, By, Resolved};
pub use super::target::{DirectRule, Host, Target};
use super::{Inner, State, Stream, direct};
use crate::netmap::Netmap;

/// How often a name is decided anew because the tailnet's settings have changed while it was asked.
const DECISIONS: usize = 4;

/// The time that a connector's route leaves for connecting: a handshake through a relay and a lost SYN fit in.
const CONNECTING: Duration = Duration::from_secs(5);

/// Where a target is.
pub(super) enum Place {
    /// At these addresses, which routes cover, the best first; at least one.
    Tunnel(Arc<Netmap>, Vec<IpAddr>),
    /// Outside the tailnet, where the user allowed it, at these addresses; at least one.
    Outside(Vec<SocketAddr>),
}

/// See [`Node::dial`](super::Node::dial).
pub(super) async fn dial(node: &Inner, target: &Target) -> Result<Stream, DialError> {
    let netmap = joined(node).await?;
    let deadline = Instant::now() + node.config.dial_timeout;
    match locate(node, netmap, target, deadline).await? {
        Place::Tunnel(netmap, addresses) => {
            let connected = connect::connect_any(node, &netmap, target.port, addresses, deadline).await;
            connected.map(Stream::Tunnel)
        }
        Place::Outside(addresses) => {
            note_outside(node, target);
            direct::connect(node, addresses, deadline).await.map(Stream::Direct)
        }
    }
}

/// Says where `target` is: for TCP and UDP alike, and the only place where anything is let out of the tailnet. What was
/// asked while the tailnet decided otherwise counts for nothing: then it is decided again.
pub(super) async fn locate(
    node: &Inner,
    netmap: Arc<Netmap>,
    target: &Target,
    deadline: Instant,
) -> Result<Place, DialError> {
    let Host::Name(name) = &target.host else { return locate_once(node, netmap, target, deadline).await };
    let newest = || node.netmap.borrow().clone().unwrap_or_else(|| netmap.clone());
    for _ in 0..DECISIONS {
        let begun = newest();
        let place = locate_once(node, begun.clone(), target, deadline).await;
        if node.resolvers.decided_alike(&begun, &newest(), name) {
            return place;
        }
    }
    let (resolver, detail) = ("the tailnet's".to_owned(), "the tailnet's settings keep changing".to_owned());
    Err(ResolveError::Unreachable { name: name.clone(), resolver, detail }.into())
}

async fn locate_once(
    node: &Inner,
    netmap: Arc<Netmap>,
    target: &Target,
    deadline: Instant,
) -> Result<Place, DialError> {
    if rule_for(node, &target.host).is_some() && is_outside(node, &netmap, &target.host)? {
        return direct::addresses(node, target, deadline).await.map(Place::Outside);
    }
    let resolved = match &target.host {
        Host::Ip(ip) => Resolved { addresses: vec![ip.to_canonical()], by: By::Tailnet, remembered: false },
        Host::Name(name) => resolve(node, &netmap, name, Ask::Remembered, deadline).await?,
    };
    if let (Host::Name(name), By::Connector { connectors }) = (&target.host, &resolved.by) {
        let sought = Sought { name, connectors, addresses: route::canonical(&resolved.addresses) };
        // Being asked is what makes a connector advertise a route; a remembered answer's may be gone.
        let again = async {
            match resolved.remembered {
                true => resolve(node, &netmap, name, Ask::Anew, deadline).await.map(|resolved| resolved.addresses),
                false => std::future::pending().await,
            }
        };
        let routed_by = deadline - connecting_share(node.config.dial_timeout);
        let (netmap, addresses) = until_routed(node, netmap.clone(), sought, again, routed_by).await?;
        let addresses = route::in_order(&netmap, &addresses);
        return Ok(Place::Tunnel(netmap, addresses));
    }
    // The newest netmap counts: a route may have come or gone while the name was asked.
    let netmap = node.netmap.borrow().clone().unwrap_or(netmap);
    let routed = route::routed(&netmap, &target.host, &resolved)?;
    let addresses = route::in_order(&netmap, &routed);
    Ok(Place::Tunnel(netmap, addresses))
}

/// The rule of the user's that lets `host` out, if nobody in the tailnet knows it.
fn rule_for<'n>(node: &'n Inner, host: &Host) -> Option<&'n DirectRule> {
    node.config.direct_allow.iter().find(|rule| rule.allows(host))
}

/// Counts a target that is about to be reached outside.
pub(super) fn note_outside(node: &Inner, target: &Target) {
    if let Some(rule) = rule_for(node, &target.host) {
        node.outside.borrow_mut().note(target, rule);
    }
}

/// What a wait for a route leaves of a dial for connecting: a route that comes late is of no use without.
fn connecting_share(dial_timeout: Duration) -> Duration {
    CONNECTING.min(dial_timeout / 4)
}

/// Whether nobody in the tailnet knows `host`: only then may a rule let it out. What the tailnet names, routes or has
/// once routed is never dialled outside, whatever the rules say. A rule is narrower than an exit node, though.
pub(super) fn is_outside(node: &Inner, netmap: &Netmap, host: &Host) -> Result<bool, DialError> {
    match host {
        Host::Ip(ip) => Ok(is_public(netmap, ip.to_canonical())),
        Host::Name(name) => node.resolvers.is_outside(netmap, name),
    }
}

/// Asks for a name, no longer than the dial may take.
async fn resolve(
    node: &Inner,
    netmap: &Arc<Netmap>,
    name: &str,
    ask: Ask,
    deadline: Instant,
) -> Result<Resolved, DialError> {
    let begun = Instant::now();
    let asked = node.resolvers.resolve(netmap, name, ask);
    match timeout_at(deadline.into(), asked).await {
        Ok(resolved) => resolved,
        Err(_) => Err(node.resolvers.unanswered(netmap, name, node.config.dial_timeout, begun).into()),
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
