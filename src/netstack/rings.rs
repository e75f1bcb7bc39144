//! A flow's memory: pages from the system for its rings, and the socket set that lives in them.
//!
//! A ring has to be as long as the fastest path needs, and most flows never fill it. Anonymous pages cost nothing until
//! they are written and go back to the system when the flow ends; the allocator gives neither promise (glibc stops
//! mapping large blocks once the first has been freed: a thousand idle connections took 490 MiB that way, 19 MiB this).

use std::io;

use memmap2::MmapMut;
use self_cell::{MutBorrow, self_cell};
use smoltcp::iface::SocketSet;

type Set<'m> = SocketSet<'m>;

self_cell!(
    /// A socket set and the pages that its sockets' rings are in.
    pub(super) struct Sockets {
        owner: MutBorrow<MmapMut>,
        #[not_covariant]
        dependent: Set,
    }
);

impl Sockets {
    /// A set of whatever `build` makes from two rings of the given sizes in octets: receive, then send.
    ///
    /// # Errors
    /// When the system has no pages left.
    pub(super) fn build(
        receive: usize,
        send: usize,
        build: impl for<'m> FnOnce(&'m mut [u8], &'m mut [u8]) -> SocketSet<'m>,
    ) -> io::Result<Self> {
        let memory = MmapMut::map_anon(receive + send)?;
        Ok(Self::new(MutBorrow::new(memory), |memory| {
            let (receive, send) = memory.borrow_mut().split_at_mut(receive);
            build(receive, send)
        }))
    }
}
