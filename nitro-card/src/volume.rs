//! A volume on a card with the storage role.

use crate::object::Id;

/// A desired volume.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names say it
pub struct Volume {
    pub id: Id,
    pub generation: u64,
    pub spec: Spec,
}

/// All of a volume but its generation: what the engine is given.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Bytes, a multiple of 512.
    pub size_bytes: u64,
    /// Object key of the image that it is a clone of.
    pub image: Option<String>,
    /// The one initiator that may connect.
    pub initiator_nqn: Option<String>,
    /// Provisioned rate, 0: not limited.
    pub iops: u32,
    /// Provisioned rate in MiB/s, 0: not limited.
    pub throughput_mib_s: u32,
}

/// The NQN under which a volume is exported.
#[must_use]
pub fn nqn(id: &Id) -> String {
    format!("nqn.2026-11.cardinal:volume:{id}")
}
