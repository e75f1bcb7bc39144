//! Questions to resolvers that answer as the test wants, on this machine: how often they are asked, and what their
//! answers come to.

use std::cell::Cell;
use std::net::Ipv4Addr;
use std::time::Duration;

use bytes::Bytes;
use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::{A, SOA};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::networks::Network;
use super::servers::Server;
use super::*;
use crate::node::{Config, Node};
use crate::transport::bed::tls_server;

const SOON: Duration = Duration::from_secs(8);
type Asked = Rc<RefCell<std::collections::HashSet<(u16, RecordType)>>>;

/// What is answered to a question: addresses in IPv4 alone.
fn answer(question: &[u8], code: ResponseCode, ttl: u32) -> Vec<u8> {
    let question = Message::from_vec(question).unwrap();
    let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
    answer.metadata.message_type = MessageType::Response;
    answer.metadata.response_code = code;
    let query = question.queries[0].clone();
    let name = query.name().clone();
    if code == ResponseCode::NoError && query.query_type() == RecordType::A {
        answer.add_answer(Record::from_rdata(name, ttl, RData::A(A::new(10, 20, 0, 80))));
    } else {
        let root = Name::from_ascii("root.example.").unwrap();
        answer.authorities.push(Record::from_rdata(
            name,
            ttl,
            RData::SOA(SOA::new(root.clone(), root, 1, 1, 1, 1, ttl)),
        ));
    }
    answer.add_query(query);
    answer.to_vec().unwrap()
}

/// A resolver by UDP, and the ids and families of what it is asked: a question that is repeated is still one.
async fn plain(code: ResponseCode, ttl: u32) -> (Candidate, Asked) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let (address, asked) = (socket.local_addr().unwrap(), Asked::default());
    let noted = asked.clone();
    spawn_local(async move {
        let mut buffer = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let question = Message::from_vec(&buffer[..length]).unwrap();
            noted.borrow_mut().insert((question.metadata.id, question.queries[0].query_type()));
            socket.send_to(&answer(&buffer[..length], code, ttl), from).await.unwrap();
        }
    });
    let (resolver, server) = (ResolverAddr::Plain { addr: address }, Server::Plain(address, Network::Underlay));
    (Candidate { resolver, server, label: address.to_string(), peer: None }, asked)
}

/// A resolver that overhears the first datagram, cuts the answer to the second, and tells all by TCP.
async fn terse() -> Candidate {
    let (listener, socket) = loop {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        // Another may have the same port by UDP.
        if let Ok(socket) = UdpSocket::bind(listener.local_addr().unwrap()).await {
            break (listener, socket);
        }
    };
    let address = socket.local_addr().unwrap();
    spawn_local(async move {
        let (mut buffer, mut overheard) = ([0; 1500], std::collections::HashSet::new());
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            if !overheard.insert(from) {
                let mut cut = Message::from_vec(&answer(&buffer[..length], ResponseCode::NoError, 60)).unwrap();
                (cut.metadata.truncation, cut.answers) = (true, Vec::new());
                socket.send_to(&cut.to_vec().unwrap(), from).await.unwrap();
            }
        }
    });
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut question = vec![0; stream.read_u16().await.unwrap().into()];
            stream.read_exact(&mut question).await.unwrap();
            let answer = answer(&question, ResponseCode::NoError, 60);
            stream.write_u16(answer.len().try_into().unwrap()).await.unwrap();
            stream.write_all(&answer).await.unwrap();
        }
    });
    let (resolver, server) = (ResolverAddr::Plain { addr: address }, Server::Plain(address, Network::Underlay));
    Candidate { resolver, server, label: address.to_string(), peer: None }
}

/// What a resolver by HTTP does with its connections.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Habit {
    Keeps,
    /// It forgets each connection after one answer and says nothing.
    Hangs,
    /// It closes each after one answer, once the next question comes.
    Closes,
}

