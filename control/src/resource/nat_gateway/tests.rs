use super::*;
use crate::resource::address::{allocate_address, associate_address, describe_addresses, disassociate_address, release_address};
use crate::resource::fixture::{ALICE, BOB, Fixture};
use crate::resource::internet_gateway;
use crate::resource::network_interface::describe_network_interfaces;
use crate::resource::route_table::{create_route, create_route_table, describe_route_tables};
use crate::shapes::{
    AssociateAddressRequest, AssociateNatGatewayAddressRequest, CreateRouteRequest, CreateRouteTableRequest, DescribeAddressesRequest,
    DescribeNetworkInterfacesRequest, DescribeRouteTablesRequest, DisassociateAddressRequest, DisassociateNatGatewayAddressRequest, Filter,
    ReleaseAddressRequest,
};

fn allocate(fixture: &Fixture, account: &str) -> String {
    fixture.call(account, |call| allocate_address(call, Default::default())).unwrap().allocation_id.unwrap()
}

fn request(fixture: &Fixture, allocation_id: &str) -> CreateNatGatewayRequest {
    CreateNatGatewayRequest {
        subnet_id: Some(fixture.default_subnet(ALICE).id),
        allocation_id: Some(allocation_id.into()),
        ..Default::default()
    }
}

fn create(fixture: &Fixture, request: CreateNatGatewayRequest) -> shapes::NatGateway {
    fixture.call(ALICE, |call| create_nat_gateway(call, request)).unwrap().nat_gateway.unwrap()
}

fn describe(fixture: &Fixture, id: &str) -> shapes::NatGateway {
    let request = DescribeNatGatewaysRequest { nat_gateway_ids: vec![id.into()], ..Default::default() };
    fixture.call(ALICE, |call| describe_nat_gateways(call, request)).unwrap().nat_gateways.remove(0)
}

fn delete(id: &str) -> DeleteNatGatewayRequest {
    DeleteNatGatewayRequest { nat_gateway_id: Some(id.into()), dry_run: None }
}

/// What the reconciler does with gateways that are on no card.
fn settle(fixture: &Fixture) {
    let (result, _) = fixture.world.transact(|tx| {
        life::settle(tx, crate::model::Time(1_700_000_000_000));
        Ok::<_, ()>(())
    });
    result.unwrap();
}

/// As if its card had said that it is ready.
fn ready(fixture: &Fixture, id: &str) {
    let (result, _) = fixture.world.transact(|tx| {
        let row = tx.get::<NatGateway>(ALICE, id).unwrap();
        life::ready(tx, &row);
        Ok::<_, ()>(())
    });
    result.unwrap();
}

