//! Which transit address stands for which address of an app, and with whom that is agreed.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::netmap::NodeId;

/// How old an agreement may become. Connectors after version 1.102 forget one after an hour, those before never do.
/// Source: Tailscale, feature/conn25, in 1.103.
const RENEWED_AFTER: Duration = Duration::from_mins(45);
/// Within this time a connector may say this often that it does not know an address; then it will not learn it.
const LOST_WITHIN: Duration = Duration::from_secs(10);
const LOST_MAX: u32 = 3;

/// A transit address.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) app: String,
    /// What it stands for.
    pub(super) real: IpAddr,
    /// With whom it was last agreed.
    pub(super) connector: Option<NodeId>,
    /// When, if nothing has been said against it since.
    agreed: Option<Instant>,
    used: Instant,
    lost: (Instant, u32),
}

/// All transit addresses of this run.
#[derive(Debug, Default)]
pub(super) struct Book {
    entries: BTreeMap<IpAddr, Entry>,
    by_real: HashMap<(String, IpAddr), IpAddr>,
    /// The last one taken for IPv4 and for IPv6: a freed one is not taken again before all others.
    last: [Option<IpAddr>; 2],
}

impl Book {
    /// The transit address that stands for `real`, perhaps a new one that is not `taken`. `None` when the pools have
    /// none left.
    pub(super) fn reserve(
        &mut self,
        pools: &[(IpAddr, IpAddr)],
        app: &str,
        real: IpAddr,
        taken: impl Fn(IpAddr) -> bool,
        now: Instant,
    ) -> Option<IpAddr> {
        let key = (app.to_owned(), real);
        if let Some(transit) = self.by_real.get(&key) {
            if let Some(entry) = self.entries.get_mut(transit) {
                entry.used = now;
            }
            return Some(*transit);
        }
        let pools: Vec<_> = pools.iter().copied().filter(|(first, _)| first.is_ipv4() == real.is_ipv4()).collect();
        let last = &mut self.last[usize::from(real.is_ipv6())];
        let transit = successors(&pools, *last).find(|ip| !self.entries.contains_key(ip) && !taken(*ip))?;
        *last = Some(transit);
        let entry = Entry { app: app.to_owned(), real, connector: None, agreed: None, used: now, lost: (now, 0) };
        self.entries.insert(transit, entry);
        self.by_real.insert(key, transit);
        Some(transit)
    }

    /// The entry of a transit address.
    pub(super) fn entry(&self, transit: IpAddr) -> Option<&Entry> {
        self.entries.get(&transit)
    }

    /// With whom `transit` is agreed, as far as is known.
    pub(super) fn agreed_with(&self, transit: IpAddr, now: Instant) -> Option<NodeId> {
        let entry = self.entries.get(&transit)?;
        let agreed = entry.agreed?;
        entry.connector.filter(|_| now.saturating_duration_since(agreed) < RENEWED_AFTER)
    }

    /// Notes that `connector` sends `transit` on to what it stands for.
    pub(super) fn agree(&mut self, transit: IpAddr, connector: NodeId, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&transit) {
            (entry.connector, entry.agreed) = (Some(connector), Some(now));
        }
    }

    /// Notes that the connector does not know `transit`. Whether to agree upon it once more.
    pub(super) fn lose(&mut self, transit: IpAddr, now: Instant) -> bool {
        let Some(entry) = self.entries.get_mut(&transit) else { return false };
        entry.agreed = None;
        if now.saturating_duration_since(entry.lost.0) > LOST_WITHIN {
            entry.lost = (now, 0);
        }
        entry.lost.1 += 1;
        entry.lost.1 <= LOST_MAX
    }

    /// When an agreement becomes too old.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.entries.values().map(Entry::due).min()
    }

    /// The transit addresses that are due, and whether each was wanted since it was agreed.
    pub(super) fn due(&self, now: Instant) -> Vec<(IpAddr, bool)> {
        let due = self.entries.iter().filter(|(_, entry)| entry.due() <= now);
        due.map(|(transit, entry)| (*transit, entry.agreed.is_some_and(|agreed| entry.used > agreed))).collect()
    }

    /// Gives a transit address back.
    pub(super) fn forget(&mut self, transit: IpAddr) {
        if let Some(entry) = self.entries.remove(&transit) {
            self.by_real.remove(&(entry.app, entry.real));
        }
    }

    /// To whom each transit address leads.
    pub(super) fn routes(&self) -> BTreeMap<IpAddr, NodeId> {
        self.entries.iter().filter_map(|(transit, entry)| Some((*transit, entry.connector?))).collect()
    }
}

impl Entry {
    fn due(&self) -> Instant {
        self.agreed.unwrap_or(self.used) + RENEWED_AFTER
    }
}

