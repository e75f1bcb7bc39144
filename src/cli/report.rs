//! What a run says of itself: lines for people on standard error, JSON on standard output, and its files.
//!
//! One [`Line`] is behind all of them. Nobody who stops reading stops the run: a closed pipe is ignored.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::args::{LogFormat, OutputFormat};
use super::files::{self, Files};
use super::line::{End, Failure, Line, Proxy, Ready, Tally, short};
use super::redact::redact;
use super::settings::Output;
use crate::fault::Fault;
use crate::lapse::Lapse;
use crate::node::{JoinStage, Joined, Logout};

/// The one voice of a run.
#[derive(Debug)]
pub(super) struct Report {
    output: Output,
    files: Files,
    listeners: Vec<SocketAddr>,
}

impl Report {
    /// A voice that has said nothing yet.
    pub(super) fn new(output: &Output) -> Self {
        Self { output: output.clone(), files: Files::new(output), listeners: Vec::new() }
    }

    /// The listeners are bound: opens the files and says so there.
    ///
    /// # Errors
    /// `TC-2005` when a file cannot be written.
    pub(super) fn bound(&mut self, listeners: Vec<SocketAddr>) -> Result<(), Fault> {
        self.listeners = listeners;
        let line = self.joining_line(JoinStage::Control);
        self.files.open(&line)
    }

    /// The address that a client uses for the first listener.
    pub(super) fn proxy_address(&self) -> SocketAddr {
        self.listeners.first().copied().map_or(SocketAddr::from(([127, 0, 0, 1], 0)), reachable)
    }

    /// The node has a netmap.
    pub(super) fn joined(&self, joined: &Joined) {
        let address = joined.addresses.first().map(|ip| format!(" ({ip})")).unwrap_or_default();
        let tags = if joined.tags.is_empty() { String::new() } else { format!(", tags {}", joined.tags.join(" ")) };
        let seconds = joined.join_time.as_secs_f64();
        let text = format!("{} as {}{address} in {seconds:.2}s{tags}", joined.tailnet, short(&joined.name));
        self.say("joined", &format!("joined   {text}"));
    }

    /// Still waiting; said every 15 s.
    pub(super) fn waiting(&self, stage: JoinStage, seconds: u64, last_error: Option<&Fault>) {
        let because = last_error.map(|fault| format!(" (last: {fault})")).unwrap_or_default();
        self.say("waiting", &format!("waiting  {seconds}s for {}{because}", awaited(stage)));
        self.status(&self.joining_line(stage));
    }

    /// The node is ready: the proxy may be used.
    ///
    /// # Errors
    /// `TC-2005` when a file cannot be written.
    pub(super) fn ready(&self, joined: &Joined) -> Result<(), Fault> {
        let line = self.ready_line(joined);
        self.files.ready(&line)?;
        self.data(&line);
        for listener in &self.listeners {
            let address = reachable(*listener);
            self.say("proxy", &format!("proxy    http://{address}   socks5h://{address}"));
        }
        self.say("ready", "Ready: you may start your tests.");
        Ok(())
    }

    /// The run has failed and will exit with `exit`; `tally` where it failed at its very end.
    pub(super) fn failed(&self, fault: &Fault, exit: u8, tally: Option<&Tally>) {
        tally.into_iter().for_each(|tally| self.list(tally));
        let line = self.failed_line(fault, exit, tally);
        self.files.not_ready();
        self.status(&line);
        self.data(&line);
        if self.output.log_format == LogFormat::Json {
            let (row, code, cause) = (fault.row, fault.code(), fault.cause());
            let stage = row.stage.as_str();
            tracing::error!(
                event = "failed",
                code,
                stage,
                remedy = row.remedy,
                retryable = row.retryable,
                exit,
                "{cause}"
            );
        } else {
            complain(fault);
        }
    }

    /// The node lost its place in the tailnet while a command runs: the command decides what becomes of it.
    pub(super) fn lost(&self, fault: &Fault) {
        self.failed(fault, fault.row.exit, None);
    }

    /// A run whose failure was said is over: only what has come of it since then is news.
    pub(super) fn failed_before(&self, fault: &Fault, exit: u8, tally: &Tally) {
        self.list(tally);
        self.status(&self.failed_line(fault, exit, Some(tally)));
    }

    /// Something went wrong that changes nothing else.
    pub(super) fn warn(&self, fault: &Fault) {
        warn(self.output.log_format, fault);
    }

    /// The node is about to leave: nobody should start to use it.
    pub(super) fn leaving(&self) {
        self.files.not_ready();
    }

