//! A frontend and a driver in this process, on memory like a guest's.

#![allow(clippy::cast_possible_truncation)]

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::fence;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY};
use vm_memory::{Bytes, FileOffset, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use super::*;

const GUEST: u64 = 0x10_0000;
const USER: u64 = 0x7f00_0000_0000;
const MEMORY: u64 = 0x40_0000;
const SIZE: u16 = 64;
const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const PATIENCE: Duration = Duration::from_secs(10);

/// Memory of a guest and what its driver keeps to itself.
struct Guest {
    file: File,
    memory: GuestMemoryMmap,
    queues: [DriverQueue; 2],
    event_idx: bool,
}

struct DriverQueue {
    base: u64,
    available: u16,
    used: u16,
    free: VecDeque<u16>,
    kick: EventFd,
    call: EventFd,
}

impl DriverQueue {
    fn descriptors(&self) -> u64 {
        self.base
    }
    fn avail(&self) -> u64 {
        self.base + 0x4000
    }
    fn used(&self) -> u64 {
        self.base + 0x8000
    }
    /// One buffer of 4 KiB for each descriptor.
    fn buffer(&self, index: u16) -> u64 {
        self.base + 0x1_0000 + u64::from(index) * 0x1000
    }
}

impl Guest {
    fn new(event_idx: bool) -> Self {
        let fd = memfd_create("guest", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, MEMORY).unwrap();
        fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        let file = File::from(fd);
        let region = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), MEMORY as usize).unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(GUEST)).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        let queue = |base| DriverQueue {
            base,
            available: 0,
            used: 0,
            free: (0..SIZE).collect(),
            kick: EventFd::new(0).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        };
        Self { file, memory, queues: [queue(GUEST), queue(GUEST + 0x20_0000)], event_idx }
    }

    /// Does what a frontend does on each connection.
    fn connect(&self, listener: &UnixListener) -> Frontend {
        let mut frontend = Frontend::from_stream(accept(listener), 2);
        let features = frontend.get_features().unwrap();
        assert_eq!(features, FEATURES);
        frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(VhostUserProtocolFeatures::REPLY_ACK).unwrap();
        frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_owner().unwrap();
        frontend.set_features(if self.event_idx { features } else { features & !EVENT_IDX }).unwrap();
        frontend.set_mem_table(&[self.region()]).unwrap();
        for (index, queue) in self.queues.iter().enumerate() {
            self.set_up(&mut frontend, index, queue);
        }
        frontend
    }

    fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    fn set_up(&self, frontend: &mut Frontend, index: usize, queue: &DriverQueue) {
        self.set_up_disabled(frontend, index, queue);
        frontend.set_vring_enable(index, true).unwrap();
    }

    fn set_up_disabled(&self, frontend: &Frontend, index: usize, queue: &DriverQueue) {
        frontend.set_vring_num(index, SIZE).unwrap();
        let used: u16 = self.memory.load(GuestAddress(queue.used() + 2), Ordering::Acquire).unwrap();
        frontend.set_vring_base(index, used).unwrap();
        let user = |address| address - GUEST + USER;
        let addresses = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: user(queue.descriptors()),
            used_ring_addr: user(queue.used()),
            avail_ring_addr: user(queue.avail()),
            log_addr: None,
        };
        frontend.set_vring_addr(index, &addresses).unwrap();
        frontend.set_vring_kick(index, &queue.kick).unwrap();
        frontend.set_vring_call(index, &queue.call).unwrap();
    }

    fn put<const N: usize>(&self, address: u64, bytes: [u8; N]) {
        self.memory.write_slice(&bytes, GuestAddress(address)).unwrap();
    }

    fn describe(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let entry = table + u64::from(index) * 16;
        self.put(entry, address.to_le_bytes());
        self.put(entry + 8, len.to_le_bytes());
        self.put(entry + 12, flags.to_le_bytes());
        self.put(entry + 14, next.to_le_bytes());
    }

    /// Makes the chain that begins at `head` available, and kicks if the device
    /// asks for it. Returns whether it did.
    fn offer(&mut self, queue: usize, head: u16) -> bool {
        let queue = &mut self.queues[queue];
        let slot = queue.avail() + 4 + u64::from(queue.available % SIZE) * 2;
        self.memory.write_slice(&head.to_le_bytes(), GuestAddress(slot)).unwrap();
        let old = queue.available;
        queue.available = old.wrapping_add(1);
        self.memory.store(queue.available.to_le(), GuestAddress(queue.avail() + 2), Ordering::Release).unwrap();
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = GuestAddress(queue.used() + 4 + u64::from(SIZE) * 8);
            let event: u16 = self.memory.load(event, Ordering::Relaxed).unwrap();
            queue.available.wrapping_sub(event).wrapping_sub(1) < queue.available.wrapping_sub(old)
        } else {
            let flags: u16 = self.memory.load(GuestAddress(queue.used()), Ordering::Relaxed).unwrap();
            u32::from(flags) & VRING_USED_F_NO_NOTIFY == 0
        };
        if wanted {
            queue.kick.write(1).unwrap();
        }
        wanted
    }

    /// The head and length of what the device used next.
    fn reap(&mut self, queue: usize) -> Option<(u16, u32)> {
        let queue = &mut self.queues[queue];
        let index: u16 = self.memory.load(GuestAddress(queue.used() + 2), Ordering::Acquire).unwrap();
        if index == queue.used {
            return None;
        }
        let element = GuestAddress(queue.used() + 4 + u64::from(queue.used % SIZE) * 8);
        let mut bytes = [0; 8];
        self.memory.read_slice(&mut bytes, element).unwrap();
        queue.used = queue.used.wrapping_add(1);
        let head = u32::from_le_bytes(bytes[..4].try_into().unwrap()) as u16;
        queue.free.push_back(head);
        Some((head, u32::from_le_bytes(bytes[4..].try_into().unwrap())))
    }

    /// Transmits header and frame in one descriptor; false when the ring is full.
    fn transmit(&mut self, frame: &[u8]) -> Option<bool> {
        while self.reap(1).is_some() {}
        let index = self.queues[1].free.pop_front()?;
        let buffer = self.queues[1].buffer(index);
        let bytes: Vec<u8> = [0; 12].iter().chain(frame).copied().collect();
        self.memory.write_slice(&bytes, GuestAddress(buffer)).unwrap();
        self.describe(self.queues[1].descriptors(), index, buffer, bytes.len() as u32, 0, 0);
        Some(self.offer(1, index))
    }

    /// Offers `count` buffers of `len` bytes to receive into.
    fn offer_buffers(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            let index = self.queues[0].free.pop_front().unwrap();
            let buffer = self.queues[0].buffer(index);
            self.describe(self.queues[0].descriptors(), index, buffer, len, WRITE, 0);
            self.offer(0, index);
        }
    }

    /// The next frame, gathered from its buffers as Linux does.
    fn receive(&mut self) -> Option<Vec<u8>> {
        let mut frame = Vec::new();
        let mut buffers = 1;
        while buffers > 0 {
            let Some((head, len)) = self.reap(0) else {
                assert!(frame.is_empty(), "{buffers} buffers of a frame are missing");
                return None;
            };
            let mut bytes = vec![0; len as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(self.queues[0].buffer(head))).unwrap();
            if frame.is_empty() {
                buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
            }
            frame.extend(bytes);
            buffers -= 1;
        }
        Some(frame.split_off(12))
    }
}

