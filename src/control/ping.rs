//! What control asks of a node inside the map stream: a sign of life, or an HTTP request to answer ("c2n").
//!
//! The URL to answer at is the server's to choose, so only the control host itself is ever asked: a control server must
//! not be able to send this process to addresses of the machine's own network.
//! Source: Tailscale, control/controlclient/direct.go, `answerPing` and `answerC2NPing`.

use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::debug;
use url::Url;

use super::dial::Session;
use crate::transport::tls::Tls;
use crate::wire::tailcfg::map::{PingRequest, PingResponse};

/// The longest that a sign of life may take. Source: direct.go, `doPingerPing` and `answerHeadPing`.
const HEAD_LIMIT: Duration = Duration::from_secs(15);
/// The longest that a c2n request may take, answer included. Source: direct.go, `answerC2NPing`.
const C2N_LIMIT: Duration = Duration::from_secs(60);
/// The most octets of a c2n request, and of its answer.
const C2N_MAX: usize = 1 << 20;

/// A peer to ping, for whoever can.
#[derive(Debug)]
pub struct PingJob {
    /// `disco`, `TSMP`, `ICMP` or `peerapi`.
    pub kind: String,
    /// Whom.
    pub ip: IpAddr,
    /// Where the outcome goes.
    pub reply: oneshot::Sender<PingResponse>,
}

/// Answers control's questions.
pub(super) struct Answerer {
    control: Url,
    tls: Tls,
    jobs: mpsc::Sender<PingJob>,
}

impl Answerer {
    pub(super) fn new(control: Url, tls: Tls, jobs: mpsc::Sender<PingJob>) -> Self {
        Self { control, tls, jobs }
    }

    /// Answers one question. Failures are logged: control asks again.
    pub(super) async fn answer(&self, session: &Session, ping: PingRequest) {
        let in_session = ping.url_is_noise || ping.types == "c2n";
        let Some(url) = self.permitted(&ping.url, in_session) else {
            debug!("a ping that points away from control is not answered");
            return;
        };
        match ping.types.as_str() {
            "" => self.head(session, &url, in_session).await,
            "c2n" => answer_c2n(session, &url, &ping.payload.0).await,
            types => self.ping_peer(session, &url, in_session, types, ping.ip).await,
        }
    }

    /// The URL to answer at. Inside the session its host means nothing: there is nobody but control. Outside it must be
    /// control's own scheme, host and port.
    fn permitted(&self, text: &str, in_session: bool) -> Option<Url> {
        let url = self.control.join(text).ok()?;
        (in_session || url.origin() == self.control.origin()).then_some(url)
    }

    /// Pings a peer in each of the comma-separated ways, and tells each outcome.
    async fn ping_peer(&self, session: &Session, url: &Url, in_session: bool, types: &str, ip: Option<IpAddr>) {
        let Some(ip) = ip else { return };
        for kind in types.split(',') {
            let (reply, answer) = oneshot::channel();
            if self.jobs.send(PingJob { kind: kind.to_owned(), ip, reply }).await.is_err() {
                return;
            }
            let Ok(response) = answer.await else { return };
            let body = serde_json::to_vec(&response).expect("a response of plain values is JSON");
            if let Err(error) = self.post(session, url, in_session, body).await {
                debug!(error, kind, "a ping's outcome was not told");
            }
        }
    }

    async fn post(&self, session: &Session, url: &Url, in_session: bool, body: Vec<u8>) -> Result<(), String> {
        if in_session {
            let told = timeout(HEAD_LIMIT, session.request(Method::POST, &path_and_query(url), body)).await;
            return told.map_err(|_| "no answer".to_owned())?.map(drop).map_err(|error| error.to_string());
        }
        let client = self.client().map_err(|error| error.to_string())?;
        client.post(url.clone()).body(body).send().await.map(drop).map_err(|error| error.to_string())
    }

    async fn head(&self, session: &Session, url: &Url, in_session: bool) {
        let outcome = if in_session {
            let asked = timeout(HEAD_LIMIT, session.request(Method::HEAD, &path_and_query(url), Vec::new())).await;
            asked.map_err(|_| "no answer".to_owned()).and_then(|sent| sent.map_err(|error| error.to_string())).map(drop)
        } else {
            self.head_outside(url).await.map_err(|error| error.to_string())
        };
        if let Err(error) = outcome {
            debug!(error, "control's ping was not answered");
        }
    }

