//! App connectors: two tailscaled that resolve and forward for others, and the network behind them.
//!
//! Up when a scenario first asks for them, and then kept: joined to a tbcontrol of their own, each node
//! a user of its own, routes approved a while after they are advertised. A scenario finds all of it in
//! its first state, whatever the one before did, but for what connectors have learned.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use libtest_mimic::Failed;
use serde_json::{Map, Value, json};

use crate::bed::{Bed, site};
use crate::namespace::Namespace;
use crate::process::{Process, until};
use crate::sidecar::Launch;
use crate::tailscaled::{Places, Role, Tailscaled};
use crate::testcontrol::{KEY, TestControl, admit};
use crate::zone::{FRESH, records, resolver};

/// Where their tbcontrol is.
const CONTROL: &str = "10.99.0.4";

/// The network that `conn` routes by configuration, so that no address in it needs to be learned.
pub(crate) const STATIC: &str = "fdaa:1:ffff::/48";

/// A network that no connector routes, with `wide.app.test` in it.
pub(crate) const WIDE: &str = "10.30.2.0/24";

/// What each connector serves. `both.test` is of both, `refused.test` is known to no resolver.
pub(crate) const SUFFIXES: [(&str, &[&str]); 2] = [
    ("conn", &["app.test", "one.test", "two.test", "three.test", "refused.test", "both.test"]),
    ("conn2", &["four.test", "five.test", "both.test"]),
];

/// Long enough for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// The connectors and what is behind them.
pub(crate) struct Apps {
    control: Mutex<TestControl>,
    conn: Mutex<Tailscaled>,
    conn2: Mutex<Tailscaled>,
    resolver: Mutex<Process>,
    _site: Process,
    fresh: AtomicUsize,
    zone: PathBuf,
    peers: PathBuf,
    authority: PathBuf,
    folder: PathBuf,
    url: String,
}

/// One of the two connectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    First,
    Second,
}

impl Which {
    /// Its hostname.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::First => "conn",
            Self::Second => "conn2",
        }
    }

    /// Its IPv4 address on the apps' network, which the resolver and the site see.
    pub(crate) const fn address(self) -> &'static str {
        match self {
            Self::First => "10.30.0.1",
            Self::Second => "10.30.0.2",
        }
    }

    /// Its host.
    fn host(self, bed: &Bed) -> &Namespace {
        match self {
            Self::First => &bed.hosts.conn,
            Self::Second => &bed.hosts.conn2,
        }
    }
}

impl Apps {
    /// Brings all of it up; a few seconds.
    ///
    /// # Errors
    /// The first thing that did not come up.
    pub(crate) fn up(bed: &Bed) -> Result<Self, Failed> {
        let zone = bed.folder.join("app.zone");
        fs::write(&zone, records("10.30.0.91"))?;
        let resolver = resolver(bed, &zone)?;
        let site = site(&bed.peers, &bed.hosts.app, "app", &bed.folder)?;
        let mut control = TestControl::start_for(bed, &bed.hosts.apps, CONTROL)?;
        control.ask("auto_approve", json!({ "on": true }))?;
        let (url, authority) = (control.url.clone(), control.authority.clone());
        let places = Places { peers: &bed.peers, authority: &authority, folder: &bed.folder, control: &url };
        let (conn, conn2) = thread::scope(|scope| {
            let second = scope.spawn(|| join(&places, bed, Which::Second));
            let first = join(&places, bed, Which::First)?;
            let second = second.join().map_err(|_| "the second connector's thread panicked")??;
            Ok::<_, Failed>((first, second))
        })?;
        let apps = Self {
            control: Mutex::new(control),
            conn: Mutex::new(conn),
            conn2: Mutex::new(conn2),
            resolver: Mutex::new(resolver),
            _site: site,
            fresh: AtomicUsize::new(1),
            zone,
            peers: bed.peers.clone(),
            authority,
            folder: bed.folder.clone(),
            url,
        };
        apps.serve(Which::First)?;
        apps.serve(Which::Second)?;
        Ok(apps)
    }

    /// Puts back what a scenario may have changed.
    ///
    /// # Errors
    /// When a connector that was stopped does not come back.
    pub(crate) fn reset(&self, bed: &Bed) -> Result<(), Failed> {
        admit(&bed.hosts.apps, CONTROL)?;
        for which in [Which::First, Which::Second] {
            if self.connector(which).process.ended()?.is_some() {
                self.restart(bed, which)?;
            }
            self.ask("alter", json!({ "node": which.name() }))?;
        }
        self.ask("auto_approve", json!({ "on": true }))?;
        self.offer(&[])
    }

