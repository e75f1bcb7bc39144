//! Connections that rest for longer than a NAT remembers: whoever speaks first is heard at once.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::Value;

use crate::bed::Bed;
use crate::client;
use crate::nat_nodes::{local_status, peers_of};
use crate::process::until;
use crate::sidecar::Launch;
use crate::tailscaled::{Role, Tailscaled};
use crate::{say, words};

/// WireGuard's last packet of its own comes 10 s after the last data, both ends ping each other for up to 48 s after that,
/// and 8 s later the NAT forgets. At 75 s TCP would ask whether its peer is still there.
const REST: Duration = Duration::from_secs(72);
/// How long before the end of the rest the NAT must have forgotten: whoever speaks first, nobody has yet.
const FORGOTTEN: Duration = Duration::from_secs(1);
/// The NAT's address and the peer's.
const NAT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 43));
const WEB: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 31));
/// How soon after its rest a connection must be heard.
const HEARD: Duration = Duration::from_secs(2);

/// How long the first bytes took after the rest.
struct Late {
    /// Ours, and their echo.
    ours: Duration,
    /// The peer's.
    theirs: Duration,
}

/// By a sidecar and by a tailscaled, behind a NAT whose UDP mappings last for 8 s.
pub(crate) fn a_connection_outlives_its_mapping(bed: &Bed) -> Result<(), Failed> {
    let host = &bed.hosts.idle;
    let sidecars = [Launch::new(bed).on(host).ready()?, Launch::new(bed).on(host).ready()?];
    let daemon = |name: &str, port: &str, socks: &str| {
        let flags = [&format!("--port={port}"), "--socks5-server", socks];
        let role = Role { hostname: name, tun: "userspace-networking", daemon: &flags, up: &[] };
        Tailscaled::join(&bed.places(), host, &role, &bed.key.secret)
    };
    let socks = ["127.0.0.1:1081", "127.0.0.1:1082"];
    let daemons = [daemon("reference-idle", "41651", socks[0])?, daemon("reference-idle2", "41652", socks[1])?];
    let mut addresses = [const { Vec::new() }; 2];
    for (sidecar, daemon) in sidecars.iter().zip(&daemons) {
        addresses[0].push(sidecar.ready["node"]["addresses"][0].as_str().ok_or("no address")?.to_owned());
        addresses[1].push(daemon.addresses()?.first().ok_or("no address")?.clone());
    }
    let by_sidecar = |index: usize, port| sidecars[index].dial("web", port);
    let by_daemon = |index: usize, port| {
        // It fails until the netmap is there, instead of waiting for it.
        until(Duration::from_secs(20), "a connection by tailscaled", || {
            let proxy = client::connect(host, socks[index].parse()?)?;
            let (code, stream) = client::socks5(proxy, bed.web4(), port)?;
            Ok((code == 0).then_some(stream))
        })
    };
    let (ours, theirs) = thread::scope(|scope| {
        let ours = scope.spawn(|| rest(bed, &addresses[0], &by_sidecar));
        let theirs = scope.spawn(|| rest(bed, &addresses[1], &by_daemon));
        let joined =
            |worker: thread::ScopedJoinHandle<'_, _>| worker.join().unwrap_or_else(|_| Err("it panicked".into()));
        (joined(ours), joined(theirs))
    });
    drop(daemons);
    let told = |late: &Result<Late, Failed>| match late {
        Ok(late) => format!(
            "{} ms when we speak first, {} ms when the peer does",
            late.ours.as_millis(),
            late.theirs.as_millis()
        ),
        Err(error) => words(error).to_owned(),
    };
    say(&format!("         after {} s of rest: {}; tailscaled {}", REST.as_secs(), told(&ours), told(&theirs)));
    let late = ours?;
    let worst = late.ours.max(late.theirs);
    if worst < HEARD { Ok(()) } else { Err(format!("heard after {worst:?}").into()) }
}

/// Two connections by the two nodes of these addresses, both on direct paths: one on which we speak after the rest, one
/// on which the peer does. By then the NAT has mappings for neither.
fn rest(
    bed: &Bed,
    nodes: &[String],
    dial: &(dyn Fn(usize, u16) -> Result<TcpStream, Failed> + Sync),
) -> Result<Late, Failed> {
    let (mut talks, mut listens) = (dial(0, 7)?, dial(1, 80)?);
    // Its patience is for what comes within a scenario's usual time.
    listens.set_read_timeout(Some(REST * 2))?;
    let mut warm = dial(1, 7)?;
    let paths = until(Duration::from_secs(20), "direct paths on both ends", || {
        echo(&mut talks)?;
        echo(&mut warm)?;
        paths(bed, nodes)
    })?;
    let known = mapped(bed, &paths)?;
    if known != paths {
        return Err(format!("the peer sends to {paths:?}, of which the NAT has mapped {known:?}").into());
    }
    drop(warm);
    let begun = Instant::now();
    let request = format!("GET /slow?ms={} HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n", REST.as_millis());
    listens.write_all(request.as_bytes())?;
    let listener = thread::spawn(move || listens.read_exact(&mut [0; 1]).map(|()| begun.elapsed()));
    thread::sleep((REST - FORGOTTEN).saturating_sub(begun.elapsed()));
    let known = mapped(bed, &paths)?;
    if !known.is_empty() {
        return Err(format!("the NAT still has mapped {known:?}").into());
    }
    thread::sleep(REST.saturating_sub(begun.elapsed()));
    let sent = Instant::now();
    echo(&mut talks)?;
    let ours = sent.elapsed();
    let heard = listener.join().map_err(|_| "the listener panicked")??;
    Ok(Late { ours, theirs: heard.saturating_sub(REST) })
}

/// Where the peer sends packets for nodes behind the NAT, if it does so directly for all of them.
fn paths(bed: &Bed, nodes: &[String]) -> Result<Option<Vec<SocketAddr>>, Failed> {
    let status = local_status(bed.web().socket())?;
    let path = |node: &String| {
        let is_node =
            |peer: &&Value| peer["TailscaleIPs"].as_array().is_some_and(|ips| ips.iter().any(|ip| ip == node.as_str()));
        let path: SocketAddr = peers_of(&status).find(is_node)?["CurAddr"].as_str()?.parse().ok()?;
        (path.ip() == NAT).then_some(path)
    };
    Ok(nodes.iter().map(path).collect())
}

/// Those of the paths by which the NAT would let the peer's packets in.
fn mapped(bed: &Bed, paths: &[SocketAddr]) -> Result<Vec<SocketAddr>, Failed> {
    let mappings = bed.hosts.idle_nat.mappings()?;
    let leads = |path: &&SocketAddr| mappings.iter().any(|it| it.peer.ip() == WEB && it.mapped == **path);
    Ok(paths.iter().filter(leads).copied().collect())
}

fn echo(stream: &mut TcpStream) -> Result<(), Failed> {
    stream.write_all(&[7; 32])?;
    Ok(stream.read_exact(&mut [0; 32])?)
}
