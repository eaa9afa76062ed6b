//! The guest's network card: a vhost-user-net device on a Unix socket.
//!
//! The frontend (the machine that runs the guest) binds the socket and the device
//! connects to it ([`dial`]). The frontend then shares the guest's memory and two
//! virtqueues; either side may go away and come back at any time, and the device
//! connects again for ever. The worker owns [`VhostPort`], a thread of the
//! port answers the frontend, and one lock keeps them apart: the thread holds it
//! only to change the set-up, so the worker waits for it only then.
//!
//! Protocol: "Vhost-user Protocol" of the QEMU project; rings: VIRTIO 1.2
//! sections 2.7 and 5.1. One queue pair, no offloads: a frame here is a frame.
//!
//! Neither side is trusted:
//! - guest memory must be a memfd sealed against shrinking, or a truncation would
//!   kill this process with SIGBUS;
//! - kick and call descriptors must be eventfds and are made non-blocking;
//! - what a guest writes into its rings is `ring`'s matter.
//!
//! Wake-ups: [`PacketIo::wait_fd`] is an epoll descriptor that holds the guest's
//! kick and a bell of our own, both edge-triggered, so that it stays the same
//! over reconnections and nobody reads the counters. A turn that ends with less
//! than a burst first clears it, then asks the driver for kicks, then looks at the
//! ring once more; an event after the clearing stays, and none is lost.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{OFlags, SealFlags, fcntl_get_seals, fcntl_getfl, fcntl_setfl};
use rustix::net::RecvFlags;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion,
    VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError, GpuBackend, Result as ProtocolResult, VhostUserBackendReqHandler};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use self::dial::Dialer;
use self::ring::{Layout, Ring, RingCounters, count};
use super::{BURST, PacketIo};
use crate::packet::{FRAME_MAX, Packet, Pool};

pub mod dial;
mod ring;
#[cfg(test)]
mod tests;

/// Bytes of a frame beyond its MTU: Ethernet header and one VLAN tag.
const FRAME_OVERHEAD: usize = 18;
/// The ring that the guest transmits on; it receives from ring 0.
const FROM_GUEST: usize = 1;
/// Looks at the ring in one turn: a guest that offers what gives no frame, or single
/// frames without end, gets the next turn like everybody else.
const ROUNDS: usize = 4;

const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// The worker's side of one guest network card.
pub struct VhostPort {
    shared: Arc<Shared>,
}

/// The manager's side: ends the device when stopped or dropped.
pub struct VhostControl {
    shared: Arc<Shared>,
    server: Option<JoinHandle<()>>,
}

/// What happened at one port since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VhostCounters {
    /// Connections to a frontend.
    pub connections: u64,
    /// Descriptor chains of the guest that were refused: loops, addresses
    /// outside of its memory, no frame in it.
    pub malformed: u64,
    /// Frames of the guest longer than its MTU allows.
    pub oversize: u64,
    /// Frames to the guest dropped because no driver had room for them.
    pub no_buffer: u64,
    /// Rings given up until their driver sets them up again.
    pub broken: u64,
}

/// What worker, server thread and manager share.
struct Shared {
    device: Mutex<Device>,
    frame_max: usize,
    epoll: OwnedFd,
    bell: OwnedFd,
    dialer: Dialer,
    connection: Mutex<Option<UnixStream>>,
    connections: AtomicU64,
    counters: RingCounters,
}

/// The set-up that one frontend made; empty between two frontends.
struct Device {
    memory: Option<Arc<GuestMemoryMmap>>,
    regions: Vec<Region>,
    layout: Layout,
    rings: [Ring; 2],
    /// The frontend has acknowledged features.
    negotiated: bool,
}

/// Where the frontend maps a region, for the addresses in its messages.
#[derive(Clone, Copy, Debug)]
struct Region {
    user: u64,
    len: u64,
    guest: u64,
}

