//! The target by the paragraph: what a host sends in bytes, and what has to come back in bytes.
//!
//! A row is a stage that a connection is brought to, what is sent then, and what has to be answered. After each
//! answer that is no termination the connection has to go on; after each row another host has to be served.
//! Every row runs against a volume in a file and one in memory, and without and with both digests where the row
//! does not lie about bytes itself.

#![allow(clippy::cast_possible_truncation, clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

mod wire;

use std::net::SocketAddr;
use std::time::{Duration, Instant};
use storage_target::{Access, Target, TargetOptions, TargetSettings, VolumeSpec, volume_nqn};
use wire::{
    CID, DISCOVERY, HOST, OTHER, Outcome, Raw, Sqe, capsule, connect_data, connect_sqe, h2c_data, icreq, pdu, property_get, property_set,
};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const BLOCKS: u64 = SIZE / 512;

/// Where a connection stands before a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing was said.
    Socket,
    /// ICReq and ICResp.
    Ready,
    /// An admin queue, enabled.
    Admin,
    /// An I/O queue of an enabled controller.
    Io,
    /// A discovery controller, enabled.
    Discovery,
}

/// What has to come back.
#[derive(Debug, Clone)]
enum Expect {
    /// This status.
    Status(u16),
    /// Success, with this dword 0 and 1.
    Value(u64),
    /// The same, if not at once then when asked again.
    Becomes(u64),
    /// Success, with this much data, which holds these bytes at these offsets.
    Data(usize, Vec<(usize, Vec<u8>)>),
    /// R2T for all of this length; the next send gets its tag.
    R2t(u32),
    /// C2HTermReq with these FES and FEI, then the end.
    Term(u16, u32),
    /// The end, without a word.
    Closed,
    /// ICResp with these digests.
    IcResp(u8),
}

use Expect::{Becomes, Closed, Data, IcResp, R2t, Status, Term, Value};
use Stage::{Admin, Discovery, Io, Ready, Socket};

struct Row {
    name: &'static str,
    stage: Stage,
    /// Sent as it is; a transfer tag of FFFFh in H2CData is replaced by that of the R2T before.
    steps: Vec<(Vec<u8>, Expect)>,
}

fn row(name: &'static str, stage: Stage, send: Vec<u8>, expect: Expect) -> Row {
    Row { name, stage, steps: vec![(send, expect)] }
}

fn rows(name: &'static str, stage: Stage, steps: Vec<(Vec<u8>, Expect)>) -> Row {
    Row { name, stage, steps }
}

fn cmd(sqe: Sqe) -> Vec<u8> {
    capsule(sqe, &[])
}

/// Brings a connection to the row's stage, and says and hears what the row has.
fn check(row: &Row, address: SocketAddr, volume: &str, digests: u8) {
    let name = format!("{} on {volume}, digests {digests}", row.name);
    let nqn = volume_nqn(volume);
    let mut admin = None;
    let mut raw = match row.stage {
        Socket => Raw::open(address),
        Ready => Raw::ready(address, digests),
        Admin => Raw::admin(address, &nqn, digests).0,
        Discovery => Raw::admin(address, DISCOVERY, digests).0,
        Io => {
            let (kept, io) = Raw::io(address, &nqn, digests);
            admin = Some(kept);
            io
        }
    };
    let mut tag = 0xffff_u16;
    for (send, expect) in &row.steps {
        if row.stage == Socket {
            raw.send(send);
        } else {
            pdus(send).into_iter().for_each(|pdu| raw.send_pdu(&with_tag(pdu, tag)));
        }
        let outcome = raw.outcome();
        match (expect, &outcome) {
            (Status(expected), Outcome::End { status, .. }) => assert_eq!(status, expected, "{name}: {status:#x}, not {expected:#x}"),
            (Value(expected), Outcome::End { status: 0, dw0, .. }) => assert_eq!(dw0, expected, "{name}"),
            (Data(len, parts), Outcome::End { status: 0, data, .. }) => {
                assert_eq!(data.len(), *len, "{name}");
                for (at, bytes) in parts {
                    assert_eq!(&data[*at..at + bytes.len()], bytes, "{name}, byte {at}");
                }
            }
            (R2t(expected), Outcome::R2t { ttag, offset, len }) => {
                assert_eq!((offset, len), (&0, expected), "{name}");
                tag = *ttag;
            }
            (Term(fes, fei), Outcome::Term { fes: found, fei: at }) => {
                assert_eq!((found, at), (fes, fei), "{name}");
                assert_eq!(raw.outcome(), Outcome::Closed, "{name}: the end");
            }
            (IcResp(expected), Outcome::IcResp(answer)) => {
                assert_eq!(answer[3], *expected, "{name}");
                assert_eq!(answer[..2], [0, 0], "{name}: PFV");
                assert!(answer[2] <= 31, "{name}: CPDA");
                assert!(u32::from_le_bytes(answer[4..8].try_into().unwrap()) >= 4096, "{name}: MAXH2CDATA");
            }
            (Becomes(expected), Outcome::End { status: 0, dw0, .. }) => {
                let (mut dw0, deadline) = (*dw0, Instant::now() + Duration::from_secs(10));
                while dw0 != *expected && Instant::now() < deadline {
                    raw.send_pdu(send);
                    let Outcome::End { status: 0, dw0: again, .. } = raw.outcome() else { panic!("{name}") };
                    dw0 = again;
                }
                assert_eq!(dw0, *expected, "{name}");
            }
            (Closed, Outcome::Closed) => {}
            _ => panic!("{name}: expected {expect:?}, got {outcome:?}"),
        }
    }
    // What was no termination leaves the queue working.
    match (row.stage, row.steps.last().map(|step| &step.1)) {
        (_, Some(Term(..) | Closed | IcResp(_))) | (Socket | Ready, _) => {}
        (Io, _) => {
            let flush = raw.run(Sqe::new(0, 1).u16(2, 0x5555), &[]);
            assert!(matches!(flush, Outcome::End { status: 0, .. }), "{name}: the queue goes on, {flush:?}");
        }
        (_, _) => {
            let ready = raw.run(property_get(0x1c, false).u16(2, 0x5555), &[]);
            assert!(matches!(ready, Outcome::End { status: 0, .. }), "{name}: the queue goes on, {ready:?}");
        }
    }
    drop(admin);
}

