//! The target: volumes and the port that serves them.
//!
//! Management calls come from any thread, do their disk work there, and hand the result to the shard that
//! owns the volume. They are answered when it is true: `volume_put` with another initiator returns after the
//! last write of the old one has ended, `volume_delete` after the files are gone.

use crate::counters::{Counters, Counting};
use crate::shard::{Message, Opened, Shard, Wake};
use crate::store::{self, LOCK_TIMEOUT, Record, Store};
use crate::volume_type::{self, VolumeType};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// The largest volume, in bytes: EBS's 64 TiB.
const MAX_SIZE: u64 = 64 << 40;
/// The most shards; storage shares its card with packets.
const MAX_SHARDS: usize = 8;

/// How a target runs.
#[derive(Debug, Clone)]
pub struct TargetSettings {
    /// Where hosts connect.
    pub listen: SocketAddr,
    /// Where volumes are kept.
    pub dir: PathBuf,
    /// Where images are, by key.
    pub images: PathBuf,
}

/// What depends on the machine that a target runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetOptions {
    /// Threads that serve: a volume belongs to one of them.
    pub shards: usize,
    /// Ties each of them to a core of its own, in the order of the cores that the process may use.
    pub pinned: bool,
    /// How long a start waits for an earlier process to let go of the folder.
    pub lock_timeout: Duration,
}

impl Default for TargetOptions {
    /// Half of the cores, since storage shares its card with packets.
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { shards: (cores / 2).clamp(1, MAX_SHARDS), pinned: false, lock_timeout: LOCK_TIMEOUT }
    }
}

/// Which hosts may connect to a volume, and whether together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// The spec's `initiator_nqn` alone; its newest connection cuts the earlier ones off.
    #[default]
    Exclusive,
    /// The hosts with these NQNs, and any host when there are none, at the same time.
    Shared(Vec<String>),
}

impl Access {
    fn is_exclusive(&self) -> bool {
        *self == Self::Exclusive
    }
}

/// What a volume shall be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeSpec {
    /// Letters, digits and dashes: `vol-0123456789abcdef0`.
    pub id: String,
    /// A multiple of 512; may grow, never shrinks.
    pub size_bytes: u64,
    /// Key of the image that it is a clone of.
    pub image: Option<String>,
    /// The one host NQN that may connect; `None`: nobody.
    pub initiator_nqn: Option<String>,
    /// Operations per second; zero is no limit.
    pub iops: u32,
    /// MiB per second; zero is no limit.
    pub throughput_mib_s: u32,
    /// Its type, which sets limits where `iops` and `throughput_mib_s` are zero; `None`: only those limit it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_type: Option<VolumeType>,
    /// Who may connect.
    #[serde(default, skip_serializing_if = "Access::is_exclusive")]
    pub access: Access,
    /// Kept in memory, and gone when the target ends: for measuring.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ram: bool,
}

impl VolumeSpec {
    /// Whether a host may connect.
    pub(crate) fn admits(&self, host_nqn: &str) -> bool {
        match &self.access {
            Access::Exclusive => self.initiator_nqn.as_deref() == Some(host_nqn),
            Access::Shared(hosts) => hosts.is_empty() || hosts.iter().any(|host| host == host_nqn),
        }
    }

    pub(crate) fn limits(&self) -> volume_type::Limits {
        match self.volume_type {
            Some(kind) => kind.limits(self.size_bytes, self.iops, self.throughput_mib_s),
            None => volume_type::untyped(self.iops, self.throughput_mib_s),
        }
    }
}

/// What a volume is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeStatus {
    /// What it was asked to be.
    pub spec: VolumeSpec,
    /// A host has a controller.
    pub connected: bool,
    /// A flush failed: it takes no more writes.
    pub failed: bool,
    /// Disk that its own blocks take, in bytes.
    pub allocated_bytes: u64,
    /// Reads since the target started.
    pub reads: u64,
    /// Writes since the target started.
    pub writes: u64,
    /// Bytes read since the target started.
    pub read_bytes: u64,
    /// Bytes written since the target started.
    pub write_bytes: u64,
}

