//! Which peer serves an address: the longest prefix over all usable peers, and the best peer of those who serve it.
//!
//! Nearly every prefix of a tailnet is one address, and an app connector brings thousands more, so
//! single addresses live in a hash map and only the rest in a trie. Few prefixes are served by several peers; these
//! contests are kept beside the table, so that another order of them costs no new table.
//! Source: Tailscale, net/routemanager, and wgengine/wgcfg/nmcfg, `WGCfg`.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use prefix_trie::joint::{JointPrefixMap, JointPrefixSet};

use super::accept::{Accept, usable};
use super::standing::{LatencyClass, Standing, Voice};
use super::{NodeId, Peer, Route, RouteKind};

/// One peer's claim to a prefix.
#[derive(Debug, Clone)]
struct Claim {
    peer: Arc<Peer>,
    kind: RouteKind,
    /// Whether control calls the peer primary for the prefix.
    primary: bool,
}

impl Claim {
    /// Smaller is better. Whether the peer is online and primary is control's word; whether it answers, and how far
    /// away, is the data plane's.
    fn rank(&self, standing: &Standing) -> (u8, Voice, bool, LatencyClass, NodeId) {
        let availability = match self.peer.online {
            Some(true) => 0,
            None => 1,
            Some(false) => 2,
        };
        let id = self.peer.id;
        (availability, standing.voice(id), !self.primary, standing.latency(id), id)
    }
}

/// Who serves a prefix.
#[derive(Debug)]
enum Holder {
    One(Claim),
    /// The contest with this index.
    Several(usize),
}

#[derive(Debug, Default)]
struct Table {
    single: HashMap<IpAddr, Holder>,
    wide: JointPrefixMap<IpNet, Holder>,
}

/// All routes of a netmap.
#[derive(Debug, Clone, Default)]
pub(super) struct Routes {
    table: Arc<Table>,
    /// The claims to each prefix that several peers serve, the best first.
    contests: Arc<Vec<Vec<Claim>>>,
    rivals: Arc<BTreeSet<NodeId>>,
    /// Addresses that are agreed upon with one peer, ahead of everything else.
    transits: Arc<HashMap<IpAddr, Arc<Peer>>>,
}

impl Routes {
    /// The routes to `peers`, as long as nothing is known of their standing.
    pub(super) fn new<'a>(
        peers: impl Iterator<Item = &'a Arc<Peer>>,
        accept: &Accept,
        exit_node: Option<NodeId>,
    ) -> Self {
        let mut table = Table::default();
        let mut contests = Vec::new();
        for peer in peers {
            let primary: HashSet<IpNet> = peer.primary_routes.iter().copied().collect();
            for (prefix, kind) in accept.served(peer, exit_node) {
                let claim = Claim { peer: Arc::clone(peer), kind, primary: primary.contains(&prefix) };
                table.add(prefix, claim, &mut contests);
            }
        }
        let rivals = contests.iter().flatten().map(|claim: &Claim| claim.peer.id).collect();
        let (table, contests, rivals) = (Arc::new(table), Arc::new(contests), Arc::new(rivals));
        let routes = Self { table, contests, rivals, transits: Arc::default() };
        routes.ranked(&Standing::default())
    }

    /// The same routes in the order that `standing` gives them.
    pub(super) fn ranked(&self, standing: &Standing) -> Self {
        let ranked = |claims: &Vec<Claim>| {
            let mut claims = claims.clone();
            claims.sort_by_key(|claim| claim.rank(standing));
            claims
        };
        Self { contests: Arc::new(self.contests.iter().map(ranked).collect()), ..self.clone() }
    }

    /// The same routes, but for addresses that are agreed upon with one peer each.
    pub(super) fn with_transits(
        &self,
        transits: &BTreeMap<IpAddr, NodeId>,
        peer: impl Fn(NodeId) -> Option<Arc<Peer>>,
    ) -> Self {
        let peer = |id| peer(id).filter(|peer| usable(peer));
        let transits = transits.iter().filter_map(|(ip, id)| Some((*ip, peer(*id)?))).collect();
        Self { transits: Arc::new(transits), ..self.clone() }
    }

    /// The peers that serve a prefix which another serves too.
    pub(super) fn rivals(&self) -> &BTreeSet<NodeId> {
        &self.rivals
    }

    /// The best claim to the longest prefix that covers `ip`.
    pub(super) fn find(&self, ip: IpAddr) -> Option<Route<'_>> {
        let host = IpNet::from(ip);
        if let Some(peer) = self.transits.get(&ip) {
            return Some(Route { prefix: host, peer, kind: RouteKind::Subnet });
        }
        let (prefix, holder) = match self.table.single.get(&ip) {
            Some(holder) => (host, holder),
            None => self.table.wide.get_lpm(&host)?,
        };
        let best = self.claims(holder).first()?;
        Some(Route { prefix, peer: &best.peer, kind: best.kind })
    }

    /// Why the peer with this id has a claim to any prefix that covers `ip`: as an exit node only if for no other
    /// reason. `None` if it has none.
    pub(super) fn serves(&self, id: NodeId, ip: IpAddr) -> Option<RouteKind> {
        if let Some(peer) = self.transits.get(&ip) {
            return (peer.id == id).then_some(RouteKind::Subnet);
        }
        let holders = self.table.single.get(&ip).into_iter().chain(self.table.wide.cover_values(&IpNet::from(ip)));
        let claims = holders.flat_map(|holder| self.claims(holder)).filter(|claim| claim.peer.id == id);
        claims.map(|claim| claim.kind).min_by_key(|kind| *kind == RouteKind::Exit)
    }

    fn claims<'a>(&'a self, holder: &'a Holder) -> &'a [Claim] {
        match holder {
            Holder::One(claim) => std::slice::from_ref(claim),
            Holder::Several(index) => self.contests.get(*index).map_or(&[], Vec::as_slice),
        }
    }
}

impl Table {
    fn add(&mut self, prefix: IpNet, claim: Claim, contests: &mut Vec<Vec<Claim>>) {
        let single = prefix.prefix_len() == prefix.max_prefix_len();
        let known = if single { self.single.get_mut(&prefix.addr()) } else { self.wide.get_mut(&prefix) };
        match known {
            Some(Holder::Several(index)) => contests[*index].push(claim),
            Some(holder) => {
                if let Holder::One(first) = std::mem::replace(holder, Holder::Several(contests.len())) {
                    contests.push(vec![first, claim]);
                }
            }
            None if single => _ = self.single.insert(prefix.addr(), Holder::One(claim)),
            None => _ = self.wide.insert(prefix, Holder::One(claim)),
        }
    }
}

/// Prefixes that were ever routed in this run.
#[derive(Debug, Clone, Default)]
pub(super) struct Prefixes(JointPrefixSet<IpNet>);

impl Prefixes {
    /// Whether one of them covers `ip`.
    pub(super) fn cover(&self, ip: IpAddr) -> bool {
        self.0.is_covered(&IpNet::from(ip))
    }

    /// Adds a prefix unless it is covered already. The set is copied only when it changes while a
    /// netmap shares it.
    pub(super) fn add(this: &mut Arc<Self>, prefix: IpNet) {
        if !this.0.is_covered(&prefix) {
            Arc::make_mut(this).0.insert(prefix);
        }
    }
}

#[cfg(test)]
mod tests;
