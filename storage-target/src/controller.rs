//! A controller: what Connect makes, and the admin commands that it answers.
//! NVM Express Base 2.0, sections 3.5 and 3.6 (enable, shutdown), 5 (admin commands) and 6 (Connect, properties).
//!
//! Volume controllers have one admin queue and up to 16 I/O queues; the discovery controller has an admin
//! queue and a log page. All queues of a controller belong to one shard, and to one host: an I/O queue is
//! refused unless host NQN and host identifier are those of the admin queue.

use crate::connection::Transfer;
use crate::identify::{self, ControllerIdentity};
use crate::log_page::{self, ErrorEntry, page};
use crate::nvme::{
    self, BLOCK, DISCOVERY_NQN, MAX_EVENT_REQUESTS, MAX_IO_QUEUES, MAX_TRANSFER, NSID, NSID_ALL, NvmeStatus, Sqe, fabrics, opcode, property,
};
use crate::traffic::Traffic;
use std::collections::VecDeque;
use std::time::Duration;

/// The log pages of each kind of controller.
const DISCOVERY_PAGES: [u8; 3] = [page::SUPPORTED, page::ERROR, page::DISCOVERY];
const VOLUME_PAGES: [u8; 8] =
    [page::SUPPORTED, page::ERROR, page::HEALTH, page::FIRMWARE, page::CHANGED_NAMESPACES, page::EFFECTS, page::FEATURES, page::EBS];
const SHARED_PAGES: [u8; 9] = [
    page::SUPPORTED,
    page::ERROR,
    page::HEALTH,
    page::FIRMWARE,
    page::CHANGED_NAMESPACES,
    page::EFFECTS,
    page::ANA,
    page::FEATURES,
    page::EBS,
];
/// Features: arbitration, power, temperature, error recovery, write cache, queues, events, keep alive, host identifier.
const FEATURES: [u8; 9] = [0x01, 0x02, 0x04, 0x05, 0x06, 0x07, 0x0b, 0x0f, 0x81];

/// A queue of a connected controller: what a connection has after Connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Queue {
    pub controller: u16,
    /// The volume's key in its shard; `None` on the discovery controller.
    pub volume: Option<u32>,
    /// Zero is the admin queue.
    pub id: u16,
    /// Entries.
    pub size: u16,
    /// The host asked for completions without a queue head.
    pub flow_control_off: bool,
    /// Data is read and written where the volume keeps it, and not in buffers.
    pub in_place: bool,
    head: u16,
}

impl Queue {
    pub fn new(controller: u16, volume: Option<u32>, id: u16, size: u16, flow_control_off: bool) -> Self {
        // Connect itself was the queue's first entry.
        Self { controller, volume, id, size, flow_control_off, in_place: false, head: 1 % size.max(1) }
    }

    /// The same queue, of a volume that keeps its blocks in memory.
    pub fn in_place(self, in_place: bool) -> Self {
        Self { in_place, ..self }
    }

    /// One more entry was taken.
    pub fn advance(&mut self) {
        self.head = (self.head + 1) % self.size.max(1);
    }

    /// SQHD of completions.
    pub fn head(&self) -> u16 {
        if self.flow_control_off { 0xffff } else { self.head }
    }
}

