//! Virtual private clouds.
//!
//! A VPC comes with a main route table, a default network ACL and a default security group, and goes with them; everything else in it
//! must be gone first. Its VNI comes from a counter and is never used again, so that a packet of a deleted VPC that is still under way
//! can reach no other.

use std::net::Ipv4Addr;
use std::sync::Arc;

use ipnet::Ipv4Net;

use super::filter::{Filters, Page};
use super::id::{self, VPC, unsupported};
use super::{dhcp_options, internet_gateway, network_acl, route_table, security_group, subnet, tag, vpc_peering_connection};
use crate::error::ApiError;
use crate::model::{InternetGateway, NetworkAcl, NetworkInterface, Route, RouteTable, RouteTarget, SecurityGroup, Subnet, Time, Vni, Vpc};
use crate::shapes::{
    self, AttributeBooleanValue, CreateVpcRequest, CreateVpcResult, DeleteVpcRequest, DescribeVpcAttributeRequest,
    DescribeVpcAttributeResult, DescribeVpcsRequest, DescribeVpcsResult, ModifyVpcAttributeRequest, VpcCidrBlockAssociation,
    VpcCidrBlockState,
};
use crate::world::{Call, Region, Tx};

/// The most VPCs of an account.
const MOST_VPCS: usize = 5;
/// The block of a default VPC; its subnets have [`DEFAULT_SUBNET_LENGTH`].
const DEFAULT_CIDR: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(172, 31, 0, 0), 16);
const DEFAULT_SUBNET_LENGTH: u8 = 20;
/// Blocks in which no host can have an address: this net, loopback, link-local, multicast and reserved.
const UNUSABLE: [Ipv4Net; 4] = [
    Ipv4Net::new_assert(Ipv4Addr::new(0, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 3),
];

/// CreateVpc.
///
/// # Errors
/// `InvalidVpc.Range`, `VpcLimitExceeded`, those of tags.
pub fn create_vpc(call: &mut Call<'_>, request: CreateVpcRequest) -> Result<CreateVpcResult, ApiError> {
    unsupported(&[
        ("Ipv6Pool", request.ipv6_pool.is_some()),
        ("Ipv6CidrBlock", request.ipv6_cidr_block.is_some()),
        ("Ipv4IpamPoolId", request.ipv4_ipam_pool_id.is_some()),
        ("Ipv4NetmaskLength", request.ipv4_netmask_length.is_some()),
        ("Ipv6IpamPoolId", request.ipv6_ipam_pool_id.is_some()),
        ("Ipv6NetmaskLength", request.ipv6_netmask_length.is_some()),
        ("Ipv6CidrBlockNetworkBorderGroup", request.ipv6_cidr_block_network_border_group.is_some()),
        ("VpcEncryptionControl", request.vpc_encryption_control.is_some()),
        ("AmazonProvidedIpv6CidrBlock", request.amazon_provided_ipv6_cidr_block == Some(true)),
    ])?;
    if let Some(tenancy) = request.instance_tenancy.as_deref().filter(|tenancy| *tenancy != "default") {
        return Err(ApiError::new("UnsupportedTenancy", format!("The tenancy value {tenancy} is not supported.")));
    }
    let Some(text) = request.cidr_block else {
        return Err(ApiError::new("MissingParameter", "Either 'cidrBlock' or 'ipv4IpamPoolId' should be provided."));
    };
    let cidr = parse_cidr("cidrBlock", &text)?;
    let unusable = UNUSABLE.iter().any(|block| block.contains(&cidr) || cidr.contains(block));
    if !(16..=28).contains(&cidr.prefix_len()) || unusable {
        return Err(ApiError::new("InvalidVpc.Range", format!("The CIDR '{text}' is invalid.")));
    }
    let tags = tag::specified(request.tag_specifications, &VPC)?;
    let account = call.account().to_owned();
    if call.list::<Vpc>().count() >= MOST_VPCS {
        return Err(ApiError::new("VpcLimitExceeded", "The maximum number of VPCs has been reached."));
    }
    let vpc = insert(&mut call.tx, call.region, &account, call.now, cidr, false)?;
    tag::set(&mut call.tx, &account, &VPC, &vpc.id, tags);
    Ok(CreateVpcResult { vpc: Some(shape(call, &vpc)) })
}

/// Gives an account its default VPC: a subnet in each zone, a gateway, and a route to it.
///
/// # Errors
/// `DefaultVpcAlreadyExists`; `InsufficientCapacity` when the region has no VNI left.
pub fn default_vpc_insert(tx: &mut Tx<'_>, region: &Region, account: &str, now: Time) -> Result<Vpc, ApiError> {
    if default_vpc(tx, account).is_some() {
        let message = "A Default VPC already exists for this account in this region.";
        return Err(ApiError::new("DefaultVpcAlreadyExists", message));
    }
    let vpc = insert(tx, region, account, now, DEFAULT_CIDR, true)?;
    let blocks = DEFAULT_CIDR.subnets(DEFAULT_SUBNET_LENGTH).into_iter().flatten();
    for (zone, cidr) in region.zones.iter().zip(blocks) {
        subnet::insert(tx, now, &vpc, &zone.name, cidr, true);
    }
    let gateway = internet_gateway::insert(tx, account, Some(vpc.id.clone()));
    if let Some(main) = route_table::main(tx, account, &vpc.id) {
        let route = Route { destination: Ipv4Net::default(), target: RouteTarget::InternetGateway(gateway) };
        tx.update::<RouteTable>(account, &main.id, |table| table.routes.push(route));
    }
    Ok(vpc)
}

/// The default VPC of an account.
pub fn default_vpc(tx: &Tx<'_>, account: &str) -> Option<Arc<Vpc>> {
    tx.list::<Vpc>(account).find(|vpc| vpc.is_default).cloned()
}

fn insert(tx: &mut Tx<'_>, region: &Region, account: &str, now: Time, cidr: Ipv4Net, is_default: bool) -> Result<Vpc, ApiError> {
    let vni = u32::try_from(tx.counter_next("vni")).ok().filter(|vni| *vni <= 0xff_ffff);
    let vni = vni.ok_or_else(|| ApiError::new("InsufficientCapacity", "The region has no capacity for another VPC."))?;
    let vpc = Vpc {
        account_id: account.to_owned(),
        id: tx.new_id(VPC.prefix),
        cidr,
        cidr_association_id: tx.new_id("vpc-cidr-assoc"),
        secondary_cidrs: Vec::new(),
        is_default,
        vni: Vni(vni),
        dhcp_options_id: dhcp_options::default_set(tx, region, account),
        dns_support: true,
        dns_hostnames: is_default,
        network_address_usage_metrics: false,
        created: now,
    };
    tx.put(vpc.clone());
    route_table::insert(tx, account, &vpc.id, true);
    network_acl::default_insert(tx, account, &vpc.id);
    security_group::default_insert(tx, account, &vpc.id);
    Ok(vpc)
}

/// DeleteVpc.
///
/// # Errors
/// `DependencyViolation` while anything is left in it that did not come with it.
pub fn delete_vpc(call: &mut Call<'_>, request: DeleteVpcRequest) -> Result<(), ApiError> {
    let id = VPC.required(request.vpc_id, "VpcId")?;
    let vpc = VPC.row::<Vpc>(call, &id)?;
    let tables = call.find::<RouteTable>("vpc", &id);
    let acls = call.find::<NetworkAcl>("vpc", &id);
    let groups = call.find::<SecurityGroup>("vpc", &id);
    let used = !call.find::<Subnet>("vpc", &id).is_empty()
        || !call.find::<InternetGateway>("vpc", &id).is_empty()
        || !call.find::<NetworkInterface>("vpc", &id).is_empty()
        || tables.iter().any(|table| !route_table::is_main(table))
        || acls.iter().any(|acl| !acl.is_default)
        || !vpc_peering_connection::active(&call.tx, &id).is_empty()
        || groups.iter().any(|group| group.name != security_group::DEFAULT);
    if used {
        return Err(ApiError::dependency(format!("The vpc '{id}' has dependencies and cannot be deleted.")));
    }
    let account = &vpc.account_id;
    for table in tables {
        tag::remove(&mut call.tx, account, &table.id);
        call.tx.delete::<RouteTable>(account, &table.id);
    }
    for acl in acls {
        tag::remove(&mut call.tx, account, &acl.id);
        call.tx.delete::<NetworkAcl>(account, &acl.id);
    }
    for group in groups {
        security_group::remove(&mut call.tx, &group);
    }
    vpc_peering_connection::withdraw(&mut call.tx, &id, call.now, account);
    tag::remove(&mut call.tx, account, &id);
    call.tx.delete::<Vpc>(account, &id);
    Ok(())
}

/// DescribeVpcs.
///
/// # Errors
/// `InvalidVpcID.NotFound` and those of filters and pages.
pub fn describe_vpcs(call: &mut Call<'_>, request: DescribeVpcsRequest) -> Result<DescribeVpcsResult, ApiError> {
    let names = [
        "cidr",
        "cidr-block",
        "cidrBlock",
        "cidr-block-association.cidr-block",
        "cidr-block-association.association-id",
        "cidr-block-association.state",
        "dhcp-options-id",
        "dhcpOptionsId",
        "ipv6-cidr-block-association.ipv6-cidr-block",
        "ipv6-cidr-block-association.ipv6-pool",
        "ipv6-cidr-block-association.association-id",
        "ipv6-cidr-block-association.state",
        "is-default",
        "isDefault",
        "owner-id",
        "state",
        "tag",
        "vpc-id",
    ];
    let filters = Filters::new(request.filters, &names)?;
    let page = Page::new("DescribeVpcs", request.max_results, request.next_token.as_deref(), 1000)?;
    let rows = VPC.rows::<Vpc>(call, &request.vpc_ids)?;
    let passing = rows.into_iter().filter(|(id, vpc)| {
        filters.pass(&tag::of(&call.tx, call.account(), id), |name, test| match name {
            "cidr" | "cidr-block" | "cidrBlock" => test(&vpc.cidr.to_string()),
            "cidr-block-association.cidr-block" => cidrs(vpc).any(|(_, cidr)| test(&cidr.to_string())),
            "cidr-block-association.association-id" => cidrs(vpc).any(|(association, _)| test(association)),
            "cidr-block-association.state" => test("associated"),
            "dhcp-options-id" | "dhcpOptionsId" => test(&vpc.dhcp_options_id),
            "is-default" | "isDefault" => test(if vpc.is_default { "true" } else { "false" }),
            "owner-id" => test(&vpc.account_id),
            "state" => test("available"),
            "vpc-id" => test(id),
            // No VPC has an IPv6 block yet.
            _ => false,
        })
    });
    let (page, next_token) = page.take(passing);
    Ok(DescribeVpcsResult { vpcs: page.iter().map(|vpc| shape(call, vpc)).collect(), next_token })
}

/// Every block of a VPC, the first one first, with the id of its association.
pub fn cidrs(vpc: &Vpc) -> impl Iterator<Item = (&str, Ipv4Net)> {
    let first = (vpc.cidr_association_id.as_str(), vpc.cidr);
    std::iter::once(first).chain(vpc.secondary_cidrs.iter().map(|block| (block.association_id.as_str(), block.cidr)))
}

fn shape(call: &Call<'_>, vpc: &Vpc) -> shapes::Vpc {
    let association = |(id, cidr): (&str, Ipv4Net)| VpcCidrBlockAssociation {
        association_id: Some(id.to_owned()),
        cidr_block: Some(cidr.to_string()),
        cidr_block_state: Some(VpcCidrBlockState { state: Some("associated".into()), status_message: None }),
    };
    shapes::Vpc {
        vpc_id: Some(vpc.id.clone()),
        owner_id: Some(vpc.account_id.clone()),
        cidr_block: Some(vpc.cidr.to_string()),
        cidr_block_association_set: cidrs(vpc).map(association).collect(),
        dhcp_options_id: Some(vpc.dhcp_options_id.clone()),
        instance_tenancy: Some("default".into()),
        is_default: Some(vpc.is_default),
        state: Some("available".into()),
        tags: tag::shapes(&tag::of(&call.tx, &vpc.account_id, &vpc.id)),
        ..Default::default()
    }
}

/// ModifyVpcAttribute: one attribute a call.
///
/// # Errors
/// `InvalidParameterCombination` for none or several, `InvalidParameterValue` for DNS host names without DNS.
pub fn modify_vpc_attribute(call: &mut Call<'_>, request: ModifyVpcAttributeRequest) -> Result<(), ApiError> {
    let id = VPC.required(request.vpc_id, "VpcId")?;
    let vpc = VPC.row::<Vpc>(call, &id)?;
    let value = |attribute: Option<AttributeBooleanValue>| attribute.and_then(|attribute| attribute.value);
    let (hostnames, support) = (value(request.enable_dns_hostnames), value(request.enable_dns_support));
    let metrics = value(request.enable_network_address_usage_metrics);
    let mut row = Vpc::clone(&vpc);
    match (hostnames, support, metrics) {
        (Some(true), None, None) if !vpc.dns_support => {
            return Err(ApiError::invalid_value("DNS host names need DNS support: enable enableDnsSupport first"));
        }
        (Some(on), None, None) => row.dns_hostnames = on,
        (None, Some(on), None) => row.dns_support = on,
        (None, None, Some(on)) => row.network_address_usage_metrics = on,
        (None, None, None) => return Err(ApiError::invalid_combination("No attributes specified.")),
        _ => return Err(ApiError::invalid_combination("Fields for multiple attribute types specified")),
    }
    call.tx.put(row);
    Ok(())
}

/// DescribeVpcAttribute.
///
/// # Errors
/// `InvalidVpcID.NotFound`, `InvalidParameterValue` for an unknown attribute.
pub fn describe_vpc_attribute(call: &mut Call<'_>, request: DescribeVpcAttributeRequest) -> Result<DescribeVpcAttributeResult, ApiError> {
    let id = VPC.required(request.vpc_id, "VpcId")?;
    let vpc = VPC.row::<Vpc>(call, &id)?;
    let value = |on| Some(AttributeBooleanValue { value: Some(on) });
    let mut result = DescribeVpcAttributeResult { vpc_id: Some(id), ..Default::default() };
    match request.attribute.as_deref() {
        Some("enableDnsHostnames") => result.enable_dns_hostnames = value(vpc.dns_hostnames),
        Some("enableDnsSupport") => result.enable_dns_support = value(vpc.dns_support),
        Some("enableNetworkAddressUsageMetrics") => {
            result.enable_network_address_usage_metrics = value(vpc.network_address_usage_metrics);
        }
        Some(other) => return Err(ApiError::invalid_parameter("attribute", other)),
        None => return Err(ApiError::missing_parameter("Attribute")),
    }
    Ok(result)
}

/// Reads an IPv4 block as the value of `parameter`; bits below the prefix are cleared, as EC2 does.
///
/// # Errors
/// `InvalidParameterValue` when it is no block.
pub fn parse_cidr(parameter: &str, text: &str) -> Result<Ipv4Net, ApiError> {
    text.parse::<Ipv4Net>().map(|cidr| cidr.trunc()).map_err(|_| {
        ApiError::invalid_value(format!("Value ({text}) for parameter {parameter} is invalid. This is not a valid CIDR block."))
    })
}

/// The VPC that a request names, or else the default VPC.
///
/// # Errors
/// `VPCIdNotSpecified` without an id and without a default VPC.
pub fn named_or_default(call: &Call<'_>, vpc_id: Option<&str>) -> Result<Arc<Vpc>, ApiError> {
    match vpc_id {
        Some(id) => id::VPC.row(call, id),
        None => default_vpc(&call.tx, call.account()).ok_or_else(|| ApiError::new("VPCIdNotSpecified", "No default VPC for this user")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::SecurityGroupRule;
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::shapes::{CreateSubnetRequest, Filter, Tag, TagSpecification};

    fn create(cidr: &str) -> CreateVpcRequest {
        CreateVpcRequest { cidr_block: Some(cidr.into()), ..Default::default() }
    }

    fn new_vpc(fixture: &Fixture, account: &str, cidr: &str) -> String {
        let result = fixture.call(account, |call| create_vpc(call, create(cidr))).unwrap();
        result.vpc.unwrap().vpc_id.unwrap()
    }

    #[test]
    fn a_new_vpc_brings_its_table_acl_and_group_and_takes_them_away() {
        let fixture = Fixture::new();
        let id = new_vpc(&fixture, ALICE, "10.0.0.0/16");
        let parts = |fixture: &Fixture| {
            let tx = fixture.world.begin();
            let groups = tx.find::<SecurityGroup>(ALICE, "vpc", &id);
            let rules: Vec<SecurityGroupRule> = groups.iter().flat_map(|group| group.rules.clone()).collect();
            (tx.find::<RouteTable>(ALICE, "vpc", &id).len(), tx.find::<NetworkAcl>(ALICE, "vpc", &id).len(), groups.len(), rules.len())
        };
        assert_eq!(parts(&fixture), (1, 1, 1, 2));
        fixture.call(ALICE, |call| delete_vpc(call, DeleteVpcRequest { vpc_id: Some(id.clone()), ..Default::default() })).unwrap();
        assert_eq!(parts(&fixture), (0, 0, 0, 0));
        assert_eq!(fixture.world.begin().list::<Vpc>(ALICE).count(), 1);
    }

    #[test]
    fn two_vpcs_of_one_block_have_two_vnis() {
        let fixture = Fixture::new();
        let (one, two) = (new_vpc(&fixture, ALICE, "10.0.0.0/16"), new_vpc(&fixture, BOB, "10.0.0.0/16"));
        let tx = fixture.world.begin();
        let vni = |account, id: &str| tx.get::<Vpc>(account, id).unwrap().vni;
        assert_ne!(vni(ALICE, &one), vni(BOB, &two));
    }

    #[test]
    fn blocks_are_checked_and_cut_to_their_prefix() {
        let fixture = Fixture::new();
        for (cidr, code) in [
            ("10.0.0.0/15", "InvalidVpc.Range"),
            ("10.0.0.0/29", "InvalidVpc.Range"),
            ("127.0.0.0/16", "InvalidVpc.Range"),
            ("169.254.0.0/16", "InvalidVpc.Range"),
            ("224.1.0.0/16", "InvalidVpc.Range"),
            ("10.0.0.0", "InvalidParameterValue"),
            ("10.0.0.0/33", "InvalidParameterValue"),
            ("nonsense", "InvalidParameterValue"),
        ] {
            assert_eq!(fixture.refusal(ALICE, |call| create_vpc(call, create(cidr))), code, "{cidr}");
        }
        assert_eq!(fixture.refusal(ALICE, |call| create_vpc(call, CreateVpcRequest::default())), "MissingParameter");
        let vpc = fixture.call(ALICE, |call| create_vpc(call, create("10.1.2.3/16"))).unwrap().vpc.unwrap();
        assert_eq!(vpc.cidr_block.as_deref(), Some("10.1.0.0/16"));
        assert_eq!(vpc.cidr_block_association_set.len(), 1);
    }

    #[test]
    fn the_sixth_vpc_is_one_too_many() {
        let fixture = Fixture::new();
        for block in 0..4 {
            new_vpc(&fixture, ALICE, &format!("10.{block}.0.0/16"));
        }
        assert_eq!(fixture.refusal(ALICE, |call| create_vpc(call, create("10.9.0.0/16"))), "VpcLimitExceeded");
        new_vpc(&fixture, BOB, "10.9.0.0/16");
    }

    #[test]
    fn what_this_region_has_not_is_refused_by_name() {
        let fixture = Fixture::new();
        let request = CreateVpcRequest { amazon_provided_ipv6_cidr_block: Some(true), ..create("10.0.0.0/16") };
        let error = fixture.call(ALICE, |call| create_vpc(call, request)).unwrap_err();
        assert_eq!(error.code, "UnsupportedOperation");
        assert!(error.message.contains("AmazonProvidedIpv6CidrBlock"));
        let request = CreateVpcRequest { instance_tenancy: Some("dedicated".into()), ..create("10.0.0.0/16") };
        assert_eq!(fixture.refusal(ALICE, |call| create_vpc(call, request)), "UnsupportedTenancy");
    }

    #[test]
    fn a_vpc_with_a_subnet_cannot_be_deleted() {
        let fixture = Fixture::new();
        let id = new_vpc(&fixture, ALICE, "10.0.0.0/16");
        let request = CreateSubnetRequest { vpc_id: Some(id.clone()), cidr_block: Some("10.0.0.0/24".into()), ..Default::default() };
        fixture.call(ALICE, |call| subnet::create_subnet(call, request)).unwrap();
        let delete = |id: &str| DeleteVpcRequest { vpc_id: Some(id.into()), ..Default::default() };
        for id in [id, fixture.default_vpc(ALICE).id] {
            assert_eq!(fixture.refusal(ALICE, |call| delete_vpc(call, delete(&id))), "DependencyViolation");
        }
    }

    #[test]
    fn a_foreign_vpc_is_like_an_unknown_one() {
        let fixture = Fixture::new();
        let foreign = fixture.default_vpc(BOB).id;
        let describe = |id: &str| DescribeVpcsRequest { vpc_ids: vec![id.into()], ..Default::default() };
        let mut messages = Vec::new();
        for id in [foreign.as_str(), "vpc-0123456789abcdef0"] {
            let error = fixture.call(ALICE, |call| describe_vpcs(call, describe(id))).unwrap_err();
            assert_eq!(error.code, "InvalidVpcID.NotFound");
            messages.push(error.message.replace(id, "ID"));
            let delete = DeleteVpcRequest { vpc_id: Some(id.into()), ..Default::default() };
            assert_eq!(fixture.refusal(ALICE, |call| delete_vpc(call, delete)), "InvalidVpcID.NotFound");
        }
        assert_eq!(messages[0], messages[1]);
        assert_eq!(fixture.refusal(ALICE, |call| describe_vpcs(call, describe("vpc-x"))), "InvalidVpcID.Malformed");
    }

    #[test]
    fn describes_filter_by_tag_and_state() {
        let fixture = Fixture::new();
        let tag = Tag { key: Some("Name".into()), value: Some("web".into()) };
        let tag_specifications = vec![TagSpecification { resource_type: Some("vpc".into()), tags: vec![tag] }];
        let created = fixture
            .call(ALICE, |call| create_vpc(call, CreateVpcRequest { tag_specifications, ..create("10.0.0.0/16") }))
            .unwrap()
            .vpc
            .unwrap();
        assert_eq!(created.tags.len(), 1);
        let found = |name: &str, value: &str| {
            let filters = vec![Filter { name: Some(name.into()), values: vec![value.into()] }];
            let request = DescribeVpcsRequest { filters, ..Default::default() };
            let vpcs = fixture.call(ALICE, |call| describe_vpcs(call, request)).unwrap().vpcs;
            vpcs.into_iter().filter_map(|vpc| vpc.vpc_id).collect::<Vec<_>>()
        };
        assert_eq!(found("tag:Name", "w*"), [created.vpc_id.clone().unwrap()]);
        assert_eq!(found("cidr", "10.0.0.0/16"), [created.vpc_id.unwrap()]);
        assert_eq!(found("isDefault", "true"), [fixture.default_vpc(ALICE).id]);
        assert_eq!(found("state", "pending"), Vec::<String>::new());
    }

    #[test]
    fn attributes_change_one_at_a_time() {
        let fixture = Fixture::new();
        let id = new_vpc(&fixture, ALICE, "10.0.0.0/16");
        let on = |value| Some(AttributeBooleanValue { value: Some(value) });
        let modify = |request: ModifyVpcAttributeRequest| {
            let request = ModifyVpcAttributeRequest { vpc_id: Some(id.clone()), ..request };
            fixture.call(ALICE, |call| modify_vpc_attribute(call, request)).map_err(|error| error.code.into_owned())
        };
        let both = ModifyVpcAttributeRequest { enable_dns_hostnames: on(true), enable_dns_support: on(true), ..Default::default() };
        assert_eq!(modify(both).unwrap_err(), "InvalidParameterCombination");
        assert_eq!(modify(ModifyVpcAttributeRequest::default()).unwrap_err(), "InvalidParameterCombination");
        modify(ModifyVpcAttributeRequest { enable_dns_hostnames: on(true), ..Default::default() }).unwrap();
        let describe = |attribute: &str| {
            let request = DescribeVpcAttributeRequest { vpc_id: Some(id.clone()), attribute: Some(attribute.into()), dry_run: None };
            fixture.call(ALICE, |call| describe_vpc_attribute(call, request)).unwrap()
        };
        assert_eq!(describe("enableDnsHostnames").enable_dns_hostnames, on(true));
        assert_eq!(describe("enableDnsSupport").enable_dns_support, on(true));
        assert_eq!(describe("enableNetworkAddressUsageMetrics").enable_network_address_usage_metrics, on(false));
    }

    #[test]
    fn a_default_vpc_exists_once() {
        let fixture = Fixture::new();
        let (result, _) = fixture.world.transact(|tx| default_vpc_insert(tx, fixture.world.region(), ALICE, Time(0)));
        assert_eq!(result.unwrap_err().code, "DefaultVpcAlreadyExists");
    }
}
