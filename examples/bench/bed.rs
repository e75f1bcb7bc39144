//! The bench's hosts, the control server, and the far end that is the same for all.
//!
//! ```text
//! wan     bridge 10.99.0.0/24: .1 headscale with its DERP region and STUN; .254 swallows what is sent to it
//! client  10.99.0.21   the node that is measured, and its browser
//! far     10.99.0.31   a tailscaled with a kernel TUN, and the server
//! ```
//! Hosts behind an emulated line are added by whoever needs them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use libtest_mimic::Failed;

use crate::authority::Authority;
use crate::generator::Way;
use crate::headscale::{BROWSER, CONTROL, Headscale, Key, KeyKind};
use crate::namespace::{self, Namespace, cable};
use crate::process::{self, Process, until};
use crate::server::COUNTS;
use crate::tailscaled::{Places, Role, Tailscaled};

/// Where a default route leads: nothing that is sent there comes back.
pub(crate) const TRAP: &str = "10.99.0.254";
const CLIENT: &str = "10.99.0.21";
const FAR: &str = "10.99.0.31";
const FOLDER: &str = "tailcar-bench-";

/// All of it, up. Fields drop in order: processes before the namespaces that they are in.
pub(crate) struct Bed {
    pub(crate) headscale: Headscale,
    far_end: Tailscaled,
    server: Process,
    /// The far end's address in the tailnet.
    tailnet: IpAddr,
    /// A key that joins as often as one likes.
    pub(crate) key: Key,
    pub(crate) peers: PathBuf,
    pub(crate) authority: PathBuf,
    pub(crate) folder: PathBuf,
    pub(crate) client: Namespace,
    pub(crate) far: Namespace,
    pub(crate) wan: Namespace,
}

impl Bed {
    /// Brings everything up; a few seconds. `tick` is how long headscale collects changes of nodes.
    ///
    /// # Errors
    /// The first thing that did not come up, with its complaint.
    pub(crate) fn up(peers: &Path, tick: &str) -> Result<Self, Failed> {
        namespace::sweep();
        let folder = folder();
        fs::create_dir_all(&folder)?;
        let (wan, client, far) = hosts()?;
        let authority = Authority::new("authority", &folder)?;
        let tls = authority.issue("10.99.0.1".parse()?, &folder)?;
        let regions = folder.join("regions.json");
        fs::write(&regions, "regions: {}\n")?;
        let headscale = Headscale::start(&peers.join("headscale"), &wan, &folder, &tls, &regions, tick)?;
        let server = server(&far, &folder)?;
        let control = format!("https://{CONTROL}");
        let places = Places { peers, authority: &authority.certificate, folder: &folder, control: &control };
        let role = Role { hostname: "far", tun: "ts0", daemon: &[], up: &[] };
        let key = headscale.mint(KeyKind { tag: "tag:router", ..BROWSER })?;
        let far_end = Tailscaled::join(&places, &far, &role, &key.secret)?;
        let addresses = far_end.addresses()?;
        let tailnet = addresses.first().ok_or("the far end has no address")?.parse()?;
        let key = headscale.mint(BROWSER)?;
        let (peers, authority) = (peers.to_owned(), authority.certificate);
        Ok(Self { headscale, far_end, server, tailnet, key, peers, authority, folder, client, far, wan })
    }

    /// Through a proxy of the client's host, over the tailnet.
    pub(crate) fn through(&self, proxy: SocketAddr) -> Way {
        Way { proxy: Some(proxy), server: self.tailnet }
    }

    /// Without a tunnel.
    ///
    /// # Errors
    /// None in truth: the address is a constant.
    pub(crate) fn straight(&self) -> Result<Way, Failed> {
        Ok(Way { proxy: None, server: FAR.parse()? })
    }

    /// The far end's processes: tailscaled and the server.
    pub(crate) fn far_pids(&self) -> [u32; 2] {
        [self.far_end.process.id(), self.server.id()]
    }

    /// A connection by which the server tells what its sink has counted.
    ///
    /// # Errors
    /// When the server is gone.
    pub(crate) fn counts(&self) -> Result<TcpStream, Failed> {
        let stream = self.far.inside(|| TcpStream::connect((Ipv4Addr::LOCALHOST, COUNTS)))??;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(stream)
    }

    /// Whether the control server lists a node of that name.
    ///
    /// # Errors
    /// When the server does not answer.
    pub(crate) fn lists(&self, hostname: &str) -> Result<bool, Failed> {
        Ok(self.nodes()?.contains(&format!("\"{hostname}\"")))
    }

