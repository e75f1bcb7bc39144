//! What a request asks for: the target of a CONNECT and of a plain request, or why there is none to look for.
//!
//! Source: RFC 9112, 3.2 (forms of a request target); RFC 9110, 4.2.4 (no user information), 9.3.6 (CONNECT).

use std::net::IpAddr;

use http::uri::Authority;
use http::{Method, Request, Uri};

use super::fields;
use crate::fault::{self, Fault, Row};
use crate::node::{Host, Target};

/// The target of a CONNECT.
pub(super) fn connectable<B>(request: &Request<B>) -> Result<Target, Fault> {
    let target = request.uri().authority().and_then(|authority| target(authority, None));
    target.ok_or_else(|| refused(&fault::BAD_REQUEST, String::from("CONNECT wants host:port")))
}

/// The target of a plain request, if it is one that a proxy forwards.
pub(super) fn forwardable<B>(request: &Request<B>) -> Result<Target, Fault> {
    let (method, uri) = (request.method(), request.uri());
    if fields::wanted_upgrade(request.headers()).is_some_and(|protocol| protocol == "connect-udp") {
        return Err(refused(&fault::NOT_OFFERED, String::from("connect-udp is not offered")));
    }
    // TRACE would show the client's own credentials to whoever made it ask. Source: RFC 9110, 9.3.8.
    if method == Method::TRACE {
        return Err(refused(&fault::METHOD, String::from("TRACE is not carried by this proxy")));
    }
    if fields::coded(request.headers()) {
        return Err(refused(&fault::TRANSFER_CODING, fault::TRANSFER_CODING.cause.to_owned()));
    }
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        let path = shown_path(uri);
        return Err(refused(&fault::NOT_PROXY_FORM, format!("{method} {path} was sent to a proxy as to a web server")));
    };
    if scheme != "http" {
        return Err(refused(&fault::SCHEME, format!("{scheme}:// is not forwarded; CONNECT carries it")));
    }
    target(authority, Some(80))
        .ok_or_else(|| refused(&fault::BAD_REQUEST, String::from("the URL's authority is not host or host:port")))
}

/// A path without its query, which may hold secrets.
fn shown_path(uri: &Uri) -> &str {
    uri.path()
}

/// Host and port of an authority without user information; `default` stands for a port that is not there.
fn target(authority: &Authority, default: Option<u16>) -> Option<Target> {
    let host = authority.host();
    let port = match authority.as_str().strip_prefix(host)?.strip_prefix(':') {
        Some("") | None => default?,
        Some(digits) => digits.parse().ok().filter(|&port| port != 0)?,
    };
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let host = match bare.unwrap_or(host).parse::<IpAddr>() {
        // An IPv4 address in the clothes of IPv6 is routed, and permitted, as what it is.
        Ok(ip) => Host::Ip(ip.to_canonical()),
        Err(_) if bare.is_some() || host.is_empty() => return None,
        Err(_) => Host::Name(host.to_owned()),
    };
    Some(Target { host, port })
}

fn refused(row: &'static Row, detail: String) -> Fault {
    Fault { row, detail }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;
    use crate::proxy::Config;
    use crate::proxy::bed::{self, read_head};

    #[test]
    fn authorities_become_targets() {
        let parsed = |text: &str, default| target(&text.parse().unwrap(), default).map(|target| target.to_string());
        for (text, default, expected) in [
            ("a.corp:443", None, Some("a.corp:443")),
            ("[fd7a::1]:443", None, Some("[fd7a::1]:443")),
            ("10.0.0.1", Some(80), Some("10.0.0.1:80")),
            ("[::ffff:10.0.0.1]:443", None, Some("10.0.0.1:443")),
            ("a.corp:", Some(80), Some("a.corp:80")),
            ("a.corp", None, None),
            ("a.corp:0", None, None),
            ("a.corp:65536", Some(80), None),
            ("user:secret@a.corp:80", Some(80), None),
        ] {
            assert_eq!(parsed(text, default).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn body_in_another_transfer_coding_has_a_row_of_its_own() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let request = "POST http://127.0.0.1:9/ HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n";
            let mut client = bed.connect().await;
            client.write_all(request.as_bytes()).await.unwrap();
            assert!(read_head(&mut client).await.starts_with("HTTP/1.1 501 "));
            assert_eq!(bed.codes(), [fault::TRANSFER_CODING.code]);
        });
    }

    #[test]
    fn refusals_say_status_cause_and_code() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let own = bed.address;
            for (request, status, error, code) in [
                ("CONNECT 8.8.8.8:443", 403, "http_request_denied", 1901),
                ("GET http://example.com/", 403, "http_request_denied", 1901),
                (&format!("CONNECT {own}"), 502, "proxy_loop_detected", fault::LOOP.code),
                (&format!("GET http://{own}/"), 502, "proxy_loop_detected", fault::LOOP.code),
                ("CONNECT a.corp", 400, "http_request_error", fault::BAD_REQUEST.code),
                ("CONNECT a.corp:99999", 400, "http_request_error", fault::BAD_REQUEST.code),
                ("CONNECT u:p@a.corp:80", 400, "http_request_error", fault::BAD_REQUEST.code),
                ("CONNECT a.corp:80:80", 400, "http_request_error", fault::BAD_REQUEST.code),
                ("GET /", 400, "http_request_error", fault::NOT_PROXY_FORM.code),
                ("OPTIONS *", 400, "http_request_error", fault::NOT_PROXY_FORM.code),
                ("GET https://a.corp/", 400, "http_request_error", fault::SCHEME.code),
                ("GET http://u:p@a.corp/", 400, "http_request_error", fault::BAD_REQUEST.code),
                ("TRACE http://a.corp/", 405, "http_request_error", fault::METHOD.code),
                ("PRI * HTTP/2.0\r\n\r\nSM", 400, "http_request_error", fault::BAD_REQUEST.code),
            ] {
                let answer = bed.ask_text(&format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await;
                assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {answer}");
                assert!(answer.contains(&format!("proxy-status: tailcar; error={error}; details=\"")), "{answer}");
                assert!(answer.contains(&format!("x-tailcar-error: TC-{code}\r\n")), "{request}: {answer}");
                assert!(answer.contains("content-type: application/problem+json\r\n"), "{answer}");
                assert!(answer.contains("\"remedy\":"), "{request}: {answer}");
                assert_eq!(bed.codes().last(), Some(&code), "{request}");
            }
            let refused = bed.stats.counters().refused;
            assert_eq!(refused[&1901].destinations["example.com:80"], 1);
            assert_eq!(refused[&1901].destinations["8.8.8.8:443"], 1);
        });
    }
}
