//! How a round of netcheck begins: whom to ask, and the requests.

use std::time::Instant;

use rand::Rng;

use super::super::home;
use super::super::round::{self, Round};
use super::{FULL_INTERVAL, Netcheck, SMALL};
use crate::engine::{Output, Transport};
use crate::netmap::RegionId;
use crate::wire::stun;

impl Netcheck {
    /// Begins a round, a full one or a small one; one that is under way ends.
    pub(super) fn start(&mut self, full: bool, now: Instant) {
        if self.map.regions.is_empty() {
            return;
        }
        if full {
            self.full_at = Some(now + FULL_INTERVAL);
        }
        self.take_only_home(now);
        self.endpoints.begin_round();
        self.rounds += 1;
        let mut round = Round::new(full, now);
        let map = self.map.clone();
        for (id, region) in map.regions.iter().filter(|(id, _)| self.takes_part(**id, full, now)).collect::<Vec<_>>() {
            let resolved = self.resolved.get(id).map(Vec::as_slice).unwrap_or_default();
            let (servers, name) = round::servers(region, resolved, |v6| self.has_family(v6));
            if let Some((host, port)) = name.filter(|_| full || resolved.is_empty()) {
                // Where one family is known, the other one comes when it comes.
                if servers.is_empty() {
                    round.await_address(*id);
                }
                self.outputs.push_back(Output::ResolveStun { region: *id, host, port });
            }
            round.ask(*id, &servers, now);
        }
        self.round = Some(round);
        self.send_due(now);
        self.conclude(now);
    }

    /// With one region to choose from there is nothing to measure before choosing.
    fn take_only_home(&mut self, now: Instant) {
        let mut eligible = self.map.regions.values().filter(|region| home::is_eligible(region, self.host.home));
        if let (Some(only), None) = (eligible.next(), eligible.next()) {
            let only = only.id;
            if self.host.home != Some(only) {
                self.set_home(Some(only));
                self.publish(now);
            }
        }
    }

    fn takes_part(&self, region: RegionId, full: bool, now: Instant) -> bool {
        let eligible = self.map.regions.get(&region).is_some_and(|it| home::is_eligible(it, self.host.home));
        if self.transport == Transport::Derp {
            return false;
        }
        if full || self.host.home == Some(region) {
            return eligible || self.host.home == Some(region);
        }
        let best = self.latencies.best(now);
        let mut fastest: Vec<_> = best.iter().map(|(id, latency)| (latency, id)).collect();
        fastest.sort_unstable();
        eligible && fastest.iter().take(SMALL).any(|(_, id)| **id == region)
    }

    pub(super) fn send_due(&mut self, now: Instant) {
        let Some(round) = self.round.as_mut() else {
            return;
        };
        for (region, server) in round.due(now) {
            let transaction: stun::TransactionId = self.rng.random();
            round.note_sent(transaction, region, server, now);
            let contents = stun::request(&transaction).to_vec();
            self.outputs.push_back(Output::Udp { destination: server, segment: contents.len(), contents });
        }
    }
}
