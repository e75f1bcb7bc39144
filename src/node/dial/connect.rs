//! From addresses to one connection: several raced, each failure told by what is known of the peer that serves it.

use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::super::core::Shared;
use super::super::tunnel::flow::Unopened;
use super::super::tunnel::{ConnectFailure, TunnelStream};
use super::route::{no_family, unrouted};
use super::{DialError, Exhausted, Gap, Inner, RouteError};
use crate::engine::{PeerStatus, Transport};
use crate::key::NodePublic;
use crate::netmap::Netmap;
use crate::transport::race::race;

/// How long a peer has to answer that control calls offline: control may be late, but seldom is.
const OFFLINE_LIMIT: Duration = Duration::from_secs(5);
/// How long the first address of a target has to answer before the next is tried beside it.
/// Source: RFC 8305, 8 (connection attempt delay); Tailscale uses 300 ms too.
pub(in crate::node) const NEXT_ADDRESS: Duration = Duration::from_millis(300);

/// Connects to whichever address answers first; each next one joins in after a pause, or when one before it has failed.
pub(super) async fn connect_any(
    node: &Inner,
    netmap: &Arc<Netmap>,
    port: u16,
    addresses: Vec<IpAddr>,
    deadline: Instant,
) -> Result<TunnelStream, DialError> {
    let attempts = addresses.into_iter().enumerate().map(|(index, ip)| async move {
        let connected = tokio::select! {
            connected = connect_by_route(node, netmap, SocketAddr::new(ip, port), deadline) => connected,
            error = withdrawal(node.netmap.clone(), ip) => Err(error),
        };
        connected.map_err(|error| (index, error))
    });
    race(attempts, NEXT_ADDRESS).await.map_err(telling)
}

/// The failure that tells most, and of several such the first address's: which comes first in time is chance.
fn telling(failures: Vec<(usize, DialError)>) -> DialError {
    let told = failures.into_iter().min_by_key(|(index, error)| (rank(error), *index));
    told.expect("there is at least one address, and each one's failure is kept").1
}

/// What somebody said, then what we know for certain of ourselves, then silence, from far to near.
fn rank(error: &DialError) -> u8 {
    match error {
        DialError::Rejected { .. } | DialError::Refused { .. } => 0,
        DialError::Exhausted(_) => 1,
        DialError::Unanswered { .. } => 2,
        DialError::PeerSilent { .. } => 3,
        DialError::Route(_)
        | DialError::Public { .. }
        | DialError::Resolve(_)
        | DialError::NotJoined { .. }
        | DialError::Direct(_) => 4,
    }
}

/// Connects to one address, and once more where its route moved to another peer meanwhile: what was sent by the first
/// router and goes on by the second is a stranger's to the target, which resets it.
async fn connect_by_route(
    node: &Inner,
    netmap: &Netmap,
    address: SocketAddr,
    deadline: Instant,
) -> Result<TunnelStream, DialError> {
    let router = |netmap: &Netmap| netmap.route(address.ip()).map(|route| route.peer.id);
    let refused = match connect(node, netmap, address, deadline).await {
        Err(error @ DialError::Refused { .. }) => error,
        outcome => return outcome,
    };
    let newest = node.netmap.borrow().clone();
    match newest.filter(|newest| router(newest) != router(netmap)) {
        Some(newest) => connect(node, &newest, address, deadline).await,
        None => Err(refused),
    }
}

/// Waits until no route covers `ip` any more: whoever dials it need not wait for its silence.
async fn withdrawal(mut newest: watch::Receiver<Option<Arc<Netmap>>>, ip: IpAddr) -> DialError {
    let gone = |netmap: &Option<Arc<Netmap>>| netmap.as_ref().is_some_and(|netmap| netmap.route(ip).is_none());
    let found = newest.wait_for(gone).await.ok().and_then(|netmap| netmap.clone());
    match found {
        Some(netmap) => unrouted(&netmap, ip),
        None => std::future::pending().await,
    }
}