    /// Whether the control server lists a node whose name begins so.
    ///
    /// # Errors
    /// When the server does not answer.
    pub(crate) fn lists_any(&self, beginning: &str) -> Result<bool, Failed> {
        Ok(self.nodes()?.contains(&format!("\"{beginning}")))
    }

    /// All that the control server knows of its nodes, asked where it costs least.
    fn nodes(&self) -> Result<String, Failed> {
        use std::io::{Read as _, Write as _};
        let mut stream = self.wan.inside(|| TcpStream::connect((Ipv4Addr::LOCALHOST, 9090)))??;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /debug/nodestore HTTP/1.0\r\nAccept: application/json\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        if !answer.starts_with("HTTP/1.0 200") {
            return Err(format!("headscale does not tell its nodes: {answer:.200}").into());
        }
        Ok(answer)
    }

    /// Lets no datagram through between a host and the far end: what is left is DERP.
    ///
    /// # Errors
    /// With what `nft` said.
    pub(crate) fn relay_only(&self, host: &Namespace, on: bool) -> Result<(), Failed> {
        for (namespace, other) in [(host, FAR), (&self.far, CLIENT)] {
            let rules = match on {
                true => format!(
                    "table ip relayed {{ chain in {{ type filter hook input priority 0; \
                     ip saddr {other} ip protocol udp drop; }}; }}"
                ),
                false => "delete table ip relayed".to_owned(),
            };
            namespace.nft(&rules)?;
        }
        Ok(())
    }

    /// Adds a host with a link of its own to the bridge's network, which `wire` makes as `eth0` and `PORT`.
    ///
    /// # Errors
    /// With what `ip` said.
    pub(crate) fn host<T>(
        &self,
        role: &str,
        number: u8,
        wire: impl FnOnce(&Namespace, &Namespace, &str) -> Result<T, Failed>,
    ) -> Result<(Namespace, T), Failed> {
        let host = Namespace::create(role, TRAP)?;
        let port = format!("p{number}");
        let wire = wire(&host, &self.wan, &port)?;
        attach(&self.wan, &host, &port, &format!("10.99.0.{number}"))?;
        Ok((host, wire))
    }
}

/// Where this run keeps its files.
pub(crate) fn folder() -> PathBuf {
    std::env::temp_dir().join(format!("{FOLDER}{}", std::process::id()))
}

/// Ends what the bed runs and removes it.
pub(crate) fn take_down(keep: bool) {
    process::end_all();
    namespace::remove_ours();
    if !keep {
        drop(fs::remove_dir_all(folder()));
    }
}

fn hosts() -> Result<(Namespace, Namespace, Namespace), Failed> {
    let make = |role| Namespace::create(role, TRAP);
    let (wan, client, far) = (make("wan")?, make("client")?, make("far")?);
    wan.ip(&format!(
        "link add br0 type bridge\nlink set br0 up\naddr add 10.99.0.1/24 dev br0\naddr add {TRAP}/24 dev br0"
    ))?;
    for (host, address, port) in [(&client, CLIENT, "p21"), (&far, FAR, "p31")] {
        cable((host, "eth0"), (&wan, port))?;
        attach(&wan, host, port, address)?;
    }
    far.set("core/somaxconn", "32768")?;
    // Without one tailscaled takes its own device's coming up for a change of the link, seconds later.
    far.ip(&format!("route add default via {TRAP}"))?;
    client.set("ipv4/ip_local_port_range", "10000 65000")?;
    // The trap swallows: no rejection, as from a machine that is not there.
    wan.nft(&format!("table ip trap {{ chain in {{ type filter hook input priority 0; ip daddr {TRAP} drop; }}; }}"))?;
    Ok((wan, client, far))
}

fn attach(wan: &Namespace, host: &Namespace, port: &str, address: &str) -> Result<(), Failed> {
    wan.ip(&format!("link set {port} master br0\nlink set {port} up"))?;
    host.ip(&format!("addr add {address}/24 dev eth0\nlink set eth0 up"))?;
    Ok(())
}

fn server(far: &Namespace, folder: &Path) -> Result<Process, Failed> {
    let mut command = far.command(std::env::current_exe()?);
    command.arg("serve");
    let mut process = Process::start(command, "server", folder, false)?;
    until(Duration::from_secs(10), "the server", || match process.ended()? {
        Some(status) => Err(format!("the server ended with {status}: {}", process.log()).into()),
        None => Ok(far.inside(|| TcpStream::connect((Ipv4Addr::LOCALHOST, COUNTS)))?.ok().map(drop)),
    })?;
    Ok(process)
}
