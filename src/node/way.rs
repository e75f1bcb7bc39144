//! The way of a mapping's datagrams: a flow inside the tunnel, or a socket for one address outside.

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use rustix::io::Errno;
use rustix::net::SendFlags;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tracing::debug;

use super::Inner;
use super::core::Shared;
use super::datagrams::Lost;
use super::dial::{self, DialError, DirectError, Place, Target};
use super::tunnel::flow::{TunnelDatagrams, Unsent};
use crate::netmap::{Netmap, NodeId, RouteKind};
use crate::transport::underlay::connect_udp;

/// The longest datagram that IP carries.
const LONGEST: usize = 65_535;

thread_local! {
    /// Takes one datagram from outside at a time, for all mappings of the data thread: a datagram's length is known
    /// only when it is there, and 64 KiB for each mapping would be most of what it costs.
    static ARRIVING: RefCell<Box<[u8]>> = RefCell::new(vec![0; LONGEST].into());
}

/// Where datagrams to `target` go, by the rules of a dial, and once the node is in as for a dial.
pub(super) async fn locate(node: &Inner, target: &Target) -> Result<Remote, DialError> {
    let netmap = dial::joined(node).await?;
    let deadline = std::time::Instant::now() + node.config.dial_timeout;
    let best = "a place has at least one address";
    Ok(match dial::locate(node, netmap, target, deadline).await? {
        Place::Tunnel(_, addresses) => {
            Remote::Tunnel(SocketAddr::new(addresses.into_iter().next().expect(best), target.port))
        }
        Place::Outside(addresses) => Remote::Outside(addresses.into_iter().next().expect(best)),
    })
}

/// Where a mapping leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Remote {
    /// Through the tunnel.
    Tunnel(SocketAddr),
    /// Outside the tailnet, as `--direct-allow` permits.
    Outside(SocketAddr),
}

impl Remote {
    pub(super) fn address(self) -> SocketAddr {
        match self {
            Self::Tunnel(address) | Self::Outside(address) => address,
        }
    }
}

/// How packets to an address travel: what makes a flow to it the right one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NextHop {
    /// Where they leave from.
    source: IpAddr,
    /// Who gets them.
    peer: NodeId,
    /// As what.
    kind: RouteKind,
}

impl NextHop {
    /// The next hop to `ip`; `None` where no route covers it, or where we have no address of its family.
    pub(super) fn to(netmap: &Netmap, ip: IpAddr) -> Option<Self> {
        let route = netmap.route(ip)?;
        Some(Self { source: netmap.source_for(ip)?, peer: route.peer.id, kind: route.kind })
    }
}

/// What carries a mapping's datagrams.
#[derive(Clone)]
pub(super) enum Way {
    Tunnel(TunnelDatagrams),
    /// A connected socket: the kernel lets nobody else's datagrams in.
    Outside(Rc<UdpSocket>),
}

impl Way {
    /// Opens the way to `remote`.
    pub(super) fn open(core: &Shared, remote: Remote) -> Result<Self, DialError> {
        match remote {
            Remote::Tunnel(address) => {
                TunnelDatagrams::open(core, address).map(Self::Tunnel).map_err(|why| dial::unopened(why, address))
            }
            Remote::Outside(address) => match connect_udp(address) {
                Ok(socket) => Ok(Self::Outside(Rc::new(socket))),
                Err(error) => Err(DirectError::Failed { address, detail: error.to_string() }.into()),
            },
        }
    }

    pub(super) fn send(&self, octets: &[u8]) -> Result<(), Lost> {
        match self {
            Self::Tunnel(flow) => flow.send(octets).map_err(|unsent| match unsent {
                Unsent::TooLong => Lost::TooLong,
                Unsent::NoRoom => Lost::Full,
            }),
            Self::Outside(socket) => send_outside(socket, octets),
        }
    }
}

/// Past the runtime, which calls a new socket unready until it has looked at it once.
fn send_outside(socket: &UdpSocket, octets: &[u8]) -> Result<(), Lost> {
    let send = || rustix::net::send(socket, octets, SendFlags::empty());
    // What an earlier datagram met is told to a later one, which has not been sent then.
    let sent = send().or_else(|error| if error == Errno::CONNREFUSED { send() } else { Err(error) });
    match sent {
        Ok(_) => Ok(()),
        Err(Errno::MSGSIZE) => Err(Lost::TooLong),
        Err(_) => Err(Lost::Full),
    }
}

/// The next datagram from outside.
async fn recv_outside(socket: &UdpSocket) -> io::Result<Vec<u8>> {
    loop {
        socket.readable().await?;
        let received = ARRIVING.with_borrow_mut(|buffer| {
            let length = socket.try_recv(buffer)?;
            Ok(buffer[..length].to_vec())
        });
        match received {
            Err(error) if io::Error::kind(&error) == io::ErrorKind::WouldBlock => {}
            received => return received,
        }
    }
}

/// Passes on what comes by `way`, until it fails or nobody wants it.
pub(super) async fn receive(way: Way, remote: Remote, arriving: mpsc::Sender<(Remote, Vec<u8>)>) {
    loop {
        let received = match &way {
            Way::Tunnel(flow) => flow.recv().await,
            Way::Outside(socket) => recv_outside(socket).await,
        };
        match received {
            Ok(octets) => {
                if arriving.send((remote, octets)).await.is_err() {
                    return;
                }
            }
            // Nobody listens there now. The error is told once for each datagram of ours, so this cannot spin.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => {
                debug!(%error, "mapping failed");
                return;
            }
        }
    }
}
