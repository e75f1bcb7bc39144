//! Two engines and all that lies between them, in virtual time: sites, DERP regions with STUN servers, and control.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tailcar::engine::{HttpsProbe, Output, PathStatus};
use tailcar::key::NodePublic;
use tailcar::netmap::RegionId;
use tailcar::wire::stun;

use crate::control::region_of;
use crate::nat::{Kind, Nat};
use crate::node::{Node, number, packet};
use crate::weather::{FORGER, Lost, Weather};

/// How long DERP takes from node to node.
pub(crate) const DERP_DELAY: Duration = Duration::from_millis(30);

/// Something on its way.
pub(crate) enum Delivery {
    Udp { from: SocketAddr, to: SocketAddr, datagram: Vec<u8> },
    Derp { region: RegionId, from: usize, to: NodePublic, packet: Vec<u8> },
    Connect { node: usize, life: u8, region: RegionId },
    Https { node: usize, life: u8, probe: HttpsProbe },
    Netmap { node: usize },
    Call { node: usize, endpoints: Vec<SocketAddr> },
    Router { site: usize, kind: Kind },
    Gone { region: RegionId },
}

pub(crate) struct World {
    pub(crate) now: Instant,
    pub(crate) nodes: Vec<Node>,
    pub(crate) sites: Vec<Nat>,
    pub(crate) regions: BTreeMap<RegionId, bool>,
    /// So many milliseconds lie between a region and the next.
    pub(crate) apart: u64,
    pub(crate) weather: Weather,
    /// Whether control tells nodes about each other.
    pub(crate) control_works: bool,
    /// Calls that come together are heeded within so many microseconds, in any order.
    pub(crate) unordered: u64,
    /// What is lost the next time that it is sent.
    pub(crate) lose: Vec<Lost>,
    queue: BTreeMap<(Instant, u64), Delivery>,
    order: u64,
    pub(crate) rng: StdRng,
    seed: u8,
    numbers: u64,
    outside: u8,
}

impl World {
    /// Two nodes behind routers of these kinds, or behind one together. Nothing has happened yet.
    pub(crate) fn new(kinds: [Kind; 2], together: bool, seed: u8) -> Self {
        let now = Instant::now();
        let mut world = Self {
            now,
            nodes: (0..2).map(|index| Node::new(index, seed, now)).collect(),
            sites: Vec::new(),
            regions: [(1, true), (2, true)].into(),
            apart: 1,
            weather: Weather::CALM,
            control_works: true,
            unordered: 0,
            lose: Vec::new(),
            queue: BTreeMap::new(),
            order: 0,
            rng: StdRng::from_seed([seed; 32]),
            seed,
            numbers: 0,
            outside: 0,
        };
        for (index, kind) in kinds.into_iter().enumerate() {
            let outside = world.fresh_address();
            world.sites.push(Nat::new(kind, outside));
            world.nodes[index].site = if together { 0 } else { index };
        }
        world
    }

    /// Everybody comes up.
    pub(crate) fn start(&mut self) {
        (0..2).for_each(|node| self.attach(node));
        (0..2).for_each(|node| self.tell(node));
    }

    /// A node has an address of its site, and says so.
    fn attach(&mut self, node: usize) {
        self.readdress(node);
        let it = &mut self.nodes[node];
        it.engine.set_local_endpoints(vec![it.inside].into(), self.now);
    }

    fn readdress(&mut self, node: usize) {
        let site = self.nodes[node].site;
        let host = self.rng.random_range(2..250u8);
        let port = self.rng.random_range(1_024..9_000);
        let inside: IpAddr = match self.sites[site].kind {
            Kind::Open => self.fresh_address(),
            Kind::Easy | Kind::Hard | Kind::Blocked => IpAddr::from([192, 168, site as u8, host]),
        };
        self.nodes[node].inside = SocketAddr::new(inside, port);
    }

    /// The node's machine is in another network of the same kind: its connections break.
    pub(crate) fn move_node(&mut self, node: usize) {
        let outside = self.fresh_address();
        let site = self.nodes[node].site;
        if self.nodes.iter().filter(|it| it.site == site).count() == 1 {
            self.sites[site].restart(outside);
        }
        self.readdress(node);
        let it = &mut self.nodes[node];
        it.engine.handle_move(vec![it.inside].into(), self.now);
        self.lose_regions(node, |_| true);
    }

    /// The node's router restarts, and nobody tells the node.
    pub(crate) fn restart_router(&mut self, node: usize) {
        let outside = self.fresh_address();
        self.sites[self.nodes[node].site].restart(outside);
    }

    /// The node's router forgets its mappings, and nobody tells the node.
    pub(crate) fn flush_router(&mut self, node: usize) {
        let site = &mut self.sites[self.nodes[node].site];
        site.restart(site.outside);
    }

    /// Whether this is lost now, once.
    pub(crate) fn loses(&mut self, what: Lost) -> bool {
        let index = self.lose.iter().position(|lost| *lost == what);
        index.map(|index| self.lose.remove(index)).is_some()
    }

