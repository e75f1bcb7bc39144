//! UDP for one client: an association, from whose datagrams flows are made to wherever they are to go.
//!
//! Each target is located once, as a TCP connection to it would be: the same names, the same routes, the same refusals,
//! and no other way out of the tailnet. Until that is done its datagrams are held, few and for no longer than a dial
//! may take. From then on a mapping carries them, one for each remote address, as long as datagrams go either way. Every
//! new netmap is held against the mappings: what it routes otherwise, or not at all, ends and is located anew.
//!
//! A reply carries the address that it came from, also where the client named a name (RFC 1928, 7, knows no other way to
//! say which of several hosts has answered).

mod review;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

use super::dial::{self, DialError, RouteError, Target};
use super::way::{NextHop, Remote, Way, locate, receive};
use super::{Inner, Node};
use crate::netmap::Netmap;

/// How long a mapping is kept after its last datagram either way: the least that RFC 4787, 4.3 (REQ-5) permits. Its
/// five minutes are for NATs that cannot know whether the client is still there; here its TCP connection says so.
pub const IDLE: Duration = Duration::from_secs(120);
/// How often mappings are looked through for idle ones, which therefore stay up to so much longer.
const SWEEP: Duration = Duration::from_secs(15);
/// Mappings of one association. Past these the one that was silent for longest makes room.
pub const MAPPINGS: usize = 256;
/// Targets that one association remembers, those that were refused included; a datagram to yet another is lost.
const TARGETS: usize = 1_024;
/// Targets of one association that are being located at once: each may cost DNS questions.
const LOCATING: usize = 64;
/// Datagrams held for one target that is being located: a client that asks thrice a second for five seconds.
const HELD_DATAGRAMS: usize = 16;
/// Octets that one association holds for all its targets that are being located.
const HELD_OCTETS: usize = 64 << 10;
/// How long a refused target stays refused without being looked at again, and is not told again. A failure log of a
/// thousand lasts over an hour under a client that never stops, and whoever repairs a name waits no longer than this.
const REFUSED: Duration = Duration::from_secs(5);
/// Datagrams that wait for the client, of all mappings together; more stay in the flows' rings, and are lost there.
const ARRIVALS: usize = 64;

/// Why a datagram was not sent. Each is counted; none is an error, since datagrams may be lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lost {
    /// Its target was refused or not found: an [`Event::Failed`] has said why.
    Refused,
    /// Too many datagrams, or targets, wait to be located.
    Held,
    /// It is longer than its way carries unfragmented; inside the tunnel 1,252 octets, or 1,232 to an IPv6 address.
    TooLong,
    /// The way is full, or has just failed.
    Full,
}

/// Why a target gets no datagrams.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DatagramError {
    /// What would keep a TCP connection from it too.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// All mappings are in use by other associations.
    #[error("no UDP mapping is free")]
    Mappings,
}

/// What an association has to say.
#[derive(Debug)]
pub enum Event {
    /// A datagram came.
    Received {
        /// Where it came from.
        source: SocketAddr,
        /// What it says.
        octets: Vec<u8>,
    },
    /// Datagrams that were held were not sent after all.
    Lost(BTreeMap<Lost, u64>),
    /// A target gets no datagrams for now.
    Failed {
        /// What the client asked for.
        target: Target,
        /// Why not.
        error: DatagramError,
        /// The datagrams that were held for it.
        lost: usize,
        /// Whether a failure of this target has been told in the last five seconds already.
        told: bool,
    },
}

/// What is known of a target.
enum Known {
    /// It is being located.
    Asked {
        /// These datagrams wait.
        held: Vec<Vec<u8>>,
        /// When its last refusal was told.
        told: Option<Instant>,
    },
    /// A mapping carries its datagrams there.
    At(Remote),
    /// It was refused.
    Refused {
        /// When that was told: it is not told again for [`REFUSED`].
        told: Instant,
        /// Whether it stays so for as long, without being looked at again.
        stands: bool,
    },
}

impl Known {
    /// Whether a refusal can be forgotten.
    fn is_over(&self, now: Instant) -> bool {
        matches!(self, Self::Refused { told, .. } if now >= *told + REFUSED)
    }
}

struct Mapping {
    way: Way,
    /// The targets that it was opened or used for, where it leads outside.
    noted: HashSet<Target>,
    /// What made it; nothing outside the tailnet.
    next_hop: Option<NextHop>,
    /// When a datagram last went either way.
    used: Instant,
    receiver: AbortOnDropHandle<()>,
    _permit: OwnedSemaphorePermit,
}

type Located = (Target, Result<Remote, DialError>);

