//! Types of volumes, and what each lets through: the EBS user guide, "Amazon EBS volume types".
//!
//! | type | operations per second | MiB per second |
//! |---|---|---|
//! | gp2 | 3 per GiB, 100 to 16,000; below 3,000 it bursts to 3,000 from 5.4 million credits | 128, above 170 GiB 250 |
//! | gp3 | 3,000 or as bought, to 80,000 | 125 or as bought, to 2,000 |
//! | io1, io2 | as bought, to 64,000 and 256,000 | 1,000 and 4,000 |
//! | st1 | 500 | 40 per TiB, bursts to 250 per TiB (at most 500) from 1 TiB of credit per TiB |
//! | sc1 | 250 | 12 per TiB, bursts to 80 per TiB (at most 250) from 1 TiB of credit per TiB |
//!
//! Knows arithmetic only: no clock and no bucket. Sizes that a type may have are the control plane's to check.

use serde::{Deserialize, Serialize};
use std::str::FromStr;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// Operations that gp2 may save up.
const GP2_CREDITS: u64 = 5_400_000;
const GP2_BURST: u64 = 3_000;

/// A type of volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // the names are EBS's
pub enum VolumeType {
    Gp2,
    Gp3,
    Io1,
    Io2,
    St1,
    Sc1,
}

/// A rate per second, and what may be saved up to go beyond it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rate {
    /// Earned all the time.
    pub base: u64,
    /// The highest rate, and how much of it can be saved; `None`: the base is all.
    pub burst: Option<(u64, u64)>,
}

/// What a volume lets through; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    pub operations: Option<Rate>,
    pub bytes: Option<Rate>,
    /// An operation of more than 1 MiB counts as several; otherwise at 256 KiB.
    pub large_operations: bool,
}

impl VolumeType {
    /// Checks what was bought beside the type: IOPS and MiB per second, zero for "nothing said".
    ///
    /// # Errors
    /// The rule that is broken, as a sentence without its subject.
    pub fn check(self, iops: u32, throughput_mib_s: u32) -> Result<(), &'static str> {
        let within = |value: u32, least: u32, most: u32| value == 0 || (least..=most).contains(&value);
        match self {
            Self::Gp3 if !within(iops, 3_000, 80_000) => Err("of gp3 is 3000 to 80000 operations per second"),
            Self::Gp3 if !within(throughput_mib_s, 125, 2_000) => Err("of gp3 is 125 to 2000 MiB per second"),
            Self::Gp3 => Ok(()),
            _ if throughput_mib_s != 0 => Err("has a throughput that can be chosen for gp3 only"),
            Self::Io1 if iops == 0 || !within(iops, 100, 64_000) => Err("of io1 is 100 to 64000 operations per second"),
            Self::Io2 if iops == 0 || !within(iops, 100, 256_000) => Err("of io2 is 100 to 256000 operations per second"),
            Self::Io1 | Self::Io2 => Ok(()),
            Self::Gp2 | Self::St1 | Self::Sc1 if iops != 0 => Err("has a rate that can be chosen for gp3, io1 and io2 only"),
            Self::Gp2 | Self::St1 | Self::Sc1 => Ok(()),
        }
    }

    /// The limits of a volume of this type.
    pub(crate) fn limits(self, size_bytes: u64, iops: u32, throughput_mib_s: u32) -> Limits {
        let flat = |base: u64| Some(Rate { base, burst: None });
        let or = |value: u32, default: u64| if value == 0 { default } else { u64::from(value) };
        let gib = size_bytes.div_ceil(GIB);
        // Per TiB, so that a volume of half a TiB earns half.
        let share = |mib_per_tib: u64| (size_bytes.div_ceil(1024).saturating_mul(mib_per_tib) / GIB).max(1) * MIB;
        match self {
            Self::Gp2 => {
                let base = gib.saturating_mul(3).clamp(100, 16_000);
                let burst = (base < GP2_BURST).then_some((GP2_BURST, GP2_CREDITS));
                let bytes = flat(if gib <= 170 { 128 * MIB } else { 250 * MIB });
                Limits { operations: Some(Rate { base, burst }), bytes, large_operations: false }
            }
            Self::Gp3 => {
                Limits { operations: flat(or(iops, 3_000)), bytes: flat(or(throughput_mib_s, 125) * MIB), large_operations: false }
            }
            Self::Io1 => Limits { operations: flat(iops.into()), bytes: flat(1_000 * MIB), large_operations: false },
            Self::Io2 => Limits { operations: flat(iops.into()), bytes: flat(4_000 * MIB), large_operations: false },
            Self::St1 | Self::Sc1 => {
                let (operations, base, burst, most) = if self == Self::St1 { (500, 40, 250, 500) } else { (250, 12, 80, 250) };
                let (base, peak) = (share(base).min(most * MIB), share(burst).min(most * MIB));
                let burst = (base < peak).then_some((peak, size_bytes));
                Limits { operations: flat(operations), bytes: Some(Rate { base, burst }), large_operations: true }
            }
        }
    }
}

