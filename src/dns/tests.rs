//! Decisions by a table of names, and by a model that looks at everything in a line.

use std::sync::Arc;

use jiff::Timestamp;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::netmap::session::Session;

fn netmap(dns: Value) -> Arc<Netmap> {
    let node = |id: u8, name: &str, subdomains: bool| {
        json!({
            "ID": id, "Name": name, "Key": format!("nodekey:{}{id:02x}", "00".repeat(31)), "HomeDERP": 1,
            "Addresses": [format!("fd7a:115c:a1e0::{id}/128"), format!("100.64.0.{id}/32")],
            "CapMap": if subdomains { json!({"dns-subdomain-resolve": null}) } else { Value::Null },
        })
    };
    let message = json!({
        "Node": node(1, "Me.tail1.ts.net.", false),
        "Peers": [
            node(2, "git.tail1.ts.net.", false), node(3, "apps.tail1.ts.net.", true),
            node(4, "shared.other.ts.net.", false),
        ],
        "DNSConfig": dns,
    });
    let message = serde_json::from_value(message).unwrap();
    Session::new(true).apply(message, Timestamp::UNIX_EPOCH).unwrap().netmap.unwrap()
}

fn full() -> Arc<Netmap> {
    netmap(json!({
        "Proxied": true,
        "Domains": ["tail1.ts.net", "corp.example", "bad domain"],
        "Resolvers": [{"Addr": "10.9.9.9"}],
        "Routes": {
            "corp.example.": [{"Addr": "10.0.0.53"}],
            "deep.corp.example": [{"Addr": "10.0.0.54"}],
            "dead.corp.example": [],
            "app.example": [{"Addr": "http://100.64.0.3:1234/dns-query"}],
            "k8s.tail1.ts.net": [{"Addr": "10.0.0.55"}],
            "odd.example": [{"Addr": "tls://1.1.1.1"}],
        },
        "ExtraRecords": [
            {"Name": "Wiki.Example.", "Value": "10.0.0.80"}, {"Name": "wiki.example", "Type": "AAAA", "Value": "fd00::80"},
            {"Name": "in.corp.example", "Type": "A", "Value": "10.0.0.81"}, {"Name": "txt.example", "Type": "TXT", "Value": "x"},
        ],
    }))
}

/// A decision in one line.
fn brief(decision: Decision) -> String {
    match decision {
        Decision::Addresses { addresses, source } => format!("{source:?} {}", addresses[0]),
        Decision::Nonexistent { zone } => format!("none in {zone}"),
        Decision::Resolvers { suffix, resolvers, connector } => {
            format!("{}{suffix} {}", if connector { "connector " } else { "" }, resolvers.len())
        }
        Decision::App { app, resolvers } => format!("app {app} {}", resolvers.len()),
        Decision::Default { resolvers } => format!("default {}", resolvers.len()),
        Decision::Nobody => String::from("nobody"),
    }
}

#[test]
fn every_name_is_decided_as_in_the_table() {
    let netmap = full();
    let table = [
        ("git", "Host 100.64.0.2"),
        ("GIT.", "Host 100.64.0.2"),
        ("git.tail1.ts.net", "Host 100.64.0.2"),
        ("Git.Tail1.TS.net.", "Host 100.64.0.2"),
        ("me", "Host 100.64.0.1"),
        ("x.y.apps.tail1.ts.net", "Host 100.64.0.3"),
        ("x.git.tail1.ts.net", "none in tail1.ts.net"),
        ("nosuch.tail1.ts.net", "none in tail1.ts.net"),
        ("tail1.ts.net", "none in tail1.ts.net"),
        ("xtail1.ts.net", "default 1"),
        ("shared", "default 1"),
        ("shared.other.ts.net", "Host 100.64.0.4"),
        ("nosuch.other.ts.net", "default 1"),
        ("pod.k8s.tail1.ts.net", "k8s.tail1.ts.net 1"),
        ("corp.example", "corp.example 1"),
        ("a.corp.example", "corp.example 1"),
        ("badcorp.example", "default 1"),
        ("a.deep.corp.example", "deep.corp.example 1"),
        ("xdeep.corp.example", "corp.example 1"),
        ("a.dead.corp.example", "none in dead.corp.example"),
        ("www.app.example", "connector app.example 1"),
        ("odd.example", "odd.example 1"),
        ("wiki.example", "ExtraRecord 10.0.0.80"),
        ("in.corp.example", "ExtraRecord 10.0.0.81"),
        ("sub.wiki.example", "none in wiki.example"),
        ("sub.in.corp.example", "corp.example 1"),
        ("txt.example", "default 1"),
        ("www.example.org", "default 1"),
        ("hidden.onion", "none in onion"),
        ("b\u{fc}cher.corp.example", "corp.example 1"),
        ("10-1-1-16-via-7", "Site fd7a:115c:a1e0:b1a:0:7:a01:110"),
        ("10-1-1-16-via-7.tail1.ts.net", "Site fd7a:115c:a1e0:b1a:0:7:a01:110"),
        ("10-1-1-16-via-7.corp.example", "corp.example 1"),
    ];
    for (name, expected) in table {
        assert_eq!(brief(decide(&netmap, name).unwrap()), expected, "{name}");
    }
}

