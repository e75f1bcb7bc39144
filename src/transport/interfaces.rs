//! The machine's own addresses, as endpoints for peers on the same network, and the networks that they are in.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use if_addrs::{IfAddr, Interface};
use ipnet::IpNet;

use crate::engine::LocalEndpoints;
use crate::netmap::tailnet_range;

/// Addresses on the internet at which nobody is. Source: RFC 5737, 3; RFC 3849, 2.
const ELSEWHERE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];

/// How many addresses of one IPv6 network peers are told. Source: Tailscale, net/netmon, `LocalAddresses`.
const SIBLINGS: usize = 2;

/// The addresses that packets to the internet leave from now, one of each family that leads there, by whatever rules and
/// tables the kernel goes by. Nothing is sent: a UDP socket that is connected has its address chosen. Also where a
/// sandbox does not tell of interfaces.
pub(super) fn sources() -> impl Iterator<Item = IpAddr> {
    ELSEWHERE.into_iter().filter_map(|elsewhere| {
        let any: IpAddr = if elsewhere.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        // The port is that for discarding. Source: RFC 863.
        socket.connect((elsewhere, 9)).ok()?;
        Some(socket.local_addr().ok()?.ip())
    })
}

/// Whether packets of that family lead anywhere, as netcheck takes it.
pub(super) fn has_way(v6: bool) -> bool {
    local_endpoints((Some(0), Some(0))).has_family(v6)
}

/// The addresses that a peer might reach us at without a relay, each with our port of its family. Loopback only where
/// there is nothing else, as between two nodes on one machine; tailnet addresses never.
///
/// A family that only addresses lead out of which no peer is told of, as in networks that a carrier's NAT or a cloud
/// numbers like tailnets, is there all the same.
pub fn local_endpoints(ports: (Option<u16>, Option<u16>)) -> LocalEndpoints {
    match if_addrs::get_if_addrs() {
        Ok(interfaces) => {
            let running: Vec<Interface> = interfaces.into_iter().filter(is_ours).collect();
            let own = running.iter().map(Interface::ip).filter(|ip| usable(*ip));
            local(endpoints(&running), own.chain(sources()), ports)
        }
        Err(_) => local(sources().filter(|ip| usable(*ip)).collect(), sources(), ports),
    }
}

/// Those of these addresses that peers are told. Of an IPv6 network no more than two: each peer tries them all, and some
/// machines have hundreds. Addresses that mean something on their own link or site alone, where there are no others: some
/// clouds translate them. Source: Tailscale, net/netmon, `LocalAddresses`.
fn endpoints(running: &[Interface]) -> Vec<IpAddr> {
    let (mut regular, mut last_resort, mut loopback) = (Vec::new(), Vec::new(), Vec::new());
    let mut siblings: BTreeMap<(&str, IpNet), usize> = BTreeMap::new();
    for interface in running {
        match interface.ip() {
            ip if ip.is_unspecified() || tailnet_range(ip) => {}
            ip if ip.is_loopback() => loopback.push(ip),
            IpAddr::V4(ip) if ip.is_link_local() => last_resort.push(ip.into()),
            IpAddr::V6(ip) if ip.is_unicast_link_local() => {}
            IpAddr::V6(ip) if ip.is_unique_local() => last_resort.push(ip.into()),
            IpAddr::V4(ip) => regular.push(ip.into()),
            IpAddr::V6(ip) => {
                let count = network(interface).map(|net| siblings.entry((&interface.name, net)).or_default());
                if count.is_none_or(|count| std::mem::replace(count, *count + 1) < SIBLINGS) {
                    regular.push(ip.into());
                }
            }
        }
    }
    [regular, last_resort, loopback].into_iter().find(|found| !found.is_empty()).unwrap_or_default()
}

/// Whether an interface is one to send datagrams to peers by. By another overlay each would carry the other's.
/// Source: Tailscale, net/netmon, `isProblematicInterface`.
fn is_ours(interface: &Interface) -> bool {
    interface.is_oper_up() && !interface.name.starts_with("zt") && interface.name != "wt0"
}

