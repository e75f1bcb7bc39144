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
        if let Ok(ip) = text.parse() {
            return Self::Plain { addr: SocketAddr::new(ip, DNS_PORT) };
        }
        if let Ok(addr) = text.parse() {
            return Self::Plain { addr };
        }
        Self::by_url(resolver).unwrap_or_else(|| Self::Unsupported(text.to_owned()))
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
                Some(Self::PeerApi { ip, port: url.port_or_known_default()?, path: url.path().to_owned() })
            }
            ("https", _) if bare => Some(Self::Https { url, bootstrap: resolver.bootstrap_resolution.clone() }),
            (_, _) => None,
        }
    }
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
    }

    proptest! {
        #[test]
        fn any_text_is_parsed(text in ".{0,60}") {
            let _ = parse(&text);
        }
    }
}
