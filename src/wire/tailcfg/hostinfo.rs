//! What a host says of itself: ours to control, and the part of a peer's that control passes on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A host's description. Empty fields are not written. Source: Tailscale, tailcfg, `Hostinfo`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Hostinfo {
    /// Our version, as administrators see it.
    #[serde(
        rename = "IPNVersion",
        default,
        deserialize_with = "super::lenient",
        skip_serializing_if = "String::is_empty"
    )]
    pub ipn_version: String,
    /// A random 64-digit hexadecimal id of this run.
    #[serde(
        rename = "BackendLogID",
        default,
        deserialize_with = "super::lenient",
        skip_serializing_if = "String::is_empty"
    )]
    pub backend_log_id: String,
    /// `linux`, `windows`, `macOS`.
    #[serde(rename = "OS", default, deserialize_with = "super::lenient", skip_serializing_if = "String::is_empty")]
    pub os: String,
    /// The operating system's version.
    #[serde(
        rename = "OSVersion",
        default,
        deserialize_with = "super::lenient",
        skip_serializing_if = "String::is_empty"
    )]
    pub os_version: String,
    /// Whether we run in a container.
    #[serde(default, deserialize_with = "super::lenient", skip_serializing_if = "Option::is_none")]
    pub container: Option<bool>,
    /// The program that embeds the node.
    #[serde(default, deserialize_with = "super::lenient", skip_serializing_if = "String::is_empty")]
    pub app: String,
    /// The processor's architecture, in Go's words: `amd64`, `arm64`.
    #[serde(default, deserialize_with = "super::lenient", skip_serializing_if = "String::is_empty")]
    pub go_arch: String,
    /// The name asked for; MagicDNS names come from it.
    #[serde(default, deserialize_with = "super::lenient", skip_serializing_if = "String::is_empty")]
    pub hostname: String,
    /// Whether inbound connections are refused. Informational.
    #[serde(default, deserialize_with = "super::lenient", skip_serializing_if = "is_false")]
    pub shields_up: bool,
    /// That we upload no logs.
    #[serde(
        rename = "NoLogsNoSupport",
        default,
        deserialize_with = "super::lenient",
        skip_serializing_if = "is_false"
    )]
    pub no_logs_no_support: bool,
    /// Tags to ask for.
    #[serde(default, deserialize_with = "super::list", skip_serializing_if = "Vec::is_empty")]
    pub request_tags: Vec<String>,
    /// PeerAPI ports and their like.
    #[serde(default, deserialize_with = "super::list", skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<Service>,
    /// What our network is like; carries our home DERP.
    #[serde(default, deserialize_with = "super::lenient", skip_serializing_if = "Option::is_none")]
    pub net_info: Option<NetInfo>,
    /// That the tunnel ends in this process.
    #[serde(default, deserialize_with = "super::lenient", skip_serializing_if = "Option::is_none")]
    pub userspace: Option<bool>,
    /// That routes end in this process too.
    #[serde(default, deserialize_with = "super::lenient", skip_serializing_if = "Option::is_none")]
    pub userspace_router: Option<bool>,
    /// Whether it serves as an app connector.
    #[serde(default, deserialize_with = "super::lenient", skip_serializing_if = "Option::is_none")]
    pub app_connector: Option<bool>,
    /// The stable id of the exit node in use.
    #[serde(
        rename = "ExitNodeID",
        default,
        deserialize_with = "super::lenient",
        skip_serializing_if = "String::is_empty"
    )]
    pub exit_node_id: String,
}

impl Hostinfo {
    /// Forgets all but what [`peerapi`](Self::peerapi) and its like need.
    pub fn keep_services(&mut self) {
        let (services, app_connector) = (std::mem::take(&mut self.services), self.app_connector);
        *self = Self { services, app_connector, ..Self::default() };
    }

    /// The PeerAPI ports for IPv4 and IPv6; 0 for none.
    pub fn peerapi(&self) -> (u16, u16) {
        let port =
            |proto| self.services.iter().find(|service| service.proto == proto).map_or(0, |service| service.port);
        (port("peerapi4"), port("peerapi6"))
    }

    /// Whether its PeerAPI answers DNS questions. Source: Tailscale, tailcfg, `PeerAPIDNS`.
    pub fn peerapi_dns_proxy(&self) -> bool {
        self.services.iter().any(|service| service.proto == "peerapi-dns-proxy" && service.port > 0)
    }
}

/// A port that a host serves. Source: Tailscale, tailcfg, `Service`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Service {
    /// `peerapi4`, `peerapi6`, `peerapi-dns-proxy`, `tcp`, `udp`.
    pub proto: String,
    /// The port; for `peerapi-dns-proxy` a version.
    pub port: u16,
}

/// What netcheck found. Source: Tailscale, tailcfg, `NetInfo`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct NetInfo {
    /// Whether the NAT maps each destination to another port.
    #[serde(
        rename = "MappingVariesByDestIP",
        default,
        deserialize_with = "super::lenient",
        skip_serializing_if = "Option::is_none"
    )]
    pub mapping_varies_by_dest_ip: Option<bool>,
    /// Whether IPv6 reaches the internet.
    #[serde(
        rename = "WorkingIPv6",
        default,
        deserialize_with = "super::lenient",
        skip_serializing_if = "Option::is_none"
    )]
    pub working_ipv6: Option<bool>,
    /// Whether the operating system has IPv6 at all.
    #[serde(
        rename = "OSHasIPv6",
        default,
        deserialize_with = "super::lenient",
        skip_serializing_if = "Option::is_none"
    )]
    pub os_has_ipv6: Option<bool>,
    /// Whether UDP works.
    #[serde(
        rename = "WorkingUDP",
        default,
        deserialize_with = "super::lenient",
        skip_serializing_if = "Option::is_none"
    )]
    pub working_udp: Option<bool>,
    /// The home DERP region; 0 while none is chosen. Peers learn it from here, and from nowhere else.
    #[serde(rename = "PreferredDERP", default, deserialize_with = "super::lenient", skip_serializing_if = "is_zero")]
    pub preferred_derp: u32,
    /// Seconds to each region, by `"<region>-v4"` or `"<region>-v6"`.
    #[serde(
        rename = "DERPLatency",
        default,
        deserialize_with = "super::map",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
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
        assert_eq!(serde_json::from_str::<Hostinfo>(&json).unwrap(), ours);
    }

    #[test]
    fn peerapi_ports_come_from_the_services() {
        let json = r#"{"Services":[{"Proto":"peerapi4","Port":39697},{"Proto":"tcp","Port":-1},{"Proto":"peerapi6","Port":1}]}"#;
        let hostinfo: Hostinfo = serde_json::from_str(json).unwrap();
        assert_eq!((hostinfo.peerapi(), hostinfo.peerapi_dns_proxy()), ((39697, 1), false));
        let json = r#"{"Services":[{"Proto":"peerapi-dns-proxy","Port":1}]}"#;
        assert!(serde_json::from_str::<Hostinfo>(json).unwrap().peerapi_dns_proxy());
    }
}