/// Cuts bytes into PDUs by their own lengths.
fn pdus(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut cut = Vec::new();
    while !bytes.is_empty() {
        let (pdu, rest) = bytes.split_at(u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize);
        cut.push(pdu.to_vec());
        bytes = rest;
    }
    cut
}

/// Puts the tag of an R2T into the data that answers it.
fn with_tag(mut pdu: Vec<u8>, tag: u16) -> Vec<u8> {
    if pdu[0] == 6 && pdu[10..12] == [0xff; 2] {
        pdu[10..12].copy_from_slice(&tag.to_le_bytes());
    }
    pdu
}

/// Runs rows against both kinds of volumes while another host is served.
fn check_all(table: &[Row], digests: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let settings = TargetSettings { listen: ([127, 0, 0, 1], 0).into(), dir: dir.path().join("t"), images: dir.path().join("i") };
    let target = Target::start_with(settings, &TargetOptions { shards: 2, ..TargetOptions::default() }).unwrap();
    let any = Access::Shared(Vec::new());
    for (id, access, ram) in [
        ("file", any.clone(), false),
        ("ram", any.clone(), true),
        ("witness", any, true),
        ("listed", Access::Shared(vec![OTHER.into()]), true),
        ("own", Access::Exclusive, true),
    ] {
        let initiator_nqn = Some(OTHER.to_owned());
        let spec = VolumeSpec { id: id.into(), size_bytes: SIZE, access, ram, initiator_nqn, ..VolumeSpec::default() };
        target.volume_put(spec).unwrap();
    }
    let (_admin, mut witness) = Raw::io(target.local_addr(), &volume_nqn("witness"), 0);
    for volume in ["file", "ram"] {
        for digests in digests {
            for row in table {
                check(row, target.local_addr(), volume, *digests);
                let served = witness.run(Sqe::new(2, 1).lba(0, 8).there(4096), &[]);
                assert!(matches!(served, Outcome::End { status: 0, .. }), "after {}: {served:?}", row.name);
            }
        }
    }
}

const SQ_ERROR: u16 = 0x00c;
const INVALID_FIELD: u16 = 0x002;
const INVALID_NAMESPACE: u16 = 0x00b;
const INVALID_OPCODE: u16 = 0x001;
const SGL_LENGTH: u16 = 0x00f;
const SGL_TYPE: u16 = 0x011;
const SGL_OFFSET: u16 = 0x016;
const LBA_RANGE: u16 = 0x080;
const COMPARE_FAILURE: u16 = 0x285;
const INVALID_LOG_PAGE: u16 = 0x109;
const CONNECT_FORMAT: u16 = 0x180;
const CONNECT_INVALID: u16 = 0x182;
const CONNECT_HOST: u16 = 0x184;

fn write(lba: u64, blocks: u32) -> Sqe {
    Sqe::new(1, 1).lba(lba, blocks)
}

fn read(lba: u64, blocks: u32) -> Sqe {
    Sqe::new(2, 1).lba(lba, blocks).there(blocks * 512)
}

fn put(lba: u64, fill: u8, blocks: u32) -> Vec<u8> {
    capsule(write(lba, blocks).here(0, blocks * 512), &vec![fill; blocks as usize * 512])
}

/// All data of one R2T in several PDUs.
fn pieces(count: u32, len: u32) -> Vec<u8> {
    (0..count).flat_map(|part| h2c_data(CID, 0xffff, part * len, &vec![part as u8; len as usize], part + 1 == count)).collect()
}

fn ranges(ranges: &[(u32, u64)]) -> Vec<u8> {
    ranges.iter().flat_map(|(blocks, lba)| [&[0; 4][..], &blocks.to_le_bytes(), &lba.to_le_bytes()].concat()).collect()
}

fn log(page: u32, dwords: u32) -> Sqe {
    Sqe::new(2, 0xffff_ffff).dword(10, (dwords - 1) << 16 | page).there(dwords * 4)
}

fn identify(cns: u32, nsid: u32) -> Sqe {
    Sqe::new(6, nsid).dword(10, cns).there(4096)
}

