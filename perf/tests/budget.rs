//! The budgets of `perf/budget.toml`, held against a run of now.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::process::Command;

use serde_json::Value;

fn budget() -> toml::Table {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/budget.toml")).unwrap().parse().unwrap()
}

/// The ratio of the first run that keeps within `allowed`, else the lowest: other
/// work on the machine only adds to a ratio.
fn ratio(case: &str, allowed: f64, read: impl Fn(&Value) -> f64) -> f64 {
    let run = || {
        let output = Command::new(env!("CARGO_BIN_EXE_perf")).args(["packets", "--case", case, "--seconds", "0.3"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        read(&serde_json::from_slice(&output.stdout).unwrap())
    };
    let mut lowest = f64::INFINITY;
    for _ in 0..8 {
        lowest = lowest.min(run());
        if lowest <= allowed {
            break;
        }
    }
    lowest
}

#[test]
fn established_packets_keep_their_budget() {
    let budget = &budget()["packets"]["established-16k"];
    let allowed = budget["pipeline_to_reference"].as_float().unwrap();
    let ratio = ratio("established-16k", allowed, |report| {
        assert_eq!(report["allocations"], budget["allocations"].as_integer().unwrap());
        report["reference"]["pipeline_to_reference"].as_f64().unwrap()
    });
    assert!(ratio > 0.0 && ratio <= allowed, "{ratio} times the reference, and {allowed} is the budget");
}

#[test]
fn new_connections_keep_their_budget() {
    let allowed = budget()["packets"]["connections"]["new_to_established"].as_float().unwrap();
    let ratio = ratio("connections", allowed, |report| report["new_to_established"].as_f64().unwrap());
    assert!(ratio > 0.0 && ratio <= allowed, "{ratio} times a packet of a known connection, and {allowed} is the budget");
}
