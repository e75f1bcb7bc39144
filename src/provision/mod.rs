//! Auth keys that are made for one run: by an OAuth client, or by a workload that proves who it is.
//!
//! The key is made while control is dialled, so that neither waits for the other. It admits one node, carries the tags
//! that were asked for and expires soon; if that node never registers, it is taken back.

mod api;
mod attributes;
mod credential;
mod error;
mod http;

use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout_at};
use tracing::{debug, info};
use url::Url;

pub use attributes::Attributes;
pub use credential::{
    ClientId, ClientSecret, Credential, CredentialError, GitHub, IdToken, Identity, Maker, TokenSource,
};
pub use error::MintError;

use crate::key::AuthKey;
use crate::transport::underlay::Underlay;
use api::{Access, Minted, Tries};

/// How long a key lives at least: it is used at once, but clocks differ and control may be busy. A key that was made
/// in vain is gone after that.
const SHORTEST_EXPIRY: Duration = Duration::from_secs(300);

/// Of the time to join, what may pass until the key is there: its failure shall be told, and not that of the join.
const SHARE: (u32, u32) = (19, 20);

/// For whom a key is made.
#[derive(Debug, Clone)]
pub struct Order {
    /// The tags that it carries.
    pub tags: Vec<String>,
    /// What the node will be called, for the key's description.
    pub hostname: String,
    /// How long it may be used.
    pub expiry: Duration,
}

/// Where and how a key is made.
pub struct Config {
    /// How to reach the API.
    pub underlay: Underlay,
    /// The control server, whose API knows federated clients. Source: Tailscale, cmd/tailscale/cli, `runUp`.
    pub login_server: Url,
    /// The tags that the node asks for.
    pub tags: Vec<String>,
    /// What the node will be called.
    pub hostname: String,
    /// The longest that joining may take.
    pub join_timeout: Duration,
}

/// How far the key has come.
#[derive(Debug, Clone)]
pub enum Progress {
    /// It is being made; carries what last went wrong.
    Minting(Option<MintError>),
    /// It is there.
    Done,
    /// There will be none.
    Failed(MintError),
}

/// A key that is being made, or was.
pub struct Minting {
    /// How far it has come.
    pub progress: watch::Receiver<Progress>,
    revoke: mpsc::Sender<(Instant, oneshot::Sender<()>)>,
}

impl Minting {
    /// Of a key that was there already.
    pub fn done() -> Self {
        Self { progress: watch::Sender::new(Progress::Done).subscribe(), revoke: mpsc::channel(1).0 }
    }

    /// Starts making a key on `runtime`, which goes to `out`; dropping that unused says that there will be none. Once
    /// `joined` ends, what could unmake the key is forgotten.
    pub fn start(
        runtime: &Handle,
        maker: Maker,
        config: Config,
        out: oneshot::Sender<AuthKey>,
        joined: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        let (say, progress) = watch::channel(Progress::Minting(None));
        let (revoke, revocations) = mpsc::channel(1);
        runtime.spawn(run(maker, config, (say, out), joined, revocations));
        Self { progress, revoke }
    }

    /// Takes the key back if no node used it, by `deadline` at most; returns at once where there is nothing to do.
    pub async fn revoke(&self, deadline: Instant) {
        let (reply, done) = oneshot::channel();
        if self.revoke.try_send((deadline, reply)).is_ok() {
            // Without an answer in time its expiry does it.
            let _ = timeout_at(deadline, done).await;
        }
    }
}

async fn run(
    maker: Maker,
    config: Config,
    (say, out): (watch::Sender<Progress>, oneshot::Sender<AuthKey>),
    joined: impl Future<Output = ()>,
    mut revocations: mpsc::Receiver<(Instant, oneshot::Sender<()>)>,
) {
    let started = Instant::now();
    let minted = tokio::select! {
        minted = mint(maker, &config, &say) => minted,
        // The run ends: a key that is under way is not waited for, and expires.
        _ = revocations.recv() => return,
    };
    let Minted { key, id, access } = match minted {
        Ok(minted) => minted,
        Err(error) => {
            say.send_replace(Progress::Failed(error));
            return;
        }
    };
    info!(ms = started.elapsed().as_millis(), "minted an auth key");
    say.send_replace(Progress::Done);
    // Nobody waits for it any more if the run has ended.
    let _ = out.send(key);
    tokio::select! {
        () = joined => {}
        wish = revocations.recv() => if let Some((deadline, reply)) = wish {
            revoke(&access, &id, deadline).await;
            let _ = reply.send(());
        },
    }
}

async fn mint(maker: Maker, config: &Config, say: &watch::Sender<Progress>) -> Result<Minted, MintError> {
    if config.tags.is_empty() {
        return Err(MintError::NoTags);
    }
    let failed = |error: &MintError| drop(say.send_replace(Progress::Minting(Some(error.clone()))));
    let tries = Tries { deadline: Instant::now() + config.join_timeout * SHARE.0 / SHARE.1, failed: &failed };
    let expiry = SHORTEST_EXPIRY.max(config.join_timeout);
    let order = Order { tags: config.tags.clone(), hostname: config.hostname.clone(), expiry };
    match maker {
        Maker::Client(client) => {
            api::client(&client, &config.underlay, &tries).await?.mint(client.attributes, &order, &tries).await
        }
        Maker::Identity(identity) => {
            let access = api::identity(&identity, (&config.underlay, &config.login_server), &tries).await?;
            access.mint(identity.client.attributes, &order, &tries).await
        }
    }
}

async fn revoke(access: &Access, id: &str, deadline: Instant) {
    if id.is_empty() {
        return;
    }
    match timeout_at(deadline, access.revoke(id)).await {
        Ok(Ok(())) => info!("took the unused auth key back"),
        Ok(Err(trouble)) => debug!(?trouble, "the unused auth key was not taken back and will expire"),
        Err(_) => debug!("the unused auth key was not taken back in time and will expire"),
    }
}
