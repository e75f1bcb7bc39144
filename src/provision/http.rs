//! One HTTPS request to an API of ours or of the platform, and what its answer means.
//!
//! Redirects are not followed: what is sent is a secret, and who is to have it was named by the user. Bodies are
//! bounded, and what a server says of a refusal is shown without what it was sent.

use std::error::Error;
use std::io;
use std::num::IntErrorKind;
use std::time::Duration;

use bytes::Bytes;
use reqwest::redirect::Policy;
use reqwest::{Client, Method, Proxy, Response, StatusCode, header};
use serde::de::DeserializeOwned;
use serde_json::Value;
use url::Url;
use zeroize::Zeroizing;

use super::MintError;
use crate::transport::places::authority;
use crate::transport::underlay::Underlay;

/// The longest that one request may take. Source: Tailscale, feature/identityfederation, `exchangeJWTForToken`.
pub(super) const LIMIT: Duration = Duration::from_secs(10);
/// The most octets of an answer; those of the API have less than one thousand.
const BODY_MAX: usize = 64 << 10;
/// A longer wait than this is not told apart from it: no run waits so long for its key.
const WAIT_MAX: Duration = Duration::from_secs(24 * 3600);

/// A client of one host.
pub(super) struct Http {
    client: Client,
    base: Url,
}

/// What is asked.
pub(super) struct Ask<'a> {
    pub(super) method: Method,
    pub(super) url: Url,
    /// The token of `Authorization: Bearer`.
    pub(super) bearer: Option<&'a str>,
    /// Content type and body. One that holds a secret wipes itself; the HTTP library's own copies are not wiped.
    pub(super) body: Option<(&'static str, Bytes)>,
    /// What no error may repeat, even where the answer does.
    pub(super) secret: &'a str,
}

/// Why there is no good answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// It may be different later.
    Passing {
        /// What happened.
        detail: String,
        /// How long the server asks to wait.
        wait: Option<Duration>,
        /// Whether the request may have done what it asks for all the same.
        done: bool,
    },
    /// The answer is no, in its own words.
    Refused {
        /// The HTTP status.
        status: u16,
        /// The words.
        message: String,
    },
    /// Something else answers.
    Foreign {
        /// What it is.
        detail: String,
    },
}

impl Http {
    /// A client for the host of `base`, over the underlay.
    pub(super) fn new(underlay: &Underlay, base: Url) -> Result<Self, MintError> {
        let mut builder = Client::builder()
            .tls_backend_preconfigured(underlay.tls.trusted().as_ref().clone())
            .redirect(Policy::none())
            .referer(false)
            .timeout(LIMIT)
            .user_agent(concat!("tailcar/", env!("CARGO_PKG_VERSION")))
            .no_proxy();
        let broken = |error: reqwest::Error| MintError::NotApi { host: place(&base), detail: chain(error) };
        // A proxy reads what plain HTTP carries; that is for loopback and private addresses, which need none.
        if let Some(proxy) = &underlay.proxy
            && base.scheme() == "https"
            && !underlay.bypasses(base.host_str().unwrap_or_default())
        {
            builder = builder.proxy(Proxy::all(proxy.as_str()).map_err(broken)?);
        }
        Ok(Self { client: builder.build().map_err(broken)?, base })
    }

    /// Host and port, as an error names them.
    pub(super) fn place(&self) -> String {
        place(&self.base)
    }

    /// The URL of a path of the API.
    pub(super) fn url(&self, path: &str) -> Url {
        let mut url = self.base.clone();
        url.set_path(&format!("{}{path}", self.base.path().trim_end_matches('/')));
        url
    }

    /// Asks once; a good answer is read as JSON.
    pub(super) async fn ask<T: DeserializeOwned>(&self, ask: Ask<'_>) -> Result<T, Trouble> {
        let body = self.exchange(ask).await?;
        let foreign = |_| Trouble::Foreign { detail: String::from("its answer is not the JSON that was expected") };
        serde_json::from_slice(&body).map_err(foreign)
    }

    /// Asks once; the body of a good answer.
    pub(super) async fn exchange(&self, ask: Ask<'_>) -> Result<Zeroizing<Vec<u8>>, Trouble> {
        let secret = ask.secret;
        let mut request = self.client.request(ask.method, ask.url).header(header::ACCEPT, "application/json");
        if let Some(bearer) = ask.bearer {
            request = request.bearer_auth(bearer);
        }
        if let Some((kind, body)) = ask.body {
            request = request.header(header::CONTENT_TYPE, kind).body(body);
        }
        let response = request.send().await.map_err(broken)?;
        let status = response.status();
        let (wait, moved) = (retry_after(&response), moved_to(&response));
        let body = read(response).await?;
        match status {
            _ if status.is_success() => Ok(body),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => {
                let done = status != StatusCode::TOO_MANY_REQUESTS;
                Err(Trouble::Passing { detail: format!("it answered {status}"), wait, done })
            }
            _ if status.is_server_error() => {
                let words = message(&body, secret).map(|words| format!(": {words}")).unwrap_or_default();
                Err(Trouble::Passing { detail: format!("it answered {status}{words}"), wait, done: true })
            }
            _ if status.is_redirection() => Err(Trouble::Foreign { detail: format!("it answered {status}{moved}") }),
            _ => match message(&body, secret) {
                Some(message) if status != StatusCode::NOT_FOUND => {
                    Err(Trouble::Refused { status: status.as_u16(), message })
                }
                Some(_) | None => Err(Trouble::Foreign { detail: format!("it answered {status}") }),
            },
        }
    }
}

