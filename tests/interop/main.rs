//! tailcar against programs that nobody here wrote: headscale, tailscaled, derper, dnsmasq, Chromium.
//!
//! One bed of network namespaces serves all scenarios, one after the other: they change what is
//! shared (policy, routes, outages) and count every packet that leaves. A few that mostly wait run
//! beside them, each on a host of its own. Without root or without the peers' programs nothing runs,
//! and the summary says so; with `CI=true` that is a failure.
//!
//! Ten programs that nobody here wrote, on two processors, now and then are late by their own clocks. So a scenario that
//! fails is tried once more, and a line that begins with `AGAIN` tells it, which `tests/run` counts: two in a run at
//! most, and none that is about what may never leave or must be whole. `TAILCAR_ONE_TRY=1` gives nobody another try.

mod apps;
mod authority;
mod bed;
mod chromium;
mod client;
mod conntrack;
mod corp;
mod demo;
mod derper;
mod headscale;
mod hosts;
mod leak;
mod measure;
mod mint;
mod namespace;
mod nat;
mod nat_nodes;
mod process;
mod scenarios;
mod sidecar;
mod tailscaled;
mod testcontrol;
#[expect(dead_code, reason = "shared with the bench, which asks more of it")]
mod usage;
mod zone;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, thread};

use libtest_mimic::{Arguments, Failed, Trial};

use bed::Bed;
use scenarios::{Leaks, Scenario};

/// Brought up by the first scenario that runs.
type SharedBed = OnceLock<Result<Arc<Bed>, String>>;

/// The bed, for the end: nothing may be left behind on any way out.
static BED: SharedBed = OnceLock::new();

/// How many second tries have been asked for.
static SECOND_TRIES: AtomicU32 = AtomicU32::new(0);

/// Who is on the hosts, and who waits for one.
static TURNS: (Mutex<Turns>, Condvar) =
    (Mutex::new(Turns { busy: Vec::new(), waiting: BTreeMap::new() }), Condvar::new());

/// Hosts by name; scenarios by their place in the order of all, with their host once there is one.
struct Turns {
    busy: Vec<String>,
    waiting: BTreeMap<usize, Option<String>>,
}

fn main() -> ExitCode {
    let mut arguments: Vec<_> = std::env::args_os().collect();
    let peers = peers();
    if let Some(why) = missing(&peers) {
        say(&format!("SKIP interop: {why}"));
        return if std::env::var_os("CI").is_some_and(|value| value == "true") {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        };
    }
    process::end_on_signals(|| take_down(true));
    if arguments.get(1).is_some_and(|first| first == "demo") {
        return demo::run(&peers, arguments.split_off(2));
    }
    if arguments.get(1).is_some_and(|first| first == "measure") {
        return measure::run(&peers);
    }
    let mut arguments = Arguments::from_iter(arguments);
    let failures = Arc::new(Mutex::new(0_u32));
    let trials: Vec<_> =
        scenarios::all().enumerate().map(|(place, scenario)| trial(scenario, place, &peers, &failures)).collect();
    // A thread each, most of them waiting for their host: with fewer, those that wait would hold up another host.
    arguments.test_threads = Some(trials.len());
    let conclusion = libtest_mimic::run(&arguments, trials);
    let failed = *failures.lock().unwrap_or_else(PoisonError::into_inner);
    take_down(failed > 0 || SECOND_TRIES.load(Ordering::Relaxed) > 0);
    conclusion.exit_code()
}

/// Where the pinned peers were built to.
fn peers() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join(".peers");
    std::env::var_os("TAILCAR_PEERS").map_or(built, PathBuf::from)
}

/// Why the bed cannot be made here, if it cannot.
fn missing(peers: &Path) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("network namespaces need root, or a user namespace".to_owned());
    }
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/net/tun") {
        return Some(format!("the subnet router needs /dev/net/tun: {error}"));
    }
    let programs = ["headscale", "tailscaled", "tailscale", "derper", "site", "sandbox", "tbcontrol"];
    if let Some(program) = programs.iter().find(|program| !peers.join(program).exists()) {
        return Some(format!("{program} is not built; tests/run builds it"));
    }
    let tools = ["ip", "tc", "ss", "nft", "dnsmasq", "curl", "chromium", "getent"];
    let found = |tool: &&str| std::env::split_paths(namespace::PATH).any(|folder| folder.join(tool).exists());
    tools.iter().find(|tool| !found(tool)).map(|tool| format!("{tool} is not installed"))
}

fn trial(scenario: Scenario, place: usize, peers: &Path, failures: &Arc<Mutex<u32>>) -> Trial {
    let peers = peers.to_owned();
    let failures = Arc::clone(failures);
    Trial::test(scenario.name, move || {
        Turn::queue(place);
        let bed = BED.get_or_init(|| {
            let start = Instant::now();
            let bed = Bed::up(&peers).map_err(|why| words(&why).to_owned());
            say(&format!("bed up in {:.1} s", start.elapsed().as_secs_f32()));
            bed.map(Arc::new)
        });
        let result = bed.clone().map_err(Failed::from).and_then(|bed| in_turn(&scenario, place, &bed));
        if let Err(why) = &result {
            say(&format!("{}: {}", scenario.name, indented(words(why))));
            *failures.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        }
        result
    })
}

