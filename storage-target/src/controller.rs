//! A controller: what Connect makes, and the admin commands that it answers.
//! NVMe over Fabrics 1.1 section 3 (Connect, properties), NVMe 1.4 section 5 (admin commands).
//!
//! Volume controllers have one admin queue and up to 16 I/O queues; the discovery controller has an admin
//! queue and a log page. All queues of a controller belong to one shard, and to one host: an I/O queue is
//! refused unless host NQN and host identifier are those of the admin queue.

use crate::connection::Transfer;
use crate::nvme::{
    self, BLOCK, ControllerIdentity, DISCOVERY_NQN, MAX_EVENT_REQUESTS, MAX_IO_QUEUES, MAX_TRANSFER, NSID, NSID_ALL, NvmeStatus, Sqe,
    fabrics, opcode, property,
};
use std::time::Duration;

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
    head: u16,
}

impl Queue {
    pub fn new(controller: u16, volume: Option<u32>, id: u16, size: u16, flow_control_off: bool) -> Self {
        // Connect itself was the queue's first entry.
        Self { controller, volume, id, size, flow_control_off, head: 1 % size.max(1) }
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
    if sqe.fuse() != 0 {
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
            opcode::WRITE => Ok(Transfer::ToController(limited(sqe.blocks() * BLOCK)?)),
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
    /// The volume's id and size in bytes; `None` on the discovery controller.
    pub volume: Option<(&'a str, u64)>,
    /// Bytes read and written, and commands: for the health log.
    pub traffic: Traffic,
    /// The discovery log page, made when asked for.
    pub discovery_log: &'a dyn Fn() -> Vec<u8>,
    pub now: Duration,
}

/// What a volume did since the target started.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Traffic {
    pub reads: u64,
    pub writes: u64,
    pub read_bytes: u64,
    pub write_bytes: u64,
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
    /// Slots of Asynchronous Event Requests that wait.
    pub event_requests: Vec<usize>,
    configuration: u32,
    shut_down: bool,
    keep_alive: Duration,
    seen: Duration,
    event_mask: u32,
    /// The namespace changed, and the host has not read the log about it yet.
    namespace_changed: bool,
    /// The host was told, and has not read the log since.
    event_sent: bool,
}

impl Controller {
    pub fn new(id: u16, volume: Option<u32>, host: Host, admin: usize, keep_alive: Duration, now: Duration) -> Self {
        Self {
            id,
            volume,
            host,
            admin,
            io: Vec::new(),
            event_requests: Vec::new(),
            configuration: 0,
            shut_down: false,
            keep_alive,
            seen: now,
            event_mask: 0,
            namespace_changed: false,
            event_sent: false,
        }
    }

    /// Takes I/O and admin commands other than properties.
    pub fn is_enabled(&self) -> bool {
        self.configuration & 1 != 0 && !self.shut_down
    }

    /// The host spoke.
    pub fn seen(&mut self, now: Duration) {
        self.seen = now;
    }

    /// The keep alive timer ran out.
    pub fn is_expired(&self, now: Duration) -> bool {
        !self.keep_alive.is_zero() && self.seen + self.keep_alive < now
    }

    /// The namespace has another size.
    pub fn namespace_changed(&mut self) {
        self.namespace_changed = true;
    }

    /// An event for a waiting request: its slot and dword 0.
    pub fn next_event(&mut self) -> Option<(usize, u64)> {
        let wanted = self.namespace_changed && !self.event_sent && self.event_mask & nvme::EVENT_NAMESPACE != 0;
        if !wanted || self.event_requests.is_empty() {
            return None;
        }
        self.event_sent = true;
        // Notice, namespace attribute changed, log page 04h.
        Some((self.event_requests.remove(0), 0x0004_0002))
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
                self.event_requests.push(slot);
                Answer::Held
            }
            // Commands end by themselves and soon: none is ever aborted.
            opcode::ABORT => Answer::Value(1),
            opcode::KEEP_ALIVE => Answer::Value(0),
            _ => Answer::Fail(NvmeStatus::INVALID_OPCODE),
        }
    }

    fn property_get(&self, sqe: &Sqe) -> Answer {
        let wide = sqe.u16_at(40) & 7 == 1;
        match (sqe.dword(11), wide) {
            (property::CAP, true) => Answer::Value(nvme::CAPABILITIES),
            (property::VS, false) => Answer::Value(nvme::VERSION.into()),
            (property::CC, false) => Answer::Value(self.configuration.into()),
            (property::CSTS, false) => Answer::Value(u64::from(self.configuration & 1) | if self.shut_down { 2 << 2 } else { 0 }),
            _ => Answer::Fail(NvmeStatus::INVALID_FIELD),
        }
    }

