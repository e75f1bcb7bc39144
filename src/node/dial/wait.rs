//! The wait for an app connector's route.
//!
//! A connector answers a question at once and has control hand out the route to its answer afterwards. Until then the
//! address is just a number: dialling it would send it elsewhere, or nowhere. So the dial waits for the netmap that
//! brings the route, for as long as a dial may take and still connect, and wakes with that netmap.
//! Source: Tailscale, appc/appconnector.go, `ObserveDNSResponse`.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};

use super::route::{Reach, Router, canonical, has_family, no_family, reach};
use super::{DialError, Inner, ResolveError, RouteError};
use crate::netmap::Netmap;

/// How long a connector has to bring its own route where another peer's wider one would do. The connector's is where
/// access is meant to be decided; it comes within a second where control approves it by itself, and a control server
/// that needs a person will not have one in this time.
const GRACE: Duration = Duration::from_secs(2);
/// A wait longer than this is said aloud.
const LONG: Duration = Duration::from_secs(1);
/// Addresses of which it is remembered that the grace was in vain.
const REMEMBERED: usize = 4096;

/// What is waited for.
#[derive(Debug, Clone)]
pub(super) struct Sought<'a> {
    /// The name, as given.
    pub(super) name: &'a str,
    /// The addresses of those who serve it.
    pub(super) connectors: &'a [IpAddr],
    /// What they answered.
    pub(super) addresses: Vec<IpAddr>,
}

impl Sought<'_> {
    /// Takes a new answer's addresses, ahead of the old ones. That there is no such name any more ends the wait; that
    /// nobody answered does not: the old answer's route may still come.
    fn add(&mut self, answer: Result<Vec<IpAddr>, DialError>) -> Result<(), DialError> {
        match answer {
            Ok(mut addresses) => {
                addresses.append(&mut self.addresses);
                self.addresses = canonical(&addresses);
                Ok(())
            }
            Err(gone @ DialError::Resolve(ResolveError::NxDomain { .. } | ResolveError::NoAddress { .. })) => Err(gone),
            Err(error) => {
                debug!(%error, "a connector was not asked anew");
                Ok(())
            }
        }
    }
}

/// For which addresses another peer's wider route has stood in, and who was named for it.
#[derive(Debug, Default)]
pub(in crate::node) struct WiderRoutes {
    waited: HashSet<IpAddr>,
    named: BTreeSet<i64>,
}

impl WiderRoutes {
    /// Whether the connector has had its time for one of these already.
    fn had_time(&self, addresses: &[IpAddr]) -> bool {
        addresses.iter().any(|ip| self.waited.contains(ip))
    }

    /// Notes that `router` stands in, and says so once.
    fn note(&mut self, addresses: &[IpAddr], router: &Router) {
        if self.waited.len() + addresses.len() > REMEMBERED {
            self.waited.clear();
        }
        self.waited.extend(addresses);
        if self.named.insert(router.id) {
            warn!(router = router.name, "an app connector's name goes by another peer's wider route");
        }
    }
}

/// Waits until a route covers one of the addresses sought, until `deadline`: the netmap that has it, and the addresses.
/// `again` asks for the name once more; it begins only if there is something to wait for, and what it brings is sought
/// as well.
///
/// # Errors
/// [`RouteError::Connector`] when none came in time, at once where routes are not accepted; [`RouteError::Family`] when
/// we could dial none of the addresses anyway; what `again` says when the name is no more.
pub(super) async fn until_routed(
    node: &Inner,
    netmap: Arc<Netmap>,
    sought: Sought<'_>,
    again: impl Future<Output = Result<Vec<IpAddr>, DialError>>,
    deadline: std::time::Instant,
) -> Result<(Arc<Netmap>, Vec<IpAddr>), DialError> {
    let waiting = Waiting {
        netmap,
        newest: node.netmap.clone(),
        accepts_routes: node.config.accept_routes,
        deadline: deadline.into(),
        begun: Instant::now(),
    };
    let (netmap, reached) = waiting.run(sought, again, |addresses| node.wider.borrow().had_time(addresses)).await?;
    match reached {
        Reached::Own(addresses) => Ok((netmap, addresses)),
        Reached::Wider(addresses, router) => {
            node.wider.borrow_mut().note(&addresses, &router);
            Ok((netmap, addresses))
        }
    }
}

