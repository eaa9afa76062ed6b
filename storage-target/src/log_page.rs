//! Log pages: NVM Express Base 2.0 section 5.16, the discovery log of NVMe over Fabrics, and EBS's own statistics.
//!
//! | page | what it tells |
//! |---|---|
//! | 00h, 05h, 12h | which log pages, commands and features there are |
//! | 01h | the last commands that failed, newest first |
//! | 02h | health: what was read and written, and whether the volume is read-only |
//! | 03h | one firmware slot |
//! | 04h | namespaces that changed (the controller keeps it) |
//! | 0Ch | asymmetric access: one group, optimized |
//! | 70h | discovery: the subsystems that a host may use |
//! | D0h | EBS volume statistics, 4,096 bytes |
//!
//! Only layouts here: a page is made when it is asked for, from numbers that others keep.

use crate::bytes::{put, put_ascii, wide};
use crate::identify::ANA_GROUP;
use crate::nvme::{MAX_QUEUE, NSID, NvmeStatus, opcode};
use crate::traffic::{Direction, Traffic, bin_bounds};
use std::net::SocketAddr;

/// Page identifiers.
pub(crate) mod page {
    pub const SUPPORTED: u8 = 0x00;
    pub const ERROR: u8 = 0x01;
    pub const HEALTH: u8 = 0x02;
    pub const FIRMWARE: u8 = 0x03;
    pub const CHANGED_NAMESPACES: u8 = 0x04;
    pub const EFFECTS: u8 = 0x05;
    pub const ANA: u8 = 0x0c;
    pub const FEATURES: u8 = 0x12;
    pub const DISCOVERY: u8 = 0x70;
    pub const EBS: u8 = 0xd0;
}

/// First dword of EBS's statistics.
const EBS_MAGIC: u32 = 0x3c23_b510;

/// A command that failed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ErrorEntry {
    /// Rises by one with every error of the controller.
    pub number: u64,
    pub queue: u16,
    pub cid: u16,
    pub status: NvmeStatus,
    pub lba: u64,
    pub nsid: u32,
}

/// Supported Log Pages, 00h.
pub(crate) fn supported(pages: &[u8]) -> Vec<u8> {
    flags(1024, pages.iter().map(|page| (usize::from(*page), 1)))
}

/// Feature Identifiers Supported and Effects, 12h.
pub(crate) fn features(ids: &[u8]) -> Vec<u8> {
    flags(1024, ids.iter().map(|id| (usize::from(*id), 1)))
}

/// Commands Supported and Effects, 05h: admin commands, then those of I/O queues.
pub(crate) fn effects() -> Vec<u8> {
    use opcode::{
        ABORT, ASYNC_EVENT_REQUEST, COMPARE, DATASET_MANAGEMENT, FLUSH, GET_FEATURES, GET_LOG_PAGE, IDENTIFY, KEEP_ALIVE, READ,
        SET_FEATURES, VERIFY, WRITE, WRITE_ZEROES,
    };
    let admin = [GET_LOG_PAGE, IDENTIFY, ABORT, SET_FEATURES, GET_FEATURES, ASYNC_EVENT_REQUEST, KEEP_ALIVE];
    let admin = admin.map(|opcode| (usize::from(opcode), 1_u32));
    // Bit 1: the command changes blocks.
    let io = [(FLUSH, 1), (WRITE, 3), (READ, 1), (COMPARE, 1), (WRITE_ZEROES, 3), (DATASET_MANAGEMENT, 3), (VERIFY, 1)];
    let io = io.map(|(opcode, flags)| (256 + usize::from(opcode), flags));
    flags(4096, admin.into_iter().chain(io))
}

/// A page of dwords, zero but for some.
fn flags(len: usize, set: impl Iterator<Item = (usize, u32)>) -> Vec<u8> {
    let mut page = vec![0; len];
    for (index, value) in set {
        put(&mut page, index * 4, &value.to_le_bytes());
    }
    page
}

