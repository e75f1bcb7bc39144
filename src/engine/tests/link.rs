//! What an engine does when its own network is another, when a relay comes back, and after a sleep.

use std::time::Duration;

use serde_json::json;

use super::SECOND;
use super::world::{STUN_SERVER, World};
use crate::engine::{Output, PathStatus, Transport};
use crate::key::NodePublic;
use crate::netmap::RegionId;

/// Two nodes with a direct path.
fn direct() -> World {
    let mut world = World::started(Transport::Auto);
    world.open_flows();
    world.send(0, b"hello");
    world.run(SECOND * 2);
    assert!(world.is_direct(0) && world.is_direct(1), "{:?}", world.status(0));
    world.nodes.iter_mut().for_each(|node| node.received.clear());
    world.datagrams.clear();
    world
}

/// Node 0 has another address.
fn move_away(world: &mut World) {
    world.nodes[0].underlay = "192.0.2.77:7777".parse().unwrap();
    let (underlay, now) = (world.nodes[0].underlay, world.now);
    world.nodes[0].engine.handle_move(vec![underlay].into(), now);
}

/// Two nodes that have spoken by a relay.
fn relayed() -> World {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    world.send(0, b"hello");
    world.run(SECOND * 2);
    world
}

#[test]
fn a_peer_in_use_is_asked_at_once_although_nothing_is_sent() {
    let mut world = direct();
    let peer = world.nodes[1].underlay;
    move_away(&mut world);
    assert!(!world.is_direct(0), "the path is in doubt");
    world.run(Duration::from_millis(30));
    assert_eq!(world.status(0).path, PathStatus::Direct { addr: peer, rtt: Duration::from_millis(20) });
}

#[test]
fn a_peer_that_only_sends_finds_us_at_our_new_address() {
    let mut world = direct();
    move_away(&mut world);
    world.run(Duration::from_millis(100));
    // Control has told it meanwhile.
    world.publish();
    for _ in 0..10 {
        world.send(1, b"on");
        world.run(Duration::from_millis(100));
    }
    assert!(world.is_direct(1), "{:?}", world.status(1));
    assert_eq!(world.texts(0).len(), 10);
}

#[test]
fn while_a_path_is_in_doubt_packets_go_both_ways() {
    let mut world = direct();
    world.udp_works = false;
    move_away(&mut world);
    world.send(0, b"by derp");
    world.run(Duration::from_millis(100));
    assert_eq!(world.texts(1), ["by derp"]);
}

#[test]
fn what_servers_saw_before_is_told_to_nobody_any_more() {
    let mut world = direct();
    let old = world.nodes[0].underlay;
    assert!(world.nodes[0].host.endpoints.iter().any(|(endpoint, _)| *endpoint == old));
    move_away(&mut world);
    // A round trip to the server that answers; the one that does not is not waited for.
    world.run(Duration::from_millis(20));
    let told: Vec<_> = world.nodes[0].host.endpoints.iter().map(|(endpoint, _)| *endpoint).collect();
    assert_eq!(told, [world.nodes[0].underlay]);
    let asked = |to: &str| world.datagrams.iter().any(|it| it.0 == world.nodes[0].underlay && it.1.to_string() == to);
    assert!(asked(STUN_SERVER));
}

#[test]
fn another_address_beside_the_first_leaves_paths_alone() {
    let mut world = direct();
    let (locals, now) = (vec![world.nodes[0].underlay, "172.17.0.1:1000".parse().unwrap()], world.now);
    world.nodes[0].engine.set_local_endpoints(locals.clone().into(), now);
    assert!(world.is_direct(0));
    world.run(Duration::from_millis(30));
    assert!(locals.iter().all(|local| world.nodes[0].host.endpoints.iter().any(|(endpoint, _)| endpoint == local)));
}

