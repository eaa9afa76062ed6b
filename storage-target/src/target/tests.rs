//! Target and initiator over loopback.

use super::*;
use crate::bytes::{put, u32_at, u64_at};
use crate::initiator::{Channel, LinkError, connect_entry, host_id};
use crate::io::mem::Chance;
use crate::nvme::{ConnectData, DISCOVERY_NQN, NvmeStatus, Sqe, fabrics, opcode, property};
use crate::{Command, Digests, Initiator, InitiatorSettings, Lba, volume_nqn};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

const HOST: &str = "nqn.2026-11.cardinal:card:card-a";
const OTHER: &str = "nqn.2026-11.cardinal:card:card-b";
const ID: &str = "vol-0123456789abcdef0";
const MIB: u64 = 1 << 20;

struct Rig {
    dir: tempfile::TempDir,
    target: Target,
}

impl Rig {
    fn new(shards: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("images")).unwrap();
        let target = start(dir.path(), 0, shards);
        Self { dir, target }
    }

    fn with_volume(shards: usize) -> Self {
        let rig = Self::new(shards);
        rig.target.volume_put(spec(ID)).unwrap();
        rig
    }

    fn settings(&self, id: &str, host: &str) -> InitiatorSettings {
        InitiatorSettings { address: self.target.local_addr(), subsystem_nqn: volume_nqn(id), host_nqn: host.into() }
    }

    fn initiator(&self) -> Initiator {
        connected(Initiator::start(self.settings(ID, HOST)).unwrap())
    }

    fn channel(&self) -> Channel {
        Channel::open(self.target.local_addr(), Digests::default()).unwrap()
    }

    /// A raw connection with an enabled controller.
    fn admin(&self) -> (Channel, u16) {
        let mut admin = self.channel();
        let controller = connect(&mut admin, 0, 0xffff, ID, HOST).unwrap();
        let set = Sqe::new(opcode::FABRICS, 0, fabrics::PROPERTY_SET.into());
        admin.run("enable", set.with(11, property::CC).with(12, 0x0046_0001), &[], 0).unwrap();
        (admin, controller)
    }

    fn io(&self) -> (Channel, Channel) {
        let (admin, controller) = self.admin();
        let mut io = self.channel();
        connect(&mut io, 1, controller, ID, HOST).unwrap();
        (admin, io)
    }
}

fn start(dir: &Path, port: u16, shards: usize) -> Target {
    let settings =
        TargetSettings { listen: SocketAddr::from(([127, 0, 0, 1], port)), dir: dir.join("storage"), images: dir.join("images") };
    Target::start_with(settings, &TargetOptions { shards, ..TargetOptions::default() }).unwrap()
}

fn spec(id: &str) -> VolumeSpec {
    VolumeSpec { id: id.into(), size_bytes: 64 * MIB, initiator_nqn: Some(HOST.into()), ..VolumeSpec::default() }
}

fn connected(initiator: Initiator) -> Initiator {
    assert!(initiator.wait_connected(Duration::from_secs(10)));
    initiator
}

fn connect(channel: &mut Channel, queue: u16, controller: u16, id: &str, host: &str) -> Result<u16, NvmeStatus> {
    let subsystem_nqn = if id == DISCOVERY_NQN { id.into() } else { volume_nqn(id) };
    let data = ConnectData { host_id: host_id(host), controller, subsystem_nqn, host_nqn: host.into() };
    status(channel.run("connect", connect_entry(queue, 31, Duration::ZERO), &data.encode(), 0)).map(|dw0| dw0 as u16)
}

fn status<T>(result: Result<(crate::nvme::Cqe, T), LinkError>) -> Result<u64, NvmeStatus> {
    match result {
        Ok((cqe, _)) => Ok(cqe.dw0),
        Err(LinkError::Refused { status, .. }) => Err(NvmeStatus(status.0 & 0x7ff)),
        Err(error) => panic!("{error:?}"),
    }
}

fn run(initiator: &Initiator, command: Command) -> Result<Vec<u8>, NvmeStatus> {
    // Shorter than the keep alive, which would wake a target that sleeps over its work.
    let patience = Duration::from_secs(if command == Command::Flush { 20 } else { 4 });
    let (sender, receiver) = mpsc::channel();
    initiator.submit(command, Box::new(move |result| drop(sender.send(result))));
    receiver.recv_timeout(patience).expect("no answer")
}

