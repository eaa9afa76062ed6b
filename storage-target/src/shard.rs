//! One thread, its connections, its volumes: the target's loop.
//!
//! A turn: wait; read each ready socket once, decode everything and start it; do the I/O of all commands as one
//! batch; take what has ended; write each connection's answers at once. Nothing in a turn waits for a disk, but
//! for what `io::uring` says about writes into the page cache. Volumes in memory need no batch: their commands end
//! as they are executed, without a buffer (`in_place`).
//!
//! Waiting is adaptive (`wait`): sockets that spoke last are read again before the thread asks epoll for others,
//! and while hosts answer within microseconds, so is the thread awake.
//!
//! The first shard also accepts. A connection starts there; its Connect names a volume, and when another
//! shard owns that volume the whole connection moves. From then on no data is shared between threads.
//!
//! One host, one writer. A volume's Connect is answered only when every request of earlier controllers of
//! the volume has ended: when a card dies and starts again, a write that its old socket still held cannot
//! land after a write of the new one. The same holds for a change of the volume's initiator.

mod admin;
mod connect;
mod in_place;
mod manage;
mod served;
mod wait;
mod work;

use crate::buffers::Buffers;
use crate::connection::{Command, Connection, Received};
use crate::controller::{Answer, Controller, Facts, Host, Queue, VolumeFacts};
use crate::counters::{Counting, count};
use crate::io::{self as device, FileDevice, Finished};
use crate::log_page::{self, DiscoveryEntry};
use crate::nvme::{self, BLOCK, ConnectData, DISCOVERY_NQN, MAX_IO_QUEUES, MAX_QUEUE, NSID, NSID_ALL, NvmeStatus, opcode};
use crate::qos::{Cost, Qos};
use crate::ram::Ram;
use crate::store::{self, VolumeFiles};
use crate::target::{Access, Shared, VolumeSpec, VolumeStatus};
use crate::traffic::Traffic;
use crate::volume::{CloneFiles, Completion, Request, Volume, VolumeError};
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use served::{Drain, Engine, Served};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};
use work::{Work, account, byte_range, requests, status_of};

/// Connections that may be open without having said who they are.
const MAX_STRANGERS: usize = 64;
/// How long a connection may take until its Connect.
const STRANGER_TIMEOUT: Duration = Duration::from_secs(10);
/// How often timers are looked at.
const SCAN: Duration = Duration::from_millis(500);
/// The most that one read takes from a socket, in bytes.
const SCRATCH: usize = 256 * 1024;
/// Events taken in one turn.
const MAX_EVENTS: usize = 64;

/// How long a stop waits for the disk.
const LAST_FLUSH: Duration = Duration::from_secs(60);
/// The tag of a request that no connection waits for.
const NOBODY: u64 = u64::MAX;
/// Tags of the flushes of shutdowns: this, and the controller's identifier.
const SHUTDOWN: u64 = 0xffff_fffe << 32;

const WAKE: u64 = u64::MAX;
const DEVICE: u64 = u64::MAX - 1;
const LISTENER: u64 = u64::MAX - 2;

/// Wakes a shard that sleeps.
#[derive(Debug)]
pub(crate) struct Wake {
    event: OwnedFd,
    pending: AtomicBool,
}

impl Wake {
    pub fn new() -> io::Result<Self> {
        Ok(Self { event: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?, pending: AtomicBool::new(false) })
    }

    pub fn wake(&self) {
        if !self.pending.swap(true, Ordering::AcqRel) {
            let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        }
    }

    fn clear(&self) {
        // In this order: a wake in between writes nothing, and its message is seen after this.
        let _ = rustix::io::read(&self.event, &mut [0_u8; 8]);
        self.pending.store(false, Ordering::Release);
    }
}

/// A volume whose files are open.
#[derive(Debug)]
pub(crate) struct Opened {
    pub spec: VolumeSpec,
    /// `None`: a volume in memory.
    pub files: Option<VolumeFiles>,
    pub folder: PathBuf,
}

/// What a shard is told. Replies come when it is done.
#[derive(Debug)]
pub(crate) enum Message {
    Serve {
        opened: Box<Opened>,
        reply: Sender<()>,
    },
    Update {
        spec: VolumeSpec,
        reply: Sender<()>,
    },
    Remove {
        id: String,
        reply: Sender<()>,
    },
    Status {
        id: String,
        reply: Sender<Option<VolumeStatus>>,
    },
    /// A connection whose Connect, in this slot, names a volume of this shard.
    Adopt {
        connection: Box<Connection>,
        slot: usize,
    },
    /// Other volumes than before are served, or for other hosts.
    DiscoveryChanged,
    Stop,
}

