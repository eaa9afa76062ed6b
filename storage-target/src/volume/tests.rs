//! Random requests, random order of completion, random death; a model knows what may be read afterwards.

use super::*;
use crate::io::mem::{Chance, MemDevice};

const SECTOR: u64 = 512;
const BOOT: [u8; 16] = [1; 16];

/// The content of a sector: zeros, the image's, or what write number n left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    Zero,
    Image,
    Write(u64),
}

fn sector_bytes(value: Value, sector: u64) -> Vec<u8> {
    match value {
        Value::Zero => vec![0; 512],
        Value::Image => format!("image {sector:>10}").repeat(32).into_bytes(),
        Value::Write(id) => format!("w{id:>6}@{sector:>8}").repeat(32).into_bytes(),
    }
}

/// What may be read from one sector.
#[derive(Debug, Clone)]
struct Cell {
    /// On the disk for sure, unless something newer is.
    durable: Vec<Value>,
    /// Acknowledged since then, with the time.
    acked: Vec<(u64, Vec<Value>)>,
    under_way: Vec<Value>,
}

impl Cell {
    fn current(&self) -> &[Value] {
        self.acked.last().map_or(&self.durable, |(_, values)| values)
    }

    fn flushed(&mut self, upto: u64) {
        while self.acked.first().is_some_and(|(time, _)| *time <= upto) {
            self.durable = self.acked.remove(0).1;
        }
    }
}

enum What {
    Read(Vec<Vec<Value>>),
    Write { fua: bool },
    Flush { time: u64 },
}

struct World {
    device: MemDevice,
    volume: Volume,
    data: FileId,
    image: FileId,
    present: FileId,
    durable: FileId,
    boot: [u8; 16],
    image_bytes: u64,
    cells: Vec<Cell>,
    requests: Vec<(u64, Range<u64>, What)>,
    chance: Chance,
    time: u64,
}

impl World {
    fn new(seed: u64, size: u64, image_bytes: u64) -> Self {
        let mut device = MemDevice::new(seed);
        let image: Vec<u8> = (0..image_bytes.div_ceil(SECTOR)).flat_map(|at| sector_bytes(Value::Image, at)).collect();
        let data = device.file(vec![0; size as usize]);
        let image = device.file(image[..image_bytes as usize].to_vec());
        let marks = vec![0; marks_len(image_bytes)];
        let present = device.file(map_file(BOOT, &marks));
        let durable = device.file(map_file(BOOT, &marks));
        let cell = |at: u64| Cell {
            durable: vec![if at * SECTOR < image_bytes { Value::Image } else { Value::Zero }],
            acked: Vec::new(),
            under_way: Vec::new(),
        };
        let mut world = Self {
            volume: Volume::new(0, size, data, None, false),
            cells: (0..size / SECTOR).map(cell).collect(),
            requests: Vec::new(),
            chance: Chance::new(seed ^ 0x5555),
            time: 0,
            boot: BOOT,
            device,
            data,
            image,
            present,
            durable,
            image_bytes,
        };
        world.open();
        world
    }

    fn open(&mut self) {
        let len = marks_len(self.image_bytes);
        let (present, durable) = (self.device.content(self.present), self.device.content(self.durable));
        let (marks, durable_marks) = read_maps(present, durable, self.boot, len).unwrap();
        self.device.replace(self.present, map_file(self.boot, &marks));
        let files = CloneFiles {
            image: self.image,
            image_bytes: self.image_bytes,
            present: self.present,
            durable: self.durable,
            marks,
            durable_marks,
        };
        let clone = (self.image_bytes > 0).then_some(files);
        self.volume = Volume::new(0, self.cells.len() as u64 * SECTOR, self.data, clone, false);
    }

    fn range(&mut self) -> Range<u64> {
        let sectors = self.cells.len() as u64;
        let start = self.chance.below(sectors);
        let longest = if self.chance.below(4) == 0 { 600 } else { 20 };
        start..(start + 1 + self.chance.below(longest)).min(sectors)
    }

    fn cells_mut(&mut self, range: &Range<u64>) -> &mut [Cell] {
        &mut self.cells[range.start as usize..range.end as usize]
    }

