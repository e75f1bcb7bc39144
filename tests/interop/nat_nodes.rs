//! The nodes in the networks of [`crate::nat`], and which way each says that its packets take.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, thread};

use libtest_mimic::Failed;
use serde_json::Value;

use crate::authority::Authority;
use crate::bed::{Bed, site};
use crate::client;
use crate::derper::Derper;
use crate::headscale::{Headscale, Key, KeyKind, configuration};
use crate::namespace::Namespace;
use crate::nat::{CONTROL, CONTROL6, DERPER, DERPER6, Internet, Kind};
use crate::process::{Process, until};
use crate::sidecar::{Launch, Sidecar};
use crate::tailscaled::{Places, Role, Tailscaled};

/// Everybody may talk to everybody; one kind of peer has only an IPv6 address in the tailnet.
const POLICY: &str = r#"{
  "tagOwners": {"tag:browser": ["dev@"], "tag:six": ["dev@"]},
  "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}],
  "nodeAttrs": [{"target": ["tag:six"], "attr": ["disable-ipv4"]}],
}"#;

/// Where the tailscaled of a client offers SOCKS.
const SOCKS: &str = "127.0.0.1:1080";

/// One of the starts of [`side_by_side`].
pub(crate) type Start<'a, T> = Box<dyn FnOnce() -> Result<T, Failed> + Send + 'a>;

/// The internet with its servers and peers, up. Fields drop in order: processes before their namespaces.
pub(crate) struct Nat {
    /// One in each kind of network.
    pub(crate) peers: Vec<Peer>,
    /// Those behind the easy client's NAT: in its LAN, and in the other.
    pub(crate) neighbours: Vec<Peer>,
    pub(crate) servers: Servers,
    pub(crate) internet: Internet,
}

impl Nat {
    /// Brings all of it up; some ten seconds.
    ///
    /// # Errors
    /// The first thing that did not come up.
    pub(crate) fn up(bed: &Bed) -> Result<Self, Failed> {
        let internet = Internet::create()?;
        let servers = Servers::start(bed, &internet)?;
        let networks = internet.peers.iter().map(|network| (network.kind.name(), network.kind, &network.host));
        let neighbours = [("lan", Kind::Easy, &internet.neighbour), ("forwarded", Kind::Easy, &internet.forwarded)];
        let starts = networks.chain(neighbours).map(|(name, kind, host)| {
            let servers = &servers;
            let start: Start<'_, Peer> = Box::new(move || servers.peer(bed, name, kind, host));
            start
        });
        let mut peers = side_by_side(starts.collect())?;
        let neighbours = peers.split_off(internet.peers.len());
        Ok(Self { peers, neighbours, servers, internet })
    }

    /// A tailcar and a tailscaled in the network of a kind, known to the peers in all of them.
    ///
    /// # Errors
    /// When one does not join.
    pub(crate) fn clients<'a>(&'a self, bed: &'a Bed, kind: Kind) -> Result<[Client<'a>; 2], Failed> {
        let network = self.internet.clients.iter().find(|network| network.kind == kind).ok_or("no such network")?;
        let theirs = self.servers.tailscaled(bed, kind, &network.host)?;
        let clients = [self.servers.tailcar(bed, kind, &network.host)?, theirs];
        for peer in &self.peers {
            clients.iter().try_for_each(|client| peer.knows(client))?;
        }
        Ok(clients)
    }

    /// The peer in the network of a kind.
    ///
    /// # Errors
    /// Never, as there is one in each.
    pub(crate) fn peer(&self, kind: Kind) -> Result<&Peer, Failed> {
        let name = format!("peer-{}", kind.name());
        Ok(self.peers.iter().find(|peer| peer.name == name).ok_or("no such peer")?)
    }
}

/// The servers, up.
pub(crate) struct Servers {
    headscale: Headscale,
    _derper: Derper,
    authority: PathBuf,
    folder: PathBuf,
    key: Key,
}

