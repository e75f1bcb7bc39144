//! Registration: the key is shown once, and what control says to it is told apart. Logout is the same call.
//! Source: Tailscale, control/controlclient/direct.go, `doLogin` and `TryLogout`; protocol facts in its tailcfg.

use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::{Method, StatusCode, header};
use jiff::Timestamp;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::dial::{CAPABILITY_VERSION, Session, excerpt};
use super::{ConnectError, RegisterError};
use crate::key::{AuthKey, LockPublic, NodePublic};
use crate::wire::tailcfg::hostinfo::Hostinfo;
use crate::wire::tailcfg::register::{Auth, RegisterRequest, RegisterResponse};
use crate::wire::tailcfg::{self, Bytes};

/// The longest that control may take to answer: an administrator's rules and its database, not a person.
const LIMIT: Duration = Duration::from_secs(30);
/// The most octets of an answer. Source: direct.go, `msg` limit of 1 MiB.
const BODY_MAX: usize = 1 << 20;
/// Room for a request, so that it does not grow: that would leave copies of the auth key behind that nobody wipes.
const REQUEST_ROOM: usize = 64 << 10;
/// How long to wait after a 429 that does not say. Source: direct.go, 5 to 10 s.
const RATE_LIMIT_WAIT: Duration = Duration::from_secs(7);
/// A longer wait than this is not believed. Source: direct.go.
const RATE_LIMIT_MAX: Duration = Duration::from_secs(3600);
/// The expiry that means logout, in seconds since 1970. Source: direct.go, `TryLogout`.
const LOGOUT_EXPIRY: i64 = 123;

/// Who registers.
pub(super) struct Registration {
    pub(super) node: NodePublic,
    /// The key that `node` replaces; zero for none.
    pub(super) old_node: NodePublic,
    pub(super) lock: LockPublic,
    pub(super) auth_key: Option<AuthKey>,
    /// The tailnet lock's signature of `node`.
    pub(super) signature: Option<Vec<u8>>,
    pub(super) hostinfo: Hostinfo,
}

/// What control says when it does not refuse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// We are in.
    Admitted {
        /// Whether no administrator needs to approve the device.
        approved: bool,
    },
    /// We shall come with another node key, and this signature made anew for it.
    Resign(Vec<u8>),
}

impl Registration {
    /// Shows the key.
    pub(super) async fn register(&self, session: &Session) -> Result<Answer, RegisterError> {
        let answer = self.post(session, None).await?;
        if !answer.error.is_empty() {
            return Err(refusal(answer.error));
        }
        if !answer.node_key_signature.0.is_empty() {
            return Ok(Answer::Resign(answer.node_key_signature.0));
        }
        if answer.node_key_expired {
            return Err(RegisterError::NodeKeyExpired);
        }
        if !answer.auth_url.is_empty() {
            return Err(RegisterError::LoginNeeded);
        }
        Ok(Answer::Admitted { approved: answer.machine_authorized })
    }

    /// Takes the node out of the tailnet.
    pub(super) async fn log_out(&self, session: &Session) -> Result<(), RegisterError> {
        let expiry = Timestamp::from_second(LOGOUT_EXPIRY).expect("the first minutes of 1970 are a time");
        let answer = self.post(session, Some(expiry)).await?;
        if answer.error.is_empty() { Ok(()) } else { Err(refusal(answer.error)) }
    }

    async fn post(&self, session: &Session, expiry: Option<Timestamp>) -> Result<RegisterResponse, RegisterError> {
        let request = RegisterRequest {
            version: CAPABILITY_VERSION.into(),
            node_key: self.node,
            old_node_key: self.old_node,
            lock_key: self.lock,
            auth: self.auth_key.as_ref().map(|auth_key| Auth { auth_key }),
            expiry,
            followup: "",
            hostinfo: &self.hostinfo,
            ephemeral: true,
            node_key_signature: self.signature.clone().map(Bytes),
        };
        let mut body = Zeroizing::new(Vec::with_capacity(REQUEST_ROOM));
        serde_json::to_writer(&mut *body, &request).expect("a request of plain values is JSON");
        let body = bytes::Bytes::from_owner(body);
        let silent = |_| ConnectError::Noise { detail: format!("no answer to the registration within {LIMIT:?}") };
        timeout(LIMIT, self.exchange(session, body)).await.map_err(silent)?
    }

