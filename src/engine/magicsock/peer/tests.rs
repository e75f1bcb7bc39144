//! One peer's paths, event by event.

use super::*;

pub(super) const A: &str = "192.0.2.1:1";
const B: &str = "192.0.2.2:2";
/// How long the relay takes to a peer and back, at most.
pub(super) const RELAYED: Duration = Duration::from_millis(250);
/// Where peers see us.
pub(super) const US: &str = "203.0.113.1:1";

pub(super) fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub(super) fn after(start: Instant, millis: u64) -> Instant {
    start + Duration::from_millis(millis)
}

pub(super) fn direct(start: Instant) -> Path {
    let mut path = Path::default();
    path.set_endpoints(&[addr(A), addr(B)], start);
    path.note_send(start);
    path.discover(start);
    path.note_ping(TxId([1; 12]), addr(A), start);
    assert!(path.handle_pong(TxId([1; 12]), addr(US), after(start, 20)).better);
    path
}

/// A peer with one endpoint, which a first packet has had pinged.
fn looked_for(start: Instant) -> Path {
    let mut path = Path::default();
    path.set_endpoints(&[addr(A)], start);
    path.note_send(start);
    path.discover(start);
    path.note_ping(TxId([1; 12]), addr(A), start);
    path
}

#[test]
fn a_path_is_trusted_until_six_and_a_half_seconds_after_its_pong() {
    let start = Instant::now();
    let path = direct(start);
    let best = Measured { addr: addr(A), latency: Duration::from_millis(20) };
    assert_eq!(path.best(after(start, 6_520)), Some((best, true)));
    assert_eq!(path.best(after(start, 6_521)), Some((best, false)));
}

#[test]
fn a_lost_heartbeat_ends_an_untrusted_path_and_a_late_pong_does_not_revive_it() {
    let start = Instant::now();
    let mut path = direct(start);
    let news = path.handle_timeout(None, after(start, 3_000));
    assert_eq!((news.lost, news.probe.ping), (false, vec![addr(A)]));
    path.note_ping(TxId([2; 12]), addr(A), after(start, 3_000));
    assert!(!path.handle_timeout(None, after(start, 6_000)).lost);
    assert!(path.handle_timeout(None, after(start, 8_000)).lost);
    assert_eq!(path.best(after(start, 8_000)), None);
    assert!(!path.handle_pong(TxId([2; 12]), addr(US), after(start, 8_001)).better);
}

#[test]
fn discovery_pings_each_endpoint_once_in_five_seconds() {
    let start = Instant::now();
    let mut path = Path::default();
    path.set_endpoints(&[addr(A)], start);
    assert!(path.note_send(start).discover);
    let probe = path.discover(start);
    assert_eq!(probe, Probe { ping: vec![addr(A)], call: true, doubt: None });
    path.note_ping(TxId([1; 12]), addr(A), start);
    assert!(!path.note_send(after(start, 4_999)).discover);
    assert!(path.discover(after(start, 4_799)).ping.is_empty());
    assert_eq!(path.discover(after(start, 5_000)).ping, [addr(A)]);
}

#[test]
fn a_call_replaces_the_endpoints_of_the_last_one() {
    let start = Instant::now();
    let mut path = Path::default();
    let probe = path.handle_call(&[addr(A), addr("[fe80::1]:1")], start);
    assert_eq!(probe, Probe { ping: vec![addr(A)], call: false, doubt: None });
    assert_eq!(path.handle_call(&[addr(B)], after(start, 100)).ping, [addr(B)]);
}

#[test]
fn a_repeated_ping_is_answered_once() {
    let now = Instant::now();
    let mut path = Path::default();
    assert_eq!(path.handle_ping(addr(A), TxId([1; 12]), now), Heard::New);
    assert_eq!(path.handle_ping(addr(A), TxId([1; 12]), now), Heard::Copy);
    assert_eq!(path.handle_ping(addr(B), TxId([1; 12]), now), Heard::New);
    assert_eq!(path.handle_ping(addr(A), TxId([2; 12]), now), Heard::Known);
}

#[test]
fn heartbeats_stop_when_nothing_is_sent() {
    let start = Instant::now();
    let mut path = direct(start);
    for second in 1..48 {
        path.handle_timeout(None, start + Duration::from_secs(second));
    }
    assert_eq!(path.next_deadline(), None);
}

