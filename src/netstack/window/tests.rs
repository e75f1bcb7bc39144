//! Both windows, packet by packet.

use proptest::prelude::*;
use smoltcp::wire::{Ipv4Address, TcpPacket};

use super::*;

const RELAY: Option<Carrier> = Some(Carrier::Relay(1));
const QUICK: Duration = Duration::from_micros(300);
const SLOW: Duration = Duration::from_millis(60);
const SCALED: &[u8] = &[1, 3, 3, 5];

/// A segment in an IPv4 packet with a right checksum.
fn segment(flags: u8, (sequence, acknowledged): (u32, u32), window: u16, options: &[u8], payload: usize) -> Vec<u8> {
    let mut packet = vec![0; 20 + 20 + options.len() + payload];
    (packet[0], packet[9], packet[33]) = (0x45, 6, flags);
    packet[32] = (5 + options.len() as u8 / 4) << 4;
    packet[24..28].copy_from_slice(&sequence.to_be_bytes());
    packet[28..32].copy_from_slice(&acknowledged.to_be_bytes());
    packet[34..36].copy_from_slice(&window.to_be_bytes());
    packet[40..40 + options.len()].copy_from_slice(options);
    let (from, to) = (Ipv4Address::UNSPECIFIED, Ipv4Address::UNSPECIFIED);
    TcpPacket::new_unchecked(&mut packet[20..]).fill_checksum(&from.into(), &to.into());
    packet
}

fn window_of(packet: &[u8]) -> usize {
    let tcp = TcpPacket::new_checked(&packet[20..]).unwrap();
    let (from, to) = (Ipv4Address::UNSPECIFIED, Ipv4Address::UNSPECIFIED);
    assert!(tcp.verify_checksum(&from.into(), &to.into()));
    usize::from(tcp.window_len())
}

/// A connection whose SYN was answered after `round_trip`, the SYN-ACK with these options.
fn answered(options: &[u8], carrier: Option<Carrier>, round_trip: Duration) -> (Window, Instant) {
    let (mut window, start) = (Window::default(), Instant::now());
    window.handle_outbound(&mut segment(0x02, (0, 0), 65_535, SCALED, 0), start);
    window.note_way(carrier);
    window.handle_inbound(&mut segment(0x12, (0, 1), 65_535, options, 0), start + round_trip);
    (window, start + round_trip)
}

/// The same with an ACK that left by `carrier`, which is known only since then.
fn opened(carrier: Option<Carrier>, round_trip: Duration) -> (Window, Instant) {
    let (mut window, now) = answered(SCALED, None, round_trip);
    assert_eq!(announced(&mut window, 1, now), 0x7fff << 5);
    window.note_way(carrier);
    (window, now)
}

/// What a scaled ACK announces of a ring that is empty.
fn announced(window: &mut Window, acknowledged: u32, now: Instant) -> usize {
    let mut ack = segment(0x10, (1, acknowledged), 0x7fff, &[], 0);
    window.handle_outbound(&mut ack, now);
    window_of(&ack) << 5
}

/// The peer's window field as smoltcp gets it.
fn received(window: &mut Window, field: u16, now: Instant) -> usize {
    let mut ack = segment(0x10, (1, 1), field, &[], 0);
    window.handle_inbound(&mut ack, now);
    window_of(&ack)
}

#[test]
fn a_relayed_window_is_what_the_queue_holds_once_what_was_promised_is_used() {
    let (mut window, now) = opened(RELAY, QUICK);
    // All of the ring was announced before the way was known.
    assert_eq!(announced(&mut window, 1, now), 0x7fff << 5);
    assert_eq!(announced(&mut window, 1_000_001, now), ((0x7fff << 5) - 1_000_000_usize).next_multiple_of(32));
    assert_eq!(announced(&mut window, 1_048_545, now), QUEUE.next_multiple_of(32));
}