/// The shard.
pub(crate) struct Shard {
    index: usize,
    shared: Arc<Shared>,
    inbox: Receiver<Message>,
    wake: Arc<Wake>,
    listener: Option<TcpListener>,
    epoll: OwnedFd,
    device: Box<dyn FileDevice>,
    connections: slab::Slab<Box<Connection>>,
    volumes: slab::Slab<Served>,
    controllers: HashMap<u16, Controller>,
    next_controller: u16,
    buffers: Buffers,
    scratch: Vec<u8>,
    /// Connections with something to execute or to send.
    touched: Vec<usize>,
    /// Connections that spoke in the turn before.
    hot: Vec<usize>,
    patience: wait::Patience,
    finished: Vec<Finished>,
    ended: Vec<Completion>,
    start: Instant,
    now: Duration,
    next_scan: Duration,
    /// Requests that limits hold back, in all volumes.
    throttled: usize,
    /// The listener is not looked at until the next scan: accepting failed.
    accept_paused: bool,
    stopping: bool,
}

impl Shard {
    pub fn new(
        index: usize,
        shared: Arc<Shared>,
        inbox: Receiver<Message>,
        wake: Arc<Wake>,
        listener: Option<TcpListener>,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let device = device::open();
        let add = |fd: &dyn AsFd, data, flags| epoll::add(&epoll, fd.as_fd(), epoll::EventData::new_u64(data), flags);
        add(&wake.event, WAKE, epoll::EventFlags::IN)?;
        if let Some(fd) = device.wait_fd() {
            // Edge-triggered: the counter is never read.
            add(&fd, DEVICE, epoll::EventFlags::IN | epoll::EventFlags::ET)?;
        }
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
            add(listener, LISTENER, epoll::EventFlags::IN)?;
        }
        Ok(Self {
            index,
            shared,
            inbox,
            wake,
            listener,
            epoll,
            device,
            connections: slab::Slab::new(),
            volumes: slab::Slab::new(),
            controllers: HashMap::new(),
            next_controller: 1,
            buffers: Buffers::default(),
            scratch: vec![0; SCRATCH],
            touched: Vec::new(),
            hot: Vec::new(),
            patience: wait::Patience::default(),
            finished: Vec::new(),
            ended: Vec::new(),
            start: Instant::now(),
            now: Duration::ZERO,
            next_scan: SCAN,
            throttled: 0,
            accept_paused: false,
            stopping: false,
        })
    }

    /// Runs until it is told to stop.
    pub fn run(mut self) {
        let mut events = Vec::with_capacity(MAX_EVENTS);
        while !self.stopping {
            if let Err(error) = self.wait(&mut events) {
                tracing::error!(%error, "waiting for events");
                return;
            }
            count(&self.shared.counting.turns, 1);
            self.messages();
            self.scan();
            self.work();
        }
        self.finish_all();
    }

    /// The last turn: ends what was taken in and makes every volume durable, so that a stop is no crash.
    fn finish_all(&mut self) {
        for (_, served) in &mut self.volumes {
            if !served.engine.has_failed() {
                served.engine.submit(&mut *self.device, NOBODY, Request::Flush, &mut self.ended);
            }
        }
        let deadline = self.start.elapsed() + LAST_FLUSH;
        loop {
            self.work();
            if self.volumes.iter().all(|(_, served)| served.engine.is_idle()) {
                return;
            }
            if self.start.elapsed() > deadline {
                tracing::error!("stopping with requests under way: the disk does not answer");
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Executes, does I/O and answers until there is nothing left to do without waiting.
    fn work(&mut self) {
        self.release_throttled();
        loop {
            let touched = std::mem::take(&mut self.touched);
            for key in &touched {
                self.execute_ready(*key);
            }
            self.input_output();
            for key in touched.into_iter().chain(std::mem::take(&mut self.touched)) {
                self.send(key);
            }
            if self.touched.is_empty() {
                return;
            }
        }
    }

    /// Starts the batch and takes what has ended by then, and again for what that started.
    fn input_output(&mut self) {
        loop {
            self.device.kick();
            let mut finished = std::mem::take(&mut self.finished);
            self.device.reap(&mut finished);
            if finished.is_empty() {
                self.finished = finished;
                return self.finish_ended();
            }
            self.now = self.start.elapsed();
            for one in finished.drain(..) {
                let volume = usize::try_from(one.token >> 32).unwrap_or(usize::MAX);
                if let Some(served) = self.volumes.get_mut(volume) {
                    let Engine::File(engine) = &mut served.engine else { continue };
                    engine.complete(&mut *self.device, one);
                    self.ended.extend(engine.finished());
                    if engine.has_failed() && !served.failure_marked {
                        served.failure_marked = true;
                        tracing::error!(volume = served.spec.id, "flush failed: the volume takes no more writes");
                        if let Err(error) = store::mark_failed(&served.folder) {
                            tracing::error!(volume = served.spec.id, %error, "the failure could not be recorded");
                        }
                    }
                    if !served.drains.is_empty() {
                        self.finish_ended();
                        self.drain(volume);
                    }
                }
            }
            self.finished = finished;
            self.finish_ended();
        }
    }

    fn finish_ended(&mut self) {
        let mut ended = std::mem::take(&mut self.ended);
        for completion in ended.drain(..) {
            self.finish(completion);
        }
        self.ended = ended;
    }

    /// Answers a command whose requests have all ended.
    fn finish(&mut self, completion: Completion) {
        let Completion { tag, result, buffer } = completion;
        let (key, slot) = untag(tag);
        if tag & SHUTDOWN == SHUTDOWN && tag != NOBODY {
            let controller = u16::try_from(slot).ok().and_then(|id| self.controllers.get_mut(&id));
            return controller.into_iter().for_each(Controller::shut_down);
        }
        let Some(connection) = self.connections.get_mut(key) else { return };
        connection.executing = connection.executing.saturating_sub(1);
        if connection.dead {
            self.buffers.give(buffer);
            if connection.executing == 0 {
                self.bury(key);
            }
            return;
        }
        let Some(command) = connection.command_mut(slot) else { return };
        command.parts = command.parts.saturating_sub(1);
        if let Err(error) = result {
            tracing::debug!(error = &error as &dyn std::error::Error, "request failed");
            command.error.get_or_insert(status_of(&error));
        }
        if command.parts > 0 {
            return;
        }
        if command.sqe.opcode() == opcode::COMPARE && command.error.is_none() {
            let same = command.buffer.get(..command.len) == buffer.get(..command.len);
            command.error = (!same).then(|| NvmeStatus::COMPARE_FAILURE.dnr());
        }
        let (error, len, sqe) = (command.error, command.len, command.sqe);
        let took = self.now.saturating_sub(command.since);
        let queue = connection.queue;
        if let Some(served) = queue.and_then(|queue| self.volumes.get_mut(crate::bytes::narrow(queue.volume?.into()))) {
            account(&mut served.traffic, &self.shared.counting, sqe.opcode(), len, error, took);
        }
        match error {
            None if sqe.opcode() == opcode::READ => connection.respond_data(slot, buffer, len),
            error => {
                self.buffers.give(buffer);
                self.respond(key, slot, error.unwrap_or(NvmeStatus::SUCCESS), 0);
            }
        }
        self.touched.push(key);
    }

    /// Answers a command without data, and remembers its failure.
    fn respond(&mut self, key: usize, slot: usize, status: NvmeStatus, dw0: u64) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        if status != NvmeStatus::SUCCESS
            && let (Some(queue), Some(command)) = (connection.queue, connection.command_mut(slot))
            && let Some(controller) = self.controllers.get_mut(&queue.controller)
        {
            controller.failed(queue.id, &command.sqe, status);
        }
        let buffer = connection.respond(slot, status, dw0);
        self.buffers.give(buffer);
    }

    fn accept(&mut self) {
        loop {
            let stream = match self.listener.as_ref().map(TcpListener::accept) {
                Some(Ok((stream, _))) => stream,
                Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => return,
                Some(Err(error)) => {
                    // Mostly out of descriptors: trying again at once would spin.
                    tracing::warn!(%error, "accept");
                    self.listen(false);
                    return;
                }
                None => return,
            };
            let strangers = || self.connections.iter().filter(|(_, one)| one.queue.is_none() && !one.dead);
            if strangers().count() >= MAX_STRANGERS {
                // The oldest had the most time to say who it is: a flood cannot keep others out by waiting.
                let oldest = strangers().min_by_key(|(_, one)| one.since).map(|(key, _)| key);
                count(&self.shared.counting.connections_over_limit, 1);
                oldest.into_iter().for_each(|key| self.kill(key));
            }
            count(&self.shared.counting.connections_accepted, 1);
            if let Err(error) = self.take_in(stream) {
                tracing::warn!(%error, "connection not taken in");
            }
        }
    }

    fn listen(&mut self, listens: bool) {
        self.accept_paused = !listens;
        let flags = if listens { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
        if let Some(listener) = &self.listener {
            let _ = epoll::modify(&self.epoll, listener, epoll::EventData::new_u64(LISTENER), flags);
        }
    }

    fn take_in(&mut self, stream: TcpStream) -> io::Result<()> {
        let connection = Connection::new(stream, self.now)?;
        self.register(Box::new(connection)).map(drop)
    }

    fn register(&mut self, connection: Box<Connection>) -> io::Result<usize> {
        let entry = self.connections.vacant_entry();
        let key = entry.key();
        let data = epoll::EventData::new_u64(crate::bytes::wide(key));
        epoll::add(&self.epoll, connection.stream(), data, epoll::EventFlags::IN)?;
        entry.insert(connection);
        Ok(key)
    }

    /// Reads a socket once and starts what came; whether anything did.
    fn receive(&mut self, key: usize) -> bool {
        let Some(connection) = self.connections.get_mut(key) else { return false };
        if connection.dead {
            return false;
        }
        match connection.receive(&mut self.scratch, &mut self.buffers, &self.shared.counting, self.now) {
            Received::Open => {
                // At once: data of capsules is still where it was received.
                self.execute_ready(key);
                self.touched.push(key);
                true
            }
            Received::Nothing => false,
            Received::Closed => {
                self.kill(key);
                true
            }
        }
    }

    fn send(&mut self, key: usize) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        if connection.dead {
            return;
        }
        if connection.has_output() {
            let volume = connection.queue.and_then(|queue| queue.volume);
            let served = volume.and_then(|volume| self.volumes.get_mut(crate::bytes::narrow(volume.into())));
            let (ram, lends) = match served {
                Some(Served { engine: Engine::Ram(ram), lends, .. }) => (Some(&*ram), Some(lends)),
                _ => (None, None),
            };
            if connection.send(&mut self.buffers, ram) == Received::Closed {
                return self.kill(key);
            }
            if let Some(lends) = lends {
                *lends |= connection.has_lent();
            }
        }
        if connection.has_ready() {
            self.touched.push(key);
        }
        if connection.has_output() != connection.waits_for_room {
            connection.waits_for_room = connection.has_output();
            let out = if connection.waits_for_room { epoll::EventFlags::OUT } else { epoll::EventFlags::empty() };
            let data = epoll::EventData::new_u64(crate::bytes::wide(key));
            let _ = epoll::modify(&self.epoll, connection.stream(), data, epoll::EventFlags::IN | out);
        }
    }

    fn execute_ready(&mut self, key: usize) {
        while let Some(connection) = self.connections.get_mut(key) {
            if connection.dead {
                return;
            }
            let Some(slot) = connection.next_ready() else { return };
            match connection.queue {
                None => self.connect(key, slot),
                Some(queue) if queue.id == 0 => self.admin(key, slot, queue),
                Some(queue) => self.execute(key, slot, queue),
            }
        }
    }

    /// Executes a command of an I/O queue.
    fn execute(&mut self, key: usize, slot: usize, queue: Queue) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        let enabled = self.controllers.get_mut(&queue.controller).is_some_and(|controller| {
            controller.seen(self.now);
            controller.is_enabled()
        });
        let volume = crate::bytes::narrow(queue.volume.unwrap_or(u32::MAX).into());
        let Some(command) = connection.command_mut(slot).filter(|_| self.volumes.contains(volume)) else {
            return self.answer(key, slot, NvmeStatus::NOT_READY, 0);
        };
        if !enabled {
            return self.answer(key, slot, NvmeStatus::SEQUENCE.dnr(), 0);
        }
        let sqe = command.sqe;
        if sqe.opcode() == opcode::FABRICS {
            // Disconnect of an I/O queue: answered, then closed by the host.
            return self.answer(key, slot, NvmeStatus::SUCCESS, 0);
        }
        if queue.in_place {
            if self.execute_in_place(key, slot, volume, &sqe) {
                return;
            }
            let Some(connection) = self.connections.get_mut(key) else { return };
            connection.own(slot, &self.scratch, &mut self.buffers);
        }
        let (Some(served), Some(connection)) = (self.volumes.get_mut(volume), self.connections.get_mut(key)) else { return };
        let Some(command) = connection.command_mut(slot) else { return };
        match requests(command, &mut self.buffers, served.engine.size()) {
            Err(status) => self.answer(key, slot, status.dnr(), 0),
            Ok(Work::Nothing) => self.answer(key, slot, NvmeStatus::SUCCESS, 0),
            Ok(Work::One(request, cost)) => {
                command.parts = 1;
                connection.executing += 1;
                self.request(volume, tag(key, slot), request, cost);
            }
            Ok(Work::Many(requests)) => {
                command.parts = requests.len();
                connection.executing += requests.len();
                for request in requests {
                    self.request(volume, tag(key, slot), request, Cost::of_command());
                }
            }
        }
    }

    /// Gives the volume a request, or keeps it until the limits let it through.
    fn request(&mut self, volume: usize, tag: u64, request: Request, cost: Cost) {
        let Some(served) = self.volumes.get_mut(volume) else { return };
        let free = matches!(request, Request::Flush);
        if !free && (!served.throttled.is_empty() || served.qos.admit(self.now, cost).is_err()) {
            count(&self.shared.counting.throttled, 1);
            if served.throttled.is_empty() {
                served.throttled_since = self.now;
            }
            served.throttled.push_back((tag, request, cost));
            self.throttled += 1;
            return;
        }
        if !matches!(request, Request::Read { .. } | Request::Flush) {
            self.settle(volume);
        }
        let Some(served) = self.volumes.get_mut(volume) else { return };
        served.engine.submit(&mut *self.device, tag, request, &mut self.ended);
    }

    fn release_throttled(&mut self) {
        if self.throttled == 0 {
            return;
        }
        for key in 0..self.volumes.capacity() {
            if self.volumes.get(key).is_some_and(|served| !served.throttled.is_empty()) {
                self.settle(key);
            }
            let Some(served) = self.volumes.get_mut(key) else { continue };
            if let Some((_, _, cost)) = served.throttled.front() {
                let waited = self.now.saturating_sub(served.throttled_since);
                let waited = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
                served.throttled_since = self.now;
                let (iops, throughput) = (&mut served.traffic.over_iops_us, &mut served.traffic.over_throughput_us);
                *if served.qos.is_over_operations(self.now, *cost) { iops } else { throughput } += waited;
            }
            while let Some((_, _, cost)) = served.throttled.front() {
                if served.qos.admit(self.now, *cost).is_err() {
                    break;
                }
                if let Some((tag, request, _)) = served.throttled.pop_front() {
                    self.throttled -= 1;
                    served.engine.submit(&mut *self.device, tag, request, &mut self.ended);
                }
            }
        }
    }

    fn answer(&mut self, key: usize, slot: usize, status: NvmeStatus, dw0: u64) {
        if status != NvmeStatus::SUCCESS {
            count(&self.shared.counting.commands_failed, 1);
        }
        self.respond(key, slot, status, dw0);
        self.touched.push(key);
    }

    /// Looks at the timers.
    fn scan(&mut self) {
        if self.now < self.next_scan {
            return;
        }
        self.next_scan = self.now + SCAN;
        if self.accept_paused {
            self.listen(true);
        }
        let late: Vec<usize> = self
            .connections
            .iter()
            .filter(|(_, one)| !one.dead && one.queue.is_none() && one.since + STRANGER_TIMEOUT < self.now)
            .map(|(key, _)| key)
            .collect();
        count(&self.shared.counting.connections_timed_out, crate::bytes::wide(late.len()));
        let over = self.connections.iter().filter(|(_, one)| !one.dead && one.is_over(self.now)).map(|(key, _)| key);
        let over: Vec<usize> = over.chain(late).collect();
        let expired: Vec<usize> = self.controllers.values().filter(|one| one.is_expired(self.now)).map(|one| one.admin).collect();
        count(&self.shared.counting.keep_alive_expired, crate::bytes::wide(expired.len()));
        for key in over.into_iter().chain(expired) {
            self.kill(key);
        }
    }
}

fn has_zombies(connections: &slab::Slab<Box<Connection>>, volume: usize) -> bool {
    let key = u32::try_from(volume).ok();
    connections.iter().any(|(_, one)| one.dead && one.queue.is_some_and(|queue| queue.volume == key))
}

fn tag(connection: usize, slot: usize) -> u64 {
    crate::bytes::wide(connection) << 32 | crate::bytes::wide(slot)
}

fn untag(tag: u64) -> (usize, usize) {
    (crate::bytes::narrow(tag >> 32), crate::bytes::narrow(tag & 0xffff_ffff))
}
