//! The node: the only place where the pure core meets sockets.
//!
//! [`Node::start`] makes the keys, binds the UDP sockets, logs in on the control thread and drives the data plane on
//! the data thread's local runtime. Whoever holds a [`Node`] dials through it, sees how far it has come, and ends it.

#[cfg(test)]
mod bed;
mod bridge;
pub mod client;
pub mod config;
mod core;
mod cut_off;
pub mod datagrams;
pub mod dial;
mod direct;
mod driver;
mod error;
mod exit;
mod lifecycle;
mod outbox;
mod overlap;
mod ping;
mod probe;
mod regions;
mod relays;
mod resolve;
pub mod stream;
mod target;
mod tunnel;
mod way;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use config::{Config, Transport};
pub use datagrams::{Association, DatagramError, Lost};
pub use dial::{DialError, DirectRule, Host, RouteError, Target};
pub use error::ResolveError;
pub use stream::{Carried, Ended, Stream};

use self::core::{Core, Parts, Shared};
use self::outbox::Outbox;
use self::relays::{Dialler, Relays};
use crate::control::{Client, RegisterError};
use crate::engine::Engine;
use crate::key::{DiscoPrivate, NodePrivate};
use crate::lapse::Lapse;
use crate::netmap::Netmap;
use crate::netstack::Netstack;
use crate::provision::{MintError, Minting};
use crate::transport::derp;
use crate::transport::interfaces::local_endpoints;
use crate::transport::link::Link;
use crate::transport::tls::{RootsError, Tls};
use crate::transport::udp::Udp;
use crate::transport::underlay::Underlay;

/// How far the node has come. The newest value wins; see [`Node::state`].
#[derive(Debug, Clone)]
pub enum State {
    /// On its way in; says what it waits for and what last went wrong.
    Joining {
        /// What is waited for.
        stage: JoinStage,
        /// The last failure that is being retried.
        last_error: Option<Arc<NodeError>>,
    },
    /// A netmap is here: names and routes are known, connections may be dialled.
    Joined(Arc<Joined>),
    /// The home DERP is connected too, and control has accepted our endpoints.
    Ready(Arc<Joined>),
    /// It will not come in, or it was put out.
    Failed(Arc<NodeError>),
}

/// What a joining node waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JoinStage {
    /// The control server to answer.
    Control,
    /// An auth key to be made.
    Mint,
    /// Control to accept the key.
    Register,
    /// An administrator to approve the device.
    Approval,
    /// The first netmap.
    Netmap,
    /// The home DERP, and control to accept our endpoints.
    Relay,
}

/// What a node knows of itself once it is in.
#[derive(Debug, Clone)]
pub struct Joined {
    /// The tailnet's name, as MagicDNS suffix.
    pub tailnet: String,
    /// Our full name, without trailing dot.
    pub name: String,
    /// Control's number for us.
    pub id: i64,
    /// Our addresses inside the tailnet.
    pub addresses: Vec<IpAddr>,
    /// The tags that control granted.
    pub tags: Vec<String>,
    /// The home DERP region, once chosen.
    pub home_derp: Option<u32>,
    /// From start to netmap.
    pub join_time: Duration,
}

/// Why a node is not, or no longer, part of the tailnet. Terminal.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// No auth key could be made.
    #[error(transparent)]
    Mint(#[from] MintError),
    /// Control refused us.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// `join_timeout` passed; carries what was waited for and the last error.
    #[error("not joined after {}, still waiting for {stage:?}", Lapse(*.limit))]
    JoinTimeout {
        /// What was waited for.
        stage: JoinStage,
        /// The limit.
        limit: Duration,
        /// The last failure that was being retried.
        last_error: Option<Arc<RegisterError>>,
    },
    /// The node key's time ended in mid-run.
    #[error("the node's key has expired")]
    KeyExpired,
    /// Control granted other tags than the user asked for: policies written for those would not apply.
    #[error(
        "the tailnet did not grant {}{}",
        missing.join(", "),
        if granted.is_empty() { String::new() } else { format!("; it granted {}", granted.join(", ")) }
    )]
    TagsDiffer {
        /// Asked for, but not granted.
        missing: Vec<String>,
        /// What was granted.
        granted: Vec<String>,
    },
    /// The tailnet is locked, and nobody has signed our key: peers will not talk to us.
    #[error("the tailnet lock is on and this node's key is not signed")]
    LockedOut,
    /// An administrator, or the server, deleted the node in mid-run.
    #[error("control no longer knows this node")]
    Deleted,
    /// No usable peer is called as the exit node setting says, or it does not offer to be one.
    #[error("no exit node is called {wanted}; there {offered}")]
    NoExitNode {
        /// The setting.
        wanted: String,
        /// Which there are, as the end of a sentence.
        offered: String,
    },
    /// The trusted certificates cannot be read.
    #[error(transparent)]
    Roots(#[from] RootsError),
    /// The operating system refused a socket.
    #[error("cannot open {what}: {source}")]
    Os {
        /// What was to be opened.
        what: &'static str,
        /// What the operating system said.
        source: std::io::Error,
    },
}

