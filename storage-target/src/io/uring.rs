//! Files over io_uring, and past it where nothing has to wait.
//!
//! What the page cache can do at once is done at once: a read asks for what is cached (RWF_NOWAIT), a small
//! write goes straight into the cache. That costs one short system call, where io_uring would hand a buffered
//! write to a worker thread and wake this one for it. From [`RING_READS`] reads on, one call for all of them costs
//! less than one each: the ring does what is cached while it is entered, too. Everything else (missing pages, large writes, syncs,
//! holes) is one `io_uring_enter` for the batch. A write can still wait, for throttled dirty pages; so one that took
//! longer than [`SLOW`] sends the writes of the next [`PENALTY`] through io_uring, and the shard goes on.
//!
//! Buffers live in `pending` from submission to completion, so the kernel
//! never holds a pointer into freed memory: dropping the device waits for everything that is under way.
#![allow(unsafe_code)]

use super::{Action, BlockDevice, FileDevice, FileId, Files, Finished, Operation};
use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::io::IoSliceMut;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Entries of the submission ring; a larger batch takes more than one call.
const ENTRIES: u32 = 256;

/// The longest write that goes straight into the page cache, in bytes.
const DIRECT: usize = 256 * 1024;
/// So many reads in one batch go into the ring together.
const RING_READS: usize = 4;
/// A write into the page cache that takes longer than this waited for the disk.
const SLOW: Duration = Duration::from_millis(10);
const PENALTY: Duration = Duration::from_millis(200);

/// The device.
pub(crate) struct UringDevice {
    ring: IoUring,
    batch: Vec<Operation>,
    /// Writes take the ring until then.
    penalty: Option<Instant>,
    event: OwnedFd,
    files: Files,
    /// What the kernel has; its slot is the user data of the entry.
    pending: slab::Slab<Pending>,
    /// Slots that wait for room in the ring.
    queue: VecDeque<usize>,
    /// What has ended and was not reaped.
    ended: Vec<Finished>,
}

struct Pending {
    operation: Operation,
    /// How many bytes of the range are done: the kernel may do less than asked.
    done: usize,
}

