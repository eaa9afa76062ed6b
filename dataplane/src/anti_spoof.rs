//! Who may claim which source address, on each of the three sides of a card.

use std::net::Ipv4Addr;

use crate::counters::DropReason;
use crate::policy::{Endpoint, Port};

/// Checks the source of a packet that came from another card: the network has to
/// map it to that card. There is no learning.
///
/// # Errors
/// [`DropReason::UnmappedVtep`].
pub fn from_vtep(port: &Port, source: Ipv4Addr, vtep: Ipv4Addr) -> Result<&Endpoint, DropReason> {
    match port.network.endpoint(source) {
        Some(endpoint) if endpoint.vtep == vtep => Ok(endpoint),
        _ => Err(DropReason::UnmappedVtep),
    }
}

/// Checks the source of a packet that came from the internet: an address of the
/// VPC would match rules that mean its neighbours, and some can have no sender.
///
/// # Errors
/// [`DropReason::SpoofedAddress`].
pub fn from_public(port: &Port, source: Ipv4Addr) -> Result<(), DropReason> {
    let inside = port.config.vpc_prefixes.iter().chain([&port.config.subnet]).any(|prefix| prefix.contains(source));
    if inside || is_martian(source) { Err(DropReason::SpoofedAddress) } else { Ok(()) }
}

/// Addresses that no packet can come from: "this network", loopback, link-local,
/// multicast, reserved and broadcast. RFC 6890.
#[must_use]
pub fn is_martian(source: Ipv4Addr) -> bool {
    let [first, ..] = source.octets();
    first == 0 || source.is_loopback() || source.is_link_local() || first >= 224
}
