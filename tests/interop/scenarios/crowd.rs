//! Many connections: side by side, one after the other, and idle.

use std::io::{Read as _, Write as _};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::json;

use crate::bed::Bed;
use crate::process::until;
use crate::sidecar::{Launch, Sidecar};
use crate::testcontrol::{Selection, TestControl};
use crate::usage;

/// The most that a sidecar in a tailnet of ten thousand may hold, in MiB.
const CROWDED: f64 = 60.0;
/// The same after changes: testcontrol sends the whole map again with each.
const CHURNED: f64 = 64.0;
/// Testcontrol takes a good part of a second for a whole map.
const QUIET: Duration = Duration::from_secs(1);

fn echo(stream: &mut std::net::TcpStream, word: &[u8]) -> Result<(), Failed> {
    stream.write_all(word)?;
    let mut back = vec![0; word.len()];
    stream.read_exact(&mut back)?;
    match back == word {
        true => Ok(()),
        false => Err("another connection's bytes".into()),
    }
}

/// Two hundred connections at once, each with its own bytes.
pub(crate) fn two_hundred_connections_at_once_keep_apart(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    thread::scope(|scope| {
        let workers: Vec<_> = (0..200)
            .map(|number: u32| {
                scope.spawn({
                    let sidecar: &Sidecar<'_> = &sidecar;
                    move || -> Result<(), Failed> {
                        let mut stream =
                            sidecar.dial(if number.is_multiple_of(2) { "web" } else { "10.20.0.80" }, 7)?;
                        for round in 0..20_u32 {
                            echo(&mut stream, format!("connection {number} round {round}").repeat(40).as_bytes())?;
                        }
                        Ok(())
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().map_err(|_| "a thread panicked")??;
        }
        Ok(())
    })
}

/// Two thousand short connections, twenty at a time.
pub(crate) fn two_thousand_short_connections_leave_room_for_more(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    thread::scope(|scope| {
        let workers: Vec<_> = (0..20)
            .map(|worker: u32| {
                scope.spawn({
                    let sidecar: &Sidecar<'_> = &sidecar;
                    move || -> Result<(), Failed> {
                        for round in 0..100_u32 {
                            let mut stream = sidecar.dial("web", 7)?;
                            echo(&mut stream, format!("{worker} {round}").as_bytes())?;
                        }
                        Ok(())
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().map_err(|_| "a thread panicked")??;
        }
        Ok::<(), Failed>(())
    })?;
    sidecar.page("web", "web")
}

/// In a tailnet of ten thousand nodes a sidecar is small, knows the last of them, and reaches the one that is there.
pub(crate) fn ten_thousand_peers_are_no_burden(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start(bed)?;
    let start = Instant::now();
    drop(control.launch(bed).ready()?);
    let alone = start.elapsed();
    // A node more costs testcontrol the more the more there are.
    for first in (0..10_000).step_by(1_000) {
        control.ask("crowd", json!({ "first": first, "count": 1_000 }))?;
    }
    let _peer = control.peer(bed, "web")?;
    let start = Instant::now();
    let sidecar = control.launch(bed).args(&["--dial-timeout", "1s"]).ready()?;
    let (crowded, computed) = (start.elapsed(), usage::cpu(sidecar.process.id()).ok_or("the sidecar is gone")?);
    let first = quiet(&mut control, &sidecar)?;
    // Its own map of ten thousand may be long in coming.
    until(Duration::from_secs(20), "the peer", || Ok(sidecar.page("web.tb.example", "web").ok()))?;
    // Known, and nobody there.
    sidecar.get_absolute("crowd-9999.tb.example", "/")?.expect(504, "TC-1601")?;
    let mut held = first;
    for one in 10_000..10_003 {
        control.ask("crowd", json!({ "first": one, "count": 1 }))?;
        until(Duration::from_secs(10), "the next map", || {
            let told = sidecar.process.log().matches("+1 peers").count();
            Ok((told > one - 10_000).then_some(()))
        })?;
        held = quiet(&mut control, &sidecar)?;
    }
    let peak = usage::peak(sidecar.process.id()).ok_or("the sidecar is gone")?;
    crate::say(&format!(
        "ready after {alone:.0?} alone, {crowded:.0?} among 10,000, of which {computed:.0?} its own computing; \
         {first:.1} MiB held, {held:.1} after three maps more, {peak:.1} at most"
    ));
    if first > CROWDED || held > CHURNED {
        return Err(format!("{first:.1} MiB are held, {held:.1} after three maps more").into());
    }
    Ok(())
}

/// Waits until nobody is sent maps and the sidecar rests, and reads what it holds then, in MiB: while whole maps follow
/// each other closely, there are several at once.
fn quiet(control: &mut TestControl, sidecar: &Sidecar<'_>) -> Result<f64, Failed> {
    let streams = Selection { kind: "map", stream: Some(true), ..Selection::default() };
    until(Duration::from_secs(20), "the end of all maps", || {
        let mut so_far = || -> Result<_, Failed> {
            let sent: u32 = control.recorded(&streams)?.iter().map(|stream| stream.frames).sum();
            Ok((sent, usage::cpu(sidecar.process.id()).ok_or("the sidecar is gone")?))
        };
        let (sent, used) = so_far()?;
        thread::sleep(QUIET);
        let (more, later) = so_far()?;
        Ok((more == sent && later - used < QUIET / 20).then_some(()))
    })?;
    sidecar.resident()
}
