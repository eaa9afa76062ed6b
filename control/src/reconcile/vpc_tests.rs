//! What cards are told of VPCs: filters, routes, gateways, peers, names; and which cards.

use card_proto::card;

use super::testbed::{ALICE, BOB, CARD_A, CARD_A2, CARD_B, Testbed, dice, request};
use super::{LOST_MS, Object};
use crate::model::{CardObject, NatGateway, NatGatewayState, NetworkAcl, NetworkInterface, ObjectKind, RouteTable, Subnet, Vpc};
use crate::resource::address::allocate_address;
use crate::resource::instance::{run_instances, stop_instances, terminate_instances};
use crate::resource::nat_gateway::{
    associate_nat_gateway_address, create_nat_gateway, delete_nat_gateway, disassociate_nat_gateway_address,
};
use crate::resource::network_acl::{create_network_acl, of_subnet, replace_network_acl_association};
use crate::resource::network_acl_entry::create_network_acl_entry;
use crate::resource::route_table::{create_route, main};
use crate::resource::security_group;
use crate::resource::security_group_rule::authorize_security_group_ingress;
use crate::resource::subnet::create_subnet;
use crate::resource::vpc::{create_vpc, modify_vpc_attribute};
use crate::resource::vpc_peering_connection::{
    accept_vpc_peering_connection, create_vpc_peering_connection, delete_vpc_peering_connection,
};
use crate::shapes::{
    AcceptVpcPeeringConnectionRequest, AssociateNatGatewayAddressRequest, AttributeBooleanValue, AuthorizeSecurityGroupIngressRequest,
    CreateNatGatewayRequest, CreateNetworkAclEntryRequest, CreateNetworkAclRequest, CreateRouteRequest, CreateSubnetRequest,
    CreateVpcPeeringConnectionRequest, CreateVpcRequest, DeleteNatGatewayRequest, DeleteVpcPeeringConnectionRequest,
    DisassociateNatGatewayAddressRequest, IpPermission, ModifyVpcAttributeRequest, PortRange, ReplaceNetworkAclAssociationRequest,
    RunInstancesRequest, StopInstancesRequest, TerminateInstancesRequest, UserIdGroupPair,
};

/// The default subnet of a zone.
fn subnet(bed: &Testbed, account: &str, zone: &str) -> Subnet {
    bed.read(|tx| Subnet::clone(tx.list::<Subnet>(account).find(|subnet| subnet.zone == zone && subnet.default_for_zone).unwrap()))
}

fn network(bed: &Testbed, card: &str, vpc_id: &str) -> Option<card::Network> {
    bed.cards[card].live(ObjectKind::Network).find_map(|object| match object {
        Object::Network(network) if network.id == vpc_id => Some(network.clone()),
        _ => None,
    })
}

fn gateway_on(bed: &Testbed, card: &str) -> Option<card::NatGateway> {
    bed.cards[card].live(ObjectKind::NatGateway).find_map(|object| match object {
        Object::NatGateway(gateway) => Some(gateway.clone()),
        _ => None,
    })
}

fn launch_in(bed: &mut Testbed, account: &str, subnet_id: &str) -> String {
    let request = RunInstancesRequest { subnet_id: Some(subnet_id.into()), placement: None, ..request("") };
    let launched = bed.call(account, |call| run_instances(call, request)).unwrap().instances.remove(0).instance_id.unwrap();
    bed.settle();
    launched
}

fn allocate(bed: &Testbed) -> String {
    bed.call(ALICE, |call| allocate_address(call, Default::default())).unwrap().allocation_id.unwrap()
}

/// A NAT gateway of Alice's in a subnet, and whether it is there.
fn gateway(bed: &mut Testbed, subnet_id: &str) -> String {
    let request = CreateNatGatewayRequest { subnet_id: Some(subnet_id.into()), allocation_id: Some(allocate(bed)), ..Default::default() };
    let id = bed.call(ALICE, |call| create_nat_gateway(call, request)).unwrap().nat_gateway.unwrap().nat_gateway_id.unwrap();
    assert_eq!(row(bed, &id).state, NatGatewayState::Pending);
    bed.settle();
    id
}

