//! What follows when our own machine refuses to send: a filter of its own, or no route.

use std::net::SocketAddr;
use std::time::Instant;

use super::{News, PING_INTERVAL, Path, Probe};

impl Path {
    /// The machine lets nothing be sent to that address. What to do if that is the trusted one; the next packets go by
    /// the relay as well, if there is one (`relayed`).
    ///
    /// A firewall that lets some of many datagrams through refuses others all the time, while pongs vouch for the
    /// address in between: so often nobody is asked, called, and sent everything again. One that refuses the ping, too,
    /// may let nothing in either: then the peer is told to leave the path, though we have nothing to send that it would
    /// have to answer. What was sent has been sent again by then.
    pub(in crate::engine::magicsock) fn handle_refused(
        &mut self,
        addr: SocketAddr,
        relayed: bool,
        now: Instant,
    ) -> Option<News> {
        let (_, trusted) = self.best(now).filter(|(best, _)| best.addr == addr)?;
        let lately = self.refused_at.is_some_and(|at| now.duration_since(at) < PING_INTERVAL);
        match (trusted, lately) {
            (true, false) => {}
            (false, true) if !std::mem::replace(&mut self.ping_refused, true) => {
                self.retract(now);
                return Some(News { probe: Probe { call: true, ..Probe::default() }, ..News::default() });
            }
            (true, true) | (false, _) => return None,
        }
        (self.refused_at, self.ping_refused, self.resent_at) = (Some(now), false, relayed.then_some(now));
        self.trusted_until = None;
        let mut probe = self.discover(now);
        if !probe.ping.contains(&addr) {
            probe.ping.push(addr);
        }
        Some(News { resend: true, probe, ..News::default() })
    }
}
