//! Control at its worst: torn map streams, deltas, requests of its own. Against Tailscale's testcontrol.

use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::process::until;
use crate::sidecar::Sidecar;
use crate::testcontrol::{Record, Selection, TestControl};
use crate::usage;

/// The peer that serves the site "web".
const PEER: &str = "tb-web";

/// How soon the netmap must follow a delta.
const SOON: Duration = Duration::from_secs(5);

/// How soon a map stream must be open again: back-off of a few failures, on a loaded machine.
const AGAIN: Duration = Duration::from_secs(20);

/// Streams that have been opened since a record.
fn streams(since: u64) -> Selection {
    Selection { since, kind: "map", stream: Some(true), ..Selection::default() }
}

/// A node's first address in the tailnet.
fn address(node: &Value) -> Result<String, Failed> {
    let prefix = node["Addresses"][0].as_str().ok_or("a node without an address")?;
    Ok(prefix.trim_end_matches("/32").to_owned())
}

/// Asks for a tunnel until the answer has the status, and the code if it is a failure.
fn answers(sidecar: &Sidecar<'_>, authority: &str, status: u16, code: &str) -> Result<(), Failed> {
    let mut last = String::new();
    let what = format!("{authority} to answer {status} {code}");
    until(SOON, &what, || {
        let (response, _stream) = sidecar.tunnel(authority)?;
        let found = response.header("x-tailcar-error").unwrap_or("").to_owned();
        last = format!("{} {found}", response.status);
        Ok((response.status == status && found.starts_with(code)).then_some(()))
    })
    .map_err(|error| format!("{}; the last answer was {last}", error.message().unwrap_or("")).into())
}

/// A stream with the fault came, and after it one that is whole.
fn recovers(control: &mut TestControl, since: u64, kind: &str) -> Result<(), Failed> {
    until(AGAIN, &format!("a new map stream after {kind}"), || {
        let opened = control.recorded(&streams(since))?;
        let broken = opened.iter().position(|record| record.fault == kind);
        let whole = |record: &Record| record.fault.is_empty() && record.frames > 0 && record.ended_ms == 0.0;
        Ok(broken.is_some_and(|at| opened[at + 1..].iter().any(whole)).then_some(()))
    })
}

/// A server may answer in pieces of any size, and a newer one has fields that we do not know.
pub(crate) fn a_map_in_pieces_and_with_unknown_fields_is_understood(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    let _peer = control.peer(bed, PEER)?;
    for kind in ["dribble", "unknown_fields"] {
        control.arm(json!({ "kind": kind }))?;
        let sidecar = control.launch(bed).ready()?;
        sidecar.page(&format!("{PEER}.tb.example"), "web").map_err(|error| format!("{kind}: {error:?}"))?;
    }
    Ok(())
}

/// Maps come compressed or plain, whatever we asked for: a frame tells by its first octets.
pub(crate) fn a_map_is_understood_compressed_or_not(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    let _peer = control.peer(bed, PEER)?;
    for mode in ["always", "never"] {
        control.ask("compress", json!({ "mode": mode }))?;
        control.launch(bed).ready()?.page(PEER, "web").map_err(|error| format!("{mode}: {error:?}"))?;
    }
    Ok(())
}

/// A server may send early payload before HTTP/2; testcontrol by itself does not.
pub(crate) fn an_early_payload_is_read_over(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    let _peer = control.peer(bed, PEER)?;
    control.ask("early_payload", json!({ "on": true }))?;
    control.launch(bed).ready()?.page(PEER, "web")
}

/// However a map stream breaks, it is opened again, and connections do not notice.
pub(crate) fn a_broken_map_stream_is_opened_again(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    let _peer = control.peer(bed, PEER)?;
    let sidecar = control.launch(bed).ready()?;
    let mut kept = sidecar.dial(PEER, 7)?;
    let faults = [
        json!({ "kind": "end" }),
        json!({ "kind": "reset" }),
        json!({ "kind": "close" }),
        json!({ "kind": "garbage" }),
        json!({ "kind": "bad_zstd" }),
        json!({ "kind": "empty" }),
        json!({ "kind": "half_frame", "then": "end" }),
        json!({ "kind": "half_frame", "then": "close" }),
        json!({ "kind": "bytes", "hex": "7b", "then": "end" }),
        json!({ "kind": "frame", "after": 0, "json": { "PeersRemoved": [1] } }),
    ];
    for fault in faults {
        let since = control.now()?;
        let kind = fault["kind"].as_str().unwrap_or("").to_owned();
        control.arm(with_node(&fault, &sidecar.hostname))?;
        control.cut(&sidecar.hostname)?;
        recovers(&mut control, since, &kind)?;
        sidecar.page(PEER, "web")?;
        echoes(&mut kept, kind.as_bytes())?;
    }
    Ok(())
}

