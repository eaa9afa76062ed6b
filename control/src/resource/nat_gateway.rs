//! NAT gateways: let ports without a public address open connections to the internet.
//!
//! ```text
//! pending --> available --> deleting --> deleted --> forgotten after an hour
//!    `--> failed --> forgotten after an hour
//! ```
//!
//! A gateway has an interface in its subnet, which only it may use, and one to eight Elastic IPs. All of it is claimed in the
//! transaction that makes the gateway; what cannot be claimed makes it fail, as EC2 tells it, a moment later. The work is done by a
//! card of the subnet's zone ([`life`]); what that card reports moves a gateway to available and to deleted.

mod addresses;
pub mod life;
#[cfg(test)]
mod tests;

use std::net::Ipv4Addr;
use std::sync::Arc;

pub use addresses::{associate_nat_gateway_address, disassociate_nat_gateway_address};

use super::client_token::{self, Checked};
use super::filter::{Filters, Page};
use super::id::{ADDRESS, NAT_GATEWAY, SUBNET, unsupported};
use super::network_interface::{self, NewInterface, Wanted};
use super::{address, subnet, tag};
use crate::error::ApiError;
use crate::model::{
    Address, InternetGateway, NatGateway, NatGatewayAddress, NatGatewayAddressState, NatGatewayState, NetworkInterface, StateReason, Subnet,
};
use crate::shapes::{
    self, CreateNatGatewayRequest, CreateNatGatewayResult, DeleteNatGatewayRequest, DeleteNatGatewayResult, DescribeNatGatewaysRequest,
    DescribeNatGatewaysResult,
};
use crate::world::{Call, Tx};

/// The most gateways of an account in one zone.
const MOST_GATEWAYS: usize = 5;
/// The most addresses of a gateway.
const MOST_ADDRESSES: usize = 8;

/// CreateNatGateway.
///
/// # Errors
/// `InvalidSubnetID.NotFound`, `InvalidAllocationID.NotFound`, `NatGatewayLimitExceeded`, `UnsupportedOperation` for private and regional
/// gateways, `IdempotentParameterMismatch`, those of tags. What is wrong with the network is told by the gateway's failure.
pub fn create_nat_gateway(call: &mut Call<'_>, mut request: CreateNatGatewayRequest) -> Result<CreateNatGatewayResult, ApiError> {
    let token = request.client_token.take();
    request.dry_run = None;
    let fresh = match client_token::check(call, "CreateNatGateway", token.as_deref(), &request)? {
        Checked::First(fresh) => fresh,
        Checked::Repeated(id) => {
            let gateway = NAT_GATEWAY.row::<NatGateway>(call, &id)?;
            return Ok(CreateNatGatewayResult { nat_gateway: Some(shape(call, &gateway)), client_token: token });
        }
    };
    if request.connectivity_type.as_deref() == Some("private") {
        return Err(ApiError::new(
            "UnsupportedOperation",
            "NAT gateways of the connectivity type private are not supported in this region",
        ));
    }
    unsupported(&[
        ("AvailabilityMode=regional", request.availability_mode.as_deref() == Some("regional")),
        ("AvailabilityZoneAddresses", !request.availability_zone_addresses.is_empty()),
        ("VpcId", request.vpc_id.is_some()),
        ("SecondaryPrivateIpAddressCount", request.secondary_private_ip_address_count.is_some()),
    ])?;
    let subnet_id = SUBNET.required(request.subnet_id, "SubnetId")?;
    let subnet = SUBNET.row::<Subnet>(call, &subnet_id)?;
    let first = request.allocation_id.filter(|id| !id.is_empty()).ok_or_else(|| ApiError::missing_parameter("AllocationId"))?;
    let wanted = [request.private_ip_address].into_iter().chain(request.secondary_private_ip_addresses.into_iter().map(Some));
    let claims = claims([first].into_iter().chain(request.secondary_allocation_ids), wanted)?;
    let elastic = claims.iter().map(|claim| ADDRESS.row::<Address>(call, &claim.allocation_id)).collect::<Result<Vec<_>, _>>()?;
    let ends = |gateway: &&Arc<NatGateway>| matches!(gateway.state, NatGatewayState::Failed | NatGatewayState::Deleted);
    if call.list::<NatGateway>().filter(|gateway| gateway.zone == subnet.zone && !ends(gateway)).count() >= MOST_GATEWAYS {
        return Err(ApiError::new("NatGatewayLimitExceeded", "The maximum number of NAT gateways has been reached."));
    }
    let tags = tag::specified(request.tag_specifications, &NAT_GATEWAY)?;
    let mut gateway = NatGateway {
        account_id: subnet.account_id.clone(),
        id: call.tx.new_id(NAT_GATEWAY.prefix),
        vpc_id: subnet.vpc_id.clone(),
        subnet_id,
        zone: subnet.zone.clone(),
        state: NatGatewayState::Pending,
        failure: obstacle(call, &subnet, &elastic),
        network_interface_id: None,
        addresses: Vec::new(),
        card_id: None,
        created: call.now,
        ended: None,
    };
    if gateway.failure.is_none() {
        gateway.failure = furnish(call, &subnet, &mut gateway, &elastic, &claims)?;
    }
    if gateway.failure.is_some() {
        let unclaimed = |claim: &Claim| NatGatewayAddress {
            allocation_id: claim.allocation_id.clone(),
            association_id: None,
            public_ip: None,
            private_ip: None,
            state: NatGatewayAddressState::Failed,
        };
        gateway.addresses = claims.iter().map(unclaimed).collect();
    }
    call.tx.put(gateway.clone());
    tag::set(&mut call.tx, &gateway.account_id, &NAT_GATEWAY, &gateway.id, tags);
    fresh.remember(call, &gateway.id);
    Ok(CreateNatGatewayResult { nat_gateway: Some(shape(call, &gateway)), client_token: token })
}