    /// Waits until a joined connector says what it is, and tells it what it serves.
    fn serve(&self, which: Which) -> Result<(), Failed> {
        until(PATIENCE, "a connector that says so", || Ok(self.peerapi(which).is_ok().then_some(())))?;
        self.ask("cap_map", json!({ "node": which.name(), "caps": caps(which) }))?;
        let routes = routes(which);
        until(PATIENCE, "a configured route to be approved", || {
            let approved = self.routes(which)?;
            Ok(routes.iter().all(|route| approved.iter().any(|other| other == route)).then_some(()))
        })
    }

    /// Sends the tailnet's DNS configuration: each suffix to its connectors, and what `others` says besides.
    ///
    /// # Errors
    /// When a connector is not there.
    pub(crate) fn offer(&self, others: &[(&str, Value)]) -> Result<(), Failed> {
        let mut routes = Map::new();
        for which in [Which::First, Which::Second] {
            let resolver = json!({ "Addr": self.peerapi(which)? });
            for suffix in suffixes(which) {
                let of_suffix = routes.entry(*suffix).or_insert_with(|| json!([]));
                of_suffix.as_array_mut().ok_or("no list")?.push(resolver.clone());
            }
        }
        routes.extend(others.iter().map(|(suffix, resolvers)| ((*suffix).to_owned(), resolvers.clone())));
        let config = json!({ "Proxied": true, "Domains": ["tb.example"], "Routes": routes });
        self.ask("dns", json!({ "config": config })).map(drop)
    }

    /// The URL at which a connector answers questions.
    ///
    /// # Errors
    /// When it is not there, or has not said that it is a connector.
    pub(crate) fn peerapi(&self, which: Which) -> Result<String, Failed> {
        let node = self.node(which.name())?;
        let hostinfo = &node["Hostinfo"];
        let services = hostinfo["Services"].as_array().cloned().unwrap_or_default();
        let port = services.iter().find(|service| service["Proto"] == "peerapi4").map(|service| &service["Port"]);
        match (node["Addresses"][0].as_str(), port) {
            (Some(address), Some(port)) if hostinfo["AppConnector"] == true => {
                Ok(format!("http://{}:{port}/dns-query", address.trim_end_matches("/32")))
            }
            _ => Err(format!("{} is no connector: {hostinfo}", which.name()).into()),
        }
    }

    /// The routes that a connector was given.
    ///
    /// # Errors
    /// When it is not there.
    pub(crate) fn routes(&self, which: Which) -> Result<Vec<String>, Failed> {
        let routes = self.ask("approved", json!({ "node": which.name() }))?;
        Ok(routes.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect())
    }

