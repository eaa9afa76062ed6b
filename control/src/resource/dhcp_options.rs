//! DHCP option sets: what DHCP tells the guests of a VPC.
//!
//! EC2 makes a default set together with an account's first VPC: its own domain and Amazon's DNS. A tenant makes further ones; a set
//! never changes. A VPC names one set, or `default`, which is none at all.
//!
//! | option | values |
//! |---|---|
//! | `domain-name` | one domain, or several with spaces between them |
//! | `domain-name-servers` | `AmazonProvidedDNS`, or up to four IPv4 and four IPv6 addresses |
//! | `ntp-servers` | up to four IPv4 and four IPv6 addresses |
//! | `netbios-name-servers` | up to four IPv4 addresses |
//! | `netbios-node-type` | 1, 2, 4 or 8 |
//! | `ipv6-address-preferred-lease-time` | seconds |
//!
//! The first three reach the guests, as far as they are of IPv4; the others are kept and shown.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use super::filter::{Filters, Page};
use super::id::{DHCP_OPTIONS, VPC};
use super::{network_interface, tag};
use crate::error::ApiError;
use crate::model::{DhcpOptions, Vpc};
use crate::shapes::{
    self, AssociateDhcpOptionsRequest, AttributeValue, CreateDhcpOptionsRequest, CreateDhcpOptionsResult, DeleteDhcpOptionsRequest,
    DescribeDhcpOptionsRequest, DescribeDhcpOptionsResult, DhcpConfiguration,
};
use crate::world::{Call, Region, Tx};

/// What a VPC names that has no set.
pub const NONE: &str = "default";
/// Amazon's resolver, as a set names it.
pub const AMAZON_DNS: &str = "AmazonProvidedDNS";
/// The most sets of an account.
const MOST_SETS: usize = 1000;
/// The most addresses of each family in one option.
const MOST_SERVERS: usize = 4;
/// The longest domain, or domains: as much as an option of DHCP can hold.
const LONGEST_DOMAIN: usize = 255;

/// The id of the account's default set, which is made if there is none.
pub fn default_set(tx: &mut Tx<'_>, region: &Region, account: &str) -> String {
    if let Some(row) = tx.list::<DhcpOptions>(account).find(|row| row.is_default) {
        return row.id.clone();
    }
    let id = tx.new_id(DHCP_OPTIONS.prefix);
    let configurations = BTreeMap::from([
        ("domain-name".to_owned(), vec![network_interface::private_domain(region)]),
        ("domain-name-servers".to_owned(), vec![AMAZON_DNS.to_owned()]),
    ]);
    tx.put(DhcpOptions { account_id: account.to_owned(), id: id.clone(), configurations, is_default: true });
    id
}

/// CreateDhcpOptions.
///
/// # Errors
/// `InvalidParameterValue` for an unknown option, one that is given twice, or a value that it cannot have;
/// `DhcpOptionsLimitExceeded`, those of tags.
pub fn create_dhcp_options(call: &mut Call<'_>, request: CreateDhcpOptionsRequest) -> Result<CreateDhcpOptionsResult, ApiError> {
    let mut configurations = BTreeMap::new();
    for option in request.dhcp_configurations {
        let key = option.key.ok_or_else(|| ApiError::missing_parameter("DhcpConfiguration.Key"))?;
        // Several addresses may stand in one value.
        let list = option.values.iter().flat_map(|value| value.split(',')).map(|value| value.trim().to_owned());
        let values = if key == "domain-name" { option.values.clone() } else { list.collect() };
        check(&key, &values)?;
        if configurations.contains_key(&key) {
            return Err(ApiError::invalid_value(format!("The DHCP option {key} is given more than once")));
        }
        configurations.insert(key, values);
    }
    let tags = tag::specified(request.tag_specifications, &DHCP_OPTIONS)?;
    if call.list::<DhcpOptions>().count() >= MOST_SETS {
        let message = "The maximum number of DHCP option sets has been reached.";
        return Err(ApiError::new("DhcpOptionsLimitExceeded", message));
    }
    let (account_id, id) = (call.account().to_owned(), call.tx.new_id(DHCP_OPTIONS.prefix));
    tag::set(&mut call.tx, &account_id, &DHCP_OPTIONS, &id, tags);
    let row = DhcpOptions { account_id, id, configurations, is_default: false };
    let answer = shape(call, &row);
    call.tx.put(row);
    Ok(CreateDhcpOptionsResult { dhcp_options: Some(answer) })
}

