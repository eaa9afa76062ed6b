//! Network interfaces (ENIs): an address in a subnet, a MAC, and the security groups that guard both.
//!
//! Launches make them by [`insert`] and terminations take them away by [`remove`]; tenants make more themselves and attach them. Their MACs come from a counter, so none is ever used twice.

mod attachment;
mod attribute;
mod lifecycle;
mod private_address;

use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::sync::Arc;

pub use attachment::{attach_network_interface, check_count, check_fit, detach_network_interface, read_index};
pub(crate) use attachment::{attached, release};
pub(super) use attribute::instance_tracking_shape;
pub use attribute::{
    describe_network_interface_attribute, modify_network_interface_attribute, read_description, reset_network_interface_attribute, track,
};
pub use lifecycle::{create_network_interface, delete_network_interface};
pub use private_address::{Wanted, assign_private_ip_addresses, check_count as check_addresses, unassign_private_ip_addresses};

use super::filter::{Filters, Page};
use super::id::{NETWORK_INTERFACE, SECURITY_GROUP};
use super::{address, nat_gateway, security_group, tag};
use crate::error::ApiError;
use crate::model::{ConnectionTracking, Mac, NetworkInterface, NetworkInterfaceAttachment, SecurityGroup, Subnet, Time, Vpc};
use crate::shape::Timestamp;
use crate::shapes::{
    self, DescribeNetworkInterfacesRequest, DescribeNetworkInterfacesResult, GroupIdentifier, NetworkInterfaceAssociation,
    NetworkInterfacePrivateIpAddress,
};
use crate::world::{Call, Region, Tx};

/// The most security groups of an interface.
pub const MOST_GROUPS: usize = 5;
/// The most interfaces of an account in the region.
const MOST_INTERFACES: usize = 5000;
/// The most private addresses of an interface, whatever its instance.
const MOST_ADDRESSES: usize = 50;
/// Seconds after which a connection may be forgotten: TCP established, UDP with an answer, UDP without.
const CONNECTION_TRACKING: [RangeInclusive<u32>; 3] = [60..=432_000, 60..=180, 30..=60];

/// What a new interface is made of.
pub struct NewInterface<'a> {
    /// Where its address is.
    pub subnet: &'a Subnet,
    /// Its private addresses.
    pub addresses: Wanted,
    /// Its groups, checked by [`checked_groups`].
    pub security_group_ids: Vec<String>,
    /// Free text.
    pub description: String,
    /// The instance that it belongs to.
    pub attachment: Option<NetworkInterfaceAttachment>,
    /// Whether its instance gets a public address whenever it starts.
    pub associate_public_ip: bool,
    /// Times of its connections.
    pub connection_tracking: ConnectionTracking,
}

/// Makes an interface.
///
/// # Errors
/// Those of [`super::subnet::free_addresses`].
pub fn insert(tx: &mut Tx<'_>, now: Time, new: NewInterface<'_>) -> Result<NetworkInterface, ApiError> {
    let mut addresses = new.addresses.take(tx, new.subnet)?.into_iter();
    let private_ip = addresses.next().ok_or_else(ApiError::internal)?;
    // 02 is a locally administered unicast address; the counter fills the other 40 bits.
    let [_, _, _, rest @ ..] = tx.counter_next("mac").to_be_bytes();
    let [a, b, c, d, e] = rest;
    let interface = NetworkInterface {
        account_id: new.subnet.account_id.clone(),
        id: tx.new_id(NETWORK_INTERFACE.prefix),
        vpc_id: new.subnet.vpc_id.clone(),
        subnet_id: new.subnet.id.clone(),
        zone: new.subnet.zone.clone(),
        mac: Mac([0x02, a, b, c, d, e]),
        private_ip,
        description: new.description,
        security_group_ids: new.security_group_ids,
        source_dest_check: true,
        attachment: new.attachment,
        auto_public_ip: None,
        associate_public_ip: new.associate_public_ip,
        created: now,
        secondary_ips: addresses.collect(),
        connection_tracking: new.connection_tracking,
    };
    tx.put(interface.clone());
    Ok(interface)
}

/// Takes an interface away, with its public address; an Elastic IP of it stays the account's.
pub fn remove(tx: &mut Tx<'_>, account: &str, id: &str) {
    address::interface_release(tx, account, id);
    tag::remove(tx, account, id);
    tx.delete::<NetworkInterface>(account, id);
}

