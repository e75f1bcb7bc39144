//! The browser's side: connections through a proxy by HTTP CONNECT, which all that are compared speak.
//!
//! Everything runs on one thread inside the client's namespace, and buffers are large: what it costs is taken from
//! the same two cores.

use std::cell::Cell;
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::net::sockopt::set_tcp_congestion;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{sleep, timeout};

use crate::namespace::Namespace;
use crate::server::{CHUNK, CONGESTION, ECHO, SINK, SOURCE};
use crate::usage;

/// How long one connection may take to be made before the row fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// The pause after a failed attempt.
const AGAIN: Duration = Duration::from_millis(5);

/// The way to the server: through a proxy, or straight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Way {
    pub(crate) proxy: Option<SocketAddr>,
    pub(crate) server: std::net::IpAddr,
}

/// Which way the bytes go, as the browser sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Down,
    Up,
}

/// Bytes in bulk, and what they cost.
#[derive(Debug, Clone)]
pub(crate) struct Bulk {
    pub(crate) bytes: u64,
    pub(crate) elapsed: Duration,
    /// Time of each watched process.
    pub(crate) cpu: Vec<Duration>,
}

impl Bulk {
    /// Megabits a second.
    pub(crate) fn rate(&self) -> f64 {
        self.bytes as f64 * 8e-6 / self.elapsed.as_secs_f64()
    }

    /// Seconds of a watched process a gigabyte.
    pub(crate) fn cost(&self, watched: usize) -> f64 {
        self.cpu.get(watched).map_or(f64::NAN, Duration::as_secs_f64) * 1e9 / self.bytes as f64
    }
}

/// How a bulk transfer is to be done.
pub(crate) struct Load<'a> {
    pub(crate) direction: Direction,
    pub(crate) flows: usize,
    /// Before the measured time begins.
    pub(crate) warm_up: Duration,
    pub(crate) measured: Duration,
    /// Processes whose time is taken.
    pub(crate) watched: &'a [u32],
}

/// Runs `work` to its end on a thread of its own inside `namespace`.
///
/// # Errors
/// Those of entering, and the work's own.
pub(crate) fn inside<T: Send, F>(namespace: &Namespace, work: impl FnOnce() -> F + Send) -> Result<T, Failed>
where
    F: Future<Output = Result<T, Failed>>,
{
    namespace.inside(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        LocalSet::new().block_on(&runtime, work())
    })?
}

impl Way {
    /// A stream to a port of the server.
    ///
    /// # Errors
    /// When somebody refuses, or it takes too long.
    pub(crate) async fn open(self, port: u16) -> io::Result<TcpStream> {
        timeout(PATIENCE, self.open_somehow(port)).await.map_err(io::Error::other)?
    }