#[test]
fn after_a_sleep_sessions_are_made_anew_and_the_old_ones_serve_until_then() {
    let mut world = direct();
    let (before, now) = (world.status(0).handshakes_sent, world.now);
    world.nodes[0].engine.handle_wake(now);
    world.send(0, b"at once");
    world.run(Duration::from_millis(25));
    assert_eq!(world.texts(1), ["at once"]);
    assert_eq!(world.status(0).handshakes_sent, before + 1);
    assert!(world.status(0).last_handshake.is_some_and(|at| at > now));
}

#[test]
fn what_a_peer_sent_before_a_sleep_does_not_end_the_search_for_a_new_session() {
    let mut world = direct();
    world.send(1, b"from before");
    world.run(Duration::from_millis(5));
    let now = world.now;
    world.nodes[0].engine.handle_wake(now);
    world.run(Duration::from_millis(25));
    assert_eq!(world.texts(0), ["from before"]);
    assert!(world.status(0).last_handshake.is_some_and(|at| at > now));
}

/// How often node 0 calls its peer, which does not answer, in the four seconds after it moved.
fn calls_after_a_move(world: &mut World) -> usize {
    world.send(0, b"before");
    world.run(SECOND);
    world.nodes[0].calls = 0;
    world.derp_works = false;
    move_away(world);
    world.send(0, b"after");
    world.run(SECOND * 4);
    world.nodes[0].calls
}

#[test]
fn only_a_peer_that_was_reached_directly_is_told_again_and_again_that_we_moved() {
    let mut world = direct();
    world.udp_works = false;
    assert!(calls_after_a_move(&mut world) > 3);
    let mut world = World::new(Transport::Auto);
    world.udp_works = false;
    world.start();
    world.open_flows();
    assert_eq!(calls_after_a_move(&mut world), 1);
}

/// How often node 0 has been told since the last time that its peer gets everything again.
fn resent(world: &mut World) -> usize {
    let peer = world.nodes[1].key.public();
    let outputs = std::mem::take(&mut world.nodes[0].outputs);
    outputs.iter().filter(|output| **output == Output::Resend { peer }).count()
}

/// Node 0 loses the region that its peer lives in, and gets it back.
fn lose_relay(world: &mut World) {
    let (home, now) = (world.nodes[1].host.home.unwrap(), world.now);
    world.nodes[0].engine.handle_derp_lost(home, now);
    world.run(SECOND);
    let now = world.now;
    world.nodes[0].engine.handle_derp_connected(home, now);
    world.run(Duration::from_millis(1));
}

#[test]
fn what_went_by_a_relay_that_was_lost_is_sent_again_when_it_is_back() {
    let mut world = relayed();
    assert_eq!(resent(&mut world), 0, "the first connection of a region brings nothing back");
    lose_relay(&mut world);
    assert_eq!(resent(&mut world), 1);
    let mut world = direct();
    resent(&mut world);
    lose_relay(&mut world);
    assert_eq!(resent(&mut world), 0, "nothing went by it");
}

/// Control tells node 0 that node 1 has moved.
fn move_home(world: &mut World) -> RegionId {
    let old = world.nodes[1].host.home.unwrap();
    world.besides.insert(1, json!({"HomeDERP": 3 - old}));
    world.publish_to(0);
    old
}

#[test]
fn what_went_by_a_relay_that_was_only_doubted_is_on_its_way() {
    let mut world = relayed();
    resent(&mut world);
    let home = world.nodes[1].host.home.unwrap();
    for doubted in [true, false, true] {
        let now = world.now;
        world.nodes[0].engine.handle_derp_doubt(home, doubted, now);
        world.run(SECOND * 6);
    }
    assert_eq!(resent(&mut world), 0);
    lose_relay(&mut world);
    assert_eq!(resent(&mut world), 1, "it was lost in the end");
}

