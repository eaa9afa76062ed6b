//! What a volume's type lets through: operations and bytes per second, counted as EBS counts them.
//!
//! An operation larger than 256 KiB counts as several. Zero as a limit means none. Flushes are free.

use rate_limit::TokenBucket;
use std::time::Duration;

/// EBS splits operations on SSD volumes at this size, in bytes.
const SPLIT: u64 = 256 * 1024;
/// How much of a second's allowance may go at once: short bursts within it are not stretched.
const BURST_PART: u64 = 10;

/// What one request takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cost {
    operations: u64,
    bytes: u64,
}

impl Cost {
    /// A read or a write of this many bytes.
    pub fn of_transfer(bytes: u64) -> Self {
        Self { operations: bytes.div_ceil(SPLIT).max(1), bytes }
    }

    /// A request that moves no data.
    pub fn of_command() -> Self {
        Self { operations: 1, bytes: 0 }
    }
}

/// The two buckets of a volume.
#[derive(Debug)]
pub(crate) struct Qos {
    operations: Option<(TokenBucket, u64)>,
    bytes: Option<(TokenBucket, u64)>,
}

impl Qos {
    pub fn new(iops: u32, throughput_mib_s: u32, now: Duration) -> Self {
        let bucket = |rate: u64, least: u64| {
            let burst = (rate / BURST_PART).max(least);
            (rate > 0).then(|| (TokenBucket::new(rate, burst, now), burst))
        };
        Self { operations: bucket(iops.into(), 4), bytes: bucket(u64::from(throughput_mib_s) << 20, crate::nvme::MAX_TRANSFER) }
    }

    /// How long a request has to wait.
    pub fn wait(&mut self, now: Duration, cost: Cost) -> Duration {
        let wait = |bucket: &mut Option<(TokenBucket, u64)>, tokens: u64| {
            // A request above the burst takes the whole burst, or it would never pass.
            bucket.as_mut().map_or(Duration::ZERO, |(bucket, burst)| bucket.wait(now, tokens.min(*burst)).unwrap_or(Duration::ZERO))
        };
        wait(&mut self.operations, cost.operations).max(wait(&mut self.bytes, cost.bytes))
    }

    /// Lets a request through, or says how long it has to wait.
    pub fn admit(&mut self, now: Duration, cost: Cost) -> Result<(), Duration> {
        let wait = self.wait(now, cost);
        if wait > Duration::ZERO {
            return Err(wait);
        }
        for (bucket, tokens) in [(&mut self.operations, cost.operations), (&mut self.bytes, cost.bytes)] {
            if let Some((bucket, burst)) = bucket {
                let _ = bucket.take(now, tokens.min(*burst));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            let count = passed(Qos::new(iops, throughput, Duration::ZERO), Cost::of_transfer(bytes), 60);
            assert!(count.abs_diff(expected) <= expected / 100, "{iops} {throughput} {bytes}: {count}");
        }
    }

    #[test]
    fn zero_is_no_limit() {
        let mut qos = Qos::new(0, 0, Duration::ZERO);
        assert!((0..1_000_000).all(|_| qos.admit(Duration::ZERO, Cost::of_transfer(1 << 20)).is_ok()));
    }

    #[test]
    fn the_largest_request_passes_the_smallest_limit() {
        assert!(passed(Qos::new(1, 1, Duration::ZERO), Cost::of_transfer(1 << 20), 30) >= 7);
    }
}