fn with_node(fault: &Value, node: &str) -> Value {
    let mut fault = fault.clone();
    fault["node"] = node.into();
    fault
}

fn echoes(stream: &mut std::net::TcpStream, text: &[u8]) -> Result<(), Failed> {
    use std::io::{Read as _, Write as _};
    stream.write_all(text)?;
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back)?;
    if back == text { Ok(()) } else { Err(format!("sent {text:02x?}, got {back:02x?}").into()) }
}

/// A message of two gigabytes is not waited for, and no memory is set aside for it.
pub(crate) fn an_oversize_message_is_refused_at_its_length(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    let _peer = control.peer(bed, PEER)?;
    let sidecar = control.launch(bed).ready()?;
    let before = sidecar.resident()?;
    for size in [u32::MAX, i32::MAX.unsigned_abs()] {
        let since = control.now()?;
        control.arm(json!({ "kind": "oversize", "node": sidecar.hostname, "size": size, "fill": 1 << 20 }))?;
        control.cut(&sidecar.hostname)?;
        recovers(&mut control, since, "oversize")?;
    }
    let grown = sidecar.resident()? - before;
    if grown > 100.0 {
        return Err(format!("it grew by {grown:.1} MiB").into());
    }
    sidecar.page(PEER, "web")
}

/// A connection that dies 100 ms after each map is no reason to compute, nor to ask without pause.
pub(crate) fn constant_resets_do_not_make_a_busy_loop(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    let _peer = control.peer(bed, PEER)?;
    let sidecar = control.launch(bed).ready()?;
    let used = || usage::cpu(sidecar.process.id()).ok_or("the sidecar is gone");
    let (since, before) = (control.now()?, used()?);
    control.arm(json!({ "kind": "close", "node": sidecar.hostname, "delay_ms": 100, "times": 0 }))?;
    control.cut(&sidecar.hostname)?;
    let watched = Duration::from_secs(8);
    thread::sleep(watched);
    let opened = control.recorded(&streams(since))?.len();
    let computed = used()? - before;
    control.ask("clear_faults", json!({}))?;
    if !(2..=60).contains(&opened) {
        return Err(format!("{opened} streams in {watched:?}").into());
    }
    if computed > Duration::from_secs(2) {
        return Err(format!("{computed:?} of processor in {watched:?}").into());
    }
    control.node(&sidecar.hostname)?;
    sidecar.page(PEER, "web")
}

/// A server that is there and says nothing: the stream is given up after two minutes, not before
/// the server's next keep-alive could have come.
pub(crate) fn a_silent_map_stream_is_given_up(bed: &Bed) -> Result<(), Failed> {
    const PEER: &str = "tb-patient";
    let host = &bed.hosts.silent;
    let mut control = TestControl::start_for(bed, host, "10.99.0.3")?;
    let _peer = control.peer(bed, PEER)?;
    let sidecar = control.launch(bed).on(host).ready()?;
    let since = control.now()?;
    control.arm(json!({ "kind": "silent", "node": sidecar.hostname }))?;
    control.cut(&sidecar.hostname)?;
    let opened = control.await_recorded(&streams(since), 2, Duration::from_secs(150))?;
    let silent = opened.first().ok_or("no stream")?;
    let seconds = (opened[1].at_ms - silent.at_ms) / 1000.0;
    if silent.fault != "silent" || !(65.0..=140.0).contains(&seconds) {
        return Err(format!("given up after {seconds:.0} s ({:?})", silent.fault).into());
    }
    sidecar.page(PEER, "web")
}