/// Why a volume is not what was asked for.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages name the fields
pub enum TargetError {
    /// The caller's mistake; the same request never succeeds.
    #[error("{field} {rule}")]
    Invalid { field: &'static str, rule: &'static str },
    #[error("volume {id} has {size_bytes} bytes and cannot shrink")]
    Shrink { id: String, size_bytes: u64 },
    #[error("image {image} has {image_bytes} bytes, more than the volume")]
    TooSmall { image: String, image_bytes: u64 },
    /// May be there later.
    #[error("image {image}")]
    Image {
        image: String,
        #[source]
        source: io::Error,
    },
    #[error("files of volume {id}")]
    Io {
        id: String,
        #[source]
        source: io::Error,
    },
    #[error("the target has stopped")]
    Stopped,
}

/// Where a volume is served and for whom.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub shard: usize,
    pub spec: VolumeSpec,
}

/// What the shards and the management calls share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub counting: Counting,
    pub shards: Vec<(Sender<Message>, Arc<Wake>)>,
    pub address: SocketAddr,
    places: Mutex<BTreeMap<String, Place>>,
    /// Rises with every change of `places`: the generation of the discovery log.
    generation: AtomicU64,
}

impl Shared {
    /// Every volume's place, by id.
    pub fn places(&self) -> MutexGuard<'_, BTreeMap<String, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Sends a message to a shard; false when it has stopped.
    pub fn send(&self, shard: usize, message: Message) -> bool {
        let Some((inbox, wake)) = self.shards.get(shard) else { return false };
        let sent = inbox.send(message).is_ok();
        wake.wake();
        sent
    }

    fn place_set(&self, id: &str, place: Option<Place>) {
        match place {
            Some(place) => self.places().insert(id.to_owned(), place),
            None => self.places().remove(id),
        };
        self.generation.fetch_add(1, Ordering::Relaxed);
        // Discovery controllers live where connections are accepted.
        self.send(0, Message::DiscoveryChanged);
    }
}

struct Manage {
    /// `None` after the target has stopped.
    store: Option<Store>,
    records: BTreeMap<String, Record>,
}

/// A running target. Dropping it stops it.
pub struct Target {
    shared: Arc<Shared>,
    manage: Mutex<Manage>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Manage {
    fn store(&self) -> Result<&Store, TargetError> {
        self.store.as_ref().ok_or(TargetError::Stopped)
    }
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("address", &self.shared.address).finish_non_exhaustive()
    }
}

impl Target {
    /// Opens every volume of the folder and starts to serve them.
    ///
    /// # Errors
    /// When the folder cannot be used or is in use, or the address cannot be listened on. A single
    /// volume whose files cannot be opened is logged and not served.
    pub fn start(settings: TargetSettings) -> io::Result<Self> {
        Self::start_with(settings, &TargetOptions::default())
    }

    /// The same, with options.
    ///
    /// # Errors
    /// As [`Target::start`].
    pub fn start_with(settings: TargetSettings, options: &TargetOptions) -> io::Result<Self> {
        let store = Store::open(&settings.dir, &settings.images, store::boot_id()?, options.lock_timeout)?;
        let shards = options.shards.max(1);
        let cores = if options.pinned { Some(usable_cores()?) } else { None };
        let listener = listen(settings.listen)?;
        let address = listener.local_addr()?;
        let mut senders = Vec::new();
        let mut inboxes = Vec::new();
        for _ in 0..shards {
            let (sender, inbox) = channel();
            let wake = Arc::new(Wake::new()?);
            senders.push((sender, Arc::clone(&wake)));
            inboxes.push((inbox, wake));
        }
        let shared = Arc::new(Shared {
            counting: Counting::default(),
            shards: senders,
            address,
            places: Mutex::default(),
            generation: AtomicU64::new(1),
        });
        let target = Self {
            shared: Arc::clone(&shared),
            manage: Mutex::new(Manage { store: Some(store), records: BTreeMap::new() }),
            threads: Mutex::default(),
        };
        let mut listener = Some(listener);
        for (index, (inbox, wake)) in inboxes.into_iter().enumerate() {
            let shard = Shard::new(index, Arc::clone(&shared), inbox, wake, listener.take())?;
            let core = cores.as_ref().and_then(|cores| cores.get(index % cores.len().max(1)).copied());
            let thread = std::thread::Builder::new().name(format!("storage-{index}")).spawn(move || {
                if let Some(core) = core {
                    pin(core);
                }
                shard.run();
            })?;
            target.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        }
        let mut manage = target.manage();
        for (folder, record) in manage.store.as_ref().map(Store::list).transpose()?.unwrap_or_default() {
            let served = record.map_err(|source| TargetError::Io { id: folder.clone(), source });
            if let Err(error) = served.and_then(|record| target.serve(&mut manage, record)) {
                tracing::error!(volume = folder, error = &error as &dyn std::error::Error, "volume not served");
            }
        }
        drop(manage);
        tracing::info!(%address, shards, "target listens");
        Ok(target)
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.address
    }

