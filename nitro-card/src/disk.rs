//! A guest's disk: virtio-blk (virtio 1.2, section 5.2) over vhost-user, backed by an NVMe/TCP initiator.
//!
//! **Block write** enters here: guest queue -> [`DiskServer`] -> `storage_target::Initiator` => target.
//!
//! The card listens; the machine connects, and connects again when the card was away. Invariants:
//!
//! - Requests of a ring are completed in the order in which the guest offered them. The used index then says
//!   exactly which requests are unfinished, and a machine whose card died offers those, and only those, to
//!   the next card process. Requests inside of the window run at the same time.
//! - A request that the target does not answer waits, for ever: a guest stalls and never errors because
//!   storage, or the card, is away.
//! - When a ring is stopped or a machine goes away, requests under way lose their guest (nothing is written
//!   into its memory any more), and no new request starts until they have ended: an old write cannot land
//!   after a new one.
//! - What the guest puts into rings and descriptors is checked before it is used: a chain that makes no sense
//!   is answered with an error or, without a status byte, returned; a ring that makes none is left alone.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
pub use storage_target::InitiatorSettings;
use storage_target::{Command, CommandEnd, Initiator, Lba, NvmeStatus};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Error as VhostError, Listener};
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_bindings::bindings::virtio_blk as blk;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// Bytes of a sector: what virtio-blk counts in, and a block of the volume.
const SECTOR: u64 = 512;
/// Rings that a guest may use, one per vCPU in most guests.
const RINGS: u16 = 16;
const RING_SIZE: usize = 256;
/// Descriptors of data in one request.
const SEGMENTS: u32 = 126;
/// The most that one NVMe command moves, in bytes.
const PART: usize = 1 << 20;
/// The most data of one request, in bytes.
const REQUEST_MAX: usize = 8 << 20;
/// Data of a disk that is under way before its rings have to wait, in bytes.
const UNDER_WAY_MAX: usize = 32 << 20;
/// The most blocks of one Write Zeroes command.
const ZEROES_PART: u32 = 65_536;
/// The longest range of one discard or write-zeroes segment, and how many segments, that guests are offered.
const RANGE_SECTORS: u32 = 1 << 22;
const RANGE_SEGMENTS: u32 = 16;
/// How long a stop waits for the target before it gives up on it.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

const STATUS_OK: u8 = 0;
const STATUS_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Chain = DescriptorChain<vm_memory::atomic::GuestMemoryLoadGuard<GuestMemoryMmap>>;

/// What happened at one disk since it was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskCounters {
    /// Machines that connected.
    pub connections: u64,
    /// Requests answered well.
    pub completed: u64,
    /// Requests answered with an error.
    pub failed: u64,
    /// Descriptor chains that made no sense.
    pub malformed: u64,
}

/// A disk that a machine can connect to. Dropping it stops it.
pub struct DiskServer {
    disk: Arc<Disk>,
    socket: PathBuf,
    server: Option<JoinHandle<()>>,
}

impl DiskServer {
    /// Listens on `socket` and connects to the volume, without waiting for either side.
    ///
    /// `serial` is what the guest reads with GET_ID, cut to 20 bytes; `size_bytes` is the capacity.
    ///
    /// # Errors
    /// When the socket cannot be made, or no more threads can.
    pub fn start(socket: PathBuf, initiator: InitiatorSettings, serial: String, size_bytes: u64) -> io::Result<Self> {
        remove(&socket)?;
        let listener = UnixListener::bind(&socket)?;
        listener.set_nonblocking(true)?;
        let mut id = [0; 20];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let disk = Arc::new(Disk {
            initiator: Initiator::start(initiator)?,
            serial: id,
            sectors: size_bytes / SECTOR,
            gate: Mutex::default(),
            idle: Condvar::new(),
            stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            stopping: AtomicBool::new(false),
            connection: Mutex::default(),
            counting: Counting::default(),
        });
        let serving = Arc::clone(&disk);
        let server = std::thread::Builder::new().name("disk".into()).spawn(move || serving.serve(listener))?;
        Ok(Self { disk, socket, server: Some(server) })
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> DiskCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counting = &self.disk.counting;
        DiskCounters {
            connections: read(&counting.connections),
            completed: read(&counting.completed),
            failed: read(&counting.failed),
            malformed: read(&counting.malformed),
        }
    }

