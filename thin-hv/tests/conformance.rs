//! One suite for every kind of machine: the agent's process, seen by its card.
//!
//! QEMU runs a guest of two hundred bytes, or the Linux kernel and initrd that
//! CARDINAL_TEST_KERNEL and CARDINAL_TEST_INITRD name (an init that prints
//! CARDINAL_TEST_BANNER and turns the guest off at the power button).
#![allow(unsafe_code, missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[cfg(target_arch = "x86_64")]
mod tiny_guest;

use card_proto::host::{
    Block, ConsoleInput, Delete, Function, Hello, Inventory, Machine, MachinePhase, MachineStatus, Smbios, ToCard, ToHost, function::Kind,
    to_card::Report, to_host::Command,
};
use card_proto::mailbox::{Listener, Receiver, Sender};
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Guests boot one at a time: the machine that tests may have two cores.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const PATIENCE: Duration = Duration::from_secs(60);

/// The card of one agent, and the agent.
struct Rig {
    folder: tempfile::TempDir,
    kind: &'static str,
    agent: Child,
    listener: Listener,
    link: Option<(Sender, Receiver)>,
    statuses: BTreeMap<String, MachineStatus>,
    history: Vec<MachinePhase>,
    inventory: Inventory,
    synced: bool,
    console: String,
    storage: Option<Child>,
    cables: Vec<Cable>,
    _turn: MutexGuard<'static, ()>,
}

impl Rig {
    /// None, with the reason printed, where this kind cannot run.
    fn new(kind: &'static str) -> Option<Self> {
        if kind == "qemu" && !in_path("qemu-system-x86_64") {
            println!("skipped: qemu-system-x86_64 is not installed");
            return None;
        }
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        fs::create_dir(&link).unwrap();
        fs::write(
            folder.path().join("thin-hv.toml"),
            format!(
                "link_dir = {link:?}\nrun_dir = {:?}\nmachine = '{kind}'\ncores = 4\nmemory_bytes = 2147483648\n",
                folder.path().join("run")
            ),
        )
        .unwrap();
        let listener = Listener::bind(&link.join("slot.sock")).unwrap();
        let agent = start_agent(folder.path());
        let mut rig = Self {
            folder,
            kind,
            agent,
            listener,
            link: None,
            statuses: BTreeMap::new(),
            history: Vec::new(),
            inventory: Inventory::default(),
            synced: false,
            console: String::new(),
            storage: None,
            cables: Vec::new(),
            _turn: turn,
        };
        rig.greet();
        Some(rig)
    }

    fn greet(&mut self) {
        self.link = Some(self.listener.accept().unwrap().split());
        (self.synced, self.inventory) = (false, Inventory::default());
        self.statuses.clear();
        self.send(Command::Hello(Hello { card_boot_id: 1 }));
        self.until("synced", |rig| rig.synced);
    }

    fn send(&mut self, command: Command) {
        self.link.as_mut().unwrap().0.send(&ToHost { command: Some(command) }).unwrap();
    }

    fn put(&mut self, machine: &Machine) {
        self.send(Command::Put(machine.clone()));
    }

    fn type_in(&mut self, id: &str, text: &str) {
        self.send(Command::Console(ConsoleInput { id: id.into(), data: text.into() }));
    }