fn row(bed: &Testbed, id: &str) -> NatGateway {
    bed.read(|tx| NatGateway::clone(&tx.get::<NatGateway>(ALICE, id).unwrap()))
}

fn delete(id: &str) -> DeleteNatGatewayRequest {
    DeleteNatGatewayRequest { nat_gateway_id: Some(id.into()), dry_run: None }
}

fn route(bed: &Testbed, account: &str, vpc_id: &str, cidr: &str) -> CreateRouteRequest {
    let table = bed.read(|tx| main(tx, account, vpc_id).unwrap().id.clone());
    CreateRouteRequest { route_table_id: Some(table), destination_cidr_block: Some(cidr.into()), ..Default::default() }
}

fn target(port: &card::Port, cidr: &str) -> Option<card::route::Target> {
    let (address, length) = cidr.split_once('/').unwrap();
    let address = u32::from(address.parse::<std::net::Ipv4Addr>().unwrap());
    let destination = card::Prefix { address, length: length.parse().unwrap() };
    port.routes.iter().find(|route| route.destination == Some(destination)).and_then(|route| route.target)
}

#[test]
fn a_nat_gateway_is_available_when_its_card_says_so_and_every_card_of_the_vpc_finds_it() {
    let mut bed = Testbed::new();
    let (a, b) = (bed.running(), bed.running());
    let subnet = subnet(&bed, ALICE, "us-east-1b");
    let id = gateway(&mut bed, &subnet.id);
    let row = row(&bed, &id);
    assert_eq!((row.state, row.card_id.as_deref()), (NatGatewayState::Available, Some(CARD_B)), "a card of the subnet's zone");
    let told = gateway_on(&bed, CARD_B).unwrap();
    assert_eq!(told.private_ipv4, u32::from(row.addresses[0].private_ip.unwrap()));
    assert_eq!(told.public_ipv4, [u32::from(row.addresses[0].public_ip.unwrap())]);
    assert_eq!(told.acl, bed.cards[&bed.card_of(&a)].port(&a).acl);
    assert!(matches!(told.routes[0].target, Some(card::route::Target::InternetGateway(true))));
    assert!(bed.cards[CARD_A].live(ObjectKind::NatGateway).chain(bed.cards[CARD_A2].live(ObjectKind::NatGateway)).next().is_none());
    let mapped = |bed: &Testbed, card: &str| {
        network(bed, card, &row.vpc_id).unwrap().mappings.into_iter().find(|mapping| mapping.private_ipv4 == told.private_ipv4)
    };
    for card in [CARD_A, CARD_A2, CARD_B] {
        let mapping = mapped(&bed, card).unwrap();
        assert_eq!((mapping.underlay_ipv4, mapping.forwards), (u32::from_be_bytes([10, 255, 0, 3]), false), "{card}");
        assert_eq!(mapping.mac, told.mac);
    }
    let through = CreateRouteRequest { nat_gateway_id: Some(id.clone()), ..route(&bed, ALICE, &row.vpc_id, "198.18.0.0/15") };
    bed.call(ALICE, |call| create_route(call, through)).unwrap();
    bed.settle();
    let seen = |bed: &Testbed, instance: &str| target(&bed.cards[&bed.card_of(instance)].port(instance), "198.18.0.0/15");
    for instance in [&a, &b] {
        assert_eq!(seen(&bed, instance), Some(card::route::Target::NatGateway(told.private_ipv4)));
    }
    bed.call(ALICE, |call| delete_nat_gateway(call, delete(&id))).unwrap();
    bed.settle();
    assert_eq!(self::row(&bed, &id).state, NatGatewayState::Deleted);
    assert!(gateway_on(&bed, CARD_B).is_none());
    assert!(network(&bed, CARD_B, &row.vpc_id).is_none(), "nothing of the VPC is left there");
    assert!(mapped(&bed, CARD_A).is_none());
    assert_eq!(seen(&bed, &a), Some(card::route::Target::Blackhole(true)));
}

