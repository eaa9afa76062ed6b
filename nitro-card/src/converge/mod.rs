//! The heart of the card: from what control wants and the host reports to what
//! is to be done, and to what control is told.
//!
//! A plain state machine. [`Core::handle`] takes an event, [`Core::turn`] gives
//! the outputs; time is an argument; nothing here blocks, reads or writes.
//! Whoever owns the core has made desired objects durable before they come in.
//!
//! Level-triggered: each turn looks at everything that is desired and asks for
//! the step that is missing, so one mechanism serves launch, attach, stop, a
//! restart of the card and a restart of the host. What keeps it right:
//! - A machine is asked for when all its ports and disks are served, and lists
//!   every function that is desired or still plugged, so a restarting card
//!   never makes the host pull a disk out.
//! - A function's server is stopped only when no machine can still use it: the
//!   host is in sync, and neither lists the function nor may be plugging it.
//! - A machine that nobody desires is deleted, unless the store may have lost
//!   its record; then control is told of it and decides.
//! - A machine that stopped by itself, or failed, is not started again before
//!   control gives the instance a new generation.

mod guest;
mod host_view;
mod picture;
mod status;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use card_proto::card::{Phase, Status};
use card_proto::host::{self, Inventory, to_card, to_host};
use dataplane::{PortId, Snapshot};

use crate::attachment::{Disk, Source};
use crate::imds::Subjects;
use crate::instance::BootSource;
use crate::nat_gateway::NatGateway;
use crate::network::Network;
use crate::object::{Id, Key, Kind, Object};
use crate::port::Port;
use crate::slot::{Action, Rules, Slot};
use crate::volume::{Spec, Volume};

use guest::{Guest, Part, instance_generation};
use host_view::{HostView, is_up};
use picture::Numbers;

/// What happened.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // the comments say it
pub enum Event {
    /// An object is desired, durably.
    Put(Object),
    /// An object is not desired any more, durably. Where the card has just
    /// started, `object` is what to tear down.
    Deleted { key: Key, generation: u64, object: Option<Object> },
    /// The host's link is new: everything said before is void.
    HostConnected,
    /// The link is down; the machines go on.
    HostDisconnected,
    /// The host said something.
    HostReport(to_card::Report),
    /// The work asked for under this key has ended; the message is for operators.
    Done { key: Key, result: Result<(), String> },
}

/// What to do, in this order.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // the comments say it
pub enum Output {
    /// The packet path's whole configuration changed.
    Dataplane(Snapshot),
    /// What the metadata service tells changed.
    Subjects(Subjects),
    /// Something outside is to be changed; ends with [`Event::Done`].
    Work { key: Key, work: Work },
    /// A message for the host.
    Host(to_host::Command),
    /// Every machine of the host is in the store.
    StoreComplete,
    /// [`Core::host`] changed.
    HostChanged,
    /// Nothing is left of a deleted object.
    Gone { key: Key, generation: u64 },
    /// What control is to be told of an object.
    Status(Status),
}

/// One action outside of the core. Each can be repeated, and undone by its
/// counterpart also when it never happened.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the comments say it
pub enum Work {
    /// Serve whoever binds the port's socket and join it to the packet path.
    PortStart {
        number: PortId,
        mtu: u16,
    },
    /// Stop that, and remove the socket of a machine that died.
    PortStop {
        number: PortId,
    },
    /// Connect to the volume and serve it to whoever binds the disk's socket.
    DiskStart {
        source: Source,
        serial: String,
    },
    /// Flush, and remove the socket of a machine that died.
    DiskStop,
    VolumePut(Spec),
    VolumeDelete,
    /// Put kernel and initial RAM disk where the host finds them, and make room for the console.
    InstanceStage(BootSource),
    /// Remove all three.
    InstanceClean,
}

/// What the core has to know of its card.
#[derive(Clone, Debug)]
pub struct Config {
    /// Random, new at each start.
    pub boot_id: u64,
    /// Bytes that volumes may have in all.
    pub capacity_bytes: u64,
    /// See [`crate::desired::Loaded::complete`].
    pub store_complete: bool,
}

/// Sizes of the card's world, for operators.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it
pub struct Summary {
    pub instances: usize,
    pub machines_running: usize,
    pub ports: usize,
    pub disks: usize,
    pub volumes: usize,
    pub volume_bytes: u64,
    pub networks: usize,
    pub nat_gateways: usize,
    pub converging: usize,
    pub failed: usize,
    pub host_connected: bool,
}

