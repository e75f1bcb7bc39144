//! Where a host is, and TCP to the first of its addresses that answers.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use tokio::net::{TcpStream, lookup_host};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout_at};

use super::error::UnderlayError;
use super::interfaces;
use super::race::race;
use crate::lapse::Lapse;

/// The pause before the next address of a host is tried beside the last one. Source: RFC 8305, 5 (250 ms).
const NEXT_ADDRESS: Duration = Duration::from_millis(250);
/// How long a look-up may still take once every known address has failed: a resolver that is silent would keep a refusal
/// from being told, and the next relay from being tried.
const LAST_LOOK_UP: Duration = Duration::from_secs(1);

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
    fn has(self, v6: bool) -> bool {
        if v6 { self.v6 } else { self.v4 }
    }

    fn leads_from(self, machine: &impl Machine) -> bool {
        [false, true].into_iter().any(|v6| self.has(v6) && machine.has_way(v6))
    }
}

/// What is asked of this machine.
trait Machine: Sync {
    /// The addresses of a name, by the machine's resolver.
    fn look_up(&self, host: &str, port: u16) -> impl Future<Output = io::Result<Vec<SocketAddr>>> + Send;
    /// Whether packets of that family lead anywhere.
    fn has_way(&self, v6: bool) -> bool;
}

/// The machine that we run on.
struct Here;

impl Machine for Here {
    async fn look_up(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        Ok(lookup_host((host, port)).await?.collect())
    }

    fn has_way(&self, v6: bool) -> bool {
        interfaces::has_way(v6)
    }
}

/// A host to be connected to.
struct Target<'a> {
    host: &'a str,
    port: u16,
    /// How long its addresses may take to answer, all together, and until when.
    patience: Duration,
    until: Instant,
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

    /// Connects to the first address of `host` that answers within `patience`; each next one is tried beside the last after
    /// a pause, those that are known first. The name may be an address too.
    ///
    /// # Errors
    /// [`UnderlayError`]: what an address answered, rather than that others were silent or not found.
    pub(super) async fn connect(&self, host: &str, port: u16, patience: Duration) -> Result<TcpStream, UnderlayError> {
        self.connect_from(&Here, host, port, patience).await
    }

    async fn connect_from(
        &self,
        machine: &impl Machine,
        host: &str,
        port: u16,
        patience: Duration,
    ) -> Result<TcpStream, UnderlayError> {
        let host = host.trim_matches(['[', ']']);
        let target = Target { host, port, patience, until: Instant::now() + patience };
        let unknown = Notify::new();
        let known = async {
            let addresses = self.known.iter().map(|ip| SocketAddr::new(*ip, port)).collect();
            let connected = target.connect(addresses).await;
            // If the machine has no way by any of them the name is the only one, and has all the time.
            if self.known.iter().any(|ip| machine.has_way(ip.is_ipv6())) {
                unknown.notify_one();
            }
            connected
        };
        let named = async {
            // Most relays' IPv4 address is known, and most machines that this is slow for have no IPv6.
            if !self.known.is_empty() && !self.by_name.leads_from(machine) {
                return Err(
                    target.unresolved(io::ErrorKind::NotFound, "this machine has no way to its other addresses")
                );
            }
            let refused = async {
                unknown.notified().await;
                sleep(LAST_LOOK_UP).await;
            };
            let addresses = tokio::select! {
                addresses = target.look_up(machine) => addresses?,
                () = refused => return Err(target.unresolved(io::ErrorKind::TimedOut, "no answer")),
            };
            target.connect(addresses.into_iter().filter(|address| self.by_name.has(address.is_ipv6())).collect()).await
        };
        let mut ways: Vec<BoxFuture<'_, _>> = Vec::new();
        if !self.known.is_empty() {
            ways.push(known.boxed());
        }
        if self.by_name.v4 || self.by_name.v6 {
            ways.push(named.boxed());
        }
        let failed =
            |failures| telling(failures).unwrap_or_else(|| target.unresolved(io::ErrorKind::NotFound, FORBIDDEN));
        let stream = race(ways.into_iter(), NEXT_ADDRESS).await.map_err(failed)?;
        // A record of control or a frame of DERP must not wait for an ACK; without the option it is only later.
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }
}

