//! Associations whose tailnet is nobody and whose outside is loopback.

use std::future::Future;

use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::super::Config;
use super::super::target::{DirectRule, Host};
use super::*;

/// The longest that an awaited event may take.
pub(super) const SOON: Duration = Duration::from_secs(10);

/// An association that may send to loopback, with so many mappings.
pub(super) fn association(budget: usize) -> Association {
    let direct_allow = vec![DirectRule::Net("127.0.0.0/8".parse().unwrap())];
    Node::alone(Config { direct_allow, ..Config::default() }).associate(Arc::new(Semaphore::new(budget)))
}

pub(super) async fn peer() -> UdpSocket {
    UdpSocket::bind("127.0.0.1:0").await.unwrap()
}

pub(super) fn to(peer: &UdpSocket) -> Target {
    let address = peer.local_addr().unwrap();
    Target { host: Host::Ip(address.ip()), port: address.port() }
}

pub(super) fn public(port: u16) -> Target {
    Target { host: Host::Ip("192.0.2.1".parse().unwrap()), port }
}

/// Lets the association work until `done` has happened.
pub(super) async fn until<T>(association: &mut Association, done: impl Future<Output = T>) -> T {
    let work = async {
        tokio::select! {
            biased;
            done = done => done,
            event = async { loop { drop(association.next().await); } } => event,
        }
    };
    timeout(SOON, work).await.unwrap()
}

pub(super) async fn arrives(association: &mut Association, peer: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; LONGEST];
    let (length, from) = until(association, peer.recv_from(&mut buffer)).await.unwrap();
    (buffer[..length].to_vec(), from)
}

const LONGEST: usize = 65_535;

#[tokio::test(flavor = "local")]
async fn datagrams_are_held_until_the_target_is_located_and_answers_carry_its_address() {
    let (mut association, peer) = (association(9), peer().await);
    let target = to(&peer);
    association.send(&target, b"one").unwrap();
    association.send(&target, b"two").unwrap();
    let (one, from) = arrives(&mut association, &peer).await;
    let (two, _) = arrives(&mut association, &peer).await;
    assert_eq!((one, two), (b"one".to_vec(), b"two".to_vec()));
    peer.send_to(b"answer", from).await.unwrap();
    let Event::Received { source, octets } = timeout(SOON, association.next()).await.unwrap() else {
        panic!("an answer is received")
    };
    assert_eq!((source, octets), (peer.local_addr().unwrap(), b"answer".to_vec()));
    assert_eq!(association.mappings(), 1);
}

#[tokio::test(flavor = "local")]
async fn a_target_outside_is_counted_when_it_gets_a_mapping_and_not_with_each_netmap() {
    let (mut association, peer) = (association(9), peer().await);
    let target = to(&peer);
    for _ in 0..3 {
        association.send(&target, b"x").unwrap();
        arrives(&mut association, &peer).await;
        association.review();
    }
    let counted = association.node.outside.borrow().destinations().clone();
    assert_eq!(counted, [(target.to_string(), 1)].into());
}

#[tokio::test(flavor = "local")]
async fn nobody_but_the_target_is_heard() {
    let (mut association, peer, stranger) = (association(9), peer().await, peer().await);
    association.send(&to(&peer), b"x").unwrap();
    let (_, from) = arrives(&mut association, &peer).await;
    stranger.send_to(b"from a stranger", ("127.0.0.1", from.port())).await.unwrap();
    peer.send_to(b"from the target", ("127.0.0.1", from.port())).await.unwrap();
    let event = timeout(SOON, association.next()).await.unwrap();
    assert!(matches!(event, Event::Received { octets, .. } if octets == b"from the target"));
}

