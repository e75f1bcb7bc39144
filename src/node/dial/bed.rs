//! Netmaps for the tests of dialling: one connector, one router, one exit node, and what each is made to route.

use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::netmap::Netmap;
use crate::netmap::session::Session;

/// The connector's address.
pub(in crate::node) const CONNECTOR: &str = "100.64.0.2";

/// A tailnet of ours: we have both families.
pub(in crate::node) struct Tailnet {
    session: Session,
    own: Vec<&'static str>,
}

impl Tailnet {
    pub(in crate::node) fn new() -> Self {
        Self { session: Session::new(true), own: vec!["100.64.0.1/32", "fd7a:115c:a1e0::1/128"] }
    }

    /// The same with `exit` as exit node.
    pub(in crate::node) fn exiting() -> Self {
        Self { session: Session::new(true).with_exit_node("exit".to_owned()), ..Self::new() }
    }

    /// The same for a node without IPv6.
    pub(in crate::node) fn v4() -> Self {
        Self { own: vec!["100.64.0.1/32"], ..Self::new() }
    }

    /// The netmap in which the connector, the router and the exit node route so.
    pub(in crate::node) fn map(&mut self, connector: &[&str], router: &[&str], exit: &[&str]) -> Arc<Netmap> {
        self.peers(&[
            peer(2, "connector", connector, &json!({ "Hostinfo": { "AppConnector": true } })),
            peer(3, "router", router, &json!({})),
            peer(4, "exit", exit, &json!({})),
        ])
    }

    /// The netmap with these peers.
    pub(in crate::node) fn peers(&mut self, peers: &[Value]) -> Arc<Netmap> {
        self.with_dns(peers, &json!({}))
    }

    /// The netmap with these peers and DNS settings.
    pub(in crate::node) fn with_dns(&mut self, peers: &[Value], dns: &Value) -> Arc<Netmap> {
        self.session.restart();
        let key = format!("nodekey:{}", "11".repeat(32));
        let node = json!({ "ID": 1, "Name": "me.tb.example.", "Key": key, "Addresses": self.own });
        let message = serde_json::from_value(json!({ "Node": node, "Peers": peers, "DNSConfig": dns })).unwrap();
        self.session.apply(message, Timestamp::UNIX_EPOCH).unwrap().netmap.unwrap()
    }
}

/// A peer with 100.64.0.ID, and further fields.
pub(in crate::node) fn peer(id: u8, name: &str, routes: &[&str], fields: &Value) -> Value {
    let address = format!("100.64.0.{id}/32");
    let allowed: Vec<&str> = routes.iter().copied().chain([address.as_str()]).collect();
    let mut peer = json!({
        "ID": id, "StableID": format!("n{id}"), "Name": format!("{name}.tb.example."), "HomeDERP": 1, "Online": true,
        "Key": format!("nodekey:{}{id:02x}", "00".repeat(31)), "Addresses": [address], "AllowedIPs": allowed,
    });
    for (field, value) in fields.as_object().unwrap() {
        peer[field] = value.clone();
    }
    peer
}

/// Addresses from their texts.
pub(in crate::node) fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}
