//! One DERP region's connection: dialled, upgraded, admitted, kept.
//!
//! A task a region runs beside the driver, on its thread: to hand every packet to another thread and back cost a round
//! trip a fifth of its time. Packets go in by a mailbox that drops the oldest when the relay is slower than we are, as
//! a router would; what the relay says is told as [`Event`]s at once. The task ends when its mailbox closes.
//! Source: Tailscale, derp/derphttp/derphttp_client.go and derp/derp_client.go.

mod complaints;
mod limits;
mod mailbox;
mod pulse;
mod retry;
mod session;
mod upgrade;

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::debug;

pub use self::complaints::Complaints;
use self::mailbox::{Receiver, Sender, mailbox};
use self::retry::Retry;
use self::session::Session;
use super::error::UnderlayError;
use super::places::Places;
use super::race::race;
use super::tls::Check;
use super::underlay::{BoxIo, Underlay};
use crate::key::{NodePrivate, NodePublic};
use crate::lapse::Lapse;
use crate::netmap::RegionId;
use crate::wire::derp::Gone;

/// The longest that connecting to a region may take, all its nodes together; to one that TCP does not reach it takes half
/// of that. Source: derphttp_client.go, `dialRegion`.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// The pause before the next node of a region is tried beside the last one.
const NEXT_NODE: Duration = Duration::from_secs(3);
/// How long a plain upgrade may take on a fast line, before a WebSocket is tried: something between us may swallow it.
const UPGRADE_LIMIT: Duration = Duration::from_millis(1500);
/// One write, or flushing what TLS holds of earlier ones (64 KiB at most), may take so long; a relay that takes it more
/// slowly is gone.
const WRITE_LIMIT: Duration = Duration::from_secs(15);
/// Packets that wait for a slow relay. More would only grow the delay: a relay's own queue holds 32.
const QUEUE: usize = 128;

/// A relay of a region, from the netmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    /// The name for SNI, HTTP and, where not every address is known, DNS.
    pub host: String,
    /// Where it is, if it is not reached by a proxy.
    pub places: Places,
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
        underlay.connect_tls((&self.host, &self.places), self.port, name, config).await
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

/// A packet on its way to another node by a region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// The other node.
    pub peer: NodePublic,
    /// WireGuard or disco.
    pub contents: Vec<u8>,
}

/// What a region's task tells the driver.
#[derive(Debug)]
pub enum Event {
    /// The relay has admitted us.
    Connected,
    /// The relay does not answer; the connection is kept for a while.
    Doubted,
    /// The relay that was doubted answers: nothing was lost.
    Answers,
    /// Packets came, WireGuard or disco, each from the node beside it.
    Packets(Vec<(NodePublic, BytesMut)>),
    /// A peer cannot be reached in this region.
    PeerGone(NodePublic, Gone),
    /// So many pings of the relay got no answer: it takes too little of what we send.
    Unanswered(u64),
    /// The connection is lost; the task connects again by itself.
    Lost(Arc<DerpError>),
}

/// Why a region is not connected.
#[derive(Debug, thiserror::Error)]
pub enum DerpError {
    /// None of its relays could be connected to.
    #[error(transparent)]
    Underlay(#[from] UnderlayError),
    /// Nothing came within the limit.
    #[error("relay {host} was silent for {}", Lapse(*.limit))]
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
    /// The relay is about to restart.
    #[error("relay {host} restarts, to be back in {}", Lapse(*.reconnect_in))]
    Restarting {
        /// The relay.
        host: String,
        /// When it wants to see us again.
        reconnect_in: Duration,
        /// For how long we are to try then, before it counts as gone.
        try_for: Duration,
    },
    /// The region has no relay that we could use.
    #[error("the region has no usable relay")]
    Empty,
}

/// The driver's end of a region's connection. The task ends when it is dropped.
pub struct Region {
    mailbox: Sender,
}

/// What keeps a region connected, to be run on the driver's thread.
pub struct Task {
    id: ConnectionId,
    relays: Vec<Relay>,
    key: NodePrivate,
    underlay: Underlay,
    mailbox: Receiver,
    complaints: Rc<RefCell<Complaints>>,
}

impl Region {
    /// The region of `id`, and the task that keeps it connected, and adds to what was said of the region.
    pub fn new(
        id: ConnectionId,
        relays: Vec<Relay>,
        key: NodePrivate,
        underlay: Underlay,
        complaints: Rc<RefCell<Complaints>>,
    ) -> (Self, Task) {
        let (sender, receiver) = mailbox(QUEUE);
        complaints.borrow_mut().begin();
        (Self { mailbox: sender }, Task { id, relays, key, underlay, mailbox: receiver, complaints })
    }