    /// The process starts anew with the same node key.
    pub(crate) fn restart_node(&mut self, node: usize) {
        self.nodes[node].restart(self.seed, self.now);
        self.attach(node);
        self.tell(node);
        self.tell(1 - node);
        self.open_flows();
    }

    pub(crate) fn open_flows(&mut self) {
        let flows = [self.nodes[0].flow(&self.nodes[1]), self.nodes[1].flow(&self.nodes[0])];
        self.nodes.iter_mut().zip(flows).for_each(|(node, flow)| node.engine.open_flow(flow));
    }

    /// Sends an inner packet to the other node; its number, or `None` where nothing routes there yet.
    pub(crate) fn send(&mut self, node: usize) -> Option<u64> {
        self.numbers += 1;
        let packet = packet(&self.nodes[node].flow(&self.nodes[1 - node]), self.numbers);
        let sent = self.nodes[node].engine.handle_outbound(&packet, self.now);
        sent.is_ok().then_some(self.numbers)
    }

    /// Both send each `pause` for so long; the numbers that did not arrive, after a second more.
    pub(crate) fn talk(&mut self, time: Duration, pause: Duration) -> Vec<u64> {
        let end = self.now + time;
        let mut sent = Vec::new();
        while self.now < end {
            for node in 0..2 {
                sent.extend(self.send(node).map(|number| (1 - node, number)));
            }
            self.run(pause);
        }
        self.run(Duration::from_secs(1));
        let lost = |(to, number): &(usize, u64)| !self.nodes[*to].received.contains(number);
        sent.iter().filter(|it| lost(it)).map(|(_, number)| *number).collect()
    }

    /// The path from a node to the other.
    pub(crate) fn path(&self, node: usize) -> PathStatus {
        let status = self.nodes[node].engine.peer_status(&self.nodes[1 - node].public(), self.now);
        status.map_or(PathStatus::None, |status| status.path)
    }

