//! Connections outside the tailnet: what may be one, and how one ends.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;
use crate::node::bed::pair;

/// What a socket of [`slow_pair`] takes at once, though its other end does not.
const MUCH: usize = 128 << 10;

/// Two connected sockets: the first takes little before it is read, the second holds much for it.
async fn slow_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialling = TcpSocket::new_v4().unwrap();
    dialling.set_recv_buffer_size(4 << 10).unwrap();
    let slow = dialling.connect(listener.local_addr().unwrap()).await.unwrap();
    let holder = listener.accept().await.unwrap().0;
    // Together with what the kernel counts besides the octets.
    sockopt::set_socket_send_buffer_size(&holder, 3 * MUCH).unwrap();
    (slow, holder)
}

/// What a splice carried each way, and how it ended.
async fn counted(far: TcpStream, near: TcpStream, early: &'static [u8]) -> (u64, u64, io::Result<Ended>) {
    let carried = Carried::default();
    let ended = splice(far, near, early, &carried).await;
    (carried.sent.get(), carried.received.get(), ended)
}

/// A client and a target with a splice between them.
async fn spliced(early: &'static [u8]) -> (TcpStream, TcpStream, JoinHandle<(u64, u64, io::Result<Ended>)>) {
    let (client, near) = pair().await;
    let (far, target) = pair().await;
    let splice = tokio::task::spawn_local(counted(far, near, early));
    (client, target, splice)
}

const SOON: Duration = Duration::from_secs(5);

#[test]
fn what_leaves_the_tailnet_is_counted_and_the_list_is_bounded() {
    let rule = DirectRule::Name("cdn.example".into());
    let target = |port| Target { host: Host::Name("cdn.example".into()), port };
    let mut outside = Outside::default();
    for port in (1..=1_500).chain([1]) {
        outside.note(&target(port), &rule);
    }
    let counted = outside.destinations();
    assert_eq!((counted["cdn.example:1"], counted["cdn.example:2"], counted[OTHERS]), (2, 1, 500));
    assert_eq!(counted.len(), DESTINATIONS + 1);
}

#[test]
fn a_name_under_a_suffix_means_this_machine_only_where_its_address_is_allowed() {
    let suffix = DirectRule::Suffix("example".into());
    let (name, host) = (DirectRule::Name("me.example".into()), DirectRule::Net("127.0.0.0/8".parse().unwrap()));
    let may = |rules: &[&DirectRule], ip: &str| {
        let rules: Vec<DirectRule> = rules.iter().map(|rule| (*rule).clone()).collect();
        may_mean(&rules, "me.example", ip.parse().unwrap())
    };
    for near in ["127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "fe80::1", "0.0.0.0"] {
        assert!(!may(&[&suffix], near), "{near}");
        assert!(may(&[&suffix, &name], near), "{near}");
    }
    assert!(may(&[&suffix, &host], "127.0.0.1") && !may(&[&suffix, &host], "169.254.169.254"));
    assert!(may(&[&suffix], "203.0.113.9") && may(&[&suffix], "192.168.1.1"));
}

#[tokio::test(flavor = "local")]
async fn half_close_passes_and_the_other_direction_goes_on() {
    let (mut client, mut target, splice) = spliced(b"early ").await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut question = String::new();
    timeout(SOON, target.read_to_string(&mut question)).await.unwrap().unwrap();
    assert_eq!(question, "early question");
    target.write_all(b"answer").await.unwrap();
    drop(target);
    let mut answer = String::new();
    timeout(SOON, client.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, "answer");
    assert!(matches!(splice.await.unwrap(), (14, 6, Ok(Ended::Closed))));
}

#[tokio::test(flavor = "local")]
async fn a_client_that_half_closed_is_waited_for_until_it_is_gone() {
    let (mut client, mut target, splice) = spliced(b"").await;
    client.shutdown().await.unwrap();
    assert_eq!(timeout(SOON, target.read(&mut [0])).await.unwrap().unwrap(), 0);
    target.write_all(b"slow").await.unwrap();
    let mut answer = [0; 4];
    timeout(SOON, client.read_exact(&mut answer)).await.unwrap().unwrap();
    assert!(!splice.is_finished());
    client.set_zero_linger().unwrap();
    drop(client);
    assert!(matches!(timeout(SOON, splice).await.unwrap().unwrap(), (0, 4, Err(_))));
}

