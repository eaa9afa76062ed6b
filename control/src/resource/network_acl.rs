//! Network ACLs: stateless, ordered filters of what crosses the border of a subnet.
//!
//! Every subnet is associated with exactly one ACL of its VPC, a new one with the VPC's default ACL, which lets everything through.
//! An ACL that a tenant makes lets nothing through until it gets entries ([`super::network_acl_entry`]).

use std::sync::Arc;

use ipnet::IpNet;

use super::client_token::{self, Checked};
use super::filter::{Filters, Page};
use super::id::{NETWORK_ACL, NETWORK_ACL_ASSOCIATION, VPC};
use super::{network_acl_entry, security_group_rule, tag};
use crate::error::ApiError;
use crate::model::{NetworkAcl, NetworkAclAssociation, NetworkAclEntry, Subnet, Vpc};
use crate::shapes::{
    self, CreateNetworkAclRequest, CreateNetworkAclResult, DeleteNetworkAclRequest, DescribeNetworkAclsRequest, DescribeNetworkAclsResult,
    IcmpTypeCode, PortRange, ReplaceNetworkAclAssociationRequest, ReplaceNetworkAclAssociationResult,
};
use crate::world::{Call, Tx};

/// The most ACLs of a VPC.
const MOST_ACLS: usize = 200;

/// CreateNetworkAcl.
///
/// # Errors
/// `InvalidVpcID.NotFound`, `NetworkAclLimitExceeded`, `IdempotentParameterMismatch`, those of tags.
pub fn create_network_acl(call: &mut Call<'_>, mut request: CreateNetworkAclRequest) -> Result<CreateNetworkAclResult, ApiError> {
    let token = request.client_token.take();
    request.dry_run = None;
    let fresh = match client_token::check(call, "CreateNetworkAcl", token.as_deref(), &request)? {
        Checked::First(fresh) => fresh,
        Checked::Repeated(id) => {
            let acl = NETWORK_ACL.row::<NetworkAcl>(call, &id)?;
            return Ok(CreateNetworkAclResult { network_acl: Some(shape(call, &acl)), client_token: token });
        }
    };
    let vpc_id = VPC.required(request.vpc_id, "VpcId")?;
    let vpc = VPC.row::<Vpc>(call, &vpc_id)?;
    let tags = tag::specified(request.tag_specifications, &NETWORK_ACL)?;
    if call.find::<NetworkAcl>("vpc", &vpc_id).len() >= MOST_ACLS {
        let message = format!("The maximum number of network acls has been reached for vpc '{vpc_id}'.");
        return Err(ApiError::new("NetworkAclLimitExceeded", message));
    }
    let entries = [true, false].map(network_acl_entry::last).into();
    let acl = insert(&mut call.tx, &vpc.account_id, &vpc_id, false, entries);
    tag::set(&mut call.tx, &vpc.account_id, &NETWORK_ACL, &acl.id, tags);
    fresh.remember(call, &acl.id);
    Ok(CreateNetworkAclResult { network_acl: Some(shape(call, &acl)), client_token: token })
}

/// Gives a VPC its default ACL.
pub fn default_insert(tx: &mut Tx<'_>, account: &str, vpc_id: &str) {
    let entries = [true, false].into_iter().flat_map(|egress| [network_acl_entry::open(egress), network_acl_entry::last(egress)]);
    insert(tx, account, vpc_id, true, entries.collect());
}

fn insert(tx: &mut Tx<'_>, account: &str, vpc_id: &str, is_default: bool, entries: Vec<NetworkAclEntry>) -> NetworkAcl {
    let id = tx.new_id(NETWORK_ACL.prefix);
    let (account_id, vpc_id) = (account.to_owned(), vpc_id.to_owned());
    let acl = NetworkAcl { account_id, id, vpc_id, is_default, entries, associations: Vec::new() };
    tx.put(acl.clone());
    acl
}

/// DeleteNetworkAcl.
///
/// # Errors
/// `InvalidParameterValue` for the default ACL, `DependencyViolation` while a subnet uses it.
pub fn delete_network_acl(call: &mut Call<'_>, request: DeleteNetworkAclRequest) -> Result<(), ApiError> {
    let id = NETWORK_ACL.required(request.network_acl_id, "NetworkAclId")?;
    let acl = NETWORK_ACL.row::<NetworkAcl>(call, &id)?;
    if acl.is_default {
        return Err(ApiError::invalid_value(format!("cannot delete default network ACL {id}")));
    }
    if !acl.associations.is_empty() {
        return Err(ApiError::dependency(format!("The networkAcl '{id}' has dependencies and cannot be deleted.")));
    }
    tag::remove(&mut call.tx, &acl.account_id, &id);
    call.tx.delete::<NetworkAcl>(&acl.account_id, &id);
    Ok(())
}