/// Takes the next connection of the card.
fn accept(listener: &UnixListener) -> UnixStream {
    listener.accept().unwrap().0
}

/// A port, and the socket of its machine.
fn start(dir: &tempfile::TempDir) -> (VhostPort, VhostControl, UnixListener) {
    let socket = dir.path().join("port.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let (port, control) = VhostPort::start(socket, 9001).unwrap();
    (port, control, listener)
}

fn readable(port: &VhostPort, patience: Duration) -> bool {
    // SAFETY: the port keeps its epoll descriptor as long as it lives.
    #[allow(unsafe_code)]
    let fd = unsafe { BorrowedFd::borrow_raw(port.wait_fd().unwrap()) };
    let timeout = rustix::time::Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: patience.subsec_nanos().into() };
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
}

/// One worker's turn: all that is there, and nothing left when it returns.
fn take_all(port: &mut VhostPort, pool: &mut Pool) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    loop {
        let mut out = Vec::new();
        port.rx_burst(pool, &mut out);
        if out.is_empty() {
            return frames;
        }
        frames.extend(out.iter().map(|packet| packet.as_slice().to_vec()));
        pool.put_all(&mut out);
    }
}

/// Waits until `done`, giving the worker its turns as wake-ups come.
fn wait_for(port: &mut VhostPort, pool: &mut Pool, mut done: impl FnMut(Vec<Vec<u8>>) -> bool) {
    let start = Instant::now();
    while !done(take_all(port, pool)) {
        assert!(start.elapsed() < PATIENCE);
        readable(port, Duration::from_millis(10));
    }
}