#[test]
fn io_commands() {
    let too_many = Sqe::new(2, 1).dword(12, 2048).there(2049 * 512);
    check_all(
        &[
            rows(
                "write in the capsule, read back",
                Io,
                vec![(put(8, 0xa1, 8), Status(0)), (cmd(read(8, 8)), Data(4096, vec![(0, vec![0xa1; 4096])]))],
            ),
            rows(
                "write by R2T, read back",
                Io,
                vec![
                    (cmd(write(16, 32).there(16384)), R2t(16384)),
                    (h2c_data(CID, 0xffff, 0, &[0xb2; 16384], true), Status(0)),
                    (cmd(read(16, 32)), Data(16384, vec![(0, vec![0xb2; 16384])])),
                ],
            ),
            rows(
                "write of the largest size, in pieces of MAXH2CDATA",
                Io,
                vec![
                    (cmd(write(4096, 2048).there(1 << 20)), R2t(1 << 20)),
                    (pieces(8, 131_072), Status(0)),
                    (cmd(read(4096 + 3 * 256, 8)), Data(4096, vec![(0, vec![3; 4096])])),
                ],
            ),
            rows("FUA", Io, vec![(capsule(write(0, 1).here(0, 512).u32(48, 1 << 30), &[1; 512]), Status(0))]),
            row("flush", Io, cmd(Sqe::new(0, 1)), Status(0)),
            row("flush of all namespaces", Io, cmd(Sqe::new(0, 0xffff_ffff)), Status(0)),
            row("flush of no namespace", Io, cmd(Sqe::new(0, 0)), Status(INVALID_NAMESPACE)),
            rows(
                "write zeroes",
                Io,
                vec![
                    (put(100, 7, 8), Status(0)),
                    (cmd(Sqe::new(8, 1).lba(101, 2)), Status(0)),
                    (cmd(read(100, 8)), Data(4096, vec![(0, vec![7; 512]), (512, vec![0; 1024]), (1536, vec![7; 2560])])),
                ],
            ),
            row("write zeroes beyond MDTS", Io, cmd(Sqe::new(8, 1).lba(0, 65536)), Status(0)),
            rows(
                "deallocated blocks read as zeros",
                Io,
                vec![
                    (put(200, 9, 8), Status(0)),
                    (capsule(Sqe::new(9, 1).dword(10, 1).dword(11, 4).here(0, 32), &ranges(&[(4, 200), (1, 207)])), Status(0)),
                    (cmd(read(200, 8)), Data(4096, vec![(0, vec![0; 2048]), (2048, vec![9; 1536]), (3584, vec![0; 512])])),
                ],
            ),
            row(
                "deallocate beyond the end",
                Io,
                capsule(Sqe::new(9, 1).dword(11, 4).here(0, 16), &ranges(&[(2, BLOCKS - 1)])),
                Status(LBA_RANGE),
            ),
            row("a hint about access", Io, capsule(Sqe::new(9, 1).dword(11, 1).here(0, 16), &ranges(&[(1, 0)])), Status(0)),
            rows(
                "compare",
                Io,
                vec![
                    (put(300, 3, 8), Status(0)),
                    (capsule(Sqe::new(5, 1).lba(300, 8).here(0, 4096), &[3; 4096]), Status(0)),
                    (capsule(Sqe::new(5, 1).lba(300, 8).here(0, 4096), &[4; 4096]), Status(COMPARE_FAILURE)),
                    (cmd(Sqe::new(5, 1).lba(300, 8).there(4096)), R2t(4096)),
                    (h2c_data(CID, 0xffff, 0, &[3; 4096], true), Status(0)),
                ],
            ),
            row("compare beyond the end", Io, capsule(Sqe::new(5, 1).lba(BLOCKS, 1).here(0, 512), &[0; 512]), Status(LBA_RANGE)),
            row("verify", Io, cmd(Sqe::new(0x0c, 1).lba(0, 2048)), Status(0)),
            row("verify beyond its limit", Io, cmd(Sqe::new(0x0c, 1).lba(0, 2049)), Status(INVALID_FIELD)),
            row("verify beyond the end", Io, cmd(Sqe::new(0x0c, 1).lba(BLOCKS - 1, 2)), Status(LBA_RANGE)),
            row("the last block", Io, cmd(read(BLOCKS - 1, 1)), Data(512, vec![])),
            row("one block beyond the end", Io, cmd(read(BLOCKS - 1, 2)), Status(LBA_RANGE)),
            row("the highest LBA", Io, cmd(read(u64::MAX, 1)), Status(LBA_RANGE)),
            row("write beyond the end", Io, put(BLOCKS, 1, 1), Status(LBA_RANGE)),
            row("write zeroes beyond the end", Io, cmd(Sqe::new(8, 1).lba(BLOCKS - 1, 2)), Status(LBA_RANGE)),
            row("a read over MDTS", Io, cmd(too_many), Status(INVALID_FIELD)),
            row("a write over MDTS", Io, cmd(Sqe::new(1, 1).dword(12, 0xffff).there(65536 * 512)), Status(INVALID_FIELD)),
            row("a read of another namespace", Io, cmd(Sqe::new(2, 2).lba(0, 1).there(512)), Status(INVALID_NAMESPACE)),
            row("a read of all namespaces", Io, cmd(Sqe::new(2, 0xffff_ffff).lba(0, 1).there(512)), Status(INVALID_NAMESPACE)),
            row("write uncorrectable", Io, cmd(Sqe::new(4, 1).lba(0, 1)), Status(INVALID_OPCODE)),
            row("a vendor's command", Io, cmd(Sqe::new(0xc1, 1)), Status(INVALID_OPCODE)),
            row("PRP instead of SGL", Io, cmd(read(0, 1).u8(1, 0)), Status(INVALID_FIELD)),
            row("PSDT 11b", Io, cmd(read(0, 1).u8(1, 0xc0)), Status(INVALID_FIELD)),
            row("fused", Io, cmd(read(0, 1).u8(1, 0x41)), Status(INVALID_FIELD)),
            row("a descriptor that is too short", Io, cmd(Sqe::new(2, 1).lba(0, 8).there(512)), Status(SGL_LENGTH)),
            row("a descriptor that is too long", Io, cmd(Sqe::new(2, 1).lba(0, 8).there(8192)), Status(SGL_LENGTH)),
            row("a read into the capsule", Io, cmd(Sqe::new(2, 1).lba(0, 1).here(0, 512)), Status(SGL_TYPE)),
            row("a descriptor of memory", Io, cmd(Sqe::new(2, 1).lba(0, 1).u32(32, 512)), Status(SGL_TYPE)),
            row("a list of descriptors", Io, cmd(Sqe::new(2, 1).lba(0, 1).u32(32, 512).u8(39, 0x20)), Status(SGL_TYPE)),
            row("an offset outside of the capsule", Io, capsule(write(0, 1).here(512, 512), &[0; 512]), Status(SGL_OFFSET)),
            row("data that is not in the capsule", Io, cmd(write(0, 1).here(0, 512)), Status(SGL_OFFSET)),
            row("less data than blocks", Io, capsule(write(0, 8).here(0, 512), &[0; 512]), Status(SGL_LENGTH)),
            row("connect on a connected queue", Io, capsule(connect_sqe(1, 31, 0), &connect_data(1, "", HOST)), Status(SQ_ERROR)),
            row("a property on an I/O queue", Io, cmd(property_get(0, true)), Status(INVALID_OPCODE)),
            row("disconnect", Io, cmd(Sqe::fabrics(8)), Status(0)),
            row("disconnect of another format", Io, cmd(Sqe::fabrics(8).u16(40, 1)), Status(CONNECT_FORMAT)),
            row("authentication that was not asked for", Io, cmd(Sqe::fabrics(5)), Status(INVALID_OPCODE)),
        ],
        &[0, 3],
    );
}

