//! Batches on their way to the UDP sockets, and those that a full socket did not take.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;

use tracing::trace;

use crate::transport::udp::{SocketError, Udp};

/// Batches that may wait for a full socket; beyond that they are lost, as in any network.
const WAITING_MAX: usize = 256;

/// Datagrams of one size for one destination.
pub(super) struct Batch {
    pub(super) destination: SocketAddr,
    pub(super) contents: Vec<u8>,
    pub(super) segment: usize,
}

/// The way out.
pub(super) struct Outbox {
    udp: Option<Rc<Udp>>,
    waiting: VecDeque<Batch>,
    /// For which socket the driver has been told to wait: IPv4's or IPv6's.
    told: Option<bool>,
    /// Where nothing could be sent to since that was last asked.
    unreachable: BTreeSet<SocketAddr>,
    /// Whether a socket is dead.
    dead: bool,
    /// The families that had a socket at first, IPv4 and IPv6, and whether one of them has none any more.
    families: [bool; 2],
    lacking: bool,
    /// Batches that were lost, by why; at [`SocketError::Full`] too many waited.
    pub(super) lost: BTreeMap<SocketError, u64>,
}

impl Outbox {
    pub(super) fn new(udp: Option<Rc<Udp>>) -> Self {
        let (waiting, unreachable, lost) = (VecDeque::new(), BTreeSet::new(), BTreeMap::new());
        let families = udp.as_deref().map_or([false; 2], families);
        Self { udp, waiting, told: None, unreachable, dead: false, families, lacking: false, lost }
    }

    /// The sockets.
    pub(super) fn udp(&self) -> Option<Rc<Udp>> {
        self.udp.clone()
    }

    /// Where the first batch goes that waits.
    pub(super) fn blocked(&self) -> Option<SocketAddr> {
        self.waiting.front().map(|batch| batch.destination)
    }

    /// Whether batches wait for another socket than at the last call: somebody has to wait for that one then.
    pub(super) fn is_newly_blocked(&mut self) -> bool {
        let socket = self.blocked().map(|destination| destination.is_ipv4());
        let told = std::mem::replace(&mut self.told, socket);
        socket.is_some() && socket != told
    }

    /// Sends a batch, or lets it wait behind those that do. A buffer that is no longer needed comes back.
    pub(super) fn send(&mut self, batch: Batch) -> Option<Vec<u8>> {
        let Some(udp) = &self.udp else { return Some(batch.contents) };
        if !self.waiting.is_empty() {
            return self.wait(batch);
        }
        match udp.send(batch.destination, &batch.contents, batch.segment) {
            Ok(()) => Some(batch.contents),
            Err(SocketError::Full) => self.wait(batch),
            Err(error) => {
                trace!(%error, "datagram not sent");
                self.note(error, batch.destination);
                Some(batch.contents)
            }
        }
    }

    fn note(&mut self, error: SocketError, destination: SocketAddr) {
        *self.lost.entry(error).or_default() += 1;
        match error {
            SocketError::Unreachable => drop(self.unreachable.insert(destination)),
            SocketError::Dead => self.dead = true,
            SocketError::Full | SocketError::Crowded | SocketError::TooLong => {}
        }
    }

    /// Where nothing could be sent to since the last call.
    pub(super) fn take_unreachable(&mut self) -> BTreeSet<SocketAddr> {
        std::mem::take(&mut self.unreachable)
    }

    /// A socket is dead.
    pub(super) fn note_dead(&mut self) {
        self.dead = true;
    }

    /// Whether a socket is dead: it is always ready, and nothing comes of that.
    pub(super) fn is_dead(&self) -> bool {
        self.dead
    }

    /// Whether others must be bound: a socket is dead, or a family lacks one.
    pub(super) fn wants_others(&self) -> bool {
        self.dead || self.lacking
    }

    /// Sends by these from now on, unless those that live lack no more than they do: peers would have to learn of
    /// another port for nothing. Returns whether it does.
    pub(super) fn replace(&mut self, udp: Rc<Udp>) -> bool {
        let lacking = families(&udp).iter().zip(self.families).any(|(has, had)| had && !has);
        if lacking && !self.dead {
            return false;
        }
        (self.udp, self.dead, self.lacking, self.told) = (Some(udp), false, lacking, None);
        true
    }

    fn wait(&mut self, batch: Batch) -> Option<Vec<u8>> {
        if self.waiting.len() < WAITING_MAX {
            self.waiting.push_back(batch);
            return None;
        }
        self.note(SocketError::Full, batch.destination);
        Some(batch.contents)
    }

    /// Sends what waits, as far as the sockets take it; `recycle` gets the buffers.
    pub(super) fn flush(&mut self, mut recycle: impl FnMut(Vec<u8>)) {
        for batch in std::mem::take(&mut self.waiting) {
            self.send(batch).into_iter().for_each(&mut recycle);
        }
    }
}

/// Whether IPv4 and IPv6 have a socket.
fn families(udp: &Udp) -> [bool; 2] {
    let (v4, v6) = udp.ports();
    [v4.is_some(), v6.is_some()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sockets_that_lack_a_family_serve_until_others_have_it() {
        let both = || Rc::new(Udp::bind().unwrap());
        let v4 = || Rc::new(Udp::bind().unwrap().without_v6());
        let mut outbox = Outbox::new(Some(both()));
        outbox.note_dead();
        assert!(outbox.replace(v4()));
        assert!(!outbox.is_dead() && outbox.wants_others());
        let ports = outbox.udp().unwrap().ports();
        assert!(!outbox.replace(v4()));
        assert!(outbox.wants_others() && outbox.udp().unwrap().ports() == ports, "the port of those that live stays");
        assert!(outbox.replace(both()));
        assert!(!outbox.wants_others());
    }

    #[tokio::test]
    async fn a_machine_without_a_family_does_not_want_it() {
        let v4 = || Rc::new(Udp::bind().unwrap().without_v6());
        let mut outbox = Outbox::new(Some(v4()));
        outbox.note_dead();
        assert!(outbox.replace(v4()) && !outbox.wants_others());
    }
}
