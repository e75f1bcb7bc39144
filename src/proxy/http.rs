//! One client's HTTP/1.1 connection: CONNECT, plain requests, and everything that is neither.
//!
//! CONNECT is answered with a head alone, and only after the target has answered; then the socket is taken back from
//! the HTTP library and carries bytes. A refused CONNECT closes the connection: what a client sent on ahead was meant
//! for the target and must not be read as a request. Source: RFC 9110, 9.3.6.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONNECTION, PROXY_AUTHORIZATION};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::Proxy;
use super::answer::{self, Audience};
use super::body::{AnswerBody, ReplyBody};
use super::forward;
use super::head::{self, HeadError};
use super::request::{connectable, forwardable};
use super::socket::{Due, SharedSocket, gone};
use super::splice::{Opened, Tunnel, farewell};
use super::stats::Stats;
use super::upstream::Upstream;
use crate::fault::{self, Fault, Row};
use crate::node::client::end_by_reset;
use crate::node::{Stream, Target};

/// Most bytes that the HTTP library reads ahead from a client.
const READ_AHEAD: usize = 64 * 1024;

/// What a client's connection carries from one of its requests to the next.
pub(super) struct Session {
    proxy: Rc<Proxy>,
    audience: Audience,
    refusal: Option<&'static Row>,
    /// The connection of the last plain request, if it can carry another.
    idle: RefCell<Option<Upstream>>,
    /// What becomes of the client's socket once the last answer's head is out.
    upgraded: RefCell<Option<(OnUpgrade, Tunnel)>>,
    /// Whether the client has to learn by a reset that its answer broke off.
    reset: Cell<bool>,
    /// Whether the client speaks HTTP/1.0, which takes the end of the connection for the end of the answer.
    by_close: Cell<bool>,
    due: Arc<Due>,
}

/// Why a request is not served, and what it asked for if it came that far.
pub(super) struct Refusal {
    pub(super) fault: Fault,
    pub(super) target: Option<Target>,
}

/// One HTTP connection, from its first byte until it ends or is a tunnel.
pub(super) async fn serve(
    proxy: &Rc<Proxy>,
    client: TcpStream,
    peer: SocketAddr,
    refusal: Option<&'static Row>,
) -> Option<Opened> {
    let audience = Audience::of(peer);
    let limit = proxy.config.head_timeout;
    let fault = match timeout(limit, head::first(&client, proxy.config.head_limit)).await {
        Ok(Ok(head)) => return exchange(proxy, client, head, audience, refusal).await,
        Ok(Err(HeadError::Gone)) => return None,
        Ok(Err(HeadError::Refused(fault))) => fault,
        Err(_) => head::late(limit),
    };
    refuse(proxy, client, audience, &fault).await;
    None
}

/// Answers what is neither SOCKS nor HTTP, in the words of HTTP, which most such clients show to their user.
pub(super) async fn refuse_unknown(proxy: &Proxy, client: TcpStream, peer: SocketAddr, first: u8) {
    let detail = match first {
        0x16 => String::from("this port speaks SOCKS5 and HTTP without TLS, and the client began with TLS"),
        _ => format!("the first byte, {first:#04x}, begins neither SOCKS5 nor HTTP"),
    };
    refuse(proxy, client, Audience::of(peer), &Fault { row: &fault::BAD_REQUEST, detail }).await;
}

/// One answer to a connection that never became an HTTP connection, or is one no more.
async fn refuse(proxy: &Proxy, mut client: TcpStream, audience: Audience, fault: &Fault) {
    proxy.note(fault, None);
    if client.write_all(&answer::message(fault, audience)).await.is_ok() {
        farewell(client).await;
    }
}

/// Request after request, and the tunnel that the last one may have opened.
async fn exchange(
    proxy: &Rc<Proxy>,
    client: TcpStream,
    head: Bytes,
    audience: Audience,
    refusal: Option<&'static Row>,
) -> Option<Opened> {
    // Dropped in the middle of an answer, the client shall not take the part for the whole.
    end_by_reset(&client);
    let client = Arc::new(client);
    let session = Rc::new(Session {
        proxy: Rc::clone(proxy),
        audience,
        refusal,
        idle: RefCell::new(None),
        upgraded: RefCell::new(None),
        reset: Cell::new(false),
        by_close: Cell::new(false),
        due: Arc::new(Due::new(Arc::clone(&proxy.stats))),
    });
    let socket = SharedSocket::new(Arc::clone(&client), Arc::clone(&session.due), head);
    let ended = tokio::select! {
        biased;
        ended = requests(&session, socket) => ended,
        () = gone(&client) => {
            tracing::debug!("client gone");
            return None;
        }
    };
    session.idle.take();
    let upgraded = session.upgraded.take();

    if ended.is_ok()
        && let Some((on_upgrade, tunnel)) = upgraded
    {
        return take_back(on_upgrade, tunnel, client).await;
    }
    // The HTTP connection is gone, and with it every other share of the socket.
    let client = Arc::into_inner(client)?;
    let between = session.due.is_nothing();
    let broke_off = ended.is_err() && !between && session.by_close.get();
    if session.reset.get() || broke_off {
        return None;
    }
    drop(session);
    match ended.err().flatten() {
        Some(fault) if between => refuse(proxy, client, audience, &fault).await,
        Some(_) | None => farewell(client).await,
    }
    None
}