#[test]
fn the_best_address_goes_with_its_endpoint() {
    let start = Instant::now();
    let mut path = direct(start);
    path.set_endpoints(&[addr(A)], start);
    assert!(path.best(start).is_some());
    path.set_endpoints(&[addr(B)], start);
    assert_eq!(path.best(start), None);
}

#[test]
fn a_ping_of_the_peer_is_answered_with_one_of_ours_once_a_round() {
    let start = Instant::now();
    let mut path = looked_for(start);
    path.handle_ping(addr(A), TxId([2; 12]), after(start, 20));
    assert!(path.answer_with_ping(&addr(A), after(start, 20)), "ours came before the peer's filter was open");
    path.handle_ping(addr(A), TxId([3; 12]), after(start, 40));
    assert!(!path.answer_with_ping(&addr(A), after(start, 40)));
    path.handle_ping(addr(B), TxId([4; 12]), after(start, 40));
    assert!(path.answer_with_ping(&addr(B), after(start, 40)));
    path.discover(after(start, 5_000));
    assert!(path.answer_with_ping(&addr(A), after(start, 5_010)));
}

#[test]
fn pings_are_not_answered_with_pings_where_packets_go_already_or_without_use() {
    let start = Instant::now();
    let mut path = direct(start);
    path.handle_ping(addr(A), TxId([2; 12]), after(start, 30));
    assert!(!path.answer_with_ping(&addr(A), after(start, 30)));
    path.handle_ping(addr(B), TxId([3; 12]), after(start, 30));
    assert!(path.answer_with_ping(&addr(B), after(start, 30)), "it may be the better one");
    let mut idle = Path::default();
    idle.handle_ping(addr(B), TxId([2; 12]), start);
    assert!(!idle.answer_with_ping(&addr(B), start));
}

#[test]
fn a_restarted_peer_is_trusted_nowhere_and_looked_for_at_once() {
    let start = Instant::now();
    let mut path = direct(start);
    assert!(!path.note_send(after(start, 1_000)).discover);
    path.doubt();
    let (best, trusted) = path.best(after(start, 1_000)).unwrap();
    assert_eq!((best.addr, trusted), (addr(A), false));
    assert!(path.note_send(after(start, 1_000)).discover);
    assert_eq!(path.discover(after(start, 1_000)).ping, [addr(A), addr(B)]);
}

#[test]
fn a_peer_that_calls_all_the_time_is_called_too() {
    let start = Instant::now();
    let mut path = Path::default();
    path.set_endpoints(&[addr(A)], start);
    path.note_send(start);
    path.discover(start);
    for millis in [2_500, 4_900] {
        path.handle_call(&[addr(A)], after(start, millis));
        path.note_ping(TxId([1; 12]), addr(A), after(start, millis));
    }
    assert!(path.note_send(after(start, 5_000)).discover);
    assert_eq!(path.discover(after(start, 5_000)), Probe { ping: Vec::new(), call: true, doubt: None });
}

#[test]
fn only_a_path_that_worked_casts_doubt_on_our_nat() {
    let start = Instant::now();
    let mut path = direct(start);
    assert_eq!(path.discover(after(start, 1_000)).doubt, None);
    assert_eq!(path.discover(after(start, 6_600)).doubt, Some(after(start, 1_600)));
}

#[test]
fn a_call_that_found_nothing_is_followed_by_pings_the_soonest_after_a_pause() {
    let start = Instant::now();
    let mut path = looked_for(start);
    let pings_after = |called: Instant, path: &mut Path| {
        path.handle_timeout(None, called);
        path.note_call(called);
        let times = (0..300).map(|millis| after(called, millis));
        let asked = times.filter(|now| path.handle_timeout(None, *now).probe.ping == [addr(A)]);
        asked.map(|now| (now - called).as_millis()).collect::<Vec<_>>()
    };
    assert_eq!(pings_after(after(start, 30), &mut path), [20, 70, 200]);
    assert_eq!(pings_after(after(start, 5_500), &mut path), [200]);
    assert_eq!(pings_after(after(start, 20_500), &mut path), [20, 70, 200]);
    assert_eq!(pings_after(start, &mut direct(start)), [0; 0]);
}

