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
        step("format", build::cargo().args(["fmt", "--all", "--check"]))?;
        step(
            "lints",
            build::cargo().args(["clippy", "--all-targets", "--quiet"]).args(build::selection(dpdk)).args(["--", "-D", "warnings"]),
        )?;
        let mut unit = build::cargo();
        unit.args(["test", "--quiet", "--lib", "--bins"]).args(build::selection(dpdk));
        step("unit tests", tests(&mut unit, |package| package != "hw-sim")?)?;
        step(
            "documentation",
            build::cargo().args(["doc", "--no-deps", "--quiet"]).args(build::selection(dpdk)).env("RUSTDOCFLAGS", "-D warnings"),
        )?;
    }
    build::daemons(dpdk, true)?;
    if packages::is_root() {
        image::all(&region::images_dir())?;
    } else {
        eprintln!("rack: not root: the whole-system tests say so and do nothing");
    }
    let mut system = build::cargo();
    system.arg("test").args(build::selection(dpdk));
    let system = tests(&mut system, |package| package == "hw-sim")?;
    // One at a time: each may hold two emulated guests on two cores.
    system.arg("--").args(options.filter.iter()).args(["--test-threads", "1", "--nocapture"]);
    if options.long {
        system.env("CARDINAL_LONG", "1");
    }
    step("whole-system tests", system)?;
    Ok(ExitCode::SUCCESS)
}

/// Adds the integration tests of the wanted packages by name, so that cargo
/// takes the same selection of crates for all kinds of tests.
fn tests(command: &mut Command, wanted: impl Fn(&str) -> bool) -> Result<&mut Command> {
    for package in ["control", "dataplane", "hw-sim", "nitro-card", "storage-target", "thin-hv"] {
        let folder = build::root().join(package).join("tests");
        for entry in std::fs::read_dir(folder).into_iter().flatten().filter(|_| wanted(package)) {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "rs")
                && let Some(name) = path.file_stem().and_then(|name| name.to_str())
            {
                command.args(["--test", name]);
            }
        }
    }
    Ok(command)
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
