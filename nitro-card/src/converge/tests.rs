//! The core against a world in memory: a host, sockets, volumes and a store
//! that outlive the card. First scenarios, then random ones with faults.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::Ipv4Addr;
use std::time::Duration;

use card_proto::card::{Metadata, Phase, Status};
use card_proto::host::{Inventory, Machine, MachinePhase, MachineStatus, Synced, to_card::Report, to_host::Command};
use dataplane::{ConnectionTracking, Dhcp, Mac, PortId, Prefix, Snapshot, Vni};

use super::*;
use crate::instance::Instance;

pub(crate) fn id(text: &str) -> Id {
    Id::parse(text).unwrap()
}

/// A running instance with one port and one disk.
pub(crate) fn instance(name: &str, generation: u64) -> Instance {
    Instance {
        id: id(name),
        generation,
        running: true,
        boot: 0,
        vcpus: 1,
        memory_bytes: 1 << 30,
        boot_source: BootSource { kernel: Some("mini.vmlinux".into()), initrd: None, command_line: String::new() },
        metadata: Metadata { instance_type: "t3.micro".into(), ..Metadata::default() },
        ports: 1,
        disks: 1,
    }
}

pub(crate) fn port(name: &str, instance: &str, generation: u64) -> Port {
    Port {
        id: id(name),
        generation,
        instance_id: id(instance),
        device_index: 0,
        vpc_id: "vpc-1".into(),
        subnet_id: "subnet-1".into(),
        vni: Vni(7),
        mac: Mac([2, 0, 0, 0, 0, 1]),
        private_ipv4: Ipv4Addr::new(10, 0, 0, 5),
        subnet: Prefix::new(Ipv4Addr::new(10, 0, 0, 0), 24),
        vpc_prefixes: Vec::new(),
        public_ipv4: None,
        secondary: Vec::new(),
        source_dest_check: true,
        mtu: 9001,
        ingress: Vec::new(),
        egress: Vec::new(),
        acl: None,
        tracking: ConnectionTracking::default(),
        limits: None,
        routes: Vec::new(),
        security_group_ids: Vec::new(),
        dhcp: Dhcp::default(),
    }
}

pub(crate) fn disk(name: &str, instance: &str, generation: u64) -> Disk {
    Disk {
        id: id(name),
        generation,
        instance_id: id(instance),
        device_name: "/dev/xvda".into(),
        boot: name.ends_with("root"),
        source: Source { nqn: format!("nqn:{name}"), address: "127.0.0.1:4420".parse().unwrap(), size_bytes: 512 },
        attach_time_s: 1,
    }
}

fn volume(name: &str, generation: u64, size_bytes: u64) -> Volume {
    Volume { id: id(name), generation, spec: Spec { size_bytes, image: None, initiator_nqn: None, iops: 0, throughput_mib_s: 0 } }
}

fn key(kind: Kind, name: &str) -> Key {
    Key { kind, id: id(name) }
}

/// A machine on the simulated host.
#[derive(Clone, Debug)]
struct Box_ {
    wanted: Machine,
    boot: u64,
    up: bool,
    ready: bool,
    plugged: BTreeSet<Id>,
    /// Ended by itself at this generation; true: failed.
    end: Option<(u64, bool)>,
    deleting: bool,
}

/// Everything around the core. What a kill of the card takes with it is `core`,
/// `served`, `work` and the link.
struct World {
    core: Core,
    now: Duration,
    store: BTreeMap<Key, (Object, Option<u64>)>,
    complete: bool,
    sockets: BTreeSet<Id>,
    served: BTreeSet<Id>,
    volumes: BTreeSet<Id>,
    staged: BTreeSet<Id>,
    work: VecDeque<(Key, Work)>,
    /// Work that fails once, and whose last work did.
    failing: BTreeSet<Key>,
    failed: BTreeSet<Id>,
    machines: BTreeMap<Id, Box_>,
    linked: bool,
    to_host: VecDeque<Command>,
    to_card: VecDeque<Report>,
    puts: Vec<Machine>,
    statuses: BTreeMap<Key, Status>,
    gone: Vec<(Key, u64)>,
    snapshot: Snapshot,
    subjects: Subjects,
}

