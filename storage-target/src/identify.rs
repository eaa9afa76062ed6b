//! Identify data structures: NVM Express Base 2.0 section 5.17 and NVM Command Set 1.0 section 4.1.5.
//!
//! A volume's subsystem has one namespace of 512-byte blocks and looks as an EBS volume does to udev rules and
//! `nvme amzn id-ctrl`: vendor 1D0Fh, serial number the volume's id without its dash, the id again in the vendor
//! area of the namespace. Only layouts here: what they are filled with comes from the controller.

use crate::bytes::{put, put_ascii};
use crate::nvme::{BLOCK, MAX_EVENT_REQUESTS, MAX_QUEUE, NSID, VERSION};

const EBS_VENDOR: u16 = 0x1d0f;
const EBS_OUI: [u8; 3] = [0xdc, 0x02, 0xa0];
/// The one ANA group, of which every namespace is.
pub(crate) const ANA_GROUP: u32 = 1;
/// Entries of the error log.
pub(crate) const ERROR_ENTRIES: u8 = 64;
/// ONCS: compare, dataset management, write zeroes, the Select field, verify.
const OPTIONAL_COMMANDS: u16 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 7;
/// The largest transfer as a power of two of 4 KiB pages.
const MAX_TRANSFER_PAGES: u8 = 8;

/// OAES and the Asynchronous Event Configuration feature: namespace attributes changed.
pub(crate) const EVENT_NAMESPACE: u32 = 1 << 8;
/// The discovery log changed.
pub(crate) const EVENT_DISCOVERY: u32 = 1 << 31;

/// What a controller says about itself.
pub(crate) struct ControllerIdentity<'a> {
    pub controller: u16,
    /// `None`: the discovery controller.
    pub volume: Option<&'a str>,
    pub subsystem_nqn: &'a str,
    /// Several hosts may have controllers at once.
    pub shared: bool,
}

/// Identify Controller, CNS 01h, with the identity of an EBS volume.
pub(crate) fn controller(who: &ControllerIdentity<'_>) -> Vec<u8> {
    let mut page = vec![0; 4096];
    let serial = who.volume.map_or_else(|| "discovery".to_owned(), |id| id.replace('-', ""));
    put(&mut page, 0, &EBS_VENDOR.to_le_bytes());
    put(&mut page, 2, &EBS_VENDOR.to_le_bytes());
    put_ascii(&mut page, 4, 20, &serial);
    put_ascii(&mut page, 24, 40, "Amazon Elastic Block Store");
    put_ascii(&mut page, 64, 8, "1.0");
    put(&mut page, 73, &EBS_OUI);
    put(&mut page, 77, &[MAX_TRANSFER_PAGES]);
    put(&mut page, 78, &who.controller.to_le_bytes());
    put(&mut page, 80, &VERSION.to_le_bytes());
    let (events, kind) = if who.volume.is_some() { (EVENT_NAMESPACE, 1) } else { (EVENT_DISCOVERY, 2) };
    put(&mut page, 92, &events.to_le_bytes());
    put(&mut page, 96, &1_u32.to_le_bytes()); // CTRATT: 128-bit host identifiers
    put(&mut page, 111, &[kind]);
    put(&mut page, 258, &[3, MAX_EVENT_REQUESTS - 1]); // ACL, AERL
    put(&mut page, 260, &[0x03]); // FRMW: one slot, read only
    put(&mut page, 261, &[1 << 1 | 1 << 2 | 1 << 5]); // LPA: effects log, extended data, supported log pages
    put(&mut page, 262, &[ERROR_ENTRIES - 1]);
    put(&mut page, 320, &1_u16.to_le_bytes()); // KAS: steps of 100 ms
    put(&mut page, 514, &MAX_QUEUE.to_le_bytes()); // MAXCMD
    put(&mut page, 536, &0x0030_0001_u32.to_le_bytes()); // SGLS: any alignment, offsets, transport blocks
    put(&mut page, 768, who.subsystem_nqn.as_bytes());
    put(&mut page, 1803, &[1]); // MSDBD
    put(&mut page, 1804, &1_u16.to_le_bytes()); // OFCS: Disconnect
    if who.volume.is_some() {
        if who.shared {
            put(&mut page, 76, &[1 << 1 | 1 << 3]); // CMIC: several controllers, ANA
            put(&mut page, 342, &[10, 1]); // ANATT in seconds, ANACAP: optimized
            put(&mut page, 344, &ANA_GROUP.to_le_bytes()); // ANAGRPMAX
            put(&mut page, 348, &ANA_GROUP.to_le_bytes()); // NANAGRPID
        }
        put(&mut page, 266, &343_u16.to_le_bytes()); // WCTEMP
        put(&mut page, 268, &353_u16.to_le_bytes()); // CCTEMP
        put(&mut page, 512, &[0x66, 0x44]); // SQES, CQES
        put(&mut page, 516, &1_u32.to_le_bytes()); // NN
        put(&mut page, 520, &OPTIONAL_COMMANDS.to_le_bytes());
        put(&mut page, 525, &[0x07]); // VWC: present; flush takes FFFFFFFFh too
        put(&mut page, 540, &1_u32.to_le_bytes()); // MNAN
        put(&mut page, 1792, &CAPSULE_UNITS.to_le_bytes()); // IOCCSZ
        put(&mut page, 1796, &1_u32.to_le_bytes()); // IORCSZ
        put_ascii(&mut page, 3072, 32, ""); // the device name is the card's to give
    }
    page
}

