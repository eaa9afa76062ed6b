//! One running region: its files, its processes, its end.
//!
//! ```text
//! DIR/ready.json             what scripts read (also copied to --ready-file)
//! DIR/{control,card-a-1,host-a-1,link-a-1}.toml and folders of the same names
//! DIR/internet.toml          without root only
//! DIR/tls/                   the region authority and one certificate a daemon
//! DIR/keys/rack              the ssh key of `cargo rack ssh`
//! DIR/logs/NAME.log
//! ```
//!
//! Order of start: wires, the internet where it is a process, cards, hosts, control; order of stop: control, cards,
//! hosts with their machines, wires. Every process is found again by the
//! configuration file on its command line, so `down` also stops what was
//! restarted by hand.

use std::fs;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use crate::loopback::Loopback;
use crate::process::{self, Process};
use crate::progress::Step;
use crate::tenant::Tenant;
use crate::wire::{self, Wire};
use crate::{Machine, Throttle, Up, build, image, packages};

const REGION: &str = "us-east-1";
/// What a simulated host has: mapped onto the real machine, and said so.
const HOST_CORES: u32 = 8;
const HOST_MEMORY_BYTES: u64 = 16 << 30;
const STORAGE_BYTES: u64 = 1 << 40;

/// Where a region lives unless `--dir` says otherwise.
pub fn default_dir() -> PathBuf {
    build::root().join("target/rack")
}

/// Images are the same for all regions of this checkout.
pub fn images_dir() -> PathBuf {
    build::root().join("target/images")
}

/// `cargo rack up`.
pub fn up(options: &Up) -> Result<ExitCode> {
    if matches!(options.machine, Machine::Kvm) {
        bail!("--machine kvm: the native machine is not built yet; use auto, qemu or sim");
    }
    packages::ensure(false)?;
    if !packages::is_root() {
        eprintln!("rack: not root: {}", packages::WITHOUT_ROOT);
    }
    let dpdk = !options.no_dpdk && packages::has_dpdk();
    if !options.no_build {
        build::daemons(dpdk, false)?;
    }
    let images = absolute(&options.images)?;
    fs::create_dir_all(&images)?;
    image::stubs(&images)?;
    let mut options = Up { images: images.clone(), ..options.clone() };
    if !matches!(options.machine, Machine::Sim)
        && let Err(error) = image::mini(&images)
    {
        if packages::is_root() {
            return Err(error);
        }
        eprintln!(
            "rack: image mini: {error:#}\nrack: images are built by root: cargo rack images. Until then guests are state machines (--machine sim)"
        );
        options.machine = Machine::Sim;
    }
    let guests = !matches!(options.machine, Machine::Sim);
    let options = &options;

    let dir = absolute(&options.at.dir)?;
    if dir.join("ready.json").exists() && !process::of(&dir).is_empty() {
        bail!("a region runs in {} already; stop it with: cargo rack down", dir.display());
    }
    stop_signals()?;
    let begun = Instant::now();
    let mut region = Region::create(&dir, options, dpdk)?;
    let result = region.run(options, begun, guests);
    region.stop();
    if options.keep {
        eprintln!("rack: data kept in {}", dir.display());
    } else {
        fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
    }
    if let Some(file) = &options.ready_file {
        let _ = fs::remove_file(file);
    }
    result.map(|()| ExitCode::SUCCESS)
}

/// `cargo rack down`.
pub fn down(dir: &Path) -> Result<ExitCode> {
    let dir = absolute(dir)?;
    let found = process::of(&dir);
    for (pid, _) in &found {
        process::kill(*pid, libc::SIGTERM);
    }
    process::wait_gone(&dir, Duration::from_secs(5));
    for (pid, _) in process::of(&dir) {
        process::kill(pid, libc::SIGKILL);
    }
    if packages::is_root() {
        Wire::new(&name_of(&dir), Vec::new()).remove();
    }
    if dir.join("control.toml").exists() {
        fs::remove_dir_all(&dir)?;
    }
    eprintln!("rack: {} processes stopped, {} removed", found.len(), dir.display());
    Ok(ExitCode::SUCCESS)
}