#[test]
fn what_went_to_a_peers_home_is_sent_again_when_the_peer_moves_because_that_is_lost() {
    let mut world = relayed();
    let (old, now) = (world.nodes[1].host.home.unwrap(), world.now);
    world.nodes[0].engine.handle_derp_lost(old, now);
    world.run(Duration::from_millis(1));
    resent(&mut world);
    move_home(&mut world);
    world.publish_to(0);
    world.run(Duration::from_millis(1));
    assert_eq!(resent(&mut world), 1);
}

#[test]
fn what_went_to_a_home_that_the_peer_has_left_is_sent_again_once_it_goes_to_the_new_one() {
    for way in 0..3 {
        let mut world = relayed();
        resent(&mut world);
        let old = move_home(&mut world);
        world.run(Duration::from_millis(1));
        assert_eq!(resent(&mut world), 0, "the peer still answers by the old one");
        for _ in 0..2 {
            let now = world.now;
            match way {
                0 => drop(deny_peer(&mut world)),
                1 => world.nodes[0].engine.handle_derp_lost(old, now),
                _ => world.nodes[0].engine.handle_derp_doubt(old, true, now),
            }
            world.run(Duration::from_millis(1));
        }
        assert_eq!(resent(&mut world), 1);
    }
}

/// Node 1's home tells node 0 that node 1 is not there.
fn deny_peer(world: &mut World) -> (RegionId, NodePublic) {
    let (home, peer, now) = (world.nodes[1].host.home.unwrap(), world.nodes[1].key.public(), world.now);
    world.nodes[0].engine.handle_derp_peer_gone(home, peer, now);
    (home, peer)
}

#[test]
fn what_a_relay_had_no_receiver_for_is_sent_again_when_it_brings_something_of_the_peer() {
    let mut world = relayed();
    deny_peer(&mut world);
    world.run(SECOND);
    assert_eq!(resent(&mut world), 0);
    for _ in 0..2 {
        world.send(1, b"back");
        world.run(Duration::from_millis(50));
    }
    assert_eq!(resent(&mut world), 1);
}

#[test]
fn a_relay_that_loses_the_peer_all_the_time_has_everything_repeated_once_in_five_seconds() {
    let mut world = relayed();
    for _ in 0..40 {
        deny_peer(&mut world);
        world.send(1, b"back");
        world.run(Duration::from_millis(100));
    }
    assert_eq!(resent(&mut world), 1);
    world.run(SECOND);
    world.send(1, b"still here");
    world.run(Duration::from_millis(100));
    assert_eq!(resent(&mut world), 1, "of what was lost since");
}

#[test]
fn a_relays_word_alone_brings_nothing_back() {
    let mut world = relayed();
    let (home, peer) = deny_peer(&mut world);
    let now = world.now;
    for packet in [&mut [7; 1][..], &mut [4; 64]] {
        assert!(world.nodes[0].engine.handle_derp(home, peer, packet, now).is_none());
    }
    world.run(Duration::from_millis(1));
    assert_eq!(resent(&mut world), 0);
    world.send(1, b"back");
    world.run(Duration::from_millis(100));
    assert_eq!(resent(&mut world), 1);
}

#[test]
fn what_a_relay_says_of_a_peer_that_is_reached_without_it_brings_nothing_back() {
    let mut world = direct();
    resent(&mut world);
    deny_peer(&mut world);
    let (ours, now) = (world.nodes[0].underlay, world.now);
    world.nodes[1].engine.handle_unreachable(ours, now);
    world.udp_works = false;
    world.send(1, b"relayed");
    world.run(Duration::from_millis(100));
    assert_eq!(world.texts(0), ["relayed"]);
    assert!(world.is_direct(0));
    assert_eq!(resent(&mut world), 0);
}

#[test]
fn a_relay_that_is_lost_all_the_time_has_everything_repeated_once_in_five_seconds() {
    let mut world = relayed();
    for _ in 0..4 {
        lose_relay(&mut world);
    }
    assert_eq!(resent(&mut world), 1);
    lose_relay(&mut world);
    lose_relay(&mut world);
    assert_eq!(resent(&mut world), 1);
}
