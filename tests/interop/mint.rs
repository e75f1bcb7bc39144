//! The API that makes auth keys, as far as a join needs it, on the loopback of the sidecar's own namespace.
//!
//! What it takes and refuses in detail is held by the tests of the built binary; here the keys that it hands out are
//! good ones. It may stand in front of a control server, as Tailscale's API does on the host of its control: then it
//! hands a key out only once control has been dialled, so that a sidecar that waits for the key first never joins.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use libtest_mimic::Failed;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsConnector;

use crate::namespace::Namespace;

/// How long a key waits for control to be dialled: far longer than that takes, far shorter than a join may.
const PATIENCE: Duration = Duration::from_secs(5);

/// A running API. Its thread lives as long as the process.
pub(crate) struct MintApi {
    /// Its URL inside the namespace.
    pub(crate) url: String,
    seen: Arc<Mutex<Vec<(String, String)>>>,
}

/// The control server behind it.
struct Behind {
    address: SocketAddr,
    connector: TlsConnector,
}

struct Front {
    key: String,
    behind: Option<Behind>,
    seen: Arc<Mutex<Vec<(String, String)>>>,
    dialled: watch::Sender<bool>,
}

impl MintApi {
    /// Starts one in `host` that hands out `key`, in front of the control server at `behind` (URL and authority).
    ///
    /// # Errors
    /// Those of entering the namespace and of reading the authority.
    pub(crate) fn start(host: &Namespace, key: &str, behind: Option<(&str, &Path)>) -> Result<Self, Failed> {
        let behind = behind.map(|(url, authority)| Behind::new(url, authority)).transpose()?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let front = Front { key: key.to_owned(), behind, seen: Arc::clone(&seen), dialled: watch::Sender::new(false) };
        let listener = host.inside(|| std::net::TcpListener::bind("127.0.0.1:0"))??;
        listener.set_nonblocking(true)?;
        let url = format!("http://{}", listener.local_addr()?);
        // A thread begins in the namespace of the one that started it.
        host.inside(|| drop(thread::spawn(move || serve(listener, front))))?;
        Ok(Self { url, seen })
    }

    /// The requests so far, method and path, and the body.
    pub(crate) fn seen(&self) -> Vec<(String, String)> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Behind {
    fn new(url: &str, authority: &Path) -> Result<Self, Failed> {
        let address = url.strip_prefix("https://").ok_or("control is not behind HTTPS")?.parse()?;
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&fs::read(authority)?) {
            roots.add(certificate?)?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { address, connector: TlsConnector::from(Arc::new(config)) })
    }
}

fn serve(listener: std::net::TcpListener, front: Front) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts");
    runtime.block_on(async {
        let listener = TcpListener::from_std(listener).expect("it does not block");
        let front = Arc::new(front);
        while let Ok((stream, _)) = listener.accept().await {
            let front = Arc::clone(&front);
            // What the client breaks off is its own affair.
            tokio::spawn(async move { drop(front.connection(stream).await) });
        }
    });
}

impl Front {
    async fn connection(&self, mut stream: TcpStream) -> std::io::Result<()> {
        loop {
            let head = read_head(&mut stream).await?;
            let mut words = head.split(' ');
            let (Some(method), Some(path)) = (words.next(), words.next()) else { return Ok(()) };
            if !path.starts_with("/api/") {
                return self.forward(stream, &head).await;
            }
            let length =
                head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
            let mut body = vec![0; length.unwrap_or(0)];
            stream.read_exact(&mut body).await?;
            let line = format!("{method} {path}");
            let body = String::from_utf8_lossy(&body).into_owned();
            self.seen.lock().unwrap_or_else(PoisonError::into_inner).push((line.clone(), body));
            let (status, answer) = self.answer(&line).await;
            let answer = answer.to_string();
            let length = answer.len();
            let head =
                format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n");
            stream.write_all(format!("{head}{answer}").as_bytes()).await?;
        }
    }

    async fn answer(&self, line: &str) -> (&'static str, Value) {
        match line {
            "POST /api/v2/oauth/token" | "POST /api/v2/oauth/token-exchange" => {
                ("200 OK", json!({ "access_token": "tskey-api-bed", "token_type": "Bearer", "expires_in": 3600 }))
            }
            "POST /api/v2/tailnet/-/keys" => {
                let mut dialled = self.dialled.subscribe();
                let wait = tokio::time::timeout(PATIENCE, dialled.wait_for(|dialled| *dialled));
                if self.behind.is_some() && wait.await.is_err() {
                    return ("403 Forbidden", json!({ "message": "control was not dialled meanwhile" }));
                }
                ("200 OK", json!({ "id": "kBED", "key": self.key }))
            }
            "DELETE /api/v2/tailnet/-/keys/kBED" => ("200 OK", Value::Null),
            _ => ("404 Not Found", json!({ "message": "not found" })),
        }
    }

    /// Hands a connection over to control, which has seen nothing of it yet.
    async fn forward(&self, mut stream: TcpStream, head: &str) -> std::io::Result<()> {
        let Some(behind) = &self.behind else { return Ok(()) };
        let tcp = TcpStream::connect(behind.address).await?;
        let mut control = behind.connector.connect(ServerName::from(behind.address.ip()), tcp).await?;
        control.write_all(head.as_bytes()).await?;
        self.dialled.send_replace(true);
        tokio::io::copy_bidirectional(&mut stream, &mut control).await.map(drop)
    }
}

/// A request's head, to its empty line.
async fn read_head(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}
