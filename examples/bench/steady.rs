//! The rows of one run that lasts: latency, idle connections, connections a second, bulk; in this order, since what a
//! process has once taken it may not give back.

use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use tokio::time::{sleep, timeout};

use crate::bed::Bed;
use crate::contender::{BACKUP, Contender, Run, first_byte};
use crate::generator::{Bulk, Direction, Load, inside};
use crate::pinned::Pinned;
use crate::report::Report;
use crate::usage;
use crate::{Plan, Row, say};

/// How many connections are idle, and how many are new side by side.
const IDLE: usize = 1000;
const AT_ONCE: usize = 50;
/// Flows of the row with many.
const FLOWS: usize = 50;
/// What a peer takes at most to hear of a node, and of its addresses.
const WARM_UP: Duration = Duration::from_secs(3);
/// How long a process that has nothing to do is left to get there.
const SETTLE: Duration = Duration::from_secs(2);

/// What a transfer's figures are called.
struct Names {
    rate: &'static str,
    cpu: &'static str,
    far: Option<&'static str>,
}

/// All rows of a run that lasts, one contender after the other.
///
/// # Errors
/// When one does not come up or does not serve.
pub(crate) fn rows(bed: &Bed, plan: &Plan, report: &mut Report) -> Result<(), Failed> {
    if plan.wants(Row::Latency) {
        let way = bed.straight()?;
        let times = inside(&bed.client, move || way.round_trips(plan.round_trips))?;
        let (middle, high) = (micros(&times, 0.5), micros(&times, 0.99));
        report.note(format!("round trip of 64 B without a tunnel: p50 {middle:.0} us, p99 {high:.0} us"));
    }
    for contender in &plan.contenders {
        let run = contender.start(bed, &bed.client)?;
        first_byte(&run, &bed.client, BACKUP)?;
        let result = one(bed, plan, report, &run);
        run.leave(&bed.client)?;
        result?;
    }
    Ok(())
}

