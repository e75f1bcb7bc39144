//! The calls that make an auth key: a token for a secret, a key for a token, and its end.
//!
//! Source: Tailscale, feature/oauthkey and feature/identityfederation, `resolveAuthKey`; client/tailscale,
//! `CreateKeyWithExpiry`; the public HTTP API, version 2.

use std::time::Duration;

use bytes::Bytes;
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;
use tracing::debug;
use url::{Url, form_urlencoded};
use zeroize::Zeroizing;

use super::attributes::Attributes;
use super::credential::{GitHub, IdToken};
use super::http::{Ask, Http, Trouble};
use super::{ClientSecret, Identity, MintError, Order, TokenSource};
use crate::key::AuthKey;
use crate::lapse::Lapse;
use crate::transport::backoff::Backoff;
use crate::transport::underlay::Underlay;

/// Where OAuth clients are known unless their secret says otherwise. Source: feature/oauthkey.
const OAUTH_BASE: &str = "https://api.tailscale.com";
/// The first pause between tries, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// The most characters of a key's description. Source: the public API, `POST /tailnet/-/keys`.
const DESCRIPTION_MAX: usize = 50;

const FORM: &str = "application/x-www-form-urlencoded";
const JSON: &str = "application/json";

/// A key that was made, and what it takes to unmake it.
pub(super) struct Minted {
    pub(super) key: AuthKey,
    pub(super) id: String,
    pub(super) access: Access,
}

/// An API that has let us in.
pub(super) struct Access {
    http: Http,
    token: Zeroizing<String>,
}

/// How often a request is repeated whose answer got lost, so that it may have done what it asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repeat {
    /// As often as there is time: a second token replaces the first.
    Freely,
    /// Once: each time may leave a key behind that nobody knows, and so nobody takes back.
    Once,
}

/// Tries until the deadline, and says what it last failed of.
pub(super) struct Tries<'a> {
    pub(super) deadline: Instant,
    pub(super) failed: &'a (dyn Fn(&MintError) + Sync),
}

#[derive(Deserialize)]
struct TokenAnswer {
    access_token: String,
}

#[derive(Deserialize)]
struct KeyAnswer {
    #[serde(default)]
    id: String,
    key: String,
}

#[derive(Deserialize)]
struct GitHubAnswer {
    value: String,
}

/// Shows an OAuth client's secret.
pub(super) async fn client(client: &ClientSecret, underlay: &Underlay, tries: &Tries<'_>) -> Result<Access, MintError> {
    let default = || Url::parse(OAUTH_BASE).expect("a constant URL parses");
    let http = Http::new(underlay, client.base.as_deref().cloned().unwrap_or_else(default))?;
    let fields = [("grant_type", "client_credentials"), ("client_id", client.id()), ("client_secret", client.expose())];
    let ask = || form(&http, "/api/v2/oauth/token", &fields, client.expose());
    let refused = |status, message| MintError::Secret { status, message };
    let answer: TokenAnswer = tries.until_answered(&http, ask, Repeat::Freely, refused).await?;
    Ok(Access { http, token: answer.access_token.into() })
}

/// Shows a workload's token to the API of the control server at `base`.
pub(super) async fn identity(
    identity: &Identity,
    (underlay, base): (&Underlay, &Url),
    tries: &Tries<'_>,
) -> Result<Access, MintError> {
    let token = match &identity.token {
        TokenSource::Given(token) => token.clone(),
        TokenSource::GitHub(job) => ask_github(job, underlay, tries).await?,
    };
    let http = Http::new(underlay, base.clone())?;
    let fields = [("client_id", identity.client.id.as_str()), ("jwt", token.expose())];
    let ask = || form(&http, "/api/v2/oauth/token-exchange", &fields, token.expose());
    let refused = |status, message| MintError::Token { by: "the API refused the ID token", status, message };
    let answer: TokenAnswer = tries.until_answered(&http, ask, Repeat::Freely, refused).await?;
    Ok(Access { http, token: answer.access_token.into() })
}

/// Asks the runner of a GitHub Actions job who the job is.
async fn ask_github(job: &GitHub, underlay: &Underlay, tries: &Tries<'_>) -> Result<IdToken, MintError> {
    let http = Http::new(underlay, job.url.clone())?;
    let ask = || {
        let mut url = job.url.clone();
        url.query_pairs_mut().append_pair("audience", &job.audience);
        Ask { method: Method::GET, url, bearer: Some(&job.bearer), body: None, secret: &job.bearer }
    };
    let refused = |status, message| MintError::Token { by: "GitHub Actions gave no ID token", status, message };
    let answer: GitHubAnswer = tries.until_answered(&http, ask, Repeat::Freely, refused).await?;
    let value = Zeroizing::new(answer.value);
    IdToken::parse(&value).map_err(|error| MintError::NotApi { host: http.place(), detail: error.to_string() })
}

impl Access {
    /// Makes a key for one node, to be used at once.
    pub(super) async fn mint(
        self,
        attributes: Attributes,
        order: &Order,
        tries: &Tries<'_>,
    ) -> Result<Minted, MintError> {
        let body = Bytes::from(key_request(attributes, order).to_string());
        let ask = || Ask {
            method: Method::POST,
            url: self.http.url("/api/v2/tailnet/-/keys"),
            bearer: Some(&self.token),
            body: Some((JSON, body.clone())),
            secret: &self.token,
        };
        let refused = |status, message| MintError::Key { status, message };
        let answer: KeyAnswer = tries.until_answered(&self.http, ask, Repeat::Once, refused).await?;
        let secret = Zeroizing::new(answer.key);
        let key = AuthKey::parse(&secret)
            .map_err(|error| MintError::NotApi { host: self.http.place(), detail: error.to_string() })?;
        Ok(Minted { key, id: answer.id, access: self })
    }

