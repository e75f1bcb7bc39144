//! DERP frames: how packets and notices travel between a client and one relay.
//!
//! A frame is a type octet, a big-endian 32-bit length and that many octets. Parsing is done on a buffer that may
//! hold half a frame; nothing is allocated for a length before it is checked against [`MAX_FRAME`].
//! Source: Tailscale, derp/derp.go (frame types) and derp/derp_client.go.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::key::{DerpPublic, NodePublic};

/// The most that a frame's payload may hold, in octets; a relay that sends more is broken.
/// Source: derp_client.go, `recvTimeout` and the 1 MiB limit beside it.
pub const MAX_FRAME: usize = 1 << 20;

/// The most that one relayed packet may hold, in octets. Source: derp.go, `MaxPacketSize`.
pub const MAX_PACKET: usize = 64 << 10;

/// What a server key frame begins with. Source: derp.go, `Magic`.
const MAGIC: &[u8; 8] = b"DERP\xf0\x9f\x94\x91";

/// Octets before the payload.
const HEADER: usize = 5;

mod kind {
    pub(super) const SERVER_KEY: u8 = 0x01;
    pub(super) const CLIENT_INFO: u8 = 0x02;
    pub(super) const SERVER_INFO: u8 = 0x03;
    pub(super) const SEND_PACKET: u8 = 0x04;
    pub(super) const RECV_PACKET: u8 = 0x05;
    pub(super) const KEEP_ALIVE: u8 = 0x06;
    pub(super) const NOTE_PREFERRED: u8 = 0x07;
    pub(super) const PEER_GONE: u8 = 0x08;
    pub(super) const PING: u8 = 0x12;
    pub(super) const PONG: u8 = 0x13;
    pub(super) const HEALTH: u8 = 0x14;
    pub(super) const RESTARTING: u8 = 0x15;
}

/// A frame that cannot be understood. The connection cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Its length exceeds [`MAX_FRAME`].
    #[error("derp frame of {actual} octets exceeds {limit}")]
    TooLong {
        /// The length it announced.
        actual: usize,
        /// [`MAX_FRAME`].
        limit: usize,
    },
    /// Its payload is shorter than its type demands.
    #[error("derp frame of type {kind:#04x} has only {actual} octets")]
    TooShort {
        /// The type octet.
        kind: u8,
        /// The payload's length.
        actual: usize,
    },
    /// The first frame does not begin with the magic.
    #[error("derp server key without its magic")]
    Magic,
}

/// Why a peer is gone from a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// It was connected and left.
    Disconnected,
    /// It is not connected there.
    NotHere,
}

/// What a relay sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerFrame {
    /// The relay's key, first of all.
    ServerKey(DerpPublic),
    /// The relay's settings, sealed to our node key: nonce and box.
    ServerInfo(Bytes),
    /// A packet from another node.
    Packet {
        /// Who sent it.
        from: NodePublic,
        /// WireGuard or disco.
        packet: BytesMut,
    },
    /// Nothing to say; the connection lives.
    KeepAlive,
    /// A peer cannot be reached in this region.
    PeerGone {
        /// Who.
        peer: NodePublic,
        /// Why.
        reason: Gone,
    },
    /// To be answered by a pong with the same octets.
    Ping([u8; 8]),
    /// The answer to our ping.
    Pong([u8; 8]),
    /// What is wrong with this connection in the relay's eyes; empty for nothing any more.
    Health(String),
    /// The relay restarts.
    Restarting {
        /// Wait so long before connecting again.
        reconnect_in: Duration,
        /// Then try for so long.
        try_for: Duration,
    },
    /// A type that we do not know, to be skipped.
    Unknown(u8),
}

impl ServerFrame {
    /// Takes one whole frame off `buffer`, or leaves it alone and returns `None` until more octets are there.
    ///
    /// # Errors
    /// [`FrameError`]; the buffer is then in no defined state.
    pub fn parse(buffer: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        if buffer.len() < HEADER {
            return Ok(None);
        }
        let kind = buffer[0];
        let length = u32::from_be_bytes([buffer[1], buffer[2], buffer[3], buffer[4]]) as usize;
        if length > MAX_FRAME {
            return Err(FrameError::TooLong { actual: length, limit: MAX_FRAME });
        }
        if buffer.len() < HEADER + length {
            return Ok(None);
        }
        buffer.advance(HEADER);
        Self::from_payload(kind, buffer.split_to(length)).map(Some)
    }

    fn from_payload(kind: u8, mut payload: BytesMut) -> Result<Self, FrameError> {
        let need = |minimum: usize| match payload.len() {
            actual if actual < minimum => Err(FrameError::TooShort { kind, actual }),
            _ => Ok(()),
        };
        Ok(match kind {
            kind::SERVER_KEY => {
                need(40)?;
                if payload[..8] != MAGIC[..] {
                    return Err(FrameError::Magic);
                }
                payload.advance(8);
                Self::ServerKey(DerpPublic::from_bytes(take(&mut payload)))
            }
            kind::SERVER_INFO => Self::ServerInfo(payload.freeze()),
            kind::RECV_PACKET => {
                need(32)?;
                Self::Packet { from: NodePublic::from_bytes(take(&mut payload)), packet: payload }
            }
            kind::KEEP_ALIVE => Self::KeepAlive,
            kind::PEER_GONE => {
                need(32)?;
                let peer = NodePublic::from_bytes(take(&mut payload));
                let reason = if payload.first() == Some(&1) { Gone::NotHere } else { Gone::Disconnected };
                Self::PeerGone { peer, reason }
            }
            kind::PING => {
                need(8)?;
                Self::Ping(take(&mut payload))
            }
            kind::PONG => {
                need(8)?;
                Self::Pong(take(&mut payload))
            }
            kind::HEALTH => Self::Health(String::from_utf8_lossy(&payload).into_owned()),
            kind::RESTARTING => {
                need(8)?;
                let reconnect_in = Duration::from_millis(payload.get_u32().into());
                Self::Restarting { reconnect_in, try_for: Duration::from_millis(payload.get_u32().into()) }
            }
            other => Self::Unknown(other),
        })
    }
}

