//! The thread beside one QEMU process: it reads all that comes out of it.
//!
//! It turns the monitor's replies and events into [`Event`]s, pins the vCPUs,
//! makes the device of a function once the card has connected to its socket,
//! fills the console and sees the process end. It decides nothing.

use super::command_line::{chardev_id, function_id};
use super::qemu::{Functions, add_device, ask_for_sockets, remove_parts};
use super::qmp::{Commands, Lines, Message};
use super::{Event, Events};
use crate::console::Console;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use rustix::thread::CpuSet;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often QEMU is asked whether the card has connected to a new function.
const SOCKETS_INTERVAL: Duration = Duration::from_millis(5);
/// Messages of QEMU that are logged per run of a machine: a guest can provoke them.
const LOG_LINES_MAX: u32 = 100;

pub(super) struct Watcher {
    pub(super) id: String,
    pub(super) process: Arc<OwnedFd>,
    pub(super) commands: Arc<Commands>,
    pub(super) console: Arc<Console>,
    /// The real CPU of each vCPU.
    pub(super) cpus: Vec<usize>,
    pub(super) functions: Functions,
    pub(super) events: Events,
    pub(super) qmp_out: File,
    pub(super) serial_out: File,
    pub(super) log: File,
}

#[derive(Default)]
struct State {
    qmp: Lines,
    log: Lines,
    log_lines: u32,
    last_words: String,
    /// From `query-pci`, until the guest is known to run.
    plugged: Option<BTreeSet<String>>,
    /// The guest is off and this was said, once for each time.
    off: bool,
    /// What went wrong with a part of a function that is being plugged.
    part_errors: BTreeMap<String, String>,
    /// When to ask again for sockets that a function waits for.
    ask_at: Option<Instant>,
}

impl Watcher {
    /// Runs until the process has ended and all that it wrote is read.
    pub(super) fn run(self) {
        let mut state = State::default();
        loop {
            let ready = self.wait(state.ask_at);
            if state.ask_at.is_some_and(|at| at <= Instant::now()) {
                state.ask_at = None;
                ask_for_sockets(&self.commands);
            }
            let outcome = ready.and_then(|ended| {
                self.read_qmp(&mut state)?;
                self.read_console()?;
                self.read_log(&mut state)?;
                Ok(ended)
            });
            match outcome {
                Ok(false) => {}
                Ok(true) => break,
                Err(error) => {
                    // A monitor that talks nonsense is not QEMU as we know it.
                    tracing::error!(machine = self.id, %error, "its process is broken and gets killed");
                    state.last_words = error.to_string();
                    let _ = rustix::process::pidfd_send_signal(&*self.process, Signal::KILL);
                    let mut end = [PollFd::new(&*self.process, PollFlags::IN)];
                    while rustix::event::poll(&mut end, None) == Err(Errno::INTR) {}
                    break;
                }
            }
        }
        let mut how = self.reap();
        if !state.last_words.is_empty() {
            how = format!("{how}: {}", state.last_words);
        }
        self.events.send(Event::Exited(how));
    }

