//! Further addresses of a NAT gateway, which come and go while it works.

use super::{MOST_ADDRESSES, address_shapes, claims, take, too_many_addresses};
use crate::error::ApiError;
use crate::model::{Address, NatGateway, NatGatewayAddress, NatGatewayAddressState, NatGatewayState, NetworkInterface, Subnet};
use crate::resource::id::{ADDRESS, NAT_GATEWAY};
use crate::resource::subnet;
use crate::shapes::{
    AssociateNatGatewayAddressRequest, AssociateNatGatewayAddressResult, DisassociateNatGatewayAddressRequest,
    DisassociateNatGatewayAddressResult,
};
use crate::world::Call;

/// A gateway that works.
fn working(call: &Call<'_>, id: Option<String>) -> Result<NatGateway, ApiError> {
    let id = NAT_GATEWAY.required(id, "NatGatewayId")?;
    let gateway = NAT_GATEWAY.row::<NatGateway>(call, &id)?;
    match gateway.state {
        NatGatewayState::Available => Ok(NatGateway::clone(&gateway)),
        NatGatewayState::Deleted => Err(NAT_GATEWAY.not_found(&id)),
        state => Err(ApiError::new("IncorrectState", format!("The NAT gateway {id} is {}, not available", state.name()))),
    }
}

/// AssociateNatGatewayAddress: the addresses are associating until the gateway's card uses them.
///
/// # Errors
/// `IncorrectState`, `InvalidAllocationID.NotFound`, `Resource.AlreadyAssociated`, `PrivateIpAddressLimitExceeded`, those of
/// private addresses.
pub fn associate_nat_gateway_address(
    call: &mut Call<'_>,
    request: AssociateNatGatewayAddressRequest,
) -> Result<AssociateNatGatewayAddressResult, ApiError> {
    crate::resource::id::unsupported(&[
        ("AvailabilityZone", request.availability_zone.is_some()),
        ("AvailabilityZoneId", request.availability_zone_id.is_some()),
    ])?;
    let mut gateway = working(call, request.nat_gateway_id)?;
    let claims = claims(request.allocation_ids.into_iter(), request.private_ip_addresses.into_iter().map(Some))?;
    if gateway.addresses.len().saturating_add(claims.len()) > MOST_ADDRESSES {
        return Err(too_many_addresses());
    }
    let subnet = call.get::<Subnet>(&gateway.subnet_id).ok_or_else(ApiError::internal)?;
    let interface_id = gateway.network_interface_id.clone().ok_or_else(ApiError::internal)?;
    let old = gateway.addresses.len();
    let wanted: Vec<_> = claims.iter().map(|claim| claim.private_ip).collect();
    let private_ips = subnet::free_addresses(&mut call.tx, &subnet, &wanted)?;
    for (claim, private_ip) in claims.iter().zip(&private_ips) {
        let elastic = ADDRESS.row::<Address>(call, &claim.allocation_id)?;
        if let Some(association) = &elastic.association {
            let message = format!("resource {} is already associated with associate-id {}", elastic.id, association.id);
            return Err(ApiError::new("Resource.AlreadyAssociated", message));
        }
        let taken = take(call, &interface_id, &elastic, *private_ip);
        gateway.addresses.push(taken);
    }
    call.tx.update::<NetworkInterface>(&gateway.account_id, &interface_id, |interface| interface.secondary_ips.extend(private_ips));
    call.tx.put(gateway.clone());
    let added = gateway.addresses.get(old..).unwrap_or_default();
    let nat_gateway_addresses = address_shapes(&gateway, added);
    Ok(AssociateNatGatewayAddressResult { nat_gateway_id: Some(gateway.id), nat_gateway_addresses })
}

/// DisassociateNatGatewayAddress: the addresses are disassociating until the gateway's card has let them go. The card drains
/// nothing, so connections over them end at once, whatever the longest drain time.
///
/// # Errors
/// `IncorrectState`, `InvalidAssociationID.NotFound`, `InvalidParameterValue` for the primary address.
pub fn disassociate_nat_gateway_address(
    call: &mut Call<'_>,
    request: DisassociateNatGatewayAddressRequest,
) -> Result<DisassociateNatGatewayAddressResult, ApiError> {
    let mut gateway = working(call, request.nat_gateway_id)?;
    let named = |address: &NatGatewayAddress| address.association_id.as_ref().is_some_and(|id| request.association_ids.contains(id));
    for id in &request.association_ids {
        let place = gateway.addresses.iter().position(|address| address.association_id.as_ref() == Some(id));
        match place {
            None => return Err(crate::resource::id::ADDRESS_ASSOCIATION.not_found(id)),
            Some(0) => return Err(ApiError::invalid_value(format!("The primary address {id} of a NAT gateway cannot be disassociated"))),
            Some(_) => {}
        }
    }
    for address in gateway.addresses.iter_mut().filter(|address| named(address)) {
        address.state = NatGatewayAddressState::Disassociating;
    }
    call.tx.put(gateway.clone());
    let leaving: Vec<NatGatewayAddress> = gateway.addresses.iter().filter(|address| named(address)).cloned().collect();
    let nat_gateway_addresses = address_shapes(&gateway, &leaving);
    Ok(DisassociateNatGatewayAddressResult { nat_gateway_id: Some(gateway.id), nat_gateway_addresses })
}
