//! One session from its first request to its loss: register, then the map stream and our reports beside each other.
//!
//! The stream's request carries what we know of ourselves already, and so does an update beside it: servers other than
//! headscale take it from the update alone, and headscale tells peers of it sooner.
//! Source: Tailscale, control/controlclient/direct.go, `sendMapRequest`; tailcfg, `MapRequest` (capability version 68).

use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::{Method, StatusCode};
use jiff::Timestamp;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::admission::Lost;
use super::dial::{Session, excerpt};
use super::map::{MapStream, WATCHDOG};
use super::register::Answer;
use super::update::{ERROR_BODY_MAX, MapRequester, UPDATE_LIMIT, Updates, exit_node_id, is_unknown};
use super::{ConnectError, Failure, HostReport, Phase, RegisterError, Task};
use crate::netmap::Netmap;
use crate::netmap::diff::Changes;
use crate::transport::backoff::Backoff;

/// How a session ended.
pub(super) enum Ended {
    /// To be opened again after a pause.
    Lost(RegisterError),
    /// To be tried again after so long.
    RateLimited(Duration),
    /// To be opened again after a pause, to register anew.
    Again,
    /// For good.
    Over(Failure),
}

impl From<ConnectError> for Ended {
    fn from(error: ConnectError) -> Self {
        Self::Lost(error.into())
    }
}

impl From<RegisterError> for Ended {
    fn from(error: RegisterError) -> Self {
        match error {
            RegisterError::RateLimited { wait } => Self::RateLimited(wait),
            RegisterError::Connect(error) if heals(&error) => Self::Lost(error.into()),
            refused @ (RegisterError::Connect(_)
            | RegisterError::KeyUnknown { .. }
            | RegisterError::KeyExpired { .. }
            | RegisterError::KeyUsed { .. }
            | RegisterError::Tags { .. }
            | RegisterError::LoginNeeded
            | RegisterError::ApprovalPending
            | RegisterError::NodeKeyExpired
            | RegisterError::Refused { .. }) => Self::Over(Failure::Register(refused)),
        }
    }
}

/// Whether a try later may succeed without anybody's help.
fn heals(error: &ConnectError) -> bool {
    match error {
        ConnectError::Tls { .. } | ConnectError::NotControl { .. } => false,
        ConnectError::Resolve { .. }
        | ConnectError::Connect { .. }
        | ConnectError::Silent { .. }
        | ConnectError::Proxy { .. }
        | ConnectError::Server { .. }
        | ConnectError::Noise { .. }
        | ConnectError::Protocol { .. } => true,
    }
}

impl Task {
    /// Runs one session. Until the first netmap an error that cannot heal ends the run; later the run goes on, since
    /// a server that was right once may be so again.
    pub(super) async fn session(&mut self, backoff: &mut Backoff) -> Ended {
        let session = match self.dialer.connect().await {
            Ok(session) => session,
            Err(error) if self.registered => return error.into(),
            Err(error) => return refused(RegisterError::Connect(error).into(), self.admission.lost()),
        };
        debug!("session with control open");
        self.session = Some(session.clone());
        if !self.registered
            && let Err(error) = self.register(&session).await
        {
            return refused(error.into(), self.admission.lost());
        }
        self.poll_map(&session, backoff).await
    }

    async fn register(&mut self, session: &Session) -> Result<(), RegisterError> {
        self.await_key().await;
        self.out.phase.send_replace(Phase::Registering(None));
        let approved = loop {
            match self.show_key(session).await? {
                Answer::Admitted { approved } => break approved,
                Answer::Resign(signature) if self.admission.resign(&signature) => {
                    debug!("control wants another node key, and its signature made anew");
                }
                Answer::Resign(_) => return Err(RegisterError::NodeKeyExpired),
            }
        };
        self.registered = true;
        debug!(approved, "registered");
        let phase = if approved { Phase::AwaitingNetmap(None) } else { Phase::AwaitingApproval };
        self.out.phase.send_replace(phase);
        Ok(())
    }

