//! What the proxy has done so far: connections, refusals and the last failures.
//!
//! Browsers swallow a proxy's answers, so the same failures are kept here to be served out of band. Everything is
//! bounded: the ring by [`RING`], the list of refused destinations by [`DESTINATIONS`] for each code.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;

use crate::fault::Fault;
use crate::node::Lost;

/// Failures kept. A page that retries a dead host twice a second fills it in eight minutes.
pub const RING: usize = 1_000;

/// Refused destinations listed for each code; more are counted in the code's total alone.
pub const DESTINATIONS: usize = 1_000;

/// How a client spoke to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// SOCKS5, whatever the command.
    Socks5,
    /// SOCKS4, always refused.
    Socks4,
    /// HTTP, CONNECT and plain requests alike.
    Http,
    /// Neither: TLS to the proxy's port, random bytes, or not one byte.
    Unknown,
}

/// One failed request, as `/v1/failures` will show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// When.
    pub at: Timestamp,
    /// The host that was asked for, if the request came that far.
    pub host: Option<String>,
    /// The port that was asked for.
    pub port: Option<u16>,
    /// The four digits after `TC-`.
    pub code: u16,
    /// This time's names and numbers.
    pub detail: String,
}

/// Destinations that were refused with one code.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Refused {
    /// All refusals, listed or not.
    pub total: u64,
    /// Refusals by `host:port`, at most [`DESTINATIONS`] of them.
    pub destinations: BTreeMap<String, u64>,
}

/// Why a datagram of an association was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dropped {
    /// It did not come from the client of the association.
    Foreign,
    /// Its SOCKS5 header is none, or names no target.
    Malformed,
    /// It is a fragment by its SOCKS5 header: none is put together again.
    Fragment,
    /// It was not sent on.
    Unsent(Lost),
    /// It came from a target, but the client's socket did not take it.
    Undelivered,
}

/// Datagrams of all associations, added at the end of each and at most once a second before.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Datagrams {
    /// From clients to targets, those held until their target is located included.
    pub sent: u64,
    /// From targets to clients.
    pub received: u64,
    /// By reason, each datagram once. What is lost on its way shows nowhere, as ever with UDP.
    pub dropped: BTreeMap<Dropped, u64>,
}

impl Datagrams {
    /// Adds what `more` has.
    pub(super) fn add(&mut self, more: &Self) {
        self.sent += more.sent;
        self.received += more.received;
        for (reason, times) in &more.dropped {
            *self.dropped.entry(*reason).or_default() += times;
        }
    }
}

/// A copy of all counters at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counters {
    /// Connections that are open now, those over the limit left out.
    pub active: u64,
    /// Tunnels that are open now, and requests whose answer is not whole yet. The others have nothing to lose: they are
    /// between requests, still say what they want, or have been answered.
    pub unfinished: u64,
    /// Tunnels that were idle when the run cut them: nothing had moved in them for ten seconds, nothing was on its way,
    /// and no client that had sent its last waited. A target that was still thinking counts here, too.
    pub cut_idle: u64,
    /// Connections accepted, by the protocol that their first byte told.
    pub accepted: BTreeMap<Protocol, u64>,
    /// Tunnels and requests whose target answered.
    pub succeeded: u64,
    /// Failures by code, refusals included.
    pub errors: BTreeMap<u16, u64>,
    /// Refusals by policy, by code.
    pub refused: BTreeMap<u16, Refused>,
    /// Datagrams of UDP associations; their bytes are in the two totals below.
    pub datagrams: Datagrams,
    /// Bytes of payload from clients to targets, added when a connection or request ends.
    pub sent: u64,
    /// Bytes of payload from targets to clients, added when a connection or request ends.
    pub received: u64,
}

/// The proxy's counters. Written on the data thread, read by anyone; taken a few times a connection, never a packet.
#[derive(Debug, Default)]
pub struct Stats {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    counters: Counters,
    failures: VecDeque<Failure>,
}

/// Counts as unfinished for as long as it lives.
#[derive(Debug)]
pub(super) struct Unfinished(Arc<Stats>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        let mut inner = self.0.inner();
        inner.counters.unfinished = inner.counters.unfinished.saturating_sub(1);
    }
}

impl Stats {
    /// All counters.
    pub fn counters(&self) -> Counters {
        self.inner().counters.clone()
    }

