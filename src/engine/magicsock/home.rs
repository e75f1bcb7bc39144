//! Which DERP region is home: the fastest, but no moving about for little.
//!
//! Source: Tailscale, net/netcheck, `addReportHistoryAndSetPreferredDERP`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::key::NodePublic;
use crate::netmap::RegionId;
use crate::wire::tailcfg::derp::{DerpMap, Region};

/// How long a measurement counts: a little more than the time between two full rounds.
const HISTORY: Duration = Duration::from_secs(305);
/// A new home must be that much faster.
const ABSOLUTE_GAIN: Duration = Duration::from_millis(10);

/// What regions' latencies were lately.
#[derive(Debug, Default)]
pub(super) struct Latencies {
    measured: BTreeMap<RegionId, Vec<(Instant, Duration)>>,
}

impl Latencies {
    pub(super) fn record(&mut self, region: RegionId, latency: Duration, now: Instant) {
        let of_region = self.measured.entry(region).or_default();
        of_region.retain(|(at, _)| now.duration_since(*at) < HISTORY);
        of_region.push((now, latency));
    }

    /// The best of each region in the last five minutes.
    pub(super) fn best(&self, now: Instant) -> BTreeMap<RegionId, Duration> {
        self.measured.keys().filter_map(|region| Some((*region, self.of(*region, now)?))).collect()
    }

    /// The best of one region in the same time.
    pub(super) fn of(&self, region: RegionId, now: Instant) -> Option<Duration> {
        let samples = self.measured.get(&region)?;
        samples.iter().filter(|(at, _)| now.duration_since(*at) < HISTORY).map(|(_, latency)| *latency).min()
    }
}

/// Whether a region may be measured and chosen.
pub(super) fn is_eligible(region: &Region, home: Option<RegionId>) -> bool {
    let relays = region.nodes.iter().any(|node| !node.stun_only);
    relays && !region.no_measure_no_home && (!region.avoid || home == Some(region.id))
}

/// The home by the best of what was measured, and how far the present one is now, if that is known. `alive` says that it
/// is connected, whatever the measurement missed.
pub(super) fn choose(
    map: &DerpMap,
    home: Option<RegionId>,
    latencies: &BTreeMap<RegionId, Duration>,
    home_now: Option<Duration>,
    alive: bool,
) -> Option<RegionId> {
    let scored = |region: &RegionId, latency: &Duration| {
        let score = map.region_score.get(region).copied().filter(|score| score.is_finite() && *score > 0.0);
        Duration::try_from_secs_f64(latency.as_secs_f64() * score.unwrap_or(1.0)).unwrap_or(*latency)
    };
    let fit = |id: &RegionId| map.regions.get(id).is_some_and(|region| is_eligible(region, home));
    // A home whose relay does not admit us is none, however fast its STUN server answers.
    let others = latencies.keys().any(|id| Some(*id) != home && fit(id));
    let dead = |id: &RegionId| !alive && others && Some(*id) == home;
    let candidates = latencies.iter().filter(|(id, _)| fit(id) && !dead(id));
    let best = candidates.map(|(id, latency)| (scored(id, latency), *id)).min();
    let Some(home) = home.filter(|home| map.regions.get(home).is_some_and(|region| is_eligible(region, Some(*home))))
    else {
        return best.map(|(_, id)| id);
    };
    let Some((best_latency, best)) = best else {
        return Some(home);
    };
    let home_now = home_now.or_else(|| latencies.get(&home).copied()).filter(|_| !dead(&home));
    let Some(home_latency) = home_now.map(|latency| scored(&home, &latency)) else {
        return Some(if alive { home } else { best });
    };
    let too_little = best_latency + ABSOLUTE_GAIN > home_latency || best_latency > home_latency.mul_f64(2.0 / 3.0);
    Some(if too_little { home } else { best })
}

