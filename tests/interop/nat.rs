//! An internet of its own, with networks of every kind at it: open, behind easy and hard NATs, without UDP, IPv6 only.
//!
//! ```text
//! net      the internet: 203.0.113.254 and 2001:db8::fe route to every network
//! ctl      203.0.113.1, 2001:db8::1   headscale, region 999
//! derp2    203.0.113.2, 2001:db8::2   derper, region 998
//! KIND-a   the network of a client, its NAT at 203.0.113.N and 2001:db8::N: 192.168.N.2, 2001:db8:N::2
//! KIND-b   the same for a peer
//! cone-b   a peer whose NAT is particular about addresses, not ports
//! six-a    has a second way in by eth1, 2001:db8:(100+N)::/64, where it has no address yet
//! easy-a   has a second host for a peer, .3, and a second LAN, 192.168.(100+N).2, whose peer's port is forwarded
//! ```
//! The addresses are from the blocks for documentation, so that none counts as private.

use std::net::IpAddr;

use libtest_mimic::Failed;

use crate::namespace::{Namespace, cable};
use crate::tailscaled::UDP_PORT;

/// The internet's router, the default route of all that are at it.
const ROUTER: &str = "203.0.113.254";
const ROUTER6: &str = "2001:db8::fe";
/// The control server.
pub(crate) const CONTROL: &str = "203.0.113.1";
/// The same by IPv6.
pub(crate) const CONTROL6: &str = "2001:db8::1";
/// The second region.
pub(crate) const DERPER: &str = "203.0.113.2";
/// The same by IPv6.
pub(crate) const DERPER6: &str = "2001:db8::2";

/// What a network lets through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A public IPv4 address, and no filter.
    Open,
    /// An IPv4 NAT that maps a port to the same one for every destination.
    Easy,
    /// An IPv4 NAT that maps to another port for each destination.
    Hard,
    /// An IPv4 NAT that maps like an easy one and lets in whatever comes from an address that was sent to, by any port.
    Cone,
    /// An IPv4 NAT through which no datagram comes.
    Blocked,
    /// An easy IPv4 NAT, and IPv6 behind a firewall that lets only answers in.
    Dual,
    /// The same without IPv4.
    Six,
}

impl Kind {
    /// Those that are tried with each other, in the table's order.
    pub(crate) const ALL: [Self; 6] = [Self::Open, Self::Easy, Self::Hard, Self::Blocked, Self::Dual, Self::Six];

    /// What the table calls it, and hosts' names begin with.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Easy => "easy",
            Self::Hard => "hard",
            Self::Cone => "cone",
            Self::Blocked => "blocked",
            Self::Dual => "dual",
            Self::Six => "six",
        }
    }

    /// Whether its hosts have IPv4, and IPv6.
    const fn families(self) -> (bool, bool) {
        match self {
            Self::Open | Self::Easy | Self::Hard | Self::Cone | Self::Blocked => (true, false),
            Self::Dual => (true, true),
            Self::Six => (false, true),
        }
    }

    /// The rules of its router. It takes no datagram itself: one that it answered would be a connection of its own, and
    /// keep the mapping from the port that a host behind it is about to use.
    fn rules(self) -> String {
        let random = if self == Self::Hard { " random" } else { "" };
        let blocked = if self == Self::Blocked { "meta l4proto udp drop\n" } else { "" };
        format!(
            "table ip nat {{\n chain out {{ type nat hook postrouting priority 100;\n oifname wan0 masquerade{random}\n }}\n\
             chain in {{ type nat hook prerouting priority -100;\n }}\n }}\n\
             table inet filter {{\n chain through {{ type filter hook forward priority 0;\n {blocked}\
             iifname wan0 ct state new drop\n }}\n\
             chain own {{ type filter hook input priority 0;\n iifname wan0 meta l4proto udp drop\n }}\n }}\n"
        )
    }

    /// How datagrams get from a host in this kind of network to one in another, if they do.
    pub(crate) fn way_to(self, other: Self) -> Way {
        let (ours, theirs) = (self.families(), other.families());
        let hard = |one: Self, other: Self| one == Self::Hard && !matches!(other, Self::Open | Self::Cone);
        match () {
            () if self == Self::Blocked || other == Self::Blocked => Way::Relayed,
            () if ours.1 && theirs.1 => Way::DirectV6,
            () if !(ours.0 && theirs.0) || hard(self, other) || hard(other, self) => Way::Relayed,
            () => Way::DirectV4,
        }
    }
}

/// How packets go between two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// By a DERP region.
    Relayed,
    /// Directly by IPv4.
    DirectV4,
    /// Directly by IPv6.
    DirectV6,
}

impl Way {
    /// The way of an address that a node sends to; `None` for a relay.
    pub(crate) fn of(path: Option<std::net::SocketAddr>) -> Self {
        path.map_or(Self::Relayed, |path| if path.is_ipv6() { Self::DirectV6 } else { Self::DirectV4 })
    }

