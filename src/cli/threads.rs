//! The two threads of a run: the data thread is the process's own, control has one beside it.

use std::thread;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::sync::CancellationToken;

use crate::fault::{self, Fault};

/// The control thread: one runtime of its own, so that a slow handshake never delays a packet.
pub(super) struct Control {
    /// Where its tasks are spawned.
    pub(super) handle: Handle,
    stop: CancellationToken,
}

impl Control {
    /// Starts it; dropped, it ends.
    ///
    /// # Errors
    /// `TC-2007`.
    pub(super) fn start() -> Result<Self, Fault> {
        let runtime = runtime("control")?;
        let control = Self { handle: runtime.handle().clone(), stop: CancellationToken::new() };
        let stop = control.stop.clone();
        let body = move || {
            runtime.block_on(stop.cancelled());
            // A look-up in the system's resolver cannot be cancelled; it need not keep us here.
            runtime.shutdown_background();
        };
        let spawned = thread::Builder::new().name(String::from("control")).spawn(body);
        spawned.map_err(|error| Fault::new(&fault::OS_REFUSED, format!("no control thread: {error}")))?;
        Ok(control)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A runtime for the thread that calls.
///
/// # Errors
/// `TC-2007`.
pub(super) fn runtime(name: &str) -> Result<Runtime, Fault> {
    Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Fault::new(&fault::OS_REFUSED, format!("no {name} runtime: {error}")))
}
