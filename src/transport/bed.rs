//! What tests of connections below the tailnet stand on: an underlay without proxies, a TLS server's identity,
//! and ports that are closed.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::PrivateKeyDer;
use tokio::net::TcpSocket;

use super::link::Link;
use super::tls::Tls;
use super::underlay::Underlay;

/// An underlay that trusts whom the machine trusts, and goes by no proxy.
pub(crate) fn underlay(link: Link) -> Underlay {
    Underlay { tls: Tls::load(None).unwrap(), proxy: None, no_proxy: Arc::default(), link }
}

/// A TLS server of that name which vouches for itself, and its certificate as PEM.
pub(crate) fn tls_server(name: &str) -> (ServerConfig, String) {
    let certified = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_no_client_auth().with_single_cert(vec![certified.cert.der().clone()], key).unwrap();
    (config, certified.cert.pem())
}

/// A port of that IPv4 address that nobody listens on, nor can: it stays bound until the tests end, and refuses all
/// connections.
pub(crate) fn closed_port(host: &str) -> SocketAddr {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(format!("{host}:0").parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    std::mem::forget(socket);
    address
}
