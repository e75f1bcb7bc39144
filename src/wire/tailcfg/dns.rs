//! The tailnet's DNS settings, as control sends them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// The tailnet's DNS settings. Source: Tailscale, tailcfg, `DNSConfig`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DnsConfig {
    /// Whom to ask for every name that nothing else decides; empty for the host's own resolver.
    #[serde(default, deserialize_with = "super::list")]
    pub resolvers: Vec<Resolver>,
    /// Whom to ask for names under a suffix. Suffixes are lower case without dots at their ends.
    /// An empty list: nobody, such names exist only if the tailnet itself knows them. A list that is
    /// garbled is empty, so that its names never leak to another resolver.
    #[serde(default, deserialize_with = "routes")]
    pub routes: BTreeMap<String, Vec<Resolver>>,
    /// Whom to ask for every other name where an exit node is used that answers no names itself.
    #[serde(default, deserialize_with = "super::list")]
    pub fallback_resolvers: Vec<Resolver>,
    /// Search domains, in order.
    #[serde(default, deserialize_with = "super::list")]
    pub domains: Vec<String>,
    /// Whether MagicDNS is on: the tailnet's suffix is a zone of its own.
    #[serde(default, deserialize_with = "super::nullable")]
    pub proxied: bool,
    /// Names with addresses that the tailnet's owner wrote down.
    #[serde(default, deserialize_with = "super::list")]
    pub extra_records: Vec<DnsRecord>,
}

/// One resolver. Source: Tailscale, types/dnstype, `Resolver`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Resolver {
    /// An address with or without port, or a URL.
    pub addr: String,
    /// Where the host of an `https` URL is.
    #[serde(default, deserialize_with = "super::list")]
    pub bootstrap_resolution: Vec<IpAddr>,
    /// Whether, as a default, it is asked also where an exit node is used that answers names.
    #[serde(default, deserialize_with = "super::nullable")]
    pub use_with_exit_node: bool,
}

/// A name's value. Source: Tailscale, tailcfg, `DNSRecord`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DnsRecord {
    /// The full name.
    pub name: String,
    /// `A`, `AAAA`, or empty for whichever the value is.
    #[serde(default, deserialize_with = "super::nullable")]
    pub r#type: String,
    /// The value; an address in the types above.
    #[serde(default, deserialize_with = "super::nullable")]
    pub value: String,
}

impl DnsRecord {
    /// The address that the record gives its name, if it is of a type that does.
    pub fn address(&self) -> Option<IpAddr> {
        let address: IpAddr = self.value.parse().ok()?;
        match (self.r#type.as_str(), address) {
            ("", _) | ("A", IpAddr::V4(_)) | ("AAAA", IpAddr::V6(_)) => Some(address),
            (_, _) => None,
        }
    }
}

fn routes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, Vec<Resolver>>, D::Error> {
    let entries = Option::<BTreeMap<String, Value>>::deserialize(deserializer)?.unwrap_or_default();
    let mut routes: BTreeMap<String, Vec<Resolver>> = BTreeMap::new();
    for (suffix, resolvers) in entries {
        let suffix = suffix.trim_matches('.').to_ascii_lowercase();
        routes.entry(suffix).or_default().extend(super::list(resolvers).unwrap_or_default());
    }
    Ok(routes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_garbled_route_stays_as_a_suffix_without_resolvers() {
        let json = r#"{"Routes":{"A.Example.":[{"Addr":"10.0.0.1"},{"Addr":5}],"b":null,"c":"x","d":[]}}"#;
        let config: DnsConfig = serde_json::from_str(json).unwrap();
        let lengths: Vec<_> = config.routes.iter().map(|(suffix, list)| (suffix.as_str(), list.len())).collect();
        assert_eq!(lengths, [("a.example", 1), ("b", 0), ("c", 0), ("d", 0)]);
    }

    #[test]
    fn a_record_gives_an_address_only_in_its_own_family() {
        let address = |kind: &str, value: &str| {
            DnsRecord { name: String::from("n"), r#type: kind.to_owned(), value: value.to_owned() }.address()
        };
        assert!(
            address("", "10.0.0.1").is_some() && address("", "::1").is_some() && address("A", "10.0.0.1").is_some()
        );
        assert!(
            address("AAAA", "10.0.0.1").is_none() && address("TXT", "10.0.0.1").is_none() && address("", "x").is_none()
        );
    }
}
