//! Cases about a card that is pressed: reconfigured under load, and flooded.

use dataplane::packet::{Packet, Pool};
use dataplane::pipeline::Device;
use serde_json::{Map, json};

use super::bench::Bench;
use super::clock::{self, Clock};
use super::established;
use super::generate::{Conversations, Shape, Size};
use super::paced::{self, DEPTH, Stream};
use super::report::{self, Bar};
use super::source::Source;

/// Ports of the card whose rules are edited: "1,000", as a power of two.
const PORTS: u32 = 1024;
const EDIT_EVERY_S: f64 = 0.05;
/// Loss within this time after an edit is the edit's.
const AFTERMATH_S: f64 = 0.005;
/// Packets a second of established connections beside a flood, and of the flood.
const CALM: f64 = 1e6;
const FLOOD: f64 = 10e6;

/// Only the frames from the wire.
struct FromWire(Conversations);

impl Source for FromWire {
    fn pass(&self) -> u64 {
        self.0.pass() / 2
    }

    fn next(&mut self, pool: &mut Pool, burst: &mut Vec<Packet>) -> Device {
        let device = self.0.next_of_wire(pool, burst);
        self.0.advance();
        device
    }
}

/// Case `edit`: while half of what the core can do arrives, one rule of one of 1,024
/// ports is changed again and again. Configurations are compiled beforehand, as the
/// control thread of a card does beside the worker.
pub fn edit(clock: &Clock, seconds: f64) -> Map<String, serde_json::Value> {
    let shape = Shape { guests: PORTS, rules: 5, ..Shape::new(1 << 14, Size::Small) };
    let world = shape.world();
    let mut bench = Bench::new(&world);
    let mut source = FromWire(shape.source());
    let run = bench.run(clock, &mut source, 5, 0.05);
    let rate = clock.hz() / report::median(&run.windows) / 2.0;

    let (mut compiled, mut compile_us, mut snapshot) = (Vec::new(), Vec::new(), world.snapshot.clone());
    let edits = (seconds / EDIT_EVERY_S).floor().max(3.0);
    for number in (0..).take_while(|number| f64::from(*number) < edits) {
        let ports = snapshot.ports.len();
        if let Some(rule) = snapshot.ports.get_mut((number as usize * 37) % ports).and_then(|port| port.ingress.first_mut()) {
            rule.ports = Some((1, 1000 + number));
        }
        let before = clock::cycles();
        compiled.push(bench.compile(&snapshot));
        compile_us.push((clock::cycles() - before) as f64 / clock.hz() * 1e6);
    }

    let (mut held_us, mut marks) = (Vec::with_capacity(compiled.len()), Vec::with_capacity(compiled.len()));
    let every = clock.cycles_in(EDIT_EVERY_S);
    let mut streams = [Stream::new(clock, &mut source, rate)];
    let before = bench.pipeline.counters().drops.total();
    let (mut todo, mut next) = (compiled.into_iter(), every);
    // Loss is looked at in slices, of which those behind an edit are the edit's.
    let (slice, mut lost) = (AFTERMATH_S, Vec::new());
    let mut offset = 0;
    while f64::from(u32::try_from(lost.len()).unwrap_or(u32::MAX)) * slice < edits * EDIT_EVERY_S {
        let mut edited = false;
        let [stream] = &mut streams;
        let before = stream.lost;
        paced::run(clock, &mut bench, &mut streams, slice, None, |bench, _| {
            if offset >= next && !edited {
                next += every;
                if let Some(tables) = todo.next() {
                    held_us.push(bench.take(tables) as f64 / clock.hz() * 1e6);
                    edited = true;
                }
            }
        });
        offset += clock.cycles_in(slice);
        let [stream] = &mut streams;
        lost.push(stream.lost - before);
        stream.restart();
        marks.push(edited);
    }
    let behind: u64 = lost.iter().zip(&marks).filter(|(_, edited)| **edited).map(|(lost, _)| *lost).sum();
    let other: u64 = lost.iter().sum::<u64>() - behind;
    let blocked_ms = behind as f64 / rate * 1e3 / held_us.len().max(1) as f64;
    let dropped = bench.pipeline.counters().drops.total() - before;
    let mut fields = Map::new();
    fields.insert("offered_mpps".to_owned(), report::round(rate / 1e6));
    fields.insert("edits".to_owned(), held_us.len().into());
    fields.insert("compile_us".to_owned(), crate::figure::spread(&compile_us, "us"));
    fields.insert("worker_held_us".to_owned(), crate::figure::spread(&held_us, "us"));
    fields.insert("ring_depth".to_owned(), DEPTH.into());
    fields.insert("lost_at_edits".to_owned(), behind.into());
    fields.insert("lost_elsewhere".to_owned(), other.into());
    fields.insert("dropped".to_owned(), dropped.into());
    fields.insert("blocked_ms_per_edit".to_owned(), report::round(blocked_ms));
    report::bars(
        &mut fields,
        &[
            Bar::at_most("effective blocked time of an edit, ms", 1.0, blocked_ms),
            Bar::is("no packet of any port dropped by the pipeline", dropped == 0),
            Bar::is("nothing lost in the 5 ms of an edit", behind == 0),
        ],
    );
    fields
}