/// Serves requests until the client has no more, the run drains, or one of them changes the protocol. An error is what
/// is wrong with what the client sent, if it is that which ended it.
async fn requests(session: &Rc<Session>, socket: SharedSocket) -> Result<(), Option<Fault>> {
    let service = service_fn(|request| {
        let (session, due) = (Rc::clone(session), Arc::clone(&session.due));
        async move {
            due.asked();
            Ok::<_, Infallible>(session.respond(request).await.map(|body| AnswerBody::new(body, due)))
        }
    });
    let config = &session.proxy.config;
    let mut connection = http1::Builder::new()
        .half_close(true)
        .timer(TokioTimer::new())
        .header_read_timeout(config.head_timeout)
        .max_header_size(config.head_limit)
        .max_headers(head::FIELDS)
        .max_buf_size(READ_AHEAD.max(config.head_limit))
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades();
    let ended = tokio::select! {
        // First the connection, so that a head that has arrived is seen before the drain ends an idle connection.
        biased;
        ended = &mut connection => Some(ended),
        () = session.proxy.drain.cancelled() => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            Pin::new(&mut connection).graceful_shutdown();
            (&mut connection).await
        }
    };
    let begun = || connection.into_parts().is_some_and(|parts| !parts.read_buf.trim_ascii().is_empty());
    ended.map_err(|error| head::unreadable(&error, config, begun))
}

/// Takes the client's socket back from the HTTP library.
async fn take_back(on_upgrade: OnUpgrade, tunnel: Tunnel, client: Arc<TcpStream>) -> Option<Opened> {
    let parts = on_upgrade.await.ok()?.downcast::<TokioIo<SharedSocket>>().ok()?;
    let mut early = parts.read_buf.to_vec();
    early.extend_from_slice(&parts.io.into_inner().into_unread());
    let client = Arc::into_inner(client)?;
    Some(Opened { tunnel, client, early })
}

impl Session {
    async fn respond(self: Rc<Self>, request: Request<Incoming>) -> Response<ReplyBody> {
        self.by_close.set(request.version() < Version::HTTP_11);
        let audience = self.audience.accepting(request.headers());
        let is_connect = request.method() == Method::CONNECT;
        let served = match self.admit(&request) {
            Err(fault) => Err(untargeted(fault)),
            Ok(()) if is_connect => self.connect(request).await,
            Ok(()) => self.forward(request).await,
        };
        let Refusal { fault, target } = match served {
            Ok(response) => return response,
            Err(refusal) => refusal,
        };
        self.proxy.note(&fault, target.as_ref());
        let mut response = answer::response(&fault, audience).map(ReplyBody::own);
        // A client that lacks credentials tries again on the same connection.
        if is_connect && response.status() != StatusCode::PROXY_AUTHENTICATION_REQUIRED || self.refusal.is_some() {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// Whether this client may use the proxy.
    fn admit(&self, request: &Request<Incoming>) -> Result<(), Fault> {
        let Some(credentials) = &self.proxy.config.credentials else { return Ok(()) };
        let shown = request.headers().get(PROXY_AUTHORIZATION);
        if shown.is_some_and(|shown| credentials.admit_basic(shown.as_bytes())) {
            return Ok(());
        }
        let what = if shown.is_some() { "wrong" } else { "missing" };
        Err(Fault { row: &fault::CREDENTIALS, detail: format!("Proxy-Authorization is {what}") })
    }

    async fn connect(self: &Rc<Self>, mut request: Request<Incoming>) -> Result<Response<ReplyBody>, Refusal> {
        let target = connectable(&request).map_err(untargeted)?;
        let on_upgrade = hyper::upgrade::on(&mut request);
        let stream = self.dial(&target).await?;
        self.proxy.stats.target_answered();
        self.change_protocol(on_upgrade, Tunnel { target, stream, received: Bytes::new() });
        Ok(Response::new(ReplyBody::own(Bytes::new())))
    }

    async fn forward(self: &Rc<Self>, request: Request<Incoming>) -> Result<Response<ReplyBody>, Refusal> {
        let target = forwardable(&request).map_err(untargeted)?;
        forward::forward(self, request, target).await
    }

    /// Reaches `target`, as [`Proxy::dial`] does.
    pub(super) async fn dial(&self, target: &Target) -> Result<Stream, Refusal> {
        let dialled = self.proxy.dial(target, self.refusal).await;
        dialled.map_err(|fault| Refusal { fault, target: Some(target.clone()) })
    }

    /// Has the client's socket carry `tunnel` once the answer's head is out.
    pub(super) fn change_protocol(&self, on_upgrade: OnUpgrade, tunnel: Tunnel) {
        self.upgraded.replace(Some((on_upgrade, tunnel)));
    }

    pub(super) fn stats(&self) -> &Stats {
        &self.proxy.stats
    }

    /// The kept connection, if it leads to `target`; another is given up.
    pub(super) fn kept(&self, target: &Target) -> Option<Upstream> {
        self.idle.take().and_then(|upstream| upstream.wake(target))
    }

    /// Keeps a connection for the next request.
    pub(super) fn keep(&self, upstream: Upstream) {
        self.idle.replace(upstream.rest());
    }

    /// A target's body ended too early: the client's connection will be cut, so that it cannot take the part for the
    /// whole.
    pub(super) fn target_broke_off(&self, target: &Target, reset: bool) {
        self.reset.set(reset || self.by_close.get());
        let how = if reset { "reset the connection" } else { "broke off" };
        let fault =
            Fault { row: &fault::UPSTREAM_CLOSED, detail: format!("{target} {how} in the middle of its answer") };
        self.proxy.note(&fault, Some(target));
    }
}

/// A refusal of a request whose target is not known.
fn untargeted(fault: Fault) -> Refusal {
    Refusal { fault, target: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    use tokio::io::AsyncReadExt;

    use crate::proxy::bed::{self, expect_bytes, read_head};
    use crate::proxy::{Config, Credentials};

    const OK: &str = "HTTP/1.1 200 OK\r\n";

    #[test]
    fn connect_answers_with_a_head_alone_and_then_carries_bytes() {
        bed::run(async {
            let (bed, echo) = (bed::start(Config::default()), bed::echo().await);
            let mut client = bed.connect().await;
            let request = format!("CONNECT {echo} HTTP/1.1\r\nHost: {echo}\r\n\r\nearly");
            client.write_all(request.as_bytes()).await.unwrap();
            let head = read_head(&mut client).await;
            assert!(head.starts_with(OK), "{head}");
            assert!(!head.contains("content-length") && !head.contains("transfer-encoding"), "{head}");
            expect_bytes(&mut client, b"early").await;
            client.write_all(b" late").await.unwrap();
            client.shutdown().await.unwrap();
            expect_bytes(&mut client, b" late").await;
            assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        });
    }

    #[test]
    fn connect_takes_ipv6_literals() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let listener = tokio::net::TcpListener::bind("[::1]:0").await.expect("loopback has IPv6");
            let mut client = bed.connect().await;
            let request = format!("CONNECT {} HTTP/1.1\r\n\r\n", listener.local_addr().unwrap());
            client.write_all(request.as_bytes()).await.unwrap();
            assert!(read_head(&mut client).await.starts_with(OK));
            listener.accept().await.unwrap().0.write_all(b"hi").await.unwrap();
            expect_bytes(&mut client, b"hi").await;
        });
    }

