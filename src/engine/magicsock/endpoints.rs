//! Our own UDP endpoints: what servers saw of us, and our interfaces' addresses.
//!
//! Source: Tailscale, wgengine/magicsock, `determineEndpoints`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::wire::tailcfg::map::EndpointType;

/// An address that a server once saw may still be mapped. Source: Tailscale, `endpointTracker`.
const REMEMBERED: Duration = Duration::from_secs(310);
/// Mapped ports remembered for each address. Source: the same.
const REMEMBERED_PORTS: usize = 6;

/// What the machine's interfaces are to us.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalEndpoints {
    /// Where a peer might reach us without a relay.
    endpoints: Vec<SocketAddr>,
    /// Whether datagrams can be sent by IPv4, and by IPv6.
    families: [bool; 2],
}

impl LocalEndpoints {
    /// Datagrams can be sent from there, though no peer is told of it: a carrier's NAT has addresses like a tailnet's.
    pub fn note_source(&mut self, ip: IpAddr) {
        self.families[usize::from(ip.is_ipv6())] |= !ip.is_loopback();
    }

    /// Whether datagrams of that family can be sent at all. IPv4 is assumed where neither can: there is loopback.
    pub fn has_family(&self, v6: bool) -> bool {
        if self.families == [false; 2] { !v6 } else { self.families[usize::from(v6)] }
    }
}

impl From<Vec<SocketAddr>> for LocalEndpoints {
    fn from(endpoints: Vec<SocketAddr>) -> Self {
        let mut local = Self { endpoints, families: [false; 2] };
        local.endpoints.clone().iter().for_each(|endpoint| local.note_source(endpoint.ip()));
        local
    }
}

/// The addresses.
#[derive(Debug, Default)]
pub(super) struct Endpoints {
    local: LocalEndpoints,
    /// What servers saw, and when they last did.
    seen: BTreeMap<SocketAddr, Instant>,
    /// What each server saw, in the present round: to find out whether the NAT minds the destination.
    by_server: BTreeMap<SocketAddr, SocketAddr>,
}

impl Endpoints {
    /// Our interfaces' addresses with the bound port. Whether they are others than before.
    pub(super) fn set_local(&mut self, mut local: LocalEndpoints) -> bool {
        let endpoints = &mut local.endpoints;
        endpoints.retain(|endpoint| !is_overlay(endpoint.ip()) && !is_link_local_v6(endpoint.ip()));
        let elsewhere = endpoints.iter().any(|endpoint| !endpoint.ip().is_loopback());
        if elsewhere {
            endpoints.retain(|endpoint| !endpoint.ip().is_loopback());
        }
        endpoints.sort_unstable();
        endpoints.dedup();
        let changed = self.local != local;
        self.local = local;
        changed
    }

    /// Whether datagrams of that family can be sent: [`LocalEndpoints::has_family`].
    pub(super) fn has_family(&self, v6: bool) -> bool {
        self.local.has_family(v6)
    }

    /// Servers are asked anew.
    pub(super) fn begin_round(&mut self) {
        self.by_server.clear();
    }

    /// What servers saw is void.
    pub(super) fn forget_seen(&mut self) {
        self.seen.clear();
    }

    /// What servers saw before that, in one family, is void.
    pub(super) fn forget_before(&mut self, since: Instant, v6: bool) {
        self.seen.retain(|endpoint, at| endpoint.is_ipv6() != v6 || *at > since);
    }

    /// A server saw us there.
    pub(super) fn saw(&mut self, server: SocketAddr, us: SocketAddr, now: Instant) {
        self.by_server.insert(server, us);
        self.seen.insert(us, now);
        self.seen.retain(|_, at| now.duration_since(*at) < REMEMBERED);
        while self.seen.keys().filter(|endpoint| endpoint.ip() == us.ip()).count() > REMEMBERED_PORTS {
            let of_address = self.seen.iter().filter(|(endpoint, _)| endpoint.ip() == us.ip());
            let Some(oldest) = of_address.min_by_key(|(_, at)| **at).map(|(endpoint, _)| *endpoint) else {
                return;
            };
            self.seen.remove(&oldest);
        }
    }

    /// Whether the NAT gives us another port for each destination; `None` with fewer than two answers.
    pub(super) fn mapping_varies(&self) -> Option<bool> {
        let v4: Vec<SocketAddr> =
            self.by_server.iter().filter(|(server, _)| server.is_ipv4()).map(|(_, mapped)| *mapped).collect();
        (v4.len() >= 2).then(|| v4.iter().any(|mapped| *mapped != v4[0]))
    }

