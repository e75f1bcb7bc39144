//! DNS over HTTP (RFC 8484): at a peer's PeerAPI inside the tunnel, where WireGuard is the encryption, and over TLS.
//!
//! The PeerAPI refuses requests that look like a browser's, so a question carries nothing but what it needs.
//! Connections are kept for the next question. One that has died meanwhile, with or without a word, costs a moment: the
//! question is put again on a new one.
//! Source: Tailscale, ipn/ipnlocal/peerapi.go, `handleDNSQuery`; net/tsdial/dohclient.go.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hickory_proto::op::Message;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::{Request, Response, StatusCode, Uri, header};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::TlsConnector;
use tower_service::Service;

use super::answer::Failure;
use super::networks::{Network, Networks};
use crate::transport::race::race;
use crate::transport::underlay::BoxIo;

/// The most octets of an answer (RFC 1035, 4.2.2).
const ANSWER_MAX: usize = 64 << 10;
/// The media type of questions and answers (RFC 8484, 6).
const DNS_MESSAGE: &str = "application/dns-message";
/// How long a connection is kept that nothing is asked on. A page's names come within seconds of each other.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// The most connections that are kept of one resolver: both families of two names.
const IDLE_CONNECTIONS: usize = 4;
/// How long a kept connection has to answer before the question is put on a new one beside it. Answers of connectors
/// take tens of milliseconds, and what took longer is seldom lost.
const STALE_AFTER: Duration = Duration::from_millis(1500);

/// A resolver that is asked over HTTP.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Server {
    /// What is asked, and under which name: `http` or `https`, host, port and path.
    pub(super) uri: Uri,
    /// Where it is; at least one.
    pub(super) addresses: Vec<IpAddr>,
    /// Where those are.
    pub(super) network: Network,
}

/// Connections to resolvers, kept.
#[derive(Default)]
pub(super) struct Lines {
    kept: Mutex<HashMap<Server, Line>>,
}

type Line = Arc<Client<Connector, Full<Bytes>>>;

impl Lines {
    /// The line to `server`, and whether it was there before.
    fn line(&self, networks: &Arc<Networks>, server: &Server) -> (Line, bool) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        match kept.get(server) {
            Some(line) => (line.clone(), true),
            None => {
                let line = new_line(networks, server);
                kept.insert(server.clone(), line.clone());
                (line, false)
            }
        }
    }

    /// A new line to `server` instead of `stale`, whose connections end with the questions on them; the one that another
    /// question has put in its place already, if any.
    fn renew(&self, networks: &Arc<Networks>, server: &Server, stale: &Line) -> Line {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        match kept.get(server) {
            Some(line) if !Arc::ptr_eq(line, stale) => line.clone(),
            Some(_) | None => {
                let line = new_line(networks, server);
                kept.insert(server.clone(), line.clone());
                line
            }
        }
    }
}

fn new_line(networks: &Arc<Networks>, server: &Server) -> Line {
    let connector = Connector { networks: networks.clone(), server: Arc::new(server.clone()) };
    let client = Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_LIMIT)
        .pool_max_idle_per_host(IDLE_CONNECTIONS)
        .build(connector);
    Arc::new(client)
}

/// Puts one question. The caller bounds the time.
pub(super) async fn ask(
    networks: &Arc<Networks>,
    lines: &Lines,
    server: &Server,
    question: &Message,
) -> Result<Message, Failure> {
    let question = question.to_vec().map_err(|error| Failure::Unreachable(error.to_string()))?;
    answer(post(networks, lines, server, DNS_MESSAGE, question.into()).await?).await
}

/// Posts octets of a media type; a response with success. The caller bounds the time.
pub(super) async fn post(
    networks: &Arc<Networks>,
    lines: &Lines,
    server: &Server,
    media_type: &'static str,
    octets: Bytes,
) -> Result<Response<Incoming>, Failure> {
    let (line, was_there) = lines.line(networks, server);
    // An attempt fails only where the connection did: another one may serve. What the resolver says counts.
    let (line, tries) = (&line, if was_there { 2 } else { 1 });
    let attempts = (0..tries).map(|index| {
        let request = request(server, media_type, octets.clone());
        async move {
            let line = if index == 0 { line.clone() } else { lines.renew(networks, server, line) };
            line.request(request).await
        }
    });
    let response = race(attempts, STALE_AFTER).await.map_err(unreachable)?;
    match response.status() {
        StatusCode::OK => Ok(response),
        StatusCode::FORBIDDEN => Err(Failure::Forbidden),
        status => Err(Failure::Answered(format!("HTTP {}", status.as_u16()))),
    }
}

