//! What a host says of itself: ours to control, and what a peer offers of that which control passes on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A host's description. Empty fields are not written. Source: Tailscale, tailcfg, `Hostinfo`.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Hostinfo {
    /// Our version, as administrators see it.
    #[serde(rename = "IPNVersion", skip_serializing_if = "String::is_empty")]
    pub ipn_version: String,
    /// A random 64-digit hexadecimal id of this run.
    #[serde(rename = "BackendLogID", skip_serializing_if = "String::is_empty")]
    pub backend_log_id: String,
    /// `linux`, `windows`, `macOS`.
    #[serde(rename = "OS", skip_serializing_if = "String::is_empty")]
    pub os: String,
    /// The operating system's version.
    #[serde(rename = "OSVersion", skip_serializing_if = "String::is_empty")]
    pub os_version: String,
    /// Whether we run in a container.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<bool>,
    /// The program that embeds the node.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub app: String,
    /// The processor's architecture, in Go's words: `amd64`, `arm64`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub go_arch: String,
    /// The name asked for; MagicDNS names come from it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub hostname: String,
    /// Whether inbound connections are refused. Informational.
    #[serde(skip_serializing_if = "is_false")]
    pub shields_up: bool,
    /// That we upload no logs.
    #[serde(rename = "NoLogsNoSupport", skip_serializing_if = "is_false")]
    pub no_logs_no_support: bool,
    /// Tags to ask for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub request_tags: Vec<String>,
    /// What our network is like; carries our home DERP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net_info: Option<NetInfo>,
    /// That the tunnel ends in this process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub userspace: Option<bool>,
    /// That routes end in this process too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub userspace_router: Option<bool>,
    /// The stable id of the exit node in use.
    #[serde(rename = "ExitNodeID", skip_serializing_if = "String::is_empty")]
    pub exit_node_id: String,
}

/// What a peer offers by its host's description, which says much more. Read as that alone: ten thousand are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(from = "Description")]
pub struct Offers {
    /// The PeerAPI ports for IPv4 and IPv6; 0 for none.
    pub peerapi: (u16, u16),
    /// Whether its PeerAPI answers DNS questions. Source: Tailscale, tailcfg, `PeerAPIDNS`.
    pub peerapi_dns_proxy: bool,
    /// Whether it serves as an app connector.
    pub app_connector: bool,
}

/// The part of [`Hostinfo`] that we look at in a peer's.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Description {
    #[serde(default, deserialize_with = "super::list")]
    services: Vec<Service>,
    #[serde(default, deserialize_with = "super::lenient")]
    app_connector: bool,
}

/// A port that a host serves: `peerapi4`, `peerapi6`, `tcp`, `udp`; for `peerapi-dns-proxy` a version.
/// Source: Tailscale, tailcfg, `Service`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Service {
    proto: String,
    port: u16,
}

impl From<Description> for Offers {
    fn from(description: Description) -> Self {
        let port = |proto| {
            description.services.iter().find(|service| service.proto == proto).map_or(0, |service| service.port)
        };
        Self {
            peerapi: (port("peerapi4"), port("peerapi6")),
            peerapi_dns_proxy: port("peerapi-dns-proxy") > 0,
            app_connector: description.app_connector,
        }
    }
}

/// What netcheck found. Source: Tailscale, tailcfg, `NetInfo`.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct NetInfo {
    /// Whether the NAT maps each destination to another port.
    #[serde(rename = "MappingVariesByDestIP", skip_serializing_if = "Option::is_none")]
    pub mapping_varies_by_dest_ip: Option<bool>,
    /// Whether IPv6 reaches the internet.
    #[serde(rename = "WorkingIPv6", skip_serializing_if = "Option::is_none")]
    pub working_ipv6: Option<bool>,
    /// Whether the operating system has IPv6 at all.
    #[serde(rename = "OSHasIPv6", skip_serializing_if = "Option::is_none")]
    pub os_has_ipv6: Option<bool>,
    /// Whether UDP works.
    #[serde(rename = "WorkingUDP", skip_serializing_if = "Option::is_none")]
    pub working_udp: Option<bool>,
    /// The home DERP region; 0 while none is chosen. Peers learn it from here, and from nowhere else.
    #[serde(rename = "PreferredDERP", skip_serializing_if = "is_zero")]
    pub preferred_derp: u32,
    /// Seconds to each region, by `"<region>-v4"` or `"<region>-v6"`.
    #[serde(rename = "DERPLatency", skip_serializing_if = "BTreeMap::is_empty")]
    pub derp_latency: BTreeMap<String, f64>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_false(value: &bool) -> bool {
    !value
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(value: &u32) -> bool {
    *value == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_hostinfo_writes_nothing() {
        assert_eq!(serde_json::to_string(&Hostinfo::default()).unwrap(), "{}");
        assert_eq!(serde_json::to_string(&NetInfo::default()).unwrap(), "{}");
    }

    #[test]
    fn our_hostinfo_has_gos_field_names() {
        let ours = Hostinfo {
            ipn_version: String::from("1"),
            backend_log_id: String::from("2"),
            os: String::from("linux"),
            hostname: String::from("h"),
            shields_up: true,
            no_logs_no_support: true,
            userspace: Some(true),
            net_info: Some(NetInfo { preferred_derp: 3, working_udp: Some(false), ..NetInfo::default() }),
            ..Hostinfo::default()
        };
        let json = serde_json::to_string(&ours).unwrap();
        let expected = r#"{"IPNVersion":"1","BackendLogID":"2","OS":"linux","Hostname":"h","ShieldsUp":true,"NoLogsNoSupport":true,"NetInfo":{"WorkingUDP":false,"PreferredDERP":3},"Userspace":true}"#;
        assert_eq!(json, expected);
    }

    #[test]
    fn peerapi_ports_come_from_the_services() {
        let json = r#"{"Services":[{"Proto":"peerapi4","Port":39697},{"Proto":"tcp","Port":-1},{"Proto":"peerapi6","Port":1}]}"#;
        let offers: Offers = serde_json::from_str(json).unwrap();
        assert_eq!(offers, Offers { peerapi: (39697, 1), ..Offers::default() });
        let json = r#"{"Services":[{"Proto":"peerapi-dns-proxy","Port":1}]}"#;
        assert!(serde_json::from_str::<Offers>(json).unwrap().peerapi_dns_proxy);
        let json = r#"{"Hostname":"h","Services":null,"AppConnector":true}"#;
        assert_eq!(serde_json::from_str::<Offers>(json).unwrap(), Offers { app_connector: true, ..Offers::default() });
    }
}
