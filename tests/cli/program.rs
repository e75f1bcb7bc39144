//! One run of the binary: its words, its environment, and what came of it within a deadline.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// What no output may ever contain.
pub(crate) const SECRET: &str = "geheimgeheimgeheim";

/// A key of the right form that no server knows.
pub(crate) const KEY: &str = "hskey-auth-abcdefghijkl-geheimgeheimgeheim";

/// No run here may last longer; each has limits of its own far below.
const DEADLINE: Duration = Duration::from_secs(30);

/// A command line in the making.
pub(crate) struct Program {
    command: Command,
    stdin: Option<String>,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

/// A run that still lasts. Dropped, it is killed.
pub(crate) struct Running {
    pub(crate) child: Child,
    started: Instant,
}

/// The binary under test.
pub(crate) fn binary() -> PathBuf {
    std::env::var_os("TAILCAR_BIN").map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_tailcar")), PathBuf::from)
}

impl Program {
    /// `tailcar WORDS`, split at spaces, in an environment with nothing but `PATH`.
    pub(crate) fn new(words: &str) -> Self {
        let mut command = Command::new(binary());
        command.args(words.split_whitespace()).env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        Self { command, stdin: None }
    }

    /// One more word, spaces and all.
    pub(crate) fn arg(mut self, word: impl Into<OsString>) -> Self {
        self.command.arg(word.into());
        self
    }

    /// One more variable.
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// What standard input holds; without it, it is empty.
    pub(crate) fn stdin(mut self, text: &str) -> Self {
        self.stdin = Some(text.to_owned());
        self
    }

    /// Starts it with pipes for all three streams.
    pub(crate) fn start(mut self) -> Running {
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = self.command.spawn().expect("the binary starts");
        if let Some(text) = self.stdin {
            let mut stdin = child.stdin.take().expect("it is piped");
            stdin.write_all(text.as_bytes()).expect("a pipe holds a key");
            // Kept open: a key must be taken without waiting for the end.
            child.stdin = Some(stdin);
        }
        Running { child, started }
    }

    /// Runs it to its end.
    pub(crate) fn run(self) -> Ended {
        let mut running = self.start();
        if running.child.stdin.is_some() {
            // An empty standard input, or one that has said all.
            drop(running.child.stdin.take());
        }
        running.end()
    }
}

impl Running {
    /// Waits for its end.
    pub(crate) fn end(mut self) -> Ended {
        let read = |stream: Option<Box<dyn Read + Send>>| {
            thread::spawn(move || {
                let mut text = String::new();
                if let Some(mut stream) = stream {
                    stream.read_to_string(&mut text).expect("output is text");
                }
                text
            })
        };
        let stdout = read(self.child.stdout.take().map(|stream| Box::new(stream) as _));
        let stderr = read(self.child.stderr.take().map(|stream| Box::new(stream) as _));
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                break status;
            }
            assert!(self.started.elapsed() < DEADLINE, "it hangs");
            thread::sleep(Duration::from_millis(5));
        };
        let took = self.started.elapsed();
        let ended = Ended {
            status,
            stdout: stdout.join().expect("the reader ends"),
            stderr: stderr.join().expect("the reader ends"),
            took,
        };
        assert!(!ended.stdout.contains(SECRET) && !ended.stderr.contains(SECRET), "a secret shows: {ended:?}");
        assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
        ended
    }

    /// Sends a signal by its name.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(sent.expect("kill is there").success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already, unless a test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// The exit status; -1 after a signal.
    pub(crate) fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// The one line of JSON.
    pub(crate) fn json(&self) -> Value {
        let mut lines = self.stdout.lines();
        let line = lines.next().unwrap_or_else(|| panic!("no line of JSON: {self:?}"));
        assert_eq!(lines.next(), None, "more than one line");
        serde_json::from_str(line).expect("the line is JSON")
    }

    /// Asserts a refusal: exit status, JSON and human line agree. Returns the JSON.
    pub(crate) fn refused(&self, exit: i32, code: &str) -> Value {
        assert_eq!(self.code(), exit, "{self:?}");
        let json = self.json();
        assert_eq!((&json["v"], &json["state"], &json["exit"]), (&1.into(), &"failed".into(), &exit.into()), "{json}");
        assert_eq!(json["code"], code, "{json}");
        assert!(json["cause"].as_str().is_some_and(|cause| !cause.is_empty()), "{json}");
        assert!(json["retryable"].is_boolean() && json["stage"].is_string(), "{json}");
        let cause = json["cause"].as_str().unwrap_or_default();
        assert!(self.stderr.contains(&format!("tailcar: {code}: {cause}")), "{}", self.stderr);
        let remedy = json["remedy"].as_str().unwrap_or_default();
        assert!(!remedy.is_empty() && self.stderr.contains(&format!("  try  {remedy}")), "{}", self.stderr);
        json
    }
}

/// Waits until `seen` gives something, within the deadline.
pub(crate) fn await_some<T>(what: &str, mut seen: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = seen() {
            return value;
        }
        assert!(started.elapsed() < DEADLINE, "never happened: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
