//! Which card gets an instance or a volume: a pure function of what the cards
//! offer and what is claimed.
//!
//! What is claimed is not kept: it is the sum over the rows that claim (see the
//! sums in `model.rs`), so no claim can be lost or left behind. A claim is made
//! in the transaction that makes its row.

use crate::model::{Card, Instance, NatGateway, Placement, Volume};
use crate::world::Tx;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What one instance needs of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Demand {
    pub vcpus: u32,
    pub memory_mib: u64,
}

/// A host that may take instances.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Host {
    pub card_id: String,
    pub zone: String,
    pub free_vcpus: u32,
    pub free_memory_mib: u64,
}

/// The storage of a card that may take volumes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Shelf {
    pub card_id: String,
    pub zone: String,
    pub free_gib: u64,
}

/// What is free, from which the claims of one request are taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Room {
    hosts: Vec<Host>,
    shelves: Vec<Shelf>,
}

impl Room {
    /// The room on cards that are watched; hosts must be connected to their card as well.
    pub fn of(tx: &Tx<'_>) -> Self {
        let mut room = Self::default();
        for card in tx.all::<Card>().filter(|card| card.watched) {
            if card.compute && card.host_connected {
                let vcpus = u64::from(card.cores).saturating_sub(tx.sum::<Instance>("vcpus", &card.id));
                room.hosts.push(Host {
                    card_id: card.id.clone(),
                    zone: card.zone.clone(),
                    free_vcpus: u32::try_from(vcpus).unwrap_or(u32::MAX),
                    free_memory_mib: (card.memory_bytes / MIB).saturating_sub(tx.sum::<Instance>("memory_mib", &card.id)),
                });
            }
            if card.storage {
                let free_gib = (card.storage_bytes / GIB).saturating_sub(tx.sum::<Volume>("gib", &card.id));
                room.shelves.push(Shelf { card_id: card.id.clone(), zone: card.zone.clone(), free_gib });
            }
        }
        room
    }

    /// Room made of these, for whoever plans without a world.
    pub fn new(hosts: Vec<Host>, shelves: Vec<Shelf>) -> Self {
        Self { hosts, shelves }
    }

    /// How many instances of this demand a zone can take.
    pub fn instances(&self, zone: &str, demand: Demand) -> u64 {
        let fit = |host: &Host| {
            let by_cores = host.free_vcpus.checked_div(demand.vcpus).map_or(u64::MAX, u64::from);
            by_cores.min(host.free_memory_mib.checked_div(demand.memory_mib).unwrap_or(u64::MAX))
        };
        self.hosts.iter().filter(|host| host.zone == zone).map(fit).fold(0, u64::saturating_add)
    }

    /// Takes the host of the zone with the most free cores, then memory, so that load spreads; none when no host fits.
    pub fn claim_instance(&mut self, zone: &str, demand: Demand) -> Option<Placement> {
        let fits = |host: &&mut Host| host.zone == zone && demand.vcpus <= host.free_vcpus && demand.memory_mib <= host.free_memory_mib;
        let rank = |host: &&mut Host| (host.free_vcpus, host.free_memory_mib, std::cmp::Reverse(host.card_id.clone()));
        let host = self.hosts.iter_mut().filter(fits).max_by_key(rank)?;
        host.free_vcpus -= demand.vcpus;
        host.free_memory_mib -= demand.memory_mib;
        Some(Placement { card_id: host.card_id.clone(), vcpus: demand.vcpus, memory_mib: demand.memory_mib })
    }

    /// Takes the shelf of the zone with the most free space; none when no shelf fits.
    pub fn claim_volume(&mut self, zone: &str, gib: u64) -> Option<String> {
        let fits = |shelf: &&mut Shelf| shelf.zone == zone && gib <= shelf.free_gib;
        let rank = |shelf: &&mut Shelf| (shelf.free_gib, std::cmp::Reverse(shelf.card_id.clone()));
        let shelf = self.shelves.iter_mut().filter(fits).max_by_key(rank)?;
        shelf.free_gib -= gib;
        Some(shelf.card_id.clone())
    }
}