#[test]
fn admin_commands() {
    let feature = |id: u32, select: u32| Sqe::new(0x0a, 0).dword(10, id | select << 8);
    let set = |id: u32, value: u32| Sqe::new(0x09, 0).dword(10, id).dword(11, value);
    check_all(
        &[
            row(
                "identify controller",
                Admin,
                cmd(identify(1, 0)),
                Data(
                    4096,
                    vec![
                        (0, vec![0x0f, 0x1d, 0x0f, 0x1d]),
                        (24, b"Amazon Elastic Block Store".to_vec()),
                        (77, vec![8]),
                        (80, vec![0, 0, 2, 0]),
                        (111, vec![1]),
                        (512, vec![0x66, 0x44]),
                        (516, vec![1, 0, 0, 0]),
                        (520, vec![0x9d, 0]),
                        (525, vec![7]),
                    ],
                ),
            ),
            row(
                "identify namespace",
                Admin,
                cmd(identify(0, 1)),
                Data(4096, vec![(0, BLOCKS.to_le_bytes().to_vec()), (26, vec![0]), (33, vec![9]), (128, vec![0, 0, 9, 0])]),
            ),
            row("active namespaces", Admin, cmd(identify(2, 0)), Data(4096, vec![(0, vec![1, 0, 0, 0, 0, 0, 0, 0])])),
            row("active namespaces above the last", Admin, cmd(identify(2, 1)), Data(4096, vec![(0, vec![0; 4096])])),
            row("active namespaces above FFFFFFFEh", Admin, cmd(identify(2, 0xffff_fffe)), Status(INVALID_NAMESPACE)),
            row(
                "descriptors",
                Admin,
                cmd(identify(3, 1)),
                Data(4096, vec![(0, vec![2, 16, 0, 0]), (20, vec![4, 1, 0, 0, 0]), (25, vec![0; 8])]),
            ),
            row("descriptors of no namespace", Admin, cmd(identify(3, 2)), Status(INVALID_NAMESPACE)),
            row("namespace of the NVM command set", Admin, cmd(identify(5, 1)), Data(4096, vec![])),
            row("namespace of another command set", Admin, cmd(identify(5, 1).dword(11, 1 << 24)), Status(INVALID_FIELD)),
            row("controller of the NVM command set", Admin, cmd(identify(6, 0)), Data(4096, vec![(0, vec![8, 0])])),
            row("active namespaces of the NVM command set", Admin, cmd(identify(7, 0)), Data(4096, vec![(0, vec![1, 0, 0, 0])])),
            row("namespace of any command set", Admin, cmd(identify(8, 1)), Data(4096, vec![(14, vec![1])])),
            row("identify namespace 0", Admin, cmd(identify(0, 0)), Status(INVALID_NAMESPACE)),
            row("identify of an unknown structure", Admin, cmd(identify(0x7e, 1)), Status(INVALID_FIELD)),
            row("identify with a short descriptor", Admin, cmd(Sqe::new(6, 0).dword(10, 1).there(512)), Status(SGL_LENGTH)),
            row(
                "supported log pages",
                Admin,
                cmd(log(0, 256)),
                Data(1024, vec![(0, vec![1, 0, 0, 0, 1]), (0x0c * 4, vec![1]), (0xd0 * 4, vec![1])]),
            ),
            row("error log", Admin, cmd(log(1, 16)), Data(64, vec![])),
            rows(
                "a refused command is in the error log",
                Admin,
                vec![
                    (cmd(identify(0x7e, 1)), Status(INVALID_FIELD)),
                    (
                        cmd(log(1, 32)),
                        Data(128, vec![(0, vec![1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x77, 0]), (12, vec![0x04, 0x80]), (64, vec![0; 64])]),
                    ),
                    (cmd(log(2, 128)), Data(512, vec![(176, vec![1, 0])])),
                ],
            ),
            row("health", Admin, cmd(log(2, 128)), Data(512, vec![(0, vec![0])])),
            row("health of no namespace", Admin, cmd(log(2, 128).u32(4, 9)), Status(INVALID_NAMESPACE)),
            row("firmware", Admin, cmd(log(3, 128)), Data(512, vec![(0, vec![1]), (8, b"1.0     ".to_vec())])),
            row("changed namespaces", Admin, cmd(log(4, 1024)), Data(4096, vec![(0, vec![0; 4096])])),
            row("effects", Admin, cmd(log(5, 1024)), Data(4096, vec![(6 * 4, vec![1]), (1024 + 4, vec![3]), (1024 + 5 * 4, vec![1])])),
            row(
                "access",
                Admin,
                cmd(log(0x0c, 13)),
                Data(52, vec![(8, vec![1, 0]), (16, vec![1]), (20, vec![1]), (32, vec![1]), (48, vec![1])]),
            ),
            row("features", Admin, cmd(log(0x12, 256)), Data(1024, vec![(0x0b * 4, vec![1])])),
            row(
                "EBS statistics, as long as Amazon's tool asks",
                Admin,
                cmd(log(0xd0, 1025)),
                Data(4100, vec![(0, vec![0x10, 0xb5, 0x23, 0x3c])]),
            ),
            row("no such log page", Admin, cmd(log(0x70, 1)), Status(INVALID_LOG_PAGE)),
            row("a log beyond its end", Admin, cmd(log(2, 1).dword(12, 516)), Status(INVALID_FIELD)),
            row("a log from an odd byte", Admin, cmd(log(2, 1).dword(12, 2)), Status(INVALID_FIELD)),
            row("a log from its middle", Admin, cmd(log(3, 2).dword(12, 8)), Data(8, vec![(0, b"1.0     ".to_vec())])),
            row("a log over MDTS", Admin, cmd(Sqe::new(2, 0).dword(10, 0xffff_0002).dword(11, 0xffff).there(4)), Status(INVALID_FIELD)),
            row("number of queues", Admin, cmd(set(7, 0x0003_0003)), Value(0x000f_000f)),
            row("number of queues FFFFh", Admin, cmd(set(7, 0xffff)), Status(INVALID_FIELD)),
            row("write cache", Admin, cmd(feature(6, 0)), Value(1)),
            row("write cache off", Admin, cmd(set(6, 0)), Status(0x10e)),
            row("a feature that is saved", Admin, cmd(set(0x8000_000b, 0)), Status(0x10d)),
            row("an unknown feature", Admin, cmd(feature(0x7e, 0)), Status(INVALID_FIELD)),
            row("an unknown feature set", Admin, cmd(set(0x7e, 0)), Status(INVALID_FIELD)),
            rows(
                "keep alive timeout",
                Admin,
                vec![(cmd(set(0x0f, 10_000)), Status(0)), (cmd(feature(0x0f, 0)), Value(10_000)), (cmd(Sqe::new(0x18, 0)), Status(0))],
            ),
            row("host identifier", Admin, cmd(feature(0x81, 0).there(16)), Data(16, vec![(0, vec![7; 16])])),
            rows("events", Admin, vec![(cmd(set(0x0b, 0x100)), Status(0)), (cmd(feature(0x0b, 0)), Value(0x100))]),
            row("abort of nothing", Admin, cmd(Sqe::new(8, 0).dword(10, 0x1234_0000)), Value(1)),
            row("a reserved command", Admin, cmd(Sqe::new(0x1f, 0)), Status(INVALID_OPCODE)),
            row("create an I/O queue", Admin, cmd(Sqe::new(5, 0)), Status(INVALID_OPCODE)),
            row("format", Admin, cmd(Sqe::new(0x80, 1)), Status(INVALID_OPCODE)),
            row(
                "a read on the admin queue is Get Log Page",
                Admin,
                cmd(Sqe::new(2, 1).dword(10, 0x007f_0099).there(512)),
                Status(INVALID_LOG_PAGE),
            ),
            row("disconnect of the admin queue", Admin, cmd(Sqe::fabrics(8)), Status(INVALID_OPCODE)),
            row("CAP", Admin, cmd(property_get(0, true)), Value(255 | 1 << 16 | 20 << 24 | 1 << 37 | 1 << 59)),
            row("CAP of four bytes", Admin, cmd(property_get(0, false)), Status(INVALID_FIELD)),
            row("VS", Admin, cmd(property_get(8, false)), Value(0x0002_0000)),
            row("CC", Admin, cmd(property_get(0x14, false)), Value(0x0046_0001)),
            row("CSTS", Admin, cmd(property_get(0x1c, false)), Value(1)),
            row("CRTO", Admin, cmd(property_get(0x68, false)), Value(20)),
            row("no such property", Admin, cmd(property_get(0x30, false)), Status(INVALID_FIELD)),
            row("VS cannot be set", Admin, cmd(property_set(8, 0)), Status(INVALID_FIELD)),
            rows(
                "shutdown ends commands, and a new enable lets them again",
                Admin,
                vec![
                    (cmd(property_set(0x14, 0x0046_4001)), Status(0)),
                    (cmd(identify(1, 0)), Status(SQ_ERROR)),
                    (cmd(property_set(0x14, 0)), Status(0)),
                    (cmd(property_get(0x1c, false)), Becomes(8)),
                    (cmd(property_set(0x14, 0x0046_0001)), Status(0)),
                    (cmd(property_get(0x1c, false)), Value(1)),
                    (cmd(identify(1, 0)), Data(4096, vec![])),
                ],
            ),
            rows(
                "a page size that CAP does not offer",
                Admin,
                vec![(cmd(property_set(0x14, 0)), Status(0)), (cmd(property_set(0x14, 0x0046_0081)), Status(INVALID_FIELD))],
            ),
        ],
        &[0, 3],
    );
}