impl World {
    fn new() -> Self {
        let core = Core::new(Config { boot_id: 1, capacity_bytes: 1 << 20, store_complete: true });
        Self {
            core,
            now: Duration::ZERO,
            store: BTreeMap::new(),
            complete: true,
            sockets: BTreeSet::new(),
            served: BTreeSet::new(),
            volumes: BTreeSet::new(),
            staged: BTreeSet::new(),
            work: VecDeque::new(),
            failing: BTreeSet::new(),
            failed: BTreeSet::new(),
            machines: BTreeMap::new(),
            linked: false,
            to_host: VecDeque::new(),
            to_card: VecDeque::new(),
            puts: Vec::new(),
            statuses: BTreeMap::new(),
            gone: Vec::new(),
            snapshot: Snapshot::default(),
            subjects: Subjects::new(),
        }
    }

    /// A world with a host and a launched instance `i-1` with `eni-1` and `vol-root`.
    fn launched() -> Self {
        let mut world = Self::new();
        world.connect();
        world.put(Object::Port(port("eni-1", "i-1", 1)));
        world.put(Object::Disk(disk("vol-root", "i-1", 1)));
        world.put(Object::Instance(instance("i-1", 1)));
        world.settle();
        assert_eq!(world.phase(Kind::Instance, "i-1"), Phase::MachineRunning);
        world
    }

    fn put(&mut self, object: Object) {
        self.store.insert(object.key(), (object.clone(), None));
        self.event(Event::Put(object));
    }

    fn delete(&mut self, kind: Kind, name: &str, generation: u64) {
        let key = key(kind, name);
        if let Some((_, deleted)) = self.store.get_mut(&key) {
            *deleted = Some(generation);
        }
        self.event(Event::Deleted { key, generation, object: None });
    }

    fn connect(&mut self) {
        self.linked = true;
        self.to_host.clear();
        self.to_card.clear();
        self.event(Event::HostConnected);
    }

    fn disconnect(&mut self) {
        self.linked = false;
        self.to_host.clear();
        self.to_card.clear();
        self.event(Event::HostDisconnected);
    }

    /// SIGKILL, and a new start from the store.
    fn kill_card(&mut self) {
        self.core = Core::new(Config { boot_id: 2, capacity_bytes: 1 << 20, store_complete: self.complete });
        self.served.clear();
        self.work.clear();
        self.statuses.clear();
        self.linked = false;
        self.to_host.clear();
        self.to_card.clear();
        for (object, deleted) in self.store.values() {
            self.core.handle(
                match deleted {
                    None => Event::Put(object.clone()),
                    Some(generation) => Event::Deleted { key: object.key(), generation: *generation, object: Some(object.clone()) },
                },
                self.now,
            );
        }
        self.turn();
    }

    fn event(&mut self, event: Event) {
        self.core.handle(event, self.now);
        self.turn();
    }

    fn turn(&mut self) {
        for output in self.core.turn(self.now) {
            match output {
                Output::Dataplane(snapshot) => self.snapshot = snapshot,
                Output::Subjects(subjects) => self.subjects = subjects,
                Output::Work { key, work } => {
                    assert!(self.work.iter().all(|(busy, _)| *busy != key), "two pieces of work for {key}");
                    self.work.push_back((key, work));
                }
                Output::Host(command) => {
                    assert!(self.linked, "{command:?} without a link");
                    if let Command::Put(machine) = &command {
                        self.check_put(machine);
                        self.puts.push(machine.clone());
                    }
                    self.to_host.push_back(command);
                }
                Output::StoreComplete => self.complete = true,
                Output::HostChanged => {}
                Output::Gone { key, generation } => {
                    self.check_gone(&key);
                    self.store.remove(&key);
                    self.statuses.remove(&key);
                    self.gone.push((key, generation));
                }
                Output::Status(status) => {
                    self.statuses.insert(Key { kind: status.kind(), id: id(&status.id) }, status);
                }
            }
        }
    }

    /// A machine is never told to connect to a socket that nobody serves.
    fn check_put(&self, machine: &Machine) {
        let there = self.machines.get(&id(&machine.id));
        for function in machine.functions.iter().map(|function| id(&function.id)) {
            let plugged = there.is_some_and(|there| there.up && there.plugged.contains(&function));
            // A running guest keeps what cannot be served at the moment, and may just have gone down.
            let excused = plugged || self.failed.contains(&function);
            assert!(!machine.running || excused || self.served.contains(&function), "{function} is not served");
        }
        let sent = self.to_host.iter().rev().find_map(|command| match command {
            Command::Put(sent) if sent.id == machine.id => Some(sent.generation),
            Command::Delete(sent) if sent.id == machine.id => Some(sent.generation),
            _ => None,
        });
        let known = sent.or(there.map(|there| there.wanted.generation));
        assert!(known.is_none_or(|known| known < machine.generation), "{known:?}: the host would ignore {machine:?}");
    }