/// The ACL that filters a subnet.
pub fn of_subnet(tx: &Tx<'_>, subnet: &Subnet) -> Option<Arc<NetworkAcl>> {
    tx.find::<NetworkAcl>(&subnet.account_id, "subnet", &subnet.id).into_iter().next()
}

/// ReplaceNetworkAclAssociation: moves a subnet to another ACL of its VPC, under a new id. To move it where it is changes nothing.
///
/// # Errors
/// `InvalidAssociationID.NotFound`, `InvalidParameterValue` for an ACL of another VPC.
pub fn replace_network_acl_association(
    call: &mut Call<'_>,
    request: ReplaceNetworkAclAssociationRequest,
) -> Result<ReplaceNetworkAclAssociationResult, ApiError> {
    let association_id = NETWORK_ACL_ASSOCIATION.required(request.association_id, "AssociationId")?;
    let id = NETWORK_ACL.required(request.network_acl_id, "NetworkAclId")?;
    let held = |acl: &Arc<NetworkAcl>| {
        let association = acl.associations.iter().find(|association| association.id == association_id)?;
        Some((acl.clone(), association.clone()))
    };
    let (old, association) = call.list::<NetworkAcl>().find_map(held).ok_or_else(|| NETWORK_ACL_ASSOCIATION.not_found(&association_id))?;
    let new = NETWORK_ACL.row::<NetworkAcl>(call, &id)?;
    if new.vpc_id != old.vpc_id {
        let message = format!("network ACL {id} and subnet {} belong to different networks", association.subnet_id);
        return Err(ApiError::invalid_value(message));
    }
    if new.id == old.id {
        return Ok(ReplaceNetworkAclAssociationResult { new_association_id: Some(association_id) });
    }
    call.tx.update::<NetworkAcl>(&old.account_id, &old.id, |acl| acl.associations.retain(|other| other.id != association_id));
    let new_id = call.tx.new_id(NETWORK_ACL_ASSOCIATION.prefix);
    let association = NetworkAclAssociation { id: new_id.clone(), ..association };
    call.tx.update::<NetworkAcl>(&new.account_id, &id, |acl| acl.associations.push(association));
    Ok(ReplaceNetworkAclAssociationResult { new_association_id: Some(new_id) })
}

/// Puts a new subnet under the default ACL of its VPC.
pub fn associate(tx: &mut Tx<'_>, account: &str, vpc_id: &str, subnet_id: &str) {
    let association = NetworkAclAssociation { id: tx.new_id(NETWORK_ACL_ASSOCIATION.prefix), subnet_id: subnet_id.to_owned() };
    if let Some(acl) = tx.find::<NetworkAcl>(account, "vpc", vpc_id).into_iter().find(|acl| acl.is_default) {
        tx.update::<NetworkAcl>(account, &acl.id, |acl| acl.associations.push(association));
    }
}

/// DescribeNetworkAcls.
///
/// # Errors
/// `InvalidNetworkAclID.NotFound` and those of filters and pages.
pub fn describe_network_acls(call: &mut Call<'_>, request: DescribeNetworkAclsRequest) -> Result<DescribeNetworkAclsResult, ApiError> {
    let names = [
        "association.association-id",
        "association.network-acl-id",
        "association.subnet-id",
        "default",
        "entry.cidr",
        "entry.egress",
        "entry.icmp.code",
        "entry.icmp.type",
        "entry.ipv6-cidr",
        "entry.port-range.from",
        "entry.port-range.to",
        "entry.protocol",
        "entry.rule-action",
        "entry.rule-number",
        "network-acl-id",
        "owner-id",
        "tag",
        "vpc-id",
    ];
    let filters = Filters::new(request.filters, &names)?;
    let page = Page::new("DescribeNetworkAcls", request.max_results, request.next_token.as_deref(), 1000)?;
    let rows = NETWORK_ACL.rows::<NetworkAcl>(call, &request.network_acl_ids)?;
    let passing = rows.into_iter().filter(|(id, acl)| {
        let flag = |on| if on { "true" } else { "false" };
        let association = |test: &dyn Fn(&NetworkAclAssociation) -> bool| acl.associations.iter().any(test);
        let entry = |test: &dyn Fn(&NetworkAclEntry) -> bool| acl.entries.iter().any(test);
        filters.pass(&tag::of(&call.tx, call.account(), id), |name, test| match name {
            "association.association-id" => association(&|association| test(&association.id)),
            "association.network-acl-id" => !acl.associations.is_empty() && test(id),
            "association.subnet-id" => association(&|association| test(&association.subnet_id)),
            "default" => test(flag(acl.is_default)),
            "entry.cidr" => entry(&|entry| matches!(entry.cidr, IpNet::V4(_)) && test(&entry.cidr.to_string())),
            "entry.egress" => entry(&|entry| test(flag(entry.egress))),
            "entry.icmp.code" => entry(&|entry| entry.icmp.is_some_and(|(_, code)| test(&code.to_string()))),
            "entry.icmp.type" => entry(&|entry| entry.icmp.is_some_and(|(kind, _)| test(&kind.to_string()))),
            "entry.ipv6-cidr" => entry(&|entry| matches!(entry.cidr, IpNet::V6(_)) && test(&entry.cidr.to_string())),
            "entry.port-range.from" => entry(&|entry| entry.ports.is_some_and(|(from, _)| test(&from.to_string()))),
            "entry.port-range.to" => entry(&|entry| entry.ports.is_some_and(|(_, to)| test(&to.to_string()))),
            // The protocol of an entry is a number, but the filter also takes its name.
            "entry.protocol" => entry(&|entry| test(&number(entry.protocol)) || test(&security_group_rule::protocol_name(entry.protocol))),
            "entry.rule-action" => entry(&|entry| test(action(entry))),
            "entry.rule-number" => entry(&|entry| test(&entry.number.to_string())),
            "network-acl-id" => test(id),
            "owner-id" => test(&acl.account_id),
            "vpc-id" => test(&acl.vpc_id),
            _ => false,
        })
    });
    let (page, next_token) = page.take(passing);
    Ok(DescribeNetworkAclsResult { network_acls: page.iter().map(|acl| shape(call, acl)).collect(), next_token })
}

