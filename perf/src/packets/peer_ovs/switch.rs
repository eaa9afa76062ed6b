//! A switch of our own: database, daemon and bridges, gone when dropped.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use dataplane::Mac;

const DAEMON: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
const DATABASE: &str = "/usr/sbin/ovsdb-server";
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
const PACKAGE: &str = "openvswitch-switch-dpdk";
const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";
/// Huge pages of 2 MiB for packet buffers.
const PAGES: u64 = 700;
const PATIENCE: Duration = Duration::from_secs(20);

/// Installs the package when it is missing and we may.
pub fn install() -> anyhow::Result<()> {
    if Path::new(DAEMON).exists() && Path::new(DATABASE).exists() {
        return Ok(());
    }
    eprintln!("perf packets: installs {PACKAGE}");
    let installed = Command::new("apt-get")
        .args(["install", "-y", "-q", "--no-install-recommends", PACKAGE])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    // The package starts a switch for the whole machine, which nobody asked for.
    if installed && Path::new("/run/systemd/system").exists() {
        let _ = Command::new("systemctl").args(["disable", "--now", "openvswitch-switch", "dpdk"]).status();
    }
    anyhow::ensure!(Path::new(DAEMON).exists(), "OVS-DPDK is not here and could not be installed: as root, apt-get install {PACKAGE}");
    Ok(())
}

/// What the daemon calls itself.
pub fn version() -> String {
    let output = Command::new(DAEMON).arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().filter_map(|line| line.rsplit(' ').next()).take(2).collect::<Vec<_>>().join(", DPDK ")
}

/// A running switch.
pub struct Switch {
    directory: PathBuf,
    database: Option<Child>,
    daemon: Option<Child>,
    pages: Option<HugePages>,
}

impl Switch {
    /// Starts a switch that is `card` on the underlay, reads `capture` without end,
    /// and has a tunnel to `peer`.
    pub fn start(directory: &Path, capture: &Path, card: (Mac, Ipv4Addr), peer: (Mac, Ipv4Addr)) -> anyhow::Result<Self> {
        let processors = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        let last = processors.trim().rsplit(['-', ',']).next().and_then(|last| last.parse::<u32>().ok()).unwrap_or(0);
        anyhow::ensure!((1..63).contains(&last), "the peer needs two processors, one of them for its packet thread");
        let mut switch = Self { directory: directory.to_owned(), database: None, daemon: None, pages: HugePages::take(PAGES) };
        let file = |name: &str| directory.join(name).display().to_string();
        run("ovsdb-tool", &["create", &file("conf.db"), SCHEMA])?;
        let mut database = switch.background(DATABASE);
        database.args([file("conf.db"), format!("--remote=punix:{}", file("db.sock")), format!("--unixctl={}", file("db.ctl"))]);
        switch.database = Some(database.arg(format!("--pidfile={}", file("db.pid"))).spawn().context(DATABASE)?);
        wait_for(&directory.join("db.sock"))?;

        let memory = if switch.pages.is_some() { "--in-memory" } else { "--no-huge" };
        let extra = format!("{memory} --no-pci -m 1024 --file-prefix=perf{}", std::process::id());
        switch.vsctl(&["--no-wait", "init"])?;
        switch.vsctl(&[
            "--no-wait",
            "set",
            "Open_vSwitch",
            ".",
            "other_config:dpdk-init=true",
            "other_config:dpdk-lcore-mask=0x1",
            &format!("other_config:pmd-cpu-mask={:#x}", 1u64 << last),
            &format!("other_config:dpdk-extra=\"{extra}\""),
        ])?;
        let mut daemon = switch.background("unshare");
        daemon.args(["-n", "--", DAEMON]);
        daemon.args([format!("unix:{}", file("db.sock")), format!("--unixctl={}", file("vs.ctl"))]);
        daemon.args([format!("--pidfile={}", file("vs.pid")), format!("--log-file={}", file("vs.log"))]);
        switch.daemon = Some(daemon.spawn().context(DAEMON)?);
        wait_for(&directory.join("vs.ctl")).with_context(|| switch.log())?;
        switch.bridges(capture, card, peer).with_context(|| switch.log())?;
        Ok(switch)
    }

