//! Block I/O against any NVMe/TCP target: operations per second, latency, and the target's CPU.
//!
//! | file | what it is |
//! |---|---|
//! | `load` | one thread that keeps a depth of commands under way and times them |
//! | `nvme` | the bytes of NVMe/TCP, by an encoder that shares nothing with the target's |
//! | `nbd` | the bytes of NBD, for the peer |
//! | `peer` | qemu-storage-daemon over memory, started beside |
//! | `histogram` | latencies in buckets of 1.6 % |
//!
//! The object that is printed has `iops`, `mb_per_s`, `p50_us`, `p99_us`, `p999_us`, `errors`, and with `--pid` also
//! `cpu_us_per_io`. With `--peer` each run is followed by one against the peer; both are medians by `iops`.

mod histogram;
mod load;
mod nbd;
mod nvme;
mod peer;

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// What is done to the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Case {
    /// Reads anywhere.
    Randread,
    /// Writes anywhere.
    Randwrite,
    /// Reads one after the other.
    Seqread,
    /// Writes one after the other.
    Seqwrite,
    /// Seven reads to three writes, anywhere.
    Mix,
}

impl Case {
    /// Parts of ten that are reads.
    fn reads(self) -> u64 {
        match self {
            Self::Randread | Self::Seqread => 10,
            Self::Randwrite | Self::Seqwrite => 0,
            Self::Mix => 7,
        }
    }

    fn is_sequential(self) -> bool {
        matches!(self, Self::Seqread | Self::Seqwrite)
    }

    /// 4 KiB, and 128 KiB in sequence.
    fn block_size(self) -> u32 {
        if self.is_sequential() { 128 << 10 } else { 4 << 10 }
    }
}

/// Another server in the same run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// qemu-storage-daemon over NBD, its volume a file in memory.
    Qsd,
}

/// Block I/O against any NVMe/TCP target.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Where the target listens.
    #[arg(long, value_name = "ADDR:PORT")]
    target: SocketAddr,
    /// The subsystem.
    #[arg(long)]
    nqn: String,
    /// What is done to the volume.
    #[arg(long, value_enum)]
    case: Case,
    /// How long each run takes.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Bytes of a command; 4 KiB, or 128 KiB in sequence.
    #[arg(long)]
    block_size: Option<u32>,
    /// Commands under way on each connection.
    #[arg(long, default_value_t = 32)]
    depth: u16,
    /// I/O queues, each a connection of its own.
    #[arg(long, default_value_t = 1)]
    connections: u16,
    /// CRC32C over headers and data.
    #[arg(long)]
    digests: bool,
    /// Bytes of the volume that are used, from its start.
    #[arg(long)]
    span: Option<u64>,
    /// Writes the span once before, so that reads find blocks that exist.
    #[arg(long)]
    fill: bool,
    /// The process of the target: adds its CPU time per command.
    #[arg(long)]
    pid: Option<i32>,
    /// Who else is measured in the same run.
    #[arg(long, value_enum)]
    peer: Option<Peer>,
    /// The core for the peer's process, such as that of the target.
    #[arg(long)]
    peer_core: Option<u32>,
    /// The host's NQN.
    #[arg(long, default_value = "nqn.2026-11.cardinal:perf")]
    host_nqn: String,
    /// Where the object is written; `-` is standard output.
    #[arg(long, default_value = "-")]
    json: String,
}

/// What one run asks for.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// What is done.
    pub case: Case,
    /// Bytes of a command.
    pub block_size: u32,
    /// Commands under way on each connection.
    pub depth: u16,
    /// How long.
    pub time: Duration,
    /// Bytes of the volume that are used.
    pub span: u64,
}

/// Measures, and writes the object to where it was asked for.
pub fn run(arguments: &Arguments, runs: usize) -> Result<()> {
    let report = measure(arguments, runs)?;
    let text = serde_json::to_string_pretty(&report)?;
    if arguments.json == "-" {
        println!("{text}");
        return Ok(());
    }
    std::fs::write(&arguments.json, text + "\n").with_context(|| arguments.json.clone())
}