#[test]
fn connecting() {
    let connect = |queue: u16, entries: u16, data: Vec<u8>| capsule(connect_sqe(queue, entries, 0), &data);
    let nqn = volume_nqn("ram");
    let good = || connect_data(0xffff, &volume_nqn("ram"), HOST);
    let mut endless = good();
    endless[512..768].fill(b'x');
    check_all(
        &[
            row("ICReq", Socket, icreq(0, 0, 0), IcResp(0)),
            row("ICReq with both digests", Socket, icreq(0, 0, 3), IcResp(3)),
            row("ICReq with the largest alignment", Socket, icreq(0, 31, 0), IcResp(0)),
            row("ICReq of another format", Socket, icreq(1, 0, 0), Term(6, 8)),
            row("ICReq with an alignment that cannot be", Socket, icreq(0, 32, 0), Term(1, 10)),
            row("a command before ICReq", Socket, cmd(Sqe::new(0, 1)), Term(2, 0)),
            row("a second ICReq", Socket, [icreq(0, 0, 0), icreq(0, 0, 0)].concat(), IcResp(0)),
            rows("a second ICReq, answered", Socket, vec![(icreq(0, 0, 0), IcResp(0)), (icreq(0, 0, 0), Term(2, 0))]),
            row("connect with data in the capsule", Ready, connect(0, 31, good()), Status(0)),
            rows(
                "connect with data by R2T",
                Ready,
                vec![(cmd(connect_sqe(0, 31, 0).u8(39, 0x5a)), R2t(1024)), (h2c_data(CID, 0xffff, 0, &good(), true), Status(0))],
            ),
            row("connect without data", Ready, cmd(connect_sqe(0, 31, 0)), Status(SGL_OFFSET)),
            row("a command before connect", Ready, cmd(identify(1, 0)), Status(SQ_ERROR)),
            row("a property before connect", Ready, cmd(property_get(0, true)), Status(SQ_ERROR)),
            row("another record format", Ready, capsule(connect_sqe(0, 31, 0).u16(40, 1), &good()), Status(CONNECT_FORMAT)),
            row("an empty queue", Ready, connect(0, 0, good()), Status(CONNECT_INVALID)),
            row("a queue deeper than CAP", Ready, connect(0, 256, good()), Status(CONNECT_INVALID)),
            row("a chosen controller", Ready, connect(0, 31, connect_data(5, &nqn, HOST)), Status(CONNECT_INVALID)),
            row("no such subsystem", Ready, connect(0, 31, connect_data(0xffff, "nqn.2020-01.org.none:x", HOST)), Status(CONNECT_INVALID)),
            row("no such volume", Ready, connect(0, 31, connect_data(0xffff, &volume_nqn("none"), HOST)), Status(CONNECT_INVALID)),
            row("a host without an NQN", Ready, connect(0, 31, connect_data(0xffff, &nqn, "")), Status(CONNECT_INVALID)),
            row("a host whose NQN has no end", Ready, connect(0, 31, endless), Status(CONNECT_INVALID)),
            row(
                "a host that is not listed",
                Ready,
                connect(0, 31, connect_data(0xffff, &volume_nqn("listed"), HOST)),
                Status(CONNECT_HOST),
            ),
            row("a host that is listed", Ready, connect(0, 31, connect_data(0xffff, &volume_nqn("listed"), OTHER)), Status(0)),
            row("another host's volume", Ready, connect(0, 31, connect_data(0xffff, &volume_nqn("own"), HOST)), Status(CONNECT_HOST)),
            row("an I/O queue of no controller", Ready, connect(1, 31, connect_data(0x7777, &nqn, HOST)), Status(CONNECT_INVALID)),
        ],
        &[0],
    );
}

