//! Packets that wait for a session.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::WireGuard;
use crate::engine::roster::Slot;
use crate::key::NodePublic;

/// Packets that wait for a peer's handshake.
const STAGED: usize = 64;
/// How long they wait: a TCP stack has repeated a SYN by then.
const STAGED_FOR: Duration = Duration::from_secs(5);

impl WireGuard {
    /// Keeps a packet until there is a session, and sees to it that there will be one.
    pub(in crate::engine) fn stage(&mut self, slot: Slot, key: &NodePublic, packet: &[u8], now: Instant) {
        self.initiate(slot, key, now);
        let staged = &mut self.places[slot].staged;
        let before = staged.len();
        while staged.front().is_some_and(|(since, _)| now.duration_since(*since) >= STAGED_FOR)
            || staged.len() >= STAGED
        {
            staged.pop_front();
        }
        self.staged_dropped += (before - staged.len()) as u64;
        staged.push_back((now, packet.to_vec()));
    }

    /// The oldest staged packet that is still worth sending.
    pub(in crate::engine) fn unstage(&mut self, slot: Slot, now: Instant) -> Option<Vec<u8>> {
        let staged = &mut self.places.get_mut(slot)?.staged;
        loop {
            let (since, packet) = staged.pop_front()?;
            if now.duration_since(since) < STAGED_FOR {
                return Some(packet);
            }
            self.staged_dropped += 1;
        }
    }

    /// The staged packets that `is_elsewhere` says have another peer now: they wait there no longer.
    pub(in crate::engine) fn unstage_if(&mut self, is_elsewhere: impl Fn(Slot, &[u8]) -> bool) -> Vec<Vec<u8>> {
        let mut moved = Vec::new();
        for slot in self.active.iter().copied() {
            let staged = std::mem::take(&mut self.places[slot].staged);
            let (gone, kept) = staged.into_iter().partition(|(_, packet)| is_elsewhere(slot, packet));
            self.places[slot].staged = kept;
            moved.extend(VecDeque::into_iter(gone).map(|(_, packet)| packet));
        }
        moved
    }

    /// Staged packets that were dropped since the last call.
    pub(in crate::engine) fn take_staged_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.staged_dropped)
    }
}
