//! What a card is told of VPCs: where their ports are, who is in which group, how their subnets route and filter.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use card_proto::card;
use ipnet::{IpNet, Ipv4Net};

use super::{ALL_PROTOCOLS, is_leaving, prefix, wants_gateway, wants_machine};
use crate::model::{
    Card, Instance, NatGateway, NetworkAclEntry, NetworkInterface, PeeringSide, REGION, Route, RouteTable, RouteTarget, SecurityGroup,
    Subnet, Vpc, VpcPeeringConnection,
};
use crate::resource::{address, nat_gateway, network_acl, network_acl_entry, network_interface, route_table, vpc_peering_connection};
use crate::world::{Region, Tx};

/// The ports of a VPC, which all its cards are told of alike.
#[derive(Default)]
struct Ports {
    mappings: Vec<card::Mapping>,
    /// The private addresses of the members of each group.
    members: BTreeMap<String, BTreeSet<u32>>,
}

/// The ports of VPCs, each looked up once for all cards of a step. Good as long as no row changes.
#[derive(Default)]
pub(in crate::reconcile) struct Networks(HashMap<String, Rc<Ports>>);

impl Networks {
    fn ports(&mut self, tx: &Tx<'_>, vpc: &Vpc) -> Rc<Ports> {
        self.0.entry(vpc.id.clone()).or_insert_with(|| Rc::new(ports(tx, vpc))).clone()
    }

    /// The members of a group of this VPC or of one that it is peered with; nobody, for any other.
    fn members(&mut self, tx: &Tx<'_>, vpc: &Vpc, peers: &[PeeringSide], group: &str) -> Vec<u32> {
        let own = std::iter::once((vpc.account_id.as_str(), vpc.id.as_str()));
        let theirs = peers.iter().map(|side| (side.account_id.as_str(), side.vpc_id.as_str()));
        for (account, vpc_id) in own.chain(theirs) {
            if tx.get::<SecurityGroup>(account, group).is_some_and(|row| row.vpc_id == vpc_id)
                && let Some(vpc) = tx.get::<Vpc>(account, vpc_id)
            {
                return self.ports(tx, &vpc).members.get(group).into_iter().flatten().copied().collect();
            }
        }
        Vec::new()
    }

    /// A VPC that has a port or a gateway on the card, whose rules name `groups`.
    pub(super) fn own(&mut self, tx: &Tx<'_>, region: &Region, vpc: &Vpc, groups: BTreeSet<String>) -> card::Network {
        let peers = peers(tx, &vpc.id);
        let member = |id: String| {
            let members = self.members(tx, vpc, &peers, &id);
            card::Group { id, members }
        };
        let groups = groups.into_iter().map(member).collect();
        let mut vnis: Vec<u32> =
            peers.iter().filter_map(|side| tx.get::<Vpc>(&side.account_id, &side.vpc_id)).map(|peer| peer.vni.0).collect();
        vnis.sort_unstable();
        card::Network { groups, peers: vnis, resolver: resolver(region, vpc), ..self.peer(tx, vpc) }
    }

    /// A VPC that the card knows only because one of its own is peered with it.
    pub(super) fn peer(&mut self, tx: &Tx<'_>, vpc: &Vpc) -> card::Network {
        let mappings = self.ports(tx, vpc).mappings.clone();
        card::Network { id: vpc.id.clone(), vni: vpc.vni.0, mappings, ..card::Network::default() }
    }
}

/// The other sides of the active peering connections of a VPC.
pub(super) fn peers(tx: &Tx<'_>, vpc_id: &str) -> Vec<PeeringSide> {
    let rows = vpc_peering_connection::active(tx, vpc_id);
    rows.iter().map(|row| vpc_peering_connection::other(row, vpc_id).clone()).collect()
}

fn ports(tx: &Tx<'_>, vpc: &Vpc) -> Ports {
    let mut ports = Ports::default();
    for interface in tx.find::<NetworkInterface>(&vpc.account_id, "vpc", &vpc.id) {
        let Some((card_id, forwards)) = place(tx, &interface) else { continue };
        let Some(underlay) = tx.get::<Card>(REGION, &card_id).map(|card| card.underlay_ip) else { continue };
        // A card without an underlay has only neighbours on itself, which it finds without a mapping.
        if underlay.is_unspecified() {
            continue;
        }
        // Of a gateway only the address that routes lead to is anybody's neighbour.
        let secondary = interface.secondary_ips.iter().copied().filter(|_| interface.attachment.is_some());
        for private_ip in std::iter::once(interface.private_ip).chain(secondary) {
            ports.mappings.push(card::Mapping {
                private_ipv4: private_ip.into(),
                mac: interface.mac.0.to_vec(),
                underlay_ipv4: underlay.into(),
                forwards,
                public_ipv4: address::public_ip_of(tx, &interface, private_ip).map_or(0, u32::from),
            });
            for group in &interface.security_group_ids {
                ports.members.entry(group.clone()).or_default().insert(private_ip.into());
            }
        }
    }
    ports.mappings.sort_by_key(|mapping| mapping.private_ipv4);
    ports
}

