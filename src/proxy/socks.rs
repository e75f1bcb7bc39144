//! SOCKS5 as a server: CONNECT and UDP ASSOCIATE, with user and password where they are asked for.
//!
//! The success reply is sent only after the target has answered. Bytes that a client sends ahead of the reply stay in
//! its socket, or, where they came in one segment with the request, go to the target first.
//! Source: RFC 1928; RFC 1929.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::envelope::{DOMAIN, IPV4, IPV6, host, write_address};
use super::socket::gone;
use super::splice::{Opened, Tunnel, farewell};
use super::{Proxy, associate};
use crate::fault::{self, Fault, Row};
use crate::lapse::Lapse;
use crate::node::{Host, Target};

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0x00;
const USER_AND_PASSWORD: u8 = 0x02;
const NO_ACCEPTABLE_METHOD: u8 = 0xff;
/// The version of the user and password negotiation. Source: RFC 1929, 2.
const NEGOTIATION: u8 = 1;
const CONNECT: u8 = 1;
const BIND: u8 = 2;
const UDP_ASSOCIATE: u8 = 3;

/// SOCKS4's "request rejected or failed". Source: SOCKS: A protocol for TCP proxy across firewalls, Ying-Da Lee.
const SOCKS4_REJECTED: [u8; 8] = [0, 91, 0, 0, 0, 0, 0, 0];

/// Why a negotiation ends without a target.
enum Refusal {
    /// The client went away, or a write failed: there is nobody to answer.
    Gone,
    /// These bytes say so, in the form that this step of the negotiation has.
    Answer(Vec<u8>, Fault),
}

/// What a client asks for.
enum Asked {
    /// A connection.
    Connect(Target),
    /// An association for datagrams, which will come from this port if it is not 0.
    Associate(u16),
}

/// One SOCKS5 connection, from its first byte until it is a tunnel.
pub(super) async fn serve(proxy: &Proxy, client: TcpStream, refusal: Option<&'static Row>) -> Option<Opened> {
    let mut dialogue = Dialogue { client, unread: Vec::new() };
    let negotiated = timeout(proxy.config.head_timeout, negotiate(proxy, &mut dialogue)).await.unwrap_or_else(|_| {
        let detail = format!("no whole SOCKS request within {}", Lapse(proxy.config.head_timeout));
        Err(refused(&fault::HEAD_TIMEOUT, detail))
    });
    let target = match negotiated {
        Ok(Asked::Connect(target)) => target,
        Ok(Asked::Associate(port)) => {
            match refusal {
                // Apart, as for few connections only.
                None => Box::pin(associate::serve(proxy, dialogue.client, port)).await,
                Some(row) => {
                    proxy.note(&proxy.limit_fault(row), None);
                    dialogue.end(&reply(row.socks)).await;
                }
            }
            return None;
        }
        Err(Refusal::Gone) => return None,
        Err(Refusal::Answer(bytes, fault)) => {
            proxy.note(&fault, None);
            dialogue.end(&bytes).await;
            return None;
        }
    };
    let dialled = tokio::select! {
        biased;
        dialled = proxy.dial(&target, refusal) => dialled,
        () = gone(&dialogue.client) => {
            tracing::debug!(%target, "client gone");
            return None;
        }
    };
    match dialled {
        Err(fault) => {
            proxy.note(&fault, Some(&target));
            dialogue.end(&reply(fault.row.socks)).await;
            None
        }
        Ok(stream) => {
            proxy.stats.target_answered();
            dialogue.client.write_all(&reply(0)).await.ok()?;
            let tunnel = Tunnel { target, stream, received: Bytes::new() };
            Some(Opened { tunnel, client: dialogue.client, early: dialogue.unread })
        }
    }
}

/// Tells a SOCKS4 client no, in its own words.
pub(super) async fn refuse_version_4(proxy: &Proxy, mut client: TcpStream) {
    proxy.note(&Fault { row: &fault::SOCKS4, detail: fault::SOCKS4.cause.to_owned() }, None);
    if client.write_all(&SOCKS4_REJECTED).await.is_ok() {
        farewell(client).await;
    }
}

/// A connection and what was read ahead of need.
struct Dialogue {
    client: TcpStream,
    unread: Vec<u8>,
}

