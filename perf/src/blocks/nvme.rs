//! The host's side of NVMe/TCP 1.0, as far as a load needs it.
//!
//! Written from the standard's tables and not with the target's code, so that it measures any target and a
//! mistake of ours cannot hide on both sides. Connecting blocks; queues are then driven by `load`.

use super::load::{Command, Output, Queue};
use anyhow::{Context as _, Result, bail};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);
const COMMAND_HLEN: usize = 72;
const SHORT_HLEN: usize = 24;
const FABRICS: u8 = 0x7f;

/// An association: the admin queue, and what the controller said about itself.
pub struct Host {
    address: SocketAddr,
    subsystem_nqn: String,
    host_nqn: String,
    digests: bool,
    controller: u16,
    blocks: u64,
    block_shift: u8,
    in_capsule: usize,
    /// MQES: entries of a queue, counted from zero.
    max_entries: u16,
    /// Kept open: with it goes the association.
    admin: Socket,
}

/// A socket after ICReq and ICResp.
struct Socket {
    stream: TcpStream,
    digests: bool,
    max_h2c_data: usize,
    /// Where data of capsules may begin: a multiple of this.
    align: usize,
}

impl Socket {
    fn open(address: SocketAddr, digests: bool) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE).with_context(|| address.to_string())?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut request = [0; 128];
        put(&mut request, 0, &[0x00, 0, 128, 0, 128]);
        put(&mut request, 11, &[if digests { 3 } else { 0 }]);
        (&stream).write_all(&request)?;
        let mut answer = [0; 128];
        (&stream).read_exact(&mut answer).context("no ICResp")?;
        if u8_at(&answer, 0) != 0x01 || u8_at(&answer, 2) != 128 {
            bail!("no ICResp but PDU type {:02x}h", u8_at(&answer, 0));
        }
        let agreed = u8_at(&answer, 11) & 3;
        if digests && agreed != 3 {
            bail!("the target does not do both digests");
        }
        let max_h2c_data = usize::try_from(u32_at(&answer, 12))?.max(4096);
        Ok(Self { stream, digests, max_h2c_data, align: (usize::from(u8_at(&answer, 10)) + 1) * 4 })
    }

    /// Runs one command of connecting; its dword 0 and data.
    fn run(&self, mut sqe: [u8; 64], data: &[u8], want: u32) -> Result<(u32, Vec<u8>)> {
        describe(&mut sqe, if want > 0 { want } else { u32::try_from(data.len())? }, want == 0);
        let mut bytes = Vec::new();
        command_head(&mut bytes, &sqe, data.len(), self.digests, self.align);
        bytes.extend_from_slice(data);
        if self.digests && !data.is_empty() {
            bytes.extend_from_slice(&crc32c::crc32c(data).to_le_bytes());
        }
        (&self.stream).write_all(&bytes)?;
        let mut page = Vec::new();
        loop {
            let mut common = [0; 8];
            (&self.stream).read_exact(&mut common).context("the target answers nothing")?;
            let mut pdu = common.to_vec();
            let plen = usize::try_from(u32_at(&common, 4))?;
            if !(SHORT_HLEN..=2 << 20).contains(&plen) {
                bail!("a PDU of {plen} bytes");
            }
            pdu.resize(plen, 0);
            (&self.stream).read_exact(pdu.get_mut(8..).unwrap_or_default())?;
            match u8_at(&pdu, 0) {
                0x05 => {
                    let status = u16_at(&pdu, 22) >> 1;
                    if status & 0x7ff != 0 {
                        bail!("the target refuses command {:02x}h with status {:03x}h", u8_at(&sqe, 0), status & 0x7ff);
                    }
                    return Ok((u32_at(&pdu, 8), page));
                }
                0x07 => {
                    let (at, len) = (usize::from(u8_at(&pdu, 3)), usize::try_from(u32_at(&pdu, 16))?);
                    page.extend_from_slice(pdu.get(at..at + len).context("a PDU shorter than its data")?);
                    if u8_at(&pdu, 1) & 8 != 0 {
                        return Ok((0, page));
                    }
                }
                kind => bail!("the target ends the connection with PDU type {kind:02x}h"),
            }
        }
    }
}