    async fn open_somehow(self, port: u16) -> io::Result<TcpStream> {
        let target = SocketAddr::new(self.server, port);
        let socket = TcpSocket::new_v4()?;
        let Some(proxy) = self.proxy else {
            set_tcp_congestion(&socket, CONGESTION)?;
            let stream = socket.connect(target).await?;
            stream.set_nodelay(true)?;
            return Ok(stream);
        };
        let mut stream = socket.connect(proxy).await?;
        stream.set_nodelay(true)?;
        stream.write_all(format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n").as_bytes()).await?;
        // The server says nothing before it is spoken to: all that comes is the head.
        let mut head = Vec::with_capacity(256);
        while !head.ends_with(b"\r\n\r\n") {
            if stream.read_buf(&mut head).await? == 0 {
                return Err(io::Error::other("the proxy closed"));
            }
        }
        if head.starts_with(b"HTTP/1.1 200") || head.starts_with(b"HTTP/1.0 200") {
            return Ok(stream);
        }
        Err(io::Error::other(String::from_utf8_lossy(&head).into_owned()))
    }

    /// A stream to the echo that has answered a byte.
    ///
    /// # Errors
    /// Those of [`Way::open`], and an end.
    pub(crate) async fn answered(self) -> io::Result<TcpStream> {
        let mut stream = self.open(ECHO).await?;
        timeout(PATIENCE, async {
            stream.write_all(b"?").await?;
            stream.read_u8().await
        })
        .await
        .map_err(io::Error::other)??;
        Ok(stream)
    }

    /// The first byte, asked for as a browser does: again after a failure, and beside an attempt that hangs; when it
    /// came. `hangs` is how long an attempt may take before there is another.
    ///
    /// # Errors
    /// When it has not come after `limit`.
    pub(crate) async fn first_byte(self, hangs: Duration, limit: Duration) -> Result<Instant, Failed> {
        let mut attempts = JoinSet::new();
        let end = Instant::now() + limit;
        while Instant::now() < end {
            attempts.spawn_local(self.answered());
            match timeout(hangs, attempts.join_next()).await {
                Ok(Some(Ok(Ok(_)))) => return Ok(Instant::now()),
                Ok(_) => sleep(AGAIN).await,
                Err(_) => {}
            }
        }
        Err(format!("no byte within {limit:?}").into())
    }

    /// Round trips of 64 bytes, sorted; the first few are not counted.
    ///
    /// # Errors
    /// When the stream ends.
    pub(crate) async fn round_trips(self, count: usize) -> Result<Vec<Duration>, Failed> {
        let mut stream = self.answered().await?;
        let mut buffer = [0; 64];
        let mut times = Vec::new();
        for _ in 0..count {
            let start = Instant::now();
            stream.write_all(&buffer).await?;
            timeout(PATIENCE, stream.read_exact(&mut buffer)).await??;
            times.push(start.elapsed());
        }
        times.sort_unstable();
        Ok(times)
    }

    /// New connections, `at_once` side by side, each for one byte: how many in `time`.
    ///
    /// # Errors
    /// The first that fails.
    pub(crate) async fn churn(self, at_once: usize, time: Duration) -> Result<usize, Failed> {
        let end = Instant::now() + time;
        let workers: Vec<_> = (0..at_once)
            .map(|_| {
                tokio::task::spawn_local(async move {
                    let mut count = 0;
                    while Instant::now() < end {
                        drop(self.answered().await?);
                        count += 1;
                    }
                    Ok::<usize, io::Error>(count)
                })
            })
            .collect();
        let mut sum = 0;
        for worker in workers {
            sum += worker.await??;
        }
        Ok(sum)
    }

    /// Connections that are all open in the end, so many of them new side by side: how long each waited for its first
    /// byte, sorted, and the streams.
    ///
    /// # Errors
    /// The first that fails.
    pub(crate) async fn crowd(self, count: usize, at_once: usize) -> Result<(Vec<Duration>, Vec<TcpStream>), Failed> {
        let (mut times, mut streams) = (Vec::with_capacity(count), Vec::with_capacity(count));
        let (mut workers, mut started) = (JoinSet::new(), 0);
        while streams.len() < count {
            while workers.len() < at_once && started < count {
                started += 1;
                workers.spawn_local(async move {
                    let start = Instant::now();
                    let stream = self.answered().await?;
                    Ok::<_, io::Error>((start.elapsed(), stream))
                });
            }
            let (time, stream) = workers.join_next().await.ok_or("none is left")???;
            times.push(time);
            streams.push(stream);
        }
        times.sort_unstable();
        Ok((times, streams))
    }

    /// Bytes in bulk; an upload is counted by the server.
    ///
    /// # Errors
    /// When a flow cannot be opened or ends early.
    pub(crate) async fn bulk(self, load: &Load<'_>, counts: &mut std::net::TcpStream) -> Result<Bulk, Failed> {
        let (down, label) = (Rc::new(Cell::new(0)), rand::random());
        let port = if load.direction == Direction::Down { SOURCE } else { SINK };
        // All are open before any moves: opening beside those that do would take its time.
        let mut streams = Vec::with_capacity(load.flows);
        for _ in 0..load.flows {
            streams.push(self.open(port).await?);
        }
        let start = |stream| match load.direction {
            Direction::Down => tokio::task::spawn_local(receive(stream, Rc::clone(&down))),
            Direction::Up => tokio::task::spawn_local(transmit(stream, label)),
        };
        let mut flows: Vec<_> = streams.into_iter().map(start).collect();
        let mut look = || -> io::Result<u64> {
            match load.direction {
                Direction::Down => Ok(down.get()),
                Direction::Up => ask(counts, label),
            }
        };
        sleep(load.warm_up).await;
        let (start, before) = (Instant::now(), look()?);
        let used = || -> Result<Vec<Duration>, _> {
            load.watched.iter().map(|pid| usage::cpu(*pid).ok_or("a watched process is gone")).collect()
        };
        let cpu = used()?;
        sleep(load.measured).await;
        let (elapsed, bytes) = (start.elapsed(), look()? - before);
        let cpu = used()?.into_iter().zip(cpu).map(|(after, before)| after - before).collect();
        if let Some(ended) = flows.iter().position(tokio::task::JoinHandle::is_finished) {
            return Err(format!("flow {ended} ended early: {:?}", flows.swap_remove(ended).await).into());
        }
        flows.iter().for_each(tokio::task::JoinHandle::abort);
        Ok(Bulk { bytes, elapsed, cpu })
    }
}

async fn receive(mut stream: TcpStream, count: Rc<Cell<u64>>) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    stream.write_all(b"!").await?;
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        count.set(count.get() + read as u64);
    }
}

async fn transmit(mut stream: TcpStream, label: u64) -> io::Result<()> {
    let buffer = vec![0; CHUNK];
    stream.write_u64(label).await?;
    loop {
        stream.write_all(&buffer).await?;
    }
}

/// What the sink has counted under a label. It answers within the time of a system call: nobody waits for it long.
fn ask(counts: &mut std::net::TcpStream, label: u64) -> io::Result<u64> {
    counts.write_all(&label.to_be_bytes())?;
    let mut answer = [0; 8];
    counts.read_exact(&mut answer)?;
    Ok(u64::from_be_bytes(answer))
}
