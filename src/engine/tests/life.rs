//! How sessions live: the first handshake, its successors, and their ends.

use std::time::Duration;

use super::SECOND;
use super::world::World;
use crate::engine::Transport;

/// Packets sent each way, one each `pause`, and who lost which.
fn transfer(world: &mut World, time: Duration, pause: Duration) -> usize {
    world.nodes.iter_mut().for_each(|node| node.received.clear());
    let (end, mut sent) = (world.now + time, 0);
    while world.now < end {
        for node in 0..2 {
            world.send(node, format!("{sent}").as_bytes());
        }
        sent += 1;
        world.run(pause);
    }
    world.run(SECOND);
    2 * sent - world.texts(0).len() - world.texts(1).len()
}

fn handshakes(world: &World) -> u64 {
    world.status(0).handshakes_sent + world.status(1).handshakes_sent
}

#[test]
fn ten_minutes_of_transfer_lose_nothing_at_rekeys() {
    for transport in [Transport::Auto, Transport::Derp] {
        let mut world = World::started(transport);
        world.open_flows();
        let lost = transfer(&mut world, SECOND * 600, Duration::from_millis(200));
        assert_eq!(lost, 0);
        let made = handshakes(&world);
        assert!((5..=10).contains(&made), "one or two at first, and one each 120 to 123 s: {made}");
    }
}

#[test]
fn a_transfer_one_way_keeps_its_session_by_keepalives_and_rekeys() {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    for index in 0..1200 {
        world.send(0, format!("{index}").as_bytes());
        world.run(Duration::from_millis(500));
    }
    assert_eq!(world.texts(1).len(), 1200);
    let made = handshakes(&world);
    assert_eq!(made, 5, "nobody doubted a peer that sent keepalives");
}

#[test]
fn who_answered_the_handshake_rekeys_only_when_the_other_does_not() {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    world.send(0, b"session");
    world.run(SECOND);
    for index in 0..800 {
        world.send(1, format!("{index}").as_bytes());
        world.run(Duration::from_millis(500));
    }
    assert_eq!(world.texts(0).len(), 800);
    // Node 0 only receives, and sends keepalives: those and received data at 165 s let it rekey.
    assert_eq!((world.status(0).handshakes_sent, world.status(1).handshakes_sent), (3, 0));
}

#[test]
fn lost_rekeys_cost_nothing_while_the_old_session_serves() {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    world.send(0, b"session");
    world.run(SECOND);
    assert_eq!(transfer(&mut world, SECOND * 110, SECOND / 2), 0);
    let before = handshakes(&world);
    world.lose = |packet| matches!(packet[0], 1 | 2);
    assert_eq!(transfer(&mut world, SECOND * 50, SECOND / 2), 0);
    let tries = handshakes(&world) - before;
    assert!((8..=30).contains(&tries), "{tries}");
    world.lose = |_| false;
    assert_eq!(transfer(&mut world, SECOND * 200, SECOND / 2), 0);
}

#[test]
fn without_any_rekey_the_session_ends_at_180_seconds_and_packets_wait_for_the_next() {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    world.send(0, b"session");
    world.run(SECOND);
    world.lose = |packet| matches!(packet[0], 1 | 2);
    for _ in 0..356 {
        world.send(0, b"x");
        world.run(SECOND / 2);
    }
    assert!(world.status(0).established);
    world.run(SECOND * 2);
    assert!(!world.status(0).established && !world.status(1).established);
    world.nodes[1].received.clear();
    world.lose = |_| false;
    world.send(0, b"late");
    world.run(SECOND * 5);
    assert_eq!(world.texts(1), ["late"]);
}

#[test]
fn a_peer_that_lost_its_sessions_is_doubted_after_15_seconds() {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    world.send(0, b"session");
    world.run(SECOND);
    world.forget_sessions(1);
    let start = world.now;
    while world.texts(1).len() < 2 {
        assert!(world.now - start < SECOND * 16, "{:?}", world.now - start);
        world.send(0, b"hello?");
        world.run(Duration::from_millis(100));
    }
    assert!(world.now - start > SECOND * 14);
}

#[test]
fn an_idle_tunnel_has_no_timers_but_its_end() {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    world.send(0, b"once");
    world.run(SECOND * 60);
    let wireguard = |world: &World| world.nodes[0].engine.wireguard.next_deadline().map(|(at, _)| at);
    let ends = wireguard(&world).unwrap() - world.now;
    assert!(ends > SECOND * 100 && ends < SECOND * 121, "{ends:?}");
    world.run(SECOND * 200);
    assert_eq!(wireguard(&world), None);
    assert_eq!(handshakes(&world), 1);
}

#[test]
fn a_peer_that_never_answers_costs_ninety_seconds_and_then_nothing() {
    let mut world = World::started(Transport::Derp);
    world.derp_works = false;
    world.send(0, b"anybody?");
    world.run(SECOND * 95);
    let tried = world.status(0).handshakes_sent;
    assert!((40..=60).contains(&tried), "{tried}");
    assert_eq!(world.nodes[0].engine.wireguard.next_deadline(), None);
    world.run(SECOND * 600);
    assert_eq!(world.status(0).handshakes_sent, tried);
    assert_eq!(world.nodes[0].engine.stats().dropped_staged, 1);
}

#[test]
fn handshakes_that_cross_leave_both_ends_with_one_session_each_way() {
    for delay in [1, 30, 120, 400, 900] {
        let mut world = World::started(Transport::Derp);
        world.derp_delay = Duration::from_millis(delay);
        world.open_flows();
        world.send(0, b"from zero");
        world.send(1, b"from one");
        world.run(Duration::from_millis(delay * 8 + 300));
        assert_eq!((world.texts(1), world.texts(0)), (vec!["from zero".into()], vec!["from one".into()]), "{delay}");
        // Each end may send by the session that the other made: one of them has to replace them all the same.
        let before = handshakes(&world);
        assert_eq!(transfer(&mut world, SECOND * 178, SECOND), 0, "{delay}");
        assert!(handshakes(&world) > before, "{delay}");
    }
}

#[test]
fn beyond_a_hundred_handshakes_a_second_a_cookie_is_demanded_and_obeyed() {
    let mut world = World::started(Transport::Auto);
    world.open_flows();
    world.send(0, b"session");
    world.run(SECOND * 2);
    assert!(world.is_direct(0));
    (0..2).for_each(|node| world.forget_sessions(node));
    world.send(0, b"again");
    world.run(SECOND);
    let initiation = world.datagrams.iter().find(|it| it.2[0] == 1 && it.2.len() == 148).cloned();
    let (from, to, initiation) = initiation.unwrap();
    world.forget_sessions(0);
    for _ in 0..100 {
        world.deliver_udp(from, to, initiation.clone());
    }
    let cookies = |world: &World| world.datagrams.iter().filter(|it| it.2[0] == 3 && it.2.len() == 64).count();
    assert_eq!(cookies(&world), 0);
    world.send(0, b"busy?");
    world.run(Duration::from_millis(900));
    assert!(cookies(&world) >= 1);
    assert_eq!(world.texts(1), ["session", "again", "busy?"]);
}
