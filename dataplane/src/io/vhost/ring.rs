//! One split virtqueue seen from the device, VIRTIO 1.2 section 2.7.
//!
//! The driver is a guest and may write anything: a chain is walked for at most
//! [`CHAIN_MAX`] descriptors, every address goes through the memory map, and a
//! ring whose own structure is wrong is broken until the driver sets it up again.
//!
//! Three rules keep the two sides in step:
//! - All used elements of a turn become visible by one store of the index: a
//!   driver that sees the first buffer of a merged frame sees all of them.
//! - A buffer is used in the turn that took it, so after a crash at any point the
//!   used index says exactly where to go on.
//! - Notifications from the driver stay off while the ring is drained; before the
//!   worker may sleep they go on *and the ring is looked at once more*.

use std::num::Wrapping;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use crate::packet::{Packet, Pool};

/// Largest ring a frontend may set.
pub(super) const SIZE_MAX: u16 = 1024;
/// Descriptors looked at in one chain. A driver needs one per page and one for
/// the header: 4 for 9,001 bytes; Linux sends at most 19.
const CHAIN_MAX: usize = 64;
/// Buffers that one frame may be spread over: 7 of 1,526 bytes hold 9,001.
const MERGE_MAX: usize = 32;
/// `struct virtio_net_hdr_mrg_rxbuf`; `num_buffers` is its last field.
const HEADER_LEN: usize = 12;
/// `struct virtio_net_hdr` of a driver without VERSION_1 and MRG_RXBUF.
const HEADER_LEN_LEGACY: usize = 10;
/// Bytes before the first element of the available and the used ring.
const RING_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;
const AVAIL_ELEMENT: u64 = 2;

/// What was refused on the rings of one port, since the process started.
#[derive(Debug, Default)]
pub(super) struct RingCounters {
    /// Chains that loop, lead nowhere, or are laid out against the standard.
    pub(super) malformed: AtomicU64,
    /// Frames of the guest that are longer than its MTU allows.
    pub(super) oversize: AtomicU64,
    /// Frames to the guest that it had no room for.
    pub(super) no_buffer: AtomicU64,
    /// Rings given up until the driver sets them up again.
    pub(super) broken: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// How the driver of this port lays out its frames; follows from its features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) merge: bool,
    pub(super) long_header: bool,
    pub(super) event_idx: bool,
    /// Longest frame, from the first byte of Ethernet.
    pub(super) frame_max: usize,
}

impl Layout {
    fn header_len(self) -> usize {
        if self.long_header { HEADER_LEN } else { HEADER_LEN_LEGACY }
    }
}

/// The ring's structure is wrong, or lies outside of the guest's memory.
#[derive(Debug)]
pub(super) struct Broken;

/// Why one chain was not taken.
#[derive(Debug)]
enum Refused {
    Malformed,
    Oversize,
}

#[derive(Debug, Default)]
pub(super) struct Ring {
    pub(super) queue: Queue,
    pub(super) call: Option<OwnedFd>,
    pub(super) kick: Option<OwnedFd>,
    pub(super) error: Option<OwnedFd>,
    pub(super) enabled: bool,
    pub(super) addressed: bool,
    running: bool,
    /// Index of the next used element.
    used: Wrapping<u16>,
    /// `used` when it was last decided whether to interrupt.
    signalled: Wrapping<u16>,
    segments: Vec<Segment>,
    heads: Vec<u16>,
}

/// A run of guest memory to write to, in buffer `head` (an index of `heads`).
#[derive(Clone, Copy, Debug)]
struct Segment {
    address: GuestAddress,
    len: usize,
    head: usize,
}

impl Ring {
    /// A ring that waits to be set up.
    pub(super) fn new() -> Self {
        // The size is a constant power of two; a default queue is never started.
        Self { queue: Queue::new(SIZE_MAX).unwrap_or_default(), ..Self::default() }
    }

    /// Whether the worker may use it.
    pub(super) fn running(&self) -> bool {
        self.running
    }

    /// Starts when everything is set and it does not run yet. Returns whether it started.
    pub(super) fn start(&mut self, memory: &GuestMemoryMmap, layout: Layout) -> Result<bool, Broken> {
        if self.running || !self.enabled || !self.addressed || self.kick.is_none() {
            return Ok(false);
        }
        self.queue.set_event_idx(layout.event_idx);
        self.queue.set_ready(true);
        if !self.queue.is_valid(memory) {
            self.queue.set_ready(false);
            return Err(Broken);
        }
        // The guest's memory outlives this process: go on where the last device stopped.
        self.used = self.queue.used_idx(memory, Ordering::Acquire).map_err(|_| Broken)?;
        self.signalled = self.used;
        self.queue.disable_notification(memory).map_err(|_| Broken)?;
        self.running = true;
        // The last device may have used buffers and died before it said so.
        self.interrupt();
        Ok(true)
    }

