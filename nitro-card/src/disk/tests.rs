//! A vhost-user frontend in this process, and a true target.

use std::os::unix::net::UnixListener;

use super::request::u64_at;
use super::*;
use storage_target::{Target, TargetSettings, VolumeSpec, volume_nqn};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Frontend, VhostUserFrontend as _};
use vhost::{VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

const HOST: &str = "nqn.2026-11.cardinal:card:card-a";
const ID: &str = "vol-0123456789abcdef0";
const SIZE: u64 = 256 << 20;

/// Not a test: a disk server and its target in a process of their own, for trials with a real guest.
/// `DISK_PROCESS` is what to run (target or disk), a folder, and the target's port.
#[test]
fn process() {
    let Ok(text) = std::env::var("DISK_PROCESS") else { return };
    let mut words = text.split_whitespace();
    let (what, dir) = (words.next().unwrap(), PathBuf::from(words.next().unwrap()));
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], words.next().unwrap().parse().unwrap()));
    tracing_subscriber::fmt().with_writer(io::stderr).init();
    let mut keep: (Option<Target>, Option<DiskServer>) = (None, None);
    if what == "target" {
        let settings = TargetSettings { listen: address, dir: dir.join("storage"), images: dir.join("images") };
        let target = Target::start(settings).unwrap();
        let spec = VolumeSpec {
            id: ID.into(),
            size_bytes: SIZE,
            image: words.next().map(Into::into),
            initiator_nqn: Some(HOST.into()),
            ..VolumeSpec::default()
        };
        target.volume_put(spec).unwrap();
        keep.0 = Some(target);
    } else {
        let settings = InitiatorSettings { address, subsystem_nqn: volume_nqn(ID), host_nqn: HOST.into() };
        keep.1 = Some(DiskServer::start(dir.join("disk.sock"), settings, ID.replace('-', ""), SIZE).unwrap());
    }
    eprintln!("{what} runs");
    loop {
        std::thread::park();
    }
}

const GUEST: u64 = 0x10_0000;
const USER: u64 = 0x7f00_0000_0000;
const MEMORY: u64 = 0x200_0000;
const QUEUE: u16 = 64;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Where the buffers of requests begin.
const BUFFERS: u64 = GUEST + 0x10_0000;
const PATIENCE: Duration = Duration::from_secs(20);

struct Rig {
    dir: tempfile::TempDir,
    target: Option<Target>,
    port: u16,
    /// What the machine binds.
    socket: PathBuf,
    listener: UnixListener,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("disk.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut rig = Self { dir, target: None, port: 0, socket, listener };
        rig.target_start();
        rig
    }

    fn target_start(&mut self) {
        let settings = TargetSettings {
            listen: std::net::SocketAddr::from(([127, 0, 0, 1], self.port)),
            dir: self.dir.path().join("storage"),
            images: self.dir.path().join("images"),
        };
        let target = Target::start(settings).unwrap();
        let spec = VolumeSpec { id: ID.into(), size_bytes: SIZE, initiator_nqn: Some(HOST.into()), ..VolumeSpec::default() };
        target.volume_put(spec).unwrap();
        self.port = target.local_addr().port();
        self.target = Some(target);
    }

    fn target_stop(&mut self) {
        self.target.take().unwrap().stop();
    }

    fn disk(&self) -> DiskServer {
        let address = std::net::SocketAddr::from(([127, 0, 0, 1], self.port));
        let settings = InitiatorSettings { address, subsystem_nqn: volume_nqn(ID), host_nqn: HOST.into() };
        DiskServer::start(self.socket.clone(), settings, ID.replace('-', ""), SIZE).unwrap()
    }
}

/// A driver of one ring, its memory, and the frontend of its machine.
struct Guest {
    file: std::fs::File,
    memory: GuestMemoryMmap,
    frontend: Option<Frontend>,
    kick: EventFd,
    call: EventFd,
    /// Requests offered so far, and completions seen so far.
    offered: u16,
    seen: u16,
    next_descriptor: u16,
}

