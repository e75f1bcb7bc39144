//! Dialling a region, and dialling it again.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_slow_node_has_all_the_time_there_is_and_the_next_is_tried_beside_it() {
    // Whoever is not spoken to by TLS accepts all the same.
    let listeners: Vec<_> = (0..2).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let relays = listeners.iter().map(|listener| {
        let (host, port) = ("127.0.0.1".to_owned(), listener.local_addr().unwrap().port());
        Relay { host, places: Places::named(), port, check: Check::Insecure }
    });
    let relays: Vec<_> = relays.collect();
    for count in [1_u32, 2] {
        let (_packets, task) = task(relays[..count as usize].to_vec(), Link::default());
        let start = Instant::now();
        let error = task.connect().await.err().unwrap();
        assert_eq!(start.elapsed(), CONNECT_LIMIT, "{error}");
        let left = CONNECT_LIMIT - NEXT_NODE * (count - 1);
        assert!(matches!(error, DerpError::Silent { limit, .. } if limit == left), "{error}");
    }
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_region_out_of_reach_is_tried_more_often_while_packets_are_to_go_there() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let places = Places::at(&["127.0.0.1".parse().unwrap()]);
    let relay = Relay { host: "relay".to_owned(), places, port, check: Check::Insecure };
    let underlay = Underlay { tls: Tls::load(None).unwrap(), proxy: None, no_proxy: [].into(), link: Link::default() };
    let id = ConnectionId { region: 1, number: 1 };
    let complaints = Rc::new(RefCell::new(Complaints::new(1)));
    let (region, task) = Region::new(id, vec![relay], NodePrivate::random(), underlay, complaints);
    let tries = Rc::new(std::cell::Cell::new(0));
    let counted = tries.clone();
    spawn_local(task.run(move |_, _| counted.set(counted.get() + 1)));
    tokio::time::sleep(Duration::from_secs(60)).await;
    let in_a_minute = async |packets: usize| {
        let before = tries.get();
        for _ in 0..60 {
            for _ in 0..packets {
                region.send(Packet { peer: NodePublic::from_bytes([9; 32]), contents: vec![7] });
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        tries.get() - before
    };
    assert!((11..=25).contains(&in_a_minute(0).await));
    assert!((28..=61).contains(&in_a_minute(1).await));
}
