//! What an engine finds out about its own network.

use std::time::Duration;

use super::SECOND;
use super::world::{STUN_SERVER, World};
use crate::engine::{HttpsProbe, Output, Transport};
use crate::wire::tailcfg::map::EndpointType;

fn count(world: &World, what: impl Fn(&Output) -> bool) -> usize {
    world.nodes[0].outputs.iter().filter(|output| what(output)).count()
}

#[test]
fn the_region_that_answers_becomes_home_and_is_connected() {
    let mut world = World::new(Transport::Auto);
    let (underlay, now) = (world.nodes[0].underlay, world.now);
    world.nodes[0].engine.set_local_endpoints(vec![underlay].into(), now);
    world.publish();
    // The answer takes 20 ms, and the other region is waited for 500 ms longer.
    world.run(Duration::from_millis(519));
    assert_eq!(world.nodes[0].host.home, None);
    world.run(Duration::from_millis(1));
    let host = world.nodes[0].host.clone();
    assert_eq!((host.home, host.netinfo.preferred_derp), (Some(1), 1));
    assert_eq!(host.endpoints, [(world.nodes[0].underlay, EndpointType::Stun)]);
    assert_eq!(host.netinfo.working_udp, Some(true));
    assert_eq!(host.netinfo.derp_latency.get("1-v4"), Some(&0.02));
    assert!(world.nodes[0].outputs.contains(&Output::ConnectDerp { region: 1, home: true }));
    assert_eq!(world.nodes[0].engine.host_state(), &host);
}

#[test]
fn a_server_that_the_machine_knows_no_way_to_is_not_waited_for() {
    let mut world = World::new(Transport::Auto);
    world.publish();
    world.run(Duration::from_millis(1));
    let (refused, now) = ("198.51.100.2:3478".parse().unwrap(), world.now);
    assert!(world.datagrams.iter().any(|it| it.1 == refused));
    world.nodes[0].engine.handle_unreachable(refused, now);
    assert_eq!(world.nodes[0].engine.host_state().home, None, "nobody has answered yet");
    world.run(Duration::from_millis(19));
    assert_eq!(world.nodes[0].host.home, Some(1));
}

#[test]
fn a_silent_server_is_asked_three_times() {
    let mut world = World::new(Transport::Auto);
    world.stun_works = false;
    world.publish();
    world.run(Duration::from_millis(99));
    let to_first = |world: &World| {
        let from = world.nodes[0].underlay;
        world.datagrams.iter().filter(|it| it.0 == from && it.1 == STUN_SERVER.parse().unwrap()).count()
    };
    assert_eq!(to_first(&world), 1);
    world.run(SECOND * 10);
    assert_eq!(to_first(&world), 3);
}

#[test]
fn without_udp_the_regions_are_measured_by_https() {
    let mut world = World::new(Transport::Auto);
    world.stun_works = false;
    world.publish();
    world.run(Duration::from_millis(999));
    assert_eq!(count(&world, |output| matches!(output, Output::ProbeHttps(_))), 0);
    world.run(Duration::from_millis(1));
    assert_eq!(count(&world, |output| matches!(output, Output::ProbeHttps(_))), 2);
    let (now, probe) = (world.now, |region| HttpsProbe { region, round: 1 });
    world.nodes[0].engine.handle_https_latency(probe(1), Some(Duration::from_millis(80)), now);
    assert_eq!(world.nodes[0].engine.host_state().home, None);
    world.nodes[0].engine.handle_https_latency(probe(2), Some(Duration::from_millis(20)), now);
    assert_eq!(world.nodes[0].engine.host_state().home, Some(2));
    world.run(Duration::from_millis(1_999));
    assert_eq!(world.nodes[0].host.netinfo.working_udp, None, "an answer may come");
    world.run(Duration::from_millis(1));
    assert_eq!(world.nodes[0].host.netinfo.working_udp, Some(false));
}

#[test]
fn without_any_answer_a_region_is_chosen_by_our_key() {
    for transport in [Transport::Auto, Transport::Derp] {
        let mut world = World::new(transport);
        world.stun_works = false;
        world.publish();
        world.run(Duration::from_millis(4_999));
        assert_eq!(world.nodes[0].host.home, None);
        world.run(Duration::from_millis(1));
        assert!(world.nodes[0].host.home.is_some());
    }
}

#[test]
fn latencies_alone_are_not_told() {
    let mut world = World::started(Transport::Auto);
    let told = |world: &World| count(world, |output| matches!(output, Output::HostChanged(_)));
    let before = told(&world);
    world.udp_delay = Duration::from_millis(17);
    world.run(SECOND * 700);
    assert_eq!(told(&world), before);
    let latency = world.nodes[0].engine.host_state().netinfo.derp_latency["1-v4"];
    assert_eq!(latency, 0.034);
}

#[test]
fn the_nat_mapping_is_refreshed_only_while_peers_are_used() {
    let mut world = World::started(Transport::Auto);
    let asked = |world: &World| world.datagrams.iter().filter(|it| it.1 == STUN_SERVER.parse().unwrap()).count();
    let idle = asked(&world);
    world.run(SECOND * 100);
    assert_eq!(asked(&world), idle);
    for _ in 0..30 {
        world.send(0, b"still here");
        world.run(SECOND * 2);
    }
    let refreshed = asked(&world) - idle;
    assert!((4..=10).contains(&refreshed), "both nodes, every 20 to 26 s for 60 s: {refreshed}");
}

#[test]
fn names_of_stun_servers_are_resolved_by_the_driver() {
    let mut world = World::new(Transport::Auto);
    world.name_stun_servers();
    world.publish();
    world.run(Duration::from_millis(50));
    let asked = Output::ResolveStun { region: 1, host: "derp1.example".into(), port: 3478 };
    assert!(world.nodes[0].outputs.contains(&asked));
    let now = world.now;
    world.nodes[0].engine.handle_stun_address(1, vec![STUN_SERVER.parse().unwrap()], now);
    world.nodes[0].engine.handle_stun_address(2, vec![], now);
    world.run(Duration::from_millis(20));
    assert_eq!(world.nodes[0].host.home, Some(1));
}
