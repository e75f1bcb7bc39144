//! What left the sidecar's namespace: every outgoing packet falls into one class, and one class is a leak.
//!
//! The namespace has a default route and a resolver that answer everything, so that a leak is really
//! sent, really answered and really counted.

use std::collections::BTreeMap;

use libtest_mimic::Failed;
use serde_json::Value;

use crate::namespace::Namespace;

/// Loaded before each scenario. To servers that a scenario has to itself no connection begins by these rules, but the
/// kernel may repeat the end of an old one when the next scenario has begun.
const RULES: &str = r#"
table inet leak {
    counter loopback { }
    counter control { }
    counter derp { }
    counter stun { }
    counter peers { }
    counter neighbours { }
    counter leaked { }
    set offenders {
        type inet_proto . ipv4_addr . inet_service
        flags dynamic
        size 1024
    }
    set offenders6 {
        type inet_proto . ipv6_addr . inet_service
        flags dynamic
        size 1024
    }
    chain out {
        type filter hook output priority -10; policy accept;
        oifname "lo" counter name loopback accept
        ip daddr 10.99.0.1 tcp dport 8443 counter name control accept
        ip daddr 10.99.0.2 tcp dport 8444 counter name derp accept
        ip daddr 10.99.0.2-10.99.0.6 tcp dport { 8444, 9443-9445 } tcp flags & syn == 0 counter name control accept
        ip daddr { 10.99.0.1, 10.99.0.2 } udp dport 3478 counter name stun accept
        ip daddr { 10.99.0.13-10.99.0.17, 10.99.0.31, 10.20.0.1, 10.20.0.2, 10.30.0.1, 10.30.0.2 } udp dport { 41641, 41642 } counter name peers accept
        ip6 daddr { fd20::1, fd20::2, fdaa:1:ffff::1, fdaa:1:ffff::2, fdaa:2::1, fdaa:2::2, fe80::/10 } udp dport 41641 counter name peers accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld-listener-report, mld2-listener-report, mld-listener-done } counter name neighbours accept
        ip daddr 10.99.0.0/24 icmp type destination-unreachable counter name neighbours accept
        counter name leaked
        meta l4proto { tcp, udp } add @offenders { meta l4proto . ip daddr . th dport }
        meta l4proto { tcp, udp } add @offenders6 { meta l4proto . ip6 daddr . th dport }
    }
}
"#;

/// The counters' reading: bytes and packets by class.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reading(BTreeMap<String, (u64, u64)>);

impl Reading {
    /// Bytes that went to a class of destinations.
    pub(crate) fn bytes(&self, class: &str) -> u64 {
        self.0.get(class).map_or(0, |reading| reading.0)
    }

    /// Packets that went to a class of destinations.
    pub(crate) fn packets(&self, class: &str) -> u64 {
        self.0.get(class).map_or(0, |reading| reading.1)
    }
}

/// Puts the counters into `namespace`, or back to zero.
///
/// # Errors
/// With what `nft` said.
pub(crate) fn reset(namespace: &Namespace) -> Result<(), Failed> {
    namespace.nft(&format!("table inet leak {{ }}\ndelete table inet leak\n{RULES}"))?;
    Ok(())
}

/// What has been sent since [`reset`].
///
/// # Errors
/// With what `nft` said.
pub(crate) fn reading(namespace: &Namespace) -> Result<Reading, Failed> {
    let listed = namespace.nft_list("counters table inet leak")?;
    let mut reading = Reading::default();
    for entry in listed["nftables"].as_array().into_iter().flatten() {
        let counter = &entry["counter"];
        if let (Some(name), Some(bytes), Some(packets)) =
            (counter["name"].as_str(), counter["bytes"].as_u64(), counter["packets"].as_u64())
        {
            reading.0.insert(name.to_owned(), (bytes, packets));
        }
    }
    Ok(reading)
}

/// Fails when anything but control, DERP, STUN, peers and loopback was sent to.
///
/// # Errors
/// With the destinations.
pub(crate) fn check(namespace: &Namespace) -> Result<(), Failed> {
    let reading = reading(namespace)?;
    match reading.packets("leaked") {
        0 => Ok(()),
        packets => Err(format!("{packets} packets leaked, to {:?}", offenders(namespace)?).into()),
    }
}

/// Where the leaked packets went: protocol, address, port.
///
/// # Errors
/// With what `nft` said.
pub(crate) fn offenders(namespace: &Namespace) -> Result<Vec<String>, Failed> {
    let mut found = Vec::new();
    for set in ["offenders", "offenders6"] {
        let listed = namespace.nft_list(&format!("set inet leak {set}"))?;
        for entry in listed["nftables"].as_array().into_iter().flatten() {
            let elements = entry["set"]["elem"].as_array().cloned().unwrap_or_default();
            found.extend(elements.iter().map(|element| words(&element["concat"])));
        }
    }
    Ok(found)
}

fn words(concat: &Value) -> String {
    let parts = concat.as_array().cloned().unwrap_or_default();
    let parts: Vec<String> =
        parts.iter().map(|part| part.as_str().map_or_else(|| part.to_string(), str::to_owned)).collect();
    parts.join(" ")
}
