//! Whose resolvers are the default while an exit node is used: what leaves by it is also named by it.
//!
//! An exit node that answers names replaces the default resolvers, but for those that control marks as meant for exit
//! nodes. Where it answers none, the settings stay, and the fallback resolvers are the default where no other is named.
//! A suffix that the tailnet claims keeps all its resolvers either way. Tailscale's client gives those up that are not
//! marked and has the exit node answer for the suffix; that would tell a private name to a stranger to it, dial a
//! connector's name past its connector, and make a name of the tailnet's one that a rule of the user's may let out.
//! Source: Tailscale, ipn/ipnlocal/node_backend.go, `dnsConfigForNetmap`, `exitNodeCanProxyDNS`.

use crate::netmap::{Netmap, Peer};
use crate::wire::tailcfg::dns::Resolver;

/// Where the PeerAPI answers names.
const PATH: &str = "/dns-query";

/// The exit node, if there is one.
fn exit_node(netmap: &Netmap) -> Option<&Peer> {
    netmap.peers.get(&netmap.exit_node?).map(AsRef::as_ref)
}

/// The resolver that the exit node itself is. The service must be named: by the capability version alone, as Tailscale
/// also decides, headscale's peers would all be resolvers, since it sends our own version as theirs.
fn proxy(netmap: &Netmap) -> Option<Resolver> {
    let peer = exit_node(netmap).filter(|peer| peer.peerapi_dns_proxy)?;
    let base = netmap.peerapi(peer)?;
    Some(Resolver { addr: format!("http://{base}{PATH}"), ..Resolver::default() })
}

/// The resolvers for every name that nothing else decides.
pub(super) fn defaults(netmap: &Netmap) -> Vec<Resolver> {
    let dns = &netmap.dns;
    if let Some(proxy) = proxy(netmap) {
        let meant: Vec<_> = dns.resolvers.iter().filter(|resolver| resolver.use_with_exit_node).cloned().collect();
        return if meant.is_empty() { vec![proxy] } else { meant };
    }
    let Some(peer) = exit_node(netmap).filter(|_| dns.resolvers.is_empty()) else { return dns.resolvers.clone() };
    if peer.exit_dns.is_empty() { dns.fallback_resolvers.clone() } else { peer.exit_dns.clone() }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;
    use serde_json::{Value, json};

    use super::super::{Decision, ResolverAddr, decide};
    use super::*;
    use crate::netmap::session::Session;

    fn netmap(services: &Value, dns: &Value, exit_dns: &Value) -> Arc<Netmap> {
        let key = |id: u8| format!("nodekey:{}{id:02x}", "00".repeat(31));
        let message = json!({
            "Node": {"ID": 1, "Name": "me.tb.example.", "Key": key(1), "Addresses": ["100.64.0.1/32"]},
            "Peers": [{"ID": 2, "StableID": "exit", "Name": "exit.tb.example.", "Key": key(2), "HomeDERP": 1,
                       "Addresses": ["100.64.0.2/32"], "AllowedIPs": ["100.64.0.2/32", "0.0.0.0/0", "::/0"],
                       "ExitNodeDNSResolvers": exit_dns, "Hostinfo": {"Services": services}}],
            "DNSConfig": dns,
        });
        let message = serde_json::from_value(message).unwrap();
        let mut session = Session::new(true).with_exit_node("exit".to_owned());
        session.apply(message, Timestamp::UNIX_EPOCH).unwrap().netmap.unwrap()
    }

    fn services() -> Value {
        json!([{"Proto": "peerapi4", "Port": 1234}, {"Proto": "peerapi-dns-proxy", "Port": 1}])
    }

    fn brief(resolvers: &[Resolver]) -> Vec<&str> {
        resolvers.iter().map(|resolver| resolver.addr.as_str()).collect()
    }

    #[test]
    fn an_exit_node_that_answers_names_is_the_default_and_what_the_tailnet_claims_stays_its_resolvers() {
        let connector = "http://100.64.0.9:1234/dns-query";
        let dns = json!({"Resolvers": [{"Addr": "10.0.0.1"}], "Routes": {
            "a.example": [{"Addr": "10.0.0.2"}, {"Addr": "10.0.0.3", "UseWithExitNode": true}],
            "app.example": [{"Addr": connector}], "c.example": [],
        }});
        let netmap = netmap(&services(), &dns, &Value::Null);
        assert_eq!(brief(&defaults(&netmap)), ["http://100.64.0.2:1234/dns-query"]);
        let decided = |name| decide(&netmap, name).unwrap();
        let by = |suffix: &str, texts: &[&str], connector| {
            let resolver = |text: &&str| Resolver { addr: (*text).to_owned(), ..Resolver::default() };
            let resolvers = texts.iter().map(|text| ResolverAddr::parse(&resolver(text))).collect();
            Decision::Resolvers { suffix: suffix.to_owned(), resolvers, connector }
        };
        assert_eq!(decided("x.a.example"), by("a.example", &["10.0.0.2", "10.0.0.3"], false));
        assert_eq!(decided("x.app.example"), by("app.example", &[connector], true));
        assert_eq!(decided("x.c.example"), Decision::Nonexistent { zone: "c.example".to_owned() });
        assert!(matches!(decided("x.other.example"), Decision::Default { .. }));
    }

    #[test]
    fn a_default_that_is_meant_for_exit_nodes_replaces_the_exit_node() {
        let dns = json!({"Resolvers": [{"Addr": "10.0.0.1", "UseWithExitNode": true}, {"Addr": "10.0.0.2"}]});
        assert_eq!(brief(&defaults(&netmap(&services(), &dns, &Value::Null))), ["10.0.0.1"]);
    }

    #[test]
    fn an_exit_node_that_answers_no_names_leaves_the_settings_and_falls_back() {
        let dns = json!({"FallbackResolvers": [{"Addr": "10.0.0.9"}]});
        let none = netmap(&json!([{"Proto": "peerapi4", "Port": 1234}]), &dns, &Value::Null);
        assert_eq!(brief(&defaults(&none)), ["10.0.0.9"]);
        let own = netmap(&Value::Null, &dns, &json!([{"Addr": "10.64.0.1"}]));
        assert_eq!(brief(&defaults(&own)), ["10.64.0.1"]);
        let without_peerapi = netmap(&json!([{"Proto": "peerapi-dns-proxy", "Port": 1}]), &dns, &Value::Null);
        assert_eq!(brief(&defaults(&without_peerapi)), ["10.0.0.9"]);
    }
}