    /// Nothing is left of an object that is reported as gone.
    fn check_gone(&self, key: &Key) {
        match key.kind {
            Kind::Instance => assert!(!self.machines.contains_key(&key.id) && !self.staged.contains(&key.id)),
            Kind::Port | Kind::Disk => assert!(!self.sockets.contains(&key.id) && !self.served.contains(&key.id)),
            Kind::Volume => assert!(!self.volumes.contains(&key.id)),
            Kind::Network | Kind::NatGateway | Kind::Unspecified => {}
        }
    }

    /// No machine may need a function when its server goes.
    fn check_stop(&self, function: &Id) {
        for machine in self.machines.values().filter(|machine| machine.up) {
            let wanted = machine.wanted.functions.iter().any(|wanted| wanted.id == function.as_str());
            let moved = self.store.get(&key(Kind::Disk, function.as_str())).is_some_and(|(_, deleted)| deleted.is_none());
            assert!(!machine.plugged.contains(function) && !wanted || moved, "{function} goes and {} has it", machine.wanted.id);
        }
    }

    /// Ends the piece of work at `index`.
    fn work_done(&mut self, index: usize) {
        let Some((key, work)) = self.work.remove(index) else { return };
        self.failed.remove(&key.id);
        if self.failing.remove(&key) {
            self.failed.insert(key.id.clone());
            return self.event(Event::Done { key, result: Err("as told".into()) });
        }
        let name = key.id.clone();
        match work {
            Work::PortStart { .. } | Work::DiskStart { .. } => {
                self.sockets.insert(name.clone());
                self.served.insert(name);
            }
            Work::PortStop { .. } | Work::DiskStop => {
                self.check_stop(&name);
                self.sockets.remove(&name);
                self.served.remove(&name);
            }
            Work::VolumePut(_) => drop(self.volumes.insert(name)),
            Work::VolumeDelete => drop(self.volumes.remove(&name)),
            Work::InstanceStage(_) => drop(self.staged.insert(name)),
            Work::InstanceClean => drop(self.staged.remove(&name)),
        }
        self.event(Event::Done { key, result: Ok(()) });
    }

    /// The host takes one command.
    fn host_step(&mut self) -> bool {
        let Some(command) = self.to_host.pop_front() else { return false };
        match command {
            Command::Hello(_) => {
                self.to_card.push_back(Report::Inventory(Inventory { cores: 8, ..Inventory::default() }));
                for name in self.machines.keys().cloned().collect::<Vec<_>>() {
                    self.report(&name);
                }
                self.to_card.push_back(Report::Synced(Synced {}));
            }
            Command::Put(message) => {
                let name = id(&message.id);
                let fresh = || Box_ {
                    wanted: message.clone(),
                    boot: 0,
                    up: false,
                    ready: false,
                    plugged: BTreeSet::new(),
                    end: None,
                    deleting: false,
                };
                let machine = self.machines.entry(name.clone()).or_insert_with(fresh);
                if machine.wanted.generation <= message.generation {
                    machine.wanted = message;
                    machine.deleting = false;
                }
                self.host_act(&name);
            }
            Command::Delete(delete) => {
                let name = id(&delete.id);
                match self.machines.get_mut(&name) {
                    Some(machine) if machine.wanted.generation <= delete.generation => {
                        machine.wanted.generation = delete.generation;
                        machine.deleting = true;
                        self.host_act(&name);
                    }
                    Some(_) => panic!("the host would ignore {delete:?}"),
                    None => self.to_card.push_back(Report::Status(gone(&name, delete.generation))),
                }
            }
            Command::Console(_) => {}
        }
        true
    }

