//! Netcheck: what our network looks like from outside, and which DERP region is nearest.
//!
//! A full round asks every region at start, every five minutes and when our network changes. A small one keeps the
//! NAT's mapping known while peers are in use. Conclusions are drawn as soon as they are useful: at start, the run
//! waits for the home region. Source: Tailscale, net/netcheck.

mod begin;
mod choice;
mod doubt;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::endpoints::{Endpoints, LocalEndpoints};
use super::home::{self, Latencies};
use super::peer::ACTIVE;
use super::round::{self, Round};
use crate::engine::{Output, Transport};
use crate::key::NodePublic;
use crate::netmap::RegionId;
use crate::wire::stun;
use crate::wire::tailcfg::derp::DerpMap;
use crate::wire::tailcfg::hostinfo::NetInfo;
use crate::wire::tailcfg::map::EndpointType;

/// Between full rounds. Source: Tailscale, net/netcheck, `fullReportInterval`.
const FULL_INTERVAL: Duration = Duration::from_secs(300);
/// Between small rounds, at least and at most. Source: Tailscale, wgengine/magicsock, `shouldDoPeriodicReSTUNLocked`.
const REFRESH: std::ops::Range<f64> = 20.0..26.0;
/// Rounds that events ask for come no closer.
const SPACING: Duration = Duration::from_secs(5);
/// A peer is not told endpoints older than that. Source: Tailscale, `endpointsFreshEnoughDuration`.
const FRESH: Duration = Duration::from_secs(27);
/// The regions of a small round, beside the home. Source: Tailscale, net/netcheck, `numIncrementalRegions`.
const SMALL: usize = 3;

/// What control, and through it our peers, are told of us.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HostState {
    /// Where we can be reached by UDP, and how we know.
    pub endpoints: Vec<(SocketAddr, EndpointType)>,
    /// What netcheck found; holds the home too.
    pub netinfo: NetInfo,
    /// The home DERP region: the one where peers find us.
    pub home: Option<RegionId>,
}

/// A measurement of a region by HTTPS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpsProbe {
    /// Which region.
    pub region: RegionId,
    /// Which round of netcheck wants to know.
    pub round: u64,
}

/// The machine.
#[derive(Debug)]
pub(super) struct Netcheck {
    transport: Transport,
    key: NodePublic,
    rng: StdRng,
    map: Arc<DerpMap>,
    endpoints: Endpoints,
    latencies: Latencies,
    /// The servers that have a name and no address, of both families, as their names led to last; they are looked up anew
    /// in each full round.
    resolved: BTreeMap<RegionId, Vec<SocketAddr>>,
    /// Seconds to each region by UDP in the newest full round, in the words of [`NetInfo`]. An HTTPS probe may have gone
    /// by a proxy, and so is of no family. Source: Tailscale, wgengine/magicsock, `updateNetInfo`.
    measured: BTreeMap<String, f64>,
    /// The round that began to measure them.
    measured_in: u64,
    round: Option<Round>,
    /// How many there were: what answers an earlier one is none to this.
    rounds: u64,
    settled_at: Option<Instant>,
    /// Whether our network is another, and no server has answered since.
    moved: bool,
    /// What servers saw before that is void, once they have answered.
    void: Option<Instant>,
    /// When a pong last cast doubt on that.
    doubted_at: Option<Instant>,
    full_at: Option<Instant>,
    refresh_at: Option<Instant>,
    used_at: Option<Instant>,
    host: HostState,
    /// What was last put out.
    told: HostState,
    /// Whether the home region is connected, whatever measurements say.
    home_alive: bool,
    /// When that was last so, or when the home was chosen.
    alive_at: Option<Instant>,
    /// The home that `alive_at` is about.
    watched: Option<RegionId>,
    /// Regions that were home and stayed away, and since when, until they admit us: else every full round would move
    /// there and back where a relay fails whose STUN server answers.
    failed: BTreeMap<RegionId, Instant>,
    /// Those of them whose relays are to be tried again.
    retried: Vec<RegionId>,
    /// The home that has been away, until the round about it tells whether others are there.
    suspect: Option<RegionId>,
    /// When another home is looked for, since this one is away.
    away_at: Option<Instant>,
    outputs: VecDeque<Output>,
}

impl Netcheck {
    pub(super) fn new(transport: Transport, key: NodePublic, seed: [u8; 32]) -> Self {
        Self {
            transport,
            key,
            rng: StdRng::from_seed(seed),
            map: Arc::default(),
            endpoints: Endpoints::default(),
            latencies: Latencies::default(),
            resolved: BTreeMap::new(),
            measured: BTreeMap::new(),
            measured_in: 0,
            round: None,
            rounds: 0,
            settled_at: None,
            moved: false,
            void: None,
            doubted_at: None,
            full_at: None,
            refresh_at: None,
            used_at: None,
            host: HostState::default(),
            told: HostState::default(),
            home_alive: false,
            alive_at: None,
            watched: None,
            failed: BTreeMap::new(),
            retried: Vec::new(),
            suspect: None,
            away_at: None,
            outputs: VecDeque::new(),
        }
    }

