//! What a netmap says of addresses: which of them may be dialled, in which order, and why one may not.
//!
//! Nothing here waits or sends; [`super::wait`] and [`super::connect`] act on what it says.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::super::resolve::{By, Resolved};
use super::{DialError, Host, RouteError};
use crate::netmap::{Netmap, Route, RouteKind, is_internet, tailnet_range};

/// The most addresses of one name that are dialled. An app connector's answer may hold a hundred; if sixteen of them are
/// dead, so is the name, and each attempt costs buffers and, where a peer is silent, a place beside the others.
const ADDRESSES_MAX: usize = 16;

/// How far the routes to an app connector's answer have come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// The connectors' own routes cover these addresses, at least one.
    Own(Vec<IpAddr>),
    /// Only another peer's wider route covers them, at least one; this is the first one's router.
    Wider(Vec<IpAddr>, Router),
    /// No route covers any.
    Nothing,
}

/// Who stands in for a connector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Router {
    /// Its number in the netmap.
    pub(super) id: i64,
    /// Its name.
    pub(super) name: String,
    /// Whether it routes the address alone: no route of a connector could be narrower.
    pub(super) exact: bool,
}

/// How far the routes to `addresses`, as an app connector gave them, have come. An address of a node of the tailnet is
/// reached as such; an exit node's route to everything leads past the connector, so it never counts.
pub(super) fn reach(netmap: &Netmap, addresses: &[IpAddr], connectors: &[IpAddr]) -> Reach {
    let (mut own, mut wider, mut router) = (Vec::new(), Vec::new(), None);
    for &ip in addresses.iter().filter(|ip| has_family(netmap, **ip)) {
        let Some(route) = netmap.route(ip) else { continue };
        match route.kind {
            RouteKind::Exit => {}
            RouteKind::Address => own.push(ip),
            RouteKind::Subnet if is_connectors(&route, connectors) => own.push(ip),
            RouteKind::Subnet => {
                wider.push(ip);
                let exact = is_exact(&route);
                router.get_or_insert_with(|| Router { id: route.peer.id, name: route.peer.name.clone(), exact });
            }
        }
    }
    match router {
        _ if !own.is_empty() => Reach::Own(own),
        Some(router) => Reach::Wider(wider, router),
        None => Reach::Nothing,
    }
}

/// Whether a route is one of the suffix's connectors. Another app connector counts where it routes the address alone: it
/// has learned it as these do. A network behind it is as foreign as any router's.
fn is_connectors(route: &Route<'_>, connectors: &[IpAddr]) -> bool {
    connectors.iter().any(|ip| route.peer.addresses.contains(ip)) || (route.peer.app_connector && is_exact(route))
}

fn is_exact(route: &Route<'_>) -> bool {
    route.prefix.prefix_len() == route.prefix.max_prefix_len()
}

/// Whether we have an address of that family to send from, by the name that its router knows us by.
pub(super) fn has_family(netmap: &Netmap, ip: IpAddr) -> bool {
    netmap.source_for(ip).is_some()
}

/// The failure for an address of a family that we have no address of.
pub(in crate::node) fn no_family(address: IpAddr) -> RouteError {
    RouteError::Family { address, family: if address.is_ipv4() { "IPv4" } else { "IPv6" } }
}

/// The addresses in the form that routes have, each once.
pub(super) fn canonical(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let mut seen = BTreeSet::new();
    addresses.iter().map(IpAddr::to_canonical).filter(|ip| seen.insert(*ip)).collect()
}

/// The addresses that a route covers. If there is none, why.
pub(super) fn routed(netmap: &Netmap, host: &Host, resolved: &Resolved) -> Result<Vec<IpAddr>, DialError> {
    let (routed, covered): (Vec<IpAddr>, Vec<IpAddr>) = canonical(&resolved.addresses)
        .into_iter()
        .filter(|ip| netmap.route(*ip).is_some())
        .partition(|ip| has_family(netmap, *ip));
    if !routed.is_empty() {
        return Ok(routed);
    }
    if let Some(&address) = covered.first() {
        return Err(no_family(address).into());
    }
    let public = || DialError::Public { host: host.clone() };
    let Some(&address) = resolved.addresses.first() else { return Err(public()) };
    let why = unrouted(netmap, address.to_canonical());
    Err(match host {
        Host::Name(_) if resolved.by == By::Default && matches!(why, DialError::Public { .. }) => public(),
        Host::Name(name) if matches!(why, DialError::Public { .. }) => {
            RouteError::Answer { name: name.clone(), address }.into()
        }
        Host::Name(_) | Host::Ip(_) => why,
    })
}

/// Why no route covers an address: it was withdrawn, belongs to the tailnet all the same, or is public.
pub(super) fn unrouted(netmap: &Netmap, address: IpAddr) -> DialError {
    if netmap.self_node.addresses.contains(&address) {
        return RouteError::Own { address }.into();
    }
    if let Some(peer) = netmap.peer_by_ip(address) {
        return RouteError::Offline { address, router: peer.name.clone() }.into();
    }
    // An exit node was there when the run began, or there would be no run.
    if netmap.was_routed(address) || (netmap.exit_wanted && is_internet(address)) {
        return RouteError::Withdrawn { address }.into();
    }
    if tailnet_range(address) {
        return RouteError::None { address }.into();
    }
    DialError::Public { host: Host::Ip(address) }
}

/// Whether an address is neither the tailnet's own, nor routed, nor was routed in this run. An exit node's route to
/// everything makes nothing the tailnet's.
pub(in crate::node) fn is_public(netmap: &Netmap, ip: IpAddr) -> bool {
    let routed = netmap.route(ip).is_some_and(|route| route.kind != RouteKind::Exit);
    !tailnet_range(ip) && !routed && !netmap.was_routed(ip)
}

/// The order in which addresses are tried: IPv4 first, as everybody does inside a tailnet, then the families in turn;
/// those whose router is offline after all others. No more than are worth it. Source: RFC 8305, 4.
pub(super) fn in_order(netmap: &Netmap, addresses: &[IpAddr]) -> Vec<IpAddr> {
    let offline = |ip: &IpAddr| netmap.route(*ip).is_some_and(|route| route.peer.online == Some(false));
    let (last, first): (Vec<IpAddr>, Vec<IpAddr>) = addresses.iter().partition(|ip| offline(ip));
    let mut order = in_turn(&first);
    order.extend(in_turn(&last));
    order.truncate(ADDRESSES_MAX);
    order
}

/// IPv4 and IPv6 in turn, for as long as there are both.
fn in_turn(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = addresses.iter().partition(|ip| ip.is_ipv4());
    let longer = v4.len().max(v6.len());
    (0..longer).flat_map(|at| [v4.get(at), v6.get(at)]).flatten().copied().collect()
}

#[cfg(test)]
mod tests;
