//! This process on all processors under the ordinary scheduler, and back to what it
//! was started with when dropped.

use std::fs;

use anyhow::Context;

use super::switch::run;

/// How the process was scheduled before.
pub struct Ordinary {
    affinity: String,
    realtime: Option<String>,
}

impl Ordinary {
    /// Leaves real-time scheduling and affinity.
    pub fn enter() -> anyhow::Result<Self> {
        let status = fs::read_to_string("/proc/self/status")?;
        let affinity = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).context("no affinity in /proc")?;
        let scheduling = fs::read_to_string("/proc/self/stat")?;
        // Behind the name: field 40 is the real-time priority, 41 the policy.
        let fields: Vec<&str> = scheduling.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
        let (priority, policy) = (fields.get(37).copied().unwrap_or("0"), fields.get(38).copied().unwrap_or("0"));
        let before = Self { affinity: affinity.trim().to_owned(), realtime: (policy == "1").then(|| priority.to_owned()) };
        let own = std::process::id().to_string();
        let all = fs::read_to_string("/sys/devices/system/cpu/online")?;
        run("chrt", &["-o", "-p", "0", &own])?;
        run("taskset", &["-c", "-p", all.trim(), &own])?;
        Ok(before)
    }
}

impl Drop for Ordinary {
    fn drop(&mut self) {
        let own = std::process::id().to_string();
        let _ = run("taskset", &["-c", "-p", &self.affinity, &own]);
        if let Some(priority) = &self.realtime {
            let _ = run("chrt", &["-f", "-p", priority, &own]);
        }
    }
}