/// Which way the data of a command goes and how long it is, or why the command cannot be.
///
/// # Errors
/// The status that the command is answered with.
pub(crate) fn transfer(queue: Option<&Queue>, sqe: &Sqe) -> Result<Transfer, NvmeStatus> {
    if sqe.fuse() != 0 || !matches!(sqe.psdt(), 1 | 2) {
        return Err(NvmeStatus::INVALID_FIELD);
    }
    let limited = |len: u64| match usize::try_from(len) {
        Ok(bytes) if len <= MAX_TRANSFER => Ok(bytes),
        _ => Err(NvmeStatus::INVALID_FIELD),
    };
    let fabrics = sqe.opcode() == opcode::FABRICS;
    match queue {
        None if fabrics && sqe.fctype() == fabrics::CONNECT => Ok(Transfer::ToController(nvme::ConnectData::LEN)),
        None => Err(NvmeStatus::SEQUENCE),
        Some(queue) if fabrics => match sqe.fctype() {
            fabrics::CONNECT => Err(NvmeStatus::SEQUENCE),
            fabrics::PROPERTY_GET | fabrics::PROPERTY_SET if queue.id == 0 => Ok(Transfer::None),
            fabrics::DISCONNECT if queue.id > 0 && sqe.u16_at(40) != 0 => Err(NvmeStatus::CONNECT_FORMAT),
            fabrics::DISCONNECT if queue.id > 0 => Ok(Transfer::None),
            _ => Err(NvmeStatus::INVALID_OPCODE),
        },
        Some(queue) if queue.id == 0 => match sqe.opcode() {
            opcode::IDENTIFY => Ok(Transfer::ToHost(4096)),
            opcode::GET_LOG_PAGE => Ok(Transfer::ToHost(limited((log_dwords(sqe) + 1) * 4)?)),
            opcode::GET_FEATURES if sqe.dword(10) & 0xff == 0x81 => Ok(Transfer::ToHost(16)),
            opcode::GET_FEATURES | opcode::SET_FEATURES | opcode::ABORT | opcode::ASYNC_EVENT_REQUEST | opcode::KEEP_ALIVE => {
                Ok(Transfer::None)
            }
            _ => Err(NvmeStatus::INVALID_OPCODE),
        },
        Some(_) => match sqe.opcode() {
            opcode::READ => Ok(Transfer::ToHost(limited(sqe.blocks() * BLOCK)?)),
            opcode::VERIFY => limited(sqe.blocks() * BLOCK).map(|_| Transfer::None),
            opcode::WRITE | opcode::COMPARE => Ok(Transfer::ToController(limited(sqe.blocks() * BLOCK)?)),
            opcode::DATASET_MANAGEMENT => Ok(Transfer::ToController(limited((u64::from(sqe.dword(10) & 0xff) + 1) * 16)?)),
            opcode::FLUSH | opcode::WRITE_ZEROES => Ok(Transfer::None),
            _ => Err(NvmeStatus::INVALID_OPCODE),
        },
    }
}

/// NUMD of Get Log Page, counted from zero.
fn log_dwords(sqe: &Sqe) -> u64 {
    u64::from(sqe.dword(10) >> 16) | u64::from(sqe.dword(11) & 0xffff) << 16
}

/// Who a controller belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    pub nqn: String,
    pub id: [u8; 16],
}

/// What an admin command is answered from.
pub(crate) struct Facts<'a> {
    /// `None` on the discovery controller.
    pub volume: Option<VolumeFacts<'a>>,
    /// The discovery log page, made when asked for.
    pub discovery_log: &'a dyn Fn() -> Vec<u8>,
    pub now: Duration,
}

/// What a controller tells about its volume.
pub(crate) struct VolumeFacts<'a> {
    pub id: &'a str,
    pub size_bytes: u64,
    /// Several hosts may have controllers at once.
    pub shared: bool,
    /// A flush failed: it is read-only.
    pub failed: bool,
    pub traffic: &'a Traffic,
    /// Commands under way.
    pub queue_length: u64,
}

/// How an admin command ends.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Well, with dword 0 and 1.
    Value(u64),
    /// Well, with data.
    Data(Vec<u8>),
    Fail(NvmeStatus),
    /// Not yet: it waits for an event.
    Held,
    /// Well, and the controller's I/O queues are gone.
    Reset,
    /// Well, and a flush of the volume has to follow: the host shuts the controller down.
    ShutDown,
    /// Well, and so ends the held command in this slot.
    Abort(usize),
}

/// How far a shutdown has come: SHST of CSTS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shutdown {
    None,
    Flushing,
    Complete,
}

/// The controller.
#[derive(Debug)]
pub(crate) struct Controller {
    pub id: u16,
    pub volume: Option<u32>,
    pub host: Host,
    /// The connection of the admin queue.
    pub admin: usize,
    /// The connections of I/O queues, with the queues' ids.
    pub io: Vec<(u16, usize)>,
    /// Slots and command identifiers of Asynchronous Event Requests that wait.
    pub event_requests: VecDeque<(usize, u16)>,
    configuration: u32,
    shutdown: Shutdown,
    keep_alive: Duration,
    seen: Duration,
    event_mask: u32,
    /// The namespace, or the discovery log, changed, and the host has not read the log about it yet.
    changed: bool,
    /// The host was told, and has not read the log since.
    event_sent: bool,
    /// The last commands that failed, oldest first.
    errors: VecDeque<ErrorEntry>,
    error_count: u64,
}

