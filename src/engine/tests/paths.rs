//! How two engines find, keep and lose a direct path.

use std::time::Duration;

use super::SECOND;
use super::world::World;
use crate::engine::{Output, PathStatus, Transport};
use crate::key::{DiscoPrivate, NodePublic};
use crate::netmap::Carrier;
use crate::wire::disco::{self, Message, TxId};
use crate::wire::tsmp;

/// Two nodes with a direct path.
fn direct() -> World {
    let mut world = World::started(Transport::Auto);
    world.open_flows();
    world.send(0, b"hello");
    world.run(SECOND * 2);
    assert!(world.is_direct(0), "{:?}", world.status(0));
    world.nodes.iter_mut().for_each(|node| node.received.clear());
    world
}

#[test]
fn the_first_packets_go_by_derp_and_the_path_becomes_direct() {
    let mut world = World::started(Transport::Auto);
    world.udp_delay = Duration::from_millis(100);
    world.open_flows();
    world.send(0, b"first");
    world.run(Duration::from_millis(150));
    assert_eq!(world.texts(1), ["first"], "the relay was faster than the search for a path");
    assert_eq!(world.nodes[0].sent.0, 0);
    world.run(SECOND);
    let derp_before = world.nodes[0].sent.1;
    world.send(0, b"second");
    world.run(SECOND);
    assert_eq!(world.texts(1), ["first", "second"]);
    let expected = PathStatus::Direct { addr: world.nodes[1].underlay, rtt: Duration::from_millis(200) };
    assert_eq!(world.status(0).path, expected);
    assert_eq!((world.nodes[0].sent.0, world.nodes[0].sent.1), (1, derp_before));
    assert!(world.nodes[0].outputs.contains(&Output::PeerChanged { peer: world.nodes[1].key.public() }));
}

#[test]
fn an_untrusted_path_is_used_beside_derp_and_then_given_up() {
    let mut world = direct();
    world.udp_works = false;
    // Heartbeats are answered no more; trust ends 6.5 s after the last pong, the address later.
    let mut both = 0;
    for index in 0..150 {
        let before = (world.nodes[0].sent, world.texts(1).len());
        world.send(0, format!("{index}").as_bytes());
        world.run(Duration::from_millis(100));
        let sent = world.nodes[0].sent;
        both += usize::from(sent.0 > before.0.0 && sent.1 > before.0.1);
    }
    assert!(both >= 5, "{both}");
    assert!(matches!(world.status(0).path, PathStatus::Derp { .. }));
    let texts = world.texts(1);
    assert_eq!(texts.last().map(String::as_str), Some("149"));
    assert!(texts.len() > 80, "only what was sent on a trusted but dead path is lost: {}", texts.len());
    world.udp_works = true;
    world.send(0, b"again");
    world.run(SECOND * 6);
    world.send(0, b"and again");
    world.run(SECOND * 6);
    assert!(world.is_direct(0));
}

#[test]
fn a_path_that_the_machine_cannot_take_is_left_at_once() {
    let mut world = direct();
    let (peer, elsewhere) = (world.nodes[1].underlay, world.nodes[0].underlay);
    let now = world.now;
    world.nodes[0].engine.handle_unreachable(elsewhere, now);
    world.udp_works = false;
    world.send(0, b"lost");
    // The ping that asks because of the first is refused too.
    (0..2).for_each(|_| world.nodes[0].engine.handle_unreachable(peer, now));
    world.send(0, b"relayed");
    world.run(Duration::from_millis(100));
    assert_eq!(world.texts(1), ["relayed"]);
    let key = world.nodes[1].key.public();
    let resent = world.nodes[0].outputs.iter().filter(|output| **output == Output::Resend { peer: key });
    assert_eq!(resent.count(), 2, "when the path came up, and now");
    world.udp_works = true;
    world.send(0, b"again");
    world.run(SECOND * 6);
    assert!(world.is_direct(0));
}

#[test]
fn heartbeats_keep_a_path_trusted_while_it_is_used_and_stop_after_45_seconds() {
    let mut world = direct();
    world.run(SECOND * 40);
    assert!(world.is_direct(0));
    world.run(SECOND * 20);
    let before = world.datagrams.len();
    world.run(SECOND * 60);
    let disco = world.datagrams[before..].iter().filter(|(_, _, datagram)| datagram.starts_with(&disco::MAGIC));
    assert_eq!(disco.count(), 0);
}

#[test]
fn a_peer_without_published_endpoints_is_found_by_calling_it() {
    let mut world = World::new(Transport::Auto);
    world.peers_publish_endpoints = false;
    world.start();
    world.open_flows();
    world.send(0, b"who are you");
    world.run(SECOND * 2);
    assert!(world.is_direct(0));
}