/// The card of a zone that takes the next NAT gateway: a compute card that is watched, the one with the fewest gateways. Its host is
/// not needed.
pub fn gateway_card(tx: &Tx<'_>, zone: &str) -> Option<String> {
    let cards = tx.all::<Card>().filter(|card| card.watched && card.compute && card.zone == zone);
    cards.min_by_key(|card| (tx.sum::<NatGateway>("gateways", &card.id), card.id.clone())).map(|card| card.id.clone())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn host(name: &str, zone: &str, free_vcpus: u32, free_memory_mib: u64) -> Host {
        Host { card_id: name.into(), zone: zone.into(), free_vcpus, free_memory_mib }
    }

    #[test]
    fn load_spreads_over_the_hosts_of_the_zone_only() {
        let mut room = Room::new(vec![host("a1", "a", 4, 8192), host("a2", "a", 4, 8192), host("b1", "b", 64, 65536)], vec![]);
        let demand = Demand { vcpus: 2, memory_mib: 2048 };
        assert_eq!(room.instances("a", demand), 4);
        let cards: Vec<_> = std::iter::from_fn(|| room.claim_instance("a", demand)).map(|claim| claim.card_id).collect();
        assert_eq!(cards, ["a1", "a2", "a1", "a2"]);
    }

    #[test]
    fn memory_bounds_as_cores_do() {
        let mut room = Room::new(vec![host("a1", "a", 64, 1024)], vec![]);
        assert!(room.claim_instance("a", Demand { vcpus: 1, memory_mib: 1025 }).is_none());
        assert!(room.claim_instance("a", Demand { vcpus: 1, memory_mib: 1024 }).is_some());
        assert_eq!(room.instances("a", Demand { vcpus: 1, memory_mib: 1 }), 0);
    }

    #[test]
    fn a_volume_goes_to_the_emptiest_shelf_of_its_zone() {
        let shelf = |name: &str, zone: &str, free_gib| Shelf { card_id: name.into(), zone: zone.into(), free_gib };
        let mut room = Room::new(vec![], vec![shelf("a1", "a", 10), shelf("a2", "a", 20), shelf("b1", "b", 90)]);
        assert_eq!(room.claim_volume("a", 8).as_deref(), Some("a2"));
        assert_eq!(room.claim_volume("a", 12).as_deref(), Some("a2"));
        assert_eq!(room.claim_volume("a", 11), None);
        assert_eq!(room.claim_volume("a", 10).as_deref(), Some("a1"));
    }

    proptest! {
        #[test]
        fn no_host_is_ever_given_more_than_it_has(
            hosts in proptest::collection::vec((0u32..32, 0u64..65536, 0usize..3), 0..6),
            demands in proptest::collection::vec((1u32..9, 1u64..16384, 0usize..3), 0..64),
        ) {
            let zones = ["a", "b", "c"];
            let hosts: Vec<Host> = hosts.iter().enumerate().map(|(n, (cores, memory, zone))| host(&format!("h{n}"), zones[*zone], *cores, *memory)).collect();
            let mut room = Room::new(hosts.clone(), vec![]);
            let mut used = std::collections::BTreeMap::<String, (u32, u64)>::new();
            for (vcpus, memory_mib, zone) in demands {
                let demand = Demand { vcpus, memory_mib };
                let possible = room.instances(zones[zone], demand);
                match room.claim_instance(zones[zone], demand) {
                    Some(claim) => {
                        prop_assert!(0 < possible);
                        let entry = used.entry(claim.card_id).or_default();
                        *entry = (entry.0 + vcpus, entry.1 + memory_mib);
                    }
                    None => prop_assert_eq!(possible, 0),
                }
            }
            for host in hosts {
                let (vcpus, memory) = used.get(&host.card_id).copied().unwrap_or_default();
                prop_assert!(vcpus <= host.free_vcpus && memory <= host.free_memory_mib);
            }
        }
    }
}
