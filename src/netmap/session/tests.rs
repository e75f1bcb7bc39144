//! Messages as control sends them, and the netmaps that follow.

mod properties;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::*;
use crate::key::signature::vectors;
use crate::netmap::diff::Changes;
use crate::netmap::{NodeId, RouteKind};

fn now() -> Timestamp {
    "2026-08-01T12:00:00Z".parse().unwrap()
}

fn node(id: u8) -> Value {
    json!({
        "ID": id, "StableID": format!("n{id}"), "Name": format!("Host{id}.tail1.ts.net."), "HomeDERP": 1,
        "Key": format!("nodekey:{}{id:02x}", "00".repeat(31)), "Addresses": [format!("100.64.0.{id}/32")],
    })
}

/// A node with more or other fields.
fn with(mut node: Value, fields: Value) -> Value {
    for (name, value) in fields.as_object().unwrap() {
        node[name] = value.clone();
    }
    node
}

fn message(json: Value) -> MapResponse {
    serde_json::from_value(json).unwrap()
}

fn apply(session: &mut Session, json: Value) -> Arc<Netmap> {
    session.apply(message(json), now()).unwrap().netmap.expect("the message changes the map")
}

fn started(peers: Value) -> (Session, Arc<Netmap>) {
    let mut session = Session::new(true);
    let netmap = apply(&mut session, json!({"Node": node(1), "Peers": peers}));
    (session, netmap)
}

fn ids(netmap: &Netmap) -> Vec<NodeId> {
    netmap.peers.keys().copied().collect()
}

#[test]
fn the_first_message_must_describe_ourselves() {
    let mut session = Session::new(true);
    assert_eq!(session.apply(message(json!({"Peers": [node(2)]})), now()).unwrap_err(), MapError::NoSelfNode);
    assert!(session.apply(message(json!({"KeepAlive": true})), now()).unwrap().netmap.is_none());
    let netmap = apply(&mut session, json!({"Node": node(1)}));
    assert_eq!((netmap.self_node.name.as_str(), netmap.magicdns_suffix()), ("host1.tail1.ts.net", "tail1.ts.net"));
    assert!(netmap.peers.is_empty());
}

#[test]
fn a_new_stream_starts_from_nothing() {
    let (mut session, _) = started(json!([node(2)]));
    apply(&mut session, json!({"DNSConfig": {"Proxied": true}, "Domain": "a.example"}));
    session.restart();
    assert!(session.apply(message(json!({"PeersChanged": [node(3)]})), now()).is_err());
    let netmap = apply(&mut session, json!({"Node": node(1), "Peers": [node(4)]}));
    assert_eq!(ids(&netmap), [4]);
    assert!(!netmap.dns.proxied && netmap.domain.is_empty());
}

#[test]
fn an_empty_list_of_peers_changes_nothing_and_a_full_one_replaces_all() {
    let (mut session, _) = started(json!([node(2), node(3)]));
    assert!(session.apply(message(json!({"Peers": []})), now()).unwrap().netmap.is_none());
    let netmap = apply(&mut session, json!({"Peers": [node(4)], "PeersChanged": [node(5)], "PeersRemoved": [4]}));
    assert_eq!(ids(&netmap), [4]);
}

#[test]
fn a_delta_removes_then_changes_then_patches() {
    let (mut session, before) = started(json!([node(2), node(3), node(4)]));
    let netmap = apply(
        &mut session,
        json!({
            "PeersRemoved": [2, 3], "PeersChanged": [node(3)], "OnlineChange": {"3": true, "9": true},
            "PeersChangedPatch": [{"NodeID": 3, "DERPRegion": 7, "Online": false}, {"NodeID": 9, "DERPRegion": 7}],
        }),
    );
    assert_eq!(ids(&netmap), [3, 4]);
    assert_eq!((netmap.peers[&3].home_derp, netmap.peers[&3].online), (Some(7), Some(false)));
    assert!(Arc::ptr_eq(&before.peers[&4], &netmap.peers[&4]), "an untouched peer stays the same value");
    let changes = Changes::between(Some(&before), &netmap);
    assert_eq!(changes.to_string(), "-1 peers, ~1 peers");
    assert!(Changes::between(Some(&netmap), &netmap).is_empty());
}

#[test]
fn allowed_ips_default_to_the_addresses_and_unsigned_peers_serve_no_more() {
    let subnet = json!({"AllowedIPs": ["100.64.0.3/32", "10.0.0.0/8"]});
    let unsigned = json!({"AllowedIPs": ["100.64.0.4/32", "10.1.0.0/16"], "UnsignedPeerAPIOnly": true});
    let (_, netmap) = started(json!([node(2), with(node(3), subnet), with(node(4), unsigned)]));
    let owner = |ip: &str| netmap.route(ip.parse().unwrap()).map(|route| (route.peer.id, route.kind));
    assert_eq!(owner("100.64.0.2"), Some((2, RouteKind::Address)));
    assert_eq!(owner("10.1.0.1"), Some((3, RouteKind::Subnet)));
    assert_eq!(owner("100.64.0.1"), None);
    assert!(netmap.allowed(&netmap.peers[&3], "10.1.0.1".parse().unwrap()));
    assert!(!netmap.allowed(&netmap.peers[&4], "10.1.0.1".parse().unwrap()));
}

