//! A busy connection: node 0 asks, node 1 answers, each sends again as TCP does; how long an answer takes at most.

use std::time::{Duration, Instant};

use crate::world::World;

/// TCP's first pause before it sends again; each is twice the one before.
const AGAIN: Duration = Duration::from_millis(200);
/// Between an answer and the next request.
const REST: Duration = Duration::from_millis(20);
const STEP: Duration = Duration::from_millis(5);

/// What one end has sent and knows nothing of.
#[derive(Debug)]
struct Unanswered {
    numbers: Vec<u64>,
    at: Instant,
    pause: Duration,
    resends: usize,
}

impl Unanswered {
    fn send(world: &mut World, node: usize) -> Self {
        let numbers = world.send(node).into_iter().collect();
        Self { numbers, at: world.now, pause: AGAIN, resends: world.nodes[node].resends }
    }

    /// Sends again if it is time, or the engine says so.
    fn again(&mut self, world: &mut World, node: usize) {
        let told = world.nodes[node].trusting.is_none() && world.nodes[node].resends > self.resends;
        if told || world.now >= self.at + self.pause {
            self.numbers.extend(world.send(node));
            let pause = if told { self.pause } else { self.pause * 2 };
            (self.at, self.pause, self.resends) = (world.now, pause, world.nodes[node].resends);
        }
    }

    fn arrived(&self, world: &World, node: usize) -> usize {
        self.numbers.iter().filter(|number| world.nodes[node].received.contains(number)).count()
    }
}

impl World {
    /// The longest pause of such a connection, in so much time, or until it ends if nothing has come by then.
    pub(crate) fn longest_pause(&mut self, time: Duration) -> Duration {
        let (end, mut longest) = (self.now + time, Duration::ZERO);
        while self.now < end {
            let asked = self.now;
            let mut request = Unanswered::send(self, 0);
            let (mut answer, mut heard): (Option<Unanswered>, _) = (None, 0);
            let mut acknowledged = Vec::new();
            while answer.as_ref().is_none_or(|answer| answer.arrived(self, 0) == 0) {
                if self.now - asked > Duration::from_secs(40) {
                    return self.now - asked;
                }
                self.run(STEP);
                let arrived = request.arrived(self, 1);
                match answer.as_mut() {
                    None if arrived > 0 => answer = Some(Unanswered::send(self, 1)),
                    None => request.again(self, 0),
                    Some(answer) => {
                        // What came before is acknowledged again.
                        (heard..arrived.saturating_sub(1)).for_each(|_| acknowledged.extend(self.send(1)));
                        if !acknowledged.iter().any(|number| self.nodes[0].received.contains(number)) {
                            request.again(self, 0);
                        }
                        answer.again(self, 1);
                    }
                }
                heard = arrived.saturating_sub(1);
            }
            longest = longest.max(self.now - asked);
            self.run(REST);
        }
        longest
    }
}