    /// Reads reports until `done`.
    #[track_caller]
    fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < deadline, "waited for: {what}\nstatuses {:?}\nconsole {:?}", self.statuses, self.console);
            self.read(Duration::from_millis(100));
        }
    }

    fn read(&mut self, timeout: Duration) {
        let report: Option<ToCard> = self.link.as_mut().unwrap().1.recv(Some(timeout)).unwrap();
        match report.and_then(|report| report.report) {
            Some(Report::Status(status)) => {
                self.history.push(status.phase());
                self.statuses.insert(status.id.clone(), status);
            }
            Some(Report::Console(console)) => self.console.push_str(&String::from_utf8_lossy(&console.data)),
            Some(Report::Inventory(inventory)) => self.inventory = inventory,
            Some(Report::Synced(_)) => self.synced = true,
            None => {}
        }
    }

    #[track_caller]
    fn until_phase(&mut self, machine: &Machine, phase: MachinePhase) -> MachineStatus {
        let (id, generation) = (machine.id.as_str(), machine.generation);
        self.until(&format!("{id} generation {generation} {phase:?}"), |rig| {
            rig.statuses.get(id).is_some_and(|status| status.generation == generation && status.phase() == phase)
        });
        self.statuses[id].clone()
    }

    fn kill_agent(&mut self) {
        self.agent.kill().unwrap();
        self.agent.wait().unwrap();
        self.link = None;
    }

    fn new_agent(&mut self) {
        self.agent = start_agent(self.folder.path());
        self.greet();
    }

    /// Processes that run a machine of this rig.
    fn processes(&self) -> Vec<i32> {
        let mark = self.folder.path().to_str().unwrap().as_bytes().to_vec();
        let of = |pid: &i32| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let all = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        all.filter(|pid| {
            let line = of(pid);
            line.starts_with(b"/usr/bin/qemu-system") && line.windows(mark.len()).any(|window| window == mark)
        })
        .collect()
    }

    fn machine(&self, id: &str) -> Machine {
        let (kernel, initrd, command_line) = match guest() {
            Some((kernel, initrd)) if self.kind == "qemu" => {
                fs::copy(kernel, self.link_dir().join("kernel")).unwrap();
                fs::copy(initrd, self.link_dir().join("initrd")).unwrap();
                ("kernel", "initrd", "console=ttyS0 quiet no_timer_check cryptomgr.notests")
            }
            _ => {
                #[cfg(target_arch = "x86_64")]
                fs::write(self.link_dir().join("kernel"), tiny_guest::image()).unwrap();
                ("kernel", "", "")
            }
        };
        let uuid = "ec2f1a2b-0000-4000-8000-0123456789ab";
        Machine {
            id: id.into(),
            generation: 1,
            running: true,
            boot: 0,
            vcpus: 1,
            memory_bytes: 256 << 20,
            smbios: Some(Smbios {
                vendor: "Amazon EC2".into(),
                product: "t3.micro, or so".into(),
                uuid: uuid.into(),
                serial: uuid.into(),
                asset_tag: id.into(),
            }),
            kernel: kernel.into(),
            initrd: initrd.into(),
            command_line: command_line.into(),
            functions: vec![],
        }
    }

    fn link_dir(&self) -> PathBuf {
        self.folder.path().join("link")
    }

    /// `count` disks, served by qemu-storage-daemon where a machine needs them. It
    /// listens as well, so each of its sockets has somebody who connects it to the machine's.
    fn disks(&mut self, count: usize) -> Option<Vec<Function>> {
        let names: Vec<String> = (0..count).map(|index| format!("vol-{index}")).collect();
        if self.kind == "qemu" {
            if !in_path("qemu-storage-daemon") {
                println!("skipped: qemu-storage-daemon is not installed");
                return None;
            }
            let mut daemon = std::process::Command::new("qemu-storage-daemon");
            for name in &names {
                let file = self.folder.path().join(name);
                fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
                daemon.arg("--blockdev").arg(format!("driver=file,node-name={name},filename={}", file.display()));
                let socket = self.folder.path().join(format!("{name}.served"));
                let export = format!("type=vhost-user-blk,id={name},node-name={name},addr.type=unix,addr.path={}", socket.display());
                daemon.arg("--export").arg(export);
            }
            self.storage = Some(daemon.spawn().unwrap());
            for name in &names {
                let (card, machine) = (self.folder.path().join(format!("{name}.served")), self.link_dir().join(format!("{name}.sock")));
                self.cables.push(Cable::lay(card, machine));
            }
        }
        let disk = |name: String| Function {
            socket: format!("{name}.sock"),
            id: name,
            kind: Some(Kind::Block(Block { boot: false, serial: String::new() })),
        };
        Some(names.into_iter().map(disk).collect())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        let released = agent(self.folder.path()).arg("--release-all").status().unwrap();
        if let Some(storage) = &mut self.storage {
            let _ = storage.kill();
            let _ = storage.wait();
        }
        if !thread::panicking() {
            assert!(released.success());
            assert_eq!(self.processes(), [] as [i32; 0]);
        }
    }
}