    async fn show_key(&mut self, session: &Session) -> Result<Answer, RegisterError> {
        let (registration, session) = (self.admission.registration(&self.config.hostinfo), session.clone());
        let task = self.registering.insert(tokio::spawn(async move { registration.register(&session).await }));
        let outcome = task.await;
        self.registering = None;
        self.note_registration(&outcome);
        let broken = |error: tokio::task::JoinError| ConnectError::Noise { detail: error.to_string() };
        outcome.map_err(broken)?
    }

    /// The place in the tailnet is lost: registers again where that may help.
    fn put_out(&mut self, lost: Lost) -> Ended {
        if !self.admission.come_back(lost) {
            return Ended::Over(lost.into());
        }
        let limit = self.config.return_limit;
        match lost {
            Lost::Expired => warn!(limit_s = limit.as_secs(), "the node key has expired, registering a new one"),
            Lost::Deleted => warn!(limit_s = limit.as_secs(), "control forgot this node, registering again"),
        }
        if self.admission.lost().is_some() {
            self.back_by.send_replace(Some((Instant::now() + limit, lost)));
        }
        self.registered = false;
        Ended::Again
    }

    /// Waits for a key that is still being made. Where none will come, whoever was to make it ends the run.
    async fn await_key(&mut self) {
        let Some(coming) = &mut self.config.coming_key else { return };
        self.out.phase.send_replace(Phase::AwaitingKey);
        match coming.await {
            Ok(key) => self.admission.set_auth_key(key),
            Err(_) => std::future::pending().await,
        }
        self.config.coming_key = None;
    }

    /// Polls the map until the stream ends, reporting beside it from the first: headscale (0.29) tells peers of what the
    /// stream's request says only once the stream is open, a tick of half a second later than of an update.
    async fn poll_map(&mut self, session: &Session, backoff: &mut Backoff) -> Ended {
        let again = Arc::new(Notify::new());
        let updates = Updates {
            again: again.clone(),
            session: session.clone(),
            requester: self.requester(),
            report: self.report.clone(),
            netmap: self.out.netmap.subscribe(),
            accepted: self.out.accepted.clone(),
        };
        let forgotten = tokio::select! {
            ended = self.stream_map(session, backoff, &again) => return ended,
            forgotten = updates.run() => forgotten,
        };
        self.refused_poll(forgotten)
    }

    /// Opens the map stream and reads it until it ends. Has the report told `again` if the stream's own is an older one,
    /// which control may have taken last.
    async fn stream_map(&mut self, session: &Session, backoff: &mut Backoff, again: &Notify) -> Ended {
        let report = self.report.borrow().clone();
        let response = match timeout(WATCHDOG, self.open_stream(session, &report)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return error.into(),
            Err(_) => return ConnectError::Noise { detail: "the map stream did not open".to_owned() }.into(),
        };
        let status = response.status();
        if status != StatusCode::OK {
            let body = timeout(UPDATE_LIMIT, Limited::new(response.into_body(), ERROR_BODY_MAX).collect()).await;
            let body = body.ok().and_then(Result::ok).map(|body| excerpt(&body.to_bytes())).unwrap_or_default();
            return self.refused_poll(ConnectError::Server { status: status.as_u16(), body });
        }
        debug!("map stream open");
        if *self.report.borrow() != report {
            again.notify_one();
        }
        let mut stream = MapStream::new(response.into_body());
        self.map.restart();
        self.read_map(session, &mut stream, backoff).await
    }

    /// What a status other than 200 to the map poll means.
    fn refused_poll(&mut self, refusal: ConnectError) -> Ended {
        if is_unknown(&refusal) { self.put_out(Lost::Deleted) } else { refusal.into() }
    }

