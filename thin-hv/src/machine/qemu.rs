//! A machine that is a process of the packaged QEMU.
//!
//! Its folder holds FIFOs for the monitor, the serial console and QEMU's
//! messages. QEMU keeps both ends of each open, so they neither end nor stall
//! when an agent dies: a new one reads on where the dead one was. The console's
//! FIFO takes 1 MiB until then.
//!
//! Invariants:
//! - `lock` is locked exactly while the process lives, from before its fork: it
//!   inherits the locked file. No process id is written down, so none can be stale.
//! - The process is found by the path of its monitor in its command line.
//! - A kill goes to a pidfd, so it cannot hit another process.
//! - QEMU stands still while it makes a device whose socket nobody has connected
//!   to. A starting machine may do so; a running one gets the device only when
//!   the card is connected.
//!
//! Two accelerators: KVM where the host has hardware virtualisation, TCG
//! elsewhere. A KVM that interprets ring 0 is slower than TCG for a Linux guest,
//! so `/dev/kvm` alone proves nothing; see [`probe`].

use super::command_line::{self, Accelerator, Plug, arguments, chardev_id, device_id, netdev_id};
use super::qmp::Commands;
use super::watch::Watcher;
use super::{Event, Events, Function, Launch, Machine, Vmm};
use crate::console::Console;
use crate::jail;
use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a running machine's new function waits for the card, before it is
/// given up; less than the interval at which functions are asked for again.
const CARD_PATIENCE: Duration = Duration::from_millis(2500);
const PROGRAM: &str = "qemu-system-x86_64";
/// What the console's FIFO holds while no agent reads it.
const CONSOLE_FIFO_BYTES: usize = 1024 * 1024;
/// From fork to exec it takes a millisecond; then the process can be found.
const FIND_PATIENCE: Duration = Duration::from_secs(2);

/// Runs machines as QEMU processes.
pub struct Qemu {
    program: PathBuf,
    accelerator: Accelerator,
    /// The real CPUs; core i of the ledger is the i-th modulo their number.
    cpus: Vec<usize>,
    agent: u64,
}

impl Qemu {
    /// Looks for QEMU in PATH and for hardware virtualisation. `agent` is a
    /// random number, new for each agent.
    ///
    /// # Errors
    /// QEMU is not installed.
    pub fn new(cpus: Vec<usize>, agent: u64) -> io::Result<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let program = std::env::split_paths(&path).map(|folder| folder.join(PROGRAM)).find(|program| program.is_file());
        let message = "qemu-system-x86_64 is not in PATH (Debian: qemu-system-x86)";
        let program = program.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, message))?;
        let accelerator = probe();
        tracing::info!(program = %program.display(), ?accelerator, "machines are QEMU processes");
        Ok(Self { program, accelerator, cpus, agent })
    }

    fn spawn(&self, launch: &Launch<'_>, slots: &BTreeMap<String, u8>, lock: File, log: File) -> io::Result<OwnedFd> {
        let mut command = Command::new(&self.program);
        command.args(arguments(launch, self.accelerator, slots)).env_clear().current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        jail::machine(&mut command, lock.into());
        let mut child = command.spawn()?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        // The child is not reaped yet, so its id is its own.
        let process = pid.ok_or(Errno::SRCH).and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()));
        process.or_else(|errno| {
            child.kill()?;
            child.wait()?;
            Err(errno.into())
        })
    }

    fn machine(
        &self,
        launch: &Launch<'_>,
        process: OwnedFd,
        fifos: Fifos,
        functions: Functions,
        events: Events,
    ) -> io::Result<Box<dyn Machine>> {
        let process = Arc::new(process);
        let commands = Arc::new(Commands::new(fifos.qmp_in, self.agent));
        let console = Arc::new(Console::default());
        let cpus = launch.cores.iter().filter_map(|core| self.cpus.iter().cycle().nth(*core as usize % self.cpus.len())).copied();
        let watcher = Watcher {
            id: launch.spec.id.clone(),
            process: process.clone(),
            commands: commands.clone(),
            console: console.clone(),
            cpus: cpus.collect(),
            functions: functions.clone(),
            events: events.clone(),
            qmp_out: fifos.qmp_out,
            serial_out: fifos.serial_out,
            log: fifos.log,
        };
        thread::Builder::new().name(format!("watch {}", launch.spec.id)).spawn(move || watcher.run())?;
        // QEMU finds them when it is up; an adopted one refuses the first, being past it.
        commands.send("capabilities", "qmp_capabilities", json!({}));
        commands.send("cpus", "query-cpus-fast", json!({}));
        commands.send("pci", "query-pci", json!({}));
        commands.send("status", "query-status", json!({}));
        Ok(Box::new(QemuMachine {
            accelerator: self.accelerator,
            process,
            commands,
            console,
            functions,
            events,
            serial_in: fifos.serial_in,
        }))
    }
}

