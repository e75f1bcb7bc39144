//! Every failure that a user can meet, in one table.
//!
//! The layers below have errors that say what went wrong; a user needs a stable code, a remedy, and the same words
//! in the log, the JSON, the exit status and the proxy's answer. Each error maps here, and only here, to its [`Row`].

use std::fmt;

mod table;

pub use table::*;

use crate::control::{ConnectError, RegisterError};
use crate::key::AuthKeyError;
use crate::lapse::Lapse;
use crate::node::dial::{DirectError, Exhausted, Gap, RouteError};
use crate::node::{DialError, JoinStage, NodeError, ResolveError};
use crate::provision::{CredentialError, MintError};
use crate::transport::tls::RootsError;

/// Where in a run's life a failure belongs; each has a family of codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The auth key's source and form: 10xx.
    Key,
    /// The control server: 11xx.
    Control,
    /// Registration, approval, tags: 12xx.
    Register,
    /// DERP and the rest of the underlay: 13xx.
    Relay,
    /// Names: 14xx.
    Dns,
    /// Routes: 15xx.
    Route,
    /// The peer and its packet filter: 16xx.
    Peer,
    /// The connection itself: 17xx.
    Tcp,
    /// TLS and HTTP with the target: 18xx.
    Http,
    /// The local proxy and its policy: 19xx.
    Proxy,
    /// The life of the run: 20xx.
    Run,
}

impl Stage {
    /// The first two digits of its codes.
    pub const fn family(self) -> u16 {
        match self {
            Self::Key => 10,
            Self::Control => 11,
            Self::Register => 12,
            Self::Relay => 13,
            Self::Dns => 14,
            Self::Route => 15,
            Self::Peer => 16,
            Self::Tcp => 17,
            Self::Http => 18,
            Self::Proxy => 19,
            Self::Run => 20,
        }
    }

    /// The word in JSON and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::Control => "control",
            Self::Register => "register",
            Self::Relay => "relay",
            Self::Dns => "dns",
            Self::Route => "route",
            Self::Peer => "peer",
            Self::Tcp => "tcp",
            Self::Http => "http",
            Self::Proxy => "proxy",
            Self::Run => "run",
        }
    }
}

/// One failure: everything that any output says of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Row {
    /// The four digits after `TC-`.
    pub code: u16,
    /// Where it belongs.
    pub stage: Stage,
    /// What happened, in a short sentence without period.
    pub cause: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
    /// Whether another try may succeed without a change.
    pub retryable: bool,
    /// The exit status when it ends the run.
    pub exit: u8,
    /// The SOCKS5 reply (RFC 1928, 6); 0xff where the method is refused instead.
    pub socks: u8,
    /// The HTTP status.
    pub http: u16,
    /// The `Proxy-Status` error type (RFC 9209, 2.3); empty where the answer has none.
    pub proxy_status: &'static str,
}

/// A row, with what happened this time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The row.
    pub row: &'static Row,
    /// This time's names and numbers, as a sentence of its own; empty where the row's cause says it all.
    pub detail: String,
}

impl Fault {
    /// The fault of `row`, with what happened this time.
    pub fn new(row: &'static Row, detail: impl Into<String>) -> Self {
        Self { row, detail: detail.into() }
    }

    /// The code as users see it: `TC-1203`.
    pub fn code(&self) -> String {
        format!("TC-{:04}", self.row.code)
    }

    /// What happened: the detail where there is one, else the row's own words.
    pub fn cause(&self) -> &str {
        if self.detail.is_empty() { self.row.cause } else { &self.detail }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TC-{:04}: {}", self.row.code, self.cause())
    }
}

impl std::error::Error for Fault {}

impl From<&'static Row> for Fault {
    fn from(row: &'static Row) -> Self {
        Self { row, detail: String::new() }
    }
}

impl From<&AuthKeyError> for Fault {
    fn from(error: &AuthKeyError) -> Self {
        let row = match error {
            AuthKeyError::Empty => &KEY_EMPTY,
            AuthKeyError::Garbled { .. } => &KEY_GARBLED,
            AuthKeyError::OtherKind { .. } => &KEY_OTHER_KIND,
            AuthKeyError::UnknownForm { .. } => &KEY_UNKNOWN_FORM,
            AuthKeyError::Wrapping { .. } => &KEY_WRAPPING,
        };
        Self::new(row, error.to_string())
    }
}

