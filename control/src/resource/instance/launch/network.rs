//! Where a launch goes: zone, subnet, and the interfaces of each instance.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::error::ApiError;
use crate::model::{ConnectionTracking, NetworkInterface, SecurityGroup, Subnet};
use crate::resource::id::{SUBNET, unsupported};
use crate::resource::instance_type::InstanceType;
use crate::resource::network_interface::{self, Wanted};
use crate::resource::vpc;
use crate::shapes::{self, InstanceNetworkInterfaceSpecification, RunInstancesRequest};
use crate::world::Call;

/// One interface of each instance.
pub(super) struct Interface {
    pub(super) device_index: u32,
    /// Where it is; none: where the launch goes.
    pub(super) subnet: Option<Arc<Subnet>>,
    /// One that the tenant made before.
    pub(super) existing: Option<Arc<NetworkInterface>>,
    pub(super) groups: Vec<String>,
    pub(super) addresses: Wanted,
    pub(super) connection_tracking: ConnectionTracking,
    pub(super) description: String,
    /// None: as the subnet says.
    pub(super) public_ip: Option<bool>,
    pub(super) delete_on_termination: bool,
}

/// Reads where the instances go and what their interfaces are like: the parameters of the instance, or of its interfaces. The primary
/// one stands first.
pub(super) fn network(
    call: &Call<'_>,
    request: &mut RunInstancesRequest,
    kind: &InstanceType,
    most: u64,
) -> Result<(Vec<Arc<Subnet>>, Vec<Interface>), ApiError> {
    let zone = zone(call, request.placement.as_ref())?;
    let mut asked = std::mem::take(&mut request.network_interfaces);
    if asked.is_empty() {
        asked.push(InstanceNetworkInterfaceSpecification {
            groups: std::mem::take(&mut request.security_group_ids),
            subnet_id: request.subnet_id.take(),
            private_ip_address: request.private_ip_address.take(),
            ..Default::default()
        });
    } else {
        for (given, what) in [
            (request.subnet_id.is_some(), "subnet ID"),
            (!request.security_group_ids.is_empty() || !request.security_groups.is_empty(), "security groups"),
            (request.private_ip_address.is_some(), "private IP address"),
        ] {
            if given {
                return Err(ApiError::invalid_combination(format!(
                    "Network interfaces and an instance-level {what} may not be specified on the same request"
                )));
            }
        }
    }
    network_interface::check_count(kind, asked.len())?;
    let mut asked = asked.into_iter().map(|asked| refuse_unsupported_interface(&asked).map(|()| asked)).collect::<Result<Vec<_>, _>>()?;
    let several = 1 < asked.len();
    if let [only] = asked.as_mut_slice() {
        only.device_index.get_or_insert(0);
    }
    if several && asked.iter().any(|asked| asked.associate_public_ip_address == Some(true)) {
        let message = "The associatePublicIPAddress parameter cannot be specified when launching with multiple network interfaces.";
        return Err(ApiError::invalid_combination(message));
    }
    let mut by_index = BTreeMap::new();
    for asked in asked {
        let index = network_interface::read_index(asked.device_index)?;
        if by_index.insert(index, asked).is_some() {
            let message = format!("Each network interface requires a unique device index; {index} is given twice.");
            return Err(ApiError::invalid_value(message));
        }
    }
    let Some(primary) = by_index.remove(&0) else {
        return Err(ApiError::invalid_value("When specifying network interfaces, you must include a device at index 0."));
    };
    let (mut subnets, primary) = self::primary(call, primary, request, kind, zone.as_deref(), most)?;
    let Some(vpc_id) = subnets.first().map(|subnet| subnet.vpc_id.clone()) else {
        return Err(ApiError::new("MissingInput", "No subnets found for the default VPC. Please specify a subnet."));
    };
    let mut interfaces = vec![primary];
    for (index, asked) in by_index {
        interfaces.push(further(call, index, asked, &vpc_id, kind, most)?);
    }
    let mut existing = BTreeSet::new();
    for id in interfaces.iter().filter_map(|interface| interface.existing.as_ref()).map(|interface| &interface.id) {
        if !existing.insert(id) {
            return Err(network_interface::in_use(id));
        }
    }
    for interface in &mut interfaces {
        if several {
            interface.public_ip = Some(false);
        }
        if let Some(elsewhere) = &interface.subnet {
            subnets.retain(|subnet| subnet.zone == elsewhere.zone);
        }
    }
    if subnets.is_empty() {
        let message = "The network interfaces of an instance must be in the same availability zone";
        return Err(ApiError::invalid_combination(message));
    }
    Ok((subnets, interfaces))
}

