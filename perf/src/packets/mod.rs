//! `perf packets`: what the packet path does, in packets a second and cycles a packet.
//!
//! `packets --pcap FILE --case CASE --seconds N --json -` derives a world from a
//! capture ([`world`]), gives its frames in bursts ([`source`]) to the real
//! [`Pipeline`](dataplane::pipeline::Pipeline) ([`mod@bench`]), one worker, and prints
//! one JSON object ([`report`]).
//!
//! What the figures mean: `mpps` counts frames given to the pipeline, whatever became
//! of them; it and `cycles_per_packet` are medians of the windows and hold the
//! source's own cost, which `source_cycles_per_packet` shows alone. `delivered` and
//! `dropped` are of the whole measured run, which ends with a whole pass; `per_pass`
//! is one pass after the warm-up, exact and the same in every run.

mod allocations;
mod bench;
mod case;
mod clock;
mod established;
mod frame;
mod generate;
mod opening;
mod paced;
mod page;
mod pcap;
mod peer_ovs;
mod pressure;
mod reference;
mod report;
mod search;
mod source;
mod world;

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Map, Value, json};

use self::bench::Bench;
use self::case::{Case, Load, Policy};
use self::clock::Clock;
use self::generate::{Shape, Size};
use self::pcap::Trace;
use self::search::Search;
use self::source::{Replay, Source};
use self::world::Derived;

/// Arguments of `perf packets`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Lists the cases.
    #[arg(long)]
    list: bool,
    /// Capture to replay: pcap or pcapng, frames of VXLAN or plain Ethernet.
    #[arg(long)]
    pcap: Option<PathBuf>,
    /// What the packets meet.
    #[arg(long)]
    case: Option<Case>,
    /// How long to measure.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Where the JSON goes; `-` is standard output.
    #[arg(long, default_value = "-")]
    json: PathBuf,
    /// Also writes the report as a page with plots, and measures numbers of connections for it.
    #[arg(long)]
    page: Option<PathBuf>,
    /// Another data plane that gets the same packets.
    #[arg(long, value_enum)]
    peer: Option<Peer>,
    /// Also searches the highest load that an established case takes, and its latency.
    #[arg(long, value_enum)]
    search: Option<Search>,
    /// Frames of cases without a capture: bytes of the guest's frame with check sequence.
    #[arg(long, value_enum, default_value = "64")]
    size: Size,
    /// Connections of an established case, up to 16 M; rounded up to a power of two.
    #[arg(long)]
    flows: Option<u32>,
    /// Writes one pass of an established case as a capture, and measures nothing.
    #[arg(long)]
    pcap_out: Option<PathBuf>,
}

/// A data plane to compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Peer {
    /// Open vSwitch with DPDK, as Debian packages it.
    OvsDpdk,
}

