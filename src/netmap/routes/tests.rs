//! What the table finds, against the plain rules.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::key::{DiscoPublic, NodePublic};
use crate::netmap::Masquerade;
use crate::netmap::standing::Measured;

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
    let table = routes(vec![peer(1, &["10.0.0.0/8"]), peer(2, &["10.1.0.0/16"]), peer(3, &["10.1.2.3/32"])], &SUBNETS);
    assert_eq!(owner(&table, "10.2.0.1"), Some((1, RouteKind::Subnet)));
    assert_eq!(owner(&table, "10.1.0.1"), Some((2, RouteKind::Subnet)));
    assert_eq!(owner(&table, "10.1.2.3"), Some((3, RouteKind::Subnet)));
    assert_eq!(owner(&table, "11.0.0.1"), None);
}

#[test]
fn a_transit_address_leads_to_its_peer_alone_while_that_can_be_used() {
    let table = routes(vec![peer(1, &["10.0.0.0/8", "10.7.0.1/32"]), peer(2, &[])], &SUBNETS);
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    let transits =
        BTreeMap::from([(ip("10.7.0.1"), 2), (ip("169.254.7.1"), 2), (ip("10.7.0.2"), 3), (ip("10.7.0.3"), 4)]);
    let expired = Arc::new(Peer { expired: true, ..peer(3, &[]) });
    let peers = [Arc::new(peer(1, &[])), Arc::new(peer(2, &[])), expired];
    let with = table.with_transits(&transits, |id| peers.iter().find(|peer| peer.id == id).cloned());
    for (address, owned_by) in [("10.7.0.1", 2), ("169.254.7.1", 2), ("10.7.0.2", 1), ("10.7.0.3", 1), ("10.7.0.4", 1)]
    {
        assert_eq!(owner(&with, address), Some((owned_by, RouteKind::Subnet)), "{address}");
        let serves = |id| with.serves(id, ip(address)).is_some();
        assert!(serves(owned_by) && !serves(3 - owned_by), "{address}");
    }
    assert_eq!(owner(&with.with_transits(&BTreeMap::new(), |_| None), "169.254.7.1"), None);
    assert_eq!(owner(&with.ranked(&Standing::default()), "10.7.0.1"), Some((2, RouteKind::Subnet)));
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
    let serves = |id, ip: &str| table.serves(id, ip.parse().unwrap()).is_some();
    assert!(serves(1, "10.1.0.1") && serves(2, "10.1.0.1") && serves(1, "100.64.0.1"));
    assert!(!serves(2, "10.2.0.1") && !serves(2, "100.64.0.1") && !serves(3, "10.0.0.1"));
}

#[test]
fn a_silent_peer_comes_after_one_that_is_not_and_before_one_that_is_offline() {
    let with = |id, online| Peer { online, ..peer(id, &["10.0.0.0/8"]) };
    let table = routes(vec![with(1, Some(true)), with(2, Some(true)), with(3, Some(false))], &SUBNETS);
    let mut standing = Standing::default();
    standing.set_voice(1, Voice::Silent);
    assert_eq!(owner(&table.ranked(&standing), "10.0.0.1").unwrap().0, 2);
    standing.set_voice(2, Voice::Silent);
    assert_eq!(owner(&table.ranked(&standing), "10.0.0.1").unwrap().0, 1);
    standing.set_voice(2, Voice::Regained);
    assert_eq!(owner(&table.ranked(&standing), "10.0.0.1").unwrap().0, 2);
    standing.set_voice(1, Voice::Heard);
    assert_eq!(owner(&table.ranked(&standing), "10.0.0.1").unwrap().0, 1);
    assert_eq!(table.rivals(), &BTreeSet::from([1, 2, 3]));
}

#[test]
fn the_primary_comes_before_a_nearer_peer_and_a_nearer_peer_before_a_lower_id() {
    let primary = Peer { primary_routes: vec!["10.0.0.0/8".parse().unwrap()], ..peer(3, &["10.0.0.0/8"]) };
    let others = || vec![peer(1, &["10.0.0.0/8"]), peer(2, &["10.0.0.0/8"])];
    let mut standing = Standing::default();
    standing.set_latency(1, Duration::from_millis(80), Measured::Region);
    standing.set_latency(2, Duration::from_millis(20), Measured::Direct);
    let first = |peers| owner(&routes(peers, &SUBNETS).ranked(&standing), "10.0.0.1").unwrap().0;
    assert_eq!(first(others()), 2);
    assert_eq!(first([others(), vec![primary]].concat()), 3);
}

