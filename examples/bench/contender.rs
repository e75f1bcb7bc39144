//! Who is compared, and how each is started, awaited and ended.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::process::Signal;
use serde_json::Value;

use crate::bed::Bed;
use crate::generator::Way;
use crate::headscale::CONTROL;
use crate::namespace::Namespace;
use crate::process::{Process, tail, until};
use crate::{procfs, tailscaled};

/// Where every proxy listens, inside its host.
const PROXY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1080);
/// The longest that a start may take.
pub(crate) const JOIN: Duration = Duration::from_secs(40);

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Contender {
    Tailcar,
    Tailscaled,
    Meshd,
}

/// One that was started.
pub(crate) struct Run<'a> {
    bed: &'a Bed,
    pub(crate) contender: Contender,
    pub(crate) hostname: String,
    process: Process,
    /// `tailscale up`, which tailscaled needs beside it.
    login: Option<Process>,
    folder: PathBuf,
    /// When the program's own code began.
    pub(crate) exec: Instant,
    /// When its proxy listened.
    pub(crate) bound: Instant,
    pub(crate) way: Way,
}

impl Contender {
    /// What tables call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tailcar => "tailcar",
            Self::Tailscaled => "tailscaled",
            Self::Meshd => "arkitekt-meshd",
        }
    }

    /// Its program.
    pub(crate) fn program(self, peers: &Path) -> PathBuf {
        match self {
            Self::Tailcar => tailcar(),
            Self::Tailscaled => peers.join("tailscaled"),
            Self::Meshd => peers.join("bin/arkitekt-meshd"),
        }
    }

    /// Starts it on a host, and waits until its proxy listens.
    ///
    /// # Errors
    /// When it ends before that, with its last words, or takes too long.
    pub(crate) fn start<'a>(self, bed: &'a Bed, host: &Namespace) -> Result<Run<'a>, Failed> {
        static COUNT: AtomicUsize = AtomicUsize::new(1);
        let hostname = format!("bench-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let folder = bed.folder.join(&hostname);
        fs::create_dir_all(&folder)?;
        let key = folder.join("key");
        fs::write(&key, &bed.key.secret)?;
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
        let program = self.program(&bed.peers).canonicalize()?;
        let mut command = host.command(&program);
        self.arguments(&mut command, bed, &hostname, &folder);
        let process = Process::start(command, &hostname, &bed.folder, false)?;
        let exec = executed(&process, &program)?;
        let way = bed.through(PROXY.into());
        let mut run = Run { bed, contender: self, hostname, process, login: None, folder, exec, bound: exec, way };
        run.await_proxy(host)?;
        Ok(run)
    }

    fn arguments(self, command: &mut Command, bed: &Bed, hostname: &str, folder: &Path) {
        let control = format!("https://{CONTROL}");
        match self {
            Self::Tailcar => {
                command.env("HOME", folder).arg("run").args(["--login-server", &control, "--hostname", hostname]);
                command.arg("--ca-file").arg(&bed.authority);
                command.arg("--auth-key").arg(format!("file:{}", folder.join("key").display()));
                command.arg("--listen").arg(PROXY.to_string()).args(["--max-connections", "20000"]);
                command.args(["--log-format", "json", "--log-level", "warn,tailcar::control=debug"]);
            }
            Self::Tailscaled => {
                tailscaled::environment(command, &bed.authority, folder);
                command.args(["--tun=userspace-networking", "--state=mem:", "--no-logs-no-support"]);
                command.arg(format!("--socks5-server={PROXY}")).arg(format!("--outbound-http-proxy-listen={PROXY}"));
                command.arg("--statedir").arg(folder).arg("--socket").arg(folder.join("socket"));
            }
            Self::Meshd => {
                command.env("HOME", folder).env("ARKITEKT_MESH_AUTHKEY", &bed.key.secret);
                command.env("ARKITEKT_MESH_CA_FILE", &bed.authority);
                command.args(["--hostname", hostname, "--control-url", &control, "--ephemeral", "--no-stdin"]);
                command.arg("--listen").arg(PROXY.to_string()).arg("--statedir").arg(folder.join("state"));
            }
        }
    }
}