/// The interface with the device index 0, and the subnets that it may be in.
fn primary(
    call: &Call<'_>,
    asked: InstanceNetworkInterfaceSpecification,
    request: &RunInstancesRequest,
    kind: &InstanceType,
    zone: Option<&str>,
    most: u64,
) -> Result<(Vec<Arc<Subnet>>, Interface), ApiError> {
    if let Some(id) = &asked.network_interface_id {
        let interface = existing(call, 0, id, &asked, kind, most)?;
        let subnet_id = interface.existing.as_ref().map(|interface| interface.subnet_id.as_str());
        return Ok((subnets(call, subnet_id, zone)?, interface));
    }
    let subnets = subnets(call, asked.subnet_id.as_deref(), zone)?;
    let Some(vpc_id) = subnets.first().map(|subnet| subnet.vpc_id.clone()) else {
        return Err(ApiError::new("MissingInput", "No subnets found for the default VPC. Please specify a subnet."));
    };
    let groups = groups(call, &vpc_id, asked.subnet_id.as_deref(), &asked.groups, &request.security_groups)?;
    let interface = new(0, asked, None, groups, kind, most)?;
    if interface.addresses.names_any() && 1 < subnets.len() {
        return Err(ApiError::invalid_combination("The parameter privateIpAddress needs a subnet"));
    }
    Ok((subnets, interface))
}

/// An interface with another device index.
fn further(
    call: &Call<'_>,
    index: u32,
    asked: InstanceNetworkInterfaceSpecification,
    vpc_id: &str,
    kind: &InstanceType,
    most: u64,
) -> Result<Interface, ApiError> {
    if let Some(id) = &asked.network_interface_id {
        return existing(call, index, id, &asked, kind, most);
    }
    let subnet = asked.subnet_id.as_deref().map(|id| SUBNET.row::<Subnet>(call, id)).transpose()?;
    let vpc_id = subnet.as_ref().map_or(vpc_id, |subnet| subnet.vpc_id.as_str()).to_owned();
    let groups = groups(call, &vpc_id, asked.subnet_id.as_deref(), &asked.groups, &[])?;
    new(index, asked, subnet, groups, kind, most)
}

/// An interface that the launch makes.
fn new(
    device_index: u32,
    asked: InstanceNetworkInterfaceSpecification,
    subnet: Option<Arc<Subnet>>,
    groups: Vec<String>,
    kind: &InstanceType,
    most: u64,
) -> Result<Interface, ApiError> {
    let list = asked.private_ip_addresses;
    let addresses = Wanted::new(asked.private_ip_address.as_deref(), list, asked.secondary_private_ip_address_count)?;
    if addresses.names_any() && 1 < most {
        return Err(ApiError::invalid_combination("The parameter privateIpAddress cannot be used with more than one instance"));
    }
    network_interface::check_addresses(Some(kind), addresses.count())?;
    let times = asked.connection_tracking_specification.unwrap_or_default();
    Ok(Interface {
        device_index,
        subnet,
        existing: None,
        groups,
        addresses,
        connection_tracking: network_interface::track(ConnectionTracking::default(), &times)?,
        description: network_interface::read_description(asked.description)?,
        public_ip: asked.associate_public_ip_address,
        delete_on_termination: asked.delete_on_termination.unwrap_or(true),
    })
}

fn refuse_unsupported_interface(asked: &InstanceNetworkInterfaceSpecification) -> Result<(), ApiError> {
    unsupported(&[
        ("NetworkInterface.AssociateCarrierIpAddress", asked.associate_carrier_ip_address == Some(true)),
        ("NetworkInterface.EnaQueueCount", asked.ena_queue_count.is_some()),
        ("NetworkInterface.EnaSrdSpecification", asked.ena_srd_specification.is_some()),
        ("NetworkInterface.InterfaceType", asked.interface_type.as_deref().is_some_and(|kind| kind != "interface")),
        ("NetworkInterface.Ipv4PrefixCount", asked.ipv4_prefix_count.is_some()),
        ("NetworkInterface.Ipv4Prefix", !asked.ipv4_prefixes.is_empty()),
        ("NetworkInterface.Ipv6AddressCount", asked.ipv6_address_count.is_some_and(|count| count != 0)),
        ("NetworkInterface.Ipv6Addresses", !asked.ipv6_addresses.is_empty()),
        ("NetworkInterface.Ipv6PrefixCount", asked.ipv6_prefix_count.is_some()),
        ("NetworkInterface.Ipv6Prefix", !asked.ipv6_prefixes.is_empty()),
        ("NetworkInterface.NetworkCardIndex", asked.network_card_index.is_some_and(|index| index != 0)),
        ("NetworkInterface.PrimaryIpv6", asked.primary_ipv6 == Some(true)),
    ])
}

