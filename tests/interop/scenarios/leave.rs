//! Leaving: whatever ends the run, the node is gone at once, and no outage can hold the exit up.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::ops::Range;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::process::Signal;

use crate::bed::Bed;
use crate::process::{tail, until};
use crate::sidecar::{Launch, Sidecar};

/// How long headscale may list a node after its process has ended.
const GONE: Duration = Duration::from_secs(2);

/// How long headscale may list one that was killed: thrice its own 66 seconds.
const FORGOTTEN: Duration = Duration::from_secs(200);

fn ends_clean(bed: &Bed, mut sidecar: Sidecar<'_>, how: &str) -> Result<(), Failed> {
    let status = sidecar.process.wait(Duration::from_secs(10))?;
    if status.code() != Some(0) {
        return Err(format!("{how}: ended with {status}\n{}", tail(&sidecar.process.log())).into());
    }
    bed.headscale().gone(&sidecar.hostname, GONE)
}

/// SIGTERM and SIGINT log out and end with 0.
pub(crate) fn signals_log_out(bed: &Bed) -> Result<(), Failed> {
    for signal in [Signal::TERM, Signal::INT] {
        let sidecar = Launch::new(bed).ready()?;
        sidecar.page("web", "web")?;
        sidecar.process.signal(signal);
        ends_clean(bed, sidecar, "signal")?;
    }
    Ok(())
}

/// What is cut at the end is reset, never closed in peace: an answer without a length would look whole. It says how
/// many connections it cut.
pub(crate) fn connections_that_are_cut_at_the_end_are_reset(bed: &Bed) -> Result<(), Failed> {
    let mut sidecar = Launch::new(bed).ready()?;
    let endless = |version: &str| -> Result<TcpStream, Failed> {
        let mut stream = sidecar.connect()?;
        let head = format!("GET http://web/chunked?n=1000000000000 HTTP/{version}\r\nHost: web\r\n\r\n");
        stream.write_all(head.as_bytes())?;
        Ok(stream)
    };
    let mut echoing = sidecar.dial("web", 7)?;
    echoing.write_all(b"x")?;
    let (answer, mut connected) = sidecar.tunnel("web:19")?;
    if answer.status != 200 {
        return Err(format!("CONNECT was answered {}", answer.status).into());
    }
    connected.write_all(b"1000000000000\n")?;
    let mut open = [echoing, connected, endless("1.1")?, endless("1.0")?];
    for stream in &mut open {
        stream.read_exact(&mut [0])?;
    }
    sidecar.process.signal(Signal::TERM);
    for (index, stream) in open.iter_mut().enumerate() {
        let ended = io::copy(stream, &mut io::sink());
        if !ended.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset) {
            return Err(format!("connection {index} ended with {ended:?}\n{}", tail(&sidecar.process.log())).into());
        }
    }
    // Said once all are cut.
    sidecar.process.says("still busy after 500ms: 4", Duration::from_secs(2))?;
    ends_clean(bed, sidecar, "signal")
}

/// The end of stdin logs out, when asked for.
pub(crate) fn the_end_of_stdin_logs_out_when_asked_for(bed: &Bed) -> Result<(), Failed> {
    let mut sidecar = Launch::new(bed).with_stdin().args(&["--exit-on-stdin-eof"]).ready()?;
    sidecar.close_stdin();
    ends_clean(bed, sidecar, "stdin")
}