/// The state machine.
pub struct Core {
    config: Config,
    instances: BTreeMap<Id, Guest>,
    ports: BTreeMap<Id, Tracked<Port, PortBinding>>,
    disks: BTreeMap<Id, Tracked<Disk, DiskBinding>>,
    volumes: BTreeMap<Id, Tracked<Volume, Spec>>,
    networks: BTreeMap<Id, Network>,
    nat_gateways: BTreeMap<Id, NatGateway>,
    host: HostView,
    numbers: Numbers,
    published: BTreeMap<Key, Status>,
    gone: Vec<(Key, u64)>,
    dataplane_changed: bool,
    subjects_changed: bool,
}

/// An object with something in the world behind it.
struct Tracked<T, B> {
    spec: T,
    /// Generation of the Delete, from then on.
    deleted: Option<u64>,
    slot: Slot<B>,
}

#[derive(Clone, Debug, PartialEq)]
struct PortBinding {
    instance_id: Id,
    number: PortId,
}

#[derive(Clone, Debug, PartialEq)]
struct DiskBinding {
    instance_id: Id,
    source: Source,
}

impl Core {
    /// A card that knows nothing yet.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            config,
            instances: BTreeMap::new(),
            ports: BTreeMap::new(),
            disks: BTreeMap::new(),
            volumes: BTreeMap::new(),
            networks: BTreeMap::new(),
            nat_gateways: BTreeMap::new(),
            host: HostView::default(),
            numbers: Numbers::default(),
            published: BTreeMap::new(),
            gone: Vec::new(),
            dataplane_changed: false,
            subjects_changed: false,
        }
    }

    /// Takes an event. Its consequences come with the next [`Core::turn`].
    pub fn handle(&mut self, event: Event, now: Duration) {
        match event {
            Event::Put(object) => self.put(object),
            Event::Deleted { key, generation, object } => {
                if let Some(object) = object {
                    self.put(object);
                }
                self.delete(key, generation);
            }
            Event::HostConnected => {
                self.host_lost();
                self.host.connect();
            }
            Event::HostDisconnected => self.host_lost(),
            Event::HostReport(report) => self.report(report),
            Event::Done { key, result } => self.done(&key, result, now),
        }
    }

    /// Everything that is to be done now.
    pub fn turn(&mut self, now: Duration) -> Vec<Output> {
        let mut out = Vec::new();
        // The packet path and the metadata service know a port before its guest can speak.
        if std::mem::take(&mut self.dataplane_changed) {
            out.push(Output::Dataplane(self.snapshot()));
        }
        if std::mem::take(&mut self.subjects_changed) {
            out.push(Output::Subjects(self.subjects()));
        }
        let users = self.users();
        self.turn_ports(&users, now, &mut out);
        self.turn_disks(&users, now, &mut out);
        self.turn_volumes(now, &mut out);
        self.turn_host(&mut out);
        self.turn_guests(&users, now, &mut out);
        self.bury(&mut out);
        self.publish(&mut out);
        out
    }

    /// When [`Core::turn`] is due again without an event.
    #[must_use]
    pub fn deadline(&self, now: Duration) -> Option<Duration> {
        let slots = (self.ports.values().filter_map(|port| port.slot.retry_at()))
            .chain(self.disks.values().filter_map(|disk| disk.slot.retry_at()))
            .chain(self.volumes.values().filter(|volume| volume.deleted.is_some()).filter_map(|volume| volume.slot.retry_at()))
            .chain(self.instances.values().filter_map(Guest::deadline));
        slots.filter(|at| now < *at).min()
    }

    /// What the host has, while it is in sync.
    #[must_use]
    pub fn host(&self) -> Option<Inventory> {
        self.host.inventory().cloned()
    }

    /// Sizes, for operators.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let phase = |phase: Phase| self.published.values().filter(|status| status.phase() == phase).count();
        Summary {
            instances: self.instances.len(),
            machines_running: phase(Phase::MachineRunning),
            ports: self.ports.len(),
            disks: self.disks.len(),
            volumes: self.volumes.len(),
            volume_bytes: self.volumes.values().map(|volume| volume.spec.spec.size_bytes).sum(),
            networks: self.networks.len(),
            nat_gateways: self.nat_gateways.len(),
            converging: phase(Phase::Converging),
            failed: phase(Phase::Failed),
            host_connected: self.host.is_synced(),
        }
    }

    fn put(&mut self, object: Object) {
        // Rules, groups and routes only matter to the packet path, metadata only to the guest.
        self.dataplane_changed |= matches!(object, Object::Port(_) | Object::Network(_) | Object::NatGateway(_));
        self.subjects_changed |= matches!(object, Object::Port(_) | Object::Instance(_) | Object::Disk(_));
        match object {
            Object::Instance(instance) => match self.instances.get_mut(&instance.id) {
                Some(guest) => guest.put(instance),
                None => drop(self.instances.insert(instance.id.clone(), Guest::new(instance))),
            },
            Object::Port(port) => Tracked::put(&mut self.ports, port.id.clone(), port),
            Object::Disk(disk) => Tracked::put(&mut self.disks, disk.id.clone(), disk),
            Object::Volume(volume) => Tracked::put(&mut self.volumes, volume.id.clone(), volume),
            Object::Network(network) => drop(self.networks.insert(network.id.clone(), network)),
            Object::NatGateway(gateway) => drop(self.nat_gateways.insert(gateway.id.clone(), gateway)),
        }
    }

    fn delete(&mut self, key: Key, generation: u64) {
        self.dataplane_changed |= matches!(key.kind, Kind::Port | Kind::Network | Kind::NatGateway);
        self.subjects_changed |= matches!(key.kind, Kind::Port | Kind::Instance | Kind::Disk);
        let deleted = match key.kind {
            Kind::Instance => match self.instances.get_mut(&key.id) {
                Some(guest) => Some(&mut guest.tracked.deleted),
                None => return self.delete_unknown(key, generation),
            },
            Kind::Port => self.ports.get_mut(&key.id).map(|port| &mut port.deleted),
            Kind::Disk => self.disks.get_mut(&key.id).map(|disk| &mut disk.deleted),
            Kind::Volume => self.volumes.get_mut(&key.id).map(|volume| &mut volume.deleted),
            Kind::NatGateway => {
                self.nat_gateways.remove(&key.id);
                None
            }
            Kind::Network | Kind::Unspecified => {
                self.networks.remove(&key.id);
                None
            }
        };
        match deleted {
            Some(deleted) => *deleted = Some(generation),
            None => self.gone.push((key, generation)),
        }
    }

    /// An instance that is not in the store is gone, unless the host has its machine.
    fn delete_unknown(&mut self, key: Key, generation: u64) {
        match self.host.machine(&key.id).filter(|_| self.host.is_synced()) {
            Some(status) => drop(self.instances.insert(key.id.clone(), Guest::stranger(&key.id, status, generation))),
            None => self.gone.push((key, generation)),
        }
    }

    fn done(&mut self, key: &Key, result: Result<(), String>, now: Duration) {
        match key.kind {
            Kind::Instance => drop(self.instances.get_mut(&key.id).map(|guest| guest.tracked.slot.done(result, now))),
            Kind::Port => drop(self.ports.get_mut(&key.id).map(|port| port.slot.done(result, now))),
            Kind::Disk => drop(self.disks.get_mut(&key.id).map(|disk| disk.slot.done(result, now))),
            Kind::Volume => drop(self.volumes.get_mut(&key.id).map(|volume| volume.slot.done(result, now))),
            Kind::Network | Kind::NatGateway | Kind::Unspecified => {}
        }
    }

    /// Which machines use each function, or are about to.
    fn users(&self) -> Users {
        // A machine that has not heard this card yet may be plugging what an earlier run of the card told it to.
        let heard = |(id, guest): (&Id, &Guest)| self.host.machine(id).is_none_or(|status| !is_up(status) || guest.has_heard(status));
        let known = self.host.is_synced() && self.instances.iter().all(heard);
        let mut users = Users { known, machines: BTreeMap::new() };
        for (machine, status) in self.host.machines().filter(|(_, status)| is_up(status)) {
            status.functions.iter().filter_map(|function| Id::parse(function)).for_each(|function| users.add(function, machine));
        }
        for (machine, guest) in &self.instances {
            guest.plugging().for_each(|function| users.add(function.clone(), machine));
        }
        users
    }

    fn turn_ports(&mut self, users: &Users, now: Duration, out: &mut Vec<Output>) {
        for (id, port) in &mut self.ports {
            let number = self.numbers.port(id);
            let wanted = PortBinding { instance_id: port.spec.instance_id.clone(), number };
            let rules = Rules { in_place: false, may_drain: users.none(id), retry: true };
            if let Some(action) = port.step(wanted, rules, now) {
                let work = match action {
                    Action::Fill(binding) => Work::PortStart { number: binding.number, mtu: port.spec.mtu },
                    Action::Drain => Work::PortStop { number },
                };
                out.push(Output::Work { key: Key::new(Kind::Port, id), work });
            }
        }
    }

    fn turn_disks(&mut self, users: &Users, now: Duration, out: &mut Vec<Output>) {
        for (id, disk) in &mut self.disks {
            let owner = &disk.spec.instance_id;
            let wanted = DiskBinding { instance_id: owner.clone(), source: disk.spec.source.clone() };
            // Another source for the same guest: its machine waits meanwhile.
            let same = disk.deleted.is_none() && disk.slot.bound().is_some_and(|there| there.instance_id == *owner);
            let may_drain = users.none(id) || same && users.none_but(owner, id);
            if let Some(action) = disk.step(wanted, Rules { in_place: false, may_drain, retry: true }, now) {
                let work = match action {
                    Action::Fill(binding) => Work::DiskStart { source: binding.source, serial: disk.spec.serial() },
                    Action::Drain => Work::DiskStop,
                };
                out.push(Output::Work { key: Key::new(Kind::Disk, id), work });
            }
        }
    }

    fn turn_volumes(&mut self, now: Duration, out: &mut Vec<Output>) {
        let mut used: u64 = self.volumes.values().filter_map(|volume| volume.slot.bound()).map(|spec| spec.size_bytes).sum();
        for (id, volume) in &mut self.volumes {
            let wanted = volume.spec.spec.clone();
            let had = volume.slot.bound().map_or(0, |spec| spec.size_bytes);
            let grown = used.saturating_sub(had).saturating_add(wanted.size_bytes);
            if volume.deleted.is_none() && self.config.capacity_bytes < grown && had < wanted.size_bytes {
                if volume.slot.is_settled() || had == 0 {
                    volume.slot.refuse(
                        wanted,
                        format!("{grown} bytes are more than this card's capacity of {}", self.config.capacity_bytes),
                        now,
                    );
                }
                continue;
            }
            if let Some(action) = volume.step(wanted, Rules { in_place: true, may_drain: true, retry: false }, now) {
                let work = match action {
                    Action::Fill(spec) => {
                        used = grown;
                        Work::VolumePut(spec)
                    }
                    Action::Drain => Work::VolumeDelete,
                };
                out.push(Output::Work { key: Key::new(Kind::Volume, id), work });
            }
        }
    }

    fn turn_guests(&mut self, users: &Users, now: Duration, out: &mut Vec<Output>) {
        let mut parts = self.parts(users);
        for (id, guest) in &mut self.instances {
            guest.turn(&parts.remove(id).unwrap_or_default(), &self.host, now, out);
        }
    }

    /// What belongs to each machine, or did and may still be plugged.
    fn parts(&self, users: &Users) -> BTreeMap<Id, Vec<Part>> {
        let mut parts = BTreeMap::<Id, Vec<Part>>::new();
        for (id, port) in &self.ports {
            let bound = port.slot.bound().map(|there| &there.instance_id);
            for owner in owners(&port.spec.instance_id, bound) {
                parts.entry(owner.clone()).or_default().push(Part {
                    id: id.clone(),
                    kind: Kind::Port,
                    order: port.spec.device_index.into(),
                    function: port.spec.function(),
                    wanted: port.deleted.is_none() && *owner == port.spec.instance_id,
                    served: port.slot.full().is_some_and(|there| there.instance_id == *owner) && users.none_but(owner, id),
                    settled: port.slot.is_settled(),
                });
            }
        }
        for (id, disk) in &self.disks {
            let bound = disk.slot.bound().map(|there| &there.instance_id);
            for owner in owners(&disk.spec.instance_id, bound) {
                parts.entry(owner.clone()).or_default().push(Part {
                    id: id.clone(),
                    kind: Kind::Disk,
                    // The boot disk first, the others as they were attached.
                    order: if disk.spec.boot { 0 } else { disk.spec.attach_time_s.max(1) },
                    function: disk.spec.function(),
                    wanted: disk.deleted.is_none() && *owner == disk.spec.instance_id,
                    served: disk.slot.full().is_some_and(|there| there.instance_id == *owner) && users.none_but(owner, id),
                    settled: disk.slot.is_settled(),
                });
            }
        }
        parts
    }

    /// Forgets deleted objects of which nothing is left.
    fn bury(&mut self, out: &mut Vec<Output>) {
        let mut gone = std::mem::take(&mut self.gone);
        self.instances.retain(|id, guest| !guest.machine_gone() || guest.tracked.survives(Key::new(Kind::Instance, id), &mut gone));
        self.ports.retain(|id, port| port.survives(Key::new(Kind::Port, id), &mut gone));
        self.disks.retain(|id, disk| disk.survives(Key::new(Kind::Disk, id), &mut gone));
        self.volumes.retain(|id, volume| volume.survives(Key::new(Kind::Volume, id), &mut gone));
        for (key, generation) in gone {
            match key.kind {
                Kind::Port => self.numbers.port_forget(&key.id),
                Kind::NatGateway => self.numbers.nat_gateway_forget(&key.id),
                _ => {}
            }
            self.published.remove(&key);
            out.push(Output::Gone { key, generation });
        }
    }

    fn host_lost(&mut self) {
        self.host.disconnect();
        self.instances.values_mut().for_each(Guest::host_lost);
    }

    fn report(&mut self, report: to_card::Report) {
        match report {
            to_card::Report::Inventory(inventory) => self.host.inventory_set(inventory),
            to_card::Report::Status(status) => {
                let Some(id) = Id::parse(&status.id) else { return };
                if let (Some(status), Some(guest)) = (self.host.status_set(&id, status), self.instances.get_mut(&id)) {
                    guest.observe(&status, false);
                }
            }
            to_card::Report::Synced(_) => {
                self.host.synced_set();
                for (id, guest) in &mut self.instances {
                    guest.observe(&self.host.status_or_gone(id), true);
                }
            }
            // Console bytes take a shorter way.
            to_card::Report::Console(_) => {}
        }
    }

    /// Greets a new host, and clears it of what nobody desires.
    fn turn_host(&mut self, out: &mut Vec<Output>) {
        if self.host.greeting_due() {
            out.push(Output::Host(to_host::Command::Hello(host::Hello { card_boot_id: self.config.boot_id })));
        }
        if self.host.take_changed() {
            out.push(Output::HostChanged);
        }
        if !self.host.is_synced() {
            return;
        }
        let strange = self.host.machines().filter(|(id, _)| !self.instances.contains_key(*id));
        let strangers: Vec<(Id, Guest)> =
            strange.map(|(id, status)| (id.clone(), Guest::stranger(id, status, instance_generation(status.generation)))).collect();
        if self.config.store_complete {
            self.instances.extend(strangers);
        } else if strangers.is_empty() {
            self.config.store_complete = true;
            out.push(Output::StoreComplete);
        }
    }
}

