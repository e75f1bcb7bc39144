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
    /// So it has, and a disco key that was not known: it has started anew and forgotten its sessions.
    Restarted(Slot),
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
                Some(slot) => changes.extend(self.update(slot, peer)),
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
    fn update(&mut self, slot: Slot, peer: &Arc<Peer>) -> Option<Change> {
        let entry = self.entries[slot].as_mut()?;
        if Arc::ptr_eq(&entry.peer, peer) {
            return None;
        }
        let old = std::mem::replace(&mut entry.peer, peer.clone());
        if old.disco != peer.disco && entry.disco != peer.disco {
            let replaced = std::mem::replace(&mut entry.disco, peer.disco);
            if let Some(replaced) = replaced {
                self.by_disco.remove(&(replaced, slot));
            }
            self.by_disco.extend(peer.disco.map(|disco| (disco, slot)));
            return Some(Change::Restarted(slot));
        }
        (old != *peer).then_some(Change::Updated(slot))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::netmap::session::Session;

    fn netmap(peers: &Value) -> Arc<Netmap> {
        let own = json!({"ID": 1, "Key": format!("nodekey:{}", "01".repeat(32)), "Addresses": ["100.64.0.1/32"]});
        let message = serde_json::from_value(json!({"Node": own, "Peers": peers})).unwrap();
        Session::new(true).apply(message, jiff::Timestamp::now()).unwrap().netmap.unwrap()
    }

    fn peer(id: u8, key: u8, disco: u8) -> Value {
        json!({
            "ID": id, "Key": format!("nodekey:{}", hex::encode([key; 32])), "HomeDERP": 1,
            "DiscoKey": format!("discokey:{}", hex::encode([disco; 32])), "Addresses": [format!("100.64.0.{id}/32")],
        })
    }

    fn holders(roster: &Roster, disco: u8) -> Vec<Slot> {
        roster.with_disco(&DiscoPublic::from_bytes([disco; 32])).collect()
    }

    #[test]
    fn a_new_node_key_is_a_new_peer_and_a_new_disco_key_a_restart() {
        let mut roster = Roster::default();
        assert_eq!(roster.handle_netmap(&netmap(&json!([peer(2, 2, 20), peer(3, 3, 30)]))), []);
        let slot = roster.slot(&NodePublic::from_bytes([2; 32])).unwrap();
        assert_eq!(roster.handle_netmap(&netmap(&json!([peer(2, 2, 21), peer(3, 3, 30)]))), [Change::Restarted(slot)]);
        assert_eq!((holders(&roster, 20), holders(&roster, 21)), (vec![], vec![slot]));
        assert_eq!(roster.handle_netmap(&netmap(&json!([peer(2, 4, 21), peer(3, 3, 30)]))), [Change::Removed(slot)]);
        assert_eq!(roster.slot(&NodePublic::from_bytes([2; 32])), None);
        assert_eq!(roster.slot(&NodePublic::from_bytes([4; 32])), Some(slot), "slots are used again");
    }

    #[test]
    fn an_advertised_disco_key_stays_until_the_netmap_names_another() {
        let mut roster = Roster::default();
        roster.handle_netmap(&netmap(&json!([peer(2, 2, 20)])));
        let advertised = DiscoPublic::from_bytes([21; 32]);
        assert!(roster.set_disco(0, advertised));
        assert!(!roster.set_disco(0, advertised));
        roster.handle_netmap(&netmap(&json!([peer(2, 2, 20)])));
        assert_eq!((holders(&roster, 20), holders(&roster, 21)), (vec![], vec![0]));
        assert_eq!(roster.handle_netmap(&netmap(&json!([peer(2, 2, 21)]))), [Change::Updated(0)]);
        assert_eq!(roster.handle_netmap(&netmap(&json!([peer(2, 2, 22)]))), [Change::Restarted(0)]);
        assert_eq!(holders(&roster, 22), [0]);
    }

    #[test]
    fn a_node_that_is_shared_twice_is_two_peers_with_one_disco_key() {
        let mut roster = Roster::default();
        roster.handle_netmap(&netmap(&json!([peer(2, 2, 20), peer(3, 3, 20)])));
        assert_eq!(holders(&roster, 20), [0, 1]);
    }
}