/// How a logout ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logout {
    /// Control confirmed it.
    Confirmed,
    /// There was nothing to log out from: the node never registered.
    NotNeeded,
    /// No confirmation came within the limit.
    Unconfirmed,
}

/// A handle to the node. Clones are cheap; all live on the data thread.
#[derive(Clone)]
pub struct Node {
    inner: Rc<Inner>,
}

struct Inner {
    config: Config,
    core: Shared,
    client: Client,
    minting: Minting,
    netmap: watch::Receiver<Option<Arc<Netmap>>>,
    state: watch::Receiver<State>,
    resolvers: resolve::Resolvers,
    wider: RefCell<dial::WiderRoutes>,
    outside: RefCell<direct::Outside>,
    stop: CancellationToken,
    /// Ends the node's tasks also when the last handle is dropped without a shutdown.
    _stop_guard: DropGuard,
}

impl Node {
    /// Starts the node: binds its UDP sockets, logs in on the `control` runtime, and drives the data plane on the
    /// current local runtime. Returns at once; progress shows in [`Node::state`].
    ///
    /// # Errors
    /// [`NodeError::Roots`] when `ca_file` cannot be used, [`NodeError::Os`] when no UDP socket can be bound.
    pub fn start(mut config: Config, control: tokio::runtime::Handle) -> Result<Self, NodeError> {
        let started = Instant::now();
        let tls = Tls::load(config.ca_file.as_deref())?;
        let proxy = config.proxy.clone().map(Arc::new);
        let link = Link::watch(&control);
        let underlay = Underlay { tls, proxy, no_proxy: config.no_proxy.clone().into(), link };
        let udp = bind(config.transport)?;
        let (node_key, disco_key) = (NodePrivate::random(), DiscoPrivate::random());
        let keys = (&node_key, &disco_key);
        let lifecycle::Login { client, minting, report, pings } =
            lifecycle::log_in(&mut config, &control, &underlay, keys);
        let mut engine = Engine::new(
            crate::engine::Config {
                node_key: node_key.clone(),
                disco_key,
                seed: rand::random(),
                transport: config.transport,
            },
            started,
        );
        if let Some(udp) = &udp {
            engine.set_local_endpoints(local_endpoints(udp.ports()), started);
        }
        let ((tasks, tasks_in), (probes, probes_in)) = (mpsc::unbounded_channel(), mpsc::channel(16));
        let netstack = Netstack::new(rand::random(), started);
        let dialler = Dialler { key: node_key, underlay: underlay.clone(), tasks };
        let parts = Parts {
            engine,
            netstack,
            outbox: Outbox::new(udp),
            relays: Relays::new(dialler),
            underlay,
            control: control.clone(),
            probes,
            report,
        };
        let node = Self::assemble(config, (client, minting), parts, (tasks_in, probes_in), control, started);
        tokio::task::spawn_local(ping::serve(node.inner.core.clone(), pings));
        Ok(node)
    }

    /// Wires the parts together on the current local runtime.
    fn assemble(
        config: Config,
        (client, minting): (Client, Minting),
        parts: Parts,
        (derp_tasks, probes): (mpsc::UnboundedReceiver<derp::Task>, mpsc::Receiver<regions::Probed>),
        control: tokio::runtime::Handle,
        started: Instant,
    ) -> Self {
        let underlay = parts.underlay.clone();
        let core: Shared = Rc::new(RefCell::new(Core::new(parts)));
        let stop = CancellationToken::new();
        let (netmap, node_key, accepted) = (client.netmap.clone(), client.node_key.clone(), client.accepted.clone());
        let link = underlay.link.news();
        let inputs = driver::Inputs { netmap, node_key, accepted, derp_tasks, probes, link, stop: stop.clone() };
        tokio::task::spawn_local(driver::run(core.clone(), inputs));
        let netmap = core.borrow().netmap();
        let seen =
            lifecycle::Seen { netmap: netmap.clone(), home: core.borrow().home(), minting: minting.progress.clone() };
        let limits = lifecycle::Limits {
            join_timeout: config.join_timeout,
            exit_node: config.exit_node.clone(),
            tags: config.advertise_tags.clone(),
        };
        let state = lifecycle::watch_state(&client, seen, limits, started, stop.clone());
        tokio::task::spawn_local(overlap::watch(netmap.clone(), config.accept_routes));
        let asks = (config.accept_dns, config.transport);
        let resolvers = resolve::Resolvers::start(core.clone(), underlay, control, asks);
        Self {
            inner: Rc::new(Inner {
                config,
                core,
                client,
                minting,
                netmap,
                state,
                resolvers,
                wider: RefCell::default(),
                outside: RefCell::default(),
                _stop_guard: stop.clone().drop_guard(),
                stop,
            }),
        }
    }