/// Case `flood`: a million packets a second of 16 k established connections, beside
/// ten million of connections that never existed before, to the same guest, all
/// through one ring and one core.
pub fn flood(clock: &Clock, seconds: f64) -> Map<String, serde_json::Value> {
    let attack = Shape { guests: 1, ..Shape::new(1 << 24, Size::Small) };
    let calm = Shape { guests: 1, ..Shape::new(10_000, Size::Small) };
    let mut bench = Bench::new(&attack.world());
    let (mut good, mut bad) = (calm.source(), FromWire(attack.source()));
    let before = bench.run(clock, &mut good, 1, 0.05);
    let memory = established::resident_bytes();
    let drops = bench.pipeline.counters().drops;
    let mut streams = [Stream::new(clock, &mut good, CALM), Stream::new(clock, &mut bad, FLOOD)];
    paced::run(clock, &mut bench, &mut streams, seconds, None, |_, _| ());
    let grown = established::resident_bytes() - memory;
    let [good, bad] = &streams;
    let through_table = good.delivered as f64 / good.taken.max(1) as f64;
    let goodput = 1.0 - good.loss_ratio();
    let after = bench.pipeline.counters();
    let dropped: Map<_, _> = drops
        .iter()
        .zip(after.drops.iter())
        .filter(|(before, after)| after.1 > before.1)
        .map(|(before, after)| (after.0.name().to_owned(), (after.1 - before.1).into()))
        .collect();
    let mut fields = Map::new();
    fields.insert("established_connections".to_owned(), before.connections.into());
    fields.insert("offered_mpps".to_owned(), json!({ "established": CALM / 1e6, "flood": FLOOD / 1e6 }));
    fields.insert("handled_mpps".to_owned(), report::round((good.taken + bad.taken) as f64 / seconds / 1e6));
    fields.insert("established".to_owned(), json!({ "handled": good.taken, "lost_at_ring": good.lost, "delivered": good.delivered }));
    fields.insert("flood".to_owned(), json!({ "handled": bad.taken, "lost_at_ring": bad.lost, "delivered": bad.delivered }));
    fields.insert("dropped".to_owned(), dropped.into());
    fields.insert("connections".to_owned(), after.flows.into());
    fields.insert("grown_mib".to_owned(), report::round(grown / 1_048_576.0));
    report::bars(
        &mut fields,
        &[
            Bar::at_least("established packets that the pipeline passed, of those it got", 0.95, through_table),
            Bar::at_least("established goodput, ring and pipeline", 0.95, goodput),
            Bar::at_most("memory grown, MiB", 80.0, grown / 1_048_576.0),
        ],
    );
    fields
}
