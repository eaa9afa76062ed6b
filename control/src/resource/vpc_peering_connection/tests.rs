use super::*;
use crate::auth::Principal;
use crate::resource::fixture::{ALICE, BOB, Fixture};
use crate::resource::route_table::{self, create_route, describe_route_tables};
use crate::resource::security_group;
use crate::resource::security_group_rule::{authorize_security_group_ingress, revoke_security_group_ingress};
use crate::resource::stale_security_group::{describe_security_group_references, describe_stale_security_groups};
use crate::shapes::{
    AttributeBooleanValue, AuthorizeSecurityGroupIngressRequest, CreateRouteRequest, CreateVpcRequest, DeleteVpcRequest,
    DescribeRouteTablesRequest, DescribeSecurityGroupReferencesRequest, DescribeSecurityGroupsRequest, DescribeStaleSecurityGroupsRequest,
    Filter, IpPermission, ModifyVpcAttributeRequest, RevokeSecurityGroupIngressRequest, UserIdGroupPair,
};

const NOW: Time = Time(1_700_000_000_000);
const DAY_MS: u64 = 24 * HOUR_MS;

fn new_vpc(fixture: &Fixture, account: &str, cidr: &str) -> String {
    let request = CreateVpcRequest { cidr_block: Some(cidr.into()), ..Default::default() };
    fixture.call(account, |call| vpc::create_vpc(call, request)).unwrap().vpc.unwrap().vpc_id.unwrap()
}

fn request(own: &str, account: &str, peer: &str) -> CreateVpcPeeringConnectionRequest {
    CreateVpcPeeringConnectionRequest {
        vpc_id: Some(own.into()),
        peer_vpc_id: Some(peer.into()),
        peer_owner_id: Some(account.into()),
        ..Default::default()
    }
}

fn ask(fixture: &Fixture, own: &str, account: &str, peer: &str) -> String {
    let answer = fixture.call(ALICE, |call| create_vpc_peering_connection(call, request(own, account, peer))).unwrap();
    let shape = answer.vpc_peering_connection.unwrap();
    assert_eq!(shape.status.unwrap().code.as_deref(), Some("initiating-request"));
    shape.vpc_peering_connection_id.unwrap()
}

fn accept(id: &str) -> AcceptVpcPeeringConnectionRequest {
    AcceptVpcPeeringConnectionRequest { vpc_peering_connection_id: Some(id.into()), dry_run: None }
}

fn reject(id: &str) -> RejectVpcPeeringConnectionRequest {
    RejectVpcPeeringConnectionRequest { vpc_peering_connection_id: Some(id.into()), dry_run: None }
}

fn delete(id: &str) -> DeleteVpcPeeringConnectionRequest {
    DeleteVpcPeeringConnectionRequest { vpc_peering_connection_id: Some(id.into()), dry_run: None }
}

/// What an account is shown of a connection at a moment: its state, if anything.
fn seen(fixture: &Fixture, account: &str, id: &str, now: Time) -> Option<String> {
    let request = DescribeVpcPeeringConnectionsRequest { vpc_peering_connection_ids: vec![id.into()], ..Default::default() };
    let principal = Principal::for_test(account);
    let answer = fixture.world.call(&principal, now, |call| describe_vpc_peering_connections(call, request)).0;
    answer.ok()?.vpc_peering_connections.remove(0).status?.code
}

/// An active connection between a VPC of Alice's and one of another account.
fn peered(fixture: &Fixture, account: &str) -> (String, String, String) {
    let (own, peer) = (new_vpc(fixture, ALICE, "10.1.0.0/16"), new_vpc(fixture, account, "10.2.0.0/16"));
    let id = ask(fixture, &own, account, &peer);
    fixture.call(account, |call| accept_vpc_peering_connection(call, accept(&id))).unwrap();
    (own, peer, id)
}

