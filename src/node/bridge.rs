//! The way from the control thread into the tunnel: resolvers are asked from there, the netstack is not there.
//!
//! A resolver asks by [`Tunnel`] for a TCP connection or a UDP flow; a task on the data thread opens it and carries the
//! octets. Questions are few and small, so a copy between the threads costs nothing that matters.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::DuplexStream;
use tokio::sync::{mpsc, oneshot};

use super::core::Shared;
use super::tunnel::flow::{TunnelDatagrams, Unopened};
use super::tunnel::{ConnectFailure, TunnelStream};

/// Octets between the two ends of a bridged connection.
const PIPE: usize = 64 << 10;
/// Datagrams that wait on either side of a bridged flow.
const DATAGRAMS: usize = 16;

/// What the control thread asks of the data thread.
enum Request {
    Tcp(SocketAddr, Duration, oneshot::Sender<Result<DuplexStream, ConnectFailure>>),
    Udp(SocketAddr, oneshot::Sender<Result<Datagrams, Unopened>>),
}

/// The control thread's end.
#[derive(Clone)]
pub(super) struct Tunnel {
    requests: mpsc::Sender<Request>,
}

impl Tunnel {
    /// Starts the data thread's end on the current local runtime.
    pub(super) fn start(core: Shared) -> Self {
        let (requests, mut incoming) = mpsc::channel(64);
        tokio::task::spawn_local(async move {
            while let Some(request) = incoming.recv().await {
                tokio::task::spawn_local(serve(core.clone(), request));
            }
        });
        Self { requests }
    }

    /// Connects to `remote` through the tunnel.
    pub(super) async fn connect(&self, remote: SocketAddr, limit: Duration) -> io::Result<DuplexStream> {
        let (reply, answer) = oneshot::channel();
        self.ask(Request::Tcp(remote, limit, reply)).await?;
        answer.await.map_err(stopped)?.map_err(|failure| failed(remote, failure))
    }

    /// Opens a UDP flow to `remote` through the tunnel.
    pub(super) async fn open_udp(&self, remote: SocketAddr) -> io::Result<Datagrams> {
        let (reply, answer) = oneshot::channel();
        self.ask(Request::Udp(remote, reply)).await?;
        answer.await.map_err(stopped)?.map_err(|unopened| failed(remote, unopened.into()))
    }

    async fn ask(&self, request: Request) -> io::Result<()> {
        self.requests.send(request).await.map_err(stopped)
    }
}

fn stopped<E>(_: E) -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the node has stopped")
}

fn failed(remote: SocketAddr, failure: ConnectFailure) -> io::Error {
    let kind = match failure {
        ConnectFailure::Refused => io::ErrorKind::ConnectionRefused,
        ConnectFailure::Unanswered => io::ErrorKind::TimedOut,
        ConnectFailure::Rejected(_) => io::ErrorKind::PermissionDenied,
        ConnectFailure::Unopened(Unopened::Memory) => io::ErrorKind::OutOfMemory,
        ConnectFailure::Unopened(Unopened::Family | Unopened::Unaddressable | Unopened::Ports) => {
            io::ErrorKind::AddrNotAvailable
        }
    };
    io::Error::new(kind, format!("{remote}: {failure:?}"))
}

async fn serve(core: Shared, request: Request) {
    match request {
        Request::Tcp(remote, limit, mut reply) => {
            let connected = tokio::select! {
                connected = TunnelStream::connect(&core, remote, limit) => connected,
                () = reply.closed() => return,
            };
            let mut stream = match connected {
                Ok(stream) => stream,
                Err(failure) => {
                    // Whoever asked may have gone.
                    let _ = reply.send(Err(failure));
                    return;
                }
            };
            let (mut ours, theirs) = tokio::io::duplex(PIPE);
            if reply.send(Ok(theirs)).is_ok() {
                // How the carrying ended shows in what the resolver reads.
                let _ = tokio::io::copy_bidirectional(&mut ours, &mut stream).await;
            }
        }
        Request::Udp(remote, reply) => match TunnelDatagrams::open(&core, remote) {
            Ok(flow) => carry_datagrams(&core, flow, reply).await,
            Err(failure) => {
                // Whoever asked may have gone.
                let _ = reply.send(Err(failure));
            }
        },
    }
}

async fn carry_datagrams(core: &Shared, flow: TunnelDatagrams, reply: oneshot::Sender<Result<Datagrams, Unopened>>) {
    let (outgoing, mut from_resolver) = mpsc::channel::<Vec<u8>>(DATAGRAMS);
    let (to_resolver, incoming) = mpsc::channel(DATAGRAMS);
    if reply.send(Ok(Datagrams { outgoing, incoming })).is_err() {
        return;
    }
    loop {
        tokio::select! {
            question = from_resolver.recv() => match question {
                Some(question) => {
                    // A lost question is asked again, and one that is too long for a datagram comes by TCP.
                    if flow.send(&question).is_err() {
                        core.borrow_mut().note_unasked();
                    }
                }
                None => return,
            },
            answer = flow.recv() => match answer {
                Ok(answer) => {
                    if to_resolver.send(answer).await.is_err() {
                        return;
                    }
                }
                Err(_) => return,
            },
        }
    }
}

/// A UDP flow to one resolver.
pub(super) struct Datagrams {
    outgoing: mpsc::Sender<Vec<u8>>,
    incoming: mpsc::Receiver<Vec<u8>>,
}

impl Datagrams {
    /// Sends one datagram. It may be lost, as datagrams are.
    pub(super) async fn send(&self, octets: Vec<u8>) -> io::Result<()> {
        self.outgoing.send(octets).await.map_err(stopped)
    }

    /// The next datagram.
    pub(super) async fn recv(&mut self) -> io::Result<Vec<u8>> {
        self.incoming.recv().await.ok_or_else(|| stopped(()))
    }
}