#[test]
fn a_short_name_means_a_node_of_our_own_tailnet() {
    let exits = ["0.0.0.0/0", "::/0"];
    let shared = Peer { name: String::from("exit.other.test"), ..peer(1, &exits) };
    let ours = Peer { name: String::from("exit.tail.test"), ..peer(2, &exits) };
    let exit_node = |peers: Vec<Peer>, wanted: &str| {
        let peers: Vec<_> = peers.into_iter().map(Arc::new).collect();
        Accept { subnets: false, exit_node: Some(wanted.to_owned()) }.exit_node(peers.iter(), "tail.test")
    };
    assert_eq!(exit_node(vec![shared.clone(), ours.clone()], "exit"), Some(2));
    assert_eq!(exit_node(vec![shared.clone()], "exit"), None);
    assert_eq!(exit_node(vec![shared, ours], "exit.other.test"), Some(1));
    assert_eq!(exit_node(vec![peer(3, &["10.0.0.0/8"])], "host3"), None, "it does not offer to be one");
    assert_eq!(exit_node(vec![peer(3, &exits)], ""), None);
}

prop_compose! {
    /// Few bits are set, so that prefixes overlap often.
    fn any_peer(id: NodeId)(
        prefixes in prop::collection::vec((any::<[u8; 2]>(), 0u8..=32, any::<bool>()), 0..6),
        shared in any::<[bool; 3]>(),
        primary in any::<[bool; 3]>(),
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
        let contested = ["10.0.0.0/8", "10.1.0.0/16", "10.1.1.1/32"];
        let chosen = |of: [bool; 3]| contested.into_iter().zip(of).filter(|(_, is)| *is).map(|(net, _)| net.parse().unwrap());
        let allowed_ips = prefixes.into_iter().map(net).chain(chosen(shared)).collect();
        Peer { allowed_ips, primary_routes: chosen(primary).collect(), online, expired, ..peer(id, &[]) }
    }
}

prop_compose! {
    fn any_standing()(
        voices in prop::array::uniform4(prop::sample::select(vec![Voice::Heard, Voice::Regained, Voice::Silent])),
        latencies in prop::array::uniform4(prop::option::of(1u64..200)),
    ) -> Standing {
        let mut standing = Standing::default();
        for (id, (voice, latency)) in (1..).zip(voices.into_iter().zip(latencies)) {
            standing.set_voice(id, voice);
            if let Some(latency) = latency {
                standing.set_latency(id, Duration::from_millis(latency), Measured::Direct);
            }
        }
        standing
    }
}

/// Everything that is served, by whom.
fn scanned<'a>(peers: &'a [Peer], accept: &Accept) -> Vec<(&'a Peer, IpNet)> {
    let own = |peer: &Peer| IpNet::from(peer.addresses[0]);
    let all = peers.iter().filter(|peer| !peer.expired);
    let all = all.flat_map(|peer| peer.allowed_ips.iter().copied().chain([own(peer)]).map(move |net| (peer, net)));
    let used = |(peer, net): &(&Peer, IpNet)| match net.prefix_len() {
        0 => accept.exit_node.as_deref() == Some(peer.stable_id.as_str()),
        _ => *net == own(peer) || accept.subnets,
    };
    all.filter(used).collect()
}

proptest! {
    #[test]
    fn the_table_equals_a_linear_scan(
        peers in (any_peer(1), any_peer(2), any_peer(3), any_peer(4)),
        exit in prop::option::of(Just(String::from("n2"))),
        subnets in any::<bool>(),
        standing in any_standing(),
        probe in any::<[u8; 3]>(),
    ) {
        let peers = vec![peers.0, peers.1, peers.2, peers.3];
        let accept = Accept { subnets, exit_node: exit };
        let table = routes(peers.clone(), &accept).ranked(&standing);
        let probes: [IpAddr; 4] = [
            [10, probe[0] & 3, probe[1] & 3, probe[2] & 1].into(),
            [10, 1, 1, 1].into(),
            [0xfd00 | u16::from(probe[0] & 3), u16::from(probe[1] & 3) << 14, 0, 0, 0, 0, 0, 0].into(),
            [100, 64, 0, probe[2] & 7].into(),
        ];
        for ip in probes {
            let covering: Vec<_> = scanned(&peers, &accept).into_iter().filter(|(_, net)| net.contains(&ip)).collect();
            let best = covering.iter().min_by_key(|(peer, net)| {
                let online = [Some(true), None, Some(false)].iter().position(|state| *state == peer.online);
                let (voice, primary) = (standing.voice(peer.id), peer.primary_routes.contains(net));
                (std::cmp::Reverse(net.prefix_len()), online, voice, !primary, standing.latency(peer.id), peer.id)
            });
            let found = table.find(ip).map(|route| (route.peer.id, route.prefix));
            prop_assert_eq!(found, best.map(|(peer, net)| (peer.id, *net)));
            for id in 1..=4 {
                let narrowest = covering.iter().filter(|(peer, _)| peer.id == id).map(|(_, net)| net.prefix_len()).max();
                let serves = table.serves(id, ip).map(|kind| kind == RouteKind::Exit);
                prop_assert_eq!(serves, narrowest.map(|length| length == 0));
            }
        }
    }
}