/// IOCCSZ: entry and in-capsule data in units of 16 bytes.
const CAPSULE_UNITS: u32 = (64 + crate::pdu::IN_CAPSULE) / 16;

/// Identify Controller of the NVM command set, CNS 06h: verify is limited as reads are, write zeroes is not.
pub(crate) fn nvm_controller() -> Vec<u8> {
    let mut page = vec![0; 4096];
    put(&mut page, 0, &[MAX_TRANSFER_PAGES]); // VSL
    page
}

/// Identify Namespace, CNS 00h: one format of 512-byte blocks, deallocated blocks read zero.
pub(crate) fn namespace(volume: &str, size_bytes: u64, shared: bool) -> Vec<u8> {
    let mut page = vec![0; 4096];
    let blocks = size_bytes / BLOCK;
    put(&mut page, 0, &blocks.to_le_bytes()); // NSZE
    put(&mut page, 8, &blocks.to_le_bytes()); // NCAP
    put(&mut page, 16, &blocks.to_le_bytes()); // NUSE
    put(&mut page, 24, &[1 << 4]); // NSFEAT: the preferred sizes below are there
    put(&mut page, 30, &[u8::from(shared)]); // NMIC
    put(&mut page, 33, &[0x09]); // DLFEAT: reads zero; write zeroes may deallocate
    // NPWG, NPWA, NPDG, NPDA, counted from zero: pages of the cache.
    for at in [64, 66, 68, 70] {
        put(&mut page, at, &7_u16.to_le_bytes());
    }
    put(&mut page, 92, &if shared { ANA_GROUP } else { 0 }.to_le_bytes());
    put(&mut page, 104, &guid(volume));
    put(&mut page, 128 + 2, &[9]); // LBAF0: 2^9 bytes
    put_ascii(&mut page, 384, 32, ""); // vendor area of EBS: mount name, then volume id
    put_ascii(&mut page, 416, 32, volume);
    page
}

/// I/O Command Set Independent Identify Namespace, CNS 08h.
pub(crate) fn independent_namespace(shared: bool) -> Vec<u8> {
    let mut page = vec![0; 4096];
    put(&mut page, 1, &[u8::from(shared)]); // NMIC
    put(&mut page, 4, &if shared { ANA_GROUP } else { 0 }.to_le_bytes());
    put(&mut page, 14, &[1]); // NSTAT: ready
    page
}

/// The active namespaces above `after`, CNS 02h and 07h.
pub(crate) fn active_namespaces(after: u32) -> Vec<u8> {
    let mut page = vec![0; 4096];
    if after < NSID {
        put(&mut page, 0, &NSID.to_le_bytes());
    }
    page
}

/// Namespace Identification Descriptor list, CNS 03h: the NGUID, and the NVM command set.
pub(crate) fn descriptors(volume: &str) -> Vec<u8> {
    let mut page = vec![0; 4096];
    put(&mut page, 0, &[2, 16]);
    put(&mut page, 4, &guid(volume));
    put(&mut page, 20, &[4, 1]);
    page
}

/// A stable NGUID: FNV-1a of the volume's id around the vendor's OUI.
fn guid(volume: &str) -> [u8; 16] {
    let mut hash = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128;
    for byte in volume.bytes() {
        hash = (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
    }
    let mut guid = hash.to_be_bytes();
    put(&mut guid, 8, &[0xa0, 0x02, 0xdc]);
    guid
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::u64_at;

    #[test]
    fn identity_is_that_of_ebs() {
        let nqn = crate::volume_nqn("vol-0123456789abcdef0");
        let who = ControllerIdentity { controller: 3, volume: Some("vol-0123456789abcdef0"), subsystem_nqn: &nqn, shared: false };
        let page = controller(&who);
        assert_eq!(page[..2], 0x1d0f_u16.to_le_bytes());
        assert_eq!(&page[4..24], b"vol0123456789abcdef0");
        assert_eq!(&page[24..50], b"Amazon Elastic Block Store");
        let namespace = namespace("vol-0123456789abcdef0", 1 << 30, false);
        assert_eq!(u64_at(&namespace, 0), (1 << 30) / 512);
        assert_eq!(&namespace[416..437], b"vol-0123456789abcdef0");
        assert_eq!(&namespace[104 + 8..104 + 11], [0xa0, 0x02, 0xdc]);
        assert_ne!(guid("vol-1"), guid("vol-2"));
    }
}
