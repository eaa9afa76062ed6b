//! An elastic network interface of a guest.

use std::net::Ipv4Addr;

use card_proto::host::{self, Net, function};
use dataplane::{
    Acl, Address, AllowanceConfig, AllowanceId, ConnectionTracking, Dhcp, GroupId, Limits, Mac, PortConfig, PortId, Prefix, Protocol,
    Route, Vni,
};

use crate::object::Id;

/// A desired port.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names say it
pub struct Port {
    pub id: Id,
    pub generation: u64,
    pub instance_id: Id,
    pub device_index: u32,
    pub vpc_id: String,
    pub subnet_id: String,
    pub vni: Vni,
    pub mac: Mac,
    pub private_ipv4: Ipv4Addr,
    pub subnet: Prefix,
    pub vpc_prefixes: Vec<Prefix>,
    pub public_ipv4: Option<Ipv4Addr>,
    /// Further addresses, each with its public one.
    pub secondary: Vec<Address>,
    pub source_dest_check: bool,
    /// Largest IP packet in bytes.
    pub mtu: u16,
    pub ingress: Vec<Rule>,
    pub egress: Vec<Rule>,
    /// Of its subnet.
    pub acl: Option<Acl>,
    pub tracking: ConnectionTracking,
    /// Of its instance.
    pub limits: Option<Limits>,
    pub routes: Vec<Route>,
    pub security_group_ids: Vec<String>,
    pub dhcp: Dhcp,
}

/// An allow rule as control writes it: groups have names, not yet numbers.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // as in `dataplane::Rule`
pub struct Rule {
    pub protocol: Protocol,
    pub ports: Option<(u16, u16)>,
    pub icmp: (Option<u8>, Option<u8>),
    pub remote: Remote,
}

/// The other end that a rule names.
#[derive(Clone, Debug, PartialEq)]
pub enum Remote {
    /// Any address of the prefix.
    Prefix(Prefix),
    /// The members of a security group.
    Group(String),
}

impl Port {
    /// The port as the packet path takes it; `allowance` is its instance's number
    /// there, and `group` numbers security groups.
    pub fn config(&self, id: PortId, allowance: AllowanceId, group: &mut dyn FnMut(&str) -> GroupId) -> PortConfig {
        let mut rules = |rules: &[Rule]| rules.iter().map(|rule| rule.number(group)).collect();
        PortConfig {
            id,
            vni: self.vni,
            mac: self.mac,
            ipv4: self.private_ipv4,
            secondary: self.secondary.clone(),
            subnet: self.subnet,
            vpc_prefixes: self.vpc_prefixes.clone(),
            public: self.public_ipv4,
            source_dest_check: self.source_dest_check,
            mtu: self.mtu,
            ingress: rules(&self.ingress),
            egress: rules(&self.egress),
            acl: self.acl.clone(),
            tracking: self.tracking,
            allowance: self.limits.map(|limits| AllowanceConfig { id: allowance, limits }),
            routes: self.routes.clone(),
            dhcp: self.dhcp.clone(),
            generation: self.generation,
        }
    }

    /// The PCI function that the host plugs into the machine.
    #[must_use]
    pub fn function(&self) -> host::Function {
        let net = Net { mac: self.mac.0.to_vec(), mtu: self.mtu.into() };
        host::Function { id: self.id.to_string(), socket: socket_name(&self.id), kind: Some(function::Kind::Net(net)) }
    }
}

impl Rule {
    fn number(&self, group: &mut dyn FnMut(&str) -> GroupId) -> dataplane::Rule {
        let remote = match &self.remote {
            Remote::Prefix(prefix) => dataplane::Remote::Prefix(*prefix),
            Remote::Group(name) => dataplane::Remote::Group(group(name)),
        };
        dataplane::Rule { protocol: self.protocol, ports: self.ports, icmp: self.icmp, remote }
    }
}

/// Name of a function's socket in the link folder.
#[must_use]
pub fn socket_name(id: &Id) -> String {
    format!("{id}.sock")
}
