//! What control is told beside the map stream: where we can be reached, and that we are still there.
//! Source: Tailscale, control/controlclient/direct.go, `sendMapRequest`.

use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::{Method, StatusCode};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use tracing::debug;

use super::dial::{CAPABILITY_VERSION, Session, excerpt};
use super::{ConnectError, HostReport};
use crate::key::{DiscoPublic, NodePublic};
use crate::netmap::Netmap;
use crate::transport::backoff::Backoff;
use crate::wire::tailcfg::hostinfo::Hostinfo;
use crate::wire::tailcfg::map::MapRequest;

/// The longest that an update may take. headscale answers after its tick of half a second.
pub(super) const UPDATE_LIMIT: Duration = Duration::from_secs(15);
/// How many seconds control is not asked for; spread, so that many runs do not ask at once. Besides what changes, this
/// is how we learn that the node was deleted: headscale (0.29) leaves the map stream of a deleted node open and goes on
/// sending keep-alives.
const CHECK: std::ops::RangeInclusive<f64> = 45.0..=75.0;
/// The most octets of an error's body.
pub(super) const ERROR_BODY_MAX: usize = 64 << 10;

/// Makes the bodies of `POST /machine/map`.
pub(super) struct MapRequester {
    pub(super) node: NodePublic,
    pub(super) disco: DiscoPublic,
    pub(super) hostinfo: Hostinfo,
}

impl MapRequester {
    pub(super) fn body(&self, report: &HostReport, stream: bool) -> Vec<u8> {
        let mut hostinfo = self.hostinfo.clone();
        hostinfo.net_info.clone_from(&report.net_info);
        let request = MapRequest {
            version: CAPABILITY_VERSION.into(),
            compress: "zstd",
            keep_alive: true,
            node_key: self.node,
            disco_key: self.disco,
            stream,
            omit_peers: !stream,
            hostinfo: &hostinfo,
            endpoints: &report.endpoints,
            endpoint_types: &report.endpoint_types,
        };
        serde_json::to_vec(&request).expect("a request of plain values is JSON")
    }
}

/// Tells control of our network: at once, then whenever it changed, and every [`CHECK`] that we are still here. One
/// update is under way at a time, the newest wins.
pub(super) struct Updates {
    pub(super) session: Session,
    pub(super) requester: MapRequester,
    pub(super) report: watch::Receiver<HostReport>,
    pub(super) netmap: watch::Receiver<Option<Arc<Netmap>>>,
    pub(super) accepted: watch::Sender<HostReport>,
    /// Told when the same is to be said once more.
    pub(super) again: Arc<Notify>,
}

impl Updates {
    /// Returns once control says that it does not know us.
    pub(super) async fn run(mut self) -> ConnectError {
        let mut backoff = Backoff::new(super::FIRST_PAUSE, super::LONGEST_PAUSE);
        loop {
            let report = self.report.borrow_and_update().clone();
            self.requester.hostinfo.exit_node_id = exit_node_id(self.netmap.borrow().as_deref());
            match timeout(UPDATE_LIMIT, self.send(&report)).await {
                Ok(Ok(())) => {
                    backoff.reset();
                    // Whoever watches is not woken by the same said again.
                    self.accepted.send_if_modified(|accepted| replace(accepted, report));
                    let check = Duration::from_secs_f64(rand::random_range(CHECK));
                    let _ = timeout(check, self.await_news()).await;
                    continue;
                }
                Ok(Err(error)) if is_unknown(&error) => return error,
                Ok(Err(error)) => debug!(%error, "an update to control failed"),
                Err(_) => debug!("an update to control took too long"),
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }

    /// Waits until there is something else to tell than what the last update said.
    async fn await_news(&mut self) {
        let told = &self.requester.hostinfo.exit_node_id;
        let other = |netmap: &Option<Arc<Netmap>>| exit_node_id(netmap.as_deref()) != *told;
        let other_exit = async { self.netmap.wait_for(other).await.map(drop) };
        tokio::select! {
            Ok(()) = self.report.changed() => {}
            () = self.again.notified() => {}
            Ok(()) = other_exit => {}
            else => std::future::pending().await,
        }
    }

    async fn send(&self, report: &HostReport) -> Result<(), ConnectError> {
        let body = self.requester.body(report, false);
        let response = self.session.request(Method::POST, "/machine/map", body).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ERROR_BODY_MAX).collect().await;
        if status == StatusCode::OK {
            return Ok(());
        }
        let body = body.map(|body| excerpt(&body.to_bytes())).unwrap_or_default();
        Err(ConnectError::Server { status: status.as_u16(), body })
    }
}

/// The stable id of the exit node in use, as control is told; empty without one.
pub(super) fn exit_node_id(netmap: Option<&Netmap>) -> String {
    let peer = netmap.and_then(|netmap| netmap.peers.get(&netmap.exit_node?));
    peer.map(|peer| peer.stable_id.clone()).unwrap_or_default()
}

/// Whether control says that it does not know the node.
pub(super) fn is_unknown(refusal: &ConnectError) -> bool {
    let ConnectError::Server { status, body } = refusal else { return false };
    *status == 404 || (*status == 400 && body.contains("not found"))
}

/// Stores `new` and says whether it was another.
fn replace<T: PartialEq>(known: &mut T, new: T) -> bool {
    let other = *known != new;
    *known = new;
    other
}
