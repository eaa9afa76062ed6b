//! The host as a state machine: (message, event or time, now) -> reports.
//!
//! Nothing here waits, reads a clock or knows a thread; [`crate::server`] does.
//! One guest:
//!
//! ```text
//!             Put running, fits            Ready
//!   STOPPED ------------------> STARTING --------> RUNNING
//!      ^                            |                 |   boot rises: button, 20 s, reset
//!      |   Put stopped: button every 2 s, kill after 20 s; or the guest turns itself off
//!      +----------------------------+-----------------+
//!   FAILED: did not fit, did not start, or its process ended; until a higher generation
//! ```
//!
//! Invariants:
//! - Cores and pages are granted before a machine starts and released after its
//!   process has ended, in that order and nowhere else.
//! - The record is on its way to the disk before the step that it speaks of: a
//!   start that was not written down has not happened, an end that nobody asked
//!   for is written down before the machine goes.
//! - An end that nobody asked for holds for its generation: a guest that turned
//!   itself off stays off until the card asks for something new.

use crate::machine::{Event, Events, Invalid, Launch, Machine, Source, Spec, Vmm, check_id};
use crate::partition::Ledger;
use crate::record::{End, Record, Records};
use card_proto::host::{
    ConsoleInput, ConsoleOutput, Delete, Inventory, Machine as MachineMessage, MachinePhase, MachineStatus, Synced, ToCard, ToHost,
    to_card::Report, to_host::Command,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long a guest has to turn itself off after the first press.
pub const POWER_OFF_PATIENCE: Duration = Duration::from_secs(20);
/// A guest that was still booting did not notice the button.
const BUTTON_INTERVAL: Duration = Duration::from_secs(2);
/// How often a function that is not plugged or unplugged is asked for again.
const FUNCTION_INTERVAL: Duration = Duration::from_secs(3);
/// Console bytes in one message.
const CONSOLE_CHUNK: usize = 16 * 1024;

/// All guests of this server.
pub struct Host {
    vmm: Box<dyn Vmm>,
    ledger: Ledger,
    records: Records,
    link_dir: PathBuf,
    simulated: bool,
    boot_id: u64,
    guests: BTreeMap<String, Guest>,
    events: mpsc::Sender<(Source, Event)>,
    runs: u64,
    /// The card said Hello on this link, so it gets reports.
    greeted: bool,
    outbox: VecDeque<ToCard>,
    inventory_sent: Option<Inventory>,
}

/// What a host is made of.
pub struct Parts {
    /// What runs the guests.
    pub vmm: Box<dyn Vmm>,
    /// All cores and pages, free.
    pub ledger: Ledger,
    /// Of earlier agents.
    pub records: Records,
    /// The folder of sockets and kernels.
    pub link_dir: PathBuf,
    /// The ledger hands out more or less than this server has.
    pub simulated: bool,
    /// Random, new for each agent.
    pub boot_id: u64,
    /// Where machines report.
    pub events: mpsc::Sender<(Source, Event)>,
}

struct Guest {
    desired: Desired,
    boot: u64,
    end: Option<End>,
    deleting: bool,
    live: Option<Live>,
    /// What went wrong with a function, for people.
    trouble: String,
    saved: Record,
    reported: Option<MachineStatus>,
}

struct Desired {
    message: MachineMessage,
    spec: Spec,
}

/// A machine that exists, from the grant of its cores to the end of its process.
struct Live {
    machine: Box<dyn Machine>,
    run: u64,
    cores: Vec<u32>,
    memory_bytes: u64,
    /// The guest has run: RUNNING rather than STARTING.
    ready: bool,
    /// `plugged` is what the machine says, not what a record says.
    known: bool,
    off: bool,
    /// A reset was asked for and has not happened yet.
    resetting: bool,
    killed: bool,
    press: Option<Press>,
    /// The button was pressed in this boot, so that going off is no news.
    pressed: bool,
    plugged: BTreeSet<String>,
    /// Functions asked for, and when.
    asked: BTreeMap<String, Instant>,
}

#[derive(Clone, Copy)]
struct Press {
    first: Instant,
    last: Instant,
}

impl Host {
    /// Takes over the machines of earlier agents.
    #[must_use]
    pub fn new(parts: Parts, now: Instant) -> Self {
        let Parts { vmm, ledger, records, link_dir, simulated, boot_id, events } = parts;
        let mut host = Self {
            vmm,
            ledger,
            records,
            link_dir,
            simulated,
            boot_id,
            guests: BTreeMap::new(),
            events,
            runs: 0,
            greeted: false,
            outbox: VecDeque::new(),
            inventory_sent: None,
        };
        for id in host.records.ids().unwrap_or_default() {
            host.adopt(&id, now);
        }
        host
    }

    /// Obeys one message of the card.
    pub fn command(&mut self, message: ToHost, now: Instant) {
        match message.command {
            Some(Command::Hello(_)) => self.hello(),
            Some(Command::Put(machine)) => self.put(machine, now),
            Some(Command::Delete(delete)) => self.delete(&delete, now),
            Some(Command::Console(input)) => self.console_input(&input),
            None => tracing::warn!("a message without a command"),
        }
    }

    /// Takes note of what happened in a machine.
    pub fn event(&mut self, source: &Source, event: Event, now: Instant) {
        let Some(guest) = self.guests.get_mut(&source.id) else { return };
        let Some(live) = guest.live.as_mut().filter(|live| live.run == source.run) else { return };
        match event {
            Event::Console => return self.console_output(&source.id),
            Event::Ready(plugged) => {
                if !live.ready {
                    tracing::info!(machine = source.id, "runs");
                }
                (live.ready, live.known, live.plugged) = (true, true, plugged);
            }
            // Off in a boot that a reset has ended meanwhile is no news.
            Event::PoweredOff => live.off |= !live.resetting,
            Event::Reset => live.resetting = false,
            Event::Plugged(function) => {
                tracing::info!(machine = source.id, function, "plugged");
                live.asked.remove(&function);
                live.plugged.insert(function);
                guest.trouble.clear();
            }
            Event::Unplugged(function) => {
                tracing::info!(machine = source.id, function, "unplugged");
                live.asked.remove(&function);
                live.plugged.remove(&function);
            }
            Event::PlugFailed { function, message } => {
                tracing::warn!(machine = source.id, function, message, "not plugged");
                guest.trouble = format!("function {function}: {message}");
            }
            Event::Exited(how) => {
                guest.exited(&how);
                remove_sockets(&guest.desired.spec);
                self.ledger.release(&source.id);
            }
        }
        self.converge(&source.id, now);
    }

    /// Does what is due by `now`.
    pub fn tick(&mut self, now: Instant) {
        let due: Vec<String> =
            self.guests.iter().filter(|(_, guest)| guest.deadline().is_some_and(|at| at <= now)).map(|(id, _)| id.clone()).collect();
        for id in due {
            self.converge(&id, now);
        }
    }

    /// When [`Host::tick`] has something to do next.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.guests.values().filter_map(Guest::deadline).min()
    }

    /// The link is gone; nothing is reported until the card's next Hello.
    pub fn link_lost(&mut self) {
        self.greeted = false;
        self.outbox.clear();
    }

    /// Takes the oldest report for the card.
    pub fn report(&mut self) -> Option<ToCard> {
        self.outbox.pop_front()
    }

    fn hello(&mut self) {
        self.greeted = true;
        self.outbox.clear();
        self.inventory_sent = None;
        self.report_inventory();
        for guest in self.guests.values_mut() {
            guest.reported = None;
        }
        let ids: Vec<String> = self.guests.keys().cloned().collect();
        ids.iter().for_each(|id| self.report_status(id));
        self.send(Report::Synced(Synced {}));
        // What was printed while nobody listened.
        ids.iter().for_each(|id| self.console_output(id));
    }

    fn put(&mut self, message: MachineMessage, now: Instant) {
        let id = message.id.clone();
        let known = self.guests.get(&id).map(|guest| guest.desired.message.generation);
        if known.is_some_and(|known| message.generation < known) {
            tracing::warn!(machine = id, generation = message.generation, known, "an older generation is ignored");
            return self.report_again(&id);
        }
        let spec = match Spec::new(&message, &self.link_dir) {
            Ok(spec) => spec,
            Err(invalid) => return self.refuse(&message, &invalid),
        };
        let guest = self.guests.entry(id.clone()).or_insert_with(|| Guest::new(Desired { message: message.clone(), spec: spec.clone() }));
        // An equal generation changes nothing, except that it takes back a delete.
        if known.is_none_or(|known| known < message.generation) {
            tracing::info!(machine = id, generation = message.generation, running = message.running, "put");
            guest.desired = Desired { message, spec };
        }
        guest.deleting = false;
        self.converge(&id, now);
    }

    fn delete(&mut self, delete: &Delete, now: Instant) {
        let Some(guest) = self.guests.get_mut(&delete.id) else {
            let gone = MachineStatus { id: delete.id.clone(), generation: delete.generation, ..Default::default() };
            return self.send(Report::Status(MachineStatus { phase: MachinePhase::Gone.into(), ..gone }));
        };
        if delete.generation < guest.desired.message.generation {
            tracing::warn!(machine = delete.id, generation = delete.generation, "an older delete is ignored");
            return self.report_again(&delete.id);
        }
        tracing::info!(machine = delete.id, generation = delete.generation, "delete");
        guest.desired.message.generation = delete.generation;
        guest.deleting = true;
        self.converge(&delete.id, now);
    }

    fn console_input(&mut self, input: &ConsoleInput) {
        if let Some(live) = self.guests.get_mut(&input.id).and_then(|guest| guest.live.as_mut()) {
            live.machine.console_input(&input.data);
        }
    }

    fn console_output(&mut self, id: &str) {
        let Some(live) = self.guests.get_mut(id).and_then(|guest| guest.live.as_mut()) else { return };
        while self.greeted {
            let data = live.machine.console_output(CONSOLE_CHUNK);
            if data.is_empty() {
                break;
            }
            let report = Report::Console(ConsoleOutput { id: id.to_owned(), data });
            self.outbox.push_back(ToCard { report: Some(report) });
        }
    }

    /// Brings one guest a step nearer to what it shall be, writes down where
    /// it is and reports it.
    fn converge(&mut self, id: &str, now: Instant) {
        let Some(guest) = self.guests.get_mut(id) else { return };
        match &guest.live {
            None if guest.deleting => return self.forget(id),
            None if guest.may_start() => self.start(id),
            None => {}
            Some(_) => guest.steer(now),
        }
        self.save(id);
        // After the record, so that a killed agent knows that it was not a crash.
        if let Some(live) = self.guests.get_mut(id).and_then(|guest| guest.live.as_mut()).filter(|live| live.off && !live.killed) {
            live.killed = true;
            live.machine.kill();
        }
        self.report_inventory();
        self.report_status(id);
    }

    fn start(&mut self, id: &str) {
        let Some(guest) = self.guests.get_mut(id) else { return };
        let spec = &guest.desired.spec;
        let grant = match self.ledger.grant(id, spec.vcpus, spec.memory_bytes) {
            Ok(grant) => grant,
            Err(refusal) => return guest.fail(&refusal.to_string()),
        };
        let begun = Record { cores: grant.cores.clone(), ..guest.record() };
        let begun = Record { memory_bytes: spec.memory_bytes, boot: guest.desired.message.boot, end: None, ..begun };
        self.runs += 1;
        let events = Events::new(Source { id: id.to_owned(), run: self.runs }, self.events.clone());
        let folder = self.records.folder(id);
        let launch = Launch { spec, cores: &grant.cores, folder: &folder, plugged: &BTreeSet::new() };
        match self.records.save(id, &begun).and_then(|()| self.vmm.start(&launch, events)) {
            Ok(machine) => {
                tracing::info!(machine = id, cores = ?grant.cores, pages = grant.pages, "started");
                let plugged = spec.functions.iter().map(|function| function.id.clone()).collect();
                guest.live = Some(Live { plugged, ..Live::new(machine, self.runs, grant.cores, spec.memory_bytes) });
                guest.boot = guest.desired.message.boot;
                guest.end = None;
                guest.trouble.clear();
            }
            Err(error) => {
                self.ledger.release(id);
                guest.fail(&format!("not started: {error}"));
            }
        }
    }

    /// Makes a guest of a record, with its machine if that still runs.
    fn adopt(&mut self, id: &str, now: Instant) {
        let Some(record) = self.records.load(id) else {
            // Never started: the record is written before the start.
            return self.forget(id);
        };
        let message = record.machine.clone().unwrap_or_default();
        let spec = match Spec::new(&message, &self.link_dir) {
            Ok(spec) if spec.id == id => spec,
            _ => {
                tracing::error!(machine = id, "a record that makes no sense is thrown away");
                return self.forget(id);
            }
        };
        let mut guest = Guest::new(Desired { message, spec });
        (guest.boot, guest.end, guest.deleting, guest.saved) = (record.boot, record.end.clone(), record.deleting, record.clone());
        self.runs += 1;
        let events = Events::new(Source { id: id.to_owned(), run: self.runs }, self.events.clone());
        let folder = self.records.folder(id);
        let plugged: BTreeSet<String> = record.plugged.iter().cloned().collect();
        let launch = Launch { spec: &guest.desired.spec, cores: &record.cores, folder: &folder, plugged: &plugged };
        let adopted = if record.cores.is_empty() { Ok(None) } else { self.vmm.adopt(&launch, events) };
        match adopted {
            Ok(Some(machine)) => {
                tracing::info!(machine = id, cores = ?record.cores, "adopted");
                if let Err(refusal) = self.ledger.restore(id, &record.cores, record.memory_bytes) {
                    tracing::error!(machine = id, %refusal, "runs beyond the ledger, until it stops");
                }
                let live = Live::new(machine, self.runs, record.cores, record.memory_bytes);
                guest.live = Some(Live { ready: record.ready, plugged, ..live });
            }
            Ok(None) if guest.deleting => return self.forget(id),
            Ok(None) if record.ready && guest.end.is_none() && guest.desired.message.running => {
                guest.fail("it ended while no agent was there");
            }
            Ok(None) => {}
            Err(error) => {
                tracing::error!(machine = id, %error, "not adopted");
                guest.fail(&format!("not adopted: {error}"));
            }
        }
        let runs = guest.live.is_some();
        self.guests.insert(id.to_owned(), guest);
        // One that does not run waits for the card: it starts nothing by itself.
        if runs {
            self.converge(id, now);
        }
    }

    fn forget(&mut self, id: &str) {
        if let Err(error) = self.records.remove(id) {
            tracing::error!(machine = id, %error, "its record stays");
        }
        if let Some(guest) = self.guests.remove(id) {
            tracing::info!(machine = id, "gone");
            let status = MachineStatus { phase: MachinePhase::Gone.into(), message: String::new(), ..guest.status() };
            self.report_inventory();
            self.send(Report::Status(status));
        }
    }

    fn save(&mut self, id: &str) {
        let Some(guest) = self.guests.get_mut(id) else { return };
        let record = guest.record();
        if record == guest.saved {
            return;
        }
        match self.records.save(id, &record) {
            Ok(()) => guest.saved = record,
            Err(error) => tracing::error!(machine = id, %error, "its record is old now"),
        }
    }

    fn refuse(&mut self, message: &MachineMessage, invalid: &Invalid) {
        tracing::error!(machine = message.id, %invalid, "refused");
        // An id that is not one would only spoil the card's log too.
        let id = if check_id("id", &message.id).is_ok() { message.id.clone() } else { String::new() };
        let status = MachineStatus { id, generation: message.generation, message: invalid.to_string(), ..Default::default() };
        self.send(Report::Status(MachineStatus { phase: MachinePhase::Failed.into(), ..status }));
    }

    fn report_again(&mut self, id: &str) {
        if let Some(guest) = self.guests.get_mut(id) {
            guest.reported = None;
        }
        self.report_status(id);
    }

    fn report_status(&mut self, id: &str) {
        let Some(guest) = self.guests.get_mut(id).filter(|_| self.greeted) else { return };
        let status = guest.status();
        if guest.reported.as_ref() != Some(&status) {
            guest.reported = Some(status.clone());
            self.send(Report::Status(status));
        }
    }

    fn report_inventory(&mut self) {
        let inventory = Inventory {
            host_boot_id: self.boot_id,
            cores: self.ledger.cores(),
            memory_bytes: self.ledger.memory_bytes(),
            cores_free: self.ledger.cores_free(),
            memory_free_bytes: self.ledger.memory_free_bytes(),
            machine: self.vmm.name().to_owned(),
            simulated: self.simulated,
        };
        if self.greeted && self.inventory_sent.as_ref() != Some(&inventory) {
            self.inventory_sent = Some(inventory.clone());
            self.send(Report::Inventory(inventory));
        }
    }

    fn send(&mut self, report: Report) {
        if self.greeted {
            self.outbox.push_back(ToCard { report: Some(report) });
        }
    }
}

