//! The agent's threads: one for the link, one per machine, and this one, which
//! moves the [`Host`]. The others send it messages.

use crate::host::{Host, Parts};
use crate::machine::qemu::{self, Qemu};
use crate::machine::sim::Sim;
use crate::machine::{Event, Source, Vmm};
use crate::partition::Ledger;
use crate::record::Records;
use crate::settings::{MachineKind, Settings};
use card_proto::host::ToHost;
use card_proto::mailbox::{self, MailboxError, Sender};
use rustix::thread::CpuSet;
use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// The socket of the card in the link folder.
pub const SLOT: &str = "slot.sock";
const RECONNECT_INTERVAL: Duration = Duration::from_millis(50);
/// Memory of a real server that is never given to machines.
const HOST_RESERVE_BYTES: u64 = 1024 * 1024 * 1024;

enum Input {
    LinkUp(Sender),
    Card(ToHost),
    LinkDown,
    Machine(Source, Event),
    Stop,
}

/// Ends a running [`run`] from another thread.
pub struct Stop(mpsc::Sender<Input>);

impl Stop {
    /// Asks for the end; the machines run on.
    pub fn stop(&self) {
        // It fails when the end has come already.
        let _ = self.0.send(Input::Stop);
    }
}

/// Runs the agent until it is stopped; `ready` gets the means to do so. Its
/// machines run on, for the next agent.
///
/// # Errors
/// The run folder cannot be used, QEMU is missing, or no thread can be made.
pub fn run(settings: &Settings, ready: impl FnOnce(Stop)) -> io::Result<()> {
    let boot_id = RandomState::new().build_hasher().finish();
    let cpus = cpus()?;
    let cores = settings.cores.unwrap_or(u32::try_from(cpus.len()).unwrap_or(u32::MAX));
    let memory_bytes = settings.memory_bytes.map_or_else(memory_bytes, Ok)?;
    let simulated = settings.cores.is_some() || settings.memory_bytes.is_some();
    if simulated {
        tracing::info!(cores, memory_bytes, real_cpus = cpus.len(), "simulated inventory: cores are mapped onto the real CPUs");
    } else {
        tracing::info!(cores, memory_bytes, "inventory");
    }
    let vmm: Box<dyn Vmm> = match settings.machine {
        MachineKind::Sim => Box::new(Sim),
        MachineKind::Auto | MachineKind::Qemu => Box::new(Qemu::new(cpus, boot_id)?),
        MachineKind::Kvm => return Err(io::Error::new(io::ErrorKind::Unsupported, "this build has no VMM of its own")),
    };
    let records = Records::open(&settings.run_dir, vmm.name())?;
    let (inputs, received) = mpsc::channel();
    let (events, from_machines) = mpsc::channel();
    let ledger = Ledger::new(cores, memory_bytes);
    let parts = Parts { vmm, ledger, records, link_dir: settings.link_dir.clone(), simulated, boot_id, events };
    let host = Host::new(parts, Instant::now());
    let to_machines = inputs.clone();
    spawn("events", move || {
        from_machines.into_iter().try_for_each(|(source, event)| to_machines.send(Input::Machine(source, event)).ok())
    })?;
    let (slot, to_card) = (settings.link_dir.join(SLOT), inputs.clone());
    spawn("link", move || link(&slot, &to_card))?;
    ready(Stop(inputs));
    serve(host, &received);
    Ok(())
}

/// Kills every machine in `run_dir` and forgets it; returns how many lived.
///
/// # Errors
/// An agent runs there, or a machine does not end.
pub fn release_all(run_dir: &Path) -> io::Result<usize> {
    let records = Records::open_any(run_dir)?;
    let mut killed = 0;
    for id in records.ids()? {
        killed += usize::from(qemu::release(&records.folder(&id))?);
        records.remove(&id)?;
    }
    Ok(killed)
}

fn spawn<T: Send + 'static>(name: &str, body: impl FnOnce() -> T + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(body).map(drop)
}

/// Moves the host by whatever comes, and sends what it reports.
fn serve(mut host: Host, inputs: &mpsc::Receiver<Input>) {
    let mut card: Option<Sender> = None;
    loop {
        let timeout = host.deadline().map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
        let input = inputs.recv_timeout(timeout);
        let now = Instant::now();
        match input {
            Ok(Input::LinkUp(sender)) => {
                tracing::info!("linked to the card");
                host.link_lost();
                card = Some(sender);
            }
            Ok(Input::LinkDown) => {
                host.link_lost();
                card = None;
            }
            Ok(Input::Card(message)) => host.command(message, now),
            Ok(Input::Machine(source, event)) => host.event(&source, event, now),
            Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => host.tick(now),
        }
        while let Some(report) = host.report() {
            let Some(sender) = card.as_mut() else { continue };
            if let Err(error) = sender.send(&report) {
                // The link thread sees the hang-up and connects again.
                tracing::warn!(%error, "a report is not sent");
                card = None;
            }
        }
    }
    tracing::info!("the agent ends, its machines run on");
}

/// Connects to the card and passes on what it says, until nobody listens.
fn link(slot: &Path, inputs: &mpsc::Sender<Input>) -> Option<()> {
    loop {
        let (sender, mut receiver) = match mailbox::connect(slot) {
            Ok(link) => link.split(),
            Err(error) => {
                tracing::debug!(%error, "no card");
                thread::sleep(RECONNECT_INTERVAL);
                continue;
            }
        };
        inputs.send(Input::LinkUp(sender)).ok()?;
        let error = loop {
            match receiver.recv(None) {
                Ok(Some(message)) => inputs.send(Input::Card(message)).ok()?,
                Ok(None) => {}
                Err(error) => break error,
            }
        };
        match error {
            MailboxError::PeerGone => tracing::info!("the card is gone"),
            error => tracing::error!(reason = error.reason(), %error, "the link is reset"),
        }
        inputs.send(Input::LinkDown).ok()?;
        thread::sleep(RECONNECT_INTERVAL);
    }
}

/// The CPUs that this process may run on.
fn cpus() -> io::Result<Vec<usize>> {
    let set = rustix::thread::sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect())
}

/// The real memory without the host's part of it.
fn memory_bytes() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    let total = total.ok_or_else(|| io::Error::other("/proc/meminfo has no MemTotal"))?.saturating_mul(1024);
    Ok(total.saturating_sub(HOST_RESERVE_BYTES).max(total / 2))
}
