//! Which of a name's resolvers may be asked, in which order, and on which network.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hyper::Uri;
use url::{Host, Url};

use super::doh;
use super::networks::Network;
use crate::dns::ResolverAddr;
use crate::key::NodePublic;
use crate::netmap::Netmap;

/// How long an app connector has to answer before the next is asked beside it: long enough for a handshake through a
/// relay, short enough that a page does not wait for one that is gone.
pub(super) const CONNECTOR_HEAD_START: Duration = Duration::from_millis(1500);
/// The same for other resolvers. Source: Tailscale, net/dns/resolver/forwarder.go (200 ms for a second resolver).
const HEAD_START: Duration = Duration::from_millis(200);

/// A resolver, as it is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Server {
    Plain(SocketAddr, Network),
    Http(doh::Server),
}

/// A resolver that may be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) resolver: ResolverAddr,
    pub(super) server: Server,
    /// What it is called in errors: a connector by its name too.
    pub(super) label: String,
    /// The peer through which it is asked.
    pub(super) peer: Option<NodePublic>,
}

impl Candidate {
    fn is_connector(&self) -> bool {
        matches!(self.resolver, ResolverAddr::PeerApi { .. })
    }
}

/// How long the first of these has to answer alone, and each after it.
pub(super) fn head_start(candidates: &[Candidate]) -> Duration {
    if candidates.iter().all(Candidate::is_connector) { CONNECTOR_HEAD_START } else { HEAD_START }
}

/// Those of `resolvers` that may be asked, `chosen` first and those behind offline peers last.
///
/// # Errors
/// Why none may be.
pub(super) fn candidates(
    netmap: &Netmap,
    resolvers: &[ResolverAddr],
    chosen: Option<&ResolverAddr>,
) -> Result<Vec<Candidate>, String> {
    let (mut usable, mut reason) = (Vec::new(), "none is named".to_owned());
    for resolver in resolvers {
        match candidate(netmap, resolver) {
            Ok((offline, candidate)) => usable.push((offline, candidate)),
            Err(why) => reason = why,
        }
    }
    usable.sort_by_key(|(offline, candidate)| (*offline, Some(&candidate.resolver) != chosen));
    if usable.is_empty() { Err(reason) } else { Ok(usable.into_iter().map(|(_, candidate)| candidate).collect()) }
}

/// A resolver as it is asked, and whether control calls the peer offline through which that goes.
fn candidate(netmap: &Netmap, resolver: &ResolverAddr) -> Result<(bool, Candidate), String> {
    let (server, ip) = match resolver {
        ResolverAddr::Plain { addr } => (Server::Plain(*addr, network(netmap, addr.ip())?), addr.ip()),
        ResolverAddr::PeerApi { ip, port, path } => {
            if network(netmap, *ip)? != Network::Tunnel {
                return Err(format!("{ip} is no peer's"));
            }
            let uri = format!("http://{}{path}", SocketAddr::new(*ip, *port));
            let uri: Uri = uri.parse().map_err(|_| format!("{uri} cannot be asked"))?;
            (Server::Http(doh::Server { uri, addresses: vec![*ip], network: Network::Tunnel }), *ip)
        }
        ResolverAddr::Https { url, bootstrap } => {
            let server = https(netmap, url, bootstrap)?;
            let ip = server.addresses[0];
            (Server::Http(server), ip)
        }
        ResolverAddr::Unsupported(text) => return Err(format!("nothing is known of how to ask {text:?}")),
    };
    let peer = netmap.route(ip).map(|route| route.peer);
    let label = match (resolver, peer) {
        (ResolverAddr::PeerApi { .. }, Some(peer)) => {
            let role = if netmap.exit_node == Some(peer.id) { "exit node" } else { "connector" };
            format!("{role} {} ({resolver})", peer.name)
        }
        (_, _) => resolver.to_string(),
    };
    let offline = peer.is_some_and(|peer| peer.online == Some(false));
    Ok((offline, Candidate { resolver: resolver.clone(), server, label, peer: peer.map(|peer| peer.key) }))
}

fn network(netmap: &Netmap, ip: IpAddr) -> Result<Network, String> {
    Network::to(netmap, ip).ok_or_else(|| unroutable(&[ip]))
}

fn unroutable(addresses: &[IpAddr]) -> String {
    let list = addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ");
    format!("no peer routes {list}, and outside the tailnet only public addresses are asked")
}

