//! Which peer serves an address: the longest prefix over all usable peers.
//!
//! Nearly every prefix of a tailnet is one address, and an app connector brings thousands more, so
//! single addresses live in a hash map and only the rest in a trie.
//! Source: Tailscale, net/routemanager, and wgengine/wgcfg/nmcfg, `WGCfg`.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::joint::{JointPrefixMap, JointPrefixSet};

use super::{NodeId, Peer, Route, RouteKind};

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

fn usable(peer: &Peer) -> bool {
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

/// One peer's claim to a prefix; the best claim comes first in its list.
#[derive(Debug, Clone)]
struct Claim {
    peer: Arc<Peer>,
    kind: RouteKind,
}

impl Claim {
    /// Smaller is better.
    fn rank(&self) -> (u8, NodeId) {
        let availability = match self.peer.online {
            Some(true) => 0,
            None => 1,
            Some(false) => 2,
        };
        (availability, self.peer.id)
    }
}

/// All routes of a netmap.
#[derive(Debug, Default)]
pub(super) struct Routes {
    single: HashMap<IpAddr, Vec<Claim>>,
    wide: JointPrefixMap<IpNet, Vec<Claim>>,
}

impl Routes {
    /// The routes to `peers`.
    pub(super) fn new<'a>(
        peers: impl Iterator<Item = &'a Arc<Peer>>,
        accept: &Accept,
        exit_node: Option<NodeId>,
    ) -> Self {
        let mut routes = Self::default();
        for peer in peers {
            for (prefix, kind) in accept.served(peer, exit_node) {
                let claim = Claim { peer: Arc::clone(peer), kind };
                let claims = routes.claims(prefix);
                let place = claims.partition_point(|other| other.rank() < claim.rank());
                claims.insert(place, claim);
            }
        }
        routes
    }

    fn claims(&mut self, prefix: IpNet) -> &mut Vec<Claim> {
        if prefix.prefix_len() == prefix.max_prefix_len() {
            return self.single.entry(prefix.addr()).or_default();
        }
        self.wide.entry(prefix).or_default()
    }

    /// The best claim to the longest prefix that covers `ip`.
    pub(super) fn find(&self, ip: IpAddr) -> Option<Route<'_>> {
        let host = IpNet::from(ip);
        let (prefix, claims) = match self.single.get(&ip) {
            Some(claims) => (host, claims),
            None => self.wide.get_lpm(&host)?,
        };
        let best = claims.first()?;
        Some(Route { prefix, peer: &best.peer, kind: best.kind })
    }

    /// Whether the peer with this id has a claim to any prefix that covers `ip`.
    pub(super) fn serves(&self, id: NodeId, ip: IpAddr) -> bool {
        let has = |claims: &Vec<Claim>| claims.iter().any(|claim| claim.peer.id == id);
        self.single.get(&ip).is_some_and(has) || self.wide.cover_values(&IpNet::from(ip)).any(has)
    }
}

/// Prefixes that were ever routed in this run.
#[derive(Debug, Clone, Default)]
pub(super) struct Prefixes(JointPrefixSet<IpNet>);

impl Prefixes {
    /// Whether one of them covers `ip`.
    pub(super) fn cover(&self, ip: IpAddr) -> bool {
        self.0.is_covered(&IpNet::from(ip))
    }

