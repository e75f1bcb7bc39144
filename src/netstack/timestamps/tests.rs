//! Timestamps against a server that has them, and against answers made by hand.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use smoltcp::socket::tcp::State;
use smoltcp::wire::{TcpOption, TcpPacket};

use super::super::tests::{OURS, THEIRS, World};
use super::super::{Again, FlowId, Netstack};
use super::*;
use crate::wire::ip;

/// A SYN-ACK's options: a segment size, timestamps.
const STAMPED: &[u8] = &[1, 1, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0];

/// What a packet that leaves says of times: its own, and the one that it echoes. Its checksum has to be right.
fn times(packet: &[u8]) -> Option<(u32, u32)> {
    let (header, from, to) = match packet[0] >> 4 {
        4 => {
            let address = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&packet[at..at + 4]).unwrap());
            (20, address(12), address(16))
        }
        _ => {
            let address = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&packet[at..at + 16]).unwrap());
            (40, address(8), address(24))
        }
    };
    let segment = TcpPacket::new_checked(&packet[header..]).unwrap();
    assert!(segment.verify_checksum(&from.into(), &to.into()), "{packet:?}");
    let mut options = segment.options();
    while !options.is_empty() {
        let (rest, option) = TcpOption::parse(options).unwrap();
        if let TcpOption::TimeStamp { tsval, tsecr } = option {
            return Some((tsval, tsecr));
        }
        options = rest;
    }
    None
}

fn packets(stack: &mut Netstack, now: Instant) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    while stack.egress(now, &mut |packet| {
        packets.push(packet.to_vec());
        None
    }) {}
    packets
}

/// A connection whose SYN is answered with these options: the longest packet of an upload in it, if it is open.
fn longest(remote: SocketAddr, options: &[u8]) -> Option<usize> {
    let (mut stack, now) = (Netstack::new(7, Instant::now()), Instant::now());
    let local: IpAddr = if remote.is_ipv4() { OURS.parse().unwrap() } else { "fd7a:115c:a1e0::2".parse().unwrap() };
    stack.set_addresses(&[local]);
    let id = stack.connect(local, remote).unwrap();
    let syn = packets(&mut stack, now).pop().unwrap();
    assert_ne!(times(&syn).unwrap(), (0, 0));
    let syn = &syn[if remote.is_ipv4() { 20 } else { 40 }..];
    let next = u32::from_be_bytes(syn[4..8].try_into().unwrap()).wrapping_add(1);
    let mut answer = [&syn[2..4], &syn[..2], &[0, 0, 0, 1], &next.to_be_bytes()].concat();
    answer.extend([(5 + options.len() as u8 / 4) << 4, 0x12, 0xff, 0xff, 0, 0, 0, 0]);
    answer.extend(options);
    let mut answer = ip::build(6, remote.ip(), local, &answer).unwrap();
    stack.handle_packet(&mut answer, now).unwrap();
    stack.with_tcp(id, |socket| socket.send_slice(&[7; 60_000]))?.ok()?;
    stack.touch(id);
    let is_open = stack.with_tcp(id, |socket| socket.state()) == Some(State::Established);
    is_open.then(|| packets(&mut stack, now).iter().map(Vec::len).max().unwrap_or(0))
}

/// What the server's clock shows.
const ECHOED: u32 = 77;

fn server_with_timestamps() -> (World, FlowId) {
    let mut world = World::new(0);
    world.server().set_tsval_generator(Some(|| ECHOED));
    let id = world.connect();
    (world, id)
}

/// What the packets say that leave after so many milliseconds. None of them arrives.
fn sent(world: &mut World, id: FlowId, millis: u64) -> Vec<(u32, u32)> {
    world.now += Duration::from_millis(millis);
    world.stack.handle_timeout(world.now);
    world.stack.touch(id);
    packets(&mut world.stack, world.now).iter().map(|packet| times(packet).unwrap()).collect()
}

/// The size that a peer names holds for octets and option together, and a peer without timestamps loses nothing.
#[test]
fn segments_with_the_option_are_as_long_as_those_without() {
    for (remote, headers) in [(THEIRS, 40), ("[fd7a:115c:a1e0::1]:80", 60)] {
        for (named, allowed) in [(None, 536), (Some(500_u16), 500), (Some(1_228), 1_228), (Some(1_460), 1_460)] {
            let size = named.map(|size| [&[2, 4][..], &size.to_be_bytes()].concat()).unwrap_or_default();
            let longest = |options: &[&[u8]]| longest(remote.parse().unwrap(), &options.concat());
            let (with, without) = (longest(&[&size, STAMPED]).unwrap(), longest(&[&size]).unwrap());
            assert_eq!(without, MTU.min(allowed + headers), "{remote}, {named:?}");
            // A size that the peer does not name is smoltcp's, far below what fits.
            assert_eq!(with, without + if named.is_none() { 12 } else { 0 }, "{remote}, {named:?}");
        }
        let longest = |size| longest(remote.parse().unwrap(), &[&[2, 4, 0, size], STAMPED].concat());
        assert_eq!((longest(0), longest(5)), (None, Some(headers + 12 + 1)));
    }
}