#[test]
fn a_peer_that_falls_silent_is_asked_twice_and_then_reached_by_the_relay_as_well() {
    let start = Instant::now();
    let mut path = direct(start);
    let sent = after(start, 1_000);
    assert!(path.note_send(sent).rescheduled);
    let (mut asked, mut doubted) = (0, None);
    while let Some(now) = path.next_deadline().filter(|_| doubted.is_none()) {
        let news = path.handle_timeout(Some(sent), now);
        asked += usize::from(news.probe.ping == [addr(A)] && !news.resend);
        doubted = news.resend.then_some((now, news.probe));
    }
    let (now, probe) = doubted.unwrap();
    assert!(asked == 2 && now < after(start, 2_200), "{asked} pings, doubt after {:?}", now - sent);
    assert_eq!((probe.call, probe.doubt), (true, Some(sent)));
    assert!(!path.best(now).unwrap().1);
    assert_eq!(path.take_back(RELAYED, now), Some(Some(addr(US))));
    assert_eq!(path.take_back(RELAYED, now), None);
}

/// A path in doubt since its peer fell silent at the first instant, and when it has been so.
pub(super) fn doubted(start: Instant) -> (Path, Instant, Instant) {
    let mut path = direct(start);
    let sent = after(start, 1_000);
    path.note_send(sent);
    loop {
        let now = path.next_deadline().unwrap();
        if path.handle_timeout(Some(sent), now).resend {
            return (path, sent, now);
        }
    }
}

#[test]
fn a_peer_that_may_have_moved_is_looked_for_when_control_says_so() {
    let start = Instant::now();
    let elsewhere = addr("192.0.2.3:3");
    let (mut path, sent, now) = doubted(start);
    let told = now + Duration::from_millis(300);
    path.set_endpoints(&[addr(A), elsewhere], told);
    assert_eq!(path.next_deadline(), Some(told));
    let news = path.handle_timeout(Some(sent), told);
    assert!(news.resend && news.probe.call && news.probe.ping.contains(&elsewhere), "{news:?}");
    assert!(!path.handle_timeout(Some(sent), told).resend, "once");

    path.set_endpoints(&[addr(A), elsewhere], told);
    assert!(path.next_deadline().unwrap() > told, "that is no news");

    let mut answered = doubted(start).0;
    answered.set_endpoints(&[elsewhere], told);
    assert!(!answered.handle_timeout(None, told).resend, "nothing waits for an answer");

    let mut trusted = direct(start);
    trusted.set_endpoints(&[addr(A), addr(B), elsewhere], after(start, 100));
    assert_eq!(trusted.handle_timeout(None, after(start, 100)), News::default());
}

#[test]
fn a_pong_that_sees_us_elsewhere_tells_of_our_nat_now_and_then() {
    let start = Instant::now();
    let mut path = direct(start);
    let pong = |path: &mut Path, source: &str, millis| {
        path.note_ping(TxId([2; 12]), addr(A), after(start, millis));
        path.handle_pong(TxId([2; 12]), addr(source), after(start, millis + 20)).remapped
    };
    assert!(!pong(&mut path, US, 3_000));
    assert_eq!(path.take_back(RELAYED, after(start, 3_020)), None);
    assert!(pong(&mut path, "203.0.113.1:2", 3_500));
    assert_eq!(path.take_back(RELAYED, after(start, 8_000)), Some(Some(addr(US))));
    assert!(!pong(&mut path, "203.0.113.1:3", 6_000), "it has just been told");
    assert!(pong(&mut path, "203.0.113.1:3", 9_000));
    assert_eq!(path.take_back(RELAYED, after(start, 15_520)), None, "nobody was called for so long");
}

#[test]
fn a_peer_heard_from_a_new_address_must_answer_at_the_old_one_soon() {
    let start = Instant::now();
    let mut path = direct(start);
    let asked = after(start, 1_000);
    assert_eq!(path.handle_ping(addr("192.0.2.3:3"), TxId([9; 12]), asked), Heard::New);
    assert_eq!(path.verify(asked), Some(addr(A)));
    assert!(path.best(after(start, 1_290)).unwrap().1);
    assert!(!path.best(after(start, 1_291)).unwrap().1);
    path.note_ping(TxId([8; 12]), addr(A), asked);
    path.handle_pong(TxId([8; 12]), addr(US), after(start, 1_020));
    assert!(path.best(after(start, 7_520)).unwrap().1);
}

