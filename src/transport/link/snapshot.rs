//! What the machine's network is at one moment, as far as it decides our paths.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::net::IpAddr;
use std::sync::Arc;

use if_addrs::Interface;

use crate::transport::interfaces::sources;

/// A default route: the interface, the next hop, and the metric, as the kernel writes them.
type Route = (String, String, String);

/// `RTF_UP` and `RTF_REJECT`. Source: linux/route.h.
const UP: u32 = 0x1;
const REJECT: u32 = 0x200;

/// Addresses and default routes: those of the main table, and what the kernel makes of all its tables and rules.
/// Loopback and link-local addresses are left out: they come with any interface, and no peer reaches us by them. So are
/// interfaces that are down or without a carrier.
#[derive(Debug, Clone, Default)]
pub(super) struct Snapshot {
    /// `None` when the operating system does not say.
    addresses: Option<Arc<BTreeSet<IpAddr>>>,
    defaults: BTreeSet<Route>,
    /// Where packets to the internet leave from, by IPv4 and by IPv6.
    sources: [Option<Source>; 2],
}

/// An address that the kernel chooses, and the interface that has it where the operating system says.
#[derive(Debug, Clone)]
struct Source {
    ip: IpAddr,
    interface: Option<String>,
}

impl Snapshot {
    /// Looks now.
    pub(super) fn take() -> Self {
        let v4 = lines("/proc/net/route").filter_map(|line| default_v4(&line));
        let v6 = lines("/proc/net/ipv6_route").filter_map(|line| default_v6(&line));
        let defaults = v4.chain(v6).collect();
        let interfaces = if_addrs::get_if_addrs().ok();
        let addresses = interfaces.as_deref().map(|interfaces| running(interfaces).into());
        let source = |ip: IpAddr| {
            let mut all = interfaces.iter().flatten();
            Source { ip, interface: all.find(|interface| interface.ip() == ip).map(|interface| interface.name.clone()) }
        };
        let sources: Vec<IpAddr> = sources().collect();
        let of_family = |v6: bool| sources.iter().find(|ip| ip.is_ipv6() == v6).map(|ip| source(*ip));
        Self { addresses, defaults, sources: [of_family(false), of_family(true)] }
    }

    /// The machine's addresses.
    pub(super) fn addresses(&self) -> Option<Arc<BTreeSet<IpAddr>>> {
        self.addresses.clone()
    }

    /// What is different in a later one.
    pub(super) fn compare(&self, later: &Self) -> Change {
        let count = |one: &Self, other: &Self| match (&one.addresses, &other.addresses) {
            (Some(one), Some(other)) => one.difference(other).count(),
            (None, _) | (_, None) => 0,
        };
        let same = self.defaults == later.defaults && self.leaves_as_in(later);
        let none = |one: &Self| one.defaults.is_empty() && one.sources.iter().all(Option::is_none);
        let route = match (same, none(self), none(later)) {
            (true, ..) => RouteChange::None,
            (false, _, true) => RouteChange::Gone,
            (false, true, false) => RouteChange::New,
            (false, false, false) => RouteChange::Moved,
        };
        Change { gone: count(self, later), new: count(later, self), route }
    }

    /// Whether packets leave as they do in a later look: from the same addresses, or from others of the same interfaces
    /// while the former are still there. Of several IPv6 addresses the kernel prefers the newest, and the others serve on.
    fn leaves_as_in(&self, later: &Self) -> bool {
        let has = |ip: &IpAddr| later.addresses.as_ref().is_some_and(|addresses| addresses.contains(ip));
        self.sources.iter().zip(&later.sources).all(|(before, after)| match (before, after) {
            (None, None) => true,
            (Some(before), Some(after)) => {
                let same_interface = before.interface.is_some() && before.interface == after.interface;
                before.ip == after.ip || (same_interface && has(&before.ip))
            }
            (None, Some(_)) | (Some(_), None) => false,
        })
    }