#[test]
fn a_request_to_another_account_is_that_accounts_to_accept() {
    let fixture = Fixture::new();
    let (own, peer) = (new_vpc(&fixture, ALICE, "10.1.0.0/16"), new_vpc(&fixture, BOB, "10.2.0.0/16"));
    let id = ask(&fixture, &own, BOB, &peer);
    assert_eq!(seen(&fixture, ALICE, &id, NOW).as_deref(), Some("pending-acceptance"));
    assert_eq!(seen(&fixture, BOB, &id, NOW).as_deref(), Some("pending-acceptance"));
    assert_eq!(fixture.refusal(ALICE, |call| accept_vpc_peering_connection(call, accept(&id))), "OperationNotPermitted");
    assert_eq!(fixture.refusal(ALICE, |call| reject_vpc_peering_connection(call, reject(&id))), "OperationNotPermitted");
    assert_eq!(fixture.refusal(BOB, |call| delete_vpc_peering_connection(call, delete(&id))), "OperationNotPermitted");
    let shape = fixture.call(BOB, |call| accept_vpc_peering_connection(call, accept(&id))).unwrap().vpc_peering_connection.unwrap();
    assert_eq!(shape.status.unwrap().code.as_deref(), Some("active"));
    assert_eq!(shape.accepter_vpc_info.unwrap().cidr_block.as_deref(), Some("10.2.0.0/16"));
    assert_eq!(fixture.refusal(BOB, |call| accept_vpc_peering_connection(call, accept(&id))), "InvalidStateTransition");
    let stranger = "333333333333";
    assert_eq!(seen(&fixture, stranger, &id, NOW), None);
    let refused = fixture.refusal(stranger, |call| delete_vpc_peering_connection(call, delete(&id)));
    assert_eq!(refused, "InvalidVpcPeeringConnectionID.NotFound");
}

#[test]
fn what_cannot_be_peered_fails_and_tells_nothing_of_the_other_account() {
    let fixture = Fixture::new();
    let own = new_vpc(&fixture, ALICE, "10.1.0.0/16");
    let overlapping = new_vpc(&fixture, BOB, "10.1.128.0/17");
    let mut shapes = Vec::new();
    for (account, peer) in [(BOB, overlapping.as_str()), (BOB, "vpc-0123456789abcdef0"), ("333333333333", "vpc-0123456789abcdef0")] {
        let id = ask(&fixture, &own, account, peer);
        assert_eq!(seen(&fixture, ALICE, &id, NOW).as_deref(), Some("failed"), "{peer}");
        assert_eq!(seen(&fixture, account, &id, NOW), None, "only the requester sees a failure");
        shapes.push(fixture.call(ALICE, |call| Ok(message(&*row(call, &id)?, PeeringState::Failed))).unwrap());
        assert_eq!(fixture.refusal(ALICE, |call| delete_vpc_peering_connection(call, delete(&id))), "InvalidStateTransition");
        assert_eq!(seen(&fixture, ALICE, &id, NOW.plus_ms(2 * HOUR_MS)), None);
    }
    shapes.dedup();
    assert_eq!(shapes, ["Failed due to incorrect VPC-ID, Account ID, or overlapping CIDR range"]);
    let ask = |request| fixture.refusal(ALICE, |call| create_vpc_peering_connection(call, request));
    assert_eq!(ask(request(&own, ALICE, "vpc-0123456789abcdef0")), "InvalidVpcID.NotFound");
    assert_eq!(ask(request(&own, ALICE, &own)), "InvalidParameterValue");
    assert_eq!(ask(request(&overlapping, ALICE, &own)), "InvalidVpcID.NotFound");
    let elsewhere = CreateVpcPeeringConnectionRequest { peer_region: Some("eu-west-1".into()), ..request(&own, BOB, &overlapping) };
    assert_eq!(ask(elsewhere), "UnsupportedOperation");
}

#[test]
fn two_vpcs_are_peered_once() {
    let fixture = Fixture::new();
    let (a, b) = (new_vpc(&fixture, ALICE, "10.1.0.0/16"), new_vpc(&fixture, ALICE, "10.2.0.0/16"));
    let id = ask(&fixture, &a, ALICE, &b);
    let again = fixture.call(ALICE, |call| create_vpc_peering_connection(call, request(&a, ALICE, &b))).unwrap();
    assert_eq!(again.vpc_peering_connection.unwrap().vpc_peering_connection_id.as_ref(), Some(&id), "the same question once");
    let back = || fixture.refusal(ALICE, |call| create_vpc_peering_connection(call, request(&b, ALICE, &a)));
    assert_eq!(back(), "VpcPeeringConnectionAlreadyExists");
    fixture.call(ALICE, |call| accept_vpc_peering_connection(call, accept(&id))).unwrap();
    assert_eq!(back(), "VpcPeeringConnectionAlreadyExists");
    fixture.call(ALICE, |call| delete_vpc_peering_connection(call, delete(&id))).unwrap();
    assert_ne!(ask(&fixture, &b, ALICE, &a), id);
}