/// `cargo rack exec`.
pub fn exec(dir: &Path, command: &[String]) -> Result<ExitCode> {
    let ready = ready(dir)?;
    let Some(namespace) = ready["internet_namespace"].as_str() else {
        bail!(
            "this region was started without root, so its internet is a process and no network namespace to run {} in; \
             connect to public addresses by way of http://{} (HTTP CONNECT, as with curl -p -x)",
            command.first().map_or("commands", String::as_str),
            ready["internet_proxy"].as_str().unwrap_or_default()
        );
    };
    let error = Command::new("ip").args(["netns", "exec", namespace]).args(command).exec();
    Err(error).context("ip netns exec")
}

/// What the ready file says.
pub fn ready(dir: &Path) -> Result<Value> {
    let path = absolute(dir)?.join("ready.json");
    let text = fs::read_to_string(&path).with_context(|| format!("no region in {}; start one with: cargo rack up", dir.display()))?;
    Ok(serde_json::from_str(&text)?)
}

/// The region's name in namespaces: short, and one for each folder.
fn name_of(dir: &Path) -> String {
    // FNV-1a; only distinctness matters.
    let hash = dir
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    format!("rack-{:06x}", hash & 0xff_ffff)
}

/// What connects the cards with each other and with the internet.
enum Wires {
    /// Namespaces of the kernel, for root.
    Kernel(Wire),
    /// Sockets and a process, for everybody.
    Loopback(Loopback),
}

struct Region {
    dir: PathBuf,
    images: PathBuf,
    wires: Wires,
    processes: Vec<Process>,
}

impl Region {
    /// Writes every configuration file and lays the wires.
    fn create(dir: &Path, options: &Up, dpdk: bool) -> Result<Self> {
        for folder in ["tls", "keys", "logs", "control"] {
            fs::create_dir_all(dir.join(folder))?;
        }
        let cardinal = build::binary("cardinal")?;
        let tls = dir.join("tls");
        if !tls.join("ca.pem").exists() {
            checked(Command::new(&cardinal).args(["authority", "init", "--dir"]).arg(&tls))?;
        }

        let mut cards = Vec::new();
        let mut shorts = Vec::new();
        let mut zones = Vec::new();
        for letter in ('a'..='f').take(usize::from(options.zones)) {
            let zone = format!("{REGION}{letter}");
            for number in 1..=options.hosts_per_zone {
                cards.push((format!("{letter}-{number}"), zone.clone()));
                shorts.push(format!("{letter}{number}"));
            }
            zones.push(zone);
        }
        let wires = if packages::is_root() {
            let wire = Wire::new(&name_of(dir), shorts);
            wire.lay()?;
            Wires::Kernel(wire)
        } else {
            Wires::Loopback(Loopback::lay(&name_of(dir), cards.len())?)
        };
        let mut region = Self { dir: dir.to_owned(), images: options.images.clone(), wires, processes: Vec::new() };
        if let Wires::Loopback(loopback) = &region.wires {
            let text = loopback.internet();
            region.add("internet", "internet", "", "internet", &text)?;
        }
        let mut ports = free_ports(cards.len() * 3)?.into_iter();
        let mut port = || ports.next().ok_or_else(|| anyhow!("no free port"));

        let mut control_cards = String::new();
        for (index, (place, zone)) in cards.iter().enumerate() {
            let id = format!("card-{zone}-{}", place.rsplit('-').next().unwrap_or("1"));
            let ports = (port()?, port()?, port()?);
            issue(&cardinal, &tls, &id)?;
            let wires = match &region.wires {
                Wires::Kernel(wire) => wire.card(index, if dpdk { "dpdk" } else { "packet" })?,
                Wires::Loopback(loopback) => loopback.card(index)?,
            };
            region.add_card(&id, place, zone, ports, &wires)?;
            region.add_host(place, zone, options.machine)?;
            control_cards.push_str(&format!("\n[[cards]]\nid = \"{id}\"\naddress = \"127.0.0.1:{}\"\n", ports.0));
        }
        issue(&cardinal, &tls, "control")?;
        let text = format!(
            "region = \"{REGION}\"\nlisten = \"{listen}\"\nstate_dir = \"{state}\"\nimages_dir = \"{images}\"\npublic_pool = \"{pool}\"\n\
             zones = {zones:?}\nthrottle = {throttle}\n\n[tls]\nauthority = \"{tls}/ca.pem\"\ncertificate = \"{tls}/control.pem\"\nkey = \"{tls}/control.key\"\n{control_cards}",
            listen = options.listen,
            state = dir.join("control").display(),
            images = region.images.display(),
            pool = wire::PUBLIC_POOL,
            throttle = options.throttle == Throttle::On,
            tls = tls.display(),
        );
        region.add("control", "control", "", "control", &text)?;
        Ok(region)
    }

