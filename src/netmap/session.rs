//! One run's conversation about the map: control's messages, full or delta, to whole netmaps.
//!
//! The first message of a stream is everything, each later one only what changed. A message is
//! applied whole or not at all. Peers that a message does not touch stay the very same [`Arc`], so
//! whoever compares two netmaps compares pointers.
//! Source: Tailscale, control/controlclient/map.go.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::accept::Accept;
use super::node::{CLOCK_IS_SET, ended, peer};
use super::routes::Prefixes;
use super::state::State;
use super::{Netmap, RouteKind};
use crate::wire::tailcfg::map::{DialPlan, MapResponse, PingRequest};

/// A smaller difference between control's clock and ours may be the network's, and is ignored.
/// Source: Tailscale, ipn/ipnlocal/expiry.go, `minClockDelta`.
const MIN_SKEW: SignedDuration = SignedDuration::from_mins(1);

/// The longest that control may ask us not to read. Source: Tailscale, control/controlclient, `maxSleep`.
const MAX_SLEEP: f64 = 300.0;

/// Why a message cannot be applied; the session is as it was before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The first message of a stream does not describe ourselves.
    #[error("the first message of the map stream has no self node")]
    NoSelfNode,
}

/// What a message brought.
#[derive(Debug, Default)]
pub struct Applied {
    /// The new netmap; `None` if the message changed nothing of it, as keep-alives do.
    pub netmap: Option<Arc<Netmap>>,
    /// A question to answer. Repetitions are left out.
    pub ping: Option<PingRequest>,
    /// A page for a person to visit. Repetitions are left out.
    pub browser_url: Option<String>,
    /// All problems that control sees with us, if they changed.
    pub health: Option<Vec<String>>,
    /// How long control asks us not to read the stream.
    pub sleep: Option<Duration>,
    /// Where to find control without DNS, if that changed; no candidates for nowhere.
    pub dial_plan: Option<DialPlan>,
}

/// The state behind a run's netmaps.
#[derive(Debug)]
pub struct Session {
    accept: Accept,
    state: Option<State>,
    /// Whether the next message must be a full one.
    awaits_full: bool,
    /// Control's clock minus ours, once control said its own.
    skew: SignedDuration,
    ping_url: String,
    browser_url: String,
    routed: Arc<Prefixes>,
}

impl Session {
    /// A session that has heard nothing yet. `accept_routes`: whether subnet routes of peers are used.
    pub fn new(accept_routes: bool) -> Self {
        Self {
            accept: Accept { subnets: accept_routes, exit_node: None },
            state: None,
            awaits_full: true,
            skew: SignedDuration::ZERO,
            ping_url: String::new(),
            browser_url: String::new(),
            routed: Arc::default(),
        }
    }

    /// Sends everything that has no other route through this peer: a stable id, a name, or an address.
    pub fn with_exit_node(mut self, exit_node: String) -> Self {
        self.accept.exit_node = Some(exit_node);
        self
    }

    /// A new stream begins: its first message replaces everything. Only what was ever routed is
    /// remembered, and the present netmap stays valid until then.
    pub fn restart(&mut self) {
        self.awaits_full = true;
    }

    /// Applies one message, received at `now` by our own clock.
    ///
    /// # Errors
    /// [`MapError::NoSelfNode`] if the first message of a stream has none; nothing has changed then.
    pub fn apply(&mut self, message: MapResponse, now: Timestamp) -> Result<Applied, MapError> {
        if !message.keep_alive && self.awaits_full && message.node.is_none() {
            return Err(MapError::NoSelfNode);
        }
        let mut message = message;
        let mut applied = Applied {
            ping: message.ping_request.take().filter(|ping| replace(&mut self.ping_url, &ping.url)),
            browser_url: Some(std::mem::take(&mut message.pop_browser_url))
                .filter(|url| !url.is_empty() && replace(&mut self.browser_url, url)),
            dial_plan: message.control_dial_plan.take(),
            ..Applied::default()
        };
        if let Some(control_time) = message.control_time {
            self.skew = control_time.duration_since(now);
        }
        if message.keep_alive {
            return Ok(applied);
        }
        applied.sleep =
            message.debug.map(|debug| debug.sleep_seconds).filter(|seconds| *seconds > 0.0).map(|seconds| {
                // `min` also bounds what a float can hold and a duration cannot.
                Duration::from_secs_f64(seconds.min(MAX_SLEEP))
            });
        let changes_map = self.awaits_full || changes_map(&message);
        self.update(&mut message, now);
        applied.health = self.state.as_mut().and_then(|state| state.update_health(&mut message));
        if changes_map {
            applied.netmap = self.netmap(now);
        }
        Ok(applied)
    }

