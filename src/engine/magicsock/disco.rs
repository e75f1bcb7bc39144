//! Our pings to one peer that wait for their pongs.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::wire::disco::TxId;

/// After that a ping is lost. Source: Tailscale, wgengine/magicsock, `pingTimeoutDuration`.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A ping without its pong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sent {
    tx: TxId,
    /// Where it went, which is the address that a pong speaks for, wherever the pong comes from.
    pub(super) to: SocketAddr,
    at: Instant,
}

/// All of them, oldest first.
#[derive(Debug, Default)]
pub(super) struct Pings {
    sent: VecDeque<Sent>,
}

impl Pings {
    pub(super) fn sent(&mut self, tx: TxId, to: SocketAddr, at: Instant) {
        self.sent.push_back(Sent { tx, to, at });
    }

    /// The ping that a pong answers, and how long that took; `None` for an unknown or late one.
    pub(super) fn answered(&mut self, tx: TxId, now: Instant) -> Option<(SocketAddr, Duration)> {
        let index = self.sent.iter().position(|sent| sent.tx == tx)?;
        let sent = self.sent.remove(index)?;
        Some((sent.to, now.duration_since(sent.at)))
    }

    /// The next ping that has timed out.
    pub(super) fn lost(&mut self, now: Instant) -> Option<Sent> {
        self.sent.pop_front_if(|sent| now.duration_since(sent.at) >= TIMEOUT)
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.sent.front().map(|sent| sent.at + TIMEOUT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pong_counts_once_and_in_time() {
        let now = Instant::now();
        let to = "192.0.2.1:1".parse().unwrap();
        let mut pings = Pings::default();
        pings.sent(TxId([1; 12]), to, now);
        pings.sent(TxId([2; 12]), to, now + Duration::from_secs(1));
        let later = now + Duration::from_millis(30);
        assert_eq!(pings.answered(TxId([1; 12]), later), Some((to, Duration::from_millis(30))));
        assert_eq!(pings.answered(TxId([1; 12]), later), None);
        assert_eq!(pings.next_deadline(), Some(now + Duration::from_secs(6)));
        assert!(pings.lost(now + Duration::from_secs(5)).is_none());
        assert!(pings.lost(now + Duration::from_secs(6)).is_some());
        assert_eq!(pings.answered(TxId([2; 12]), now + Duration::from_secs(7)), None);
    }
}
