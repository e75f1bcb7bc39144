//! Two routers that serve the same prefix, and one of them goes.

use std::time::Duration;

use serde_json::json;

use super::SECOND;
use super::world::{World, udp_packet};
use crate::engine::{Flow, Output, Protocol, Transport};
use crate::key::NodePublic;

/// No later than that after the first packet that gets no answer, packets go to the other router.
const BOUND: Duration = Duration::from_millis(2_000);

/// The same for a router that we have had no session with.
const BOUND_UNMET: Duration = Duration::from_millis(3_500);

/// Node 0 is ours; 1 and 2 serve 10.20.0.0/24, and 1 is primary.
fn routers(transport: Transport) -> World {
    let mut world = World::of(3, transport);
    let serves = |own: &str, primary: bool| {
        let primary = if primary { vec!["10.20.0.0/24"] } else { Vec::new() };
        json!({"AllowedIPs": [own, "10.20.0.0/24"], "PrimaryRoutes": primary, "Online": true})
    };
    world.besides.insert(1, serves("100.64.0.2/32", true));
    world.besides.insert(2, serves("100.64.0.3/32", false));
    world.start();
    world
}

fn send_to_site(world: &mut World) {
    let local = std::net::SocketAddr::new(world.nodes[0].overlay, 4000);
    let flow = Flow { protocol: Protocol::Udp, local, remote: "10.20.0.7:80".parse().unwrap() };
    let now = world.now;
    world.nodes[0].engine.handle_outbound(&udp_packet(flow, b"to the site"), now).unwrap();
}

/// Packets for the site that came to a router, which is no site itself and drops them.
fn arrived(world: &World, router: usize) -> u64 {
    world.nodes[router].engine.stats().dropped_not_for_us
}

fn serving(world: &World) -> NodePublic {
    world.nodes[0].engine.netmap().unwrap().route("10.20.0.7".parse().unwrap()).unwrap().peer.key
}

fn key(world: &World, node: usize) -> NodePublic {
    world.nodes[node].key.public()
}

/// Sends every 100 ms until the router has got a packet; how long that took.
fn until_arrived(world: &mut World, router: usize) -> Duration {
    let (start, before) = (world.now, arrived(world, router));
    while arrived(world, router) == before {
        assert!(world.now - start < SECOND * 60, "nothing came to router {router}");
        send_to_site(world);
        world.run(Duration::from_millis(100));
    }
    world.now - start
}

#[test]
fn a_router_that_dies_is_left_within_the_bound_and_used_again_when_it_is_heard() {
    for transport in [Transport::Auto, Transport::Derp] {
        let mut world = routers(transport);
        until_arrived(&mut world, 1);
        world.run(SECOND * 2);
        assert_eq!((serving(&world), arrived(&world, 2)), (key(&world, 1), 0));
        world.dead = vec![1];
        let took = until_arrived(&mut world, 2);
        assert!(took <= BOUND + Duration::from_millis(200), "{transport:?}: {took:?}");
        assert!(world.nodes[0].outputs.contains(&Output::RoutesChanged));
        assert_eq!(serving(&world), key(&world, 2));
        world.dead.clear();
        let took = until_arrived(&mut world, 1);
        assert!(took >= SECOND * 30, "{transport:?}: {took:?}");
        assert_eq!(serving(&world), key(&world, 1));
    }
}

/// Sends every 100 ms for so long, and counts how often the route changes.
fn keep_sending(world: &mut World, time: Duration) -> usize {
    let (end, mut moves) = (world.now + time, 0);
    while world.now < end {
        let before = serving(world);
        send_to_site(world);
        world.run(Duration::from_millis(100));
        moves += usize::from(serving(world) != before);
    }
    moves
}

#[test]
fn one_lost_handshake_changes_no_route() {
    let mut world = routers(Transport::Derp);
    world.derp_works = false;
    send_to_site(&mut world);
    world.run(Duration::from_millis(200));
    world.derp_works = true;
    let mut moves = keep_sending(&mut world, SECOND * 2);
    // The same with a session, which the router has lost.
    world.dead = vec![1];
    moves += keep_sending(&mut world, Duration::from_millis(700));
    world.dead.clear();
    moves += keep_sending(&mut world, SECOND * 5);
    assert_eq!((moves, serving(&world), arrived(&world, 2)), (0, key(&world, 1), 0));
}

#[test]
fn ten_outages_of_a_second_cause_at_most_two_changes() {
    for outage in [1_000, 1_500, 2_000] {
        let mut world = routers(Transport::Derp);
        let mut moves = keep_sending(&mut world, SECOND);
        for _ in 0..10 {
            world.dead = vec![1];
            moves += keep_sending(&mut world, Duration::from_millis(outage));
            world.dead.clear();
            moves += keep_sending(&mut world, SECOND * 6);
        }
        moves += keep_sending(&mut world, SECOND * 40);
        assert!(moves <= 2, "{outage} ms: {moves}");
        assert_eq!(serving(&world), key(&world, 1));
    }
}

