//! The host as the card sees it: its link, its inventory, its machines.
//!
//! ```text
//!  down ──connect──► greeting due ──Hello──► collecting ──Synced──► in sync
//!    ▲                                                                │
//!    └───────────────────────── disconnect ───────────────────────────┘
//! ```
//!
//! Statuses that come before Synced replace, as a whole, what was known; while
//! the link is down the last ones stay, for control to see, and nothing is
//! decided by them. The host is not trusted: what it says is bounded.

use std::collections::BTreeMap;

use card_proto::host::{Inventory, MachinePhase, MachineStatus};

use crate::object::Id;

/// More machines than a server has cores; a host that reports more is not believed.
const MACHINES_MAX: usize = 4096;

#[derive(Default)]
pub struct HostView {
    link: Link,
    changed: bool,
    inventory: Option<Inventory>,
    machines: BTreeMap<Id, MachineStatus>,
    incoming: BTreeMap<Id, MachineStatus>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Link {
    #[default]
    Down,
    GreetingDue,
    Collecting,
    Synced,
}

impl HostView {
    pub fn connect(&mut self) {
        self.link = Link::GreetingDue;
    }

    pub fn disconnect(&mut self) {
        self.changed |= self.link == Link::Synced;
        self.link = Link::Down;
        self.inventory = None;
        self.incoming.clear();
    }

    /// True once per link.
    pub fn greeting_due(&mut self) -> bool {
        let due = self.link == Link::GreetingDue;
        if due {
            self.link = Link::Collecting;
        }
        due
    }

    pub fn is_synced(&self) -> bool {
        self.link == Link::Synced
    }

    pub fn inventory(&self) -> Option<&Inventory> {
        self.inventory.as_ref().filter(|_| self.is_synced())
    }

    /// True once per change of link or inventory.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    pub fn machines(&self) -> impl Iterator<Item = (&Id, &MachineStatus)> {
        self.machines.iter()
    }

    pub fn machine(&self, id: &Id) -> Option<&MachineStatus> {
        self.machines.get(id)
    }

    /// What the host said of a machine; of one that it did not mention, that it is gone.
    pub fn status_or_gone(&self, id: &Id) -> MachineStatus {
        let gone = || MachineStatus { id: id.to_string(), phase: MachinePhase::Gone.into(), ..MachineStatus::default() };
        self.machines.get(id).cloned().unwrap_or_else(gone)
    }

    pub fn inventory_set(&mut self, inventory: Inventory) {
        self.changed |= self.is_synced();
        self.inventory = Some(inventory);
    }

    /// Files a report. Returns it when it is to be acted on: in sync, not before.
    pub fn status_set(&mut self, id: &Id, status: MachineStatus) -> Option<MachineStatus> {
        let synced = self.is_synced();
        let machines = if synced { &mut self.machines } else { &mut self.incoming };
        if status.phase() == MachinePhase::Gone {
            machines.remove(id);
        } else if machines.len() < MACHINES_MAX || machines.contains_key(id) {
            machines.insert(id.clone(), status.clone());
        }
        synced.then_some(status)
    }

    pub fn synced_set(&mut self) {
        self.machines = std::mem::take(&mut self.incoming);
        self.link = Link::Synced;
        self.changed = true;
    }
}

/// Whether there is a process behind a machine.
pub fn is_up(status: &MachineStatus) -> bool {
    matches!(status.phase(), MachinePhase::Starting | MachinePhase::Running)
}

/// Whether a function is plugged.
pub fn lists(status: &MachineStatus, function: &Id) -> bool {
    status.functions.iter().any(|id| id == function.as_str())
}
