//! The machine's network changed: what the engine has to know of it.

use std::time::Instant;

use super::Core;
use crate::transport::interfaces::local_endpoints;
use crate::transport::link::State;

impl Core {
    /// Takes over what became of the network. The UDP sockets stay: they are bound to no address, so the kernel gives
    /// each datagram the one that its route asks for. Connections to relays and control look after themselves.
    pub(in crate::node) fn handle_link(&mut self, state: State, now: Instant) {
        let before = std::mem::replace(&mut self.link, state);
        let ports = self.parts.outbox.udp().map_or((None, None), |udp| udp.ports());
        let local = local_endpoints(ports);
        if self.link.moves == before.moves {
            self.parts.engine.set_local_endpoints(local, now);
        } else {
            self.parts.engine.handle_move(local, now);
        }
        if self.link.asleep > before.asleep {
            self.parts.engine.handle_wake(now);
        }
        self.pump(now);
    }
}