impl UringDevice {
    /// # Errors
    /// When the kernel has no io_uring, or a sandbox forbids it.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::builder().setup_cqsize(4 * ENTRIES).setup_coop_taskrun().build(ENTRIES)?;
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        // What ends while the ring is entered is reaped right after: nobody has to be woken for it.
        ring.submitter().register_eventfd_async(event.as_raw_fd())?;
        Ok(Self {
            ring,
            event,
            files: Files::default(),
            pending: slab::Slab::new(),
            queue: VecDeque::new(),
            ended: Vec::new(),
            batch: Vec::new(),
            penalty: None,
        })
    }

    /// Does an operation at once if nothing has to be waited for; if not, it goes into the ring.
    fn direct(&mut self, mut operation: Operation) {
        let Ok(file) = self.files.get(operation.file) else {
            return self.enqueue(operation, 0);
        };
        let mut done = 0;
        match &mut operation.action {
            Action::Read { buffer, range } => {
                let Some(into) = buffer.get_mut(range.clone()) else { return self.enqueue(operation, 0) };
                let len = into.len();
                let flags = rustix::io::ReadWriteFlags::NOWAIT;
                match rustix::io::preadv2(file, &mut [IoSliceMut::new(into)], operation.offset, flags) {
                    Ok(count) if count == len => {
                        let buffer = std::mem::take(buffer);
                        return self.ended.push(Finished { token: operation.token, result: Ok(()), buffer });
                    }
                    Ok(count) => done = count,
                    // A file system that cannot say, such as tmpfs: its writes go the same way.
                    Err(rustix::io::Errno::OPNOTSUPP) if self.writes_directly(len) => return self.run(operation),
                    Err(_) => {}
                }
            }
            Action::Write { range, .. } => {
                let len = range.len();
                if self.writes_directly(len) {
                    return self.run(operation);
                }
            }
            Action::Sync | Action::Zero { .. } => {}
        }
        self.enqueue(operation, done);
    }

    fn writes_directly(&self, len: usize) -> bool {
        len <= DIRECT && self.penalty.is_none()
    }

    fn run(&mut self, operation: Operation) {
        let Ok(file) = self.files.get(operation.file) else { return self.enqueue(operation, 0) };
        let start = Instant::now();
        let (result, buffer) = super::sync::run(file, operation.offset, operation.action);
        if start.elapsed() > SLOW {
            self.penalty = Some(start + PENALTY);
        }
        self.ended.push(Finished { token: operation.token, result, buffer });
    }

    fn enqueue(&mut self, operation: Operation, done: usize) {
        let slot = self.pending.insert(Pending { operation, done });
        self.queue.push_back(slot);
    }

    /// Moves slots from the queue into the ring and tells the kernel, as often as needed.
    fn flush(&mut self) {
        loop {
            while let Some(slot) = self.queue.front().copied() {
                let entry = match self.entry(slot) {
                    Ok(entry) => entry,
                    Err(error) => {
                        self.queue.pop_front();
                        self.finish(slot, Err(error));
                        continue;
                    }
                };
                // SAFETY: the buffer that the entry points into is owned by `pending` under this slot, is
                // neither moved nor freed nor borrowed before the completion with this user data is reaped,
                // and the file stays open as `detach` is only called when nothing is under way on it.
                let pushed = unsafe { self.ring.submission().push(&entry) };
                if pushed.is_err() {
                    break;
                }
                self.queue.pop_front();
            }
            match self.ring.submit() {
                Ok(_) if self.queue.is_empty() => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The completion ring is full: the next `reap` makes room and kicks again.
                Err(_) => return,
            }
        }
    }

    fn entry(&mut self, slot: usize) -> io::Result<squeue::Entry> {
        let pending = self.pending.get_mut(slot).ok_or(io::ErrorKind::NotFound)?;
        let fd = types::Fd(self.files.get(pending.operation.file)?.as_raw_fd());
        let offset = pending.operation.offset + crate::bytes::wide(pending.done);
        let done = pending.done;
        let entry = match &mut pending.operation.action {
            Action::Read { buffer, range } => {
                let part = buffer.get_mut(range.clone()).and_then(|part| part.get_mut(done..)).ok_or(io::ErrorKind::InvalidInput)?;
                opcode::Read::new(fd, part.as_mut_ptr(), crate::bytes::narrow32(part.len())).offset(offset).build()
            }
            Action::Write { buffer, range } => {
                let part = buffer.get(range.clone()).and_then(|part| part.get(done..)).ok_or(io::ErrorKind::InvalidInput)?;
                opcode::Write::new(fd, part.as_ptr(), crate::bytes::narrow32(part.len())).offset(offset).build()
            }
            Action::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Action::Zero { len } => {
                opcode::Fallocate::new(fd, *len).offset(offset).mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE).build()
            }
        };
        Ok(entry.user_data(crate::bytes::wide(slot)))
    }

    /// Takes the kernel's answer for a slot; true when the operation goes on with its rest.
    fn complete(&mut self, slot: usize, answer: i32) -> bool {
        let Some(pending) = self.pending.get_mut(slot) else { return false };
        let Ok(count) = usize::try_from(answer) else {
            let error = io::Error::from_raw_os_error(answer.saturating_neg());
            if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) {
                return true;
            }
            self.finish(slot, Err(error));
            return false;
        };
        let result = match &mut pending.operation.action {
            Action::Read { range, .. } => {
                pending.done += count;
                match pending.done >= range.len() {
                    true => Ok(()),
                    false if count > 0 => return true,
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                }
            }
            Action::Write { range, .. } => {
                pending.done += count;
                match pending.done >= range.len() {
                    true => Ok(()),
                    false if count > 0 => return true,
                    false => Err(io::ErrorKind::WriteZero.into()),
                }
            }
            Action::Sync | Action::Zero { .. } => Ok(()),
        };
        self.finish(slot, result);
        false
    }

    fn finish(&mut self, slot: usize, result: io::Result<()>) {
        if let Some(pending) = self.pending.try_remove(slot) {
            let buffer = match pending.operation.action {
                Action::Read { buffer, .. } | Action::Write { buffer, .. } => buffer,
                Action::Sync | Action::Zero { .. } => Vec::new(),
            };
            self.ended.push(Finished { token: pending.operation.token, result, buffer });
        }
    }
}

impl BlockDevice for UringDevice {
    fn submit(&mut self, operation: Operation) {
        self.batch.push(operation);
    }

    fn kick(&mut self) {
        if self.penalty.is_some_and(|until| until < Instant::now()) {
            self.penalty = None;
        }
        let mut batch = std::mem::take(&mut self.batch);
        let is_read = |operation: &Operation| matches!(operation.action, Action::Read { .. });
        let together = batch.iter().filter(|operation| is_read(operation)).count() >= RING_READS;
        for operation in batch.drain(..) {
            if together && is_read(&operation) {
                self.enqueue(operation, 0);
            } else {
                self.direct(operation);
            }
        }
        self.batch = batch;
        if !self.queue.is_empty() {
            self.flush();
        }
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) {
        loop {
            let Some(entry) = self.ring.completion().next() else { break };
            if let Ok(slot) = usize::try_from(entry.user_data())
                && self.complete(slot, entry.result())
            {
                self.queue.push_back(slot);
            }
        }
        self.kick();
        finished.append(&mut self.ended);
    }
}

impl FileDevice for UringDevice {
    fn attach(&mut self, file: File) -> FileId {
        self.files.insert(file)
    }

    fn detach(&mut self, file: FileId) {
        self.files.remove(file);
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }
}

impl Drop for UringDevice {
    fn drop(&mut self) {
        let mut finished = Vec::new();
        self.queue.iter().for_each(|slot| drop(self.pending.try_remove(*slot)));
        self.queue.clear();
        while !self.pending.is_empty() {
            // Waits for one completion; a kernel that cannot even wait leaves the buffers to it for ever.
            if self.ring.submit_and_wait(1).is_err_and(|error| error.kind() != io::ErrorKind::Interrupted) {
                std::mem::forget(std::mem::take(&mut self.pending));
                return;
            }
            self.reap(&mut finished);
        }
    }
}