fn place(url: &Url) -> String {
    authority(url.host_str().unwrap_or_default().trim_matches(['[', ']']), url.port_or_known_default().unwrap_or(443))
}

/// Reads a body that is short enough. It may be a token or a key: the capacity is there from the start, since growing
/// would leave copies behind that nobody wipes.
async fn read(mut response: Response) -> Result<Zeroizing<Vec<u8>>, Trouble> {
    let mut body = Zeroizing::new(Vec::with_capacity(BODY_MAX));
    while let Some(chunk) = response.chunk().await.map_err(broken)? {
        if body.len() + chunk.len() > BODY_MAX {
            return Err(Trouble::Foreign { detail: format!("its answer has more than {BODY_MAX} octets") });
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// A request without an answer. A certificate that is not trusted stays so, and somebody may be listening: that is not
/// tried again.
fn broken(error: reqwest::Error) -> Trouble {
    if of_tls(&error) {
        return Trouble::Foreign { detail: format!("TLS failed: {}", chain(error)) };
    }
    if error.is_timeout() {
        return Trouble::Passing {
            detail: format!("it did not answer within {LIMIT:?}"),
            wait: None,
            done: !error.is_connect(),
        };
    }
    let done = !error.is_connect();
    Trouble::Passing { detail: chain(error), wait: None, done }
}

/// Whether TLS is what failed. An `io::Error` names as its source the source of what it wraps, so that is looked into.
fn of_tls(error: &(dyn Error + 'static)) -> bool {
    let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    error.is::<rustls::Error>() || wrapped.is_some_and(|inner| of_tls(inner)) || error.source().is_some_and(of_tls)
}

/// The error's causes without its URL; its own words alone say little.
fn chain(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        // Layers repeat each other's words.
        if !text.ends_with(&words) {
            text = format!("{text}: {words}");
        }
        source = cause.source();
    }
    text
}

/// The seconds of `Retry-After`. A date is not understood: the API does not send one.
fn retry_after(response: &Response) -> Option<Duration> {
    seconds(response.headers().get(header::RETRY_AFTER)?.to_str().ok()?.trim())
}

/// Whole seconds, [`WAIT_MAX`] at most.
fn seconds(text: &str) -> Option<Duration> {
    match text.parse() {
        Ok(seconds) => Some(WAIT_MAX.min(Duration::from_secs(seconds))),
        Err(error) if *error.kind() == IntErrorKind::PosOverflow => Some(WAIT_MAX),
        Err(_) => None,
    }
}

/// Where a redirect points, without path and query.
fn moved_to(response: &Response) -> String {
    let target = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
    let url = target.and_then(|target| response.url().join(target).ok());
    url.map(|url| format!(" and points to {}", place(&url))).unwrap_or_default()
}

/// What an error's JSON says: `message` of the API, `error_description` or `error` of OAuth (RFC 6749, 5.2).
fn message(body: &[u8], secret: &str) -> Option<String> {
    let body: Value = serde_json::from_slice(body).ok()?;
    let words = ["message", "error_description", "error"].iter().find_map(|name| body.get(name)?.as_str())?;
    let words = if secret.is_empty() { words.to_owned() } else { words.replace(secret, "[redacted]") };
    let one_line = words.split_whitespace().collect::<Vec<_>>().join(" ");
    Some(one_line.chars().filter(|c| !c.is_control()).take(200).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_in_the_servers_words_without_the_secret() {
        let said = |body: &str| message(body.as_bytes(), "geheim");
        assert_eq!(said(r#"{"message":"API token invalid"}"#).unwrap(), "API token invalid");
        let oauth = r#"{"error":"invalid_client","error_description":"no client\n with geheim"}"#;
        assert_eq!(said(oauth).unwrap(), "no client with [redacted]");
        assert_eq!(said("<html>"), None);
        assert_eq!(said(&format!(r#"{{"error":"{}"}}"#, "x".repeat(999))).unwrap().len(), 200);
    }

    #[test]
    fn no_wait_is_too_long_to_be_read() {
        assert_eq!(seconds("7"), Some(Duration::from_secs(7)));
        for endless in ["86401", "18446744073709551615", "99999999999999999999"] {
            assert_eq!(seconds(endless), Some(WAIT_MAX), "{endless}");
        }
        assert_eq!((seconds("-1"), seconds("Wed, 21 Oct 2026 07:28:00 GMT")), (None, None));
    }

    #[test]
    fn a_path_of_the_base_stays() {
        let underlay = Underlay {
            tls: crate::transport::tls::Tls::load(None).unwrap(),
            proxy: None,
            no_proxy: std::sync::Arc::default(),
            link: crate::transport::link::Link::default(),
        };
        for (base, wanted) in [
            ("https://api.example", "https://api.example/api/v2/x"),
            ("https://api.example:8443/proxied/", "https://api.example:8443/proxied/api/v2/x"),
        ] {
            let http = Http::new(&underlay, Url::parse(base).unwrap()).unwrap();
            assert_eq!(http.url("/api/v2/x").as_str(), wanted);
        }
    }
}