/// Connects two listening sockets, again and again while it lives, and carries
/// bytes and descriptors between them.
struct Cable(Arc<AtomicBool>);

impl Cable {
    fn lay(card: PathBuf, machine: PathBuf) -> Self {
        let cut = Arc::new(AtomicBool::new(false));
        thread::spawn({
            let cut = Arc::clone(&cut);
            move || {
                while !cut.load(Ordering::Relaxed) {
                    // Nobody gets a connection before there is one for the other.
                    if let Ok(machine) = UnixStream::connect(&machine)
                        && let Ok(card) = UnixStream::connect(&card)
                    {
                        carry(&machine, &card, &cut);
                    }
                    thread::sleep(Duration::from_millis(2));
                }
            }
        });
        Self(cut)
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn carry(one: &UnixStream, other: &UnixStream, cut: &AtomicBool) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    while !cut.load(Ordering::Relaxed) {
        let mut fds = [PollFd::new(one, PollFlags::IN), PollFd::new(other, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 50_000_000 })).unwrap();
        let ready = fds.each_ref().map(|fd| !fd.revents().is_empty());
        for (from, to) in [(one, other), (other, one)].into_iter().zip(ready).filter_map(|(way, ready)| ready.then_some(way)) {
            // Message by message, header and body, so that descriptors stay with theirs.
            let mut header = [0; 12];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
            let read = rustix::net::recvmsg(from, &mut [std::io::IoSliceMut::new(&mut header)], &mut ancillary, flags);
            if read.map(|read| read.bytes) != Ok(header.len()) {
                return;
            }
            let mut message = vec![0; u32::from_ne_bytes(header[8..].try_into().unwrap()) as usize];
            let mut body = from;
            if body.read_exact(&mut message).is_err() {
                return;
            }
            message.splice(..0, header);
            let files: Vec<_> = ancillary
                .drain()
                .filter_map(|message| if let RecvAncillaryMessage::ScmRights(files) = message { Some(files) } else { None })
                .flatten()
                .collect();
            let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            assert!(borrowed.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)));
            if rustix::net::sendmsg(to, &[std::io::IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL).is_err() {
                return;
            }
        }
    }
}

fn agent(folder: &Path) -> std::process::Command {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_thin-hv"));
    command.arg("--config").arg(folder.join("thin-hv.toml"));
    command
}

fn start_agent(folder: &Path) -> Child {
    let log = fs::File::options().create(true).append(true).open(folder.join("log")).unwrap();
    agent(folder).env("SECRET", "planted").stderr(Stdio::from(log)).spawn().unwrap()
}

fn in_path(program: &str) -> bool {
    std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).any(|folder| folder.join(program).is_file())
}

fn guest() -> Option<(PathBuf, PathBuf)> {
    Some((std::env::var_os("CARDINAL_TEST_KERNEL")?.into(), std::env::var_os("CARDINAL_TEST_INITRD")?.into()))
}

fn banner(kind: &str) -> String {
    match kind {
        "sim" => "simulated machine".into(),
        _ if guest().is_some() => std::env::var("CARDINAL_TEST_BANNER").unwrap_or_else(|_| "login:".into()),
        #[cfg(target_arch = "x86_64")]
        _ => tiny_guest::BANNER.into(),
        #[cfg(not(target_arch = "x86_64"))]
        _ => String::new(),
    }
}