impl VhostPort {
    /// Serves whoever binds `socket`, as often as it does, without waiting for it.
    /// Frames are at most as long as `mtu` bytes of IP need.
    ///
    /// # Errors
    /// When descriptors or threads have run out.
    pub fn start(socket: PathBuf, mtu: u16) -> io::Result<(Self, VhostControl)> {
        let frame_max = FRAME_MAX.min(usize::from(mtu) + FRAME_OVERHEAD);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        watch(&epoll, &bell)?;
        let shared = Arc::new(Shared {
            device: Mutex::new(Device::new(frame_max)),
            frame_max,
            epoll,
            bell,
            dialer: Dialer::new(socket)?,
            connection: Mutex::new(None),
            connections: AtomicU64::new(0),
            counters: RingCounters::default(),
        });
        let server = thread::Builder::new().name("vhost-net".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || {
                while let Some(stream) = shared.dialer.dial(dial::connect) {
                    serve_frontend(&shared, stream);
                }
            }
        })?;
        let control = VhostControl { shared: Arc::clone(&shared), server: Some(server) };
        Ok((Self { shared }, control))
    }
}

impl PacketIo for VhostPort {
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Packet>) {
        let mut device = self.shared.lock();
        let Device { memory, layout, rings: [_, ring], .. } = &mut *device;
        match memory {
            Some(memory) if ring.running() => {
                if receive(&self.shared, ring, memory, *layout, pool, out).is_err() {
                    ring.give_up(&self.shared.counters);
                }
            }
            // A start waits for the lock and rings after this.
            _ => self.shared.clear_events(),
        }
    }

    fn tx_burst(&mut self, pool: &mut Pool, packets: &mut Vec<Packet>) -> usize {
        let mut device = self.shared.lock();
        let Device { memory, layout, rings: [ring, _], .. } = &mut *device;
        let dropped = match memory {
            Some(memory) if ring.running() => ring.send(memory, *layout, packets).unwrap_or_else(|ring::Broken| {
                ring.give_up(&self.shared.counters);
                packets.len()
            }),
            _ => packets.len(),
        };
        self.shared.counters.no_buffer.fetch_add(dropped as u64, Ordering::Relaxed);
        pool.put_all(packets);
        dropped
    }

    fn wait_fd(&self) -> Option<RawFd> {
        Some(self.shared.epoll.as_raw_fd())
    }
}

/// Takes a burst. When that is not full, the driver has been asked for a kick, as
/// the head of this file describes, or the bell rings.
fn receive(
    shared: &Shared,
    ring: &mut Ring,
    memory: &GuestMemoryMmap,
    layout: Layout,
    pool: &mut Pool,
    out: &mut Vec<Packet>,
) -> Result<(), ring::Broken> {
    let mut room = BURST;
    ring.disarm(memory)?;
    for _ in 0..ROUNDS {
        let before = out.len();
        let taken = ring.receive(memory, layout, &shared.counters, pool, out, room)?;
        room -= out.len() - before;
        if room == 0 {
            return Ok(());
        }
        if taken == 0 {
            shared.clear_events();
            if !ring.arm(memory)? {
                return Ok(());
            }
            ring.disarm(memory)?;
        }
    }
    shared.ring_bell();
    Ok(())
}

impl VhostControl {
    /// Closes the device: no frontend is served any more, the worker finds it empty.
    /// The socket file is the frontend's and stays.
    pub fn stop(mut self) {
        self.close();
    }