#[test]
fn a_gateway_has_an_interface_that_only_it_may_use() {
    let fixture = Fixture::new();
    let elastic = allocate(&fixture, ALICE);
    let gateway = create(&fixture, request(&fixture, &elastic));
    assert_eq!((gateway.state.as_deref(), gateway.connectivity_type.as_deref()), (Some("pending"), Some("public")));
    let [address] = gateway.nat_gateway_addresses.as_slice() else { panic!() };
    assert_eq!((address.is_primary, address.status.as_deref()), (Some(true), Some("associating")));

    let interface_id = address.network_interface_id.clone().unwrap();
    let filters = vec![Filter { name: Some("interface-type".into()), values: vec!["nat_gateway".into()] }];
    let found = DescribeNetworkInterfacesRequest { filters, ..Default::default() };
    let found = fixture.call(ALICE, |call| describe_network_interfaces(call, found)).unwrap().network_interfaces;
    let [interface] = found.as_slice() else { panic!() };
    assert_eq!(interface.network_interface_id.as_ref(), Some(&interface_id));
    assert_eq!(interface.description, Some(format!("Interface for NAT Gateway {}", gateway.nat_gateway_id.unwrap())));
    assert_eq!((interface.requester_managed, interface.status.as_deref()), (Some(true), Some("in-use")));
    assert_eq!((interface.source_dest_check, interface.groups.len()), (Some(false), 0));
    assert_eq!(interface.association.as_ref().unwrap().allocation_id.as_ref(), Some(&elastic));
    assert_eq!(interface.private_ip_address, address.private_ip);

    let shown = fixture.call(ALICE, |call| describe_addresses(call, DescribeAddressesRequest::default())).unwrap().addresses;
    assert_eq!(shown[0].network_interface_id.as_ref(), Some(&interface_id));
    let association = shown[0].association_id.clone();
    assert_eq!(association, address.association_id);
    let disassociate = DisassociateAddressRequest { association_id: association, ..Default::default() };
    assert_eq!(fixture.refusal(ALICE, |call| disassociate_address(call, disassociate)), "AuthFailure");
    let release = ReleaseAddressRequest { allocation_id: Some(elastic.clone()), ..Default::default() };
    assert_eq!(fixture.refusal(ALICE, |call| release_address(call, release)), "AuthFailure");
    fixture.instance(ALICE, "i-0123456789abcdef0");
    let instance_id = Some("i-0123456789abcdef0".to_owned());
    let away = AssociateAddressRequest { allocation_id: Some(elastic), instance_id, ..Default::default() };
    assert_eq!(fixture.refusal(ALICE, |call| associate_address(call, away)), "AuthFailure");
    let onto = AssociateAddressRequest {
        allocation_id: Some(allocate(&fixture, ALICE)),
        network_interface_id: Some(interface_id),
        ..Default::default()
    };
    assert_eq!(fixture.refusal(ALICE, |call| associate_address(call, onto)), "AuthFailure");
}

#[test]
fn what_is_wrong_with_the_network_is_told_by_a_failed_gateway_that_holds_nothing() {
    let fixture = Fixture::new();
    let vpc = fixture.default_vpc(ALICE).id;
    let taken = allocate(&fixture, ALICE);
    create(&fixture, request(&fixture, &taken));
    let second = create(&fixture, request(&fixture, &taken));
    assert_eq!((second.state.as_deref(), second.failure_code), (Some("pending"), None), "the failure comes a moment later");
    settle(&fixture);
    let second = describe(&fixture, &second.nat_gateway_id.unwrap());
    assert_eq!((second.state.as_deref(), second.failure_code.as_deref()), (Some("failed"), Some("Resource.AlreadyAssociated")));
    assert_eq!(second.nat_gateway_addresses[0].status.as_deref(), Some("failed"));

    let request_vpc = shapes::CreateVpcRequest { cidr_block: Some("10.0.0.0/16".into()), ..Default::default() };
    let lonely = fixture.call(ALICE, |call| crate::resource::vpc::create_vpc(call, request_vpc)).unwrap().vpc.unwrap().vpc_id.unwrap();
    let subnet = shapes::CreateSubnetRequest { vpc_id: Some(lonely.clone()), cidr_block: Some("10.0.0.0/28".into()), ..Default::default() };
    let subnet = fixture.call(ALICE, |call| subnet::create_subnet(call, subnet)).unwrap().subnet.unwrap().subnet_id;
    let free = allocate(&fixture, ALICE);
    let there = || CreateNatGatewayRequest { subnet_id: subnet.clone(), ..request(&fixture, &free) };
    let third = create(&fixture, there()).nat_gateway_id.unwrap();
    settle(&fixture);
    let third = describe(&fixture, &third);
    assert_eq!(third.failure_code.as_deref(), Some("Gateway.NotAttached"));
    assert_eq!(third.failure_message, Some(format!("Network {lonely} has no Internet gateway attached")));

    fixture.call(ALICE, |call| Ok(internet_gateway::insert(&mut call.tx, ALICE, Some(lonely)))).unwrap();
    for _ in 0..11 {
        fixture.interface(ALICE, subnet.as_deref().unwrap(), None).unwrap();
    }
    let fourth = create(&fixture, there()).nat_gateway_id.unwrap();
    settle(&fixture);
    assert_eq!(describe(&fixture, &fourth).failure_code.as_deref(), Some("InsufficientFreeAddressesInSubnet"));
    let tx = fixture.world.begin();
    assert_eq!(tx.get::<Address>(ALICE, &free).unwrap().association, None, "a failed gateway claims no address");
    assert_eq!(tx.find::<NetworkInterface>(ALICE, "vpc", &vpc).len(), 1);
}