impl Host {
    /// Connects and enables a controller.
    pub fn connect(address: SocketAddr, subsystem_nqn: &str, host_nqn: &str, digests: bool) -> Result<Self> {
        let admin = Socket::open(address, digests)?;
        let mut host = Self {
            address,
            subsystem_nqn: subsystem_nqn.to_owned(),
            host_nqn: host_nqn.to_owned(),
            digests,
            controller: 0xffff,
            blocks: 0,
            block_shift: 9,
            in_capsule: 0,
            max_entries: 0,
            admin,
        };
        let (dw0, _) = host.admin.run(connect_entry(0, 31), &host.connect_data(), 0)?;
        host.controller = u16::try_from(dw0 & 0xffff)?;
        let mut capabilities = entry(FABRICS, 0);
        put(&mut capabilities, 4, &[0x04]);
        put(&mut capabilities, 40, &[1]);
        host.max_entries = u16::try_from(host.admin.run(capabilities, &[], 0).context("CAP")?.0 & 0xffff)?;
        let mut enable = entry(FABRICS, 0);
        put(&mut enable, 4, &[0x00]);
        put(&mut enable, 44, &0x14_u32.to_le_bytes());
        put(&mut enable, 48, &0x0046_0001_u32.to_le_bytes());
        host.admin.run(enable, &[], 0).context("enable")?;
        let mut status = entry(FABRICS, 0);
        put(&mut status, 4, &[0x04]);
        put(&mut status, 44, &0x1c_u32.to_le_bytes());
        while host.admin.run(status, &[], 0)?.0 & 1 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let identify = |cns: u8, nsid: u32| {
            let mut sqe = entry(0x06, nsid);
            put(&mut sqe, 40, &[cns]);
            sqe
        };
        let (_, controller) = host.admin.run(identify(1, 0), &[], 4096)?;
        host.in_capsule = (usize::try_from(u32_at(&controller, 1792))? * 16).saturating_sub(64);
        let (_, namespace) = host.admin.run(identify(0, 1), &[], 4096)?;
        let format = usize::from(u8_at(&namespace, 26) & 0xf);
        host.block_shift = u8_at(&namespace, 128 + 4 * format + 2).clamp(9, 16);
        host.blocks = u64::from_le_bytes(array_at(&namespace, 0));
        let mut queues = entry(0x09, 0);
        put(&mut queues, 40, &[0x07]);
        put(&mut queues, 44, &0x007f_007f_u32.to_le_bytes());
        host.admin.run(queues, &[], 0).context("number of queues")?;
        Ok(host)
    }

    /// Bytes of namespace 1.
    pub fn size_bytes(&self) -> u64 {
        self.blocks << self.block_shift
    }

    /// Connects an I/O queue that may have `depth` commands under way.
    pub fn queue(&mut self, id: u16, depth: u16) -> Result<IoQueue> {
        let socket = Socket::open(self.address, self.digests)?;
        // A full ring has one entry less than it has room for.
        let entries = depth.max(8).min(self.max_entries);
        if depth > entries {
            bail!("--depth is at most {entries} on a queue of this target");
        }
        socket.run(connect_entry(id, entries), &self.connect_data(), 0).with_context(|| format!("I/O queue {id}"))?;
        let in_capsule = self.in_capsule;
        Ok(IoQueue {
            socket,
            in_capsule,
            block_shift: self.block_shift,
            data: None,
            writes: vec![0; usize::from(depth)],
            digests: None,
            head: Vec::new(),
        })
    }

    fn connect_data(&self) -> Vec<u8> {
        let mut data = vec![0; 1024];
        put(&mut data, 0, b"cardinal perf 01");
        put(&mut data, 16, &self.controller.to_le_bytes());
        put(&mut data, 256, self.subsystem_nqn.as_bytes());
        put(&mut data, 512, self.host_nqn.as_bytes());
        data
    }
}

