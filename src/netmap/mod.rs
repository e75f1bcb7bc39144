//! What the tailnet looks like to this node: one immutable value, replaced whole whenever control says so.
//!
//! A [`session::Session`] builds it from control's messages; whoever needs a name, a peer or a route
//! borrows the newest and never sees half a change. There is no packet filter in it: this node
//! accepts no inbound connection, so control's rules for inbound have nothing to decide.

mod accept;
mod apps;
pub mod diff;
mod internet;
mod lock;
mod node;
mod routes;
pub mod session;
mod standing;
mod state;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

pub use self::accept::tailnet_range;
pub use self::apps::{App, Apps, Extent};
pub use self::internet::is_internet;
use self::routes::{Prefixes, Routes};
pub use self::standing::{Measured, Standing, Voice};
use crate::key::{DiscoPublic, NodePublic};
use crate::wire::tailcfg::derp::DerpMap;
use crate::wire::tailcfg::dns::{DnsConfig, Resolver};

/// Control's number for a node; stable inside a tailnet.
pub type NodeId = i64;

/// A DERP region's number.
pub type RegionId = u32;

/// How a packet travels to its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// By UDP.
    Direct,
    /// By this DERP region.
    Relay(RegionId),
}

/// This node, as control describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct SelfNode {
    /// Control's number for us.
    pub id: NodeId,
    /// Our full name without trailing dot, lower case.
    pub name: String,
    /// Our node key.
    pub key: NodePublic,
    /// Our addresses.
    pub addresses: Vec<IpAddr>,
    /// When our key ends; `None` for never.
    pub key_expiry: Option<jiff::Timestamp>,
    /// Whether our key has ended already, by control's word or by its clock.
    pub expired: bool,
    /// Whether an administrator has approved us, or none is needed.
    pub authorized: bool,
    /// Tags granted.
    pub tags: Vec<String>,
    /// The attributes that control gives us, with their raw values.
    pub attributes: BTreeMap<String, Vec<serde_json::Value>>,
    /// The apps that are reached by transit addresses.
    pub apps: Apps,
}

/// Our addresses as one peer knows us, where they are not our own: in its tailnet somebody else may have those.
/// Source: Tailscale, tailcfg, `Node.SelfNodeV4MasqAddrForThisPeer` and `SelfNodeV6MasqAddrForThisPeer`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Masquerade {
    /// For IPv4; `None` for our own.
    pub v4: Option<Ipv4Addr>,
    /// For IPv6; `None` for our own.
    pub v6: Option<Ipv6Addr>,
}

/// Another node that policy lets us know of.
#[derive(Debug, Clone, PartialEq)]
pub struct Peer {
    /// Control's number for it.
    pub id: NodeId,
    /// The id that people and exit-node settings use.
    pub stable_id: String,
    /// Its full name without trailing dot, lower case.
    pub name: String,
    /// Its node key.
    pub key: NodePublic,
    /// Its disco key; `None` if it speaks no disco.
    pub disco: Option<DiscoPublic>,
    /// Its own addresses.
    pub addresses: Vec<IpAddr>,
    /// Everything it may send from and serves: its addresses, subnet routes, exit routes.
    pub allowed_ips: Vec<IpNet>,
    /// The subnet routes for which control has chosen it among all who serve them.
    pub primary_routes: Vec<IpNet>,
    /// Where it says that it can be reached.
    pub endpoints: Vec<SocketAddr>,
    /// Its home DERP region.
    pub home_derp: Option<RegionId>,
    /// Whether it is connected to control; `None` if control does not say.
    pub online: Option<bool>,
    /// Whether its key has ended: no traffic.
    pub expired: bool,
    /// Plain WireGuard, no disco and no DERP.
    pub wireguard_only: bool,
    /// It may answer us but open nothing to us. Nobody may open anything to us, so nothing follows from it.
    pub jailed: bool,
    /// Our addresses as it knows us.
    pub masquerade: Masquerade,
    /// PeerAPI ports for IPv4 and IPv6; 0 for none.
    pub peerapi: (u16, u16),
    /// Whether its PeerAPI answers DNS questions for whoever uses it as exit node.
    pub peerapi_dns_proxy: bool,
    /// Whom to ask for names while it is our exit node, if it is plain WireGuard.
    pub exit_dns: Vec<Resolver>,
    /// Whether it serves as an app connector.
    pub app_connector: bool,
    /// Its tags.
    pub tags: Vec<String>,
}