#[test]
fn a_nat_gateway_waits_for_a_card_and_its_end_for_the_card_that_has_it() {
    let mut bed = Testbed::new();
    bed.disconnect(CARD_B);
    bed.settle();
    let subnet = subnet(&bed, ALICE, "us-east-1b");
    let id = gateway(&mut bed, &subnet.id);
    assert_eq!((row(&bed, &id).state, row(&bed, &id).card_id), (NatGatewayState::Pending, None));
    bed.connect(CARD_B);
    bed.settle();
    assert_eq!(row(&bed, &id).state, NatGatewayState::Available);
    bed.disconnect(CARD_B);
    bed.settle();
    bed.call(ALICE, |call| delete_nat_gateway(call, delete(&id))).unwrap();
    bed.settle();
    assert_eq!(row(&bed, &id).state, NatGatewayState::Deleting, "only the card can say that it is gone");
    bed.connect(CARD_B);
    bed.settle();
    assert_eq!(row(&bed, &id).state, NatGatewayState::Deleted);
    assert_eq!(bed.read(|tx| tx.all::<CardObject>().count()), 0);
    assert_eq!(bed.read(|tx| tx.all::<NetworkInterface>().count()), 0);
}

#[test]
fn a_nat_gateway_that_is_deleted_at_any_step_leaves_nothing() {
    for steps in 0..5 {
        let mut bed = Testbed::new();
        let subnet = subnet(&bed, ALICE, "us-east-1a");
        let request = CreateNatGatewayRequest { subnet_id: Some(subnet.id), allocation_id: Some(allocate(&bed)), ..Default::default() };
        let id = bed.call(ALICE, |call| create_nat_gateway(call, request)).unwrap().nat_gateway.unwrap().nat_gateway_id.unwrap();
        for _ in 0..steps {
            let operations = bed.step();
            bed.deliver(operations);
        }
        bed.call(ALICE, |call| delete_nat_gateway(call, delete(&id))).unwrap();
        bed.settle();
        assert_eq!(row(&bed, &id).state, NatGatewayState::Deleted, "after {steps} steps");
        bed.read(|tx| {
            assert_eq!(tx.all::<CardObject>().count(), 0);
            assert_eq!(tx.all::<NetworkInterface>().count(), 0);
            assert_eq!(tx.sum::<NatGateway>("gateways", CARD_A) + tx.sum::<NatGateway>("gateways", CARD_A2), 0);
        });
    }
}

#[test]
fn a_card_that_refuses_a_nat_gateway_makes_it_fail_and_holds_nothing() {
    let mut bed = Testbed::new();
    bed.cards.get_mut(CARD_B).unwrap().refuses = Some(ObjectKind::NatGateway);
    let subnet = subnet(&bed, ALICE, "us-east-1b");
    let id = gateway(&mut bed, &subnet.id);
    let row = row(&bed, &id);
    assert_eq!((row.state, row.failure.unwrap().code.as_str()), (NatGatewayState::Failed, "InternalError"));
    assert_eq!(bed.read(|tx| tx.all::<CardObject>().count()), 0);
    assert_eq!(bed.read(|tx| tx.all::<NetworkInterface>().count()), 0);
}