    async fn exchange(&self, session: &Session, body: bytes::Bytes) -> Result<RegisterResponse, RegisterError> {
        let response = session.request(Method::POST, "/machine/register", body).await?;
        let status = response.status();
        let retry_after = response.headers().get(header::RETRY_AFTER).cloned();
        let body = Limited::new(response.into_body(), BODY_MAX).collect().await;
        let body = body.map_err(|error| ConnectError::Protocol { detail: error.to_string() })?.to_bytes();
        if status == StatusCode::TOO_MANY_REQUESTS {
            return Err(RegisterError::RateLimited { wait: wait_time(retry_after.as_ref()) });
        }
        if status.is_server_error() {
            return Err(ConnectError::Server { status: status.as_u16(), body: excerpt(&body) }.into());
        }
        if status != StatusCode::OK {
            return Err(refusal(format!("{status}: {}", excerpt(&body))));
        }
        let parsed = tailcfg::parse(&body);
        Ok(parsed.map_err(|error| ConnectError::Protocol { detail: format!("register answer: {error}") })?)
    }
}

/// How long a 429 asks to wait: seconds, or an HTTP date.
fn wait_time(header: Option<&header::HeaderValue>) -> Duration {
    let text = header.and_then(|value| value.to_str().ok()).map(str::trim);
    let seconds = text.and_then(|text| text.parse::<u64>().ok()).map(Duration::from_secs);
    match seconds {
        Some(wait) if !wait.is_zero() && wait <= RATE_LIMIT_MAX => wait,
        _ => RATE_LIMIT_WAIT,
    }
}

/// Tells refusals apart by their words, since control has no codes for them. The words are headscale's (types/
/// preauth_key.go, db/preauth_keys.go, state/tags.go), Tailscale's and testcontrol's.
fn refusal(message: String) -> RegisterError {
    let words = message.to_ascii_lowercase();
    let says = |parts: &[&str]| parts.iter().any(|part| words.contains(part));
    if says(&["tag"]) && says(&["not permitted", "invalid", "not owned"]) {
        RegisterError::Tags { message }
    } else if says(&["already used", "already been used", "has been used"]) {
        RegisterError::KeyUsed { message }
    } else if says(&["expired", "revoked"]) {
        RegisterError::KeyExpired { message }
    } else if says(&["not found", "invalid", "not valid", "does not exist", "unable to validate", "failed to parse"]) {
        RegisterError::KeyUnknown { message }
    } else {
        RegisterError::Refused { message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_apart_by_their_words() {
        assert!(matches!(refusal("authkey expired".into()), RegisterError::KeyExpired { .. }));
        assert!(matches!(refusal("authkey already used".into()), RegisterError::KeyUsed { .. }));
        assert!(matches!(refusal("auth-key not found: record not found".into()), RegisterError::KeyUnknown { .. }));
        assert!(matches!(refusal("invalid authkey".into()), RegisterError::KeyUnknown { .. }));
        let tags = "requested tags [tag:x] are invalid or not permitted";
        assert!(matches!(refusal(tags.into()), RegisterError::Tags { .. }));
        assert!(matches!(refusal("no more addresses".into()), RegisterError::Refused { .. }));
    }

    #[test]
    fn a_rate_limit_waits_as_long_as_it_says_within_reason() {
        let wait = |text: &str| wait_time(Some(&header::HeaderValue::from_str(text).unwrap()));
        assert_eq!(wait("3"), Duration::from_secs(3));
        for odd in ["0", "-1", "86400", "soon"] {
            assert_eq!(wait(odd), RATE_LIMIT_WAIT, "{odd}");
        }
        assert_eq!(wait_time(None), RATE_LIMIT_WAIT);
    }
}
