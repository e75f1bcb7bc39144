//! How far a region is by HTTPS, for networks that let no UDP pass.
//!
//! Source: Tailscale, net/netcheck, `measureHTTPSLatency`.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::debug;

use super::regions::Probed;
use crate::engine::HttpsProbe;
use crate::netmap::RegionId;
use crate::transport::derp::Relay;
use crate::transport::places::authority;
use crate::transport::underlay::Underlay;

/// The longest that the probe of a region may take, all its relays together: netcheck waits a second longer.
const LIMIT: Duration = Duration::from_secs(3);

/// Measures a region by its first relay that answers. There is an outcome always, since netcheck waits for it.
pub(super) async fn https(of: HttpsProbe, relays: Vec<Relay>, underlay: Underlay, probes: mpsc::Sender<Probed>) {
    let latency = latency(of.region, &relays, &underlay).await;
    // A driver that is gone needs no latency.
    let _ = probes.send(Probed::Https(of, latency)).await;
}

async fn latency(region: RegionId, relays: &[Relay], underlay: &Underlay) -> Option<Duration> {
    let begun = Instant::now();
    for (index, relay) in relays.iter().enumerate() {
        // One that is silent leaves the others their share.
        let left = u32::try_from(relays.len() - index).unwrap_or(u32::MAX);
        let limit = LIMIT.saturating_sub(begun.elapsed()) / left;
        let measured = timeout(limit, relay_latency(relay, underlay)).await;
        match measured.unwrap_or_else(|_| Err(format!("no answer within {limit:?}"))) {
            Ok(latency) => return Some(latency),
            Err(error) => debug!(region, host = relay.host, error, "no answer to an HTTPS probe"),
        }
    }
    None
}

/// The time of one request on a connection that is open already.
async fn relay_latency(relay: &Relay, underlay: &Underlay) -> Result<Duration, String> {
    let io = relay.dial(underlay).await.map_err(|error| error.to_string())?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await.map_err(|error| error.to_string())?;
    tokio::spawn(connection);
    let request = Request::head("/derp/latency-check").header(header::HOST, authority(&relay.host, relay.port));
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| error.to_string())?;
    let begun = Instant::now();
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    // What refuses is a proxy before the relay rather than the relay.
    if response.status().is_success() { Ok(begun.elapsed()) } else { Err(response.status().to_string()) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    use super::*;
    use crate::node::regions;
    use crate::transport::bed::{closed_port, tls_server, underlay};
    use crate::transport::link::Link;
    use crate::wire::tailcfg::derp::Region;

    /// A relay's port, where requests are answered so.
    async fn relay(answer: &'static str) -> u16 {
        let acceptor = TlsAcceptor::from(Arc::new(tls_server("derp.example").0));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let mut stream = acceptor.accept(listener.accept().await.unwrap().0).await.unwrap();
            let mut request = [0; 1024];
            let length = stream.read(&mut request).await.unwrap();
            assert!(request[..length].starts_with(b"HEAD /derp/latency-check HTTP/1.1\r\n"));
            stream.write_all(answer.as_bytes()).await.unwrap();
            // The client is the first to leave.
            let _ = stream.read(&mut request).await;
        });
        port
    }

    /// What comes of a probe of a region with relays at these ports.
    async fn probed(ports: &[u16]) -> Option<Duration> {
        let node = |port: &u16| {
            let node = serde_json::json!({
                "HostName": "derp.example", "IPv4": "127.0.0.1", "IPv6": "none", "DERPPort": port,
                "InsecureForTests": true,
            });
            serde_json::from_value(node).unwrap()
        };
        let region = Region { id: 7, nodes: ports.iter().map(node).collect(), ..Region::default() };
        let underlay = underlay(Link::default());
        let (probes, mut outcome) = mpsc::channel(1);
        let of = HttpsProbe { region: 7, round: 3 };
        https(of, regions::relays(&region), underlay, probes).await;
        let Some(Probed::Https(probed, latency)) = outcome.recv().await else { panic!("no outcome") };
        assert_eq!(probed, of);
        latency
    }

    const FINE: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

    #[tokio::test]
    async fn a_region_is_measured_by_the_first_relay_that_answers() {
        let down = closed_port("127.0.0.1").port();
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let silent = (silent.local_addr().unwrap().port(), silent);
        assert!(probed(&[down, relay(FINE).await]).await.is_some());
        assert!(probed(&[silent.0, relay(FINE).await]).await.is_some());
    }

    #[tokio::test]
    async fn a_region_without_a_relay_that_answers_has_an_outcome() {
        assert_eq!(probed(&[]).await, None);
        let refusal = "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n";
        assert_eq!(probed(&[relay(refusal).await]).await, None);
    }
}
