//! Sessions with the control server: log in, poll the map, report endpoints, log out.
//!
//! One task on the control thread does it all. What it learns leaves by `watch` channels: the newest netmap, how far
//! the login has come, and which report of ours control has accepted. When a session is lost it is opened again, with
//! growing pauses, and the netmap stays as it was: the data plane does not need control from minute to minute.
//! Source: Tailscale, control/controlclient/auto.go.

mod admission;
mod dial;
mod error;
mod map;
mod noise;
mod overdue;
mod ping;
mod register;
mod session;
mod unreached;
mod update;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tracing::{debug, info, warn};
use url::Url;

pub use error::{ConnectError, RegisterError};

use crate::key::{AuthKey, DiscoPublic, MachinePrivate, NodePrivate};
use crate::lapse::Lapse;
use crate::netmap::Netmap;
use crate::transport::backoff::Backoff;
use crate::transport::underlay::Underlay;
use crate::wire::tailcfg::hostinfo::{Hostinfo, NetInfo};
use crate::wire::tailcfg::map::EndpointType;
use admission::{Admission, Key, Lost};
use dial::{Dialer, Session};
use overdue::overdue;
use ping::Answerer;
pub use ping::PingJob;
use register::Answer;
use session::Ended;
use unreached::say_unreached;

/// The first pause after a lost session, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Who logs in where.
pub struct Config {
    /// The control server.
    pub url: Url,
    /// How to reach it.
    pub underlay: Underlay,
    /// The machine key of this run.
    pub machine: MachinePrivate,
    /// The node key to begin with; see [`Client::node_key`].
    pub node: NodePrivate,
    /// The disco key of this run.
    pub disco: DiscoPublic,
    /// What admits us.
    pub auth_key: Option<AuthKey>,
    /// Brings the auth key where it is still being made; control is dialled meanwhile. Who drops it says why.
    pub coming_key: Option<oneshot::Receiver<AuthKey>>,
    /// Who we say that we are; `net_info` is filled in from [`HostReport`].
    pub hostinfo: Hostinfo,
    /// Whether subnet routes of peers are used.
    pub accept_routes: bool,
    /// Whose routes to everything are used: a name, an address or a stable id.
    pub exit_node: Option<String>,
    /// The longest that a node which lost its place may take to come back.
    pub return_limit: Duration,
    /// Takes the pings of peers that control asks for.
    pub pings: mpsc::Sender<PingJob>,
}

/// What control is told of our network.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HostReport {
    /// Where we can be reached.
    pub endpoints: Vec<SocketAddr>,
    /// How each endpoint is known.
    pub endpoint_types: Vec<EndpointType>,
    /// What netcheck found, our home DERP included.
    pub net_info: Option<NetInfo>,
}

/// How far the login has come.
#[derive(Debug, Clone)]
pub enum Phase {
    /// Reaching the server; carries what last went wrong.
    Connecting(Option<Arc<RegisterError>>),
    /// Control answers; the key is awaited that somebody is making.
    AwaitingKey,
    /// The key is shown.
    Registering(Option<Arc<RegisterError>>),
    /// Admitted; the netmap is awaited.
    AwaitingNetmap(Option<Arc<RegisterError>>),
    /// Admitted, but an administrator has to approve the device.
    AwaitingApproval,
    /// The map stream is open.
    Online,
    /// The map stream is lost and being opened again.
    Reconnecting(Arc<RegisterError>),
    /// Over.
    Failed(Arc<Failure>),
}

/// Why control is done with us.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// It refused the registration.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// Our node key's time is over.
    #[error("the node key has expired")]
    KeyExpired,
    /// The tailnet lock is on, and our key carries no signature.
    #[error("the tailnet lock is on and this node's key is not signed")]
    LockedOut,
    /// It does not know this node any more.
    #[error("control no longer knows this node")]
    Deleted,
}

/// A running client.
pub struct Client {
    /// The newest netmap.
    pub netmap: watch::Receiver<Option<Arc<Netmap>>>,
    /// How far the login has come.
    pub phase: watch::Receiver<Phase>,
    /// The last report that control has accepted.
    pub accepted: watch::Receiver<HostReport>,
    /// The node key in use. It changes when the node had to come back with another; the same key again means that
    /// peers have forgotten it and its sessions.
    pub node_key: watch::Receiver<NodePrivate>,
    logout: mpsc::Sender<(Instant, oneshot::Sender<LoggedOut>)>,
}

/// How a logout ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoggedOut {
    /// Control confirmed.
    Confirmed,
    /// We never registered.
    NotNeeded,
    /// No confirmation in time.
    Unconfirmed,
}

