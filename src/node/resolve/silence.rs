//! Why nobody answers for a name: a resolver that is silent, or a peer on the way to it that is.

use std::time::{Duration, Instant};

use super::super::core::Shared;
use super::super::dial::{Verdict, verdict};
use super::super::error::ResolveError;
use super::Resolvers;
use super::question::Concluded;
use super::servers::{Candidate, candidates};
use crate::dns::{Decision, ResolverAddr};
use crate::engine::{PathStatus, Transport};
use crate::lapse::Lapse;
use crate::netmap::{Netmap, Peer};

/// What it takes to tell the two apart.
#[derive(Clone)]
pub(super) struct Silence {
    pub(super) core: Shared,
    pub(super) transport: Transport,
}

/// What is known of the way to a resolver that did not answer.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    /// Nothing is wrong with it, as far as is known.
    Fine,
    /// Its peer may be gone.
    Doubtful(String),
    /// Its peer is out of reach.
    Broken(String),
    /// Nothing was sent to its peer: others came first, and the time was over.
    Unasked,
}

impl Silence {
    /// Says of a question without an answer, asked since `begun`, what is known of the ways to those who could answer.
    pub(super) fn explained(&self, mut concluded: Concluded, resolvers: &[ResolverAddr], begun: Instant) -> Concluded {
        if let Err(ResolveError::Silent { name, limit, .. }) = &concluded.outcome
            && let Some(error) = self.explain(name, resolvers, *limit, begun)
        {
            concluded.outcome = Err(error);
        }
        concluded
    }

    /// Why none of `resolvers` has answered for `name` since `begun`; `None` where the newest netmap has none of them.
    fn explain(&self, name: &str, resolvers: &[ResolverAddr], limit: Duration, begun: Instant) -> Option<ResolveError> {
        let netmap = self.core.borrow().netmap().borrow().clone()?;
        let asked = candidates(&netmap, resolvers, None).ok()?;
        let ways = asked.into_iter().map(|candidate| {
            let way = self.way(&netmap, &candidate, begun);
            (candidate.label, way)
        });
        Some(told(name, ways.collect(), limit))
    }

    fn way(&self, netmap: &Netmap, candidate: &Candidate, begun: Instant) -> Way {
        let Some(peer) = candidate.peer.and_then(|key| netmap.peer_by_key(&key)) else { return Way::Fine };
        let name = &peer.name;
        if peer.online == Some(false) {
            return Way::Broken(format!("{name}, which leads there, is offline"));
        }
        if self.was_never_asked(peer) {
            return Way::Unasked;
        }
        match verdict(&self.core, &peer.key, self.transport, begun) {
            Verdict::TargetSilent { unheard: None } => Way::Fine,
            Verdict::TargetSilent { unheard: Some(lapse) } => {
                Way::Doubtful(format!("nothing has come from {name}, which leads there, for {}", Lapse(lapse)))
            }
            Verdict::PeerSilent(gap) => {
                let now = Instant::now();
                self.core.borrow_mut().say_silent(&peer.key, name, now);
                let (by, heard) = self.last_known(peer, now);
                // What finds no way out goes by none.
                let (by, gap) = gap.map_or((by, ""), |gap| (String::new(), gap.told()));
                let waited = Lapse(now.saturating_duration_since(begun));
                Way::Broken(format!("{name}, which leads there, did not answer{by} in {waited}{gap}; it was {heard}"))
            }
        }
    }

    /// Whether nothing is on its way to a peer, not even a handshake.
    fn was_never_asked(&self, peer: &Peer) -> bool {
        let status = self.core.borrow_mut().engine().peer_status(&peer.key, Instant::now());
        status.is_some_and(|status| !status.established && status.asking_since.is_none())
    }

    /// The way by which a peer is spoken to, and when it was heard.
    fn last_known(&self, peer: &Peer, now: Instant) -> (String, String) {
        let status = self.core.borrow_mut().engine().peer_status(&peer.key, now);
        let by = match status.map_or(PathStatus::None, |status| status.path) {
            PathStatus::Direct { .. } => " directly".to_owned(),
            PathStatus::Derp { region } => format!(" by relay (region {region})"),
            PathStatus::None => String::new(),
        };
        let heard = status.and_then(|status| status.heard).map(|at| Lapse(now.saturating_duration_since(at)));
        (by, heard.map_or("never heard".to_owned(), |lapse| format!("last heard {lapse} ago")))
    }
}

/// Where every way is broken, that is what to mend: a resolver that no question reaches is not to blame.
fn told(name: &str, ways: Vec<(String, Way)>, limit: Duration) -> ResolveError {
    let (mut broken, mut labels, mut annotated) = (Vec::new(), Vec::new(), Vec::new());
    let mut some_reached = false;
    for (label, way) in ways {
        some_reached |= matches!(way, Way::Fine | Way::Doubtful(_));
        match way {
            Way::Fine => annotated.push(label),
            Way::Unasked => annotated.push(format!("{label} (not asked yet)")),
            Way::Doubtful(why) => annotated.push(format!("{label} ({why})")),
            Way::Broken(why) => {
                annotated.push(format!("{label} ({why})"));
                broken.push(why);
                labels.push(label);
            }
        }
    }
    let name = name.to_owned();
    if some_reached || broken.is_empty() {
        return ResolveError::Silent { name, resolver: annotated.join(", "), limit };
    }
    // Resolvers behind one peer have one reason.
    broken.dedup();
    ResolveError::Unreachable { name, resolver: labels.join(", "), detail: broken.join(", and ") }
}

