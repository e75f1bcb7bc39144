//! Two nodes, a STUN server and DERP regions in one process, in virtual time.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::engine::{Config, Engine, Flow, HostState, Output, PathStatus, PeerStatus, Protocol, Transport};
use crate::key::{DiscoPrivate, NodePrivate, NodePublic};
use crate::netmap::RegionId;
use crate::netmap::session::Session;
use crate::wire::{ip, stun};

pub(super) const STUN_SERVER: &str = "198.51.100.1:3478";

/// Something on its way.
enum Delivery {
    Udp { from: SocketAddr, to: SocketAddr, datagram: Vec<u8> },
    Derp { region: RegionId, from: usize, to: NodePublic, packet: Vec<u8> },
    Connected { node: usize, region: RegionId },
}

pub(super) struct Node {
    pub(super) engine: Engine,
    pub(super) key: NodePrivate,
    pub(super) disco: DiscoPrivate,
    pub(super) underlay: SocketAddr,
    pub(super) overlay: IpAddr,
    /// Regions that are connected.
    pub(super) regions: Vec<RegionId>,
    /// Inner packets that were admitted.
    pub(super) received: Vec<Vec<u8>>,
    /// WireGuard segments sent by UDP, and packets sent by DERP.
    pub(super) sent: (usize, usize),
    /// Disco packets sent by DERP.
    pub(super) calls: usize,
    pub(super) outputs: Vec<Output>,
    pub(super) host: HostState,
}

pub(super) struct World {
    pub(super) now: Instant,
    pub(super) nodes: Vec<Node>,
    in_flight: Vec<(Instant, Delivery)>,
    pub(super) udp_works: bool,
    pub(super) stun_works: bool,
    pub(super) derp_works: bool,
    /// Which packets get lost, by either way.
    pub(super) lose: fn(&[u8]) -> bool,
    /// One way, by UDP.
    pub(super) udp_delay: Duration,
    /// One way, by DERP.
    pub(super) derp_delay: Duration,
    /// Everything that travelled by UDP, for replays.
    pub(super) datagrams: Vec<(SocketAddr, SocketAddr, Vec<u8>)>,
    pub(super) peers_publish_endpoints: bool,
    stun_servers_are_named: bool,
    /// Endpoints of node 1 as a plain WireGuard peer.
    plain: Option<Vec<String>>,
    /// Nodes that send and receive nothing more.
    pub(super) dead: Vec<usize>,
    /// What control says of a node besides.
    pub(super) besides: BTreeMap<usize, Value>,
}

impl World {
    pub(super) fn new(transport: Transport) -> Self {
        Self::of(2, transport)
    }

    /// As many nodes as that.
    pub(super) fn of(nodes: u8, transport: Transport) -> Self {
        let now = Instant::now();
        let node = |index: u8| {
            let (key, disco) = (NodePrivate::random(), DiscoPrivate::random());
            let config = Config { node_key: key.clone(), disco_key: disco.clone(), seed: [index; 32], transport };
            Node {
                engine: Engine::new(config, now),
                key,
                disco,
                underlay: SocketAddr::from(([203, 0, 113, index], 1000 + u16::from(index))),
                overlay: IpAddr::from([100, 64, 0, index]),
                regions: Vec::new(),
                received: Vec::new(),
                sent: (0, 0),
                calls: 0,
                outputs: Vec::new(),
                host: HostState::default(),
            }
        };
        Self {
            now,
            nodes: (1..=nodes).map(node).collect(),
            in_flight: Vec::new(),
            udp_works: true,
            stun_works: true,
            derp_works: true,
            lose: |_| false,
            udp_delay: Duration::from_millis(10),
            derp_delay: Duration::from_millis(30),
            datagrams: Vec::new(),
            peers_publish_endpoints: true,
            stun_servers_are_named: false,
            plain: None,
            dead: Vec::new(),
            besides: BTreeMap::new(),
        }
    }

    /// Both nodes have been up for a while and know each other.
    pub(super) fn started(transport: Transport) -> Self {
        let mut world = Self::new(transport);
        world.start();
        world
    }

    pub(super) fn start(&mut self) {
        for node in &mut self.nodes {
            node.engine.set_local_endpoints(vec![node.underlay].into(), self.now);
        }
        self.publish();
        self.run(Duration::from_secs(8));
        self.publish();
        self.run(Duration::from_secs(1));
    }

    /// Control tells everyone what everyone else said.
    pub(super) fn publish(&mut self) {
        (0..self.nodes.len()).for_each(|index| self.publish_to(index));
    }

