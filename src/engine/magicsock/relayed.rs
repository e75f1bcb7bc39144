//! What comes of packets that relays bring, and of what relays say: which region answers a peer, and what is sent again.
//!
//! A relay is nobody whose word counts much: what it makes us repeat is bounded.

use std::time::{Duration, Instant};

use super::{Magicsock, PathStatus};
use crate::engine::Output;
use crate::engine::roster::{Entry, Roster, Slot};
use crate::netmap::RegionId;

/// What went to a peer by a relay is sent again no more often because of what that relay says of the peer.
const PAUSE: Duration = Duration::from_secs(5);

impl Magicsock {
    /// A packet of the peer came by this region.
    pub(in crate::engine) fn note_derp(&mut self, slot: Slot, entry: &Entry, region: RegionId, now: Instant) {
        self.relays.touch(region, now);
        // Two that each answer by the region that the other used last would swap regions with every packet: the first
        // stays while it works, or until the peer comes by its home, where it listens for certain. Tailscale's client
        // takes the last, and so follows us.
        let used = self.places.get(slot).and_then(Option::as_ref).and_then(|place| place.path.replies_by);
        let works = used.is_some_and(|used| self.relays.is_connected(used));
        let at_home = entry.peer.home_derp == Some(region);
        let place = self.place(slot, entry, now);
        if !works || at_home {
            place.path.replies_by = Some(region);
        }
        place.path.heard_by = Some(region);
        self.resend_at_home(slot, entry, now);
    }

    /// What came by a region was the peer's own: if the region has said that the peer is not there, it is back.
    pub(in crate::engine) fn note_back(&mut self, slot: Slot, entry: &Entry, now: Instant) {
        let Some(place) = self.places.get_mut(slot).and_then(Option::as_mut).filter(|place| place.gone) else {
            return;
        };
        if place.resent_at.is_some_and(|at| now.duration_since(at) < PAUSE) {
            return;
        }
        place.gone = false;
        // Where a direct path works by now, it has had everything sent again itself.
        if matches!(self.status(slot, entry, now), PathStatus::Derp { .. }) {
            self.place(slot, entry, now).resent_at = Some(now);
            self.resend(slot, entry);
        }
    }

    /// Control may have told another home of the peer's: what went to the old one is lost if that is why it moved.
    pub(super) fn follow_home(&mut self, slot: Slot, entry: &Entry, now: Instant) {
        let relayed = matches!(self.status(slot, entry, now), PathStatus::Derp { .. });
        let Some(place) = self.places.get_mut(slot).and_then(Option::as_mut) else { return };
        let moved = std::mem::replace(&mut place.home, entry.peer.home_derp) != entry.peer.home_derp;
        place.moved |= moved && relayed;
        self.resend_at_home(slot, entry, now);
    }

    /// What went to a home that the peer has left is sent again as soon as packets go to the new one: the old one, which
    /// the peer may have lost without a word, is used for as long as it seems to work.
    fn resend_at_home(&mut self, slot: Slot, entry: &Entry, now: Instant) {
        if self.places.get(slot).and_then(Option::as_ref).is_none_or(|place| !place.moved) {
            return;
        }
        let at_home = match self.status(slot, entry, now) {
            PathStatus::Derp { region } => entry.peer.home_derp == Some(region),
            PathStatus::Direct { .. } | PathStatus::None => false,
        };
        if at_home {
            self.resend(slot, entry);
        }
    }

    /// Has everything that may be lost on its way to the peer sent again.
    pub(super) fn resend(&mut self, slot: Slot, entry: &Entry) {
        if let Some(place) = self.places.get_mut(slot).and_then(Option::as_mut) {
            place.moved = false;
        }
        self.outputs.push_back(Output::Resend { peer: entry.peer.key });
    }

    /// A region says that the peer is not there: what went to it by that region is lost.
    pub(in crate::engine) fn handle_derp_peer_gone(
        &mut self,
        region: RegionId,
        slot: Slot,
        entry: &Entry,
        now: Instant,
    ) {
        let lost = self.status(slot, entry, now) == PathStatus::Derp { region };
        if let Some(place) = self.places.get_mut(slot).and_then(Option::as_mut) {
            place.path.replies_by.take_if(|by| *by == region);
            place.gone |= lost;
        }
        self.resend_at_home(slot, entry, now);
    }

    pub(in crate::engine) fn handle_derp_connected(
        &mut self,
        region: RegionId,
        connected: bool,
        roster: &Roster,
        now: Instant,
    ) {
        if self.relays.set_connected(region, connected, now) {
            self.resend_by(region, roster, now);
        }
        if connected {
            self.netcheck.note_admitted(region);
        } else {
            self.resend_to_homes(roster, now);
            self.netcheck.recheck(now);
        }
        self.follow_netcheck(roster, now);
    }

    /// A region does not answer, or answers again, by the connection that it has: what went there is on its way.
    pub(in crate::engine) fn handle_derp_doubt(
        &mut self,
        region: RegionId,
        doubted: bool,
        roster: &Roster,
        now: Instant,
    ) {
        self.relays.set_doubted(region, doubted);
        if doubted {
            self.resend_to_homes(roster, now);
            self.netcheck.recheck(now);
        } else {
            self.netcheck.note_answer(region);
        }
        self.follow_netcheck(roster, now);
    }

    /// Control has been told that we live there.
    pub(in crate::engine) fn note_told(&mut self, home: Option<RegionId>, now: Instant) {
        self.relays.set_told(home, now);
    }

    /// A region may lead to nobody any more: see [`resend_at_home`](Self::resend_at_home).
    fn resend_to_homes(&mut self, roster: &Roster, now: Instant) {
        for slot in 0..self.places.len() {
            if let Some(entry) = roster.entry(slot) {
                self.resend_at_home(slot, entry, now);
            }
        }
    }

    /// What goes by this region is to be sent again.
    fn resend_by(&mut self, region: RegionId, roster: &Roster, now: Instant) {
        for slot in 0..self.places.len() {
            if let (Some(_), Some(entry)) = (&self.places[slot], roster.entry(slot))
                && self.status(slot, entry, now) == (PathStatus::Derp { region })
            {
                self.resend(slot, entry);
            }
        }
    }
}
