//! Connections on the underlay: TCP plain, by TLS, and through a corporate HTTP proxy; UDP to one address.
//!
//! For control, DERP, and resolvers that the tailnet names by a public address. By the same settings, but with a client
//! of its own ([`crate::provision`]), the API that makes auth keys is reached, and GitHub's runner. Beside these, UDP
//! goes to STUN, peers' endpoints and such resolvers, and whatever goes to a host that `--direct-allow` names. Nothing
//! else leaves the machine outside the tunnel; README lists these hosts for a firewall.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio::net::UdpSocket;
use tokio_rustls::TlsConnector;
use url::Url;

use super::error::UnderlayError;
use super::link::{Link, Tied};
use super::places::{Places, authority};
use super::tls::Tls;

/// A byte stream of any make.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A boxed byte stream.
pub type BoxIo = Box<dyn Io>;

/// A UDP socket for `address` alone: the kernel lets nobody else's datagrams in.
///
/// # Errors
/// What the operating system says of binding it or of the way to `address`.
pub fn connect_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => [0; 4].into(),
        SocketAddr::V6(_) => [0; 16].into(),
    };
    let socket = std::net::UdpSocket::bind((any, 0))?;
    socket.connect(address)?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

/// What is read of a connection at once. rustls by itself asks for 4 KiB, and a relay writes records of 2.
const READ_AHEAD: usize = 64 << 10;

/// How long what is sent may go unacknowledged, the first of all included: beyond that the connection is dead, whatever
/// forgot it. As long as whoever takes nothing is borne with; a short outage does not end it.
const PATIENCE: Duration = Duration::from_secs(16);
/// The same for relays, whose connection is soon made anew: TCP of whoever sends to us through one repeats 6.2 s after a
/// loss, and then not until 12.6 s.
const RELAYS_PATIENCE: Duration = Duration::from_secs(5);

/// How this run reaches control and DERP.
#[derive(Clone)]
pub struct Underlay {
    /// Whom to trust.
    pub tls: Tls,
    /// The corporate proxy, if any.
    pub proxy: Option<Arc<Url>>,
    /// Hosts, `.suffixes`, addresses or `*` that are reached without it.
    pub no_proxy: Arc<[String]>,
    /// The network below it all: when that changes, connections end that came from it, and dials begin anew.
    pub link: Link,
}

impl Underlay {
    /// Opens a TCP stream to `host`, through the proxy where one is set for it.
    ///
    /// # Errors
    /// [`UnderlayError`]; the caller bounds the time.
    pub async fn connect(&self, host: &str, port: u16) -> Result<BoxIo, UnderlayError> {
        self.connect_known(host, &Places::named(), port).await
    }

    /// The same for a host of which something is known. A proxy is told the name all the same, since it is by names that
    /// proxies decide.
    ///
    /// # Errors
    /// [`UnderlayError`]; the caller bounds the time.
    pub async fn connect_known(&self, host: &str, places: &Places, port: u16) -> Result<BoxIo, UnderlayError> {
        self.connect_within(host, places, port, PATIENCE).await
    }

    /// The same, with a limit to how long what is sent may go unacknowledged.
    async fn connect_within(
        &self,
        host: &str,
        places: &Places,
        port: u16,
        patience: Duration,
    ) -> Result<BoxIo, UnderlayError> {
        match &self.proxy {
            Some(proxy) if !self.bypasses(host) => self.connect_by_proxy(proxy, host, port, patience).await,
            _ => Ok(Box::new(self.connect_tcp(host, places, port, patience).await?)),
        }
    }

    /// Opens a TLS stream to a relay, checking its certificate for `name` as `config` says.
    ///
    /// # Errors
    /// [`UnderlayError`]; the caller bounds the time.
    pub async fn connect_tls(
        &self,
        (host, places): (&str, &Places),
        port: u16,
        name: &str,
        config: Arc<ClientConfig>,
    ) -> Result<BoxIo, UnderlayError> {
        let tcp = self.connect_within(host, places, port, RELAYS_PATIENCE).await?;
        let tcp = Box::new(BufReader::with_capacity(READ_AHEAD, tcp));
        start_tls(tcp, host, port, name, config).await
    }

