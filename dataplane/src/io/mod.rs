//! Where packets come from and go to: the one trait below the pipeline.

use std::os::fd::RawFd;

use crate::packet::{Packet, Pool};

pub mod cable;
#[cfg(feature = "dpdk")]
pub mod dpdk;
pub mod mem;
mod namespace;
pub mod packet;
pub mod udp;
pub mod vhost;
pub(crate) mod wait;

/// Packets taken from one device in one turn.
pub const BURST: usize = 32;

/// One queue pair of a device, owned by one worker.
pub trait PacketIo: Send {
    /// Appends at most [`BURST`] received frames to `out`, in buffers from `pool`.
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Packet>);

    /// Sends all of `packets`, leaves it empty and returns the buffers to
    /// `pool`. Returns how many the device had no room for: those are gone.
    fn tx_burst(&mut self, pool: &mut Pool, packets: &mut Vec<Packet>) -> usize;

    /// A descriptor that polls readable when `rx_burst` may find something, or
    /// `None` for a device that has to be polled.
    fn wait_fd(&self) -> Option<RawFd>;
}