    #[test]
    fn reset_behind_connect_is_a_reset() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let target = bed::target(|mut connection| async move {
                let _ = connection.read_u8().await;
                connection.set_zero_linger().unwrap();
            });
            let target = target.await;
            let mut client = bed.connect().await;
            client.write_all(format!("CONNECT {target} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
            assert!(read_head(&mut client).await.starts_with(OK));
            client.write_all(b"x").await.unwrap();
            assert_eq!(client.read_u8().await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
        });
    }

    #[test]
    fn refused_connect_ends_its_connection() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let answer = bed.ask_text("CONNECT 8.8.8.8:443 HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n").await;
            assert!(answer.contains("connection: close\r\n"), "{answer}");
            assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        });
    }

    #[test]
    fn credentials_are_asked_for_and_the_connection_kept() {
        bed::run(async {
            let credentials = Some(Credentials::new("user", "secret"));
            let (bed, echo) = (bed::start(Config { credentials, ..Config::default() }), bed::echo().await);
            let mut client = bed.connect().await;
            let request = format!("CONNECT {echo} HTTP/1.1\r\n");
            client.write_all(format!("{request}\r\n").as_bytes()).await.unwrap();
            let head = read_head(&mut client).await;
            assert!(head.starts_with("HTTP/1.1 407 "), "{head}");
            assert!(head.contains("proxy-authenticate: Basic realm=\"tailcar\""), "{head}");
            let length = head.split("content-length: ").nth(1).unwrap().split("\r\n").next().unwrap().parse().unwrap();
            client.read_exact(&mut vec![0; length]).await.unwrap();
            let shown = "Proxy-Authorization: Basic dXNlcjpzZWNyZXQ=\r\n\r\n";
            client.write_all(format!("{request}{shown}").as_bytes()).await.unwrap();
            assert!(read_head(&mut client).await.starts_with(OK));
            assert_eq!(bed.codes(), [fault::CREDENTIALS.code]);
        });
    }

    #[test]
    fn page_is_for_those_who_accept_it() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let request = "GET http://example.com/ HTTP/1.1\r\nAccept: text/html\r\nConnection: close\r\n\r\n";
            let answer = bed.ask_text(request).await;
            assert!(answer.contains("content-type: text/html") && answer.contains("<h1>"), "{answer}");
        });
    }
}
