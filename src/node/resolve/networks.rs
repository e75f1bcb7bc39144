//! The two networks on which resolvers are asked: the tunnel, and the underlay for those that the tailnet names by a
//! public address.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::super::bridge::{Datagrams, Tunnel};
use super::super::dial::is_public;
use crate::netmap::{Netmap, is_internet};
use crate::transport::places::Places;
use crate::transport::race::race;
use crate::transport::underlay::{BoxIo, Underlay, connect_udp};

/// The longest that a connection to a resolver may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// The pause before the next address of a resolver is tried beside the last one. Source: RFC 8305, 5 (250 ms).
const NEXT_ADDRESS: Duration = Duration::from_millis(250);

/// The longest datagram that is read of an answer: more than we ask for.
const DATAGRAM_MAX: usize = 4096;

/// The network on which a resolver is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Network {
    /// The tailnet: a peer routes its address.
    Tunnel,
    /// The public internet: its address is public, and the tailnet names it.
    Underlay,
}

impl Network {
    /// The network on which a resolver at `ip` may be asked. A private address that no peer routes belongs to whoever
    /// owns the network that this machine is in: nothing in the tailnet is there, so nobody is asked. Nor is anybody
    /// where an exit node was asked for and is gone: public names are its secret.
    pub(super) fn to(netmap: &Netmap, ip: IpAddr) -> Option<Self> {
        let ip = ip.to_canonical();
        if netmap.route(ip).is_some() {
            return Some(Self::Tunnel);
        }
        (!netmap.exit_wanted && is_public(netmap, ip) && is_internet(ip)).then_some(Self::Underlay)
    }
}

/// Both networks.
pub(super) struct Networks {
    pub(super) tunnel: Tunnel,
    underlay: Underlay,
    /// The trusted roots, with HTTP/2 offered.
    pub(super) tls: Arc<ClientConfig>,
}

impl Networks {
    pub(super) fn new(tunnel: Tunnel, underlay: Underlay) -> Self {
        let mut tls = ClientConfig::clone(&underlay.tls.trusted());
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Self { tunnel, underlay, tls: Arc::new(tls) }
    }

    /// Opens a flow to `server` alone: what others send does not arrive.
    pub(super) async fn open_udp(&self, network: Network, server: SocketAddr) -> io::Result<Flow> {
        match network {
            Network::Tunnel => self.tunnel.open_udp(server).await.map(Flow::Tunnel),
            Network::Underlay => connect_udp(server).map(Flow::Underlay),
        }
    }

    /// Connects to a resolver as its datagrams go: on the underlay never by the corporate proxy, which is for HTTPS.
    pub(super) async fn connect_server(&self, network: Network, server: SocketAddr) -> io::Result<BoxIo> {
        Ok(match network {
            Network::Tunnel => Box::new(self.tunnel.connect(server, CONNECT_LIMIT).await?),
            Network::Underlay => Box::new(timeout(CONNECT_LIMIT, TcpStream::connect(server)).await??),
        })
    }

    /// Connects to a host at one of its addresses, whichever answers first.
    pub(super) async fn connect(
        &self,
        network: Network,
        host: &str,
        addresses: &[IpAddr],
        port: u16,
    ) -> io::Result<BoxIo> {
        match network {
            Network::Tunnel => {
                let attempt = |ip: &IpAddr| self.tunnel.connect(SocketAddr::new(*ip, port), CONNECT_LIMIT);
                let connected = race(addresses.iter().map(attempt), NEXT_ADDRESS).await;
                let none = || io::Error::new(io::ErrorKind::NotFound, "no address is known");
                let io = connected.map_err(|failures| failures.into_iter().next().unwrap_or_else(none))?;
                Ok(Box::new(io))
            }
            Network::Underlay => {
                let connected =
                    timeout(CONNECT_LIMIT, self.underlay.connect_known(host, &Places::at(addresses), port)).await;
                connected.map_err(|_| io::ErrorKind::TimedOut)?.map_err(io::Error::other)
            }
        }
    }
}

