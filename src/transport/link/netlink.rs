//! The kernel's word that links, addresses, routes or rules changed (rtnetlink(7)).
//!
//! Only that something did is taken from it: what there is now is asked elsewhere, so that a lost message loses nothing.

use std::io;
use std::os::unix::net::UnixDatagram as Datagrams;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use tokio::net::UnixDatagram;
use tokio::time::sleep;

use super::QUIET;

/// The groups of rtnetlink that tell of links, addresses, routes and rules. Source: linux/rtnetlink.h, `RTMGRP_LINK`,
/// `RTMGRP_IPV4_IFADDR`, `RTMGRP_IPV4_ROUTE`, `RTMGRP_IPV4_RULE`, `RTMGRP_IPV6_IFADDR`, `RTMGRP_IPV6_ROUTE`,
/// `RTNLGRP_IPV6_RULE`.
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 1 << 18;
/// `RTM_NEWROUTE` and `RTM_DELROUTE`.
const ROUTES: [u16; 2] = [24, 25];
/// A message's header (`struct nlmsghdr`), and the place of `rtm_dst_len` in a route's.
const HEADER: usize = 16;
const PREFIX_LENGTH: usize = HEADER + 1;
/// A default route, or one of the two halves that some clients of VPNs put in its place.
const DEFAULT_MOST: u8 = 1;

/// A socket that hears of changes.
pub(super) struct Netlink {
    /// Not of that family, but the runtime reads any socket for datagrams by this type.
    socket: UnixDatagram,
}

impl Netlink {
    /// # Errors
    /// What the operating system says: sandboxes may have no such sockets.
    pub(super) fn open() -> io::Result<Self> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        // No protocol is 0, which is `NETLINK_ROUTE`.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
        Ok(Self { socket: UnixDatagram::from_std(Datagrams::from(socket))? })
    }

    /// Waits until something changed that may concern us.
    pub(super) async fn heard(&self) {
        let mut buffer = vec![0; 16 << 10];
        loop {
            match self.socket.recv(&mut buffer).await {
                Ok(length) if !concerns(&buffer[..length]) => {}
                Ok(_) => return,
                // It tells that messages were lost (ENOBUFS). One that stays must not keep us busy.
                Err(_) => return sleep(QUIET).await,
            }
        }
    }
}

/// Whether any of the messages is about more than a route to some few addresses.
fn concerns(mut messages: &[u8]) -> bool {
    while let (Some(length), Some(kind)) = (messages.first_chunk::<4>(), messages.get(4..6)) {
        let length = u32::from_ne_bytes(*length) as usize;
        let is_route = ROUTES.iter().any(|route| kind == route.to_ne_bytes());
        if !is_route || messages.get(PREFIX_LENGTH).is_none_or(|bits| *bits <= DEFAULT_MOST) {
            return true;
        }
        // Messages begin at multiples of four.
        let next = length.max(HEADER).checked_next_multiple_of(4);
        let Some(rest) = next.and_then(|next| messages.get(next..)) else { return false };
        messages = rest;
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u16, prefix_length: u8) -> Vec<u8> {
        let mut message = 28_u32.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.resize(HEADER, 0);
        message.extend([2, prefix_length]);
        message.resize(28, 0);
        message
    }

    #[test]
    fn addresses_links_and_default_routes_concern_us_and_other_routes_do_not() {
        for kind in [16, 17, 20, 21] {
            assert!(concerns(&message(kind, 24)), "{kind}");
        }
        for kind in [24, 25] {
            assert!(concerns(&message(kind, 0)) && concerns(&message(kind, 1)), "{kind}");
            assert!(!concerns(&message(kind, 24)), "{kind}");
        }
        assert!(concerns(&[message(24, 24), message(24, 64), message(25, 0)].concat()));
        assert!(!concerns(&[message(24, 24), message(25, 64)].concat()));
    }

    #[tokio::test]
    async fn what_concerns_us_is_heard_and_the_rest_is_not() {
        let (kernel, socket) = UnixDatagram::pair().unwrap();
        let netlink = Netlink { socket };
        let heard = async || tokio::time::timeout(std::time::Duration::from_millis(50), netlink.heard()).await.is_ok();
        kernel.send(&message(24, 24)).await.unwrap();
        assert!(!heard().await, "a route to some few addresses");
        kernel.send(&message(24, 24)).await.unwrap();
        kernel.send(&message(20, 24)).await.unwrap();
        assert!(heard().await, "an address behind it");
        assert!(!heard().await, "it is heard once");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = concerns(&bytes);
        }
    }
}