/// An Elastic IP that a request names, and the private address that it wants for it.
struct Claim {
    allocation_id: String,
    private_ip: Option<Ipv4Addr>,
}

/// Pairs Elastic IPs with private addresses, which are optional.
fn claims(allocation_ids: impl Iterator<Item = String>, private_ips: impl Iterator<Item = Option<String>>) -> Result<Vec<Claim>, ApiError> {
    let mut private_ips = private_ips.map(|text| {
        text.map(|text| text.parse().map_err(|_| ApiError::invalid_value(format!("Invalid IPv4 address: {text}")))).transpose()
    });
    let mut claims = Vec::<Claim>::new();
    for allocation_id in allocation_ids {
        if claims.iter().any(|claim| claim.allocation_id == allocation_id) {
            return Err(ApiError::invalid_value(format!("The allocation ID {allocation_id} is given more than once")));
        }
        claims.push(Claim { allocation_id, private_ip: private_ips.next().transpose()?.flatten() });
        if claims.len() > MOST_ADDRESSES {
            return Err(too_many_addresses());
        }
    }
    match private_ips.next() {
        Some(_) => Err(ApiError::invalid_combination("There are more private addresses than allocation IDs")),
        None => Ok(claims),
    }
}

fn too_many_addresses() -> ApiError {
    ApiError::new("PrivateIpAddressLimitExceeded", format!("A NAT gateway has at most {MOST_ADDRESSES} addresses."))
}

/// What in the network keeps a gateway from working, in EC2's words.
fn obstacle(call: &Call<'_>, subnet: &Subnet, elastic: &[Arc<Address>]) -> Option<StateReason> {
    if call.find::<InternetGateway>("vpc", &subnet.vpc_id).is_empty() {
        return Some(reason("Gateway.NotAttached", format!("Network {} has no Internet gateway attached", subnet.vpc_id)));
    }
    let taken = elastic.iter().find(|address| address.association.is_some())?;
    Some(reason("Resource.AlreadyAssociated", format!("Elastic IP address [{}] is already associated", taken.id)))
}

