//! Subnets, and the addresses in them.
//!
//! The first four addresses of a subnet (network, router, DNS, reserve) and the last (broadcast) are never given out. The free
//! addresses are not stored: they are those that no network interface of the subnet has, so the count that a Describe shows is exact
//! at every moment.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use ipnet::Ipv4Net;

use super::filter::{Filters, Page};
use super::id::{SUBNET, VPC, unsupported};
use super::{network_acl, tag, vpc};
use crate::error::ApiError;
use crate::model::{NetworkAcl, NetworkInterface, RouteTable, Subnet, Time, Vpc};
use crate::shapes::{
    self, CreateSubnetRequest, CreateSubnetResult, DeleteSubnetRequest, DescribeSubnetsRequest, DescribeSubnetsResult,
    ModifySubnetAttributeRequest, PrivateDnsNameOptionsOnLaunch,
};
use crate::world::{Call, Region, Tx};

/// The most subnets of a VPC.
const MOST_SUBNETS: usize = 200;
/// Addresses at the start of a subnet that no interface gets.
const RESERVED_FIRST: u32 = 4;
/// The same with the last address.
const RESERVED: u32 = 5;

/// CreateSubnet.
///
/// # Errors
/// `InvalidVpcID.NotFound`, `InvalidSubnet.Range`, `InvalidSubnet.Conflict`, `SubnetLimitExceeded`, those of tags.
pub fn create_subnet(call: &mut Call<'_>, request: CreateSubnetRequest) -> Result<CreateSubnetResult, ApiError> {
    unsupported(&[
        ("Ipv6CidrBlock", request.ipv6_cidr_block.is_some()),
        ("OutpostArn", request.outpost_arn.is_some()),
        ("Ipv6Native", request.ipv6_native == Some(true)),
        ("Ipv4IpamPoolId", request.ipv4_ipam_pool_id.is_some()),
        ("Ipv4NetmaskLength", request.ipv4_netmask_length.is_some()),
        ("Ipv6IpamPoolId", request.ipv6_ipam_pool_id.is_some()),
        ("Ipv6NetmaskLength", request.ipv6_netmask_length.is_some()),
    ])?;
    let vpc_id = VPC.required(request.vpc_id, "VpcId")?;
    let vpc = VPC.row::<Vpc>(call, &vpc_id)?;
    let text = request.cidr_block.ok_or_else(|| ApiError::missing_parameter("CidrBlock"))?;
    let cidr = vpc::parse_cidr("cidrBlock", &text)?;
    let inside = vpc::cidrs(&vpc).any(|(_, block)| block.contains(&cidr));
    if !(16..=28).contains(&cidr.prefix_len()) || !inside {
        return Err(ApiError::new("InvalidSubnet.Range", format!("The CIDR '{text}' is invalid.")));
    }
    let siblings = call.find::<Subnet>("vpc", &vpc_id);
    if siblings.iter().any(|other| other.cidr.contains(&cidr) || cidr.contains(&other.cidr)) {
        return Err(ApiError::new("InvalidSubnet.Conflict", format!("The CIDR '{text}' conflicts with another subnet")));
    }
    if siblings.len() >= MOST_SUBNETS {
        let message = format!("The maximum number of subnets has been reached for vpc '{vpc_id}'.");
        return Err(ApiError::new("SubnetLimitExceeded", message));
    }
    let zone = choose_zone(call.region, request.availability_zone, request.availability_zone_id, &siblings)?;
    let tags = tag::specified(request.tag_specifications, &SUBNET)?;
    let subnet = insert(&mut call.tx, call.now, &vpc, &zone, cidr, false);
    tag::set(&mut call.tx, &vpc.account_id, &SUBNET, &subnet.id, tags);
    Ok(CreateSubnetResult { subnet: Some(shape(call, &subnet)) })
}

/// The zone that is asked for by name or id, else the one with the fewest subnets of the VPC.
fn choose_zone(region: &Region, name: Option<String>, id: Option<String>, siblings: &[Arc<Subnet>]) -> Result<String, ApiError> {
    let zones = || region.zones.iter();
    let found = match (&name, &id) {
        (Some(_), Some(_)) => {
            let message = "Only one of availabilityZone and availabilityZoneId may be specified";
            return Err(ApiError::invalid_combination(message));
        }
        (Some(name), None) => zones().find(|zone| zone.name == *name),
        (None, Some(id)) => zones().find(|zone| zone.id == *id),
        (None, None) => zones().min_by_key(|zone| siblings.iter().filter(|subnet| subnet.zone == zone.name).count()),
    };
    found.map(|zone| zone.name.clone()).ok_or_else(|| {
        let (parameter, value) = if id.is_some() { ("availabilityZoneId", id) } else { ("availabilityZone", name) };
        let known: Vec<&str> = zones().map(|zone| zone.name.as_str()).collect();
        ApiError::invalid_value(format!(
            "Value ({}) for parameter {parameter} is invalid. Subnets can currently only be created in the following availability zones: {}.",
            value.unwrap_or_default(),
            known.join(", ")
        ))
    })
}