/// A DERP server is who its pin says, or nobody: with another pin the only region cannot be home.
pub(crate) fn a_relay_with_another_pin_is_refused(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    let mut map = control.ask("derp_map", json!({}))?;
    let regions = map["Regions"].as_object_mut().ok_or("no regions")?;
    regions.remove("1");
    let pin = map["Regions"]["2"]["Nodes"][0]["CertName"].as_str().unwrap_or("").to_owned();
    let hash = pin.strip_prefix("sha256-raw:").ok_or_else(|| format!("region 2 has the pin {pin:?}"))?;
    let other: String = hash.chars().map(|digit| if digit == '0' { '1' } else { '0' }).collect();

    map["Regions"]["2"]["Nodes"][0]["CertName"] = format!("sha256-raw:{other}").into();
    control.ask("derp_map", json!({ "map": map }))?;
    let outcome = control.launch(bed).args(&["--join-timeout", "6s"]).outcome(Duration::from_secs(15))?;
    outcome.expect(75, "TC-1301")?;
    if outcome.log.contains("derp connected") {
        return Err(format!("connected in spite of the pin\n{}", outcome.log).into());
    }
    map["Regions"]["2"]["Nodes"][0]["CertName"] = pin.into();
    control.ask("derp_map", json!({ "map": map }))?;
    let mut sidecar = control.launch(bed).ready()?;
    sidecar.process.says("derp connected region=2", SOON).map(drop)
}

/// Registered, but never told who is there: the join ends in time and says why.
pub(crate) fn a_map_that_never_comes_ends_the_join(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    control.arm(json!({ "kind": "no_head", "times": 0 }))?;
    let outcome = control.launch(bed).args(&["--join-timeout", "4s"]).outcome(Duration::from_secs(15))?;
    outcome.expect(75, "TC-11")
}

/// Peers come, change and go by deltas, and so does DNS.
pub(crate) fn deltas_do_what_whole_maps_would(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    let _peer = control.peer(bed, PEER)?;
    let sidecar = control.launch(bed).args(&["--dial-timeout", "2s"]).ready()?;
    let me = sidecar.hostname.clone();
    let peer = control.node(PEER)?;
    let web = address(&peer)?;
    until(SOON, "the peer to know the node", || Ok(sidecar.page(&web, "web").ok()))?;

    let ghosts: Vec<Value> = (1..=20).map(|n| control.ghost(&format!("ghost{n}"), n)).collect::<Result<_, _>>()?;
    let target = format!("{}:80", address(&ghosts[8])?);
    answers(&sidecar, &target, 502, "TC-15")?;
    control.send(&me, json!({ "PeersChanged": ghosts }))?;
    answers(&sidecar, &target, 504, "TC-16")?;
    answers(&sidecar, "ghost9.tb.example:80", 504, "TC-16")?;
    let ids: Vec<_> = ghosts.iter().map(|ghost| ghost["ID"].clone()).collect();
    control.send(&me, json!({ "PeersRemoved": ids }))?;
    answers(&sidecar, &target, 502, "TC-15")?;
    sidecar.page(&web, "web")?;

    control.send(&me, json!({ "PeersRemoved": [peer["ID"]] }))?;
    answers(&sidecar, &format!("{web}:80"), 502, "TC-15")?;
    control.send(&me, json!({ "PeersChanged": [peer] }))?;
    until(SOON, "the peer to be back", || Ok(sidecar.page(&web, "web").ok()))?;

    let records = json!([{ "Name": "delta.tb.example", "Value": web }]);
    let dns = json!({ "Proxied": true, "Domains": ["tb.example"], "ExtraRecords": records });
    control.send(&me, json!({ "DNSConfig": dns }))?;
    until(SOON, "the new record", || Ok(sidecar.page("delta.tb.example", "web").ok()))
}

/// A peer's key and endpoints change by patches; a session with the old key ends.
pub(crate) fn patches_change_a_peers_key_and_endpoints(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    let _peer = control.peer(bed, PEER)?;
    let sidecar = control.launch(bed).args(&["--dial-timeout", "2s"]).ready()?;
    let me = sidecar.hostname.clone();
    let peer = control.node(PEER)?;
    let (id, web) = (&peer["ID"], address(&peer)?);
    until(SOON, "the peer to know the node", || Ok(sidecar.page(&web, "web").ok()))?;

    let nobody = control.ghost("nobody", 1)?["Key"].clone();
    control.send(&me, json!({ "PeersChangedPatch": [{ "NodeID": id, "Key": nobody }] }))?;
    answers(&sidecar, &format!("{web}:80"), 504, "TC-16")?;
    control.send(&me, json!({ "PeersChangedPatch": [{ "NodeID": id, "Key": peer["Key"] }] }))?;
    until(SOON, "the old key to be good again", || Ok(sidecar.page(&web, "web").ok()))?;

    let nowhere = json!(["10.99.0.31:1"]);
    control.send(&me, json!({ "PeersChangedPatch": [{ "NodeID": id, "Endpoints": nowhere, "DERPRegion": 1 }] }))?;
    sidecar.page(&web, "web")?;
    let unknown = json!([{ "NodeID": 99_999, "Online": true }]);
    control.send(&me, json!({ "PeersChangedPatch": unknown, "PeerSeenChange": { "99998": true } }))?;
    sidecar.page(&web, "web")
}