fn number(protocol: Option<u8>) -> String {
    protocol.map_or_else(|| "-1".to_owned(), |number| number.to_string())
}

fn action(entry: &NetworkAclEntry) -> &'static str {
    if entry.allow { "allow" } else { "deny" }
}

fn shape(call: &Call<'_>, acl: &NetworkAcl) -> shapes::NetworkAcl {
    let association = |association: &NetworkAclAssociation| shapes::NetworkAclAssociation {
        network_acl_association_id: Some(association.id.clone()),
        network_acl_id: Some(acl.id.clone()),
        subnet_id: Some(association.subnet_id.clone()),
    };
    let entry = |entry: &NetworkAclEntry| shapes::NetworkAclEntry {
        cidr_block: matches!(entry.cidr, IpNet::V4(_)).then(|| entry.cidr.to_string()),
        ipv6_cidr_block: matches!(entry.cidr, IpNet::V6(_)).then(|| entry.cidr.to_string()),
        icmp_type_code: entry.icmp.map(|(kind, code)| IcmpTypeCode { r#type: Some(kind.into()), code: Some(code.into()) }),
        egress: Some(entry.egress),
        protocol: Some(number(entry.protocol)),
        rule_action: Some(action(entry).to_owned()),
        rule_number: Some(entry.number.into()),
        port_range: entry.ports.map(|(from, to)| PortRange { from: Some(from.into()), to: Some(to.into()) }),
    };
    shapes::NetworkAcl {
        network_acl_id: Some(acl.id.clone()),
        vpc_id: Some(acl.vpc_id.clone()),
        owner_id: Some(acl.account_id.clone()),
        is_default: Some(acl.is_default),
        associations: acl.associations.iter().map(association).collect(),
        entries: acl.entries.iter().map(entry).collect(),
        tags: tag::shapes(&tag::of(&call.tx, &acl.account_id, &acl.id)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::shapes::Filter;

    #[test]
    fn a_default_acl_lets_everything_through_and_holds_every_subnet() {
        let fixture = Fixture::new();
        let filters = vec![Filter { name: Some("default".into()), values: vec!["true".into()] }];
        let request = DescribeNetworkAclsRequest { filters, ..Default::default() };
        let acls = fixture.call(ALICE, |call| describe_network_acls(call, request)).unwrap().network_acls;
        let [acl] = acls.as_slice() else { panic!() };
        assert_eq!(acl.associations.len(), 3);
        let rules: Vec<_> = acl
            .entries
            .iter()
            .map(|entry| (entry.egress.unwrap(), entry.rule_number.unwrap(), entry.rule_action.as_deref().unwrap()))
            .collect();
        assert_eq!(rules, [(true, 100, "allow"), (true, 32767, "deny"), (false, 100, "allow"), (false, 32767, "deny")]);
        let request = DescribeNetworkAclsRequest { network_acl_ids: vec![acl.network_acl_id.clone().unwrap()], ..Default::default() };
        assert_eq!(fixture.refusal(BOB, |call| describe_network_acls(call, request)), "InvalidNetworkAclID.NotFound");
    }
    fn new_acl(fixture: &Fixture, token: Option<&str>) -> shapes::NetworkAcl {
        let request = CreateNetworkAclRequest {
            vpc_id: Some(fixture.default_vpc(ALICE).id),
            client_token: token.map(str::to_owned),
            ..Default::default()
        };
        fixture.call(ALICE, |call| create_network_acl(call, request)).unwrap().network_acl.unwrap()
    }

    fn replace(association: &str, acl: &str) -> ReplaceNetworkAclAssociationRequest {
        ReplaceNetworkAclAssociationRequest {
            association_id: Some(association.into()),
            network_acl_id: Some(acl.into()),
            ..Default::default()
        }
    }

    fn delete(acl: &str) -> DeleteNetworkAclRequest {
        DeleteNetworkAclRequest { network_acl_id: Some(acl.into()), dry_run: None }
    }

    #[test]
    fn a_new_acl_lets_nothing_through_and_holds_no_subnet() {
        let fixture = Fixture::new();
        let acl = new_acl(&fixture, None);
        assert_eq!(acl.is_default, Some(false));
        assert!(acl.associations.is_empty());
        assert!(acl.entries.iter().all(|entry| entry.rule_number == Some(32767) && entry.rule_action.as_deref() == Some("deny")));
        assert_eq!(acl.entries.len(), 2);
    }

    #[test]
    fn a_repeated_token_makes_one_acl() {
        let fixture = Fixture::new();
        assert_eq!(new_acl(&fixture, Some("t")).network_acl_id, new_acl(&fixture, Some("t")).network_acl_id);
    }

    #[test]
    fn a_subnet_is_always_under_exactly_one_acl() {
        let fixture = Fixture::new();
        let (subnet, acl) = (fixture.default_subnet(ALICE), new_acl(&fixture, None).network_acl_id.unwrap());
        let of = |fixture: &Fixture| {
            let tx = fixture.world.begin();
            let all = tx.list::<NetworkAcl>(ALICE).flat_map(|acl| acl.associations.iter().map(|held| (acl.id.clone(), held.clone())));
            let held: Vec<_> = all.filter(|(_, held)| held.subnet_id == subnet.id).collect();
            let [(acl, held)] = held.as_slice() else { panic!("{held:?}") };
            assert_eq!(of_subnet(&tx, &subnet).unwrap().id, *acl);
            (acl.clone(), held.id.clone())
        };
        let (default, association) = of(&fixture);
        let moved = fixture.call(ALICE, |call| replace_network_acl_association(call, replace(&association, &acl))).unwrap();
        let moved = moved.new_association_id.unwrap();
        assert_eq!(of(&fixture), (acl.clone(), moved.clone()));
        let old = fixture.refusal(ALICE, |call| replace_network_acl_association(call, replace(&association, &acl)));
        assert_eq!(old, "InvalidAssociationID.NotFound");
        let again = fixture.call(ALICE, |call| replace_network_acl_association(call, replace(&moved, &acl))).unwrap();
        assert_eq!(again.new_association_id.as_ref(), Some(&moved), "it is where it shall be");
        assert_eq!(fixture.refusal(ALICE, |call| delete_network_acl(call, delete(&acl))), "DependencyViolation");
        fixture.call(ALICE, |call| replace_network_acl_association(call, replace(&moved, &default))).unwrap();
        fixture.call(ALICE, |call| delete_network_acl(call, delete(&acl))).unwrap();
        assert_eq!(of(&fixture).0, default);
        assert_eq!(fixture.refusal(ALICE, |call| delete_network_acl(call, delete(&default))), "InvalidParameterValue");
    }

    #[test]
    fn acls_of_other_vpcs_and_accounts_are_refused() {
        let fixture = Fixture::new();
        let request = shapes::CreateVpcRequest { cidr_block: Some("10.0.0.0/16".into()), ..Default::default() };
        let vpc = fixture.call(ALICE, |call| super::super::vpc::create_vpc(call, request)).unwrap().vpc.unwrap().vpc_id.unwrap();
        let elsewhere = fixture.world.begin().find::<NetworkAcl>(ALICE, "vpc", &vpc)[0].id.clone();
        let subnet = fixture.default_subnet(ALICE);
        let association = of_subnet(&fixture.world.begin(), &subnet).unwrap().associations[0].id.clone();
        let refused = fixture.refusal(ALICE, |call| replace_network_acl_association(call, replace(&association, &elsewhere)));
        assert_eq!(refused, "InvalidParameterValue");
        let own = new_acl(&fixture, None).network_acl_id.unwrap();
        let refused = fixture.refusal(BOB, |call| replace_network_acl_association(call, replace(&association, &own)));
        assert_eq!(refused, "InvalidAssociationID.NotFound");
        assert_eq!(fixture.refusal(BOB, |call| delete_network_acl(call, delete(&own))), "InvalidNetworkAclID.NotFound");
        let request = CreateNetworkAclRequest { vpc_id: Some(vpc), ..Default::default() };
        assert_eq!(fixture.refusal(BOB, |call| create_network_acl(call, request)), "InvalidVpcID.NotFound");
    }
}
