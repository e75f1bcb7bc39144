//! When what servers said of our NAT may not be true any more.

use std::net::SocketAddr;
use std::time::Instant;

use super::{Netcheck, SPACING};

impl Netcheck {
    /// A path that worked has been in doubt since then, and our mapping perhaps with it: what servers said before is not
    /// told to peers any more, and is void for a family once a server has answered anew.
    pub(in crate::engine::magicsock) fn doubt(&mut self, since: Instant) {
        if self.settled_at.take_if(|at| *at <= since).is_some() {
            self.void = Some(since);
        }
    }

    /// A peer sees us elsewhere than before, or says so. Unless servers have seen us there, they are asked; but not for
    /// every word of peers that lie.
    pub(in crate::engine::magicsock) fn doubt_mapping(&mut self, source: SocketAddr, now: Instant) {
        let known = self.host.endpoints.iter().any(|(endpoint, _)| *endpoint == source);
        let rested = self.doubted_at.is_none_or(|at| now.duration_since(at) >= SPACING);
        if !known && rested {
            self.doubted_at = Some(now);
            self.doubt(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::engine::{Output, Transport};
    use crate::key::NodePrivate;
    use crate::wire::stun;
    use crate::wire::tailcfg::derp::{DerpMap, DerpMapUpdate};

    const V4: &str = "203.0.113.1:1";
    const V6: &str = "[2001:db8::1]:1";

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// One that servers of both families have told where we are, at `now` and the instant that follows.
    fn settled(start: Instant) -> (Netcheck, Instant) {
        let mut netcheck = Netcheck::new(Transport::Auto, NodePrivate::random().public(), [7; 32]);
        netcheck.set_local_endpoints(vec![addr("192.168.1.2:5"), addr("[2001:db8::2]:5")].into(), start);
        let node = json!({"HostName": "derp1.example", "IPv4": "198.51.100.1", "IPv6": "2001:db8:ff::1"});
        let update = json!({"Regions": {"1": {"RegionID": 1, "Nodes": [node]}}});
        let update: DerpMapUpdate = serde_json::from_value(update).unwrap();
        netcheck.set_map(&Arc::new(DerpMap::default().merged(update)), start);
        let now = start + Duration::from_millis(20);
        answer(&mut netcheck, &[V4, V6], now);
        assert_eq!((netcheck.settled_at(), stun_seen(&netcheck)), (Some(now), vec![addr(V4), addr(V6)]));
        (netcheck, now)
    }

    /// The server answers all that it was asked, as far as we are told here where each family sees us.
    fn answer(netcheck: &mut Netcheck, seen: &[&str], now: Instant) {
        let outputs: Vec<Output> = std::iter::from_fn(|| netcheck.poll_output()).collect();
        for output in outputs {
            let Output::Udp { destination, contents, .. } = output else { continue };
            let transaction = stun::parse_request(&contents).unwrap();
            let us = seen.iter().map(|us| addr(us)).find(|us| us.is_ipv6() == destination.is_ipv6());
            us.into_iter().for_each(|us| assert!(netcheck.handle_stun(&transaction, us, now)));
        }
    }

    fn stun_seen(netcheck: &Netcheck) -> Vec<SocketAddr> {
        let endpoints = netcheck.host().endpoints.iter().map(|(endpoint, _)| *endpoint);
        let mut seen: Vec<SocketAddr> = endpoints.filter(|endpoint| endpoint.port() != 5).collect();
        seen.sort_unstable();
        seen
    }

    #[test]
    fn an_answer_after_a_doubt_voids_what_its_family_saw_before() {
        let (mut netcheck, before) = settled(Instant::now());
        let now = before + Duration::from_secs(7);
        netcheck.doubt(now);
        assert!(!netcheck.freshen(now));
        answer(&mut netcheck, &["203.0.113.1:2"], now + Duration::from_millis(20));
        netcheck.handle_timeout(now + Duration::from_secs(6));
        assert_eq!(stun_seen(&netcheck), [addr("203.0.113.1:2"), addr(V6)]);
    }

    #[test]
    fn what_servers_have_seen_is_no_reason_to_ask_them_again() {
        let (mut netcheck, before) = settled(Instant::now());
        let now = before + Duration::from_secs(7);
        netcheck.doubt_mapping(addr(V4), now);
        assert!(netcheck.freshen(now));
        netcheck.doubt_mapping(addr("203.0.113.1:2"), now);
        assert!(!netcheck.freshen(now));
    }

    #[test]
    fn peers_that_lie_have_servers_asked_once_in_five_seconds() {
        let (mut netcheck, before) = settled(Instant::now());
        let mut rounds = 0;
        for second in 0..20 {
            let now = before + Duration::from_secs(6 + second);
            for port in 1_000..1_010 {
                netcheck.doubt_mapping(SocketAddr::new([192, 0, 2, 9].into(), port), now);
                if !netcheck.freshen(now) {
                    rounds += 1;
                    answer(&mut netcheck, &[V4, V6], now);
                    assert!(netcheck.freshen(now));
                }
            }
        }
        assert_eq!(rounds, 4);
    }
}
