//! Whether a client that has closed its sending side still reads.

use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// How often a client that has closed its sending side is asked whether it still reads, and how often it may leave that
/// unanswered. A connection that was closed as a whole looks the same until its kernel forgets it, a minute later on
/// Linux, and answers with a reset.
const PROBE: (Duration, u32) = (Duration::from_secs(10), 3);

/// Has the kernel ask `client` now and then whether it is still there.
///
/// # Errors
/// When the socket has failed.
pub fn probe(client: &TcpStream) -> rustix::io::Result<()> {
    let (interval, times) = PROBE;
    sockopt::set_tcp_keepidle(client, interval)?;
    sockopt::set_tcp_keepintvl(client, interval)?;
    sockopt::set_tcp_keepcnt(client, times)?;
    sockopt::set_socket_keepalive(client, true)
}

/// Ends when `client`, which has closed its sending side, has reset its connection or leaves three probes of ten seconds
/// each unanswered. One that answers may wait for as long as it wants.
pub async fn vanished(client: &TcpStream) {
    // A socket that refuses to probe has failed, which the next line sees.
    let _ = probe(client);
    let _ = client.ready(Interest::ERROR).await;
}