    /// Whether the volume's target answers.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.disk.initiator.is_connected()
    }

    /// Disconnects the machine, ends what is under way, flushes the volume, and removes the socket.
    ///
    /// A target that is away is waited for, but not for ever.
    pub fn stop(mut self) {
        self.shut_down();
    }

    fn shut_down(&mut self) {
        let Some(server) = self.server.take() else { return };
        self.disk.stopping.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.disk.stop, &1_u64.to_ne_bytes());
        if let Some(handle) = &*lock(&self.disk.connection) {
            handle.shutdown();
        }
        let _ = server.join();
        if let Err(error) = remove(&self.socket) {
            tracing::warn!(socket = %self.socket.display(), %error, "the socket stays");
        }
        let gate = lock(&self.disk.gate);
        let busy = |gate: &mut Gate| gate.current + gate.old > 0;
        let waited = self.disk.idle.wait_timeout_while(gate, STOP_TIMEOUT, busy);
        let late = waited.unwrap_or_else(PoisonError::into_inner).1.timed_out();
        if late || !self.disk.flush() {
            tracing::warn!(socket = %self.socket.display(), "disk stopped without an answer of its target");
        }
        self.disk.initiator.stop();
    }
}

impl Drop for DiskServer {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl std::fmt::Debug for DiskServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskServer").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// What outlives a machine's connection.
struct Disk {
    initiator: Initiator,
    serial: [u8; 20],
    sectors: u64,
    gate: Mutex<Gate>,
    /// Signalled when nothing is under way.
    idle: Condvar,
    /// Readable when stopping.
    stop: OwnedFd,
    stopping: AtomicBool,
    connection: Mutex<Option<ShutdownHandle>>,
    counting: Counting,
}

#[derive(Debug, Default)]
struct Counting {
    connections: AtomicU64,
    completed: AtomicU64,
    failed: AtomicU64,
    malformed: AtomicU64,
}

/// Counts commands under way, so that those of a guest that is gone hold back those of the next.
///
/// Locked after a ring, never before one.
#[derive(Default)]
struct Gate {
    epoch: u64,
    /// Commands of this epoch.
    current: usize,
    /// Commands of earlier epochs: none may start while there are any.
    old: usize,
    /// Data under way, in bytes.
    bytes: usize,
    /// A ring has requests that had to wait.
    starved: bool,
    machine: Option<Arc<Machine>>,
}

impl Gate {
    fn next_epoch(&mut self) {
        self.old += std::mem::take(&mut self.current);
        self.epoch += 1;
    }
}

impl Disk {
    /// Takes one machine after the other.
    fn serve(self: &Arc<Self>, listener: UnixListener) {
        let ready = match listener.try_clone() {
            Ok(ready) => ready,
            Err(error) => return tracing::error!(%error, "disk listener"),
        };
        let mut listener = Listener::from(listener);
        while !self.stopping.load(Ordering::Acquire) {
            let mut fds = [PollFd::new(&ready, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
            let waited = poll(&mut fds, None);
            let [connecting, _] = &fds;
            if waited.is_err() || !connecting.revents().contains(PollFlags::IN) {
                continue;
            }
            if let Err(error) = self.connect(&mut listener) {
                tracing::warn!(%error, "disk connection");
                // Without a pause a lack of descriptors would spin here.
                let pause = Timespec { tv_sec: 0, tv_nsec: ACCEPT_RETRY.subsec_nanos().into() };
                let _ = poll(&mut [PollFd::new(&self.stop, PollFlags::IN)], Some(&pause));
            }
        }
    }

    /// Serves the machine that waits on the listener, until it goes.
    fn connect(self: &Arc<Self>, listener: &mut Listener) -> Result<(), vhost_user_backend::Error> {
        let memory = Memory::new(GuestMemoryMmap::new());
        let machine = Arc::new(Machine {
            disk: Arc::clone(self),
            memory: memory.clone(),
            rings: (0..RINGS).map(|_| Mutex::default()).collect(),
            exit: Mutex::default(),
        });
        lock(&self.gate).machine = Some(Arc::clone(&machine));
        let result = self.run(&machine, memory, listener);
        machine.forget();
        if let Some(fd) = lock(&machine.exit).take() {
            // SAFETY: `fd` is the exit event that `Machine::exit_event` gave to the daemon, which turned it into a
            // bare descriptor and never closes it; the daemon and its threads ended in `run`, so nobody has it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        match result {
            Err(vhost_user_backend::Error::HandleRequest(VhostError::Disconnected | VhostError::PartialMessage)) => Ok(()),
            result => result,
        }
    }

    fn run(&self, machine: &Arc<Machine>, memory: Memory, listener: &mut Listener) -> Result<(), vhost_user_backend::Error> {
        let mut daemon = VhostUserDaemon::new("disk-vhost".into(), Arc::clone(machine), memory)?;
        daemon.start(listener)?;
        self.counting.connections.fetch_add(1, Ordering::Relaxed);
        *lock(&self.connection) = daemon.shutdown_handle();
        if self.stopping.load(Ordering::Acquire) {
            daemon.request_shutdown();
        }
        let result = daemon.wait();
        *lock(&self.connection) = None;
        result
    }

    /// Makes everything durable; false when the target does not answer in time, or cannot.
    fn flush(&self) -> bool {
        let (sender, answer) = mpsc::channel();
        self.initiator.submit(Command::Flush, Box::new(move |result| drop(sender.send(result))));
        matches!(answer.recv_timeout(STOP_TIMEOUT), Ok(Ok(_)))
    }

    /// Whether a request may start now; if not, its ring is looked at again when it may.
    fn admits(&self) -> bool {
        let mut gate = lock(&self.gate);
        let admits = gate.old == 0 && gate.bytes < UNDER_WAY_MAX;
        gate.starved |= !admits;
        admits
    }

    /// Counts commands in, and says in which epoch.
    fn began(&self, commands: usize, bytes: usize) -> u64 {
        let mut gate = lock(&self.gate);
        gate.current += commands;
        gate.bytes += bytes;
        gate.epoch
    }

    /// Counts a command out; the machine whose rings may go on.
    fn ended(&self, epoch: u64, bytes: usize) -> Option<Arc<Machine>> {
        let mut gate = lock(&self.gate);
        if epoch == gate.epoch {
            gate.current -= 1;
        } else {
            gate.old -= 1;
        }
        gate.bytes -= bytes;
        if gate.current + gate.old == 0 {
            self.idle.notify_all();
        }
        let resume = gate.starved && gate.old == 0 && gate.bytes <= UNDER_WAY_MAX / 2;
        gate.starved &= !resume;
        gate.machine.clone().filter(|_| resume)
    }

    /// The config space, virtio 1.2 section 5.2.4.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, value: &[u8]| {
            if let Some(slot) = config.get_mut(at..at + value.len()) {
                slot.copy_from_slice(value);
            }
        };
        put(0, &self.sectors.to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &512_u32.to_le_bytes());
        put(24, &[3]); // a physical block is 2^3 logical ones
        put(26, &8_u16.to_le_bytes()); // smallest and best I/O, in logical blocks
        put(28, &8_u32.to_le_bytes());
        put(34, &RINGS.to_le_bytes());
        put(36, &RANGE_SECTORS.to_le_bytes()); // discard
        put(40, &RANGE_SEGMENTS.to_le_bytes());
        put(44, &128_u32.to_le_bytes()); // where discarding gives room back: 64 KiB
        put(48, &RANGE_SECTORS.to_le_bytes()); // write zeroes
        put(52, &RANGE_SEGMENTS.to_le_bytes());
        put(56, &[1]); // which may unmap
        config
    }
}

/// One machine's connection: the rings that its guest set up.
struct Machine {
    disk: Arc<Disk>,
    memory: Memory,
    rings: Vec<Mutex<Ring>>,
    exit: Mutex<Option<RawFd>>,
}

#[derive(Default)]
struct Ring {
    vring: Option<VringMutex>,
    /// Rises when the ring is stopped: requests of before have lost it.
    generation: u64,
    /// The sequence number of the first request.
    first: u64,
    /// Requests in the order of the guest, from the first that is not completed.
    requests: VecDeque<Request>,
}

/// A request of the guest.
struct Request {
    head: u16,
    /// Where data for the guest goes: address and length.
    writable: Vec<(GuestAddress, usize)>,
    status_at: Option<GuestAddress>,
    status: u8,
    /// Data for the guest, by part.
    data: Vec<Vec<u8>>,
    /// Commands that have not ended.
    left: usize,
}

impl Machine {
    /// Takes what a ring offers and starts it.
    fn process(self: &Arc<Self>, index: usize) {
        let Some(ring) = self.rings.get(index) else { return };
        let mut commands = Vec::new();
        let mut ring = lock(ring);
        self.take(index, &mut ring, &mut commands);
        self.complete(&mut ring);
        // Ends run under the ring's lock, and some may run at once.
        drop(ring);
        if !commands.is_empty() {
            self.disk.initiator.submit_all(commands);
        }
    }

