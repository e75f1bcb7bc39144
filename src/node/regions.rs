//! Between the netmap's DERP map, the engine's findings, and what transport and control want of them.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::control::HostReport;
use crate::engine::{HostState, HttpsProbe};
use crate::netmap::RegionId;
use crate::transport::derp::Relay;
use crate::transport::places::{Families, Places};
use crate::transport::tls::Check;
use crate::wire::tailcfg::derp::{DerpNode, Family, Region};

/// What a probe found.
pub(super) enum Probed {
    /// The time of an HTTPS request to a region; `None` if it failed.
    Https(HttpsProbe, Option<Duration>),
    /// The addresses of a region's STUN server.
    Stun(RegionId, Vec<SocketAddr>),
}

/// The relays of a region, in the order in which they are tried.
pub(super) fn relays(region: &Region) -> Vec<Relay> {
    region.nodes.iter().filter(|node| !node.stun_only).filter_map(relay).collect()
}

fn relay(node: &DerpNode) -> Option<Relay> {
    let check = if let Some(pin) = node.cert_name.strip_prefix("sha256-raw:") {
        let mut hash = [0; 32];
        // A pin that cannot be read must not become no pin.
        hex::decode_to_slice(pin, &mut hash).ok()?;
        Check::Pin(hash)
    } else if node.insecure_for_tests {
        Check::Insecure
    } else if node.cert_name.is_empty() {
        Check::Name(node.host_name.clone())
    } else {
        Check::Name(node.cert_name.clone())
    };
    let literal = |family: Family| if let Family::At(ip) = family { Some(ip) } else { None };
    let known = [node.ipv4, node.ipv6].into_iter().filter_map(literal).collect();
    let by_name = Families { v4: node.ipv4 == Family::Resolve, v6: node.ipv6 == Family::Resolve };
    Some(Relay { host: node.host_name.clone(), places: Places::new(known, by_name), port: node.https(), check })
}

/// What control is told of the engine's findings.
pub(super) fn report(state: &HostState) -> HostReport {
    let (endpoints, endpoint_types) = state.endpoints.iter().copied().unzip();
    HostReport { endpoints, endpoint_types, net_info: Some(state.netinfo.clone()) }
}

/// The home that such a report tells.
pub(super) fn told_home(report: &HostReport) -> Option<RegionId> {
    report.net_info.as_ref().map(|info| info.preferred_derp).filter(|home| *home != 0)
}

/// Looks up a STUN server's name by the machine's own resolver: it is part of the underlay.
pub(super) async fn resolve_stun(region: RegionId, host: String, port: u16, probes: mpsc::Sender<Probed>) {
    let addresses = tokio::net::lookup_host((host.as_str(), port)).await;
    let addresses = addresses.map(Iterator::collect).unwrap_or_default();
    // A driver that is gone needs no address.
    let _ = probes.send(Probed::Stun(region, addresses)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relay_of(json: &str) -> Option<Relay> {
        relay(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn a_pin_that_cannot_be_read_leaves_the_relay_out() {
        assert_eq!(relay_of(r#"{"HostName":"h","CertName":"sha256-raw:xyz","InsecureForTests":true}"#), None);
        let pin = format!(r#"{{"HostName":"h","CertName":"sha256-raw:{}"}}"#, "ab".repeat(32));
        assert_eq!(relay_of(&pin).unwrap().check, Check::Pin([0xab; 32]));
    }

    #[test]
    fn a_certificate_is_checked_unless_the_map_says_otherwise() {
        assert_eq!(relay_of(r#"{"HostName":"h"}"#).unwrap().check, Check::Name("h".to_owned()));
        assert_eq!(relay_of(r#"{"HostName":"h","CertName":"c"}"#).unwrap().check, Check::Name("c".to_owned()));
        assert_eq!(relay_of(r#"{"HostName":"h","InsecureForTests":true}"#).unwrap().check, Check::Insecure);
    }

    #[test]
    fn a_name_is_for_the_families_that_the_map_leaves_to_it() {
        let places = |json| relay_of(json).unwrap().places;
        let (known, v6) = (vec!["1.2.3.4".parse().unwrap()], Families { v4: false, v6: true });
        assert_eq!(places(r#"{"HostName":"h","IPv4":"1.2.3.4"}"#), Places::new(known.clone(), v6));
        assert_eq!(places(r#"{"HostName":"h","IPv4":"none"}"#), Places::new(Vec::new(), v6));
        assert_eq!(places(r#"{"HostName":"h","IPv4":"1.2.3.4","IPv6":"none"}"#), Places::at(&known));
        assert_eq!(places(r#"{"HostName":"h"}"#), Places::named());
    }
}
