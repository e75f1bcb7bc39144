//! Network namespaces: the bed's hosts, and the wires between them.
//!
//! A name carries the pid of the test process, so that two runs on one machine never meet and a
//! later run can tell which leftovers have no owner any more. Each namespace has its own
//! resolv.conf before anything starts in it: a peer that rewrites it rewrites its own.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// What every namespace of every bed begins with; the owner's pid follows.
const PREFIX: &str = "tcbed";
const NETNS: &str = "/run/netns";
const ETC: &str = "/etc/netns";

/// Where programs inside are looked for.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// One host of the bed. Dropping it removes it; its processes must be gone by then.
#[derive(Debug)]
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes the namespace for `role`, with its loopback up and `resolver` as its only resolver.
    ///
    /// # Errors
    /// When `ip` refuses, which it does without `CAP_SYS_ADMIN`.
    pub(crate) fn create(role: &str, resolver: &str) -> io::Result<Self> {
        let name = format!("{PREFIX}{}-{role}", std::process::id());
        let etc = Path::new(ETC).join(&name);
        fs::create_dir_all(&etc)?;
        fs::write(etc.join("resolv.conf"), format!("nameserver {resolver}\n"))?;
        let namespace = Self { name };
        ip(None, &format!("netns add {}", namespace.name))?;
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The name that `ip netns` knows it by.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Runs lines of `ip` commands inside.
    ///
    /// # Errors
    /// With what `ip` said, at the first line that fails.
    pub(crate) fn ip(&self, lines: &str) -> io::Result<()> {
        ip(Some(&self.name), lines)
    }

    /// A command that will run inside, with an environment of nothing but a search path.
    ///
    /// The caller's own proxy variables would be honoured by peers, for control and DERP too.
    pub(crate) fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program.as_ref());
        command.env_clear().env("PATH", PATH);
        command.stdin(Stdio::null());
        command
    }

    /// Does `work` on a thread that lives inside; sockets that it makes stay inside for good.
    ///
    /// # Errors
    /// Those of entering; `work` has its own.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let entrance = File::open(Path::new(NETNS).join(&self.name))?;
        thread::scope(|scope| {
            let worker = scope.spawn(move || {
                move_into_link_name_space(entrance.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok(work())
            });
            worker.join().unwrap_or_else(|_| Err(io::Error::other("the thread inside panicked")))
        })
    }

    /// Sets one of the namespace's own network settings, by its path below `/proc/sys/net`.
    ///
    /// # Errors
    /// Those of writing the file.
    pub(crate) fn set(&self, setting: &str, value: &str) -> io::Result<()> {
        let path = PathBuf::from("/proc/sys/net").join(setting);
        self.inside(|| fs::write(&path, value))?
    }

    /// Loads nftables rules inside.
    ///
    /// # Errors
    /// With what `nft` said.
    pub(crate) fn nft(&self, rules: &str) -> io::Result<()> {
        let mut command = self.command("nft");
        command.args(["-f", "-"]);
        feed(command, rules).map(drop)
    }

    /// Lists something as nftables' JSON: `what` is the rest of `nft -j list`.
    ///
    /// # Errors
    /// With what `nft` said.
    pub(crate) fn nft_list(&self, what: &str) -> io::Result<serde_json::Value> {
        let mut command = self.command("nft");
        command.args(["-j", "list"]).args(what.split(' '));
        Ok(serde_json::from_str(&feed(command, "")?)?)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Joins two namespaces by a cable, one end each, both up.
///
/// # Errors
/// With what `ip` said.
pub(crate) fn cable(one: (&Namespace, &str), other: (&Namespace, &str)) -> io::Result<()> {
    let line =
        format!("link add {} netns {} type veth peer name {} netns {}", one.1, one.0.name, other.1, other.0.name);
    ip(None, &line)?;
    one.0.ip(&format!("link set {} up", one.1))?;
    other.0.ip(&format!("link set {} up", other.1))
}

/// Removes this process's namespaces and ends what still runs in them. For exits that skip `Drop`.
pub(crate) fn remove_ours() {
    for (name, owner) in existing() {
        if owner == std::process::id() {
            end_processes(&name);
            remove(&name);
        }
    }
}

/// Removes what runs that are no longer alive left behind.
pub(crate) fn sweep() {
    for (name, owner) in existing() {
        if !alive(owner) {
            end_processes(&name);
            remove(&name);
        }
    }
}

/// Whether a process of that id runs; one that has ended and is not yet reaped does not.
pub(crate) fn alive(pid: u32) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    state.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// The namespaces of all beds on this machine, with the pids in their names.
fn existing() -> Vec<(String, u32)> {
    let mut found = Vec::new();
    for folder in [NETNS, ETC] {
        let Ok(entries) = fs::read_dir(folder) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')).map(|(pid, _)| pid.parse());
            if let Some(Ok(pid)) = owner {
                found.push((name, pid));
            }
        }
    }
    found
}

/// Kills the processes of a namespace that a test process made: nothing else can be in it.
fn end_processes(name: &str) {
    let Ok(output) = Command::new("ip").args(["netns", "pids", name]).output() else { return };
    for pid in String::from_utf8_lossy(&output.stdout).split_whitespace() {
        let pid = pid.parse().ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

fn remove(name: &str) {
    drop(Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status());
    drop(fs::remove_dir_all(Path::new(ETC).join(name)));
}

fn ip(namespace: Option<&str>, lines: &str) -> io::Result<()> {
    let mut command = Command::new("ip");
    if let Some(name) = namespace {
        command.args(["-n", name]);
    }
    command.args(["-batch", "-"]);
    feed(command, lines).map(drop)
}

/// Runs a short command with `input`; its output, or an error with what it complained of.
fn feed(mut command: Command, input: &str) -> io::Result<String> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(io::Error::other(format!("{command:?} of {input:?}: {complaint}")))
}