/// A child's end logs out, and its exit code is ours; its proxy variables work, ours are gone.
pub(crate) fn exec_passes_the_code_on_and_logs_out(bed: &Bed) -> Result<(), Failed> {
    let script = "test -z \"$TS_AUTHKEY$TS_AUTH_KEY$TS_AUTHKEY_FILE\" || exit 9; \
                  test -n \"$http_proxy$HTTP_PROXY\" || exit 8; \
                  test \"$(curl -sS --max-time 20 http://web/)\" = 'tailcar site web' || exit 7; exit 42";
    let mut sidecar = Launch::new(bed)
        .no_key()
        .env("TS_AUTHKEY", &bed.key.secret)
        .exec()
        .args(&["--", "sh", "-c", script])
        .start()?;
    let status = sidecar.process.wait(Duration::from_secs(40))?;
    if status.code() != Some(42) {
        return Err(format!("ended with {status}\n{}", tail(&sidecar.process.log())).into());
    }
    bed.headscale().gone(&sidecar.hostname, GONE)
}

/// A child that a signal ended gives 128 and the signal; a signal to us reaches the child.
pub(crate) fn exec_passes_signals_both_ways(bed: &Bed) -> Result<(), Failed> {
    let mut sidecar = Launch::new(bed).exec().args(&["--", "sh", "-c", "kill -KILL $$"]).start()?;
    let status = sidecar.process.wait(Duration::from_secs(40))?;
    if status.code() != Some(128 + 9) {
        return Err(format!("a killed child gave {status}\n{}", tail(&sidecar.process.log())).into());
    }
    let marker = fresh(bed, "trapped");
    let script = format!("trap 'exit 5' TERM; touch {}; while :; do sleep 0.05; done", marker.to_string_lossy());
    let mut sidecar = Launch::new(bed).exec().args(&["--", "sh", "-c", &script]).start()?;
    until(Duration::from_secs(30), "the child to start", || Ok(marker.exists().then_some(())))?;
    let status = sidecar.terminate()?;
    if status.code() != Some(5) {
        return Err(format!("a child that ends with 5 at SIGTERM gave {status}").into());
    }
    bed.headscale().gone(&sidecar.hostname, GONE)?;
    let marker = fresh(bed, "deaf");
    let script = format!("trap '' TERM; touch {}; while :; do sleep 0.05; done", marker.to_string_lossy());
    let mut sidecar = Launch::new(bed).exec().args(&["--", "sh", "-c", &script]).start()?;
    until(Duration::from_secs(30), "the child to start", || Ok(marker.exists().then_some(())))?;
    sidecar.process.signal(Signal::TERM);
    until(Duration::from_secs(20), "a word of the child that does not end", || {
        Ok(sidecar.process.log().contains("runs on; a second signal kills it").then_some(()))
    })?;
    let status = sidecar.terminate()?;
    if status.code() != Some(128 + 9) {
        return Err(format!("a child that heeds no SIGTERM gave {status} at the second").into());
    }
    bed.headscale().gone(&sidecar.hostname, GONE)
}

/// A file that is not there.
fn fresh(bed: &Bed, name: &str) -> PathBuf {
    let file = bed.folder.join(name);
    drop(fs::remove_file(&file));
    file
}

/// What cannot be started: 127 when it is not there, 126 when it is no program, and no node either way.
pub(crate) fn exec_tells_a_missing_command_from_a_wrong_one(bed: &Bed) -> Result<(), Failed> {
    let plain = bed.folder.join("no-program");
    fs::write(&plain, "no program\n")?;
    for (command, expected) in [("/no/such/program", 127), (&plain.to_string_lossy(), 126)] {
        let mut sidecar = Launch::new(bed).exec().args(&["--", command]).start()?;
        let status = sidecar.process.wait(Duration::from_secs(40))?;
        if status.code() != Some(expected) {
            let log = tail(&sidecar.process.log());
            return Err(format!("{command}: ended with {status}, not {expected}\n{log}").into());
        }
        bed.headscale().gone(&sidecar.hostname, GONE)?;
    }
    Ok(())
}

