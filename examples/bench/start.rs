//! The rows of a start and of an end: how soon the proxy listens, how soon a byte comes, how soon the node is gone.

use std::time::Duration;

use libtest_mimic::Failed;

use crate::Plan;
use crate::bed::{Bed, TRAP};
use crate::contender::{BACKUP, Contender, Run, alone, first_byte};
use crate::line::{Line, Shape};
use crate::namespace::Namespace;
use crate::report::Report;

/// The round trip of the distant host.
const DISTANT: Duration = Duration::from_millis(100);

/// How often headscale tells peers of changes by default. Source: headscale 0.29, `tuning.batch_change_delay`.
const HEADSCALES_PERIOD: Duration = Duration::from_millis(800);

/// A browser that has one connection, and waits for it.
const PATIENT: Duration = Duration::from_secs(5);

/// All rows of a start, for everybody in turn, so that a machine that changes changes for all.
///
/// # Errors
/// When somebody does not come up.
pub(crate) fn rows(bed: &Bed, plan: &Plan, report: &mut Report) -> Result<(), Failed> {
    for _ in 0..plan.starts {
        for contender in &plan.contenders {
            at_any_time();
            let run = contender.start(bed, &bed.client)?;
            report.add("bound", *contender, ms(run.bound - run.exec));
            let first = first_byte(&run, &bed.client, BACKUP)? - run.exec;
            report.add("first", *contender, ms(first));
            if let Some([register, map]) = answers(&run)? {
                report.add("register", *contender, ms(register));
                report.add("map", *contender, ms(map));
                report.add("first-own", *contender, ms(first) - ms(register));
            }
            let left = run.leave(&bed.client)?;
            report.add("leave", *contender, left.map_or(f64::INFINITY, ms));
        }
    }
    bed.client.ip(&format!("route add default via {TRAP}"))?;
    let early = variant(bed, &bed.client, plan, report, ["early", "early-own"], Duration::ZERO, PATIENT);
    bed.client.ip("route del default")?;
    early?;
    let shape = Shape { delay: DISTANT / 2, ..Shape::default() };
    let (distant, line) = bed.host("distant", 41, |host, wan, port| Line::lay(host, wan, port, shape))?;
    let rows = variant(bed, &distant, plan, report, ["distant", "distant-own"], DISTANT, BACKUP);
    drop(line);
    rows
}

/// The first byte from another place. The register's own round trip counts as ours.
fn variant(
    bed: &Bed,
    host: &Namespace,
    plan: &Plan,
    report: &mut Report,
    [whole, own]: [&'static str; 2],
    trip: Duration,
    hangs: Duration,
) -> Result<(), Failed> {
    for _ in 0..(plan.starts / 2).max(1) {
        for contender in &plan.contenders {
            at_any_time();
            let run = contender.start(bed, host)?;
            let first = first_byte(&run, host, hangs)? - run.exec;
            report.add(whole, *contender, ms(first));
            if let Some([register, _]) = answers(&run)? {
                report.add(own, *contender, ms(first) - ms(register.saturating_sub(trip)));
            }
            run.leave(host)?;
        }
    }
    alone(bed)
}

/// headscale does much of its work at fixed times, and a loop would start everybody at the same distance from them.
fn at_any_time() {
    std::thread::sleep(HEADSCALES_PERIOD.mul_f64(rand::random()));
}

/// tailcar tells when it asked and was answered; the others do not.
fn answers(run: &Run<'_>) -> Result<Option<[Duration; 2]>, Failed> {
    match run.contender {
        Contender::Tailcar => Ok(Some(run.answers().ok_or("tailcar's log does not tell of its join")?)),
        Contender::Tailscaled | Contender::Meshd => Ok(None),
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
