//! A volume as its shard has it: where its blocks are, its limits, and what waits for it.

use super::*;

/// A volume and what stands before it.
pub(super) struct Served {
    pub(super) spec: VolumeSpec,
    pub(super) folder: PathBuf,
    pub(super) engine: Engine,
    pub(super) qos: Qos,
    /// Requests that the limits hold back, in order.
    pub(super) throttled: VecDeque<(u64, Request, Cost)>,
    /// Until when the waiting of `throttled` has been counted.
    pub(super) throttled_since: Duration,
    pub(super) traffic: Traffic,
    /// Bytes of it may wait for sockets: [`Connection::settle`] before it changes.
    pub(super) lends: bool,
    pub(super) failure_marked: bool,
    /// Waits for the requests of controllers that were cut.
    pub(super) drains: Vec<Drain>,
}

/// Where a volume's blocks are.
pub(super) enum Engine {
    File(Box<Volume>),
    Ram(Ram),
}

impl Engine {
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::File(volume) => volume.size(),
            Self::Ram(ram) => ram.size(),
        }
    }

    pub(super) fn grow(&mut self, size: u64) {
        match self {
            Self::File(volume) => volume.grow(size),
            Self::Ram(ram) => ram.grow(size),
        }
    }

    pub(super) fn has_failed(&self) -> bool {
        matches!(self, Self::File(volume) if volume.has_failed())
    }

    pub(super) fn is_idle(&self) -> bool {
        match self {
            Self::File(volume) => volume.is_idle(),
            Self::Ram(_) => true,
        }
    }

    /// Starts a request; what has ended by then is appended to `ended`.
    pub(super) fn submit(&mut self, device: &mut dyn FileDevice, tag: u64, request: Request, ended: &mut Vec<Completion>) {
        match self {
            Self::File(volume) => {
                volume.submit(device, tag, request);
                ended.extend(volume.finished());
            }
            Self::Ram(ram) => ended.push(ram.execute(tag, request)),
        }
    }
}

pub(super) enum Drain {
    Connect { connection: usize, slot: usize },
    Reply(Sender<()>),
    Remove(Sender<()>),
}
