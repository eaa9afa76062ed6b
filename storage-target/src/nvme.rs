//! NVM Express Base 2.0 and NVM Command Set 1.0: queue entries and status codes.
//!
//! Offsets are those of the standards' tables. A submission queue entry is 64 bytes, a completion 16.

use crate::bytes::{array_at, put, u8_at, u16_at, u32_at, u64_at};

/// Bytes of a logical block: EBS volumes have 512.
pub const BLOCK: u64 = 512;
/// MDTS: the largest data of one command, in bytes.
pub const MAX_TRANSFER: u64 = 1 << 20;
/// The deepest queue that a host may ask for, in entries.
pub(crate) const MAX_QUEUE: u16 = 256;
/// The most I/O queues of one controller.
pub(crate) const MAX_IO_QUEUES: u16 = 16;
/// The most Asynchronous Event Requests that a controller holds.
pub(crate) const MAX_EVENT_REQUESTS: u8 = 4;
/// The discovery subsystem, which every target has.
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";
/// The subsystem's one namespace.
pub(crate) const NSID: u32 = 1;
/// "All namespaces."
pub(crate) const NSID_ALL: u32 = 0xffff_ffff;
/// VS: NVM Express 2.0.
pub(crate) const VERSION: u32 = 0x0002_0000;
/// How long a controller may take until it is ready, in half seconds.
const READY_TIMEOUT: u32 = 20;
/// CAP: contiguous queues, 10 s to become ready, the NVM command set, 4 KiB pages, ready with media.
pub(crate) const CAPABILITIES: u64 = (MAX_QUEUE as u64 - 1) | 1 << 16 | (READY_TIMEOUT as u64) << 24 | 1 << 37 | 1 << 59;
/// CRTO: the same time, once more.
pub(crate) const READY_TIMEOUTS: u32 = READY_TIMEOUT;

/// The NQN of a volume's subsystem.
#[must_use]
pub fn volume_nqn(id: &str) -> String {
    format!("nqn.2026-11.cardinal:volume:{id}")
}

/// The volume that a subsystem NQN names.
pub(crate) fn volume_of_nqn(nqn: &str) -> Option<&str> {
    nqn.strip_prefix("nqn.2026-11.cardinal:volume:")
}

/// Opcodes of admin, I/O and fabrics commands.
pub(crate) mod opcode {
    pub const FABRICS: u8 = 0x7f;
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const COMPARE: u8 = 0x05;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    pub const VERIFY: u8 = 0x0c;
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0a;
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;
    pub const KEEP_ALIVE: u8 = 0x18;
}

/// FCTYPE of fabrics commands.
pub(crate) mod fabrics {
    pub const PROPERTY_SET: u8 = 0x00;
    pub const CONNECT: u8 = 0x01;
    pub const PROPERTY_GET: u8 = 0x04;
    pub const DISCONNECT: u8 = 0x08;
}

/// Offsets of controller properties.
pub(crate) mod property {
    pub const CAP: u32 = 0x00;
    pub const VS: u32 = 0x08;
    pub const CC: u32 = 0x14;
    pub const CSTS: u32 = 0x1c;
    pub const CRTO: u32 = 0x68;
}

/// A completion's status: SC in bits 7:0, SCT in 10:8, Do Not Retry in 14.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct NvmeStatus(pub u16);

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        impl NvmeStatus {
            $($(#[$doc])* pub const $name: Self = Self($value);)*

            /// The standard's name for it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self.0 & 0x07ff {
                    $($value => $text,)*
                    _ => "a status that this crate never sends",
                }
            }
        }
    };
}