/// A resolver by HTTP that answers `response`, or the question where that is empty; counts connections and keeps heads.
async fn http(habit: Habit, response: &'static str) -> (Candidate, Rc<Cell<usize>>, Rc<RefCell<Vec<String>>>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (connections, heads) = (Rc::new(Cell::new(0)), Rc::new(RefCell::new(Vec::new())));
    let (counted, noted) = (connections.clone(), heads.clone());
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counted.set(counted.get() + 1);
            spawn_local(serve(stream, habit, response, noted.clone()));
        }
    });
    let resolver = ResolverAddr::PeerApi { ip: address.ip(), port: address.port(), path: "/dns-query".to_owned() };
    let uri = format!("http://{address}/dns-query").parse().unwrap();
    let server = Server::Http(doh::Server { uri, addresses: vec![address.ip()], network: Network::Underlay });
    (Candidate { resolver, server, label: "connector c (http)".to_owned(), peer: None }, connections, heads)
}

async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    habit: Habit,
    response: &'static str,
    heads: Rc<RefCell<Vec<String>>>,
) {
    let mut answered = 0;
    while let Some((head, body)) = read_request(&mut stream).await {
        heads.borrow_mut().push(head);
        match habit {
            Habit::Hangs if answered > 0 => std::future::pending().await,
            Habit::Closes if answered > 0 => return,
            Habit::Keeps | Habit::Hangs | Habit::Closes => {}
        }
        let octets = if response.is_empty() {
            let answer = answer(&body, ResponseCode::NoError, 0);
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/dns-message\r\nContent-Length: {}\r\n\r\n",
                answer.len()
            );
            [head.as_bytes(), &answer].concat()
        } else {
            response.as_bytes().to_vec()
        };
        if stream.write_all(&octets).await.is_err() {
            return;
        }
        answered += 1;
    }
}

async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> Option<(String, Vec<u8>)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap().parse().unwrap();
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some((head, body))
}

fn node() -> Node {
    Node::alone(Config::default())
}

fn key(name: &str, candidate: &Candidate) -> Key {
    (name.to_owned(), vec![candidate.resolver.clone()])
}

async fn told(mut answer: watch::Receiver<Option<Outcome>>) -> Outcome {
    let outcome = timeout(SOON, answer.wait_for(Option::is_some)).await.unwrap().unwrap().clone();
    outcome.unwrap()
}

async fn outcome(resolvers: &Resolvers, name: &str, candidates: &[&Candidate]) -> Outcome {
    let candidates: Vec<_> = candidates.iter().copied().cloned().collect();
    told(resolvers.put(key(name, &candidates[0]), candidates, None)).await
}

fn found() -> Outcome {
    Ok(vec![[10, 20, 0, 80].into()])
}

#[tokio::test(flavor = "local")]
async fn a_name_that_many_want_is_asked_once_and_whoever_leaves_takes_nothing_away() {
    let node = node();
    let resolvers = &node.inner.resolvers;
    let (candidate, asked) = plain(ResponseCode::NoError, 60).await;
    let key = key("a.example", &candidate);
    let first = resolvers.put(key.clone(), vec![candidate], None);
    let memory = || resolvers.memory.borrow();
    let others: Vec<_> = (0..20).map(|_| memory().underway.get(&key).cloned().unwrap()).collect();
    drop(first);
    for other in others {
        assert_eq!(told(other).await, found());
    }
    assert_eq!(asked.borrow().len(), 2, "once in each family");
    assert_eq!(memory().answers.find(&key, Instant::now()), Some(found()));
    assert!(memory().underway.is_empty());
}

#[tokio::test(flavor = "local")]
async fn what_is_remembered_is_told_without_asking_and_forgotten_on_demand_and_with_the_settings() {
    let node = node();
    let resolvers = &node.inner.resolvers;
    let netmap = {
        let message =
            json!({"Node": {"ID": 1, "Name": "me.tb.example.", "Key": format!("nodekey:{}01", "00".repeat(31))}});
        let message = serde_json::from_value(message).unwrap();
        let mut session = crate::netmap::session::Session::new(true);
        session.apply(message, jiff::Timestamp::UNIX_EPOCH).unwrap().netmap.unwrap()
    };
    let (candidate, asked) = plain(ResponseCode::NXDomain, 60).await;
    assert!(matches!(outcome(resolvers, "a.example", &[&candidate]).await, Err(ResolveError::NxDomain { .. })));
    let again = resolvers.ask(&netmap, key("a.example", &candidate), Ask::Remembered).await;
    assert!(matches!(again, Err(ResolveError::NxDomain { .. })), "{again:?}");
    assert_eq!(asked.borrow().len(), 2);
    // Nobody routes loopback, so that asking anew fails: what matters is that the memory does not answer.
    let anew = resolvers.ask(&netmap, key("a.example", &candidate), Ask::Anew).await;
    assert!(matches!(anew, Err(ResolveError::Unreachable { .. })), "{anew:?}");

    assert!(outcome(resolvers, "b.example", &[&candidate]).await.is_err());
    let settings = DnsConfig { proxied: true, ..DnsConfig::default() };
    resolvers.go_by(&Arc::new(settings));
    assert_eq!(resolvers.memory.borrow().answers.find(&key("b.example", &candidate), Instant::now()), None);
}

