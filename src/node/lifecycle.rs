//! From what control and the relays say to one [`State`], and what control is told of us.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::{Config, JoinStage, Joined, NodeError, State, exit};
use crate::control::{self, Client, Failure, HostReport, Phase, PingJob};
use crate::key::{AuthKey, DiscoPrivate, MachinePrivate, NodePrivate};
use crate::netmap::{Netmap, RegionId};
use crate::provision::{self, Credential, Maker, Minting, Progress};
use crate::transport::underlay::Underlay;
use crate::wire::tailcfg::hostinfo::Hostinfo;

/// What control is told of us. Inbound is closed, logs stay here, and tags are asked for only where the user says so:
/// a key brings its own, and headscale refuses a request beside them.
pub(super) fn hostinfo(config: &Config) -> Hostinfo {
    let mut log_id = [0; 32];
    rand::fill(&mut log_id[..]);
    Hostinfo {
        ipn_version: format!("{}-tailcar", env!("CARGO_PKG_VERSION")),
        backend_log_id: hex::encode(log_id),
        os: std::env::consts::OS.to_owned(),
        app: "tailcar".to_owned(),
        go_arch: match std::env::consts::ARCH {
            "x86_64" => "amd64".to_owned(),
            "aarch64" => "arm64".to_owned(),
            other => other.to_owned(),
        },
        hostname: config.hostname.clone(),
        shields_up: true,
        no_logs_no_support: true,
        request_tags: config.advertise_tags.clone(),
        userspace: Some(true),
        userspace_router: Some(true),
        ..Hostinfo::default()
    }
}

/// What has come of [`log_in`].
pub(super) struct Login {
    pub(super) client: Client,
    pub(super) minting: Minting,
    /// Takes what control is told of our network.
    pub(super) report: watch::Sender<HostReport>,
    /// The pings of peers that control asks for.
    pub(super) pings: mpsc::Receiver<PingJob>,
}

/// Starts logging in on the `control` runtime. Takes the credential out of `config`.
pub(super) fn log_in(
    config: &mut Config,
    control: &Handle,
    underlay: &Underlay,
    (node, disco): (&NodePrivate, &DiscoPrivate),
) -> Login {
    let (report, reports) = watch::channel(HostReport::default());
    let (pings, jobs) = mpsc::channel(4);
    let (auth_key, maker) = match config.credential.take() {
        Some(Credential::AuthKey(key)) => (Some(key), None),
        Some(Credential::Maker(maker)) => (None, Some(maker)),
        None => (None, None),
    };
    let (key_out, coming_key) = maker.is_some().then(oneshot::channel).unzip();
    let client = Client::start(
        control,
        control::Config {
            url: config.login_server.clone(),
            underlay: underlay.clone(),
            machine: MachinePrivate::random(),
            node: node.clone(),
            disco: disco.public(),
            // From here on the control client alone holds the key, and wipes it once it has no more use for it.
            auth_key,
            coming_key,
            hostinfo: hostinfo(config),
            accept_routes: config.accept_routes,
            exit_node: config.exit_node.clone(),
            return_limit: config.join_timeout,
            pings,
        },
        reports,
    );
    let minting = start_minting(control, maker.zip(key_out), config, (underlay, &client));
    Login { client, minting, report, pings: jobs }
}

/// Starts making the auth key, where it has to be made; what could unmake it is kept until the first netmap.
fn start_minting(
    control: &Handle,
    order: Option<(Maker, oneshot::Sender<AuthKey>)>,
    config: &Config,
    (underlay, client): (&Underlay, &Client),
) -> Minting {
    let Some((maker, out)) = order else { return Minting::done() };
    let mut netmap = client.netmap.clone();
    let joined = async move {
        if netmap.wait_for(Option::is_some).await.is_err() {
            // The control client is gone without one; whether the key was used is for the logout to tell.
            std::future::pending::<()>().await;
        }
    };
    let config = provision::Config {
        underlay: underlay.clone(),
        login_server: config.login_server.clone(),
        tags: config.advertise_tags.clone(),
        hostname: config.hostname.clone(),
        join_timeout: config.join_timeout,
    };
    Minting::start(control, maker, config, out, joined)
}

/// What the node's other parts show.
pub(super) struct Seen {
    /// The newest netmap that it goes by.
    pub(super) netmap: watch::Receiver<Option<Arc<Netmap>>>,
    /// The home region, once its relay has admitted us.
    pub(super) home: watch::Receiver<Option<RegionId>>,
    /// How far the auth key has come.
    pub(super) minting: watch::Receiver<Progress>,
}

