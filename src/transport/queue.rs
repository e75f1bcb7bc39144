//! A bounded queue between two threads that drops its oldest item when it is full: for packets, where the newest
//! matter most and a sender must never wait.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

struct Shared<T> {
    items: Mutex<VecDeque<T>>,
    capacity: usize,
    closed: AtomicBool,
    wake: Notify,
}

/// The end that packets go into.
pub(super) struct Sender<T> {
    shared: Arc<Shared<T>>,
}

/// The end that packets come out of.
pub(super) struct Receiver<T> {
    shared: Arc<Shared<T>>,
}

/// A queue of at most `capacity` items.
pub(super) fn queue<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let items = Mutex::new(VecDeque::with_capacity(capacity));
    let shared = Arc::new(Shared { items, capacity, closed: AtomicBool::new(false), wake: Notify::new() });
    (Sender { shared: shared.clone() }, Receiver { shared })
}

impl<T> Sender<T> {
    /// Adds an item. Returns `false` if the oldest was dropped for it.
    pub(super) fn push(&self, item: T) -> bool {
        let mut items = self.shared.items.lock().unwrap_or_else(PoisonError::into_inner);
        let full = items.len() == self.shared.capacity;
        if full {
            items.pop_front();
        }
        items.push_back(item);
        drop(items);
        self.shared.wake.notify_one();
        !full
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.wake.notify_one();
    }
}

impl<T> Receiver<T> {
    /// Waits for items and takes at most `limit` of them; `None` when the sender is gone and all are taken.
    pub(super) async fn recv(&self, limit: usize) -> Option<Vec<T>> {
        loop {
            {
                let mut items = self.shared.items.lock().unwrap_or_else(PoisonError::into_inner);
                if !items.is_empty() {
                    let count = items.len().min(limit);
                    return Some(items.drain(..count).collect());
                }
            }
            if self.is_closed() {
                return None;
            }
            self.shared.wake.notified().await;
        }
    }

    /// Whether the sender is gone.
    pub(super) fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    /// Waits until the sender is gone; items that come meanwhile stay.
    pub(super) async fn closed(&self) {
        while !self.is_closed() {
            self.shared.wake.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_queue_drops_its_oldest_item() {
        let (sender, receiver) = queue(2);
        assert!(sender.push(1));
        assert!(sender.push(2));
        assert!(!sender.push(3));
        assert_eq!(receiver.recv(8).await, Some(vec![2, 3]));
    }

    #[tokio::test]
    async fn a_queue_without_sender_ends_after_its_last_item() {
        let (sender, receiver) = queue(2);
        sender.push(1);
        drop(sender);
        assert_eq!(receiver.recv(8).await, Some(vec![1]));
        assert_eq!(receiver.recv(8).await, None);
        receiver.closed().await;
    }
}
