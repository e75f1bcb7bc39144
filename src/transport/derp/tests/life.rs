//! Relays that fall silent: when they are asked, doubted, believed again, and given up.

use super::*;

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_relay_that_falls_silent_is_pinged_once_and_an_idle_one_never() {
    let mut world = World::admitted("{}").await;
    let pinged = async |world: &mut World| {
        timeout(Duration::from_secs(20), read_any_frame(&mut world.relay)).await.ok().map(|(kind, _)| kind)
    };
    assert_eq!(pinged(&mut world).await, None, "nothing was carried");
    let carry: [fn(&World) -> Vec<u8>; 2] = [
        |world| {
            world.send(1);
            Vec::new()
        },
        |_| frame(0x05, &[[3; 32].as_slice(), b"hello"].concat()),
    ];
    for carry in carry {
        let start = Instant::now();
        let comes = carry(&world);
        world.relay.write_all(&comes).await.unwrap();
        if comes.is_empty() {
            assert_eq!(read_frame(&mut world.relay).await.0, 0x04);
        }
        assert_eq!((pinged(&mut world).await, start.elapsed()), (Some(PING), Duration::from_secs(2)));
        world.relay.write_all(&frame(0x13, b"12345678")).await.unwrap();
        assert_eq!(pinged(&mut world).await, None, "once");
    }
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_relay_that_acknowledges_and_does_not_answer_is_doubted_and_then_given_up_whatever_is_sent() {
    let mut world = World::admitted("{}").await;
    let (mut taken, _silent) = tokio::io::split(world.relay);
    spawn_local(async move { tokio::io::copy(&mut taken, &mut tokio::io::sink()).await });
    let start = Instant::now();
    let mut doubted = None;
    while !world.session.is_finished() && start.elapsed() < Duration::from_secs(60) {
        world.packets.push(packet());
        tokio::time::sleep(Duration::from_millis(100)).await;
        while let Ok(event) = world.events.try_recv() {
            assert!(matches!(event, Event::Doubted) && doubted.is_none(), "{event:?}");
            doubted = Some(start.elapsed());
        }
    }
    assert!((5.0..5.3).contains(&doubted.unwrap().as_secs_f64()), "{doubted:?}");
    let (ended, admitted) = world.session.await.unwrap();
    assert!(matches!(ended, Err(DerpError::Silent { limit, .. }) if limit.as_secs() == 15) && admitted, "{ended:?}");
    assert!((17.0..17.3).contains(&start.elapsed().as_secs_f64()), "{:?}", start.elapsed());
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_relay_whose_answer_waits_in_a_slow_line_is_doubted_and_kept() {
    let mut world = World::admitted("{}").await;
    world.send(1);
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(matches!(world.events.try_recv(), Ok(Event::Doubted)));
    world.relay.write_all(&frame(0x13, b"12345678")).await.unwrap();
    assert!(matches!(world.events.recv().await, Some(Event::Answers)));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!world.session.is_finished() && world.events.try_recv().is_err());
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_relay_that_takes_a_flood_slowly_is_not_doubted_though_nothing_comes_back() {
    let mut world = World::admitted("{}").await;
    for _ in 0..60 {
        world.send(QUEUE);
        // Ten kilobytes a second, of packets that nobody answers; the ping is behind them.
        let octets = &mut [0; 10_000];
        world.relay.read_exact(octets).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(world.events.try_recv().is_err());
    }
    assert!(!world.session.is_finished());
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_relay_that_pauses_in_a_flood_is_believed_again_when_it_takes_more() {
    let mut world = World::admitted("{}").await;
    world.send(QUEUE);
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(matches!(world.events.try_recv(), Ok(Event::Doubted)));
    for _ in 0..60 {
        world.send(QUEUE);
        world.relay.read_exact(&mut [0; 10_000]).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(matches!(world.events.try_recv(), Ok(Event::Answers)) && world.events.try_recv().is_err());
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_relay_that_takes_a_flood_slowly_by_a_deep_line_is_kept_and_believed_in_the_end() {
    let (mut world, sealer) = World::introduced_by(1 << 20, Link::default()).await;
    world.admit(&sealer, "{}").await;
    let mut told = Vec::new();
    for _ in 0..60 {
        world.send(QUEUE);
        // More is sent than taken until the line is full.
        world.relay.read_exact(&mut [0; 10_000]).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        told.extend(std::iter::from_fn(|| world.events.try_recv().ok()));
    }
    assert!(matches!(told[..], [Event::Doubted, Event::Answers]), "{told:?}");
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_relay_is_asked_at_once_when_the_network_moved_and_left_when_it_does_not_answer() {
    for answers in [true, false] {
        let (link, move_once) = Link::moving();
        let mut world = World::on(link).await;
        move_once();
        let start = Instant::now();
        assert_eq!((read_any_frame(&mut world.relay).await.0, start.elapsed()), (PING, Duration::ZERO));
        if answers {
            world.relay.write_all(&frame(0x13, b"12345678")).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(3_100)).await;
        assert_eq!(world.session.is_finished(), !answers);
    }
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_relay_that_does_not_answer_is_left_however_often_the_network_moves() {
    let (link, move_once) = Link::moving();
    let world = World::on(link).await;
    for _ in 0..5 {
        move_once();
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    let start = Instant::now();
    let (ended, _) = timeout(Duration::from_secs(1), world.session).await.unwrap().unwrap();
    assert!(matches!(ended, Err(DerpError::Silent { limit, .. }) if limit.as_secs() == 3), "{ended:?}");
    assert_eq!(start.elapsed(), Duration::ZERO, "it ended while the network moved");
}
