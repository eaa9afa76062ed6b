//! What `cargo rack test` runs: the same here and in CI.

use std::process::{Command, ExitCode};

use anyhow::{Result, bail};

use crate::{build, image, packages, region};

/// How much is tested.
#[derive(clap::Args)]
pub struct Options {
    /// All seeds of the fault tests instead of a few.
    #[arg(long)]
    long: bool,
    /// Only the whole-system tests.
    #[arg(long)]
    system_only: bool,
    /// Only whole-system tests whose name contains this.
    #[arg(long)]
    filter: Option<String>,
}

/// Runs every step and stops at the first that fails.
pub fn run(options: &Options) -> Result<ExitCode> {
    packages::ensure(true)?;
    let dpdk = packages::has_dpdk();
    if !dpdk {
        eprintln!("rack: no libdpdk here: the dpdk feature is not tested");
    }
    if !options.system_only && options.filter.is_none() {
        step("format", build::cargo().args(["fmt", "--check"]))?;
        step(
            "lints",
            build::cargo().args(["clippy", "--all-targets", "--quiet"]).args(build::features(dpdk)).args(["--", "-D", "warnings"]),
        )?;
        // hw-sim holds the whole-system tests, which need a region: below.
        step(
            "unit tests",
            build::cargo().args(["test", "--quiet"]).args(build::features(dpdk)).args([
                "--workspace",
                "--exclude",
                "hw-sim",
                "--exclude",
                "dpdk-sys",
            ]),
        )?;
        step("documentation", build::cargo().args(["doc", "--no-deps", "--quiet"]).env("RUSTDOCFLAGS", "-D warnings"))?;
    }
    build::daemons(dpdk)?;
    if packages::is_root() {
        image::all(&region::images_dir())?;
    } else {
        eprintln!("rack: not root: the whole-system tests say so and do nothing");
    }
    let mut tests = build::cargo();
    // One at a time: each may hold two emulated guests on two cores.
    tests.args(["test", "--package", "hw-sim"]).args(["--"]);
    tests.args(options.filter.iter());
    tests.args(["--test-threads", "1", "--nocapture"]);
    if options.long {
        tests.env("CARDINAL_LONG", "1");
    }
    step("whole-system tests", &mut tests)?;
    Ok(ExitCode::SUCCESS)
}

fn step(name: &str, command: &mut Command) -> Result<()> {
    eprintln!("rack: {name}");
    let begun = std::time::Instant::now();
    let status = command.status()?;
    eprintln!("rack: {name} took {:.0} s", begun.elapsed().as_secs_f64());
    if !status.success() {
        bail!("{name} failed: {status}");
    }
    Ok(())
}