/// Connects to one address, and says why it failed by what is known of the peer that serves it at the end.
async fn connect(
    node: &Inner,
    netmap: &Netmap,
    address: SocketAddr,
    deadline: Instant,
) -> Result<TunnelStream, DialError> {
    let (core, begun) = (&node.core, Instant::now());
    let router = |netmap: &Netmap| netmap.route(address.ip()).map(|route| route.peer.clone());
    let Some(mut peer) = router(netmap) else { return Err(unrouted(netmap, address.ip())) };
    let mut handshakes_before = handshakes(core, &peer.key);
    let mut limit = deadline.saturating_duration_since(begun);
    if peer.online == Some(false) {
        limit = limit.min(OFFLINE_LIMIT);
    }
    let mut connecting = pin!(TunnelStream::connect(core, address, limit));
    let mut newest = node.netmap.clone();
    newest.mark_changed();
    let failure = loop {
        tokio::select! {
            connected = &mut connecting => match connected {
                Ok(stream) => {
                    core.borrow_mut().note_answer(&peer.key, Instant::now());
                    return Ok(stream);
                }
                Err(failure) => break failure,
            },
            Ok(()) = newest.changed() => {
                let Some(now) = newest.borrow_and_update().as_deref().and_then(router) else { continue };
                if now.key != peer.key {
                    handshakes_before = handshakes(core, &now.key);
                }
                peer = now;
            }
        }
    };
    let offline = peer.online == Some(false);
    let (name, waited) = (peer.name.clone(), begun.elapsed());
    Err(match failure {
        ConnectFailure::Unopened(why) => unopened(why, address),
        ConnectFailure::Refused => DialError::Refused { address },
        ConnectFailure::Rejected(reason) => DialError::Rejected { peer: name, reason: reason.to_string() },
        ConnectFailure::Unanswered if offline => RouteError::Offline { address: address.ip(), router: name }.into(),
        ConnectFailure::Unanswered => {
            match verdict(core, &peer.key, node.config.transport, begun) {
                Verdict::TargetSilent { unheard } => DialError::Unanswered { peer: name, address, waited, unheard },
                Verdict::PeerSilent(gap) => {
                    core.borrow_mut().say_silent(&peer.key, &name, Instant::now());
                    let sent = handshakes(core, &peer.key).saturating_sub(handshakes_before);
                    // Where there is a gap, what counts as sent found no way out.
                    let tries = if gap.is_none() { sent } else { 0 };
                    DialError::PeerSilent { peer: name, tries, waited, gap }
                }
            }
        }
    })
}

/// Who is silent when nothing answered a dial.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::node) enum Verdict {
    /// The target, as far as is known; for how long nothing has come from its peer, if nothing did during the dial.
    TargetSilent { unheard: Option<Duration> },
    /// The peer; why, where no packet leaves for it.
    PeerSilent(Option<Gap>),
}

/// Who was silent during a dial, or a question, that began at `begun`.
pub(in crate::node) fn verdict(core: &Shared, peer: &NodePublic, transport: Transport, begun: Instant) -> Verdict {
    let (mut core, now) = (core.borrow_mut(), Instant::now());
    let engine = core.engine();
    let udp_blocked = engine.host_state().netinfo.working_udp == Some(false);
    let gap = match transport {
        Transport::Direct => Gap::Direct { udp_blocked },
        Transport::Derp => Gap::Relay,
        Transport::Auto => Gap::Both,
    };
    engine.peer_status(peer, now).map_or(Verdict::PeerSilent(None), |status| judge(&status, gap, begun, now))
}

/// A session alone says little: it outlives its peer and every path by minutes.
fn judge(status: &PeerStatus, gap: Gap, begun: Instant, now: Instant) -> Verdict {
    if !status.open {
        return Verdict::PeerSilent(Some(gap));
    }
    match status.heard {
        Some(heard) if status.established && status.asking_since.is_none() => {
            let unheard = (heard < begun).then(|| now.saturating_duration_since(heard));
            Verdict::TargetSilent { unheard }
        }
        Some(_) | None => Verdict::PeerSilent(None),
    }
}

