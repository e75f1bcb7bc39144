//! tailcar beside tailscaled (userspace) and arkitekt-meshd, in one bed and one run: a table of ratios, and JSON.
//!
//! `tests/run bench` builds the peers and runs it; `cargo run --release --example bench` does where they are built.
//! It needs root, for network namespaces. Everything stays on this machine.

#[path = "../../tests/interop/authority.rs"]
mod authority;
mod bed;
mod contender;
mod crowd;
mod figures;
mod fleet;
mod generator;
#[expect(dead_code, reason = "shared with the interop tests, which ask more of it")]
#[path = "../../tests/interop/headscale.rs"]
mod headscale;
mod line;
#[expect(dead_code, reason = "shared with the interop tests, which ask more of it")]
#[path = "../../tests/interop/namespace.rs"]
mod namespace;
mod pinned;
#[expect(dead_code, reason = "shared with the interop tests, which ask more of it")]
#[path = "../../tests/interop/process.rs"]
mod process;
mod procfs;
mod report;
mod server;
mod start;
mod steady;
#[expect(dead_code, reason = "shared with the interop tests, which ask more of it")]
#[path = "../../tests/interop/tailscaled.rs"]
mod tailscaled;
#[cfg_attr(not(test), expect(dead_code, reason = "shared with the interop tests, which ask more of it"))]
#[path = "../../tests/interop/usage.rs"]
mod usage;
mod wan;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand, ValueEnum};
use libtest_mimic::Failed;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use bed::Bed;
use contender::Contender;
use report::Report;

/// tailcar beside tailscaled (userspace) and arkitekt-meshd, in one bed and one run.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// Only these rows; may be given several times.
    #[arg(long, value_enum)]
    only: Vec<Row>,
    /// Only these contenders; may be given several times.
    #[arg(long, value_enum)]
    contender: Vec<Contender>,
    /// One short round of everything: figures to look at, not to quote.
    #[arg(long)]
    quick: bool,
    /// The table over a WAN instead: 200 Mbit/s, 20 and 100 ms, with and without loss.
    #[arg(long)]
    wan: bool,
    /// Only these lines of that table, as round trip in milliseconds and loss in percent (20/0.1); may be given
    /// several times.
    #[arg(long, requires = "wan")]
    line: Vec<wan::Choice>,
    /// How often everything is measured over a line, instead of five times.
    #[arg(long, requires = "wan")]
    rounds: Option<usize>,
    /// How long headscale collects changes of nodes; its own default.
    #[arg(long, default_value = "500ms")]
    tick: String,
    /// Where the JSON goes; target/bench.json, or target/bench-wan.json.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// The far end's server, which the bench starts itself.
    #[command(hide = true)]
    Serve,
}

/// Rows that can be measured by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Row {
    Binary,
    Start,
    Latency,
    Idle,
    Connections,
    Bulk,
    Derp,
    Crowd,
    Fleet,
}

/// What is measured, how often and how long.
#[derive(Debug)]
pub(crate) struct Plan {
    rows: Vec<Row>,
    pub(crate) contenders: Vec<Contender>,
    /// Starts of each.
    pub(crate) starts: usize,
    /// Rounds of all that is measured in a run.
    pub(crate) rounds: usize,
    pub(crate) round_trips: usize,
    pub(crate) warm_up: Duration,
    pub(crate) measured: Duration,
    pub(crate) idle: Duration,
    /// Over a WAN: which lines, how often, and whether that is only a look.
    pub(crate) lines: Vec<wan::Choice>,
    pub(crate) wan_rounds: usize,
    pub(crate) quick: bool,
}

impl Plan {
    fn new(arguments: &Arguments) -> Self {
        let all = |given: &[Row]| if given.is_empty() { Row::value_variants().to_vec() } else { given.to_vec() };
        let contenders = match arguments.contender.is_empty() {
            true => Contender::value_variants().to_vec(),
            false => arguments.contender.clone(),
        };
        let seconds = Duration::from_secs;
        let (starts, rounds, round_trips, measured, idle) = match arguments.quick {
            true => (1, 1, 1000, seconds(2), seconds(5)),
            false => (8, 3, 4000, Duration::from_millis(2500), seconds(10)),
        };
        let warm_up = Duration::from_millis(500);
        let wan_rounds = arguments.rounds.unwrap_or(if arguments.quick { 1 } else { 5 });
        Self {
            rows: all(&arguments.only),
            contenders,
            starts,
            rounds,
            round_trips,
            warm_up,
            measured,
            idle,
            lines: arguments.line.clone(),
            wan_rounds,
            quick: arguments.quick,
        }
    }

