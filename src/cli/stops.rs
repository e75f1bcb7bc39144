//! Everything from outside that ends a run: signals, the parent's death, the end of standard input, time.

use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, getppid, pidfd_open};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep};

use super::settings::Life;
use crate::fault::{self, Fault};

/// Why a run is to end, or what its child is to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// A signal came.
    Signal(Signal),
    /// The process that started us is gone.
    Parent,
    /// Standard input has ended.
    StdinEof,
    /// `--max-lifetime` has passed.
    Lifetime,
}

impl Stop {
    /// The reason as the status file has it.
    pub(super) fn reason(self) -> String {
        match self {
            Self::Signal(signal) => format!("signal {}", signal_name(signal)),
            Self::Parent => String::from("parent ended"),
            Self::StdinEof => String::from("standard input ended"),
            Self::Lifetime => String::from("max-lifetime"),
        }
    }
}

/// Signals that end `run`. A terminal that closes sends HUP.
pub(super) const ENDING: [Signal; 4] = [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT];

/// Signals that `exec` passes on.
pub(super) const PASSED_ON: [Signal; 6] =
    [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2];

/// The same signal within this time is the same wish: `timeout` and shells tell the process and then its group.
const ECHO: Duration = Duration::from_millis(300);

/// How often a parent without a pidfd is looked at.
const PARENT_POLL: Duration = Duration::from_secs(1);

/// The stops as they come.
#[derive(Debug)]
pub(super) struct Stops {
    queue: mpsc::UnboundedReceiver<Stop>,
    // Also keeps the queue open when nothing watches.
    sender: mpsc::UnboundedSender<Stop>,
}

impl Stops {
    /// Begins to watch all but standard input. Needs a local runtime.
    ///
    /// # Errors
    /// `TC-2007` when the operating system refuses.
    pub(super) fn watch(life: &Life, signals: &[Signal]) -> Result<Self, Fault> {
        let (sender, queue) = mpsc::unbounded_channel();
        for kind in signals {
            let kind = *kind;
            let mut stream = signal(SignalKind::from_raw(kind.as_raw())).map_err(|error| refused("signals", &error))?;
            let sender = sender.clone();
            spawn_local(async move {
                let mut last: Option<Instant> = None;
                while stream.recv().await.is_some() {
                    let echo = ENDING.contains(&kind) && last.is_some_and(|at| at.elapsed() < ECHO);
                    if !echo && sender.send(Stop::Signal(kind)).is_err() {
                        return;
                    }
                    last = Some(Instant::now());
                }
            });
        }
        if life.with_parent {
            match getppid() {
                Some(parent) => in_thread("parent", Stop::Parent, &sender, move || wait_for_end(parent))?,
                None => tracing::warn!("the parent is outside of this process namespace; its end cannot be seen"),
            }
        }
        if let Some(limit) = life.max_lifetime {
            let sender = sender.clone();
            spawn_local(async move {
                sleep(limit).await;
                // The run may be over already.
                let _ = sender.send(Stop::Lifetime);
            });
        }
        Ok(Self { queue, sender })
    }

    /// Begins to watch standard input, which is read and forgotten from now on: the key's line is taken by then.
    ///
    /// # Errors
    /// `TC-2007` when the operating system refuses.
    pub(super) fn watch_stdin(&self) -> Result<(), Fault> {
        in_thread("stdin", Stop::StdinEof, &self.sender, read_to_end_of_stdin)
    }

    /// The next stop.
    pub(super) async fn next(&mut self) -> Stop {
        match self.queue.recv().await {
            Some(stop) => stop,
            // Unreachable while `sender` lives; waiting for ever is what "no stop" means.
            None => std::future::pending().await,
        }
    }

    /// The next signal; other stops are of no interest to somebody who leaves already.
    pub(super) async fn next_signal(&mut self) -> Signal {
        loop {
            if let Stop::Signal(signal) = self.next().await
                && ENDING.contains(&signal)
            {
                return signal;
            }
        }
    }
}

