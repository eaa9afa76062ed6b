//! A packet path of the most ordinary kind, to compare cycles with on the machine at
//! hand: parse, look the connection up in a hash map, count, add or remove VXLAN.
//!
//! It checks no rule, no sender and no state, so it is no data plane; it is what
//! `perf/budget.toml` divides by, so that a budget holds on a fast machine and a slow one.

use std::collections::HashMap;

use dataplane::headers::{self, ETHERNET, UDP_PROTOCOL};
use dataplane::packet::Packet;

use super::bench::{Bench, Run};
use super::clock::Clock;
use super::frame::ENCAPSULATION;
use super::report;
use super::source::Source;

/// Addresses, ports and protocol, the lower end first, so that both directions agree.
type Key = [(u32, u16); 2];

#[derive(Default)]
struct Reference {
    connections: HashMap<Key, (u64, u64)>,
    template: Vec<u8>,
}

impl Reference {
    fn packet(&mut self, packet: &mut Packet, wire: bool) {
        if wire && !packet.pull_front(ENCAPSULATION) {
            return;
        }
        let Some(key) = key(packet.as_slice()) else { return };
        let bytes = packet.len() as u64;
        let counters = self.connections.entry(key).or_default();
        *counters = (counters.0 + 1, counters.1 + bytes);
        if !wire && let Some(room) = packet.push_front(ENCAPSULATION) {
            room.copy_from_slice(&self.template);
        }
    }
}

fn key(frame: &[u8]) -> Option<Key> {
    let (_, bytes) = headers::ethernet(frame).ok()?;
    let ip = headers::ipv4(bytes).ok()?;
    let transport = headers::transport(&ip, frame.get(ETHERNET + ip.header_len..)?).ok().filter(|_| ip.protocol == UDP_PROTOCOL)?;
    let mut ends = [(ip.source.into(), transport.source_port), (ip.destination.into(), transport.destination_port)];
    ends.sort_unstable();
    Some(ends)
}

/// Cycles a packet of the reference, and those of the pipeline divided by them; the
/// source's are taken off both.
pub fn compare(clock: &Clock, bench: &mut Bench, source: &mut impl Source, run: &Run, window: f64) -> (f64, f64) {
    let mut reference = Reference { template: vec![0; ENCAPSULATION], ..Reference::default() };
    let windows: Vec<_> = (0..run.windows.len())
        .map(|_| bench.without_pipeline(clock, source, window, |packet, wire| reference.packet(packet, wire)))
        .collect();
    let bare = report::fastest(&run.source);
    let cycles = report::fastest(&windows) - bare;
    (cycles, (report::fastest(&run.windows) - bare) / cycles)
}
