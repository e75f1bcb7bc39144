//! Relays that fail in each of their ways: home moves, control hears of it, and what is open goes on.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::json;

use crate::bed::Bed;
use crate::process::{tail, until};
use crate::sidecar::{Launch, Sidecar};
use crate::testcontrol::{Selection, TestControl};
use crate::{leak, say};

/// Where the control of these scenarios is, with its two regions.
pub(super) const ADDRESS: &str = "10.99.0.5";
/// The sidecar's own address, as its relays see it.
const OURS: &str = "10.99.0.41";
/// The peer of these scenarios.
pub(super) const PEER: &str = "relaypeer";
/// A home that is gone is left after five seconds; the rest is for a slow machine, and for the peer's own search.
const MOVED: Duration = Duration::from_secs(40);

/// A direct connection needs neither control nor relay: what its blocks may take on a loaded machine.
const UNTOUCHED: Duration = Duration::from_secs(5);

/// A control with its relays, and a peer that is reached by them alone.
fn relayed(bed: &Bed) -> Result<(TestControl, crate::process::Process), Failed> {
    let mut control = TestControl::start_for(bed, &bed.hosts.relayed, ADDRESS)?;
    let peer = control.peer(bed, PEER)?;
    Ok((control, peer))
}

/// A sidecar that sends no datagrams: what works, works by a relay.
pub(super) fn join<'a>(control: &TestControl, bed: &'a Bed) -> Result<Sidecar<'a>, Failed> {
    let sidecar = control.launch(bed).on(&bed.hosts.relayed).args(&["--transport", "derp"]).ready()?;
    sidecar.page(PEER, "web")?;
    Ok(sidecar)
}

/// The home that control was told last.
fn home(control: &mut TestControl) -> Result<u64, Failed> {
    let told = control.recorded(&Selection { kind: "map", ..Selection::default() })?;
    let ours = told.iter().rev().filter(|record| record.body["Hostinfo"]["Hostname"] != PEER);
    Ok(ours.filter_map(|record| record.body["Hostinfo"]["NetInfo"]["PreferredDERP"].as_u64()).next().unwrap_or(0))
}

/// Waits until control was told of another home than `old`; how long that took, and which.
pub(super) fn moved(control: &mut TestControl, sidecar: &Sidecar<'_>, old: u64) -> Result<u64, Failed> {
    let start = Instant::now();
    let new = until(MOVED, "another home", || Ok(Some(home(control)?).filter(|home| ![0, old].contains(home))))
        .map_err(|error| format!("{}\n{}", error.message().unwrap_or(""), tail(&sidecar.process.log())))?;
    say(&format!("         home {old} to {new} in {:.1} s", start.elapsed().as_secs_f32()));
    Ok(new)
}

/// Asks the echo at the other end of an open connection again and again, until it answers.
fn echo(stream: &mut TcpStream, text: &[u8]) -> Result<(), Failed> {
    stream.set_read_timeout(Some(MOVED))?;
    stream.write_all(text)?;
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back)?;
    match back == text {
        true => Ok(()),
        false => Err("the echo differs from what was sent".into()),
    }
}

/// A relay stops: home moves, control and through it the peer hear of it, and an open connection goes on.
pub(crate) fn a_relay_that_stops_moves_the_home_and_control_hears_of_it(bed: &Bed) -> Result<(), Failed> {
    let (mut control, _peer) = relayed(bed)?;
    let sidecar = join(&control, bed)?;
    let mut stream = sidecar.dial(PEER, 7)?;
    echo(&mut stream, b"before")?;
    let old = home(&mut control)?;
    control.ask("derp_stop", json!({ "region": old }))?;
    moved(&mut control, &sidecar, old)?;
    echo(&mut stream, b"after")?;
    sidecar.page(PEER, "web")?;
    let tries = sidecar.process.log().matches("derp connection lost").count();
    match tries < 30 {
        true => Ok(()),
        false => Err(format!("{tries} tries to connect to a relay that is not there").into()),
    }
}

