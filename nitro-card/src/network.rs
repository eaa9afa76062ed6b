//! A VPC as one card needs it: where its addresses are, and who is in its groups.

use std::net::Ipv4Addr;

use dataplane::{GroupId, Mapping, NetworkConfig, ResolverConfig, Vni};

use crate::object::Id;

/// A desired network.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names say it
pub struct Network {
    pub id: Id,
    pub generation: u64,
    pub vni: Vni,
    pub mappings: Vec<Mapping>,
    pub groups: Vec<(String, Vec<Ipv4Addr>)>,
    pub peers: Vec<Vni>,
    pub resolver: Option<ResolverConfig>,
}

impl Network {
    /// The network as the packet path takes it; `group` numbers security groups.
    pub fn config(&self, group: &mut dyn FnMut(&str) -> GroupId) -> NetworkConfig {
        let groups = self.groups.iter().map(|(name, members)| (group(name), members.clone())).collect();
        NetworkConfig { vni: self.vni, mappings: self.mappings.clone(), groups, peers: self.peers.clone(), resolver: self.resolver.clone() }
    }
}