statuses! {
    /// The command ended well.
    SUCCESS = 0x000, "Successful Completion";
    /// No such command.
    INVALID_OPCODE = 0x001, "Invalid Command Opcode";
    /// A field has a value that it cannot have.
    INVALID_FIELD = 0x002, "Invalid Field in Command";
    /// The command identifier is in use.
    ID_CONFLICT = 0x003, "Command ID Conflict";
    /// The data came damaged, or did not come whole.
    DATA_TRANSFER = 0x004, "Data Transfer Error";
    /// Something broke inside of the controller.
    INTERNAL = 0x006, "Internal Error";
    /// The host asked for its end.
    ABORTED = 0x007, "Command Abort Requested";
    /// The connection that it came by is gone.
    ABORTED_SQ_DELETION = 0x008, "Command Aborted due to SQ Deletion";
    /// There is no such namespace.
    INVALID_NAMESPACE = 0x00b, "Invalid Namespace or Format";
    /// The command cannot come now.
    SEQUENCE = 0x00c, "Command Sequence Error";
    /// The descriptor's length does not fit the command.
    SGL_LENGTH = 0x00f, "Data SGL Length Invalid";
    /// A descriptor type that the transport does not have.
    SGL_TYPE = 0x011, "SGL Descriptor Type Invalid";
    /// In-capsule data outside of the capsule.
    SGL_OFFSET = 0x016, "SGL Offset Invalid";
    /// The data digest does not fit the data; worth another try.
    TRANSIENT_TRANSPORT = 0x022, "Transient Transport Error";
    /// Blocks outside of the namespace.
    LBA_RANGE = 0x080, "LBA Out of Range";
    /// The store has no room left.
    CAPACITY = 0x081, "Capacity Exceeded";
    /// The volume cannot be reached now; worth another try.
    NOT_READY = 0x082, "Namespace Not Ready";
    /// More Asynchronous Event Requests than the controller holds.
    EVENT_LIMIT = 0x105, "Asynchronous Event Request Limit Exceeded";
    /// No such log page.
    INVALID_LOG_PAGE = 0x109, "Invalid Log Page";
    /// A feature that cannot be saved.
    FEATURE_NOT_SAVEABLE = 0x10d, "Feature Identifier Not Saveable";
    /// A feature that cannot be changed.
    FEATURE_NOT_CHANGEABLE = 0x10e, "Feature Not Changeable";
    /// A record format of Connect that the controller does not know.
    CONNECT_FORMAT = 0x180, "Connect Incompatible Format";
    /// No controller can be made now; worth another try.
    CONNECT_BUSY = 0x181, "Connect Controller Busy";
    /// Connect names a subsystem, controller or queue that there is not.
    CONNECT_INVALID = 0x182, "Connect Invalid Parameters";
    /// This host may not connect to this subsystem.
    CONNECT_HOST = 0x184, "Connect Invalid Host";
    /// The blocks could not be written, or not made durable.
    WRITE_FAULT = 0x280, "Write Fault";
    /// The blocks could not be read.
    READ_ERROR = 0x281, "Unrecovered Read Error";
    /// The blocks are not what they were compared with.
    COMPARE_FAILURE = 0x285, "Compare Failure";
}

impl NvmeStatus {
    const DNR: u16 = 1 << 14;

    /// The same status, telling the host not to try again.
    #[must_use]
    pub fn dnr(self) -> Self {
        Self(self.0 | Self::DNR)
    }

    /// Whether it is the same status, with or without Do Not Retry.
    #[must_use]
    pub fn is(self, other: Self) -> bool {
        (self.0 ^ other.0) & 0x07ff == 0
    }
}

impl std::fmt::Debug for NvmeStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:03x}h {}", self.0 & 0x07ff, self.name())
    }
}

impl std::fmt::Display for NvmeStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NVMe status {self:?}")
    }
}

impl std::error::Error for NvmeStatus {}

/// Where a command's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sgl {
    /// At this offset of the capsule's data.
    InCapsule { offset: u64, len: u32 },
    /// With the host; the transport moves it.
    Transport { len: u32 },
    /// A type that NVMe/TCP does not have.
    Other,
}

/// A submission queue entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sqe(pub [u8; 64]);

impl Sqe {
    pub fn new(opcode: u8, cid: u16, nsid: u32) -> Self {
        let mut bytes = [0; 64];
        // PSDT 01b: fabrics commands use SGLs.
        put(&mut bytes, 0, &[opcode, 0x40]);
        put(&mut bytes, 2, &cid.to_le_bytes());
        put(&mut bytes, 4, &nsid.to_le_bytes());
        Self(bytes)
    }

    /// Puts a 32-bit command dword, 10 to 15.
    pub fn with(mut self, dword: usize, value: u32) -> Self {
        put(&mut self.0, dword * 4, &value.to_le_bytes());
        self
    }

    pub fn with_sgl(mut self, sgl: Sgl) -> Self {
        let (address, len, kind) = match sgl {
            Sgl::InCapsule { offset, len } => (offset, len, 0x01),
            Sgl::Transport { len } => (0, len, 0x5a),
            Sgl::Other => (0, 0, 0xff),
        };
        put(&mut self.0, 24, &address.to_le_bytes());
        put(&mut self.0, 32, &len.to_le_bytes());
        put(&mut self.0, 39, &[kind]);
        self
    }

    pub fn opcode(&self) -> u8 {
        u8_at(&self.0, 0)
    }

    /// PSDT: how data is described; zero would be PRP lists, which fabrics do not have.
    pub fn psdt(&self) -> u8 {
        u8_at(&self.0, 1) >> 6
    }

    /// Fused operations are not supported: any value but zero is refused.
    pub fn fuse(&self) -> u8 {
        u8_at(&self.0, 1) & 3
    }

    pub fn cid(&self) -> u16 {
        u16_at(&self.0, 2)
    }

    pub fn nsid(&self) -> u32 {
        u32_at(&self.0, 4)
    }

    pub fn fctype(&self) -> u8 {
        u8_at(&self.0, 4)
    }

    pub fn sgl(&self) -> Sgl {
        let len = u32_at(&self.0, 32);
        match u8_at(&self.0, 39) {
            0x01 => Sgl::InCapsule { offset: u64_at(&self.0, 24), len },
            0x5a => Sgl::Transport { len },
            _ => Sgl::Other,
        }
    }

    /// Command dword 10 to 15.
    pub fn dword(&self, dword: usize) -> u32 {
        u32_at(&self.0, dword * 4)
    }

