//! Plain `http://` requests: one client's request becomes ours to the target, its answer the client's.
//!
//! `Expect: 100-continue` goes end to end: the client's body is not asked for before the target has said that it wants
//! it.
//! Source: RFC 9110, 7.6, 7.8, 10.1.1.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, EXPECT};
use http::{HeaderValue, Request, Response, StatusCode, Uri, Version};
use hyper::body::{Body as _, Incoming};
use hyper::upgrade::OnUpgrade;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::body::{ReplyBody, RequestBody};
use super::fields;
use super::http::{Refusal, Session};
use super::splice::Tunnel;
use super::upstream::{Upstream, refused, send};
use crate::fault;
use crate::node::Target;

/// How long a target may leave `Expect: 100-continue` unanswered before the body is sent all the same, as it must be
/// to servers that do not know the expectation. Clients wait about as long themselves.
const CONTINUE_WAIT: Duration = Duration::from_secs(1);

/// Has `target` answer `request`.
pub(super) async fn forward(
    session: &Rc<Session>,
    mut request: Request<Incoming>,
    target: Target,
) -> Result<Response<ReplyBody>, Refusal> {
    let on_upgrade = fields::wanted_upgrade(request.headers()).map(|_| hyper::upgrade::on(&mut request));
    let expects =
        request.headers().get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    let gate = (expects && !request.body().is_end_stream()).then(CancellationToken::new);
    let sent = Rc::new(Cell::new(0));
    let request = onward(request, gate.as_ref(), &sent);

    let sending = send(session, request, target);
    let (mut upstream, response) = match &gate {
        None => sending.await?,
        Some(gate) => {
            let mut sending = std::pin::pin!(sending);
            match timeout(CONTINUE_WAIT, &mut sending).await {
                Ok(answered) => answered?,
                Err(_) => {
                    gate.cancel();
                    sending.await?
                }
            }
        }
    };
    upstream.owes_body = gate.is_some_and(|gate| !gate.is_cancelled());
    session.stats().target_answered();
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return switch(session, upstream, response, on_upgrade).await;
    }
    answer(session, upstream, response, sent)
}

/// The request as the target gets it.
fn onward(request: Request<Incoming>, gate: Option<&CancellationToken>, sent: &Rc<Cell<u64>>) -> Request<RequestBody> {
    let (parts, incoming) = request.into_parts();
    let mut onward = Request::new(RequestBody::new(incoming, gate.cloned(), Rc::clone(sent)));
    *onward.method_mut() = parts.method;
    *onward.version_mut() = Version::HTTP_11;
    *onward.headers_mut() = parts.headers;
    if let Some(authority) = parts.uri.authority() {
        fields::onward(onward.headers_mut(), authority);
    }
    *onward.uri_mut() = parts.uri.path_and_query().cloned().map_or(Uri::from_static("/"), Uri::from);
    if let Some(gate) = gate.cloned() {
        hyper::ext::on_informational(&mut onward, move |response| {
            if response.status() == StatusCode::CONTINUE {
                gate.cancel();
            }
        });
    }
    onward
}

