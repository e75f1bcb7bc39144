//! Which region is home, and when another one is.

use super::*;

#[test]
fn a_region_that_was_near_before_a_move_is_measured_anew() {
    let mut network = Network::settled(&[(1, 5), (2, 50)]);
    assert_eq!(network.home(), Some(1));
    network.stun.insert(1, millis(200));
    network.move_to("10.0.0.2:5");
    network.run(1_000);
    assert_eq!(network.home(), Some(2));
}

#[test]
fn a_home_that_comes_back_while_another_is_searched_has_not_failed() {
    let mut network = Network::settled(&[(1, 20), (2, 90)]);
    network.relays.remove(&1);
    network.run(5_005);
    network.relays.insert(1);
    network.run(6_000);
    assert_eq!(network.home(), Some(1));
    network.stun.insert(1, millis(400));
    network.run(700_000);
    assert_eq!(network.home(), Some(2), "it is left when it is slow");
    network.stun.insert(1, millis(20));
    network.run(700_000);
    assert_eq!(network.home(), Some(1), "and taken when it is fast");
}

#[test]
fn the_home_does_not_move_to_a_region_that_is_silent_now() {
    let mut network = Network::settled(&[(1, 10), (2, 20), (3, 90)]);
    for region in [1, 2] {
        network.relays.remove(&region);
        network.stun.remove(&region);
    }
    network.run(5_000);
    assert_eq!(network.home(), Some(1));
    network.run(700);
    assert_eq!(network.home(), Some(3));
}

#[test]
fn a_new_home_that_does_not_admit_us_is_left_as_soon_as_the_old_one() {
    let mut network = Network::settled(&[(1, 10), (2, 20), (3, 90)]);
    network.relays = [3].into();
    network.run(5_500);
    assert_eq!(network.home(), Some(2));
    network.run(5_000);
    assert_eq!(network.home(), Some(3));
}

#[test]
fn where_no_relay_admits_us_the_home_moves_four_times_a_minute() {
    let mut network = Network::settled(&[(1, 10), (2, 20), (3, 90)]);
    network.relays.clear();
    network.run(30_000);
    network.told.clear();
    network.run(240_000);
    assert!((15..=17).contains(&network.told.len()), "{}", network.told.len());
}

#[test]
fn a_home_that_answers_after_the_conclusion_is_left_for_a_nearer_one() {
    let mut network = Network::settled(&[(1, 20), (2, 90)]);
    network.stun.insert(1, millis(700));
    network.move_to("10.0.0.2:5");
    network.run(690);
    assert_eq!(network.home(), Some(1));
    network.run(20);
    assert_eq!(network.home(), Some(2));
}

#[test]
fn without_udp_a_home_that_has_become_far_is_left() {
    let mut network = Network::new(Transport::Auto, &[(1, 20), (2, 20)]);
    network.stun.clear();
    network.https = [(1, millis(20)), (2, millis(30))].into();
    network.run(6_000);
    assert_eq!(network.home(), Some(1));
    network.https = [(1, millis(200)), (2, millis(10))].into();
    network.run(300_000);
    assert_eq!(network.home(), Some(2));
}

#[test]
fn by_relays_alone_the_regions_are_measured_anew_after_a_move() {
    let mut network = Network::new(Transport::Derp, &[(1, 20), (2, 20)]);
    network.https = [(1, millis(20)), (2, millis(90))].into();
    network.run(6_000);
    assert_eq!((network.home(), network.probed.len()), (Some(1), 2));
    network.https = [(1, millis(300)), (2, millis(20))].into();
    network.move_to("10.0.0.2:5");
    network.run(2_000);
    assert_eq!((network.home(), network.probed.len()), (Some(2), 4));
    assert!(network.netcheck.host().endpoints.is_empty());
}

#[test]
fn where_all_have_failed_each_is_tried_in_turn() {
    let mut network = Network::settled(&[(1, 10), (2, 20), (3, 90)]);
    network.relays.clear();
    network.run(100_000);
    network.relays = [3].into();
    network.run(45_000);
    assert_eq!(network.home(), Some(3));
}

#[test]
fn a_home_that_was_out_of_reach_is_dialled_first_after_a_move() {
    for gap in [2_000, 5_100, 8_000, 30_000] {
        let mut network = Network::settled(&[(1, 20), (2, 90)]);
        let (stun, relays) = (std::mem::take(&mut network.stun), std::mem::take(&mut network.relays));
        network.run(gap);
        (network.stun, network.relays) = (stun, relays);
        network.told.clear();
        network.move_to("10.0.0.2:5");
        network.run(10_000);
        assert_eq!(network.home(), Some(1));
        assert!(network.told.iter().all(|host| host.home == Some(1)), "{gap} ms: {:?}", network.told);
    }
}

#[test]
fn a_home_that_is_away_is_searched_after_a_move_too() {
    let mut network = Network::settled(&[(1, 20), (2, 90)]);
    network.relays.remove(&1);
    network.run(4_900);
    network.move_to("10.0.0.2:5");
    network.run(4_900);
    assert_eq!(network.home(), Some(1));
    network.run(200);
    assert_eq!(network.home(), Some(2));
}

#[test]
fn an_https_probe_that_fails_late_is_no_word_on_the_network_that_we_are_in_now() {
    let mut network = Network::new(Transport::Derp, &[(1, 20), (2, 20)]);
    network.run(2_900);
    network.https = [(1, millis(100)), (2, millis(50))].into();
    network.netcheck.handle_move(vec![addr("10.0.0.2:5")].into(), network.now);
    network.run(390);
    assert_eq!(network.home(), None);
    network.run(20);
    assert_eq!(network.home(), Some(2));
}

#[test]
fn a_region_that_refuses_is_not_home_until_it_admits_us() {
    let mut network = Network::settled(&[(1, 20), (2, 90)]);
    network.relays.remove(&1);
    network.run(6_000);
    network.told.clear();
    network.run(7_200_000);
    assert_eq!((network.home(), network.told.len()), (Some(2), 0), "{:?}", network.told);
    network.relays.insert(1);
    network.run(700_000);
    assert_eq!(network.home(), Some(1));
}

#[test]
fn a_region_that_failed_is_another_in_a_map_that_changes_it() {
    let mut network = Network::settled(&[(1, 20), (2, 90)]);
    network.relays.remove(&1);
    network.run(6_000);
    network.relays.insert(1);
    let node = |id: RegionId, host: &str| (id, json!({"HostName": host, "IPv4": format!("198.51.100.{id}")}));
    network.set_map([node(1, "new.example"), node(2, "derp2.example")].into());
    network.run(1_000);
    assert_eq!(network.home(), Some(1));
}

#[test]
fn the_only_home_is_not_looked_for_elsewhere() {
    let mut network = Network::settled(&[(1, 20)]);
    network.relays.clear();
    network.asked.clear();
    network.run(299_000);
    assert_eq!((network.home(), network.asked.len()), (Some(1), 1), "in a full round");
}

#[test]
fn a_home_that_was_left_because_it_hung_is_not_taken_back_for_its_answer() {
    let mut network = Network::settled(&[(1, 20), (2, 90)]);
    network.relays.remove(&1);
    network.run(6_000);
    assert_eq!(network.home(), Some(2));
    network.netcheck.note_answer(1);
    network.run(700_000);
    assert_eq!(network.home(), Some(2));
}
