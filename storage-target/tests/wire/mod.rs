//! A host of NVMe/TCP that knows nothing of the crate's own code: bytes by the offsets of the standard, so that
//! a mistake in the crate's encoder cannot hide behind the same mistake in its decoder.
#![allow(dead_code)] // each test uses a part

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

pub const CID: u16 = 0x77;
pub const HOST: &str = "nqn.2026-11.cardinal:card:card-a";
pub const OTHER: &str = "nqn.2026-11.cardinal:card:card-b";
pub const DISCOVERY: &str = "nqn.2014-08.org.nvmexpress.discovery";

/// What the other side did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// A command ended: status without Do Not Retry, dword 0 and 1, data.
    End {
        status: u16,
        dw0: u64,
        data: Vec<u8>,
    },
    R2t {
        ttag: u16,
        offset: u32,
        len: u32,
    },
    Term {
        fes: u16,
        fei: u32,
    },
    IcResp(Vec<u8>),
    Closed,
    Silent,
}

/// A submission queue entry.
#[derive(Debug, Clone, Copy)]
pub struct Sqe(pub [u8; 64]);

impl Sqe {
    pub fn new(opcode: u8, nsid: u32) -> Self {
        Self([0; 64]).u8(0, opcode).u8(1, 0x40).u16(2, CID).u32(4, nsid)
    }

    pub fn fabrics(kind: u8) -> Self {
        Self::new(0x7f, 0).u8(4, kind)
    }

    pub fn u8(mut self, at: usize, value: u8) -> Self {
        self.0[at] = value;
        self
    }

    pub fn u16(mut self, at: usize, value: u16) -> Self {
        self.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
        self
    }

    pub fn u32(mut self, at: usize, value: u32) -> Self {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
        self
    }

    pub fn dword(self, dword: usize, value: u32) -> Self {
        self.u32(dword * 4, value)
    }

    pub fn lba(self, lba: u64, blocks: u32) -> Self {
        self.dword(10, lba as u32).dword(11, (lba >> 32) as u32).dword(12, blocks - 1)
    }

    /// A descriptor of data in the capsule.
    pub fn here(self, offset: u32, len: u32) -> Self {
        self.u32(24, offset).u32(32, len).u8(39, 0x01)
    }

    /// A descriptor of data that the transport moves.
    pub fn there(self, len: u32) -> Self {
        self.u32(32, len).u8(39, 0x5a)
    }
}

/// A PDU without digests; `plen` and all else may lie when it is changed afterwards.
pub fn pdu(kind: u8, flags: u8, specific: &[u8], data: &[u8]) -> Vec<u8> {
    let hlen = 8 + specific.len();
    let pdo = if data.is_empty() { 0 } else { hlen };
    let mut bytes = vec![kind, flags, hlen as u8, pdo as u8];
    bytes.extend_from_slice(&((hlen + data.len()) as u32).to_le_bytes());
    bytes.extend_from_slice(specific);
    bytes.extend_from_slice(data);
    bytes
}

pub fn icreq(pfv: u16, hpda: u8, digests: u8) -> Vec<u8> {
    let mut specific = vec![0; 120];
    specific[..2].copy_from_slice(&pfv.to_le_bytes());
    specific[2] = hpda;
    specific[3] = digests;
    pdu(0, 0, &specific, &[])
}

pub fn capsule(sqe: Sqe, data: &[u8]) -> Vec<u8> {
    pdu(4, 0, &sqe.0, data)
}

pub fn h2c_data(cid: u16, ttag: u16, offset: u32, data: &[u8], last: bool) -> Vec<u8> {
    let mut specific = Vec::new();
    specific.extend_from_slice(&cid.to_le_bytes());
    specific.extend_from_slice(&ttag.to_le_bytes());
    specific.extend_from_slice(&offset.to_le_bytes());
    specific.extend_from_slice(&(data.len() as u32).to_le_bytes());
    specific.extend_from_slice(&[0; 4]);
    pdu(6, if last { 4 } else { 0 }, &specific, data)
}

/// The data of a Connect command.
pub fn connect_data(controller: u16, subsystem: &str, host: &str) -> Vec<u8> {
    let mut data = vec![0; 1024];
    data[..16].copy_from_slice(&[7; 16]);
    data[16..18].copy_from_slice(&controller.to_le_bytes());
    data[256..256 + subsystem.len()].copy_from_slice(subsystem.as_bytes());
    data[512..512 + host.len()].copy_from_slice(host.as_bytes());
    data
}

pub fn connect_sqe(queue: u16, entries: u16, keep_alive_ms: u32) -> Sqe {
    // CATTR bit 2: no flow control of the submission queue.
    Sqe::fabrics(1).u16(42, queue).u16(44, entries).u8(46, 4).u32(48, keep_alive_ms).here(0, 1024)
}

pub fn property_set(offset: u32, value: u32) -> Sqe {
    Sqe::fabrics(0).dword(11, offset).dword(12, value)
}

pub fn property_get(offset: u32, wide: bool) -> Sqe {
    Sqe::fabrics(4).u8(40, wide.into()).dword(11, offset)
}

/// Bitwise CRC32C.
pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 != 0 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// A connection.
pub struct Raw {
    pub stream: TcpStream,
    /// Bit 0 header digests, bit 1 data digests.
    pub digests: u8,
}