#[test]
fn a_peer_whose_session_comes_late_is_looked_for_again_at_once() {
    let start = Instant::now();
    let mut path = looked_for(start);
    path.look_again(after(start, 199));
    assert!(!path.note_send(after(start, 199)).discover, "the pong may be on its way");
    path.look_again(after(start, 420));
    assert!(path.note_send(after(start, 420)).discover);
    assert_eq!(path.discover(after(start, 420)).ping, [addr(A)]);
}

/// A ping to an address at some time, and its pong `rtt` later.
pub(super) fn pong(path: &mut Path, to: &str, source: &str, (sent, rtt): (Instant, u64)) -> Answered {
    path.note_ping(TxId([7; 12]), addr(to), sent);
    path.handle_pong(TxId([7; 12]), addr(source), after(sent, rtt))
}

#[test]
fn a_firewall_that_refuses_every_other_datagram_costs_one_call_and_one_repetition() {
    for relayed in [true, false] {
        let start = Instant::now();
        let mut path = direct(start);
        let mut alternate = |from: u64| {
            let (mut calls, mut refused, mut restored) = (0, 0, 0);
            for millis in from..from + 1_000 {
                if let Some(News { probe, .. }) = path.handle_refused(addr(A), relayed, after(start, millis)) {
                    assert!(!path.best(after(start, millis)).unwrap().1);
                    assert_eq!(probe.ping.iter().filter(|to| **to == addr(A)).count(), 1);
                    (calls, refused) = (calls + usize::from(probe.call), refused + 1);
                }
                restored += usize::from(pong(&mut path, A, US, (after(start, millis), 0)).restored);
            }
            (calls, refused, restored)
        };
        // Without a relay nothing has arrived before the pong.
        assert_eq!(alternate(1_000), (1, 1, usize::from(!relayed)));
        assert_eq!(alternate(6_001), (1, 1, usize::from(!relayed)));
    }
}

#[test]
fn a_refusal_concerns_the_trusted_address_alone_and_pings_nobody_twice() {
    let start = Instant::now();
    let mut path = direct(start);
    path.note_ping(TxId([2; 12]), addr(B), start);
    let now = after(start, 1_000);
    assert_eq!(path.handle_refused(addr(B), true, now), None);
    assert_eq!(path.handle_refused(addr(A), true, now).unwrap().probe.ping, [addr(A)]);
}

#[test]
fn a_ping_that_is_refused_too_takes_the_path_back_once() {
    let start = Instant::now();
    let mut path = direct(start);
    let now = after(start, 1_000);
    let first = path.handle_refused(addr(A), true, now).unwrap();
    assert!(first.probe.call && first.resend);
    assert_eq!(path.take_back(RELAYED, now), None, "a firewall may refuse some of many");
    let probe = Probe { call: true, ..Probe::default() };
    assert_eq!(path.handle_refused(addr(A), true, now), Some(News { probe, ..News::default() }));
    assert_eq!(path.take_back(RELAYED, now), Some(Some(addr(US))));
    assert_eq!(path.handle_refused(addr(A), true, now), None);
}

#[test]
fn a_remap_that_another_address_tells_first_is_still_one() {
    let (start, elsewhere) = (Instant::now(), "203.0.113.1:2");
    let mut path = direct(start);
    pong(&mut path, B, US, (start, 90));
    let answered = pong(&mut path, B, elsewhere, (after(start, 3_000), 90));
    assert_eq!((answered.remapped, path.take_back(RELAYED, after(start, 3_090))), (false, None));
    assert!(pong(&mut path, A, elsewhere, (after(start, 3_100), 20)).remapped);
    assert!(!pong(&mut path, A, elsewhere, (after(start, 3_200), 20)).remapped);
    assert_eq!(
        path.take_back(RELAYED, after(start, 3_220)),
        Some(Some(addr(US))),
        "what is new is no reason to keep it"
    );
}

#[test]
fn a_path_that_answers_as_it_was_takes_nothing_back() {
    for (source, retracted) in [(US, None), ("203.0.113.1:2", Some(Some(addr(US))))] {
        let (mut path, _, doubted) = doubted(Instant::now());
        pong(&mut path, A, source, (doubted, 30));
        assert_eq!(path.take_back(RELAYED, after(doubted, 40)), retracted, "{source}");
    }
}