fn measure(arguments: &Arguments, runs: usize) -> Result<Value> {
    let block_size = arguments.block_size.unwrap_or_else(|| arguments.case.block_size());
    if block_size == 0 || !block_size.is_multiple_of(512) || block_size > 1 << 20 {
        bail!("--block-size is a multiple of 512, at most 1 MiB");
    }
    if arguments.depth == 0 || arguments.connections == 0 {
        bail!("--depth and --connections are at least 1");
    }
    let mut host = nvme::Host::connect(arguments.target, &arguments.nqn, &arguments.host_nqn, arguments.digests)?;
    let size = host.size_bytes();
    let mut queues = (1..=arguments.connections).map(|id| host.queue(id, arguments.depth)).collect::<Result<Vec<_>>>()?;
    let span = arguments.span.unwrap_or(size).min(size);
    if span < u64::from(block_size) {
        bail!("the volume has {size} bytes, fewer than a command moves");
    }
    let time = Duration::try_from_secs_f64(arguments.seconds).context("--seconds")?;
    let plan = Plan { case: arguments.case, block_size, depth: arguments.depth, time, span };
    if arguments.fill {
        load::fill(&mut queues, span, arguments.depth)?;
    }
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    let peer = match arguments.peer {
        None => None,
        Some(Peer::Qsd) => Some(peer::Daemon::start(span, arguments.peer_core)?),
    };
    for _ in 0..if peer.is_some() { runs.max(1) } else { 1 } {
        ours.push(sample(&mut queues, plan, arguments.pid)?);
        if let Some(peer) = &peer {
            let mut queues = (0..arguments.connections).map(|_| peer.connect()).collect::<Result<Vec<_>>>()?;
            if theirs.is_empty() && arguments.case.reads() > 0 {
                load::fill(&mut queues, span, arguments.depth)?;
            }
            theirs.push(sample(&mut queues, plan, Some(peer.pid()))?);
        }
    }
    let mut report = median(ours);
    if let Some(object) = report.as_object_mut() {
        for (key, value) in [
            ("case", json!(format!("{:?}", arguments.case).to_lowercase())),
            ("block_size", json!(block_size)),
            ("depth", json!(arguments.depth)),
            ("connections", json!(arguments.connections)),
            ("digests", json!(arguments.digests)),
            ("seconds", json!(arguments.seconds)),
        ] {
            object.insert(key.to_owned(), value);
        }
        if !theirs.is_empty() {
            let theirs = median(theirs);
            let of = |value: &Value| value.get("iops").and_then(Value::as_f64).unwrap_or(0.0);
            let ratio = object.get("iops").and_then(Value::as_f64).unwrap_or(0.0) / of(&theirs).max(1.0);
            object.insert("peer".to_owned(), theirs);
            object.insert("iops_ratio".to_owned(), json!((ratio * 100.0).round() / 100.0));
        }
    }
    Ok(report)
}

/// One run, as an object.
fn sample<Q: load::Queue>(queues: &mut [Q], plan: Plan, pid: Option<i32>) -> Result<Value> {
    let before = pid.map(cpu_ns).transpose()?;
    let outcome = load::run(queues, plan)?;
    let after = pid.map(cpu_ns).transpose()?;
    let seconds = outcome.took.as_secs_f64();
    let round = |value: f64| (value * 100.0).round() / 100.0;
    let commands = outcome.commands as f64;
    let us = |part: f64| round(outcome.latency.quantile_ns(part) as f64 / 1000.0);
    let mut object = json!({
        "iops": (commands / seconds).round(),
        "mb_per_s": round(commands * f64::from(plan.block_size) / seconds / 1e6),
        "p50_us": us(0.5),
        "p99_us": us(0.99),
        "p999_us": us(0.999),
        "errors": outcome.errors,
    });
    if let (Some(before), Some(after), Some(object)) = (before, after, object.as_object_mut()) {
        let per_command = after.saturating_sub(before) as f64 / 1000.0 / commands.max(1.0);
        object.insert("cpu_us_per_io".to_owned(), json!(round(per_command)));
    }
    Ok(object)
}

/// The run in the middle, by `iops`.
fn median(mut runs: Vec<Value>) -> Value {
    let iops = |value: &Value| value.get("iops").and_then(Value::as_f64).unwrap_or(0.0);
    runs.sort_by(|one, other| iops(one).total_cmp(&iops(other)));
    let middle = runs.len() / 2;
    runs.into_iter().nth(middle).unwrap_or(Value::Null)
}

/// Nanoseconds that all threads of a process have run.
fn cpu_ns(pid: i32) -> Result<u64> {
    let tasks = PathBuf::from(format!("/proc/{pid}/task"));
    let mut sum = 0;
    for task in std::fs::read_dir(&tasks).with_context(|| format!("--pid {pid}"))? {
        // A thread may end in between.
        let text = std::fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        sum += text.split_whitespace().next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(sum)
}
