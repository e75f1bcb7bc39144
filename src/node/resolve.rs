//! From a name to addresses, asked of those whom the tailnet names and of nobody else.
//!
//! The tailnet's own names need no question. A name under a suffix that the tailnet claims is asked of that suffix's
//! resolvers, and if they do not answer it has no address: there is nobody else to ask. The machine's own resolver is
//! never asked here. An answer is remembered for its time, and a name that several want at once is asked for once.

mod answer;
mod cache;
mod doh;
mod networks;
mod plain;
mod question;
mod servers;
mod silence;
mod transit;
mod warm;

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::task::AbortOnDropHandle;

use self::cache::{Answers, Key, Outcome};
use self::networks::Networks;
use self::question::{Concluded, Desk};
use self::servers::{Candidate, candidates};
use self::silence::Silence;
use self::transit::Transits;
use super::bridge::Tunnel;
use super::core::Shared;
use super::dial::{DialError, Host, RouteError};
use super::error::ResolveError;
use crate::dns::{self, Decision, ResolverAddr, Source, decide};
use crate::engine::Transport;
use crate::key::NodePublic;
use crate::netmap::Netmap;
use crate::transport::underlay::Underlay;
use crate::wire::tailcfg::dns::DnsConfig;

/// Questions that are asked at once. Those whom nobody waits for any more count too, until they end.
const QUESTIONS: usize = 256;

/// How many of those who may be asked are warmed before: the first, and who is asked beside it when that is slow.
const WARMED: usize = 2;

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
    Anew,
}

/// Who said what a name's addresses are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum By {
    /// The tailnet itself, or the resolvers of a suffix that it claims.
    Tailnet,
    /// An app connector: routes to the addresses follow its answer.
    Connector {
        /// The addresses of the suffix's connectors.
        connectors: Vec<IpAddr>,
    },
    /// A resolver for everything else: the name is no more the tailnet's than its address is.
    Default,
}

/// The resolvers of this run and what they have answered. A change of the tailnet's DNS settings begins anew.
pub(super) struct Resolvers {
    core: Shared,
    control: tokio::runtime::Handle,
    /// Whether the tailnet's DNS settings count, or only its nodes' names.
    accept_dns: bool,
    memory: Rc<RefCell<Memory>>,
    questions: Arc<Semaphore>,
    transits: Transits,
    silence: Silence,
}

/// What is known of a question.
enum Known {
    Remembered(Outcome),
    Underway(watch::Receiver<Option<Outcome>>),
}

/// What the run knows of names.
struct Memory {
    networks: Arc<Networks>,
    /// What the rest goes by.
    settings: Arc<DnsConfig>,
    desk: Arc<Desk>,
    answers: Answers,
    /// Questions that are being asked, for those who want the same answer.
    underway: HashMap<Key, watch::Receiver<Option<Outcome>>>,
    /// Of each list of resolvers the one that answered last: it is asked first while it works.
    chosen: HashMap<Vec<ResolverAddr>, ResolverAddr>,
}

impl Memory {
    fn new(networks: Arc<Networks>, settings: Arc<DnsConfig>) -> Self {
        let desk = Arc::new(Desk::new(networks.clone()));
        let (answers, underway, chosen) = Default::default();
        Self { networks, settings, desk, answers, underway, chosen }
    }

    /// Takes what a question came to.
    fn conclude(&mut self, key: Key, candidates: &[Candidate], concluded: &Concluded) {
        match concluded.by.and_then(|index| candidates.get(index)) {
            Some(candidate) => self.chosen.insert(key.1.clone(), candidate.resolver.clone()),
            None => self.chosen.remove(&key.1),
        };
        self.answers.keep(key, concluded.outcome.clone(), concluded.ttl, Instant::now());
    }
}

impl Resolvers {
    /// Starts on the current local runtime. Resolvers are asked from the `control` runtime.
    pub(super) fn start(
        core: Shared,
        underlay: Underlay,
        control: tokio::runtime::Handle,
        (accept_dns, transport): (bool, Transport),
    ) -> Self {
        let networks = Arc::new(Networks::new(Tunnel::start(core.clone()), underlay));
        if accept_dns {
            let netmaps = core.borrow().netmap();
            tokio::task::spawn_local(warm::keep_warm(Rc::downgrade(&core), netmaps));
        }
        let transits = Transits::start(core.clone(), control.clone(), networks.clone());
        let memory = Rc::new(RefCell::new(Memory::new(networks, Arc::default())));
        let questions = Arc::new(Semaphore::new(QUESTIONS));
        let silence = Silence { core: core.clone(), transport };
        Self { core, control, accept_dns, memory, questions, transits, silence }
    }

