//! Who serves which address: the route table against a scan of every allowed IP in the raw JSON.
//!
//! The model knows prefixes as numbers and texts and shares no code with what it judges.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::Value;
use tailcar::netmap::Netmap;
use tailcar::netmap::session::Session;
use tailcar::wire::tailcfg::map::MapResponse;

use crate::capture::{Capture, list, text, texts};

/// Addresses in nobody's prefix, mostly: public, private, documentation, the tailnet's own service.
const STRAYS: [&str; 10] = [
    "8.8.8.8",
    "10.0.0.1",
    "10.33.0.1",
    "192.168.1.1",
    "172.16.1.1",
    "100.100.100.100",
    "203.0.113.1",
    "2001:db8::1",
    "fd7a:115c:a1e0::53",
    "fd00::1",
];

/// What an exit node is never given.
const NOT_INTERNET: [&str; 12] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/3",
    "2002::/16",
    "2001::/32",
];

/// All of IPv6 that it is given.
const INTERNET_V6: &str = "2000::/3";

/// Which routes the session was told to use.
#[derive(Debug, Clone, Copy)]
struct Wanted<'a> {
    subnets: bool,
    exit: Option<&'a str>,
}

/// A prefix: its family's width, its bits and its length.
#[derive(Debug, Clone, Copy)]
struct Prefix {
    width: u32,
    bits: u128,
    length: u32,
}

/// What one peer serves in the model.
struct Served<'a> {
    id: i64,
    online: bool,
    primary: bool,
    prefix: Prefix,
    text: &'a str,
}

/// Compares the tables of all ways to use routes: none, subnets, and through each exit node.
pub(crate) fn compare(capture: &Capture, netmap: &Netmap, message: &MapResponse) -> Result<(), String> {
    // Regions are most of a message and serve no address.
    let message = || MapResponse { derp_map: None, ..message.clone() };
    let probes = probes(capture)?;
    agree(capture, netmap, Wanted { subnets: true, exit: None }, &probes)?;
    let closed = capture.netmap(&mut Session::new(false), message())?;
    agree(capture, &closed, Wanted { subnets: false, exit: None }, &probes)?;
    for peer in capture.peers() {
        if texts(&peer["AllowedIPs"]).iter().any(|prefix| prefix.ends_with("/0")) {
            let exit = text(&peer["StableID"]);
            let mut session = Session::new(true).with_exit_node(exit.to_owned());
            let through = capture.netmap(&mut session, message())?;
            agree(capture, &through, Wanted { subnets: true, exit: Some(exit) }, &probes)?;
        }
    }
    Ok(())
}

fn agree(capture: &Capture, netmap: &Netmap, wanted: Wanted<'_>, probes: &[IpAddr]) -> Result<(), String> {
    let served = served(capture, wanted)?;
    let not_internet = NOT_INTERNET.iter().map(|net| Prefix::parse(net)).collect::<Result<Vec<_>, _>>()?;
    let internet_v6 = Prefix::parse(INTERNET_V6)?;
    for ip in probes {
        let number = number(*ip);
        let covering: Vec<_> = served.iter().filter(|served| served.prefix.covers(number)).collect();
        let longest = covering.iter().map(|served| served.prefix.length).max();
        let internet = match ip {
            IpAddr::V4(_) => true,
            IpAddr::V6(_) => internet_v6.covers(number),
        } && !not_internet.iter().any(|net| net.covers(number));
        // What only an exit node serves was never the tailnet's: in a capture of one message, exactly what is routed was.
        let was_routed = covering.iter().any(|served| served.prefix.length > 0);
        let exits = internet && !was_routed;
        let given = |served: &&&Served<'_>| Some(served.prefix.length) == longest && (exits || longest != Some(0));
        let best = || covering.iter().filter(given);
        // Online before offline, then whom control calls primary.
        let rank = |served: &Served<'_>| (served.online, served.primary);
        let first = best().map(|served| rank(served)).max();
        let may: Vec<_> =
            best().filter(|served| Some(rank(served)) == first).map(|served| (served.id, served.text)).collect();
        let route = netmap.route(*ip).map(|route| (route.peer.id, route.prefix.to_string()));
        let fits = match &route {
            Some((id, prefix)) => may.contains(&(*id, prefix.as_str())),
            None => may.is_empty(),
        };
        if !fits {
            return Err(format!("{wanted:?}: {ip} is routed by {route:?}, and should be by one of {may:?}"));
        }
        if netmap.was_routed(*ip) != was_routed {
            return Err(format!("{wanted:?}: was_routed({ip}) is not {was_routed}"));
        }
        let counts = |served: &&&Served<'_>| exits || served.prefix.length > 0;
        let mut expected: Vec<_> = covering.iter().filter(counts).map(|served| served.id).collect();
        expected.sort_unstable();
        expected.dedup();
        let senders = netmap.peers.values().filter(|peer| netmap.allowed(peer, *ip)).map(|peer| peer.id);
        if !senders.eq(expected.iter().copied()) {
            return Err(format!("{wanted:?}: not exactly {expected:?} may send from {ip}"));
        }
    }
    Ok(())
}