#[test]
fn an_io_queue_belongs_to_the_host_of_its_controller() {
    let dir = tempfile::tempdir().unwrap();
    let settings = TargetSettings { listen: ([127, 0, 0, 1], 0).into(), dir: dir.path().join("t"), images: dir.path().join("i") };
    let target = Target::start_with(settings, &TargetOptions { shards: 1, ..TargetOptions::default() }).unwrap();
    for id in ["one", "two"] {
        let access = Access::Shared(Vec::new());
        target.volume_put(VolumeSpec { id: id.into(), size_bytes: SIZE, access, ram: true, ..VolumeSpec::default() }).unwrap();
    }
    let address = target.local_addr();
    let (mut admin, controller) = Raw::admin(address, &volume_nqn("one"), 0);
    for (queue, volume, host, expected) in [
        (1, "one", OTHER, CONNECT_HOST),
        (1, "two", HOST, CONNECT_INVALID),
        (17, "one", HOST, CONNECT_INVALID),
        (1, "one", HOST, 0),
        (1, "one", HOST, SQ_ERROR),
        (16, "one", HOST, 0),
    ] {
        let mut io = Raw::ready(address, 0);
        let outcome = io.run(connect_sqe(queue, 31, 0), &connect_data(controller, &volume_nqn(volume), host));
        let Outcome::End { status, .. } = outcome else { panic!("{outcome:?}") };
        assert_eq!(status, expected, "queue {queue} of {volume} for {host}");
        if expected == 0 {
            std::mem::forget(io);
        }
    }
    // Another identifier under the same name is another host.
    let mut data = connect_data(controller, &volume_nqn("one"), HOST);
    data[0] ^= 1;
    assert!(matches!(Raw::ready(address, 0).run(connect_sqe(3, 31, 0), &data), Outcome::End { status: CONNECT_HOST, .. }));
    assert!(target.counters().hosts_refused >= 2);
    // Both hosts may have controllers of their own, and the first goes on.
    let mut second = Raw::ready(address, 0);
    assert!(matches!(second.run(connect_sqe(0, 31, 0), &connect_data(0xffff, &volume_nqn("one"), OTHER)), Outcome::End { status: 0, .. }));
    assert!(matches!(admin.run(Sqe::new(0x18, 0), &[]), Outcome::End { status: 0, .. }));
}