    /// Stops; the worker touches the guest's memory no more.
    pub(super) fn stop(&mut self) {
        self.running = false;
        self.queue.set_ready(false);
    }

    /// Gives the ring up until it is set up again, and tells the frontend.
    pub(super) fn give_up(&mut self, counters: &RingCounters) {
        count(&counters.broken);
        self.stop();
        self.enabled = false;
        if let Some(error) = &self.error {
            signal(error);
        }
    }

    /// Asks for kicks. Returns whether buffers arrived just before.
    pub(super) fn arm(&mut self, memory: &GuestMemoryMmap) -> Result<bool, Broken> {
        self.queue.enable_notification(memory).map_err(|_| Broken)
    }

    /// Asks for no more kicks.
    pub(super) fn disarm(&mut self, memory: &GuestMemoryMmap) -> Result<(), Broken> {
        self.queue.disable_notification(memory).map_err(|_| Broken)
    }

    /// Takes at most `limit` frames that the driver transmitted. Returns how many
    /// buffers that were, the refused ones included.
    pub(super) fn receive(
        &mut self,
        memory: &GuestMemoryMmap,
        layout: Layout,
        counters: &RingCounters,
        pool: &mut Pool,
        out: &mut Vec<Packet>,
        limit: usize,
    ) -> Result<usize, Broken> {
        self.heads.clear();
        let mut chains = self.queue.iter(memory).map_err(|_| Broken)?;
        while self.heads.len() < limit {
            let Some(mut chain) = chains.next() else { break };
            self.heads.push(chain.head_index());
            let mut packet = pool.get();
            match read_frame(&mut chain, memory, layout, &mut packet) {
                Ok(()) => out.push(packet),
                Err(refused) => {
                    count(match refused {
                        Refused::Malformed => &counters.malformed,
                        Refused::Oversize => &counters.oversize,
                    });
                    pool.put(packet);
                }
            }
        }
        let taken = self.heads.len();
        for index in 0..taken {
            let head = self.heads.get(index).copied().unwrap_or_default();
            self.use_buffer(memory, head, 0)?;
        }
        self.publish(memory, layout)?;
        Ok(taken)
    }

    /// Writes all of `packets` into buffers of the driver. Returns how many did
    /// not fit.
    pub(super) fn send(&mut self, memory: &GuestMemoryMmap, layout: Layout, packets: &[Packet]) -> Result<usize, Broken> {
        let mut dropped = 0;
        for packet in packets {
            let frame = packet.as_slice();
            if frame.len() > layout.frame_max || !self.gather(memory, layout, frame.len())? {
                dropped += 1;
                continue;
            }
            self.write_frame(memory, layout, frame)?;
        }
        self.publish(memory, layout)?;
        Ok(dropped)
    }

    /// Collects buffers for a frame of `len` bytes into `heads` and `segments`.
    /// Returns false, with the ring as it was, when the driver has too few.
    fn gather(&mut self, memory: &GuestMemoryMmap, layout: Layout, len: usize) -> Result<bool, Broken> {
        self.heads.clear();
        self.segments.clear();
        let start = self.queue.next_avail();
        let buffers_max = if layout.merge { MERGE_MAX } else { 1 };
        let mut missing = layout.header_len() + len;
        let mut chains = self.queue.iter(memory).map_err(|_| Broken)?;
        while missing > 0 {
            if self.heads.len() == buffers_max {
                break;
            }
            let Some(mut chain) = chains.next() else { break };
            let head = self.heads.len();
            self.heads.push(chain.head_index());
            missing -= collect_room(&mut chain, missing, head, &mut self.segments).ok_or(Broken)?;
        }
        if missing > 0 {
            self.queue.set_next_avail(start);
        }
        Ok(missing == 0)
    }

    /// Writes header and frame over the gathered segments and uses their buffers.
    fn write_frame(&mut self, memory: &GuestMemoryMmap, layout: Layout, frame: &[u8]) -> Result<(), Broken> {
        let mut header = [0; HEADER_LEN];
        let [.., low, high] = &mut header;
        // MERGE_MAX bounds the number.
        [*low, *high] = u16::try_from(self.heads.len()).unwrap_or(1).to_le_bytes();
        let header = header.get(..layout.header_len()).unwrap_or_default();
        let mut written = [0u32; MERGE_MAX];
        let mut sources = [header, frame];
        for segment in &self.segments {
            let (mut address, mut left) = (segment.address, segment.len);
            for source in &mut sources {
                let (now, later) = source.split_at(left.min(source.len()));
                if !now.is_empty() {
                    memory.write_slice(now, address).map_err(|_| Broken)?;
                    address = address.checked_add(now.len() as u64).ok_or(Broken)?;
                    left -= now.len();
                }
                *source = later;
            }
            if let Some(total) = written.get_mut(segment.head) {
                *total += u32::try_from(segment.len - left).unwrap_or(0);
            }
        }
        for index in 0..self.heads.len() {
            let (Some(&head), Some(&len)) = (self.heads.get(index), written.get(index)) else { break };
            self.use_buffer(memory, head, len)?;
        }
        Ok(())
    }

