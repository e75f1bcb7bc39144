//! Transit addresses: agreed upon with an app's connector, one for each address of a name, and sent to it alone.
//!
//! The connector sends what comes for a transit address on to what it stands for. An agreement is renewed before
//! connectors forget it, and at once when one says that it has: it was restarted, or another took over.
//! Source: Tailscale, feature/conn25/conn25.go, `handleAddressAssignment`; datapath.go, `HandlePacketFromWireGuard`.

mod book;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use tokio::sync::mpsc;
use tokio::time::{sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

use self::book::Book;
use super::super::core::Shared;
use super::super::dial::{RouteError, no_family};
use super::answer::Failure;
use super::doh;
use super::networks::{Network, Networks};
use super::servers::CONNECTOR_HEAD_START;
use crate::dns::connectors;
use crate::netmap::{Netmap, NodeId};
use crate::transport::race::race;
use crate::wire::transit::{PATH, Request, Response, Transit, Verdict};
use crate::wire::tsmp::Reason;

/// How long one connector may take to agree.
const LIMIT: Duration = Duration::from_secs(5);
/// The most octets of an answer: a verdict takes less than two hundred, an answer of names holds less than two thousand
/// addresses.
const ANSWER_MAX: usize = 512 << 10;
/// The media type of requests.
const JSON: &str = "application/json";
/// How late a renewal may be: what is agreed while nothing is due is seen so much later.
const PAUSE: Duration = Duration::from_mins(5);
/// Addresses that connectors do not know, waiting to be agreed upon again.
const QUEUE: usize = 64;

/// The transit addresses of this run.
pub(super) struct Transits {
    inner: Rc<Inner>,
}

struct Inner {
    core: Shared,
    control: tokio::runtime::Handle,
    networks: Arc<Networks>,
    lines: Arc<doh::Lines>,
    book: RefCell<Book>,
}

/// One of those who serve an app.
#[derive(Debug, Clone)]
struct Connector {
    id: NodeId,
    name: String,
    online: bool,
    server: doh::Server,
}

impl Transits {
    /// Starts on the current local runtime. Connectors are asked from the `control` runtime.
    pub(super) fn start(core: Shared, control: tokio::runtime::Handle, networks: Arc<Networks>) -> Self {
        let (unknown, unknown_in) = mpsc::channel(QUEUE);
        core.borrow_mut().tell_unknown_transits(unknown);
        let inner = Rc::new(Inner { core, control, networks, lines: Arc::default(), book: RefCell::default() });
        tokio::task::spawn_local(keep(Rc::downgrade(&inner), unknown_in));
        Self { inner }
    }

    /// The transit addresses for what `name` resolved to; at least one. Routes lead there when this returns.
    ///
    /// # Errors
    /// [`RouteError::Family`] if we have no address of the families of `addresses`; [`RouteError::Transit`] if no
    /// connector agrees to any.
    pub(super) async fn agree(
        &self,
        netmap: &Netmap,
        (name, app): (&str, &str),
        addresses: &[IpAddr],
    ) -> Result<Vec<IpAddr>, RouteError> {
        let failed = |detail| RouteError::Transit { name: name.to_owned(), app: app.to_owned(), detail };
        let reals = dialable(netmap, addresses)?;
        let connectors = serving(netmap, app);
        let mut wanted = Vec::new();
        let pools = &netmap.self_node.apps.transit;
        // A pool that overlaps with nodes must not lead astray what is meant for them.
        let taken = |ip| netmap.peer_by_ip(ip).is_some() || netmap.self_node.addresses.contains(&ip);
        for real in reals {
            let reserved = self.inner.book.borrow_mut().reserve(pools, app, real, taken, Instant::now());
            wanted.extend(reserved.map(|transit| (transit, real)));
        }
        if wanted.is_empty() {
            return Err(failed("the tailnet's pools of transit addresses have none left for it".to_owned()));
        }
        let online = |id| connectors.iter().any(|connector| connector.id == id && connector.online);
        let is_agreed = |transit| self.inner.book.borrow().agreed_with(transit, Instant::now()).is_some_and(online);
        let (mut agreed, open): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|(transit, _)| is_agreed(*transit));
        if !open.is_empty() {
            match self.inner.negotiate(app, &connectors, open).await {
                Ok(new) => agreed.extend(new),
                Err(detail) if agreed.is_empty() => return Err(failed(detail)),
                Err(detail) => debug!(detail, "not all transit addresses were agreed"),
            }
        }
        Ok(agreed.into_iter().map(|(transit, _)| transit).collect())
    }
}