fn on_both(check: impl Fn(Rig)) {
    for kind in ["sim", "qemu"] {
        if let Some(rig) = Rig::new(kind) {
            println!("{kind}");
            check(rig);
        }
    }
}

#[test]
fn a_machine_starts_speaks_and_turns_itself_off_at_the_button() {
    on_both(|mut rig| {
        assert_eq!((rig.inventory.cores, rig.inventory.memory_bytes), (4, 2 << 30));
        assert!(rig.inventory.simulated);
        let mut machine = rig.machine("i-1");
        rig.put(&machine);
        let status = rig.until_phase(&machine, MachinePhase::Running);
        assert_eq!(status.cores, [0]);
        let expected = banner(rig.kind);
        rig.until("the banner", |rig| rig.console.contains(&expected));
        assert_eq!((rig.inventory.cores_free, rig.inventory.memory_free_bytes), (3, (2 << 30) - (256 << 20)));
        rig.type_in("i-1", "hello");
        rig.until("the echo", |rig| rig.console.contains("hello"));
        machine.generation = 2;
        machine.running = false;
        rig.put(&machine);
        let begin = Instant::now();
        let status = rig.until_phase(&machine, MachinePhase::Stopped);
        assert!(begin.elapsed() < Duration::from_secs(10), "it was killed");
        assert_eq!((status.cores, status.functions), (vec![], vec![]));
        assert_eq!(rig.inventory.cores_free, 4);
        assert_eq!(rig.processes(), [] as [i32; 0]);
        assert_eq!(rig.history.iter().filter(|phase| **phase == MachinePhase::Failed).count(), 0);
    });
}

#[test]
fn a_rising_boot_count_reboots_the_guest() {
    on_both(|mut rig| {
        let mut machine = rig.machine("i-1");
        rig.put(&machine);
        let expected = banner(rig.kind);
        rig.until("the banner", |rig| rig.console.contains(&expected));
        let before = rig.processes();
        rig.console.clear();
        (machine.generation, machine.boot) = (2, 1);
        rig.put(&machine);
        rig.until("the second boot", |rig| rig.console.contains(&expected) && rig.statuses["i-1"].boot == 1);
        assert_eq!(rig.until_phase(&machine, MachinePhase::Running).boot, 1);
        assert_eq!(rig.processes(), before);
    });
}

#[test]
fn a_guest_that_turned_itself_off_stays_off_until_something_new_is_asked() {
    if let Some(mut rig) = Rig::new("qemu") {
        if guest().is_some() {
            return println!("skipped: only the tiny guest turns itself off when asked by its console");
        }
        let mut machine = rig.machine("i-1");
        rig.put(&machine);
        rig.until("the banner", |rig| rig.console.contains(&banner("qemu")));
        rig.type_in("i-1", "q");
        rig.until_phase(&machine, MachinePhase::Stopped);
        rig.put(&machine);
        rig.kill_agent();
        rig.new_agent();
        rig.put(&machine);
        thread::sleep(Duration::from_millis(200));
        rig.read(Duration::from_millis(10));
        assert_eq!(rig.until_phase(&machine, MachinePhase::Stopped).cores, []);
        assert_eq!(rig.processes(), [] as [i32; 0]);
        machine.generation = 2;
        rig.put(&machine);
        rig.until_phase(&machine, MachinePhase::Running);
    }
}

#[test]
fn functions_come_and_go_while_the_guest_runs() {
    on_both(|mut rig| {
        let Some(disks) = rig.disks(8) else { return };
        let mut machine = rig.machine("i-1");
        machine.functions = disks[..2].to_vec();
        rig.put(&machine);
        let expected = banner(rig.kind);
        rig.until("the banner", |rig| rig.console.contains(&expected));
        assert_eq!(rig.until_phase(&machine, MachinePhase::Running).functions, ["vol-0", "vol-1"]);
        for (generation, wanted) in [(2, &disks[..]), (3, &disks[1..2]), (4, &disks[..3]), (5, &[])] {
            (machine.generation, machine.functions) = (generation, wanted.to_vec());
            rig.put(&machine);
            let ids: Vec<String> = wanted.iter().map(|function| function.id.clone()).collect();
            rig.until(&format!("{ids:?}"), |rig| rig.statuses["i-1"].functions == ids);
        }
        assert_eq!(rig.statuses["i-1"].message, "");
    });
}