    /// The host moves one machine one step; true when it moved.
    fn host_act(&mut self, name: &Id) -> bool {
        let Some(machine) = self.machines.get_mut(name) else { return false };
        let before = (machine.up, machine.ready, machine.boot, machine.plugged.clone(), machine.wanted.generation);
        let ended = machine.end.is_some_and(|(generation, _)| machine.wanted.generation <= generation);
        if machine.deleting {
            let generation = machine.wanted.generation;
            self.machines.remove(name);
            if self.linked {
                self.to_card.push_back(Report::Status(gone(name, generation)));
            }
            return true;
        }
        let wanted: BTreeSet<Id> = machine.wanted.functions.iter().map(|function| id(&function.id)).collect();
        if !machine.up && machine.wanted.running && !ended {
            machine.up = true;
            machine.ready = false;
            machine.boot = machine.wanted.boot;
            machine.plugged = wanted;
        } else if machine.up && !machine.wanted.running {
            machine.up = false;
            machine.plugged.clear();
        } else if machine.up && !machine.ready {
            machine.ready = true;
        } else if machine.up && machine.boot < machine.wanted.boot {
            machine.boot = machine.wanted.boot;
        } else if machine.up
            && let Some(change) = wanted.symmetric_difference(&machine.plugged).next().cloned()
            && !machine.plugged.remove(&change)
        {
            machine.plugged.insert(change);
        }
        let moved = before != (machine.up, machine.ready, machine.boot, machine.plugged.clone(), machine.wanted.generation);
        self.report(name);
        moved
    }

    fn report(&mut self, name: &Id) {
        let Some(machine) = self.machines.get(name).filter(|_| self.linked) else { return };
        let ended = machine.end.filter(|(generation, _)| machine.wanted.running && machine.wanted.generation <= *generation);
        let phase = match (machine.up, machine.ready, ended) {
            (true, true, _) => MachinePhase::Running,
            (true, false, _) => MachinePhase::Starting,
            (false, _, Some((_, true))) => MachinePhase::Failed,
            (false, _, None) if machine.wanted.running => MachinePhase::Starting,
            _ => MachinePhase::Stopped,
        };
        self.to_card.push_back(Report::Status(MachineStatus {
            id: name.to_string(),
            generation: machine.wanted.generation,
            boot: machine.boot,
            phase: phase.into(),
            message: if phase == MachinePhase::Failed { "no cores".into() } else { String::new() },
            functions: machine.plugged.iter().map(Id::to_string).collect(),
            cores: Vec::new(),
        }));
    }

    /// The guest switches itself off, or its process dies.
    fn end(&mut self, name: &str, failed: bool) {
        let name = id(name);
        if let Some(machine) = self.machines.get_mut(&name).filter(|machine| machine.up) {
            machine.up = false;
            machine.plugged.clear();
            machine.end = Some((machine.wanted.generation, failed));
        }
        self.report(&name);
    }

    fn hear(&mut self) -> bool {
        let Some(report) = self.to_card.pop_front() else { return false };
        self.event(Event::HostReport(report));
        true
    }

    /// Lets everything happen, retries included, until nothing does.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            let mut moved = false;
            while !self.work.is_empty() {
                self.work_done(0);
                moved = true;
            }
            while self.host_step() || self.hear() {
                moved = true;
            }
            for name in self.machines.keys().cloned().collect::<Vec<_>>() {
                moved |= self.host_act(&name);
            }
            while self.hear() {}
            if let Some(at) = self.core.deadline(self.now) {
                self.now = at;
                self.turn();
                moved = true;
            }
            if !moved && self.work.is_empty() && self.to_host.is_empty() {
                return;
            }
        }
        panic!("it never settles");
    }

    fn status(&self, kind: Kind, name: &str) -> &Status {
        self.statuses.get(&key(kind, name)).unwrap_or_else(|| panic!("no status of {name}"))
    }

    fn phase(&self, kind: Kind, name: &str) -> Phase {
        self.status(kind, name).phase()
    }

    fn plugged(&self, machine: &str) -> Vec<&str> {
        self.machines.get(&id(machine)).map(|machine| machine.plugged.iter().map(Id::as_str).collect()).unwrap_or_default()
    }
}

fn gone(name: &Id, generation: u64) -> MachineStatus {
    MachineStatus { id: name.to_string(), generation, phase: MachinePhase::Gone.into(), ..MachineStatus::default() }
}

