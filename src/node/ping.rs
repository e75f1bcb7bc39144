//! Pings that control asks for: is a peer there, how far, and which way do packets take to it.
//! Source: Tailscale, ipn/ipnlocal, `LocalBackend.Ping`; tailcfg, `PingResponse`.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::timeout;

use super::core::Shared;
use crate::control::PingJob;
use crate::engine::PathStatus;
use crate::wire::tailcfg::map::PingResponse;

/// The longest that one ping may take. Source: control/controlclient/direct.go, `doPingerPing`.
const LIMIT: Duration = Duration::from_secs(10);
/// A ping that is not answered, as when the handshake is not done yet, is sent again after this time.
const AGAIN: Duration = Duration::from_secs(1);

/// Answers jobs one after the other until control is gone.
pub(super) async fn serve(core: Shared, mut jobs: mpsc::Receiver<PingJob>) {
    while let Some(job) = jobs.recv().await {
        let response = answer(&core, &job.kind, job.ip).await;
        // Control's side of the task may have run out of patience.
        let _ = job.reply.send(response);
    }
}

async fn answer(core: &Shared, kind: &str, ip: IpAddr) -> PingResponse {
    let mut response = PingResponse { r#type: kind.to_owned(), ip: Some(ip), ..PingResponse::default() };
    let netmap = core.borrow().netmap().borrow().clone();
    let Some(peer) = netmap.as_ref().and_then(|netmap| netmap.route(ip)).map(|route| route.peer.clone()) else {
        response.is_local_ip = netmap.is_some_and(|netmap| netmap.self_node.addresses.contains(&ip));
        response.err =
            if response.is_local_ip { "it is our own address" } else { "no peer has this address" }.to_owned();
        return response;
    };
    response.node_ip = peer.addresses.first().copied();
    response.node_name.clone_from(&peer.name);
    if !matches!(kind, "disco" | "TSMP") {
        "this kind of ping is not offered".clone_into(&mut response.err);
        return response;
    }
    match timeout(LIMIT, round_trip(core, ip)).await {
        Ok((latency, port)) => {
            response.latency_seconds = Some(latency.as_secs_f64());
            response.peerapi_port = Some(port).filter(|port| *port != 0);
        }
        Err(_) => response.err = format!("no answer within {LIMIT:?}"),
    }
    let path = core.borrow_mut().engine().peer_status(&peer.key, Instant::now()).map(|status| status.path);
    match path {
        Some(PathStatus::Direct { addr, .. }) => response.endpoint = addr.to_string(),
        Some(PathStatus::Derp { region }) => response.derp_region_id = Some(region),
        Some(PathStatus::None) | None => {}
    }
    response
}

/// There and back inside the tunnel, and the peer's PeerAPI port.
async fn round_trip(core: &Shared, ip: IpAddr) -> (Duration, u16) {
    loop {
        let begun = Instant::now();
        let answer = core.borrow_mut().ping(ip, begun);
        if let Some(answer) = answer
            && let Ok(Ok(port)) = timeout(AGAIN, answer).await
        {
            return (begun.elapsed(), port);
        }
        tokio::time::sleep(AGAIN.saturating_sub(begun.elapsed())).await;
    }
}
