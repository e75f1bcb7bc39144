//! How long a conversation is interrupted by what happens to its network.

use std::time::Duration;

use proptest::prelude::*;
use tailcar::engine::PathStatus;

use crate::nat::Kind;
use crate::world::World;

const SECOND: Duration = Duration::from_secs(1);

/// Two that have been talking for a while.
fn talking(kinds: [Kind; 2], seed: u8) -> World {
    let mut world = World::new(kinds, false, seed);
    world.start();
    world.open_flows();
    world.run(SECOND * 3);
    world.talk(SECOND * 10, Duration::from_millis(100));
    world
}

/// From now until both have got a packet that was sent from now on: they send each 50 ms.
fn interruption(world: &mut World) -> Duration {
    let start = world.now;
    let mut sent = [Vec::new(), Vec::new()];
    loop {
        for (node, numbers) in sent.iter_mut().enumerate() {
            numbers.extend(world.send(node));
        }
        world.run(Duration::from_millis(50));
        let got = |node: usize| sent[1 - node].iter().any(|number| world.nodes[node].received.contains(number));
        if (got(0) && got(1)) || world.now - start > SECOND * 60 {
            return world.now - start;
        }
    }
}

fn natted() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Easy), Just(Kind::Hard), Just(Kind::Open)]
}

fn any_kind() -> impl Strategy<Value = Kind> {
    prop_oneof![natted(), Just(Kind::Blocked)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_peer_that_restarts_is_found_in_a_second(
        kinds in [any_kind(), any_kind()], seed in any::<u8>(), node in 0..2usize
    ) {
        let mut world = talking(kinds, seed);
        world.restart_node(node);
        let took = interruption(&mut world);
        prop_assert!(took <= Duration::from_millis(1_500), "{:?}", took);
    }

    #[test]
    fn a_node_in_another_network_goes_on_as_soon_as_its_relay_is_back(
        kinds in [any_kind(), any_kind()], seed in any::<u8>(), node in 0..2usize
    ) {
        let mut world = talking(kinds, seed);
        world.move_node(node);
        let took = interruption(&mut world);
        // The relay takes half a second, and so does a look at the new network, of which the other end is told.
        prop_assert!(took <= Duration::from_millis(2_500), "{:?}", took);
    }

    #[test]
    fn a_router_that_forgets_its_mappings_is_noticed_in_a_second(
        kinds in [natted(), natted()], seed in any::<u8>(), node in 0..2usize
    ) {
        let mut world = talking(kinds, seed);
        world.restart_router(node);
        let took = interruption(&mut world);
        prop_assert!(took <= Duration::from_millis(1_500), "{:?}", took);
    }

    #[test]
    fn a_region_that_goes_costs_the_search_for_another(
        other in any_kind(), seed in any::<u8>(), node in 0..2usize
    ) {
        let kinds = if node == 0 { [Kind::Blocked, other] } else { [other, Kind::Blocked] };
        let mut world = talking(kinds, seed);
        let PathStatus::Derp { region } = world.path(0) else { panic!("UDP is blocked") };
        world.set_region(region, false);
        let took = interruption(&mut world);
        prop_assert!(took <= Duration::from_secs(12), "{:?}", took);
    }

    /// It is nobody's home then, so only a try can show that it admits us.
    #[test]
    fn a_near_region_that_was_gone_for_minutes_becomes_home_again(seed in any::<u8>()) {
        let mut world = talking([Kind::Easy, Kind::Easy], seed);
        world.apart = 40;
        world.set_region(1, false);
        world.run(SECOND * 300);
        prop_assert_eq!(world.nodes[0].engine.host_state().home, Some(2));
        world.set_region(1, true);
        world.run(SECOND * 605);
        prop_assert_eq!(world.nodes[0].engine.host_state().home, Some(1));
    }

    #[test]
    fn a_path_that_works_stays_whatever_becomes_of_the_regions(seed in any::<u8>()) {
        let mut world = talking([Kind::Easy, Kind::Easy], seed);
        (1..=2).for_each(|region| world.set_region(region, false));
        let lost = world.talk(SECOND * 100, Duration::from_millis(200));
        prop_assert!(lost.is_empty(), "{:?}", lost);
    }
}
