//! Changes of rules that are there already; a rule keeps its id and its tags.

use super::{Described, Flat, checked_description, describe, fits, parse_group, parse_ports, parse_protocol, too_many};
use crate::error::ApiError;
use crate::model::{PrefixList, RuleRemote, SecurityGroup, SecurityGroupRule};
use crate::resource::id::{PREFIX_LIST, SECURITY_GROUP, SECURITY_GROUP_RULE};
use crate::resource::security_group;
use crate::shapes::{
    IpPermission, ModifySecurityGroupRulesRequest, ModifySecurityGroupRulesResult, SecurityGroupRuleDescription, SecurityGroupRuleRequest,
    UpdateSecurityGroupRuleDescriptionsEgressRequest, UpdateSecurityGroupRuleDescriptionsEgressResult,
    UpdateSecurityGroupRuleDescriptionsIngressRequest, UpdateSecurityGroupRuleDescriptionsIngressResult, UserIdGroupPair,
};
use crate::world::Call;

/// ModifySecurityGroupRules: all of the named rules, or none. A rule becomes what the request says, without what it leaves out; only
/// the kind of its remote side stays.
///
/// # Errors
/// `InvalidSecurityGroupRuleId.NotFound`, `InvalidPermission.Duplicate`, `RulesPerSecurityGroupLimitExceeded`, `InvalidParameterValue`.
pub fn modify_security_group_rules(
    call: &mut Call<'_>,
    request: ModifySecurityGroupRulesRequest,
) -> Result<ModifySecurityGroupRulesResult, ApiError> {
    let group_id = SECURITY_GROUP.required(request.group_id, "GroupId")?;
    let group = SECURITY_GROUP.row::<SecurityGroup>(call, &group_id)?;
    let mut changed = SecurityGroup::clone(&group);
    for update in request.security_group_rules {
        let id = SECURITY_GROUP_RULE.required(update.security_group_rule_id, "SecurityGroupRuleId")?;
        let asked = update.security_group_rule.ok_or_else(|| ApiError::missing_parameter("SecurityGroupRule"))?;
        let new = read(call, &group, asked)?;
        let rule = changed.rules.iter_mut().find(|rule| rule.id == id).ok_or_else(|| SECURITY_GROUP_RULE.not_found(&id))?;
        if std::mem::discriminant(&rule.remote) != std::mem::discriminant(&new.remote) {
            let message = format!("The kind of the source or destination of the security group rule '{id}' cannot be changed");
            return Err(ApiError::invalid_value(message));
        }
        *rule = SecurityGroupRule {
            protocol: new.protocol,
            from_port: new.from_port,
            to_port: new.to_port,
            remote: new.remote,
            description: new.description,
            id,
            egress: rule.egress,
        };
    }
    check_unique(&changed)?;
    if !fits(&call.tx, &changed, None) {
        return Err(too_many());
    }
    call.tx.put(changed);
    Ok(ModifySecurityGroupRulesResult { r#return: Some(true) })
}

fn read(call: &Call<'_>, group: &SecurityGroup, asked: SecurityGroupRuleRequest) -> Result<Described, ApiError> {
    let protocol = parse_protocol(asked.ip_protocol.as_deref())?;
    let (from_port, to_port) = parse_ports(protocol, asked.from_port, asked.to_port)?;
    let malformed = |text: &str| ApiError::invalid_value(format!("CIDR block {text} is malformed"));
    let mut remotes = Vec::new();
    if let Some(text) = asked.cidr_ipv4 {
        remotes.push(RuleRemote::Ipv4(text.parse::<ipnet::Ipv4Net>().map_err(|_| malformed(&text))?.trunc()));
    }
    if let Some(text) = asked.cidr_ipv6 {
        remotes.push(RuleRemote::Ipv6(text.parse::<ipnet::Ipv6Net>().map_err(|_| malformed(&text))?.trunc()));
    }
    if let Some(id) = asked.prefix_list_id {
        PREFIX_LIST.row::<PrefixList>(call, &id)?;
        remotes.push(RuleRemote::PrefixList(id));
    }
    if let Some(id) = asked.referenced_group_id {
        remotes.push(parse_group(call, group, &UserIdGroupPair { group_id: Some(id), ..Default::default() })?);
    }
    let (Some(remote), None) = (remotes.pop(), remotes.pop()) else {
        let message = "A rule has exactly one of CidrIpv4, CidrIpv6, PrefixListId and ReferencedGroupId";
        return Err(ApiError::invalid_combination(message));
    };
    Ok(Described { protocol, from_port, to_port, remote, description: checked_description(asked.description)? })
}

/// No rule of a group may say what another one says.
fn check_unique(group: &SecurityGroup) -> Result<(), ApiError> {
    for (index, rule) in group.rules.iter().enumerate() {
        let described = Described {
            protocol: rule.protocol,
            from_port: rule.from_port,
            to_port: rule.to_port,
            remote: rule.remote.clone(),
            description: None,
        };
        if group.rules.iter().skip(index.saturating_add(1)).any(|other| other.egress == rule.egress && described.is(other)) {
            return Err(described.duplicate());
        }
    }
    Ok(())
}

/// UpdateSecurityGroupRuleDescriptionsIngress.
///
/// # Errors
/// `InvalidPermission.NotFound`, `InvalidSecurityGroupRuleId.NotFound`, `InvalidParameterCombination` for both ways of naming rules.
pub fn update_security_group_rule_descriptions_ingress(
    call: &mut Call<'_>,
    request: UpdateSecurityGroupRuleDescriptionsIngressRequest,
) -> Result<UpdateSecurityGroupRuleDescriptionsIngressResult, ApiError> {
    let (id, name) = (request.group_id.as_deref(), request.group_name.as_deref());
    update(call, id, name, false, request.ip_permissions, request.security_group_rule_descriptions)?;
    Ok(UpdateSecurityGroupRuleDescriptionsIngressResult { r#return: Some(true) })
}

/// UpdateSecurityGroupRuleDescriptionsEgress.
///
/// # Errors
/// As [`update_security_group_rule_descriptions_ingress`].
pub fn update_security_group_rule_descriptions_egress(
    call: &mut Call<'_>,
    request: UpdateSecurityGroupRuleDescriptionsEgressRequest,
) -> Result<UpdateSecurityGroupRuleDescriptionsEgressResult, ApiError> {
    let (id, name) = (request.group_id.as_deref(), request.group_name.as_deref());
    update(call, id, name, true, request.ip_permissions, request.security_group_rule_descriptions)?;
    Ok(UpdateSecurityGroupRuleDescriptionsEgressResult { r#return: Some(true) })
}

fn update(
    call: &mut Call<'_>,
    group_id: Option<&str>,
    group_name: Option<&str>,
    egress: bool,
    permissions: Vec<IpPermission>,
    by_id: Vec<SecurityGroupRuleDescription>,
) -> Result<(), ApiError> {
    let group = security_group::named(call, group_id, group_name)?;
    let mut changed = SecurityGroup::clone(&group);
    match (permissions.is_empty(), by_id.is_empty()) {
        (true, true) => return Err(ApiError::missing_parameter("ipPermissions")),
        (false, false) => {
            let message = "Rules are named by their ids or by their permissions, but not by both";
            return Err(ApiError::invalid_combination(message));
        }
        (false, true) => {
            for described in describe(call, &group, permissions, Flat::default())? {
                let mut rules = changed.rules.iter_mut().filter(|rule| rule.egress == egress);
                let rule = rules.find(|rule| described.is(rule)).ok_or_else(Described::not_found)?;
                rule.description = described.description;
            }
        }
        (true, false) => {
            for asked in by_id {
                let id = SECURITY_GROUP_RULE.required(asked.security_group_rule_id, "SecurityGroupRuleId")?;
                let mut rules = changed.rules.iter_mut().filter(|rule| rule.egress == egress);
                let rule = rules.find(|rule| rule.id == id).ok_or_else(|| SECURITY_GROUP_RULE.not_found(&id))?;
                rule.description = checked_description(asked.description)?;
            }
        }
    }
    call.tx.put(changed);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::resource::security_group_rule::authorize_security_group_ingress;
    use crate::shapes::{AuthorizeSecurityGroupIngressRequest, IpRange, SecurityGroupRuleUpdate};

    struct Group {
        fixture: Fixture,
        id: String,
        /// Its two rules for SSH, from 10.0.0.0/8 and from 192.0.2.0/24.
        ssh: Vec<String>,
    }

    fn permission(cidrs: &[&str]) -> IpPermission {
        let range = |cidr: &&str| IpRange { cidr_ip: Some((*cidr).to_owned()), description: Some("ssh".into()) };
        IpPermission {
            ip_protocol: Some("tcp".into()),
            from_port: Some(22),
            to_port: Some(22),
            ip_ranges: cidrs.iter().map(range).collect(),
            ..Default::default()
        }
    }

    fn group() -> Group {
        let fixture = Fixture::new();
        let vpc = fixture.default_vpc(ALICE).id;
        let id = security_group::default_group(&fixture.world.begin(), ALICE, &vpc).unwrap().id.clone();
        let request = AuthorizeSecurityGroupIngressRequest {
            group_id: Some(id.clone()),
            ip_permissions: vec![permission(&["10.0.0.0/8", "192.0.2.0/24"])],
            ..Default::default()
        };
        let rules = fixture.call(ALICE, |call| authorize_security_group_ingress(call, request)).unwrap().security_group_rules;
        Group { fixture, id, ssh: rules.into_iter().filter_map(|rule| rule.security_group_rule_id).collect() }
    }

    impl Group {
        fn rule(&self, id: &str) -> SecurityGroupRule {
            let group = self.fixture.world.begin().get::<SecurityGroup>(ALICE, &self.id).unwrap();
            group.rules.iter().find(|rule| rule.id == id).unwrap().clone()
        }

        fn modify(&self, rules: &[(&str, SecurityGroupRuleRequest)]) -> ModifySecurityGroupRulesRequest {
            let update = |(id, rule): &(&str, SecurityGroupRuleRequest)| SecurityGroupRuleUpdate {
                security_group_rule_id: Some((*id).to_owned()),
                security_group_rule: Some(rule.clone()),
            };
            ModifySecurityGroupRulesRequest {
                group_id: Some(self.id.clone()),
                security_group_rules: rules.iter().map(update).collect(),
                dry_run: None,
            }
        }
    }

    fn https(cidr: &str) -> SecurityGroupRuleRequest {
        SecurityGroupRuleRequest {
            ip_protocol: Some("tcp".into()),
            from_port: Some(443),
            to_port: Some(443),
            cidr_ipv4: Some(cidr.into()),
            ..Default::default()
        }
    }

    #[test]
    fn a_rule_becomes_what_the_request_says_under_its_old_id() {
        let group = group();
        let id = &group.ssh[0];
        let request = group.modify(&[(id, https("10.9.9.9/16"))]);
        group.fixture.call(ALICE, |call| modify_security_group_rules(call, request)).unwrap();
        let rule = group.rule(id);
        assert_eq!((rule.from_port, rule.to_port, rule.description), (443, 443, None));
        assert_eq!(rule.remote, RuleRemote::Ipv4("10.9.0.0/16".parse().unwrap()));
    }

    #[test]
    fn rules_change_all_or_none() {
        let group = group();
        let (one, two) = (group.ssh[0].as_str(), group.ssh[1].as_str());
        let swap = [(one, https("192.0.2.0/24")), (two, https("10.0.0.0/8"))];
        group.fixture.call(ALICE, |call| modify_security_group_rules(call, group.modify(&swap))).unwrap();
        let ipv6 = SecurityGroupRuleRequest { cidr_ipv4: None, cidr_ipv6: Some("2001:db8::/32".into()), ..https("") };
        let none = SecurityGroupRuleRequest { cidr_ipv4: None, ..https("") };
        let both = SecurityGroupRuleRequest { cidr_ipv6: Some("2001:db8::/32".into()), ..https("10.0.0.0/8") };
        let unknown = "sgr-0123456789abcdef0";
        for (rules, code) in [
            (vec![(one, https("198.51.100.0/24")), (unknown, https("10.0.0.0/8"))], "InvalidSecurityGroupRuleId.NotFound"),
            (vec![(one, https("10.0.0.0/8"))], "InvalidPermission.Duplicate"),
            (vec![(one, ipv6)], "InvalidParameterValue"),
            (vec![(one, none)], "InvalidParameterCombination"),
            (vec![(one, both)], "InvalidParameterCombination"),
            (vec![(one, https("10.0.0.0"))], "InvalidParameterValue"),
        ] {
            assert_eq!(group.fixture.refusal(ALICE, |call| modify_security_group_rules(call, group.modify(&rules))), code);
        }
        assert_eq!(group.rule(one).remote, RuleRemote::Ipv4("192.0.2.0/24".parse().unwrap()));
        let refused = group.fixture.refusal(BOB, |call| modify_security_group_rules(call, group.modify(&swap)));
        assert_eq!(refused, "InvalidGroup.NotFound");
    }

    #[test]
    fn descriptions_are_replaced_by_rule_or_by_id() {
        let group = group();
        let by_rule = |cidr: &str, text: Option<&str>| {
            let mut permission = permission(&[cidr]);
            permission.ip_ranges[0].description = text.map(str::to_owned);
            UpdateSecurityGroupRuleDescriptionsIngressRequest {
                group_id: Some(group.id.clone()),
                ip_permissions: vec![permission],
                ..Default::default()
            }
        };
        let by_id = |id: &str, text: &str| {
            let (security_group_rule_id, description) = (Some(id.to_owned()), Some(text.to_owned()));
            UpdateSecurityGroupRuleDescriptionsIngressRequest {
                group_id: Some(group.id.clone()),
                security_group_rule_descriptions: vec![SecurityGroupRuleDescription { security_group_rule_id, description }],
                ..Default::default()
            }
        };
        let update = |request| group.fixture.call(ALICE, |call| update_security_group_rule_descriptions_ingress(call, request));
        update(by_rule("10.0.0.0/8", None)).unwrap();
        assert_eq!(group.rule(&group.ssh[0]).description, None);
        update(by_id(&group.ssh[1], "office")).unwrap();
        assert_eq!(group.rule(&group.ssh[1]).description.as_deref(), Some("office"));
        let both = UpdateSecurityGroupRuleDescriptionsIngressRequest {
            ip_permissions: vec![permission(&["10.0.0.0/8"])],
            ..by_id(&group.ssh[1], "x")
        };
        let egress = group.fixture.world.begin().get::<SecurityGroup>(ALICE, &group.id).unwrap();
        let egress = egress.rules.iter().find(|rule| rule.egress).unwrap().id.clone();
        for (request, code) in [
            (by_rule("10.9.0.0/16", None), "InvalidPermission.NotFound"),
            (by_id(&egress, "x"), "InvalidSecurityGroupRuleId.NotFound"),
            (by_id(&group.ssh[1], "a\nb"), "InvalidParameterValue"),
            (both, "InvalidParameterCombination"),
            (
                UpdateSecurityGroupRuleDescriptionsIngressRequest { group_id: Some(group.id.clone()), ..Default::default() },
                "MissingParameter",
            ),
        ] {
            assert_eq!(update(request).unwrap_err().code, code);
        }
    }
}
