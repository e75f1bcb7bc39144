//! One DERP region's connection: dialled, upgraded, admitted, kept.
//!
//! A task a region runs on the control thread. Packets go in by a queue that drops the oldest when the relay is slower
//! than we are, as a router would; what the relay says comes out as [`Event`]s. The task ends when its queue closes.
//! Source: Tailscale, derp/derphttp/derphttp_client.go and derp/derp_client.go.

mod upgrade;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use crypto_box::aead::{Aead, AeadCore, OsRng};
use crypto_box::{PublicKey, SalsaBox, SecretKey};
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tracing::{debug, info, warn};

use super::backoff::Backoff;
use super::queue::{Receiver, Sender, queue};
use super::tls::Check;
use super::underlay::{BoxIo, Underlay, UnderlayError};
use crate::key::{DerpPublic, NodePrivate, NodePublic};
use crate::netmap::RegionId;
use crate::wire::derp::{ClientFrame, FrameError, Gone, ServerFrame};

/// The longest that connecting to a region may take, all its nodes together. Source: derphttp_client.go, `dialRegion`.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// The longest that one node of a region may take for TCP and TLS before the next is tried.
const NODE_LIMIT: Duration = Duration::from_secs(3);
/// A relay speaks at least once a minute; silence beyond this means that the connection is dead.
/// Source: derp_client.go, `recvTimeout`.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);
/// A relay that takes nothing for so long is gone: it keeps two seconds itself. Source: derpserver, `writeTimeout`.
const WRITE_LIMIT: Duration = Duration::from_secs(15);
/// How long a plain upgrade may take before a WebSocket is tried: something between us may swallow it.
const UPGRADE_LIMIT: Duration = Duration::from_millis(1500);
/// Octets asked of the socket at a time.
const READ_CHUNK: usize = 64 << 10;
/// Packets that wait for a slow relay. More would only grow the delay: a relay's own queue holds 32.
const QUEUE: usize = 128;
/// Packets handed to the driver at once at most.
const BATCH: usize = 64;

/// A relay of a region, from the netmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    /// The name for SNI, HTTP and, without a literal address, DNS.
    pub host: String,
    /// Its literal addresses; empty for whatever the name resolves to.
    pub addresses: Vec<IpAddr>,
    /// The TCP port.
    pub port: u16,
    /// How its certificate is checked.
    pub check: Check,
}

impl Relay {
    /// Opens a TLS stream to the relay, its certificate checked as the netmap says.
    ///
    /// # Errors
    /// [`UnderlayError`]; the caller bounds the time.
    pub async fn dial(&self, underlay: &Underlay) -> Result<BoxIo, UnderlayError> {
        let name = match &self.check {
            Check::Name(name) => name,
            Check::Pin(_) | Check::Insecure => &self.host,
        };
        let config = underlay.tls.checked(&self.check);
        underlay.connect_tls((&self.host, &self.addresses), self.port, name, config).await
    }
}

/// One connection to a region: a region that is closed and opened again has another number, so that what the old
/// connection still says is not taken for the new one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionId {
    /// The region.
    pub region: RegionId,
    /// Counted up with each connection.
    pub number: u64,
}

/// A packet on its way to or from another node by a region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// The other node.
    pub peer: NodePublic,
    /// WireGuard or disco.
    pub contents: Bytes,
}

/// What a region's task tells the driver.
#[derive(Debug)]
pub enum Event {
    /// The relay has admitted us.
    Connected,
    /// Packets came.
    Packets(Vec<Packet>),
    /// A peer cannot be reached in this region.
    PeerGone(NodePublic, Gone),
    /// The connection is lost; the task connects again by itself.
    Lost(Arc<DerpError>),
}

/// Why a region is not connected.
#[derive(Debug, thiserror::Error)]
pub enum DerpError {
    /// None of its relays could be connected to; the last one's error.
    #[error(transparent)]
    Underlay(#[from] UnderlayError),
    /// Nothing came within the limit.
    #[error("relay {host} was silent for {limit:?}")]
    Silent {
        /// The relay.
        host: String,
        /// The limit.
        limit: Duration,
    },
    /// The relay did not change to DERP.
    #[error("relay {host} refused the upgrade: {detail}")]
    Upgrade {
        /// The relay.
        host: String,
        /// Its status or the error.
        detail: String,
    },
    /// The relay spoke something else, or its box cannot be opened.
    #[error("relay {host} broke the protocol: {detail}")]
    Protocol {
        /// The relay.
        host: String,
        /// What is wrong.
        detail: String,
    },
    /// The connection ended.
    #[error("the connection to relay {host} ended: {detail}")]
    Closed {
        /// The relay.
        host: String,
        /// How.
        detail: String,
    },
    /// The region has no relay that we could use.
    #[error("the region has no usable relay")]
    Empty,
}

/// The driver's end of a region's connection. The task ends when it is dropped.
pub struct Region {
    packets: Sender<Packet>,
    home: tokio::sync::watch::Sender<bool>,
}

impl Region {
    /// Starts the task that keeps the region of `id` connected, on the current runtime.
    pub fn start(
        runtime: &tokio::runtime::Handle,
        id: ConnectionId,
        relays: Vec<Relay>,
        key: NodePrivate,
        underlay: Underlay,
        events: mpsc::Sender<(ConnectionId, Event)>,
    ) -> Self {
        let (packets, outgoing) = queue(QUEUE);
        let (home, preferred) = tokio::sync::watch::channel(false);
        let task = Task { id, relays, key, underlay, events, outgoing, preferred };
        runtime.spawn(task.run());
        Self { packets, home }
    }