#[test]
fn a_nat_gateway_leaves_a_card_only_when_that_is_lost_for_good() {
    let mut bed = Testbed::new();
    let subnet = subnet(&bed, ALICE, "us-east-1a");
    let id = gateway(&mut bed, &subnet.id);
    let first = row(&bed, &id).card_id.unwrap();
    let second = if first == CARD_A { CARD_A2 } else { CARD_A };
    let housekeep = |bed: &mut Testbed, after_ms: u64| {
        bed.now = bed.now.plus_ms(after_ms);
        let mut tx = bed.world.begin();
        bed.core.housekeep(&mut tx, bed.now);
        tx.commit();
        bed.settle();
    };
    bed.disconnect(&first);
    bed.settle();
    housekeep(&mut bed, LOST_MS - 1);
    assert_eq!(row(&bed, &id).card_id.as_ref(), Some(&first), "it forwards without control");
    housekeep(&mut bed, 1);
    assert_eq!((row(&bed, &id).card_id.as_deref(), row(&bed, &id).state), (Some(second), NatGatewayState::Available));
    assert!(gateway_on(&bed, second).is_some());
    bed.connect(&first);
    bed.settle();
    assert!(gateway_on(&bed, &first).is_none(), "who comes back is told to let it go");
    // A card that the newly started control never heard of may be as well as ever.
    let mut fresh = Testbed::new();
    let subnet = self::subnet(&fresh, ALICE, "us-east-1a");
    let id = gateway(&mut fresh, &subnet.id);
    let card = row(&fresh, &id).card_id.unwrap();
    fresh.disconnect(&card);
    fresh.settle();
    fresh.now = fresh.now.plus_ms(LOST_MS);
    fresh.core = super::Core::default();
    housekeep(&mut fresh, 0);
    housekeep(&mut fresh, LOST_MS - 1);
    assert_eq!(row(&fresh, &id).card_id.as_ref(), Some(&card));
}

#[test]
fn addresses_of_a_nat_gateway_change_when_the_card_has_changed_them() {
    let mut bed = Testbed::new();
    let subnet = subnet(&bed, ALICE, "us-east-1b");
    let id = gateway(&mut bed, &subnet.id);
    let states = |bed: &Testbed| row(bed, &id).addresses.iter().map(|address| address.state.name()).collect::<Vec<_>>();
    let associate =
        AssociateNatGatewayAddressRequest { nat_gateway_id: Some(id.clone()), allocation_ids: vec![allocate(&bed)], ..Default::default() };
    bed.call(ALICE, |call| associate_nat_gateway_address(call, associate)).unwrap();
    let operations = bed.step();
    assert_eq!(states(&bed), ["succeeded", "associating"], "the card speaks of what it was told before");
    bed.deliver(operations);
    bed.settle();
    assert_eq!(states(&bed), ["succeeded", "succeeded"]);
    assert_eq!(gateway_on(&bed, CARD_B).unwrap().public_ipv4.len(), 2);
    let disassociate = DisassociateNatGatewayAddressRequest {
        nat_gateway_id: Some(id.clone()),
        association_ids: row(&bed, &id).addresses[1].association_id.clone().into_iter().collect(),
        ..Default::default()
    };
    bed.call(ALICE, |call| disassociate_nat_gateway_address(call, disassociate)).unwrap();
    let operations = bed.step();
    assert_eq!(states(&bed), ["succeeded", "disassociating"]);
    bed.deliver(operations);
    bed.settle();
    assert_eq!(states(&bed), ["succeeded"]);
    assert_eq!(gateway_on(&bed, CARD_B).unwrap().public_ipv4.len(), 1);
}