#[test]
fn a_machine_starts_when_its_port_disk_and_kernel_are_there_in_any_order() {
    let objects = [Object::Instance(instance("i-1", 5)), Object::Port(port("eni-1", "i-1", 1)), Object::Disk(disk("vol-root", "i-1", 2))];
    for first in 0..3 {
        for direction in [1, 2] {
            let mut world = World::new();
            world.connect();
            for step in 0..3 {
                assert!(world.puts.is_empty(), "too early");
                world.put(objects[(first + step * direction) % 3].clone());
                world.settle();
            }
            let status = world.status(Kind::Instance, "i-1");
            assert_eq!((status.phase(), status.generation), (Phase::MachineRunning, 5));
            assert_eq!(world.phase(Kind::Port, "eni-1"), Phase::Ready);
            assert_eq!(world.phase(Kind::Disk, "vol-root"), Phase::Ready);
            let machine = world.puts.first().unwrap();
            assert_eq!(machine.kernel, "i-1.kernel");
            assert_eq!(machine.functions.iter().map(|function| function.id.as_str()).collect::<Vec<_>>(), ["eni-1", "vol-root"]);
        }
    }
}

#[test]
fn what_a_machine_waits_for_is_said() {
    let mut world = World::new();
    world.connect();
    world.put(Object::Instance(instance("i-1", 1)));
    world.settle();
    let status = world.status(Kind::Instance, "i-1");
    assert_eq!(status.phase(), Phase::Converging);
    assert!(status.message.contains("0 of 1 ports") && status.message.contains("0 of 1 disks"), "{}", status.message);
}

#[test]
fn a_restarted_card_takes_nothing_from_its_running_machines() {
    let mut world = World::launched();
    world.kill_card();
    // The host is faster than the card's own devices.
    world.connect();
    while world.host_step() || world.hear() {}
    assert_eq!(world.plugged("i-1"), ["eni-1", "vol-root"]);
    world.settle();
    assert_eq!(world.plugged("i-1"), ["eni-1", "vol-root"]);
    assert_eq!(world.phase(Kind::Instance, "i-1"), Phase::MachineRunning);
    assert_eq!(world.phase(Kind::Disk, "vol-root"), Phase::Ready);
}

#[test]
fn a_disk_is_attached_and_detached_while_the_machine_runs() {
    let mut world = World::launched();
    world.put(Object::Disk(disk("vol-2", "i-1", 7)));
    assert_eq!(world.phase(Kind::Disk, "vol-2"), Phase::Converging);
    world.settle();
    assert_eq!(world.phase(Kind::Disk, "vol-2"), Phase::Ready);
    assert_eq!(world.plugged("i-1"), ["eni-1", "vol-2", "vol-root"]);
    world.delete(Kind::Disk, "vol-2", 8);
    world.work_done(0);
    assert!(world.sockets.contains(&id("vol-2")), "the machine still has it");
    world.settle();
    assert_eq!(world.gone, [(key(Kind::Disk, "vol-2"), 8)]);
    assert_eq!(world.plugged("i-1"), ["eni-1", "vol-root"]);
}

#[test]
fn a_disk_that_moves_to_another_guest_is_let_go_by_the_first() {
    let mut world = World::launched();
    world.put(Object::Port(port("eni-2", "i-2", 1)));
    world.put(Object::Disk(disk("vol-2-root", "i-2", 1)));
    world.put(Object::Instance(instance("i-2", 1)));
    world.put(Object::Disk(disk("vol-3", "i-1", 1)));
    world.settle();
    world.put(Object::Disk(disk("vol-3", "i-2", 2)));
    world.settle();
    assert_eq!(world.plugged("i-1"), ["eni-1", "vol-root"]);
    assert_eq!(world.plugged("i-2"), ["eni-2", "vol-2-root", "vol-3"]);
    assert_eq!(world.status(Kind::Disk, "vol-3").generation, 2);
}

#[test]
fn a_disk_deleted_while_it_is_being_plugged_is_plugged_and_unplugged() {
    let mut world = World::launched();
    world.put(Object::Disk(disk("vol-2", "i-1", 2)));
    world.work_done(0);
    world.delete(Kind::Disk, "vol-2", 3);
    assert!(world.work.is_empty(), "its server stays while the host may be plugging it");
    world.settle();
    assert_eq!(world.gone, [(key(Kind::Disk, "vol-2"), 3)]);
    assert_eq!(world.plugged("i-1"), ["eni-1", "vol-root"]);
}