    /// Whether a frontend is connected and its driver has set up both rings.
    #[must_use]
    pub fn running(&self) -> bool {
        self.shared.lock().rings.iter().all(Ring::running)
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> VhostCounters {
        self.shared.counters()
    }

    /// A reader of the counters that may be kept elsewhere.
    pub fn meter(&self) -> impl Fn() -> VhostCounters + Send + Sync + use<> {
        let shared = Arc::clone(&self.shared);
        move || shared.counters()
    }

    fn close(&mut self) {
        let Some(server) = self.server.take() else { return };
        self.shared.dialer.stop();
        if let Some(connection) = &*lock(&self.shared.connection) {
            // Already disconnected is as good.
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
        // The thread has no code that panics; if it died it is gone as wanted.
        let _ = server.join();
    }
}

impl Drop for VhostControl {
    fn drop(&mut self) {
        self.close();
    }
}

/// Answers one frontend until it goes away or breaks the protocol.
fn serve_frontend(shared: &Arc<Shared>, stream: UnixStream) {
    let Ok(clone) = stream.try_clone() else { return };
    *lock(&shared.connection) = Some(clone);
    // `close` stops the dialer before it looks for a connection to shut down.
    if !shared.dialer.is_stopped() {
        shared.connections.fetch_add(1, Ordering::Relaxed);
        tracing::debug!("connected to the frontend");
        match answer_requests(shared, stream) {
            ProtocolError::Disconnected | ProtocolError::PartialMessage => tracing::debug!("frontend went away"),
            error => tracing::warn!(%error, "frontend refused"),
        }
    }
    *lock(&shared.connection) = None;
    shared.reset();
}

/// Answers requests until one fails, and returns why.
fn answer_requests(shared: &Arc<Shared>, stream: UnixStream) -> ProtocolError {
    let mut early = match stream.try_clone() {
        Ok(stream) => stream,
        Err(error) => return ProtocolError::SocketError(error),
    };
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(shared));
    loop {
        let enables = if shared.lock().negotiated { Ok(false) } else { enable_early(shared, &mut early) };
        match enables.and_then(|done| if done { Ok(()) } else { handler.handle_request() }) {
            Ok(()) | Err(ProtocolError::SocketRetry(_)) => {}
            Err(error) => return error,
        }
    }
}

/// Answers `SET_VRING_ENABLE` when it is the next request. Returns whether it was.
///
/// QEMU enables the rings of a network card as soon as it has seen our features,
/// before it has acknowledged any, and then not again; the crate's handler would
/// end the connection.
fn enable_early(shared: &Shared, stream: &mut UnixStream) -> ProtocolResult<bool> {
    const REQUEST: [u8; 4] = (FrontendReq::SET_VRING_ENABLE as u32).to_ne_bytes();
    const BODY_LEN: [u8; 4] = 8u32.to_ne_bytes();
    const NEED_REPLY: u32 = 8;
    /// Version 1, an answer.
    const REPLY: u32 = 1 | 4;
    let mut message = [0; 20];
    let (len, _) =
        rustix::net::recv(&*stream, &mut message[..], RecvFlags::PEEK).map_err(|errno| ProtocolError::SocketError(errno.into()))?;
    if len < message.len() {
        return Ok(false);
    }
    let (words, _) = message.as_chunks::<4>();
    let [REQUEST, flags, BODY_LEN, index, enable] = *words else { return Ok(false) };
    stream.read_exact(&mut message).map_err(ProtocolError::SocketBroken)?;
    shared.set_vring_enable(u32::from_ne_bytes(index), u32::from_ne_bytes(enable) == 1)?;
    if u32::from_ne_bytes(flags) & NEED_REPLY != 0 {
        let reply = [REQUEST, REPLY.to_ne_bytes(), BODY_LEN, [0; 4], [0; 4]];
        stream.write_all(reply.as_flattened()).map_err(ProtocolError::SocketBroken)?;
    }
    Ok(true)
}

impl Shared {
    fn counters(&self) -> VhostCounters {
        let rings = &self.counters;
        VhostCounters {
            connections: self.connections.load(Ordering::Relaxed),
            malformed: rings.malformed.load(Ordering::Relaxed),
            oversize: rings.oversize.load(Ordering::Relaxed),
            no_buffer: rings.no_buffer.load(Ordering::Relaxed),
            broken: rings.broken.load(Ordering::Relaxed),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Device> {
        lock(&self.device)
    }

    /// Clears what has been signalled on `wait_fd` so far.
    fn clear_events(&self) {
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 4];
        // Fails only when interrupted, and then the worker wakes once more.
        let _ = epoll::wait(&self.epoll, &mut events, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 }));
    }

