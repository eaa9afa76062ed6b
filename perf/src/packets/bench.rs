//! One worker's loop around the real pipeline: a burst from the source, a turn,
//! what came out counted and its buffers back to the pool.
//!
//! ```text
//! warm-up passes -> one counted pass -> windows of wall time, ended on a whole pass -> the loop without pipeline
//! ```
//!
//! Time runs one microsecond a burst until the windows begin, so that the counted
//! pass is the same every time, and with the clock from then on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dataplane::action::Output;
use dataplane::packet::{Packet, Pool};
use dataplane::pipeline::{Device, Pipeline, Turn};
use dataplane::policy::Tables;
use dataplane::{Counters, Mac};

use super::clock::{self, Clock};
use super::source::{BURST, Source};
use super::world::World;
use super::{allocations, frame};

/// Passes before anything counts: the first opens connections, the second sees
/// the answers that came too early in the first.
const WARM_UP: u64 = 2;
/// Neighbours that nobody answers for are asked again after 30 s.
const NEIGHBOURS_EVERY: Duration = Duration::from_secs(10);
const BURST_TIME: Duration = Duration::from_micros(1);
/// How often the pipeline is asked when it is due.
const DUE_EVERY: Duration = Duration::from_micros(100);

/// A worker and its world.
#[derive(Debug)]
pub struct Bench {
    /// The packet path itself.
    pub pipeline: Pipeline,
    /// What it was configured with, to compile the next configuration against.
    pub tables: Arc<Tables>,
    neighbours: Vec<(Mac, std::net::Ipv4Addr)>,
    settings: dataplane::Settings,
    pool: Pool,
    out: Output,
    burst: Vec<Packet>,
    now: Duration,
    /// What to add to the clock for `now`.
    epoch: Duration,
    due: Duration,
}

/// What became of frames.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Frames given to the pipeline.
    pub offered: u64,
    /// Frames that came out of it at guests, at the wire, or at the card's services.
    pub delivered: u64,
    /// Frames that ended in it, by reason; only reasons that occurred.
    pub dropped: BTreeMap<&'static str, u64>,
}

impl Tally {
    /// Drops for any reason.
    pub fn lost(&self) -> u64 {
        self.dropped.values().sum()
    }

    /// The same, `times` as often.
    pub fn times(&self, times: u64) -> Tally {
        Tally {
            offered: self.offered * times,
            delivered: self.delivered * times,
            dropped: self.dropped.iter().map(|(reason, count)| (*reason, count * times)).collect(),
        }
    }
}

/// One stretch of a measurement.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// Frames given to the pipeline.
    pub packets: u64,
    /// Cycles of the time stamp counter that passed.
    pub cycles: u64,
}

impl Window {
    /// Cycles for each frame.
    pub fn cycles_per_packet(self) -> f64 {
        self.cycles as f64 / self.packets.max(1) as f64
    }
}

/// The outcome of a run.
#[derive(Debug)]
pub struct Run {
    /// The counted pass.
    pub pass: Tally,
    /// Everything from the first window to the end of the last pass.
    pub total: Tally,
    /// The windows, in order.
    pub windows: Vec<Window>,
    /// The same loop without the pipeline.
    pub source: Vec<Window>,
    /// Connections tracked at the end.
    pub connections: u64,
    /// Heap allocations in the windows.
    pub allocations: u64,
}

impl Bench {
    /// A worker in `world`, with every other card known by MAC.
    pub fn new(world: &World) -> Self {
        let tables = Arc::new(Tables::compile(&world.snapshot, &Tables::default()));
        let mut bench = Self {
            pipeline: Pipeline::new(world.settings.clone()),
            tables,
            neighbours: world.neighbours.clone(),
            settings: world.settings.clone(),
            pool: Pool::new(4 * BURST),
            out: Output::default(),
            burst: Vec::with_capacity(BURST),
            now: Duration::ZERO,
            epoch: Duration::ZERO,
            due: Duration::ZERO,
        };
        bench.pipeline.apply(bench.now, &bench.tables);
        let mut buffers: Vec<Packet> = (0..3 * BURST).map(|_| bench.pool.get()).collect();
        bench.pool.put_all(&mut buffers);
        bench.introduce_neighbours();
        bench
    }