#[tokio::test(flavor = "local")]
async fn refused_target_is_told_once_and_its_datagrams_are_lost() {
    let mut association = association(9);
    association.send(&public(443), b"first").unwrap();
    association.send(&public(443), b"held too").unwrap();
    let Event::Failed { target, error, lost, told: false } = timeout(SOON, association.next()).await.unwrap() else {
        panic!("a public target is refused")
    };
    assert!(matches!(error, DatagramError::Dial(DialError::Public { .. })), "{error}");
    assert_eq!((target, lost), (public(443), 2));
    for _ in 0..100 {
        assert_eq!(association.send(&public(443), b"more"), Err(Lost::Refused));
    }
    assert_eq!(association.mappings(), 0);
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn refused_target_is_looked_at_again_after_a_while() {
    let mut association = association(9);
    association.send(&public(443), b"first").unwrap();
    assert!(matches!(association.next().await, Event::Failed { .. }));
    tokio::time::advance(REFUSED).await;
    association.send(&public(443), b"again").unwrap();
    assert!(matches!(association.next().await, Event::Failed { lost: 1, .. }));
}

#[tokio::test(flavor = "local")]
async fn held_datagrams_are_bounded_in_number_and_octets() {
    let mut association = association(9);
    for _ in 0..HELD_DATAGRAMS {
        association.send(&public(1), b"x").unwrap();
    }
    assert_eq!(association.send(&public(1), b"x"), Err(Lost::Held));
    association.send(&public(2), &vec![0; HELD_OCTETS - 100]).unwrap();
    assert_eq!(association.send(&public(3), &[0; 100]), Err(Lost::Held));
    for _ in 0..2 {
        assert!(matches!(timeout(SOON, association.next()).await.unwrap(), Event::Failed { .. }));
    }
    assert_eq!(association.held, 0);
    association.send(&public(3), &[0; 100]).unwrap();
}

#[tokio::test(flavor = "local")]
async fn targets_being_located_and_remembered_are_bounded() {
    let mut association = association(9);
    for port in 1..=u16::try_from(LOCATING).unwrap() {
        association.send(&public(port), b"x").unwrap();
    }
    assert_eq!(association.send(&public(9_999), b"x"), Err(Lost::Held));
    for _ in 0..LOCATING {
        association.next().await;
    }
    for port in 10_000..20_000 {
        association.refuse(public(port));
    }
    assert_eq!(association.targets.len(), TARGETS);
    assert_eq!(association.send(&public(9_999), b"x"), Err(Lost::Held));
}

#[tokio::test(flavor = "local")]
async fn mapping_silent_for_longest_makes_room() {
    let mut association = association(2);
    let peers = [peer().await, peer().await, peer().await];
    for peer in &peers[..2] {
        association.send(&to(peer), b"x").unwrap();
        arrives(&mut association, peer).await;
    }
    association.send(&to(&peers[0]), b"again").unwrap();
    association.send(&to(&peers[2]), b"x").unwrap();
    arrives(&mut association, &peers[2]).await;
    assert_eq!(association.mappings(), 2);
    assert!(association.knows(&to(&peers[0])) && !association.knows(&to(&peers[1])));
}

#[tokio::test(flavor = "local")]
async fn mappings_of_others_leave_no_room() {
    let mut first = association(1);
    let mut second = Node { inner: Rc::clone(&first.node) }.associate(Arc::clone(&first.budget));
    let (one, two) = (peer().await, peer().await);
    first.send(&to(&one), b"x").unwrap();
    arrives(&mut first, &one).await;
    second.send(&to(&two), b"x").unwrap();
    let event = timeout(SOON, second.next()).await.unwrap();
    assert!(matches!(event, Event::Failed { error: DatagramError::Mappings, lost: 1, .. }));
    drop(first);
    assert_eq!(second.budget.available_permits(), 1);
}

#[tokio::test(flavor = "local")]
async fn idle_mapping_is_closed_and_used_one_is_kept() {
    let mut association = association(9);
    let (idle, used) = (peer().await, peer().await);
    for peer in [&idle, &used] {
        association.send(&to(peer), b"x").unwrap();
        arrives(&mut association, peer).await;
    }
    // In real time up to here: a paused clock runs ahead of the kernel.
    tokio::time::pause();
    tokio::time::advance(IDLE - SWEEP).await;
    association.sweep();
    assert_eq!(association.mappings(), 2);
    association.send(&to(&used), b"still here").unwrap();
    let sweeping = timeout(SWEEP * 2, association.next()).await;
    assert!(sweeping.is_err(), "{sweeping:?}");
    assert!(association.knows(&to(&used)) && !association.knows(&to(&idle)));
    assert_eq!(association.mappings(), 1);
}

#[tokio::test(flavor = "local")]
async fn target_where_nobody_listens_does_not_end_its_mapping() {
    let mut association = association(9);
    let (target, back) = loop {
        let gone = peer().await;
        let (target, address) = (to(&gone), gone.local_addr().unwrap());
        drop(gone);
        association.send(&target, b"x").unwrap();
        until(&mut association, tokio::time::sleep(Duration::from_millis(20))).await;
        // Another test may have been given the port meanwhile.
        if let Ok(back) = UdpSocket::bind(address).await {
            break (target, back);
        }
    };
    association.send(&target, b"now").unwrap();
    assert_eq!(arrives(&mut association, &back).await.0, b"now");
}

#[tokio::test(flavor = "local")]
async fn longest_datagram_goes_and_a_longer_one_is_told() {
    let (mut association, peer) = (association(9), peer().await);
    association.send(&to(&peer), b"x").unwrap();
    arrives(&mut association, &peer).await;
    let longest = vec![7; 65_507];
    association.send(&to(&peer), &longest).unwrap();
    assert_eq!(arrives(&mut association, &peer).await.0, longest);
    assert_eq!(association.send(&to(&peer), &[7; 65_508]), Err(Lost::TooLong));
}