    fn ring_bell(&self) {
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Forgets a frontend.
    fn reset(&self) {
        let mut device = self.lock();
        if let Some(kick) = &device.rings[FROM_GUEST].kick {
            let _ = epoll::delete(&self.epoll, kick);
        }
        let old = std::mem::replace(&mut *device, Device::new(self.frame_max));
        drop(device);
        // Unmapping gigabytes takes a while: the worker need not wait for it.
        drop(old);
    }

    /// Starts the rings that are complete, and wakes the worker for them.
    fn start_rings(&self, device: &mut Device) -> ProtocolResult<()> {
        let Some(memory) = device.memory.clone() else { return Ok(()) };
        for ring in &mut device.rings {
            match ring.start(&memory, device.layout) {
                Ok(true) => self.ring_bell(),
                Ok(false) => {}
                Err(ring::Broken) => {
                    count(&self.counters.broken);
                    return Err(ProtocolError::InvalidParam);
                }
            }
        }
        Ok(())
    }
}

impl Device {
    fn new(frame_max: usize) -> Self {
        Self {
            memory: None,
            regions: Vec::new(),
            layout: Layout { merge: false, long_header: false, event_idx: false, frame_max },
            rings: [Ring::new(), Ring::new()],
            negotiated: false,
        }
    }

    fn ring(&mut self, index: impl Into<u64>) -> ProtocolResult<&mut Ring> {
        let index = usize::try_from(index.into()).map_err(|_| ProtocolError::InvalidParam)?;
        self.rings.get_mut(index).ok_or(ProtocolError::InvalidParam)
    }

    /// The guest's address of what the frontend maps at `user`.
    fn guest_address(&self, user: u64) -> ProtocolResult<GuestAddress> {
        self.regions
            .iter()
            .find_map(|region| {
                let offset = user.checked_sub(region.user).filter(|&offset| offset < region.len)?;
                region.guest.checked_add(offset).map(GuestAddress)
            })
            .ok_or(ProtocolError::InvalidParam)
    }
}

/// What the frontend asks for, in the order of the protocol's list of requests.
impl VhostUserBackendReqHandler for Shared {
    fn set_owner(&self) -> ProtocolResult<()> {
        Ok(())
    }

    fn reset_owner(&self) -> ProtocolResult<()> {
        self.reset_device()
    }

    fn reset_device(&self) -> ProtocolResult<()> {
        for ring in &mut self.lock().rings {
            ring.stop();
            ring.enabled = false;
        }
        Ok(())
    }

    fn get_features(&self) -> ProtocolResult<u64> {
        Ok(FEATURES)
    }

    fn set_features(&self, features: u64) -> ProtocolResult<()> {
        if features & !FEATURES != 0 {
            return Err(ProtocolError::FeatureMismatch);
        }
        let has = |bit: u32| features & (1 << bit) != 0;
        let layout = Layout {
            merge: has(VIRTIO_NET_F_MRG_RXBUF),
            long_header: has(VIRTIO_NET_F_MRG_RXBUF) || has(VIRTIO_F_VERSION_1),
            event_idx: has(VIRTIO_RING_F_EVENT_IDX),
            frame_max: self.frame_max,
        };
        let mut device = self.lock();
        if layout != device.layout && device.rings.iter().any(Ring::running) {
            return Err(ProtocolError::InvalidOperation("features change while a ring runs"));
        }
        device.layout = layout;
        device.negotiated = true;
        // Without this feature there is no message that enables a ring.
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            for ring in &mut device.rings {
                ring.enabled = true;
            }
        }
        self.start_rings(&mut device)
    }

    fn set_mem_table(
        &self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> ProtocolResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut mapped = Vec::with_capacity(table.len());
        let mut regions = Vec::with_capacity(table.len());
        for (region, file) in table.iter().zip(files) {
            check_memory(&file, region.mmap_offset, region.memory_size)?;
            let mapping = region.mmap_region(file)?;
            let guest = GuestAddress(region.guest_phys_addr);
            mapped.push(GuestRegionMmap::new(mapping, guest).ok_or(ProtocolError::InvalidParam)?);
            regions.push(Region { user: region.user_addr, len: region.memory_size, guest: region.guest_phys_addr });
        }
        let memory = GuestMemoryMmap::from_regions(mapped).map_err(|error| ProtocolError::ReqHandlerError(io::Error::other(error)))?;
        let mut device = self.lock();
        // A ring that the new table cuts off stops before anybody touches it.
        for ring in device.rings.iter_mut().filter(|ring| ring.running()) {
            if !ring.queue.is_valid(&memory) {
                ring.give_up(&self.counters);
            }
        }
        let old = device.memory.replace(Arc::new(memory));
        device.regions = regions;
        let started = self.start_rings(&mut device);
        drop(device);
        drop(old);
        started.map(|()| None)
    }

