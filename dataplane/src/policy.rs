//! What a flow miss asks: may this connection be, and where does it go.
//!
//! Order, from the guest: anti-spoof (the pipeline checks that on every packet),
//! security group, network ACL, route, address translation. To the guest:
//! anti-spoof, network ACL, security group. The security group of a tracked
//! connection is asked once, when that is opened; all else again when the port's
//! configuration changed, and then it cuts what it does not allow any more. A [`Snapshot`] is compiled off the worker's thread into [`Tables`], and
//! whatever did not change keeps its `Arc`, by which the worker sees what did.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use foldhash::fast::FixedState;

use crate::action::Egress;
use crate::counters::DropReason;
use crate::flow::{Direction, Slot};
use crate::headers::{Ipv4, Transport};
use crate::resolver::{Addresses, Resolver};
use crate::route::{RouteTable, Target};
use crate::security_group::RuleSet;
use crate::{GroupId, Mac, NatGatewayConfig, NetworkConfig, PortConfig, Prefix, Route, RouteTarget, Snapshot, Vni, acl};

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
    /// Cards with a port that forwards for others.
    forwarders: HashSet<Ipv4Addr, FixedState>,
    groups: Map<GroupId, HashSet<Ipv4Addr, FixedState>>,
    peers: Vec<Vni>,
    /// Its name server, if it has one.
    pub resolver: Option<Resolver>,
}

impl Network {
    pub(crate) fn new(config: &NetworkConfig) -> Self {
        let endpoint = |m: &crate::Mapping| (m.ip, Endpoint { mac: m.mac, vtep: m.vtep });
        Self {
            endpoints: config.mappings.iter().map(endpoint).collect(),
            forwarders: config.mappings.iter().filter(|m| m.forwards).map(|m| m.vtep).collect(),
            groups: config.groups.iter().map(|(id, members)| (*id, members.iter().copied().collect())).collect(),
            peers: config.peers.clone(),
            resolver: config.resolver.as_ref().map(|resolver| Resolver::new(resolver, &config.mappings)),
        }
    }

    /// Where an address is.
    #[must_use]
    pub fn endpoint(&self, address: Ipv4Addr) -> Option<&Endpoint> {
        self.endpoints.get(&address)
    }

    /// Whether a card has a port that forwards for others.
    #[must_use]
    pub fn is_forwarder(&self, vtep: Ipv4Addr) -> bool {
        self.forwarders.contains(&vtep)
    }

    /// The members of a group.
    pub fn members(&self, group: GroupId) -> impl Iterator<Item = Ipv4Addr> {
        self.groups.get(&group).into_iter().flatten().copied()
    }
}

/// Where a port or a NAT gateway stands in its VPC, and what it can reach from there.
#[derive(Debug)]
pub struct Site {
    /// The VPC.
    pub vni: Vni,
    /// The subnet, within which nothing is routed.
    pub subnet: Prefix,
    /// The VPC's network; empty when the snapshot has none.
    pub network: Arc<Network>,
    /// The networks of the VPCs that it is peered with.
    peers: Vec<(Vni, Arc<Network>)>,
    routes: RouteTable,
}

impl Site {
    fn new(networks: &Networks, vni: Vni, subnet: Prefix, vpc_prefixes: &[Prefix], routes: &[Route]) -> Self {
        let network = networks.get(&vni).cloned().unwrap_or_default();
        let peers = network.peers.iter().filter_map(|peer| Some((*peer, Arc::clone(networks.get(peer)?)))).collect();
        Self { vni, subnet, peers, routes: RouteTable::new(vpc_prefixes.iter().chain([&subnet]), routes), network }
    }

    /// Whether it still looks at the same networks.
    fn is_current(&self, networks: &Networks) -> bool {
        let same =
            |vni: &Vni, network: &Arc<Network>| networks.get(vni).map_or(**network == Network::default(), |now| Arc::ptr_eq(now, network));
        let resolved = self.network.peers.iter().filter(|peer| networks.contains_key(*peer)).count();
        same(&self.vni, &self.network) && resolved == self.peers.len() && self.peers.iter().all(|(vni, network)| same(vni, network))
    }

