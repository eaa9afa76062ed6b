//! References between security groups of peered VPCs: who names a group from outside, and which rules name what is gone.
//!
//! A rule is stale when the VPC of the group that it names is no longer peered with its own, or when that group was deleted. It stays
//! until its owner revokes it, and lets nobody through.

use super::filter::Page;
use super::id::{SECURITY_GROUP, VPC};
use super::{security_group, vpc_peering_connection};
use crate::error::ApiError;
use crate::model::{RulePeering, RuleRemote, SecurityGroup, SecurityGroupRule, Vpc};
use crate::shapes::{
    DescribeSecurityGroupReferencesRequest, DescribeSecurityGroupReferencesResult, DescribeStaleSecurityGroupsRequest,
    DescribeStaleSecurityGroupsResult, IpPermission, SecurityGroupReference, StaleIpPermission, StaleSecurityGroup,
};
use crate::world::{Call, Tx};

/// The group of another VPC that a rule names: its owner, its id, and the way to it.
fn outside(rule: &SecurityGroupRule) -> Option<(&str, &str, &RulePeering)> {
    match &rule.remote {
        RuleRemote::Group { account_id, group_id, peering: Some(peering) } => Some((account_id, group_id, peering)),
        _ => None,
    }
}

fn is_stale(tx: &Tx<'_>, group: &SecurityGroup, rule: &SecurityGroupRule) -> bool {
    outside(rule).is_some_and(|(account, id, peering)| {
        vpc_peering_connection::between(tx, &group.vpc_id, &peering.vpc_id).is_none() || tx.get::<SecurityGroup>(account, id).is_none()
    })
}

/// DescribeStaleSecurityGroups.
///
/// # Errors
/// `InvalidVpcID.NotFound` and those of pages.
pub fn describe_stale_security_groups(
    call: &mut Call<'_>,
    request: DescribeStaleSecurityGroupsRequest,
) -> Result<DescribeStaleSecurityGroupsResult, ApiError> {
    let vpc_id = VPC.required(request.vpc_id, "VpcId")?;
    VPC.row::<Vpc>(call, &vpc_id)?;
    let page = Page::new("DescribeStaleSecurityGroups", request.max_results, request.next_token.as_deref(), 255)?;
    let stale = call.find::<SecurityGroup>("vpc", &vpc_id).into_iter().filter_map(|group| {
        let side = |egress: bool| {
            let rules = group.rules.iter().filter(|rule| rule.egress == egress && is_stale(&call.tx, &group, rule));
            security_group::permissions(&call.tx, &group, rules).into_iter().map(stale_shape).collect::<Vec<_>>()
        };
        let (ingress, egress) = (side(false), side(true));
        let shape = StaleSecurityGroup {
            group_id: Some(group.id.clone()),
            group_name: Some(group.name.clone()),
            description: Some(group.description.clone()),
            vpc_id: Some(group.vpc_id.clone()),
            stale_ip_permissions: ingress,
            stale_ip_permissions_egress: egress,
        };
        let any = !shape.stale_ip_permissions.is_empty() || !shape.stale_ip_permissions_egress.is_empty();
        any.then(|| (group.id.clone(), shape))
    });
    let (stale_security_group_set, next_token) = page.take(stale);
    Ok(DescribeStaleSecurityGroupsResult { stale_security_group_set, next_token })
}

fn stale_shape(permission: IpPermission) -> StaleIpPermission {
    StaleIpPermission {
        from_port: permission.from_port,
        to_port: permission.to_port,
        ip_protocol: permission.ip_protocol,
        user_id_group_pairs: permission.user_id_group_pairs,
        ..Default::default()
    }
}

/// DescribeSecurityGroupReferences: the VPCs on the other side of a peering connection whose rules name these groups.
///
/// # Errors
/// `InvalidGroup.NotFound`.
pub fn describe_security_group_references(
    call: &mut Call<'_>,
    request: DescribeSecurityGroupReferencesRequest,
) -> Result<DescribeSecurityGroupReferencesResult, ApiError> {
    let mut security_group_reference_set = Vec::new();
    for id in &request.group_id {
        let group = SECURITY_GROUP.row::<SecurityGroup>(call, id)?;
        for connection in vpc_peering_connection::active(&call.tx, &group.vpc_id) {
            let other = vpc_peering_connection::other(&connection, &group.vpc_id);
            let names = |rule: &SecurityGroupRule| outside(rule).is_some_and(|(_, named, _)| named == group.id);
            let groups = call.tx.find::<SecurityGroup>(&other.account_id, "vpc", &other.vpc_id);
            if groups.iter().any(|group| group.rules.iter().any(names)) {
                security_group_reference_set.push(SecurityGroupReference {
                    group_id: Some(id.clone()),
                    referencing_vpc_id: Some(other.vpc_id.clone()),
                    vpc_peering_connection_id: Some(connection.id.clone()),
                    ..Default::default()
                });
            }
        }
    }
    Ok(DescribeSecurityGroupReferencesResult { security_group_reference_set })
}