    fn set_vring_num(&self, index: u32, num: u32) -> ProtocolResult<()> {
        let num = u16::try_from(num).map_err(|_| ProtocolError::InvalidParam)?;
        let mut device = self.lock();
        let ring = device.ring(index)?;
        stopped(ring)?.queue.try_set_size(num).map_err(|_| ProtocolError::InvalidParam)
    }

    fn set_vring_addr(
        &self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> ProtocolResult<()> {
        let mut device = self.lock();
        let descriptor = device.guest_address(descriptor)?;
        let available = device.guest_address(available)?;
        let used = device.guest_address(used)?;
        let ring = device.ring(index)?;
        let queue = &mut stopped(ring)?.queue;
        queue
            .try_set_desc_table_address(descriptor)
            .and_then(|()| queue.try_set_avail_ring_address(available))
            .and_then(|()| queue.try_set_used_ring_address(used))
            .map_err(|_| ProtocolError::InvalidParam)?;
        ring.addressed = true;
        self.start_rings(&mut device)
    }

    fn set_vring_base(&self, index: u32, base: u32) -> ProtocolResult<()> {
        let base = u16::try_from(base).map_err(|_| ProtocolError::InvalidParam)?;
        let mut device = self.lock();
        let ring = device.ring(index)?;
        stopped(ring)?.queue.set_next_avail(base);
        Ok(())
    }

    fn get_vring_base(&self, index: u32) -> ProtocolResult<VhostUserVringState> {
        let mut device = self.lock();
        let ring = device.ring(index)?;
        ring.stop();
        if let Some(kick) = ring.kick.take() {
            // The ring to the guest is not watched: then there is nothing to delete.
            let _ = epoll::delete(&self.epoll, kick);
        }
        ring.call = None;
        Ok(VhostUserVringState::new(index, u32::from(ring.queue.next_avail())))
    }

    fn set_vring_kick(&self, index: u8, file: Option<File>) -> ProtocolResult<()> {
        // The worker sleeps: a frontend that wants it to poll is not served.
        let kick = take_eventfd(file.ok_or(ProtocolError::IncorrectFds)?)?;
        let mut device = self.lock();
        let ring = device.ring(index)?;
        if let Some(old) = ring.kick.take() {
            let _ = epoll::delete(&self.epoll, old);
        }
        if usize::from(index) == FROM_GUEST {
            watch(&self.epoll, &kick).map_err(ProtocolError::ReqHandlerError)?;
        }
        ring.kick = Some(kick);
        self.start_rings(&mut device)
    }

    fn set_vring_call(&self, index: u8, file: Option<File>) -> ProtocolResult<()> {
        let call = file.map(take_eventfd).transpose()?;
        let mut device = self.lock();
        let ring = device.ring(index)?;
        ring.call = call;
        // An interrupt may have gone to the descriptor before this one.
        if ring.running() {
            ring.interrupt();
        }
        Ok(())
    }

    fn set_vring_err(&self, index: u8, file: Option<File>) -> ProtocolResult<()> {
        let error = file.map(take_eventfd).transpose()?;
        self.lock().ring(index)?.error = error;
        Ok(())
    }

    fn get_protocol_features(&self) -> ProtocolResult<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn set_protocol_features(&self, features: u64) -> ProtocolResult<()> {
        if features & !VhostUserProtocolFeatures::REPLY_ACK.bits() == 0 { Ok(()) } else { Err(ProtocolError::FeatureMismatch) }
    }

    fn get_queue_num(&self) -> ProtocolResult<u64> {
        Ok(1)
    }

    fn set_vring_enable(&self, index: u32, enable: bool) -> ProtocolResult<()> {
        let mut device = self.lock();
        let ring = device.ring(index)?;
        ring.enabled = enable;
        if enable {
            return self.start_rings(&mut device);
        }
        ring.stop();
        Ok(())
    }

    // What follows belongs to protocol features that are not offered; a frontend
    // that asks all the same is told so and disconnected.

    fn get_config(&self, _offset: u32, _size: u32, _flags: VhostUserConfigFlags) -> ProtocolResult<Vec<u8>> {
        Err(NOT_OFFERED)
    }

    fn set_config(&self, _offset: u32, _content: &[u8], _flags: VhostUserConfigFlags) -> ProtocolResult<()> {
        Err(NOT_OFFERED)
    }

    fn set_gpu_socket(&self, _backend: GpuBackend) -> ProtocolResult<()> {
        Err(NOT_OFFERED)
    }

    fn get_shared_object(&self, _id: VhostUserSharedMsg) -> ProtocolResult<File> {
        Err(NOT_OFFERED)
    }

    fn get_inflight_fd(&self, _inflight: &VhostUserInflight) -> ProtocolResult<(VhostUserInflight, File)> {
        Err(NOT_OFFERED)
    }

    fn set_inflight_fd(&self, _inflight: &VhostUserInflight, _file: File) -> ProtocolResult<()> {
        Err(NOT_OFFERED)
    }

    fn get_max_mem_slots(&self) -> ProtocolResult<u64> {
        Err(NOT_OFFERED)
    }

    fn add_mem_region(
        &self,
        _region: &VhostUserSingleMemoryRegion,
        _file: File,
        _postcopy: Option<bool>,
    ) -> ProtocolResult<Option<VhostUserMemoryRegionBase>> {
        Err(NOT_OFFERED)
    }

    fn remove_mem_region(&self, _region: &VhostUserSingleMemoryRegion) -> ProtocolResult<()> {
        Err(NOT_OFFERED)
    }

    fn set_device_state_fd(
        &self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> ProtocolResult<Option<File>> {
        Err(NOT_OFFERED)
    }

    fn check_device_state(&self) -> ProtocolResult<()> {
        Err(NOT_OFFERED)
    }

    fn get_shmem_config(&self) -> ProtocolResult<VhostUserShMemConfig> {
        Err(NOT_OFFERED)
    }

    fn set_log_base(&self, _log: &VhostUserLog, _file: File) -> ProtocolResult<()> {
        Err(NOT_OFFERED)
    }
}

const NOT_OFFERED: ProtocolError = ProtocolError::InvalidOperation("not offered");

/// The ring, when its structure may be changed.
fn stopped(ring: &mut Ring) -> ProtocolResult<&mut Ring> {
    if ring.running() { Err(ProtocolError::InvalidOperation("the ring runs")) } else { Ok(ring) }
}

/// Refuses memory that ends before the region does, now or when its owner cuts it
/// short later.
fn check_memory(file: &File, offset: u64, len: u64) -> ProtocolResult<()> {
    match fcntl_get_seals(file) {
        Ok(seals) if seals.contains(SealFlags::SHRINK) => {}
        _ => return Err(ProtocolError::InvalidOperation("guest memory is not a memfd sealed against shrinking")),
    }
    let size = file.metadata().map_err(ProtocolError::ReqHandlerError)?.len();
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(ProtocolError::InvalidOperation("guest memory is smaller than its region")),
    }
}

/// Takes a descriptor on which neither reads nor writes can hold us up.
fn take_eventfd(file: File) -> ProtocolResult<OwnedFd> {
    let fd = OwnedFd::from(file);
    let kind = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(ProtocolError::ReqHandlerError)?;
    if kind.as_os_str() != "anon_inode:[eventfd]" {
        return Err(ProtocolError::IncorrectFds);
    }
    let flags = fcntl_getfl(&fd).map_err(|errno| ProtocolError::ReqHandlerError(errno.into()))?;
    fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(|errno| ProtocolError::ReqHandlerError(errno.into()))?;
    Ok(fd)
}

/// Lets `source` wake whoever waits for `epoll`, once per event.
fn watch(epoll: &OwnedFd, source: &impl AsFd) -> io::Result<()> {
    let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
    Ok(epoll::add(epoll, source, epoll::EventData::new_u64(0), flags)?)
}

/// Locks what no code leaves half-changed, so that poison says nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