    /// The last failures, oldest first; those of `host` alone (whatever its case) and at or after `since`, if given.
    pub fn failures(&self, host: Option<&str>, since: Option<Timestamp>) -> Vec<Failure> {
        let of_host = |failure: &&Failure| match host {
            Some(host) => failure.host.as_deref().is_some_and(|own| own.eq_ignore_ascii_case(host)),
            None => true,
        };
        let recent = |failure: &&Failure| since.is_none_or(|since| failure.at >= since);
        self.inner().failures.iter().filter(of_host).filter(recent).cloned().collect()
    }

    pub(super) fn connection_opened(&self) {
        self.inner().counters.active += 1;
    }

    pub(super) fn connection_closed(&self) {
        let mut inner = self.inner();
        inner.counters.active = inner.counters.active.saturating_sub(1);
    }

    /// Something begins that would be missed if it were cut now.
    pub(super) fn unfinished(self: &Arc<Self>) -> Unfinished {
        self.inner().counters.unfinished += 1;
        Unfinished(Arc::clone(self))
    }

    pub(super) fn cut_idle(&self) {
        self.inner().counters.cut_idle += 1;
    }

    pub(super) fn protocol_known(&self, protocol: Protocol) {
        *self.inner().counters.accepted.entry(protocol).or_default() += 1;
    }

    pub(super) fn target_answered(&self) {
        self.inner().counters.succeeded += 1;
    }

    pub(super) fn bytes_carried(&self, sent: u64, received: u64) {
        let mut inner = self.inner();
        inner.counters.sent += sent;
        inner.counters.received += received;
    }

    pub(super) fn datagrams_carried(&self, carried: &Datagrams) {
        self.inner().counters.datagrams.add(carried);
    }

    /// Notes a failure; `target` is what was asked for, where the request came that far.
    pub(super) fn failed(&self, fault: &Fault, target: Option<(String, u16)>) {
        let mut inner = self.inner();
        let code = fault.row.code;
        *inner.counters.errors.entry(code).or_default() += 1;
        if let Some((host, port)) = target.as_ref().filter(|_| is_refusal(fault)) {
            let refused = inner.counters.refused.entry(code).or_default();
            refused.total += 1;
            let destination = format!("{host}:{port}");
            if refused.destinations.len() < DESTINATIONS || refused.destinations.contains_key(&destination) {
                *refused.destinations.entry(destination).or_default() += 1;
            }
        }
        if inner.failures.len() == RING {
            inner.failures.pop_front();
        }
        let (host, port) = target.unzip();
        inner.failures.push_back(Failure { at: Timestamp::now(), host, port, code, detail: fault.detail.clone() });
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Counters stay meaningful whatever a panicking thread left undone.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether policy, not the network, said no: the destinations that promise 1 wants listed.
fn is_refusal(fault: &Fault) -> bool {
    matches!(fault.row.proxy_status, "http_request_denied" | "proxy_loop_detected")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault;

    fn public(detail: &str) -> Fault {
        Fault { row: &fault::PUBLIC, detail: detail.to_owned() }
    }

    #[test]
    fn refused_destinations_are_counted_and_listed() {
        let stats = Stats::default();
        stats.failed(&public("a"), Some((String::from("example.com"), 443)));
        stats.failed(&public("b"), Some((String::from("example.com"), 443)));
        stats.failed(&public("c"), Some((String::from("example.org"), 80)));
        let refused = &stats.counters().refused[&fault::PUBLIC.code];
        assert_eq!(refused.total, 3);
        assert_eq!(refused.destinations["example.com:443"], 2);
        assert_eq!(refused.destinations["example.org:80"], 1);
    }

    #[test]
    fn list_of_destinations_is_bounded_and_the_total_is_not() {
        let stats = Stats::default();
        for port in 0..1_500_u16 {
            stats.failed(&public("x"), Some((String::from("h"), port)));
        }
        let refused = &stats.counters().refused[&fault::PUBLIC.code];
        assert_eq!((refused.total, refused.destinations.len()), (1_500, DESTINATIONS));
    }

    #[test]
    fn ring_keeps_the_last_failures_and_filters_by_host_and_time() {
        let stats = Stats::default();
        for number in 0..RING + 5 {
            stats.failed(&public(&number.to_string()), Some((String::from("Host.corp"), 1)));
        }
        let all = stats.failures(None, None);
        assert_eq!((all.len(), all[0].detail.as_str()), (RING, "5"));
        assert_eq!(stats.failures(Some("host.CORP"), None).len(), RING);
        assert!(stats.failures(Some("other"), None).is_empty());
        assert!(stats.failures(None, Some(Timestamp::MAX)).is_empty());
    }
}
