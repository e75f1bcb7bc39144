//! The wait for a connector's route, on a clock that is wound by hand.

use tokio::time::sleep;

use super::super::bed::{CONNECTOR, Tailnet, ips};
use super::*;

const LIMIT: Duration = Duration::from_secs(30);

type Asked = Result<Vec<IpAddr>, DialError>;

/// A wait for 203.0.113.7 and 2001:db8::7, with netmaps of these connectors' and routers' routes at these times.
struct Run {
    accepts_routes: bool,
    had_time: bool,
    limit: Duration,
    /// What comes of asking anew, half a second later.
    again: Option<fn() -> Asked>,
}

const RUN: Run = Run { accepts_routes: true, had_time: false, limit: LIMIT, again: None };

type Step<'a> = (u64, &'a [&'a str], &'a [&'a str]);

impl Run {
    async fn after(self, mut tailnet: Tailnet, steps: &[Step<'_>]) -> (Result<Reached, DialError>, u128) {
        let exit = ["0.0.0.0/0", "::/0"];
        let first = tailnet.map(&[], &[], &exit);
        let (sender, newest) = watch::channel(Some(first.clone()));
        let connectors = ips(&[CONNECTOR]);
        let addresses = ips(&["203.0.113.7", "2001:db8::7"]);
        let sought = Sought { name: "app.example", connectors: &connectors, addresses };
        let begun = Instant::now();
        let waiting =
            Waiting { netmap: first, newest, accepts_routes: self.accepts_routes, deadline: begun + self.limit, begun };
        let netmaps = async {
            for (millis, connector, router) in steps {
                sleep(Duration::from_millis(*millis).saturating_sub(begun.elapsed())).await;
                sender.send_replace(Some(tailnet.map(connector, router, &exit)));
            }
            std::future::pending::<()>().await;
        };
        let again = async {
            sleep(Duration::from_millis(500)).await;
            match self.again {
                Some(again) => again(),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            outcome = waiting.run(sought, again, |_| self.had_time) => {
                (outcome.map(|(_, reached)| reached), begun.elapsed().as_millis())
            }
            () = netmaps => unreachable!("it pends"),
        }
    }
}

fn own(texts: &[&str]) -> Reached {
    Reached::Own(ips(texts))
}

#[tokio::test(start_paused = true)]
async fn the_wait_ends_with_the_netmap_that_brings_the_route() {
    let steps: &[Step<'_>] = &[(300, &["198.51.100.1/32"], &[]), (700, &["203.0.113.7/32"], &[])];
    let (outcome, millis) = RUN.after(Tailnet::new(), steps).await;
    assert_eq!((outcome.unwrap(), millis), (own(&["203.0.113.7"]), 700));
}

#[tokio::test(start_paused = true)]
async fn of_two_families_the_one_that_is_routed_first_is_taken() {
    let steps: &[Step<'_>] = &[(400, &["2001:db8::7/128"], &[]), (500, &["203.0.113.7/32"], &[])];
    let (outcome, millis) = RUN.after(Tailnet::new(), steps).await;
    assert_eq!((outcome.unwrap(), millis), (own(&["2001:db8::7"]), 400));
}

#[tokio::test(start_paused = true)]
async fn a_route_of_a_family_that_we_lack_is_not_what_is_waited_for() {
    let steps: &[Step<'_>] = &[(400, &["2001:db8::7/128"], &[]), (500, &["203.0.113.7/32"], &[])];
    let (outcome, millis) = RUN.after(Tailnet::v4(), steps).await;
    assert_eq!((outcome.unwrap(), millis), (own(&["203.0.113.7"]), 500));
}

#[tokio::test(start_paused = true)]
async fn without_a_route_it_fails_in_time_and_names_who_should_have_brought_it() {
    let (outcome, millis) = RUN.after(Tailnet::exiting(), &[]).await;
    let error = outcome.unwrap_err();
    let DialError::Route(RouteError::Connector { name, addresses, connectors, waited }) = &error else {
        panic!("{error}")
    };
    assert_eq!((name.as_str(), connectors.as_str()), ("app.example", "connector.tb.example"));
    assert_eq!((addresses.as_str(), *waited, millis), ("203.0.113.7, 2001:db8::7", LIMIT, 30_000));
}

#[tokio::test(start_paused = true)]
async fn where_routes_are_not_accepted_nothing_is_waited_for() {
    let (outcome, millis) = Run { accepts_routes: false, ..RUN }.after(Tailnet::new(), &[]).await;
    let error = outcome.unwrap_err();
    assert!(matches!(error, DialError::Route(RouteError::ConnectorIgnored { .. })), "{error}");
    assert_eq!(millis, 0);
}

#[tokio::test(start_paused = true)]
async fn a_wider_route_waits_for_the_connectors_own_and_gives_way_to_it() {
    let wide: &[&str] = &["203.0.113.0/24"];
    let steps: &[Step<'_>] = &[(0, &[], wide), (900, &["203.0.113.7/32"], wide)];
    let (outcome, millis) = RUN.after(Tailnet::new(), steps).await;
    assert_eq!((outcome.unwrap(), millis), (own(&["203.0.113.7"]), 900));
}

#[tokio::test(start_paused = true)]
async fn a_wider_route_is_taken_after_the_grace_and_later_at_once() {
    let wide: Step<'_> = (0, &[], &["203.0.113.0/24"]);
    let router = Router { id: 3, name: "router.tb.example".to_owned(), exact: false };
    let reached = || Reached::Wider(ips(&["203.0.113.7"]), router.clone());
    let (outcome, millis) = RUN.after(Tailnet::new(), &[wide]).await;
    assert_eq!((outcome.unwrap(), millis), (reached(), GRACE.as_millis()));
    let (outcome, millis) = Run { had_time: true, ..RUN }.after(Tailnet::new(), &[wide]).await;
    assert_eq!((outcome.unwrap(), millis), (reached(), 0));
    let (outcome, millis) = Run { limit: Duration::from_secs(1), ..RUN }.after(Tailnet::new(), &[wide]).await;
    assert_eq!((outcome.unwrap(), millis), (reached(), 1000));
}

#[tokio::test(start_paused = true)]
async fn a_new_answers_addresses_are_sought_as_well() {
    let steps: &[Step<'_>] = &[(300, &["203.0.113.9/32"], &[])];
    let (outcome, millis) = Run { again: Some(|| Ok(ips(&["203.0.113.9"]))), ..RUN }.after(Tailnet::new(), steps).await;
    assert_eq!((outcome.unwrap(), millis), (own(&["203.0.113.9"]), 500));
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_no_more_ends_the_wait_and_a_silent_resolver_does_not() {
    let gone = || Err(ResolveError::NxDomain { name: "app.example".into(), resolver: "connector".into() }.into());
    let (outcome, millis) = Run { again: Some(gone), ..RUN }.after(Tailnet::new(), &[]).await;
    assert!(matches!(outcome, Err(DialError::Resolve(ResolveError::NxDomain { .. }))));
    assert_eq!(millis, 500);
    let silent =
        || Err(ResolveError::Failed { name: "a".into(), resolver: "b".into(), rcode: "SERVFAIL".into() }.into());
    let steps: &[Step<'_>] = &[(900, &["203.0.113.7/32"], &[])];
    let (outcome, millis) = Run { again: Some(silent), ..RUN }.after(Tailnet::new(), steps).await;
    assert_eq!((outcome.unwrap(), millis), (own(&["203.0.113.7"]), 900));
}

#[test]
fn a_router_that_stands_in_is_named_once_and_its_addresses_are_remembered() {
    let mut wider = WiderRoutes::default();
    let router = Router { id: 3, name: "router".to_owned(), exact: false };
    assert!(!wider.had_time(&ips(&["203.0.113.7"])));
    wider.note(&ips(&["203.0.113.7"]), &router);
    assert!(wider.had_time(&ips(&["203.0.113.8", "203.0.113.7"])) && wider.named.contains(&3));
    for first in 0..=255_u8 {
        wider.note(&(0..=255).map(|last| IpAddr::from([10, 0, first, last])).collect::<Vec<_>>(), &router);
    }
    assert!(wider.waited.len() <= REMEMBERED);
}
