//! Several addresses of one host, raced: each next one is tried beside the last after a pause, or when all before it
//! have failed. Source: RFC 8305, 5.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::timeout;

/// The outcome of the attempt that first succeeds; the others are dropped. If none does, every failure in the order in
/// which they came; none without attempts.
///
/// # Errors
/// All failures, when every attempt has failed.
pub async fn race<A: Future<Output = Result<T, E>>, T, E>(
    attempts: impl ExactSizeIterator<Item = A>,
    pause: Duration,
) -> Result<T, Vec<E>> {
    let (mut waiting, mut running, mut failures) = (attempts, FuturesUnordered::new(), Vec::new());
    loop {
        if let Some(next) = waiting.next() {
            running.push(next);
        } else if running.is_empty() {
            return Err(failures);
        }
        let ended =
            if waiting.len() > 0 { timeout(pause, running.next()).await.ok().flatten() } else { running.next().await };
        match ended {
            Some(Ok(winner)) => return Ok(winner),
            Some(Err(failure)) => failures.push(failure),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, sleep};

    use super::*;

    const PAUSE: Duration = Duration::from_millis(250);

    /// Attempts that take so many milliseconds each, and succeed or fail with their own number.
    async fn raced(attempts: &[(u64, bool)]) -> (Result<usize, Vec<usize>>, u128) {
        let begun = Instant::now();
        let attempt = |(number, (millis, good)): (usize, &(u64, bool))| {
            let (millis, good) = (*millis, *good);
            async move {
                sleep(Duration::from_millis(millis)).await;
                if good { Ok(number) } else { Err(number) }
            }
        };
        (race(attempts.iter().enumerate().map(attempt), PAUSE).await, begun.elapsed().as_millis())
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_first_attempt_is_overtaken_by_the_next() {
        assert_eq!(raced(&[(9000, true), (100, true)]).await, (Ok(1), 350));
        assert_eq!(raced(&[(100, true), (0, true)]).await, (Ok(0), 100));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_starts_the_next_attempt_at_once() {
        assert_eq!(raced(&[(10, false), (20, true)]).await, (Ok(1), 30));
    }

    #[tokio::test(start_paused = true)]
    async fn all_failures_come_back_and_none_without_attempts() {
        assert_eq!(raced(&[(10, false), (20, false)]).await, (Err(vec![0, 1]), 30));
        assert_eq!(raced(&[]).await, (Err(vec![]), 0));
    }
}
