//! What a namespace's kernel remembers of connections, and thus what a NAT in it has mapped.
//!
//! By ctnetlink, as `conntrack` would: not every kernel shows `/proc/net/nf_conntrack`.
//!
//! Source: linux/netfilter/nfnetlink_conntrack.h, and linux/netlink.h for the messages.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, recv, sendto, socket};

use crate::namespace::Namespace;

/// A message's header, and with it the `nfgenmsg` that comes before all attributes.
const HEADER: usize = 16;
const HEADERS: usize = 20;
/// `NLMSG_ERROR` and `NLMSG_DONE`.
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// How long the kernel may take for each answer.
const ANSWER: Duration = Duration::from_secs(5);
/// UDP's number. Source: RFC 768.
const UDP: &[u8] = &[17];

/// A UDP connection through a NAT, by the packets that come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Who sends them.
    pub(crate) peer: SocketAddr,
    /// The NAT's address and port, to which they go.
    pub(crate) mapped: SocketAddr,
}

impl Namespace {
    /// Forgets all tracked connections, as `conntrack -F` would.
    ///
    /// # Errors
    /// With what the kernel said.
    pub(crate) fn forget_connections(&self) -> io::Result<()> {
        // `IPCTNL_MSG_CT_DELETE` with `NLM_F_REQUEST | NLM_F_ACK`, and an empty `nfgenmsg`: all of them.
        self.conntrack(0x0102, 0x1 | 0x4, |kind, body| match (kind, body) {
            (ERROR, _) => Ok(true),
            _ => Err(io::Error::other("the kernel answers otherwise than by an error's number")),
        })
    }

    /// The UDP connections by IPv4 that are tracked; those whose time is over are not among them.
    ///
    /// # Errors
    /// With what the kernel said.
    pub(crate) fn mappings(&self) -> io::Result<Vec<Mapping>> {
        let mut found = Vec::new();
        // `IPCTNL_MSG_CT_GET` with `NLM_F_REQUEST | NLM_F_DUMP`.
        self.conntrack(0x0101, 0x1 | 0x300, |kind, body| {
            found.extend(body.get(HEADERS - HEADER..).and_then(mapping));
            Ok(kind == DONE)
        })?;
        Ok(found)
    }

    /// Sends a request without attributes, and hands over the answers, each by type and body, until one is the last.
    fn conntrack(
        &self,
        kind: u16,
        flags: u16,
        mut answered: impl FnMut(u16, &[u8]) -> io::Result<bool> + Send,
    ) -> io::Result<()> {
        let mut request = 20_u32.to_ne_bytes().to_vec();
        request.extend([kind, flags].map(u16::to_ne_bytes).concat());
        request.resize(HEADERS, 0);
        self.inside(|| {
            let socket = socket(AddressFamily::NETLINK, SocketType::RAW, Some(netlink::NETFILTER))?;
            set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER))?;
            sendto(&socket, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
            let mut buffer = vec![0; 64 << 10];
            loop {
                let (length, _) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
                let mut rest = &buffer[..length];
                while let Some((kind, body, next)) = message(rest) {
                    // A negative errno comes first.
                    let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    if kind == ERROR && code != 0 {
                        return Err(io::Error::from_raw_os_error(-code));
                    }
                    if answered(kind, body)? {
                        return Ok(());
                    }
                    rest = next;
                }
            }
        })?
    }
}

/// The first message's type and body, and what follows it.
fn message(octets: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(*octets.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(*octets.get(4..)?.first_chunk()?);
    let next = octets.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, octets.get(HEADER..length)?, next))
}

/// `CTA_TUPLE_REPLY` of a connection, if that is by UDP and IPv4.
fn mapping(attributes: &[u8]) -> Option<Mapping> {
    let reply = attribute(attributes, 2)?;
    // `CTA_TUPLE_IP` and `CTA_TUPLE_PROTO`.
    let (ip, proto) = (attribute(reply, 1)?, attribute(reply, 2)?);
    if attribute(proto, 1)? != UDP {
        return None;
    }
    // Source and destination: `CTA_IP_V4_SRC` and on, `CTA_PROTO_SRC_PORT` and on.
    let end = |address, port| -> Option<SocketAddr> {
        let address = Ipv4Addr::from(*attribute(ip, address)?.first_chunk::<4>()?);
        Some((address, u16::from_be_bytes(*attribute(proto, port)?.first_chunk()?)).into())
    };
    Some(Mapping { peer: end(1, 2)?, mapped: end(2, 3)? })
}

/// What an attribute of that type holds. Two bits of a type say how to read it.
fn attribute(mut octets: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(*octets.first_chunk()?));
        let kind = u16::from_ne_bytes(*octets.get(2..)?.first_chunk()?) & 0x3fff;
        let value = octets.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        octets = octets.get(length.next_multiple_of(4)..)?;
    }
}
