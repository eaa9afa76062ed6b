//! What a volume did since the target started, as log pages 02h and D0h tell it.

use std::time::Duration;

/// Bins of a latency histogram: the first below 1 us, each of the others twice as wide as the one before.
pub(crate) const BINS: usize = 32;

/// One direction.
#[derive(Debug, Clone, Default)]
pub(crate) struct Direction {
    pub operations: u64,
    pub bytes: u64,
    /// Sum over all operations.
    pub time_us: u64,
    pub bins: [u32; BINS],
}

impl Direction {
    /// One operation that ended well.
    pub fn add(&mut self, bytes: u64, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.operations += 1;
        self.bytes += bytes;
        self.time_us = self.time_us.saturating_add(us);
        let bin = crate::bytes::narrow((u64::BITS - us.leading_zeros()).into()).min(BINS - 1);
        if let Some(count) = self.bins.get_mut(bin) {
            *count = count.saturating_add(1);
        }
    }
}

/// Both directions, and what went wrong or was held back.
#[derive(Debug, Clone, Default)]
pub(crate) struct Traffic {
    pub reads: Direction,
    pub writes: Direction,
    /// How long requests waited for the volume's operations per second.
    pub over_iops_us: u64,
    /// And for its bytes per second.
    pub over_throughput_us: u64,
    /// Blocks that could not be read or written.
    pub media_errors: u64,
}

/// The bounds of a bin, in microseconds: at least the first, below the second.
pub(crate) fn bin_bounds(bin: usize) -> (u64, u64) {
    let power = |exponent: usize| 1_u64.checked_shl(crate::bytes::narrow32(exponent)).unwrap_or(u64::MAX);
    if bin == 0 { (0, 1) } else { (power(bin - 1), power(bin)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_lands_in_the_bin_of_its_latency() {
        for us in [0, 1, 2, 3, 4, 100, 1_000_000, u64::from(u32::MAX)] {
            let mut direction = Direction::default();
            direction.add(512, Duration::from_micros(us));
            let bin = direction.bins.iter().position(|count| *count == 1).unwrap();
            let (lower, upper) = bin_bounds(bin);
            assert!(lower <= us && (us < upper || bin == BINS - 1), "{us} us in {lower}..{upper}");
        }
    }
}
