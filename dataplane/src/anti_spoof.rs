//! Who may claim which source address, on each of the three sides of a card.

use std::net::Ipv4Addr;

use crate::RouteTarget;
use crate::counters::DropReason;
use crate::policy::{Endpoint, Port, Site};
use crate::route::Target;

/// Checks the source of a packet that came from another card, to something that
/// stands at `site`. There is no learning: a card is believed for
/// - what the network maps to it, and the mapping is returned;
/// - what a peered network maps to it, where the own one does not know the address;
/// - the internet, where the route there is the NAT gateway on that card;
/// - anything, if it has a port that forwards for others.
///
/// # Errors
/// [`DropReason::UnmappedVtep`].
pub fn from_vtep(site: &Site, source: Ipv4Addr, vtep: Ipv4Addr) -> Result<Option<&Endpoint>, DropReason> {
    from_vpc(site, source, vtep).or_else(|reason| {
        let by_peer = || site.peers().any(|peer| peer.endpoint(source).is_some_and(|endpoint| endpoint.vtep == vtep));
        let believed = site.network.endpoint(source).is_none() && by_peer() || by_nat_gateway(site, source, vtep);
        if believed { Ok(None) } else { Err(reason) }
    })
}

/// The same where only the VPC itself may speak: at a NAT gateway.
///
/// # Errors
/// [`DropReason::UnmappedVtep`].
pub fn from_vpc(site: &Site, source: Ipv4Addr, vtep: Ipv4Addr) -> Result<Option<&Endpoint>, DropReason> {
    match site.network.endpoint(source) {
        Some(endpoint) if endpoint.vtep == vtep => Ok(Some(endpoint)),
        _ if site.network.is_forwarder(vtep) && !is_martian(source) => Ok(None),
        _ => Err(DropReason::UnmappedVtep),
    }
}

/// Whether what `site` sends to `address` leaves by a NAT gateway on that card, so
/// that the answers come from there.
fn by_nat_gateway(site: &Site, address: Ipv4Addr, vtep: Ipv4Addr) -> bool {
    match site.target(address) {
        Some(Target::Route(RouteTarget::NatGateway(gateway))) => {
            !is_martian(address) && site.network.endpoint(gateway).is_some_and(|endpoint| endpoint.vtep == vtep)
        }
        _ => false,
    }
}

/// Checks the source of a packet that came from the internet: an address of the
/// VPC or of a peer would match rules that mean its neighbours, and some can have
/// no sender.
///
/// # Errors
/// [`DropReason::SpoofedAddress`].
pub fn from_public(port: &Port, source: Ipv4Addr) -> Result<(), DropReason> {
    let inside = port.config.vpc_prefixes.iter().chain([&port.config.subnet]).any(|prefix| prefix.contains(source));
    let peer = port.site.peers().any(|peer| peer.endpoint(source).is_some());
    if inside || peer || is_martian(source) { Err(DropReason::SpoofedAddress) } else { Ok(()) }
}

/// Addresses that no packet can come from: "this network", loopback, link-local,
/// multicast, reserved and broadcast. RFC 6890.
#[must_use]
pub fn is_martian(source: Ipv4Addr) -> bool {
    let [first, ..] = source.octets();
    first == 0 || source.is_loopback() || source.is_link_local() || first >= 224
}