    /// Whether nobody in the tailnet decides `name`, so that a rule of the user's may let it out. Of a single label that
    /// goes for every name that it may mean; only what the tailnet knows not to exist under a search domain it cannot mean.
    pub(super) fn is_outside(&self, netmap: &Netmap, name: &str) -> Result<bool, DialError> {
        let decisions = self.decisions(netmap, name)?;
        let last = decisions.len().saturating_sub(1);
        Ok(decisions.iter().enumerate().all(|(index, decision)| match decision {
            Decision::Default { .. } | Decision::Nobody => true,
            Decision::Nonexistent { .. } => index < last,
            Decision::Addresses { .. } | Decision::Resolvers { .. } | Decision::App { .. } => false,
        }))
    }

    /// Whether the same decide `name` in two netmaps, and as whatever it may stand for.
    pub(super) fn decided_alike(&self, one: &Netmap, other: &Netmap, name: &str) -> bool {
        std::ptr::eq(one, other) || self.decisions(one, name).ok() == self.decisions(other, name).ok()
    }

    /// What each name that a client may mean by `name` is decided to be.
    fn decisions(&self, netmap: &Netmap, name: &str) -> Result<Vec<Decision>, DialError> {
        let candidates = dns::candidates(netmap, name).map_err(bad_name)?;
        Ok(candidates.iter().map(|candidate| self.decide(netmap, candidate)).collect::<Result<_, _>>()?)
    }

    /// Who decides a name, by the settings that count.
    fn decide(&self, netmap: &Netmap, name: &str) -> Result<Decision, ResolveError> {
        let decision = decide(netmap, name).map_err(bad_name)?;
        let counts =
            self.accept_dns || matches!(&decision, Decision::Addresses { source: Source::Host | Source::Site, .. });
        Ok(if counts { decision } else { Decision::Nobody })
    }

    /// The newest netmap: what waits must not go by an old one. `given` where there is none yet.
    fn newest(&self, given: &Arc<Netmap>) -> Arc<Netmap> {
        self.core.borrow().netmap().borrow().clone().unwrap_or_else(|| given.clone())
    }

