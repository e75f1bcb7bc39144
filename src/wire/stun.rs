//! STUN: asking a server which address our packets come from.
//!
//! Just the binding request and its answer (RFC 5389). Tailscale's servers drop requests silently unless SOFTWARE
//! is exactly `tailnode` and a valid FINGERPRINT ends the message. Source: Tailscale, net/stun.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Malformed;

/// Pairs an answer with its request.
pub type TransactionId = [u8; 12];

/// The bytes of a request.
pub const REQUEST_LENGTH: usize = 40;

const HEADER_LENGTH: usize = 20;
const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
const BINDING_REQUEST: [u8; 2] = [0, 1];
const BINDING_RESPONSE: [u8; 2] = [1, 1];
const SOFTWARE: &[u8; 8] = b"tailnode";
const FINGERPRINT_XOR: u32 = 0x5354_554e;
const MAPPED_ADDRESS: u16 = 0x0001;
const XOR_MAPPED_ADDRESS: u16 = 0x0020;
/// The number that drafts of RFC 5389 gave to XOR-MAPPED-ADDRESS; some servers still use it.
const XOR_MAPPED_ADDRESS_DRAFT: u16 = 0x8020;

/// A binding request.
pub fn request(transaction: &TransactionId) -> [u8; REQUEST_LENGTH] {
    let mut bytes = [0; REQUEST_LENGTH];
    bytes[..2].copy_from_slice(&BINDING_REQUEST);
    bytes[3] = 20;
    bytes[4..8].copy_from_slice(&COOKIE);
    bytes[8..20].copy_from_slice(transaction);
    bytes[20..24].copy_from_slice(&[0x80, 0x22, 0, 8]);
    bytes[24..32].copy_from_slice(SOFTWARE);
    bytes[32..36].copy_from_slice(&[0x80, 0x28, 0, 4]);
    let fingerprint = crc32(&bytes[..32]) ^ FINGERPRINT_XOR;
    bytes[36..].copy_from_slice(&fingerprint.to_be_bytes());
    bytes
}

/// Reads what a server is asked, as strictly as Tailscale's own server does.
///
/// # Errors
/// [`Malformed`] when it is not exactly such a request as [`request`] makes.
pub fn parse_request(bytes: &[u8]) -> Result<TransactionId, Malformed> {
    let transaction = transaction_of(bytes)?;
    if bytes != request(&transaction) {
        return Err(Malformed::Field("STUN request"));
    }
    Ok(transaction)
}

/// The answer to a request that came from `source`.
pub fn response(transaction: &TransactionId, source: SocketAddr) -> Vec<u8> {
    let mut value = vec![0, if source.is_ipv4() { 1 } else { 2 }];
    value.extend((source.port() ^ u16::from_be_bytes([COOKIE[0], COOKIE[1]])).to_be_bytes());
    match source.ip() {
        IpAddr::V4(ip) => value.extend(masked(ip.octets(), transaction)),
        IpAddr::V6(ip) => value.extend(masked(ip.octets(), transaction)),
    }
    let mut bytes = Vec::with_capacity(HEADER_LENGTH + 4 + value.len());
    bytes.extend(BINDING_RESPONSE);
    bytes.extend((value.len() as u16 + 4).to_be_bytes());
    bytes.extend(COOKIE);
    bytes.extend(transaction);
    bytes.extend(XOR_MAPPED_ADDRESS.to_be_bytes());
    bytes.extend((value.len() as u16).to_be_bytes());
    bytes.extend(value);
    bytes
}

/// Whether this can only be a STUN answer: neither WireGuard nor disco begins like it.
pub fn looks_like_response(bytes: &[u8]) -> bool {
    bytes.len() >= HEADER_LENGTH && bytes.starts_with(&BINDING_RESPONSE) && bytes[4..8] == COOKIE
}

/// Reads an answer: to which request, and the address that the server saw.
///
/// # Errors
/// [`Malformed`] when it is no success answer or names no address.
pub fn parse_response(bytes: &[u8]) -> Result<(TransactionId, SocketAddr), Malformed> {
    let transaction = transaction_of(bytes)?;
    if !bytes.starts_with(&BINDING_RESPONSE) {
        return Err(Malformed::Field("STUN message type"));
    }
    let mut rest = &bytes[HEADER_LENGTH..];
    let mut plain = None;
    while let [type_high, type_low, length_high, length_low, after @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*length_high, *length_low]));
        let Some(value) = after.get(..length) else {
            return Err(Malformed::Short { least: length, actual: after.len() });
        };
        match u16::from_be_bytes([*type_high, *type_low]) {
            XOR_MAPPED_ADDRESS | XOR_MAPPED_ADDRESS_DRAFT => {
                return Ok((transaction, mapped_address(value, Some(&transaction))?));
            }
            MAPPED_ADDRESS => plain = Some(mapped_address(value, None)?),
            _ => {}
        }
        rest = after.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    plain.map(|address| (transaction, address)).ok_or(Malformed::Field("STUN answer without address"))
}

