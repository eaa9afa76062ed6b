//! Figures of the product, as commands.
//!
//! Each command measures in one run whatever it compares, and prints one JSON
//! object with the machine, the median and the spread.
//!
//! | command | figure |
//! |---|---|
//! | `idle` | CPU and memory of a region of three cards without a guest |
//! | `up` | seconds from `cargo rack up` on built binaries to ready |
//! | `launch` | seconds from `RunInstances` to machine, and to the ssh banner |
//! | `blocks` | operations per second and latency of any NVMe/TCP target |
//! | `packets` | packets a second and cycles a packet of the packet path |
//! | `describe` | CPU of `DescribeInstances` by id, beside moto when it is there |

mod api;
mod blocks;
mod figure;
mod packets;
mod process;
mod rack;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Figures of the product.
#[derive(Parser)]
#[command(name = "perf")]
struct Arguments {
    /// How often each figure is taken.
    #[arg(long, global = true, default_value_t = 3)]
    runs: usize,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// CPU and memory of a region of three cards without a guest.
    Idle,
    /// Seconds from `cargo rack up` on built binaries to ready.
    Up,
    /// Seconds from `RunInstances` to the ssh banner of `mini`.
    Launch,
    /// Block I/O against any NVMe/TCP target.
    Blocks(Box<blocks::Arguments>),
    /// Packets a second and cycles a packet of the packet path, on a capture.
    Packets(packets::Arguments),
    /// CPU per `DescribeInstances` by id.
    Describe {
        /// Instances that the account has, at most 90: the region has 192 cores.
        #[arg(long, default_value_t = 90)]
        instances: usize,
        /// Requests in each run.
        #[arg(long, default_value_t = 5000)]
        requests: usize,
        /// A moto_server to measure beside us, such as target/venv/bin/moto_server.
        #[arg(long)]
        moto: Option<std::path::PathBuf>,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let runs = arguments.runs;
    let report = match arguments.command {
        Command::Idle => rack::idle(arguments.runs)?,
        Command::Up => rack::up(arguments.runs)?,
        Command::Launch => rack::launch(arguments.runs)?,
        Command::Blocks(arguments) => {
            blocks::run(&arguments, runs)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Packets(packets) => {
            packets::run(&packets, runs)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Describe { instances, requests, moto } => api::describe(arguments.runs, instances, requests, moto.as_deref())?,
    };
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(ExitCode::SUCCESS)
}
