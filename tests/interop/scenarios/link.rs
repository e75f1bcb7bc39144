//! The machine's network becomes another in mid-download: the download goes on, control and DERP are reached anew.

use std::io::{Read as _, Write as _};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use ring::digest::{Context, SHA256};
use rustix::process::Signal;

use crate::bed::{Bed, TRAP};
use crate::namespace::Namespace;
use crate::process::{Process, output, tail, until};
use crate::sidecar::{Launch, Sidecar};
use crate::testcontrol::TestControl;

/// How much is downloaded, and how fast the wire is: it takes some five seconds.
const SIZE: u64 = 24 << 20;
const RATE: &str = "rate 40mbit burst 64kb latency 100ms";
/// The network changes once so much has arrived.
const UNDER_WAY: u64 = 2 << 20;
/// How long the download may pause, and how long control and DERP may take to be back: a machine under load is slow, and
/// what would be waited for without our doing is minutes.
const PAUSE_MOST: Duration = Duration::from_secs(20);
pub(super) const BACK_MOST: Duration = Duration::from_secs(20);
/// How long the process is stopped. What is waited for is the stop itself.
const STOPPED: Duration = Duration::from_secs(8);

/// Where these scenarios have control and its relays.
pub(super) const ADDRESS: &str = "10.99.0.6";
/// From whom it is downloaded.
const PEER: &str = "link-web";

/// What the log says of changes, and of connections that were made.
const CHANGED: &str = "the network changed";
pub(super) const CONTROL: &str = "map stream open";
pub(super) const DERP: &str = "derp connected region=";

/// Another address instead of the first.
pub(crate) fn a_new_address_in_place_of_the_old_one_stops_no_download(bed: &Bed) -> Result<(), Failed> {
    replace_address(bed, &[], "another address")
}

/// The same by DERP alone: all stands still until that is connected from the new address.
pub(crate) fn a_new_address_stops_no_relayed_download(bed: &Bed) -> Result<(), Failed> {
    replace_address(bed, &["--transport", "derp"], "another address, relayed")
}

/// The same where the kernel tells nothing and shows no addresses: we look now and then.
pub(crate) fn a_new_address_stops_no_download_in_a_sandbox_without_netlink(bed: &Bed) -> Result<(), Failed> {
    let (_servers, mut sidecar) = begin_as(bed, Launch::sandboxed)?;
    sidecar.process.says("the kernel tells nothing of network changes", Duration::from_secs(1))?;
    let pause = download(&sidecar, || {
        bed.hosts.link.ip(&format!(
            "addr del 10.99.0.25/24 dev eth0\naddr add 10.99.0.27/24 dev eth0\nroute add default via {TRAP}"
        ))?;
        back(&sidecar, "the default route moved")
    })?;
    told(&sidecar, "another address, no netlink", pause)
}

/// Another interface by a rule and a table of its own, of which the main table shows nothing.
pub(crate) fn a_rule_that_moves_all_packets_stops_no_relayed_download(bed: &Bed) -> Result<(), Failed> {
    let host = &bed.hosts.link;
    let (_servers, sidecar) = begin(bed, &["--transport", "derp"])?;
    host.ip("addr add 10.99.0.26/24 dev eth1 noprefixroute")?;
    let pause = download(&sidecar, || {
        host.nft(
            "table inet foreign { chain out { type filter hook output priority 0; \
             ip saddr 10.99.0.25 drop; }; }",
        )?;
        host.ip(&format!(
            "route add default via {TRAP} dev eth1 src 10.99.0.26 onlink table 77\n\
             route add 10.99.0.0/24 dev eth1 src 10.99.0.26 table 77\nrule add priority 100 table 77"
        ))?;
        back(&sidecar, "the default route moved")
    });
    let restored = restore(host);
    let pause = pause?;
    restored?;
    told(&sidecar, "another interface by a rule, relayed", pause)
}

fn replace_address(bed: &Bed, args: &[&str], what: &str) -> Result<(), Failed> {
    let (_servers, sidecar) = begin(bed, args)?;
    // An interface without an address is nothing to us.
    bed.hosts.link.ip("link add idle0 type veth peer name idle1\nlink set idle0 up\nlink set idle1 up")?;
    let pause = download(&sidecar, || {
        bed.hosts.link.ip(&format!(
            "addr del 10.99.0.25/24 dev eth0\naddr add 10.99.0.27/24 dev eth0\nroute add default via {TRAP}"
        ))?;
        back(&sidecar, "an address is gone")
    });
    bed.hosts.link.ip("link del idle0")?;
    told(&sidecar, what, pause?)?;
    match changes(&sidecar).first() {
        Some(first) if first.contains("an address is gone") => Ok(()),
        other => Err(format!("the idle interface was taken for a change: {other:?}").into()),
    }
}