    /// Whether the host is reached without the proxy: loopback, and what `NO_PROXY` names by its name, a suffix, its
    /// address, or `*`.
    pub fn bypasses(&self, host: &str) -> bool {
        let host = host.trim_matches(['[', ']']).to_ascii_lowercase();
        if host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()) || host == "localhost" {
            return true;
        }
        self.no_proxy.iter().any(|rule| {
            let rule = rule.trim().to_ascii_lowercase();
            let suffix = rule.trim_start_matches('*').trim_start_matches('.');
            let net = || Some(rule.parse::<ipnet::IpNet>().ok()?.contains(&host.parse::<IpAddr>().ok()?));
            rule == "*"
                || host == suffix
                || (!suffix.is_empty() && host.strip_suffix(suffix).is_some_and(|head| head.ends_with('.')))
                || net().unwrap_or(false)
        })
    }

    async fn connect_by_proxy(
        &self,
        proxy: &Url,
        host: &str,
        port: u16,
        patience: Duration,
    ) -> Result<BoxIo, UnderlayError> {
        let proxy_host = proxy.host_str().unwrap_or_default();
        let proxy_port = proxy.port_or_known_default().unwrap_or(80);
        let failed = |detail: String| UnderlayError::Proxy { proxy: format!("{proxy_host}:{proxy_port}"), detail };

        let unreached = |error| UnderlayError::ProxyUnreached {
            proxy: format!("{proxy_host}:{proxy_port}"),
            source: Box::new(error),
        };

        let tcp = self.connect_tcp(proxy_host, &Places::named(), proxy_port, patience).await;
        let mut io: BoxIo = Box::new(tcp.map_err(unreached)?);
        if proxy.scheme() == "https" {
            io = start_tls(io, proxy_host, proxy_port, proxy_host, self.tls.trusted()).await?;
        }
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(io)).await.map_err(|error| failed(error.to_string()))?;
        tokio::spawn(connection.with_upgrades());

        let authority = authority(host, port);
        let mut request = Request::builder().method(Method::CONNECT).uri(&authority).header(header::HOST, &authority);
        if !proxy.username().is_empty() {
            request = request.header(header::PROXY_AUTHORIZATION, basic(proxy));
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|error| failed(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(|error| failed(error.to_string()))?;
        if !response.status().is_success() {
            return Err(failed(format!("it answered {} to CONNECT {authority}", response.status())));
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(|error| failed(error.to_string()))?;
        Ok(Box::new(TokioIo::new(upgraded)))
    }

    /// Connects to the first address of `host` that answers within `patience`. When the network moves meanwhile, that begins
    /// anew: what was sent before may never be answered.
    async fn connect_tcp(
        &self,
        host: &str,
        places: &Places,
        port: u16,
        patience: Duration,
    ) -> Result<Tied, UnderlayError> {
        let mut news = self.link.news();
        loop {
            tokio::select! {
                connected = places.connect(host, port, patience) => return Ok(Tied::new(connected?, news, patience)),
                () = news.moved() => {}
            }
        }
    }
}

/// Whether plain HTTP to this host stays within the machine or a private network: loopback, private and link-local
/// addresses as numbers, or `localhost`. ts2021 encrypts by itself, but only TLS proves who hands out its key.
pub fn plain_http_allowed(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name.eq_ignore_ascii_case("localhost"),
        Some(url::Host::Ipv4(ip)) => ip.is_loopback() || ip.is_private() || ip.is_link_local(),
        Some(url::Host::Ipv6(ip)) => match ip.to_ipv4_mapped() {
            Some(ip) => ip.is_loopback() || ip.is_private() || ip.is_link_local(),
            None => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
        },
        None => false,
    }
}

/// The value of `Proxy-Authorization` for the user and password in the proxy's URL.
fn basic(proxy: &Url) -> header::HeaderValue {
    let decode = |text| percent_encoding::percent_decode_str(text).decode_utf8_lossy();
    let pair = format!("{}:{}", decode(proxy.username()), decode(proxy.password().unwrap_or_default()));
    let text = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair));
    let mut value = header::HeaderValue::try_from(text).expect("base64 is a header value");
    value.set_sensitive(true);
    value
}

async fn start_tls(
    io: BoxIo,
    host: &str,
    port: u16,
    name: &str,
    config: Arc<ClientConfig>,
) -> Result<BoxIo, UnderlayError> {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};

    let failed = |detail: String| UnderlayError::Tls { host: authority(host, port), detail };
    let lost = |source: io::Error| {
        let (host, ends) = (authority(host, port), &[UnexpectedEof, ConnectionReset, BrokenPipe]);
        let ended = ends.contains(&source.kind());
        if ended { UnderlayError::Ended { host, source } } else { UnderlayError::Connect { host, source } }
    };
    let name = name.trim_matches(['[', ']']).to_owned();
    let server_name = ServerName::try_from(name).map_err(|error| failed(error.to_string()))?;
    let stream = TlsConnector::from(config).connect(server_name, io).await;
    let stream = stream.map_err(|error| if is_of_tls(&error) { failed(error.to_string()) } else { lost(error) })?;
    Ok(Box::new(stream))
}

