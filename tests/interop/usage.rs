//! What a process has used, as the kernel counts it: time and memory.

use std::fs;
use std::time::Duration;

/// User and system time that the process has used, of threads that have ended too; zero when it is gone.
///
/// In steps of 10 ms. Source: proc_pid_stat(5), fields 14 and 15, in ticks of which Linux has 100 a second.
pub(crate) fn cpu(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    // The rest begins with the third field.
    let ticks: u64 = fields.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * 10)
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
        while cpu(me) < Duration::from_millis(20) {
            assert!(start.elapsed() < Duration::from_secs(20), "no time passes for a process that spins");
        }
        assert!(proportional(me).unwrap() > 0.1);
        assert!(resident(me).unwrap() > proportional(me).unwrap());
    }
}
