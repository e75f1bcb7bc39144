//! One connection to a relay, from the first frame to the last.
//!
//! Reading and writing do not wait for each other: a relay that limits our rate takes nothing for a while, and closes
//! the connection of whoever does not read for two seconds. What it has not taken waits in the region's queue, whose
//! oldest packets are lost first. Source: Tailscale, derp/derpserver, `rateLimit`, `writeTimeout`.

use std::time::Duration;

use bytes::BytesMut;
use crypto_box::aead::{Aead, AeadCore, OsRng};
use crypto_box::{PublicKey, SalsaBox, SecretKey};
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};

use super::{CONNECT_LIMIT, DerpError, Event, Packet, Task};
use crate::key::DerpPublic;
use crate::transport::underlay::BoxIo;
use crate::wire::derp::{ClientFrame, FrameError, ServerFrame};

/// A relay speaks at least once a minute; silence beyond this means that the connection is dead.
/// Source: derp_client.go, `recvTimeout`.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);
/// One write, or flushing what TLS holds of earlier ones (64 KiB at most), may take so long; a relay that takes it more
/// slowly is gone.
const WRITE_LIMIT: Duration = Duration::from_secs(15);
/// Octets asked of the socket at a time.
const READ_CHUNK: usize = 64 << 10;
/// Packets taken off the queue at once: as many as a relay's own queue holds.
const BATCH: usize = 32;
/// With so many octets unwritten, packets stay in the queue, where the oldest make room, and pings go unanswered.
const UNWRITTEN_LIMIT: usize = 16 << 10;
/// Characters of a problem that are told: a relay may send a mebibyte of them.
const PROBLEM_MAX: usize = 200;

/// What the relay says of its limits, sealed to our key.
#[derive(Debug, Default, Deserialize)]
struct ServerInfo {
    #[serde(default, rename = "TokenBucketBytesPerSecond")]
    bytes_per_second: u64,
    #[serde(default, rename = "TokenBucketBytesBurst")]
    burst: u64,
}

/// The connection's state.
pub(super) struct Session<'t> {
    task: &'t mut Task,
    host: String,
    input: BytesMut,
    output: BytesMut,
    /// Whether something written may still be on this side of the socket.
    unflushed: bool,
    sealer: Option<SalsaBox>,
    admitted: bool,
    /// When the relay has been silent for too long.
    silent_at: Instant,
    /// When it has taken nothing for too long, while something waits for it.
    stuck_at: Instant,
    limits: ServerInfo,
    /// When what was sent counts as paid by the relay's limits.
    paid_at: Instant,
    /// The problem that was told last; empty for none.
    problem: String,
}

impl<'t> Session<'t> {
    pub(super) fn new(task: &'t mut Task, host: String) -> Self {
        let now = Instant::now();
        Self {
            task,
            host,
            input: BytesMut::with_capacity(READ_CHUNK),
            output: BytesMut::new(),
            unflushed: false,
            sealer: None,
            admitted: false,
            silent_at: now + CONNECT_LIMIT,
            stuck_at: now,
            limits: ServerInfo::default(),
            paid_at: now,
            problem: String::new(),
        }
    }

    /// Speaks with the relay until the connection ends (an error) or nobody needs it any more. Returns also whether
    /// the relay has admitted us.
    pub(super) async fn run(mut self, io: BoxIo) -> (Result<(), DerpError>, bool) {
        let ended = self.speak(io).await;
        (ended, self.admitted)
    }