    /// All of them, the ones that work most often first.
    pub(super) fn list(&self, now: Instant) -> Vec<(SocketAddr, EndpointType)> {
        let mut listed = BTreeSet::new();
        let fresh = self.by_server.values();
        let remembered = self.seen.iter().filter(|(_, at)| now.duration_since(**at) < REMEMBERED).map(|(seen, _)| seen);
        let stun = fresh.chain(remembered).map(|endpoint| (*endpoint, EndpointType::Stun));
        let local = self.local.endpoints.iter().map(|endpoint| (*endpoint, EndpointType::Local));
        stun.chain(local).filter(|(endpoint, _)| listed.insert(*endpoint)).collect()
    }
}

/// Addresses inside a tailnet: a path over another tailnet's tunnel, or our own, is none.
fn is_overlay(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.octets()[0] == 100 && v4.octets()[1] & 0xc0 == 64 && !is_chrome_os(v4.octets()),
        IpAddr::V6(v6) => v6.segments()[..3] == [0xfd7a, 0x115c, 0xa1e0],
    }
}

/// 100.115.92.0/23, which ChromeOS gives its own virtual machines. Source: Tailscale, net/tsaddr.
const fn is_chrome_os(octets: [u8; 4]) -> bool {
    octets[1] == 115 && octets[2] & 0xfe == 92
}

pub(super) fn is_link_local_v6(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn loopback_is_listed_only_when_there_is_nothing_else() {
        let now = Instant::now();
        let mut endpoints = Endpoints::default();
        assert!(endpoints.set_local(vec![addr("127.0.0.1:5"), addr("100.100.1.1:5"), addr("[fe80::1]:5")].into()));
        assert_eq!(endpoints.list(now), [(addr("127.0.0.1:5"), EndpointType::Local)]);
        endpoints.set_local(vec![addr("127.0.0.1:5"), addr("192.168.1.2:5"), addr("100.115.92.2:5")].into());
        let listed = [(addr("100.115.92.2:5"), EndpointType::Local), (addr("192.168.1.2:5"), EndpointType::Local)];
        assert_eq!(endpoints.list(now), listed);
        assert!(!endpoints.has_family(true));
    }

    #[test]
    fn a_family_is_there_with_an_address_that_no_peer_is_told() {
        let mut endpoints = Endpoints::default();
        let mut local = LocalEndpoints::from(vec![addr("[2001:db8::2]:5")]);
        endpoints.set_local(local.clone());
        assert!(!endpoints.has_family(false) && endpoints.has_family(true));
        local.note_source("100.64.0.5".parse().unwrap());
        assert!(endpoints.set_local(local), "it counts as a change");
        assert!(endpoints.has_family(false) && endpoints.has_family(true));
        assert_eq!(endpoints.list(Instant::now()).len(), 1);
    }

    #[test]
    fn loopback_is_no_sign_of_ipv6() {
        let mut endpoints = Endpoints::default();
        endpoints.set_local(vec![addr("127.0.0.1:5"), addr("[::1]:5")].into());
        assert!(endpoints.has_family(false) && !endpoints.has_family(true));
    }

    #[test]
    fn what_servers_saw_comes_first_and_is_forgotten_after_five_minutes() {
        let now = Instant::now();
        let mut endpoints = Endpoints::default();
        endpoints.set_local(vec![addr("192.168.1.2:5")].into());
        endpoints.saw(addr("198.51.100.1:3478"), addr("203.0.113.1:77"), now);
        assert_eq!(endpoints.list(now)[0], (addr("203.0.113.1:77"), EndpointType::Stun));
        endpoints.begin_round();
        assert_eq!(endpoints.list(now).len(), 2);
        assert_eq!(endpoints.list(now + Duration::from_secs(311)).len(), 1);
    }

    #[test]
    fn a_nat_that_minds_the_destination_is_found_by_two_servers() {
        let now = Instant::now();
        let mut endpoints = Endpoints::default();
        endpoints.saw(addr("198.51.100.1:3478"), addr("203.0.113.1:77"), now);
        assert_eq!(endpoints.mapping_varies(), None);
        endpoints.saw(addr("198.51.100.2:3478"), addr("203.0.113.1:77"), now);
        assert_eq!(endpoints.mapping_varies(), Some(false));
        endpoints.saw(addr("198.51.100.3:3478"), addr("203.0.113.1:78"), now);
        assert_eq!(endpoints.mapping_varies(), Some(true));
    }

    #[test]
    fn a_nat_that_never_repeats_a_port_leaves_six() {
        let now = Instant::now();
        let mut endpoints = Endpoints::default();
        for port in 1..20 {
            endpoints.saw(addr("198.51.100.1:3478"), SocketAddr::new([203, 0, 113, 1].into(), port), now);
        }
        assert_eq!(endpoints.seen.len(), REMEMBERED_PORTS);
    }
}
