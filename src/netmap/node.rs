//! A node in control's words, put into ours.

use std::net::IpAddr;

use ipnet::IpNet;
use jiff::Timestamp;

use super::apps::Apps;
use super::{Masquerade, Peer, SelfNode};
use crate::wire::tailcfg::node::Node;

/// A clock before this is not set: no key expires by it.
/// Source: Tailscale, ipn/ipnlocal/expiry.go, `flagExpiredPeersEpoch`.
pub(super) const CLOCK_IS_SET: Timestamp = Timestamp::constant(1_673_373_066, 0);

/// The attribute of a node whose subdomains resolve to it. Source: Tailscale, tailcfg, `NodeAttrDNSSubdomainResolve`.
const SUBDOMAINS: &str = "dns-subdomain-resolve";

/// Whether the node's key has ended by control's word or clock.
pub(super) fn ended(node: &Node, clock: Timestamp) -> bool {
    node.expired || (clock >= CLOCK_IS_SET && node.key_expiry.is_some_and(|end| end <= clock))
}

/// Whether subdomains of the node's name resolve to it too.
pub(super) fn has_subdomains(node: &Node) -> bool {
    node.cap_map.contains_key(SUBDOMAINS) || node.capabilities.iter().any(|name| name == SUBDOMAINS)
}

/// A name in the one form that names have in a netmap: lower case, without trailing dot.
pub(super) fn name(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

fn addresses(prefixes: &[IpNet]) -> Vec<IpAddr> {
    prefixes.iter().filter(|net| net.prefix_len() == net.max_prefix_len()).map(IpNet::addr).collect()
}

/// A peer in our words. One whose key has ended has no path: nothing shall be sent to it.
pub(super) fn peer(node: &Node, clock: Timestamp) -> Peer {
    let expired = ended(node, clock);
    let allowed_ips = match &node.allowed_ips {
        Some(allowed_ips) if !node.unsigned_peer_api_only => allowed_ips.clone(),
        Some(_) | None => node.addresses.clone(),
    };
    Peer {
        id: node.id,
        stable_id: node.stable_id.clone(),
        name: name(&node.name),
        key: node.key,
        disco: Some(node.disco_key).filter(|key| !key.is_zero()),
        addresses: addresses(&node.addresses),
        allowed_ips,
        primary_routes: node.primary_routes.clone(),
        endpoints: if expired { Vec::new() } else { node.endpoints.clone() },
        home_derp: node.derp_region().filter(|_| !expired),
        online: node.online,
        expired,
        wireguard_only: node.is_wireguard_only,
        jailed: node.is_jailed,
        masquerade: Masquerade { v4: node.masquerade_v4, v6: node.masquerade_v6 },
        peerapi: node.offers.peerapi,
        peerapi_dns_proxy: node.offers.peerapi_dns_proxy,
        exit_dns: node.exit_node_dns_resolvers.clone(),
        app_connector: node.offers.app_connector,
        tags: node.tags.clone(),
    }
}

/// Ourselves in our words.
pub(super) fn self_node(node: &Node, clock: Timestamp) -> SelfNode {
    let mut attributes = node.cap_map.clone();
    for name in &node.capabilities {
        attributes.entry(name.clone()).or_default();
    }
    SelfNode {
        id: node.id,
        name: name(&node.name),
        key: node.key,
        addresses: addresses(&node.addresses),
        key_expiry: node.key_expiry,
        expired: ended(node, clock),
        authorized: node.machine_authorized,
        tags: node.tags.clone(),
        apps: Apps::of(&attributes),
        attributes,
    }
}
