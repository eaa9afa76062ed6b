//! Route tables: the longest prefix wins, and a local route of the VPC cannot be
//! overridden by one of equal length. What stays in the subnet asks no route.
//!
//! Compiled into one hash table for each length of prefix that occurs, longest
//! first: a lookup takes as many steps as there are lengths, a handful in practice
//! and never more than 33, whatever the number of routes.

use std::net::Ipv4Addr;

use crate::policy::Map;
use crate::{Prefix, Route, RouteTarget};

/// Where a destination lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// In the VPC: the network's mapping says on which card.
    Local,
    /// Where a route of the table leads.
    Route(RouteTarget),
}

/// A route table, ready for lookups.
#[derive(Debug, Default)]
pub struct RouteTable {
    lengths: Vec<(u8, Map<Ipv4Addr, Target>)>,
}

impl RouteTable {
    /// The table of `routes` and of the local routes for `local`.
    #[must_use]
    pub fn new<'a>(local: impl IntoIterator<Item = &'a Prefix>, routes: &[Route]) -> Self {
        let mut table = Self::default();
        routes.iter().for_each(|route| table.insert(route.destination, Target::Route(route.target)));
        local.into_iter().for_each(|prefix| table.insert(*prefix, Target::Local));
        table.lengths.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
        table
    }

    fn insert(&mut self, prefix: Prefix, target: Target) {
        let length = prefix.length.min(32);
        let index = self.lengths.iter().position(|(known, _)| *known == length).unwrap_or_else(|| {
            self.lengths.push((length, Map::default()));
            self.lengths.len() - 1
        });
        if let Some((_, routes)) = self.lengths.get_mut(index) {
            routes.insert(prefix.nth(0), target);
        }
    }

    /// Where the longest prefix that holds `destination` leads; `None` without one.
    #[must_use]
    pub fn lookup(&self, destination: Ipv4Addr) -> Option<Target> {
        self.lengths.iter().find_map(|(length, routes)| routes.get(&Prefix::new(destination, *length).nth(0)).copied())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_local_route_yields_to_a_longer_one_only() {
        let vpc = Prefix::new([10, 0, 0, 0].into(), 16);
        let route = |length| Route { destination: Prefix::new([10, 0, 2, 7].into(), length), target: RouteTarget::Blackhole };
        let table = RouteTable::new([&vpc], &[route(16), route(24), route(0)]);
        assert_eq!(table.lookup([10, 0, 1, 1].into()), Some(Target::Local));
        assert_eq!(table.lookup([10, 0, 2, 1].into()), Some(Target::Route(RouteTarget::Blackhole)));
        assert_eq!(table.lookup([8, 8, 8, 8].into()), Some(Target::Route(RouteTarget::Blackhole)));
        assert_eq!(RouteTable::new([&vpc], &[]).lookup([8, 8, 8, 8].into()), None);
    }

    proptest! {
        #[test]
        fn lookups_agree_with_a_scan_for_the_longest_prefix(
            routes in proptest::collection::vec((any::<[u8; 4]>(), 0u8..=32), 0..40), tried: [u8; 4], near in 0usize..40,
        ) {
            let routes: Vec<_> = (0..).zip(&routes).map(|(n, (address, length))| {
                // Distinct targets tell the routes apart.
                let target = RouteTarget::Peer(crate::Vni(n));
                Route { destination: Prefix::new((*address).into(), *length), target }
            }).collect();
            let table = RouteTable::new([], &routes);
            let near = routes.get(near).map_or(tried.into(), |route| route.destination.nth(u32::from(tried[3])));
            for destination in [Ipv4Addr::from(tried), near] {
                // Of equal prefixes the later counts, as `max_by_key` has it.
                let expected = routes.iter().filter(|route| route.destination.contains(destination)).max_by_key(|route| route.destination.length);
                prop_assert_eq!(table.lookup(destination), expected.map(|route| Target::Route(route.target)));
            }
        }
    }
}
