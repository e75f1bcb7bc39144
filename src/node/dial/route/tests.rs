//! Which addresses of an answer are dialled, and why others are not.

use serde_json::json;

use super::super::bed::{CONNECTOR, Tailnet, ips, peer};
use super::*;

fn reached(netmap: &Netmap, addresses: &[&str]) -> Reach {
    reach(netmap, &ips(addresses), &ips(&[CONNECTOR]))
}

#[test]
fn a_connectors_own_route_is_taken_and_what_has_none_is_left_out() {
    let netmap = Tailnet::new().map(&["203.0.113.7/32", "2001:db8::7/128"], &["10.0.0.0/8"], &[]);
    let reach = reached(&netmap, &["203.0.113.6", "203.0.113.7", "10.1.1.1", "2001:db8::7"]);
    assert_eq!(reach, Reach::Own(ips(&["203.0.113.7", "2001:db8::7"])));
    assert_eq!(reached(&netmap, &["203.0.113.6"]), Reach::Nothing);
}

#[test]
fn an_app_connector_that_learned_the_address_counts_and_so_does_a_peer_that_serves_the_suffix() {
    let app_connector = json!({ "Hostinfo": { "AppConnector": true } });
    let other = peer(5, "other", &["203.0.113.7/32", "198.51.100.0/24"], &app_connector);
    let silent_about_it = peer(2, "connector", &["203.0.113.8/32"], &json!({}));
    let netmap = Tailnet::new().peers(&[other, silent_about_it]);
    assert_eq!(reached(&netmap, &["203.0.113.7"]), Reach::Own(ips(&["203.0.113.7"])));
    assert_eq!(reached(&netmap, &["203.0.113.8"]), Reach::Own(ips(&["203.0.113.8"])));
    let router = Router { id: 5, name: "other.tb.example".to_owned(), exact: false };
    assert_eq!(reached(&netmap, &["198.51.100.7"]), Reach::Wider(ips(&["198.51.100.7"]), router));
}

#[test]
fn another_peers_route_is_told_from_the_connectors() {
    let netmap = Tailnet::new().map(&[], &["203.0.113.0/24", "198.51.100.7/32"], &[]);
    let router = |exact| Router { id: 3, name: "router.tb.example".to_owned(), exact };
    assert_eq!(reached(&netmap, &["203.0.113.7"]), Reach::Wider(ips(&["203.0.113.7"]), router(false)));
    assert_eq!(reached(&netmap, &["198.51.100.7"]), Reach::Wider(ips(&["198.51.100.7"]), router(true)));
}

#[test]
fn an_exit_node_never_stands_in_for_a_connector() {
    let netmap = Tailnet::exiting().map(&[], &[], &["0.0.0.0/0", "::/0"]);
    assert!(netmap.route(ips(&["203.0.113.7"])[0]).is_some());
    assert_eq!(reached(&netmap, &["203.0.113.7", "2001:db8::7"]), Reach::Nothing);
}

#[test]
fn an_answer_that_is_a_node_of_the_tailnet_is_reached_as_such() {
    let netmap = Tailnet::new().map(&[], &[], &[]);
    assert_eq!(reached(&netmap, &["100.64.0.3"]), Reach::Own(ips(&["100.64.0.3"])));
}

#[test]
fn without_an_address_of_its_family_a_route_is_none() {
    let netmap = Tailnet::v4().map(&["203.0.113.7/32", "2001:db8::7/128"], &[], &[]);
    assert_eq!(reached(&netmap, &["2001:db8::7", "203.0.113.7"]), Reach::Own(ips(&["203.0.113.7"])));
    assert_eq!(reached(&netmap, &["2001:db8::7"]), Reach::Nothing);
}

#[test]
fn families_take_turns_and_offline_routers_come_last() {
    let offline = peer(6, "gone", &["10.6.0.0/16"], &json!({ "Online": false }));
    let netmap = Tailnet::new().peers(&[peer(3, "router", &["10.3.0.0/16", "fd20::/64"], &json!({})), offline]);
    let order = in_order(&netmap, &ips(&["fd20::1", "10.6.0.1", "fd20::2", "10.3.0.1", "10.3.0.2", "10.3.0.3"]));
    assert_eq!(order, ips(&["10.3.0.1", "fd20::1", "10.3.0.2", "fd20::2", "10.3.0.3", "10.6.0.1"]));
}

#[test]
fn of_an_answer_of_a_hundred_addresses_sixteen_are_tried_of_both_families() {
    let netmap = Tailnet::new().map(&["10.3.0.0/16", "fd20::/64"], &[], &[]);
    let v4 = (1..=100).map(|last| IpAddr::from([10, 3, 0, last]));
    let all: Vec<IpAddr> = v4.chain((1..=9).map(|last| IpAddr::from([0xfd20, 0, 0, 0, 0, 0, 0, last]))).collect();
    let order = in_order(&netmap, &all);
    assert_eq!((order.len(), order.iter().filter(|ip| ip.is_ipv6()).count()), (ADDRESSES_MAX, 8));
}

