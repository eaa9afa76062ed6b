//! Cases about connections that do not exist yet: how many are opened in a second,
//! and what the number of rules costs.
//!
//! The table is emptied between windows, outside the measured time, by taking the
//! ports away and putting them back; so each window opens connections in an empty
//! table and never evicts. A count of connections after each window proves that
//! every packet opened one.

use dataplane::packet::{Packet, Pool};
use dataplane::pipeline::Device;
use serde_json::{Map, Value, json};

use super::bench::{Bench, Window};
use super::case::Load;
use super::clock::Clock;
use super::generate::{Conversations, Shape, Size};
use super::report::{self, Bar};
use super::source::Source;

/// Connections opened in a window: less than every bound of the flow table.
const OPENED: u32 = 1 << 17;
/// Windows are this many at least, since each is short.
const WINDOWS: usize = 15;

/// Opens the connections of a shape from one side, and nothing else.
struct Opening {
    traffic: Conversations,
    connections: u64,
}

impl Source for Opening {
    fn pass(&self) -> u64 {
        self.connections
    }

    #[inline]
    fn next(&mut self, pool: &mut Pool, burst: &mut Vec<Packet>) -> Device {
        self.traffic.next_of_guest(pool, burst)
    }
}

fn opening(rules: usize) -> Shape {
    // Guests hold half of what their share of unanswered connections allows.
    Shape { rules, guests: 8, ..Shape::new(OPENED, Size::Small) }
}

/// Windows of opening all connections of a shape, each in an empty table; whether
/// each frame became a connection.
fn open(clock: &Clock, bench: &mut Bench, shape: &Shape) -> (Window, bool) {
    bench.forget_connections(&shape.world());
    let mut source = Opening { traffic: shape.source(), connections: u64::from(shape.connections) };
    let window = bench.one_pass(clock, &mut source);
    (window, bench.pipeline.counters().flows == window.packets)
}

/// Case `connections`: 5 rules, route and mapping.
pub fn connections(clock: &Clock) -> Map<String, Value> {
    let shape = opening(5);
    let mut bench = Bench::new(&shape.world());
    let all: Vec<(Window, bool)> = (0..=WINDOWS).map(|_| open(clock, &mut bench, &shape)).collect();
    // The first one also touches the table's memory for the first time.
    let windows: Vec<Window> = all.iter().skip(1).map(|(window, _)| *window).collect();
    let whole = all.iter().all(|(_, whole)| *whole);
    let mut fields = Map::new();
    rate(clock, &mut fields, "connections_per_s", &windows);
    fields.insert("connections".to_owned(), bench.pipeline.counters().flows.into());
    // What a packet of a connection that exists costs, in the same run.
    let established = bench.run(clock, &mut shape.source(), WINDOWS, 0.005).windows;
    let ratio = report::fastest(&windows) / report::fastest(&established);
    fields.insert("new_to_established".to_owned(), report::round(ratio));
    let million = clock.hz() / report::median(&windows) / 1e6;
    report::bars(
        &mut fields,
        &[Bar::at_least("million new connections a second", 3.0, million), Bar::is("every packet opened a connection", whole)],
    );
    fields
}

/// Cases `rules-N`: established and new connections with N rules, and with one rule
/// in alternating windows of the same run.
pub fn rules(clock: &Clock, load: Load, seconds: f64) -> Map<String, Value> {
    let (count, growth) = match load {
        Load::Rules1000 => (1000, 1.3),
        Load::Rules10000 => (10_000, 1.6),
        _ => (1, 1.0),
    };
    let shapes = [1, count].map(|rules| Shape { rules, ..Shape::new(1 << 14, Size::Small) });
    let mut benches = shapes.map(|shape| Bench::new(&shape.world()));
    let mut sources = shapes.map(|shape| shape.source());
    let mut established: [Vec<Window>; 2] = Default::default();
    for _ in 0..WINDOWS {
        for ((bench, source), windows) in benches.iter_mut().zip(&mut sources).zip(&mut established) {
            windows.extend(bench.run(clock, source, 1, seconds / (3 * WINDOWS) as f64).windows);
        }
    }
    let shapes = [1, count].map(opening);
    let mut benches = shapes.map(|shape| Bench::new(&shape.world()));
    let (mut new, mut whole): ([Vec<Window>; 2], bool) = (Default::default(), true);
    for _ in 0..=WINDOWS {
        for ((bench, shape), windows) in benches.iter_mut().zip(&shapes).zip(&mut new) {
            let (window, all) = open(clock, bench, shape);
            windows.push(window);
            whole &= all;
        }
    }
    // Whatever else the machine does makes windows slower only, and not the same ones.
    let [one, many] = established.each_ref().map(|windows| report::fastest(windows));
    let [new_one, new_many] = new.each_ref().map(|windows| report::fastest(windows));
    let mut fields = Map::new();
    let [_, established] = &established;
    let [_, new] = &new;
    rate(clock, &mut fields, "packets_per_s", established);
    rate(clock, &mut fields, "connections_per_s", new);
    fields.insert("rules".to_owned(), count.into());
    fields.insert(
        "against_one_rule".to_owned(),
        json!({
            "compared": "the fastest windows of each",
            "established_cycles": report::round(one),
            "established_ratio": report::round(many / one),
            "new_cycles": report::round(new_one),
            "new_ratio": report::round(new_many / new_one),
        }),
    );
    if count > 1 {
        report::bars(
            &mut fields,
            &[
                Bar::at_most("established, cycles against one rule", 1.05, many / one),
                Bar::at_most("new connection, cycles against one rule", growth, new_many / new_one),
                Bar::is("every packet opened a connection", whole),
            ],
        );
    }
    fields
}

fn rate(clock: &Clock, fields: &mut Map<String, Value>, name: &str, windows: &[Window]) {
    let cycles: Vec<f64> = windows.iter().map(|window| window.cycles_per_packet()).collect();
    let rates: Vec<f64> = cycles.iter().map(|cycles| clock.hz() / cycles / 1e6).collect();
    let figures = json!({ "rate": crate::figure::spread(&rates, "million/s"), "cycles": crate::figure::spread(&cycles, "TSC cycles") });
    fields.insert(name.to_owned(), figures);
}