    async fn head_outside(&self, url: &Url) -> Result<(), reqwest::Error> {
        self.client()?.head(url.clone()).send().await.map(drop)
    }

    fn client(&self) -> Result<reqwest::Client, reqwest::Error> {
        let tls = self.tls.trusted().as_ref().clone();
        let redirects = reqwest::redirect::Policy::none();
        let client = reqwest::Client::builder().tls_backend_preconfigured(tls).no_proxy().redirect(redirects);
        client.timeout(HEAD_LIMIT).build()
    }
}

fn path_and_query(url: &Url) -> String {
    url[url::Position::BeforePath..url::Position::AfterQuery].to_owned()
}

/// Runs the HTTP/1.1 request in `payload` and posts the whole answer, head and body, to `url` inside the session.
async fn answer_c2n(session: &Session, url: &Url, payload: &[u8]) {
    let outcome = timeout(C2N_LIMIT, async {
        let answer = run_c2n(payload).await?;
        session.request(Method::POST, &path_and_query(url), answer).await.map_err(std::io::Error::other)
    });
    match outcome.await {
        Ok(Ok(response)) => debug!(status = response.status().as_u16(), "answered control's request"),
        Ok(Err(error)) => debug!(%error, "control's request was not answered"),
        Err(_) => debug!("control's request took too long"),
    }
}

/// An HTTP server for one request, which comes from memory and is answered into memory.
async fn run_c2n(payload: &[u8]) -> std::io::Result<Vec<u8>> {
    let (mut ours, theirs) = tokio::io::duplex(C2N_MAX);
    ours.write_all(payload.get(..C2N_MAX).unwrap_or(payload)).await?;
    ours.shutdown().await?;
    let served = http1::Builder::new()
        .half_close(true)
        .keep_alive(false)
        .serve_connection(TokioIo::new(theirs), service_fn(local_api));
    let mut answer = Vec::new();
    let (served, read) = tokio::join!(served, ours.read_to_end(&mut answer));
    read?;
    served.map_err(std::io::Error::other)?;
    Ok(answer)
}

/// What control may ask of this node: only to say its own words back. Source: ipn/ipnlocal/c2n.go, `handleC2NEcho`.
async fn local_api(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, std::convert::Infallible> {
    let mut response = Response::new(Full::default());
    if request.uri().path() == "/echo" {
        match Limited::new(request.into_body(), C2N_MAX).collect().await {
            Ok(body) => *response.body_mut() = Full::new(body.to_bytes()),
            Err(_) => *response.status_mut() = StatusCode::PAYLOAD_TOO_LARGE,
        }
    } else {
        *response.status_mut() = StatusCode::BAD_REQUEST;
        *response.body_mut() = Full::from("unknown c2n path");
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answerer() -> Answerer {
        let control = Url::parse("https://control.example:8443").unwrap();
        Answerer::new(control, Tls::load(None).unwrap(), mpsc::channel(1).0)
    }

    #[test]
    fn only_control_itself_is_ever_asked() {
        let answerer = answerer();
        for url in ["https://control.example:8443/machine/ping-response?id=1", "/machine/ping?x"] {
            assert!(answerer.permitted(url, false).is_some(), "{url}");
        }
        let elsewhere = [
            "http://169.254.169.254/latest",
            "http://control.example:8443/",
            "https://control.example/",
            "https://control.example:9090/",
            "https://control.example.evil:8443/",
            "file:///etc/passwd",
            "//evil/",
        ];
        for url in elsewhere {
            assert!(answerer.permitted(url, false).is_none(), "{url}");
        }
    }

    #[test]
    fn inside_the_session_the_host_means_nothing() {
        let url = answerer().permitted("https://unused/machine/c2n?id=1", true).unwrap();
        assert_eq!(path_and_query(&url), "/machine/c2n?id=1");
    }

    #[test]
    fn the_path_keeps_its_query() {
        let url = Url::parse("https://control.example/machine/ping-response?id=a%20b").unwrap();
        assert_eq!(path_and_query(&url), "/machine/ping-response?id=a%20b");
    }

    #[tokio::test]
    async fn an_echo_comes_back_as_a_whole_http_answer() {
        let request = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello";
        let answer = String::from_utf8(run_c2n(request).await.unwrap()).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nhello"), "{answer}");
    }

    #[tokio::test]
    async fn other_paths_are_refused() {
        let answer = String::from_utf8(run_c2n(b"GET /update HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap()).unwrap();
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
}