    /// The card at a place, with its ports for gRPC, metrics and storage.
    fn add_card(&mut self, id: &str, place: &str, zone: &str, (grpc, metrics, storage): (u16, u16, u16), wires: &str) -> Result<()> {
        let card = format!("card-{place}");
        let (state, link) = (self.dir.join(&card), self.link(place));
        fs::create_dir_all(&link)?;
        fs::create_dir_all(&state)?;
        let text = format!(
            "id = \"{id}\"\nzone = \"{zone}\"\nstate_dir = \"{state}\"\nlink_dir = \"{link}\"\nimages_dir = \"{images}\"\n\
             listen = \"127.0.0.1:{grpc}\"\nmetrics_listen = \"127.0.0.1:{metrics}\"\nroles = [\"compute\", \"storage\"]\n\n\
             [tls]\nauthority = \"{tls}/ca.pem\"\ncertificate = \"{tls}/{id}.pem\"\nkey = \"{tls}/{id}.key\"\n\n\
             {wires}\n\
             [storage]\nlisten = \"127.0.0.1:{storage}\"\ncapacity_bytes = {STORAGE_BYTES}\n",
            state = state.display(),
            link = link.display(),
            images = self.images.display(),
            tls = self.dir.join("tls").display(),
        );
        self.add(&card, "card", zone, "nitro-card", &text)
    }

    /// The host under the card at a place.
    fn add_host(&mut self, place: &str, zone: &str, machine: Machine) -> Result<()> {
        let host = format!("host-{place}");
        let run = self.dir.join(&host);
        fs::create_dir_all(&run)?;
        let machine = match machine {
            Machine::Auto => "auto",
            Machine::Kvm => "kvm",
            Machine::Qemu => "qemu",
            Machine::Sim => "sim",
        };
        let text = format!(
            "link_dir = \"{}\"\nrun_dir = \"{}\"\nmachine = \"{machine}\"\ncores = {HOST_CORES}\nmemory_bytes = {HOST_MEMORY_BYTES}\n",
            self.link(place).display(),
            run.display(),
        );
        self.add(&host, "host", zone, "thin-hv", &text)
    }

    /// The folder that stands for the PCIe link of a card and its host.
    fn link(&self, place: &str) -> PathBuf {
        self.dir.join(format!("link-{place}"))
    }

    fn add(&mut self, name: &str, kind: &'static str, zone: &str, binary: &str, config: &str) -> Result<()> {
        let path = self.dir.join(format!("{name}.toml"));
        fs::write(&path, config)?;
        self.processes.push(Process {
            name: name.to_owned(),
            kind,
            zone: zone.to_owned(),
            binary: build::binary(binary)?,
            config: path,
            log: self.dir.join("logs").join(format!("{name}.log")),
            child: None,
        });
        Ok(())
    }