#[test]
fn a_port_is_told_the_entries_of_its_subnets_acl_in_their_order() {
    let mut bed = Testbed::new();
    let id = bed.running();
    let card = bed.card_of(&id);
    let subnet = subnet(&bed, ALICE, "us-east-1a");
    let open = bed.cards[&card].port(&id).acl.unwrap();
    let all =
        card::AclRule { allow: true, protocol: 256, from_port: -1, to_port: -1, remote: Some(card::Prefix { address: 0, length: 0 }) };
    assert_eq!((open.ingress.as_slice(), open.egress.as_slice()), ([all].as_slice(), [all].as_slice()));
    let create = CreateNetworkAclRequest { vpc_id: Some(subnet.vpc_id.clone()), ..Default::default() };
    let acl = bed.call(ALICE, |call| create_network_acl(call, create)).unwrap().network_acl.unwrap().network_acl_id.unwrap();
    let entry = |number: i32, cidr: Option<&str>, six: Option<&str>| CreateNetworkAclEntryRequest {
        network_acl_id: Some(acl.clone()),
        rule_number: Some(number),
        protocol: Some("6".into()),
        rule_action: Some(if number == 90 { "deny" } else { "allow" }.into()),
        egress: Some(false),
        cidr_block: cidr.map(str::to_owned),
        ipv6_cidr_block: six.map(str::to_owned),
        port_range: Some(PortRange { from: Some(22), to: Some(22) }),
        ..Default::default()
    };
    for entry in [entry(100, Some("0.0.0.0/0"), None), entry(90, Some("10.0.0.0/8"), None), entry(80, None, Some("::/0"))] {
        bed.call(ALICE, |call| create_network_acl_entry(call, entry)).unwrap();
    }
    let association =
        bed.read(|tx| of_subnet(tx, &subnet).unwrap().associations.iter().find(|held| held.subnet_id == subnet.id).unwrap().id.clone());
    let replace =
        ReplaceNetworkAclAssociationRequest { association_id: Some(association), network_acl_id: Some(acl.clone()), dry_run: None };
    bed.call(ALICE, |call| replace_network_acl_association(call, replace)).unwrap();
    let operations = bed.step();
    assert_eq!(operations.len(), 1, "only the port changed: {operations:?}");
    bed.deliver(operations);
    bed.settle();
    let told = bed.cards[&card].port(&id).acl.unwrap();
    assert!(told.egress.is_empty(), "what no rule matches does not pass");
    let rules: Vec<_> = told.ingress.iter().map(|rule| (rule.allow, rule.protocol, rule.from_port, rule.remote.unwrap().length)).collect();
    assert_eq!(rules, [(false, 6, 22, 8), (true, 6, 22, 0)], "by number, and nothing of IPv6");
    assert_eq!(bed.read(|tx| tx.find::<NetworkAcl>(ALICE, "subnet", &subnet.id).len()), 1);
}

#[test]
fn an_appliance_is_routed_to_and_believed_for_any_address() {
    let mut bed = Testbed::new();
    let (a, b) = (bed.running(), bed.running());
    let vpc = subnet(&bed, ALICE, "us-east-1a").vpc_id;
    let to_b = CreateRouteRequest { instance_id: Some(b.clone()), ..route(&bed, ALICE, &vpc, "198.18.0.0/15") };
    bed.call(ALICE, |call| create_route(call, to_b)).unwrap();
    bed.settle();
    let appliance = bed.cards[&bed.card_of(&b)].port(&b);
    let seen = |bed: &Testbed| target(&bed.cards[&bed.card_of(&a)].port(&a), "198.18.0.0/15");
    assert_eq!(seen(&bed), Some(card::route::Target::NetworkInterface(appliance.private_ipv4)));
    let mapping = |bed: &Testbed| {
        let network = network(bed, &bed.card_of(&a), &vpc).unwrap();
        network.mappings.into_iter().find(|mapping| mapping.private_ipv4 == appliance.private_ipv4).unwrap()
    };
    assert!(!mapping(&bed).forwards);
    assert_eq!(mapping(&bed).public_ipv4, appliance.public_ipv4);
    let mut tx = bed.world.begin();
    tx.update::<NetworkInterface>(ALICE, &appliance.id, |interface| interface.source_dest_check = false);
    tx.commit();
    bed.settle();
    assert!(mapping(&bed).forwards);
    let terminate = TerminateInstancesRequest { instance_ids: vec![b], ..Default::default() };
    bed.call(ALICE, |call| terminate_instances(call, terminate)).unwrap();
    bed.settle();
    assert_eq!(seen(&bed), Some(card::route::Target::Blackhole(true)));
}

#[test]
fn a_vpc_with_dns_has_a_resolver_at_its_second_address() {
    let mut bed = Testbed::new();
    let id = bed.running();
    let card = bed.card_of(&id);
    let vpc = subnet(&bed, ALICE, "us-east-1a").vpc_id;
    let seen = |bed: &Testbed| (network(bed, &card, &vpc).unwrap().resolver, bed.cards[&card].port(&id).dhcp.unwrap().dns);
    let resolver = card::Resolver { domain: "ec2.internal".into(), hostnames: true, public_domain: "compute-1.amazonaws.com".into() };
    assert_eq!(seen(&bed), (Some(resolver), vec![u32::from_be_bytes([172, 31, 0, 2])]));
    let off = ModifyVpcAttributeRequest {
        vpc_id: Some(vpc.clone()),
        enable_dns_support: Some(AttributeBooleanValue { value: Some(false) }),
        ..Default::default()
    };
    bed.call(ALICE, |call| modify_vpc_attribute(call, off)).unwrap();
    bed.settle();
    assert_eq!(seen(&bed), (None, vec![]));
}