fn send(port: &mut VhostPort, pool: &mut Pool, frames: &[&[u8]]) -> usize {
    let mut packets = frames
        .iter()
        .map(|frame| {
            let mut packet = pool.get();
            assert!(packet.copy_from(frame));
            packet
        })
        .collect();
    let dropped = port.tx_burst(pool, &mut packets);
    assert!(packets.is_empty());
    dropped
}

fn frame(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|index| seed.wrapping_add(index as u8)).collect()
}

#[test]
fn frames_pass_both_ways() {
    for event_idx in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (mut port, control, listener) = start(&dir);
        let mut pool = Pool::new(64);
        let mut guest = Guest::new(event_idx);
        assert_eq!(send(&mut port, &mut pool, &[&frame(0, 60)]), 1, "nobody is there yet");
        let _frontend = guest.connect(&listener);
        assert!(control.running());

        guest.transmit(&frame(1, 60)).unwrap();
        guest.transmit(&frame(2, 1514)).unwrap();
        let mut got = Vec::new();
        wait_for(&mut port, &mut pool, |frames| {
            got.extend(frames);
            got.len() >= 2
        });
        assert_eq!(got, [frame(1, 60), frame(2, 1514)]);

        guest.offer_buffers(7, 1526);
        assert_eq!(send(&mut port, &mut pool, &[&frame(3, 60), &frame(4, 9015), &frame(5, 1514)]), 1, "1 + 6 + 1 buffers");
        assert_eq!(guest.receive().unwrap(), frame(3, 60));
        assert_eq!(guest.receive().unwrap(), frame(4, 9015), "merged over 6 buffers");
        assert_eq!(guest.receive(), None);
        guest.offer_buffers(1, 1526);
        assert_eq!(send(&mut port, &mut pool, &[&frame(6, 1514)]), 0);
        assert_eq!(guest.receive(), Some(frame(6, 1514)));
        assert_eq!(control.counters().no_buffer, 2);
        assert!(guest.queues[0].call.read().is_ok(), "the driver was interrupted");
    }
}

#[test]
fn rings_enabled_before_any_feature_is_acknowledged_start() {
    let dir = tempfile::tempdir().unwrap();
    let (_port, control, listener) = start(&dir);
    let guest = Guest::new(true);
    let mut stream = accept(&listener);
    let frontend = Frontend::from_stream(stream.try_clone().unwrap(), 2);
    frontend.get_features().unwrap();
    for (index, need_reply) in [(0u32, 0u32), (1, 8)] {
        let message = [18, 1 | need_reply, 8, index, 1].map(u32::to_ne_bytes);
        stream.write_all(message.as_flattened()).unwrap();
        if need_reply != 0 {
            let mut reply = [0; 20];
            stream.read_exact(&mut reply).unwrap();
            assert_eq!(reply.as_slice(), [18, 5, 8, 0, 0u32].map(u32::to_ne_bytes).as_flattened());
        }
    }
    frontend.set_features(FEATURES).unwrap();
    frontend.set_mem_table(&[guest.region()]).unwrap();
    for (index, queue) in guest.queues.iter().enumerate() {
        guest.set_up_disabled(&frontend, index, queue);
    }
    // An answer says that all before it is done.
    frontend.get_features().unwrap();
    assert!(control.running());
}

#[test]
fn kicks_wake_and_are_suppressed_while_the_worker_is_awake() {
    for event_idx in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (mut port, _control, listener) = start(&dir);
        let mut pool = Pool::new(64);
        let mut guest = Guest::new(event_idx);
        let _frontend = guest.connect(&listener);
        assert!(readable(&port, PATIENCE), "the bell of a new ring");
        assert!(take_all(&mut port, &mut pool).is_empty());
        assert!(!readable(&port, Duration::ZERO), "an idle port lets the worker sleep");

        assert!(guest.transmit(&frame(1, 60)).unwrap(), "the sleeping worker wants a kick");
        for _ in 0..BURST {
            guest.transmit(&frame(2, 60)).unwrap();
        }
        assert!(readable(&port, PATIENCE));
        let mut out = Vec::new();
        port.rx_burst(&mut pool, &mut out);
        assert_eq!(out.len(), BURST);
        for _ in 0..10 {
            assert!(!guest.transmit(&frame(3, 60)).unwrap(), "an awake worker wants none");
        }
        out.clear();
        port.rx_burst(&mut pool, &mut out);
        assert_eq!(out.len(), 11);
        assert!(!readable(&port, Duration::ZERO), "less than a burst: the worker may sleep");
        assert!(guest.transmit(&frame(4, 60)).unwrap(), "and wants a kick again");
        assert!(readable(&port, PATIENCE));
        assert_eq!(take_all(&mut port, &mut pool).len(), 1);

        guest.queues[1].kick.write(1).unwrap();
        assert!(readable(&port, PATIENCE));
        assert!(take_all(&mut port, &mut pool).is_empty());
        assert!(!readable(&port, Duration::ZERO), "a kick without a frame is cleared too");
    }
}

