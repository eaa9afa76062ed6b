//! The mailbox: how a card and the thin host under it talk, without a network.
//!
//! It stands for a PCIe management function of the card: two rings in memory
//! that both sides map, and a doorbell each way. The card listens on a socket
//! in the folder that stands for the slot; the host connects and gets the
//! memory as a file descriptor. From then on the socket carries doorbells: a
//! byte says "look at your ring". (Not eventfds: their O_NONBLOCK belongs to
//! both processes, so a hostile peer could make the other's doorbell block.)
//!
//! Memory, in words of 8 bytes, little-endian; ring 0 goes from card to host,
//! ring 1 from host to card:
//!
//! ```text
//! ring:   | head .. (8 words) | tail .. (504 words) | RING_WORDS words of frames |
//! frame:  | magic (32) | version (8) | flags (8) | reserved (16) |
//!         | length (32) | sequence, low half (32) |
//!         | sequence, high half (32) | crc32c (32) |
//!         | body: a protobuf message of `length` bytes, padded to a word |
//! ```
//!
//! Head and tail count words since the link began and never wrap in practice;
//! the producer owns head, the consumer owns tail. The checksum covers the
//! header, with a zero checksum, and the body.
//!
//! Invariants:
//! - A side keeps its own index in private memory and checks the other's
//!   against it; nothing read from shared memory is used twice.
//! - The first broken rule (index, magic, length, sequence, checksum, message,
//!   more doorbells than frames) ends the link. There is no resynchronisation:
//!   the host connects again, and the card tells it everything again.
//! - A peer that dies is seen at once, as the end of the socket; what it had
//!   sent before is still delivered.

mod memory;

use memory::Memory;
use prost::Message;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Largest body of a frame.
pub const BODY_MAX: usize = 64 * 1024;
/// Bytes of frames that one ring holds.
pub const RING_BYTES: usize = 1024 * 1024;

const RING_WORDS: usize = RING_BYTES / 8;
/// A page in front of each ring: head at its start, tail on another cache line.
const INDEX_WORDS: usize = 512;
const TAIL: usize = 8;
const LINK_WORDS: usize = 2 * (INDEX_WORDS + RING_WORDS);

const MAGIC: u32 = 0x4d42_4f58;
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 24;
/// What the card says beside the memory when a host connects.
const GREETING: [u8; 8] = *b"mailbox1";

/// How long a send waits for a peer that does not empty its ring.
const SEND_PATIENCE: Duration = Duration::from_secs(5);
/// How long a host waits for the card's greeting.
const GREETING_PATIENCE: Duration = Duration::from_secs(5);
/// How often a send looks for room. A full ring is rare, so it has no doorbell.
const ROOM_POLL: Duration = Duration::from_millis(1);

/// Why a link could not be made, or ended.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages name the fields
pub enum MailboxError {
    /// The other process ended, hung up, or this side did.
    #[error("the peer is gone")]
    PeerGone,
    /// [`Listener::close`] was called.
    #[error("the mailbox listens no more")]
    Closed,
    /// The ring stayed full: the peer lives and does not read.
    #[error("the peer did not make room for {0:?}")]
    Stalled(Duration),
    /// Our own message: nothing was sent, the link goes on.
    #[error("a message of {0} bytes is over {BODY_MAX}")]
    TooLarge(usize),
    /// The peer broke the protocol; the link has been hung up.
    #[error("broken frame: {0}")]
    Garbage(Garbage),
    /// The card's first message was not what a card sends.
    #[error("no mailbox behind the socket: {0}")]
    Greeting(&'static str),
    #[error("mailbox socket or memory")]
    Io(#[from] io::Error),
}

/// The rule that a peer broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Garbage {
    #[error("an index outside the ring")]
    Index,
    #[error("wrong magic, version, flags or reserved bits")]
    Header,
    #[error("a length over the limit or over what was written")]
    Length,
    #[error("a sequence number out of order")]
    Sequence,
    #[error("wrong checksum")]
    Checksum,
    #[error("not the expected message")]
    Message,
    #[error("doorbells without frames")]
    Doorbell,
}

impl MailboxError {
    /// A short name for the label of a counter.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::PeerGone => "peer_gone",
            Self::Closed => "closed",
            Self::Stalled(_) => "stalled",
            Self::TooLarge(_) => "too_large",
            Self::Greeting(_) => "greeting",
            Self::Io(_) => "io",
            Self::Garbage(rule) => match rule {
                Garbage::Index => "index",
                Garbage::Header => "header",
                Garbage::Length => "length",
                Garbage::Sequence => "sequence",
                Garbage::Checksum => "checksum",
                Garbage::Message => "message",
                Garbage::Doorbell => "doorbell",
            },
        }
    }
}

