//! The map poll: what we ask for and tell, and the stream of answers that builds a netmap.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Bytes;
use super::derp::DerpMapUpdate;
use super::dns::DnsConfig;
use super::hostinfo::Hostinfo;
use super::node::{Node, PeerChange};
use crate::key::{DiscoPublic, NodePublic};

/// The body of `POST /machine/map`. Source: Tailscale, tailcfg, `MapRequest`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct MapRequest<'a> {
    /// The capability version that we speak.
    pub version: u32,
    /// `zstd`, or empty for none.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub compress: &'a str,
    /// Whether to send keep-alives.
    pub keep_alive: bool,
    /// Our node key.
    pub node_key: NodePublic,
    /// Our disco key.
    pub disco_key: DiscoPublic,
    /// Whether to go on with deltas after the first answer.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stream: bool,
    /// Whether this only tells: the answer is to be thrown away.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub omit_peers: bool,
    /// Who we are.
    pub hostinfo: &'a Hostinfo,
    /// Where we can be reached.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub endpoints: &'a [SocketAddr],
    /// How we know, one for each endpoint.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub endpoint_types: &'a [EndpointType],
}

/// How an endpoint is known. Source: Tailscale, tailcfg, `EndpointType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum EndpointType {
    /// An address of a local interface.
    Local = 1,
    /// What a STUN server saw.
    Stun = 2,
    /// What STUN saw, with the local port, for symmetric NATs that forward a port.
    Stun4LocalPort = 4,
}

impl Serialize for EndpointType {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(*self as u8)
    }
}

/// One message of the map stream. In a delta, `None` and empty lists mean "as before".
///
/// Source: Tailscale, tailcfg, `MapResponse`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct MapResponse {
    /// Only says that the stream is alive; nothing of the map is in it.
    #[serde(default, deserialize_with = "super::nullable")]
    pub keep_alive: bool,
    /// A question to be answered.
    #[serde(default, deserialize_with = "super::lenient")]
    pub ping_request: Option<PingRequest>,
    /// A page for a person to visit.
    #[serde(rename = "PopBrowserURL", default, deserialize_with = "super::lenient")]
    pub pop_browser_url: String,
    /// Ourselves, whole.
    #[serde(default, deserialize_with = "super::nullable")]
    pub node: Option<Node>,
    /// Regions of DERP.
    #[serde(rename = "DERPMap", default, deserialize_with = "super::nullable")]
    pub derp_map: Option<DerpMapUpdate>,
    /// All peers; empty for as before.
    #[serde(default, deserialize_with = "super::list")]
    pub peers: Vec<Box<Node>>,
    /// Peers that are new or changed, whole.
    #[serde(default, deserialize_with = "super::list")]
    pub peers_changed: Vec<Box<Node>>,
    /// Peers that are gone.
    #[serde(default, deserialize_with = "super::list")]
    pub peers_removed: Vec<i64>,
    /// Single fields of peers.
    #[serde(default, deserialize_with = "super::list")]
    pub peers_changed_patch: Vec<PeerChange>,
    /// Who came online or went offline.
    #[serde(default, deserialize_with = "super::map")]
    pub online_change: BTreeMap<i64, bool>,
    /// The DNS settings, whole.
    #[serde(rename = "DNSConfig", default, deserialize_with = "super::nullable")]
    pub dns_config: Option<DnsConfig>,
    /// The tailnet's name; empty for as before.
    #[serde(default, deserialize_with = "super::lenient")]
    pub domain: String,
    /// Problems that control sees with us, all of them; an empty list clears.
    #[serde(default, deserialize_with = "super::optional_list")]
    pub health: Option<Vec<String>>,
    /// Messages to show, by id. `None` as value deletes one; the id `*` deletes all others first.
    #[serde(default, deserialize_with = "super::map")]
    pub display_messages: BTreeMap<String, Option<DisplayMessage>>,
    /// Control's clock.
    #[serde(default, deserialize_with = "super::time")]
    pub control_time: Option<Timestamp>,
    /// The tailnet lock's state.
    #[serde(rename = "TKAInfo", default, deserialize_with = "super::lenient")]
    pub lock: Option<LockState>,
    /// Wishes for the client's behaviour.
    #[serde(default, deserialize_with = "super::lenient")]
    pub debug: Option<Debug>,
    /// Where to find control without DNS.
    #[serde(default, deserialize_with = "super::lenient")]
    pub control_dial_plan: Option<DialPlan>,
}

