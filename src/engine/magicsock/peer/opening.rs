//! Where a handshake may go before any endpoint of the peer has answered.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::Path;

/// How long after a round of discovery handshakes go where its pings went: whoever is there answers within a round trip.
const OPENING: Duration = Duration::from_secs(1);
/// So many endpoints of a peer get them: more than a machine has networks, as a rule.
const MOST: usize = 8;

impl Path {
    /// Where a handshake's message goes besides to the relay, which may not be connected yet, while no endpoint is known
    /// to work: to those that were asked a moment ago. The peer finds by what is in it who it is from.
    /// Source: Tailscale, wgengine/magicsock, `lazyEndpoint`.
    pub(in crate::engine::magicsock) fn opening(&self, now: Instant) -> Vec<SocketAddr> {
        let asked = |at: Option<Instant>| at.is_some_and(|at| now.duration_since(at) < OPENING);
        if self.best.is_some() || !asked(self.last_full_ping) {
            return Vec::new();
        }
        let open = self.candidates.iter().filter(|(_, candidate)| asked(candidate.last_ping));
        open.map(|(addr, _)| *addr).take(MOST).collect()
    }
}
