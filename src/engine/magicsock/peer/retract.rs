//! Where the peer sees us, and what it must be told when that is not where we said.
//!
//! A Tailscale peer goes on sending to an address of ours from which nothing reaches us until its trust in it ends, 6.5 s
//! after the last pong. Calls make it leave that address; but it heeds each call beside the others, so that they
//! overtake one another, and a call may be lost. While nothing is heard of it, it is told again.
//! Source: Tailscale, wgengine/magicsock, `handleDiscoMessage`, `handleCallMeMaybe`.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{PING_INTERVAL, Path, TRUST};

/// What of all that was told of us is to be taken back.
#[derive(Debug, Default)]
pub(super) struct Retraction {
    /// When a pong of the best address last saw us elsewhere than the one before.
    remapped_at: Option<Instant>,
    /// The same, of pongs that a silent peer was asked for although the time before was not long ago.
    silenced_at: Option<Instant>,
    pending: Option<Pending>,
}

#[derive(Debug)]
struct Pending {
    since: Instant,
    /// Where the peer saw us of late.
    seen: Option<SocketAddr>,
    /// Whether the next call takes it back.
    due: bool,
    /// When that was last done.
    said_at: Option<Instant>,
    /// How long the peer's answer may take.
    limit: Duration,
    /// When it is due again, and after which pause the time after that.
    again: Option<(Instant, Duration)>,
}

impl Retraction {
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        Some(self.pending.as_ref()?.again?.0)
    }
}

impl Path {
    /// The next call takes back what the ones before told: the peer may still send to an address of ours from which
    /// nothing reaches us. Where none of the peer's answers us, none of ours answers the peer, and each call costs
    /// pings: Tailscale's client asks all that it knows of us.
    pub(in crate::engine::magicsock) fn retract(&mut self, now: Instant) {
        if self.best.is_none() {
            return;
        }
        let seen = self.best_candidate().and_then(|best| best.sees_us);
        self.retraction.pending =
            Some(Pending { since: now, seen, due: true, said_at: None, limit: Duration::ZERO, again: None });
    }

    /// The peer sees us at `source` from an address, which is the best one or another. Whether that is news to act upon:
    /// a NAT may map us anew with every datagram, and where no packets go, or are answered, nothing is lost by it.
    /// Where they are not, a second time is news too; but not more: a server may think for longer than a silence takes.
    pub(super) fn note_source(&mut self, addr: SocketAddr, best: bool, source: SocketAddr, now: Instant) -> bool {
        let Some(candidate) = self.candidates.get_mut(&addr) else { return false };
        if !best {
            candidate.sees_us = Some(source);
            return false;
        }
        // The path that was in doubt has answered as it was.
        self.retraction.pending.take_if(|pending| pending.seen == Some(source));
        let long_ago = |at: Option<Instant>| at.is_none_or(|at| now.duration_since(at) >= PING_INTERVAL);
        let rested = long_ago(self.retraction.remapped_at);
        let silenced = !rested && self.silence.is_asking() && long_ago(self.retraction.silenced_at);
        let heeded = rested || silenced;
        let remapped = heeded && candidate.sees_us.is_some_and(|seen| seen != source);
        if remapped {
            self.retraction.remapped_at = Some(now);
            self.retraction.silenced_at = if silenced { Some(now) } else { self.retraction.silenced_at };
            self.retract(now);
        }
        if let Some(candidate) = self.candidates.get_mut(&addr).filter(|it| heeded || it.sees_us.is_none()) {
            candidate.sees_us = Some(source);
        }
        remapped
    }

    /// Whether the call that goes out now is to take back what was told before, and where the peer saw us besides; the
    /// peer is heard of within `limit`, or told again after it. A call that comes too late takes nothing back: by then
    /// the peer's trust has ended too.
    pub(in crate::engine::magicsock) fn take_back(
        &mut self,
        limit: Duration,
        now: Instant,
    ) -> Option<Option<SocketAddr>> {
        let pending = self.retraction.pending.as_mut()?;
        if now.duration_since(pending.since) >= TRUST {
            self.retraction.pending = None;
            return None;
        }
        if !std::mem::take(&mut pending.due) {
            return None;
        }
        (pending.said_at, pending.limit) = (Some(now), limit);
        pending.again.get_or_insert((now + limit, limit * 2));
        Some(pending.seen)
    }

    /// Whether to call again now: the peer says nothing, although packets went out to it since `unheard`, and so does not
    /// heed the last call. When it was last `heard` tells one that does from one that was not asked; but until an address
    /// is trusted again, where we are may be another place by then, of which no pong tells.
    pub(in crate::engine::magicsock) fn retracts_again(
        &mut self,
        unheard: Option<Instant>,
        heard: Option<Instant>,
        now: Instant,
    ) -> bool {
        let trusted = self.trusted(now).is_some();
        let Some(pending) = self.retraction.pending.as_mut() else { return false };
        let (Some(said_at), Some((_, pause))) = (pending.said_at, pending.again.filter(|(at, _)| *at <= now)) else {
            return false;
        };
        let heard = heard.is_some_and(|at| at > said_at);
        if (heard && trusted) || now.duration_since(pending.since) >= TRUST {
            self.retraction.pending = None;
            return false;
        }
        // Whoever was heard has time to answer the next packet.
        pending.due = unheard.is_some_and(|since| !heard || now.duration_since(since) >= pending.limit);
        pending.again = Some((now + pause, if pending.due { pause * 2 } else { pause }));
        pending.due
    }
}

#[cfg(test)]
mod tests;
