//! Disco: how two nodes find out which UDP paths between them work.
//!
//! A packet is the magic, the sender's disco key in the clear, a nonce and a NaCl box. Bytes behind a message's body
//! are ignored: padding today, extensions tomorrow. Messages of peer relays and newer ones are [`Message::Other`].
//! Source: Tailscale, disco.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crypto_box::aead::AeadInPlace;
use crypto_box::aead::generic_array::GenericArray;
use crypto_box::{PublicKey, SalsaBox, SecretKey};

use super::Malformed;
use crate::key::{DiscoPrivate, DiscoPublic, NodePublic};

/// What every packet begins with: "TS" and a speech balloon.
pub const MAGIC: [u8; 6] = [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac];
/// Where the sender's key ends.
pub const KEY_END: usize = 38;
/// Where the nonce ends and the box begins.
const HEADER_LENGTH: usize = 62;
const NONCE_LENGTH: usize = 24;
const TAG_LENGTH: usize = 16;
const ENDPOINT_LENGTH: usize = 18;
/// The only version there is; receivers ignore others' extra fields rather than the version.
const VERSION: u8 = 0;

const PING: u8 = 1;
const PONG: u8 = 2;
const CALL_ME_MAYBE: u8 = 3;

/// Pairs a pong with its ping.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TxId(pub [u8; 12]);

impl fmt::Debug for TxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0[..4]))
    }
}

/// One disco message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// "Do you hear me here?"
    Ping {
        /// To be repeated in the answer.
        tx: TxId,
        /// The sender's node key: a disco key alone may belong to several nodes. Very old peers leave it out.
        node: Option<NodePublic>,
    },
    /// "Yes, and your ping came from there."
    Pong {
        /// The ping's.
        tx: TxId,
        /// The address from which the ping was seen to come.
        source: SocketAddr,
    },
    /// "Ping me at these addresses, I have opened my NAT for you." By DERP only.
    CallMeMaybe {
        /// Where the sender can be reached.
        endpoints: Vec<SocketAddr>,
    },
    /// A type that we do not speak; to be dropped.
    Other(u8),
}

/// The key that our half and a peer's half make; compute it once a peer.
pub fn shared_key(ours: &DiscoPrivate, theirs: &DiscoPublic) -> SalsaBox {
    SalsaBox::new(&PublicKey::from_bytes(*theirs.as_bytes()), &SecretKey::from_bytes(*ours.as_bytes()))
}

/// Whose packet it claims to be; [`open`] proves it.
///
/// # Errors
/// [`Malformed`] when it is no disco packet.
pub fn sender(packet: &[u8]) -> Result<DiscoPublic, Malformed> {
    let short = Malformed::Short { least: HEADER_LENGTH, actual: packet.len() };
    let header: &[u8; HEADER_LENGTH] = packet.first_chunk().ok_or(short)?;
    if !header.starts_with(&MAGIC) {
        return Err(Malformed::Field("disco magic"));
    }
    let mut key = [0; 32];
    key.copy_from_slice(&header[MAGIC.len()..KEY_END]);
    Ok(DiscoPublic::from_bytes(key))
}

/// Encodes and seals a message. The nonce must never repeat for a pair of keys: 24 random bytes.
pub fn seal(message: &Message, from: &DiscoPublic, key: &SalsaBox, nonce: [u8; NONCE_LENGTH]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(HEADER_LENGTH + TAG_LENGTH + 64);
    packet.extend(MAGIC);
    packet.extend(from.as_bytes());
    packet.extend(nonce);
    packet.extend([0; TAG_LENGTH]);
    encode(message, &mut packet);
    let (head, body) = packet.split_at_mut(HEADER_LENGTH + TAG_LENGTH);
    let tag = key
        .encrypt_in_place_detached(GenericArray::from_slice(&nonce), &[], body)
        .expect("XSalsa20 fails only beyond 256 GiB");
    head[HEADER_LENGTH..].copy_from_slice(&tag);
    packet
}

/// Opens and decodes a packet in place.
///
/// # Errors
/// [`Malformed::Unsealed`] when the key does not fit, otherwise what is wrong with the message.
pub fn open(packet: &mut [u8], key: &SalsaBox) -> Result<Message, Malformed> {
    let actual = packet.len();
    let short = Malformed::Short { least: HEADER_LENGTH + TAG_LENGTH, actual };
    let (head, body) = packet.split_at_mut_checked(HEADER_LENGTH + TAG_LENGTH).ok_or(short)?;
    let nonce = GenericArray::from_slice(&head[KEY_END..HEADER_LENGTH]);
    let tag = GenericArray::from_slice(&head[HEADER_LENGTH..]);
    key.decrypt_in_place_detached(nonce, &[], body, tag).map_err(|_| Malformed::Unsealed)?;
    decode(body)
}

fn encode(message: &Message, out: &mut Vec<u8>) {
    match message {
        Message::Ping { tx, node } => {
            out.extend([PING, VERSION]);
            out.extend(tx.0);
            if let Some(node) = node {
                out.extend(node.as_bytes());
            }
        }
        Message::Pong { tx, source } => {
            out.extend([PONG, VERSION]);
            out.extend(tx.0);
            encode_endpoint(*source, out);
        }
        Message::CallMeMaybe { endpoints } => {
            out.extend([CALL_ME_MAYBE, VERSION]);
            for endpoint in endpoints {
                encode_endpoint(*endpoint, out);
            }
        }
        Message::Other(kind) => out.extend([*kind, VERSION]),
    }
}

