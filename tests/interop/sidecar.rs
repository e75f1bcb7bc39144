//! tailcar itself: started as a user would, its one JSON line read, its end awaited.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::process::Signal;
use serde_json::Value;

use crate::bed::Bed;
use crate::client::{self, Response};
use crate::headscale::CONTROL;
use crate::namespace::Namespace;
use crate::process::{Process, tail};
use crate::say;
use crate::usage;

/// How long a join may take on a loaded machine.
pub(crate) const JOIN: Duration = Duration::from_secs(30);

/// How long after a join a peer's packet filter may not know the node yet.
const NEW: Duration = Duration::from_secs(2);
/// The pause before it is asked again.
const LOOK: Duration = Duration::from_millis(50);

/// The binary under test: the one that cargo built, unless the caller names another.
pub(crate) fn program() -> PathBuf {
    std::env::var_os("TAILCAR_BIN").map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_tailcar")), PathBuf::from)
}

/// A start that is being put together.
pub(crate) struct Launch<'a> {
    bed: &'a Bed,
    host: &'a Namespace,
    hostname: String,
    environment: Vec<(String, String)>,
    control: String,
    secret: Option<String>,
    trust: bool,
    stdin: bool,
    verb: &'static str,
    extra: Vec<String>,
    sandboxed: bool,
}

/// A tailcar that was started.
pub(crate) struct Sidecar<'a> {
    host: &'a Namespace,
    /// The hostname that it asked for, unique in the bed.
    pub(crate) hostname: String,
    pub(crate) process: Process,
    lines: Mutex<Receiver<String>>,
    /// The ready object, once it was read.
    pub(crate) ready: Value,
    /// When that was.
    since: Option<Instant>,
}

/// How a tailcar ended that was to fail.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) exit: Option<i32>,
    pub(crate) object: Value,
    pub(crate) log: String,
}

impl<'a> Launch<'a> {
    /// `tailcar run` with the bed's control, trust and reusable key, on a port of its own choice.
    pub(crate) fn new(bed: &'a Bed) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(1);
        let hostname = format!("tailcar-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        Self {
            bed,
            host: &bed.hosts.client,
            hostname,
            environment: Vec::new(),
            control: format!("https://{CONTROL}"),
            secret: Some(bed.key.secret.clone()),
            trust: true,
            stdin: false,
            verb: "run",
            extra: Vec::new(),
            sandboxed: false,
        }
    }

    /// On another host than `client`.
    pub(crate) fn on(mut self, host: &'a Namespace) -> Self {
        self.host = host;
        self
    }

    /// Another key; it goes in by a file.
    pub(crate) fn secret(mut self, secret: &str) -> Self {
        self.secret = Some(secret.to_owned());
        self
    }

    /// No `--auth-key` at all.
    pub(crate) fn no_key(mut self) -> Self {
        self.secret = None;
        self
    }

    /// Another hostname than the generated one.
    pub(crate) fn hostname(mut self, hostname: &str) -> Self {
        hostname.clone_into(&mut self.hostname);
        self
    }

    /// Another control server.
    pub(crate) fn control(mut self, url: &str) -> Self {
        url.clone_into(&mut self.control);
        self
    }

    /// No `--ca-file`.
    pub(crate) fn without_trust(mut self) -> Self {
        self.trust = false;
        self
    }

    /// Where no netlink socket can be opened.
    pub(crate) fn sandboxed(mut self) -> Self {
        self.sandboxed = true;
        self
    }

