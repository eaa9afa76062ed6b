//! A volume: a sparse file, and for a clone of an image a map of the blocks that are its own.
//!
//! A clone copies nothing when it is made. Its address space is cut into granules of 64 KiB; a granule that
//! is not *present* reads from the image. The first write into one writes the whole granule (image bytes
//! around the new ones) to the volume's own file, then marks it present.
//!
//! Two maps hold the marks, because a process and a machine die differently:
//!
//! | file | a mark is written | believed |
//! |---|---|---|
//! | `present` | when the granule's data is in the page cache, before the write is acknowledged | after SIGKILL: the same boot of the machine |
//! | `durable` | by a flush, when the granule's data is on the disk | after a power cut: another boot |
//!
//! With one map only, a power cut could keep a mark and lose the data under it, and then sectors that
//! nobody ever wrote would lose the image's content. The order of a flush is therefore: fdatasync of the
//! data, marks into `durable`, fdatasync of `durable`, acknowledgement.
//!
//! Invariants:
//! - A write is acknowledged when its data and its marks are in the page cache; a flush when all that was
//!   acknowledged before it came is on the disk. After a failed fdatasync the kernel has forgotten which
//!   pages were dirty, so the volume takes no more writes and no more flushes, for ever.
//! - Marks are set, never cleared, so a torn map sector holds a mix of two true states.
//! - While a granule is being copied, its range is locked: other writes into it wait.
//!
//! This is a state machine over [`BlockDevice`]: no clock, no thread, no file name.

use crate::io::{Action, BlockDevice, FileId, Finished, Operation};
mod map;

pub(crate) use map::*;
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

