//! The worker: one thread that owns the devices and the tables of a card and runs
//! each burst to completion.
//!
//! The path of a packet, forward only:
//!
//! `io::rx_burst` → `worker::turn` → [`pipeline`](crate::pipeline) →
//! [`headers`](crate::headers) → [`flow`](crate::flow) → [`action`](crate::action)
//! (with [`vxlan`](crate::vxlan)) → `io::tx_burst`. On a flow miss `pipeline` asks
//! [`policy`](crate::policy) (anti_spoof, security_group, route, nat, in the order
//! written there), stores the flow and goes on.
//!
//! Captures ([`capture`]) see frames where a device gives or takes
//! them and where they die; questions of operators are answered between two turns.
//!
//! Nothing to do: the thread sleeps in one `ppoll` over all devices and its own
//! eventfd, until a frame, a command or the next deadline. A device without a
//! descriptor is polled: continuously for 50 us after its last frame, then with
//! pauses that grow from 100 us to 1 ms, and to 10 ms once nothing came for 10 s.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError};
use rustix::event::{EventfdFlags, eventfd};

use crate::action::Output;
use crate::capture::{self, Taps, Way};
use crate::counters::{Board, Counters, DropReason};
use crate::io::wait::Waiter;
use crate::io::{BURST, PacketIo};
use crate::packet::{Packet, Pool};
use crate::pipeline::{Device, Pipeline, Turn};
use crate::policy::Tables;
use crate::{PortId, Settings, Snapshot};

/// Free buffers kept by the worker, 9.3 KiB each.
const POOL: usize = 1024;
/// Frames on their way to the card's services, and from them.
const SERVICE_QUEUE: usize = 256;
/// How long a device without a descriptor is polled without a pause.
const SPIN: Duration = Duration::from_micros(50);
/// The first pause after that.
const PAUSE_MIN: Duration = Duration::from_micros(100);
/// The longest one while the device was used lately.
const PAUSE_MAX: Duration = Duration::from_millis(1);
/// When it was not used for this long, the pause is the idle one: a thousand
/// wake-ups a second cost 2 % of a core on a virtual machine.
const IDLE: Duration = Duration::from_secs(10);
const PAUSE_IDLE: Duration = Duration::from_millis(10);
/// Commands taken between two turns, so that a flood of them cannot stop packets.
const COMMANDS: usize = 64;

/// Why a data plane does not start.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages name the fields
pub enum StartError {
    /// Out of descriptors.
    #[error("an eventfd to wake the packet worker")]
    Wake(#[source] io::Error),
    /// Out of threads.
    #[error("the thread of the packet worker")]
    Thread(#[source] io::Error),
}

/// A running data plane. Dropping it stops the worker and closes its devices.
#[derive(Debug)]
pub struct Dataplane {
    commands: Sender<Command>,
    injected: Sender<(PortId, Packet)>,
    punted: Receiver<(PortId, Packet)>,
    wake: Arc<OwnedFd>,
    board: Arc<Board>,
    tables: Mutex<Arc<Tables>>,
    started: Instant,
    captures: AtomicU64,
    thread: Option<JoinHandle<()>>,
}

enum Command {
    Apply(Arc<Tables>),
    Attach(Device, Box<dyn PacketIo>),
    Detach(Device),
    CaptureBegin(capture::Begin),
    CaptureEnd(u64),
    Ask(Question),
    Stop,
}

/// A look at the tables between two bursts; by its type it changes nothing.
type Question = Box<dyn FnOnce(&Pipeline, Duration) + Send>;

/// A running capture. Dropping it ends it.
#[derive(Debug)]
pub struct Capture<'a> {
    /// Its frames and its losses.
    pub tapped: capture::Tapped,
    dataplane: &'a Dataplane,
    id: u64,
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        self.dataplane.command(Command::CaptureEnd(self.id));
    }
}