    pub(super) fn host(&self) -> &HostState {
        &self.host
    }

    /// Where we are, for peers to be told.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.host.endpoints.iter().map(|(endpoint, _)| *endpoint).collect()
    }

    /// Whether datagrams of that family can be sent.
    pub(super) fn has_family(&self, v6: bool) -> bool {
        self.endpoints.has_family(v6)
    }

    pub(super) fn set_map(&mut self, map: &Arc<DerpMap>, now: Instant) {
        if Arc::ptr_eq(&self.map, map) || *self.map == **map {
            return;
        }
        self.forget_failed(map);
        self.resolved.retain(|id, _| self.map.regions.get(id) == map.regions.get(id));
        self.map = map.clone();
        if self.host.home.is_some_and(|home| !self.map.regions.contains_key(&home)) {
            self.set_home(None);
        }
        self.start(true, now);
    }

    pub(super) fn set_local_endpoints(&mut self, local: LocalEndpoints, now: Instant) {
        if self.transport != Transport::Derp && self.endpoints.set_local(local) {
            self.start(true, now);
            self.publish(now);
        }
    }

    /// Our network is another. Servers are asked at once; what they said before is void, since peers would go on
    /// sending to an address that they are told is ours. Nothing is told before one has answered.
    pub(super) fn handle_move(&mut self, local: LocalEndpoints, now: Instant) {
        if self.transport != Transport::Derp {
            self.endpoints.set_local(local);
            (self.settled_at, self.moved) = (None, true);
            self.endpoints.forget_seen();
        }
        // Who could not be reached from there may be reached from here, and who was near may be far.
        self.failed.clear();
        self.spare_home(now);
        (self.latencies, self.measured) = (Latencies::default(), BTreeMap::new());
        let netinfo = &mut self.host.netinfo;
        (netinfo.mapping_varies_by_dest_ip, netinfo.working_udp, netinfo.working_ipv6) = (None, None, None);
        self.start(true, now);
    }

    /// A peer is in use: its NAT and ours must stay mapped.
    pub(super) fn note_use(&mut self, now: Instant) {
        self.used_at = Some(now);
        if self.refresh_at.is_none() && self.transport != Transport::Derp {
            self.refresh_at = Some(now + self.refresh_interval());
        }
    }

    /// Whether our endpoints may be told to a peer; if not, [`settled_at`](Self::settled_at) moves soon.
    pub(super) fn freshen(&mut self, now: Instant) -> bool {
        let is_fresh = |settled_at: Option<Instant>| settled_at.is_some_and(|at| now.duration_since(at) < FRESH);
        if !is_fresh(self.settled_at) && self.round.as_ref().is_none_or(|round| round.settled) {
            self.start(false, now);
        }
        is_fresh(self.settled_at)
    }

    /// Something suggests that our network changed.
    pub(super) fn recheck(&mut self, now: Instant) {
        if self.round.is_none() && self.settled_at.is_none_or(|at| now.duration_since(at) >= SPACING) {
            self.start(false, now);
        }
    }

    pub(super) fn handle_stun(&mut self, transaction: &stun::TransactionId, us: SocketAddr, now: Instant) -> bool {
        let Some((region, server, latency)) = self.round.as_mut().and_then(|round| round.answer(transaction, now))
        else {
            return false;
        };
        self.endpoints.saw(server, us, now);
        if let Some(since) = self.void {
            self.endpoints.forget_before(since, us.is_ipv6());
        }
        self.latencies.record(region, latency, now);
        self.renew_measured();
        let family = if server.is_ipv6() { "v6" } else { "v4" };
        self.measured.insert(format!("{region}-{family}"), latency.as_secs_f64());
        if std::mem::take(&mut self.moved) {
            // Peers look for us where we were: they need not wait for the slower servers.
            self.settled_at = Some(now);
            self.publish(now);
        }
        self.conclude(now);
        true
    }

    /// Nothing can be sent there now: a server of another family than our routes'.
    pub(super) fn handle_unreachable(&mut self, server: SocketAddr, now: Instant) {
        if let Some(round) = self.round.as_mut() {
            round.refuse(server);
            self.conclude(now);
        }
    }

    pub(super) fn handle_stun_address(&mut self, region: RegionId, servers: Vec<SocketAddr>, now: Instant) {
        // A resolver that fails now was right before. Source: Tailscale, net/netcheck, `nodeAddrPort`, `UseLastGood`.
        if !servers.is_empty() {
            self.resolved.insert(region, servers);
        }
        let resolved = self.resolved.get(&region).map(Vec::as_slice).unwrap_or_default();
        let known = self.map.regions.get(&region);
        let asked = known.map(|it| round::servers(it, resolved, |v6| self.has_family(v6)).0).unwrap_or_default();
        if let Some(round) = self.round.as_mut() {
            round.note_resolved(region);
            round.ask(region, &asked, now);
        }
        self.handle_timeout(now);
    }

    pub(super) fn handle_https_latency(&mut self, of: HttpsProbe, latency: Option<Duration>, now: Instant) {
        let Some(round) = self.round.as_mut().filter(|_| of.round == self.rounds) else { return };
        round.answer_https(of.region, latency, now);
        if let Some(latency) = latency {
            self.latencies.record(of.region, latency, now);
        }
        self.conclude(now);
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        if self.full_at.is_some_and(|at| at <= now) {
            self.start(true, now);
        }
        self.search_home(now);
        if self.refresh_at.is_some_and(|at| at <= now) {
            let used = self.used_at.is_some_and(|at| now.duration_since(at) < ACTIVE);
            self.refresh_at = used.then(|| now + self.refresh_interval());
            if used && self.round.is_none() {
                self.start(false, now);
            }
        }
        self.send_due(now);
        self.conclude(now);
    }

    pub(super) fn next_deadline(&self) -> Option<(Instant, &'static str)> {
        let round = self.round.as_ref().map(|round| (round.next_deadline(), "netcheck"));
        let full = self.full_at.map(|at| (at, "next netcheck"));
        let refresh = self.refresh_at.map(|at| (at, "STUN refresh"));
        let away = self.away_at.map(|at| (at, "the home relay is away"));
        [round, full, refresh, away].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    pub(super) fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The best latency of a region in the last five minutes.
    pub(super) fn region_latency(&self, region: RegionId, now: Instant) -> Option<Duration> {
        self.latencies.of(region, now)
    }

    /// When the newest conclusion was drawn.
    pub(super) fn settled_at(&self) -> Option<Instant> {
        self.settled_at
    }

    /// Draws what conclusions can be drawn from the round, and ends it.
    fn conclude(&mut self, now: Instant) {
        let Some(round) = self.round.as_mut() else {
            return;
        };
        if round.wants_https(now) {
            let eligible = self.map.regions.values().filter(|region| home::is_eligible(region, None));
            let regions: BTreeSet<RegionId> = eligible.map(|region| region.id).collect();
            let probe = |region: &RegionId| Output::ProbeHttps(HttpsProbe { region: *region, round: self.rounds });
            self.outputs.extend(regions.iter().map(probe));
            round.begin_https(regions);
        }
        let silence = round.take_silence(now);
        let concludes = !round.settled && round.is_conclusive(now);
        round.settled |= concludes;
        let (settled, heard) = (round.settled, (concludes && round.full).then(|| round.heard().clone()));
        if silence {
            self.renew_measured();
        }
        if concludes {
            (self.settled_at, self.void) = (Some(now), None);
        }
        if let Some(heard) = heard {
            self.choose_home(&heard, now);
        }
        // Who is silent may be known only after the conclusion.
        if concludes || silence && settled {
            self.publish(now);
        }
        if self.round.as_ref().is_some_and(|round| round.is_over(now)) {
            self.round = None;
        }
    }

    /// What a full round measures replaces what was measured before, once it is known: control is not told of none.
    fn renew_measured(&mut self) {
        let full = self.round.as_ref().is_some_and(|round| round.full);
        if full && std::mem::replace(&mut self.measured_in, self.rounds) != self.rounds {
            self.measured.clear();
        }
    }

    /// Tells what changed; latencies alone are no change.
    fn publish(&mut self, now: Instant) {
        let (working_v6, working_udp) = self.round.as_ref().map(Round::worked).unwrap_or_default();
        let old = &self.host.netinfo;
        let netinfo = NetInfo {
            mapping_varies_by_dest_ip: self.endpoints.mapping_varies().or(old.mapping_varies_by_dest_ip),
            working_ipv6: working_v6.or(old.working_ipv6),
            os_has_ipv6: Some(self.endpoints.has_family(true)),
            working_udp: working_udp.or(old.working_udp),
            preferred_derp: old.preferred_derp,
            derp_latency: self.measured.clone(),
        };
        let endpoints = if self.transport == Transport::Derp { Vec::new() } else { self.endpoints.list(now) };
        self.host = HostState { endpoints, netinfo, home: self.host.home };
        let told_latency = self.told.netinfo.derp_latency.clone();
        let netinfo = NetInfo { derp_latency: told_latency, ..self.host.netinfo.clone() };
        if (HostState { netinfo, ..self.host.clone() }) != self.told {
            self.told = self.host.clone();
            self.outputs.push_back(Output::HostChanged(self.host.clone()));
        }
    }

    fn refresh_interval(&mut self) -> Duration {
        Duration::from_secs_f64(self.rng.random_range(REFRESH))
    }
}

#[cfg(test)]
mod tests;