impl Raw {
    pub fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        Self { stream, digests: 0 }
    }

    /// A connection after ICReq and ICResp.
    pub fn ready(address: SocketAddr, digests: u8) -> Self {
        let mut raw = Self::open(address);
        raw.send(&icreq(0, 0, digests));
        let Outcome::IcResp(answer) = raw.outcome() else { panic!("no ICResp") };
        assert_eq!(answer[3], digests, "the digests that were asked for");
        raw.digests = digests;
        raw
    }

    /// A connected admin queue, enabled.
    pub fn admin(address: SocketAddr, subsystem: &str, digests: u8) -> (Self, u16) {
        let mut raw = Self::ready(address, digests);
        let Outcome::End { status: 0, dw0, .. } = raw.run(connect_sqe(0, 31, 0), &connect_data(0xffff, subsystem, HOST)) else {
            panic!("no controller")
        };
        assert!(matches!(raw.run(property_set(0x14, 0x0046_0001), &[]), Outcome::End { status: 0, .. }));
        (raw, dw0 as u16)
    }

    /// A connected I/O queue, with its admin queue.
    pub fn io(address: SocketAddr, subsystem: &str, digests: u8) -> (Self, Self) {
        let (admin, controller) = Self::admin(address, subsystem, digests);
        let mut io = Self::ready(address, digests);
        let connected = io.run(connect_sqe(1, 127, 0), &connect_data(controller, subsystem, HOST));
        assert!(matches!(connected, Outcome::End { status: 0, .. }), "{connected:?}");
        (admin, io)
    }

    pub fn send(&mut self, bytes: &[u8]) {
        // A target that has closed already shows itself when read from.
        let _ = self.stream.write_all(bytes);
    }

    /// Sends a PDU with the digests of the connection.
    pub fn send_pdu(&mut self, bytes: &[u8]) {
        let hlen = usize::from(bytes[2]);
        let (header, data) = bytes.split_at(hlen);
        let mut out = header.to_vec();
        let mut plen = bytes.len();
        let header_digest = self.digests & 1 != 0 && bytes[0] > 3;
        let data_digest = self.digests & 2 != 0 && !data.is_empty();
        if header_digest {
            out[1] |= 1;
            plen += 4;
            if !data.is_empty() {
                out[3] += 4;
            }
        }
        if data_digest {
            out[1] |= 2;
            plen += 4;
        }
        out[4..8].copy_from_slice(&(plen as u32).to_le_bytes());
        if header_digest {
            let crc = crc32c(&out);
            out.extend_from_slice(&crc.to_le_bytes());
        }
        out.extend_from_slice(data);
        if data_digest {
            out.extend_from_slice(&crc32c(data).to_le_bytes());
        }
        self.send(&out);
    }

    pub fn run(&mut self, sqe: Sqe, data: &[u8]) -> Outcome {
        self.send_pdu(&capsule(sqe, data));
        self.outcome()
    }

    /// The next thing that the other side says, with the data of a read put together.
    pub fn outcome(&mut self) -> Outcome {
        let mut collected = Vec::new();
        loop {
            let mut common = [0; 8];
            match self.stream.read_exact(&mut common) {
                Ok(()) => {}
                Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                    return Outcome::Silent;
                }
                Err(_) => return Outcome::Closed,
            }
            let [kind, flags, hlen, pdo, ..] = common;
            let mut pdu = common.to_vec();
            pdu.resize(u32_at(&common, 4) as usize, 0);
            self.stream.read_exact(&mut pdu[8..]).unwrap();
            let with_digest = kind > 3;
            assert_eq!(flags & 1 != 0, with_digest && self.digests & 1 != 0, "header digest flag of {kind:#x}");
            let hlen = usize::from(hlen);
            if flags & 1 != 0 {
                assert_eq!(u32_at(&pdu, hlen), crc32c(&pdu[..hlen]), "header digest");
            }
            match kind {
                1 => return Outcome::IcResp(pdu[8..].to_vec()),
                3 => return Outcome::Term { fes: u16_at(&pdu, 8), fei: u32_at(&pdu, 10) },
                5 => {
                    let status = u16_at(&pdu, 8 + 14) >> 1 & 0x7ff;
                    let dw0 = u64::from(u32_at(&pdu, 8)) | u64::from(u32_at(&pdu, 12)) << 32;
                    return Outcome::End { status, dw0, data: collected };
                }
                7 => {
                    let len = u32_at(&pdu, 16) as usize;
                    let data = &pdu[usize::from(pdo)..][..len];
                    assert_eq!(u32_at(&pdu, 12) as usize, collected.len(), "data in order");
                    assert_eq!(flags & 2 != 0, self.digests & 2 != 0, "data digest flag");
                    if flags & 2 != 0 {
                        assert_eq!(u32_at(&pdu, usize::from(pdo) + len), crc32c(data), "data digest");
                    }
                    collected.extend_from_slice(data);
                    if flags & 8 != 0 {
                        assert!(flags & 4 != 0, "success comes with the last data");
                        return Outcome::End { status: 0, dw0: 0, data: collected };
                    }
                }
                9 => return Outcome::R2t { ttag: u16_at(&pdu, 10), offset: u32_at(&pdu, 12), len: u32_at(&pdu, 16) },
                _ => panic!("PDU type {kind:#x} from a controller"),
            }
        }
    }
}
