//! What the kernel knows of a process: its time, its memory, where it listens, what it runs.

use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::time::Duration;
use std::{fs, io};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};

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

/// Whether somebody listens at an IPv4 address of the caller's network namespace: nobody else can bind there then.
///
/// Nothing is sent for it, since a connection would be the proxy's first; and the kernel's table of sockets takes a
/// millisecond to read, however few they are. Whoever is about to bind there is not hindered: on Linux any number of
/// sockets with `SO_REUSEADDR`, which all proxies here set, share a port until one of them listens (socket(7)).
///
/// # Errors
/// When there can be no socket.
pub(crate) fn listens(address: SocketAddrV4) -> io::Result<bool> {
    let probe = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&probe, true)?;
    match bind(&probe, &address) {
        Ok(()) => Ok(false),
        Err(Errno::ADDRINUSE) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// The program that the process runs.
pub(crate) fn program(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_listens_is_seen() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let std::net::SocketAddr::V4(address) = listener.local_addr().unwrap() else { panic!("it is IPv4") };
        assert!(listens(address).unwrap());
        drop(listener);
        let bound = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        sockopt::set_socket_reuseaddr(&bound, true).unwrap();
        bind(&bound, &address).unwrap();
        assert!(!listens(address).unwrap());
        rustix::net::listen(&bound, 1).unwrap();
        assert!(listens(address).unwrap());
    }

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