/// What is said of a relay that is in neither family.
const FORBIDDEN: &str = "the map allows it no address";

impl Target<'_> {
    async fn look_up(&self, machine: &impl Machine) -> Result<Vec<SocketAddr>, UnderlayError> {
        if let Ok(ip) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, self.port)]);
        }
        let addresses = timeout_at(self.until, machine.look_up(self.host, self.port)).await;
        let resolve = |source| UnderlayError::Resolve { host: self.host.to_owned(), source };
        addresses.unwrap_or_else(|_| Err(self.silence())).map_err(resolve)
    }

    async fn connect(&self, addresses: Vec<SocketAddr>) -> Result<TcpStream, UnderlayError> {
        if addresses.is_empty() {
            return Err(self.unresolved(io::ErrorKind::NotFound, "the name has no address"));
        }
        let attempt = async |address| {
            let connected = timeout_at(self.until, TcpStream::connect(address)).await;
            connected.unwrap_or_else(|_| Err(self.silence()))
        };
        let failed = |failures: Vec<io::Error>| {
            let source = failures.into_iter().max_by_key(weight);
            let source = source.expect("without a failure there is a stream, since there is an address");
            UnderlayError::Connect { host: authority(self.host, self.port), source }
        };
        race(addresses.into_iter().map(attempt), NEXT_ADDRESS).await.map_err(failed)
    }

    fn silence(&self) -> io::Error {
        io::Error::new(io::ErrorKind::TimedOut, format!("no answer for {}", Lapse(self.patience)))
    }

    fn unresolved(&self, kind: io::ErrorKind, detail: &str) -> UnderlayError {
        UnderlayError::Resolve { host: self.host.to_owned(), source: io::Error::new(kind, detail) }
    }
}

/// How much a failure says: most what an address answered, then that none did, then that no packet got so far.
fn weight(failure: &io::Error) -> usize {
    let least = [io::ErrorKind::NetworkUnreachable, io::ErrorKind::TimedOut];
    least.iter().position(|kind| *kind == failure.kind()).unwrap_or(least.len())
}

