//! The end of a run: what is said of it, what is still open has a moment to finish, and the logout.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{JoinHandle, yield_now};
use tokio::time::timeout;

use super::line::Tally;
use super::report::Report;
use super::run::Job;
use super::stops::{Stops, exit_of, signal_name};
use crate::fault::{self, Fault};
use crate::lapse::Lapse;
use crate::node::{Logout, Node};
use crate::proxy;

/// How the time between start and logout ended.
#[derive(Debug)]
pub(super) enum End {
    Stopped(String),
    /// A command that was never started: why, and the exit status.
    Unstarted(String, u8),
    Child(u8),
    Failed(Fault),
}

/// Connections that are open when the run ends have this long to finish by themselves. Then they are cut.
const DRAIN: Duration = Duration::from_millis(500);

/// Turns that the connections have to notice that they are cut: enough for sixty thousand of them.
const TURNS: usize = 1_000;

/// What policy refused in this run, what it let out of the tailnet, and what the end cut.
fn tally(stats: &proxy::Stats, node: &Node, (cut, cut_idle): (u64, u64)) -> Tally {
    let mut refused = BTreeMap::new();
    for (place, times) in stats.counters().refused.into_values().flat_map(|refused| refused.destinations) {
        *refused.entry(place).or_default() += times;
    }
    Tally { refused, direct: node.outside(), cut, cut_idle }
}

/// The run ends before there was a node.
pub(super) fn unjoined(job: &Job, report: &Report, end: End) -> u8 {
    let (outcome, code) = said(job, report, end);
    if let Ok(reason) = outcome {
        report.ended(&reason, Logout::NotNeeded, code, &Tally::default());
    }
    code
}

/// Takes the ready file away, and says a failure. Returns the reason or the failure, and the exit status.
fn said(job: &Job, report: &Report, end: End) -> (Result<String, Fault>, u8) {
    report.leaving();
    match end {
        End::Stopped(reason) => (Ok(reason), 0),
        End::Unstarted(reason, code) => (Ok(format!("{reason} before the command was started")), code),
        End::Child(code) => (Ok(format!("command exited with {code}")), code),
        End::Failed(fault) => {
            let exit = job.exit_of(&fault);
            report.failed(&fault, exit, None);
            (Err(fault), exit)
        }
    }
}

/// What has to be taken down at the end.
pub(super) struct Farewell {
    pub(super) node: Node,
    pub(super) serving: JoinHandle<io::Result<()>>,
    pub(super) stops: Stops,
    pub(super) stats: Arc<proxy::Stats>,
    pub(super) limit: Duration,
    pub(super) strict: bool,
}

/// Says how it ended, lets connections finish, logs out; a second signal cuts that short.
pub(super) async fn leave(job: &Job, report: &Report, end: End, mut farewell: Farewell) -> u8 {
    let (outcome, code) = said(job, report, end);
    let (limit, cut) = (farewell.limit, Cell::new((0, 0)));
    let goodbye = async {
        match timeout(DRAIN, &mut farewell.serving).await {
            Ok(Ok(Err(error))) => tracing::warn!(%error, "the proxy stopped early"),
            Ok(_) => {}
            Err(_) => {
                // Before the logout, so that targets, too, learn that it is over.
                let (busy, idle) = cut_all(&mut farewell.serving, &farewell.stats).await;
                cut.set((busy, idle));
                report.cut(busy, idle, DRAIN);
            }
        }
        // The node keeps its own limit; this one only guards against a node that does not.
        timeout(limit + DRAIN, farewell.node.shutdown(limit)).await.unwrap_or(Logout::Unconfirmed)
    };
    let logout = tokio::select! {
        logout = goodbye => logout,
        signal = farewell.stops.next_signal() => {
            let reason = format!("second signal {}", signal_name(signal));
            report.ended(&reason, Logout::Unconfirmed, exit_of(signal), &tally(&farewell.stats, &farewell.node, cut.get()));
            return exit_of(signal);
        }
    };
    let tally = tally(&farewell.stats, &farewell.node, cut.get());
    if logout == Logout::Unconfirmed {
        let row = &fault::LOGOUT_UNCONFIRMED;
        let fault = Fault::new(row, format!("control did not confirm the logout within {}", Lapse(limit)));
        if farewell.strict && code == 0 {
            report.failed(&fault, row.exit, Some(&tally));
            return row.exit;
        }
        report.warn(&fault);
    }
    match outcome {
        Ok(reason) => report.ended(&reason, logout, code, &tally),
        Err(fault) => report.failed_before(&fault, code, &tally),
    }
    code
}

/// Cuts what is still open; how many tunnels and answers were busy, and how many tunnels idle.
async fn cut_all(serving: &mut JoinHandle<io::Result<()>>, stats: &proxy::Stats) -> (u64, u64) {
    let unfinished = stats.counters().unfinished;
    serving.abort();
    let _ = serving.await;
    // Whoever was cut runs once more, and lets go of its connection: a few dozen of them before it is our turn again.
    for _ in 0..TURNS {
        yield_now().await;
        if stats.counters().unfinished == 0 {
            break;
        }
    }
    let idle = stats.counters().cut_idle.min(unfinished);
    (unfinished - idle, idle)
}