    /// The networks of the VPCs that it is peered with.
    pub fn peers(&self) -> impl Iterator<Item = &Network> {
        self.peers.iter().map(|(_, network)| &**network)
    }

    /// Where the route table leads; within the subnet it is not asked.
    #[must_use]
    pub fn target(&self, destination: Ipv4Addr) -> Option<Target> {
        if self.subnet.contains(destination) { Some(Target::Local) } else { self.routes.lookup(destination) }
    }

    /// The way to an address of the VPC, through its router unless it is in the
    /// subnet. `card` is this card's VTEP.
    #[must_use]
    pub fn way(&self, address: Ipv4Addr, locals: &Locals, card: Ipv4Addr) -> Option<Egress> {
        way(&self.network, self.vni, address, !self.subnet.contains(address), locals, card)
    }

    /// The same, through its router in any case.
    fn way_routed(&self, address: Ipv4Addr, locals: &Locals, card: Ipv4Addr) -> Option<Egress> {
        way(&self.network, self.vni, address, true, locals, card)
    }
}

fn way(network: &Network, vni: Vni, address: Ipv4Addr, routed: bool, locals: &Locals, card: Ipv4Addr) -> Option<Egress> {
    if let Some(to) = locals.by_address.get(&(vni, address)) {
        return Some(Egress::Local { to: *to, routed });
    }
    let Endpoint { mac, vtep } = network.endpoint(address)?;
    (*vtep != card).then_some(Egress::Remote { vtep: *vtep, mac: *mac, vni, routed })
}

/// A port, ready for lookups.
#[derive(Debug)]
pub struct Port {
    /// As configured.
    pub config: PortConfig,
    /// The subnet's router: its second address.
    pub router: Ipv4Addr,
    /// The second address of the VPC, if its name server is there.
    pub resolver: Option<Ipv4Addr>,
    /// Where it stands.
    pub site: Site,
    /// What may open a connection to the guest, and what it may open one to.
    pub(crate) ingress: RuleSet,
    pub(crate) egress: RuleSet,
}

impl Addresses for Port {
    fn has(&self, address: Ipv4Addr) -> bool {
        self.site.network.endpoint(address).is_some()
    }

    fn prefixes(&self) -> &[Prefix] {
        &self.config.vpc_prefixes
    }
}

/// A NAT gateway, ready for lookups.
#[derive(Debug)]
pub struct NatGateway {
    /// As configured.
    pub config: NatGatewayConfig,
    /// Where it stands.
    pub site: Site,
}

type Networks = Map<Vni, Arc<Network>>;

/// A compiled snapshot.
#[derive(Debug, Default)]
pub struct Tables {
    /// The ports.
    pub ports: Vec<Arc<Port>>,
    /// The NAT gateways.
    pub nat_gateways: Vec<Arc<NatGateway>>,
    /// The networks, also those without a port here.
    pub(crate) networks: Networks,
}

impl Tables {
    /// Compiles a snapshot, sharing with `previous` what is equal. Of two ports or
    /// gateways with one id, or two networks with one VNI, the later counts.
    #[must_use]
    pub fn compile(snapshot: &Snapshot, previous: &Tables) -> Tables {
        let mut networks = Networks::default();
        for config in &snapshot.networks {
            let network = Network::new(config);
            let same = previous.networks.get(&config.vni).filter(|before| ***before == network);
            networks.insert(config.vni, same.map_or_else(|| Arc::new(network), Arc::clone));
        }
        let before: Map<_, _> = previous.ports.iter().map(|port| (port.config.id, port)).collect();
        let mut ports: Map<_, _> = Map::default();
        for config in &snapshot.ports {
            let same = before.get(&config.id).filter(|port| port.config == *config && port.site.is_current(&networks));
            let port = same.map_or_else(|| Arc::new(Port::new(config, &networks)), |port| Arc::clone(port));
            ports.insert(config.id, port);
        }
        let mut ports: Vec<_> = ports.into_values().collect();
        ports.sort_by_key(|port| port.config.id);
        let before: Map<_, _> = previous.nat_gateways.iter().map(|gateway| (gateway.config.id, gateway)).collect();
        let mut gateways: Map<_, _> = Map::default();
        for config in &snapshot.nat_gateways {
            let same = before.get(&config.id).filter(|gateway| gateway.config == *config && gateway.site.is_current(&networks));
            let gateway = same.map_or_else(|| Arc::new(NatGateway::new(config, &networks)), |gateway| Arc::clone(gateway));
            gateways.insert(config.id, gateway);
        }
        let mut nat_gateways: Vec<_> = gateways.into_values().collect();
        nat_gateways.sort_by_key(|gateway| gateway.config.id);
        Tables { ports, nat_gateways, networks }
    }
}