fn write(initiator: &Initiator, lba: u64, data: Vec<u8>) {
    run(initiator, Command::Write { lba: Lba(lba), data }).unwrap();
}

fn read(initiator: &Initiator, lba: u64, len: usize) -> Vec<u8> {
    run(initiator, Command::Read { lba: Lba(lba), len: len as u32 }).unwrap()
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut chance = Chance::new(seed);
    (0..len.div_ceil(8)).flat_map(|_| chance.next().to_le_bytes()).take(len).collect()
}

#[test]
fn data_of_every_size_comes_back_with_and_without_digests() {
    let rig = Rig::with_volume(3);
    for (header, data) in [(false, false), (true, false), (false, true), (true, true)] {
        let digests = Digests { header, data };
        let initiator = connected(Initiator::start_with_digests(rig.settings(ID, HOST), digests).unwrap());
        assert_eq!(initiator.size_bytes(), Some(64 * MIB));
        for len in [512, 4096, 8192, 8704, 65536, 131_072, 131_584, 1 << 20] {
            let content = pattern(len as u64, len);
            write(&initiator, 77, content.clone());
            run(&initiator, Command::Flush).unwrap();
            assert_eq!(read(&initiator, 77, len), content, "{len} bytes, {digests:?}");
            run(&initiator, Command::WriteZeroes { lba: Lba(78), blocks: (len / 512) as u32 }).unwrap();
            assert_eq!(read(&initiator, 77, 512), content[..512]);
            assert!(read(&initiator, 78, len).iter().all(|byte| *byte == 0));
            write(&initiator, 78, content.clone());
            run(&initiator, Command::Deallocate { lba: Lba(78), blocks: (len / 512) as u32 }).unwrap();
            assert!(read(&initiator, 78, len).iter().all(|byte| *byte == 0));
        }
        assert_eq!(initiator.counters().failed, 0);
    }
    let counters = rig.target.counters();
    assert_eq!((counters.protocol_errors, counters.data_digest_errors, counters.commands_failed), (0, 0, 0));
    assert!(counters.flushes > 0 && counters.zeroes > 0);
}

#[test]
fn many_commands_at_once_end_once_each_with_their_own_data() {
    let rig = Rig::with_volume(1);
    let initiator = rig.initiator();
    let (sender, receiver) = mpsc::channel();
    let sizes = [512, 4096, 16384, 300 * 512, 1 << 20];
    let at = |index: usize| (index * 2048 % (64 * 2048 - 2048)) as u64;
    for round in 0..4 {
        let commands = (0..60).map(|index| {
            let sender = sender.clone();
            let data = pattern(round * 1000 + index as u64, sizes[index % sizes.len()]);
            let end: crate::CommandEnd = Box::new(move |result| sender.send((index, result)).unwrap());
            (Command::Write { lba: Lba(at(index)), data }, end)
        });
        initiator.submit_all(commands);
        for _ in 0..60 {
            receiver.recv_timeout(Duration::from_secs(20)).unwrap().1.unwrap();
        }
        for index in 0..60 {
            let sender = sender.clone();
            let len = sizes[index % sizes.len()] as u32;
            initiator.submit(Command::Read { lba: Lba(at(index)), len }, Box::new(move |result| sender.send((index, result)).unwrap()));
        }
        for _ in 0..60 {
            let (index, result) = receiver.recv_timeout(Duration::from_secs(20)).unwrap();
            assert!(result.unwrap() == pattern(round * 1000 + index as u64, sizes[index % sizes.len()]));
        }
    }
}

#[test]
fn only_the_volumes_host_may_connect() {
    let rig = Rig::with_volume(2);
    rig.target.volume_put(VolumeSpec { initiator_nqn: None, ..spec("vol-nobody") }).unwrap();
    for (id, host, expected) in [
        (ID, OTHER, NvmeStatus::CONNECT_HOST),
        ("vol-nobody", HOST, NvmeStatus::CONNECT_HOST),
        ("vol-none", HOST, NvmeStatus::CONNECT_INVALID),
    ] {
        assert_eq!(connect(&mut rig.channel(), 0, 0xffff, id, host), Err(expected));
    }
    assert_eq!(rig.target.counters().hosts_refused, 2);
    let (_admin, controller) = rig.admin();
    assert_eq!(connect(&mut rig.channel(), 1, controller, ID, OTHER), Err(NvmeStatus::CONNECT_HOST));
    assert_eq!(rig.target.counters().hosts_refused, 3);
    // The same NQN with another host identifier is another host, too.
    let data = ConnectData { host_id: [9; 16], controller, subsystem_nqn: volume_nqn(ID), host_nqn: HOST.into() };
    let entry = connect_entry(1, 31, Duration::ZERO);
    assert_eq!(status(rig.channel().run("", entry, &data.encode(), 0)), Err(NvmeStatus::CONNECT_HOST));
    assert_eq!(connect(&mut rig.channel(), 1, controller + 1, ID, HOST), Err(NvmeStatus::CONNECT_INVALID));
    assert!(connect(&mut rig.channel(), 1, controller, ID, HOST).is_ok());
}