    /// Adds a prefix unless it is covered already. The set is copied only when it changes while a
    /// netmap shares it.
    pub(super) fn add(this: &mut Arc<Self>, prefix: IpNet) {
        if !this.0.is_covered(&prefix) {
            Arc::make_mut(this).0.insert(prefix);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::key::{DiscoPublic, NodePublic};
    use crate::netmap::Masquerade;

    fn peer(id: NodeId, prefixes: &[&str]) -> Peer {
        Peer {
            id,
            stable_id: format!("n{id}"),
            name: format!("host{id}.tail.test"),
            key: NodePublic::from_bytes([id as u8; 32]),
            disco: Some(DiscoPublic::from_bytes([1; 32])),
            addresses: vec![IpAddr::from([100, 64, 0, id as u8])],
            allowed_ips: prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect(),
            primary_routes: Vec::new(),
            endpoints: Vec::new(),
            home_derp: None,
            online: None,
            expired: false,
            wireguard_only: false,
            jailed: false,
            masquerade: Masquerade::default(),
            peerapi: (0, 0),
            peerapi_dns_proxy: false,
            exit_dns: Vec::new(),
            app_connector: false,
            tags: Vec::new(),
        }
    }

    fn routes(peers: Vec<Peer>, accept: &Accept) -> Routes {
        let peers: Vec<_> = peers.into_iter().map(Arc::new).collect();
        Routes::new(peers.iter(), accept, accept.exit_node(peers.iter(), "tail.test"))
    }

    const SUBNETS: Accept = Accept { subnets: true, exit_node: None };

    fn owner(routes: &Routes, ip: &str) -> Option<(NodeId, RouteKind)> {
        routes.find(ip.parse().unwrap()).map(|route| (route.peer.id, route.kind))
    }

    #[test]
    fn the_longest_prefix_wins() {
        let table =
            routes(vec![peer(1, &["10.0.0.0/8"]), peer(2, &["10.1.0.0/16"]), peer(3, &["10.1.2.3/32"])], &SUBNETS);
        assert_eq!(owner(&table, "10.2.0.1"), Some((1, RouteKind::Subnet)));
        assert_eq!(owner(&table, "10.1.0.1"), Some((2, RouteKind::Subnet)));
        assert_eq!(owner(&table, "10.1.2.3"), Some((3, RouteKind::Subnet)));
        assert_eq!(owner(&table, "11.0.0.1"), None);
    }

    #[test]
    fn an_online_peer_comes_first_and_then_the_lowest_id() {
        let with = |id, online| Peer { online, ..peer(id, &["10.0.0.0/8"]) };
        let first = |peers| owner(&routes(peers, &SUBNETS), "10.0.0.1").unwrap().0;
        assert_eq!(first(vec![with(1, Some(false)), with(2, None), with(3, Some(true)), with(4, Some(true))]), 3);
        assert_eq!(first(vec![with(1, Some(false)), with(2, None), with(3, None)]), 2);
        assert_eq!(first(vec![with(2, Some(false)), with(5, Some(false))]), 2);
    }

    #[test]
    fn without_accepted_routes_only_addresses_are_served() {
        let table = routes(vec![peer(1, &["10.0.0.0/8", "1.2.3.4/32", "100.100.1.1/32"])], &Accept::default());
        assert_eq!(owner(&table, "10.0.0.1"), None);
        assert_eq!(owner(&table, "1.2.3.4"), None);
        assert_eq!(owner(&table, "100.100.1.1"), Some((1, RouteKind::Address)));
        assert_eq!(owner(&table, "100.64.0.1"), Some((1, RouteKind::Address)));
    }

    #[test]
    fn only_the_chosen_exit_node_serves_everything() {
        let peers = || vec![peer(1, &["0.0.0.0/0", "::/0"]), peer(2, &["0.0.0.0/0", "::/0"])];
        assert_eq!(owner(&routes(peers(), &SUBNETS), "8.8.8.8"), None);
        for wanted in ["n2", "host2", "HOST2.tail.test.", "100.64.0.2"] {
            let accept = Accept { subnets: false, exit_node: Some(wanted.to_owned()) };
            let table = routes(peers(), &accept);
            assert_eq!(owner(&table, "8.8.8.8"), Some((2, RouteKind::Exit)));
            assert_eq!(owner(&table, "2001:db8::1"), Some((2, RouteKind::Exit)));
        }
    }

    #[test]
    fn expired_peers_and_peers_without_a_path_serve_nothing() {
        let expired = Peer { expired: true, ..peer(1, &["10.0.0.0/8"]) };
        let pathless = Peer { disco: None, ..peer(2, &["10.0.0.0/8"]) };
        let table = routes(vec![expired, pathless], &SUBNETS);
        assert_eq!(owner(&table, "10.0.0.1"), None);
        assert_eq!(owner(&table, "100.64.0.1"), None);
        let plain = Peer { disco: None, wireguard_only: true, ..peer(3, &[]) };
        let relayed = Peer { disco: None, home_derp: Some(1), ..peer(4, &[]) };
        let table = routes(vec![plain, relayed], &SUBNETS);
        assert!(owner(&table, "100.64.0.3").is_some() && owner(&table, "100.64.0.4").is_some());
    }

    #[test]
    fn a_peer_may_send_from_what_it_serves_and_from_nothing_else() {
        let table = routes(vec![peer(1, &["10.0.0.0/8"]), peer(2, &["10.1.0.0/16"])], &SUBNETS);
        let serves = |id, ip: &str| table.serves(id, ip.parse().unwrap());
        assert!(serves(1, "10.1.0.1") && serves(2, "10.1.0.1") && serves(1, "100.64.0.1"));
        assert!(!serves(2, "10.2.0.1") && !serves(2, "100.64.0.1") && !serves(3, "10.0.0.1"));
    }

    #[test]
    fn tailnet_ranges_end_where_they_end() {
        let inside = ["100.64.0.0", "100.127.255.255", "fd7a:115c:a1e0::1", "::ffff:100.64.0.1"];
        let outside = ["100.63.255.255", "100.128.0.0", "fd7a:115c:a1e1::1", "10.0.0.1"];
        assert!(inside.iter().all(|ip| tailnet_range(ip.parse().unwrap())));
        assert!(!outside.iter().any(|ip| tailnet_range(ip.parse().unwrap())));
    }

    prop_compose! {
        /// Few bits are set, so that prefixes overlap often.
        fn any_peer(id: NodeId)(
            prefixes in prop::collection::vec((any::<[u8; 2]>(), 0u8..=32, any::<bool>()), 0..6),
            online in any::<Option<bool>>(),
            expired in prop::bool::weighted(0.1),
        ) -> Peer {
            let net = |([a, b], length, v6): ([u8; 2], u8, bool)| {
                let net = match v6 {
                    false => IpNet::new([10, a & 3, b & 3, 0].into(), length),
                    true => IpNet::new([0xfd00 | u16::from(a & 3), u16::from(b & 3) << 14, 0, 0, 0, 0, 0, 0].into(), length),
                };
                net.unwrap().trunc()
            };
            Peer { allowed_ips: prefixes.into_iter().map(net).collect(), online, expired, ..peer(id, &[]) }
        }
    }

    proptest! {
        #[test]
        fn the_table_equals_a_linear_scan(
            peers in (any_peer(1), any_peer(2), any_peer(3), any_peer(4)),
            exit in prop::option::of(Just(String::from("n2"))),
            subnets in any::<bool>(),
            probe in any::<[u8; 3]>(),
        ) {
            let peers = vec![peers.0, peers.1, peers.2, peers.3];
            let accept = Accept { subnets, exit_node: exit };
            let table = routes(peers.clone(), &accept);
            let probes: [IpAddr; 3] = [
                [10, probe[0] & 3, probe[1] & 3, probe[2] & 1].into(),
                [0xfd00 | u16::from(probe[0] & 3), u16::from(probe[1] & 3) << 14, 0, 0, 0, 0, 0, 0].into(),
                [100, 64, 0, probe[2] & 7].into(),
            ];
            for ip in probes {
                let scan = peers
                    .iter()
                    .filter(|peer| !peer.expired)
                    .flat_map(|peer| peer.allowed_ips.iter().copied().chain([peer.addresses[0].into()]).map(move |net: IpNet| (peer, net)))
                    .filter(|(peer, net)| match net.prefix_len() {
                        0 => accept.exit_node.as_deref() == Some(peer.stable_id.as_str()),
                        32 if net.addr() == peer.addresses[0] => true,
                        _ => subnets,
                    })
                    .filter(|(_, net)| net.contains(&ip))
                    .min_by_key(|(peer, net)| {
                        let online = [Some(true), None, Some(false)].iter().position(|state| *state == peer.online);
                        (std::cmp::Reverse(net.prefix_len()), online, peer.id)
                    });
                let found = table.find(ip).map(|route| (route.peer.id, route.prefix));
                prop_assert_eq!(found, scan.map(|(peer, net)| (peer.id, net)));
            }
        }
    }
}
