//! Security groups: stateful firewalls of network interfaces.
//!
//! A group is an unordered union of allows, its rules ([`super::security_group_rule`]); what none allows is dropped. Every VPC has a
//! group named `default`, which lets its own members in and everything out, and which cannot be deleted.

use std::sync::Arc;

use ipnet::Ipv4Net;

use super::filter::{Filters, Page};
use super::id::{SECURITY_GROUP, SECURITY_GROUP_RULE};
use super::security_group_rule::{peering_shape, protocol_name};
use super::{tag, vpc};
use crate::error::ApiError;
use crate::model::{NetworkInterface, RuleRemote, SecurityGroup, SecurityGroupRule};
use crate::shapes::{
    self, CreateSecurityGroupRequest, CreateSecurityGroupResult, DeleteSecurityGroupRequest, DeleteSecurityGroupResult,
    DescribeSecurityGroupsRequest, DescribeSecurityGroupsResult, IpPermission, IpRange, Ipv6Range, PrefixListId, UserIdGroupPair,
};
use crate::world::{Call, Tx};

/// The name of the group that comes with a VPC.
pub const DEFAULT: &str = "default";
/// The most groups of an account.
const MOST_GROUPS: usize = 2500;
/// The longest name and the longest description.
pub(super) const LONGEST_TEXT: usize = 255;

/// CreateSecurityGroup. A new group lets everything out and nothing in.
///
/// # Errors
/// `InvalidGroup.Duplicate`, `InvalidParameterValue` for a bad or reserved name, `SecurityGroupLimitExceeded`, those of tags.
pub fn create_security_group(call: &mut Call<'_>, request: CreateSecurityGroupRequest) -> Result<CreateSecurityGroupResult, ApiError> {
    let name = request.group_name.filter(|name| !name.is_empty()).ok_or_else(|| ApiError::missing_parameter("GroupName"))?;
    let description = request.description.filter(|text| !text.is_empty()).ok_or_else(|| ApiError::missing_parameter("GroupDescription"))?;
    check_text("groupName", &name)?;
    check_text("GroupDescription", &description)?;
    if name.starts_with("sg-") {
        return Err(ApiError::invalid_value("invalid value for parameter groupName: group names may not be in the format sg-*"));
    }
    if name.eq_ignore_ascii_case(DEFAULT) {
        return Err(ApiError::invalid_value(format!("Cannot use reserved security group name: {name}")));
    }
    let vpc = vpc::named_or_default(call, request.vpc_id.as_deref())?;
    if call.find::<SecurityGroup>("vpc", &vpc.id).iter().any(|group| group.name.eq_ignore_ascii_case(&name)) {
        let message = format!("The security group '{name}' already exists for VPC '{}'", vpc.id);
        return Err(ApiError::new("InvalidGroup.Duplicate", message));
    }
    if call.list::<SecurityGroup>().count() >= MOST_GROUPS {
        let message = "The maximum number of security groups has been reached.";
        return Err(ApiError::new("SecurityGroupLimitExceeded", message));
    }
    let tags = tag::specified(request.tag_specifications, &SECURITY_GROUP)?;
    let account = vpc.account_id.clone();
    let rules = vec![everything_out(&mut call.tx)];
    let id = insert(&mut call.tx, &account, &vpc.id, name, description, rules);
    tag::set(&mut call.tx, &account, &SECURITY_GROUP, &id, tags.clone());
    Ok(CreateSecurityGroupResult {
        security_group_arn: Some(SECURITY_GROUP.arn(call.region, &account, &id)),
        group_id: Some(id),
        tags: tag::shapes(&tags),
    })
}

/// Refuses what EC2 allows in no name and no description.
///
/// # Errors
/// `InvalidParameterValue`.
pub(super) fn check_text(parameter: &str, text: &str) -> Result<(), ApiError> {
    let allowed = |character: char| character.is_ascii_alphanumeric() || " ._-:/()#,@[]+=&;{}!$*".contains(character);
    if text.len() > LONGEST_TEXT {
        return Err(ApiError::invalid_value(format!(
            "Value for parameter {parameter} is invalid. It has more than {LONGEST_TEXT} characters."
        )));
    }
    if !text.chars().all(allowed) {
        let set = "a-z, A-Z, 0-9, spaces, and ._-:/()#,@[]+=&;{}!$*";
        let message = format!("Value ({text}) for parameter {parameter} is invalid. Valid characters: {set}");
        return Err(ApiError::invalid_value(message));
    }
    Ok(())
}

