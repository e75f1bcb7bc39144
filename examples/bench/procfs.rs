//! What the kernel says of a contender besides what it uses: whether anybody listens at its address, what it runs.

use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::{fs, io};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};

/// Whether somebody listens at an IPv4 address of the caller's network namespace: nobody else can bind there then.
///
/// Nothing is sent for it, since a connection would be the proxy's first; and the kernel's table of sockets takes a
/// millisecond to read, however few they are. Whoever is about to bind there is not hindered: on Linux any number of
/// sockets with `SO_REUSEADDR`, which all proxies here set, share a port until one of them listens (socket(7)).
///
/// # Errors
/// When there can be no socket.
pub(crate) fn listens(address: SocketAddrV4) -> io::Result<bool> {
    let probe = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&probe, true)?;
    match bind(&probe, &address) {
        Ok(()) => Ok(false),
        Err(Errno::ADDRINUSE) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// The program that the process runs.
pub(crate) fn program(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use rustix::net::getsockname;

    use super::*;

    #[test]
    fn only_who_listens_is_seen() {
        let bound = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        sockopt::set_socket_reuseaddr(&bound, true).unwrap();
        bind(&bound, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = getsockname(&bound).unwrap().try_into().unwrap();
        assert!(!listens(address).unwrap());
        rustix::net::listen(&bound, 1).unwrap();
        assert!(listens(address).unwrap());
    }

    #[test]
    fn this_process_has_a_program() {
        assert_eq!(program(std::process::id()).unwrap(), std::env::current_exe().unwrap());
    }
}
