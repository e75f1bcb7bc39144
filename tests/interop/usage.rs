//! What a process has used, as the kernel counts it: time and memory.

use std::fs;
use std::time::Duration;

/// User and system time that the process has used, of threads that have ended too; `None` when it is gone.
///
/// In steps of 10 ms. Source: proc_pid_stat(5), fields 14 and 15, in ticks of which Linux has 100 a second.
pub(crate) fn cpu(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // What follows the name begins with the third field.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11).map(str::parse);
    let (user, system): (u64, u64) = (fields.next()?.ok()?, fields.next()?.ok()?);
    Some(Duration::from_millis((user + system) * 10))
}

/// Resident memory in MiB.
pub(crate) fn resident(pid: u32) -> Option<f64> {
    mebibytes(&format!("/proc/{pid}/status"), "VmRSS:")
}

/// The most that was ever resident, in MiB.
pub(crate) fn peak(pid: u32) -> Option<f64> {
    mebibytes(&format!("/proc/{pid}/status"), "VmHWM:")
}

/// Resident memory in MiB, of pages that others have too only this process's part.
pub(crate) fn proportional(pid: u32) -> Option<f64> {
    mebibytes(&format!("/proc/{pid}/smaps_rollup"), "Pss:")
}

fn mebibytes(file: &str, field: &str) -> Option<f64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: f64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib / 1024.0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_process_has_time_and_memory() {
        use super::*;
        let me = std::process::id();
        let start = std::time::Instant::now();
        while cpu(me).unwrap() < Duration::from_millis(20) {
            assert!(start.elapsed() < Duration::from_secs(20), "no time passes for a process that spins");
        }
        assert!(proportional(me).unwrap() > 0.1);
    }

    #[test]
    fn what_others_have_too_counts_in_part() {
        use std::io::{Read as _, Write as _};
        use std::process::{Command, Stdio};

        use super::*;
        // It rests once it has answered, while in this process another test may take memory between two looks.
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let (resident, proportional) = (resident(child.id()).unwrap(), proportional(child.id()).unwrap());
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(resident > proportional, "{resident} MiB, {proportional} of them its own");
    }

    #[test]
    fn what_was_resident_once_stays_in_the_peak() {
        use super::*;
        let me = std::process::id();
        drop(std::hint::black_box(vec![7_u8; 64 << 20]));
        // The kernel counts in batches of some pages a thread.
        assert!(peak(me).unwrap() > resident(me).unwrap() + 60.0);
    }

    #[test]
    fn a_process_that_is_gone_has_used_nothing_that_could_be_told() {
        use super::*;
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert_eq!((cpu(child.id()), peak(child.id())), (None, None));
    }
}