/// The datagrams of one client. Lives on the data thread; ends, with all its mappings, when it is dropped.
pub struct Association {
    node: Rc<Inner>,
    netmap: watch::Receiver<Option<Arc<Netmap>>>,
    /// The netmap that everything here was last held against.
    reviewed: Option<Arc<Netmap>>,
    targets: HashMap<Target, Known>,
    mappings: HashMap<Remote, Mapping>,
    /// What all associations together may have.
    budget: Arc<Semaphore>,
    locating: FuturesUnordered<LocalBoxFuture<'static, Located>>,
    /// Octets of all held datagrams.
    held: usize,
    arrivals: mpsc::Receiver<(Remote, Vec<u8>)>,
    arriving: mpsc::Sender<(Remote, Vec<u8>)>,
    sweep_at: Instant,
}

impl Node {
    /// An association for a client. Each of its mappings takes a permit of `budget`, which all associations share.
    pub fn associate(&self, budget: Arc<Semaphore>) -> Association {
        let (arriving, arrivals) = mpsc::channel(ARRIVALS);
        let mut netmap = self.inner.netmap.clone();
        let reviewed = netmap.borrow_and_update().clone();
        Association {
            node: Rc::clone(&self.inner),
            netmap,
            reviewed,
            targets: HashMap::new(),
            mappings: HashMap::new(),
            budget,
            locating: FuturesUnordered::new(),
            held: 0,
            arrivals,
            arriving,
            sweep_at: Instant::now() + SWEEP,
        }
    }
}

impl Association {
    /// Sends a datagram to `target`, at once or when it has been located, which [`next`](Self::next) sees to.
    ///
    /// # Errors
    /// [`Lost`], when it will not be sent.
    pub fn send(&mut self, target: &Target, octets: &[u8]) -> Result<(), Lost> {
        self.catch_up();
        match self.targets.get_mut(target) {
            Some(Known::At(remote)) => {
                let remote = *remote;
                match self.forward(remote, octets) {
                    Some(sent) => sent,
                    None => self.ask(target, octets, None),
                }
            }
            Some(Known::Asked { held, .. }) => {
                if held.len() >= HELD_DATAGRAMS || self.held + octets.len() > HELD_OCTETS {
                    return Err(Lost::Held);
                }
                self.held += octets.len();
                held.push(octets.to_vec());
                Ok(())
            }
            Some(Known::Refused { told, stands }) => {
                let told = *told;
                if *stands && Instant::now() < told + REFUSED {
                    return Err(Lost::Refused);
                }
                self.ask(target, octets, Some(told))
            }
            None => self.ask(target, octets, None),
        }
    }

    /// Whether datagrams to `target` have been asked for lately, with whatever outcome.
    pub fn knows(&self, target: &Target) -> bool {
        self.targets.contains_key(target)
    }

    /// Refuses `target` for a while, for a reason of the caller's own.
    pub fn refuse(&mut self, target: Target) {
        if self.has_room_for(&target) {
            self.targets.insert(target, Known::Refused { told: Instant::now(), stands: true });
        }
    }

    /// What happens next. Nothing is received and nothing located while nobody waits here; may be cancelled.
    pub async fn next(&mut self) -> Event {
        loop {
            let event = tokio::select! {
                Some((target, found)) = self.locating.next() => self.settle(target, found),
                Some((remote, octets)) = self.arrivals.recv() => self.arrived(remote, octets),
                Ok(()) = self.netmap.changed() => {
                    self.review();
                    None
                }
                () = sleep_until(self.sweep_at) => self.sweep(),
            };
            if let Some(event) = event {
                return event;
            }
        }
    }

    /// How many mappings are open.
    pub fn mappings(&self) -> usize {
        self.mappings.len()
    }

    /// Has a target located, and holds its first datagram meanwhile. `told`: when its last refusal was.
    fn ask(&mut self, target: &Target, octets: &[u8], told: Option<Instant>) -> Result<(), Lost> {
        if self.locating.len() >= LOCATING || self.held + octets.len() > HELD_OCTETS || !self.has_room_for(target) {
            return Err(Lost::Held);
        }
        self.held += octets.len();
        self.targets.insert(target.clone(), Known::Asked { held: vec![octets.to_vec()], told });
        let (node, target) = (Rc::clone(&self.node), target.clone());
        self.locating.push(Box::pin(async move {
            let found = locate(&node, &target).await;
            (target, found)
        }));
        Ok(())
    }

    /// Whether `target` can be remembered, once those have been forgotten that need not be.
    fn has_room_for(&mut self, target: &Target) -> bool {
        if self.targets.contains_key(target) {
            return true;
        }
        if self.targets.len() >= TARGETS {
            let now = Instant::now();
            self.targets.retain(|_, known| !known.is_over(now));
        }
        self.targets.len() < TARGETS
    }

