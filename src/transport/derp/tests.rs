//! Sessions with a relay at the other end of a pipe, in virtual time.

use bytes::{Buf, BytesMut};
use crypto_box::aead::{Aead, AeadCore, OsRng};
use crypto_box::{PublicKey, SalsaBox, SecretKey};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_local};

use super::*;
use crate::transport::bed::underlay;
use crate::transport::link::Link;

mod dials;
mod life;

/// The kind of a ping's frame. Source: Tailscale, derp, `FramePing`.
const PING: u8 = 0x12;

/// A relay's end, and everything else that the session's owner has.
struct World {
    relay: DuplexStream,
    packets: Sender,
    events: mpsc::UnboundedReceiver<Event>,
    session: JoinHandle<(Result<(), DerpError>, bool)>,
}

impl World {
    /// A session that has told the relay who we are, and the box that its answer is to be sealed in.
    async fn introduced() -> (Self, SalsaBox) {
        Self::introduced_on(Link::default()).await
    }

    async fn introduced_on(link: Link) -> (Self, SalsaBox) {
        Self::introduced_by(4096, link).await
    }

    /// By a pipe that holds so many octets.
    async fn introduced_by(room: usize, link: Link) -> (Self, SalsaBox) {
        let (io, mut relay) = tokio::io::duplex(room);
        let (tell, events) = mpsc::unbounded_channel();
        let (packets, task) = task(Vec::new(), link);
        let node = task.key.public();
        let tell = move |event| drop(tell.send(event));
        let session = spawn_local(async move { Session::new(&task, "relay".to_owned(), tell).run(Box::new(io)).await });

        let own = SecretKey::generate(&mut OsRng);
        relay.write_all(&server_key(own.public_key().as_bytes())).await.unwrap();
        assert_eq!(read_frame(&mut relay).await.0, 0x02);
        assert_eq!(read_frame(&mut relay).await, (0x07, vec![0]));
        let sealer = SalsaBox::new(&PublicKey::from(*node.as_bytes()), &own);
        (Self { relay, packets, events, session }, sealer)
    }

    /// A session that the relay has admitted with these limits.
    async fn admitted(limits: &str) -> Self {
        let (mut world, sealer) = Self::introduced().await;
        world.admit(&sealer, limits).await;
        world
    }

    /// A session on this network that the relay has admitted.
    async fn on(link: Link) -> Self {
        let (mut world, sealer) = Self::introduced_on(link).await;
        world.admit(&sealer, "{}").await;
        world
    }

    async fn admit(&mut self, sealer: &SalsaBox, limits: &str) {
        let nonce = SalsaBox::generate_nonce(&mut OsRng);
        let sealed = sealer.encrypt(&nonce, limits.as_bytes()).unwrap();
        self.relay.write_all(&frame(0x03, &[nonce.as_slice(), &sealed].concat())).await.unwrap();
        assert!(matches!(self.events.recv().await, Some(Event::Connected)));
    }

    fn send(&self, count: usize) {
        for _ in 0..count {
            self.packets.push(packet());
        }
    }
}

fn task(relays: Vec<Relay>, link: Link) -> (Sender, Task) {
    let underlay = underlay(link);
    let (id, complaints) = (ConnectionId { region: 1, number: 1 }, Rc::new(RefCell::new(Complaints::new(1))));
    let (region, task) = Region::new(id, relays, NodePrivate::random(), underlay, complaints);
    (region.mailbox, task)
}

fn packet() -> Packet {
    Packet { peer: NodePublic::from_bytes([9; 32]), contents: vec![7; 963] }
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&[kind], length.as_slice(), payload].concat()
}

fn server_key(key: &[u8; 32]) -> Vec<u8> {
    frame(0x01, &[b"DERP\xf0\x9f\x94\x91".as_slice(), key].concat())
}

/// The next frame that is no ping: those depend on how slow the relay is.
async fn read_frame(relay: &mut DuplexStream) -> (u8, Vec<u8>) {
    loop {
        let frame = read_any_frame(relay).await;
        if frame.0 != PING {
            return frame;
        }
    }
}