#[test]
fn broken_pdus_end_the_connection_with_the_right_word() {
    let lie = |bytes: Vec<u8>, at: usize, value: &[u8]| {
        let mut bytes = bytes;
        bytes[at..at + value.len()].copy_from_slice(value);
        [icreq(0, 0, 0), bytes].concat()
    };
    let flush = || cmd(Sqe::new(0, 1));
    let mut table = vec![];
    for (name, bytes, expect) in [
        ("PDU type 0Fh", lie(flush(), 0, &[0x0f]), Term(1, 0)),
        ("a controller's R2T", lie(pdu(9, 0, &[0; 16], &[]), 0, &[9]), Term(1, 0)),
        ("a controller's response", lie(pdu(5, 0, &[0; 16], &[]), 0, &[5]), Term(1, 0)),
        ("HLEN of a capsule that is not 72", lie(flush(), 2, &[24]), Term(1, 2)),
        ("HLEN 0", lie(flush(), 2, &[0]), Term(1, 2)),
        ("PLEN below HLEN", lie(flush(), 4, &[8, 0, 0, 0]), Term(1, 4)),
        ("PLEN 0", lie(flush(), 4, &[0, 0, 0, 0]), Term(1, 4)),
        ("PLEN of 4 GiB, refused at once", lie(flush(), 3, &[72, 0xff, 0xff, 0xff, 0xff]), Term(1, 4)),
        ("more data in a capsule than IOCCSZ", lie(flush(), 3, &[72, 0x49, 0x20, 0, 0]), Term(1, 4)),
        ("PDO before the header's end", lie(capsule(Sqe::new(1, 1), &[0; 512]), 3, &[8]), Term(1, 3)),
        ("PDO beyond the PDU", lie(capsule(Sqe::new(1, 1), &[0; 8]), 3, &[0xff]), Term(1, 3)),
        ("a header digest that was not agreed on", lie(flush(), 1, &[1]), Term(1, 1)),
        ("a data digest that was not agreed on", lie(capsule(Sqe::new(1, 1), &[0; 512]), 1, &[2]), Term(1, 1)),
        ("data for no R2T", lie(h2c_data(1, 9, 0, &[0; 512], true), 0, &[6]), Term(1, 10)),
        ("more data than MAXH2CDATA", lie(h2c_data(1, 9, 0, &[0; 8], true), 4, &0x0002_0019_u32.to_le_bytes()), Term(5, 4)),
        ("a data length that is not the PDU's", lie(h2c_data(1, 9, 0, &[0; 8], true), 16, &[9, 0, 0, 0]), Term(1, 16)),
    ] {
        table.push(rows(name, Socket, vec![(bytes, IcResp(0)), (vec![], expect)]));
    }
    table.push(row("the host ends it", Ready, pdu(2, 0, &[1; 16], &[]), Closed));
    let later = |len: u32| (cmd(write(0, len / 512).there(len)), R2t(len));
    for (name, bytes, expect) in [
        ("data from another offset", h2c_data(CID, 0xffff, 512, &[0; 512], true), Term(4, 12)),
        ("more data than was asked for", h2c_data(CID, 0xffff, 0, &[0; 8192], true), Term(4, 16)),
        ("data of another command", h2c_data(CID + 1, 0xffff, 0, &[0; 4096], true), Term(1, 8)),
        ("data with another tag", h2c_data(CID, 0x1234, 0, &[0; 4096], true), Term(1, 10)),
        ("the last data too early", h2c_data(CID, 0xffff, 0, &[0; 512], true), Term(1, 1)),
        ("all data, and none of it the last", h2c_data(CID, 0xffff, 0, &[0; 4096], false), Term(1, 1)),
    ] {
        table.push(rows(name, Io, vec![later(4096), (bytes, expect)]));
    }
    check_all(&table, &[0]);
}

#[test]
fn damaged_digests() {
    let dir = tempfile::tempdir().unwrap();
    let settings = TargetSettings { listen: ([127, 0, 0, 1], 0).into(), dir: dir.path().join("t"), images: dir.path().join("i") };
    let target = Target::start(settings).unwrap();
    let access = Access::Shared(Vec::new());
    target.volume_put(VolumeSpec { id: "v".into(), size_bytes: SIZE, access, ram: true, ..VolumeSpec::default() }).unwrap();
    let (_admin, mut io) = Raw::io(target.local_addr(), &volume_nqn("v"), 3);
    let good = put(0, 5, 8);
    assert!(matches!(
        {
            io.send_pdu(&good);
            io.outcome()
        },
        Outcome::End { status: 0, .. }
    ));
    // A damaged data digest fails the command, which may be tried again; nothing was written.
    let mut damaged = capsule(write(0, 8).here(0, 4096), &[6; 4096]);
    let plen = damaged.len() as u32 + 8;
    damaged[1] = 3;
    damaged[3] = 76;
    damaged[4..8].copy_from_slice(&plen.to_le_bytes());
    let header_digest = wire::crc32c(&damaged[..72]).to_le_bytes();
    damaged.splice(72..72, header_digest);
    damaged.extend_from_slice(&[0; 4]);
    io.send(&damaged);
    assert!(matches!(io.outcome(), Outcome::End { status: 0x022, .. }));
    let Outcome::End { status: 0, data, .. } = io.run(read(0, 8), &[]) else { panic!() };
    assert_eq!(data, [5; 4096]);
    assert_eq!(target.counters().data_digest_errors, 1);
    // A damaged header digest ends the connection: nobody knows what the header said.
    damaged[72] ^= 1;
    io.send(&damaged);
    assert!(matches!(io.outcome(), Outcome::Term { fes: 3, .. }));
    assert_eq!(io.outcome(), Outcome::Closed);
}