/// A relay comes back with a certificate that nobody has signed: its region is none, and the log says why.
pub(crate) fn a_relay_with_another_certificate_is_left_for_another_region(bed: &Bed) -> Result<(), Failed> {
    let (mut control, _peer) = relayed(bed)?;
    let mut sidecar = join(&control, bed)?;
    let mut stream = sidecar.dial(PEER, 7)?;
    echo(&mut stream, b"before")?;
    let old = home(&mut control)?;
    control.ask("derp_strange", json!({ "region": old }))?;
    moved(&mut control, &sidecar, old)?;
    echo(&mut stream, b"after")?;
    let line = sidecar.process.says("derp region cannot be used", Duration::from_secs(1))?;
    match line.contains("TLS with") && line.contains("certificate") {
        true => Ok(()),
        false => Err(format!("the log gives no cause: {line}").into()),
    }
}

/// A relay that says that it restarts is left alone for as long as it asks, and then found again at once.
pub(crate) fn a_relay_that_restarts_is_awaited_as_it_wishes(bed: &Bed) -> Result<(), Failed> {
    // Far from the five seconds after which home is left.
    const RECONNECT_IN: u32 = 1_000;
    let (mut control, _peer) = relayed(bed)?;
    let sidecar = join(&control, bed)?;
    let mut stream = sidecar.dial(PEER, 7)?;
    echo(&mut stream, b"before")?;
    let home = home(&mut control)?;
    let connections = || sidecar.process.log().matches(&format!("derp connected region={home} ")).count();
    let before = connections();
    let wishes = hex::encode([RECONNECT_IN.to_be_bytes(), 5_000_u32.to_be_bytes()].concat());
    let start = Instant::now();
    frame(&mut control, home, 0x15, &wishes)?;
    until(Duration::from_secs(20), "the relay to be used again", || Ok((connections() > before).then_some(())))?;
    let took = start.elapsed();
    echo(&mut stream, b"after")?;
    if took < Duration::from_millis(RECONNECT_IN.into()) {
        return Err(format!("connected again after {took:?} to a relay that asked for {RECONNECT_IN} ms").into());
    }
    match self::home(&mut control)? == home && connections() == before + 1 {
        true => Ok(()),
        false => Err(format!("a short restart was taken for more\n{}", tail(&sidecar.process.log())).into()),
    }
}

/// What a relay finds wrong with us, as with a key that two nodes use, is in the log until it is over. No connection
/// is made anew for it: that would fight with the other node.
pub(crate) fn a_problem_that_a_relay_tells_is_told_and_cleared(bed: &Bed) -> Result<(), Failed> {
    let (mut control, _peer) = relayed(bed)?;
    let mut sidecar = join(&control, bed)?;
    let home = home(&mut control)?;
    // Not to any region: the peer's home may move, and is followed.
    let connected = |log: &str| log.matches(&format!("derp connected region={home} ")).count();
    let before = connected(&sidecar.process.log());
    // Of a long text only so much as a line holds, and once.
    let problem = hex::encode(format!("duplicate connection with this key{}", "!".repeat(1_000)));
    frame(&mut control, home, 0x14, &problem)?;
    frame(&mut control, home, 0x14, &problem)?;
    let line = sidecar.process.says("duplicate connection with this key", Duration::from_secs(10))?;
    if !line.contains("WARN") || line.len() > 400 {
        return Err(format!("not a warning, or a long one: {line}").into());
    }
    frame(&mut control, home, 0x14, "")?;
    sidecar.process.says("derp healthy again", Duration::from_secs(10))?;
    sidecar.page(PEER, "web")?;
    let log = sidecar.process.log();
    match (connected(&log) - before, log.matches("derp reports a problem").count()) {
        (0, 1) => Ok(()),
        (connected, told) => Err(format!("it connected {connected} times anew, and told {told} problems").into()),
    }
}

/// A relay that reads slowly gets what it takes, in one connection, and loses nothing of an upload.
pub(crate) fn a_relay_that_limits_us_is_waited_for(bed: &Bed) -> Result<(), Failed> {
    const SIZE: usize = 768 << 10;
    const RATE: u64 = 150_000;
    let (mut control, _peer) = relayed(bed)?;
    let sidecar = join(&control, bed)?;
    // Ours and the peer's may differ.
    for region in [1, 2] {
        control.ask("derp_limit", json!({ "region": region, "rate": RATE }))?;
    }
    let start = Instant::now();
    let mut stream = sidecar.dial(PEER, 9)?;
    stream.set_read_timeout(Some(MOVED))?;
    stream.write_all(&vec![0x5a; SIZE])?;
    stream.shutdown(Shutdown::Write)?;
    let line = crate::client::line(&mut stream)?;
    let took = start.elapsed();
    say(&format!("         {} KiB at {} kB/s in {:.1} s", SIZE >> 10, RATE / 1000, took.as_secs_f32()));
    if !line.starts_with(&format!("{SIZE} ")) {
        return Err(format!("discarded {line:?} of {SIZE}").into());
    }
    if took < Duration::from_secs(3) {
        return Err(format!("done in {took:?}: the relay did not limit us").into());
    }
    let log = sidecar.process.log();
    match log.contains("derp connection lost") || log.contains("derp relay does not answer") {
        false => Ok(()),
        true => Err(format!("the relay was doubted\n{}", tail(&log)).into()),
    }
}

