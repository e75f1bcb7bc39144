//! What changes while packets flow: a NAT's address and mappings, a peer's process and port.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;

use crate::bed::Bed;
use crate::nat::Kind;
use crate::nat_nodes::{Client, Peer, Servers};
use crate::process::until;
use crate::say;
use crate::tailscaled::{Role, Tailscaled};

/// The longest pause while a NAT's address changes: an old path is trusted for 6.5 s, on either side, and TCP's own pause
/// before it tries again may have grown to 12.8 s by then.
const LONGEST_PAUSE: Duration = Duration::from_secs(20);
/// How soon a peer that is back must be found.
const FOUND: Duration = Duration::from_secs(5);

/// The NAT in front of us gets another address: the connection goes on, the path is direct again, control is told.
pub(crate) fn a_nat_that_gets_another_address_interrupts_for_seconds(bed: &Bed) -> Result<(), Failed> {
    let nat = bed.nat()?;
    let clients = nat.clients(bed, Kind::Easy)?;
    let peer = nat.peer(Kind::Easy)?;
    let network = nat.internet.clients.iter().find(|network| network.kind == Kind::Easy).ok_or("no easy client")?;
    let streams = connect(&clients, peer)?;
    let over = AtomicBool::new(false);
    let result = thread::scope(|scope| {
        let workers: Vec<_> = streams.into_iter().map(|stream| scope.spawn(|| longest_pause(stream, &over))).collect();
        let renumbered = network.renumber(true).and_then(|address| {
            until(Duration::from_secs(30), "direct paths by the NAT's new address", || {
                let seen = clients.iter().map(|client| peer.path_to(client)).collect::<Result<Vec<_>, _>>()?;
                let by_it = |path: &Option<SocketAddr>| path.is_some_and(|path| path.ip() == address);
                Ok(seen.iter().all(by_it).then_some(()))
            })?;
            until(Duration::from_secs(10), "control to know the new address", || {
                let told = peer.endpoints_of("tailcar-easy")?;
                Ok(told.iter().any(|endpoint| endpoint.ip() == address).then_some(()))
            })
        });
        over.store(true, Ordering::Relaxed);
        let pauses: Result<Vec<Duration>, Failed> =
            workers.into_iter().map(|worker| worker.join().map_err(|_| "it panicked")?).collect();
        renumbered.and(pauses)
    });
    network.renumber(false)?;
    let pauses = result?;
    say(&format!("         longest pause: tailcar {:?}, tailscaled {:?}", pauses[0], pauses[1]));
    match pauses[0] > LONGEST_PAUSE {
        true => Err(format!("{:?} without an answer, tailscaled {:?}", pauses[0], pauses[1]).into()),
        false => Ok(()),
    }
}

/// A peer that comes back as another process, with another disco key on another port, is found in less than 5 s, by
/// what waits for it and by what comes then.
pub(crate) fn a_peer_that_restarts_is_found_in_seconds(bed: &Bed) -> Result<(), Failed> {
    let nat = bed.nat()?;
    let host = &nat.internet.peers.iter().find(|network| network.kind == Kind::Open).ok_or("no open peer")?.host;
    let (control, state) = (Servers::url(Kind::Open), bed.folder.join("again.state"));
    let places = nat.servers.places(bed, &control);
    let state = format!("--state={}", state.display());
    let [first, second] = [[state.as_str(), "--port=41701"], [state.as_str(), "--port=41702"]];
    let role = Role { hostname: "again", tun: "userspace-networking", daemon: &first, up: &[] };
    let before = Tailscaled::join(&places, host, &role, &nat.servers.key().secret)?;
    let mut peer = Peer::new("again", before)?;
    let clients = nat.clients(bed, Kind::Dual)?;
    clients.iter().try_for_each(|client| peer.knows(client))?;
    let streams = connect(&clients, &peer)?;
    peer.daemon.process.end();
    drop(streams);
    let dials = thread::scope(|scope| {
        let waiting = clients.each_ref().map(|client| scope.spawn(|| dialled(client, &peer)));
        let after = Tailscaled::resume(&places, host, &Role { daemon: &second, ..role });
        let back = Instant::now();
        let then = clients.each_ref().map(|client| scope.spawn(|| dialled(client, &peer)));
        let waiting = waiting.map(|dial| dial.join().unwrap_or_else(|_| Err("it panicked".into())));
        let then = then.map(|dial| dial.join().unwrap_or_else(|_| Err("it panicked".into())));
        after.map(|after| (after, back, waiting, then))
    });
    let (after, back, waiting, then) = dials?;
    let since = |dial: &Result<Instant, Failed>| match dial {
        Ok(at) => format!("{:?}", at.saturating_duration_since(back)),
        Err(error) => error.message().unwrap_or("failed").to_owned(),
    };
    for (name, index) in [("tailcar", 0), ("tailscaled", 1)] {
        say(&format!(
            "         {name}: a dial that waited {}, a new one {}",
            since(&waiting[index]),
            since(&then[index])
        ));
    }
    drop(after);
    let ([waited, _], [new, _]) = (waiting, then);
    let late = waited?.max(new?).saturating_duration_since(back);
    if late < FOUND { Ok(()) } else { Err(format!("found after {late:?}").into()) }
}

/// A connection by each client, on a direct path.
fn connect(clients: &[Client<'_>; 2], peer: &Peer) -> Result<Vec<TcpStream>, Failed> {
    let mut streams = clients.iter().map(|client| client.dial(peer, 7)).collect::<Result<Vec<_>, _>>()?;
    until(Duration::from_secs(15), "direct paths", || {
        streams.iter_mut().try_for_each(echo)?;
        Ok(clients.iter().all(|client| is_direct(client, peer)).then_some(()))
    })?;
    Ok(streams)
}

fn is_direct(client: &Client<'_>, peer: &Peer) -> bool {
    client.path(peer).is_ok_and(|path| path.is_some())
}

/// When a dial was answered by the echo behind it.
fn dialled(client: &Client<'_>, peer: &Peer) -> Result<Instant, Failed> {
    echo(&mut client.dial(peer, 7)?)?;
    Ok(Instant::now())
}

fn echo(stream: &mut TcpStream) -> Result<(), Failed> {
    stream.write_all(&[7; 32])?;
    Ok(stream.read_exact(&mut [0; 32])?)
}

/// Keeps a connection busy until it is told that all is over; the longest time that an answer took.
fn longest_pause(mut stream: TcpStream, over: &AtomicBool) -> Result<Duration, Failed> {
    let mut longest = Duration::ZERO;
    while !over.load(Ordering::Relaxed) {
        let sent = Instant::now();
        echo(&mut stream)?;
        longest = longest.max(sent.elapsed());
        thread::sleep(Duration::from_millis(20));
    }
    Ok(longest)
}
