//! One peer's paths: which UDP endpoints answer, which is best, and DERP until one does.
//!
//! The best address is trusted for [`TRUST`] after its last pong; past that, datagrams go both ways until a pong or a
//! lost ping decides. The receiver's replay protection drops the second copies.
//! Source: Tailscale, wgengine/magicsock, endpoint.go.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::disco::Pings;
use super::rank::{Measured, is_better};
use crate::netmap::RegionId;
use crate::wire::disco::TxId;

/// How long a pong vouches for its address. Source: Tailscale, `trustUDPAddrDuration`.
const TRUST: Duration = Duration::from_millis(6_500);
/// An endpoint is not pinged for discovery more often. Source: Tailscale, `discoPingInterval`.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// How often the best address is pinged while the peer is in use. Source: Tailscale, `heartbeatInterval`.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// Without outbound packets for so long, heartbeats stop. Source: Tailscale, `sessionActiveTimeout`.
pub(super) const ACTIVE: Duration = Duration::from_secs(45);
/// How often a better path is looked for while one works. Source: Tailscale, `upgradeUDPDirectInterval`.
const UPGRADE: Duration = Duration::from_secs(60);
/// A path that fast is not improved upon. Source: Tailscale, `goodEnoughLatency`.
const GOOD_ENOUGH: Duration = Duration::from_millis(5);
/// More endpoints than that are not kept: a peer could name any number.
const CANDIDATES: usize = 100;

/// A UDP address that may lead to the peer.
#[derive(Debug, Default)]
struct Candidate {
    last_ping: Option<Instant>,
    in_netmap: bool,
    from_call: bool,
    /// When the peer last pinged us from there.
    pinged_us: Option<Instant>,
    /// That ping's, to tell its copies.
    pinged_tx: Option<TxId>,
}

impl Candidate {
    fn is_known(&self, now: Instant) -> bool {
        self.in_netmap || self.from_call || self.pinged_us.is_some_and(|at| now.duration_since(at) < ACTIVE)
    }
}

/// What to send because of something that happened.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Probe {
    /// Ping these.
    pub(super) ping: Vec<SocketAddr>,
    /// Ask the peer by DERP to ping us.
    pub(super) call: bool,
}

/// What a packet on its way out means for its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sent {
    /// The path was asleep: it has a deadline now.
    pub(super) first: bool,
    /// A discovery round is due.
    pub(super) discover: bool,
}

/// A peer's paths.
#[derive(Debug, Default)]
pub(super) struct Path {
    best: Option<Measured>,
    trusted_until: Option<Instant>,
    candidates: BTreeMap<SocketAddr, Candidate>,
    pings: Pings,
    last_send: Option<Instant>,
    last_full_ping: Option<Instant>,
    heartbeat_at: Option<Instant>,
    discover_at: Option<Instant>,
    /// The region by which the peer reached us and is answered, while PeerGone has not said otherwise.
    pub(super) replies_by: Option<RegionId>,
    /// The same, for ever.
    pub(super) heard_by: Option<RegionId>,
}

impl Path {
    /// The address to use, and whether it is trusted.
    pub(super) fn best(&self, now: Instant) -> Option<(Measured, bool)> {
        self.best.map(|best| (best, self.trusted_until.is_some_and(|until| now <= until)))
    }

    /// A packet goes out now.
    pub(super) fn note_send(&mut self, now: Instant) -> Sent {
        self.last_send = Some(now);
        let first = self.heartbeat_at.is_none();
        if first {
            self.heartbeat_at = Some(now + HEARTBEAT);
        }
        let trusted = self.best.is_some() && self.trusted_until.is_some_and(|until| now <= until);
        Sent { first, discover: !trusted && self.discover_at.is_none_or(|at| at <= now) }
    }

    /// Whether a packet went out lately.
    pub(super) fn is_active(&self, now: Instant) -> bool {
        self.last_send.is_some_and(|at| now.duration_since(at) < ACTIVE)
    }

    /// A discovery round: every endpoint that was not pinged lately, and a call. A peer of which we know no endpoint
    /// is called too, unlike in Tailscale's client: it can still reach us.
    pub(super) fn discover(&mut self, now: Instant) -> Probe {
        self.discover_at = Some(now + PING_INTERVAL);
        self.last_full_ping = Some(now);
        self.candidates.retain(|_, candidate| candidate.is_known(now));
        let rested = self.candidates.iter().filter(|(_, candidate)| is_rested(candidate, now));
        let ping = rested.map(|(addr, _)| *addr).collect();
        Probe { call: self.candidates.is_empty() || !Vec::is_empty(&ping), ping }
    }

    /// A ping is on its way.
    pub(super) fn note_ping(&mut self, tx: TxId, to: SocketAddr, now: Instant) {
        self.pings.sent(tx, to, now);
        if let Some(candidate) = self.candidates.get_mut(&to) {
            candidate.last_ping = Some(now);
        }
    }