    /// Takes a key back that nobody used; once, since it expires soon.
    pub(super) async fn revoke(&self, id: &str) -> Result<(), Trouble> {
        let url = self.http.url(&format!("/api/v2/tailnet/-/keys/{}", path_segment(id)));
        let ask = Ask { method: Method::DELETE, url, bearer: Some(&self.token), body: None, secret: &self.token };
        self.http.exchange(ask).await.map(drop)
    }
}

/// The body of `POST /tailnet/-/keys`.
fn key_request(attributes: Attributes, order: &Order) -> Value {
    let Attributes { ephemeral, preauthorized } = attributes;
    let create = json!({
        "reusable": false,
        "ephemeral": ephemeral,
        "preauthorized": preauthorized,
        "tags": order.tags,
    });
    json!({
        "capabilities": { "devices": { "create": create } },
        "expirySeconds": order.expiry.as_secs(),
        "description": description(&order.hostname),
    })
}

/// Whose key it is, for whoever sees it in a list: letters, digits, hyphens and spaces.
fn description(hostname: &str) -> String {
    let text = if hostname.starts_with("tailcar") { hostname.to_owned() } else { format!("tailcar {hostname}") };
    let fitting = text.chars().map(|c| if c.is_ascii_alphanumeric() || c == ' ' { c } else { '-' });
    fitting.take(DESCRIPTION_MAX).collect()
}

/// An id as part of a path: the server's to choose, but not to lead elsewhere.
fn path_segment(id: &str) -> String {
    percent_encoding::utf8_percent_encode(id, percent_encoding::NON_ALPHANUMERIC).to_string()
}

fn form<'a>(http: &Http, path: &str, fields: &[(&str, &str)], secret: &'a str) -> Ask<'a> {
    // Each octet becomes three at most; growing would leave copies of the secret behind that nobody wipes.
    let room = fields.iter().map(|(name, value)| 3 * (name.len() + value.len()) + 2).sum();
    let body = form_urlencoded::Serializer::new(String::with_capacity(room)).extend_pairs(fields).finish();
    let body = Bytes::from_owner(Zeroizing::new(body.into_bytes()));
    Ask { method: Method::POST, url: http.url(path), bearer: None, body: Some((FORM, body)), secret }
}

impl Tries<'_> {
    /// Asks until there is an answer, in growing pauses and as the server wishes; what may have been done already, no
    /// more often than `repeat` says.
    async fn until_answered<'a, T: serde::de::DeserializeOwned>(
        &self,
        http: &Http,
        ask: impl Fn() -> Ask<'a>,
        repeat: Repeat,
        refused: impl Fn(u16, String) -> MintError,
    ) -> Result<T, MintError> {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut lost = 0;
        loop {
            let answered = tokio::time::timeout_at(self.deadline, http.ask(ask())).await;
            let late =
                || Trouble::Passing { detail: String::from("it did not answer in time"), wait: None, done: true };
            let (detail, wait, done) = match answered.unwrap_or_else(|_| Err(late())) {
                Ok(answer) => return Ok(answer),
                Err(Trouble::Refused { status, message }) => return Err(refused(status, message)),
                Err(Trouble::Foreign { detail }) => return Err(MintError::NotApi { host: http.place(), detail }),
                Err(Trouble::Passing { detail, wait, done }) => (detail, wait, done),
            };
            lost += u32::from(done);
            let pause = wait.unwrap_or_default().max(backoff.next_delay());
            let left = self.deadline.saturating_duration_since(Instant::now());
            if pause >= left || (repeat == Repeat::Once && lost > 1) {
                let asks = wait.map(|wait| format!(", and asks to wait {}", Lapse(wait))).unwrap_or_default();
                return Err(MintError::Unreachable { host: http.place(), detail: detail + &asks });
            }
            let error = MintError::Unreachable { host: http.place(), detail };
            debug!(%error, pause_ms = pause.as_millis(), "no auth key yet");
            (self.failed)(&error);
            tokio::time::sleep(pause).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_asked_for_as_the_api_takes_it() {
        let order = Order {
            tags: vec![String::from("tag:browser")],
            hostname: String::from("tailcar-r42"),
            expiry: Duration::from_secs(300),
        };
        let wanted = json!({
            "capabilities": {"devices": {"create": {
                "reusable": false, "ephemeral": true, "preauthorized": false, "tags": ["tag:browser"],
            }}},
            "expirySeconds": 300,
            "description": "tailcar-r42",
        });
        assert_eq!(key_request(Attributes::default(), &order), wanted);
    }

    #[test]
    fn a_description_fits_whatever_the_node_is_called() {
        assert_eq!(description("web_1.corp"), "tailcar web-1-corp");
        assert_eq!(description(&"x".repeat(63)).len(), DESCRIPTION_MAX);
    }

    #[test]
    fn an_id_leads_nowhere_else() {
        assert_eq!(path_segment("k1/../../device"), "k1%2F%2E%2E%2F%2E%2E%2Fdevice");
    }
}
