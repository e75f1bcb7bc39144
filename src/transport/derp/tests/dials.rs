//! Dialling a region, and dialling it again.

use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::*;
use crate::transport::bed::{closed_port, tls_server};

/// Relays that accept, each at an address of its own, and then say nothing: nobody speaks TLS there.
fn silent(count: u8) -> (Vec<std::net::TcpListener>, Vec<Relay>) {
    let relay = |last: u8| {
        let listener = std::net::TcpListener::bind((std::net::Ipv4Addr::new(127, 0, 0, last), 0)).unwrap();
        let at = listener.local_addr().unwrap();
        let relay =
            Relay { host: at.ip().to_string(), places: Places::named(), port: at.port(), check: Check::Insecure };
        (listener, relay)
    };
    (1..=count).map(relay).unzip()
}

/// Has so much time pass, but none in which the kernel works.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

/// A relay, and what has it shake hands with the next connection once so much time has passed.
async fn slow(takes: Duration) -> (Relay, impl AsyncFn() -> TlsStream<TcpStream>) {
    let acceptor = TlsAcceptor::from(Arc::new(tls_server("derp.example").0));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (host, port) = ("127.0.0.1".to_owned(), listener.local_addr().unwrap().port());
    let accept = async move || {
        let (stream, _) = listener.accept().await.unwrap();
        stream.peek(&mut [0]).await.unwrap();
        pass(takes).await;
        acceptor.accept(stream).await.unwrap()
    };
    (Relay { host, places: Places::named(), port, check: Check::Insecure }, accept)
}

