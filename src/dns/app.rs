//! Names of apps that are reached by transit addresses: whom to ask, and for which app.
//!
//! As with every other suffix that the tailnet claims, the longest one decides. A domain that an app names without the
//! names under it claims those too, so that nobody else is asked; their addresses are then dialled as they are.
//! Source: Tailscale, appc, `AppDNSRoutes` and `PickConnector`; feature/conn25, `getAppsForConnectorDomain`.

use url::form_urlencoded;

use super::{Decision, ResolverAddr};
use crate::netmap::{App, Extent, Netmap, Peer};

/// Where the PeerAPI answers names.
const PATH: &str = "/dns-query";

/// Who decides `name`, if `suffix`, which it is or is under, belongs to an app.
pub(super) fn claimed(netmap: &Netmap, name: &str, suffix: &str) -> Option<Decision> {
    let (app, extent) = netmap.self_node.apps.at(suffix)?;
    let resolvers = resolvers(netmap, app);
    if extent == Extent::Under || name == suffix {
        return Some(Decision::App { app: app.name.clone(), resolvers });
    }
    let suffix = suffix.to_owned();
    Some(match resolvers.is_empty() {
        true => Decision::Nonexistent { zone: suffix },
        false => Decision::Resolvers { suffix, resolvers, connector: true },
    })
}

/// Those who serve an app, in the order in which all clients prefer them.
pub fn connectors<'a>(netmap: &'a Netmap, app: &App) -> impl Iterator<Item = &'a Peer> {
    netmap.peers.values().map(AsRef::as_ref).filter(|peer| app.is_served_by(peer))
}

/// The same, as resolvers. The app is named to them, though those of version 1.102 do not read it.
fn resolvers(netmap: &Netmap, app: &App) -> Vec<ResolverAddr> {
    let query: String = form_urlencoded::Serializer::new(String::new()).append_pair("app", &app.name).finish();
    let found = connectors(netmap, app).filter_map(|peer| netmap.peerapi(peer));
    found.map(|at| ResolverAddr::PeerApi { ip: at.ip(), port: at.port(), path: format!("{PATH}?{query}") }).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;
    use serde_json::{Value, json};

    use super::super::decide;
    use super::*;
    use crate::netmap::session::Session;

    fn netmap() -> Arc<Netmap> {
        let key = |id: u8| format!("nodekey:{}{id:02x}", "00".repeat(31));
        let peer = |id: u8, tags: Value, connector: bool, port: u16| {
            json!({"ID": id, "Name": format!("c{id}.tb.example."), "Key": key(id), "HomeDERP": 1, "Tags": tags,
                   "Addresses": [format!("100.64.0.{id}/32")], "Hostinfo": {"AppConnector": connector,
                   "Services": [{"Proto": "peerapi4", "Port": port}]}})
        };
        let apps = json!([
            {"name": "one two", "domains": ["*.one.example"], "connectors": ["tag:c"]},
            {"name": "bare", "domains": ["bare.example"], "connectors": ["*"]},
            {"name": "alone", "domains": ["alone.example"], "connectors": ["tag:nobody"]},
        ]);
        let message = json!({
            "Node": {"ID": 1, "Name": "me.tb.example.", "Key": key(1), "Addresses": ["100.64.0.1/32"],
                     "CapMap": {"tailscale.com/app-connectors-experimental": apps}},
            "Peers": [peer(4, json!(["tag:c"]), true, 400), peer(3, json!(["tag:x", "tag:c"]), true, 300),
                      peer(2, json!(["tag:c"]), false, 200), peer(5, json!(["tag:c"]), true, 0),
                      peer(6, json!(["tag:d"]), true, 600)],
            "DNSConfig": {"Routes": {"deep.one.example": [{"Addr": "10.0.0.53"}], "bare.example": [{"Addr": "10.0.0.54"}]},
                          "Resolvers": [{"Addr": "10.0.0.1"}]},
        });
        let message = serde_json::from_value(message).unwrap();
        Session::new(true).apply(message, Timestamp::UNIX_EPOCH).unwrap().netmap.unwrap()
    }

    fn brief(name: &str) -> String {
        let all = |resolvers: &[ResolverAddr]| {
            let url = |resolver: &ResolverAddr| match resolver {
                ResolverAddr::PeerApi { ip, port, path } => format!("{ip}:{port}{path}"),
                other @ (ResolverAddr::Plain { .. } | ResolverAddr::Https { .. } | ResolverAddr::Unsupported(_)) => {
                    other.to_string()
                }
            };
            resolvers.iter().map(url).collect::<Vec<_>>().join(" ")
        };
        match decide(&netmap(), name).unwrap() {
            Decision::App { app, resolvers } => format!("{app}: {}", all(&resolvers)),
            Decision::Resolvers { suffix, resolvers, connector } => format!("{suffix} {connector} {}", all(&resolvers)),
            Decision::Nonexistent { zone } => format!("none in {zone}"),
            Decision::Default { .. } => "default".to_owned(),
            other @ (Decision::Addresses { .. } | Decision::Nobody) => format!("{other:?}"),
        }
    }

    #[test]
    fn a_name_of_an_app_is_asked_of_its_connectors_by_their_ids() {
        let asked = "one two: 100.64.0.3:300/dns-query?app=one+two 100.64.0.4:400/dns-query?app=one+two";
        assert_eq!(brief("a.one.example"), asked);
        assert_eq!(brief("One.Example."), asked);
        assert_eq!(brief("xone.example"), "default");
        let anybody = [3, 4, 6].map(|id| format!("100.64.0.{id}:{id}00/dns-query?app=bare")).join(" ");
        assert_eq!(brief("bare.example"), format!("bare: {anybody}"));
        assert_eq!(brief("a.bare.example"), format!("bare.example true {anybody}"));
    }

    #[test]
    fn an_app_without_connectors_still_claims_its_names() {
        assert_eq!(brief("alone.example"), "alone: ");
        assert_eq!(brief("a.alone.example"), "none in alone.example");
    }

    #[test]
    fn a_longer_suffix_of_the_tailnet_decides_before_an_app() {
        assert_eq!(brief("x.deep.one.example"), "deep.one.example false 10.0.0.53:53");
    }
}
