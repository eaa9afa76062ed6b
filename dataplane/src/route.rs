//! Route tables: the longest prefix wins, and the local routes of the VPC cannot
//! be overridden.

use std::net::Ipv4Addr;

use crate::counters::DropReason;
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
pub fn lookup(port: &PortConfig, destination: Ipv4Addr) -> Result<Target, DropReason> {
    if port.vpc_prefixes.iter().chain([&port.subnet]).any(|prefix| prefix.contains(destination)) {
        return Ok(Target::Vpc);
    }
    let route = port.routes.iter().filter(|route| route.destination.contains(destination));
    match route.max_by_key(|route| route.destination.length).map(|route| route.target) {
        Some(RouteTarget::InternetGateway) => Ok(Target::Internet),
        Some(RouteTarget::Blackhole) => Err(DropReason::Blackhole),
        None => Err(DropReason::NoRoute),
    }
}