    fn property_set(&mut self, sqe: &Sqe) -> Answer {
        let (value, was_enabled) = (sqe.dword(12), self.configuration & 1 != 0);
        if sqe.u16_at(40) & 7 != 0 || sqe.dword(11) != property::CC {
            return Answer::Fail(NvmeStatus::INVALID_FIELD);
        }
        let enable = value & 1 != 0;
        // CSS, MPS and AMS have one value each that CAP offers.
        if enable && !was_enabled && value & 0x3ff0 != 0 {
            return Answer::Fail(NvmeStatus::INVALID_FIELD);
        }
        self.configuration = value;
        if value & 0xc000 != 0 {
            self.shut_down = true;
        }
        if enable && !was_enabled {
            self.shut_down = false;
        }
        if was_enabled && !enable {
            self.event_mask = 0;
            self.event_sent = false;
            return Answer::Reset;
        }
        Answer::Value(0)
    }

    fn identify(&self, sqe: &Sqe, facts: &Facts<'_>) -> Answer {
        let (cns, nsid) = (sqe.dword(10) & 0xff, sqe.nsid());
        if cns == 0x01 {
            let nqn = facts.volume.map_or_else(|| DISCOVERY_NQN.to_owned(), |(id, _)| nvme::volume_nqn(id));
            return Answer::Data(nvme::identify_controller(&ControllerIdentity {
                controller: self.id,
                volume: facts.volume.map(|(id, _)| id),
                subsystem_nqn: &nqn,
            }));
        }
        let Some((id, size)) = facts.volume else { return Answer::Fail(NvmeStatus::INVALID_FIELD) };
        match cns {
            0x00 if nsid == NSID => Answer::Data(nvme::identify_namespace(id, size)),
            0x02 if nsid < NSID_ALL - 1 => {
                let mut page = vec![0; 4096];
                if nsid < NSID {
                    crate::bytes::put(&mut page, 0, &NSID.to_le_bytes());
                }
                Answer::Data(page)
            }
            0x03 if nsid == NSID => Answer::Data(nvme::identify_descriptors(id)),
            0x00 | 0x02 | 0x03 => Answer::Fail(NvmeStatus::INVALID_NAMESPACE),
            _ => Answer::Fail(NvmeStatus::INVALID_FIELD),
        }
    }

    fn log_page(&mut self, sqe: &Sqe, facts: &Facts<'_>) -> Answer {
        let offset = u64::from(sqe.dword(12)) | u64::from(sqe.dword(13)) << 32;
        let keep_event = sqe.dword(10) & 1 << 15 != 0;
        let page = match (sqe.dword(10) & 0xff, facts.volume) {
            (0x01, _) => vec![0; 64],
            (0x02, Some(_)) => health_log(facts.traffic),
            (0x03, Some(_)) => {
                let mut page = vec![0; 512];
                crate::bytes::put(&mut page, 0, &[1]);
                crate::bytes::put_ascii(&mut page, 8, 8, "1.0");
                page
            }
            (0x04, Some(_)) => {
                let mut page = vec![0; 4096];
                if self.namespace_changed {
                    crate::bytes::put(&mut page, 0, &NSID.to_le_bytes());
                }
                if !keep_event {
                    self.namespace_changed = false;
                    self.event_sent = false;
                }
                page
            }
            (0x70, None) => (facts.discovery_log)(),
            _ => return Answer::Fail(NvmeStatus::INVALID_LOG_PAGE),
        };
        if offset % 4 != 0 {
            return Answer::Fail(NvmeStatus::INVALID_FIELD);
        }
        match page.get(crate::bytes::narrow(offset)..) {
            Some(rest) => Answer::Data(rest.to_vec()),
            None => Answer::Fail(NvmeStatus::INVALID_FIELD),
        }
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

/// SMART / Health Information, 02h: units of 512,000 bytes, rounded up.
fn health_log(traffic: Traffic) -> Vec<u8> {
    let mut page = vec![0; 512];
    crate::bytes::put(&mut page, 1, &300_u16.to_le_bytes()); // kelvin
    crate::bytes::put(&mut page, 3, &[100, 10]); // spare: percent available, threshold
    for (at, value) in
        [(32, traffic.read_bytes.div_ceil(512_000)), (48, traffic.write_bytes.div_ceil(512_000)), (64, traffic.reads), (80, traffic.writes)]
    {
        crate::bytes::put(&mut page, at, &value.to_le_bytes());
    }
    page
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
        let facts = Facts {
            volume: controller.volume.map(|_| ("vol-1", 1 << 30)),
            traffic: Traffic::default(),
            discovery_log: &log,
            now: Duration::ZERO,
        };
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
        assert_eq!(run(&mut controller, property_set(0x0046_4001)), Answer::Value(0));
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
        controller.namespace_changed();
        assert_eq!(controller.next_event(), None, "the host has not asked for it");
        run(&mut controller, Sqe::new(opcode::SET_FEATURES, 0, 0).with(10, 0x0b).with(11, nvme::EVENT_NAMESPACE));
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