#[test]
fn a_withdrawn_route_is_remembered_across_streams() {
    let (mut session, first) = started(json!([with(node(2), json!({"AllowedIPs": ["192.0.2.7/32"]}))]));
    let ip = "192.0.2.7".parse().unwrap();
    assert!(first.route(ip).is_some() && first.was_routed(ip));
    let netmap = apply(&mut session, json!({"PeersRemoved": [2]}));
    assert!(netmap.route(ip).is_none() && netmap.was_routed(ip));
    session.restart();
    let netmap = apply(&mut session, json!({"Node": node(1)}));
    assert!(netmap.was_routed(ip) && !netmap.was_routed("192.0.2.8".parse().unwrap()));
}

#[test]
fn a_peer_whose_key_ends_serves_until_then_and_never_after() {
    let ending = json!({"KeyExpiry": "2026-08-01T13:00:00Z", "Endpoints": ["192.0.2.1:1"]});
    let (mut session, netmap) = started(json!([with(node(2), ending)]));
    let ip = "100.64.0.2".parse().unwrap();
    assert!(netmap.route(ip).is_some());
    let due = session.next_expiry().unwrap();
    assert_eq!(due, "2026-08-01T13:00:00Z".parse().unwrap());
    assert!(session.expire(now()).is_none());
    let netmap = session.expire(due).unwrap();
    assert!(netmap.peers[&2].expired && netmap.peers[&2].endpoints.is_empty() && netmap.route(ip).is_none());
    assert_eq!(netmap.peer_by_ip(ip).unwrap().id, 2);
    assert_eq!((session.next_expiry(), session.expire(due).is_none()), (None, true));
    let longer = json!({"PeersChangedPatch": [{"NodeID": 2, "KeyExpiry": "2027-01-01T00:00:00Z"}]});
    let netmap = session.apply(message(longer), due).unwrap().netmap.unwrap();
    assert!(netmap.route(ip).is_some());
}

#[test]
fn an_end_of_our_own_key_that_an_earlier_stream_told_does_not_count_in_the_next() {
    let (one, two) = (json!({"KeyExpiry": "2026-08-01T13:00:00Z"}), json!({"KeyExpiry": "2026-08-01T14:00:00Z"}));
    let mut session = Session::new(true);
    apply(&mut session, json!({"Node": with(node(1), one.clone()), "Peers": [with(node(2), two)]}));
    let ends = |hour: u8| -> Timestamp { format!("2026-08-01T{hour}:00:00Z").parse().unwrap() };
    assert_eq!(session.next_expiry(), Some(ends(13)));
    session.restart();
    assert_eq!((session.next_expiry(), session.expire(ends(13)).is_none()), (Some(ends(14)), true));
    let netmap = session.expire(ends(14)).unwrap();
    assert!(netmap.peers[&2].expired && !netmap.self_node.expired);
    assert_eq!(session.next_expiry(), None);
    // What the new stream says counts.
    let netmap = session.apply(message(json!({"Node": with(node(1), one)})), ends(14)).unwrap().netmap.unwrap();
    assert!(netmap.self_node.expired);
}

#[test]
fn controls_clock_decides_when_ours_is_wrong() {
    let ending = json!({"KeyExpiry": "2026-08-01T13:00:00Z"});
    let mut session = Session::new(true);
    let first = json!({"Node": with(node(1), ending.clone()), "Peers": [with(node(2), ending)]});
    let first = with(first, json!({"ControlTime": "2026-08-01T14:00:00Z"}));
    let netmap = apply(&mut session, first);
    assert!(netmap.peers[&2].expired && netmap.self_node.expired);
    session.apply(message(json!({"KeepAlive": true, "ControlTime": "2026-08-01T12:59:00Z"})), now()).unwrap();
    assert_eq!(session.next_expiry(), Some("2026-08-01T12:01:00Z".parse().unwrap()));
    // Half a minute may be the network's: our own clock counts.
    session.apply(message(json!({"KeepAlive": true, "ControlTime": "2026-08-01T12:00:30Z"})), now()).unwrap();
    assert_eq!(session.next_expiry(), Some("2026-08-01T13:00:00Z".parse().unwrap()));
}

#[test]
fn no_key_ends_by_a_clock_that_is_not_set() {
    let mut session = Session::new(true);
    let first =
        message(json!({"Node": node(1), "Peers": [with(node(2), json!({"KeyExpiry": "2000-01-01T00:00:00Z"}))]}));
    let boot = Timestamp::from_second(1_000_000_000).unwrap();
    assert!(!session.apply(first, boot).unwrap().netmap.unwrap().peers[&2].expired);
    assert_eq!(session.next_expiry(), Some(CLOCK_IS_SET));
}

