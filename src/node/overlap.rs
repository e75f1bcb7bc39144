//! Subnet routes that overlap a network of this machine: the tailnet's are used, and that is said once.
//!
//! Targets are dialled through the tunnel whatever the machine's own routes say, so there is nothing to decide; but
//! whoever wonders why a printer next door does not answer finds it in the log.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;
use tokio::sync::watch;
use tracing::{debug, info};

use crate::netmap::{Netmap, Peer, tailnet_range};
use crate::transport::interfaces::local_networks;

/// Looks at every netmap for subnet routes that overlap a local network, until there are no more netmaps.
pub(super) async fn watch(mut newest: watch::Receiver<Option<Arc<Netmap>>>, accepts_routes: bool) {
    if !accepts_routes {
        return;
    }
    let (mut before, mut known) = (None, BTreeSet::new());
    while newest.changed().await.is_ok() {
        let netmap = newest.borrow_and_update().clone();
        let Some(netmap) = netmap else { continue };
        let changed: Vec<IpNet> = changed_routes(before.as_deref(), &netmap);
        before = Some(netmap);
        // A connector's thousandth address is not worth asking the system for its interfaces once more.
        if changed.is_empty() {
            continue;
        }
        let found: Vec<IpNet> =
            overlaps(&changed, &local_networks()).into_iter().filter(|route| known.insert(*route)).collect();
        if !found.is_empty() {
            info!(routes = found.len(), "subnet routes overlap a network of this machine; the tailnet's are used");
            debug!(routes = ?found, "overlapping subnet routes");
        }
    }
}

/// The subnet routes of peers that are not as they were before.
fn changed_routes(before: Option<&Netmap>, netmap: &Netmap) -> Vec<IpNet> {
    let same = |peer: &Arc<Peer>| {
        let old = before.and_then(|before| before.peers.get(&peer.id));
        old.is_some_and(|old| Arc::ptr_eq(old, peer) || old.allowed_ips == peer.allowed_ips)
    };
    let changed = netmap.peers.values().filter(|peer| !same(peer));
    let subnet = |net: &IpNet| net.prefix_len() > 0 && !tailnet_range(net.addr());
    changed.flat_map(|peer| peer.allowed_ips.iter().copied()).filter(subnet).collect()
}

/// The routes that share an address with one of `networks`.
fn overlaps(routes: &[IpNet], networks: &[IpNet]) -> BTreeSet<IpNet> {
    let shares = |route: &&IpNet| networks.iter().any(|net| net.contains(*route) || route.contains(net));
    routes.iter().filter(shares).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(nets: &[&str]) -> Vec<IpNet> {
        nets.iter().map(|net| net.parse().unwrap()).collect()
    }

    #[test]
    fn a_route_overlaps_a_network_when_either_contains_the_other() {
        let routes = nets(&["10.0.0.0/8", "10.1.2.3/32", "192.168.0.0/16", "fd20::/64"]);
        let found = overlaps(&routes, &nets(&["10.1.2.0/24", "fd20::/48"]));
        assert_eq!(found, nets(&["10.0.0.0/8", "10.1.2.3/32", "fd20::/64"]).into_iter().collect());
        assert!(overlaps(&routes, &[]).is_empty());
    }
}
