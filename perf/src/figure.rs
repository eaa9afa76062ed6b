//! A figure: its samples, their median and spread, and where it was taken.

use serde_json::{Value, json};

/// Median, smallest and largest of some samples.
pub fn spread(samples: &[f64], unit: &str) -> Value {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |index: usize| sorted.get(index).map(|value| (value * 1000.0).round() / 1000.0);
    json!({ "median": at(sorted.len() / 2), "min": at(0), "max": at(sorted.len().saturating_sub(1)), "samples": sorted.len(), "unit": unit })
}

/// What the figures of one report have in common.
pub fn report(name: &str, figures: Value) -> Value {
    json!({ "figure": name, "commit": git_commit(), "machine": machine(), "figures": figures })
}

/// Where figures were taken.
pub fn machine() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name").and_then(|rest| rest.split(": ").nth(1))).unwrap_or("unknown");
    json!({
        "cpu": model,
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load": read("/proc/loadavg").split(' ').next().unwrap_or_default(),
    })
}

/// Now, in UTC, as RFC 3339 writes it.
pub fn date() -> String {
    let output = std::process::Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

/// The commit of the working directory.
pub fn git_commit() -> String {
    let output = std::process::Command::new("git").args(["describe", "--always", "--dirty"]).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}
