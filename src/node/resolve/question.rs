//! One name, asked of those who may know it until one of them says what counts.

use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, RecordType};
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::super::error::ResolveError;
use super::answer::{Answer, Failure, Says, in_both_families, read};
use super::cache::Outcome;
use super::networks::Networks;
use super::servers::{Candidate, Server, head_start};
use super::{doh, plain};
use crate::transport::race::race;

/// The longest that a name may take, all its resolvers and tries together. Source: Tailscale, net/dns/resolver,
/// `dnsQueryTimeout`.
pub(super) const NAME_LIMIT: Duration = Duration::from_secs(10);

/// Those who are asked, with what is kept of the way to each.
pub(super) struct Desk {
    networks: Arc<Networks>,
    lines: doh::Lines,
}

/// What asking came to.
pub(super) struct Concluded {
    pub(super) outcome: Outcome,
    /// How long it may be remembered; zero for not at all.
    pub(super) ttl: Duration,
    /// Whose word that is, by its place among the candidates; `None` when nobody's counts.
    pub(super) by: Option<usize>,
}

impl Desk {
    pub(super) fn new(networks: Arc<Networks>) -> Self {
        Self { networks, lines: doh::Lines::default() }
    }

    /// Asks the candidates for a full name, in their order, each with a head start before the next. What the first one
    /// says that knows counts, be it that there is nothing.
    pub(super) async fn ask(&self, name: &str, candidates: &[Candidate]) -> Concluded {
        let deadline = Instant::now() + NAME_LIMIT;
        let attempts = candidates.iter().enumerate().map(|(index, candidate)| async move {
            let asked = timeout_at(deadline, self.ask_one(name, candidate)).await;
            asked.unwrap_or(Err(Failure::Silent)).map(|answer| (index, answer)).map_err(|failure| {
                debug!(?failure, resolver = candidate.label, "a resolver's answer does not count");
                (index, failure)
            })
        });
        match race(attempts, head_start(candidates)).await {
            Ok((index, answer)) => {
                let outcome = outcome(answer.says, name, &candidates[index].label);
                Concluded { outcome, ttl: answer.ttl, by: Some(index) }
            }
            Err(failures) => {
                let outcome = Err(explain(failures, name, candidates));
                Concluded { outcome, ttl: Duration::ZERO, by: None }
            }
        }
    }

    async fn ask_one(&self, name: &str, candidate: &Candidate) -> Result<Answer, Failure> {
        let full = Name::from_ascii(format!("{name}.")).map_err(|error| Failure::Unreachable(error.to_string()))?;
        let lookup = |kind| {
            let question = question(full.clone(), kind);
            Box::pin(async move {
                let answer = match &candidate.server {
                    Server::Plain(address, network) => plain::ask(&self.networks, *address, *network, question).await?,
                    Server::Http(server) => doh::ask(&self.networks, &self.lines, server, &question).await?,
                };
                read(&answer)
            })
        };
        in_both_families(lookup(RecordType::A), lookup(RecordType::AAAA)).await
    }
}

/// A question without anything that tells it from the same one of others (RFC 8484, 4.1).
fn question(name: Name, kind: RecordType) -> Message {
    let mut question = Message::new(0, MessageType::Query, OpCode::Query);
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(name, kind));
    question
}

fn outcome(says: Says, name: &str, label: &str) -> Outcome {
    let (name, resolver) = (name.to_owned(), label.to_owned());
    match says {
        Says::Addresses(addresses) => Ok(addresses),
        Says::NoAddress => Err(ResolveError::NoAddress { name, resolver }),
        Says::NoName => Err(ResolveError::NxDomain { name, resolver }),
    }
}

/// The failure that tells most: what somebody answered, then why somebody was not reached, then silence. Of several the
/// one whose resolver comes first.
fn explain(mut failures: Vec<(usize, Failure)>, name: &str, candidates: &[Candidate]) -> ResolveError {
    failures.sort_by_key(|(index, failure)| {
        let rank = match failure {
            Failure::Answered(_) | Failure::Forbidden => 0,
            Failure::Unreachable(_) => 1,
            Failure::Silent => 2,
        };
        (rank, *index)
    });
    let name = name.to_owned();
    let label = |index: usize| candidates.get(index).map(|candidate| candidate.label.clone()).unwrap_or_default();
    match failures.into_iter().next() {
        Some((index, Failure::Answered(rcode))) => ResolveError::Failed { name, resolver: label(index), rcode },
        Some((index, Failure::Forbidden)) => match candidates.get(index).map(|candidate| &candidate.resolver) {
            Some(crate::dns::ResolverAddr::PeerApi { .. }) => {
                ResolveError::ConnectorRefused { name, connector: label(index) }
            }
            _ => ResolveError::Failed { name, resolver: label(index), rcode: "HTTP 403".to_owned() },
        },
        Some((index, Failure::Unreachable(detail))) => {
            ResolveError::Unreachable { name, resolver: label(index), detail }
        }
        Some((_, Failure::Silent)) | None => {
            let all: Vec<_> = candidates.iter().map(|candidate| candidate.label.as_str()).collect();
            ResolveError::Silent { name, resolver: all.join(", "), limit: NAME_LIMIT }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::networks::Network;
    use super::*;
    use crate::dns::ResolverAddr;

    fn candidate(addr: &str, label: &str) -> Candidate {
        let resolver =
            ResolverAddr::parse(&crate::wire::tailcfg::dns::Resolver { addr: addr.to_owned(), ..Default::default() });
        let server = Server::Plain("10.0.0.53:53".parse().unwrap(), Network::Tunnel);
        Candidate { resolver, server, label: label.to_owned(), peer: None }
    }

    #[test]
    fn what_was_answered_counts_more_than_silence_and_names_who_answered() {
        let candidates = [candidate("http://100.64.0.2:1/dns-query", "c2"), candidate("10.0.0.53", "p")];
        let told = |failures| explain(failures, "a.example", &candidates).to_string();
        let answered = || Failure::Answered("SERVFAIL".to_owned());
        assert_eq!(told(vec![(0, Failure::Silent), (1, answered())]), "p answered SERVFAIL for a.example");
        assert_eq!(told(vec![(1, answered()), (0, Failure::Forbidden)]), "c2 does not let this node ask for a.example");
        assert_eq!(told(vec![(1, Failure::Forbidden)]), "p answered HTTP 403 for a.example");
        let reset = Failure::Unreachable("reset".to_owned());
        assert_eq!(told(vec![(1, Failure::Silent), (0, reset)]), "resolver c2 for a.example cannot be reached: reset");
        assert_eq!(
            told(vec![(1, Failure::Silent), (0, Failure::Silent)]),
            "no answer for a.example from c2, p within 10s"
        );
    }
}
