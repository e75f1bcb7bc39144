//! Which routes of peers are used, and what each peer serves to us by that.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{NodeId, Peer, RouteKind};

/// Where nodes have their IPv4 addresses. Source: Tailscale, net/tsaddr, `CGNATRange`.
const TAILNET_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10);

/// Where nodes have their IPv6 addresses. Source: Tailscale, net/tsaddr, `TailscaleULARange`.
const TAILNET_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0), 48);

/// Whether `ip` is in the ranges that tailnets take their addresses from. Such an address is never
/// public, whether a node has it or not.
pub fn tailnet_range(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => TAILNET_V4.contains(&ip),
        IpAddr::V6(ip) => TAILNET_V6.contains(&ip),
    }
}

/// Which routes of peers are used.
#[derive(Debug, Clone, Default)]
pub(super) struct Accept {
    /// Whether subnet routes are.
    pub(super) subnets: bool,
    /// Whose routes to everything are: a stable id, a full or short name, or an address.
    pub(super) exit_node: Option<String>,
}

impl Accept {
    /// The peer whose routes to everything are used. `suffix` is what names of our tailnet end with. Of several peers
    /// that the setting fits, the most exact counts: a node shared in from elsewhere never takes the place of ours.
    pub(super) fn exit_node<'a>(&self, peers: impl Iterator<Item = &'a Arc<Peer>>, suffix: &str) -> Option<NodeId> {
        let wanted = self.exit_node.as_ref()?;
        let offers = |peer: &Peer| usable(peer) && peer.allowed_ips.iter().any(|net| net.prefix_len() == 0);
        let fits = peers.filter(|peer| offers(peer)).filter_map(|peer| Some((fit(peer, wanted, suffix)?, peer.id)));
        fits.min().map(|(_, id)| id)
    }

    /// What `peer` serves to us, each prefix once.
    pub(super) fn served(&self, peer: &Peer, exit_node: Option<NodeId>) -> impl Iterator<Item = (IpNet, RouteKind)> {
        let own = usable(peer).then(|| peer.addresses.iter().map(|ip| IpNet::from(*ip))).into_iter().flatten();
        let served = usable(peer).then_some(&peer.allowed_ips).into_iter().flatten().copied();
        let mut served: BTreeMap<IpNet, RouteKind> =
            served.chain(own).map(|prefix| (prefix, kind(peer, prefix))).collect();
        served.retain(|_, kind| match kind {
            RouteKind::Address => true,
            RouteKind::Subnet => self.subnets,
            RouteKind::Exit => exit_node == Some(peer.id),
        });
        served.into_iter()
    }
}

/// A single address in the tailnet's ranges counts as the peer's own: services have such addresses too.
fn kind(peer: &Peer, prefix: IpNet) -> RouteKind {
    if prefix.prefix_len() == 0 {
        return RouteKind::Exit;
    }
    let single = prefix.prefix_len() == prefix.max_prefix_len();
    if single && (tailnet_range(prefix.addr()) || peer.addresses.contains(&prefix.addr())) {
        return RouteKind::Address;
    }
    RouteKind::Subnet
}

/// Whether anything may be sent to a peer, and can be.
pub(super) fn usable(peer: &Peer) -> bool {
    !peer.expired && (peer.disco.is_some() || peer.home_derp.is_some() || peer.wireguard_only)
}

/// How exactly `wanted` means the peer; less is more exact. `None` if it does not.
fn fit(peer: &Peer, wanted: &str, suffix: &str) -> Option<u8> {
    let name = wanted.trim_end_matches('.').to_ascii_lowercase();
    let short = peer.name.split_once('.').filter(|(_, rest)| *rest == suffix).map_or("", |(short, _)| short);
    let fits = [
        peer.stable_id == wanted,
        wanted.parse().is_ok_and(|ip: IpAddr| peer.addresses.contains(&ip.to_canonical())),
        peer.name == name,
        short == name,
    ];
    fits.iter().position(|fits| *fits).filter(|_| !name.is_empty()).map(|at| at as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tailnet_ranges_end_where_they_end() {
        let inside = ["100.64.0.0", "100.127.255.255", "fd7a:115c:a1e0::1", "::ffff:100.64.0.1"];
        let outside = ["100.63.255.255", "100.128.0.0", "fd7a:115c:a1e1::1", "10.0.0.1"];
        assert!(inside.iter().all(|ip| tailnet_range(ip.parse().unwrap())));
        assert!(!outside.iter().any(|ip| tailnet_range(ip.parse().unwrap())));
    }
}