#[test]
fn a_function_whose_card_is_away_is_plugged_when_it_comes_and_the_guest_goes_on() {
    if let Some(mut rig) = Rig::new("qemu") {
        let mut machine = rig.machine("i-1");
        rig.put(&machine);
        rig.until_phase(&machine, MachinePhase::Running);
        machine.generation = 2;
        let kind = Some(Kind::Block(Block::default()));
        machine.functions = vec![Function { id: "vol-0".into(), socket: "vol-0.sock".into(), kind }];
        rig.put(&machine);
        // The guest does not stand still for it.
        let expected = banner(rig.kind);
        rig.until("the banner", |rig| rig.console.contains(&expected));
        rig.until("the reason", |rig| rig.statuses["i-1"].message.contains("vol-0: the card does not connect"));
        let socket = rig.link_dir().join("vol-0.sock");
        rig.until("what was given up is taken away", |_| !socket.exists());
        if rig.disks(1).is_some() {
            rig.until("the disk", |rig| rig.statuses["i-1"].functions == ["vol-0"] && rig.statuses["i-1"].message.is_empty());
        }
    }
}

#[test]
fn a_killed_agent_is_followed_by_one_that_adopts() {
    on_both(|mut rig| {
        let Some(disks) = rig.disks(3) else { return };
        let mut machine = rig.machine("i-1");
        machine.functions = disks[..1].to_vec();
        rig.put(&machine);
        let expected = banner(rig.kind);
        rig.until("the banner", |rig| rig.console.contains(&expected));
        machine.generation = 2;
        machine.functions = disks[..2].to_vec();
        rig.put(&machine);
        rig.until("the second disk", |rig| rig.statuses["i-1"].functions.len() == 2);
        let before = rig.processes();
        rig.kill_agent();
        if rig.kind == "qemu" {
            // Typed while no agent is there; the echo waits in the FIFO for the next one.
            let typed = rig.folder.path().join("run/machines/i-1/serial.in");
            let mut typed = fs::File::options().write(true).open(typed).unwrap();
            if guest().is_none() {
                // More than an ordinary FIFO takes, so the guest has to go on.
                typed.write_all(&vec![b'.'; 80_000]).unwrap();
            }
            typed.write_all(b"meanwhile").unwrap();
            thread::sleep(Duration::from_millis(300));
        }
        let begin = Instant::now();
        rig.new_agent();
        let status = rig.until_phase(&machine, MachinePhase::Running);
        println!("agent to adopted: {:?}", begin.elapsed());
        assert_eq!((status.functions.len(), &status.cores[..], rig.inventory.cores_free), (2, &[0][..], 3));
        if rig.kind == "qemu" {
            rig.until("what was said meanwhile", |rig| rig.console.contains("meanwhile"));
        }
        assert_eq!(rig.processes(), before);
        rig.type_in("i-1", "again");
        rig.until("the echo", |rig| rig.console.contains("again"));
        machine.generation = 3;
        machine.functions = disks[1..].to_vec();
        rig.put(&machine);
        rig.until("one disk less, one more", |rig| rig.statuses["i-1"].functions == ["vol-1", "vol-2"]);
        machine.generation = 4;
        machine.running = false;
        rig.put(&machine);
        rig.until_phase(&machine, MachinePhase::Stopped);
    });
}