    /// Waits until there is something to read, at most until `at`; true when the
    /// process has ended.
    fn wait(&self, at: Option<Instant>) -> io::Result<bool> {
        // A FIFO whose writer is gone stays ready: the process ends in a moment.
        let files = [self.process.as_fd(), self.qmp_out.as_fd(), self.serial_out.as_fd(), self.log.as_fd()];
        let mut polled = files.map(|file| PollFd::from_borrowed_fd(file, PollFlags::IN));
        let timeout = at.and_then(|at| Timespec::try_from(at.saturating_duration_since(Instant::now())).ok());
        match rustix::event::poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(polled.first().is_some_and(|process| !process.revents().is_empty())),
            Err(errno) => Err(errno.into()),
        }
    }

    fn read_console(&self) -> io::Result<()> {
        for bytes in chunks(&self.serial_out) {
            if self.console.push(&bytes?) {
                self.events.send(Event::Console);
            }
        }
        Ok(())
    }

    fn read_log(&self, state: &mut State) -> io::Result<()> {
        for bytes in chunks(&self.log) {
            for line in state.log.push(&bytes?)? {
                let line: String = String::from_utf8_lossy(&line).chars().filter(|letter| !letter.is_control()).take(500).collect();
                if line.contains(": info: QEMU waiting for connection on: ") {
                    // It starts before the card has seen its sockets, as it should.
                    tracing::debug!(machine = self.id, line, "QEMU says");
                    continue;
                }
                state.log_lines += 1;
                match state.log_lines {
                    ..=LOG_LINES_MAX => tracing::warn!(machine = self.id, line, "QEMU says"),
                    _ if state.log_lines == LOG_LINES_MAX + 1 => tracing::warn!(machine = self.id, "QEMU says more, which is not logged"),
                    _ => {}
                }
                state.last_words = line;
            }
        }
        Ok(())
    }

    fn read_qmp(&self, state: &mut State) -> io::Result<()> {
        for bytes in chunks(&self.qmp_out) {
            for line in state.qmp.push(&bytes?)? {
                match self.commands.parse(&line) {
                    Some(Message::Reply { tag, result }) => self.reply(state, &tag, result)?,
                    Some(Message::Event { name, data }) => self.event(state, &name, &data),
                    None => {}
                }
            }
        }
        Ok(())
    }

    fn reply(&self, state: &mut State, tag: &str, result: Result<Value, String>) -> io::Result<()> {
        match (tag.split_once(' ').unwrap_or((tag, "")), result) {
            (("cpus", _), Ok(cpus)) => self.pin(&cpus),
            (("pci", _), Ok(buses)) => {
                let slots = functions(&buses);
                state.plugged = Some(slots.keys().cloned().collect());
                self.functions.lock().slots = slots;
            }
            (("status", _), Ok(status)) => match status.get("status").and_then(Value::as_str).unwrap_or_default() {
                "running" => state.plugged.take().into_iter().for_each(|plugged| self.events.send(Event::Ready(plugged))),
                "shutdown" => {
                    // Its functions are known all the same: a reset may follow.
                    state.plugged.take().into_iter().for_each(|plugged| self.events.send(Event::Ready(plugged)));
                    if !std::mem::replace(&mut state.off, true) {
                        self.events.send(Event::PoweredOff);
                    }
                }
                "paused" | "prelaunch" => {
                    self.commands.send("continue", "cont", json!({}));
                    self.commands.send("status", "query-status", json!({}));
                }
                other => return Err(io::Error::other(format!("the machine stopped: {other}"))),
            },
            (("sockets", _), Ok(sockets)) => self.connected(state, &sockets),
            (("part", function), Err(error)) => drop(state.part_errors.entry(function.to_owned()).or_insert(error)),
            (("plug", function), Ok(_)) => {
                state.part_errors.remove(function);
                self.events.send(Event::Plugged(function.to_owned()));
            }
            (("plug", function), Err(error)) => {
                self.functions.lock().slots.remove(function);
                remove_parts(&self.commands, function);
                let message = state.part_errors.remove(function).unwrap_or(error);
                self.events.send(Event::PlugFailed { function: function.to_owned(), message });
            }
            // Refusals of these are expected: an adopted session, a repeated
            // request, a part that is not there.
            (("capabilities" | "unplug" | "removed", _), _) | (_, Ok(_)) => {}
            ((verb, _), Err(error)) => tracing::error!(machine = self.id, verb, error, "QEMU refuses"),
        }
        Ok(())
    }

    fn event(&self, state: &mut State, name: &str, data: &Value) {
        match name {
            // Why it stopped is in its status: off, or broken.
            "STOP" => self.commands.send("status", "query-status", json!({})),
            // One that was off has to be told to run.
            "RESET" => {
                state.off = false;
                self.events.send(Event::Reset);
                self.commands.send("continue", "cont", json!({}));
            }
            "DEVICE_DELETED" => {
                if let Some(function) = data.get("device").and_then(Value::as_str).and_then(function_id) {
                    remove_parts(&self.commands, function);
                    self.functions.lock().slots.remove(function);
                    self.events.send(Event::Unplugged(function.to_owned()));
                }
            }
            _ => {}
        }
    }

    /// Goes on with the functions whose sockets the card has connected to, and
    /// gives up those for which it did not in time.
    fn connected(&self, state: &mut State, sockets: &Value) {
        let mut bus = self.functions.lock();
        let now = Instant::now();
        let (mut connected, mut failed) = (Vec::new(), Vec::new());
        for (function, awaited) in &bus.awaited {
            match is_connected(sockets, &chardev_id(function)) {
                Some(true) => connected.push(function.clone()),
                Some(false) if now < awaited.until => state.ask_at = Some(now + SOCKETS_INTERVAL),
                Some(false) => failed.push((function.clone(), "the card does not connect to its socket".to_owned())),
                None => {
                    let message = state.part_errors.remove(function);
                    failed.push((function.clone(), message.unwrap_or_else(|| "it has no socket".to_owned())));
                }
            }
        }
        for function in connected {
            if let Some(awaited) = bus.awaited.remove(&function) {
                add_device(&self.commands, &function, awaited.plug);
            }
        }
        for (function, message) in failed {
            bus.awaited.remove(&function);
            bus.slots.remove(&function);
            remove_parts(&self.commands, &function);
            self.events.send(Event::PlugFailed { function, message });
        }
    }

    fn pin(&self, cpus: &Value) {
        let threads = cpus.as_array().into_iter().flatten().filter_map(|cpu| cpu.get("thread-id").and_then(Value::as_i64));
        for (thread, cpu) in threads.zip(&self.cpus) {
            let Some(thread) = i32::try_from(thread).ok().and_then(Pid::from_raw) else { continue };
            let mut set = CpuSet::new();
            set.set(*cpu);
            if let Err(error) = rustix::thread::sched_setaffinity(Some(thread), &set) {
                tracing::error!(machine = self.id, cpu, %error, "a vCPU is not pinned");
            }
        }
    }

    /// How the process ended; only its parent learns that.
    fn reap(&self) -> String {
        let status = loop {
            match rustix::process::waitid(WaitId::PidFd(self.process.as_fd()), WaitIdOptions::EXITED) {
                Err(Errno::INTR) => {}
                Ok(status) => break status,
                Err(_) => break None,
            }
        };
        match status.map(|status| (status.exit_status(), status.terminating_signal())) {
            Some((Some(code), _)) => format!("QEMU exited with status {code}"),
            Some((_, Some(signal))) => format!("QEMU was ended by signal {signal}"),
            _ => "QEMU ended".to_owned(),
        }
    }
}

