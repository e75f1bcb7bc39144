//! Says that control has been out of reach for long, and that it is back: peers, names and routes get old meanwhile.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tracing::warn;

use super::{Phase, RegisterError};

/// A server that restarts, or a network that changes, is back sooner.
const LONG: Duration = Duration::from_secs(15);

/// Warns for as long as it is polled.
pub(super) async fn say_unreached(mut phase: watch::Receiver<Phase>) -> Infallible {
    loop {
        let error = lost_for_long(&mut phase).await;
        warn!(%error, "control cannot be reached: what is known of peers, names and routes gets old");
        wait_for(&mut phase, |phase| matches!(phase, Phase::Online)).await;
        warn!("control can be reached again");
    }
}

/// Waits until the session has been lost for long. Why it was not there again at first.
async fn lost_for_long(phase: &mut watch::Receiver<Phase>) -> Arc<RegisterError> {
    loop {
        let Phase::Reconnecting(error) = wait_for(phase, |phase| matches!(phase, Phase::Reconnecting(_))).await else {
            continue;
        };
        if timeout(LONG, wait_for(phase, |phase| !matches!(phase, Phase::Reconnecting(_)))).await.is_err() {
            return error;
        }
    }
}

/// Waits for a phase; for ever where none is told any more.
async fn wait_for(phase: &mut watch::Receiver<Phase>, wanted: impl FnMut(&Phase) -> bool) -> Phase {
    let found = phase.wait_for(wanted).await.map(|phase| phase.clone());
    match found {
        Ok(phase) => phase,
        Err(_) => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    fn lost() -> Phase {
        Phase::Reconnecting(Arc::new(RegisterError::KeyExpired { message: "whatever it was".to_owned() }))
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_that_is_soon_there_again_is_not_missed() {
        let told = watch::Sender::new(Phase::Connecting(None));
        let mut phase = told.subscribe();
        let mut missed = std::pin::pin!(lost_for_long(&mut phase));
        for short in [lost(), Phase::Online, lost(), lost(), Phase::Online] {
            told.send_replace(short);
            assert!(timeout(LONG / 3, &mut missed).await.is_err());
        }
        assert!(timeout(LONG * 100, &mut missed).await.is_err());
        told.send_replace(lost());
        let since = Instant::now();
        missed.await;
        assert_eq!(since.elapsed().as_secs(), LONG.as_secs());
    }
}