/// The request that a relay gets.
async fn request(stream: &mut TlsStream<TcpStream>) -> String {
    let mut request = vec![0; 4096];
    let length = stream.read(&mut request).await.unwrap();
    String::from_utf8(request[..length].to_vec()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn silent_nodes_have_all_the_time_there_is_and_the_first_is_told_of() {
    for count in [1, 5] {
        let (listeners, relays) = silent(count);
        let (_packets, task) = task(relays, Link::default());
        let start = Instant::now();
        let error = task.connect().await.err().unwrap();
        assert_eq!(start.elapsed(), CONNECT_LIMIT, "{error}");
        assert_eq!(error.to_string(), "relay 127.0.0.1 was silent for 10s");
        let dialled = |listener: &&std::net::TcpListener| {
            listener.set_nonblocking(true).unwrap();
            listener.accept().is_ok()
        };
        // The fifth would have its turn after twelve seconds.
        assert_eq!(listeners.iter().filter(dialled).count(), usize::from(count.min(4)));
    }
}

#[tokio::test]
async fn a_node_slower_than_the_pause_before_the_next_connects() {
    let takes = NEXT_NODE + Duration::from_secs(2);
    let (relay, accept) = slow(takes).await;
    let (listeners, mut relays) = silent(1);
    relays.insert(0, relay);
    let (_packets, task) = task(relays, Link::default());
    let start = Instant::now();
    let upgrade = async {
        let mut stream = accept().await;
        assert!(request(&mut stream).await.starts_with("GET /derp HTTP/1.1\r\n"));
        let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: DERP\r\n\r\n";
        stream.write_all(answer.as_bytes()).await.unwrap();
        stream
    };
    let (connected, _stream) = tokio::join!(task.connect(), upgrade);
    assert!(connected.is_ok(), "{:?}", connected.err());
    assert!((takes..CONNECT_LIMIT).contains(&start.elapsed()), "{:?}", start.elapsed());
    assert!(listeners[0].accept().is_ok(), "the next was not tried");
}

#[test]
fn a_plain_upgrade_has_a_trips_time_and_leaves_a_websocket_its_own() {
    let limit = |dial: u64, left: u64| {
        let limit = upgrade_limit(Duration::from_millis(dial), Duration::from_millis(left));
        u64::try_from(limit.as_millis()).ok()
    };
    assert_eq!(limit(30, 9_970), Some(1_500));
    assert_eq!(limit(3_000, 7_000), Some(1_500));
    assert_eq!(limit(4_800, 12_000), Some(1_600), "a trip is longer");
    assert_eq!(limit(3_600, 6_000), Some(1_200), "no more is left");
    assert_eq!(limit(3_600, 5_900), None, "a trip would not fit");
    assert_eq!(limit(6_000, 4_000), None);
}

#[tokio::test]
async fn a_websocket_connects_on_a_slow_line_where_something_swallows_a_plain_upgrade() {
    let trip = Duration::from_secs(1);
    let (relay, accept) = slow(3 * trip).await;
    let (_packets, task) = task(vec![relay], Link::default());
    let upgrade = async {
        let mut swallowed = accept().await;
        assert!(request(&mut swallowed).await.to_ascii_lowercase().contains("upgrade: derp"));
        pass(UPGRADE_LIMIT).await;
        let mut stream = accept().await;
        let request = request(&mut stream).await;
        let key = request.lines().find_map(|line| line.strip_prefix("Sec-WebSocket-Key: ")).unwrap();
        let accepted = tokio_tungstenite::tungstenite::handshake::derive_accept_key(key.as_bytes());
        pass(trip).await;
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Accept: {accepted}\r\nSec-WebSocket-Protocol: derp\r\n\r\n"
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
        (swallowed, stream)
    };
    let connected = tokio::select! {
        (connected, _) = async { tokio::join!(task.connect(), upgrade) } => connected,
        () = tokio::time::sleep(2 * CONNECT_LIMIT) => panic!("the relay was not dialled again"),
    };
    assert!(connected.is_ok(), "{:?}", connected.err());
}

#[tokio::test]
async fn of_several_failures_that_of_a_node_that_answered_is_told_or_else_of_the_first() {
    let closed = |host: &str| {
        let port = closed_port(host).port();
        Relay { host: host.to_owned(), places: Places::named(), port, check: Check::Insecure }
    };
    let failure = async |relays: Vec<Relay>| {
        let (_packets, task) = task(relays, Link::default());
        task.connect().await.err().unwrap().to_string()
    };
    let (first, second) = (closed("127.0.0.1"), closed("127.0.0.2"));
    let text = failure(vec![first.clone(), second]).await;
    assert!(text.starts_with(&format!("cannot connect to 127.0.0.1:{}", first.port)), "{text}");

    let listener = TcpListener::bind("127.0.0.3:0").await.unwrap();
    let turns_away = Relay { port: listener.local_addr().unwrap().port(), ..closed("127.0.0.3") };
    let end = async { drop(listener.accept().await.unwrap()) };
    let (text, ()) = tokio::join!(failure(vec![first, turns_away]), end);
    assert!(text.contains("ended the connection before TLS began"), "{text}");
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_region_out_of_reach_is_tried_more_often_while_packets_are_to_go_there() {
    let port = closed_port("127.0.0.1").port();
    let places = Places::at(&["127.0.0.1".parse().unwrap()]);
    let relay = Relay { host: "relay".to_owned(), places, port, check: Check::Insecure };
    let underlay = underlay(Link::default());
    let id = ConnectionId { region: 1, number: 1 };
    let complaints = Rc::new(RefCell::new(Complaints::new(1)));
    let (region, task) = Region::new(id, vec![relay], NodePrivate::random(), underlay, complaints);
    let tries = Rc::new(std::cell::Cell::new(0));
    let counted = tries.clone();
    spawn_local(task.run(move |_, _| counted.set(counted.get() + 1)));
    tokio::time::sleep(Duration::from_secs(60)).await;
    let in_a_minute = async |packets: usize| {
        let before = tries.get();
        for _ in 0..60 {
            for _ in 0..packets {
                region.send(Packet { peer: NodePublic::from_bytes([9; 32]), contents: vec![7] });
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        tries.get() - before
    };
    assert!((11..=25).contains(&in_a_minute(0).await));
    assert!((28..=61).contains(&in_a_minute(1).await));
}
