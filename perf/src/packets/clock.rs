//! Time in cycles of the time stamp counter, which ticks at one rate whatever the
//! clock of the core does.
//!
//! Elsewhere than on x86-64 a "cycle" is a nanosecond.

#![allow(unsafe_code)] // reading the counter is an intrinsic.

use std::hint::black_box;
use std::time::{Duration, Instant};

/// The counter and its rate.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    hz: f64,
    /// Nanoseconds of one cycle, as a fraction of 2^32.
    scale: u64,
    start: u64,
}

impl Clock {
    /// Measures the rate of the counter against the system's clock: 50 ms.
    pub fn new() -> Self {
        let (instant, start) = (Instant::now(), cycles());
        while instant.elapsed() < Duration::from_millis(50) {
            std::hint::spin_loop();
        }
        let hz = (cycles() - start) as f64 / instant.elapsed().as_secs_f64();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // about 2^31, far from either end
        let scale = (1e9 / hz * 4_294_967_296.0) as u64;
        Self { hz, scale, start }
    }

    /// Cycles a second.
    pub fn hz(&self) -> f64 {
        self.hz
    }

    /// Cycles in `seconds`.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a run is far shorter than 2^64 cycles
    pub fn cycles_in(&self, seconds: f64) -> u64 {
        (seconds * self.hz) as u64
    }

    /// Time since the clock was made.
    #[inline]
    pub fn now(&self) -> Duration {
        let nanoseconds = (u128::from(cycles() - self.start) * u128::from(self.scale)) >> 32;
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

/// The counter now.
#[cfg(target_arch = "x86_64")]
#[inline]
pub fn cycles() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets processes use it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The counter now.
#[cfg(not(target_arch = "x86_64"))]
pub fn cycles() -> u64 {
    static EPOCH: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    u64::try_from(EPOCH.get_or_init(Instant::now).elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// What the core's own clock is about, in MHz: the best of some runs of a chain of
/// exclusive-or (one cycle) and multiplication (three), each waiting for the one before.
pub fn core_mhz() -> f64 {
    const STEPS: u32 = 1_000_000;
    const CYCLES_PER_STEP: f64 = 4.0;
    let run = || {
        let start = Instant::now();
        let mut value = black_box(1u64);
        for _ in 0..STEPS {
            value = (value ^ 0x9e37_79b9).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        }
        black_box(value);
        f64::from(STEPS) * CYCLES_PER_STEP / start.elapsed().as_secs_f64() / 1e6
    };
    (0..20).map(|_| run()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_agrees_with_the_system() {
        let clock = Clock::new();
        let (instant, before) = (Instant::now(), clock.now());
        std::thread::sleep(Duration::from_millis(20));
        let (ours, theirs) = ((clock.now() - before).as_secs_f64(), instant.elapsed().as_secs_f64());
        assert!((ours / theirs - 1.0).abs() < 0.05, "{ours} against {theirs}");
    }
}