impl Vmm for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn start(&mut self, launch: &Launch<'_>, events: Events) -> io::Result<Box<dyn Machine>> {
        let folder = launch.folder;
        let lock = File::create(folder.join("lock"))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| io::Error::new(io::ErrorKind::ResourceBusy, "its earlier process still lives"))?;
        let mut slots = BTreeMap::new();
        for function in &launch.spec.functions {
            let slot = command_line::slot(function.kind, &slots).ok_or_else(|| io::Error::other("more functions than slots"))?;
            slots.insert(function.id.clone(), slot);
        }
        Fifos::make(folder)?;
        let fifos = Fifos::open(folder)?;
        let log = open(&folder.join("log"), OFlags::RDWR)?;
        let process = self.spawn(launch, &slots, lock, log)?;
        let killed_on_error = rustix::io::dup(&process)?;
        self.machine(launch, process, fifos, Functions::new(slots), events).inspect_err(|_| kill(&killed_on_error))
    }

    fn adopt(&mut self, launch: &Launch<'_>, events: Events) -> io::Result<Option<Box<dyn Machine>>> {
        let Some(process) = find(launch.folder)? else { return Ok(None) };
        // The slots come with the answer to `query-pci`, before any plug.
        let functions = Functions::new(BTreeMap::new());
        self.machine(launch, process, Fifos::open(launch.folder)?, functions, events).map(Some)
    }
}

/// Kills the machine that lives in `folder`, if one does, and waits for its end.
///
/// # Errors
/// It lives and cannot be found, or it does not end.
pub fn release(folder: &Path) -> io::Result<bool> {
    let Some(process) = find(folder)? else { return Ok(false) };
    kill(&process);
    let timeout = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
    let mut ended = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
    match rustix::event::poll(&mut ended, Some(&timeout))? {
        0 => Err(io::Error::new(io::ErrorKind::TimedOut, "killed, and still there after 10 s")),
        _ => Ok(true),
    }
}

/// Whether this server's processors virtualise. Neither `/dev/kvm` nor the `kvm`
/// module says so: there are KVMs that interpret the guest's kernel.
#[must_use]
pub fn probe() -> Accelerator {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = flags.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str, module: &str| flags.split(' ').any(|found| found == flag) && Path::new("/sys/module").join(module).is_dir();
    let usable = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if usable && (has("vmx", "kvm_intel") || has("svm", "kvm_amd")) { Accelerator::Kvm } else { Accelerator::Tcg }
}

/// What is on the machine's bus, and what is on its way there.
#[derive(Clone)]
pub(super) struct Functions(Arc<Mutex<Bus>>);

pub(super) struct Bus {
    /// The slot of each function.
    pub(super) slots: BTreeMap<String, u8>,
    /// Functions whose device is made once the card has connected.
    pub(super) awaited: BTreeMap<String, Awaited>,
}

pub(super) struct Awaited {
    pub(super) plug: Plug,
    /// Then it is given up.
    pub(super) until: Instant,
}