    pub fn u16_at(&self, at: usize) -> u16 {
        u16_at(&self.0, at)
    }

    /// SLBA of an I/O command.
    pub fn lba(&self) -> u64 {
        u64_at(&self.0, 40)
    }

    /// NLB of an I/O command, counted from one.
    pub fn blocks(&self) -> u64 {
        u64::from(u16_at(&self.0, 48)) + 1
    }

    /// Force Unit Access.
    pub fn fua(&self) -> bool {
        self.dword(12) & 1 << 30 != 0
    }
}

/// A completion queue entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cqe {
    pub dw0: u64,
    pub sq_head: u16,
    pub cid: u16,
    pub status: NvmeStatus,
}

impl Cqe {
    pub fn encode(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        put(&mut bytes, 0, &self.dw0.to_le_bytes());
        put(&mut bytes, 8, &self.sq_head.to_le_bytes());
        put(&mut bytes, 12, &self.cid.to_le_bytes());
        put(&mut bytes, 14, &(self.status.0 << 1).to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; 16]) -> Self {
        Self { dw0: u64_at(bytes, 0), sq_head: u16_at(bytes, 8), cid: u16_at(bytes, 12), status: NvmeStatus(u16_at(bytes, 14) >> 1) }
    }
}

/// The data of a Connect command, 1,024 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ConnectData {
    pub host_id: [u8; 16],
    pub controller: u16,
    pub subsystem_nqn: String,
    pub host_nqn: String,
}

impl ConnectData {
    pub const LEN: usize = 1024;
    /// Offsets that a refusal names.
    pub const CONTROLLER_AT: u16 = 16;
    pub const SUBSYSTEM_AT: u16 = 256;
    pub const HOST_AT: u16 = 512;

    /// # Errors
    /// The offset of the name that is no name.
    pub fn decode(bytes: &[u8]) -> Result<Self, u16> {
        let name = |at: u16| crate::bytes::name_at(bytes, at.into(), 256).filter(|name| !name.is_empty()).ok_or(at);
        Ok(Self {
            host_id: array_at(bytes, 0),
            controller: u16_at(bytes, Self::CONTROLLER_AT.into()),
            subsystem_nqn: name(Self::SUBSYSTEM_AT)?.to_owned(),
            host_nqn: name(Self::HOST_AT)?.to_owned(),
        })
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; Self::LEN];
        put(&mut bytes, 0, &self.host_id);
        put(&mut bytes, Self::CONTROLLER_AT.into(), &self.controller.to_le_bytes());
        put(&mut bytes, Self::SUBSYSTEM_AT.into(), self.subsystem_nqn.as_bytes());
        put(&mut bytes, Self::HOST_AT.into(), self.host_nqn.as_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_keep_their_fields() {
        let sqe = Sqe::new(opcode::WRITE, 0x1234, NSID)
            .with(10, 0x89ab_cdef)
            .with(11, 0x0000_0001)
            .with(12, 1 << 30 | 7)
            .with_sgl(Sgl::Transport { len: 4096 });
        assert_eq!((sqe.opcode(), sqe.cid(), sqe.nsid()), (opcode::WRITE, 0x1234, NSID));
        assert_eq!((sqe.lba(), sqe.blocks(), sqe.fua()), (0x1_89ab_cdef, 8, true));
        assert_eq!(sqe.sgl(), Sgl::Transport { len: 4096 });
        let cqe = Cqe { dw0: 5, sq_head: 6, cid: 7, status: NvmeStatus::LBA_RANGE.dnr() };
        assert_eq!(Cqe::decode(&cqe.encode()), cqe);
    }

    #[test]
    fn status_codes_are_those_of_the_standard() {
        for (status, type_, code) in [
            (NvmeStatus::LBA_RANGE, 0, 0x80),
            (NvmeStatus::CONNECT_HOST, 1, 0x84),
            (NvmeStatus::WRITE_FAULT, 2, 0x80),
            (NvmeStatus::EVENT_LIMIT, 1, 0x05),
        ] {
            assert_eq!((status.0 >> 8, status.0 & 0xff), (type_, code));
            assert!(status.dnr().is(status));
        }
        // SCT and SC stand in bits 11:1 of the completion's last word, DNR in bit 15.
        let cqe = Cqe { dw0: 0, sq_head: 0, cid: 0, status: NvmeStatus::WRITE_FAULT.dnr() };
        assert_eq!(cqe.encode()[14..], (0x8000_u16 | 0x280 << 1).to_le_bytes());
    }

    #[test]
    fn connect_data_refuses_names_without_an_end() {
        let data = ConnectData {
            host_id: [9; 16],
            controller: 0xffff,
            subsystem_nqn: volume_nqn("vol-1"),
            host_nqn: "nqn.2026-11.cardinal:card:a".into(),
        };
        let mut bytes = data.encode();
        assert_eq!(ConnectData::decode(&bytes), Ok(data));
        bytes[512..768].fill(b'x');
        assert_eq!(ConnectData::decode(&bytes), Err(512));
        assert_eq!(ConnectData::decode(&[]), Err(256));
    }
}
