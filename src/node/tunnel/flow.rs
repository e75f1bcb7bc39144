//! A UDP flow inside the tunnel, as the data thread sees it.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::Poll;
use std::time::Instant;

use super::super::core::Shared;
use super::Handle;
use crate::netstack::{self, OpenError};

/// Why a flow was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::node) enum Unopened {
    /// We have no address of that family.
    Family,
    /// Nothing can be at that address, or at port 0.
    Unaddressable,
    /// No local port is free.
    Ports,
    /// No memory is left for its rings.
    Memory,
}

impl From<OpenError> for Unopened {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::PortsExhausted => Self::Ports,
            OpenError::Unaddressable => Self::Unaddressable,
            OpenError::Memory(_) => Self::Memory,
        }
    }
}

/// Why a datagram was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::node) enum Unsent {
    /// It is longer than a packet inside the tunnel may be, and nothing is fragmented there.
    TooLong,
    /// The flow's ring is full, or the flow is gone.
    NoRoom,
}

/// A UDP flow inside the tunnel.
#[derive(Clone)]
pub(in crate::node) struct TunnelDatagrams {
    handle: Rc<Handle>,
}

impl TunnelDatagrams {
    /// Opens a flow to `remote`; nobody is asked.
    pub(in crate::node) fn open(core: &Shared, remote: SocketAddr) -> Result<Self, Unopened> {
        let id = core.borrow_mut().open_udp(remote)?.ok_or(Unopened::Family)?;
        Ok(Self { handle: Rc::new(Handle { core: core.clone(), id }) })
    }

    /// Sends one datagram. It may still be lost further on, as datagrams are.
    pub(in crate::node) fn send(&self, octets: &[u8]) -> Result<(), Unsent> {
        let mut core = self.handle.core.borrow_mut();
        let Some((_, remote)) = core.netstack().addresses_of(self.handle.id) else { return Err(Unsent::NoRoom) };
        if octets.len() > netstack::datagram_limit(remote.ip()) {
            return Err(Unsent::TooLong);
        }
        let to = smoltcp::wire::IpEndpoint::new(remote.ip().into(), remote.port());
        let sent = core.netstack().with_udp(self.handle.id, |socket| socket.send_slice(octets, to));
        core.touch(self.handle.id, Instant::now());
        match sent {
            Some(Ok(())) => Ok(()),
            Some(Err(_)) | None => Err(Unsent::NoRoom),
        }
    }

    /// The next datagram.
    pub(in crate::node) async fn recv(&self) -> io::Result<Vec<u8>> {
        poll_fn(|cx| {
            let received = self.handle.core.borrow_mut().netstack().with_udp(self.handle.id, |socket| {
                socket.register_recv_waker(cx.waker());
                socket.recv().ok().map(|(octets, _)| octets.to_vec())
            });
            match received {
                Some(Some(octets)) => Poll::Ready(Ok(octets)),
                Some(None) => Poll::Pending,
                None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
            }
        })
        .await
    }
}