#[test]
fn terminate_takes_the_machine_first_and_leaves_nothing() {
    let mut world = World::launched();
    world.delete(Kind::Disk, "vol-root", 10);
    world.delete(Kind::Port, "eni-1", 11);
    world.delete(Kind::Instance, "i-1", 12);
    world.settle();
    let mut gone = world.gone.clone();
    gone.sort();
    assert_eq!(gone, [(key(Kind::Instance, "i-1"), 12), (key(Kind::Port, "eni-1"), 11), (key(Kind::Disk, "vol-root"), 10)]);
    assert!(world.machines.is_empty() && world.sockets.is_empty() && world.staged.is_empty() && world.store.is_empty());
    assert!(world.snapshot.ports.is_empty() && world.subjects.is_empty());
    world.delete(Kind::Instance, "i-unknown", 3);
    assert_eq!(world.gone.last(), Some(&(key(Kind::Instance, "i-unknown"), 3)), "unknown is gone at once");
}

#[test]
fn stop_and_start_go_through_the_same_loop() {
    let mut world = World::launched();
    world.put(Object::Instance(Instance { running: false, ..instance("i-1", 2) }));
    world.settle();
    assert_eq!((world.phase(Kind::Instance, "i-1"), world.status(Kind::Instance, "i-1").generation), (Phase::MachineStopped, 2));
    assert_eq!(world.phase(Kind::Disk, "vol-root"), Phase::Ready, "its socket stays");
    world.put(Object::Instance(Instance { vcpus: 2, ..instance("i-1", 3) }));
    world.settle();
    assert_eq!((world.phase(Kind::Instance, "i-1"), world.status(Kind::Instance, "i-1").generation), (Phase::MachineRunning, 3));
    world.put(Object::Instance(Instance { boot: 1, ..instance("i-1", 4) }));
    world.settle();
    assert_eq!((world.phase(Kind::Instance, "i-1"), world.status(Kind::Instance, "i-1").boot), (Phase::MachineRunning, 1));
}

#[test]
fn a_guest_that_switched_itself_off_stays_off_until_control_says_otherwise() {
    let mut world = World::launched();
    world.end("i-1", false);
    world.settle();
    assert_eq!(world.phase(Kind::Instance, "i-1"), Phase::MachineStopped);
    world.disconnect();
    world.connect();
    world.settle();
    assert_eq!(world.phase(Kind::Instance, "i-1"), Phase::MachineStopped);
    world.kill_card();
    world.connect();
    world.settle();
    assert_eq!(world.phase(Kind::Instance, "i-1"), Phase::MachineStopped);
    assert!(!world.machines[&id("i-1")].up);
    world.put(Object::Instance(instance("i-1", 2)));
    world.settle();
    assert_eq!(world.phase(Kind::Instance, "i-1"), Phase::MachineRunning);
}

#[test]
fn a_failed_machine_is_reported_with_its_reason_and_not_tried_again() {
    let mut world = World::launched();
    world.end("i-1", true);
    world.settle();
    let status = world.status(Kind::Instance, "i-1");
    assert_eq!((status.phase(), status.message.as_str()), (Phase::Failed, "no cores"));
    let puts = world.puts.len();
    world.disconnect();
    world.connect();
    world.settle();
    assert_eq!(world.puts.len(), puts);
    world.delete(Kind::Instance, "i-1", 2);
    world.settle();
    assert!(world.machines.is_empty());
}

#[test]
fn a_host_that_lost_everything_is_told_everything() {
    let mut world = World::launched();
    world.disconnect();
    world.machines.clear();
    assert_eq!(world.phase(Kind::Instance, "i-1"), Phase::MachineRunning, "unknown is not down");
    world.connect();
    world.settle();
    assert_eq!(world.phase(Kind::Instance, "i-1"), Phase::MachineRunning);
    assert_eq!(world.plugged("i-1"), ["eni-1", "vol-root"]);
}

#[test]
fn a_machine_that_nobody_desires_is_deleted() {
    let mut world = World::launched();
    world.store.remove(&key(Kind::Instance, "i-1"));
    world.kill_card();
    world.connect();
    world.settle();
    assert!(world.machines.is_empty());
}

#[test]
fn a_machine_is_kept_when_the_store_may_have_lost_it() {
    let mut world = World::launched();
    world.store.remove(&key(Kind::Instance, "i-1"));
    world.complete = false;
    world.kill_card();
    world.connect();
    world.settle();
    assert!(world.machines[&id("i-1")].up);
    let status = world.status(Kind::Instance, "i-1");
    assert_eq!((status.phase(), status.generation), (Phase::MachineRunning, 1));
    let mut known = world;
    // Control may know it and say so, ...
    known.put(Object::Instance(instance("i-1", 2)));
    known.settle();
    assert_eq!((known.status(Kind::Instance, "i-1").generation, known.complete), (2, true));
    // ... or may not.
    known.store.remove(&key(Kind::Instance, "i-1"));
    known.complete = false;
    known.kill_card();
    known.connect();
    known.settle();
    known.delete(Kind::Instance, "i-1", 9);
    known.settle();
    assert!(known.machines.is_empty() && known.complete);
    assert_eq!(known.gone.last(), Some(&(key(Kind::Instance, "i-1"), 9)));
}