/// Runs the command: `runs` times five windows.
pub fn run(arguments: &Arguments, runs: usize) -> anyhow::Result<()> {
    if arguments.list {
        print!("{}", case::list());
        return Ok(());
    }
    anyhow::ensure!(arguments.seconds > 0.0 && arguments.seconds.is_finite(), "--seconds is above zero");
    let case = arguments.case.context("--case is missing; --list names the cases")?;
    let clock = Clock::new();
    let windows = 5 * runs.max(1);
    let mut fields = Map::new();
    fields.insert("figure".to_owned(), "packets".into());
    fields.insert("case".to_owned(), case.to_string().into());
    match case {
        Case::Capture(policy) => {
            let path = arguments.pcap.as_deref().with_context(|| format!("{case} replays a capture: --pcap FILE"))?;
            let load = load(policy, path)?;
            fields.append(&mut replay(&clock, &load, arguments.seconds, windows));
            fields.insert("trace".to_owned(), trace_facts(path, &load));
            if let Some(Peer::OvsDpdk) = arguments.peer {
                let job = peer_ovs::Job { trace: &load.trace, world: &load.world, policy: Some(policy) };
                peer_ovs::compare(&clock, &job, arguments.seconds, &mut fields)?;
            }
        }
        Case::Generated(load) => {
            anyhow::ensure!(arguments.pcap.is_none(), "{case} makes its own packets, and takes no --pcap");
            match load {
                Load::Established16k | Load::Established1m => {
                    let shape = Shape::new(arguments.flows.unwrap_or_else(|| established::connections(load)), arguments.size);
                    if let Some(path) = &arguments.pcap_out {
                        return write_pass(&shape, path);
                    }
                    let world = shape.world();
                    tell(&world.notes);
                    fields.append(&mut established::run(&clock, load, shape, arguments.seconds, windows));
                    fields.insert("traffic".to_owned(), traffic_facts(&shape));
                    if let Some(search) = arguments.search {
                        fields.insert("search".to_owned(), search::run(&clock, search, &shape, arguments.seconds).into());
                    }
                    if let Some(Peer::OvsDpdk) = arguments.peer {
                        let job = peer_ovs::Job { trace: &one_pass(&shape), world: &world, policy: None };
                        peer_ovs::compare(&clock, &job, arguments.seconds, &mut fields)?;
                    }
                }
                Load::Connections => fields.append(&mut opening::connections(&clock)),
                Load::Rules1 | Load::Rules1000 | Load::Rules10000 => {
                    fields.append(&mut opening::rules(&clock, load, arguments.seconds));
                }
                Load::Edit => fields.append(&mut pressure::edit(&clock, arguments.seconds)),
                Load::Flood => fields.append(&mut pressure::flood(&clock, arguments.seconds)),
            }
        }
    }
    fields.insert("commit".to_owned(), crate::figure::git_commit().into());
    fields.insert("machine".to_owned(), report::machine(&clock));
    fields.insert("date".to_owned(), crate::figure::date().into());
    let report = Value::Object(fields);
    if let Some(path) = &arguments.page {
        let sweep = established::sweep(&clock, arguments.size, arguments.seconds);
        std::fs::write(path, page::html(&report, &sweep)).with_context(|| path.display().to_string())?;
    }
    print(&arguments.json, &report)
}

/// Reads a capture and derives its world.
fn load(case: Policy, path: &Path) -> anyhow::Result<Derived> {
    let file = std::fs::read(path).with_context(|| path.display().to_string())?;
    let trace = pcap::read(&file).with_context(|| path.display().to_string())?;
    drop(file);
    let load = world::derive(case, &trace).with_context(|| path.display().to_string())?;
    tell(&load.world.notes);
    if trace.cut > 0 {
        eprintln!("perf packets: the capture holds only the beginning of {} frames", trace.cut);
    }
    Ok(load)
}

fn tell(notes: &[String]) {
    for note in notes {
        eprintln!("perf packets: {note}");
    }
}

fn replay(clock: &Clock, load: &Derived, seconds: f64, windows: usize) -> Map<String, Value> {
    let mut source = Replay::new(&load.trace, &load.devices);
    let run = Bench::new(&load.world).run(clock, &mut source, windows, seconds / windows as f64);
    report::run(clock, &run)
}

fn trace_facts(path: &Path, load: &Derived) -> Value {
    let mean = load.trace.bytes() as f64 / load.trace.len().max(1) as f64;
    json!({
        "file": path.display().to_string(),
        "frames": load.trace.len(),
        "mean_frame_bytes": report::round(mean),
        "derived": load.world.notes,
    })
}

fn traffic_facts(shape: &Shape) -> Value {
    json!({
        "connections": shape.connections,
        "guests": shape.guests,
        "rules": shape.rules,
        "size": shape.size.name(),
        "mean_inner_frame_bytes": report::round(shape.size.mean()),
        "mean_outer_frame_bytes": report::round(shape.size.mean() + frame::ENCAPSULATION as f64),
    })
}

/// Writes one pass of a shape's packets, those of guests without VXLAN.
fn write_pass(shape: &Shape, path: &Path) -> anyhow::Result<()> {
    let trace = one_pass(shape);
    pcap::write(path, trace.iter()).with_context(|| path.display().to_string())?;
    eprintln!("perf packets: {} frames in {}", trace.len(), path.display());
    Ok(())
}

fn one_pass(shape: &Shape) -> Trace {
    let (mut source, mut pool, mut burst) = (shape.source(), dataplane::packet::Pool::new(2 * source::BURST), Vec::new());
    let mut trace = Trace::default();
    while (trace.len() as u64) < source.pass() {
        source.next(&mut pool, &mut burst);
        burst.iter().for_each(|packet| trace.push(packet.as_slice()));
        pool.put_all(&mut burst);
    }
    trace
}

fn print(to: &Path, value: &Value) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    if to == Path::new("-") {
        println!("{text}");
    } else {
        std::fs::write(to, text + "\n").with_context(|| to.display().to_string())?;
    }
    Ok(())
}