impl Controller {
    pub fn new(id: u16, volume: Option<u32>, host: Host, admin: usize, keep_alive: Duration, now: Duration) -> Self {
        Self {
            id,
            volume,
            host,
            admin,
            io: Vec::new(),
            event_requests: VecDeque::new(),
            configuration: 0,
            shutdown: Shutdown::None,
            keep_alive,
            seen: now,
            event_mask: 0,
            changed: false,
            event_sent: false,
            errors: VecDeque::new(),
            error_count: 0,
        }
    }

    /// Takes I/O and admin commands other than properties.
    pub fn is_enabled(&self) -> bool {
        self.configuration & 1 != 0 && self.shutdown == Shutdown::None
    }

    /// The host spoke.
    pub fn seen(&mut self, now: Duration) {
        self.seen = now;
    }

    /// The keep alive timer ran out.
    pub fn is_expired(&self, now: Duration) -> bool {
        !self.keep_alive.is_zero() && self.seen + self.keep_alive < now
    }

    /// The namespace has another size, or the discovery log other entries.
    pub fn changed(&mut self) {
        self.changed = true;
    }

    /// The flush of a shutdown has ended.
    pub fn shut_down(&mut self) {
        if self.shutdown == Shutdown::Flushing {
            self.shutdown = Shutdown::Complete;
        }
    }

    /// Remembers a command that failed, for the error log.
    pub fn failed(&mut self, queue: u16, sqe: &Sqe, status: NvmeStatus) {
        self.error_count += 1;
        if self.errors.len() >= identify::ERROR_ENTRIES.into() {
            self.errors.pop_front();
        }
        let lba = if queue > 0 { sqe.lba() } else { 0 };
        let number = self.error_count;
        self.errors.push_back(ErrorEntry { number, queue, cid: sqe.cid(), status, lba, nsid: sqe.nsid() });
    }

    /// An event for a waiting request: its slot and dword 0.
    pub fn next_event(&mut self) -> Option<(usize, u64)> {
        // Notices: namespace attribute changed, log page 04h; discovery log page changed, log page 70h.
        let (bit, event) = match self.volume {
            Some(_) => (identify::EVENT_NAMESPACE, 0x0004_0002),
            None => (identify::EVENT_DISCOVERY, 0x0070_f002),
        };
        if !self.changed || self.event_sent || self.event_mask & bit == 0 {
            return None;
        }
        let (slot, _) = self.event_requests.pop_front()?;
        self.event_sent = true;
        Some((slot, event))
    }

    /// Executes a command of the admin queue, properties included.
    pub fn admin(&mut self, slot: usize, sqe: &Sqe, facts: &Facts<'_>) -> Answer {
        if sqe.opcode() == opcode::FABRICS {
            return if sqe.fctype() == fabrics::PROPERTY_GET { self.property_get(sqe) } else { self.property_set(sqe) };
        }
        if !self.is_enabled() {
            return Answer::Fail(NvmeStatus::SEQUENCE);
        }
        match sqe.opcode() {
            opcode::IDENTIFY => self.identify(sqe, facts),
            opcode::GET_LOG_PAGE => self.log_page(sqe, facts),
            opcode::GET_FEATURES => self.feature_get(sqe),
            opcode::SET_FEATURES => self.feature_set(sqe, facts.now),
            opcode::ASYNC_EVENT_REQUEST if self.event_requests.len() >= MAX_EVENT_REQUESTS.into() => Answer::Fail(NvmeStatus::EVENT_LIMIT),
            opcode::ASYNC_EVENT_REQUEST => {
                self.event_requests.push_back((slot, sqe.cid()));
                Answer::Held
            }
            opcode::ABORT => self.abort(sqe),
            opcode::KEEP_ALIVE => Answer::Value(0),
            _ => Answer::Fail(NvmeStatus::INVALID_OPCODE),
        }
    }

