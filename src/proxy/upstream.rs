//! A client's connection to the target of its plain requests, kept from one to the next.
//!
//! Source: RFC 9112, 9.3.1 (when a request may be sent again).

use std::rc::Rc;

use bytes::Bytes;
use http::{Method, Request, Response};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use super::body::{RequestBody, is_reset};
use super::http::{Refusal, Session};
use crate::fault::{self, Fault, Row};
use crate::node::{Stream, Target};

/// A connection to a target that speaks HTTP/1.1.
pub(super) struct Upstream {
    target: Target,
    sender: SendRequest<RequestBody>,
    /// The stream, and what was read from it beyond the last head, when the HTTP connection has ended well.
    released: oneshot::Receiver<(Stream, Bytes)>,
    driver: AbortHandle,
    /// Whether nothing is under way: then the connection may end by itself, else it is cut.
    resting: bool,
    /// Whether a request's body was never sent, so that the next request would be taken for it.
    pub(super) owes_body: bool,
}

impl Upstream {
    async fn open(target: Target, stream: Stream) -> Result<Self, Refusal> {
        let handshake = http1::handshake::<_, RequestBody>(TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(|error| refused(&fault::INTERNAL, error.to_string(), &target))?;
        let (release, released) = oneshot::channel();
        let driver = tokio::task::spawn_local(async move {
            let Ok(parts) = connection.without_shutdown().await else { return };
            if let Err((mut stream, _)) = release.send((parts.io.into_inner(), parts.read_buf)) {
                let _ = stream.shutdown().await;
            }
        });
        Ok(Self { target, sender, released, driver: driver.abort_handle(), resting: false, owes_body: false })
    }

    /// Back at work, if it leads to `target` and still stands.
    pub(super) fn wake(mut self, target: &Target) -> Option<Self> {
        if self.target != *target || !self.sender.is_ready() {
            return None;
        }
        self.resting = false;
        Some(self)
    }

    /// Out of work, if it can carry another request.
    pub(super) fn rest(mut self) -> Option<Self> {
        if self.owes_body || self.sender.is_closed() {
            return None;
        }
        self.resting = true;
        Some(self)
    }

    /// The stream, and what the target sent beyond its last head, once the HTTP connection has ended well: after a 101.
    pub(super) async fn released(&mut self) -> Option<(Stream, Bytes)> {
        (&mut self.released).await.ok()
    }

    pub(super) fn target(&self) -> &Target {
        &self.target
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if !self.resting {
            self.driver.abort();
        }
    }
}

/// Sends the request on the kept connection, or on a new one. A kept one may have been closed by the target at that
/// very moment: then the request is sent again, if it never left, or if it has no body and is safe to repeat.
pub(super) async fn send(
    session: &Rc<Session>,
    request: Request<RequestBody>,
    target: Target,
) -> Result<(Upstream, Response<Incoming>), Refusal> {
    let request = match session.kept(&target) {
        None => request,
        Some(mut upstream) => {
            let again = repeatable(&request);
            let mut error = match upstream.sender.try_send_request(request).await {
                Ok(response) => return Ok((upstream, response)),
                Err(error) => error,
            };
            match error.take_message().or(again) {
                Some(request) => request,
                None => return Err(failed(&error.into_error(), &target)),
            }
        }
    };
    let stream = session.dial(&target).await?;
    let mut upstream = Upstream::open(target, stream).await?;
    match upstream.sender.send_request(request).await {
        Ok(response) => Ok((upstream, response)),
        Err(error) => Err(failed(&error, &upstream.target)),
    }
}

/// A copy of a request that may be sent twice.
fn repeatable(request: &Request<RequestBody>) -> Option<Request<RequestBody>> {
    let safe = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    if !safe || !request.body().is_end_stream() {
        return None;
    }
    let mut copy = Request::new(RequestBody::default());
    copy.method_mut().clone_from(request.method());
    copy.uri_mut().clone_from(request.uri());
    copy.headers_mut().clone_from(request.headers());
    Some(copy)
}

/// What a failure before the answer's head means.
fn failed(error: &hyper::Error, target: &Target) -> Refusal {
    if error.is_parse() {
        return refused(&fault::UPSTREAM_PROTOCOL, format!("{target} does not answer in HTTP/1.1: {error}"), target);
    }
    if error.is_user() {
        return refused(&fault::BAD_REQUEST, String::from("the request's body is not whole"), target);
    }
    let how = if is_reset(error) { "reset" } else { "closed" };
    refused(&fault::UPSTREAM_CLOSED, format!("{target} {how} the connection before it answered"), target)
}

pub(super) fn refused(row: &'static Row, detail: String, target: &Target) -> Refusal {
    Refusal { fault: Fault { row, detail }, target: Some(target.clone()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::Config;
    use crate::proxy::bed::{self, answering, asked, expect_bytes, read_head};

    #[test]
    fn both_connections_serve_request_after_request() {
        bed::run(async {
            let (bed, target) =
                (bed::start(Config::default()), answering("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi").await);
            let other = answering("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nyou\r\n0\r\n\r\n").await;
            let mut client = bed.connect().await;
            for (address, body) in
                [(target, "hi"), (target, "hi"), (other, "3\r\nyou\r\n0\r\n\r\n"), (other, "3\r\nyou\r\n0\r\n\r\n")]
            {
                client.write_all(format!("GET http://{address}/ HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
                read_head(&mut client).await;
                expect_bytes(&mut client, body.as_bytes()).await;
            }
            assert_eq!(bed.stats.counters().succeeded, 4);
        });
    }

    #[test]
    fn second_request_uses_the_first_ones_connection() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let (mut client, mut target) = asked(&bed, "GET http://TARGET/1 HTTP/1.1\r\n\r\n").await;
            let address = target.local_addr().unwrap();
            for number in 2..5 {
                read_head(&mut target).await;
                target.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n").await.unwrap();
                read_head(&mut client).await;
                expect_bytes(&mut client, b"0\r\n\r\n").await;
                let next = format!("GET http://{address}/{number} HTTP/1.1\r\n\r\n");
                client.write_all(next.as_bytes()).await.unwrap();
            }
            assert!(read_head(&mut target).await.starts_with("GET /4 "));
        });
    }

    #[test]
    fn kept_connection_that_the_target_closed_is_replaced() {
        bed::run(async {
            let bed = bed::start(Config::default());
            // Each connection serves one request without saying that it is the last.
            let target = bed::target(|mut connection| async move {
                read_head(&mut connection).await;
                connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx").await.unwrap();
            })
            .await;
            let mut client = bed.connect().await;
            for _ in 0..5 {
                client.write_all(format!("GET http://{target}/ HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
                let head = read_head(&mut client).await;
                assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
                expect_bytes(&mut client, b"x").await;
            }
        });
    }

    #[test]
    fn target_gone_before_its_answer_is_a_502() {
        bed::run(async {
            let bed = bed::start(Config::default());
            for reset in [false, true] {
                let (mut client, mut target) = asked(&bed, "GET http://TARGET/ HTTP/1.1\r\n\r\n").await;
                read_head(&mut target).await;
                if reset {
                    target.set_zero_linger().unwrap();
                }
                drop(target);
                let head = read_head(&mut client).await;
                assert!(head.starts_with("HTTP/1.1 502 ") && head.contains("error=connection_terminated"), "{head}");
            }
        });
    }

    #[test]
    fn target_that_does_not_speak_http_is_a_502() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let (mut client, mut target) = asked(&bed, "GET http://TARGET/ HTTP/1.1\r\n\r\n").await;
            target.write_all(b"SSH-2.0-OpenSSH_10\r\n\r\n").await.unwrap();
            let head = read_head(&mut client).await;
            assert!(head.starts_with("HTTP/1.1 502 ") && head.contains("error=http_protocol_error"), "{head}");
        });
    }
}