/// Everything that the peers serve, by the raw JSON.
fn served<'a>(capture: &'a Capture, wanted: Wanted<'_>) -> Result<Vec<Served<'a>>, String> {
    let mut all = Vec::new();
    for peer in capture.peers() {
        let id = peer["ID"].as_i64().ok_or("a peer has no id")?;
        for text in texts(&peer["AllowedIPs"]) {
            if is_wanted(peer, text, wanted) {
                let primary = texts(&peer["PrimaryRoutes"]).contains(&text);
                all.push(Served { id, online: peer["Online"] == true, primary, prefix: Prefix::parse(text)?, text });
            }
        }
    }
    Ok(all)
}

fn is_wanted(peer: &Value, prefix: &str, wanted: Wanted<'_>) -> bool {
    if list(&peer["Addresses"]).iter().any(|own| own == prefix) {
        return true;
    }
    if prefix.ends_with("/0") {
        return wanted.exit == peer["StableID"].as_str();
    }
    wanted.subnets
}

/// The ends of every prefix, what lies right beside them, and the strays.
fn probes(capture: &Capture) -> Result<Vec<IpAddr>, String> {
    let mut probes: BTreeSet<IpAddr> = STRAYS.iter().map(|ip| ip.parse().unwrap()).collect();
    let nodes = capture.peers().iter().chain([&capture.raw["SelfNode"]]);
    for text in nodes.flat_map(|node| texts(&node["AllowedIPs"])) {
        let prefix = Prefix::parse(text)?;
        let beyond = 1_u128.checked_shl(prefix.width - prefix.length).unwrap_or(0);
        let (first, next) = (prefix.bits, prefix.bits.wrapping_add(beyond));
        for bits in [first.wrapping_sub(1), first, first + (beyond >> 1), next.wrapping_sub(1), next] {
            probes.extend(address(prefix.width, bits));
        }
    }
    Ok(probes.into_iter().collect())
}

impl Prefix {
    fn parse(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/').and_then(|(ip, length)| Some((ip.parse().ok()?, length.parse().ok()?)));
        let (ip, length) = parts.ok_or_else(|| format!("{text} is no prefix"))?;
        let (width, bits) = number(ip);
        Ok(Self { width, bits, length })
    }

    fn covers(self, (width, bits): (u32, u128)) -> bool {
        width == self.width && (bits ^ self.bits).checked_shr(width - self.length).unwrap_or(0) == 0
    }
}

fn number(ip: IpAddr) -> (u32, u128) {
    match ip {
        IpAddr::V4(ip) => (32, u128::from(u32::from(ip))),
        IpAddr::V6(ip) => (128, u128::from(ip)),
    }
}

/// `None` beyond the family's end.
fn address(width: u32, bits: u128) -> Option<IpAddr> {
    match width {
        32 => Some(IpAddr::V4(u32::try_from(bits).ok()?.into())),
        _ => Some(IpAddr::V6(bits.into())),
    }
}
