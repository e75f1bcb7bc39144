//! A line with a rate, a queue, a delay and a loss: two TAP devices, and threads that carry frames between them.
//!
//! It stands in for `netem`, which not every kernel has. A frame waits for those before it as long as the rate says,
//! is dropped when the queue is full, then takes the delay. A device that is dropped is gone.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tappers::Interface;
use tappers::linux::Tap;

use crate::namespace::Namespace;

/// What a line does, the same in both directions.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Shape {
    /// One way.
    pub(crate) delay: Duration,
    /// Bits a second; zero is no limit.
    pub(crate) rate: u64,
    /// Bytes that may wait; without a rate nothing does.
    pub(crate) queue: usize,
    /// The part of the frames that is lost, each way.
    pub(crate) loss: f64,
}

/// A line that is laid. Dropping it takes it away.
pub(crate) struct Line {
    shape: Arc<Mutex<Shape>>,
    stop: Arc<AtomicBool>,
    carriers: Vec<JoinHandle<()>>,
}

/// Frames under way in one direction, each with the moment at which it arrives.
type Road = Arc<(Mutex<VecDeque<(Instant, Vec<u8>)>>, Condvar)>;

/// The longest frame: no device here offers segmentation, so that is an Ethernet frame.
const FRAME: usize = 1600;
/// How often a carrier looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(100);

impl Line {
    /// Lays a line from `host`, where it is `eth0`, to `wan`, where it is `port`.
    ///
    /// # Errors
    /// When the machine has no TAP devices.
    pub(crate) fn lay(host: &Namespace, wan: &Namespace, port: &str, shape: Shape) -> Result<Self, Failed> {
        let (near, far) = (tap(host, "eth0")?, tap(wan, port)?);
        let mut line = Self { shape: Arc::new(Mutex::new(shape)), stop: Arc::default(), carriers: Vec::new() };
        for (number, from, to) in [(0, &near, &far), (1, &far, &near)] {
            let road = Road::default();
            let entry = Entry {
                shape: Arc::clone(&line.shape),
                // The same losses in every run; other ones on each line.
                dice: StdRng::seed_from_u64(seed(port) * 2 + number),
                free: Instant::now(),
            };
            line.carry({
                let (from, road, stop) = (Arc::clone(from), Arc::clone(&road), Arc::clone(&line.stop));
                move || take_in(&from, &road, entry, &stop)
            });
            line.carry({
                let (to, stop) = (Arc::clone(to), Arc::clone(&line.stop));
                move || give_out(&to, &road, &stop)
            });
        }
        Ok(line)
    }

    /// Gives the line another shape. What is under way arrives as it would have.
    pub(crate) fn reshape(&self, shape: Shape) {
        *self.shape.lock().unwrap_or_else(PoisonError::into_inner) = shape;
    }

    fn carry(&mut self, work: impl FnOnce() + Send + 'static) {
        self.carriers.push(thread::spawn(work));
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.carriers.drain(..).for_each(|carrier| drop(carrier.join()));
    }
}

/// What decides about a frame at a road's entry.
struct Entry {
    shape: Arc<Mutex<Shape>>,
    dice: StdRng,
    /// When the last frame that was let in has left the queue.
    free: Instant,
}

impl Entry {
    /// When a frame that comes now arrives, if it does.
    fn arrival(&mut self, length: usize, now: Instant) -> Option<Instant> {
        let Shape { delay, rate, queue, loss } = *self.shape.lock().unwrap_or_else(PoisonError::into_inner);
        if rate > 0 {
            let on_line = |bytes: usize| Duration::from_secs_f64(bytes as f64 * 8.0 / rate as f64);
            let waiting = self.free.saturating_duration_since(now);
            if waiting > on_line(queue) {
                return None;
            }
            // What is lost on the way takes its time on the line too.
            self.free = now + waiting + on_line(length);
        }
        let lost = loss > 0.0 && self.dice.random_bool(loss);
        (!lost).then(|| self.free.max(now) + delay)
    }
}

fn take_in(from: &Tap, road: &Road, mut entry: Entry, stop: &AtomicBool) {
    let mut frame = [0; FRAME];
    while !stop.load(Ordering::Relaxed) {
        match from.recv(&mut frame) {
            Ok(length) => {
                if let Some(arrival) = entry.arrival(length, Instant::now()) {
                    let mut frames = road.0.lock().unwrap_or_else(PoisonError::into_inner);
                    frames.push_back((arrival, frame[..length].to_vec()));
                    drop(frames);
                    road.1.notify_one();
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let limit = Timespec::try_from(LOOK).unwrap_or_default();
                let _ = poll(&mut [PollFd::new(from, PollFlags::IN)], Some(&limit));
            }
            // The device is still down, or already gone.
            Err(_) => thread::sleep(LOOK),
        }
    }
}

fn give_out(to: &Tap, road: &Road, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let frames = road.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut frames, _) =
            road.1.wait_timeout_while(frames, LOOK, |frames| frames.is_empty()).unwrap_or_else(PoisonError::into_inner);
        let Some((arrival, frame)) = frames.pop_front() else { continue };
        drop(frames);
        let early = arrival.saturating_duration_since(Instant::now());
        if !early.is_zero() {
            thread::sleep(early);
        }
        // A full device loses frames, as a card does.
        drop(to.send(&frame));
    }
}

fn tap(namespace: &Namespace, name: &str) -> Result<Arc<Tap>, Failed> {
    let tap = namespace.inside(|| {
        let tap = Tap::new_named(Interface::new(name)?)?;
        tap.set_nonblocking(true)?;
        Ok::<_, io::Error>(tap)
    })??;
    Ok(Arc::new(tap))
}

fn seed(port: &str) -> u64 {
    port.bytes().fold(0, |sum, byte| sum * 31 + u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(shape: Shape, now: Instant) -> Entry {
        Entry { shape: Arc::new(Mutex::new(shape)), dice: StdRng::seed_from_u64(1), free: now }
    }

    #[test]
    fn frames_wait_for_each_other_as_the_rate_says_then_take_the_delay() {
        let now = Instant::now();
        let delay = Duration::from_millis(10);
        let mut entry = entry(Shape { delay, rate: 8_000_000, queue: 10_000, loss: 0.0 }, now);
        assert_eq!(entry.arrival(1000, now), Some(now + Duration::from_millis(1) + delay));
        assert_eq!(entry.arrival(1000, now), Some(now + Duration::from_millis(2) + delay));
    }

    #[test]
    fn a_full_queue_drops_and_is_free_again_later() {
        let now = Instant::now();
        let mut entry = entry(Shape { rate: 8_000_000, queue: 3000, ..Shape::default() }, now);
        let let_in = (0..10).filter(|_| entry.arrival(1000, now).is_some()).count();
        assert_eq!(let_in, 4);
        assert!(entry.arrival(1000, now + Duration::from_millis(2)).is_some());
    }

    #[test]
    fn a_hundredth_is_lost_and_nothing_where_there_is_no_loss() {
        let now = Instant::now();
        let arrived = |loss| {
            let mut entry = entry(Shape { loss, ..Shape::default() }, now);
            (0..10_000).filter(|_| entry.arrival(1000, now).is_some()).count()
        };
        assert_eq!(arrived(0.0), 10_000);
        assert!((9_850..=9_950).contains(&arrived(0.01)));
    }
}