/// Without control, be it silent or not there, the end is unconfirmed within its time, says so, and is 80 only when asked.
pub(crate) fn an_unreachable_control_bounds_the_logout(bed: &Bed) -> Result<(), Failed> {
    // More than what it is without the flag, so that it shows whose limit counts.
    let (limit, late) = (Duration::from_secs(3), Duration::from_secs(8));
    let launch = |flags: &[&str]| Launch::new(bed).args(&["--logout-timeout", "3s"]).args(flags).ready();
    let (frozen, strict, refused) = (launch(&[])?, launch(&["--strict-logout"])?, launch(&[])?);
    {
        let headscale = bed.headscale();
        headscale.process.signal(Signal::STOP);
        let results = thread::scope(|scope| {
            let ends = [(frozen, 0), (strict, 80)]
                .map(|(sidecar, code)| scope.spawn(move || unconfirmed(sidecar, code, limit..late)));
            ends.map(|end| end.join().unwrap_or_else(|_| Err("it panicked".into())))
        });
        headscale.process.signal(Signal::CONT);
        results.into_iter().collect::<Result<(), Failed>>()?;
    }
    bed.headscale().stop();
    let result = unconfirmed(refused, 0, Duration::ZERO..late);
    bed.headscale().resume(&bed.hosts.wan)?;
    result
}

/// Holds a SIGTERM to an exit status, to how long that takes, and to a word about the logout.
fn unconfirmed(mut sidecar: Sidecar<'_>, code: i32, bounds: Range<Duration>) -> Result<(), Failed> {
    let start = Instant::now();
    let status = sidecar.terminate()?;
    let took = start.elapsed();
    let log = sidecar.process.log();
    if status.code() == Some(code) && bounds.contains(&took) && log.contains("TC-2006") {
        return Ok(());
    }
    Err(format!("ended with {status} after {took:?}\n{}", tail(&log)).into())
}

/// A second signal ends it at once, in the middle of a logout that control does not answer.
pub(crate) fn a_second_signal_ends_it_at_once(bed: &Bed) -> Result<(), Failed> {
    let marker = bed.folder.join("second.ready");
    let flags = ["--logout-timeout", "20s", "--ready-file", &marker.to_string_lossy()];
    let mut sidecar = Launch::new(bed).args(&flags).ready()?;
    let headscale = bed.headscale();
    headscale.process.signal(Signal::STOP);
    sidecar.process.signal(Signal::TERM);
    // The ready file is gone as soon as the run is leaving.
    let leaving = until(Duration::from_secs(5), "the end to begin", || Ok((!marker.exists()).then_some(())));
    let lasts = sidecar.process.ended()?.is_none();
    let start = Instant::now();
    // Another one than the first: the same soon after may be that one's echo by a process group.
    sidecar.process.signal(Signal::INT);
    let status = sidecar.process.wait(Duration::from_secs(10));
    let took = start.elapsed();
    headscale.process.signal(Signal::CONT);
    leaving?;
    // A loaded machine is slow; the logout would take four times as long.
    match (lasts, status?.code(), took < Duration::from_secs(5)) {
        (true, Some(130), true) => Ok(()),
        (_, code, _) => Err(format!("lasted: {lasts}; the second signal took {took:?}, exit {code:?}").into()),
    }
}

/// Killed, nothing can log out: the server forgets the node by itself.
pub(crate) fn a_killed_run_is_forgotten_by_the_server(bed: &Bed) -> Result<(), Failed> {
    let mut sidecar = Launch::new(bed).on(&bed.hosts.killed).ready()?;
    sidecar.page("web", "web")?;
    sidecar.process.signal(Signal::KILL);
    sidecar.process.wait(Duration::from_secs(5))?;
    if bed.headscale().node(&sidecar.hostname)?.is_none() {
        return Err("forgotten at once: it was no kill, or the key not ephemeral".into());
    }
    // Other scenarios stop the server for a while, which begins the node's time anew.
    until(FORGOTTEN, "headscale to forget the node", || {
        thread::sleep(Duration::from_secs(1));
        Ok(bed.headscale().node(&sidecar.hostname).ok().filter(Option::is_none).map(drop))
    })
}