    /// Lets time pass.
    pub(crate) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            (0..2).for_each(|node| self.drain(node));
            let arrival = self.queue.first_key_value().map(|((at, _), _)| *at);
            let deadlines = self.nodes.iter().filter_map(Node::next_deadline);
            let next = arrival.into_iter().chain(deadlines).min();
            let Some(next) = next.filter(|next| *next <= end) else {
                self.now = end;
                return;
            };
            self.now = self.now.max(next);
            self.fire_deadlines();
            while let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 <= self.now) {
                let delivery = entry.remove();
                self.deliver(delivery);
            }
        }
    }

    fn fire_deadlines(&mut self) {
        for node in &mut self.nodes {
            if let Some(trusting) = node.trusting.as_mut() {
                trusting.handle_timeout(self.now);
            }
            if node.engine.next_deadline().is_some_and(|(at, _)| at <= self.now) {
                node.engine.handle_timeout(self.now);
                let after = node.engine.next_deadline();
                assert!(after.is_none_or(|(at, _)| at > self.now), "a deadline does not move: {after:?}");
            }
        }
    }

    /// Carries out what a node wants.
    fn drain(&mut self, index: usize) {
        while let Some(output) = self.nodes[index].engine.poll_output() {
            let life = self.nodes[index].life;
            match output {
                Output::Udp { destination, contents, segment } => {
                    contents.chunks(segment).for_each(|datagram| self.send_udp(index, destination, datagram));
                    self.nodes[index].engine.recycle(contents);
                }
                Output::Derp { region, to, packet } => self.send_derp(index, region, to, packet),
                Output::ConnectDerp { region, .. } => {
                    if let std::collections::btree_map::Entry::Vacant(entry) = self.nodes[index].regions.entry(region) {
                        entry.insert(false);
                        self.push(DERP_DELAY * 3, Delivery::Connect { node: index, life, region });
                    }
                }
                Output::CloseDerp { region } => {
                    self.nodes[index].regions.remove(&region);
                }
                Output::HostChanged(host) => {
                    self.nodes[index].take_host(host);
                    self.tell(1 - index);
                }
                Output::ProbeHttps(probe) => {
                    self.push(DERP_DELAY * 2, Delivery::Https { node: index, life, probe });
                }
                Output::PeerChanged { .. } => self.note_path(index),
                Output::Resend { .. } => self.nodes[index].resends += 1,
                Output::ResolveStun { .. } | Output::Rejected { .. } | Output::Pong { .. } | Output::RoutesChanged => {}
            }
        }
        self.speak(index);
        self.note_path(index);
    }

    fn note_path(&mut self, index: usize) {
        let (path, now) = (self.path(index), self.now);
        let paths = &mut self.nodes[index].paths;
        let same = |before: &PathStatus| match (before, &path) {
            (PathStatus::Direct { addr: before, .. }, PathStatus::Direct { addr, .. }) => before == addr,
            (before, path) => *before == *path,
        };
        if !paths.last().is_some_and(|(_, before)| same(before)) {
            paths.push((now, path));
        }
    }

    pub(crate) fn send_udp(&mut self, index: usize, to: SocketAddr, datagram: &[u8]) {
        let node = &mut self.nodes[index];
        let stun = stun::parse_request(datagram).is_ok();
        if stun {
            node.sent.stun += 1
        } else {
            node.sent.udp += 1
        }
        let offered = node.trusting.is_some() || node.offered.contains(&to);
        assert!(offered, "node {index} sends {} bytes to {to}, which nobody offered", datagram.len());
        let (inside, site) = (node.inside, node.site);
        if stun && self.loses(Lost::Stun) {
            return;
        }
        if self.rng.random_range(0..100) < self.weather.lost {
            return;
        }
        let near = self.nodes.iter().any(|it| it.inside == to && it.site == site);
        let from = if near { Some(inside) } else { self.sites[site].leave(inside, to, &mut self.rng, self.now) };
        let Some(from) = from else { return };
        let copies = if self.rng.random_range(0..100) < self.weather.doubled { 2 } else { 1 };
        for _ in 0..copies {
            let delay = Duration::from_millis(self.rng.random_range(self.weather.delay.0..=self.weather.delay.1));
            self.push(delay, Delivery::Udp { from, to, datagram: datagram.to_vec() });
        }
        self.forge(from, to, datagram);
    }

    /// Somebody who sees datagrams sends altered copies, some of them from elsewhere.
    fn forge(&mut self, from: SocketAddr, to: SocketAddr, datagram: &[u8]) {
        if self.weather.forged == 0 || self.rng.random_range(0..100) >= self.weather.forged {
            return;
        }
        let mut datagram = datagram.to_vec();
        // Past what tells the kinds of datagrams apart.
        let altered = self.rng.random_range(16..datagram.len());
        datagram[altered] ^= 1 << self.rng.random_range(0..8);
        let from = if self.rng.random() { from } else { FORGER };
        let delay = Duration::from_millis(self.rng.random_range(self.weather.delay.0..=self.weather.delay.1));
        self.push(delay, Delivery::Udp { from, to, datagram });
    }

    fn deliver(&mut self, delivery: Delivery) {
        match delivery {
            Delivery::Udp { from, to, datagram } => self.deliver_udp(from, to, datagram),
            Delivery::Derp { region, from, to, packet } => self.deliver_derp(region, from, to, packet),
            Delivery::Connect { node, life, region } => self.connect(node, life, region),
            Delivery::Https { node, life, probe } => {
                let latency = self.regions.get(&probe.region).is_some_and(|up| *up).then_some(DERP_DELAY);
                if self.nodes[node].life == life {
                    self.nodes[node].engine.handle_https_latency(probe, latency, self.now);
                }
            }
            Delivery::Netmap { node } => self.tell_now(node),
            Delivery::Router { site, kind } => {
                // The last of several interruptions ends them.
                let later = |it: &Delivery| matches!(it, Delivery::Router { site: other, .. } if *other == site);
                if !self.queue.values().any(later) {
                    self.sites[site].kind = kind;
                }
            }
            Delivery::Gone { region } => self.take_region(region),
            Delivery::Call { node, endpoints } => {
                if let Some(trusting) = self.nodes[node].trusting.as_mut() {
                    trusting.handle_call(&endpoints, self.now);
                }
            }
        }
    }

    fn deliver_udp(&mut self, from: SocketAddr, to: SocketAddr, mut datagram: Vec<u8>) {
        if let Some(region) = region_of(to) {
            let transaction = stun::parse_request(&datagram);
            if let (Ok(transaction), Some(true)) = (transaction, self.regions.get(&region)) {
                let delay = Duration::from_millis(self.weather.delay.0 + self.apart * u64::from(region));
                self.push(delay, Delivery::Udp { from: to, to: from, datagram: stun::response(&transaction, from) });
            }
            return;
        }
        let now = self.now;
        let near = self.nodes.iter().position(|it| it.inside == to && it.inside.ip().is_ipv4() && is_near(from, to));
        let reached = near.or_else(|| {
            let enters = |node: &Node| self.sites[node.site].enter(from, to, now) == Some(node.inside);
            self.nodes.iter().position(enters).filter(|_| !is_private(to))
        });
        let Some(index) = reached else { return };
        if self.nodes[index].trusting.is_some() {
            if !self.hear(index, Some(from), &mut datagram) {
                self.admit_far(index, 1, datagram);
            }
            return;
        }
        let node = &mut self.nodes[index];
        let before = node.refused();
        let admitted = node.engine.handle_udp(from, &mut datagram, now).map(|packet| number(packet));
        if node.refused() == before {
            node.offered.insert(from);
        }
        node.received.extend(admitted);
    }

    pub(crate) fn push(&mut self, delay: Duration, delivery: Delivery) {
        self.order += 1;
        self.queue.insert((self.now + delay, self.order), delivery);
    }

    fn fresh_address(&mut self) -> IpAddr {
        self.outside += 1;
        IpAddr::from([203, 0, 113, self.outside])
    }
}

fn is_private(address: SocketAddr) -> bool {
    matches!(address.ip(), IpAddr::V4(ip) if ip.is_private())
}

/// Whether both are of one private network.
fn is_near(a: SocketAddr, b: SocketAddr) -> bool {
    match (a.ip(), b.ip()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => a.is_private() && a.octets()[..3] == b.octets()[..3],
        _ => false,
    }
}
