//! The blocks of a volume in memory: for measuring, and for data that may be gone tomorrow.
//!
//! Chunks of 4 MiB, mapped when they are first written; what was never written, or was given back, takes no
//! memory and reads as zeros. Chunks ask for huge pages: random blocks of a large volume would otherwise cost
//! a walk of the page tables each, in a virtual machine a nested one. Knows offsets and bytes, and nothing of
//! commands, hosts or sockets.

use crate::volume::{Completion, Request, VolumeError};
use memmap2::{Advice, MmapMut};
use std::io;

/// Bytes of a chunk.
const CHUNK: usize = 4 << 20;

/// Of each so many bytes one is touched: the processor fetches what lies behind by itself.
const TOUCHED: usize = 512;

/// What a chunk without memory reads as.
static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// The volume.
#[derive(Debug)]
pub(crate) struct Ram {
    size: u64,
    chunks: Vec<Option<MmapMut>>,
}

impl Ram {
    /// A volume of `size` bytes, all zeros.
    pub fn new(size: u64) -> Self {
        let mut ram = Self { size: 0, chunks: Vec::new() };
        ram.grow(size);
        ram
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    /// Makes it larger; it never shrinks.
    pub fn grow(&mut self, size: u64) {
        self.size = self.size.max(size);
        self.chunks.resize_with(crate::bytes::narrow(self.size.div_ceil(crate::bytes::wide(CHUNK))), || None);
    }

    /// Bytes of memory that its blocks take.
    pub fn allocated(&self) -> u64 {
        crate::bytes::wide(self.chunks.iter().flatten().count() * CHUNK)
    }

    /// The bytes from `offset` to the end of their chunk, at most `len`.
    pub fn slice(&self, offset: u64, len: usize) -> &[u8] {
        let (chunk, at) = place(offset);
        let bytes = match self.chunks.get(chunk) {
            Some(Some(bytes)) => bytes,
            _ => &ZEROS[..],
        };
        let end = at.saturating_add(len).min(CHUNK);
        bytes.get(at..end).unwrap_or_default()
    }

    /// Fills `into` from `offset` on; the caller has checked the range.
    pub fn read(&self, mut offset: u64, mut into: &mut [u8]) {
        while !into.is_empty() {
            let from = self.slice(offset, into.len());
            let Some((part, rest)) = into.split_at_mut_checked(from.len()) else { return };
            part.copy_from_slice(from);
            offset += crate::bytes::wide(from.len());
            into = rest;
        }
    }

    /// Writes `from` at `offset`; the caller has checked the range.
    ///
    /// # Errors
    /// When the machine has no memory left for it.
    pub fn write(&mut self, mut offset: u64, mut from: &[u8]) -> io::Result<()> {
        while !from.is_empty() {
            let (chunk, at) = place(offset);
            let (part, rest) = from.split_at(from.len().min(CHUNK - at));
            let Some(slot) = self.chunks.get_mut(chunk) else { return Err(io::ErrorKind::InvalidInput.into()) };
            let bytes = match slot {
                Some(bytes) => bytes,
                None => slot.insert(new_chunk()?),
            };
            crate::bytes::put(bytes, at, part);
            offset += crate::bytes::wide(part.len());
            from = rest;
        }
        Ok(())
    }

    /// Looks at every block of a range, so that all of them are on their way into the cache at once and not
    /// one after the other when the kernel copies them.
    pub fn touch(&self, offset: u64, len: usize) -> u8 {
        self.slice(offset, len).iter().step_by(TOUCHED).fold(0, |sum, byte| sum ^ byte)
    }

    /// Makes a range read as zeros, and gives whole chunks back.
    pub fn zero(&mut self, mut offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        while offset < end {
            let (chunk, at) = place(offset);
            let count = (CHUNK - at).min(crate::bytes::narrow(end - offset));
            let Some(slot) = self.chunks.get_mut(chunk) else { return };
            match slot {
                Some(_) if at == 0 && (count == CHUNK || offset + crate::bytes::wide(count) == self.size) => *slot = None,
                Some(bytes) => {
                    if let Some(part) = bytes.get_mut(at..at + count) {
                        part.fill(0);
                    }
                }
                None => {}
            }
            offset += crate::bytes::wide(count);
        }
    }

    /// Does a request at once.
    pub fn execute(&mut self, tag: u64, request: Request) -> Completion {
        let (offset, len) = match &request {
            Request::Read { offset, len, .. }
            | Request::Write { offset, len, .. }
            | Request::Zeroes { offset, len, .. }
            | Request::Discard { offset, len } => (*offset, *len),
            Request::Flush => (0, 0),
        };
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.size);
        let outside = || VolumeError::OutOfRange { offset, len, size: self.size };
        let mut result = if fits { Ok(()) } else { Err(outside()) };
        let count = crate::bytes::narrow(len);
        let buffer = match request {
            Request::Read { mut buffer, .. } => {
                if let (true, Some(into)) = (fits, buffer.get_mut(..count)) {
                    self.read(offset, into);
                }
                buffer
            }
            Request::Write { buffer, .. } => {
                if let (true, Some(from)) = (fits, buffer.get(..count)) {
                    result = self.write(offset, from).map_err(VolumeError::Write);
                }
                buffer
            }
            Request::Zeroes { .. } | Request::Discard { .. } => {
                if fits {
                    self.zero(offset, len);
                }
                Vec::new()
            }
            Request::Flush => Vec::new(),
        };
        Completion { tag, result, buffer }
    }
}

