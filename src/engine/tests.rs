//! Two engines and what lies between them.

mod life;
mod link;
mod netcheck;
mod paths;
mod rivals;
mod world;

use std::time::Duration;

use proptest::prelude::*;

use self::world::{World, udp_packet};
use super::{Engine, Flow, NoRoute, Output, PathStatus, Transport};
use crate::key::{DiscoPrivate, NodePrivate, NodePublic};
use crate::wire::{ip, tsmp};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_handshake_and_packets_pass_by_derp() {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    world.send(0, b"one");
    world.run(SECOND);
    world.send(1, b"two");
    world.run(SECOND);
    assert_eq!((world.texts(1), world.texts(0)), (vec!["one".into()], vec!["two".into()]));
    assert_eq!((world.nodes[0].sent.0, world.nodes[1].sent.0), (0, 0), "nothing goes by UDP");
    let status = world.status(0);
    assert_eq!((status.handshakes_sent, status.established), (1, true));
    assert!(status.last_handshake.is_some());
    assert!(matches!(status.path, PathStatus::Derp { .. }));
}

#[test]
fn staged_packets_leave_in_order_when_the_session_is_there() {
    let mut world = World::started(Transport::Auto);
    world.open_flows();
    let texts: Vec<String> = (0..70).map(|index| format!("packet {index}")).collect();
    for text in &texts {
        world.send(0, text.as_bytes());
    }
    world.run(SECOND);
    assert_eq!(world.texts(1), texts[6..], "the oldest six of seventy found no room");
    assert_eq!(world.nodes[0].engine.stats().dropped_staged, 6);
}

#[test]
fn staged_packets_leave_when_the_peers_handshake_wins() {
    let mut world = World::started(Transport::Auto);
    world.open_flows();
    world.send(0, b"from zero");
    world.send(1, b"from one");
    world.run(SECOND);
    assert_eq!((world.texts(1), world.texts(0)), (vec!["from zero".into()], vec!["from one".into()]));
}

#[test]
fn an_unanswered_initiation_is_repeated_each_quarter_second_and_then_ever_later() {
    let mut world = World::started(Transport::Derp);
    world.derp_works = false;
    world.send(0, b"lost");
    let mut pauses = Vec::new();
    let (mut at, mut before) = (world.now, 1);
    while before < 45 {
        world.run(Duration::from_millis(10));
        let sent = world.status(0).handshakes_sent;
        if sent > before {
            pauses.push((world.now - at).as_millis() as u64);
            (at, before) = (world.now, sent);
        }
    }
    let eager = pauses.iter().take_while(|pause| **pause <= 250).count();
    assert!((19..=26).contains(&eager), "for five seconds: {pauses:?}");
    assert!(pauses[..eager].iter().all(|pause| *pause >= 190), "{pauses:?}");
    let later = &pauses[eager..];
    assert!(later.len() >= 15 && later.iter().all(|pause| (390..=4_000).contains(pause)), "{pauses:?}");
    assert!(later[3..].iter().all(|pause| *pause >= 3_190), "{pauses:?}");
}

#[test]
fn a_slow_path_gets_its_packet_through_although_initiations_overlap() {
    let mut world = World::started(Transport::Derp);
    world.derp_delay = Duration::from_millis(400);
    world.open_flows();
    world.send(0, b"patience");
    world.run(SECOND * 4);
    assert_eq!(world.texts(1), ["patience"]);
}

#[test]
fn what_was_staged_too_long_is_not_sent() {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    world.derp_works = false;
    world.send(0, b"old");
    world.run(SECOND * 6);
    world.derp_works = true;
    world.send(0, b"new");
    world.run(SECOND * 5);
    assert_eq!(world.texts(1), ["new"]);
}

#[test]
fn an_address_that_nobody_serves_has_no_route() {
    let mut world = World::started(Transport::Auto);
    let flow = Flow { remote: "100.64.0.9:1".parse().unwrap(), ..world.flow(0) };
    let now = world.now;
    assert_eq!(world.nodes[0].engine.handle_outbound(&udp_packet(flow, b"x"), now), Err(NoRoute));
    assert_eq!(world.nodes[0].engine.handle_outbound(&[], now), Err(NoRoute));
}

