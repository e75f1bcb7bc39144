//! Who decides a name, while the tailnet's settings change.

use serde_json::json;

use super::bed::{Tailnet, ips, peer};
use super::*;
use crate::node::{Config, Node};

fn named(name: &str) -> Target {
    Target { host: Host::Name(name.to_owned()), port: 80 }
}

#[tokio::test(flavor = "local")]
async fn a_name_that_changes_hands_while_it_is_asked_is_decided_anew() {
    let node = Node::alone(Config { dial_timeout: Duration::from_millis(200), ..Config::default() });
    let mut tailnet = Tailnet::new();
    let peers = [peer(3, "router", &["10.20.0.0/16"], &json!({}))];
    let silent = json!({ "Routes": { "corp.example": [{ "Addr": "10.20.0.53" }] } });
    let record = json!({ "ExtraRecords": [{ "Name": "a.corp.example", "Value": "10.20.0.80" }] });
    let (before, after) = (tailnet.with_dns(&peers, &silent), tailnet.with_dns(&peers, &record));
    let inner = &node.inner;
    // The netmap that a node alone has comes first.
    inner.netmap.clone().wait_for(Option::is_some).await.unwrap();
    inner.core.borrow_mut().handle_netmap(before.clone(), Instant::now());
    let target = named("a.corp.example");
    let located = locate(inner, before.clone(), &target, Instant::now() + inner.config.dial_timeout);
    // Polled second, so once the name is asked.
    let changed = async { inner.core.borrow_mut().handle_netmap(after, Instant::now()) };
    let Ok(Place::Tunnel(_, addresses)) = tokio::join!(biased; located, changed).0 else {
        panic!("by the extra record")
    };
    assert_eq!(addresses, ips(&["10.20.0.80"]));
}

#[tokio::test(flavor = "local")]
async fn what_the_machine_says_of_a_name_counts_only_while_the_tailnet_does_not_decide_it() {
    let allowed = vec![DirectRule::Name("localhost".to_owned())];
    let node = Node::alone(Config { direct_allow: allowed, ..Config::default() });
    let inner = &node.inner;
    inner.netmap.clone().wait_for(Option::is_some).await.unwrap();
    let limit = Instant::now() + Duration::from_secs(5);
    let target = named("localhost");
    assert!(direct::addresses(inner, &target, limit).await.is_ok());
    let claimed = json!({ "Routes": { "localhost": [{ "Addr": "10.20.0.53" }] } });
    inner.core.borrow_mut().handle_netmap(Tailnet::new().with_dns(&[], &claimed), Instant::now());
    let error = direct::addresses(inner, &target, limit).await.unwrap_err();
    assert!(error.to_string().contains("decides the name by now"), "{error}");
}

#[tokio::test(flavor = "local")]
async fn a_single_label_is_let_out_only_where_it_cannot_mean_a_name_of_the_tailnets() {
    let node = Node::alone(Config::default());
    let outside = |dns: &serde_json::Value, name: &str| {
        let netmap = Tailnet::new().with_dns(&[], dns);
        is_outside(&node.inner, &netmap, &Host::Name(name.to_owned())).unwrap()
    };
    let claimed = json!({ "Domains": ["corp.example"], "Routes": { "corp.example": [{ "Addr": "10.20.0.53" }] } });
    assert!(!outside(&claimed, "wiki"));
    assert!(outside(&claimed, "wiki."));
    assert!(outside(&claimed, "wiki.example"));
    let elsewhere = json!({ "Domains": ["corp.example"], "Resolvers": [{ "Addr": "9.9.9.9" }] });
    assert!(outside(&elsewhere, "wiki"));
    let known = json!({ "Domains": ["tb.example"], "Proxied": true });
    assert!(outside(&known, "wiki"), "the tailnet knows that it has no such name");
    assert!(!outside(&known, "wiki.tb.example"));
}

#[test]
fn the_wait_for_a_route_leaves_time_to_connect() {
    let share = |seconds| connecting_share(Duration::from_secs(seconds));
    assert_eq!([share(30), share(20), share(8)], [5, 5, 2].map(Duration::from_secs));
}
