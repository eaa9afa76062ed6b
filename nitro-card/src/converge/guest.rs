//! One instance and its machine.
//!
//! The host takes a Put for new when its generation is higher. An instance's
//! machine changes more often than the instance (a disk comes, a disk goes), so
//! the machine's generation is made of two:
//!
//! ```text
//! | generation of the instance (40) | revision by the card (24) |
//! ```
//!
//! The card keeps no revision over a restart: it goes on from the one that the
//! host reports. Deletes carry the highest revision.

use std::collections::BTreeMap;
use std::time::Duration;

use card_proto::host::{self, Machine, MachinePhase, MachineStatus, to_host};

use super::host_view::{HostView, is_up, lists};
use super::{Output, Tracked, Work};
use crate::instance::{BootSource, Instance};
use crate::object::{Id, Key, Kind};
use crate::slot::{Action, Rules};

/// How long a function may be on its way into a machine.
const PLUG_TIME: Duration = Duration::from_secs(10);

const REVISION_BITS: u32 = 24;
const REVISION_MAX: u64 = (1 << REVISION_BITS) - 1;

/// The generation of the instance that a machine's generation is of.
pub fn instance_generation(machine: u64) -> u64 {
    machine >> REVISION_BITS
}

/// A function of a machine, as its server on the card stands.
pub struct Part {
    pub id: Id,
    pub kind: Kind,
    pub order: u64,
    pub function: host::Function,
    /// Desired for this machine.
    pub wanted: bool,
    /// Its server waits for this machine, or serves it.
    pub served: bool,
    /// Its server is neither starting nor stopping.
    pub settled: bool,
}

pub struct Guest {
    /// The slot holds kernel, initial RAM disk and console.
    pub tracked: Tracked<Instance, BootSource>,
    /// The last Put on this link.
    sent: Option<Machine>,
    /// The highest machine generation seen or sent.
    machine_generation: u64,
    /// Generation of a Delete on this link that the host has not answered.
    deleting: Option<u64>,
    /// The host answered the Delete.
    machine_gone: bool,
    /// It has been up since it was last down.
    was_up: bool,
    /// It was told to stop since it was last up: that it stops is no surprise.
    stopping: bool,
    outcome: Option<Outcome>,
    /// Functions that the host was told to plug and has not confirmed.
    plugging: BTreeMap<Id, Plugging>,
    /// What keeps it from being started.
    waiting: Option<String>,
}

/// A function on its way into the machine.
struct Plugging {
    /// Of the last Put that lists it; a status of a lower one tells nothing of it.
    generation: u64,
    since: Duration,
}

/// Why a machine that should run does not, and will not be tried again.
pub enum Outcome {
    /// The guest switched itself off.
    Halted,
    Failed(String),
}

impl Guest {
    pub fn new(spec: Instance) -> Self {
        Self {
            tracked: Tracked::new(spec),
            sent: None,
            machine_generation: 0,
            deleting: None,
            machine_gone: false,
            was_up: false,
            stopping: false,
            outcome: None,
            plugging: BTreeMap::new(),
            waiting: None,
        }
    }

    /// A machine of the host that is not desired: to be torn down, and then
    /// reported as gone with `generation`.
    pub fn stranger(id: &Id, status: &MachineStatus, generation: u64) -> Self {
        let mut guest = Self::new(Instance::undesired(id));
        guest.tracked.deleted = Some(generation);
        guest.machine_generation = status.generation;
        guest
    }

    pub fn put(&mut self, spec: Instance) {
        self.tracked.spec = spec;
        self.tracked.deleted = None;
        self.tracked.slot.forgive();
        self.machine_gone = false;
        self.outcome = None;
    }

    pub fn host_lost(&mut self) {
        self.sent = None;
        self.deleting = None;
    }

    pub fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    pub fn waiting(&self) -> Option<&str> {
        self.waiting.as_deref()
    }

    /// The host has said so since the instance was deleted.
    pub fn machine_gone(&self) -> bool {
        self.machine_gone
    }

    /// The host has taken the last Put of this link.
    pub fn has_heard(&self, status: &MachineStatus) -> bool {
        self.sent.as_ref().is_some_and(|sent| sent.generation <= status.generation)
    }

    /// Functions on their way into the machine.
    pub fn plugging(&self) -> impl Iterator<Item = &Id> {
        self.plugging.keys()
    }

    pub fn deadline(&self) -> Option<Duration> {
        let plugging = self.plugging.values().map(|plugging| plugging.since + PLUG_TIME);
        plugging.chain(self.tracked.slot.retry_at()).min()
    }