#[tokio::test(flavor = "local")]
async fn an_answer_that_is_still_on_its_way_at_the_end_arrives_whole() {
    let ((mut client, near), (far, mut target)) = (slow_pair().await, pair().await);
    let splice = tokio::task::spawn_local(counted(far, near, b""));
    client.shutdown().await.unwrap();
    target.write_all(&vec![7; MUCH]).await.unwrap();
    drop(target);
    let (_, received, _) = timeout(SOON, splice).await.unwrap().unwrap();
    assert_eq!(received, MUCH as u64);
    let mut answer = Vec::new();
    timeout(SOON, client.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer.len(), MUCH);
}

#[tokio::test(flavor = "local")]
async fn what_a_client_sent_to_its_end_arrives_although_the_client_is_gone() {
    let ((mut client, near), (mut target, far)) = (pair().await, slow_pair().await);
    let watched = near.as_fd().try_clone_to_owned().unwrap();
    let splice = tokio::task::spawn_local(counted(far, near, b""));
    client.write_all(&vec![7; MUCH]).await.unwrap();
    client.shutdown().await.unwrap();
    let heard = async {
        while !sockopt::socket_keepalive(&watched).unwrap() {
            tokio::task::yield_now().await
        }
    };
    timeout(SOON, heard).await.unwrap();
    client.set_zero_linger().unwrap();
    drop(client);
    let (sent, _, _) = timeout(SOON, splice).await.unwrap().unwrap();
    assert_eq!(sent, MUCH as u64);
    let mut question = Vec::new();
    timeout(SOON, target.read_to_end(&mut question)).await.unwrap().unwrap();
    assert_eq!(question.len(), MUCH);
}

#[tokio::test(flavor = "local")]
async fn reset_of_the_client_is_seen_while_the_target_takes_nothing() {
    let (mut client, mut target, splice) = spliced(b"").await;
    let more = vec![7; MUCH];
    while timeout(Duration::from_millis(200), client.write(&more)).await.is_ok() {}
    assert!(!splice.is_finished());
    client.set_zero_linger().unwrap();
    drop(client);
    assert!(matches!(timeout(SOON, splice).await.unwrap().unwrap(), (1.., _, Err(_))));
    let error = timeout(SOON, target.read_to_end(&mut Vec::new())).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "local")]
async fn whole_answer_arrives_although_the_client_could_still_send_when_all_is_cut() {
    let ((mut client, near), (far, mut target)) = (slow_pair().await, pair().await);
    let watched = near.as_fd().try_clone_to_owned().unwrap();
    end_by_reset(&near);
    let splice = tokio::task::spawn_local(counted(far, near, b""));
    target.write_all(&vec![7; MUCH]).await.unwrap();
    target.shutdown().await.unwrap();
    let passed_on = async {
        while sockopt::socket_linger(&watched).unwrap().is_some() {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, passed_on).await.unwrap();
    drop(watched);
    splice.abort();
    assert!(splice.await.unwrap_err().is_cancelled());
    let mut answer = Vec::new();
    timeout(SOON, client.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer.len(), MUCH);
}

#[tokio::test(flavor = "local")]
async fn reset_of_the_target_resets_the_client() {
    let (mut client, target, splice) = spliced(b"").await;
    target.set_zero_linger().unwrap();
    drop(target);
    let error = timeout(SOON, client.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(matches!(splice.await.unwrap().2, Ok(Ended::Reset)));
}

#[tokio::test(flavor = "local")]
async fn reset_of_the_client_resets_the_target() {
    let (client, mut target, splice) = spliced(b"").await;
    client.set_zero_linger().unwrap();
    drop(client);
    let error = timeout(SOON, target.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(splice.await.unwrap().2.is_err());
}

#[tokio::test(flavor = "local")]
async fn a_splice_that_is_dropped_resets_both_sides() {
    let (mut client, mut target, splice) = spliced(b"part").await;
    let mut part = [0; 4];
    timeout(SOON, target.read_exact(&mut part)).await.unwrap().unwrap();
    target.write_all(&part).await.unwrap();
    timeout(SOON, client.read_exact(&mut part)).await.unwrap().unwrap();
    splice.abort();
    for side in [&mut client, &mut target] {
        let error = timeout(SOON, side.read_u8()).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}