/// Where datagrams to one resolver go.
pub(super) enum Flow {
    Tunnel(Datagrams),
    Underlay(UdpSocket),
}

impl Flow {
    pub(super) async fn send(&self, octets: &[u8]) -> io::Result<()> {
        match self {
            Self::Tunnel(flow) => flow.send(octets.to_vec()).await,
            Self::Underlay(socket) => socket.send(octets).await.map(drop),
        }
    }

    pub(super) async fn recv(&mut self) -> io::Result<Vec<u8>> {
        match self {
            Self::Tunnel(flow) => flow.recv().await,
            Self::Underlay(socket) => {
                let mut octets = Vec::with_capacity(DATAGRAM_MAX);
                socket.recv_buf(&mut octets).await?;
                Ok(octets)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use serde_json::json;

    use super::*;
    use crate::netmap::session::Session;

    #[test]
    fn only_public_addresses_are_asked_outside_the_tailnet() {
        let message = json!({
            "Node": {"ID": 1, "Name": "me.tb.example.", "Key": format!("nodekey:{}01", "00".repeat(31)),
                     "Addresses": ["100.64.0.1/32"]},
            "Peers": [{"ID": 2, "Name": "r.tb.example.", "Key": format!("nodekey:{}02", "00".repeat(31)), "HomeDERP": 1,
                       "Addresses": ["100.64.0.2/32"],
                       "AllowedIPs": ["100.64.0.2/32", "10.20.0.0/16", "8.8.8.0/24"]}],
        });
        let message = serde_json::from_value(message).unwrap();
        let netmap = Session::new(true).apply(message, Timestamp::UNIX_EPOCH).unwrap().netmap.unwrap();
        let network = |ip: &str| Network::to(&netmap, ip.parse().unwrap());
        for ip in ["10.20.0.53", "100.64.0.2", "8.8.8.8", "::ffff:10.20.0.53"] {
            assert_eq!(network(ip), Some(Network::Tunnel), "{ip}");
        }
        for ip in ["9.9.9.9", "2620:fe::fe", "::ffff:9.9.9.9", "192.0.1.1", "172.32.0.1"] {
            assert_eq!(network(ip), Some(Network::Underlay), "{ip}");
        }
        for ip in [
            "10.21.0.53",
            "192.168.1.1",
            "172.16.0.1",
            "127.0.0.1",
            "0.0.0.0",
            "169.254.1.1",
            "100.64.0.9",
            "100.100.100.100",
            "100.127.0.1",
            "198.18.0.1",
            "224.0.0.251",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fd00::53",
            "ff02::fb",
            "fd7a:115c:a1e0::53",
            "64:ff9b::a00:1",
            "2002:a00:1::1",
            "2001:0:1::1",
            "::ffff:10.0.0.1",
        ] {
            assert_eq!(network(ip), None, "{ip}");
        }
    }

    #[test]
    fn nobody_is_asked_outside_while_an_exit_node_that_was_asked_for_is_gone() {
        let node = |id: u8, routes: &[&str]| {
            json!({"ID": id, "Name": format!("n{id}.tb.example."), "Key": format!("nodekey:{}{id:02x}", "00".repeat(31)),
                   "HomeDERP": 1, "Addresses": [format!("100.64.0.{id}/32")], "AllowedIPs": routes})
        };
        let mut session = Session::new(true).with_exit_node("n2".to_owned());
        let mut netmap = |peers: &[serde_json::Value]| {
            session.restart();
            let message = serde_json::from_value(json!({"Node": node(1, &[]), "Peers": peers})).unwrap();
            session.apply(message, Timestamp::UNIX_EPOCH).unwrap().netmap.unwrap()
        };
        let there = netmap(&[node(2, &["100.64.0.2/32", "0.0.0.0/0", "::/0"])]);
        let gone = netmap(&[]);
        for ip in ["9.9.9.9", "2620:fe::fe"] {
            let network = |netmap: &Netmap| Network::to(netmap, ip.parse().unwrap());
            assert_eq!((network(&there), network(&gone)), (Some(Network::Tunnel), None), "{ip}");
        }
    }
}
