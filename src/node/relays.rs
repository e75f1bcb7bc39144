//! The DERP connections of the node: which are open, which have admitted us, and which is home.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use tokio::sync::{mpsc, watch};

use crate::key::NodePrivate;
use crate::netmap::RegionId;
use crate::transport::derp::{Complaints, ConnectionId, Packet, Region, Relay, Task};
use crate::transport::underlay::Underlay;

/// What a connection needs to begin.
pub(super) struct Dialler {
    pub(super) key: NodePrivate,
    pub(super) underlay: Underlay,
    /// Where the driver takes what keeps a connection.
    pub(super) tasks: mpsc::UnboundedSender<Task>,
}

/// The open connections.
pub(super) struct Relays {
    dialler: Dialler,
    open: BTreeMap<RegionId, (u64, Region)>,
    next_number: u64,
    /// What was said of each region that was ever open.
    complaints: BTreeMap<RegionId, Rc<RefCell<Complaints>>>,
    admitted: BTreeSet<RegionId>,
    home: watch::Sender<Option<RegionId>>,
}

impl Relays {
    pub(super) fn new(dialler: Dialler) -> Self {
        let (open, admitted) = (BTreeMap::new(), BTreeSet::new());
        Self { dialler, open, next_number: 0, complaints: BTreeMap::new(), admitted, home: watch::Sender::new(None) }
    }

    /// The home region once its relay has admitted us.
    pub(super) fn home(&self) -> watch::Receiver<Option<RegionId>> {
        self.home.subscribe()
    }

    /// Opens a region's connection, or only says whether an open one is home.
    pub(super) fn connect(&mut self, region: RegionId, relays: Vec<Relay>, home: bool) {
        let Dialler { key, underlay, tasks } = &self.dialler;
        let (next, id) = (&mut self.next_number, region);
        let complaints = || Rc::new(RefCell::new(Complaints::new(region)));
        let complaints = self.complaints.entry(region).or_insert_with(complaints);
        let (_, connection) = self.open.entry(region).or_insert_with(|| {
            *next += 1;
            let id = ConnectionId { region: id, number: *next };
            let (region, task) = Region::new(id, relays, key.clone(), underlay.clone(), complaints.clone());
            // A driver that is gone connects to nobody.
            let _ = tasks.send(task);
            (id.number, region)
        });
        if home {
            connection.set_home(true);
        }
    }

    /// Connections are made with this key from now on. Those that are open end; which they were.
    pub(super) fn set_key(&mut self, key: NodePrivate) -> Vec<RegionId> {
        self.dialler.key = key;
        self.admitted.clear();
        std::mem::take(&mut self.open).into_keys().collect()
    }

    /// Closes a region's connection.
    pub(super) fn close(&mut self, region: RegionId) {
        self.open.remove(&region);
        self.admitted.remove(&region);
    }

    /// Closes all of them.
    pub(super) fn close_all(&mut self) {
        self.open.clear();
        self.admitted.clear();
        self.set_home(None);
    }

    /// Whether an event comes from a connection that is still the region's own.
    pub(super) fn is_current(&self, id: ConnectionId) -> bool {
        self.open.get(&id.region).is_some_and(|(number, _)| *number == id.number)
    }

    /// Sends a packet. Returns whether one was lost for it: there is no connection, or its queue was full.
    pub(super) fn send(&self, region: RegionId, packet: Packet) -> bool {
        self.open.get(&region).is_some_and(|(_, connection)| connection.send(packet))
    }

    /// Notes whether a region's relay has admitted us, and what that means for `home`.
    pub(super) fn set_admitted(&mut self, region: RegionId, admitted: bool, home: Option<RegionId>) {
        if admitted {
            self.admitted.insert(region);
        } else {
            self.admitted.remove(&region);
        }
        self.set_home(home);
    }

    /// Tells the relays which of them is home, and everybody else whether it has admitted us.
    pub(super) fn set_home(&self, home: Option<RegionId>) {
        for (id, (_, connection)) in &self.open {
            connection.set_home(Some(*id) == home);
        }
        let home = home.filter(|home| self.admitted.contains(home));
        self.home.send_if_modified(|old| std::mem::replace(old, home) != home);
    }
}
