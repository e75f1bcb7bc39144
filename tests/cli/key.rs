//! The auth key: every wrong one has its own code, and no output repeats it.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use crate::fake::{closed_port, no_control_server, serve};
use crate::program::{Ended, KEY, Program, SECRET, await_some, binary};

fn with_file(text: &str) -> Ended {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    Program::new("run --output json --auth-key").arg(format!("file:{}", file.path().display())).run()
}

#[test]
fn an_empty_key_is_told() {
    with_file("").refused(65, "TC-1001");
    with_file(" \n\n").refused(65, "TC-1001");
    Program::new("run -o json").env("TS_AUTHKEY", "").run().refused(65, "TC-1001");
    Program::new("run -o json --auth-key -").stdin("\n").run().refused(65, "TC-1001");
}

#[test]
fn a_garbled_key_is_told() {
    with_file(&format!("{KEY} {KEY}")).refused(65, "TC-1002");
    with_file(&format!("TS_AUTHKEY=\u{7f}{KEY}")).refused(65, "TC-1002");
    Program::new("run -o json").env("TS_AUTH_KEY", "tskey-auth-a b-geheimgeheimgeheim").run().refused(65, "TC-1002");
}

#[test]
fn another_kind_of_secret_is_told() {
    with_file(&format!("tskey-api-{SECRET}")).refused(65, "TC-1003");
    with_file(&format!("hskey-api-{SECRET}")).refused(65, "TC-1003");
}

#[test]
fn an_unknown_form_is_told() {
    with_file(SECRET).refused(65, "TC-1004");
    with_file(&SECRET.repeat(1_000)).refused(65, "TC-1004");
}

#[test]
fn a_missing_file_and_an_unreadable_one_are_told_apart() {
    Program::new("run -o json --auth-key file:/nowhere/key").run().refused(66, "TC-1005");
    Program::new("run -o json").env("TS_AUTHKEY_FILE", "/nowhere/key").run().refused(66, "TC-1005");
    Program::new("run -o json --auth-key file:/").run().refused(66, "TC-1006");
    Program::new("run -o json --auth-key-fd 77").run().refused(66, "TC-1006");
}

#[test]
fn a_silent_source_is_left_at_its_limit() {
    let ended = Program::new("run -o json --join-timeout 300ms --auth-key -").start();
    let json = await_end(ended);
    assert!(json.took.as_secs() < 10);
    json.refused(66, "TC-1006");
}

/// Ends with standard input still open.
fn await_end(mut running: crate::program::Running) -> Ended {
    let stdin = running.child.stdin.take();
    let ended = running.end();
    drop(stdin);
    ended
}

#[test]
fn a_key_on_the_command_line_is_refused_wherever_it_stands() {
    for words in [
        format!("run -o json --auth-key {KEY}"),
        format!("run -o json --auth-key={KEY}"),
        format!("run -o json --authkey {}{}", "0123456789abcdef".repeat(2), SECRET),
        format!("run -o json {KEY}"),
        format!("run -o json --auth-kye={KEY}"),
        format!("run -o json --hostname {KEY}"),
        format!("exec -o json --auth-key {KEY} -- true"),
    ] {
        Program::new(&words).run().refused(64, "TC-1007");
    }
    let extra = format!("--auth-key={KEY}");
    Program::new("run -o json").env("TS_EXTRA_ARGS", &extra).run().refused(64, "TC-1007");
}

#[test]
fn no_key_at_all_is_told() {
    Program::new("run -o json").run().refused(64, "TC-1008");
}

#[test]
fn the_variable_is_gone_from_the_environment_while_we_run() {
    let folder = tempfile::tempdir().unwrap();
    let pidfile = folder.path().join("pid");
    let running = Program::new(&format!("run --login-server http://{} --pidfile", closed_port()))
        .arg(&pidfile)
        .env("TS_AUTHKEY", KEY)
        .start();
    await_some("the pid file", || pidfile.exists().then_some(()));
    let seen = |name: &str| std::fs::read(format!("/proc/{}/{name}", running.child.id())).unwrap();
    for name in ["environ", "cmdline"] {
        let text = String::from_utf8_lossy(&seen(name)).into_owned();
        assert!(!text.contains(SECRET) && !text.contains("TS_AUTHKEY"), "{name}");
    }
    assert_eq!(String::from_utf8_lossy(&seen("comm")).trim(), "tailcar");
    running.signal("TERM");
    assert_eq!(running.end().code(), 0);
}

/// `O_NONBLOCK` of Linux: a pipe that somebody still writes to is not waited for.
const NONBLOCK: i32 = 0o4000;

/// What a child of this process would find in the descriptors that it inherits.
fn left_in_descriptors(pid: u32) -> String {
    let mut left = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let number: u32 = entry.file_name().to_string_lossy().parse().unwrap();
        // The three streams are pipes of this test; what is closed meanwhile or is a socket cannot be opened.
        if number > 2
            && let Ok(file) = OpenOptions::new().read(true).custom_flags(NONBLOCK).open(entry.path())
        {
            let _ = file.take(4096).read_to_end(&mut left);
        }
    }
    String::from_utf8_lossy(&left).into_owned()
}

#[test]
fn no_descriptor_holds_the_key_even_when_another_source_wins() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("other"), "hskey-auth-abcdefghijkl-anotheranotheranother").unwrap();
    for source in ["", &format!("--auth-key file:{}", path("other").display())] {
        let server = serve(|mut stream| drop(stream.read_to_end(&mut Vec::new())));
        let words = format!("run --login-server http://{server} --pidfile {} {source}", path("pid").display());
        let running = Program::new(&words).env("TS_AUTHKEY", KEY).start();
        await_some("the pid file", || path("pid").exists().then_some(()));
        let left = left_in_descriptors(running.child.id());
        assert!(!left.contains(SECRET), "{left}");
        running.signal("TERM");
        assert_eq!(running.end().code(), 0);
    }
}

#[test]
fn a_command_inherits_no_file_that_holds_the_key() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "{KEY}").unwrap();
    let server = format!("--login-server http://{}", no_control_server());
    for source in ["--auth-key - <", "--auth-key-fd 0 <", "--auth-key-fd 7 7<"] {
        let script =
            format!("exec {} exec -o json {server} {source}{} -- true", binary().display(), file.path().display());
        let ended = Command::new("sh").args(["-c", &script]).env_remove("TS_AUTHKEY").output().unwrap();
        assert_eq!(ended.status.code(), Some(64), "{ended:?}");
        let json: serde_json::Value = serde_json::from_slice(&ended.stdout).unwrap();
        assert!(json["cause"].as_str().unwrap().contains("is a file"), "{json}");
    }
}

#[test]
fn every_good_source_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    std::fs::write(&file, KEY).unwrap();
    let start = format!("run -o json --login-server http://{}", no_control_server());
    let with = |words: &str| Program::new(&format!("{start} {words}"));
    // What fails is the server, so the key was taken.
    with(&format!("--auth-key file:{}", file.display())).run().refused(76, "TC-1105");
    with("--auth-key -").stdin(&format!("{KEY}\n")).run().refused(76, "TC-1105");
    with("--auth-key-fd 0").stdin(&format!("{KEY}\n")).run().refused(76, "TC-1105");
    with("").env("TS_AUTHKEY", KEY).run().refused(76, "TC-1105");
    with("").env("TS_AUTH_KEY", KEY).run().refused(76, "TC-1105");
    with("").env("TS_AUTHKEY", &format!("file:{}", file.display())).run().refused(76, "TC-1105");
    with("").env("TS_AUTHKEY_FILE", &file.display().to_string()).run().refused(76, "TC-1105");
}