    /// Queues a packet. When the queue is full its oldest packet is dropped and `false` comes back.
    pub fn send(&self, packet: Packet) -> bool {
        self.packets.push(packet)
    }

    /// Says whether this region is our home.
    pub fn set_home(&self, home: bool) {
        self.home.send_if_modified(|now| std::mem::replace(now, home) != home);
    }
}

struct Task {
    id: ConnectionId,
    relays: Vec<Relay>,
    key: NodePrivate,
    underlay: Underlay,
    events: mpsc::Sender<(ConnectionId, Event)>,
    outgoing: Receiver<Packet>,
    preferred: tokio::sync::watch::Receiver<bool>,
}

/// What the relay says of its limits, sealed to our key.
#[derive(Deserialize)]
struct ServerInfo {
    #[serde(default, rename = "TokenBucketBytesPerSecond")]
    bytes_per_second: u64,
}

impl Task {
    async fn run(mut self) {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
        while !self.outgoing.is_closed() {
            let connected = tokio::select! {
                connected = timeout(CONNECT_LIMIT, self.connect()) => connected,
                () = self.outgoing.closed() => return,
            };
            let lost = match connected {
                Ok(Ok((io, host))) => self.serve(io, &host, &mut backoff).await,
                Ok(Err(error)) => Err(error),
                Err(_) => Err(DerpError::Silent { host: self.first_host(), limit: CONNECT_LIMIT }),
            };
            let Err(error) = lost else { return };
            debug!(region = self.id.region, %error, "derp connection lost");
            if self.events.send((self.id, Event::Lost(Arc::new(error)))).await.is_err() {
                return;
            }
            let mut link = self.underlay.link.news();
            tokio::select! {
                () = tokio::time::sleep(backoff.next_delay()) => {}
                _ = link.next() => backoff.reset(),
                () = self.outgoing.closed() => return,
            }
        }
    }

    fn first_host(&self) -> String {
        self.relays.first().map(|relay| relay.host.clone()).unwrap_or_default()
    }

    /// Connects to the first relay that answers, and upgrades the connection.
    async fn connect(&self) -> Result<(BoxIo, String), DerpError> {
        let mut last = DerpError::Empty;
        for relay in &self.relays {
            match timeout(NODE_LIMIT, self.connect_relay(relay)).await {
                Ok(Ok(io)) => return Ok((io, relay.host.clone())),
                Ok(Err(error)) => last = error,
                Err(_) => last = DerpError::Silent { host: relay.host.clone(), limit: NODE_LIMIT },
            }
        }
        Err(last)
    }

    /// The plain upgrade first; where something between us lets only WebSockets pass, a WebSocket.
    async fn connect_relay(&self, relay: &Relay) -> Result<BoxIo, DerpError> {
        let io = relay.dial(&self.underlay).await?;
        let upgraded = timeout(UPGRADE_LIMIT, upgrade::plain(io, relay)).await;
        let detail = "no answer".to_owned();
        match upgraded.unwrap_or(Err(DerpError::Upgrade { host: relay.host.clone(), detail })) {
            Err(DerpError::Upgrade { detail, .. }) => {
                debug!(region = self.id.region, detail, "plain upgrade refused, trying a websocket");
                upgrade::websocket(relay.dial(&self.underlay).await?, relay).await
            }
            other => other,
        }
    }

    /// Speaks with the relay until the connection ends (an error) or nobody needs it any more.
    async fn serve(&mut self, io: BoxIo, host: &str, backoff: &mut Backoff) -> Result<(), DerpError> {
        let (mut reader, mut writer) = tokio::io::split(io);
        let mut input = BytesMut::with_capacity(READ_CHUNK);
        let mut output = BytesMut::new();
        let mut admitted = false;
        let mut sealer = None;
        let mut deadline = Instant::now() + CONNECT_LIMIT;
        self.preferred.mark_changed();
        loop {
            let closed = |error: std::io::Error| DerpError::Closed { host: host.to_owned(), detail: error.to_string() };
            tokio::select! {
                read = reader.read_buf(&mut input) => {
                    if read.map_err(closed)? == 0 {
                        return Err(DerpError::Closed { host: host.to_owned(), detail: "closed by the relay".to_owned() });
                    }
                    deadline = Instant::now() + SILENCE_LIMIT;
                    let connected = self.handle_input(&mut input, &mut output, &mut sealer, host).await?;
                    if connected && !admitted {
                        admitted = true;
                        backoff.reset();
                    }
                    input.reserve(READ_CHUNK);
                }
                batch = self.outgoing.recv(BATCH), if admitted => {
                    let Some(batch) = batch else { return Ok(()) };
                    for packet in &batch {
                        ClientFrame::SendPacket { to: packet.peer, packet: &packet.contents }.encode(&mut output);
                    }
                }
                changed = self.preferred.changed(), if admitted => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    ClientFrame::NotePreferred(*self.preferred.borrow_and_update()).encode(&mut output);
                }
                () = self.outgoing.closed(), if !admitted => return Ok(()),
                () = tokio::time::sleep_until(deadline) => {
                    return Err(DerpError::Silent { host: host.to_owned(), limit: SILENCE_LIMIT });
                }
            }
            if !output.is_empty() {
                let written = timeout(WRITE_LIMIT, async {
                    writer.write_all_buf(&mut output).await?;
                    writer.flush().await
                });
                let stuck = |_| DerpError::Silent { host: host.to_owned(), limit: WRITE_LIMIT };
                written.await.map_err(stuck)?.map_err(closed)?;
            }
        }
    }

