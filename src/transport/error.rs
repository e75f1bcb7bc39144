//! How a connection on the underlay fails.

use std::io;

/// Why a connection was not made.
#[derive(Debug, thiserror::Error)]
pub enum UnderlayError {
    /// The host has no address.
    #[error("cannot resolve {host}: {source}")]
    Resolve {
        /// The host.
        host: String,
        /// What the host's resolver said.
        source: io::Error,
    },
    /// None of its addresses took the connection, or nothing came any more before TLS began.
    #[error("cannot connect to {host}: {source}")]
    Connect {
        /// Host and port.
        host: String,
        /// What the operating system said, of the last.
        source: io::Error,
    },
    /// The other side, or something before it, took the connection and ended it before TLS began.
    #[error("{host} ended the connection before TLS began: {source}")]
    Ended {
        /// Host and port.
        host: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// TLS failed.
    #[error("TLS with {host} failed: {detail}")]
    Tls {
        /// Host and port.
        host: String,
        /// What rustls said.
        detail: String,
    },
    /// The HTTP proxy could not be connected to.
    #[error("HTTP proxy {proxy}: {source}")]
    ProxyUnreached {
        /// Its host and port.
        proxy: String,
        /// Why.
        source: Box<UnderlayError>,
    },
    /// The HTTP proxy did not open a tunnel.
    #[error("HTTP proxy {proxy}: {detail}")]
    Proxy {
        /// Its host and port.
        proxy: String,
        /// Its status or the error.
        detail: String,
    },
}
