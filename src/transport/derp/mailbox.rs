//! Between the driver and a region's session: packets that wait for the relay, and whether the region is home.
//!
//! Both ends live on one thread, so a packet that is put in while the session runs wakes nobody. When it is full its
//! oldest packet is dropped, as a router would do: the newest matter most, and the driver must never wait.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::Packet;

struct Shared {
    packets: VecDeque<Packet>,
    capacity: usize,
    /// How many were ever put in.
    pushed: u64,
    home: bool,
    closed: bool,
    /// Who sleeps until something changes.
    reader: Option<Waker>,
}

impl Shared {
    fn wake(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    /// An initiation that waits for the peer of a newer one. Only the newest makes a session: after an outage a peer would
    /// answer the oldest of many, and drop all that follow within 20 ms. The newer one takes its place, since at the tail
    /// of a queue that never empties it would be superseded before it leaves.
    /// Source: wireguard-go, device/constants.go, `HandshakeInitationRate`.
    fn superseded(&mut self, newer: &Packet) -> Option<&mut Packet> {
        if !is_initiation(&newer.contents) {
            return None;
        }
        self.packets.iter_mut().find(|older| older.peer == newer.peer && is_initiation(&older.contents))
    }
}

/// The driver's end.
pub(super) struct Sender {
    shared: Rc<RefCell<Shared>>,
}

/// The session's end.
pub(super) struct Receiver {
    shared: Rc<RefCell<Shared>>,
}

/// A mailbox for at most `capacity` packets.
pub(super) fn mailbox(capacity: usize) -> (Sender, Receiver) {
    let packets = VecDeque::with_capacity(capacity);
    let shared =
        Rc::new(RefCell::new(Shared { packets, capacity, pushed: 0, home: false, closed: false, reader: None }));
    (Sender { shared: shared.clone() }, Receiver { shared })
}

impl Sender {
    /// Adds a packet. Returns `false` if the oldest was dropped for it.
    pub(super) fn push(&self, packet: Packet) -> bool {
        let mut shared = self.shared.borrow_mut();
        shared.pushed += 1;
        shared.wake();
        if let Some(older) = shared.superseded(&packet) {
            older.contents = packet.contents;
            return true;
        }
        let full = shared.packets.len() == shared.capacity;
        if full {
            shared.packets.pop_front();
        }
        shared.packets.push_back(packet);
        !full
    }

    /// Says whether the region is home.
    pub(super) fn set_home(&self, home: bool) {
        let mut shared = self.shared.borrow_mut();
        if std::mem::replace(&mut shared.home, home) != home {
            shared.wake();
        }
    }
}

/// Whether it begins a WireGuard handshake. Source: the WireGuard paper, section 5.4.2.
fn is_initiation(contents: &[u8]) -> bool {
    contents.len() == 148 && contents.starts_with(&[1, 0, 0, 0])
}

impl Drop for Sender {
    fn drop(&mut self) {
        let mut shared = self.shared.borrow_mut();
        shared.closed = true;
        shared.wake();
    }
}

impl Receiver {
    /// The oldest packet.
    pub(super) fn pop(&self) -> Option<Packet> {
        self.shared.borrow_mut().packets.pop_front()
    }

    /// Whether no packet waits.
    pub(super) fn is_empty(&self) -> bool {
        self.shared.borrow().packets.is_empty()
    }

    /// How many packets were put in so far.
    pub(super) fn pushed(&self) -> u64 {
        self.shared.borrow().pushed
    }

    /// Waits until more than `before` packets were put in.
    pub(super) async fn pushed_since(&self, before: u64) {
        poll_fn(|cx| {
            self.register(cx);
            if self.pushed() > before { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Whether the region is home.
    pub(super) fn is_home(&self) -> bool {
        self.shared.borrow().home
    }

    /// Whether the sender is gone.
    pub(super) fn is_closed(&self) -> bool {
        self.shared.borrow().closed
    }

    /// Has the next change wake this task.
    pub(super) fn register(&self, cx: &Context<'_>) {
        let mut shared = self.shared.borrow_mut();
        match &mut shared.reader {
            Some(reader) => reader.clone_from(cx.waker()),
            reader @ None => *reader = Some(cx.waker().clone()),
        }
    }

    /// Has nobody woken until the next [`register`](Self::register): whoever asks looks again before it sleeps.
    pub(super) fn unregister(&self) {
        self.shared.borrow_mut().reader = None;
    }

    /// Waits until the sender is gone; packets that come meanwhile stay.
    pub(super) async fn closed(&self) {
        poll_fn(|cx| {
            self.register(cx);
            if self.is_closed() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::NodePublic;

    fn packet(octet: u8) -> Packet {
        Packet { peer: NodePublic::from_bytes([9; 32]), contents: vec![octet] }
    }

    #[test]
    fn a_full_mailbox_drops_its_oldest_packet() {
        let (sender, receiver) = mailbox(2);
        assert!(sender.push(packet(1)));
        assert!(sender.push(packet(2)));
        assert!(!sender.push(packet(3)));
        assert_eq!([receiver.pop(), receiver.pop(), receiver.pop()], [Some(packet(2)), Some(packet(3)), None]);
    }

    /// As long as an initiation.
    fn to(peer: u8, kind: u8, octet: u8) -> Packet {
        let mut contents = vec![octet; 148];
        contents[..4].copy_from_slice(&[kind, 0, 0, 0]);
        Packet { peer: NodePublic::from_bytes([peer; 32]), contents }
    }

    #[test]
    fn of_several_initiations_to_a_peer_the_newest_is_sent_where_the_oldest_stood() {
        let (sender, receiver) = mailbox(4);
        for packet in [to(1, 1, 1), to(2, 1, 2), to(1, 4, 3), to(1, 1, 4), to(1, 1, 5)] {
            assert!(sender.push(packet));
        }
        let left = std::iter::from_fn(|| receiver.pop()).collect::<Vec<_>>();
        assert_eq!(left, [to(1, 1, 5), to(2, 1, 2), to(1, 4, 3)]);
    }

    #[test]
    fn an_initiation_that_is_repeated_leaves_a_queue_that_never_empties() {
        let (sender, receiver) = mailbox(8);
        let mut left = Vec::new();
        for round in 0..16 {
            sender.push(to(2, 4, round));
            if round % 4 == 3 {
                sender.push(to(1, 1, round));
            }
            // As much leaves as comes, once the queue is full.
            left.extend((round >= 8).then(|| receiver.pop()).flatten());
        }
        assert!(left.contains(&to(1, 1, 7)), "{left:?}");
    }

    #[tokio::test]
    async fn a_mailbox_without_sender_is_closed_and_keeps_what_is_in_it() {
        let (sender, receiver) = mailbox(2);
        sender.push(packet(1));
        drop(sender);
        receiver.closed().await;
        assert_eq!(receiver.pop(), Some(packet(1)));
    }
}