    /// A target has been located, or not.
    fn settle(&mut self, target: Target, found: Result<Remote, DialError>) -> Option<Event> {
        self.catch_up();
        // Whatever replaced the question has taken its datagrams along.
        let Some(Known::Asked { held, told }) = self.targets.remove(&target) else { return None };
        self.held -= held.iter().map(Vec::len).sum::<usize>();
        match found.map_err(DatagramError::from).and_then(|remote| self.map(remote).map(|()| remote)) {
            Ok(remote) => {
                self.note(&target, remote);
                self.targets.insert(target, Known::At(remote));
                let mut lost = BTreeMap::<Lost, u64>::new();
                for octets in held {
                    if let Some(Err(reason)) = self.forward(remote, &octets) {
                        *lost.entry(reason).or_default() += 1;
                    }
                }
                (!lost.is_empty()).then_some(Event::Lost(lost))
            }
            Err(error) => {
                let now = Instant::now();
                let last = told.filter(|told| now < *told + REFUSED);
                self.targets.insert(target.clone(), Known::Refused { told: last.unwrap_or(now), stands: true });
                Some(Event::Failed { target, error, lost: held.len(), told: last.is_some() })
            }
        }
    }

    /// Counts a target outside, once for each mapping: new netmaps have it located again and again.
    fn note(&mut self, target: &Target, remote: Remote) {
        if let (Remote::Outside(_), Some(mapping)) = (remote, self.mappings.get_mut(&remote))
            && !mapping.noted.contains(target)
        {
            if mapping.noted.len() < TARGETS {
                mapping.noted.insert(target.clone());
            }
            dial::note_outside(&self.node, target);
        }
    }

    /// Makes sure that there is a mapping to `remote`.
    fn map(&mut self, remote: Remote) -> Result<(), DatagramError> {
        if self.mappings.get(&remote).is_some_and(|mapping| !mapping.receiver.is_finished()) {
            return Ok(());
        }
        self.mappings.remove(&remote);
        if self.mappings.len() >= MAPPINGS {
            self.evict();
        }
        let mut permit = Arc::clone(&self.budget).try_acquire_owned();
        if permit.is_err() {
            self.evict();
            permit = Arc::clone(&self.budget).try_acquire_owned();
        }
        let permit = permit.map_err(|_| DatagramError::Mappings)?;
        let next_hop = self.next_hop_to(remote)?;
        let way = Way::open(&self.node.core, remote)?;
        let receiver = tokio::task::spawn_local(receive(way.clone(), remote, self.arriving.clone()));
        let receiver = AbortOnDropHandle::new(receiver);
        let mapping = Mapping { way, next_hop, noted: HashSet::new(), used: Instant::now(), receiver, _permit: permit };
        self.mappings.insert(remote, mapping);
        debug!(mappings = self.mappings.len(), "mapping opened");
        Ok(())
    }

    /// What makes a mapping to `remote`, by the newest netmap, in which it has just been located.
    fn next_hop_to(&self, remote: Remote) -> Result<Option<NextHop>, DialError> {
        let Remote::Tunnel(address) = remote else { return Ok(None) };
        let next_hop = self.reviewed.as_deref().and_then(|netmap| NextHop::to(netmap, address.ip()));
        next_hop.map(Some).ok_or_else(|| RouteError::Withdrawn { address: address.ip() }.into())
    }

    /// Closes the mapping that was silent for longest.
    fn evict(&mut self) {
        let oldest = self.mappings.iter().min_by_key(|(_, mapping)| mapping.used).map(|(remote, _)| *remote);
        if let Some(remote) = oldest {
            self.mappings.remove(&remote);
            self.forget_unmapped();
        }
    }

    /// Sends by a mapping; `None` where there is none any more.
    fn forward(&mut self, remote: Remote, octets: &[u8]) -> Option<Result<(), Lost>> {
        let mapping = self.mappings.get_mut(&remote).filter(|mapping| !mapping.receiver.is_finished())?;
        mapping.used = Instant::now();
        Some(mapping.way.send(octets))
    }

    fn arrived(&mut self, remote: Remote, octets: Vec<u8>) -> Option<Event> {
        // What comes from a mapping that was closed meanwhile has no business here.
        let mapping = self.mappings.get_mut(&remote)?;
        mapping.used = Instant::now();
        Some(Event::Received { source: remote.address(), octets })
    }

    /// Closes what is idle.
    fn sweep(&mut self) -> Option<Event> {
        let now = Instant::now();
        self.sweep_at = now + SWEEP;
        self.mappings.retain(|_, mapping| now - mapping.used < IDLE && !mapping.receiver.is_finished());
        self.targets.retain(|_, known| !known.is_over(now));
        self.forget_unmapped();
        None
    }

    fn forget_unmapped(&mut self) {
        let mappings = &self.mappings;
        self.targets.retain(|_, known| match known {
            Known::At(remote) => mappings.contains_key(remote),
            Known::Asked { .. } | Known::Refused { .. } => true,
        });
    }
}

#[cfg(test)]
mod tests;