/// Whether rustls says so, rather than the stream below it, which another try may find well.
fn is_of_tls(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::bed::closed_port;

    fn underlay(no_proxy: &[&str]) -> Underlay {
        let no_proxy = no_proxy.iter().map(|&rule| rule.to_owned()).collect();
        Underlay { tls: Tls::load(None).unwrap(), proxy: None, no_proxy, link: Link::default() }
    }

    #[test]
    fn no_proxy_names_hosts_suffixes_addresses_and_prefixes() {
        let underlay = underlay(&["corp.example", ".lan", "10.0.0.0/8"]);
        for host in ["corp.example", "a.corp.example", "x.lan", "10.1.2.3", "127.0.0.1", "localhost", "[::1]"] {
            assert!(underlay.bypasses(host), "{host}");
        }
        for host in ["badcorp.example", "example", "11.0.0.1", "lan.example"] {
            assert!(!underlay.bypasses(host), "{host}");
        }
    }

    #[test]
    fn plain_http_is_for_loopback_and_private_numbers() {
        let allowed = |text| plain_http_allowed(&Url::parse(text).unwrap());
        assert!(
            ["http://127.0.0.1:8080", "http://[::1]", "http://10.1.2.3", "http://[fd00::1]", "http://localhost"]
                .into_iter()
                .all(allowed)
        );
        assert!(
            !["http://headscale.corp", "http://8.8.8.8", "http://[2001:db8::1]", "http://127.0.0.1.nip.io"]
                .into_iter()
                .any(allowed)
        );
    }

    #[test]
    fn proxy_credentials_are_decoded_and_marked_sensitive() {
        let value = basic(&Url::parse("http://us%40er:p%26w@proxy:3128").unwrap());
        assert_eq!(value.to_str().unwrap(), "Basic dXNAZXI6cCZ3");
        assert!(value.is_sensitive());
    }

    #[tokio::test]
    async fn a_connection_that_ends_during_the_handshake_is_not_a_failure_of_tls() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let answered = async |answer: &[u8]| {
            let underlay = underlay(&[]);
            let (config, places) = (underlay.tls.trusted(), Places::named());
            let connect = underlay.connect_tls(("127.0.0.1", &places), port, "127.0.0.1", config);
            let answer = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 1]).await.unwrap();
                stream.write_all(answer).await.unwrap();
            };
            tokio::join!(connect, answer).0.err().unwrap()
        };
        assert!(matches!(answered(b"").await, UnderlayError::Ended { .. }));
        assert!(matches!(answered(b"HTTP/1.1 400 Bad Request\r\n\r\n").await, UnderlayError::Tls { .. }));
    }

    #[tokio::test]
    async fn a_proxy_that_cannot_be_reached_is_told_from_one_that_refuses() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

        let by_proxy = async |port: u16| {
            let proxy = Url::parse(&format!("http://127.0.0.1:{port}")).unwrap();
            let underlay = Underlay { proxy: Some(proxy.into()), ..underlay(&[]) };
            underlay.connect("relay.example", 443).await.err().unwrap()
        };
        let port = closed_port("127.0.0.1").port();
        let error = by_proxy(port).await;
        assert!(matches!(error, UnderlayError::ProxyUnreached { .. }), "{error}");
        let text = format!("HTTP proxy 127.0.0.1:{port}: cannot connect to 127.0.0.1:{port}: ");
        assert!(error.to_string().starts_with(&text), "{error}");

        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let refuse = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await.unwrap();
            stream.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        };
        let error = tokio::join!(by_proxy(listener.local_addr().unwrap().port()), refuse).0;
        assert!(matches!(error, UnderlayError::Proxy { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_refused_connection_says_where() {
        let port = closed_port("127.0.0.1").port();
        let error = underlay(&[]).connect("127.0.0.1", port).await.err().unwrap();
        assert!(matches!(error, UnderlayError::Connect { host, .. } if host == format!("127.0.0.1:{port}")));
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_that_answers_nothing_is_waited_for_with_patience() {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        // Whoever comes to a full queue is not answered.
        let soon = Duration::from_millis(100);
        let queued: Vec<_> = (0..8).map_while(|_| std::net::TcpStream::connect_timeout(&address, soon).ok()).collect();
        assert!(queued.len() < 8, "the queue takes all");
        let begun = tokio::time::Instant::now();
        let (underlay, places) = (underlay(&[]), Places::named());
        let (host, port, config) = ("127.0.0.1", address.port(), underlay.tls.trusted());
        let error = underlay.connect_tls((host, &places), port, host, config).await.err().unwrap();
        assert!(error.to_string().ends_with("no answer for 5s"), "{error}");
        assert!((RELAYS_PATIENCE..RELAYS_PATIENCE + soon).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    }
}
