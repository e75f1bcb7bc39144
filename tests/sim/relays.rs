//! DERP regions: what comes by them, and who is connected.

use std::time::Duration;

use tailcar::key::NodePublic;
use tailcar::netmap::RegionId;

use crate::node::{Node, number};
use crate::world::{Delivery, World};

/// What a driver waits before it connects a region again.
const RECONNECT: Duration = Duration::from_millis(500);

impl World {
    /// A region's server, with its STUN server, stops or starts.
    pub(crate) fn set_region(&mut self, region: RegionId, up: bool) {
        self.regions.insert(region, up);
        if !up {
            (0..2).for_each(|node| self.lose_regions(node, |it| it == region));
        }
    }

    /// Control takes a region out of its map, and tells node 0 at once, the other when that has another home.
    pub(crate) fn take_region(&mut self, region: RegionId) {
        self.set_region(region, false);
        self.regions.remove(&region);
        self.tell_now(0);
        self.tell(1);
    }

    pub(crate) fn deliver_derp(&mut self, region: RegionId, from: usize, to: NodePublic, mut packet: Vec<u8>) {
        let there = |node: &Node| node.regions.get(&region) == Some(&true);
        if !there(&self.nodes[from]) {
            return;
        }
        let (sender, now) = (self.nodes[from].public(), self.now);
        let Some(index) = self.nodes.iter().position(|node| node.public() == to && there(node)) else {
            self.nodes[from].engine.handle_derp_peer_gone(region, to, now);
            return;
        };
        let disco = self.nodes[from].disco.clone();
        let node = &mut self.nodes[index];
        node.note_call(&disco, &packet);
        if node.trusting.is_some() && self.hear(index, None, &mut packet) {
            return;
        }
        let node = &mut self.nodes[index];
        let admitted = node.engine.handle_derp(region, sender, &mut packet, now).map(|packet| number(packet));
        node.received.extend(admitted);
    }

    /// A driver's attempt to connect a region; it goes on until it succeeds or is told to close.
    pub(crate) fn connect(&mut self, node: usize, life: u8, region: RegionId) {
        let up = self.regions.get(&region).is_some_and(|up| *up);
        let it = &mut self.nodes[node];
        match it.regions.get_mut(&region).filter(|_| it.life == life) {
            Some(connected) if up => {
                *connected = true;
                it.engine.handle_derp_connected(region, self.now);
            }
            Some(_) => self.push(RECONNECT, Delivery::Connect { node, life, region }),
            None => {}
        }
    }

    pub(crate) fn lose_regions(&mut self, node: usize, which: impl Fn(RegionId) -> bool) {
        let it = &mut self.nodes[node];
        let life = it.life;
        let lost = it.regions.iter().filter(|(region, connected)| **connected && which(**region));
        let lost: Vec<RegionId> = lost.map(|(region, _)| *region).collect();
        for region in lost {
            self.nodes[node].regions.insert(region, false);
            self.nodes[node].engine.handle_derp_lost(region, self.now);
            self.push(RECONNECT, Delivery::Connect { node, life, region });
        }
    }
}