impl Dataplane {
    /// Starts the worker. A card without other cards, or without internet, has no
    /// device there: frames for it are dropped and counted.
    ///
    /// # Errors
    /// When the system refuses a descriptor or a thread.
    pub fn start(settings: Settings, underlay: Option<Box<dyn PacketIo>>, public: Option<Box<dyn PacketIo>>) -> Result<Self, StartError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| StartError::Wake(e.into()))?;
        let wake = Arc::new(wake);
        let (commands, receiver) = crossbeam_channel::unbounded();
        let (injected, to_inject) = crossbeam_channel::bounded(SERVICE_QUEUE);
        let (punt, punted) = crossbeam_channel::bounded(SERVICE_QUEUE);
        let underlay_settings = settings.underlay;
        let pipeline = Pipeline::new(settings);
        let board = Arc::clone(pipeline.board());
        let started = Instant::now();
        let taps = Taps::new(underlay_settings);
        let mut devices = BTreeMap::new();
        devices.extend(underlay.map(|io| (Device::Underlay, Attached::new(io))));
        devices.extend(public.map(|io| (Device::Public, Attached::new(io))));
        let worker = Worker {
            pipeline,
            devices,
            pool: Pool::new(POOL),
            out: Output::default(),
            burst: Vec::with_capacity(BURST),
            waiter: Waiter::default(),
            commands: receiver,
            to_inject,
            punt,
            wake: Arc::clone(&wake),
            started,
            taps,
        };
        let thread = std::thread::Builder::new().name("dataplane".to_owned()).spawn(move || worker.run()).map_err(StartError::Thread)?;
        let (tables, captures) = (Mutex::default(), AtomicU64::new(0));
        Ok(Self { commands, injected, punted, wake, board, tables, started, captures, thread: Some(thread) })
    }

    /// Makes `snapshot` the configuration, from the worker's next turn on. It is
    /// compiled here, on the caller's thread.
    pub fn apply(&self, snapshot: Arc<Snapshot>) {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        *tables = Arc::new(Tables::compile(&snapshot, &tables));
        // Sent under the lock, so that snapshots arrive in the order of their making.
        self.command(Command::Apply(Arc::clone(&tables)));
    }

    /// Plugs the guest side of a port, in place of one that is plugged already. The
    /// port may be configured before or after.
    pub fn port_attach(&self, port: PortId, device: Box<dyn PacketIo>) {
        self.command(Command::Attach(Device::Port(port), device));
    }

    /// Unplugs it; the worker drops the device soon after.
    pub fn port_detach(&self, port: PortId) {
        self.command(Command::Detach(Device::Port(port)));
    }

    /// Ethernet frames from guests to [`crate::METADATA`]: TCP, and answers to ARP.
    /// All receivers share one bounded queue; what it has no room for is counted.
    #[must_use]
    pub fn punted(&self) -> Receiver<(PortId, Packet)> {
        self.punted.clone()
    }

    /// Puts an Ethernet frame before the guest of a port. A frame beyond the queue's
    /// bound is dropped and counted.
    pub fn inject(&self, port: PortId, frame: &[u8]) {
        let mut packet = Packet::new();
        if !packet.copy_from(frame) || self.injected.try_send((port, packet)).is_err() {
            self.board.inject_overflow.fetch_add(1, Ordering::Relaxed);
        }
        self.wake();
    }

    /// When the data plane started: the moment that [`capture::Frame::at`] counts from.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Begins to copy frames, from the worker's next turn on.
    #[must_use]
    pub fn capture(&self, request: capture::Request) -> Capture<'_> {
        let id = self.captures.fetch_add(1, Ordering::Relaxed);
        let (begin, tapped) = capture::begin(id, request);
        self.command(Command::CaptureBegin(begin));
        Capture { tapped, dataplane: self, id }
    }

    /// Looks at the tables between two bursts. A question is to be short: packets
    /// wait meanwhile. The answer does not come when the data plane stops before.
    pub fn ask<T: Send + 'static>(&self, question: impl FnOnce(&Pipeline, Duration) -> T + Send + 'static) -> Receiver<T> {
        let (sender, answer) = crossbeam_channel::bounded(1);
        // Whoever asked may have lost interest.
        self.command(Command::Ask(Box::new(move |pipeline, now| drop(sender.send(question(pipeline, now))))));
        answer
    }

    /// A reading of all counters.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.board.read()
    }

    fn command(&self, command: Command) {
        // The worker only goes away when this handle does.
        let _ = self.commands.send(command);
        self.wake();
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the worker is awake.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }
}

impl Drop for Dataplane {
    fn drop(&mut self) {
        self.command(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic of the worker was printed by its thread.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Command::Apply(_) => "Apply",
            Command::Attach(..) => "Attach",
            Command::Detach(_) => "Detach",
            Command::CaptureBegin(_) => "CaptureBegin",
            Command::CaptureEnd(_) => "CaptureEnd",
            Command::Ask(_) => "Ask",
            Command::Stop => "Stop",
        })
    }
}

struct Attached {
    io: Box<dyn PacketIo>,
    /// Worth asking for frames in this turn.
    ready: bool,
    /// Time of the last frame, and the pause since, of a device that is polled.
    active: Duration,
    pause: Duration,
}

impl Attached {
    fn new(io: Box<dyn PacketIo>) -> Self {
        // Asked once at once: frames may have come before the device did.
        Self { io, ready: true, active: Duration::ZERO, pause: PAUSE_MIN }
    }

    /// How long the worker may sleep as far as this device is concerned.
    fn patience(&self, now: Duration) -> Option<Duration> {
        if self.ready {
            return Some(Duration::ZERO);
        }
        match self.io.wait_fd() {
            Some(_) => None,
            None => match now.saturating_sub(self.active) {
                quiet if quiet < SPIN => Some(Duration::ZERO),
                quiet if quiet < IDLE => Some(self.pause),
                _ => Some(PAUSE_IDLE),
            },
        }
    }
}