#[test]
fn a_request_lapses_after_seven_days_and_ended_ones_are_shown_for_a_while() {
    let fixture = Fixture::new();
    let (own, peer) = (new_vpc(&fixture, ALICE, "10.1.0.0/16"), new_vpc(&fixture, BOB, "10.2.0.0/16"));
    let lapsed = ask(&fixture, &own, BOB, &peer);
    let expire = |now: Time| {
        let (result, _) = fixture.world.transact(|tx| {
            expire(tx, now);
            Ok::<_, ()>(())
        });
        result.unwrap();
    };
    assert_eq!(seen(&fixture, BOB, &lapsed, NOW.plus_ms(7 * DAY_MS - 1)).as_deref(), Some("pending-acceptance"));
    let late = NOW.plus_ms(7 * DAY_MS);
    assert_eq!(seen(&fixture, BOB, &lapsed, late).as_deref(), Some("expired"));
    let accepted = fixture.world.call(&Principal::for_test(BOB), late, |call| accept_vpc_peering_connection(call, accept(&lapsed))).0;
    assert_eq!(accepted.unwrap_err().code, "InvalidStateTransition");
    expire(late);
    assert_eq!(seen(&fixture, ALICE, &lapsed, NOW.plus_ms(8 * DAY_MS)).as_deref(), Some("expired"));
    expire(NOW.plus_ms(9 * DAY_MS));
    assert_eq!(fixture.world.begin().all::<VpcPeeringConnection>().count(), 0);

    let rejected = ask(&fixture, &own, BOB, &peer);
    fixture.call(BOB, |call| reject_vpc_peering_connection(call, reject(&rejected))).unwrap();
    let later = NOW.plus_ms(3 * HOUR_MS);
    assert_eq!(seen(&fixture, ALICE, &rejected, later).as_deref(), Some("rejected"));
    assert_eq!(seen(&fixture, BOB, &rejected, later), None);
    expire(later);
    assert!(seen(&fixture, ALICE, &rejected, later).is_some());
    expire(NOW.plus_ms(2 * DAY_MS));
    assert_eq!(fixture.world.begin().all::<VpcPeeringConnection>().count(), 0);
}

#[test]
fn a_route_over_a_connection_is_active_only_while_that_is() {
    let fixture = Fixture::new();
    let (own, peer) = (new_vpc(&fixture, ALICE, "10.1.0.0/16"), new_vpc(&fixture, BOB, "10.2.0.0/16"));
    let id = ask(&fixture, &own, BOB, &peer);
    let table = route_table::main(&fixture.world.begin(), ALICE, &own).unwrap().id.clone();
    let route = |table: &str, cidr: &str| CreateRouteRequest {
        route_table_id: Some(table.into()),
        destination_cidr_block: Some(cidr.into()),
        vpc_peering_connection_id: Some(id.clone()),
        ..Default::default()
    };
    fixture.call(ALICE, |call| create_route(call, route(&table, "10.2.0.0/16"))).unwrap();
    let state = || {
        let request = DescribeRouteTablesRequest { route_table_ids: vec![table.clone()], ..Default::default() };
        let tables = fixture.call(ALICE, |call| describe_route_tables(call, request)).unwrap().route_tables;
        tables[0].routes.iter().find(|route| route.vpc_peering_connection_id.as_ref() == Some(&id)).unwrap().state.clone().unwrap()
    };
    assert_eq!(state(), "blackhole");
    fixture.call(BOB, |call| accept_vpc_peering_connection(call, accept(&id))).unwrap();
    assert_eq!(state(), "active");
    let vpc = fixture.default_vpc(ALICE).id;
    let other = route_table::main(&fixture.world.begin(), ALICE, &vpc).unwrap().id.clone();
    let refused = fixture.refusal(ALICE, |call| create_route(call, route(&other, "10.2.0.0/16")));
    assert_eq!(refused, "InvalidParameterValue", "it leads from another VPC");
    fixture.call(BOB, |call| delete_vpc_peering_connection(call, delete(&id))).unwrap();
    assert_eq!(state(), "blackhole");
    assert_eq!(fixture.refusal(ALICE, |call| create_route(call, route(&table, "10.3.0.0/16"))), "InvalidParameterValue");
}

