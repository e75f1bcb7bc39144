//! What holds for any messages: deltas add up to the full map, and an exit node sends nothing that others serve.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::netmap::is_internet;

/// What a delta does to one of a few nodes, said once as a part of a delta and once as effect.
#[derive(Debug, Clone)]
enum Step {
    Remove,
    Change(u8),
    Online(bool),
    Patch { region: Option<u8>, online: Option<bool>, key: bool, endpoint: Option<u8> },
}

fn step() -> impl Strategy<Value = Step> {
    let patch = (prop::option::of(1u8..9), any::<Option<bool>>(), any::<bool>(), any::<Option<u8>>());
    prop_oneof![
        Just(Step::Remove),
        any::<u8>().prop_map(Step::Change),
        any::<bool>().prop_map(Step::Online),
        patch.prop_map(|(region, online, key, endpoint)| Step::Patch { region, online, key, endpoint }),
    ]
}

/// One message's steps, each with its peer.
type Delta = Vec<(u8, Step)>;

fn delta(ids: std::ops::Range<u8>) -> impl Strategy<Value = Delta> {
    prop::collection::vec((ids, step()), 1..6)
}

fn key_of(id: u8, new: bool) -> String {
    format!("nodekey:{}{id:02x}", if new { "aa" } else { "00" }.repeat(31))
}

fn changed(id: u8, route: u8) -> Value {
    with(node(id), json!({"AllowedIPs": [format!("100.64.0.{id}/32"), format!("10.{route}.0.0/16")]}))
}

fn delta_message(delta: &Delta) -> Value {
    let (mut removed, mut whole, mut online, mut patches) = (vec![], vec![], json!({}), vec![]);
    for (id, step) in delta {
        match step {
            Step::Remove => removed.push(*id),
            Step::Change(route) => whole.push(changed(*id, *route)),
            Step::Online(is) => online[id.to_string()] = json!(is),
            Step::Patch { region, online, key, endpoint } => patches.push(json!({
                "NodeID": id, "DERPRegion": region.unwrap_or(0), "Online": online,
                "Key": key.then(|| key_of(*id, true)),
                "Endpoints": endpoint.map(|last| vec![format!("192.0.2.{last}:1")]),
            })),
        }
    }
    json!({"PeersRemoved": removed, "PeersChanged": whole, "OnlineChange": online, "PeersChangedPatch": patches})
}

/// What the message does, by the plain rules: gone, changed, online, patched.
fn delta_effect(delta: &Delta, peers: &mut BTreeMap<u8, Value>) {
    let place = |step: &Step| match step {
        Step::Remove => 0,
        Step::Change(_) => 1,
        Step::Online(_) => 2,
        Step::Patch { .. } => 3,
    };
    let mut in_order: Vec<&(u8, Step)> = delta.iter().collect();
    in_order.sort_by_key(|(_, step)| place(step));
    for (id, step) in in_order {
        match (step, peers.get_mut(id)) {
            (Step::Change(route), _) => _ = peers.insert(*id, changed(*id, *route)),
            (Step::Remove, _) => _ = peers.remove(id),
            (Step::Online(is), Some(peer)) => peer["Online"] = json!(is),
            (Step::Patch { region, online, key, endpoint }, Some(peer)) => {
                region.iter().for_each(|region| peer["HomeDERP"] = json!(region));
                online.iter().for_each(|online| peer["Online"] = json!(online));
                endpoint.iter().for_each(|last| peer["Endpoints"] = json!([format!("192.0.2.{last}:1")]));
                if *key {
                    peer["Key"] = json!(key_of(*id, true));
                }
            }
            (Step::Online(_) | Step::Patch { .. }, None) => {}
        }
    }
}

/// The netmap after these messages; an empty one changes nothing.
fn after(deltas: &[&Delta]) -> Arc<Netmap> {
    let (mut session, mut netmap) = started(json!([node(2), node(7)]));
    for delta in deltas {
        netmap = session.apply(message(delta_message(delta)), now()).unwrap().netmap.unwrap_or(netmap);
    }
    netmap
}

fn same(one: &Netmap, other: &Netmap) -> Result<(), TestCaseError> {
    prop_assert_eq!(&one.peers, &other.peers);
    for probe in (0..=255u8).map(|route| IpAddr::from([10, route, 0, 1])) {
        prop_assert_eq!(one.route(probe), other.route(probe));
        prop_assert_eq!(one.was_routed(probe) || other.route(probe).is_none(), true);
    }
    for (id, peer) in other.peers.iter() {
        prop_assert_eq!(one.peer_by_key(&peer.key).map(|peer| peer.id), Some(*id));
    }
    Ok(())
}

proptest! {
    #[test]
    fn deltas_applied_one_by_one_equal_the_full_map(deltas in prop::collection::vec(delta(2..7), 0..12)) {
        let mut peers = BTreeMap::from([(2, node(2)), (7, node(7))]);
        deltas.iter().for_each(|delta| delta_effect(delta, &mut peers));
        let (_, full) = started(peers.into_values().collect());
        same(&after(&deltas.iter().collect::<Vec<_>>()), &full)?;
    }

    #[test]
    fn deltas_of_different_peers_may_come_in_any_order(one in delta(2..5), other in delta(5..9)) {
        same(&after(&[&one, &other]), &after(&[&other, &one]))?;
        let both: Delta = one.iter().chain(&other).cloned().collect();
        same(&after(&[&both]), &after(&[&one, &other]))?;
    }
}

proptest! {
    #[test]
    fn an_exit_node_may_send_from_what_it_is_given_and_from_nothing_else(
        nets in prop::collection::vec((any::<[u8; 2]>(), 1u8..=32), 0..6),
        withdrawn in any::<bool>(),
        probe in prop_oneof![any::<[u8; 4]>(), any::<[u8; 2]>().prop_map(|[a, b]| [203, a & 3, b, 1])],
    ) {
        let net = |([a, b], length): &([u8; 2], u8)| IpNet::new([203, a & 3, *b, 0].into(), *length).unwrap().trunc().to_string();
        let routes: Vec<String> = nets.iter().map(net).chain([String::from("100.64.0.2/32")]).collect();
        let exits = json!({"StableID": "exit", "AllowedIPs": ["100.64.0.3/32", "0.0.0.0/0", "::/0"]});
        let mut session = Session::new(true).with_exit_node("exit".to_owned());
        let peers = json!([with(node(2), json!({"AllowedIPs": routes})), with(node(3), exits)]);
        let mut netmap = apply(&mut session, json!({"Node": node(1), "Peers": peers}));
        if withdrawn {
            netmap = apply(&mut session, json!({"PeersRemoved": [2]}));
        }
        let source = IpAddr::from(probe);
        let claimed = routes.iter().any(|net| net.parse::<IpNet>().unwrap().contains(&source));
        let own = netmap.peers[&3].addresses.contains(&source);
        prop_assert_eq!(netmap.allowed(&netmap.peers[&3], source), own || (is_internet(source) && !claimed));
        if let Some(route) = netmap.route(source) {
            prop_assert!(netmap.allowed(route.peer, source));
        }
    }
}
