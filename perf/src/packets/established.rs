//! Cases about connections that exist: how fast their packets pass, and what
//! memory they hold.

use serde_json::{Map, Value, json};

use super::bench::Bench;
use super::case;
use super::clock::Clock;
use super::frame::ENCAPSULATION;
use super::generate::{Shape, Size};
use super::page::Point;
use super::reference;
use super::report::{self, Bar};

/// What each established case promises, in packets a second.
fn bar(load: case::Load) -> Option<f64> {
    match load {
        case::Load::Established16k => Some(20.0),
        case::Load::Established1m => Some(12.0),
        _ => None,
    }
}

/// Connections of a case where nothing else is asked for.
pub fn connections(load: case::Load) -> u32 {
    if load == case::Load::Established1m { 1 << 20 } else { 1 << 14 }
}

/// Runs an established case. The bar counts at 64 bytes and the case's own number
/// of connections.
pub fn run(clock: &Clock, load: case::Load, shape: Shape, seconds: f64, windows: usize) -> Map<String, Value> {
    let mut source = shape.source();
    let before = resident_bytes();
    let mut bench = Bench::new(&shape.world());
    let run = bench.run(clock, &mut source, windows, seconds / windows as f64);
    let memory = resident_bytes() - before;
    let mut fields = report::run(clock, &run);
    fields.insert("cores_for_100_gbps".to_owned(), cores(clock, &shape, report::median(&run.windows)));
    fields.insert("memory".to_owned(), memory_of(memory, run.connections));
    fields.insert("tracked_all".to_owned(), (run.connections == u64::from(shape.connections)).into());
    let (cycles, ratio) = reference::compare(clock, &mut bench, &mut source, &run, seconds / windows as f64 / 5.0);
    let figures = json!({ "cycles_per_packet": report::round(cycles), "pipeline_to_reference": report::round(ratio) });
    fields.insert("reference".to_owned(), figures);
    if let Some(mpps) = bar(load).filter(|_| shape.size == Size::Small && shape.connections == connections(load)) {
        let measured = clock.hz() / report::median(&run.windows) / 1e6;
        let whole = run.pass.lost() == 0 && run.connections == u64::from(shape.connections);
        report::bars(&mut fields, &[Bar::at_least("Mpps", mpps, measured), Bar::is("every connection tracked, nothing dropped", whole)]);
    }
    fields
}

/// Packets a second by number of connections, for a plot: `seconds` in all, and what
/// opening them takes.
pub fn sweep(clock: &Clock, size: Size, seconds: f64) -> Vec<Point> {
    const WINDOWS: usize = 5;
    let numbers = [8, 10, 12, 14, 16, 18, 20].map(|bits| 1u32 << bits);
    let window = seconds / (WINDOWS * numbers.len()) as f64;
    let point = |connections| {
        let shape = Shape::new(connections, size);
        let run = Bench::new(&shape.world()).run(clock, &mut shape.source(), WINDOWS, window);
        let mpps = clock.hz() / report::median(&run.windows) / 1e6;
        Point { connections, mpps, tracked: run.connections == u64::from(connections) }
    };
    numbers.map(point).to_vec()
}

/// Bytes that a frame takes on a wire beside its own: preamble and gap.
const GAP: f64 = 20.0;

/// How many such cores fill 100 Gbit/s of underlay with frames of this size.
fn cores(clock: &Clock, shape: &Shape, cycles: f64) -> Value {
    let on_wire = shape.size.mean() + ENCAPSULATION as f64 + GAP;
    let packets_per_s = 100e9 / 8.0 / on_wire;
    json!({
        "cores": report::round(packets_per_s * cycles / clock.hz()),
        "packets_per_s": report::round(packets_per_s),
        "bytes_on_wire": report::round(on_wire),
        "extrapolated": "from the cycles of one core, the source's included and a device's not; that cores add up was not measured",
    })
}

fn memory_of(grown: f64, connections: u64) -> Value {
    json!({
        "grown_mib": report::round(grown / 1_048_576.0),
        "bytes_per_connection": report::round(grown / connections.max(1) as f64),
        "means": "growth of the process from before the pipeline was made; buffers and configuration included",
    })
}

/// Resident memory of this process.
pub fn resident_bytes() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0) * 1024.0
}