/// The failure for a flow that could not even be opened.
pub(in crate::node) fn unopened(why: Unopened, address: SocketAddr) -> DialError {
    match why {
        Unopened::Family => no_family(address.ip()).into(),
        Unopened::Unaddressable => RouteError::None { address: address.ip() }.into(),
        Unopened::Ports => Exhausted::Ports { address }.into(),
        Unopened::Memory => Exhausted::Memory.into(),
    }
}

/// Handshakes sent to a peer so far.
fn handshakes(core: &Shared, peer: &NodePublic) -> u64 {
    core.borrow_mut().engine().peer_status(peer, Instant::now()).map_or(0, |status| status.handshakes_sent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::PathStatus;

    #[test]
    fn tunnel_is_called_up_only_where_the_peer_was_heard_during_the_dial() {
        let (now, waited) = (Instant::now(), Duration::from_secs(5));
        let (begun, ago) = (now - waited, |seconds| Some(now - Duration::from_secs(seconds)));
        let relayed = PeerStatus {
            handshakes_sent: 1,
            last_handshake: ago(60),
            established: true,
            heard: ago(1),
            asking_since: None,
            unheard_since: None,
            path: PathStatus::Derp { region: 1 },
            open: true,
            sent_bytes: 0,
            received_bytes: 0,
        };
        let judged = |status| judge(&status, Gap::Both, begun, now);
        let target = |unheard| Verdict::TargetSilent { unheard };
        assert_eq!(judged(relayed), target(None));
        assert_eq!(judged(PeerStatus { heard: ago(47), ..relayed }), target(Some(Duration::from_secs(47))));
        let asking = PeerStatus { asking_since: ago(2), ..relayed };
        for (status, gap) in [
            (PeerStatus { established: false, ..relayed }, None),
            (PeerStatus { heard: None, ..relayed }, None),
            (asking, None),
            (PeerStatus { open: false, ..asking }, Some(Gap::Both)),
        ] {
            assert_eq!(judged(status), Verdict::PeerSilent(gap));
        }
        let address = SocketAddr::from(([10, 20, 0, 80], 80));
        let told = |unheard| DialError::Unanswered { peer: "r".to_owned(), address, waited, unheard }.to_string();
        assert_eq!(told(None), "the tunnel to r is up, but 10.20.0.80:80 did not answer in 5s");
        let silent = "nothing has come from r for 47s: 10.20.0.80:80 did not answer in 5s";
        assert_eq!(told(Some(Duration::from_secs(47))), silent);
    }

    #[test]
    fn of_several_failures_the_one_that_tells_most_counts_in_whichever_order_they_come() {
        let address = SocketAddr::from(([10, 20, 0, 80], 80));
        let waited = Duration::from_secs(1);
        let all = [
            DialError::Refused { address },
            DialError::Unanswered { peer: "r".to_owned(), address, waited, unheard: None },
            DialError::PeerSilent { peer: "r".to_owned(), tries: 1, waited, gap: None },
            RouteError::Withdrawn { address: address.ip() }.into(),
        ];
        for skipped in 0..all.len() {
            let rest: Vec<_> = all.iter().cloned().enumerate().skip(skipped).collect();
            let reversed: Vec<_> = rest.iter().cloned().rev().collect();
            for failures in [rest, reversed] {
                assert_eq!(telling(failures).to_string(), all[skipped].to_string());
            }
        }
        let silent = |tries, gap| DialError::PeerSilent { peer: "r".to_owned(), tries, waited, gap }.to_string();
        assert_eq!(silent(2, None), "r did not answer 2 WireGuard handshakes in 1s");
        let told = "r did not answer in 1s; no UDP comes back from anywhere, and --transport direct allows no relay";
        assert_eq!(silent(0, Some(Gap::Direct { udp_blocked: true })), told);
        let second = DialError::Rejected { peer: "s".to_owned(), reason: "acl".to_owned() };
        assert!(matches!(telling(vec![(1, second), (0, all[0].clone())]), DialError::Refused { .. }));
    }
}
