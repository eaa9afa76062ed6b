//! Tables of fixed size in memory of their own, zeroed by the kernel.
//!
//! It knows pages and nothing of what they hold. Pages that were never touched
//! cost nothing, so the bound of a table is no memory until it fills; elements
//! begin on a page, so one of 64 bytes is one cache line. Large tables ask for huge
//! pages: a random access then seldom misses the TLB.

#![allow(unsafe_code)]

use std::alloc::{Layout, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytemuck::Zeroable;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Tables from this size on ask for huge pages. Below it the TLB holds most of 4 KiB
/// pages, and an idle card touches few of them.
const HUGE_FROM: usize = 16 << 20;

/// A boxed slice of `T` on pages of its own.
pub(crate) struct Table<T> {
    start: NonNull<T>,
    len: usize,
}

// SAFETY: a table owns its elements and shares them with nobody, as a box does.
unsafe impl<T: Send> Send for Table<T> {}
// SAFETY: shared references to it give only shared references to its elements.
unsafe impl<T: Sync> Sync for Table<T> {}

impl<T: Zeroable + Copy> Table<T> {
    /// `len` zeroed elements. As for any collection, no memory ends the process.
    pub(crate) fn zeroed(len: usize) -> Self {
        let len = len.max(1);
        let Ok(layout) = Layout::array::<T>(len) else { handle_alloc_error(Layout::new::<T>()) };
        // SAFETY: without an address wished for, a new mapping overlaps nothing.
        let mapped =
            unsafe { mmap_anonymous(std::ptr::null_mut(), layout.size().max(1), ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE) };
        let Some(start) = mapped.ok().and_then(NonNull::new) else { handle_alloc_error(layout) };
        if layout.size() >= HUGE_FROM {
            // A kernel without huge pages refuses, and small ones do.
            // SAFETY: the range is the mapping just made; this advice changes no content.
            let _ = unsafe { madvise(start.as_ptr(), layout.size(), Advice::LinuxHugepage) };
        }
        Self { start: start.cast(), len }
    }
}

impl<T> Deref for Table<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: `start` is the page-aligned start of a private mapping that holds
        // `len` elements and lives as long as `self`; zero bytes are a `T`, as its
        // `Zeroable` says, and nothing but a `T` was written since.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Table<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` is the only way to the mapping.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T> Drop for Table<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and of this length, `T` is `Copy` and has no
        // destructor to run, and no reference outlives `self`.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), (self.len * size_of::<T>()).max(1)) };
    }
}

impl<T> std::fmt::Debug for Table<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_zero_and_aligned_and_keep_what_is_written() {
        for len in [1, 1000, HUGE_FROM / 8] {
            let mut table: Table<u64> = Table::zeroed(len);
            assert_eq!(table.len(), len);
            assert_eq!(table.as_ptr() as usize % 4096, 0);
            assert!(table.iter().all(|element| *element == 0));
            table[len - 1] = 7;
            assert_eq!(table[len - 1], 7);
        }
    }
}