    /// What the table calls it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Relayed => "relay",
            Self::DirectV4 => "direct v4",
            Self::DirectV6 => "direct v6",
        }
    }
}

/// A network: its host, and its router if it has one.
pub(crate) struct Network {
    pub(crate) kind: Kind,
    pub(crate) host: Namespace,
    pub(crate) router: Option<Namespace>,
    number: u8,
}

/// All of them.
pub(crate) struct Internet {
    pub(crate) control: Namespace,
    pub(crate) derper: Namespace,
    /// A network of each kind for clients.
    pub(crate) clients: Vec<Network>,
    /// A network of each kind for peers, in the same order; then the cone's.
    pub(crate) peers: Vec<Network>,
    /// In the LAN of the easy client.
    pub(crate) neighbour: Namespace,
    /// Behind the NAT of the easy client, in another LAN, with a forwarded port.
    pub(crate) forwarded: Namespace,
    net: Namespace,
}

impl Internet {
    /// Makes the namespaces and their wires.
    ///
    /// # Errors
    /// With what `ip` or `nft` said.
    pub(crate) fn create() -> Result<Self, Failed> {
        let make = |role: &str| Namespace::create(role, ROUTER);
        let net = make("net")?;
        forward(&net)?;
        net.set("ipv4/conf/all/send_redirects", "0")?;
        net.ip(&format!(
            "link add br0 type bridge\nlink set br0 up\naddr add {ROUTER}/24 dev br0\n\
             addr add {ROUTER6}/64 dev br0 nodad"
        ))?;
        let mut internet = Self {
            control: make("ctl")?,
            derper: make("derp2")?,
            clients: Vec::new(),
            peers: Vec::new(),
            neighbour: make("easy-a3")?,
            forwarded: make("easy-a4")?,
            net,
        };
        internet.attach(&internet.control, 1, (true, true))?;
        internet.attach(&internet.derper, 2, (true, true))?;
        for (index, kind) in (10_u8..).zip(Kind::ALL) {
            let client = internet.network(kind, "a", index)?;
            internet.clients.push(client);
            let peer = internet.network(kind, "b", index + 10)?;
            internet.peers.push(peer);
        }
        let cone = internet.network(Kind::Cone, "b", 30)?;
        internet.peers.push(cone);
        internet.neighbours()?;
        internet.second_link()?;
        Ok(internet)
    }

    /// Plugs a host into the internet.
    fn attach(&self, host: &Namespace, number: u8, (v4, v6): (bool, bool)) -> Result<(), Failed> {
        let port = format!("p{number}");
        cable((host, "wan0"), (&self.net, &port))?;
        self.net.ip(&format!("link set {port} master br0"))?;
        if v4 {
            host.ip(&format!("addr add 203.0.113.{number}/24 dev wan0\nroute add default via {ROUTER}"))?;
        }
        if v6 {
            host.ip(&format!("addr add 2001:db8::{number}/64 dev wan0 nodad\nroute add default via {ROUTER6}"))?;
        }
        Ok(())
    }

    fn network(&self, kind: Kind, side: &str, number: u8) -> Result<Network, Failed> {
        let name = format!("{}-{side}", kind.name());
        let host = Namespace::create(&name, ROUTER)?;
        if kind == Kind::Open {
            self.attach(&host, number, kind.families())?;
            return Ok(Network { kind, host, router: None, number });
        }
        let router = Namespace::create(&format!("{name}-nat"), ROUTER)?;
        forward(&router)?;
        self.attach(&router, number, kind.families())?;
        router.nft(&kind.rules())?;
        if kind == Kind::Cone {
            router.nft(&format!(
                "add set ip nat met {{ type ipv4_addr; flags dynamic,timeout; timeout 1m; size 1024; }}\n\
                 insert rule ip nat out oifname wan0 meta l4proto udp add @met {{ ip daddr }}\n\
                 add rule ip nat in iifname wan0 ip saddr @met udp dport {UDP_PORT} dnat to 192.168.{number}.2\n\
                 insert rule inet filter through ct status dnat accept\n"
            ))?;
        }
        let network = Network { kind, host, router: Some(router), number };
        network.lan("lan0", &network.host, number, 2)?;
        if kind.families().1 {
            self.net.ip(&format!("route add 2001:db8:{number}::/64 via 2001:db8::{number}"))?;
        }
        Ok(network)
    }

