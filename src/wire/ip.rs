//! The little of an inner IP packet that the engine must know: who, to whom, which flow.
//!
//! Everything else is for the TCP/IP stack. IPv6 extension headers are refused: what a tailnet's flows send has none.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Malformed;

/// IP protocol numbers.
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMP_V6: u8 = 58;
    /// Tailscale's own, "any private encryption scheme" to the rest of the world.
    pub const TSMP: u8 = 99;
}

const V4_HEADER_LENGTH: usize = 20;
const V6_HEADER_LENGTH: usize = 40;

/// A view of a packet's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What follows the IP header; see [`protocol`].
    pub protocol: u8,
    /// The sender.
    pub source: IpAddr,
    /// The receiver.
    pub destination: IpAddr,
    /// Source and destination port, for TCP and UDP.
    pub ports: Option<(u16, u16)>,
    /// The flags of TCP (FIN 1, SYN 2, RST 4, ACK 16); 0 for others.
    pub tcp_flags: u8,
    /// Where the IP header ends, in bytes.
    pub payload: usize,
    /// Where the packet ends, in bytes; trailing padding is not part of it.
    pub end: usize,
    /// A fragment of a larger packet: ports may be missing or meaningless.
    pub fragment: bool,
}

impl Header {
    /// Reads the head of a whole packet.
    ///
    /// # Errors
    /// [`Malformed`] when it is cut off or neither IPv4 nor IPv6, or IPv6 with extension headers.
    pub fn parse(packet: &[u8]) -> Result<Self, Malformed> {
        let header = Self::parse_quoted(packet)?;
        if packet.len() < header.end {
            return Err(Malformed::Short { least: header.end, actual: packet.len() });
        }
        let ported = matches!(header.protocol, protocol::TCP | protocol::UDP) && !header.fragment;
        if ported && header.ports.is_none() {
            return Err(Malformed::Field("transport header"));
        }
        Ok(header)
    }

    /// Reads the head of a packet that an ICMP error quotes and may have cut off after eight bytes of payload.
    ///
    /// # Errors
    /// [`Malformed`] when not even the IP header is whole.
    pub fn parse_quoted(packet: &[u8]) -> Result<Self, Malformed> {
        match packet.first().map(|byte| byte >> 4) {
            Some(4) => parse_v4(packet),
            Some(6) => parse_v6(packet),
            Some(_) => Err(Malformed::Field("IP version")),
            None => Err(Malformed::Short { least: V4_HEADER_LENGTH, actual: 0 }),
        }
    }

    /// The sender with its port.
    pub fn source_socket(&self) -> Option<SocketAddr> {
        self.ports.map(|(source, _)| SocketAddr::new(self.source, source))
    }

    /// The receiver with its port.
    pub fn destination_socket(&self) -> Option<SocketAddr> {
        self.ports.map(|(_, destination)| SocketAddr::new(self.destination, destination))
    }

    /// The packet whose failure this ICMP error reports, from the whole packet that `self` was read from; `None` when
    /// it is no ICMP error. Source: RFC 792; RFC 4443, section 3.
    pub fn quoted<'a>(&self, packet: &'a [u8]) -> Option<&'a [u8]> {
        let message = packet.get(self.payload..self.end)?;
        match (self.protocol, message.first()?) {
            (protocol::ICMP, 3 | 11 | 12) | (protocol::ICMP_V6, 1..=4) => message.get(8..),
            _ => None,
        }
    }
}

fn parse_v4(packet: &[u8]) -> Result<Header, Malformed> {
    let short = Malformed::Short { least: V4_HEADER_LENGTH, actual: packet.len() };
    let fixed: &[u8; V4_HEADER_LENGTH] = packet.first_chunk().ok_or(short)?;
    let payload = usize::from(fixed[0] & 0x0f) * 4;
    let end = usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
    if payload < V4_HEADER_LENGTH || end < payload {
        return Err(Malformed::Field("IPv4 length"));
    }
    // More fragments, or an offset.
    let fragment = u16::from_be_bytes([fixed[6], fixed[7]]) & 0x3fff != 0;
    let (ports, tcp_flags) = if fragment { (None, 0) } else { transport(fixed[9], packet, payload, end) };
    Ok(Header {
        protocol: fixed[9],
        source: Ipv4Addr::new(fixed[12], fixed[13], fixed[14], fixed[15]).into(),
        destination: Ipv4Addr::new(fixed[16], fixed[17], fixed[18], fixed[19]).into(),
        ports,
        tcp_flags,
        payload,
        end,
        fragment,
    })
}

fn parse_v6(packet: &[u8]) -> Result<Header, Malformed> {
    let short = Malformed::Short { least: V6_HEADER_LENGTH, actual: packet.len() };
    let fixed: &[u8; V6_HEADER_LENGTH] = packet.first_chunk().ok_or(short)?;
    // Hop-by-hop, routing, fragment, authentication, destination options, mobility, HIP, shim6.
    if matches!(fixed[6], 0 | 43 | 44 | 51 | 60 | 135 | 139 | 140) {
        return Err(Malformed::Field("IPv6 extension header"));
    }
    let end = V6_HEADER_LENGTH + usize::from(u16::from_be_bytes([fixed[4], fixed[5]]));
    let address = |at: usize| {
        let mut octets = [0; 16];
        octets.copy_from_slice(&fixed[at..at + 16]);
        IpAddr::V6(Ipv6Addr::from(octets))
    };
    let (ports, tcp_flags) = transport(fixed[6], packet, V6_HEADER_LENGTH, end);
    Ok(Header {
        protocol: fixed[6],
        source: address(8),
        destination: address(24),
        ports,
        tcp_flags,
        payload: V6_HEADER_LENGTH,
        end,
        fragment: false,
    })
}

