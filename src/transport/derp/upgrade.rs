//! From a TLS stream to DERP: by a plain HTTP upgrade, or inside a WebSocket where only those pass.

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::tungstenite;
use tokio_util::io::{CopyToBytes, SinkWriter, StreamReader};

use super::{DerpError, Relay, ending};
use crate::transport::underlay::{BoxIo, authority};

/// Changes a TLS stream to DERP by an HTTP upgrade. Source: derphttp_client.go, `connect`.
pub(super) async fn plain(io: BoxIo, relay: &Relay) -> Result<BoxIo, DerpError> {
    let refused = |detail: String| DerpError::Upgrade { host: relay.host.clone(), detail };
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(io)).await.map_err(|error| refused(error.to_string()))?;
    tokio::spawn(connection.with_upgrades());
    let request = Request::get("/derp")
        .header(header::HOST, authority(&relay.host, relay.port))
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "DERP")
        .body(Empty::<Bytes>::new())
        .map_err(|error| refused(error.to_string()))?;
    let response = sender.send_request(request).await.map_err(|error| refused(error.to_string()))?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(refused(format!("it answered {}", response.status())));
    }
    let upgraded = hyper::upgrade::on(response).await.map_err(|error| refused(error.to_string()))?;
    Ok(Box::new(TokioIo::new(upgraded)))
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
        Err(error) => Err(std::io::Error::other(error)),
    }));
    let sink =
        sink.with(|bytes: Bytes| std::future::ready(Ok::<_, tungstenite::Error>(tungstenite::Message::Binary(bytes))));
    let writer = SinkWriter::new(CopyToBytes::new(sink.sink_map_err(std::io::Error::other)));
    Ok(Box::new(tokio::io::join(reader, writer)))
}