#[tokio::test(flavor = "local")]
async fn a_question_that_nobody_waits_for_keeps_its_place_until_it_ends() {
    let node = node();
    let resolvers = &node.inner.resolvers;
    let (candidate, _) = plain(ResponseCode::NoError, 60).await;
    let permit = resolvers.questions.clone().try_acquire_owned().unwrap();
    drop(resolvers.put(key("a.example", &candidate), vec![candidate.clone()], Some(permit)));
    assert_eq!(resolvers.questions.available_permits(), QUESTIONS - 1);
    let all = resolvers.questions.clone().acquire_many_owned(u32::try_from(QUESTIONS).unwrap());
    drop(timeout(SOON, all).await.unwrap());
    assert_eq!(resolvers.memory.borrow().answers.find(&key("a.example", &candidate), Instant::now()), Some(found()));
}

#[tokio::test(flavor = "local")]
async fn a_lost_datagram_is_sent_again_and_what_does_not_fit_one_comes_by_tcp() {
    let node = node();
    let candidate = terse().await;
    assert_eq!(outcome(&node.inner.resolvers, "a.example", &[&candidate]).await, found());
}

#[tokio::test(flavor = "local")]
async fn a_question_by_http_carries_nothing_but_what_it_needs_and_keeps_its_connection() {
    let node = node();
    let (candidate, connections, heads) = http(Habit::Keeps, "").await;
    for name in ["a.example", "b.example", "c.example"] {
        assert_eq!(outcome(&node.inner.resolvers, name, &[&candidate]).await, found());
    }
    assert!(connections.get() <= 2, "one for each family, not {}", connections.get());
    for head in heads.borrow().iter() {
        let mut fields: Vec<_> = head.lines().skip(1).filter_map(|line| Some(line.split_once(':')?.0)).collect();
        fields.sort_unstable();
        assert_eq!(fields, ["accept", "content-length", "content-type", "host"], "{head}");
        assert!(head.starts_with("post /dns-query http/1.1\r\n"), "{head}");
    }
}

#[tokio::test(flavor = "local")]
async fn a_kept_connection_that_has_died_does_not_fail_the_question() {
    let node = node();
    for habit in [Habit::Closes, Habit::Hangs] {
        let (candidate, ..) = http(habit, "").await;
        for name in ["a.example", "b.example", "c.example"] {
            assert_eq!(outcome(&node.inner.resolvers, name, &[&candidate]).await, found());
        }
    }
}

/// A resolver by HTTPS that speaks `protocol`, and the roots that trust it.
async fn https(protocol: &'static [u8]) -> (Candidate, tempfile::TempDir) {
    let (mut config, certificate) = tls_server("dns.example");
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("ca.pem"), certificate).unwrap();
    config.alpn_protocols = vec![protocol.to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // A client that does not trust us ends here.
            let Ok(stream) = acceptor.accept(stream).await else { continue };
            match protocol {
                b"h2" => drop(spawn_local(serve_h2(stream))),
                _ => drop(spawn_local(serve(stream, Habit::Keeps, "", Rc::default()))),
            }
        }
    });
    let resolver = ResolverAddr::Plain { addr: address };
    let uri = format!("https://dns.example:{}/dns-query", address.port()).parse().unwrap();
    let server = Server::Http(doh::Server { uri, addresses: vec![address.ip()], network: Network::Underlay });
    (Candidate { resolver, server, label: "dns.example".to_owned(), peer: None }, folder)
}