impl Port {
    fn new(config: &PortConfig, networks: &Networks) -> Self {
        let site = Site::new(networks, config.vni, config.subnet, &config.vpc_prefixes, &config.routes);
        let first = config.vpc_prefixes.first().unwrap_or(&config.subnet);
        let resolver = site.network.resolver.is_some().then(|| first.nth(2));
        Self {
            router: config.subnet.nth(1),
            resolver,
            ingress: RuleSet::compile(&config.ingress, &site.network),
            egress: RuleSet::compile(&config.egress, &site.network),
            site,
            config: config.clone(),
        }
    }
}

impl NatGateway {
    fn new(config: &NatGatewayConfig, networks: &Networks) -> Self {
        let site = Site::new(networks, config.vni, config.subnet, &config.vpc_prefixes, &config.routes);
        Self { config: config.clone(), site }
    }
}

/// Index of a NAT gateway in the pipeline's table of gateways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GatewaySlot(pub u32);

/// Ports and NAT gateways of this card by what packets name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Locals {
    pub(crate) by_address: Map<(Vni, Ipv4Addr), Slot>,
    pub(crate) by_mac: Map<(Vni, Mac), Local>,
    /// A port by its public address, and the private one that this stands for.
    pub(crate) by_public: Map<Ipv4Addr, (Slot, Ipv4Addr)>,
    pub(crate) gateways: Map<(Vni, Ipv4Addr), GatewaySlot>,
    pub(crate) gateways_by_public: Map<Ipv4Addr, GatewaySlot>,
}

/// What stands behind a MAC of a VPC on this card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Local {
    Port(Slot),
    Gateway(GatewaySlot),
}

impl Locals {
    /// Whether the card answers for a public address.
    pub(crate) fn is_public(&self, address: Ipv4Addr) -> bool {
        self.by_public.contains_key(&address) || self.gateways_by_public.contains_key(&address)
    }

    pub(crate) fn public_addresses(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        self.by_public.keys().chain(self.gateways_by_public.keys()).copied()
    }
}

/// How a connection is remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracking {
    /// It goes on to its end, whatever becomes of the rule that let it in.
    Tracked,
    /// Both directions pass by rules for everybody, so nothing need be remembered:
    /// when a rule goes, so does what it let through.
    Untracked,
    /// The rules do not let anybody open it.
    Denied,
}

/// How EC2 remembers a connection of `port` with `remote` that goes in the direction
/// `opener` with its first packet. TCP and UDP are not tracked where the rule that
/// permits them is for any address and a rule of the other direction is for any
/// address and all ports; but through a NAT gateway everything is.
#[must_use]
pub fn tracking(port: &Port, opener: Direction, ip: &Ipv4, transport: &Transport) -> Tracking {
    let (there, back, remote) = match opener {
        Direction::Egress => (&port.egress, &port.ingress, ip.destination),
        Direction::Ingress => (&port.ingress, &port.egress, ip.source),
    };
    if !there.allows(remote, ip, transport) {
        return Tracking::Denied;
    }
    // Of TCP and UDP alone a rule set says that all of it passes.
    let for_everybody = back.allows_all(ip.protocol) && there.allows_anybody(ip, transport);
    let by_nat_gateway = || matches!(port.site.target(remote), Some(Target::Route(RouteTarget::NatGateway(_))));
    if for_everybody && !by_nat_gateway() { Tracking::Untracked } else { Tracking::Tracked }
}