    /// Queues a packet. When the queue is full its oldest packet is dropped and `false` comes back.
    pub fn send(&self, packet: Packet) -> bool {
        self.mailbox.push(packet)
    }

    /// Says whether this region is our home.
    pub fn set_home(&self, home: bool) {
        self.mailbox.set_home(home);
    }
}

impl Task {
    /// Connects, and connects again, until the region is dropped. `tell` may put packets into the mailbox at once.
    pub async fn run(self, mut tell: impl FnMut(ConnectionId, Event)) {
        let (mut retry, id) = (Retry::new(), self.id);
        while !self.mailbox.is_closed() {
            // From before the connection, so that the move that ends it is news.
            let mut link = self.underlay.link.news();
            let before = self.mailbox.pushed();
            let dialled = Instant::now();
            let connected = tokio::select! {
                connected = self.connect() => connected,
                () = self.mailbox.closed() => return,
            };
            let begun = Instant::now();
            let (lost, admitted) = match connected {
                Ok((io, host)) => Session::new(&self, host, |event| tell(id, event)).run(io).await,
                Err(error) => (Err(error), false),
            };
            let Err(error) = lost else { return };
            self.complaints.borrow_mut().note_loss(&error, admitted);
            retry.note_loss(&error, begun.elapsed());
            let spent = begun - dialled;
            tell(id, Event::Lost(Arc::new(error)));
            tokio::select! {
                () = retry.pause(&mut link, spent, self.mailbox.pushed_since(before)) => {}
                () = self.mailbox.closed() => return,
            }
        }
    }

    /// Connects to the first relay that answers, and upgrades the connection. While one is slow the next are tried beside
    /// it; once there is no time left, none is begun.
    ///
    /// # Errors
    /// Of the first relay that answered and turned us away, or else of the first.
    async fn connect(&self) -> Result<(BoxIo, String), DerpError> {
        let until = Instant::now() + CONNECT_LIMIT;
        let attempt = async |(index, relay): (usize, &Relay)| {
            let host = relay.host.clone();
            let connected = async {
                if Instant::now() < until {
                    timeout_at(until, self.connect_relay(relay, until)).await.ok()
                } else {
                    None
                }
            };
            match connected.await {
                Some(Ok(io)) => Ok((io, host)),
                Some(Err(error)) => Err((index, error)),
                None => Err((index, DerpError::Silent { host, limit: CONNECT_LIMIT })),
            }
        };
        let connected = race(self.relays.iter().enumerate().map(attempt), NEXT_NODE).await;
        let telling = |failures: Vec<(usize, DerpError)>| {
            let first = failures.into_iter().min_by_key(|(index, error)| (error.is_out_of_reach(), *index));
            first.map_or(DerpError::Empty, |(_, error)| error)
        };
        connected.map_err(telling)
    }

    /// The plain upgrade first; where something between us lets only WebSockets pass, a WebSocket. The caller ends it all.
    async fn connect_relay(&self, relay: &Relay, until: Instant) -> Result<BoxIo, DerpError> {
        let begun = Instant::now();
        let io = relay.dial(&self.underlay).await?;
        let limit = upgrade_limit(begun.elapsed(), until.saturating_duration_since(Instant::now()));
        let upgraded = timeout(limit, upgrade::plain(io, relay)).await;
        let detail = "no answer".to_owned();
        match upgraded.unwrap_or(Err(DerpError::Upgrade { host: relay.host.clone(), detail })) {
            Err(DerpError::Upgrade { detail, .. }) => {
                debug!(region = self.id.region, detail, "plain upgrade refused, trying a websocket");
                upgrade::websocket(relay.dial(&self.underlay).await?, relay).await
            }
            other => other,
        }
    }
}

/// How long a plain upgrade may take after a dial that took so long, with so much time left. It takes one round trip, and
/// the dial took three; after it, another dial and a WebSocket's upgrade must fit. Where they do not, it has no limit.
fn upgrade_limit(dial: Duration, left: Duration) -> Duration {
    let trip = dial / 3;
    let spare = left.saturating_sub(dial + trip);
    if spare < trip { Duration::MAX } else { trip.max(UPGRADE_LIMIT).min(spare) }
}

/// What is said of a connection that was closed: by the relay, or by a proxy or another machine before it.
const CLOSED: &str = "closed by the other side";

/// How a connection ended. A relay need not take leave, which TLS would like better; its text names a web page.
fn ending(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::UnexpectedEof { CLOSED.to_owned() } else { error.to_string() }
}

#[cfg(test)]
mod tests;