    /// With these addresses, and a default route by each of these interfaces.
    #[cfg(test)]
    pub(super) fn of(addresses: &[&str], interfaces: &[&str]) -> Self {
        let addresses: BTreeSet<IpAddr> = addresses.iter().map(|ip| ip.parse().expect("an address")).collect();
        let route = |name: &&str| ((*name).to_owned(), "0102A8C0".to_owned(), "0".to_owned());
        let defaults = interfaces.iter().map(route).collect();
        Self { addresses: Some(addresses.into()), defaults, sources: [None, None] }
    }

    /// The same, with packets that leave from an address of an interface.
    #[cfg(test)]
    pub(super) fn from(self, ip: &str, interface: Option<&str>) -> Self {
        let ip: IpAddr = ip.parse().expect("an address");
        let mut sources = self.sources;
        sources[usize::from(ip.is_ipv6())] = Some(Source { ip, interface: interface.map(str::to_owned) });
        Self { sources, ..self }
    }
}

/// The machine's addresses as they are now, by the rules of [`Snapshot`].
pub(super) fn addresses_now() -> Option<Arc<BTreeSet<IpAddr>>> {
    Some(running(&if_addrs::get_if_addrs().ok()?).into())
}

fn running(interfaces: &[Interface]) -> BTreeSet<IpAddr> {
    let running = interfaces.iter().filter(|interface| interface.is_oper_up() && !interface.is_link_local());
    running.map(Interface::ip).filter(|ip| !ip.is_loopback()).collect()
}

/// The lines of a file, one at a time: a router has a million routes. None where it cannot be read.
fn lines(path: &str) -> impl Iterator<Item = String> {
    let file = File::open(path).into_iter();
    file.flat_map(|file| BufReader::new(file).lines().map_while(Result::ok))
}

/// What became of the default routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RouteChange {
    None,
    New,
    Moved,
    Gone,
}

/// The difference of two looks. Shown without addresses, which are nobody's business at the level where it is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Change {
    gone: usize,
    new: usize,
    route: RouteChange,
}

impl Change {
    pub(super) fn is_nothing(self) -> bool {
        self.gone == 0 && self.new == 0 && self.route == RouteChange::None
    }

    /// Whether a default route is another.
    pub(super) fn is_of_routes(self) -> bool {
        self.route != RouteChange::None
    }

    /// Whether the way that packets take may be another.
    pub(super) fn is_move(self) -> bool {
        self.gone > 0 || self.is_of_routes()
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses = |count: usize, what| match count {
            0 => None,
            1 => Some(format!("an address is {what}")),
            _ => Some(format!("{count} addresses are {what}")),
        };
        let route = match self.route {
            RouteChange::None => None,
            RouteChange::New => Some("there is a default route"),
            RouteChange::Moved => Some("the default route moved"),
            RouteChange::Gone => Some("the default route is gone"),
        };
        let parts = [addresses(self.gone, "gone"), addresses(self.new, "new"), route.map(str::to_owned)];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        f.write_str(if parts.is_empty() { "nothing" } else { "" })?;
        f.write_str(&parts.join(", "))
    }
}

/// A default route in a line of `/proc/net/route`, or half a one. Source: Linux, net/ipv4/fib_trie.c, `fib_route_seq_show`.
fn default_v4(line: &str) -> Option<Route> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let &[interface, _, gateway, flags, _, _, metric, mask, ..] = fields.as_slice() else { return None };
    let mask = u32::from_str_radix(mask, 16).ok()?;
    route(mask.count_ones() <= 1, flags, [interface, gateway, metric])
}

/// The same of `/proc/net/ipv6_route`. Source: Linux, net/ipv6/route.c, `rt6_info_route` (now `ipv6_route_native_seq_show`).
fn default_v6(line: &str) -> Option<Route> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let &[_, length, _, _, gateway, metric, _, _, flags, interface] = fields.as_slice() else { return None };
    route(matches!(length, "00" | "01"), flags, [interface, gateway, metric])
}