struct Worker {
    pipeline: Pipeline,
    devices: BTreeMap<Device, Attached>,
    pool: Pool,
    out: Output,
    burst: Vec<Packet>,
    waiter: Waiter,
    commands: Receiver<Command>,
    to_inject: Receiver<(PortId, Packet)>,
    punt: Sender<(PortId, Packet)>,
    wake: Arc<OwnedFd>,
    started: Instant,
    taps: Taps,
}

impl Worker {
    fn run(mut self) {
        while self.obey() {
            self.turn();
            self.sleep();
        }
    }

    /// One burst from every device that may have one, through the pipeline and out.
    fn turn(&mut self) {
        let now = self.started.elapsed();
        self.out.keep_dropped = self.taps.are_on();
        let mut turn = Turn { now, pool: &mut self.pool, out: &mut self.out };
        if self.pipeline.due().is_some_and(|due| due <= now) {
            self.pipeline.tick(&mut turn);
        }
        for (port, packet) in self.to_inject.try_iter().take(BURST) {
            self.pipeline.inject(&mut turn, port, packet);
        }
        for (name, device) in self.devices.iter_mut().filter(|(_, device)| device.ready) {
            device.io.rx_burst(turn.pool, &mut self.burst);
            device.ready = self.burst.len() >= BURST;
            if self.burst.is_empty() {
                device.pause = (device.pause * 2).min(PAUSE_MAX);
            } else {
                device.active = now;
                device.pause = PAUSE_MIN;
                if self.taps.are_on() {
                    self.taps.see(now, *name, Way::In, &self.burst);
                }
                self.pipeline.turn(&mut turn, *name, &mut self.burst);
            }
        }
        self.send(now);
    }

    fn send(&mut self, now: Duration) {
        let Self { pipeline, devices, pool, out, punt, taps, .. } = self;
        if !out.dropped.is_empty() {
            taps.see_dropped(now, &out.dropped);
            out.dropped.drain(..).for_each(|dropped| pool.put(dropped.packet));
        }
        let mut send = |pool: &mut Pool, name: Device, packets: &mut Vec<Packet>| {
            if taps.are_on() {
                taps.see(now, name, Way::Out, packets);
            }
            let (lost, reason) = match devices.get_mut(&name) {
                _ if packets.is_empty() => return,
                Some(device) => (device.io.tx_burst(pool, packets), DropReason::DeviceFull),
                None => (packets.len(), DropReason::NoDevice),
            };
            pool.put_all(packets);
            pipeline.device_dropped(name, reason, lost as u64);
        };
        send(pool, Device::Underlay, &mut out.underlay);
        send(pool, Device::Public, &mut out.public);
        out.drain_ports(pool, |pool, id, packets| send(pool, Device::Port(id), packets));
        for (port, packet) in out.punted.drain(..) {
            if let Err(TrySendError::Full((_, packet)) | TrySendError::Disconnected((_, packet))) = punt.try_send((port, packet)) {
                pool.put(packet);
                pipeline.device_dropped(Device::Port(port), DropReason::PuntOverflow, 1);
            }
        }
    }

    /// Sleeps until there may be something to do, and notes which devices are why.
    fn sleep(&mut self) {
        let now = self.started.elapsed();
        let pending = !self.commands.is_empty() || !self.to_inject.is_empty();
        let timeout = if pending {
            Some(Duration::ZERO)
        } else {
            let deadline = self.pipeline.due().map(|due| due.saturating_sub(now));
            self.devices.values().filter_map(|device| device.patience(now)).chain(deadline).min()
        };
        self.waiter.clear();
        self.waiter.push(Some(self.wake.as_raw_fd()));
        for device in self.devices.values() {
            self.waiter.push(device.io.wait_fd());
        }
        if self.waiter.wait(timeout).is_err() {
            // Out of kernel memory: go on by asking every device, but do not spin.
            std::thread::sleep(PAUSE_MAX);
            self.devices.values_mut().for_each(|device| device.ready = true);
        }
        if self.waiter.is_ready(0) {
            // Clears the counter; would block only if nobody woke us.
            let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
        }
        for (index, device) in (1..).zip(self.devices.values_mut()) {
            device.ready |= self.waiter.is_ready(index) || device.io.wait_fd().is_none();
        }
    }

    /// Takes commands. Returns false when the last one is to stop.
    fn obey(&mut self) -> bool {
        for _ in 0..COMMANDS {
            match self.commands.try_recv() {
                Ok(Command::Apply(tables)) => self.pipeline.apply(self.started.elapsed(), &tables),
                Ok(Command::Attach(name, io)) => {
                    self.devices.insert(name, Attached::new(io));
                }
                Ok(Command::Detach(name)) => {
                    self.devices.remove(&name);
                }
                Ok(Command::CaptureBegin(begin)) => self.taps.begin(begin),
                Ok(Command::CaptureEnd(id)) => self.taps.end(id),
                Ok(Command::Ask(question)) => question(&self.pipeline, self.started.elapsed()),
                Ok(Command::Stop) => return false,
                Err(_) => break,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests;