#[test]
fn bad_requests_are_refused_at_once() {
    let fixture = Fixture::new();
    let (elastic, foreign) = (allocate(&fixture, ALICE), allocate(&fixture, BOB));
    let good = || request(&fixture, &elastic);
    for (request, code) in [
        (CreateNatGatewayRequest { connectivity_type: Some("private".into()), ..good() }, "UnsupportedOperation"),
        (CreateNatGatewayRequest { availability_mode: Some("regional".into()), ..good() }, "UnsupportedOperation"),
        (CreateNatGatewayRequest { allocation_id: None, ..good() }, "MissingParameter"),
        (CreateNatGatewayRequest { subnet_id: None, ..good() }, "MissingParameter"),
        (CreateNatGatewayRequest { allocation_id: Some(foreign), ..good() }, "InvalidAllocationID.NotFound"),
        (CreateNatGatewayRequest { subnet_id: Some(fixture.default_subnet(BOB).id), ..good() }, "InvalidSubnetID.NotFound"),
        (CreateNatGatewayRequest { secondary_allocation_ids: vec![elastic.clone()], ..good() }, "InvalidParameterValue"),
        (CreateNatGatewayRequest { private_ip_address: Some("172.31.0.1".into()), ..good() }, "InvalidParameterValue"),
        (CreateNatGatewayRequest { private_ip_address: Some("10.0.0.9".into()), ..good() }, "InvalidParameterValue"),
        (CreateNatGatewayRequest { secondary_private_ip_addresses: vec!["172.31.0.9".into()], ..good() }, "InvalidParameterCombination"),
    ] {
        let shown = format!("{request:?}");
        assert_eq!(fixture.refusal(ALICE, |call| create_nat_gateway(call, request)), code, "{shown}");
    }
    assert_eq!(fixture.world.begin().all::<NatGateway>().count(), 0);
    assert_eq!(fixture.world.begin().all::<NetworkInterface>().count(), 0);
}

#[test]
fn a_repeated_token_makes_one_gateway_and_a_zone_takes_five() {
    let fixture = Fixture::new();
    let elastic: Vec<String> = (0..5).map(|_| allocate(&fixture, ALICE)).collect();
    let with_token = || CreateNatGatewayRequest { client_token: Some("t".into()), ..request(&fixture, &elastic[0]) };
    let first = create(&fixture, with_token()).nat_gateway_id;
    assert_eq!(create(&fixture, with_token()).nat_gateway_id, first);
    let other = CreateNatGatewayRequest { allocation_id: Some(elastic[1].clone()), ..with_token() };
    assert_eq!(fixture.refusal(ALICE, |call| create_nat_gateway(call, other)), "IdempotentParameterMismatch");
    for elastic in &elastic[1..] {
        create(&fixture, request(&fixture, elastic));
    }
    let sixth = request(&fixture, &elastic[0]);
    assert_eq!(fixture.refusal(ALICE, |call| create_nat_gateway(call, sixth)), "NatGatewayLimitExceeded");
    fixture.call(ALICE, |call| delete_nat_gateway(call, delete(first.as_deref().unwrap()))).unwrap();
    settle(&fixture);
    create(&fixture, request(&fixture, &elastic[0]));
}

