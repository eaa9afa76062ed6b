//! The ledger of cores and pages: who owns which part of this server.
//!
//! A machine gets whole cores and whole 2 MiB pages or is refused; there is no
//! over-commit. A vCPU is a core here. Invariant, after every call: the cores
//! of all grants are disjoint and below `cores`, and the pages of all grants
//! sum to at most `pages`.

use std::collections::{BTreeMap, BTreeSet};

/// Bytes of a page of the ledger.
pub const PAGE_BYTES: u64 = 2 * 1024 * 1024;

/// Cores and pages of one server, and their owners.
#[derive(Debug)]
pub struct Ledger {
    cores: u32,
    pages: u64,
    grants: BTreeMap<String, Grant>,
}

/// What one machine owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Core numbers, ascending; vCPU i runs on the i-th.
    pub cores: Vec<u32>,
    /// Pages of [`PAGE_BYTES`].
    pub pages: u64,
}

/// Why a machine got nothing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages name the fields
pub enum Refusal {
    #[error("insufficient cores: {asked} asked for, {free} free")]
    Cores { asked: u32, free: u32 },
    #[error("insufficient memory: {asked} pages of 2 MiB asked for, {free} free")]
    Pages { asked: u64, free: u64 },
    #[error("insufficient: {id} owns cores already")]
    Owner { id: String },
}

impl Ledger {
    /// A server with `cores` cores and `memory_bytes` of memory, all free.
    #[must_use]
    pub fn new(cores: u32, memory_bytes: u64) -> Self {
        Self { cores, pages: memory_bytes / PAGE_BYTES, grants: BTreeMap::new() }
    }

    /// Gives `id` the lowest free cores and the pages, or nothing at all.
    ///
    /// # Errors
    /// A [`Refusal`] when they are not there, or `id` has a grant.
    pub fn grant(&mut self, id: &str, vcpus: u32, memory_bytes: u64) -> Result<Grant, Refusal> {
        if self.grants.contains_key(id) {
            return Err(Refusal::Owner { id: id.to_owned() });
        }
        let owned = self.owned();
        let free: Vec<u32> = (0..self.cores).filter(|core| !owned.contains(core)).collect();
        let cores = free.get(..vcpus as usize).ok_or(Refusal::Cores { asked: vcpus, free: self.cores_free() })?.to_vec();
        let pages = memory_bytes.div_ceil(PAGE_BYTES);
        if self.pages_free() < pages {
            return Err(Refusal::Pages { asked: pages, free: self.pages_free() });
        }
        let grant = Grant { cores, pages };
        self.grants.insert(id.to_owned(), grant.clone());
        Ok(grant)
    }

    /// Gives `id` the very cores that an earlier agent gave it.
    ///
    /// # Errors
    /// A [`Refusal`] when somebody else owns one, or the server has shrunk.
    pub fn restore(&mut self, id: &str, cores: &[u32], memory_bytes: u64) -> Result<(), Refusal> {
        if self.grants.contains_key(id) {
            return Err(Refusal::Owner { id: id.to_owned() });
        }
        let owned = self.owned();
        let distinct: BTreeSet<u32> = cores.iter().copied().collect();
        if distinct.iter().any(|core| self.cores <= *core || owned.contains(core)) || distinct.len() != cores.len() {
            return Err(Refusal::Cores { asked: u32::try_from(cores.len()).unwrap_or(u32::MAX), free: self.cores_free() });
        }
        let pages = memory_bytes.div_ceil(PAGE_BYTES);
        if self.pages_free() < pages {
            return Err(Refusal::Pages { asked: pages, free: self.pages_free() });
        }
        self.grants.insert(id.to_owned(), Grant { cores: cores.to_vec(), pages });
        Ok(())
    }

    /// Takes back what `id` owns, if anything.
    pub fn release(&mut self, id: &str) {
        self.grants.remove(id);
    }

    /// Cores in all.
    #[must_use]
    pub fn cores(&self) -> u32 {
        self.cores
    }

    /// Bytes in all.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }

    /// Cores that nobody owns.
    #[must_use]
    pub fn cores_free(&self) -> u32 {
        self.cores - u32::try_from(self.owned().len()).unwrap_or(self.cores)
    }

    /// Bytes that nobody owns.
    #[must_use]
    pub fn memory_free_bytes(&self) -> u64 {
        self.pages_free() * PAGE_BYTES
    }