/// The card that an interface is on, and whether that is believed for any source. A NAT gateway's is believed for the internet as far
/// as routes lead there through it, which cards see for themselves.
fn place(tx: &Tx<'_>, interface: &NetworkInterface) -> Option<(String, bool)> {
    let account = interface.account_id.as_str();
    if let Some(attachment) = interface.attachment.as_ref() {
        if is_leaving(interface) {
            return None;
        }
        let owner = tx.get::<Instance>(account, &attachment.instance_id).filter(|owner| wants_machine(owner))?;
        return Some((owner.placement.as_ref()?.card_id.clone(), !interface.source_dest_check));
    }
    let gateway = nat_gateway::of_interface(tx, account, &interface.id).filter(|gateway| wants_gateway(gateway))?;
    Some((gateway.card_id.clone()?, false))
}

/// The VPC's own name server, if it wants one.
fn resolver(region: &Region, vpc: &Vpc) -> Option<card::Resolver> {
    vpc.dns_support.then(|| card::Resolver {
        domain: network_interface::private_domain(region),
        hostnames: vpc.dns_hostnames,
        public_domain: network_interface::public_domain(region),
    })
}

/// The routes of a subnet without the local ones; a target that is not there any more is a black hole.
pub(super) fn routes(tx: &Tx<'_>, subnet: &Subnet) -> Vec<card::Route> {
    let Some(table) = route_table::of_subnet(tx, subnet) else { return Vec::new() };
    let route = |route: &Route| {
        let target = target(tx, &table, route).unwrap_or(card::route::Target::Blackhole(true));
        card::Route { destination: Some(prefix(route.destination)), target: Some(target) }
    };
    let mut routes: Vec<_> = route_table::expanded(tx, &table).iter().map(route).collect();
    routes.sort_by_cached_key(prost::Message::encode_to_vec);
    routes
}

fn target(tx: &Tx<'_>, table: &RouteTable, route: &Route) -> Option<card::route::Target> {
    if !route_table::is_active(tx, table, route) {
        return None;
    }
    let interface = |id: &str| tx.get::<NetworkInterface>(&table.account_id, id).map(|interface| u32::from(interface.private_ip));
    match &route.target {
        RouteTarget::InternetGateway(_) => Some(card::route::Target::InternetGateway(true)),
        RouteTarget::NetworkInterface(id) => interface(id).map(card::route::Target::NetworkInterface),
        RouteTarget::NatGateway(id) => {
            let gateway = tx.get::<NatGateway>(&table.account_id, id)?;
            interface(gateway.network_interface_id.as_deref()?).map(card::route::Target::NatGateway)
        }
        RouteTarget::VpcPeeringConnection(id) => {
            let connection = tx.get::<VpcPeeringConnection>(REGION, id)?;
            let side = vpc_peering_connection::other(&connection, &table.vpc_id);
            tx.get::<Vpc>(&side.account_id, &side.vpc_id).map(|peer| card::route::Target::PeerVni(peer.vni.0))
        }
    }
}

/// The network ACL of a subnet. The final denial is what a card does without being told, and of IPv6 it knows nothing.
pub(super) fn acl(tx: &Tx<'_>, subnet: &Subnet) -> Option<card::Acl> {
    let acl = network_acl::of_subnet(tx, subnet)?;
    let side = |egress: bool| {
        let mut entries: Vec<(&NetworkAclEntry, Ipv4Net)> = acl
            .entries
            .iter()
            .filter_map(|entry| match entry.cidr {
                IpNet::V4(cidr) if entry.egress == egress && entry.number < network_acl_entry::LAST => Some((entry, cidr)),
                _ => None,
            })
            .collect();
        entries.sort_by_key(|(entry, _)| entry.number);
        entries.into_iter().map(|(entry, cidr)| acl_rule(entry, cidr)).collect()
    };
    Some(card::Acl { ingress: side(false), egress: side(true) })
}

fn acl_rule(entry: &NetworkAclEntry, cidr: Ipv4Net) -> card::AclRule {
    let ports = entry.ports.map(|(from, to)| (i32::from(from), i32::from(to)));
    let icmp = entry.icmp.map(|(kind, code)| (i32::from(kind), i32::from(code)));
    let (from_port, to_port) = ports.or(icmp).unwrap_or((-1, -1));
    let protocol = entry.protocol.map_or(ALL_PROTOCOLS, u32::from);
    card::AclRule { allow: entry.allow, protocol, from_port, to_port, remote: Some(prefix(cidr)) }
}