#[test]
fn no_wake_up_is_lost() {
    const FRAMES: u32 = 50_000;
    for event_idx in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (mut port, _control, listener) = start(&dir);
        let mut guest = Guest::new(event_idx);
        let _frontend = guest.connect(&listener);
        let driver = thread::spawn(move || {
            let mut sent = 0u32;
            while sent < FRAMES {
                let mut bytes = frame(0, 64);
                bytes[..4].copy_from_slice(&sent.to_le_bytes());
                if guest.transmit(&bytes).is_some() {
                    sent += 1;
                    if sent.is_multiple_of(7) {
                        thread::yield_now();
                    }
                } else {
                    thread::yield_now();
                }
            }
        });
        let mut pool = Pool::new(64);
        let mut next = 0u32;
        while next < FRAMES {
            let mut out = Vec::new();
            port.rx_burst(&mut pool, &mut out);
            for packet in &out {
                assert_eq!(packet.as_slice()[..4], next.to_le_bytes());
                next += 1;
            }
            // The worker sleeps after any burst that is not full.
            let awake = out.len() == BURST || next == FRAMES;
            pool.put_all(&mut out);
            assert!(awake || readable(&port, PATIENCE), "asleep after {next} frames");
        }
        driver.join().unwrap();
    }
}

#[test]
fn frontend_and_device_may_each_go_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let (mut port, mut control, listener) = start(&dir);
    let mut pool = Pool::new(64);
    let mut guest = Guest::new(true);
    let mut frontend = guest.connect(&listener);
    guest.offer_buffers(16, 1526);
    for round in 0..10u8 {
        guest.transmit(&frame(round, 99)).unwrap();
        let mut got = Vec::new();
        wait_for(&mut port, &mut pool, |frames| {
            got.extend(frames);
            !got.is_empty()
        });
        assert_eq!(got, [frame(round, 99)]);
        assert_eq!(send(&mut port, &mut pool, &[&frame(round, 77)]), 0);
        assert_eq!(guest.receive(), Some(frame(round, 77)));
        if round % 2 == 0 {
            drop(frontend);
            wait_for(&mut port, &mut pool, |_| !control.running());
        } else {
            // The card's process dies and starts again.
            drop((port, control));
            drop(frontend);
            (port, control) = VhostPort::start(dir.path().join("port.sock"), 9001).unwrap();
        }
        frontend = guest.connect(&listener);
        guest.offer_buffers(1, 1526);
    }
    assert_eq!(control.counters().malformed, 0);
    drop(frontend);
}

#[test]
fn buffers_used_before_a_crash_are_announced_by_the_next_device() {
    let dir = tempfile::tempdir().unwrap();
    let (port, control, listener) = start(&dir);
    let guest = Guest::new(true);
    let frontend = guest.connect(&listener);
    drop((port, control, frontend));
    while guest.queues[0].call.read().is_ok() {}
    let (_port, _control) = VhostPort::start(dir.path().join("port.sock"), 9001).unwrap();
    let _frontend = guest.connect(&listener);
    assert!(guest.queues.iter().all(|queue| queue.call.read().is_ok()));
}

#[test]
fn stop_hangs_up_and_leaves_the_socket_to_its_machine() {
    let dir = tempfile::tempdir().unwrap();
    let (mut port, control, listener) = start(&dir);
    let guest = Guest::new(false);
    let frontend = guest.connect(&listener);
    control.stop();
    assert!(frontend.get_features().is_err());
    assert!(take_all(&mut port, &mut Pool::new(4)).is_empty());
    assert!(dir.path().join("port.sock").exists());

    // A card that starts again is there at once, with the rings as they are.
    let (_port, control) = VhostPort::start(dir.path().join("port.sock"), 9001).unwrap();
    let _frontend = guest.connect(&listener);
    assert!(control.running());
}

