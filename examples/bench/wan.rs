//! The WAN table: one flow over a line of 200 Mbit/s with a queue of one round trip, through each, and without a tunnel.
//!
//! Each has a host and a line of its own. Where loss rules, the rates are low and all run side by side; where the line
//! is filled, one after the other.

use std::fmt::Write as _;
use std::thread;
use std::time::Duration;

use libtest_mimic::Failed;
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::contender::{BACKUP, Contender, Run, first_byte};
use crate::generator::{Direction, Load, Way, inside};
use crate::line::{Line, Shape};
use crate::namespace::Namespace;
use crate::report::{median, number};
use crate::{Plan, say};

/// The line's rate, in bits a second.
const RATE: u64 = 200_000_000;
/// What is left of a transfer when the next begins would be in its way.
const CALM: Duration = Duration::from_millis(300);

/// What our rate is held to.
#[derive(Debug, Clone, Copy)]
enum Aim {
    /// Megabits a second.
    AtLeast(f64),
    /// What there is without a tunnel.
    Linux,
    /// The best of the others.
    Best,
}

/// A line, and what is aimed at over it: round trip in milliseconds, loss each way.
const CONDITIONS: [(u64, f64, Aim); 6] = [
    (20, 0.0, Aim::AtLeast(175.0)),
    (20, 0.001, Aim::Linux),
    (20, 0.01, Aim::Best),
    (100, 0.0, Aim::AtLeast(155.0)),
    (100, 0.001, Aim::Linux),
    (100, 0.01, Aim::Best),
];

/// One that runs over a line of its own. Fields drop in order: the process before its network.
struct Lane<'a> {
    contender: Option<Contender>,
    run: Option<Run<'a>>,
    way: Way,
    line: Line,
    host: Namespace,
}

/// Rates of one lane: by condition, down and up.
type Rates = Vec<[Vec<f64>; 2]>;

impl Lane<'_> {
    fn name(&self) -> &'static str {
        self.contender.map_or("Linux", Contender::name)
    }

    fn transfer(&self, bed: &Bed, direction: Direction, measured: Duration) -> Result<f64, Failed> {
        let load = Load { direction, flows: 1, warm_up: Duration::ZERO, measured, watched: &[] };
        let (way, mut counts) = (self.way, bed.counts()?);
        let bulk = inside(&self.host, || async { way.bulk(&load, &mut counts).await });
        bulk.map(|bulk| bulk.rate())
            .map_err(|error| format!("{}: {}", self.name(), error.message().unwrap_or("")).into())
    }
}

/// Measures all; the table, and the same as JSON.
///
/// # Errors
/// When somebody does not come up or does not serve.
pub(crate) fn table(bed: &Bed, plan: &Plan) -> Result<(String, Value), Failed> {
    // What a host remembers of an earlier connection is no part of the next.
    bed.far.set("ipv4/tcp_no_metrics_save", "1")?;
    let mut lanes = vec![lane(bed, None, 51)?];
    for (number, contender) in (52..).zip(&plan.contenders) {
        lanes.push(lane(bed, Some(*contender), number)?);
    }
    let mut rates: Vec<Rates> = lanes.iter().map(|_| vec![Default::default(); CONDITIONS.len()]).collect();
    for (place, (trip, loss, _)) in CONDITIONS.into_iter().enumerate() {
        let queue = usize::try_from(RATE / 8 * trip / 1000)?;
        let shape = Shape { delay: Duration::from_millis(trip) / 2, rate: RATE, queue, loss };
        lanes.iter().for_each(|lane| lane.line.reshape(shape));
        let rounds = if loss > 0.0 { plan.lossy_rounds } else { plan.rounds };
        for _ in 0..rounds {
            for (side, direction) in [Direction::Down, Direction::Up].into_iter().enumerate() {
                let came = round(bed, &lanes, direction, loss > 0.0, plan.wan_measured)?;
                rates.iter_mut().zip(came).for_each(|(rates, rate)| rates[place][side].push(rate));
                thread::sleep(CALM);
            }
        }
        say(&format!("{trip} ms, {} % done", loss * 100.0));
    }
    let names: Vec<_> = lanes.iter().map(|lane| (lane.contender, lane.name())).collect();
    for lane in lanes {
        if let Some(run) = lane.run {
            run.leave(&lane.host)?;
        }
    }
    Ok((text(&names, &rates), json(&names, &rates)))
}

