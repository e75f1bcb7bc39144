//! `exec`: one command inside the tailnet, as if the shell had started it, but for its proxy variables.
//!
//! The command is started through ourselves (`tailcar __child`), which asks the kernel to end it when we end, and then
//! becomes it: so the command itself does not outlive us even if we are killed. What it started is ended when it has
//! ended (see [`super::descendants`]); nobody does that once we are killed.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use rustix::process::{Pid, Signal, getpgrp, getppid, kill_process, set_parent_process_death_signal};
use rustix::termios::tcgetpgrp;
use tokio::process::Child;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until};

use super::descendants::Descendants;
use super::environment::NOT_FOR_CHILDREN;
use super::report::{Report, complain};
use super::stops::{ENDING, Stop, Stops};
use crate::fault::{self, Fault};
use crate::lapse::Lapse;

/// The exit status when we failed before the command started.
pub(super) const FAILED_BEFORE: u8 = 125;

/// The hidden command by which we start a child.
const CHILD: &str = "__child";

/// A command that is told to end because the run ends has this long before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// Runs `command` to its end, ends what it leaves behind, and returns its exit status, 128 + n after signal n.
/// `failed` is the node's end, which is said but leaves the command to decide; `idle` ends the run.
///
/// # Errors
/// `TC-2007` when no process can be made.
pub(super) async fn run(
    command: &[OsString],
    report: &Report,
    stops: &mut Stops,
    failed: impl Future<Output = Fault>,
    idle: impl Future<Output = ()>,
) -> Result<u8, Fault> {
    let descendants = Descendants::adopt();
    let mut orphans = signal(SignalKind::child()).map_err(|error| refused("signals", &error))?;
    let mut child = start(command, report.proxy_address())?;
    let mut failed = std::pin::pin!(failed);
    let mut idle = std::pin::pin!(idle);
    let (mut lost, mut kill_at, mut told_to_end, mut remind_at) = (false, None, false, None);
    loop {
        let ending = tokio::select! {
            status = child.wait() => {
                descendants.end().await;
                return status.map(exit_code).map_err(|error| refused("wait", &error));
            }
            _ = orphans.recv() => {
                descendants.reap(pid(&child));
                continue;
            }
            stop = stops.next() => match stop {
                Stop::Signal(signal) => {
                    let ending = ENDING.contains(&signal);
                    pass_on(&child, signal, ending && told_to_end);
                    if ending && !told_to_end {
                        remind_at = Some(Instant::now() + GRACE);
                    }
                    told_to_end |= ending;
                    continue;
                }
                Stop::Parent | Stop::StdinEof | Stop::Lifetime => stop.reason(),
            },
            fault = &mut failed, if !lost => {
                lost = true;
                report.lost(&fault);
                continue;
            }
            () = &mut idle, if kill_at.is_none() => String::from("idle"),
            () = reached(remind_at) => {
                tracing::warn!("the command was told to end {} ago and runs on; a second signal kills it", Lapse(GRACE));
                remind_at = None;
                continue;
            }
            () = reached(kill_at) => {
                tell(&child, Signal::KILL);
                kill_at = None;
                continue;
            }
        };
        tracing::warn!(reason = ending, "the run ends; the command is told to");
        tell(&child, Signal::TERM);
        kill_at = Some(Instant::now() + GRACE);
    }
}

