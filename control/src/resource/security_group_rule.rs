//! Rules of security groups: one protocol, one range of ports, one remote side each.
//!
//! A request names rules by permissions, each of which stands for as many rules as it has remote sides, or by the older flat
//! parameters, which stand for one. A rule is the same as another when direction, protocol, ports and remote are; its description
//! does not count. A range of addresses is stored with the bits below its prefix cleared.
//!
//! The quota is counted for each direction and each family of addresses: a block is a rule of its family, a group one of both, a
//! prefix list as many as its largest size.

mod change;

use std::sync::Arc;

pub use change::{
    modify_security_group_rules, update_security_group_rule_descriptions_egress, update_security_group_rule_descriptions_ingress,
};

use ipnet::{Ipv4Net, Ipv6Net};

use super::filter::{Filters, Page};
use super::id::{PREFIX_LIST, SECURITY_GROUP_RULE};
use super::{prefix_list, security_group, tag, vpc_peering_connection};
use crate::error::ApiError;
use crate::model::{AddressFamily, PrefixList, RulePeering, RuleRemote, SecurityGroup, SecurityGroupRule};
use crate::shapes::{
    self, AuthorizeSecurityGroupEgressRequest, AuthorizeSecurityGroupEgressResult, AuthorizeSecurityGroupIngressRequest,
    AuthorizeSecurityGroupIngressResult, DescribeSecurityGroupRulesRequest, DescribeSecurityGroupRulesResult, IpPermission, IpRange,
    ReferencedSecurityGroup, RevokeSecurityGroupEgressRequest, RevokeSecurityGroupEgressResult, RevokeSecurityGroupIngressRequest,
    RevokeSecurityGroupIngressResult, RevokedSecurityGroupRule, TagSpecification, UserIdGroupPair,
};
use crate::world::{Call, Tx};

/// The most rules of a group in one direction and family.
const MOST_RULES: usize = 60;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// The parameters that ingress and egress, authorize and revoke have in common.
#[derive(Default)]
struct Flat {
    ip_protocol: Option<String>,
    from_port: Option<i32>,
    to_port: Option<i32>,
    cidr_ip: Option<String>,
    source_group_name: Option<String>,
    source_group_owner: Option<String>,
}

/// A rule that a request describes.
struct Described {
    protocol: Option<u8>,
    from_port: i32,
    to_port: i32,
    remote: RuleRemote,
    description: Option<String>,
}

impl Described {
    fn is(&self, rule: &SecurityGroupRule) -> bool {
        (self.protocol, self.from_port, self.to_port) == (rule.protocol, rule.from_port, rule.to_port) && self.remote == rule.remote
    }

    fn not_found() -> ApiError {
        ApiError::new("InvalidPermission.NotFound", "The specified rule does not exist in this security group.")
    }

    /// The sentence of EC2's about a rule that is there already.
    fn duplicate(&self) -> ApiError {
        let peer = match &self.remote {
            RuleRemote::Ipv4(cidr) => cidr.to_string(),
            RuleRemote::Ipv6(cidr) => cidr.to_string(),
            RuleRemote::Group { group_id, .. } => group_id.clone(),
            RuleRemote::PrefixList(id) => id.clone(),
        };
        let protocol = match self.protocol {
            None => "ALL".to_owned(),
            protocol => protocol_name(protocol).to_uppercase(),
        };
        let ports = match self.protocol {
            Some(TCP | UDP) => format!(", from port: {}, to port: {}", self.from_port, self.to_port),
            Some(ICMP | ICMPV6) => format!(", type: {}, code: {}", self.from_port, self.to_port),
            _ => String::new(),
        };
        let message = format!("the specified rule \"peer: {peer}, {protocol}{ports}, ALLOW\" already exists");
        ApiError::new("InvalidPermission.Duplicate", message)
    }
}