/// One transfer of each lane, all at once or in turn.
fn round(
    bed: &Bed,
    lanes: &[Lane<'_>],
    direction: Direction,
    at_once: bool,
    measured: Duration,
) -> Result<Vec<f64>, Failed> {
    if !at_once {
        return lanes.iter().map(|lane| lane.transfer(bed, direction, measured)).collect();
    }
    thread::scope(|scope| {
        let start = |lane| scope.spawn(move || Lane::transfer(lane, bed, direction, measured));
        let workers: Vec<_> = lanes.iter().map(start).collect();
        workers.into_iter().map(|worker| worker.join().map_err(|_| "a transfer panicked")?).collect()
    })
}

/// A host with its line, and on it who is measured, joined while the line is short.
fn lane(bed: &Bed, contender: Option<Contender>, number: u8) -> Result<Lane<'_>, Failed> {
    let role = format!("lane{number}");
    let (host, line) = bed.host(&role, number, |host, wan, port| Line::lay(host, wan, port, Shape::default()))?;
    host.set("ipv4/tcp_no_metrics_save", "1")?;
    let Some(contender) = contender else {
        return Ok(Lane { contender: None, run: None, way: bed.straight()?, line, host });
    };
    let run = contender.start(bed, &host)?;
    first_byte(&run, &host, BACKUP)?;
    Ok(Lane { contender: Some(contender), way: run.way, run: Some(run), line, host })
}

/// A lane's median, by the place of its condition and its direction.
fn middle(rates: &Rates, place: usize, side: usize) -> f64 {
    median(&rates[place][side]).unwrap_or(f64::NAN)
}

/// What we are held to there, if we and they were measured.
fn wanted(names: &[(Option<Contender>, &str)], rates: &[Rates], place: usize, side: usize) -> f64 {
    let others = names.iter().zip(rates).filter(|((who, _), _)| who.is_some_and(|who| who != Contender::Tailcar));
    match CONDITIONS[place].2 {
        Aim::AtLeast(rate) => rate,
        Aim::Linux => middle(&rates[0], place, side),
        Aim::Best => others.map(|(_, rates)| middle(rates, place, side)).fold(0.0, f64::max),
    }
}

fn text(names: &[(Option<Contender>, &str)], rates: &[Rates]) -> String {
    let mut out = format!("{:<22}", "Mbit/s, down / up");
    for (_, name) in names {
        let _ = write!(out, "{name:>17}");
    }
    let _ = writeln!(out, "{:>17}", "aim");
    for (place, (trip, loss, _)) in CONDITIONS.into_iter().enumerate() {
        let _ = write!(out, "{:<22}", format!("{trip} ms, {} %", loss * 100.0));
        for rates in rates {
            let sides = [0, 1].map(|side| number(middle(rates, place, side)));
            let _ = write!(out, "{:>17}", sides.join(" / "));
        }
        let aims = [0, 1].map(|side| wanted(names, rates, place, side));
        let _ = write!(out, "{:>17}", aims.map(number).join(" / "));
        if let Some(ours) = names.iter().position(|(who, _)| *who == Some(Contender::Tailcar)) {
            let met = |side: usize| middle(&rates[ours], place, side) >= aims[side];
            let verdicts = [0, 1].map(|side| if met(side) { "met" } else { "NOT" });
            let _ = write!(out, "  {}", verdicts.join(" / "));
        }
        let count = rates.first().map_or(0, |rates| rates[place][0].len());
        let _ = writeln!(out, "  N {count}");
    }
    out
}

fn json(names: &[(Option<Contender>, &str)], rates: &[Rates]) -> Value {
    let rows: Vec<_> = CONDITIONS
        .iter()
        .enumerate()
        .map(|(place, (trip, loss, _))| {
            let lanes: serde_json::Map<_, _> = names
                .iter()
                .zip(rates)
                .map(|((_, name), rates)| ((*name).to_owned(), json!({"down": rates[place][0], "up": rates[place][1]})))
                .collect();
            let aims = [0, 1].map(|side| wanted(names, rates, place, side));
            json!({"round_trip_ms": trip, "loss": loss, "mbit_s": lanes, "aim": {"down": aims[0], "up": aims[1]}})
        })
        .collect();
    json!({ "wan": rows })
}
