//! Associations in tailnets that change.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::super::super::dial::bed::{Tailnet, peer as node};
use super::super::super::{Config, Node};
use super::super::tests::{SOON, arrives, association, peer, public, to, until};
use super::super::{DatagramError, Event, Lost, Target};
use super::*;
use crate::node::dial::DirectRule;

/// Has the data plane go by a netmap, as its driver does.
fn publish(association: &Association, netmap: Arc<Netmap>) {
    association.node.core.borrow_mut().handle_netmap(netmap, std::time::Instant::now());
}

/// An association in a tailnet of two routers, of which the first serves this.
async fn routed(tailnet: &mut Tailnet, routes: &[&str]) -> Association {
    let mut association = association(9);
    // The driver's own netmap comes first.
    until(&mut association, tokio::time::sleep(Duration::from_millis(5))).await;
    publish(&association, tailnet.map(&[], routes, &[]));
    association
}

/// Sends to a target, and waits until that is located.
async fn locate(association: &mut Association, target: &Target) {
    association.send(target, b"x").unwrap();
    while association.held > 0 {
        until(association, tokio::time::sleep(Duration::from_millis(1))).await;
    }
}

fn next_hops(association: &Association) -> Vec<NextHop> {
    association.mappings.values().filter_map(|mapping| mapping.next_hop).collect()
}

fn name(name: &str) -> Target {
    Target { host: Host::Name(name.to_owned()), port: 9 }
}

fn is_at(association: &Association, target: &Target) -> bool {
    matches!(association.targets.get(target), Some(Known::At(_)))
}

/// DNS settings under which the tailnet itself has this name.
fn record(name: &str, value: &str) -> Value {
    json!({ "ExtraRecords": [{ "Name": name, "Value": value }] })
}