fn local(
    endpoints: Vec<IpAddr>,
    sources: impl Iterator<Item = IpAddr>,
    ports: (Option<u16>, Option<u16>),
) -> LocalEndpoints {
    let with_port = |ip: IpAddr| Some(SocketAddr::new(ip, if ip.is_ipv4() { ports.0? } else { ports.1? }));
    let mut endpoints: Vec<SocketAddr> = endpoints.into_iter().filter_map(with_port).collect();
    endpoints.sort_unstable();
    endpoints.dedup();
    let mut local = LocalEndpoints::from(endpoints);
    sources.filter_map(with_port).for_each(|source| local.note_source(source.ip()));
    local
}

/// The networks that this machine is in, loopback, link-local and tailnets left out.
pub fn local_networks() -> Vec<IpNet> {
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default().into_iter();
    let usable = interfaces.filter(|interface| !interface.is_loopback() && usable(interface.ip()));
    usable.filter_map(|own| network(&own)).collect()
}

fn network(own: &Interface) -> Option<IpNet> {
    let length = match &own.addr {
        IfAddr::V4(addr) => addr.prefixlen,
        IfAddr::V6(addr) => addr.prefixlen,
    };
    IpNet::new(own.ip(), length).ok().map(|net| net.trunc())
}

/// Whether both are addresses of one interface in one network: where packets from one get through, the other's do.
pub(super) fn are_siblings(one: IpAddr, other: IpAddr) -> bool {
    siblings(&if_addrs::get_if_addrs().unwrap_or_default(), one, other)
}

fn siblings(interfaces: &[Interface], one: IpAddr, other: IpAddr) -> bool {
    let place = |ip: IpAddr| {
        let own = interfaces.iter().find(|interface| interface.ip() == ip)?;
        Some((&own.name, network(own)?))
    };
    place(one).is_some_and(|one| place(other) == Some(one))
}

fn usable(ip: IpAddr) -> bool {
    !is_link_local(ip) && !ip.is_unspecified() && !tailnet_range(ip)
}