#[test]
fn unsolicited_packets_are_dropped_and_counted() {
    let mut world = World::started(Transport::Auto);
    world.send(0, b"knock");
    world.run(SECOND);
    assert!(world.texts(1).is_empty());
    assert_eq!(world.nodes[1].engine.stats().dropped_unsolicited, 1);
    world.open_flows();
    world.send(0, b"welcome");
    world.run(SECOND);
    assert_eq!(world.texts(1), ["welcome"]);
    let flow = world.flow(1);
    world.nodes[1].engine.close_flow(&flow);
    world.send(0, b"late");
    world.run(SECOND);
    assert_eq!(world.texts(1), ["welcome"]);
}

#[test]
fn a_spoofed_inner_source_is_dropped() {
    let mut world = World::started(Transport::Auto);
    world.open_flows();
    let honest = world.flow(0);
    let spoofed = Flow { local: "100.64.0.77:4000".parse().unwrap(), ..honest };
    let answering = Flow { remote: spoofed.local, ..world.flow(1) };
    world.nodes[1].engine.open_flow(answering);
    let now = world.now;
    world.nodes[0].engine.handle_outbound(&udp_packet(spoofed, b"not me"), now).unwrap();
    world.run(SECOND);
    assert!(world.texts(1).is_empty());
    assert_eq!(world.nodes[1].engine.stats().dropped_spoofed_source, 1);
}

#[test]
fn packets_for_another_node_and_fragments_are_dropped() {
    let mut world = World::started(Transport::Auto);
    world.open_flows();
    let mut fragment = udp_packet(world.flow(0), b"piece");
    fragment[6] = 0x20;
    let now = world.now;
    world.nodes[0].engine.handle_outbound(&fragment, now).unwrap();
    world.run(SECOND);
    assert!(world.texts(1).is_empty());
    assert_eq!(world.nodes[1].engine.stats().dropped_fragment, 1);
}

#[test]
fn icmp_errors_pass_when_they_quote_our_packet() {
    let mut world = World::started(Transport::Auto);
    let (ours, theirs) = (world.flow(1), world.flow(0));
    let error = |quoted: &[u8]| {
        let message = [&[3, 3, 0, 0, 0, 0, 0, 0], &quoted[..28]].concat();
        ip::build(ip::protocol::ICMP, theirs.local.ip(), theirs.remote.ip(), &message).unwrap()
    };
    let ours_quoted = error(&udp_packet(ours, b"question"));
    let other_quoted = error(&udp_packet(Flow { local: "100.64.0.2:9".parse().unwrap(), ..ours }, b"question"));
    world.nodes[1].engine.open_flow(ours);
    let now = world.now;
    for packet in [&ours_quoted, &other_quoted] {
        world.nodes[0].engine.handle_outbound(packet, now).unwrap();
    }
    world.run(SECOND);
    assert_eq!(world.nodes[1].received, [ours_quoted]);
    assert_eq!(world.nodes[1].engine.stats().dropped_unsolicited, 1);
}

/// Sends a TSMP message from node 0 to node 1.
fn send_tsmp(world: &mut World, message: tsmp::Message) {
    let (from, to) = (world.nodes[0].overlay, world.nodes[1].overlay);
    let packet = ip::build(ip::protocol::TSMP, from, to, &message.encode()).unwrap();
    let now = world.now;
    world.nodes[0].engine.handle_outbound(&packet, now).unwrap();
    world.run(SECOND);
}

#[test]
fn a_rejection_names_the_flow_that_it_ends() {
    let mut world = World::started(Transport::Auto);
    let flow = Flow { protocol: super::Protocol::Tcp, ..world.flow(1) };
    let reject = |maybe_broken| tsmp::Message::Reject {
        protocol: 6,
        reason: tsmp::Reason::Acl,
        source_port: flow.local.port(),
        destination_port: flow.remote.port(),
        maybe_broken,
    };
    send_tsmp(&mut world, reject(false));
    world.nodes[1].engine.open_flow(flow);
    send_tsmp(&mut world, reject(true));
    let rejected = Output::Rejected { flow, reason: tsmp::Reason::Acl };
    assert!(!world.nodes[1].outputs.contains(&rejected));
    send_tsmp(&mut world, reject(false));
    assert!(world.nodes[1].outputs.contains(&rejected));
    assert_eq!(world.nodes[1].engine.stats().tsmp, 3);
}

#[test]
fn a_tsmp_ping_is_answered() {
    let mut world = World::started(Transport::Auto);
    send_tsmp(&mut world, tsmp::Message::Ping(*b"12345678"));
    assert_eq!(world.nodes[0].engine.stats().tsmp, 1, "the pong came back");
}

