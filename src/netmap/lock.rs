//! Which peers the tailnet lock lets us talk to.
//!
//! While the lock is on, a node key counts only with a signature that vouches for it. Form and chain are checked, trust
//! is not: the keys that a tailnet trusts are not asked for, so control is believed about who may sign, and about
//! whether the lock is on. Keys that a rotation has replaced count no more. Nodes that are not covered by the lock are
//! left in; they get no more than their own addresses anyway.
//! Source: Tailscale, ipn/ipnlocal/tailnet-lock.go, `tkaFilterNetmapLocked` and `rotationTracker`.

use std::collections::{BTreeMap, BTreeSet};

use super::NodeId;
use super::state::Tracked;
use crate::key::signature::{Authorised, NodeKeySignature, SignatureError};
use crate::key::{LockPublic, NodePublic};
use crate::wire::tailcfg::node::Node;

/// What a node's signature says of its key.
pub(super) fn verdict(node: &Node) -> Result<Authorised, SignatureError> {
    NodeKeySignature::decode(&node.key_signature.0)?.authorises(&node.key)
}

/// The peers that the lock hides.
pub(super) fn hidden(peers: &BTreeMap<NodeId, Tracked>) -> BTreeSet<NodeId> {
    let covered = || peers.values().filter(|tracked| !tracked.node.unsigned_peer_api_only);
    let mut hidden: BTreeSet<NodeId> =
        covered().filter(|tracked| tracked.verdict().is_err()).map(|tracked| tracked.node.id).collect();
    let signed = covered().filter_map(|tracked| Some((&tracked.node, tracked.verdict().as_ref().ok()?)));
    let obsolete = obsolete(signed.map(|(node, authorised)| (node.key, authorised)));
    hidden.extend(covered().map(|tracked| &tracked.node).filter(|node| obsolete.contains(&node.key)).map(|n| n.id));
    hidden
}

/// Node keys that were rotated out. Of several that one key has rotated to, as with a cloned disk, the one with the
/// longest history counts; if that is not one, none does.
fn obsolete<'a>(signed: impl Iterator<Item = (NodePublic, &'a Authorised)>) -> BTreeSet<NodePublic> {
    let mut replaced = BTreeSet::new();
    let mut chains: BTreeMap<LockPublic, Vec<(usize, NodePublic)>> = BTreeMap::new();
    for (node, authorised) in signed.filter(|(_, authorised)| authorised.rotation) {
        replaced.extend(authorised.previous.iter().copied());
        if let Some(rotated_by) = authorised.rotated_by {
            chains.entry(rotated_by).or_default().push((authorised.previous.len(), node));
        }
    }
    for mut chain in chains.into_values() {
        chain.retain(|(_, node)| !replaced.contains(node));
        let longest = chain.iter().map(|(length, _)| *length).max();
        let newest: Vec<_> = chain.iter().filter(|(length, _)| Some(*length) == longest).collect();
        let kept = match newest[..] {
            [(_, only)] => Some(*only),
            _ => None,
        };
        replaced.extend(chain.into_iter().map(|(_, node)| node).filter(|node| Some(*node) != kept));
    }
    replaced
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use super::*;
    use crate::key::signature::vectors::{DIRECT, ROTATION, ROTATION_TWICE, SIGNED, node};
    use crate::wire::tailcfg::Bytes;

    fn tracked(id: NodeId, key: u8, signature: &[u8]) -> (NodeId, Tracked) {
        let node = Node { id, key: node(key), key_signature: Bytes(signature.to_vec()), ..Node::default() };
        let peer = super::super::node::peer(&node, jiff::Timestamp::UNIX_EPOCH).into();
        (id, Tracked { node: Box::new(node), peer, verdict: OnceLock::new() })
    }

    fn hides(peers: impl IntoIterator<Item = (NodeId, Tracked)>) -> Vec<NodeId> {
        hidden(&peers.into_iter().collect()).into_iter().collect()
    }

    #[test]
    fn peers_without_a_signature_of_their_own_key_are_hidden() {
        let mut bare = tracked(4, 0x44, &[]);
        bare.1.node.unsigned_peer_api_only = true;
        let peers = [tracked(1, 0x11, SIGNED), tracked(2, 0x22, &[]), tracked(3, 0x33, SIGNED), bare];
        assert_eq!(hides(peers), [2, 3]);
    }

    #[test]
    fn a_forged_signature_hides() {
        let mut forged = DIRECT.to_vec();
        *forged.last_mut().unwrap() ^= 1;
        assert_eq!(hides([tracked(1, 0x11, &forged)]), [1]);
    }

    #[test]
    fn a_key_that_was_rotated_out_is_hidden() {
        let peers = [tracked(1, 0x11, DIRECT), tracked(2, 0x22, ROTATION), tracked(3, 0x33, ROTATION_TWICE)];
        assert_eq!(hides(peers), [1, 2]);
        assert_eq!(hides([tracked(1, 0x11, DIRECT), tracked(2, 0x22, ROTATION)]), [1]);
    }

    #[test]
    fn two_equally_long_histories_of_one_key_are_both_hidden() {
        let rotated_by = Some(LockPublic::from_bytes([9; 32]));
        let chain = |previous: &[u8]| Authorised {
            rotation: true,
            previous: previous.iter().map(|octet| node(*octet)).collect(),
            rotated_by,
        };
        let (one, two, longer) = (chain(&[1]), chain(&[2]), chain(&[3, 4]));
        let dropped = |signed: &[(u8, &Authorised)]| {
            obsolete(signed.iter().map(|(octet, authorised)| (node(*octet), *authorised)))
        };
        assert_eq!(dropped(&[(11, &one), (12, &two)]), [1, 2, 11, 12].map(node).into());
        assert_eq!(dropped(&[(11, &one), (12, &longer)]), [1, 3, 4, 11].map(node).into());
    }
}
