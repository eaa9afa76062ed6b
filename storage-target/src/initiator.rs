//! The card's side of NVMe/TCP: a disk that may be away for a while, but never fails for it.
//!
//! **Block write**: guest queue → `nitro_card::disk` → [`Initiator`] → `pdu` ⇒ `pdu` → `connection` → `shard` →
//! `qos` → `volume` → `io`. Acknowledged when data and map are in the target's page cache; a flush when both are
//! on its disk. Calls go forward only.
//!
//! A thread holds the connection: admin queue and one I/O queue. It connects, and connects again whenever
//! the connection breaks or the keep alive gets no answer, for ever. Commands that were sent and not answered
//! are sent again, in their order, before newer ones; the target answers a Connect only when nothing of the
//! connection before can still change the volume, so a repeated command meets no older self.
//!
//! [`Initiator::submit`] writes to the socket from the caller's thread; the initiator's thread reads, and runs
//! completions. Both share [`Core`] under one lock, which no system call but a non-blocking write is made under.

mod channel;
mod link;

pub(crate) use channel::*;
use link::Link;

use crate::nvme::{BLOCK, ConnectData, Cqe, MAX_QUEUE, MAX_TRANSFER, NSID, NvmeStatus, Sgl, Sqe, fabrics, opcode, property};
use crate::pdu::{self, Data, Digests, Header};
use rustix::event::{Timespec, epoll};
use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Commands that may be with the target at once: the queue's entries but one.
const DEPTH: u16 = MAX_QUEUE - 1;
/// The longest wait between two attempts to connect.
const LONGEST_WAIT: Duration = Duration::from_millis(500);
const FIRST_WAIT: Duration = Duration::from_millis(10);
/// KATO: after this much silence the target forgets the controller.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(5);
const SCRATCH: usize = 256 * 1024;
const ADMIN: u64 = 0;
const IO: u64 = 1;

/// A logical block address, in blocks of 512 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lba(pub u64);

/// What a volume is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// `len` bytes, a multiple of 512, at most 1 MiB.
    Read {
        /// The first block.
        lba: Lba,
        /// Bytes.
        len: u32,
    },
    /// A multiple of 512 bytes, at most 1 MiB.
    Write {
        /// The first block.
        lba: Lba,
        /// What to write.
        data: Vec<u8>,
    },
    /// Everything acknowledged before becomes durable.
    Flush,
    /// At most 65,536 blocks read as zeros.
    WriteZeroes {
        /// The first block.
        lba: Lba,
        /// How many.
        blocks: u32,
    },
    /// Blocks whose content is needed no more.
    Deallocate {
        /// The first block.
        lba: Lba,
        /// How many.
        blocks: u32,
    },
}

/// Called once, when the command has ended: with the data of a read, or nothing.
pub type CommandEnd = Box<dyn FnOnce(Result<Vec<u8>, NvmeStatus>) + Send>;

/// Which volume, and who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitiatorSettings {
    /// Where the target listens.
    pub address: SocketAddr,
    /// The volume's NQN: [`crate::volume_nqn`].
    pub subsystem_nqn: String,
    /// The card's NQN.
    pub host_nqn: String,
}

/// What an initiator counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InitiatorCounters {
    /// Connections made.
    pub connects: u64,
    /// Attempts that failed.
    pub connect_failures: u64,
    /// Commands sent again after a connection broke.
    pub replayed: u64,
    /// Commands that ended well.
    pub completed: u64,
    /// Commands that ended with an error.
    pub failed: u64,
}

/// A connection to one volume. Dropping it stops it.
pub struct Initiator {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    core: Mutex<Core>,
    /// Signalled when the connection comes or goes, and when stopping.
    changed: Condvar,
    settings: InitiatorSettings,
    digests: Digests,
}

