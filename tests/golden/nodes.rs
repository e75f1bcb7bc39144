//! Nothing of a node is lost on its way into the netmap: our parser leaves out what it cannot read, and in what
//! Tailscale writes there is nothing of that kind.

use std::collections::BTreeSet;
use std::fmt::{Debug, Display};

use serde_json::Value;
use tailcar::netmap::{Netmap, Peer};

use crate::capture::{Capture, list, text, texts};

/// Compares ourselves, every peer, the regions of DERP and the rest.
pub(crate) fn compare(capture: &Capture, netmap: &Netmap) -> Result<(), String> {
    let (raw, ours) = (&capture.raw["SelfNode"], &netmap.self_node);
    same("self id", ours.id, raw["ID"].as_i64().unwrap_or_default())?;
    same("self name", ours.name.as_str(), text(&raw["Name"]).trim_end_matches('.'))?;
    same("self key", ours.key.to_string().as_str(), text(&raw["Key"]))?;
    same("self addresses", hosts(&ours.addresses), owned(&raw["Addresses"]))?;
    same("self tags", ours.tags.clone(), owned(&raw["Tags"]))?;
    same("authorized", ours.authorized, raw["MachineAuthorized"] == true)?;
    same("self has a key expiry", ours.key_expiry.is_some(), raw["KeyExpiry"].is_string())?;
    let attributes: BTreeSet<_> = ours.attributes.keys().map(String::as_str).collect();
    same("attributes", attributes, texts(&capture.raw["AllCaps"]).into_iter().collect())?;
    same("locked out", netmap.locked_out, false)?;
    same("domain", netmap.domain.as_str(), text(&capture.raw["Domain"]))?;
    same("peers", netmap.peers.len(), capture.peers().len())?;
    for raw in capture.peers() {
        let id = raw["ID"].as_i64().unwrap_or_default();
        let peer = netmap.peers.get(&id).ok_or_else(|| format!("peer {id} is missing"))?;
        compare_peer(raw, peer).map_err(|why| format!("peer {id}: {why}"))?;
    }
    compare_regions(&capture.raw["DERPMap"]["Regions"], netmap)
}

fn compare_peer(raw: &Value, peer: &Peer) -> Result<(), String> {
    same("stable id", peer.stable_id.as_str(), text(&raw["StableID"]))?;
    same("name", peer.name.as_str(), text(&raw["Name"]).trim_end_matches('.'))?;
    same("key", peer.key.to_string().as_str(), text(&raw["Key"]))?;
    same("disco key", peer.disco.map(|key| key.to_string()).as_deref(), raw["DiscoKey"].as_str())?;
    same("addresses", hosts(&peer.addresses), owned(&raw["Addresses"]))?;
    same("allowed IPs", shown(&peer.allowed_ips), owned(&raw["AllowedIPs"]))?;
    same("primary routes", shown(&peer.primary_routes), owned(&raw["PrimaryRoutes"]))?;
    same("endpoints", shown(&peer.endpoints), owned(&raw["Endpoints"]))?;
    same("home DERP", peer.home_derp.map(u64::from), raw["HomeDERP"].as_u64())?;
    same("online", peer.online, raw["Online"].as_bool())?;
    same("expired", peer.expired, false)?;
    same("tags", peer.tags.clone(), owned(&raw["Tags"]))?;
    let services = list(&raw["Hostinfo"]["Services"]);
    let port = |proto: &str| {
        services.iter().find(|service| service["Proto"] == proto).map_or(0, |service| service["Port"].as_u64().unwrap())
    };
    let peerapi = (u64::from(peer.peerapi.0), u64::from(peer.peerapi.1));
    same("PeerAPI", peerapi, (port("peerapi4"), port("peerapi6")))
}

fn compare_regions(raw: &Value, netmap: &Netmap) -> Result<(), String> {
    let raw = raw.as_object().ok_or("the capture has no regions")?;
    same("regions", netmap.derp.regions.len(), raw.len())?;
    for (id, region) in &netmap.derp.regions {
        let raw = raw.get(&id.to_string()).ok_or_else(|| format!("region {id} is not in the capture"))?;
        same("region's code", region.code.as_str(), text(&raw["RegionCode"]))?;
        let names: Vec<_> = list(&raw["Nodes"]).iter().map(|node| text(&node["HostName"])).collect();
        same("region's servers", region.nodes.iter().map(|node| node.host_name.as_str()).collect(), names)?;
    }
    Ok(())
}

/// Addresses as Go writes them: as host prefixes.
fn hosts(addresses: &[std::net::IpAddr]) -> Vec<String> {
    addresses.iter().map(|ip| format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })).collect()
}

fn shown(values: &[impl Display]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

fn owned(value: &Value) -> Vec<String> {
    texts(value).into_iter().map(str::to_owned).collect()
}

/// Whether ours is as theirs.
pub(crate) fn same<T: PartialEq + Debug>(what: &str, ours: T, theirs: T) -> Result<(), String> {
    if ours == theirs { Ok(()) } else { Err(format!("{what}: {ours:?}, not {theirs:?}")) }
}
