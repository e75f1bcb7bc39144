//! Networks with several regions, in virtual time, for what netcheck concludes of them.

mod home;
mod told;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{HostState, HttpsProbe, Netcheck};
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
    Https(HttpsProbe, Option<Duration>),
    Address(RegionId, Vec<SocketAddr>),
    /// The end of a dial.
    Admitted(RegionId),
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
    /// Those that have, and those that are being dialled.
    admitted: BTreeSet<RegionId>,
    dialled: BTreeSet<RegionId>,
    /// Whether the NAT gives us another port for each server.
    hard: bool,
    /// Whether IPv6 leads anywhere, and how much longer it takes.
    v6_works: bool,
    v6_takes: Duration,
    in_flight: Vec<(Instant, Answer)>,
    told: Vec<HostState>,
    /// Who was asked by HTTPS.
    probed: Vec<RegionId>,
    /// How often a name was looked up, what that takes, and whether it leads anywhere.
    lookups: usize,
    lookup_takes: Duration,
    names_work: bool,
    /// Who was asked by UDP.
    asked: Vec<RegionId>,
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
            admitted: BTreeSet::new(),
            dialled: BTreeSet::new(),
            hard: false,
            v6_works: true,
            v6_takes: Duration::ZERO,
            in_flight: Vec::new(),
            told: Vec::new(),
            probed: Vec::new(),
            lookups: 0,
            lookup_takes: Duration::ZERO,
            names_work: true,
            asked: Vec::new(),
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
                    Answer::Https(of, latency) => self.netcheck.handle_https_latency(of, latency, self.now),
                    Answer::Admitted(region) => self.admit(region),
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
                    self.asked.push(region);
                    let mut us = addr(us);
                    us.set_port(if self.hard { region as u16 } else { us.port() });
                    let delay = self.stun.get(&region).filter(|_| destination.is_ipv4() || self.v6_works);
                    let detour = if destination.is_ipv6() { self.v6_takes } else { Duration::ZERO };
                    self.in_flight.extend(delay.map(|it| (self.now + *it + detour, Answer::Stun(transaction, us))));
                }
                Output::ProbeHttps(of) => {
                    self.probed.push(of.region);
                    let latency = self.https.get(&of.region).copied();
                    // The connection takes three round trips.
                    let delay = latency.map_or(millis(3_000), |latency| latency * 4);
                    self.in_flight.push((self.now + delay, Answer::Https(of, latency)));
                }
                Output::ResolveStun { region, port, .. } => {
                    self.lookups += 1;
                    let servers = [format!("198.51.100.{region}:{port}"), format!("[2001:db8:ff::{region}]:{port}")];
                    let servers = servers.iter().filter(|_| self.names_work).map(|server| addr(server)).collect();
                    self.in_flight.push((self.now + self.lookup_takes, Answer::Address(region, servers)));
                }
                Output::HostChanged(host) => self.told.push(host),
                other => panic!("{other:?}"),
            }
            self.follow_home();
        }
    }

    /// Keeps the home connected, and dials whom netcheck wants to know of.
    fn follow_home(&mut self) {
        self.admitted.retain(|region| self.relays.contains(region));
        let wanted: Vec<RegionId> = self.home().into_iter().chain(self.netcheck.take_retried()).collect();
        for region in wanted.into_iter().filter(|region| self.relays.contains(region)) {
            if !self.admitted.contains(&region) && self.dialled.insert(region) {
                // A connection, TLS and the handshake take four round trips.
                let latency = self.stun.get(&region).or(self.https.get(&region)).copied().unwrap_or(millis(50));
                self.in_flight.push((self.now + latency * 4, Answer::Admitted(region)));
            }
        }
        self.netcheck.set_home_alive(self.home().is_some_and(|home| self.admitted.contains(&home)), self.now);
    }

    fn admit(&mut self, region: RegionId) {
        if self.dialled.remove(&region) && self.relays.contains(&region) {
            self.admitted.insert(region);
            self.netcheck.note_admitted(region);
        }
    }

    /// Our network is another: connections end, and what is under way is lost.
    fn move_to(&mut self, address: &str) {
        self.in_flight.clear();
        self.admitted.clear();
        self.dialled.clear();
        self.follow_home();
        self.netcheck.handle_move(vec![addr(address)].into(), self.now);
    }

    fn home(&self) -> Option<RegionId> {
        self.netcheck.host().home
    }

    /// Whether peers are told that servers see us there.
    fn tells(&self, endpoint: &str) -> bool {
        self.netcheck.host().endpoints.contains(&(addr(endpoint), EndpointType::Stun))
    }
}
