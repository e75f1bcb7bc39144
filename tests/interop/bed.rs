//! The bed: hosts in network namespaces without an uplink, and the real programs on them.
//!
//! `hosts` has the map. What only app connectors need is started by the first scenario that asks for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use libtest_mimic::Failed;

use crate::apps::Apps;
use crate::authority::Authority;
use crate::corp::Corp;
use crate::derper::Derper;
use crate::headscale::{BROWSER, Headscale, Key, KeyKind};
use crate::hosts::Hosts;
use crate::leak;
use crate::namespace::Namespace;
use crate::nat_nodes::Nat;
use crate::process::{Process, queries, queries_under, until};
use crate::tailscaled::{Places, Role, Tailscaled};
use crate::{again, words};

/// What the bed's folder is called, up to the owner's pid.
const FOLDER: &str = "tailcar-bed-";
/// The control server of all that is not about another.
const HEADSCALE: &str = "https://10.99.0.1:8443";
/// The trap's address.
pub(crate) const TRAP: &str = "10.99.0.254";

/// All of it, up. Fields drop in order: processes before the namespaces that they are in.
pub(crate) struct Bed {
    nat: OnceLock<Result<Nat, String>>,
    apps: OnceLock<Result<Apps, String>>,
    headscale: Mutex<Headscale>,
    web: Mutex<Tailscaled>,
    router: Mutex<Tailscaled>,
    pub(crate) corp: Corp,
    _derper: Derper,
    _sites: Vec<Process>,
    trap: Process,
    /// The authority that signed headscale's certificate.
    pub(crate) authority: PathBuf,
    /// Where the peers' programs are.
    pub(crate) peers: PathBuf,
    /// Logs and files of everything; kept when a scenario failed.
    pub(crate) folder: PathBuf,
    /// The web peer's IPv4 and IPv6 addresses in the tailnet.
    pub(crate) web_addresses: Vec<String>,
    /// A key that joins as often as one likes.
    pub(crate) key: Key,
    pub(crate) hosts: Hosts,
}

impl Bed {
    /// Brings everything up; a few seconds.
    ///
    /// # Errors
    /// The first thing that did not come up, with its complaint. What was up by then is taken down.
    pub(crate) fn up(peers: &Path) -> Result<Self, Failed> {
        crate::namespace::sweep();
        sweep();
        let folder = folder();
        fs::create_dir_all(&folder)?;
        let hosts = Hosts::create()?;
        let authority = Authority::new("authority", &folder)?;
        let tls = authority.issue("10.99.0.1".parse()?, &folder)?;
        let derper = Derper::start(&peers.join("derper"), &hosts.wan, &folder)?;
        // headscale's own half a second would be waited for at each of a hundred joins, and says nothing about us.
        let tick = "20ms";
        let headscale = Headscale::start(&peers.join("headscale"), &hosts.wan, &folder, &tls, &derper.regions, tick)?;
        let trap = trap(&hosts.wan, &folder)?;
        let sites = vec![
            site(peers, &hosts.web, "web", &folder)?,
            site(peers, &hosts.corp, "corp", &folder)?,
            site(peers, &hosts.wan, "trap", &folder)?,
        ];
        let corp = Corp::start(&hosts.corp, &folder)?;
        let places = Places { peers, authority: &authority.certificate, folder: &folder, control: HEADSCALE };
        let (web, router) = join_peers(&places, &hosts, &headscale)?;
        let web_addresses = web.addresses()?;
        let key = headscale.mint(BROWSER)?;
        leak::reset(&hosts.client)?;
        Ok(Self {
            nat: OnceLock::new(),
            apps: OnceLock::new(),
            headscale: Mutex::new(headscale),
            web: Mutex::new(web),
            router: Mutex::new(router),
            corp,
            _derper: derper,
            _sites: sites,
            trap,
            authority: authority.certificate,
            peers: peers.to_owned(),
            folder,
            web_addresses,
            key,
            hosts,
        })
    }

    /// The control server.
    pub(crate) fn headscale(&self) -> MutexGuard<'_, Headscale> {
        self.headscale.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The web peer's daemon.
    pub(crate) fn web(&self) -> MutexGuard<'_, Tailscaled> {
        self.web.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The subnet router's daemon.
    pub(crate) fn router(&self) -> MutexGuard<'_, Tailscaled> {
        self.router.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often the trap was asked for a name: what should have been asked in the tailnet, or not at all.
    pub(crate) fn strayed(&self, name: &str) -> usize {
        queries(&self.trap, name)
    }

    /// The web peer's IPv4 address in the tailnet.
    pub(crate) fn web4(&self) -> &str {
        self.web_addresses.first().map_or("", String::as_str)
    }

    /// The web peer's IPv6 address in the tailnet.
    pub(crate) fn web6(&self) -> &str {
        self.web_addresses.get(1).map_or("", String::as_str)
    }