#[test]
fn questions_and_pages_are_not_repeated() {
    let mut session = Session::new(true);
    let ask = |url| json!({"KeepAlive": true, "PingRequest": {"URL": url}, "PopBrowserURL": "https://a.example/"});
    let first = session.apply(message(ask("http://c/1")), now()).unwrap();
    assert!(first.ping.is_some() && first.browser_url.is_some());
    let again = session.apply(message(ask("http://c/1")), now()).unwrap();
    assert!(again.ping.is_none() && again.browser_url.is_none());
    assert!(session.apply(message(ask("http://c/2")), now()).unwrap().ping.is_some());
}

#[test]
fn health_is_told_only_when_control_speaks_of_it() {
    let (mut session, _) = started(json!([]));
    let mut health = |json| session.apply(message(json), now()).unwrap().health;
    assert_eq!(health(json!({"OnlineChange": {}})), None);
    let told =
        health(json!({"Health": ["a"], "DisplayMessages": {"x": {"Title": "T", "Text": "t"}, "y": {"Title": "U"}}}));
    assert_eq!(told.unwrap(), ["a", "T: t", "U"]);
    assert_eq!(health(json!({"Health": [], "DisplayMessages": {"x": null}})).unwrap(), ["U"]);
    assert_eq!(health(json!({"DisplayMessages": {"*": null, "z": {"Title": "V"}}})).unwrap(), ["V"]);
}

#[test]
fn control_may_slow_us_down_but_not_stop_us() {
    let (mut session, _) = started(json!([]));
    let mut sleep = |seconds: f64| {
        session.apply(message(json!({"Debug": {"SleepSeconds": seconds, "Exit": 1}})), now()).unwrap().sleep
    };
    assert_eq!(sleep(1.5), Some(Duration::from_millis(1500)));
    assert_eq!(sleep(1e300), Some(Duration::from_secs(300)));
    assert_eq!((sleep(-1.0), sleep(0.0)), (None, None));
}

#[test]
fn a_tailnet_lock_without_our_signature_locks_us_out() {
    let (mut session, netmap) = started(json!([]));
    assert!(!netmap.locked_out);
    assert!(apply(&mut session, json!({"TKAInfo": {"Head": "AAAA"}})).locked_out);
    let signed = |signature: &[u8]| {
        let (key, signature) = (vectors::node(0x11), STANDARD.encode(signature));
        json!({"Node": with(node(1), json!({"Key": key, "KeySignature": signature}))})
    };
    assert!(!apply(&mut session, signed(vectors::SIGNED)).locked_out);
    assert!(apply(&mut session, signed(vectors::ROTATION)).locked_out);
    assert!(apply(&mut session, json!({"Node": node(1)})).locked_out);
    assert!(!apply(&mut session, json!({"TKAInfo": {"Head": "AAAA", "Disabled": true}})).locked_out);
}

#[test]
fn a_tailnet_lock_hides_peers_until_they_are_signed() {
    let key = vectors::node(0x22);
    let peers =
        json!([node(2), with(node(3), json!({"Key": key})), with(node(4), json!({"UnsignedPeerAPIOnly": true}))]);
    let (mut session, netmap) = started(peers.clone());
    assert_eq!((ids(&netmap), netmap.unsigned_peers), (vec![2, 3, 4], 0));
    let netmap = apply(&mut session, json!({"TKAInfo": {"Head": "AAAA"}}));
    assert_eq!((ids(&netmap), netmap.unsigned_peers), (vec![4], 2));
    assert!(netmap.route("100.64.0.3".parse().unwrap()).is_none());
    assert!(netmap.was_routed("100.64.0.3".parse().unwrap()));
    let signature = STANDARD.encode(vectors::ROTATION);
    let netmap = apply(&mut session, json!({"PeersChangedPatch": [{"NodeID": 3, "KeySignature": signature}]}));
    assert_eq!((ids(&netmap), netmap.unsigned_peers), (vec![3, 4], 1));
    let netmap = apply(&mut session, json!({"TKAInfo": {"Head": "AAAA", "Disabled": true}}));
    assert_eq!(ids(&netmap), [2, 3, 4]);
    // Where they were hidden from the beginning, they never had a route.
    let first = json!({"Node": node(1), "Peers": peers, "TKAInfo": {"Head": "AAAA"}});
    let netmap = apply(&mut Session::new(true), first);
    let routed = |ip: &str| netmap.was_routed(ip.parse().unwrap());
    assert_eq!((routed("100.64.0.3"), routed("100.64.0.4")), (false, true));
}

#[test]
fn a_peer_with_a_new_key_is_found_by_that_alone() {
    let (mut session, before) = started(json!([node(2)]));
    let key = format!("nodekey:{}", "aa".repeat(32));
    let netmap = apply(&mut session, json!({"PeersChangedPatch": [{"NodeID": 2, "Key": key}]}));
    assert!(netmap.peer_by_key(&key.parse().unwrap()).is_some());
    assert!(netmap.peer_by_key(&before.peers[&2].key).is_none());
}
