//! What the compiler does not find by itself: compare 32 tags at once, and fetch a
//! cache line before it is needed. It knows words and addresses, nothing of flows.
//!
//! Each has a plain version, for machines without the instruction and as the
//! definition that the tests compare with.

#![allow(unsafe_code)]

use bytemuck::Zeroable;

/// Tags of one group.
pub(crate) const WAYS: usize = 32;

/// 32 tags of 16 bits in one cache line, four to a word, the first in the lowest bits.
#[derive(Debug, Clone, Copy, Default, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Tags([u64; WAYS / 4]);

impl Tags {
    /// Sets the tag of one way.
    pub(crate) fn set(&mut self, way: usize, tag: u16) {
        let shift = (way & 3) * 16;
        if let Some(word) = self.0.get_mut(way >> 2) {
            *word = *word & !(0xffff << shift) | u64::from(tag) << shift;
        }
    }

    /// The ways whose tag equals `tag`: bit 0 for the first.
    #[inline]
    pub(crate) fn matching(&self, tag: u16) -> u32 {
        #[cfg(target_arch = "x86_64")]
        {
            // SAFETY: every x86-64 processor has SSE2.
            unsafe { self.matching_sse2(tag) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self.matching_plain(tag)
        }
    }

    /// Whole words are compared: a lane of `differs` is zero where the tag is equal,
    /// and the addition carries into the top bit of every lane where it is not.
    #[cfg_attr(all(target_arch = "x86_64", not(test)), allow(dead_code))]
    fn matching_plain(&self, tag: u16) -> u32 {
        const LOW: u64 = 0x7fff_7fff_7fff_7fff;
        let wanted = u64::from(tag) * 0x0001_0001_0001_0001;
        self.0.iter().rev().fold(0, |ways, word| {
            let differs = word ^ wanted;
            let equal = !((differs & LOW).wrapping_add(LOW) | differs | LOW) >> 15;
            // Bits 0, 16, 32 and 48 become bits 0 to 3.
            let nibble = equal | equal >> 15 | equal >> 30 | equal >> 45;
            ways << 4 | u32::try_from(nibble & 0xf).unwrap_or(0)
        })
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "sse2")]
    #[inline]
    fn matching_sse2(&self, tag: u16) -> u32 {
        use std::arch::x86_64::{_mm_cmpeq_epi16, _mm_movemask_epi8, _mm_packs_epi16, _mm_set_epi64x, _mm_set1_epi16};
        let wanted = _mm_set1_epi16(tag.cast_signed());
        let equal = |low: u64, high: u64| _mm_cmpeq_epi16(_mm_set_epi64x(high.cast_signed(), low.cast_signed()), wanted);
        let [a, b, c, d, e, f, g, h] = self.0;
        let first = _mm_movemask_epi8(_mm_packs_epi16(equal(a, b), equal(c, d)));
        let second = _mm_movemask_epi8(_mm_packs_epi16(equal(e, f), equal(g, h)));
        first.cast_unsigned() | second.cast_unsigned() << 16
    }
}

/// Asks for the cache line that `target` begins in; it arrives while other work is done.
#[inline]
pub(crate) fn prefetch<T>(target: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction is a hint that never faults, and every x86-64 processor has it.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(std::ptr::from_ref(target).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = target;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_ways_with_the_tag_match_in_both_versions() {
        const SOME: [u16; 6] = [0, 1, 0x7fff, 0x8000, 0xffff, 0x8001];
        let mut state = 3u64;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize
        };
        for _ in 0..20_000 {
            let mut tags = Tags::default();
            let mut plain = [0u16; WAYS];
            for (way, cell) in plain.iter_mut().enumerate() {
                *cell = SOME[draw() % 6];
                tags.set(way, *cell);
            }
            for tag in SOME.into_iter().chain([77]) {
                let expected = (0..WAYS).filter(|way| plain[*way] == tag).fold(0u32, |ways, way| ways | 1 << way);
                assert_eq!(tags.matching_plain(tag), expected);
                assert_eq!(tags.matching(tag), expected);
            }
        }
    }
}