#[test]
fn a_machine_that_starts_again_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let (_port, control, mut listener) = start(&dir);
    for round in 1..4 {
        let guest = Guest::new(true);
        let frontend = guest.connect(&listener);
        assert!(control.running());
        assert_eq!(control.counters().connections, round);
        // Killed: its socket file stays until the next one takes its place.
        drop((frontend, listener));
        std::fs::remove_file(dir.path().join("port.sock")).unwrap();
        listener = UnixListener::bind(dir.path().join("port.sock")).unwrap();
    }
}

#[test]
fn memory_that_may_shrink_and_kicks_that_may_block_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (_port, control, listener) = start(&dir);
    let guest = Guest::new(false);
    let set_up = || {
        let mut frontend = Frontend::from_stream(accept(&listener), 2);
        frontend.get_features().unwrap();
        frontend.set_features(FEATURES).unwrap();
        frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(VhostUserProtocolFeatures::REPLY_ACK).unwrap();
        frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        frontend
    };
    let loose = memfd_create("guest", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&loose, MEMORY).unwrap();
    let region = VhostUserMemoryRegionInfo { mmap_handle: loose.as_raw_fd(), ..guest.region() };
    assert!(set_up().set_mem_table(&[region]).is_err());
    let beyond = VhostUserMemoryRegionInfo { memory_size: MEMORY * 2, ..guest.region() };
    assert!(set_up().set_mem_table(&[beyond]).is_err());

    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    #[allow(unsafe_code)]
    // SAFETY: the descriptor was just taken out of its owner.
    let pipe = unsafe { <EventFd as std::os::fd::FromRawFd>::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(writer)) };
    assert!(set_up().set_vring_kick(1, &pipe).is_err());
    assert!(set_up().set_vring_call(0, &pipe).is_err());
    assert!(set_up().set_vring_num(0, 4096).is_err());
    assert!(set_up().set_vring_num(7, 64).is_err());
    assert!(!control.running());
    let _frontend = guest.connect(&listener);
    assert!(control.running(), "it goes on serving");
}

#[test]
fn garbage_on_the_socket_only_ends_its_connection() {
    use std::io::Write as _;
    let dir = tempfile::tempdir().unwrap();
    let (_port, control, listener) = start(&dir);
    for seed in 0..64u8 {
        let mut stream = accept(&listener);
        let _ = stream.write_all(&frame(seed, usize::from(seed)));
        let header: Vec<u8> = [u32::from(seed), 1, 0xffff_ffff].iter().flat_map(|word| word.to_ne_bytes()).collect();
        let _ = stream.write_all(&header);
    }
    let guest = Guest::new(false);
    let _frontend = guest.connect(&listener);
    assert!(control.running());
}

#[test]
fn hostile_chains_are_counted_and_the_next_frame_passes() {
    let dir = tempfile::tempdir().unwrap();
    let (mut port, control, listener) = start(&dir);
    let mut pool = Pool::new(64);
    let mut guest = Guest::new(false);
    let _frontend = guest.connect(&listener);
    let table = guest.queues[1].descriptors();
    let buffer = guest.queues[1].buffer(0);
    guest.describe(table, 0, buffer, 64, NEXT, 1); // a loop of two
    guest.describe(table, 1, buffer, 64, NEXT, 0);
    guest.describe(table, 2, buffer, 64, NEXT, SIZE); // out of the table
    guest.describe(table, 3, GUEST + MEMORY - 32, 64, 0, 0); // over the end of memory
    guest.describe(table, 4, u64::MAX - 8, 64, 0, 0); // around the end of all addresses
    guest.describe(table, 5, buffer, 64, WRITE, 0); // to be written, not read
    guest.describe(table, 6, buffer, 12, 0, 0); // a header and no frame
    guest.describe(table, 7, buffer, 0, 0, 0); // nothing
    guest.describe(table, 8, table + 8 * 16, 16, INDIRECT, 0); // a table that names itself
    guest.describe(table, 9, buffer, 17, INDIRECT, 0); // a table of no whole number of entries
    guest.describe(table, 10, u64::MAX - 15, 16, INDIRECT, 0); // a table nowhere
    guest.describe(table, 11, buffer, 0x1_0000 * 16, INDIRECT, 0); // too large a table
    guest.describe(table, 12, GUEST, 12 + 9001 + 19, 0, 0); // too long a frame
    guest.describe(table, 13, GUEST, u32::MAX, 0, 0); // far too long a frame
    for head in (0..14).chain([SIZE, u16::MAX]) {
        guest.offer(1, head);
    }
    guest.queues[1].free = (20..SIZE).collect();
    guest.describe(table, 20, buffer, 12 + 60, 0, 0);
    guest.put(buffer + 12, [9; 60]);
    guest.offer(1, 20);
    let mut got = Vec::new();
    wait_for(&mut port, &mut pool, |frames| {
        got.extend(frames);
        !got.is_empty()
    });
    assert_eq!(got, [[9; 60]]);
    take_all(&mut port, &mut pool);
    let counters = control.counters();
    assert_eq!((counters.malformed, counters.oversize, counters.broken), (14, 2, 0));
}

