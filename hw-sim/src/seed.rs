//! Chance in tests: a printed seed that replays.

/// A random sequence (`SplitMix64`). `CARDINAL_SEED` replays a printed one.
#[derive(Debug)]
pub struct Seed(u64);

impl Seed {
    /// A seed from the environment or the clock, printed.
    #[must_use]
    pub fn new() -> Self {
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let seed = match std::env::var("CARDINAL_SEED").ok().and_then(|text| text.parse().ok()) {
            Some(seed) => seed,
            None => clock.as_secs().wrapping_mul(1_000_003) ^ u64::from(clock.subsec_nanos()),
        };
        println!("seed: CARDINAL_SEED={seed}");
        Self(seed)
    }

    /// The next 64 bits.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.word() % bound.max(1)
    }

    /// `count` random bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.word().to_le_bytes()[0]).collect()
    }
}

impl Default for Seed {
    fn default() -> Self {
        Self::new()
    }
}
