//! What every connection of the bench leads to: a sink, a source and an echo, of as little work as can be.
//!
//! It runs as a process of its own, so that its time is told apart from the generator's. Its sockets are on cubic:
//! the machine's default may be another, and the figures should not depend on that.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::sockopt::set_tcp_congestion;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Sends back what it is sent.
pub(crate) const ECHO: u16 = 7;
/// Takes what it is sent, and counts it by the number in the first eight bytes.
pub(crate) const SINK: u16 = 9;
/// Sends without end, once it has been sent a byte.
pub(crate) const SOURCE: u16 = 19;
/// Answers a number of eight bytes with how many bytes the sink has counted under it; on loopback only.
pub(crate) const COUNTS: u16 = 10;

/// The congestion control of the bench's own sockets.
pub(crate) const CONGESTION: &str = "cubic";
/// How much is read or written at once.
pub(crate) const CHUNK: usize = 256 << 10;
/// More than ten thousand connections may come at once.
const BACKLOG: u32 = 32 << 10;

type Counts = Arc<Mutex<HashMap<u64, Arc<AtomicU64>>>>;

/// Serves until it is killed.
///
/// # Errors
/// When a port is taken.
pub(crate) fn run() -> io::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let counts = Counts::default();
        let any = Ipv4Addr::UNSPECIFIED;
        let (echo, sink, source) = (listen(any, ECHO)?, listen(any, SINK)?, listen(any, SOURCE)?);
        let reader = listen(Ipv4Addr::LOCALHOST, COUNTS)?;
        loop {
            // An end of a connection, however it comes, ends its task: the other side notices.
            tokio::select! {
                Ok((stream, _)) = echo.accept() => drop(tokio::spawn(send_back(stream))),
                Ok((stream, _)) = sink.accept() => drop(tokio::spawn(take(stream, Arc::clone(&counts)))),
                Ok((stream, _)) = source.accept() => drop(tokio::spawn(send(stream))),
                Ok((stream, _)) = reader.accept() => drop(tokio::spawn(tell(stream, Arc::clone(&counts)))),
            }
        }
    })
}

fn listen(host: Ipv4Addr, port: u16) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    set_tcp_congestion(&socket, CONGESTION)?;
    socket.bind(SocketAddr::from((host, port)))?;
    socket.listen(BACKLOG)
}

async fn send_back(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 1024];
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..read]).await?;
    }
}

async fn take(mut stream: TcpStream, counts: Counts) -> io::Result<()> {
    let number = stream.read_u64().await?;
    let count = Arc::clone(counts.lock().unwrap_or_else(PoisonError::into_inner).entry(number).or_default());
    let mut buffer = vec![0; CHUNK];
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        count.fetch_add(read as u64, Ordering::Relaxed);
    }
}

async fn send(mut stream: TcpStream) -> io::Result<()> {
    static BYTES: [u8; CHUNK] = [0; CHUNK];
    stream.read_u8().await?;
    loop {
        stream.write_all(&BYTES).await?;
    }
}

async fn tell(mut stream: TcpStream, counts: Counts) -> io::Result<()> {
    loop {
        let number = stream.read_u64().await?;
        let count = counts.lock().unwrap_or_else(PoisonError::into_inner).get(&number).cloned();
        stream.write_u64(count.map_or(0, |count| count.load(Ordering::Relaxed))).await?;
    }
}