    /// Tunnels and answers that had not ended by themselves `after` the run's end began are cut, and so were idle ones,
    /// which are mentioned beside them alone: with those nothing is known to be lost.
    pub(super) fn cut(&self, connections: u64, idle: u64, after: Duration) {
        if connections == 0 {
            return;
        }
        let beside = if idle > 0 { format!(", and idle: {idle}") } else { String::new() };
        let line = format!("cut      connections still busy after {}: {connections}{beside}", Lapse(after));
        if self.output.log_format == LogFormat::Json {
            tracing::info!(event = "cut", connections, idle, "{line}");
        } else {
            self.say("cut", &line);
        }
    }

    /// The run is over without a failure.
    pub(super) fn ended(&self, reason: &str, logout: Logout, exit: u8, tally: &Tally) {
        self.list(tally);
        let end = Some(End { reason, logout: logout_word(logout), exit });
        self.status(&Line { end, tally: Some(tally), ..self.line("ended") }.text());
        self.say("ended", &format!("ended    {reason}, logout {}", logout_word(logout)));
    }

    /// Lists what was refused, and what was let out.
    fn list(&self, tally: &Tally) {
        if !tally.refused.is_empty() {
            self.say("refused", &format!("refused  {}", listed(&tally.refused)));
        }
        if !tally.direct.is_empty() {
            self.say("direct", &format!("direct   {}", listed(&tally.direct)));
        }
    }

    fn status(&self, line: &str) {
        if let Err(fault) = self.files.status(line) {
            tracing::warn!(%fault, "the status file is out of date");
        }
    }

    /// A line of JSON on standard output, if asked for.
    fn data(&self, line: &str) {
        if self.output.format == OutputFormat::Json {
            print(line);
        }
    }

    /// A line for people; an event where logs are JSON, so that every line there is.
    fn say(&self, event: &'static str, line: &str) {
        if self.output.log_format == LogFormat::Json {
            tracing::info!(event, "{line}");
        } else if !self.output.quiet {
            complain_line(line);
        }
    }

    fn line(&self, state: &'static str) -> Line<'_> {
        let address = (!self.listeners.is_empty()).then(|| self.proxy_address());
        Line {
            v: 1,
            state,
            pid: std::process::id(),
            run_id: &self.output.run_id,
            proxy: address.map(|address| Proxy {
                http: format!("http://{address}"),
                socks5: format!("socks5h://{address}"),
                listeners: self.listeners.clone(),
            }),
            labels: self.output.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect(),
            ..Line::default()
        }
    }

    fn joining_line(&self, stage: JoinStage) -> String {
        Line { waiting_for: Some(awaited(stage)), ..self.line("joining") }.text()
    }

    fn ready_line(&self, joined: &Joined) -> String {
        Line { node: Some(Ready::new(joined)), ..self.line("ready") }.text()
    }

    fn failed_line(&self, fault: &Fault, exit: u8, tally: Option<&Tally>) -> String {
        Line { failure: Some(Failure::new(fault, exit)), tally, ..self.line("failed") }.text()
    }
}

#[cfg(test)]
impl Report {
    /// A voice that says nothing.
    pub(super) fn quiet() -> Self {
        Self::new(&Output::quiet())
    }
}

/// Says a failure that came before there was a [`Report`]: the command line itself.
pub(super) fn refuse(fault: &Fault, exit: u8, json: bool) {
    if json {
        print(&failed_line(fault, exit));
    }
    complain(fault);
}

/// Ends with a bug, without the [`Report`]: the panic may be its own.
pub(super) fn abandon(fault: &Fault) {
    files::abandon(&failed_line(fault, fault.row.exit));
    complain(fault);
}

/// A failure, without what only a [`Report`] knows.
fn failed_line(fault: &Fault, exit: u8) -> String {
    let pid = std::process::id();
    Line { v: 1, state: "failed", failure: Some(Failure::new(fault, exit)), pid, ..Line::default() }.text()
}

/// Something went wrong that changes nothing else, for whoever outlives the [`Report`]'s borrow.
pub(super) fn warn(format: LogFormat, fault: &Fault) {
    if format == LogFormat::Json {
        tracing::warn!(code = fault.code(), remedy = fault.row.remedy, "{}", fault.cause());
    } else {
        complain(fault);
    }
}

/// A failure for people: what happened, and what to try.
pub(super) fn complain(fault: &Fault) {
    complain_line(&format!("tailcar: {fault}\n  try  {}", fault.row.remedy));
}

/// One line, or a few at once, on standard error.
pub(super) fn complain_line(line: &str) {
    let _ = io::stderr().lock().write_all(format!("{}\n", redact(line)).as_bytes());
}

/// One line on standard output.
fn print(line: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(format!("{}\n", redact(line)).as_bytes()).and_then(|()| out.flush());
}

/// Where a client on this machine finds a listener on every address.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip @ (IpAddr::V4(_) | IpAddr::V6(_)) => ip,
    };
    SocketAddr::new(ip, address.port())
}