/// Who uses the card's functions.
struct Users {
    /// Whoever uses or may be plugging a function is listed.
    known: bool,
    machines: BTreeMap<Id, BTreeSet<Id>>,
}

impl Users {
    fn add(&mut self, function: Id, machine: &Id) {
        self.machines.entry(function).or_default().insert(machine.clone());
    }

    /// Certainly no machine.
    fn none(&self, function: &Id) -> bool {
        self.known && !self.machines.contains_key(function)
    }

    /// As far as is known no machine but this one.
    fn none_but(&self, machine: &Id, function: &Id) -> bool {
        self.machines.get(function).is_none_or(|users| users.iter().all(|user| user == machine))
    }
}

/// The machines that a function concerns: the one that it is for and the one that it was for.
fn owners<'a>(wanted: &'a Id, bound: Option<&'a Id>) -> impl Iterator<Item = &'a Id> {
    std::iter::once(wanted).chain(bound.filter(move |bound| *bound != wanted))
}

impl<T, B: Clone + PartialEq> Tracked<T, B> {
    fn new(spec: T) -> Self {
        Self { spec, deleted: None, slot: Slot::new() }
    }

    /// A new spec, also for an object that was about to go.
    fn put(all: &mut BTreeMap<Id, Self>, id: Id, spec: T) {
        match all.get_mut(&id) {
            Some(tracked) => {
                tracked.spec = spec;
                tracked.deleted = None;
                tracked.slot.forgive();
            }
            None => drop(all.insert(id, Self::new(spec))),
        }
    }

    fn step(&mut self, wanted: B, rules: Rules, now: Duration) -> Option<Action<B>> {
        let wanted = self.deleted.is_none().then_some(wanted);
        self.slot.step(wanted.as_ref(), rules, now)
    }

    fn survives(&self, key: Key, gone: &mut Vec<(Key, u64)>) -> bool {
        let generation = self.deleted.filter(|_| self.slot.is_empty());
        gone.extend(generation.map(|generation| (key, generation)));
        generation.is_none()
    }
}