async fn read_any_frame(relay: &mut DuplexStream) -> (u8, Vec<u8>) {
    let mut head = [0; 5];
    relay.read_exact(&mut head).await.unwrap();
    let mut payload = vec![0; BytesMut::from(&head[1..]).get_u32() as usize];
    relay.read_exact(&mut payload).await.unwrap();
    (head[0], payload)
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn what_waits_follows_our_introduction_and_not_the_relays_answer() {
    let (mut world, _) = World::introduced().await;
    world.send(2);
    for _ in 0..2 {
        let (kind, payload) = read_frame(&mut world.relay).await;
        assert_eq!((kind, payload.len()), (0x04, 32 + 963));
    }
    assert!(world.events.try_recv().is_err(), "connected without the relay's word");
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn one_batch_goes_before_the_relay_admits_us_and_is_paid_then() {
    let (mut world, sealer) = World::introduced().await;
    // Not all at once: it is the sum that counts.
    for count in [1, 99] {
        world.send(count);
        tokio::task::yield_now().await;
    }
    for _ in 0..32 {
        assert_eq!(read_frame(&mut world.relay).await.0, 0x04);
    }
    assert!(timeout(Duration::from_secs(1), read_frame(&mut world.relay)).await.is_err(), "more than a batch");
    world.admit(&sealer, r#"{"TokenBucketBytesPerSecond":10000,"TokenBucketBytesBurst":10000}"#).await;
    let start = Instant::now();
    assert_eq!(read_frame(&mut world.relay).await.0, 0x04);
    // 32 frames of 1,000 octets, less the burst.
    let took = start.elapsed().as_secs_f64();
    assert!((2.1..2.4).contains(&took), "{took}");
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn what_comes_is_heard_while_the_relay_takes_nothing() {
    let mut world = World::admitted("{}").await;
    world.send(64);
    // The pipe is full long before.
    tokio::time::sleep(Duration::from_secs(1)).await;
    world.relay.write_all(&frame(0x05, &[[3; 32].as_slice(), b"hello"].concat())).await.unwrap();
    let Some(Event::Packets(packets)) = world.events.recv().await else { panic!("no packets") };
    assert_eq!(packets[0].1, b"hello".as_slice());
    // The relay goes on after ten seconds, as one that limits our rate does, and gets every packet whole.
    tokio::time::sleep(Duration::from_secs(10)).await;
    for _ in 0..64 {
        assert_eq!(read_frame(&mut world.relay).await.1.len(), 32 + 963);
    }
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_relay_that_takes_nothing_at_all_is_given_up() {
    let world = World::admitted("{}").await;
    let start = Instant::now();
    world.send(64);
    let (ended, admitted) = world.session.await.unwrap();
    assert!(matches!(ended, Err(DerpError::Silent { limit, .. }) if limit.as_secs() == 15), "{ended:?}");
    assert!(admitted && (14..17).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_relay_gets_no_more_than_it_allows() {
    let mut world = World::admitted(r#"{"TokenBucketBytesPerSecond":10000,"TokenBucketBytesBurst":10000}"#).await;
    let start = Instant::now();
    let mut frames = 0;
    world.send(QUEUE);
    while frames < QUEUE {
        read_frame(&mut world.relay).await;
        frames += 1;
    }
    // Of 128 frames of 1,000 octets, all but the first batches wait for their time.
    let took = start.elapsed().as_secs_f64();
    assert!((5.0..14.0).contains(&took), "{took}");
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_burst_goes_at_once_be_it_short_or_longer_than_any_time() {
    for (rate, burst) in [(100_000, 50_000), (1, u64::MAX)] {
        let limits = format!(r#"{{"TokenBucketBytesPerSecond":{rate},"TokenBucketBytesBurst":{burst}}}"#);
        let mut world = World::admitted(&limits).await;
        let start = Instant::now();
        world.send(64);
        for _ in 0..64 {
            read_frame(&mut world.relay).await;
        }
        assert!(start.elapsed() < Duration::from_millis(100), "{rate}, {burst}: {:?}", start.elapsed());
    }
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_relay_that_asks_and_takes_nothing_gets_few_answers_and_then_all_again() {
    const PINGS: usize = 20_000;
    let mut world = World::admitted("{}").await;
    let ping = frame(0x12, b"12345678");
    world.relay.write_all(&ping.repeat(PINGS)).await.unwrap();
    let mut pongs = 0;
    while timeout(Duration::from_secs(1), read_frame(&mut world.relay)).await.is_ok() {
        pongs += 1;
    }
    // What may wait, what the pipe holds, and one that was let in by the last octet.
    assert!(pongs * ping.len() <= (16 << 10) + 4096 + ping.len(), "{pongs} of {PINGS}");
    world.relay.write_all(&ping).await.unwrap();
    assert_eq!(read_frame(&mut world.relay).await, (0x13, b"12345678".to_vec()));
    let mut unanswered = 0;
    while let Ok(event) = world.events.try_recv() {
        let Event::Unanswered(count) = event else { panic!("{event:?}") };
        unanswered += count;
    }
    assert_eq!(unanswered, (PINGS - pongs) as u64);
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_relay_introduces_itself_and_admits_us_once() {
    for again in [server_key(&[1; 32]), frame(0x03, &[0; 64])] {
        let mut world = World::admitted("{}").await;
        world.relay.write_all(&again).await.unwrap();
        let (ended, _) = world.session.await.unwrap();
        let Err(DerpError::Protocol { detail, .. }) = ended else { panic!("{ended:?}") };
        assert!(detail.starts_with("a second server"), "{detail}");
    }
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_relay_brings_nothing_and_is_not_connected_before_it_admits_us() {
    let (mut world, _) = World::introduced().await;
    world.relay.write_all(&frame(0x05, &[[3; 32].as_slice(), b"hello"].concat())).await.unwrap();
    // It would be pinged, doubted and then heard.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let _ = world.relay.write_all(&frame(0x06, &[])).await;
    let (ended, admitted) = world.session.await.unwrap();
    assert!(matches!(ended, Err(DerpError::Protocol { .. })) && !admitted, "{ended:?}");
    assert!(world.events.recv().await.is_none());
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_relay_that_trickles_and_does_not_admit_us_is_given_up() {
    let (mut world, _) = World::introduced().await;
    let start = Instant::now();
    while !world.session.is_finished() && start.elapsed() < Duration::from_secs(60) {
        let _ = world.relay.write_all(&frame(0x06, &[])).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let (ended, admitted) = world.session.await.unwrap();
    assert!(matches!(ended, Err(DerpError::Silent { limit, .. }) if limit == CONNECT_LIMIT), "{ended:?}");
    assert!(!admitted && start.elapsed() < Duration::from_secs(12), "{:?}", start.elapsed());
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_restart_ends_the_session_with_what_the_relay_wishes() {
    let mut world = World::admitted("{}").await;
    let wishes = [2_000_u32.to_be_bytes(), 5_000_u32.to_be_bytes()].concat();
    world.relay.write_all(&frame(0x15, &wishes)).await.unwrap();
    let (ended, _) = world.session.await.unwrap();
    let Err(DerpError::Restarting { reconnect_in, try_for, .. }) = ended else { panic!("{ended:?}") };
    assert_eq!((reconnect_in, try_for), (Duration::from_secs(2), Duration::from_secs(5)));
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_problem_that_the_relay_tells_leaves_the_session_alone() {
    let mut world = World::admitted("{}").await;
    world.relay.write_all(&frame(0x14, b"duplicate client")).await.unwrap();
    world.relay.write_all(&frame(0x12, b"12345678")).await.unwrap();
    assert_eq!(read_frame(&mut world.relay).await, (0x13, b"12345678".to_vec()));
    assert!(!world.session.is_finished());
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_relay_that_closes_the_connection_is_said_to_in_our_words() {
    let world = World::admitted("{}").await;
    drop(world.relay);
    let (ended, _) = world.session.await.unwrap();
    let text = "the connection to relay relay ended: closed by the other side";
    assert_eq!(ended.unwrap_err().to_string(), text);
    // As rustls has it of one that does not say so by TLS.
    let unannounced = io::Error::new(io::ErrorKind::UnexpectedEof, "see https://docs.rs/rustls");
    assert_eq!(ending(&unannounced), CLOSED);
    assert_eq!(ending(&io::Error::other("reset")), "reset");
}