impl Inner {
    /// Agrees with the first connector that does. The pairs that are agreed upon, at least one; or why there are none.
    async fn negotiate(
        &self,
        app: &str,
        connectors: &[Connector],
        pairs: Vec<(IpAddr, IpAddr)>,
    ) -> Result<Vec<(IpAddr, IpAddr)>, String> {
        let transits =
            pairs.iter().map(|(transit, real)| Transit { transit: *transit, destination: *real, app }).collect();
        let body = serde_json::to_vec(&Request { transits }).map(Bytes::from).map_err(|error| error.to_string())?;
        if connectors.is_empty() {
            return Err("no connector that the tailnet shows serves it".to_owned());
        }
        let asked = self.control.spawn({
            let (networks, lines, connectors) = (self.networks.clone(), self.lines.clone(), connectors.to_vec());
            async move {
                let attempts = connectors.into_iter().map(|connector| {
                    let (networks, lines, body) = (networks.clone(), lines.clone(), body.clone());
                    async move { ask(&networks, &lines, connector, body).await }
                });
                race(attempts, CONNECTOR_HEAD_START).await
            }
        });
        let answer = AbortOnDropHandle::new(asked).await.map_err(|_| "the node has stopped".to_owned())?;
        let (connector, verdicts) = answer.map_err(|failures| failures.join("; "))?;
        let mut book = self.book.borrow_mut();
        let verdicts: Vec<_> = pairs.into_iter().zip(verdicts).collect();
        let refused = verdicts.iter().find(|(_, verdict)| !verdict.is_agreed()).map(|(_, verdict)| verdict.to_string());
        let agreed: Vec<_> =
            verdicts.into_iter().filter(|(_, verdict)| verdict.is_agreed()).map(|(pair, _)| pair).collect();
        for (transit, _) in &agreed {
            book.agree(*transit, connector.id, Instant::now());
        }
        if agreed.is_empty() {
            let refused = refused.unwrap_or_else(|| "it said nothing".to_owned());
            return Err(format!("connector {}: {refused}", connector.name));
        }
        let routes = book.routes();
        drop(book);
        self.core.borrow_mut().set_transits(routes, Instant::now());
        Ok(agreed)
    }

    /// Agrees upon an address once more that a connector does not know, and has connections to it begin anew. Those
    /// fail at once where that cannot be.
    async fn restore(&self, transit: IpAddr) {
        let again = self.book.borrow_mut().lose(transit, Instant::now());
        debug!(%transit, again, "a connector does not know a transit address");
        if again && self.renew(transit).await {
            self.core.borrow_mut().repeat_syns(transit, Instant::now());
        } else {
            self.core.borrow_mut().reject(transit, Reason::UnknownTransit);
        }
    }

    /// Agrees upon an address whatever was agreed before. Whether that was done.
    async fn renew(&self, transit: IpAddr) -> bool {
        let Some((app, real)) = self.book.borrow().entry(transit).map(|entry| (entry.app.clone(), entry.real)) else {
            return false;
        };
        let Some(netmap) = self.core.borrow().netmap().borrow().clone() else { return false };
        let renewed = self.negotiate(&app, &serving(&netmap, &app), vec![(transit, real)]).await;
        if let Err(detail) = &renewed {
            debug!(app, detail, "a transit address was not agreed again");
        }
        renewed.is_ok()
    }

    /// Renews what is in use, and gives back what is not.
    async fn renew_due(&self) {
        let due = self.book.borrow().due(Instant::now());
        for (transit, wanted) in due {
            let in_use = wanted || self.core.borrow().has_flow_to(transit);
            if !in_use || !self.renew(transit).await {
                self.book.borrow_mut().forget(transit);
            }
        }
        let routes = self.book.borrow().routes();
        self.core.borrow_mut().set_transits(routes, Instant::now());
    }
}

/// Keeps agreements up until the data plane stops.
async fn keep(inner: Weak<Inner>, mut unknown: mpsc::Receiver<IpAddr>) {
    loop {
        let due = inner.upgrade().and_then(|inner| inner.book.borrow().next_due());
        let latest = Instant::now() + PAUSE;
        let due = due.map_or(latest, |due| due.min(latest));
        let lost = tokio::select! {
            lost = unknown.recv() => match lost {
                Some(lost) => Some(lost),
                None => return,
            },
            () = sleep_until(due.into()) => None,
        };
        let Some(inner) = inner.upgrade() else { return };
        let Some(lost) = lost else {
            inner.renew_due().await;
            continue;
        };
        let mut all = BTreeSet::from([lost]);
        while let Some(transit) = all.pop_first() {
            inner.restore(transit).await;
            // What was said meanwhile of the same address was said before it was agreed again.
            while let Ok(other) = unknown.try_recv() {
                all.extend(Some(other).filter(|other| *other != transit));
            }
        }
    }
}

