//! The LAN behind the subnet router: its resolvers and its site.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::UdpSocket;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use libtest_mimic::Failed;

use crate::namespace::Namespace;
use crate::process::Process;

/// The LAN's resolver and what answers there.
pub(crate) struct Corp {
    /// dnsmasq, which logs each query.
    pub(crate) resolver: Process,
    stop: Arc<AtomicBool>,
    failing: Option<thread::JoinHandle<()>>,
}

impl Corp {
    /// Starts the LAN's programs in `namespace`.
    ///
    /// # Errors
    /// Those of starting dnsmasq and of binding.
    pub(crate) fn start(namespace: &Namespace, folder: &Path) -> Result<Self, Failed> {
        let hosts = folder.join("corp.hosts");
        fs::write(&hosts, hosts_file())?;
        let mut command = namespace.command("dnsmasq");
        command.args(stay()?).args(["--no-resolv", "--no-hosts", "--log-queries=extra", "--log-facility=-"]);
        command.args(["--listen-address=10.20.0.53", "--bind-interfaces"]);
        command
            .args(["--local=/corp.test/", "--local=/spare.test/", "--edns-packet-max=1232"])
            .arg("--addn-hosts")
            .arg(hosts);
        command.args(["--cname=alias.corp.test,web.corp.test", "--cname=alias6.corp.test,v6.corp.test"]);
        command.args(["--cname=outside.corp.test,elsewhere.example", "--host-record=elsewhere.example,10.99.0.254"]);
        // What its files say may change at once, so dnsmasq gives those a TTL of 0; only these may be remembered.
        for name in ["kept.corp.test", "burst.corp.test"] {
            command.arg(format!("--host-record={name},10.20.0.80,fd20::80,60"));
        }
        let mut resolver = Process::start(command, "corp-dnsmasq", folder, false)?;
        resolver.says("started", Duration::from_secs(5))?;
        let stop = Arc::new(AtomicBool::new(false));
        let socket = namespace.inside(|| UdpSocket::bind("10.20.0.55:53"))??;
        let failing = thread::spawn({
            let stop = Arc::clone(&stop);
            move || drop(refuse_to_know(&socket, &stop))
        });
        Ok(Self { resolver, stop, failing: Some(failing) })
    }

    /// The questions that dnsmasq has logged for a name. One that is repeated, because its answer takes half a second on
    /// a loaded machine, comes from the same port and is one.
    pub(crate) fn questions(&self, name: &str) -> usize {
        questions(&self.resolver.log(), name)
    }
}

/// How many questions for `name` are in a log of `--log-queries=extra`, where a line is
/// `dnsmasq: SERIAL ADDRESS/PORT query[TYPE] NAME from ADDRESS`.
fn questions(log: &str, name: &str) -> usize {
    let asked = log.lines().filter_map(|line| {
        let (before, rest) = line.split_once(" query[")?;
        let (kind, rest) = rest.split_once("] ")?;
        let (_, requestor) = before.rsplit_once(' ')?;
        rest.strip_prefix(name)?.starts_with(" from ").then_some((requestor, kind))
    });
    asked.collect::<HashSet<_>>().len()
}

/// The flags by which dnsmasq stays our child, and writes its id nowhere: beds that start together would share the file.
///
/// In its debug mode it serves one TCP client at a time and nobody else meanwhile, so that is for user
/// namespaces only, where it cannot change its user.
///
/// # Errors
/// Those of looking where we are.
pub(crate) fn stay() -> io::Result<[&'static str; 3]> {
    let real_root = fs::read_to_string("/proc/self/uid_map")?.contains("4294967295");
    let way = if real_root { "--keep-in-foreground" } else { "--no-daemon" };
    Ok([way, "--user=root", "--pid-file="])
}

impl Drop for Corp {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.failing.take() {
            drop(thread.join());
        }
    }
}

/// `corp.test`, but for what dnsmasq's own flags say: two families, one only, odd names, and too many addresses for a
/// datagram.
fn hosts_file() -> String {
    let mut lines = String::from(
        "10.20.0.80 web.corp.test\nfd20::80 web.corp.test\n10.20.0.80 v4.corp.test\nfd20::80 v6.corp.test\n\
         10.20.0.80 web.spare.test\n10.21.0.80 other.corp.test\n10.20.0.99 silent-host.corp.test\n\
         10.77.0.80 unrouted.corp.test\n10.99.0.254 leak.corp.test\n",
    );
    let long = "l".repeat(63);
    lines.push_str(&format!(
        "10.20.0.80 _under_score.corp.test\n10.20.0.80 {long}.corp.test\n10.20.0.80 {long}.{long}.{long}.{}.corp.test\n\
         10.20.0.80 xn--bcher-kva.corp.test\n",
        "m".repeat(51),
    ));
    for last in 128..=250 {
        lines.push_str(&format!("10.20.0.{last} many.corp.test\n"));
    }
    lines
}

/// Answers every question with SERVFAIL: the question itself, with QR, RA and response code 2 (RFC 1035, 4.1.1).
fn refuse_to_know(socket: &UdpSocket, stop: &AtomicBool) -> io::Result<()> {
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        buffer[2] |= 0x80;
        buffer[3] = 0x82;
        socket.send_to(&buffer[..length], from)?;
    }
    Ok(())
}
