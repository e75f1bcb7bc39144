//! The flows of the data plane, known alike to engine, netstack and the count of those that lead to each peer.

use std::net::IpAddr;

use super::Core;
use crate::engine::{Flow, Protocol};
use crate::key::NodePublic;
use crate::netstack::FlowId;

impl Core {
    /// The engine lets the packets of a flow in from now on.
    pub(super) fn open_flow(&mut self, id: FlowId, protocol: Protocol) {
        if let Some((local, remote)) = self.parts.netstack.addresses_of(id) {
            let flow = Flow { protocol, local, remote };
            self.parts.engine.open_flow(flow);
            self.by_flow.insert(flow, id);
            if let Some(peer) = self.counted_with(remote.ip()) {
                self.told.open(peer);
            }
        }
    }

    /// Lets go of the flows that have ended.
    pub(super) fn forget_removed(&mut self) {
        while let Some((udp, local, remote)) = self.parts.netstack.poll_removed() {
            let flow = Flow { protocol: if udp { Protocol::Udp } else { Protocol::Tcp }, local, remote };
            self.parts.engine.close_flow(&flow);
            if let Some(id) = self.by_flow.remove(&flow) {
                self.rejected.remove(&id);
                if let Some(peer) = self.counted_with(remote.ip()) {
                    self.told.close(&peer);
                }
            }
        }
    }

    /// The peer that connections to `remote` count for, by the netmap that they were last counted by.
    fn counted_with(&self, remote: IpAddr) -> Option<NodePublic> {
        let netmap = self.netmap.borrow();
        netmap.as_ref()?.route(remote).map(|route| route.peer.key)
    }
}
