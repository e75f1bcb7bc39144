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
            self.outputs.push_back(Output::Resend { peer: entry.peer.key });
        }
    }

    /// Control may have told another home of the peer's: what went to the old one is lost if that is why it moved.
    pub(super) fn follow_home(&mut self, slot: Slot, entry: &Entry, now: Instant) {
        let home = entry.peer.home_derp;
        let Some(place) = self.places.get_mut(slot).and_then(Option::as_mut) else { return };
        if std::mem::replace(&mut place.home, home) == home {
            return;
        }
        if let PathStatus::Derp { region } = self.status(slot, entry, now)
            && home == Some(region)
        {
            self.outputs.push_back(Output::Resend { peer: entry.peer.key });
        }
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
            self.netcheck.recheck(now);
        }
        self.follow_netcheck(roster, now);
    }

    /// Control has been told that we live there.
    pub(in crate::engine) fn note_told(&mut self, home: Option<RegionId>, now: Instant) {
        self.relays.set_told(home, now);
    }

    /// What goes by this region is to be sent again.
    fn resend_by(&mut self, region: RegionId, roster: &Roster, now: Instant) {
        let used = (0..self.places.len()).filter(|slot| self.places[*slot].is_some());
        let entries = used.filter_map(|slot| Some((slot, roster.entry(slot)?)));
        let by_it = entries.filter(|(slot, entry)| self.status(*slot, entry, now) == PathStatus::Derp { region });
        let resent: Vec<Output> = by_it.map(|(_, entry)| Output::Resend { peer: entry.peer.key }).collect();
        self.outputs.extend(resent);
    }
}