#[test]
fn an_initiator_that_lost_the_volume_is_cut_and_never_writes_again() {
    let rig = Rig::with_volume(1);
    let first = rig.initiator();
    write(&first, 0, vec![1; 4096]);
    rig.target.volume_put(VolumeSpec { initiator_nqn: Some(OTHER.into()), ..spec(ID) }).unwrap();
    let (sender, receiver) = mpsc::channel();
    let command = Command::Write { lba: Lba(0), data: vec![2; 4096] };
    first.submit(command, Box::new(move |result| drop(sender.send(result))));
    let second = connected(Initiator::start(rig.settings(ID, OTHER)).unwrap());
    assert!(receiver.recv_timeout(Duration::from_millis(300)).is_err(), "it waits");
    assert_eq!(read(&second, 0, 4096), vec![1; 4096]);
    assert!(!first.is_connected());
    assert_eq!(rig.target.counters().controllers_cut, 1);
    first.stop();
    assert_eq!(receiver.recv().unwrap(), Err(NvmeStatus::ABORTED_SQ_DELETION));
}

#[test]
fn a_new_connection_of_the_host_takes_over_from_the_old_one() {
    let rig = Rig::with_volume(1);
    let (mut admin, mut io) = rig.io();
    let initiator = rig.initiator();
    let flush = io.run("flush", Sqe::new(opcode::FLUSH, 1, 1), &[], 0);
    assert!(matches!(flush, Err(LinkError::Socket(_))));
    assert!(admin.run("keep alive", Sqe::new(opcode::KEEP_ALIVE, 1, 0), &[], 0).is_err());
    write(&initiator, 0, vec![1; 512]);
}

#[test]
fn commands_get_the_status_of_the_standard() {
    let rig = Rig::with_volume(1);
    let (_admin, mut io) = rig.io();
    let blocks = (64 * MIB / 512) as u32;
    let rw = |opcode: u8, lba: u32, count: u32| Sqe::new(opcode, 1, 1).with(10, lba).with(12, count - 1);
    let mut wrong_namespace = rw(opcode::WRITE, 0, 1);
    wrong_namespace.0[4] = 2;
    let mut fused = rw(opcode::WRITE, 0, 1);
    fused.0[1] |= 1;
    for (sqe, data, expected) in [
        (rw(opcode::WRITE, 0, 8), 4096, Ok(0)),
        (rw(opcode::WRITE, blocks - 8, 8), 4096, Ok(0)),
        (rw(opcode::WRITE, blocks - 7, 8), 4096, Err(NvmeStatus::LBA_RANGE)),
        (rw(opcode::WRITE, 0, 1).with(11, u32::MAX), 512, Err(NvmeStatus::LBA_RANGE)),
        (rw(opcode::WRITE, 0, 8), 512, Err(NvmeStatus::SGL_LENGTH)),
        (wrong_namespace, 512, Err(NvmeStatus::INVALID_NAMESPACE)),
        (fused, 512, Err(NvmeStatus::INVALID_FIELD)),
        (rw(opcode::WRITE_ZEROES, blocks - 1, 2), 0, Err(NvmeStatus::LBA_RANGE)),
        (rw(0x04, 0, 1), 0, Err(NvmeStatus::INVALID_OPCODE)),
        (rw(opcode::WRITE, 0, 4096), 512, Err(NvmeStatus::INVALID_FIELD)),
        (Sqe::new(opcode::FABRICS, 1, fabrics::CONNECT.into()), 0, Err(NvmeStatus::SEQUENCE)),
    ] {
        assert_eq!(status(io.run("", sqe, &vec![0; data], 0)), expected, "{sqe:?}");
    }
    assert_eq!(status(io.run("", rw(opcode::READ, 0, 8), &[], 512)), Err(NvmeStatus::SGL_LENGTH));
    assert_eq!(status(io.run("", rw(opcode::READ, 0, 8), &[], 8192)), Err(NvmeStatus::SGL_LENGTH));
    // Dataset management: one good range, one outside.
    let mut ranges = vec![0; 32];
    put(&mut ranges, 4, &8_u32.to_le_bytes());
    put(&mut ranges, 20, &8_u32.to_le_bytes());
    put(&mut ranges, 24, &u64::from(blocks).to_le_bytes());
    let dsm = Sqe::new(opcode::DATASET_MANAGEMENT, 1, 1).with(11, 4);
    assert_eq!(status(io.run("", dsm.with(10, 0), &ranges[..16], 0)), Ok(0));
    assert_eq!(status(io.run("", dsm.with(10, 1), &ranges, 0)), Err(NvmeStatus::LBA_RANGE));
    // The connection is still good.
    assert_eq!(status(io.run("", rw(opcode::READ, 0, 8), &[], 4096)), Ok(0));
}

