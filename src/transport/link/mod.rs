//! The machine's way into the network, watched: its addresses, its default routes, and whether it slept.
//!
//! The kernel tells by netlink that something changed; what it is comes from comparing what is there before and after,
//! once things have been quiet for a moment. Where it tells nothing, as in some sandboxes, we look now and then.
//! Source: Tailscale, net/netmon.

mod clock;
mod netlink;
mod snapshot;
mod tied;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{debug, info};

use self::clock::Clock;
use self::netlink::Netlink;
use self::snapshot::Snapshot;
pub(super) use self::tied::Tied;
use super::interfaces::is_link_local;

/// How often the clock is looked at, and the network where the kernel does not tell of changes: so late is a machine
/// found to have slept, or moved. A look costs an eighth of a millisecond.
const TICK: Duration = Duration::from_secs(2);
/// A change is over when nothing was heard for so long: an address comes and goes in several messages, and its routes
/// after it. Tailscale looks at once and then not for a second; by then a connection would be dialled in vain.
const QUIET: Duration = Duration::from_millis(150);
/// A network that never is quiet is looked at after this all the same.
const SETTLE_MOST: Duration = Duration::from_secs(1);

/// What became of the network since the run began. Counts, so that whoever looks seldom misses nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// All changes that mattered.
    pub changes: u64,
    /// Those of them after which what was known of paths is in doubt: an address went, a default route is another, or
    /// the machine slept.
    pub moves: u64,
    /// Those of them after which a default route was another.
    routes: u64,
    /// How long the machine or this process has not run.
    pub asleep: Duration,
    /// The addresses that the machine has; `None` when they are not known.
    addresses: Option<Arc<BTreeSet<IpAddr>>>,
}

impl State {
    /// Whether a connection from this address cannot go on. What `look` sees now has the last word: an address may be
    /// newer than this state.
    fn is_gone(&self, local: IpAddr, look: impl FnOnce() -> Option<Arc<BTreeSet<IpAddr>>>) -> bool {
        let watched = !local.is_loopback() && !is_link_local(local);
        let lacked = self.addresses.as_ref().is_some_and(|addresses| !addresses.contains(&local));
        watched && lacked && look().is_none_or(|now| !now.contains(&local))
    }
}

/// A handle to the watch.
#[derive(Debug, Clone)]
pub struct Link {
    state: watch::Receiver<State>,
}

impl Default for Link {
    /// A network that never changes.
    fn default() -> Self {
        Self { state: watch::Sender::default().subscribe() }
    }
}

impl Link {
    /// Begins to watch, on `runtime`, for as long as anybody holds a handle.
    pub fn watch(runtime: &Handle) -> Self {
        let (out, state) = watch::channel(State::default());
        runtime.spawn(run(out));
        Self { state }
    }

    /// A network that moves whenever the second is called.
    #[cfg(test)]
    pub fn moving() -> (Self, impl Fn()) {
        let (out, state) = watch::channel(State::default());
        (Self { state }, move || out.send_modify(|state| state.moves += 1))
    }

    /// The changes from now on.
    pub fn news(&self) -> News {
        let mut state = self.state.clone();
        let State { moves, routes, .. } = *state.borrow_and_update();
        News { state, moves, routes }
    }
}

/// The changes since a moment.
#[derive(Debug)]
pub struct News {
    state: watch::Receiver<State>,
    /// How many moves, and changes of default routes, are no news.
    moves: u64,
    routes: u64,
}