/// Error Information, 01h; `entries` come newest first, `len` is how many the log has room for.
pub(crate) fn errors<'a>(entries: impl Iterator<Item = &'a ErrorEntry>, len: usize) -> Vec<u8> {
    let mut page = vec![0; len * 64];
    for (index, entry) in entries.take(len).enumerate() {
        let at = index * 64;
        put(&mut page, at, &entry.number.to_le_bytes());
        put(&mut page, at + 8, &entry.queue.to_le_bytes());
        put(&mut page, at + 10, &entry.cid.to_le_bytes());
        put(&mut page, at + 12, &(entry.status.0 << 1).to_le_bytes());
        put(&mut page, at + 14, &0xffff_u16.to_le_bytes()); // no single field to blame
        put(&mut page, at + 16, &entry.lba.to_le_bytes());
        put(&mut page, at + 24, &entry.nsid.to_le_bytes());
        put(&mut page, at + 29, &[3]); // TCP
    }
    page
}

/// SMART / Health Information, 02h: units of 512,000 bytes, rounded up.
pub(crate) fn health(traffic: &Traffic, failed: bool, errors: u64) -> Vec<u8> {
    let mut page = vec![0; 512];
    put(&mut page, 0, &[u8::from(failed) << 3]); // read-only
    put(&mut page, 1, &300_u16.to_le_bytes()); // kelvin
    put(&mut page, 3, &[100, 10]); // spare: percent available, threshold
    for (at, value) in [
        (32, traffic.reads.bytes.div_ceil(512_000)),
        (48, traffic.writes.bytes.div_ceil(512_000)),
        (64, traffic.reads.operations),
        (80, traffic.writes.operations),
        (160, traffic.media_errors),
        (176, errors),
    ] {
        put(&mut page, at, &value.to_le_bytes());
    }
    page
}

/// Firmware Slot Information, 03h.
pub(crate) fn firmware() -> Vec<u8> {
    let mut page = vec![0; 512];
    put(&mut page, 0, &[1]);
    put_ascii(&mut page, 8, 8, "1.0");
    page
}

/// Asymmetric Namespace Access, 0Ch: one group, optimized, which never changes.
pub(crate) fn ana(groups_only: bool) -> Vec<u8> {
    let mut page = vec![0; if groups_only { 48 } else { 52 }];
    put(&mut page, 8, &1_u16.to_le_bytes());
    put(&mut page, 16, &ANA_GROUP.to_le_bytes());
    put(&mut page, 16 + 16, &[0x01]);
    if !groups_only {
        put(&mut page, 16 + 4, &1_u32.to_le_bytes());
        put(&mut page, 48, &NSID.to_le_bytes());
    }
    page
}

/// EBS volume statistics, D0h.
pub(crate) fn ebs(traffic: &Traffic, queue_length: u64) -> Vec<u8> {
    let mut page = vec![0; 4096];
    put(&mut page, 0, &EBS_MAGIC.to_le_bytes());
    let numbers = [
        traffic.reads.operations,
        traffic.writes.operations,
        traffic.reads.bytes,
        traffic.writes.bytes,
        traffic.reads.time_us,
        traffic.writes.time_us,
        traffic.over_iops_us,
        traffic.over_throughput_us,
        0, // what the instance's own limits held back is the card's to know
        0,
        queue_length,
    ];
    for (index, value) in numbers.into_iter().enumerate() {
        put(&mut page, 8 + index * 8, &value.to_le_bytes());
    }
    histogram(&mut page, 512, &traffic.reads);
    histogram(&mut page, 512 + 1544, &traffic.writes);
    page
}

/// Number of bins, then 64 times lower bound, upper bound, count.
fn histogram(page: &mut [u8], at: usize, direction: &Direction) {
    put(page, at, &wide(direction.bins.len()).to_le_bytes());
    for (bin, count) in direction.bins.iter().enumerate() {
        let (lower, upper) = bin_bounds(bin);
        let at = at + 8 + bin * 24;
        put(page, at, &lower.to_le_bytes());
        put(page, at + 8, &upper.to_le_bytes());
        put(page, at + 16, &count.to_le_bytes());
    }
}

