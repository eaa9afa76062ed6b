//! Which number of the packet path stands for which object: what operators read
//! instead of numbers. It knows ids and addresses, and no packets.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;

use dataplane::{GroupId, PortId, Vni};

use crate::object::Id;

/// A port, as operators name it and as its packets do.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names say it
pub struct PortName {
    pub id: Id,
    pub instance_id: Id,
    pub vni: Vni,
    pub ipv4: Ipv4Addr,
    pub public_ipv4: Option<Ipv4Addr>,
}

/// All names of one configuration of the packet path.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// The ports.
    pub ports: BTreeMap<PortId, PortName>,
    /// The security groups that rules name: `sg-...`.
    pub groups: HashMap<GroupId, String>,
}

impl Names {
    /// The name of a port; its number while it has none, as when it is just gone.
    #[must_use]
    pub fn port(&self, number: PortId) -> String {
        self.ports.get(&number).map_or_else(|| format!("port-{}", number.0), |port| port.id.to_string())
    }

    /// The number of a port.
    #[must_use]
    pub fn number(&self, id: &Id) -> Option<PortId> {
        self.ports.iter().find(|(_, port)| port.id == *id).map(|(number, _)| *number)
    }

    /// The name of a group; empty when no rule names it any more.
    #[must_use]
    pub fn group(&self, number: GroupId) -> String {
        self.groups.get(&number).cloned().unwrap_or_default()
    }
}
