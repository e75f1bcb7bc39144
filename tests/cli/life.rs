//! A run's life: its files, its early connections, and every way to end it.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::fake::{no_control_server, serve};
use crate::program::{KEY, Program, Running, await_some, binary};

/// A run that waits for a silent control server, with its files in a folder of its own.
struct Waiting {
    running: Running,
    folder: tempfile::TempDir,
}

impl Waiting {
    fn start(words: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name).display().to_string();
        let line = format!(
            "run --login-server http://{} --status-file {} --ready-file {} --pidfile {} {words}",
            silent(),
            file("status"),
            file("ready"),
            file("pid"),
        );
        let running = Program::new(&line).env("TS_AUTHKEY", KEY).start();
        let waiting = Self { running, folder };
        await_some("the first status", || waiting.path("status").exists().then_some(()));
        waiting
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn status(&self) -> Value {
        status(&self.path("status"))
    }
}

fn status(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn silent() -> std::net::SocketAddr {
    serve(|mut stream| drop(stream.read_to_end(&mut Vec::new())))
}

#[test]
fn the_status_says_what_is_waited_for_and_the_ready_file_is_not_there() {
    let waiting = Waiting::start("--metadata job=e2e --run-id r9");
    let status = waiting.status();
    assert_eq!((&status["state"], &status["run_id"]), (&"joining".into(), &"r9".into()));
    assert_eq!(
        (&status["labels"]["job"], status["pid"].as_u64()),
        (&"e2e".into(), Some(waiting.running.child.id().into()))
    );
    assert_eq!(fs::read_to_string(waiting.path("pid")).unwrap().trim(), waiting.running.child.id().to_string());
    assert!(!waiting.path("ready").exists());
}

#[test]
fn sigterm_and_sigint_end_a_run_with_0() {
    for signal in ["TERM", "INT", "HUP"] {
        let waiting = Waiting::start("");
        waiting.running.signal(signal);
        let Waiting { running, folder } = waiting;
        let ended = running.end();
        assert_eq!(ended.code(), 0, "{ended:?}");
        assert!(ended.took < Duration::from_secs(5), "{ended:?}");
        let status = status(&folder.path().join("status"));
        assert_eq!((&status["state"], &status["reason"]), (&"ended".into(), &format!("signal SIG{signal}").into()));
        assert!(!folder.path().join("pid").exists(), "the pid file stays");
    }
}

#[test]
fn a_signal_while_the_key_is_awaited_ends_a_run_with_0() {
    for words in ["--auth-key -", "--auth-key-fd 0"] {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let files = format!("--pidfile {} --status-file {}", path("pid").display(), path("status").display());
        let mut running = Program::new(&format!("run {words} {files}")).start();
        let silent = running.child.stdin.take();
        await_some("the pid file", || path("pid").exists().then_some(()));
        running.signal("TERM");
        let ended = running.end();
        drop(silent);
        assert_eq!(ended.code(), 0, "{ended:?}");
        assert!(!path("pid").exists(), "the pid file stays");
        let status = status(&path("status"));
        assert_eq!((&status["state"], &status["logout"]), (&"ended".into(), &"not needed".into()));
    }
}

#[test]
fn the_keys_line_and_the_end_of_standard_input_do_not_meet() {
    let words = format!("run --auth-key - --exit-on-stdin-eof --login-server http://{}", silent());
    let mut running = Program::new(&words).stdin(&format!("{KEY}\n")).start();
    std::thread::sleep(Duration::from_millis(300));
    assert!(running.child.try_wait().unwrap().is_none(), "it ended while standard input is open");
    drop(running.child.stdin.take());
    assert_eq!(running.end().code(), 0);
}

#[test]
fn the_end_of_standard_input_ends_a_run_that_was_asked_to() {
    let mut waiting = Waiting::start("--exit-on-stdin-eof");
    drop(waiting.running.child.stdin.take());
    let ended = waiting.running.end();
    assert_eq!(ended.code(), 0, "{ended:?}");
}

#[test]
fn a_lifetime_that_ends_before_the_node_is_ready_is_a_failure() {
    let waiting = Waiting::start("--max-lifetime 200ms");
    let folder = waiting.folder;
    assert_eq!(waiting.running.end().code(), 75);
    let status = status(&folder.path().join("status"));
    assert_eq!((&status["state"], &status["code"]), (&"failed".into(), &"TC-2001".into()));
}

#[test]
fn a_run_ends_with_its_parent_if_asked() {
    let folder = tempfile::tempdir().unwrap();
    let pidfile = folder.path().join("pid");
    let script = format!(
        "{} run --exit-with-parent --login-server http://{} --pidfile {} & while :; do sleep 1; done",
        binary().display(),
        silent(),
        pidfile.display(),
    );
    let mut shell =
        Command::new("sh").args(["-c", &script]).env("TS_AUTHKEY", KEY).stderr(Stdio::null()).spawn().unwrap();
    let pid = await_some("the pid file", || fs::read_to_string(&pidfile).ok()?.trim().parse::<u32>().ok());
    shell.kill().unwrap();
    shell.wait().unwrap();
    await_some("its end", || (!pidfile.exists()).then_some(()));
    await_some("its process to be gone", || (!is_running(pid)).then_some(()));
}

fn is_running(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "tailcar")
}

#[test]
fn an_early_connection_is_held_and_then_answered_in_its_own_protocol() {
    let waiting = Waiting::start("--hold-timeout 300ms");
    let address = waiting.status()["proxy"]["listeners"][0].as_str().unwrap().to_owned();
    let ask = |request: &[u8]| {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(request).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer
    };
    let http =
        String::from_utf8_lossy(&ask(b"CONNECT git.corp:443 HTTP/1.1\r\nHost: git.corp:443\r\n\r\n")).into_owned();
    assert!(http.starts_with("HTTP/1.1 503 "), "{http}");
    assert!(http.to_ascii_lowercase().contains("x-tailcar-error: tc-1111"), "{http}");
    assert!(http.to_ascii_lowercase().contains("retry-after:"), "{http}");
    let socks = ask(b"\x05\x01\x00\x05\x01\x00\x01\x64\x40\x00\x02\x00\x50");
    assert_eq!(&socks[..4], [5, 0, 5, 1], "{socks:?}");
}

#[test]
fn a_failed_run_leaves_its_failure_in_the_status_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("status");
    let words = format!("run --login-server http://{} --status-file {}", no_control_server(), file.display());
    let ended = Program::new(&words).env("TS_AUTHKEY", KEY).run();
    assert_eq!(ended.code(), 76);
    let status = status(&file);
    assert_eq!(
        (&status["state"], &status["code"], &status["retryable"]),
        (&"failed".into(), &"TC-1105".into(), &false.into())
    );
    assert_eq!(ended.stdout, "", "without --output json, standard output is for nobody");
}