#[test]
fn an_agent_killed_at_any_moment_of_a_launch_leaves_one_machine() {
    let seed = std::process::id();
    println!("seed {seed}");
    if let Some(mut rig) = Rig::new("qemu") {
        let mut machine = rig.machine("i-1");
        for round in 0..6_u32 {
            machine.generation += 1;
            machine.running = true;
            rig.put(&machine);
            // 0 to 60 ms: before, while and after the process starts.
            thread::sleep(Duration::from_micros(u64::from((seed ^ round).wrapping_mul(2_654_435_761) % 60_000)));
            rig.kill_agent();
            rig.new_agent();
            rig.put(&machine);
            rig.until_phase(&machine, MachinePhase::Running);
            assert_eq!(rig.processes().len(), 1, "round {round}");
            machine.generation += 1;
            machine.running = false;
            rig.put(&machine);
            rig.kill_agent();
            rig.new_agent();
            rig.put(&machine);
            rig.until_phase(&machine, MachinePhase::Stopped);
            assert_eq!(rig.processes().len(), 0, "round {round}");
        }
    }
}

#[test]
fn the_death_of_qemu_is_a_failure_until_something_new_is_asked() {
    if let Some(mut rig) = Rig::new("qemu") {
        let mut machine = rig.machine("i-1");
        rig.put(&machine);
        rig.until_phase(&machine, MachinePhase::Running);
        let [process] = rig.processes()[..] else { panic!("one process") };
        rustix::process::kill_process(rustix::process::Pid::from_raw(process).unwrap(), rustix::process::Signal::KILL).unwrap();
        let status = rig.until_phase(&machine, MachinePhase::Failed);
        assert!(status.message.contains("signal 9"), "{}", status.message);
        assert_eq!(rig.inventory.cores_free, 4);
        machine.generation = 2;
        rig.put(&machine);
        rig.until_phase(&machine, MachinePhase::Running);
    }
}

