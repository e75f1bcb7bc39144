//! Servers that are not what they should be, on loopback.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use tokio::net::TcpSocket;

/// A host that has no address, for which no resolver is asked: its label is longer than any is (RFC 1035, 2.3.4).
pub(crate) const NO_HOST: &str = "a-label-of-at-least-64-octets-is-none-and-that-is-known-beforehand.invalid";

/// A server that meets every connection with `answer`, for as long as the test lives.
pub(crate) fn serve(answer: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let address = listener.local_addr().expect("it is bound");
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let answer = Arc::clone(&answer);
            thread::spawn(move || answer(stream));
        }
    });
    address
}

/// A port that nobody listens on, nor can: it stays bound until the tests end, and refuses all connections.
pub(crate) fn closed_port() -> SocketAddr {
    let socket = TcpSocket::new_v4().expect("there are sockets");
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("loopback has a free port");
    let address = socket.local_addr().expect("it is bound");
    std::mem::forget(socket);
    address
}

/// A request's head, without its body.
pub(crate) fn read_head(stream: &mut impl Read) -> String {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
        head.push(byte[0]);
    }
    String::from_utf8_lossy(&head).into_owned()
}

/// A whole answer that closes.
pub(crate) fn answer(stream: &mut impl Write, status: &str, kind: &str, body: &str) {
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    // The client may be gone: that is its own decision.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
}

/// A server that answers everything with one page.
pub(crate) fn page(status: &'static str, kind: &'static str, body: &'static str) -> SocketAddr {
    serve(move |mut stream| {
        read_head(&mut stream);
        answer(&mut stream, status, kind, body);
    })
}

/// A server that is no control server, which ends a run at once with TC-1105: it got as far as that.
pub(crate) fn no_control_server() -> SocketAddr {
    page("404 Not Found", "text/plain", "no such page")
}

/// A server that hands out a control key, upgrades, and then does what `after` does.
pub(crate) fn upgraded(after: impl Fn(&mut TcpStream) + Send + Sync + 'static) -> SocketAddr {
    serve(move |mut stream| {
        loop {
            let head = read_head(&mut stream);
            if head.is_empty() {
                return;
            }
            if head.starts_with("GET /key") {
                let key = format!("mkey:{}", "09".repeat(32));
                let body = format!(r#"{{"legacyPublicKey":"{key}","publicKey":"{key}"}}"#);
                let head = format!(
                    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                    body.len()
                );
                let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
                continue;
            }
            let upgrade = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n\r\n";
            let _ = stream.write_all(upgrade.as_bytes());
            after(&mut stream);
            return;
        }
    })
}

/// A TLS server for `localhost` and 127.0.0.1 whose certificate nobody knows; `ca_file` gets it if asked for.
pub(crate) fn tls(ca_file: Option<&Path>) -> SocketAddr {
    let names = vec![String::from("localhost"), String::from("127.0.0.1")];
    let signed = rcgen::generate_simple_self_signed(names).expect("rcgen signs");
    if let Some(path) = ca_file {
        std::fs::write(path, signed.cert.pem()).expect("the folder is ours");
    }
    let key =
        rustls::pki_types::PrivateKeyDer::try_from(signed.signing_key.serialize_der()).expect("rcgen makes PKCS#8");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring knows TLS 1.2 and 1.3")
        .with_no_client_auth()
        .with_single_cert(vec![signed.cert.der().clone()], key)
        .expect("the key fits the certificate");
    let config = Arc::new(config);
    serve(move |stream| {
        let connection = ServerConnection::new(Arc::clone(&config)).expect("the configuration is good");
        let mut stream = StreamOwned::new(connection, stream);
        read_head(&mut stream);
        answer(&mut stream, "404 Not Found", "text/plain", "nothing here");
    })
}
