//! NVMe/TCP PDUs: NVM Express TCP Transport Specification 1.0, section 3.6.
//!
//! | type | flags | HLEN | PDO | PLEN (32) | header to HLEN | header digest? | padding to PDO | data | data digest? |
//!
//! Everything is little-endian; both digests are CRC32C. A header is decoded only when it is whole, and every
//! length in it is checked against what its type may carry before anything is allocated for it.

use crate::bytes::{array_at, put, u8_at, u16_at, u32_at};

/// The largest data that one H2CData PDU may carry (MAXH2CDATA), in bytes.
pub const MAX_H2C_DATA: u32 = 128 * 1024;
/// The largest data that a command capsule may carry, in bytes.
pub const IN_CAPSULE: u32 = 8 * 1024;
/// HLEN of data, R2T, response and termination PDUs, in bytes.
pub(crate) const SHORT_HLEN: usize = 24;
/// The largest alignment that HPDA and CPDA can ask for, in bytes.
const MAX_PADDING: usize = 128;
const DIGEST: usize = 4;

const FLAG_HDGST: u8 = 1 << 0;
const FLAG_DDGST: u8 = 1 << 1;
const FLAG_LAST: u8 = 1 << 2;
const FLAG_SUCCESS: u8 = 1 << 3;

/// Which digests a connection carries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Digests {
    /// CRC32C after each header.
    pub header: bool,
    /// CRC32C after each data.
    pub data: bool,
}

impl Digests {
    fn from_bits(bits: u8) -> Self {
        Self { header: bits & 1 != 0, data: bits & 2 != 0 }
    }

    fn bits(self) -> u8 {
        u8::from(self.header) | u8::from(self.data) << 1
    }
}

/// Which side reads: each may receive only the other's PDUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Reads what a host sends.
    Controller,
    /// Reads what a controller sends.
    Host,
}

/// Part of a command's data, in an H2CData or C2HData PDU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data {
    /// The command it belongs to.
    pub cid: u16,
    /// The R2T it answers; zero in C2HData.
    pub ttag: u16,
    /// Where in the command's buffer it begins, in bytes.
    pub offset: u32,
    /// How long it is, in bytes.
    pub len: u32,
    /// The last data PDU of the command or of the R2T.
    pub last: bool,
    /// C2HData: the command ended well and no response capsule follows.
    pub success: bool,
}

/// A decoded header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// Initialize Connection Request.
    IcReq { pfv: u16, hpda: u8, digests: Digests, max_r2t: u32 },
    /// Initialize Connection Response.
    IcResp { pfv: u16, cpda: u8, digests: Digests, max_h2c_data: u32 },
    /// The host ends the connection and says why.
    H2cTerm { fes: u16 },
    /// The controller ends the connection and says why.
    C2hTerm { fes: u16 },
    /// A submission queue entry, perhaps with data.
    Command { sqe: [u8; 64] },
    /// A completion queue entry.
    Response { cqe: [u8; 16] },
    /// Data from the host.
    H2cData(Data),
    /// Data from the controller.
    C2hData(Data),
    /// The controller is ready for this part of a command's data.
    R2t { cid: u16, ttag: u16, offset: u32, len: u32 },
}

/// A header and where the data that follows it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// What it says.
    pub header: Header,
    /// Bytes from the PDU's start to its data (or its end, without data).
    pub data_at: usize,
    /// Bytes of data.
    pub data_len: usize,
    /// Whether a data digest follows the data.
    pub data_digest: bool,
}

/// Why a connection cannot go on: the fields of a TermReq PDU (section 3.6.2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fatal {
    /// Fatal error status.
    pub fes: FatalStatus,
    /// Fatal error information: mostly the offset of the bad field.
    pub fei: u32,
}

/// Fatal Error Status codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum FatalStatus {
    /// A field of a header has a value that it cannot have.
    InvalidHeader = 1,
    /// A PDU that may not come now.
    Sequence = 2,
    /// The header digest does not fit the header.
    HeaderDigest = 3,
    /// Data outside of what was asked for.
    DataRange = 4,
    /// More data than the limit for one PDU.
    DataLimit = 5,
    /// A parameter of ICReq that this side does not know.
    Unsupported = 6,
}