/// A VPC with one subnet in a zone.
fn vpc_with_subnet(bed: &Testbed, account: &str, cidr: &str, zone: &str) -> (String, String) {
    let create = CreateVpcRequest { cidr_block: Some(cidr.into()), ..Default::default() };
    let vpc = bed.call(account, |call| create_vpc(call, create)).unwrap().vpc.unwrap().vpc_id.unwrap();
    let subnet = CreateSubnetRequest {
        vpc_id: Some(vpc.clone()),
        cidr_block: Some(cidr.replace("/16", "/24")),
        availability_zone: Some(zone.into()),
        ..Default::default()
    };
    let subnet = bed.call(account, |call| create_subnet(call, subnet)).unwrap().subnet.unwrap().subnet_id.unwrap();
    (vpc, subnet)
}

fn peer(bed: &mut Testbed, own: &str, account: &str, other: &str) -> String {
    let create = CreateVpcPeeringConnectionRequest {
        vpc_id: Some(own.into()),
        peer_vpc_id: Some(other.into()),
        peer_owner_id: Some(account.into()),
        ..Default::default()
    };
    let made = bed.call(ALICE, |call| create_vpc_peering_connection(call, create)).unwrap();
    let id = made.vpc_peering_connection.unwrap().vpc_peering_connection_id;
    let accept = AcceptVpcPeeringConnectionRequest { vpc_peering_connection_id: id.clone(), dry_run: None };
    bed.call(account, |call| accept_vpc_peering_connection(call, accept)).unwrap();
    bed.settle();
    id.unwrap()
}

#[test]
fn peered_vpcs_know_each_others_ports_and_members_and_forget_them() {
    let mut bed = Testbed::new();
    let (own, own_subnet) = vpc_with_subnet(&bed, ALICE, "10.1.0.0/16", "us-east-1a");
    let (theirs, their_subnet) = vpc_with_subnet(&bed, BOB, "10.2.0.0/16", "us-east-1b");
    let a = launch_in(&mut bed, ALICE, &own_subnet);
    let b = launch_in(&mut bed, BOB, &their_subnet);
    let card = bed.card_of(&a);
    assert!(network(&bed, &card, &theirs).is_none() && network(&bed, CARD_B, &own).is_none());
    let id = peer(&mut bed, &own, BOB, &theirs);
    let vni = |bed: &Testbed, account: &str, id: &str| bed.read(|tx| tx.get::<Vpc>(account, id).unwrap().vni.0);
    let (own_vni, their_vni) = (vni(&bed, ALICE, &own), vni(&bed, BOB, &theirs));
    assert_eq!(network(&bed, &card, &own).unwrap().peers, [their_vni]);
    assert_eq!(network(&bed, CARD_B, &theirs).unwrap().peers, [own_vni]);
    let known = network(&bed, &card, &theirs).unwrap();
    assert_eq!((known.vni, known.mappings.len()), (their_vni, 1));
    assert_eq!((known.peers.as_slice(), known.resolver), ([].as_slice(), None), "no more than where its ports are");
    assert_eq!(known.mappings[0].private_ipv4, bed.cards[CARD_B].port(&b).private_ipv4);

    let over = CreateRouteRequest { vpc_peering_connection_id: Some(id.clone()), ..route(&bed, ALICE, &own, "10.2.0.0/16") };
    bed.call(ALICE, |call| create_route(call, over)).unwrap();
    let group =
        |bed: &Testbed, account: &str, vpc: &str| bed.read(|tx| security_group::default_group(tx, account, vpc).unwrap().id.clone());
    let their_group = group(&bed, BOB, &theirs);
    let pair = UserIdGroupPair { group_id: Some(their_group.clone()), user_id: Some(BOB.into()), ..Default::default() };
    let authorize = AuthorizeSecurityGroupIngressRequest {
        group_id: Some(group(&bed, ALICE, &own)),
        ip_permissions: vec![IpPermission { ip_protocol: Some("-1".into()), user_id_group_pairs: vec![pair], ..Default::default() }],
        ..Default::default()
    };
    bed.call(ALICE, |call| authorize_security_group_ingress(call, authorize)).unwrap();
    bed.settle();
    let members = |bed: &Testbed| {
        let groups = network(bed, &card, &own).unwrap().groups;
        groups.into_iter().find(|group| group.id == their_group).unwrap().members.len()
    };
    assert_eq!(members(&bed), 1);
    assert_eq!(target(&bed.cards[&card].port(&a), "10.2.0.0/16"), Some(card::route::Target::PeerVni(their_vni)));
    launch_in(&mut bed, BOB, &their_subnet);
    assert_eq!(members(&bed), 2, "a new member is known at once");
    assert_eq!(network(&bed, &card, &theirs).unwrap().mappings.len(), 2);

    let delete = DeleteVpcPeeringConnectionRequest { vpc_peering_connection_id: Some(id), dry_run: None };
    bed.call(BOB, |call| delete_vpc_peering_connection(call, delete)).unwrap();
    bed.settle();
    assert!(network(&bed, &card, &theirs).is_none() && network(&bed, CARD_B, &own).is_none());
    assert!(network(&bed, &card, &own).unwrap().peers.is_empty());
    assert_eq!(members(&bed), 0, "a stale rule lets nobody in");
    assert_eq!(target(&bed.cards[&card].port(&a), "10.2.0.0/16"), Some(card::route::Target::Blackhole(true)));
}

