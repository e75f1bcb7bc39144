//! From a TLS stream to DERP: by a plain HTTP upgrade, or inside a WebSocket where only those pass.

use std::error::Error as _;
use std::io;
use std::iter::successors;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::tungstenite;
use tokio_util::io::{CopyToBytes, SinkWriter, StreamReader};

use super::{CLOSED, DerpError, Relay, ending};
use crate::transport::places::authority;
use crate::transport::underlay::BoxIo;

/// Changes a TLS stream to DERP by an HTTP upgrade. Source: derphttp_client.go, `connect`.
pub(super) async fn plain(io: BoxIo, relay: &Relay) -> Result<BoxIo, DerpError> {
    let refused = |detail: String| DerpError::Upgrade { host: relay.host.clone(), detail };
    let failed = |error: hyper::Error| refused(failure(&error));
    let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await.map_err(failed)?;
    tokio::spawn(connection.with_upgrades());
    let request = Request::get("/derp")
        .header(header::HOST, authority(&relay.host, relay.port))
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "DERP")
        .body(Empty::<Bytes>::new())
        .map_err(|error| refused(error.to_string()))?;
    let response = sender.send_request(request).await.map_err(failed)?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(refused(format!("it answered {}", response.status())));
    }
    let upgraded = hyper::upgrade::on(response).await.map_err(failed)?;
    Ok(Box::new(TokioIo::new(upgraded)))
}

/// How an upgrade failed: where the connection ended, in the words that every other end of one has.
fn failure(error: &hyper::Error) -> String {
    let mut causes = successors(error.source(), |&cause| cause.source());
    match causes.find_map(|cause| cause.downcast_ref::<io::Error>()) {
        Some(cause) => ending(cause),
        None if error.is_incomplete_message() || error.is_canceled() => CLOSED.to_owned(),
        None => error.to_string(),
    }
}

/// Changes a TLS stream to DERP inside a WebSocket's binary messages, whose borders mean nothing.
/// Source: derphttp/websocket.go.
pub(super) async fn websocket(io: BoxIo, relay: &Relay) -> Result<BoxIo, DerpError> {
    use tungstenite::client::IntoClientRequest as _;

    let refused = |error: tungstenite::Error| {
        let detail = if let tungstenite::Error::Io(error) = &error { ending(error) } else { error.to_string() };
        DerpError::Upgrade { host: relay.host.clone(), detail }
    };
    let url = format!("wss://{}/derp", authority(&relay.host, relay.port));
    let mut request = url.into_client_request().map_err(refused)?;
    request.headers_mut().insert("Sec-WebSocket-Protocol", header::HeaderValue::from_static("derp"));
    let (socket, _) = tokio_tungstenite::client_async(request, io).await.map_err(refused)?;
    let (sink, stream) = socket.split();
    let reader = StreamReader::new(stream.map(|message| match message {
        Ok(message) => Ok(message.into_data()),
        Err(tungstenite::Error::Io(error)) => Err(error),
        Err(error) => Err(io::Error::other(error)),
    }));
    let sink =
        sink.with(|bytes: Bytes| std::future::ready(Ok::<_, tungstenite::Error>(tungstenite::Message::Binary(bytes))));
    let writer = SinkWriter::new(CopyToBytes::new(sink.sink_map_err(io::Error::other)));
    Ok(Box::new(tokio::io::join(reader, writer)))
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll, ready};

    use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream, ReadBuf};

    use super::*;
    use crate::transport::places::Places;
    use crate::transport::tls::Check;

    /// A stream that ends as rustls ends one whose other side takes no leave.
    struct Unannounced(DuplexStream);

    impl AsyncRead for Unannounced {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            let before = buf.filled().len();
            ready!(Pin::new(&mut self.0).poll_read(cx, buf))?;
            let ended = || io::Error::new(io::ErrorKind::UnexpectedEof, "see https://docs.rs/rustls");
            Poll::Ready(if buf.filled().len() == before { Err(ended()) } else { Ok(()) })
        }
    }

    fn relay() -> Relay {
        Relay { host: "relay".to_owned(), places: Places::named(), port: 443, check: Check::Insecure }
    }

    async fn refusal(io: BoxIo) -> String {
        plain(io, &relay()).await.err().unwrap().to_string()
    }

    #[tokio::test]
    async fn a_connection_that_is_closed_before_the_upgrade_is_told_of_in_our_words() {
        let text = "relay relay refused the upgrade: closed by the other side";
        for announced in [true, false] {
            let (io, mut other) = tokio::io::duplex(4096);
            let io: BoxIo =
                if announced { Box::new(io) } else { Box::new(tokio::io::join(Unannounced(io), tokio::io::sink())) };
            let closing = async move {
                if announced {
                    other.read_u8().await.unwrap();
                }
                tokio::task::yield_now().await;
            };
            assert_eq!(tokio::join!(refusal(io), closing).0, text);
        }
    }

    #[tokio::test]
    async fn an_answer_that_is_no_upgrade_is_told_of() {
        let (io, mut other) = tokio::io::duplex(4096);
        let answering = async {
            other.read_u8().await.unwrap();
            other.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        };
        let text = "relay relay refused the upgrade: it answered 403 Forbidden";
        assert_eq!(tokio::join!(refusal(Box::new(io)), answering).0, text);
    }
}