/// What a wait ended with.
#[derive(Debug, PartialEq, Eq)]
enum Reached {
    Own(Vec<IpAddr>),
    Wider(Vec<IpAddr>, Router),
}

struct Waiting {
    netmap: Arc<Netmap>,
    newest: watch::Receiver<Option<Arc<Netmap>>>,
    accepts_routes: bool,
    deadline: Instant,
    begun: Instant,
}

impl Waiting {
    async fn run(
        mut self,
        mut sought: Sought<'_>,
        again: impl Future<Output = Result<Vec<IpAddr>, DialError>>,
        had_time: impl Fn(&[IpAddr]) -> bool,
    ) -> Result<(Arc<Netmap>, Reached), DialError> {
        let (mut said, mut asking) = (false, true);
        let mut again = pin!(again);
        loop {
            if let Some(newest) = &*self.newest.borrow_and_update() {
                self.netmap = newest.clone();
            }
            let until = match reach(&self.netmap, &sought.addresses, sought.connectors) {
                Reach::Own(addresses) => {
                    self.say_end();
                    return Ok((self.netmap, Reached::Own(addresses)));
                }
                Reach::Wider(addresses, router) => {
                    let end = (self.begun + GRACE).min(self.deadline);
                    if router.exact || Instant::now() >= end || had_time(&addresses) {
                        return Ok((self.netmap, Reached::Wider(addresses, router)));
                    }
                    end
                }
                Reach::Nothing => {
                    self.worth_waiting(&sought)?;
                    self.deadline
                }
            };
            if !std::mem::replace(&mut said, true) {
                debug!(name = sought.name, addresses = ?sought.addresses, "waiting for an app connector's route");
            }
            tokio::select! {
                Ok(()) = self.newest.changed() => {}
                answer = &mut again, if asking => {
                    asking = false;
                    sought.add(answer)?;
                }
                () = sleep_until(until) => {}
            }
        }
    }

    /// Whether any netmap could bring a route that we can use.
    fn worth_waiting(&self, sought: &Sought<'_>) -> Result<(), DialError> {
        if Instant::now() >= self.deadline {
            return Err(self.in_vain(sought));
        }
        if !self.accepts_routes {
            let name = sought.name.to_owned();
            return Err(RouteError::ConnectorIgnored { name, addresses: listed(&sought.addresses) }.into());
        }
        match sought.addresses.first() {
            Some(&first) if !sought.addresses.iter().any(|ip| has_family(&self.netmap, *ip)) => {
                Err(no_family(first).into())
            }
            Some(_) | None => Ok(()),
        }
    }

    fn in_vain(&self, sought: &Sought<'_>) -> DialError {
        let connectors: BTreeSet<String> = sought
            .connectors
            .iter()
            .map(|ip| self.netmap.peer_by_ip(*ip).map_or_else(|| ip.to_string(), |peer| peer.name.clone()))
            .collect();
        let waited = Duration::from_millis(u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX));
        RouteError::Connector {
            name: sought.name.to_owned(),
            addresses: listed(&sought.addresses),
            connectors: connectors.into_iter().collect::<Vec<_>>().join(", "),
            waited,
        }
        .into()
    }

    fn say_end(&self) {
        let waited = self.begun.elapsed();
        if waited > LONG {
            info!(ms = waited.as_millis(), "an app connector's route came late");
        }
    }
}

/// The first few addresses, as text.
fn listed(addresses: &[IpAddr]) -> String {
    const SHOWN: usize = 4;
    let shown: Vec<String> = addresses.iter().take(SHOWN).map(IpAddr::to_string).collect();
    let more = addresses.len().saturating_sub(SHOWN);
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}

#[cfg(test)]
mod tests;