#[test]
fn a_peer_with_another_key_is_another_peer() {
    let mut world = World::started(Transport::Derp);
    world.open_flows();
    world.send(0, b"before");
    world.run(SECOND);
    let old = world.nodes[1].key.public();
    let mut fresh = World::new(Transport::Derp);
    let mut replacement = fresh.nodes.remove(1);
    replacement.regions = world.nodes[1].regions.clone();
    replacement.host = world.nodes[1].host.clone();
    world.nodes[1] = replacement;
    world.publish();
    world.run(SECOND * 6);
    world.open_flows();
    assert_eq!(world.nodes[0].engine.peer_status(&old, world.now), None);
    world.send(0, b"after");
    world.run(SECOND);
    assert_eq!(world.texts(1), ["after"]);
}

#[test]
fn a_peer_that_restarted_gets_a_new_handshake_at_once() {
    let mut world = World::started(Transport::Auto);
    world.open_flows();
    world.send(0, b"before");
    world.run(SECOND * 2);
    let mut restarted = World::new(Transport::Auto).nodes.remove(1);
    let config = super::Config {
        node_key: world.nodes[1].key.clone(),
        disco_key: restarted.disco.clone(),
        seed: [9; 32],
        transport: Transport::Auto,
    };
    restarted.engine = Engine::new(config, world.now);
    restarted.key = world.nodes[1].key.clone();
    restarted.regions = world.nodes[1].regions.clone();
    restarted.host = world.nodes[1].host.clone();
    world.nodes[1] = restarted;
    world.publish();
    world.open_flows();
    world.run(SECOND);
    assert_eq!(world.status(0).handshakes_sent, 2);
    world.send(0, b"after");
    world.run(SECOND);
    assert_eq!(world.texts(1), ["after"]);
}

#[test]
fn a_second_copy_of_a_packet_is_dropped() {
    let mut world = World::started(Transport::Auto);
    world.open_flows();
    world.send(0, b"first");
    world.run(SECOND * 2);
    assert!(world.is_direct(0));
    world.datagrams.clear();
    world.send(0, b"once");
    world.run(SECOND);
    let (from, to, datagram) = world.datagrams.iter().find(|(_, _, it)| it[0] == 4).cloned().unwrap();
    world.deliver_udp(from, to, datagram);
    assert_eq!(world.texts(1), ["first", "once"]);
    assert_eq!(world.nodes[1].engine.stats().dropped_duplicate, 1);
}

fn engine() -> Engine {
    let config = super::Config {
        node_key: NodePrivate::random(),
        disco_key: DiscoPrivate::random(),
        seed: [1; 32],
        transport: Transport::Auto,
    };
    Engine::new(config, std::time::Instant::now())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_are_taken_without_panic(
        packets in prop::collection::vec((0u8..8, prop::collection::vec(any::<u8>(), 0..1500)), 1..20)
    ) {
        let mut world = World::started(Transport::Auto);
        let mut lonely = engine();
        let (now, sender) = (world.now, world.nodes[1].key.public());
        for (kind, mut bytes) in packets {
            // Most random bytes would be nothing at all: make some look like what they are not.
            match (kind, bytes.len()) {
                (kind @ 1..=4, 4..) => bytes[..4].copy_from_slice(&[kind, 0, 0, 0]),
                (5, 38..) => {
                    bytes[..6].copy_from_slice(&crate::wire::disco::MAGIC);
                    bytes[6..38].copy_from_slice(world.nodes[1].disco.public().as_bytes());
                }
                (6, 8..) => bytes[..8].copy_from_slice(&[1, 1, 0, 8, 0x21, 0x12, 0xa4, 0x42]),
                _ => {}
            }
            if (1..=3).contains(&kind) {
                bytes.resize([148, 92, 64][usize::from(kind) - 1], 0);
            }
            let from = world.nodes[1].underlay;
            for engine in [&mut world.nodes[0].engine, &mut lonely] {
                prop_assert!(engine.handle_udp(from, &mut bytes.clone(), now).is_none());
                prop_assert!(engine.handle_derp(1, sender, &mut bytes.clone(), now).is_none());
                prop_assert!(engine.handle_derp(1, NodePublic::default(), &mut bytes.clone(), now).is_none());
                let _ = engine.handle_outbound(&bytes, now);
            }
        }
    }
}
