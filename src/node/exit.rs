//! The exit node that the user named: whether there is one, and which there are instead.

use super::NodeError;
use crate::netmap::Netmap;

/// Exit nodes listed where the one that was named is not there.
const LISTED: usize = 5;

/// The failure when no usable peer of the netmap is the exit node that was asked for.
pub(super) fn missing(netmap: &Netmap, wanted: String) -> Option<NodeError> {
    if netmap.exit_node.is_some() {
        return None;
    }
    let offers = |peer: &&std::sync::Arc<crate::netmap::Peer>| peer.allowed_ips.iter().any(|net| net.prefix_len() == 0);
    let names: Vec<&str> = netmap.peers.values().filter(offers).map(|peer| peer.name.as_str()).collect();
    let shown = names.iter().take(LISTED).copied().collect::<Vec<_>>().join(", ");
    let offered = match names.len() {
        0 => "is none".to_owned(),
        1..=LISTED => format!("is {shown}"),
        more => format!("is {shown} and {} more", more - LISTED),
    };
    Some(NodeError::NoExitNode { wanted, offered })
}
