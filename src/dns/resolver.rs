//! A resolver's address in the forms in which control writes it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use url::{Host, Url};

use crate::wire::tailcfg::dns::Resolver;

/// Where resolvers answer unless they say otherwise (RFC 1035, 4.2).
const DNS_PORT: u16 = 53;

/// How a resolver is asked. Source: Tailscale, types/dnstype, `Resolver.Addr`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ResolverAddr {
    /// By UDP and TCP.
    Plain {
        /// Its address.
        addr: SocketAddr,
    },
    /// By DNS over HTTP (RFC 8484) at a peer's PeerAPI, inside the tunnel: an app connector or an exit node.
    PeerApi {
        /// The peer's address.
        ip: IpAddr,
        /// The PeerAPI's port.
        port: u16,
        /// The path, `/dns-query`.
        path: String,
    },
    /// By DNS over HTTPS (RFC 8484).
    Https {
        /// The whole URL.
        url: Url,
        /// Addresses of its host, if control knows them.
        bootstrap: Vec<IpAddr>,
    },
    /// In a way that we do not know; carries what control wrote.
    Unsupported(String),
}

impl ResolverAddr {
    /// The address in `resolver`.
    pub fn parse(resolver: &Resolver) -> Self {
        let text = resolver.addr.as_str();
        let bare = || text.parse().ok().map(|ip| SocketAddr::new(ip, DNS_PORT));
        let known = match text.parse().ok().or_else(bare) {
            Some(addr) => canonical(addr).map(|addr| Self::Plain { addr }),
            None => Self::by_url(resolver),
        };
        known.unwrap_or_else(|| Self::Unsupported(text.to_owned()))
    }

    fn by_url(resolver: &Resolver) -> Option<Self> {
        let url = Url::parse(&resolver.addr).ok()?;
        let bare = url.username().is_empty() && url.password().is_none() && url.fragment().is_none();
        let ip: Option<IpAddr> = match url.host()? {
            Host::Ipv4(ip) => Some(ip.into()),
            Host::Ipv6(ip) => Some(ip.into()),
            Host::Domain(_) => None,
        };
        match (url.scheme(), ip) {
            ("http", Some(ip)) if bare && url.query().is_none() => {
                let addr = canonical(SocketAddr::new(ip, url.port_or_known_default()?))?;
                Some(Self::PeerApi { ip: addr.ip(), port: addr.port(), path: url.path().to_owned() })
            }
            ("https", _) if bare && url.port() != Some(0) => {
                let bootstrap = resolver.bootstrap_resolution.iter().map(IpAddr::to_canonical).collect();
                Some(Self::Https { url, bootstrap })
            }
            (_, _) => None,
        }
    }
}

/// IPv4 as IPv4, however it is written: a route and a source address go by the family. `None` where nothing can be.
fn canonical(addr: SocketAddr) -> Option<SocketAddr> {
    let addr = SocketAddr::new(addr.ip().to_canonical(), addr.port());
    (addr.port() != 0 && !addr.ip().is_unspecified()).then_some(addr)
}

/// As control wrote it, or nearly: for people, who look for it in their settings.
impl fmt::Display for ResolverAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain { addr } => write!(f, "{addr}"),
            Self::PeerApi { ip, port, .. } => write!(f, "http://{}", SocketAddr::new(*ip, *port)),
            Self::Https { url, .. } => write!(f, "{url}"),
            Self::Unsupported(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(addr: &str) -> ResolverAddr {
        let bootstrap_resolution = vec![IpAddr::from([9, 9, 9, 9])];
        ResolverAddr::parse(&Resolver { addr: addr.to_owned(), bootstrap_resolution, use_with_exit_node: false })
    }

    fn plain(addr: &str) -> ResolverAddr {
        ResolverAddr::Plain { addr: addr.parse().unwrap() }
    }

    #[test]
    fn every_form_that_control_writes_is_known() {
        assert_eq!(parse("10.0.0.1"), plain("10.0.0.1:53"));
        assert_eq!(parse("fd7a:115c:a1e0::5"), plain("[fd7a:115c:a1e0::5]:53"));
        assert_eq!(parse("10.0.0.1:5353"), plain("10.0.0.1:5353"));
        assert_eq!(parse("[::1]:54"), plain("[::1]:54"));
        let path = String::from("/dns-query");
        let peer = ResolverAddr::PeerApi { ip: [100, 64, 0, 7].into(), port: 39697, path: path.clone() };
        assert_eq!(parse("http://100.64.0.7:39697/dns-query"), peer);
        let peer = ResolverAddr::PeerApi { ip: "fd7a:115c:a1e0::7".parse().unwrap(), port: 1, path };
        assert_eq!(parse("http://[fd7a:115c:a1e0::7]:1/dns-query"), peer);
        let https = ResolverAddr::Https {
            url: Url::parse("https://dns.example/dns-query").unwrap(),
            bootstrap: vec![[9, 9, 9, 9].into()],
        };
        assert_eq!(parse("https://dns.example/dns-query"), https);
    }

    #[test]
    fn every_other_form_is_kept_as_unsupported() {
        for text in ["", "tls://1.1.1.1", "tailscale-app:x", "http://dns.example/q", "http://u:p@10.0.0.1/", "x y"] {
            assert_eq!(parse(text), ResolverAddr::Unsupported(text.to_owned()));
        }
        for nowhere in
            ["10.0.0.1:0", "0.0.0.0", "[::]:53", "::ffff:0.0.0.0", "http://10.0.0.1:0/q", "https://d.test:0/"]
        {
            assert_eq!(parse(nowhere), ResolverAddr::Unsupported(nowhere.to_owned()));
        }
    }

    #[test]
    fn an_ipv4_address_is_one_in_every_spelling() {
        assert_eq!(parse("::ffff:10.20.0.53"), plain("10.20.0.53:53"));
        assert_eq!(parse("[::ffff:10.20.0.53]:5353"), plain("10.20.0.53:5353"));
        assert_eq!(parse("http://[::ffff:100.64.0.7]:1/q"), parse("http://100.64.0.7:1/q"));
        let addr = String::from("https://dns.example/q");
        let bootstrap_resolution = vec!["::ffff:9.9.9.9".parse().unwrap()];
        let mapped = ResolverAddr::parse(&Resolver { addr, bootstrap_resolution, use_with_exit_node: false });
        assert_eq!(mapped, parse("https://dns.example/q"));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed(text in ".{0,60}") {
            let _ = parse(&text);
        }
    }
}
