//! Header fields between two connections: what ends here and what goes on.
//!
//! Source: RFC 9110, 7.6.1 (fields of one connection), 10.1.4 (`TE`), 7.2 (`Host`); RFC 9112, 6.1, 6.3 (a transfer coding and a length).

use http::header::{
    CONNECTION, CONTENT_LENGTH, HOST, HeaderName, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING,
    UPGRADE,
};
use http::uri::Authority;
use http::{HeaderMap, HeaderValue};

/// Fields that concern one connection even where `Connection` does not list them. `Trailer` is not among them: it
/// announces what the message itself carries.
const ONE_CONNECTION: [HeaderName; 7] = [
    CONNECTION,
    HeaderName::from_static("http2-settings"),
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Turns a client's request fields into those of our request to the target.
pub(super) fn onward(headers: &mut HeaderMap, authority: &Authority) {
    let upgrade = wanted_upgrade(headers);
    let trailers = lists(headers, &TE, "trailers");
    strip(headers);
    headers.remove(PROXY_AUTHORIZATION);
    // The request line's authority wins over whatever Host the client sent. Source: RFC 9112, 3.2.2.
    if let Ok(host) = HeaderValue::from_str(authority.as_str()) {
        headers.insert(HOST, host);
    }
    match (&upgrade, trailers) {
        (Some(_), true) => headers.insert(CONNECTION, HeaderValue::from_static("upgrade, te")),
        (Some(_), false) => headers.insert(CONNECTION, HeaderValue::from_static("upgrade")),
        (None, true) => headers.insert(CONNECTION, HeaderValue::from_static("te")),
        (None, false) => None,
    };
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if let Some(upgrade) = upgrade {
        headers.insert(UPGRADE, upgrade);
    }
}

/// Turns a target's response fields into those of our response to the client. `upgraded` says that it is a 101.
pub(super) fn back(headers: &mut HeaderMap, upgraded: bool) {
    let upgrade = headers.get(UPGRADE).filter(|_| upgraded).cloned();
    strip(headers);
    headers.remove(PROXY_AUTHENTICATE);
    if let Some(upgrade) = upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, upgrade);
    }
}

/// The protocols that a request wants to change to, if `Connection` says that it means it. `h2c` is not among them: the
/// settings that come with it are of one connection, and clients fall back to HTTP/1.1. Source: RFC 9113, 3.1.
pub(super) fn wanted_upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    if !lists(headers, &CONNECTION, "upgrade") {
        return None;
    }
    let wanted: Vec<&str> = members(headers, &UPGRADE).filter(|name| !name.eq_ignore_ascii_case("h2c")).collect();
    HeaderValue::from_str(&wanted.join(", ")).ok().filter(|_| !wanted.is_empty())
}

/// Whether the message has a transfer coding besides chunked. It would have to be undone here, and is not.
pub(super) fn coded(headers: &HeaderMap) -> bool {
    members(headers, &TRANSFER_ENCODING).any(|coding| !coding.eq_ignore_ascii_case("chunked"))
}

fn strip(headers: &mut HeaderMap) {
    // The body was read by its coding; a length beside that is of something else, or an attack.
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    let listed: Vec<HeaderName> = members(headers, &CONNECTION).filter_map(|name| name.parse().ok()).collect();
    for name in listed.iter().chain(&ONE_CONNECTION) {
        headers.remove(name);
    }
}

fn lists(headers: &HeaderMap, name: &HeaderName, member: &str) -> bool {
    members(headers, name).any(|found| found.eq_ignore_ascii_case(member))
}

/// The members of a comma-separated list, over all fields of that name.
fn members<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|member| !member.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let field = |&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value));
        fields.iter().map(field).collect()
    }

    fn authority() -> Authority {
        Authority::from_static("site.corp:8080")
    }

    #[test]
    fn fields_of_one_connection_end_here() {
        let mut fields = headers(&[
            ("connection", "X-Mine, keep-alive"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("proxy-authorization", "Basic x"),
            ("te", "gzip"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("trailer", "checksum"),
            ("accept", "*/*"),
        ]);
        onward(&mut fields, &authority());
        assert_eq!(fields, headers(&[("trailer", "checksum"), ("accept", "*/*"), ("host", "site.corp:8080")]));
    }

    #[test]
    fn host_is_the_one_of_the_request_line() {
        let mut fields = headers(&[("host", "other.corp"), ("host", "third.corp")]);
        onward(&mut fields, &authority());
        assert_eq!(fields, headers(&[("host", "site.corp:8080")]));
    }

    #[test]
    fn upgrade_and_te_are_made_anew() {
        let mut fields = headers(&[("connection", "Upgrade"), ("upgrade", "websocket"), ("te", "trailers")]);
        onward(&mut fields, &authority());
        assert_eq!(fields["connection"], "upgrade, te");
        assert_eq!((&fields["upgrade"], &fields["te"]), (&"websocket".parse().unwrap(), &"trailers".parse().unwrap()));
        let mut fields = headers(&[("connection", "close, Upgrade"), ("upgrade", "websocket")]);
        back(&mut fields, true);
        assert_eq!(fields, headers(&[("connection", "upgrade"), ("upgrade", "websocket")]));
    }

    #[test]
    fn length_beside_a_transfer_coding_is_dropped_both_ways() {
        let both = headers(&[("content-length", "3"), ("transfer-encoding", "chunked"), ("host", "site.corp:8080")]);
        let (mut request, mut response) = (both.clone(), both);
        onward(&mut request, &authority());
        back(&mut response, false);
        assert_eq!((&request, &response), (&headers(&[("host", "site.corp:8080")]), &request));
    }

    #[test]
    fn h2c_is_not_upgraded_to() {
        let wanted = |protocols| wanted_upgrade(&headers(&[("connection", "Upgrade"), ("upgrade", protocols)]));
        assert_eq!(wanted("H2C"), None);
        assert_eq!(wanted("h2c, websocket").unwrap(), "websocket");
        assert_eq!(wanted_upgrade(&headers(&[("upgrade", "websocket")])), None);
    }

    #[test]
    fn chunked_is_the_only_coding() {
        assert!(!coded(&headers(&[("transfer-encoding", "Chunked")])));
        assert!(coded(&headers(&[("transfer-encoding", "gzip, chunked")])));
    }
}