    /// What it counted so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.counting.read()
    }

    /// Makes a volume, or changes its size, limits or initiator. Repeating it changes nothing.
    ///
    /// When it returns, no write of an earlier initiator can reach the volume any more.
    ///
    /// # Errors
    /// [`TargetError`]; nothing has changed then, unless it is `Io`.
    pub fn volume_put(&self, spec: VolumeSpec) -> Result<(), TargetError> {
        validate(&spec)?;
        let mut manage = self.manage();
        let Some(record) = manage.records.get(&spec.id) else {
            let record = if spec.ram { Record::of(&spec) } else { manage.store()?.create(&spec)? };
            tracing::info!(volume = spec.id, size_bytes = spec.size_bytes, image = spec.image, "volume made");
            return self.serve(&mut manage, record);
        };
        if record.spec.image != spec.image {
            return Err(TargetError::Invalid { field: "image", rule: "of a volume cannot change" });
        }
        if record.spec.ram != spec.ram {
            return Err(TargetError::Invalid { field: "ram", rule: "of a volume cannot change" });
        }
        if spec.size_bytes < record.spec.size_bytes {
            return Err(TargetError::Shrink { id: spec.id, size_bytes: record.spec.size_bytes });
        }
        if record.spec == spec {
            return Ok(());
        }
        let mut record = record.clone();
        record.spec = spec.clone();
        if !spec.ram {
            manage.store()?.update(&record).map_err(|source| TargetError::Io { id: spec.id.clone(), source })?;
        }
        let shard = self.shard_of(&spec.id);
        self.shared.place_set(&spec.id, Some(Place { shard, spec: spec.clone() }));
        manage.records.insert(spec.id.clone(), record);
        self.ask(shard, |reply| Message::Update { spec, reply })
    }

    /// Removes a volume and its data. A volume that is not there is removed already.
    ///
    /// # Errors
    /// [`TargetError::Io`] when its files could not be removed.
    pub fn volume_delete(&self, id: &str) -> Result<(), TargetError> {
        let mut manage = self.manage();
        let Some(record) = manage.records.get(id) else { return Ok(()) };
        let shard = self.shard_of(id);
        self.shared.place_set(id, None);
        self.ask(shard, |reply| Message::Remove { id: id.to_owned(), reply })?;
        if !record.spec.ram {
            manage.store()?.delete(id).map_err(|source| TargetError::Io { id: id.to_owned(), source })?;
        }
        manage.records.remove(id);
        tracing::info!(volume = id, "volume deleted");
        Ok(())
    }

    /// What a volume is; `None` when there is no such volume, or it could not be opened.
    #[must_use]
    pub fn volume_get(&self, id: &str) -> Option<VolumeStatus> {
        let manage = self.manage();
        let on_disk = !manage.records.get(id)?.spec.ram;
        let allocated_bytes = if on_disk { Some(manage.store.as_ref()?.allocated_bytes(id).ok()?) } else { None };
        drop(manage);
        let mut status = self.ask(self.shard_of(id), |reply| Message::Status { id: id.to_owned(), reply }).ok()??;
        status.allocated_bytes = allocated_bytes.unwrap_or(status.allocated_bytes);
        Some(status)
    }

    /// The ids of all volumes.
    #[must_use]
    pub fn volume_list(&self) -> Vec<String> {
        self.manage().records.keys().cloned().collect()
    }

    /// Ends what is under way, flushes every volume, closes every connection, and lets go of the folder.
    pub fn stop(&self) {
        for shard in 0..self.shared.shards.len() {
            self.shared.send(shard, Message::Stop);
        }
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            let _ = thread.join();
        }
        self.manage().store = None;
    }

    fn manage(&self) -> MutexGuard<'_, Manage> {
        self.manage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The shard that a volume belongs to while it is served: for a new one that with the fewest.
    fn shard_of(&self, id: &str) -> usize {
        let places = self.shared.places();
        if let Some(place) = places.get(id) {
            return place.shard;
        }
        let volumes_of = |shard: &usize| places.values().filter(|place| place.shard == *shard).count();
        (0..self.shared.shards.len()).min_by_key(volumes_of).unwrap_or(0)
    }

    fn serve(&self, manage: &mut Manage, record: Record) -> Result<(), TargetError> {
        let spec = record.spec.clone();
        let open = |store: &Store| store.open_files(&record).map_err(|source| TargetError::Io { id: spec.id.clone(), source });
        let files = if spec.ram { None } else { Some(open(manage.store()?)?) };
        let shard = self.shard_of(&spec.id);
        let opened = Opened { spec: spec.clone(), files, folder: manage.store()?.folder(&spec.id) };
        manage.records.insert(spec.id.clone(), record);
        self.ask(shard, |reply| Message::Serve { opened: Box::new(opened), reply })?;
        self.shared.place_set(&spec.id.clone(), Some(Place { shard, spec }));
        Ok(())
    }

    fn ask<T>(&self, shard: usize, message: impl FnOnce(Sender<T>) -> Message) -> Result<T, TargetError> {
        let (reply, answer) = channel();
        if !self.shared.send(shard, message(reply)) {
            return Err(TargetError::Stopped);
        }
        answer.recv().map_err(|_| TargetError::Stopped)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Listens so that a restart does not wait for the connections of the process before.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &address)?;
    listen(&socket, 1024)?;
    Ok(TcpListener::from(socket))
}

