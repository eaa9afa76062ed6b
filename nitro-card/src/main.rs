//! nitro-card: the daemon of one card.

use std::io::IsTerminal as _;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Parser;
use nitro_card::settings::Settings;
use nitro_card::start;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// The card daemon: owns all I/O of the guests of one server.
#[derive(Parser)]
#[command(version)]
struct Flags {
    /// Settings file (TOML).
    #[arg(long)]
    config: PathBuf,
    /// Read and check the settings, then exit.
    #[arg(long)]
    check_config: bool,
}

fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let settings = Settings::load(&flags.config)?;
    if flags.check_config {
        println!("{} is in order", flags.config.display());
        return Ok(());
    }
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("start tokio")?;
    let result = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        start::run(settings, async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("stopping; guests and desired state stay");
        })
        .await
    });
    // At once: a thread that waits for a guest or a host waits for nothing any more.
    match result {
        Ok(()) => std::process::exit(0),
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the card cannot go on");
            std::process::exit(1)
        }
    }
}
