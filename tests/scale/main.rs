//! Big tailnets and long lives, counted in allocations and bytes, since a time would depend on the machine.
//!
//! One test runs all parts, one after the other: the counter sees the whole process.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

use std::alloc::System;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, Stats, StatsAlloc};
use tailcar::engine::{Config, Engine, Flow, Output, Protocol, Transport};
use tailcar::key::{DiscoPrivate, NodePrivate, NodePublic};
use tailcar::netmap::Netmap;
use tailcar::netmap::session::Session;
use tailcar::wire::ip;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Many.
const MANY: u32 = 10_000;

fn engine_at(now: Instant) -> Engine {
    let config = Config {
        node_key: NodePrivate::random(),
        disco_key: DiscoPrivate::random(),
        seed: [1; 32],
        transport: Transport::Auto,
    };
    let mut engine = Engine::new(config, now);
    engine.set_local_endpoints(vec!["192.0.2.1:4000".parse().unwrap()].into(), now);
    engine
}

fn overlay(id: u32) -> IpAddr {
    let [_, b, c, d] = id.to_be_bytes();
    IpAddr::from([100, 64 + b, c, d])
}

fn node_key(id: u32, version: u32) -> NodePublic {
    let mut bytes = [9; 32];
    bytes[..4].copy_from_slice(&id.to_le_bytes());
    bytes[4..8].copy_from_slice(&version.to_le_bytes());
    NodePublic::from_bytes(bytes)
}

/// What control says of a peer; its keys and endpoints follow from `version`.
fn peer(id: u32, version: u32) -> Value {
    let own = format!("{}/32", overlay(id));
    let mut disco = [7; 32];
    disco[..4].copy_from_slice(&id.to_le_bytes());
    disco[4..8].copy_from_slice(&version.to_le_bytes());
    let endpoint = SocketAddr::from(([203, 0, (version % 250) as u8, (id % 250) as u8], 5000));
    json!({
        "ID": id, "StableID": format!("n{id}"), "Name": format!("host{id}.example."),
        "Key": node_key(id, version / 4).to_string(), "DiscoKey": format!("discokey:{}", hex::encode(disco)),
        "Addresses": [own], "AllowedIPs": [own], "Endpoints": [endpoint.to_string()],
        "HomeDERP": 1, "MachineAuthorized": true,
    })
}

fn whole(peers: &[Value]) -> Value {
    let own = json!({
        "ID": 900_000, "Key": node_key(900_000, 0).to_string(), "Name": "us.example.", "MachineAuthorized": true,
        "Addresses": ["100.127.0.1/32"], "AllowedIPs": ["100.127.0.1/32"],
    });
    let region =
        json!({"RegionID": 1, "Nodes": [{"HostName": "derp.example", "IPv4": "198.51.100.1", "IPv6": "none"}]});
    json!({"Node": own, "Peers": peers, "DERPMap": {"Regions": {"1": region}}})
}

fn apply(session: &mut Session, message: Value) -> Arc<Netmap> {
    let message = serde_json::from_value(message).unwrap();
    session.apply(message, jiff::Timestamp::UNIX_EPOCH).unwrap().netmap.unwrap()
}

fn drain(engine: &mut Engine, now: Instant) -> usize {
    let mut sent = 0;
    while let Some(output) = engine.poll_output() {
        match output {
            Output::Udp { contents, .. } => {
                sent += 1;
                engine.recycle(contents);
            }
            Output::Derp { packet, .. } => {
                sent += 1;
                engine.recycle(packet);
            }
            Output::ConnectDerp { region, .. } => engine.handle_derp_connected(region, now),
            Output::CloseDerp { .. }
            | Output::ResolveStun { .. }
            | Output::ProbeHttps(_)
            | Output::HostChanged(_)
            | Output::Rejected { .. }
            | Output::Pong { .. }
            | Output::RoutesChanged
            | Output::Resend { .. }
            | Output::PeerChanged { .. } => {}
        }
    }
    sent
}

fn knock(engine: &mut Engine, id: u32, now: Instant) -> bool {
    let flow = Flow {
        protocol: Protocol::Udp,
        local: "100.127.0.1:4000".parse().unwrap(),
        remote: SocketAddr::new(overlay(id), 4000),
    };
    let packet = ip::build(ip::protocol::UDP, flow.local.ip(), flow.remote.ip(), &[0x0f, 0xa0, 0x0f, 0xa0, 0, 8, 0, 0]);
    engine.handle_outbound(&packet.unwrap(), now).is_ok()
}

fn kept(stats: &Stats) -> isize {
    stats.bytes_allocated as isize - stats.bytes_deallocated as isize
}

