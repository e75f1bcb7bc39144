//! Which DERP regions are connected, and which one leads to a peer.
//!
//! The home region is connected always: it is where peers reach us. Others are connected by the first packet that
//! needs them, and closed when idle. Source: Tailscale, wgengine/magicsock, derp.go.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::netmap::RegionId;

/// A region without packets for so long is closed. Source: Tailscale, `derpInactiveCleanupTime`.
const IDLE: Duration = Duration::from_secs(60);
/// How often that is looked at. Source: Tailscale, `derpCleanStaleInterval`.
const SWEEP: Duration = Duration::from_secs(15);
/// A region that is lost and comes back again and again brings nothing back more often.
const BACK: Duration = Duration::from_secs(5);

/// What the driver is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Connect or keep this region, which is our home or not.
    Connect(RegionId, bool),
    /// Close it.
    Close(RegionId),
}

#[derive(Debug)]
struct Relay {
    connected: bool,
    /// Whether it was lost, or could not be connected, since it last was.
    lost: bool,
    /// When it was last back.
    back_at: Option<Instant>,
    used: Instant,
}

impl Relay {
    fn new(now: Instant) -> Self {
        Self { connected: false, lost: false, back_at: None, used: now }
    }
}

/// The regions in use.
#[derive(Debug, Default)]
pub(super) struct Relays {
    regions: BTreeMap<RegionId, Relay>,
    home: Option<RegionId>,
    /// The home that control was told last.
    told: Option<RegionId>,
    sweep_at: Option<Instant>,
    actions: VecDeque<Action>,
}

impl Relays {
    /// A packet goes by this region, or came by it.
    pub(super) fn touch(&mut self, region: RegionId, now: Instant) {
        if let Some(relay) = self.regions.get_mut(&region) {
            relay.used = now;
            return;
        }
        self.regions.insert(region, Relay::new(now));
        self.actions.push_back(Action::Connect(region, self.home == Some(region)));
        self.sweep_at.get_or_insert(now + SWEEP);
    }

    /// Whether packets came, or would go, by this region right now.
    pub(super) fn is_connected(&self, region: RegionId) -> bool {
        self.regions.get(&region).is_some_and(|relay| relay.connected)
    }

    /// Returns whether a region that was lost, or did not admit us, is back: what went there meanwhile, or was on its
    /// way, may be lost.
    pub(super) fn set_connected(&mut self, region: RegionId, connected: bool, now: Instant) -> bool {
        let Some(relay) = self.regions.get_mut(&region) else { return false };
        relay.connected = connected;
        relay.lost |= !connected;
        let rested = relay.back_at.is_none_or(|at| now.duration_since(at) >= BACK);
        let back = connected && rested && std::mem::take(&mut relay.lost);
        if back {
            relay.back_at = Some(now);
        }
        back
    }

    /// A region that is connected seems to work no more, or does again. Nothing is lost by that.
    pub(super) fn set_doubted(&mut self, region: RegionId, doubted: bool) {
        if let Some(relay) = self.regions.get_mut(&region) {
            relay.connected = !doubted;
        }
    }

    /// We live there now. The old home loses its privilege and is closed when idle.
    pub(super) fn set_home(&mut self, home: Option<RegionId>, now: Instant) {
        if self.home == home {
            return;
        }
        let old = std::mem::replace(&mut self.home, home);
        if let Some((old, relay)) = old.and_then(|old| Some((old, self.regions.get_mut(&old)?))) {
            // Peers answer by it until control has told them, however long we have sent nothing there.
            relay.used = now;
            self.actions.push_back(Action::Connect(old, false));
            self.sweep_at.get_or_insert(now + SWEEP);
        }
        if let Some(home) = home {
            self.regions.entry(home).or_insert(Relay::new(now));
            self.actions.push_back(Action::Connect(home, true));
        }
    }

    /// Control knows by now that we live there. While it cannot be told, peers that speak first go to the home before,
    /// which is kept; so one that is away is left all the same. Tailscale leaves none then.
    /// Source: Tailscale, wgengine/magicsock, `maybeSetNearestDERP`.
    pub(super) fn set_told(&mut self, told: Option<RegionId>, now: Instant) {
        let old = std::mem::replace(&mut self.told, told).filter(|old| Some(*old) != told);
        if let Some(relay) = old.and_then(|old| self.regions.get_mut(&old)) {
            relay.used = now;
        }
    }

