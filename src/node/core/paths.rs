//! Which paths are said aloud: those of peers that a connection uses, once for each change that lasts.
//!
//! A peer that stays idle is nobody's business, and a path that is about to become a better one is not news. Addresses
//! are told at debug level alone.

use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::Core;
use super::told::{News, Way};
use crate::engine::{PathStatus, PeerStatus};
use crate::key::NodePublic;

/// Whether a relay still leads to a peer that has been sent something is not told before it has had so long to answer.
const ANSWERS: Duration = Duration::from_secs(1);
/// So long, and nothing has come: one that gets packets and has nothing to say says so after ten seconds.
/// Source: WireGuard, protocol, "Passive Keepalive".
const SILENT: Duration = Duration::from_secs(15);
/// How often it is looked whether a silent peer has been heard of.
const LOOK: Duration = Duration::from_secs(2);

impl Core {
    /// Says how packets reach a peer now, where that is news.
    pub(super) fn say_path(&mut self, key: &NodePublic, now: Instant) {
        let Some(status) = self.parts.engine.peer_status(key, now) else { return self.told.forget(key) };
        debug!(peer = self.name_of(key), path = %status.path, "peer's path");
        let silent = silence(&status, now);
        if (ANSWERS..SILENT).contains(&silent) {
            return self.told.look_again(key, now + LOOK);
        }
        // An old session outlives the handshakes that were given up.
        let lately = status.heard.is_some_and(|at| now.saturating_duration_since(at) < SILENT);
        let news = if silent >= SILENT {
            self.told.note_silent(*key, now)
        } else {
            let heard = status.established && status.asking_since.is_none() && lately;
            self.told.note(*key, way_by(&status), heard, now)
        };
        if let Some(news) = news {
            self.say_news(key, news, now);
        }
        self.told.watch(key, now + LOOK);
    }

    /// Says that a peer did not answer a dial.
    pub(in crate::node) fn say_silent(&mut self, key: &NodePublic, name: &str, now: Instant) {
        debug!(peer = name, "peer did not answer");
        // One that is gone has no path to be told of.
        if self.name_of(key).is_none() {
            return;
        }
        if let Some(news) = self.told.note_silent(*key, now) {
            self.say_news(key, news, now);
        }
        self.schedule(now);
    }

    /// A peer answered a dial: if it was said to be out of reach, it no longer is.
    pub(in crate::node) fn note_answer(&mut self, key: &NodePublic, now: Instant) {
        if self.told.note_answer(key) {
            self.say_path(key, now);
            self.schedule(now);
        }
    }

    /// Says what has become of the paths to all peers in use: a relay has come or gone.
    pub(super) fn say_paths(&mut self, now: Instant) {
        let peers: Vec<NodePublic> = self.told.in_use().copied().collect();
        peers.iter().for_each(|key| self.say_path(key, now));
    }

    /// Says what was put off until now.
    pub(super) fn say_due_paths(&mut self, now: Instant) {
        if self.told.next_deadline().is_none_or(|at| at > now) {
            return;
        }
        if let Some(more) = self.told.budget.sum_up(now) {
            match more.warns() {
                false => info!(%more, "more peers' paths have changed"),
                true => warn!(%more, "more peers' paths have changed"),
            }
        }
        self.told.due(now).iter().for_each(|key| self.say_path(key, now));
    }

    /// The end of what was a warning is one, too: whoever reads those alone shall not believe in it any longer.
    fn say_news(&mut self, key: &NodePublic, news: News, now: Instant) {
        if !self.told.budget.may_say(news, now) {
            return;
        }
        let Some(status) = self.parts.engine.peer_status(key, now) else { return };
        let (peer, path) = (self.name_of(key), status.path);
        match news {
            News::Way(Way::Direct) => info!(peer, "peer is reached directly"),
            News::Way(Way::Relay) => info!(peer, %path, "peer is reached by a relay"),
            News::Way(Way::Nothing) if status.open => warn!(peer, "peer cannot be reached: it does not answer"),
            News::Way(Way::Nothing) => warn!(peer, "peer cannot be reached: no path to it works"),
            News::Again(Some(Way::Direct)) => warn!(peer, "peer can be reached again, directly"),
            News::Again(Some(Way::Relay)) => warn!(peer, %path, "peer can be reached again, by a relay"),
            News::Again(Some(Way::Nothing) | None) => warn!(peer, "peer can be reached again"),
        }
    }

    fn name_of(&self, key: &NodePublic) -> Option<&str> {
        let peer = self.parts.engine.netmap()?.peer_by_key(key)?;
        Some(peer.name.as_str())
    }
}

/// The kind of way that packets leave by. A peer without disco has no path that could be told, and is sent to all the
/// same.
fn way_by(status: &PeerStatus) -> Option<Way> {
    match status.path {
        PathStatus::Derp { .. } if status.open => Some(Way::Relay),
        PathStatus::Direct { .. } => Some(Way::Direct),
        PathStatus::None if status.open => None,
        PathStatus::Derp { .. } | PathStatus::None => Some(Way::Nothing),
    }
}

/// For how long a peer that packets go to by a relay has been silent.
fn silence(status: &PeerStatus, now: Instant) -> Duration {
    let relayed = matches!(status.path, PathStatus::Derp { .. }) && status.open;
    let since = status.unheard_since.or(status.asking_since).filter(|_| relayed);
    since.map(|since| now.saturating_duration_since(since)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::bed::core;
    use crate::node::dial::bed::Tailnet;

    /// The last octets of the keys of peers in use.
    fn in_use(core: &Core) -> Vec<u8> {
        let mut peers: Vec<u8> = core.told.in_use().map(|key| key.as_bytes()[31]).collect();
        peers.sort_unstable();
        peers
    }

    #[tokio::test]
    async fn connections_are_counted_with_the_peer_that_their_route_leads_to_now() {
        let now = Instant::now();
        let (mut core, mut tailnet) = (core(now), Tailnet::new());
        core.handle_netmap(tailnet.map(&["10.20.0.0/16"], &[], &[]), now);
        assert!(in_use(&core).is_empty());
        let flows: Vec<_> = ["10.20.0.1:53", "10.20.0.2:53", "100.64.0.4:53"]
            .map(|remote| core.open_udp(remote.parse().unwrap()).unwrap().unwrap())
            .into();
        assert_eq!(in_use(&core), [2, 4]);
        core.handle_netmap(tailnet.map(&[], &["10.20.0.0/16"], &[]), now);
        assert_eq!(in_use(&core), [3, 4]);
        for (flow, left) in flows.into_iter().zip([vec![3, 4], vec![4], vec![]]) {
            core.release(flow, now);
            assert_eq!(in_use(&core), left);
        }
    }
}
