//! A node: an engine, and what its driver and control know of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use serde_json::{Value, json};
use tailcar::engine::{Config, Engine, Flow, HostState, PathStatus, Protocol, Transport};
use tailcar::key::{DiscoPrivate, NodePrivate, NodePublic};
use tailcar::netmap::RegionId;
use tailcar::wire::disco::{self, Message};
use tailcar::wire::ip;

use crate::trusting::Trusting;

/// What a node sent.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Sent {
    /// To servers, to find out about our network.
    pub(crate) stun: usize,
    /// To peers, by UDP.
    pub(crate) udp: usize,
    /// To peers, by DERP.
    pub(crate) derp: usize,
}

pub(crate) struct Node {
    pub(crate) engine: Engine,
    pub(crate) index: usize,
    pub(crate) key: NodePrivate,
    pub(crate) disco: DiscoPrivate,
    /// Restarts so far.
    pub(crate) life: u8,
    pub(crate) site: usize,
    pub(crate) inside: SocketAddr,
    pub(crate) overlay: IpAddr,
    /// Regions that the engine wants connected, and which of them are.
    pub(crate) regions: BTreeMap<RegionId, bool>,
    /// What control was told last.
    pub(crate) host: HostState,
    /// The numbers of the packets that came.
    pub(crate) received: BTreeSet<u64>,
    pub(crate) sent: Sent,
    /// Addresses that somebody offered.
    pub(crate) offered: BTreeSet<SocketAddr>,
    /// Each path to the other node, and since when.
    pub(crate) paths: Vec<(Instant, PathStatus)>,
    /// How often the engine wanted sent again what waits for an acknowledgement.
    pub(crate) resends: usize,
    pub(crate) transport: Transport,
    /// Its paths, if it is Tailscale's client, and when that last asked a STUN server.
    pub(crate) trusting: Option<Trusting>,
    pub(crate) looked_at: Option<Instant>,
}

impl Node {
    pub(crate) fn new(index: usize, seed: u8, now: Instant) -> Self {
        let key = NodePrivate::from_bytes(clamped([seed.wrapping_mul(31).wrapping_add(index as u8 + 1); 32]));
        let disco = disco_key(index, 0, seed);
        let config = Config {
            node_key: key.clone(),
            disco_key: disco.clone(),
            seed: [seed ^ index as u8; 32],
            transport: Transport::Auto,
        };
        Self {
            engine: Engine::new(config, now),
            index,
            key,
            disco,
            life: 0,
            site: 0,
            inside: SocketAddr::from(([0, 0, 0, 0], 0)),
            overlay: IpAddr::from([100, 64, 0, 1 + index as u8]),
            regions: BTreeMap::new(),
            host: HostState::default(),
            received: BTreeSet::new(),
            sent: Sent::default(),
            offered: BTreeSet::new(),
            paths: Vec::new(),
            resends: 0,
            transport: Transport::Auto,
            trusting: None,
            looked_at: None,
        }
    }

    /// Everything but the node key is new.
    pub(crate) fn restart(&mut self, seed: u8, now: Instant) {
        self.life += 1;
        self.disco = disco_key(self.index, self.life, seed);
        let config = Config {
            node_key: self.key.clone(),
            disco_key: self.disco.clone(),
            seed: [seed ^ self.life; 32],
            transport: self.transport,
        };
        self.engine = Engine::new(config, now);
        self.regions.clear();
        self.host = HostState::default();
        self.offered.clear();
        self.looked_at = None;
        self.trusting = self.trusting.take().map(|_| Trusting::default());
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let trusting = self.trusting.as_ref().and_then(Trusting::next_deadline);
        self.engine.next_deadline().map(|(at, _)| at).into_iter().chain(trusting).min()
    }

    /// Control is told; of Tailscale's client, where it is, by [`look`](crate::world::World::look).
    pub(crate) fn take_host(&mut self, host: HostState) {
        let endpoints = if self.trusting.is_some() { self.host.endpoints.clone() } else { host.endpoints };
        self.host = HostState { endpoints, ..host };
    }

    pub(crate) fn public(&self) -> NodePublic {
        self.key.public()
    }

    /// What control says of it.
    pub(crate) fn describe(&self) -> Value {
        let endpoints: Vec<String> = self.host.endpoints.iter().map(|(endpoint, _)| endpoint.to_string()).collect();
        let own = format!("{}/32", self.overlay);
        json!({
            "ID": self.index + 1, "StableID": format!("n{}", self.index),
            "Name": format!("host{}.example.", self.index),
            "Key": self.public().to_string(), "DiscoKey": self.disco.public().to_string(),
            "Addresses": [own], "AllowedIPs": [own], "Endpoints": endpoints,
            "HomeDERP": self.host.home.unwrap_or(1), "MachineAuthorized": true,
        })
    }

    /// A packet that came by DERP may be a call, and offer addresses.
    pub(crate) fn note_call(&mut self, sender: &DiscoPrivate, packet: &[u8]) {
        if disco::sender(packet) != Ok(sender.public()) {
            return;
        }
        let shared = disco::shared_key(&self.disco, &sender.public());
        if let Ok(Message::CallMeMaybe { endpoints }) = disco::open(&mut packet.to_vec(), &shared) {
            self.offered.extend(endpoints);
        }
    }

    /// Datagrams that proved nothing about their sender.
    pub(crate) fn refused(&self) -> u64 {
        let it = self.engine.stats();
        let unproven = it.dropped_unknown + it.dropped_malformed + it.dropped_stranger + it.dropped_forged;
        unproven + it.dropped_no_session + it.dropped_duplicate + it.dropped_under_load
    }

    /// The flow that tests send by, from this node's side.
    pub(crate) fn flow(&self, other: &Self) -> Flow {
        Flow {
            protocol: Protocol::Udp,
            local: SocketAddr::new(self.overlay, 4000),
            remote: SocketAddr::new(other.overlay, 4000),
        }
    }
}

fn disco_key(index: usize, life: u8, seed: u8) -> DiscoPrivate {
    let mut bytes = [seed; 32];
    (bytes[0], bytes[1], bytes[2]) = (index as u8 + 1, life, 77);
    DiscoPrivate::from_bytes(clamped(bytes))
}

/// As Curve25519 wants it.
fn clamped(mut bytes: [u8; 32]) -> [u8; 32] {
    bytes[0] &= 0xf8;
    bytes[31] = (bytes[31] & 0x7f) | 0x40;
    bytes
}

/// An inner UDP packet that carries a number. Its UDP checksum is 0, "none".
pub(crate) fn packet(flow: &Flow, number: u64) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.extend(flow.local.port().to_be_bytes());
    payload.extend(flow.remote.port().to_be_bytes());
    payload.extend(16u16.to_be_bytes());
    payload.extend([0, 0]);
    payload.extend(number.to_be_bytes());
    ip::build(ip::protocol::UDP, flow.local.ip(), flow.remote.ip(), &payload).expect("the addresses are of one family")
}

/// The number of such a packet.
pub(crate) fn number(packet: &[u8]) -> u64 {
    u64::from_be_bytes(*packet.last_chunk().expect("the packet holds a number"))
}
