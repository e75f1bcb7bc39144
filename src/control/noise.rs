//! The encrypted stream to control: Noise IK, then records, as a byte stream that HTTP/2 runs on.
//!
//! snow does the handshake. The records are ours, since their nonces count in big endian, which no Noise library does.
//! Before HTTP/2 a server may send an early payload; it is taken out on the first read and never waited for, so that
//! our HTTP/2 preface does not wait either.
//! Source: Tailscale, control/controlbase (handshake.go, conn.go), control/ts2021/conn.go (early payload).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use snow::{Builder, HandshakeState};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use crate::key::{MachinePrivate, MachinePublic};
use crate::wire::noise::{FrameKind, HEADER, MAX_FRAME, MAX_PLAINTEXT, initiation, nonce, parse_header, record_header};

/// What an early payload begins with. Source: control/ts2021, `earlyPayloadMagic`.
const EARLY_MAGIC: &[u8; 5] = b"\xff\xff\xffTS";
/// Octets that tell an early payload from an HTTP/2 frame: the magic and a length, or a frame header.
const EARLY_HEADER: usize = 9;
/// The most octets of an early payload that we take; real ones have about a hundred.
const EARLY_MAX: usize = 64 << 10;

/// The handshake or the stream failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoiseError {
    /// The transport failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The server refused, in its own words.
    #[error("the server refused the handshake: {0}")]
    Refused(String),
    /// The server's half is not what the protocol says, or not made with the key that `/key` told.
    #[error("the server's handshake is not valid: {0}")]
    Invalid(String),
}

/// Our half of a handshake, sent; the server's is awaited.
pub(super) struct Handshake {
    state: HandshakeState,
    initiation: Vec<u8>,
}

impl Handshake {
    /// Begins a handshake with the server whose key is `server`. Each try needs its own.
    pub(super) fn begin(machine: &MachinePrivate, server: &MachinePublic, version: u16) -> Result<Self, NoiseError> {
        let invalid = |error: snow::Error| NoiseError::Invalid(error.to_string());
        let prologue = format!("Tailscale Control Protocol v{version}");
        let parameters = "Noise_IK_25519_ChaChaPoly_BLAKE2s".parse().map_err(invalid)?;
        let mut state = Builder::new(parameters)
            .prologue(prologue.as_bytes())
            .and_then(|builder| builder.local_private_key(machine.as_bytes()))
            .and_then(|builder| builder.remote_public_key(server.as_bytes()))
            .and_then(Builder::build_initiator)
            .map_err(invalid)?;
        let mut message = [0; 96];
        let length = state.write_message(&[], &mut message).map_err(invalid)?;
        Ok(Self { state, initiation: initiation(version, &message[..length]) })
    }

    /// The initiation, which travels in a header of the HTTP upgrade.
    pub(super) fn initiation(&self) -> &[u8] {
        &self.initiation
    }

    /// Reads the server's half from `io` and returns the encrypted stream.
    pub(super) async fn finish<T: AsyncRead + Unpin>(mut self, mut io: T) -> Result<NoiseStream<T>, NoiseError> {
        let mut header = [0; HEADER];
        io.read_exact(&mut header).await?;
        let (kind, length) = parse_header(header).map_err(|error| NoiseError::Invalid(error.to_string()))?;
        let mut payload = vec![0; length];
        io.read_exact(&mut payload).await?;
        match kind {
            FrameKind::Response => {}
            FrameKind::Error => return Err(NoiseError::Refused(String::from_utf8_lossy(&payload).into_owned())),
            FrameKind::Record => return Err(NoiseError::Invalid("a record before the response".to_owned())),
        }
        let read = self.state.read_message(&payload, &mut []);
        read.map_err(|error| NoiseError::Invalid(error.to_string()))?;
        let (sending, receiving) = self.state.dangerously_get_raw_split();
        Ok(NoiseStream {
            io,
            sealing: Cipher::new(&sending),
            opening: Cipher::new(&receiving),
            input: BytesMut::with_capacity(2 * MAX_FRAME),
            plain: BytesMut::new(),
            output: BytesMut::new(),
            early: Early::Unknown,
        })
    }
}