/// A tailscaled that waits for clients, and its site.
pub(crate) struct Peer {
    pub(crate) name: String,
    pub(crate) daemon: Tailscaled,
    /// The address that clients use: its only one, or its IPv4 one.
    pub(crate) address: String,
    _site: Option<Process>,
}

/// Who asks for pages.
pub(crate) enum Client<'a> {
    Tailcar(Sidecar<'a>),
    Tailscaled(Tailscaled, &'a Namespace),
}

impl Servers {
    /// Starts them.
    ///
    /// # Errors
    /// The first thing that did not come up.
    pub(crate) fn start(bed: &Bed, internet: &Internet) -> Result<Self, Failed> {
        let folder = bed.folder.join("nat");
        fs::create_dir_all(&folder)?;
        let authority = Authority::new("nat", &folder)?;
        let v4 = CONTROL.parse()?;
        let tls = authority.issue_to(v4, &[v4, CONTROL6.parse()?], &folder)?;
        let derper = Derper::start_at(&bed.peers.join("derper"), &internet.derper, &folder, DERPER, Some(DERPER6))?;
        let mut config = configuration(&folder, &tls, &derper.regions, "20ms");
        config["server_url"] = format!("https://{CONTROL}:8443").into();
        config["listen_addr"] = "[::]:8443".into();
        config["derp"]["server"]["stun_listen_addr"] = "[::]:3478".into();
        config["derp"]["server"]["ipv4"] = CONTROL.into();
        config["derp"]["server"]["ipv6"] = CONTROL6.into();
        config["dns"]["nameservers"]["split"] = Value::Object(serde_json::Map::new());
        let program = bed.peers.join("headscale");
        let headscale = Headscale::start_with(&program, &internet.control, &folder, &config, POLICY)?;
        let key = headscale.mint(KeyKind { tag: "tag:browser", reusable: true, expires: "24h" })?;
        Ok(Self { headscale, _derper: derper, authority: authority.certificate, folder, key })
    }

    /// Control's URL for a host in that kind of network.
    pub(crate) fn url(kind: Kind) -> String {
        if kind == Kind::Six { format!("https://[{CONTROL6}]:8443") } else { format!("https://{CONTROL}:8443") }
    }

    /// Starts a peer. That of the network with both families has only an IPv6 address in the tailnet.
    ///
    /// # Errors
    /// When it does not join.
    pub(crate) fn peer(&self, bed: &Bed, name: &str, kind: Kind, host: &Namespace) -> Result<Peer, Failed> {
        let tag = if kind == Kind::Dual { "tag:six" } else { "tag:browser" };
        let key = self.headscale.mint(KeyKind { tag, reusable: false, expires: "24h" })?;
        let name = format!("peer-{name}");
        let (control, site) = (Self::url(kind), site(&bed.peers, host, &name, &self.folder)?);
        let places = self.places(bed, &control);
        let role = Role { hostname: &name, tun: "userspace-networking", daemon: &[], up: &[] };
        let daemon = Tailscaled::join(&places, host, &role, &key.secret)?;
        Ok(Peer { _site: Some(site), ..Peer::new(&name, daemon)? })
    }

    /// Where a further peer's programs, trust, logs and control are.
    pub(crate) fn places<'a>(&'a self, bed: &'a Bed, control: &'a str) -> Places<'a> {
        Places { peers: &bed.peers, authority: &self.authority, folder: &self.folder, control }
    }

    /// A key for any number of nodes.
    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    /// Starts a tailscaled that offers SOCKS.
    ///
    /// # Errors
    /// When it does not join.
    pub(crate) fn tailscaled<'a>(&self, bed: &Bed, kind: Kind, host: &'a Namespace) -> Result<Client<'a>, Failed> {
        let (control, name) = (Self::url(kind), format!("reference-{}", kind.name()));
        let places = self.places(bed, &control);
        // Another port than the peers': it shares a NAT with one whose port is forwarded.
        let daemon = &["--port=41651", "--socks5-server", SOCKS];
        let role = Role { hostname: &name, tun: "userspace-networking", daemon, up: &[] };
        Ok(Client::Tailscaled(Tailscaled::join(&places, host, &role, &self.key.secret)?, host))
    }

    /// Starts a tailcar.
    ///
    /// # Errors
    /// When it does not join.
    pub(crate) fn tailcar<'a>(&self, bed: &'a Bed, kind: Kind, host: &'a Namespace) -> Result<Client<'a>, Failed> {
        let name = format!("tailcar-{}", kind.name());
        Ok(Client::Tailcar(self.launch(bed, kind, host).hostname(&name).ready()?))
    }

    /// A tailcar that is to be started.
    pub(crate) fn launch<'a>(&self, bed: &'a Bed, kind: Kind, host: &'a Namespace) -> Launch<'a> {
        let launch = Launch::new(bed).on(host).control(&Self::url(kind)).secret(&self.key.secret).without_trust();
        launch.args(&["--ca-file", &self.authority.to_string_lossy()])
    }
}

