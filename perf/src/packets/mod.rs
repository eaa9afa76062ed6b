//! `perf packets`: what the packet path does, in packets a second and cycles a packet.
//!
//! `packets --pcap FILE --case CASE --seconds N --json -` derives a world from a
//! capture ([`world`]), gives its frames in bursts ([`source`]) to the real
//! [`Pipeline`](dataplane::pipeline::Pipeline) ([`bench`]), one worker, and prints
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
mod frame;
mod pcap;
mod report;
mod source;
mod world;

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::ValueEnum;
use serde_json::{Map, Value, json};

use self::bench::Bench;
use self::case::Case;
use self::clock::Clock;
use self::source::Replay;

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
    #[arg(long, value_enum)]
    case: Option<Case>,
    /// How long to measure.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Where the JSON goes; `-` is standard output.
    #[arg(long, default_value = "-")]
    json: PathBuf,
}

/// Runs the command: `runs` times five windows.
pub fn run(arguments: &Arguments, runs: usize) -> anyhow::Result<()> {
    if arguments.list {
        list();
        return Ok(());
    }
    anyhow::ensure!(arguments.seconds > 0.0 && arguments.seconds.is_finite(), "--seconds is above zero");
    let case = arguments.case.context("--case is missing; --list names the cases")?;
    let path = arguments.pcap.as_deref().with_context(|| format!("{case} replays a capture: --pcap FILE"))?;
    let clock = Clock::new();
    let mut fields = replay(&clock, case, path, arguments.seconds, 5 * runs.max(1))?;
    fields.insert("commit".to_owned(), crate::figure::git_commit().into());
    fields.insert("machine".to_owned(), report::machine(&clock));
    fields.insert("date".to_owned(), crate::figure::date().into());
    print(&arguments.json, &Value::Object(fields))
}

fn replay(clock: &Clock, case: Case, path: &Path, seconds: f64, windows: usize) -> anyhow::Result<Map<String, Value>> {
    let file = std::fs::read(path).with_context(|| path.display().to_string())?;
    let trace = pcap::read(&file).with_context(|| path.display().to_string())?;
    drop(file);
    let load = world::derive(case, &trace).with_context(|| path.display().to_string())?;
    for note in &load.world.notes {
        eprintln!("perf packets: {note}");
    }
    if trace.cut > 0 {
        eprintln!("perf packets: the capture holds only the beginning of {} frames", trace.cut);
    }
    let mut source = Replay::new(&load.trace, &load.devices);
    let mut bench = Bench::new(&load.world);
    let run = bench.run(clock, &mut source, windows, seconds / windows as f64);
    let mut fields = Map::new();
    fields.insert("figure".to_owned(), "packets".into());
    fields.insert("case".to_owned(), case.to_string().into());
    fields.append(&mut report::run(clock, &run));
    fields.insert(
        "trace".to_owned(),
        json!({
            "file": path.display().to_string(),
            "frames": load.trace.len(),
            "mean_frame_bytes": report::round(load.trace.bytes() as f64 / load.trace.len().max(1) as f64),
            "derived": load.world.notes,
        }),
    );
    Ok(fields)
}

fn list() {
    for case in Case::ALL {
        let help = case.to_possible_value().and_then(|value| value.get_help().map(ToString::to_string));
        println!("{:<16} {}", case.to_string(), help.unwrap_or_default());
    }
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
