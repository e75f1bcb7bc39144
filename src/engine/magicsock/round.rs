//! One round of measuring: STUN requests to servers, and which of them answered.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::netmap::RegionId;
use crate::wire::stun::TransactionId;
use crate::wire::tailcfg::derp::{DerpNode, Family, Region};

/// Requests to a server that does not answer.
const TRIES: usize = 3;
/// The time between them.
const TRY_INTERVAL: Duration = Duration::from_millis(100);
/// After the first answer, the slower servers are not waited for longer than that.
const GRACE: Duration = Duration::from_millis(500);
/// Without any answer, HTTPS is tried beside.
const UDP_PATIENCE: Duration = Duration::from_secs(1);
/// Answers are waited for that long. Source: Tailscale, net/netcheck, `stunProbeTimeout`.
const STUN_TIMEOUT: Duration = Duration::from_secs(3);
/// A round with HTTPS ends then. Source: the same, `ReportTimeout`.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// A server of a region by one address family; `true` is IPv6.
type Target = (RegionId, bool);

/// How a target is asked.
#[derive(Debug)]
struct Asked {
    servers: Vec<SocketAddr>,
    tries: usize,
    /// When the next one is due; `None` after the last.
    try_at: Option<Instant>,
}

/// A round under way.
#[derive(Debug)]
pub(super) struct Round {
    /// Whether all regions take part, the home may move, and HTTPS helps out where UDP does not answer.
    pub(super) full: bool,
    started: Instant,
    targets: BTreeMap<Target, Asked>,
    /// Regions whose servers' names are being resolved.
    unresolved: BTreeSet<RegionId>,
    /// The shortest time in which each region has answered, by UDP or HTTPS.
    heard: BTreeMap<RegionId, Duration>,
    sent: BTreeMap<TransactionId, (RegionId, SocketAddr, Instant)>,
    answered: BTreeSet<Target>,
    /// Servers to which the machine knows no way.
    refused: BTreeSet<SocketAddr>,
    /// When the first was asked.
    asked_at: Option<Instant>,
    /// Whether who has not answered by now is silent, rather than slow.
    silent: bool,
    first_answer: Option<Instant>,
    /// Whether endpoints and home have been concluded from all that has answered.
    pub(super) settled: bool,
    https: Option<BTreeSet<RegionId>>,
    first_https: Option<Instant>,
}

impl Round {
    pub(super) fn new(full: bool, now: Instant) -> Self {
        Self {
            full,
            started: now,
            targets: BTreeMap::new(),
            unresolved: BTreeSet::new(),
            heard: BTreeMap::new(),
            sent: BTreeMap::new(),
            answered: BTreeSet::new(),
            refused: BTreeSet::new(),
            asked_at: None,
            silent: false,
            first_answer: None,
            settled: false,
            https: None,
            first_https: None,
        }
    }

    /// The servers of a region to ask, as far as is known now.
    pub(super) fn ask(&mut self, region: RegionId, servers: &[SocketAddr], now: Instant) {
        for v6 in [false, true] {
            let servers: Vec<SocketAddr> = servers.iter().copied().filter(|server| server.is_ipv6() == v6).collect();
            let known = self.targets.get(&(region, v6)).is_some_and(|asked| asked.servers == servers);
            if !servers.is_empty() && !known {
                self.asked_at.get_or_insert(now);
                self.targets.insert((region, v6), Asked { servers, tries: 0, try_at: Some(now) });
            }
        }
    }

    /// A region whose servers' addresses are not known yet.
    pub(super) fn await_address(&mut self, region: RegionId) {
        self.unresolved.insert(region);
    }

    /// They are known now, or will not be.
    pub(super) fn note_resolved(&mut self, region: RegionId) {
        self.unresolved.remove(&region);
    }

    /// The requests that are due now: region and server.
    pub(super) fn due(&mut self, now: Instant) -> Vec<(RegionId, SocketAddr)> {
        let silent = self.targets.iter_mut().filter(|(target, _)| !self.answered.contains(target));
        let due = silent.filter(|(_, asked)| asked.try_at.is_some_and(|at| at <= now));
        let ask = |((region, _), asked): (&Target, &mut Asked)| {
            let server = asked.servers[asked.tries % asked.servers.len()];
            asked.tries += 1;
            asked.try_at = (asked.tries < TRIES).then(|| now + TRY_INTERVAL);
            (*region, server)
        };
        due.map(ask).collect()
    }

    fn try_at(&self) -> Option<Instant> {
        let silent = self.targets.iter().filter(|(target, _)| !self.answered.contains(target));
        silent.filter_map(|(_, asked)| asked.try_at).min()
    }

    pub(super) fn note_sent(&mut self, transaction: TransactionId, region: RegionId, server: SocketAddr, now: Instant) {
        self.sent.insert(transaction, (region, server, now));
    }