/// The interface goes down, and comes back once that was noticed.
pub(crate) fn an_interface_that_goes_and_comes_back_stops_no_download(bed: &Bed) -> Result<(), Failed> {
    let (_servers, sidecar) = begin(bed, &[])?;
    let pause = download(&sidecar, || {
        bed.hosts.link.ip("link set eth0 down")?;
        until(BACK_MOST, "the change in the log", || Ok((!changes(&sidecar).is_empty()).then_some(())))?;
        bed.hosts.link.ip(&format!("link set eth0 up\nroute add default via {TRAP}"))?;
        // They may be back before it is told that the interface is.
        back(&sidecar, "an address is gone")
    })?;
    told(&sidecar, "an interface down and up", pause)
}

/// Another gateway, which like any NAT or firewall lets no connection pass that it has not seen begin. The address
/// stays: only asking finds out that those to control and DERP are dead.
pub(crate) fn a_gateway_that_knows_no_connection_stops_no_download(bed: &Bed) -> Result<(), Failed> {
    let host = &bed.hosts.link;
    let (_servers, sidecar) = begin(bed, &[])?;
    let pause = download(&sidecar, || {
        forget_connections(host)?;
        host.ip("route replace default via 10.99.0.253 dev eth0")?;
        back(&sidecar, "the default route moved")
    });
    host.nft("table inet foreign { }\ndelete table inet foreign")?;
    told(&sidecar, "another gateway", pause?)
}

/// A filter of this machine lets no UDP through any more, while we have nothing to send but acknowledgements: the peer has
/// to hear of it before its own trust in the path ends.
pub(crate) fn a_filter_of_the_machine_that_drops_udp_stops_no_download(bed: &Bed) -> Result<(), Failed> {
    // The peer's TCP tries again after 3.0 s in all, and after 6.2 s, about when its trust ends.
    const SOON: Duration = Duration::from_millis(4_600);
    let host = &bed.hosts.link;
    let (_servers, sidecar) = begin(bed, &[])?;
    let pause = download(&sidecar, || {
        host.nft(
            "table inet foreign { chain out { type filter hook output priority 0; meta l4proto udp drop; }; \
             chain in { type filter hook input priority 0; meta l4proto udp drop; }; }",
        )?;
        Ok(None)
    });
    restore(host)?;
    let pause = pause?;
    match pause.longest < SOON {
        true => told(&sidecar, "no UDP through the machine's own filter", pause),
        false => Err(format!("the download paused for {:?}\n{}", pause.longest, tail(&sidecar.process.log())).into()),
    }
}

/// Something between forgets the connections that there are, without a word, and nothing changes here: only that nothing
/// is acknowledged any more tells that the one to the relay is dead.
pub(crate) fn a_firewall_that_forgets_connections_stops_no_relayed_download(bed: &Bed) -> Result<(), Failed> {
    let (_servers, sidecar) = begin(bed, &["--transport", "derp"])?;
    let connected = || sidecar.process.log().matches(DERP).count();
    let before = connected();
    let pause = download(&sidecar, || {
        let mut command = bed.hosts.link.command("ss");
        command.args(["-Htn", "state", "established", "dst", "10.99.0.0/24"]);
        let local = output(command)?;
        let ports: Vec<&str> =
            local.lines().filter_map(|line| Some(line.split_whitespace().nth(2)?.rsplit_once(':')?.1)).collect();
        let ports = ports.join(", ");
        bed.hosts.wan.nft(&format!(
            "table inet forgotten {{ chain in {{ type filter hook input priority 0; \
             ip saddr 10.99.0.25 tcp sport {{ {ports} }} drop; }}; \
             chain out {{ type filter hook output priority 0; \
             ip daddr 10.99.0.25 tcp dport {{ {ports} }} drop; }}; }}"
        ))?;
        until(BACK_MOST, "DERP to be back", || Ok((connected() > before).then_some(None)))
    });
    bed.hosts.wan.nft("table inet forgotten { }\ndelete table inet forgotten")?;
    match changes(&sidecar).as_slice() {
        [] => told(&sidecar, "connections forgotten, relayed", pause?),
        changes => Err(format!("the network changed: {changes:?}").into()),
    }
}