/// The first `N` octets, whose presence the caller has checked.
fn take<const N: usize>(payload: &mut BytesMut) -> [u8; N] {
    let mut octets = [0; N];
    payload.copy_to_slice(&mut octets);
    octets
}

/// What a client sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientFrame<'a> {
    /// Who we are: our node key, then nonce and box of the settings.
    ClientInfo {
        /// Our node key.
        key: NodePublic,
        /// Nonce and box.
        sealed: &'a [u8],
    },
    /// A packet for another node, at most [`MAX_PACKET`] octets.
    SendPacket {
        /// Who shall get it.
        to: NodePublic,
        /// WireGuard or disco.
        packet: &'a [u8],
    },
    /// Whether this region is our home.
    NotePreferred(bool),
    /// A question that the relay answers by a pong.
    Ping([u8; 8]),
    /// The answer to a ping.
    Pong([u8; 8]),
}

impl ClientFrame<'_> {
    /// Appends the frame's octets to `out`.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::ClientInfo { key, sealed } => frame(out, kind::CLIENT_INFO, &[key.as_bytes(), sealed]),
            Self::SendPacket { to, packet } => frame(out, kind::SEND_PACKET, &[to.as_bytes(), packet]),
            Self::NotePreferred(home) => frame(out, kind::NOTE_PREFERRED, &[&[u8::from(*home)]]),
            Self::Ping(octets) => frame(out, kind::PING, &[octets]),
            Self::Pong(octets) => frame(out, kind::PONG, &[octets]),
        }
    }
}

fn frame(out: &mut BytesMut, kind: u8, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    out.reserve(HEADER + length);
    out.put_u8(kind);
    out.put_u32(u32::try_from(length).expect("callers send at most MAX_FRAME octets"));
    for part in parts {
        out.put_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn server(kind: u8, payload: &[u8]) -> BytesMut {
        let mut out = BytesMut::new();
        frame(&mut out, kind, &[payload]);
        out
    }

    #[test]
    fn half_a_frame_waits_for_the_rest() {
        let whole = server(kind::PING, b"12345678");
        let mut half = BytesMut::from(&whole[..9]);
        assert_eq!(ServerFrame::parse(&mut half), Ok(None));
        half.extend_from_slice(&whole[9..]);
        assert_eq!(ServerFrame::parse(&mut half), Ok(Some(ServerFrame::Ping(*b"12345678"))));
        assert!(half.is_empty());
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_before_it_arrives() {
        let mut header = BytesMut::from(&[kind::HEALTH, 0x00, 0x10, 0x00, 0x01][..]);
        let limit = MAX_FRAME;
        assert_eq!(ServerFrame::parse(&mut header), Err(FrameError::TooLong { actual: limit + 1, limit }));
    }

    #[test]
    fn a_server_key_needs_its_magic() {
        let mut payload = MAGIC.to_vec();
        payload.extend([7; 32]);
        let key = ServerFrame::ServerKey(DerpPublic::from_bytes([7; 32]));
        assert_eq!(ServerFrame::parse(&mut server(kind::SERVER_KEY, &payload)), Ok(Some(key)));
        payload[0] = b'X';
        assert_eq!(ServerFrame::parse(&mut server(kind::SERVER_KEY, &payload)), Err(FrameError::Magic));
    }

    #[test]
    fn peer_gone_without_a_reason_means_disconnected() {
        let gone = |reason| ServerFrame::PeerGone { peer: NodePublic::from_bytes([9; 32]), reason };
        let mut payload = vec![9; 32];
        let parsed = ServerFrame::parse(&mut server(kind::PEER_GONE, &payload));
        assert_eq!(parsed, Ok(Some(gone(Gone::Disconnected))));
        payload.push(1);
        assert_eq!(ServerFrame::parse(&mut server(kind::PEER_GONE, &payload)), Ok(Some(gone(Gone::NotHere))));
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = ServerFrame::parse(&mut buffer) {}
        }

        #[test]
        fn a_sent_packet_arrives_as_it_was(key in any::<[u8; 32]>(), packet in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let mut out = BytesMut::new();
            ClientFrame::SendPacket { to: NodePublic::from_bytes(key), packet: &packet }.encode(&mut out);
            // A relay forwards the payload as it is, with the sender's key in place of the receiver's.
            out[0] = kind::RECV_PACKET;
            let parsed = ServerFrame::parse(&mut out).unwrap().unwrap();
            prop_assert_eq!(parsed, ServerFrame::Packet { from: NodePublic::from_bytes(key), packet: packet.as_slice().into() });
        }
    }
}