/// Puts a subnet into a VPC; the default network ACL filters it. A default subnet gives its instances public addresses.
pub fn insert(tx: &mut Tx<'_>, now: Time, vpc: &Vpc, zone: &str, cidr: Ipv4Net, default: bool) -> Subnet {
    let subnet = Subnet {
        account_id: vpc.account_id.clone(),
        id: tx.new_id(SUBNET.prefix),
        vpc_id: vpc.id.clone(),
        zone: zone.to_owned(),
        cidr,
        default_for_zone: default,
        map_public_ip_on_launch: default,
        created: now,
    };
    network_acl::associate(tx, &vpc.account_id, &vpc.id, &subnet.id);
    tx.put(subnet.clone());
    subnet
}

/// DeleteSubnet.
///
/// # Errors
/// `DependencyViolation` while a network interface has an address in it.
pub fn delete_subnet(call: &mut Call<'_>, request: DeleteSubnetRequest) -> Result<(), ApiError> {
    let id = SUBNET.required(request.subnet_id, "SubnetId")?;
    let subnet = SUBNET.row::<Subnet>(call, &id)?;
    if !call.find::<NetworkInterface>("subnet", &id).is_empty() {
        return Err(ApiError::dependency(format!("The subnet '{id}' has dependencies and cannot be deleted.")));
    }
    let account = &subnet.account_id;
    for table in call.find::<RouteTable>("subnet", &id) {
        call.tx.update::<RouteTable>(account, &table.id, |table| {
            table.associations.retain(|association| association.subnet_id.as_ref() != Some(&id));
        });
    }
    for acl in call.find::<NetworkAcl>("vpc", &subnet.vpc_id) {
        if acl.associations.iter().any(|association| association.subnet_id == id) {
            call.tx.update::<NetworkAcl>(account, &acl.id, |acl| acl.associations.retain(|association| association.subnet_id != id));
        }
    }
    tag::remove(&mut call.tx, account, &id);
    call.tx.delete::<Subnet>(account, &id);
    Ok(())
}

/// DescribeSubnets.
///
/// # Errors
/// `InvalidSubnetID.NotFound` and those of filters and pages.
pub fn describe_subnets(call: &mut Call<'_>, request: DescribeSubnetsRequest) -> Result<DescribeSubnetsResult, ApiError> {
    let names = [
        "availability-zone",
        "availabilityZone",
        "availability-zone-id",
        "availabilityZoneId",
        "available-ip-address-count",
        "cidr",
        "cidr-block",
        "cidrBlock",
        "customer-owned-ipv4-pool",
        "default-for-az",
        "defaultForAz",
        "enable-dns64",
        "enable-lni-at-device-index",
        "ipv6-cidr-block-association.ipv6-cidr-block",
        "ipv6-cidr-block-association.association-id",
        "ipv6-cidr-block-association.state",
        "ipv6-native",
        "map-customer-owned-ip-on-launch",
        "map-public-ip-on-launch",
        "outpost-arn",
        "owner-id",
        "private-dns-name-options-on-launch.hostname-type",
        "private-dns-name-options-on-launch.enable-resource-name-dns-a-record",
        "private-dns-name-options-on-launch.enable-resource-name-dns-aaaa-record",
        "state",
        "subnet-arn",
        "subnet-id",
        "tag",
        "vpc-id",
    ];
    let filters = Filters::new(request.filters, &names)?;
    let page = Page::new("DescribeSubnets", request.max_results, request.next_token.as_deref(), 1000)?;
    let rows = SUBNET.rows::<Subnet>(call, &request.subnet_ids)?;
    let passing = rows.into_iter().filter(|(id, subnet)| {
        let flag = |on| if on { "true" } else { "false" };
        filters.pass(&tag::of(&call.tx, call.account(), id), |name, test| match name {
            "availability-zone" | "availabilityZone" => test(&subnet.zone),
            "availability-zone-id" | "availabilityZoneId" => call.region.zone(&subnet.zone).is_some_and(|zone| test(&zone.id)),
            "available-ip-address-count" => test(&available(&call.tx, subnet).to_string()),
            "cidr" | "cidr-block" | "cidrBlock" => test(&subnet.cidr.to_string()),
            "default-for-az" | "defaultForAz" => test(flag(subnet.default_for_zone)),
            "map-public-ip-on-launch" => test(flag(subnet.map_public_ip_on_launch)),
            "enable-dns64"
            | "ipv6-native"
            | "map-customer-owned-ip-on-launch"
            | "private-dns-name-options-on-launch.enable-resource-name-dns-a-record"
            | "private-dns-name-options-on-launch.enable-resource-name-dns-aaaa-record" => test("false"),
            "private-dns-name-options-on-launch.hostname-type" => test("ip-name"),
            "owner-id" => test(&subnet.account_id),
            "state" => test("available"),
            "subnet-arn" => test(&SUBNET.arn(call.region, &subnet.account_id, id)),
            "subnet-id" => test(id),
            "vpc-id" => test(&subnet.vpc_id),
            // No subnet has an IPv6 block, an outpost or a customer's pool.
            _ => false,
        })
    });
    let (page, next_token) = page.take(passing);
    Ok(DescribeSubnetsResult { subnets: page.iter().map(|subnet| shape(call, subnet)).collect(), next_token })
}