#[test]
fn discovery_names_the_volumes_of_the_host_and_no_others() {
    let rig = Rig::with_volume(2);
    rig.target.volume_put(VolumeSpec { initiator_nqn: Some(OTHER.into()), ..spec("vol-b") }).unwrap();
    let mut channel = rig.channel();
    connect(&mut channel, 0, 0xffff, DISCOVERY_NQN, HOST).unwrap();
    let set = Sqe::new(opcode::FABRICS, 0, fabrics::PROPERTY_SET.into()).with(11, property::CC).with(12, 0x0046_0001);
    channel.run("enable", set, &[], 0).unwrap();
    let log = Sqe::new(opcode::GET_LOG_PAGE, 0, 0).with(10, (3072 / 4 - 1) << 16 | 0x70);
    let page = channel.run("log", log, &[], 3072).unwrap().1;
    assert_eq!((u64_at(&page, 8), page.len()), (1, 3072));
    let nqn = volume_nqn(ID);
    assert_eq!(&page[1024 + 256..1024 + 256 + nqn.len()], nqn.as_bytes());
    let port = format!("{} ", rig.target.local_addr().port());
    assert_eq!(&page[1024 + 32..1024 + 32 + port.len()], port.as_bytes());
    // The next page begins where the first ended.
    let rest = Sqe::new(opcode::GET_LOG_PAGE, 0, 0).with(10, (1024 / 4 - 1) << 16 | 0x70).with(12, 1024);
    assert_eq!(channel.run("log", rest, &[], 1024).unwrap().1, page[1024..2048]);
}

#[test]
fn a_grown_volume_tells_its_host() {
    let rig = Rig::with_volume(1);
    let (mut admin, _) = rig.admin();
    admin.run("events", Sqe::new(opcode::SET_FEATURES, 0, 0).with(10, 0x0b).with(11, 1 << 8), &[], 0).unwrap();
    rig.target.volume_put(VolumeSpec { size_bytes: 128 * MIB, ..spec(ID) }).unwrap();
    let event = status(admin.run("event", Sqe::new(opcode::ASYNC_EVENT_REQUEST, 9, 0), &[], 0));
    assert_eq!(event, Ok(0x0004_0002));
    let page = admin.run("identify", Sqe::new(opcode::IDENTIFY, 0, 1), &[], 4096).unwrap().1;
    assert_eq!(u64_at(&page, 0), 128 * MIB / 512);
    assert!(matches!(rig.target.volume_put(spec(ID)), Err(TargetError::Shrink { .. })));
    drop(admin);
    let initiator = rig.initiator();
    assert_eq!(initiator.size_bytes(), Some(128 * MIB));
    write(&initiator, 128 * MIB / 512 - 8, vec![7; 4096]);
}