impl Guest {
    fn new() -> Self {
        let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::empty()).unwrap();
        rustix::fs::ftruncate(&fd, MEMORY).unwrap();
        let file = std::fs::File::from(fd);
        let region = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), MEMORY as usize).unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(GUEST)).unwrap();
        Self {
            file,
            memory: GuestMemoryMmap::from_regions(vec![region]).unwrap(),
            frontend: None,
            kick: EventFd::new(0).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            offered: 0,
            seen: 0,
            next_descriptor: 0,
        }
    }

    const TABLE: u64 = GUEST;
    const AVAIL: u64 = GUEST + 0x4000;
    const USED: u64 = GUEST + 0x8000;

    /// What a machine does on each connection: the ring goes on from its used index.
    fn connect(&mut self, listener: &UnixListener) {
        let mut frontend = Frontend::from_stream(listener.accept().unwrap().0, RINGS.into());
        let features = frontend.get_features().unwrap();
        frontend.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        frontend.set_protocol_features(wanted).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_owner().unwrap();
        frontend.set_features(features & !(1 << VIRTIO_RING_F_EVENT_IDX)).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        };
        frontend.set_mem_table(&[region]).unwrap();
        self.frontend = Some(frontend);
        self.ring_start(self.used());
    }

    fn ring_start(&mut self, base: u16) {
        let frontend = self.frontend.as_mut().unwrap();
        let user = |address| address - GUEST + USER;
        frontend.set_vring_num(0, QUEUE).unwrap();
        frontend.set_vring_base(0, base).unwrap();
        let addresses = VringConfigData {
            queue_max_size: QUEUE,
            queue_size: QUEUE,
            flags: 0,
            desc_table_addr: user(Self::TABLE),
            used_ring_addr: user(Self::USED),
            avail_ring_addr: user(Self::AVAIL),
            log_addr: None,
        };
        frontend.set_vring_addr(0, &addresses).unwrap();
        frontend.set_vring_kick(0, &self.kick).unwrap();
        frontend.set_vring_call(0, &self.call).unwrap();
        frontend.set_vring_enable(0, true).unwrap();
    }

    fn used(&self) -> u16 {
        self.memory.load(GuestAddress(Self::USED + 2), Ordering::Acquire).unwrap()
    }

    fn put<const N: usize>(&self, at: u64, bytes: [u8; N]) {
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Offers a chain of (address, length, flags).
    fn offer(&mut self, chain: &[(u64, u32, u16)]) {
        let head = self.next_descriptor % QUEUE;
        for (index, (address, len, flags)) in chain.iter().enumerate() {
            let slot = self.next_descriptor % QUEUE;
            self.next_descriptor = self.next_descriptor.wrapping_add(1);
            let entry = Self::TABLE + u64::from(slot) * 16;
            let more = if index + 1 < chain.len() { NEXT } else { 0 };
            self.put(entry, address.to_le_bytes());
            self.put(entry + 8, len.to_le_bytes());
            self.put(entry + 12, (flags | more).to_le_bytes());
            self.put(entry + 14, ((slot + 1) % QUEUE).to_le_bytes());
        }
        self.put(Self::AVAIL + 4 + u64::from(self.offered % QUEUE) * 2, head.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        self.memory.store(self.offered, GuestAddress(Self::AVAIL + 2), Ordering::Release).unwrap();
    }

    /// Buffers of a request: header, data of at most 1 MiB, status.
    fn place(slot: u64) -> (u64, u64, u64) {
        let base = BUFFERS + slot * 0x11_0000;
        (base, base + 0x1000, base + 0x800)
    }

    fn request(&mut self, slot: u64, kind: u32, sector: u64, data: &[(u64, u32, u16)]) {
        let (header, _, status) = Self::place(slot);
        self.put(header, kind.to_le_bytes());
        self.put(header + 8, sector.to_le_bytes());
        self.put(status, [0xff]);
        let chain = [&[(header, 16, 0)], data, &[(status, 1, WRITE)]].concat();
        self.offer(&chain);
    }

    fn write(&mut self, slot: u64, sector: u64, content: &[u8]) {
        let data = Self::place(slot).1;
        self.memory.write_slice(content, GuestAddress(data)).unwrap();
        // Two segments, so that they have to be put together.
        let (first, rest) = (content.len() as u32 / 3, content.len() as u32 - content.len() as u32 / 3);
        self.request(slot, blk::VIRTIO_BLK_T_OUT, sector, &[(data, first, 0), (data + u64::from(first), rest, 0)]);
    }

    fn read(&mut self, slot: u64, sector: u64, len: u32) {
        let data = Self::place(slot).1;
        self.memory.write_slice(&vec![0xee; len as usize], GuestAddress(data)).unwrap();
        self.request(slot, blk::VIRTIO_BLK_T_IN, sector, &[(data, 100, WRITE), (data + 100, len - 100, WRITE)]);
    }

    fn data(&self, slot: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(Self::place(slot).1)).unwrap();
        data
    }

    fn status(&self, slot: u64) -> u8 {
        self.memory.read_obj(GuestAddress(Self::place(slot).2)).unwrap()
    }

    fn notify(&self) {
        self.kick.write(1).unwrap();
    }

    /// Waits for `count` more completions; the heads in their order, with the bytes written.
    fn wait(&mut self, count: u16) -> Vec<(u32, u32)> {
        let start = std::time::Instant::now();
        while self.used().wrapping_sub(self.seen) < count {
            assert!(start.elapsed() < PATIENCE, "{} of {count} completions", self.used().wrapping_sub(self.seen));
            std::thread::sleep(Duration::from_millis(1));
        }
        let take = (0..count).map(|index| {
            let at = Self::USED + 4 + u64::from(self.seen.wrapping_add(index) % QUEUE) * 8;
            let read = |at| self.memory.read_obj::<u32>(GuestAddress(at)).unwrap();
            (read(at), read(at + 4))
        });
        let ended = take.collect();
        self.seen = self.seen.wrapping_add(count);
        ended
    }

    fn run(&mut self, count: u16) -> Vec<(u32, u32)> {
        self.notify();
        self.wait(count)
    }
}