#[test]
fn a_change_of_one_vpc_touches_only_cards_that_know_it() {
    let mut bed = Testbed::new();
    let (one, one_subnet) = vpc_with_subnet(&bed, ALICE, "10.1.0.0/16", "us-east-1a");
    let (_, other_subnet) = vpc_with_subnet(&bed, ALICE, "10.2.0.0/16", "us-east-1b");
    let a = launch_in(&mut bed, ALICE, &one_subnet);
    launch_in(&mut bed, ALICE, &other_subnet);
    let table = bed.read(|tx| main(tx, ALICE, &one).unwrap().id.clone());
    let mut tx = bed.world.begin();
    tx.update::<RouteTable>(ALICE, &table, |table| table.routes.clear());
    tx.commit();
    let dirty = bed.world.take_dirty();
    let touched: Vec<String> = bed.read(|tx| super::touch::cards(tx, &dirty).into_iter().collect());
    assert_eq!(touched, [bed.card_of(&a)]);
}

#[test]
fn random_changes_of_networks_leave_no_card_behind() {
    // Each step of the test bed compares what the cards are told with what all of them shall be told.
    for seed in 0..12 {
        let mut bed = Testbed::new();
        let mut next = dice(seed);
        let vpcs = [
            vpc_with_subnet(&bed, ALICE, "10.1.0.0/16", "us-east-1a"),
            vpc_with_subnet(&bed, ALICE, "10.2.0.0/16", "us-east-1b"),
            vpc_with_subnet(&bed, ALICE, "10.3.0.0/16", "us-east-1a"),
        ];
        let elastic = allocate(&bed);
        for _ in 0..50 {
            change_anything(&mut bed, &mut next, &vpcs, &elastic);
            let operations = bed.step();
            bed.deliver(operations);
        }
        end_everything(&mut bed);
        assert!(bed.cards.values().all(|card| card.objects.values().all(|(object, _)| object.is_none())), "seed {seed}");
        bed.read(|tx| {
            assert_eq!(tx.all::<CardObject>().count(), 0, "seed {seed}");
            assert_eq!(tx.all::<NetworkInterface>().count(), 0, "seed {seed}");
        });
    }
}