/// One direction's key and record counter.
struct Cipher {
    key: LessSafeKey,
    counter: u64,
}

impl Cipher {
    fn new(key: &[u8; 32]) -> Self {
        let key = UnboundKey::new(&CHACHA20_POLY1305, key).expect("the key has 32 octets");
        Self { key: LessSafeKey::new(key), counter: 0 }
    }

    fn next_nonce(&mut self) -> Nonce {
        let nonce = Nonce::assume_unique_for_key(nonce(self.counter));
        self.counter += 1;
        nonce
    }
}

/// What has been seen at the beginning of the plaintext.
enum Early {
    /// Fewer than nine octets so far.
    Unknown,
    /// An early payload of which so many octets are still to come.
    Skipping(usize),
    /// HTTP/2 from here on.
    Passed,
}

/// The encrypted stream.
pub(super) struct NoiseStream<T> {
    io: T,
    sealing: Cipher,
    opening: Cipher,
    /// Ciphertext that came in.
    input: BytesMut,
    /// Plaintext that nobody has read yet.
    plain: BytesMut,
    /// Ciphertext on its way out.
    output: BytesMut,
    early: Early,
}

impl<T> NoiseStream<T> {
    /// Opens every whole record in `input`.
    fn open_records(&mut self) -> io::Result<()> {
        while self.input.len() >= HEADER {
            let header = [self.input[0], self.input[1], self.input[2]];
            let (kind, length) = parse_header(header).map_err(io::Error::other)?;
            if kind != FrameKind::Record {
                return Err(io::Error::other("a handshake frame inside the stream"));
            }
            if self.input.len() < HEADER + length {
                break;
            }
            self.input.advance(HEADER);
            let mut record = self.input.split_to(length);
            let nonce = self.opening.next_nonce();
            let opened = self.opening.key.open_in_place(nonce, Aad::empty(), &mut record);
            let plain = opened.map_err(|_| io::Error::other("a record that was forged or damaged"))?;
            self.plain.extend_from_slice(plain);
        }
        self.skip_early();
        Ok(())
    }

    /// Takes the early payload out of the plaintext, as far as it is here. Its challenge is of no use to us.
    fn skip_early(&mut self) {
        if matches!(self.early, Early::Unknown) && self.plain.len() >= EARLY_HEADER {
            if self.plain.starts_with(EARLY_MAGIC) {
                self.plain.advance(EARLY_MAGIC.len());
                let length = usize::try_from(self.plain.get_u32()).unwrap_or(usize::MAX);
                self.early = Early::Skipping(length);
            } else {
                self.early = Early::Passed;
            }
        }
        if let Early::Skipping(left) = &mut self.early {
            let here = self.plain.len().min(*left);
            self.plain.advance(here);
            *left -= here;
            if *left == 0 {
                self.early = Early::Passed;
            }
        }
    }

    fn seal_record(&mut self, plain: &[u8]) {
        let mut record = plain.to_vec();
        let nonce = self.sealing.next_nonce();
        self.sealing
            .key
            .seal_in_place_append_tag(nonce, Aad::empty(), &mut record)
            .expect("sealing 4 KiB in memory cannot fail");
        let length = u16::try_from(record.len()).expect("a record fits a frame");
        self.output.extend_from_slice(&record_header(length));
        self.output.extend_from_slice(&record);
    }
}