fn shape(call: &Call<'_>, subnet: &Subnet) -> shapes::Subnet {
    shapes::Subnet {
        subnet_id: Some(subnet.id.clone()),
        subnet_arn: Some(SUBNET.arn(call.region, &subnet.account_id, &subnet.id)),
        vpc_id: Some(subnet.vpc_id.clone()),
        owner_id: Some(subnet.account_id.clone()),
        cidr_block: Some(subnet.cidr.to_string()),
        availability_zone: Some(subnet.zone.clone()),
        availability_zone_id: call.region.zone(&subnet.zone).map(|zone| zone.id.clone()),
        available_ip_address_count: Some(i32::try_from(available(&call.tx, subnet)).unwrap_or(i32::MAX)),
        default_for_az: Some(subnet.default_for_zone),
        map_public_ip_on_launch: Some(subnet.map_public_ip_on_launch),
        map_customer_owned_ip_on_launch: Some(false),
        assign_ipv6_address_on_creation: Some(false),
        enable_dns64: Some(false),
        ipv6_native: Some(false),
        private_dns_name_options_on_launch: Some(PrivateDnsNameOptionsOnLaunch {
            hostname_type: Some("ip-name".into()),
            enable_resource_name_dns_a_record: Some(false),
            enable_resource_name_dns_aaaa_record: Some(false),
        }),
        state: Some("available".into()),
        tags: tag::shapes(&tag::of(&call.tx, &subnet.account_id, &subnet.id)),
        ..Default::default()
    }
}

/// ModifySubnetAttribute: of the attributes, only public addresses at launch can change here.
///
/// # Errors
/// `UnsupportedOperation` for another attribute, `InvalidParameterCombination` for none.
pub fn modify_subnet_attribute(call: &mut Call<'_>, request: ModifySubnetAttributeRequest) -> Result<(), ApiError> {
    let on = |attribute: &Option<shapes::AttributeBooleanValue>| attribute.as_ref().and_then(|attribute| attribute.value);
    unsupported(&[
        ("AssignIpv6AddressOnCreation", on(&request.assign_ipv6_address_on_creation) == Some(true)),
        ("MapCustomerOwnedIpOnLaunch", on(&request.map_customer_owned_ip_on_launch) == Some(true)),
        ("CustomerOwnedIpv4Pool", request.customer_owned_ipv4_pool.is_some()),
        ("EnableDns64", on(&request.enable_dns64) == Some(true)),
        ("PrivateDnsHostnameTypeOnLaunch", request.private_dns_hostname_type_on_launch.as_deref().is_some_and(|kind| kind != "ip-name")),
        ("EnableResourceNameDnsARecordOnLaunch", on(&request.enable_resource_name_dns_a_record_on_launch) == Some(true)),
        ("EnableResourceNameDnsAAAARecordOnLaunch", on(&request.enable_resource_name_dns_aaaa_record_on_launch) == Some(true)),
        ("EnableLniAtDeviceIndex", request.enable_lni_at_device_index.is_some()),
        ("DisableLniAtDeviceIndex", on(&request.disable_lni_at_device_index) == Some(true)),
    ])?;
    let id = SUBNET.required(request.subnet_id, "SubnetId")?;
    let subnet = SUBNET.row::<Subnet>(call, &id)?;
    let others = [
        on(&request.assign_ipv6_address_on_creation).is_some(),
        on(&request.map_customer_owned_ip_on_launch).is_some(),
        on(&request.enable_dns64).is_some(),
        request.private_dns_hostname_type_on_launch.is_some(),
        on(&request.enable_resource_name_dns_a_record_on_launch).is_some(),
        on(&request.enable_resource_name_dns_aaaa_record_on_launch).is_some(),
        on(&request.disable_lni_at_device_index).is_some(),
    ];
    match on(&request.map_public_ip_on_launch) {
        Some(on) => {
            call.tx.update::<Subnet>(&subnet.account_id, &id, |subnet| subnet.map_public_ip_on_launch = on);
        }
        // Turning off what is never on changes nothing.
        None if others.contains(&true) => {}
        None => return Err(ApiError::invalid_combination("No attributes specified.")),
    }
    Ok(())
}