/// By the addresses that peers route, if there are any, else by those that are public. The host's own name is asked of
/// nobody: whom could one ask?
fn https(netmap: &Netmap, url: &Url, bootstrap: &[IpAddr]) -> Result<doh::Server, String> {
    let known = match url.host() {
        Some(Host::Ipv4(ip)) => vec![ip.into()],
        Some(Host::Ipv6(ip)) => vec![ip.into()],
        Some(Host::Domain(_)) | None => bootstrap.to_vec(),
    };
    if known.is_empty() {
        return Err(format!("the tailnet names {url} without an address of its host"));
    }
    let uri = url.as_str().parse().map_err(|_| format!("{url} cannot be asked"))?;
    let by = |network| known.iter().copied().filter(|ip| Network::to(netmap, *ip) == Some(network)).collect::<Vec<_>>();
    let networks = [Network::Tunnel, Network::Underlay];
    let found = networks.map(|network| (network, by(network))).into_iter().find(|(_, addresses)| !addresses.is_empty());
    let (network, addresses) = found.ok_or_else(|| unroutable(&known))?;
    Ok(doh::Server { uri, addresses, network })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;
    use serde_json::json;

    use super::*;
    use crate::netmap::session::Session;
    use crate::wire::tailcfg::dns::Resolver;

    fn netmap() -> Arc<Netmap> {
        let peer = |id: u8, online: bool| {
            json!({"ID": id, "Name": format!("c{id}.tb.example."), "Key": format!("nodekey:{}{id:02x}", "00".repeat(31)),
                   "HomeDERP": 1, "Addresses": [format!("100.64.0.{id}/32")], "Online": online,
                   "AllowedIPs": [format!("100.64.0.{id}/32"), format!("10.{id}.0.0/16")]})
        };
        let node = json!({"ID": 1, "Name": "me.tb.example.", "Key": format!("nodekey:{}01", "00".repeat(31)),
                          "Addresses": ["100.64.0.1/32"]});
        let message = json!({"Node": node, "Peers": [peer(2, false), peer(3, true), peer(4, true)]});
        let message = serde_json::from_value(message).unwrap();
        Session::new(true).apply(message, Timestamp::UNIX_EPOCH).unwrap().netmap.unwrap()
    }

    fn resolver(addr: &str, bootstrap: &[&str]) -> ResolverAddr {
        let bootstrap_resolution = bootstrap.iter().map(|ip| ip.parse().unwrap()).collect();
        ResolverAddr::parse(&Resolver { addr: addr.to_owned(), bootstrap_resolution, use_with_exit_node: false })
    }

    fn connector(id: u8) -> ResolverAddr {
        resolver(&format!("http://100.64.0.{id}:1234/dns-query"), &[])
    }

    #[test]
    fn the_chosen_connector_comes_first_and_an_offline_one_last() {
        let (netmap, all) = (netmap(), [connector(2), connector(3), connector(4)]);
        let order = |chosen: Option<&ResolverAddr>| {
            let candidates = candidates(&netmap, &all, chosen).unwrap();
            candidates.into_iter().map(|candidate| candidate.label).collect::<Vec<_>>()
        };
        let label = |id: u8| format!("connector c{id}.tb.example (http://100.64.0.{id}:1234)");
        assert_eq!(order(None), [label(3), label(4), label(2)]);
        assert_eq!(order(Some(&all[2])), [label(4), label(3), label(2)]);
        assert_eq!(order(Some(&all[0])), [label(3), label(4), label(2)]);
    }

    #[test]
    fn what_may_not_be_asked_is_left_out_and_says_why_when_nothing_is_left() {
        let netmap = netmap();
        let told = |all: &[ResolverAddr]| candidates(&netmap, all, None).map(|candidates| candidates.len());
        assert_eq!(told(&[resolver("192.168.1.1", &[]), resolver("10.3.0.53", &[])]), Ok(1));
        assert_eq!(told(&[resolver("9.9.9.9", &[]), resolver("tls://9.9.9.9", &[])]), Ok(1));
        for (addr, why) in [
            ("192.168.1.1", "no peer routes 192.168.1.1"),
            ("http://10.99.0.1:80/dns-query", "no peer routes 10.99.0.1"),
            ("http://9.9.9.9:80/dns-query", "9.9.9.9 is no peer's"),
            ("https://dns.example/dns-query", "without an address of its host"),
            ("tls://9.9.9.9", "nothing is known"),
        ] {
            let told = told(&[resolver(addr, &[])]).unwrap_err();
            assert!(told.contains(why), "{addr}: {told}");
        }
        let private = told(&[resolver("https://dns.example/", &["192.168.1.1"])]).unwrap_err();
        assert!(private.contains("no peer routes 192.168.1.1"), "{private}");
    }

    #[test]
    fn a_resolver_by_https_is_asked_inside_the_tailnet_where_a_peer_routes_it() {
        let netmap = netmap();
        let asked = |addr: &str, bootstrap: &[&str]| match candidates(&netmap, &[resolver(addr, bootstrap)], None)
            .unwrap()
            .remove(0)
            .server
        {
            Server::Http(server) => (server.network, server.addresses),
            Server::Plain(..) => panic!("by HTTPS"),
        };
        let ip = |ip: &str| vec![ip.parse::<IpAddr>().unwrap()];
        let url = "https://dns.example/dns-query";
        assert_eq!(asked(url, &["9.9.9.9", "10.3.0.53", "192.168.1.1"]), (Network::Tunnel, ip("10.3.0.53")));
        assert_eq!(asked(url, &["192.168.1.1", "9.9.9.9"]), (Network::Underlay, ip("9.9.9.9")));
        assert_eq!(asked("https://9.9.9.9/dns-query", &[]), (Network::Underlay, ip("9.9.9.9")));
        assert_eq!(asked("https://[2620:fe::fe]/dns-query", &[]), (Network::Underlay, ip("2620:fe::fe")));
    }
}
