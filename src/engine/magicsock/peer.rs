//! One peer's paths: which UDP endpoints answer, which is best, and DERP until one does.
//!
//! The best address is trusted for [`TRUST`] after its last pong, or until its peer falls silent ([`silence`]); past
//! that, datagrams go both ways until a pong or a lost ping decides. The receiver's replay protection drops the second
//! copies.
//! Source: Tailscale, wgengine/magicsock, endpoint.go.

mod news;
mod refused;
mod retract;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

pub(super) use self::news::{Answered, Heard, News, Probe, Sent};
use super::disco::Pings;
use super::endpoints::is_link_local_v6;
use super::rank::{Measured, is_better};
use super::silence::{self, Silence};
use crate::netmap::RegionId;
use crate::wire::disco::TxId;

/// How long a pong vouches for its address. Source: Tailscale, `trustUDPAddrDuration`.
const TRUST: Duration = Duration::from_millis(6_500);
/// An endpoint is not pinged for discovery more often. Source: Tailscale, `discoPingInterval`.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// How long after a call the endpoints are pinged once more, if none is trusted by then. The call has reached the peer
/// over both our relays, and the peer's own pings have opened the filter before it; where our NAT maps each destination
/// to another port, none of them reaches us. How far the relays are is not known: after a pause all of these are tried,
/// later only the last.
const AGAIN: [Duration; 3] = [Duration::from_millis(20), Duration::from_millis(70), Duration::from_millis(200)];
/// A peer that knew us answers within that, before its session does: first handshakes are repeated at that pace.
const STRANGER: Duration = Duration::from_millis(200);
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
    /// Whether a ping of the peer from there was answered with one of ours since the last round of discovery.
    pinged_back: bool,
    /// Where the peer last saw us from there, by its pong.
    sees_us: Option<SocketAddr>,
}

impl Candidate {
    fn is_known(&self, now: Instant) -> bool {
        self.in_netmap || self.from_call || self.pinged_us.is_some_and(|at| now.duration_since(at) < ACTIVE)
    }
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
    /// When the peer was last called, and how many of the pings of [`AGAIN`] that has had.
    called: Option<(Instant, usize)>,
    silence: Silence,
    /// When control named an endpoint of a peer in use that was new: the peer may have moved.
    moved_at: Option<Instant>,
    /// When the machine last refused what goes to the best address, of the times that were acted upon.
    refused_at: Option<Instant>,
    /// Whether the ping that asked because of that was refused as well.
    ping_refused: bool,
    /// When what was sent of late was last sent again for that, by the relay too.
    resent_at: Option<Instant>,
    retraction: retract::Retraction,
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

    /// The address to use, if it is trusted.
    fn trusted(&self, now: Instant) -> Option<Measured> {
        self.best(now).filter(|(_, trusted)| *trusted).map(|(best, _)| best)
    }

    /// A packet goes out now.
    pub(super) fn note_send(&mut self, now: Instant) -> Sent {
        self.last_send = Some(now);
        let first = self.heartbeat_at.is_none();
        if first {
            self.heartbeat_at = Some(now + HEARTBEAT);
        }
        let trusted = self.trusted(now);
        let watched = trusted.is_some_and(|best| self.silence.note_send(best.latency, now));
        let discover = trusted.is_none() && self.discover_at.is_none_or(|at| at <= now);
        Sent { rescheduled: first || watched, discover }
    }

    /// Whether a packet went out lately.
    pub(super) fn is_active(&self, now: Instant) -> bool {
        self.last_send.is_some_and(|at| now.duration_since(at) < ACTIVE)
    }

    /// A discovery round: every endpoint that was not pinged lately, and a call.
    ///
    /// The call goes out whether or not an endpoint is left to ping, unlike in Tailscale's client. A peer of which we
    /// know none can still reach us; and one whose own calls make us ping all the time must still learn where we are.
    pub(super) fn discover(&mut self, now: Instant) -> Probe {
        let doubtful = self.best(now).is_some_and(|(_, trusted)| !trusted);
        let doubt = now.checked_sub(PING_INTERVAL).filter(|_| doubtful);
        self.discover_at = Some(now + PING_INTERVAL);
        self.last_full_ping = Some(now);
        self.candidates.values_mut().for_each(|candidate| candidate.pinged_back = false);
        Probe { ping: self.rested(now), call: true, doubt }
    }