#[test]
fn a_guest_writes_reads_flushes_and_learns_who_its_disk_is() {
    let rig = Rig::new();
    let disk = rig.disk();
    let mut guest = Guest::new();
    guest.connect(&rig.listener);
    let (_, config) = guest.frontend.as_mut().unwrap().get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]).unwrap();
    assert_eq!(u64_at(&config, 0), SIZE / 512);
    let content: Vec<u8> = (0..1_048_576_u32).map(|at| (at / 7) as u8).collect();
    guest.write(0, 5, &content);
    guest.request(1, blk::VIRTIO_BLK_T_FLUSH, 0, &[]);
    guest.read(2, 5, 1 << 20);
    let ended = guest.run(3);
    // A read that is offered with the write may see either: so read again.
    assert_eq!(ended.iter().map(|(_, len)| *len).collect::<Vec<_>>(), [1, 1, (1 << 20) + 1]);
    guest.read(2, 5, 1 << 20);
    guest.run(1);
    assert!(guest.data(2, content.len()) == content);
    guest.request(3, blk::VIRTIO_BLK_T_GET_ID, 0, &[(Guest::place(3).1, 20, WRITE)]);
    guest.run(1);
    assert_eq!(guest.data(3, 20), b"vol0123456789abcdef0");
    for slot in 0..4 {
        assert_eq!(guest.status(slot), STATUS_OK, "{slot}");
    }
    // Write zeroes over the middle, discard of the rest.
    let (data, blocks) = (Guest::place(0).1, 600_u32);
    let segment = |sector: u64, blocks: u32| [&sector.to_le_bytes()[..], &blocks.to_le_bytes(), &[0; 4]].concat();
    guest.memory.write_slice(&segment(6, blocks), GuestAddress(data)).unwrap();
    guest.request(0, blk::VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(data, 16, 0)]);
    guest.run(1);
    guest.read(2, 5, 1 << 20);
    guest.run(1);
    let mut expected = content.clone();
    expected[512..512 * 601].fill(0);
    assert!(guest.data(2, content.len()) == expected);
    guest.memory.write_slice(&[segment(5, 100), segment(1000, 1053)].concat(), GuestAddress(data)).unwrap();
    guest.request(0, blk::VIRTIO_BLK_T_DISCARD, 0, &[(data, 32, 0)]);
    guest.read(2, 5, 512);
    guest.run(2);
    assert_eq!((guest.status(0), guest.status(2)), (STATUS_OK, STATUS_OK));
    assert_eq!(disk.counters().failed, 0);
    drop(guest);
    disk.stop();
    assert!(rig.socket.exists(), "it is the machine's");
}

