//! One connection to a relay, from the first frame to the last.
//!
//! Reading and writing do not wait for each other: a relay that limits our rate takes nothing for a while, and closes
//! the connection of whoever does not read for two seconds. What it has not taken waits in the region's queue, whose
//! oldest packets are lost first. Source: Tailscale, derp/derpserver, `rateLimit`, `writeTimeout`.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use crypto_box::aead::{Aead, AeadCore, OsRng};
use crypto_box::{PublicKey, SalsaBox, SecretKey};
use tokio::io::AsyncWrite;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::io::{poll_read_buf, poll_write_buf};
use tracing::debug;

use super::limits::{Limits, ServerInfo};
use super::pulse::{Due, Pulse};
use super::{CONNECT_LIMIT, DerpError, Event, Task, WRITE_LIMIT, ending};
use crate::key::{DerpPublic, NodePublic};
use crate::transport::turn;
use crate::transport::underlay::BoxIo;
use crate::wire::derp::{ClientFrame, FrameError, ServerFrame};

/// A relay speaks at least once a minute; silence beyond this means that the connection is dead.
/// Source: derp_client.go, `recvTimeout`.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);
/// Octets that the input has room for: all that came is taken together, since each taking costs a round of everything
/// above.
const READ_ROOM: usize = 64 << 10;
/// Octets of a turn, for which others on this thread wait.
const READ_TURN: usize = 48 << 10;
/// Room for one read: a relay writes records of 4 KiB.
const READ_LEAST: usize = 8 << 10;
/// Packets taken off the queue at once: as many as a relay's own queue holds.
const BATCH: usize = 32;
/// With so many octets unwritten, packets stay in the queue, where the oldest make room, and pings go unanswered.
const UNWRITTEN_LIMIT: usize = 16 << 10;

/// The connection's state.
pub(super) struct Session<'t, T> {
    task: &'t Task,
    /// Whom to tell; may put packets into the mailbox.
    tell: T,
    host: String,
    input: BytesMut,
    output: BytesMut,
    /// Whether something written may still be on this side of the socket.
    unflushed: bool,
    sealer: Option<SalsaBox>,
    admitted: bool,
    /// What the relay was told of being home.
    home: Option<bool>,
    /// When the relay has been silent for too long.
    silent_at: Instant,
    /// When it has taken nothing for too long, while something waits for it.
    stuck_at: Instant,
    pulse: Pulse,
    /// Whether the socket took no more when it was last tried.
    full: bool,
    limits: Limits,
    /// Packets sent before the relay admitted us, and their octets: not yet charged, and lost if it does not.
    early: (usize, usize),
    /// Pings that found too much unwritten.
    unanswered: u64,
}

impl<'t, T: FnMut(Event)> Session<'t, T> {
    pub(super) fn new(task: &'t Task, host: String, tell: T) -> Self {
        let now = Instant::now();
        Self {
            task,
            tell,
            host,
            input: BytesMut::with_capacity(READ_ROOM),
            output: BytesMut::new(),
            unflushed: false,
            sealer: None,
            admitted: false,
            home: None,
            silent_at: now + CONNECT_LIMIT,
            stuck_at: now,
            pulse: Pulse::default(),
            full: false,
            limits: Limits::new(ServerInfo::default(), now),
            early: (0, 0),
            unanswered: 0,
        }
    }

    /// Speaks with the relay until the connection ends (an error) or nobody needs it any more. Returns also whether
    /// the relay has admitted us.
    pub(super) async fn run(mut self, mut io: BoxIo) -> (Result<(), DerpError>, bool) {
        let mut timer = pin!(sleep_until(self.silent_at));
        let mut link = self.task.underlay.link.news();
        loop {
            tokio::select! {
                biased;
                ended = poll_fn(|cx| self.poll(&mut io, timer.as_mut(), cx)) => return (ended, self.admitted),
                () = link.moved() => {}
            }
            if self.admitted {
                self.pulse.note_moved(self.is_writing(), Instant::now());
            }
        }
    }