    /// A call goes out, which may be later than its round.
    pub(super) fn note_call(&mut self, now: Instant) {
        let pause = self.called.is_none_or(|(at, _)| now.duration_since(at) >= PING_INTERVAL * 2);
        self.called = Some((now, if pause { 0 } else { AGAIN.len() - 1 }));
    }

    /// When the endpoints are pinged once more because of the last call.
    fn again_at(&self) -> Option<Instant> {
        let (at, pings) = self.called?;
        Some(at + *AGAIN.get(pings)?)
    }

    /// A session with the peer has begun, or a handshake has no way to it. If the round of discovery is older than that
    /// by more than a peer takes to answer, the peer may not have known us then, and drops what a stranger says: the
    /// next packet begins a new one.
    pub(super) fn look_again(&mut self, now: Instant) {
        let stale = self.last_full_ping.is_some_and(|at| now.duration_since(at) >= STRANGER);
        if self.trusted(now).is_none() && stale {
            self.forget_round();
        }
    }

    /// The endpoints that were not pinged lately.
    fn rested(&mut self, now: Instant) -> Vec<SocketAddr> {
        self.candidates.retain(|_, candidate| candidate.is_known(now));
        let rested = self.candidates.iter().filter(|(_, candidate)| is_rested(candidate, now));
        rested.map(|(addr, _)| *addr).collect()
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
            self.moved_at = self.heartbeat_at.map(|_| now);
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
        for endpoint in endpoints.iter().filter(|endpoint| !is_link_local_v6(endpoint.ip())).take(CANDIDATES) {
            self.candidates.entry(*endpoint).or_default().from_call = true;
        }
        self.forget_unknown(now);
        if named && self.best_candidate().is_some_and(|best| !best.from_call) {
            // It is one that the peer had, whatever the netmap still says.
            self.trusted_until = None;
        }
        self.candidates.values_mut().for_each(|candidate| candidate.last_ping = None);
        // Our own round is due when it is: it tells the peer where we are.
        Probe { ping: self.rested(now), ..Probe::default() }
    }

    /// A ping of the peer came from there. Copies are not answered.
    pub(super) fn handle_ping(&mut self, from: SocketAddr, tx: TxId, now: Instant) -> Heard {
        let new = !self.candidates.contains_key(&from);
        if new && self.candidates.len() >= CANDIDATES {
            self.candidates.retain(|_, candidate| candidate.is_known(now));
            if self.candidates.len() >= CANDIDATES {
                return Heard::Known;
            }
        }
        let candidate = self.candidates.entry(from).or_default();
        candidate.pinged_us = Some(now);
        match candidate.pinged_tx.replace(tx) == Some(tx) {
            true => Heard::Copy,
            false if new => Heard::New,
            false => Heard::Known,
        }
    }

    /// The peer has pinged us from an address that nobody had named. The best address, which is to be asked whether it
    /// is still the peer's: behind a hard NAT a peer that moved cannot name its new one.
    pub(super) fn verify(&mut self, now: Instant) -> Option<SocketAddr> {
        let best = self.trusted(now)?;
        let verified = now + silence::pong_limit(best.latency);
        self.trusted_until = self.trusted_until.map(|until| until.min(verified));
        Some(best.addr)
    }

    /// An address that pinged us while packets go out, and is not the one that they trust: to be pinged back, once a
    /// round.
    ///
    /// Even if it was pinged a moment ago: the filter before the peer drops what comes before the peer's own first
    /// datagram to us, and that one is here now. Even if another address is trusted by now: this may be the better one.
    pub(super) fn answer_with_ping(&mut self, from: &SocketAddr, now: Instant) -> bool {
        let settled = self.trusted(now).is_some_and(|best| best.addr == *from);
        if settled || !self.is_active(now) {
            return false;
        }
        let candidate = self.candidates.get_mut(from);
        candidate.is_some_and(|candidate| !std::mem::replace(&mut candidate.pinged_back, true))
    }

