//! What an instance may send and receive: bandwidth with credits each way, packets
//! a second both ways together, tracked connections. Its ports share it. Time is an
//! argument.
//!
//! Above the allowance a packet is dropped under the name that EC2's driver counts
//! it by (`bw_in_allowance_exceeded` and so on). Nothing is queued here: the guest's
//! own queue and TCP do that.

use std::time::Duration;

use rate_limit::{CreditBucket, TokenBucket};

use crate::Limits;
use crate::counters::DropReason;
use crate::flow::Direction;

/// Time at full rate that may pass at once, so that TCP sees a link and not a wall.
const BURST: Duration = Duration::from_millis(20);
/// And at least this much: some frames of the largest size, in bits.
const BURST_MIN_BITS: u64 = 16 * 9216 * 8;
/// Packets that may pass at once: the same time.
const BURST_MIN_PACKETS: u64 = 64;

/// What is left for one instance.
#[derive(Debug)]
pub struct Allowance {
    limits: Limits,
    ingress: Option<CreditBucket>,
    egress: Option<CreditBucket>,
    packets: Option<TokenBucket>,
}

impl Allowance {
    /// A whole allowance, credits included, as an instance has it at its start.
    #[must_use]
    pub fn new(limits: &Limits, now: Duration) -> Self {
        let bits = || {
            let peak = limits.burst_bits_per_s.max(limits.baseline_bits_per_s);
            let burst = at_once(peak).max(BURST_MIN_BITS);
            let balance = limits.credit_bits.saturating_add(burst);
            (limits.baseline_bits_per_s > 0).then(|| CreditBucket::new(limits.baseline_bits_per_s, balance, peak, burst, now))
        };
        let packets = || TokenBucket::new(limits.packets_per_s, at_once(limits.packets_per_s).max(BURST_MIN_PACKETS), now);
        Self { limits: *limits, ingress: bits(), egress: bits(), packets: (limits.packets_per_s > 0).then(packets) }
    }

    /// What it was made of.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Takes a frame of `bytes` out of it.
    ///
    /// # Errors
    /// The limit that it exceeds; nothing of that one is taken then.
    pub fn take(&mut self, now: Duration, direction: Direction, bytes: usize) -> Result<(), DropReason> {
        let (bandwidth, reason) = match direction {
            Direction::Ingress => (&mut self.ingress, DropReason::BandwidthIn),
            Direction::Egress => (&mut self.egress, DropReason::BandwidthOut),
        };
        if self.packets.as_mut().is_some_and(|packets| !packets.take(now, 1)) {
            return Err(DropReason::PacketRate);
        }
        let bits = (bytes as u64).saturating_mul(8);
        if bandwidth.as_mut().is_some_and(|bandwidth| !bandwidth.take(now, bits)) { Err(reason) } else { Ok(()) }
    }

    /// Connections that may still be tracked beside `tracked` ones; `None` without a limit.
    #[must_use]
    pub fn connections_left(&self, tracked: u32) -> Option<u32> {
        (self.limits.connections > 0).then(|| self.limits.connections.saturating_sub(tracked))
    }
}

/// What a rate gives in the time of a burst.
fn at_once(rate_per_s: u64) -> u64 {
    rate_per_s / (1000 / u64::try_from(BURST.as_millis()).unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        baseline_bits_per_s: 100_000_000,
        burst_bits_per_s: 1_000_000_000,
        credit_bits: 500_000_000,
        packets_per_s: 0,
        connections: 0,
    };

    /// Bits that pass in each second when 2 Gbit/s are offered.
    fn offered(allowance: &mut Allowance, direction: Direction, seconds: u64) -> Vec<u64> {
        (0..seconds)
            .map(|second| {
                let frames = (0..166_666u64).filter(|n| {
                    let now = Duration::from_secs(second) + Duration::from_nanos(n * 6000);
                    allowance.take(now, direction, 1500).is_ok()
                });
                frames.count() as u64 * 12_000
            })
            .collect()
    }

    #[test]
    fn credits_carry_the_peak_and_then_the_baseline_is_left_each_way() {
        let mut allowance = Allowance::new(&LIMITS, Duration::ZERO);
        for direction in [Direction::Egress, Direction::Ingress] {
            let passed = offered(&mut allowance, direction, 3);
            assert!((600_000_000..=650_000_000).contains(&passed[0]), "credits, baseline and burst: {passed:?}");
            assert!((99_000_000..=101_000_000).contains(&passed[2]), "{passed:?}");
        }
        assert_eq!(allowance.take(Duration::from_secs(3), Direction::Egress, 20_000_000), Err(DropReason::BandwidthOut));
        assert_eq!(allowance.take(Duration::from_secs(3), Direction::Ingress, 20_000_000), Err(DropReason::BandwidthIn));
    }

    #[test]
    fn packets_are_counted_both_ways_together() {
        let mut allowance = Allowance::new(&Limits { packets_per_s: 1000, baseline_bits_per_s: 0, ..LIMITS }, Duration::ZERO);
        let directions = [Direction::Egress, Direction::Ingress];
        let passed = (0..10_000u64).filter(|n| {
            let now = Duration::from_micros(n * 100);
            allowance.take(now, directions[usize::from(n % 2 == 0)], 60).is_ok()
        });
        let passed = passed.count();
        assert!((1000..=1064).contains(&passed), "{passed}");
        let second = Duration::from_secs(1);
        while allowance.take(second, Direction::Ingress, 60).is_ok() {}
        assert_eq!(allowance.take(second, Direction::Egress, 60), Err(DropReason::PacketRate));
    }

    #[test]
    fn connections_are_left_down_to_none() {
        let allowance = Allowance::new(&Limits { connections: 10, ..LIMITS }, Duration::ZERO);
        assert_eq!([0, 9, 10, 11].map(|tracked| allowance.connections_left(tracked)), [Some(10), Some(1), Some(0), Some(0)]);
        assert_eq!(Allowance::new(&LIMITS, Duration::ZERO).connections_left(7), None);
    }
}
