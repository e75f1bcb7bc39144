//! A relay that hangs: its kernel goes on acknowledging what nobody reads.

use std::io::Write as _;
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::relay::{ADDRESS, PEER, join, moved};
use crate::bed::Bed;
use crate::client::line;
use crate::derper::{Derper, PORT, REGION};
use crate::process::{Process, output, tail};
use crate::say;
use crate::testcontrol::TestControl;

/// Two seconds of quiet, three for an answer, and as many for a slow machine.
const DOUBTED: Duration = Duration::from_secs(10);
/// Five more seconds until the home is left, a measurement, and another slow one.
const LEFT: Duration = Duration::from_secs(20);
/// The peer's own move, by a measurement that waits three seconds for the frozen relay; where what it had sent last is
/// lost, its TCP repeats 25 s after the start. Without a doubt the relay would be believed for 120 s.
const WHOLE: Duration = Duration::from_secs(60);
/// How long bytes go before and after.
const STEADY: Duration = Duration::from_secs(1);

/// A process that is stopped until this is dropped.
struct Stopped<'a>(&'a Process);

impl<'a> Stopped<'a> {
    fn new(process: &'a Process) -> Self {
        process.signal(Signal::STOP);
        Self(process)
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.signal(Signal::CONT);
    }
}

/// The home freezes while an upload goes by it: it is doubted in seconds, home moves, and when the peer has moved, too, the
/// upload goes on by the other region, whole.
pub(crate) fn a_home_relay_that_freezes_is_left_while_bytes_go_by_it(bed: &Bed) -> Result<(), Failed> {
    let mut control = TestControl::start_for(bed, &bed.hosts.relayed, ADDRESS)?;
    bed.hosts.relayed.nft(&format!(
        "insert rule inet leak out ip daddr {ADDRESS} tcp dport {PORT} counter name control accept\n\
         insert rule inet leak out ip daddr {ADDRESS} udp dport 3478 counter name stun accept"
    ))?;
    let derper =
        Derper::start_at(&bed.peers.join("derper"), &bed.hosts.wan, &bed.folder.join("frozen"), ADDRESS, None)?;
    let ours = control.ask("derp_map", json!({ "map": null }))?;
    // It is home to everybody before there is another.
    regions(&mut control, &derper, &json!({}))?;
    let _peer = control.peer(bed, PEER)?;
    let mut sidecar = join(&control, bed)?;
    let stream = sidecar.dial(PEER, 9)?;
    regions(&mut control, &derper, &ours["Regions"])?;

    let (stop, stopped) = channel::<()>();
    let uploading = thread::spawn(move || upload(stream, &stopped));
    thread::sleep(STEADY);
    let (frozen, start) = (Stopped::new(&derper.process), Instant::now());
    sidecar.process.says("derp relay does not answer", DOUBTED)?;
    let doubted = start.elapsed();
    moved(&mut control, &sidecar, REGION)?;
    let left = start.elapsed();
    // It would find out by itself, half a minute later.
    for args in [["force-prefer-derp", "1"].as_slice(), &["restun"]] {
        let mut tailscale = bed.hosts.web.command(bed.peers.join("tailscale"));
        tailscale.arg("--socket").arg(bed.folder.join(PEER).join("tailscaled.sock")).arg("debug").args(args);
        output(tailscale)?;
    }
    drop(stop);
    let sent = uploading.join().map_err(|_| "the upload panicked")??;
    let whole = start.elapsed();
    drop(frozen);
    say(&format!(
        "         doubted after {:.1} s, left after {:.1} s; {} KiB whole after {:.1} s",
        doubted.as_secs_f32(),
        left.as_secs_f32(),
        sent >> 10,
        whole.as_secs_f32()
    ));
    sidecar.page(PEER, "web")?;
    match left < LEFT && whole < WHOLE {
        true => Ok(()),
        false => Err(format!("it took too long\n{}", tail(&sidecar.process.log())).into()),
    }
}

/// Has octets discarded until it is told to stop; how many, once all of them were counted at the other end.
fn upload(mut stream: TcpStream, stopped: &Receiver<()>) -> Result<usize, Failed> {
    const BLOCK: [u8; 16 << 10] = [0x5a; 16 << 10];
    let mut sent = 0;
    while stopped.try_recv() != Err(TryRecvError::Disconnected) {
        stream.set_write_timeout(Some(WHOLE))?;
        stream.write_all(&BLOCK)?;
        sent += BLOCK.len();
        thread::sleep(Duration::from_millis(5));
    }
    stream.shutdown(Shutdown::Write)?;
    stream.set_read_timeout(Some(WHOLE))?;
    let line = line(&mut stream)?;
    match line.starts_with(&format!("{sent} ")) {
        true => Ok(sent),
        false => Err(format!("discarded {line:?} of {sent}").into()),
    }
}

/// Names the derper's region and others to everybody.
fn regions(control: &mut TestControl, derper: &Derper, others: &Value) -> Result<(), Failed> {
    let mut regions = others.clone();
    regions[REGION.to_string()] = derper.region.clone();
    control.ask("derp_map", json!({ "map": { "Regions": regions } })).map(drop)
}