/// By another interface, relayed: what comes from the first one's address would be lost there.
pub(crate) fn another_interface_stops_no_relayed_download(bed: &Bed) -> Result<(), Failed> {
    let host = &bed.hosts.link;
    let (_servers, sidecar) = begin(bed, &["--transport", "derp"])?;
    let pause = download(&sidecar, || {
        host.nft(
            "table inet foreign { chain out { type filter hook output priority 0; \
             oifname eth1 ip saddr 10.99.0.25 drop; }; }",
        )?;
        host.ip(&format!(
            "addr add 10.99.0.26/24 dev eth1\nroute replace default via {TRAP} dev eth1 src 10.99.0.26\n\
             route del 10.99.0.0/24 dev eth0"
        ))?;
        back(&sidecar, "the default route moved")
    });
    host.nft("table inet foreign { }\ndelete table inet foreign")?;
    told(&sidecar, "another interface, relayed", pause?)
}

/// The process is stopped for a while, as the whole machine would be by a suspend.
pub(crate) fn a_download_goes_on_after_a_sleep(bed: &Bed) -> Result<(), Failed> {
    let (_servers, mut sidecar) = begin(bed, &[])?;
    let pause = download(&sidecar, || {
        sidecar.process.signal(Signal::STOP);
        thread::sleep(STOPPED);
        sidecar.process.signal(Signal::CONT);
        Ok(None)
    })?;
    sidecar.process.says("awake again", Duration::from_secs(10))?;
    told(&sidecar, "a sleep", Paused { longest: pause.longest.saturating_sub(STOPPED), ..pause })
}

/// What leaves by that device goes at the rate that gives a download its length.
pub(super) fn slow_down(host: &Namespace, device: &str) -> Result<(), Failed> {
    let mut command = host.command("tc");
    command.args(["qdisc", "replace", "dev", device, "root", "tbf"]).args(RATE.split(' '));
    output(command)?;
    Ok(())
}

/// From now on only connections pass that are seen to begin.
fn forget_connections(host: &Namespace) -> Result<(), Failed> {
    const FOREIGN: &str = "table inet foreign { chain out { type filter hook output priority 0; \
                           oifname eth0 ct state invalid drop; }; \
                           chain in { type filter hook input priority 0; iifname eth0 ct state invalid drop; }; }";
    // The setting is there once something asks for connection states, and counts from the first packet seen.
    host.nft(&format!("{FOREIGN}\ndelete table inet foreign"))?;
    host.set("netfilter/nf_conntrack_tcp_loose", "0")?;
    host.nft(FOREIGN)?;
    Ok(())
}

/// Control with its relays, and a peer. The bed's own stop and restart in scenarios beside these, and an outage that meets
/// a change of the network is none of its effects.
struct Servers {
    _peer: Process,
    _control: TestControl,
}

/// A sidecar on a host that is as it was before the first of these scenarios, behind a wire of a known rate. It is to be
/// dropped before its servers.
fn begin<'a>(bed: &'a Bed, args: &[&str]) -> Result<(Servers, Sidecar<'a>), Failed> {
    begin_as(bed, |launch| launch.args(args))
}

fn begin_as<'a>(bed: &'a Bed, finish: impl FnOnce(Launch<'a>) -> Launch<'a>) -> Result<(Servers, Sidecar<'a>), Failed> {
    reset(bed)?;
    let host = &bed.hosts.link;
    let mut control = TestControl::start_for(bed, host, ADDRESS)?;
    let peer = control.peer(bed, PEER)?;
    let sidecar = finish(control.launch(bed).on(host)).ready()?;
    sidecar.page(PEER, "web")?;
    Ok((Servers { _peer: peer, _control: control }, sidecar))
}

/// The host as it is before the first of these scenarios, behind a wire of a known rate.
pub(super) fn reset(bed: &Bed) -> Result<(), Failed> {
    let host = &bed.hosts.link;
    restore(host)?;
    host.ip(&format!(
        "addr flush dev eth0\naddr flush dev eth1\nlink set eth0 up\nlink set eth1 up\n\
         addr add 10.99.0.25/24 dev eth0\nroute replace default via {TRAP} dev eth0"
    ))?;
    for port in ["p25", "p26"] {
        slow_down(&bed.hosts.wan, port)?;
    }
    Ok(())
}

/// Takes away the rules of filters and routes that these scenarios make, whether they are there or not.
fn restore(host: &Namespace) -> Result<(), Failed> {
    let filters = host.nft("table inet foreign { }\ndelete table inet foreign");
    host.ip("rule flush table 77\nroute flush table 77")?;
    Ok(filters?)
}

