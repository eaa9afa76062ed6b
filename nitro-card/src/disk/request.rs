//! What a request of the guest asks for: virtio 1.2, section 5.2.6. Nothing in it is believed.

use super::*;

/// Why a request is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    Malformed,
    /// Blocks outside of the disk, or a length that is no number of blocks.
    Range,
    Unsupported,
}

/// How a request is done.
pub(super) enum Work {
    /// Answered by the card itself.
    Answer(Vec<u8>),
    Commands(Vec<Command>),
}

/// Addresses and lengths in the guest's memory.
pub(super) type Segments = Vec<(GuestAddress, usize)>;

/// Splits a chain into what the guest gives, where it wants data, and where it wants the status.
pub(super) fn segments(chain: Chain) -> Option<(Segments, Segments, GuestAddress)> {
    let (mut readable, mut writable, mut total) = (Segments::new(), Segments::new(), 0_usize);
    for descriptor in chain {
        let len = usize::try_from(descriptor.len()).ok()?;
        total = total.checked_add(len).filter(|total| *total <= REQUEST_MAX + 4096)?;
        if descriptor.is_write_only() {
            writable.push((descriptor.addr(), len));
        } else if writable.is_empty() {
            readable.push((descriptor.addr(), len));
        } else {
            return None;
        }
    }
    let (address, len) = writable.last_mut()?;
    *len = len.checked_sub(1)?;
    let status_at = GuestAddress(address.0.checked_add(*len as u64)?);
    Some((readable, writable, status_at))
}

/// Copies `len` bytes out of the guest's memory, from byte `skip` of the segments on.
fn copy_out(memory: &GuestMemoryMmap, from: &Segments, mut skip: usize, len: usize) -> Result<Vec<u8>, Refused> {
    let mut out = vec![0; len];
    let mut rest = out.as_mut_slice();
    for (address, room) in from {
        let here = room.saturating_sub(skip).min(rest.len());
        if here > 0 {
            let (now, later) = rest.split_at_mut(here);
            let start = address.0.checked_add(skip as u64).ok_or(Refused::Malformed)?;
            memory.read_slice(now, GuestAddress(start)).map_err(|_| Refused::Malformed)?;
            rest = later;
        }
        skip = skip.saturating_sub(*room);
    }
    if rest.is_empty() { Ok(out) } else { Err(Refused::Malformed) }
}

/// What a request asks for, virtio 1.2 section 5.2.6.
pub(super) fn work(disk: &Disk, memory: &GuestMemoryMmap, readable: &Segments, writable: &Segments) -> Result<Work, Refused> {
    const HEADER: usize = 16;
    let header = copy_out(memory, readable, 0, HEADER)?;
    let given = total(readable).saturating_sub(HEADER);
    let wanted = total(writable);
    let range = |sector: u64, bytes: usize| {
        let bytes = bytes as u64;
        let end = sector.checked_add(bytes / SECTOR);
        let good = bytes > 0 && bytes.is_multiple_of(SECTOR) && end.is_some_and(|end| end <= disk.sectors);
        if good && bytes <= REQUEST_MAX as u64 { Ok(()) } else { Err(Refused::Range) }
    };
    let parts =
        |sector: u64, bytes: usize| (0..bytes).step_by(PART).map(move |at| (Lba(sector + at as u64 / SECTOR), at, PART.min(bytes - at)));
    let sector = u64_at(&header, 8);
    match u32_at(&header, 0) {
        blk::VIRTIO_BLK_T_IN => {
            range(sector, wanted)?;
            let command = |(lba, _, len)| Command::Read { lba, len: u32::try_from(len).unwrap_or(0) };
            Ok(Work::Commands(parts(sector, wanted).map(command).collect()))
        }
        blk::VIRTIO_BLK_T_OUT => {
            range(sector, given)?;
            let command = |(lba, at, len)| Ok(Command::Write { lba, data: copy_out(memory, readable, HEADER + at, len)? });
            parts(sector, given).map(command).collect::<Result<_, _>>().map(Work::Commands)
        }
        blk::VIRTIO_BLK_T_FLUSH => Ok(Work::Commands(vec![Command::Flush])),
        blk::VIRTIO_BLK_T_GET_ID => Ok(Work::Answer(disk.serial.get(..wanted.min(20)).unwrap_or_default().to_vec())),
        kind @ (blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_WRITE_ZEROES) => {
            if given == 0 || !given.is_multiple_of(16) || given / 16 > RANGE_SEGMENTS as usize {
                return Err(Refused::Range);
            }
            let mut commands = Vec::new();
            for segment in copy_out(memory, readable, HEADER, given)?.chunks_exact(16) {
                let (lba, mut blocks, flags) = (u64_at(segment, 0), u32_at(segment, 8), u32_at(segment, 12));
                let discards = kind == blk::VIRTIO_BLK_T_DISCARD;
                if flags & !u32::from(!discards) != 0 {
                    return Err(Refused::Unsupported);
                }
                let end = lba.checked_add(blocks.into());
                if blocks == 0 || blocks > RANGE_SECTORS || end.is_none_or(|end| end > disk.sectors) {
                    return Err(Refused::Range);
                }
                if discards {
                    commands.push(Command::Deallocate { lba: Lba(lba), blocks });
                    continue;
                }
                let mut at = lba;
                while blocks > 0 {
                    let now = blocks.min(ZEROES_PART);
                    commands.push(Command::WriteZeroes { lba: Lba(at), blocks: now });
                    (at, blocks) = (at + u64::from(now), blocks - now);
                }
            }
            Ok(Work::Commands(commands))
        }
        _ => Err(Refused::Unsupported),
    }
}

fn total(segments: &Segments) -> usize {
    segments.iter().map(|(_, len)| *len).sum()
}

/// What a command keeps in memory while it is under way, in bytes.
pub(super) fn bytes_of(command: &Command) -> usize {
    match command {
        Command::Read { len, .. } => usize::try_from(*len).unwrap_or(PART),
        Command::Write { data, .. } => data.len(),
        _ => 0,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u32::from_le_bytes)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u64::from_le_bytes)
}