fn awaited(stage: JoinStage) -> &'static str {
    match stage {
        JoinStage::Control => "the control server to answer",
        JoinStage::Mint => "an auth key to be made",
        JoinStage::Register => "the control server to accept the key",
        JoinStage::Approval => "an administrator to approve the device",
        JoinStage::Netmap => "the first netmap",
        JoinStage::Relay => "the home DERP",
    }
}

/// Destinations and how often each was asked for, the first ten of them.
fn listed(refused: &BTreeMap<String, u64>) -> String {
    let first: Vec<_> = refused.iter().take(10).map(|(place, times)| format!("{place} ({times})")).collect();
    let more = refused.len().saturating_sub(first.len());
    let rest = if more == 0 { String::new() } else { format!(" and {more} more") };
    format!("{}{rest}", first.join(", "))
}

fn logout_word(logout: Logout) -> &'static str {
    match logout {
        Logout::Confirmed => "confirmed",
        Logout::NotNeeded => "not needed",
        Logout::Unconfirmed => "unconfirmed",
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::Value;

    use super::*;
    use crate::fault;

    fn report() -> Report {
        let mut report = Report::quiet();
        report.bound(vec!["0.0.0.0:1080".parse().unwrap(), "127.0.0.1:7".parse().unwrap()]).unwrap();
        report
    }

    #[test]
    fn the_ready_line_has_its_documented_fields() {
        let joined = Joined {
            tailnet: String::from("tb.example"),
            name: String::from("tailcar-r42.tb.example"),
            id: 7,
            addresses: vec!["100.64.0.3".parse().unwrap()],
            tags: vec![String::from("tag:browser")],
            home_derp: Some(999),
            join_time: Duration::from_millis(412),
        };
        let line: Value = serde_json::from_str(&report().ready_line(&joined)).unwrap();
        let wanted = serde_json::json!({
            "v": 1, "state": "ready", "pid": std::process::id(), "run_id": "r42", "labels": {"job": "e2e"},
            "proxy": {"http": "http://127.0.0.1:1080", "socks5": "socks5h://127.0.0.1:1080",
                      "listeners": ["0.0.0.0:1080", "127.0.0.1:7"]},
            "node": {"name": "tailcar-r42.tb.example", "hostname": "tailcar-r42", "id": 7, "addresses": ["100.64.0.3"],
                     "tags": ["tag:browser"], "tailnet": "tb.example", "home_derp": 999},
            "join_ms": 412, "targets": [],
        });
        assert_eq!(line, wanted);
    }

    #[test]
    fn the_failed_line_says_everything_but_secrets() {
        let fault = Fault::new(&fault::KEY_USED, "used: hskey-auth-abcdef-geheim");
        let line: Value = serde_json::from_str(&report().failed_line(&fault, 125, None)).unwrap();
        let field = |name: &str| line[name].clone();
        assert_eq!(
            (field("state"), field("code"), field("stage")),
            ("failed".into(), "TC-1203".into(), "register".into())
        );
        assert_eq!((field("retryable"), field("exit")), (false.into(), 125.into()));
        assert_eq!(field("cause"), "used: hskey-[redacted]");
        assert_eq!(field("remedy"), fault::KEY_USED.remedy);
    }

    #[test]
    fn the_status_of_a_failed_run_says_at_last_what_was_cut_refused_and_let_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("status");
        let mut report = Report::new(&Output { status_file: Some(path.clone()), ..Output::quiet() });
        report.bound(Vec::new()).unwrap();
        let status = || -> Value { serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap() };
        let fault = Fault::from(&fault::NODE_DELETED);
        report.failed(&fault, 74, None);
        let first = status();
        assert_eq!((&first["code"], &first["cut"]), (&"TC-2003".into(), &Value::Null));
        let once = |place: &str| BTreeMap::from([(place.to_owned(), 1)]);
        let tally = Tally { refused: once("a.example:443"), direct: once("b.example:443"), cut: 2, cut_idle: 0 };
        report.failed_before(&fault, 74, &tally);
        let mut wanted = first;
        for (field, value) in [("cut", 2.into()), ("refused", serde_json::json!({"a.example:443": 1}))] {
            wanted[field] = value;
        }
        wanted["direct"] = serde_json::json!({"b.example:443": 1});
        assert_eq!(status(), wanted);
    }
}
