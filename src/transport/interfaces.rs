//! The machine's own addresses, as endpoints for peers on the same network, and the networks that they are in.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use if_addrs::IfAddr;
use ipnet::IpNet;

use crate::engine::LocalEndpoints;
use crate::netmap::tailnet_range;

/// Addresses on the internet at which nobody is. Source: RFC 5737, 3; RFC 3849, 2.
const ELSEWHERE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];

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

/// The addresses that a peer might reach us at without a relay, each with our port of its family. Loopback only where
/// there is nothing else, as between two nodes on one machine; link-local and tailnet addresses never.
/// Source: Tailscale, net/netmon, `LocalAddresses`.
///
/// A family that only addresses lead out of which no peer is told of, as in networks that a carrier's NAT or a cloud
/// numbers like tailnets, is there all the same.
pub fn local_endpoints(ports: (Option<u16>, Option<u16>)) -> LocalEndpoints {
    let addresses: Vec<IpAddr> = match if_addrs::get_if_addrs() {
        Ok(interfaces) => interfaces.into_iter().map(|interface| interface.ip()).collect(),
        Err(_) => sources().collect(),
    };
    let (loopback, others): (Vec<IpAddr>, Vec<IpAddr>) =
        addresses.into_iter().filter(|ip| usable(*ip)).partition(IpAddr::is_loopback);
    let chosen = if others.is_empty() { loopback } else { others };
    local(chosen, sources(), ports)
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
    let networks =
        interfaces.filter(|interface| !interface.is_loopback() && usable(interface.ip())).filter_map(|own| {
            let length = match &own.addr {
                IfAddr::V4(addr) => addr.prefixlen,
                IfAddr::V6(addr) => addr.prefixlen,
            };
            IpNet::new(own.ip(), length).ok()
        });
    networks.map(|net| net.trunc()).collect()
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
    use super::*;

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
