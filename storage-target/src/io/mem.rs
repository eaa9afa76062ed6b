//! A simulated device: files in memory, with a page cache that can be lost.
//!
//! Every write since the last sync is kept apart. [`MemDevice::kill`] ends the process: what was applied
//! stays, what was under way is applied whole, in part, or not at all. [`MemDevice::cut_power`] also loses
//! any part of what was not synced, in units of 512 bytes and in any order. The seed decides.

use super::{Action, BlockDevice, FileId, Finished, Operation};
use std::io;

const SECTOR: usize = 512;

/// xorshift64*: enough chance for tests, and a seed replays it.
#[derive(Debug, Clone)]
pub(crate) struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit.max(1)
    }

    pub fn index(&mut self, len: usize) -> usize {
        crate::bytes::narrow(self.below(crate::bytes::wide(len)))
    }
}

#[derive(Debug, Default, Clone)]
struct MemFile {
    /// What reads see.
    cached: Vec<u8>,
    /// What a power cut leaves for sure.
    durable: Vec<u8>,
    /// Applied but not synced, in order.
    unsynced: Vec<(usize, Vec<u8>)>,
}

impl MemFile {
    fn apply(&mut self, offset: usize, bytes: &[u8]) {
        write_at(&mut self.cached, offset, bytes);
        self.unsynced.push((offset, bytes.to_vec()));
    }
}

fn write_at(into: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    if into.len() < end {
        into.resize(end, 0);
    }
    into[offset..end].copy_from_slice(bytes);
}

/// The device.
#[derive(Debug)]
pub(crate) struct MemDevice {
    files: Vec<MemFile>,
    batch: Vec<Operation>,
    under_way: Vec<Operation>,
    finished: Vec<Finished>,
    chance: Chance,
    /// Makes the next sync fail, after which nobody knows what is durable.
    pub fail_sync: bool,
    /// Syncs done so far.
    pub syncs: u64,
}

impl MemDevice {
    pub fn new(seed: u64) -> Self {
        Self {
            files: Vec::new(),
            batch: Vec::new(),
            under_way: Vec::new(),
            finished: Vec::new(),
            chance: Chance::new(seed),
            fail_sync: false,
            syncs: 0,
        }
    }

    /// Adds a file whose content is durable.
    pub fn file(&mut self, content: Vec<u8>) -> FileId {
        self.files.push(MemFile { durable: content.clone(), cached: content, unsynced: Vec::new() });
        FileId(u32::try_from(self.files.len() - 1).unwrap())
    }

    pub fn content(&self, file: FileId) -> &[u8] {
        &self.files[file.0 as usize].cached
    }

    /// Replaces a file as a rename does.
    pub fn replace(&mut self, file: FileId, content: Vec<u8>) {
        self.files[file.0 as usize] = MemFile { durable: content.clone(), cached: content, unsynced: Vec::new() };
    }

    pub fn is_idle(&self) -> bool {
        self.under_way.is_empty() && self.finished.is_empty() && self.batch.is_empty()
    }

    /// Ends one operation, any one.
    pub fn step(&mut self) {
        if self.under_way.is_empty() {
            return;
        }
        let index = self.chance.index(self.under_way.len());
        let operation = self.under_way.swap_remove(index);
        let file = &mut self.files[operation.file.0 as usize];
        let offset = usize::try_from(operation.offset).unwrap();
        let (result, buffer) = match operation.action {
            Action::Read { mut buffer, range } => {
                let part = &mut buffer[range];
                let have = file.cached.get(offset..).unwrap_or_default();
                let count = part.len().min(have.len());
                part[..count].copy_from_slice(&have[..count]);
                let whole = count == part.len();
                (if whole { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }, buffer)
            }
            Action::Write { buffer, range } => {
                file.apply(offset, &buffer[range]);
                (Ok(()), buffer)
            }
            Action::Zero { len } => {
                file.apply(offset, &vec![0; usize::try_from(len).unwrap()]);
                (Ok(()), Vec::new())
            }
            Action::Sync if std::mem::take(&mut self.fail_sync) => (Err(io::Error::other("injected")), Vec::new()),
            Action::Sync => {
                self.syncs += 1;
                for (offset, bytes) in file.unsynced.drain(..) {
                    write_at(&mut file.durable, offset, &bytes);
                }
                (Ok(()), Vec::new())
            }
        };
        self.finished.push(Finished { token: operation.token, result, buffer });
    }

    /// The process dies: what was under way may have been applied in part.
    pub fn kill(&mut self) {
        self.batch.clear();
        self.finished.clear();
        for operation in std::mem::take(&mut self.under_way) {
            let bytes = match operation.action {
                Action::Write { buffer, range } => buffer[range].to_vec(),
                Action::Zero { len } => vec![0; usize::try_from(len).unwrap()],
                Action::Read { .. } | Action::Sync => continue,
            };
            let kept = match self.chance.below(3) {
                0 => 0,
                1 => bytes.len(),
                _ => self.chance.index(bytes.len() + 1) / SECTOR * SECTOR,
            };
            self.files[operation.file.0 as usize].apply(usize::try_from(operation.offset).unwrap(), &bytes[..kept]);
        }
    }

    /// The machine dies: of what was not synced, any sectors survive.
    pub fn cut_power(&mut self) {
        self.kill();
        for file in &mut self.files {
            for (offset, bytes) in std::mem::take(&mut file.unsynced) {
                let mut at = 0;
                while at < bytes.len() {
                    let len = (SECTOR - (offset + at) % SECTOR).min(bytes.len() - at);
                    if self.chance.below(2) == 0 {
                        write_at(&mut file.durable, offset + at, &bytes[at..at + len]);
                    }
                    at += len;
                }
            }
            file.cached.clone_from(&file.durable);
        }
    }
}

impl BlockDevice for MemDevice {
    fn submit(&mut self, operation: Operation) {
        self.batch.push(operation);
    }

    fn kick(&mut self) {
        self.under_way.append(&mut self.batch);
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) {
        finished.append(&mut self.finished);
    }
}