#[test]
fn many_peers_are_cheap_and_a_day_of_churn_leaves_nothing_behind() {
    many_peers();
    a_day_of_churn();
}

/// Ten thousand peers: what they cost at first, and what one change costs.
fn many_peers() {
    let now = Instant::now();
    let (mut session, mut engine) = (Session::new(true), engine_at(now));
    let message = whole(&(1..=MANY).map(|id| peer(id, 0)).collect::<Vec<_>>());
    let message = serde_json::from_value(message).unwrap();
    let region = Region::new(ALLOCATOR);
    let netmap = session.apply(message, jiff::Timestamp::UNIX_EPOCH).unwrap().netmap.unwrap();
    let parsed = region.change();
    let region = Region::new(ALLOCATOR);
    engine.handle_netmap(netmap, now);
    let taken = region.change();
    // Measured: 11.3 allocations and 1,051 bytes a peer, and 216 bytes in the engine.
    assert!(parsed.allocations <= 15 * MANY as usize && kept(&parsed) <= 1_500 * MANY as isize, "{parsed:?}");
    assert!(taken.allocations <= MANY as usize && kept(&taken) <= 300 * MANY as isize, "{taken:?}");

    let patch = json!({"PeersChangedPatch": [{"NodeID": 77, "Endpoints": ["203.0.113.9:9"]}]});
    let patch = serde_json::from_value(patch).unwrap();
    let region = Region::new(ALLOCATOR);
    let netmap = session.apply(patch, jiff::Timestamp::UNIX_EPOCH).unwrap().netmap.unwrap();
    let delta = region.change();
    let region = Region::new(ALLOCATOR);
    engine.handle_netmap(netmap, now);
    let followed = region.change();
    // Measured: 5.1 allocations a peer for the netmap's own tables, and 16 in all for the engine.
    assert!(delta.allocations <= 6 * MANY as usize, "{delta:?}");
    assert!(followed.allocations <= 50, "{followed:?}");
}

/// A peer comes, goes, or has other keys and endpoints, each minute, and somebody is sent a packet that it does not
/// answer.
fn a_day_of_churn() {
    let start = Instant::now();
    let (mut session, mut engine) = (Session::new(true), engine_at(start));
    let mut rng = StdRng::from_seed([3; 32]);
    let mut present: BTreeMap<u32, u32> = (1..=60).map(|id| (id, 0)).collect();
    engine.handle_netmap(
        apply(&mut session, whole(&present.iter().map(|(id, v)| peer(*id, *v)).collect::<Vec<_>>())),
        start,
    );
    let mut now = start;
    let mut region = Region::new(ALLOCATOR);
    let mut sent = 0;
    for minute in 0..24 * 60u32 {
        let id = rng.random_range(1..=60);
        let message = match (present.remove(&id), rng.random_range(0..3)) {
            (Some(_), 0) => json!({"PeersRemoved": [id]}),
            (version, _) => {
                let version = version.unwrap_or(minute) + 1;
                present.insert(id, version);
                json!({"PeersChanged": [peer(id, version)]})
            }
        };
        engine.handle_netmap(apply(&mut session, message), now);
        let asked = rng.random_range(1..=60);
        assert_eq!(knock(&mut engine, asked, now), present.contains_key(&asked), "minute {minute}, peer {asked}");
        let end = start + Duration::from_secs(60) * (minute + 1);
        sent += drain(&mut engine, now);
        while let Some((at, _)) = engine.next_deadline().filter(|(at, _)| *at <= end) {
            now = now.max(at);
            engine.handle_timeout(now);
            sent += drain(&mut engine, now);
        }
        now = end;
        if minute == 120 {
            region = Region::new(ALLOCATOR);
        }
    }
    // Measured: 5,161.
    let grown = kept(&region.change());
    assert!(grown.abs() < 65_536, "{grown} bytes more after 24 hours than after two");
    // Each peer costs at most the handshakes of a minute and a half, and pings.
    assert!(sent < 24 * 60 * 150, "{sent}");
    let everybody: Vec<u32> = present.keys().copied().collect();
    engine.handle_netmap(apply(&mut session, json!({"PeersRemoved": everybody})), now);
    for id in 1..=60 {
        assert!(!knock(&mut engine, id, now));
    }
    drain(&mut engine, now);
    let (at, why) = engine.next_deadline().unwrap();
    now = at;
    assert!(why.contains("netcheck") || why.contains("STUN"), "{why}");
    for _ in 0..100 {
        engine.handle_timeout(now);
        drain(&mut engine, now);
        now = engine.next_deadline().unwrap().0;
    }
    let netcheck = now - at;
    assert!(netcheck > Duration::from_secs(600), "who knows nobody only looks at the network: {netcheck:?}");
}
