//! From a URL to an encrypted HTTP/2 session with control.
//!
//! One TCP (and TLS) connection carries it all: the server's key is fetched, then the same connection is upgraded, the
//! Noise handshake done, and HTTP/2 spoken inside. The key, once seen, serves for the whole run.
//! Source: Tailscale, control/controlhttp/client.go and control/ts2021/client.go.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use serde::Deserialize;
use tokio::time::timeout;
use tracing::debug;
use url::Url;

use super::ConnectError;
use super::noise::{Handshake, NoiseError};
use crate::key::{MachinePrivate, MachinePublic};
use crate::transport::error::UnderlayError;
use crate::transport::places::{Places, authority};
use crate::transport::underlay::{BoxIo, Underlay};

/// The capability version that we speak: the last before peer relays, which we do not offer.
/// Source: Tailscale, tailcfg, `CurrentCapabilityVersion` and its history.
pub(super) const CAPABILITY_VERSION: u16 = 119;

/// The longest that one step towards a session may take. Source: controlhttp/client.go (10 s for the whole dial).
const STEP_LIMIT: Duration = Duration::from_secs(10);
/// The most octets of the answer to `/key`. Source: controlclient/direct.go, `loadServerPubKeys`.
const KEY_BODY_MAX: usize = 64 << 10;
/// Octets of the map stream that may be under way: a netmap of ten thousand peers has several megabytes.
const STREAM_WINDOW: u32 = 4 << 20;
/// A session that says nothing for so long is asked by an HTTP/2 ping, and dead if it does not answer that.
const PING_AFTER: Duration = Duration::from_secs(30);
const PING_LIMIT: Duration = Duration::from_secs(15);

/// An open session. Clones share it.
#[derive(Clone)]
pub(super) struct Session {
    sender: http2::SendRequest<Full<Bytes>>,
    /// The control server's host and port, as every request names it.
    authority: String,
}

impl Session {
    /// Sends a request inside the session; `path` begins with a slash.
    pub(super) async fn request(
        &self,
        method: Method,
        path: &str,
        body: impl Into<Bytes>,
    ) -> Result<Response<Incoming>, ConnectError> {
        let failed = |detail: String| ConnectError::Noise { detail };
        let mut sender = self.sender.clone();
        let request = Request::builder()
            .method(method)
            .uri(format!("https://{}{path}", self.authority))
            .body(Full::new(body.into()))
            .map_err(|error| failed(error.to_string()))?;
        sender.ready().await.map_err(|error| failed(error.to_string()))?;
        sender.send_request(request).await.map_err(|error| failed(chain(&error)))
    }

    /// Whether the session has ended.
    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

/// How to reach control.
pub(super) struct Dialer {
    url: Url,
    underlay: Underlay,
    machine: MachinePrivate,
    server_key: Option<MachinePublic>,
}

#[derive(Deserialize)]
struct KeyAnswer {
    #[serde(rename = "publicKey", default)]
    public_key: MachinePublic,
}

impl Dialer {
    pub(super) fn new(url: Url, underlay: Underlay, machine: MachinePrivate) -> Self {
        Self { url, underlay, machine, server_key: None }
    }

    /// Opens a session.
    pub(super) async fn connect(&mut self) -> Result<Session, ConnectError> {
        let io = self.bounded("a connection", self.open()).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await.map_err(|error| self.lost(&error))?;
        tokio::spawn(connection.with_upgrades());

        let server = match self.server_key {
            Some(key) => key,
            None => self.bounded("its key", self.fetch_key(&mut sender)).await?,
        };
        // A server that closes after each answer is dialled once more for the upgrade.
        if self.server_key.replace(server).is_none() && sender.ready().await.is_err() {
            let io = self.bounded("a connection", self.open()).await?;
            let (anew, connection) = http1::handshake(TokioIo::new(io)).await.map_err(|error| self.lost(&error))?;
            tokio::spawn(connection.with_upgrades());
            sender = anew;
        }
        self.bounded("the encrypted session", self.upgrade(&mut sender, &server)).await
    }

    fn host(&self) -> &str {
        self.url.host_str().unwrap_or_default()
    }

    fn port(&self) -> u16 {
        self.url.port_or_known_default().unwrap_or(443)
    }

    /// As `Host` and `:authority` want it: without the scheme's own port.
    fn authority(&self) -> String {
        match self.url.port() {
            Some(port) => format!("{}:{port}", self.host()),
            None => self.host().to_owned(),
        }
    }

    fn place(&self) -> String {
        authority(self.host().trim_matches(['[', ']']), self.port())
    }

    fn path(&self, tail: &str) -> String {
        format!("{}{tail}", self.url.path().trim_end_matches('/'))
    }

    async fn bounded<T>(
        &self,
        stage: &'static str,
        step: impl Future<Output = Result<T, ConnectError>>,
    ) -> Result<T, ConnectError> {
        let silent = |_| ConnectError::Silent { host: self.place(), stage, limit: STEP_LIMIT };
        timeout(STEP_LIMIT, step).await.map_err(silent)?
    }

