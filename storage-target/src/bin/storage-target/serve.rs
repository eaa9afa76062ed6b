//! The daemon: opens the folder, makes and changes what the command line names, and serves until SIGTERM.
//!
//! The order matters to scripts: every volume is open and the port listens before the first line is printed.
//! A volume of the folder whose files are damaged is named on standard error and not served; a volume of the
//! command line that cannot be what was asked for ends the start.

use crate::control;
use crate::volume_flag::VolumeFlag;
use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use storage_target::{Target, TargetOptions, TargetSettings, volume_nqn};

/// How long to wait for the daemon before this one to end.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);

/// What drives the disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    /// io_uring over files; plain system calls where a sandbox forbids it.
    Uring,
    /// Block devices of SPDK.
    Spdk,
}

/// Serves volumes until SIGTERM.
#[derive(Args)]
pub struct Serve {
    /// Where hosts connect.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// Where volumes are kept; made when it is not there.
    #[arg(long)]
    dir: PathBuf,
    /// NAME=SIZE[,type=gp3][,iops=N][,throughput=N][,allow=NQN][,ram]: a volume to make, or to grow.
    #[arg(long = "volume", value_name = "NAME=SIZE[,...]")]
    volumes: Vec<VolumeFlag>,
    /// Threads that serve, each on a core of its own; without it as many as half of the cores, on any.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256))]
    cores: Option<u16>,
    /// What drives the disks.
    #[arg(long, value_enum, default_value = "uring")]
    backend: Backend,
}

impl Serve {
    /// Runs the daemon.
    pub fn run(self) -> Result<()> {
        if self.backend == Backend::Spdk {
            bail!("--backend spdk: this build has no SPDK in it, only uring");
        }
        // Before anything is started: a signal from here on stops in order.
        let mut signals = Signals::new([SIGTERM, SIGINT])?;
        let mut options = TargetOptions { lock_timeout: LOCK_TIMEOUT, ..TargetOptions::default() };
        if let Some(cores) = self.cores {
            (options.shards, options.pinned) = (cores.into(), true);
        }
        let settings = TargetSettings { listen: self.listen, dir: self.dir.clone(), images: self.dir.join("images") };
        let target = Target::start_with(settings, &options).with_context(|| format!("{} at {}", self.dir.display(), self.listen))?;
        let target = Arc::new(target);
        for flag in &self.volumes {
            let there = target.volume_get(&flag.name).map(|status| status.spec);
            target.volume_put(flag.over(there)).with_context(|| format!("--volume {}", flag.name))?;
        }
        control::listen(&self.dir, Arc::clone(&target))?;
        let mut out = std::io::stdout().lock();
        for name in target.volume_list() {
            writeln!(out, "{name} {}", volume_nqn(&name))?;
        }
        writeln!(out, "ready")?;
        out.flush()?;
        drop(out);
        let signal = signals.forever().next();
        tracing::info!(signal, "stopping");
        target.stop();
        let _ = std::fs::remove_file(self.dir.join("control"));
        Ok(())
    }
}