/// How a download went over a change.
pub(super) struct Paused {
    /// The longest time in which nothing arrived.
    longest: Duration,
    /// When control and DERP were back.
    back: Option<Back>,
}

/// How long after the change control and DERP were back.
pub(super) type Back = (Duration, Duration);

/// Downloads from the peer, and changes the network meanwhile.
fn download(
    sidecar: &Sidecar<'_>,
    change: impl FnOnce() -> Result<Option<Back>, Failed> + Send,
) -> Result<Paused, Failed> {
    download_from(sidecar, PEER, change)
}

/// The same from another peer.
pub(super) fn download_from(
    sidecar: &Sidecar<'_>,
    peer: &str,
    change: impl FnOnce() -> Result<Option<Back>, Failed> + Send,
) -> Result<Paused, Failed> {
    let expected = sidecar.get(peer, &format!("/sum?n={SIZE}&seed=3"))?.text();
    let mut stream = sidecar.dial(peer, 80)?;
    let request = format!("GET /bytes?n={SIZE}&seed=3 HTTP/1.1\r\nHost: {peer}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    while !crate::client::line(&mut stream)?.is_empty() {}
    let mut change = Some(change);
    thread::scope(|scope| {
        let (mut digest, mut buffer, mut length) = (Context::new(&SHA256), vec![0; 64 << 10], 0);
        let (mut longest, mut last, mut changing) = (Duration::ZERO, Instant::now(), None);
        loop {
            let read = stream.read(&mut buffer).map_err(|error| {
                format!("the download broke after {length} bytes: {error}\n{}", tail(&sidecar.process.log()))
            })?;
            longest = longest.max(last.elapsed());
            last = Instant::now();
            digest.update(&buffer[..read]);
            length += read as u64;
            if length > UNDER_WAY
                && let Some(change) = change.take()
            {
                changing = Some(scope.spawn(change));
                longest = Duration::ZERO;
            }
            if read == 0 {
                break;
            }
        }
        let sum = hex::encode(digest.finish());
        if length != SIZE || sum != expected.trim() {
            return Err(format!("{length} bytes of {SIZE}, checksum {sum}, not {expected}").into());
        }
        let changing = changing.ok_or("it ended before the network changed")?;
        let back = changing.join().map_err(|_| "the change panicked")??;
        Ok(Paused { longest, back })
    })
}

/// The network changed: waits for the log to say so, and for new connections to control and DERP.
pub(super) fn back(sidecar: &Sidecar<'_>, what: &str) -> Result<Option<Back>, Failed> {
    let changed = Instant::now();
    let is_change = |line: &&str| line.contains(CHANGED) && line.contains(what);
    let after = |text: &str| {
        let log = sidecar.process.log();
        log.lines().skip_while(|line| !is_change(line)).any(|line| line.contains(text)).then(|| changed.elapsed())
    };
    until(BACK_MOST, what, || Ok(changes(sidecar).iter().any(|change| change.contains(what)).then_some(())))?;
    let derp = until(BACK_MOST, "DERP to be back", || Ok(after(DERP)))?;
    let control = until(BACK_MOST, "control to be back", || Ok(after(CONTROL)))?;
    Ok(Some((control, derp)))
}

/// The changes that the log told of.
pub(super) fn changes(sidecar: &Sidecar<'_>) -> Vec<String> {
    sidecar.process.log().lines().filter(|line| line.contains(CHANGED)).map(str::to_owned).collect()
}

/// Says how it went, and holds the pause to its bound. A page afterwards is as ever.
fn told(sidecar: &Sidecar<'_>, what: &str, paused: Paused) -> Result<(), Failed> {
    bounded(sidecar, what, &paused)?;
    sidecar.page(PEER, "web")
}

/// Says how it went, and holds the pause to its bound.
pub(super) fn bounded(sidecar: &Sidecar<'_>, what: &str, paused: &Paused) -> Result<(), Failed> {
    let back = paused.back.map_or_else(String::new, |(control, derp)| {
        format!("; DERP back after {:.1} s, control after {:.1} s", derp.as_secs_f32(), control.as_secs_f32())
    });
    crate::say(&format!("{what}: the download paused for {:.1} s{back}", paused.longest.as_secs_f32()));
    if paused.longest > PAUSE_MOST {
        return Err(format!("the download paused for {:?}\n{}", paused.longest, tail(&sidecar.process.log())).into());
    }
    Ok(())
}