#[test]
fn requests_end_in_the_order_in_which_they_were_offered() {
    let rig = Rig::new();
    let _disk = rig.disk();
    let mut guest = Guest::new();
    guest.connect(&rig.listener);
    for round in 0..20_u64 {
        let mut heads = Vec::new();
        for slot in 0..12 {
            heads.push(u32::from(guest.next_descriptor % QUEUE));
            match (slot + round) % 3 {
                0 => guest.write(slot, slot * 4096, &vec![slot as u8; if slot % 2 == 0 { 1 << 20 } else { 512 }]),
                1 => guest.read(slot, slot * 4096, 4096),
                _ => guest.request(slot, blk::VIRTIO_BLK_T_GET_ID, 0, &[(Guest::place(slot).1, 20, WRITE)]),
            }
        }
        let ended: Vec<u32> = guest.run(12).into_iter().map(|(head, _)| head).collect();
        assert_eq!(ended, heads);
    }
}

#[test]
fn a_guest_waits_while_the_target_is_away_and_its_writes_are_done_afterwards() {
    let mut rig = Rig::new();
    let disk = rig.disk();
    let mut guest = Guest::new();
    guest.connect(&rig.listener);
    guest.write(0, 0, &[1; 4096]);
    guest.run(1);
    rig.target_stop();
    guest.write(0, 0, &[2; 4096]);
    guest.request(1, blk::VIRTIO_BLK_T_FLUSH, 0, &[]);
    guest.notify();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(guest.used(), guest.seen, "nothing ends without the target");
    rig.target_start();
    guest.wait(2);
    guest.read(2, 0, 4096);
    guest.run(1);
    assert_eq!((guest.status(0), guest.status(1), guest.data(2, 4096)), (STATUS_OK, STATUS_OK, vec![2; 4096]));
    assert!(disk.is_connected());
}

#[test]
fn another_card_process_is_offered_exactly_what_was_not_completed() {
    let mut rig = Rig::new();
    let disk = rig.disk();
    let mut guest = Guest::new();
    guest.connect(&rig.listener);
    guest.write(0, 0, &[1; 4096]);
    guest.run(1);
    rig.target_stop();
    guest.write(0, 0, &[2; 4096]);
    guest.write(1, 8, &[3; 4096]);
    guest.notify();
    std::thread::sleep(Duration::from_millis(100));
    // The process dies without a word to the guest or the target: nobody stops its disk.
    guest.frontend = None;
    std::mem::forget(disk);
    let used = guest.used();
    // What is left of it in this process finds no machine any more.
    std::fs::remove_file(&rig.socket).unwrap();
    rig.socket = rig.dir.path().join("next.sock");
    rig.listener = UnixListener::bind(&rig.socket).unwrap();
    rig.target_start();
    let disk = rig.disk();
    guest.connect(&rig.listener);
    assert_eq!(used, 1);
    guest.wait(2);
    guest.read(2, 0, 8192);
    guest.run(1);
    assert_eq!(guest.data(2, 8192), [vec![2; 4096], vec![3; 4096]].concat());
    assert_eq!(disk.counters().completed, 3);
}

#[test]
fn a_stopped_ring_gets_nothing_more_and_starts_again_with_what_was_left() {
    let mut rig = Rig::new();
    let _disk = rig.disk();
    let mut guest = Guest::new();
    guest.connect(&rig.listener);
    rig.target_stop();
    guest.write(0, 0, &[7; 4096]);
    guest.read(1, 16, 4096);
    guest.notify();
    std::thread::sleep(Duration::from_millis(100));
    // A reset while storage is away: it must not wait for it.
    let base = guest.frontend.as_mut().unwrap().get_vring_base(0).unwrap();
    assert_eq!(base, 0, "both requests are unfinished");
    // The guest that comes next uses the memory for something else.
    let before = guest.data(1, 4096);
    rig.target_start();
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(guest.used(), 0);
    assert_eq!(guest.data(1, 4096), before, "the old read does not land");
    guest.ring_start(base as u16);
    guest.wait(2);
    assert_eq!((guest.status(0), guest.status(1)), (STATUS_OK, STATUS_OK));
}

