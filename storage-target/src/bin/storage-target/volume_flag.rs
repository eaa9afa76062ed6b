//! What `--volume` says: `NAME=SIZE[,type=gp3][,iops=N][,throughput=N][,allow=NQN]...[,ram]`.
//!
//! SIZE is in bytes, or with K, M, G or T behind it in KiB, MiB, GiB or TiB. `allow` may come several times;
//! without it any host may connect. What is not said about a volume that exists stays as it is, and
//! `allow=*` lets any host in again.

use std::str::FromStr;
use storage_target::{Access, VolumeSpec, VolumeType};

/// One `--volume`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeFlag {
    pub name: String,
    pub size_bytes: u64,
    volume_type: Option<VolumeType>,
    iops: Option<u32>,
    throughput_mib_s: Option<u32>,
    allow: Vec<String>,
    ram: bool,
}

impl VolumeFlag {
    /// The volume that it asks for, on top of what is there.
    pub fn over(&self, there: Option<VolumeSpec>) -> VolumeSpec {
        let exists = there.is_some();
        let mut spec = there.unwrap_or_default();
        spec.id.clone_from(&self.name);
        spec.size_bytes = self.size_bytes;
        spec.ram = self.ram;
        if let Some(kind) = self.volume_type {
            // What was bought for another type says nothing about this one.
            if spec.volume_type != Some(kind) {
                (spec.iops, spec.throughput_mib_s) = (0, 0);
            }
            spec.volume_type = Some(kind);
        }
        spec.iops = self.iops.unwrap_or(spec.iops);
        spec.throughput_mib_s = self.throughput_mib_s.unwrap_or(spec.throughput_mib_s);
        if self.allow.iter().any(|host| host == "*") || (!exists && self.allow.is_empty()) {
            spec.access = Access::Shared(Vec::new());
        } else if !self.allow.is_empty() {
            spec.access = Access::Shared(self.allow.clone());
        }
        spec
    }
}

impl FromStr for VolumeFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split(',');
        let head = parts.next().unwrap_or_default();
        let (name, size) = head.split_once('=').ok_or("a volume is NAME=SIZE[,type=gp3][,ram]")?;
        let mut flag = Self {
            name: name.to_owned(),
            size_bytes: size_of(size)?,
            volume_type: None,
            iops: None,
            throughput_mib_s: None,
            allow: Vec::new(),
            ram: false,
        };
        for part in parts {
            let number = |value: &str| value.parse::<u32>().map_err(|_| format!("{part}: not a number"));
            match part.split_once('=') {
                None if part == "ram" => flag.ram = true,
                Some(("type", value)) => flag.volume_type = Some(value.parse().map_err(|rule| format!("type {rule}, not {value}"))?),
                Some(("iops", value)) => flag.iops = Some(number(value)?),
                Some(("throughput", value)) => flag.throughput_mib_s = Some(number(value)?),
                Some(("allow", value)) => flag.allow.push(value.to_owned()),
                _ => return Err(format!("{part}: a volume has type, iops, throughput, allow and ram")),
            }
        }
        Ok(flag)
    }
}

/// A size in bytes, or with a binary suffix.
fn size_of(text: &str) -> Result<u64, String> {
    let bad = || format!("{text}: not a size, such as 512M or 10G");
    let (digits, shift) = match text.strip_suffix(['K', 'k']) {
        Some(digits) => (digits, 10),
        None => match (text.strip_suffix(['M', 'm']), text.strip_suffix(['G', 'g']), text.strip_suffix(['T', 't'])) {
            (Some(digits), _, _) => (digits, 20),
            (_, Some(digits), _) => (digits, 30),
            (_, _, Some(digits)) => (digits, 40),
            _ => (text, 0),
        },
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(bad());
    }
    digits.parse::<u64>().ok().and_then(|count| count.checked_mul(1 << shift)).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bytes_or_have_a_binary_suffix() {
        for (text, size) in [("512", 512), ("4K", 4096), ("3m", 3 << 20), ("10G", 10 << 30), ("2T", 2 << 40)] {
            assert_eq!(size_of(text), Ok(size), "{text}");
        }
        for text in ["", "G", "1.5G", "-1G", "+1G", "1GG", "1X", "18446744073709551616", "99999999999999T"] {
            assert!(size_of(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_not_said_stays_as_it_is() {
        let flag = |text: &str| text.parse::<VolumeFlag>().unwrap();
        let first = flag("data=1G,type=gp3,iops=4000,allow=nqn.a,allow=nqn.b").over(None);
        assert_eq!((first.id.as_str(), first.size_bytes, first.volume_type, first.iops), ("data", 1 << 30, Some(VolumeType::Gp3), 4000));
        assert_eq!(first.access, Access::Shared(vec!["nqn.a".into(), "nqn.b".into()]));
        let grown = flag("data=2G").over(Some(first.clone()));
        assert_eq!(grown, VolumeSpec { size_bytes: 2 << 30, ..first.clone() });
        let open = flag("data=1G,type=gp2,allow=*").over(Some(first));
        assert_eq!((open.access, open.iops, open.volume_type), (Access::Shared(Vec::new()), 0, Some(VolumeType::Gp2)));
        assert_eq!(flag("m=64M,ram").over(None).access, Access::Shared(Vec::new()));
    }

    #[test]
    fn flags_that_cannot_be_are_refused() {
        for text in ["data", "data=", "data=1G,type=gp9", "data=1G,iops=x", "data=1G,color=red", "data=1G,"] {
            assert!(text.parse::<VolumeFlag>().is_err(), "{text}");
        }
    }
}
