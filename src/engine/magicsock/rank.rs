//! Which of two UDP addresses of a peer is better.
//!
//! Source: Tailscale, wgengine/magicsock, `betterAddr`.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// An address that answered, and how fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Measured {
    pub(super) addr: SocketAddr,
    pub(super) latency: Duration,
}

/// An address must be better by so many points to take over: pongs' times scatter, and moving a path costs reordering.
/// Less than the points of IPv6, which is to win when all else is equal; Tailscale's client moves for two.
const MARGIN: u128 = 5;
/// Times that differ by no more are the same: that much comes and goes with the load of either machine.
const NOISE: Duration = Duration::from_millis(1);

/// Whether to leave `old` for `new`.
pub(super) fn is_better(new: &Measured, old: &Measured) -> bool {
    new.addr != old.addr && points(new, old) >= points(old, new) + MARGIN
}

/// Points for being near, for IPv6 (no NAT state that expires), and per cents of time saved.
fn points(this: &Measured, other: &Measured) -> u128 {
    let nearness = match this.addr.ip() {
        ip if ip.is_loopback() => 50,
        IpAddr::V4(ip) if ip.is_link_local() => 30,
        IpAddr::V6(ip) if ip.is_unicast_link_local() => 30,
        IpAddr::V4(ip) if ip.is_private() => 20,
        IpAddr::V6(ip) if ip.is_unique_local() => 20,
        IpAddr::V4(_) | IpAddr::V6(_) => 0,
    };
    let family = if this.addr.is_ipv6() { 10 } else { 0 };
    let faster = other.latency.saturating_sub(this.latency) > NOISE;
    let saved = if faster { 100 - this.latency.as_nanos() * 100 / other.latency.as_nanos() } else { 0 };
    nearness + family + saved
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(addr: &str, millis: u64) -> Measured {
        Measured { addr: addr.parse().unwrap(), latency: Duration::from_millis(millis) }
    }

    #[test]
    fn the_faster_and_the_nearer_win() {
        let public = at("203.0.113.1:1", 100);
        assert!(is_better(&at("203.0.113.2:1", 50), &public));
        assert!(!is_better(&at("203.0.113.2:1", 99), &public));
        assert!(is_better(&at("192.168.1.1:1", 100), &public));
        assert!(is_better(&at("[2001:db8::1]:1", 100), &public));
        assert!(!is_better(&at("192.168.1.1:1", 200), &public));
        assert!(is_better(&at("127.0.0.1:1", 10), &at("192.168.1.1:1", 10)));
        assert!(!is_better(&public, &public));
    }

    #[test]
    fn of_two_families_alike_ipv6_is_taken_and_kept() {
        let (v4, v6) = (at("203.0.113.1:1", 100), at("[2001:db8::1]:1", 104));
        assert!(is_better(&v6, &v4));
        assert!(!is_better(&v4, &v6));
        assert!(is_better(&at("203.0.113.1:1", 80), &v6));
        let quick = |addr: &str, micros| Measured { latency: Duration::from_micros(micros), ..at(addr, 0) };
        assert!(is_better(&quick("[2001:db8::1]:1", 900), &quick("203.0.113.1:1", 200)));
    }

    #[test]
    fn what_scatters_moves_no_path() {
        assert!(!is_better(&at("203.0.113.2:1", 96), &at("203.0.113.1:1", 100)));
        assert!(is_better(&at("203.0.113.2:1", 95), &at("203.0.113.1:1", 100)));
    }

    proptest! {
        #[test]
        fn two_addresses_are_never_both_better(
            a in any::<(IpAddr, u16, u32)>(), b in any::<(IpAddr, u16, u32)>()
        ) {
            let measured = |(ip, port, micros): (IpAddr, u16, u32)| Measured {
                addr: SocketAddr::new(ip, port), latency: Duration::from_micros(micros.into()),
            };
            let (a, b) = (measured(a), measured(b));
            prop_assert!(!(is_better(&a, &b) && is_better(&b, &a)));
        }
    }
}
