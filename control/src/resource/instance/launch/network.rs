//! Where a launch goes: zone, subnet, and the primary interface of each instance.

use std::net::Ipv4Addr;
use std::sync::Arc;

use crate::error::ApiError;
use crate::model::{NetworkInterface, SecurityGroup, Subnet};
use crate::resource::id::{NETWORK_INTERFACE, SUBNET, unsupported};
use crate::resource::{network_interface, vpc};
use crate::shapes::{self, InstanceNetworkInterfaceSpecification, RunInstancesRequest};
use crate::world::Call;

/// The primary interface of each instance.
pub(super) struct Interface {
    /// One that the tenant made before.
    pub(super) existing: Option<Arc<NetworkInterface>>,
    pub(super) groups: Vec<String>,
    pub(super) private_ip: Option<Ipv4Addr>,
    pub(super) description: String,
    /// None: as the subnet says.
    pub(super) public_ip: Option<bool>,
    pub(super) delete_on_termination: bool,
}

/// Reads where the instances go and what their interface is like: the parameters of the instance, or of its only interface.
pub(super) fn network(call: &Call<'_>, request: &mut RunInstancesRequest, most: u64) -> Result<(Vec<Arc<Subnet>>, Interface), ApiError> {
    let zone = zone(call, request.placement.as_ref())?;
    let mut specifications = std::mem::take(&mut request.network_interfaces);
    let specification = match (specifications.pop(), specifications.is_empty()) {
        (specification, true) => specification,
        (_, false) => {
            unsupported(&[("NetworkInterface.2", true)])?;
            None
        }
    };
    if specification.is_some() {
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
    let asked = specification.unwrap_or_else(|| InstanceNetworkInterfaceSpecification {
        groups: std::mem::take(&mut request.security_group_ids),
        subnet_id: request.subnet_id.take(),
        private_ip_address: request.private_ip_address.take(),
        ..Default::default()
    });
    refuse_unsupported_interface(&asked)?;
    if let Some(id) = &asked.network_interface_id {
        return existing(call, id, &asked, zone.as_deref(), most);
    }
    let subnets = subnets(call, asked.subnet_id.as_deref(), zone.as_deref())?;
    let Some(vpc_id) = subnets.first().map(|subnet| subnet.vpc_id.clone()) else {
        return Err(ApiError::new("MissingInput", "No subnets found for the default VPC. Please specify a subnet."));
    };
    let groups = groups(call, &vpc_id, asked.subnet_id.as_deref(), &asked.groups, &request.security_groups)?;
    let private_ip = match &asked.private_ip_address {
        None => None,
        Some(_) if 1 < most => {
            return Err(ApiError::invalid_combination("The parameter privateIpAddress cannot be used with more than one instance"));
        }
        Some(text) => Some(text.parse().map_err(|_| ApiError::invalid_value(format!("Invalid IPv4 address '{text}'")))?),
    };
    if private_ip.is_some() && 1 < subnets.len() {
        return Err(ApiError::invalid_combination("The parameter privateIpAddress needs a subnet"));
    }
    let interface = Interface {
        existing: None,
        groups,
        private_ip,
        description: asked.description.unwrap_or_default(),
        public_ip: asked.associate_public_ip_address,
        delete_on_termination: asked.delete_on_termination.unwrap_or(true),
    };
    Ok((subnets, interface))
}

fn refuse_unsupported_interface(asked: &InstanceNetworkInterfaceSpecification) -> Result<(), ApiError> {
    if asked.device_index.is_some_and(|index| index != 0) {
        return Err(ApiError::invalid_value("The network interface of an instance with one interface must have the device index 0"));
    }
    unsupported(&[
        ("NetworkInterface.AssociateCarrierIpAddress", asked.associate_carrier_ip_address == Some(true)),
        ("NetworkInterface.ConnectionTrackingSpecification", asked.connection_tracking_specification.is_some()),
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
        ("NetworkInterface.PrivateIpAddresses", !asked.private_ip_addresses.is_empty()),
        ("NetworkInterface.SecondaryPrivateIpAddressCount", asked.secondary_private_ip_address_count.is_some_and(|count| count != 0)),
    ])
}

/// An interface that the tenant made before becomes the primary one.
fn existing(
    call: &Call<'_>,
    id: &str,
    asked: &InstanceNetworkInterfaceSpecification,
    zone: Option<&str>,
    most: u64,
) -> Result<(Vec<Arc<Subnet>>, Interface), ApiError> {
    if 1 < most {
        return Err(ApiError::invalid_combination("A network interface may not be specified when launching more than one instance"));
    }
    let others = asked.subnet_id.is_some()
        || !asked.groups.is_empty()
        || asked.private_ip_address.is_some()
        || asked.associate_public_ip_address.is_some();
    if others || asked.delete_on_termination == Some(true) {
        return Err(ApiError::invalid_combination(
            "A network interface ID may not be specified together with properties of a new interface",
        ));
    }
    let interface = NETWORK_INTERFACE.row::<NetworkInterface>(call, id)?;
    if interface.attachment.is_some() {
        return Err(ApiError::new("InvalidNetworkInterface.InUse", format!("Interface: [{id}] in use.")));
    }
    let subnets = subnets(call, Some(&interface.subnet_id), zone)?;
    let interface = Interface {
        existing: Some(interface),
        groups: Vec::new(),
        private_ip: None,
        description: String::new(),
        public_ip: Some(false),
        delete_on_termination: false,
    };
    Ok((subnets, interface))
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