/// One thing of many that a tenant, or a card, may do to networks; whether it is allowed does not matter here.
fn change_anything(bed: &mut Testbed, next: &mut impl FnMut(usize) -> usize, vpcs: &[(String, String)], elastic: &str) {
    let (vpc, subnet) = &vpcs[next(3)];
    let other = &vpcs[next(3)].0;
    let instances: Vec<String> = bed.read(|tx| tx.list::<crate::model::Instance>(ALICE).map(|row| row.id.clone()).collect());
    let instance = if instances.is_empty() { String::new() } else { instances[next(instances.len())].clone() };
    let gateways: Vec<String> = bed.read(|tx| tx.list::<NatGateway>(ALICE).map(|row| row.id.clone()).collect());
    let connections: Vec<String> = bed.read(|tx| tx.all::<crate::model::VpcPeeringConnection>().map(|row| row.id.clone()).collect());
    let connection = if connections.is_empty() { String::new() } else { connections[next(connections.len())].clone() };
    let card = [CARD_A, CARD_A2, CARD_B][next(3)];
    match next(12) {
        0..=2 => {
            let request = RunInstancesRequest { subnet_id: Some(subnet.clone()), placement: None, ..request("") };
            drop(bed.call(ALICE, |call| run_instances(call, request)));
        }
        3 => {
            let request = StopInstancesRequest { instance_ids: vec![instance], ..Default::default() };
            drop(bed.call(ALICE, |call| stop_instances(call, request)));
        }
        4 => {
            let request = TerminateInstancesRequest { instance_ids: vec![instance], ..Default::default() };
            drop(bed.call(ALICE, |call| terminate_instances(call, request)));
        }
        5 => {
            let subnet_id = if next(2) == 0 { subnet.clone() } else { self::subnet(bed, ALICE, "us-east-1a").id };
            let request =
                CreateNatGatewayRequest { subnet_id: Some(subnet_id), allocation_id: Some(elastic.to_owned()), ..Default::default() };
            drop(bed.call(ALICE, |call| create_nat_gateway(call, request)));
        }
        6 => {
            for id in gateways {
                drop(bed.call(ALICE, |call| delete_nat_gateway(call, delete(&id))));
            }
        }
        7 => {
            let request =
                CreateVpcPeeringConnectionRequest { vpc_id: Some(vpc.clone()), peer_vpc_id: Some(other.clone()), ..Default::default() };
            drop(bed.call(ALICE, |call| create_vpc_peering_connection(call, request)));
        }
        8 => {
            let request = AcceptVpcPeeringConnectionRequest { vpc_peering_connection_id: Some(connection), dry_run: None };
            drop(bed.call(ALICE, |call| accept_vpc_peering_connection(call, request)));
        }
        9 if next(2) == 0 => {
            let request = DeleteVpcPeeringConnectionRequest { vpc_peering_connection_id: Some(connection), dry_run: None };
            drop(bed.call(ALICE, |call| delete_vpc_peering_connection(call, request)));
        }
        9 => {
            let cidr = format!("198.{}.0.0/16", next(256));
            let request = CreateRouteRequest { vpc_peering_connection_id: Some(connection), ..route(bed, ALICE, vpc, &cidr) };
            drop(bed.call(ALICE, |call| create_route(call, request)));
        }
        10 if bed.cards[card].connected => bed.disconnect(card),
        10 => bed.connect(card),
        _ => bed.settle(),
    }
}

/// Brings every card back and deletes what has a card.
fn end_everything(bed: &mut Testbed) {
    for card in [CARD_A, CARD_A2, CARD_B] {
        if !bed.cards[card].connected {
            bed.connect(card);
        }
    }
    bed.settle();
    let instances: Vec<String> = bed.read(|tx| tx.list::<crate::model::Instance>(ALICE).map(|row| row.id.clone()).collect());
    let gateways: Vec<String> = bed.read(|tx| tx.list::<NatGateway>(ALICE).map(|row| row.id.clone()).collect());
    let terminate = TerminateInstancesRequest { instance_ids: instances.clone(), ..Default::default() };
    assert!(instances.is_empty() || bed.call(ALICE, |call| terminate_instances(call, terminate)).is_ok());
    for id in gateways {
        drop(bed.call(ALICE, |call| delete_nat_gateway(call, delete(&id))));
    }
    bed.settle();
}
