//! Latencies in buckets that are at most 1.6 % wide, without an allocation per sample.

/// Each power of two is cut into this many buckets.
const PARTS: usize = 64;
const PART_BITS: u32 = PARTS.trailing_zeros();

/// Counts by nanoseconds.
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Histogram {
    /// Nothing counted.
    pub fn new() -> Self {
        Self { counts: vec![0; 64 * PARTS], total: 0 }
    }

    /// Counts one.
    pub fn add(&mut self, ns: u64) {
        if let Some(count) = self.counts.get_mut(bucket(ns)) {
            *count += 1;
            self.total += 1;
        }
    }

    /// The latency that this part of all samples did not exceed; zero without samples.
    pub fn quantile_ns(&self, part: f64) -> u64 {
        let mut left = (self.total as f64 * part).ceil().max(1.0);
        for (index, count) in self.counts.iter().enumerate() {
            left -= *count as f64;
            if left <= 0.0 {
                return middle(index);
            }
        }
        0
    }
}

fn bucket(ns: u64) -> usize {
    let magnitude = (u64::BITS - ns.leading_zeros()).saturating_sub(PART_BITS + 1);
    // Below two times PARTS each value has its own bucket.
    let offset = usize::try_from(ns >> magnitude).unwrap_or(usize::MAX);
    usize::try_from(magnitude).unwrap_or(usize::MAX) * PARTS + offset
}

/// The value in the middle of a bucket.
fn middle(index: usize) -> u64 {
    let magnitude = (index / PARTS).saturating_sub(1);
    let offset = (index - magnitude * PARTS) as u64;
    (offset << magnitude) + (1_u64 << magnitude) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_two_percent() {
        let mut histogram = Histogram::new();
        (1..=100_000_u64).for_each(|us| histogram.add(us * 1000));
        for (part, expected) in [(0.5, 50_000_000.0), (0.99, 99_000_000.0), (0.999, 99_900_000.0), (1.0, 100_000_000.0)] {
            let found = histogram.quantile_ns(part) as f64;
            assert!((found / expected - 1.0).abs() < 0.02, "{part}: {found}");
        }
    }

    #[test]
    fn every_value_has_a_bucket_that_is_near_it() {
        for ns in [0, 1, 63, 64, 127, 128, 129, 1 << 20, (1 << 20) + 17, u64::MAX / 2] {
            let found = middle(bucket(ns));
            assert!(found.abs_diff(ns) <= ns / 64, "{ns}: {found}");
        }
    }
}