impl Resolvers {
    /// Why nobody has answered for `name` within `limit`, since `begun`.
    pub(in crate::node) fn unanswered(
        &self,
        netmap: &Netmap,
        name: &str,
        limit: Duration,
        begun: Instant,
    ) -> ResolveError {
        let asked = self.decisions(netmap, name).unwrap_or_default().into_iter().find_map(|decision| match decision {
            Decision::Resolvers { resolvers, .. }
            | Decision::App { resolvers, .. }
            | Decision::Default { resolvers } => Some(resolvers),
            Decision::Addresses { .. } | Decision::Nonexistent { .. } | Decision::Nobody => None,
        });
        let explained = asked.and_then(|resolvers| self.silence.explain(name, &resolvers, limit, begun));
        let resolver = || "the tailnet's resolvers".to_owned();
        explained.unwrap_or_else(|| ResolveError::Silent { name: name.to_owned(), resolver: resolver(), limit })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::node::dial::bed::{Tailnet, peer};
    use crate::node::dial::{Host, Target, locate};
    use crate::node::{Config, Node};

    #[tokio::test(flavor = "local")]
    async fn a_peer_out_of_reach_is_blamed_and_not_the_resolvers_behind_it() {
        let both = "resolver 10.20.0.53:53, 10.20.0.54:53 for git.corp.test cannot be reached: router.tb.example, ";
        let silent = "; no direct path to it works, and no connected relay leads to it; it was never heard";
        for (online, why, end) in [(true, "did not answer in ", silent), (false, "is offline", "")] {
            let node = Node::alone(Config { dial_timeout: Duration::from_millis(200), ..Config::default() });
            let inner = &node.inner;
            // The netmap that a node alone has comes first.
            let before = inner.netmap.clone().wait_for(Option::is_some).await.unwrap().clone().unwrap();
            let router = peer(3, "router", &["10.20.0.0/16"], &json!({ "Online": online }));
            let resolvers = json!([{ "Addr": "10.20.0.53" }, { "Addr": "10.20.0.54" }]);
            let dns = json!({ "Routes": { "corp.test.": resolvers } });
            inner.core.borrow_mut().handle_netmap(Tailnet::new().with_dns(&[router], &dns), Instant::now());

            let (name, limit) = ("git.corp.test".to_owned(), Duration::from_secs(10));
            let concluded = || Err(ResolveError::Silent { name: name.clone(), resolver: String::new(), limit });
            let asked =
                ["10.20.0.53:53", "10.20.0.54:53"].map(|addr| ResolverAddr::Plain { addr: addr.parse().unwrap() });
            let explain = || {
                let concluded = Concluded { outcome: concluded(), ttl: Duration::ZERO, by: None };
                let explained = inner.resolvers.silence.explained(concluded, &asked, Instant::now());
                explained.outcome.unwrap_err().to_string()
            };
            if online {
                let unasked = "10.20.0.53:53 (not asked yet), 10.20.0.54:53 (not asked yet)";
                assert_eq!(explain(), format!("no answer for {name} from {unasked} within 10s"));
            }
            // The same where the dial has less time than the question.
            let target = Target { host: Host::Name(name.clone()), port: 80 };
            let located = locate(inner, before, &target, Instant::now() + inner.config.dial_timeout).await;
            let located = located.err().expect("nobody answers");
            for told in [explain(), located.to_string()] {
                let wanted = format!("{both}which leads there, {why}");
                assert!(told.starts_with(&wanted) && told.ends_with(end), "{told}");
            }
        }
    }

    #[test]
    fn a_resolver_to_which_a_way_leads_is_silent_itself_and_what_is_known_of_the_others_is_said_beside() {
        let way = |label: &str, way| (label.to_owned(), way);
        let (broken, doubtful) = (|| Way::Broken("r is offline".to_owned()), Way::Doubtful("r is quiet".to_owned()));
        let told = |ways| told("a.test", ways, Duration::from_secs(10)).to_string();
        assert_eq!(
            told(vec![way("p", Way::Fine), way("q", broken()), way("s", doubtful)]),
            "no answer for a.test from p, q (r is offline), s (r is quiet) within 10s"
        );
        assert_eq!(
            told(vec![way("p", broken()), way("u", Way::Unasked), way("q", broken())]),
            "resolver p, q for a.test cannot be reached: r is offline"
        );
        assert_eq!(told(vec![way("u", Way::Unasked)]), "no answer for a.test from u (not asked yet) within 10s");
    }
}
