//! How often a peer is told that we are elsewhere.

use super::super::tests::{A, RELAYED, US, addr, after, direct, doubted, pong};
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

/// When the peer is called again, in milliseconds after `now`: it is silent since `unheard`, and was heard at `heard`.
fn called_again(
    path: &mut Path,
    now: Instant,
    unheard: impl Fn(Instant) -> Option<Instant>,
    heard: Instant,
) -> Vec<u128> {
    assert_eq!(path.take_back(RELAYED, now), Some(Some(addr(US))));
    let mut called = Vec::new();
    while let Some(at) = path.next_deadline().filter(|at| *at < after(now, 20_000)) {
        path.handle_timeout(unheard(at), at);
        if path.retracts_again(unheard(at), Some(heard).filter(|heard| *heard <= at), at) {
            assert_eq!(path.take_back(RELAYED, at), Some(Some(addr(US))));
            called.push((at - now).as_millis());
        }
    }
    called
}

#[test]
fn what_a_silent_peer_does_not_heed_is_taken_back_again_until_its_trust_ends() {
    let start = Instant::now();
    let (mut path, sent, now) = doubted(start);
    assert_eq!(called_again(&mut path, now, |_| Some(sent), start), [250, 750, 1_750, 3_750]);
    // It was heard by the relay, and then our NAT has mapped us anew once more.
    let (mut path, sent, now) = doubted(start);
    let heard = after(now, 300);
    let unheard = |at: Instant| Some(if at < heard { sent } else { heard });
    assert_eq!(called_again(&mut path, now, unheard, heard), [250, 750, 1_750, 3_750]);
}

/// The relay is gone from the map.
#[test]
fn a_call_that_cannot_be_made_is_not_tried_all_the_time() {
    let start = Instant::now();
    let (mut path, sent, now) = doubted(start);
    assert_eq!(path.take_back(RELAYED, now), Some(Some(addr(US))));
    let at = after(now, 250);
    path.handle_timeout(Some(sent), at);
    assert!(path.retracts_again(Some(sent), Some(start), at));
    assert!(path.next_deadline().is_some_and(|next| next > at));
}

#[test]
fn what_the_peer_has_heeded_or_could_not_is_not_taken_back_again() {
    let start = Instant::now();
    let (mut path, sent, now) = doubted(start);
    let heard = after(now, 300);
    // It answers whatever is sent.
    assert_eq!(called_again(&mut path, now, |at| Some(sent.max(at - RELAYED / 2)), heard), [250]);
    let (mut path, sent, now) = doubted(start);
    path.trusted_until = Some(after(now, TRUST.as_millis() as u64));
    assert_eq!(called_again(&mut path, now, |_| Some(sent), after(now, 1)), [0; 0]);
    let (mut path, _, now) = doubted(start);
    assert_eq!(called_again(&mut path, now, |_| None, start), [0; 0]);
    let (mut path, _, now) = doubted(start);
    let sent = after(now, 600);
    assert_eq!(
        called_again(&mut path, now, |at| Some(sent).filter(|sent| *sent <= at), start),
        [750, 1_250, 2_250, 4_250]
    );
}