    /// The easy client's neighbour in its LAN, and the host in the LAN beside it: what goes from one LAN to the other
    /// must go by the forwarded port.
    fn neighbours(&self) -> Result<(), Failed> {
        let easy = self.clients.iter().find(|network| network.kind == Kind::Easy).ok_or("no easy client")?;
        let (Some(router), number) = (&easy.router, easy.number) else { return Err("no easy router".into()) };
        easy.lan("lan1", &self.neighbour, number, 3)?;
        easy.lan("lan2", &self.forwarded, number + 100, 2)?;
        // One LAN of two cables.
        router.ip(&format!(
            "addr del 192.168.{number}.1/24 dev lan0\naddr del 192.168.{number}.1/24 dev lan1\n\
             link add lan type bridge\nlink set lan0 master lan\nlink set lan1 master lan\nlink set lan up\n\
             addr add 192.168.{number}.1/24 dev lan"
        ))?;
        let port = UDP_PORT;
        router.nft(&format!(
            "add rule ip nat in ip daddr 203.0.113.{number} udp dport {port} dnat to 192.168.{}.2\n\
             insert rule inet filter through ct status dnat accept\n\
             add rule inet filter through iifname lan oifname lan2 ct state new drop\n\
             add rule inet filter through iifname lan2 oifname lan ct state new drop\n",
            number + 100
        ))?;
        Ok(())
    }

    /// The IPv6 client's other way in.
    fn second_link(&self) -> Result<(), Failed> {
        let six = self.clients.iter().find(|network| network.kind == Kind::Six).ok_or("no IPv6 client")?;
        let (Some(router), lan) = (&six.router, six.lan6(1)) else { return Err("no IPv6 router".into()) };
        cable((&six.host, "eth1"), (router, "lan1"))?;
        router.ip(&format!("addr add {lan}:1/64 dev lan1 nodad"))?;
        self.net.ip(&format!("route add {lan}:/64 via 2001:db8::{}", six.number))?;
        Ok(())
    }
}

impl Network {
    /// Numbers the host as a carrier does, or as before: an address of the range that tailnets have theirs from. IPv6 stays.
    ///
    /// # Errors
    /// With what `ip` said.
    pub(crate) fn number_like_a_carrier(&self, like: bool) -> Result<(), Failed> {
        let Some(router) = &self.router else { return Err("an open network has no LAN".into()) };
        let (own, carrier) = (format!("192.168.{}", self.number), "100.64.0".to_owned());
        let (from, to) = if like { (own, carrier) } else { (carrier, own) };
        router.ip(&format!("addr del {from}.1/24 dev lan0\naddr add {to}.1/24 dev lan0"))?;
        self.host.ip(&format!(
            "addr del {from}.2/24 dev eth0\naddr add {to}.2/24 dev eth0\nroute replace default via {to}.1 dev eth0"
        ))?;
        Ok(())
    }

    /// What the addresses of one of its LANs begin with: that of `eth0`, or the next. A colon and the host follow.
    pub(crate) fn lan6(&self, link: u8) -> String {
        format!("2001:db8:{}:", self.number + 100 * link)
    }

    /// Gives the NAT another address on the internet, or its own again: it forgets all mappings. The new address.
    ///
    /// # Errors
    /// With what `ip` said.
    pub(crate) fn renumber(&self, away: bool) -> Result<IpAddr, Failed> {
        let Some(router) = &self.router else { return Err("an open network has no NAT".into()) };
        let (own, other) = (self.number, self.number + 100);
        let (from, to) = if away { (own, other) } else { (other, own) };
        router.ip(&format!(
            "addr del 203.0.113.{from}/24 dev wan0\naddr add 203.0.113.{to}/24 dev wan0\n\
             route add default via {ROUTER}"
        ))?;
        Ok([203, 0, 113, to].into())
    }

    /// Has the NAT forget all connections.
    ///
    /// # Errors
    /// When there is none, and with what the kernel said.
    pub(crate) fn forget(&self) -> Result<(), Failed> {
        let Some(router) = &self.router else { return Err("an open network has no NAT".into()) };
        Ok(router.forget_connections()?)
    }

    /// Has a cone let in nobody until the host behind it sends to him again.
    ///
    /// # Errors
    /// With what `nft` said.
    pub(crate) fn forget_met(&self) -> Result<(), Failed> {
        match self.router.as_ref().filter(|_| self.kind == Kind::Cone) {
            Some(router) => Ok(router.nft("flush set ip nat met")?),
            None => Ok(()),
        }
    }

    /// Plugs a host into the router.
    fn lan(&self, device: &str, host: &Namespace, number: u8, last: u8) -> Result<(), Failed> {
        let Some(router) = &self.router else { return Err("an open network has no LAN".into()) };
        let (v4, v6) = self.kind.families();
        cable((host, "eth0"), (router, device))?;
        if v4 {
            router.ip(&format!("addr add 192.168.{number}.1/24 dev {device}"))?;
            host.ip(&format!(
                "addr add 192.168.{number}.{last}/24 dev eth0\nroute add default via 192.168.{number}.1"
            ))?;
        }
        if v6 {
            router.ip(&format!("addr add 2001:db8:{number}::1/64 dev {device} nodad"))?;
            host.ip(&format!(
                "addr add 2001:db8:{number}::{last}/64 dev eth0 nodad\nroute add default via 2001:db8:{number}::1"
            ))?;
        }
        Ok(())
    }
}

fn forward(host: &Namespace) -> Result<(), Failed> {
    host.set("ipv4/ip_forward", "1")?;
    host.set("ipv6/conf/all/forwarding", "1")?;
    Ok(())
}
