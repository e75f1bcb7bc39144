//! Many at once: ten thousand connections through one proxy, and a hundred sidecars on one machine.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;

use crate::Plan;
use crate::bed::Bed;
use crate::contender::{BACKUP, Contender, Run, first_byte};
use crate::fleet::Fleet;
use crate::generator::inside;
use crate::report::Report;
use crate::steady::micros;
use crate::usage;

/// Connections of the crowd.
const CONNECTIONS: usize = 10_000;
/// How many of them are new side by side.
const NEW: usize = 100;
/// Sidecars of the fleet.
const SIDECARS: usize = 100;

/// Ten thousand connections that are open at once, a hundred of them new side by side; then all at one moment.
///
/// # Errors
/// When one does not come up. That it does not serve them all is a figure: never.
pub(crate) fn connections(bed: &Bed, plan: &Plan, report: &mut Report) -> Result<(), Failed> {
    for contender in &plan.contenders {
        let run = contender.start(bed, &bed.client)?;
        first_byte(&run, &bed.client, BACKUP)?;
        for (id, at_once) in [("crowd-p99", NEW), ("burst-p99", CONNECTIONS)] {
            let p99 = match crowd(bed, &run, at_once) {
                Ok((p99, resident)) => {
                    if at_once == NEW {
                        report.add("crowd-rss", *contender, resident);
                    }
                    p99
                }
                Err(error) => {
                    let why = error.message().unwrap_or("failed").to_owned();
                    report.note(format!("10,000 connections, {at_once} new at once, {}: {why}", contender.name()));
                    f64::INFINITY
                }
            };
            report.add(id, *contender, p99);
        }
        run.leave(&bed.client)?;
    }
    Ok(())
}

/// The 99th of a hundred waits, in ms, and the memory when all are open.
fn crowd(bed: &Bed, run: &Run<'_>, at_once: usize) -> Result<(f64, f64), Failed> {
    let (way, pid) = (run.way, run.pid());
    inside(&bed.client, move || async move {
        let (times, streams) = way.crowd(CONNECTIONS, at_once).await?;
        let resident = usage::resident(pid).ok_or("the process is gone")?;
        drop(streams);
        Ok((micros(&times, 0.99) / 1000.0, resident))
    })
}

/// A hundred tailcars, all started at once: how long until the last is ready, and what they take together.
///
/// # Errors
/// When one of them is not ready in time.
pub(crate) fn sidecars(bed: &Bed, report: &mut Report) -> Result<(), Failed> {
    let start = Instant::now();
    let fleet = Fleet::start(bed, &bed.client, SIDECARS)?;
    let mut waiting: VecDeque<_> = (0..SIDECARS).collect();
    while let Some(number) = waiting.pop_front() {
        if !fleet.ready(number) {
            waiting.push_front(number);
            std::thread::sleep(Duration::from_millis(2));
        }
        if start.elapsed() > LIMIT {
            return Err(format!("{} of {SIDECARS} sidecars are not ready after {LIMIT:?}", waiting.len()).into());
        }
    }
    report.add("fleet", Contender::Tailcar, start.elapsed().as_secs_f64());
    report.add("fleet-memory", Contender::Tailcar, fleet.memory());
    fleet.leave(bed)
}

/// When the fleet is given up.
const LIMIT: Duration = Duration::from_secs(60);