#[test]
fn indirect_chains_of_many_pieces_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let (mut port, _control, listener) = start(&dir);
    let mut pool = Pool::new(64);
    let mut guest = Guest::new(true);
    let _frontend = guest.connect(&listener);
    let table = guest.queues[1].buffer(60);
    let content = [vec![0; 12], frame(3, 9015)].concat();
    let mut offset = 0;
    for (index, piece) in content.chunks(1000).enumerate() {
        let address = guest.queues[1].buffer(index as u16);
        guest.memory.write_slice(piece, GuestAddress(address)).unwrap();
        offset += piece.len();
        let flags = if offset < content.len() { NEXT } else { 0 };
        guest.describe(table, index as u16, address, piece.len() as u32, flags, index as u16 + 1);
    }
    guest.describe(guest.queues[1].descriptors(), 0, table, 10 * 16, INDIRECT, 0);
    guest.offer(1, 0);
    let mut got = Vec::new();
    wait_for(&mut port, &mut pool, |frames| {
        got.extend(frames);
        !got.is_empty()
    });
    assert_eq!(got, [frame(3, 9015)]);
}

#[test]
fn broken_ring_stays_silent_until_it_is_set_up_again() {
    let dir = tempfile::tempdir().unwrap();
    let (mut port, control, listener) = start(&dir);
    let mut pool = Pool::new(64);
    let mut guest = Guest::new(false);
    let mut frontend = guest.connect(&listener);
    let index = GuestAddress(guest.queues[1].avail() + 2);
    guest.memory.store(SIZE + 1, index, Ordering::Release).unwrap();
    guest.queues[1].kick.write(1).unwrap();
    wait_for(&mut port, &mut pool, |_| control.counters().broken == 1);
    take_all(&mut port, &mut pool);
    assert_eq!(control.counters().broken, 1);

    guest.memory.store(0u16, index, Ordering::Release).unwrap();
    frontend.get_vring_base(1).unwrap();
    guest.set_up(&mut frontend, 1, &guest.queues[1]);
    guest.transmit(&frame(1, 60)).unwrap();
    wait_for(&mut port, &mut pool, |frames| frames == [frame(1, 60)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever stands in the rings, both directions come to an end.
    #[test]
    fn random_rings_neither_panic_nor_hold_the_worker(
        descriptors in proptest::collection::vec((any::<u64>(), any::<u32>(), any::<u16>(), any::<u16>()), usize::from(SIZE)),
        heads in proptest::collection::vec(any::<u16>(), usize::from(SIZE)),
        available in any::<u16>(),
        shape in any::<u64>(),
        event_idx in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (mut port, _control, listener) = start(&dir);
        let mut pool = Pool::new(64);
        let guest = Guest::new(event_idx);
        let _frontend = guest.connect(&listener);
        for queue in &guest.queues {
            for (index, &(address, len, flags, next)) in descriptors.iter().enumerate() {
                // Mostly near the truth, or nothing is reached.
                let near = shape >> (index % 60) & 7;
                let address = if near > 0 { GUEST + address % MEMORY } else { address };
                let len = if near > 1 { len % 2048 } else { len };
                let next = if near > 2 { next % SIZE } else { next };
                guest.describe(queue.descriptors(), index as u16, address, len, flags, next);
            }
            for (slot, head) in heads.iter().enumerate() {
                let head = if shape & 1 == 0 { head % SIZE } else { *head };
                guest.put(queue.avail() + 4 + slot as u64 * 2, head.to_le_bytes());
            }
            let available = if shape & 2 == 0 { available % (SIZE + 1) } else { available };
            guest.put(queue.avail() + 2, available.to_le_bytes());
            queue.kick.write(1).unwrap();
        }
        let start = Instant::now();
        for _ in 0..8 {
            take_all(&mut port, &mut pool);
            send(&mut port, &mut pool, &[&frame(1, 60), &frame(2, 9000)]);
        }
        prop_assert!(start.elapsed() < PATIENCE);
    }
}