/// An I/O queue.
pub struct IoQueue {
    socket: Socket,
    in_capsule: usize,
    block_shift: u8,
    /// Data that is coming in.
    data: Option<Incoming>,
    /// Bytes of the write in each slot, for its R2T.
    writes: Vec<u32>,
    /// Digest of the shared data, by length.
    digests: Option<(usize, u32)>,
    /// The head of the command being encoded.
    head: Vec<u8>,
}

struct Incoming {
    cid: u16,
    /// Bytes of data still to come.
    left: usize,
    crc: u32,
    digest: bool,
    /// The command ends with it.
    ends: bool,
}

impl Queue for IoQueue {
    fn stream(&self) -> &TcpStream {
        &self.socket.stream
    }

    fn encode(&mut self, command: Command, output: &mut Output) {
        let mut sqe = entry(if command.is_read { 0x02 } else { 0x01 }, 1);
        put(&mut sqe, 2, &command.slot.to_le_bytes());
        put(&mut sqe, 40, &(command.offset >> self.block_shift).to_le_bytes());
        put(&mut sqe, 48, &((command.len >> self.block_shift).saturating_sub(1)).to_le_bytes());
        let len = usize::try_from(command.len).unwrap_or(usize::MAX);
        let here = !command.is_read && len <= self.in_capsule;
        describe(&mut sqe, command.len, here);
        if let Some(write) = self.writes.get_mut(usize::from(command.slot)) {
            *write = if command.is_read { 0 } else { command.len };
        }
        self.head.clear();
        command_head(&mut self.head, &sqe, if here { len } else { 0 }, self.socket.digests, self.socket.align);
        output.head(&self.head);
        if here {
            self.push_data(len, output);
        }
    }

    fn decode(&mut self, bytes: &[u8], output: &mut Output, done: &mut dyn FnMut(u16, bool)) -> Result<usize> {
        let mut rest = bytes;
        loop {
            if let Some(data) = &mut self.data {
                let (part, after) = rest.split_at(data.left.min(rest.len()));
                if data.digest {
                    data.crc = crc32c::crc32c_append(data.crc, part);
                }
                data.left -= part.len();
                rest = after;
                if data.left > 0 {
                    break;
                }
                let mut good = true;
                if data.digest {
                    let Some((digest, after)) = rest.split_first_chunk::<4>() else { break };
                    good = data.crc.to_le_bytes() == *digest;
                    rest = after;
                }
                if data.ends {
                    done(data.cid, good);
                } else if !good {
                    bail!("data that does not fit its digest");
                }
                self.data = None;
            }
            let Some(header) = rest.first_chunk::<SHORT_HLEN>() else { break };
            let digest = if self.socket.digests { 4 } else { 0 };
            let plen = usize::try_from(u32_at(header, 4))?;
            match u8_at(header, 0) {
                0x05 => {
                    let Some(after) = rest.get(SHORT_HLEN + digest..) else { break };
                    rest = after;
                    done(u16_at(header, 20), u16_at(header, 22) >> 1 == 0);
                }
                0x07 => {
                    let at = usize::from(u8_at(header, 3));
                    let Some(after) = rest.get(at..) else { break };
                    rest = after;
                    let left = usize::try_from(u32_at(header, 16))?;
                    if at < SHORT_HLEN || at + left > plen {
                        bail!("a C2HData PDU whose data leaves it");
                    }
                    let digest = u8_at(header, 1) & 2 != 0;
                    self.data = Some(Incoming { cid: u16_at(header, 8), left, crc: 0, digest, ends: u8_at(header, 1) & 8 != 0 });
                }
                0x09 => {
                    let Some(after) = rest.get(SHORT_HLEN + digest..) else { break };
                    rest = after;
                    self.answer_r2t(header, output)?;
                }
                kind => bail!("the target ends the connection with PDU type {kind:02x}h"),
            }
        }
        Ok(bytes.len() - rest.len())
    }
}

impl IoQueue {
    fn push_data(&mut self, len: usize, output: &mut Output) {
        output.data(len);
        if self.socket.digests {
            let digest = match self.digests {
                Some((known, digest)) if known == len => digest,
                _ => crc32c::crc32c(output.shared(len)),
            };
            self.digests = Some((len, digest));
            output.head(&digest.to_le_bytes());
        }
    }