    /// Control tells one node.
    pub(super) fn publish_to(&mut self, index: usize) {
        let address = |literal: &'static str| if self.stun_servers_are_named { "" } else { literal };
        let (first, second) = (address("198.51.100.1"), address("198.51.100.2"));
        let derp = json!({"Regions": {
            "1": {"RegionID": 1, "Nodes": [{"HostName": "derp1.example", "IPv4": first, "IPv6": "none"}]},
            "2": {"RegionID": 2, "Nodes": [{"HostName": "derp2.example", "IPv4": second, "IPv6": "none"}]},
            "3": {"RegionID": 3, "NoMeasureNoHome": true, "Nodes": [{"HostName": "derp3.example"}]},
        }});
        let described: Vec<Value> = (0..self.nodes.len()).map(|index| self.describe(index)).collect();
        let others = described.iter().enumerate().filter(|(it, _)| *it != index).map(|(_, it)| it);
        let others: Vec<&Value> = others.collect();
        let message = json!({"Node": described[index], "Peers": others, "DERPMap": derp});
        let applied = Session::new(true).apply(serde_json::from_value(message).unwrap(), jiff::Timestamp::now());
        let netmap = applied.unwrap().netmap.unwrap();
        self.nodes[index].engine.handle_netmap(netmap, self.now);
    }

    /// The DERP map gives no addresses from now on.
    pub(super) fn name_stun_servers(&mut self) {
        self.stun_servers_are_named = true;
    }

    /// Node 1 is a peer without disco and DERP from now on.
    pub(super) fn make_plain(&mut self, endpoints: &[&str]) {
        self.plain = Some(endpoints.iter().map(|endpoint| endpoint.to_string()).collect());
        self.publish();
    }

    fn describe(&self, index: usize) -> Value {
        let node = &self.nodes[index];
        let endpoints: Vec<String> = node.host.endpoints.iter().map(|(endpoint, _)| endpoint.to_string()).collect();
        let mut described = json!({
            "ID": index + 1, "StableID": format!("n{index}"), "Name": format!("host{index}.tail1.ts.net."),
            "Key": node.key.public().to_string(), "DiscoKey": node.disco.public().to_string(),
            "Addresses": [format!("{}/32", node.overlay)], "AllowedIPs": [format!("{}/32", node.overlay)],
            "Endpoints": if self.peers_publish_endpoints { endpoints } else { Vec::new() },
            "HomeDERP": node.host.home.unwrap_or(1), "MachineAuthorized": true,
        });
        if let Some(endpoints) = self.plain.as_ref().filter(|_| index == 1) {
            described["IsWireGuardOnly"] = json!(true);
            described["Endpoints"] = json!(endpoints);
        }
        for (field, value) in self.besides.get(&index).and_then(Value::as_object).into_iter().flatten() {
            described[field] = value.clone();
        }
        described
    }

