//! Bytes and JSON to values and back, one file a protocol; and which protocol a datagram speaks.
//!
//! Nothing here decides anything: a parser gives a value or says what is [`Malformed`], never panics, and never
//! allocates more than the input is long.

pub mod derp;
pub mod disco;
pub mod ip;
pub mod noise;
pub mod stun;
pub mod tailcfg;
pub mod transit;
pub mod tsmp;

/// Why bytes are not what they claim to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Cut off.
    #[error("{actual} bytes where at least {least} are needed")]
    Short {
        /// What the format demands.
        least: usize,
        /// What is there.
        actual: usize,
    },
    /// A field holds a value that the format does not allow, or that this node does not speak.
    #[error("unsupported or invalid {0}")]
    Field(&'static str),
    /// The seal does not match: another key, or tampering.
    #[error("the seal does not match")]
    Unsealed,
}

/// What a UDP datagram, or a packet of DERP, carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A STUN answer: our own address as a server saw it.
    Stun,
    /// Path discovery between nodes.
    Disco,
    /// A WireGuard message of a known type and possible length.
    WireGuard,
    /// Wrapped for a peer relay.
    Geneve,
    /// Nothing that a tailnet speaks.
    Unknown,
}

/// Tells the protocols of a node's one UDP socket apart, in Tailscale's order.
///
/// Source: Tailscale, wgengine/magicsock, `packetLooksLike`; WireGuard's lengths: the protocol paper, section 5.4.
pub fn classify(datagram: &[u8]) -> Kind {
    if stun::looks_like_response(datagram) {
        return Kind::Stun;
    }
    if looks_like_geneve(datagram) {
        return Kind::Geneve;
    }
    if datagram.len() >= disco::KEY_END && datagram.starts_with(&disco::MAGIC) {
        return Kind::Disco;
    }
    match (datagram.first_chunk(), datagram.len()) {
        (Some([1, 0, 0, 0]), 148)
        | (Some([2, 0, 0, 0]), 92)
        | (Some([3, 0, 0, 0]), 64)
        | (Some([4, 0, 0, 0]), 32..) => Kind::WireGuard,
        _ => Kind::Unknown,
    }
}

/// Source: Tailscale, net/packet, `GeneveHeader`.
fn looks_like_geneve(datagram: &[u8]) -> bool {
    let Some([version, flags, protocol_high, protocol_low, _, _, _, reserved]) = datagram.first_chunk() else {
        return false;
    };
    version & 0xc0 == 0
        && flags & 0x3f == 0
        && *reserved == 0
        && matches!(u16::from_be_bytes([*protocol_high, *protocol_low]), 0x7a11 | 0x7a12)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn wireguard_is_told_by_type_and_length() {
        let message = |kind: u8, length: usize| {
            let mut bytes = vec![0; length];
            bytes[0] = kind;
            bytes
        };
        for (kind, length) in [(1, 148), (2, 92), (3, 64), (4, 32), (4, 1452)] {
            assert_eq!(classify(&message(kind, length)), Kind::WireGuard);
        }
        for (kind, length) in [(1, 147), (2, 148), (3, 65), (4, 31), (5, 148), (0, 32)] {
            assert_eq!(classify(&message(kind, length)), Kind::Unknown);
        }
    }

    #[test]
    fn each_protocol_is_recognised() {
        let mut disco_packet = disco::MAGIC.to_vec();
        disco_packet.resize(62, 7);
        assert_eq!(classify(&disco_packet), Kind::Disco);
        assert_eq!(classify(&disco_packet[..37]), Kind::Unknown);
        assert_eq!(classify(&stun::response(&[9; 12], "192.0.2.1:7".parse().unwrap())), Kind::Stun);
        assert_eq!(classify(&[0, 0x80, 0x7a, 0x12, 1, 2, 3, 0]), Kind::Geneve);
        assert_eq!(classify(&stun::request(&[1; 12])), Kind::Unknown);
    }

    proptest! {
        #[test]
        fn any_datagram_has_a_kind(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            classify(&bytes);
        }
    }
}