fn one(bed: &Bed, plan: &Plan, report: &mut Report, run: &Run<'_>) -> Result<(), Failed> {
    type Measure = fn(&Bed, &Plan, &mut Report, &Run<'_>) -> Result<(), Failed>;
    let rows: [(Row, &str, Measure); 4] = [
        (Row::Latency, "latency", latency),
        (Row::Idle, "idle", idle),
        (Row::Connections, "connections", connections),
        (Row::Bulk, "bulk", bulk),
    ];
    for (_, name, measure) in rows.into_iter().filter(|(row, ..)| plan.wants(*row)) {
        let start = Instant::now();
        measure(bed, plan, report, run)?;
        say(&format!("{:>11.1} s  {name}, {}", start.elapsed().as_secs_f32(), run.contender.name()));
    }
    Ok(())
}

fn latency(bed: &Bed, plan: &Plan, report: &mut Report, run: &Run<'_>) -> Result<(), Failed> {
    let way = run.way;
    // By then the path is the direct one.
    inside(&bed.client, move || async move {
        let ended = timeout(WARM_UP, way.round_trips(usize::MAX)).await;
        ended.map_or(Ok(()), |ended| ended.map(drop))
    })?;
    let measure = |report: &mut Report, [p50, p99]: [&'static str; 2]| -> Result<(), Failed> {
        for _ in 0..plan.rounds {
            let times = inside(&bed.client, move || way.round_trips(plan.round_trips))?;
            report.add(p50, run.contender, micros(&times, 0.5));
            report.add(p99, run.contender, micros(&times, 0.99));
        }
        Ok(())
    };
    measure(report, ["rtt-p50", "rtt-p99"])?;
    let [far, server] = bed.far_pids();
    let _pinned = Pinned::to_one(&[run.pid(), far, server])?;
    measure(report, ["rtt-one-p50", "rtt-one-p99"])
}

fn idle(bed: &Bed, plan: &Plan, report: &mut Report, run: &Run<'_>) -> Result<(), Failed> {
    let (way, pid) = (run.way, run.pid());
    let resident = move || usage::resident(pid).ok_or("the process is gone");
    std::thread::sleep(SETTLE);
    report.add("rss-idle", run.contender, resident()?);
    let used = || usage::cpu(pid).ok_or("the process is gone");
    let before = used()?;
    std::thread::sleep(plan.idle);
    let used = used()? - before;
    report.add("cpu-idle", run.contender, used.as_secs_f64() / plan.idle.as_secs_f64() * 100.0);
    let crowded = inside(&bed.client, move || async move {
        let (_, streams) = way.crowd(IDLE, 20).await?;
        sleep(SETTLE).await;
        let crowded = resident()?;
        drop(streams);
        Ok(crowded)
    })?;
    report.add("rss-1000", run.contender, crowded);
    Ok(())
}

fn connections(bed: &Bed, plan: &Plan, report: &mut Report, run: &Run<'_>) -> Result<(), Failed> {
    let way = run.way;
    let used = || usage::cpu(run.pid()).ok_or("the process is gone");
    for _ in 0..plan.rounds {
        let before = used()?;
        let count = inside(&bed.client, move || way.churn(AT_ONCE, plan.measured))?;
        let computed = used()? - before;
        report.add("churn", run.contender, count as f64 / plan.measured.as_secs_f64());
        report.add("churn-cpu", run.contender, computed.as_secs_f64() * 1e6 / count as f64);
    }
    Ok(())
}

fn bulk(bed: &Bed, plan: &Plan, report: &mut Report, run: &Run<'_>) -> Result<(), Failed> {
    let names = |rate, cpu, far| Names { rate, cpu, far: Some(far) };
    let rows = [
        (1, names("down-1", "down-1-cpu", "down-1-far"), names("up-1", "up-1-cpu", "up-1-far"), "rss-bulk-1"),
        (
            FLOWS,
            names("down-50", "down-50-cpu", "down-50-far"),
            names("up-50", "up-50-cpu", "up-50-far"),
            "rss-bulk-50",
        ),
    ];
    for (flows, down, up, memory) in rows {
        for _ in 0..plan.rounds {
            transfer(bed, plan, report, run, (Direction::Down, flows, &down))?;
            transfer(bed, plan, report, run, (Direction::Up, flows, &up))?;
        }
        report.add(memory, run.contender, usage::resident(run.pid()).ok_or("the process is gone")?);
    }
    Ok(())
}

/// The rows over DERP: a run of its own, from which no datagram reaches the far end.
///
/// # Errors
/// When one does not come up or does not serve.
pub(crate) fn relayed(bed: &Bed, plan: &Plan, report: &mut Report) -> Result<(), Failed> {
    bed.relay_only(&bed.client, true)?;
    let result = plan.contenders.iter().try_for_each(|contender| relayed_one(bed, plan, report, *contender));
    bed.relay_only(&bed.client, false)?;
    result
}

fn relayed_one(bed: &Bed, plan: &Plan, report: &mut Report, contender: Contender) -> Result<(), Failed> {
    let run = contender.start(bed, &bed.client)?;
    first_byte(&run, &bed.client, BACKUP)?;
    let (way, count) = (run.way, plan.round_trips / 2);
    let names = |rate, cpu| Names { rate, cpu, far: None };
    let (down, up) = (names("derp-down", "derp-down-cpu"), names("derp-up", "derp-up-cpu"));
    for _ in 0..plan.rounds.min(2) {
        let times = inside(&bed.client, move || way.round_trips(count))?;
        report.add("derp-rtt", contender, micros(&times, 0.5));
        transfer(bed, plan, report, &run, (Direction::Down, 1, &down))?;
        transfer(bed, plan, report, &run, (Direction::Up, 1, &up))?;
    }
    run.leave(&bed.client).map(drop)
}

fn transfer(
    bed: &Bed,
    plan: &Plan,
    report: &mut Report,
    run: &Run<'_>,
    (direction, flows, names): (Direction, usize, &Names),
) -> Result<(), Failed> {
    let [daemon, server] = bed.far_pids();
    let watched = [run.pid(), daemon, server];
    let load = Load { direction, flows, warm_up: plan.warm_up, measured: plan.measured, watched: &watched };
    let (way, mut counts) = (run.way, bed.counts()?);
    let bulk: Bulk = inside(&bed.client, || async { way.bulk(&load, &mut counts).await })?;
    report.add(names.rate, run.contender, bulk.rate());
    report.add(names.cpu, run.contender, bulk.cost(0));
    if let Some(far) = names.far {
        report.add(far, run.contender, bulk.cost(1) + bulk.cost(2));
    }
    Ok(())
}

/// A quantile of sorted times.
pub(crate) fn micros(sorted: &[Duration], quantile: f64) -> f64 {
    let place = (sorted.len().saturating_sub(1) as f64 * quantile).round();
    sorted.get(place as usize).map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
}
