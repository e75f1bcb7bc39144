//! A run, from bind to logout: each step with one owner and one undo.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::spawn_local;
use tokio::time::{Instant, interval, sleep};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use super::farewell::{End, Farewell, leave, unjoined};
use super::report::{Report, warn};
use super::settings::Settings;
use super::stops::{ENDING, PASSED_ON, Stop, Stops, exit_of};
use super::threads::{self, Control};
use super::{exec, listen};
use crate::fault::{self, Fault};
use crate::lapse::Lapse;
use crate::node::{JoinStage, Joined, Node, State};
use crate::proxy;

/// What is done while the node is there.
#[derive(Debug)]
pub(super) enum Job {
    /// Stay until told to stop.
    Stay,
    /// Run this command.
    Command(Vec<OsString>),
}

impl Job {
    /// The exit status of a failure. A command that was never started has its own.
    pub(super) fn exit_of(&self, fault: &Fault) -> u8 {
        match (self, fault.row.exit) {
            (Self::Stay, exit) | (Self::Command(_), exit @ (126 | 127)) => exit,
            (Self::Command(_), _) => exec::FAILED_BEFORE,
        }
    }
}

/// How often a wait is said aloud.
const SAY_EVERY: Duration = Duration::from_secs(15);

/// Runs a session and returns its exit status; every failure has been said by then.
pub(super) fn run(settings: Settings, job: &Job) -> u8 {
    let mut report = Report::new(&settings.output);
    let outcome = threads::data().and_then(|data| {
        let control = Control::start()?;
        let exit = data.block_on(session(settings, job, &mut report, control.handle.clone()));
        // A look-up in the system's resolver cannot be cancelled; it need not keep us here.
        data.shutdown_background();
        exit
    });
    outcome.unwrap_or_else(|fault| {
        let exit = job.exit_of(&fault);
        report.failed(&fault, exit, None);
        exit
    })
}

/// What is there before the node: listeners first, since a browser may be waiting for them.
struct Prepared {
    listeners: Vec<TcpListener>,
    proxy: proxy::Config,
}

fn prepare(settings: &Settings, job: &Job, report: &mut Report) -> Result<Prepared, Fault> {
    let listeners = listen::bind_all(&settings.listen)?;
    let addresses = listeners.iter().map(TcpListener::local_addr).collect::<io::Result<Vec<_>>>();
    report.bound(addresses.map_err(|error| Fault::new(&fault::BIND_FAILED, error.to_string()))?)?;
    if let Job::Command(command) = job {
        exec::check(command)?;
    }
    if let Some(path) = &settings.node.ca_file {
        File::open(path).map_err(|error| setting_file(path, &error))?;
    }
    let credentials = settings.proxy_auth.as_deref().map(credentials).transpose()?;
    let proxy =
        proxy::Config { credentials, max_connections: settings.max_connections.get(), ..proxy::Config::default() };
    Ok(Prepared { listeners, proxy })
}

/// The first line of a file, `USER:PASSWORD`.
fn credentials(path: &Path) -> Result<proxy::Credentials, Fault> {
    let mut line = Zeroizing::new(String::new());
    let file = File::open(path).map_err(|error| setting_file(path, &error))?;
    BufReader::new(file).read_line(&mut line).map_err(|error| setting_file(path, &error))?;
    match line.trim_end().split_once(':') {
        Some((user, password)) if (1..=255).contains(&user.len()) && (1..=255).contains(&password.len()) => {
            Ok(proxy::Credentials::new(user, password))
        }
        Some(_) | None => {
            let detail = format!("{} does not begin with a line USER:PASSWORD, 1 to 255 bytes each", path.display());
            Err(Fault::new(&fault::SETTING, detail))
        }
    }
}

fn setting_file(path: &Path, error: &io::Error) -> Fault {
    Fault::new(&fault::SETTING_FILE, format!("cannot read {}: {error}", path.display()))
}

async fn session(settings: Settings, job: &Job, report: &mut Report, control: Handle) -> Result<u8, Fault> {
    let signals: &[_] = if matches!(job, Job::Stay) { &ENDING } else { &PASSED_ON };
    // Before the pid file, whose readers may send one at once; as process 1 we would not even notice it.
    let mut stops = Stops::watch(&settings.life, signals)?;
    let prepared = prepare(&settings, job, report)?;
    let Settings { node: mut config, credential, life, listen: _, proxy_auth: _, max_connections: _, output } =
        settings;
    config.credential = tokio::select! {
        credential = credential.read(config.join_timeout) => Some(credential?),
        end = stopped_early(&mut stops, job) => return Ok(unjoined(job, report, end)),
    };
    if life.on_stdin_eof {
        stops.watch_stdin()?;
    }
    let node = Node::start(config, control).map_err(|error| Fault::from(&error))?;
    let cut_off = node.is_cut_off();
    spawn_local(async move {
        if cut_off.await {
            warn(output.log_format, &Fault::from(&fault::UDP_BLOCKED));
        }
    });
    let drain = CancellationToken::new();
    let stats = Arc::new(proxy::Stats::default());
    let serve = proxy::serve(prepared.listeners, node.clone(), prepared.proxy, Arc::clone(&stats), drain.clone());
    let serving = spawn_local(serve);

    let end = tokio::select! {
        joined = until_ready(node.state(), report, life.ready_timeout) => {
            joined.and_then(|joined| report.ready(&joined)).err().map(End::Failed)
        }
        end = stopped_early(&mut stops, job) => Some(end),
    };
    let end = match (end, job) {
        (Some(end), _) => end,
        (None, Job::Stay) => tokio::select! {
            stop = stops.next() => End::Stopped(stop.reason()),
            fault = failure(node.state()) => End::Failed(fault),
            () = idle(&stats, life.idle_timeout) => End::Stopped(String::from("idle")),
        },
        (None, Job::Command(command)) => {
            let failed = failure(node.state());
            let idle = idle(&stats, life.idle_timeout);
            match exec::run(command, report, &mut stops, failed, idle).await {
                Ok(code) => End::Child(code),
                Err(fault) => End::Failed(fault),
            }
        }
    };
    drain.cancel();
    Ok(leave(
        job,
        report,
        end,
        Farewell { node, serving, stops, stats, limit: life.logout_timeout, strict: life.strict_logout },
    )
    .await)
}

