//! The two threads of a run: the data thread is the process's own, control has one beside it.

use std::io;
use std::thread;

use tokio::runtime::{Builder, Handle, LocalOptions, LocalRuntime};
use tokio_util::sync::CancellationToken;

use crate::fault::{self, Fault};

/// The control thread: one runtime of its own, so that what is slow there never delays a packet.
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
        let runtime = builder().build().map_err(|error| refused("control runtime", &error))?;
        let control = Self { handle: runtime.handle().clone(), stop: CancellationToken::new() };
        let stop = control.stop.clone();
        let body = move || {
            runtime.block_on(stop.cancelled());
            // As with the data thread's: a look-up may still be under way.
            runtime.shutdown_background();
        };
        let spawned = thread::Builder::new().name(String::from("control")).spawn(body);
        spawned.map_err(|error| refused("control thread", &error))?;
        Ok(control)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// The data thread's runtime, for the thread that calls. A `LocalSet` on another runtime would do the same, but has a
/// system call made (an eventfd written, and read as an event) for each task that a socket wakes.
///
/// # Errors
/// `TC-2007`.
pub(super) fn data() -> Result<LocalRuntime, Fault> {
    builder().build_local(LocalOptions::default()).map_err(|error| refused("data runtime", &error))
}

fn builder() -> Builder {
    let mut builder = Builder::new_current_thread();
    builder.enable_all();
    builder
}

fn refused(what: &str, error: &io::Error) -> Fault {
    Fault::new(&fault::OS_REFUSED, format!("no {what}: {error}"))
}
