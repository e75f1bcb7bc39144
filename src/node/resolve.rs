//! From a name to addresses, asked of those whom the tailnet names and of nobody else.
//!
//! The tailnet's own names need no question. A name under a suffix that the tailnet claims is asked of that suffix's
//! resolvers, through the tunnel, and if they do not answer it has no address: there is nobody else to ask. The machine's
//! own resolver is never asked here.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_resolver::Resolver;
use hickory_resolver::config::{
    ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts,
};
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

use super::bridge::Tunnel;
use super::core::Shared;
use super::dial::{DialError, Host};
use super::doh;
use super::error::ResolveError;
use crate::dns::{Decision, ResolverAddr, Source, candidates, decide};
use crate::netmap::Netmap;
use crate::wire::tailcfg::dns::DnsConfig;

/// The longest that a name may take, all its resolvers and tries together. Source: Tailscale, net/dns/resolver,
/// `dnsQueryTimeout`.
const NAME_LIMIT: Duration = Duration::from_secs(10);
/// How long one question waits for its answer before it is asked again.
const TRY_LIMIT: Duration = Duration::from_secs(3);
/// How often a question is asked again.
const RETRIES: usize = 2;
/// How long one PeerAPI has to answer before the next is asked. Source: Tailscale, ipn/ipnlocal/peerapi.go (5 s).
const PEER_LIMIT: Duration = Duration::from_secs(4);
/// The most octets of a UDP answer: what fits the tunnel's packets with room to spare. Source: RFC 9715, 3.
const UDP_ANSWER_MAX: u16 = 1232;
/// Answers that each suffix's resolver remembers, for as long as their TTL says.
const CACHED_ANSWERS: u64 = 512;

/// What a name came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Resolved {
    /// At least one.
    pub(super) addresses: Vec<IpAddr>,
    /// Whose word that is.
    pub(super) by: By,
    /// Whether it is an earlier question's answer: what follows an answer, as a connector's routes do, may be gone.
    pub(super) remembered: bool,
}

/// Which answers count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// Also those that are remembered.
    Remembered,
    /// Only new ones: what is remembered of the name is forgotten first.
    #[expect(dead_code, reason = "dial asks anew where a remembered answer leads nowhere, once it waits for routes")]
    Anew,
}

/// Who said what a name's addresses are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum By {
    /// The tailnet itself, or the resolvers of a suffix that it claims.
    Tailnet,
    /// An app connector: routes to the addresses follow its answer.
    Connector {
        /// The suffix that connectors serve.
        suffix: String,
        /// The addresses of the suffix's connectors.
        connectors: Vec<IpAddr>,
    },
    /// A resolver for everything else: the name is no more the tailnet's than its address is.
    Default,
}

/// The resolvers of this run, each with its cache. A change of the tailnet's DNS settings begins anew.
pub(super) struct Resolvers {
    tunnel: Tunnel,
    control: tokio::runtime::Handle,
    /// Whether the tailnet's DNS settings count, or only its nodes' names.
    accept_dns: bool,
    cache: RefCell<Cache>,
}

#[derive(Default)]
struct Cache {
    settings: Option<Arc<DnsConfig>>,
    by_servers: HashMap<Vec<SocketAddr>, Resolver<Tunnel>>,
}

impl Resolvers {
    pub(super) fn new(tunnel: Tunnel, control: tokio::runtime::Handle, accept_dns: bool) -> Self {
        Self { tunnel, control, accept_dns, cache: RefCell::default() }
    }

    /// Whether nobody in the tailnet decides `name`, so that a rule of the user's may let it out.
    pub(super) fn is_outside(&self, netmap: &Netmap, name: &str) -> Result<bool, DialError> {
        Ok(match self.decide(netmap, name)? {
            Decision::Default { .. } | Decision::Nobody => true,
            Decision::Addresses { .. } | Decision::Nonexistent { .. } | Decision::Resolvers { .. } => false,
        })
    }

    /// Who decides a name, by the settings that count.
    fn decide(&self, netmap: &Netmap, name: &str) -> Result<Decision, ResolveError> {
        let decision = decide(netmap, name).map_err(|error| ResolveError::BadName { detail: error.to_string() })?;
        let counts = self.accept_dns || matches!(&decision, Decision::Addresses { source: Source::Host, .. });
        Ok(if counts { decision } else { Decision::Nobody })
    }

