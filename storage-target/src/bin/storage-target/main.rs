//! storage-target: volumes over NVMe/TCP from one folder, without a cloud around them.
//!
//! ```text
//! storage-target serve  --listen 0.0.0.0:4420 --dir /srv/volumes --volume data=100G,type=gp3
//! storage-target resize --dir /srv/volumes --volume data=200G
//! ```
//!
//! | file | what it is |
//! |---|---|
//! | `serve` | the daemon: volumes of the folder and of the command line, until SIGTERM |
//! | `control` | the socket in the folder by which a running daemon is told something |
//! | `volume_flag` | what `--volume` says |
//!
//! Standard output carries one line `NAME NQN` for each volume, then `ready`, and nothing else: scripts read
//! it. Everything that people read goes to standard error.

mod control;
mod serve;
mod volume_flag;

use clap::{Parser, Subcommand};
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;
use volume_flag::VolumeFlag;

/// Volumes over NVMe/TCP from one folder.
#[derive(Parser)]
#[command(version)]
struct Flags {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves volumes until SIGTERM.
    Serve(serve::Serve),
    /// Makes a volume of a running `serve` larger; connected hosts are told.
    Resize {
        /// The folder that is served.
        #[arg(long)]
        dir: PathBuf,
        /// NAME=SIZE: the volume and its new size.
        #[arg(long)]
        volume: VolumeFlag,
    },
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    let done = match flags.command {
        Command::Serve(serve) => serve.run(),
        Command::Resize { dir, volume } => control::resize(&dir, &volume),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("storage-target: {error:#}");
            ExitCode::FAILURE
        }
    }
}