    async fn speak(&mut self, io: BoxIo) -> Result<(), DerpError> {
        let (mut reader, mut writer) = tokio::io::split(io);
        self.task.preferred.mark_changed();
        loop {
            let writing = !self.output.is_empty() || self.unflushed;
            let now = Instant::now();
            let sends_at = self.sends_at(now);
            let takes = self.admitted && self.output.len() < UNWRITTEN_LIMIT && sends_at <= now;
            let ends_at = if writing { self.silent_at.min(self.stuck_at) } else { self.silent_at };
            tokio::select! {
                read = reader.read_buf(&mut self.input) => {
                    if read.map_err(|error| self.closed(&error))? == 0 {
                        return Err(self.ended());
                    }
                    self.handle_input().await?;
                    // Whoever does not admit us cannot have us wait by trickling.
                    if self.admitted {
                        self.silent_at = Instant::now() + SILENCE_LIMIT;
                    }
                    self.input.reserve(READ_CHUNK);
                }
                written = write_some(&mut writer, &mut self.output), if writing => {
                    self.unflushed = written.map_err(|error| self.closed(&error))?;
                    self.stuck_at = Instant::now() + WRITE_LIMIT;
                }
                batch = self.task.outgoing.recv(BATCH), if takes => {
                    let Some(batch) = batch else { return Ok(()) };
                    self.send(&batch, writing);
                }
                changed = self.task.preferred.changed(), if self.admitted => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let home = *self.task.preferred.borrow_and_update();
                    self.queue(&ClientFrame::NotePreferred(home));
                }
                () = self.task.outgoing.closed(), if !takes => return Ok(()),
                () = sleep_until(sends_at), if self.admitted && sends_at > now => {}
                () = sleep_until(ends_at) => return Err(self.silent(writing)),
            }
        }
    }

    /// When the relay's limits let us send: so much is not yet paid that the burst does not cover it.
    fn sends_at(&self, now: Instant) -> Instant {
        let ServerInfo { bytes_per_second, burst } = self.limits;
        // Without limits the quotient is no number, and a burst may last longer than any time.
        let saved = Duration::try_from_secs_f64(burst as f64 / bytes_per_second as f64).unwrap_or(Duration::MAX);
        now + self.paid_at.saturating_duration_since(now).saturating_sub(saved)
    }

    fn send(&mut self, batch: &[Packet], writing: bool) {
        let now = Instant::now();
        if !writing {
            self.stuck_at = now + WRITE_LIMIT;
        }
        let before = self.output.len();
        for packet in batch {
            ClientFrame::SendPacket { to: packet.peer, packet: &packet.contents }.encode(&mut self.output);
        }
        let cost = (self.output.len() - before) as f64;
        if self.limits.bytes_per_second > 0 {
            let seconds = cost / self.limits.bytes_per_second as f64;
            self.paid_at = self.paid_at.max(now) + Duration::from_secs_f64(seconds);
        }
    }

    fn queue(&mut self, frame: &ClientFrame<'_>) {
        if self.output.is_empty() && !self.unflushed {
            self.stuck_at = Instant::now() + WRITE_LIMIT;
        }
        frame.encode(&mut self.output);
    }

    /// Takes every whole frame off the input.
    async fn handle_input(&mut self) -> Result<(), DerpError> {
        let mut packets = Vec::new();
        while let Some(frame) = ServerFrame::parse(&mut self.input).map_err(|error| self.broken(&error))? {
            if let ServerFrame::Packet { from, packet } = frame {
                packets.push(Packet { peer: from, contents: packet });
                continue;
            }
            self.tell_packets(&mut packets).await;
            self.handle_frame(frame).await?;
        }
        self.tell_packets(&mut packets).await;
        Ok(())
    }

    /// Everything but packets.
    async fn handle_frame(&mut self, frame: ServerFrame) -> Result<(), DerpError> {
        let region = self.task.id.region;
        match frame {
            ServerFrame::ServerKey(_) if self.sealer.is_some() => return Err(self.wrong("a second server key")),
            ServerFrame::ServerKey(server) => self.introduce(server),
            ServerFrame::ServerInfo(_) if self.admitted => return Err(self.wrong("a second server info")),
            ServerFrame::ServerInfo(sealed) => {
                self.limits = self.open_info(&sealed)?;
                let Self { limits, .. } = &*self;
                debug!(region, bytes_per_second = limits.bytes_per_second, "derp connected");
                self.admitted = true;
                self.tell(Event::Connected).await;
            }
            ServerFrame::PeerGone { peer, reason } => self.tell(Event::PeerGone(peer, reason)).await,
            ServerFrame::Ping(octets) if self.output.len() < UNWRITTEN_LIMIT => self.queue(&ClientFrame::Pong(octets)),
            ServerFrame::Health(problem) => self.note_problem(&problem),
            ServerFrame::Restarting { reconnect_in, try_for } => {
                return Err(DerpError::Restarting { host: self.host.clone(), reconnect_in, try_for });
            }
            ServerFrame::Packet { .. }
            | ServerFrame::Ping(_)
            | ServerFrame::KeepAlive
            | ServerFrame::Pong(_)
            | ServerFrame::Unknown(_) => {}
        }
        Ok(())
    }

    /// Tells a problem, and its end, once.
    fn note_problem(&mut self, problem: &str) {
        let (region, problem) = (self.task.id.region, problem.chars().take(PROBLEM_MAX).collect::<String>());
        if problem == self.problem {
            return;
        }
        if problem.is_empty() {
            info!(region, "derp healthy again");
        } else {
            warn!(region, problem, "derp reports a problem");
        }
        self.problem = problem;
    }

    /// Says who we are: the settings, sealed to the relay's key, whose answer comes in the same box.
    fn introduce(&mut self, server: DerpPublic) {
        let key = &self.task.key;
        let sealer = SalsaBox::new(&PublicKey::from(*server.as_bytes()), &SecretKey::from(*key.as_bytes()));
        let nonce = SalsaBox::generate_nonce(&mut OsRng);
        let settings: &[u8] = br#"{"version":2,"CanAckPings":true}"#;
        let boxed = sealer.encrypt(&nonce, settings).expect("sealing a short text in memory cannot fail");
        let sealed = [nonce.as_slice(), &boxed].concat();
        let key = key.public();
        self.queue(&ClientFrame::ClientInfo { key, sealed: &sealed });
        self.sealer = Some(sealer);
    }

    /// Only the holder of the relay's key can have sealed this.
    fn open_info(&self, sealed: &[u8]) -> Result<ServerInfo, DerpError> {
        let sealer = self.sealer.as_ref().ok_or_else(|| self.wrong("server info before the server key"))?;
        let (nonce, boxed) = sealed.split_at_checked(24).ok_or_else(|| self.wrong("server info without nonce"))?;
        let json = sealer.decrypt(nonce.into(), boxed).map_err(|_| self.wrong("server info is not sealed to us"))?;
        serde_json::from_slice(&json).map_err(|_| self.wrong("server info is not JSON"))
    }

    async fn tell_packets(&self, packets: &mut Vec<Packet>) {
        if !packets.is_empty() {
            self.tell(Event::Packets(std::mem::take(packets))).await;
        }
    }

    /// A full driver stops us from reading, which is the back-pressure that TCP hands to the relay.
    async fn tell(&self, event: Event) {
        // A driver that is gone drops our queue too, which ends the task.
        let _ = self.task.events.send((self.task.id, event)).await;
    }

    fn closed(&self, error: &std::io::Error) -> DerpError {
        DerpError::Closed { host: self.host.clone(), detail: error.to_string() }
    }

    fn ended(&self) -> DerpError {
        DerpError::Closed { host: self.host.clone(), detail: "closed by the relay".to_owned() }
    }

    fn broken(&self, error: &FrameError) -> DerpError {
        self.wrong(&error.to_string())
    }

    fn wrong(&self, detail: &str) -> DerpError {
        DerpError::Protocol { host: self.host.clone(), detail: detail.to_owned() }
    }

    fn silent(&self, writing: bool) -> DerpError {
        let limit = match self.admitted {
            _ if writing && self.stuck_at < self.silent_at => WRITE_LIMIT,
            true => SILENCE_LIMIT,
            false => CONNECT_LIMIT,
        };
        DerpError::Silent { host: self.host.clone(), limit }
    }
}

/// Writes what the socket takes, or else flushes; whether another flush is due. May be dropped and begun anew.
async fn write_some(writer: &mut (impl AsyncWrite + Unpin), output: &mut BytesMut) -> std::io::Result<bool> {
    if output.is_empty() {
        writer.flush().await?;
        return Ok(false);
    }
    match writer.write_buf(output).await? {
        0 => Err(std::io::ErrorKind::WriteZero.into()),
        _ => Ok(true),
    }
}
