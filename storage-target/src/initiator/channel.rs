//! One socket of an initiator: connecting, and PDUs out of what comes.

use crate::nvme::{Cqe, NvmeStatus, Sgl, Sqe, fabrics, opcode};
use crate::pdu::{self, Data, Digests, Head, Header, Side};
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

/// How long each step of connecting may take.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What breaks a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("socket")]
    Socket(#[from] io::Error),
    #[error("the target broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("{command}")]
    Refused {
        command: &'static str,
        #[source]
        status: NvmeStatus,
    },
    #[error("a command has to be tried again")]
    Retry(#[source] NvmeStatus),
    #[error("no answer to the keep alive")]
    Silent,
}

/// The Connect command of a queue with `entries` entries, counted from zero.
pub(crate) fn connect_entry(queue: u16, entries: u16, keep_alive: Duration) -> Sqe {
    let millis = u32::try_from(keep_alive.as_millis()).unwrap_or(u32::MAX);
    Sqe::new(opcode::FABRICS, 0, fabrics::CONNECT.into())
        .with(10, u32::from(queue) << 16)
        .with(11, u32::from(entries) | 1 << (16 + 2)) // CATTR: no SQ flow control
        .with(12, millis)
}

/// A stable host identifier: what the target compares, beside the NQN.
pub(crate) fn host_id(nqn: &str) -> [u8; 16] {
    let mut id = [0_u8; 16];
    for (index, byte) in nqn.bytes().enumerate() {
        if let Some(slot) = id.get_mut(index % 16) {
            *slot = slot.rotate_left(3) ^ byte;
        }
    }
    crate::bytes::put(&mut id, 0, &crc32c::crc32c(nqn.as_bytes()).to_le_bytes());
    id
}

/// A socket and the reading of PDUs from it; blocking while connecting.
pub(crate) struct Channel {
    pub stream: Arc<TcpStream>,
    pub digests: Digests,
    pub align: usize,
    pub max_h2c_data: usize,
    /// The start of a PDU whose rest has not come.
    input: Vec<u8>,
    incoming: Option<Incoming>,
}

impl Channel {
    pub fn open(address: SocketAddr, digests: Digests) -> Result<Self, LinkError> {
        let stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(CONNECT_TIMEOUT))?;
        stream.set_write_timeout(Some(CONNECT_TIMEOUT))?;
        let mut channel =
            Self { stream: Arc::new(stream), digests: Digests::default(), align: 4, max_h2c_data: 0, input: Vec::new(), incoming: None };
        let mut bytes = Vec::new();
        pdu::encode(&mut bytes, &Header::IcReq { pfv: 0, hpda: 0, digests, max_r2t: 0 }, 0, Digests::default(), 1);
        (&*channel.stream).write_all(&bytes)?;
        let mut answer = [0; 128];
        (&*channel.stream).read_exact(&mut answer)?;
        let head = pdu::decode(Side::Host, &answer, Digests::default(), false);
        let Ok(Some(Head { header: Header::IcResp { pfv: 0, cpda, digests: agreed, max_h2c_data }, .. })) = head else {
            return Err(LinkError::Protocol("no valid ICResp"));
        };
        if max_h2c_data < 4096 || cpda > 31 {
            return Err(LinkError::Protocol("ICResp with values that cannot be"));
        }
        channel.digests = Digests { header: digests.header && agreed.header, data: digests.data && agreed.data };
        channel.align = (usize::from(cpda) + 1) * 4;
        channel.max_h2c_data = crate::bytes::narrow(max_h2c_data.into());
        Ok(channel)
    }

    pub fn send(&mut self, sqe: &Sqe) -> io::Result<()> {
        let mut bytes = Vec::new();
        pdu::encode(&mut bytes, &Header::Command { sqe: sqe.0 }, 0, self.digests, self.align);
        (&*self.stream).write_all(&bytes)
    }

    /// Runs one command of connecting, with data in its capsule or `want` bytes of data in the answer.
    pub fn run(&mut self, name: &'static str, sqe: Sqe, data: &[u8], want: u32) -> Result<(Cqe, Vec<u8>), LinkError> {
        let len = crate::bytes::narrow32(data.len());
        let sgl = if want > 0 { Sgl::Transport { len: want } } else { Sgl::InCapsule { offset: 0, len } };
        let header = Header::Command { sqe: sqe.with_sgl(sgl).0 };
        let mut bytes = Vec::new();
        pdu::encode(&mut bytes, &header, data.len(), self.digests, self.align);
        bytes.extend_from_slice(data);
        if self.digests.data && !data.is_empty() {
            bytes.extend_from_slice(&crc32c::crc32c(data).to_le_bytes());
        }
        (&*self.stream).write_all(&bytes)?;
        let mut scratch = vec![0; 16 * 1024];
        let (mut answer, mut page) = (None, Vec::new());
        while answer.is_none() {
            let bytes = self.receive(&mut scratch)?;
            self.decode(bytes, |header, data| {
                match header {
                    Header::Response { cqe } => answer = Some(Cqe::decode(cqe)),
                    Header::C2hData(part) => {
                        page.extend_from_slice(data);
                        if part.success {
                            answer = Some(Cqe { dw0: 0, sq_head: 0, cid: part.cid, status: NvmeStatus::SUCCESS });
                        }
                    }
                    _ => return Err(LinkError::Protocol("a PDU out of place")),
                }
                Ok(())
            })?;
        }
        let cqe = answer.ok_or(LinkError::Protocol("no answer"))?;
        if cqe.status != NvmeStatus::SUCCESS {
            return Err(LinkError::Refused { command: name, status: cqe.status });
        }
        if page.len() < crate::bytes::narrow(want.into()) {
            return Err(LinkError::Protocol("an answer without its data"));
        }
        Ok((cqe, page))
    }

    /// Reads once; the bytes of the PDUs that are not complete yet stand in front.
    pub fn receive<'a>(&mut self, scratch: &'a mut [u8]) -> Result<&'a [u8], LinkError> {
        let have = self.input.len();
        if scratch.len() < have + 4096 {
            return Err(LinkError::Protocol("a PDU larger than was asked for"));
        }
        let count = match (&*self.stream).read(scratch.get_mut(have..).unwrap_or_default())? {
            0 => return Err(LinkError::Socket(io::ErrorKind::UnexpectedEof.into())),
            count => count,
        };
        if let Some(kept) = scratch.get_mut(..have) {
            kept.copy_from_slice(&self.input);
        }
        self.input.clear();
        Ok(scratch.get(..have + count).unwrap_or_default())
    }

    /// Hands every PDU on: headers when they are complete, data of C2HData as it comes.
    pub fn decode(&mut self, bytes: &[u8], mut handle: impl FnMut(&Header, &[u8]) -> Result<(), LinkError>) -> Result<(), LinkError> {
        let mut rest = bytes;
        loop {
            if let Some(incoming) = &mut self.incoming {
                rest = incoming.take(rest, &mut handle)?;
                if !incoming.is_complete() {
                    return Ok(());
                }
                self.incoming = None;
            }
            let head = pdu::decode(Side::Host, rest, self.digests, true);
            let Some(head) = head.map_err(|_| LinkError::Protocol("a PDU that cannot be"))? else { break };
            if let Header::C2hData(part) = head.header {
                self.incoming = Some(Incoming { part, done: 0, crc: 0, digest: head.data_digest.then(Vec::new) });
                rest = rest.get(head.data_at..).unwrap_or_default();
                continue;
            }
            let Some(after) = rest.get(head.data_at + head.data_len..) else { break };
            handle(&head.header, &[])?;
            rest = after;
        }
        self.input.extend_from_slice(rest);
        Ok(())
    }
}

