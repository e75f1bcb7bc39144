//! Any pair of networks, whatever happens to them: in the end the path is the one that the model names, and stays.
//!
//! The model is a table of pairs. Everything else is a law: what is sent arrives once the underlay is calm, the path
//! does not change any more, an idle pair sends nothing, nothing is sent where nobody offered to be (the world sees to
//! that).

use std::time::Duration;

use proptest::prelude::*;
use tailcar::engine::PathStatus;

use crate::nat::Kind;
use crate::weather::Weather;
use crate::world::World;

const SECOND: Duration = Duration::from_secs(1);

/// After the last disturbance the path is what the model says within this time: a router that got another address and
/// tells nobody is noticed within 6.5 s, and where it is now by the next look at STUN servers, after up to 26 s; the
/// next search for a path comes 5 s after the last.
const SETTLED: Duration = Duration::from_secs(40);

/// What happens to the world.
#[derive(Debug, Clone, Copy)]
enum Event {
    /// A node is in another network.
    Move(usize),
    /// A node's router forgets its mappings, and has another address.
    RestartRouter(usize),
    /// A node's process starts anew.
    RestartNode(usize),
    /// A region stops or starts.
    Region(u32, bool),
    /// A node hears from control again.
    Tell(usize),
    /// Nothing is sent for so many seconds.
    Quiet(u64),
}

/// A network and its story.
#[derive(Debug, Clone)]
struct Story {
    kinds: [Kind; 2],
    together: bool,
    seed: u8,
    weather: Weather,
    /// What happens, and for how many tenths of a second both talk then.
    events: Vec<(Event, u64)>,
}

/// How a pair ends, by the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Direct,
    Relayed,
}

fn expected(story: &Story) -> Expected {
    use Kind::{Blocked, Easy, Hard, Open};
    if story.together {
        // A local network carries UDP whatever its router does.
        return Expected::Direct;
    }
    match story.kinds {
        [Blocked, _] | [_, Blocked] => Expected::Relayed,
        [Open, _] | [_, Open] => Expected::Direct,
        [Easy, Easy] => Expected::Direct,
        [Hard, _] | [_, Hard] => Expected::Relayed,
    }
}

fn matches(path: PathStatus, expected: Expected) -> bool {
    match expected {
        Expected::Direct => matches!(path, PathStatus::Direct { .. }),
        Expected::Relayed => matches!(path, PathStatus::Derp { .. }),
    }
}

/// Lets the story happen and checks the laws.
fn tell(story: &Story) -> Result<(), TestCaseError> {
    let mut world = World::new(story.kinds, story.together, story.seed);
    world.start();
    world.open_flows();
    world.run(SECOND * 3);
    world.weather = story.weather;
    for (event, tenths) in &story.events {
        happen(&mut world, *event);
        world.talk(Duration::from_millis(tenths * 100), Duration::from_millis(200));
    }
    world.weather = Weather::CALM;
    (1..=2).for_each(|region| world.set_region(region, true));
    // What was sent into a path that is gone may be lost; after that, nothing is.
    world.talk(SETTLED, Duration::from_millis(200));
    for node in 0..2 {
        let path = world.path(node);
        prop_assert!(matches(path, expected(story)), "node {}: {:?}, {:?}", node, path, world.nodes[node].paths);
        world.nodes[node].paths.clear();
    }
    let lost = world.talk(SECOND * 30, Duration::from_millis(250));
    prop_assert!(lost.is_empty(), "lost of {:?}", lost);
    for node in 0..2 {
        let paths = &world.nodes[node].paths;
        prop_assert!(paths.len() <= 2, "node {} flaps: {:?}", node, paths);
        prop_assert!(matches(world.path(node), expected(story)));
        let endpoints = world.nodes[node].host.endpoints.len();
        prop_assert!(endpoints <= 16, "{}", endpoints);
    }
    idle(&mut world)
}

