//! Which addresses belong to the internet: the only ones that an exit node may be given.
//!
//! An exit node would hand a private address to its own network, where another host has it than the one that was
//! meant. Such an address is reached by a narrower route or not at all.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::tailnet_range;

/// Whether `ip` is of the internet: neither of the tailnet, nor private, nor of one link or one machine, nor of many
/// hosts at once. Source: IANA's registries of special-purpose addresses (RFC 6890); ranges that are only for
/// documentation, benchmarks or later use lead nowhere and harm nobody.
pub fn is_internet(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    !tailnet_range(ip)
        && match ip {
            IpAddr::V4(ip) => is_internet_v4(ip),
            IpAddr::V6(ip) => is_internet_v6(ip),
        }
}

fn is_internet_v4(ip: Ipv4Addr) -> bool {
    let this_network = ip.octets()[0] == 0;
    !this_network
        && !ip.is_private()
        && !ip.is_loopback()
        && !ip.is_link_local()
        && !ip.is_multicast()
        && !ip.is_broadcast()
        // RFC 6598: a carrier's own network; the tailnet's range is this one.
        && !(ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64)
}

fn is_internet_v6(ip: Ipv6Addr) -> bool {
    // Only 2000::/3 is handed out as global unicast (RFC 4291, 2.4), and the prefix of RFC 6052 stands for IPv4.
    let global = ip.segments()[0] & 0xe000 == 0x2000 || ip.segments()[..6] == [0x64, 0xff9b, 0, 0, 0, 0];
    global && embedded(ip).is_none_or(is_internet_v4)
}

/// The IPv4 address that a translator or a tunnel would make of it: RFC 6052, 2.1, and RFC 3056, 2.
fn embedded(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    match (ip.segments(), ip.octets()) {
        ([0x64, 0xff9b, 0, 0, 0, 0, ..], octets) => Some(Ipv4Addr::new(octets[12], octets[13], octets[14], octets[15])),
        ([0x2002, ..], octets) => Some(Ipv4Addr::new(octets[2], octets[3], octets[4], octets[5])),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_private_or_local_is_not_of_the_internet_in_any_spelling() {
        for ip in [
            "10.0.0.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "127.0.0.1",
            "0.0.0.0",
            "0.1.2.3",
            "224.0.0.1",
            "255.255.255.255",
            "100.64.0.1",
            "100.127.255.255",
            "::",
            "::1",
            "::ffff:10.0.0.1",
            "::10.0.0.1",
            "fe80::1",
            "fec0::1",
            "fc00::1",
            "fd12::1",
            "fd7a:115c:a1e0:b1a:0:7:a01:110",
            "ff02::1",
            "64:ff9b::10.0.0.1",
            "64:ff9b:1::8.8.8.8",
            "2002:a00:1::1",
        ] {
            assert!(!is_internet(ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn everything_else_is() {
        for ip in [
            "8.8.8.8",
            "172.32.0.1",
            "100.128.0.1",
            "203.0.113.80",
            "::ffff:8.8.8.8",
            "2606:4700::1111",
            "2001:db8::80",
            "64:ff9b::8.8.8.8",
            "2002:808:808::1",
        ] {
            assert!(is_internet(ip.parse().unwrap()), "{ip}");
        }
    }
}
