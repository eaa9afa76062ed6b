//! What control is told of every object.

use card_proto::card::{Phase, Status};
use card_proto::host::{MachinePhase, MachineStatus};

use super::guest::{Outcome, instance_generation};
use super::host_view::lists;
use super::{Core, DiskBinding, Guest, Output, PortBinding, Tracked};
use crate::object::{Id, Key, Kind};
use crate::slot::Slot;
use crate::volume::{self, Spec};

impl Core {
    /// Outputs the statuses that differ from what was last output.
    pub(super) fn publish(&mut self, out: &mut Vec<Output>) {
        let statuses = self.statuses();
        // Only a machine without a record goes without being deleted.
        let lost = |key: &&Key| !statuses.iter().any(|(known, _)| known == *key);
        let lost: Vec<Key> = self.published.keys().filter(|key| key.kind == Kind::Instance).filter(lost).cloned().collect();
        for key in lost {
            let generation = self.published.remove(&key).map_or(0, |status| status.generation);
            out.push(Output::Gone { key, generation });
        }
        for (key, status) in statuses {
            if self.published.get(&key) != Some(&status) {
                out.push(Output::Status(status.clone()));
                self.published.insert(key, status);
            }
        }
    }

    fn statuses(&self) -> Vec<(Key, Status)> {
        let instances = self.instances.iter().map(|(id, guest)| (Key::new(Kind::Instance, id), instance(guest, self.host.machine(id))));
        let strangers = self.host.machines().filter(|(id, _)| !self.config.store_complete && !self.instances.contains_key(*id));
        let strangers = strangers.map(|(id, machine)| (Key::new(Kind::Instance, id), stranger(machine)));
        let ports = self.ports.iter().map(|(id, port)| {
            let there = |binding: &PortBinding| binding.instance_id == port.spec.instance_id;
            self.function(Kind::Port, id, port, port.spec.generation, &port.spec.instance_id, there)
        });
        let disks = self.disks.iter().map(|(id, disk)| {
            let there = |binding: &DiskBinding| binding.instance_id == disk.spec.instance_id && binding.source == disk.spec.source;
            self.function(Kind::Disk, id, disk, disk.spec.generation, &disk.spec.instance_id, there)
        });
        let volumes = self.volumes.iter().map(|(id, tracked)| {
            let done = |spec: &Spec| *spec == tracked.spec.spec;
            let (phase, message) = filled(&tracked.slot, tracked.deleted, done, Phase::Failed);
            let generation = tracked.deleted.unwrap_or(tracked.spec.generation);
            let nqn = volume::nqn(id);
            (Key::new(Kind::Volume, id), Status { generation, phase: phase.into(), message, nqn, ..named(Kind::Volume, id) })
        });
        // The snapshot with the network, or the gateway, goes out before its status.
        let networks = self.networks.iter().map(|(id, network)| {
            let status = Status { generation: network.generation, phase: Phase::Ready.into(), ..named(Kind::Network, id) };
            (Key::new(Kind::Network, id), status)
        });
        let nat_gateways = self.nat_gateways.iter().map(|(id, gateway)| {
            let status = Status { generation: gateway.generation, phase: Phase::Ready.into(), ..named(Kind::NatGateway, id) };
            (Key::new(Kind::NatGateway, id), status)
        });
        instances.chain(strangers).chain(ports).chain(disks).chain(volumes).chain(networks).chain(nat_gateways).collect()
    }

    /// A port or disk is ready when its server is there and a running machine has it plugged.
    fn function<T, B: Clone + PartialEq>(
        &self,
        kind: Kind,
        id: &Id,
        tracked: &Tracked<T, B>,
        generation: u64,
        instance_id: &Id,
        there: impl Fn(&B) -> bool,
    ) -> (Key, Status) {
        // A server that cannot start is tried again, so this is no failure for good.
        let (mut phase, mut message) = filled(&tracked.slot, tracked.deleted, there, Phase::Converging);
        let guest = self.instances.get(instance_id).filter(|guest| guest.tracked.deleted.is_none());
        let running = self.host.machine(instance_id).filter(|machine| machine.phase() == MachinePhase::Running);
        if let (Phase::Ready, Some(_), Some(machine)) = (phase, guest, running.filter(|machine| !lists(machine, id))) {
            phase = Phase::Converging;
            message = if machine.message.is_empty() { "waiting for the machine to plug it".into() } else { machine.message.clone() };
        }
        let generation = tracked.deleted.unwrap_or(generation);
        (Key::new(kind, id), Status { generation, phase: phase.into(), message, ..named(kind, id) })
    }
}

fn filled<B: Clone + PartialEq>(slot: &Slot<B>, deleted: Option<u64>, there: impl Fn(&B) -> bool, failed: Phase) -> (Phase, String) {
    match slot.failure() {
        Some(message) => (if deleted.is_some() { Phase::Converging } else { failed }, message.to_owned()),
        None if deleted.is_none() && slot.full().is_some_and(there) => (Phase::Ready, String::new()),
        None => (Phase::Converging, String::new()),
    }
}

fn instance(guest: &Guest, machine: Option<&MachineStatus>) -> Status {
    let spec = &guest.tracked.spec;
    let generation = guest.tracked.deleted.unwrap_or(spec.generation);
    let boot = machine.map_or(0, |machine| machine.boot);
    let status = |phase: Phase, message: &str| Status {
        generation,
        phase: phase.into(),
        message: message.into(),
        boot,
        ..named(Kind::Instance, &spec.id)
    };
    if guest.tracked.deleted.is_some() {
        return status(Phase::Converging, "");
    }
    match guest.outcome() {
        Some(Outcome::Halted) => return status(Phase::MachineStopped, ""),
        Some(Outcome::Failed(message)) => return status(Phase::Failed, message),
        None => {}
    }
    let current = machine.filter(|machine| spec.generation <= instance_generation(machine.generation));
    match (spec.running, current.map(MachineStatus::phase)) {
        (true, Some(MachinePhase::Running)) if spec.boot <= boot => status(Phase::MachineRunning, ""),
        (false, Some(MachinePhase::Stopped | MachinePhase::Failed)) => status(Phase::MachineStopped, ""),
        _ => status(Phase::Converging, guest.waiting().unwrap_or_default()),
    }
}

/// A machine that is not in a store which may have lost it.
fn stranger(machine: &MachineStatus) -> Status {
    let phase = match machine.phase() {
        MachinePhase::Running => Phase::MachineRunning,
        MachinePhase::Stopped => Phase::MachineStopped,
        MachinePhase::Failed => Phase::Failed,
        _ => Phase::Converging,
    };
    Status {
        kind: Kind::Instance.into(),
        id: machine.id.clone(),
        generation: instance_generation(machine.generation),
        phase: phase.into(),
        message: "the card lost the record of this machine".into(),
        boot: machine.boot,
        nqn: String::new(),
    }
}

fn named(kind: Kind, id: &Id) -> Status {
    Status { kind: kind.into(), id: id.to_string(), ..Status::default() }
}