/// What submitters and the thread share.
struct Core {
    link: Option<Link>,
    /// Commands that were not sent yet.
    queue: VecDeque<Outstanding>,
    /// Commands that were sent, by command identifier.
    sent: Vec<Option<Outstanding>>,
    free: Vec<u16>,
    next_order: u64,
    size_bytes: Option<u64>,
    counters: InitiatorCounters,
    stopping: bool,
    /// Ends of commands run: what they submit goes out with one write when all have run.
    corked: bool,
}

struct Outstanding {
    order: u64,
    command: Prepared,
    end: CommandEnd,
    /// What a read has got so far.
    buffer: Vec<u8>,
    received: usize,
}

/// A command whose data can be in the socket's queue and be kept for a replay at once.
#[derive(Clone)]
enum Prepared {
    Read { lba: Lba, len: u32 },
    Write { lba: Lba, data: Arc<Vec<u8>> },
    Flush,
    WriteZeroes { lba: Lba, blocks: u32 },
    Deallocate { ranges: Arc<Vec<u8>> },
}

impl Initiator {
    /// Starts to connect, and returns at once.
    ///
    /// # Errors
    /// When the process can have no more threads.
    pub fn start(settings: InitiatorSettings) -> io::Result<Self> {
        Self::start_with_digests(settings, Digests::default())
    }

    /// The same, with CRC32C over headers or data.
    ///
    /// # Errors
    /// When the process can have no more threads.
    pub fn start_with_digests(settings: InitiatorSettings, digests: Digests) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            core: Mutex::new(Core {
                link: None,
                queue: VecDeque::new(),
                sent: (0..DEPTH).map(|_| None).collect(),
                free: (0..DEPTH).rev().collect(),
                next_order: 0,
                size_bytes: None,
                counters: InitiatorCounters::default(),
                stopping: false,
                corked: false,
            }),
            changed: Condvar::new(),
            settings,
            digests,
        });
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("initiator".into()).spawn(move || worker.run())?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Starts a command. It ends when the target has answered, however long that takes, or with
    /// [`NvmeStatus::ABORTED_SQ_DELETION`] when the initiator is stopped.
    pub fn submit(&self, command: Command, end: CommandEnd) {
        self.submit_all([(command, end)]);
    }

    /// Starts several commands with one write to the socket.
    pub fn submit_all(&self, commands: impl IntoIterator<Item = (Command, CommandEnd)>) {
        let mut refused = Vec::new();
        let mut core = self.shared.core();
        for (command, end) in commands {
            let Some(command) = command.checked() else {
                refused.push((end, NvmeStatus::INVALID_FIELD));
                continue;
            };
            if core.stopping {
                refused.push((end, NvmeStatus::ABORTED_SQ_DELETION));
                continue;
            }
            let order = core.next_order;
            core.next_order += 1;
            core.queue.push_back(Outstanding { order, command, end, buffer: Vec::new(), received: 0 });
        }
        core.pump();
        drop(core);
        for (end, status) in refused {
            end(Err(status));
        }
    }

    /// Whether the target answers now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.shared.core().link.is_some()
    }

    /// The volume's size, as the target said at the last connection.
    #[must_use]
    pub fn size_bytes(&self) -> Option<u64> {
        self.shared.core().size_bytes
    }

    /// Waits until the target answers; false after `timeout`.
    #[must_use]
    pub fn wait_connected(&self, timeout: Duration) -> bool {
        let core = self.shared.core();
        let wait = self.shared.changed.wait_timeout_while(core, timeout, |core| core.link.is_none() && !core.stopping);
        wait.unwrap_or_else(PoisonError::into_inner).0.link.is_some()
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> InitiatorCounters {
        self.shared.core().counters
    }

    /// Disconnects; commands under way end with an error, and may or may not have been done.
    pub fn stop(&self) {
        let mut core = self.shared.core();
        core.stopping = true;
        if let Some(link) = &core.link {
            let _ = link.stream.shutdown(Shutdown::Both);
            let _ = link.admin.shutdown(Shutdown::Both);
        }
        drop(core);
        self.shared.changed.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl Drop for Initiator {
    fn drop(&mut self) {
        self.stop();
    }
}

impl std::fmt::Debug for Initiator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Initiator").field("settings", &self.shared.settings).finish_non_exhaustive()
    }
}