impl Functions {
    fn new(slots: BTreeMap<String, u8>) -> Self {
        Self(Arc::new(Mutex::new(Bus { slots, awaited: BTreeMap::new() })))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Bus> {
        // Maps that no code leaves half-changed: a panic elsewhere leaves them usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct QemuMachine {
    accelerator: Accelerator,
    process: Arc<OwnedFd>,
    commands: Arc<Commands>,
    console: Arc<Console>,
    functions: Functions,
    events: Events,
    serial_in: File,
}

impl Machine for QemuMachine {
    fn power_button(&mut self) {
        self.commands.send("button", "system_powerdown", json!({}));
    }

    fn reset(&mut self) {
        // A paused machine is continued once its RESET event arrives.
        self.commands.send("reset", "system_reset", json!({}));
    }

    fn plug(&mut self, function: &Function) {
        let id = &function.id;
        let mut bus = self.functions.lock();
        let slot = bus.slots.get(id).copied().or_else(|| command_line::slot(function.kind, &bus.slots));
        let Some(slot) = slot else {
            return self.events.send(Event::PlugFailed { function: id.clone(), message: "no slot is free".to_owned() });
        };
        bus.slots.insert(id.clone(), slot);
        let plug = Plug::new(function, slot, self.accelerator);
        self.commands.send(&format!("part {id}"), "chardev-add", json!({ "id": plug.chardev, "backend": plug.backend }));
        bus.awaited.insert(id.clone(), Awaited { plug, until: Instant::now() + CARD_PATIENCE });
        ask_for_sockets(&self.commands);
    }

    fn unplug(&mut self, id: &str) {
        self.commands.send("unplug", "device_del", json!({ "id": device_id(id) }));
    }

    fn kill(&mut self) {
        kill(&self.process);
    }

    fn console_input(&mut self, bytes: &[u8]) {
        if let Err(error) = self.serial_in.write_all(bytes) {
            tracing::warn!(%error, "the guest does not read its console");
        }
    }

    fn console_output(&mut self, limit: usize) -> Vec<u8> {
        self.console.take(limit)
    }
}

/// Asks which sockets are connected; the answer makes the devices behind them.
pub(super) fn ask_for_sockets(commands: &Commands) {
    commands.send("sockets", "query-chardev", json!({}));
}

/// Makes the device of a function whose socket is connected.
pub(super) fn add_device(commands: &Commands, function: &str, plug: Plug) {
    if let Some(netdev) = plug.netdev {
        commands.send(&format!("part {function}"), "netdev_add", netdev.into());
    }
    commands.send(&format!("plug {function}"), "device_add", plug.device.into());
}

/// Removes what is behind a function whose device is gone.
pub(super) fn remove_parts(commands: &Commands, function: &str) {
    // A disk has no network back end; that refusal is not looked at.
    commands.send("removed", "netdev_del", json!({ "id": netdev_id(function) }));
    commands.send("removed", "chardev-remove", json!({ "id": chardev_id(function) }));
}

fn kill(process: &OwnedFd) {
    match rustix::process::pidfd_send_signal(process, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => tracing::error!(%error, "a machine cannot be killed"),
    }
}

/// The process that lives in `folder`.
fn find(folder: &Path) -> io::Result<Option<OwnedFd>> {
    let deadline = Instant::now() + FIND_PATIENCE;
    let mark = command_line::mark(folder);
    loop {
        match File::open(folder.join("lock")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
            Ok(lock) => match rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(None),
                Err(Errno::WOULDBLOCK) => {}
                Err(errno) => return Err(errno.into()),
            },
        }
        for entry in fs::read_dir("/proc")?.flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
            let Some(pid) = pid.filter(|_| is_marked(&entry.path(), &mark)) else { continue };
            let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
            // Looked at again now that the pidfd holds on to it.
            if is_marked(&entry.path(), &mark) {
                return Ok(Some(process));
            }
        }
        if deadline < Instant::now() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "its lock is held by no process that can be found"));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn is_marked(process: &Path, mark: &str) -> bool {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|argument| argument == mark.as_bytes())
}

/// The agent's ends of a machine's FIFOs; none of them ever blocks.
struct Fifos {
    qmp_in: File,
    qmp_out: File,
    serial_in: File,
    serial_out: File,
    log: File,
}

impl Fifos {
    fn make(folder: &Path) -> io::Result<()> {
        for name in ["qmp.in", "qmp.out", "serial.in", "serial.out", "log"] {
            let path = folder.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?,
            }
        }
        Ok(())
    }

    fn open(folder: &Path) -> io::Result<Self> {
        // Open for reading too, a write end needs nobody at the other end yet.
        let fifos = Self {
            qmp_in: open(&folder.join("qmp.in"), OFlags::RDWR)?,
            qmp_out: open(&folder.join("qmp.out"), OFlags::RDONLY)?,
            serial_in: open(&folder.join("serial.in"), OFlags::RDWR)?,
            serial_out: open(&folder.join("serial.out"), OFlags::RDONLY)?,
            log: open(&folder.join("log"), OFlags::RDONLY)?,
        };
        // Beyond the limit of an unprivileged user the default has to do.
        if rustix::pipe::fcntl_setpipe_size(&fifos.serial_out, CONSOLE_FIFO_BYTES).is_err() {
            tracing::warn!("the console's FIFO keeps its default size");
        }
        Ok(fifos)
    }
}

fn open(path: &Path, mode: OFlags) -> io::Result<File> {
    let flags = i32::try_from((OFlags::NONBLOCK | OFlags::NOFOLLOW).bits()).unwrap_or_default();
    OpenOptions::new().read(true).write(mode == OFlags::RDWR).custom_flags(flags).open(path)
}