/// headscale restarts, and with it the relay that is in it, while a relayed and a direct connection carry bytes: both
/// arrive whole.
pub(crate) fn connections_go_on_while_control_and_relay_restart(bed: &Bed) -> Result<(), Failed> {
    let client = &bed.hosts.client;
    super::paths::prefer(bed, "999", "tb")?;
    // The other region is out of reach, so that ours is headscale's too.
    client.nft(
        "table inet away { chain out { type filter hook output priority 0; \
         ip daddr 10.99.0.2 tcp dport 8444 reject with tcp reset; }; }",
    )?;
    let result = transfer_over_a_restart(bed);
    client.nft("delete table inet away")?;
    super::paths::prefer_none(bed)?;
    result
}

fn transfer_over_a_restart(bed: &Bed) -> Result<(), Failed> {
    let mut relayed = Launch::new(bed).args(&["--transport", "derp"]).ready()?;
    let direct = Launch::new(bed).ready()?;
    let before = leak::reading(&bed.hosts.client)?.bytes("control");
    thread::scope(|scope| {
        let streams = [relayed.dial("web", 7)?, direct.dial("web", 7)?];
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let (stop2, stopped2) = std::sync::mpsc::channel::<()>();
        let [first, second] = streams;
        let first = scope.spawn(move || shuttle(first, &stopped));
        let second = scope.spawn(move || shuttle(second, &stopped2));
        // Both carry before anything stops.
        until(Duration::from_secs(20), "relayed bytes", || {
            Ok((leak::reading(&bed.hosts.client)?.bytes("control") > before + (1 << 20)).then_some(()))
        })?;
        bed.headscale().stop();
        let lost = relayed.process.says("derp connection lost region=999", Duration::from_secs(10));
        let back = bed.headscale().resume(&bed.hosts.wan);
        drop((stop, stop2));
        let carried = first.join().map_err(|_| "the relayed transfer panicked")?;
        let directly = second.join().map_err(|_| "the direct transfer panicked")?;
        back.and(lost)?;
        let ((carried, pause), (directly, short)) = (carried?, directly?);
        say(&format!(
            "         relayed: {carried} blocks, longest pause {:.1} s; direct: {directly} blocks, {:.1} s",
            pause.as_secs_f32(),
            short.as_secs_f32()
        ));
        match short < UNTOUCHED {
            true => Ok(()),
            false => Err(format!("the direct connection paused for {short:?}").into()),
        }
    })
}

/// Has blocks echoed until it is told to stop, and then for a few more: how many, and the longest that one took.
fn shuttle(mut stream: TcpStream, stopped: &std::sync::mpsc::Receiver<()>) -> Result<(u32, Duration), Failed> {
    let (mut count, mut longest, mut last) = (0_u32, Duration::ZERO, 0);
    while last < 8 {
        if stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Disconnected) {
            last += 1;
        }
        let start = Instant::now();
        let block: Vec<u8> = (0..32_u32 << 10).map(|at| (at ^ count).to_le_bytes()[0]).collect();
        echo(&mut stream, &block)?;
        longest = longest.max(start.elapsed());
        count += 1;
        thread::sleep(Duration::from_millis(5));
    }
    Ok((count, longest))
}

/// Puts a frame between those of the home relay.
fn frame(control: &mut TestControl, region: u64, kind: u8, hex: &str) -> Result<(), Failed> {
    let sent = control.ask("derp_frame", json!({ "region": region, "from": OURS, "kind": kind, "hex": hex }))?;
    match sent.as_u64().unwrap_or(0) {
        0 => Err("the frame went to nobody".into()),
        _ => Ok(()),
    }
}
