//! How often a peer is told that we are elsewhere.

use super::super::tests::{A, US, addr, after, direct, pong};
use super::*;

/// Each request makes the peer think for longer than a silence takes.
#[test]
fn a_nat_that_maps_each_datagram_anew_is_news_twice_in_five_seconds() {
    let start = Instant::now();
    let mut path = direct(start);
    let mut news = Vec::new();
    for millis in (1_000..31_000).step_by(10) {
        let (now, thinks) = (after(start, millis), millis % 1_000 < 700);
        if millis % 1_000 == 0 {
            path.note_send(now);
        }
        let unheard = thinks.then(|| after(start, millis / 1_000 * 1_000));
        let source = format!("203.0.113.1:{millis}");
        let asked = path.handle_timeout(unheard, now).probe.ping.contains(&addr(A));
        if asked && pong(&mut path, A, &source, (now, 5)).remapped {
            news.push(now);
        }
    }
    assert!(news.len() >= 6, "{news:?}");
    let often = news.windows(3).find(|times| times[2].duration_since(times[0]) < PING_INTERVAL);
    assert_eq!(often, None, "a third time");
}

/// It may have had a pong of ours a moment before.
#[test]
fn what_was_true_is_taken_back_for_as_long_as_the_peer_may_trust_it() {
    for (millis, taken_back) in [(6_499, Some(Some(addr(US)))), (6_500, None)] {
        let moved = after(Instant::now(), 1_000);
        let mut path = direct(moved);
        path.retract(moved);
        path.doubt();
        assert_eq!(path.take_back(PING_INTERVAL, after(moved, millis)), taken_back);
    }
}