fn reason(code: &str, message: impl Into<String>) -> StateReason {
    StateReason { code: code.to_owned(), message: message.into() }
}

/// Gives a gateway its interface and its addresses; says so when the subnet is full.
fn furnish(
    call: &mut Call<'_>,
    subnet: &Subnet,
    gateway: &mut NatGateway,
    elastic: &[Arc<Address>],
    claims: &[Claim],
) -> Result<Option<StateReason>, ApiError> {
    if usize::try_from(subnet::available(&call.tx, subnet)).unwrap_or(usize::MAX) < claims.len() {
        let message = "Subnet has insufficient free addresses to create this NAT gateway";
        return Ok(Some(reason("InsufficientFreeAddressesInSubnet", message)));
    }
    let named: Vec<Ipv4Addr> = claims.iter().skip(1).filter_map(|claim| claim.private_ip).collect();
    let addresses = Wanted {
        primary: claims.first().and_then(|claim| claim.private_ip),
        // The named ones come first among the claims, so that the order of the addresses is theirs.
        more: claims.len().saturating_sub(1).saturating_sub(named.len()),
        secondary: named,
    };
    let interface = network_interface::insert(
        &mut call.tx,
        call.now,
        NewInterface {
            subnet,
            addresses,
            security_group_ids: Vec::new(),
            description: format!("Interface for NAT Gateway {}", gateway.id),
            attachment: None,
            associate_public_ip: false,
            connection_tracking: Default::default(),
        },
    )?;
    // What it forwards is from and to others.
    call.tx.update::<NetworkInterface>(&interface.account_id, &interface.id, |interface| interface.source_dest_check = false);
    gateway.network_interface_id = Some(interface.id.clone());
    for (address, private_ip) in elastic.iter().zip(interface.private_ips()) {
        let taken = take(call, &interface.id, address, private_ip);
        gateway.addresses.push(taken);
    }
    Ok(None)
}

/// Associates an Elastic IP with a private address of a gateway's interface.
fn take(call: &mut Call<'_>, interface_id: &str, elastic: &Address, private_ip: Ipv4Addr) -> NatGatewayAddress {
    let association = address::associate_with(&mut call.tx, elastic, interface_id, private_ip);
    NatGatewayAddress {
        allocation_id: elastic.id.clone(),
        association_id: Some(association),
        public_ip: Some(elastic.public_ip),
        private_ip: Some(private_ip),
        state: NatGatewayAddressState::Associating,
    }
}

/// The gateway that an interface belongs to. Nobody else may touch such an interface or its addresses.
pub fn of_interface(tx: &Tx<'_>, account: &str, interface_id: &str) -> Option<Arc<NatGateway>> {
    tx.find::<NatGateway>(account, "interface", interface_id).into_iter().next()
}

/// Refuses what only a gateway itself may do with its interface.
///
/// # Errors
/// `AuthFailure`.
pub fn check_not_managed(tx: &Tx<'_>, account: &str, interface_id: &str) -> Result<(), ApiError> {
    match of_interface(tx, account, interface_id) {
        Some(_) => Err(ApiError::new("AuthFailure", "You do not have permission to access the specified resource.")),
        None => Ok(()),
    }
}

/// Whether a gateway leads to the internet, as far as its routes can know.
pub fn is_usable(gateway: &NatGateway) -> bool {
    matches!(gateway.state, NatGatewayState::Pending | NatGatewayState::Available) && gateway.failure.is_none()
}