fn route(is_default: bool, flags: &str, parts: [&str; 3]) -> Option<Route> {
    let flags = u32::from_str_radix(flags, 16).ok()?;
    let [interface, gateway, metric] = parts.map(str::to_owned);
    (is_default && flags & UP != 0 && flags & REJECT == 0).then_some((interface, gateway, metric))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::interfaces::is_link_local;

    #[test]
    fn default_routes_are_found_among_others() {
        // As Linux 6.1 writes them.
        let v4 = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                  eth0\t00000000\t010200C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
                  tun0\t00000080\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n\
                  eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let found: Vec<String> = v4.lines().filter_map(default_v4).map(|route| route.0).collect();
        assert_eq!(found, ["eth0", "tun0"]);
        let (zero, gateway) = ("0".repeat(32), "fd000000000000000000000000000001");
        let v6 = [
            format!(
                "fd000000000000000000000000000000 40 {zero} 00 {zero} 00000100 00000001 00000000 00000001     eth0"
            ),
            format!("{zero} 00 {zero} 00 {gateway} 00000400 00000003 00000000 00000003     eth0"),
            format!("{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo"),
        ];
        let found: Vec<Route> = v6.iter().filter_map(|line| default_v6(line)).collect();
        assert_eq!(found, [("eth0".to_owned(), gateway.to_owned(), "00000400".to_owned())]);
    }

    #[test]
    fn a_change_is_said_in_plain_words_without_addresses() {
        let home = Snapshot::of(&["192.168.1.4"], &["eth0"]);
        let said = |other: &Snapshot| home.compare(other).to_string();
        assert_eq!(said(&home), "nothing");
        assert_eq!(said(&Snapshot::of(&["10.0.0.1"], &["eth0"])), "an address is gone, an address is new");
        assert_eq!(said(&Snapshot::of(&[], &[])), "an address is gone, the default route is gone");
        let other = Snapshot::of(&["192.168.1.4", "10.0.0.1", "10.0.0.2"], &["wlan0"]);
        assert_eq!(said(&other), "2 addresses are new, the default route moved");
    }

    #[test]
    fn addresses_that_are_not_known_have_not_changed() {
        let unknown = Snapshot { addresses: None, ..Snapshot::of(&[], &["eth0"]) };
        let home = Snapshot::of(&["192.168.1.4"], &["eth0"]);
        assert!(home.compare(&unknown).is_nothing() && unknown.compare(&home).is_nothing());
    }

    #[test]
    fn another_source_is_another_route_whatever_the_main_table_says() {
        let both = || Snapshot::of(&["10.0.0.1", "10.0.0.2"], &["eth0"]);
        let home = both().from("10.0.0.1", Some("eth0"));
        let is_route = |other: Snapshot| home.compare(&other).is_of_routes();
        assert!(is_route(both().from("10.0.0.2", Some("eth1"))), "by a rule and another table");
        assert!(is_route(Snapshot::of(&["10.0.0.2"], &["eth0"]).from("10.0.0.2", Some("eth0"))), "the former is gone");
        assert!(is_route(both()), "no packet leaves any more");
        assert!(home.compare(&home).is_nothing());
        let unknown = |ip| Snapshot { addresses: None, ..Snapshot::of(&[], &[]) }.from(ip, None);
        assert!(unknown("10.0.0.1").compare(&unknown("10.0.0.2")).is_of_routes(), "nothing is known of interfaces");
    }

    #[test]
    fn a_newer_address_that_the_kernel_prefers_is_no_other_route() {
        let (old, new) = ("2001:db8::2", "2001:db8::3");
        let before = Snapshot::of(&[old], &["eth0"]).from(old, Some("eth0"));
        let after = Snapshot::of(&[old, new], &["eth0"]).from(new, Some("eth0"));
        let change = before.compare(&after);
        assert!(!change.is_move() && !change.is_of_routes(), "{change}");
        assert_eq!(change.to_string(), "an address is new");
        let preferred_later = Snapshot::of(&[old, new], &["eth0"]).from(old, Some("eth0"));
        assert!(preferred_later.compare(&after).is_nothing());
    }

    #[test]
    #[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
    fn this_machine_can_be_looked_at() {
        let Some(addresses) = Snapshot::take().addresses else {
            eprintln!("skipped: this machine does not tell its addresses");
            return;
        };
        assert!(addresses.iter().all(|ip| !ip.is_loopback() && !is_link_local(*ip)), "{addresses:?}");
    }
}
