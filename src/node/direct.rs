//! Connections outside the tailnet, for hosts that `--direct-allow` names and for no others.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::time::timeout_at;
use tracing::{debug, info};

use super::Inner;
use super::client::{end_by_reset, end_in_peace, has_reset, vanished};
use super::dial::{DialError, DirectError, DirectRule, Host, NEXT_ADDRESS, Target, is_public};
use super::error::{ResolveError, is_near};
use super::stream::{Carried, Ended};
use crate::transport::race::race;

/// Dials `addresses`, as [`addresses`] gave them, on the underlay until `deadline`. Only [`dial`](super::dial::dial) may
/// call it, after a rule of the user's has matched and nobody in the tailnet knew the host.
pub(super) async fn connect(
    node: &Inner,
    addresses: Vec<SocketAddr>,
    deadline: Instant,
) -> Result<TcpStream, DialError> {
    let attempts = addresses.into_iter().map(|address| async move {
        // A later address waits for its turn, and may have become the tailnet's meanwhile.
        if !is_public_now(node, address) {
            return Err(DialError::Public { host: Host::Ip(address.ip()) });
        }
        match timeout_at(deadline.into(), TcpStream::connect(address)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                Err(DirectError::Refused { address }.into())
            }
            Ok(Err(error)) => Err(DirectError::Failed { address, detail: error.to_string() }.into()),
            Err(_) => Err(DirectError::Silent { address }.into()),
        }
    });
    match race(attempts, NEXT_ADDRESS).await {
        Ok(stream) => {
            // Small messages must not wait for an ACK; without the option they are only later.
            let _ = stream.set_nodelay(true);
            Ok(stream)
        }
        Err(failures) => {
            Err(failures.into_iter().next().expect("there is at least one address, and each one's failure is kept"))
        }
    }
}

/// Destinations counted by themselves; those beyond are counted together.
const DESTINATIONS: usize = 1_000;
/// Under what those are counted.
const OTHERS: &str = "others";

/// What left the tailnet: each host and port, and how often it was dialled.
#[derive(Debug, Default)]
pub(super) struct Outside {
    destinations: BTreeMap<String, u64>,
    hosts: HashSet<Host>,
}

impl Outside {
    /// Counts a dial that `rule` lets out; says so once a host, by the rule: hosts are not for every log.
    pub(super) fn note(&mut self, target: &Target, rule: &DirectRule) {
        debug!(%target, "dialled outside the tailnet");
        if self.hosts.len() < DESTINATIONS && self.hosts.insert(target.host.clone()) {
            info!(%rule, port = target.port, "a host is dialled outside the tailnet, as --direct-allow permits");
        }
        let destination = target.to_string();
        let known = self.destinations.len() < DESTINATIONS || self.destinations.contains_key(&destination);
        *self.destinations.entry(if known { destination } else { OTHERS.to_owned() }).or_default() += 1;
    }

    /// Dials by `host:port`.
    pub(super) fn destinations(&self) -> &BTreeMap<String, u64> {
        &self.destinations
    }
}

/// The target's addresses outside the tailnet, by the machine's own resolver where it is a name; at least one. They are
/// nobody's word if the tailnet has come to decide the name meanwhile, and an address that is the tailnet's by the newest
/// netmap is nothing for the underlay, whatever name points to it.
pub(super) async fn addresses(node: &Inner, target: &Target, deadline: Instant) -> Result<Vec<SocketAddr>, DialError> {
    let found = match &target.host {
        Host::Ip(ip) => vec![SocketAddr::new(*ip, target.port)],
        Host::Name(name) => look_up(node, name, target.port, deadline).await?,
    };
    let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let public: Vec<_> = found.into_iter().map(canonical).filter(|address| is_public_now(node, *address)).collect();
    if public.is_empty() { Err(DialError::Public { host: target.host.clone() }) } else { Ok(public) }
}

async fn look_up(node: &Inner, name: &str, port: u16, deadline: Instant) -> Result<Vec<SocketAddr>, DialError> {
    let (name, resolver) = (name.to_owned(), "the machine's own resolver".to_owned());
    let limit = deadline.saturating_duration_since(Instant::now());
    let found = timeout_at(deadline.into(), tokio::net::lookup_host((name.clone(), port))).await;
    let newest = node.netmap.borrow().clone();
    if let Some(newest) = newest
        && !node.resolvers.is_outside(&newest, &name)?
    {
        let detail = "the tailnet decides the name by now".to_owned();
        return Err(ResolveError::Unreachable { name, resolver, detail }.into());
    }
    match found {
        Ok(Ok(found)) => Ok(found.filter(|address| may_mean(&node.config.direct_allow, &name, address.ip())).collect()),
        Ok(Err(error)) => Err(ResolveError::Failed { name, resolver, rcode: error.to_string() }.into()),
        Err(_) => Err(ResolveError::Silent { name, resolver, limit }.into()),
    }
}

