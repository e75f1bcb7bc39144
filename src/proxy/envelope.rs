//! The header that a datagram wears between a SOCKS5 client and us, and the addresses in it and in requests.
//!
//! ```text
//! 2 reserved, 0 | 1 fragment, 0 for a whole datagram | 1 address type | address | 2 port | payload
//! ```
//! Source: RFC 1928, 5 and 7.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::stats::Dropped;
use crate::node::{Host, Target};

/// The address types.
pub(super) const IPV4: u8 = 1;
pub(super) const DOMAIN: u8 = 3;
pub(super) const IPV6: u8 = 4;

/// Takes a datagram out of its header: its target and its payload.
///
/// # Errors
/// [`Dropped::Fragment`] and [`Dropped::Malformed`]. An implementation that does not put fragments together must drop
/// them (RFC 1928, 7).
pub(super) fn open(datagram: &[u8]) -> Result<(Target, &[u8]), Dropped> {
    let [_, _, fragment, address_type, rest @ ..] = datagram else { return Err(Dropped::Malformed) };
    if *fragment != 0 {
        return Err(Dropped::Fragment);
    }
    let (host, rest) = match *address_type {
        IPV4 => rest.split_first_chunk::<4>().map(|(ip, rest)| (Some(Host::Ip(Ipv4Addr::from(*ip).into())), rest)),
        IPV6 => {
            let address = |ip: &[u8; 16]| Host::Ip(Ipv6Addr::from(*ip).to_canonical());
            rest.split_first_chunk::<16>().map(|(ip, rest)| (Some(address(ip)), rest))
        }
        DOMAIN => rest
            .split_first()
            .and_then(|(length, rest)| rest.split_at_checked(usize::from(*length)))
            .map(|(name, rest)| (host(name), rest)),
        _ => None,
    }
    .ok_or(Dropped::Malformed)?;
    let (port, payload) = rest.split_first_chunk::<2>().ok_or(Dropped::Malformed)?;
    match (host, u16::from_be_bytes(*port)) {
        (Some(host), port @ 1..) => Ok((Target { host, port }, payload)),
        (_, _) => Err(Dropped::Malformed),
    }
}

/// Puts a datagram from `source` into its header, in place of what `datagram` held before.
pub(super) fn seal(source: SocketAddr, payload: &[u8], datagram: &mut Vec<u8>) {
    datagram.clear();
    datagram.extend([0, 0, 0]);
    write_address(source, datagram);
    datagram.extend(payload);
}

/// Writes type, address and port.
pub(super) fn write_address(address: SocketAddr, to: &mut Vec<u8>) {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => {
            to.push(IPV4);
            to.extend(ip.octets());
        }
        IpAddr::V6(ip) => {
            to.push(IPV6);
            to.extend(ip.octets());
        }
    }
    to.extend(address.port().to_be_bytes());
}

/// What a domain name field names, if anything. Some clients put addresses there, IPv6 in brackets or bare.
pub(super) fn host(field: &[u8]) -> Option<Host> {
    let name = str::from_utf8(field).ok()?;
    let bare = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(name);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Some(Host::Ip(ip.to_canonical()));
    }
    let printable = name.chars().all(|c| !c.is_control() && !c.is_whitespace());
    (!name.is_empty() && printable).then(|| Host::Name(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A header as a client writes it.
    fn wrapped(fragment: u8, address: &[u8], port: u16, payload: &[u8]) -> Vec<u8> {
        [&[0, 0, fragment], address, &port.to_be_bytes(), payload].concat()
    }

    #[test]
    fn addresses_of_all_three_types_are_read() {
        for (address, expected) in [
            (&[1, 10, 20, 0, 53][..], "10.20.0.53:53"),
            (&[4, 0xfd, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], "[fd20::1]:53"),
            (&[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1], "10.0.0.1:53"),
            (b"\x03\x06a.corp", "a.corp:53"),
            (b"\x03\x0a10.20.0.53", "10.20.0.53:53"),
        ] {
            let datagram = wrapped(0, address, 53, b"question");
            let (target, payload) = open(&datagram).unwrap();
            assert_eq!((target.to_string().as_str(), payload), (expected, &b"question"[..]));
        }
    }

    #[test]
    fn what_is_no_whole_datagram_is_told_apart() {
        let address = [1, 10, 20, 0, 53];
        assert!(open(&wrapped(0, &address, 53, b"")).is_ok_and(|(_, payload)| payload.is_empty()));
        for fragment in [1, 0x81, 0xff] {
            assert_eq!(open(&wrapped(fragment, &address, 53, b"x")), Err(Dropped::Fragment));
        }
        assert_eq!(open(&wrapped(0, &address, 0, b"x")), Err(Dropped::Malformed), "port 0");
        assert_eq!(open(&wrapped(0, &[2, 1, 2, 3, 4], 53, b"x")), Err(Dropped::Malformed), "address type 2");
        assert_eq!(open(&wrapped(0, b"\x03\x00", 53, b"x")), Err(Dropped::Malformed), "an empty name");
        assert_eq!(open(&wrapped(0, b"\x03\x03a b", 53, b"x")), Err(Dropped::Malformed), "a name with a space");
        let whole = wrapped(0, &address, 53, b"");
        for length in 0..whole.len() {
            assert_eq!(open(&whole[..length]), Err(Dropped::Malformed), "cut to {length}");
        }
    }

    #[test]
    fn addresses_in_domain_fields_are_addresses() {
        for text in ["127.0.0.1", "::1", "[::1]"] {
            assert!(matches!(host(text.as_bytes()), Some(Host::Ip(_))), "{text}");
        }
        assert!(matches!(host(b"::ffff:10.0.0.1"), Some(Host::Ip(IpAddr::V4(_)))));
        assert!(matches!(host(b"a.corp"), Some(Host::Name(_))));
        assert!(host(&[0xff]).is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_datagram_or_none(datagram: Vec<u8>) {
            let _ = open(&datagram);
        }

        #[test]
        fn any_bytes_after_a_plausible_start_are_a_datagram_or_none(kind in 0_u8..6, rest: Vec<u8>) {
            let _ = open(&[&[0, 0, 0, kind], &rest[..]].concat());
        }

        #[test]
        fn sealed_datagrams_open_to_what_they_were(ip: IpAddr, port in 1_u16.., payload: Vec<u8>) {
            let mut datagram = b"before".to_vec();
            seal(SocketAddr::new(ip, port), &payload, &mut datagram);
            let (target, opened) = open(&datagram).unwrap();
            prop_assert_eq!(target, Target { host: Host::Ip(ip.to_canonical()), port });
            prop_assert_eq!(opened, &payload[..]);
        }

        #[test]
        fn names_survive(name in "[a-z0-9_-]{1,20}(\\.[a-z][a-z0-9]{0,20}){0,4}", port in 1_u16.., payload: Vec<u8>) {
            let field = [&[DOMAIN, u8::try_from(name.len()).unwrap()], name.as_bytes()].concat();
            let datagram = wrapped(0, &field, port, &payload);
            let (target, opened) = open(&datagram).unwrap();
            prop_assert_eq!(target.to_string(), format!("{name}:{port}"));
            prop_assert_eq!(opened, &payload[..]);
        }
    }
}