/// AuthorizeSecurityGroupIngress.
///
/// # Errors
/// `InvalidPermission.Duplicate`, `InvalidParameterValue`, `InvalidGroup.NotFound`, `RulesPerSecurityGroupLimitExceeded`.
pub fn authorize_security_group_ingress(
    call: &mut Call<'_>,
    request: AuthorizeSecurityGroupIngressRequest,
) -> Result<AuthorizeSecurityGroupIngressResult, ApiError> {
    let flat = Flat {
        ip_protocol: request.ip_protocol,
        from_port: request.from_port,
        to_port: request.to_port,
        cidr_ip: request.cidr_ip,
        source_group_name: request.source_security_group_name,
        source_group_owner: request.source_security_group_owner_id,
    };
    let group = security_group::named(call, request.group_id.as_deref(), request.group_name.as_deref())?;
    let security_group_rules = authorize(call, &group, false, request.ip_permissions, flat, request.tag_specifications)?;
    Ok(AuthorizeSecurityGroupIngressResult { r#return: Some(true), security_group_rules })
}

/// AuthorizeSecurityGroupEgress.
///
/// # Errors
/// As [`authorize_security_group_ingress`].
pub fn authorize_security_group_egress(
    call: &mut Call<'_>,
    request: AuthorizeSecurityGroupEgressRequest,
) -> Result<AuthorizeSecurityGroupEgressResult, ApiError> {
    let flat = Flat {
        ip_protocol: request.ip_protocol,
        from_port: request.from_port,
        to_port: request.to_port,
        cidr_ip: request.cidr_ip,
        source_group_name: request.source_security_group_name,
        source_group_owner: request.source_security_group_owner_id,
    };
    let group = security_group::named(call, request.group_id.as_deref(), None)?;
    let security_group_rules = authorize(call, &group, true, request.ip_permissions, flat, request.tag_specifications)?;
    Ok(AuthorizeSecurityGroupEgressResult { r#return: Some(true), security_group_rules })
}

fn authorize(
    call: &mut Call<'_>,
    group: &SecurityGroup,
    egress: bool,
    permissions: Vec<IpPermission>,
    flat: Flat,
    specifications: Vec<TagSpecification>,
) -> Result<Vec<shapes::SecurityGroupRule>, ApiError> {
    let described = describe(call, group, permissions, flat)?;
    // Before the comparison of each with each.
    if described.len() > 2 * MOST_RULES {
        return Err(too_many());
    }
    let tags = tag::specified(specifications, &SECURITY_GROUP_RULE)?;
    let mut changed = SecurityGroup::clone(group);
    let old = changed.rules.len();
    for new in described {
        if changed.rules.iter().any(|rule| rule.egress == egress && new.is(rule)) {
            return Err(new.duplicate());
        }
        changed.rules.push(SecurityGroupRule {
            id: call.tx.new_id(SECURITY_GROUP_RULE.prefix),
            egress,
            protocol: new.protocol,
            from_port: new.from_port,
            to_port: new.to_port,
            remote: new.remote,
            description: new.description,
        });
    }
    if !fits(&call.tx, &changed, None) {
        return Err(too_many());
    }
    let added: Vec<SecurityGroupRule> = changed.rules.iter().skip(old).cloned().collect();
    call.tx.put(changed);
    for rule in &added {
        tag::set(&mut call.tx, &group.account_id, &SECURITY_GROUP_RULE, &rule.id, tags.clone());
    }
    Ok(added.iter().map(|rule| shape(call, group, rule)).collect())
}

fn too_many() -> ApiError {
    let message = "The maximum number of rules per security group has been reached.";
    ApiError::new("RulesPerSecurityGroupLimitExceeded", message)
}

/// Whether the rules of a group are within the quota, with `changed` in place of the prefix list of its id.
pub(super) fn fits(tx: &Tx<'_>, group: &SecurityGroup, changed: Option<&PrefixList>) -> bool {
    let weight = |rule: &SecurityGroupRule, family| match &rule.remote {
        RuleRemote::Ipv4(_) => usize::from(family == AddressFamily::Ipv4),
        RuleRemote::Ipv6(_) => usize::from(family == AddressFamily::Ipv6),
        RuleRemote::Group { .. } => 1,
        RuleRemote::PrefixList(id) => {
            let list = prefix_list::counted(tx, &group.account_id, id, changed).filter(|list| list.family == family);
            list.map_or(0, |list| usize::try_from(list.max_entries).unwrap_or(usize::MAX))
        }
    };
    [false, true].into_iter().all(|egress| {
        let rules = || group.rules.iter().filter(|rule| rule.egress == egress);
        [AddressFamily::Ipv4, AddressFamily::Ipv6]
            .into_iter()
            .all(|family| rules().fold(0_usize, |sum, rule| sum.saturating_add(weight(rule, family))) <= MOST_RULES)
    })
}

/// RevokeSecurityGroupIngress.
///
/// # Errors
/// `InvalidPermission.NotFound`, `InvalidSecurityGroupRuleId.NotFound`, `InvalidParameterValue`.
pub fn revoke_security_group_ingress(
    call: &mut Call<'_>,
    request: RevokeSecurityGroupIngressRequest,
) -> Result<RevokeSecurityGroupIngressResult, ApiError> {
    let flat = Flat {
        ip_protocol: request.ip_protocol,
        from_port: request.from_port,
        to_port: request.to_port,
        cidr_ip: request.cidr_ip,
        source_group_name: request.source_security_group_name,
        source_group_owner: request.source_security_group_owner_id,
    };
    let group = security_group::named(call, request.group_id.as_deref(), request.group_name.as_deref())?;
    let revoked_security_group_rules = revoke(call, &group, false, request.ip_permissions, flat, request.security_group_rule_ids)?;
    Ok(RevokeSecurityGroupIngressResult { r#return: Some(true), revoked_security_group_rules, unknown_ip_permissions: Vec::new() })
}

/// RevokeSecurityGroupEgress.
///
/// # Errors
/// As [`revoke_security_group_ingress`].
pub fn revoke_security_group_egress(
    call: &mut Call<'_>,
    request: RevokeSecurityGroupEgressRequest,
) -> Result<RevokeSecurityGroupEgressResult, ApiError> {
    let flat = Flat {
        ip_protocol: request.ip_protocol,
        from_port: request.from_port,
        to_port: request.to_port,
        cidr_ip: request.cidr_ip,
        source_group_name: request.source_security_group_name,
        source_group_owner: request.source_security_group_owner_id,
    };
    let group = security_group::named(call, request.group_id.as_deref(), None)?;
    let revoked_security_group_rules = revoke(call, &group, true, request.ip_permissions, flat, request.security_group_rule_ids)?;
    Ok(RevokeSecurityGroupEgressResult { r#return: Some(true), revoked_security_group_rules, unknown_ip_permissions: Vec::new() })
}

fn revoke(
    call: &mut Call<'_>,
    group: &SecurityGroup,
    egress: bool,
    permissions: Vec<IpPermission>,
    flat: Flat,
    ids: Vec<String>,
) -> Result<Vec<RevokedSecurityGroupRule>, ApiError> {
    let candidates = || group.rules.iter().filter(|rule| rule.egress == egress);
    let mut revoked: Vec<SecurityGroupRule> = Vec::new();
    let mut add = |rule: &SecurityGroupRule| {
        if !revoked.iter().any(|other| other.id == rule.id) {
            revoked.push(rule.clone());
        }
    };
    if ids.is_empty() {
        for described in describe(call, group, permissions, flat)? {
            add(candidates().find(|rule| described.is(rule)).ok_or_else(Described::not_found)?);
        }
    } else {
        if !permissions.is_empty() || flat.ip_protocol.is_some() || flat.cidr_ip.is_some() || flat.source_group_name.is_some() {
            return Err(ApiError::invalid_combination("Rules are named by their ids or by their permissions, but not by both"));
        }
        SECURITY_GROUP_RULE.check_all(&ids)?;
        for id in &ids {
            let rule = candidates().find(|rule| rule.id == *id);
            add(rule.ok_or_else(|| SECURITY_GROUP_RULE.not_found(id))?);
        }
    }
    call.tx.update::<SecurityGroup>(&group.account_id, &group.id, |group| {
        group.rules.retain(|rule| !revoked.iter().any(|gone| gone.id == rule.id));
    });
    for rule in &revoked {
        tag::remove(&mut call.tx, &group.account_id, &rule.id);
    }
    Ok(revoked.iter().map(|rule| revoked_shape(group, rule)).collect())
}

/// Reads every rule that a request describes.
fn describe(call: &Call<'_>, group: &SecurityGroup, permissions: Vec<IpPermission>, flat: Flat) -> Result<Vec<Described>, ApiError> {
    let is_flat = flat.ip_protocol.is_some() || flat.cidr_ip.is_some() || flat.source_group_name.is_some();
    let permissions = match (is_flat, permissions.is_empty()) {
        (true, false) => {
            let message = "The parameter ipPermissions may not be used with the parameters ipProtocol, cidrIp or sourceSecurityGroupName";
            return Err(ApiError::invalid_combination(message));
        }
        (false, true) => return Err(ApiError::missing_parameter("ipPermissions")),
        (false, false) => permissions,
        (true, true) => flat_permissions(flat)?,
    };
    let mut described = Vec::new();
    for permission in permissions {
        let protocol = parse_protocol(permission.ip_protocol.as_deref())?;
        let (from_port, to_port) = parse_ports(protocol, permission.from_port, permission.to_port)?;
        let mut remotes = Vec::new();
        for range in permission.ip_ranges {
            let text = range.cidr_ip.ok_or_else(|| ApiError::missing_parameter("CidrIp"))?;
            let cidr = text.parse::<Ipv4Net>().map_err(|_| malformed_cidr(&text))?;
            remotes.push((RuleRemote::Ipv4(cidr.trunc()), range.description));
        }
        for range in permission.ipv6_ranges {
            let text = range.cidr_ipv6.ok_or_else(|| ApiError::missing_parameter("CidrIpv6"))?;
            let cidr = text.parse::<Ipv6Net>().map_err(|_| malformed_cidr(&text))?;
            remotes.push((RuleRemote::Ipv6(cidr.trunc()), range.description));
        }
        for pair in permission.user_id_group_pairs {
            let description = pair.description.clone();
            remotes.push((parse_group(call, group, &pair)?, description));
        }
        for list in permission.prefix_list_ids {
            let id = PREFIX_LIST.required(list.prefix_list_id, "PrefixListId")?;
            PREFIX_LIST.row::<PrefixList>(call, &id)?;
            remotes.push((RuleRemote::PrefixList(id), list.description));
        }
        if remotes.is_empty() {
            let message = "A rule needs a remote side: a CIDR block, a security group or a prefix list";
            return Err(ApiError::new("MissingParameter", message));
        }
        for (remote, description) in remotes {
            let description = checked_description(description)?;
            described.push(Described { protocol, from_port, to_port, remote, description });
        }
    }
    Ok(described)
}

/// The description of a rule; an empty one is none.
fn checked_description(text: Option<String>) -> Result<Option<String>, ApiError> {
    let text = text.filter(|text| !text.is_empty());
    text.iter().try_for_each(|text| security_group::check_text("Description", text))?;
    Ok(text)
}

/// The permissions that the flat parameters stand for. A source group without a protocol means all of ICMP, TCP and UDP.
fn flat_permissions(flat: Flat) -> Result<Vec<IpPermission>, ApiError> {
    let group = flat.source_group_name.map(|name| UserIdGroupPair {
        group_name: Some(name),
        user_id: flat.source_group_owner,
        ..Default::default()
    });
    let range = flat.cidr_ip.map(|cidr| IpRange { cidr_ip: Some(cidr), description: None });
    let permission = |ip_protocol: Option<String>, from_port, to_port| IpPermission {
        ip_protocol,
        from_port,
        to_port,
        ip_ranges: range.iter().cloned().collect(),
        user_id_group_pairs: group.iter().cloned().collect(),
        ..Default::default()
    };
    match (&group, &range, &flat.ip_protocol) {
        (Some(_), Some(_), _) => Err(ApiError::invalid_combination("A CIDR block and a source security group cannot be used together")),
        (Some(_), None, None) => Ok([("icmp", -1, -1), ("tcp", 0, 65535), ("udp", 0, 65535)]
            .map(|(protocol, from, to)| permission(Some(protocol.into()), Some(from), Some(to)))
            .into()),
        _ => Ok(vec![permission(flat.ip_protocol.clone(), flat.from_port, flat.to_port)]),
    }
}

fn malformed_cidr(text: &str) -> ApiError {
    ApiError::invalid_value(format!("CIDR block {text} is malformed"))
}

/// The group of a remote side, by id or by name: of the same VPC, or of one that it is peered with.
fn parse_group(call: &Call<'_>, group: &SecurityGroup, pair: &UserIdGroupPair) -> Result<RuleRemote, ApiError> {
    let owner = pair.user_id.as_deref().filter(|user| !user.is_empty()).unwrap_or(&group.account_id);
    let not_found = |name: &str| ApiError::new("InvalidGroup.NotFound", format!("The security group '{name}' does not exist"));
    // What a rule of the group names already may be named again, also when it is stale.
    let names = |remote: &&RuleRemote| match remote {
        RuleRemote::Group { account_id, group_id, .. } => pair.group_id.as_ref() == Some(group_id) && account_id == owner,
        _ => false,
    };
    if let Some(remote) = group.rules.iter().map(|rule| &rule.remote).find(names) {
        return Ok(remote.clone());
    }
    let remote: Arc<SecurityGroup> = match (pair.group_id.as_deref(), pair.group_name.as_deref()) {
        (Some(id), _) if owner == group.account_id => super::id::SECURITY_GROUP.row(call, id)?,
        (Some(id), _) => {
            super::id::SECURITY_GROUP.check(id)?;
            let foreign = call.tx.get::<SecurityGroup>(owner, id);
            // A group of another account exists for those that are peered with its VPC.
            let reachable = |other: &Arc<SecurityGroup>| vpc_peering_connection::between(&call.tx, &group.vpc_id, &other.vpc_id).is_some();
            foreign.filter(reachable).ok_or_else(|| not_found(id))?
        }
        (None, Some(name)) => {
            let siblings = call.find::<SecurityGroup>("vpc", &group.vpc_id);
            let found = siblings.into_iter().find(|other| owner == group.account_id && other.name.eq_ignore_ascii_case(name));
            found.ok_or_else(|| not_found(name))?
        }
        (None, None) => return Err(ApiError::new("MissingParameter", "A source security group needs a groupId or a groupName")),
    };
    let peering = if remote.vpc_id == group.vpc_id {
        None
    } else {
        let connection = vpc_peering_connection::between(&call.tx, &group.vpc_id, &remote.vpc_id);
        connection.map(|connection| RulePeering { vpc_id: remote.vpc_id.clone(), vpc_peering_connection_id: connection.id.clone() })
    };
    let via = peering.as_ref().map(|peering| &peering.vpc_peering_connection_id);
    let reachable = remote.vpc_id == group.vpc_id || peering.is_some();
    if !reachable
        || pair.vpc_id.as_ref().is_some_and(|vpc_id| *vpc_id != remote.vpc_id)
        || pair.vpc_peering_connection_id.as_ref().is_some_and(|id| Some(id) != via)
    {
        return Err(ApiError::new("InvalidGroup.NotFound", "You have specified two resources that belong to different networks."));
    }
    Ok(RuleRemote::Group { account_id: remote.account_id.clone(), group_id: remote.id.clone(), peering })
}

/// How a rule of a group of `vpc_id` shows the way to a group of another VPC: the VPC, the connection and its state. The newest
/// active connection counts; without one it is the connection that the rule was made over.
pub fn peering_shape(tx: &Tx<'_>, vpc_id: &str, peering: &RulePeering) -> (String, String, String) {
    let (id, state) = match vpc_peering_connection::between(tx, vpc_id, &peering.vpc_id) {
        Some(active) => (active.id.clone(), active.state.name()),
        None => {
            let id = peering.vpc_peering_connection_id.clone();
            let state = vpc_peering_connection::state_name(tx, &id);
            (id, state)
        }
    };
    (peering.vpc_id.clone(), id, state.to_owned())
}

/// A protocol by its name or its number; `-1` is every protocol.
pub(super) fn parse_protocol(text: Option<&str>) -> Result<Option<u8>, ApiError> {
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        return Err(ApiError::missing_parameter("IpProtocol"));
    };
    match text.to_ascii_lowercase().as_str() {
        "-1" | "all" => Ok(None),
        "icmp" => Ok(Some(ICMP)),
        "tcp" => Ok(Some(TCP)),
        "udp" => Ok(Some(UDP)),
        "icmpv6" => Ok(Some(ICMPV6)),
        number => number
            .parse::<u8>()
            .map(Some)
            .map_err(|_| ApiError::invalid_value(format!("Invalid value '{text}' for IP protocol. Unknown protocol."))),
    }
}

/// The name of a protocol as rules show it: a word for those with ports or types, else the number.
pub fn protocol_name(protocol: Option<u8>) -> String {
    match protocol {
        None => "-1".to_owned(),
        Some(ICMP) => "icmp".to_owned(),
        Some(TCP) => "tcp".to_owned(),
        Some(UDP) => "udp".to_owned(),
        Some(ICMPV6) => "icmpv6".to_owned(),
        Some(number) => number.to_string(),
    }
}

/// Ports, or ICMP type and code; protocols without them allow everything, whatever the request says.
fn parse_ports(protocol: Option<u8>, from: Option<i32>, to: Option<i32>) -> Result<(i32, i32), ApiError> {
    match (protocol, from, to) {
        (Some(TCP | UDP), Some(from), Some(to)) => {
            if let Some(port) = [from, to].into_iter().find(|port| !(0..=65535).contains(port)) {
                return Err(ApiError::invalid_value(format!("Invalid value '{port}' for portRange. TCP/UDP ports are 0 to 65535.")));
            }
            if from > to {
                return Err(ApiError::invalid_value(format!("Invalid TCP/UDP port range ({from}:{to})")));
            }
            Ok((from, to))
        }
        (Some(TCP | UDP), _, _) => {
            Err(ApiError::invalid_value("Invalid value 'Must specify both from and to ports with TCP/UDP.' for portRange."))
        }
        (Some(ICMP | ICMPV6), Some(kind), Some(code)) => {
            if let Some(value) = [kind, code].into_iter().find(|value| !(-1..=255).contains(value)) {
                return Err(ApiError::invalid_value(format!("Invalid value '{value}' for ICMP type or code.")));
            }
            if kind == -1 && code != -1 {
                return Err(ApiError::invalid_value("Invalid value for ICMP code. All types (-1) have all codes (-1)."));
            }
            Ok((kind, code))
        }
        (Some(ICMPV6), None, None) => Ok((-1, -1)),
        (Some(ICMP | ICMPV6), _, _) => Err(ApiError::invalid_value("Invalid value 'Must specify both ICMP type and code.' for portRange.")),
        _ => Ok((-1, -1)),
    }
}

/// DescribeSecurityGroupRules.
///
/// # Errors
/// `InvalidSecurityGroupRuleId.NotFound` and those of filters and pages.
pub fn describe_security_group_rules(
    call: &mut Call<'_>,
    request: DescribeSecurityGroupRulesRequest,
) -> Result<DescribeSecurityGroupRulesResult, ApiError> {
    let filters = Filters::new(request.filters, &["group-id", "security-group-rule-id", "tag"])?;
    let page = Page::new("DescribeSecurityGroupRules", request.max_results, request.next_token.as_deref(), 1000)?;
    let ids = request.security_group_rule_ids;
    SECURITY_GROUP_RULE.check_all(&ids)?;
    let each = |group: &Arc<SecurityGroup>| (0..group.rules.len()).map(|index| (group.clone(), index)).collect::<Vec<_>>();
    let mut rows = Vec::new();
    for (group, index) in call.list::<SecurityGroup>().flat_map(each) {
        let Some(rule) = group.rules.get(index).cloned() else { continue };
        if ids.is_empty() || ids.contains(&rule.id) {
            rows.push((group, rule));
        }
    }
    if let Some(missing) = ids.iter().find(|id| !rows.iter().any(|(_, rule)| rule.id == **id)) {
        return Err(SECURITY_GROUP_RULE.not_found(missing));
    }
    rows.sort_by(|(_, a), (_, b)| a.id.cmp(&b.id));
    let passing = rows.iter().filter(|(group, rule)| {
        filters.pass(&tag::of(&call.tx, call.account(), &rule.id), |name, test| match name {
            "group-id" => test(&group.id),
            "security-group-rule-id" => test(&rule.id),
            _ => false,
        })
    });
    let shaped = passing.map(|(group, rule)| (rule.id.clone(), shape(call, group, rule)));
    let (security_group_rules, next_token) = page.take(shaped);
    Ok(DescribeSecurityGroupRulesResult { security_group_rules, next_token })
}

fn shape(call: &Call<'_>, group: &SecurityGroup, rule: &SecurityGroupRule) -> shapes::SecurityGroupRule {
    let mut shape = shapes::SecurityGroupRule {
        security_group_rule_id: Some(rule.id.clone()),
        security_group_rule_arn: Some(SECURITY_GROUP_RULE.arn(call.region, &group.account_id, &rule.id)),
        group_id: Some(group.id.clone()),
        group_owner_id: Some(group.account_id.clone()),
        is_egress: Some(rule.egress),
        ip_protocol: Some(protocol_name(rule.protocol)),
        from_port: Some(rule.from_port),
        to_port: Some(rule.to_port),
        description: rule.description.clone(),
        tags: tag::shapes(&tag::of(&call.tx, &group.account_id, &rule.id)),
        ..Default::default()
    };
    match &rule.remote {
        RuleRemote::Ipv4(cidr) => shape.cidr_ipv4 = Some(cidr.to_string()),
        RuleRemote::Ipv6(cidr) => shape.cidr_ipv6 = Some(cidr.to_string()),
        RuleRemote::PrefixList(id) => shape.prefix_list_id = Some(id.clone()),
        RuleRemote::Group { account_id, group_id, peering } => {
            let mut referenced =
                ReferencedSecurityGroup { group_id: Some(group_id.clone()), user_id: Some(account_id.clone()), ..Default::default() };
            if let Some(peering) = peering {
                let (vpc_id, connection_id, state) = peering_shape(&call.tx, &group.vpc_id, peering);
                referenced.vpc_id = Some(vpc_id);
                referenced.vpc_peering_connection_id = Some(connection_id);
                referenced.peering_status = Some(state);
            }
            shape.referenced_group_info = Some(referenced);
        }
    }
    shape
}

fn revoked_shape(group: &SecurityGroup, rule: &SecurityGroupRule) -> RevokedSecurityGroupRule {
    let mut shape = RevokedSecurityGroupRule {
        security_group_rule_id: Some(rule.id.clone()),
        group_id: Some(group.id.clone()),
        is_egress: Some(rule.egress),
        ip_protocol: Some(protocol_name(rule.protocol)),
        from_port: Some(rule.from_port),
        to_port: Some(rule.to_port),
        description: rule.description.clone(),
        ..Default::default()
    };
    match &rule.remote {
        RuleRemote::Ipv4(cidr) => shape.cidr_ipv4 = Some(cidr.to_string()),
        RuleRemote::Ipv6(cidr) => shape.cidr_ipv6 = Some(cidr.to_string()),
        RuleRemote::PrefixList(id) => shape.prefix_list_id = Some(id.clone()),
        RuleRemote::Group { group_id, .. } => shape.referenced_group_id = Some(group_id.clone()),
    }
    shape
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::shapes::{Filter, Ipv6Range, Tag};

    fn group(fixture: &Fixture, account: &str, name: &str) -> String {
        let request =
            shapes::CreateSecurityGroupRequest { group_name: Some(name.into()), description: Some("a group".into()), ..Default::default() };
        fixture.call(account, |call| security_group::create_security_group(call, request)).unwrap().group_id.unwrap()
    }

    fn permission(protocol: &str, ports: Option<(i32, i32)>, cidrs: &[&str]) -> IpPermission {
        let range = |cidr: &&str| IpRange { cidr_ip: Some((*cidr).to_owned()), description: None };
        IpPermission {
            ip_protocol: Some(protocol.into()),
            from_port: ports.map(|(from, _)| from),
            to_port: ports.map(|(_, to)| to),
            ip_ranges: cidrs.iter().map(range).collect(),
            ..Default::default()
        }
    }

    fn ingress(id: &str, ip_permissions: Vec<IpPermission>) -> AuthorizeSecurityGroupIngressRequest {
        AuthorizeSecurityGroupIngressRequest { group_id: Some(id.into()), ip_permissions, ..Default::default() }
    }

    fn revoke_in(id: &str, ip_permissions: Vec<IpPermission>) -> RevokeSecurityGroupIngressRequest {
        RevokeSecurityGroupIngressRequest { group_id: Some(id.into()), ip_permissions, ..Default::default() }
    }

    fn rules(fixture: &Fixture, id: &str, egress: bool) -> Vec<SecurityGroupRule> {
        let tx = fixture.world.begin();
        let rules = tx.get::<SecurityGroup>(ALICE, id).unwrap().rules.clone();
        rules.into_iter().filter(|rule| rule.egress == egress).collect()
    }

    #[test]
    fn a_permission_becomes_a_rule_for_each_remote_side() {
        let fixture = Fixture::new();
        let (id, other) = (group(&fixture, ALICE, "web"), group(&fixture, ALICE, "app"));
        let mut wanted = permission("tcp", Some((22, 80)), &["10.1.2.3/8", "192.0.2.1/32"]);
        wanted.ipv6_ranges = vec![Ipv6Range { cidr_ipv6: Some("2001:db8::1/32".into()), description: Some("v6".into()) }];
        wanted.user_id_group_pairs = vec![UserIdGroupPair { group_id: Some(other.clone()), ..Default::default() }];
        let added = fixture.call(ALICE, |call| authorize_security_group_ingress(call, ingress(&id, vec![wanted]))).unwrap();
        assert_eq!(added.security_group_rules.len(), 4);
        let stored: Vec<_> = rules(&fixture, &id, false).into_iter().map(|rule| rule.remote).collect();
        assert_eq!(stored[0], RuleRemote::Ipv4("10.0.0.0/8".parse().unwrap()));
        assert_eq!(stored[2], RuleRemote::Ipv6("2001:db8::/32".parse().unwrap()));
        assert_eq!(stored[3], RuleRemote::Group { account_id: ALICE.into(), group_id: other, peering: None });
        let request = shapes::DescribeSecurityGroupsRequest { group_ids: vec![id], ..Default::default() };
        let shown = fixture.call(ALICE, |call| security_group::describe_security_groups(call, request)).unwrap();
        let [joined] = shown.security_groups[0].ip_permissions.as_slice() else { panic!() };
        assert_eq!((joined.ip_ranges.len(), joined.ipv6_ranges.len(), joined.user_id_group_pairs.len()), (2, 1, 1));
    }

    #[test]
    fn a_rule_exists_once_even_in_another_spelling() {
        let fixture = Fixture::new();
        let id = group(&fixture, ALICE, "web");
        let mut first = permission("tcp", Some((22, 22)), &["10.0.0.0/8"]);
        first.ip_ranges[0].description = Some("office".into());
        fixture.call(ALICE, |call| authorize_security_group_ingress(call, ingress(&id, vec![first]))).unwrap();
        for again in [permission("6", Some((22, 22)), &["10.0.0.0/8"]), permission("TCP", Some((22, 22)), &["10.9.9.9/8"])] {
            let error = fixture.call(ALICE, |call| authorize_security_group_ingress(call, ingress(&id, vec![again]))).unwrap_err();
            assert_eq!(error.code, "InvalidPermission.Duplicate");
            let sentence = "the specified rule \"peer: 10.0.0.0/8, TCP, from port: 22, to port: 22, ALLOW\" already exists";
            assert_eq!(error.message, sentence);
        }
        let twice = permission("udp", Some((53, 53)), &["10.0.0.0/8", "10.0.0.0/8"]);
        let refused = fixture.refusal(ALICE, |call| authorize_security_group_ingress(call, ingress(&id, vec![twice])));
        assert_eq!(refused, "InvalidPermission.Duplicate");
        assert_eq!(rules(&fixture, &id, false).len(), 1, "nothing of a refused request stays");
    }

    #[test]
    fn protocols_ports_and_types_are_checked() {
        let fixture = Fixture::new();
        let id = group(&fixture, ALICE, "web");
        for (protocol, ports, cidr) in [
            ("xyz", None, "10.0.0.0/8"),
            ("256", None, "10.0.0.0/8"),
            ("tcp", None, "10.0.0.0/8"),
            ("tcp", Some((80, 22)), "10.0.0.0/8"),
            ("tcp", Some((0, 65536)), "10.0.0.0/8"),
            ("udp", Some((-1, -1)), "10.0.0.0/8"),
            ("icmp", None, "10.0.0.0/8"),
            ("icmp", Some((-1, 0)), "10.0.0.0/8"),
            ("icmp", Some((256, -1)), "10.0.0.0/8"),
            ("tcp", Some((22, 22)), "10.0.0.0"),
            ("tcp", Some((22, 22)), "10.0.0.0/33"),
            ("tcp", Some((22, 22)), ""),
        ] {
            let wanted = ingress(&id, vec![permission(protocol, ports, &[cidr])]);
            let refused = fixture.refusal(ALICE, |call| authorize_security_group_ingress(call, wanted));
            assert_eq!(refused, "InvalidParameterValue", "{protocol} {ports:?} {cidr}");
        }
        for (protocol, ports, stored) in [
            ("-1", Some((22, 22)), (None, -1, -1)),
            ("50", Some((1, 2)), (Some(50), -1, -1)),
            ("icmp", Some((8, -1)), (Some(1), 8, -1)),
            ("icmp", Some((-1, -1)), (Some(1), -1, -1)),
            ("icmpv6", None, (Some(58), -1, -1)),
            ("17", Some((0, 65535)), (Some(17), 0, 65535)),
        ] {
            let wanted = ingress(&id, vec![permission(protocol, ports, &["10.0.0.0/8"])]);
            fixture.call(ALICE, |call| authorize_security_group_ingress(call, wanted)).unwrap();
            let rule = rules(&fixture, &id, false).pop().unwrap();
            assert_eq!((rule.protocol, rule.from_port, rule.to_port), stored, "{protocol}");
        }
        let empty = ingress(&id, vec![permission("tcp", Some((22, 22)), &[])]);
        assert_eq!(fixture.refusal(ALICE, |call| authorize_security_group_ingress(call, empty)), "MissingParameter");
        assert_eq!(fixture.refusal(ALICE, |call| authorize_security_group_ingress(call, ingress(&id, vec![]))), "MissingParameter");
    }

    #[test]
    fn groups_are_named_within_the_vpc_and_the_account_only() {
        let fixture = Fixture::new();
        let (id, foreign) = (group(&fixture, ALICE, "web"), group(&fixture, BOB, "web"));
        let request = shapes::CreateVpcRequest { cidr_block: Some("10.0.0.0/16".into()), ..Default::default() };
        let vpc = fixture.call(ALICE, |call| super::super::vpc::create_vpc(call, request)).unwrap().vpc.unwrap().vpc_id.unwrap();
        let elsewhere = security_group::default_group(&fixture.world.begin(), ALICE, &vpc).unwrap().id.clone();
        let pair = |pair: UserIdGroupPair| {
            let mut wanted = permission("-1", None, &[]);
            wanted.user_id_group_pairs = vec![pair];
            ingress(&id, vec![wanted])
        };
        let by_id = |id: &str, user: Option<&str>| UserIdGroupPair {
            group_id: Some(id.into()),
            user_id: user.map(str::to_owned),
            ..Default::default()
        };
        for bad in [by_id(&foreign, None), by_id(&foreign, Some(BOB)), by_id(&elsewhere, None), by_id("sg-00000000", None)] {
            let refused = fixture.refusal(ALICE, |call| authorize_security_group_ingress(call, pair(bad)));
            assert_eq!(refused, "InvalidGroup.NotFound");
        }
        let refused = fixture.refusal(ALICE, |call| authorize_security_group_ingress(call, pair(by_id("web", None))));
        assert_eq!(refused, "InvalidGroupId.Malformed");
        let by_name = UserIdGroupPair { group_name: Some("default".into()), user_id: Some(ALICE.into()), ..Default::default() };
        fixture.call(ALICE, |call| authorize_security_group_ingress(call, pair(by_name))).unwrap();
        fixture.call(ALICE, |call| authorize_security_group_ingress(call, pair(by_id(&id, Some(ALICE))))).unwrap();
        let refused =
            fixture.refusal(BOB, |call| authorize_security_group_ingress(call, ingress(&id, vec![permission("-1", None, &["0.0.0.0/0"])])));
        assert_eq!(refused, "InvalidGroup.NotFound");
    }

    #[test]
    fn flat_parameters_stand_for_one_rule_or_for_a_whole_group() {
        let fixture = Fixture::new();
        let id = group(&fixture, ALICE, "web");
        let flat = AuthorizeSecurityGroupIngressRequest {
            group_name: Some("web".into()),
            ip_protocol: Some("tcp".into()),
            from_port: Some(22),
            to_port: Some(22),
            cidr_ip: Some("0.0.0.0/0".into()),
            ..Default::default()
        };
        fixture.call(ALICE, |call| authorize_security_group_ingress(call, flat.clone())).unwrap();
        let source = AuthorizeSecurityGroupIngressRequest {
            group_id: Some(id.clone()),
            source_security_group_name: Some("default".into()),
            ..Default::default()
        };
        fixture.call(ALICE, |call| authorize_security_group_ingress(call, source)).unwrap();
        let protocols: Vec<_> = rules(&fixture, &id, false).iter().map(|rule| rule.protocol).collect();
        assert_eq!(protocols, [Some(6), Some(1), Some(6), Some(17)]);
        let both = AuthorizeSecurityGroupIngressRequest { ip_permissions: vec![permission("-1", None, &["0.0.0.0/0"])], ..flat };
        let refused = fixture.refusal(ALICE, |call| authorize_security_group_ingress(call, both));
        assert_eq!(refused, "InvalidParameterCombination");
    }

    #[test]
    fn rules_are_revoked_by_what_they_say() {
        let fixture = Fixture::new();
        let id = group(&fixture, ALICE, "web");
        let mut described = permission("tcp", Some((22, 22)), &["10.0.0.0/8", "192.0.2.0/24"]);
        described.ip_ranges[0].description = Some("office".into());
        fixture.call(ALICE, |call| authorize_security_group_ingress(call, ingress(&id, vec![described]))).unwrap();
        let gone = revoke_in(&id, vec![permission("tcp", Some((22, 22)), &["10.0.0.0/8"])]);
        let answer = fixture.call(ALICE, |call| revoke_security_group_ingress(call, gone.clone())).unwrap();
        assert_eq!(answer.revoked_security_group_rules[0].description.as_deref(), Some("office"));
        assert_eq!(fixture.refusal(ALICE, |call| revoke_security_group_ingress(call, gone)), "InvalidPermission.NotFound");
        let part = vec![permission("tcp", Some((22, 22)), &["192.0.2.0/24"]), permission("tcp", Some((23, 23)), &["192.0.2.0/24"])];
        let refused = fixture.refusal(ALICE, |call| revoke_security_group_ingress(call, revoke_in(&id, part)));
        assert_eq!(refused, "InvalidPermission.NotFound");
        assert_eq!(rules(&fixture, &id, false).len(), 1, "a refused request revokes nothing");
        // An egress rule is no ingress rule.
        let refused = fixture
            .refusal(ALICE, |call| revoke_security_group_ingress(call, revoke_in(&id, vec![permission("-1", None, &["0.0.0.0/0"])])));
        assert_eq!(refused, "InvalidPermission.NotFound");
        let request = RevokeSecurityGroupEgressRequest {
            group_id: Some(id.clone()),
            ip_permissions: vec![permission("-1", None, &["0.0.0.0/0"])],
            ..Default::default()
        };
        fixture.call(ALICE, |call| revoke_security_group_egress(call, request)).unwrap();
        assert!(rules(&fixture, &id, true).is_empty());
    }

    #[test]
    fn rules_are_revoked_by_their_ids() {
        let fixture = Fixture::new();
        let id = group(&fixture, ALICE, "web");
        let rule = rules(&fixture, &id, true)[0].id.clone();
        let ingress_request = RevokeSecurityGroupIngressRequest {
            group_id: Some(id.clone()),
            security_group_rule_ids: vec![rule.clone()],
            ..Default::default()
        };
        let refused = fixture.refusal(ALICE, |call| revoke_security_group_ingress(call, ingress_request));
        assert_eq!(refused, "InvalidSecurityGroupRuleId.NotFound");
        let request =
            RevokeSecurityGroupEgressRequest { group_id: Some(id.clone()), security_group_rule_ids: vec![rule], ..Default::default() };
        fixture.call(ALICE, |call| revoke_security_group_egress(call, request)).unwrap();
        assert!(rules(&fixture, &id, true).is_empty());
    }

    #[test]
    fn the_sixty_first_rule_is_one_too_many() {
        let fixture = Fixture::new();
        let id = group(&fixture, ALICE, "web");
        let cidrs: Vec<String> = (0..60).map(|number| format!("10.0.{number}.0/24")).collect();
        let cidrs: Vec<&str> = cidrs.iter().map(String::as_str).collect();
        let mut both = permission("-1", None, &cidrs);
        // The other family has a quota of its own.
        both.ipv6_ranges =
            (0..60).map(|number| Ipv6Range { cidr_ipv6: Some(format!("2001:db8:{number:x}::/48")), description: None }).collect();
        fixture.call(ALICE, |call| authorize_security_group_ingress(call, ingress(&id, vec![both]))).unwrap();
        let one = ingress(&id, vec![permission("-1", None, &["10.1.0.0/24"])]);
        let refused = fixture.refusal(ALICE, |call| authorize_security_group_ingress(call, one));
        assert_eq!(refused, "RulesPerSecurityGroupLimitExceeded");
    }

    #[test]
    fn rules_are_described_and_tagged_one_by_one() {
        let fixture = Fixture::new();
        let id = group(&fixture, ALICE, "web");
        let tag = Tag { key: Some("Name".into()), value: Some("ssh".into()) };
        let request = AuthorizeSecurityGroupIngressRequest {
            tag_specifications: vec![TagSpecification { resource_type: Some("security-group-rule".into()), tags: vec![tag] }],
            ..ingress(&id, vec![permission("tcp", Some((22, 22)), &["10.0.0.0/8"])])
        };
        let added = fixture.call(ALICE, |call| authorize_security_group_ingress(call, request)).unwrap().security_group_rules;
        assert_eq!(added[0].tags.len(), 1);
        let found = |name: &str, value: &str| {
            let filters = vec![Filter { name: Some(name.into()), values: vec![value.into()] }];
            let request = DescribeSecurityGroupRulesRequest { filters, ..Default::default() };
            fixture.call(ALICE, |call| describe_security_group_rules(call, request)).unwrap().security_group_rules
        };
        assert_eq!(found("group-id", &id).len(), 2);
        assert_eq!(found("tag:Name", "ssh"), added);
        let request = DescribeSecurityGroupRulesRequest {
            security_group_rule_ids: added[0].security_group_rule_id.iter().cloned().collect(),
            ..Default::default()
        };
        let refused = fixture.refusal(BOB, |call| describe_security_group_rules(call, request));
        assert_eq!(refused, "InvalidSecurityGroupRuleId.NotFound");
    }
}
