//! A splice whose target is us: what it sends is put into the netstack as if it had come through the tunnel.

use std::cell::RefCell;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::rc::Rc;

use rustix::net::sockopt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::netstack::Netstack;
use crate::node::bed::{self, SEED};
use crate::node::dial::bed::{CONNECTOR, Tailnet};
use crate::wire::ip;

const SOON: Duration = Duration::from_secs(5);
/// What the target takes before it closes its window.
const WINDOW: u16 = 1_000;

const SYN_ACK: u8 = 0x12;
const FIN_PSH_ACK: u8 = 0x19;

/// What the target says, having heard the SYN alone: `octets` from this sequence number on.
fn says(syn: &[u8], number: u8, flags: u8, octets: &[u8]) -> Vec<u8> {
    let (source, destination) = (IpAddr::from([syn[12], syn[13], syn[14], syn[15]]), CONNECTOR.parse().unwrap());
    let tcp = &syn[20..];
    let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]).wrapping_add(1);
    let mut answer = [&tcp[2..4], &tcp[..2], &[0, 0, 0, number], &sequence.to_be_bytes(), &[0x50, flags]].concat();
    answer.extend(WINDOW.to_be_bytes());
    answer.extend([0; 4]);
    answer.extend(octets);
    ip::build(6, destination, source, &answer).unwrap()
}

/// A connection to a target that takes so much and no more, and its SYN.
async fn connected(core: &Shared) -> (TunnelStream, Vec<u8>) {
    let now = Instant::now();
    let (target, netmap) = ((CONNECTOR.parse::<IpAddr>().unwrap(), 80).into(), Tailnet::new().map(&[], &[], &[]));
    let (own, seed) = (netmap.self_node.addresses.clone(), SEED);
    core.borrow_mut().handle_netmap(netmap, now);
    // The SYN waits for a session; another stack of the same seed sends the same.
    let (mut twin, mut syn) = (Netstack::new(seed, now), Vec::new());
    twin.set_addresses(&own);
    twin.connect(*own.iter().find(|address| address.is_ipv4()).unwrap(), target).unwrap();
    twin.egress(now, &mut |packet| {
        syn = packet.to_vec();
        None
    });
    let answered = async {
        tokio::task::yield_now().await;
        core.borrow_mut()
            .netstack()
            .handle_packet(&mut says(&syn, 9, SYN_ACK, b""), now)
            .expect("it belongs to the flow");
    };
    let stream = tokio::join!(TunnelStream::connect(core, target, SOON), answered).0.unwrap();
    (stream, syn)
}

#[tokio::test(flavor = "local")]
async fn reset_of_the_client_is_seen_while_the_target_takes_nothing() {
    let core = Rc::new(RefCell::new(bed::core(Instant::now())));
    let (stream, _) = connected(&core).await;
    let (mut client, near) = bed::pair().await;
    let carried = Rc::new(Carried::default());
    let counted = carried.clone();
    let splice = tokio::task::spawn_local(async move { stream.splice(near, b"", &counted).await });
    let more = vec![7; 1 << 20];
    while timeout(Duration::from_millis(200), client.write(&more)).await.is_ok() {}
    assert!(!splice.is_finished());
    client.set_zero_linger().unwrap();
    drop(client);
    assert!(timeout(SOON, splice).await.unwrap().unwrap().is_err());
    assert!(carried.sent.get() > u64::from(WINDOW));
}

#[tokio::test(flavor = "local")]
async fn client_is_not_reset_any_more_once_it_has_the_whole_answer() {
    let core = Rc::new(RefCell::new(bed::core(Instant::now())));
    let (stream, syn) = connected(&core).await;
    let (mut client, near) = bed::pair().await;
    let watched = near.as_fd().try_clone_to_owned().unwrap();
    let lingers = || sockopt::socket_linger(&watched).unwrap();
    let splice = tokio::task::spawn_local(async move { stream.splice(near, b"", &Carried::default()).await });
    tokio::task::yield_now().await;
    assert_eq!(lingers(), Some(Duration::ZERO));
    let mut answer = says(&syn, 10, FIN_PSH_ACK, b"whole");
    core.borrow_mut().netstack().handle_packet(&mut answer, Instant::now()).expect("it belongs to the flow");
    let mut read = Vec::new();
    timeout(SOON, client.read_to_end(&mut read)).await.unwrap().unwrap();
    assert_eq!((read.as_slice(), lingers()), (&b"whole"[..], None));
    assert!(!splice.is_finished());
}

#[tokio::test(flavor = "local")]
async fn what_is_dropped_with_bytes_on_their_way_or_an_answer_awaited_was_not_idle() {
    for (sent, last, idle) in [(0, false, true), (2 * usize::from(WINDOW), false, false), (0, true, false)] {
        let core = Rc::new(RefCell::new(bed::core(Instant::now())));
        let (stream, _) = connected(&core).await;
        let (id, carried) = (stream.handle.id, Rc::new(Carried::default()));
        let ((mut client, near), counted) = (bed::pair().await, carried.clone());
        let splice = tokio::task::spawn_local(async move { stream.splice(near, b"", &counted).await });
        client.write_all(&vec![7; sent]).await.unwrap();
        if last {
            client.shutdown().await.unwrap();
        }
        let taken = async {
            let seen = |socket: &mut tcp::Socket<'_>| (socket.send_queue() >= sent) && socket.may_send() != last;
            while !core.borrow_mut().netstack().with_tcp(id, seen).unwrap() {
                tokio::task::yield_now().await;
            }
        };
        timeout(SOON, taken).await.unwrap();
        splice.abort();
        assert!(splice.await.unwrap_err().is_cancelled());
        let later = Instant::now() + Duration::from_secs(60);
        assert_eq!(carried.was_idle(later), idle, "{sent} octets, the last: {last}");
        assert_eq!(carried.moved_at.get().is_some(), sent > 0);
    }
}