/// Those of `addresses` that are of a family that we have.
fn dialable(netmap: &Netmap, addresses: &[IpAddr]) -> Result<BTreeSet<IpAddr>, RouteError> {
    let ours = |ip: &IpAddr| netmap.self_node.addresses.iter().any(|own| own.is_ipv4() == ip.is_ipv4());
    let all: BTreeSet<_> = addresses.iter().map(IpAddr::to_canonical).collect();
    match all.first() {
        Some(&address) if !all.iter().any(ours) => Err(no_family(address)),
        Some(_) | None => Ok(all.into_iter().filter(ours).collect()),
    }
}

/// Those who serve an app and can be asked, offline ones last.
fn serving(netmap: &Netmap, app: &str) -> Vec<Connector> {
    let peers = netmap.self_node.apps.named(app).map(|app| connectors(netmap, app)).into_iter().flatten();
    let mut serving: Vec<_> = peers
        .filter_map(|peer| {
            let at = netmap.peerapi(peer)?;
            let uri = format!("http://{at}{PATH}").parse().ok()?;
            let server = doh::Server { uri, addresses: vec![at.ip()], network: Network::Tunnel };
            Some(Connector { id: peer.id, name: peer.name.clone(), online: peer.online != Some(false), server })
        })
        .collect();
    serving.sort_by_key(|connector| !connector.online);
    serving
}

/// Asks one connector; its verdicts in the order of the request, or why there are none.
async fn ask(
    networks: &Arc<Networks>,
    lines: &doh::Lines,
    connector: Connector,
    body: Bytes,
) -> Result<(Connector, Vec<Verdict>), String> {
    let asked = async {
        let response = doh::post(networks, lines, &connector.server, JSON, body).await?;
        let octets = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
        octets.map(|octets| octets.to_bytes()).map_err(|error| Failure::Unreachable(error.to_string()))
    };
    let name = &connector.name;
    let answer = timeout(LIMIT, asked).await.unwrap_or(Err(Failure::Silent));
    let octets = answer.map_err(|failure| match failure {
        Failure::Answered(what) => format!("connector {name} answered {what}"),
        Failure::Forbidden => format!("connector {name} does not let this node ask"),
        Failure::Unreachable(why) => format!("connector {name} cannot be reached: {why}"),
        Failure::Silent => format!("connector {name} did not answer within {LIMIT:?}"),
    })?;
    let response: Response =
        serde_json::from_slice(&octets).map_err(|_| format!("connector {name} answered no JSON of the kind"))?;
    Ok((connector, response.verdicts))
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use serde_json::json;

    use super::*;
    use crate::netmap::session::Session;

    fn netmap() -> Arc<Netmap> {
        let key = |id: u8| format!("nodekey:{}{id:02x}", "00".repeat(31));
        let peer = |id: u8, online: bool, tag: &str| {
            json!({"ID": id, "Name": format!("c{id}.tb.example."), "Key": key(id), "HomeDERP": 1, "Tags": [tag],
                   "Online": online, "Addresses": [format!("100.64.0.{id}/32")],
                   "Hostinfo": {"AppConnector": true, "Services": [{"Proto": "peerapi4", "Port": 4000}]}})
        };
        let apps = json!([{"name": "a", "domains": ["a.example"], "connectors": ["tag:c"]}]);
        let message = json!({
            "Node": {"ID": 1, "Name": "me.tb.example.", "Key": key(1), "Addresses": ["100.64.0.1/32"],
                     "CapMap": {"tailscale.com/app-connectors-experimental": apps}},
            "Peers": [peer(2, false, "tag:c"), peer(3, true, "tag:other"), peer(4, true, "tag:c"), peer(5, true, "tag:c")],
        });
        let message = serde_json::from_value(message).unwrap();
        Session::new(true).apply(message, Timestamp::UNIX_EPOCH).unwrap().netmap.unwrap()
    }

    #[test]
    fn an_apps_own_connectors_are_asked_and_offline_ones_last() {
        let netmap = netmap();
        let asked: Vec<_> =
            serving(&netmap, "a").into_iter().map(|connector| connector.server.uri.to_string()).collect();
        assert_eq!(asked, [4, 5, 2].map(|id| format!("http://100.64.0.{id}:4000/v0/connector/transit-ip")));
        assert!(serving(&netmap, "b").is_empty());
    }

    #[test]
    fn only_addresses_of_our_own_families_are_agreed_upon() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let dialable =
            |addresses: &[&str]| dialable(&netmap(), &addresses.iter().map(|text| ip(text)).collect::<Vec<_>>());
        assert_eq!(dialable(&["10.0.0.1", "fd00::1", "::ffff:10.0.0.1"]), Ok(BTreeSet::from([ip("10.0.0.1")])));
        let family = RouteError::Family { address: ip("fd00::1"), family: "IPv6" };
        assert_eq!(dialable(&["fd00::1"]), Err(family));
    }
}