/// Function and slot of each device on any bus of a `query-pci` answer.
fn functions(buses: &Value) -> BTreeMap<String, u8> {
    let devices = buses.as_array().into_iter().flatten().filter_map(|bus| bus.get("devices")?.as_array()).flatten();
    devices
        .filter_map(|device| {
            let function = function_id(device.get("qdev_id")?.as_str()?)?;
            Some((function.to_owned(), u8::try_from(device.get("slot")?.as_u64()?).ok()?))
        })
        .collect()
}

/// What a `query-chardev` answer says of a listening socket; `None` when there
/// is none of that name.
fn is_connected(sockets: &Value, chardev: &str) -> Option<bool> {
    let mut sockets = sockets.as_array().into_iter().flatten();
    let socket = sockets.find(|socket| socket.get("label").and_then(Value::as_str) == Some(chardev))?;
    Some(!socket.get("filename")?.as_str()?.starts_with("disconnected:"))
}

/// What can be read from a FIFO without waiting.
fn chunks(mut file: &File) -> impl Iterator<Item = io::Result<Vec<u8>>> {
    std::iter::from_fn(move || {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            return match file.read(&mut buffer) {
                Ok(0) => None,
                Ok(count) => {
                    buffer.truncate(count);
                    Some(Ok(buffer))
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
                Err(error) => Some(Err(error)),
            };
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_and_slots_are_read_from_the_bus() {
        let buses = json!([{ "bus": 0, "devices": [
            { "slot": 0, "qdev_id": "" },
            { "slot": 3, "qdev_id": "rng" },
            { "slot": 4, "qdev_id": "f-vol-1" },
            { "slot": 5, "qdev_id": "f-eni-1" },
            { "slot": 900, "qdev_id": "f-bad" },
        ] }]);
        assert_eq!(functions(&buses), BTreeMap::from([("vol-1".to_owned(), 4), ("eni-1".to_owned(), 5)]));
        assert!(functions(&json!({ "x": [1] })).is_empty());
    }

    #[test]
    fn a_socket_is_connected_or_not_or_not_there() {
        let sockets = json!([
            { "frontend-open": true, "filename": "pipe", "label": "qmp" },
            { "frontend-open": false, "filename": "disconnected:unix:/l/eni-1.sock,server=on", "label": "c-eni-1" },
            { "frontend-open": false, "filename": "unix:/l/eni-2.sock,server=on", "label": "c-eni-2" },
            { "label": "c-eni-3" },
        ]);
        let found = ["c-eni-1", "c-eni-2", "c-eni-3", "c-eni-4"].map(|chardev| is_connected(&sockets, chardev));
        assert_eq!(found, [Some(false), Some(true), None, None]);
    }
}