/// The failure that says most: a name that leads nowhere says little of a host whose address is known.
fn telling(failures: Vec<UnderlayError>) -> Option<UnderlayError> {
    failures.into_iter().max_by_key(|failure| {
        if let UnderlayError::Connect { source, .. } = failure { Some(weight(source)) } else { None }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::net::TcpListener;

    use super::*;

    const NONE: Families = Families { v4: false, v6: false };
    const V4: Families = Families { v4: true, v6: false };
    const V6: Families = Families { v4: false, v6: true };
    const PATIENCE: Duration = Duration::from_secs(5);

    /// A machine with ways by IPv4, and perhaps IPv6, and a resolver that answers after so long.
    struct Fake {
        has_v6: bool,
        takes: Duration,
        asked: AtomicBool,
    }

    impl Machine for Fake {
        async fn look_up(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
            self.asked.store(true, Ordering::Relaxed);
            sleep(self.takes).await;
            let known = ["127.0.0.1", "::1"].map(|ip| SocketAddr::new(ip.parse().unwrap(), port));
            if host == "relay" { Ok(known.into()) } else { Err(io::ErrorKind::NotFound.into()) }
        }

        fn has_way(&self, v6: bool) -> bool {
            !v6 || self.has_v6
        }
    }

    impl Fake {
        fn new(has_v6: bool, takes: Duration) -> Self {
            Self { has_v6, takes, asked: AtomicBool::new(false) }
        }

        fn was_asked(&self) -> bool {
            self.asked.load(Ordering::Relaxed)
        }
    }

    /// Where a host with these places is reached, on a port on which IPv4's loopback listens, and nobody else.
    async fn reached(fake: &Fake, host: &str, known: &[&str], by_name: Families) -> Result<String, UnderlayError> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let known = known.iter().map(|ip| ip.parse().unwrap()).collect();
        let stream = Places::new(known, by_name).connect_from(fake, host, port, PATIENCE).await?;
        Ok(stream.peer_addr().unwrap().ip().to_string())
    }

    /// An address of this machine at which nobody listens on IPv4's port.
    const REFUSES: &str = "127.0.0.2";

    #[test]
    fn an_authority_brackets_ipv6() {
        assert_eq!(authority("::1", 443), "[::1]:443");
        assert_eq!(authority("derp.example", 443), "derp.example:443");
    }

    #[tokio::test]
    async fn a_name_leads_where_the_machine_says() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let stream = Places::named().connect("localhost", port, PATIENCE).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), listener.local_addr().unwrap());
    }

    #[tokio::test]
    async fn a_name_leads_on_where_the_known_address_does_not() {
        for host in ["relay", "127.0.0.1"] {
            let fake = Fake::new(false, Duration::ZERO);
            assert_eq!(reached(&fake, host, &[REFUSES], V4).await.unwrap(), "127.0.0.1");
        }
    }

    #[tokio::test]
    async fn a_name_is_asked_only_for_what_is_neither_known_nor_forbidden_nor_without_a_way() {
        for (has_v6, by_name) in [(true, NONE), (false, V6)] {
            let fake = Fake::new(has_v6, Duration::ZERO);
            let error = reached(&fake, "relay", &[REFUSES], by_name).await.unwrap_err();
            assert!(matches!(error, UnderlayError::Connect { .. }) && !fake.was_asked(), "{error}");
        }
        let fake = Fake::new(true, Duration::ZERO);
        let error = reached(&fake, "relay", &[REFUSES], V6).await.unwrap_err();
        assert!(matches!(error, UnderlayError::Connect { .. }) && fake.was_asked(), "{error}");
        // What the name has of the other family is not for us.
        for host in ["relay", "127.0.0.1"] {
            assert!(reached(&fake, host, &[], V6).await.is_err(), "{host}");
        }
    }

    #[tokio::test]
    async fn a_host_that_is_allowed_no_address_is_not_looked_up() {
        let fake = Fake::new(true, Duration::ZERO);
        let error = reached(&fake, "relay", &[], NONE).await.unwrap_err();
        assert_eq!(error.to_string(), "cannot resolve relay: the map allows it no address");
        assert!(!fake.was_asked());
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_told_soon_though_the_resolver_is_silent() {
        let fake = Fake::new(true, Duration::from_secs(60));
        let begun = Instant::now();
        let error = reached(&fake, "relay", &[REFUSES], V6).await.unwrap_err();
        let refused = |source: &io::Error| source.kind() == io::ErrorKind::ConnectionRefused;
        assert!(matches!(&error, UnderlayError::Connect { source, .. } if refused(source)), "{error}");
        assert!((LAST_LOOK_UP..2 * LAST_LOOK_UP).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_is_the_only_way_has_all_the_time() {
        // The machine has no way by the known address.
        let fake = Fake::new(false, Duration::from_secs(3));
        assert_eq!(reached(&fake, "relay", &["::1"], V4).await.unwrap(), "127.0.0.1");
        let (fake, begun) = (Fake::new(false, Duration::from_secs(60)), Instant::now());
        let error = reached(&fake, "relay", &[], V4).await.unwrap_err();
        assert_eq!(error.to_string(), "cannot resolve relay: no answer for 5s");
        assert!((PATIENCE..PATIENCE + Duration::from_millis(100)).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn of_several_failures_that_of_the_address_is_told() {
        let fake = Fake::new(true, Duration::ZERO);
        let error = reached(&fake, "nowhere", &[REFUSES], V4).await.unwrap_err();
        assert!(matches!(error, UnderlayError::Connect { .. }), "{error}");
        let error = reached(&fake, "nowhere", &[], V4).await.unwrap_err();
        assert!(matches!(error, UnderlayError::Resolve { .. }), "{error}");
        let kinds = [io::ErrorKind::ConnectionRefused, io::ErrorKind::TimedOut, io::ErrorKind::NetworkUnreachable];
        let connect = |kind: &io::ErrorKind| UnderlayError::Connect { host: kind.to_string(), source: (*kind).into() };
        for failures in [kinds.iter().map(connect).collect(), kinds.iter().rev().map(connect).collect()] {
            let told = telling(failures).unwrap().to_string();
            assert!(told.contains("refused"), "{told}");
        }
    }
}
