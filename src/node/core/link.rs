//! The machine's network changed: what the engine has to know of it.

use std::rc::Rc;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::Core;
use crate::transport::interfaces::local_endpoints;
use crate::transport::link::State;
use crate::transport::udp::Udp;

/// Sockets that die are bound anew no more often: what kills them at once would keep us busy.
/// Source: Tailscale, wgengine/magicsock, `maybeRebindOnError`.
const REBIND_PAUSE: Duration = Duration::from_secs(5);

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

    /// Tells the engine where nothing could be sent to.
    pub(super) fn heed_failures(&mut self, now: Instant) {
        let unreachable = self.parts.outbox.take_unreachable();
        if unreachable.is_empty() {
            return;
        }
        unreachable.into_iter().for_each(|destination| self.parts.engine.handle_unreachable(destination, now));
        self.execute_outputs();
    }

    /// Whether a UDP socket is dead, and it is not too soon to bind another.
    pub(super) fn must_rebind(&self) -> bool {
        let rested = |at: Instant| at.elapsed() >= REBIND_PAUSE;
        self.parts.outbox.is_dead() && self.rebound_at.is_none_or(rested)
    }

    /// Binds other UDP sockets if one is dead. Peers learn of their ports as of any move.
    pub(super) fn rebind_if_dead(&mut self, now: Instant) {
        if !self.must_rebind() {
            return;
        }
        self.rebound_at = Some(now);
        match Udp::bind() {
            Ok(udp) => {
                info!("a UDP socket died, binding others");
                self.parts.engine.handle_move(local_endpoints(udp.ports()), now);
                self.parts.outbox.replace(Rc::new(udp));
            }
            Err(error) => warn!(%error, "a UDP socket died, and no other can be bound"),
        }
    }
}
