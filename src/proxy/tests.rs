//! The proxy as a whole: its limit, its end, and what it speaks.

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::proxy::bed::{asked, expect_bytes, read_head};

#[test]
fn connection_over_the_limit_is_answered_in_its_own_protocol() {
    bed::run(async {
        let bed = bed::start(Config { max_connections: 1, ..Config::default() });
        let echo = bed::echo().await;
        let mut first = bed.connect().await;
        first.write_all(format!("CONNECT {echo} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
        read_head(&mut first).await;
        let answer = bed.ask_text(&format!("CONNECT {echo} HTTP/1.1\r\n\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("retry-after: 1\r\n"), "{answer}");
        assert!(answer.contains("error=connection_limit_reached"), "{answer}");
        let port = echo.port().to_be_bytes();
        let answer = bed.ask(&[5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, port[0], port[1]]).await;
        assert_eq!(answer[..4], [5, 0, 5, 1]);
        assert_eq!(bed.stats.counters().active, 1);
        // The open one is none the worse for it.
        first.write_all(b"still here").await.unwrap();
        expect_bytes(&mut first, b"still here").await;
    });
}

#[test]
fn drain_lets_open_tunnels_finish_and_answers_newcomers() {
    bed::run(async {
        let (bed, echo) = (bed::start(Config::default()), bed::echo().await);
        let mut open = bed.connect().await;
        open.write_all(format!("CONNECT {echo} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
        read_head(&mut open).await;
        let mut idle = bed.connect().await;
        bed.drain.cancel();
        assert_eq!(idle.read(&mut [0]).await.unwrap(), 0);
        let answer = bed.ask_text("GET http://a.corp/ HTTP/1.1\r\n\r\n").await;
        assert!(
            answer.starts_with("HTTP/1.1 503 ") && answer.contains(&Fault::from(&fault::DRAINING).code()),
            "{answer}"
        );
        open.write_all(b"bye").await.unwrap();
        expect_bytes(&mut open, b"bye").await;
        assert!(!bed.served.is_finished());
        drop(open);
        bed.served.await.unwrap().unwrap();
    });
}

#[test]
fn drain_answers_connections_that_wait_for_their_dial() {
    bed::run(async {
        let (bed, silent) = (bed::start(Config::default()), bed::Silent::new().await);
        let port = silent.address.port().to_be_bytes();
        let requests = [
            vec![5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, port[0], port[1]],
            format!("CONNECT {} HTTP/1.1\r\n\r\n", silent.address).into_bytes(),
            format!("GET http://{}/ HTTP/1.1\r\n\r\n", silent.address).into_bytes(),
        ];
        let asking = requests.iter().map(|request| bed.ask(request));
        let drained = async {
            bed::settle().await;
            assert_eq!(bed.stats.counters().active, 3);
            bed.drain.cancel();
        };
        let (answers, ()) = tokio::join!(futures_util::future::join_all(asking), drained);
        assert_eq!(answers[0], [5, 0, 5, 1, 0, 1, 0, 0, 0, 0, 0, 0]);
        for answer in &answers[1..] {
            let answer = String::from_utf8_lossy(answer);
            assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("TC-2010"), "{answer}");
        }
        bed.served.await.unwrap().unwrap();
    });
}

/// A client and its target after a change of protocols. What came behind the target's answer to it is the tunnel's.
async fn half_behind_an_upgrade(bed: &bed::Bed) -> (TcpStream, TcpStream) {
    let upgrade = "Connection: upgrade\r\nUpgrade: other\r\n\r\n";
    let (mut client, mut target) = asked(bed, &format!("GET http://TARGET/ HTTP/1.1\r\n{upgrade}")).await;
    read_head(&mut target).await;
    target.write_all(format!("HTTP/1.1 101 Switching Protocols\r\n{upgrade}half").as_bytes()).await.unwrap();
    read_head(&mut client).await;
    expect_bytes(&mut client, b"half").await;
    (client, target)
}

#[test]
fn whatever_is_cut_at_the_end_is_reset() {
    bed::run(async {
        let bed = bed::start(Config::default());
        let echo = bed::echo().await;
        let mut cut = Vec::new();
        let mut connect = bed.connect().await;
        connect.write_all(format!("CONNECT {echo} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
        read_head(&mut connect).await;
        let mut socks = bed.connect().await;
        let port = echo.port().to_be_bytes();
        socks.write_all(&[5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, port[0], port[1]]).await.unwrap();
        socks.read_exact(&mut [0; 12]).await.unwrap();
        for mut tunnel in [connect, socks] {
            tunnel.write_all(b"half").await.unwrap();
            expect_bytes(&mut tunnel, b"half").await;
            cut.push((tunnel, None));
        }
        for (version, framing) in [("1.1", "Transfer-Encoding: chunked\r\n"), ("1.1", ""), ("1.0", "")] {
            let (mut client, mut target) = asked(&bed, &format!("GET http://TARGET/ HTTP/{version}\r\n\r\n")).await;
            read_head(&mut target).await;
            let body = if framing.is_empty() { "half" } else { "4\r\nhalf\r\n" };
            target.write_all(format!("HTTP/1.1 200 OK\r\n{framing}\r\n{body}").as_bytes()).await.unwrap();
            read_head(&mut client).await;
            expect_bytes(&mut client, if version == "1.0" { b"half" } else { b"4\r\nhalf\r\n" }).await;
            cut.push((client, Some(target)));
        }
        let (client, target) = half_behind_an_upgrade(&bed).await;
        cut.push((client, Some(target)));
        let mut idle = bed.connect().await;
        idle.write_all(format!("CONNECT {echo} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
        read_head(&mut idle).await;
        cut.push((idle, None));
        // Nothing of these is lost: they say nothing yet, half a head, or are between two requests.
        let (mut silent, mut begun, mut kept) = (bed.connect().await, bed.connect().await, bed.connect().await);
        begun.write_all(b"GET http://a.corp/ HTTP/1.1\r\n").await.unwrap();
        kept.write_all(b"GET http://a.corp/ HTTP/1.1\r\n\r\n").await.unwrap();
        read_head(&mut kept).await;
        bed::settle().await;
        assert_eq!(bed.stats.counters().active, 10);
        assert_eq!(bed.stats.counters().unfinished, 7);
        bed.drain.cancel();
        bed::settle().await;
        assert_eq!(bed.stats.counters().unfinished, 7);
        bed.served.abort();
        bed.until_closed().await;
        let counters = bed.stats.counters();
        assert_eq!((counters.unfinished, counters.cut_idle, counters.sent), (0, 1, 8));
        for idle in [&mut silent, &mut kept] {
            idle.read_to_end(&mut Vec::new()).await.unwrap();
        }
        for (mut client, _target) in cut {
            assert_eq!(client.read(&mut [0; 9]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        }
    });
}

#[test]
fn a_connection_that_waits_for_a_request_at_the_end_is_not_reset() {
    bed::run(async {
        let bed = bed::start(Config::default());
        let (mut client, mut target) = asked(&bed, "GET http://TARGET/ HTTP/1.1\r\n\r\n").await;
        read_head(&mut target).await;
        target.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwhole").await.unwrap();
        read_head(&mut client).await;
        expect_bytes(&mut client, b"whole").await;
        bed.drain.cancel();
        assert_eq!(client.read(&mut [0; 9]).await.unwrap(), 0);
        drop(client);
        bed.served.await.unwrap().unwrap();
    });
}

#[test]
fn little_of_a_connection_stays_in_memory_while_it_carries_bytes() {
    bed::run(async {
        let bed = bed::start(Config::default());
        let node = Node::alone(crate::node::Config::default());
        let proxy = Rc::new(Proxy {
            node,
            config: Config::default(),
            stats: Arc::clone(&bed.stats),
            own: RefCell::new(OwnListeners::new(Vec::new())),
            drain: CancellationToken::new(),
            cut: CancellationToken::new(),
            overflow: Arc::new(Semaphore::new(1)),
            mappings: Arc::new(Semaphore::new(1)),
        });
        let client = bed.connect().await;
        let size = size_of_val(&counted(proxy, client, bed.address));
        assert!(size < 2_048, "{size} bytes");
    });
}

#[test]
fn protocols_are_counted() {
    bed::run(async {
        let bed = bed::start(Config::default());
        for first in [&[5, 0][..], &[4, 1], b"G\n", &[0]] {
            bed.ask(first).await;
        }
        let accepted = bed.stats.counters().accepted;
        let once =
            [Protocol::Socks5, Protocol::Socks4, Protocol::Http, Protocol::Unknown].map(|protocol| (protocol, 1));
        assert_eq!(accepted, once.into());
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_end_without_panic(first in prop_oneof![Just(4_u8), Just(5), Just(b'G'), any::<u8>()], rest: Vec<u8>) {
        bed::run(async {
            let bed = bed::start(Config { head_timeout: Duration::from_millis(20), ..Config::default() });
            let mut client = bed.connect().await;
            client.write_all(&[&[first][..], &rest].concat()).await.unwrap();
            client.shutdown().await.unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            bed.drain.cancel();
            bed.served.await.unwrap().unwrap();
            assert!(!answer.is_empty());
        });
    }
}