    /// Takes a report of the host; `syncing`: part of its answer to Hello.
    pub fn observe(&mut self, status: &MachineStatus, syncing: bool) {
        let spec = &self.tracked.spec;
        let current = spec.running && instance_generation(status.generation) == spec.generation;
        self.machine_generation = self.machine_generation.max(status.generation);
        match status.phase() {
            MachinePhase::Starting => self.was_up = true,
            MachinePhase::Running => {
                self.was_up = true;
                if current {
                    self.stopping = false;
                    self.outcome = None;
                }
            }
            MachinePhase::Stopped if current && (syncing || self.was_up && !self.stopping) => self.outcome = Some(Outcome::Halted),
            MachinePhase::Failed if current => self.outcome = Some(Outcome::Failed(status.message.clone())),
            MachinePhase::Gone => {
                self.sent = None;
                if self.deleting.is_some_and(|deleting| deleting <= status.generation) {
                    self.deleting = None;
                    self.machine_gone = self.tracked.deleted.is_some();
                }
            }
            _ => {}
        }
        let up = is_up(status);
        self.plugging.retain(|id, plugging| !syncing && (status.generation < plugging.generation || up && !lists(status, id)));
        self.was_up &= up;
        self.stopping &= up;
    }

    pub fn turn(&mut self, parts: &[Part], host: &HostView, now: Duration, out: &mut Vec<Output>) {
        let key = Key::new(Kind::Instance, &self.tracked.spec.id);
        let rules = Rules { in_place: true, may_drain: self.machine_gone, retry: true };
        if let Some(action) = self.tracked.step(self.tracked.spec.boot_source.clone(), rules, now) {
            let work = match action {
                Action::Fill(source) => Work::InstanceStage(source),
                Action::Drain => Work::InstanceClean,
            };
            out.push(Output::Work { key, work });
        }
        if !host.is_synced() {
            return;
        }
        if let Some(generation) = self.tracked.deleted {
            if self.deleting.is_none() && !self.machine_gone {
                self.sent = None;
                let id = self.tracked.spec.id.to_string();
                let generation = (generation << REVISION_BITS | REVISION_MAX).max(self.machine_generation);
                self.deleting = Some(generation);
                out.push(Output::Host(to_host::Command::Delete(host::Delete { id, generation })));
            }
            return;
        }
        if self.deleting.is_some() {
            // What the host says of the old machine is not true of the new one.
            self.waiting = Some("waiting for the former machine to go".into());
            return;
        }
        let status = host.machine(&self.tracked.spec.id);
        let heard = status.map_or(0, |status| status.generation);
        self.plugging.retain(|_, plugging| heard < plugging.generation || now < plugging.since + PLUG_TIME);
        let status = status.filter(|status| is_up(status));
        match self.machine(parts, status) {
            Ok(machine) => {
                self.waiting = None;
                self.ask(machine, now, out);
            }
            Err(waiting) => self.waiting = Some(waiting),
        }
    }

    /// The machine to ask for, or what is missing. `status` is there while the machine is up.
    fn machine(&self, parts: &[Part], status: Option<&MachineStatus>) -> Result<Machine, String> {
        let spec = &self.tracked.spec;
        let mut parts: Vec<&Part> = parts.iter().collect();
        // Ports before disks, each in a stable order.
        parts.sort_by_key(|part| (part.kind, part.order, &part.id));
        let ready = |kind| parts.iter().filter(|part| part.wanted && part.served && part.kind == kind).count();
        if spec.running && status.is_none() {
            let missing = [
                (ready(Kind::Port) < spec.ports).then(|| format!("{} of {} ports", ready(Kind::Port), spec.ports)),
                (ready(Kind::Disk) < spec.disks).then(|| format!("{} of {} disks", ready(Kind::Disk), spec.disks)),
                self.tracked.slot.full().is_none().then(|| self.tracked.slot.failure().unwrap_or("no kernel").to_owned()),
            ];
            let missing: Vec<String> = missing.into_iter().flatten().collect();
            if !missing.is_empty() {
                return Err(format!("waiting: {}", missing.join(", ")));
            }
        }
        if let Some(part) = parts.iter().find(|part| part.wanted && !part.settled) {
            return Err(format!("waiting for {}", part.id));
        }
        // Of what cannot be served at the moment, a running machine keeps what it
        // has: by what it was told, or it would be told both in turns.
        let kept = |part: &Part| {
            status.is_some_and(|status| match &self.sent {
                Some(sent) => sent.functions.iter().any(|function| function.id == part.id.as_str()),
                None => lists(status, &part.id),
            })
        };
        // What was being plugged is plugged to the end, and then unplugged.
        let belongs = |part: &&&Part| if part.wanted { part.served || kept(part) } else { self.plugging.contains_key(&part.id) };
        Ok(spec.machine(spec.running, parts.iter().filter(belongs).map(|part| part.function.clone()).collect()))
    }

    fn ask(&mut self, machine: Machine, now: Duration, out: &mut Vec<Output>) {
        let generation = self.machine_generation;
        let said = self.sent.as_ref() == Some(&Machine { generation, ..machine.clone() });
        if self.outcome.is_some() || said && instance_generation(generation) == self.tracked.spec.generation {
            return;
        }
        let first = self.tracked.spec.generation << REVISION_BITS;
        let generation = first.max(self.machine_generation.saturating_add(1));
        self.machine_generation = generation;
        self.stopping |= !machine.running;
        if machine.running {
            let functions = machine.functions.iter().filter_map(|function| Id::parse(&function.id));
            self.plugging.extend(functions.map(|id| (id, Plugging { generation, since: now })));
        }
        let machine = Machine { generation, ..machine };
        out.push(Output::Host(to_host::Command::Put(machine.clone())));
        self.sent = Some(machine);
    }
}
