//! From a command to what the volume is asked, and from its end to a status and to numbers.

use super::*;

/// What an I/O command asks of the volume.
pub(super) enum Work {
    Nothing,
    One(Request, Cost),
    /// Dataset Management with several ranges.
    Many(Vec<Request>),
}

/// A command's blocks as bytes, if the volume has them.
pub(super) fn byte_range(lba: u64, blocks: u64, size: u64) -> Result<(u64, u64), NvmeStatus> {
    let end = lba.checked_add(blocks).ok_or(NvmeStatus::LBA_RANGE)?;
    if end > size / BLOCK { Err(NvmeStatus::LBA_RANGE) } else { Ok((lba * BLOCK, blocks * BLOCK)) }
}

pub(super) fn requests(command: &mut Command, buffers: &mut Buffers, size: u64) -> Result<Work, NvmeStatus> {
    let (sqe, data_len) = (command.sqe, command.len);
    let flush = sqe.opcode() == opcode::FLUSH;
    if sqe.nsid() != NSID && !(flush && sqe.nsid() == NSID_ALL) {
        return Err(NvmeStatus::INVALID_NAMESPACE);
    }
    let range = |lba: u64, blocks: u64| byte_range(lba, blocks, size);
    if sqe.opcode() == opcode::DATASET_MANAGEMENT {
        // Hints about access are taken and change nothing; only Deallocate (bit 2) does.
        let deallocate = sqe.dword(11) & 1 << 2 != 0;
        let mut requests = Vec::new();
        for entry in command.buffer.get(..data_len).unwrap_or_default().chunks_exact(16) {
            let (offset, len) = range(crate::bytes::u64_at(entry, 8), crate::bytes::u32_at(entry, 4).into())?;
            if deallocate && len > 0 {
                requests.push(Request::Discard { offset, len });
            }
        }
        return Ok(if requests.is_empty() { Work::Nothing } else { Work::Many(requests) });
    }
    if flush {
        return Ok(Work::One(Request::Flush, Cost::of_command()));
    }
    let (offset, len) = range(sqe.lba(), sqe.blocks())?;
    let (request, cost) = match sqe.opcode() {
        opcode::READ => (Request::Read { offset, len, buffer: std::mem::take(&mut command.buffer) }, Cost::of_transfer(len)),
        // What is compared stays with the command; the blocks come into a buffer of their own.
        opcode::COMPARE | opcode::VERIFY => {
            (Request::Read { offset, len, buffer: buffers.take(crate::bytes::narrow(len)) }, Cost::of_transfer(len))
        }
        opcode::WRITE => {
            let buffer = std::mem::take(&mut command.buffer);
            (Request::Write { offset, len, buffer, fua: sqe.fua() }, Cost::of_transfer(len))
        }
        _ => (Request::Zeroes { offset, len, fua: sqe.fua() }, Cost::of_command()),
    };
    Ok(Work::One(request, cost))
}

/// The status of a request that failed.
pub(super) fn status_of(error: &VolumeError) -> NvmeStatus {
    match error {
        VolumeError::OutOfRange { .. } => NvmeStatus::LBA_RANGE.dnr(),
        VolumeError::Write(source) if source.kind() == io::ErrorKind::StorageFull => NvmeStatus::CAPACITY.dnr(),
        VolumeError::Failed | VolumeError::Write(_) | VolumeError::Flush(_) => NvmeStatus::WRITE_FAULT.dnr(),
        VolumeError::Read(_) => NvmeStatus::READ_ERROR.dnr(),
    }
}

/// Counts a command that has ended.
pub(super) fn account(traffic: &mut Traffic, counting: &Counting, opcode: u8, len: usize, error: Option<NvmeStatus>, took: Duration) {
    let bytes = crate::bytes::wide(len);
    match (error, opcode) {
        (None, opcode::READ) => {
            traffic.reads.add(bytes, took);
            count(&counting.reads, 1);
            count(&counting.read_bytes, bytes);
        }
        (None, opcode::WRITE) => {
            traffic.writes.add(bytes, took);
            count(&counting.writes, 1);
            count(&counting.write_bytes, bytes);
        }
        (None, opcode::FLUSH) => count(&counting.flushes, 1),
        (None, opcode::COMPARE | opcode::VERIFY) => count(&counting.verifies, 1),
        (None, _) => count(&counting.zeroes, 1),
        (Some(status), _) => {
            if status.is(NvmeStatus::READ_ERROR) || status.is(NvmeStatus::WRITE_FAULT) {
                traffic.media_errors += 1;
            }
            count(&counting.commands_failed, 1);
        }
    }
}