impl Command {
    fn checked(self) -> Option<Prepared> {
        let whole = |len: u64| len > 0 && len <= MAX_TRANSFER && len.is_multiple_of(BLOCK);
        match self {
            Self::Read { lba, len } => whole(len.into()).then_some(Prepared::Read { lba, len }),
            Self::Write { lba, data } => whole(crate::bytes::wide(data.len())).then(|| Prepared::Write { lba, data: Arc::new(data) }),
            Self::Flush => Some(Prepared::Flush),
            Self::WriteZeroes { lba, blocks } => (1..=65_536).contains(&blocks).then_some(Prepared::WriteZeroes { lba, blocks }),
            Self::Deallocate { lba, blocks } => {
                let mut range = vec![0; 16];
                crate::bytes::put(&mut range, 4, &blocks.to_le_bytes());
                crate::bytes::put(&mut range, 8, &lba.0.to_le_bytes());
                (blocks > 0).then(|| Prepared::Deallocate { ranges: Arc::new(range) })
            }
        }
    }
}

impl Prepared {
    /// The entry, and the data that goes to the target.
    fn entry(&self, cid: u16, in_capsule: usize) -> (Sqe, Option<Arc<Vec<u8>>>) {
        let at = |opcode, lba: Lba, blocks: u64| {
            let low = u32::try_from(lba.0 & 0xffff_ffff).unwrap_or(u32::MAX);
            let high = u32::try_from(lba.0 >> 32).unwrap_or(u32::MAX);
            let count = u32::try_from(blocks - 1).unwrap_or(u32::MAX);
            Sqe::new(opcode, cid, NSID).with(10, low).with(11, high).with(12, count)
        };
        let placed = |sqe: Sqe, data: &Arc<Vec<u8>>| {
            let len = crate::bytes::narrow32(data.len());
            let here = data.len() <= in_capsule;
            let sgl = if here { Sgl::InCapsule { offset: 0, len } } else { Sgl::Transport { len } };
            (sqe.with_sgl(sgl), here.then(|| Arc::clone(data)))
        };
        match self {
            Self::Read { lba, len } => (at(opcode::READ, *lba, u64::from(*len) / BLOCK).with_sgl(Sgl::Transport { len: *len }), None),
            Self::Write { lba, data } => placed(at(opcode::WRITE, *lba, crate::bytes::wide(data.len()) / BLOCK), data),
            Self::Flush => (Sqe::new(opcode::FLUSH, cid, NSID), None),
            Self::WriteZeroes { lba, blocks } => (at(opcode::WRITE_ZEROES, *lba, (*blocks).into()), None),
            Self::Deallocate { ranges } => placed(Sqe::new(opcode::DATASET_MANAGEMENT, cid, NSID).with(11, 1 << 2), ranges),
        }
    }

    fn data(&self) -> Option<&Arc<Vec<u8>>> {
        match self {
            Self::Write { data, .. } | Self::Deallocate { ranges: data } => Some(data),
            Self::Read { .. } | Self::Flush | Self::WriteZeroes { .. } => None,
        }
    }
}

impl Core {
    /// Sends queued commands as far as the queue has entries, and whatever waits for the socket.
    fn pump(&mut self) {
        let Some(link) = self.link.as_mut().filter(|_| !self.corked) else { return };
        while !self.queue.is_empty() {
            let Some(cid) = self.free.pop() else { break };
            let Some(mut command) = self.queue.pop_front() else { break };
            let (sqe, data) = command.command.entry(cid, link.in_capsule);
            if let Prepared::Read { len, .. } = command.command {
                command.buffer.resize(crate::bytes::narrow(len.into()), 0);
                command.received = 0;
            }
            link.push(&Header::Command { sqe: sqe.0 }, data.map(|data| (0, data.len(), data)));
            if let Some(slot) = self.sent.get_mut(usize::from(cid)) {
                *slot = Some(command);
            }
        }
        link.send();
    }

