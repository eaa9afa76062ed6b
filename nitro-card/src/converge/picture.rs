//! What the packet path and the metadata service are shown of the desired state.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use dataplane::{AllowanceId, GroupId, NatGatewayId, PortId, Snapshot};

use super::{Core, Guest};
use crate::imds::Subjects;
use crate::imds::tree::{Interface, MappedDisk, Subject};
use crate::object::Id;

/// Numbers for what the packet path does not know by name. A number is not
/// used twice while the card runs.
#[derive(Default)]
pub struct Numbers {
    ports: Series<Id>,
    nat_gateways: Series<Id>,
    /// Of instances, which share what their type allows.
    allowances: Series<Id>,
    groups: Series<String>,
}

/// Numbers for one kind of names, from 1.
struct Series<K> {
    numbers: BTreeMap<K, u32>,
    given: u32,
}

impl<K> Default for Series<K> {
    fn default() -> Self {
        Self { numbers: BTreeMap::new(), given: 0 }
    }
}

impl<K: Ord> Series<K> {
    fn number<Q: Ord + ToOwned<Owned = K> + ?Sized>(&mut self, name: &Q) -> u32
    where
        K: Borrow<Q>,
    {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        self.given = self.given.wrapping_add(1);
        self.numbers.insert(name.to_owned(), self.given);
        self.given
    }
}

impl Numbers {
    pub fn port(&mut self, id: &Id) -> PortId {
        PortId(self.ports.number(id))
    }

    pub fn port_forget(&mut self, id: &Id) {
        self.ports.numbers.remove(id);
    }

    pub fn nat_gateway_forget(&mut self, id: &Id) {
        self.nat_gateways.numbers.remove(id);
    }
}

impl Core {
    pub(super) fn snapshot(&mut self) -> Snapshot {
        let numbers = &mut self.numbers;
        let mut used = HashSet::new();
        let mut snapshot = Snapshot::default();
        let Numbers { groups, allowances, .. } = numbers;
        let mut group = |name: &str| {
            let number = groups.number(name);
            used.insert(number);
            GroupId(number)
        };
        let wanted = || self.ports.iter().filter(|(_, port)| port.deleted.is_none());
        for (id, port) in wanted() {
            let allowance = AllowanceId(allowances.number(&port.spec.instance_id));
            snapshot.ports.push(port.spec.config(PortId(numbers.ports.number(id)), allowance, &mut group));
        }
        for network in self.networks.values() {
            snapshot.networks.push(network.config(&mut group));
        }
        for (id, gateway) in &self.nat_gateways {
            snapshot.nat_gateways.push(gateway.config(NatGatewayId(numbers.nat_gateways.number(id))));
        }
        groups.numbers.retain(|_, number| used.contains(number));
        let instances: HashSet<&Id> = wanted().map(|(_, port)| &port.spec.instance_id).collect();
        allowances.numbers.retain(|id, _| instances.contains(id));
        snapshot
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
                    secondary: port.secondary.clone(),
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