impl Dialogue {
    /// The next `N` bytes.
    async fn take<const N: usize>(&mut self) -> Result<[u8; N], Refusal> {
        let bytes = self.take_vec(N).await?;
        Ok(bytes.try_into().expect("take_vec gives as many bytes as it was asked for"))
    }

    /// The next `length` bytes, at most 255 of them in this protocol.
    async fn take_vec(&mut self, length: usize) -> Result<Vec<u8>, Refusal> {
        while self.unread.len() < length {
            self.client.readable().await.map_err(|_| Refusal::Gone)?;
            match self.client.try_read_buf(&mut self.unread) {
                Ok(0) => return Err(refused(&fault::BAD_REQUEST, String::from("the SOCKS request ends too early"))),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return Err(Refusal::Gone),
            }
        }
        Ok(self.unread.drain(..length).collect())
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        self.client.write_all(bytes).await.map_err(|_| Refusal::Gone)
    }

    /// The last words.
    async fn end(mut self, bytes: &[u8]) {
        if self.client.write_all(bytes).await.is_ok() {
            farewell(self.client).await;
        }
    }
}

/// Everything up to the end of the request.
async fn negotiate(proxy: &Proxy, dialogue: &mut Dialogue) -> Result<Asked, Refusal> {
    choose_method(proxy, dialogue).await?;
    let [version, command, _reserved, address_type] = dialogue.take().await?;
    if version != VERSION {
        return Err(refused(&fault::BAD_REQUEST, format!("version {version} in a SOCKS5 request")));
    }
    match command {
        CONNECT | UDP_ASSOCIATE => {}
        BIND => return Err(refused(&fault::NOT_OFFERED, String::from("SOCKS5 BIND is not offered"))),
        _ => return Err(refused(&fault::NOT_OFFERED, format!("SOCKS5 has no command {command}"))),
    }
    let named = match address_type {
        IPV4 => Host::Ip(IpAddr::V4(Ipv4Addr::from(dialogue.take::<4>().await?))),
        // An IPv4 address in the clothes of IPv6 is routed, and permitted, as what it is.
        IPV6 => Host::Ip(Ipv6Addr::from(dialogue.take::<16>().await?).to_canonical()),
        DOMAIN => {
            let [length] = dialogue.take().await?;
            let malformed = || refused(&fault::BAD_REQUEST, String::from("the SOCKS5 domain name is not a host name"));
            host(&dialogue.take_vec(length.into()).await?).ok_or_else(malformed)?
        }
        _ => return Err(refused(&fault::BAD_ADDRESS_TYPE, format!("SOCKS5 has no address type {address_type}"))),
    };
    let port = u16::from_be_bytes(dialogue.take().await?);
    if command == UDP_ASSOCIATE {
        // The address is where the datagrams will come from, as the client believes: we know it from the connection.
        return Ok(Asked::Associate(port));
    }
    if port == 0 {
        return Err(refused(&fault::BAD_REQUEST, format!("{named} has no port 0")));
    }
    Ok(Asked::Connect(Target { host: named, port }))
}

/// Agrees on how the client shows who it is, and sees it do so.
async fn choose_method(proxy: &Proxy, dialogue: &mut Dialogue) -> Result<(), Refusal> {
    let [_version, count] = dialogue.take().await?;
    let offered = dialogue.take_vec(count.into()).await?;
    let wanted = if proxy.config.credentials.is_some() { USER_AND_PASSWORD } else { NO_AUTHENTICATION };
    if !offered.contains(&wanted) {
        let row = if wanted == USER_AND_PASSWORD { &fault::CREDENTIALS } else { &fault::BAD_REQUEST };
        let detail = format!("SOCKS5 method {wanted} is wanted, {offered:?} are offered");
        return Err(Refusal::Answer(vec![VERSION, NO_ACCEPTABLE_METHOD], Fault { row, detail }));
    }
    dialogue.write(&[VERSION, wanted]).await?;
    let Some(credentials) = &proxy.config.credentials else { return Ok(()) };

    let [negotiation, user_length] = dialogue.take().await?;
    let user = dialogue.take_vec(user_length.into()).await?;
    let [password_length] = dialogue.take().await?;
    let password = Zeroizing::new(dialogue.take_vec(password_length.into()).await?);
    if negotiation != NEGOTIATION || !credentials.admit(&user, &password) {
        let fault = Fault { row: &fault::CREDENTIALS, detail: String::from("SOCKS5 user or password is wrong") };
        return Err(Refusal::Answer(vec![NEGOTIATION, 1], fault));
    }
    dialogue.write(&[NEGOTIATION, 0]).await
}