    /// Starts everything, waits until it serves, and stays until a signal.
    fn run(&mut self, options: &Up, begun: Instant, guests: bool) -> Result<()> {
        for process in &mut self.processes {
            process.start()?;
        }
        let step = Step::begin("start the region");
        let endpoint = format!("http://{}", options.listen);
        let account = self.account(&options.listen.to_string())?;
        let tenant = Tenant::of(&endpoint, REGION, &account)?;
        self.wait_for_cards(&tenant)?;
        self.prepare_login(&tenant)?;
        step.end();
        self.publish(options, &endpoint, &account, &tenant)?;
        eprintln!("rack: ready after {:.1} s", begun.elapsed().as_secs_f64());
        self.print_welcome(&endpoint, &account, &tenant)?;

        let images = self.images.clone();
        let mut builder = (guests && !options.no_debian && !image::is_built(&images, "debian-12"))
            .then(|| std::thread::spawn(move || image::debian(&images)));
        while !STOP.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(200));
            if builder.as_ref().is_some_and(std::thread::JoinHandle::is_finished) {
                match builder.take().map(std::thread::JoinHandle::join) {
                    Some(Ok(Ok(()))) => {
                        let deadline = Instant::now() + Duration::from_secs(10);
                        while !tenant.images()?.contains_key("debian-12") && Instant::now() < deadline {
                            std::thread::sleep(Duration::from_millis(200));
                        }
                        self.publish(options, &endpoint, &account, &tenant)?;
                    }
                    Some(Ok(Err(error))) => eprintln!("rack: image debian-12: {error:#}"),
                    _ => eprintln!("rack: the builder of debian-12 died"),
                }
            }
            for process in &mut self.processes {
                process.notice_end();
            }
        }
        Ok(())
    }

    /// The first account, or the one of an earlier start with `--keep`.
    fn account(&mut self, listen: &str) -> Result<Value> {
        let kept = self.dir.join("account.json");
        let socket = self.dir.join("control/admin.sock");
        let deadline = Instant::now() + Duration::from_secs(20);
        while !socket.exists() || std::net::TcpStream::connect(listen).is_err() {
            self.check_alive()?;
            if Instant::now() > deadline {
                bail!("control does not listen on {listen}; see {}/logs/control.log", self.dir.display());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        if let Ok(text) = fs::read_to_string(&kept) {
            return Ok(serde_json::from_str(&text)?);
        }
        let output =
            Command::new(build::binary("cardinal")?).args(["account", "create", "--json", "--admin-socket"]).arg(&socket).output()?;
        if !output.status.success() {
            bail!("cardinal account create: {}", String::from_utf8_lossy(&output.stderr));
        }
        fs::write(&kept, &output.stdout)?;
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn check_alive(&mut self) -> Result<()> {
        for process in &mut self.processes {
            if let Some(child) = &mut process.child
                && let Some(status) = child.try_wait()?
            {
                bail!("{} ended ({status}); the end of its log:\n{}", process.name, tail(&process.log));
            }
        }
        Ok(())
    }

    /// Until every card is connected with its host, launches could be refused.
    fn wait_for_cards(&mut self, tenant: &Tenant) -> Result<()> {
        let wanted = self.processes.iter().filter(|process| process.kind == "card").count();
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let ready = tenant.healthz().ok().and_then(|health| health["cards_ready"].as_u64()).unwrap_or(0);
            if usize::try_from(ready).is_ok_and(|ready| ready >= wanted) {
                return Ok(());
            }
            self.check_alive()?;
            if STOP.load(Ordering::Relaxed) {
                bail!("stopped while it started");
            }
            if Instant::now() > deadline {
                bail!("only {ready} of {wanted} cards came up; see {}/logs", self.dir.display());
            }
            std::thread::sleep(Duration::from_millis(25));
        }
    }

    /// A key pair and a security group `rack`, so that the printed commands work.
    fn prepare_login(&self, tenant: &Tenant) -> Result<()> {
        let key = self.dir.join("keys/rack");
        if !key.exists() {
            checked(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "rack", "-f"]).arg(&key))?;
        }
        tenant.prepare_login(&fs::read(key.with_extension("pub"))?)
    }

    fn publish(&self, options: &Up, endpoint: &str, account: &Value, tenant: &Tenant) -> Result<()> {
        let images = tenant.images()?;
        let mut users = serde_json::Map::new();
        for name in images.keys() {
            let manifest: Value = serde_json::from_slice(&fs::read(self.images.join(format!("{name}.json")))?)?;
            if manifest.get("boot").is_some() {
                users.insert(name.clone(), manifest["user"].clone());
            }
        }
        let processes: Vec<Value> = self.processes.iter().map(Process::describe).collect();
        let (wire, proxy) = match &self.wires {
            Wires::Kernel(wire) => (Some(wire), None),
            Wires::Loopback(loopback) => (None, Some(loopback.proxy())),
        };
        let ready = json!({
            "endpoint": endpoint,
            "region": REGION,
            "account_id": account["account_id"],
            "access_key_id": account["access_key_id"],
            "secret_access_key": account["secret_access_key"],
            "images": images,
            "users": users,
            "processes": processes,
            "dir": self.dir,
            "wire_namespace": wire.map(Wire::wire_namespace),
            "internet_namespace": wire.map(Wire::internet_namespace),
            "internet_proxy": proxy,
            "far_host": wire::FAR_HOST,
        });
        let text = serde_json::to_vec_pretty(&ready)?;
        let mut files = vec![self.dir.join("ready.json")];
        files.extend(options.ready_file.clone());
        for file in files {
            let temporary = file.with_extension("new");
            fs::write(&temporary, &text)?;
            fs::rename(temporary, file)?;
        }
        Ok(())
    }

    fn print_welcome(&self, endpoint: &str, account: &Value, tenant: &Tenant) -> Result<()> {
        let images = tenant.images()?;
        let image = images.get("mini").or_else(|| images.values().next()).ok_or_else(|| anyhow!("no image is registered"))?;
        let (key, secret) = (&account["access_key_id"], &account["secret_access_key"]);
        let dir = if self.dir == default_dir() { String::new() } else { format!(" --dir {}", self.dir.display()) };
        println!(
            "\nCardinal serves {REGION} at {endpoint}\n\n  export AWS_ENDPOINT_URL={endpoint} AWS_DEFAULT_REGION={REGION} AWS_ACCESS_KEY_ID={} AWS_SECRET_ACCESS_KEY={}\n\n\
             Try, in another terminal, after that line:\n\n  aws ec2 run-instances --image-id {image} --instance-type t3.micro --key-name rack --security-groups rack\n  \
             cargo rack ssh{dir}\n  cargo rack demo{dir}\n\nHosts are simulated: {HOST_CORES} cores and 16 GiB each, mapped onto this machine. Ctrl-C stops the region.",
            key.as_str().unwrap_or_default(),
            secret.as_str().unwrap_or_default(),
        );
        Ok(())
    }

    /// Ends every process and takes the wires away.
    fn stop(&mut self) {
        let step = Step::begin("stop the region");
        for (pid, command) in process::of(&self.dir) {
            if !command.contains("qemu-system") {
                process::kill(pid, libc::SIGTERM);
            }
        }
        process::wait_gone(&self.dir, Duration::from_secs(3));
        for (pid, _) in process::of(&self.dir) {
            process::kill(pid, libc::SIGKILL);
        }
        for process in &mut self.processes {
            if let Some(mut child) = process.child.take() {
                let _ = child.wait();
            }
        }
        if let Wires::Kernel(wire) = &self.wires {
            wire.remove();
        }
        step.end();
    }
}

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_: libc::c_int) {
    STOP.store(true, Ordering::Relaxed);
}

/// From here on SIGINT and SIGTERM end the region in order.
fn stop_signals() -> Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let handler = on_signal as extern "C" fn(libc::c_int);
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        #[allow(unsafe_code)]
        let previous = unsafe { libc::signal(signal, handler as libc::sighandler_t) };
        if previous == libc::SIG_ERR {
            bail!("cannot catch signal {signal}");
        }
    }
    Ok(())
}

fn issue(cardinal: &Path, tls: &Path, name: &str) -> Result<()> {
    if tls.join(format!("{name}.pem")).exists() {
        return Ok(());
    }
    checked(Command::new(cardinal).args(["authority", "issue", "--name", name, "--dir"]).arg(tls))
}

fn checked(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines.iter().skip(lines.len().saturating_sub(8)).copied().collect::<Vec<_>>().join("\n")
}

fn free_ports(count: usize) -> Result<Vec<u16>> {
    let listeners: Vec<TcpListener> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<std::io::Result<_>>()?;
    listeners.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}

fn absolute(dir: &Path) -> Result<PathBuf> {
    Ok(std::path::absolute(dir)?)
}