    /// Event requests wait for ever and can be aborted; all else ends by itself and soon, and is not.
    fn abort(&mut self, sqe: &Sqe) -> Answer {
        let (queue, cid) = (sqe.u16_at(40), sqe.u16_at(42));
        let held = self.event_requests.iter().position(|(_, waiting)| queue == 0 && *waiting == cid);
        match held.and_then(|index| self.event_requests.remove(index)) {
            Some((slot, _)) => Answer::Abort(slot),
            None => Answer::Value(1),
        }
    }

    fn property_get(&self, sqe: &Sqe) -> Answer {
        let wide = sqe.u16_at(40) & 7 == 1;
        match (sqe.dword(11), wide) {
            (property::CAP, true) => Answer::Value(nvme::CAPABILITIES),
            (property::VS, false) => Answer::Value(nvme::VERSION.into()),
            (property::CC, false) => Answer::Value(self.configuration.into()),
            (property::CSTS, false) => {
                let shutdown = match self.shutdown {
                    Shutdown::None => 0,
                    Shutdown::Flushing => 1,
                    Shutdown::Complete => 2,
                };
                Answer::Value(u64::from(self.configuration & 1) | shutdown << 2)
            }
            (property::CRTO, false) => Answer::Value(nvme::READY_TIMEOUTS.into()),
            _ => Answer::Fail(NvmeStatus::INVALID_FIELD),
        }
    }

    fn property_set(&mut self, sqe: &Sqe) -> Answer {
        let (value, was_enabled) = (sqe.dword(12), self.configuration & 1 != 0);
        if sqe.u16_at(40) & 7 != 0 || sqe.dword(11) != property::CC {
            return Answer::Fail(NvmeStatus::INVALID_FIELD);
        }
        let enable = value & 1 != 0;
        // CSS, MPS, AMS and CRIME have one value each that CAP offers.
        if enable && !was_enabled && value & 0x0100_3ff0 != 0 {
            return Answer::Fail(NvmeStatus::INVALID_FIELD);
        }
        self.configuration = value;
        if enable && !was_enabled {
            self.shutdown = Shutdown::None;
        }
        let shuts_down = value & 0xc000 != 0 && self.shutdown == Shutdown::None;
        if shuts_down {
            self.shutdown = if self.volume.is_some() { Shutdown::Flushing } else { Shutdown::Complete };
        }
        if was_enabled && !enable {
            self.event_mask = 0;
            self.event_sent = false;
            return Answer::Reset;
        }
        if self.shutdown == Shutdown::Flushing && shuts_down { Answer::ShutDown } else { Answer::Value(0) }
    }

    fn identify(&self, sqe: &Sqe, facts: &Facts<'_>) -> Answer {
        let (cns, nsid, command_set) = (sqe.dword(10) & 0xff, sqe.nsid(), sqe.dword(11) >> 24);
        if cns == 0x01 {
            let nqn = facts.volume.as_ref().map_or_else(|| DISCOVERY_NQN.to_owned(), |volume| nvme::volume_nqn(volume.id));
            return Answer::Data(identify::controller(&ControllerIdentity {
                controller: self.id,
                volume: facts.volume.as_ref().map(|volume| volume.id),
                subsystem_nqn: &nqn,
                shared: facts.volume.as_ref().is_some_and(|volume| volume.shared),
            }));
        }
        let Some(volume) = &facts.volume else { return Answer::Fail(NvmeStatus::INVALID_FIELD) };
        // These name a command set; the NVM command set is number zero and the only one.
        if matches!(cns, 0x05..=0x07) && command_set != 0 {
            return Answer::Fail(NvmeStatus::INVALID_FIELD);
        }
        match cns {
            0x00 if nsid == NSID => Answer::Data(identify::namespace(volume.id, volume.size_bytes, volume.shared)),
            0x02 | 0x07 if nsid < NSID_ALL - 1 => Answer::Data(identify::active_namespaces(nsid)),
            0x03 if nsid == NSID => Answer::Data(identify::descriptors(volume.id)),
            0x05 if nsid == NSID => Answer::Data(vec![0; 4096]), // without protection information it has nothing to tell
            0x06 => Answer::Data(identify::nvm_controller()),
            0x08 if nsid == NSID => Answer::Data(identify::independent_namespace(volume.shared)),
            0x00 | 0x02 | 0x03 | 0x05 | 0x07 | 0x08 => Answer::Fail(NvmeStatus::INVALID_NAMESPACE),
            _ => Answer::Fail(NvmeStatus::INVALID_FIELD),
        }
    }

