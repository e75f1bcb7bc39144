//! The way in for the browser: SOCKS5 and HTTP on one port.
//!
//! The first byte of a connection tells the protocol, without being taken from the socket. Every connection gets an
//! answer in its own protocol, the one over the limit and the one that comes while the run ends included: a browser
//! that meets a reset shuns the proxy for minutes. A success is told only once the target has answered.

pub mod access;
pub mod stats;

mod answer;
mod associate;
#[cfg(test)]
mod bed;
mod body;
mod envelope;
mod fields;
mod forward;
mod head;
mod http;
mod request;
mod socket;
mod socks;
mod splice;
mod upstream;

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

pub use access::Credentials;
pub use stats::Stats;

use crate::fault::{self, Fault, Row};
use crate::node::{Node, Stream, Target};
use access::OwnListeners;
use splice::Opened;
use stats::Protocol;

/// The proxy's settings.
#[derive(Debug)]
pub struct Config {
    /// The user and password that clients must show. Defaults to none.
    pub credentials: Option<Credentials>,
    /// Connections open at once; the next one is answered and closed. UDP associations count among them, and may have
    /// as many mappings together. Defaults to 4,096.
    pub max_connections: usize,
    /// Bytes of a request head. Defaults to 16 KiB.
    pub head_limit: usize,
    /// The longest that a request head, a SOCKS negotiation or an idle HTTP connection may take. Defaults to 10 s.
    pub head_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { credentials: None, max_connections: 4_096, head_limit: 16 * 1024, head_timeout: Duration::from_secs(10) }
    }
}

/// Connections that are being told that there are too many. Past these the kernel's backlog holds what comes.
const OVERFLOW: usize = 256;

/// How long such a connection may take to say what it wants.
const OVERFLOW_TIMEOUT: Duration = Duration::from_secs(2);

/// The pause after a failed accept: without file descriptors it fails again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What all connections share.
struct Proxy {
    node: Node,
    config: Config,
    stats: Arc<Stats>,
    own: RefCell<OwnListeners>,
    drain: CancellationToken,
    /// Ends what is still open, in whatever state it is.
    cut: CancellationToken,
    overflow: Arc<Semaphore>,
    /// UDP mappings that may still be opened: as many in all as connections.
    mappings: Arc<Semaphore>,
}

/// Serves `listeners` on the current local runtime until `drain` is cancelled and the connections open then have ended;
/// a caller that will not wait for them drops the future, which cuts them: none is left to look whole that is not. The
/// listeners stay bound, and answer that the run is ending, until that runtime is dropped.
///
/// # Errors
/// When the operating system does not let a listener be polled.
pub async fn serve(
    listeners: Vec<std::net::TcpListener>,
    node: Node,
    config: Config,
    stats: Arc<Stats>,
    drain: CancellationToken,
) -> io::Result<()> {
    let mut bound = Vec::with_capacity(listeners.len());
    let mut addresses = Vec::with_capacity(listeners.len());
    for listener in listeners {
        listener.set_nonblocking(true)?;
        addresses.push(listener.local_addr()?);
        bound.push(TcpListener::from_std(listener)?);
    }
    let overflow = Arc::new(Semaphore::new(OVERFLOW));
    let mappings = Arc::new(Semaphore::new(config.max_connections.min(Semaphore::MAX_PERMITS)));
    let own = RefCell::new(OwnListeners::new(addresses));
    let cut = CancellationToken::new();
    let _cut_at_the_end = cut.clone().drop_guard();
    let proxy = Rc::new(Proxy { node, config, stats, own, drain: drain.clone(), cut, overflow, mappings });
    let open = TaskTracker::new();
    for listener in bound {
        tokio::task::spawn_local(accept(Rc::clone(&proxy), listener, open.clone()));
    }
    drain.cancelled().await;
    open.close();
    open.wait().await;
    Ok(())
}