    /// Where peers' programs, trust and logs are, for a further tailscaled.
    pub(crate) fn places(&self) -> Places<'_> {
        Places { peers: &self.peers, authority: &self.authority, folder: &self.folder, control: HEADSCALE }
    }

    /// The app connectors and what is behind them, as if nothing had happened to them yet.
    ///
    /// # Errors
    /// When they do not come up, for every scenario that needs them.
    pub(crate) fn apps(&self) -> Result<&Apps, Failed> {
        let apps = self.apps.get_or_init(|| brought_up("app connectors", || Apps::up(self)));
        let apps = apps.as_ref().map_err(|why| format!("app connectors: {why}"))?;
        apps.reset(self)?;
        Ok(apps)
    }

    /// The internet with networks of every kind, and a peer in each.
    ///
    /// # Errors
    /// When they do not come up, for every scenario that needs them.
    pub(crate) fn nat(&self) -> Result<&Nat, Failed> {
        let nat = self.nat.get_or_init(|| brought_up("networks", || Nat::up(self)));
        Ok(nat.as_ref().map_err(|why| format!("networks: {why}"))?)
    }

    /// How often the trap or the LAN's resolver was asked for a name under `suffix`, or for itself.
    pub(crate) fn strayed_under(&self, suffix: &str) -> usize {
        queries_under(&self.trap, suffix) + queries_under(&self.corp.resolver, suffix)
    }
}

/// A part of the bed that several scenarios share, tried again as they are when it does not come up.
fn brought_up<T>(name: &str, up: impl Fn() -> Result<T, Failed>) -> Result<T, String> {
    let up = || up().map_err(|why| words(&why).to_owned());
    up().or_else(|why| if again(name, &why) { up() } else { Err(why) })
}

/// Where this process's bed keeps its files, whether it came up or not.
pub(crate) fn folder() -> PathBuf {
    std::env::temp_dir().join(format!("{FOLDER}{}", std::process::id()))
}

/// Removes the files of runs that ended long enough ago for nobody to be reading their logs.
fn sweep() {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(FOLDER).and_then(|pid| pid.parse::<u32>().ok());
        let age = entry.metadata().and_then(|file| file.modified()).ok().and_then(|time| time.elapsed().ok());
        let old = age.is_some_and(|age| age > Duration::from_secs(3600));
        if old && owner.is_some_and(|pid| !crate::namespace::alive(pid)) {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}

/// Joins the web peer and the router, side by side: each takes a second or two.
fn join_peers(places: &Places<'_>, hosts: &Hosts, headscale: &Headscale) -> Result<(Tailscaled, Tailscaled), Failed> {
    let key = |tag| headscale.mint(KeyKind { tag, ..BROWSER });
    let (web_key, router_key) = (key("tag:web")?, key("tag:router")?);
    let web_role = Role { hostname: "web", tun: "userspace-networking", daemon: &[], up: &[] };
    let router_role = Role {
        hostname: "router",
        tun: "ts0",
        daemon: &[],
        up: &["--advertise-routes=10.20.0.0/24,10.21.0.0/24,fd20::/64"],
    };
    thread::scope(|scope| {
        let web = scope.spawn(|| Tailscaled::join(places, &hosts.web, &web_role, &web_key.secret));
        let router = Tailscaled::join(places, &hosts.router, &router_role, &router_key.secret)?;
        let web = web.join().map_err(|_| "the web peer's thread panicked")??;
        Ok((web, router))
    })
}

/// What answers every name with the trap's own address.
fn trap(wan: &Namespace, folder: &Path) -> Result<Process, Failed> {
    let mut command = wan.command("dnsmasq");
    command.args(["--no-daemon", "--no-resolv", "--no-hosts", "--log-queries", "--log-facility=-"]);
    command.args(["--bind-interfaces"]).arg(format!("--listen-address={TRAP}"));
    command.arg(format!("--address=/#/{TRAP}"));
    let mut process = Process::start(command, "trap-dnsmasq", folder, false)?;
    process.says("started", Duration::from_secs(5))?;
    Ok(process)
}

/// The test site, on every address of a host; in `wan` on the trap's only.
pub(crate) fn site(peers: &Path, namespace: &Namespace, name: &str, folder: &Path) -> Result<Process, Failed> {
    let host = if name == "trap" { TRAP } else { "::" };
    let http = if host == "::" { "[::]:80".to_owned() } else { format!("{host}:80") };
    let mut command = namespace.command(peers.join("site"));
    command.args(["--http", &http, "--tcp", host, "--name", name]);
    let log = format!("site-{name}");
    let mut process = Process::start(command, &log, folder, false)?;
    until(Duration::from_secs(10), &log, || match process.ended()? {
        Some(status) => Err(format!("{log} ended with {status}: {}", process.log()).into()),
        None => Ok(process.log().contains("ready").then_some(())),
    })?;
    Ok(process)
}
