//! Where a host is, and TCP to the first of its addresses that answers.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use tokio::net::{TcpStream, lookup_host};

use super::error::UnderlayError;
use super::race::race;

/// The pause before the next address of a host is tried beside the last one. Source: RFC 8305, 5 (250 ms).
const NEXT_ADDRESS: Duration = Duration::from_millis(250);

/// `host:port`, with brackets around an IPv6 address.
pub fn authority(host: &str, port: u16) -> String {
    match host.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, port).to_string(),
        Err(_) => format!("{host}:{port}"),
    }
}

/// Where a host is: the addresses that are known, and for which families its name has the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    known: Vec<IpAddr>,
    by_name: Families,
}

/// Address families, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Families {
    /// IPv4.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

impl Families {
    fn has(self, ip: IpAddr) -> bool {
        if ip.is_ipv6() { self.v6 } else { self.v4 }
    }
}

impl Places {
    /// Wherever the name leads.
    pub fn named() -> Self {
        Self::new(Vec::new(), Families { v4: true, v6: true })
    }

    /// At these addresses only; without any, wherever the name leads.
    pub fn at(known: &[IpAddr]) -> Self {
        if known.is_empty() { Self::named() } else { Self::new(known.to_vec(), Families { v4: false, v6: false }) }
    }

    /// At these addresses, and at those that the name has of these families.
    pub fn new(known: Vec<IpAddr>, by_name: Families) -> Self {
        Self { known, by_name }
    }

    /// Connects to the first address of `host` that answers; each next one is tried beside the last after a pause, those
    /// that are known first. The name may be an address too.
    pub(super) async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, UnderlayError> {
        let host = host.trim_matches(['[', ']']);
        let known = async { connect_any(host, self.known.iter().map(|ip| SocketAddr::new(*ip, port)).collect()).await };
        let named = async { connect_any(host, self.resolve(host, port).await?).await };
        let mut ways: Vec<BoxFuture<'_, _>> = Vec::new();
        if !self.known.is_empty() {
            ways.push(known.boxed());
        }
        if ways.is_empty() || self.by_name.v4 || self.by_name.v6 {
            ways.push(named.boxed());
        }
        let stream = race(ways.into_iter(), NEXT_ADDRESS).await.map_err(telling)?;
        // A record of control or a frame of DERP must not wait for an ACK; without the option it is only later.
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }

    async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, UnderlayError> {
        let addresses = match host.parse::<IpAddr>() {
            Ok(ip) => vec![SocketAddr::new(ip, port)],
            Err(_) => {
                let resolve = |source| UnderlayError::Resolve { host: host.to_owned(), source };
                lookup_host((host, port)).await.map_err(resolve)?.collect()
            }
        };
        Ok(addresses.into_iter().filter(|address| self.by_name.has(address.ip())).collect())
    }
}

async fn connect_any(host: &str, addresses: Vec<SocketAddr>) -> Result<TcpStream, UnderlayError> {
    let Some(first) = addresses.first() else {
        let none = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        return Err(UnderlayError::Resolve { host: host.to_owned(), source: none });
    };
    let place = authority(host, first.port());
    let failed = |mut failures: Vec<io::Error>| {
        let source = failures.pop().expect("without a failure there is a stream, since there is an address");
        UnderlayError::Connect { host: place, source }
    };
    race(addresses.into_iter().map(TcpStream::connect), NEXT_ADDRESS).await.map_err(failed)
}

/// The failure that says most: a name that leads nowhere says little of a host whose address is known.
fn telling(failures: Vec<UnderlayError>) -> UnderlayError {
    let says = |failure: &UnderlayError| matches!(failure, UnderlayError::Connect { .. });
    let most = failures.into_iter().max_by_key(says);
    most.expect("there is one way at least, and it failed")
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    const NONE: Families = Families { v4: false, v6: false };
    const V4: Families = Families { v4: true, v6: false };
    const V6: Families = Families { v4: false, v6: true };

    /// A port on which IPv4's loopback listens, and nobody else.
    async fn listener() -> (TcpListener, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    }

    async fn reached(host: &str, known: &[&str], by_name: Families) -> Result<String, UnderlayError> {
        let (_listener, port) = listener().await;
        let known = known.iter().map(|ip| ip.parse().unwrap()).collect();
        let stream = Places::new(known, by_name).connect(host, port).await?;
        Ok(stream.peer_addr().unwrap().ip().to_string())
    }

    #[test]
    fn an_authority_brackets_ipv6() {
        assert_eq!(authority("::1", 443), "[::1]:443");
        assert_eq!(authority("derp.example", 443), "derp.example:443");
    }

    #[tokio::test]
    async fn a_name_leads_on_where_the_known_address_does_not() {
        assert_eq!(reached("localhost", &["::1"], V4).await.unwrap(), "127.0.0.1");
        assert_eq!(reached("127.0.0.1", &["::1"], V4).await.unwrap(), "127.0.0.1");
    }

    #[tokio::test]
    async fn a_name_is_not_asked_for_what_is_known_or_forbidden() {
        assert_eq!(reached("nowhere.invalid", &["127.0.0.1"], NONE).await.unwrap(), "127.0.0.1");
        for host in ["localhost", "127.0.0.1"] {
            assert!(reached(host, &[], V6).await.is_err(), "{host}");
            assert!(reached(host, &["::1"], NONE).await.is_err(), "{host}");
        }
    }

    #[tokio::test]
    async fn of_two_failures_that_of_the_address_is_told() {
        let error = reached("nowhere.invalid", &["::1"], V4).await.unwrap_err();
        assert!(matches!(error, UnderlayError::Connect { .. }), "{error}");
        let error = reached("nowhere.invalid", &[], V4).await.unwrap_err();
        assert!(matches!(error, UnderlayError::Resolve { .. }), "{error}");
    }
}
