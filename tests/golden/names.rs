//! What a name means: our decision against a plain table of the raw JSON, for every name that could go wrong.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tailcar::dns::{Decision, ResolverAddr, candidates, decide};
use tailcar::netmap::Netmap;

use crate::capture::{Capture, list, text, texts};
use crate::nodes::same;

/// The capture's DNS settings, without the letter cases and dots of their writers.
struct Model {
    /// Addresses of nodes and of extra records.
    known: BTreeMap<String, Vec<String>>,
    records: BTreeMap<String, Vec<String>>,
    /// Resolvers by suffix, the tailnet's own included where MagicDNS is on.
    suffixes: BTreeMap<String, Vec<String>>,
    default: Vec<String>,
    search: Vec<String>,
}

/// Compares the decisions on all names that the capture's settings speak of, and on others right beside them.
pub(crate) fn compare(capture: &Capture, netmap: &Netmap) -> Result<(), String> {
    let model = Model::of(capture);
    for name in model.names() {
        let ours = brief(&decide(netmap, &name).map_err(|error| format!("{name}: {error}"))?);
        same(&format!("decision on {name}"), ours, model.decide(&normal(&name)))?;
        let searched = candidates(netmap, &name).map_err(|error| format!("{name}: {error}"))?;
        same(&format!("search for {name}"), searched, model.candidates(&name))?;
    }
    Ok(())
}

impl Model {
    fn of(capture: &Capture) -> Self {
        let (own, dns) = (&capture.raw["SelfNode"], &capture.raw["DNS"]);
        let tailnet = normal(text(&own["Name"])).split_once('.').map(|(_, rest)| rest.to_owned()).unwrap_or_default();
        let mut known = BTreeMap::new();
        for node in capture.peers().iter().chain([own]) {
            let full = normal(text(&node["Name"]));
            let addresses =
                sorted(texts(&node["Addresses"]).iter().map(|net| net.split('/').next().unwrap_or_default()));
            if let Some(short) = full.strip_suffix(&format!(".{tailnet}")) {
                known.insert(short.to_owned(), addresses.clone());
            }
            known.insert(full, addresses);
        }
        let mut records = BTreeMap::<_, Vec<_>>::new();
        for record in list(&dns["ExtraRecords"]) {
            records.entry(normal(text(&record["Name"]))).or_default().push(text(&record["Value"]).to_owned());
        }
        let routes = dns["Routes"].as_object().into_iter().flatten();
        let mut suffixes: BTreeMap<_, _> = routes.map(|(suffix, to)| (normal(suffix), resolvers(to))).collect();
        if dns["Proxied"] == true {
            suffixes.entry(tailnet).or_default();
        }
        let search = texts(&dns["Domains"]).into_iter().map(normal).collect();
        Self { known, records, suffixes, default: resolvers(&dns["Resolvers"]), search }
    }

    /// Names to decide: each that is known and each suffix, as they are, in other letters, with a dot, below and beside.
    fn names(&self) -> BTreeSet<String> {
        let known = self.known.keys().chain(self.records.keys()).chain(self.suffixes.keys()).chain(&self.search);
        let mut names: BTreeSet<_> = known
            .flat_map(|name| {
                let spelled = [name.clone(), name.to_uppercase(), format!("{name}."), format!("nosuch.{name}")];
                spelled.into_iter().chain([format!("x{name}"), format!("_a.b.{name}")])
            })
            .collect();
        names.extend(["example.org", "www.example.org", "nosuch", "ts.net", "hidden.onion"].map(str::to_owned));
        names
    }

    /// What a name means, in one line.
    fn decide(&self, name: &str) -> String {
        let labels: Vec<_> = name.split('.').collect();
        if labels.last() == Some(&"onion") {
            return String::from("none in onion");
        }
        if let Some(addresses) = self.records.get(name).or_else(|| self.known.get(name)) {
            return addresses.join(" ");
        }
        let above: Vec<_> = (0..labels.len()).map(|first| labels[first..].join(".")).collect();
        for suffix in &above {
            match self.suffixes.get(suffix) {
                Some(resolvers) if resolvers.is_empty() => return format!("none in {suffix}"),
                Some(resolvers) => return format!("{suffix} by {}", resolvers.join(" ")),
                None => {}
            }
        }
        if let Some(zone) = above.iter().find(|zone| self.records.contains_key(*zone)) {
            return format!("none in {zone}");
        }
        if self.default.is_empty() { String::from("nobody") } else { format!("default {}", self.default.join(" ")) }
    }

    /// What else a name may stand for: only a single label that nobody has is looked for in the search domains.
    fn candidates(&self, name: &str) -> Vec<String> {
        let given = normal(name);
        let whole = name.contains('.') || self.known.contains_key(&given) || self.records.contains_key(&given);
        let domains = self.search.iter().filter(|_| !whole);
        domains.map(|domain| format!("{given}.{domain}")).chain([given.clone()]).collect()
    }
}

/// Our decision in the model's words.
fn brief(decision: &Decision) -> String {
    match decision {
        Decision::Addresses { addresses, .. } => {
            addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        }
        Decision::Nonexistent { zone } => format!("none in {zone}"),
        Decision::Resolvers { suffix, resolvers, .. } => format!("{suffix} by {}", shown(resolvers)),
        Decision::App { app, resolvers } => format!("app {app} by {}", shown(resolvers)),
        Decision::Default { resolvers } => format!("default {}", shown(resolvers)),
        Decision::Nobody => String::from("nobody"),
    }
}

fn shown(resolvers: &[ResolverAddr]) -> String {
    let one = |resolver: &ResolverAddr| match resolver {
        ResolverAddr::Plain { addr } if addr.port() == 53 => addr.ip().to_string(),
        ResolverAddr::Plain { .. }
        | ResolverAddr::PeerApi { .. }
        | ResolverAddr::Https { .. }
        | ResolverAddr::Unsupported(_) => format!("{resolver:?}"),
    };
    resolvers.iter().map(one).collect::<Vec<_>>().join(" ")
}

fn resolvers(value: &Value) -> Vec<String> {
    list(value).iter().map(|resolver| text(&resolver["Addr"]).to_owned()).collect()
}

fn normal(name: &str) -> String {
    name.trim_end_matches('.').to_lowercase()
}

/// IPv4 first.
fn sorted<'a>(addresses: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut addresses: Vec<_> = addresses.map(str::to_owned).collect();
    addresses.sort_by_key(|address| address.contains(':'));
    addresses
}
