//! Names that spell out an IPv4 address and a site: the tailnet's sites may use the same IPv4 ranges, and such a name
//! says which is meant.
//!
//! Its address holds both, and the site's router serves the prefix that covers it.
//! Source: Tailscale, net/dns/resolver/tsdns.go, `resolveViaDomain`; net/tsaddr, `MapVia`.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::suffix::is_under;

/// What stands between the address and the site.
const VIA: &str = "-via-";
/// The groups before the site. Source: Tailscale, net/tsaddr, `TailscaleViaRange`.
const PREFIX: [u16; 4] = [0xfd7a, 0x115c, 0xa1e0, 0x0b1a];

/// The address that a canonical name spells, such as `10-1-1-16-via-7`, alone or under Tailscale's own domains.
pub(super) fn address(name: &str) -> Option<Ipv6Addr> {
    let (first, rest) = name.split_once('.').unwrap_or((name, ""));
    if !(rest.is_empty() || is_under(rest, "ts.net") || is_under(rest, "tailscale.net")) {
        return None;
    }
    let (ip, site) = first.split_once(VIA)?;
    let ip: Ipv4Addr = ip.replace('-', ".").parse().ok()?;
    let (site, ip) = (number(site)?.to_be_bytes(), ip.octets());
    let group = |high, low| u16::from_be_bytes([high, low]);
    let [a, b, c, d] = PREFIX;
    let site = [group(site[0], site[1]), group(site[2], site[3])];
    Some(Ipv6Addr::new(a, b, c, d, site[0], site[1], group(ip[0], ip[1]), group(ip[2], ip[3])))
}

/// A number as Go writes them: decimal, or with `0x`, `0o`, `0b`, or `0` for octal. Source: Go, strconv, `ParseUint`
/// with base 0; underscores between digits are allowed there and pointless here.
fn number(text: &str) -> Option<u32> {
    let (digits, radix) = match text.as_bytes() {
        [b'0', b'x', ..] => (&text[2..], 16),
        [b'0', b'o', ..] => (&text[2..], 8),
        [b'0', b'b', ..] => (&text[2..], 2),
        [b'0', _, ..] => (&text[1..], 8),
        _ => (text, 10),
    };
    u32::from_str_radix(digits, radix).ok().filter(|_| !digits.starts_with('+'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_of_a_site_is_its_address() {
        let seven: Ipv6Addr = "fd7a:115c:a1e0:b1a:0:7:a01:110".parse().unwrap();
        for name in [
            "10-1-1-16-via-7",
            "10-1-1-16-via-7.tail1.ts.net",
            "10-1-1-16-via-7.tailscale.net",
            "10-1-1-16-via-0x7",
            "10-1-1-16-via-07",
            "10-1-1-16-via-0b111",
        ] {
            assert_eq!(address(name), Some(seven), "{name}");
        }
        let last = "fd7a:115c:a1e0:b1a:ffff:ffff:ffff:ffff".parse().ok();
        assert_eq!(address("255-255-255-255-via-4294967295"), last);
    }

    #[test]
    fn what_only_looks_like_one_is_an_ordinary_name() {
        for name in [
            "10-1-1-16-via-7.example.com",
            "10-1-1-16-via-7.badts.net",
            "10-1-1-via-7",
            "10-1-1-256-via-7",
            "10-1-1-16-via-4294967296",
            "10-1-1-16-via-",
            "10-1-1-16-via-+7",
            "10-1-1-16-via-7-via-8",
            "x.10-1-1-16-via-7",
        ] {
            assert_eq!(address(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn address_and_site_are_read_back_from_what_was_spelled(ip: u32, site: u32) {
            let ip = Ipv4Addr::from(ip);
            let name = format!("{}-via-{site}", ip.to_string().replace('.', "-"));
            let octets = address(&name).unwrap().octets();
            prop_assert_eq!(&octets[8..12], &site.to_be_bytes());
            prop_assert_eq!(&octets[12..], &ip.octets());
        }
    }
}
