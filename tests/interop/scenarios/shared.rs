//! Peers shared in from other tailnets: known by foreign names, knowing us by foreign addresses, jailed.

use std::time::Duration;

use libtest_mimic::Failed;
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::process::{output, until};
use crate::testcontrol::TestControl;

/// The peer that serves the site "web".
const PEER: &str = "tb-shared";

/// A peer that knows us by another address answers that one, and may be jailed besides.
pub(crate) fn a_peer_that_knows_us_by_other_addresses_is_reached(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    let _peer = control.peer(bed, PEER)?;
    let sidecar = control.launch(bed).hostname("masked").ready()?;
    sidecar.page(PEER, "web")?;
    control.ask("jail", json!({ "node": "masked", "peer": PEER, "on": true }))?;
    sidecar.page(PEER, "web")?;
    let node = control.node(PEER)?;
    // testcontrol knows one address for each pair: first one of IPv4, then one of IPv6.
    for (place, known_as) in ["100.64.99.1", "fd7a:115c:a1e0::9901"].into_iter().enumerate() {
        control.ask("masquerade", json!({ "pairs": [{ "node": "masked", "peer": PEER, "as": known_as }] }))?;
        // From then on the peer takes nothing from our own address of that family.
        until(Duration::from_secs(10), "the peer to know us by that address", || {
            Ok((addresses_seen(bed, place)?.iter().any(|seen| seen == known_as)).then_some(()))
        })?;
        let prefix = node["Addresses"][place].as_str().unwrap_or("");
        let address = prefix.split_once('/').map_or(prefix, |(address, _)| address);
        until(Duration::from_secs(5), known_as, || Ok(sidecar.page(address, "web").ok()))?;
    }
    Ok(())
}

/// By which addresses the peer knows the others; the first or the second of each.
fn addresses_seen(bed: &Bed, place: usize) -> Result<Vec<Value>, Failed> {
    let mut status = bed.hosts.web.command(bed.peers.join("tailscale"));
    status.arg("--socket").arg(bed.folder.join(PEER).join("tailscaled.sock")).args(["status", "--json"]);
    let status: Value = serde_json::from_str(&output(status)?)?;
    let others = status["Peer"].as_object().into_iter().flat_map(|peers| peers.values());
    Ok(others.map(|other| other["TailscaleIPs"][place].clone()).collect())
}

/// A name outside our own suffix leads to the peer that has it.
pub(crate) fn a_name_of_another_tailnet_leads_to_its_peer(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    let _peer = control.peer(bed, PEER)?;
    let sidecar = control.launch(bed).hostname("guest").ready()?;
    let mut node = control.node(PEER)?;
    node["Name"] = json!(format!("{PEER}.other-tailnet.example."));
    node["Sharer"] = json!(7);
    control.send("guest", json!({ "PeersChanged": [node] }))?;
    until(Duration::from_secs(5), "the foreign name", || {
        Ok(sidecar.page(&format!("{PEER}.other-tailnet.example"), "web").ok())
    })?;
    match bed.strayed("other-tailnet.example") {
        0 => Ok(()),
        asked => Err(format!("the foreign name was asked outside {asked} times").into()),
    }
}