    fn log_page(&mut self, sqe: &Sqe, facts: &Facts<'_>) -> Answer {
        let offset = u64::from(sqe.dword(12)) | u64::from(sqe.dword(13)) << 32;
        let keep_event = sqe.dword(10) & 1 << 15 != 0;
        let id = crate::bytes::u8_at(&sqe.0, 40);
        if offset % 4 != 0 || sqe.dword(14) & 1 << 23 != 0 {
            return Answer::Fail(NvmeStatus::INVALID_FIELD);
        }
        let data = match (id, &facts.volume) {
            (page::SUPPORTED, Some(volume)) => log_page::supported(if volume.shared { &SHARED_PAGES } else { &VOLUME_PAGES }),
            (page::SUPPORTED, None) => log_page::supported(&DISCOVERY_PAGES),
            (page::ERROR, _) => log_page::errors(self.errors.iter().rev(), identify::ERROR_ENTRIES.into()),
            (page::HEALTH, Some(_)) if !matches!(sqe.nsid(), 0 | NSID | NSID_ALL) => return Answer::Fail(NvmeStatus::INVALID_NAMESPACE),
            (page::HEALTH, Some(volume)) => log_page::health(volume.traffic, volume.failed, self.error_count),
            (page::FIRMWARE, Some(_)) => log_page::firmware(),
            (page::CHANGED_NAMESPACES, Some(_)) => identify::active_namespaces(if self.changed { 0 } else { NSID }),
            (page::EFFECTS, Some(_)) => log_page::effects(),
            (page::ANA, Some(volume)) if volume.shared => log_page::ana(sqe.dword(10) >> 8 & 1 != 0),
            (page::FEATURES, Some(_)) => log_page::features(&FEATURES),
            (page::EBS, Some(volume)) => log_page::ebs(volume.traffic, volume.queue_length),
            (page::DISCOVERY, None) => (facts.discovery_log)(),
            _ => return Answer::Fail(NvmeStatus::INVALID_LOG_PAGE),
        };
        let Some(rest) = data.get(crate::bytes::narrow(offset)..) else { return Answer::Fail(NvmeStatus::INVALID_FIELD) };
        // Reading the log about an event makes room for the next one.
        if !keep_event && matches!(id, page::CHANGED_NAMESPACES | page::DISCOVERY) {
            (self.changed, self.event_sent) = (false, false);
        }
        Answer::Data(rest.to_vec())
    }

    fn feature_get(&self, sqe: &Sqe) -> Answer {
        let (feature, select) = (sqe.dword(10) & 0xff, sqe.dword(10) >> 8 & 7);
        let changeable = matches!(feature, 0x0b | 0x0f);
        if self.volume.is_none() && !matches!(feature, 0x0b | 0x0f | 0x81) {
            return Answer::Fail(NvmeStatus::INVALID_FIELD);
        }
        let (current, default) = match feature {
            0x01 | 0x02 | 0x05 => (0, 0),
            0x04 => (353, 353),
            0x06 => (1, 1),
            0x07 => (queue_counts(), queue_counts()),
            0x0b => (self.event_mask, 0),
            0x0f => (u32::try_from(self.keep_alive.as_millis()).unwrap_or(u32::MAX), 0),
            0x81 => return Answer::Data(self.host.id.to_vec()),
            _ => return Answer::Fail(NvmeStatus::INVALID_FIELD),
        };
        match select {
            0 => Answer::Value(current.into()),
            1 | 2 => Answer::Value(default.into()),
            3 => Answer::Value(if changeable { 1 << 2 } else { 0 }),
            _ => Answer::Fail(NvmeStatus::INVALID_FIELD),
        }
    }