/// Whether all that [`tracking`] lets open a connection at `port`, with this protocol
/// and in this direction, is tracked.
#[must_use]
pub fn tracks_all(port: &Port, opener: Direction, protocol: u8) -> bool {
    let (there, back) = match opener {
        Direction::Egress => (&port.egress, &port.ingress),
        Direction::Ingress => (&port.ingress, &port.egress),
    };
    !(back.allows_all(protocol) && there.knows_anybody(protocol))
}

/// Decides on a packet of a connection that is open already, from the guest.
///
/// # Errors
/// [`DropReason::DeniedAclEgress`] and those of [`next_hop`].
pub fn outward(port: &Port, slot: Slot, ip: &Ipv4, transport: &Transport, locals: &Locals, card: Ipv4Addr) -> Result<Egress, DropReason> {
    if !acl::lets_out(port.config.acl.as_ref(), port.config.subnet, ip, transport) {
        return Err(DropReason::DeniedAclEgress);
    }
    next_hop(port, slot, (ip.source, ip.destination), locals, card)
}

/// Decides on a packet of a connection that is open already, to the guest; who
/// sent it was checked.
///
/// # Errors
/// [`DropReason::NotOwnDestination`], [`DropReason::DeniedAclIngress`].
pub fn inward(port: &Port, ip: &Ipv4, transport: &Transport) -> Result<(), DropReason> {
    if port.config.source_dest_check && !port.config.owns(ip.destination) {
        return Err(DropReason::NotOwnDestination);
    }
    if !acl::lets_in(port.config.acl.as_ref(), port.config.subnet, ip, transport) {
        return Err(DropReason::DeniedAclIngress);
    }
    Ok(())
}

/// Where packets of `port` go, by source and destination; `card` is this card's VTEP.
///
/// # Errors
/// [`DropReason::NoRoute`], [`DropReason::Blackhole`] also for a target that is
/// not there, [`DropReason::NoMapping`], [`DropReason::NoPublicAddress`], and
/// [`DropReason::SpoofedAddress`] for what would pass through a VPC to its peer.
pub fn next_hop(
    port: &Port,
    slot: Slot,
    (source, destination): (Ipv4Addr, Ipv4Addr),
    locals: &Locals,
    card: Ipv4Addr,
) -> Result<Egress, DropReason> {
    let site = &port.site;
    let not_itself = |way: &Egress| !matches!(way, Egress::Local { to, .. } if *to == slot);
    let way = match site.target(destination).ok_or(DropReason::NoRoute)? {
        Target::Local => return site.way(destination, locals, card).filter(not_itself).ok_or(DropReason::NoMapping),
        Target::Route(RouteTarget::InternetGateway) => {
            return port.config.public_of(source).map(|address| Egress::Public { address }).ok_or(DropReason::NoPublicAddress);
        }
        Target::Route(RouteTarget::Peer(vni)) => {
            // Who forwards for others, or another VPC, does not get through to a peer.
            if !port.config.owns(source) {
                return Err(DropReason::SpoofedAddress);
            }
            let (_, peer) = site.peers.iter().find(|(peer, _)| *peer == vni).ok_or(DropReason::Blackhole)?;
            return way(peer, vni, destination, true, locals, card).ok_or(DropReason::NoMapping);
        }
        Target::Route(RouteTarget::NatGateway(address)) => match locals.gateways.get(&(site.vni, address)) {
            Some(to) => Some(Egress::Gateway { to: *to }),
            None => site.way_routed(address, locals, card).filter(|way| matches!(way, Egress::Remote { .. })),
        },
        Target::Route(RouteTarget::NetworkInterface(address)) => site.way_routed(address, locals, card).filter(not_itself),
        Target::Route(RouteTarget::Blackhole) => None,
    };
    way.ok_or(DropReason::Blackhole)
}