#[test]
fn without_dns_settings_only_nodes_have_names() {
    let netmap = netmap(Value::Null);
    for (name, expected) in [("git", "Host 100.64.0.2"), ("nosuch.tail1.ts.net", "nobody"), ("example.org", "nobody")] {
        assert_eq!(brief(decide(&netmap, name).unwrap()), expected, "{name}");
    }
}

#[test]
fn a_route_of_the_root_takes_every_other_name() {
    let netmap = netmap(json!({"Routes": {".": [{"Addr": "10.0.0.1"}], "a.example": []}}));
    assert_eq!(brief(decide(&netmap, "example.org").unwrap()), " 1");
    assert_eq!(brief(decide(&netmap, "x.a.example").unwrap()), "none in a.example");
    assert_eq!(brief(decide(&netmap, "git").unwrap()), "Host 100.64.0.2");
}

#[test]
fn all_addresses_are_given_with_ipv4_first() {
    let addresses = vec!["100.64.0.2".parse().unwrap(), "fd7a:115c:a1e0::2".parse().unwrap()];
    assert_eq!(decide(&full(), "git"), Ok(Decision::Addresses { addresses, source: Source::Host }));
    let addresses = vec!["10.0.0.80".parse().unwrap(), "fd00::80".parse().unwrap()];
    assert_eq!(decide(&full(), "wiki.example"), Ok(Decision::Addresses { addresses, source: Source::ExtraRecord }));
}

#[test]
fn a_single_label_is_looked_for_under_the_search_domains_in_their_order() {
    let of = |name| candidates(&full(), name).unwrap();
    assert_eq!(of("Git"), ["git"]);
    assert_eq!(of("Wiki"), ["wiki.tail1.ts.net", "wiki.corp.example", "wiki"]);
    assert_eq!(of("wiki."), ["wiki"]);
    assert_eq!(of("a.b"), ["a.b"]);
    assert_eq!(of("b\u{fc}cher").last().unwrap(), "xn--bcher-kva");
    assert_eq!(candidates(&full(), "10.0.0.1"), Err(BadName::Address));
}

/// Who decides `name`, by looking at every setting: the order of the claims, then the longest of the last.
fn model(name: &str, routes: &[(String, u8)], records: &[String], proxied: bool, default: bool) -> String {
    let under = |zone: &str| zone.is_empty() || name == zone || name.ends_with(&format!(".{zone}"));
    if let Some(at) = records.iter().position(|record| record == name) {
        return format!("ExtraRecord 10.0.0.{at}");
    }
    for (node, address) in [("git", 2), ("me", 1), ("apps", 3)] {
        let full = format!("{node}.tail1.ts.net");
        if name == node || name == full || (node == "apps" && under(&full)) {
            return format!("Host 100.64.0.{address}");
        }
    }
    let mut claims: Vec<(String, u8)> = routes.iter().filter(|(suffix, _)| under(suffix)).cloned().collect();
    if proxied && under("tail1.ts.net") && !claims.iter().any(|(suffix, _)| suffix == "tail1.ts.net") {
        claims.push(("tail1.ts.net".to_owned(), 0));
    }
    if let Some((suffix, count)) = claims.into_iter().max_by_key(|(suffix, _)| suffix.len()) {
        return if count == 0 { format!("none in {suffix}") } else { format!("{suffix} {count}") };
    }
    if let Some(zone) = records.iter().filter(|record| under(record)).max_by_key(|record| record.len()) {
        return format!("none in {zone}");
    }
    if default { "default 1".to_owned() } else { "nobody".to_owned() }
}

fn any_name() -> impl Strategy<Value = String> {
    let label = prop::sample::select(vec!["a", "b", "ab", "git", "apps", "me", "corp"]);
    let end = prop::sample::select(vec!["", ".tail1.ts.net", ".example"]);
    (prop::collection::vec(label, 1..4), end).prop_map(|(labels, end)| labels.join(".") + end)
}

proptest! {
    #[test]
    fn every_decision_is_that_of_the_model(
        name in any_name(),
        routes in prop::collection::btree_map(prop_oneof![any_name(), Just(String::new())], 0_u8..3, 0..5),
        records in prop::collection::btree_set(any_name(), 0..4),
        proxied: bool,
        default: bool,
    ) {
        let routes: Vec<_> = routes.into_iter().collect();
        let records: Vec<_> = records.into_iter().collect();
        let resolvers = |count: u8| (0..count).map(|_| json!({"Addr": "10.0.0.53"})).collect::<Vec<_>>();
        let listed: serde_json::Map<_, _> =
            routes.iter().map(|(suffix, count)| (format!("{suffix}."), json!(resolvers(*count)))).collect();
        let extra: Vec<_> =
            records.iter().enumerate().map(|(at, name)| json!({"Name": name, "Value": format!("10.0.0.{at}")})).collect();
        let netmap = netmap(json!({
            "Proxied": proxied, "Routes": listed, "ExtraRecords": extra, "Resolvers": resolvers(u8::from(default)),
        }));
        let expected = model(&name, &routes, &records, proxied, default);
        prop_assert_eq!(brief(decide(&netmap, &name).unwrap()), expected, "{}", name);
    }
}
