//! A run as one JSON object, with what a reader needs to judge it.

use serde_json::{Map, Value, json};

use super::bench::{Run, Tally, Window};
use super::clock::{self, Clock};
use crate::figure;

/// Facts of the machine that the figures depend on.
pub fn machine(clock: &Clock) -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let mut machine = figure::machine();
    if let Some(fields) = machine.as_object_mut() {
        fields.insert("tsc_mhz".to_owned(), round(clock.hz() / 1e6));
        fields.insert("core_mhz_estimate".to_owned(), round(clock::core_mhz()));
        fields.insert("affinity".to_owned(), affinity(&read("/proc/self/status")).into());
        fields.insert("profile".to_owned(), if cfg!(debug_assertions) { "dev" } else { "release" }.into());
    }
    machine
}

fn affinity(status: &str) -> String {
    status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap_or_default().trim().to_owned()
}

/// The fields that every run has.
pub fn run(clock: &Clock, run: &Run) -> Map<String, Value> {
    let (cycles, source) = (median(&run.windows), median(&run.source));
    let mpps: Vec<f64> = run.windows.iter().map(|window| clock.hz() / window.cycles_per_packet() / 1e6).collect();
    let per_packet: Vec<f64> = run.windows.iter().map(|window| window.cycles_per_packet()).collect();
    let fields = json!({
        "mpps": round(clock.hz() / cycles / 1e6),
        "cycles_per_packet": round(cycles),
        "ns_per_packet": round(cycles / clock.hz() * 1e9),
        "source_cycles_per_packet": round(source),
        "pipeline_cycles_per_packet": round(cycles - source),
        "offered": run.total.offered,
        "delivered": run.total.delivered,
        "dropped": run.total.dropped,
        "dropped_total": run.total.lost(),
        "per_pass": tally(&run.pass),
        "every_pass_alike": run.total == run.pass.times(run.total.offered / run.pass.offered.max(1)),
        "connections": run.connections,
        "allocations": run.allocations,
        "mpps_of_windows": mpps.iter().map(|mpps| round(*mpps)).collect::<Vec<_>>(),
        "windows": {
            "mpps": figure::spread(&mpps, "Mpps"),
            "cycles_per_packet": figure::spread(&per_packet, "TSC cycles"),
        },
    });
    match fields {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

fn tally(tally: &Tally) -> Value {
    json!({ "frames": tally.offered, "delivered": tally.delivered, "dropped": tally.dropped, "dropped_total": tally.lost() })
}

/// The median of the windows, in cycles for each packet.
pub fn median(windows: &[Window]) -> f64 {
    let mut cycles: Vec<f64> = windows.iter().map(|window| window.cycles_per_packet()).collect();
    cycles.sort_by(f64::total_cmp);
    cycles.get(cycles.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The fastest of the windows, in cycles for each packet.
pub fn fastest(windows: &[Window]) -> f64 {
    windows.iter().map(|window| window.cycles_per_packet()).fold(f64::INFINITY, f64::min)
}

/// What the issue asks of a figure, and whether it was met.
#[derive(Debug)]
pub struct Bar {
    what: String,
    asked: Value,
    measured: Value,
    met: bool,
}

impl Bar {
    /// A figure that is to be at least `asked`.
    pub fn at_least(what: &str, asked: f64, measured: f64) -> Self {
        Self { what: format!("{what}, at least"), asked: round(asked), measured: round(measured), met: measured >= asked }
    }

    /// A figure that is to be at most `asked`.
    pub fn at_most(what: &str, asked: f64, measured: f64) -> Self {
        Self { what: format!("{what}, at most"), asked: round(asked), measured: round(measured), met: measured <= asked }
    }

    /// Something that is to be so.
    pub fn is(what: &str, met: bool) -> Self {
        Self { what: what.to_owned(), asked: true.into(), measured: met.into(), met }
    }
}

/// Adds bars to a report, and whether all were met.
pub fn bars(fields: &mut Map<String, Value>, bars: &[Bar]) {
    let list = bars.iter().map(|bar| json!({ "what": bar.what, "asked": bar.asked, "measured": bar.measured, "met": bar.met }));
    fields.insert("bars".to_owned(), list.collect());
    fields.insert("bars_met".to_owned(), bars.iter().all(|bar| bar.met).into());
}

/// A figure with three decimals.
pub fn round(value: f64) -> Value {
    json!((value * 1000.0).round() / 1000.0)
}