    /// An answer: the region, the server, and how long it took.
    pub(super) fn answer(
        &mut self,
        transaction: &TransactionId,
        now: Instant,
    ) -> Option<(RegionId, SocketAddr, Duration)> {
        let (region, server, at) = self.sent.remove(transaction)?;
        self.answered.insert((region, server.is_ipv6()));
        self.first_answer.get_or_insert(now);
        let latency = now.duration_since(at);
        self.note_heard(region, latency);
        Some((region, server, latency))
    }

    fn note_heard(&mut self, region: RegionId, latency: Duration) {
        // What was concluded before is concluded anew: UDP that seemed blocked is slow, a home is farther than it was, and
        // each server may see us elsewhere.
        self.settled = false;
        let shortest = self.heard.entry(region).or_insert(latency);
        *shortest = latency.min(*shortest);
    }

    /// Nothing can be sent there now. It is asked again all the same, since routes come late, but not waited for.
    pub(super) fn refuse(&mut self, server: SocketAddr) {
        self.refused.insert(server);
    }

    /// HTTPS begins, for these regions.
    pub(super) fn begin_https(&mut self, regions: BTreeSet<RegionId>) {
        self.https = Some(regions);
    }

    /// A region's HTTPS answered, or failed.
    pub(super) fn answer_https(&mut self, region: RegionId, latency: Option<Duration>, now: Instant) {
        // One that a round before has asked for: nothing is concluded from it here.
        let Some(waiting) = self.https.as_mut() else { return };
        waiting.remove(&region);
        if let Some(latency) = latency {
            self.first_https.get_or_insert(now);
            self.note_heard(region, latency);
        }
    }

    /// Whether nothing came by UDP although it was tried, or cannot be tried, long enough for HTTPS to help.
    pub(super) fn wants_https(&self, now: Instant) -> bool {
        let hopeless = self.targets.is_empty() && self.unresolved.is_empty();
        let patient = now.duration_since(self.started) < UDP_PATIENCE;
        self.full && self.https.is_none() && self.first_answer.is_none() && (hopeless || !patient)
    }

    /// Whether there is something to conclude now: everybody answered, or waiting longer is no use.
    pub(super) fn is_conclusive(&self, now: Instant) -> bool {
        let since = |at: Option<Instant>| at.is_some_and(|at| now.duration_since(at) >= GRACE);
        if self.first_answer.is_some() {
            return self.is_complete() || since(self.first_answer) || self.is_over(now);
        }
        if self.https.is_some() {
            return self.https_is_done() || since(self.first_https) || self.is_over(now);
        }
        (self.all_answered() && !self.full) || self.is_over(now)
    }

    /// Whether every server answered by UDP.
    fn all_answered(&self) -> bool {
        self.unresolved.is_empty() && self.targets.keys().all(|target| self.answered.contains(target))
    }

    /// Whether HTTPS waits for no region.
    fn https_is_done(&self) -> bool {
        self.https.as_ref().is_none_or(BTreeSet::is_empty)
    }

    /// Whether every server answered that can be asked.
    fn is_complete(&self) -> bool {
        let done = |(target, asked)| self.answered.contains(target) || self.is_refused(asked);
        self.unresolved.is_empty() && self.targets.iter().all(done)
    }

    fn is_refused(&self, asked: &Asked) -> bool {
        asked.servers.iter().all(|server| self.refused.contains(server))
    }

    /// When who has not answered counts as silent.
    fn silent_at(&self) -> Option<Instant> {
        self.asked_at.filter(|_| !self.silent).map(|at| at + STUN_TIMEOUT)
    }

    /// Whether that has come, as is said once.
    pub(super) fn take_silence(&mut self, now: Instant) -> bool {
        let news = self.silent_at().is_some_and(|at| at <= now);
        self.silent |= news;
        news
    }

    /// Whether late answers are no longer waited for.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        if self.settled && self.all_answered() && self.https_is_done() {
            return true;
        }
        let limit = if self.https.is_some() { REPORT_TIMEOUT } else { STUN_TIMEOUT };
        now.duration_since(self.started) >= limit
    }

    /// Who has answered, by UDP or HTTPS, and how fast.
    pub(super) fn heard(&self) -> &BTreeMap<RegionId, Duration> {
        &self.heard
    }

    /// Whether any server answered by IPv6, or by UDP at all; `None` when none was asked, or may answer yet: HTTPS settles
    /// a round sooner than slow UDP.
    pub(super) fn worked(&self) -> (Option<bool>, Option<bool>) {
        let known = |counts: fn(bool) -> bool| {
            let asked: Vec<_> = self.targets.iter().filter(|((_, v6), _)| counts(*v6)).collect();
            let answered = self.answered.iter().any(|(_, v6)| counts(*v6));
            let hopeless = self.settled && asked.iter().all(|(_, asked)| self.is_refused(asked));
            (answered || !asked.is_empty() && (self.silent || hopeless)).then_some(answered)
        };
        (known(|v6| v6), known(|_| true))
    }

    pub(super) fn next_deadline(&self) -> Instant {
        let grace = |at: Option<Instant>| at.filter(|_| !self.settled).map(|at| at + GRACE);
        let https = self.full && self.https.is_none() && self.first_answer.is_none();
        let https_at = https.then_some(self.started + UDP_PATIENCE);
        let limit = if self.https.is_some() { REPORT_TIMEOUT } else { STUN_TIMEOUT };
        let first = grace(self.first_answer).or_else(|| grace(self.first_https));
        let over = self.started + limit;
        [self.try_at(), first, https_at, self.silent_at()].into_iter().flatten().min().map_or(over, |at| at.min(over))
    }
}

