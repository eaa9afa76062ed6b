//! Builds the daemons, with DPDK where libdpdk is here.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The daemons and the operator's command, by package.
const PACKAGES: &[&str] = &["nitro-card", "thin-hv", "control", "cli"];

/// Cargo's features for this machine; the same for every cargo call, so that
/// nothing compiles twice.
pub fn features(dpdk: bool) -> Vec<&'static str> {
    if dpdk { vec!["--features", "nitro-card/dpdk"] } else { Vec::new() }
}

/// Builds every daemon; cargo draws its own progress.
pub fn daemons(dpdk: bool) -> Result<()> {
    let mut command = cargo();
    command.arg("build");
    for package in PACKAGES {
        command.args(["--package", package]);
    }
    let status = command.args(features(dpdk)).status().context("cargo build")?;
    if !status.success() {
        bail!("the daemons did not build: {status}");
    }
    Ok(())
}

/// Cargo in the root of the project.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// The root of the project.
pub fn root() -> PathBuf {
    let mut path = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    path.pop();
    path.pop();
    path
}

/// Where cargo puts binaries: beside this one.
pub fn binary(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe().context("own path")?;
    Ok(me.with_file_name(name))
}
