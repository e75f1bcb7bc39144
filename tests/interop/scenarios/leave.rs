//! Leaving: whatever ends the run, the node is gone at once, and no outage can hold the exit up.

use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::process::Signal;

use crate::bed::Bed;
use crate::process::{tail, until};
use crate::sidecar::{Launch, Sidecar};

/// How long headscale may list a node after its process has ended.
const GONE: Duration = Duration::from_secs(2);

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
    let marker = bed.folder.join("trapped");
    let script = format!("trap 'exit 5' TERM; touch {}; while :; do sleep 0.05; done", marker.to_string_lossy());
    let mut sidecar = Launch::new(bed).exec().args(&["--", "sh", "-c", &script]).start()?;
    until(Duration::from_secs(30), "the child to start", || Ok(marker.exists().then_some(())))?;
    let status = sidecar.terminate()?;
    if status.code() != Some(5) {
        return Err(format!("a child that ends with 5 at SIGTERM gave {status}").into());
    }
    bed.headscale().gone(&sidecar.hostname, GONE)
}

/// What cannot be started: 127 when it is not there, 126 when it is no program, and no node either way.
pub(crate) fn exec_tells_a_missing_command_from_a_wrong_one(bed: &Bed) -> Result<(), Failed> {
    let plain = bed.folder.join("no-program");
    std::fs::write(&plain, "no program\n")?;
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

/// With control down the exit is prompt, says that the logout is unconfirmed, and is 80 only when asked.
pub(crate) fn an_unreachable_control_bounds_the_logout(bed: &Bed) -> Result<(), Failed> {
    let lenient = Launch::new(bed).args(&["--logout-timeout", "1s"]).ready()?;
    let strict = Launch::new(bed).args(&["--logout-timeout", "1s", "--strict-logout"]).ready()?;
    bed.headscale().stop();
    let result = [(lenient, 0), (strict, 80)].into_iter().try_for_each(|(mut sidecar, code)| {
        let start = Instant::now();
        let status = sidecar.terminate()?;
        let took = start.elapsed();
        let log = sidecar.process.log();
        if status.code() != Some(code) || took > Duration::from_secs(3) {
            return Err(Failed::from(format!("ended with {status} after {took:?}\n{}", tail(&log))));
        }
        match log.to_lowercase().contains("logout") {
            true => Ok(()),
            false => Err("nothing said about the logout".into()),
        }
    });
    bed.headscale().resume(&bed.hosts.wan)?;
    result
}

/// A second signal ends it at once, whatever it was waiting for.
pub(crate) fn a_second_signal_ends_it_at_once(bed: &Bed) -> Result<(), Failed> {
    let mut sidecar = Launch::new(bed).args(&["--logout-timeout", "20s"]).ready()?;
    bed.headscale().stop();
    sidecar.process.signal(Signal::TERM);
    std::thread::sleep(Duration::from_millis(500));
    let start = Instant::now();
    sidecar.process.signal(Signal::TERM);
    let status = sidecar.process.wait(Duration::from_secs(5));
    bed.headscale().resume(&bed.hosts.wan)?;
    status?;
    match start.elapsed() < Duration::from_secs(1) {
        true => Ok(()),
        false => Err(format!("the second signal took {:?}", start.elapsed()).into()),
    }
}
