//! What a client wants to reach, and what the user lets out of the tailnet.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

/// A host as a client names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// A DNS name, as given.
    Name(String),
    /// An address.
    Ip(IpAddr),
}

/// What a client wants to reach.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// The host.
    pub host: Host,
    /// The TCP port.
    pub port: u16,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Ip(IpAddr::V4(ip)) => write!(f, "{ip}"),
            Self::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// A destination that the user lets out of the tailnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DirectRule {
    /// This name alone, lower case, without trailing dot.
    Name(String),
    /// Every name below this suffix, given as `*.suffix`; not the suffix itself.
    Suffix(String),
    /// Addresses inside this prefix.
    Net(IpNet),
}

impl fmt::Display for DirectRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Suffix(suffix) => write!(f, "*.{suffix}"),
            Self::Net(net) => net.fmt(f),
        }
    }
}

impl DirectRule {
    /// Whether the rule lets `host` out.
    pub fn allows(&self, host: &Host) -> bool {
        match (self, host) {
            (Self::Name(rule), Host::Name(name)) => name.trim_end_matches('.').eq_ignore_ascii_case(rule),
            (Self::Suffix(rule), Host::Name(name)) => {
                let name = name.trim_end_matches('.').to_ascii_lowercase();
                name.strip_suffix(rule.as_str()).is_some_and(|head| head.len() > 1 && head.ends_with('.'))
            }
            (Self::Net(net), Host::Ip(ip)) => net.contains(&ip.to_canonical()),
            (Self::Name(_) | Self::Suffix(_), Host::Ip(_)) | (Self::Net(_), Host::Name(_)) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(text: &str) -> Host {
        text.parse().map_or_else(|_| Host::Name(text.to_owned()), Host::Ip)
    }

    #[test]
    fn a_direct_rule_lets_out_what_it_names_and_no_more() {
        let name = DirectRule::Name("cdn.example".into());
        assert!(name.allows(&host("CDN.example.")) && !name.allows(&host("x.cdn.example")));
        let suffix = DirectRule::Suffix("example".into());
        assert!(suffix.allows(&host("a.example")) && suffix.allows(&host("a.b.EXAMPLE")));
        assert!(
            !suffix.allows(&host("example"))
                && !suffix.allows(&host("badexample"))
                && !suffix.allows(&host(".example"))
        );
        let net = DirectRule::Net("192.0.2.0/24".parse().unwrap());
        assert!(
            net.allows(&host("::ffff:192.0.2.9"))
                && !DirectRule::Net("::/0".parse().unwrap()).allows(&host("::ffff:1.2.3.4"))
        );
        assert!(net.allows(&host("192.0.2.9")) && !net.allows(&host("192.0.3.9")) && !net.allows(&host("a.example")));
    }

    #[test]
    fn targets_print_as_authorities() {
        assert_eq!(Target { host: host("::1"), port: 80 }.to_string(), "[::1]:80");
        assert_eq!(Target { host: host("a.example"), port: 443 }.to_string(), "a.example:443");
    }
}
