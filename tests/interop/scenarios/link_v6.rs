//! The machine's network becomes another where there is only IPv6: what may be cut is cut and made anew, and no more.

use libtest_mimic::Failed;

use super::link::{self, BACK_MOST, Back, CONTROL, DERP, Paused};
use super::nat_changes::network;
use crate::bed::Bed;
use crate::nat::{CONTROL6, Kind, Network};
use crate::nat_nodes::Peer;
use crate::process::{output, tail, until};
use crate::sidecar::Sidecar;

/// By DERP alone.
const RELAYED: [&str; 2] = ["--transport", "derp"];
/// What the log says of a connection to a relay that was cut.
const DERP_LOST: &str = "derp connection lost";

/// A sidecar in the network without IPv4, and a peer in another one. Ends with the host as it was.
struct Six<'a> {
    sidecar: Sidecar<'a>,
    network: &'a Network,
    peer: &'a Peer,
}

/// Addresses of the same prefix beside the first, as privacy addresses come: the kernel leaves from the newest, and what
/// came from the first serves on.
pub(crate) fn newer_addresses_of_one_network_cut_nothing(bed: &Bed) -> Result<(), Failed> {
    let six = Six::begin(bed, &RELAYED)?;
    six.uncut("newer IPv6 addresses, relayed", || {
        [3, 4].into_iter().try_for_each(|last| six.prefer(last))?;
        until(BACK_MOST, "two changes in the log", || Ok((link::changes(&six.sidecar).len() > 1).then_some(())))
    })?;
    match link::changes(&six.sidecar).iter().find(|change| change.contains("default route")) {
        None => Ok(()),
        Some(change) => Err(format!("no route changed: {change}").into()),
    }
}

/// A route to everywhere beside the first, by the same link, while the kernel prefers another address than the one that
/// connections come from.
pub(crate) fn a_newer_route_by_the_same_link_cuts_nothing(bed: &Bed) -> Result<(), Failed> {
    let six = Six::begin(bed, &RELAYED)?;
    six.uncut("another IPv6 route by the same link, relayed", || {
        six.prefer(3)?;
        let route = format!("default via {}:1 dev eth0 metric 512", six.network.lan6(0));
        six.network.host.ip(&format!("route add {route}"))?;
        let moved = || link::changes(&six.sidecar).iter().any(|change| change.contains("the default route moved"));
        let told = until(BACK_MOST, "the route in the log", || Ok(moved().then_some(())));
        six.network.host.ip(&format!("route del {route}"))?;
        told
    })
}

/// By another interface and prefix: what comes from the first one's address would be lost there.
pub(crate) fn another_link_stops_no_relayed_download(bed: &Bed) -> Result<(), Failed> {
    let six = Six::begin(bed, &RELAYED)?;
    let (host, first, second) = (&six.network.host, six.network.lan6(0), six.network.lan6(1));
    let paused = six.download(|| {
        host.nft(&format!(
            "table inet foreign {{ chain out {{ type filter hook output priority 0; \
             oifname eth1 ip6 saddr {first}:2 drop; }}; }}"
        ))?;
        host.ip(&format!(
            "addr add {second}:2/64 dev eth1 nodad\nroute replace default via {second}:1 dev eth1\n\
             route del {first}:/64 dev eth0"
        ))?;
        link::back(&six.sidecar, "the default route moved")
    })?;
    six.bounded("another interface, IPv6, relayed", &paused)
}

/// Another address instead of the first.
pub(crate) fn another_address_stops_no_relayed_download(bed: &Bed) -> Result<(), Failed> {
    let six = Six::begin(bed, &RELAYED)?;
    let paused = six.download(|| six.renumber())?;
    six.bounded("another IPv6 address, relayed", &paused)
}

/// The same with a direct path. Control, and peers through it, hear of the new address, and of the old one no more.
pub(crate) fn another_address_stops_no_download_and_is_told_to_peers(bed: &Bed) -> Result<(), Failed> {
    let six = Six::begin(bed, &[])?;
    let (old, new) = (format!("{}:2", six.network.lan6(0)).parse()?, format!("{}:3", six.network.lan6(0)).parse()?);
    let told = || {
        let told = six.peer.endpoints_of(&six.sidecar.hostname)?;
        let knows = |ip: std::net::IpAddr| told.iter().any(|endpoint| endpoint.ip() == ip);
        Ok::<_, Failed>((knows(old), knows(new)))
    };
    until(BACK_MOST, "control to know the first address", || Ok((told()? == (true, false)).then_some(())))?;
    let paused = six.download(|| {
        let back = six.renumber()?;
        until(BACK_MOST, "control to know only the new address", || Ok((told()? == (false, true)).then_some(())))?;
        Ok(back)
    })?;
    six.bounded("another IPv6 address", &paused)
}