#[test]
fn specs_that_cannot_be_are_refused_and_puts_repeat() {
    let rig = Rig::with_volume(1);
    for bad in [
        VolumeSpec { id: "../x".into(), ..spec(ID) },
        VolumeSpec { id: String::new(), ..spec(ID) },
        VolumeSpec { size_bytes: 1000, ..spec("vol-a") },
        VolumeSpec { size_bytes: 0, ..spec("vol-a") },
        VolumeSpec { image: Some("../etc/passwd".into()), ..spec("vol-a") },
        VolumeSpec { image: Some("other".into()), ..spec(ID) },
    ] {
        assert!(matches!(rig.target.volume_put(bad.clone()), Err(TargetError::Invalid { .. })), "{bad:?}");
    }
    let missing = VolumeSpec { image: Some("none".into()), ..spec("vol-a") };
    assert!(matches!(rig.target.volume_put(missing), Err(TargetError::Image { .. })));
    rig.target.volume_put(spec(ID)).unwrap();
    assert_eq!(rig.target.volume_list(), [ID]);
    rig.target.volume_delete(ID).unwrap();
    rig.target.volume_delete(ID).unwrap();
    assert!(rig.target.volume_get(ID).is_none());
    let left: Vec<_> = std::fs::read_dir(rig.dir.path().join("storage/volumes")).unwrap().collect();
    assert!(left.is_empty());
}

#[test]
fn a_volume_under_load_can_be_deleted() {
    let rig = Rig::with_volume(1);
    let initiator = rig.initiator();
    let (sender, receiver) = mpsc::channel();
    for index in 0..400 {
        let sender = sender.clone();
        let command = Command::Write { lba: Lba(index % 64 * 2048), data: vec![1; 1 << 20] };
        initiator.submit(command, Box::new(move |result| drop(sender.send(result))));
    }
    receiver.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
    rig.target.volume_delete(ID).unwrap();
    assert_eq!(std::fs::read_dir(rig.dir.path().join("storage/volumes")).unwrap().count(), 0);
    assert_eq!(connect(&mut rig.channel(), 0, 0xffff, ID, HOST), Err(NvmeStatus::CONNECT_INVALID));
}

#[test]
fn a_clone_reads_through_to_the_image_and_never_copies_it() {
    let rig = Rig::new(1);
    let image = pattern(5, (33 * MIB + 512 + 100) as usize);
    std::fs::write(rig.dir.path().join("images/base.raw"), &image).unwrap();
    let clone = VolumeSpec { image: Some("base.raw".into()), ..spec(ID) };
    rig.target.volume_put(clone.clone()).unwrap();
    let allocated = || rig.target.volume_get(ID).unwrap().allocated_bytes;
    assert!(allocated() <= 64 * 1024, "{} bytes for a fresh clone", allocated());
    let initiator = rig.initiator();
    let mut whole = image.clone();
    whole.resize(64 * MIB as usize, 0);
    let read_all = |initiator: &Initiator| -> Vec<u8> { (0..64).flat_map(|at| read(initiator, at * 2048, 1 << 20)).collect() };
    assert!(read_all(&initiator) == whole);
    assert!(allocated() <= 64 * 1024, "reading copies nothing");
    let mut chance = Chance::new(11);
    let mut granules = std::collections::BTreeSet::new();
    for round in 0..60 {
        let lba = chance.below(64 * 2048 - 300);
        let data = pattern(round, 512 * (1 + chance.index(if round % 4 == 0 { 300 } else { 9 })));
        let start = (lba * 512) as usize;
        whole[start..start + data.len()].copy_from_slice(&data);
        granules.extend(start / 65536..(start + data.len()).div_ceil(65536));
        write(&initiator, lba, data);
    }
    assert!(read_all(&initiator) == whole);
    assert!(allocated() <= (granules.len() as u64 + 2) * 65536, "{} for {}", allocated(), granules.len());
    // The image's entry may go; another process goes on with the same content.
    std::fs::remove_file(rig.dir.path().join("images/base.raw")).unwrap();
    run(&initiator, Command::Flush).unwrap();
    let port = rig.target.local_addr().port();
    rig.target.stop();
    drop(rig.target);
    let target = start(rig.dir.path(), port, 1);
    assert!(read_all(&initiator) == whole);
    assert_eq!(target.volume_get(ID).unwrap().spec, clone);
}

/// Writes numbered blocks and remembers which were acknowledged.
struct Writer {
    acknowledged: Vec<u64>,
    next: u64,
    chance: Chance,
}

const WRITER_BLOCKS: usize = 4096;

impl Writer {
    fn new(seed: u64) -> Self {
        Self { acknowledged: vec![0; WRITER_BLOCKS], next: 1, chance: Chance::new(seed) }
    }