/// What control asks of a node, it gets: liveness, echo, pings of peers. Each once.
pub(crate) fn pings_and_echo_of_control_are_answered(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    let _peer = control.peer(bed, PEER)?;
    let sidecar = control.launch(bed).ready()?;
    let me = sidecar.hostname.clone();
    let web = address(&control.node(PEER)?)?;

    let hits = control.ping(&me, json!({ "noise": true }), SOON)?;
    match hits.as_slice() {
        [hit] if hit.over == "noise" && hit.method == "HEAD" => {}
        other => return Err(format!("a liveness ping got {other:?}").into()),
    }
    let text = "0123456789".repeat(2000);
    let echo = control.ask("c2n", json!({ "node": me, "method": "POST", "path": "/echo", "body": text }))?;
    if echo["status"] != 200 || echo["body"] != text {
        return Err(format!("/echo answered {}", echo["status"]).into());
    }
    let unknown = control.ask("c2n", json!({ "node": me, "path": "/no/such/thing" }))?;
    if !(400..500).contains(&unknown["status"].as_u64().unwrap_or(0)) {
        return Err(format!("an unknown c2n path answered {unknown}").into());
    }
    let request = json!({ "noise": true, "types": "disco,TSMP", "ip": web });
    let hits = control.ping(&me, request, Duration::from_secs(15))?;
    let mut kinds: Vec<_> = hits.iter().filter_map(|hit| hit.body["Type"].as_str()).collect();
    kinds.sort_unstable();
    if kinds != ["TSMP", "disco"] || hits.iter().any(|hit| hit.method != "POST" || hit.body["IP"] != *web) {
        return Err(format!("pings of a peer got {hits:?}").into());
    }
    once(&mut control, &me)
}

/// The same ping request twice is one ping. Source: Tailscale, tailcfg, `PingRequest.URL`.
fn once(control: &mut TestControl, node: &str) -> Result<(), Failed> {
    let path = "/ping/once";
    let url = format!("{}{path}", control.url);
    let frame = json!({ "KeepAlive": true, "PingRequest": { "URL": url, "URLIsNoise": true } });
    for _ in 0..2 {
        control.ask("raw_frame", json!({ "node": node, "frame": frame }))?;
    }
    let selection = Selection { kind: "ping", path: path.to_owned(), ..Selection::default() };
    control.await_recorded(&selection, 1, SOON)?;
    control.ping(node, json!({ "noise": true }), SOON)?;
    match control.recorded(&selection)?.len() {
        1 => Ok(()),
        count => Err(format!("one request was answered {count} times").into()),
    }
}

/// Control may not send us anywhere but to itself.
pub(crate) fn ping_requests_lead_nowhere_but_to_control(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    let sidecar = control.launch(bed).ready()?;
    let me = sidecar.hostname.clone();
    let canary = format!("{}/pong", control.canary);
    for request in [
        json!({ "url": canary }),
        json!({ "url": canary, "noise": true }),
        json!({ "url": canary, "types": "disco", "ip": "100.64.0.1" }),
        json!({ "url": "http://169.254.169.254/latest/meta-data/" }),
    ] {
        control.ping(&me, request, Duration::from_secs(1))?;
    }
    let seen = control.recorded(&Selection { kind: "canary", ..Selection::default() })?;
    match seen.first() {
        None => Ok(()),
        Some(record) => Err(format!("it went to {} {}", record.method, record.path).into()),
    }
}

/// The end is a register with an expiry in the past, by the same machine, answered.
pub(crate) fn the_end_is_a_logout_that_control_sees(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    let mut sidecar = control.launch(bed).ready()?;
    let start = Instant::now();
    let status = sidecar.terminate()?;
    let registers = control.recorded(&Selection { kind: "register", ..Selection::default() })?;
    let logouts: Vec<_> = registers.iter().filter(|record| record.body["Expiry"] == "1970-01-01T00:02:03Z").collect();
    let [logout] = logouts.as_slice() else {
        return Err(format!("{} logouts in {:?}", logouts.len(), start.elapsed()).into());
    };
    let joined = registers.first().ok_or("no registration")?;
    if logout.machine != joined.machine || logout.status != 200 || logout.over != "noise" {
        return Err(format!("joined by {joined:?}, left by {logout:?}").into());
    }
    match status.code() {
        Some(0) => Ok(()),
        code => Err(format!("exit {code:?}").into()),
    }
}
