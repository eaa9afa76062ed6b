//! Load at a given rate: packets arrive by the clock at a device of bounded depth,
//! and what finds it full is lost.
//!
//! The device is a count: packet `k` arrives `k / rate` seconds after the start, the
//! worker takes what has arrived, at most a burst, and when more than the depth
//! waits, the excess is lost, as a card's receive ring loses it. A packet's latency
//! runs from its arrival to the end of the turn that it was in.

use dataplane::packet::{Packet, Pool};
use dataplane::pipeline::Device;

use super::bench::Bench;
use super::clock::{self, Clock};
use super::source::{BURST, Source};

/// Descriptors of a receive ring, as drivers set them up.
pub const DEPTH: u64 = 1024;

/// Arrivals of one kind of traffic.
pub struct Stream<'a> {
    source: &'a mut dyn Source,
    /// Packets a cycle.
    rate: f64,
    waiting: Vec<Packet>,
    device: Device,
    /// Packets that the worker took.
    pub taken: u64,
    /// Packets that found the device full.
    pub lost: u64,
    /// Packets that came out of the pipeline.
    pub delivered: u64,
}

impl<'a> Stream<'a> {
    /// Packets of `source`, `rate` of them a second.
    pub fn new(clock: &Clock, source: &'a mut dyn Source, rate: f64) -> Self {
        let waiting = Vec::with_capacity(BURST);
        Self { source, rate: rate / clock.hz(), waiting, device: Device::Underlay, taken: 0, lost: 0, delivered: 0 }
    }

    /// Packets that arrived within `elapsed` cycles and wait.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // positive, and far below 2^53
    fn backlog(&self, elapsed: u64) -> u64 {
        ((elapsed as f64 * self.rate) as u64).saturating_sub(self.taken + self.lost)
    }

    /// When the oldest packet that waits arrived.
    fn head(&self) -> f64 {
        (self.taken + self.lost) as f64 / self.rate
    }

    /// What was lost of all that arrived, 0 to 1; what the pipeline dropped counts.
    pub fn loss_ratio(&self) -> f64 {
        let arrived = self.taken + self.lost;
        (arrived - self.delivered.min(arrived)) as f64 / arrived.max(1) as f64
    }

    /// Counts anew, for a run that follows.
    pub fn restart(&mut self) {
        (self.taken, self.lost, self.delivered) = (0, 0, 0);
    }

    fn take(&mut self, pool: &mut Pool, burst: &mut Vec<Packet>, count: usize) -> Device {
        if self.waiting.is_empty() {
            self.device = self.source.next(pool, &mut self.waiting);
        }
        let count = count.min(self.waiting.len());
        burst.extend(self.waiting.drain(..count));
        self.taken += count as u64;
        self.device
    }
}

/// Runs `streams` together for `seconds` at one device, the oldest packets first.
/// `latency` is told the cycles of each packet; `each` is called after every turn
/// with the cycles since the start.
pub fn run(
    clock: &Clock,
    bench: &mut Bench,
    streams: &mut [Stream<'_>],
    seconds: f64,
    mut latency: Option<&mut Histogram>,
    mut each: impl FnMut(&mut Bench, u64),
) {
    bench.start_clock(clock);
    let start = clock::cycles();
    let end = clock.cycles_in(seconds);
    loop {
        let elapsed = clock::cycles() - start;
        if elapsed >= end {
            break;
        }
        let total: u64 = streams.iter().map(|stream| stream.backlog(elapsed)).sum();
        if total > DEPTH {
            for stream in streams.iter_mut() {
                let share = u128::from(stream.backlog(elapsed)) * u128::from(total - DEPTH) / u128::from(total);
                stream.lost += u64::try_from(share).unwrap_or(u64::MAX);
            }
        }
        let waiting = streams.iter_mut().filter(|stream| stream.backlog(elapsed) > 0);
        let Some(stream) = waiting.min_by(|a, b| a.head().total_cmp(&b.head())) else {
            bench.idle(clock);
            continue;
        };
        let count = usize::try_from(stream.backlog(elapsed)).unwrap_or(BURST).min(BURST);
        let (first, before) = (stream.head(), stream.taken);
        stream.delivered += bench.turn_of(clock, |pool, burst| stream.take(pool, burst, count));
        let done = clock::cycles() - start;
        if let Some(histogram) = latency.as_deref_mut() {
            for number in 0..stream.taken - before {
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates, and is positive
                histogram.add((done as f64 - first - number as f64 / stream.rate) as u64);
            }
        }
        each(bench, done);
    }
    for stream in streams {
        bench.give_back(&mut stream.waiting);
    }
}

/// Counts of durations in cycles: exact below 64, then 64 steps to each power of two,
/// so that a value is known to 1.6 %.
#[derive(Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

const STEPS: u32 = 64;

impl Histogram {
    /// Without a value.
    pub fn new() -> Self {
        Self { counts: vec![0; 60 * STEPS as usize], total: 0 }
    }

    /// Adds a duration.
    pub fn add(&mut self, cycles: u64) {
        let octave = 64 - (cycles / u64::from(STEPS)).leading_zeros();
        // Below 64 the octave is 0 and the value its own step.
        let step = if octave == 0 { cycles } else { u64::from(STEPS * octave) + (cycles >> (octave - 1)) - u64::from(STEPS) };
        if let Some(count) = self.counts.get_mut(usize::try_from(step).unwrap_or(usize::MAX)) {
            *count += 1;
            self.total += 1;
        }
    }

    /// The duration that the share `part` of all do not exceed.
    pub fn quantile(&self, part: f64) -> u64 {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // between 0 and the total
        let wanted = (self.total as f64 * part).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (step, count) in (0u64..).zip(&self.counts) {
            seen += count;
            if seen >= wanted {
                return upper(step);
            }
        }
        0
    }

    /// Values that were added.
    pub fn total(&self) -> u64 {
        self.total
    }
}

/// The largest duration of a step.
fn upper(step: u64) -> u64 {
    let steps = u64::from(STEPS);
    match step / steps {
        0 => step,
        octave => ((steps + step % steps + 1) << (octave - 1)) - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_step_of_the_value() {
        let mut histogram = Histogram::new();
        (1..=1_000_000).for_each(|cycles| histogram.add(cycles));
        assert_eq!(histogram.total(), 1_000_000);
        for part in [0.000_01, 0.1, 0.5, 0.9, 0.999, 0.999_999, 1.0] {
            let (value, exact) = (histogram.quantile(part) as f64, part * 1e6);
            assert!(value >= exact && value <= exact * 1.02 + 1.0, "{part}: {value}");
        }
    }

    #[test]
    fn every_duration_has_a_step_that_holds_it() {
        for bits in 0..50u32 {
            for cycles in [(1u64 << bits) - 1, 1 << bits, (1 << bits) + 1] {
                let mut histogram = Histogram::new();
                histogram.add(cycles);
                let value = histogram.quantile(1.0);
                assert!(value >= cycles && value as f64 <= cycles as f64 * 1.02, "{cycles}: {value}");
            }
        }
    }
}