fn check(key: &str, values: &[String]) -> Result<(), ApiError> {
    let wrong = |value: &str| ApiError::invalid_value(format!("Value ({value}) for parameter value is invalid for the DHCP option {key}."));
    let Some(first) = values.first() else { return Err(ApiError::missing_parameter("DhcpConfiguration.Value")) };
    let only = || if values.len() == 1 { Ok(()) } else { Err(wrong(&values.join(","))) };
    match key {
        "domain-name" => {
            only()?;
            let plain = first.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b' '));
            if first.trim().is_empty() || !plain || LONGEST_DOMAIN < first.len() { Err(wrong(first)) } else { Ok(()) }
        }
        "domain-name-servers" if first == AMAZON_DNS => only(),
        "domain-name-servers" | "ntp-servers" => {
            let parsed = values.iter().map(|value| value.parse::<IpAddr>().map_err(|_| wrong(value))).collect::<Result<Vec<_>, _>>()?;
            let ipv4 = parsed.iter().filter(|ip| ip.is_ipv4()).count();
            if MOST_SERVERS < ipv4 || MOST_SERVERS < parsed.len().saturating_sub(ipv4) { Err(wrong(&values.join(","))) } else { Ok(()) }
        }
        "netbios-name-servers" => {
            values.iter().try_for_each(|value| value.parse::<Ipv4Addr>().map(|_| ()).map_err(|_| wrong(value)))?;
            if MOST_SERVERS < values.len() { Err(wrong(&values.join(","))) } else { Ok(()) }
        }
        "netbios-node-type" => {
            only()?;
            if matches!(first.as_str(), "1" | "2" | "4" | "8") { Ok(()) } else { Err(wrong(first)) }
        }
        "ipv6-address-preferred-lease-time" => {
            only()?;
            first.parse::<u32>().map(|_| ()).map_err(|_| wrong(first))
        }
        _ => Err(ApiError::invalid_value(format!("Value ({key}) for parameter key is invalid. Unknown DHCP option"))),
    }
}

/// DeleteDhcpOptions.
///
/// # Errors
/// `DependencyViolation` while a VPC names it.
pub fn delete_dhcp_options(call: &mut Call<'_>, request: DeleteDhcpOptionsRequest) -> Result<(), ApiError> {
    let id = DHCP_OPTIONS.required(request.dhcp_options_id, "DhcpOptionsId")?;
    let row = DHCP_OPTIONS.row::<DhcpOptions>(call, &id)?;
    if call.list::<Vpc>().any(|vpc| vpc.dhcp_options_id == id) {
        return Err(ApiError::dependency(format!("The dhcpOptions '{id}' has dependencies and cannot be deleted.")));
    }
    tag::remove(&mut call.tx, &row.account_id, &id);
    call.tx.delete::<DhcpOptions>(&row.account_id, &id);
    Ok(())
}

