//! A flow's memory: pages from the system for its rings, and the socket set that lives in them.
//!
//! A ring has to be as long as the fastest path needs, and most flows never fill it. Anonymous pages cost nothing until
//! they are written and go back to the system when the flow ends; the allocator gives neither promise (glibc stops
//! mapping large blocks once the first has been freed: a thousand idle connections took 490 MiB that way, 19 MiB this).
//!
//! A flow in bulk comes by every page of its rings, however little waits in them, and they cannot grow later. So they
//! are as long as the round trip asks for, and a flow to a host of which none is known has the longest, as long as all
//! together stay within what may be spared.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use memmap2::MmapMut;
use self_cell::{MutBorrow, self_cell};
use smoltcp::iface::SocketSet;

/// Octets that a connection receives ahead of its reader, and octets that it sends ahead of the peer's
/// acknowledgement: at least, and at most. With the round trip they bound the rate (3 MiB at 100 ms is 250 Mbit/s).
const RECEIVE: (usize, usize) = (1 << 20, 3 << 20);
const SEND: (usize, usize) = (512 << 10, 3 << 20);
/// Octets a second that they are made for, up to the longest.
const RATE: f64 = 32e6;
/// Octets that the rings of all connections may have beyond the shortest: seven of the longest have room, three of them
/// to hosts of which no round trip is known.
const SPARE: usize = 32 << 20;
/// Hosts whose round trip is remembered.
const HOSTS: usize = 256;

/// Sizes of a connection's rings in octets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) receive: usize,
    pub(super) send: usize,
}

impl Sizes {
    const SHORTEST: Self = Self { receive: RECEIVE.0, send: SEND.0 };

    fn beyond_shortest(self) -> usize {
        self.receive + self.send - RECEIVE.0 - SEND.0
    }
}

/// What decides how long the next rings are.
#[derive(Debug, Default)]
pub(super) struct Budget {
    /// Octets beyond the shortest rings that are given out.
    given: usize,
    /// The latest round trip of each host.
    round_trips: HashMap<IpAddr, Duration>,
}

impl Budget {
    /// The sizes for a connection to `host`. What it takes comes back by [`give_back`](Self::give_back).
    pub(super) fn take(&mut self, host: IpAddr) -> Sizes {
        let known = self.round_trips.get(&host);
        let wanted = known.map_or(usize::MAX, |trip| (trip.as_secs_f64() * RATE) as usize);
        // Half is left to those that are known to need it.
        let spare = if known.is_some() { SPARE } else { SPARE / 2 };
        let sizes = Sizes { receive: wanted.clamp(RECEIVE.0, RECEIVE.1), send: wanted.clamp(SEND.0, SEND.1) };
        if self.given + sizes.beyond_shortest() > spare {
            return Sizes::SHORTEST;
        }
        self.given += sizes.beyond_shortest();
        sizes
    }

    /// The rings of that size are gone.
    pub(super) fn give_back(&mut self, sizes: Sizes) {
        self.given -= sizes.beyond_shortest();
    }

    /// A connection to `host` has measured a round trip.
    pub(super) fn note_round_trip(&mut self, host: IpAddr, trip: Duration) {
        if self.round_trips.len() >= HOSTS && !self.round_trips.contains_key(&host) {
            // Whoever is forgotten may have longer rings than it needs, once.
            let forgotten = self.round_trips.keys().next().copied();
            forgotten.map(|host| self.round_trips.remove(&host));
        }
        self.round_trips.insert(host, trip);
    }
}

type Set<'m> = SocketSet<'m>;

self_cell!(
    /// A socket set and the pages that its sockets' rings are in.
    pub(super) struct Sockets {
        owner: MutBorrow<MmapMut>,
        #[not_covariant]
        dependent: Set,
    }
);

impl Sockets {
    /// A set of whatever `build` makes from two rings of the given sizes in octets: receive, then send.
    ///
    /// # Errors
    /// When the system has no pages left.
    pub(super) fn build(
        receive: usize,
        send: usize,
        build: impl for<'m> FnOnce(&'m mut [u8], &'m mut [u8]) -> SocketSet<'m>,
    ) -> io::Result<Self> {
        let memory = MmapMut::map_anon(receive + send)?;
        Ok(Self::new(MutBorrow::new(memory), |memory| {
            let (receive, send) = memory.borrow_mut().split_at_mut(receive);
            build(receive, send)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::time::Instant;

    use crate::netstack::Netstack;

    fn host(last: u8) -> IpAddr {
        IpAddr::from([100, 64, 0, last])
    }

    #[test]
    fn rings_are_as_long_as_the_round_trip_asks_for() {
        let mut budget = Budget::default();
        let longest = Sizes { receive: RECEIVE.1, send: SEND.1 };
        assert_eq!(budget.take(host(1)), longest);
        budget.note_round_trip(host(1), Duration::from_millis(2));
        assert_eq!(budget.take(host(1)), Sizes::SHORTEST);
        budget.note_round_trip(host(1), Duration::from_millis(50));
        assert_eq!(budget.take(host(1)), Sizes { receive: 1_600_000, send: 1_600_000 });
        budget.note_round_trip(host(1), Duration::from_secs(2));
        assert_eq!(budget.take(host(1)), longest);
    }

    #[test]
    fn all_rings_together_take_no_more_than_is_spared() {
        let mut budget = Budget::default();
        budget.note_round_trip(host(2), Duration::from_millis(100));
        let taken: Vec<_> = (0..50).map(|number| budget.take(host(1 + number / 25))).collect();
        let (unknown, known) = taken.split_at(25);
        let long = |taken: &[Sizes]| taken.iter().filter(|sizes| **sizes != Sizes::SHORTEST).count();
        assert_eq!((long(unknown), long(known)), (3, 4));
        assert!(taken.iter().map(|sizes| sizes.beyond_shortest()).sum::<usize>() <= SPARE);
        taken.into_iter().for_each(|sizes| budget.give_back(sizes));
        assert_ne!(budget.take(host(1)), Sizes::SHORTEST);
    }

    #[test]
    fn what_connections_took_comes_back_when_they_are_gone() {
        let now = Instant::now();
        let mut stack = Netstack::new(7, now);
        stack.set_addresses(&[host(2)]);
        let flows = [0; 3].map(|_| stack.connect(host(2), (host(1), 80).into()).unwrap());
        stack.egress(now, &mut |_| None);
        let receive = stack.with_tcp(flows[0], |socket| socket.recv_capacity());
        assert_eq!((receive, stack.budget.given), (Some(RECEIVE.1), 3 * (4 << 20) + 3 * (512 << 10)));
        flows.into_iter().for_each(|flow| stack.release(flow));
        stack.egress(now, &mut |_| None);
        assert_eq!((stack.flow_count(), stack.budget.given), (0, 0));
    }

    #[test]
    fn only_so_many_hosts_are_remembered() {
        let mut budget = Budget::default();
        for number in 0..10_000_u32 {
            budget.note_round_trip(IpAddr::from(number.to_be_bytes()), Duration::ZERO);
            assert!(budget.round_trips.len() <= HOSTS);
        }
    }
}
