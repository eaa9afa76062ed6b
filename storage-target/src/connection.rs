//! One TCP connection to a host, from bytes to commands and back: NVMe/TCP 1.0, sections 3.2 to 3.5.
//!
//! ```text
//! Initial --ICReq/ICResp--> Open --broken PDU: C2HTermReq--> Closing
//! ```
//!
//! A turn reads once, decodes every PDU that came, and later writes all answers at once. Data of H2CData PDUs
//! is received straight into its command's buffer. A command takes its buffer when it is admitted: one
//! connection holds at most [`HELD_BYTES`] of read and write data, the rest of its commands wait in order.
//!
//! Where the volume keeps its blocks in memory, no buffer is needed. Data of a capsule stays where it was received
//! until its command is executed, which has to be before the next receive; a read's answer *lends* the volume's own
//! bytes to the socket. What the socket did not take at once may stay lent until the volume is about to change;
//! then [`Connection::settle`] copies it, so that no block is sent half old and half new.
//!
//! The connection knows nothing of volumes: a command whose data is complete becomes *ready*, and whoever owns
//! the connection executes it and answers by its slot. The slot is also the transfer tag of its R2T.

mod output;

use crate::buffers::Buffers;
use crate::controller::{self, Queue};
use crate::counters::{Counting, count};
use crate::nvme::{Cqe, NvmeStatus, Sgl, Sqe};
use crate::pdu::{self, Data, Digests, Fatal, FatalStatus, Head, Header, MAX_H2C_DATA, Side};
use crate::ram::Ram;
use output::Piece;
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::time::Duration;

/// Data that one connection may hold in buffers, in bytes.
const HELD_BYTES: usize = 8 << 20;
/// The most pieces of one writev.
const PIECES: usize = 256;
/// How long a host has to close after C2HTermReq.
const CLOSING: Duration = Duration::from_secs(1);
/// Sent heads are dropped when they have grown to this many bytes.
const HEADS_KEPT: usize = 64 * 1024;

/// What became of a read from the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// The connection goes on, and something came.
    Open,
    /// Nothing was there to read.
    Nothing,
    /// The host is gone, or the connection is broken.
    Closed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Initial,
    Open,
    /// `said`: the last word is with the socket, and so is the end.
    Closing {
        until: Duration,
        said: bool,
    },
}

/// Which way a command's data goes, and how much of it there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transfer {
    None,
    ToController(usize),
    ToHost(usize),
}

/// A command from its capsule to its answer.
#[derive(Debug)]
pub(crate) struct Command {
    pub sqe: Sqe,
    /// Data from the host, or the buffer for data to it.
    pub buffer: Vec<u8>,
    /// Bytes of data.
    pub len: usize,
    /// Where its data is among the bytes received last, while it is not in `buffer`.
    pub inline: Range<usize>,
    /// Requests to the volume that are still under way.
    pub parts: usize,
    /// The first error of its requests.
    pub error: Option<NvmeStatus>,
    /// When it became ready.
    pub since: Duration,
    received: usize,
    held: usize,
    state: CommandState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CommandState {
    /// Waits until the connection may hold its data.
    Waiting {
        reads: bool,
    },
    /// R2T was sent.
    Transferring,
    Ready,
}

/// An H2CData PDU whose data is coming in.
#[derive(Debug)]
struct Receiving {
    slot: usize,
    /// Bytes of the PDU's data still to come.
    remaining: usize,
    /// Where they go in the command's buffer.
    at: usize,
    /// Where the PDU's data began, for its digest.
    start: usize,
    /// Bytes of the digest that have come.
    digest: Option<Vec<u8>>,
}

/// The connection.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    state: State,
    /// Set by Connect.
    pub queue: Option<Queue>,
    /// When it was taken in.
    pub since: Duration,
    /// Nothing more is read or answered; it only waits for its requests to end.
    pub dead: bool,
    /// Requests of it that are with the volume.
    pub executing: usize,
    /// Output waits until the socket takes more.
    pub waits_for_room: bool,
    digests: Digests,
    align: usize,
    /// The start of a PDU whose rest has not come.
    input: Vec<u8>,
    receiving: Option<Receiving>,
    commands: slab::Slab<Command>,
    cids: Box<[u64; 1024]>,
    ready: VecDeque<usize>,
    waiting: VecDeque<usize>,
    held: usize,
    heads: Vec<u8>,
    heads_base: usize,
    pieces: VecDeque<Piece>,
    /// How many of the pieces are lent.
    lent: usize,
    /// Where the PDU that is being handled began, among the bytes received last.
    pdu_at: usize,
    /// Bytes of the first piece that were sent.
    sent: usize,
}

