//! Every kind of network with every other: which way packets take, how soon, and that they stay on it.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;

use super::nat_changes::network;
use crate::bed::Bed;
use crate::nat::{Kind, Network, Way};
use crate::nat_nodes::{Client, Peer, Start, side_by_side};
use crate::process::{tail, until};
use crate::say;

/// How long a path may take before the next pair has its turn. One that is found later is found all the same.
const FIRST_LOOK: Duration = Duration::from_millis(1_500);
/// How often meanwhile those before it that have none yet send something.
const OTHERS_TURN: Duration = Duration::from_millis(250);
/// How long all connections are kept busy and watched: two rounds of discovery, five seconds apart, and a bit.
const WATCH: Duration = Duration::from_millis(11_500);
/// How much later than tailscaled we may be: a bound, not a race.
const MARGIN: Duration = Duration::from_millis(1_000);
/// On a loaded machine a datagram may miss the moment in which a filter opens; the next round of discovery is 5 s later.
/// So many pairs may need it, and none a second one.
const UNLUCKY: usize = 3;
/// See [`UNLUCKY`].
const SECOND_ROUND: Duration = Duration::from_millis(6_500);

/// Pairs behind one NAT.
const NEIGHBOURS: [&str; 2] = ["one LAN", "one NAT, two LANs"];

/// One client's way to one peer.
struct Trip<'a> {
    pair: String,
    client: &'a Client<'a>,
    peer: &'a Peer,
    expected: Way,
    begun: Instant,
    stream: TcpStream,
    paths: Vec<(Duration, Option<SocketAddr>)>,
}

impl<'a> Trip<'a> {
    /// Sends the first bytes.
    fn begin(pair: String, client: &'a Client<'a>, peer: &'a Peer, expected: Way) -> Result<Self, Failed> {
        let begun = Instant::now();
        let stream = client.dial(peer, 7).map_err(|error| format!("{pair}: {}", error.message().unwrap_or("")))?;
        let mut trip = Self { pair, client, peer, expected, begun, stream, paths: Vec::new() };
        trip.echo()?;
        Ok(trip)
    }

    /// A few bytes there and back.
    fn echo(&mut self) -> Result<(), Failed> {
        let sent = [0x5a; 900];
        let mut back = [0; 900];
        let done = self.stream.write_all(&sent).and_then(|()| self.stream.read_exact(&mut back));
        done.map_err(|error| format!("{}: {error}", self.pair))?;
        if back == sent { Ok(()) } else { Err(format!("{}: the echo differs", self.pair).into()) }
    }

    /// Notes the path if it is another than before.
    fn look(&mut self) -> Result<(), Failed> {
        let path = self.client.path(self.peer)?;
        if self.paths.last().map_or(path.is_some(), |(_, last)| *last != path) {
            self.paths.push((self.begun.elapsed(), path));
        }
        Ok(())
    }

    /// The way now.
    fn way(&self) -> Way {
        Way::of(self.paths.last().and_then(|(_, path)| *path))
    }

    /// How long it took until packets went the way that they go now.
    fn until_direct(&self) -> Option<Duration> {
        self.paths.iter().find(|(_, path)| path.is_some()).map(|(at, _)| *at)
    }

    fn cell(&self) -> String {
        let way = self.way().name();
        match self.until_direct() {
            Some(at) => format!("{way:<10}{:>6} ms {:>2}", at.as_millis(), self.paths.len()),
            None => format!("{way:<10}{:>9} {:>2}", "", self.paths.len()),
        }
    }
}