impl From<&CredentialError> for Fault {
    fn from(error: &CredentialError) -> Self {
        let row = match error {
            CredentialError::Form { .. } => &KEY_UNKNOWN_FORM,
            CredentialError::Attribute { .. } => &KEY_ATTRIBUTE,
            CredentialError::Token { .. } => &ID_TOKEN_MALFORMED,
        };
        Self::new(row, error.to_string())
    }
}

impl From<&MintError> for Fault {
    fn from(error: &MintError) -> Self {
        let row = match error {
            MintError::NoTags => &TAGS_NEEDED,
            MintError::Secret { .. } => &CLIENT_SECRET,
            MintError::Token { .. } => &ID_TOKEN,
            MintError::Key { .. } => &MINT_REFUSED,
            MintError::Unreachable { .. } => &TOKEN_API_UNREACHABLE,
            MintError::NotApi { .. } => &TOKEN_API_NOT,
        };
        Self::new(row, error.to_string())
    }
}

impl From<&ConnectError> for Fault {
    fn from(error: &ConnectError) -> Self {
        let row = match error {
            ConnectError::Resolve { .. } => &CONTROL_NAME,
            ConnectError::Connect { .. } => &CONTROL_REFUSED,
            ConnectError::Silent { .. } => &CONTROL_SILENT,
            ConnectError::Tls { .. } => &CONTROL_TLS,
            ConnectError::Proxy { .. } => &UNDERLAY_PROXY,
            ConnectError::NotControl { .. } => &CONTROL_NOT,
            ConnectError::Server { .. } => &CONTROL_ERROR,
            ConnectError::Noise { .. } => &CONTROL_NOISE,
            ConnectError::Protocol { .. } => &CONTROL_PROTOCOL,
        };
        Self::new(row, error.to_string())
    }
}

impl From<&RegisterError> for Fault {
    fn from(error: &RegisterError) -> Self {
        let row = match error {
            RegisterError::Connect(connect) => return Self::from(connect),
            RegisterError::KeyUnknown { .. } => &KEY_NOT_KNOWN,
            RegisterError::KeyExpired { .. } => &KEY_EXPIRED,
            RegisterError::KeyUsed { .. } => &KEY_USED,
            RegisterError::Tags { .. } => &TAGS_REFUSED,
            RegisterError::LoginNeeded => &LOGIN_NEEDED,
            RegisterError::ApprovalPending => &APPROVAL_PENDING,
            RegisterError::RateLimited { .. } => &RATE_LIMITED,
            RegisterError::NodeKeyExpired => &NODE_KEY_EXPIRED,
            RegisterError::Refused { .. } => &REGISTER_REFUSED,
        };
        Self::new(row, error.to_string())
    }
}

impl From<&NodeError> for Fault {
    fn from(error: &NodeError) -> Self {
        let row = match error {
            NodeError::Register(register) => return Self::from(register),
            NodeError::Mint(mint) => return Self::from(mint),
            NodeError::JoinTimeout { last_error: Some(last), limit, .. } => {
                let fault = Self::from(last.as_ref());
                return Self::new(fault.row, format!("not joined after {}: {}", Lapse(*limit), fault.detail));
            }
            NodeError::JoinTimeout { stage, last_error: None, .. } => match stage {
                JoinStage::Control => &CONTROL_SILENT,
                JoinStage::Mint => &TOKEN_API_UNREACHABLE,
                JoinStage::Register => &JOIN_TIMEOUT,
                JoinStage::Approval => &APPROVAL_PENDING,
                JoinStage::Netmap => &NO_NETMAP,
                JoinStage::Relay => &HOME_DERP,
            },
            NodeError::KeyExpired => &NODE_EXPIRED,
            NodeError::TagsDiffer { .. } => &TAGS_DIFFER,
            NodeError::LockedOut => &LOCKED_OUT,
            NodeError::Deleted => &NODE_DELETED,
            NodeError::NoExitNode { .. } => &NO_EXIT_NODE,
            NodeError::Roots(RootsError::Empty { .. } | RootsError::Broken { .. }) => &CA_FILE,
            NodeError::Roots(RootsError::Read { .. }) => &SETTING_FILE,
            NodeError::Os { .. } => &UNDERLAY_SOCKET,
        };
        Self::new(row, error.to_string())
    }
}