    /// Sends the data that an R2T asks for, in PDUs as large as the target takes.
    fn answer_r2t(&mut self, header: &[u8; SHORT_HLEN], output: &mut Output) -> Result<()> {
        let (cid, tag) = (u16_at(header, 8), u16_at(header, 10));
        let (mut at, len) = (u32_at(header, 12), u32_at(header, 16));
        let end = at.checked_add(len).context("an R2T that ends nowhere")?;
        if len == 0 || self.writes.get(usize::from(cid)).is_none_or(|write| end > *write) {
            bail!("an R2T for data that no write has");
        }
        while at < end {
            let part = (end - at).min(u32::try_from(self.socket.max_h2c_data).unwrap_or(u32::MAX));
            let len = usize::try_from(part)?;
            let digest = if self.socket.digests { 4 } else { 0 };
            let pdo = (SHORT_HLEN + digest).next_multiple_of(self.socket.align);
            let mut head = [0; SHORT_HLEN];
            let flags = if at + part == end { 4 } else { 0 } | if digest > 0 { 3 } else { 0 };
            put(&mut head, 0, &[0x06, flags, 24, u8::try_from(pdo)?]);
            put(&mut head, 4, &u32::try_from(pdo + len + digest)?.to_le_bytes());
            put(&mut head, 8, &cid.to_le_bytes());
            put(&mut head, 10, &tag.to_le_bytes());
            put(&mut head, 12, &at.to_le_bytes());
            put(&mut head, 16, &part.to_le_bytes());
            output.head(&head);
            if digest > 0 {
                output.head(&crc32c::crc32c(&head).to_le_bytes());
            }
            output.head([0_u8; 128].get(..pdo - SHORT_HLEN - digest).unwrap_or_default());
            self.push_data(len, output);
            at += part;
        }
        Ok(())
    }
}

/// Appends the head of a command capsule.
fn command_head(out: &mut Vec<u8>, sqe: &[u8; 64], data_len: usize, digests: bool, align: usize) {
    let digest = if digests { 4 } else { 0 };
    let head = COMMAND_HLEN + digest;
    let has_data = data_len > 0;
    let pdo = if has_data { head.next_multiple_of(align) } else { 0 };
    let plen = if has_data { pdo + data_len + digest } else { head };
    let flags = if digests { 1 } else { 0 } | if digests && has_data { 2 } else { 0 };
    let start = out.len();
    out.extend_from_slice(&[0x04, flags, 72, u8::try_from(pdo).unwrap_or(u8::MAX)]);
    out.extend_from_slice(&u32::try_from(plen).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(sqe);
    if digests {
        let crc = crc32c::crc32c(out.get(start..).unwrap_or_default());
        out.extend_from_slice(&crc.to_le_bytes());
    }
    out.resize(start + head.max(pdo), 0);
}

fn entry(opcode: u8, nsid: u32) -> [u8; 64] {
    let mut sqe = [0; 64];
    put(&mut sqe, 0, &[opcode, 0x40]);
    put(&mut sqe, 4, &nsid.to_le_bytes());
    sqe
}

/// Connect of a queue with `entries` entries, counted from zero, without flow control and keep alive.
fn connect_entry(queue: u16, entries: u16) -> [u8; 64] {
    let mut sqe = entry(FABRICS, 0);
    put(&mut sqe, 4, &[0x01]);
    put(&mut sqe, 42, &queue.to_le_bytes());
    put(&mut sqe, 44, &entries.to_le_bytes());
    put(&mut sqe, 46, &[1 << 2]);
    sqe
}

/// Puts the data descriptor: in the capsule, or moved by the transport.
fn describe(sqe: &mut [u8; 64], len: u32, here: bool) {
    put(sqe, 32, &len.to_le_bytes());
    put(sqe, 39, &[if here { 0x01 } else { 0x5a }]);
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(slot) = bytes.get_mut(at..at + value.len()) {
        slot.copy_from_slice(value);
    }
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
}

fn u8_at(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}