fn transaction_of(bytes: &[u8]) -> Result<TransactionId, Malformed> {
    let short = Malformed::Short { least: HEADER_LENGTH, actual: bytes.len() };
    let header: &[u8; HEADER_LENGTH] = bytes.first_chunk().ok_or(short)?;
    if header[4..8] != COOKIE {
        return Err(Malformed::Field("STUN cookie"));
    }
    let mut transaction = [0; 12];
    transaction.copy_from_slice(&header[8..]);
    Ok(transaction)
}

/// The value of (XOR-)MAPPED-ADDRESS. Source: RFC 5389, sections 15.1 and 15.2.
fn mapped_address(value: &[u8], mask: Option<&TransactionId>) -> Result<SocketAddr, Malformed> {
    let [_, family, port_high, port_low, ip @ ..] = value else {
        return Err(Malformed::Short { least: 8, actual: value.len() });
    };
    let mut port = u16::from_be_bytes([*port_high, *port_low]);
    if mask.is_some() {
        port ^= u16::from_be_bytes([COOKIE[0], COOKIE[1]]);
    }
    let ip = match (family, ip.len()) {
        (1, 4) => {
            let octets: [u8; 4] = ip.try_into().map_err(|_| Malformed::Field("STUN address"))?;
            IpAddr::V4(Ipv4Addr::from(mask.map_or(octets, |transaction| masked(octets, transaction))))
        }
        (2, 16) => {
            let octets: [u8; 16] = ip.try_into().map_err(|_| Malformed::Field("STUN address"))?;
            IpAddr::V6(Ipv6Addr::from(mask.map_or(octets, |transaction| masked(octets, transaction))))
        }
        _ => return Err(Malformed::Field("STUN address family")),
    };
    // A server whose one socket serves both families may call an IPv4 address by its IPv6 form; headscale's does.
    Ok(SocketAddr::new(ip.to_canonical(), port))
}

/// XORs an address with the cookie followed by the transaction id.
fn masked<const N: usize>(mut octets: [u8; N], transaction: &TransactionId) -> [u8; N] {
    for (octet, mask) in octets.iter_mut().zip(COOKIE.iter().chain(transaction)) {
        *octet ^= mask;
    }
    octets
}

/// The CRC of FINGERPRINT (ITU V.42). 32 bytes a request do not need a table.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use hex_literal::hex;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn request_is_what_tailscale_sends() {
        // Made by Tailscale's net/stun.Request with this transaction id.
        let golden = hex!("000100142112a4420102030405060708090a0b0c802200087461696c6e6f646580280004b32c370f");
        let transaction = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
        assert_eq!(request(&transaction), golden);
        assert_eq!(parse_request(&golden), Ok(transaction));
    }

    #[test]
    fn an_ipv4_address_in_its_ipv6_form_is_one() {
        let answer = response(&[7; 12], "[::ffff:203.0.113.5]:77".parse().unwrap());
        assert_eq!(parse_response(&answer), Ok(([7; 12], "203.0.113.5:77".parse().unwrap())));
    }

    #[test]
    fn answers_of_rfc_5769_are_read() {
        // RFC 5769, section 2.2, with the attributes behind the address cut off.
        let v4 =
            hex!("0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000080001a147e112a643");
        let (_, address) = parse_response(&v4).unwrap();
        assert_eq!(address, "192.0.2.1:32853".parse().unwrap());
        // RFC 5769, section 2.3, likewise.
        let v6 = hex!(
            "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9"
        );
        let (_, address) = parse_response(&v6).unwrap();
        assert_eq!(address, "[2001:db8:1234:5678:11:2233:4455:6677]:32853".parse().unwrap());
    }

    #[test]
    fn plain_mapped_address_is_the_fallback() {
        let mut bytes = hex!("0101000c2112a4420102030405060708090a0b0c00010008000112340a000001").to_vec();
        let (_, address) = parse_response(&bytes).unwrap();
        assert_eq!(address, "10.0.0.1:4660".parse().unwrap());
        bytes[1] = 0x11;
        assert_eq!(parse_response(&bytes), Err(Malformed::Field("STUN message type")));
    }

    proptest! {
        #[test]
        fn an_answer_parses_to_what_was_encoded(
            transaction in any::<[u8; 12]>(), ip in any::<IpAddr>(), port in any::<u16>()
        ) {
            let address = SocketAddr::new(ip.to_canonical(), port);
            let bytes = response(&transaction, address);
            prop_assert!(looks_like_response(&bytes));
            prop_assert_eq!(parse_response(&bytes), Ok((transaction, address)));
        }

        #[test]
        fn any_bytes_parse_or_fail(bytes in prop::collection::vec(any::<u8>(), 0..120), header in any::<bool>()) {
            let mut bytes = bytes;
            if header && bytes.len() >= 8 {
                bytes[..2].copy_from_slice(&BINDING_RESPONSE);
                bytes[4..8].copy_from_slice(&COOKIE);
            }
            let _ = parse_response(&bytes);
            let _ = parse_request(&bytes);
        }
    }
}
