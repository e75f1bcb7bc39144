//! What the engine does when our own network is another, or when we have slept.

use std::net::SocketAddr;
use std::time::Instant;

use super::roster::Slot;
use super::{Engine, LocalEndpoints};

impl Engine {
    /// Our way into the network is another, or may be: an address went, a default route moved, or we slept. What was
    /// known of paths is in doubt, so the peers in use are asked at every address, and told of ours as soon as STUN has
    /// found them; meanwhile packets go by DERP as well.
    pub fn handle_move(&mut self, endpoints: LocalEndpoints, now: Instant) {
        self.magicsock.handle_move(endpoints, &self.roster, now);
        self.settle(now);
    }

    /// The machine knows no way to an address, or lets none be taken: packets go by the relay as well at once.
    pub fn handle_unreachable(&mut self, destination: SocketAddr, now: Instant) {
        self.magicsock.handle_unreachable(destination, &self.roster, now);
        self.settle(now);
    }

    /// We have slept, and the clock that sessions go by with us: peers may have ended theirs long ago, and would not
    /// say so. New ones are made, whatever still arrives from before; what there is stays in use until then.
    pub fn handle_wake(&mut self, now: Instant) {
        let usable: Vec<Slot> = self.wireguard.usable(now).collect();
        for slot in usable {
            self.wireguard.replace(slot, now);
        }
        self.settle(now);
    }
}
