//! The bed's hosts and the wires between them.
//!
//! ```text
//! wan      bridge 10.99.0.0/24: .1 headscale, DERP 999, STUN; .2 derper, region 998; .2 to .6 tbcontrol; .254 the trap
//! client   10.99.0.21  the sidecar, and who uses it
//! silent   10.99.0.22  the sidecar of a scenario that runs beside the others for long
//! killed   10.99.0.23  likewise
//! relayed  10.99.0.41  the sidecar of the scenarios about relays, beside the others too
//! lasting  10.99.0.42  the sidecar of one connection that lasts, likewise
//! idle     192.168.43.2, behind a NAT at 10.99.0.43 that forgets in 8 s: the sidecar of connections that rest, likewise
//! apps     10.99.0.24  the sidecar of the scenarios about app connectors, beside the others too
//! link     10.99.0.25  the sidecar of the scenarios about another network, with a second way in by eth1
//! web      10.99.0.31  tailscaled (userspace), a site
//! router   10.99.0.13  tailscaled (kernel TUN), 10.20.0.1 and fd20::1 on the LAN
//! router2  10.99.0.15  for a second router: 10.20.0.2 and fd20::2 on the LAN
//! exit     10.99.0.16  for an exit node
//! corp     the LAN: .53 dnsmasq, .54 a silent resolver, .55 a failing one, .80 a site, .99 a silent host
//! conn     10.99.0.14  for an app connector: 10.30.0.1, fdaa:1:ffff::1 and fdaa:2::1 on the apps' network
//! conn2    10.99.0.17  likewise: .2 and ::2
//! app      the apps' network: 10.30.0.53 dnsmasq; a site on 10.30.0.80 and up, 10.30.1.0/24, 10.30.2.0/24,
//!          fdaa:1:ffff::80 and up, fdaa:2::80 and up, fdaa:2:1::/64
//! ```
//! The trap is the default route and the resolver of all but the connectors and the exit node: it answers every name with
//! itself and serves a site, so that whatever leaks arrives somewhere and is seen.

use libtest_mimic::Failed;

use crate::bed::TRAP;
use crate::namespace::{Namespace, cable};

/// The apps' resolver, which the connectors use.
pub(crate) const APP_DNS: &str = "10.30.0.53";

/// The exit node, and its own resolver.
pub(crate) const EXIT: &str = "10.99.0.16";

/// The namespaces.
pub(crate) struct Hosts {
    pub(crate) wan: Namespace,
    pub(crate) client: Namespace,
    pub(crate) silent: Namespace,
    pub(crate) killed: Namespace,
    pub(crate) apps: Namespace,
    pub(crate) link: Namespace,
    pub(crate) relayed: Namespace,
    pub(crate) lasting: Namespace,
    pub(crate) idle: Namespace,
    /// The NAT before `idle`.
    pub(crate) idle_nat: Namespace,
    pub(crate) web: Namespace,
    pub(crate) router: Namespace,
    pub(crate) router2: Namespace,
    pub(crate) exit: Namespace,
    pub(crate) corp: Namespace,
    pub(crate) conn: Namespace,
    pub(crate) conn2: Namespace,
    pub(crate) app: Namespace,
}

impl Hosts {
    /// Makes the namespaces and their wires.
    ///
    /// # Errors
    /// With what `ip` or `nft` said.
    pub(crate) fn create() -> Result<Self, Failed> {
        let make = |role| Namespace::create(role, TRAP);
        let hosts = Self {
            wan: make("wan")?,
            client: make("client")?,
            silent: make("silent")?,
            killed: make("killed")?,
            apps: make("apps")?,
            link: make("link")?,
            relayed: make("relayed")?,
            lasting: make("lasting")?,
            idle: make("idle")?,
            idle_nat: make("idle-nat")?,
            web: make("web")?,
            router: make("router")?,
            router2: make("router2")?,
            exit: Namespace::create("exit", EXIT)?,
            corp: make("corp")?,
            conn: Namespace::create("conn", APP_DNS)?,
            conn2: Namespace::create("conn2", APP_DNS)?,
            app: make("app")?,
        };
        hosts.wan.ip(&format!(
            "link add br0 type bridge\naddr add 10.99.0.1/24 dev br0\naddr add 10.99.0.2/24 dev br0\n\
             addr add 10.99.0.3/24 dev br0\naddr add 10.99.0.4/24 dev br0\naddr add 10.99.0.5/24 dev br0\n\
             addr add 10.99.0.6/24 dev br0\n\
             addr add {TRAP}/24 dev br0\nlink set br0 up"
        ))?;
        for (host, last) in [
            (&hosts.client, 21),
            (&hosts.silent, 22),
            (&hosts.killed, 23),
            (&hosts.apps, 24),
            (&hosts.link, 25),
            (&hosts.relayed, 41),
            (&hosts.lasting, 42),
            (&hosts.idle_nat, 43),
            (&hosts.web, 31),
            (&hosts.router, 13),
            (&hosts.conn, 14),
            (&hosts.router2, 15),
            (&hosts.exit, 16),
            (&hosts.conn2, 17),
        ] {
            let port = format!("p{last}");
            cable((host, "eth0"), (&hosts.wan, &port))?;
            hosts.wan.ip(&format!("link set {port} master br0"))?;
            host.ip(&format!("addr add 10.99.0.{last}/24 dev eth0\nroute add default via {TRAP}"))?;
        }
        cable((&hosts.link, "eth1"), (&hosts.wan, "p26"))?;
        hosts.wan.ip("link set p26 master br0")?;
        hosts.forward()?;
        hosts.forgetful_nat()?;
        hosts.lan()?;
        hosts.app_network()?;
        Ok(hosts)
    }