    /// The addresses of `name`, in no order that matters; at least one. Each candidate is asked by the newest netmap.
    pub(super) async fn resolve(&self, netmap: &Arc<Netmap>, name: &str, ask: Ask) -> Result<Resolved, DialError> {
        let public = || DialError::Public { host: Host::Name(name.to_owned()) };
        if is_local(name) {
            return Err(public());
        }
        let mut missing = None;
        for candidate in dns::candidates(&self.newest(netmap), name).map_err(bad_name)? {
            if is_local(&candidate) {
                continue;
            }
            match self.resolve_one(&self.newest(netmap), &candidate, name, ask).await {
                Ok(resolved) => return Ok(resolved),
                // That the tailnet has no such name says more than that nobody in it was asked.
                Err(DialError::Public { .. }) => {}
                Err(error) if does_not_exist(&error) => missing = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(missing.unwrap_or_else(public))
    }

    async fn resolve_one(
        &self,
        netmap: &Arc<Netmap>,
        name: &str,
        given: &str,
        ask: Ask,
    ) -> Result<Resolved, DialError> {
        let (by, resolvers) = match self.decide(netmap, name)? {
            Decision::Addresses { addresses, .. } => {
                return Ok(Resolved { addresses, by: By::Tailnet, remembered: false });
            }
            Decision::Nonexistent { zone } => {
                let resolver = if zone.is_empty() { "the tailnet".to_owned() } else { format!("the tailnet ({zone})") };
                return Err(ResolveError::NxDomain { name: name.to_owned(), resolver }.into());
            }
            Decision::Nobody => return Err(DialError::Public { host: Host::Name(given.to_owned()) }),
            Decision::App { app, resolvers } => return self.resolve_app(netmap, (name, &app), resolvers, ask).await,
            Decision::Resolvers { resolvers, connector: true, .. } => {
                (By::Connector { connectors: resolvers.iter().filter_map(peerapi).collect() }, resolvers)
            }
            Decision::Resolvers { resolvers, connector: false, .. } => (By::Tailnet, resolvers),
            Decision::Default { resolvers } => (By::Default, resolvers),
        };
        let (addresses, remembered) = self.ask(netmap, (name.to_owned(), resolvers), ask).await?;
        Ok(Resolved { addresses, by, remembered })
    }

    /// The addresses by which what an app's connectors say is reached.
    async fn resolve_app(
        &self,
        netmap: &Arc<Netmap>,
        (name, app): (&str, &str),
        resolvers: Vec<ResolverAddr>,
        ask: Ask,
    ) -> Result<Resolved, DialError> {
        if resolvers.is_empty() {
            let detail = "no connector that the tailnet shows serves it".to_owned();
            return Err(RouteError::Transit { name: name.to_owned(), app: app.to_owned(), detail }.into());
        }
        let (addresses, remembered) = self.ask(netmap, (name.to_owned(), resolvers), ask).await?;
        let addresses = self.transits.agree(&self.newest(netmap), (name, app), &addresses).await?;
        Ok(Resolved { addresses, by: By::Tailnet, remembered })
    }

    /// The answer to a question: the one that is remembered, the one that somebody else waits for, or a new one. Whoever
    /// stops waiting leaves the question to the others, and to the memory.
    async fn ask(&self, netmap: &Arc<Netmap>, key: Key, ask: Ask) -> Result<(Vec<IpAddr>, bool), ResolveError> {
        // Dials that began with different netmaps must not take turns in forgetting.
        self.go_by(&self.newest(netmap).dns);
        if ask == Ask::Anew {
            self.memory.borrow_mut().answers.forget(&key);
        }
        let name = key.0.clone();
        let mut known = self.known(&key);
        let mut permit = None;
        if known.is_none() {
            permit = self.questions.clone().acquire_owned().await.ok();
            // Somebody else may have put it meanwhile.
            self.go_by(&self.newest(netmap).dns);
            known = self.known(&key);
        }
        let mut answer = match known {
            Some(Known::Remembered(outcome)) => return outcome.map(|addresses| (addresses, true)),
            Some(Known::Underway(answer)) => answer,
            None => {
                let candidates = self.candidates(&self.newest(netmap), &key)?;
                self.put(key, candidates, permit.take())
            }
        };
        drop(permit);
        let outcome = answer.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
        let stopped = || ResolveError::Unreachable {
            name,
            resolver: "the tailnet's".to_owned(),
            detail: "the node has stopped".to_owned(),
        };
        outcome.ok_or_else(stopped)?.map(|addresses| (addresses, false))
    }

    /// What is known of a question without putting it.
    fn known(&self, key: &Key) -> Option<Known> {
        let memory = self.memory.borrow();
        let remembered = memory.answers.find(key, Instant::now()).map(Known::Remembered);
        remembered.or_else(|| memory.underway.get(key).cloned().map(Known::Underway))
    }

    /// Forgets everything if the settings are others than they were.
    fn go_by(&self, settings: &Arc<DnsConfig>) {
        let mut memory = self.memory.borrow_mut();
        if !Arc::ptr_eq(&memory.settings, settings) && *memory.settings != **settings {
            *memory = Memory::new(memory.networks.clone(), settings.clone());
        }
    }

    /// Those who may be asked; the peers through whom the first of them are asked are warmed at once.
    fn candidates(&self, netmap: &Netmap, key: &Key) -> Result<Vec<Candidate>, ResolveError> {
        let (name, resolvers) = key;
        let chosen = self.memory.borrow().chosen.get(resolvers).cloned();
        let candidates = candidates(netmap, resolvers, chosen.as_ref()).map_err(|detail| {
            let resolver = resolvers.iter().map(ResolverAddr::to_string).collect::<Vec<_>>().join(", ");
            ResolveError::Unreachable { name: name.clone(), resolver, detail }
        })?;
        let online = |key: &NodePublic| netmap.peer_by_key(key).is_some_and(|peer| peer.online != Some(false));
        for peer in candidates.iter().filter_map(|candidate| candidate.peer).filter(online).take(WARMED) {
            self.core.borrow_mut().warm(peer, Instant::now());
        }
        Ok(candidates)
    }

    /// Puts a question, which keeps its permit until it has ended.
    fn put(
        &self,
        key: Key,
        candidates: Vec<Candidate>,
        permit: Option<OwnedSemaphorePermit>,
    ) -> watch::Receiver<Option<Outcome>> {
        let (out, answer) = watch::channel(None);
        let desk = self.memory.borrow().desk.clone();
        self.memory.borrow_mut().underway.insert(key.clone(), answer.clone());
        let candidates: Arc<[_]> = candidates.into();
        let asked = self.control.spawn({
            let (desk, candidates, name) = (desk.clone(), candidates.clone(), key.0.clone());
            async move { desk.ask(&name, &candidates).await }
        });
        let (asked, memory) = (AbortOnDropHandle::new(asked), self.memory.clone());
        let (silence, begun) = (self.silence.clone(), Instant::now());
        tokio::task::spawn_local(async move {
            let concluded = asked.await;
            drop(permit);
            let concluded = concluded.map(|concluded| silence.explained(concluded, &key.1, begun));
            let mut memory = memory.borrow_mut();
            // What was asked by other settings is only for those who waited for it.
            let current = Arc::ptr_eq(&memory.desk, &desk);
            if current {
                memory.underway.remove(&key);
            }
            // Only the end of the control runtime leaves a question without its end.
            let Ok(concluded) = concluded else { return };
            if current {
                memory.conclude(key, &candidates, &concluded);
            }
            out.send_replace(Some(concluded.outcome));
        });
        answer
    }
}

fn bad_name(error: dns::BadName) -> ResolveError {
    ResolveError::BadName { detail: error.to_string() }
}

/// The address of an app connector's PeerAPI.
fn peerapi(resolver: &ResolverAddr) -> Option<IpAddr> {
    match resolver {
        ResolverAddr::PeerApi { ip, .. } => Some(*ip),
        ResolverAddr::Plain { .. } | ResolverAddr::Https { .. } | ResolverAddr::Unsupported(_) => None,
    }
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
    matches!(error, DialError::Resolve(ResolveError::NxDomain { .. } | ResolveError::NoAddress { .. }))
}

#[cfg(test)]
mod tests;
