//! The answers of this run, of all resolvers: each is given again until its time is over.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::super::error::ResolveError;
use crate::dns::ResolverAddr;

/// The most answers that are kept. A browser's run asks for a few hundred names; more than that need not be quick.
const CAPACITY: usize = 1024;

/// A name and those of whom it is asked. Who that is may depend on more than the name.
pub(super) type Key = (String, Vec<ResolverAddr>);

/// What a question came to: addresses, at least one, or why there are none.
pub(super) type Outcome = Result<Vec<IpAddr>, ResolveError>;

/// What was asked before.
#[derive(Default)]
pub(super) struct Answers {
    kept: HashMap<Key, (Outcome, Instant)>,
}

impl Answers {
    /// What was answered, if that still holds.
    pub(super) fn find(&self, key: &Key, now: Instant) -> Option<Outcome> {
        let (outcome, until) = self.kept.get(key)?;
        (now < *until).then(|| outcome.clone())
    }

    /// Keeps an answer for `ttl`. When there is no room, the one that ends first makes room.
    pub(super) fn keep(&mut self, key: Key, outcome: Outcome, ttl: Duration, now: Instant) {
        if ttl.is_zero() {
            self.kept.remove(&key);
            return;
        }
        if self.kept.len() >= CAPACITY && !self.kept.contains_key(&key) {
            self.kept.retain(|_, (_, until)| now < *until);
        }
        if self.kept.len() >= CAPACITY
            && !self.kept.contains_key(&key)
            && let Some(first) = self.kept.iter().min_by_key(|(_, (_, until))| *until).map(|(key, _)| key.clone())
        {
            self.kept.remove(&first);
        }
        self.kept.insert(key, (outcome, now + ttl));
    }

    /// Forgets an answer.
    pub(super) fn forget(&mut self, key: &Key) {
        self.kept.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: usize) -> Key {
        (format!("n{number}.example"), Vec::new())
    }

    fn outcome(last: u8) -> Outcome {
        Ok(vec![[10, 0, 0, last].into()])
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn an_answer_is_given_again_until_its_time_is_over() {
        let (mut answers, now) = (Answers::default(), Instant::now());
        answers.keep(key(1), outcome(1), 5 * SECOND, now);
        assert_eq!(answers.find(&key(1), now + 4 * SECOND), Some(outcome(1)));
        assert_eq!(answers.find(&key(1), now + 5 * SECOND), None);
        assert_eq!(answers.find(&key(2), now), None);
    }

    #[test]
    fn an_answer_without_time_replaces_the_last_and_is_not_kept() {
        let (mut answers, now) = (Answers::default(), Instant::now());
        answers.keep(key(1), outcome(1), 5 * SECOND, now);
        answers.keep(key(1), outcome(2), Duration::ZERO, now);
        assert_eq!(answers.find(&key(1), now), None);
        answers.keep(key(1), outcome(1), 5 * SECOND, now);
        answers.forget(&key(1));
        assert_eq!(answers.find(&key(1), now), None);
    }

    #[test]
    fn room_is_made_by_what_is_over_and_then_by_what_ends_first() {
        let (mut answers, now) = (Answers::default(), Instant::now());
        answers.keep(key(0), outcome(0), SECOND, now);
        for number in 1..CAPACITY {
            answers.keep(key(number), outcome(1), 60 * SECOND, now);
        }
        answers.keep(key(1), outcome(2), 30 * SECOND, now);
        answers.keep(key(CAPACITY), outcome(1), 60 * SECOND, now + 2 * SECOND);
        assert_eq!(answers.kept.len(), CAPACITY);
        answers.keep(key(CAPACITY + 1), outcome(1), 60 * SECOND, now + 2 * SECOND);
        assert_eq!(answers.kept.len(), CAPACITY);
        let left = |number| answers.find(&key(number), now + 2 * SECOND).is_some();
        assert!(!left(1) && left(2) && left(CAPACITY) && left(CAPACITY + 1));
    }
}
