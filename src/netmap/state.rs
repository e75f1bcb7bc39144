//! What control has said so far in one stream of map messages, and how a delta changes it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, OnceLock};

use jiff::Timestamp;

use super::accept::Accept;
use super::node::{ended, has_subdomains, name, peer, self_node};
use super::routes::{Prefixes, Routes};
use super::{Index, Netmap, NodeId, Peer, lock};
use crate::key::signature::{Authorised, SignatureError};
use crate::wire::tailcfg::derp::DerpMap;
use crate::wire::tailcfg::dns::DnsConfig;
use crate::wire::tailcfg::map::{DisplayMessage, LockState, MapResponse};
use crate::wire::tailcfg::node::Node;

#[derive(Debug)]
pub(super) struct State {
    /// Ourselves.
    pub(super) node: Node,
    /// What [`lock::verdict`] says of ourselves, once somebody asked.
    verdict: OnceLock<Result<Authorised, SignatureError>>,
    /// Everybody else.
    pub(super) peers: BTreeMap<NodeId, Tracked>,
    domain: String,
    derp: Arc<DerpMap>,
    dns: Arc<DnsConfig>,
    health: Vec<String>,
    messages: BTreeMap<String, DisplayMessage>,
    lock: LockState,
}

/// What follows for a netmap from all peers together.
#[derive(Debug)]
pub(super) struct View {
    /// The peers that the tailnet lock hides.
    hidden: BTreeSet<NodeId>,
    /// The peer whose routes to everything are used.
    pub(super) exit_node: Option<NodeId>,
}

/// A peer in control's words and in ours.
#[derive(Debug)]
pub(super) struct Tracked {
    /// Boxed as it was read: ten thousand are moved about, and tree nodes are half empty.
    pub(super) node: Box<Node>,
    pub(super) peer: Arc<Peer>,
    /// What [`lock::verdict`] says, once somebody asked: it costs a signature's check or two.
    pub(super) verdict: OnceLock<Result<Authorised, SignatureError>>,
}

impl Tracked {
    /// What its signature says of its key.
    pub(super) fn verdict(&self) -> &Result<Authorised, SignatureError> {
        self.verdict.get_or_init(|| lock::verdict(&self.node))
    }
}

impl State {
    /// What is known once control has described ourselves: nothing else.
    pub(super) fn new(node: Node) -> Self {
        Self {
            node,
            verdict: OnceLock::new(),
            peers: BTreeMap::new(),
            domain: String::new(),
            derp: Arc::default(),
            dns: Arc::default(),
            health: Vec::new(),
            messages: BTreeMap::new(),
            lock: LockState::default(),
        }
    }

    /// Control has described ourselves anew.
    pub(super) fn set_node(&mut self, node: Node) {
        self.node = node;
        self.verdict = OnceLock::new();
    }

    /// Makes `nodes` the only peers. Those that are as before in `known` stay the same value.
    #[expect(clippy::vec_box, reason = "they stay in the boxes that they were read into")]
    pub(super) fn replace_peers(
        &mut self,
        nodes: Vec<Box<Node>>,
        mut known: BTreeMap<NodeId, Tracked>,
        clock: Timestamp,
    ) {
        self.peers.clear();
        for node in nodes {
            let before = known.remove(&node.id);
            self.track(node, before, clock);
        }
    }

    /// A delta's peers, in the order that control means: gone, changed, online, patched.
    pub(super) fn update_peers(&mut self, message: &mut MapResponse, clock: Timestamp) {
        for id in &message.peers_removed {
            self.peers.remove(id);
        }
        for node in std::mem::take(&mut message.peers_changed) {
            let before = self.peers.remove(&node.id);
            self.track(node, before, clock);
        }
        for (id, online) in &message.online_change {
            self.change(*id, clock, |node| node.online = Some(*online));
        }
        for patch in std::mem::take(&mut message.peers_changed_patch) {
            self.change(patch.node_id, clock, |node| node.patch(patch));
        }
    }

    fn change(&mut self, id: NodeId, clock: Timestamp, change: impl FnOnce(&mut Node)) {
        let Some(before) = self.peers.remove(&id) else { return };
        let mut node = before.node.clone();
        change(&mut node);
        self.track(node, Some(before), clock);
    }