/// What the way in is held to.
pub(super) struct Limits {
    /// The longest that it may take.
    pub(super) join_timeout: Duration,
    /// The exit node that has to be there.
    pub(super) exit_node: Option<String>,
    /// Tags that have to be granted.
    pub(super) tags: Vec<String>,
}

/// Starts a task that sums up how far the node has come.
pub(super) fn watch_state(
    client: &Client,
    seen: Seen,
    limits: Limits,
    started: Instant,
    stop: CancellationToken,
) -> watch::Receiver<State> {
    let first = State::Joining { stage: JoinStage::Control, last_error: None };
    let (out, state) = watch::channel(first);
    let watcher = Watcher {
        netmap: seen.netmap,
        phase: client.phase.clone(),
        accepted: client.accepted.clone(),
        home: seen.home,
        minting: seen.minting,
        started,
        join_timeout: limits.join_timeout,
        exit_node: limits.exit_node,
        asked_tags: limits.tags,
        joined_after: None,
        was_ready: false,
    };
    tokio::task::spawn_local(watcher.run(out, stop));
    state
}

/// How long the word of whoever makes the key may be on its way.
const LAST_WORD: Duration = Duration::from_millis(300);

struct Watcher {
    netmap: watch::Receiver<Option<Arc<Netmap>>>,
    phase: watch::Receiver<Phase>,
    accepted: watch::Receiver<HostReport>,
    home: watch::Receiver<Option<RegionId>>,
    minting: watch::Receiver<Progress>,
    started: Instant,
    join_timeout: Duration,
    /// What is to be looked for in the first netmap; what becomes of it later is the dials' business.
    exit_node: Option<String>,
    asked_tags: Vec<String>,
    joined_after: Option<Duration>,
    was_ready: bool,
}

impl Watcher {
    async fn run(mut self, out: watch::Sender<State>, stop: CancellationToken) {
        let deadline = tokio::time::Instant::from_std(self.started + self.join_timeout);
        loop {
            let state = self.sum_up();
            let over = matches!(state, State::Failed(_));
            out.send_replace(state);
            if over {
                return;
            }
            tokio::select! {
                Ok(()) = self.netmap.changed() => {}
                Ok(()) = self.phase.changed() => {}
                Ok(()) = self.accepted.changed() => {}
                Ok(()) = self.home.changed() => {}
                Ok(()) = self.minting.changed() => {}
                () = tokio::time::sleep_until(deadline), if !self.was_ready => {
                    tokio::select! {
                        error = self.too_late() => drop(out.send_replace(State::Failed(error.into()))),
                        () = stop.cancelled() => {}
                    }
                    return;
                }
                () = stop.cancelled() => return,
            }
        }
    }

    /// Once ready, a node stays ready: a relay or a server that is away for a while does not end what goes on.
    fn sum_up(&mut self) -> State {
        let minting = self.minting.borrow_and_update().clone();
        if let Progress::Failed(error) = minting {
            return State::Failed(NodeError::Mint(error).into());
        }
        let phase = self.phase.borrow_and_update().clone();
        if let Phase::Failed(failure) = &phase {
            return State::Failed(failed(failure).into());
        }
        let Some(netmap) = self.netmap.borrow_and_update().clone() else {
            let (stage, last_error) = stage_of(phase);
            let last_error = match (stage, minting) {
                (JoinStage::Mint, Progress::Minting(error)) => error.map(NodeError::Mint),
                _ => last_error.map(|error| NodeError::Register(error.as_ref().clone())),
            };
            return State::Joining { stage, last_error: last_error.map(Arc::new) };
        };
        if let Some(missing) = self.exit_node.take().and_then(|wanted| exit::missing(&netmap, wanted)) {
            return State::Failed(missing.into());
        }
        if self.joined_after.is_none()
            && let Err(differ) = compare_tags(&self.asked_tags, &netmap.self_node.tags)
        {
            return State::Failed(differ.into());
        }
        let join_time = *self.joined_after.get_or_insert_with(|| self.started.elapsed());
        let home = *self.home.borrow_and_update();
        let told = self.accepted.borrow_and_update().net_info.as_ref().map_or(0, |info| info.preferred_derp);
        let joined = Joined {
            tailnet: netmap.magicdns_suffix().to_owned(),
            name: netmap.self_node.name.clone(),
            id: netmap.self_node.id,
            addresses: netmap.self_node.addresses.clone(),
            tags: netmap.self_node.tags.clone(),
            home_derp: home,
            join_time,
        };
        let relayed = home.is_some_and(|home| home == told);
        if !self.was_ready && relayed {
            debug!(ms = self.started.elapsed().as_millis(), "ready");
        }
        self.was_ready |= relayed;
        if self.was_ready { State::Ready(joined.into()) } else { State::Joined(joined.into()) }
    }