/// Why a route leads to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteKind {
    /// One of the peer's own addresses.
    Address,
    /// A subnet behind the peer.
    Subnet,
    /// Everything, by an exit node.
    Exit,
}

/// Where an address leads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Route<'a> {
    /// The longest prefix that covers the address.
    pub prefix: IpNet,
    /// Who serves it.
    pub peer: &'a Arc<Peer>,
    /// Why.
    pub kind: RouteKind,
}

/// The whole tailnet, as control last described it.
///
/// A copy shares nearly everything with its original.
#[derive(Debug, Clone)]
pub struct Netmap {
    /// Ourselves.
    pub self_node: Arc<SelfNode>,
    /// Everybody else.
    pub peers: Arc<BTreeMap<NodeId, Arc<Peer>>>,
    /// The tailnet's name, such as `example.com`; not the MagicDNS suffix.
    pub domain: String,
    /// The regions of DERP.
    pub derp: Arc<DerpMap>,
    /// The DNS settings.
    pub dns: Arc<DnsConfig>,
    /// Whether the tailnet lock is on and no signature vouches for our key: peers will not talk to us.
    pub locked_out: bool,
    /// Peers that are left out, since the tailnet lock is on and no signature vouches for their keys.
    pub unsigned_peers: usize,
    /// Names of nodes whose subdomains resolve to them too, in the form of [`Peer::name`].
    pub subdomain_hosts: Arc<BTreeSet<String>>,
    /// The peer that the exit node setting names, if it offers to be one and can be used: everything that has no
    /// other route goes through it.
    pub exit_node: Option<NodeId>,
    /// Whether an exit node was asked for, be it there or not: then nothing of the internet goes another way.
    pub exit_wanted: bool,
    index: Arc<Index>,
    routes: Routes,
    routed: Arc<Prefixes>,
}

/// The peers by what they are asked for.
#[derive(Debug)]
struct Index {
    by_key: HashMap<NodePublic, NodeId>,
    by_ip: HashMap<IpAddr, NodeId>,
    by_name: HashMap<String, NodeId>,
}

impl Netmap {
    /// The peer with this node key.
    pub fn peer_by_key(&self, key: &NodePublic) -> Option<&Arc<Peer>> {
        self.peers.get(self.index.by_key.get(key)?)
    }

    /// The peer that has `ip` as one of its own addresses, usable or not.
    pub fn peer_by_ip(&self, ip: IpAddr) -> Option<&Arc<Peer>> {
        self.peers.get(self.index.by_ip.get(&ip.to_canonical())?)
    }

    /// The addresses of the node with this full name, ours included. `name` is in the form of [`Peer::name`].
    pub fn addresses_of(&self, name: &str) -> Option<&[IpAddr]> {
        if name == self.self_node.name {
            return Some(&self.self_node.addresses);
        }
        Some(&self.peers.get(self.index.by_name.get(name)?)?.addresses)
    }