/// An interface of the asking account that it may change.
///
/// # Errors
/// The `Malformed` or `NotFound` answer about the id, `AuthFailure` for one that a NAT gateway manages.
pub(super) fn own(call: &Call<'_>, id: &str) -> Result<Arc<NetworkInterface>, ApiError> {
    let interface = NETWORK_INTERFACE.row::<NetworkInterface>(call, id)?;
    nat_gateway::check_not_managed(&call.tx, &interface.account_id, id)?;
    Ok(interface)
}

/// The answer about an interface that already belongs to an instance.
pub fn in_use(id: &str) -> ApiError {
    ApiError::new("InvalidNetworkInterface.InUse", format!("Interface: [{id}] in use."))
}

/// The groups of an interface in a VPC: those asked for, each once, or the VPC's default group.
///
/// # Errors
/// `InvalidGroup.NotFound` for a group of another account or VPC, `SecurityGroupsPerInterfaceLimitExceeded` for more than five.
pub fn checked_groups(tx: &Tx<'_>, account: &str, vpc_id: &str, ids: &[String]) -> Result<Vec<String>, ApiError> {
    if ids.is_empty() {
        return Ok(security_group::default_group(tx, account, vpc_id).map(|group| group.id.clone()).into_iter().collect());
    }
    let mut groups = Vec::new();
    for id in ids {
        SECURITY_GROUP.check(id)?;
        let group = tx.get::<SecurityGroup>(account, id).ok_or_else(|| SECURITY_GROUP.not_found(id))?;
        if group.vpc_id != vpc_id {
            let message = format!("The security group '{id}' does not exist in VPC '{vpc_id}'");
            return Err(ApiError::new("InvalidGroup.NotFound", message));
        }
        if !groups.contains(id) {
            groups.push(id.clone());
        }
    }
    if groups.len() > MOST_GROUPS {
        let message = format!("The maximum number of security groups per interface is {MOST_GROUPS}.");
        return Err(ApiError::new("SecurityGroupsPerInterfaceLimitExceeded", message));
    }
    Ok(groups)
}

/// The domain of private host names: `ec2.internal`, outside `us-east-1` with the region in it.
pub fn private_domain(region: &Region) -> String {
    match region.name.as_str() {
        "us-east-1" => "ec2.internal".to_owned(),
        name => format!("{name}.compute.internal"),
    }
}

/// The private host name of an address: `ip-10-0-0-5.ec2.internal`.
pub fn private_dns_name(region: &Region, ip: Ipv4Addr) -> String {
    format!("ip-{}.{}", dashed(ip), private_domain(region))
}

/// The domain of public host names.
pub fn public_domain(region: &Region) -> String {
    match region.name.as_str() {
        "us-east-1" => "compute-1.amazonaws.com".to_owned(),
        name => format!("{name}.compute.amazonaws.com"),
    }
}

/// The public host name of an address: `ec2-198-51-100-7.compute-1.amazonaws.com`.
pub fn public_dns_name(region: &Region, ip: Ipv4Addr) -> String {
    format!("ec2-{}.{}", dashed(ip), public_domain(region))
}

fn dashed(ip: Ipv4Addr) -> String {
    ip.to_string().replace('.', "-")
}

/// The groups of an interface with their names.
pub fn groups(tx: &Tx<'_>, interface: &NetworkInterface) -> Vec<GroupIdentifier> {
    let identifier = |id: &String| {
        let name = tx.get::<SecurityGroup>(&interface.account_id, id).map(|group| group.name.clone());
        GroupIdentifier { group_id: Some(id.clone()), group_name: name }
    };
    interface.security_group_ids.iter().map(identifier).collect()
}

/// DescribeNetworkInterfaces.
///
/// # Errors
/// `InvalidNetworkInterfaceID.NotFound` and those of filters and pages.
pub fn describe_network_interfaces(
    call: &mut Call<'_>,
    request: DescribeNetworkInterfacesRequest,
) -> Result<DescribeNetworkInterfacesResult, ApiError> {
    let filters = Filters::new(request.filters, NAMES)?;
    let page = Page::new("DescribeNetworkInterfaces", request.max_results, request.next_token.as_deref(), 1000)?;
    let rows = NETWORK_INTERFACE.rows::<NetworkInterface>(call, &request.network_interface_ids)?;
    let passing = rows.into_iter().filter(|(_, interface)| passes(call, &filters, interface));
    let (page, next_token) = page.take(passing);
    Ok(DescribeNetworkInterfacesResult { network_interfaces: page.iter().map(|interface| shape(call, interface)).collect(), next_token })
}