#[test]
fn a_public_address_goes_by_the_exit_node_and_a_private_one_never() {
    let mut tailnet = Tailnet::exiting();
    let netmap = tailnet.map(&[], &["10.20.0.0/24"], &["0.0.0.0/0", "::/0"]);
    let by = |ip: &str| netmap.route(ip.parse().unwrap()).map(|route| (route.peer.id, route.kind));
    assert_eq!(by("203.0.113.80"), Some((4, RouteKind::Exit)));
    assert_eq!(by("2001:db8::80"), Some((4, RouteKind::Exit)));
    assert_eq!(by("10.20.0.80"), Some((3, RouteKind::Subnet)));
    for private in ["10.21.0.80", "192.168.1.1", "169.254.169.254", "127.0.0.1", "::1", "fd21::1", "100.64.9.9"] {
        assert_eq!(by(private), None, "{private}");
        let why = unrouted(&netmap, private.parse().unwrap());
        let refused = matches!(why, DialError::Public { .. } | DialError::Route(RouteError::None { .. }));
        assert!(refused, "{private}: {why}");
    }
}

#[test]
fn whatever_has_no_route_is_called_what_it_is() {
    let netmap = Tailnet::new().map(&[], &[], &[]);
    for (ip, words) in [
        ("203.0.113.80", "is not in the tailnet; it would be public"),
        ("10.0.0.1", "is not in the tailnet; it would be in a network around this machine"),
        ("fd21::1", "is not in the tailnet; it would be in a network around this machine"),
        ("239.1.2.3", "is not in the tailnet; it would be no single host's (multicast or reserved)"),
        ("ff02::1", "is not in the tailnet; it would be no single host's (multicast or reserved)"),
        ("169.254.169.254", "is not in the tailnet; it would be this machine or its link"),
        ("::1", "is not in the tailnet; it would be this machine or its link"),
        ("100.99.9.9", "no node that this one may see has or routes 100.99.9.9"),
        ("fd7a:115c:a1e0::99", "no node that this one may see has or routes fd7a:115c:a1e0::99"),
    ] {
        let why = unrouted(&netmap, ip.parse().unwrap()).to_string();
        assert!(why.ends_with(words), "{ip}: {why}");
    }
}

#[test]
fn without_its_exit_node_a_public_address_is_withdrawn_and_a_private_one_was_never_there() {
    let mut tailnet = Tailnet::exiting();
    tailnet.map(&[], &[], &["0.0.0.0/0", "::/0"]);
    let netmap = tailnet.map(&[], &[], &[]);
    let why = |ip: &str| unrouted(&netmap, ip.parse().unwrap());
    assert!(matches!(why("203.0.113.80"), DialError::Route(RouteError::Withdrawn { .. })));
    assert!(matches!(why("10.0.0.1"), DialError::Public { .. }));
    let never = unrouted(&Tailnet::new().map(&[], &[], &[]), "203.0.113.80".parse().unwrap());
    assert!(matches!(never, DialError::Public { .. }));
}

#[test]
fn what_a_route_leaves_behind_is_withdrawn_and_never_goes_by_the_exit_node() {
    let mut tailnet = Tailnet::exiting();
    let exits = ["0.0.0.0/0", "::/0"];
    let by = |netmap: &Netmap, ip: &str| netmap.route(ip.parse().unwrap()).map(|route| (route.peer.id, route.kind));
    let connected = ["203.0.113.7/32", "2001:db8:7::7/128"];
    let netmap = tailnet.map(&connected, &["198.51.100.0/24"], &exits);
    assert_eq!(by(&netmap, "198.51.100.1"), Some((3, RouteKind::Subnet)));
    let netmap = tailnet.map(&[], &[], &exits);
    for gone in ["203.0.113.7", "::ffff:203.0.113.7", "2001:db8:7::7", "198.51.100.1"] {
        assert_eq!(by(&netmap, gone), None, "{gone}");
        let why = unrouted(&netmap, gone.parse().unwrap());
        assert!(matches!(why, DialError::Route(RouteError::Withdrawn { .. })), "{gone}: {why}");
    }
    assert_eq!(by(&netmap, "203.0.113.8"), Some((4, RouteKind::Exit)), "its neighbour was never the tailnet's");
}

#[test]
fn an_exit_node_makes_nothing_the_tailnets_own() {
    let netmap = Tailnet::exiting().map(&["203.0.113.7/32"], &[], &["0.0.0.0/0"]);
    assert!(is_public(&netmap, "198.51.100.1".parse().unwrap()));
    assert!(!is_public(&netmap, "203.0.113.7".parse().unwrap()) && !is_public(&netmap, "100.64.9.9".parse().unwrap()));
}

#[test]
fn an_address_of_4via6_is_its_site_routers_or_nobodys() {
    // Site 7: 96 bits of prefix and site, and 10.1.0.0/16 behind them. Source: Tailscale, net/tsaddr, `MapVia`.
    let netmap = Tailnet::exiting().map(&[], &["fd7a:115c:a1e0:b1a:0:7:a01:0/112"], &["0.0.0.0/0", "::/0"]);
    let by = |ip: &str| netmap.route(ip.parse().unwrap()).map(|route| (route.peer.id, route.kind));
    assert_eq!(by("fd7a:115c:a1e0:b1a:0:7:a01:110"), Some((3, RouteKind::Subnet)));
    let elsewhere = "fd7a:115c:a1e0:b1a:0:8:a01:110".parse().unwrap();
    assert!(matches!(unrouted(&netmap, elsewhere), DialError::Route(RouteError::None { .. })));
    assert!(!is_public(&netmap, elsewhere));
}