impl Connection {
    /// Takes a connected socket in; it becomes non-blocking.
    pub fn new(stream: TcpStream, now: Duration) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            state: State::Initial,
            queue: None,
            since: now,
            dead: false,
            executing: 0,
            waits_for_room: false,
            digests: Digests::default(),
            align: 4,
            input: Vec::new(),
            receiving: None,
            commands: slab::Slab::new(),
            cids: Box::new([0; 1024]),
            ready: VecDeque::new(),
            waiting: VecDeque::new(),
            held: 0,
            heads: Vec::new(),
            heads_base: 0,
            pieces: VecDeque::new(),
            lent: 0,
            pdu_at: 0,
            sent: 0,
        })
    }

    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Reads once and decodes all that came.
    pub fn receive(&mut self, scratch: &mut [u8], buffers: &mut Buffers, counting: &Counting, now: Duration) -> Received {
        let have = self.input.len();
        let Some((kept, free)) = scratch.split_at_mut_checked(have) else { return Received::Closed };
        kept.copy_from_slice(&self.input);
        let direct = self.receiving.as_mut().and_then(|receiving| {
            let buffer = &mut self.commands.get_mut(receiving.slot)?.buffer;
            buffer.get_mut(receiving.at..receiving.at + receiving.remaining)
        });
        let result = match direct {
            Some(direct) if !direct.is_empty() => {
                let len = direct.len();
                let mut into = [IoSliceMut::new(direct), IoSliceMut::new(free)];
                self.stream.read_vectored(&mut into).map(|count| (count.min(len), count.saturating_sub(len), count))
            }
            _ => self.stream.read(free).map(|count| (0, count, count)),
        };
        let (direct, buffered) = match result {
            Ok((_, _, 0)) => return Received::Closed,
            Ok((direct, buffered, _)) => (direct, buffered),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Received::Nothing;
            }
            Err(_) => return Received::Closed,
        };
        if matches!(self.state, State::Closing { .. }) {
            return Received::Open; // what comes after a broken PDU is thrown away
        }
        if let Some(receiving) = &mut self.receiving {
            receiving.at += direct;
            receiving.remaining -= direct.min(receiving.remaining);
        }
        self.input.clear();
        let bytes = scratch.get(..have + buffered).unwrap_or_default();
        self.decode(bytes, buffers, counting, now)
    }

    fn decode(&mut self, bytes: &[u8], buffers: &mut Buffers, counting: &Counting, now: Duration) -> Received {
        let mut rest = bytes;
        loop {
            rest = self.receive_data(rest, counting, now);
            if self.receiving.is_some() {
                return Received::Open;
            }
            let step = pdu::decode(Side::Controller, rest, self.digests, self.state == State::Open);
            let head = match step {
                Ok(Some(head)) => head,
                Ok(None) => break,
                Err(fatal) => {
                    self.terminate(fatal, rest, counting, now);
                    return Received::Open;
                }
            };
            self.pdu_at = bytes.len() - rest.len();
            match self.handle(&head, rest, buffers, counting, now) {
                Ok(Some(used)) => rest = rest.get(used..).unwrap_or_default(),
                Ok(None) => break,
                Err(None) => return Received::Closed,
                Err(Some(fatal)) => {
                    self.terminate(fatal, rest, counting, now);
                    return Received::Open;
                }
            }
        }
        self.input.extend_from_slice(rest);
        Received::Open
    }

    /// Handles one PDU; how many bytes of `bytes` it took, or `None` to wait for more.
    ///
    /// `Err(None)` closes the connection without a word: the host has ended it.
    fn handle(
        &mut self,
        head: &Head,
        bytes: &[u8],
        buffers: &mut Buffers,
        counting: &Counting,
        now: Duration,
    ) -> Result<Option<usize>, Option<Fatal>> {
        let fatal = |fes, fei| Err(Some(Fatal { fes, fei }));
        match head.header {
            Header::IcReq { pfv, hpda, digests, .. } => {
                if pfv != 0 {
                    return fatal(FatalStatus::Unsupported, 8);
                }
                if hpda > 31 {
                    return fatal(FatalStatus::InvalidHeader, 10);
                }
                let answer = Header::IcResp { pfv: 0, cpda: 0, digests, max_h2c_data: MAX_H2C_DATA };
                self.push_head(&answer, 0);
                self.state = State::Open;
                self.digests = digests;
                self.align = (usize::from(hpda) + 1) * 4;
                Ok(Some(head.data_at))
            }
            Header::H2cTerm { fes } => {
                tracing::debug!(fes, "the host ended the connection");
                Err(None)
            }
            Header::Command { sqe } => {
                let data_end = head.data_at + head.data_len;
                let end = data_end + if head.data_digest { 4 } else { 0 };
                let (Some(data), Some(_)) = (bytes.get(head.data_at..data_end), bytes.get(..end)) else { return Ok(None) };
                let intact = !head.data_digest || crc32c::crc32c(data) == crate::bytes::u32_at(bytes, data_end);
                self.command(Sqe(sqe), (head.data_at, data), intact, buffers, counting, now).map_err(Some)?;
                Ok(Some(end))
            }
            Header::H2cData(data) => {
                self.data_begin(data, head.data_digest).map_err(Some)?;
                Ok(Some(head.data_at))
            }
            _ => fatal(FatalStatus::InvalidHeader, 0),
        }
    }

    fn command(
        &mut self,
        sqe: Sqe,
        (data_at, data): (usize, &[u8]),
        intact: bool,
        buffers: &mut Buffers,
        counting: &Counting,
        now: Duration,
    ) -> Result<(), Fatal> {
        if let Some(queue) = &mut self.queue {
            queue.advance();
        }
        // A host that has more commands under way than its queue has entries has lost count of them.
        let depth = self.queue.as_ref().map_or(1, |queue| usize::from(queue.size));
        if self.commands.len() >= depth {
            return Err(Fatal { fes: FatalStatus::Sequence, fei: 0 });
        }
        if !self.cid_take(sqe.cid()) {
            self.push_response(sqe.cid(), NvmeStatus::ID_CONFLICT.dnr(), 0);
            return Ok(());
        }
        let slot = self.commands.insert(Command {
            sqe,
            buffer: Vec::new(),
            inline: 0..0,
            len: 0,
            parts: 0,
            error: None,
            since: now,
            received: 0,
            held: 0,
            state: CommandState::Ready,
        });
        if !intact {
            count(&counting.data_digest_errors, 1);
            let _ = self.respond(slot, NvmeStatus::TRANSIENT_TRANSPORT, 0);
            return Ok(());
        }
        match self.data_of(&sqe, data.len()) {
            Err(status) => drop(self.respond(slot, status.dnr(), 0)),
            Ok(Placement::None) => self.ready.push_back(slot),
            Ok(Placement::Here(range)) => {
                let in_place = self.is_in_place();
                if let Some(command) = self.commands.get_mut(slot) {
                    command.len = range.len();
                    if in_place {
                        let at = self.pdu_at + data_at;
                        command.inline = at + range.start..at + range.end;
                    } else {
                        command.buffer = buffers.take(range.len());
                        crate::bytes::put(&mut command.buffer, 0, data.get(range).unwrap_or_default());
                    }
                }
                self.ready.push_back(slot);
            }
            Ok(Placement::Later { len, reads: true }) if self.is_in_place() => {
                if let Some(command) = self.commands.get_mut(slot) {
                    command.len = len;
                }
                self.ready.push_back(slot);
            }
            Ok(Placement::Later { len, reads }) => {
                if let Some(command) = self.commands.get_mut(slot) {
                    command.len = len;
                    command.state = CommandState::Waiting { reads };
                }
                self.waiting.push_back(slot);
                self.admit(buffers);
            }
        }
        Ok(())
    }

    /// Whether data goes straight between the socket and the volume. Digests are made of what cannot change
    /// any more, so with them it does not.
    pub fn is_in_place(&self) -> bool {
        !self.digests.data && self.queue.as_ref().is_some_and(|queue| queue.in_place && queue.id > 0)
    }

    /// Where the command's data is, checked against what the command moves.
    fn data_of(&self, sqe: &Sqe, in_capsule: usize) -> Result<Placement, NvmeStatus> {
        let transfer = controller::transfer(self.queue.as_ref(), sqe)?;
        match (transfer, sqe.sgl()) {
            (Transfer::None, _) => Ok(Placement::None),
            (_, Sgl::Other) => Err(NvmeStatus::SGL_TYPE),
            (Transfer::ToController(len), Sgl::InCapsule { offset, len: given }) => {
                let start = usize::try_from(offset).map_err(|_| NvmeStatus::SGL_OFFSET)?;
                let given = usize::try_from(given).unwrap_or(usize::MAX);
                if given < len {
                    return Err(NvmeStatus::SGL_LENGTH);
                }
                let end = start.checked_add(len).ok_or(NvmeStatus::SGL_OFFSET)?;
                if end <= in_capsule { Ok(Placement::Here(start..end)) } else { Err(NvmeStatus::SGL_OFFSET) }
            }
            (Transfer::ToHost(_), Sgl::InCapsule { .. }) => Err(NvmeStatus::SGL_TYPE),
            (Transfer::ToController(len) | Transfer::ToHost(len), Sgl::Transport { len: given }) => {
                let given = usize::try_from(given).unwrap_or(usize::MAX);
                // An I/O command's descriptor says exactly what the command moves.
                let exact = self.queue.as_ref().is_some_and(|queue| queue.id > 0);
                if given < len || (exact && given != len) {
                    return Err(NvmeStatus::SGL_LENGTH);
                }
                Ok(Placement::Later { len, reads: matches!(transfer, Transfer::ToHost(_)) })
            }
        }
    }

    /// Gives buffers to waiting commands, in order, as far as the connection may hold them.
    fn admit(&mut self, buffers: &mut Buffers) {
        while let Some(slot) = self.waiting.front().copied() {
            let Some(command) = self.commands.get_mut(slot) else {
                self.waiting.pop_front();
                continue;
            };
            if self.held > 0 && self.held + command.len > HELD_BYTES {
                return;
            }
            self.waiting.pop_front();
            self.held += command.len;
            command.held = command.len;
            command.buffer = buffers.take(command.len);
            if command.state == (CommandState::Waiting { reads: true }) {
                command.state = CommandState::Ready;
                self.ready.push_back(slot);
                continue;
            }
            command.state = CommandState::Transferring;
            let (cid, len) = (command.sqe.cid(), crate::bytes::narrow32(command.len));
            let ttag = u16::try_from(slot).unwrap_or(u16::MAX);
            self.push_head(&Header::R2t { cid, ttag, offset: 0, len }, 0);
        }
    }

    fn data_begin(&mut self, data: Data, digest: bool) -> Result<(), Fatal> {
        let slot = usize::from(data.ttag);
        let command = self.commands.get_mut(slot).filter(|command| command.state == CommandState::Transferring);
        let Some(command) = command else { return Err(Fatal { fes: FatalStatus::InvalidHeader, fei: 10 }) };
        if command.sqe.cid() != data.cid {
            return Err(Fatal { fes: FatalStatus::InvalidHeader, fei: 8 });
        }
        let len = usize::try_from(data.len).unwrap_or(usize::MAX);
        if usize::try_from(data.offset) != Ok(command.received) {
            return Err(Fatal { fes: FatalStatus::DataRange, fei: 12 });
        }
        if len == 0 || len > command.len - command.received {
            return Err(Fatal { fes: FatalStatus::DataRange, fei: 16 });
        }
        // One R2T asks for all of a command's data, so the last PDU of both is the same.
        if data.last != (len == command.len - command.received) {
            return Err(Fatal { fes: FatalStatus::InvalidHeader, fei: 1 });
        }
        self.receiving =
            Some(Receiving { slot, remaining: len, at: command.received, start: command.received, digest: digest.then(Vec::new) });
        Ok(())
    }

    /// Moves data of the PDU under way out of `bytes`; what is left of them.
    fn receive_data<'a>(&mut self, bytes: &'a [u8], counting: &Counting, now: Duration) -> &'a [u8] {
        let Some(receiving) = &mut self.receiving else { return bytes };
        let Some(command) = self.commands.get_mut(receiving.slot) else {
            self.receiving = None;
            return bytes;
        };
        let (data, mut rest) = bytes.split_at(receiving.remaining.min(bytes.len()));
        crate::bytes::put(&mut command.buffer, receiving.at, data);
        receiving.at += data.len();
        receiving.remaining -= data.len();
        if receiving.remaining > 0 {
            return rest;
        }
        if let Some(digest) = &mut receiving.digest {
            let (part, after) = rest.split_at(rest.len().min(4 - digest.len()));
            digest.extend_from_slice(part);
            rest = after;
            if digest.len() < 4 {
                return rest;
            }
            let data = command.buffer.get(receiving.start..receiving.at).unwrap_or_default();
            if crc32c::crc32c(data).to_le_bytes() != digest.as_slice() {
                count(&counting.data_digest_errors, 1);
                command.error = Some(NvmeStatus::TRANSIENT_TRANSPORT);
            }
        }
        command.received = receiving.at;
        let slot = receiving.slot;
        self.receiving = None;
        if command.received == command.len {
            command.state = CommandState::Ready;
            command.since = now;
            match command.error {
                Some(status) => drop(self.respond(slot, status, 0)),
                None => self.ready.push_back(slot),
            }
        }
        rest
    }

    /// Gives a command a buffer of its own: with the data that it has among the bytes received last, or for
    /// the data that it reads.
    pub fn own(&mut self, slot: usize, received: &[u8], buffers: &mut Buffers) {
        let Some(command) = self.commands.get_mut(slot) else { return };
        let inline = std::mem::take(&mut command.inline);
        if command.buffer.len() < command.len {
            command.buffer = buffers.take(command.len);
            if let Some(data) = received.get(inline) {
                crate::bytes::put(&mut command.buffer, 0, data);
            }
        }
    }

    /// The next command whose data is complete.
    pub fn next_ready(&mut self) -> Option<usize> {
        self.ready.pop_front()
    }

    /// Whether a command's data is complete and it was not taken yet.
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// A command by its slot.
    pub fn command_mut(&mut self, slot: usize) -> Option<&mut Command> {
        self.commands.get_mut(slot)
    }

    /// Answers a command without data; gives its buffer back.
    pub fn respond(&mut self, slot: usize, status: NvmeStatus, dw0: u64) -> Vec<u8> {
        let Some(command) = self.commands.try_remove(slot) else { return Vec::new() };
        self.cid_give(command.sqe.cid());
        self.held -= command.held.min(self.held);
        if self.answers() {
            self.push_response(command.sqe.cid(), status, dw0);
        }
        command.buffer
    }

    /// Whether anybody listens: not after C2HTermReq, nor after a cut.
    fn answers(&self) -> bool {
        self.state == State::Open && !self.dead
    }

    /// Ends the connection because of a PDU that cannot be.
    fn terminate(&mut self, fatal: Fatal, refused: &[u8], counting: &Counting, now: Duration) {
        count(&counting.protocol_errors, 1);
        tracing::debug!(?fatal, "a PDU broke the protocol");
        self.push_bytes(|heads| pdu::encode_term(heads, Side::Controller, fatal, refused));
        self.close_soon(now);
        self.ready.clear();
        self.waiting.clear();
        self.receiving = None;
        self.input.clear();
    }

    /// Lets the host read the last answer and close.
    pub fn close_soon(&mut self, now: Duration) {
        self.state = State::Closing { until: now + CLOSING, said: false };
    }

    /// Whether a connection that sent C2HTermReq has been given long enough.
    pub fn is_over(&self, now: Duration) -> bool {
        matches!(self.state, State::Closing { until, .. } if until <= now)
    }

    fn cid_take(&mut self, cid: u16) -> bool {
        let Some(word) = self.cids.get_mut(usize::from(cid / 64)) else { return false };
        let bit = 1 << (cid % 64);
        let free = *word & bit == 0;
        *word |= bit;
        free
    }

    fn cid_give(&mut self, cid: u16) {
        if let Some(word) = self.cids.get_mut(usize::from(cid / 64)) {
            *word &= !(1 << (cid % 64));
        }
    }
}

enum Placement {
    None,
    /// A range of the capsule's data.
    Here(Range<usize>),
    Later {
        len: usize,
        reads: bool,
    },
}