    /// Writes the next used element; [`Ring::publish`] shows it to the driver.
    fn use_buffer(&mut self, memory: &GuestMemoryMmap, head: u16, len: u32) -> Result<(), Broken> {
        let slot = u64::from(self.used.0.checked_rem(self.queue.size()).ok_or(Broken)?);
        let address = GuestAddress(self.queue.used_ring()).checked_add(RING_HEADER + slot * USED_ELEMENT);
        // Two little-endian numbers: the index of the chain's head, bytes written.
        let element = (u64::from(len) << 32 | u64::from(head)).to_le_bytes();
        memory.write_slice(&element, address.ok_or(Broken)?).map_err(|_| Broken)?;
        self.used += 1;
        Ok(())
    }

    /// Makes the used elements visible and interrupts the driver if it wants to know.
    fn publish(&mut self, memory: &GuestMemoryMmap, layout: Layout) -> Result<(), Broken> {
        if self.used == self.signalled {
            return Ok(());
        }
        let address = GuestAddress(self.queue.used_ring()).checked_add(2).ok_or(Broken)?;
        memory.store(self.used.0.to_le(), address, Ordering::Release).map_err(|_| Broken)?;
        self.queue.set_next_used(self.used.0);
        // The index must be visible before the driver's wish is read: it writes
        // its wish and then looks at the index.
        fence(Ordering::SeqCst);
        let available = GuestAddress(self.queue.avail_ring());
        let load = |offset: u64| -> Result<u16, Broken> {
            let address = available.checked_add(offset).ok_or(Broken)?;
            memory.load(address, Ordering::Relaxed).map(u16::from_le).map_err(|_| Broken)
        };
        let wanted = if layout.event_idx {
            let event = Wrapping(load(RING_HEADER + u64::from(self.queue.size()) * AVAIL_ELEMENT)?);
            // VIRTIO 1.2 section 2.7.7.2: the event index was passed since the last time.
            self.used - event - Wrapping(1) < self.used - self.signalled
        } else {
            u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        self.signalled = self.used;
        if wanted {
            self.interrupt();
        }
        Ok(())
    }

    /// Interrupts the driver, wanted or not.
    pub(super) fn interrupt(&self) {
        if let Some(call) = &self.call {
            signal(call);
        }
    }
}

/// Adds one to an eventfd. Its one failure, a full counter, leaves it readable.
fn signal(eventfd: &OwnedFd) {
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}

/// Reads the frame of one transmitted chain, without its virtio header. The
/// header asks for offloads, and none were offered: its content is ignored.
fn read_frame(
    chain: &mut DescriptorChain<&GuestMemoryMmap>,
    memory: &GuestMemoryMmap,
    layout: Layout,
    packet: &mut Packet,
) -> Result<(), Refused> {
    let mut header_left = layout.header_len();
    let mut filled = 0;
    let mut ended = false;
    for descriptor in chain.by_ref().take(CHAIN_MAX) {
        if descriptor.is_write_only() {
            return Err(Refused::Malformed);
        }
        ended = !descriptor.has_next();
        let len = usize::try_from(descriptor.len()).map_err(|_| Refused::Malformed)?;
        let skip = header_left.min(len);
        header_left -= skip;
        let len = len - skip;
        if len == 0 {
            continue;
        }
        if filled + len > layout.frame_max {
            return Err(Refused::Oversize);
        }
        let address = descriptor.addr().checked_add(skip as u64).ok_or(Refused::Malformed)?;
        let room = packet.room_mut().get_mut(filled..filled + len).ok_or(Refused::Oversize)?;
        memory.read_slice(room, address).map_err(|_| Refused::Malformed)?;
        filled += len;
    }
    // A chain that stops while its last descriptor names another one loops,
    // leaves the table or is too long.
    if ended && filled > 0 && packet.set_len(filled) { Ok(()) } else { Err(Refused::Malformed) }
}

/// Appends at most `missing` bytes of a writable chain to `segments` and returns
/// how many it had; `None` for a chain that is no buffer to write to.
fn collect_room(chain: &mut DescriptorChain<&GuestMemoryMmap>, missing: usize, head: usize, segments: &mut Vec<Segment>) -> Option<usize> {
    let mut room = 0;
    let mut ended = false;
    for descriptor in chain.by_ref().take(CHAIN_MAX) {
        if !descriptor.is_write_only() {
            return None;
        }
        ended = !descriptor.has_next();
        let len = usize::try_from(descriptor.len()).ok()?.min(missing - room);
        if len > 0 {
            segments.push(Segment { address: descriptor.addr(), len, head });
            room += len;
        }
        if room == missing {
            return Some(room);
        }
    }
    (ended && room > 0).then_some(room)
}
