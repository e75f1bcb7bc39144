//! The first request head of an HTTP connection, and what is wrong with heads that are none.
//!
//! The HTTP library calls every malformed line by one name, and answers a head that is too slow with nothing. So the
//! first head is read here, where the answer can say what is wrong, and then handed on as if it had just arrived.

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, Uri};
use tokio::net::TcpStream;

use super::Config;
use crate::fault::{self, Fault, Row};
use crate::lapse::Lapse;

/// Why there is no first head.
#[derive(Debug)]
pub(super) enum HeadError {
    /// The client reset the connection: there is nobody to answer.
    Gone,
    /// It is not one that we take.
    Refused(Fault),
}

/// Bytes read at once while a head is not whole.
const STEP: usize = 2 * 1024;

/// Most fields of a head. The HTTP library takes 64 bytes of memory for each, whether they come or not.
pub(super) const FIELDS: usize = 1024;

/// Reads until a head of at most `limit` bytes is whole. Gives it, its request line checked, with what came after.
pub(super) async fn first(client: &TcpStream, limit: usize) -> Result<Bytes, HeadError> {
    let mut read = BytesMut::new();
    let mut line_is_checked = false;
    loop {
        client.readable().await.map_err(|_| HeadError::Gone)?;
        read.reserve(STEP);
        let known = read.len();
        match client.try_read_buf(&mut read) {
            Ok(0) => return Err(refused(&fault::BAD_REQUEST, "the request head ends too early")),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => return Err(HeadError::Gone),
        }
        if !line_is_checked && let Some(end) = read.iter().position(|&byte| byte == b'\n') {
            check_request_line(&read[..end]).map_err(|reason| refused(&fault::BAD_REQUEST, reason))?;
            line_is_checked = true;
        }
        match end(&read, known) {
            Some(end) if end <= limit => return Ok(read.freeze()),
            None if read.len() <= limit => {}
            Some(_) | None => {
                let detail = format!("the request head has more than {limit} bytes");
                return Err(HeadError::Refused(Fault { row: &fault::HEAD_TOO_LARGE, detail }));
            }
        }
    }
}

fn refused(row: &'static Row, detail: &str) -> HeadError {
    HeadError::Refused(Fault { row, detail: detail.to_owned() })
}

/// What is wrong with a head that the HTTP library gave up. `begun` says whether any of it had arrived: a client that
/// sent nothing has asked nothing, and is told nothing.
pub(super) fn unreadable(error: &hyper::Error, config: &Config, begun: impl FnOnce() -> bool) -> Option<Fault> {
    if error.is_timeout() {
        return begun().then(|| late(config.head_timeout));
    }
    if error.is_parse_too_large() {
        let detail = format!("the request head has more than {} bytes or {FIELDS} fields", config.head_limit);
        return Some(Fault { row: &fault::HEAD_TOO_LARGE, detail });
    }
    (error.is_parse() || error.is_incomplete_message())
        .then(|| Fault { row: &fault::BAD_REQUEST, detail: error.to_string() })
}

/// A head that was not whole within `limit`.
pub(super) fn late(limit: Duration) -> Fault {
    Fault { row: &fault::HEAD_TIMEOUT, detail: format!("no whole request head within {}", Lapse(limit)) }
}

/// Where the empty line ends that ends a head, if it is there. The first `known` bytes were searched before.
fn end(read: &[u8], known: usize) -> Option<usize> {
    let from = known.saturating_sub(3);
    let mut lines = read[from..].iter().enumerate().filter(|&(_, &byte)| byte == b'\n').map(|(at, _)| from + at + 1);
    lines.find_map(|start| match &read[start..] {
        [b'\n', ..] => Some(start + 1),
        [b'\r', b'\n', ..] => Some(start + 2),
        _ => None,
    })
}