/// An interface that the tenant made before.
fn existing(
    call: &Call<'_>,
    device_index: u32,
    id: &str,
    asked: &InstanceNetworkInterfaceSpecification,
    kind: &InstanceType,
    most: u64,
) -> Result<Interface, ApiError> {
    if 1 < most {
        return Err(ApiError::invalid_combination("A network interface may not be specified when launching more than one instance"));
    }
    let others = asked.subnet_id.is_some()
        || !asked.groups.is_empty()
        || asked.private_ip_address.is_some()
        || !asked.private_ip_addresses.is_empty()
        || asked.secondary_private_ip_address_count.is_some()
        || asked.connection_tracking_specification.is_some()
        || asked.associate_public_ip_address.is_some();
    if others || asked.delete_on_termination == Some(true) {
        return Err(ApiError::invalid_combination(
            "A network interface ID may not be specified together with properties of a new interface",
        ));
    }
    let interface = network_interface::own(call, id)?;
    if interface.attachment.is_some() {
        return Err(network_interface::in_use(id));
    }
    network_interface::check_addresses(Some(kind), interface.private_ips().count())?;
    let subnet = call.get::<Subnet>(&interface.subnet_id);
    Ok(Interface {
        device_index,
        subnet,
        existing: Some(interface),
        groups: Vec::new(),
        addresses: Wanted::default(),
        connection_tracking: ConnectionTracking::default(),
        description: String::new(),
        public_ip: Some(false),
        delete_on_termination: false,
    })
}

fn zone(call: &Call<'_>, placement: Option<&shapes::Placement>) -> Result<Option<String>, ApiError> {
    let Some(placement) = placement else { return Ok(None) };
    let (name, id) = (placement.availability_zone.as_deref(), placement.availability_zone_id.as_deref());
    let found = match (name, id) {
        (None, None) => return Ok(None),
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid_combination("The parameters AvailabilityZone and AvailabilityZoneId exclude each other"));
        }
        (Some(name), None) => call.region.zone(name),
        (None, Some(id)) => call.region.zones.iter().find(|zone| zone.id == id),
    };
    let asked = name.or(id).unwrap_or_default();
    let found = found.ok_or_else(|| ApiError::invalid_value(format!("Invalid availability zone: [{asked}]")))?;
    Ok(Some(found.name.clone()))
}

/// The subnet that was asked for, or the default ones, in the order of the region's zones.
fn subnets(call: &Call<'_>, id: Option<&str>, zone: Option<&str>) -> Result<Vec<Arc<Subnet>>, ApiError> {
    if let Some(id) = id {
        let subnet = SUBNET.row::<Subnet>(call, id)?;
        if let Some(zone) = zone.filter(|zone| *zone != subnet.zone) {
            let message = format!("The specified subnet '{id}' is in the Availability Zone {}, not in {zone}", subnet.zone);
            return Err(ApiError::invalid_value(message));
        }
        return Ok(vec![subnet]);
    }
    let Some(vpc) = vpc::default_vpc(&call.tx, call.account()) else {
        return Err(ApiError::new("VPCIdNotSpecified", "No default VPC for this user"));
    };
    let mut subnets: Vec<_> = call.find::<Subnet>("vpc", &vpc.id).into_iter().filter(|subnet| subnet.default_for_zone).collect();
    subnets.retain(|subnet| zone.is_none_or(|zone| subnet.zone == zone));
    subnets.sort_by_key(|subnet| call.region.zones.iter().position(|zone| zone.name == subnet.zone));
    if subnets.is_empty() {
        let place = zone.map(|zone| format!(" in {zone}")).unwrap_or_default();
        return Err(ApiError::new(
            "MissingInput",
            format!("No subnets found for the default VPC '{}'{place}. Please specify a subnet.", vpc.id),
        ));
    }
    Ok(subnets)
}

fn groups(call: &Call<'_>, vpc_id: &str, subnet_id: Option<&str>, ids: &[String], names: &[String]) -> Result<Vec<String>, ApiError> {
    let mut all = ids.to_vec();
    if !names.is_empty() {
        if subnet_id.is_some() {
            return Err(ApiError::invalid_combination("The parameter groupName cannot be used with the parameter subnet"));
        }
        let known = call.find::<SecurityGroup>("vpc", vpc_id);
        for name in names {
            let group = known.iter().find(|group| group.name == *name).ok_or_else(|| {
                ApiError::new("InvalidGroup.NotFound", format!("The security group '{name}' does not exist in default VPC '{vpc_id}'"))
            })?;
            all.push(group.id.clone());
        }
    }
    if let Some((group, subnet)) =
        all.iter().find(|id| call.get::<SecurityGroup>(id).is_some_and(|group| group.vpc_id != vpc_id)).zip(subnet_id)
    {
        let message = format!("Security group {group} and subnet {subnet} belong to different networks.");
        return Err(ApiError::new("InvalidParameter", message));
    }
    network_interface::checked_groups(&call.tx, call.account(), vpc_id, &all)
}