/// Whoever has nothing to send sends nothing, and has nothing to do.
fn idle(world: &mut World) -> Result<(), TestCaseError> {
    world.run(SECOND * 60);
    let before: Vec<_> = world.nodes.iter().map(|node| node.sent).collect();
    world.run(SECOND * 60);
    for (node, before) in world.nodes.iter().zip(before) {
        let (udp, derp) = (node.sent.udp - before.udp, node.sent.derp - before.derp);
        prop_assert_eq!((udp, derp), (0, 0), "node {} sends although nobody asked it to", node.index);
        prop_assert!(node.sent.stun - before.stun <= 16);
    }
    // Sessions have ended, a region that is not home is closed: what is left is the next look at the network.
    world.run(SECOND * 80);
    let mut wakes = 0;
    for _ in 0..600 {
        let at = |node: &crate::node::Node| node.engine.next_deadline().map(|(at, _)| at);
        let before: Vec<_> = world.nodes.iter().map(at).collect();
        world.run(SECOND);
        wakes += world.nodes.iter().zip(before).filter(|(node, before)| at(node) != *before).count();
    }
    prop_assert!(wakes <= 2 * 2 * 12, "{} seconds of two idle nodes' ten minutes had something to do", wakes);
    Ok(())
}

fn happen(world: &mut World, event: Event) {
    match event {
        Event::Move(node) => world.move_node(node),
        Event::RestartRouter(node) => world.restart_router(node),
        Event::RestartNode(node) => world.restart_node(node),
        Event::Region(region, up) => world.set_region(region, up),
        Event::Tell(node) => world.tell(node),
        Event::Quiet(seconds) => world.run(SECOND * seconds as u32),
    }
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (0..2usize).prop_map(Event::Move),
        (0..2usize).prop_map(Event::RestartRouter),
        (0..2usize).prop_map(Event::RestartNode),
        (1..=2u32, any::<bool>()).prop_map(|(region, up)| Event::Region(region, up)),
        (0..2usize).prop_map(Event::Tell),
        prop_oneof![Just(5u64), Just(40), Just(70), Just(200)].prop_map(Event::Quiet),
    ]
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Open), Just(Kind::Easy), Just(Kind::Hard), Just(Kind::Blocked)]
}

fn weather() -> impl Strategy<Value = Weather> {
    let delay = (1u64..150, 0u64..80).prop_map(|(least, spread)| (least, least + spread));
    (0u32..20, 0u32..20, 0u32..20, delay).prop_map(|(lost, doubled, forged, delay)| Weather {
        lost,
        doubled,
        forged,
        delay,
    })
}

prop_compose! {
    fn story()(
        kinds in [kind(), kind()], together in prop::bool::weighted(0.15), seed in any::<u8>(), weather in weather(),
        events in prop::collection::vec((event(), 1u64..100), 0..8)
    ) -> Story {
        Story { kinds, together, seed, weather, events }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn every_pair_ends_as_the_model_says_and_stays_so(story in story()) {
        tell(&story)?;
    }
}

/// Each end answered by the region that the other had used last, so both changed regions with every packet.
#[test]
fn two_that_are_heard_by_different_regions_do_not_swap_them_for_ever() {
    let weather = Weather { lost: 10, doubled: 0, forged: 0, delay: (1, 3) };
    let events = vec![(Event::Region(1, true), 51), (Event::RestartNode(0), 3), (Event::Move(0), 1)];
    tell(&Story { kinds: [Kind::Open, Kind::Blocked], together: false, seed: 90, weather, events }).unwrap();
}

/// Nobody knows the router's new address before the next look at STUN servers.
#[test]
fn a_router_that_restarts_twice_is_found_again() {
    let weather = Weather { lost: 0, doubled: 0, forged: 0, delay: (1, 1) };
    let restart = Event::RestartRouter(0);
    let events = vec![(Event::RestartNode(0), 15), (Event::Move(0), 97), (restart, 85), (restart, 1)];
    tell(&Story { kinds: [Kind::Easy, Kind::Easy], together: false, seed: 45, weather, events }).unwrap();
}

#[test]
fn every_pair_of_kinds_ends_as_the_model_says_without_any_event() {
    for a in [Kind::Open, Kind::Easy, Kind::Hard, Kind::Blocked] {
        for b in [Kind::Open, Kind::Easy, Kind::Hard, Kind::Blocked] {
            let story = Story { kinds: [a, b], together: false, seed: 1, weather: Weather::CALM, events: Vec::new() };
            tell(&story).unwrap();
        }
    }
}
