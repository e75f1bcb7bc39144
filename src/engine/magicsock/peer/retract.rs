//! Where the peer sees us, and what it must be told when that is not where we said.

use std::net::SocketAddr;
use std::time::Instant;

use super::{PING_INTERVAL, Path};

impl Path {
    /// The peer sees us at `source` from an address, which is the best one or another. Whether that is news to act upon:
    /// a NAT may map us anew with every datagram, and where no packets go nothing is lost by it.
    pub(super) fn note_source(&mut self, addr: SocketAddr, best: bool, source: SocketAddr, now: Instant) -> bool {
        let Some(candidate) = self.candidates.get_mut(&addr) else { return false };
        if !best {
            candidate.sees_us = Some(source);
            return false;
        }
        // The path that was in doubt has answered as it was.
        self.retracted.take_if(|(_, seen)| *seen == Some(source));
        let rested = self.remapped_at.is_none_or(|at| now.duration_since(at) >= PING_INTERVAL);
        let other = candidate.sees_us.filter(|seen| *seen != source);
        if rested || other.is_none() {
            candidate.sees_us = Some(source);
        }
        if rested && other.is_some() {
            (self.retracted, self.remapped_at) = (Some((now, other)), Some(now));
        }
        rested && other.is_some()
    }

    /// Whether the call that goes out now is to take back what was told before, and where the peer saw us besides: it
    /// may still send to an address of ours from which nothing reaches us. A call that comes too late takes nothing back:
    /// by then the peer has found out, and another path works.
    pub(in crate::engine::magicsock) fn take_retracted(&mut self, now: Instant) -> Option<Option<SocketAddr>> {
        let (since, seen) = self.retracted.take()?;
        (now.duration_since(since) < PING_INTERVAL).then_some(seen)
    }
}
