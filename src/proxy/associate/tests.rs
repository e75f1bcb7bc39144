//! Associations of a proxy on loopback.

use std::net::Ipv4Addr;

use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use super::*;
use crate::node::Host;
use crate::proxy::bed::{self, Bed, expect_bytes};
use crate::proxy::{Config, Credentials};

/// A target that sends every datagram back.
async fn echo() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::task::spawn_local(async move {
        let mut buffer = vec![0; LONGEST];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
            socket.send_to(&buffer[..length], from).await.unwrap();
        }
    });
    address
}

/// A client's two ends: the connection, and the socket with the address that it is to send to.
struct Client {
    connection: TcpStream,
    socket: UdpSocket,
    relay: SocketAddr,
}

impl Client {
    /// Asks for an association; `port` is what it announces.
    async fn new(bed: &Bed, socket: UdpSocket, port: u16) -> Self {
        let mut connection = bed.connect().await;
        let request = [&[5, 1, 0, 5, 3, 0, 1, 0, 0, 0, 0][..], &port.to_be_bytes()].concat();
        connection.write_all(&request).await.unwrap();
        expect_bytes(&mut connection, &[5, 0, 5, 0, 0, 1, 127, 0, 0, 1]).await;
        let relay = (Ipv4Addr::LOCALHOST, connection.read_u16().await.unwrap()).into();
        Self { connection, socket, relay }
    }

    async fn send(&self, target: &[u8], port: u16, payload: &[u8]) {
        let datagram = [&[0, 0, 0], target, &port.to_be_bytes(), payload].concat();
        self.socket.send_to(&datagram, self.relay).await.unwrap();
    }

    async fn send_to(&self, target: SocketAddr, payload: &[u8]) {
        self.send(&[1, 127, 0, 0, 1], target.port(), payload).await;
    }

    async fn expect(&self, source: SocketAddr, payload: &[u8]) {
        let mut datagram = vec![0; LONGEST];
        let length = timeout(Duration::from_secs(10), self.socket.recv(&mut datagram)).await.unwrap().unwrap();
        let (target, read) = envelope::open(&datagram[..length]).unwrap();
        assert_eq!(target, Target { host: Host::Ip(source.ip()), port: source.port() });
        assert_eq!(read, payload);
    }

    /// Ends the association; its counters then.
    async fn end(mut self, bed: &Bed) -> Datagrams {
        self.connection.shutdown().await.unwrap();
        assert_eq!(self.connection.read(&mut [0]).await.unwrap(), 0);
        drop(self.connection);
        bed.until_closed().await;
        bed.stats.counters().datagrams
    }
}

async fn socket() -> UdpSocket {
    UdpSocket::bind("127.0.0.1:0").await.unwrap()
}

#[test]
fn datagrams_go_both_ways_and_are_counted() {
    bed::run(async {
        let (bed, echo) = (bed::start(Config::default()), echo().await);
        let client = Client::new(&bed, socket().await, 0).await;
        assert_eq!(bed.stats.counters().active, 1);
        client.send_to(echo, b"hello").await;
        client.expect(echo, b"hello").await;
        client.send_to(echo, b"").await;
        client.expect(echo, b"").await;
        let datagrams = client.end(&bed).await;
        assert_eq!(datagrams, Datagrams { sent: 2, received: 2, dropped: [].into() });
        let counters = bed.stats.counters();
        assert_eq!((counters.sent, counters.received, counters.succeeded, counters.active), (5, 5, 1, 0));
    });
}

#[test]
fn several_targets_are_told_apart_by_their_source() {
    bed::run(async {
        let (bed, one, two) = (bed::start(Config::default()), echo().await, echo().await);
        let client = Client::new(&bed, socket().await, 0).await;
        client.send_to(one, b"1").await;
        client.expect(one, b"1").await;
        client.send_to(two, b"2").await;
        client.expect(two, b"2").await;
    });
}

#[test]
fn mapped_addresses_and_addresses_in_name_fields_are_addresses() {
    bed::run(async {
        let (bed, echo) = (bed::start(Config::default()), echo().await);
        let client = Client::new(&bed, socket().await, 0).await;
        let mapped = [&[4][..], &Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets()].concat();
        for target in [&mapped[..], b"\x03\x09127.0.0.1"] {
            client.send(target, echo.port(), b"x").await;
            client.expect(echo, b"x").await;
        }
    });
}

