//! Network ACLs: for now each VPC has its default ACL, which lets everything through, and every subnet of the VPC is associated with it.

use ipnet::Ipv4Net;

use super::filter::{Filters, Page};
use super::id::NETWORK_ACL;
use super::{security_group_rule, tag};
use crate::error::ApiError;
use crate::model::{NetworkAcl, NetworkAclAssociation, NetworkAclEntry};
use crate::shapes::{self, DescribeNetworkAclsRequest, DescribeNetworkAclsResult, PortRange};
use crate::world::{Call, Tx};

/// The number of the final deny, which no tenant can take away.
const LAST: u16 = 32767;

/// Gives a VPC its default ACL.
pub fn default_insert(tx: &mut Tx<'_>, account: &str, vpc_id: &str) {
    let entry = |number, egress, allow| NetworkAclEntry { number, egress, protocol: None, allow, cidr: Ipv4Net::default(), ports: None };
    let entries = vec![entry(100, true, true), entry(LAST, true, false), entry(100, false, true), entry(LAST, false, false)];
    let id = tx.new_id(NETWORK_ACL.prefix);
    let (account_id, vpc_id) = (account.to_owned(), vpc_id.to_owned());
    tx.put(NetworkAcl { account_id, id, vpc_id, is_default: true, entries, associations: Vec::new() });
}

/// Puts a new subnet under the default ACL of its VPC.
pub fn associate(tx: &mut Tx<'_>, account: &str, vpc_id: &str, subnet_id: &str) {
    let association = NetworkAclAssociation { id: tx.new_id("aclassoc"), subnet_id: subnet_id.to_owned() };
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
            "entry.cidr" => entry(&|entry| test(&entry.cidr.to_string())),
            "entry.egress" => entry(&|entry| test(flag(entry.egress))),
            "entry.port-range.from" => entry(&|entry| entry.ports.is_some_and(|(from, _)| test(&from.to_string()))),
            "entry.port-range.to" => entry(&|entry| entry.ports.is_some_and(|(_, to)| test(&to.to_string()))),
            // The protocol of an entry is a number, but the filter also takes its name.
            "entry.protocol" => entry(&|entry| test(&number(entry.protocol)) || test(&security_group_rule::protocol_name(entry.protocol))),
            "entry.rule-action" => entry(&|entry| test(action(entry))),
            "entry.rule-number" => entry(&|entry| test(&entry.number.to_string())),
            "network-acl-id" => test(id),
            "owner-id" => test(&acl.account_id),
            "vpc-id" => test(&acl.vpc_id),
            // No entry names an ICMP type or an IPv6 block.
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
        cidr_block: Some(entry.cidr.to_string()),
        egress: Some(entry.egress),
        protocol: Some(number(entry.protocol)),
        rule_action: Some(action(entry).to_owned()),
        rule_number: Some(entry.number.into()),
        port_range: entry.ports.map(|(from, to)| PortRange { from: Some(from.into()), to: Some(to.into()) }),
        ..Default::default()
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
}
