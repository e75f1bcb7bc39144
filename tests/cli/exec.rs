//! `exec` as far as it goes without a tailnet: what it refuses, and how its child is bound to us.

use std::fs;
use std::process::Command;

use crate::fake::{closed_port, no_control_server};
use crate::program::{KEY, Program, await_some, binary};

#[test]
fn a_failure_before_the_command_starts_exits_125() {
    let words = format!("exec -o json --login-server http://{} -- true", no_control_server());
    Program::new(&words).env("TS_AUTHKEY", KEY).run().refused(125, "TC-1105");
}

#[test]
fn a_command_that_is_not_there_is_told_before_a_key_is_spent() {
    let exec = |command: &str| Program::new(&format!("exec -o json -- {command}")).env("TS_AUTHKEY", KEY).run();
    exec("no-such-command-anywhere").refused(127, "TC-2014");
    exec("/etc/passwd").refused(126, "TC-2013");
}

#[test]
fn a_signal_before_the_command_starts_exits_as_if_it_had_met_the_command() {
    let folder = tempfile::tempdir().unwrap();
    let (pidfile, status) = (folder.path().join("pid"), folder.path().join("status"));
    let files = format!("--pidfile {} --status-file {}", pidfile.display(), status.display());
    let words = format!("exec --login-server http://{} {files} -- true", closed_port());
    let running = Program::new(&words).env("TS_AUTHKEY", KEY).start();
    await_some("the pid file", || pidfile.exists().then_some(()));
    running.signal("TERM");
    let ended = running.end();
    assert_eq!(ended.code(), 143);
    // No command has exited with anything.
    let reason = "signal SIGTERM before the command was started";
    assert!(ended.stderr.contains(&format!("ended    {reason}, logout")), "{}", ended.stderr);
    let status: serde_json::Value = serde_json::from_str(&fs::read_to_string(status).unwrap()).unwrap();
    assert_eq!((&status["reason"], &status["exit"]), (&reason.into(), &143.into()));
}

#[test]
fn the_child_process_becomes_the_command() {
    let child = |script: &str| {
        let words = format!("__child {} -- sh -c", std::process::id());
        Program::new(&words).arg(script).run()
    };
    let ended = child("echo out; echo err >&2; exit 7");
    assert_eq!((ended.code(), ended.stdout.as_str(), ended.stderr.as_str()), (7, "out\n", "err\n"));
    // A pipe whose reader went away ends a command quietly, as under any shell.
    assert_eq!(child("kill -PIPE $$").code(), -1);
    let words = format!("__child {} -- no-such-command-anywhere", std::process::id());
    assert_eq!(Program::new(&words).run().code(), 127);
}

#[test]
fn the_child_does_not_outlive_its_parent() {
    let folder = tempfile::tempdir().unwrap();
    let pid = folder.path().join("pid");
    let script = format!(
        "{} __child $$ -- sh -c 'echo $$ > {}; exec sleep 600' & while :; do sleep 1; done",
        binary().display(),
        pid.display(),
    );
    let mut parent = Command::new("sh").args(["-c", &script]).spawn().unwrap();
    let child = await_some("the child", || fs::read_to_string(&pid).ok()?.trim().parse::<u32>().ok());
    let name = |pid: u32| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    await_some("the child's command", || name(child).contains("(sleep)").then_some(()));
    parent.kill().unwrap();
    parent.wait().unwrap();
    // Gone, or a zombie that waits for its new parent.
    await_some("the child's end", || (!name(child).contains("(sleep)") || name(child).contains(") Z ")).then_some(()));
}