    async fn open(&self) -> Result<BoxIo, ConnectError> {
        let (host, port) = (self.host(), self.port());
        let opened = if self.url.scheme() == "https" {
            self.underlay.connect_tls((host, &Places::named()), port, host, self.underlay.tls.trusted()).await
        } else {
            self.underlay.connect(host, port).await
        };
        opened.map_err(|error| match error {
            UnderlayError::Resolve { host, source } => ConnectError::Resolve { host, source: source.into() },
            UnderlayError::Connect { host, source } | UnderlayError::Ended { host, source } => {
                ConnectError::Connect { host, source: source.into() }
            }
            UnderlayError::Tls { host, detail } => ConnectError::Tls { host, detail },
            UnderlayError::ProxyUnreached { proxy, source } => {
                ConnectError::Proxy { proxy, detail: source.to_string() }
            }
            UnderlayError::Proxy { proxy, detail } => ConnectError::Proxy { proxy, detail },
        })
    }

    async fn fetch_key(&self, sender: &mut http1::SendRequest<Empty<Bytes>>) -> Result<MachinePublic, ConnectError> {
        let path = self.path(&format!("/key?v={CAPABILITY_VERSION}"));
        let url = || format!("{}://{}{path}", self.url.scheme(), self.authority());
        let other = |detail: String| ConnectError::NotControl { url: url(), detail };
        let request = Request::get(&path).header(header::HOST, self.authority()).body(Empty::new());
        let request = request.map_err(|error| other(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(|error| {
            if error.is_parse() { other("it does not speak HTTP".to_owned()) } else { self.lost(&error) }
        })?;

        let status = response.status();
        let kind = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let kind = kind.unwrap_or("no content type").to_owned();
        let body = Limited::new(response.into_body(), KEY_BODY_MAX).collect().await;
        let body = body.map_err(|error| match error.downcast::<hyper::Error>() {
            Ok(error) => self.lost(&error),
            Err(error) => other(format!("its answer cannot be read: {error}")),
        });
        let body = body?.to_bytes();
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            return Err(ConnectError::Server { status: status.as_u16(), body: excerpt(&body) });
        }
        if status != StatusCode::OK {
            return Err(other(format!("it answered {status} ({kind})")));
        }
        let answer: KeyAnswer = serde_json::from_slice(&body)
            .map_err(|_| other(format!("its answer is not the key document but {kind}")))?;
        if answer.public_key.is_zero() {
            return Err(other("it offers no Noise key".to_owned()));
        }
        Ok(answer.public_key)
    }

    async fn upgrade(
        &self,
        sender: &mut http1::SendRequest<Empty<Bytes>>,
        server: &MachinePublic,
    ) -> Result<Session, ConnectError> {
        let noise = |error: NoiseError| ConnectError::Noise { detail: error.to_string() };
        let broken = |detail: String| ConnectError::Noise { detail };
        let handshake = Handshake::begin(&self.machine, server, CAPABILITY_VERSION).map_err(noise)?;
        let request = Request::post(self.path("/ts2021"))
            .header(header::HOST, self.authority())
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, "tailscale-control-protocol")
            .header("X-Tailscale-Handshake", STANDARD.encode(handshake.initiation()))
            .header(header::CONTENT_LENGTH, "0")
            .body(Empty::<Bytes>::new())
            .map_err(|error| broken(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(|error| broken(chain(&error)))?;
        if response.status().is_server_error() {
            return Err(ConnectError::Server { status: response.status().as_u16(), body: String::new() });
        }
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(broken(format!("the server answered {} to the upgrade", response.status())));
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(|error| broken(error.to_string()))?;
        let stream = handshake.finish(TokioIo::new(upgraded)).await.map_err(noise)?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(STREAM_WINDOW)
            .keep_alive_interval(PING_AFTER)
            .keep_alive_timeout(PING_LIMIT)
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| broken(chain(&error)))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                debug!(error = chain(&error), "the session with control ended");
            }
        });
        Ok(Session { sender, authority: self.authority() })
    }

    fn lost(&self, error: &hyper::Error) -> ConnectError {
        ConnectError::Connect { host: self.place(), source: std::io::Error::other(chain(error)).into() }
    }
}

/// An error with its causes: hyper's own words alone say little.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// The first 200 characters of a body, for an error's text.
pub(super) fn excerpt(body: &[u8]) -> String {
    String::from_utf8_lossy(body).chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::transport::link::Link;
    use crate::transport::tls::Tls;

    #[tokio::test]
    async fn a_key_that_breaks_off_is_a_lost_connection_and_one_without_end_is_not_controls() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = Url::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        let answered = async |length: usize, body: &[u8]| {
            let tls = Tls::load(None).unwrap();
            let underlay = Underlay { tls, proxy: None, no_proxy: [].into(), link: Link::default() };
            let mut dialer = Dialer::new(url.clone(), underlay, MachinePrivate::random());
            let answer = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 4096]).await.unwrap();
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
                stream.write_all(&[head.as_bytes(), body].concat()).await.unwrap();
            };
            tokio::join!(dialer.connect(), answer).0.err().unwrap()
        };
        assert!(matches!(answered(20, b"{").await, ConnectError::Connect { .. }));
        let long = KEY_BODY_MAX + 1;
        assert!(matches!(answered(long, &vec![b' '; long]).await, ConnectError::NotControl { .. }));
    }
}
