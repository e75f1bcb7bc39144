//! The peers of the netmap, each in a numbered slot.
//!
//! Tunnels and paths live in vectors indexed by slot, and a WireGuard receiver index carries its slot in the upper 24
//! bits, so that a data packet finds its peer without hashing. A peer whose node key changes is another peer.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::key::{DiscoPublic, NodePublic};
use crate::netmap::{Netmap, Peer};

/// A peer's place; reused after the peer is gone.
pub(super) type Slot = usize;

/// One peer.
#[derive(Debug)]
pub(super) struct Entry {
    /// As the netmap has it.
    pub(super) peer: Arc<Peer>,
    /// The disco key in use: the netmap's, or a newer one that the peer advertised inside the tunnel.
    pub(super) disco: Option<DiscoPublic>,
}

/// What a new netmap changed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// The slot's peer is gone.
    Removed(Slot),
    /// The slot's peer has other properties.
    Updated(Slot),
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Roster {
    entries: Vec<Option<Entry>>,
    by_key: HashMap<NodePublic, Slot>,
    by_disco: BTreeSet<(DiscoPublic, Slot)>,
    free: Vec<Slot>,
}

impl Roster {
    /// Takes a netmap over. Expired peers count as absent: they get no traffic.
    pub(super) fn handle_netmap(&mut self, netmap: &Netmap) -> Vec<Change> {
        let mut changes = Vec::new();
        let usable: HashMap<NodePublic, &Arc<Peer>> =
            netmap.peers.values().filter(|peer| !peer.expired).map(|peer| (peer.key, peer)).collect();
        for slot in 0..self.entries.len() {
            let gone = self.entries[slot].as_ref().is_some_and(|entry| !usable.contains_key(&entry.peer.key));
            if gone {
                self.remove(slot);
                changes.push(Change::Removed(slot));
            }
        }
        for peer in netmap.peers.values().filter(|peer| !peer.expired) {
            match self.slot(&peer.key) {
                Some(slot) if self.update(slot, peer) => changes.push(Change::Updated(slot)),
                Some(_) => {}
                None => self.insert(peer),
            }
        }
        changes
    }

    /// The slot of a node key.
    pub(super) fn slot(&self, key: &NodePublic) -> Option<Slot> {
        self.by_key.get(key).copied()
    }

    /// The peer in a slot.
    pub(super) fn entry(&self, slot: Slot) -> Option<&Entry> {
        self.entries.get(slot)?.as_ref()
    }

    /// Everyone with this disco key: mostly one, but a node that is shared twice is two peers.
    pub(super) fn with_disco(&self, key: &DiscoPublic) -> impl Iterator<Item = Slot> + use<'_> {
        self.by_disco.range((*key, 0)..=(*key, Slot::MAX)).map(|(_, slot)| *slot)
    }

    /// The peer says that this is its disco key. Whether it is news.
    pub(super) fn set_disco(&mut self, slot: Slot, key: DiscoPublic) -> bool {
        let Some(entry) = self.entries.get_mut(slot).and_then(Option::as_mut) else {
            return false;
        };
        if entry.disco == Some(key) {
            return false;
        }
        if let Some(old) = entry.disco.replace(key) {
            self.by_disco.remove(&(old, slot));
        }
        self.by_disco.insert((key, slot));
        true
    }

    fn insert(&mut self, peer: &Arc<Peer>) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() - 1
        });
        if let Some(disco) = peer.disco {
            self.by_disco.insert((disco, slot));
        }
        self.by_key.insert(peer.key, slot);
        self.entries[slot] = Some(Entry { peer: peer.clone(), disco: peer.disco });
    }

    fn remove(&mut self, slot: Slot) {
        let Some(entry) = self.entries[slot].take() else {
            return;
        };
        self.by_key.remove(&entry.peer.key);
        if let Some(disco) = entry.disco {
            self.by_disco.remove(&(disco, slot));
        }
        self.free.push(slot);
    }

    /// An advertised disco key stays until the netmap itself names another than before.
    fn update(&mut self, slot: Slot, peer: &Arc<Peer>) -> bool {
        let Some(entry) = self.entries[slot].as_mut() else {
            return false;
        };
        if Arc::ptr_eq(&entry.peer, peer) {
            return false;
        }
        let old = std::mem::replace(&mut entry.peer, peer.clone());
        if old.disco != peer.disco {
            let replaced = std::mem::replace(&mut entry.disco, peer.disco);
            if let Some(replaced) = replaced {
                self.by_disco.remove(&(replaced, slot));
            }
            if let Some(disco) = peer.disco {
                self.by_disco.insert((disco, slot));
            }
        }
        old != *peer
    }
}