    fn bridges(&mut self, capture: &Path, (mac, address): (Mac, Ipv4Addr), peer: (Mac, Ipv4Addr)) -> anyhow::Result<()> {
        let hardware = format!("other_config:hwaddr={mac}");
        self.vsctl(&["add-br", "br-phy", "--", "set", "bridge", "br-phy", "datapath_type=netdev", &hardware])?;
        self.vsctl(&["add-br", "br-int", "--", "set", "bridge", "br-int", "datapath_type=netdev"])?;
        // The shortest network that holds both: OVS takes its route from there.
        let common = (u32::from(address) ^ u32::from(peer.1)).leading_zeros();
        self.ip(&["addr", "add", &format!("{address}/{common}"), "dev", "br-phy"])?;
        self.ip(&["link", "set", "br-phy", "up"])?;
        let source = format!("options:dpdk-devargs=\"eth_pcap0,rx_pcap={},infinite_rx=1\"", capture.display());
        self.port("br-phy", "source", 1, "dpdk", &[&source])?;
        self.port("br-phy", "sink", 2, "dpdk", &["options:dpdk-devargs=\"net_null0,no-rx=1\""])?;
        self.port("br-phy", "up", 3, "patch", &["options:peer=down"])?;
        self.port("br-int", "vxlan", 1, "vxlan", &["options:remote_ip=flow", "options:key=flow"])?;
        self.port("br-int", "guests", 2, "dpdk", &["options:dpdk-devargs=\"net_null1,no-rx=1\""])?;
        self.port("br-int", "down", 3, "patch", &["options:peer=up"])?;
        for name in ["source", "sink", "vxlan", "guests"] {
            self.port_check(name)?;
        }
        self.appctl(&["tnl/neigh/set", "br-phy", &peer.1.to_string(), &peer.0.to_string()])?;
        Ok(())
    }

    fn port(&self, bridge: &str, name: &str, number: u32, kind: &str, options: &[&str]) -> anyhow::Result<()> {
        let (kind, number) = (format!("type={kind}"), format!("ofport_request={number}"));
        let mut arguments = vec!["add-port", bridge, name, "--", "set", "interface", name, &kind, &number];
        arguments.extend(options);
        self.vsctl(&arguments)?;
        Ok(())
    }

    /// Fails when a port did not come up as asked.
    fn port_check(&self, name: &str) -> anyhow::Result<()> {
        let error = self.vsctl(&["get", "interface", name, "error"])?;
        anyhow::ensure!(error.trim() == "[]", "OVS refuses port {name}: {}", error.trim());
        Ok(())
    }

    /// Replaces the flows of a bridge.
    pub fn flows(&self, bridge: &str, flows: &str) -> anyhow::Result<()> {
        let path = self.directory.join(format!("{bridge}.flows"));
        fs::write(&path, flows)?;
        let management = format!("unix:{}", self.directory.join(format!("{bridge}.mgmt")).display());
        run("ovs-ofctl", &["-O", "OpenFlow15", "replace-flows", &management, &path.display().to_string()]).map(drop)
    }

    /// Sets a field of the switch.
    pub fn set(&self, field: &str) -> anyhow::Result<()> {
        self.vsctl(&["set", "Open_vSwitch", ".", field]).map(drop)
    }