/// The home when nothing could be measured: nodes spread over the regions, but each finds the same one again.
pub(super) fn without_measurement(map: &DerpMap, key: &NodePublic) -> Option<RegionId> {
    let eligible: Vec<RegionId> =
        map.regions.values().filter(|region| is_eligible(region, None)).map(|region| region.id).collect();
    let hash = key.as_bytes().first_chunk().copied().map(u64::from_le_bytes)?;
    let index = hash.checked_rem(eligible.len() as u64)?;
    eligible.get(index as usize).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::tailcfg::derp::DerpNode;

    fn map(ids: &[RegionId]) -> DerpMap {
        let region = |id: &RegionId| (*id, Region { id: *id, nodes: vec![DerpNode::default()], ..Region::default() });
        DerpMap { regions: ids.iter().map(region).collect(), region_score: BTreeMap::new() }
    }

    /// [`super::choose`], where the home is as far as it was at best.
    fn choose(
        map: &DerpMap,
        home: Option<RegionId>,
        latencies: &BTreeMap<RegionId, Duration>,
        alive: bool,
    ) -> Option<RegionId> {
        super::choose(map, home, latencies, None, alive)
    }

    fn millis(measured: &[(RegionId, u64)]) -> BTreeMap<RegionId, Duration> {
        measured.iter().map(|(id, millis)| (*id, Duration::from_millis(*millis))).collect()
    }

    #[test]
    fn a_home_that_does_not_admit_us_loses_to_any_other() {
        let measured = millis(&[(1, 5), (2, 90)]);
        assert_eq!(choose(&map(&[1, 2]), Some(1), &measured, false), Some(2));
        assert_eq!(choose(&map(&[1, 2]), Some(1), &measured, true), Some(1));
        assert_eq!(choose(&map(&[1]), Some(1), &millis(&[(1, 5)]), false), Some(1));
    }

    #[test]
    fn the_fastest_is_the_first_home() {
        assert_eq!(choose(&map(&[1, 2]), None, &millis(&[(1, 30), (2, 29)]), false), Some(2));
        assert_eq!(choose(&map(&[1, 2]), None, &millis(&[]), false), None);
    }

    #[test]
    fn moving_needs_a_third_and_ten_milliseconds() {
        let map = map(&[1, 2]);
        assert_eq!(choose(&map, Some(1), &millis(&[(1, 60), (2, 41)]), true), Some(1));
        assert_eq!(choose(&map, Some(1), &millis(&[(1, 60), (2, 39)]), true), Some(2));
        assert_eq!(choose(&map, Some(1), &millis(&[(1, 12), (2, 3)]), true), Some(1));
    }

    #[test]
    fn a_home_that_has_become_slow_is_compared_as_it_is_now() {
        let (map, best) = (map(&[1, 2]), millis(&[(1, 12), (2, 10)]));
        assert_eq!(super::choose(&map, Some(1), &best, Some(Duration::from_millis(12)), true), Some(1));
        assert_eq!(super::choose(&map, Some(1), &best, Some(Duration::from_millis(200)), true), Some(2));
    }

    #[test]
    fn a_home_that_did_not_answer_is_left_unless_it_is_connected() {
        let map = map(&[1, 2]);
        assert_eq!(choose(&map, Some(1), &millis(&[(2, 10)]), true), Some(1));
        assert_eq!(choose(&map, Some(1), &millis(&[(2, 10)]), false), Some(2));
        assert_eq!(choose(&map, Some(7), &millis(&[(2, 10)]), true), Some(2));
    }

    #[test]
    fn scores_and_exclusions_count() {
        let mut map = map(&[1, 2, 3]);
        map.region_score.insert(2, 0.5);
        map.regions.get_mut(&3).unwrap().no_measure_no_home = true;
        assert_eq!(choose(&map, None, &millis(&[(1, 30), (2, 50), (3, 1)]), false), Some(2));
    }

    #[test]
    fn without_measurement_a_key_finds_the_same_region_again() {
        let map = map(&[1, 2, 5]);
        let key = NodePublic::from_bytes([7; 32]);
        assert_eq!(without_measurement(&map, &key), without_measurement(&map, &key));
        assert!(without_measurement(&map, &key).is_some());
        assert_eq!(without_measurement(&DerpMap::default(), &key), None);
    }

    #[test]
    fn measurements_age() {
        let start = Instant::now();
        let mut latencies = Latencies::default();
        latencies.record(1, Duration::from_millis(10), start);
        latencies.record(1, Duration::from_millis(40), start + Duration::from_secs(200));
        assert_eq!(latencies.best(start + Duration::from_secs(300)), millis(&[(1, 10)]));
        assert_eq!(latencies.best(start + Duration::from_secs(310)), millis(&[(1, 40)]));
    }
}
