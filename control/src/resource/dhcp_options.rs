//! DHCP option sets: what DHCP tells the guests of a VPC.
//!
//! An account has one set, EC2's default: its own domain and Amazon's DNS. It is made together with the account's first VPC.

use std::collections::BTreeMap;

use super::filter::{Filters, Page};
use super::id::DHCP_OPTIONS;
use super::{network_interface, tag};
use crate::error::ApiError;
use crate::model::DhcpOptions;
use crate::shapes::{self, AttributeValue, DescribeDhcpOptionsRequest, DescribeDhcpOptionsResult, DhcpConfiguration};
use crate::world::{Call, Region, Tx};

/// The id of the account's default set, which is made if there is none.
pub fn default_set(tx: &mut Tx<'_>, region: &Region, account: &str) -> String {
    if let Some(row) = tx.list::<DhcpOptions>(account).next() {
        return row.id.clone();
    }
    let id = tx.new_id(DHCP_OPTIONS.prefix);
    let configurations = BTreeMap::from([
        ("domain-name".to_owned(), vec![network_interface::private_domain(region)]),
        ("domain-name-servers".to_owned(), vec!["AmazonProvidedDNS".to_owned()]),
    ]);
    tx.put(DhcpOptions { account_id: account.to_owned(), id: id.clone(), configurations });
    id
}

/// DescribeDhcpOptions.
///
/// # Errors
/// `InvalidDhcpOptionID.NotFound` and those of filters and pages.
pub fn describe_dhcp_options(call: &mut Call<'_>, request: DescribeDhcpOptionsRequest) -> Result<DescribeDhcpOptionsResult, ApiError> {
    let filters = Filters::new(request.filters, &["dhcp-options-id", "key", "value", "owner-id", "tag"])?;
    let page = Page::new("DescribeDhcpOptions", request.max_results, request.next_token.as_deref(), 1000)?;
    let rows = DHCP_OPTIONS.rows::<DhcpOptions>(call, &request.dhcp_options_ids)?;
    let passing = rows.into_iter().filter(|(id, row)| {
        filters.pass(&tag::of(&call.tx, call.account(), id), |name, test| match name {
            "dhcp-options-id" => test(id),
            "key" => row.configurations.keys().any(|key| test(key)),
            "value" => row.configurations.values().flatten().any(|value| test(value)),
            "owner-id" => test(&row.account_id),
            _ => false,
        })
    });
    let (page, next_token) = page.take(passing);
    Ok(DescribeDhcpOptionsResult { dhcp_options: page.iter().map(|row| shape(call, row)).collect(), next_token })
}

fn shape(call: &Call<'_>, row: &DhcpOptions) -> shapes::DhcpOptions {
    let configuration = |(key, values): (&String, &Vec<String>)| DhcpConfiguration {
        key: Some(key.clone()),
        values: values.iter().map(|value| AttributeValue { value: Some(value.clone()) }).collect(),
    };
    shapes::DhcpOptions {
        dhcp_options_id: Some(row.id.clone()),
        owner_id: Some(row.account_id.clone()),
        dhcp_configurations: row.configurations.iter().map(configuration).collect(),
        tags: tag::shapes(&tag::of(&call.tx, &row.account_id, &row.id)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};

    #[test]
    fn all_vpcs_of_an_account_share_the_default_set() {
        let fixture = Fixture::new();
        let request = shapes::CreateVpcRequest { cidr_block: Some("10.0.0.0/16".into()), ..Default::default() };
        let vpc = fixture.call(ALICE, |call| super::super::vpc::create_vpc(call, request)).unwrap().vpc.unwrap();
        let sets = fixture.call(ALICE, |call| describe_dhcp_options(call, Default::default())).unwrap().dhcp_options;
        let [set] = sets.as_slice() else { panic!() };
        assert_eq!(set.dhcp_options_id, vpc.dhcp_options_id);
        assert_eq!(set.dhcp_configurations[0].values[0].value.as_deref(), Some("ec2.internal"));
        let request = DescribeDhcpOptionsRequest { dhcp_options_ids: vpc.dhcp_options_id.into_iter().collect(), ..Default::default() };
        assert_eq!(fixture.refusal(BOB, |call| describe_dhcp_options(call, request)), "InvalidDhcpOptionID.NotFound");
    }
}