async fn serve_h2(stream: impl AsyncRead + AsyncWrite + Unpin + 'static) {
    let service = hyper::service::service_fn(|request: hyper::Request<hyper::body::Incoming>| async move {
        let question = request.into_body().collect().await?.to_bytes();
        let answer = Full::<Bytes>::from(answer(&question, ResponseCode::NoError, 0));
        let response = hyper::Response::builder().header("content-type", "application/dns-message");
        Ok::<_, hyper::Error>(response.body(answer).unwrap())
    });
    let connection = hyper::server::conn::http2::Builder::new(LocalExecutor);
    // The client's end is no failure.
    let _ = connection.serve_connection(TokioIo::new(stream), service).await;
}

#[derive(Clone)]
struct LocalExecutor;

impl<F: Future + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, task: F) {
        spawn_local(async move { drop(task.await) });
    }
}

#[tokio::test(flavor = "local")]
async fn a_resolver_by_https_is_asked_by_either_http_and_only_where_its_certificate_is_trusted() {
    let node = node();
    for protocol in [b"h2".as_slice(), b"http/1.1"] {
        let (candidate, folder) = https(protocol).await;
        let error = outcome(&node.inner.resolvers, "a.example", &[&candidate]).await.unwrap_err().to_string();
        assert!(error.contains("certificate"), "{error}");
        let config = Config { ca_file: Some(folder.path().join("ca.pem")), ..Config::default() };
        let trusting = Node::alone(config);
        assert_eq!(outcome(&trusting.inner.resolvers, "a.example", &[&candidate]).await, found());
    }
}

#[tokio::test(flavor = "local")]
async fn everything_else_that_http_says_has_its_answer() {
    let node = node();
    for (response, expected) in [
        ("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "connector c (http) does not let this node ask"),
        ("HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", "answered HTTP 502"),
        (
            "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nhi",
            "HTTP content of type \"text/html\"",
        ),
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "HTTP content of type \"none\""),
        (
            "HTTP/1.1 200 OK\r\nContent-Type: application/dns-message\r\nContent-Length: 2\r\n\r\nhi",
            "answered no DNS message",
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Type: application/dns-message\r\nContent-Length: 99999\r\n\r\n",
            "answered more than 65536 octets",
        ),
        ("SSH-2.0-x\r\n", "cannot be reached"),
    ] {
        let (candidate, ..) = http(Habit::Keeps, response).await;
        let error = outcome(&node.inner.resolvers, "a.example", &[&candidate]).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{response}: {error}");
    }
}

#[tokio::test(flavor = "local")]
async fn a_connector_that_fails_or_is_silent_is_passed_over_and_the_next_is_chosen() {
    let node = node();
    let resolvers = &node.inner.resolvers;
    let (refusing, ..) = http(Habit::Keeps, "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").await;
    let silent_port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let (mut silent, good) = (refusing.clone(), http(Habit::Keeps, "").await.0);
    if let Server::Http(server) = &mut silent.server {
        server.uri = format!("http://{}/dns-query", silent_port.local_addr().unwrap()).parse().unwrap();
    }
    for first in [&refusing, &silent] {
        let begun = Instant::now();
        assert_eq!(outcome(resolvers, "a.example", &[first, &good]).await, found());
        assert!(begun.elapsed() < Duration::from_secs(3), "the next one need not wait for the first");
        assert_eq!(resolvers.memory.borrow().chosen.get(&key("", first).1), Some(&good.resolver));
    }
    assert!(outcome(resolvers, "b.example", &[&refusing]).await.is_err());
    assert_eq!(resolvers.memory.borrow().chosen.get(&key("", &refusing).1), None);
}

#[test]
fn the_machine_itself_and_odd_addresses_are_nothing_to_ask() {
    for name in ["localhost", "a.localhost.", "LOCALHOST", "0x7f000001", "2130706433", "127.1", "10.0x1"] {
        assert!(is_local(name), "{name}");
    }
    for name in ["web", "localhost.corp.test", "v4", "0xzz", "1password"] {
        assert!(!is_local(name), "{name}");
    }
}