/// Whether the line is one of an HTTP/1 request, and if not, what is wrong with it.
fn check_request_line(line: &[u8]) -> Result<(), &'static str> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let line = std::str::from_utf8(line).map_err(|_| "the first line is not an HTTP request line")?;
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err("the first line is not an HTTP request line");
    };
    if version == "HTTP/2.0" {
        return Err("HTTP/2 is not spoken to this proxy");
    }
    if !matches!(version, "HTTP/1.0" | "HTTP/1.1") {
        return Err("the first line is not an HTTP/1.1 request line");
    }
    let method = Method::from_bytes(method.as_bytes()).map_err(|_| "the method is not a token")?;
    let uri: Uri = target.parse().map_err(|_| "the request target is not a URI")?;
    if method == Method::CONNECT && (uri.authority().is_none() || uri.scheme().is_some()) {
        return Err("CONNECT wants host:port");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::proxy::bed;

    #[test]
    fn request_lines_are_told_from_noise() {
        for good in
            ["GET / HTTP/1.1", "CONNECT a.corp:443 HTTP/1.1\r", "CONNECT [::1]:443 HTTP/1.0", "X http://a/ HTTP/1.1"]
        {
            assert_eq!(check_request_line(good.as_bytes()), Ok(()), "{good}");
        }
        for bad in [
            "",
            "GET",
            "GET  / HTTP/1.1",
            "GET / HTTP/1.1 ",
            "PRI * HTTP/2.0",
            "GET / HTTP/3",
            "G@T / HTTP/1.1",
            "CONNECT / HTTP/1.1",
            "CONNECT http://a/ HTTP/1.1",
            "CONNECT a:b:c HTTP/1.1",
            "GET http://[::1 HTTP/1.1",
            "hello there world",
        ] {
            assert!(check_request_line(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(check_request_line(b"GET /\xff HTTP/1.1").is_err());
    }

    #[test]
    fn head_ends_with_its_empty_line() {
        assert_eq!(end(b"GET / HTTP/1.1\r\n\r\nbody\n\n", 0), Some(18));
        assert_eq!(end(b"GET / HTTP/1.1\n\nbody", 0), Some(16));
        assert_eq!(end(b"GET / HTTP/1.1\r\na: b\r\n\r", 0), None);
    }

    #[test]
    fn large_head_is_answered() {
        bed::run(async {
            let bed = bed::start(Config { head_limit: 1024, ..Config::default() });
            let large = format!("GET http://a.corp/ HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(64 * 1024));
            let answer = bed.ask_text(&large).await;
            assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
            assert_eq!(bed.codes(), [fault::HEAD_TOO_LARGE.code]);
        });
    }

    #[test]
    fn slow_head_is_answered_whether_first_or_later() {
        bed::run(async {
            let bed = bed::start(Config { head_timeout: Duration::from_millis(60), ..Config::default() });
            let answer = bed.ask_text("GET http://a.corp/ HTTP/1.1\r\nX").await;
            assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
            let answer = bed.ask_text("GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HT").await;
            assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
            assert!(answer.contains("HTTP/1.1 408 "), "{answer}");
            // One that waits between requests has asked nothing, and is told nothing.
            let answer = bed.ask_text("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
            assert!(!answer.contains("HTTP/1.1 408 "), "{answer}");
            assert_eq!(bed.ask(b"").await, b"");
        });
    }

    #[test]
    fn tls_and_noise_get_a_clear_answer() {
        bed::run(async {
            let bed = bed::start(Config::default());
            let answer = bed.ask_text("\x16\x03\x01\x02\x00").await;
            assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("began with TLS"), "{answer}");
            let answer = bed.ask_text("\x00\x01").await;
            assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
            let answer = bed.ask_text("HELO there\r\n").await;
            assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
        });
    }

    proptest! {
        #[test]
        fn end_is_found_however_the_bytes_arrive(head in "[a\r\n]{0,40}", cut in 0_usize..40) {
            let head = head.as_bytes();
            let cut = cut.min(head.len());
            let in_steps = end(&head[..cut], 0).or_else(|| end(head, cut));
            prop_assert_eq!(in_steps, end(head, 0));
        }

        #[test]
        fn any_line_is_checked_without_panic(line in any::<Vec<u8>>()) {
            let _ = check_request_line(&line);
        }
    }
}