fn fatal<T>(fes: FatalStatus, fei: u32) -> Result<T, Fatal> {
    Err(Fatal { fes, fei })
}

/// Decodes the header at the start of `bytes`; `None` asks for more bytes.
///
/// Data of command capsules has to be waited for by the caller; `data_at + data_len` (and four bytes when
/// `data_digest`) tell how far.
///
/// # Errors
/// [`Fatal`] for everything that the side cannot receive or that breaks the layout.
pub fn decode(side: Side, bytes: &[u8], digests: Digests, initialized: bool) -> Result<Option<Head>, Fatal> {
    let Some(common) = bytes.first_chunk::<8>() else { return Ok(None) };
    let layout = layout(side, common, digests, initialized)?;
    let Some(header) = bytes.get(..layout.hlen) else { return Ok(None) };
    if bytes.len() < layout.data_at {
        return Ok(None);
    }
    if layout.header_digest && crc32c::crc32c(header) != u32_at(bytes, layout.hlen) {
        return fatal(FatalStatus::HeaderDigest, u32_at(bytes, layout.hlen));
    }
    let [kind, flags, ..] = *common;
    let header = specific(kind, flags, header, layout.data_len)?;
    Ok(Some(Head { header, data_at: layout.data_at, data_len: layout.data_len, data_digest: layout.data_digest }))
}

/// Where the parts of a PDU are, in bytes from its start.
struct Layout {
    hlen: usize,
    header_digest: bool,
    data_at: usize,
    data_len: usize,
    data_digest: bool,
}

/// Checks the common header (section 3.6.1) against what this side can receive now.
fn layout(side: Side, common: &[u8; 8], digests: Digests, initialized: bool) -> Result<Layout, Fatal> {
    let [kind, flags, hlen, pdo, ..] = *common;
    let (expected_hlen, data_cap) = limits(side, kind)?;
    if usize::from(hlen) != expected_hlen {
        return fatal(FatalStatus::InvalidHeader, 2);
    }
    let initializes = kind < 0x02;
    let terminates = kind == 0x02 || kind == 0x03;
    if initializes == initialized && !terminates {
        return fatal(FatalStatus::Sequence, 0);
    }
    // Neither ICReq and ICResp nor the termination requests ever carry digests.
    let header_digest = digests.header && !initializes && !terminates;
    if (flags & FLAG_HDGST != 0) != header_digest {
        return fatal(FatalStatus::InvalidHeader, 1);
    }
    let head = expected_hlen + if header_digest { DIGEST } else { 0 };
    let plen = usize::try_from(u32_at(common, 4)).unwrap_or(usize::MAX);
    if plen < head {
        return fatal(FatalStatus::InvalidHeader, 4);
    }
    let carries_data = data_cap > 0 && plen > head;
    let data_digest = flags & FLAG_DDGST != 0;
    if data_digest != (digests.data && carries_data && !terminates) {
        return fatal(FatalStatus::InvalidHeader, 1);
    }
    let (data_at, data_len) = if terminates {
        (head, plen - head)
    } else if carries_data {
        let data_at = usize::from(pdo);
        let end = plen - if data_digest { DIGEST } else { 0 };
        if data_at < head || data_at > head + MAX_PADDING || data_at > end {
            return fatal(FatalStatus::InvalidHeader, 3);
        }
        (data_at, end - data_at)
    } else if plen != head {
        return fatal(FatalStatus::InvalidHeader, 4);
    } else {
        (head, 0)
    };
    if data_len > data_cap {
        let fes = if kind == 0x06 || kind == 0x07 { FatalStatus::DataLimit } else { FatalStatus::InvalidHeader };
        return fatal(fes, 4);
    }
    Ok(Layout { hlen: expected_hlen, header_digest, data_at, data_len, data_digest })
}