/// AssociateDhcpOptions, with a set or with `default`, which takes the VPC's set away.
///
/// # Errors
/// `InvalidDhcpOptionID.NotFound`, `InvalidVpcID.NotFound`.
pub fn associate_dhcp_options(call: &mut Call<'_>, request: AssociateDhcpOptionsRequest) -> Result<(), ApiError> {
    let vpc_id = VPC.required(request.vpc_id, "VpcId")?;
    let vpc = VPC.row::<Vpc>(call, &vpc_id)?;
    let id = request.dhcp_options_id.filter(|id| !id.is_empty()).ok_or_else(|| ApiError::missing_parameter("DhcpOptionsId"))?;
    if id != NONE {
        DHCP_OPTIONS.row::<DhcpOptions>(call, &id)?;
    }
    call.tx.update::<Vpc>(&vpc.account_id, &vpc_id, |vpc| vpc.dhcp_options_id = id);
    Ok(())
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
    use crate::resource::vpc::create_vpc;
    use crate::shapes::NewDhcpConfiguration;

    fn create(options: &[(&str, &[&str])]) -> CreateDhcpOptionsRequest {
        let option = |(key, values): &(&str, &[&str])| NewDhcpConfiguration {
            key: Some((*key).to_owned()),
            values: values.iter().map(|value| (*value).to_owned()).collect(),
        };
        CreateDhcpOptionsRequest { dhcp_configurations: options.iter().map(option).collect(), ..Default::default() }
    }

    fn made(fixture: &Fixture, options: &[(&str, &[&str])]) -> String {
        let request = create(options);
        let set = fixture.call(ALICE, |call| create_dhcp_options(call, request)).unwrap().dhcp_options.unwrap();
        set.dhcp_options_id.unwrap()
    }

    fn associate(set: &str, vpc: &str) -> AssociateDhcpOptionsRequest {
        AssociateDhcpOptionsRequest { dhcp_options_id: Some(set.into()), vpc_id: Some(vpc.into()), dry_run: None }
    }

    #[test]
    fn all_vpcs_of_an_account_share_the_default_set() {
        let fixture = Fixture::new();
        made(&fixture, &[("domain-name", &["corp.example"])]);
        let request = shapes::CreateVpcRequest { cidr_block: Some("10.0.0.0/16".into()), ..Default::default() };
        let vpc = fixture.call(ALICE, |call| create_vpc(call, request)).unwrap().vpc.unwrap();
        assert_eq!(vpc.dhcp_options_id, Some(fixture.default_vpc(ALICE).dhcp_options_id));
        let request = DescribeDhcpOptionsRequest { dhcp_options_ids: vpc.dhcp_options_id.into_iter().collect(), ..Default::default() };
        let set = fixture.call(ALICE, |call| describe_dhcp_options(call, request.clone())).unwrap().dhcp_options.remove(0);
        assert_eq!(set.dhcp_configurations[0].values[0].value.as_deref(), Some("ec2.internal"));
        assert_eq!(fixture.refusal(BOB, |call| describe_dhcp_options(call, request)), "InvalidDhcpOptionID.NotFound");
    }

    #[test]
    fn options_are_checked_and_lists_may_stand_in_one_value() {
        let fixture = Fixture::new();
        let id = made(&fixture, &[("ntp-servers", &["10.0.0.1,10.0.0.2", "10.0.0.3"]), ("netbios-node-type", &["2"])]);
        let row = fixture.world.begin().get::<DhcpOptions>(ALICE, &id).unwrap();
        assert_eq!(row.configurations["ntp-servers"], ["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
        for options in [
            [("nonsense", ["1"].as_slice())].as_slice(),
            &[("domain-name", &[""])],
            &[("domain-name", &["a\nb"])],
            &[("domain-name", &["a.example", "b.example"])],
            &[("domain-name-servers", &["AmazonProvidedDNS", "10.0.0.1"])],
            &[("domain-name-servers", &["dns.example"])],
            &[("ntp-servers", &["10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4,10.0.0.5"])],
            &[("netbios-name-servers", &["2001:db8::1"])],
            &[("netbios-node-type", &["3"])],
            &[("ntp-servers", &["10.0.0.1"]), ("ntp-servers", &["10.0.0.2"])],
        ] {
            let refused = fixture.refusal(ALICE, |call| create_dhcp_options(call, create(options)));
            assert_eq!(refused, "InvalidParameterValue", "{options:?}");
        }
        let empty = create(&[("domain-name", &[])]);
        assert_eq!(fixture.refusal(ALICE, |call| create_dhcp_options(call, empty)), "MissingParameter");
    }

    #[test]
    fn a_set_in_use_stays_until_the_vpc_has_another_or_none() {
        let fixture = Fixture::new();
        let vpc = fixture.default_vpc(ALICE).id;
        let set = made(&fixture, &[("domain-name", &["corp.example"])]);
        fixture.call(ALICE, |call| associate_dhcp_options(call, associate(&set, &vpc))).unwrap();
        assert_eq!(fixture.default_vpc(ALICE).dhcp_options_id, set);
        let delete = || DeleteDhcpOptionsRequest { dhcp_options_id: Some(set.clone()), dry_run: None };
        assert_eq!(fixture.refusal(ALICE, |call| delete_dhcp_options(call, delete())), "DependencyViolation");
        assert_eq!(fixture.refusal(BOB, |call| delete_dhcp_options(call, delete())), "InvalidDhcpOptionID.NotFound");
        let theirs = fixture.default_vpc(BOB).id;
        for (set, vpc, code) in [
            (set.as_str(), theirs.as_str(), "InvalidVpcID.NotFound"),
            ("dopt-0123456789abcdef0", &vpc, "InvalidDhcpOptionID.NotFound"),
            ("none", &vpc, "InvalidDhcpOptionsId.Malformed"),
        ] {
            assert_eq!(fixture.refusal(ALICE, |call| associate_dhcp_options(call, associate(set, vpc))), code, "{set} {vpc}");
        }
        fixture.call(ALICE, |call| associate_dhcp_options(call, associate(NONE, &vpc))).unwrap();
        assert_eq!(fixture.default_vpc(ALICE).dhcp_options_id, "default");
        fixture.call(ALICE, |call| delete_dhcp_options(call, delete())).unwrap();
    }
}
