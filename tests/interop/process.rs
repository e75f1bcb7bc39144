//! The bed's processes: started with a log file each, awaited with a deadline, ended by pid.
//!
//! Every process leads its own group, so that a browser's children go with it and a Ctrl-C at the
//! terminal reaches only the test process, which then ends them itself in order. An end is first only
//! looked at: until `Process::end` reaps the leader, its id is nobody else's and may be signalled.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};

use crate::namespace::Namespace;

/// Group leaders that are not reaped, for the exits that skip `Drop`.
static UNREAPED: Mutex<Vec<Leader>> = Mutex::new(Vec::new());

/// How often an awaited condition is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// The first process of a group, which has its id.
#[derive(Debug)]
struct Leader {
    id: u32,
    /// The namespace of the scenario that it ends with; empty when it outlives scenarios.
    host: String,
}

/// A running program and where its output goes. Dropping it kills its group.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    name: String,
    log: PathBuf,
    ended: Option<ExitStatus>,
    reaped: bool,
}

impl Process {
    /// Starts `command`; its stderr, and its stdout unless the caller piped it, go to `NAME.log` in `folder`.
    ///
    /// # Errors
    /// Those of making the log and of starting.
    pub(crate) fn start(mut command: Command, name: &str, folder: &Path, piped: bool) -> io::Result<Self> {
        use std::os::unix::process::CommandExt as _;
        let log = folder.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        if piped {
            command.stdout(Stdio::piped());
        } else {
            command.stdout(file.try_clone()?);
        }
        command.stderr(file).process_group(0);
        let child = command.spawn().map_err(|error| io::Error::other(format!("{name}: {error}")))?;
        locked(&UNREAPED).push(Leader { id: child.id(), host: String::new() });
        Ok(Self { child, name: name.to_owned(), log, ended: None, reaped: false })
    }

    /// Marks it as one that ends with the scenario of `host`, in time or not.
    pub(crate) fn transient(self, host: &Namespace) -> Self {
        if let Some(leader) = locked(&UNREAPED).iter_mut().find(|leader| leader.id == self.child.id()) {
            host.name().clone_into(&mut leader.host);
        }
        self
    }

    /// The pid; `ip netns exec` becomes the program that it starts.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child itself, for its pipes.
    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// All it has written to its log so far.
    pub(crate) fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Sends it a signal; one that is gone already is no error.
    pub(crate) fn signal(&self, signal: Signal) {
        if !self.reaped
            && let Some(pid) = pid(self.child.id())
        {
            let _ = kill_process(pid, signal);
        }
    }

    /// Its exit status, once it has ended. If that was by itself, it stays unreaped.
    ///
    /// # Errors
    /// Those of waiting for a child.
    pub(crate) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        use std::os::unix::process::ExitStatusExt as _;
        if self.ended.is_none()
            && let Some(pid) = pid(self.child.id())
        {
            let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
            let status = waitid(WaitId::Pid(pid), look)?;
            // Source: wait(2) as Linux encodes it: the code in the second octet, a signal in the first.
            let code = |status: rustix::process::WaitIdStatus| {
                status.exit_status().map(|code| code << 8).or(status.terminating_signal())
            };
            self.ended = status.and_then(code).map(ExitStatus::from_raw);
        }
        Ok(self.ended)
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// When it has not ended within `limit`; it goes on then.
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<ExitStatus, Failed> {
        let what = format!("the end of {}", self.name);
        until(limit, &what, || Ok(self.ended()?))
    }

    /// Waits until its log has a line that contains `text`.
    ///
    /// # Errors
    /// When it ends first, or `limit` passes.
    pub(crate) fn says(&mut self, text: &str, limit: Duration) -> Result<String, Failed> {
        let what = format!("{} to say {text:?}", self.name);
        until(limit, &what, || {
            if let Some(line) = self.log().lines().find(|line| line.contains(text)) {
                return Ok(Some(line.to_owned()));
            }
            match self.ended()? {
                Some(status) => Err(format!("{} ended with {status}: {}", self.name, tail(&self.log())).into()),
                None => Ok(None),
            }
        })
    }

    /// Kills it with its group and reaps it.
    pub(crate) fn end(&mut self) {
        if self.reaped {
            return;
        }
        let id = self.child.id();
        // Before it is reaped: what is in the list may be signalled at any time.
        locked(&UNREAPED).retain(|leader| leader.id != id);
        kill_group(id);
        self.ended = self.child.wait().ok();
        self.reaped = true;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// Kills every group that is still there.
pub(crate) fn end_all() {
    locked(&UNREAPED).iter().for_each(|leader| kill_group(leader.id));
}

/// Kills the groups of a host's scenario that has run out of time, so that what waits for them goes on.
pub(crate) fn end_transient(host: &Namespace) {
    locked(&UNREAPED).iter().filter(|leader| leader.host == host.name()).for_each(|leader| kill_group(leader.id));
}

fn kill_group(id: u32) {
    if let Some(group) = pid(id) {
        let _ = kill_process_group(group, Signal::KILL);
    }
}

/// SIGINT and SIGTERM take the bed down before they end us.
pub(crate) fn end_on_signals(take_down: fn()) {
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let Ok(runtime) = runtime else { return };
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            take_down();
            std::process::exit(130);
        });
    });
}

/// Looks at a condition until it holds.
///
/// # Errors
/// What the condition fails with, or `limit` with the name of what was awaited.
pub(crate) fn until<T>(
    limit: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<Option<T>, Failed>,
) -> Result<T, Failed> {
    let start = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if start.elapsed() > limit {
            return Err(format!("waited {limit:?} in vain for {what}").into());
        }
        thread::sleep(LOOK);
    }
}

/// How often dnsmasq's log has it that a name was asked for, whatever the type.
pub(crate) fn queries(dnsmasq: &Process, name: &str) -> usize {
    let wanted = format!("] {name} from");
    dnsmasq.log().lines().filter(|line| line.contains("query[") && line.contains(&wanted)).count()
}

/// The same for every name under a suffix, the suffix itself too.
pub(crate) fn queries_under(dnsmasq: &Process, suffix: &str) -> usize {
    let log = dnsmasq.log();
    let names = log.lines().filter(|line| line.contains("query[")).filter_map(|line| line.split_once("] "));
    let names = names.filter_map(|(_, rest)| rest.split_once(" from")).map(|(name, _)| name);
    names.filter(|name| name.strip_suffix(suffix).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))).count()
}

/// Runs a short command to its end; its stdout.
///
/// # Errors
/// Its complaint, when it fails.
pub(crate) fn output(mut command: Command) -> Result<String, Failed> {
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("{command:?}: {}: {text}{complaint}", output.status).into())
}

/// The last lines of a log, enough to see why something ended.
pub(crate) fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(25)..].join("\n")
}

fn pid(id: u32) -> Option<Pid> {
    i32::try_from(id).ok().and_then(Pid::from_raw)
}

fn locked(list: &Mutex<Vec<Leader>>) -> MutexGuard<'_, Vec<Leader>> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}