/// Removes what a machine whose process was killed has left in the slot.
fn remove_sockets(spec: &Spec) {
    for socket in spec.functions.iter().map(|function| &function.socket) {
        let left = fs::symlink_metadata(socket).is_ok_and(|metadata| metadata.file_type().is_socket());
        if left && let Err(error) = fs::remove_file(socket) {
            tracing::warn!(socket = %socket.display(), %error, "a socket stays");
        }
    }
}

impl Guest {
    fn new(desired: Desired) -> Self {
        let saved = Record::default();
        Self { desired, boot: 0, end: None, deleting: false, live: None, trouble: String::new(), saved, reported: None }
    }

    fn may_start(&self) -> bool {
        let ended = self.end.as_ref().is_some_and(|end| self.desired.message.generation <= end.generation);
        self.desired.message.running && !ended
    }

    /// What to do with a machine that exists.
    fn steer(&mut self, now: Instant) {
        let Some(live) = self.live.as_mut().filter(|live| !live.killed) else { return };
        let message = &self.desired.message;
        let boot_rises = message.running && self.boot < message.boot;
        let late = live.press.is_some_and(|press| press.first + POWER_OFF_PATIENCE <= now);
        if late {
            tracing::warn!(machine = message.id, "the guest did not turn itself off in time");
        }
        if self.deleting || (!message.running && late) {
            live.killed = true;
            return live.machine.kill();
        }
        if boot_rises && !live.ready {
            self.boot = message.boot; // This is that boot.
        } else if boot_rises && (live.off || late) {
            live.restart();
            self.boot = message.boot;
        }
        if live.off {
            // `Host::converge` kills it once this is written down.
            if message.running && !live.pressed {
                tracing::info!(machine = message.id, "the guest turned itself off");
                self.end = Some(End { generation: message.generation, failed: false, message: String::new() });
            }
        } else if !message.running || self.boot < message.boot {
            if live.press.is_none_or(|press| press.last + BUTTON_INTERVAL <= now) {
                live.press = Some(Press { first: live.press.map_or(now, |press| press.first), last: now });
                live.pressed = true;
                live.machine.power_button();
            }
        } else {
            live.press = None;
            if live.known {
                live.converge_functions(&self.desired.spec, now);
            }
        }
    }