fn request(server: &Server, media_type: &'static str, octets: Bytes) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::from(octets));
    *request.method_mut() = hyper::Method::POST;
    *request.uri_mut() = server.uri.clone();
    let media_type = header::HeaderValue::from_static(media_type);
    request.headers_mut().insert(header::CONTENT_TYPE, media_type.clone());
    request.headers_mut().insert(header::ACCEPT, media_type);
    request
}

/// What the last attempt failed of, which was the one on a new connection.
fn unreachable(failures: Vec<hyper_util::client::legacy::Error>) -> Failure {
    let Some(error) = failures.into_iter().next_back() else { return Failure::Silent };
    let mut source: &(dyn std::error::Error + 'static) = &error;
    while let Some(deeper) = source.source() {
        source = deeper;
    }
    if source.downcast_ref::<io::Error>().is_some_and(|io| io.kind() == io::ErrorKind::TimedOut) {
        return Failure::Silent;
    }
    Failure::Unreachable(source.to_string())
}

/// The message in a response, or what is wrong with it.
async fn answer(response: Response<Incoming>) -> Result<Message, Failure> {
    let media_type = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media_type = media_type.unwrap_or("none").split(';').next().unwrap_or_default().trim();
    if !media_type.eq_ignore_ascii_case(DNS_MESSAGE) {
        return Err(Failure::Answered(format!("HTTP content of type {media_type:?}")));
    }
    let oversize = || Failure::Answered(format!("more than {ANSWER_MAX} octets"));
    if response.body().size_hint().lower() > ANSWER_MAX as u64 {
        return Err(oversize());
    }
    let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
    let body = body.map_err(|error| match error.downcast::<LengthLimitError>() {
        Ok(_) => oversize(),
        Err(error) => Failure::Unreachable(error.to_string()),
    })?;
    Message::from_vec(&body.to_bytes()).map_err(|_| Failure::Answered("no DNS message".to_owned()))
}

/// Connects to one resolver, whatever it is asked for.
#[derive(Clone)]
struct Connector {
    networks: Arc<Networks>,
    server: Arc<Server>,
}

impl Connector {
    async fn connect(self) -> io::Result<TokioIo<Wire>> {
        let Server { uri, addresses, network } = &*self.server;
        let host = uri.host().unwrap_or_default();
        let secure = uri.scheme() == Some(&http::uri::Scheme::HTTPS);
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let io = self.networks.connect(*network, host, addresses, port).await?;
        if !secure {
            return Ok(TokioIo::new(Wire { io, h2: false }));
        }
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned()).map_err(io::Error::other)?;
        let io = TlsConnector::from(self.networks.tls.clone()).connect(name, io).await?;
        let h2 = io.get_ref().1.alpn_protocol() == Some(b"h2");
        Ok(TokioIo::new(Wire { io: Box::new(io), h2 }))
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Wire>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<TokioIo<Wire>>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        Box::pin(self.clone().connect())
    }
}

/// A connection to a resolver.
struct Wire {
    io: BoxIo,
    /// Whether HTTP/2 was agreed upon.
    h2: bool,
}

impl Connection for Wire {
    fn connected(&self) -> Connected {
        if self.h2 { Connected::new().negotiated_h2() } else { Connected::new() }
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, octets)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::{Config, Node};

    #[tokio::test(flavor = "local")]
    async fn a_line_that_several_questions_find_stale_is_renewed_once() {
        let node = Node::alone(Config::default());
        let networks = node.inner.resolvers.memory.borrow().networks.clone();
        let (lines, ip) = (Lines::default(), IpAddr::from([100, 64, 0, 2]));
        let uri = "http://100.64.0.2:1/dns-query".parse().unwrap();
        let server = Server { uri, addresses: vec![ip], network: Network::Tunnel };
        let (stale, _) = lines.line(&networks, &server);
        let renewed = lines.renew(&networks, &server, &stale);
        assert!(!Arc::ptr_eq(&renewed, &stale));
        assert!(Arc::ptr_eq(&lines.renew(&networks, &server, &stale), &renewed));
        assert!(!Arc::ptr_eq(&lines.renew(&networks, &server, &renewed), &renewed));
    }
}
