//! A machine without a guest, for fleets of thousands in tests of the API.
//!
//! It obeys at once: every request is answered by its event before the call
//! returns. Its guest shuts down when asked to and echoes what is typed.

use super::{Event, Events, Function, Launch, Machine, Vmm};
use crate::console::Console;
use std::collections::BTreeSet;
use std::io;

/// Starts simulated machines.
#[derive(Debug, Default)]
pub struct Sim;

impl Vmm for Sim {
    fn name(&self) -> &'static str {
        "sim"
    }

    fn start(&mut self, launch: &Launch<'_>, events: Events) -> io::Result<Box<dyn Machine>> {
        let mut machine = SimMachine { id: launch.spec.id.clone(), events, console: Console::default(), off: false };
        let plugged = launch.spec.functions.iter().map(|function| function.id.clone()).collect();
        machine.events.send(Event::Ready(plugged));
        machine.boot();
        Ok(Box::new(machine))
    }

    fn adopt(&mut self, launch: &Launch<'_>, events: Events) -> io::Result<Option<Box<dyn Machine>>> {
        events.send(Event::Ready(BTreeSet::clone(launch.plugged)));
        Ok(Some(Box::new(SimMachine { id: launch.spec.id.clone(), events, console: Console::default(), off: false })))
    }
}

struct SimMachine {
    id: String,
    events: Events,
    console: Console,
    off: bool,
}

impl SimMachine {
    fn boot(&mut self) {
        let banner = format!("{}: simulated machine, no guest runs\r\n", self.id);
        self.print(banner.as_bytes());
    }

    fn print(&self, bytes: &[u8]) {
        if self.console.push(bytes) {
            self.events.send(Event::Console);
        }
    }
}

impl Machine for SimMachine {
    fn power_button(&mut self) {
        if !self.off {
            self.off = true;
            self.events.send(Event::PoweredOff);
        }
    }

    fn reset(&mut self) {
        self.off = false;
        self.events.send(Event::Reset);
        self.boot();
    }

    fn plug(&mut self, function: &Function) {
        self.events.send(Event::Plugged(function.id.clone()));
    }

    fn unplug(&mut self, id: &str) {
        self.events.send(Event::Unplugged(id.to_owned()));
    }

    fn kill(&mut self) {
        self.events.send(Event::Exited("killed".to_owned()));
    }

    fn console_input(&mut self, bytes: &[u8]) {
        self.print(bytes);
    }

    fn console_output(&mut self, limit: usize) -> Vec<u8> {
        self.console.take(limit)
    }
}
