//! What a command leaves behind: processes that it started and that outlive it.
//!
//! As a child subreaper (prctl(2), `PR_SET_CHILD_SUBREAPER`) we inherit every orphan below us, so that nothing escapes
//! by a double fork. That needs us alive: when we are killed ourselves, the kernel ends the command alone.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid};
use tokio::time::{Instant, sleep};

/// Processes that outlive the command are asked to end, and have this long before they are killed.
const ASKED: Duration = Duration::from_secs(2);

/// Even a killed process may hang in the kernel; we wait no longer for it.
const KILLED: Duration = Duration::from_secs(1);

/// How often the processes that are to end are looked at.
const LOOK: Duration = Duration::from_millis(20);

/// The processes below us, but for those that were there before: a shell that became us left its jobs.
#[derive(Debug)]
pub(super) struct Descendants {
    before: HashSet<Pid>,
}

/// One process, as `/proc/PID/stat` has it.
struct Process {
    pid: Pid,
    parent: Option<Pid>,
    zombie: bool,
}

impl Descendants {
    /// Becomes the parent of all orphans to come.
    pub(super) fn adopt() -> Self {
        if let Err(error) = set_child_subreaper(Some(getpid())) {
            tracing::warn!(%error, "what the command starts may outlive it");
        }
        Self { before: children_of(getpid(), &processes()).map(|child| child.pid).collect() }
    }

    /// Takes note of the orphans that have ended, else they stay as zombies. `command` is left to its own waiter.
    pub(super) fn reap(&self, command: Option<Pid>) {
        for zombie in children_of(getpid(), &processes()).filter(|child| child.zombie && Some(child.pid) != command) {
            // Somebody else may have waited for it meanwhile.
            let _ = waitpid(Some(zombie.pid), WaitOptions::NOHANG);
        }
    }

    /// Ends everything below us, within about 3 s.
    pub(super) async fn end(self) {
        for (signal, patience) in [(Signal::TERM, ASKED), (Signal::KILL, KILLED)] {
            let until = Instant::now() + patience;
            let mut told = HashSet::new();
            loop {
                self.reap(None);
                let left = self.alive();
                if left.is_empty() {
                    return;
                }
                for pid in left {
                    if told.insert(pid) {
                        tracing::debug!(pid = pid.as_raw_pid(), ?signal, "a process outlives the command");
                        // It may have ended meanwhile, or belong to another user.
                        let _ = kill_process(pid, signal);
                    }
                }
                if Instant::now() >= until {
                    break;
                }
                sleep(LOOK).await;
            }
        }
        tracing::warn!(left = self.alive().len(), "processes of the command outlive us");
    }

    /// Everything below us that runs.
    fn alive(&self) -> Vec<Pid> {
        let processes = processes();
        let (mut alive, mut parents) = (Vec::new(), vec![getpid()]);
        while let Some(parent) = parents.pop() {
            for child in children_of(parent, &processes).filter(|child| !self.before.contains(&child.pid)) {
                parents.push(child.pid);
                if !child.zombie {
                    alive.push(child.pid);
                }
            }
        }
        alive
    }
}

fn children_of(parent: Pid, processes: &[Process]) -> impl Iterator<Item = &Process> {
    processes.iter().filter(move |process| process.parent == Some(parent))
}

/// Every process that can be seen; none where `/proc` is another namespace's, whose numbers mean others.
fn processes() -> Vec<Process> {
    let own = getpid().as_raw_pid().to_string();
    if !fs::read_link("/proc/self").is_ok_and(|link| link == Path::new(&own)) {
        return Vec::new();
    }
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| process(&fs::read_to_string(entry.path().join("stat")).ok()?)).collect()
}

/// `PID (NAME) STATE PARENT …`, whose name may hold anything (proc_pid_stat(5)).
fn process(stat: &str) -> Option<Process> {
    let (pid, rest) = stat.split_once(" (")?;
    let (_, rest) = rest.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let zombie = matches!(fields.next()?, "Z" | "X");
    let number = |text: &str| text.parse().ok().and_then(Pid::from_raw);
    Some(Process { pid: number(pid)?, parent: number(fields.next()?), zombie })
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// Set in the process that plays our part: a subreaper would take the orphans of other tests.
    const ALONE: &str = "TAILCAR_TEST_DESCENDANTS";

    #[tokio::test]
    async fn what_outlives_the_command_is_ended_and_what_was_there_before_is_not() {
        if std::env::var_os(ALONE).is_none() {
            let name = "cli::descendants::tests::what_outlives_the_command_is_ended_and_what_was_there_before_is_not";
            let mut alone = Command::new(std::env::current_exe().unwrap());
            let ended = alone.args(["--exact", name]).env(ALONE, "1").stdin(Stdio::null()).output().unwrap();
            assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stdout));
            return;
        }
        let mut before = Command::new("sleep").arg("600").spawn().unwrap();
        let descendants = Descendants::adopt();
        // One orphan obeys, one does not, one has a child of its own, one has ended.
        let script = "sleep 600 & (trap '' TERM; sleep 600; sleep 600) & (sleep 600; :) & true & exit 0";
        Command::new("sh").args(["-c", script]).status().unwrap();
        assert!(descendants.alive().len() >= 3);
        let started = Instant::now();
        let again = Descendants { before: descendants.before.clone() };
        descendants.end().await;
        assert!(again.alive().is_empty() && started.elapsed() < ASKED + KILLED);
        assert!(before.try_wait().unwrap().is_none(), "an older job was ended too");
        assert_eq!(children_of(getpid(), &processes()).count(), 1, "a zombie stays");
        before.kill().unwrap();
        before.wait().unwrap();
    }

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let it = process("42 (a) Z (b) 7 (c) S 41 42 42 0").unwrap();
        assert_eq!((it.pid.as_raw_pid(), it.parent.map(Pid::as_raw_pid), it.zombie), (42, Some(41), false));
        assert!(process("1 (init) Z 0 1").unwrap().zombie && process("1 (init) Z 0 1").unwrap().parent.is_none());
        assert!(["", "x", "1 (a", "1 (a) S", "x (a) S 1"].iter().all(|text| process(text).is_none()));
    }
}
