//! What control is told when the machine's network becomes another.

use libtest_mimic::Failed;
use serde_json::Value;

use super::link::{ADDRESS, BACK_MOST, reset};
use crate::bed::{Bed, TRAP};
use crate::process::until;
use crate::testcontrol::{Selection, TestControl};

/// The ports of its STUN servers.
const STUN: [u16; 2] = [3479, 3480];

/// Control hears of an address beside the first, and of another instead of it, and at no time that UDP does not work: that
/// the servers' answers take a moment is no sign of it.
pub(crate) fn control_is_told_addresses_as_they_come_and_go(bed: &Bed) -> Result<(), Failed> {
    reset(bed)?;
    let host = &bed.hosts.link;
    let mut control = TestControl::start_for(bed, host, ADDRESS)?;
    let _sidecar = control.launch(bed).on(host).ready()?;
    told(&mut control, &["10.99.0.25"])?;
    let changed = change(bed, &mut control);
    bed.hosts.wan.nft("table inet slow { }\ndelete table inet slow")?;
    changed?;
    match reports(&mut control)?.iter().find(|report| findings(report)["WorkingUDP"] == false) {
        Some(report) => Err(format!("control was told that UDP does not work: {report}").into()),
        None => Ok(()),
    }
}

/// Adds an address, then puts another in place of both.
fn change(bed: &Bed, control: &mut TestControl) -> Result<(), Failed> {
    let host = &bed.hosts.link;
    slow_answers(bed)?;
    host.ip("addr add 10.99.0.26/24 dev eth0")?;
    told(control, &["10.99.0.25", "10.99.0.26"])?;
    slow_answers(bed)?;
    host.ip(&format!(
        "addr flush dev eth0 scope global\naddr add 10.99.0.27/24 dev eth0\nroute add default via {TRAP}"
    ))?;
    told(control, &["10.99.0.27"])
}

/// Has each STUN server's next request be lost: the second is sent a tenth of a second later.
fn slow_answers(bed: &Bed) -> Result<(), Failed> {
    let lost = |port: u16| format!("ip daddr {ADDRESS} udp dport {port} limit rate 1/minute burst 1 packets drop; ");
    let rules: String = STUN.into_iter().map(lost).collect();
    let table = format!("table inet slow {{ chain in {{ type filter hook input priority 0; {rules}}}; }}");
    Ok(bed.hosts.wan.nft(&format!("table inet slow {{ }}\ndelete table inet slow\n{table}"))?)
}

/// Waits until the newest report has these addresses and no others, and says that UDP works.
fn told(control: &mut TestControl, expected: &[&str]) -> Result<(), Failed> {
    until(BACK_MOST, &format!("control to know {expected:?}"), || {
        let reports = reports(control)?;
        let Some(last) = reports.last() else { return Ok(None) };
        let listed = last["Endpoints"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let mut addresses: Vec<&str> = listed.filter_map(|listed| Some(listed.rsplit_once(':')?.0)).collect();
        addresses.sort_unstable();
        addresses.dedup();
        Ok((addresses == expected && findings(last)["WorkingUDP"] == true).then_some(()))
    })
}

/// What control was told so far.
fn reports(control: &mut TestControl) -> Result<Vec<Value>, Failed> {
    let recorded = control.recorded(&Selection { kind: "map", ..Selection::default() })?;
    Ok(recorded.into_iter().map(|record| record.body).collect())
}

fn findings(report: &Value) -> &Value {
    &report["Hostinfo"]["NetInfo"]
}
