//! Plain pread, pwrite, fallocate and fdatasync: for machines whose sandbox forbids io_uring.
//!
//! Everything is done in `kick`; a slow disk stalls the shard, which is why it is only the second choice.

use super::{Action, BlockDevice, FileDevice, FileId, Files, Finished, Operation};
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt as _;

/// The device.
#[derive(Debug, Default)]
pub(crate) struct SyncDevice {
    files: Files,
    batch: Vec<Operation>,
    finished: Vec<Finished>,
}

impl BlockDevice for SyncDevice {
    fn submit(&mut self, operation: Operation) {
        self.batch.push(operation);
    }

    fn kick(&mut self) {
        for operation in self.batch.drain(..) {
            let Operation { token, file, offset, action } = operation;
            let (result, buffer) = match self.files.get(file) {
                Ok(file) => run(file, offset, action),
                Err(error) => (Err(error), Vec::new()),
            };
            self.finished.push(Finished { token, result, buffer });
        }
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) {
        finished.append(&mut self.finished);
    }
}

impl FileDevice for SyncDevice {
    fn attach(&mut self, file: File) -> FileId {
        self.files.insert(file)
    }

    fn detach(&mut self, file: FileId) {
        self.files.remove(file);
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Does one operation; gives its buffer back.
pub(super) fn run(file: &File, offset: u64, action: Action) -> (io::Result<()>, Vec<u8>) {
    match action {
        Action::Read { mut buffer, range } => {
            let result = buffer.get_mut(range).map_or(Err(io::ErrorKind::InvalidInput.into()), |into| read(file, offset, into));
            (result, buffer)
        }
        Action::Write { buffer, range } => {
            let result = buffer.get(range).map_or(Err(io::ErrorKind::InvalidInput.into()), |from| file.write_all_at(from, offset));
            (result, buffer)
        }
        Action::Sync => (file.sync_data(), Vec::new()),
        Action::Zero { len } => (super::punch(file, offset, len), Vec::new()),
    }
}

fn read(file: &File, mut offset: u64, mut into: &mut [u8]) -> io::Result<()> {
    while !into.is_empty() {
        match file.read_at(into, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                offset += crate::bytes::wide(count);
                into = into.get_mut(count..).unwrap_or_default();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::uring::UringDevice;

    fn run_one(device: &mut dyn FileDevice, operation: Operation) -> Finished {
        device.submit(operation);
        device.kick();
        let mut finished = Vec::new();
        while finished.is_empty() {
            device.reap(&mut finished);
        }
        finished.remove(0)
    }

    /// The contract of every device, on real files.
    fn check(device: &mut dyn FileDevice) {
        let file = device.attach(tempfile::tempfile().unwrap());
        let at = |offset, action| Operation { token: offset, file, offset, action };
        let wrote = run_one(device, at(1000, Action::Write { buffer: vec![7; 3000], range: 500..2500 }));
        assert_eq!((wrote.token, wrote.buffer.len()), (1000, 3000));
        wrote.result.unwrap();
        run_one(device, at(0, Action::Sync)).result.unwrap();
        let read = run_one(device, at(500, Action::Read { buffer: vec![9; 4000], range: 100..2600 }));
        read.result.unwrap();
        assert!(read.buffer[..100].iter().all(|byte| *byte == 9));
        assert!(read.buffer[100..600].iter().all(|byte| *byte == 0), "a hole");
        assert!(read.buffer[600..2600].iter().all(|byte| *byte == 7));
        assert!(read.buffer[2600..].iter().all(|byte| *byte == 9));
        for (offset, len) in [(500, 2501), (3000, 1), (9000, 512)] {
            let read = run_one(device, at(offset, Action::Read { buffer: vec![9; len], range: 0..len }));
            assert_eq!(read.result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "{offset}+{len}");
        }
        run_one(device, at(1024, Action::Zero { len: 512 })).result.unwrap();
        let read = run_one(device, at(1000, Action::Read { buffer: vec![1; 2000], range: 0..2000 }));
        assert!(read.buffer.iter().enumerate().all(|(at, byte)| *byte == if (24..536).contains(&at) { 0 } else { 7 }));
        for index in 0..500_u64 {
            device.submit(at(index * 8, Action::Write { buffer: vec![3; 8], range: 0..8 }));
        }
        device.kick();
        let mut finished = Vec::new();
        while finished.len() < 500 {
            device.reap(&mut finished);
        }
        assert!(finished.iter().all(|one| one.result.is_ok()));
        device.detach(file);
        assert!(run_one(device, at(0, Action::Sync)).result.is_err());
    }

    #[test]
    fn sync_device_keeps_the_contract() {
        check(&mut SyncDevice::default());
    }

    #[test]
    fn uring_device_keeps_the_contract() {
        match UringDevice::new() {
            Ok(mut device) => check(&mut device),
            Err(error) => eprintln!("not run, no io_uring: {error}"),
        }
    }
}