/// HLEN of a PDU type that this side receives, and the most data that it may carry.
fn limits(side: Side, kind: u8) -> Result<(usize, usize), Fatal> {
    Ok(match (side, kind) {
        (Side::Controller, 0x00) | (Side::Host, 0x01) => (128, 0),
        (Side::Controller, 0x02) | (Side::Host, 0x03) => (SHORT_HLEN, 128),
        (Side::Controller, 0x04) => (72, crate::bytes::narrow(IN_CAPSULE.into())),
        (Side::Host, 0x05 | 0x09) => (SHORT_HLEN, 0),
        (Side::Controller, 0x06) => (SHORT_HLEN, crate::bytes::narrow(MAX_H2C_DATA.into())),
        (Side::Host, 0x07) => (SHORT_HLEN, crate::bytes::narrow(crate::nvme::MAX_TRANSFER)),
        _ => return fatal(FatalStatus::InvalidHeader, 0),
    })
}

/// The PDU-specific header of a type that [`limits`] let through.
fn specific(kind: u8, flags: u8, header: &[u8], data_len: usize) -> Result<Header, Fatal> {
    Ok(match kind {
        0x00 => Header::IcReq {
            pfv: u16_at(header, 8),
            hpda: u8_at(header, 10),
            digests: Digests::from_bits(u8_at(header, 11)),
            max_r2t: u32_at(header, 12),
        },
        0x01 => Header::IcResp {
            pfv: u16_at(header, 8),
            cpda: u8_at(header, 10),
            digests: Digests::from_bits(u8_at(header, 11)),
            max_h2c_data: u32_at(header, 12),
        },
        0x02 => Header::H2cTerm { fes: u16_at(header, 8) },
        0x03 => Header::C2hTerm { fes: u16_at(header, 8) },
        0x04 => Header::Command { sqe: array_at(header, 8) },
        0x05 => Header::Response { cqe: array_at(header, 8) },
        0x09 => Header::R2t { cid: u16_at(header, 8), ttag: u16_at(header, 10), offset: u32_at(header, 12), len: u32_at(header, 16) },
        _ => {
            let data = Data {
                cid: u16_at(header, 8),
                ttag: u16_at(header, 10),
                offset: u32_at(header, 12),
                len: u32_at(header, 16),
                last: flags & FLAG_LAST != 0,
                success: flags & FLAG_SUCCESS != 0,
            };
            if usize::try_from(data.len) != Ok(data_len) {
                return fatal(FatalStatus::InvalidHeader, 16);
            }
            if kind == 0x06 { Header::H2cData(data) } else { Header::C2hData(data) }
        }
    })
}