#[test]
fn failed_work_is_tried_again_and_volumes_are_not() {
    let mut world = World::new();
    world.connect();
    world.failing.insert(key(Kind::Port, "eni-1"));
    world.put(Object::Port(port("eni-1", "i-1", 1)));
    world.work_done(0);
    assert_eq!((world.phase(Kind::Port, "eni-1"), world.status(Kind::Port, "eni-1").message.as_str()), (Phase::Converging, "as told"));
    world.settle();
    assert_eq!(world.phase(Kind::Port, "eni-1"), Phase::Ready);
    world.failing.insert(key(Kind::Volume, "vol-1"));
    world.put(Object::Volume(volume("vol-1", 1, 512)));
    world.settle();
    assert_eq!(world.phase(Kind::Volume, "vol-1"), Phase::Failed);
    world.put(Object::Volume(volume("vol-1", 2, 512)));
    world.settle();
    let status = world.status(Kind::Volume, "vol-1");
    assert_eq!((status.phase(), status.nqn.as_str()), (Phase::Ready, "nqn.2026-11.cardinal:volume:vol-1"));
    world.delete(Kind::Volume, "vol-1", 3);
    world.settle();
    assert!(world.volumes.is_empty());
}

#[test]
fn volumes_beyond_the_capacity_are_refused() {
    let mut world = World::new();
    world.put(Object::Volume(volume("vol-1", 1, 1 << 19)));
    world.put(Object::Volume(volume("vol-2", 1, 1 << 19)));
    world.put(Object::Volume(volume("vol-3", 1, 512)));
    world.settle();
    assert_eq!(world.phase(Kind::Volume, "vol-2"), Phase::Ready);
    assert_eq!(world.phase(Kind::Volume, "vol-3"), Phase::Failed);
    assert_eq!(world.volumes.len(), 2);
    world.delete(Kind::Volume, "vol-1", 2);
    world.put(Object::Volume(volume("vol-3", 2, 512)));
    world.settle();
    assert_eq!(world.phase(Kind::Volume, "vol-3"), Phase::Ready);
}

#[test]
fn a_quick_delete_and_put_ends_as_the_put_says() {
    let mut world = World::launched();
    world.delete(Kind::Disk, "vol-root", 2);
    world.put(Object::Disk(disk("vol-root", "i-1", 3)));
    world.delete(Kind::Instance, "i-1", 4);
    world.put(Object::Instance(instance("i-1", 5)));
    world.settle();
    assert_eq!((world.phase(Kind::Instance, "i-1"), world.status(Kind::Instance, "i-1").generation), (Phase::MachineRunning, 5));
    assert_eq!(world.status(Kind::Disk, "vol-root").generation, 3);
    assert!(world.gone.is_empty());
}

#[test]
fn the_metadata_service_knows_an_instance_by_its_ports() {
    let world = World::launched();
    let number: PortId = world.snapshot.ports.first().unwrap().id;
    let subject = world.subjects.get(&number).unwrap();
    assert_eq!(subject.instance_id, "i-1");
    assert_eq!(subject.interfaces.len(), 1);
    assert_eq!(subject.disks.len(), 1);
}

#[test]
fn ports_of_one_instance_share_its_allowance() {
    let mut world = World::new();
    let limits = Some(dataplane::Limits { packets_per_s: 1000, ..dataplane::Limits::default() });
    for (name, instance) in [("eni-1", "i-1"), ("eni-2", "i-1"), ("eni-3", "i-2")] {
        world.put(Object::Port(Port { limits, ..port(name, instance, 1) }));
    }
    let ids: Vec<_> = world.snapshot.ports.iter().map(|port| port.allowance.unwrap().id).collect();
    assert!(ids[0] == ids[1] && ids[1] != ids[2], "{ids:?}");
    // Numbers stay while other ports come and go.
    world.put(Object::Port(Port { limits, ..port("eni-0", "i-3", 1) }));
    world.delete(Kind::Port, "eni-1", 2);
    let after: Vec<_> = world.snapshot.ports.iter().map(|port| port.allowance.unwrap().id).collect();
    assert_eq!((after.len(), &after[1..]), (3, &ids[1..]));
}

