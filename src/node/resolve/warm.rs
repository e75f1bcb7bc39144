//! Peers that will be asked for names are woken as soon as a netmap shows them: the first question need not wait for a
//! handshake.

use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Weak;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use super::super::core::Core;
use super::servers::candidates;
use crate::dns::{ResolverAddr, connectors};
use crate::key::NodePublic;
use crate::netmap::Netmap;

/// The most peers that are woken in a run: a tailnet may have more connectors than one page needs.
const PEERS_MAX: usize = 16;

/// Wakes the first-choice connector of each suffix, each peer once, until the data plane stops.
pub(super) async fn keep_warm(core: Weak<RefCell<Core>>, mut netmaps: watch::Receiver<Option<Arc<Netmap>>>) {
    let mut woken = HashSet::new();
    loop {
        let netmap = netmaps.borrow_and_update().clone();
        for peer in netmap.iter().flat_map(|netmap| first_choices(netmap)) {
            let Some(core) = core.upgrade() else { return };
            if woken.len() < PEERS_MAX && woken.insert(peer) {
                core.borrow_mut().warm(peer, Instant::now());
            }
        }
        drop(netmap);
        if netmaps.changed().await.is_err() {
            return;
        }
    }
}

/// The peers whom the names of each connector's suffix are asked of first, and the exit node.
fn first_choices(netmap: &Netmap) -> Vec<NodePublic> {
    let exit = netmap.exit_node.and_then(|id| netmap.peers.get(&id)).map(|peer| peer.key);
    let lists = netmap.dns.routes.values().map(|list| list.iter().map(ResolverAddr::parse).collect::<Vec<_>>());
    let served = lists.filter(|list| list.iter().any(|resolver| matches!(resolver, ResolverAddr::PeerApi { .. })));
    let apps = netmap.self_node.apps.iter().filter_map(|app| connectors(netmap, app).next()).map(|peer| peer.key);
    exit.into_iter()
        .chain(apps)
        .chain(served.filter_map(|list| candidates(netmap, &list, None).ok()?.first()?.peer))
        .collect()
}