    /// Puts what was sent and not answered back in front of the queue, in the order of submission.
    fn requeue(&mut self) {
        self.link = None;
        let mut back: Vec<Outstanding> = self.sent.iter_mut().filter_map(Option::take).collect();
        self.free = (0..DEPTH).rev().collect();
        self.counters.replayed += crate::bytes::wide(back.len());
        back.sort_by_key(|command| command.order);
        for command in back.into_iter().rev() {
            self.queue.push_front(command);
        }
    }
}

impl Shared {
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread.
    fn run(&self) {
        // Full jitter, seeded by who asks for what, so that cards do not come back all at once.
        let names = [self.settings.host_nqn.as_bytes(), self.settings.subsystem_nqn.as_bytes()].concat();
        let mut chance = u64::from(crc32c::crc32c(&names)) << 16 | 1;
        let mut wait = FIRST_WAIT;
        let mut reported = false;
        loop {
            match self.connect() {
                Ok((admin, receiving)) => {
                    tracing::info!(subsystem = self.settings.subsystem_nqn, "connected");
                    (wait, reported) = (FIRST_WAIT, false);
                    let error = self.serve(admin, receiving);
                    let mut core = self.core();
                    core.requeue();
                    if !core.stopping {
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(subsystem = self.settings.subsystem_nqn, error, "connection lost");
                    }
                }
                Err(error) => {
                    self.core().counters.connect_failures += 1;
                    if !reported {
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(subsystem = self.settings.subsystem_nqn, error, "cannot connect; trying on");
                        reported = true;
                    }
                }
            }
            chance ^= chance << 13;
            chance ^= chance >> 7;
            chance ^= chance << 17;
            let micros = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
            let pause = Duration::from_micros(micros / 2 + chance % (micros / 2 + 1));
            wait = (wait * 2).min(LONGEST_WAIT);
            let core = self.core();
            let waited = self.changed.wait_timeout_while(core, pause, |core| !core.stopping);
            let mut core = waited.unwrap_or_else(PoisonError::into_inner).0;
            if core.stopping {
                core.requeue();
                let ends: Vec<Outstanding> = core.queue.drain(..).collect();
                drop(core);
                for command in ends {
                    (command.end)(Err(NvmeStatus::ABORTED_SQ_DELETION));
                }
                return;
            }
        }
    }