impl Client<'_> {
    /// Its IPv4 address in the tailnet.
    fn address(&self) -> Result<Value, Failed> {
        match self {
            Self::Tailcar(sidecar) => Ok(sidecar.ready["node"]["addresses"][0].clone()),
            Self::Tailscaled(daemon, _) => Ok(local_status(daemon.socket())?["Self"]["TailscaleIPs"][0].clone()),
        }
    }

    /// A connection to a peer by the client's proxy.
    ///
    /// # Errors
    /// When it is not made.
    pub(crate) fn dial(&self, peer: &Peer, port: u16) -> Result<TcpStream, Failed> {
        match self {
            Self::Tailcar(sidecar) => sidecar.dial(&peer.address, port),
            Self::Tailscaled(_, host) => {
                match client::socks5(client::connect(host, SOCKS.parse()?)?, &peer.address, port)? {
                    (0, stream) => Ok(stream),
                    (code, _) => Err(format!("tailscaled's SOCKS reply {code:02} for {}", peer.name).into()),
                }
            }
        }
    }

    /// The address that packets to a peer go to now, by what the client says itself; `None` when they are relayed.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub(crate) fn path(&self, peer: &Peer) -> Result<Option<SocketAddr>, Failed> {
        match self {
            Self::Tailcar(sidecar) => Ok(said(&sidecar.process.log(), &peer.name).pop().flatten()),
            Self::Tailscaled(daemon, _) => {
                let status = local_status(daemon.socket())?;
                let found = peers_of(&status).find(|other| other["HostName"] == peer.name.as_str());
                Ok(found.and_then(|other| other["CurAddr"].as_str()?.parse().ok()))
            }
        }
    }
}

impl Peer {
    /// A daemon that serves what is on its host already.
    ///
    /// # Errors
    /// When it has no address.
    pub(crate) fn new(name: &str, daemon: Tailscaled) -> Result<Self, Failed> {
        let address = daemon.addresses()?.first().cloned().ok_or("a peer has no address")?;
        Ok(Self { name: name.to_owned(), daemon, address, _site: None })
    }