/// A stop before the node was ready. A command that never started exits as if the signal had met it.
async fn stopped_early(stops: &mut Stops, job: &Job) -> End {
    loop {
        let stop = stops.next().await;
        match (stop, job) {
            (Stop::Signal(signal), _) if !ENDING.contains(&signal) => {}
            (Stop::Signal(signal), Job::Command(_)) => return End::Unstarted(stop.reason(), exit_of(signal)),
            (Stop::Lifetime, _) => {
                let detail = "--max-lifetime has passed before the node was ready";
                return End::Failed(Fault::new(&fault::JOIN_TIMEOUT, detail));
            }
            (_, Job::Command(_)) => return End::Unstarted(stop.reason(), exec::FAILED_BEFORE),
            (_, Job::Stay) => return End::Stopped(stop.reason()),
        }
    }
}

/// Waits until the node is ready, and says what it waits for.
async fn until_ready(
    mut states: watch::Receiver<State>,
    report: &Report,
    ready_timeout: Duration,
) -> Result<Arc<Joined>, Fault> {
    let started = Instant::now();
    let mut say = interval(SAY_EVERY);
    say.reset();
    let mut joined_at = None;
    loop {
        let state = states.borrow_and_update().clone();
        if let State::Joined(joined) | State::Ready(joined) = &state
            && joined_at.is_none()
        {
            joined_at = Some(Instant::now());
            report.joined(joined);
        }
        let (stage, last_error) = match state {
            State::Ready(joined) => return Ok(joined),
            State::Failed(error) => return Err(Fault::from(error.as_ref())),
            State::Joined(_) => (JoinStage::Relay, None),
            State::Joining { stage, last_error } => (stage, last_error.map(|error| Fault::from(error.as_ref()))),
        };
        let deadline = async {
            match joined_at {
                Some(at) => tokio::time::sleep_until(at + ready_timeout).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = states.changed() => changed.map_err(|_| gone())?,
            _ = say.tick() => report.waiting(stage, started.elapsed().as_secs(), last_error.as_ref()),
            () = deadline => {
                let detail = format!("joined, but no home DERP was connected within {}", Lapse(ready_timeout));
                return Err(Fault::new(&fault::HOME_DERP, detail));
            }
        }
    }
}

/// Returns when the node has failed for good.
async fn failure(mut states: watch::Receiver<State>) -> Fault {
    let failed = states.wait_for(|state| matches!(state, State::Failed(_))).await.map(|state| state.clone());
    match failed {
        Ok(State::Failed(error)) => Fault::from(error.as_ref()),
        Ok(State::Joining { .. } | State::Joined(_) | State::Ready(_)) | Err(_) => gone(),
    }
}

fn gone() -> Fault {
    Fault::new(&fault::INTERNAL, "the node stopped without saying why")
}

/// Returns once no connection was open for `limit`; never without one.
async fn idle(stats: &proxy::Stats, limit: Option<Duration>) {
    let Some(limit) = limit else { return std::future::pending().await };
    let step = (limit / 4).clamp(Duration::from_millis(10), Duration::from_secs(1));
    let mut busy = Instant::now();
    let mut seen = 0;
    while busy.elapsed() < limit {
        sleep(step).await;
        let counters = stats.counters();
        let accepted = counters.accepted.values().sum::<u64>();
        if counters.active > 0 || accepted != seen {
            (busy, seen) = (Instant::now(), accepted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exec_fails_with_its_own_status_before_the_command_starts() {
        let fault = |row| Fault::from(row);
        let exec = Job::Command(Vec::new());
        assert_eq!(Job::Stay.exit_of(&fault(&fault::KEY_USED)), 77);
        assert_eq!(exec.exit_of(&fault(&fault::KEY_USED)), 125);
        assert_eq!(exec.exit_of(&fault(&fault::COMMAND_NOT_FOUND)), 127);
    }

    #[test]
    fn proxy_credentials_are_a_line_with_a_colon() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("auth");
        assert_eq!(credentials(&path).unwrap_err().row, &fault::SETTING_FILE);
        for (text, good) in [("me:secret\n", true), ("me", false), (":x", false), ("me:", false)] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(credentials(&path).is_ok(), good, "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_stays_away_from_its_derp_is_not_ready() {
        let joined = Joined {
            tailnet: String::from("t"),
            name: String::from("a.t"),
            id: 1,
            addresses: Vec::new(),
            tags: Vec::new(),
            home_derp: None,
            join_time: Duration::ZERO,
        };
        let (_sender, states) = watch::channel(State::Joined(Arc::new(joined)));
        let report = Report::quiet();
        let fault = until_ready(states, &report, Duration::from_secs(9)).await.unwrap_err();
        assert_eq!(fault.row, &fault::HOME_DERP);
    }

    #[tokio::test(start_paused = true)]
    async fn idleness_counts_from_the_last_connection() {
        let started = Instant::now();
        idle(&proxy::Stats::default(), Some(Duration::from_secs(60))).await;
        assert!((60..62).contains(&started.elapsed().as_secs()));
    }
}