    /// A node in a tailnet of nobody else that no control server knows of, for the tests of what is above.
    #[cfg(test)]
    pub(crate) fn alone(config: Config) -> Self {
        let (started, control) = (Instant::now(), tokio::runtime::Handle::current());
        let (node_key, disco_key) = (NodePrivate::random(), DiscoPrivate::random());
        let transport = Transport::Derp;
        let engine = Engine::new(
            crate::engine::Config { node_key: node_key.clone(), disco_key, seed: [1; 32], transport },
            started,
        );
        let ((tasks, tasks_in), (probes, probes_in)) = (mpsc::unbounded_channel(), mpsc::channel(1));
        let tls = Tls::load(config.ca_file.as_deref()).expect("the test's own file");
        let underlay = Underlay { tls, proxy: None, no_proxy: Arc::default(), link: Link::default() };
        let dialler = Dialler { key: node_key, underlay: underlay.clone(), tasks };
        let parts = Parts {
            engine,
            netstack: Netstack::new(1, started),
            outbox: Outbox::new(None),
            relays: Relays::new(dialler),
            underlay,
            control: control.clone(),
            probes,
            report: watch::Sender::default(),
        };
        Self::assemble(config, (Client::alone(), Minting::done()), parts, (tasks_in, probes_in), control, started)
    }

    /// How far the node has come.
    pub fn state(&self) -> watch::Receiver<State> {
        self.inner.state.clone()
    }

    /// The newest netmap, once there is one.
    pub fn netmap(&self) -> Option<Arc<Netmap>> {
        self.inner.netmap.borrow().clone()
    }

    /// What was dialled outside the tailnet so far, as `host:port`, and how often.
    pub fn outside(&self) -> BTreeMap<String, u64> {
        self.inner.outside.borrow().destinations().clone()
    }

    /// Whether no peer can be reached, at least none beyond the networks that this machine is in: relays are not to be
    /// used, and no UDP comes back. Known a few seconds after the first netmap. The answer does not keep the node.
    pub fn is_cut_off(&self) -> impl Future<Output = bool> + use<> {
        let direct = self.inner.config.transport == Transport::Direct;
        let reports = direct.then(|| self.inner.core.borrow().reports());
        async move {
            match reports {
                Some(reports) => cut_off::is_udp_blocked(reports).await,
                None => false,
            }
        }
    }

    /// Opens a connection to `target` through the tailnet, or outside where the user allowed it by name.
    /// Returns once the target has answered. Waits while the node joins, at most `hold_timeout`; then at most
    /// `dial_timeout`.
    ///
    /// # Errors
    /// [`DialError`], each with its own code in the table of faults.
    pub async fn dial(&self, target: &Target) -> Result<Stream, DialError> {
        dial::dial(&self.inner, target).await
    }

    /// Logs out and stops, within `limit`.
    pub async fn shutdown(&self, limit: Duration) -> Logout {
        let deadline = tokio::time::Instant::now() + limit;
        let outcome = self.inner.client.log_out(limit).await;
        if outcome == crate::control::LoggedOut::NotNeeded {
            self.inner.minting.revoke(deadline).await;
        }
        self.inner.stop.cancel();
        // The driver's turn: it says what it has counted.
        tokio::task::yield_now().await;
        match outcome {
            crate::control::LoggedOut::Confirmed => Logout::Confirmed,
            crate::control::LoggedOut::NotNeeded => Logout::NotNeeded,
            crate::control::LoggedOut::Unconfirmed => Logout::Unconfirmed,
        }
    }
}

fn bind(transport: Transport) -> Result<Option<Rc<Udp>>, NodeError> {
    match transport {
        Transport::Derp => Ok(None),
        Transport::Auto | Transport::Direct => match Udp::bind() {
            Ok(udp) => Ok(Some(Rc::new(udp))),
            Err(source) => Err(NodeError::Os { what: "a UDP socket", source }),
        },
    }
}
