//! The map of DERP regions and their servers.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Deserializer};

/// A region's number.
pub type RegionId = u32;

/// Where a server answers STUN unless it says otherwise (RFC 8489, 7).
const STUN_PORT: u16 = 3478;

/// Where a server answers HTTPS unless it says otherwise.
const HTTPS_PORT: u16 = 443;

/// All regions that are known now.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DerpMap {
    /// The regions.
    pub regions: BTreeMap<RegionId, Region>,
    /// What to multiply a region's measured latency with before comparing; below 1 prefers it.
    pub region_score: BTreeMap<RegionId, f64>,
}

impl DerpMap {
    /// This map after `update`: what the update does not name stays.
    /// Source: Tailscale, control/controlclient, `updateStateFromResponse`.
    pub fn merged(&self, update: DerpMapUpdate) -> Self {
        let mut merged = self.clone();
        if let Some(regions) = update.regions {
            merged.regions = regions;
        }
        for (id, region) in &mut merged.regions {
            region.id = *id;
        }
        if let Some(score) = update.home_params.and_then(|params| params.region_score) {
            merged.region_score = score;
        }
        merged
    }
}

/// A DERP map as control sends it, `None` meaning "as before". Source: Tailscale, tailcfg, `DERPMap`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DerpMapUpdate {
    /// All regions. Those whose value is `null`, as headscale writes them, are none.
    #[serde(default, deserialize_with = "super::optional_map")]
    pub regions: Option<BTreeMap<RegionId, Region>>,
    /// How to choose a home.
    #[serde(default, deserialize_with = "super::lenient")]
    pub home_params: Option<HomeParams>,
}

/// How to choose a home. Source: Tailscale, tailcfg, `DERPHomeParams`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct HomeParams {
    /// Factors on measured latencies; `None` for as before.
    #[serde(default, deserialize_with = "super::optional_map")]
    pub region_score: Option<BTreeMap<RegionId, f64>>,
}

/// A region: servers that relay for each other. Source: Tailscale, tailcfg, `DERPRegion`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Region {
    /// The number.
    #[serde(rename = "RegionID", default, deserialize_with = "super::lenient")]
    pub id: RegionId,
    /// A short name, such as `nyc`.
    #[serde(rename = "RegionCode", default, deserialize_with = "super::lenient")]
    pub code: String,
    /// A long name.
    #[serde(rename = "RegionName", default, deserialize_with = "super::lenient")]
    pub name: String,
    /// Deprecated form of `no_measure_no_home`; does not drive away whoever is at home here.
    #[serde(default, deserialize_with = "super::lenient")]
    pub avoid: bool,
    /// Neither probed nor chosen as home; still leads to peers that are at home here.
    #[serde(default, deserialize_with = "super::lenient")]
    pub no_measure_no_home: bool,
    /// The servers, in the order in which to try them.
    #[serde(default, deserialize_with = "super::list")]
    pub nodes: Vec<DerpNode>,
}

/// A server. Source: Tailscale, tailcfg, `DERPNode`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DerpNode {
    /// The name, unique in the map.
    #[serde(default, deserialize_with = "super::lenient")]
    pub name: String,
    /// The host's name; may be an address.
    pub host_name: String,
    /// What its certificate must be for, instead of `host_name`: another name, or `sha256-raw:` and
    /// the hexadecimal digest of the certificate itself. Empty for none.
    #[serde(default, deserialize_with = "super::nullable")]
    pub cert_name: String,
    /// Its IPv4 address.
    #[serde(rename = "IPv4", default)]
    pub ipv4: Family,
    /// Its IPv6 address.
    #[serde(rename = "IPv6", default)]
    pub ipv6: Family,
    /// The STUN port: 0 for the standard one, negative for none. See [`stun`](Self::stun).
    #[serde(rename = "STUNPort", default, deserialize_with = "super::lenient")]
    pub stun_port: i32,
    /// Whether it answers STUN alone and relays nothing.
    #[serde(rename = "STUNOnly", default, deserialize_with = "super::lenient")]
    pub stun_only: bool,
    /// The HTTPS port, 0 for the standard one. See [`https`](Self::https).
    #[serde(rename = "DERPPort", default, deserialize_with = "super::lenient")]
    pub derp_port: u16,
    /// Whether to take any certificate. Only test maps say so.
    #[serde(default, deserialize_with = "super::lenient")]
    pub insecure_for_tests: bool,
    /// Another address for STUN alone, in tests.
    #[serde(rename = "STUNTestIP", default, deserialize_with = "super::lenient")]
    pub stun_test_ip: Option<IpAddr>,
}

impl DerpNode {
    /// The port for STUN, if it answers STUN.
    pub fn stun(&self) -> Option<u16> {
        match self.stun_port {
            0 => Some(STUN_PORT),
            port => u16::try_from(port).ok(),
        }
    }

    /// The port for DERP over HTTPS.
    pub fn https(&self) -> u16 {
        match self.derp_port {
            0 => HTTPS_PORT,
            port => port,
        }
    }
}

/// How a server is reached by one address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Family {
    /// By whatever its name resolves to.
    #[default]
    Resolve,
    /// At this address.
    At(IpAddr),
    /// Not at all: control says `none`.
    Never,
}

impl<'de> Deserialize<'de> for Family {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text: String = super::lenient(deserializer)?;
        Ok(match text.as_str() {
            "" => Self::Resolve,
            // Go takes what does not parse for "none" as well.
            text => text.parse().map_or(Self::Never, Self::At),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(json: &str) -> DerpMapUpdate {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn null_regions_and_garbled_servers_are_left_out() {
        let json =
            r#"{"Regions":{"1":null,"2":{"RegionCode":"a","Nodes":[{"HostName":"h"},{"Name":"no host"},7]},"x":{}}}"#;
        let map = DerpMap::default().merged(update(json));
        assert_eq!(map.regions.keys().copied().collect::<Vec<_>>(), [2]);
        assert_eq!(map.regions[&2].id, 2);
        assert_eq!(map.regions[&2].nodes.len(), 1);
    }

    #[test]
    fn what_an_update_does_not_name_stays() {
        let full = DerpMap::default().merged(update(r#"{"HomeParams":{"RegionScore":{"1":0.5}},"Regions":{"1":{}}}"#));
        assert_eq!(full.merged(update("{}")), full);
        assert_eq!(full.merged(update(r#"{"HomeParams":{},"Regions":null}"#)), full);
        assert!(full.merged(update(r#"{"HomeParams":{"RegionScore":{}}}"#)).region_score.is_empty());
        assert!(full.merged(update(r#"{"Regions":{}}"#)).regions.is_empty());
    }

    #[test]
    fn ports_and_addresses_have_their_special_values() {
        let node = |json| serde_json::from_str::<DerpNode>(json).unwrap();
        let plain = node(r#"{"HostName":"h","IPv4":"1.2.3.4","IPv6":"none"}"#);
        assert_eq!((plain.stun(), plain.https()), (Some(3478), 443));
        assert_eq!((plain.ipv4, plain.ipv6), (Family::At("1.2.3.4".parse().unwrap()), Family::Never));
        let odd = node(r#"{"HostName":"h","STUNPort":-1,"DERPPort":8443}"#);
        assert_eq!((odd.stun(), odd.https(), odd.ipv4), (None, 8443, Family::Resolve));
    }
}