    /// Lets those hosts forward that are to be routers.
    fn forward(&self) -> Result<(), Failed> {
        for host in [&self.router, &self.router2, &self.exit, &self.conn, &self.conn2] {
            host.set("ipv4/ip_forward", "1")?;
            host.set("ipv6/conf/all/forwarding", "1")?;
        }
        Ok(())
    }

    /// The NAT before `idle`.
    fn forgetful_nat(&self) -> Result<(), Failed> {
        let nat = &self.idle_nat;
        nat.set("ipv4/ip_forward", "1")?;
        nat.nft(
            "table ip nat { chain out { type nat hook postrouting priority 100; oifname eth0 masquerade; }; }\n\
             table ip filter { chain through { type filter hook forward priority 0; \
             iifname eth0 ct state new drop; }; }",
        )?;
        for setting in ["nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"] {
            nat.set(&format!("netfilter/{setting}"), "8")?;
        }
        cable((&self.idle, "eth0"), (nat, "lan0"))?;
        nat.ip("addr add 192.168.43.1/24 dev lan0")?;
        self.idle.ip("addr add 192.168.43.2/24 dev eth0\nroute add default via 192.168.43.1")?;
        Ok(())
    }

    /// The LAN behind the routers. `corp` takes every address of its networks, so that one site
    /// serves them all; two of them stay silent.
    fn lan(&self) -> Result<(), Failed> {
        self.corp.ip("link add eth0 type bridge\nlink set eth0 up")?;
        for (router, last) in [(&self.router, 1), (&self.router2, 2)] {
            let port = format!("r{last}");
            cable((router, "corp0"), (&self.corp, &port))?;
            self.corp.ip(&format!("link set {port} master eth0"))?;
            router.ip(&format!(
                "addr add 10.20.0.{last}/24 dev corp0\naddr add fd20::{last}/64 dev corp0 nodad\n\
                 route add 10.21.0.0/24 via 10.20.0.80 onlink dev corp0"
            ))?;
        }
        for last in [53, 54, 55, 80, 99] {
            self.corp.ip(&format!("addr add 10.20.0.{last}/24 dev eth0"))?;
        }
        for last in 128..=250 {
            self.corp.ip(&format!("addr add 10.20.0.{last}/24 dev eth0"))?;
        }
        self.corp.ip("addr add 10.21.0.80/24 dev lo\naddr add fd20::80/64 dev eth0 nodad\n\
             route add default via 10.20.0.1\nroute add default via fd20::1")?;
        self.corp.nft(
            "table inet silent { chain in { type filter hook input priority 0; \
             ip daddr { 10.20.0.54, 10.20.0.99 } drop; }; }",
        )?;
        Ok(())
    }

    /// The network behind the connectors, where `app` has every address.
    fn app_network(&self) -> Result<(), Failed> {
        self.app.ip("link add eth0 type bridge\nlink set eth0 up")?;
        for (connector, last) in [(&self.conn, 1), (&self.conn2, 2)] {
            let port = format!("c{last}");
            cable((connector, "app0"), (&self.app, &port))?;
            self.app.ip(&format!("link set {port} master eth0"))?;
            connector.ip(&format!(
                "addr add 10.30.0.{last}/24 dev app0\naddr add fdaa:1:ffff::{last}/64 dev app0 nodad\n\
                 addr add fdaa:2::{last}/64 dev app0 nodad\nroute add 10.30.1.0/24 via {APP_DNS}\n\
                 route add 10.30.2.0/24 via {APP_DNS}\nroute add fdaa:2:1::/64 via fdaa:2::80"
            ))?;
        }
        let mut lines = format!(
            "addr add {APP_DNS}/24 dev eth0\nroute add local 10.30.1.0/24 dev lo\n\
             route add local 10.30.2.0/24 dev lo\nroute add local fdaa:2:1::/64 dev lo\n"
        );
        for last in 80..=180 {
            lines.push_str(&format!("addr add 10.30.0.{last}/24 dev eth0\n"));
        }
        for last in 80..=99 {
            for network in ["fdaa:1:ffff", "fdaa:2"] {
                lines.push_str(&format!("addr add {network}::{last}/64 dev eth0 nodad\n"));
            }
        }
        self.app.ip(&lines)?;
        Ok(())
    }
}
