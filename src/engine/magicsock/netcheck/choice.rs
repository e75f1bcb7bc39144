//! When a round of netcheck moves the home, and when a home that is away is looked for elsewhere.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::super::home;
use super::Netcheck;
use crate::netmap::RegionId;
use crate::wire::tailcfg::derp::{DerpMap, Region};

/// How long a home's relay may be away before another home is looked for: a restart takes less.
const HOME_GRACE: Duration = Duration::from_secs(5);
/// Between two searches for another home while none admits us.
const HOME_SEARCH: Duration = Duration::from_secs(15);

impl Netcheck {
    /// Whether the home's relay has admitted us. One that stays away is looked for elsewhere after [`HOME_GRACE`].
    pub(in crate::engine::magicsock) fn set_home_alive(&mut self, alive: bool, now: Instant) {
        if self.watched != self.host.home {
            self.watched = self.host.home;
            // Where all have failed, the home need not go round faster than they are searched.
            let failed = self.watched.is_some_and(|home| self.failed.contains_key(&home));
            (self.alive_at, self.away_at) = (Some(now), failed.then_some(now + HOME_SEARCH));
        } else if alive || self.home_alive {
            self.alive_at = Some(now);
        }
        self.home_alive = alive;
        let away = !alive && self.host.home.is_some();
        self.away_at = away.then(|| self.away_at.unwrap_or(now + HOME_GRACE));
    }

    /// A region's relay has admitted us: it may be home, whatever was before.
    pub(in crate::engine::magicsock) fn note_admitted(&mut self, region: RegionId) {
        self.failed.remove(&region);
        self.note_answer(region);
    }

    /// A region that was doubted answers. One that has failed meanwhile may hang again, and has to admit us anew.
    pub(in crate::engine::magicsock) fn note_answer(&mut self, region: RegionId) {
        self.suspect.take_if(|suspect| *suspect == region);
    }

    /// The home is dialled from elsewhere: that it could not be reached before is forgotten.
    pub(super) fn spare_home(&mut self, now: Instant) {
        self.suspect = None;
        (self.alive_at, self.away_at) = (Some(now), (!self.home_alive).then_some(now + HOME_GRACE));
    }

    /// Whether the home may stay: it is connected, or was, or was chosen, a moment ago.
    pub(super) fn home_may_stay(&self, now: Instant) -> bool {
        self.home_alive || self.alive_at.is_some_and(|at| now.duration_since(at) < HOME_GRACE)
    }

    /// Looks for another home, where there is one, once this one has been away for long enough.
    pub(super) fn search_home(&mut self, now: Instant) {
        if self.away_at.is_some_and(|at| at <= now) {
            self.away_at = Some(now + HOME_SEARCH);
            let home = self.host.home;
            let fit = |region: &Region| Some(region.id) != home && home::is_eligible(region, home);
            if self.map.regions.values().any(fit) {
                self.suspect = home;
                self.start(true, now);
            }
        }
    }

    /// The map is another: a region that has failed is a new one where it changed.
    pub(super) fn forget_failed(&mut self, map: &DerpMap) {
        self.failed.retain(|id, _| self.map.regions.get(id) == map.regions.get(id));
    }

    /// Chooses by what the round has measured. If nobody answered it is our own line that is down: that says nothing of
    /// any region, and the home stays.
    pub(super) fn choose_home(&mut self, heard: &BTreeMap<RegionId, Duration>, now: Instant) {
        let suspect = self.suspect.take();
        if heard.is_empty() && self.host.home.is_some() {
            return;
        }
        self.failed.extend(suspect.map(|home| (home, now)));
        let home = self.host.home;
        let chosen = self.next_failed(heard).or_else(|| {
            let mut latencies = self.latencies.best(now);
            // Who is silent now is no place to move to, however near it was.
            latencies.retain(|region, _| heard.contains_key(region) || Some(*region) == home);
            latencies.retain(|region, _| !self.failed.contains_key(region));
            let home_now = home.and_then(|home| heard.get(&home).copied());
            home::choose(&self.map, home, &latencies, home_now, self.home_may_stay(now))
        });
        self.set_home(chosen.or_else(|| home::without_measurement(&self.map, &self.key)));
        // Where no relay admits us there is enough to try.
        let retried = self.failed.keys().filter(|region| self.home_alive && heard.contains_key(region));
        self.retried = retried.copied().collect();
    }

    /// Where all that answer have failed, the home among them: whose turn it is. The nearest two would be all that are
    /// ever tried.
    fn next_failed(&self, heard: &BTreeMap<RegionId, Duration>) -> Option<RegionId> {
        let home = self.host.home;
        if heard.keys().chain(&home).any(|region| !self.failed.contains_key(region)) {
            return None;
        }
        let eligible = |id: &RegionId| self.map.regions.get(id).is_some_and(|region| home::is_eligible(region, home));
        let answering = self.failed.iter().filter(|(id, _)| heard.contains_key(*id) && eligible(id));
        answering.min_by_key(|(_, at)| **at).map(|(id, _)| *id)
    }

    /// Regions that have failed and answer now: whether their relays admit us is to be tried, so that a later round may
    /// choose them.
    pub(in crate::engine::magicsock) fn take_retried(&mut self) -> Vec<RegionId> {
        std::mem::take(&mut self.retried)
    }

    pub(super) fn set_home(&mut self, home: Option<RegionId>) {
        self.host.home = home;
        self.host.netinfo.preferred_derp = home.unwrap_or_default();
    }
}