/// The answer as the client gets it.
fn answer(
    session: &Rc<Session>,
    upstream: Upstream,
    response: Response<Incoming>,
    sent: Rc<Cell<u64>>,
) -> Result<Response<ReplyBody>, Refusal> {
    if fields::coded(response.headers()) {
        let detail = format!("{} uses a transfer coding besides chunked", upstream.target());
        return Err(refused(&fault::UPSTREAM_PROTOCOL, detail, upstream.target()));
    }
    let (mut parts, incoming) = response.into_parts();
    fields::back(&mut parts.headers, false);
    if upstream.owes_body {
        // The client may send its body all the same, or not: only the end of the connection tells it from a request.
        parts.headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    let mut onward = Response::new(ReplyBody::target(incoming, upstream, Rc::clone(session), sent));
    *onward.status_mut() = parts.status;
    *onward.headers_mut() = parts.headers;
    Ok(onward)
}

/// Both connections change their protocol; bytes flow once the client has read our 101.
async fn switch(
    session: &Rc<Session>,
    mut upstream: Upstream,
    response: Response<Incoming>,
    on_upgrade: Option<OnUpgrade>,
) -> Result<Response<ReplyBody>, Refusal> {
    let target = upstream.target().clone();
    let Some(on_upgrade) = on_upgrade else {
        let detail = format!("{target} changed the protocol without being asked");
        return Err(refused(&fault::UPSTREAM_PROTOCOL, detail, &target));
    };
    let Some((stream, received)) = upstream.released().await else {
        return Err(refused(&fault::UPSTREAM_CLOSED, format!("{target} closed after its 101"), &target));
    };
    session.change_protocol(on_upgrade, Tunnel { target, stream, received });
    let mut onward = Response::new(ReplyBody::own(Bytes::new()));
    *onward.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *onward.headers_mut() = response.into_parts().0.headers;
    fields::back(onward.headers_mut(), true);
    Ok(onward)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::proxy::Config;
    use crate::proxy::bed::{self, answering, asked, expect_bytes, read_head};

    #[test]
    fn request_and_answer_lose_what_is_of_one_connection_only() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let request = "GET http://TARGET/a?b=c HTTP/1.1\r\nHost: other\r\nProxy-Connection: keep-alive\r\n\
                           Connection: X-Mine\r\nX-Mine: 1\r\nX-Theirs: 2\r\n\r\n";
            let (mut client, mut target) = asked(&bed, request).await;
            let head = read_head(&mut target).await.to_ascii_lowercase();
            assert!(head.starts_with("get /a?b=c http/1.1\r\n"), "{head}");
            let address = target.local_addr().unwrap();
            assert!(head.contains(&format!("host: {address}\r\n")) && head.contains("x-theirs: 2\r\n"), "{head}");
            assert!(!head.contains("x-mine") && !head.contains("proxy-") && !head.contains("via"), "{head}");
            let answer = "HTTP/1.1 200 OK\r\nConnection: X-Hop\r\nX-Hop: 1\r\nX-End: 2\r\nContent-Length: 2\r\n\r\nhi";
            target.write_all(answer.as_bytes()).await.unwrap();
            let head = read_head(&mut client).await;
            assert!(
                head.contains("x-end: 2") && head.contains("content-length: 2") && !head.contains("x-hop"),
                "{head}"
            );
            expect_bytes(&mut client, b"hi").await;
        });
    }

    #[test]
    fn chunked_bodies_pass_both_ways_with_trailers() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let request = "POST http://TARGET/ HTTP/1.1\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n\
                           5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n";
            let (mut client, mut target) = asked(&bed, request).await;
            let head = read_head(&mut target).await;
            assert!(head.contains("transfer-encoding: chunked") && head.contains("te: trailers"), "{head}");
            expect_bytes(&mut target, b"5\r\nhello\r\n0\r\nx-sum: 1\r\n\r\n").await;
            let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nyo\r\n0\r\nX-Sum: 2\r\n\r\n";
            target.write_all(answer.as_bytes()).await.unwrap();
            assert!(read_head(&mut client).await.contains("transfer-encoding: chunked"));
            expect_bytes(&mut client, b"2\r\nyo\r\n0\r\nx-sum: 2\r\n\r\n").await;
        });
    }

    #[test]
    fn length_beside_chunks_does_not_cut_the_answer() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let (mut client, mut target) = asked(&bed, "GET http://TARGET/ HTTP/1.1\r\n\r\n").await;
            read_head(&mut target).await;
            let answer =
                b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
            target.write_all(answer).await.unwrap();
            let head = read_head(&mut client).await;
            assert!(head.contains("transfer-encoding: chunked") && !head.contains("content-length"), "{head}");
            expect_bytes(&mut client, b"5\r\nhello\r\n0\r\n\r\n").await;
        });
    }

    const EXPECTING: &str = "POST http://TARGET/ HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n";

    #[test]
    fn body_waits_for_the_targets_100() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let (mut client, mut target) = asked(&bed, EXPECTING).await;
            assert!(read_head(&mut target).await.contains("expect: 100-continue"));
            target.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
            assert!(read_head(&mut client).await.starts_with("HTTP/1.1 100 "));
            client.write_all(b"body").await.unwrap();
            expect_bytes(&mut target, b"body").await;
            target.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
            assert!(read_head(&mut client).await.starts_with("HTTP/1.1 204 "));
        });
    }

    #[test]
    fn targets_refusal_reaches_a_client_that_holds_its_body_back() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let (mut client, mut target) = asked(&bed, EXPECTING).await;
            read_head(&mut target).await;
            target.write_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 413 ") && answer.ends_with("\r\n\r\nno"), "{answer}");
            assert!(answer.contains("connection: close\r\n"), "{answer}");
        });
    }

    #[test]
    fn target_that_ignores_the_expectation_gets_the_body_all_the_same() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let (mut client, mut target) = asked(&bed, EXPECTING).await;
            read_head(&mut target).await;
            assert!(read_head(&mut client).await.starts_with("HTTP/1.1 100 "));
            client.write_all(b"body").await.unwrap();
            expect_bytes(&mut target, b"body").await;
        });
    }

    const UPGRADING: &str = "GET http://TARGET/ws HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";

    #[test]
    fn upgrade_passes_and_carries_bytes_both_ways() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let (mut client, mut target) = asked(&bed, UPGRADING).await;
            let head = read_head(&mut target).await;
            assert!(head.contains("connection: upgrade\r\n") && head.contains("upgrade: websocket\r\n"), "{head}");
            let answer = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nfirst";
            target.write_all(answer).await.unwrap();
            let head = read_head(&mut client).await;
            assert!(head.starts_with("HTTP/1.1 101 ") && head.contains("upgrade: websocket\r\n"), "{head}");
            expect_bytes(&mut client, b"first").await;
            client.write_all(b"up").await.unwrap();
            expect_bytes(&mut target, b"up").await;
            target.write_all(b"down").await.unwrap();
            expect_bytes(&mut client, b"down").await;
        });
    }

    #[test]
    fn upgrade_that_the_target_declines_is_a_plain_answer() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let (mut client, mut target) = asked(&bed, UPGRADING).await;
            read_head(&mut target).await;
            target.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
            assert!(read_head(&mut client).await.starts_with("HTTP/1.1 404 "));
            expect_bytes(&mut client, b"no").await;
        });
    }

    #[test]
    fn answer_cut_in_the_middle_is_cut_for_the_client() {
        bed::run(async {
            let bed = bed::start(Config::default());
            for reset in [false, true] {
                let (mut client, mut target) = asked(&bed, "GET http://TARGET/ HTTP/1.1\r\n\r\n").await;
                read_head(&mut target).await;
                target.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf").await.unwrap();
                read_head(&mut client).await;
                expect_bytes(&mut client, b"half").await;
                if reset {
                    target.set_zero_linger().unwrap();
                }
                drop(target);
                let ended = client.read(&mut [0]).await.map_err(|error| error.kind());
                let expected = if reset { Err(std::io::ErrorKind::ConnectionReset) } else { Ok(0) };
                assert_eq!(ended, expected);
            }
            assert_eq!(bed.codes(), [fault::UPSTREAM_CLOSED.code; 2]);
        });
    }

    #[test]
    fn http_1_0_client_learns_of_an_answer_that_broke_off() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let (mut client, mut target) = asked(&bed, "GET http://TARGET/ HTTP/1.0\r\n\r\n").await;
            read_head(&mut target).await;
            target.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n").await.unwrap();
            read_head(&mut client).await;
            expect_bytes(&mut client, b"half").await;
            drop(target);
            let error = client.read(&mut [0]).await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        });
    }

    #[test]
    fn http_1_0_clients_get_their_answer_whole() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let target = answering("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n").await;
            let answer = bed.ask_text(&format!("GET http://{target}/ HTTP/1.0\r\n\r\n")).await;
            assert!(answer.starts_with("HTTP/1.0 200 ") && answer.ends_with("\r\n\r\nhi"), "{answer}");
        });
    }

    #[test]
    fn head_requests_keep_the_length_and_have_no_body() {
        bed::run(async {
            let (bed, target) =
                (bed::start(Config::default()), answering("HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n").await);
            let request = format!("HEAD http://{target}/ HTTP/1.1\r\nConnection: close\r\n\r\n");
            let answer = bed.ask_text(&request).await;
            assert!(answer.contains("content-length: 99\r\n") && answer.ends_with("\r\n\r\n"), "{answer}");
        });
    }
}
