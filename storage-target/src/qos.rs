//! What a volume's type lets through: operations and bytes per second, counted as EBS counts them.
//!
//! An operation larger than 256 KiB (on disks of the HDD types 1 MiB) counts as several. Flushes are free.

use crate::volume_type::{Limits, Rate};
use rate_limit::{CreditBucket, TokenBucket};
use std::time::Duration;

/// EBS splits operations on SSD volumes at this size, in bytes.
const SPLIT: u64 = 256 * 1024;
/// And on HDD volumes at this size.
const LARGE_SPLIT: u64 = 1024 * 1024;
/// How much of a second's allowance may go at once: short bursts within it are not stretched.
const BURST_PART: u64 = 10;

/// What one request takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cost {
    bytes: u64,
}

impl Cost {
    /// A read or a write of this many bytes.
    pub fn of_transfer(bytes: u64) -> Self {
        Self { bytes }
    }

    /// A request that moves no data.
    pub fn of_command() -> Self {
        Self { bytes: 0 }
    }
}

#[derive(Debug)]
enum Bucket {
    Flat(TokenBucket),
    Credits(CreditBucket),
}

/// A bucket, and the most that it gives at once.
#[derive(Debug)]
struct Limit {
    bucket: Bucket,
    burst: u64,
}

impl Limit {
    fn new(rate: Rate, least: u64, now: Duration) -> Self {
        let burst_of = |rate: u64| (rate / BURST_PART).max(least);
        match rate.burst {
            None => Self { bucket: Bucket::Flat(TokenBucket::new(rate.base, burst_of(rate.base), now)), burst: burst_of(rate.base) },
            Some((peak, credits)) => {
                let burst = burst_of(peak).min(credits.max(least));
                Self { bucket: Bucket::Credits(CreditBucket::new(rate.base, credits.max(burst), peak, burst, now)), burst }
            }
        }
    }

    /// A request above the burst takes the whole burst, or it would never pass.
    fn wait(&mut self, now: Duration, tokens: u64) -> Duration {
        let tokens = tokens.min(self.burst);
        let wait = match &mut self.bucket {
            Bucket::Flat(bucket) => bucket.wait(now, tokens),
            Bucket::Credits(bucket) => bucket.wait(now, tokens),
        };
        wait.unwrap_or(Duration::ZERO)
    }

    fn take(&mut self, now: Duration, tokens: u64) {
        let tokens = tokens.min(self.burst);
        let _ = match &mut self.bucket {
            Bucket::Flat(bucket) => bucket.take(now, tokens),
            Bucket::Credits(bucket) => bucket.take(now, tokens),
        };
    }
}

/// The two buckets of a volume.
#[derive(Debug)]
pub(crate) struct Qos {
    operations: Option<Limit>,
    bytes: Option<Limit>,
    split: u64,
}

impl Qos {
    pub fn new(limits: Limits, now: Duration) -> Self {
        Self {
            operations: limits.operations.map(|rate| Limit::new(rate, 4, now)),
            bytes: limits.bytes.map(|rate| Limit::new(rate, crate::nvme::MAX_TRANSFER, now)),
            split: if limits.large_operations { LARGE_SPLIT } else { SPLIT },
        }
    }

    /// Whether everything passes at once.
    pub fn is_unlimited(&self) -> bool {
        self.operations.is_none() && self.bytes.is_none()
    }

    fn operations(&self, cost: Cost) -> u64 {
        cost.bytes.div_ceil(self.split).max(1)
    }

    /// How long a request has to wait.
    pub fn wait(&mut self, now: Duration, cost: Cost) -> Duration {
        let operations = self.operations(cost);
        let wait = |limit: &mut Option<Limit>, tokens: u64| limit.as_mut().map_or(Duration::ZERO, |limit| limit.wait(now, tokens));
        wait(&mut self.operations, operations).max(wait(&mut self.bytes, cost.bytes))
    }

    /// Whether it is the operations, and not the bytes, that a request waits for.
    pub fn is_over_operations(&mut self, now: Duration, cost: Cost) -> bool {
        let operations = self.operations(cost);
        let wait = self.wait(now, cost);
        self.operations.as_mut().is_some_and(|limit| limit.wait(now, operations) == wait)
    }

    /// Lets a request through, or says how long it has to wait.
    pub fn admit(&mut self, now: Duration, cost: Cost) -> Result<(), Duration> {
        if self.is_unlimited() {
            return Ok(());
        }
        let wait = self.wait(now, cost);
        if wait > Duration::ZERO {
            return Err(wait);
        }
        let operations = self.operations(cost);
        for (limit, tokens) in [(&mut self.operations, operations), (&mut self.bytes, cost.bytes)] {
            if let Some(limit) = limit {
                limit.take(now, tokens);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume_type::{VolumeType, untyped};

    /// Sends `cost` for `seconds` of simulated time, as fast as is let through.
    fn passed(mut qos: Qos, cost: Cost, seconds: u64) -> u64 {
        let (mut now, mut count) = (Duration::ZERO, 0);
        while now < Duration::from_secs(seconds) {
            match qos.admit(now, cost) {
                Ok(()) => count += 1,
                Err(wait) => now += wait,
            }
        }
        count
    }

    #[test]
    fn a_minute_of_load_gets_the_rate_within_one_percent() {
        for (iops, throughput, bytes, expected) in [
            (3000, 0, 4096, 3000 * 60),
            (3000, 125, 4096, 3000 * 60),
            (0, 125, 128 * 1024, 125 * 8 * 60),
            (3000, 0, 1 << 20, 3000 / 4 * 60),
        ] {
            let count = passed(Qos::new(untyped(iops, throughput), Duration::ZERO), Cost::of_transfer(bytes), 60);
            assert!(count.abs_diff(expected) <= expected / 100, "{iops} {throughput} {bytes}: {count}");
        }
    }

    #[test]
    fn zero_is_no_limit() {
        let mut qos = Qos::new(untyped(0, 0), Duration::ZERO);
        assert!((0..1_000_000).all(|_| qos.admit(Duration::ZERO, Cost::of_transfer(1 << 20)).is_ok()));
    }

    #[test]
    fn the_largest_request_passes_the_smallest_limit() {
        assert!(passed(Qos::new(untyped(1, 1), Duration::ZERO), Cost::of_transfer(1 << 20), 30) >= 7);
    }

    #[test]
    fn gp2_bursts_until_its_credits_are_gone_and_then_earns() {
        // 100 GiB earn 300 a second and burst to 3,000: the credits last for 2,000 seconds.
        let limits = || VolumeType::Gp2.limits(100 << 30, 0, 0);
        for (seconds, expected) in [(60, 3_000 * 60), (1_990, 3_000 * 1_990), (4_000, 5_400_000 + 300 * 4_000)] {
            let count = passed(Qos::new(limits(), Duration::ZERO), Cost::of_transfer(4096), seconds);
            assert!(count.abs_diff(expected) <= expected / 100, "{seconds} s: {count}");
        }
    }

    #[test]
    fn disks_of_the_hdd_types_count_operations_of_a_mebibyte() {
        let limits = VolumeType::St1.limits(2 << 40, 0, 0);
        let count = passed(Qos::new(limits, Duration::ZERO), Cost::of_transfer(1 << 20), 20);
        assert!(count.abs_diff(500 * 20) <= 100, "{count}");
    }
}
