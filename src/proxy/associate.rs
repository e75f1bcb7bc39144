//! SOCKS5 UDP ASSOCIATE: datagrams of one client, for as long as the connection lives that asked for it.
//!
//! They are taken at a socket of their own, on the address that the client's connection came to, and from its client
//! alone: from the address of the connection, and from the one port that it has announced, or was the first to use. The
//! reply comes at once, since there is no target yet to answer; datagrams that come before the node has joined are held
//! as connections are. The association ends with the connection, and with the run.
//! Source: RFC 1928, 4, 6 and 7.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::Instant;

use super::access::OwnListeners;
use super::socket::ended;
use super::socks::{reply, reply_bound};
use super::splice::farewell;
use super::stats::{Datagrams, Dropped};
use super::{Proxy, envelope};
use crate::fault::{self, Fault};
use crate::node::client::keep_asking;
use crate::node::datagrams::Event;
use crate::node::{Association, DatagramError, Lost, Target};

/// The longest datagram that IP carries.
const LONGEST: usize = 65_535;

/// How often an association's datagrams are added to the counters, whose lock is not for every packet.
const COUNT_EVERY: Duration = Duration::from_secs(1);

/// Serves an association until its connection, or the run, ends. `announced` is the port that the client says its
/// datagrams will come from, or 0.
pub(super) async fn serve(proxy: &Proxy, mut client: TcpStream, announced: u16) {
    let bound = match bind(&client).await {
        Ok(bound) => bound,
        Err(error) => {
            let fault = Fault::new(&fault::OS_REFUSED, format!("cannot open a socket for an association: {error}"));
            proxy.note(&fault, None);
            if client.write_all(&reply(fault.row.socks)).await.is_ok() {
                farewell(client).await;
            }
            return;
        }
    };
    let (socket, address, from) = bound;
    let _own = Own::new(&proxy.own, address);
    let client_address = (announced != 0).then(|| SocketAddr::new(from.ip(), announced));
    let mut relay = Relay {
        proxy,
        socket,
        from,
        client: client_address,
        association: proxy.node.associate(Arc::clone(&proxy.mappings)),
        sealed: Vec::new(),
        counted: Counted::default(),
    };
    if client.write_all(&reply_bound(address)).await.is_err() {
        return;
    }
    tracing::debug!("association opened");
    relay.carry(&client).await;
    // The sockets close before the last words, so that nothing is carried any more when they are heard.
    drop(relay);
    farewell(client).await;
}

/// A socket on the address that `client` came to, its address, and where the client's datagrams come from, whatever
/// their port.
async fn bind(client: &TcpStream) -> io::Result<(UdpSocket, SocketAddr, SocketAddr)> {
    // A client that is no longer there is noticed, since nothing else ends its association.
    keep_asking(client);
    let (mut local, mut peer) = (client.local_addr()?, client.peer_addr()?);
    // Of `::ffff:127.0.0.1` and its like, at a socket for both families.
    local.set_ip(local.ip().to_canonical());
    peer.set_ip(peer.ip().to_canonical());
    local.set_port(0);
    let socket = UdpSocket::bind(local).await?;
    let address = socket.local_addr()?;
    Ok((socket, address, peer))
}

/// An address that is ours for as long as this lives: a datagram to it would come back.
struct Own<'p> {
    own: &'p RefCell<OwnListeners>,
    address: SocketAddr,
}

impl<'p> Own<'p> {
    fn new(own: &'p RefCell<OwnListeners>, address: SocketAddr) -> Self {
        own.borrow_mut().insert(address);
        Self { own, address }
    }
}

impl Drop for Own<'_> {
    fn drop(&mut self) {
        self.own.borrow_mut().remove(self.address);
    }
}

/// What an association has carried.
#[derive(Debug, Default)]
struct Counted {
    /// All of it, but for what follows.
    total: Datagrams,
    /// What is not yet added to the counters.
    datagrams: Datagrams,
    sent: u64,
    received: u64,
    /// When something was last added.
    at: Option<Instant>,
    answered: bool,
}

/// An association at work.
struct Relay<'p> {
    proxy: &'p Proxy,
    socket: UdpSocket,
    /// The other end of the client's connection.
    from: SocketAddr,
    /// Where the client's datagrams come from, once known.
    client: Option<SocketAddr>,
    association: Association,
    /// Holds one datagram to the client at a time.
    sealed: Vec<u8>,
    counted: Counted,
}