/// Why a volume refused or failed a request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    /// Answered with NVMe status 80h, LBA Out of Range.
    #[error("bytes {offset}+{len} leave a volume of {size} bytes")]
    OutOfRange { offset: u64, len: u64, size: u64 },
    /// The volume has failed before: it is read-only from then on.
    #[error("an earlier flush of the volume failed")]
    Failed,
    #[error("reading the volume")]
    Read(#[source] io::Error),
    #[error("writing the volume")]
    Write(#[source] io::Error),
    /// The flush that makes the volume fail.
    #[error("flushing the volume")]
    Flush(#[source] io::Error),
}

/// What a volume is asked for. Offsets and lengths are bytes.
#[derive(Debug)]
pub(crate) enum Request {
    /// Fills the first `len` bytes of the buffer.
    Read { offset: u64, len: u64, buffer: Vec<u8> },
    /// Writes the first `len` bytes of the buffer.
    Write { offset: u64, len: u64, buffer: Vec<u8>, fua: bool },
    /// Makes the range read as zeros.
    Zeroes { offset: u64, len: u64, fua: bool },
    /// Gives room back where whole granules allow it; what is given back reads as zeros.
    Discard { offset: u64, len: u64 },
    /// Makes all that was acknowledged before durable.
    Flush,
}

/// A request that ended.
#[derive(Debug)]
pub(crate) struct Completion {
    /// What the caller gave with the request.
    pub tag: u64,
    pub result: Result<(), VolumeError>,
    /// The request's buffer.
    pub buffer: Vec<u8>,
}

/// The volume.
#[derive(Debug)]
pub(crate) struct Volume {
    /// Goes into the upper half of its operations' tokens.
    key: u32,
    size: u64,
    data: FileId,
    clone: Option<CloneState>,
    requests: slab::Slab<InFlight>,
    /// Requests that wait for a lock, in order.
    waiting: Vec<usize>,
    flusher: Flusher,
    /// Something was written since the last flush began.
    dirty: bool,
    failed: bool,
    done: Vec<Completion>,
}

/// Writes marks to `present`: one write at a time, so that an older one cannot land on a newer.
#[derive(Debug, Default)]
struct Mapper {
    busy: bool,
    sectors: BTreeSet<u64>,
    /// Requests whose marks are in the sectors being written.
    writing: Vec<usize>,
    /// Requests whose marks go with the next round.
    next: Vec<usize>,
    next_sectors: BTreeSet<u64>,
    error: Option<io::ErrorKind>,
}

/// One fdatasync answers all flushes that waited for it.
#[derive(Debug, Default)]
struct Flusher {
    busy: bool,
    current: Vec<usize>,
    next: Vec<usize>,
    /// Granules that the running flush makes durable.
    granules: Vec<Range<u64>>,
    sectors: BTreeSet<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Zeroes,
    Discard,
    Flush,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// A run of the range is read or written.
    Run,
    /// Image bytes before the new ones are read.
    Head,
    /// Image bytes behind the new ones are read.
    Tail,
    /// Copied granules are written.
    Copy,
    /// Holes are punched under whole granules that are not present yet.
    Punch,
}

#[derive(Debug)]
struct InFlight {
    tag: u64,
    kind: Kind,
    start: u64,
    end: u64,
    /// All before it is done.
    position: u64,
    /// Where the step under way ends.
    piece_end: u64,
    step: Step,
    buffer: Vec<u8>,
    fua: bool,
    /// Granule-aligned copy being made, and where it begins.
    copy: Vec<u8>,
    copy_start: u64,
    lock: Option<Range<u64>>,
}

const MAPPER: u32 = u32::MAX;
const FLUSH_DATA: u32 = u32::MAX - 1;
const FLUSH_MARKS: u32 = u32::MAX - 2;
const FLUSH_MAP: u32 = u32::MAX - 3;

impl Volume {
    /// A volume of `size` bytes (a multiple of 512) over its files.
    pub fn new(key: u32, size: u64, data: FileId, clone: Option<CloneFiles>, failed: bool) -> Self {
        let clone = clone.map(|files| CloneState {
            staged: files.marks.clone(),
            fresh: unsynced_granules(&files),
            durable_unsynced: true,
            locks: Vec::new(),
            mapper: Mapper::default(),
            files,
        });
        // Another process may have written before it died, so the first flush is never skipped.
        Self {
            key,
            size,
            data,
            clone,
            requests: slab::Slab::new(),
            waiting: Vec::new(),
            flusher: Flusher::default(),
            dirty: true,
            failed,
            done: Vec::new(),
        }
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file behind it has grown.
    pub fn grow(&mut self, size: u64) {
        self.size = self.size.max(size);
    }

    /// After a failed flush.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty() && !self.flusher.busy && self.clone.as_ref().is_none_or(|clone| !clone.mapper.busy)
    }

    /// The files to give back when the volume goes.
    pub fn files(&self) -> Vec<FileId> {
        let mut files = vec![self.data];
        if let Some(clone) = &self.clone {
            files.extend([clone.files.image, clone.files.present, clone.files.durable]);
        }
        files
    }

    /// Starts a request; its end comes out of [`Volume::finished`] with the tag.
    pub fn submit(&mut self, device: &mut dyn BlockDevice, tag: u64, request: Request) {
        let (kind, offset, len, buffer, fua) = match request {
            Request::Read { offset, len, buffer } => (Kind::Read, offset, len, buffer, false),
            Request::Write { offset, len, buffer, fua } => (Kind::Write, offset, len, buffer, fua),
            Request::Zeroes { offset, len, fua } => (Kind::Zeroes, offset, len, Vec::new(), fua),
            Request::Discard { offset, len } => (Kind::Discard, offset, len, Vec::new(), false),
            Request::Flush => (Kind::Flush, 0, 0, Vec::new(), true),
        };
        if self.failed && kind != Kind::Read {
            self.done.push(Completion { tag, result: Err(VolumeError::Failed), buffer });
            return;
        }
        let Some(end) = offset.checked_add(len).filter(|end| *end <= self.size) else {
            let result = Err(VolumeError::OutOfRange { offset, len, size: self.size });
            self.done.push(Completion { tag, result, buffer });
            return;
        };
        let index = self.requests.insert(InFlight {
            tag,
            kind,
            start: offset,
            end,
            position: offset,
            piece_end: offset,
            step: Step::Run,
            buffer,
            fua,
            copy: Vec::new(),
            copy_start: 0,
            lock: None,
        });
        self.advance(device, index);
    }

    /// Takes the end of one of the volume's operations; the token's lower half says which.
    pub fn complete(&mut self, device: &mut dyn BlockDevice, finished: Finished) {
        let Finished { token, result, buffer } = finished;
        let index = u32::try_from(token & 0xffff_ffff).unwrap_or(u32::MAX);
        match index {
            MAPPER => self.mapper_continue(device, result.err().map(|error| error.kind())),
            FLUSH_DATA => self.flush_data_done(device, result),
            FLUSH_MARKS => self.flush_marks_continue(device, result),
            FLUSH_MAP => self.flush_end(device, result),
            _ => self.request_continue(device, crate::bytes::narrow(index.into()), result, buffer),
        }
    }

    /// What has ended since the last call.
    pub fn finished(&mut self) -> std::vec::Drain<'_, Completion> {
        self.done.drain(..)
    }

    fn token(&self, index: u32) -> u64 {
        u64::from(self.key) << 32 | u64::from(index)
    }

    fn request_token(&self, index: usize) -> u64 {
        self.token(crate::bytes::narrow32(index))
    }

    /// Starts the next step of a request.
    fn advance(&mut self, device: &mut dyn BlockDevice, index: usize) {
        let Some(request) = self.requests.get_mut(index) else { return };
        match request.kind {
            Kind::Flush => self.flush_join(device, index),
            _ if request.position >= request.end => {
                if request.fua {
                    self.flush_join(device, index);
                } else {
                    self.end(index, Ok(()));
                }
            }
            Kind::Read => self.advance_read(device, index),
            Kind::Write | Kind::Zeroes | Kind::Discard => self.advance_write(device, index),
        }
    }

    fn advance_read(&mut self, device: &mut dyn BlockDevice, index: usize) {
        let token = self.request_token(index);
        let Some(request) = self.requests.get_mut(index) else { return };
        while request.position < request.end {
            let (source, run_end) = match &self.clone {
                None => (Source::Data, request.end),
                Some(clone) => clone.source(request.position, request.end),
            };
            let range = offset_in(request.start, request.position)..offset_in(request.start, run_end);
            let file = match (source, &self.clone) {
                (Source::Image, Some(clone)) => clone.files.image,
                (Source::Nothing, _) => {
                    if let Some(part) = request.buffer.get_mut(range) {
                        part.fill(0);
                    }
                    request.position = run_end;
                    continue;
                }
                _ => self.data,
            };
            request.step = Step::Run;
            request.piece_end = run_end;
            let buffer = std::mem::take(&mut request.buffer);
            let action = Action::Read { buffer, range };
            device.submit(Operation { token, file, offset: request.position, action });
            return;
        }
        self.end(index, Ok(()));
    }

    fn advance_write(&mut self, device: &mut dyn BlockDevice, index: usize) {
        if self.failed {
            return self.end(index, Err(VolumeError::Failed));
        }
        self.dirty = true;
        let token = self.request_token(index);
        let Some(request) = self.requests.get_mut(index) else { return };
        let whole = request.kind == Kind::Write;
        let (mut step, mut lock) = (Step::Run, None);
        request.piece_end = request.end;
        if let Some(clone) = &mut self.clone {
            let piece = clone.piece(request.position, request.end, self.size, whole);
            if let Piece::Partial { end } = piece
                && request.kind == Kind::Discard
            {
                request.position = end;
                return self.advance(device, index);
            }
            (step, lock, request.piece_end) = match piece {
                Piece::Own { end } => (Step::Run, None, end),
                Piece::Whole { end } => (Step::Punch, Some(granules(request.position, end)), end),
                Piece::Partial { end } => (Step::Head, Some(granules(request.position, end)), end),
            };
            if let Some(range) = &lock {
                if clone.locks.iter().any(|held| held.start < range.end && range.start < held.end) {
                    self.waiting.push(index);
                    return;
                }
                clone.locks.push(range.clone());
            }
        }
        request.lock = lock;
        request.step = step;
        if step == Step::Head {
            return self.copy_begin(device, index);
        }
        let (offset, len) = (request.position, request.piece_end - request.position);
        let action = if whole {
            let buffer = std::mem::take(&mut request.buffer);
            Action::Write { buffer, range: offset_in(request.start, offset)..offset_in(request.start, request.piece_end) }
        } else {
            Action::Zero { len }
        };
        device.submit(Operation { token, file: self.data, offset, action });
    }

    /// Builds the granules around a piece: image bytes before and behind it, the new bytes in the middle.
    fn copy_begin(&mut self, device: &mut dyn BlockDevice, index: usize) {
        let token = self.request_token(index);
        let (Some(request), Some(clone)) = (self.requests.get_mut(index), &self.clone) else { return };
        let first = request.position / GRANULE;
        let last = (request.piece_end - 1) / GRANULE;
        let start = if clone.is_present(first) { request.position } else { first * GRANULE };
        let end = if clone.is_present(last) { request.piece_end } else { ((last + 1) * GRANULE).min(self.size) };
        request.copy_start = start;
        request.copy = vec![0; offset_in(start, end)];
        let from = offset_in(request.start, request.position)..offset_in(request.start, request.piece_end);
        let to = offset_in(start, request.position)..offset_in(start, request.piece_end);
        if let (Kind::Write, Some(to), Some(from)) = (request.kind, request.copy.get_mut(to), request.buffer.get(from)) {
            to.copy_from_slice(from);
        }
        let head = start..request.position.min(clone.files.image_bytes);
        if head.is_empty() {
            return self.copy_tail(device, index);
        }
        request.step = Step::Head;
        let range = 0..offset_in(start, head.end);
        let action = Action::Read { buffer: std::mem::take(&mut request.copy), range };
        device.submit(Operation { token, file: clone.files.image, offset: start, action });
    }

    fn copy_tail(&mut self, device: &mut dyn BlockDevice, index: usize) {
        let token = self.request_token(index);
        let (Some(request), Some(clone)) = (self.requests.get_mut(index), &self.clone) else { return };
        let end = request.copy_start + crate::bytes::wide(request.copy.len());
        let tail = request.piece_end..end.min(clone.files.image_bytes);
        if tail.is_empty() {
            return self.copy_write(device, index);
        }
        request.step = Step::Tail;
        let range = offset_in(request.copy_start, tail.start)..offset_in(request.copy_start, tail.end);
        let action = Action::Read { buffer: std::mem::take(&mut request.copy), range };
        device.submit(Operation { token, file: clone.files.image, offset: tail.start, action });
    }

    fn copy_write(&mut self, device: &mut dyn BlockDevice, index: usize) {
        let token = self.request_token(index);
        let Some(request) = self.requests.get_mut(index) else { return };
        request.step = Step::Copy;
        let buffer = std::mem::take(&mut request.copy);
        let range = 0..buffer.len();
        let action = Action::Write { buffer, range };
        device.submit(Operation { token, file: self.data, offset: request.copy_start, action });
    }

    fn request_continue(&mut self, device: &mut dyn BlockDevice, index: usize, result: io::Result<()>, buffer: Vec<u8>) {
        let Some(request) = self.requests.get_mut(index) else { return };
        let reads = request.kind == Kind::Read || matches!(request.step, Step::Head | Step::Tail);
        match request.step {
            Step::Run | Step::Punch if request.kind == Kind::Read || request.kind == Kind::Write => request.buffer = buffer,
            Step::Head | Step::Tail => request.copy = buffer,
            _ => {}
        }
        if let Err(error) = result {
            self.unlock(device, index);
            return self.end(index, Err(if reads { VolumeError::Read(error) } else { VolumeError::Write(error) }));
        }
        match request.step {
            Step::Head => self.copy_tail(device, index),
            Step::Tail => self.copy_write(device, index),
            Step::Copy | Step::Punch => self.mapper_join(device, index),
            Step::Run => {
                request.position = request.piece_end;
                self.advance(device, index);
            }
        }
    }

    /// Queues the marks of a request's granules for `present`.
    fn mapper_join(&mut self, device: &mut dyn BlockDevice, index: usize) {
        let (Some(request), Some(clone)) = (self.requests.get(index), &mut self.clone) else { return };
        for granule in request.lock.clone().unwrap_or_default() {
            if !has_mark(&clone.files.marks, granule) {
                set_mark(&mut clone.staged, granule);
                clone.mapper.next_sectors.insert(granule / (8 * MAP_SECTOR));
            }
        }
        clone.mapper.next.push(index);
        if !clone.mapper.busy {
            self.mapper_begin(device);
        }
    }

    fn mapper_begin(&mut self, device: &mut dyn BlockDevice) {
        let Some(clone) = &mut self.clone else { return };
        clone.mapper.writing = std::mem::take(&mut clone.mapper.next);
        clone.mapper.sectors = std::mem::take(&mut clone.mapper.next_sectors);
        clone.mapper.busy = !clone.mapper.writing.is_empty();
        if clone.mapper.busy {
            self.mapper_continue(device, None);
        }
    }

    fn mapper_continue(&mut self, device: &mut dyn BlockDevice, error: Option<io::ErrorKind>) {
        let token = self.token(MAPPER);
        let Some(clone) = &mut self.clone else { return };
        clone.mapper.error = clone.mapper.error.or(error);
        if let Some(sector) = clone.mapper.sectors.pop_first() {
            let buffer = map_sector(&clone.staged, sector);
            let range = 0..buffer.len();
            let offset = MAP_HEADER + sector * MAP_SECTOR;
            device.submit(Operation { token, file: clone.files.present, offset, action: Action::Write { buffer, range } });
            return;
        }
        let error = clone.mapper.error.take();
        for index in std::mem::take(&mut clone.mapper.writing) {
            self.mark_end(device, index, error);
        }
        self.mapper_begin(device);
    }

    /// A request's marks are in `present`.
    fn mark_end(&mut self, device: &mut dyn BlockDevice, index: usize, error: Option<io::ErrorKind>) {
        if let (Some(request), Some(clone), None) = (self.requests.get(index), &mut self.clone, error) {
            let range = request.lock.clone().unwrap_or_default();
            for granule in range.clone() {
                set_mark(&mut clone.files.marks, granule);
            }
            clone.fresh.push(range);
        }
        self.unlock(device, index);
        let Some(request) = self.requests.get_mut(index) else { return };
        match error {
            Some(kind) => self.end(index, Err(VolumeError::Write(kind.into()))),
            None => {
                request.position = request.piece_end;
                self.advance(device, index);
            }
        }
    }

    /// Lets go of a request's granules and starts again what waited, in order.
    fn unlock(&mut self, device: &mut dyn BlockDevice, index: usize) {
        let (Some(request), Some(clone)) = (self.requests.get_mut(index), &mut self.clone) else { return };
        let Some(range) = request.lock.take() else { return };
        clone.locks.retain(|held| *held != range);
        for waiter in std::mem::take(&mut self.waiting) {
            self.advance(device, waiter);
        }
    }

    fn flush_join(&mut self, device: &mut dyn BlockDevice, index: usize) {
        if self.failed {
            return self.end(index, Err(VolumeError::Failed));
        }
        self.flusher.next.push(index);
        if !self.flusher.busy {
            self.flush_begin(device);
        }
    }

    fn flush_begin(&mut self, device: &mut dyn BlockDevice) {
        self.flusher.current = std::mem::take(&mut self.flusher.next);
        if self.flusher.current.is_empty() {
            return;
        }
        let fresh = self.clone.as_mut().map(|clone| std::mem::take(&mut clone.fresh)).unwrap_or_default();
        if !self.dirty && fresh.is_empty() {
            for index in std::mem::take(&mut self.flusher.current) {
                self.end(index, Ok(()));
            }
            return;
        }
        self.dirty = self.requests.iter().any(|(_, request)| is_writing(request));
        self.flusher.busy = true;
        self.flusher.granules = fresh;
        let token = self.token(FLUSH_DATA);
        device.submit(Operation { token, file: self.data, offset: 0, action: Action::Sync });
    }

    fn flush_data_done(&mut self, device: &mut dyn BlockDevice, result: io::Result<()>) {
        let granules = std::mem::take(&mut self.flusher.granules);
        match (result, &mut self.clone) {
            (Ok(()), Some(clone)) if clone.durable_unsynced || !granules.is_empty() => {
                clone.durable_unsynced = true;
                for granule in granules.into_iter().flatten() {
                    if set_mark(&mut clone.files.durable_marks, granule) {
                        self.flusher.sectors.insert(granule / (8 * MAP_SECTOR));
                    }
                }
                self.flush_marks_continue(device, Ok(()));
            }
            (result, _) => self.flush_end(device, result),
        }
    }

    fn flush_marks_continue(&mut self, device: &mut dyn BlockDevice, result: io::Result<()>) {
        let (marks_token, map_token) = (self.token(FLUSH_MARKS), self.token(FLUSH_MAP));
        let Some(clone) = &self.clone else { return };
        if result.is_err() {
            return self.flush_end(device, result);
        }
        let file = clone.files.durable;
        let operation = match self.flusher.sectors.pop_first() {
            Some(sector) => {
                let buffer = map_sector(&clone.files.durable_marks, sector);
                let range = 0..buffer.len();
                let offset = MAP_HEADER + sector * MAP_SECTOR;
                Operation { token: marks_token, file, offset, action: Action::Write { buffer, range } }
            }
            None => Operation { token: map_token, file, offset: 0, action: Action::Sync },
        };
        device.submit(operation);
    }

    fn flush_end(&mut self, device: &mut dyn BlockDevice, result: io::Result<()>) {
        self.flusher.busy = false;
        let mut waiters = std::mem::take(&mut self.flusher.current);
        match result {
            Ok(()) => {
                if let Some(clone) = &mut self.clone {
                    clone.durable_unsynced = false;
                }
                for index in waiters {
                    self.end(index, Ok(()));
                }
                self.flush_begin(device);
            }
            Err(error) => {
                self.failed = true;
                waiters.append(&mut self.flusher.next);
                let mut error = Some(error);
                for index in waiters {
                    let cause = error.take().map_or(VolumeError::Failed, VolumeError::Flush);
                    self.end(index, Err(cause));
                }
            }
        }
    }

    fn end(&mut self, index: usize, result: Result<(), VolumeError>) {
        if let Some(request) = self.requests.try_remove(index) {
            self.done.push(Completion { tag: request.tag, result, buffer: request.buffer });
        }
    }
}

fn is_writing(request: &InFlight) -> bool {
    !matches!(request.kind, Kind::Read | Kind::Flush) && request.position < request.end
}

/// The distance from `base` as an index; ranges of one request are at most [`crate::nvme::MAX_TRANSFER`] long.
fn offset_in(base: u64, at: u64) -> usize {
    crate::bytes::narrow(at.saturating_sub(base))
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests;