#[test]
fn a_long_way_and_a_direct_path_keep_their_window() {
    let (mut window, now) = opened(RELAY, SLOW);
    assert_eq!(announced(&mut window, 1_048_545, now), 0x7fff << 5);
    let (mut window, now) = opened(Some(Carrier::Direct), QUICK);
    assert_eq!(announced(&mut window, 1_048_545, now), 0x7fff << 5);
}

#[test]
fn the_peers_window_is_held_too_and_freed_by_a_direct_path() {
    let (mut window, now) = opened(RELAY, QUICK);
    assert_eq!(received(&mut window, 60_000, now), QUEUE >> 5);
    window.note_way(Some(Carrier::Direct));
    assert_eq!(received(&mut window, 60_000, now), 60_000);
}

#[test]
fn the_peers_window_opens_by_steps_and_never_beyond_the_limit() {
    let (mut window, now) = answered(&[], RELAY, QUICK);
    let mut opened = |acknowledged: u32| {
        let mut ack = segment(0x10, (1, acknowledged), 60_000, &[], 0);
        window.handle_inbound(&mut ack, now);
        acknowledged as usize + window_of(&ack)
    };
    let pair = 2 * SEGMENT as u32;
    let ends: Vec<_> = (0..16).map(|pairs| opened(1 + pairs * pair)).collect();
    let end = |steps: usize| 1 + QUEUE + steps * STEP as usize;
    assert_eq!(ends, (0..4).flat_map(|steps| [end(steps); 4]).collect::<Vec<_>>());
    // An acknowledgement that was overtaken takes nothing back.
    assert_eq!(opened(1 + 14 * pair), end(3));
    assert_eq!(opened(1), 1 + QUEUE);
    // A window that the peer itself ends is its own.
    let mut ack = segment(0x10, (1, 40_001), 1_000, &[], 0);
    window.handle_inbound(&mut ack, now);
    assert_eq!(window_of(&ack), 1_000);
}

#[test]
fn no_window_is_scaled_when_the_peers_syn_does_not_scale() {
    let (mut window, now) = answered(&[], RELAY, QUICK);
    let mut ack = segment(0x10, (1, 60_001), 65_535, &[], 0);
    window.handle_outbound(&mut ack, now);
    assert_eq!(window_of(&ack), QUEUE);
    assert_eq!(received(&mut window, 60_000, now), QUEUE);
    let (mut window, now) = answered(SCALED, RELAY, QUICK);
    let mut ack = segment(0x10, (1, 60_001), 0x7fff, &[], 0);
    window.handle_outbound(&mut ack, now);
    assert_eq!(window_of(&ack), QUEUE.div_ceil(32));
    assert_eq!(received(&mut window, 60_000, now), QUEUE >> 5);
}

#[test]
fn only_the_first_answer_to_our_syn_tells_the_scale() {
    let (mut window, now) = (Window::default(), Instant::now());
    window.handle_outbound(&mut segment(0x02, (0, 0), 65_535, SCALED, 0), now);
    window.note_way(RELAY);
    for (flags, acknowledged) in [(0x02, 0), (0x12, 7), (0x16, 1)] {
        window.handle_inbound(&mut segment(flags, (0, acknowledged), 65_535, &[], 0), now);
        assert!(window.open.is_none(), "{flags:#x}");
    }
    window.handle_inbound(&mut segment(0x12, (0, 1), 65_535, SCALED, 0), now);
    window.handle_inbound(&mut segment(0x12, (0, 1), 65_535, &[], 0), now);
    assert_eq!(received(&mut window, 60_000, now), QUEUE >> 5);
}

