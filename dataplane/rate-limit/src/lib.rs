//! Token buckets, pure: time is an argument, arithmetic is integer.
//!
//! A bucket fills with `rate_per_s` tokens a second up to `burst`; who takes
//! tokens may go on, who finds too few waits or is refused. Tokens are packets,
//! operations or bytes, as the owner likes.
//!
//! [`CreditBucket`] adds the credits of EC2 and EBS: the baseline is earned all the
//! time and saved up to a balance, and the balance may be spent at up to a peak rate.
//!
//! Invariant: over any interval `t`, a bucket gives at most
//! `burst + rate_per_s * t` tokens. Time that runs backwards adds nothing.

use std::time::Duration;

/// The level is kept in billionths of a token, so that no nanosecond is lost.
const SCALE: u128 = 1_000_000_000;

/// A token bucket.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    rate_per_s: u64,
    burst: u64,
    level: u128,
    updated: Duration,
}

impl TokenBucket {
    /// A full bucket. `now` counts from any fixed moment, the same for all calls.
    #[must_use]
    pub fn new(rate_per_s: u64, burst: u64, now: Duration) -> Self {
        Self { rate_per_s, burst, level: u128::from(burst) * SCALE, updated: now }
    }

    /// Takes `tokens` if that many are there, and says whether it did.
    #[must_use]
    pub fn take(&mut self, now: Duration, tokens: u64) -> bool {
        self.fill(now);
        let cost = u128::from(tokens) * SCALE;
        let enough = cost <= self.level;
        if enough {
            self.level -= cost;
        }
        enough
    }

    /// Time until `tokens` will be there if nobody takes any: zero when they are
    /// there now, `None` when they never will be.
    #[must_use]
    pub fn wait(&mut self, now: Duration, tokens: u64) -> Option<Duration> {
        self.fill(now);
        let missing = (u128::from(tokens) * SCALE).saturating_sub(self.level);
        if missing == 0 {
            return Some(Duration::ZERO);
        }
        if tokens > self.burst || self.rate_per_s == 0 {
            return None;
        }
        Some(Duration::from_nanos(missing.div_ceil(u128::from(self.rate_per_s)).try_into().unwrap_or(u64::MAX)))
    }

    /// Whole tokens that are there now.
    #[must_use]
    pub fn available(&mut self, now: Duration) -> u64 {
        self.fill(now);
        u64::try_from(self.level / SCALE).unwrap_or(u64::MAX)
    }

    /// Changes rate and burst; tokens already there stay, up to the new burst.
    pub fn set(&mut self, now: Duration, rate_per_s: u64, burst: u64) {
        self.fill(now);
        self.rate_per_s = rate_per_s;
        self.burst = burst;
        self.level = self.level.min(u128::from(burst) * SCALE);
    }

    fn fill(&mut self, now: Duration) {
        if let Some(elapsed) = now.checked_sub(self.updated) {
            let earned = u128::from(self.rate_per_s).saturating_mul(elapsed.as_nanos());
            self.level = self.level.saturating_add(earned).min(u128::from(self.burst) * SCALE);
            self.updated = now;
        }
    }
}

/// A bucket with a baseline, a balance of saved credits, and a peak at which the
/// balance may be spent.
#[derive(Debug, Clone)]
pub struct CreditBucket {
    peak: TokenBucket,
    balance: TokenBucket,
}

impl CreditBucket {
    /// A bucket with a full balance of `credits`, that earns `baseline_per_s` and
    /// spends at most `peak_per_s`, with `burst` tokens at once.
    #[must_use]
    pub fn new(baseline_per_s: u64, credits: u64, peak_per_s: u64, burst: u64, now: Duration) -> Self {
        Self { peak: TokenBucket::new(peak_per_s, burst, now), balance: TokenBucket::new(baseline_per_s, credits, now) }
    }

    /// Takes `tokens` if both peak and balance allow them now.
    #[must_use]
    pub fn take(&mut self, now: Duration, tokens: u64) -> bool {
        let allowed = self.wait(now, tokens) == Some(Duration::ZERO);
        allowed && self.peak.take(now, tokens) && self.balance.take(now, tokens)
    }

    /// Time until `tokens` may be taken, as [`TokenBucket::wait`].
    #[must_use]
    pub fn wait(&mut self, now: Duration, tokens: u64) -> Option<Duration> {
        Some(self.peak.wait(now, tokens)?.max(self.balance.wait(now, tokens)?))
    }

    /// Credits saved now.
    #[must_use]
    pub fn credits(&mut self, now: Duration) -> u64 {
        self.balance.available(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn a_full_bucket_gives_its_burst_and_then_its_rate() {
        let mut bucket = TokenBucket::new(1000, 10, Duration::ZERO);
        assert!(bucket.take(Duration::ZERO, 10));
        assert!(!bucket.take(Duration::ZERO, 1));
        let taken = (1..=1_000_000u64).filter(|us| bucket.take(Duration::from_micros(*us), 1)).count();
        assert_eq!(taken, 1000);
    }

    #[test]
    fn wait_names_the_first_moment_at_which_take_succeeds() {
        let mut bucket = TokenBucket::new(3, 5, Duration::ZERO);
        assert!(bucket.take(Duration::ZERO, 5));
        let wait = bucket.wait(Duration::ZERO, 2).unwrap();
        assert!(!bucket.clone().take(wait - Duration::from_nanos(1), 2));
        assert!(bucket.take(wait, 2));
        assert_eq!(bucket.wait(wait, 6), None, "more than the burst never comes");
    }

    #[test]
    fn idle_time_earns_no_more_than_the_burst_and_time_running_back_earns_nothing() {
        let mut bucket = TokenBucket::new(u64::MAX, u64::MAX, Duration::ZERO);
        assert!(bucket.take(Duration::MAX, u64::MAX), "no overflow at the extremes");
        let mut bucket = TokenBucket::new(10, 20, 100 * S);
        assert!(bucket.take(100 * S, 20));
        assert_eq!(bucket.available(50 * S), 0);
        assert_eq!(bucket.available(1000 * S), 20);
    }

    #[test]
    fn a_new_rate_keeps_what_was_earned() {
        let mut bucket = TokenBucket::new(10, 20, Duration::ZERO);
        assert!(bucket.take(Duration::ZERO, 20));
        bucket.set(S, 100, 5);
        assert_eq!(bucket.available(S), 5);
        assert!(bucket.take(S, 5));
        assert_eq!(bucket.available(2 * S), 5);
        bucket.set(2 * S, 0, 5);
        assert!(bucket.take(2 * S, 5));
        assert_eq!(bucket.wait(2 * S, 1), None);
    }

    #[test]
    fn credits_are_spent_at_the_peak_until_only_the_baseline_is_left() {
        // A gp2 volume in small: baseline 100, peak 3000, 5400 credits.
        let mut bucket = CreditBucket::new(100, 5400, 3000, 30, Duration::ZERO);
        let mut per_second = [0u32; 4];
        for tick in 0..400_000u64 {
            let now = Duration::from_micros(10 * tick);
            if bucket.take(now, 1) {
                per_second[usize::try_from(now.as_secs()).unwrap()] += 1;
            }
        }
        assert!((3000..=3030).contains(&per_second[0]), "{per_second:?}");
        assert!((2500..=2700).contains(&per_second[1]), "{per_second:?}");
        assert!((95..=105).contains(&per_second[3]), "{per_second:?}");
        assert!(bucket.credits(4 * S) <= 1);
        assert!((1000..=1001).contains(&bucket.credits(14 * S)));
        assert_eq!(bucket.credits(1000 * S), 5400);
    }
}
