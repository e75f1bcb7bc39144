//! The frames of ts2021: a Noise handshake, then encrypted records, around the HTTP/2 that control speaks.
//!
//! Every frame is a type octet, a big-endian 16-bit length and that many octets, 4,096 in all at most; only the
//! initiation carries a two-octet protocol version in front.
//! Source: Tailscale, control/controlbase/messages.go and conn.go.

/// The most octets of a whole frame, header included. Source: conn.go, `maxMessageSize`.
pub const MAX_FRAME: usize = 4096;
/// Octets before a frame's payload.
pub const HEADER: usize = 3;
/// The most plaintext octets of one record: the frame less its header and the 16-octet tag.
pub const MAX_PLAINTEXT: usize = MAX_FRAME - HEADER - 16;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// The server's half of the handshake.
    Response,
    /// The server's refusal in words; not authenticated.
    Error,
    /// Encrypted octets of the stream.
    Record,
}

/// A frame that cannot be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Its type is unknown.
    #[error("noise frame of unknown type {kind:#04x}")]
    Kind {
        /// The type octet.
        kind: u8,
    },
    /// It is longer than a frame may be.
    #[error("noise frame of {actual} octets exceeds {limit}")]
    TooLong {
        /// Header and payload.
        actual: usize,
        /// [`MAX_FRAME`].
        limit: usize,
    },
}

/// Reads a frame's header: what it is and how many octets of payload follow.
///
/// # Errors
/// [`FrameError`] for an unknown type or a length beyond [`MAX_FRAME`].
pub fn parse_header(header: [u8; HEADER]) -> Result<(FrameKind, usize), FrameError> {
    let kind = match header[0] {
        2 => FrameKind::Response,
        3 => FrameKind::Error,
        4 => FrameKind::Record,
        kind => return Err(FrameError::Kind { kind }),
    };
    let length = usize::from(u16::from_be_bytes([header[1], header[2]]));
    if HEADER + length > MAX_FRAME {
        return Err(FrameError::TooLong { actual: HEADER + length, limit: MAX_FRAME });
    }
    Ok((kind, length))
}

/// The header of a record with `length` octets of ciphertext.
pub fn record_header(length: u16) -> [u8; HEADER] {
    let [high, low] = length.to_be_bytes();
    [4, high, low]
}

/// The initiation: protocol version, type 1, length, and the Noise message itself.
pub fn initiation(version: u16, message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).expect("a Noise IK initiation has 96 octets");
    let mut frame = Vec::with_capacity(5 + message.len());
    frame.extend(version.to_be_bytes());
    frame.push(1);
    frame.extend(length.to_be_bytes());
    frame.extend(message);
    frame
}

/// The 12-octet nonce of record number `counter`: four zero octets, then the counter in **big** endian, where the
/// Noise specification has little. Source: conn.go, `nonce`.
pub fn nonce(counter: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_be_bytes());
    nonce
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_record_header_parses_to_itself() {
        assert_eq!(parse_header(record_header(4093)), Ok((FrameKind::Record, 4093)));
        assert_eq!(parse_header([4, 0xff, 0xff]), Err(FrameError::TooLong { actual: 65538, limit: MAX_FRAME }));
        assert_eq!(parse_header([9, 0, 0]), Err(FrameError::Kind { kind: 9 }));
    }

    #[test]
    fn an_initiation_has_101_octets_and_its_version_in_front() {
        let frame = initiation(130, &[0xaa; 96]);
        assert_eq!(frame.len(), 101);
        assert_eq!(frame[..5], [0, 130, 1, 0, 96]);
    }

    #[test]
    fn nonces_count_in_big_endian() {
        assert_eq!(nonce(0x0102), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2]);
    }

    proptest! {
        #[test]
        fn any_header_parses_or_fails(header in any::<[u8; 3]>()) {
            let _ = parse_header(header);
        }
    }
}