/// Returns at `deadline`; never without one.
async fn reached(deadline: Option<Instant>) {
    match deadline {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Whether the command can be found and executed, before a key is spent on it.
///
/// # Errors
/// `TC-2014` when it is not there, `TC-2013` when it may not be executed.
pub(super) fn check(command: &[OsString]) -> Result<(), Fault> {
    let Some(program) = command.first() else { return Err(Fault::from(&fault::COMMAND_NOT_FOUND)) };
    let candidates: Vec<PathBuf> = if program.as_encoded_bytes().contains(&b'/') {
        vec![PathBuf::from(program)]
    } else {
        let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/local/bin:/usr/bin:/bin"));
        std::env::split_paths(&path).map(|folder| folder.join(program)).collect()
    };
    if candidates.iter().any(|path| executable(path)) {
        return Ok(());
    }
    let name = Path::new(program).display();
    if candidates.iter().any(|path| path.exists()) {
        return Err(Fault::new(&fault::NOT_EXECUTABLE, format!("{name} is not an executable file")));
    }
    Err(Fault::new(&fault::COMMAND_NOT_FOUND, format!("{name} was not found")))
}

fn executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

/// Called on the main thread, which lives as long as the process: the kernel's promise to the child is bound to the
/// thread that started it.
fn start(command: &[OsString], proxy: SocketAddr) -> Result<Child, Fault> {
    let ourselves = std::env::current_exe().map_err(|error| refused("own path", &error))?;
    let mut child = Command::new(ourselves);
    child.arg(CHILD).arg(std::process::id().to_string()).arg("--").args(command);
    for name in NOT_FOR_CHILDREN {
        child.env_remove(name);
    }
    child.envs(variables(proxy));
    tokio::process::Command::from(child).kill_on_drop(true).spawn().map_err(|error| refused("spawn", &error))
}

/// The variables by which programs find a proxy. Loopback stays direct: the proxy would refuse it.
fn variables(proxy: SocketAddr) -> Vec<(&'static str, String)> {
    let (http, socks5) = (format!("http://{proxy}"), format!("socks5h://{proxy}"));
    let direct = String::from("localhost,127.0.0.1,::1");
    let mut variables = vec![
        ("TAILCAR_PROXY", proxy.to_string()),
        ("TAILCAR_HTTP_PROXY", http.clone()),
        ("TAILCAR_SOCKS5_PROXY", socks5.clone()),
    ];
    for names in [["HTTP_PROXY", "http_proxy"], ["HTTPS_PROXY", "https_proxy"]].as_flattened() {
        variables.push((names, http.clone()));
    }
    variables.extend(["ALL_PROXY", "all_proxy"].map(|name| (name, socks5.clone())));
    variables.extend(["NO_PROXY", "no_proxy"].map(|name| (name, direct.clone())));
    variables
}

/// The parent and the command of `tailcar __child PARENT -- CMD`, which no help mentions: it is for ourselves.
pub(super) fn child_words(words: &[OsString]) -> Option<(i32, &[OsString])> {
    match words {
        [_, name, parent, dashes, command @ ..] if name == CHILD && dashes == "--" => {
            Some((parent.to_str()?.parse().ok()?, command))
        }
        _ => None,
    }
}

/// `tailcar __child`: becomes `command`, which dies with `parent`. Returns only what went wrong.
pub(super) fn become_child(parent: i32, command: &[OsString]) -> u8 {
    let fault = replace(parent, command);
    complain(&fault);
    fault.row.exit
}

fn replace(parent: i32, command: &[OsString]) -> Fault {
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return refused("death signal", &error.into());
    }
    // Whoever died before the line above took effect would not be noticed.
    if getppid().map(Pid::as_raw_pid) != Some(parent) {
        return Fault::new(&fault::OS_REFUSED, "our parent ended before the command started");
    }
    let (program, words) = command.split_first().map_or((OsStr::new(""), &[][..]), |(first, rest)| (first, rest));
    let error = Command::new(program).args(words).exec();
    let row = if error.kind() == io::ErrorKind::NotFound { &fault::COMMAND_NOT_FOUND } else { &fault::NOT_EXECUTABLE };
    Fault::new(row, format!("{}: {error}", Path::new(program).display()))
}

fn tell(child: &Child, signal: Signal) {
    if let Some(Err(error)) = pid(child).map(|pid| kill_process(pid, signal)) {
        tracing::debug!(%error, "the command could not be told");
    }
}

fn pid(child: &Child) -> Option<Pid> {
    child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw)
}

/// Passes a signal on, which the command may heed as it likes; the second one that asks for its end kills it.
fn pass_on(child: &Child, signal: Signal, kills: bool) {
    if kills {
        tracing::warn!("a second signal; the command is killed");
        tell(child, Signal::KILL);
    } else if !terminal_sends(signal) {
        tell(child, signal);
    }
}

/// Whether the terminal has sent this signal to the command too: Ctrl-C reaches the whole foreground group, and some
/// programs take a second one as "at once".
fn terminal_sends(signal: Signal) -> bool {
    matches!(signal, Signal::INT | Signal::QUIT)
        && File::open("/dev/tty").is_ok_and(|terminal| tcgetpgrp(terminal).is_ok_and(|group| group == getpgrp()))
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(i32::from(FAILED_BEFORE));
    u8::try_from(code).unwrap_or(u8::MAX)
}

fn refused(what: &str, error: &io::Error) -> Fault {
    Fault::new(&fault::OS_REFUSED, format!("cannot start the command: {what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn a_command_is_looked_for_before_the_start() {
        assert!(check(&words("sh -c true")).is_ok() && check(&words("/bin/sh")).is_ok());
        assert_eq!(check(&words("no-such-command-at-all")).unwrap_err().row.exit, 127);
        assert_eq!(check(&words("/etc/passwd")).unwrap_err().row.exit, 126);
        assert_eq!(check(&words("/etc")).unwrap_err().row.exit, 126);
    }

    #[test]
    fn the_child_gets_the_proxy_in_both_cases() {
        let variables = variables("127.0.0.1:1080".parse().unwrap());
        let value = |name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.as_str());
        assert_eq!(value("HTTPS_PROXY"), Some("http://127.0.0.1:1080"));
        assert_eq!(value("all_proxy"), Some("socks5h://127.0.0.1:1080"));
        assert_eq!(value("TAILCAR_PROXY"), Some("127.0.0.1:1080"));
        assert_eq!((value("NO_PROXY"), value("http_proxy").is_some()), (Some("localhost,127.0.0.1,::1"), true));
    }

    #[test]
    fn exit_codes_pass_and_signals_add_128() {
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
    }
}