/// Whether an address means something on its own link alone.
pub(super) fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use if_addrs::{IfOperStatus, Ifv4Addr, Ifv6Addr};

    use super::*;

    /// An interface that is up, with an address in its network.
    fn interface(name: &str, net: &str) -> Interface {
        let addr = match net.parse().unwrap() {
            IpNet::V4(net) => IfAddr::V4(Ifv4Addr {
                ip: net.addr(),
                netmask: net.netmask(),
                prefixlen: net.prefix_len(),
                broadcast: None,
            }),
            IpNet::V6(net) => IfAddr::V6(Ifv6Addr {
                ip: net.addr(),
                netmask: net.netmask(),
                prefixlen: net.prefix_len(),
                broadcast: None,
            }),
        };
        Interface { name: name.to_owned(), addr, index: None, oper_status: IfOperStatus::Up, is_p2p: false }
    }

    fn told(interfaces: &[(&str, &str)]) -> Vec<String> {
        let interfaces: Vec<Interface> = interfaces.iter().map(|(name, net)| interface(name, net)).collect();
        endpoints(&interfaces).iter().map(IpAddr::to_string).collect()
    }

    #[test]
    fn addresses_of_a_link_or_site_are_told_only_where_there_are_no_others() {
        let local = [("lo", "127.0.0.1/8"), ("eth0", "169.254.1.1/16"), ("eth0", "fd00::5/64"), ("eth0", "fe80::5/64")];
        assert_eq!(told(&local[..1]), ["127.0.0.1"]);
        assert_eq!(told(&local), ["169.254.1.1", "fd00::5"]);
        for regular in ["192.168.1.2/24", "2001:db8::2/64"] {
            let both = [&local[..], &[("eth1", regular)]].concat();
            assert_eq!(told(&both), [regular.split('/').next().unwrap()]);
        }
        assert!(told(&[("tailscale0", "100.64.0.1/32"), ("tailscale0", "fd7a:115c:a1e0::1/128")]).is_empty());
    }

    #[test]
    fn of_each_ipv6_network_two_addresses_are_told() {
        let host = |network: u16, host: u16| Ipv6Addr::new(0x2001, 0xdb8, 0, network, 0, 0, 0, host);
        let nets: Vec<String> = (1..=200).map(|last| format!("{}/64", host(1, last))).collect();
        let mut many: Vec<(&str, &str)> = nets.iter().map(|net| ("eth0", net.as_str())).collect();
        many.extend([("eth0", "2001:db8:0:2::1/64"), ("eth1", "2001:db8:0:1::ffff/64"), ("eth0", "10.0.0.1/8")]);
        many.extend([("eth0", "10.0.0.2/8"), ("eth0", "10.0.0.3/8")]);
        let wanted = ["2001:db8:0:1::1", "2001:db8:0:1::2", "2001:db8:0:2::1", "2001:db8:0:1::ffff"];
        assert_eq!(told(&many), [&wanted[..], &["10.0.0.1", "10.0.0.2", "10.0.0.3"]].concat());
    }

    #[test]
    fn siblings_share_interface_and_network() {
        let own = [("eth0", "10.0.0.1/8"), ("eth0", "10.0.0.2/8"), ("eth0", "192.168.0.1/16"), ("eth1", "10.0.0.3/8")];
        let own = own.map(|(name, net)| interface(name, net));
        let are = |one: &str, other: &str| siblings(&own, one.parse().unwrap(), other.parse().unwrap());
        assert!(are("10.0.0.1", "10.0.0.2") && are("10.0.0.1", "10.0.0.1"));
        assert!(!are("10.0.0.1", "192.168.0.1") && !are("10.0.0.1", "10.0.0.3"));
        assert!(!are("10.0.0.1", "10.0.0.9") && !are("10.0.0.9", "10.0.0.9"), "they are not ours");
    }

    #[test]
    fn interfaces_that_are_down_or_of_other_overlays_are_not_ours() {
        let down = Interface { oper_status: IfOperStatus::Down, ..interface("eth0", "10.0.0.1/8") };
        assert!(!is_ours(&down) && is_ours(&interface("eth0", "10.0.0.1/8")));
        assert!(!is_ours(&interface("ztabcdef", "10.0.0.1/8")) && !is_ours(&interface("wt0", "10.0.0.1/8")));
    }

    #[test]
    fn link_local_and_tailnet_addresses_are_no_endpoints() {
        for ip in ["169.254.1.1", "fe80::1", "100.64.0.1", "fd7a:115c:a1e0::5", "0.0.0.0"] {
            assert!(!usable(ip.parse().unwrap()), "{ip}");
        }
        for ip in ["192.168.1.4", "10.0.0.1", "2001:db8::1", "127.0.0.1"] {
            assert!(usable(ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn packets_to_the_internet_leave_from_an_address_of_the_machine() {
        let own: Vec<IpAddr> =
            if_addrs::get_if_addrs().unwrap_or_default().into_iter().map(|interface| interface.ip()).collect();
        assert!(own.is_empty() || sources().all(|source| own.contains(&source)), "{own:?}");
    }

    #[test]
    fn a_family_without_a_socket_has_no_endpoint() {
        assert_eq!(local_endpoints((None, None)), LocalEndpoints::default());
    }

    #[test]
    fn an_address_that_is_no_endpoint_makes_a_family_all_the_same() {
        let own = vec!["2001:db8::2".parse().unwrap()];
        let sources = || ["100.64.0.5", "2001:db8::2"].into_iter().map(|ip| ip.parse::<IpAddr>().unwrap());
        let told = vec!["[2001:db8::2]:6".parse().unwrap()];
        let mut both = LocalEndpoints::from(told.clone());
        both.note_source("100.64.0.5".parse().unwrap());
        assert_eq!(local(own.clone(), sources(), (Some(4), Some(6))), both);
        assert_eq!(local(own, sources(), (None, Some(6))), LocalEndpoints::from(told), "without a socket");
    }
}
