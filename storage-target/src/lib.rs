//! Volumes over NVMe/TCP: the target that keeps them and the initiator that uses them.
//!
//! | module | what it is |
//! |---|---|
//! | [`Target`] | volumes, the port that serves them, management calls |
//! | `shard` | one thread: connections, commands, volumes, run to completion |
//! | `connection`, `controller` | one socket; what Connect makes, and its admin commands |
//! | `volume` | the block engine: clones of images, flushes, what survives which death |
//! | `ram` | the blocks of a volume in memory |
//! | `store`, `volume_type`, `qos`, `traffic`, `counters` | folders of volumes; limits of their types; numbers |
//! | `io` | io_uring files, plain files, and a simulated disk for tests |
//! | `pdu`, `nvme`, `identify`, `log_page` | the formats of the wire |
//! | [`Initiator`] | a volume as its card sees it: away at times, never lost |
//!
//! Threads own what they work on and no async runtime is needed. What decides (`volume`, `controller`, `qos`,
//! `connection`'s decoding) is told the time and does no system call of its own but on its socket.
//!
//! What a volume promises: an acknowledged write survives SIGKILL of the target at any moment; a flushed one
//! survives a power cut; one host at a time writes; after a failed flush nobody does.

mod buffers;
mod bytes;
mod connection;
mod controller;
mod counters;
mod identify;
mod initiator;
mod io;
mod log_page;
mod nvme;
mod pdu;
mod qos;
mod ram;
mod shard;
mod store;
mod target;
mod traffic;
mod volume;
mod volume_type;

pub use counters::Counters;
pub use initiator::{Command, CommandEnd, Initiator, InitiatorCounters, InitiatorSettings, Lba};
pub use nvme::{NvmeStatus, volume_nqn};
pub use pdu::Digests;
pub use target::{Access, Target, TargetError, TargetOptions, TargetSettings, VolumeSpec, VolumeStatus};
pub use volume_type::VolumeType;