/// Ports and TCP flags, as far as the packet shows them.
fn transport(protocol: u8, packet: &[u8], payload: usize, end: usize) -> (Option<(u16, u16)>, u8) {
    let bytes = packet.get(payload..end.min(packet.len())).unwrap_or_default();
    if !matches!(protocol, protocol::TCP | protocol::UDP) {
        return (None, 0);
    }
    let ports = bytes.first_chunk().map(|[a, b, c, d]| (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])));
    let flags = if protocol == protocol::TCP { bytes.get(13).copied().unwrap_or(0) } else { 0 };
    (ports, flags)
}

/// Where a packet wants to go, without a look at the rest of it.
pub fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => packet.get(16..20)?.first_chunk().map(|octets: &[u8; 4]| IpAddr::from(*octets)),
        6 => packet.get(24..40)?.first_chunk().map(|octets: &[u8; 16]| IpAddr::from(*octets)),
        _ => None,
    }
}

/// A packet of one of the portless protocols around `payload`, which stays below 1,200 bytes.
pub fn build(protocol: u8, source: IpAddr, destination: IpAddr, payload: &[u8]) -> Option<Vec<u8>> {
    let length = payload.len() as u16;
    let mut packet = Vec::with_capacity(V6_HEADER_LENGTH + payload.len());
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            packet.extend([0x45, 0]);
            packet.extend((V4_HEADER_LENGTH as u16 + length).to_be_bytes());
            packet.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            let sum = header_checksum(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(length.to_be_bytes());
            packet.extend([protocol, 64]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return None,
    }
    packet.extend(payload);
    Some(packet)
}

/// Source: RFC 791, section 3.1.
fn header_checksum(header: &[u8]) -> u16 {
    let (words, _) = header.as_chunks::<2>();
    let mut sum: u32 = words.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use hex_literal::hex;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_syn_shows_its_flow() {
        // A SYN from 100.64.0.1:4660 to 100.64.0.2:443, written by hand after RFC 791 and RFC 9293.
        let syn = hex!("45000028000040004006 0000 64400001 64400002 1234 01bb 00000001 00000000 5002 ffff 0000 0000");
        let header = Header::parse(&syn).unwrap();
        assert_eq!(header.source_socket(), Some("100.64.0.1:4660".parse().unwrap()));
        assert_eq!(header.destination_socket(), Some("100.64.0.2:443".parse().unwrap()));
        assert_eq!((header.tcp_flags, header.payload, header.end, header.fragment), (2, 20, 40, false));
        assert_eq!(Header::parse(&syn[..39]), Err(Malformed::Short { least: 40, actual: 39 }));
    }

    #[test]
    fn fragments_have_no_ports() {
        let mut packet = build(protocol::UDP, [10, 0, 0, 1].into(), [10, 0, 0, 2].into(), &[0; 16]).unwrap();
        packet[6] = 0x20;
        let header = Header::parse(&packet).unwrap();
        assert!(header.fragment);
        assert_eq!(header.ports, None);
    }

    #[test]
    fn extension_headers_are_refused() {
        let addresses = ("fd7a::1".parse().unwrap(), "fd7a::2".parse().unwrap());
        let packet = build(44, addresses.0, addresses.1, &[0; 16]).unwrap();
        assert_eq!(Header::parse(&packet), Err(Malformed::Field("IPv6 extension header")));
    }

    #[test]
    fn an_icmp_error_quotes_a_flow() {
        let inner = build(protocol::UDP, [10, 0, 0, 1].into(), [10, 0, 0, 2].into(), &[0x12, 0x34, 0, 53, 0, 8, 0, 0]);
        let mut message = vec![3, 1, 0, 0, 0, 0, 0, 0];
        message.extend(inner.unwrap());
        let packet = build(protocol::ICMP, [10, 0, 0, 2].into(), [10, 0, 0, 1].into(), &message).unwrap();
        let header = Header::parse(&packet).unwrap();
        let quoted = Header::parse_quoted(header.quoted(&packet).unwrap()).unwrap();
        assert_eq!(quoted.destination_socket(), Some("10.0.0.2:53".parse().unwrap()));
    }

    #[test]
    fn built_headers_sum_to_zero() {
        let packet = build(protocol::TSMP, [100, 64, 0, 1].into(), [100, 99, 3, 2].into(), b"p12345678").unwrap();
        assert_eq!(header_checksum(&packet[..20]), 0);
    }

    proptest! {
        #[test]
        fn a_built_packet_parses_to_what_was_built(
            source in any::<IpAddr>(), destination in any::<IpAddr>(), payload in prop::collection::vec(any::<u8>(), 0..100)
        ) {
            let Some(packet) = build(protocol::TSMP, source, destination, &payload) else {
                prop_assert_ne!(source.is_ipv4(), destination.is_ipv4());
                return Ok(());
            };
            let header = Header::parse(&packet).unwrap();
            prop_assert_eq!((header.source, header.destination, header.protocol), (source, destination, protocol::TSMP));
            prop_assert_eq!(&packet[header.payload..header.end], &payload[..]);
            prop_assert_eq!(super::destination(&packet), Some(destination));
        }

        #[test]
        fn any_bytes_parse_or_fail(bytes in prop::collection::vec(any::<u8>(), 0..120), version in any::<Option<bool>>()) {
            let mut bytes = bytes;
            if let (Some(v6), Some(first)) = (version, bytes.first_mut()) {
                *first = if v6 { 0x60 } else { 0x45 };
            }
            let _ = destination(&bytes);
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert!(header.payload <= header.end && header.end <= bytes.len());
                let _ = header.quoted(&bytes).map(Header::parse_quoted);
            }
        }
    }
}