    /// Warms up, counts a pass, measures `windows` windows of `window` seconds each,
    /// and the loop without pipeline.
    pub fn run(&mut self, clock: &Clock, source: &mut impl Source, windows: usize, window: f64) -> Run {
        (0..WARM_UP).for_each(|_| _ = self.pass(source));
        let pass = self.counted(|bench| bench.pass(source));
        let mut samples = Vec::with_capacity(windows);
        let mut allocated = 0;
        let epoch = self.now;
        let start = clock.now();
        let total = self.counted(|bench| {
            let (mut offered, mut delivered) = (0, 0);
            let mut introduced = bench.now;
            for _ in 0..windows {
                let before = allocations::count();
                let (sample, arrived) = bench.window(clock, epoch, start, source, window);
                allocated += allocations::count() - before;
                offered += sample.packets;
                delivered += arrived;
                samples.push(sample);
                if introduced + NEIGHBOURS_EVERY <= bench.now {
                    introduced = bench.now;
                    bench.introduce_neighbours();
                }
            }
            while offered % source.pass() != 0 {
                let (more, arrived) = bench.step(source);
                offered += more;
                delivered += arrived;
            }
            (offered, delivered)
        });
        let connections = self.pipeline.counters().flows;
        let source = (0..windows).map(|_| self.without_pipeline(clock, source, window / 5.0, |_, _| ())).collect();
        Run { pass, total, windows: samples, source, connections, allocations: allocated }
    }

    /// One pass as one window, with the clock.
    pub fn one_pass(&mut self, clock: &Clock, source: &mut impl Source) -> Window {
        let (epoch, start, began) = (self.now, clock.now(), clock::cycles());
        let mut packets = 0;
        while packets < source.pass() {
            self.now = epoch + (clock.now() - start);
            packets += self.step(source).0;
        }
        Window { packets, cycles: clock::cycles() - began }
    }

    /// Takes all ports away and configures `world` anew: no connection is left.
    pub fn forget_connections(&mut self, world: &World) {
        self.apply(&dataplane::Snapshot::default());
        self.apply(&world.snapshot);
        self.introduce_neighbours();
    }

    fn apply(&mut self, snapshot: &dataplane::Snapshot) {
        self.tables = Arc::new(Tables::compile(snapshot, &self.tables));
        self.pipeline.apply(self.now, &self.tables);
    }

    /// Compiles a configuration, to be taken over after those compiled before.
    pub fn compile(&mut self, snapshot: &dataplane::Snapshot) -> Arc<Tables> {
        self.tables = Arc::new(Tables::compile(snapshot, &self.tables));
        Arc::clone(&self.tables)
    }

    /// Takes over a compiled configuration: cycles for which that held the worker.
    pub fn take(&mut self, tables: Arc<Tables>) -> u64 {
        let before = clock::cycles();
        self.pipeline.apply(self.now, &tables);
        // The worker of a card frees what it replaces too.
        drop(tables);
        clock::cycles() - before
    }

    /// Lets time run with the clock from here on.
    pub fn start_clock(&mut self, clock: &Clock) {
        self.epoch = self.now.saturating_sub(clock.now());
    }

    /// One turn of what `take` puts into the burst: packets that came out.
    #[inline]
    pub fn turn_of(&mut self, clock: &Clock, take: impl FnOnce(&mut Pool, &mut Vec<Packet>) -> Device) -> u64 {
        self.now = self.epoch + clock.now();
        let device = take(&mut self.pool, &mut self.burst);
        let mut turn = Turn { now: self.now, pool: &mut self.pool, out: &mut self.out };
        self.pipeline.turn(&mut turn, device, &mut self.burst);
        let delivered = self.drain();
        if self.due <= self.now {
            self.tick();
        }
        delivered
    }

    /// What a worker does without a packet.
    pub fn idle(&mut self, clock: &Clock) {
        self.now = self.epoch + clock.now();
        if self.due <= self.now {
            self.tick();
        }
    }

    /// Takes buffers back.
    pub fn give_back(&mut self, packets: &mut Vec<Packet>) {
        self.pool.put_all(packets);
    }