    fn poll(
        &mut self,
        io: &mut BoxIo,
        mut timer: Pin<&mut Sleep>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), DerpError>> {
        self.task.mailbox.unregister();
        self.poll_input(io, cx)?;
        self.poll_output(io, cx)?;
        if self.task.mailbox.is_closed() {
            return Poll::Ready(Ok(()));
        }
        self.task.mailbox.register(cx);
        loop {
            let now = Instant::now();
            if self.follow_pulse(now)? {
                self.poll_output(io, cx)?;
            }
            let writing = self.is_writing();
            let ends_at = if writing { self.silent_at.min(self.stuck_at) } else { self.silent_at };
            if ends_at <= now {
                return Poll::Ready(Err(self.silent(writing)));
            }
            let sends_at = Some(self.limits.sends_at(now)).filter(|at| *at > now && !self.task.mailbox.is_empty());
            let due = [sends_at, self.pulse.deadline()].into_iter().flatten().fold(ends_at, Instant::min);
            // Most deadlines only move away, and are looked at again when the timer was early.
            if due < timer.deadline() || timer.is_elapsed() {
                timer.as_mut().reset(due);
            }
            ready!(timer.as_mut().poll(cx));
            self.poll_output(io, cx)?;
        }
    }

    /// Asks for a sign of life, and does what follows when there is none. Returns whether there is something to send.
    fn follow_pulse(&mut self, now: Instant) -> Result<bool, DerpError> {
        let mut asks = false;
        while let Some(due) = self.pulse.due(now) {
            match due {
                Due::Ping => {
                    self.queue(&ClientFrame::Ping(rand::random()));
                    asks = true;
                }
                Due::Doubt => {
                    debug!(region = self.task.id.region, "derp relay does not answer");
                    (self.tell)(Event::Doubted);
                }
                Due::Tell => self.task.complaints.borrow_mut().note_doubt(),
                Due::GiveUp(limit) => return Err(DerpError::Silent { host: self.host.clone(), limit }),
            }
        }
        Ok(asks)
    }

    fn end_doubt(&mut self) {
        self.task.complaints.borrow_mut().note_answer();
        (self.tell)(Event::Answers);
    }

    /// Takes what has come, as much as a turn is long. All is heard before an end is.
    fn poll_input(&mut self, io: &mut BoxIo, cx: &mut Context<'_>) -> Result<(), DerpError> {
        let mut taken = 0;
        let ended = loop {
            self.input.reserve(READ_LEAST);
            match poll_read_buf(Pin::new(io), cx, &mut self.input) {
                Poll::Ready(Ok(0)) => break Some(self.ended()),
                Poll::Ready(Ok(count)) => taken += count,
                Poll::Ready(Err(error)) => break Some(self.closed(&error)),
                Poll::Pending => break None,
            }
            if taken >= READ_TURN {
                turn::end(cx);
                break None;
            }
        };
        if taken > 0 {
            if self.pulse.note_heard() {
                self.end_doubt();
            }
            self.handle_input()?;
            // Whoever does not admit us cannot have us wait by trickling.
            if self.admitted {
                self.silent_at = Instant::now() + SILENCE_LIMIT;
            }
        }
        ended.map_or(Ok(()), Err)
    }

    /// Writes what waits, as far as the relay's limits and the socket permit.
    fn poll_output(&mut self, io: &mut BoxIo, cx: &mut Context<'_>) -> Result<(), DerpError> {
        loop {
            self.take_packets();
            if !self.is_writing() {
                return Ok(());
            }
            match poll_write_some(io, &mut self.output, cx) {
                Poll::Ready(written) => self.unflushed = written.map_err(|error| self.closed(&error))?,
                Poll::Pending => {
                    self.full = true;
                    return Ok(());
                }
            }
            let now = Instant::now();
            self.stuck_at = now + WRITE_LIMIT;
            if std::mem::take(&mut self.full) && self.pulse.note_taken(now) {
                self.end_doubt();
            }
        }
    }

    fn is_writing(&self) -> bool {
        !self.output.is_empty() || self.unflushed
    }

    /// Makes frames of what waits in the mailbox, as soon as we have said who we are: the relay takes in order what
    /// comes, and its own info, a round trip later, tells how fast we may go on. No more than one batch is sent before:
    /// a relay that does not admit us has thrown it away.
    /// Source: Tailscale, derp_client.go, `newClient`, which returns as soon as `sendClientKey` does.
    fn take_packets(&mut self) {
        if self.sealer.is_none() {
            return;
        }
        let home = self.task.mailbox.is_home();
        if self.home.replace(home) != Some(home) {
            self.queue(&ClientFrame::NotePreferred(home));
        }
        if self.output.len() >= UNWRITTEN_LIMIT || self.task.mailbox.is_empty() {
            return;
        }
        let now = Instant::now();
        if self.limits.sends_at(now) > now {
            return;
        }
        let (before, most) = (self.output.len(), if self.admitted { BATCH } else { BATCH - self.early.0 });
        let mut count = 0;
        for packet in std::iter::from_fn(|| self.task.mailbox.pop()).take(most) {
            self.queue(&ClientFrame::SendPacket { to: packet.peer, packet: &packet.contents });
            count += 1;
        }
        if count == 0 {
            return;
        }
        let octets = self.output.len() - before;
        if self.admitted {
            self.limits.charge(octets, now);
            self.pulse.note_sent(now);
        } else {
            self.early = (self.early.0 + count, self.early.1 + octets);
        }
    }