impl Client {
    /// Starts logging in on `runtime`; `report` is sent whenever it changes.
    pub fn start(runtime: &tokio::runtime::Handle, config: Config, report: watch::Receiver<HostReport>) -> Self {
        let (netmap_out, netmap) = watch::channel(None);
        let (phase_out, phase) = watch::channel(Phase::Connecting(None));
        let (accepted_out, accepted) = watch::channel(HostReport::default());
        let (node_key_out, node_key) = watch::channel(config.node.clone());
        let (logout, logouts) = mpsc::channel(1);
        let out = Out { netmap: netmap_out, phase: phase_out, accepted: accepted_out, node_key: node_key_out };
        runtime.spawn(Task::new(config, report, out).run(logouts));
        Self { netmap, phase, accepted, node_key, logout }
    }

    /// A client that is online in a tailnet without peers, and knows no server.
    #[cfg(test)]
    pub(crate) fn alone() -> Self {
        let key = crate::key::NodePublic::default();
        let node = serde_json::json!({ "ID": 1, "Name": "me.tb.example.", "Key": key, "Addresses": ["100.64.0.1/32"] });
        let message = serde_json::json!({ "Node": node });
        let message = serde_json::from_value(message).expect("a constant message parses");
        let applied = crate::netmap::session::Session::new(true).apply(message, jiff::Timestamp::UNIX_EPOCH);
        let netmap = watch::Sender::new(applied.expect("it has a self node").netmap).subscribe();
        let (phase, accepted) = (watch::Sender::new(Phase::Online).subscribe(), watch::Sender::default().subscribe());
        let node_key = watch::Sender::new(NodePrivate::random()).subscribe();
        Self { netmap, phase, accepted, node_key, logout: mpsc::channel(1).0 }
    }

    /// Logs out and ends the client, within `limit`.
    pub async fn log_out(&self, limit: Duration) -> LoggedOut {
        let deadline = Instant::now() + limit;
        let (reply, answer) = oneshot::channel();
        match timeout_at(deadline, self.logout.send((deadline, reply))).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return LoggedOut::NotNeeded,
            Err(_) => return LoggedOut::Unconfirmed,
        }
        match timeout_at(deadline, answer).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) | Err(_) => LoggedOut::Unconfirmed,
        }
    }
}

/// Whether the network may have done it, so that it may be over with another network.
fn is_of_the_network(error: &ConnectError) -> bool {
    match error {
        ConnectError::Resolve { .. }
        | ConnectError::Connect { .. }
        | ConnectError::Silent { .. }
        | ConnectError::Proxy { .. }
        | ConnectError::Noise { .. } => true,
        ConnectError::Tls { .. }
        | ConnectError::NotControl { .. }
        | ConnectError::Server { .. }
        | ConnectError::Protocol { .. } => false,
    }
}

/// Where the task tells what it learns.
struct Out {
    netmap: watch::Sender<Option<Arc<Netmap>>>,
    phase: watch::Sender<Phase>,
    accepted: watch::Sender<HostReport>,
    node_key: watch::Sender<NodePrivate>,
}

struct Task {
    config: Config,
    dialer: Dialer,
    admission: Admission,
    report: watch::Receiver<HostReport>,
    out: Out,
    session: Option<Session>,
    map: crate::netmap::session::Session,
    answerer: Arc<Answerer>,
    /// A registration whose answer has not come yet. It has its own task: once the request has left, only its answer
    /// tells whether there is a node to log out.
    registering: Option<JoinHandle<Result<Answer, RegisterError>>>,
    registered: bool,
    /// Until when the node must be back in, and what put it out. `None` while it is in, or has never been.
    back_by: watch::Sender<Option<(Instant, Lost)>>,
    /// Whether control may know this node: it was admitted, or the answer to its registration was lost.
    known: bool,
}

impl Task {
    fn new(mut config: Config, report: watch::Receiver<HostReport>, out: Out) -> Self {
        let dialer = Dialer::new(config.url.clone(), config.underlay.clone(), config.machine.clone());
        let admission = Admission::new(config.node.clone(), config.auth_key.take());
        let map = crate::netmap::session::Session::new(config.accept_routes);
        let map = config.exit_node.clone().into_iter().fold(map, crate::netmap::session::Session::with_exit_node);
        let answerer = Arc::new(Answerer::new(config.url.clone(), config.underlay.tls.clone(), config.pings.clone()));
        let (session, registering, registered, known) = (None, None, false, false);
        let back_by = watch::Sender::new(None);
        Self { config, dialer, admission, report, out, session, map, answerer, registering, registered, back_by, known }
    }

    async fn run(mut self, mut logouts: mpsc::Receiver<(Instant, oneshot::Sender<LoggedOut>)>) {
        let logout = tokio::select! {
            () = self.stay() => logouts.recv().await,
            logout = logouts.recv() => logout,
        };
        let Some((deadline, reply)) = logout else { return };
        let outcome = self.log_out(deadline).await;
        // Whoever asked may have run out of patience.
        let _ = reply.send(outcome);
    }