    /// Whoever makes the key gives up shortly before, on another thread, and its word says more.
    async fn too_late(&mut self) -> NodeError {
        let is_over = |progress: &Progress| !matches!(progress, Progress::Minting(_));
        if let Ok(Ok(progress)) = tokio::time::timeout(LAST_WORD, self.minting.wait_for(is_over)).await
            && let Progress::Failed(error) = &*progress
        {
            return NodeError::Mint(error.clone());
        }
        let limit = self.join_timeout;
        if self.netmap.borrow().is_some() {
            return NodeError::JoinTimeout { stage: JoinStage::Relay, limit, last_error: None };
        }
        let (stage, last_error) = stage_of(self.phase.borrow().clone());
        NodeError::JoinTimeout { stage, limit, last_error }
    }
}

/// Whether all tags that the user asked for are granted. Further ones are only said: an auth key may bring its own.
fn compare_tags(asked: &[String], granted: &[String]) -> Result<(), NodeError> {
    let without = |tags: &[String], others: &[String]| {
        let mut left: Vec<_> = tags.iter().filter(|tag| !others.contains(tag)).cloned().collect();
        left.sort();
        left
    };
    let missing = without(asked, granted);
    if !missing.is_empty() {
        return Err(NodeError::TagsDiffer { missing, granted: granted.to_vec() });
    }
    let besides = without(granted, asked);
    if !asked.is_empty() && !besides.is_empty() {
        info!(tags = besides.join(", "), "granted besides the tags asked for");
    }
    Ok(())
}

fn stage_of(phase: Phase) -> (JoinStage, Option<Arc<control::RegisterError>>) {
    match phase {
        Phase::Connecting(error) => (JoinStage::Control, error),
        Phase::AwaitingKey => (JoinStage::Mint, None),
        Phase::Registering(error) => (JoinStage::Register, error),
        Phase::AwaitingNetmap(error) => (JoinStage::Netmap, error),
        Phase::AwaitingApproval => (JoinStage::Approval, None),
        Phase::Reconnecting(error) => (JoinStage::Netmap, Some(error)),
        Phase::Online | Phase::Failed(_) => (JoinStage::Netmap, None),
    }
}

/// The failure as ours: it is shared with whoever else watches the phase, so its words are carried over.
fn failed(failure: &Failure) -> NodeError {
    match failure {
        Failure::Register(error) => NodeError::Register(error.clone()),
        Failure::KeyExpired => NodeError::KeyExpired,
        Failure::Deleted => NodeError::Deleted,
        Failure::LockedOut => NodeError::LockedOut,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| format!("tag:{name}")).collect()
    }

    #[test]
    fn asked_tags_must_all_be_granted() {
        assert!(compare_tags(&[], &tags(&["a"])).is_ok());
        assert!(compare_tags(&tags(&["b", "a"]), &tags(&["a", "b", "c"])).is_ok());
        let error = compare_tags(&tags(&["b", "a", "x"]), &tags(&["a", "c"])).unwrap_err();
        assert_eq!(error.to_string(), "the tailnet did not grant tag:b, tag:x; it granted tag:a, tag:c");
        let error = compare_tags(&tags(&["b"]), &[]).unwrap_err();
        assert_eq!(error.to_string(), "the tailnet did not grant tag:b");
    }

    fn watcher(minting: watch::Receiver<Progress>) -> Watcher {
        Watcher {
            netmap: watch::channel(None).1,
            phase: watch::channel(Phase::AwaitingKey).1,
            accepted: watch::channel(HostReport::default()).1,
            home: watch::channel(None).1,
            minting,
            started: Instant::now(),
            join_timeout: Duration::from_secs(3),
            exit_node: None,
            asked_tags: Vec::new(),
            joined_after: None,
            was_ready: false,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_that_failed_a_moment_ago_is_why_the_join_did() {
        let (say, minting) = watch::channel(Progress::Minting(None));
        let mut watcher = watcher(minting);
        let late = async {
            tokio::time::sleep(LAST_WORD / 2).await;
            say.send_replace(Progress::Failed(provision::MintError::NoTags));
        };
        let (error, ()) = tokio::join!(watcher.too_late(), late);
        assert!(matches!(error, NodeError::Mint(_)), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_that_is_still_being_made_is_not_waited_for() {
        let (_say, minting) = watch::channel(Progress::Minting(None));
        let began = tokio::time::Instant::now();
        let error = watcher(minting).too_late().await;
        assert!(matches!(error, NodeError::JoinTimeout { .. }), "{error}");
        assert!(began.elapsed() <= LAST_WORD * 2);
    }
}
