//! The memory of a link: a sealed memfd, mapped as words that two processes share.
//!
//! Invariant: the file is sealed against shrinking before it is mapped, so no
//! load faults, whatever the other process does. Every access is an atomic
//! load or store of a whole word: a peer that writes at the same time changes
//! values, never the soundness of this process.
#![allow(unsafe_code)]

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// A mapping of a whole sealed memfd.
pub(super) struct Memory {
    base: NonNull<c_void>,
    words: usize,
}

// SAFETY: the mapping belongs to no thread, and all access goes through atomics.
unsafe impl Send for Memory {}
// SAFETY: as above; `words` hands out shared references to atomics only.
unsafe impl Sync for Memory {}

/// Makes a zeroed memfd of `words` words whose size nobody can change.
pub(super) fn create(words: usize) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("mailbox", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, words as u64 * 8)?;
    rustix::fs::fcntl_add_seals(&fd, SEALS | SealFlags::SEAL)?;
    Ok(fd)
}

impl Memory {
    /// Maps `fd`, which must be a sealed memfd of exactly `words` words.
    pub(super) fn map(fd: impl AsFd, words: usize) -> io::Result<Self> {
        if !rustix::fs::fcntl_get_seals(&fd)?.contains(SEALS) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the mailbox memory is not sealed"));
        }
        if u64::try_from(rustix::fs::fstat(&fd)?.st_size) != Ok(words as u64 * 8) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the mailbox memory has another size"));
        }
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), words * 8, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &fd, 0) }?;
        let base = NonNull::new(base).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { base, words })
    }

    pub(super) fn words(&self) -> &[AtomicU64] {
        // SAFETY: `map` mapped `words` words, page-aligned, and sealed against
        // shrinking; they stay mapped until drop, which the borrow outlives not.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast::<AtomicU64>(), self.words) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this length, and no borrow of it is left.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr(), self.words * 8) };
        debug_assert!(unmapped.is_ok(), "a whole mapping can always be unmapped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_could_shrink_is_refused() {
        let fd = rustix::fs::memfd_create("open", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        assert!(Memory::map(&fd, 512).is_err());
        assert!(Memory::map(create(512).unwrap(), 511).is_err());
        assert_eq!(Memory::map(create(512).unwrap(), 512).unwrap().words().len(), 512);
    }
}