    /// A pong, by which the peer saw us at `source`.
    pub(super) fn handle_pong(&mut self, tx: TxId, source: SocketAddr, now: Instant) -> Answered {
        let Some((addr, latency)) = self.pings.answered(tx, now) else {
            return Answered::default();
        };
        let answered = Measured { addr, latency };
        let before = self.best(now);
        let (replace, same) = match before {
            Some((best, trusted)) => (!trusted || is_better(&answered, &best), best.addr == addr),
            None => (true, false),
        };
        let remapped = self.note_source(addr, same, source, now);
        if !replace && !same {
            return Answered::default();
        }
        self.best = Some(answered);
        self.trusted_until = Some(now + TRUST);
        self.silence.note_pong();
        let distrusted = before.is_none_or(|(_, trusted)| !trusted);
        let resent = self.resent_at.is_some_and(|at| now.duration_since(at) < PING_INTERVAL);
        Answered { better: distrusted || !same, restored: distrusted && !resent, remapped }
    }

    /// Does what time demands. The peer has been silent since `unheard`, although packets went out.
    pub(super) fn handle_timeout(&mut self, unheard: Option<Instant>, now: Instant) -> News {
        let mut news = News::default();
        while let Some(lost) = self.pings.lost(now) {
            if self.best(now).is_some_and(|(best, trusted)| best.addr == lost.to && !trusted) {
                self.forget_best();
                news.lost = true;
            }
        }
        let trusted = self.trusted(now);
        if self.moved_at.take().is_some() && trusted.is_none() && self.is_active(now) {
            // Its relay may have had another connection of the peer's when that was sent which is not answered.
            news.resend = unheard.is_some();
            news.probe = self.discover(now);
        } else {
            news.probe = self.probe(now);
        }
        match self.silence.handle_timeout(trusted.map(|best| best.latency), unheard, now) {
            silence::Step::Wait => {}
            silence::Step::Ask => {
                let asked = trusted.map(|best| best.addr).filter(|addr| !news.probe.ping.contains(addr));
                news.probe.ping.extend(asked);
            }
            silence::Step::Doubt(since) => {
                self.retract(now);
                self.trusted_until = None;
                news.resend = true;
                news.probe = Probe { doubt: Some(since), ..self.discover(now) };
            }
        }
        news
    }

    /// The pings that are due.
    fn probe(&mut self, now: Instant) -> Probe {
        let mut probe = Probe::default();
        let again = self.again_at().is_some_and(|at| at <= now);
        if let Some((_, pings)) = self.called.as_mut().filter(|_| again) {
            *pings += 1;
        }
        if again && self.is_active(now) && self.trusted(now).is_none() {
            probe.ping.extend(self.candidates.keys());
        }
        if self.heartbeat_at.is_none_or(|at| at > now) {
            return probe;
        }
        if !self.is_active(now) {
            self.heartbeat_at = None;
            return probe;
        }
        self.heartbeat_at = Some(now + HEARTBEAT);
        if self.wants_discovery(now) {
            probe = self.discover(now);
        }
        if let Some(best) = self.best.filter(|best| !probe.ping.contains(&best.addr)) {
            probe.ping.push(best.addr);
        }
        probe
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let asked = [self.again_at(), self.silence.next_deadline(), self.pings.next_deadline()];
        let others = [self.heartbeat_at, self.moved_at, self.retraction.next_deadline()];
        asked.into_iter().chain(others).flatten().min()
    }

    /// Our own network changed, or the peer is another process now: no pong so far vouches for an address. The best one
    /// may still be, and is asked first of all.
    pub(super) fn doubt(&mut self) {
        self.trusted_until = None;
        self.forget_round();
        // Nor does where it saw us before.
        self.candidates.values_mut().for_each(|candidate| candidate.sees_us = None);
    }

    /// The next packet begins a round of discovery that leaves no endpoint out.
    fn forget_round(&mut self) {
        self.discover_at = None;
        self.candidates.values_mut().for_each(|candidate| candidate.last_ping = None);
    }

    fn wants_discovery(&self, now: Instant) -> bool {
        let Some(best) = self.trusted(now) else {
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
    // Less what the round before was late with its last ping.
    let late = AGAIN[AGAIN.len() - 1];
    candidate.last_ping.is_none_or(|at| now.duration_since(at) >= PING_INTERVAL - late)
}

#[cfg(test)]
mod tests;