#[test]
fn direct_mode_carries_no_data_by_derp() {
    let mut world = World::started(Transport::Direct);
    world.open_flows();
    world.send(0, b"direct");
    world.run(SECOND * 2);
    assert_eq!(world.texts(1), ["direct"]);
    world.udp_works = false;
    for _ in 0..20 {
        world.send(0, b"lost");
        world.run(SECOND);
    }
    assert_eq!((world.nodes[0].sent.1, world.nodes[1].sent.1), (0, 0));
    assert_eq!(world.status(0).path, PathStatus::None);
    assert!(world.nodes[0].engine.stats().dropped_no_path > 0);
}

#[test]
fn a_peer_that_hears_us_late_is_reached_soon_without_relays_too() {
    let mut world = World::started(Transport::Direct);
    world.open_flows();
    world.udp_works = false;
    world.send(0, b"do you know me");
    world.run(SECOND);
    world.udp_works = true;
    world.run(SECOND / 2);
    assert_eq!(world.texts(1), ["do you know me"]);
}

/// How a packet of node 0 to node 1 leaves now.
fn carrier(world: &mut World) -> Option<Carrier> {
    let (packet, now) = (super::udp_packet(world.flow(0), b"which way"), world.now);
    world.nodes[0].engine.handle_outbound(&packet, now).unwrap()
}

#[test]
fn a_packet_tells_its_way_unless_it_waits_or_takes_both() {
    let mut world = World::started(Transport::Derp);
    assert_eq!(carrier(&mut world), None, "it waits for the handshake");
    world.run(SECOND);
    assert!(matches!(carrier(&mut world), Some(Carrier::Relay(_))));
    let mut world = direct();
    assert_eq!(carrier(&mut world), Some(Carrier::Direct));
    world.udp_works = false;
    let mut next = || {
        world.run(Duration::from_millis(100));
        carrier(&mut world)
    };
    let doubted = (0..150).map(|_| next()).find(|carrier| *carrier != Some(Carrier::Direct));
    assert_eq!(doubted, Some(None), "it goes both ways");
}

#[test]
fn derp_mode_sends_no_datagram_and_ignores_them() {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    world.send(0, b"relayed");
    world.run(SECOND * 30);
    assert!(world.datagrams.is_empty());
    assert!(world.nodes[0].host.endpoints.is_empty());
    let (from, now) = (world.nodes[1].underlay, world.now);
    assert!(world.nodes[0].engine.handle_udp(from, &mut [4; 64], now).is_none());
}

/// Sends node 0 a ping as node 1 would, and says how many datagrams that caused.
fn ping(world: &mut World, tx: TxId, disco: &DiscoPrivate) -> usize {
    let shared = disco::shared_key(disco, &world.nodes[0].disco.public());
    let message = Message::Ping { tx, node: Some(world.nodes[1].key.public()) };
    let packet = disco::seal(&message, &disco.public(), &shared, [tx.0[0]; 24]);
    let before = world.datagrams.len();
    let (from, to) = (world.nodes[1].underlay, world.nodes[0].underlay);
    world.deliver_udp(from, to, packet);
    world.run(Duration::from_millis(1));
    world.datagrams.len() - before
}

#[test]
fn copies_of_a_ping_are_answered_once() {
    let mut world = World::started(Transport::Auto);
    let disco = world.nodes[1].disco.clone();
    assert_eq!(ping(&mut world, TxId([1; 12]), &disco), 1);
    assert_eq!(ping(&mut world, TxId([1; 12]), &disco), 0);
    assert_eq!(ping(&mut world, TxId([2; 12]), &disco), 1);
}

#[test]
fn pings_of_strangers_are_not_answered_until_a_peer_advertises_the_key() {
    let mut world = World::started(Transport::Auto);
    let fresh = DiscoPrivate::random();
    assert_eq!(ping(&mut world, TxId([1; 12]), &fresh), 0);
    assert_eq!(world.nodes[0].engine.stats().dropped_stranger, 1);
    let key = tsmp::Message::DiscoAdvertisement(fresh.public());
    let (from, to) = (world.nodes[1].overlay, world.nodes[0].overlay);
    let packet = crate::wire::ip::build(crate::wire::ip::protocol::TSMP, from, to, &key.encode()).unwrap();
    let now = world.now;
    world.nodes[1].engine.handle_outbound(&packet, now).unwrap();
    world.run(SECOND);
    assert_eq!(ping(&mut world, TxId([2; 12]), &fresh), 1);
}

#[test]
fn a_forged_disco_packet_is_dropped() {
    let mut world = World::started(Transport::Auto);
    let (mallory, victim) = (DiscoPrivate::random(), world.nodes[1].disco.public());
    let shared = disco::shared_key(&mallory, &world.nodes[0].disco.public());
    let packet = disco::seal(&Message::Ping { tx: TxId([1; 12]), node: None }, &victim, &shared, [0; 24]);
    let (from, to) = (world.nodes[1].underlay, world.nodes[0].underlay);
    world.deliver_udp(from, to, packet);
    assert_eq!(world.nodes[0].engine.stats().dropped_forged, 1);
}

