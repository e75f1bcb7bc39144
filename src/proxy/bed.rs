//! What the proxy's tests stand on: a proxy on loopback before a node that may dial loopback, and small targets.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::{Builder, LocalOptions};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{Config, Stats, serve};
use crate::node::dial::DirectRule;
use crate::node::{self, Node};

/// The longest that any test may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A proxy that serves.
pub(super) struct Bed {
    pub(super) address: SocketAddr,
    pub(super) stats: Arc<Stats>,
    pub(super) drain: CancellationToken,
    pub(super) served: JoinHandle<std::io::Result<()>>,
}

/// Runs a test on a data thread of its own.
pub(super) fn run<F: Future>(test: F) -> F::Output {
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
    let bounded = async { timeout(LIMIT, test).await.expect("the test ends in time") };
    runtime.block_on(bounded)
}

/// A proxy before a node whose tailnet is loopback.
pub(super) fn start(config: Config) -> Bed {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let direct_allow =
        vec![DirectRule::Net("127.0.0.0/8".parse().unwrap()), DirectRule::Net("::1/128".parse().unwrap())];
    let settings = node::Config { direct_allow, ..node::Config::default() };
    let node = Node::alone(settings);
    let (stats, drain) = (Arc::new(Stats::default()), CancellationToken::new());
    let served = tokio::task::spawn_local(serve(vec![listener], node, config, Arc::clone(&stats), drain.clone()));
    Bed { address, stats, drain, served }
}

impl Bed {
    pub(super) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends `bytes` on a new connection and reads until its end.
    pub(super) async fn ask(&self, bytes: &[u8]) -> Vec<u8> {
        let mut client = self.connect().await;
        client.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        answer
    }

    /// The same in text.
    pub(super) async fn ask_text(&self, text: &str) -> String {
        String::from_utf8(self.ask(text.as_bytes()).await).unwrap()
    }

    /// Waits until no connection is open.
    pub(super) async fn until_closed(&self) {
        while self.stats.counters().active > 0 {
            tokio::task::yield_now().await;
        }
    }

    /// Codes of all failures so far, oldest first.
    pub(super) fn codes(&self) -> Vec<u16> {
        self.stats.failures(None, None).into_iter().map(|failure| failure.code).collect()
    }
}

/// A target that gives each connection to `serve`.
pub(super) async fn target<F: Future<Output = ()> + 'static>(serve: impl Fn(TcpStream) -> F + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::task::spawn_local(async move {
        while let Ok((connection, _)) = listener.accept().await {
            tokio::task::spawn_local(serve(connection));
        }
    });
    address
}

/// A target that sends back what it gets, and ends when its client has.
pub(super) async fn echo() -> SocketAddr {
    target(|mut connection| async move {
        let (mut from, mut to) = connection.split();
        let _ = tokio::io::copy(&mut from, &mut to).await;
    })
    .await
}

/// A target that answers no connection: its queue is full.
pub(super) struct Silent {
    pub(super) address: SocketAddr,
    _listener: TcpListener,
    _first: TcpStream,
}

impl Silent {
    pub(super) async fn new() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        // With a backlog of 0, Linux queues one connection and lets the others wait.
        let first = TcpStream::connect(address).await.unwrap();
        Self { address, _listener: listener, _first: first }
    }
}

/// Lets all tasks run until none has more to do. On loopback, what was sent has arrived.
pub(super) async fn settle() {
    for _ in 0..1_000 {
        tokio::task::yield_now().await;
    }
}

/// What `future` gives if all tasks have run, if it gives anything by then.
pub(super) async fn settled<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    tokio::select! {
        biased;
        output = future => Some(output),
        () = settle() => None,
    }
}

/// Reads to the end of an HTTP head.
pub(super) async fn read_head(connection: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(connection.read_u8().await.expect("the head goes on"));
    }
    String::from_utf8(head).unwrap()
}

/// Reads as many bytes as `expected` has and compares.
pub(super) async fn expect_bytes(connection: &mut TcpStream, expected: &[u8]) {
    let mut read = vec![0; expected.len()];
    connection.read_exact(&mut read).await.unwrap();
    assert_eq!(read, expected);
}

/// A target that answers each request head with `answer`, whatever it asks, and reads no bodies.
pub(super) async fn answering(answer: &'static str) -> SocketAddr {
    target(move |mut connection| async move {
        let mut head = Vec::new();
        while let Ok(byte) = connection.read_u8().await {
            head.push(byte);
            if head.ends_with(b"\r\n\r\n") {
                connection.write_all(answer.as_bytes()).await.unwrap();
                head.clear();
            }
        }
    })
    .await
}

/// A client's connection and, once `request` is sent to a target on it, the target's.
pub(super) async fn asked(bed: &Bed, request: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = bed.connect().await;
    let request = request.replace("TARGET", &listener.local_addr().unwrap().to_string());
    client.write_all(request.as_bytes()).await.unwrap();
    (client, listener.accept().await.unwrap().0)
}