    fn feature_set(&mut self, sqe: &Sqe, now: Duration) -> Answer {
        if sqe.dword(10) & 1 << 31 != 0 {
            return Answer::Fail(NvmeStatus::FEATURE_NOT_SAVEABLE);
        }
        let value = sqe.dword(11);
        match (sqe.dword(10) & 0xff, self.volume) {
            (0x07, Some(_)) if !self.io.is_empty() => Answer::Fail(NvmeStatus::SEQUENCE),
            (0x07, Some(_)) if value & 0xffff == 0xffff || value >> 16 == 0xffff => Answer::Fail(NvmeStatus::INVALID_FIELD),
            (0x07, Some(_)) => Answer::Value(queue_counts().into()),
            (0x0b, _) => {
                self.event_mask = value;
                Answer::Value(0)
            }
            (0x0f, _) => {
                self.keep_alive = Duration::from_millis(value.into());
                self.seen = now;
                Answer::Value(0)
            }
            (0x06, Some(_)) if value & 1 == 1 => Answer::Value(0),
            (0x01 | 0x02 | 0x04 | 0x05 | 0x06, Some(_)) => Answer::Fail(NvmeStatus::FEATURE_NOT_CHANGEABLE),
            // The host identifier was given by Connect.
            (0x81, _) => Answer::Fail(NvmeStatus::SEQUENCE),
            _ => Answer::Fail(NvmeStatus::INVALID_FIELD),
        }
    }
}

