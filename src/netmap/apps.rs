//! Apps that connectors serve by transit addresses, as control tells this node of them.
//!
//! An app is a set of domains and those who may serve it. A client agrees with one of them upon an address of the
//! transit pools for each address of a name, and sends to that: no route is advertised or approved.
//! Source: Tailscale, types/appctype, `Conn25Attr` and `Conn25PoolsAttr`; feature/conn25, `configFromNodeView`.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

use super::Peer;
use super::node::name;

/// The attribute that names the apps. Source: Tailscale, appc, `AppConnectorsExperimentalAttrName`.
const APPS: &str = "tailscale.com/app-connectors-experimental";

/// The attribute with the pools. Source: Tailscale, feature/conn25, `AppConnectorsExperimentalIPPoolsAttrName`.
const POOLS: &str = "tailscale.com/app-connectors-experimental-ippools";

/// Stands for whoever says that it is a connector.
const ANYBODY: &str = "*";

/// One app.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct App {
    /// The name by which connectors know it.
    pub name: String,
    #[serde(default)]
    domains: Vec<String>,
    #[serde(default)]
    connectors: Vec<String>,
}

impl App {
    /// Whether `peer` is one of those who serve it.
    pub fn is_served_by(&self, peer: &Peer) -> bool {
        let named = |connector: &String| connector == ANYBODY || peer.tags.contains(connector);
        peer.app_connector && self.connectors.iter().any(named)
    }
}

/// How a domain belongs to an app.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Itself alone.
    Itself,
    /// With all names under it.
    Under,
}

/// All apps, and where transit addresses are taken from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Apps {
    apps: Vec<App>,
    /// Which app a domain belongs to; of several the first.
    domains: BTreeMap<String, (usize, Extent)>,
    /// The ranges of transit addresses, both ends included.
    pub transit: Vec<(IpAddr, IpAddr)>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Pools {
    #[serde(rename = "v4TransitIPPool", default)]
    v4: Vec<String>,
    #[serde(rename = "v6TransitIPPool", default)]
    v6: Vec<String>,
}

impl Apps {
    /// What a node's attributes say. An app that is garbled is none.
    pub(super) fn of(attributes: &BTreeMap<String, Vec<Value>>) -> Self {
        let values = |name: &str| attributes.get(name).map_or(&[][..], Vec::as_slice);
        let apps: Vec<App> = values(APPS).iter().filter_map(|value| App::deserialize(value).ok()).collect();
        let mut domains = BTreeMap::new();
        for (index, app) in apps.iter().enumerate() {
            for domain in &app.domains {
                let (domain, extent) = match domain.strip_prefix("*.") {
                    Some(domain) => (domain, Extent::Under),
                    None => (domain.as_str(), Extent::Itself),
                };
                let known = domains.entry(name(domain)).or_insert((index, extent));
                if known.0 == index && extent == Extent::Under {
                    known.1 = extent;
                }
            }
        }
        // Several pools are as good as none: nobody could say which one the connectors know.
        let transit = match values(POOLS) {
            [pools] => Pools::deserialize(pools).map(|pools| ranges(&pools)).unwrap_or_default(),
            _ => Vec::new(),
        };
        Self { apps, domains, transit }
    }

    /// The app that a domain belongs to. The domain is in the form of [`Peer::name`].
    pub fn at(&self, domain: &str) -> Option<(&App, Extent)> {
        let (index, extent) = self.domains.get(domain)?;
        Some((self.apps.get(*index)?, *extent))
    }

    /// The app of this name.
    pub fn named(&self, name: &str) -> Option<&App> {
        self.apps.iter().find(|app| app.name == name)
    }

    /// Every app.
    pub fn iter(&self) -> impl Iterator<Item = &App> {
        self.apps.iter()
    }
}

fn ranges(pools: &Pools) -> Vec<(IpAddr, IpAddr)> {
    let range = |text: &String| {
        let (first, last) = text.split_once('-')?;
        let (first, last): (IpAddr, IpAddr) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (first.is_ipv4() == last.is_ipv4() && first <= last).then_some((first, last))
    };
    pools.v4.iter().chain(&pools.v6).filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn apps(apps: Value, pools: Value) -> Apps {
        let list = |value: Value| value.as_array().cloned().unwrap_or_default();
        Apps::of(&BTreeMap::from([(APPS.to_owned(), list(apps)), (POOLS.to_owned(), list(pools))]))
    }

    #[test]
    fn a_domain_belongs_to_the_first_app_that_names_it() {
        let apps = apps(
            json!([
                {"name": "a", "domains": ["One.Example.", "*.one.example"], "connectors": ["tag:x"]},
                {"name": "b", "domains": ["one.example", "two.example"]}, {"domains": ["three.example"]}, 5,
            ]),
            Value::Null,
        );
        let at = |domain: &str| apps.at(domain).map(|(app, extent)| (app.name.as_str(), extent));
        assert_eq!(at("one.example"), Some(("a", Extent::Under)));
        assert_eq!(at("two.example"), Some(("b", Extent::Itself)));
        assert_eq!(at("three.example"), None);
        assert_eq!(apps.named("b").map(|app| app.connectors.len()), Some(0));
    }

    #[test]
    fn pools_are_ranges_of_one_family_and_there_is_one_set_of_them() {
        let pools = json!({"v4TransitIPPool": ["169.254.7.1-169.254.7.9", "10.0.0.9-10.0.0.1", "10.0.0.1", "::1-10.0.0.1"],
                           "v6TransitIPPool": ["fd00::1 - fd00::9"], "v4MagicIPPool": ["100.99.0.1-100.99.0.9"]});
        let range = |first: &str, last: &str| (first.parse::<IpAddr>().unwrap(), last.parse::<IpAddr>().unwrap());
        let expected = [range("169.254.7.1", "169.254.7.9"), range("fd00::1", "fd00::9")];
        assert_eq!(apps(Value::Null, json!([pools])).transit, expected);
        assert!(apps(Value::Null, json!([pools, pools])).transit.is_empty());
        assert!(apps(Value::Null, json!([])).transit.is_empty());
    }
}
