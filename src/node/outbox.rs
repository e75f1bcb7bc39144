//! Batches on their way to the UDP sockets, and those that a full socket did not take.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use tracing::trace;

use crate::transport::udp::Udp;

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
    /// Batches that were lost: the operating system refused their destination, or too many waited.
    pub(super) lost: u64,
}

impl Outbox {
    pub(super) fn new(udp: Option<Rc<Udp>>) -> Self {
        Self { udp, waiting: VecDeque::new(), told: None, lost: 0 }
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
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(batch),
            Err(error) => {
                trace!(%error, "datagram not sent");
                self.lost += 1;
                Some(batch.contents)
            }
        }
    }

    fn wait(&mut self, batch: Batch) -> Option<Vec<u8>> {
        if self.waiting.len() < WAITING_MAX {
            self.waiting.push_back(batch);
            return None;
        }
        self.lost += 1;
        Some(batch.contents)
    }

    /// Sends what waits, as far as the sockets take it; `recycle` gets the buffers.
    pub(super) fn flush(&mut self, mut recycle: impl FnMut(Vec<u8>)) {
        for batch in std::mem::take(&mut self.waiting) {
            self.send(batch).into_iter().for_each(&mut recycle);
        }
    }
}
