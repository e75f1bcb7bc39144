//! What changes while packets flow: a NAT's address and mappings, a peer's process and port.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;

use crate::bed::Bed;
use crate::nat::{Kind, Network};
use crate::nat_nodes::{Client, Peer, Servers};
use crate::process::{output, until};
use crate::tailscaled::{Role, Tailscaled};
use crate::{say, words};

/// The longest pause while a NAT's address changes. It takes a second; a path whose trust must end first, 6.5 s, and
/// TCP's own pause before it tries again, which has grown to 12.8 s by then, cost tailscaled 12.6 s.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// What begins to show only after a change looks done: so many answers more must come, or the pause is too long anyway.
const FURTHER: usize = 50;
const STALLED: Duration = Duration::from_millis(7500);
/// How soon a peer must be reached by a new address that control has told others.
const FOLLOWED: Duration = Duration::from_millis(1_500);
/// A peer that has nobody new to hear of says nothing to its relay for so long, and more.
const QUIET: Duration = Duration::from_secs(3);
/// How soon a peer that is back must be found.
const FOUND: Duration = Duration::from_secs(5);

/// The NAT in front of us gets another address: the connection goes on, the path is direct again, control is told.
pub(crate) fn a_nat_that_gets_another_address_interrupts_for_seconds(bed: &Bed) -> Result<(), Failed> {
    let nat = bed.nat()?;
    let (clients, peer) = (nat.clients(bed, Kind::Easy)?, nat.peer(Kind::Easy)?);
    let network = network(&nat.internet.clients, Kind::Easy)?;
    let result = interrupted("our NAT has another address", &clients, peer, || {
        let address = network.renumber(true)?;
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
    network.renumber(false)?;
    result
}

/// The NAT in front of the peer gets another address, of which nobody can tell us before the peer notices: our NAT lets
/// in nothing from there, and to the peer's relay and control its connections seem to be alive. Where the peer has
/// something to say to one of them it notices at once; a quiet one when its trust in the path has ended, 6.2-9 s later.
pub(crate) fn a_peer_whose_nat_gets_another_address_is_followed(bed: &Bed) -> Result<(), Failed> {
    let nat = bed.nat()?;
    let (clients, peer) = (nat.clients(bed, Kind::Easy)?, nat.peer(Kind::Easy)?);
    let network = network(&nat.internet.peers, Kind::Easy)?;
    let (mut noticed, mut told) = (Duration::ZERO, Duration::ZERO);
    let result = pauses("the peer's NAT has another address", &clients, peer, || {
        // Late enough that the peer has nothing more to say of those who joined.
        thread::sleep(QUIET);
        let begun = Instant::now();
        let address = network.renumber(true)?;
        until(Duration::from_secs(30), "the peer to notice", || Ok(peer.is_at(address)?.then_some(())))?;
        noticed = begun.elapsed();
        // What the peer needs to reach control, and control to tell it, is no doing of ours.
        until(Duration::from_secs(30), "others to be told of the new address", || {
            let endpoints = nat.peer(Kind::Open)?.endpoints_of(&peer.name)?;
            Ok(endpoints.iter().any(|endpoint| endpoint.ip() == address).then_some(()))
        })?;
        told = begun.elapsed();
        until(Duration::from_secs(60), "direct paths to the NAT's new address", || {
            let seen = clients.iter().map(|client| client.path(peer)).collect::<Result<Vec<_>, _>>()?;
            let by_it = |path: &Option<SocketAddr>| path.is_some_and(|path| path.ip() == address);
            Ok(seen.iter().all(by_it).then_some(()))
        })
    });
    network.renumber(false)?;
    say(&format!("         the peer noticed after {noticed:.2?}, and others were told after {told:.2?}"));
    match result?[0] > told + FOLLOWED {
        true => Err(format!("others were told after {told:?}, and the peer was not followed soon").into()),
        false => Ok(()),
    }
}

/// The NAT in front of us forgets all connections: an easy one maps as before, a hard one to another port.
pub(crate) fn a_nat_that_forgets_its_mappings_interrupts_for_seconds(bed: &Bed) -> Result<(), Failed> {
    let nat = bed.nat()?;
    for (ours, theirs) in [(Kind::Easy, Kind::Easy), (Kind::Hard, Kind::Open)] {
        let (clients, peer) = (nat.clients(bed, ours)?, nat.peer(theirs)?);
        let network = network(&nat.internet.clients, ours)?;
        let what = format!("{} NAT flushed, peer {}", ours.name(), theirs.name());
        interrupted(&what, &clients, peer, || {
            let before = paths_to(&clients, peer)?;
            network.forget()?;
            until(Duration::from_secs(30), "direct paths by the new mappings", || {
                let now = clients.iter().map(|client| peer.path_to(client)).collect::<Result<Vec<_>, _>>()?;
                let wanted = |(now, before): (&Option<SocketAddr>, &SocketAddr)| {
                    now.is_some_and(|now| ours == Kind::Easy || now != *before)
                };
                Ok(now.iter().zip(&before).all(wanted).then_some(()))
            })
        })?;
    }
    Ok(())
}

/// A firewall of the machine itself refuses UDP from one moment to the next: the connection goes on by the relay, and
/// is direct again soon after it may be. Then the administrator destroys the sockets: others are bound.
pub(crate) fn a_machine_that_refuses_datagrams_and_destroys_sockets_interrupts_for_moments(
    bed: &Bed,
) -> Result<(), Failed> {
    let nat = bed.nat()?;
    let (clients, peer) = (nat.clients(bed, Kind::Six)?, nat.peer(Kind::Six)?);
    let host = &network(&nat.internet.clients, Kind::Six)?.host;
    const REFUSED: &str = "chain out { type filter hook output priority 0; meta l4proto udp drop; }; ";
    const DROPPED: &str = "chain in { type filter hook input priority 0; meta l4proto udp drop; }; ";
    let directs = |wanted: bool| move |client: &Client<'_>| is_direct(client, peer) == wanted;
    let refused = |what: &str, chains: &str| {
        interrupted(what, &clients, peer, || {
            host.nft(&format!("table inet own {{ {chains} }}"))?;
            until(Duration::from_secs(30), "the relay", || Ok(clients.iter().all(directs(false)).then_some(())))?;
            host.nft("delete table inet own")?;
            until(Duration::from_secs(30), "a direct path", || Ok(clients.iter().all(directs(true)).then_some(())))
        })
    };
    let result = refused("our own firewall refuses UDP", REFUSED)
        .and_then(|()| refused("our own firewall refuses UDP, both ways", &format!("{REFUSED}{DROPPED}")));
    host.nft("table inet own { }\ndelete table inet own")?;
    result?;
    interrupted("our UDP sockets are destroyed", &clients, peer, || {
        let before = paths_to(&clients[..1], peer)?;
        let mut command = host.command("ss");
        command.args(["--kill", "--udp", "--all"]);
        output(command)?;
        until(Duration::from_secs(30), "a direct path to another port", || {
            let after = peer.path_to(&clients[0])?;
            Ok(after.filter(|after| *after != before[0]).map(drop))
        })
    })
}

/// Where the peer sends packets for each client, once it does so directly.
fn paths_to(clients: &[Client<'_>], peer: &Peer) -> Result<Vec<SocketAddr>, Failed> {
    until(Duration::from_secs(15), "direct paths by what the peer says", || {
        clients.iter().map(|client| peer.path_to(client)).collect()
    })
}

/// Holds our longest pause while something changes to its bound.
fn interrupted(
    what: &str,
    clients: &[Client<'_>; 2],
    peer: &Peer,
    change: impl FnOnce() -> Result<(), Failed>,
) -> Result<(), Failed> {
    let [ours, theirs] = pauses(what, clients, peer, change)?;
    match ours > LONGEST_PAUSE {
        true => Err(format!("{what}: {ours:?} without an answer, tailscaled {theirs:?}").into()),
        false => Ok(()),
    }
}

/// How long a busy connection pauses, at most, while something changes, until that is over, and for some answers more:
/// ours and tailscaled's, which are told.
fn pauses(
    what: &str,
    clients: &[Client<'_>; 2],
    peer: &Peer,
    change: impl FnOnce() -> Result<(), Failed>,
) -> Result<[Duration; 2], Failed> {
    let streams = connect(clients, peer)?;
    let (over, answers) = (AtomicBool::new(false), [const { AtomicUsize::new(0) }; 2]);
    let pauses = thread::scope(|scope| {
        let workers: Vec<_> = streams
            .into_iter()
            .zip(&answers)
            .map(|(stream, answers)| scope.spawn(|| longest_pause(stream, answers, &over)))
            .collect();
        let changed = change();
        if changed.is_ok() {
            go_on(&answers);
        }
        over.store(true, Ordering::Relaxed);
        let pauses: Result<Vec<Duration>, Failed> =
            workers.into_iter().map(|worker| worker.join().map_err(|_| "it panicked")?).collect();
        changed.and(pauses)
    })?;
    say(&format!("         {what}: longest pause {:.2?}, tailscaled {:.2?}", pauses[0], pauses[1]));
    Ok([pauses[0], pauses[1]])
}

/// Waits for further answers to both, as long as is of use.
fn go_on(answers: &[AtomicUsize; 2]) {
    let (begun, so_far) = (Instant::now(), answers.each_ref().map(|answers| answers.load(Ordering::Relaxed)));
    let came = |(answers, so_far): (&AtomicUsize, usize)| answers.load(Ordering::Relaxed) >= so_far + FURTHER;
    while begun.elapsed() < STALLED && !answers.iter().zip(so_far).all(came) {
        thread::sleep(Duration::from_millis(20));
    }
}

/// The network of a kind.
pub(super) fn network(networks: &[Network], kind: Kind) -> Result<&Network, Failed> {
    Ok(networks.iter().find(|network| network.kind == kind).ok_or("no such network")?)
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
        Err(error) => words(error).to_owned(),
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

/// Keeps a connection busy until it is told that all is over, and counts the answers; the longest time that one took.
fn longest_pause(mut stream: TcpStream, answers: &AtomicUsize, over: &AtomicBool) -> Result<Duration, Failed> {
    let mut longest = Duration::ZERO;
    while !over.load(Ordering::Relaxed) {
        let sent = Instant::now();
        echo(&mut stream)?;
        longest = longest.max(sent.elapsed());
        answers.fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(20));
    }
    Ok(longest)
}
