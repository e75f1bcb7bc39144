//! Which addresses belong to the internet: the only ones that an exit node may be given, and the only ones outside the
//! tailnet where a resolver is asked.
//!
//! An exit node would hand a private address to its own network, where another host has it than the one that was
//! meant. Such an address is reached by a narrower route or not at all.

use std::net::IpAddr;

use super::tailnet_range;

/// Whether `ip` is of the internet: neither of the tailnet, nor private, nor of one link or one machine, nor of many
/// hosts at once, nor of a range that is reserved. Source: IANA's registries of special-purpose addresses (RFC 6890),
/// without those for documentation, where nothing of anybody's is.
pub fn is_internet(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    !tailnet_range(ip)
        && match ip {
            IpAddr::V4(ip) => {
                let [a, b, c, _] = ip.octets();
                let special = match (a, b) {
                    (0 | 10 | 127 | 224.., _) => true,
                    (100, 64..=127) | (169, 254) | (172, 16..=31) | (192, 168) | (198, 18 | 19) => true,
                    (192, 0) => c == 0,
                    (_, _) => false,
                };
                !special
            }
            IpAddr::V6(ip) => {
                let [a, b, ..] = ip.segments();
                // Only 2000::/3 is handed out as global unicast (RFC 4291, 2.4). 6to4 and Teredo in it carry IPv4
                // addresses, perhaps private ones.
                (a & 0xe000) == 0x2000 && a != 0x2002 && (a, b) != (0x2001, 0)
            }
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
            "192.0.0.8",
            "198.18.0.1",
            "198.19.255.255",
            "240.0.0.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b::8.8.8.8",
            "2002:808:808::1",
            "2001:0:1::1",
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
            "2001:1::1",
            "192.0.1.1",
            "198.17.0.1",
            "198.51.100.1",
        ] {
            assert!(is_internet(ip.parse().unwrap()), "{ip}");
        }
    }
}