/// Waits for something that only a thread can wait for. The thread ends with the process.
fn in_thread(
    name: &str,
    stop: Stop,
    to: &mpsc::UnboundedSender<Stop>,
    wait: impl FnOnce() + Send + 'static,
) -> Result<(), Fault> {
    let to = to.clone();
    let body = move || {
        wait();
        // The run may be over already.
        let _ = to.send(stop);
    };
    let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(body).map(drop);
    spawned.map_err(|error| refused("a thread", &error))
}

fn refused(what: &str, error: &std::io::Error) -> Fault {
    Fault::new(&fault::OS_REFUSED, format!("{what}: {error}"))
}

/// Returns when `parent` has ended. A pidfd tells at once and knows nothing of threads; the death signal of prctl
/// would come when the thread that started us ends, which for a Go or Node parent means nothing.
fn wait_for_end(parent: Pid) {
    if let Ok(pidfd) = pidfd_open(parent, PidfdFlags::empty())
        && getppid() == Some(parent)
    {
        let mut watched = [PollFd::new(&pidfd, PollFlags::IN)];
        while matches!(poll(&mut watched, None), Err(Errno::INTR)) {}
    }
    // Also the way on kernels without pidfds.
    while getppid() == Some(parent) {
        std::thread::sleep(PARENT_POLL);
    }
}

fn read_to_end_of_stdin() {
    let mut buffer = [0u8; 512];
    loop {
        match rustix::io::read(rustix::stdio::stdin(), &mut buffer) {
            Ok(0) => return,
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// `SIGTERM` for TERM.
pub(super) fn signal_name(signal: Signal) -> String {
    match signal {
        Signal::TERM => String::from("SIGTERM"),
        Signal::INT => String::from("SIGINT"),
        Signal::HUP => String::from("SIGHUP"),
        Signal::QUIT => String::from("SIGQUIT"),
        other => other.as_raw().to_string(),
    }
}

/// The exit status of whoever ends by a signal.
pub(super) fn exit_of(signal: Signal) -> u8 {
    u8::try_from(128 + signal.as_raw()).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use rustix::process::{getpid, kill_process};
    use tokio::task::{LocalSet, yield_now};

    use super::*;

    const NOTHING: Life = Life {
        ready_timeout: Duration::from_secs(1),
        logout_timeout: Duration::from_secs(1),
        strict_logout: false,
        max_lifetime: None,
        idle_timeout: None,
        with_parent: false,
        on_stdin_eof: false,
    };

    #[tokio::test(start_paused = true)]
    async fn the_lifetime_ends_a_run() {
        let life = Life { max_lifetime: Some(Duration::from_secs(90)), ..NOTHING };
        let watched = async {
            let started = Instant::now();
            let stop = Stops::watch(&life, &[]).unwrap().next().await;
            assert_eq!((stop, started.elapsed().as_secs()), (Stop::Lifetime, 90));
        };
        LocalSet::new().run_until(watched).await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_signal_within_300_ms_of_the_last_is_the_same_wish() {
        let watched = async {
            let mut stops = Stops::watch(&NOTHING, &[Signal::HUP]).unwrap();
            let mut delivered = signal(SignalKind::hangup()).unwrap();
            // An echo has its own echo: the second here comes 598 ms after the first that counted.
            for (pause, counts) in [(0, true), (299, false), (299, false), (300, true)] {
                tokio::time::advance(Duration::from_millis(pause)).await;
                kill_process(getpid(), Signal::HUP).unwrap();
                delivered.recv().await.unwrap();
                // Whoever watches has its turn.
                yield_now().await;
                let stop = stops.queue.try_recv().ok();
                assert_eq!(stop, counts.then_some(Stop::Signal(Signal::HUP)), "{pause} ms later");
            }
        };
        LocalSet::new().run_until(watched).await;
    }

    #[test]
    fn a_process_that_is_not_our_parent_counts_as_a_parent_that_ended() {
        wait_for_end(getpid());
    }

    #[test]
    fn signals_have_names_and_exit_codes() {
        assert_eq!(
            (signal_name(Signal::TERM).as_str(), exit_of(Signal::TERM), exit_of(Signal::KILL)),
            ("SIGTERM", 143, 137)
        );
    }
}