    /// The netmap's endpoints. The best address stays unless nobody names it any more.
    pub(super) fn set_endpoints(&mut self, endpoints: &[SocketAddr], now: Instant) {
        if endpoints.iter().any(|endpoint| !self.candidates.contains_key(endpoint)) {
            // Worth a try at once.
            self.discover_at = None;
        }
        let named = self.best_candidate().is_some_and(|best| best.in_netmap);
        self.candidates.values_mut().for_each(|candidate| candidate.in_netmap = false);
        for endpoint in endpoints.iter().take(CANDIDATES) {
            self.candidates.entry(*endpoint).or_default().in_netmap = true;
        }
        if named && self.best_candidate().is_some_and(|best| !best.in_netmap) {
            // The peer was heard from there a moment ago, so it is kept, and asked.
            self.trusted_until = None;
        }
        self.forget_unknown(now);
    }

    /// The peer asks to be pinged there, now.
    pub(super) fn handle_call(&mut self, endpoints: &[SocketAddr], now: Instant) -> Probe {
        // Behind a hard NAT the best address may be one that the peer does not know of, and never names.
        let named = self.best_candidate().is_some_and(|best| best.in_netmap || best.from_call);
        self.candidates.values_mut().for_each(|candidate| candidate.from_call = false);
        for endpoint in endpoints.iter().filter(|endpoint| !is_link_local_v6(endpoint)).take(CANDIDATES) {
            self.candidates.entry(*endpoint).or_default().from_call = true;
        }
        self.forget_unknown(now);
        if named && self.best_candidate().is_some_and(|best| !best.from_call) {
            // It is one that the peer had, whatever the netmap still says.
            self.trusted_until = None;
        }
        self.candidates.values_mut().for_each(|candidate| candidate.last_ping = None);
        Probe { call: false, ..self.discover(now) }
    }

    /// A ping of the peer came from there. Whether to answer: not the copies of one.
    pub(super) fn handle_ping(&mut self, from: SocketAddr, tx: TxId, now: Instant) -> bool {
        if self.candidates.len() >= CANDIDATES && !self.candidates.contains_key(&from) {
            self.candidates.retain(|_, candidate| candidate.is_known(now));
            if self.candidates.len() >= CANDIDATES {
                return true;
            }
        }
        let candidate = self.candidates.entry(from).or_default();
        candidate.pinged_us = Some(now);
        candidate.pinged_tx.replace(tx) != Some(tx)
    }

    /// An address that pinged us while packets go out without a trusted path: to be pinged back, unless it was lately.
    pub(super) fn answer_with_ping(&self, from: &SocketAddr, now: Instant) -> bool {
        let trusted = self.best(now).is_some_and(|(_, trusted)| trusted);
        let rested = self.candidates.get(from).is_some_and(|candidate| is_rested(candidate, now));
        self.is_active(now) && !trusted && rested
    }

    /// A pong. Whether the best address is another now, or trusted again.
    pub(super) fn handle_pong(&mut self, tx: TxId, now: Instant) -> bool {
        let Some((addr, latency)) = self.pings.answered(tx, now) else {
            return false;
        };
        let answered = Measured { addr, latency };
        let before = self.best(now);
        let replace = match before {
            Some((best, trusted)) => best.addr == addr || !trusted || is_better(&answered, &best),
            None => true,
        };
        if !replace {
            return false;
        }
        self.best = Some(answered);
        self.trusted_until = Some(now + TRUST);
        before.is_none_or(|(best, trusted)| best.addr != addr || !trusted)
    }

    /// Whether the best address was given up, and what to send.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> (bool, Probe) {
        let mut lost_best = false;
        while let Some(lost) = self.pings.lost(now) {
            let trusted = self.trusted_until.is_some_and(|until| now <= until);
            if self.best.is_some_and(|best| best.addr == lost.to) && !trusted {
                self.forget_best();
                lost_best = true;
            }
        }
        if self.heartbeat_at.is_none_or(|at| at > now) {
            return (lost_best, Probe::default());
        }
        if !self.is_active(now) {
            self.heartbeat_at = None;
            return (lost_best, Probe::default());
        }
        self.heartbeat_at = Some(now + HEARTBEAT);
        let mut probe = if self.wants_discovery(now) { self.discover(now) } else { Probe::default() };
        if let Some(best) = self.best.filter(|best| !probe.ping.contains(&best.addr)) {
            probe.ping.push(best.addr);
        }
        (lost_best, probe)
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        [self.heartbeat_at, self.pings.next_deadline()].into_iter().flatten().min()
    }

    /// Our own network changed, or the peer has started anew: the best address may still be, and is asked first of all.
    pub(super) fn doubt(&mut self) {
        self.trusted_until = None;
        self.discover_at = None;
        self.candidates.values_mut().for_each(|candidate| candidate.last_ping = None);
    }

    fn wants_discovery(&self, now: Instant) -> bool {
        let Some((best, true)) = self.best(now) else {
            return self.discover_at.is_none_or(|at| at <= now);
        };
        let stale = self.last_full_ping.is_none_or(|at| now.duration_since(at) >= UPGRADE);
        best.latency > GOOD_ENOUGH && stale
    }

    fn forget_unknown(&mut self, now: Instant) {
        self.candidates.retain(|_, candidate| candidate.is_known(now));
        if self.best.is_some_and(|best| !self.candidates.contains_key(&best.addr)) {
            self.forget_best();
        }
    }

    fn best_candidate(&self) -> Option<&Candidate> {
        self.candidates.get(&self.best?.addr)
    }

    fn forget_best(&mut self) {
        self.best = None;
        self.trusted_until = None;
    }
}