    /// Takes every whole frame off `input`; answers go to `output`. Returns whether the relay has admitted us now.
    async fn handle_input(
        &self,
        input: &mut BytesMut,
        output: &mut BytesMut,
        sealer: &mut Option<SalsaBox>,
        host: &str,
    ) -> Result<bool, DerpError> {
        let mut packets = Vec::new();
        let mut connected = false;
        let broken = |error: FrameError| DerpError::Protocol { host: host.to_owned(), detail: error.to_string() };
        while let Some(frame) = ServerFrame::parse(input).map_err(broken)? {
            match frame {
                ServerFrame::ServerKey(server) => *sealer = Some(self.introduce(server, output)),
                ServerFrame::ServerInfo(sealed) => {
                    self.open_info(sealer.as_ref(), &sealed, host)?;
                    connected = true;
                    self.tell(Event::Connected).await;
                }
                ServerFrame::Packet { from, packet } => packets.push(Packet { peer: from, contents: packet }),
                ServerFrame::PeerGone { peer, reason } => {
                    self.tell_packets(&mut packets).await;
                    self.tell(Event::PeerGone(peer, reason)).await;
                }
                ServerFrame::Ping(octets) => ClientFrame::Pong(octets).encode(output),
                ServerFrame::Health(problem) if problem.is_empty() => {
                    info!(region = self.id.region, "derp healthy again")
                }
                ServerFrame::Health(problem) => warn!(region = self.id.region, problem, "derp reports a problem"),
                ServerFrame::Restarting { reconnect_in, .. } => {
                    let detail = format!("the relay restarts, back in {reconnect_in:?}");
                    self.tell_packets(&mut packets).await;
                    return Err(DerpError::Closed { host: host.to_owned(), detail });
                }
                ServerFrame::KeepAlive | ServerFrame::Pong(_) | ServerFrame::Unknown(_) => {}
            }
        }
        self.tell_packets(&mut packets).await;
        Ok(connected)
    }

    /// Says who we are: the settings, sealed to the relay's key. Returns the box that its answer comes in.
    fn introduce(&self, server: DerpPublic, output: &mut BytesMut) -> SalsaBox {
        let sealer = SalsaBox::new(&PublicKey::from(*server.as_bytes()), &SecretKey::from(*self.key.as_bytes()));
        let nonce = SalsaBox::generate_nonce(&mut OsRng);
        let settings: &[u8] = br#"{"version":2,"CanAckPings":true}"#;
        let boxed = sealer.encrypt(&nonce, settings).expect("sealing a short text in memory cannot fail");
        let sealed = [nonce.as_slice(), &boxed].concat();
        ClientFrame::ClientInfo { key: self.key.public(), sealed: &sealed }.encode(output);
        sealer
    }

    /// Only the holder of the relay's key can have sealed this. Its limits are for the log: it enforces them itself.
    fn open_info(&self, sealer: Option<&SalsaBox>, sealed: &[u8], host: &str) -> Result<(), DerpError> {
        let broken = |detail: &str| DerpError::Protocol { host: host.to_owned(), detail: detail.to_owned() };
        let sealer = sealer.ok_or_else(|| broken("server info before the server key"))?;
        let (nonce, boxed) = sealed.split_at_checked(24).ok_or_else(|| broken("server info without nonce"))?;
        let json = sealer.decrypt(nonce.into(), boxed).map_err(|_| broken("server info is not sealed to us"))?;
        let info: ServerInfo = serde_json::from_slice(&json).map_err(|_| broken("server info is not JSON"))?;
        debug!(region = self.id.region, bytes_per_second = info.bytes_per_second, "derp connected");
        Ok(())
    }

    async fn tell_packets(&self, packets: &mut Vec<Packet>) {
        if !packets.is_empty() {
            self.tell(Event::Packets(std::mem::take(packets))).await;
        }
    }

    /// A full driver stops us from reading, which is the back-pressure that TCP hands to the relay.
    async fn tell(&self, event: Event) {
        // A driver that is gone drops our queue too, which ends the task.
        let _ = self.events.send((self.id, event)).await;
    }
}