    /// The addresses of `name`, in no order that matters; at least one.
    pub(super) async fn resolve(
        &self,
        core: &Shared,
        netmap: &Arc<Netmap>,
        name: &str,
        ask: Ask,
    ) -> Result<Resolved, DialError> {
        if ask == Ask::Anew {
            *self.cache.borrow_mut() = Cache::default();
        }
        let bad = |error: crate::dns::BadName| ResolveError::BadName { detail: error.to_string() };
        if is_local(name) {
            return Err(DialError::Public { host: Host::Name(name.to_owned()) });
        }
        // Search domains are for single labels. A longer name is whole: appending a domain to it would tell it to
        // resolvers that have nothing to do with it.
        let mut names = candidates(netmap, name).map_err(bad)?;
        if name.contains('.') {
            names.truncate(1);
        }
        let mut last = None;
        for candidate in &names {
            match self.resolve_one(core, netmap, candidate, name).await {
                Ok(addresses) => return Ok(addresses),
                Err(error) if does_not_exist(&error) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| DialError::Public { host: Host::Name(name.to_owned()) }))
    }

    async fn resolve_one(
        &self,
        core: &Shared,
        netmap: &Arc<Netmap>,
        name: &str,
        given: &str,
    ) -> Result<Resolved, DialError> {
        let public = || DialError::Public { host: Host::Name(given.to_owned()) };
        let by_tailnet = |addresses| Resolved { addresses, by: By::Tailnet, remembered: false };
        match self.decide(netmap, name)? {
            Decision::Addresses { addresses, .. } => Ok(by_tailnet(addresses)),
            Decision::Nonexistent { zone } => {
                let resolver = if zone.is_empty() { "the tailnet".to_owned() } else { format!("the tailnet ({zone})") };
                Err(ResolveError::NxDomain { name: name.to_owned(), resolver }.into())
            }
            Decision::Resolvers { suffix, resolvers, connector } => {
                let addresses = self.ask(core, netmap, name, &resolvers).await?;
                let connectors = resolvers.iter().filter_map(address_of).collect();
                let by = if connector { By::Connector { suffix, connectors } } else { By::Tailnet };
                Ok(Resolved { addresses, by, remembered: false })
            }
            // A default resolver outside the tailnet would only tell a public address, which is refused anyway.
            Decision::Default { resolvers } if resolvers.iter().any(|resolver| is_routed(netmap, resolver)) => {
                let addresses = self.ask(core, netmap, name, &resolvers).await?;
                Ok(Resolved { addresses, by: By::Default, remembered: false })
            }
            Decision::Default { .. } | Decision::Nobody => Err(public()),
        }
    }

    /// Asks the resolvers that a route leads to; the peers that serve them are warmed at once.
    async fn ask(
        &self,
        core: &Shared,
        netmap: &Arc<Netmap>,
        name: &str,
        resolvers: &[ResolverAddr],
    ) -> Result<Vec<IpAddr>, ResolveError> {
        let (mut servers, mut peers) = (Vec::new(), Vec::new());
        for resolver in resolvers {
            let Some(ip) = address_of(resolver) else { continue };
            let Some(route) = netmap.route(ip) else { continue };
            core.borrow_mut().warm(route.peer.key, Instant::now());
            match resolver {
                ResolverAddr::Plain { addr } => servers.push(*addr),
                ResolverAddr::PeerApi { ip, port, path } => {
                    let offline = route.peer.online == Some(false);
                    peers.push((offline, doh::Server { address: SocketAddr::new(*ip, *port), path: path.clone() }));
                }
                ResolverAddr::Https { .. } | ResolverAddr::Unsupported(_) => {}
            }
        }
        if servers.is_empty() && peers.is_empty() {
            let detail = "no peer routes it, or it is of a kind that cannot be asked through the tunnel".to_owned();
            return Err(ResolveError::Unreachable { name: name.to_owned(), resolver: list(resolvers), detail });
        }
        peers.sort_by_key(|(offline, _)| *offline);
        let asked = list(resolvers);
        let question = self.question(netmap, name, servers, peers);
        match timeout(NAME_LIMIT, question).await {
            Ok(answer) => answer.map_err(|error| explain(error, name, &asked)),
            Err(_) => Err(ResolveError::Silent { name: name.to_owned(), resolver: asked, limit: NAME_LIMIT }),
        }
    }

