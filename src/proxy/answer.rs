//! What an HTTP client is told when its request fails.
//!
//! Scripts read the status and `Proxy-Status`, people the page, programs the problem document; all come from one row
//! of the table of faults. Source: RFC 9457 (problem documents), RFC 9209 (`Proxy-Status`), RFC 8941 (its strings);
//! `Tailscale-Connect-Error`: Tailscale, cmd/tailscaled, `httpProxyHandler`.

use std::fmt::Write as _;
use std::net::SocketAddr;

use bytes::Bytes;
use http::header::{self, HeaderName};
use http::{HeaderMap, HeaderValue, Response, StatusCode};

use crate::fault::Fault;

const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");
const ERROR_CODE: HeaderName = HeaderName::from_static("x-tailcar-error");
const CONNECT_ERROR: HeaderName = HeaderName::from_static("tailscale-connect-error");

/// The longest detail in a header field. Longer ones are cut; the body has them whole.
const FIELD_LIMIT: usize = 512;

/// To whom an answer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Audience {
    /// Whether the client is on this machine: router names and inner addresses are told to it alone.
    pub(super) local: bool,
    /// Whether it takes HTML.
    pub(super) html: bool,
}

impl Audience {
    /// The client behind `peer`, before any head is known.
    pub(super) fn of(peer: SocketAddr) -> Self {
        Self { local: peer.ip().to_canonical().is_loopback(), html: false }
    }

    /// The same client, once it has said what it accepts.
    pub(super) fn accepting(self, headers: &HeaderMap) -> Self {
        let mut accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
        Self { html: accepted.any(|value| value.to_ascii_lowercase().contains("text/html")), ..self }
    }
}

/// The whole answer.
pub(super) fn response(fault: &Fault, audience: Audience) -> Response<Bytes> {
    let row = fault.row;
    let detail = if audience.local { fault.detail.as_str() } else { row.cause };
    let status = StatusCode::from_u16(row.http).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let (kind, body) = if audience.html {
        ("text/html; charset=utf-8", page(fault, status, detail))
    } else {
        ("application/problem+json", problem(fault, status, detail))
    };
    let mut response = Response::new(Bytes::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    insert(headers, PROXY_STATUS, &proxy_status(row.proxy_status, detail));
    insert(headers, ERROR_CODE, &code(fault));
    insert(headers, CONNECT_ERROR, &printable(detail));
    match status {
        StatusCode::SERVICE_UNAVAILABLE => insert(headers, header::RETRY_AFTER, "1"),
        StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
            insert(headers, header::PROXY_AUTHENTICATE, "Basic realm=\"tailcar\", charset=\"UTF-8\"");
        }
        StatusCode::METHOD_NOT_ALLOWED => {
            insert(headers, header::ALLOW, "CONNECT, GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS");
        }
        _ => {}
    }
    response
}

/// The same as bytes of HTTP/1.1, for where no HTTP connection stands (yet, or any more); says that it is the last.
pub(super) fn message(fault: &Fault, audience: Audience) -> Vec<u8> {
    let response = response(fault, audience);
    let status = response.status();
    let mut message =
        format!("HTTP/1.1 {} {}\r\n", status.as_str(), status.canonical_reason().unwrap_or_default()).into_bytes();
    for (name, value) in response.headers() {
        message.extend_from_slice(name.as_str().as_bytes());
        message.extend_from_slice(b": ");
        message.extend_from_slice(value.as_bytes());
        message.extend_from_slice(b"\r\n");
    }
    let body = response.body();
    message.extend_from_slice(format!("content-length: {}\r\nconnection: close\r\n\r\n", body.len()).as_bytes());
    message.extend_from_slice(body);
    message
}

fn code(fault: &Fault) -> String {
    format!("TC-{:04}", fault.row.code)
}