#[test]
fn secondary_addresses_have_private_ones_of_their_own_and_come_and_go() {
    let fixture = Fixture::new();
    let elastic: Vec<String> = (0..4).map(|_| allocate(&fixture, ALICE)).collect();
    let subnet = fixture.default_subnet(ALICE);
    let available = || subnet::available(&fixture.world.begin(), &subnet);
    let before = available();
    let request = CreateNatGatewayRequest {
        secondary_allocation_ids: vec![elastic[1].clone()],
        secondary_private_ip_addresses: vec!["172.31.0.77".into()],
        ..request(&fixture, &elastic[0])
    };
    let id = create(&fixture, request).nat_gateway_id.unwrap();
    assert_eq!(available(), before - 2);
    let wanted = || fixture.call(ALICE, |call| subnet::free_addresses(&mut call.tx, &subnet, &[Some(Ipv4Addr::new(172, 31, 0, 77))]));
    assert_eq!(wanted().unwrap_err().code, "InvalidIPAddress.InUse");

    let associate = |allocation: &str| AssociateNatGatewayAddressRequest {
        nat_gateway_id: Some(id.clone()),
        allocation_ids: vec![allocation.into()],
        ..Default::default()
    };
    let early = fixture.refusal(ALICE, |call| associate_nat_gateway_address(call, associate(&elastic[2])));
    assert_eq!(early, "IncorrectState");
    ready(&fixture, &id);
    let statuses = || describe(&fixture, &id).nat_gateway_addresses.into_iter().filter_map(|address| address.status).collect::<Vec<_>>();
    assert_eq!(describe(&fixture, &id).state.as_deref(), Some("available"));
    assert_eq!(statuses(), ["succeeded", "succeeded"]);
    let added = fixture.call(ALICE, |call| associate_nat_gateway_address(call, associate(&elastic[2]))).unwrap();
    assert_eq!(added.nat_gateway_addresses[0].is_primary, Some(false));
    assert_eq!(statuses(), ["succeeded", "succeeded", "associating"]);
    let again = fixture.refusal(ALICE, |call| associate_nat_gateway_address(call, associate(&elastic[2])));
    assert_eq!(again, "Resource.AlreadyAssociated");
    ready(&fixture, &id);
    assert_eq!(statuses(), ["succeeded", "succeeded", "succeeded"]);

    let associations: Vec<_> =
        describe(&fixture, &id).nat_gateway_addresses.into_iter().filter_map(|address| address.association_id).collect();
    let disassociate = |association: &str| DisassociateNatGatewayAddressRequest {
        nat_gateway_id: Some(id.clone()),
        association_ids: vec![association.into()],
        ..Default::default()
    };
    let primary = fixture.refusal(ALICE, |call| disassociate_nat_gateway_address(call, disassociate(&associations[0])));
    assert_eq!(primary, "InvalidParameterValue");
    let unknown = fixture.refusal(ALICE, |call| disassociate_nat_gateway_address(call, disassociate("eipassoc-0123456789abcdef0")));
    assert_eq!(unknown, "InvalidAssociationID.NotFound");
    let leaving = fixture.call(ALICE, |call| disassociate_nat_gateway_address(call, disassociate(&associations[1]))).unwrap();
    assert_eq!(leaving.nat_gateway_addresses[0].status.as_deref(), Some("disassociating"));
    assert!(wanted().is_err(), "it is in use until the card has let it go");
    ready(&fixture, &id);
    assert_eq!(statuses(), ["succeeded", "succeeded"]);
    assert!(wanted().is_ok());
    assert_eq!(fixture.world.begin().get::<Address>(ALICE, &elastic[1]).unwrap().association, None);
}