impl Run<'_> {
    /// The process that is measured.
    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Waits for the proxy's port, and lets tailscaled log in as soon as it can be told to.
    fn await_proxy(&mut self, host: &Namespace) -> Result<(), Failed> {
        let (start, socket) = (Instant::now(), self.folder.join("socket"));
        let mut bound = false;
        while !bound || (self.contender == Contender::Tailscaled && self.login.is_none()) {
            if !bound && host.inside(|| procfs::listens(PROXY))?? {
                (bound, self.bound) = (true, Instant::now());
            }
            if self.contender == Contender::Tailscaled && self.login.is_none() && socket.exists() {
                let name = format!("{}-up", self.hostname);
                let mut command = self.cli(host);
                command.arg("up").arg(format!("--authkey=file:{}", self.folder.join("key").display()));
                command.arg(format!("--login-server=https://{CONTROL}")).arg(format!("--hostname={}", self.hostname));
                command.args(["--accept-dns=false", "--timeout=40s"]);
                self.login = Some(Process::start(command, &name, &self.bed.folder, false)?);
            }
            if self.process.ended()?.is_some() || start.elapsed() > JOIN {
                return Err(format!("{} has no proxy: {}", self.contender.name(), tail(&self.process.log())).into());
            }
            thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// `tailscale`, to talk to this daemon.
    fn cli(&self, host: &Namespace) -> Command {
        let mut command = host.command(self.bed.peers.join("tailscale"));
        command.env("HOME", &self.folder).arg("--socket").arg(self.folder.join("socket"));
        command
    }

    /// How long the control server took to answer tailcar's register request, and then to begin the map stream.
    pub(crate) fn answers(&self) -> Option<[Duration; 2]> {
        let log = self.process.log();
        let at = |message: &str| {
            let mut lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let line = lines.find(|line| line["msg"] == message)?;
            line["ts"].as_str()?.parse::<jiff::Timestamp>().ok()
        };
        let [asked, registered, open] = ["session with control open", "registered", "map stream open"].map(at);
        let span = |from: jiff::Timestamp, to: jiff::Timestamp| Duration::try_from(to.duration_since(from)).ok();
        Some([span(asked?, registered?)?, span(registered?, open?)?])
    }

    /// Leaves the tailnet as a user would have it leave; how long until the control server no longer listed it.
    ///
    /// # Errors
    /// When the control server cannot be asked.
    pub(crate) fn leave(mut self, host: &Namespace) -> Result<Option<Duration>, Failed> {
        let start = Instant::now();
        let logout = match self.contender {
            Contender::Tailcar | Contender::Meshd => {
                self.process.signal(Signal::TERM);
                None
            }
            Contender::Tailscaled => {
                let mut command = self.cli(host);
                command.arg("logout");
                Some(Process::start(command, &format!("{}-logout", self.hostname), &self.bed.folder, false)?)
            }
        };
        let limit = if self.contender == Contender::Meshd { NO_LOGOUT } else { FORGOTTEN };
        let mut left = None;
        while left.is_none() && start.elapsed() < limit {
            match self.bed.lists(&self.hostname)? {
                false => left = Some(start.elapsed()),
                true => thread::sleep(Duration::from_millis(2)),
            }
        }
        drop(logout);
        if left.is_some() && self.contender != Contender::Tailscaled {
            drop(self.process.wait(Duration::from_secs(5)));
        }
        self.process.end();
        if left.is_none() {
            let id = self.bed.headscale.id(&self.hostname)?;
            self.bed.headscale.cli(&["nodes", "delete", "-i", &id])?;
        }
        Ok(left)
    }
}

/// A logout that has done nothing by then does nothing.
const FORGOTTEN: Duration = Duration::from_secs(8);
/// The same where none is known of.
const NO_LOGOUT: Duration = Duration::from_millis(1500);

/// When the process began to be `program`: before, it is `ip` that enters the namespace.
fn executed(process: &Process, program: &Path) -> Result<Instant, Failed> {
    let start = Instant::now();
    while procfs::program(process.id()).as_deref() != Some(program) {
        if start.elapsed() > Duration::from_secs(5) {
            return Err(format!("{} does not start: {}", program.display(), process.log()).into());
        }
        thread::sleep(Duration::from_micros(50));
    }
    Ok(Instant::now())
}

/// The binary under test: beside this one, unless the caller names another.
fn tailcar() -> PathBuf {
    let beside = || {
        let folder = std::env::current_exe().ok()?.parent()?.parent()?.to_owned();
        Some(folder.join("tailcar"))
    };
    std::env::var_os("TAILCAR_BIN").map(PathBuf::from).or_else(beside).unwrap_or_else(|| "tailcar".into())
}

/// When a browser opens another connection beside one that hangs. Source: Chromium, net/socket,
/// `kMaxConnectRetryIntervalMs`.
pub(crate) const BACKUP: Duration = Duration::from_millis(250);

/// Waits until a run's first byte is there.
///
/// # Errors
/// When it does not come.
pub(crate) fn first_byte(run: &Run<'_>, host: &Namespace, hangs: Duration) -> Result<Instant, Failed> {
    let way = run.way;
    let asked = crate::generator::inside(host, move || way.first_byte(hangs, JOIN));
    asked.map_err(|error| {
        let why = error.message().unwrap_or("").to_owned();
        format!("{}: {why}: {}", run.contender.name(), tail(&run.process.log())).into()
    })
}

/// Waits until the control server lists nobody but the far end.
///
/// # Errors
/// When somebody stays.
pub(crate) fn alone(bed: &Bed) -> Result<(), Failed> {
    until(Duration::from_secs(10), "an empty tailnet", || Ok((!bed.lists_any("bench-")?).then_some(())))
}