proptest! {
    /// What is longer than the MTU smoltcp drops without a word, again and again.
    #[test]
    fn whatever_a_server_says_of_sizes_our_octets_leave(
        parts in prop::collection::vec(
            prop_oneof![
                any::<u16>().prop_map(|size| [&[2, 4][..], &size.to_be_bytes()].concat()),
                Just(STAMPED[2..].to_vec()), Just(STAMPED.to_vec()), Just(vec![4, 2]), Just(vec![3, 3, 7]), Just(vec![1]),
                prop::collection::vec(any::<u8>(), 0..6),
            ],
            0..8,
        ),
        v6 in any::<bool>(),
    ) {
        let mut options = parts.concat();
        options.resize(options.len().next_multiple_of(4).min(40), 0);
        let remote = if v6 { "[fd7a:115c:a1e0::1]:80" } else { THEIRS };
        if let Some(longest) = longest(remote.parse().unwrap(), &options) {
            prop_assert!((if v6 { 61 } else { 41 }..=MTU).contains(&longest), "{longest}");
        }
    }
}

proptest! {
    #[test]
    fn a_time_at_any_place_of_the_options_leaves_the_checksum_right(
        before in 0..=30_usize, old in any::<[u8; 8]>(), octets in prop::collection::vec(any::<u8>(), 0..40), now in any::<u32>(),
    ) {
        let mut options = [vec![1; before], vec![8, 10], old.to_vec()].concat();
        options.resize(options.len().next_multiple_of(4), 0);
        let mut segment = [vec![0; 12], vec![(5 + options.len() as u8 / 4) << 4, 0x10], vec![0; 6], options, octets].concat();
        let (from, to) = (OURS.parse::<IpAddr>().unwrap(), THEIRS.parse::<SocketAddr>().unwrap().ip());
        TcpPacket::new_unchecked(&mut segment[..]).fill_checksum(&from.into(), &to.into());
        let mut packet = ip::build(6, from, to, &segment).unwrap();
        stamp(&mut packet, now);
        prop_assert_eq!(times(&packet).unwrap(), (now, u32::from_be_bytes(old[4..].try_into().unwrap())));
    }
}

/// Data, what is repeated, keep-alives, a reset: by a clock of milliseconds, which stands still while nothing runs.
#[test]
fn every_segment_says_when_it_leaves_and_echoes_the_peers_time() {
    let (mut world, id) = server_with_timestamps();
    world.stack.with_tcp(id, |socket| socket.send_slice(&[7; 20_000])).unwrap().unwrap();
    let first = sent(&mut world, id, 0);
    let began = first[0].0;
    assert!(first.len() > 8 && first.iter().all(|times| *times == (began, ECHOED)), "{first:?}");
    assert_eq!(sent(&mut world, id, 250)[..1], [(began.wrapping_add(250), ECHOED)]);
    // By then it was to be sent again, a while before the process was stopped.
    let paused = sent(&mut world, id, 3_600_000)[0].0.wrapping_sub(began);
    assert!((250..2_000).contains(&paused), "{paused}");
    world.run(Duration::from_secs(5));
    assert_eq!(world.server().recv_queue(), 20_000);
    let kept_alive = sent(&mut world, id, 75_000);
    assert!(kept_alive.len() == 1 && kept_alive[0].0.wrapping_sub(began) > paused, "{kept_alive:?}");
    world.stack.release(id);
    assert_eq!(sent(&mut world, id, 3), [(kept_alive[0].0.wrapping_add(3), ECHOED)]);
}

#[test]
fn a_segment_that_is_sent_again_by_another_way_says_when() {
    let (mut world, id) = server_with_timestamps();
    world.stack.with_tcp(id, |socket| socket.send_slice(b"lost")).unwrap().unwrap();
    let began = sent(&mut world, id, 0)[0].0;
    assert_eq!(sent(&mut world, id, 500), [(began.wrapping_add(500), ECHOED)]);
    world.now += Duration::from_millis(40);
    world.stack.repeat(Again::Everything, |_| true);
    assert_eq!(sent(&mut world, id, 0), [(began.wrapping_add(540), ECHOED)]);
}

#[test]
fn an_acknowledgement_of_what_is_beyond_a_gap_has_both_options() {
    let (mut world, _) = server_with_timestamps();
    world.server().set_nagle_enabled(false);
    let mut arrived: Vec<_> = (0..5)
        .flat_map(|_| {
            world.server().send_slice(&[7; 1_000]).unwrap();
            world.server_sends()
        })
        .collect();
    arrived.remove(0);
    for packet in &mut arrived {
        world.stack.handle_packet(packet, world.now).unwrap();
    }
    let answers = packets(&mut world.stack, world.now);
    assert_eq!(answers.len(), 4);
    for answer in answers {
        assert_eq!(times(&answer).map(|(_, echoed)| echoed), Some(ECHOED));
        let ranges = TcpPacket::new_checked(&answer[20..]).unwrap().selective_ack_ranges().unwrap();
        assert!(ranges[0].is_some() && answer.len() <= 20 + 20 + 40, "{answer:?}");
    }
}

#[test]
fn a_peer_without_timestamps_gets_none() {
    let mut world = World::new(0);
    let id = world.connect();
    world.stack.with_tcp(id, |socket| socket.send_slice(b"octets")).unwrap().unwrap();
    world.stack.touch(id);
    let sent = packets(&mut world.stack, world.now);
    assert_eq!(sent.iter().map(|packet| times(packet)).collect::<Vec<_>>(), [None]);
}

#[test]
fn stacks_begin_at_different_times() {
    let [one, other] = [1, 2].map(|seed| Timestamps::new(seed).at(smoltcp::time::Instant::ZERO));
    assert_ne!(one, other);
    assert_eq!(Timestamps::new(1).at(smoltcp::time::Instant::from_millis(1_i64 << 32)), one, "it wraps");
}