    fn queue(&mut self, frame: &ClientFrame<'_>) {
        if !self.is_writing() {
            self.stuck_at = Instant::now() + WRITE_LIMIT;
        }
        frame.encode(&mut self.output);
    }

    /// Takes every whole frame off the input.
    fn handle_input(&mut self) -> Result<(), DerpError> {
        let mut packets = Vec::new();
        while let Some(frame) = ServerFrame::parse(&mut self.input).map_err(|error| self.broken(&error))? {
            if let ServerFrame::Packet { from, packet } = frame {
                if !self.admitted {
                    return Err(self.wrong("a packet before its server info"));
                }
                packets.push((from, packet));
                continue;
            }
            self.tell_packets(&mut packets);
            self.handle_frame(frame)?;
        }
        self.tell_packets(&mut packets);
        if self.unanswered > 0 {
            (self.tell)(Event::Unanswered(std::mem::take(&mut self.unanswered)));
        }
        Ok(())
    }

    /// Everything but packets.
    fn handle_frame(&mut self, frame: ServerFrame) -> Result<(), DerpError> {
        let region = self.task.id.region;
        match frame {
            ServerFrame::ServerKey(_) if self.sealer.is_some() => return Err(self.wrong("a second server key")),
            ServerFrame::ServerKey(server) => self.introduce(server),
            ServerFrame::ServerInfo(_) if self.admitted => return Err(self.wrong("a second server info")),
            ServerFrame::ServerInfo(sealed) => {
                let info = self.open_info(&sealed)?;
                debug!(region, bytes_per_second = info.bytes_per_second, "derp connected");
                self.admitted = true;
                let ((early, octets), now) = (std::mem::take(&mut self.early), Instant::now());
                self.limits = Limits::new(info, now);
                self.limits.charge(octets, now);
                if early > 0 {
                    self.pulse.note_sent(now);
                }
                self.task.complaints.borrow_mut().note_admitted();
                (self.tell)(Event::Connected);
            }
            ServerFrame::PeerGone { peer, reason } => (self.tell)(Event::PeerGone(peer, reason)),
            ServerFrame::Ping(octets) if self.output.len() < UNWRITTEN_LIMIT => self.queue(&ClientFrame::Pong(octets)),
            ServerFrame::Health(problem) => self.task.complaints.borrow_mut().note_problem(&problem),
            ServerFrame::Restarting { reconnect_in, try_for } => {
                return Err(DerpError::Restarting { host: self.host.clone(), reconnect_in, try_for });
            }
            ServerFrame::Ping(_) => self.unanswered += 1,
            ServerFrame::Packet { .. } | ServerFrame::KeepAlive | ServerFrame::Pong(_) | ServerFrame::Unknown(_) => {}
        }
        Ok(())
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

    fn tell_packets(&mut self, packets: &mut Vec<(NodePublic, BytesMut)>) {
        if !packets.is_empty() {
            self.pulse.note_carried(Instant::now());
            (self.tell)(Event::Packets(std::mem::take(packets)));
        }
    }

    fn closed(&self, error: &io::Error) -> DerpError {
        DerpError::Closed { host: self.host.clone(), detail: ending(error) }
    }

    fn ended(&self) -> DerpError {
        self.closed(&io::ErrorKind::UnexpectedEof.into())
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

/// Writes what the socket takes, or else flushes; whether another flush is due.
fn poll_write_some(io: &mut BoxIo, output: &mut BytesMut, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
    if output.is_empty() {
        ready!(Pin::new(io).poll_flush(cx))?;
        return Poll::Ready(Ok(false));
    }
    match ready!(poll_write_buf(Pin::new(io), cx, output))? {
        0 => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
        _ => Poll::Ready(Ok(true)),
    }
}
