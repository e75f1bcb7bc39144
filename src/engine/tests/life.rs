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

/// The newest message of this type that went by UDP from a node.
fn caught(world: &World, from: usize, kind: u8) -> (std::net::SocketAddr, std::net::SocketAddr, Vec<u8>) {
    let from = world.nodes[from].underlay;
    let ours = |it: &&(_, _, Vec<u8>)| it.0 == from && it.2[0] == kind && it.2[1..4] == [0, 0, 0];
    world.datagrams.iter().rfind(ours).cloned().unwrap()
}

/// Two nodes with a direct path, of which the first has made the session by it.
fn direct() -> World {
    let mut world = World::started(Transport::Auto);
    world.open_flows();
    world.send(0, b"session");
    world.run(SECOND * 2);
    assert!(world.is_direct(0) && world.is_direct(1));
    (0..2).for_each(|node| world.forget_sessions(node));
    world.send(0, b"session");
    world.run(SECOND);
    world.nodes.iter_mut().for_each(|node| node.received.clear());
    world
}

#[test]
fn datagrams_that_nobody_could_mean_for_us_and_floods_by_udp_keep_no_handshake_from_derp_out() {
    for garbage in [true, false] {
        let mut world = direct();
        world.forget_sessions(1);
        // Nothing of this second has been counted yet.
        world.run(SECOND);
        let (from, to, mut initiation) = caught(&world, 0, 1);
        if garbage {
            initiation[120] ^= 1;
        }
        (0..200).for_each(|_| world.deliver_udp(from, to, initiation.clone()));
        world.run(Duration::from_millis(50));
        let cookies = world.datagrams.iter().filter(|it| it.2[0] == 3 && it.2.len() == 64).count();
        assert_eq!(cookies == 0, garbage);
        world.udp_works = false;
        world.forget_sessions(0);
        world.send(0, b"again");
        world.run(Duration::from_millis(20));
        let (_, _, mut initiation) = caught(&world, 0, 1);
        let (sender, now, node) = (world.nodes[0].key.public(), world.now, &mut world.nodes[1]);
        let before = node.engine.stats().clone();
        node.engine.handle_derp(1, sender, &mut initiation, now);
        let after = node.engine.stats();
        assert_eq!((after.dropped_under_load, after.dropped_forged), (0, before.dropped_forged), "garbage: {garbage}");
    }
}

#[test]
fn a_cookie_for_an_answer_is_obeyed_too() {
    let mut world = direct();
    (0..2).for_each(|node| world.forget_sessions(node));
    world.send(1, b"again");
    world.run(SECOND * 2);
    let (from, to, initiation) = caught(&world, 1, 1);
    (0..2).for_each(|node| world.forget_sessions(node));
    (0..101).for_each(|_| world.deliver_udp(from, to, initiation.clone()));
    world.forget_sessions(0);
    world.send(0, b"busy");
    world.run(Duration::from_millis(900));
    assert!(world.datagrams.iter().any(|it| it.0 == to && it.2[0] == 3 && it.2.len() == 64));
    assert_eq!(world.texts(1), ["busy"]);
}

#[test]
fn a_handshake_is_never_mistaken_for_that_of_the_session_in_use() {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    world.send(0, b"session");
    world.run(SECOND);
    let key = world.nodes[1].key.public();
    for attempt in 0..7 {
        // Each but the last is ended by a sign of life.
        world.lose = if attempt < 6 { |packet| packet[0] == 1 } else { |_| false };
        let now = world.now;
        world.nodes[0].engine.wireguard.renew(0, &key, now);
        world.nodes[0].engine.settle(now);
        world.run(Duration::from_millis(10));
        if attempt < 6 {
            world.send(1, b"alive");
        }
        world.run(SECOND);
    }
    assert!(world.status(0).last_handshake.is_some_and(|at| at > world.now - SECOND));
    world.nodes[0].received.clear();
    assert_eq!(transfer(&mut world, SECOND, SECOND / 10), 0);
}

#[test]
fn late_data_by_a_session_that_ends_does_not_hide_the_newer_one() {
    let mut world = direct();
    for _ in 0..57 {
        world.send(0, b"x");
        world.run(SECOND * 2);
    }
    world.lose = |packet| packet[0] == 4;
    world.send(0, b"late");
    world.run(Duration::from_millis(100));
    world.lose = |_| false;
    let (from, to, late) = caught(&world, 0, 4);
    for _ in 0..5 {
        world.run(SECOND * 2);
        world.send(0, b"x");
    }
    assert_eq!(world.status(0).handshakes_sent, 2);
    world.run(SECOND * 49);
    world.deliver_udp(from, to, late);
    assert_eq!(world.texts(1).last().unwrap(), "late");
    world.run(SECOND * 6);
    world.lose = |packet| matches!(packet[0], 1 | 2);
    assert!(world.status(0).established && !world.status(1).established);
    world.send(1, b"staged");
    world.run(SECOND);
    assert_eq!(world.texts(0), Vec::<String>::new());
    world.send(0, b"newer");
    world.run(SECOND);
    assert_eq!(world.texts(0), ["staged"]);
    assert!(world.status(1).established);
}

#[test]
fn a_peer_that_restarts_while_it_is_asked_gets_what_waits_for_it() {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    world.derp_works = false;
    world.send(0, b"waiting");
    world.run(SECOND);
    world.besides.insert(1, serde_json::json!({"DiscoKey": crate::key::DiscoPrivate::random().public().to_string()}));
    world.publish_to(0);
    world.derp_works = true;
    world.run(Duration::from_millis(400));
    assert_eq!(world.texts(1), ["waiting"]);
}

#[test]
fn a_replayed_initiation_is_no_sign_of_life() {
    let mut world = direct();
    let (from, to, initiation) = caught(&world, 0, 1);
    world.run(SECOND * 300);
    let heard = |world: &World| world.nodes[1].engine.wireguard.heard(0);
    let before = heard(&world);
    assert!(before.is_some() && !world.nodes[1].engine.wireguard.is_active(0));
    world.deliver_udp(from, to, initiation);
    assert!(world.nodes[1].engine.wireguard.is_active(0));
    assert_eq!(heard(&world), before);
    world.run(SECOND * 20);
    assert!(!world.nodes[1].engine.wireguard.is_active(0));
}

#[test]
fn initiations_whose_answers_are_lost_leave_the_session_in_use_alone() {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    world.send(0, b"session");
    world.run(SECOND);
    world.lose = |packet| packet[0] == 2;
    let now = world.now;
    world.nodes[0].engine.handle_wake(now);
    assert_eq!(transfer(&mut world, SECOND * 10, SECOND / 10), 0);
    assert!(world.status(0).handshakes_sent > 10 && world.status(1).handshakes_sent > 0);
    world.lose = |_| false;
    assert_eq!(transfer(&mut world, SECOND * 10, SECOND / 10), 0);
    assert!(world.status(0).last_handshake.is_some_and(|at| at > now));
}
