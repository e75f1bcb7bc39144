//! The JSON of one moment of a run: standard output, the ready file and the status file hold the same object.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use super::redact::redact;
use crate::fault::Fault;
use crate::node::Joined;

/// The JSON of one moment. Fields are added, never taken away or given another meaning.
#[derive(Debug, Default, Serialize)]
pub(super) struct Line<'a> {
    pub(super) v: u8,
    pub(super) state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none", flatten)]
    pub(super) failure: Option<Failure<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) waiting_for: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none", flatten)]
    pub(super) end: Option<End<'a>>,
    #[serde(skip_serializing_if = "Option::is_none", flatten)]
    pub(super) tally: Option<&'a Tally>,
    pub(super) pid: u32,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(super) run_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) proxy: Option<Proxy>,
    #[serde(skip_serializing_if = "Option::is_none", flatten)]
    pub(super) node: Option<Ready<'a>>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) labels: BTreeMap<&'a str, &'a str>,
}

/// What ended a run badly, in the words of the table of faults.
#[derive(Debug, Serialize)]
pub(super) struct Failure<'a> {
    pub(super) code: String,
    pub(super) stage: &'static str,
    pub(super) cause: String,
    pub(super) remedy: &'a str,
    pub(super) retryable: bool,
    pub(super) exit: u8,
}

/// How a run ended that did not fail.
#[derive(Debug, Serialize)]
pub(super) struct End<'a> {
    pub(super) reason: &'a str,
    pub(super) logout: &'static str,
    pub(super) exit: u8,
}

/// What did not go the usual way, and how often: known at the end, however that came.
#[derive(Debug, Default, Serialize)]
pub(super) struct Tally {
    /// Refused by policy.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) refused: BTreeMap<String, u64>,
    /// Dialled outside the tailnet, as `--direct-allow` permits.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) direct: BTreeMap<String, u64>,
    /// Tunnels and unfinished answers that were cut at the end.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) cut: u64,
    /// Idle tunnels that were.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) cut_idle: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// What to give a client of ours; the first listener has the URLs.
#[derive(Debug, Serialize)]
pub(super) struct Proxy {
    pub(super) http: String,
    pub(super) socks5: String,
    pub(super) listeners: Vec<SocketAddr>,
}

/// What is known once the node has joined.
#[derive(Debug, Serialize)]
pub(super) struct Ready<'a> {
    pub(super) node: Node<'a>,
    pub(super) join_ms: u64,
    pub(super) targets: [(); 0],
}

/// The node in the tailnet.
#[derive(Debug, Serialize)]
pub(super) struct Node<'a> {
    pub(super) name: &'a str,
    pub(super) hostname: &'a str,
    pub(super) id: i64,
    pub(super) addresses: &'a [IpAddr],
    pub(super) tags: &'a [String],
    pub(super) tailnet: &'a str,
    pub(super) home_derp: Option<u32>,
}

impl Line<'_> {
    /// The line as JSON, without its end.
    pub(super) fn text(&self) -> String {
        serde_json::to_string(self).expect("strings, numbers and lists always make JSON")
    }
}

impl Failure<'static> {
    /// What went wrong, and how the process will exit.
    pub(super) fn new(fault: &Fault, exit: u8) -> Self {
        Self {
            code: fault.code(),
            stage: fault.row.stage.as_str(),
            cause: redact(fault.cause()).into_owned(),
            remedy: fault.row.remedy,
            retryable: fault.row.retryable,
            exit,
        }
    }
}

impl<'a> Ready<'a> {
    /// The node as it joined.
    pub(super) fn new(joined: &'a Joined) -> Self {
        let node = Node {
            name: &joined.name,
            hostname: short(&joined.name),
            id: joined.id,
            addresses: &joined.addresses,
            tags: &joined.tags,
            tailnet: &joined.tailnet,
            home_derp: joined.home_derp,
        };
        Self { node, join_ms: u64::try_from(joined.join_time.as_millis()).unwrap_or(u64::MAX), targets: [] }
    }
}

/// The first label of a full name.
pub(super) fn short(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}