/// Every kind of network with every other, ours and tailscaled's way side by side: as good, as fast, and no flapping.
pub(crate) fn every_pair_of_networks_gets_the_path_that_tailscaled_gets(bed: &Bed) -> Result<(), Failed> {
    let start = Instant::now();
    let nat = bed.nat()?;
    let starts = Kind::ALL.into_iter().map(|kind| -> Start<'_, _> { Box::new(move || nat.clients(bed, kind)) });
    let clients = side_by_side(starts.collect())?;
    for neighbour in &nat.neighbours {
        clients.iter().flatten().try_for_each(|client| neighbour.knows(client))?;
    }
    all_mappings_are_told(nat.peer(Kind::Open)?)?;
    say(&format!("         {:.1} s until all have joined", start.elapsed().as_secs_f32()));
    let mut trips = Vec::new();
    for (ours, clients) in Kind::ALL.into_iter().zip(&clients) {
        for (theirs, peer) in Kind::ALL.into_iter().zip(&nat.peers) {
            for client in clients {
                let pair = format!("{} -> {}", ours.name(), theirs.name());
                trips.push(Trip::begin(pair, client, peer, ours.way_to(theirs))?);
                first_look(&mut trips)?;
            }
        }
        for client in clients.iter().filter(|_| ours == Kind::Hard) {
            // They share a NAT, whose address the cone would know from the first.
            nat.internet.peers.iter().try_for_each(Network::forget_met)?;
            let pair = "hard -> cone".to_owned();
            trips.push(Trip::begin(pair, client, nat.peer(Kind::Cone)?, Kind::Hard.way_to(Kind::Cone))?);
            first_look(&mut trips)?;
        }
        for (pair, peer) in NEIGHBOURS.into_iter().zip(&nat.neighbours).filter(|_| ours == Kind::Easy) {
            for client in clients {
                trips.push(Trip::begin(pair.to_owned(), client, peer, Way::DirectV4)?);
                first_look(&mut trips)?;
            }
        }
    }
    say(&format!("         {:.1} s until all have been dialled", start.elapsed().as_secs_f32()));
    let watch = Instant::now();
    while watch.elapsed() < WATCH {
        let round = Instant::now();
        for trip in &mut trips {
            trip.echo()?;
            trip.look()?;
        }
        std::thread::sleep(Duration::from_secs(1).saturating_sub(round.elapsed()));
    }
    table(&trips);
    judge(&trips)
}

/// Looks at the newest one's path for a while. Those before it that are not on their way yet go on: without packets nobody
/// looks for a path, and one that nobody looks at has no time.
fn first_look(trips: &mut [Trip<'_>]) -> Result<(), Failed> {
    let Some((newest, others)) = trips.split_last_mut() else { return Ok(()) };
    loop {
        for trip in others.iter_mut().filter(|trip| trip.way() != trip.expected) {
            trip.echo()?;
            trip.look()?;
        }
        let turn = Instant::now();
        while turn.elapsed() < OTHERS_TURN {
            if newest.begun.elapsed() > FIRST_LOOK || newest.way() == newest.expected {
                return Ok(());
            }
            newest.look()?;
            std::thread::sleep(Duration::from_millis(4));
        }
    }
}

/// A host whose IPv4 address is of the range that tailnets have theirs from, which no peer is told, with IPv6 beside: a
/// peer without IPv6 is reached directly all the same.
pub(crate) fn a_carriers_address_leads_directly_to_a_peer(bed: &Bed) -> Result<(), Failed> {
    let nat = bed.nat()?;
    let (network, peer) = (network(&nat.internet.clients, Kind::Dual)?, nat.peer(Kind::Open)?);
    network.number_like_a_carrier(true)?;
    let direct = || {
        let client = nat.servers.tailcar(bed, Kind::Dual, &network.host)?;
        peer.knows(&client)?;
        let mut trip = Trip::begin("a carrier's address".to_owned(), &client, peer, Way::DirectV4)?;
        until(Duration::from_secs(10), "a direct path from a carrier's address", || {
            trip.echo()?;
            trip.look()?;
            Ok((trip.way() == Way::DirectV4).then_some(()))
        })
    };
    let result = direct();
    network.number_like_a_carrier(false)?;
    result
}

/// An IPv6 address without a route, as containers have: servers that are refused by the kernel are not waited for.
pub(crate) fn an_ipv6_address_without_a_route_delays_no_join(bed: &Bed) -> Result<(), Failed> {
    /// For so long after the first answer slower servers are waited for.
    const GRACE: Duration = Duration::from_millis(500);
    /// On a machine that has other things to do one join in so many is quick.
    const JOINS: usize = 5;
    let nat = bed.nat()?;
    let host = &network(&nat.internet.clients, Kind::Open)?.host;
    host.ip("addr add fd00::5/64 dev wan0 nodad")?;
    let quick = || {
        for _ in 0..JOINS {
            let sidecar = nat.servers.launch(bed, Kind::Open, host).ready()?;
            let log = sidecar.process.log();
            let taken = between(&log, "netmap changes=", "derp connected").ok_or_else(|| tail(&log))?;
            say(&format!("         home connected {taken:.2?} after the first netmap"));
            if taken < GRACE {
                return Ok(());
            }
        }
        Err(format!("no home within {GRACE:?} in {JOINS} joins").into())
    };
    let result = quick();
    host.ip("addr del fd00::5/64 dev wan0")?;
    result
}

/// The time between the first lines of a log that contain these texts, by the lines' own stamps; less than a day.
fn between(log: &str, first: &str, second: &str) -> Option<Duration> {
    // The time of day in a stamp such as 2026-11-23T10:05:41.027404Z.
    let stamp = |text: &str| {
        let line = log.lines().find(|line| line.contains(text))?;
        let (_, time) = line.split_whitespace().next()?.trim_end_matches('Z').split_once('T')?;
        time.split(':').try_fold(0.0, |whole, part| Some(whole * 60.0 + part.parse::<f64>().ok()?))
    };
    Some(Duration::from_secs_f64((stamp(second)? - stamp(first)?).rem_euclid(86_400.0)))
}

/// A NAT that maps to another port for each destination has us tell what every STUN server saw.
fn all_mappings_are_told(peer: &Peer) -> Result<(), Failed> {
    until(Duration::from_secs(10), "two mappings of the hard client at control", || {
        let endpoints = peer.endpoints_of("tailcar-hard")?;
        let outside = endpoints.iter().filter(|endpoint| endpoint.ip() == IpAddr::from([203, 0, 113, 12]));
        Ok((outside.count() >= 2).then_some(()))
    })
}

/// Prints what was found, a line a pair: the way, milliseconds from the first packet until it was direct, and how often
/// it changed.
fn table(trips: &[Trip<'_>]) {
    say(&format!("         {:<20}{:<12}{:<24}tailscaled", "", "expected", "tailcar"));
    for pair in trips.chunks_exact(2) {
        let [ours, theirs] = pair else { continue };
        let (ours_cell, theirs_cell) = (ours.cell(), theirs.cell());
        say(&format!("         {:<20}{:<12}{ours_cell:<24}{theirs_cell}", ours.pair, ours.expected.name()));
    }
}

/// Holds every pair to what it should have been.
fn judge(trips: &[Trip<'_>]) -> Result<(), Failed> {
    let (mut wrong, mut late) = (Vec::new(), Vec::new());
    for pair in trips.chunks_exact(2) {
        let [ours, theirs] = pair else { continue };
        // Of two families that both work, the one whose pong came later by more than a load explains loses.
        if (ours.way() == Way::Relayed) != (ours.expected == Way::Relayed) {
            wrong.push(format!("{}: {}, not {}", ours.pair, ours.way().name(), ours.expected.name()));
        }
        if ours.way() == Way::Relayed && theirs.way() != Way::Relayed {
            wrong.push(format!("{}: tailscaled's way is direct", ours.pair));
        }
        if ours.expected == Way::DirectV6 && ours.way() == Way::DirectV4 && theirs.way() == Way::DirectV6 {
            wrong.push(format!("{}: tailscaled's way is by IPv6", ours.pair));
        }
        if let (Some(our_time), Some(their_time)) = (ours.until_direct(), theirs.until_direct())
            && our_time > their_time + MARGIN
        {
            let said = format!("{}: {our_time:?} until direct, tailscaled {their_time:?}", ours.pair);
            if our_time > their_time.max(SECOND_ROUND) { wrong.push(said) } else { late.push(said) }
        }
        // Another direct path may turn out to be better; back to the relay, or back and forth, is flapping.
        let lost = ours.paths.iter().any(|(_, path)| path.is_none());
        if lost || ours.paths.len() > 3 {
            wrong.push(format!("{}: it flaps: {:?}", ours.pair, ours.paths));
        }
    }
    if late.len() > UNLUCKY {
        wrong.append(&mut late);
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n").into()) }
}
