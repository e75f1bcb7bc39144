//! The proxy's listeners, bound before anything else is tried.
//!
//! A browser that meets a closed proxy port shuns it for minutes; one that is bound holds the connection. The sockets
//! are made by hand for their backlog: a browser opens dozens of connections at once, and a full backlog costs each
//! of them a second.

use std::io;
use std::net::{SocketAddr, TcpListener};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, listen, socket_with, sockopt};

use crate::fault::{self, Fault};

/// Connections that the kernel completes before we accept them; the kernel itself caps it at `somaxconn`.
const BACKLOG: i32 = 4096;

/// Binds every address, in order.
///
/// # Errors
/// `TC-2004` for a port that is taken, an address that is not local, or a port that needs privileges.
pub(super) fn bind_all(addresses: &[SocketAddr]) -> Result<Vec<TcpListener>, Fault> {
    addresses
        .iter()
        .map(|address| {
            bind_one(*address).map_err(|error| {
                let what = reason(&error);
                Fault::new(&fault::BIND_FAILED, format!("the proxy cannot listen on {address}: {what}"))
            })
        })
        .collect()
}

fn bind_one(address: SocketAddr) -> io::Result<TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    // A port whose last owner's connections linger in TIME_WAIT is free.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    bind(&socket, &address)?;
    listen(&socket, BACKLOG)?;
    Ok(TcpListener::from(socket))
}

/// What the user would call it.
fn reason(error: &io::Error) -> String {
    let known = [
        (io::ErrorKind::AddrInUse, "the port is taken"),
        (io::ErrorKind::AddrNotAvailable, "this machine has no such address"),
        (io::ErrorKind::PermissionDenied, "ports below 1024 need privileges"),
    ];
    let words = known.iter().find(|(kind, _)| *kind == error.kind()).map(|(_, words)| (*words).to_owned());
    words.unwrap_or_else(|| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_and_a_foreign_address_say_so() {
        let first = bind_all(&["127.0.0.1:0".parse().unwrap()]).unwrap();
        let taken = bind_all(&[first[0].local_addr().unwrap()]).unwrap_err();
        assert_eq!((taken.row, taken.row.exit), (&fault::BIND_FAILED, 71));
        assert!(taken.detail.ends_with("the port is taken"), "{}", taken.detail);
        let foreign = bind_all(&["192.0.2.1:0".parse().unwrap()]).unwrap_err();
        assert!(foreign.detail.ends_with("no such address"), "{}", foreign.detail);
    }

    #[test]
    fn connections_complete_before_anybody_accepts() {
        let listeners = bind_all(&["127.0.0.1:0".parse().unwrap()]).unwrap();
        assert!(std::net::TcpStream::connect(listeners[0].local_addr().unwrap()).is_ok());
    }
}