    /// Where packets to `ip` go: the longest prefix over all usable peers. `None` for our own addresses too.
    ///
    /// Of several peers with the same prefix the first counts in this order: one that control calls online, then one
    /// of which it does not say, then one offline; the better [`Voice`]; the one that control
    /// calls primary; the one with the lowest latency, as far as the difference is worth it; the lowest id.
    ///
    /// Peers whose key has ended, and peers without any path, never serve. Subnet routes count only
    /// if routes are accepted, and those to everything only by the chosen exit node and only for what is of the
    /// internet: it is never given a private address, nor one that [was the tailnet's](Self::was_routed), so that what
    /// is open by a route does not go on by the internet when the route goes.
    pub fn route(&self, ip: IpAddr) -> Option<Route<'_>> {
        self.routes.find(ip.to_canonical()).filter(|route| route.kind != RouteKind::Exit || self.may_exit(ip))
    }

    fn may_exit(&self, ip: IpAddr) -> bool {
        is_internet(ip) && !self.was_routed(ip)
    }

    /// Whether `peer` may send packets from `source`: exactly what it could be sent packets for, even where another peer
    /// serves the same prefix or a narrower one now, since its replies may still be on their way. The exit node's
    /// routes to everything allow what [`route`](Self::route) gives it, and so nothing that another serves.
    pub fn allowed(&self, peer: &Peer, source: IpAddr) -> bool {
        let kind = self.routes.serves(peer.id, source.to_canonical());
        kind.is_some_and(|kind| kind != RouteKind::Exit || self.may_exit(source))
    }

    /// Whether a route to `ip`, other than an exit node's, is, or was at any time in this run, in the netmap. What once
    /// belonged to the tailnet is never taken for public when its route goes.
    pub fn was_routed(&self, ip: IpAddr) -> bool {
        self.routed.cover(ip.to_canonical())
    }

    /// The same netmap, with peers that serve the same prefix in the order that `standing` gives them.
    #[must_use]
    pub fn with_standing(&self, standing: &Standing) -> Self {
        Self { routes: self.routes.ranked(standing), ..self.clone() }
    }

    /// The same netmap, in which each of these addresses leads to its peer alone: what was agreed upon with that peer,
    /// and no other has a part in.
    #[must_use]
    pub fn with_transits(&self, transits: &BTreeMap<IpAddr, NodeId>) -> Self {
        let routes = self.routes.with_transits(transits, |id| self.peers.get(&id).cloned());
        Self { routes, ..self.clone() }
    }

    /// Where a peer's PeerAPI answers us: by IPv4 where both have that, else by IPv6.
    /// Source: Tailscale, ipn/ipnlocal, `peerAPIBase`.
    pub fn peerapi(&self, peer: &Peer) -> Option<SocketAddr> {
        let ours = |ipv4: bool| self.self_node.addresses.iter().any(|ip| ip.is_ipv4() == ipv4);
        let base = |ipv4: bool, port: u16| {
            let ip = peer.addresses.iter().find(|ip| ip.is_ipv4() == ipv4).filter(|_| port != 0 && ours(ipv4))?;
            Some(SocketAddr::new(*ip, port))
        };
        base(true, peer.peerapi.0).or_else(|| base(false, peer.peerapi.1))
    }

    /// The peers that serve a prefix which another serves too: only their standing matters.
    pub fn rivals(&self) -> &BTreeSet<NodeId> {
        self.routes.rivals()
    }

    /// The address that packets to `remote` leave from: ours, or the one by which the peer that serves `remote` knows
    /// us. `None` if we have none of that family.
    pub fn source_for(&self, remote: IpAddr) -> Option<IpAddr> {
        let masquerade = self.route(remote).map(|route| route.peer.masquerade).unwrap_or_default();
        let as_known = match remote.to_canonical() {
            IpAddr::V4(_) => masquerade.v4.map(IpAddr::from),
            IpAddr::V6(_) => masquerade.v6.map(IpAddr::from),
        };
        let own =
            || self.self_node.addresses.iter().copied().find(|ip| ip.is_ipv4() == remote.to_canonical().is_ipv4());
        as_known.or_else(own)
    }

    /// Whether packets of `peer` to `ip` are for us.
    pub fn is_ours(&self, peer: &Peer, ip: IpAddr) -> bool {
        let known_as = match ip {
            IpAddr::V4(ip) => peer.masquerade.v4 == Some(ip),
            IpAddr::V6(ip) => peer.masquerade.v6 == Some(ip),
        };
        known_as || self.self_node.addresses.contains(&ip)
    }

    /// What full names of this tailnet's nodes end with, without dots at its ends; empty if control
    /// gives us no full name.
    pub fn magicdns_suffix(&self) -> &str {
        self.self_node.name.split_once('.').map_or("", |(_, suffix)| suffix)
    }
}