impl<'a> Six<'a> {
    fn begin(bed: &'a Bed, args: &[&str]) -> Result<Self, Failed> {
        let nat = bed.nat()?;
        let (network, peer) = (network(&nat.internet.clients, Kind::Six)?, nat.peer(Kind::Six)?);
        restore(network)?;
        let router = network.router.as_ref().ok_or("no router")?;
        for device in ["lan0", "lan1"] {
            link::slow_down(router, device)?;
        }
        let sidecar = nat.servers.launch(bed, Kind::Six, &network.host).args(args).ready()?;
        let six = Self { sidecar, network, peer };
        six.sidecar.page(&peer.address, &peer.name)?;
        Ok(six)
    }

    fn download(&self, change: impl FnOnce() -> Result<Option<Back>, Failed> + Send) -> Result<Paused, Failed> {
        link::download_from(&self.sidecar, &self.peer.address, change)
    }

    /// Holds the pause to the bound of all such changes. A page afterwards is as ever.
    fn bounded(&self, what: &str, paused: &Paused) -> Result<(), Failed> {
        link::bounded(&self.sidecar, what, paused)?;
        self.sidecar.page(&self.peer.address, &self.peer.name)
    }

    /// Downloads while something changes that is to cut no connection to control or a relay.
    fn uncut(&self, what: &str, change: impl FnOnce() -> Result<(), Failed> + Send) -> Result<(), Failed> {
        let log = || self.sidecar.process.log();
        // A home may move meanwhile, ours or the peer's, and the connection to another region is a new one.
        let known = connected(&log());
        let connections = || {
            let log = log();
            let derp = connected(&log).into_iter().filter(|region| known.contains(region)).count();
            (log.matches(CONTROL).count(), derp, log.matches(DERP_LOST).count())
        };
        let before = connections();
        let paused = self.download(|| change().map(|()| None))?;
        self.bounded(what, &paused)?;
        match connections() {
            after if after == before => Ok(()),
            after => Err(format!("(control, DERP, DERP lost) {before:?} became {after:?}\n{}", tail(&log())).into()),
        }
    }

    /// Adds an address of the first one's prefix, and waits until packets leave from it: it is found to be nobody else's
    /// first.
    fn prefer(&self, last: u8) -> Result<(), Failed> {
        let address = format!("{}:{last}", self.network.lan6(0));
        self.network.host.ip(&format!("addr add {address}/64 dev eth0"))?;
        until(BACK_MOST, "packets from the newer address", || Ok((self.source()? == address).then_some(())))
    }

    /// Puts another address in place of the first.
    fn renumber(&self) -> Result<Option<Back>, Failed> {
        let lan = self.network.lan6(0);
        let lines = format!("addr del {lan}:2/64 dev eth0\naddr add {lan}:3/64 dev eth0 nodad");
        self.network.host.ip(&lines)?;
        link::back(&self.sidecar, "an address is gone")
    }

    /// The address that packets to control leave from.
    fn source(&self) -> Result<String, Failed> {
        let mut command = self.network.host.command("ip");
        command.args(["-6", "route", "get", CONTROL6]);
        let route = output(command)?;
        Ok(route.split_whitespace().skip_while(|word| *word != "src").nth(1).unwrap_or_default().to_owned())
    }
}

/// The regions that a log says were connected to, each as often as it says so.
fn connected(log: &str) -> Vec<String> {
    let regions = log.split(DERP).skip(1).filter_map(|rest| rest.split_whitespace().next());
    regions.map(str::to_owned).collect()
}

impl Drop for Six<'_> {
    fn drop(&mut self) {
        let _ = restore(self.network);
    }
}

/// The network as it was made, at full speed.
fn restore(network: &Network) -> Result<(), Failed> {
    let (host, lan) = (&network.host, network.lan6(0));
    host.nft("table inet foreign { }\ndelete table inet foreign")?;
    host.ip(&format!(
        "addr flush dev eth0 scope global\naddr flush dev eth1 scope global\n\
         addr add {lan}:2/64 dev eth0 nodad\nroute replace default via {lan}:1 dev eth0"
    ))?;
    let router = network.router.as_ref().ok_or("no router")?;
    for device in ["lan0", "lan1"] {
        let mut command = router.command("tc");
        // There is none before the first of these scenarios.
        command.args(["qdisc", "del", "dev", device, "root"]);
        let _ = output(command);
    }
    Ok(())
}