    fn pages_free(&self) -> u64 {
        self.pages - self.grants.values().map(|grant| grant.pages).sum::<u64>()
    }

    fn owned(&self) -> BTreeSet<u32> {
        self.grants.values().flat_map(|grant| grant.cores.iter().copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_machine_that_does_not_fit_gets_nothing() {
        let mut ledger = Ledger::new(4, 8 * PAGE_BYTES);
        assert_eq!(ledger.grant("a", 3, 5 * PAGE_BYTES).unwrap(), Grant { cores: vec![0, 1, 2], pages: 5 });
        assert_eq!(ledger.grant("b", 2, PAGE_BYTES), Err(Refusal::Cores { asked: 2, free: 1 }));
        assert_eq!(ledger.grant("b", 1, 4 * PAGE_BYTES), Err(Refusal::Pages { asked: 4, free: 3 }));
        assert_eq!((ledger.cores_free(), ledger.memory_free_bytes()), (1, 3 * PAGE_BYTES));
        ledger.release("a");
        assert_eq!((ledger.cores_free(), ledger.memory_free_bytes()), (4, 8 * PAGE_BYTES));
    }

    #[test]
    fn part_of_a_page_is_a_page() {
        assert_eq!(Ledger::new(1, 3 * PAGE_BYTES).grant("a", 1, PAGE_BYTES + 1).unwrap().pages, 2);
    }

    #[test]
    fn an_adopted_machine_gets_its_own_cores_or_a_refusal() {
        let mut ledger = Ledger::new(4, 8 * PAGE_BYTES);
        ledger.restore("a", &[2, 3], PAGE_BYTES).unwrap();
        assert!(ledger.restore("b", &[3], PAGE_BYTES).is_err());
        assert!(ledger.restore("b", &[4], PAGE_BYTES).is_err());
        assert!(ledger.restore("b", &[0, 0], PAGE_BYTES).is_err());
        assert_eq!(ledger.grant("b", 2, PAGE_BYTES).unwrap().cores, [0, 1]);
    }

    #[derive(Clone, Debug)]
    enum Operation {
        Grant(u8, u32, u64),
        Restore(u8, Vec<u32>, u64),
        Release(u8),
    }

    fn operation() -> impl Strategy<Value = Operation> {
        let bytes = prop_oneof![0..20 * PAGE_BYTES, any::<u64>()];
        prop_oneof![
            (0..6_u8, 0..10_u32, bytes.clone()).prop_map(|(id, cores, bytes)| Operation::Grant(id, cores, bytes)),
            (0..6_u8, proptest::collection::vec(0..12_u32, 0..4), bytes)
                .prop_map(|(id, cores, bytes)| Operation::Restore(id, cores, bytes)),
            (0..6_u8).prop_map(Operation::Release),
        ]
    }

    proptest! {
        #[test]
        fn no_core_and_no_page_has_two_owners(operations in proptest::collection::vec(operation(), 1..80)) {
            let mut ledger = Ledger::new(8, 32 * PAGE_BYTES);
            for operation in operations {
                match operation {
                    Operation::Grant(id, vcpus, bytes) => {
                        let free = (ledger.cores_free(), ledger.memory_free_bytes());
                        match ledger.grant(&id.to_string(), vcpus, bytes) {
                            Ok(grant) => prop_assert_eq!(grant.cores.len(), vcpus as usize),
                            Err(_) => prop_assert_eq!(free, (ledger.cores_free(), ledger.memory_free_bytes())),
                        }
                    }
                    Operation::Restore(id, cores, bytes) => drop(ledger.restore(&id.to_string(), &cores, bytes)),
                    Operation::Release(id) => ledger.release(&id.to_string()),
                }
                let owned: Vec<u32> = ledger.grants.values().flat_map(|grant| grant.cores.clone()).collect();
                let distinct: BTreeSet<u32> = owned.iter().copied().collect();
                prop_assert_eq!(owned.len(), distinct.len());
                prop_assert!(distinct.iter().all(|core| *core < 8));
                prop_assert_eq!(ledger.cores_free() as usize, 8 - owned.len());
                prop_assert!(ledger.grants.values().map(|grant| grant.pages).sum::<u64>() <= 32);
            }
        }
    }
}
