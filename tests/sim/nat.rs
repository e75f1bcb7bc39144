//! Network address translators, as plain tables.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;

/// A mapping that nothing leaves by is forgotten after that: the shortest that is common.
const TIMEOUT: Duration = Duration::from_secs(30);

/// How a site is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// By addresses of its own.
    Open,
    /// One outside port for each inside one, whoever it speaks to; only those that were spoken to get in.
    Easy,
    /// Another outside port for each destination, at random; only that destination gets in.
    Hard,
    /// No UDP at all.
    Blocked,
}

/// A site's router.
#[derive(Debug)]
pub(crate) struct Nat {
    pub(crate) kind: Kind,
    pub(crate) outside: IpAddr,
    /// By inside socket, and destination where that counts.
    mappings: BTreeMap<(SocketAddr, Option<SocketAddr>), Mapping>,
}

#[derive(Debug)]
struct Mapping {
    port: u16,
    /// Who was spoken to, and when last.
    spoken_to: BTreeMap<SocketAddr, Instant>,
}

impl Mapping {
    fn is_alive(&self, now: Instant) -> bool {
        self.spoken_to.values().any(|at| now.duration_since(*at) < TIMEOUT)
    }
}

impl Nat {
    pub(crate) fn new(kind: Kind, outside: IpAddr) -> Self {
        Self { kind, outside, mappings: BTreeMap::new() }
    }

    /// The router forgets everything, as one that restarts, and has this address from now on.
    pub(crate) fn restart(&mut self, outside: IpAddr) {
        self.mappings.clear();
        self.outside = outside;
    }

    /// A datagram leaves: its source as the world sees it.
    pub(crate) fn leave(
        &mut self,
        inside: SocketAddr,
        to: SocketAddr,
        rng: &mut StdRng,
        now: Instant,
    ) -> Option<SocketAddr> {
        let destination = match self.kind {
            Kind::Open => return Some(inside),
            Kind::Blocked => return None,
            Kind::Easy => None,
            Kind::Hard => Some(to),
        };
        self.mappings.retain(|_, mapping| mapping.is_alive(now));
        let taken: Vec<u16> = self.mappings.values().map(|mapping| mapping.port).collect();
        let mapping = self.mappings.entry((inside, destination)).or_insert_with(|| {
            let free = std::iter::repeat_with(|| rng.random_range(20_000..60_000)).find(|port| !taken.contains(port));
            Mapping { port: free.expect("ports are many"), spoken_to: BTreeMap::new() }
        });
        mapping.spoken_to.insert(to, now);
        Some(SocketAddr::new(self.outside, mapping.port))
    }

    /// A datagram comes to one of our outside ports: whom it is for.
    pub(crate) fn enter(&self, from: SocketAddr, to: SocketAddr, now: Instant) -> Option<SocketAddr> {
        match self.kind {
            Kind::Open => return Some(to),
            Kind::Blocked => return None,
            Kind::Easy | Kind::Hard => {}
        }
        let ((inside, _), mapping) = self.mappings.iter().find(|(_, mapping)| mapping.port == to.port())?;
        let lately = mapping.spoken_to.get(&from).is_some_and(|at| now.duration_since(*at) < TIMEOUT);
        (to.ip() == self.outside && lately).then_some(*inside)
    }
}