#[test]
fn a_deaf_guest_is_killed_after_twenty_seconds_and_a_delete_does_not_wait() {
    if let Some(mut rig) = Rig::new("qemu") {
        if guest().is_some() {
            return println!("skipped: only the tiny guest can be made deaf");
        }
        let mut machine = rig.machine("i-1");
        rig.put(&machine);
        rig.until("the banner", |rig| rig.console.contains(&banner("qemu")));
        rig.type_in("i-1", "d");
        rig.until("the echo", |rig| rig.console.ends_with('d'));
        (machine.generation, machine.running) = (2, false);
        rig.put(&machine);
        let begin = Instant::now();
        rig.until_phase(&machine, MachinePhase::Stopped);
        assert!((19..25).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
        (machine.generation, machine.running) = (3, true);
        rig.put(&machine);
        rig.until_phase(&machine, MachinePhase::Running);
        let begin = Instant::now();
        rig.send(Command::Delete(Delete { id: "i-1".into(), generation: 4 }));
        rig.until("gone", |rig| rig.statuses["i-1"].phase() == MachinePhase::Gone);
        assert!(begin.elapsed() < Duration::from_secs(2));
        assert_eq!(rig.processes(), [] as [i32; 0]);
        assert_eq!(fs::read_dir(rig.folder.path().join("run/machines")).unwrap().count(), 0);
    }
}

#[test]
fn a_stop_while_it_starts_is_obeyed() {
    on_both(|mut rig| {
        let mut machine = rig.machine("i-1");
        rig.put(&machine);
        (machine.generation, machine.running) = (2, false);
        rig.put(&machine);
        rig.until_phase(&machine, MachinePhase::Stopped);
        assert_eq!(rig.inventory.cores_free, 4);
        (machine.generation, machine.running) = (3, true);
        rig.put(&machine);
        rig.until_phase(&machine, MachinePhase::Running);
    });
}

#[test]
fn a_machine_that_does_not_fit_fails_with_the_reason() {
    on_both(|mut rig| {
        let first = Machine { vcpus: 3, ..rig.machine("i-1") };
        rig.put(&first);
        rig.until_phase(&first, MachinePhase::Running);
        let mut second = Machine { vcpus: 2, ..rig.machine("i-2") };
        rig.put(&second);
        assert_eq!(rig.until_phase(&second, MachinePhase::Failed).message, "insufficient cores: 2 asked for, 1 free");
        (second.generation, second.vcpus, second.memory_bytes) = (2, 1, 2 << 30);
        rig.put(&second);
        assert!(rig.until_phase(&second, MachinePhase::Failed).message.starts_with("insufficient memory"));
        (second.generation, second.memory_bytes) = (3, 64 << 20);
        rig.put(&second);
        assert_eq!(rig.until_phase(&second, MachinePhase::Running).cores, [3]);
    });
}

#[test]
fn the_agent_has_no_network_no_listener_but_its_functions_and_no_secret() {
    if let Some(mut rig) = Rig::new("qemu") {
        let Some(disks) = rig.disks(1) else { return };
        let machine = Machine { functions: disks, ..rig.machine("i-1") };
        rig.put(&machine);
        rig.until_phase(&machine, MachinePhase::Running);
        let mut listening = 0;
        let mut processes = rig.processes();
        assert!(!fs::read(format!("/proc/{}/environ", processes[0])).unwrap().windows(7).any(|window| window == b"planted"));
        processes.push(i32::try_from(rig.agent.id()).unwrap());
        for pid in processes {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            assert!(status.contains("NoNewPrivs:\t1"), "{status}");
            let own: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
                .unwrap()
                .flatten()
                .filter_map(|fd| Some(fs::read_link(fd.path()).ok()?.to_string_lossy().into_owned()))
                .collect();
            // Column 4 of /proc/net/unix: bit 16 says that the socket listens. The only ones are the functions'.
            let sockets = fs::read_to_string(format!("/proc/{pid}/net/unix")).unwrap();
            for line in sockets.lines().skip(1) {
                let fields: Vec<&str> = line.split_whitespace().collect();
                let listens = u32::from_str_radix(fields[3], 16).unwrap() & 0x1_0000 != 0;
                if listens && own.contains(&format!("socket:[{}]", fields[6])) {
                    let functions = machine.functions.iter().map(|function| rig.link_dir().join(&function.socket));
                    assert!(functions.into_iter().any(|socket| socket.to_str() == fields.get(7).copied()), "{line}");
                    listening += 1;
                }
            }
            if rustix::process::geteuid().is_root() {
                let devices = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
                assert_eq!(devices.lines().count(), 3, "only lo: {devices}");
                assert_eq!(fs::read_to_string(format!("/proc/{pid}/net/fib_trie")).unwrap_or_default(), "");
            }
        }
        assert_eq!(listening, 1);
        let socket = rig.link_dir().join("vol-0.sock");
        assert!(socket.exists());
        let stopped = Machine { generation: 2, running: false, ..machine };
        rig.put(&stopped);
        rig.until_phase(&stopped, MachinePhase::Stopped);
        assert!(!socket.exists(), "a killed machine leaves no socket");
    }
}

#[test]
fn an_older_generation_is_answered_by_the_newer_status() {
    on_both(|mut rig| {
        let machine = Machine { generation: 5, ..rig.machine("i-1") };
        rig.put(&machine);
        rig.until_phase(&machine, MachinePhase::Running);
        rig.statuses.clear();
        rig.put(&Machine { generation: 4, running: false, ..machine.clone() });
        rig.until_phase(&machine, MachinePhase::Running);
        rig.statuses.clear();
        rig.send(Command::Delete(Delete { id: "i-1".into(), generation: 4 }));
        rig.until_phase(&machine, MachinePhase::Running);
        rig.send(Command::Delete(Delete { id: "i-0".into(), generation: 1 }));
        rig.until("gone", |rig| rig.statuses.get("i-0").is_some_and(|status| status.phase() == MachinePhase::Gone));
    });
}