/// Number of Queues, counted from zero, submission and completion.
fn queue_counts() -> u32 {
    u32::from(MAX_IO_QUEUES - 1) | u32::from(MAX_IO_QUEUES - 1) << 16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller() -> Controller {
        let host = Host { nqn: "nqn.host".into(), id: [7; 16] };
        Controller::new(1, Some(0), host, 0, Duration::from_secs(5), Duration::ZERO)
    }

    fn run(controller: &mut Controller, sqe: Sqe) -> Answer {
        let log = || vec![0; 1024];
        let traffic = Traffic::default();
        let volume = VolumeFacts { id: "vol-1", size_bytes: 1 << 30, shared: false, failed: false, traffic: &traffic, queue_length: 0 };
        let facts = Facts { volume: controller.volume.map(|_| volume), discovery_log: &log, now: Duration::ZERO };
        controller.admin(3, &sqe, &facts)
    }

    fn property_set(value: u32) -> Sqe {
        Sqe::new(opcode::FABRICS, 0, fabrics::PROPERTY_SET.into()).with(11, property::CC).with(12, value)
    }

    fn csts(controller: &mut Controller) -> Answer {
        run(controller, Sqe::new(opcode::FABRICS, 0, fabrics::PROPERTY_GET.into()).with(11, property::CSTS))
    }

    #[test]
    fn nothing_but_properties_before_enable_and_after_shutdown() {
        let mut controller = controller();
        let identify = Sqe::new(opcode::IDENTIFY, 0, 0).with(10, 1);
        assert_eq!(run(&mut controller, identify), Answer::Fail(NvmeStatus::SEQUENCE));
        assert_eq!(csts(&mut controller), Answer::Value(0));
        assert_eq!(run(&mut controller, property_set(0x0046_0001)), Answer::Value(0));
        assert_eq!(csts(&mut controller), Answer::Value(1));
        assert!(matches!(run(&mut controller, identify), Answer::Data(_)));
        assert_eq!(run(&mut controller, property_set(0x0046_4001)), Answer::ShutDown);
        assert_eq!(csts(&mut controller), Answer::Value(0b0101));
        controller.shut_down();
        assert_eq!(csts(&mut controller), Answer::Value(0b1001));
        assert_eq!(run(&mut controller, identify), Answer::Fail(NvmeStatus::SEQUENCE));
        assert_eq!(run(&mut controller, property_set(0)), Answer::Reset);
        assert_eq!(run(&mut controller, property_set(0x0046_0001)), Answer::Value(0));
        assert_eq!(csts(&mut controller), Answer::Value(1));
    }

    #[test]
    fn a_fifth_event_request_is_refused_and_a_resize_answers_the_first() {
        let mut controller = controller();
        run(&mut controller, property_set(1));
        for expected in [Answer::Held, Answer::Held, Answer::Held, Answer::Held, Answer::Fail(NvmeStatus::EVENT_LIMIT)] {
            assert_eq!(run(&mut controller, Sqe::new(opcode::ASYNC_EVENT_REQUEST, 0, 0)), expected);
        }
        controller.changed();
        assert_eq!(controller.next_event(), None, "the host has not asked for it");
        run(&mut controller, Sqe::new(opcode::SET_FEATURES, 0, 0).with(10, 0x0b).with(11, identify::EVENT_NAMESPACE));
        assert_eq!(controller.next_event(), Some((3, 0x0004_0002)));
        assert_eq!(controller.next_event(), None, "once until the log is read");
        let log = Sqe::new(opcode::GET_LOG_PAGE, 0, 0).with(10, 0x03ff_0004);
        let Answer::Data(page) = run(&mut controller, log) else { panic!() };
        assert_eq!(page[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
        let Answer::Data(page) = run(&mut controller, log) else { panic!() };
        assert_eq!(page[..4], [0; 4]);
    }

    #[test]
    fn wrong_fields_get_the_status_of_the_standard() {
        let mut controller = controller();
        run(&mut controller, property_set(1));
        for (sqe, status) in [
            (Sqe::new(opcode::IDENTIFY, 0, 2), NvmeStatus::INVALID_NAMESPACE),
            (Sqe::new(opcode::IDENTIFY, 0, 1).with(10, 0x7f), NvmeStatus::INVALID_FIELD),
            (Sqe::new(opcode::IDENTIFY, 0, NSID_ALL).with(10, 2), NvmeStatus::INVALID_NAMESPACE),
            (Sqe::new(opcode::GET_LOG_PAGE, 0, 0).with(10, 0x70), NvmeStatus::INVALID_LOG_PAGE),
            (Sqe::new(opcode::GET_LOG_PAGE, 0, 0).with(10, 2).with(12, 513), NvmeStatus::INVALID_FIELD),
            (Sqe::new(opcode::GET_LOG_PAGE, 0, 0).with(10, 2).with(12, 1024), NvmeStatus::INVALID_FIELD),
            (Sqe::new(opcode::SET_FEATURES, 0, 0).with(10, 0x06), NvmeStatus::FEATURE_NOT_CHANGEABLE),
            (Sqe::new(opcode::SET_FEATURES, 0, 0).with(10, 1 << 31 | 0x0b), NvmeStatus::FEATURE_NOT_SAVEABLE),
            (Sqe::new(opcode::SET_FEATURES, 0, 0).with(10, 0x07).with(11, 0xffff), NvmeStatus::INVALID_FIELD),
            (Sqe::new(opcode::GET_FEATURES, 0, 0).with(10, 0x7e), NvmeStatus::INVALID_FIELD),
        ] {
            assert_eq!(run(&mut controller, sqe), Answer::Fail(status), "{sqe:?}");
        }
    }

    #[test]
    fn transfers_are_sized_by_the_command_not_by_the_host() {
        let io = Queue::new(1, Some(0), 1, 128, true);
        let admin = Queue::new(1, Some(0), 0, 32, true);
        let write = |blocks: u32| Sqe::new(opcode::WRITE, 0, 1).with(12, blocks - 1);
        assert_eq!(transfer(Some(&io), &write(2048)), Ok(Transfer::ToController(1 << 20)));
        assert_eq!(transfer(Some(&io), &write(2049)), Err(NvmeStatus::INVALID_FIELD));
        assert_eq!(transfer(None, &write(1)), Err(NvmeStatus::SEQUENCE));
        assert_eq!(transfer(Some(&io), &Sqe::new(0xc0, 0, 1)), Err(NvmeStatus::INVALID_OPCODE));
        let log = Sqe::new(opcode::GET_LOG_PAGE, 0, 0).with(10, 0xffff_0002).with(11, 0xffff);
        assert_eq!(transfer(Some(&admin), &log), Err(NvmeStatus::INVALID_FIELD));
    }

    #[test]
    fn silence_longer_than_the_keep_alive_expires_a_controller() {
        let mut controller = controller();
        assert!(!controller.is_expired(Duration::from_secs(5)));
        assert!(controller.is_expired(Duration::from_secs(6)));
        controller.seen(Duration::from_secs(4));
        assert!(!controller.is_expired(Duration::from_secs(9)));
    }
}