#[test]
fn a_call_by_udp_is_not_heeded() {
    let mut world = World::started(Transport::Auto);
    let shared = disco::shared_key(&world.nodes[1].disco, &world.nodes[0].disco.public());
    let call = Message::CallMeMaybe { endpoints: vec!["192.0.2.9:9".parse().unwrap()] };
    let packet = disco::seal(&call, &world.nodes[1].disco.public(), &shared, [0; 24]);
    let before = world.datagrams.len();
    let (from, to) = (world.nodes[1].underlay, world.nodes[0].underlay);
    world.deliver_udp(from, to, packet);
    world.run(Duration::from_millis(1));
    assert_eq!(world.datagrams.len(), before);
}

/// By which regions a packet of node 0 to node 1 goes now.
fn regions_used(world: &mut World) -> Vec<u32> {
    let now = world.now;
    world.run(Duration::ZERO);
    let packet = super::udp_packet(world.flow(0), b"where to");
    world.nodes[0].engine.handle_outbound(&packet, now).unwrap();
    let mut regions = Vec::new();
    while let Some(output) = world.nodes[0].engine.poll_output() {
        if let Output::Derp { region, .. } = output {
            regions.push(region);
        }
    }
    regions
}

#[test]
fn replies_go_by_the_region_that_the_peer_used_until_it_is_gone() {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    world.send(0, b"session");
    world.run(SECOND);
    let peer: NodePublic = world.nodes[1].key.public();
    let home = world.nodes[1].host.home.unwrap();
    assert_eq!(regions_used(&mut world), [home]);
    let (other, now) = (3, world.now);
    world.nodes[0].engine.handle_derp(other, peer, &mut [0; 4], now);
    world.run(SECOND);
    assert_eq!(regions_used(&mut world), [home], "the first one still works");
    world.nodes[0].engine.handle_derp_peer_gone(home, peer, now);
    world.nodes[0].engine.handle_derp(other, peer, &mut [0; 4], now);
    assert_eq!(regions_used(&mut world), [other]);
    world.nodes[0].engine.handle_derp_peer_gone(other, peer, now);
    assert_eq!(regions_used(&mut world), [home]);
}

#[test]
fn segments_for_one_destination_leave_in_one_batch() {
    let mut world = direct();
    for _ in 0..10 {
        world.send(0, &[7; 1000]);
    }
    world.send(0, b"end");
    let mut batches = Vec::new();
    while let Some(output) = world.nodes[0].engine.poll_output() {
        if let Output::Udp { contents, segment, .. } = output {
            batches.push((contents.len(), segment));
        }
    }
    assert_eq!(batches, [(10 * 1060 + 63, 1060)]);
}

#[test]
fn another_network_voids_what_was_known_of_paths() {
    let mut world = direct();
    let now = world.now;
    world.nodes[0].engine.handle_move(vec!["192.168.7.7:1".parse().unwrap()].into(), now);
    assert!(!world.is_direct(0));
    world.send(0, b"hello again");
    world.run(SECOND * 2);
    assert!(world.is_direct(0));
    assert_eq!(world.texts(1), ["hello again"]);
}

#[test]
fn a_plain_wireguard_peer_gets_its_initiation_at_each_endpoint_in_turn() {
    let mut world = World::started(Transport::Auto);
    world.make_plain(&["192.0.2.1:1", "192.0.2.2:2"]);
    world.datagrams.clear();
    let (now, key) = (world.now, world.nodes[1].key.public());
    world.nodes[0].engine.warm(key, now);
    world.run(Duration::from_millis(799));
    let to: Vec<String> = world.datagrams.iter().filter(|it| it.2[0] == 1).map(|it| it.1.to_string()).collect();
    assert_eq!(to, ["192.0.2.1:1", "192.0.2.2:2", "192.0.2.1:1", "192.0.2.2:2"]);
}

#[test]
fn a_firewall_that_refuses_some_datagrams_has_nothing_repeated_all_the_time() {
    let mut world = direct();
    world.udp_delay = Duration::ZERO;
    let (peer, key) = (world.nodes[1].underlay, world.nodes[1].key.public());
    world.nodes[0].outputs.clear();
    world.datagrams.clear();
    for _ in 0..1_000 {
        let now = world.now;
        world.nodes[0].engine.handle_unreachable(peer, now);
        world.run(Duration::from_millis(1));
        assert!(world.is_direct(0));
    }
    assert_eq!(world.nodes[0].outputs.iter().filter(|output| **output == Output::Resend { peer: key }).count(), 1);
    assert!(world.datagrams.len() < 20, "{} datagrams", world.datagrams.len());
}