    /// A node in Tailscale's JSON; of several with one name, the newest.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn node(&self, name: &str) -> Result<Value, Failed> {
        let nodes = self.ask("nodes", json!({}))?;
        let wanted = format!("{name}.tb.example.");
        let mut found: Vec<Value> = nodes.as_array().cloned().unwrap_or_default();
        found.retain(|node| node["Name"] == wanted);
        found.sort_by_key(|node| node["ID"].as_u64());
        found.pop().ok_or_else(|| format!("no node {name} among {nodes}").into())
    }

    /// Does an operation of their tbcontrol.
    ///
    /// # Errors
    /// What it complained of.
    pub(crate) fn ask(&self, operation: &str, arguments: Value) -> Result<Value, Failed> {
        self.control().ask(operation, arguments)
    }

    /// Their tbcontrol.
    pub(crate) fn control(&self) -> MutexGuard<'_, TestControl> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connector's daemon.
    pub(crate) fn connector(&self, which: Which) -> MutexGuard<'_, Tailscaled> {
        let daemon = if which == Which::First { &self.conn } else { &self.conn2 };
        daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a connector without a word, and starts it again as the node that it was.
    ///
    /// # Errors
    /// When it does not come back.
    pub(crate) fn restart(&self, bed: &Bed, which: Which) -> Result<(), Failed> {
        self.connector(which).process.end();
        // testcontrol wants a key of a node that it knows, too.
        self.ask("require_auth_key", json!({ "key": "" }))?;
        let places = self.places();
        let daemon = with_role(&places, which, |role| Tailscaled::resume(&places, which.host(bed), role));
        self.ask("require_auth_key", json!({ "key": KEY }))?;
        let daemon = daemon?;
        *self.connector(which) = daemon;
        until(PATIENCE, "the connector to be one again", || Ok(self.peerapi(which).is_ok().then_some(())))
    }

    /// A sidecar that is to join where the connectors are.
    pub(crate) fn launch<'a>(&self, bed: &'a Bed) -> Launch<'a> {
        self.control().launch(bed).on(&bed.hosts.apps)
    }

    /// For a further tailscaled.
    pub(crate) fn places(&self) -> Places<'_> {
        Places { peers: &self.peers, authority: &self.authority, folder: &self.folder, control: &self.url }
    }

    /// A name under `suffix` that nobody has asked for, and the end of its addresses, which nothing else has:
    /// 10.30.1.N for names that begin with `n` or `d`, `fdaa:2:1::N` (N in decimal digits) with `s` or `d`.
    pub(crate) fn fresh(&self, kind: char, suffix: &str) -> (String, usize) {
        let number = self.fresh.fetch_add(1, Ordering::Relaxed);
        assert!(number <= FRESH, "the zone has no fresh names left");
        (format!("{kind}{number}.{suffix}"), number)
    }

    /// How often a connector's questions for a name have reached the resolver. tailscaled asks by UDP and TCP beside
    /// each other: up to twice for each family.
    pub(crate) fn asked(&self, name: &str, by: Which) -> usize {
        let wanted = format!("] {name} from {}", by.address());
        let resolver = self.resolver.lock().unwrap_or_else(PoisonError::into_inner);
        resolver.log().lines().filter(|line| line.contains("query[") && line.ends_with(&wanted)).count()
    }

    /// Holds that names of connectors were asked of their own connectors and of nobody else: not of the other
    /// connector, not of the trap, not of the LAN's resolver.
    ///
    /// # Errors
    /// With what was asked elsewhere.
    pub(crate) fn kept_to_themselves(&self, bed: &Bed) -> Result<(), Failed> {
        let resolver = self.resolver.lock().unwrap_or_else(PoisonError::into_inner);
        for which in [Which::First, Which::Second] {
            let by = format!(" from {}", which.address());
            let log = resolver.log();
            let queries = log.lines().filter(|line| line.contains("query[")).filter_map(|line| line.split_once("] "));
            let mut names = queries.filter_map(|(_, rest)| rest.strip_suffix(&by));
            let served = |name: &str| suffixes(which).iter().any(|suffix| is_under(name, suffix));
            let known = |name: &str| SUFFIXES.iter().flat_map(|(_, all)| *all).any(|suffix| is_under(name, suffix));
            if let Some(name) = names.find(|name| known(name) && !served(name)) {
                return Err(format!("{} was asked for {name}", which.name()).into());
            }
        }
        for suffix in SUFFIXES.iter().flat_map(|(_, suffixes)| *suffixes) {
            if bed.strayed_under(suffix) > 0 {
                return Err(format!("a name under {suffix} was asked of no connector").into());
            }
        }
        Ok(())
    }

    /// Lets `moving.app.test` have another address from now on.
    ///
    /// # Errors
    /// When the resolver does not come up again.
    pub(crate) fn move_to(&self, bed: &Bed, address: &str) -> Result<(), Failed> {
        fs::write(&self.zone, records(address))?;
        let mut running = self.resolver.lock().unwrap_or_else(PoisonError::into_inner);
        running.end();
        *running = resolver(bed, &self.zone)?;
        Ok(())
    }
}

/// What control tells a connector that it serves.
pub(crate) fn caps(which: Which) -> Value {
    let domains = suffixes(which).iter().flat_map(|suffix| [(*suffix).to_owned(), format!("*.{suffix}")]);
    let served = json!({
        "name": which.name(), "domains": domains.collect::<Vec<_>>(), "routes": routes(which), "connectors": ["*"],
    });
    json!({ "tailscale.com/app-connectors": [served] })
}

/// What a connector routes by configuration.
fn routes(which: Which) -> &'static [&'static str] {
    if which == Which::First { &[STATIC] } else { &[] }
}

/// The suffixes of a connector.
fn suffixes(which: Which) -> &'static [&'static str] {
    let found = SUFFIXES.iter().find(|(name, _)| *name == which.name());
    found.map_or(&[], |(_, suffixes)| suffixes)
}

/// Whether a name is `suffix` or below it.
fn is_under(name: &str, suffix: &str) -> bool {
    name.strip_suffix(suffix).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Joins a connector for the first time.
fn join(places: &Places<'_>, bed: &Bed, which: Which) -> Result<Tailscaled, Failed> {
    with_role(places, which, |role| Tailscaled::join(places, which.host(bed), role, KEY))
}

/// Starts a connector with its flags; its state is kept.
fn with_role<T>(places: &Places<'_>, which: Which, start: impl FnOnce(&Role<'_>) -> T) -> T {
    let state = format!("--state={}", places.folder.join(format!("{}.state", which.name())).display());
    start(&Role { hostname: which.name(), tun: "ts0", daemon: &[&state], up: &["--advertise-connector"] })
}