fn is_rested(candidate: &Candidate, now: Instant) -> bool {
    candidate.last_ping.is_none_or(|at| now.duration_since(at) >= PING_INTERVAL)
}

fn is_link_local_v6(endpoint: &SocketAddr) -> bool {
    matches!(endpoint, SocketAddr::V6(v6) if v6.ip().is_unicast_link_local())
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "192.0.2.1:1";
    const B: &str = "192.0.2.2:2";

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn after(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    fn direct(start: Instant) -> Path {
        let mut path = Path::default();
        path.set_endpoints(&[addr(A), addr(B)], start);
        path.note_send(start);
        path.discover(start);
        path.note_ping(TxId([1; 12]), addr(A), start);
        assert!(path.handle_pong(TxId([1; 12]), after(start, 20)));
        path
    }

    #[test]
    fn a_path_is_trusted_until_six_and_a_half_seconds_after_its_pong() {
        let start = Instant::now();
        let path = direct(start);
        let best = Measured { addr: addr(A), latency: Duration::from_millis(20) };
        assert_eq!(path.best(after(start, 6_520)), Some((best, true)));
        assert_eq!(path.best(after(start, 6_521)), Some((best, false)));
    }

    #[test]
    fn a_lost_heartbeat_ends_an_untrusted_path_and_a_late_pong_does_not_revive_it() {
        let start = Instant::now();
        let mut path = direct(start);
        let (lost, probe) = path.handle_timeout(after(start, 3_000));
        assert_eq!((lost, probe.ping), (false, vec![addr(A)]));
        path.note_ping(TxId([2; 12]), addr(A), after(start, 3_000));
        assert!(!path.handle_timeout(after(start, 6_000)).0);
        assert!(path.handle_timeout(after(start, 8_000)).0);
        assert_eq!(path.best(after(start, 8_000)), None);
        assert!(!path.handle_pong(TxId([2; 12]), after(start, 8_001)));
    }

    #[test]
    fn discovery_pings_each_endpoint_once_in_five_seconds() {
        let start = Instant::now();
        let mut path = Path::default();
        path.set_endpoints(&[addr(A)], start);
        assert!(path.note_send(start).discover);
        let probe = path.discover(start);
        assert_eq!(probe, Probe { ping: vec![addr(A)], call: true });
        path.note_ping(TxId([1; 12]), addr(A), start);
        assert!(!path.note_send(after(start, 4_999)).discover);
        assert_eq!(path.discover(after(start, 4_999)), Probe::default());
        assert_eq!(path.discover(after(start, 5_000)).ping, [addr(A)]);
    }

    #[test]
    fn a_call_replaces_the_endpoints_of_the_last_one() {
        let start = Instant::now();
        let mut path = Path::default();
        assert_eq!(
            path.handle_call(&[addr(A), addr("[fe80::1]:1")], start),
            Probe { ping: vec![addr(A)], call: false }
        );
        assert_eq!(path.handle_call(&[addr(B)], after(start, 100)).ping, [addr(B)]);
    }

    #[test]
    fn a_repeated_ping_is_answered_once() {
        let now = Instant::now();
        let mut path = Path::default();
        assert!(path.handle_ping(addr(A), TxId([1; 12]), now));
        assert!(!path.handle_ping(addr(A), TxId([1; 12]), now));
        assert!(path.handle_ping(addr(B), TxId([1; 12]), now));
        assert!(path.handle_ping(addr(A), TxId([2; 12]), now));
    }

    #[test]
    fn heartbeats_stop_when_nothing_is_sent() {
        let start = Instant::now();
        let mut path = direct(start);
        for second in 1..48 {
            path.handle_timeout(start + Duration::from_secs(second));
        }
        assert_eq!(path.next_deadline(), None);
    }

    #[test]
    fn the_best_address_goes_with_its_endpoint() {
        let start = Instant::now();
        let mut path = direct(start);
        path.set_endpoints(&[addr(A)], start);
        assert!(path.best(start).is_some());
        path.set_endpoints(&[addr(B)], start);
        assert_eq!(path.best(start), None);
    }
}
