//! What time demands of the paths, and when.

use std::time::Instant;

use super::Magicsock;
use crate::engine::Output;
use crate::engine::roster::{Roster, Slot};

impl Magicsock {
    /// Does what time demands. `unheard` says since when a peer has sent nothing although packets went out to it, and
    /// `heard` when it last sent anything.
    pub(in crate::engine) fn handle_timeout(
        &mut self,
        roster: &Roster,
        unheard: impl Fn(Slot) -> Option<Instant>,
        heard: impl Fn(Slot) -> Option<Instant>,
        now: Instant,
    ) {
        self.relays.handle_timeout(now);
        self.netcheck.handle_timeout(now);
        self.follow_netcheck(roster, now);
        if self.wake_at.is_none_or(|at| at > now) {
            return;
        }
        self.wake_at = None;
        let slots: Vec<Slot> = self.active.iter().copied().collect();
        for slot in slots {
            let (Some(entry), Some(place)) = (roster.entry(slot), self.places.get_mut(slot).and_then(Option::as_mut))
            else {
                self.active.remove(&slot);
                continue;
            };
            let mut news = place.path.handle_timeout(unheard(slot), now);
            if place.path.retracts_again(unheard(slot), heard(slot), now) {
                (news.resend, news.probe.call) = (true, true);
            }
            if news.lost {
                self.outputs.push_back(Output::PeerChanged { peer: entry.peer.key });
            }
            if news.resend {
                self.resend(slot, entry);
            }
            self.probe(slot, entry, news.probe, now);
            self.reschedule(slot);
        }
    }

    pub(in crate::engine) fn next_deadline(&self) -> Option<(Instant, &'static str)> {
        let paths = self.wake_at.map(|at| (at, "paths"));
        let relays = self.relays.next_deadline().map(|at| (at, "idle DERP regions"));
        [paths, relays, self.netcheck.next_deadline()].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    fn schedule(&mut self, slot: Slot, deadline: Option<Instant>) {
        let Some(deadline) = deadline else {
            return;
        };
        if self.wake_at.is_none_or(|at| deadline < at) {
            self.wake_at = Some(deadline);
        }
        self.active.insert(slot);
    }

    pub(super) fn reschedule(&mut self, slot: Slot) {
        let deadline = self.places.get(slot).and_then(Option::as_ref).and_then(|place| place.path.next_deadline());
        if deadline.is_none() {
            self.active.remove(&slot);
        }
        self.schedule(slot, deadline);
    }
}
