//! How long a node that lost its place may stay away.

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::admission::Lost;

/// Waits until the node has not come back in time; for ever while it is in. Says what put it out.
pub(super) async fn overdue(mut back_by: watch::Receiver<Option<(Instant, Lost)>>) -> Lost {
    loop {
        let due = *back_by.borrow_and_update();
        let Some((deadline, lost)) = due else {
            match back_by.changed().await {
                Ok(()) => continue,
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            () = sleep_until(deadline) => return lost,
            Ok(()) = back_by.changed() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn a_node_that_does_not_come_back_in_time_is_told_by_what_put_it_out() {
        let back_by = watch::Sender::new(None);
        let mut overdue = std::pin::pin!(overdue(back_by.subscribe()));
        assert!(timeout(LIMIT * 60, &mut overdue).await.is_err());
        back_by.send_replace(Some((Instant::now() + LIMIT, Lost::Deleted)));
        assert!(timeout(LIMIT / 2, &mut overdue).await.is_err());
        back_by.send_replace(None);
        assert!(timeout(LIMIT * 60, &mut overdue).await.is_err());
        let lost = Instant::now();
        back_by.send_replace(Some((lost + LIMIT, Lost::Expired)));
        assert_eq!(overdue.await, Lost::Expired);
        assert_eq!(lost.elapsed().as_secs(), LIMIT.as_secs());
    }
}
