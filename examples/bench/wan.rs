//! The WAN table: one flow over a line of 200 Mbit/s with a queue of one round trip, through each, and without a tunnel.
//!
//! Each has a host and a line of its own. Where loss rules, the rates are low and all run side by side; where the line
//! is filled, one after the other. A transfer takes 70 round trips, but 4 s at least: a slow start to the line's rate
//! takes about eight of them, so that it costs a tenth of the rate at 100 ms.

use std::fmt::Write as _;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

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
/// A node that has just joined finds its direct path within this, while somebody talks: what a relay loses before is no
/// figure of the line.
const SETTLED: Duration = Duration::from_secs(2);

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

/// A line, and what is aimed at over it.
#[derive(Debug, Clone, Copy)]
struct Condition {
    /// Round trip in milliseconds.
    trip: u64,
    /// Percent lost each way.
    percent: f64,
    aim: Aim,
}

const CONDITIONS: [Condition; 6] = [
    Condition { trip: 20, percent: 0.0, aim: Aim::AtLeast(175.0) },
    Condition { trip: 20, percent: 0.1, aim: Aim::Linux },
    Condition { trip: 20, percent: 1.0, aim: Aim::Best },
    Condition { trip: 100, percent: 0.0, aim: Aim::AtLeast(155.0) },
    Condition { trip: 100, percent: 0.1, aim: Aim::Linux },
    Condition { trip: 100, percent: 1.0, aim: Aim::Best },
];

/// A line that was asked for: a place in [`CONDITIONS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Choice(usize);

impl FromStr for Choice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let place = CONDITIONS.iter().position(|condition| condition.name() == name);
        place.map(Self).ok_or_else(|| format!("the lines are {}", CONDITIONS.map(Condition::name).join(", ")))
    }
}

impl Condition {
    fn name(self) -> String {
        format!("{}/{}", self.trip, self.percent)
    }

    fn is_lossy(self) -> bool {
        self.percent > 0.0
    }

    fn shape(self) -> Result<Shape, Failed> {
        let queue = usize::try_from(RATE / 8 * self.trip / 1000)?;
        Ok(Shape { delay: Duration::from_millis(self.trip) / 2, rate: RATE, queue, loss: self.percent / 100.0 })
    }

    /// How long one transfer is measured.
    fn measured(self, quick: bool) -> Duration {
        if quick { Duration::from_secs(3) } else { Duration::from_millis(self.trip * 70).max(Duration::from_secs(4)) }
    }
}

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
    let places: Vec<_> =
        (0..CONDITIONS.len()).filter(|place| plan.lines.is_empty() || plan.lines.contains(&Choice(*place))).collect();
    let mut lanes = Vec::new();
    if plan.contenders.len() > 1 || places.iter().any(|place| matches!(CONDITIONS[*place].aim, Aim::Linux)) {
        lanes.push(lane(bed, None, 51)?);
    }
    for (number, contender) in (52..).zip(&plan.contenders) {
        lanes.push(lane(bed, Some(*contender), number)?);
    }
    let mut rates: Vec<Rates> = lanes.iter().map(|_| vec![Default::default(); CONDITIONS.len()]).collect();
    for &place in &places {
        let condition = CONDITIONS[place];
        let (shape, measured) = (condition.shape()?, condition.measured(plan.quick));
        for lane in &lanes {
            lane.line.reshape(shape);
            // Who goes by the round trip that it knows learns the new one.
            lane.run.as_ref().map(|run| first_byte(run, &lane.host, BACKUP)).transpose()?;
        }
        for _ in 0..plan.wan_rounds {
            for (side, direction) in [Direction::Down, Direction::Up].into_iter().enumerate() {
                let came = round(bed, &lanes, direction, condition.is_lossy(), measured)?;
                rates.iter_mut().zip(came).for_each(|(rates, rate)| rates[place][side].push(rate));
                thread::sleep(CALM);
            }
        }
        say(&format!("{} done", condition.name()));
    }
    let names: Vec<_> = lanes.iter().map(|lane| (lane.contender, lane.name())).collect();
    for lane in lanes {
        if let Some(run) = lane.run {
            run.leave(&lane.host)?;
        }
    }
    Ok((text(&names, &rates, &places), json(&names, &rates, &places)))
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
    let settled = first_byte(&run, &host, BACKUP)? + SETTLED;
    while Instant::now() < settled {
        thread::sleep(CALM);
        first_byte(&run, &host, BACKUP)?;
    }
    let way = run.way;
    Ok(Lane { contender: Some(contender), way, run: Some(run), line, host })
}

/// A lane's median, by the place of its condition and its direction.
fn middle(rates: &Rates, place: usize, side: usize) -> f64 {
    median(&rates[place][side]).unwrap_or(f64::NAN)
}

/// What we are held to there, if we and they were measured.
fn wanted(names: &[(Option<Contender>, &str)], rates: &[Rates], place: usize, side: usize) -> f64 {
    let others = names.iter().zip(rates).filter(|((who, _), _)| who.is_some_and(|who| who != Contender::Tailcar));
    match CONDITIONS[place].aim {
        Aim::AtLeast(rate) => rate,
        Aim::Linux => middle(&rates[0], place, side),
        Aim::Best => others.map(|(_, rates)| middle(rates, place, side)).fold(0.0, f64::max),
    }
}

fn text(names: &[(Option<Contender>, &str)], rates: &[Rates], places: &[usize]) -> String {
    let mut out = format!("{:<22}", "Mbit/s, down / up");
    for (_, name) in names {
        let _ = write!(out, "{name:>17}");
    }
    let _ = writeln!(out, "{:>17}", "aim");
    for &place in places {
        let Condition { trip, percent, .. } = CONDITIONS[place];
        let _ = write!(out, "{:<22}", format!("{trip} ms, {percent} %"));
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

fn json(names: &[(Option<Contender>, &str)], rates: &[Rates], places: &[usize]) -> Value {
    let rows: Vec<_> = places
        .iter()
        .map(|&place| {
            let Condition { trip, percent, .. } = CONDITIONS[place];
            let lanes: serde_json::Map<_, _> = names
                .iter()
                .zip(rates)
                .map(|((_, name), rates)| ((*name).to_owned(), json!({"down": rates[place][0], "up": rates[place][1]})))
                .collect();
            let aims = [0, 1].map(|side| wanted(names, rates, place, side));
            json!({"round_trip_ms": trip, "loss": percent / 100.0, "mbit_s": lanes, "aim": {"down": aims[0], "up": aims[1]}})
        })
        .collect();
    json!({ "wan": rows })
}