/// Gives a VPC its default group.
pub fn default_insert(tx: &mut Tx<'_>, account: &str, vpc_id: &str) {
    let description = "default VPC security group".to_owned();
    let out = everything_out(tx);
    let id = insert(tx, account, vpc_id, DEFAULT.to_owned(), description, vec![out]);
    let remote = RuleRemote::Group { account_id: account.to_owned(), group_id: id.clone(), peering: None };
    let rule_id = tx.new_id(SECURITY_GROUP_RULE.prefix);
    let members_in =
        SecurityGroupRule { id: rule_id, egress: false, protocol: None, from_port: -1, to_port: -1, remote, description: None };
    tx.update::<SecurityGroup>(account, &id, |group| group.rules.push(members_in));
}

fn everything_out(tx: &mut Tx<'_>) -> SecurityGroupRule {
    let id = tx.new_id(SECURITY_GROUP_RULE.prefix);
    let remote = RuleRemote::Ipv4(Ipv4Net::default());
    SecurityGroupRule { id, egress: true, protocol: None, from_port: -1, to_port: -1, remote, description: None }
}

fn insert(tx: &mut Tx<'_>, account: &str, vpc_id: &str, name: String, description: String, rules: Vec<SecurityGroupRule>) -> String {
    let id = tx.new_id(SECURITY_GROUP.prefix);
    let (account_id, vpc_id) = (account.to_owned(), vpc_id.to_owned());
    tx.put(SecurityGroup { account_id, id: id.clone(), vpc_id, name, description, rules });
    id
}

/// The default group of a VPC.
pub fn default_group(tx: &Tx<'_>, account: &str, vpc_id: &str) -> Option<Arc<SecurityGroup>> {
    tx.find::<SecurityGroup>(account, "vpc", vpc_id).into_iter().find(|group| group.name == DEFAULT)
}

/// The group that a request names by id, or by its name in the default VPC.
///
/// # Errors
/// `InvalidGroup.NotFound`, `InvalidGroupId.Malformed`, `MissingParameter` for neither.
pub fn named(call: &Call<'_>, id: Option<&str>, name: Option<&str>) -> Result<Arc<SecurityGroup>, ApiError> {
    match (id, name) {
        (Some(_), Some(_)) => Err(ApiError::invalid_combination("The parameters groupName and groupId cannot be used together")),
        (Some(id), None) => SECURITY_GROUP.row(call, id),
        (None, Some(name)) => {
            let vpc = vpc::named_or_default(call, None)?;
            let named = |group: &Arc<SecurityGroup>| group.name.eq_ignore_ascii_case(name);
            let not_found = || {
                let message = format!("The security group '{name}' does not exist in default VPC '{}'", vpc.id);
                ApiError::new("InvalidGroup.NotFound", message)
            };
            call.find::<SecurityGroup>("vpc", &vpc.id).into_iter().find(named).ok_or_else(not_found)
        }
        (None, None) => Err(ApiError::new("MissingParameter", "The request must contain the parameter groupName or groupId")),
    }
}

