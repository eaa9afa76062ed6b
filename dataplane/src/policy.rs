//! What a flow miss asks: may this connection be, and where does it go.
//!
//! Order, from the guest: anti-spoof (the pipeline checks that on every packet),
//! security group, route, address translation. To the guest: anti-spoof, security
//! group. A [`Snapshot`] is compiled off the worker's thread into [`Tables`], and
//! whatever did not change keeps its `Arc`, by which the worker sees what did.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use foldhash::fast::FixedState;

use crate::action::Egress;
use crate::counters::DropReason;
use crate::flow::Slot;
use crate::headers::{Ipv4, Transport};
use crate::route::{self, Target};
use crate::security_group::Classifier;
use crate::{GroupId, Mac, NetworkConfig, PortConfig, Snapshot, Vni};

/// A hash map whose iteration order depends on nothing but its content. Its keys
/// come from the control plane, so they need no secret.
pub(crate) type Map<K, V> = hashbrown::HashMap<K, V, FixedState>;

/// Where an address of a network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// MAC of its port.
    pub mac: Mac,
    /// Its card.
    pub vtep: Ipv4Addr,
}

/// A network, ready for lookups.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Network {
    endpoints: Map<Ipv4Addr, Endpoint>,
    groups: Map<GroupId, HashSet<Ipv4Addr, FixedState>>,
}

impl Network {
    pub(crate) fn new(config: &NetworkConfig) -> Self {
        Self {
            endpoints: config.mappings.iter().map(|m| (m.ip, Endpoint { mac: m.mac, vtep: m.vtep })).collect(),
            groups: config.groups.iter().map(|(id, members)| (*id, members.iter().copied().collect())).collect(),
        }
    }

    /// Where an address is.
    #[must_use]
    pub fn endpoint(&self, address: Ipv4Addr) -> Option<&Endpoint> {
        self.endpoints.get(&address)
    }

    /// The members of a group.
    pub fn members(&self, group: GroupId) -> impl Iterator<Item = Ipv4Addr> {
        self.groups.get(&group).into_iter().flatten().copied()
    }
}

/// A port, ready for lookups.
#[derive(Debug)]
pub struct Port {
    /// As configured.
    pub config: PortConfig,
    /// The subnet's router: its second address.
    pub router: Ipv4Addr,
    /// The port's network; empty when the snapshot has none.
    pub network: Arc<Network>,
    /// What may open a connection to the guest, and what it may open one to.
    pub(crate) ingress: Classifier,
    pub(crate) egress: Classifier,
}

impl Port {
    fn new(config: &PortConfig, network: &Arc<Network>) -> Self {
        Self {
            router: config.subnet.nth(1),
            ingress: Classifier::compile(&config.ingress, network),
            egress: Classifier::compile(&config.egress, network),
            network: Arc::clone(network),
            config: config.clone(),
        }
    }
}

/// A compiled snapshot.
#[derive(Debug, Default)]
pub struct Tables {
    /// The ports.
    pub ports: Vec<Arc<Port>>,
    /// The networks, also those without a port here.
    pub(crate) networks: Map<Vni, Arc<Network>>,
}

impl Tables {
    /// Compiles a snapshot, sharing with `previous` what is equal. Of two ports
    /// with one id, or two networks with one VNI, the later counts.
    #[must_use]
    pub fn compile(snapshot: &Snapshot, previous: &Tables) -> Tables {
        let mut networks: Map<Vni, Arc<Network>> = Map::default();
        for config in &snapshot.networks {
            let network = Network::new(config);
            let same = previous.networks.get(&config.vni).filter(|before| ***before == network);
            networks.insert(config.vni, same.map_or_else(|| Arc::new(network), Arc::clone));
        }
        let empty = Arc::new(Network::default());
        let before: Map<_, _> = previous.ports.iter().map(|port| (port.config.id, port)).collect();
        let mut ports: Map<_, _> = Map::default();
        for config in &snapshot.ports {
            let network = networks.get(&config.vni).unwrap_or(&empty);
            let same = before
                .get(&config.id)
                .filter(|port| port.config == *config && (Arc::ptr_eq(&port.network, network) || *port.network == **network));
            let port = same.map_or_else(|| Arc::new(Port::new(config, network)), |port| Arc::clone(port));
            ports.insert(config.id, port);
        }
        let mut ports: Vec<_> = ports.into_values().collect();
        ports.sort_by_key(|port| port.config.id);
        Tables { ports, networks }
    }
}

/// Ports of this card by what packets name.
#[derive(Debug, Default)]
pub struct Locals {
    pub(crate) by_address: Map<(Vni, Ipv4Addr), Slot>,
    pub(crate) by_public: Map<Ipv4Addr, Slot>,
}

/// Decides on a connection that the guest of `port` opens.
///
/// # Errors
/// [`DropReason::DeniedEgress`] and those of [`next_hop`].
pub fn egress(port: &Port, slot: Slot, ip: &Ipv4, transport: &Transport, locals: &Locals, card: Ipv4Addr) -> Result<Egress, DropReason> {
    if !port.egress.allows(ip.destination, ip, transport) {
        return Err(DropReason::DeniedEgress);
    }
    next_hop(port, slot, ip.destination, locals, card)
}

/// Decides on a connection that somebody opens to the guest of `port`.
///
/// # Errors
/// [`DropReason::DeniedIngress`].
pub fn ingress(port: &Port, ip: &Ipv4, transport: &Transport) -> Result<(), DropReason> {
    if port.ingress.allows(ip.source, ip, transport) { Ok(()) } else { Err(DropReason::DeniedIngress) }
}

/// Where packets of `port` to `destination` go; `card` is this card's VTEP.
///
/// # Errors
/// Those of [`route::lookup`], [`DropReason::NoMapping`] and
/// [`DropReason::NoPublicAddress`].
pub fn next_hop(port: &Port, slot: Slot, destination: Ipv4Addr, locals: &Locals, card: Ipv4Addr) -> Result<Egress, DropReason> {
    let config = &port.config;
    match route::lookup(config, destination)? {
        Target::Internet => match config.public {
            Some(address) => Ok(Egress::Public { address }),
            None => Err(DropReason::NoPublicAddress),
        },
        Target::Vpc => {
            let routed = !config.subnet.contains(destination);
            if let Some(to) = locals.by_address.get(&(config.vni, destination)) {
                return if *to == slot { Err(DropReason::NoMapping) } else { Ok(Egress::Local { to: *to, routed }) };
            }
            match port.network.endpoint(destination) {
                Some(Endpoint { mac, vtep }) if *vtep != card => Ok(Egress::Remote { vtep: *vtep, mac: *mac, routed }),
                _ => Err(DropReason::NoMapping),
            }
        }
    }
}