#[test]
fn an_active_connection_keeps_both_vpcs_and_a_request_goes_with_its_vpc() {
    let fixture = Fixture::new();
    let (own, peer, id) = peered(&fixture, BOB);
    let delete_vpc = |account: &str, id: &str| {
        let request = DeleteVpcRequest { vpc_id: Some(id.into()), ..Default::default() };
        fixture.call(account, |call| vpc::delete_vpc(call, request)).map_err(|error| error.code.into_owned())
    };
    assert_eq!(delete_vpc(ALICE, &own).unwrap_err(), "DependencyViolation");
    assert_eq!(delete_vpc(BOB, &peer).unwrap_err(), "DependencyViolation");
    fixture.call(ALICE, |call| delete_vpc_peering_connection(call, delete(&id))).unwrap();
    let id = ask(&fixture, &own, BOB, &peer);
    delete_vpc(BOB, &peer).unwrap();
    assert_eq!(seen(&fixture, ALICE, &id, NOW).as_deref(), Some("deleted"));
    delete_vpc(ALICE, &own).unwrap();
}

#[test]
fn each_side_changes_its_own_options_where_both_vpcs_have_names() {
    let fixture = Fixture::new();
    let (own, peer, id) = peered(&fixture, BOB);
    let options = |dns| PeeringConnectionOptionsRequest { allow_dns_resolution_from_remote_vpc: Some(dns), ..Default::default() };
    let requester = |dns| ModifyVpcPeeringConnectionOptionsRequest {
        vpc_peering_connection_id: Some(id.clone()),
        requester_peering_connection_options: Some(options(dns)),
        ..Default::default()
    };
    let modify = |account: &str, request| fixture.call(account, |call| modify_vpc_peering_connection_options(call, request));
    assert_eq!(modify(BOB, requester(true)).unwrap_err().code, "OperationNotPermitted");
    let unnamed = modify(ALICE, requester(true)).unwrap_err().code;
    assert_eq!(unnamed, "InvalidVpcPeeringConnectionState.DnsHostnamesDisabled");
    for (account, vpc_id) in [(ALICE, own), (BOB, peer)] {
        let request = ModifyVpcAttributeRequest {
            vpc_id: Some(vpc_id),
            enable_dns_hostnames: Some(AttributeBooleanValue { value: Some(true) }),
            ..Default::default()
        };
        fixture.call(account, |call| vpc::modify_vpc_attribute(call, request)).unwrap();
    }
    let answer = modify(ALICE, requester(true)).unwrap();
    assert_eq!(answer.requester_peering_connection_options.unwrap().allow_dns_resolution_from_remote_vpc, Some(true));
    assert_eq!(answer.accepter_peering_connection_options, None);
    let nothing = ModifyVpcPeeringConnectionOptionsRequest { vpc_peering_connection_id: Some(id.clone()), ..Default::default() };
    assert_eq!(modify(ALICE, nothing).unwrap_err().code, "MissingParameter");
}

#[test]
fn connections_are_filtered_by_either_side() {
    let fixture = Fixture::new();
    let (own, peer, id) = peered(&fixture, BOB);
    let found = |account: &str, name: &str, value: &str| {
        let filters = vec![Filter { name: Some(name.into()), values: vec![value.into()] }];
        let request = DescribeVpcPeeringConnectionsRequest { filters, ..Default::default() };
        fixture.call(account, |call| describe_vpc_peering_connections(call, request)).unwrap().vpc_peering_connections.len()
    };
    for account in [ALICE, BOB] {
        assert_eq!(found(account, "requester-vpc-info.vpc-id", &own), 1);
        assert_eq!(found(account, "accepter-vpc-info.vpc-id", &peer), 1);
        assert_eq!(found(account, "accepter-vpc-info.owner-id", ALICE), 0);
        assert_eq!(found(account, "accepter-vpc-info.cidr-block", "10.2.*"), 1);
        assert_eq!(found(account, "status-code", "active"), 1);
        assert_eq!(found(account, "vpc-peering-connection-id", &id), 1);
    }
    assert_eq!(found("333333333333", "status-code", "*"), 0);
}

