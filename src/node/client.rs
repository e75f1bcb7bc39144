//! A client's connection at its end: how we notice that the client is gone, and what it is told when we are.

use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// After how much silence a client is asked whether it is still there, how often after that, and how often it may leave
/// that unanswered.
///
/// One that is no longer on the network is noticed forty seconds after its last word. One that closed its connection as
/// a whole looks as if it only sent no more until its kernel forgets it, on Linux after a minute, and the next question
/// is answered with a reset. While something waits for the client's acknowledgement nobody asks, and the kernel gives up
/// after its retransmissions, a quarter of an hour; `TCP_USER_TIMEOUT` would shorten that, and would also end a client
/// that answers but does not read for a while. Source: tcp(7), `tcp_keepalive_time`, `tcp_retries2`, `TCP_USER_TIMEOUT`;
/// ip-sysctl.rst, `tcp_fin_timeout`.
const ASKED: (Duration, Duration, u32) = (Duration::from_secs(10), Duration::from_secs(10), 3);

/// Has the kernel ask `client` now and then whether it is still there. A failure of the socket is for its next use.
pub fn keep_asking(client: &TcpStream) {
    let (idle, interval, times) = ASKED;
    let _ = sockopt::set_tcp_keepidle(client, idle);
    let _ = sockopt::set_tcp_keepintvl(client, interval);
    let _ = sockopt::set_tcp_keepcnt(client, times);
    let _ = sockopt::set_socket_keepalive(client, true);
}

/// Ends when `client` has reset its connection, even if nobody reads what it has sent.
pub async fn has_reset(client: &TcpStream) {
    let _ = client.ready(Interest::ERROR).await;
}

/// Ends when `client`, which has closed its sending side, has reset its connection or no longer answers. One that
/// answers may wait for as long as it wants.
pub async fn vanished(client: &TcpStream) {
    keep_asking(client);
    has_reset(client).await;
}

/// From now on the connection is reset when it is closed, by whatever: a FIN would tell the client that all came. A
/// failure of the socket is for its next use.
pub fn end_by_reset(client: &TcpStream) {
    let _ = sockopt::set_socket_linger(client, Some(Duration::ZERO));
}

/// Takes [`end_by_reset`] back: what was written before the close arrives, and then the FIN.
pub fn end_in_peace(client: &TcpStream) {
    let _ = sockopt::set_socket_linger(client, None);
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_client_that_no_longer_answers_is_asked_three_times_in_forty_seconds() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        keep_asking(&client);
        let idle = sockopt::tcp_keepidle(&client).unwrap();
        let asked = sockopt::tcp_keepintvl(&client).unwrap() * sockopt::tcp_keepcnt(&client).unwrap();
        assert!(sockopt::socket_keepalive(&client).unwrap());
        assert_eq!((idle, idle + asked), (Duration::from_secs(10), Duration::from_secs(40)));
        // It would end a client that answers and does not read.
        assert_eq!(sockopt::tcp_user_timeout(&client).unwrap(), 0);
    }
}