/// Memory of zeros for one chunk.
fn new_chunk() -> io::Result<MmapMut> {
    let chunk = MmapMut::map_anon(CHUNK)?;
    // Refused by kernels that have no huge pages: then it is slower, and otherwise the same.
    let _ = chunk.advise(Advice::HugePage);
    Ok(chunk)
}

/// The chunk of an offset, and where in it.
fn place(offset: u64) -> (usize, usize) {
    let chunk = crate::bytes::wide(CHUNK);
    (crate::bytes::narrow(offset / chunk), crate::bytes::narrow(offset % chunk))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::mem::Chance;

    #[test]
    fn it_reads_what_a_plain_array_would() {
        let size = 5 * CHUNK + 4096;
        let (mut ram, mut model) = (Ram::new(size as u64), vec![0_u8; size]);
        let mut chance = Chance::new(4);
        for round in 0..100_u8 {
            let start = chance.index(size);
            let len = chance.index((size - start).min(3 * CHUNK)).max(1);
            let range = start..start + len;
            match chance.below(3) {
                0 => {
                    ram.write(start as u64, &vec![round | 1; len]).unwrap();
                    model[range].fill(round | 1);
                }
                1 => {
                    ram.zero(start as u64, len as u64);
                    model[range].fill(0);
                }
                _ => {
                    let mut read = vec![0xee; len];
                    ram.read(start as u64, &mut read);
                    assert!(read == model[range]);
                }
            }
        }
        ram.zero(0, size as u64);
        assert_eq!(ram.allocated(), 0);
    }

    #[test]
    fn requests_beyond_the_end_are_refused_and_growing_lets_them_pass() {
        let mut ram = Ram::new(4096);
        let write = || Request::Write { offset: 4096, len: 512, buffer: vec![7; 512], fua: false };
        assert!(matches!(ram.execute(1, write()).result, Err(VolumeError::OutOfRange { .. })));
        ram.grow(8192);
        ram.execute(2, write()).result.unwrap();
        let read = ram.execute(3, Request::Read { offset: 4096, len: 1024, buffer: vec![1; 2048] });
        assert_eq!((&read.buffer[..512], &read.buffer[512..1024]), (&[7; 512][..], &[0; 512][..]));
    }
}