#[test]
fn a_rule_names_a_group_of_a_peered_vpc_and_is_stale_when_the_way_is_gone() {
    let fixture = Fixture::new();
    let (own, peer, id) = peered(&fixture, BOB);
    let group = security_group::default_group(&fixture.world.begin(), ALICE, &own).unwrap().id.clone();
    let theirs = security_group::default_group(&fixture.world.begin(), BOB, &peer).unwrap().id.clone();
    let elsewhere = fixture.default_vpc(BOB).id;
    let unreachable = security_group::default_group(&fixture.world.begin(), BOB, &elsewhere).unwrap().id.clone();
    let permission = |group_id: &str| {
        let pair = UserIdGroupPair { group_id: Some(group_id.into()), user_id: Some(BOB.into()), ..Default::default() };
        IpPermission { ip_protocol: Some("-1".into()), user_id_group_pairs: vec![pair], ..Default::default() }
    };
    let authorize = |group_id: &str| AuthorizeSecurityGroupIngressRequest {
        group_id: Some(group.clone()),
        ip_permissions: vec![permission(group_id)],
        ..Default::default()
    };
    let refused = fixture.refusal(ALICE, |call| authorize_security_group_ingress(call, authorize(&unreachable)));
    assert_eq!(refused, "InvalidGroup.NotFound");
    let rule =
        fixture.call(ALICE, |call| authorize_security_group_ingress(call, authorize(&theirs))).unwrap().security_group_rules.remove(0);
    let referenced = rule.referenced_group_info.unwrap();
    assert_eq!((referenced.vpc_id.as_ref(), referenced.vpc_peering_connection_id.as_ref()), (Some(&peer), Some(&id)));
    assert_eq!((referenced.user_id.as_deref(), referenced.peering_status.as_deref()), (Some(BOB), Some("active")));
    let pair = || {
        let request = DescribeSecurityGroupsRequest { group_ids: vec![group.clone()], ..Default::default() };
        let shown = fixture.call(ALICE, |call| security_group::describe_security_groups(call, request)).unwrap().security_groups.remove(0);
        let pairs = shown.ip_permissions.into_iter().flat_map(|permission| permission.user_id_group_pairs);
        pairs.into_iter().find(|pair| pair.group_id.as_ref() == Some(&theirs)).unwrap()
    };
    assert_eq!((pair().vpc_id.as_ref(), pair().peering_status.as_deref()), (Some(&peer), Some("active")));
    let references = || {
        let request = DescribeSecurityGroupReferencesRequest { group_id: vec![theirs.clone()], ..Default::default() };
        fixture.call(BOB, |call| describe_security_group_references(call, request)).unwrap().security_group_reference_set
    };
    assert_eq!(references()[0].referencing_vpc_id.as_ref(), Some(&own));
    let stale = || {
        let request = DescribeStaleSecurityGroupsRequest { vpc_id: Some(own.clone()), ..Default::default() };
        fixture.call(ALICE, |call| describe_stale_security_groups(call, request)).unwrap().stale_security_group_set
    };
    assert!(stale().is_empty());

    fixture.call(BOB, |call| delete_vpc_peering_connection(call, delete(&id))).unwrap();
    assert_eq!(pair().peering_status.as_deref(), Some("deleted"));
    assert!(references().is_empty());
    let [shown] = stale().try_into().unwrap();
    assert_eq!(shown.group_id.as_ref(), Some(&group));
    assert_eq!(shown.stale_ip_permissions[0].user_id_group_pairs[0].group_id.as_ref(), Some(&theirs));
    let revoke = RevokeSecurityGroupIngressRequest {
        group_id: Some(group.clone()),
        ip_permissions: vec![permission(&theirs)],
        ..Default::default()
    };
    fixture.call(ALICE, |call| revoke_security_group_ingress(call, revoke)).unwrap();
    assert!(stale().is_empty());
}
