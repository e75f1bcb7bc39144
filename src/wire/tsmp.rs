//! TSMP: what nodes tell each other inside the tunnel, as IP protocol 99 right behind the IP header.
//!
//! A rejection turns a connection that policy forbids into an immediate error instead of a hang; a ping asks whether
//! the tunnel works; an advertisement names the sender's disco key after each new WireGuard session.
//! Source: Tailscale, net/packet, tsmp.go.

use super::Malformed;
use crate::key::DiscoPublic;

const REJECT: u8 = b'!';
const PING: u8 = b'p';
const PONG: u8 = b'o';
const DISCO_ADVERTISEMENT: u8 = b'a';
const MAYBE_BROKEN: u8 = 1;

/// Why a peer refused a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The tailnet's policy does not allow it.
    Acl,
    /// The peer takes no connections at all.
    ShieldsUp,
    /// The peer should forward it but its host does not forward.
    ForwardingOff,
    /// The firewall of the peer's host.
    HostFirewall,
    /// An app connector that does not know the transit address.
    UnknownTransit,
    /// A newer reason, as its byte.
    Other(u8),
}

impl Reason {
    const fn from_byte(byte: u8) -> Self {
        match byte {
            b'A' => Self::Acl,
            b'S' => Self::ShieldsUp,
            b'F' => Self::ForwardingOff,
            b'W' => Self::HostFirewall,
            b'T' => Self::UnknownTransit,
            other => Self::Other(other),
        }
    }

    const fn to_byte(self) -> u8 {
        match self {
            Self::Acl => b'A',
            Self::ShieldsUp => b'S',
            Self::ForwardingOff => b'F',
            Self::HostFirewall => b'W',
            Self::UnknownTransit => b'T',
            Self::Other(byte) => byte,
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Acl => f.write_str("the tailnet's policy does not allow it"),
            Self::ShieldsUp => f.write_str("it takes no connections at all"),
            Self::ForwardingOff => f.write_str("its host does not forward packets"),
            Self::HostFirewall => f.write_str("its host's firewall does not let it pass"),
            Self::UnknownTransit => f.write_str("it does not know the transit address"),
            Self::Other(byte) => write!(f, "reason {byte:#04x}"),
        }
    }
}

/// One message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// A connection is refused. The IP header runs from the refusing peer to the one that asked.
    Reject {
        /// The IP protocol of the refused flow.
        protocol: u8,
        /// Why.
        reason: Reason,
        /// The port of the one that asked.
        source_port: u16,
        /// The port that was asked for.
        destination_port: u16,
        /// The peer is not sure: perhaps the answer comes after all.
        maybe_broken: bool,
    },
    /// To be answered with the same bytes.
    Ping([u8; 8]),
    /// The answer.
    Pong {
        /// The ping's bytes.
        token: [u8; 8],
        /// The sender's PeerAPI port of this address family; 0 for none.
        peerapi_port: u16,
    },
    /// The sender's current disco key.
    DiscoAdvertisement(DiscoPublic),
}

impl Message {
    /// Reads what follows the IP header.
    ///
    /// # Errors
    /// [`Malformed`] when it is cut off or of an unknown type.
    pub fn parse(payload: &[u8]) -> Result<Self, Malformed> {
        let short = |least| Malformed::Short { least, actual: payload.len() };
        match payload.first() {
            Some(&REJECT) => {
                let [_, protocol, reason, a, b, c, d] = payload.first_chunk().ok_or(short(7))?;
                Ok(Self::Reject {
                    protocol: *protocol,
                    reason: Reason::from_byte(*reason),
                    source_port: u16::from_be_bytes([*a, *b]),
                    destination_port: u16::from_be_bytes([*c, *d]),
                    maybe_broken: payload.get(7).is_some_and(|flags| flags & MAYBE_BROKEN != 0),
                })
            }
            Some(&PING) => Ok(Self::Ping(payload[1..].first_chunk().copied().ok_or(short(9))?)),
            Some(&PONG) => {
                let (token, rest) = payload[1..].split_first_chunk().ok_or(short(9))?;
                let peerapi_port = rest.first_chunk().copied().map_or(0, u16::from_be_bytes);
                Ok(Self::Pong { token: *token, peerapi_port })
            }
            Some(&DISCO_ADVERTISEMENT) => {
                let key = payload[1..].first_chunk().copied().ok_or(short(33))?;
                Ok(Self::DiscoAdvertisement(DiscoPublic::from_bytes(key)))
            }
            Some(_) => Err(Malformed::Field("TSMP type")),
            None => Err(short(1)),
        }
    }

    /// What follows the IP header.
    pub fn encode(&self) -> Vec<u8> {
        match *self {
            Self::Reject { protocol, reason, source_port, destination_port, maybe_broken } => {
                let [a, b] = source_port.to_be_bytes();
                let [c, d] = destination_port.to_be_bytes();
                vec![REJECT, protocol, reason.to_byte(), a, b, c, d, u8::from(maybe_broken)]
            }
            Self::Ping(token) => [&[PING], &token[..]].concat(),
            Self::Pong { token, peerapi_port } => [&[PONG], &token[..], &peerapi_port.to_be_bytes()].concat(),
            Self::DiscoAdvertisement(key) => [&[DISCO_ADVERTISEMENT], &key.as_bytes()[..]].concat(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn older_rejections_have_no_flags() {
        let message = Message::parse(&[b'!', 6, b'A', 0x12, 0x34, 0x01, 0xbb]).unwrap();
        let expected = Message::Reject {
            protocol: 6,
            reason: Reason::Acl,
            source_port: 0x1234,
            destination_port: 443,
            maybe_broken: false,
        };
        assert_eq!(message, expected);
    }

    #[test]
    fn older_pongs_have_no_port() {
        let message = Message::parse(b"o12345678").unwrap();
        assert_eq!(message, Message::Pong { token: *b"12345678", peerapi_port: 0 });
    }

    fn message() -> impl Strategy<Value = Message> {
        prop_oneof![
            (any::<u8>(), any::<u8>(), any::<u16>(), any::<u16>(), any::<bool>()).prop_map(
                |(protocol, reason, source_port, destination_port, maybe_broken)| Message::Reject {
                    protocol,
                    reason: Reason::from_byte(reason),
                    source_port,
                    destination_port,
                    maybe_broken
                }
            ),
            any::<[u8; 8]>().prop_map(Message::Ping),
            (any::<[u8; 8]>(), any::<u16>()).prop_map(|(token, peerapi_port)| Message::Pong { token, peerapi_port }),
            any::<[u8; 32]>().prop_map(|key| Message::DiscoAdvertisement(DiscoPublic::from_bytes(key))),
        ]
    }

    proptest! {
        #[test]
        fn a_message_parses_to_what_was_encoded(message in message()) {
            prop_assert_eq!(Message::parse(&message.encode()), Ok(message));
        }

        #[test]
        fn any_bytes_parse_or_fail(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = Message::parse(&bytes);
        }
    }
}