/// DeleteSecurityGroup.
///
/// # Errors
/// `CannotDelete` for a default group, `DependencyViolation` while an interface or a rule of another group names it.
pub fn delete_security_group(call: &mut Call<'_>, request: DeleteSecurityGroupRequest) -> Result<DeleteSecurityGroupResult, ApiError> {
    let group = named(call, request.group_id.as_deref(), request.group_name.as_deref())?;
    if group.name == DEFAULT {
        let message = format!("the specified group: \"{}\" name: \"default\" cannot be deleted by a user", group.id);
        return Err(ApiError::new("CannotDelete", message));
    }
    let names = |other: &Arc<SecurityGroup>| other.id != group.id && other.rules.iter().any(|rule| refers_to(rule, &group.id));
    if !call.find::<NetworkInterface>("group", &group.id).is_empty() || call.find::<SecurityGroup>("vpc", &group.vpc_id).iter().any(names) {
        return Err(ApiError::dependency(format!("resource {} has a dependent object", group.id)));
    }
    remove(&mut call.tx, &group);
    Ok(DeleteSecurityGroupResult { r#return: Some(true), group_id: Some(group.id.clone()) })
}

fn refers_to(rule: &SecurityGroupRule, id: &str) -> bool {
    matches!(&rule.remote, RuleRemote::Group { group_id, .. } if group_id == id)
}

/// Takes a group away, with the tags of its rules.
pub fn remove(tx: &mut Tx<'_>, group: &SecurityGroup) {
    for rule in &group.rules {
        tag::remove(tx, &group.account_id, &rule.id);
    }
    tag::remove(tx, &group.account_id, &group.id);
    tx.delete::<SecurityGroup>(&group.account_id, &group.id);
}

/// DescribeSecurityGroups.
///
/// # Errors
/// `InvalidGroup.NotFound` and those of filters and pages.
pub fn describe_security_groups(
    call: &mut Call<'_>,
    request: DescribeSecurityGroupsRequest,
) -> Result<DescribeSecurityGroupsResult, ApiError> {
    let filters = Filters::new(request.filters, NAMES)?;
    let page = Page::new("DescribeSecurityGroups", request.max_results, request.next_token.as_deref(), 1000)?;
    let mut ids = request.group_ids;
    for name in &request.group_names {
        ids.push(named(call, None, Some(name))?.id.clone());
    }
    let rows = SECURITY_GROUP.rows::<SecurityGroup>(call, &ids)?;
    let passing = rows.into_iter().filter(|(id, group)| {
        filters.pass(&tag::of(&call.tx, call.account(), id), |name, test| match name {
            "description" => test(&group.description),
            "group-id" => test(id),
            "group-name" => test(&group.name),
            "owner-id" => test(&group.account_id),
            "vpc-id" => test(&group.vpc_id),
            _ => {
                let (egress, field) = match name.strip_prefix("egress.") {
                    Some(field) => (true, field),
                    None => (false, name),
                };
                let rules = || group.rules.iter().filter(|rule| rule.egress == egress);
                rules().any(|rule| rule_field(call, rule, field, test))
            }
        })
    });
    let (page, next_token) = page.take(passing);
    Ok(DescribeSecurityGroupsResult { security_groups: page.iter().map(|group| shape(call, group)).collect(), next_token })
}

const NAMES: &[&str] = &[
    "description",
    "egress.ip-permission.cidr",
    "egress.ip-permission.from-port",
    "egress.ip-permission.group-id",
    "egress.ip-permission.group-name",
    "egress.ip-permission.ipv6-cidr",
    "egress.ip-permission.prefix-list-id",
    "egress.ip-permission.protocol",
    "egress.ip-permission.to-port",
    "egress.ip-permission.user-id",
    "group-id",
    "group-name",
    "ip-permission.cidr",
    "ip-permission.from-port",
    "ip-permission.group-id",
    "ip-permission.group-name",
    "ip-permission.ipv6-cidr",
    "ip-permission.prefix-list-id",
    "ip-permission.protocol",
    "ip-permission.to-port",
    "ip-permission.user-id",
    "owner-id",
    "tag",
    "vpc-id",
];

fn rule_field(call: &Call<'_>, rule: &SecurityGroupRule, field: &str, test: &dyn Fn(&str) -> bool) -> bool {
    match (field, &rule.remote) {
        ("ip-permission.from-port", _) => test(&rule.from_port.to_string()),
        ("ip-permission.to-port", _) => test(&rule.to_port.to_string()),
        ("ip-permission.protocol", _) => {
            test(&protocol_name(rule.protocol)) || rule.protocol.is_some_and(|number| test(&number.to_string()))
        }
        ("ip-permission.cidr", RuleRemote::Ipv4(cidr)) => test(&cidr.to_string()),
        ("ip-permission.ipv6-cidr", RuleRemote::Ipv6(cidr)) => test(&cidr.to_string()),
        ("ip-permission.group-id", RuleRemote::Group { group_id, .. }) => test(group_id),
        ("ip-permission.user-id", RuleRemote::Group { account_id, .. }) => test(account_id),
        ("ip-permission.group-name", RuleRemote::Group { group_id, .. }) => {
            call.get::<SecurityGroup>(group_id).is_some_and(|group| test(&group.name))
        }
        ("ip-permission.prefix-list-id", RuleRemote::PrefixList(id)) => test(id),
        _ => false,
    }
}

fn shape(call: &Call<'_>, group: &SecurityGroup) -> shapes::SecurityGroup {
    shapes::SecurityGroup {
        group_id: Some(group.id.clone()),
        group_name: Some(group.name.clone()),
        description: Some(group.description.clone()),
        owner_id: Some(group.account_id.clone()),
        vpc_id: Some(group.vpc_id.clone()),
        security_group_arn: Some(SECURITY_GROUP.arn(call.region, &group.account_id, &group.id)),
        ip_permissions: permissions(&call.tx, group, group.rules.iter().filter(|rule| !rule.egress)),
        ip_permissions_egress: permissions(&call.tx, group, group.rules.iter().filter(|rule| rule.egress)),
        tags: tag::shapes(&tag::of(&call.tx, &group.account_id, &group.id)),
    }
}

/// Rules as EC2 shows them in a group: joined by protocol and ports, in the order in which they came.
pub(super) fn permissions<'a>(
    tx: &Tx<'_>,
    group: &SecurityGroup,
    rules: impl IntoIterator<Item = &'a SecurityGroupRule>,
) -> Vec<IpPermission> {
    let mut all: Vec<IpPermission> = Vec::new();
    for rule in rules {
        let ip_protocol = Some(protocol_name(rule.protocol));
        // A protocol without ports shows none.
        let (from_port, to_port) = match rule.protocol {
            Some(1 | 6 | 17 | 58) => (Some(rule.from_port), Some(rule.to_port)),
            _ => (None, None),
        };
        let same = |other: &IpPermission| other.ip_protocol == ip_protocol && other.from_port == from_port && other.to_port == to_port;
        let place = all.iter().position(same).unwrap_or(all.len());
        if place == all.len() {
            all.push(IpPermission { ip_protocol, from_port, to_port, ..Default::default() });
        }
        let Some(permission) = all.get_mut(place) else { continue };
        let description = rule.description.clone();
        match &rule.remote {
            RuleRemote::Ipv4(cidr) => permission.ip_ranges.push(IpRange { cidr_ip: Some(cidr.to_string()), description }),
            RuleRemote::Ipv6(cidr) => permission.ipv6_ranges.push(Ipv6Range { cidr_ipv6: Some(cidr.to_string()), description }),
            RuleRemote::Group { account_id, group_id, peering } => {
                let peering = peering.as_ref().map(|peering| peering_shape(tx, &group.vpc_id, peering));
                permission.user_id_group_pairs.push(UserIdGroupPair {
                    group_id: Some(group_id.clone()),
                    user_id: Some(account_id.clone()),
                    description,
                    vpc_id: peering.as_ref().map(|(vpc_id, _, _)| vpc_id.clone()),
                    vpc_peering_connection_id: peering.as_ref().map(|(_, id, _)| id.clone()),
                    peering_status: peering.map(|(_, _, state)| state),
                    ..Default::default()
                });
            }
            RuleRemote::PrefixList(id) => permission.prefix_list_ids.push(PrefixListId { prefix_list_id: Some(id.clone()), description }),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::resource::network_interface;
    use crate::resource::security_group_rule::authorize_security_group_ingress;
    use crate::shapes::{AuthorizeSecurityGroupIngressRequest, Filter};

    fn create(name: &str) -> CreateSecurityGroupRequest {
        CreateSecurityGroupRequest { group_name: Some(name.into()), description: Some("a group".into()), ..Default::default() }
    }

    fn new_group(fixture: &Fixture, name: &str) -> String {
        fixture.call(ALICE, |call| create_security_group(call, create(name))).unwrap().group_id.unwrap()
    }

    fn delete(id: &str) -> DeleteSecurityGroupRequest {
        DeleteSecurityGroupRequest { group_id: Some(id.into()), ..Default::default() }
    }

    fn described(fixture: &Fixture, id: &str) -> shapes::SecurityGroup {
        let request = DescribeSecurityGroupsRequest { group_ids: vec![id.into()], ..Default::default() };
        fixture.call(ALICE, |call| describe_security_groups(call, request)).unwrap().security_groups.remove(0)
    }

    #[test]
    fn a_new_group_lets_everything_out_and_nothing_in() {
        let fixture = Fixture::new();
        let group = described(&fixture, &new_group(&fixture, "web"));
        assert!(group.ip_permissions.is_empty());
        let [out] = group.ip_permissions_egress.as_slice() else { panic!() };
        assert_eq!((out.ip_protocol.as_deref(), out.from_port, out.to_port), (Some("-1"), None, None));
        assert_eq!(out.ip_ranges[0].cidr_ip.as_deref(), Some("0.0.0.0/0"));
        assert_eq!(group.security_group_arn.unwrap(), format!("arn:aws:ec2:us-east-1:{ALICE}:security-group/{}", group.group_id.unwrap()));
    }

    #[test]
    fn a_default_group_lets_its_members_in() {
        let fixture = Fixture::new();
        let vpc_id = fixture.default_vpc(ALICE).id;
        let id = default_group(&fixture.world.begin(), ALICE, &vpc_id).unwrap().id.clone();
        let group = described(&fixture, &id);
        assert_eq!(group.ip_permissions[0].user_id_group_pairs[0].group_id.as_ref(), Some(&id));
        assert_eq!(fixture.refusal(ALICE, |call| delete_security_group(call, delete(&id))), "CannotDelete");
    }

    #[test]
    fn names_are_unique_in_a_vpc_whatever_their_case() {
        let fixture = Fixture::new();
        new_group(&fixture, "web");
        assert_eq!(fixture.refusal(ALICE, |call| create_security_group(call, create("WEB"))), "InvalidGroup.Duplicate");
        fixture.call(BOB, |call| create_security_group(call, create("web"))).unwrap();
        for name in ["default", "Default", "sg-web", "käse", &"x".repeat(256)] {
            assert_eq!(fixture.refusal(ALICE, |call| create_security_group(call, create(name))), "InvalidParameterValue", "{name}");
        }
        let foreign = CreateSecurityGroupRequest { vpc_id: Some(fixture.default_vpc(BOB).id), ..create("other") };
        assert_eq!(fixture.refusal(ALICE, |call| create_security_group(call, foreign)), "InvalidVpcID.NotFound");
    }

    #[test]
    fn a_group_in_use_cannot_be_deleted() {
        let fixture = Fixture::new();
        let (used, named, naming) = (new_group(&fixture, "used"), new_group(&fixture, "named"), new_group(&fixture, "naming"));
        let subnet = fixture.default_subnet(ALICE);
        let interface = fixture.interface(ALICE, &subnet.id, None).unwrap();
        fixture
            .call(ALICE, |call| {
                call.tx.update::<NetworkInterface>(ALICE, &interface.id, |row| row.security_group_ids = vec![used.clone()]);
                Ok(())
            })
            .unwrap();
        let pair = UserIdGroupPair { group_id: Some(named.clone()), ..Default::default() };
        let permission = IpPermission { ip_protocol: Some("-1".into()), user_id_group_pairs: vec![pair], ..Default::default() };
        let request =
            AuthorizeSecurityGroupIngressRequest { group_id: Some(naming.clone()), ip_permissions: vec![permission], ..Default::default() };
        fixture.call(ALICE, |call| authorize_security_group_ingress(call, request)).unwrap();
        for id in [&used, &named] {
            assert_eq!(fixture.refusal(ALICE, |call| delete_security_group(call, delete(id))), "DependencyViolation");
        }
        assert_eq!(fixture.refusal(BOB, |call| delete_security_group(call, delete(&naming))), "InvalidGroup.NotFound");
        fixture.call(ALICE, |call| delete_security_group(call, delete(&naming))).unwrap();
        fixture.call(ALICE, |call| delete_security_group(call, delete(&named))).unwrap();
        fixture
            .call(ALICE, |call| {
                network_interface::remove(&mut call.tx, ALICE, &interface.id);
                delete_security_group(call, delete(&used))
            })
            .unwrap();
    }

    #[test]
    fn describes_find_by_name_and_by_rule() {
        let fixture = Fixture::new();
        let id = new_group(&fixture, "web");
        let request = AuthorizeSecurityGroupIngressRequest {
            group_id: Some(id.clone()),
            ip_protocol: Some("tcp".into()),
            from_port: Some(443),
            to_port: Some(443),
            cidr_ip: Some("192.0.2.0/24".into()),
            ..Default::default()
        };
        fixture.call(ALICE, |call| authorize_security_group_ingress(call, request)).unwrap();
        let found = |name: &str, value: &str| {
            let filters = vec![Filter { name: Some(name.into()), values: vec![value.into()] }];
            let request = DescribeSecurityGroupsRequest { filters, ..Default::default() };
            fixture.call(ALICE, |call| describe_security_groups(call, request)).unwrap().security_groups.len()
        };
        assert_eq!(found("group-name", "web"), 1);
        assert_eq!(found("ip-permission.cidr", "192.0.2.0/24"), 1);
        assert_eq!(found("ip-permission.protocol", "tcp"), 1);
        assert_eq!(found("ip-permission.from-port", "443"), 1);
        assert_eq!(found("egress.ip-permission.cidr", "192.0.2.0/24"), 0);
        assert_eq!(found("egress.ip-permission.cidr", "0.0.0.0/0"), 2);
        assert_eq!(found("ip-permission.group-name", "default"), 1);
        let request = DescribeSecurityGroupsRequest { group_names: vec!["web".into()], ..Default::default() };
        let by_name = fixture.call(ALICE, |call| describe_security_groups(call, request)).unwrap();
        assert_eq!(by_name.security_groups[0].group_id.as_ref(), Some(&id));
        let request = DescribeSecurityGroupsRequest { group_names: vec!["none".into()], ..Default::default() };
        assert_eq!(fixture.refusal(ALICE, |call| describe_security_groups(call, request)), "InvalidGroup.NotFound");
    }
}
