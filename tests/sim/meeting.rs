//! How soon two nodes meet: a peer that hears of us late, and two that begin at the same time.

use std::time::Duration;

use proptest::prelude::*;

use crate::nat::Kind;
use crate::world::World;

/// A peer gets the first byte at most so long after it knows our key, for as long as we are eager.
const MET: Duration = Duration::from_millis(300);

fn first_byte(world: &mut World, to: usize, limit: Duration) -> Option<Duration> {
    let start = world.now;
    let before = world.nodes[to].received.len();
    while world.nodes[to].received.len() == before {
        if world.now - start >= limit {
            return None;
        }
        world.run(Duration::from_millis(1));
    }
    Some(world.now - start)
}

/// Node 0 knows node 1, and node 1 knows nobody.
fn one_sided(kinds: [Kind; 2], seed: u8) -> World {
    let mut world = World::new(kinds, false, seed);
    world.control_works = false;
    world.start();
    world.open_flows();
    world.run(Duration::from_secs(3));
    world.control_works = true;
    world.tell_now(0);
    world
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_peer_that_hears_of_us_late_is_met_at_once(late in 1u64..4_700, seed in any::<u8>()) {
        let mut world = one_sided([Kind::Easy, Kind::Easy], seed);
        world.send(0);
        world.run(Duration::from_millis(late));
        prop_assert!(world.nodes[1].received.is_empty());
        world.tell_now(1);
        // Three ways by DERP: initiation, response, packet.
        let took = first_byte(&mut world, 1, Duration::from_secs(5));
        prop_assert!(took.is_some_and(|took| took <= MET + Duration::from_millis(90)), "{:?}", took);
    }

    #[test]
    fn two_that_begin_at_the_same_time_meet_at_once(apart in 0u64..60, seed in any::<u8>()) {
        let mut world = World::new([Kind::Easy, Kind::Easy], false, seed);
        world.start();
        world.open_flows();
        world.run(Duration::from_secs(3));
        let numbers = [world.send(0), { world.run(Duration::from_millis(apart)); world.send(1) }];
        world.run(Duration::from_millis(200));
        for (node, number) in numbers.into_iter().enumerate() {
            prop_assert!(world.nodes[1 - node].received.contains(&number.unwrap()), "from node {}", node);
        }
    }
}
