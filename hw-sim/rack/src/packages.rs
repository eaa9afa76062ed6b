//! Which Debian packages the rack needs, and what works without them.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Result, bail};

use crate::progress::Step;

/// One package, the file that shows it is here, and what it is for.
struct Package {
    name: &'static str,
    evidence: &'static str,
    purpose: &'static str,
}

const PACKAGES: &[Package] = &[
    Package { name: "qemu-system-x86", evidence: "/usr/bin/qemu-system-x86_64", purpose: "guests" },
    Package { name: "mmdebstrap", evidence: "/usr/bin/mmdebstrap", purpose: "images" },
    Package { name: "e2fsprogs", evidence: "/sbin/mke2fs", purpose: "images" },
    Package { name: "cpio", evidence: "/usr/bin/cpio", purpose: "images" },
    Package { name: "lz4", evidence: "/usr/bin/lz4", purpose: "images" },
    Package { name: "busybox-static", evidence: "/bin/busybox", purpose: "images" },
    Package { name: "iproute2", evidence: "/sbin/ip", purpose: "the wires" },
    Package { name: "ethtool", evidence: "/sbin/ethtool", purpose: "the wires" },
    Package { name: "openssh-client", evidence: "/usr/bin/ssh", purpose: "login" },
    Package { name: "gcc", evidence: "/usr/bin/cc", purpose: "building" },
    Package { name: "libc6-dev", evidence: "/usr/include/stdio.h", purpose: "building" },
    Package { name: "libdpdk-dev", evidence: "/usr/include/dpdk/rte_ethdev.h", purpose: "the DPDK build" },
    Package { name: "libclang-dev", evidence: "/usr/share/doc/libclang-dev", purpose: "the DPDK build" },
    Package { name: "pkg-config", evidence: "/usr/bin/pkg-config", purpose: "the DPDK build" },
];

/// Packages that only `cargo rack test` needs.
const TEST_PACKAGES: &[Package] = &[
    Package { name: "tcpdump", evidence: "/usr/bin/tcpdump", purpose: "captures" },
    Package { name: "iputils-ping", evidence: "/bin/ping", purpose: "reachability tests" },
    Package { name: "python3-venv", evidence: "/usr/share/doc/python3-venv", purpose: "awscli and boto3" },
];

/// What is different for an ordinary user, in one line.
pub const WITHOUT_ROOT: &str = "cards speak over loopback UDP, the internet is a process (ssh and demo work, exec does not), \
                                hosts stay in this user's network, missing packages are only named";

/// True when this process may install packages, namespaces and bridges.
pub fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions and cannot fail.
    #[allow(unsafe_code)]
    let user = unsafe { libc::geteuid() };
    user == 0
}

/// True when the machine can build the DPDK devices.
pub fn has_dpdk() -> bool {
    Path::new("/usr/include/dpdk/rte_ethdev.h").exists()
        && Command::new("pkg-config").args(["--exists", "libdpdk"]).status().is_ok_and(|status| status.success())
}

/// Installs what is missing, or says which one line would.
pub fn ensure(for_tests: bool) -> Result<()> {
    let missing: Vec<&str> = wanted(for_tests).filter(|package| !present(package)).map(|package| package.name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !is_root() || !Path::new("/usr/bin/apt-get").exists() {
        eprintln!("rack: missing packages; as root run: apt-get install -y {}", missing.join(" "));
        return Ok(());
    }
    let step = Step::begin(&format!("install {}", missing.join(" ")));
    // Lists may be old or absent: a failed update still lets a cached list work.
    let _ = apt().arg("update").status();
    let status = apt().args(["install", "-y", "--no-install-recommends"]).args(&missing).status()?;
    step.end();
    if !status.success() {
        bail!("apt-get could not install {}: {status}", missing.join(" "));
    }
    Ok(())
}

/// Prints one line for each thing the rack uses.
pub fn doctor() -> Result<ExitCode> {
    let mut complete = true;
    for package in wanted(true) {
        let here = present(package);
        complete &= here;
        println!("{:<8} {:<18} for {}", if here { "ok" } else { "missing" }, package.name, package.purpose);
    }
    println!("{:<8} {:<18} for namespaces and packages", if is_root() { "ok" } else { "missing" }, "root");
    if !is_root() {
        println!("{:<8} {:<18} {WITHOUT_ROOT}", "", "");
    }
    println!(
        "{:<8} {:<18} for the native machine (not used yet)",
        if Path::new("/dev/kvm").exists() { "ok" } else { "missing" },
        "/dev/kvm"
    );
    println!("{:<8} {:<18} for packets", if has_dpdk() { "ok" } else { "missing" }, "libdpdk");
    Ok(if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn wanted(for_tests: bool) -> impl Iterator<Item = &'static Package> {
    PACKAGES.iter().chain(if for_tests { TEST_PACKAGES } else { &[] })
}

fn present(package: &Package) -> bool {
    Path::new(package.evidence).exists() || Path::new(&format!("/usr{}", package.evidence)).exists()
}

fn apt() -> Command {
    let mut command = Command::new("apt-get");
    command.arg("-qq").env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null()).stdout(Stdio::null());
    command
}