    fn exited(&mut self, how: &str) {
        let Some(live) = self.live.take() else { return };
        tracing::info!(machine = self.desired.message.id, how, "ended");
        if !live.killed {
            self.fail(how);
        }
        self.trouble.clear();
    }

    fn fail(&mut self, why: &str) {
        tracing::error!(machine = self.desired.message.id, why, "failed");
        self.end = Some(End { generation: self.desired.message.generation, failed: true, message: why.to_owned() });
    }

    fn deadline(&self) -> Option<Instant> {
        let live = self.live.as_ref().filter(|live| !live.killed)?;
        let press = live.press.map(|press| (press.last + BUTTON_INTERVAL).min(press.first + POWER_OFF_PATIENCE));
        press.into_iter().chain(live.asked.values().map(|asked| *asked + FUNCTION_INTERVAL)).min()
    }

    fn record(&self) -> Record {
        let live = self.live.as_ref();
        Record {
            machine: Some(self.desired.message.clone()),
            boot: self.boot,
            cores: live.map(|live| live.cores.clone()).unwrap_or_default(),
            memory_bytes: live.map_or(0, |live| live.memory_bytes),
            ready: live.is_some_and(|live| live.ready),
            plugged: live.map(|live| live.plugged.iter().cloned().collect()).unwrap_or_default(),
            end: self.end.clone(),
            deleting: self.deleting,
        }
    }

