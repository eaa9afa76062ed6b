//! What a volume does I/O on.
//!
//! [`BlockDevice`] takes operations on files with buffers that it owns until they are done, so that no
//! buffer can be freed under the kernel. Operations of one batch may run and finish in any order: whoever
//! needs an order waits for one before giving the next.

#[cfg(test)]
pub(crate) mod mem;
pub(crate) mod sync;
pub(crate) mod uring;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// A file of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FileId(pub u32);

/// What to do with a file.
#[derive(Debug)]
pub(crate) enum Action {
    /// Fills `range` of the buffer. A file that ends before is an error: it was truncated behind our back.
    Read { buffer: Vec<u8>, range: Range<usize> },
    /// Writes `range` of the buffer, whole or not at all successful.
    Write { buffer: Vec<u8>, range: Range<usize> },
    /// Makes what was written before durable: fdatasync.
    Sync,
    /// Makes bytes read as zeros and gives their room back.
    Zero { len: u64 },
}

/// One operation.
#[derive(Debug)]
pub(crate) struct Operation {
    /// Returned in [`Finished`].
    pub token: u64,
    pub file: FileId,
    /// Where in the file, in bytes.
    pub offset: u64,
    pub action: Action,
}

/// An operation that ended.
#[derive(Debug)]
pub(crate) struct Finished {
    pub token: u64,
    pub result: io::Result<()>,
    /// The buffer that came with it; empty for operations without one.
    pub buffer: Vec<u8>,
}

/// Files that operations are done on, by batches.
pub(crate) trait BlockDevice {
    /// Takes an operation into the batch.
    fn submit(&mut self, operation: Operation);
    /// Starts the batch, without waiting for it.
    fn kick(&mut self);
    /// Appends what has ended since the last call.
    fn reap(&mut self, finished: &mut Vec<Finished>);
}

/// A device over files of the file system.
pub(crate) trait FileDevice: BlockDevice + Send {
    /// Takes a file in.
    fn attach(&mut self, file: File) -> FileId;
    /// Gives a file back when nothing is under way on it.
    fn detach(&mut self, file: FileId);
    /// Readable when `reap` has something; `None` when `kick` does everything.
    fn wait_fd(&self) -> Option<BorrowedFd<'_>>;
}

/// The best device that this kernel offers: io_uring, or plain system calls where it is forbidden.
pub(crate) fn open() -> Box<dyn FileDevice> {
    match uring::UringDevice::new() {
        Ok(device) => Box::new(device),
        Err(error) => {
            tracing::warn!(%error, "no io_uring here; using plain reads and writes");
            Box::<sync::SyncDevice>::default()
        }
    }
}

/// The files of a device, by id.
#[derive(Debug, Default)]
struct Files(slab::Slab<File>);

impl Files {
    fn insert(&mut self, file: File) -> FileId {
        FileId(crate::bytes::narrow32(self.0.insert(file)))
    }

    fn get(&self, id: FileId) -> io::Result<&File> {
        usize::try_from(id.0).ok().and_then(|key| self.0.get(key)).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn remove(&mut self, id: FileId) {
        if let Ok(key) = usize::try_from(id.0) {
            self.0.try_remove(key);
        }
    }
}

/// fallocate: punches a hole without changing the length.
fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    Ok(fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)?)
}
