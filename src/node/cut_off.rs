//! Whether a run that may use no relay can reach anybody: where no UDP comes back, no peer does.
//!
//! Netcheck knows a few seconds after the first netmap; a dial would find out only when its time is over.

use tokio::sync::watch;

use crate::control::HostReport;

/// Whether the first look at the network finds that no UDP comes back from any STUN server. What comes later is told of
/// each peer in use. `false` also where the node ends before.
pub(super) async fn is_udp_blocked(mut reports: watch::Receiver<HostReport>) -> bool {
    let works = |report: &HostReport| report.net_info.as_ref()?.working_udp;
    let known = reports.wait_for(|report| works(report).is_some()).await;
    known.is_ok_and(|report| works(&report) == Some(false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::tailcfg::hostinfo::NetInfo;

    fn report(working_udp: Option<bool>) -> HostReport {
        HostReport { net_info: Some(NetInfo { working_udp, ..NetInfo::default() }), ..HostReport::default() }
    }

    #[tokio::test]
    async fn the_first_look_that_tells_of_udp_counts() {
        for works in [true, false] {
            let (out, reports) = watch::channel(HostReport::default());
            let told = async {
                for known in [None, Some(works), Some(!works)] {
                    out.send_replace(report(known));
                    tokio::task::yield_now().await;
                }
            };
            assert_eq!(tokio::join!(is_udp_blocked(reports), told).0, !works);
        }
        let (out, reports) = watch::channel(report(None));
        drop(out);
        assert!(!is_udp_blocked(reports).await, "the node has ended");
    }
}
