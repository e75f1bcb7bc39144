//! A new netmap, held against what an association knows: what it does not concern goes on untouched.

use std::net::IpAddr;
use std::sync::Arc;

use super::super::dial::{self, Host};
use super::super::way::{NextHop, Remote};
use super::{Association, Known};
use crate::netmap::Netmap;
use crate::netmap::diff::Changes;

impl Association {
    /// Sees to a netmap that nobody has looked at: no datagram goes by an older one.
    pub(super) fn catch_up(&mut self) {
        if self.netmap.has_changed().unwrap_or(false) {
            self.review();
        }
    }

    /// Holds everything against a new netmap. A mapping ends where it would be made otherwise now; what was found for
    /// a name, where somebody else decides the name; a refusal, where its target may have come into reach.
    pub(super) fn review(&mut self) {
        let Some(netmap) = self.netmap.borrow_and_update().clone() else { return };
        let before = self.reviewed.replace(Arc::clone(&netmap));
        self.mappings.retain(|remote, mapping| match remote {
            Remote::Tunnel(address) => mapping.next_hop == NextHop::to(&netmap, address.ip()),
            Remote::Outside(address) => dial::is_public(&netmap, address.ip()),
        });
        let changes = Changes::between(before.as_deref(), &netmap);
        let rerouted = changes.peers_added + changes.peers_removed + changes.routes_added + changes.routes_removed > 0;
        let node = &self.node;
        let decided_alike =
            |name: &str| before.as_deref().is_some_and(|before| node.resolvers.decided_alike(before, &netmap, name));
        let seen_alike = |ip| before.as_deref().is_some_and(|before| seen(before, ip) == seen(&netmap, ip));
        self.targets.retain(|target, known| match (known, &target.host) {
            (Known::At(Remote::Tunnel(_)), Host::Name(name)) => decided_alike(name),
            (Known::At(Remote::Outside(_)), host) => dial::is_outside(node, &netmap, host).unwrap_or(false),
            (Known::Refused { stands, .. }, Host::Ip(ip)) => {
                *stands &= seen_alike(*ip);
                true
            }
            (Known::Refused { stands, .. }, Host::Name(name)) => {
                // What it would have led to is not known: any route may be the one that was missing.
                *stands &= !rerouted && decided_alike(name);
                true
            }
            (Known::At(Remote::Tunnel(_)), Host::Ip(_)) | (Known::Asked { .. }, _) => true,
        });
        self.forget_unmapped();
    }
}

/// What a netmap says of an address that matters to a dial.
fn seen(netmap: &Netmap, ip: IpAddr) -> (Option<NextHop>, bool) {
    (NextHop::to(netmap, ip), dial::is_public(netmap, ip.to_canonical()))
}

#[cfg(test)]
mod tests;
