//! What the packet path and the metadata service are shown of the desired state.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use dataplane::{GroupId, PortId, Snapshot};

use super::{Core, Guest, PortBinding, Tracked};
use crate::imds::Subjects;
use crate::imds::tree::{Interface, MappedDisk, Subject};
use crate::names::{Names, PortName};
use crate::object::Id;
use crate::port::Port;

/// Numbers for what the packet path does not know by name. A number is not
/// used twice while the card runs.
#[derive(Default)]
pub struct Numbers {
    ports: BTreeMap<Id, PortId>,
    ports_given: u32,
    groups: HashMap<String, GroupId>,
    groups_given: u32,
}

impl Numbers {
    pub fn port(&mut self, id: &Id) -> PortId {
        if let Some(number) = self.ports.get(id) {
            return *number;
        }
        self.ports_given = self.ports_given.wrapping_add(1);
        let number = PortId(self.ports_given);
        self.ports.insert(id.clone(), number);
        number
    }

    pub fn port_forget(&mut self, id: &Id) {
        self.ports.remove(id);
    }

    fn group(&mut self, name: &str) -> GroupId {
        if let Some(number) = self.groups.get(name) {
            return *number;
        }
        self.groups_given = self.groups_given.wrapping_add(1);
        let number = GroupId(self.groups_given);
        self.groups.insert(name.into(), number);
        number
    }
}

impl Core {
    pub(super) fn snapshot(&mut self) -> Snapshot {
        let numbers = &mut self.numbers;
        let mut used = HashSet::new();
        let mut snapshot = Snapshot::default();
        for (id, port) in self.ports.iter().filter(|(_, port)| port.deleted.is_none()) {
            let number = numbers.port(id);
            let mut group = |name: &str| {
                let number = numbers.group(name);
                used.insert(number);
                number
            };
            snapshot.ports.push(port.spec.config(number, &mut group));
        }
        for network in self.networks.values() {
            let mut group = |name: &str| {
                let number = numbers.group(name);
                used.insert(number);
                number
            };
            snapshot.networks.push(network.config(&mut group));
        }
        numbers.groups.retain(|_, number| used.contains(number));
        snapshot
    }

    /// What the numbers in the packet path's configuration stand for.
    pub fn names(&self) -> Names {
        let name = |(id, port): (&Id, &Tracked<Port, PortBinding>)| {
            let number = *self.numbers.ports.get(id)?;
            let port = &port.spec;
            let name = PortName {
                id: id.clone(),
                instance_id: port.instance_id.clone(),
                vni: port.vni,
                ipv4: port.private_ipv4,
                public_ipv4: port.public_ipv4,
            };
            Some((number, name))
        };
        Names {
            ports: self.ports.iter().filter_map(name).collect(),
            groups: self.numbers.groups.iter().map(|(id, number)| (*number, id.clone())).collect(),
        }
    }

    pub(super) fn subjects(&mut self) -> Subjects {
        let mut subjects = Subjects::new();
        for (id, guest) in self.instances.iter().filter(|(_, guest)| guest.tracked.deleted.is_none()) {
            let subject = Arc::new(self.subject(id, guest));
            for (port, _) in self.ports.iter().filter(|(_, port)| port.deleted.is_none() && port.spec.instance_id == *id) {
                subjects.insert(self.numbers.port(port), subject.clone());
            }
        }
        subjects
    }

    fn subject(&self, id: &Id, guest: &Guest) -> Subject {
        let metadata = guest.tracked.spec.metadata.clone();
        let ports = self.ports.values().filter(|port| port.deleted.is_none() && port.spec.instance_id == *id);
        let mut interfaces: Vec<Interface> = ports
            .map(|port| {
                let port = &port.spec;
                let name = if port.dhcp.domain.is_empty() {
                    port.dhcp.hostname.clone()
                } else {
                    format!("{}.{}", port.dhcp.hostname, port.dhcp.domain)
                };
                let primary = port.device_index == 0 && !metadata.local_hostname.is_empty();
                Interface {
                    id: port.id.to_string(),
                    device_index: port.device_index,
                    mac: port.mac,
                    private_ipv4: port.private_ipv4,
                    public_ipv4: port.public_ipv4,
                    local_hostname: if primary { metadata.local_hostname.clone() } else { name },
                    vpc_id: port.vpc_id.clone(),
                    subnet_id: port.subnet_id.clone(),
                    subnet: port.subnet,
                    vpc_prefixes: port.vpc_prefixes.clone(),
                    security_group_ids: port.security_group_ids.clone(),
                }
            })
            .collect();
        interfaces.sort_by_key(|interface| interface.device_index);
        let mut disks: Vec<_> = self.disks.values().filter(|disk| disk.deleted.is_none() && disk.spec.instance_id == *id).collect();
        disks.sort_by_key(|disk| (disk.spec.attach_time_s, &disk.spec.device_name));
        let disks = disks.iter().map(|disk| MappedDisk { device_name: disk.spec.device_name.clone(), boot: disk.spec.boot }).collect();
        Subject { instance_id: id.to_string(), metadata, interfaces, disks }
    }
}