impl From<Errno> for MailboxError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// The card's end of the slot. Dropping it removes the socket.
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`; the socket that a killed card left there is replaced.
    ///
    /// # Errors
    /// What the file system says, also when `path` is something else than a socket.
    pub fn bind(path: &Path) -> io::Result<Self> {
        if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
            std::fs::remove_file(path)?;
        }
        Ok(Self { socket: UnixListener::bind(path)?, path: path.to_owned() })
    }

    /// Waits for a host and gives it a fresh pair of rings. One host at a time
    /// is the caller's rule: a new link means that the older one is dead.
    ///
    /// # Errors
    /// [`MailboxError::Closed`] for good, any other for this one host.
    pub fn accept(&self) -> Result<Link, MailboxError> {
        let (stream, _) = match self.socket.accept() {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Err(MailboxError::Closed),
            accepted => accepted?,
        };
        let file = memory::create(LINK_WORDS)?;
        let memory = Memory::map(&file, LINK_WORDS)?;
        let files = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        rights.push(SendAncillaryMessage::ScmRights(&files));
        rustix::net::sendmsg(&stream, &[IoSlice::new(&GREETING)], &mut rights, SendFlags::NOSIGNAL)?;
        Ok(Link { shared: Shared::new(memory, stream), sends_on: 0 })
    }

    /// Ends a pending and every later [`Listener::accept`].
    pub fn close(&self) {
        // It fails only on a socket that is closed already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Gone already when somebody removed the whole folder.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Connects a host to the card that listens at `path`.
///
/// # Errors
/// [`MailboxError::Io`] while no card listens: try again. [`MailboxError::Greeting`]
/// when what listens there is no card.
pub fn connect(path: &Path) -> Result<Link, MailboxError> {
    let (stream, file) = attach(path)?;
    Ok(Link { shared: Shared::new(Memory::map(file, LINK_WORDS)?, stream), sends_on: 1 })
}

/// The bare socket and memory of a link, as [`connect`] uses them.
///
/// # Errors
/// As [`connect`].
pub fn attach(path: &Path) -> Result<(UnixStream, OwnedFd), MailboxError> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(GREETING_PATIENCE))?;
    let mut greeting = [0; GREETING.len()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::net::recvmsg(&stream, &mut [IoSliceMut::new(&mut greeting)], &mut rights, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = rights.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let file = files.next().and_then(|mut files| files.next()).ok_or(MailboxError::Greeting("no memory came with it"))?;
    if got.bytes != GREETING.len() || greeting != GREETING {
        return Err(MailboxError::Greeting("another greeting"));
    }
    Ok((stream, file))
}

/// One connection between a card and a host.
pub struct Link {
    shared: Arc<Shared>,
    /// Index of the ring that this side produces into.
    sends_on: usize,
}

impl Link {
    /// The two directions, each for a thread of its own.
    #[must_use]
    pub fn split(self) -> (Sender, Receiver) {
        let sender = Sender { shared: self.shared.clone(), ring: self.sends_on, head: 0, sequence: 0, frame: Vec::new() };
        let receiver =
            Receiver { shared: self.shared, ring: 1 - self.sends_on, tail: 0, end: None, sequence: 0, rings: 0, body: Vec::new() };
        (sender, receiver)
    }
}

/// The producing half of a link.
pub struct Sender {
    shared: Arc<Shared>,
    ring: usize,
    head: u64,
    sequence: u64,
    frame: Vec<u8>,
}

impl Sender {
    /// Sends one message; waits at most 5 s for room.
    ///
    /// # Errors
    /// After [`MailboxError::TooLarge`] the link goes on, after any other it is over.
    pub fn send<M: Message>(&mut self, message: &M) -> Result<(), MailboxError> {
        let length = message.encoded_len();
        let Some(length32) = u32::try_from(length).ok().filter(|_| length <= BODY_MAX) else {
            return Err(MailboxError::TooLarge(length));
        };
        self.frame.clear();
        self.frame.extend(header(length32, self.sequence, 0));
        // A Vec grows as needed, so encoding into it cannot fail.
        let _ = message.encode(&mut self.frame);
        let checksum = crc32c::crc32c(&self.frame);
        self.frame.splice(..HEADER_BYTES, header(length32, self.sequence, checksum));
        self.put().inspect_err(|_| self.hang_up())
    }

    /// Ends the link: at once for this side, after what was sent for the peer.
    pub fn hang_up(&self) {
        self.shared.hang_up();
    }

    fn put(&mut self) -> Result<(), MailboxError> {
        let ring = self.shared.ring(self.ring);
        let needed = self.frame.len().div_ceil(8) as u64;
        let deadline = Instant::now() + SEND_PATIENCE;
        while RING_WORDS as u64 - ring.used(self.head)? < needed {
            if deadline < Instant::now() {
                return Err(MailboxError::Stalled(SEND_PATIENCE));
            }
            // Only for the hang-up: doorbells are the receiver's to read.
            if self.shared.wait(PollFlags::RDHUP, Some(ROOM_POLL))? {
                return Err(MailboxError::PeerGone);
            }
        }
        for (index, bytes) in (self.head..).zip(self.frame.chunks(8)) {
            let mut word = [0; 8];
            word.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            ring.slot(index)?.store(u64::from_le_bytes(word), Ordering::Relaxed);
        }
        self.head += needed;
        self.sequence += 1;
        // Release: whoever sees the new head sees the words behind it.
        ring.head.store(self.head.to_le(), Ordering::Release);
        self.shared.ring_doorbell()
    }
}

/// The consuming half of a link.
pub struct Receiver {
    shared: Arc<Shared>,
    ring: usize,
    tail: u64,
    /// Where the head stood when the peer went; what it writes later is not read.
    end: Option<u64>,
    sequence: u64,
    /// Doorbells heard so far; an honest peer rings at most once per frame.
    rings: u64,
    body: Vec<u8>,
}

impl Receiver {
    /// The next message, or `None` when `timeout` passes without one.
    ///
    /// # Errors
    /// Each of them ends the link; what came before the hang-up is delivered first.
    pub fn recv<M: Message + Default>(&mut self, timeout: Option<Duration>) -> Result<Option<M>, MailboxError> {
        self.next(timeout).inspect_err(|_| self.hang_up())
    }

    /// Ends the link: at once for this side, after what was sent for the peer.
    pub fn hang_up(&self) {
        self.shared.hang_up();
    }

    fn next<M: Message + Default>(&mut self, timeout: Option<Duration>) -> Result<Option<M>, MailboxError> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            if self.shared.hung_up.load(Ordering::Relaxed) {
                return Err(MailboxError::PeerGone);
            }
            if self.take()? {
                return M::decode(self.body.as_slice()).map(Some).map_err(|_| MailboxError::Garbage(Garbage::Message));
            }
            if self.sequence < self.rings {
                return Err(MailboxError::Garbage(Garbage::Doorbell));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if !self.shared.wait(PollFlags::IN | PollFlags::RDHUP, left)? {
                return Ok(None);
            }
            match self.shared.hear_doorbells()? {
                Some(count) => self.rings += count,
                None if self.end.is_some() => return Err(MailboxError::PeerGone),
                // The peer may have sent its last words before it went.
                None => self.end = Some(self.tail + self.shared.ring(self.ring).to_read(self.tail)?),
            }
        }
    }

    /// Moves the next frame's body out of the ring and checks it; false if there is none.
    fn take(&mut self) -> Result<bool, MailboxError> {
        let ring = self.shared.ring(self.ring);
        let available = match self.end {
            Some(end) => end.saturating_sub(self.tail),
            None => ring.to_read(self.tail)?,
        };
        if available == 0 {
            return Ok(false);
        }
        let mut words = [0_u64; HEADER_BYTES / 8];
        if available < words.len() as u64 {
            return Err(MailboxError::Garbage(Garbage::Length));
        }
        for (word, index) in words.iter_mut().zip(self.tail..) {
            *word = ring.load(index)?;
        }
        let [first, second, third] = words;
        let [length, sequence_low, sequence_high, checksum] = [second, second >> 32, third, third >> 32].map(low_half);
        let sequence = u64::from(sequence_high) << 32 | u64::from(sequence_low);
        if first != u64::from(MAGIC) | u64::from(VERSION) << 32 {
            return Err(MailboxError::Garbage(Garbage::Header));
        }
        let length_bytes = length as usize;
        let total = words.len() as u64 + u64::from(length).div_ceil(8);
        if BODY_MAX < length_bytes || available < total {
            return Err(MailboxError::Garbage(Garbage::Length));
        }
        if sequence != self.sequence {
            return Err(MailboxError::Garbage(Garbage::Sequence));
        }
        self.body.clear();
        for index in self.tail + words.len() as u64..self.tail + total {
            self.body.extend(ring.load(index)?.to_le_bytes());
        }
        self.body.truncate(length_bytes);
        if crc32c::crc32c_append(crc32c::crc32c(&header(length, sequence, 0)), &self.body) != checksum {
            return Err(MailboxError::Garbage(Garbage::Checksum));
        }
        self.tail += total;
        self.sequence += 1;
        ring.tail.store(self.tail.to_le(), Ordering::Release);
        Ok(true)
    }
}

/// The header of a frame in the order in which it lies in memory.
fn header(length: u32, sequence: u64, checksum: u32) -> [u8; HEADER_BYTES] {
    let words =
        [u64::from(MAGIC) | u64::from(VERSION) << 32, u64::from(length) | sequence << 32, sequence >> 32 | u64::from(checksum) << 32];
    let mut bytes = [0; HEADER_BYTES];
    bytes.iter_mut().zip(words.iter().flat_map(|word| word.to_le_bytes())).for_each(|(to, from)| *to = from);
    bytes
}

#[allow(clippy::cast_possible_truncation)] // the low half is what is asked for
fn low_half(word: u64) -> u32 {
    word as u32
}

/// What both halves of a link hold.
struct Shared {
    memory: Memory,
    stream: UnixStream,
    hung_up: AtomicBool,
}

impl Shared {
    fn new(memory: Memory, stream: UnixStream) -> Arc<Self> {
        Arc::new(Self { memory, stream, hung_up: AtomicBool::new(false) })
    }

    fn ring(&self, index: usize) -> Ring<'_> {
        let words = self.memory.words();
        let (indices, frames) = match index {
            0 => words.split_at(LINK_WORDS / 2).0,
            _ => words.split_at(LINK_WORDS / 2).1,
        }
        .split_at(INDEX_WORDS);
        let (heads, tails) = indices.split_at(TAIL);
        let (Some(head), Some(tail)) = (heads.first(), tails.first()) else { unreachable!("INDEX_WORDS is over TAIL") };
        Ring { head, tail, frames }
    }

    /// Waits for one of `events` or the end of the socket; false at the timeout.
    fn wait(&self, events: PollFlags, timeout: Option<Duration>) -> Result<bool, MailboxError> {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match rustix::event::poll(&mut [PollFd::new(&self.stream, events)], timeout.as_ref()) {
            Ok(ready) => Ok(ready != 0),
            // As if the event had come: the caller looks again.
            Err(Errno::INTR) => Ok(events.contains(PollFlags::IN)),
            Err(errno) => Err(errno.into()),
        }
    }

    fn ring_doorbell(&self) -> Result<(), MailboxError> {
        match rustix::net::send(&self.stream, &[1], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            // No room for a byte: the peer has more than one to hear already.
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(Errno::PIPE | Errno::CONNRESET) => Err(MailboxError::PeerGone),
            Err(errno) => Err(errno.into()),
        }
    }

    /// How often the doorbell rang; `None` when the peer has gone.
    fn hear_doorbells(&self) -> Result<Option<u64>, MailboxError> {
        let mut bytes = [0; 512];
        match rustix::net::recv(&self.stream, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((_, 0)) | Err(Errno::CONNRESET) => Ok(None),
            Ok((_, count)) => Ok(Some(count as u64)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(Some(0)),
            Err(errno) => Err(errno.into()),
        }
    }

    fn hang_up(&self) {
        self.hung_up.store(true, Ordering::Relaxed);
        // It fails only on a socket that is closed already.
        let _ = rustix::net::shutdown(&self.stream, Shutdown::Both);
    }
}

struct Ring<'a> {
    head: &'a AtomicU64,
    tail: &'a AtomicU64,
    frames: &'a [AtomicU64],
}

impl Ring<'_> {
    /// Words in use, for the producer: its own head, the peer's tail.
    fn used(&self, head: u64) -> Result<u64, MailboxError> {
        bounded(head, u64::from_le(self.tail.load(Ordering::Acquire)))
    }

    /// Words to read, for the consumer: the peer's head, its own tail.
    fn to_read(&self, tail: u64) -> Result<u64, MailboxError> {
        bounded(u64::from_le(self.head.load(Ordering::Acquire)), tail)
    }

    fn slot(&self, index: u64) -> Result<&AtomicU64, MailboxError> {
        let slot = usize::try_from(index % RING_WORDS as u64).ok();
        slot.and_then(|slot| self.frames.get(slot)).ok_or(MailboxError::Garbage(Garbage::Index))
    }

    fn load(&self, index: u64) -> Result<u64, MailboxError> {
        Ok(u64::from_le(self.slot(index)?.load(Ordering::Relaxed)))
    }
}

fn bounded(head: u64, tail: u64) -> Result<u64, MailboxError> {
    head.checked_sub(tail).filter(|used| *used <= RING_WORDS as u64).ok_or(MailboxError::Garbage(Garbage::Index))
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests;