/// Deterministic chance: SplitMix64.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % limit as u64).unwrap()
    }
}

/// Control and faults act at random on three instances and four disks; then
/// everything is left alone and has to be as control said last.
fn storm(seed: u64) {
    let mut chance = Chance(seed);
    let mut world = World::new();
    world.connect();
    let mut generation = 0;
    for _ in 0..400 {
        let instance_name = format!("i-{}", chance.below(3));
        let disk_name = format!("vol-{}", chance.below(4));
        let port_name = format!("eni-{}", instance_name);
        generation += 1;
        match chance.below(22) {
            0 | 1 => {
                let running = chance.below(4) > 0;
                let boot = generation / 100;
                world.put(Object::Instance(Instance { running, boot, disks: 0, ..instance(&instance_name, generation) }));
            }
            2 | 3 => world.put(Object::Port(port(&port_name, &instance_name, generation))),
            4 | 5 => world.put(Object::Disk(disk(&disk_name, &instance_name, generation))),
            6 => world.delete(Kind::Instance, &instance_name, generation),
            7 => world.delete(Kind::Port, &port_name, generation),
            8 => world.delete(Kind::Disk, &disk_name, generation),
            9 if chance.below(4) == 0 => world.kill_card(),
            10 if chance.below(3) == 0 => world.disconnect(),
            11 if !world.linked => world.connect(),
            12 if chance.below(3) == 0 => world.end(&instance_name, chance.below(2) == 0),
            13 if !world.work.is_empty() => {
                let key = world.work[0].0.clone();
                world.failing.insert(key);
            }
            14 => {
                world.now += Duration::from_millis(700);
                world.turn();
            }
            15..=17 if !world.work.is_empty() => {
                let index = chance.below(world.work.len());
                world.work_done(index);
            }
            18 | 19 => drop(world.host_step()),
            20 => drop(world.host_act(&id(&instance_name))),
            _ => drop(world.hear()),
        }
    }
    world.failing.clear();
    if !world.linked {
        world.connect();
    }
    world.settle();
    let wanted = |kind: Kind| world.store.iter().filter(move |(key, (_, deleted))| key.kind == kind && deleted.is_none());
    assert!(world.store.values().all(|(_, deleted)| deleted.is_none()), "something is not gone: {:?}", world.store.keys());
    let sockets: BTreeSet<Id> = wanted(Kind::Port).chain(wanted(Kind::Disk)).map(|(key, _)| key.id.clone()).collect();
    assert_eq!(world.sockets, sockets);
    assert_eq!(world.served, sockets);
    assert_eq!(world.staged, wanted(Kind::Instance).map(|(key, _)| key.id.clone()).collect());
    for name in world.machines.keys() {
        assert!(world.store.contains_key(&Key::new(Kind::Instance, name)), "{name} is a residue");
    }
    for (key, (object, _)) in wanted(Kind::Instance) {
        let Object::Instance(spec) = object else { panic!() };
        let mut functions: Vec<&str> = Vec::new();
        for (other, (object, _)) in wanted(Kind::Port).chain(wanted(Kind::Disk)) {
            let owner = match object {
                Object::Port(port) => &port.instance_id,
                Object::Disk(disk) => &disk.instance_id,
                _ => panic!(),
            };
            if *owner == key.id {
                functions.push(other.id.as_str());
            }
        }
        functions.sort_unstable();
        let status = world.statuses.get(key).unwrap();
        assert_eq!(status.generation, spec.generation);
        let has_port = functions.iter().any(|name| name.starts_with("eni"));
        match status.phase() {
            Phase::MachineRunning => {
                assert!(spec.running);
                assert_eq!(world.plugged(key.id.as_str()), functions);
            }
            // By itself, or because control said so.
            Phase::MachineStopped | Phase::Failed => assert!(!world.machines[&key.id].up),
            phase => {
                let machine =
                    world.machines.get(&key.id).map(|machine| (machine.up, machine.ready, machine.boot, machine.end, &machine.wanted));
                assert!(!has_port, "{key} {phase:?} {:?} {machine:?}", status.message);
            }
        }
    }
}

#[test]
fn random_storms_end_as_control_said() {
    for seed in 0..500 {
        if let Err(cause) = std::panic::catch_unwind(|| storm(seed)) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(cause);
        }
    }
}