    fn block(number: u64, at: usize) -> Vec<u8> {
        format!("{number:>16}@{at:>15}").repeat(16).into_bytes()
    }

    /// Keeps some writes to distinct blocks under way until `until`.
    fn run(&mut self, initiator: &Initiator, until: Instant) {
        let (sender, receiver) = mpsc::channel();
        let mut busy = std::collections::HashMap::new();
        while Instant::now() < until || !busy.is_empty() {
            while busy.len() < 24 && Instant::now() < until {
                let at = self.chance.index(WRITER_BLOCKS);
                if busy.contains_key(&at) {
                    continue;
                }
                let sender = sender.clone();
                busy.insert(at, self.next);
                let command = Command::Write { lba: Lba(at as u64), data: Self::block(self.next, at) };
                initiator.submit(command, Box::new(move |result| drop(sender.send((at, result)))));
                self.next += 1;
                if self.chance.below(50) == 0 {
                    initiator.submit(Command::Flush, Box::new(|result| drop(result.unwrap())));
                }
            }
            let (at, result) = receiver.recv_timeout(Duration::from_secs(20)).expect("a write hangs");
            result.expect("a write failed");
            self.acknowledged[at] = busy.remove(&at).unwrap();
        }
    }

    fn verify(&self, initiator: &Initiator) {
        for (at, number) in self.acknowledged.iter().enumerate() {
            let expected = if *number == 0 { vec![0; 512] } else { Self::block(*number, at) };
            let found = read(initiator, at as u64, 512);
            assert!(found == expected, "block {at}: {}, not {number}", String::from_utf8_lossy(&found[..32]));
        }
    }
}

#[test]
fn a_restart_of_the_target_loses_no_write_and_fails_none() {
    let Rig { dir, mut target } = Rig::with_volume(2);
    let port = target.local_addr().port();
    let settings = InitiatorSettings { address: target.local_addr(), subsystem_nqn: volume_nqn(ID), host_nqn: HOST.into() };
    let initiator = connected(Initiator::start(settings).unwrap());
    let mut writer = Writer::new(21);
    for _ in 0..5 {
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| writer.run(&initiator, Instant::now() + Duration::from_millis(400)));
            std::thread::sleep(Duration::from_millis(150));
            target.stop();
            target = start(dir.path(), port, 2);
            writing.join().unwrap();
        });
        writer.verify(&initiator);
    }
    assert!(initiator.counters().connects >= 6 && initiator.counters().failed == 0);
}

/// Not a test: the process that `sigkill_…` kills.
#[test]
fn child_process() {
    let Ok(dir) = std::env::var("STORAGE_TARGET_CHILD") else { return };
    let (dir, port) = dir.split_once('=').unwrap();
    let _target = start(Path::new(dir), port.parse().unwrap(), 1);
    loop {
        std::thread::park();
    }
}

#[test]
fn sigkill_at_any_moment_loses_no_acknowledged_write() {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("SEED={seed}");
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("images")).unwrap();
    std::fs::write(dir.path().join("images/base"), vec![0; 3 << 20]).unwrap();
    let target = start(dir.path(), 0, 1);
    // A clone, so that the map is at stake as well.
    target.volume_put(VolumeSpec { image: Some("base".into()), ..spec(ID) }).unwrap();
    let address = target.local_addr();
    drop(target);
    let spawn = || {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "target::tests::child_process", "--nocapture", "--test-threads=1"])
            .env("STORAGE_TARGET_CHILD", format!("{}={}", dir.path().display(), address.port()))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut child = spawn();
    let settings = InitiatorSettings { address, subsystem_nqn: volume_nqn(ID), host_nqn: HOST.into() };
    let initiator = connected(Initiator::start(settings).unwrap());
    let (mut writer, mut chance) = (Writer::new(seed), Chance::new(seed ^ 1));
    for _ in 0..6 {
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| writer.run(&initiator, Instant::now() + Duration::from_millis(300)));
            std::thread::sleep(Duration::from_millis(chance.below(250)));
            child.kill().unwrap();
            child.wait().unwrap();
            child = spawn();
            writing.join().unwrap();
        });
        writer.verify(&initiator);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(initiator.counters().connects >= 2, "{:?}", initiator.counters());
}