/// The cores that this process may run on.
fn usable_cores() -> io::Result<Vec<usize>> {
    let set = rustix::thread::sched_getaffinity(None)?;
    Ok((0..rustix::thread::CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect())
}

/// Ties the calling thread to a core. A core that went away since leaves the thread free.
fn pin(core: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(core);
    if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
        tracing::warn!(core, %error, "thread not tied to its core");
    }
}

fn validate(spec: &VolumeSpec) -> Result<(), TargetError> {
    let invalid = |field, rule| Err(TargetError::Invalid { field, rule });
    let is_id = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if spec.id.is_empty() || spec.id.len() > 64 || !spec.id.bytes().all(is_id) {
        return invalid("id", "is 1 to 64 letters, digits and dashes");
    }
    if spec.size_bytes == 0 || spec.size_bytes > MAX_SIZE || !spec.size_bytes.is_multiple_of(crate::nvme::BLOCK) {
        return invalid("size_bytes", "is a multiple of 512, at most 64 TiB");
    }
    if let Some(image) = &spec.image
        && (image.is_empty() || image.len() > 255 || image.starts_with('.') || image.contains(['/', '\0']))
    {
        return invalid("image", "is a file name without a dot in front");
    }
    let hosts = if let Access::Shared(hosts) = &spec.access { hosts.as_slice() } else { &[] };
    if spec.initiator_nqn.iter().chain(hosts).any(|nqn| nqn.is_empty() || nqn.len() > 223 || nqn.contains('\0')) {
        return invalid("host NQN", "has 1 to 223 bytes");
    }
    if spec.ram && spec.image.is_some() {
        return invalid("ram", "and image exclude each other");
    }
    if let Some(Err(rule)) = spec.volume_type.map(|kind| kind.check(spec.iops, spec.throughput_mib_s)) {
        return invalid("volume type", rule);
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests;
