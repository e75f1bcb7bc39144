//! What the kernel knows of a process: its time, its memory, where it listens, what it runs.

use std::fs;
use std::net::SocketAddrV4;
use std::path::PathBuf;
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

/// Whether somebody listens at an IPv4 address, in the network namespace of the process.
///
/// Nothing is sent for it: a connection would be the proxy's first.
pub(crate) fn listens(pid: u32, address: SocketAddrV4) -> bool {
    // Source: proc_pid_net(5): addresses in the machine's byte order, state 0A is LISTEN.
    let host = u32::from_ne_bytes(address.ip().octets());
    let wanted = format!(": {host:08X}:{:04X} 00000000:0000 0A ", address.port());
    fs::read_to_string(format!("/proc/{pid}/net/tcp")).is_ok_and(|table| table.contains(&wanted))
}

/// The program that the process runs.
pub(crate) fn program(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_time_memory_and_a_program() {
        let me = std::process::id();
        let start = std::time::Instant::now();
        while cpu(me) < Duration::from_millis(20) {
            assert!(start.elapsed() < Duration::from_secs(20), "no time passes for a process that spins");
        }
        assert!(proportional(me).unwrap() > 0.1);
        assert!(resident(me).unwrap() > proportional(me).unwrap());
        assert_eq!(program(me).unwrap(), std::env::current_exe().unwrap());
    }
}