impl From<&ResolveError> for Fault {
    fn from(error: &ResolveError) -> Self {
        let row = match error {
            ResolveError::NxDomain { .. } => &DNS_NO_NAME,
            ResolveError::NoAddress { .. } => &DNS_NO_ADDRESS,
            ResolveError::Failed { .. } => &DNS_FAILED,
            ResolveError::Silent { .. } => &DNS_SILENT,
            ResolveError::Unreachable { .. } => &DNS_UNREACHABLE,
            ResolveError::BadName { .. } => &DNS_BAD_NAME,
            ResolveError::ConnectorRefused { .. } => &CONNECTOR_REFUSED,
        };
        Self::new(row, error.to_string())
    }
}

impl From<&RouteError> for Fault {
    fn from(error: &RouteError) -> Self {
        let row = match error {
            RouteError::None { .. } => &ROUTE_NONE,
            RouteError::Withdrawn { .. } => &ROUTE_WITHDRAWN,
            RouteError::Offline { .. } => &ROUTE_OFFLINE,
            RouteError::Answer { .. } => &ROUTE_OF_ANSWER,
            RouteError::Own { .. } => &LOOP,
            RouteError::Family { .. } => &ROUTE_FAMILY,
            RouteError::Connector { .. } | RouteError::ConnectorIgnored { .. } => &ROUTE_OF_CONNECTOR,
            RouteError::Transit { .. } => &NO_TRANSIT,
        };
        Self::new(row, error.to_string())
    }
}

impl From<&DialError> for Fault {
    fn from(error: &DialError) -> Self {
        let row = match error {
            DialError::NotJoined { cause: Some(cause), .. } => return Self::from(cause.as_ref()),
            DialError::NotJoined { cause: None, .. } => &NOT_JOINED,
            DialError::Resolve(resolve) => return Self::from(resolve),
            DialError::Route(route) => return Self::from(route),
            DialError::Public { .. } => &PUBLIC,

            DialError::PeerSilent { gap: Some(Gap::Direct { .. }), .. } => &PEER_NOT_DIRECT,
            DialError::PeerSilent { .. } => &PEER_SILENT,
            DialError::Unanswered { .. } => &TARGET_SILENT,
            DialError::Rejected { .. } => &PEER_REJECTED,
            DialError::Refused { .. } => &TCP_REFUSED,
            DialError::Exhausted(Exhausted::Ports { .. }) => &TCP_PORTS,
            DialError::Exhausted(Exhausted::Memory) => &OS_REFUSED,
            DialError::Direct(DirectError::Silent { .. }) => &DIRECT_SILENT,
            DialError::Direct(DirectError::Refused { .. }) => &TCP_REFUSED,
            DialError::Direct(DirectError::Failed { .. }) => &DIRECT_FAILED,
        };
        Self::new(row, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_nested_error_keeps_its_own_row() {
        let used = RegisterError::KeyUsed { message: String::from("single-use") };
        let dial =
            DialError::NotJoined { limit: Duration::from_secs(1), cause: Some(Arc::new(NodeError::Register(used))) };
        let fault = Fault::from(&dial);
        assert_eq!((fault.row, fault.code().as_str()), (&KEY_USED, "TC-1203"));
        assert_eq!(fault.row.exit, 77);
    }

    #[test]
    fn a_join_timeout_is_told_by_what_last_went_wrong() {
        let last = ConnectError::Silent { host: String::from("c:443"), stage: "TLS", limit: Duration::from_secs(2) };
        let timeout = NodeError::JoinTimeout {
            stage: JoinStage::Control,
            limit: Duration::from_secs(5),
            last_error: Some(Arc::new(RegisterError::Connect(last))),
        };
        let fault = Fault::from(&timeout);
        assert_eq!(fault.row, &CONTROL_SILENT);
        assert_eq!(fault.cause(), "not joined after 5s: control at c:443 did not answer within 2s (TLS)");
    }

    #[test]
    fn without_detail_the_row_speaks() {
        assert_eq!(Fault::from(&KEY_NONE).to_string(), "TC-1008: no auth key was given");
        assert_eq!(Fault::new(&INTERNAL, "at x").to_string(), "TC-2008: at x");
    }
}
