//! A guest's disk: virtio-blk (virtio 1.2, section 5.2) over vhost-user, backed by an NVMe/TCP initiator.
//!
//! The path of a block write enters here: guest queue → [`DiskServer`] → `storage_target::Initiator` ⇒ target.
//!
//! The machine binds a socket and the card connects to it, again whenever it is there anew. Invariants:
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

mod machine;
mod request;

use machine::Machine;

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use dataplane::io::vhost::dial::Dialer;
pub use storage_target::InitiatorSettings;
use storage_target::{Command, CommandEnd, Initiator, Lba, NvmeStatus};
use vhost::vhost_user::Error as VhostError;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{Error as DaemonError, ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
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
/// How long a stop waits for the thread that serves the machine. Only a socket whose other side accepts
/// nothing can hold that up, in a system call that has no time limit.
const HANG_UP_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause after a connection could not be served, which means that descriptors or threads ran out.
const RETRY: Duration = Duration::from_millis(100);

const STATUS_OK: u8 = 0;
const STATUS_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Chain = DescriptorChain<vm_memory::atomic::GuestMemoryLoadGuard<GuestMemoryMmap>>;

/// What happened at one disk since it was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskCounters {
    /// Connections to a machine.
    pub connections: u64,
    /// Requests answered well.
    pub completed: u64,
    /// Requests answered with an error.
    pub failed: u64,
    /// Descriptor chains that made no sense.
    pub malformed: u64,
}

/// A disk of a machine. Dropping it stops it.
pub struct DiskServer {
    disk: Arc<Disk>,
    socket: PathBuf,
    /// Disconnected when the serving thread has ended.
    server: Option<mpsc::Receiver<()>>,
}

impl DiskServer {
    /// Serves whoever binds `socket` and connects to the volume, without waiting for either side.
    ///
    /// `serial` is what the guest reads with GET_ID, cut to 20 bytes; `size_bytes` is the capacity.
    ///
    /// # Errors
    /// When descriptors or threads have run out.
    pub fn start(socket: PathBuf, initiator: InitiatorSettings, serial: String, size_bytes: u64) -> io::Result<Self> {
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
            dialer: Dialer::new(socket.clone())?,
            connection: Mutex::default(),
            counting: Counting::default(),
        });
        let serving = Arc::clone(&disk);
        let (ended, server) = mpsc::channel();
        std::thread::Builder::new().name("disk".into()).spawn(move || {
            serving.serve();
            drop(ended);
        })?;
        Ok(Self { disk, socket, server: Some(server) })
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> DiskCounters {
        self.disk.counting.read()
    }

    /// A reader of the counters that may be kept elsewhere.
    pub fn meter(&self) -> impl Fn() -> DiskCounters + Send + Sync + use<> {
        let disk = Arc::clone(&self.disk);
        move || disk.counting.read()
    }

    /// Whether the volume's target answers.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.disk.initiator.is_connected()
    }

    /// Hangs up, ends what is under way and flushes the volume. The socket file is the machine's and stays.
    ///
    /// A target that is away is waited for, but not for ever.
    pub fn stop(mut self) {
        self.shut_down();
    }

    fn shut_down(&mut self) {
        let Some(server) = self.server.take() else { return };
        self.disk.dialer.stop();
        if let Some(handle) = &*lock(&self.disk.connection) {
            handle.shutdown();
        }
        if server.recv_timeout(HANG_UP_TIMEOUT) == Err(mpsc::RecvTimeoutError::Timeout) {
            // The thread ends as soon as the call does; it serves nobody any more.
            tracing::warn!(socket = %self.socket.display(), "the machine's end of the socket hangs");
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
    dialer: Dialer,
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

impl Counting {
    fn read(&self) -> DiskCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DiskCounters {
            connections: read(&self.connections),
            completed: read(&self.completed),
            failed: read(&self.failed),
            malformed: read(&self.malformed),
        }
    }
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
    /// Serves one machine after the other.
    fn serve(self: &Arc<Self>) {
        while !self.dialer.is_stopped() {
            if let Err(error) = self.connect() {
                tracing::warn!(%error, "disk connection");
                std::thread::sleep(RETRY);
            }
        }
    }

    /// Waits for the next machine and serves it until it goes.
    fn connect(self: &Arc<Self>) -> Result<(), DaemonError> {
        let memory = Memory::new(GuestMemoryMmap::new());
        let machine = Arc::new(Machine {
            disk: Arc::clone(self),
            memory: memory.clone(),
            rings: (0..RINGS).map(|_| Mutex::default()).collect(),
            exit: Mutex::default(),
        });
        lock(&self.gate).machine = Some(Arc::clone(&machine));
        let result = self.run(&machine, memory);
        machine.forget();
        if let Some(fd) = lock(&machine.exit).take() {
            // SAFETY: `fd` is the exit event that `Machine::exit_event` gave to the daemon, which turned it into a
            // bare descriptor and never closes it; the daemon and its threads ended in `run`, so nobody has it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        match result {
            Err(DaemonError::HandleRequest(VhostError::Disconnected | VhostError::PartialMessage)) => Ok(()),
            result => result,
        }
    }

    fn run(&self, machine: &Arc<Machine>, memory: Memory) -> Result<(), DaemonError> {
        let mut daemon = VhostUserDaemon::new("disk-vhost".into(), Arc::clone(machine), memory)?;
        let connect = |path: &std::path::Path| match daemon.start_client(&path.to_string_lossy()) {
            Err(DaemonError::CreateBackendReqHandler(VhostError::SocketConnect(error))) => Err(error),
            result => result.map_err(|error| io::Error::other(error.to_string())),
        };
        if self.dialer.dial(connect).is_none() {
            return Ok(());
        }
        self.counting.connections.fetch_add(1, Ordering::Relaxed);
        *lock(&self.connection) = daemon.shutdown_handle();
        // A stop that came before found no connection to shut down.
        if self.dialer.is_stopped() {
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests;