    /// Further flags.
    pub(crate) fn args(mut self, args: &[&str]) -> Self {
        self.extra.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// A variable of its environment.
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Keeps its stdin open, for [`Sidecar::close_stdin`].
    pub(crate) fn with_stdin(mut self) -> Self {
        self.stdin = true;
        self
    }

    /// `tailcar exec` instead of `run`; the child and its arguments are the last of [`Launch::args`].
    pub(crate) fn exec(mut self) -> Self {
        self.verb = "exec";
        self
    }

    /// Starts it, and does not wait.
    ///
    /// # Errors
    /// Those of writing the key and of starting.
    pub(crate) fn start(self) -> Result<Sidecar<'a>, Failed> {
        // A log of its own, although hostnames come again: what it says is not to be taken for another's word.
        static STARTED: AtomicUsize = AtomicUsize::new(1);
        let log = format!("{}.{}", self.hostname, STARTED.fetch_add(1, Ordering::Relaxed));
        let command = self.command()?;
        let mut process = Process::start(command, &log, &self.bed.folder, true)?.transient(self.host);
        let (sender, lines) = channel();
        let stdout = process.child().stdout.take().ok_or("stdout was not piped")?;
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Sidecar {
            host: self.host,
            hostname: self.hostname,
            process,
            lines: Mutex::new(lines),
            ready: Value::Null,
            since: None,
        })
    }

    /// What was put together, as a command inside the host.
    fn command(&self) -> Result<Command, Failed> {
        let mut command = match self.sandboxed {
            true => self.host.command(self.bed.peers.join("sandbox")),
            false => self.host.command(program()),
        };
        if self.sandboxed {
            command.arg(program());
        }
        command.env("HOME", &self.bed.folder).envs(self.environment.iter().cloned());
        command.arg(self.verb).args(["--login-server", &self.control, "--hostname", &self.hostname]);
        command.args(["--output", "json", "--log-level", "debug"]);
        if !self.extra.iter().any(|arg| arg.starts_with("--listen") || arg.starts_with("--socks5-server")) {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        if self.trust {
            command.arg("--ca-file").arg(&self.bed.authority);
        }
        if let Some(secret) = &self.secret {
            let file = self.bed.folder.join(format!("{}.key", self.hostname));
            fs::write(&file, secret)?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
            command.arg("--auth-key").arg(format!("file:{}", file.display()));
        }
        command.args(&self.extra);
        if self.stdin {
            command.stdin(Stdio::piped());
        }
        Ok(command)
    }

    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// When it fails, with its object and log, or takes over half a minute.
    pub(crate) fn ready(self) -> Result<Sidecar<'a>, Failed> {
        let mut sidecar = self.start()?;
        let object = sidecar.object(JOIN)?;
        if object["state"] != "ready" {
            return Err(format!("not ready: {object}\n{}", tail(&sidecar.process.log())).into());
        }
        (sidecar.ready, sidecar.since) = (object, Some(Instant::now()));
        Ok(sidecar)
    }

    /// Starts what is to fail by itself, and waits for its end.
    ///
    /// # Errors
    /// When it has not ended within `limit`, with its log.
    pub(crate) fn outcome(self, limit: Duration) -> Result<Outcome, Failed> {
        let mut sidecar = self.start()?;
        let object = sidecar.object(limit)?;
        let exit = sidecar.process.wait(limit)?;
        Ok(Outcome { exit: exit.code(), object, log: sidecar.process.log() })
    }
}

impl Outcome {
    /// Holds the outcome to an exit status and the beginning of a code, in the object and in the human line.
    ///
    /// # Errors
    /// With what came instead.
    pub(crate) fn expect(&self, exit: i32, code: &str) -> Result<(), Failed> {
        let found = self.object["code"].as_str().unwrap_or("");
        let human = format!("tailcar: {found}: ");
        if self.exit == Some(exit) && found.starts_with(code) && self.log.contains(&human) {
            return Ok(());
        }
        let Self { exit: came, object, log } = self;
        Err(format!("expected exit {exit} and {code}…, got {came:?} {object}\n{}", tail(log)).into())
    }
}

