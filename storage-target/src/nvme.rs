//! NVM Express Base 1.4 and NVMe over Fabrics 1.1: queue entries, status codes, identify structures.
//!
//! Offsets are those of the standards' tables. A submission queue entry is 64 bytes, a completion 16.

use crate::bytes::{array_at, put, put_ascii, u8_at, u16_at, u32_at, u64_at};

/// Bytes of a logical block: EBS volumes have 512.
pub const BLOCK: u64 = 512;
/// MDTS: the largest data of one command, in bytes.
pub const MAX_TRANSFER: u64 = 1 << 20;
/// The deepest queue that a host may ask for, in entries.
pub(crate) const MAX_QUEUE: u16 = 128;
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
const VERSION_1_4: u32 = 0x0001_0400;
const EBS_VENDOR: u16 = 0x1d0f;
const EBS_OUI: [u8; 3] = [0xdc, 0x02, 0xa0];

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
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
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

/// What a controller says about itself.
pub(crate) struct ControllerIdentity<'a> {
    pub controller: u16,
    /// `None`: the discovery controller.
    pub volume: Option<&'a str>,
    pub subsystem_nqn: &'a str,
}

/// CAP: contiguous queues, 10 s to become ready, the NVM command set, 4 KiB pages.
pub(crate) const CAPABILITIES: u64 = (MAX_QUEUE as u64 - 1) | 1 << 16 | 20 << 24 | 1 << 37;
/// VS: NVM Express 1.4.
pub(crate) const VERSION: u32 = VERSION_1_4;
/// OAES and the Asynchronous Event Configuration feature: namespace attributes changed.
pub(crate) const EVENT_NAMESPACE: u32 = 1 << 8;

/// Identify Controller, CNS 01h, with the identity of an EBS volume.
pub(crate) fn identify_controller(who: &ControllerIdentity<'_>) -> Vec<u8> {
    let mut page = vec![0; 4096];
    let serial = who.volume.map_or_else(|| "discovery".to_owned(), |id| id.replace('-', ""));
    put(&mut page, 0, &EBS_VENDOR.to_le_bytes());
    put(&mut page, 2, &EBS_VENDOR.to_le_bytes());
    put_ascii(&mut page, 4, 20, &serial);
    put_ascii(&mut page, 24, 40, "Amazon Elastic Block Store");
    put_ascii(&mut page, 64, 8, "1.0");
    put(&mut page, 73, &EBS_OUI);
    put(&mut page, 77, &[8]); // MDTS: 2^8 pages of 4 KiB
    put(&mut page, 78, &who.controller.to_le_bytes());
    put(&mut page, 80, &VERSION_1_4.to_le_bytes());
    let (events, kind) = if who.volume.is_some() { (EVENT_NAMESPACE, 1) } else { (0, 2) };
    put(&mut page, 92, &events.to_le_bytes());
    put(&mut page, 96, &1_u32.to_le_bytes()); // CTRATT: 128-bit host identifiers
    put(&mut page, 111, &[kind]);
    put(&mut page, 258, &[3, MAX_EVENT_REQUESTS - 1]); // ACL, AERL
    put(&mut page, 260, &[0x03]); // FRMW: one slot, read only
    put(&mut page, 261, &[0x04]); // LPA: extended data for Get Log Page
    put(&mut page, 320, &1_u16.to_le_bytes()); // KAS: steps of 100 ms
    put(&mut page, 514, &MAX_QUEUE.to_le_bytes()); // MAXCMD
    put(&mut page, 536, &0x0030_0001_u32.to_le_bytes()); // SGLS: any alignment, offsets, transport blocks
    put(&mut page, 768, who.subsystem_nqn.as_bytes());
    put(&mut page, 1803, &[1]); // MSDBD
    if let Some(volume) = who.volume {
        put(&mut page, 266, &343_u16.to_le_bytes()); // WCTEMP
        put(&mut page, 268, &353_u16.to_le_bytes()); // CCTEMP
        put(&mut page, 512, &[0x66, 0x44]); // SQES, CQES
        put(&mut page, 516, &1_u32.to_le_bytes()); // NN
        put(&mut page, 520, &0x000c_u16.to_le_bytes()); // ONCS: write zeroes, dataset management
        put(&mut page, 525, &[0x07]); // VWC: present; flush takes FFFFFFFFh too
        put(&mut page, 1792, &CAPSULE_UNITS.to_le_bytes()); // IOCCSZ
        put(&mut page, 1796, &1_u32.to_le_bytes()); // IORCSZ
        put_ascii(&mut page, 3072, 32, ""); // the device name is the card's to give
        debug_assert!(!volume.is_empty());
    }
    page
}

/// IOCCSZ: entry and in-capsule data in units of 16 bytes.
const CAPSULE_UNITS: u32 = (64 + crate::pdu::IN_CAPSULE) / 16;