#[test]
fn garbage_harms_nobody_else() {
    let rig = Rig::with_volume(2);
    let address = rig.target.local_addr();
    let initiator = rig.initiator();
    let mut writer = Writer::new(3);
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| writer.run(&initiator, Instant::now() + Duration::from_millis(1500)));
        let mut chance = Chance::new(99);
        let icreq = {
            let mut bytes = Vec::new();
            let header = crate::pdu::Header::IcReq { pfv: 0, hpda: 0, digests: Digests::default(), max_r2t: 0 };
            crate::pdu::encode(&mut bytes, &header, 0, Digests::default(), 1);
            bytes
        };
        for round in 0..1000_u64 {
            let Ok(mut stream) = TcpStream::connect(address) else { continue };
            let mut bytes = pattern(round, chance.index(600));
            match round % 4 {
                0 => {}
                // A true beginning, then anything.
                1 => bytes.splice(0..0, icreq.iter().copied()).for_each(drop),
                // A header that nearly is one.
                2 => {
                    let kind = chance.below(12) as u8;
                    let hlen = [24, 72, 128, 255][chance.index(4)];
                    bytes.splice(0..0, [kind, 0, hlen, 0]).for_each(drop);
                    bytes.splice(0..0, icreq.iter().copied()).for_each(drop);
                }
                // A command with any fields and in-capsule data.
                _ => {
                    bytes.resize(64, 0);
                    let mut head = Vec::new();
                    let header = crate::pdu::Header::Command { sqe: bytes.clone().try_into().unwrap() };
                    crate::pdu::encode(&mut head, &header, 0, Digests::default(), 1);
                    bytes = [icreq.clone(), head].concat();
                }
            }
            let _ = stream.write_all(&bytes);
            if round % 3 == 0 {
                stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
                let _ = stream.read(&mut [0; 256]);
            }
        }
        writing.join().unwrap();
    });
    writer.verify(&initiator);
    assert_eq!(initiator.counters().connects, 1, "the good connection never broke");
    assert!(rig.target.counters().protocol_errors > 100, "{:?}", rig.target.counters());
}

#[test]
fn garbage_from_a_connected_host_harms_only_itself() {
    let rig = Rig::new(1);
    for (id, ram) in [("vol-a", false), ("vol-b", false), ("vol-c", true)] {
        rig.target.volume_put(VolumeSpec { ram, ..spec(id) }).unwrap();
    }
    let good = connected(Initiator::start(rig.settings("vol-a", HOST)).unwrap());
    for seed in 0..120 {
        let bad = if seed % 2 == 0 { "vol-b" } else { "vol-c" };
        let mut admin = rig.channel();
        let controller = connect(&mut admin, 0, 0xffff, bad, HOST).unwrap();
        let set = Sqe::new(opcode::FABRICS, 0, fabrics::PROPERTY_SET.into());
        admin.run("enable", set.with(11, property::CC).with(12, 0x0046_0001), &[], 0).unwrap();
        let mut io = rig.channel();
        connect(&mut io, 1, controller, bad, HOST).unwrap();
        let mut chance = Chance::new(seed);
        let mut bytes = Vec::new();
        for _ in 0..20 {
            let mut sqe = [0; 64];
            put(&mut sqe, 0, &pattern(chance.next(), 64));
            sqe[0] = chance.below(12) as u8;
            sqe[1] = 0x40;
            put(&mut sqe, 4, &1_u32.to_le_bytes());
            sqe[39] = if chance.below(2) == 0 { 1 } else { 0x5a };
            if chance.below(2) == 0 {
                put(&mut sqe, 40, &chance.below(9).to_le_bytes());
                put(&mut sqe, 48, &(chance.below(300) as u32).to_le_bytes());
            }
            let header = crate::pdu::Header::Command { sqe };
            crate::pdu::encode(&mut bytes, &header, 0, Digests::default(), 1);
            if chance.below(3) == 0 {
                let (ttag, len) = (chance.below(30) as u16, 1 + chance.below(600) as u32);
                let cid = crate::bytes::u16_at(&sqe, 2);
                let offset = chance.below(2) as u32 * 512;
                let data = crate::pdu::Data { cid, ttag, offset, len, last: true, success: false };
                crate::pdu::encode(&mut bytes, &crate::pdu::Header::H2cData(data), len as usize, Digests::default(), 1);
                bytes.extend(pattern(seed, len as usize));
            }
        }
        let _ = (&*io.stream).write_all(&bytes);
        let _ = (&*admin.stream).write_all(&bytes[..bytes.len() / 2]);
        write(&good, seed, vec![seed as u8; 512]);
        assert_eq!(read(&good, seed, 512), vec![seed as u8; 512]);
    }
    assert_eq!(good.counters().connects, 1);
}