const NAMES: &[&str] = &[
    "addresses.association.owner-id",
    "addresses.association.public-ip",
    "addresses.primary",
    "addresses.private-ip-address",
    "association.allocation-id",
    "association.association-id",
    "association.ip-owner-id",
    "association.public-dns-name",
    "association.public-ip",
    "attachment.attach-time",
    "attachment.attachment-id",
    "attachment.delete-on-termination",
    "attachment.device-index",
    "attachment.instance-id",
    "attachment.instance-owner-id",
    "attachment.status",
    "availability-zone",
    "availability-zone-id",
    "description",
    "group-id",
    "group-name",
    "interface-type",
    "ipv6-addresses.ipv6-address",
    "mac-address",
    "network-interface-id",
    "operator.managed",
    "operator.principal",
    "owner-id",
    "private-dns-name",
    "private-ip-address",
    "requester-id",
    "requester-managed",
    "source-dest-check",
    "status",
    "subnet-id",
    "tag",
    "vpc-id",
];

fn passes(call: &Call<'_>, filters: &Filters, interface: &NetworkInterface) -> bool {
    let flag = |on| if on { "true" } else { "false" };
    let attached = |test: &dyn Fn(&NetworkInterfaceAttachment) -> bool| interface.attachment.as_ref().is_some_and(test);
    let public = || association(call, interface);
    let any_public = |test: &dyn Fn(NetworkInterfaceAssociation) -> bool| {
        interface.private_ips().filter_map(|ip| association_of(call, interface, ip)).any(test)
    };
    let some = |value: Option<String>, test: &dyn Fn(&str) -> bool| value.is_some_and(|value| test(&value));
    filters.pass(&tag::of(&call.tx, &interface.account_id, &interface.id), |name, test| match name {
        "addresses.association.owner-id" => any_public(&|public| some(public.ip_owner_id, test)),
        "addresses.association.public-ip" => any_public(&|public| some(public.public_ip, test)),
        "association.ip-owner-id" => some(public().and_then(|public| public.ip_owner_id), test),
        "association.public-ip" => some(public().and_then(|public| public.public_ip), test),
        "association.allocation-id" => some(public().and_then(|public| public.allocation_id), test),
        "association.association-id" => some(public().and_then(|public| public.association_id), test),
        "association.public-dns-name" => some(public().and_then(|public| public.public_dns_name), test),
        "addresses.primary" => test("true") || !interface.secondary_ips.is_empty() && test("false"),
        "addresses.private-ip-address" => interface.private_ips().any(|ip| test(&ip.to_string())),
        "private-ip-address" => test(&interface.private_ip.to_string()),
        "attachment.attach-time" => attached(&|attachment| test(&Timestamp::from(attachment.attach_time).to_text())),
        "attachment.attachment-id" => attached(&|attachment| test(&attachment.id)),
        "attachment.delete-on-termination" => attached(&|attachment| test(flag(attachment.delete_on_termination))),
        "attachment.device-index" => attached(&|attachment| test(&attachment.device_index.to_string())),
        "attachment.instance-id" => attached(&|attachment| test(&attachment.instance_id)),
        "attachment.instance-owner-id" => attached(&|_| test(&interface.account_id)),
        "attachment.status" if managed(call, interface) => test("attached"),
        "attachment.status" => attached(&|attachment| test(attachment.state.name())),
        "availability-zone" => test(&interface.zone),
        "availability-zone-id" => call.region.zone(&interface.zone).is_some_and(|zone| test(&zone.id)),
        "description" => test(&interface.description),
        "group-id" => interface.security_group_ids.iter().any(|id| test(id)),
        "group-name" => groups(&call.tx, interface).into_iter().any(|group| some(group.group_name, test)),
        "interface-type" => test(if managed(call, interface) { "nat_gateway" } else { "interface" }),
        "mac-address" => test(&interface.mac.to_string()),
        "network-interface-id" => test(&interface.id),
        "operator.managed" => test("false"),
        "requester-managed" => test(flag(managed(call, interface))),
        "requester-id" => managed(call, interface) && test(&interface.account_id),
        "owner-id" => test(&interface.account_id),
        "private-dns-name" => test(&private_dns_name(call.region, interface.private_ip)),
        "source-dest-check" => test(flag(interface.source_dest_check)),
        "status" => test(status(call, interface)),
        "subnet-id" => test(&interface.subnet_id),
        "vpc-id" => test(&interface.vpc_id),
        // No interface has an IPv6 address or an operator.
        _ => false,
    })
}