impl Sidecar<'_> {
    /// The next JSON line of its stdout.
    ///
    /// # Errors
    /// When none comes within `limit`, or it is no JSON.
    pub(crate) fn object(&mut self, limit: Duration) -> Result<Value, Failed> {
        let line = self.lines.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(limit);
        match line {
            Ok(line) => Ok(serde_json::from_str(&line).map_err(|error| format!("{error}: {line:?}"))?),
            Err(RecvTimeoutError::Timeout) => {
                Err(format!("no line on stdout within {limit:?}\n{}", tail(&self.process.log())).into())
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.process.wait(Duration::from_secs(2))?;
                Err(format!("ended with {status} and no line\n{}", tail(&self.process.log())).into())
            }
        }
    }

    /// Resident memory in MiB.
    ///
    /// # Errors
    /// When it is gone.
    pub(crate) fn resident(&self) -> Result<f64, Failed> {
        Ok(usage::resident(self.process.id()).ok_or("the sidecar is gone")?)
    }

    /// The proxy's first listener.
    ///
    /// # Errors
    /// When the ready object names none.
    pub(crate) fn listener(&self) -> Result<SocketAddr, Failed> {
        let listener = self.ready["proxy"]["listeners"][0].as_str().ok_or("no listener in the ready object")?;
        Ok(listener.parse()?)
    }

    /// A fresh connection to the proxy.
    ///
    /// # Errors
    /// When it does not accept.
    pub(crate) fn connect(&self) -> Result<std::net::TcpStream, Failed> {
        client::connect(self.host, self.listener()?)
    }

    /// Asks for `host:port` by SOCKS5: the reply code and the stream.
    ///
    /// # Errors
    /// When the proxy breaks the protocol.
    pub(crate) fn socks(&self, host: &str, port: u16) -> Result<(u8, std::net::TcpStream), Failed> {
        client::socks5(self.connect()?, host, port)
    }

    /// A stream to `host:port` by SOCKS5. What a peer's filter rejects while the node is new is asked for again: tailscaled
    /// takes a node's handshakes a moment before its filter knows the node.
    ///
    /// # Errors
    /// When the reply is not success.
    pub(crate) fn dial(&self, host: &str, port: u16) -> Result<std::net::TcpStream, Failed> {
        loop {
            let is_new = self.since.is_some_and(|since| since.elapsed() < NEW);
            let rejections = || self.process.log().matches("code=1602").count();
            let before = if is_new { rejections() } else { 0 };
            match self.socks(host, port)? {
                (0, stream) => return Ok(stream),
                (2, _) if is_new && rejections() > before => {
                    say(&format!("         {host}:{port} does not know {} yet, and is asked again", self.hostname));
                    thread::sleep(LOOK);
                }
                (code, _) => {
                    let log = self.process.log();
                    return Err(format!("SOCKS reply {code:02} for {host}:{port}\n{}", tail(&log)).into());
                }
            }
        }
    }

    /// GETs a path from `host` by SOCKS5, over a connection of its own.
    ///
    /// # Errors
    /// When the proxy refuses or the answer is broken.
    pub(crate) fn get(&self, host: &str, path: &str) -> Result<Response, Failed> {
        let mut stream = self.dial(host, 80)?;
        client::http(&mut stream, &format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"))
    }

    /// GETs an absolute URL by the HTTP proxy, as a plain request.
    ///
    /// # Errors
    /// When the answer is broken.
    pub(crate) fn get_absolute(&self, host: &str, path: &str) -> Result<Response, Failed> {
        let request = format!("GET http://{host}{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        client::http(&mut self.connect()?, &request)
    }

    /// Asks for a CONNECT tunnel.
    ///
    /// # Errors
    /// When the answer is broken.
    pub(crate) fn tunnel(&self, authority: &str) -> Result<(Response, std::net::TcpStream), Failed> {
        client::tunnel(self.connect()?, authority)
    }

    /// Holds the page at `host` to come from the site called `name`.
    ///
    /// # Errors
    /// With what came instead.
    pub(crate) fn page(&self, host: &str, name: &str) -> Result<(), Failed> {
        let page = self.get(host, "/").map_err(|error| format!("{host}: {}", error.message().unwrap_or("")))?;
        if page.status == 200 && page.text() == format!("tailcar site {name}\n") {
            return Ok(());
        }
        Err(format!("{host} answered {} {:?}, not {name}'s page", page.status, page.text()).into())
    }

    /// Closes its stdin.
    pub(crate) fn close_stdin(&mut self) {
        drop(self.process.child().stdin.take());
    }

    /// SIGTERM, and the exit that follows.
    ///
    /// # Errors
    /// When it has not ended within ten seconds.
    pub(crate) fn terminate(&mut self) -> Result<ExitStatus, Failed> {
        self.process.signal(Signal::TERM);
        self.process.wait(Duration::from_secs(10))
    }
}

impl Drop for Sidecar<'_> {
    /// Ends it as a user would, so that its node does not stay in the next scenario's netmap.
    fn drop(&mut self) {
        self.process.signal(Signal::TERM);
        drop(self.process.wait(Duration::from_secs(3)));
    }
}