    /// Bursts until `seconds` have passed.
    fn window(&mut self, clock: &Clock, epoch: Duration, start: Duration, source: &mut impl Source, seconds: f64) -> (Window, u64) {
        let (mut packets, mut delivered) = (0, 0);
        let began = clock::cycles();
        let end = began + clock.cycles_in(seconds);
        loop {
            self.now = epoch + (clock.now() - start);
            let (offered, arrived) = self.step(source);
            packets += offered;
            delivered += arrived;
            let now = clock::cycles();
            if now >= end {
                return (Window { packets, cycles: now - began }, delivered);
            }
        }
    }

    /// The loop of [`Bench::window`] with `each` in place of the pipeline; without
    /// effect it is "mode 0", the source alone. `each` is told which packets come from
    /// the wire.
    pub fn without_pipeline(
        &mut self,
        clock: &Clock,
        source: &mut impl Source,
        seconds: f64,
        mut each: impl FnMut(&mut Packet, bool),
    ) -> Window {
        let mut packets = 0;
        let began = clock::cycles();
        let end = began + clock.cycles_in(seconds);
        loop {
            std::hint::black_box(clock.now());
            let device = source.next(&mut self.pool, &mut self.burst);
            self.burst.iter_mut().for_each(|packet| each(packet, device == Device::Underlay));
            packets += std::hint::black_box(&self.burst).len() as u64;
            self.pool.put_all(&mut self.burst);
            let now = clock::cycles();
            if now >= end {
                return Window { packets, cycles: now - began };
            }
        }
    }

    /// One pass, without the clock: frames offered and delivered.
    fn pass(&mut self, source: &mut impl Source) -> (u64, u64) {
        let (mut offered, mut delivered) = (0, 0);
        while offered < source.pass() {
            self.now += BURST_TIME;
            let (more, arrived) = self.step(source);
            offered += more;
            delivered += arrived;
        }
        (offered, delivered)
    }

    /// One burst: frames offered and delivered.
    #[inline]
    pub fn step(&mut self, source: &mut impl Source) -> (u64, u64) {
        let device = source.next(&mut self.pool, &mut self.burst);
        let offered = self.burst.len() as u64;
        let mut turn = Turn { now: self.now, pool: &mut self.pool, out: &mut self.out };
        self.pipeline.turn(&mut turn, device, &mut self.burst);
        let delivered = self.drain();
        if self.due <= self.now {
            self.tick();
        }
        (offered, delivered)
    }

    /// Calls the pipeline's timers if they are due. What they send is its own.
    #[cold]
    fn tick(&mut self) {
        if self.pipeline.due().is_some_and(|due| due <= self.now) {
            let mut turn = Turn { now: self.now, pool: &mut self.pool, out: &mut self.out };
            self.pipeline.tick(&mut turn);
            self.drain();
        }
        self.due = self.now + DUE_EVERY;
    }

    /// Takes what came out, and counts it.
    #[inline]
    fn drain(&mut self) -> u64 {
        let out = &mut self.out;
        let mut delivered = (out.underlay.len() + out.public.len() + out.punted.len()) as u64;
        self.pool.put_all(&mut out.underlay);
        self.pool.put_all(&mut out.public);
        for (_, packet) in out.punted.drain(..) {
            self.pool.put(packet);
        }
        // What the closure leaves goes back to the pool.
        out.drain_ports(&mut self.pool, |_, _, packets| delivered += packets.len() as u64);
        delivered
    }

    /// Lets every other card ask for this one, which tells this one where they are.
    fn introduce_neighbours(&mut self) {
        for neighbour in &self.neighbours {
            self.burst.push(frame::arp_question(*neighbour, &self.settings.underlay));
            let mut turn = Turn { now: self.now, pool: &mut self.pool, out: &mut self.out };
            self.pipeline.turn(&mut turn, Device::Underlay, &mut self.burst);
        }
        self.drain();
    }

    /// Runs `work`, which says what it offered and what came out, and adds the drops.
    fn counted(&mut self, work: impl FnOnce(&mut Self) -> (u64, u64)) -> Tally {
        let before = self.pipeline.counters();
        let (offered, delivered) = work(self);
        Tally { offered, delivered, dropped: drops_since(&before, &self.pipeline.counters()) }
    }
}

fn drops_since(before: &Counters, after: &Counters) -> BTreeMap<&'static str, u64> {
    let pairs = before.drops.iter().zip(after.drops.iter());
    pairs.map(|((reason, before), (_, after))| (reason.name(), after - before)).filter(|(_, count)| *count > 0).collect()
}