#[test]
fn chains_that_make_no_sense_end_with_an_error_and_harm_nobody() {
    let rig = Rig::new();
    let disk = rig.disk();
    let mut guest = Guest::new();
    guest.connect(&rig.listener);
    let (header, data, status) = Guest::place(0);
    let last = SIZE / 512;
    type Chain<'a> = &'a [(u64, u32, u16)];
    let bad: &[(u32, u64, Chain<'_>)] = &[
        (blk::VIRTIO_BLK_T_IN, last, &[(data, 512, WRITE)]),
        (blk::VIRTIO_BLK_T_IN, u64::MAX, &[(data, 512, WRITE)]),
        (blk::VIRTIO_BLK_T_IN, 0, &[(data, 511, WRITE)]),
        (blk::VIRTIO_BLK_T_IN, 0, &[]),
        (blk::VIRTIO_BLK_T_OUT, last - 1, &[(data, 1024, 0)]),
        (blk::VIRTIO_BLK_T_OUT, 0, &[(u64::MAX - 100, 512, 0)]),
        (blk::VIRTIO_BLK_T_OUT, 0, &[(0, 512, 0)]),
        (blk::VIRTIO_BLK_T_DISCARD, 0, &[(data, 15, 0)]),
        (77, 0, &[]),
    ];
    for (kind, sector, chain) in bad {
        guest.request(0, *kind, *sector, chain);
        guest.run(1);
        let expected = if *kind == 77 { STATUS_UNSUPPORTED } else { STATUS_ERROR };
        assert_eq!(guest.status(0), expected, "{kind} {sector} {chain:?}");
    }
    // Without a status byte, in the wrong order, far too long, a loop: returned, each in one piece.
    let mut malformed: Vec<Vec<(u64, u32, u16)>> = vec![
        vec![(header, 16, 0)],
        vec![(header, 16, WRITE), (data, 512, 0), (status, 1, WRITE)],
        vec![(header, 16, 0), (data, u32::MAX, WRITE), (status, 1, WRITE)],
        vec![(header, 16, 0), (status, 0, WRITE)],
        vec![(header, 8, 0), (status, 1, WRITE)],
    ];
    malformed.push(vec![(data, 64, 0); usize::from(QUEUE)]);
    for chain in &malformed {
        guest.offer(chain);
        guest.run(1);
    }
    assert!(disk.counters().malformed >= 5, "{:?}", disk.counters());
    guest.write(0, 0, &[9; 512]);
    guest.run(1);
    assert_eq!(guest.status(0), STATUS_OK);
    // An index that offers more than the ring holds is left alone; a true one goes on.
    guest.memory.store(guest.offered.wrapping_add(1000), GuestAddress(Guest::AVAIL + 2), Ordering::Release).unwrap();
    guest.notify();
    std::thread::sleep(Duration::from_millis(50));
    guest.memory.store(guest.offered, GuestAddress(Guest::AVAIL + 2), Ordering::Release).unwrap();
    guest.read(0, 0, 512);
    guest.run(1);
    assert_eq!((guest.status(0), guest.data(0, 512)), (STATUS_OK, vec![9; 512]));
}

#[test]
fn garbage_frontends_are_survived_and_connections_leak_no_descriptor() {
    use std::io::Write as _;
    let rig = Rig::new();
    let disk = rig.disk();
    for round in 0..50_u8 {
        let mut stream = rig.listener.accept().unwrap().0;
        let _ = stream.write_all(&vec![round.wrapping_mul(37); usize::from(round) * 3]);
    }
    let mut guest = Guest::new();
    guest.connect(&rig.listener);
    guest.write(0, 0, &[9; 512]);
    guest.run(1);
    assert_eq!(guest.status(0), STATUS_OK);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    for _ in 0..100 {
        guest.frontend = None;
        guest.connect(&rig.listener);
    }
    assert!(descriptors() < before + 40, "{before} descriptors became {}", descriptors());
    let start = std::time::Instant::now();
    disk.stop();
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_socket_whose_other_side_accepts_nothing_does_not_hold_up_a_stop() {
    let rig = Rig::new();
    let mut queue = Vec::new();
    while let Ok(stream) = dataplane::io::vhost::dial::connect(&rig.socket) {
        queue.push(stream);
    }
    let disk = rig.disk();
    std::thread::sleep(Duration::from_millis(100));
    let start = std::time::Instant::now();
    disk.stop();
    assert!(start.elapsed() < Duration::from_secs(5));
}
