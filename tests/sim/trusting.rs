//! A peer's paths as Tailscale's client chooses them, for the other end of ours: it sends by an address until its trust
//! in it ends, whatever it hears or does not hear, unless a call takes the address back.
//!
//! Source: Tailscale, wgengine/magicsock, endpoint.go.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tailcar::wire::disco::TxId;

const TRUST: Duration = Duration::from_millis(6_500);
const HEARTBEAT: Duration = Duration::from_secs(3);
const PING_INTERVAL: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
const ACTIVE: Duration = Duration::from_secs(45);

#[derive(Debug, Default)]
struct Candidate {
    in_netmap: bool,
    called: bool,
    pinged_us: Option<Instant>,
    last_ping: Option<Instant>,
}

impl Candidate {
    fn stays(&self, now: Instant) -> bool {
        self.called || self.pinged_us.map_or(self.in_netmap, |at| now.duration_since(at) <= ACTIVE)
    }
}

/// What the peer sends by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    Ping(SocketAddr, TxId),
    Pong(SocketAddr, TxId),
    Call,
}

/// The paths to one other node.
#[derive(Debug, Default)]
pub(crate) struct Trusting {
    best: Option<(SocketAddr, Duration)>,
    trusted_until: Option<Instant>,
    candidates: BTreeMap<SocketAddr, Candidate>,
    called: BTreeSet<SocketAddr>,
    pings: BTreeMap<TxId, (SocketAddr, Instant)>,
    last_send: Option<Instant>,
    heartbeat_at: Option<Instant>,
    count: u64,
    said: VecDeque<Said>,
}

impl Trusting {
    pub(crate) fn poll(&mut self) -> Option<Said> {
        self.said.pop_front()
    }

    /// Where it sends by UDP, and whether it trusts that.
    pub(crate) fn best(&self, now: Instant) -> Option<(SocketAddr, bool)> {
        self.best.map(|(best, _)| (best, self.trusted_until.is_some_and(|until| now <= until)))
    }

    /// A packet goes out: by UDP, and by DERP.
    pub(crate) fn send(&mut self, now: Instant) -> (Option<SocketAddr>, bool) {
        let best = self.best(now);
        let trusted = best.is_some_and(|(_, trusted)| trusted);
        if !trusted {
            self.ping_all(true, now);
        }
        self.last_send = Some(now);
        self.heartbeat_at.get_or_insert(now + HEARTBEAT);
        (best.map(|(best, _)| best), !trusted)
    }

    fn ping_all(&mut self, call: bool, now: Instant) {
        let gone: Vec<_> = self.candidates.iter().filter(|(_, it)| !it.stays(now)).map(|(addr, _)| *addr).collect();
        gone.into_iter().for_each(|addr| self.forget(addr));
        let rested = |it: &Candidate| it.last_ping.is_none_or(|at| now.duration_since(at) >= PING_INTERVAL);
        let rested: Vec<_> = self.candidates.iter().filter(|(_, it)| rested(it)).map(|(addr, _)| *addr).collect();
        let any = !rested.is_empty();
        rested.into_iter().for_each(|addr| self.ping(addr, now));
        if any && call {
            self.said.push_back(Said::Call);
        }
    }

    fn ping(&mut self, to: SocketAddr, now: Instant) {
        let Some(candidate) = self.candidates.get_mut(&to) else { return };
        candidate.last_ping = Some(now);
        self.count += 1;
        let mut tx = [0x77; 12];
        tx[..8].copy_from_slice(&self.count.to_be_bytes());
        self.pings.insert(TxId(tx), (to, now));
        self.said.push_back(Said::Ping(to, TxId(tx)));
    }

    fn forget(&mut self, addr: SocketAddr) {
        self.candidates.remove(&addr);
        self.best.take_if(|(best, _)| *best == addr);
    }

    pub(crate) fn handle_ping(&mut self, from: SocketAddr, tx: TxId, now: Instant) {
        let known = self.candidates.contains_key(&from);
        let candidate = self.candidates.entry(from).or_default();
        if !known || candidate.pinged_us.is_some() {
            candidate.pinged_us = Some(now);
        }
        self.said.push_back(Said::Pong(from, tx));
    }

    pub(crate) fn handle_pong(&mut self, tx: TxId, now: Instant) {
        let Some((addr, at)) = self.pings.remove(&tx) else { return };
        if !self.candidates.contains_key(&addr) {
            return;
        }
        let latency = now.duration_since(at);
        let untrusted = self.best(now).is_none_or(|(_, trusted)| !trusted);
        let better = self.best.is_none_or(|(best, before)| best != addr && latency * 100 < before * 99);
        if untrusted || better {
            self.best = Some((addr, latency));
        }
        if self.best.is_some_and(|(best, _)| best == addr) {
            self.best = Some((addr, latency));
            self.trusted_until = Some(now + TRUST);
        }
    }

    pub(crate) fn handle_call(&mut self, endpoints: &[SocketAddr], now: Instant) {
        let before = std::mem::take(&mut self.called);
        for endpoint in endpoints {
            self.called.insert(*endpoint);
            self.candidates.entry(*endpoint).or_default().called = true;
        }
        let gone: Vec<SocketAddr> = before.difference(&self.called).copied().collect();
        gone.into_iter().for_each(|addr| self.forget(addr));
        self.candidates.values_mut().for_each(|candidate| candidate.last_ping = None);
        self.ping_all(false, now);
    }

    pub(crate) fn set_endpoints(&mut self, endpoints: &[SocketAddr]) {
        self.candidates.values_mut().for_each(|candidate| candidate.in_netmap = false);
        for endpoint in endpoints {
            self.candidates.entry(*endpoint).or_default().in_netmap = true;
        }
        let gone = |it: &Candidate| !it.in_netmap && !it.called && it.pinged_us.is_none();
        let gone: Vec<_> = self.candidates.iter().filter(|(_, it)| gone(it)).map(|(addr, _)| *addr).collect();
        gone.into_iter().for_each(|addr| self.forget(addr));
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        let late = |at: &Instant| now.duration_since(*at) >= PING_TIMEOUT;
        let lost: Vec<_> = self.pings.iter().filter(|(_, (_, at))| late(at)).map(|(tx, (to, _))| (*tx, *to)).collect();
        for (tx, to) in lost {
            self.pings.remove(&tx);
            if self.best(now) == Some((to, false)) {
                self.best = None;
            }
        }
        if self.heartbeat_at.is_none_or(|at| at > now) {
            return;
        }
        self.heartbeat_at = None;
        if self.last_send.is_none_or(|at| now.duration_since(at) > ACTIVE) {
            return;
        }
        self.heartbeat_at = Some(now + HEARTBEAT);
        if let Some((best, _)) = self.best {
            self.ping(best, now);
        }
        if self.best(now).is_none_or(|(_, trusted)| !trusted) {
            self.ping_all(true, now);
        }
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let lost = self.pings.values().map(|(_, at)| *at + PING_TIMEOUT);
        lost.chain(self.heartbeat_at).min()
    }
}
