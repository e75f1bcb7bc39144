//! Who may use the proxy, and what it will not be led into: credentials, loops, the number of connections.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;
use zeroize::Zeroizing;

use crate::node::{Host, Target};

/// The user and password that clients must show. Only a keyed digest of them is kept, which is also what makes the
/// comparison take the same time wherever two passwords begin to differ.
pub struct Credentials {
    key: hmac::Key,
    tag: hmac::Tag,
}

impl Credentials {
    /// Keeps the digest of `user` and `password`. RFC 1929 lets a client send 1 to 255 bytes of each.
    pub fn new(user: &str, password: &str) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &rand::random::<[u8; 32]>());
        let tag = hmac::sign(&key, &joined(user.as_bytes(), password.as_bytes()));
        Self { key, tag }
    }

    /// Whether the pair is the right one.
    pub fn admit(&self, user: &[u8], password: &[u8]) -> bool {
        hmac::verify(&self.key, &joined(user, password), self.tag.as_ref()).is_ok()
    }

    /// Whether a `Proxy-Authorization` value is the right one, in the Basic scheme (RFC 7617).
    pub(super) fn admit_basic(&self, value: &[u8]) -> bool {
        let Some((scheme, encoded)) = value.split_at_checked(6) else { return false };
        if !scheme.eq_ignore_ascii_case(b"basic ") {
            return false;
        }
        let Ok(pair) = STANDARD.decode(encoded.trim_ascii()).map(Zeroizing::new) else { return false };
        let Some(colon) = pair.iter().position(|&byte| byte == b':') else { return false };
        self.admit(&pair[..colon], &pair[colon + 1..])
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}

/// User and password as one message, the first with its length, so that no two pairs give the same.
fn joined(user: &[u8], password: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut message = Zeroizing::new(Vec::with_capacity(8 + user.len() + password.len()));
    message.extend_from_slice(&(user.len() as u64).to_be_bytes());
    message.extend_from_slice(user);
    message.extend_from_slice(password);
    message
}

/// The addresses that we listen on for connections, or take datagrams at.
#[derive(Debug)]
pub(super) struct OwnListeners(Vec<SocketAddr>);

impl OwnListeners {
    pub(super) fn new(addresses: Vec<SocketAddr>) -> Self {
        Self(addresses)
    }

    /// One more.
    pub(super) fn insert(&mut self, address: SocketAddr) {
        self.0.push(address);
    }

    /// One less.
    pub(super) fn remove(&mut self, address: SocketAddr) {
        self.0.retain(|own| *own != address);
    }

    /// Whether what is sent to `target` from this machine would come back to us.
    pub(super) fn contains(&self, target: &Target) -> bool {
        let local = match &target.host {
            Host::Ip(ip) => ip.to_canonical(),
            Host::Name(name) if is_localhost(name) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Host::Name(_) => return false,
        };
        self.0.iter().filter(|own| own.port() == target.port).any(|own| reaches(local, own.ip().to_canonical()))
    }
}

/// `localhost` and everything below it is loopback. Source: RFC 6761, 6.3.
fn is_localhost(name: &str) -> bool {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost")
}

/// Whether dialling `ip` on this machine reaches a listener bound to `own`. Any loopback address counts for any other:
/// `127.0.0.1` and `::1` are told apart by the kernel, but whoever asks for one means this machine. So does whoever
/// asks for no address in particular, wherever we listen.
fn reaches(ip: IpAddr, own: IpAddr) -> bool {
    ip == own || ip.is_unspecified() || ip.is_loopback() && (own.is_loopback() || own.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(host: &str, port: u16) -> Target {
        let host = host.parse().map_or_else(|_| Host::Name(host.to_owned()), Host::Ip);
        Target { host, port }
    }

    #[test]
    fn credentials_admit_their_own_pair_only() {
        let credentials = Credentials::new("ab", "c");
        assert!(credentials.admit(b"ab", b"c"));
        for (user, password) in [("a", "bc"), ("ab", "d"), ("", "abc"), ("ab", "")] {
            assert!(!credentials.admit(user.as_bytes(), password.as_bytes()), "{user} {password}");
        }
        assert_eq!(format!("{credentials:?}"), "Credentials(..)");
    }

    #[test]
    fn basic_takes_any_case_of_the_scheme_and_colons_in_passwords() {
        let credentials = Credentials::new("user", "a:b");
        for value in ["Basic dXNlcjphOmI=", "basic dXNlcjphOmI="] {
            assert!(credentials.admit_basic(value.as_bytes()), "{value}");
        }
        for value in ["", "Basic", "Basic ", "Basic !!!", "Bearer dXNlcjphOmI=", "Basic dXNlcg=="] {
            assert!(!credentials.admit_basic(value.as_bytes()), "{value}");
        }
    }

    #[test]
    fn own_listener_is_recognized_by_every_name_of_this_machine() {
        let own = OwnListeners::new(vec!["127.0.0.1:8080".parse().unwrap()]);
        for host in ["127.0.0.1", "127.0.0.9", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1", "LocalHost.", "a.localhost"]
        {
            assert!(own.contains(&target(host, 8080)), "{host}");
            assert!(!own.contains(&target(host, 8081)), "{host}");
        }
        let elsewhere = OwnListeners::new(vec!["[::ffff:10.0.0.1]:8080".parse().unwrap()]);
        for host in ["0.0.0.0", "::", "::ffff:0.0.0.0", "10.0.0.1", "::ffff:10.0.0.1"] {
            assert!(elsewhere.contains(&target(host, 8080)), "{host}");
        }
        assert!(!elsewhere.contains(&target("127.0.0.1", 8080)));
        assert!(!own.contains(&target("10.0.0.1", 8080)));
        assert!(!own.contains(&target("localhost.corp", 8080)));
    }
}