#[tokio::test(flavor = "local")]
async fn nothing_goes_outside_once_a_route_covers_the_address() {
    let (mut association, peer) = (association(9), peer().await);
    association.send(&to(&peer), b"x").unwrap();
    arrives(&mut association, &peer).await;
    publish(&association, Tailnet::new().map(&[], &["127.0.0.0/8"], &[]));
    association.send(&to(&peer), b"for the tailnet").unwrap();
    until(&mut association, tokio::time::sleep(Duration::from_millis(20))).await;
    assert_eq!(peer.try_recv(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    assert!(association.mappings.keys().all(|remote| matches!(remote, Remote::Tunnel(_))));
    assert_eq!(association.mappings(), 1);
}

#[tokio::test(flavor = "local")]
async fn outside_target_is_neither_located_nor_counted_again_where_a_netmap_does_not_concern_it() {
    let (mut tailnet, peer) = (Tailnet::new(), peer().await);
    let mut association = routed(&mut tailnet, &[]).await;
    association.send(&to(&peer), b"x").unwrap();
    let (_, from) = arrives(&mut association, &peer).await;
    publish(&association, tailnet.map(&["203.0.113.1/32"], &["192.0.2.0/24"], &[]));
    association.send(&to(&peer), b"again").unwrap();
    assert_eq!(arrives(&mut association, &peer).await.1, from);
    assert_eq!(association.node.outside.borrow().destinations().values().sum::<u64>(), 1);
}

#[tokio::test(flavor = "local")]
async fn name_that_the_tailnet_now_knows_goes_outside_no_more() {
    let peer = peer().await;
    let direct_allow = vec![DirectRule::Name("localhost".into()), DirectRule::Net("127.0.0.0/8".parse().unwrap())];
    let config = Config { direct_allow, ..Config::default() };
    let mut association = Node::alone(config).associate(Arc::new(Semaphore::new(9)));
    let target = Target { host: Host::Name("localhost".to_owned()), port: peer.local_addr().unwrap().port() };
    let ip = to(&peer);
    for target in [&target, &ip] {
        association.send(target, b"x").unwrap();
        arrives(&mut association, &peer).await;
    }
    publish(&association, Tailnet::new().with_dns(&[], &record("localhost", "100.64.0.2")));
    association.review();
    assert!(!association.knows(&target) && is_at(&association, &ip));
}

#[tokio::test(flavor = "local")]
async fn mapping_ends_when_another_peer_serves_its_address() {
    let mut tailnet = Tailnet::new();
    let mut association = routed(&mut tailnet, &["192.0.2.0/24"]).await;
    locate(&mut association, &public(9)).await;
    let before = next_hops(&association);
    // A connector's own route, and later the wider one alone.
    for connector in [&["192.0.2.1/32"][..], &[]] {
        publish(&association, tailnet.map(connector, &["192.0.2.0/24"], &[]));
        association.review();
        assert_eq!((association.mappings(), association.knows(&public(9))), (0, false));
        locate(&mut association, &public(9)).await;
    }
    assert_eq!(next_hops(&association), before);
    publish(&association, tailnet.map(&[], &["192.0.2.0/24", "203.0.113.0/24"], &[]));
    association.review();
    assert!(is_at(&association, &public(9)), "a netmap that does not concern it ends nothing");
}

#[tokio::test(flavor = "local")]
async fn mapping_ends_when_its_route_goes() {
    let mut tailnet = Tailnet::new();
    let mut association = routed(&mut tailnet, &["192.0.2.0/24"]).await;
    locate(&mut association, &public(9)).await;
    publish(&association, tailnet.map(&[], &[], &[]));
    association.send(&public(9), b"x").unwrap();
    assert_eq!(association.mappings(), 0);
    let event = timeout(SOON, association.next()).await.unwrap();
    assert!(matches!(event, Event::Failed { error: DatagramError::Dial(_), told: false, .. }), "{event:?}");
}

#[tokio::test(flavor = "local")]
async fn mapping_ends_when_its_route_is_of_another_kind_or_its_source_is_another() {
    let mut tailnet = Tailnet::new();
    let mut association = routed(&mut tailnet, &["192.0.2.0/24"]).await;
    locate(&mut association, &public(9)).await;
    let address = json!({ "Addresses": ["100.64.0.3/32", "192.0.2.1/32"] });
    let masked =
        json!({ "Addresses": ["100.64.0.3/32", "192.0.2.1/32"], "SelfNodeV4MasqAddrForThisPeer": "100.99.0.1" });
    for fields in [address, masked] {
        publish(&association, tailnet.peers(&[node(3, "router", &["192.0.2.0/24", "192.0.2.1/32"], &fields)]));
        association.review();
        assert_eq!((association.mappings(), association.knows(&public(9))), (0, false));
        locate(&mut association, &public(9)).await;
        assert_eq!(association.mappings(), 1);
    }
}

#[tokio::test(flavor = "local")]
async fn name_is_located_anew_when_the_tailnet_decides_it_otherwise() {
    let mut tailnet = Tailnet::new();
    let mut association = routed(&mut tailnet, &[]).await;
    let peers = [node(2, "connector", &[], &json!({})), node(3, "router", &[], &json!({}))];
    let settings = |value| {
        let mut settings = record("app.example", value);
        settings["ExtraRecords"].as_array_mut().unwrap().push(json!({ "Name": "db.example", "Value": "100.64.0.3" }));
        settings
    };
    publish(&association, tailnet.with_dns(&peers, &settings("100.64.0.2")));
    for target in [name("app.example"), name("db.example")] {
        locate(&mut association, &target).await;
    }
    publish(&association, tailnet.with_dns(&peers, &settings("100.64.0.3")));
    association.review();
    assert!(!association.knows(&name("app.example")) && is_at(&association, &name("db.example")));
    locate(&mut association, &name("app.example")).await;
    let known = |target| match association.targets.get(&name(target)) {
        Some(Known::At(remote)) => Some(remote.address()),
        _ => None,
    };
    assert_eq!(
        (known("app.example"), known("db.example")),
        (Some("100.64.0.3:9".parse().unwrap()), known("app.example"))
    );
}

#[tokio::test(flavor = "local")]
async fn refusal_stands_until_a_netmap_concerns_it_and_is_told_once() {
    let mut tailnet = Tailnet::new();
    let mut association = routed(&mut tailnet, &[]).await;
    let named = name("nobody.tb.example");
    for target in [&public(9), &named] {
        association.send(target, b"x").unwrap();
        let event = timeout(SOON, association.next()).await.unwrap();
        assert!(matches!(event, Event::Failed { told: false, .. }));
    }
    // Nothing but an endpoint is new.
    let moved = json!({ "Endpoints": ["127.0.0.1:9"] });
    let peers = |fields| {
        [
            node(2, "connector", &[], &json!({ "Hostinfo": { "AppConnector": true } })),
            node(3, "router", &[], fields),
            node(4, "exit", &[], &json!({})),
        ]
    };
    publish(&association, tailnet.peers(&peers(&moved)));
    assert_eq!(association.send(&public(9), b"x"), Err(Lost::Refused));
    assert_eq!(association.send(&named, b"x"), Err(Lost::Refused));
    // A route elsewhere may be what the name was waiting for; it cannot be for the address.
    publish(&association, tailnet.map(&[], &["203.0.113.0/24"], &[]));
    assert_eq!(association.send(&public(9), b"x"), Err(Lost::Refused));
    association.send(&named, b"x").unwrap();
    let event = timeout(SOON, association.next()).await.unwrap();
    assert!(matches!(event, Event::Failed { told: true, lost: 1, .. }), "{event:?}");
    publish(&association, tailnet.map(&[], &["192.0.2.0/24"], &[]));
    locate(&mut association, &public(9)).await;
    assert!(is_at(&association, &public(9)));
}
