//! What is concluded of networks with several regions, in virtual time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{HostState, Netcheck};
use crate::engine::{Output, Transport};
use crate::key::NodePrivate;
use crate::netmap::RegionId;
use crate::wire::stun;
use crate::wire::tailcfg::derp::{DerpMap, DerpMapUpdate};
use crate::wire::tailcfg::map::EndpointType;

const INSIDE: &str = "192.168.1.2:5";
const INSIDE_V6: &str = "[2001:db8::2]:5";
const OUTSIDE: &str = "203.0.113.1:1";
const OUTSIDE_V6: &str = "[2001:db8::2]:1";

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Something on its way to us.
enum Answer {
    Stun(stun::TransactionId, SocketAddr),
    Https(RegionId, Option<Duration>),
    Address(RegionId, Vec<SocketAddr>),
}

/// One of us, and the regions around.
struct Network {
    netcheck: Netcheck,
    now: Instant,
    /// How long the STUN servers of a region take; who is not here is silent.
    stun: BTreeMap<RegionId, Duration>,
    /// The same by HTTPS; who is not here fails after three seconds.
    https: BTreeMap<RegionId, Duration>,
    /// The relays that admit us.
    relays: BTreeSet<RegionId>,
    /// The one that has admitted us to our home.
    admitted: Option<RegionId>,
    /// Whether the NAT gives us another port for each server.
    hard: bool,
    /// Whether IPv6 leads anywhere.
    v6_works: bool,
    in_flight: Vec<(Instant, Answer)>,
    told: Vec<HostState>,
    /// Who was asked by HTTPS.
    probed: Vec<RegionId>,
    /// How often a name was looked up.
    lookups: usize,
}

impl Network {
    /// Regions with literal addresses, each as far away as said, whose relays admit us.
    fn new(transport: Transport, regions: &[(RegionId, u64)]) -> Self {
        let node = |id: RegionId| {
            let (v4, v6) = (format!("198.51.100.{id}"), format!("2001:db8:ff::{id}"));
            json!({"HostName": format!("derp{id}.example"), "IPv4": v4, "IPv6": v6})
        };
        let mut network = Self {
            netcheck: Netcheck::new(transport, NodePrivate::random().public(), [7; 32]),
            now: Instant::now(),
            stun: regions.iter().map(|(id, latency)| (*id, millis(*latency))).collect(),
            https: BTreeMap::new(),
            relays: regions.iter().map(|(id, _)| *id).collect(),
            admitted: None,
            hard: false,
            v6_works: true,
            in_flight: Vec::new(),
            told: Vec::new(),
            probed: Vec::new(),
            lookups: 0,
        };
        network.netcheck.set_local_endpoints(vec![addr(INSIDE)].into(), network.now);
        network.set_map(regions.iter().map(|(id, _)| (*id, node(*id))).collect());
        network
    }

    /// The same, some time after start.
    fn settled(regions: &[(RegionId, u64)]) -> Self {
        let mut network = Self::new(Transport::Auto, regions);
        network.run(6_000);
        network
    }

    fn set_map(&mut self, nodes: BTreeMap<RegionId, Value>) {
        let region = |(id, node): (RegionId, Value)| (id.to_string(), json!({"RegionID": id, "Nodes": [node]}));
        let regions: BTreeMap<String, Value> = nodes.into_iter().map(region).collect();
        let update: DerpMapUpdate = serde_json::from_value(json!({ "Regions": regions })).unwrap();
        self.netcheck.set_map(&Arc::new(DerpMap::default().merged(update)), self.now);
    }

