//! What the log says of a region's relays: each complaint and its end once, and of a relay that changes its mind all
//! the time a few lines of each kind, then one a minute. A problem ends with the connection too, which says so.
//!
//! A problem that a relay tells does not move the home, and neither do its limits: it still carries what it is given, as
//! fast as it says. Two nodes with one key would meet again in the next region, and what lacks there is the other node's
//! end, which the line asks for. What a relay no longer carries is noticed by itself, and moves the home then.
//! Source: Tailscale, wgengine/magicsock, `runDerpReader`, which notes a `HealthMessage` and goes on.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::DerpError;
use crate::netmap::RegionId;

/// Complaints of a kind that may follow each other at once.
const BURST: u32 = 5;
/// How long until one more may.
const REFILL: Duration = Duration::from_secs(60);
/// Characters of a problem that are told: a relay may send a mebibyte of them.
const PROBLEM_MAX: usize = 200;

/// What was said of one region. Outlives its connections: one that cannot be used is tried again and again.
#[derive(Debug)]
pub struct Complaints {
    region: RegionId,
    /// Each by itself: that connections are lost shall not keep it from being said that none can be made.
    losses: Allowance,
    outages: Allowance,
    problems: Allowance,
    doubts: Allowance,
    /// Whether it was said that the connection is lost, and that none can be made.
    lost: bool,
    unusable: bool,
    /// Whether it was said that the relay does not answer.
    silent: bool,
    /// The problem of the relay's that was said last; empty for none.
    problem: String,
}

impl Complaints {
    /// Of this region nothing was said yet.
    pub fn new(region: RegionId) -> Self {
        let full = [(); 4].map(|()| Allowance { left: BURST, counted_at: Instant::now() });
        let [losses, outages, problems, doubts] = full;
        let [lost, unusable, silent] = [false; 3];
        Self { region, losses, outages, problems, doubts, lost, unusable, silent, problem: String::new() }
    }

    /// A new connection begins, whose relay has told no problem.
    pub(super) fn begin(&mut self) {
        self.problem.clear();
    }

    /// Says why the connection is lost, and why it could not be made again, once until it could.
    pub(super) fn note_loss(&mut self, error: &DerpError, admitted: bool) {
        let region = self.region;
        self.problem.clear();
        // A relay that closes instead of admitting us does not know us: that is no connection that was lost.
        let ends = matches!(error, DerpError::Closed { .. } | DerpError::Restarting { .. } | DerpError::Silent { .. });
        let lost = admitted && ends;
        if lost && self.losses.take() {
            info!(region, %error, "derp connection lost");
            self.lost = true;
        } else if !lost && !self.unusable && self.outages.take() {
            warn!(region, %error, "derp region cannot be used");
            self.unusable = true;
        } else {
            debug!(region, %error, "derp connection lost");
        }
    }

    /// A relay has admitted us. The end of a complaint is as loud as that was.
    pub(super) fn note_admitted(&mut self) {
        let unusable = std::mem::take(&mut self.unusable) | std::mem::take(&mut self.silent);
        match (unusable, std::mem::take(&mut self.lost)) {
            (true, _) => warn!(region = self.region, "derp region can be used again"),
            (false, true) => info!(region = self.region, "derp region can be used again"),
            (false, false) => {}
        }
    }

    /// Says that the relay has not answered for a while; its connection may still be lost for that.
    pub(super) fn note_doubt(&mut self) {
        if !self.silent && self.doubts.take() {
            warn!(region = self.region, "derp relay does not answer");
            self.silent = true;
        }
    }

    /// Says that the relay answers again, as loud as that it does not was said.
    pub(super) fn note_answer(&mut self) {
        if std::mem::take(&mut self.silent) {
            warn!(region = self.region, "derp relay answers again");
        } else {
            debug!(region = self.region, "derp relay answers again");
        }
    }

    /// Says a problem that the relay tells, or that it is over.
    pub(super) fn note_problem(&mut self, problem: &str) {
        let (region, problem) = (self.region, problem.chars().take(PROBLEM_MAX).collect::<String>());
        if problem == self.problem {
            return;
        }
        if problem.is_empty() {
            warn!(region, "derp healthy again");
        } else if self.problems.take() {
            warn!(region, problem, "derp reports a problem");
        } else {
            debug!(region, problem, "derp reports a problem");
            return;
        }
        self.problem = problem;
    }
}

/// How many more complaints of a kind may be said now, as of when.
#[derive(Debug)]
struct Allowance {
    left: u32,
    counted_at: Instant,
}

impl Allowance {
    /// Whether one more may be said. The ends of those that were need no permission.
    fn take(&mut self) -> bool {
        while self.left < BURST && self.counted_at.elapsed() >= REFILL {
            self.left += 1;
            self.counted_at += REFILL;
        }
        if self.left == BURST {
            self.counted_at = Instant::now();
        }
        let may = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io::{self, Write};
    use std::rc::Rc;
    use std::sync::{Arc, Mutex};

    use tokio::time::{advance, timeout};
    use tracing::subscriber::with_default;

    use super::*;
    use crate::key::NodePrivate;
    use crate::transport::bed::underlay;
    use crate::transport::derp::{ConnectionId, Region};
    use crate::transport::link::Link;

    /// What is logged at info level and above.
    #[derive(Debug, Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(octets)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Log {
        /// The lines since the last time, each from its level on.
        fn of(&self, act: impl FnOnce()) -> Vec<String> {
            let log = self.clone();
            let subscriber = tracing_subscriber::fmt().without_time().with_target(false).with_ansi(false);
            with_default(subscriber.with_writer(move || log.clone()).finish(), act);
            let octets = std::mem::take(&mut *self.0.lock().unwrap());
            String::from_utf8(octets).unwrap().lines().map(|line| line.trim_start().to_owned()).collect()
        }
    }

