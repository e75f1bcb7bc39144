//! Who decides what a name means: the tailnet itself, which of its resolvers, or nobody.
//!
//! The order is that of Tailscale's own resolver: what the tailnet knows, then the longest suffix
//! that it claims, then its default. A suffix that it claims is never asked of anybody else, and one
//! that it claims without naming a resolver has no names besides those it knows.
//! Source: Tailscale, net/dns/resolver/tsdns.go, `resolveLocal`, and forwarder.go, `resolvers`.

mod resolver;
mod suffix;
mod via;

use std::net::IpAddr;

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
    let claim = suffixes(&name).find_map(|suffix| Some((suffix, claimed(netmap, suffix)?)));
    if let Some((suffix, resolvers)) = claim {
        return Ok(by_suffix(suffix, resolvers));
    }
    // An extra record without a route above it makes its name a zone of its own.
    if let Some(zone) = suffixes(&name).find(|zone| records(netmap, zone).next().is_some()) {
        return Ok(Decision::Nonexistent { zone: zone.to_owned() });
    }
    let resolvers = parse(&netmap.dns.resolvers);
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
fn claimed<'a>(netmap: &'a Netmap, suffix: &str) -> Option<&'a [Resolver]> {
    let magic = netmap.dns.proxied && !suffix.is_empty() && suffix == netmap.magicdns_suffix();
    let routed = netmap.dns.routes.get(suffix).map(Vec::as_slice);
    routed.or(magic.then_some(&[]))
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
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;
    use serde_json::{Value, json};

    use super::*;
    use crate::netmap::session::Session;

    fn netmap(dns: Value) -> Arc<Netmap> {
        let node = |id: u8, name: &str, subdomains: bool| {
            json!({
                "ID": id, "Name": name, "Key": format!("nodekey:{}{id:02x}", "00".repeat(31)), "HomeDERP": 1,
                "Addresses": [format!("fd7a:115c:a1e0::{id}/128"), format!("100.64.0.{id}/32")],
                "CapMap": if subdomains { json!({"dns-subdomain-resolve": null}) } else { Value::Null },
            })
        };
        let message = json!({
            "Node": node(1, "Me.tail1.ts.net.", false),
            "Peers": [
                node(2, "git.tail1.ts.net.", false), node(3, "apps.tail1.ts.net.", true),
                node(4, "shared.other.ts.net.", false),
            ],
            "DNSConfig": dns,
        });
        let message = serde_json::from_value(message).unwrap();
        Session::new(true).apply(message, Timestamp::UNIX_EPOCH).unwrap().netmap.unwrap()
    }

    fn full() -> Arc<Netmap> {
        netmap(json!({
            "Proxied": true,
            "Domains": ["tail1.ts.net", "corp.example", "bad domain"],
            "Resolvers": [{"Addr": "10.9.9.9"}],
            "Routes": {
                "corp.example.": [{"Addr": "10.0.0.53"}],
                "deep.corp.example": [{"Addr": "10.0.0.54"}],
                "dead.corp.example": [],
                "app.example": [{"Addr": "http://100.64.0.3:1234/dns-query"}],
                "k8s.tail1.ts.net": [{"Addr": "10.0.0.55"}],
                "odd.example": [{"Addr": "tls://1.1.1.1"}],
            },
            "ExtraRecords": [
                {"Name": "Wiki.Example.", "Value": "10.0.0.80"}, {"Name": "wiki.example", "Type": "AAAA", "Value": "fd00::80"},
                {"Name": "in.corp.example", "Type": "A", "Value": "10.0.0.81"}, {"Name": "txt.example", "Type": "TXT", "Value": "x"},
            ],
        }))
    }

    /// A decision in one line.
    fn brief(decision: Decision) -> String {
        match decision {
            Decision::Addresses { addresses, source } => format!("{source:?} {}", addresses[0]),
            Decision::Nonexistent { zone } => format!("none in {zone}"),
            Decision::Resolvers { suffix, resolvers, connector } => {
                format!("{}{suffix} {}", if connector { "connector " } else { "" }, resolvers.len())
            }
            Decision::Default { resolvers } => format!("default {}", resolvers.len()),
            Decision::Nobody => String::from("nobody"),
        }
    }

    #[test]
    fn every_name_is_decided_as_in_the_table() {
        let netmap = full();
        let table = [
            ("git", "Host 100.64.0.2"),
            ("GIT.", "Host 100.64.0.2"),
            ("git.tail1.ts.net", "Host 100.64.0.2"),
            ("Git.Tail1.TS.net.", "Host 100.64.0.2"),
            ("me", "Host 100.64.0.1"),
            ("x.y.apps.tail1.ts.net", "Host 100.64.0.3"),
            ("x.git.tail1.ts.net", "none in tail1.ts.net"),
            ("nosuch.tail1.ts.net", "none in tail1.ts.net"),
            ("tail1.ts.net", "none in tail1.ts.net"),
            ("xtail1.ts.net", "default 1"),
            ("shared", "default 1"),
            ("shared.other.ts.net", "Host 100.64.0.4"),
            ("nosuch.other.ts.net", "default 1"),
            ("pod.k8s.tail1.ts.net", "k8s.tail1.ts.net 1"),
            ("corp.example", "corp.example 1"),
            ("a.corp.example", "corp.example 1"),
            ("badcorp.example", "default 1"),
            ("a.deep.corp.example", "deep.corp.example 1"),
            ("xdeep.corp.example", "corp.example 1"),
            ("a.dead.corp.example", "none in dead.corp.example"),
            ("www.app.example", "connector app.example 1"),
            ("odd.example", "odd.example 1"),
            ("wiki.example", "ExtraRecord 10.0.0.80"),
            ("in.corp.example", "ExtraRecord 10.0.0.81"),
            ("sub.wiki.example", "none in wiki.example"),
            ("sub.in.corp.example", "corp.example 1"),
            ("txt.example", "default 1"),
            ("www.example.org", "default 1"),
            ("hidden.onion", "none in onion"),
            ("b\u{fc}cher.corp.example", "corp.example 1"),
            ("10-1-1-16-via-7", "Site fd7a:115c:a1e0:b1a:0:7:a01:110"),
            ("10-1-1-16-via-7.tail1.ts.net", "Site fd7a:115c:a1e0:b1a:0:7:a01:110"),
            ("10-1-1-16-via-7.corp.example", "corp.example 1"),
        ];
        for (name, expected) in table {
            assert_eq!(brief(decide(&netmap, name).unwrap()), expected, "{name}");
        }
    }

    #[test]
    fn without_dns_settings_only_nodes_have_names() {
        let netmap = netmap(Value::Null);
        for (name, expected) in
            [("git", "Host 100.64.0.2"), ("nosuch.tail1.ts.net", "nobody"), ("example.org", "nobody")]
        {
            assert_eq!(brief(decide(&netmap, name).unwrap()), expected, "{name}");
        }
    }

    #[test]
    fn a_route_of_the_root_takes_every_other_name() {
        let netmap = netmap(json!({"Routes": {".": [{"Addr": "10.0.0.1"}], "a.example": []}}));
        assert_eq!(brief(decide(&netmap, "example.org").unwrap()), " 1");
        assert_eq!(brief(decide(&netmap, "x.a.example").unwrap()), "none in a.example");
        assert_eq!(brief(decide(&netmap, "git").unwrap()), "Host 100.64.0.2");
    }

    #[test]
    fn all_addresses_are_given_with_ipv4_first() {
        let addresses = vec!["100.64.0.2".parse().unwrap(), "fd7a:115c:a1e0::2".parse().unwrap()];
        assert_eq!(decide(&full(), "git"), Ok(Decision::Addresses { addresses, source: Source::Host }));
        let addresses = vec!["10.0.0.80".parse().unwrap(), "fd00::80".parse().unwrap()];
        assert_eq!(decide(&full(), "wiki.example"), Ok(Decision::Addresses { addresses, source: Source::ExtraRecord }));
    }

    #[test]
    fn a_single_label_is_looked_for_under_the_search_domains_in_their_order() {
        let of = |name| candidates(&full(), name).unwrap();
        assert_eq!(of("Git"), ["git"]);
        assert_eq!(of("Wiki"), ["wiki.tail1.ts.net", "wiki.corp.example", "wiki"]);
        assert_eq!(of("wiki."), ["wiki"]);
        assert_eq!(of("a.b"), ["a.b"]);
        assert_eq!(of("b\u{fc}cher").last().unwrap(), "xn--bcher-kva");
        assert_eq!(candidates(&full(), "10.0.0.1"), Err(BadName::Address));
    }
}
