//! The machine's network changed: what the engine has to know of it.

use std::rc::Rc;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::{Core, ROUNDS};
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

    /// Tells the engine where nothing could be sent to. What it sends for that may not leave either.
    pub(super) fn heed_failures(&mut self, now: Instant) {
        for _ in 0..ROUNDS {
            let unreachable = self.parts.outbox.take_unreachable();
            if unreachable.is_empty() {
                return;
            }
            unreachable.into_iter().for_each(|destination| self.parts.engine.handle_unreachable(destination, now));
            self.execute_outputs(now);
        }
    }

    /// Whether UDP sockets are missing, and it is not too soon to bind others.
    pub(super) fn must_rebind(&self, now: Instant) -> bool {
        self.parts.outbox.wants_others() && self.rebind_at().is_none_or(|at| at <= now)
    }

    /// Before when it is too soon for sockets that are missing.
    pub(super) fn rebind_at(&self) -> Option<Instant> {
        self.rebound_at.filter(|_| self.parts.outbox.wants_others()).map(|at| at + REBIND_PAUSE)
    }

    /// Binds other UDP sockets if any are missing. Peers learn of their ports as of any move.
    pub(super) fn rebind_if_dead(&mut self, now: Instant) {
        if !self.must_rebind(now) {
            return;
        }
        self.rebound_at = Some(now);
        match Udp::bind() {
            Ok(udp) => {
                let ports = udp.ports();
                if self.parts.outbox.replace(Rc::new(udp)) {
                    info!(v4 = ports.0, v6 = ports.1, "a UDP socket died, others are bound");
                    self.parts.engine.handle_move(local_endpoints(ports), now);
                }
            }
            Err(error) => warn!(%error, "a UDP socket died, and no other can be bound"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use serde_json::json;

    use super::*;
    use crate::key::NodePrivate;
    use crate::netmap::session::Session;
    use crate::node::bed::core;
    use crate::node::outbox::Batch;

    #[tokio::test]
    async fn a_socket_that_dies_again_too_soon_is_not_waited_on_and_others_are_bound_in_time() {
        let start = Instant::now();
        let mut core = core(start);
        core.parts.outbox.note_dead();
        assert!(core.udp().is_none(), "dead ones are always ready");
        core.handle_timeout(start);
        // Held, so that the third are not given the same ports.
        let second = core.udp().expect("others are bound at once");
        let now = start + Duration::from_secs(1);
        core.parts.outbox.note_dead();
        core.handle_timeout(now);
        assert!(core.udp().is_none() && core.rebind_at().is_some());
        let mut times = 0;
        while core.udp().is_none() {
            times += 1;
            assert!(times < 10, "no deadline leads there");
            core.pump(now);
            let deadline = core.arm().unwrap();
            core.handle_timeout(deadline);
        }
        assert_ne!(core.udp().unwrap().ports(), second.ports());
        assert_eq!(core.rebind_at(), None);
    }

    #[tokio::test]
    async fn what_cannot_be_sent_because_of_a_failure_is_a_failure_too() {
        let now = Instant::now();
        let mut core = core(now);
        let refused = SocketAddr::from((Ipv4Addr::BROADCAST, 9));
        let udp = core.udp().unwrap();
        std::future::poll_fn(|cx| udp.poll_writable(refused, cx)).await.unwrap();
        let region = json!({"RegionID": 1, "Nodes": [{"HostName": "derp1.example", "IPv4": "255.255.255.255"}]});
        let node = json!({"ID": 1, "Name": "me.tb.example.", "Key": NodePrivate::random().public().to_string()});
        let message = json!({"Node": node, "DERPMap": {"Regions": {"1": region}}});
        let applied = Session::new(true).apply(serde_json::from_value(message).unwrap(), jiff::Timestamp::UNIX_EPOCH);
        // The engine wants to ask a server that cannot be reached either.
        core.parts.engine.handle_netmap(applied.unwrap().netmap.unwrap(), now);
        core.parts.outbox.send(Batch { destination: refused, contents: vec![0; 9], segment: 9 });
        core.heed_failures(now);
        assert_eq!(core.parts.outbox.lost.values().sum::<u64>(), 2);
        assert!(core.parts.outbox.take_unreachable().is_empty());
    }
}