/// Every address of the pools once, beginning after `last` and going round.
fn successors(pools: &[(IpAddr, IpAddr)], last: Option<IpAddr>) -> impl Iterator<Item = IpAddr> {
    let at = last.and_then(|last| {
        let index = pools.iter().position(|(first, end)| (*first..=*end).contains(&last))?;
        Some((index, last))
    });
    let (index, last) = at.map_or((0, None), |(index, last)| (index, Some(last)));
    let (before, after) = pools.split_at(index);
    let rest = after.first().and_then(|(first, end)| match last {
        Some(last) => next(last).filter(|next| next <= end).map(|next| (next, *end)),
        None => Some((*first, *end)),
    });
    let begun = after.first().zip(last).map(|((first, _), last)| (*first, last));
    let others = after.iter().skip(1).chain(before).copied();
    rest.into_iter().chain(others).chain(begun).flat_map(|(first, end)| addresses(first, end))
}

fn addresses(first: IpAddr, end: IpAddr) -> impl Iterator<Item = IpAddr> {
    std::iter::successors(Some(first), move |ip| next(*ip).filter(|next| *next <= end))
}

fn next(ip: IpAddr) -> Option<IpAddr> {
    match ip {
        IpAddr::V4(ip) => u32::from(ip).checked_add(1).map(|bits| IpAddr::V4(bits.into())),
        IpAddr::V6(ip) => u128::from(ip).checked_add(1).map(|bits| IpAddr::V6(bits.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn nobody(_: IpAddr) -> bool {
        false
    }

    fn pools() -> Vec<(IpAddr, IpAddr)> {
        [("10.7.0.1", "10.7.0.2"), ("10.8.0.1", "10.8.0.1"), ("fd00::", "fd00::ffff:ffff:ffff")]
            .map(|(first, last)| (ip(first), ip(last)))
            .to_vec()
    }

    #[test]
    fn an_address_keeps_its_transit_address_and_pools_end() {
        let (mut book, now) = (Book::default(), Instant::now());
        let mut reserve = |app: &str, real: &str| book.reserve(&pools(), app, ip(real), nobody, now);
        assert_eq!(reserve("a", "1.1.1.1"), Some(ip("10.7.0.1")));
        assert_eq!(reserve("b", "1.1.1.1"), Some(ip("10.7.0.2")));
        assert_eq!(reserve("a", "1.1.1.1"), Some(ip("10.7.0.1")));
        assert_eq!(reserve("a", "2.2.2.2"), Some(ip("10.8.0.1")));
        assert_eq!(reserve("a", "3.3.3.3"), None);
        assert_eq!(reserve("a", "2001:db8::1"), Some(ip("fd00::")));
    }

    #[test]
    fn a_nodes_own_address_is_never_a_transit_address() {
        let (mut book, now) = (Book::default(), Instant::now());
        let taken = |address: IpAddr| address != ip("10.8.0.1");
        assert_eq!(book.reserve(&pools(), "a", ip("1.1.1.1"), taken, now), Some(ip("10.8.0.1")));
        assert_eq!(book.reserve(&pools(), "a", ip("2.2.2.2"), taken, now), None);
    }

    #[test]
    fn a_freed_address_is_taken_last() {
        let (mut book, now) = (Book::default(), Instant::now());
        assert_eq!(book.reserve(&pools(), "a", ip("1.1.1.1"), nobody, now), Some(ip("10.7.0.1")));
        book.forget(ip("10.7.0.1"));
        for expected in ["10.7.0.2", "10.8.0.1", "10.7.0.1"] {
            let real = ip(&format!("2.2.2.{}", book.entries.len()));
            assert_eq!(book.reserve(&pools(), "a", real, nobody, now), Some(ip(expected)));
        }
        book.forget(ip("10.8.0.1"));
        assert_eq!(book.reserve(&pools(), "a", ip("9.9.9.9"), nobody, now), Some(ip("10.8.0.1")));
    }

    #[test]
    fn an_agreement_ages_and_can_be_lost_but_its_route_stays_until_it_is_forgotten() {
        let (mut book, now) = (Book::default(), Instant::now());
        let transit = book.reserve(&pools(), "a", ip("1.1.1.1"), nobody, now).unwrap();
        assert_eq!((book.agreed_with(transit, now), book.routes().len()), (None, 0));
        book.agree(transit, 7, now);
        assert_eq!((book.agreed_with(transit, now), book.next_due()), (Some(7), Some(now + RENEWED_AFTER)));
        assert_eq!(book.agreed_with(transit, now + RENEWED_AFTER), None);
        assert_eq!(book.due(now + RENEWED_AFTER), [(transit, false)]);
        book.reserve(&pools(), "a", ip("1.1.1.1"), nobody, now + Duration::from_secs(1));
        assert_eq!(book.due(now + RENEWED_AFTER), [(transit, true)]);
        assert!(book.lose(transit, now));
        assert_eq!((book.agreed_with(transit, now), book.routes().get(&transit)), (None, Some(&7)));
        book.forget(transit);
        assert!(book.routes().is_empty() && !book.lose(transit, now));
    }

    #[test]
    fn an_address_that_is_lost_again_and_again_is_given_up_for_a_while() {
        let (mut book, now) = (Book::default(), Instant::now());
        let transit = book.reserve(&pools(), "a", ip("1.1.1.1"), nobody, now).unwrap();
        assert_eq!([0; 4].map(|_| book.lose(transit, now)), [true, true, true, false]);
        assert!(book.lose(transit, now + LOST_WITHIN * 2));
    }
}