    /// A region that the map no longer holds, or holds otherwise.
    pub(super) fn close(&mut self, region: RegionId) {
        if self.regions.remove(&region).is_some() {
            self.actions.push_back(Action::Close(region));
        }
        if self.home == Some(region) {
            self.home = None;
        }
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        if self.sweep_at.is_none_or(|at| at > now) {
            return;
        }
        let idle = |(region, relay): (&RegionId, &Relay)| {
            (![self.home, self.told].contains(&Some(*region)) && now.duration_since(relay.used) >= IDLE)
                .then_some(*region)
        };
        let stale: Vec<RegionId> = self.regions.iter().filter_map(idle).collect();
        stale.into_iter().for_each(|region| self.close(region));
        let others = self.regions.keys().any(|region| Some(*region) != self.home);
        self.sweep_at = others.then(|| now + SWEEP);
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.sweep_at
    }

    pub(super) fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn actions(relays: &mut Relays) -> Vec<Action> {
        std::iter::from_fn(|| relays.poll_action()).collect()
    }

    #[test]
    fn the_first_packet_opens_and_idleness_closes_but_never_the_home() {
        let start = Instant::now();
        let mut relays = Relays::default();
        relays.set_home(Some(1), start);
        relays.touch(1, start);
        relays.touch(2, start);
        relays.touch(2, start + Duration::from_secs(30));
        assert_eq!(actions(&mut relays), [Action::Connect(1, true), Action::Connect(2, false)]);
        let mut closed_after = None;
        for second in 0..200 {
            relays.handle_timeout(start + Duration::from_secs(second));
            if actions(&mut relays) == [Action::Close(2)] {
                closed_after = Some(second);
            }
        }
        assert_eq!(closed_after, Some(90));
        assert_eq!(relays.next_deadline(), None);
    }

    #[test]
    fn an_old_home_that_nothing_was_sent_by_is_kept_until_peers_know_the_new_one() {
        let start = Instant::now();
        let mut relays = Relays::default();
        relays.set_home(Some(1), start);
        let moved = start + IDLE * 2;
        relays.set_home(Some(2), moved);
        let closed = |relays: &mut Relays, now| {
            relays.handle_timeout(now);
            actions(relays).contains(&Action::Close(1))
        };
        assert!(!closed(&mut relays, moved + SWEEP));
        assert!(closed(&mut relays, moved + IDLE));
    }

    #[test]
    fn an_old_home_is_kept_for_as_long_as_control_has_not_heard_of_the_new_one() {
        let start = Instant::now();
        let mut relays = Relays::default();
        relays.set_home(Some(1), start);
        relays.set_told(Some(1), start);
        relays.set_home(Some(2), start);
        let closed = |relays: &mut Relays, now| {
            relays.handle_timeout(now);
            actions(relays).contains(&Action::Close(1))
        };
        assert!(!closed(&mut relays, start + IDLE * 10));
        let told = start + IDLE * 10;
        relays.set_told(Some(2), told);
        assert!(!closed(&mut relays, told + SWEEP), "peers hear of it a moment later");
        assert!(closed(&mut relays, told + IDLE + SWEEP));
    }

    #[test]
    fn a_new_home_demotes_the_old_one() {
        let now = Instant::now();
        let mut relays = Relays::default();
        relays.set_home(Some(1), now);
        relays.set_home(Some(1), now);
        relays.set_home(Some(2), now);
        assert_eq!(
            actions(&mut relays),
            [Action::Connect(1, true), Action::Connect(1, false), Action::Connect(2, true)]
        );
    }

    #[test]
    fn a_region_is_back_when_it_was_lost_or_could_not_be_connected_at_first() {
        let now = Instant::now();
        let mut relays = Relays::default();
        for region in [1, 2] {
            relays.touch(region, now);
        }
        assert!(!relays.set_connected(1, true, now), "nothing went there before");
        assert!(!relays.set_connected(2, false, now));
        assert!(relays.set_connected(2, true, now));
        assert!(!relays.set_connected(1, false, now));
        assert!(relays.set_connected(1, true, now) && !relays.set_connected(1, true, now));
    }
}
