//! A node as control describes it, to itself and to its peers, and the patches that change one.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::Value;

use super::dns::Resolver;
use super::hostinfo::Offers;
use crate::key::{DiscoPublic, NodePublic};

/// What prefixes a region's number in the legacy form of a home DERP, as in `127.3.3.40:7`.
/// Source: Tailscale, tailcfg, `DerpMagicIP`.
const DERP_MAGIC: &str = "127.3.3.40:";

/// A node. A value without id or key is an error, so that a list leaves it out.
///
/// Source: Tailscale, tailcfg, `Node`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Node {
    /// Control's number for it; the key of every delta.
    #[serde(rename = "ID")]
    pub id: i64,
    /// The id that people see.
    #[serde(rename = "StableID", default, deserialize_with = "super::lenient")]
    pub stable_id: String,
    /// The full name, usually with a trailing dot.
    #[serde(default, deserialize_with = "super::lenient")]
    pub name: String,
    /// The node key.
    pub key: NodePublic,
    /// When the key ends; `None` for never.
    #[serde(default, deserialize_with = "super::time")]
    pub key_expiry: Option<Timestamp>,
    /// The tailnet lock's signature of the key; empty if there is none.
    #[serde(default, deserialize_with = "super::lenient")]
    pub key_signature: super::Bytes,
    /// The disco key; zero for none.
    #[serde(default, deserialize_with = "super::lenient")]
    pub disco_key: DiscoPublic,
    /// The node's own addresses, as host prefixes.
    #[serde(default, deserialize_with = "super::prefixes")]
    pub addresses: Vec<IpNet>,
    /// What it may send from and serves; `None` means the same as `addresses`.
    #[serde(rename = "AllowedIPs", default, deserialize_with = "super::optional_prefixes")]
    pub allowed_ips: Option<Vec<IpNet>>,
    /// The subnet routes for which control has chosen it among all who serve them.
    #[serde(default, deserialize_with = "super::prefixes")]
    pub primary_routes: Vec<IpNet>,
    /// Where it says that it can be reached.
    #[serde(default, deserialize_with = "super::list")]
    pub endpoints: Vec<SocketAddr>,
    /// The home DERP's legacy form; counts only while [`home_derp`](Self::home_derp) is 0.
    #[serde(rename = "DERP", default, deserialize_with = "super::lenient")]
    pub legacy_derp: String,
    /// The home DERP region; 0 for none. See [`derp_region`](Self::derp_region).
    #[serde(rename = "HomeDERP", default, deserialize_with = "super::lenient")]
    pub home_derp: u32,
    /// What it offers to others.
    #[serde(rename = "Hostinfo", default, deserialize_with = "super::lenient")]
    pub offers: Offers,
    /// Its tags.
    #[serde(default, deserialize_with = "super::list")]
    pub tags: Vec<String>,
    /// Whether it is connected to control; `None` if control does not say.
    #[serde(default, deserialize_with = "super::lenient")]
    pub online: Option<bool>,
    /// Whether an administrator has approved it, or none is needed. Only the self node has it.
    #[serde(default, deserialize_with = "super::nullable")]
    pub machine_authorized: bool,
    /// Attributes in their older form, without values.
    #[serde(default, deserialize_with = "super::list")]
    pub capabilities: Vec<String>,
    /// Attributes with their values.
    #[serde(default, deserialize_with = "super::attributes")]
    pub cap_map: BTreeMap<String, Vec<Value>>,
    /// Not covered by the tailnet lock: only its own addresses count.
    #[serde(rename = "UnsignedPeerAPIOnly", default, deserialize_with = "super::nullable")]
    pub unsigned_peer_api_only: bool,
    /// Whether control says that its key has ended.
    #[serde(default, deserialize_with = "super::nullable")]
    pub expired: bool,
    /// Plain WireGuard, no disco and no DERP.
    #[serde(rename = "IsWireGuardOnly", default, deserialize_with = "super::nullable")]
    pub is_wireguard_only: bool,
    /// It may answer us but open nothing to us.
    #[serde(default, deserialize_with = "super::nullable")]
    pub is_jailed: bool,
    /// Our IPv4 address as it knows us, where that is not our own.
    #[serde(rename = "SelfNodeV4MasqAddrForThisPeer", default, deserialize_with = "super::lenient")]
    pub masquerade_v4: Option<Ipv4Addr>,
    /// The same for IPv6.
    #[serde(rename = "SelfNodeV6MasqAddrForThisPeer", default, deserialize_with = "super::lenient")]
    pub masquerade_v6: Option<Ipv6Addr>,
    /// Whom to ask for names while it is our exit node, if it is plain WireGuard.
    #[serde(rename = "ExitNodeDNSResolvers", default, deserialize_with = "super::list")]
    pub exit_node_dns_resolvers: Vec<Resolver>,
}

