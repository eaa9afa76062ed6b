//! Builds the daemons, with DPDK where libdpdk is here.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What every cargo call is about: all crates that need no system library,
/// with the features of this machine. One selection means that nothing
/// compiles twice.
pub fn selection(dpdk: bool) -> Vec<&'static str> {
    let mut words = vec!["--workspace", "--exclude", "dpdk-sys"];
    if dpdk {
        words.extend(["--features", "nitro-card/dpdk"]);
    }
    words
}

/// Builds every daemon, and with `tests` all tests beside them: what tests
/// depend on adds features to shared crates, so daemons built alone would
/// compile those anew. Cargo draws its own progress.
pub fn daemons(dpdk: bool, tests: bool) -> Result<()> {
    let targets: &[&str] = if tests { &["--bins", "--tests"] } else { &[] };
    let status = cargo().arg("build").args(selection(dpdk)).args(targets).status().context("cargo build")?;
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
