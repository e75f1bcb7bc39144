//! DNS over HTTP at a peer's PeerAPI, inside the tunnel (RFC 8484, without TLS: WireGuard is the encryption).
//!
//! The PeerAPI refuses requests that look like a browser's, so a question carries nothing but what it needs.
//! Source: Tailscale, ipn/ipnlocal/peerapi.go, `handleDNSQuery`; net/tsdial/dohclient.go.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;

use super::bridge::Tunnel;

/// The longest that connecting to a PeerAPI may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// The most octets of an answer (RFC 1035, 4.2.2).
const ANSWER_MAX: usize = 64 << 10;
/// The media type of questions and answers (RFC 8484, 6).
const DNS_MESSAGE: &str = "application/dns-message";

/// A PeerAPI that answers names.
#[derive(Debug, Clone)]
pub(super) struct Server {
    pub(super) address: SocketAddr,
    pub(super) path: String,
}

/// Asks for both families on one connection. Addresses of either are enough.
pub(super) async fn lookup(tunnel: &Tunnel, server: &Server, name: &str) -> Result<Vec<IpAddr>, NetError> {
    let io = tunnel.connect(server.address, CONNECT_LIMIT).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await.map_err(io::Error::other)?;
    tokio::spawn(connection);
    let mut found = Vec::new();
    let mut failure = None;
    for kind in [RecordType::A, RecordType::AAAA] {
        match ask(&mut sender, server, name, kind).await.map(addresses) {
            Ok(Ok(addresses)) => found.extend(addresses),
            Ok(Err(code)) => failure = failure.or(Some(code)),
            // One family is enough to go on with.
            Err(error) if found.is_empty() => return Err(error),
            Err(_) => break,
        }
    }
    if found.is_empty() {
        return Err(NetError::Dns(DnsError::ResponseCode(failure.unwrap_or(ResponseCode::NoError))));
    }
    Ok(found)
}

async fn ask(
    sender: &mut http1::SendRequest<Full<Bytes>>,
    server: &Server,
    name: &str,
    kind: RecordType,
) -> Result<Message, NetError> {
    let mut question = Message::new(0, MessageType::Query, OpCode::Query);
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(Name::from_ascii(name)?, kind));
    let request = Request::post(&server.path)
        .header(header::HOST, server.address.to_string())
        .header(header::CONTENT_TYPE, DNS_MESSAGE)
        .header(header::ACCEPT, DNS_MESSAGE)
        .body(Full::from(question.to_vec()?))
        .map_err(io::Error::other)?;
    sender.ready().await.map_err(io::Error::other)?;
    let response = sender.send_request(request).await.map_err(io::Error::other)?;
    let status = response.status();
    if status.is_server_error() {
        return Err(NetError::Dns(DnsError::ResponseCode(ResponseCode::ServFail)));
    }
    if status != StatusCode::OK {
        return Err(io::Error::other(format!("the PeerAPI answered {status}")).into());
    }
    let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await.map_err(io::Error::other)?;
    Ok(Message::from_vec(&body.to_bytes())?)
}

/// The addresses in an answer, at whatever end of a chain of aliases; else why there are none.
fn addresses(answer: Message) -> Result<Vec<IpAddr>, ResponseCode> {
    let code = answer.metadata.response_code;
    if code != ResponseCode::NoError {
        return Err(code);
    }
    let v4 = |data: &RData| if let RData::A(address) = data { Some(IpAddr::V4(address.0)) } else { None };
    let v6 = |data: &RData| if let RData::AAAA(address) = data { Some(IpAddr::V6(address.0)) } else { None };
    Ok(answer.answers.iter().filter_map(|record| v4(&record.data).or_else(|| v6(&record.data))).collect())
}