impl Node {
    /// The home DERP region in whichever form control gave it.
    pub fn derp_region(&self) -> Option<u32> {
        let legacy = || self.legacy_derp.strip_prefix(DERP_MAGIC)?.parse().ok();
        Some(self.home_derp).filter(|region| *region != 0).or_else(legacy).filter(|region| *region != 0)
    }

    /// Changes the fields that `patch` names. Source: Tailscale, control/controlclient, `patchPeerChange`.
    pub fn patch(&mut self, patch: PeerChange) {
        if patch.derp_region != 0 {
            self.home_derp = patch.derp_region;
        }
        if let Some(cap_map) = patch.cap_map {
            self.cap_map = cap_map;
        }
        if let Some(endpoints) = patch.endpoints {
            self.endpoints = endpoints;
        }
        if let Some(key) = patch.key {
            self.key = key;
        }
        if let Some(signature) = patch.key_signature {
            self.key_signature = signature;
        }
        if let Some(disco) = patch.disco_key {
            self.disco_key = disco;
        }
        if let Some(online) = patch.online {
            self.online = Some(online);
        }
        if let Some(key_expiry) = patch.key_expiry {
            self.key_expiry = key_expiry;
        }
    }
}

/// New values for some fields of one peer. Source: Tailscale, tailcfg, `PeerChange`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PeerChange {
    /// Which peer; an unknown one is ignored.
    #[serde(rename = "NodeID")]
    pub node_id: i64,
    /// The new home DERP region; 0 for unchanged.
    #[serde(rename = "DERPRegion", default, deserialize_with = "super::lenient")]
    pub derp_region: u32,
    /// All new attributes.
    #[serde(default, deserialize_with = "super::optional_attributes")]
    pub cap_map: Option<BTreeMap<String, Vec<Value>>>,
    /// All new endpoints.
    #[serde(default, deserialize_with = "super::optional_list")]
    pub endpoints: Option<Vec<SocketAddr>>,
    /// The new node key.
    #[serde(default)]
    pub key: Option<NodePublic>,
    /// The new key's signature.
    #[serde(default, deserialize_with = "super::lenient")]
    pub key_signature: Option<super::Bytes>,
    /// The new disco key.
    #[serde(default, deserialize_with = "super::lenient")]
    pub disco_key: Option<DiscoPublic>,
    /// Whether it is connected to control.
    #[serde(default, deserialize_with = "super::lenient")]
    pub online: Option<bool>,
    /// When the key ends, `Some(None)` for never any more; `None` for unchanged.
    #[serde(default, deserialize_with = "super::changed_time")]
    pub key_expiry: Option<Option<Timestamp>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "nodekey:00000000000000000000000000000000000000000000000000000000000000ff";

    fn node(fields: &str) -> Result<Node, serde_json::Error> {
        serde_json::from_str(&format!(r#"{{"ID":7,"Key":"{KEY}",{fields}}}"#))
    }

    #[test]
    fn null_is_empty_in_every_field() {
        let node = node(
            r#""Addresses":null,"AllowedIPs":null,"Endpoints":null,"Hostinfo":null,"Tags":null,"CapMap":null,"Name":null,
               "KeyExpiry":null,"DiscoKey":null,"Online":null,"Expired":null,"KeySignature":null,"Capabilities":null,
               "IsWireGuardOnly":null,"UnsignedPeerAPIOnly":null,"IsJailed":null,"PrimaryRoutes":null,
               "SelfNodeV4MasqAddrForThisPeer":null,"SelfNodeV6MasqAddrForThisPeer":null,"ExitNodeDNSResolvers":null,"MachineAuthorized":null,"HomeDERP":null,"StableID":null"#,
        )
        .unwrap();
        let bare = Node { id: 7, key: KEY.parse().unwrap(), ..Node::default() };
        assert_eq!(node, bare);
    }

    #[test]
    fn the_zero_time_is_no_expiry() {
        assert_eq!(node(r#""KeyExpiry":"0001-01-01T00:00:00Z""#).unwrap().key_expiry, None);
        assert!(node(r#""KeyExpiry":"2026-10-07T17:23:30Z""#).unwrap().key_expiry.is_some());
    }

    #[test]
    fn a_patch_with_the_zero_time_takes_the_expiry_away() {
        let mut node = node(r#""KeyExpiry":"2026-10-07T17:23:30Z""#).unwrap();
        node.patch(serde_json::from_str(r#"{"NodeID":7}"#).unwrap());
        assert!(node.key_expiry.is_some());
        node.patch(serde_json::from_str(r#"{"NodeID":7,"KeyExpiry":"0001-01-01T00:00:00Z"}"#).unwrap());
        assert_eq!(node.key_expiry, None);
    }

    #[test]
    fn a_garbled_element_is_left_out_and_a_garbled_key_is_an_error() {
        let node =
            node(r#""Endpoints":["1.2.3.4:5",7,"x","[::1]:6"],"AllowedIPs":["10.1.2.3/8","nonsense","100.64.0.1"]"#);
        let node = node.unwrap();
        assert_eq!(node.endpoints, ["1.2.3.4:5".parse().unwrap(), "[::1]:6".parse().unwrap()]);
        assert_eq!(node.allowed_ips, Some(vec!["10.0.0.0/8".parse().unwrap(), "100.64.0.1/32".parse().unwrap()]));
        assert!(serde_json::from_str::<Node>(r#"{"ID":7,"Key":"mkey:00"}"#).is_err());
        assert!(serde_json::from_str::<Node>(r#"{"ID":7}"#).is_err());
    }

    #[test]
    fn a_masquerade_address_of_the_wrong_family_is_none() {
        let node = node(
            r#""SelfNodeV4MasqAddrForThisPeer":"100.64.9.1","SelfNodeV6MasqAddrForThisPeer":"100.64.9.1","IsJailed":true,
               "PrimaryRoutes":["10.1.2.3/8"],"ExitNodeDNSResolvers":[{"Addr":"10.64.0.1"},7]"#,
        );
        let node = node.unwrap();
        assert_eq!((node.masquerade_v4, node.masquerade_v6), (Some(Ipv4Addr::new(100, 64, 9, 1)), None));
        assert_eq!((node.is_jailed, node.primary_routes), (true, vec!["10.0.0.0/8".parse().unwrap()]));
        assert_eq!(node.exit_node_dns_resolvers.len(), 1);
    }

    #[test]
    fn the_legacy_home_derp_counts_only_without_the_new_one() {
        assert_eq!(node(r#""DERP":"127.3.3.40:9""#).unwrap().derp_region(), Some(9));
        assert_eq!(node(r#""DERP":"127.3.3.40:9","HomeDERP":2"#).unwrap().derp_region(), Some(2));
        assert_eq!(node(r#""DERP":"127.3.3.40:0""#).unwrap().derp_region(), None);
    }

    #[test]
    fn an_attribute_without_values_is_present() {
        let node = node(r#""CapMap":{"a":null,"b":[1,{"x":2}]}"#).unwrap();
        assert_eq!(node.cap_map["a"], Vec::<Value>::new());
        assert_eq!(node.cap_map["b"].len(), 2);
    }

    #[test]
    fn a_patch_changes_what_it_names_and_nothing_else() {
        let mut node = node(r#""HomeDERP":1,"Endpoints":["1.2.3.4:5"],"Online":true"#).unwrap();
        let before = node.clone();
        node.patch(serde_json::from_str(r#"{"NodeID":7,"Endpoints":null,"Online":null}"#).unwrap());
        assert_eq!(node, before);
        node.patch(serde_json::from_str(r#"{"NodeID":7,"DERPRegion":4,"Endpoints":[],"Online":false}"#).unwrap());
        assert_eq!(node, Node { home_derp: 4, endpoints: Vec::new(), online: Some(false), ..before });
    }
}