/// The limits of a volume without a type: what was asked for, zero being none.
pub(crate) fn untyped(iops: u32, throughput_mib_s: u32) -> Limits {
    let rate = |base: u64| (base > 0).then_some(Rate { base, burst: None });
    Limits { operations: rate(iops.into()), bytes: rate(u64::from(throughput_mib_s) * MIB), large_operations: false }
}

impl FromStr for VolumeType {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "gp2" => Self::Gp2,
            "gp3" => Self::Gp3,
            "io1" => Self::Io1,
            "io2" => Self::Io2,
            "st1" => Self::St1,
            "sc1" => Self::Sc1,
            _ => return Err("is gp2, gp3, io1, io2, st1 or sc1"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIB: u64 = 1 << 40;

    #[test]
    fn limits_are_those_of_the_user_guide() {
        use VolumeType::{Gp2, Gp3, Io1, Io2, Sc1, St1};
        let gp2 = Some((3_000, 5_400_000));
        for (kind, size, iops, mib, operations, bytes) in [
            (Gp2, GIB, 0, 0, (100, gp2), (128, None)),
            (Gp2, 100 * GIB, 0, 0, (300, gp2), (128, None)),
            (Gp2, 334 * GIB, 0, 0, (1_002, gp2), (250, None)),
            (Gp2, TIB, 0, 0, (3_072, None), (250, None)),
            (Gp2, 16 * TIB, 0, 0, (16_000, None), (250, None)),
            (Gp3, GIB, 0, 0, (3_000, None), (125, None)),
            (Gp3, GIB, 16_000, 1_000, (16_000, None), (1_000, None)),
            (Io1, TIB, 20_000, 0, (20_000, None), (1_000, None)),
            (Io2, TIB, 100_000, 0, (100_000, None), (4_000, None)),
            (St1, TIB, 0, 0, (500, None), (40, Some((250 * MIB, TIB)))),
            (St1, 2 * TIB, 0, 0, (500, None), (80, Some((500 * MIB, 2 * TIB)))),
            (St1, 12 * TIB + TIB / 2, 0, 0, (500, None), (500, None)),
            (Sc1, TIB, 0, 0, (250, None), (12, Some((80 * MIB, TIB)))),
        ] {
            let limits = kind.limits(size, iops, mib);
            assert_eq!(limits.operations, Some(Rate { base: operations.0, burst: operations.1 }), "{kind:?} {size}");
            assert_eq!(limits.bytes, Some(Rate { base: bytes.0 * MIB, burst: bytes.1 }), "{kind:?} {size}");
        }
        assert_eq!(untyped(0, 0), Limits::default());
    }

    #[test]
    fn what_cannot_be_bought_is_refused() {
        use VolumeType::{Gp2, Gp3, Io1, Io2, Sc1, St1};
        for (kind, iops, mib, good) in [
            (Gp2, 0, 0, true),
            (Gp2, 100, 0, false),
            (Gp2, 0, 200, false),
            (Gp3, 0, 0, true),
            (Gp3, 2_999, 0, false),
            (Gp3, 80_000, 2_000, true),
            (Gp3, 80_001, 0, false),
            (Gp3, 0, 124, false),
            (Io1, 0, 0, false),
            (Io1, 64_000, 0, true),
            (Io1, 64_001, 0, false),
            (Io2, 256_000, 0, true),
            (Io2, 5_000, 500, false),
            (St1, 0, 0, true),
            (Sc1, 1, 0, false),
        ] {
            assert_eq!(kind.check(iops, mib).is_ok(), good, "{kind:?} {iops} {mib}");
        }
    }
}