    /// Whether a row is to be measured.
    pub(crate) fn wants(&self, row: Row) -> bool {
        self.rows.contains(&row)
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(Role::Serve) = arguments.role {
        return ended(server::run().map_err(Failed::from));
    }
    process::end_on_signals(|| bed::take_down(true));
    let result = run(&arguments);
    bed::take_down(result.is_err());
    ended(result)
}

fn ended(result: Result<(), Failed>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("bench: {}", error.message().unwrap_or("failed")));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Failed> {
    let peers = std::env::var_os("TAILCAR_PEERS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".peers"), PathBuf::from);
    let (mut plan, mut report) = (Plan::new(arguments), Report::default());
    // Ten thousand connections are as many files here, in the server and in what is measured.
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    leave_out(&mut plan, &peers, &mut report)?;
    let start = Instant::now();
    let bed = Bed::up(&peers, &arguments.tick)?;
    say(&format!("bed up in {:.1} s", start.elapsed().as_secs_f32()));
    let file = |name: &str| arguments.json.clone().unwrap_or_else(|| PathBuf::from(name));
    if arguments.wan {
        let (table, json) = wan::table(&bed, &plan)?;
        writeln!(std::io::stdout(), "{table}{:.0} s in all", start.elapsed().as_secs_f32())?;
        return Ok(report::write(&file("target/bench-wan.json"), &json)?);
    }
    let result = measure(&bed, &plan, &mut report);
    report.note(format!("{:.0} s in all", start.elapsed().as_secs_f32()));
    // What was measured before a failure is worth reading.
    write!(std::io::stdout(), "{}", report.table(&plan.contenders))?;
    report::write(&file("target/bench.json"), &report.json())?;
    result
}

/// Takes out who is not built, aloud. Without tailscaled and headscale there is no bed.
fn leave_out(plan: &mut Plan, peers: &Path, report: &mut Report) -> Result<(), Failed> {
    if let Some(missing) = ["headscale", "tailscaled", "tailscale"].iter().find(|name| !peers.join(name).exists()) {
        return Err(format!("{missing} is not built: `tests/run bench` builds it").into());
    }
    let absent = |contender: &Contender| !contender.program(peers).exists();
    if plan.contenders.iter().any(|contender| *contender == Contender::Tailcar && absent(contender)) {
        return Err("tailcar is not built: `cargo build --release`".into());
    }
    if plan.contenders.contains(&Contender::Meshd) && absent(&Contender::Meshd) {
        let why = "not installed: cargo install --locked --version 0.11.0 --root .peers arkitekt-meshd";
        report.skip(Contender::Meshd, why.to_owned());
        plan.contenders.retain(|contender| *contender != Contender::Meshd);
    }
    Ok(())
}

fn measure(bed: &Bed, plan: &Plan, report: &mut Report) -> Result<(), Failed> {
    let start = Instant::now();
    let done = |what: &str| say(&format!("{:>4.0} s  {what}", start.elapsed().as_secs_f32()));
    if plan.wants(Row::Binary) {
        for contender in &plan.contenders {
            let mut bytes = std::fs::metadata(contender.program(&bed.peers))?.len();
            if *contender == Contender::Tailscaled {
                bytes += std::fs::metadata(bed.peers.join("tailscale"))?.len();
            }
            report.add("binary", *contender, bytes as f64 / 1e6);
        }
    }
    if plan.wants(Row::Start) {
        start::rows(bed, plan, report)?;
        done("start");
    }
    if [Row::Latency, Row::Idle, Row::Connections, Row::Bulk].into_iter().any(|row| plan.wants(row)) {
        steady::rows(bed, plan, report)?;
        done("latency, idle, connections, bulk");
    }
    if plan.wants(Row::Derp) {
        steady::relayed(bed, plan, report)?;
        done("over DERP");
    }
    if plan.wants(Row::Crowd) {
        crowd::connections(bed, plan, report)?;
        done("10,000 connections");
    }
    if plan.wants(Row::Fleet) && plan.contenders.contains(&Contender::Tailcar) {
        crowd::sidecars(bed, report)?;
        done("100 sidecars");
    }
    Ok(())
}

/// A line for whoever watches.
pub(crate) fn say(line: &str) {
    drop(writeln!(std::io::stderr(), "{line}"));
}
