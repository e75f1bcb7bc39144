//! The map stream: length-prefixed frames, each a zstd frame or plain JSON, each one MapResponse.
//! Source: Tailscale, control/controlclient/direct.go, `sendMapRequest` and `decodeMsg`.

use std::io::Read;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use ruzstd::decoding::StreamingDecoder;
use tokio::time::timeout;

use super::ConnectError;
use crate::wire::tailcfg;
use crate::wire::tailcfg::map::MapResponse;

/// Control sends a keep-alive each minute; a stream that is silent for longer is dead. Source: direct.go, `watchdogTimeout`.
pub(super) const WATCHDOG: Duration = Duration::from_secs(120);
/// The most octets of one frame on the wire. A netmap of ten thousand peers has about ten million uncompressed.
const FRAME_MAX: usize = 64 << 20;
/// The most octets that a frame may hold uncompressed.
const DECODED_MAX: u64 = 256 << 20;
/// What a zstd frame begins with (RFC 8878, 3.1.1).
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// A stream of MapResponses.
pub(super) struct MapStream {
    body: Incoming,
    buffer: BytesMut,
}

impl MapStream {
    pub(super) fn new(body: Incoming) -> Self {
        Self { body, buffer: BytesMut::new() }
    }

    /// The next message; waits at most [`WATCHDOG`].
    pub(super) async fn next(&mut self) -> Result<MapResponse, ConnectError> {
        let silent = |_| ConnectError::Noise { detail: format!("the map stream was silent for {WATCHDOG:?}") };
        timeout(WATCHDOG, self.read()).await.map_err(silent)?
    }

    async fn read(&mut self) -> Result<MapResponse, ConnectError> {
        loop {
            if let Some(frame) = take_frame(&mut self.buffer)? {
                if self.buffer.is_empty() {
                    // The next one is a delta, mostly: what a netmap needed goes with its frame.
                    self.buffer = BytesMut::new();
                }
                return decode(&frame);
            }
            let lost = |detail: String| ConnectError::Noise { detail };
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(octets) = frame.into_data() {
                        self.buffer.extend_from_slice(&octets);
                    }
                }
                Some(Err(error)) => return Err(lost(super::dial::chain(&error))),
                None => return Err(lost("control ended the map stream".to_owned())),
            }
        }
    }
}

/// Takes a whole frame off the buffer: a little-endian length, then so many octets.
fn take_frame(buffer: &mut BytesMut) -> Result<Option<BytesMut>, ConnectError> {
    let Some(prefix) = buffer.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_le_bytes(*prefix) as usize;
    if length > FRAME_MAX {
        return Err(ConnectError::Protocol { detail: format!("a map frame of {length} octets exceeds {FRAME_MAX}") });
    }
    if buffer.len() < 4 + length {
        return Ok(None);
    }
    buffer.advance(4);
    Ok(Some(buffer.split_to(length)))
}

fn decode(frame: &[u8]) -> Result<MapResponse, ConnectError> {
    decode_within(frame, DECODED_MAX)
}

/// Decodes a frame that may hold `most` octets uncompressed.
fn decode_within(frame: &[u8], most: u64) -> Result<MapResponse, ConnectError> {
    let garbled = |detail: String| ConnectError::Protocol { detail: format!("map response: {detail}") };
    if !frame.starts_with(&ZSTD_MAGIC) {
        return tailcfg::parse(frame).map_err(|error| garbled(error.to_string()));
    }
    let decoder = StreamingDecoder::new(frame).map_err(|error| garbled(error.to_string()))?;
    let mut json = decoder.take(most + 1);
    let parsed = tailcfg::parse_from(&mut json);
    if json.limit() == 0 {
        return Err(garbled(format!("it exceeds {most} octets")));
    }
    parsed.map_err(|error| garbled(error.to_string()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frames_wait_for_their_last_octet() {
        let mut buffer = BytesMut::from(&[2, 0, 0, 0, b'{'][..]);
        assert!(take_frame(&mut buffer).unwrap().is_none());
        buffer.extend_from_slice(b"}x");
        assert_eq!(take_frame(&mut buffer).unwrap().unwrap(), &b"{}"[..]);
        assert_eq!(&buffer[..], b"x");
    }

    #[test]
    fn an_oversize_frame_is_refused_before_it_arrives() {
        let mut buffer = BytesMut::from(&u32::MAX.to_le_bytes()[..]);
        let error = take_frame(&mut buffer).unwrap_err();
        assert!(matches!(error, ConnectError::Protocol { .. }));
    }

    #[test]
    fn a_zstd_frame_and_plain_json_mean_the_same() {
        let json = br#"{"KeepAlive":true}"#;
        let packed = ruzstd::encoding::compress_to_vec(&json[..], ruzstd::encoding::CompressionLevel::Fastest);
        assert_eq!(decode(&packed).unwrap(), decode(json).unwrap());
        assert!(decode(json).unwrap().keep_alive);
    }

    #[test]
    fn a_frame_may_hold_the_limit_and_no_octet_more() {
        let json = br#"{"KeepAlive":true}"#;
        let packed = ruzstd::encoding::compress_to_vec(&json[..], ruzstd::encoding::CompressionLevel::Fastest);
        assert!(decode_within(&packed, 18).unwrap().keep_alive);
        let refused = decode_within(&packed, 17).unwrap_err();
        assert!(refused.to_string().contains("exceeds 17 octets"), "{refused}");
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..300), zstd in any::<bool>()) {
            let mut frame = if zstd { ZSTD_MAGIC.to_vec() } else { Vec::new() };
            frame.extend(bytes);
            let _ = decode(&frame);
        }
    }
}
