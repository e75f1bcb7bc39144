//! Message bodies between a client's HTTP connection and a target's.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::http::Session;
use super::socket::Due;
use super::upstream::Upstream;

/// A request's body on its way to the target.
#[derive(Default)]
pub(super) struct RequestBody {
    incoming: Option<Incoming>,
    /// Closed while the target has not said whether it wants the body (`Expect: 100-continue`).
    gate: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    sent: Rc<Cell<u64>>,
}

impl RequestBody {
    /// The client's own body, let through once `gate` is cancelled, if there is one; adds its length to `sent`.
    pub(super) fn new(incoming: Incoming, gate: Option<CancellationToken>, sent: Rc<Cell<u64>>) -> Self {
        let gate = gate.map(|gate| Box::pin(gate.cancelled_owned()));
        Self { incoming: Some(incoming), gate, sent }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(gate) = &mut self.gate {
            ready!(gate.as_mut().poll(cx));
            self.gate = None;
        }
        let Some(incoming) = &mut self.incoming else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(incoming).poll_frame(cx));
        if let Some(bytes) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            self.sent.set(self.sent.get() + bytes.len() as u64);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.as_ref().map_or(SizeHint::with_exact(0), Incoming::size_hint)
    }
}

/// The body of an answer; when it is dropped, the HTTP library has all of it.
pub(super) struct AnswerBody {
    body: ReplyBody,
    due: Arc<Due>,
}

impl AnswerBody {
    pub(super) fn new(body: ReplyBody, due: Arc<Due>) -> Self {
        Self { body, due }
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        self.due.told();
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A response's body on its way to the client.
pub(super) enum ReplyBody {
    /// One of our own making.
    Own(Full<Bytes>),
    /// One that a target sends.
    Target(Box<FromTarget>),
}

/// A body that a target is sending, with the connection that it comes on.
pub(super) struct FromTarget {
    incoming: Incoming,
    /// Given back for the next request if the body ends well.
    upstream: Option<Upstream>,
    session: Rc<Session>,
    sent: Rc<Cell<u64>>,
    received: u64,
    ended: bool,
}

impl ReplyBody {
    /// A body of our own making; empty after CONNECT.
    pub(super) fn own(bytes: Bytes) -> Self {
        Self::Own(Full::new(bytes))
    }

    /// A target's body. `upstream` goes back to the session when the body has ended, if it may be used again.
    pub(super) fn target(incoming: Incoming, upstream: Upstream, session: Rc<Session>, sent: Rc<Cell<u64>>) -> Self {
        let upstream = Some(upstream);
        Self::Target(Box::new(FromTarget { incoming, upstream, session, sent, received: 0, ended: false }))
    }
}

impl Drop for FromTarget {
    fn drop(&mut self) {
        self.session.stats().bytes_carried(self.sent.get(), self.received);
        if (self.ended || self.incoming.is_end_stream())
            && let Some(upstream) = self.upstream.take()
        {
            self.session.keep(upstream);
        }
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let body = match &mut *self {
            Self::Own(full) => return Pin::new(full).poll_frame(cx).map_err(|never| match never {}),
            Self::Target(body) => body,
        };
        let frame = ready!(Pin::new(&mut body.incoming).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => body.received += frame.data_ref().map_or(0, |bytes| bytes.len() as u64),
            Some(Err(error)) => {
                if let Some(upstream) = &body.upstream {
                    body.session.target_broke_off(upstream.target(), is_reset(error));
                }
            }
            None => body.ended = true,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(full) => full.is_end_stream(),
            Self::Target(body) => body.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(full) => full.size_hint(),
            Self::Target(body) => body.incoming.size_hint(),
        }
    }
}

/// Whether the connection below ended by a reset.
pub(super) fn is_reset(error: &hyper::Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return error.kind() == io::ErrorKind::ConnectionReset;
        }
        cause = error.source();
    }
    false
}