    /// Lets time pass.
    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            (0..self.nodes.len()).for_each(|index| self.drain(index));
            let arrival = self.in_flight.iter().map(|(at, _)| *at).min();
            let deadlines = self.nodes.iter().filter_map(|node| node.engine.next_deadline().map(|(at, _)| at));
            let next = arrival.into_iter().chain(deadlines).min();
            let Some(next) = next.filter(|next| *next <= end) else {
                self.now = end;
                return;
            };
            self.now = self.now.max(next);
            for node in &mut self.nodes {
                if node.engine.next_deadline().is_some_and(|(at, _)| at <= self.now) {
                    node.engine.handle_timeout(self.now);
                    let after = node.engine.next_deadline();
                    assert!(after.is_none_or(|(at, _)| at > self.now), "timeout does not move the deadline: {after:?}");
                }
            }
            let (due, later) = std::mem::take(&mut self.in_flight).into_iter().partition(|(at, _)| *at <= self.now);
            self.in_flight = later;
            let due: Vec<(Instant, Delivery)> = due;
            due.into_iter().for_each(|(_, delivery)| self.deliver(delivery));
        }
    }

    /// Carries out what a node wants.
    fn drain(&mut self, index: usize) {
        while let Some(output) = self.nodes[index].engine.poll_output() {
            match output {
                Output::Udp { destination, contents, segment } => {
                    let from = self.nodes[index].underlay;
                    for datagram in contents.chunks(segment) {
                        self.nodes[index].sent.0 += usize::from(datagram[0] <= 4 && datagram[1] == 0);
                        let datagram = datagram.to_vec();
                        self.datagrams.push((from, destination, datagram.clone()));
                        let delivery = Delivery::Udp { from, to: destination, datagram };
                        self.in_flight.push((self.now + self.udp_delay, delivery));
                    }
                    self.nodes[index].engine.recycle(contents);
                }
                Output::Derp { region, to, packet } => {
                    self.nodes[index].calls += usize::from(packet[0] > 4);
                    self.nodes[index].sent.1 += usize::from(packet[0] <= 4);
                    let delivery = Delivery::Derp { region, from: index, to, packet };
                    self.in_flight.push((self.now + self.derp_delay, delivery));
                }
                Output::ConnectDerp { region, .. } => {
                    let delivery = Delivery::Connected { node: index, region };
                    self.in_flight.push((self.now + self.derp_delay, delivery));
                    self.nodes[index].outputs.push(output);
                }
                Output::CloseDerp { region } => {
                    self.nodes[index].regions.retain(|it| *it != region);
                    self.nodes[index].outputs.push(output);
                }
                Output::HostChanged(host) => {
                    self.nodes[index].host = host.clone();
                    self.nodes[index].outputs.push(Output::HostChanged(host));
                }
                other @ (Output::ResolveStun { .. }
                | Output::ProbeHttps(_)
                | Output::Rejected { .. }
                | Output::Pong { .. }
                | Output::RoutesChanged
                | Output::Resend { .. }
                | Output::PeerChanged { .. }) => self.nodes[index].outputs.push(other),
            }
        }
    }

    fn deliver(&mut self, delivery: Delivery) {
        match delivery {
            Delivery::Udp { from, to, datagram } => self.deliver_udp(from, to, datagram),
            Delivery::Derp { region, from, to, packet } => self.deliver_derp(region, from, to, packet),
            Delivery::Connected { node, region } => {
                if !self.nodes[node].regions.contains(&region) {
                    self.nodes[node].regions.push(region);
                }
                self.nodes[node].engine.handle_derp_connected(region, self.now);
            }
        }
    }

    pub(super) fn deliver_udp(&mut self, from: SocketAddr, to: SocketAddr, mut datagram: Vec<u8>) {
        if let Ok(transaction) = stun::parse_request(&datagram) {
            // The second region's server does not exist.
            if self.stun_works && to == STUN_SERVER.parse().unwrap() {
                let delivery = Delivery::Udp { from: to, to: from, datagram: stun::response(&transaction, from) };
                self.in_flight.push((self.now + self.udp_delay, delivery));
            }
            return;
        }
        if (self.lose)(&datagram) {
            return;
        }
        if !self.udp_works && to != STUN_SERVER.parse().unwrap() && from != STUN_SERVER.parse().unwrap() {
            return;
        }
        let dead = |node: &Node| self.dead.iter().any(|dead| self.nodes[*dead].underlay == node.underlay);
        if self.nodes.iter().any(|node| [from, to].contains(&node.underlay) && dead(node)) {
            return;
        }
        if let Some(node) = self.nodes.iter_mut().find(|node| node.underlay == to) {
            let admitted = node.engine.handle_udp(from, &mut datagram, self.now).map(|packet| packet.to_vec());
            node.received.extend(admitted);
        }
    }

    fn deliver_derp(&mut self, region: RegionId, from: usize, to: NodePublic, mut packet: Vec<u8>) {
        let sender = self.nodes[from].key.public();
        if !self.derp_works || (self.lose)(&packet) || !self.nodes[from].regions.contains(&region) {
            return;
        }
        if self.dead.iter().any(|dead| *dead == from || self.nodes[*dead].key.public() == to) {
            return;
        }
        let there = |node: &&mut Node| node.key.public() == to && node.regions.contains(&region);
        if let Some(node) = self.nodes.iter_mut().find(there) {
            let admitted = node.engine.handle_derp(region, sender, &mut packet, self.now).map(|packet| packet.to_vec());
            node.received.extend(admitted);
        }
    }

    /// A node no longer knows its tunnels, and tells nobody.
    pub(super) fn forget_sessions(&mut self, node: usize) {
        (0..self.nodes.len()).for_each(|slot| self.nodes[node].engine.wireguard.remove(slot));
    }

    /// The flow that [`World::send`] uses, from this node's side.
    pub(super) fn flow(&self, node: usize) -> Flow {
        let socket = |index: usize| SocketAddr::new(self.nodes[index].overlay, 4000 + index as u16);
        Flow { protocol: Protocol::Udp, local: socket(node), remote: socket(1 - node) }
    }

    pub(super) fn open_flows(&mut self) {
        for node in 0..2 {
            let flow = self.flow(node);
            self.nodes[node].engine.open_flow(flow);
        }
    }

    /// Sends an inner UDP packet to the other node.
    pub(super) fn send(&mut self, node: usize, text: &[u8]) {
        let packet = udp_packet(self.flow(node), text);
        self.nodes[node].engine.handle_outbound(&packet, self.now).unwrap();
    }

    /// The texts of what a node received.
    pub(super) fn texts(&self, node: usize) -> Vec<String> {
        self.nodes[node].received.iter().map(|packet| String::from_utf8_lossy(&packet[28..]).into_owned()).collect()
    }

    pub(super) fn status(&self, node: usize) -> PeerStatus {
        self.nodes[node].engine.peer_status(&self.nodes[1 - node].key.public(), self.now).unwrap()
    }

    pub(super) fn is_direct(&self, node: usize) -> bool {
        matches!(self.status(node).path, PathStatus::Direct { .. })
    }
}

/// An inner UDP packet of a flow, seen from its local end. Its UDP checksum is 0, "none".
pub(super) fn udp_packet(flow: Flow, text: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.extend(flow.local.port().to_be_bytes());
    payload.extend(flow.remote.port().to_be_bytes());
    payload.extend((8 + text.len() as u16).to_be_bytes());
    payload.extend([0, 0]);
    payload.extend(text);
    ip::build(ip::protocol::UDP, flow.local.ip(), flow.remote.ip(), &payload).unwrap()
}