#[test]
fn a_broken_pdu_is_answered_with_a_termination_request() {
    let rig = Rig::with_volume(1);
    for (bytes, fes) in [
        (vec![9, 0, 24, 0, 24, 0, 0, 0], 1),             // R2T to a controller
        (vec![4, 0, 72, 72, 0xff, 0xff, 0xff, 0xff], 1), // 4 GiB
        (vec![6, 0, 24, 24, 0xff, 0xff, 0xff, 0xff], 5), // more data than the limit
        ([&[6, 0, 24, 24, 28, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 4, 0, 0, 0][..], &[0; 8]].concat(), 1), // no such tag
    ] {
        let channel = rig.channel();
        (&*channel.stream).write_all(&bytes).unwrap();
        let mut answer = Vec::new();
        let mut buffer = [0; 256];
        while answer.len() < 24 {
            let count = (&*channel.stream).read(&mut buffer).unwrap();
            assert!(count > 0, "closed without a word");
            answer.extend_from_slice(&buffer[..count]);
        }
        assert_eq!((answer[0], answer[2], crate::bytes::u16_at(&answer, 8)), (3, 24, fes), "{bytes:?}");
        assert_eq!(u32_at(&answer, 4) as usize, 24 + bytes.len().min(24));
        // A host that does not close is closed.
        let closed = (&*channel.stream).read(&mut buffer);
        assert!(matches!(closed, Ok(0)), "{closed:?}");
    }
}

#[test]
fn strangers_are_limited_in_number_and_connected_hosts_are_not() {
    let rig = Rig::with_volume(1);
    let initiator = rig.initiator();
    let strangers: Vec<TcpStream> = (0..100).map(|_| TcpStream::connect(rig.target.local_addr()).unwrap()).collect();
    write(&initiator, 0, vec![1; 512]);
    let deadline = Instant::now() + Duration::from_secs(5);
    while rig.target.counters().connections_over_limit < 36 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(rig.target.counters().connections_over_limit, 36);
    drop(strangers);
    std::thread::sleep(Duration::from_millis(50));
    let _ = rig.io();
}

#[test]
fn a_volumes_limits_hold() {
    let rig = Rig::new(1);
    rig.target.volume_put(VolumeSpec { iops: 500, ..spec(ID) }).unwrap();
    let initiator = rig.initiator();
    let measure = |count: u64, len: u32| {
        let (sender, receiver) = mpsc::channel();
        let start = Instant::now();
        for index in 0..count {
            let sender = sender.clone();
            let command = Command::Read { lba: Lba(index * 8), len };
            initiator.submit(command, Box::new(move |result| drop(sender.send(result.unwrap()))));
        }
        drop(sender);
        assert_eq!(receiver.iter().count() as u64, count);
        start.elapsed()
    };
    // The burst is a tenth of a second's worth.
    let took = measure(300, 4096);
    assert!((Duration::from_millis(450)..Duration::from_millis(900)).contains(&took), "{took:?}");
    rig.target.volume_put(VolumeSpec { throughput_mib_s: 20, ..spec(ID) }).unwrap();
    let took = measure(12, 1 << 20);
    assert!((Duration::from_millis(450)..Duration::from_millis(900)).contains(&took), "{took:?}");
    assert!(rig.target.counters().throttled > 200);
    rig.target.volume_put(spec(ID)).unwrap();
    assert!(measure(300, 4096) < Duration::from_millis(400));
}

#[test]
fn silence_beyond_the_keep_alive_ends_a_controller() {
    let rig = Rig::with_volume(1);
    let mut channel = rig.channel();
    let data = ConnectData { host_id: host_id(HOST), controller: 0xffff, subsystem_nqn: volume_nqn(ID), host_nqn: HOST.into() };
    channel.run("connect", connect_entry(0, 31, Duration::from_millis(200)), &data.encode(), 0).unwrap();
    assert!(rig.target.volume_get(ID).unwrap().connected);
    assert_eq!((&*channel.stream).read(&mut [0; 1]).unwrap(), 0);
    assert!(!rig.target.volume_get(ID).unwrap().connected);
    assert_eq!(rig.target.counters().keep_alive_expired, 1);
}
