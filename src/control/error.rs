//! What can go wrong between us and control, by what the user can do about it.

use std::io;
use std::time::Duration;

use crate::lapse::Lapse;

/// No session with control could be opened, or the open one ended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    /// The control server's name has no address.
    #[error("cannot resolve control host {host}: {source}")]
    Resolve {
        /// The name that was asked.
        host: String,
        /// What the host's resolver said.
        source: std::sync::Arc<io::Error>,
    },
    /// The connection was refused or reset, or the network is unreachable.
    #[error("cannot connect to control at {host}: {source}")]
    Connect {
        /// Host and port.
        host: String,
        /// What the operating system said.
        source: std::sync::Arc<io::Error>,
    },
    /// Control said nothing within its time.
    #[error("control at {host} did not answer within {} ({stage})", Lapse(*.limit))]
    Silent {
        /// Host and port.
        host: String,
        /// What was waited for.
        stage: &'static str,
        /// How long.
        limit: Duration,
    },
    /// The certificate is not trusted, or TLS failed otherwise.
    #[error("TLS with {host} failed: {detail}")]
    Tls {
        /// Host and port.
        host: String,
        /// What rustls said, with the issuer where it is known.
        detail: String,
    },
    /// The corporate proxy refused or failed.
    #[error("the HTTP proxy {proxy} did not open a tunnel: {detail}")]
    Proxy {
        /// The proxy's host and port.
        proxy: String,
        /// Its status line or the error.
        detail: String,
    },
    /// Something answered, but it is not a control server.
    #[error("{url} is not a control server: {detail}")]
    NotControl {
        /// The URL that was asked.
        url: String,
        /// Status and content type, or what was missing.
        detail: String,
    },
    /// Control answered with a server error.
    #[error("control answered {status}: {body}")]
    Server {
        /// The HTTP status.
        status: u16,
        /// The first 200 characters of the body.
        body: String,
    },
    /// The Noise handshake or the encrypted stream failed: cut, forged, or another protocol.
    #[error("the encrypted session with control failed: {detail}")]
    Noise {
        /// What failed.
        detail: String,
    },
    /// A message inside the session cannot be understood or exceeds its limit.
    #[error("control sent what cannot be understood: {detail}")]
    Protocol {
        /// What, with limit and actual.
        detail: String,
    },
}

/// Control refused to register this node.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RegisterError {
    /// The session failed before an answer came.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The key is not known to the server, or not valid for it.
    #[error("control does not accept the auth key: {message}")]
    KeyUnknown {
        /// The server's words.
        message: String,
    },
    /// The key's time is over, or it was revoked.
    #[error("the auth key has expired or was revoked: {message}")]
    KeyExpired {
        /// The server's words.
        message: String,
    },
    /// A single-use key was used before.
    #[error("the auth key was used already: {message}")]
    KeyUsed {
        /// The server's words.
        message: String,
    },
    /// A requested tag is not permitted.
    #[error("control does not permit the requested tags: {message}")]
    Tags {
        /// The server's words.
        message: String,
    },
    /// Control wants a person to log in, so the key did not count.
    #[error("control asks for an interactive login instead of taking the auth key")]
    LoginNeeded,
    /// The device waits for an administrator.
    #[error("the device waits for approval by an administrator")]
    ApprovalPending,
    /// Too many requests.
    #[error("control limits registrations; it asks to wait {}", Lapse(*.wait))]
    RateLimited {
        /// How long to wait before another try.
        wait: Duration,
    },
    /// The node key has expired, and a new one too.
    #[error("control says that the node key has expired")]
    NodeKeyExpired,
    /// Another refusal, in the server's words.
    #[error("control refused the registration: {message}")]
    Refused {
        /// The server's words.
        message: String,
    },
}
