//! The agent of a thin host.
#![allow(unsafe_code)] // only to wait for signals

use anyhow::Context;
use clap::Parser;
use std::io::IsTerminal;
use std::path::PathBuf;
use thin_hv::{jail, server, settings::Settings};
use tracing_subscriber::EnvFilter;

/// Thin host: cores, memory and vCPUs of one server, run by its card.
///
/// It ends on SIGTERM and SIGINT; its machines run on and the next agent adopts them.
#[derive(Parser)]
#[command(version)]
struct Flags {
    /// The settings file.
    #[arg(long)]
    config: PathBuf,
    /// Checks the settings file and ends.
    #[arg(long)]
    check_config: bool,
    /// Kills all machines that earlier agents left, forgets them and ends.
    #[arg(long, conflicts_with = "check_config")]
    release_all: bool,
}

fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let color = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(color).init();
    let settings = Settings::load(&flags.config)?;
    if flags.check_config {
        return Ok(());
    }
    if flags.release_all {
        let killed = server::release_all(&settings.run_dir).context("release of all machines")?;
        tracing::info!(killed, "released");
        return Ok(());
    }
    if let Err(error) = jail::leave_network() {
        tracing::warn!(%error, "without root the agent stays in the network of its user");
    }
    jail::give_up_privileges().context("no new privileges")?;
    let signals = signals();
    server::run(&settings, move |stop| {
        std::thread::spawn(move || {
            wait(&signals);
            stop.stop();
        });
    })
    .context("agent")
}

/// Blocks the signals that end the agent, in this thread and those it will make.
fn signals() -> libc::sigset_t {
    // SAFETY: a set of signals is plain bits, for which zero is valid.
    let mut set = unsafe { std::mem::zeroed::<libc::sigset_t>() };
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: `set` is a valid set and both are signal numbers.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: `set` is valid, and no old set is asked for. A machine's process
    // starts with an empty mask all the same: the standard library sees to it.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    set
}

fn wait(set: &libc::sigset_t) {
    let mut signal = 0;
    // SAFETY: both pointers are to living values of the right types.
    unsafe { libc::sigwait(set, &raw mut signal) };
}
