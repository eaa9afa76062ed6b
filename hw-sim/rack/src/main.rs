//! `cargo rack`: a whole region on one machine, and its tests.
//!
//! The rack is the lab around the product. It installs what is missing, builds
//! the daemons and two images, lays the wires (network namespaces), starts
//! every process with a configuration file, and takes all of it away again. It
//! knows the daemons by their command lines only and links none of their code.
//!
//! | module | what it knows |
//! |---|---|
//! | [`packages`] | which Debian packages this machine needs |
//! | [`build`] | how the daemons are built |
//! | [`image`] | how the two guest images are made from Debian packages |
//! | [`wire`] | namespaces, bridges and the simulated internet side |
//! | [`region`] | files and processes of one running region |
//! | [`tenant`] | how a tenant calls it |
//! | [`demo`] | the story |
//! | [`suite`] | what `cargo rack test` runs |

// An absent name in a serde_json::Value reads as Null: indexing one cannot panic.
#![allow(clippy::indexing_slicing)]

mod build;
mod connect;
mod demo;
mod image;
mod loopback;
mod packages;
mod process;
mod progress;
mod region;
mod suite;
mod tenant;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// A whole region on one machine.
#[derive(Parser)]
#[command(name = "cargo rack", bin_name = "cargo rack")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a region and stay until Ctrl-C.
    Up(Up),
    /// Stop a region that was left running, and remove what it made.
    Down(At),
    /// Tell the story on a running region, with timings.
    Demo(At),
    /// Log in to an instance through its public address.
    Ssh {
        #[command(flatten)]
        at: At,
        /// The instance (the newest running one if absent), then a command to run there instead of a shell.
        #[arg(value_name = "INSTANCE] [COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Print the console of an instance and follow it.
    Console {
        #[command(flatten)]
        at: At,
        /// The instance.
        instance: String,
        /// Print what there is and stop.
        #[arg(long)]
        once: bool,
    },
    /// Carry standard input and output to a public address and port: a ProxyCommand for ssh.
    Connect {
        #[command(flatten)]
        at: At,
        /// The public address.
        address: std::net::Ipv4Addr,
        /// The port.
        port: u16,
    },
    /// Run a command on the simulated internet side.
    Exec {
        #[command(flatten)]
        at: At,
        /// The command and its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// Build the guest images into the cache, without starting a region.
    Images,
    /// Say what this machine has and lacks.
    Doctor,
    /// Format, lints, unit tests, docs, then the whole-system tests.
    Test(suite::Options),
}

/// Which region a command is about.
#[derive(Args, Clone)]
struct At {
    /// The folder of the region.
    #[arg(long, default_value_os_t = region::default_dir())]
    dir: PathBuf,
}

/// How a region starts.
#[derive(Args, Clone)]
struct Up {
    #[command(flatten)]
    at: At,
    /// Availability zones, a to f.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=6))]
    zones: u8,
    /// Servers (a card and a host each) in every zone.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    hosts_per_zone: u8,
    /// Where the tenant API listens.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: std::net::SocketAddr,
    /// What runs the guests.
    #[arg(long, value_enum, default_value_t = Machine::Auto)]
    machine: Machine,
    /// Build and run the cards without DPDK.
    #[arg(long)]
    no_dpdk: bool,
    /// Written as JSON once the region serves requests.
    #[arg(long)]
    ready_file: Option<PathBuf>,
    /// Request throttling of the API as EC2 has it.
    #[arg(long, value_enum, default_value_t = Throttle::Off)]
    throttle: Throttle,
    /// Keep the data for the next start.
    #[arg(long)]
    keep: bool,
    /// Where the guest images are kept.
    #[arg(long, default_value_os_t = region::images_dir())]
    images: PathBuf,
    /// Do not build the daemons: they are there.
    #[arg(long, hide = true)]
    no_build: bool,
    /// Do not build the debian-12 image.
    #[arg(long)]
    no_debian: bool,
}

/// What runs the guests.
#[derive(Clone, Copy, ValueEnum)]
enum Machine {
    /// What this machine can do best.
    Auto,
    /// The native virtual machine monitor.
    Kvm,
    /// The packaged QEMU.
    Qemu,
    /// A state machine without a guest.
    Sim,
}

/// Request throttling.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Throttle {
    /// Every request is served.
    Off,
    /// EC2's buckets.
    On,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Up(up) => region::up(&up),
        Command::Down(at) => region::down(&at.dir),
        Command::Demo(at) => demo::run(&at.dir),
        Command::Ssh { at, words } => tenant::ssh(&at.dir, &words),
        Command::Console { at, instance, once } => tenant::console(&at.dir, &instance, once),
        Command::Connect { at, address, port } => connect::run(&at.dir, address, port),
        Command::Exec { at, command } => region::exec(&at.dir, &command),
        Command::Images => image::all(&region::images_dir()).map(|()| ExitCode::SUCCESS),
        Command::Doctor => packages::doctor(),
        Command::Test(options) => suite::run(&options),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("rack: {error:#}");
            ExitCode::FAILURE
        }
    }
}
