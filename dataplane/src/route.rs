//! Route tables: the longest prefix wins, and the local routes of the VPC cannot
//! be overridden.

use std::net::Ipv4Addr;

use crate::counters::DropReason;
use crate::explain::{Matched, Seen, Witness};
use crate::{PortConfig, RouteTarget};

/// Where a destination lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// In the VPC: the network's mapping says on which card.
    Vpc,
    /// Behind the public side.
    Internet,
}

/// Looks a destination up in the route table of a port.
///
/// # Errors
/// [`DropReason::NoRoute`], [`DropReason::Blackhole`].
pub fn lookup(port: &PortConfig, destination: Ipv4Addr, witness: &mut impl Witness) -> Result<Target, DropReason> {
    if let Some(prefix) = port.vpc_prefixes.iter().chain([&port.subnet]).find(|prefix| prefix.contains(destination)) {
        witness.saw(Seen::Route { matched: Some(Matched { prefix: *prefix, target: None }) });
        return Ok(Target::Vpc);
    }
    let routes = port.routes.iter().filter(|route| route.destination.contains(destination));
    let route = routes.max_by_key(|route| route.destination.length);
    witness.saw(Seen::Route { matched: route.map(|route| Matched { prefix: route.destination, target: Some(route.target) }) });
    match route.map(|route| route.target) {
        Some(RouteTarget::InternetGateway) => Ok(Target::Internet),
        Some(RouteTarget::Blackhole) => Err(DropReason::Blackhole),
        None => Err(DropReason::NoRoute),
    }
}
