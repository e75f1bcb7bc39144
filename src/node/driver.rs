//! The loop that waits for everything the data plane can be woken by: datagrams, relays, netmaps, time.

use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::core::Shared;
use super::regions::Probed;
use crate::control::HostReport;
use crate::key::NodePrivate;
use crate::netmap::Netmap;
use crate::transport::derp::Task;
use crate::transport::link::{News, State};

/// What the driver listens to.
pub(super) struct Inputs {
    pub(super) netmap: watch::Receiver<Option<Arc<Netmap>>>,
    pub(super) node_key: watch::Receiver<NodePrivate>,
    /// What control was told last of our network.
    pub(super) accepted: watch::Receiver<HostReport>,
    pub(super) derp_tasks: mpsc::UnboundedReceiver<Task>,
    pub(super) probes: mpsc::Receiver<Probed>,
    pub(super) link: News,
    pub(super) stop: CancellationToken,
}

/// What woke the driver.
enum Woken {
    Readable,
    Writable,
    Region(Box<Task>),
    NodeKey,
    Accepted,
    Netmap,
    Probe(Probed),
    Link(State),
    Time,
    Stop,
}

/// Drives the data plane until it is stopped.
pub(super) async fn run(shared: Shared, mut inputs: Inputs) {
    let wake = shared.borrow().waker();
    // What is there already counts as news.
    inputs.netmap.mark_changed();
    loop {
        // Work that never ends must not keep the runtime from its sockets and timers.
        tokio::task::consume_budget().await;
        let deadline = shared.borrow_mut().arm();
        let blocked = shared.borrow().blocked();
        let udp = shared.borrow().udp();
        let readable = poll_fn(|cx| match &udp {
            Some(udp) => udp.poll_readable(cx).map(drop),
            None => std::task::Poll::Pending,
        });
        let writable = poll_fn(|cx| match (&udp, blocked) {
            (Some(udp), Some(destination)) => udp.poll_writable(destination, cx).map(drop),
            (Some(_), None) | (None, _) => std::task::Poll::Pending,
        });
        let woken = tokio::select! {
            () = readable => Woken::Readable,
            () = writable => Woken::Writable,
            Some(task) = inputs.derp_tasks.recv() => Woken::Region(task.into()),
            Ok(()) = inputs.node_key.changed() => Woken::NodeKey,
            Ok(()) = inputs.accepted.changed() => Woken::Accepted,
            Ok(()) = inputs.netmap.changed() => Woken::Netmap,
            Some(probed) = inputs.probes.recv() => Woken::Probe(probed),
            state = inputs.link.next() => Woken::Link(state),
            () = wait_until(deadline) => Woken::Time,
            () = wake.notified() => Woken::Time,
            () = inputs.stop.cancelled() => Woken::Stop,
        };
        let now = Instant::now();
        let mut core = shared.borrow_mut();
        match woken {
            Woken::Readable => core.handle_readable(now),
            Woken::Writable => core.pump(now),
            Woken::Region(task) => keep_connected(&shared, *task),
            Woken::NodeKey => core.handle_node_key(&inputs.node_key.borrow_and_update(), now),
            Woken::Accepted => core.handle_accepted(&inputs.accepted.borrow_and_update(), now),
            Woken::Netmap => {
                let netmap = inputs.netmap.borrow_and_update().clone();
                if let Some(netmap) = netmap {
                    core.handle_netmap(netmap, now);
                }
            }
            Woken::Probe(probed) => core.handle_probe(probed, now),
            Woken::Link(state) => core.handle_link(state, now),
            Woken::Time => core.handle_timeout(now),
            Woken::Stop => return core.stop(),
        }
    }
}

/// Runs a region's task beside the driver: what its relay says is dealt with as it comes.
fn keep_connected(core: &Shared, task: Task) {
    // The core holds the region, whose end ends the task: held by it in turn, neither would end.
    let core = Rc::downgrade(core);
    tokio::task::spawn_local(task.run(move |id, event| {
        if let Some(core) = core.upgrade() {
            core.borrow_mut().handle_derp(id, event, Instant::now());
        }
    }));
}

async fn wait_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