#[test]
fn a_deleted_gateway_leaves_its_addresses_and_black_holes_and_is_shown_for_an_hour() {
    let fixture = Fixture::new();
    let elastic = allocate(&fixture, ALICE);
    let id = create(&fixture, request(&fixture, &elastic)).nat_gateway_id.unwrap();
    let vpc = fixture.default_vpc(ALICE).id;
    let table = CreateRouteTableRequest { vpc_id: Some(vpc), ..Default::default() };
    let table = fixture.call(ALICE, |call| create_route_table(call, table)).unwrap().route_table.unwrap().route_table_id;
    let route = |cidr: &str| CreateRouteRequest {
        route_table_id: table.clone(),
        destination_cidr_block: Some(cidr.into()),
        nat_gateway_id: Some(id.clone()),
        ..Default::default()
    };
    fixture.call(ALICE, |call| create_route(call, route("0.0.0.0/0"))).unwrap();
    let state = || {
        let request = DescribeRouteTablesRequest { route_table_ids: table.clone().into_iter().collect(), ..Default::default() };
        let tables = fixture.call(ALICE, |call| describe_route_tables(call, request)).unwrap().route_tables;
        tables[0].routes.iter().find(|route| route.nat_gateway_id.as_ref() == Some(&id)).unwrap().state.clone().unwrap()
    };
    assert_eq!(state(), "active");
    assert_eq!(fixture.refusal(BOB, |call| delete_nat_gateway(call, delete(&id))), "NatGatewayNotFound");
    fixture.call(ALICE, |call| delete_nat_gateway(call, delete(&id))).unwrap();
    assert_eq!(describe(&fixture, &id).state.as_deref(), Some("deleting"));
    assert_eq!(state(), "blackhole");
    settle(&fixture);
    let shown = describe(&fixture, &id);
    assert_eq!(shown.state.as_deref(), Some("deleted"));
    assert!(shown.delete_time.is_some());
    assert_eq!(fixture.refusal(ALICE, |call| delete_nat_gateway(call, delete(&id))), "NatGatewayNotFound");
    assert_eq!(fixture.refusal(ALICE, |call| create_route(call, route("1.0.0.0/8"))), "InvalidNatGatewayID.NotFound");
    let release = ReleaseAddressRequest { allocation_id: Some(elastic), ..Default::default() };
    fixture.call(ALICE, |call| release_address(call, release)).unwrap();
    assert_eq!(fixture.world.begin().all::<NetworkInterface>().count(), 0);
    let after = |minutes: u64| {
        let now = crate::model::Time(1_700_000_000_000).plus_ms(minutes * 60_000);
        let (result, _) = fixture.world.transact(|tx| {
            life::expire(tx, now);
            Ok::<_, ()>(tx.all::<NatGateway>().count())
        });
        result.unwrap()
    };
    assert_eq!((after(59), after(61)), (1, 0));
}

#[test]
fn gateways_are_filtered_and_foreign_ones_unknown() {
    let fixture = Fixture::new();
    let gateway = create(&fixture, request(&fixture, &allocate(&fixture, ALICE)));
    let found = |account: &str, name: &str, value: &str| {
        let filter = vec![Filter { name: Some(name.into()), values: vec![value.into()] }];
        let request = DescribeNatGatewaysRequest { filter, ..Default::default() };
        fixture.call(account, |call| describe_nat_gateways(call, request)).unwrap().nat_gateways.len()
    };
    assert_eq!(found(ALICE, "state", "pending"), 1);
    assert_eq!(found(ALICE, "state", "available"), 0);
    assert_eq!(found(ALICE, "vpc-id", gateway.vpc_id.as_deref().unwrap()), 1);
    assert_eq!(found(ALICE, "subnet-id", gateway.subnet_id.as_deref().unwrap()), 1);
    assert_eq!(found(BOB, "state", "*"), 0);
    let request = DescribeNatGatewaysRequest { nat_gateway_ids: gateway.nat_gateway_id.into_iter().collect(), ..Default::default() };
    assert_eq!(fixture.refusal(BOB, |call| describe_nat_gateways(call, request)), "NatGatewayNotFound");
}