    /// The question itself, on the control thread.
    async fn question(
        &self,
        netmap: &Arc<Netmap>,
        name: &str,
        servers: Vec<SocketAddr>,
        peers: Vec<(bool, doh::Server)>,
    ) -> Result<Vec<IpAddr>, NetError> {
        let name = format!("{name}.");
        let mut last = NetError::NoConnections;
        if !servers.is_empty() {
            let resolver = self.resolver(netmap, servers)?;
            let name = name.clone();
            let answer = AbortOnDropHandle::new(self.control.spawn(async move { resolver.lookup_ip(name).await }));
            match answer.await {
                Ok(Ok(found)) => return Ok(found.iter().collect()),
                Ok(Err(error)) => last = error,
                Err(_) => {}
            }
        }
        for (_, server) in peers {
            let (tunnel, name) = (self.tunnel.clone(), name.clone());
            let lookup = async move { timeout(PEER_LIMIT, doh::lookup(&tunnel, &server, &name)).await };
            let answer = AbortOnDropHandle::new(self.control.spawn(lookup));
            match answer.await.map(|answer| answer.unwrap_or(Err(NetError::Timeout))) {
                Ok(Ok(found)) => return Ok(found),
                Ok(Err(error)) if says_no(&error) => return Err(error),
                Ok(Err(error)) => {
                    debug!(%error, "a connector did not answer, asking the next");
                    last = error;
                }
                Err(_) => {}
            }
        }
        Err(last)
    }

    /// The resolver for these servers, with its cache.
    fn resolver(&self, netmap: &Arc<Netmap>, servers: Vec<SocketAddr>) -> Result<Resolver<Tunnel>, NetError> {
        let mut cache = self.cache.borrow_mut();
        if !cache.settings.as_ref().is_some_and(|settings| **settings == *netmap.dns) {
            *cache = Cache { settings: Some(netmap.dns.clone()), by_servers: HashMap::new() };
        }
        if let Some(resolver) = cache.by_servers.get(&servers) {
            return Ok(resolver.clone());
        }
        let config = ResolverConfig::from_name_servers(servers.iter().map(name_server).collect());
        let resolver =
            Resolver::builder_with_config(config, self.tunnel.clone()).with_options(options(servers.len())).build()?;
        cache.by_servers.insert(servers, resolver.clone());
        Ok(resolver)
    }
}

fn name_server(address: &SocketAddr) -> NameServerConfig {
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].into_iter().map(|mut connection| {
        connection.port = address.port();
        connection
    });
    NameServerConfig::new(address.ip(), true, connections.collect())
}

fn options(servers: usize) -> ResolverOpts {
    let mut options = ResolverOpts::default();
    options.timeout = TRY_LIMIT;
    options.attempts = RETRIES;
    options.num_concurrent_reqs = servers;
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    options.use_hosts_file = ResolveHosts::Never;
    options.edns_payload_len = UDP_ANSWER_MAX;
    options.cache_size = CACHED_ANSWERS;
    options
}

fn is_routed(netmap: &Netmap, resolver: &ResolverAddr) -> bool {
    address_of(resolver).is_some_and(|ip| netmap.route(ip).is_some())
}

/// The address that a resolver is asked at inside the tunnel.
fn address_of(resolver: &ResolverAddr) -> Option<IpAddr> {
    match resolver {
        ResolverAddr::Plain { addr } => Some(addr.ip()),
        ResolverAddr::PeerApi { ip, .. } => Some(*ip),
        ResolverAddr::Https { .. } | ResolverAddr::Unsupported(_) => None,
    }
}

