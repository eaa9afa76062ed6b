//! A device in memory: two bounded queues, one end for the worker and one for a
//! test or a simulated wire. Its eventfd polls readable while frames wait.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::{BURST, PacketIo};
use crate::packet::{Packet, Pool};

/// Frames that each direction holds before it drops.
const QUEUE: usize = 4096;

/// One end of a wire in memory.
#[derive(Debug)]
pub struct MemPort {
    receive: Arc<Queue>,
    send: Arc<Queue>,
}

#[derive(Debug)]
struct Queue {
    frames: Mutex<VecDeque<Packet>>,
    ready: OwnedFd,
}

impl MemPort {
    /// Two ends: what one sends, the other receives.
    ///
    /// # Errors
    /// When the system has no descriptor left for the two eventfds.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, two) = (Queue::new()?, Queue::new()?);
        Ok((Self { receive: Arc::clone(&one), send: Arc::clone(&two) }, Self { receive: two, send: one }))
    }

    /// Sends one frame; returns false when the other end has no room or the
    /// frame is too long.
    pub fn send(&self, frame: &[u8]) -> bool {
        let mut packet = Packet::new();
        packet.copy_from(frame) && self.send.push(packet)
    }

    /// The next received frame, if one waits.
    #[must_use]
    pub fn receive(&self) -> Option<Vec<u8>> {
        self.receive.pop().map(|packet| packet.as_slice().to_vec())
    }
}

impl PacketIo for MemPort {
    fn rx_burst(&mut self, _pool: &mut Pool, out: &mut Vec<Packet>) {
        out.extend((0..BURST).map_while(|_| self.receive.pop()));
    }

    fn tx_burst(&mut self, _pool: &mut Pool, packets: &mut Vec<Packet>) -> usize {
        packets.drain(..).map(|packet| usize::from(!self.send.push(packet))).sum()
    }

    fn wait_fd(&self) -> Option<RawFd> {
        Some(self.receive.ready.as_raw_fd())
    }
}

impl Queue {
    fn new() -> io::Result<Arc<Self>> {
        let ready = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self { frames: Mutex::default(), ready }))
    }

    fn push(&self, packet: Packet) -> bool {
        let mut frames = self.lock();
        if frames.len() >= QUEUE {
            return false;
        }
        frames.push_back(packet);
        // The counter only has to be non-zero; its one failure, an overflow, leaves it so.
        let _ = rustix::io::write(&self.ready, &1u64.to_ne_bytes());
        true
    }

    fn pop(&self) -> Option<Packet> {
        let mut frames = self.lock();
        let packet = frames.pop_front();
        if frames.is_empty() {
            // Would block when nobody wrote since: then it is clear already.
            let _ = rustix::io::read(&self.ready, &mut [0; 8]);
        }
        packet
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Packet>> {
        // No code between lock and unlock panics, so a poisoned queue is whole.
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
