//! Who decides what a name means: the tailnet itself, which of its resolvers, or nobody.
//!
//! The order is that of Tailscale's own resolver: what the tailnet knows, then the longest suffix
//! that it claims, then its default. A suffix that it claims is never asked of anybody else, and one
//! that it claims without naming a resolver has no names besides those it knows.
//! Source: Tailscale, net/dns/resolver/tsdns.go, `resolveLocal`, and forwarder.go, `resolvers`.

mod app;
mod exit;
mod resolver;
mod suffix;
mod via;

use std::net::IpAddr;

pub use self::app::connectors;
pub use self::resolver::ResolverAddr;
pub use self::suffix::BadName;
use self::suffix::{canonical, is_under, suffixes};
use crate::netmap::Netmap;
use crate::wire::tailcfg::dns::Resolver;

/// Names under it exist only inside Tor (RFC 7686, 2).
const ONION: &str = "onion";

/// Where the tailnet's own answer to a name comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// It is a node's name, or under one whose subdomains count too.
    Host,
    /// The tailnet's owner wrote it down.
    ExtraRecord,
    /// The name spells out its address: an IPv4 address at one of the tailnet's sites.
    Site,
}

/// Who decides what a name means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// The tailnet knows it.
    Addresses {
        /// All its addresses, IPv4 first. Whether we can reach them is another question.
        addresses: Vec<IpAddr>,
        /// Whence.
        source: Source,
    },
    /// The tailnet knows that it does not exist.
    Nonexistent {
        /// The zone that is the tailnet's own.
        zone: String,
    },
    /// These resolvers and nobody else, for it is under a suffix of theirs.
    Resolvers {
        /// The suffix, without dots at its ends; empty for the root.
        suffix: String,
        /// At least one; perhaps all unsupported.
        resolvers: Vec<ResolverAddr>,
        /// Whether app connectors answer: routes to what they say follow their answers.
        connector: bool,
    },
    /// Those who serve an app and nobody else, and what they say is reached by addresses agreed upon with them.
    App {
        /// The app's name.
        app: String,
        /// Perhaps none.
        resolvers: Vec<ResolverAddr>,
    },
    /// The tailnet's resolvers for everything else.
    Default {
        /// At least one; perhaps all unsupported.
        resolvers: Vec<ResolverAddr>,
    },
    /// The tailnet leaves the name to the host's resolver.
    Nobody,
}

/// Decides a single full name; a first label alone counts for a node of this tailnet as well.
/// [`candidates`] gives the names to decide for one that a client wrote.
///
/// # Errors
/// [`BadName`] if the text cannot be a name.
pub fn decide(netmap: &Netmap, name: &str) -> Result<Decision, BadName> {
    let name = canonical(name)?;
    if is_under(&name, ONION) {
        return Ok(Decision::Nonexistent { zone: ONION.to_owned() });
    }
    if let Some(address) = via::address(&name) {
        return Ok(Decision::Addresses { addresses: vec![address.into()], source: Source::Site });
    }
    let known = extra_record(netmap, &name).or_else(|| host(netmap, &name));
    if let Some((mut addresses, source)) = known {
        addresses.sort_by_key(IpAddr::is_ipv6);
        return Ok(Decision::Addresses { addresses, source });
    }
    let by_route = |suffix| Some(by_suffix(suffix, &claimed(netmap, suffix)?));
    let claim = suffixes(&name).find_map(|suffix| app::claimed(netmap, &name, suffix).or_else(|| by_route(suffix)));
    if let Some(decision) = claim {
        return Ok(decision);
    }
    // An extra record without a route above it makes its name a zone of its own.
    if let Some(zone) = suffixes(&name).find(|zone| records(netmap, zone).next().is_some()) {
        return Ok(Decision::Nonexistent { zone: zone.to_owned() });
    }
    let resolvers = parse(&exit::defaults(netmap));
    Ok(if resolvers.is_empty() { Decision::Nobody } else { Decision::Default { resolvers } })
}

/// The full names that a client may mean by `name`, to be decided and asked in this order until one exists.
///
/// A name of several labels is whole: with a search domain appended it would be told to resolvers that have nothing to do
/// with it. A single label that the tailnet knows is that; any other is looked for under each search domain first, and
/// alone at last (resolv.conf(5), `ndots`).
///
/// # Errors
/// [`BadName`] if the text cannot be a name.
pub fn candidates(netmap: &Netmap, name: &str) -> Result<Vec<String>, BadName> {
    let given = canonical(name)?;
    let whole = name.ends_with('.') || given.contains('.');
    if whole || matches!(decide(netmap, &given)?, Decision::Addresses { .. }) {
        return Ok(vec![given]);
    }
    let mut candidates = Vec::new();
    for domain in netmap.dns.domains.iter().filter_map(|domain| canonical(domain).ok()) {
        let Ok(full) = canonical(&format!("{given}.{domain}")) else { continue };
        if !candidates.contains(&full) {
            candidates.push(full);
        }
    }
    candidates.push(given);
    Ok(candidates)
}

/// The addresses that extra records give a name.
fn records<'a>(netmap: &'a Netmap, name: &'a str) -> impl Iterator<Item = IpAddr> + 'a {
    let of_name = netmap
        .dns
        .extra_records
        .iter()
        .filter(move |record| !name.is_empty() && record.name.trim_end_matches('.').eq_ignore_ascii_case(name));
    of_name.filter_map(|record| record.address())
}

fn extra_record(netmap: &Netmap, name: &str) -> Option<(Vec<IpAddr>, Source)> {
    let addresses: Vec<_> = records(netmap, name).collect();
    (!addresses.is_empty()).then_some((addresses, Source::ExtraRecord))
}

fn host(netmap: &Netmap, name: &str) -> Option<(Vec<IpAddr>, Source)> {
    let suffix = netmap.magicdns_suffix();
    let short =
        || netmap.addresses_of(&format!("{name}.{suffix}")).filter(|_| !name.contains('.') && !suffix.is_empty());
    let parent = || {
        let parent = suffixes(name).find(|parent| netmap.subdomain_hosts.contains(*parent))?;
        netmap.addresses_of(parent)
    };
    let addresses = netmap.addresses_of(name).or_else(short).or_else(parent)?;
    Some((addresses.to_vec(), Source::Host))
}

/// The resolvers of a suffix that the tailnet claims. With MagicDNS it claims its own.
fn claimed(netmap: &Netmap, suffix: &str) -> Option<Vec<Resolver>> {
    let magic = netmap.dns.proxied && !suffix.is_empty() && suffix == netmap.magicdns_suffix();
    netmap.dns.routes.get(suffix).cloned().or(magic.then(Vec::new))
}

fn by_suffix(suffix: &str, resolvers: &[Resolver]) -> Decision {
    let resolvers = parse(resolvers);
    if resolvers.is_empty() {
        return Decision::Nonexistent { zone: suffix.to_owned() };
    }
    let connector = resolvers.iter().any(|resolver| matches!(resolver, ResolverAddr::PeerApi { .. }));
    Decision::Resolvers { suffix: suffix.to_owned(), resolvers, connector }
}

fn parse(resolvers: &[Resolver]) -> Vec<ResolverAddr> {
    resolvers.iter().map(ResolverAddr::parse).collect()
}

#[cfg(test)]
mod tests;
