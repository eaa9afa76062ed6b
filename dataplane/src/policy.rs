//! What a flow miss asks: may this connection be, and where does it go.
//!
//! Order, from the guest: anti-spoof (the pipeline checks that on every packet),
//! security group, route, address translation. To the guest: anti-spoof, security
//! group. A [`Snapshot`] is compiled off the worker's thread into [`Tables`], and
//! whatever did not change keeps its `Arc`, by which the worker sees what did.
//!
//! Every function here tells its [`Witness`] what it looked at: nobody, for a packet
//! that is there, and whoever explains, for one that might come.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use foldhash::fast::FixedState;

use crate::action::Egress;
use crate::counters::DropReason;
use crate::explain::{Seen, Witness};
use crate::flow::{Direction, Slot};
use crate::headers::{Ipv4, Transport};
use crate::route::{self, Target};
use crate::{GroupId, Mac, NetworkConfig, PortConfig, Snapshot, Vni, security_group};

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
    fn new(config: &NetworkConfig) -> Self {
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

    /// Whether an address is a member of a group.
    #[must_use]
    pub fn is_member(&self, group: GroupId, address: Ipv4Addr) -> bool {
        self.groups.get(&group).is_some_and(|members| members.contains(&address))
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
            let port = same.map_or_else(
                || Arc::new(Port { config: config.clone(), router: config.subnet.nth(1), network: Arc::clone(network) }),
                |port| Arc::clone(port),
            );
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
pub fn egress(
    port: &Port,
    slot: Slot,
    ip: &Ipv4,
    transport: &Transport,
    (locals, card): (&Locals, Ipv4Addr),
    witness: &mut impl Witness,
) -> Result<Egress, DropReason> {
    let rules = &port.config.egress;
    let matched = security_group::allowing(rules, &port.network, ip.destination, ip, transport);
    witness.saw(Seen::Group { direction: Direction::Egress, rules: rules.len(), matched: matched.copied() });
    matched.ok_or(DropReason::DeniedEgress)?;
    next_hop(port, slot, ip.destination, (locals, card), witness)
}

/// Decides on a connection that somebody opens to the guest of `port`.
///
/// # Errors
/// [`DropReason::DeniedIngress`].
pub fn ingress(port: &Port, ip: &Ipv4, transport: &Transport, witness: &mut impl Witness) -> Result<(), DropReason> {
    let rules = &port.config.ingress;
    let matched = security_group::allowing(rules, &port.network, ip.source, ip, transport);
    witness.saw(Seen::Group { direction: Direction::Ingress, rules: rules.len(), matched: matched.copied() });
    matched.map(drop).ok_or(DropReason::DeniedIngress)
}

/// Where packets of `port` to `destination` go; `card` is this card's VTEP.
///
/// # Errors
/// Those of [`route::lookup`], [`DropReason::NoMapping`] and
/// [`DropReason::NoPublicAddress`].
pub fn next_hop(
    port: &Port,
    slot: Slot,
    destination: Ipv4Addr,
    (locals, card): (&Locals, Ipv4Addr),
    witness: &mut impl Witness,
) -> Result<Egress, DropReason> {
    let config = &port.config;
    match route::lookup(config, destination, witness)? {
        Target::Internet => match config.public {
            Some(address) => Ok(Egress::Public { address }),
            None => Err(DropReason::NoPublicAddress),
        },
        Target::Vpc => {
            let routed = !config.subnet.contains(destination);
            let way = match locals.by_address.get(&(config.vni, destination)) {
                Some(to) => (*to != slot).then_some(Egress::Local { to: *to, routed }),
                None => match port.network.endpoint(destination) {
                    Some(Endpoint { mac, vtep }) if *vtep != card => Some(Egress::Remote { vtep: *vtep, mac: *mac, routed }),
                    _ => None,
                },
            };
            witness.saw(Seen::Mapping { address: destination, way });
            way.ok_or(DropReason::NoMapping)
        }
    }
}