fn status(call: &Call<'_>, interface: &NetworkInterface) -> &'static str {
    if interface.attachment.is_some() || managed(call, interface) { "in-use" } else { "available" }
}

/// Whether an interface belongs to a NAT gateway.
fn managed(call: &Call<'_>, interface: &NetworkInterface) -> bool {
    nat_gateway::of_interface(&call.tx, &interface.account_id, &interface.id).is_some()
}

/// The public side of an interface's primary address, if it has one.
pub fn association(call: &Call<'_>, interface: &NetworkInterface) -> Option<NetworkInterfaceAssociation> {
    association_of(call, interface, interface.private_ip)
}

/// The public side of one private address of an interface, if it has one.
pub fn association_of(call: &Call<'_>, interface: &NetworkInterface, private_ip: Ipv4Addr) -> Option<NetworkInterfaceAssociation> {
    let elastic = address::of_private_ip(&call.tx, interface, private_ip);
    let auto = || interface.auto_public_ip.filter(|_| private_ip == interface.private_ip);
    let ip = elastic.as_ref().map(|address| address.public_ip).or_else(auto)?;
    let named = call.tx.get::<Vpc>(&interface.account_id, &interface.vpc_id).is_some_and(|vpc| vpc.dns_hostnames);
    // An address that came with the launch is Amazon's and has no ids.
    let owner = if elastic.is_some() { interface.account_id.as_str() } else { "amazon" };
    Some(NetworkInterfaceAssociation {
        public_ip: Some(ip.to_string()),
        public_dns_name: Some(if named { public_dns_name(call.region, ip) } else { String::new() }),
        ip_owner_id: Some(owner.to_owned()),
        allocation_id: elastic.as_ref().map(|address| address.id.clone()),
        association_id: elastic.as_ref().and_then(|address| address.association.as_ref()).map(|association| association.id.clone()),
        ..Default::default()
    })
}

fn attachment_shape(interface: &NetworkInterface) -> Option<shapes::NetworkInterfaceAttachment> {
    let attachment = interface.attachment.as_ref()?;
    Some(shapes::NetworkInterfaceAttachment {
        attachment_id: Some(attachment.id.clone()),
        instance_id: Some(attachment.instance_id.clone()),
        instance_owner_id: Some(interface.account_id.clone()),
        device_index: i32::try_from(attachment.device_index).ok(),
        network_card_index: Some(0),
        attach_time: Some(attachment.attach_time.into()),
        delete_on_termination: Some(attachment.delete_on_termination),
        status: Some(attachment.state.name().to_owned()),
        ..Default::default()
    })
}

fn shape(call: &Call<'_>, interface: &NetworkInterface) -> shapes::NetworkInterface {
    let managed = managed(call, interface);
    let association = association(call, interface);
    let private_dns_name = private_dns_name(call.region, interface.private_ip);
    let address = |ip: Ipv4Addr| NetworkInterfacePrivateIpAddress {
        primary: Some(ip == interface.private_ip),
        private_ip_address: Some(ip.to_string()),
        private_dns_name: Some(self::private_dns_name(call.region, ip)),
        association: association_of(call, interface, ip),
    };
    shapes::NetworkInterface {
        network_interface_id: Some(interface.id.clone()),
        vpc_id: Some(interface.vpc_id.clone()),
        subnet_id: Some(interface.subnet_id.clone()),
        availability_zone: Some(interface.zone.clone()),
        availability_zone_id: call.region.zone(&interface.zone).map(|zone| zone.id.clone()),
        owner_id: Some(interface.account_id.clone()),
        description: Some(interface.description.clone()),
        groups: groups(&call.tx, interface),
        interface_type: Some(if managed { "nat_gateway" } else { "interface" }.into()),
        mac_address: Some(interface.mac.to_string()),
        private_ip_address: Some(interface.private_ip.to_string()),
        private_dns_name: Some(private_dns_name),
        private_ip_addresses: interface.private_ips().map(address).collect(),
        public_dns_name: association.as_ref().and_then(|association| association.public_dns_name.clone()),
        association,
        attachment: attachment_shape(interface),
        connection_tracking_configuration: attribute::tracking_shape(interface.connection_tracking),
        requester_id: managed.then(|| interface.account_id.clone()),
        requester_managed: Some(managed),
        source_dest_check: Some(interface.source_dest_check),
        status: Some(status(call, interface).to_owned()),
        tag_set: tag::shapes(&tag::of(&call.tx, &interface.account_id, &interface.id)),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::shapes::Filter;

    #[test]
    fn an_interface_shows_where_it_is_and_whose_it_is() {
        let fixture = Fixture::new();
        let interface = fixture.instance(ALICE, "i-0123456789abcdef0");
        fixture.call(ALICE, |call| address::auto_take(&mut call.tx, call.region, ALICE, &interface.id)).unwrap();
        let filters = vec![Filter { name: Some("attachment.instance-id".into()), values: vec!["i-0123*".into()] }];
        let request = DescribeNetworkInterfacesRequest { filters, ..Default::default() };
        let found = fixture.call(ALICE, |call| describe_network_interfaces(call, request)).unwrap().network_interfaces;
        let [shown] = found.as_slice() else { panic!() };
        assert_eq!(shown.status.as_deref(), Some("in-use"));
        assert_eq!(shown.groups[0].group_name.as_deref(), Some("default"));
        assert_eq!(shown.mac_address.as_deref().map(|mac| &mac[..3]), Some("02:"));
        let public = shown.association.as_ref().unwrap();
        assert_eq!(public.ip_owner_id.as_deref(), Some("amazon"));
        assert!(public.public_dns_name.as_ref().unwrap().ends_with(".compute-1.amazonaws.com"));
        let expected = format!("ip-{}.ec2.internal", interface.private_ip.to_string().replace('.', "-"));
        assert_eq!(shown.private_dns_name.as_ref(), Some(&expected));
        let request = DescribeNetworkInterfacesRequest { network_interface_ids: vec![interface.id], ..Default::default() };
        let refused = fixture.refusal(BOB, |call| describe_network_interfaces(call, request));
        assert_eq!(refused, "InvalidNetworkInterfaceID.NotFound");
    }

    #[test]
    fn no_two_interfaces_share_a_mac() {
        let fixture = Fixture::new();
        let subnet = fixture.default_subnet(ALICE);
        let macs: std::collections::BTreeSet<Mac> = (0..50).map(|_| fixture.interface(ALICE, &subnet.id, None).unwrap().mac).collect();
        assert_eq!(macs.len(), 50);
    }

    #[test]
    fn groups_of_other_accounts_and_vpcs_are_refused() {
        let fixture = Fixture::new();
        let (vpc, theirs) = (fixture.default_vpc(ALICE).id, fixture.default_vpc(BOB).id);
        let foreign = security_group::default_group(&fixture.world.begin(), BOB, &theirs).unwrap().id.clone();
        let request = shapes::CreateVpcRequest { cidr_block: Some("10.0.0.0/16".into()), ..Default::default() };
        let other = fixture.call(ALICE, |call| super::super::vpc::create_vpc(call, request)).unwrap().vpc.unwrap().vpc_id.unwrap();
        let elsewhere = security_group::default_group(&fixture.world.begin(), ALICE, &other).unwrap().id.clone();
        let own = security_group::default_group(&fixture.world.begin(), ALICE, &vpc).unwrap().id.clone();
        let tx = fixture.world.begin();
        for id in [foreign, elsewhere] {
            assert_eq!(checked_groups(&tx, ALICE, &vpc, &[id]).unwrap_err().code, "InvalidGroup.NotFound");
        }
        assert_eq!(checked_groups(&tx, ALICE, &vpc, &[]).unwrap(), std::slice::from_ref(&own));
        assert_eq!(checked_groups(&tx, ALICE, &vpc, &[own.clone(), own.clone()]).unwrap(), std::slice::from_ref(&own));
    }
}