    /// Puts the packet thread at SCHED_FIFO, or back. One that polls at FIFO for long
    /// would starve whatever else wants its processor.
    pub fn realtime(&self, on: bool) -> anyhow::Result<()> {
        let pid = self.daemon.as_ref().map_or(0, Child::id);
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.path();
            if fs::read_to_string(task.join("comm")).unwrap_or_default().starts_with("pmd-") {
                let id = task.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let (policy, priority) = if on { ("-f", "50") } else { ("-o", "0") };
                run("chrt", &[policy, "-p", priority, &id])?;
            }
        }
        Ok(())
    }

    /// Lets `seconds` pass: the packet thread's cycles for each packet it received.
    pub fn window(&self, seconds: f64) -> anyhow::Result<f64> {
        self.appctl(&["dpif-netdev/pmd-stats-clear"])?;
        std::thread::sleep(Duration::from_secs_f64(seconds));
        let text = self.appctl(&["dpif-netdev/pmd-stats-show"])?;
        let pmd = text.split("main thread").next().unwrap_or_default();
        let line = pmd.lines().find_map(|line| line.trim().strip_prefix("avg cycles per packet: "));
        line.and_then(|value| value.split(' ').next()?.parse().ok()).with_context(|| format!("no packets in: {text}"))
    }

    /// Packets that came from the capture, and that left at both sinks, so far.
    pub fn traffic(&self) -> anyhow::Result<(u64, u64)> {
        let text = self.appctl(&["dpctl/show", "-s", "netdev@ovs-netdev"])?;
        let (mut received, mut sent, mut port) = (0, 0, "");
        for line in text.lines().map(str::trim_start) {
            let count = |rest: &str| rest.split(' ').next().and_then(|count| count.parse::<u64>().ok()).unwrap_or(0);
            if line.starts_with("port ") {
                port = line.split(' ').nth(2).unwrap_or_default();
            } else if let Some(rest) = line.strip_prefix("RX packets:").filter(|_| port == "source") {
                received += count(rest);
            } else if let Some(rest) = line.strip_prefix("TX packets:").filter(|_| matches!(port, "sink" | "guests")) {
                sent += count(rest);
            }
        }
        Ok((received, sent))
    }

    /// Connections that OVS tracks.
    pub fn connections(&self) -> anyhow::Result<u64> {
        let text = self.appctl(&["dpctl/ct-stats-show", "netdev@ovs-netdev"])?;
        Ok(text.lines().find_map(|line| line.trim().strip_prefix("Total: ")?.parse().ok()).unwrap_or(0))
    }

    fn vsctl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let database = format!("--db=unix:{}", self.directory.join("db.sock").display());
        run("ovs-vsctl", &[&[database.as_str(), "--timeout=60"], arguments].concat())
    }

    fn appctl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let control = self.directory.join("vs.ctl").display().to_string();
        run("ovs-appctl", &[&["--timeout=60", "-t", control.as_str()], arguments].concat())
    }

    /// Runs `ip` in the switch's network namespace.
    fn ip(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let pid = self.daemon.as_ref().map_or(0, Child::id).to_string();
        run("nsenter", &[&["-t", pid.as_str(), "-n", "ip"], arguments].concat())
    }

    fn background(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for variable in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR"] {
            command.env(variable, &self.directory);
        }
        command.current_dir(&self.directory).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// The end of the daemon's log.
    fn log(&self) -> String {
        let text = fs::read_to_string(self.directory.join("vs.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines.get(lines.len().saturating_sub(8)..).unwrap_or_default().join("\n")
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        for child in [&mut self.daemon, &mut self.database].into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
        self.pages.take();
    }
}

/// Huge pages beyond those that were there; given back when dropped.
struct HugePages {
    before: u64,
}

impl HugePages {
    /// `None`: the kernel does not find as many.
    fn take(count: u64) -> Option<Self> {
        let read = || fs::read_to_string(HUGE_PAGES).ok()?.trim().parse::<u64>().ok();
        let pages = Self { before: read()? };
        fs::write(HUGE_PAGES, (pages.before + count).to_string()).ok()?;
        (read()? == pages.before + count).then_some(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(HUGE_PAGES, self.before.to_string());
    }
}

fn wait_for(path: &Path) -> anyhow::Result<()> {
    let start = Instant::now();
    while !path.exists() {
        anyhow::ensure!(start.elapsed() < PATIENCE, "{} did not appear", path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Runs a command to its end: what it printed, or what it complained of.
pub fn run(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().with_context(|| program.to_owned())?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), complaint.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