/// Takes connections for as long as the runtime lives.
async fn accept(proxy: Rc<Proxy>, listener: TcpListener, open: TaskTracker) {
    let mut number = 0_u64;
    loop {
        let (client, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        number += 1;
        let span = tracing::debug_span!("conn", port = peer.port(), number);
        let Some(refusal) = proxy.refusal(open.len()) else {
            open.spawn_local(counted(Rc::clone(&proxy), client, peer).instrument(span));
            continue;
        };
        // The semaphore is never closed; a failure would mean the same as a permit.
        let permit = Arc::clone(&proxy.overflow).acquire_owned().await.ok();
        let proxy = Rc::clone(&proxy);
        let refused = async move {
            let _permit = permit;
            let limit = OVERFLOW_TIMEOUT.min(proxy.config.head_timeout);
            let _ = timeout(limit, connection(proxy, client, peer, Some(refusal))).await;
        };
        tokio::task::spawn_local(refused.instrument(span));
    }
}

/// One connection that counts, until it ends or is cut.
async fn counted(proxy: Rc<Proxy>, client: TcpStream, peer: SocketAddr) {
    struct Open(Arc<Stats>);
    impl Drop for Open {
        fn drop(&mut self) {
            self.0.connection_closed();
        }
    }
    let open = Open(Arc::clone(&proxy.stats));
    open.0.connection_opened();
    tokio::select! {
        biased;
        () = connection(Rc::clone(&proxy), client, peer, None) => {}
        () = proxy.cut.cancelled() => tracing::debug!("cut"),
    }
}

/// One connection. With a `refusal`, whatever it asks is answered so.
async fn connection(proxy: Rc<Proxy>, client: TcpStream, peer: SocketAddr, refusal: Option<&'static Row>) {
    // Apart, so that nothing of it is left in memory while bytes are carried, which may be for hours.
    let opened = Box::pin(negotiation(&proxy, client, peer, refusal)).await;
    if let Some(opened) = opened {
        opened.carry(&proxy.stats).await;
    }
}

/// A connection until it is a tunnel, if it becomes one: its first byte tells what it speaks.
async fn negotiation(
    proxy: &Rc<Proxy>,
    client: TcpStream,
    peer: SocketAddr,
    refusal: Option<&'static Row>,
) -> Option<Opened> {
    // A reply that waits for more bytes costs a round trip of the client's delayed acknowledgement.
    let _ = client.set_nodelay(true);
    let first = first_byte(proxy, &client, refusal).await?;
    let protocol = match first {
        5 => Protocol::Socks5,
        4 => Protocol::Socks4,
        byte if byte.is_ascii_alphabetic() => Protocol::Http,
        _ => Protocol::Unknown,
    };
    proxy.stats.protocol_known(protocol);
    match protocol {
        Protocol::Socks5 => return socks::serve(proxy, client, refusal).await,
        Protocol::Http => return http::serve(proxy, client, peer, refusal).await,
        Protocol::Socks4 => socks::refuse_version_4(proxy, client).await,
        Protocol::Unknown => http::refuse_unknown(proxy, client, peer, first).await,
    }
    None
}

/// The first byte, left in the socket; `None` when there is nobody to answer: the client closed or said nothing at
/// all, so that no protocol is known to tell it in. Browsers open spare connections that they never use.
async fn first_byte(proxy: &Proxy, client: &TcpStream, refusal: Option<&'static Row>) -> Option<u8> {
    let mut first = [0];
    let peeked = timeout(proxy.config.head_timeout, client.peek(&mut first));
    let peeked = if refusal.is_some() {
        peeked.await
    } else {
        tokio::select! {
            biased;
            peeked = peeked => peeked,
            () = proxy.drain.cancelled() => return None,
        }
    };
    match peeked {
        Ok(Ok(1..)) => Some(first[0]),
        Ok(Ok(0) | Err(_)) | Err(_) => {
            proxy.stats.protocol_known(Protocol::Unknown);
            None
        }
    }
}

impl Proxy {
    /// Why a connection that comes now is not served, when `open` are.
    fn refusal(&self, open: usize) -> Option<&'static Row> {
        if self.drain.is_cancelled() {
            return Some(&fault::DRAINING);
        }
        (open >= self.config.max_connections).then_some(&fault::TOO_MANY_CONNECTIONS)
    }

    /// Reaches `target`, unless it is ourselves or the connection is one to refuse, or the run ends meanwhile.
    async fn dial(&self, target: &Target, refusal: Option<&'static Row>) -> Result<Stream, Fault> {
        if let Some(row) = refusal {
            return Err(self.limit_fault(row));
        }
        if self.own.borrow().contains(target) {
            return Err(Fault { row: &fault::LOOP, detail: format!("{target} is this proxy itself") });
        }
        tokio::select! {
            biased;
            () = self.drain.cancelled() => Err(self.limit_fault(&fault::DRAINING)),
            dialled = self.node.dial(target) => dialled.map_err(|error| Fault::from(&error)),
        }
    }

    fn limit_fault(&self, row: &'static Row) -> Fault {
        let detail = match row.code {
            code if code == fault::TOO_MANY_CONNECTIONS.code => {
                format!("{} connections are open, the most allowed", self.config.max_connections)
            }
            _ => row.cause.to_owned(),
        };
        Fault { row, detail }
    }

    /// Keeps a failure for those who ask later.
    fn note(&self, fault: &Fault, target: Option<&Target>) {
        let code = fault.row.code;
        match target {
            Some(target) => tracing::debug!(code, %target, detail = fault.detail, "refused"),
            None => tracing::debug!(code, detail = fault.detail, "refused"),
        }
        let asked = target.map(|target| (target.host.to_string(), target.port));
        self.stats.failed(fault, asked);
    }
}

#[cfg(test)]
mod tests;