/// DeleteNatGateway. Its Elastic IPs stay the account's.
///
/// # Errors
/// `NatGatewayNotFound`, also for one that is deleted already.
pub fn delete_nat_gateway(call: &mut Call<'_>, request: DeleteNatGatewayRequest) -> Result<DeleteNatGatewayResult, ApiError> {
    let id = NAT_GATEWAY.required(request.nat_gateway_id, "NatGatewayId")?;
    let gateway = NAT_GATEWAY.row::<NatGateway>(call, &id)?;
    let now = call.now;
    let state = match gateway.state {
        NatGatewayState::Pending | NatGatewayState::Available | NatGatewayState::Deleting => NatGatewayState::Deleting,
        NatGatewayState::Failed => NatGatewayState::Deleted,
        NatGatewayState::Deleted => return Err(NAT_GATEWAY.not_found(&id)),
    };
    call.tx.update::<NatGateway>(&gateway.account_id, &id, |gateway| {
        gateway.state = state;
        if state == NatGatewayState::Deleted {
            gateway.ended = Some(now);
        }
    });
    Ok(DeleteNatGatewayResult { nat_gateway_id: Some(id) })
}

/// DescribeNatGateways.
///
/// # Errors
/// `NatGatewayNotFound` and those of filters and pages.
pub fn describe_nat_gateways(call: &mut Call<'_>, request: DescribeNatGatewaysRequest) -> Result<DescribeNatGatewaysResult, ApiError> {
    let filters = Filters::new(request.filter, &["nat-gateway-id", "state", "subnet-id", "tag", "vpc-id"])?;
    let page = Page::new("DescribeNatGateways", request.max_results, request.next_token.as_deref(), 1000)?;
    let rows = NAT_GATEWAY.rows::<NatGateway>(call, &request.nat_gateway_ids)?;
    let passing = rows.into_iter().filter(|(id, gateway)| {
        filters.pass(&tag::of(&call.tx, call.account(), id), |name, test| match name {
            "nat-gateway-id" => test(id),
            "state" => test(gateway.state.name()),
            "subnet-id" => test(&gateway.subnet_id),
            "vpc-id" => test(&gateway.vpc_id),
            _ => false,
        })
    });
    let (page, next_token) = page.take(passing);
    Ok(DescribeNatGatewaysResult { nat_gateways: page.iter().map(|gateway| shape(call, gateway)).collect(), next_token })
}

fn shape(call: &Call<'_>, gateway: &NatGateway) -> shapes::NatGateway {
    // Why it fails is told once it has failed.
    let failure = gateway.failure.as_ref().filter(|_| gateway.state != NatGatewayState::Pending);
    shapes::NatGateway {
        nat_gateway_id: Some(gateway.id.clone()),
        vpc_id: Some(gateway.vpc_id.clone()),
        subnet_id: Some(gateway.subnet_id.clone()),
        state: Some(gateway.state.name().to_owned()),
        failure_code: failure.map(|failure| failure.code.clone()),
        failure_message: failure.map(|failure| failure.message.clone()),
        connectivity_type: Some("public".into()),
        availability_mode: Some("zonal".into()),
        create_time: Some(gateway.created.into()),
        delete_time: gateway.ended.filter(|_| gateway.state == NatGatewayState::Deleted).map(Into::into),
        nat_gateway_addresses: address_shapes(gateway, &gateway.addresses),
        tags: tag::shapes(&tag::of(&call.tx, &gateway.account_id, &gateway.id)),
        ..Default::default()
    }
}

fn address_shapes(gateway: &NatGateway, addresses: &[NatGatewayAddress]) -> Vec<shapes::NatGatewayAddress> {
    let is_primary =
        |address: &NatGatewayAddress| gateway.addresses.first().is_some_and(|first| first.allocation_id == address.allocation_id);
    let shape = |address: &NatGatewayAddress| shapes::NatGatewayAddress {
        allocation_id: Some(address.allocation_id.clone()),
        association_id: address.association_id.clone(),
        network_interface_id: gateway.network_interface_id.clone(),
        private_ip: address.private_ip.map(|ip| ip.to_string()),
        public_ip: address.public_ip.map(|ip| ip.to_string()),
        is_primary: Some(is_primary(address)),
        status: Some(address.state.name().to_owned()),
        ..Default::default()
    };
    addresses.iter().map(shape).collect()
}