/// One entry of the discovery log page.
pub(crate) struct DiscoveryEntry {
    pub subsystem_nqn: String,
    pub address: SocketAddr,
}

/// The discovery log page, 70h: a header of 1,024 bytes and as much for each entry.
pub(crate) fn discovery(generation: u64, entries: &[DiscoveryEntry]) -> Vec<u8> {
    let mut page = vec![0; 1024 * (1 + entries.len())];
    put(&mut page, 0, &generation.to_le_bytes());
    put(&mut page, 8, &wide(entries.len()).to_le_bytes());
    for (index, entry) in entries.iter().enumerate() {
        let at = 1024 * (1 + index);
        let family = if entry.address.is_ipv4() { 1 } else { 2 };
        put(&mut page, at, &[3, family, 2, 0x02]); // TCP, address family, NVM subsystem, secure channel not required
        put(&mut page, at + 4, &1_u16.to_le_bytes()); // PORTID
        put(&mut page, at + 6, &0xffff_u16.to_le_bytes()); // CNTLID: dynamic
        put(&mut page, at + 8, &MAX_QUEUE.to_le_bytes()); // ASQSZ
        put_ascii(&mut page, at + 32, 32, &entry.address.port().to_string());
        put(&mut page, at + 256, entry.subsystem_nqn.as_bytes());
        put_ascii(&mut page, at + 512, 256, &entry.address.ip().to_string());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{u16_at, u32_at, u64_at};
    use crate::nvme::volume_nqn;
    use std::time::Duration;

    #[test]
    fn discovery_entries_name_address_and_port() {
        let page = discovery(9, &[DiscoveryEntry { subsystem_nqn: volume_nqn("vol-1"), address: "127.0.0.1:4420".parse().unwrap() }]);
        assert_eq!((page.len(), u64_at(&page, 0), u64_at(&page, 8)), (2048, 9, 1));
        assert_eq!(&page[1024..1028], [3, 1, 2, 2]);
        assert_eq!(&page[1024 + 32..1024 + 37], b"4420 ");
        assert_eq!(&page[1024 + 512..1024 + 522], b"127.0.0.1 ");
    }

    #[test]
    fn statistics_of_ebs_stand_where_its_own_tool_reads_them() {
        let mut traffic = Traffic::default();
        traffic.reads.add(4096, Duration::from_micros(70));
        traffic.writes.add(512, Duration::from_micros(3));
        traffic.over_iops_us = 5;
        let page = ebs(&traffic, 6);
        assert_eq!((page.len(), u32_at(&page, 0)), (4096, 0x3c23_b510));
        let numbers: Vec<u64> = (0..11).map(|index| u64_at(&page, 8 + index * 8)).collect();
        assert_eq!(numbers, [1, 1, 4096, 512, 70, 3, 5, 0, 0, 0, 6]);
        // 64 to 128 us is bin 7 of the reads, 2 to 4 us bin 2 of the writes.
        assert_eq!((u64_at(&page, 512), u64_at(&page, 520 + 7 * 24), u32_at(&page, 520 + 7 * 24 + 16)), (32, 64, 1));
        assert_eq!((u64_at(&page, 2056 + 8 + 2 * 24 + 8), u32_at(&page, 2056 + 8 + 2 * 24 + 16)), (4, 1));
    }

    #[test]
    fn the_newest_error_comes_first() {
        let entry = |number| ErrorEntry { number, queue: 2, cid: 7, status: NvmeStatus::LBA_RANGE.dnr(), lba: 9, nsid: 1 };
        let page = errors([entry(2), entry(1)].iter(), 64);
        assert_eq!((page.len(), u64_at(&page, 0), u64_at(&page, 64), u64_at(&page, 128)), (4096, 2, 1, 0));
        assert_eq!((u16_at(&page, 8), u16_at(&page, 10), u16_at(&page, 12)), (2, 7, 0x8000 | 0x80 << 1));
    }
}