    fn closed() -> DerpError {
        DerpError::Closed { host: "relay".to_owned(), detail: "closed by the other side".to_owned() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_that_changes_its_mind_all_the_time_is_told_of_a_few_times_and_then_once_a_minute() {
        let (mut complaints, log) = (Complaints::new(7), Log::default());
        let mut hour = async |problems: [&str; 2]| {
            let mut lines = 0;
            for second in 0..3600 {
                lines += log.of(|| complaints.note_problem(problems[second % 2])).len();
                advance(Duration::from_secs(1)).await;
            }
            lines
        };
        assert_eq!(hour(["one", "another"]).await, 5 + 59);
        // The end of what was told is told, of what was not is not.
        assert_eq!(hour(["one", ""]).await, 2 * 60);
    }

    #[test]
    fn a_region_that_cannot_be_used_is_told_of_once_however_often_it_is_opened() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let _entered = runtime.enter();
        let (complaints, log) = (Rc::new(RefCell::new(Complaints::new(7))), Log::default());
        let mut lines = Vec::new();
        for number in 1..4 {
            let underlay = underlay(Link::default());
            let id = ConnectionId { region: 7, number };
            let (_region, task) = Region::new(id, Vec::new(), NodePrivate::random(), underlay, complaints.clone());
            let run = timeout(Duration::from_secs(300), task.run(|_, _| {}));
            lines.extend(log.of(|| drop(runtime.block_on(run))));
        }
        assert_eq!(lines, ["WARN derp region cannot be used region=7 error=the region has no usable relay"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_region_that_is_lost_is_told_of_once_and_so_is_its_return() {
        let (mut complaints, log) = (Complaints::new(7), Log::default());
        let again = |level: &str| [format!("{level} derp region can be used again region=7")];
        assert!(log.of(|| complaints.note_admitted()).is_empty(), "nobody complained");
        let lost = log.of(|| {
            complaints.note_loss(&closed(), true);
            (0..100).for_each(|_| complaints.note_loss(&DerpError::Empty, false));
        });
        let reason = "error=the connection to relay relay ended: closed by the other side";
        let unusable = "WARN derp region cannot be used region=7 error=the region has no usable relay";
        assert_eq!(lost, [format!("INFO derp connection lost region=7 {reason}"), unusable.to_owned()]);
        assert_eq!(log.of(|| complaints.note_admitted()), again("WARN"));
        assert!(log.of(|| complaints.note_admitted()).is_empty());
        assert_eq!(log.of(|| complaints.note_loss(&closed(), true)).len(), 1);
        assert_eq!(log.of(|| complaints.note_admitted()), again("INFO"));
        let problem = log.of(|| ["full", ""].iter().for_each(|problem| complaints.note_problem(problem)));
        let lines = ["WARN derp reports a problem region=7 problem=\"full\"", "WARN derp healthy again region=7"];
        assert_eq!(problem, lines);
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_that_falls_silent_is_lost_and_one_that_never_spoke_cannot_be_used() {
        let (mut complaints, log) = (Complaints::new(7), Log::default());
        let silent = || DerpError::Silent { host: "relay".to_owned(), limit: Duration::from_secs(15) };
        let reason = "region=7 error=relay relay was silent for 15s";
        let lost = log.of(|| complaints.note_loss(&silent(), true));
        assert_eq!(lost, [format!("INFO derp connection lost {reason}")]);
        let unusable = log.of(|| complaints.note_loss(&silent(), false));
        assert_eq!(unusable, [format!("WARN derp region cannot be used {reason}")]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_that_hangs_is_told_of_once_and_so_is_its_answer_or_its_return() {
        let (mut complaints, log) = (Complaints::new(7), Log::default());
        assert!(log.of(|| complaints.note_answer()).is_empty(), "nobody complained");
        let hangs = ["WARN derp relay does not answer region=7"];
        assert_eq!(log.of(|| (0..2).for_each(|_| complaints.note_doubt())), hangs);
        assert_eq!(log.of(|| complaints.note_answer()), ["WARN derp relay answers again region=7"]);
        assert_eq!(log.of(|| complaints.note_doubt()), hangs);
        assert_eq!(log.of(|| complaints.note_loss(&closed(), true)).len(), 1);
        assert_eq!(log.of(|| complaints.note_admitted()), ["WARN derp region can be used again region=7"]);
        assert_eq!(log.of(|| (0..10).for_each(|_| (complaints.note_doubt(), complaints.note_answer()).1)).len(), 6);
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_that_admits_us_and_closes_again_and_again_does_not_fill_the_log() {
        let (mut complaints, log) = (Complaints::new(7), Log::default());
        let mut lines = 0;
        for _ in 0..595 {
            lines += log.of(|| complaints.note_admitted()).len();
            lines += log.of(|| complaints.note_loss(&closed(), true)).len();
            advance(Duration::from_secs(6)).await;
        }
        assert_eq!(lines, 2 * (5 + 59));
        // One that stays away then is told of at once.
        assert_eq!(log.of(|| complaints.note_loss(&DerpError::Empty, false)).len(), 1);
    }
}