/// A question from control. Source: Tailscale, tailcfg, `PingRequest`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PingRequest {
    /// Where to answer. It is control's to choose, so only control's own host may be asked.
    #[serde(rename = "URL", default, deserialize_with = "super::nullable")]
    pub url: String,
    /// Whether to answer inside the encrypted session.
    #[serde(rename = "URLIsNoise", default, deserialize_with = "super::nullable")]
    pub url_is_noise: bool,
    /// Empty for a sign of life, `c2n`, or a comma-separated list of `disco`, `TSMP`, `ICMP`, `peerapi`.
    #[serde(default, deserialize_with = "super::nullable")]
    pub types: String,
    /// Whom to ping.
    #[serde(rename = "IP", default, deserialize_with = "super::lenient")]
    pub ip: Option<IpAddr>,
    /// For `c2n`: an HTTP/1.1 request.
    #[serde(default, deserialize_with = "super::lenient")]
    pub payload: Bytes,
}

/// The answer to a ping of a peer. Source: Tailscale, tailcfg, `PingResponse`.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct PingResponse {
    /// Which of the asked types this answers.
    pub r#type: String,
    /// Whom we pinged.
    #[serde(rename = "IP", skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// The peer's address inside the tailnet.
    #[serde(rename = "NodeIP", skip_serializing_if = "Option::is_none")]
    pub node_ip: Option<IpAddr>,
    /// The peer's name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node_name: String,
    /// Why it failed; empty if it did not.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub err: String,
    /// There and back, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_seconds: Option<f64>,
    /// The UDP address it went by, if directly.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub endpoint: String,
    /// The DERP region it went by, if relayed.
    #[serde(rename = "DERPRegionID", skip_serializing_if = "Option::is_none")]
    pub derp_region_id: Option<u32>,
    /// That region's code.
    #[serde(rename = "DERPRegionCode", skip_serializing_if = "String::is_empty")]
    pub derp_region_code: String,
    /// The peer's PeerAPI port.
    #[serde(rename = "PeerAPIPort", skip_serializing_if = "Option::is_none")]
    pub peerapi_port: Option<u16>,
    /// Whether the address is our own.
    #[serde(rename = "IsLocalIP", skip_serializing_if = "std::ops::Not::not")]
    pub is_local_ip: bool,
}

/// Something to show to a person. Source: Tailscale, tailcfg, `DisplayMessage`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DisplayMessage {
    /// A heading.
    #[serde(default, deserialize_with = "super::lenient")]
    pub title: String,
    /// What it is about.
    #[serde(default, deserialize_with = "super::lenient")]
    pub text: String,
}

/// Whether the tailnet lock is on. Source: Tailscale, tailcfg, `TKAInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct LockState {
    /// The newest update; empty if there never was a lock.
    #[serde(default, deserialize_with = "super::nullable")]
    pub head: String,
    /// Whether it was switched off.
    #[serde(default, deserialize_with = "super::nullable")]
    pub disabled: bool,
}

/// Wishes for the client's behaviour. `Exit` is not read: a server shall not end a run.
/// Source: Tailscale, tailcfg, `Debug`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Debug {
    /// How long not to read the stream, in seconds.
    #[serde(default, deserialize_with = "super::lenient")]
    pub sleep_seconds: f64,
}

/// Addresses at which control answers. Source: Tailscale, tailcfg, `ControlDialPlan`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DialPlan {
    /// All of them; an empty list forgets the earlier ones.
    #[serde(default, deserialize_with = "super::list")]
    pub candidates: Vec<DialCandidate>,
}