    /// Where the peer sends packets for a client now; `None` for a relay.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub(crate) fn path_to(&self, client: &Client<'_>) -> Result<Option<SocketAddr>, Failed> {
        let (address, status) = (client.address()?, local_status(self.daemon.socket())?);
        let mut all = peers_of(&status);
        let found = all.find(|peer| peer["TailscaleIPs"].as_array().is_some_and(|ips| ips.contains(&address)));
        Ok(found.and_then(|other| other["CurAddr"].as_str()?.parse().ok()))
    }

    /// Whether the peer says of itself that it is at that address.
    ///
    /// # Errors
    /// What the command complained of.
    pub(crate) fn is_at(&self, address: IpAddr) -> Result<bool, Failed> {
        let status = local_status(self.daemon.socket())?;
        let mut said = status["Self"]["Addrs"].as_array().into_iter().flatten().filter_map(Value::as_str);
        Ok(said.any(|said| said.parse::<SocketAddr>().is_ok_and(|said| said.ip() == address)))
    }

    /// The addresses at which control says that a node is.
    ///
    /// # Errors
    /// What the command complained of.
    pub(crate) fn endpoints_of(&self, node: &str) -> Result<Vec<SocketAddr>, Failed> {
        let netmap = self.daemon.netmap()?;
        let is_node = |peer: &&Value| peer["Name"].as_str().is_some_and(|name| name.starts_with(&format!("{node}.")));
        let found = netmap["Peers"].as_array().into_iter().flatten().find(is_node);
        let listed = found.and_then(|peer| peer["Endpoints"].as_array()).into_iter().flatten();
        Ok(listed.filter_map(|endpoint| endpoint.as_str()?.parse().ok()).collect())
    }

    /// Waits until the peer knows a client by the address that it has now: hostnames come again in later scenarios.
    pub(crate) fn knows(&self, client: &Client<'_>) -> Result<(), Failed> {
        knows(&self.daemon, &self.name, &client.address()?)
    }
}

/// Waits until a daemon has heard of the node with that address.
///
/// # Errors
/// When it has not soon, or does not answer.
pub(crate) fn knows(daemon: &Tailscaled, name: &str, address: &Value) -> Result<(), Failed> {
    until(Duration::from_secs(10), &format!("{name} to know {address}"), || {
        let status = local_status(daemon.socket())?;
        let known = |peer: &Value| peer["TailscaleIPs"].as_array().is_some_and(|ips| ips.contains(address));
        Ok(peers_of(&status).any(known).then_some(()))
    })
}

/// The paths to a peer, one after the other, by a tailcar's log: an address, or `None` for a relay.
fn said(log: &str, peer: &str) -> Vec<Option<SocketAddr>> {
    let wanted = format!("peer=\"{peer}.");
    let lines = log.lines().filter(|line| line.contains("peer's path") && line.contains(&wanted));
    let mut paths: Vec<_> =
        lines.filter_map(|line| line.rsplit_once("path=")).map(|(_, path)| path.parse::<SocketAddr>().ok()).collect();
    paths.dedup();
    paths
}

/// The peers in what [`local_status`] says.
pub(crate) fn peers_of(status: &Value) -> impl Iterator<Item = &Value> {
    status["Peer"].as_object().into_iter().flat_map(|peers| peers.values())
}

/// What `tailscale status --json` would print, without starting it: it is asked for a hundred times a second.
///
/// # Errors
/// When the daemon at `socket` does not answer.
pub(crate) fn local_status(socket: &Path) -> Result<Value, Failed> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream
        .write_all(b"GET /localapi/v0/status HTTP/1.1\r\nHost: local-tailscaled.sock\r\nConnection: close\r\n\r\n")?;
    let response = client::response(&mut stream, false)?;
    Ok(serde_json::from_slice(&response.body)?)
}

/// Does the same for all, four at a time: that many starts are quicker than all at once on two cores.
///
/// # Errors
/// The first that failed.
pub(crate) fn side_by_side<T: Send>(work: Vec<Start<'_, T>>) -> Result<Vec<T>, Failed> {
    let mut done = Vec::new();
    let mut work = work.into_iter().peekable();
    while work.peek().is_some() {
        let batch: Vec<_> = work.by_ref().take(4).collect();
        let results = thread::scope(|scope| {
            let workers: Vec<_> = batch.into_iter().map(|work| scope.spawn(work)).collect();
            let joined = workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| Err("it panicked".into())));
            joined.collect::<Result<Vec<T>, Failed>>()
        })?;
        done.extend(results);
    }
    Ok(done)
}