#[test]
fn a_router_on_probation_is_used_when_the_other_falls_silent_or_offline() {
    for offline in [false, true] {
        let mut world = routers(Transport::Derp);
        keep_sending(&mut world, SECOND);
        world.dead = vec![1];
        until_arrived(&mut world, 2);
        world.dead.clear();
        keep_sending(&mut world, SECOND * 8);
        assert_eq!(serving(&world), key(&world, 2));
        if offline {
            world.besides.get_mut(&2).unwrap()["Online"] = json!(false);
            world.publish();
        } else {
            world.dead = vec![2];
        }
        let took = until_arrived(&mut world, 1);
        assert!(took <= BOUND + Duration::from_millis(200), "{took:?}");
    }
}

#[test]
fn nobody_is_judged_while_our_own_region_is_lost() {
    let mut world = routers(Transport::Derp);
    keep_sending(&mut world, SECOND);
    let home = world.nodes[0].host.home.unwrap();
    let now = world.now;
    world.nodes[0].regions.retain(|region| *region != home);
    world.nodes[0].engine.handle_derp_lost(home, now);
    let mut moves = keep_sending(&mut world, SECOND * 6);
    assert_eq!(world.nodes[0].host.home, Some(home));
    world.nodes[0].regions.push(home);
    let now = world.now;
    world.nodes[0].engine.handle_derp_connected(home, now);
    moves += keep_sending(&mut world, SECOND * 5);
    assert_eq!((moves, serving(&world)), (0, key(&world, 1)));
}

#[test]
fn a_router_that_never_answers_is_left_and_what_waited_for_it_goes_to_the_other() {
    let mut world = routers(Transport::Derp);
    world.dead = vec![1];
    send_to_site(&mut world);
    world.run(BOUND_UNMET);
    assert_eq!((arrived(&world, 1), arrived(&world, 2)), (0, 1), "one packet was sent, and it arrived");
}

#[test]
fn a_region_that_does_not_have_the_router_is_soon_believed() {
    let mut world = routers(Transport::Derp);
    world.dead = vec![1];
    send_to_site(&mut world);
    world.run(Duration::from_millis(10));
    let (router, home, now) = (key(&world, 1), world.nodes[1].host.home.unwrap(), world.now);
    world.nodes[0].engine.handle_derp_peer_gone(home, router, now);
    world.run(Duration::from_millis(250));
    assert_eq!(arrived(&world, 2), 0, "it may be connecting the region again");
    world.run(Duration::from_millis(550));
    assert_eq!(arrived(&world, 2), 1);
}

#[test]
fn a_router_that_connects_its_region_again_stays() {
    let mut world = routers(Transport::Derp);
    world.dead = vec![1];
    send_to_site(&mut world);
    world.run(Duration::from_millis(10));
    let (router, home) = (key(&world, 1), world.nodes[1].host.home.unwrap());
    world.dead.clear();
    for _ in 0..3 {
        let now = world.now;
        world.nodes[0].engine.handle_derp_peer_gone(home, router, now);
    }
    world.run(SECOND * 2);
    assert_eq!((arrived(&world, 1), arrived(&world, 2)), (1, 0));
    let handshakes = world.nodes[0].engine.peer_status(&router, world.now).unwrap().handshakes_sent;
    assert_eq!(handshakes, 2, "asked anew once, however often the region says so");
}

#[test]
fn a_router_that_only_listens_is_asked_and_stays() {
    let mut world = routers(Transport::Auto);
    for _ in 0..50 {
        send_to_site(&mut world);
        world.run(Duration::from_millis(200));
    }
    assert_eq!((serving(&world), arrived(&world, 2)), (key(&world, 1), 0));
    let handshakes = world.nodes[0].engine.peer_status(&key(&world, 1), world.now).unwrap().handshakes_sent;
    assert_eq!(handshakes, 1, "a ping inside the tunnel is enough");
}

#[test]
fn two_silent_routers_are_as_good_as_two_that_answer() {
    let mut world = routers(Transport::Derp);
    world.dead = vec![1, 2];
    keep_sending(&mut world, SECOND * 8);
    assert_eq!(serving(&world), key(&world, 1));
    world.dead = vec![1];
    let took = until_arrived(&mut world, 2);
    assert!(took <= SECOND * 5, "{took:?}: handshakes are repeated every four seconds by now");
}

