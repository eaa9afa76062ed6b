//! Which granules of a clone are its own: the marks, their files, and how they cut a request into pieces.

use super::Mapper;
use crate::io::FileId;
use std::ops::Range;

/// Bytes of a granule.
pub(crate) const GRANULE: u64 = 64 * 1024;
/// Bytes of a map file before its marks.
pub(crate) const MAP_HEADER: u64 = 4096;
/// Marks are written in sectors of this many bytes.
pub(super) const MAP_SECTOR: u64 = 512;
const MAP_MAGIC: &[u8; 8] = b"CARDMAP1";

/// The image that a volume is a clone of, and the maps of what is its own.
#[derive(Debug)]
pub(crate) struct CloneFiles {
    pub image: FileId,
    pub image_bytes: u64,
    pub present: FileId,
    pub durable: FileId,
    /// The marks in `present`.
    pub marks: Vec<u8>,
    /// The marks in `durable`.
    pub durable_marks: Vec<u8>,
}

/// A clone while it is served.
#[derive(Debug)]
pub(super) struct CloneState {
    pub files: CloneFiles,
    /// Marks that are in `present`, or on their way.
    pub staged: Vec<u8>,
    /// Granules that became present since the last flush began.
    pub fresh: Vec<Range<u64>>,
    /// Whether `durable` may hold marks that are only in the page cache: an earlier process may have died
    /// between writing and syncing them.
    pub durable_unsynced: bool,
    pub locks: Vec<Range<u64>>,
    pub mapper: Mapper,
}

/// Where bytes are read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Data,
    Image,
    /// Behind the end of the image: zeros.
    Nothing,
}

/// What a range that is to be written begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece {
    /// Present granules only: written in place.
    Own { end: u64 },
    /// Granules that are not present and are overwritten whole.
    Whole { end: u64 },
    /// A part of a granule that is not present.
    Partial { end: u64 },
}

impl CloneState {
    /// Granules behind the image have nothing to copy: the volume's own file has been theirs from the start.
    pub fn is_present(&self, granule: u64) -> bool {
        granule >= self.files.image_bytes.div_ceil(GRANULE) || has_mark(&self.files.marks, granule)
    }

    /// The end of the run of granules from `position` on that are alike, at most `end`.
    fn run_end(&self, position: u64, end: u64, present: bool) -> u64 {
        let image_granules = self.files.image_bytes.div_ceil(GRANULE);
        let mut granule = position / GRANULE + 1;
        while granule * GRANULE < end && self.is_present(granule) == present {
            if granule >= image_granules {
                return end;
            }
            granule += 1;
        }
        end.min(granule * GRANULE)
    }

    pub fn source(&self, position: u64, end: u64) -> (Source, u64) {
        if self.is_present(position / GRANULE) {
            return (Source::Data, self.run_end(position, end, true));
        }
        let end = self.run_end(position, end, false);
        if position < self.files.image_bytes { (Source::Image, end.min(self.files.image_bytes)) } else { (Source::Nothing, end) }
    }

    /// `whole`: data is written, which goes in one piece.
    pub fn piece(&self, position: u64, end: u64, size: u64, whole: bool) -> Piece {
        let granule_end = ((position / GRANULE + 1) * GRANULE).min(size);
        if self.is_present(position / GRANULE) {
            let own = self.run_end(position, end, true);
            if own == end || !whole { Piece::Own { end: own } } else { Piece::Partial { end } }
        } else if whole {
            Piece::Partial { end }
        } else if !position.is_multiple_of(GRANULE) || end < granule_end {
            Piece::Partial { end: end.min(granule_end) }
        } else {
            let run = self.run_end(position, end, false);
            let aligned = if run == size { run } else { run - run % GRANULE };
            Piece::Whole { end: aligned }
        }
    }
}

/// The granules that a range touches.
pub(super) fn granules(start: u64, end: u64) -> Range<u64> {
    start / GRANULE..end.div_ceil(GRANULE)
}

pub(super) fn has_mark(marks: &[u8], granule: u64) -> bool {
    marks.get(crate::bytes::narrow(granule / 8)).is_some_and(|byte| byte & 1 << (granule % 8) != 0)
}

/// Sets a mark; true when it was not set.
pub(super) fn set_mark(marks: &mut [u8], granule: u64) -> bool {
    let Some(byte) = marks.get_mut(crate::bytes::narrow(granule / 8)) else { return false };
    let before = *byte;
    *byte |= 1 << (granule % 8);
    before != *byte
}

pub(super) fn map_sector(marks: &[u8], sector: u64) -> Vec<u8> {
    let start = crate::bytes::narrow(sector * MAP_SECTOR);
    let mut bytes: Vec<u8> = marks.iter().skip(start).take(crate::bytes::narrow(MAP_SECTOR)).copied().collect();
    bytes.resize(crate::bytes::narrow(MAP_SECTOR), 0);
    bytes
}

pub(super) fn unsynced_granules(files: &CloneFiles) -> Vec<Range<u64>> {
    let count = files.image_bytes.div_ceil(GRANULE);
    (0..count)
        .filter(|granule| has_mark(&files.marks, *granule) && !has_mark(&files.durable_marks, *granule))
        .map(|granule| granule..granule + 1)
        .collect()
}

/// How many marks are set.
#[cfg(test)]
pub(crate) fn count_marks(marks: &[u8]) -> u64 {
    marks.iter().map(|byte| u64::from(byte.count_ones())).sum()
}

/// Bytes of marks for an image of this length.
pub(crate) fn marks_len(image_bytes: u64) -> usize {
    crate::bytes::narrow(image_bytes.div_ceil(GRANULE).div_ceil(8))
}

/// A map file: magic, the boot of the machine that wrote it, marks from byte 4,096 on.
pub(crate) fn map_file(boot: [u8; 16], marks: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; crate::bytes::narrow(MAP_HEADER)];
    crate::bytes::put(&mut bytes, 0, MAP_MAGIC);
    crate::bytes::put(&mut bytes, 8, &boot);
    bytes.extend_from_slice(marks);
    bytes
}

/// The marks of both map files, `present` first, for a machine in boot `boot`.
///
/// `present` was only in the page cache: after another boot, or without a whole header, it is worth
/// nothing, and the answer's first map is a copy of `durable`, which has to be written in its place.
/// `None` when `durable` is no map.
pub(crate) fn read_maps(present: &[u8], durable: &[u8], boot: [u8; 16], len: usize) -> Option<(Vec<u8>, Vec<u8>)> {
    let marks = |file: &[u8]| {
        let mut marks = file.get(crate::bytes::narrow(MAP_HEADER)..).unwrap_or_default().to_vec();
        marks.resize(len, 0);
        marks
    };
    if !durable.starts_with(MAP_MAGIC) {
        return None;
    }
    let same_boot = present.starts_with(MAP_MAGIC) && crate::bytes::array_at::<16>(present, 8) == boot;
    let durable = marks(durable);
    Some((if same_boot { marks(present) } else { durable.clone() }, durable))
}