fn refused(row: &'static Row, detail: String) -> Refusal {
    Refusal::Answer(reply(row.socks).to_vec(), Fault { row, detail })
}

/// A reply without a bound address: what is ours inside the tunnel is no client's concern.
pub(super) fn reply(code: u8) -> [u8; 10] {
    [VERSION, code, 0, IPV4, 0, 0, 0, 0, 0, 0]
}

/// The reply that says where a client's datagrams are taken.
pub(super) fn reply_bound(address: SocketAddr) -> Vec<u8> {
    let mut reply = vec![VERSION, 0, 0];
    write_address(address, &mut reply);
    reply
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::proxy::bed::{self, expect_bytes};
    use crate::proxy::{Config, Credentials};
    use crate::transport::bed::closed_port;

    const GREETING: [u8; 3] = [5, 1, 0];

    fn connect_to(address: SocketAddr) -> Vec<u8> {
        let IpAddr::V4(ip) = address.ip() else { panic!("targets of these tests are on 127.0.0.1") };
        [&[5, 1, 0, 1][..], &ip.octets(), &address.port().to_be_bytes()].concat()
    }

    fn whole(request: &[u8]) -> Vec<u8> {
        [&GREETING[..], request].concat()
    }

    /// What a request gets, greeting and its answer left out.
    async fn code(bed: &bed::Bed, request: &[u8]) -> Vec<u8> {
        let answer = bed.ask(&whole(request)).await;
        assert_eq!(&answer[..2], [5, 0]);
        answer[2..].to_vec()
    }

    #[test]
    fn connect_by_address_carries_bytes_both_ways_and_half_closes() {
        bed::run(async {
            let (bed, echo) = (bed::start(Config::default()), bed::echo().await);
            let mut client = bed.connect().await;
            client.write_all(&GREETING).await.unwrap();
            expect_bytes(&mut client, &[5, 0]).await;
            client.write_all(&connect_to(echo)).await.unwrap();
            expect_bytes(&mut client, &reply(0)).await;
            client.write_all(b"hello").await.unwrap();
            client.shutdown().await.unwrap();
            expect_bytes(&mut client, b"hello").await;
            assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
            drop(client);
            bed.drain.cancel();
            bed.served.await.unwrap().unwrap();
            let counters = bed.stats.counters();
            assert_eq!((counters.sent, counters.received, counters.succeeded, counters.active), (5, 5, 1, 0));
        });
    }

    #[test]
    fn early_bytes_reach_the_target() {
        bed::run(async {
            let (bed, echo) = (bed::start(Config::default()), bed::echo().await);
            let mut client = bed.connect().await;
            client.write_all(&[whole(&connect_to(echo)), b"early".to_vec()].concat()).await.unwrap();
            expect_bytes(&mut client, &[&[5, 0][..], &reply(0), b"early"].concat()).await;
        });
    }

    #[test]
    fn refusals_have_the_reply_of_their_row() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let domain = |name: &str, port: u16| {
                let length = u8::try_from(name.len()).unwrap();
                [&[5, 1, 0, 3, length][..], name.as_bytes(), &port.to_be_bytes()].concat()
            };
            for (what, request, expected) in [
                ("a public address", vec![5, 1, 0, 1, 8, 8, 8, 8, 0, 80], 2),
                ("a public name", domain("example.com", 443), 2),
                ("this proxy", connect_to(bed.address), 2),
                ("this proxy by name", domain("localhost", bed.address.port()), 2),
                ("BIND", vec![5, 2, 0, 1, 127, 0, 0, 1, 0, 80], 7),
                ("no command at all", vec![5, 9, 0, 1, 0, 0, 0, 0, 0, 0], 7),
                ("address type 2", vec![5, 1, 0, 2, 127, 0, 0, 1, 0, 80], 8),
                ("version 4 inside", vec![4, 1, 0, 1, 127, 0, 0, 1, 0, 80], 1),
                ("port 0", connect_to("127.0.0.1:0".parse().unwrap()), 1),
                ("an empty name", domain("", 80), 1),
                ("a name with a space", domain("a b", 80), 1),
                ("a port where nobody listens", connect_to(closed_port("127.0.0.1")), 5),
                ("this proxy by no address", connect_to((Ipv4Addr::UNSPECIFIED, bed.address.port()).into()), 2),
            ] {
                assert_eq!(code(&bed, &request).await, reply(expected), "{what}");
            }
            assert_eq!(bed.codes().len(), 13);
        });
    }

    #[test]
    fn mapped_ipv4_address_is_the_ipv4_address() {
        bed::run(async {
            let (bed, echo) = (bed::start(Config::default()), bed::echo().await);
            let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets();
            let request = |port: u16| [&[5, 1, 0, 4][..], &mapped, &port.to_be_bytes()].concat();
            assert_eq!(code(&bed, &request(bed.address.port())).await, reply(2));
            let mut client = bed.connect().await;
            client.write_all(&whole(&request(echo.port()))).await.unwrap();
            expect_bytes(&mut client, &[&[5, 0][..], &reply(0)].concat()).await;
        });
    }

    #[test]
    fn request_cut_short_is_answered() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let mut client = bed.connect().await;
            client.write_all(&whole(&[5, 1, 0, 3, 40, b'a'])).await.unwrap();
            client.shutdown().await.unwrap();
            expect_bytes(&mut client, &[&[5, 0][..], &reply(1)].concat()).await;
            assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        });
    }

    #[test]
    fn slow_negotiation_is_answered() {
        bed::run(async {
            let config = Config { head_timeout: std::time::Duration::from_millis(50), ..Config::default() };
            let bed = bed::start(config);
            assert_eq!(bed.ask(&GREETING).await, [&[5, 0][..], &reply(1)].concat());
            assert_eq!(bed.codes(), [fault::HEAD_TIMEOUT.code]);
        });
    }

    #[test]
    fn user_and_password_are_asked_for_and_checked() {
        bed::run(async {
            let credentials = Some(Credentials::new("user", "secret"));
            let (bed, echo) = (bed::start(Config { credentials, ..Config::default() }), bed::echo().await);
            assert_eq!(bed.ask(&GREETING).await, [5, 0xff]);
            let wrong = [&[5, 2, 0, 2][..], b"\x01\x04user\x05wrong"].concat();
            assert_eq!(bed.ask(&wrong).await, [5, 2, 1, 1]);
            assert_eq!(bed.codes(), [fault::CREDENTIALS.code; 2]);
            let mut client = bed.connect().await;
            let right = [&[5, 2, 0, 2][..], b"\x01\x04user\x06secret", &connect_to(echo)].concat();
            client.write_all(&right).await.unwrap();
            expect_bytes(&mut client, &[&[5, 2, 1, 0][..], &reply(0)].concat()).await;
        });
    }

    #[test]
    fn methods_without_ours_are_refused() {
        bed::run(async {
            let bed = bed::start(Config::default());
            assert_eq!(bed.ask(&[5, 1, 2]).await, [5, 0xff]);
            assert_eq!(bed.ask(&[5, 0]).await, [5, 0xff]);
        });
    }

    #[test]
    fn socks_4_is_refused_in_its_own_words() {
        bed::run(async {
            let bed = bed::start(Config::default());
            assert_eq!(bed.ask(&[4, 1, 0, 80, 127, 0, 0, 1, 0]).await, SOCKS4_REJECTED);
            assert_eq!(bed.codes(), [fault::SOCKS4.code]);
        });
    }

    #[test]
    fn reset_of_the_target_is_a_reset_and_noted() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let target = bed::target(|mut connection| async move {
                let _ = connection.read_u8().await;
                connection.set_zero_linger().unwrap();
            })
            .await;
            let mut client = bed.connect().await;
            client.write_all(&whole(&connect_to(target))).await.unwrap();
            expect_bytes(&mut client, &[&[5, 0][..], &reply(0)].concat()).await;
            client.write_all(b"x").await.unwrap();
            let error = client.read_u8().await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            tokio::task::yield_now().await;
            assert_eq!(bed.codes(), [fault::UPSTREAM_CLOSED.code]);
        });
    }
}