/// A C2HData PDU whose data is coming in.
struct Incoming {
    part: Data,
    done: usize,
    crc: u32,
    /// Bytes of the digest that have come.
    digest: Option<Vec<u8>>,
}

impl Incoming {
    fn left(&self) -> usize {
        crate::bytes::narrow(self.part.len.into()) - self.done
    }

    fn is_complete(&self) -> bool {
        self.left() == 0 && self.digest.as_ref().is_none_or(|digest| digest.len() == 4)
    }

    /// Takes its bytes from the front and hands the data on; the last piece when the digest has been checked.
    fn take<'a>(
        &mut self,
        bytes: &'a [u8],
        handle: &mut impl FnMut(&Header, &[u8]) -> Result<(), LinkError>,
    ) -> Result<&'a [u8], LinkError> {
        let (data, mut rest) = bytes.split_at(self.left().min(bytes.len()));
        let mut part = self.part;
        part.offset = part.offset.saturating_add(crate::bytes::narrow32(self.done));
        part.success = part.success && self.digest.is_none() && data.len() == self.left();
        if !data.is_empty() {
            self.done += data.len();
            if self.digest.is_some() {
                self.crc = crc32c::crc32c_append(self.crc, data);
            }
            handle(&Header::C2hData(part), data)?;
        }
        let all = self.left() == 0;
        if let (true, Some(digest)) = (all, &mut self.digest) {
            let (bytes, after) = rest.split_at(rest.len().min(4 - digest.len()));
            digest.extend_from_slice(bytes);
            rest = after;
            if digest.len() == 4 {
                if self.crc.to_le_bytes() != digest.as_slice() {
                    return Err(LinkError::Protocol("data that does not fit its digest"));
                }
                let end = Data { offset: self.part.offset.saturating_add(self.part.len), ..self.part };
                handle(&Header::C2hData(end), &[])?;
            }
        }
        Ok(rest)
    }
}
