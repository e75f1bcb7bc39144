//! What changed between two netmaps, in counts: enough for a log line, and no address in it.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use super::{Netmap, Peer};

/// How one netmap differs from the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Changes {
    /// Peers that were not there.
    pub peers_added: usize,
    /// Peers that are no longer there.
    pub peers_removed: usize,
    /// Peers of which anything else changed.
    pub peers_changed: usize,
    /// Prefixes of peers, other than their own addresses, that were not there.
    pub routes_added: usize,
    /// Such prefixes that are no longer there.
    pub routes_removed: usize,
    /// Whether anything about ourselves changed.
    pub self_node: bool,
    /// Whether the DNS settings did.
    pub dns: bool,
    /// Whether the regions of DERP did.
    pub derp: bool,
}

impl Changes {
    /// How `new` differs from `old`; without `old`, from nothing.
    pub fn between(old: Option<&Netmap>, new: &Netmap) -> Self {
        let mut changes = Self {
            self_node: old.is_none_or(|old| old.self_node != new.self_node),
            dns: old.is_none_or(|old| old.dns != new.dns),
            derp: old.is_none_or(|old| old.derp != new.derp),
            ..Self::default()
        };
        for (id, peer) in new.peers.iter() {
            match old.and_then(|old| old.peers.get(id)) {
                None => {
                    changes.peers_added += 1;
                    changes.routes_added += routes(peer).count();
                }
                Some(before) if Arc::ptr_eq(before, peer) => {}
                Some(before) => changes.compare(before, peer),
            }
        }
        for (_, gone) in old.iter().flat_map(|old| old.peers.iter()).filter(|(id, _)| !new.peers.contains_key(id)) {
            changes.peers_removed += 1;
            changes.routes_removed += routes(gone).count();
        }
        changes
    }

    fn compare(&mut self, before: &Peer, after: &Peer) {
        self.peers_changed += usize::from(before != after);
        let before: BTreeSet<_> = routes(before).collect();
        let after: BTreeSet<_> = routes(after).collect();
        self.routes_added += after.difference(&before).count();
        self.routes_removed += before.difference(&after).count();
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [
            ("+", self.peers_added, "peers"),
            ("-", self.peers_removed, "peers"),
            ("~", self.peers_changed, "peers"),
            ("+", self.routes_added, "routes"),
            ("-", self.routes_removed, "routes"),
        ];
        let kinds = [(self.self_node, "self"), (self.dns, "dns"), (self.derp, "derp")];
        let counts =
            counts.iter().filter(|(_, count, _)| *count > 0).map(|(sign, count, of)| format!("{sign}{count} {of}"));
        let kinds = kinds.iter().filter(|(changed, _)| *changed).map(|(_, kind)| (*kind).to_owned());
        let parts: Vec<_> = counts.chain(kinds).collect();
        f.write_str(if parts.is_empty() { "nothing" } else { "" })?;
        f.write_str(&parts.join(", "))
    }
}

/// What a peer announces besides its own addresses.
fn routes(peer: &Peer) -> impl Iterator<Item = ipnet::IpNet> {
    peer.allowed_ips.iter().copied().filter(|net| !peer.addresses.iter().any(|ip| ipnet::IpNet::from(*ip) == *net))
}