impl<T: AsyncWrite + Unpin> NoiseStream<T> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.output.is_empty() {
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, &self.output))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.output.advance(written);
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for NoiseStream<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if matches!(this.early, Early::Passed) && !this.plain.is_empty() {
                let count = this.plain.len().min(buf.remaining());
                buf.put_slice(&this.plain[..count]);
                this.plain.advance(count);
                return Poll::Ready(Ok(()));
            }
            if let Early::Skipping(left) = this.early
                && left > EARLY_MAX
            {
                return Poll::Ready(Err(io::Error::other(format!(
                    "early payload of {left} octets exceeds {EARLY_MAX}"
                ))));
            }
            let mut chunk = [0; 2 * MAX_FRAME];
            let mut chunk = ReadBuf::new(&mut chunk);
            ready!(Pin::new(&mut this.io).poll_read(cx, &mut chunk))?;
            if chunk.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.input.extend_from_slice(chunk.filled());
            this.open_records()?;
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for NoiseStream<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        let count = buf.len().min(MAX_PLAINTEXT);
        this.seal_record(&buf[..count]);
        // What the transport does not take now goes out with the next write or flush.
        let _ = this.poll_drain(cx)?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    /// The server's half, by the same library: it shows that both ends agree, the real server shows that they are right.
    async fn accept(
        mut io: tokio::io::DuplexStream,
        key: &MachinePrivate,
        initiation: &[u8],
    ) -> NoiseStream<tokio::io::DuplexStream> {
        let mut state = Builder::new("Noise_IK_25519_ChaChaPoly_BLAKE2s".parse().unwrap())
            .prologue(b"Tailscale Control Protocol v130")
            .and_then(|builder| builder.local_private_key(key.as_bytes()))
            .and_then(Builder::build_responder)
            .unwrap();
        state.read_message(&initiation[5..], &mut []).unwrap();
        let mut message = [0; 48];
        state.write_message(&[], &mut message).unwrap();
        io.write_all(&[2, 0, 48]).await.unwrap();
        io.write_all(&message).await.unwrap();
        let (receiving, sending) = state.dangerously_get_raw_split();
        let (sealing, opening) = (Cipher::new(&sending), Cipher::new(&receiving));
        let (input, plain, output) = (BytesMut::new(), BytesMut::new(), BytesMut::new());
        NoiseStream { io, sealing, opening, input, plain, output, early: Early::Passed }
    }

    async fn pair() -> (NoiseStream<tokio::io::DuplexStream>, NoiseStream<tokio::io::DuplexStream>) {
        let (client, server) = tokio::io::duplex(1 << 16);
        let server_key = MachinePrivate::random();
        let handshake = Handshake::begin(&MachinePrivate::random(), &server_key.public(), 130).unwrap();
        assert_eq!(handshake.initiation().len(), 101);
        let server = accept(server, &server_key, handshake.initiation()).await;
        (handshake.finish(client).await.unwrap(), server)
    }

    #[tokio::test]
    async fn an_early_payload_is_skipped_and_what_follows_is_read() {
        let (mut client, mut server) = pair().await;
        server.write_all(b"\xff\xff\xffTS\0\0\0\x02{}PRI * HTTP/2.0").await.unwrap();
        let mut text = [0; 14];
        client.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"PRI * HTTP/2.0");
    }

    #[tokio::test]
    async fn without_an_early_payload_nothing_is_lost() {
        let (mut client, mut server) = pair().await;
        server.write_all(b"123456789 and more").await.unwrap();
        let mut text = [0; 18];
        client.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"123456789 and more");
    }

    #[tokio::test]
    async fn long_writes_are_cut_into_records_and_arrive_whole() {
        let (mut client, mut server) = pair().await;
        let sent: Vec<u8> = (0..40_000u32).map(|n| n as u8).collect();
        let expected = sent.clone();
        let writer = tokio::spawn(async move {
            client.write_all(&sent).await.unwrap();
            client.flush().await.unwrap();
            client
        });
        let mut got = vec![0; expected.len()];
        server.read_exact(&mut got).await.unwrap();
        assert_eq!(got, expected);
        drop(writer.await.unwrap());
    }

    #[tokio::test]
    async fn an_early_payload_without_end_is_an_error() {
        let (mut client, mut server) = pair().await;
        server.write_all(b"\xff\xff\xffTS\x7f\xff\xff\xff").await.unwrap();
        assert!(client.read_u8().await.is_err());
    }

    #[tokio::test]
    async fn an_error_frame_is_told_in_the_servers_words() {
        let (client, mut server) = tokio::io::duplex(1 << 10);
        let handshake = Handshake::begin(&MachinePrivate::random(), &MachinePrivate::random().public(), 130).unwrap();
        server.write_all(b"\x03\x00\x07too old").await.unwrap();
        let error = handshake.finish(client).await.err().unwrap();
        assert_eq!(error.to_string(), "the server refused the handshake: too old");
    }
}