    fn issue(&mut self) {
        self.time += 1;
        let (tag, range) = (self.time, self.range());
        let (offset, len) = (range.start * SECTOR, (range.end - range.start) * SECTOR);
        let busy = self
            .requests
            .iter()
            .any(|(_, other, what)| !matches!(what, What::Flush { .. }) && other.start < range.end && range.start < other.end);
        let fua = self.chance.below(8) == 0;
        let (request, what) = match self.chance.below(12) {
            0 | 1 => (Request::Flush, What::Flush { time: self.time }),
            2..=4 => {
                let may = self.cells_mut(&range).iter().map(|cell| [cell.current(), &cell.under_way].concat()).collect();
                (Request::Read { offset, len, buffer: vec![0xee; len as usize] }, What::Read(may))
            }
            _ if busy => return,
            5 => {
                self.cells_mut(&range).iter_mut().for_each(|cell| cell.under_way = [cell.current(), &[Value::Zero]].concat());
                (Request::Discard { offset, len }, What::Write { fua: false })
            }
            6 => {
                self.cells_mut(&range).iter_mut().for_each(|cell| cell.under_way = vec![Value::Zero]);
                (Request::Zeroes { offset, len, fua }, What::Write { fua })
            }
            _ => {
                self.cells_mut(&range).iter_mut().for_each(|cell| cell.under_way = vec![Value::Write(tag)]);
                let buffer = range.clone().flat_map(|at| sector_bytes(Value::Write(tag), at)).collect();
                (Request::Write { offset, len, buffer, fua }, What::Write { fua })
            }
        };
        self.requests.push((tag, range, what));
        self.volume.submit(&mut self.device, tag, request);
        self.collect();
    }

    fn step(&mut self) {
        self.device.kick();
        self.device.step();
        let mut finished = Vec::new();
        self.device.reap(&mut finished);
        for one in finished {
            self.volume.complete(&mut self.device, one);
        }
        self.collect();
    }

    fn collect(&mut self) {
        for completion in self.volume.finished().collect::<Vec<_>>() {
            completion.result.unwrap();
            let index = self.requests.iter().position(|(tag, ..)| *tag == completion.tag).unwrap();
            let (_, range, what) = self.requests.remove(index);
            self.time += 1;
            let time = self.time;
            match what {
                What::Read(may) => {
                    for ((at, may), bytes) in range.zip(may).zip(completion.buffer.chunks(512)) {
                        assert!(
                            may.iter()
                                .chain(self.cells[at as usize].acked.iter().flat_map(|(_, values)| values))
                                .chain(&self.cells[at as usize].under_way)
                                .any(|value| sector_bytes(*value, at) == bytes),
                            "sector {at} reads {:?}, may be {may:?}",
                            String::from_utf8_lossy(&bytes[..20]),
                        );
                    }
                }
                What::Write { fua } => {
                    for cell in self.cells_mut(&range) {
                        let values = std::mem::take(&mut cell.under_way);
                        cell.acked.push((time, values));
                        if fua {
                            cell.flushed(time);
                        }
                    }
                }
                What::Flush { time } => self.cells.iter_mut().for_each(|cell| cell.flushed(time)),
            }
        }
    }

    fn drain(&mut self) {
        while !(self.volume.is_idle() && self.device.is_idle()) {
            self.step();
        }
        assert!(self.requests.is_empty());
    }

    /// Reads every sector after a death and holds it against the model.
    fn check(&mut self, power_cut: bool) {
        self.requests.clear();
        self.open();
        let len = self.volume.size();
        self.volume.submit(&mut self.device, 0, Request::Read { offset: 0, len, buffer: vec![0xee; len as usize] });
        let mut read = Vec::new();
        while read.is_empty() {
            self.device.kick();
            self.device.step();
            let mut finished = Vec::new();
            self.device.reap(&mut finished);
            finished.into_iter().for_each(|one| self.volume.complete(&mut self.device, one));
            read.extend(self.volume.finished());
        }
        let bytes = read.remove(0).buffer;
        for ((at, cell), bytes) in (0..).zip(&mut self.cells).zip(bytes.chunks(512)) {
            let mut may = [cell.current(), &cell.under_way].concat();
            if power_cut {
                may.extend(cell.durable.iter().chain(cell.acked.iter().flat_map(|(_, values)| values)));
            }
            let found = may.iter().find(|value| sector_bytes(**value, at) == bytes);
            let Some(found) = found.copied() else {
                panic!("sector {at} reads {:?}, may be {may:?}", String::from_utf8_lossy(&bytes[..20]));
            };
            cell.under_way.clear();
            if power_cut {
                *cell = Cell { durable: vec![found], acked: Vec::new(), under_way: Vec::new() };
            } else if cell.current() != [found] {
                cell.acked.push((self.time, vec![found]));
            }
        }
    }