fn decode(bytes: &[u8]) -> Result<Message, Malformed> {
    let [kind, _version, body @ ..] = bytes else {
        return Err(Malformed::Short { least: 2, actual: bytes.len() });
    };
    match *kind {
        PING => {
            let (tx, rest) = split_tx(body)?;
            Ok(Message::Ping { tx, node: rest.first_chunk().copied().map(NodePublic::from_bytes) })
        }
        PONG => {
            let (tx, rest) = split_tx(body)?;
            let short = Malformed::Short { least: ENDPOINT_LENGTH, actual: rest.len() };
            Ok(Message::Pong { tx, source: decode_endpoint(rest.first_chunk().ok_or(short)?) })
        }
        CALL_ME_MAYBE => {
            let (endpoints, _padding) = body.as_chunks::<ENDPOINT_LENGTH>();
            Ok(Message::CallMeMaybe { endpoints: endpoints.iter().map(decode_endpoint).collect() })
        }
        other => Ok(Message::Other(other)),
    }
}

fn split_tx(body: &[u8]) -> Result<(TxId, &[u8]), Malformed> {
    let short = Malformed::Short { least: 12, actual: body.len() };
    body.split_first_chunk().map(|(tx, rest)| (TxId(*tx), rest)).ok_or(short)
}

/// 16 bytes of address, IPv4 mapped into IPv6, and the port.
fn encode_endpoint(endpoint: SocketAddr, out: &mut Vec<u8>) {
    let ip = match endpoint.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    out.extend(ip.octets());
    out.extend(endpoint.port().to_be_bytes());
}

fn decode_endpoint(bytes: &[u8; ENDPOINT_LENGTH]) -> SocketAddr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&bytes[..16]);
    SocketAddr::new(Ipv6Addr::from(octets).to_canonical(), u16::from_be_bytes([bytes[16], bytes[17]]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pair() -> (DiscoPrivate, DiscoPrivate) {
        (DiscoPrivate::random(), DiscoPrivate::random())
    }

    #[test]
    fn an_unpadded_ping_is_124_bytes() {
        let (ours, theirs) = pair();
        let ping = Message::Ping { tx: TxId([1; 12]), node: Some(NodePublic::from_bytes([2; 32])) };
        let packet = seal(&ping, &ours.public(), &shared_key(&ours, &theirs.public()), [3; 24]);
        assert_eq!(packet.len(), 124);
        assert_eq!(sender(&packet), Ok(ours.public()));
    }

    #[test]
    fn another_key_does_not_open_it() {
        let (ours, theirs) = pair();
        let key = shared_key(&ours, &theirs.public());
        let mut packet = seal(&Message::CallMeMaybe { endpoints: vec![] }, &ours.public(), &key, [3; 24]);
        let stranger = shared_key(&DiscoPrivate::random(), &ours.public());
        assert_eq!(open(&mut packet.clone(), &stranger), Err(Malformed::Unsealed));
        assert!(open(&mut packet, &shared_key(&theirs, &ours.public())).is_ok());
    }

    #[test]
    fn padding_and_missing_node_keys_are_tolerated() {
        let mut ping = vec![PING, 0];
        ping.extend([5; 12]);
        assert_eq!(decode(&ping), Ok(Message::Ping { tx: TxId([5; 12]), node: None }));
        ping.extend([6; 32]);
        ping.extend([0; 1000]);
        let node = Some(NodePublic::from_bytes([6; 32]));
        assert_eq!(decode(&ping), Ok(Message::Ping { tx: TxId([5; 12]), node }));
        assert_eq!(decode(&[7, 0, 1, 2]), Ok(Message::Other(7)));
    }

    fn endpoint() -> impl Strategy<Value = SocketAddr> {
        (any::<IpAddr>(), any::<u16>()).prop_map(|(ip, port)| SocketAddr::new(ip.to_canonical(), port))
    }

    fn message() -> impl Strategy<Value = Message> {
        prop_oneof![
            (any::<[u8; 12]>(), any::<Option<[u8; 32]>>())
                .prop_map(|(tx, node)| Message::Ping { tx: TxId(tx), node: node.map(NodePublic::from_bytes) }),
            (any::<[u8; 12]>(), endpoint()).prop_map(|(tx, source)| Message::Pong { tx: TxId(tx), source }),
            prop::collection::vec(endpoint(), 0..20).prop_map(|endpoints| Message::CallMeMaybe { endpoints }),
            (4u8..).prop_map(Message::Other),
        ]
    }

    proptest! {
        #[test]
        fn a_message_parses_to_what_was_encoded(message in message()) {
            let mut bytes = Vec::new();
            encode(&message, &mut bytes);
            prop_assert_eq!(decode(&bytes), Ok(message));
        }

        #[test]
        fn any_bytes_parse_or_fail(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let (ours, theirs) = pair();
            let _ = decode(&bytes);
            let _ = sender(&bytes);
            let _ = open(&mut bytes.clone(), &shared_key(&ours, &theirs.public()));
        }
    }
}