/// Appends the bytes of a PDU up to its data: header, digest, padding.
///
/// `align` is the receiver's HPDA or CPDA plus one times four: where data may begin.
pub(crate) fn encode(out: &mut Vec<u8>, header: &Header, data_len: usize, digests: Digests, align: usize) {
    let mut bytes = [0_u8; 128];
    let (kind, hlen) = match header {
        Header::IcReq { .. } => (0x00, 128),
        Header::IcResp { .. } => (0x01, 128),
        Header::H2cTerm { .. } => (0x02, SHORT_HLEN),
        Header::C2hTerm { .. } => (0x03, SHORT_HLEN),
        Header::Command { .. } => (0x04, 72),
        Header::Response { .. } => (0x05, SHORT_HLEN),
        Header::H2cData(_) => (0x06, SHORT_HLEN),
        Header::C2hData(_) => (0x07, SHORT_HLEN),
        Header::R2t { .. } => (0x09, SHORT_HLEN),
    };
    let digests = if kind < 0x04 { Digests::default() } else { digests };
    let mut flags = if digests.header { FLAG_HDGST } else { 0 };
    match header {
        Header::IcReq { pfv, hpda: align, digests, max_r2t: limit } | Header::IcResp { pfv, cpda: align, digests, max_h2c_data: limit } => {
            put(&mut bytes, 8, &pfv.to_le_bytes());
            put(&mut bytes, 10, &[*align, digests.bits()]);
            put(&mut bytes, 12, &limit.to_le_bytes());
        }
        Header::H2cTerm { fes } | Header::C2hTerm { fes } => put(&mut bytes, 8, &fes.to_le_bytes()),
        Header::Command { sqe } => put(&mut bytes, 8, sqe),
        Header::Response { cqe } => put(&mut bytes, 8, cqe),
        Header::H2cData(data) | Header::C2hData(data) => {
            put(&mut bytes, 8, &data.cid.to_le_bytes());
            put(&mut bytes, 10, &data.ttag.to_le_bytes());
            put(&mut bytes, 12, &data.offset.to_le_bytes());
            put(&mut bytes, 16, &data.len.to_le_bytes());
            flags |= if data.last { FLAG_LAST } else { 0 } | if data.success { FLAG_SUCCESS } else { 0 };
        }
        Header::R2t { cid, ttag, offset, len } => {
            put(&mut bytes, 8, &cid.to_le_bytes());
            put(&mut bytes, 10, &ttag.to_le_bytes());
            put(&mut bytes, 12, &offset.to_le_bytes());
            put(&mut bytes, 16, &len.to_le_bytes());
        }
    }
    let head = hlen + if digests.header { DIGEST } else { 0 };
    let (pdo, plen) = if data_len == 0 {
        (0, head)
    } else {
        let pdo = head.next_multiple_of(align.max(1));
        let digest = if digests.data { DIGEST } else { 0 };
        flags |= if digests.data { FLAG_DDGST } else { 0 };
        (pdo, pdo + data_len + digest)
    };
    let narrow8 = |value: usize| u8::try_from(value).unwrap_or(u8::MAX);
    put(&mut bytes, 0, &[kind, flags, narrow8(hlen), narrow8(pdo)]);
    put(&mut bytes, 4, &crate::bytes::narrow32(plen).to_le_bytes());
    let start = out.len();
    let header = bytes.get(..hlen).unwrap_or_default();
    out.extend_from_slice(header);
    if digests.header {
        out.extend_from_slice(&crc32c::crc32c(header).to_le_bytes());
    }
    out.resize(start + head.max(pdo), 0);
}