/// How many addresses of a subnet are free.
pub fn available(tx: &Tx<'_>, subnet: &Subnet) -> u32 {
    let interfaces = tx.find::<NetworkInterface>(&subnet.account_id, "subnet", &subnet.id);
    let used: usize = interfaces.iter().map(|interface| interface.private_ips().count()).sum();
    size(subnet).saturating_sub(RESERVED).saturating_sub(u32::try_from(used).unwrap_or(u32::MAX))
}

/// Addresses of a subnet, reserved ones included; at most 65,536.
fn size(subnet: &Subnet) -> u32 {
    1u32.checked_shl(u32::from(32u8.saturating_sub(subnet.cidr.prefix_len()))).unwrap_or(u32::MAX)
}

/// Free addresses of a subnet: the asked-for ones, and for each `None` any. The search begins at a random place, so that the address
/// of an instance that just went is not the next one's while others still remember it.
///
/// # Errors
/// `InvalidParameterValue` for an address outside the subnet or a reserved one, `InvalidIPAddress.InUse` for a taken one,
/// `InsufficientFreeAddressesInSubnet` when all are taken.
pub fn free_addresses(tx: &mut Tx<'_>, subnet: &Subnet, wanted: &[Option<Ipv4Addr>]) -> Result<Vec<Ipv4Addr>, ApiError> {
    let interfaces = tx.find::<NetworkInterface>(&subnet.account_id, "subnet", &subnet.id);
    let mut used: BTreeSet<Ipv4Addr> = interfaces.iter().flat_map(|interface| interface.private_ips()).collect();
    let first = u32::from(subnet.cidr.network());
    // What is asked for comes first, so that no free choice takes it.
    for ip in wanted.iter().flatten().copied() {
        let offset = u32::from(ip).wrapping_sub(first);
        if !subnet.cidr.contains(&ip) {
            return Err(ApiError::invalid_value(format!("Address {ip} does not fall within the subnet's address range")));
        }
        if offset < RESERVED_FIRST || offset == size(subnet).saturating_sub(1) {
            return Err(ApiError::invalid_value(format!("Address {ip} is in subnet's reserved address range")));
        }
        if !used.insert(ip) {
            return Err(ApiError::new("InvalidIPAddress.InUse", format!("Address {ip} is in use.")));
        }
    }
    let usable = size(subnet).saturating_sub(RESERVED);
    let start = u32::from_le_bytes(tx.random());
    let candidates = (0..usable).filter_map(|step| start.wrapping_add(step).checked_rem(usable));
    let mut free =
        candidates.map(|offset| Ipv4Addr::from(first.wrapping_add(RESERVED_FIRST).wrapping_add(offset))).filter(|ip| !used.contains(ip));
    let mut any = || {
        free.next().ok_or_else(|| {
            let message =
                format!("There are not enough free addresses in subnet '{}' to satisfy the requested number of instances.", subnet.id);
            ApiError::new("InsufficientFreeAddressesInSubnet", message)
        })
    };
    wanted.iter().map(|ip| ip.map_or_else(&mut any, Ok)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::resource::network_interface;

    fn create(vpc_id: &str, cidr: &str) -> CreateSubnetRequest {
        CreateSubnetRequest { vpc_id: Some(vpc_id.into()), cidr_block: Some(cidr.into()), ..Default::default() }
    }

    fn new_vpc(fixture: &Fixture, cidr: &str) -> String {
        let request = shapes::CreateVpcRequest { cidr_block: Some(cidr.into()), ..Default::default() };
        fixture.call(ALICE, |call| vpc::create_vpc(call, request)).unwrap().vpc.unwrap().vpc_id.unwrap()
    }

    fn new_subnet(fixture: &Fixture, vpc_id: &str, cidr: &str) -> String {
        fixture.call(ALICE, |call| create_subnet(call, create(vpc_id, cidr))).unwrap().subnet.unwrap().subnet_id.unwrap()
    }

    fn count(fixture: &Fixture, id: &str) -> i32 {
        let request = DescribeSubnetsRequest { subnet_ids: vec![id.into()], ..Default::default() };
        let subnets = fixture.call(ALICE, |call| describe_subnets(call, request)).unwrap().subnets;
        subnets[0].available_ip_address_count.unwrap()
    }

    #[test]
    fn blocks_must_lie_in_the_vpc_and_apart_from_each_other() {
        let fixture = Fixture::new();
        let vpc = new_vpc(&fixture, "10.0.0.0/16");
        new_subnet(&fixture, &vpc, "10.0.1.0/24");
        for (cidr, code) in [
            ("10.1.0.0/24", "InvalidSubnet.Range"),
            ("10.0.0.0/15", "InvalidSubnet.Range"),
            ("10.0.2.0/29", "InvalidSubnet.Range"),
            ("10.0.1.0/24", "InvalidSubnet.Conflict"),
            ("10.0.1.128/25", "InvalidSubnet.Conflict"),
            ("10.0.0.0/16", "InvalidSubnet.Conflict"),
            ("10.0.2.0", "InvalidParameterValue"),
        ] {
            assert_eq!(fixture.refusal(ALICE, |call| create_subnet(call, create(&vpc, cidr))), code, "{cidr}");
        }
        assert_eq!(fixture.refusal(BOB, |call| create_subnet(call, create(&vpc, "10.0.2.0/24"))), "InvalidVpcID.NotFound");
    }

    #[test]
    fn zones_are_named_by_name_or_id_or_chosen_in_turn() {
        let fixture = Fixture::new();
        let vpc = new_vpc(&fixture, "10.0.0.0/16");
        let mut zones = Vec::new();
        for part in 0..3 {
            let request = create(&vpc, &format!("10.0.{part}.0/24"));
            zones.extend(fixture.call(ALICE, |call| create_subnet(call, request)).unwrap().subnet.unwrap().availability_zone);
        }
        assert_eq!(zones, ["us-east-1a", "us-east-1b", "us-east-1c"]);
        let request = CreateSubnetRequest { availability_zone_id: Some("use1-az2".into()), ..create(&vpc, "10.0.8.0/24") };
        let subnet = fixture.call(ALICE, |call| create_subnet(call, request)).unwrap().subnet.unwrap();
        assert_eq!(subnet.availability_zone.as_deref(), Some("us-east-1b"));
        let request = CreateSubnetRequest { availability_zone: Some("us-east-1z".into()), ..create(&vpc, "10.0.9.0/24") };
        assert_eq!(fixture.refusal(ALICE, |call| create_subnet(call, request)), "InvalidParameterValue");
    }

    #[test]
    fn the_count_of_free_addresses_is_exact_down_to_none_and_back() {
        let fixture = Fixture::new();
        let vpc = new_vpc(&fixture, "10.0.0.0/16");
        let id = new_subnet(&fixture, &vpc, "10.0.1.16/28");
        assert_eq!(count(&fixture, &id), 11);
        let mut interfaces = Vec::new();
        for taken in 1..=11 {
            interfaces.push(fixture.interface(ALICE, &id, None).unwrap());
            assert_eq!(count(&fixture, &id), 11 - taken);
        }
        let mut addresses: Vec<_> = interfaces.iter().map(|interface| interface.private_ip.to_string()).collect();
        addresses.sort_by_key(|text| text.parse::<Ipv4Addr>().unwrap());
        let expected: Vec<String> = (20..=30).map(|last| format!("10.0.1.{last}")).collect();
        assert_eq!(addresses, expected, "no reserved address and none twice");
        assert_eq!(fixture.interface(ALICE, &id, None).unwrap_err().code, "InsufficientFreeAddressesInSubnet");
        for (given_back, interface) in (1..).zip(&interfaces) {
            fixture
                .call(ALICE, |call| {
                    network_interface::remove(&mut call.tx, ALICE, &interface.id);
                    Ok(())
                })
                .unwrap();
            assert_eq!(count(&fixture, &id), given_back);
        }
    }

    #[test]
    fn an_undone_launch_leaves_the_count_as_it_was() {
        let fixture = Fixture::new();
        let subnet = fixture.default_subnet(ALICE);
        let before = count(&fixture, &subnet.id);
        let result: Result<(), ApiError> = fixture.call(ALICE, |call| {
            for _ in 0..10 {
                let new = network_interface::NewInterface {
                    subnet: &subnet,
                    addresses: Default::default(),
                    connection_tracking: Default::default(),
                    security_group_ids: Vec::new(),
                    description: String::new(),
                    attachment: None,
                    associate_public_ip: false,
                };
                network_interface::insert(&mut call.tx, call.now, new)?;
            }
            Err(ApiError::dry_run())
        });
        assert!(result.is_err());
        assert_eq!(count(&fixture, &subnet.id), before);
    }

    #[test]
    fn an_asked_for_address_is_checked() {
        let fixture = Fixture::new();
        let vpc = new_vpc(&fixture, "10.0.0.0/16");
        let id = new_subnet(&fixture, &vpc, "10.0.1.0/24");
        let used = fixture.interface(ALICE, &id, None).unwrap().private_ip;
        let ask = |ip: Ipv4Addr| {
            fixture.call(ALICE, |call| {
                let subnet = call.get::<Subnet>(&id).unwrap();
                free_addresses(&mut call.tx, &subnet, &[Some(ip)]).map(|ips| ips[0])
            })
        };
        for last in [0, 1, 2, 3, 255] {
            assert_eq!(ask(Ipv4Addr::new(10, 0, 1, last)).unwrap_err().code, "InvalidParameterValue", "{last}");
        }
        assert_eq!(ask(Ipv4Addr::new(10, 0, 2, 4)).unwrap_err().code, "InvalidParameterValue");
        assert_eq!(ask(used).unwrap_err().code, "InvalidIPAddress.InUse");
        let free = if used == Ipv4Addr::new(10, 0, 1, 9) { 10 } else { 9 };
        assert_eq!(ask(Ipv4Addr::new(10, 0, 1, free)).unwrap(), Ipv4Addr::new(10, 0, 1, free));
    }

    #[test]
    fn a_subnet_with_an_interface_cannot_be_deleted() {
        let fixture = Fixture::new();
        let vpc = new_vpc(&fixture, "10.0.0.0/16");
        let id = new_subnet(&fixture, &vpc, "10.0.1.0/24");
        let interface = fixture.interface(ALICE, &id, None).unwrap();
        let delete = || DeleteSubnetRequest { subnet_id: Some(id.clone()), ..Default::default() };
        assert_eq!(fixture.refusal(ALICE, |call| delete_subnet(call, delete())), "DependencyViolation");
        assert_eq!(fixture.refusal(BOB, |call| delete_subnet(call, delete())), "InvalidSubnetID.NotFound");
        fixture
            .call(ALICE, |call| {
                network_interface::remove(&mut call.tx, ALICE, &interface.id);
                delete_subnet(call, delete())
            })
            .unwrap();
        let tx = fixture.world.begin();
        assert!(tx.find::<NetworkAcl>(ALICE, "vpc", &vpc).iter().all(|acl| acl.associations.is_empty()));
    }

    #[test]
    fn public_addresses_at_launch_can_be_switched() {
        let fixture = Fixture::new();
        let id = fixture.default_subnet(ALICE).id;
        let off = Some(shapes::AttributeBooleanValue { value: Some(false) });
        let request = ModifySubnetAttributeRequest { subnet_id: Some(id.clone()), map_public_ip_on_launch: off, ..Default::default() };
        fixture.call(ALICE, |call| modify_subnet_attribute(call, request.clone())).unwrap();
        assert!(!fixture.default_subnet(ALICE).map_public_ip_on_launch);
        assert_eq!(fixture.refusal(BOB, |call| modify_subnet_attribute(call, request)), "InvalidSubnetID.NotFound");
        let on = Some(shapes::AttributeBooleanValue { value: Some(true) });
        let request = ModifySubnetAttributeRequest { subnet_id: Some(id), enable_dns64: on, ..Default::default() };
        assert_eq!(fixture.refusal(ALICE, |call| modify_subnet_attribute(call, request)), "UnsupportedOperation");
    }
}