    fn run(&mut self, rounds: u64) {
        for _ in 0..rounds {
            for _ in 0..self.chance.below(120) {
                if self.chance.below(3) == 0 && self.requests.len() < 16 {
                    self.issue();
                } else {
                    self.step();
                }
            }
            match self.chance.below(3) {
                0 => self.drain(),
                1 => {
                    self.device.kill();
                    self.check(false);
                }
                _ => {
                    self.device.cut_power();
                    self.boot[0] += 1;
                    self.check(true);
                }
            }
        }
    }
}

fn run_seeds(size: u64, image_bytes: u64, seeds: u64) {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let (first, count) = match number("SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("SEEDS").unwrap_or(seeds)),
    };
    for seed in first..first + count {
        let run = std::panic::catch_unwind(|| World::new(seed, size, image_bytes).run(12));
        assert!(run.is_ok(), "failed with SEED={seed}");
    }
}

#[test]
fn a_clone_survives_every_death_with_what_it_acknowledged() {
    run_seeds(9 * GRANULE - 4096, 5 * GRANULE + 3072, 150);
}

#[test]
fn a_blank_volume_survives_every_death_with_what_it_acknowledged() {
    run_seeds(4 * GRANULE, 0, 60);
}

#[test]
fn a_clone_writes_only_the_granules_that_are_written() {
    let mut world = World::new(7, 64 * GRANULE, 64 * GRANULE);
    let request = Request::Write { offset: 3 * GRANULE + 512, len: 512, buffer: vec![5; 512], fua: false };
    world.cells_mut(&(3 * 128 + 1..3 * 128 + 2)).iter_mut().for_each(|cell| cell.under_way = vec![Value::Zero]);
    world.requests.push((1, 3 * 128 + 1..3 * 128 + 2, What::Write { fua: false }));
    world.volume.submit(&mut world.device, 1, request);
    world.drain();
    let data = world.device.content(world.data);
    let written = |granule: usize| data[granule * 65536..(granule + 1) * 65536].iter().any(|byte| *byte != 0);
    assert_eq!((0..64).filter(|granule| written(*granule)).collect::<Vec<_>>(), [3]);
    assert_eq!(count_marks(&world.device.content(world.present)[MAP_HEADER as usize..]), 1);
}

#[test]
fn after_a_failed_flush_nothing_is_written_any_more() {
    let mut device = MemDevice::new(1);
    let data = device.file(vec![0; 65536]);
    let mut volume = Volume::new(0, 65536, data, None, false);
    let mut run = |device: &mut MemDevice, request| {
        volume.submit(device, 1, request);
        for _ in 0..9 {
            device.kick();
            device.step();
            let mut finished = Vec::new();
            device.reap(&mut finished);
            finished.into_iter().for_each(|one| volume.complete(device, one));
        }
        volume.finished().next().unwrap().result
    };
    let write = || Request::Write { offset: 0, len: 512, buffer: vec![1; 512], fua: false };
    run(&mut device, write()).unwrap();
    device.fail_sync = true;
    assert!(matches!(run(&mut device, Request::Flush), Err(VolumeError::Flush(_))));
    assert!(matches!(run(&mut device, write()), Err(VolumeError::Failed)));
    assert!(matches!(run(&mut device, Request::Flush), Err(VolumeError::Failed)));
    run(&mut device, Request::Read { offset: 0, len: 512, buffer: vec![0; 512] }).unwrap();
    let result = run(&mut device, Request::Read { offset: 65536, len: 512, buffer: vec![0; 512] });
    assert!(matches!(result, Err(VolumeError::OutOfRange { .. })));
}

#[test]
fn flushes_that_wait_together_cost_one_sync() {
    let mut world = World::new(3, 4 * GRANULE, 0);
    for tag in 100..108 {
        world.requests.push((tag, 0..0, What::Flush { time: 0 }));
        world.volume.submit(&mut world.device, tag, Request::Flush);
    }
    world.drain();
    assert_eq!(world.device.syncs, 1, "the first flush syncs, and nothing was written for the others");
}