    fn status(&self) -> MachineStatus {
        let message = &self.desired.message;
        let end = self.end.as_ref().filter(|end| message.running && message.generation <= end.generation);
        let phase = match (&self.live, end) {
            (Some(live), _) if live.ready => MachinePhase::Running,
            (Some(_), _) => MachinePhase::Starting,
            (None, Some(end)) if end.failed => MachinePhase::Failed,
            // Written down by an earlier agent and not started: the card's next Put does it.
            (None, None) if message.running && !self.deleting => MachinePhase::Starting,
            (None, _) => MachinePhase::Stopped,
        };
        let live = self.live.as_ref();
        MachineStatus {
            id: message.id.clone(),
            generation: message.generation,
            boot: self.boot,
            phase: phase.into(),
            message: end.filter(|_| live.is_none()).map_or_else(|| self.trouble.clone(), |end| end.message.clone()),
            functions: live.map(|live| live.plugged.iter().cloned().collect()).unwrap_or_default(),
            cores: live.map(|live| live.cores.clone()).unwrap_or_default(),
        }
    }
}

impl Live {
    fn new(machine: Box<dyn Machine>, run: u64, cores: Vec<u32>, memory_bytes: u64) -> Self {
        let (plugged, asked) = (BTreeSet::new(), BTreeMap::new());
        Self {
            machine,
            run,
            cores,
            memory_bytes,
            ready: false,
            known: false,
            off: false,
            resetting: false,
            killed: false,
            press: None,
            pressed: false,
            plugged,
            asked,
        }
    }

    fn restart(&mut self) {
        (self.off, self.resetting, self.press, self.pressed) = (false, true, None, false);
        self.machine.reset();
    }

    fn converge_functions(&mut self, spec: &Spec, now: Instant) {
        let wanted: BTreeSet<&str> = spec.functions.iter().map(|function| function.id.as_str()).collect();
        let plugged = &self.plugged;
        // Forget what is no longer asked for either way.
        self.asked.retain(|id, _| wanted.contains(id.as_str()) != plugged.contains(id));
        let due = |asked: &BTreeMap<String, Instant>, id: &str| asked.get(id).is_none_or(|at| *at + FUNCTION_INTERVAL <= now);
        for id in self.plugged.iter().filter(|id| !wanted.contains(id.as_str())) {
            if due(&self.asked, id) {
                self.asked.insert(id.clone(), now);
                self.machine.unplug(id);
            }
        }
        for function in spec.functions.iter().filter(|function| !self.plugged.contains(&function.id)) {
            if due(&self.asked, &function.id) {
                self.asked.insert(function.id.clone(), now);
                self.machine.plug(function);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests;