/// Where a region's servers answer STUN in the families that can be sent, and the name that stands for those of which
/// the map tells no address. Source: Tailscale, net/netcheck, `nodeAddrPort`.
pub(super) fn servers(
    region: &Region,
    resolved: &[SocketAddr],
    has_family: impl Fn(bool) -> bool,
) -> (Vec<SocketAddr>, Option<(String, u16)>) {
    let nodes = || region.nodes.iter().filter_map(|node| Some((node, node.stun()?)));
    let (mut servers, mut named) = (Vec::new(), None);
    for v6 in [false, true].into_iter().filter(|v6| has_family(*v6)) {
        let known = nodes().filter_map(|(node, port)| Some(SocketAddr::new(address(node, v6)?, port)));
        let before = servers.len();
        servers.extend(known);
        if servers.len() > before {
            continue;
        }
        let Some((node, port)) = nodes().find(|(node, _)| is_named(node, v6)) else { continue };
        named.get_or_insert_with(|| (node.host_name.clone(), port));
        servers.extend(resolved.iter().filter(|server| server.is_ipv6() == v6));
    }
    (servers, named)
}

fn family(node: &DerpNode, v6: bool) -> Family {
    if v6 { node.ipv6 } else { node.ipv4 }
}

/// The server's address of that family, if it is known.
fn address(node: &DerpNode, v6: bool) -> Option<IpAddr> {
    let known = match family(node, v6) {
        Family::At(ip) => Some(ip),
        Family::Resolve => node.host_name.parse().ok(),
        Family::Never => None,
    };
    node.stun_test_ip.or(known).filter(|ip| ip.is_ipv6() == v6)
}

/// Whether its addresses of that family are those of its name.
fn is_named(node: &DerpNode, v6: bool) -> bool {
    let named = node.stun_test_ip.is_none() && node.host_name.parse::<IpAddr>().is_err();
    named && family(node, v6) == Family::Resolve
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a region with this server: whom to ask, and whose name, before and after it is known to lead to both families.
    fn asked(node: &str, families: [bool; 2]) -> (Vec<String>, Option<String>, Vec<String>) {
        let region = Region { nodes: vec![serde_json::from_str(node).unwrap()], ..Region::default() };
        let resolved = ["192.0.2.9:3478", "[2001:db8::9]:3478"].map(|server| server.parse().unwrap());
        let texts = |servers: Vec<SocketAddr>| servers.iter().map(ToString::to_string).collect();
        let has_family = |v6: bool| families[usize::from(v6)];
        let (before, name) = servers(&region, &[], has_family);
        let (after, _) = servers(&region, &resolved, has_family);
        (texts(before), name.map(|(host, _)| host), texts(after))
    }

    #[test]
    fn a_name_is_asked_for_families_that_can_be_sent_and_are_left_to_it() {
        let strings = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        let (named4, named6, at) = ("192.0.2.9:3478", "[2001:db8::9]:3478", "192.0.2.1:3478");
        let name = || Some("h".to_owned());
        let v4_known = r#"{"HostName":"h","IPv4":"192.0.2.1"}"#;
        assert_eq!(asked(v4_known, [true, false]), (strings(&[at]), None, strings(&[at])));
        assert_eq!(asked(v4_known, [false, true]), (Vec::new(), name(), strings(&[named6])));
        assert_eq!(asked(v4_known, [true, true]), (strings(&[at]), name(), strings(&[at, named6])));
        let v6_only = r#"{"HostName":"h","IPv4":"none"}"#;
        assert_eq!(asked(v6_only, [true, true]), (Vec::new(), name(), strings(&[named6])));
        assert_eq!(asked(v6_only, [true, false]), (Vec::new(), None, Vec::new()));
        assert_eq!(asked(r#"{"HostName":"h"}"#, [true, true]), (Vec::new(), name(), strings(&[named4, named6])));
        assert_eq!(asked(r#"{"HostName":"192.0.2.1"}"#, [true, true]), (strings(&[at]), None, strings(&[at])));
    }
}
