//! Where the packets of a run come from: bursts of one device at a time.
//!
//! A worker polls each device for a burst; a source does the same with a trace. It
//! looks [`LOOKAHEAD`] frames ahead, and of those gives the frames of each device
//! together, in their order, the device that was first in the trace first.

use std::collections::HashMap;

use dataplane::packet::{Packet, Pool};
use dataplane::pipeline::Device;

use super::pcap::Trace;

/// Packets of a turn at most.
pub const BURST: usize = 64;
/// Frames of up to this many bytes are copied at this length.
const SHORT: usize = 128;
/// Frames of a trace that wait at the devices at once.
const LOOKAHEAD: usize = 256;

/// Gives packets without end, the same ones in each pass.
pub trait Source {
    /// Frames of one pass.
    fn pass(&self) -> u64;

    /// Fills `burst` with 1 to [`BURST`] packets from the pool, and says where they
    /// arrived. A pass ends at the end of a burst.
    fn next(&mut self, pool: &mut Pool, burst: &mut Vec<Packet>) -> Device;
}

/// A trace, played again and again.
#[derive(Debug)]
pub struct Replay {
    trace: Trace,
    steps: Vec<(Device, std::ops::Range<usize>)>,
    at: usize,
}

impl Replay {
    /// Plays `trace`, each frame at its device. Neither may be empty.
    pub fn new(trace: &Trace, devices: &[Device]) -> Self {
        let (mut ordered, mut steps) = (Trace::default(), Vec::new());
        let indices: Vec<usize> = (0..trace.len().min(devices.len())).collect();
        for window in indices.chunks(LOOKAHEAD) {
            let (mut order, mut queues): (Vec<Device>, HashMap<Device, Vec<usize>>) = Default::default();
            for index in window {
                let Some(device) = devices.get(*index) else { continue };
                let queue = queues.entry(*device).or_default();
                if queue.is_empty() {
                    order.push(*device);
                }
                queue.push(*index);
            }
            for device in order {
                for burst in queues.get(&device).map(Vec::as_slice).unwrap_or_default().chunks(BURST) {
                    let start = ordered.len();
                    burst.iter().for_each(|index| ordered.push(trace.get(*index)));
                    steps.push((device, start..ordered.len()));
                }
            }
        }
        Self { trace: ordered, steps, at: 0 }
    }
}

impl Source for Replay {
    fn pass(&self) -> u64 {
        self.trace.len() as u64
    }

    #[inline]
    fn next(&mut self, pool: &mut Pool, burst: &mut Vec<Packet>) -> Device {
        let Some((device, frames)) = self.steps.get(self.at) else { return Device::Underlay };
        for index in frames.clone() {
            let mut packet = pool.get();
            // The trace holds no frame that is longer than a packet.
            let fits = match self.trace.head::<SHORT>(index) {
                // A copy of fixed length takes a few instructions and no call.
                Some((head, length)) => {
                    if let Some(room) = packet.room_mut().first_chunk_mut() {
                        *room = *head;
                    }
                    packet.set_len(length)
                }
                None => packet.copy_from(self.trace.get(index)),
            };
            debug_assert!(fits, "frame {index}");
            burst.push(packet);
        }
        self.at = if self.at + 1 == self.steps.len() { 0 } else { self.at + 1 };
        *device
    }
}

#[cfg(test)]
mod tests {
    use dataplane::PortId;

    use super::*;

    #[test]
    fn frames_of_a_device_come_together_and_in_order() {
        let (mut trace, mut devices) = (Trace::default(), Vec::new());
        for number in 0..10u8 {
            trace.push(&[number]);
            devices.push(if number % 2 == 0 { Device::Underlay } else { Device::Port(PortId(1)) });
        }
        let mut source = Replay::new(&trace, &devices);
        let mut pool = Pool::new(64);
        for _ in 0..2 {
            for (device, expected) in [(Device::Underlay, [0, 2, 4, 6, 8]), (Device::Port(PortId(1)), [1, 3, 5, 7, 9])] {
                let mut burst = Vec::new();
                assert_eq!(source.next(&mut pool, &mut burst), device);
                assert_eq!(burst.iter().map(|packet| packet.as_slice()[0]).collect::<Vec<_>>(), expected);
                pool.put_all(&mut burst);
            }
        }
        assert_eq!(source.pass(), 10);
    }

    #[test]
    fn no_burst_is_longer_than_a_turn() {
        let mut trace = Trace::default();
        (0..300u16).for_each(|number| trace.push(&number.to_be_bytes()));
        let mut source = Replay::new(&trace, &[Device::Underlay; 300]);
        let mut pool = Pool::new(64);
        let mut seen = Vec::new();
        while seen.len() < 300 {
            let mut burst = Vec::new();
            source.next(&mut pool, &mut burst);
            assert!((1..=BURST).contains(&burst.len()));
            seen.extend(burst.iter().map(|packet| u16::from_be_bytes([packet.as_slice()[0], packet.as_slice()[1]])));
            pool.put_all(&mut burst);
        }
        assert_eq!(seen, (0..300).collect::<Vec<_>>());
    }
}