/// Identify Namespace, CNS 00h: one format of 512-byte blocks, thin, deallocated blocks read zero.
pub(crate) fn identify_namespace(volume: &str, size_bytes: u64) -> Vec<u8> {
    let mut page = vec![0; 4096];
    let blocks = size_bytes / BLOCK;
    put(&mut page, 0, &blocks.to_le_bytes()); // NSZE
    put(&mut page, 8, &blocks.to_le_bytes()); // NCAP
    put(&mut page, 16, &blocks.to_le_bytes()); // NUSE
    put(&mut page, 33, &[0x09]); // DLFEAT: reads zero; write zeroes may deallocate
    put(&mut page, 104, &namespace_guid(volume));
    put(&mut page, 128 + 2, &[9]); // LBAF0: 2^9 bytes
    put_ascii(&mut page, 384, 32, ""); // vendor area of EBS: mount name, then volume id
    put_ascii(&mut page, 416, 32, volume);
    page
}

/// Namespace Identification Descriptor list, CNS 03h: the NGUID.
pub(crate) fn identify_descriptors(volume: &str) -> Vec<u8> {
    let mut page = vec![0; 4096];
    put(&mut page, 0, &[2, 16]);
    put(&mut page, 4, &namespace_guid(volume));
    page
}

/// A stable NGUID: FNV-1a of the volume's id around the vendor's OUI.
fn namespace_guid(volume: &str) -> [u8; 16] {
    let mut hash = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128;
    for byte in volume.bytes() {
        hash = (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
    }
    let mut guid = hash.to_be_bytes();
    put(&mut guid, 8, &[0xa0, 0x02, 0xdc]);
    guid
}

/// One entry of the discovery log page.
pub(crate) struct DiscoveryEntry {
    pub subsystem_nqn: String,
    pub address: std::net::SocketAddr,
}

/// The discovery log page, 70h: a header of 1,024 bytes and as much for each entry.
pub(crate) fn discovery_log(generation: u64, entries: &[DiscoveryEntry]) -> Vec<u8> {
    let mut page = vec![0; 1024 * (1 + entries.len())];
    put(&mut page, 0, &generation.to_le_bytes());
    put(&mut page, 8, &crate::bytes::wide(entries.len()).to_le_bytes());
    for (index, entry) in entries.iter().enumerate() {
        let at = 1024 * (1 + index);
        let family = if entry.address.is_ipv4() { 1 } else { 2 };
        put(&mut page, at, &[3, family, 2, 0x02]); // TCP, address family, NVM subsystem, secure channel not required
        put(&mut page, at + 4, &1_u16.to_le_bytes()); // PORTID
        put(&mut page, at + 6, &0xffff_u16.to_le_bytes()); // CNTLID: dynamic
        put(&mut page, at + 8, &MAX_QUEUE.to_le_bytes()); // ASQSZ
        put_ascii(&mut page, at + 32, 32, &entry.address.port().to_string());
        put(&mut page, at + 256, entry.subsystem_nqn.as_bytes());
        put_ascii(&mut page, at + 512, 256, &entry.address.ip().to_string());
    }
    page
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
    fn identity_is_that_of_ebs() {
        let page = identify_controller(&ControllerIdentity {
            controller: 3,
            volume: Some("vol-0123456789abcdef0"),
            subsystem_nqn: &volume_nqn("vol-0123456789abcdef0"),
        });
        assert_eq!(page[..2], 0x1d0f_u16.to_le_bytes());
        assert_eq!(&page[4..24], b"vol0123456789abcdef0");
        assert_eq!(&page[24..50], b"Amazon Elastic Block Store");
        let namespace = identify_namespace("vol-0123456789abcdef0", 1 << 30);
        assert_eq!(u64_at(&namespace, 0), (1 << 30) / 512);
        assert_eq!(&namespace[416..437], b"vol-0123456789abcdef0");
        assert_eq!(&namespace[104 + 8..104 + 11], [0xa0, 0x02, 0xdc]);
        assert_ne!(namespace_guid("vol-1"), namespace_guid("vol-2"));
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

    #[test]
    fn discovery_entries_name_address_and_port() {
        let page = discovery_log(9, &[DiscoveryEntry { subsystem_nqn: volume_nqn("vol-1"), address: "127.0.0.1:4420".parse().unwrap() }]);
        assert_eq!((page.len(), u64_at(&page, 0), u64_at(&page, 8)), (2048, 9, 1));
        assert_eq!(&page[1024..1028], [3, 1, 2, 2]);
        assert_eq!(&page[1024 + 32..1024 + 37], b"4420 ");
        assert_eq!(&page[1024 + 512..1024 + 522], b"127.0.0.1 ");
    }
}