    fn run(&mut self, time: u64) {
        let end = self.now + millis(time);
        loop {
            self.drain();
            let arrivals = self.in_flight.iter().map(|(at, _)| *at);
            let next = arrivals.chain(self.netcheck.next_deadline().map(|(at, _)| at)).min();
            let Some(next) = next.filter(|next| *next <= end) else {
                self.now = end;
                return;
            };
            self.now = self.now.max(next);
            self.netcheck.handle_timeout(self.now);
            let (due, later) = std::mem::take(&mut self.in_flight).into_iter().partition(|(at, _)| *at <= self.now);
            self.in_flight = later;
            let due: Vec<(Instant, Answer)> = due;
            for (_, answer) in due {
                match answer {
                    Answer::Stun(transaction, us) => drop(self.netcheck.handle_stun(&transaction, us, self.now)),
                    Answer::Address(region, servers) => self.netcheck.handle_stun_address(region, servers, self.now),
                    Answer::Https(region, latency) => self.netcheck.handle_https_latency(region, latency, self.now),
                }
            }
        }
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "netcheck puts nothing else out")]
    fn drain(&mut self) {
        self.follow_home();
        while let Some(output) = self.netcheck.poll_output() {
            match output {
                Output::Udp { destination, contents, .. } => {
                    let transaction = stun::parse_request(&contents).unwrap();
                    let (region, us) = match destination.ip() {
                        IpAddr::V4(ip) => (u32::from(ip.octets()[3]), OUTSIDE),
                        IpAddr::V6(ip) => (u32::from(ip.segments()[7]), OUTSIDE_V6),
                    };
                    let mut us = addr(us);
                    us.set_port(if self.hard { region as u16 } else { us.port() });
                    let delay = self.stun.get(&region).filter(|_| destination.is_ipv4() || self.v6_works);
                    self.in_flight.extend(delay.map(|it| (self.now + *it, Answer::Stun(transaction, us))));
                }
                Output::ProbeHttps { region } => {
                    self.probed.push(region);
                    let latency = self.https.get(&region).copied();
                    // The connection takes three round trips.
                    let delay = latency.map_or(millis(3_000), |latency| latency * 4);
                    self.in_flight.push((self.now + delay, Answer::Https(region, latency)));
                }
                Output::ResolveStun { region, port, .. } => {
                    self.lookups += 1;
                    let servers = [format!("198.51.100.{region}:{port}"), format!("[2001:db8:ff::{region}]:{port}")];
                    let servers = servers.iter().map(|server| addr(server)).collect();
                    self.in_flight.push((self.now, Answer::Address(region, servers)));
                }
                Output::HostChanged(host) => self.told.push(host),
                other => panic!("{other:?}"),
            }
            self.follow_home();
        }
    }

    /// A relay that is there admits us as soon as it is home.
    fn follow_home(&mut self) {
        let admitted = self.home().filter(|home| self.relays.contains(home));
        if let Some(home) = admitted.filter(|_| admitted != self.admitted) {
            self.netcheck.note_admitted(home);
        }
        self.admitted = admitted;
        self.netcheck.set_home_alive(admitted.is_some(), self.now);
    }

    fn home(&self) -> Option<RegionId> {
        self.netcheck.host().home
    }

    /// Whether peers are told that servers see us there.
    fn tells(&self, endpoint: &str) -> bool {
        self.netcheck.host().endpoints.contains(&(addr(endpoint), EndpointType::Stun))
    }
}

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
    network.netcheck.handle_move(vec![addr(INSIDE_V6)].into(), network.now);
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
fn a_region_that_was_near_before_a_move_is_measured_anew() {
    let mut network = Network::settled(&[(1, 5), (2, 50)]);
    assert_eq!(network.home(), Some(1));
    network.stun.insert(1, millis(200));
    network.netcheck.handle_move(vec![addr("10.0.0.2:5")].into(), network.now);
    network.run(1_000);
    assert_eq!(network.home(), Some(2));
}

#[test]
fn a_home_that_comes_back_while_another_is_searched_has_not_failed() {
    let mut network = Network::settled(&[(1, 20), (2, 90)]);
    network.relays.remove(&1);
    network.run(5_010);
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
fn a_home_that_was_left_because_it_hung_is_not_taken_back_for_its_answer() {
    let mut network = Network::settled(&[(1, 20), (2, 90)]);
    network.relays.remove(&1);
    network.run(6_000);
    assert_eq!(network.home(), Some(2));
    network.netcheck.note_answer(1);
    network.run(700_000);
    assert_eq!(network.home(), Some(2));
}

#[test]
fn what_the_nat_did_before_a_move_is_not_told_after_it() {
    let mut network = Network::settled(&[(1, 20), (2, 30)]);
    assert_eq!(network.netcheck.host().netinfo.mapping_varies_by_dest_ip, Some(false));
    network.stun.remove(&2);
    network.netcheck.handle_move(vec![addr("10.0.0.2:5")].into(), network.now);
    network.run(6_000);
    let netinfo = &network.netcheck.host().netinfo;
    assert_eq!((netinfo.working_udp, netinfo.mapping_varies_by_dest_ip), (Some(true), None));
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
fn udp_that_is_slow_is_told_from_udp_that_is_blocked() {
    let regions = [(1, 1_300), (2, 1_350)];
    let [mut slow, mut blocked] = [(); 2].map(|()| Network::new(Transport::Auto, &regions));
    blocked.stun.clear();
    for network in [&mut slow, &mut blocked] {
        network.https = [(1, millis(30)), (2, millis(20))].into();
        network.run(1_250);
        assert_eq!((network.home(), network.netcheck.host().netinfo.working_udp), (Some(2), Some(false)));
        network.run(4_000);
    }
    assert_eq!((slow.netcheck.host().netinfo.working_udp, slow.tells(OUTSIDE)), (Some(true), true));
    assert_eq!((blocked.netcheck.host().netinfo.working_udp, blocked.tells(OUTSIDE)), (Some(false), false));
    assert_eq!(slow.told.last(), Some(slow.netcheck.host()));
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
fn a_home_that_answers_after_the_conclusion_is_left_for_a_nearer_one() {
    let mut network = Network::settled(&[(1, 20), (2, 90)]);
    network.stun.insert(1, millis(700));
    network.netcheck.handle_move(vec![addr("10.0.0.2:5")].into(), network.now);
    network.run(690);
    assert_eq!(network.home(), Some(1));
    network.run(20);
    assert_eq!(network.home(), Some(2));
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
    network.netcheck.handle_move(vec![addr("10.0.0.2:5")].into(), network.now);
    network.run(2_000);
    assert_eq!((network.home(), network.probed.len()), (Some(2), 4));
    assert!(network.netcheck.host().endpoints.is_empty());
}