/// Whether an address is nothing of the tailnet's by the newest netmap.
fn is_public_now(node: &Inner, address: SocketAddr) -> bool {
    node.netmap.borrow().as_ref().is_some_and(|netmap| is_public(netmap, address.ip()))
}

/// Whether a name may mean this address. One under a suffix means this machine or its link (where clouds keep their
/// metadata) only if a rule allows the address too: whoever writes the suffix's records is not the user.
fn may_mean(rules: &[DirectRule], name: &str, address: IpAddr) -> bool {
    let address = address.to_canonical();
    let (named, given) = (Host::Name(name.to_owned()), Host::Ip(address));
    let exact = |rule: &DirectRule| matches!(rule, DirectRule::Name(_)) && rule.allows(&named);
    !is_near(address) || rules.iter().any(|rule| exact(rule) || rule.allows(&given))
}

/// Bytes read at once. Two such buffers live as long as a direct connection; the kernel backs only what was touched.
const CHUNK: usize = 32 * 1024;

/// Which side of a splice a failure came from.
enum Side {
    Client,
    Target,
}

/// See [`Stream::splice`](super::Stream::splice); a target outside fails or ends like one inside.
pub(super) async fn splice(
    mut target: TcpStream,
    mut client: TcpStream,
    early: &[u8],
    carried: &Carried,
) -> io::Result<Ended> {
    let answered = Notify::new();
    // Whatever ends this in the middle, neither side shall take a part for the whole.
    end_by_reset(&client);
    end_by_reset(&target);
    let ended = {
        let (mut from_client, mut to_client) = client.split();
        let (mut from_target, mut to_target) = target.split();
        let outward = async {
            write_for(from_client.as_ref(), &mut to_target, early).await?;
            carried.add_sent(early.len());
            if !early.is_empty() {
                carried.note_moved(Instant::now());
            }
            carry(Side::Client, &mut from_client, &mut to_target, carried).await?;
            // What a client sent to its end arrives, whether or not it waits for the answer.
            end_in_peace(to_target.as_ref());
            tokio::select! {
                () = vanished(from_client.as_ref()) => Err((Side::Client, io::ErrorKind::ConnectionReset.into())),
                () = answered.notified() => Ok(()),
            }
        };
        let inward = async {
            carry(Side::Target, &mut from_target, &mut to_client, carried).await?;
            // The answer is whole from here on, much of it perhaps still in the kernel: no end may purge that.
            end_in_peace(to_client.as_ref());
            answered.notify_one();
            Ok(())
        };
        tokio::try_join!(outward, inward)
    };
    match ended {
        Ok(_) => Ok(Ended::Closed),
        Err((Side::Target, _)) => Ok(Ended::Reset),
        Err((Side::Client, error)) => Err(error),
    }
}

/// One direction, from that side until it has ended; its end is passed on.
async fn carry(
    reading: Side,
    from: &mut ReadHalf<'_>,
    to: &mut WriteHalf<'_>,
    carried: &Carried,
) -> Result<(), (Side, io::Error)> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = match from.read(&mut buffer).await {
            Ok(length) => length,
            Err(error) => return Err((reading, error)),
        };
        if length == 0 {
            // The other side may be gone already; its own direction tells so.
            let _ = to.shutdown().await;
            return Ok(());
        }
        match reading {
            Side::Client => {
                write_for(from.as_ref(), to, &buffer[..length]).await?;
                carried.add_sent(length);
                carried.note_moved(Instant::now());
            }
            Side::Target => {
                to.write_all(&buffer[..length]).await.map_err(|error| (Side::Client, error))?;
                carried.add_received(length);
                carried.note_moved(Instant::now());
            }
        }
    }
}

/// Writes to the target, unless the client resets its connection meanwhile: while the target takes nothing, nobody reads
/// what the client sends.
async fn write_for(client: &TcpStream, target: &mut WriteHalf<'_>, octets: &[u8]) -> Result<(), (Side, io::Error)> {
    tokio::select! {
        biased;
        written = target.write_all(octets) => written.map_err(|error| (Side::Target, error)),
        () = has_reset(client) => Err((Side::Client, io::ErrorKind::ConnectionReset.into())),
    }
}

#[cfg(test)]
mod tests;