/// One address of control. Source: Tailscale, tailcfg, `ControlIPCandidate`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct DialCandidate {
    /// The address; `None` for candidates of kinds that we do not use.
    #[serde(rename = "IP", default, deserialize_with = "super::lenient")]
    pub ip: Option<IpAddr>,
    /// An HTTPS proxy in between; empty for none.
    #[serde(rename = "ACEHost", default, deserialize_with = "super::nullable")]
    pub ace_host: String,
    /// How long to wait before trying it, in seconds.
    #[serde(rename = "DialStartDelaySec", default, deserialize_with = "super::lenient")]
    pub dial_start_delay_sec: f64,
    /// How long to try it, in seconds.
    #[serde(rename = "DialTimeoutSec", default, deserialize_with = "super::lenient")]
    pub dial_timeout_sec: f64,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::tailcfg::parse;

    #[test]
    fn an_update_has_gos_field_names_and_no_stream() {
        let hostinfo = Hostinfo::default();
        let request = MapRequest {
            version: 130,
            compress: "",
            keep_alive: true,
            node_key: NodePublic::default(),
            disco_key: DiscoPublic::default(),
            stream: false,
            omit_peers: true,
            hostinfo: &hostinfo,
            endpoints: &["1.2.3.4:5".parse().unwrap(), "[::1]:6".parse().unwrap()],
            endpoint_types: &[EndpointType::Stun, EndpointType::Local],
        };
        let json = serde_json::to_value(&request).unwrap();
        assert_eq!(json["OmitPeers"], true);
        assert_eq!(json["Endpoints"], serde_json::json!(["1.2.3.4:5", "[::1]:6"]));
        assert_eq!(json["EndpointTypes"], serde_json::json!([2, 1]));
        assert!(json.get("Stream").is_none() && json.get("Compress").is_none());
    }

    #[test]
    fn a_message_full_of_null_is_an_empty_message() {
        let json = r#"{"KeepAlive":null,"PingRequest":null,"Node":null,"DERPMap":null,"Peers":null,"PeersChanged":null,
            "PeersRemoved":null,"PeersChangedPatch":null,"OnlineChange":null,"DNSConfig":null,"Domain":null,"Health":null,
            "DisplayMessages":null,"ControlTime":"0001-01-01T00:00:00Z","TKAInfo":null,"Debug":null,"Unknown":{"a":[1]}}"#;
        assert_eq!(serde_json::from_str::<MapResponse>(json).unwrap(), MapResponse::default());
    }

    #[test]
    fn one_garbled_peer_does_not_cost_the_others() {
        let key = "00".repeat(31);
        let json = format!(
            r#"{{"Peers":[{{"ID":1,"Key":"nodekey:{key}01"}},{{"ID":2,"Key":"x"}},{{"ID":3}},null,[]],"OnlineChange":{{"1":true,"x":false,"2":3}}}}"#
        );
        let map: MapResponse = serde_json::from_str(&json).unwrap();
        assert_eq!(map.peers.iter().map(|peer| peer.id).collect::<Vec<_>>(), [1]);
        assert_eq!(map.online_change, BTreeMap::from([(1, true)]));
    }

    #[test]
    fn a_garbled_document_is_an_error() {
        for json in ["", "[]", "7", r#"{"Peers":"#, r#"{"Peers":7}"#, r#"{"Node":{"ID":1}}"#, "{}{}"] {
            assert!(parse::<MapResponse>(json.as_bytes()).is_err(), "{json}");
        }
    }

    #[test]
    fn a_null_message_deletes_and_health_may_be_cleared() {
        let map: MapResponse =
            serde_json::from_str(r#"{"Health":[],"DisplayMessages":{"*":null,"a":{"Title":"t"}}}"#).unwrap();
        assert_eq!(map.health, Some(Vec::new()));
        assert_eq!(map.display_messages["*"], None);
        assert_eq!(map.display_messages["a"].as_ref().unwrap().title, "t");
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        let names = prop_oneof![
            Just("Node"),
            Just("ID"),
            Just("Key"),
            Just("Peers"),
            Just("DERPMap"),
            Just("Regions"),
            Just("1"),
            Just("Nodes"),
            Just("DNSConfig"),
            Just("Routes"),
            Just("PeersChangedPatch"),
            Just("Health"),
            Just("KeyExpiry"),
            Just("CapMap"),
        ];
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            "[ -~]{0,12}".prop_map(Into::into),
        ];
        leaf.prop_recursive(5, 64, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
                prop::collection::vec((names.clone(), inner), 0..6)
                    .prop_map(|entries| entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse::<MapResponse>(&bytes);
        }

        #[test]
        fn any_json_is_a_message_or_an_error(value in json()) {
            let _ = serde_json::from_value::<MapResponse>(value);
        }
    }
}
