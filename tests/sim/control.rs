//! Control, and the regions of its map.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tailcar::netmap::RegionId;
use tailcar::netmap::session::Session;

use crate::node::Node;
use crate::world::{Delivery, World};

/// How long control takes to tell a node what another said.
const DELAY: Duration = Duration::from_millis(150);

impl World {
    /// Control tells a node, a moment later.
    pub(crate) fn tell(&mut self, node: usize) {
        self.push(DELAY, Delivery::Netmap { node });
    }

    /// Control tells a node at once.
    pub(crate) fn tell_now(&mut self, index: usize) {
        let described: Vec<Value> = self.nodes.iter().map(Node::describe).collect();
        let regions: serde_json::Map<String, Value> =
            self.regions.keys().map(|id| (id.to_string(), region(*id))).collect();
        let peers = if self.control_works { vec![&described[1 - index]] } else { Vec::new() };
        let message = json!({"Node": described[index], "Peers": peers, "DERPMap": {"Regions": regions}});
        let message = serde_json::from_value(message).expect("the message is well-formed");
        let applied = Session::new(true).apply(message, jiff::Timestamp::UNIX_EPOCH).expect("it is a whole netmap");
        let netmap = applied.netmap.expect("it is the first");
        let of_other: Vec<_> = self.nodes[1 - index].host.endpoints.iter().map(|(endpoint, _)| *endpoint).collect();
        let node = &mut self.nodes[index];
        for peer in netmap.peers.values() {
            node.offered.extend(peer.endpoints.iter().copied());
        }
        node.offered.extend(self.regions.keys().map(|id| stun_server(*id)));
        if let (Some(trusting), true) = (node.trusting.as_mut(), self.control_works) {
            trusting.set_endpoints(&of_other);
        }
        node.engine.handle_netmap(netmap, self.now);
    }
}

pub(crate) fn stun_server(region: RegionId) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, region as u8], 3478))
}

pub(crate) fn region_of(address: SocketAddr) -> Option<RegionId> {
    (1..=9).find(|region| stun_server(*region) == address)
}

fn region(id: RegionId) -> Value {
    let host = format!("derp{id}.example");
    json!({"RegionID": id, "Nodes": [{"HostName": host, "IPv4": stun_server(id).ip(), "IPv6": "none"}]})
}