    /// Keeps a peer, the new value of it only if that is another: what stays in its place leaves no holes in memory
    /// when control repeats ten thousand peers.
    fn track(&mut self, node: Box<Node>, before: Option<Tracked>, clock: Timestamp) {
        // A peer without key can never be spoken to.
        if node.key.is_zero() {
            return;
        }
        let (mut same, mut verdict) = (None, OnceLock::new());
        if let Some(before) = before {
            if before.node == node && before.peer.expired == ended(&node, clock) {
                self.peers.insert(node.id, before);
                return;
            }
            if before.node.key == node.key && before.node.key_signature == node.key_signature {
                verdict = before.verdict;
            }
            same = Some(before.peer);
        }
        let now = peer(&node, clock);
        let peer = same.filter(|before| **before == now).unwrap_or_else(|| Arc::new(now));
        self.peers.insert(node.id, Tracked { node, peer, verdict });
    }

    /// What a message says besides peers and problems.
    pub(super) fn update_settings(&mut self, message: &mut MapResponse) {
        if let Some(update) = message.derp_map.take() {
            self.derp = Arc::new(self.derp.merged(update));
        }
        if let Some(dns) = message.dns_config.take() {
            self.dns = Arc::new(dns);
        }
        if !message.domain.is_empty() {
            self.domain = std::mem::take(&mut message.domain);
        }
        if let Some(lock) = message.lock.take() {
            self.lock = lock;
        }
    }

    /// All problems, if the message says anything of them.
    pub(super) fn update_health(&mut self, message: &mut MapResponse) -> Option<Vec<String>> {
        let messages = std::mem::take(&mut message.display_messages);
        if message.health.is_none() && messages.is_empty() {
            return None;
        }
        if let Some(health) = message.health.take() {
            self.health = health;
        }
        if messages.get("*").is_some_and(Option::is_none) {
            self.messages.clear();
        }
        for (id, message) in messages {
            match message {
                Some(message) => self.messages.insert(id, message),
                None => self.messages.remove(&id),
            };
        }
        let shown = self.messages.values().map(|DisplayMessage { title, text }| match text.is_empty() {
            true => title.clone(),
            false => format!("{title}: {text}"),
        });
        Some(self.health.iter().cloned().chain(shown).collect())
    }

    /// Who is there, and whose routes to everything are used.
    pub(super) fn view(&self, accept: &Accept) -> View {
        let ours = name(&self.node.name);
        let suffix = ours.split_once('.').map_or("", |(_, suffix)| suffix);
        let hidden = if self.is_locked() { lock::hidden(&self.peers) } else { BTreeSet::new() };
        let mut view = View { hidden, exit_node: None };
        view.exit_node = accept.exit_node(self.shown(&view).map(|(_, tracked)| &tracked.peer), suffix);
        view
    }

    /// The peers that the tailnet lock does not hide.
    pub(super) fn shown<'a>(&'a self, view: &'a View) -> impl Iterator<Item = (NodeId, &'a Tracked)> {
        self.peers.iter().map(|(id, tracked)| (*id, tracked)).filter(|(id, _)| !view.hidden.contains(id))
    }

    fn is_locked(&self) -> bool {
        !self.lock.head.is_empty() && !self.lock.disabled
    }

    fn is_locked_out(&self) -> bool {
        self.is_locked() && self.verdict.get_or_init(|| lock::verdict(&self.node)).is_err()
    }

    /// All of it as one netmap.
    pub(super) fn netmap(&self, accept: &Accept, view: &View, routed: Arc<Prefixes>, clock: Timestamp) -> Netmap {
        let peers: BTreeMap<_, _> = self.shown(view).map(|(id, tracked)| (id, Arc::clone(&tracked.peer))).collect();
        let mut by_name = HashMap::new();
        let mut by_ip = HashMap::new();
        for (id, peer) in &peers {
            by_name.entry(peer.name.clone()).or_insert(*id);
            for ip in &peer.addresses {
                by_ip.entry(*ip).or_insert(*id);
            }
        }
        let nodes = self.shown(view).map(|(_, tracked)| &*tracked.node).chain([&self.node]);
        Netmap {
            self_node: Arc::new(self_node(&self.node, clock)),
            index: Arc::new(Index { by_key: peers.values().map(|peer| (peer.key, peer.id)).collect(), by_ip, by_name }),
            routes: Routes::new(peers.values(), accept, view.exit_node),
            exit_node: view.exit_node,
            exit_wanted: accept.exit_node.is_some(),
            routed,
            peers: Arc::new(peers),
            domain: self.domain.clone(),
            derp: Arc::clone(&self.derp),
            dns: Arc::clone(&self.dns),
            locked_out: self.is_locked_out(),
            unsigned_peers: view.hidden.len(),
            subdomain_hosts: Arc::new(nodes.filter(|node| has_subdomains(node)).map(|node| name(&node.name)).collect()),
        }
    }
}