impl News {
    /// Waits for the next change. What comes after nobody has looked for a while is the newest state.
    pub async fn next(&mut self) -> State {
        match self.state.changed().await {
            Ok(()) => self.state.borrow_and_update().clone(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Waits for the next change after which what was known of paths is in doubt: another try may do better now.
    pub async fn moved(&mut self) {
        let seen = self.moves;
        let moved = self.state.wait_for(|state| state.moves != seen).await.map(|state| (state.moves, state.routes));
        match moved {
            Ok(moved) => (self.moves, self.routes) = moved,
            Err(_) => std::future::pending().await,
        }
    }
}

/// Watches until nobody listens any more.
async fn run(out: watch::Sender<State>) {
    // Heard from before the first look, so that nothing falls between.
    let netlink = match Netlink::open() {
        Ok(netlink) => Some(netlink),
        Err(error) => {
            info!(%error, poll_s = TICK.as_secs(), "the kernel tells nothing of network changes, looking now and then");
            None
        }
    };
    let mut known = Snapshot::take();
    // What there is from the beginning is no news.
    out.send_if_modified(|state| {
        state.addresses = known.addresses();
        false
    });
    let mut clock = Clock::start();
    loop {
        let heard = tokio::select! {
            () = heard(netlink.as_ref()) => true,
            () = sleep(TICK) => false,
            () = out.closed() => return,
        };
        if heard && let Some(netlink) = &netlink {
            settle(netlink).await;
        }
        let asleep = clock.missed();
        if !heard && asleep.is_none() && netlink.is_some() {
            continue;
        }
        let new = Snapshot::take();
        tell(&out, &known, &new, asleep);
        known = new;
    }
}

/// Waits until the kernel tells of a change; for ever where it does not.
async fn heard(netlink: Option<&Netlink>) {
    match netlink {
        Some(netlink) => netlink.heard().await,
        None => std::future::pending().await,
    }
}

/// Waits until nothing more is told.
async fn settle(netlink: &Netlink) {
    let latest = Instant::now() + SETTLE_MOST;
    while timeout_at(latest.min(Instant::now() + QUIET), netlink.heard()).await.is_ok() && Instant::now() < latest {}
}

/// Tells of what differs, if that matters to anybody.
fn tell(out: &watch::Sender<State>, before: &Snapshot, after: &Snapshot, asleep: Option<Duration>) {
    let change = before.compare(after);
    if change.is_nothing() && asleep.is_none() {
        return;
    }
    match asleep {
        Some(asleep) => info!(%change, asleep_s = asleep.as_secs(), "awake again, looking at the network anew"),
        None => info!(%change, "the network changed"),
    }
    debug!(?before, ?after, "what the network was and is");
    out.send_modify(|state| {
        state.changes += 1;
        state.moves += u64::from(change.is_move() || asleep.is_some());
        state.routes += u64::from(change.is_of_routes());
        state.asleep += asleep.unwrap_or_default();
        state.addresses = after.addresses();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state_after(before: &Snapshot, after: &Snapshot, asleep: Option<Duration>) -> State {
        let out = watch::Sender::new(State::default());
        tell(&out, before, after, asleep);
        out.borrow().clone()
    }

    #[test]
    fn only_what_matters_is_told_and_what_moves_us_is_counted_apart() {
        let home = Snapshot::of(&["192.168.1.4"], &["eth0"]);
        let with_bridge = Snapshot::of(&["192.168.1.4", "172.17.0.1"], &["eth0"]);
        let counts = |state: State| (state.changes, state.moves, state.routes);
        assert_eq!(counts(state_after(&home, &home, None)), (0, 0, 0));
        assert_eq!(counts(state_after(&home, &with_bridge, None)), (1, 0, 0));
        assert_eq!(counts(state_after(&with_bridge, &home, None)), (1, 1, 0));
        assert_eq!(counts(state_after(&home, &Snapshot::of(&["192.168.1.4"], &["wlan0"]), None)), (1, 1, 1));
        let slept = state_after(&home, &home, Some(TICK));
        assert_eq!((slept.asleep, counts(slept)), (TICK, (1, 1, 0)));
    }

    #[test]
    fn a_connection_is_lost_with_its_address_alone() {
        let state = state_after(&Snapshot::of(&["10.0.0.1"], &[]), &Snapshot::of(&["10.0.0.2"], &[]), None);
        let gone = |ip: &str| state.is_gone(ip.parse().unwrap(), || None);
        assert!(gone("10.0.0.1") && !gone("10.0.0.2") && !gone("127.0.0.1") && !gone("fe80::1"));
        assert!(!State::default().is_gone("10.0.0.1".parse().unwrap(), || None), "nothing is known");
    }

    #[test]
    fn an_address_that_is_newer_than_the_last_look_is_not_gone() {
        let state = state_after(&Snapshot::of(&["10.0.0.1"], &[]), &Snapshot::of(&["10.0.0.2"], &[]), None);
        let now = || Snapshot::of(&["10.0.0.2", "10.0.0.3"], &[]).addresses();
        let gone = |ip: &str| state.is_gone(ip.parse().unwrap(), now);
        assert!(gone("10.0.0.1") && !gone("10.0.0.3"));
    }

    #[tokio::test]
    async fn news_begin_when_they_are_asked_for() {
        let out = watch::Sender::new(State::default());
        let link = Link { state: out.subscribe() };
        out.send_modify(|state| state.changes = 1);
        let mut news = link.news();
        out.send_modify(|state| state.changes = 2);
        assert_eq!(news.next().await.changes, 2);
        drop(out);
        assert!(tokio::time::timeout(Duration::from_millis(20), news.next()).await.is_err());
    }

    #[tokio::test]
    async fn a_new_address_is_no_move_and_a_move_is_told_once() {
        let out = watch::Sender::new(State::default());
        let mut news = Link { state: out.subscribe() }.news();
        let mut moved = async || tokio::time::timeout(Duration::from_millis(20), news.moved()).await.is_ok();
        out.send_modify(|state| state.changes = 1);
        assert!(!moved().await);
        out.send_modify(|state| state.moves = 1);
        out.send_modify(|state| state.changes = 3);
        assert!(moved().await, "a later change hides no move");
        assert!(!moved().await);
    }

    #[tokio::test]
    async fn the_watch_ends_with_its_last_handle() {
        let (out, state) = watch::channel(State::default());
        drop(state);
        tokio::time::timeout(Duration::from_secs(5), run(out)).await.unwrap();
    }
}
