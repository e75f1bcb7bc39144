//! What is told of addresses, families and the NAT, and whom servers are asked by.

use super::*;

#[test]
fn another_address_of_our_own_is_no_word_on_udp() {
    let mut network = Network::settled(&[(1, 20), (2, 30)]);
    assert_eq!(network.netcheck.host().netinfo.working_udp, Some(true));
    network.told.clear();
    network.netcheck.set_local_endpoints(vec![addr(INSIDE), addr("10.0.0.2:5"), addr(INSIDE_V6)].into(), network.now);
    network.run(6_000);
    assert!(network.told.iter().all(|host| host.netinfo.working_udp == Some(true)), "{:?}", network.told);
    assert!(network.told.iter().all(|host| host.netinfo.working_ipv6 != Some(false)), "{:?}", network.told);
    assert_eq!(network.netcheck.host().netinfo.working_ipv6, Some(true));
}

#[test]
fn a_family_that_nobody_answers_does_not_work() {
    let mut network = Network::settled(&[(1, 20), (2, 30)]);
    network.v6_works = false;
    network.netcheck.set_local_endpoints(vec![addr(INSIDE), addr(INSIDE_V6)].into(), network.now);
    network.run(6_000);
    let netinfo = &network.netcheck.host().netinfo;
    assert_eq!((netinfo.working_udp, netinfo.working_ipv6), (Some(true), Some(false)));
}

#[test]
fn servers_with_a_name_are_found_in_a_network_of_another_family() {
    let mut network = Network::settled(&[(1, 20)]);
    network.set_map([(1, json!({"HostName": "derp1.example"}))].into());
    network.run(6_000);
    assert!(network.tells(OUTSIDE));
    network.move_to(INSIDE_V6);
    network.run(6_000);
    assert!(network.tells(OUTSIDE_V6));
}

#[test]
fn names_of_servers_are_looked_up_in_each_full_round() {
    let mut network = Network::settled(&[(1, 20)]);
    network.set_map([(1, json!({"HostName": "derp1.example"}))].into());
    network.run(299_000);
    assert_eq!(network.lookups, 1);
    network.run(300_000);
    assert_eq!(network.lookups, 2);
}

#[test]
fn what_the_nat_did_before_a_move_is_not_told_after_it() {
    let mut network = Network::settled(&[(1, 20), (2, 30)]);
    assert_eq!(network.netcheck.host().netinfo.mapping_varies_by_dest_ip, Some(false));
    network.stun.remove(&2);
    network.move_to("10.0.0.2:5");
    network.run(6_000);
    let netinfo = &network.netcheck.host().netinfo;
    assert_eq!((netinfo.working_udp, netinfo.mapping_varies_by_dest_ip), (Some(true), None));
}

#[test]
fn udp_that_is_slow_is_told_from_udp_that_is_blocked() {
    let regions = [(1, 1_300), (2, 1_350)];
    let [mut slow, mut blocked] = [(); 2].map(|()| Network::new(Transport::Auto, &regions));
    blocked.stun.clear();
    for network in [&mut slow, &mut blocked] {
        network.https = [(1, millis(30)), (2, millis(20))].into();
        network.run(1_250);
        assert_eq!((network.home(), network.netcheck.host().netinfo.working_udp), (Some(2), None));
        network.run(1_750);
    }
    assert!(slow.told.iter().all(|host| host.netinfo.working_udp != Some(false)), "{:?}", slow.told);
    assert_eq!((slow.netcheck.host().netinfo.working_udp, slow.tells(OUTSIDE)), (Some(true), true));
    assert_eq!((blocked.netcheck.host().netinfo.working_udp, blocked.tells(OUTSIDE)), (Some(false), false));
    for network in [&slow, &blocked] {
        assert_eq!(network.told.last(), Some(network.netcheck.host()));
    }
    assert!(blocked.netcheck.host().netinfo.derp_latency.is_empty(), "HTTPS is of no family");
}

#[test]
fn what_a_server_sees_that_answers_after_the_conclusion_is_told() {
    let mut network = Network::new(Transport::Auto, &[(1, 20), (2, 800)]);
    network.hard = true;
    network.run(600);
    assert_eq!((network.home(), network.tells("203.0.113.1:2")), (Some(1), false));
    network.run(300);
    assert!(network.tells("203.0.113.1:2"));
    assert_eq!(network.netcheck.host().netinfo.mapping_varies_by_dest_ip, Some(true));
    assert_eq!(network.told.last(), Some(network.netcheck.host()));
}

#[test]
fn an_answer_in_the_last_moment_of_a_round_is_concluded_from() {
    let mut network = Network::settled(&[(1, 20), (2, 20)]);
    network.stun = [(1, millis(2_800))].into();
    network.run(30_000);
    network.netcheck.doubt(network.now);
    assert!(!network.netcheck.freshen(network.now));
    network.run(3_100);
    network.netcheck.handle_timeout(network.now);
    assert!(network.netcheck.freshen(network.now));
}

#[test]
fn a_family_that_is_slow_is_told_from_one_that_is_blocked() {
    let mut network = Network::settled(&[(1, 20), (2, 1_300)]);
    network.v6_takes = millis(700);
    network.told.clear();
    network.netcheck.set_local_endpoints(vec![addr(INSIDE), addr(INSIDE_V6)].into(), network.now);
    network.run(6_000);
    assert!(network.told.iter().all(|host| host.netinfo.working_ipv6 != Some(false)), "{:?}", network.told);
    assert_eq!(network.netcheck.host().netinfo.working_ipv6, Some(true));
}

#[test]
fn control_is_told_the_latencies_before_while_they_are_measured_anew() {
    let mut network = Network::settled(&[(1, 20), (2, 30)]);
    network.told.clear();
    network.netcheck.set_local_endpoints(vec![addr(INSIDE), addr("10.0.0.2:5")].into(), network.now);
    network.run(6_000);
    network.move_to("10.0.0.3:5");
    network.run(6_000);
    let told: Vec<usize> = network.told.iter().map(|host| host.netinfo.derp_latency.len()).collect();
    assert!(!told.is_empty() && !told.contains(&0), "{told:?}");
    network.stun.remove(&2);
    network.run(300_000);
    assert_eq!(network.netcheck.host().netinfo.derp_latency.len(), 1);
    network.stun.clear();
    network.run(300_000);
    assert!(network.netcheck.host().netinfo.derp_latency.is_empty());
}

#[test]
fn a_name_that_fails_leads_where_it_led_before() {
    let mut network = Network::settled(&[(1, 20)]);
    network.set_map([(1, json!({"HostName": "derp1.example"}))].into());
    network.run(6_000);
    network.names_work = false;
    for _ in 0..3 {
        network.asked.clear();
        network.run(300_000);
        assert_eq!((network.asked.as_slice(), network.tells(OUTSIDE)), ([1].as_slice(), true));
    }
}

#[test]
fn names_that_are_found_late_have_nobody_else_asked_again() {
    let mut network = Network::settled(&[(1, 20), (2, 20), (3, 20)]);
    network.lookup_takes = millis(250);
    network.stun.remove(&2);
    network.asked.clear();
    let at = json!({"HostName": "derp2.example", "IPv4": "198.51.100.2"});
    let named = |id: RegionId| (id, json!({"HostName": format!("derp{id}.example")}));
    network.set_map([named(1), (2, at), named(3)].into());
    network.run(6_000);
    let asked = |id: RegionId| network.asked.iter().filter(|region| **region == id).count();
    assert_eq!([1, 2, 3].map(asked), [1, 3, 1]);
}