    /// Keeps the node registered and its map up to date, until that is over for good.
    async fn stay(&mut self) {
        let overdue = overdue(self.back_by.subscribe());
        let unreached = say_unreached(self.out.phase.subscribe());
        let failure = tokio::select! {
            failure = self.keep_in() => failure,
            lost = overdue => {
                warn!(limit_s = self.config.return_limit.as_secs(), "the node did not come back in time");
                lost.into()
            }
            never = unreached => match never {},
        };
        self.out.phase.send_replace(Phase::Failed(Arc::new(failure)));
    }

    /// Opens one session after the other.
    async fn keep_in(&mut self) -> Failure {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        loop {
            // From before the session, so that the move that ends it is news.
            let mut link = self.config.underlay.link.news();
            let ended = self.session(&mut backoff).await;
            self.session = None;
            let may_hurry = matches!(&ended, Ended::Lost(RegisterError::Connect(error)) if is_of_the_network(error));
            let pause = match ended {
                Ended::Lost(error) => {
                    let pause = backoff.next_delay();
                    self.say_lost(error, pause);
                    pause
                }
                Ended::RateLimited(wait) => {
                    warn!(wait_s = wait.as_secs(), "control limits registrations, waiting");
                    self.out
                        .phase
                        .send_replace(Phase::Registering(Some(Arc::new(RegisterError::RateLimited { wait }))));
                    wait
                }
                Ended::Again => backoff.next_delay(),
                Ended::Over(failure) => return failure,
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = link.moved(), if may_hurry => {
                    backoff.reset();
                    tokio::time::sleep(backoff.next_delay()).await;
                }
            }
        }
    }

    fn say_lost(&self, error: RegisterError, pause: Duration) {
        debug!(%error, pause_ms = pause.as_millis(), "control is not reached");
        let error = Arc::new(error);
        self.out.phase.send_modify(|phase| {
            *phase = match phase {
                Phase::Connecting(_) => Phase::Connecting(Some(error)),
                Phase::Registering(_) => Phase::Registering(Some(error)),
                Phase::AwaitingNetmap(_) => Phase::AwaitingNetmap(Some(error)),
                Phase::AwaitingKey
                | Phase::AwaitingApproval
                | Phase::Online
                | Phase::Reconnecting(_)
                | Phase::Failed(_) => Phase::Reconnecting(error),
            };
        });
    }

    /// Tells control that we leave: by the open session, else by new ones, until the deadline.
    async fn log_out(&mut self, deadline: Instant) -> LoggedOut {
        if let Some(registering) = self.registering.take() {
            match timeout_at(deadline, registering).await {
                Ok(outcome) => self.note_registration(&outcome),
                Err(_) => return LoggedOut::Unconfirmed,
            }
        }
        if !self.known {
            return LoggedOut::NotNeeded;
        }
        let mut backoff = Backoff::new(FIRST_PAUSE, 2 * FIRST_PAUSE);
        while Instant::now() < deadline {
            match self.try_log_out(deadline).await {
                Ok(()) => {
                    info!("logged out");
                    return LoggedOut::Confirmed;
                }
                Err(error) => debug!(%error, "logout failed, trying anew"),
            }
            sleep_until(deadline.min(Instant::now() + backoff.next_delay())).await;
        }
        LoggedOut::Unconfirmed
    }

    async fn try_log_out(&mut self, deadline: Instant) -> Result<(), RegisterError> {
        let open = self.session.take().filter(|session| !session.is_closed());
        // An open session may be dead without knowing it: a new one gets the last quarter. Less would not do: headscale
        // needs up to a second for its answer.
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = if open.is_some() { left * 3 / 4 } else { left };
        let registrations = self.admission.leaving(&self.config.hostinfo);
        let attempt = async {
            let session = match open {
                Some(session) => session,
                None => self.dialer.connect().await?,
            };
            for (registration, key) in registrations {
                match (registration.log_out(&session).await, key) {
                    // Control may never have heard of it.
                    (Err(error), Key::Coming) if !matches!(error, RegisterError::Connect(_)) => {
                        debug!(%error, "control does not log out the key that was being registered");
                    }
                    (outcome, _) => outcome?,
                }
            }
            Ok(())
        };
        let silent = |_| ConnectError::Noise { detail: format!("no answer to the logout within {}", Lapse(limit)) };
        timeout(limit, attempt).await.map_err(silent)?
    }

    fn note_registration(&mut self, outcome: &Result<Result<Answer, RegisterError>, JoinError>) {
        self.known |= !matches!(outcome, Ok(Err(refused)) if !matches!(refused, RegisterError::Connect(_)));
        if matches!(outcome, Ok(Ok(Answer::Admitted { .. })))
            && let Some(key) = self.admission.admitted()
        {
            self.out.node_key.send_replace(key);
        }
    }
}