#[test]
fn control_moves_the_route_and_what_waits_goes_with_it() {
    let mut world = routers(Transport::Derp);
    world.dead = vec![1];
    send_to_site(&mut world);
    world.run(Duration::from_millis(100));
    world.besides.insert(1, json!({"AllowedIPs": ["100.64.0.2/32"], "Online": false}));
    world.publish();
    world.run(Duration::from_millis(300));
    assert_eq!(arrived(&world, 2), 1);
}

#[test]
fn a_silent_router_that_comes_online_gets_another_chance() {
    let mut world = routers(Transport::Derp);
    world.dead = vec![1];
    until_arrived(&mut world, 2);
    world.besides.get_mut(&1).unwrap()["Online"] = json!(false);
    world.publish();
    assert_eq!(serving(&world), key(&world, 2));
    world.dead.clear();
    world.besides.get_mut(&1).unwrap()["Online"] = json!(true);
    world.publish();
    assert_eq!(serving(&world), key(&world, 2), "it has to be heard first");
    world.run(SECOND * 40);
    assert_eq!(serving(&world), key(&world, 1), "nobody had to send anything for that");
}

#[test]
fn a_peer_without_rival_is_never_asked() {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    world.send(0, b"session");
    world.run(SECOND);
    let sent = world.nodes[0].engine.stats().sent;
    world.derp_works = false;
    world.send(0, b"into the dark");
    world.run(SECOND * 4);
    assert_eq!((world.nodes[0].engine.stats().sent - sent, world.status(0).handshakes_sent), (1, 1));
    assert!(!world.nodes[0].outputs.contains(&Output::RoutesChanged));
}

/// Node 1 knows node 0 as 100.64.9.9, and may open nothing to it.
fn shared() -> World {
    let mut world = World::of(3, Transport::Derp);
    world.besides.insert(1, json!({"SelfNodeV4MasqAddrForThisPeer": "100.64.9.9", "IsJailed": true}));
    world.start();
    world
}

/// Gives an inner packet to node 0 as if `peer` had sent it, and says what became of it.
fn judged(world: &World, peer: usize, flow: Flow) -> bool {
    let netmap = world.nodes[0].engine.netmap().unwrap();
    let peer = netmap.peer_by_key(&key(world, peer)).unwrap();
    netmap.allowed(peer, flow.local.ip()) && netmap.is_ours(peer, flow.remote.ip())
}

#[test]
fn a_masquerade_address_is_ours_to_its_peer_alone() {
    let world = shared();
    let netmap = world.nodes[0].engine.netmap().unwrap();
    let flow = |from: &str, to: &str| Flow {
        protocol: Protocol::Udp,
        local: from.parse().unwrap(),
        remote: to.parse().unwrap(),
    };
    assert_eq!(netmap.source_for("100.64.0.2".parse().unwrap()), Some("100.64.9.9".parse().unwrap()));
    assert_eq!(netmap.source_for("100.64.0.3".parse().unwrap()), Some(world.nodes[0].overlay));
    assert!(judged(&world, 1, flow("100.64.0.2:1", "100.64.9.9:2")));
    assert!(judged(&world, 1, flow("100.64.0.2:1", "100.64.0.1:2")));
    assert!(!judged(&world, 2, flow("100.64.0.3:1", "100.64.9.9:2")));
}

#[test]
fn a_jailed_peer_gets_replies_in_and_nothing_else() {
    let mut world = shared();
    // Node 1 believes that node 0 has the address by which it knows it.
    world.besides.insert(0, json!({"Addresses": ["100.64.9.9/32"], "AllowedIPs": ["100.64.9.9/32"]}));
    let masqueraded = world.besides.remove(&1).unwrap();
    world.publish();
    world.besides.insert(1, masqueraded);
    world.besides.remove(&0);
    world.publish_to(0);
    let ours: std::net::SocketAddr = "100.64.9.9:4000".parse().unwrap();
    let theirs: std::net::SocketAddr = "100.64.0.2:80".parse().unwrap();
    let out = Flow { protocol: Protocol::Udp, local: ours, remote: theirs };
    let back = Flow { protocol: Protocol::Udp, local: theirs, remote: ours };
    let now = world.now;
    world.nodes[1].engine.handle_outbound(&udp_packet(back, b"knock"), now).unwrap();
    world.run(SECOND);
    assert_eq!((world.texts(0).len(), world.nodes[0].engine.stats().dropped_unsolicited), (0, 1));
    world.nodes[0].engine.open_flow(out);
    world.nodes[1].engine.open_flow(back);
    let now = world.now;
    world.nodes[0].engine.handle_outbound(&udp_packet(out, b"question"), now).unwrap();
    world.run(SECOND);
    let now = world.now;
    world.nodes[1].engine.handle_outbound(&udp_packet(back, b"answer"), now).unwrap();
    world.run(SECOND);
    assert_eq!((world.texts(1), world.texts(0)), (vec!["question".to_owned()], vec!["answer".to_owned()]));
}
