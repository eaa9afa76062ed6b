//! One thread that keeps a depth of commands under way on each queue, and times every one.
//!
//! A turn of a queue: read what came, take what ended, start as many again, write all of them at once. The
//! thread spins while answers come within [`SPIN`], and sleeps in poll(2) when they do not: the figures are the
//! target's, and not those of waking this thread.

use super::Plan;
use super::histogram::Histogram;
use anyhow::{Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, IoSlice, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// How long to look at the sockets before sleeping.
const SPIN: Duration = Duration::from_micros(200);
/// Nothing at all for this long is the end of the run.
const PATIENCE: Duration = Duration::from_secs(20);
/// What one read takes, in bytes.
const SCRATCH: usize = 1 << 20;
/// The most pieces of one writev.
const PIECES: usize = 256;
/// Bytes that a fill writes with each command.
const FILL: u32 = 128 << 10;

/// A command.
#[derive(Debug, Clone, Copy)]
pub struct Command {
    /// Names it in its answer.
    pub slot: u16,
    pub is_read: bool,
    pub offset: u64,
    pub len: u32,
}

/// Bytes that wait for the socket: heads of their own, data from one buffer that all writes share.
pub struct Output {
    heads: Vec<u8>,
    pieces: Vec<Piece>,
    next: usize,
    /// Bytes of the next piece that were written.
    written: usize,
    data: Vec<u8>,
}

enum Piece {
    Head(usize, usize),
    Data(usize),
}

impl Output {
    fn new() -> Self {
        // Bytes that differ, so that nothing on the way can take them for zeros.
        let data = (0..1_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        Self { heads: Vec::new(), pieces: Vec::new(), next: 0, written: 0, data }
    }

    /// Appends a head.
    pub fn head(&mut self, bytes: &[u8]) {
        let start = self.heads.len();
        self.heads.extend_from_slice(bytes);
        match self.pieces.last_mut() {
            Some(Piece::Head(_, end)) if *end == start => *end = self.heads.len(),
            _ => self.pieces.push(Piece::Head(start, self.heads.len())),
        }
    }

    /// Appends the first `len` bytes of the data that all writes share.
    pub fn data(&mut self, len: usize) {
        self.pieces.push(Piece::Data(len));
    }

    /// That data.
    pub fn shared(&self, len: usize) -> &[u8] {
        self.data.get(..len).unwrap_or_default()
    }

    fn is_empty(&self) -> bool {
        self.next == self.pieces.len()
    }

    fn write(&mut self, mut stream: &TcpStream) -> Result<()> {
        while !self.is_empty() {
            let mut slices = [IoSlice::new(&[]); PIECES];
            let mut used = 0;
            for (slot, piece) in slices.iter_mut().zip(self.pieces.iter().skip(self.next)) {
                let bytes = match piece {
                    Piece::Head(start, end) => self.heads.get(*start..*end),
                    Piece::Data(len) => self.data.get(..*len),
                };
                let skip = if used == 0 { self.written } else { 0 };
                *slot = IoSlice::new(bytes.and_then(|bytes| bytes.get(skip..)).unwrap_or_default());
                used += 1;
            }
            match stream.write_vectored(slices.get(..used).unwrap_or_default()) {
                Ok(count) => self.consume(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.heads.clear();
        self.pieces.clear();
        self.next = 0;
        Ok(())
    }

    fn consume(&mut self, count: usize) {
        self.written += count;
        while let Some(piece) = self.pieces.get(self.next) {
            let len = match piece {
                Piece::Head(start, end) => end - start,
                Piece::Data(len) => *len,
            };
            if self.written < len {
                return;
            }
            self.written -= len;
            self.next += 1;
        }
    }
}

/// A connection that takes commands: NVMe/TCP, or a peer's protocol.
pub trait Queue {
    fn stream(&self) -> &TcpStream;

    /// Appends a command to the output.
    fn encode(&mut self, command: Command, output: &mut Output);

    /// Takes bytes that came; what is no whole header is left, and how much was used is returned. Calls
    /// `done` with the slot of each command that ended and whether it ended well.
    fn decode(&mut self, bytes: &[u8], output: &mut Output, done: &mut dyn FnMut(u16, bool)) -> Result<usize>;
}

/// What a run found.
pub struct Outcome {
    pub commands: u64,
    pub errors: u64,
    pub latency: Histogram,
    pub took: Duration,
}

/// A queue, and what it has under way.
struct Driver<'a, Q> {
    queue: &'a mut Q,
    output: Output,
    scratch: Vec<u8>,
    /// Bytes of `scratch` that wait for the rest of their header.
    kept: usize,
    begun: Vec<Instant>,
    free: Vec<u16>,
}

/// Where the next command goes.
struct Aim {
    plan: Plan,
    chance: u64,
    next: u64,
    left: u64,
}

impl Aim {
    fn command(&mut self, slot: u16) -> Command {
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        let blocks = self.plan.span / u64::from(self.plan.block_size);
        let block = if self.plan.case.is_sequential() { self.next % blocks } else { (self.chance >> 16) % blocks };
        self.next += 1;
        let is_read = (self.chance >> 8) % 10 < self.plan.case.reads();
        Command { slot, is_read, offset: block * u64::from(self.plan.block_size), len: self.plan.block_size }
    }
}

/// Runs a plan.
pub fn run<Q: Queue>(queues: &mut [Q], plan: Plan) -> Result<Outcome> {
    drive(queues, plan, u64::MAX)
}

/// Writes every block of the span once.
pub fn fill<Q: Queue>(queues: &mut [Q], span: u64, depth: u16) -> Result<()> {
    let block_size = FILL.min(u32::try_from(span / 512 * 512).unwrap_or(FILL));
    let plan = Plan { case: super::Case::Seqwrite, block_size, depth: depth.min(8), time: Duration::from_secs(3600), span };
    let outcome = drive(queues, plan, span / u64::from(block_size))?;
    if outcome.errors > 0 {
        bail!("{} of the writes that fill the volume failed", outcome.errors);
    }
    Ok(())
}

fn drive<Q: Queue>(queues: &mut [Q], plan: Plan, limit: u64) -> Result<Outcome> {
    let start = Instant::now();
    let mut drivers = Vec::new();
    for queue in queues {
        queue.stream().set_nonblocking(true)?;
        let (begun, free) = (vec![start; plan.depth.into()], (0..plan.depth).collect());
        drivers.push(Driver { queue, output: Output::new(), scratch: vec![0; SCRATCH], kept: 0, begun, free });
    }
    let mut aim = Aim { plan, chance: 0x9e37_79b9_7f4a_7c15, next: 0, left: limit };
    let mut outcome = Outcome { commands: 0, errors: 0, latency: Histogram::new(), took: Duration::ZERO };
    let mut heard = start;
    loop {
        let now = Instant::now();
        let stopping = now.duration_since(start) >= plan.time || aim.left == 0;
        if stopping && drivers.iter().all(|driver| driver.free.len() == usize::from(plan.depth)) {
            outcome.took = heard.duration_since(start);
            return Ok(outcome);
        }
        let mut progress = false;
        for driver in &mut drivers {
            progress |= driver.turn(&mut aim, &mut outcome, stopping)?;
        }
        if progress {
            heard = Instant::now();
        } else if now.duration_since(heard) > PATIENCE {
            bail!("no answer for {PATIENCE:?}");
        } else if now.duration_since(heard) > SPIN {
            sleep(&drivers)?;
        }
    }
}

fn sleep<Q: Queue>(drivers: &[Driver<'_, Q>]) -> Result<()> {
    let mut sockets: Vec<PollFd<'_>> = drivers
        .iter()
        .map(|driver| {
            let out = if driver.output.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            PollFd::new(driver.queue.stream(), PollFlags::IN | out)
        })
        .collect();
    poll(&mut sockets, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 }))?;
    Ok(())
}

impl<Q: Queue> Driver<'_, Q> {
    /// Takes what came and starts what may be started; whether anything happened.
    fn turn(&mut self, aim: &mut Aim, outcome: &mut Outcome, stopping: bool) -> Result<bool> {
        let came = match self.queue.stream().read(self.scratch.get_mut(self.kept..).unwrap_or_default()) {
            Ok(0) => bail!("the target has closed the connection"),
            Ok(count) => count,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(error) => return Err(error.into()),
        };
        if came > 0 {
            let now = Instant::now();
            let have = self.kept + came;
            let (begun, free) = (&self.begun, &mut self.free);
            let mut done = |slot: u16, good: bool| {
                let Some(begun) = begun.get(usize::from(slot)) else { return };
                let ns = u64::try_from(now.duration_since(*begun).as_nanos()).unwrap_or(u64::MAX);
                outcome.latency.add(ns);
                outcome.commands += 1;
                outcome.errors += u64::from(!good);
                free.push(slot);
            };
            let used = self.queue.decode(self.scratch.get(..have).unwrap_or_default(), &mut self.output, &mut done)?;
            self.scratch.copy_within(used..have, 0);
            self.kept = have - used;
        }
        let starts = !stopping && !self.free.is_empty();
        if starts {
            let now = Instant::now();
            while aim.left > 0
                && let Some(slot) = self.free.pop()
            {
                aim.left -= 1;
                if let Some(begun) = self.begun.get_mut(usize::from(slot)) {
                    *begun = now;
                }
                self.queue.encode(aim.command(slot), &mut self.output);
            }
        }
        if !self.output.is_empty() {
            self.output.write(self.queue.stream())?;
        }
        Ok(came > 0 || starts)
    }
}