/// The resolvers' addresses, for an error's text.
fn list(resolvers: &[ResolverAddr]) -> String {
    let text = |resolver: &ResolverAddr| match resolver {
        ResolverAddr::Plain { addr } => addr.to_string(),
        ResolverAddr::PeerApi { ip, port, .. } => format!("http://{}", SocketAddr::new(*ip, *port)),
        ResolverAddr::Https { url, .. } => url.to_string(),
        ResolverAddr::Unsupported(text) => text.clone(),
    };
    resolvers.iter().map(text).collect::<Vec<_>>().join(", ")
}

/// Whether a name means the machine itself (RFC 6761, 6.3), or is an address in one of the spellings that old parsers
/// know: neither is anything to ask a resolver about.
fn is_local(name: &str) -> bool {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    let last = name.rsplit('.').next().unwrap_or_default();
    let hexadecimal = last.strip_prefix("0x").is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
    last == "localhost" || hexadecimal || (!last.is_empty() && last.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether another candidate may exist where this one does not.
fn does_not_exist(error: &DialError) -> bool {
    matches!(
        error,
        DialError::Public { .. } | DialError::Resolve(ResolveError::NxDomain { .. } | ResolveError::NoAddress { .. })
    )
}

/// Whether a resolver answered that there is nothing, rather than that it could not tell.
fn says_no(error: &NetError) -> bool {
    matches!(error, NetError::Dns(DnsError::ResponseCode(ResponseCode::NXDomain | ResponseCode::NoError)))
}

/// hickory's error in our words.
fn explain(error: NetError, name: &str, resolver: &str) -> ResolveError {
    let (name, resolver) = (name.to_owned(), resolver.to_owned());
    let code = if let NetError::Dns(DnsError::NoRecordsFound(none)) = &error {
        Some(none.response_code)
    } else if let NetError::Dns(DnsError::ResponseCode(code)) = &error {
        Some(*code)
    } else {
        None
    };
    let timed_out = matches!(&error, NetError::Timeout)
        || matches!(&error, NetError::Io(io) if io.kind() == std::io::ErrorKind::TimedOut);
    match code {
        Some(ResponseCode::NXDomain) => ResolveError::NxDomain { name, resolver },
        Some(ResponseCode::NoError) => ResolveError::NoAddress { name, resolver },
        Some(code) => ResolveError::Failed { name, resolver, rcode: rcode(code) },
        None if timed_out => ResolveError::Silent { name, resolver, limit: TRY_LIMIT * (RETRIES as u32 + 1) },
        None => ResolveError::Unreachable { name, resolver, detail: error.to_string() },
    }
}

/// A response code as people know it (RFC 1035, 4.1.1; IANA's names).
fn rcode(code: ResponseCode) -> String {
    format!("{code:?}").to_ascii_uppercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_answer_is_told_apart() {
        let told = |code| explain(NetError::Dns(DnsError::ResponseCode(code)), "a.corp", "10.0.0.53:53");
        assert!(matches!(told(ResponseCode::NXDomain), ResolveError::NxDomain { .. }));
        assert!(matches!(told(ResponseCode::ServFail), ResolveError::Failed { rcode, .. } if rcode == "SERVFAIL"));
        assert!(matches!(told(ResponseCode::Refused), ResolveError::Failed { rcode, .. } if rcode == "REFUSED"));
        assert!(matches!(explain(NetError::Timeout, "a", "b"), ResolveError::Silent { .. }));
        assert!(matches!(explain(NetError::NoConnections, "a", "b"), ResolveError::Unreachable { .. }));
    }

    #[test]
    fn the_machine_itself_and_odd_addresses_are_nothing_to_ask() {
        for name in ["localhost", "a.localhost.", "LOCALHOST", "0x7f000001", "2130706433", "127.1", "10.0x1"] {
            assert!(is_local(name), "{name}");
        }
        for name in ["web", "localhost.corp.test", "v4", "0xzz", "1password"] {
            assert!(!is_local(name), "{name}");
        }
    }

    #[test]
    fn a_resolver_keeps_its_port_by_udp_and_tcp() {
        let server = name_server(&"10.0.0.53:5353".parse().unwrap());
        assert_eq!(server.connections.iter().map(|connection| connection.port).collect::<Vec<_>>(), [5353, 5353]);
    }
}