impl Relay<'_> {
    /// Carries datagrams until the client's connection or the run ends.
    async fn carry(&mut self, connection: &TcpStream) {
        let mut buffer = vec![0; LONGEST];
        loop {
            tokio::select! {
                () = ended(connection) => return,
                () = self.proxy.drain.cancelled() => return,
                taken = self.socket.recv_from(&mut buffer) => match taken {
                    Ok((length, from)) => {
                        if let Err(reason) = self.outward(from, &buffer[..length]) {
                            *self.counted.datagrams.dropped.entry(reason).or_default() += 1;
                        }
                    }
                    Err(error) => {
                        tracing::debug!(%error, "socket of an association failed");
                        return;
                    }
                },
                event = self.association.next() => self.inward(event),
            }
            self.count();
        }
    }

    /// Sends on a datagram of the client's.
    fn outward(&mut self, from: SocketAddr, datagram: &[u8]) -> Result<(), Dropped> {
        let known = self.client.is_none_or(|client| client.port() == from.port());
        if !known || from.ip().to_canonical() != self.from.ip() {
            return Err(Dropped::Foreign);
        }
        let (target, payload) = envelope::open(datagram)?;
        self.client = Some(from);
        if !self.association.knows(&target) && self.proxy.own.borrow().contains(&target) {
            self.proxy.note(&Fault::new(&fault::LOOP, format!("{target} is this proxy itself")), Some(&target));
            self.association.refuse(target);
            return Err(Dropped::Unsent(Lost::Refused));
        }
        self.association.send(&target, payload).map_err(Dropped::Unsent)?;
        self.counted.datagrams.sent += 1;
        self.counted.sent += payload.len() as u64;
        Ok(())
    }

    /// Gives the client what came for it, or notes what failed.
    fn inward(&mut self, event: Event) {
        let (source, octets) = match event {
            Event::Received { source, octets } => (source, octets),
            Event::Lost(lost) => {
                for (reason, count) in lost {
                    *self.counted.datagrams.dropped.entry(Dropped::Unsent(reason)).or_default() += count;
                }
                return;
            }
            Event::Failed { target, error, lost, told } => {
                *self.counted.datagrams.dropped.entry(Dropped::Unsent(Lost::Refused)).or_default() += lost as u64;
                if !told {
                    self.failed(&target, &error);
                }
                return;
            }
        };
        // Nothing is received before something was sent, so the client is known.
        let Some(client) = self.client else { return };
        envelope::seal(source, &octets, &mut self.sealed);
        if self.socket.try_send_to(&self.sealed, client).is_err() {
            *self.counted.datagrams.dropped.entry(Dropped::Undelivered).or_default() += 1;
            return;
        }
        if !self.counted.answered {
            self.counted.answered = true;
            self.proxy.stats.target_answered();
        }
        self.counted.datagrams.received += 1;
        self.counted.received += octets.len() as u64;
    }

    fn failed(&self, target: &Target, error: &DatagramError) {
        let fault = match error {
            DatagramError::Dial(error) => Fault::from(error),
            DatagramError::Mappings => {
                let limit = self.proxy.config.max_connections;
                Fault::new(&fault::TOO_MANY_CONNECTIONS, format!("{limit} UDP mappings are open, the most allowed"))
            }
        };
        self.proxy.note(&fault, Some(target));
    }

    /// Adds to the counters what has been carried, now and then.
    fn count(&mut self) {
        if self.counted.at.is_none_or(|at| at.elapsed() >= COUNT_EVERY) {
            self.add_up();
        }
    }

    fn add_up(&mut self) {
        let counted = &mut self.counted;
        let datagrams = std::mem::take(&mut counted.datagrams);
        self.proxy.stats.datagrams_carried(&datagrams);
        self.proxy.stats.bytes_carried(std::mem::take(&mut counted.sent), std::mem::take(&mut counted.received));
        counted.total.add(&datagrams);
        counted.at = Some(Instant::now());
    }
}

impl Drop for Relay<'_> {
    fn drop(&mut self) {
        self.add_up();
        let Datagrams { sent, received, dropped } = &self.counted.total;
        tracing::debug!(mappings = self.association.mappings(), sent, received, ?dropped, "association closed");
    }
}

#[cfg(test)]
mod tests;