    /// Connects both queues and lets commands go.
    fn connect(&self) -> Result<(Channel, Channel), LinkError> {
        let mut admin = Channel::open(self.settings.address, self.digests)?;
        let host_id = host_id(&self.settings.host_nqn);
        let mut data = ConnectData {
            host_id,
            controller: 0xffff,
            subsystem_nqn: self.settings.subsystem_nqn.clone(),
            host_nqn: self.settings.host_nqn.clone(),
        };
        let cqe = admin.run("connect", connect_entry(0, 31, KEEP_ALIVE), &data.encode(), 0)?.0;
        data.controller = u16::try_from(cqe.dw0 & 0xffff).unwrap_or(u16::MAX);
        let set = Sqe::new(opcode::FABRICS, 0, fabrics::PROPERTY_SET.into());
        admin.run("enable", set.with(11, property::CC).with(12, 0x0046_0001), &[], 0)?;
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        loop {
            let get = Sqe::new(opcode::FABRICS, 0, fabrics::PROPERTY_GET.into()).with(11, property::CSTS);
            let status = admin.run("controller status", get, &[], 0)?.0.dw0;
            if status & 1 != 0 {
                break;
            }
            if status & 2 != 0 || Instant::now() > deadline {
                return Err(LinkError::Protocol("the controller does not become ready"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let identify = |cns, nsid| Sqe::new(opcode::IDENTIFY, 0, nsid).with(10, cns);
        let controller = admin.run("identify controller", identify(1, 0), &[], 4096)?.1;
        let capsule = crate::bytes::narrow(crate::bytes::u32_at(&controller, 1792).into()) * 16;
        let namespace = admin.run("identify namespace", identify(0, NSID), &[], 4096)?.1;
        let format = usize::from(crate::bytes::u8_at(&namespace, 26) & 0xf);
        if crate::bytes::u8_at(&namespace, 128 + 4 * format + 2) != 9 {
            return Err(LinkError::Protocol("the namespace has not 512-byte blocks"));
        }
        let queues = Sqe::new(opcode::SET_FEATURES, 0, 0).with(10, 7).with(11, 0);
        admin.run("number of queues", queues, &[], 0)?;
        let mut io = Channel::open(self.settings.address, self.digests)?;
        io.run("connect I/O queue", connect_entry(1, MAX_QUEUE - 1, Duration::ZERO), &data.encode(), 0)?;
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?);
        for (channel, key) in [(&admin, ADMIN), (&io, IO)] {
            channel.stream.set_nonblocking(true)?;
            let data = epoll::EventData::new_u64(key);
            epoll::add(&*epoll, &*channel.stream, data, epoll::EventFlags::IN).map_err(io::Error::from)?;
        }
        let mut core = self.core();
        core.size_bytes = Some(crate::bytes::u64_at(&namespace, 0).saturating_mul(BLOCK));
        core.counters.connects += 1;
        core.link = Some(Link {
            stream: Arc::clone(&io.stream),
            admin: Arc::clone(&admin.stream),
            epoll,
            digests: io.digests,
            align: io.align,
            max_h2c_data: io.max_h2c_data,
            in_capsule: capsule.saturating_sub(64).min(crate::bytes::narrow(pdu::IN_CAPSULE.into())),
            pieces: VecDeque::new(),
            offset: 0,
            waits_for_room: false,
        });
        if core.stopping {
            core.link = None;
            return Err(LinkError::Protocol("stopping"));
        }
        core.pump();
        drop(core);
        self.changed.notify_all();
        Ok((admin, io))
    }

    /// Reads answers until the connection breaks.
    fn serve(&self, mut admin: Channel, mut io: Channel) -> LinkError {
        let epoll = match &self.core().link {
            Some(link) => Arc::clone(&link.epoll),
            None => return LinkError::Protocol("stopping"),
        };
        let mut scratch = vec![0; SCRATCH];
        let mut events = Vec::with_capacity(4);
        let (mut spoke, mut asked) = (Instant::now(), false);
        loop {
            let timeout = KEEP_ALIVE_EVERY.saturating_sub(spoke.elapsed());
            let timeout = Timespec { tv_sec: timeout.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: timeout.subsec_nanos().into() };
            events.clear();
            match epoll::wait(&*epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return LinkError::Socket(error.into()),
            }
            for event in &events {
                let result = match event.data.u64() {
                    ADMIN => admin.receive(&mut scratch).and_then(|bytes| {
                        asked = false;
                        admin.decode(bytes, |_, _| Ok(()))
                    }),
                    _ => self.receive(&mut io, &mut scratch),
                };
                if let Err(error) = result {
                    return error;
                }
            }
            if spoke.elapsed() >= KEEP_ALIVE_EVERY {
                if asked {
                    return LinkError::Silent;
                }
                if let Err(error) = admin.send(&Sqe::new(opcode::KEEP_ALIVE, 1, 0)) {
                    return error.into();
                }
                (spoke, asked) = (Instant::now(), true);
            }
        }
    }

    /// Reads once from the I/O queue and ends the commands that were answered.
    fn receive(&self, io: &mut Channel, scratch: &mut [u8]) -> Result<(), LinkError> {
        let bytes = match io.receive(scratch) {
            Ok(bytes) => bytes,
            Err(LinkError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => &[],
            Err(error) => return Err(error),
        };
        let mut ends = Vec::new();
        let mut core = self.core();
        let decoded = io.decode(bytes, |header, data| core.handle(header, data, &mut ends));
        core.corked = true;
        drop(core);
        for (end, result) in ends {
            end(result);
        }
        let mut core = self.core();
        core.corked = false;
        if decoded.is_ok() {
            core.pump();
        }
        decoded
    }
}

type Ends = Vec<(CommandEnd, Result<Vec<u8>, NvmeStatus>)>;

impl Core {
    fn handle(&mut self, header: &Header, data: &[u8], ends: &mut Ends) -> Result<(), LinkError> {
        match *header {
            Header::Response { cqe } => {
                let cqe = Cqe::decode(&cqe);
                self.end(cqe.cid, cqe.status, ends)
            }
            Header::C2hData(part) => {
                let command = self.sent.get_mut(usize::from(part.cid)).and_then(Option::as_mut);
                let command = command.ok_or(LinkError::Protocol("data for no command"))?;
                let start = crate::bytes::narrow(part.offset.into());
                if start != command.received || data.len() > command.buffer.len() - start {
                    return Err(LinkError::Protocol("data outside of what was asked for"));
                }
                crate::bytes::put(&mut command.buffer, start, data);
                command.received += data.len();
                if part.success {
                    return self.end(part.cid, NvmeStatus::SUCCESS, ends);
                }
                Ok(())
            }
            Header::R2t { cid, ttag, offset, len } => {
                let command = self.sent.get(usize::from(cid)).and_then(Option::as_ref);
                let data = command.and_then(|command| command.command.data());
                let (Some(data), Some(link)) = (data, &mut self.link) else {
                    return Err(LinkError::Protocol("R2T for no write"));
                };
                let (mut at, len) = (crate::bytes::narrow(offset.into()), crate::bytes::narrow(len.into()));
                let end = at.saturating_add(len);
                if end > data.len() || len == 0 {
                    return Err(LinkError::Protocol("R2T outside of the data"));
                }
                while at < end {
                    let stop = end.min(at + link.max_h2c_data);
                    let part = Data {
                        cid,
                        ttag,
                        offset: crate::bytes::narrow32(at),
                        len: crate::bytes::narrow32(stop - at),
                        last: stop == end,
                        success: false,
                    };
                    link.push(&Header::H2cData(part), Some((at, stop, Arc::clone(data))));
                    at = stop;
                }
                Ok(())
            }
            Header::C2hTerm { .. } => Err(LinkError::Protocol("it ended the connection")),
            _ => Err(LinkError::Protocol("a PDU out of place")),
        }
    }

    fn end(&mut self, cid: u16, status: NvmeStatus, ends: &mut Ends) -> Result<(), LinkError> {
        // These say that the command was not done and the next try may fare better.
        const AGAIN: [NvmeStatus; 4] =
            [NvmeStatus::NOT_READY, NvmeStatus::TRANSIENT_TRANSPORT, NvmeStatus::ABORTED_SQ_DELETION, NvmeStatus::DATA_TRANSFER];
        if AGAIN.iter().any(|again| status.is(*again)) {
            return Err(LinkError::Retry(status));
        }
        let slot = self.sent.get_mut(usize::from(cid)).ok_or(LinkError::Protocol("an answer to no command"))?;
        let command = slot.take().ok_or(LinkError::Protocol("an answer to no command"))?;
        let short = matches!(command.command, Prepared::Read { .. }) && command.received < command.buffer.len();
        if status == NvmeStatus::SUCCESS && short {
            *slot = Some(command);
            return Err(LinkError::Protocol("a read without all of its data"));
        }
        self.free.push(cid);
        if status == NvmeStatus::SUCCESS {
            self.counters.completed += 1;
            ends.push((command.end, Ok(command.buffer)));
        } else {
            self.counters.failed += 1;
            ends.push((command.end, Err(status)));
        }
        Ok(())
    }
}