#[test]
fn events_keep_alive_and_queue_limits() {
    let dir = tempfile::tempdir().unwrap();
    let settings = TargetSettings { listen: ([127, 0, 0, 1], 0).into(), dir: dir.path().join("t"), images: dir.path().join("i") };
    let target = Target::start(settings).unwrap();
    let access = Access::Shared(Vec::new());
    let spec = VolumeSpec { id: "v".into(), size_bytes: SIZE, access, ram: true, ..VolumeSpec::default() };
    target.volume_put(spec.clone()).unwrap();
    let address = target.local_addr();
    let (mut admin, _) = Raw::admin(address, &volume_nqn("v"), 0);
    let ok = |outcome: Outcome| assert!(matches!(outcome, Outcome::End { status: 0, .. }), "{outcome:?}");
    ok(admin.run(Sqe::new(9, 0).dword(10, 0x0b).dword(11, 0x100), &[]));
    for cid in 0..4_u16 {
        admin.send_pdu(&cmd(Sqe::new(0x0c, 0).u16(2, cid)));
    }
    let fifth = admin.run(Sqe::new(0x0c, 0).u16(2, 4), &[]);
    assert!(matches!(fifth, Outcome::End { status: 0x105, .. }), "{fifth:?}");
    let twice = admin.run(Sqe::new(0x18, 0).u16(2, 0), &[]);
    assert!(matches!(twice, Outcome::End { status: 0x003, .. }), "an identifier in use: {twice:?}");
    // An abort ends the request and then itself.
    assert!(matches!(admin.run(Sqe::new(8, 0).u16(2, 9).dword(10, 3 << 16), &[]), Outcome::End { status: 0x007, .. }));
    assert!(matches!(admin.outcome(), Outcome::End { status: 0, dw0: 0, .. }));
    // A resize is told once, and again after the log was read.
    for (round, size_bytes) in [2 * SIZE, 3 * SIZE].into_iter().enumerate() {
        target.volume_put(VolumeSpec { size_bytes, ..spec.clone() }).unwrap();
        assert!(matches!(admin.outcome(), Outcome::End { status: 0, dw0: 0x0004_0002, .. }), "round {round}");
        let Outcome::End { data, .. } = admin.run(log(4, 1024).u16(2, 9), &[]) else { panic!() };
        assert_eq!(data[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
        let Outcome::End { data, .. } = admin.run(identify(0, 1).u16(2, 9), &[]) else { panic!() };
        assert_eq!(data[..8], (size_bytes / 512).to_le_bytes());
    }
    // The discovery log tells its readers of new volumes.
    let (mut discovery, _) = Raw::admin(address, DISCOVERY, 0);
    ok(discovery.run(Sqe::new(9, 0).dword(10, 0x0b).dword(11, 1 << 31), &[]));
    discovery.send_pdu(&cmd(Sqe::new(0x0c, 0)));
    target.volume_put(VolumeSpec { id: "w".into(), ..spec }).unwrap();
    assert!(matches!(discovery.outcome(), Outcome::End { status: 0, dw0: 0x0070_f002, .. }));
    let Outcome::End { data, .. } = discovery.run(log(0x70, 768).u16(2, 9), &[]) else { panic!() };
    assert_eq!(data[8..16], 2_u64.to_le_bytes());
    // Silence beyond the keep alive timeout ends a controller.
    let mut silent = Raw::ready(address, 0);
    ok(silent.run(connect_sqe(0, 31, 200), &connect_data(0xffff, &volume_nqn("v"), HOST)));
    assert_eq!(silent.outcome(), Outcome::Closed);
    assert_eq!(target.counters().keep_alive_expired, 1);
    ok(admin.run(Sqe::new(0x18, 0).u16(2, 9), &[]));
}

#[test]
fn discovery() {
    check_all(
        &[
            row(
                "identify controller",
                Discovery,
                cmd(identify(1, 0)),
                Data(4096, vec![(111, vec![2]), (768, DISCOVERY.as_bytes().to_vec())]),
            ),
            row("identify namespace", Discovery, cmd(identify(0, 1)), Status(INVALID_FIELD)),
            row("the header of the log", Discovery, cmd(log(0x70, 256)), Data(1024, vec![(8, vec![3, 0, 0, 0])])),
            row("an entry", Discovery, cmd(log(0x70, 256).dword(12, 1024)), Data(1024, vec![(0, vec![3, 1, 2, 2]), (6, vec![0xff, 0xff])])),
            row("beyond the last entry", Discovery, cmd(log(0x70, 256).dword(12, 5120)), Status(INVALID_FIELD)),
            row("health", Discovery, cmd(log(2, 128)), Status(INVALID_LOG_PAGE)),
            row("supported log pages", Discovery, cmd(log(0, 256)), Data(1024, vec![(0x70 * 4, vec![1])])),
            row("an I/O queue", Ready, capsule(connect_sqe(1, 31, 0), &connect_data(1, DISCOVERY, HOST)), Status(CONNECT_INVALID)),
        ],
        &[0, 3],
    );
}

/// A volume in memory lends its bytes to sockets. When a host does not read its answers, and another one writes,
/// then every block that is answered is still whole: the old one or the new one.
#[test]
fn a_block_that_waits_for_a_slow_host_is_never_half_old_and_half_new() {
    let dir = tempfile::tempdir().unwrap();
    let settings = TargetSettings { listen: ([127, 0, 0, 1], 0).into(), dir: dir.path().join("t"), images: dir.path().join("i") };
    let target = Target::start_with(settings, &TargetOptions { shards: 1, ..TargetOptions::default() }).unwrap();
    let access = Access::Shared(Vec::new());
    target.volume_put(VolumeSpec { id: "v".into(), size_bytes: SIZE, access, ram: true, ..VolumeSpec::default() }).unwrap();
    let (_admin, mut writer) = Raw::io(target.local_addr(), &volume_nqn("v"), 0);
    let (_admin, mut reader) = Raw::io(target.local_addr(), &volume_nqn("v"), 0);
    let mut fill = |value: u8| {
        for part in 0..4 {
            let Outcome::R2t { ttag, .. } = writer.run(write(part * 2048, 2048).there(1 << 20), &[]) else { panic!() };
            for piece in pdus(&pieces(8, 131_072)) {
                let mut piece = with_tag(piece, ttag);
                piece[24..].fill(value);
                writer.send_pdu(&piece);
            }
            assert!(matches!(writer.outcome(), Outcome::End { status: 0, .. }));
        }
    };
    fill(1);
    for round in 0..4_u8 {
        // 32 MiB of answers: more than both ends of a socket hold.
        for cid in 0..32_u16 {
            reader.send_pdu(&cmd(read(u64::from(cid % 4) * 2048, 2048).u16(2, cid)));
        }
        fill(round + 2);
        let mut old = 0;
        for _ in 0..32 {
            let Outcome::End { status: 0, data, .. } = reader.outcome() else { panic!() };
            for block in data.chunks(512) {
                assert!(block.iter().all(|byte| *byte == block[0]), "round {round}: a torn block");
                assert!(block[0] == round + 1 || block[0] == round + 2, "round {round}: {}", block[0]);
                old += usize::from(block[0] == round + 1);
            }
        }
        // The writes were answered before the first answer was read: these blocks waited for longer than that.
        assert!(old > 0, "round {round}: no answer waited while the writes came, so nothing was tried");
    }
}