/// Appends a termination request that quotes the start of the PDU that was refused.
pub(crate) fn encode_term(out: &mut Vec<u8>, side: Side, fatal: Fatal, refused: &[u8]) {
    let quoted = refused.get(..refused.len().min(SHORT_HLEN)).unwrap_or_default();
    let start = out.len();
    let fes = fatal.fes as u16;
    let header = if side == Side::Controller { Header::C2hTerm { fes } } else { Header::H2cTerm { fes } };
    encode(out, &header, 0, Digests::default(), 1);
    if let Some(pdu) = out.get_mut(start..) {
        put(pdu, 4, &crate::bytes::narrow32(SHORT_HLEN + quoted.len()).to_le_bytes());
        put(pdu, 10, &fatal.fei.to_le_bytes());
    }
    out.extend_from_slice(quoted);
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: [Digests; 4] = [
        Digests { header: false, data: false },
        Digests { header: true, data: false },
        Digests { header: false, data: true },
        Digests { header: true, data: true },
    ];

    fn samples() -> Vec<(Side, Header, usize)> {
        let data = Data { cid: 7, ttag: 9, offset: 4096, len: 512, last: true, success: false };
        let digests = Digests { header: true, data: true };
        vec![
            (Side::Controller, Header::IcReq { pfv: 0, hpda: 3, digests, max_r2t: 5 }, 0),
            (Side::Host, Header::IcResp { pfv: 0, cpda: 1, digests, max_h2c_data: 131_072 }, 0),
            (Side::Controller, Header::H2cTerm { fes: 2 }, 0),
            (Side::Host, Header::C2hTerm { fes: 3 }, 0),
            (Side::Controller, Header::Command { sqe: [0x5a; 64] }, 1024),
            (Side::Controller, Header::Command { sqe: [0x5a; 64] }, 0),
            (Side::Host, Header::Response { cqe: [0x33; 16] }, 0),
            (Side::Controller, Header::H2cData(data), 512),
            (Side::Host, Header::C2hData(Data { success: true, ttag: 0, ..data }), 512),
            (Side::Host, Header::R2t { cid: 1, ttag: 2, offset: 3, len: 4 }, 0),
        ]
    }

    fn is_init(header: &Header) -> bool {
        matches!(header, Header::IcReq { .. } | Header::IcResp { .. })
    }

    #[test]
    fn every_header_survives_encode_and_decode() {
        for digests in ALL {
            for align in [1, 4, 64, 128] {
                for (side, header, data_len) in samples() {
                    let mut bytes = Vec::new();
                    encode(&mut bytes, &header, data_len, digests, align);
                    let head = decode(side, &bytes, digests, !is_init(&header)).unwrap().unwrap();
                    assert_eq!((head.header, head.data_len, head.data_at), (header, data_len, bytes.len()));
                    assert!(data_len == 0 || head.data_at.is_multiple_of(align));
                    for len in 0..bytes.len() {
                        assert_eq!(decode(side, &bytes[..len], digests, !is_init(&header)), Ok(None), "{len}");
                    }
                }
            }
        }
    }

    #[test]
    fn lengths_are_refused_before_anything_is_allocated() {
        for (side, header, data_len) in samples() {
            let mut bytes = Vec::new();
            encode(&mut bytes, &header, data_len, Digests::default(), 1);
            put(&mut bytes, 4, &u32::MAX.to_le_bytes());
            assert!(decode(side, &bytes[..8], Digests::default(), !is_init(&header)).is_err(), "{header:?}");
        }
    }

    #[test]
    fn each_side_refuses_the_pdus_that_it_sends() {
        for (side, header, data_len) in samples() {
            let other = if side == Side::Host { Side::Controller } else { Side::Host };
            let mut bytes = Vec::new();
            encode(&mut bytes, &header, data_len, Digests::default(), 1);
            let refused = decode(other, &bytes, Digests::default(), !is_init(&header)).unwrap_err();
            assert_eq!(refused, Fatal { fes: FatalStatus::InvalidHeader, fei: 0 });
        }
    }

    #[test]
    fn a_flipped_header_bit_fails_the_header_digest() {
        let digests = ALL[1];
        let mut bytes = Vec::new();
        encode(&mut bytes, &Header::Command { sqe: [1; 64] }, 0, digests, 1);
        bytes[20] ^= 1;
        assert_eq!(decode(Side::Controller, &bytes, digests, true).unwrap_err().fes, FatalStatus::HeaderDigest);
    }

    #[test]
    fn commands_before_icreq_and_a_second_icreq_are_sequence_errors() {
        for (header, initialized) in
            [(Header::Command { sqe: [0; 64] }, false), (Header::IcReq { pfv: 0, hpda: 0, digests: Digests::default(), max_r2t: 0 }, true)]
        {
            let mut bytes = Vec::new();
            encode(&mut bytes, &header, 0, Digests::default(), 1);
            let refused = decode(Side::Controller, &bytes, Digests::default(), initialized).unwrap_err();
            assert_eq!(refused.fes, FatalStatus::Sequence);
        }
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..256), kind in 0_u8..12, hlen in 0..3_usize) {
            let mut bytes = bytes;
            if bytes.len() > 2 {
                bytes[0] = kind;
                bytes[2] = [24, 72, 128][hlen];
            }
            for side in [Side::Host, Side::Controller] {
                for digests in ALL {
                    for initialized in [false, true] {
                        if let Ok(Some(head)) = decode(side, &bytes, digests, initialized) {
                            prop_assert!(head.data_len as u64 <= crate::nvme::MAX_TRANSFER && head.data_at <= bytes.len());
                        }
                    }
                }
            }
        }
    }
}