/// A field value of our own making is printable ASCII, which every header takes.
fn insert(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// `tailcar; error=…; details="…"`.
fn proxy_status(error: &str, detail: &str) -> String {
    let mut value = String::from("tailcar");
    if !error.is_empty() {
        value.push_str("; error=");
        value.push_str(error);
    }
    value.push_str("; details=\"");
    for c in printable(detail).chars() {
        if matches!(c, '"' | '\\') {
            value.push('\\');
        }
        value.push(c);
    }
    value.push('"');
    value
}

/// Printable ASCII alone, which is all that a structured field's string may hold. Source: RFC 8941, 3.3.3.
fn printable(text: &str) -> String {
    text.chars().take(FIELD_LIMIT).map(|c| if matches!(c, ' '..='~') { c } else { '?' }).collect()
}

fn problem(fault: &Fault, status: StatusCode, detail: &str) -> String {
    serde_json::json!({
        "type": "about:blank",
        "title": fault.row.cause,
        "status": status.as_u16(),
        "detail": detail,
        "code": code(fault),
        "remedy": fault.row.remedy,
        "retryable": fault.row.retryable,
    })
    .to_string()
}

fn page(fault: &Fault, status: StatusCode, detail: &str) -> String {
    let (cause, remedy, detail) = (escaped(fault.row.cause), escaped(fault.row.remedy), escaped(detail));
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>tailcar: {cause}</title>\
         <body><h1>{cause}</h1><p>{detail}</p><p>{remedy}</p><p><small>{} &middot; {status}</small></p></body></html>\n",
        code(fault)
    )
}

fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' | '>' | '&' | '"' | '\'' => {
                // Writing to a String does not fail.
                let _ = write!(safe, "&#{};", u32::from(c));
            }
            _ => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fault;

    const LOCAL: Audience = Audience { local: true, html: false };

    fn public(detail: &str) -> Fault {
        Fault { row: &fault::PUBLIC, detail: detail.to_owned() }
    }

    #[test]
    fn answer_says_the_same_in_every_place() {
        let response = response(&public("example.com is \"public\""), LOCAL);
        assert_eq!(response.status(), 403);
        let field = |name: HeaderName| response.headers()[name].to_str().unwrap().to_owned();
        let expected = "tailcar; error=http_request_denied; details=\"example.com is \\\"public\\\"\"";
        assert_eq!(field(PROXY_STATUS), expected);
        assert_eq!(field(ERROR_CODE), "TC-1901");
        assert_eq!(field(CONNECT_ERROR), "example.com is \"public\"");
        assert_eq!(field(header::CONTENT_TYPE), "application/problem+json");
        let problem: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
        assert_eq!(problem["status"], 403);
        assert_eq!(problem["code"], "TC-1901");
        assert_eq!(problem["detail"], "example.com is \"public\"");
        assert_eq!(problem["retryable"], false);
    }

    #[test]
    fn page_for_browsers_carries_no_markup_from_the_request() {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, HeaderValue::from_static("Text/HTML,application/xhtml+xml"));
        let audience = LOCAL.accepting(&headers);
        let response = response(&public("<script>x</script>"), audience);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "text/html; charset=utf-8");
        let page = std::str::from_utf8(response.body()).unwrap();
        assert!(page.contains("&#60;script&#62;") && !page.contains("<script"), "{page}");
    }

    #[test]
    fn names_and_addresses_stay_on_loopback() {
        let audience = Audience::of("10.0.0.9:5".parse().unwrap());
        let message = String::from_utf8(message(&public("router nyc-1 at 10.9.9.9"), audience)).unwrap();
        assert!(!message.contains("nyc-1"), "{message}");
        assert!(message.contains(fault::PUBLIC.cause));
        assert!(Audience::of("[::ffff:127.0.0.1]:5".parse().unwrap()).local);
    }

    #[test]
    fn unavailable_says_when_to_come_back() {
        let fault = Fault { row: &fault::TOO_MANY_CONNECTIONS, detail: String::new() };
        assert_eq!(response(&fault, LOCAL).headers()[header::RETRY_AFTER], "1");
    }

    proptest! {
        #[test]
        fn any_detail_makes_a_whole_answer(detail in any::<String>(), html: bool) {
            let response = response(&public(&detail), Audience { local: true, html });
            let status = response.headers()[PROXY_STATUS].to_str().unwrap();
            prop_assert!(status.starts_with("tailcar; error=http_request_denied; details=\"") && status.ends_with('"'));
            prop_assert!(response.headers().contains_key(CONNECT_ERROR));
            if !html {
                let problem: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
                prop_assert_eq!(problem["detail"].as_str().unwrap(), detail);
            }
        }
    }
}