    /// When [`expire`](Self::expire) is due by our own clock: a key in the netmap ends then, ours included. While a new
    /// stream has said nothing yet, ours is not: what is known of it may be of the key that we had before.
    pub fn next_expiry(&self) -> Option<Timestamp> {
        let state = self.state.as_ref()?;
        let peers = state.peers.values().filter(|tracked| !tracked.peer.expired).map(|tracked| &*tracked.node);
        let ours = (!self.awaits_full).then_some(&state.node);
        let due = peers.chain(ours).filter(|node| !node.expired).filter_map(|node| node.key_expiry).min()?;
        due.max(CLOCK_IS_SET).checked_sub(self.correction()).ok()
    }

    /// The netmap without the peers whose keys have ended by `now`, if any has since the last one.
    pub fn expire(&mut self, now: Timestamp) -> Option<Arc<Netmap>> {
        let clock = self.control_clock(now);
        let awaits_full = self.awaits_full;
        let state = self.state.as_mut()?;
        let self_ended = !awaits_full && !state.node.expired && ended(&state.node, clock);
        // What has ended once stays so until control sends the node anew, and is reported once.
        state.node.expired |= self_ended;
        let stale = state.peers.values().any(|tracked| tracked.peer.expired != ended(&tracked.node, clock));
        (self_ended || stale).then(|| self.netmap(now)).flatten()
    }

    fn correction(&self) -> SignedDuration {
        if self.skew.abs() > MIN_SKEW { self.skew } else { SignedDuration::ZERO }
    }

    fn control_clock(&self, now: Timestamp) -> Timestamp {
        now.checked_add(self.correction()).unwrap_or(now)
    }

    fn update(&mut self, message: &mut MapResponse, now: Timestamp) {
        let clock = self.control_clock(now);
        let node = message.node.take();
        if self.awaits_full
            && let Some(node) = node
        {
            let known = self.state.take().map(|state| state.peers).unwrap_or_default();
            let mut state = State::new(node);
            if message.peers.is_empty() {
                state.update_peers(message, clock);
            } else {
                state.replace_peers(std::mem::take(&mut message.peers), known, clock);
            }
            state.update_settings(message);
            self.state = Some(state);
            self.awaits_full = false;
            return;
        }
        let Some(state) = &mut self.state else { return };
        if let Some(node) = node {
            state.set_node(node);
        }
        if message.peers.is_empty() {
            state.update_peers(message, clock);
        } else {
            let known = std::mem::take(&mut state.peers);
            state.replace_peers(std::mem::take(&mut message.peers), known, clock);
        }
        state.update_settings(message);
    }

    /// The netmap of the present state. Keys that have ended meanwhile count.
    fn netmap(&mut self, now: Timestamp) -> Option<Arc<Netmap>> {
        let clock = self.control_clock(now);
        let state = self.state.as_mut()?;
        for tracked in state.peers.values_mut() {
            if tracked.peer.expired != ended(&tracked.node, clock) {
                tracked.peer = Arc::new(peer(&tracked.node, clock));
            }
        }
        let view = state.view(&self.accept);
        for (_, tracked) in state.shown(&view) {
            for (prefix, kind) in self.accept.served(&tracked.peer, view.exit_node) {
                // An exit node's would cover everything, and nothing could be told apart any more.
                if kind != RouteKind::Exit {
                    Prefixes::add(&mut self.routed, prefix);
                }
            }
        }
        let mut netmap = state.netmap(&self.accept, &view, Arc::clone(&self.routed), clock);
        if self.awaits_full {
            Arc::make_mut(&mut netmap.self_node).expired = false;
        }
        Some(Arc::new(netmap))
    }
}

/// Stores `new` and says whether it was another.
fn replace(known: &mut String, new: &str) -> bool {
    let other = known != new;
    if other {
        new.clone_into(known);
    }
    other
}

fn changes_map(message: &MapResponse) -> bool {
    message.node.is_some()
        || message.derp_map.is_some()
        || message.dns_config.is_some()
        || message.lock.is_some()
        || !message.domain.is_empty()
        || !message.peers.is_empty()
        || !message.peers_changed.is_empty()
        || !message.peers_removed.is_empty()
        || !message.peers_changed_patch.is_empty()
        || !message.online_change.is_empty()
}

#[cfg(test)]
mod tests;