/// Runs a scenario when its host is free, once more if it fails and may, and tells how long it took.
fn in_turn(scenario: &Scenario, place: usize, bed: &Arc<Bed>) -> Result<(), Failed> {
    let _turn = Turn::take((scenario.host)(&bed.hosts).name(), place);
    let start = Instant::now();
    let result = bounded(scenario, bed).or_else(|failure| match failure {
        Failure::Chance(why) if scenario.may_fail_once && again(scenario.name, words(&why)) => bounded(scenario, bed),
        failure @ (Failure::Final(_) | Failure::Chance(_)) => Err(failure),
    });
    say(&format!("{:>6.1} s  {}", start.elapsed().as_secs_f32(), scenario.name));
    result.map_err(|(Failure::Final(why) | Failure::Chance(why))| why)
}

/// Whether what failed is tried again: that takes one of this run's second tries, if there is one left, and is told.
pub(crate) fn again(name: &str, why: &str) -> bool {
    const AT_MOST: u32 = 2;
    if std::env::var_os("TAILCAR_ONE_TRY").is_some() || SECOND_TRIES.fetch_add(1, Ordering::Relaxed) >= AT_MOST {
        return false;
    }
    say(&format!("AGAIN {name}: {}", indented(why)));
    true
}

/// Why a scenario failed, by what another try would say: nothing, when something left that may not, when it panicked or
/// hung; otherwise whether it was chance.
enum Failure {
    Final(Failed),
    Chance(Failed),
}

impl<E: Into<Failed>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Chance(error.into())
    }
}

/// The right to be the only scenario on a host. Given back when dropped.
struct Turn(String);

impl Turn {
    /// Takes a place in the queue, before it is known of which host: while the bed comes up, all do so.
    fn queue(place: usize) {
        TURNS.0.lock().unwrap_or_else(PoisonError::into_inner).waiting.insert(place, None);
    }

    /// Waits for the scenario on the host to end, and lets those before us go first. Every scenario has a
    /// limit, and so has this.
    fn take(host: &str, place: usize) -> Self {
        let (turns, changed) = &TURNS;
        let mut turns = turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.waiting.insert(place, Some(host.to_owned()));
        changed.notify_all();
        let not_yet = |turns: &mut Turns| {
            let ours = |other: &Option<String>| other.as_deref().is_none_or(|other| other == host);
            turns.busy.iter().any(|other| other == host) || turns.waiting.range(..place).any(|(_, other)| ours(other))
        };
        let mut turns = changed.wait_while(turns, not_yet).unwrap_or_else(PoisonError::into_inner);
        turns.waiting.remove(&place);
        turns.busy.push(host.to_owned());
        Self(host.to_owned())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let (turns, changed) = &TURNS;
        turns.lock().unwrap_or_else(PoisonError::into_inner).busy.retain(|host| *host != self.0);
        changed.notify_all();
    }
}

/// What a failure says.
pub(crate) fn words(why: &Failed) -> &str {
    why.message().unwrap_or("failed")
}

/// The same, so that no line of it is taken for one of ours.
fn indented(words: &str) -> String {
    words.replace('\n', "\n         ")
}

/// Runs a scenario within its deadline, and its leak check after it, however it ended.
fn bounded(scenario: &Scenario, bed: &Arc<Bed>) -> Result<(), Failure> {
    let host = (scenario.host)(&bed.hosts);
    leak::reset(host)?;
    let (sender, receiver) = channel();
    thread::Builder::new().name(scenario.name.to_owned()).spawn({
        let (bed, run) = (Arc::clone(bed), scenario.run);
        move || drop(sender.send(run(&bed)))
    })?;
    let ended = match receiver.recv_timeout(scenario.limit) {
        Ok(result) => result.map_err(Failure::Chance),
        Err(RecvTimeoutError::Disconnected) => Err(Failure::Final("it panicked".into())),
        Err(RecvTimeoutError::Timeout) => {
            process::end_transient(host);
            let stuck = if receiver.recv_timeout(RESTORE).is_err() { "; it has not ended since" } else { "" };
            Err(Failure::Final(format!("not done within {:?}{stuck}", scenario.limit).into()))
        }
    };
    let leak = match scenario.leaks {
        Leaks::None => leak::check(host).err(),
        Leaks::Unchecked => None,
    };
    match (ended, leak) {
        (ended, None) => ended,
        (Ok(()), Some(leak)) => Err(Failure::Final(leak)),
        (Err(Failure::Final(why) | Failure::Chance(why)), Some(leak)) => {
            Err(Failure::Final(format!("{}; and {}", words(&leak), words(&why)).into()))
        }
    }
}

/// Ends what the bed runs and removes it; the logs stay when something failed.
fn take_down(keep: bool) {
    process::end_all();
    namespace::remove_ours();
    let folder = bed::folder();
    if keep && folder.exists() {
        say(&format!("logs of all processes: {}", folder.display()));
    } else {
        drop(fs::remove_dir_all(folder));
    }
}

/// A line for whoever watches; the runner owns stdout.
pub(crate) fn say(line: &str) {
    drop(writeln!(std::io::stderr(), "{line}"));
}

/// How long a scenario that ran out of time has to put back what it changed.
const RESTORE: Duration = Duration::from_secs(45);

/// A scenario's usual limit.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