    fn take(self: &Arc<Self>, index: usize, ring: &mut Ring, commands: &mut Vec<(Command, CommandEnd)>) {
        let Some(vring) = ring.vring.clone() else { return };
        let mut empty_turns = 0;
        loop {
            let live = {
                let state = vring.get_ref();
                state.is_enabled() && state.get_queue().ready()
            };
            if !live || vring.disable_notification().is_err() {
                return;
            }
            empty_turns += 1;
            loop {
                if !self.disk.admits() {
                    return;
                }
                let chain = vring.get_mut().get_queue_mut().pop_descriptor_chain(self.memory.memory());
                let Some(chain) = chain else { break };
                empty_turns = 0;
                self.start(index, ring, chain, commands);
            }
            match vring.enable_notification() {
                // Something came in between; but an index that offers what cannot be taken ends here.
                Ok(true) if empty_turns < 2 => {}
                Ok(true) => {
                    self.disk.counting.malformed.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                _ => return,
            }
        }
    }

    fn start(self: &Arc<Self>, index: usize, ring: &mut Ring, chain: Chain, commands: &mut Vec<(Command, CommandEnd)>) {
        let head = chain.head_index();
        let memory = self.memory.memory();
        let mut request = Request { head, writable: Vec::new(), status_at: None, status: 0, data: Vec::new(), left: 0 };
        let work = match segments(chain) {
            Some((readable, writable, status_at)) => {
                request.writable = writable;
                request.status_at = Some(status_at);
                work(&self.disk, &memory, &readable, &request.writable)
            }
            None => Err(Refused::Malformed),
        };
        let (generation, sequence) = (ring.generation, ring.first + ring.requests.len() as u64);
        match work {
            Ok(Work::Answer(data)) => request.data = vec![data],
            Ok(Work::Commands(list)) => {
                request.left = list.len();
                request.data.resize(list.len(), Vec::new());
                let bytes = list.iter().map(bytes_of).sum();
                let epoch = self.disk.began(list.len(), bytes);
                for (part, command) in list.into_iter().enumerate() {
                    let (machine, bytes) = (Arc::clone(self), bytes_of(&command));
                    let end = move |result| {
                        machine.ended(index, generation, sequence, part, result);
                        if let Some(machine) = machine.disk.ended(epoch, bytes) {
                            (0..machine.rings.len()).for_each(|index| machine.process(index));
                        }
                    };
                    commands.push((command, Box::new(end)));
                }
            }
            Err(refused) => {
                request.status = if refused == Refused::Unsupported { STATUS_UNSUPPORTED } else { STATUS_ERROR };
                if refused == Refused::Malformed {
                    self.disk.counting.malformed.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        ring.requests.push_back(request);
    }

    /// One command of a request has ended.
    fn ended(&self, index: usize, generation: u64, sequence: u64, part: usize, result: Result<Vec<u8>, NvmeStatus>) {
        let Some(ring) = self.rings.get(index) else { return };
        let mut ring = lock(ring);
        let place = usize::try_from(sequence.wrapping_sub(ring.first)).unwrap_or(usize::MAX);
        if ring.generation != generation {
            return;
        }
        let Some(request) = ring.requests.get_mut(place) else { return };
        request.left -= 1;
        match result {
            Ok(data) => {
                if let Some(slot) = request.data.get_mut(part) {
                    *slot = data;
                }
            }
            Err(status) => {
                tracing::warn!(%status, "a disk request failed");
                request.status = STATUS_ERROR;
            }
        }
        self.complete(&mut ring);
    }

    /// Returns every request to the guest that has ended and has none before it that has not.
    fn complete(&self, ring: &mut Ring) {
        let Some(vring) = ring.vring.clone() else { return };
        let mut any = false;
        while ring.requests.front().is_some_and(|request| request.left == 0) {
            let Some(request) = ring.requests.pop_front() else { break };
            ring.first += 1;
            let written = self.write_back(&request);
            if vring.add_used(request.head, written).is_err() {
                self.disk.counting.malformed.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let counter = match request.status {
                STATUS_OK => &self.disk.counting.completed,
                _ => &self.disk.counting.failed,
            };
            counter.fetch_add(1, Ordering::Relaxed);
            any = true;
        }
        if any && vring.needs_notification().unwrap_or(true) {
            let _ = vring.signal_used_queue();
        }
    }

    /// Writes data and status into the guest's memory; how many bytes.
    fn write_back(&self, request: &Request) -> u32 {
        let memory = self.memory.memory();
        let (mut written, mut status) = (0, request.status);
        if status == STATUS_OK {
            let mut places = request.writable.iter().copied();
            let mut place = places.next();
            for data in &request.data {
                let mut data = data.as_slice();
                while let (false, Some((address, room))) = (data.is_empty(), place) {
                    let (now, later) = data.split_at(room.min(data.len()));
                    if memory.write_slice(now, address).is_err() {
                        status = STATUS_ERROR;
                    }
                    written += now.len();
                    data = later;
                    place = match address.0.checked_add(now.len() as u64) {
                        Some(next) if now.len() < room => Some((GuestAddress(next), room - now.len())),
                        _ => places.next(),
                    };
                }
            }
        }
        if let Some(address) = request.status_at
            && memory.write_obj(status, address).is_ok()
        {
            written += 1;
        }
        u32::try_from(written).unwrap_or(u32::MAX)
    }

    /// Takes a ring's requests away from it: what is under way ends without it.
    fn stop(&self, ring: &Mutex<Ring>) {
        let mut ring = lock(ring);
        ring.generation += 1;
        ring.first = 0;
        ring.requests.clear();
        lock(&self.disk.gate).next_epoch();
        // The next driver of the ring is offered again what was not completed.
        if let Some(vring) = &ring.vring
            && let Ok(used) = vring.queue_used_idx()
        {
            vring.set_queue_next_avail(used);
        }
    }

    /// The machine is gone.
    fn forget(&self) {
        for ring in &self.rings {
            self.stop(ring);
            lock(ring).vring = None;
        }
        lock(&self.disk.gate).machine = None;
    }
}

impl VhostUserBackend for Machine {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        RINGS.into()
    }

    fn max_queue_size(&self) -> usize {
        RING_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << blk::VIRTIO_BLK_F_SEG_MAX
            | 1 << blk::VIRTIO_BLK_F_BLK_SIZE
            | 1 << blk::VIRTIO_BLK_F_TOPOLOGY
            | 1 << blk::VIRTIO_BLK_F_FLUSH
            | 1 << blk::VIRTIO_BLK_F_MQ
            | 1 << blk::VIRTIO_BLK_F_DISCARD
            | 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The rings themselves are told.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let (offset, size) = (usize::try_from(offset).unwrap_or(usize::MAX), usize::try_from(size).unwrap_or(usize::MAX));
        let config = self.disk.config();
        offset.checked_add(size).and_then(|end| config.get(offset..end)).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        // `memory` is the same object, and has the new regions already.
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()?;
        *lock(&self.exit) = Some(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    fn stop_vring(&self, index: u32) -> io::Result<()> {
        if let Some(ring) = usize::try_from(index).ok().and_then(|index| self.rings.get(index)) {
            self.stop(ring);
        }
        Ok(())
    }

    fn handle_event(&self, event: u16, events: EventSet, vrings: &[VringMutex], _thread: usize) -> io::Result<()> {
        let index = usize::from(event);
        let machine = lock(&self.disk.gate).machine.clone();
        let (Some(vring), Some(ring), Some(machine)) = (vrings.get(index), self.rings.get(index), machine) else {
            return Ok(());
        };
        if events.contains(EventSet::IN) {
            lock(ring).vring.get_or_insert_with(|| vring.clone());
            machine.process(index);
        }
        Ok(())
    }
}

/// Why a request is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refused {
    Malformed,
    /// Blocks outside of the disk, or a length that is no number of blocks.
    Range,
    Unsupported,
}

enum Work {
    /// Answered by the card itself.
    Answer(Vec<u8>),
    Commands(Vec<Command>),
}

type Segments = Vec<(GuestAddress, usize)>;

/// Splits a chain into what the guest gives, where it wants data, and where it wants the status.
fn segments(chain: Chain) -> Option<(Segments, Segments, GuestAddress)> {
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
fn work(disk: &Disk, memory: &GuestMemoryMmap, readable: &Segments, writable: &Segments) -> Result<Work, Refused> {
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
fn bytes_of(command: &Command) -> usize {
    match command {
        Command::Read { len, .. } => usize::try_from(*len).unwrap_or(PART),
        Command::Write { data, .. } => data.len(),
        _ => 0,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u64::from_le_bytes)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remove(socket: &Path) -> io::Result<()> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests;