    async fn read_map(&mut self, session: &Session, stream: &mut MapStream, backoff: &mut Backoff) -> Ended {
        loop {
            let message = tokio::select! {
                message = stream.next() => message,
                () = until(self.map.next_expiry()) => {
                    match self.map.expire(Timestamp::now()) {
                        Some(netmap) if netmap.self_node.expired => return self.put_out(Lost::Expired),
                        Some(netmap) => self.publish(netmap),
                        None => {}
                    }
                    continue;
                }
            };
            let applied = match message {
                Ok(message) => self.map.apply(message, Timestamp::now()),
                Err(error) => return error.into(),
            };
            let applied = match applied {
                Ok(applied) => applied,
                Err(error) => return ConnectError::Protocol { detail: error.to_string() }.into(),
            };
            if let Some(ping) = applied.ping {
                let (session, answerer) = (session.clone(), self.answerer.clone());
                tokio::spawn(async move { answerer.answer(&session, ping).await });
            }
            if let Some(problems) = applied.health.filter(|problems| !problems.is_empty()) {
                warn!(problems = problems.join("; "), "control reports problems with this node");
            }
            if let Some(netmap) = applied.netmap {
                if netmap.self_node.expired {
                    return self.put_out(Lost::Expired);
                }
                if netmap.locked_out {
                    return Ended::Over(Failure::LockedOut);
                }
                backoff.reset();
                self.publish(netmap);
            }
            if let Some(pause) = applied.sleep {
                tokio::time::sleep(pause).await;
            }
        }
    }

    /// Hands out a netmap, unless we are not approved yet.
    fn publish(&mut self, netmap: Arc<Netmap>) {
        self.admission.joined();
        if !netmap.self_node.authorized {
            if self.back_by.borrow().is_some() {
                warn!("waiting for an administrator to approve the device anew");
            }
            self.out.phase.send_replace(Phase::AwaitingApproval);
            return;
        }
        self.back_by.send_replace(None);
        self.config.hostinfo.exit_node_id = exit_node_id(Some(&netmap));
        let before = self.out.netmap.send_replace(Some(netmap.clone()));
        let unsigned = before.as_ref().map_or(0, |before| before.unsigned_peers);
        if netmap.unsigned_peers != unsigned {
            info!(peers = netmap.unsigned_peers, "the tailnet lock hides peers whose keys are not signed");
        }
        let changes = Changes::between(before.as_deref(), &netmap);
        if !changes.is_empty() {
            info!(%changes, "netmap");
        }
        self.out.phase.send_replace(Phase::Online);
    }

    async fn open_stream(
        &self,
        session: &Session,
        report: &HostReport,
    ) -> Result<hyper::Response<hyper::body::Incoming>, ConnectError> {
        session.request(Method::POST, "/machine/map", self.requester().body(report, true)).await
    }

    fn requester(&self) -> MapRequester {
        MapRequester { node: self.admission.node(), disco: self.config.disco, hostinfo: self.config.hostinfo.clone() }
    }
}

/// A node that may not come back ends by what put it out, not by what became of its key meanwhile. One that does not
/// reach control on its way back tries again, since control was right once.
fn refused(ended: Ended, lost: Option<Lost>) -> Ended {
    match (ended, lost) {
        (Ended::Over(Failure::Register(RegisterError::Connect(error))), Some(_)) => Ended::Lost(error.into()),
        (Ended::Over(failure), Some(lost)) => {
            warn!(error = %failure, "the auth key does not bring this node back");
            Ended::Over(lost.into())
        }
        (ended, _) => ended,
    }
}

/// Waits until `time`; for ever if there is none.
async fn until(time: Option<Timestamp>) {
    let Some(time) = time else { return std::future::pending().await };
    let left = time.duration_since(Timestamp::now());
    sleep_until(Instant::now() + Duration::try_from(left).unwrap_or_default()).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_the_way_back_only_controls_own_word_ends_the_run() {
        let tls = || ConnectError::Tls { host: "control.example:443".to_owned(), detail: "expired".to_owned() };
        let ended = |error: RegisterError, lost| refused(error.into(), lost);
        assert!(matches!(ended(tls().into(), None), Ended::Over(Failure::Register(_))));
        assert!(matches!(ended(tls().into(), Some(Lost::Deleted)), Ended::Lost(_)));
        let used = || RegisterError::KeyUsed { message: "used".to_owned() };
        assert!(matches!(ended(used(), None), Ended::Over(Failure::Register(_))));
        assert!(matches!(ended(used(), Some(Lost::Expired)), Ended::Over(Failure::KeyExpired)));
    }
}