#[test]
fn a_download_that_comes_to_a_relay_is_held_and_timed_by_its_data() {
    let (mut window, now) = opened(Some(Carrier::Direct), QUICK);
    window.note_way(RELAY);
    let edge = 1 + (0x7fff << 5);
    assert_eq!(announced(&mut window, edge - 1_000, now), QUEUE.next_multiple_of(32));
    let inside = &mut segment(0x10, (edge - 1_000, 1), 60_000, &[], 1_000);
    window.handle_inbound(inside, now + QUICK);
    assert_eq!(window.round_trip, None, "it was allowed to come before");
    window.handle_inbound(&mut segment(0x10, (edge, 1), 60_000, &[], 1_000), now + SLOW);
    assert_eq!(window.round_trip, Some(SLOW));
    assert_eq!(announced(&mut window, edge + 1_000, now + SLOW), 0x7fff << 5);
}

#[test]
fn an_octet_sent_into_a_closed_window_is_not_timed() {
    let (mut window, now) = opened(RELAY, SLOW);
    let edge = 1 + (0x7fff << 5);
    announced(&mut window, edge, now);
    window.handle_inbound(&mut segment(0x10, (edge, 1), 60_000, &[], 1), now + QUICK);
    assert_eq!(window.round_trip, Some(SLOW));
}

#[test]
fn packets_that_tell_no_way_keep_what_is_known() {
    let (mut window, now) = opened(RELAY, SLOW);
    window.note_way(None);
    assert_eq!(window.round_trip, Some(SLOW));
    assert_eq!(received(&mut window, 60_000, now), (SLOW.as_secs_f64() * RATE) as usize >> 5);
}

#[test]
fn what_the_syn_announced_stays_announced() {
    let (mut window, now) = answered(SCALED, RELAY, QUICK);
    assert_eq!(announced(&mut window, 1, now), 65_535_usize.next_multiple_of(32));
}

#[test]
fn the_scale_is_found_among_the_options() {
    let mut syn = segment(0x12, (0, 1), 65_535, &[2, 4, 5, 0, 1, 3, 3, 7, 4, 2, 0, 0], 0);
    assert_eq!(Segment::of(&mut syn).unwrap().scale(), Some(7));
    let mut syn = segment(0x12, (0, 1), 65_535, &[2, 4, 5, 0], 0);
    assert_eq!(Segment::of(&mut syn).unwrap().scale(), None);
}

/// Any bytes, half of them with the header of a segment.
fn anything() -> impl Strategy<Value = Vec<u8>> {
    (prop::collection::vec(any::<u8>(), 0..120), any::<bool>()).prop_map(|(mut bytes, is_tcp)| {
        if is_tcp && bytes.len() >= 40 {
            (bytes[0], bytes[9], bytes[32]) = (0x45, 6, 0x50);
        }
        bytes
    })
}

proptest! {
    #[test]
    fn any_bytes_keep_all_but_the_window_and_its_checksum(bytes in anything(), is_outbound in any::<bool>()) {
        let (mut window, now) = opened(RELAY, QUICK);
        let mut seen = bytes.clone();
        if is_outbound {
            window.handle_outbound(&mut seen, now);
        } else {
            window.handle_inbound(&mut seen, now);
        }
        let tcp = match (bytes.first().map(|octet| octet >> 4), bytes.get(6), bytes.get(9)) {
            (Some(4), _, Some(6)) => Some(usize::from(bytes[0] & 0x0f) * 4),
            (Some(6), Some(6), _) => Some(40),
            _ => None,
        };
        prop_assert_eq!(seen.len(), bytes.len());
        for at in (0..bytes.len()).filter(|at| seen[*at] != bytes[*at]) {
            prop_assert!(tcp.is_some_and(|tcp| (tcp + 14..tcp + 18).contains(&at)), "octet {}", at);
        }
    }

    #[test]
    fn the_end_of_the_window_never_moves_back(steps in prop::collection::vec(0..40_000_u32, 1..50)) {
        let (mut window, now) = answered(SCALED, RELAY, QUICK);
        let (mut acknowledged, mut end) = (1, 65_536);
        for step in steps {
            acknowledged = (acknowledged + step).min(end);
            let next = acknowledged + announced(&mut window, acknowledged, now) as u32;
            prop_assert!(next >= end, "{next} < {end}");
            end = next;
        }
    }
}