#[test]
fn association_ends_with_its_connection() {
    bed::run(async {
        let (bed, echo) = (bed::start(Config::default()), echo().await);
        let Client { connection, socket, relay } = Client::new(&bed, socket().await, 0).await;
        drop(connection);
        bed.until_closed().await;
        // Nobody is there: the kernel says so to whoever sends.
        socket.connect(relay).await.unwrap();
        let datagram = [&[0, 0, 0, 1, 127, 0, 0, 1], &echo.port().to_be_bytes()[..]].concat();
        socket.send(&datagram).await.unwrap();
        let error = socket.recv(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    });
}

#[test]
fn association_outlives_what_is_sent_on_its_connection() {
    bed::run(async {
        let (bed, echo) = (bed::start(Config::default()), echo().await);
        let mut client = Client::new(&bed, socket().await, 0).await;
        client.connection.write_all(&[0; 10_000]).await.unwrap();
        bed::settle().await;
        client.send_to(echo, b"x").await;
        client.expect(echo, b"x").await;
    });
}

#[test]
fn drain_ends_associations_in_peace() {
    bed::run(async {
        let (bed, echo) = (bed::start(Config::default()), echo().await);
        let mut client = Client::new(&bed, socket().await, 0).await;
        client.send_to(echo, b"x").await;
        client.expect(echo, b"x").await;
        bed.drain.cancel();
        assert_eq!(client.connection.read(&mut [0]).await.unwrap(), 0);
        drop(client);
        bed.served.await.unwrap().unwrap();
    });
}

#[test]
fn only_the_client_is_heard() {
    bed::run(async {
        let (bed, echo) = (bed::start(Config::default()), echo().await);
        let stranger = socket().await;
        let own = socket().await;
        let client = Client::new(&bed, own, 0).await;
        client.send_to(echo, b"mine").await;
        client.expect(echo, b"mine").await;
        let datagram = [&[0, 0, 0, 1, 127, 0, 0, 1], &echo.port().to_be_bytes()[..], b"foreign"].concat();
        stranger.send_to(&datagram, client.relay).await.unwrap();
        let elsewhere = UdpSocket::bind("127.0.0.2:0").await.unwrap();
        elsewhere.send_to(&datagram, client.relay).await.unwrap();
        bed::settle().await;
        client.send_to(echo, b"mine again").await;
        client.expect(echo, b"mine again").await;
        let datagrams = client.end(&bed).await;
        assert_eq!(datagrams, Datagrams { sent: 2, received: 2, dropped: [(Dropped::Foreign, 2)].into() });
    });
}

#[test]
fn announced_port_is_the_only_one() {
    bed::run(async {
        let (bed, echo) = (bed::start(Config::default()), echo().await);
        let own = socket().await;
        let port = own.local_addr().unwrap().port();
        let client = Client::new(&bed, own, port).await;
        let datagram = [&[0, 0, 0, 1, 127, 0, 0, 1], &echo.port().to_be_bytes()[..], b"foreign"].concat();
        socket().await.send_to(&datagram, client.relay).await.unwrap();
        bed::settle().await;
        client.send_to(echo, b"mine").await;
        client.expect(echo, b"mine").await;
        assert_eq!(client.end(&bed).await.dropped, [(Dropped::Foreign, 1)].into());
    });
}

#[test]
fn what_cannot_be_read_is_dropped_and_binds_nobody() {
    bed::run(async {
        let (bed, echo) = (bed::start(Config::default()), echo().await);
        let client = Client::new(&bed, socket().await, 0).await;
        socket().await.send_to(b"", client.relay).await.unwrap();
        socket().await.send_to(b"\0\0\0\x09abcdefgh", client.relay).await.unwrap();
        socket().await.send_to(b"\0\0\x01\x01\x7f\0\0\x01\0\x07part", client.relay).await.unwrap();
        bed::settle().await;
        client.send_to(echo, b"mine").await;
        client.expect(echo, b"mine").await;
        let dropped = [(Dropped::Malformed, 2), (Dropped::Fragment, 1)].into();
        assert_eq!(client.end(&bed).await, Datagrams { sent: 1, received: 1, dropped });
    });
}

#[test]
fn refused_targets_are_noted_once_and_counted_always() {
    bed::run(async {
        let bed = bed::start(Config::default());
        let client = Client::new(&bed, socket().await, 0).await;
        for _ in 0..10 {
            client.send(&[1, 192, 0, 2, 9], 443, b"Initial").await;
            bed::settle().await;
        }
        client.send(b"\x03\x0bexample.com", 443, b"Initial").await;
        bed::settle().await;
        for target in [&[1, 127, 0, 0, 1][..], b"\x03\x09localhost", &[1, 0, 0, 0, 0]] {
            client.send(target, bed.address.port(), b"to the proxy").await;
            client.send(target, client.relay.port(), b"to the association").await;
        }
        bed::settle().await;
        let (mut codes, lost) = (bed.codes(), client.end(&bed).await);
        codes.sort_unstable();
        let expected = [&[fault::PUBLIC.code; 2][..], &[fault::LOOP.code; 6]].concat();
        assert_eq!(codes, expected);
        assert_eq!((lost.received, lost.dropped[&Dropped::Unsent(Lost::Refused)]), (0, 17));
        let refused = &bed.stats.counters().refused[&fault::PUBLIC.code];
        assert!(refused.destinations.contains_key("192.0.2.9:443"), "{refused:?}");
    });
}

#[test]
fn association_over_the_limit_is_refused() {
    bed::run(async {
        let bed = bed::start(Config { max_connections: 1, ..Config::default() });
        let client = Client::new(&bed, socket().await, 0).await;
        let answer = bed.ask(&[5, 1, 0, 5, 3, 0, 1, 0, 0, 0, 0, 0, 0]).await;
        assert_eq!(answer, [5, 0, 5, 1, 0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bed.codes(), [fault::TOO_MANY_CONNECTIONS.code]);
        client.end(&bed).await;
    });
}

#[test]
fn association_needs_the_credentials() {
    bed::run(async {
        let credentials = Some(Credentials::new("user", "secret"));
        let bed = bed::start(Config { credentials, ..Config::default() });
        assert_eq!(bed.ask(&[5, 1, 0, 5, 3, 0, 1, 0, 0, 0, 0, 0, 0]).await, [5, 0xff]);
    });
}
