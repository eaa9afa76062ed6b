//! One machine's connection: its rings, and requests from the guest's offer to the guest's answer.

use super::request::{Refused, Segments, Work, bytes_of, segments, work};
use super::*;
use std::collections::VecDeque;

/// One machine's connection: the rings that its guest set up.
pub(super) struct Machine {
    pub disk: Arc<Disk>,
    pub memory: Memory,
    pub rings: Vec<Mutex<Ring>>,
    /// The exit event that the daemon leaks.
    pub exit: Mutex<Option<RawFd>>,
}

#[derive(Default)]
pub(super) struct Ring {
    vring: Option<VringMutex>,
    /// Rises when the ring is stopped: requests of before have lost it.
    generation: u64,
    /// The sequence number of the first request.
    first: u64,
    /// Requests in the order of the guest, from the first that is not completed.
    requests: VecDeque<Request>,
}

/// A request of the guest.
struct Request {
    head: u16,
    /// Where data for the guest goes: address and length.
    writable: Segments,
    status_at: Option<GuestAddress>,
    status: u8,
    /// Data for the guest, by part.
    data: Vec<Vec<u8>>,
    /// Commands that have not ended.
    left: usize,
}

impl Machine {
    /// Takes what a ring offers and starts it.
    pub fn process(self: &Arc<Self>, index: usize) {
        let Some(ring) = self.rings.get(index) else { return };
        let mut commands = Vec::new();
        let mut ring = lock(ring);
        self.take(index, &mut ring, &mut commands);
        self.complete(&mut ring);
        // Ends run under the ring's lock, and some may run at once.
        drop(ring);
        if !commands.is_empty() {
            self.disk.initiator.submit_all(commands);
        }
    }

    fn take(self: &Arc<Self>, index: usize, ring: &mut Ring, commands: &mut Vec<(Command, CommandEnd)>) {
        let Some(vring) = ring.vring.clone() else { return };
        let mut empty_turns = 0;
        loop {
            let live = {
                let state = vring.get_ref();
                state.is_enabled() && state.get_queue().ready()
            };
            if !live || vring.disable_notification().is_err() {
                return;
            }
            empty_turns += 1;
            loop {
                if !self.disk.admits() {
                    return;
                }
                let chain = vring.get_mut().get_queue_mut().pop_descriptor_chain(self.memory.memory());
                let Some(chain) = chain else { break };
                empty_turns = 0;
                self.start(index, ring, chain, commands);
            }
            match vring.enable_notification() {
                // Something came in between; but an index that offers what cannot be taken ends here.
                Ok(true) if empty_turns < 2 => {}
                Ok(true) => {
                    self.disk.counting.malformed.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                _ => return,
            }
        }
    }

    fn start(self: &Arc<Self>, index: usize, ring: &mut Ring, chain: Chain, commands: &mut Vec<(Command, CommandEnd)>) {
        let head = chain.head_index();
        let memory = self.memory.memory();
        let mut request = Request { head, writable: Vec::new(), status_at: None, status: 0, data: Vec::new(), left: 0 };
        let work = match segments(chain) {
            Some((readable, writable, status_at)) => {
                request.writable = writable;
                request.status_at = Some(status_at);
                work(&self.disk, &memory, &readable, &request.writable)
            }
            None => Err(Refused::Malformed),
        };
        let (generation, sequence) = (ring.generation, ring.first + ring.requests.len() as u64);
        match work {
            Ok(Work::Answer(data)) => request.data = vec![data],
            Ok(Work::Commands(list)) => {
                request.left = list.len();
                request.data.resize(list.len(), Vec::new());
                let bytes = list.iter().map(bytes_of).sum();
                let epoch = self.disk.began(list.len(), bytes);
                for (part, command) in list.into_iter().enumerate() {
                    let (machine, bytes) = (Arc::clone(self), bytes_of(&command));
                    let end = move |result| {
                        machine.ended(index, generation, sequence, part, result);
                        if let Some(machine) = machine.disk.ended(epoch, bytes) {
                            (0..machine.rings.len()).for_each(|index| machine.process(index));
                        }
                    };
                    commands.push((command, Box::new(end)));
                }
            }
            Err(refused) => {
                request.status = if refused == Refused::Unsupported { STATUS_UNSUPPORTED } else { STATUS_ERROR };
                if refused == Refused::Malformed {
                    self.disk.counting.malformed.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        ring.requests.push_back(request);
    }

    /// One command of a request has ended.
    fn ended(&self, index: usize, generation: u64, sequence: u64, part: usize, result: Result<Vec<u8>, NvmeStatus>) {
        let Some(ring) = self.rings.get(index) else { return };
        let mut ring = lock(ring);
        let place = usize::try_from(sequence.wrapping_sub(ring.first)).unwrap_or(usize::MAX);
        if ring.generation != generation {
            return;
        }
        let Some(request) = ring.requests.get_mut(place) else { return };
        request.left -= 1;
        match result {
            Ok(data) => {
                if let Some(slot) = request.data.get_mut(part) {
                    *slot = data;
                }
            }
            Err(status) => {
                tracing::warn!(%status, "a disk request failed");
                request.status = STATUS_ERROR;
            }
        }
        self.complete(&mut ring);
    }

    /// Returns every request to the guest that has ended and has none before it that has not.
    fn complete(&self, ring: &mut Ring) {
        let Some(vring) = ring.vring.clone() else { return };
        let mut any = false;
        while ring.requests.front().is_some_and(|request| request.left == 0) {
            let Some(request) = ring.requests.pop_front() else { break };
            ring.first += 1;
            let written = self.write_back(&request);
            if vring.add_used(request.head, written).is_err() {
                self.disk.counting.malformed.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let counter = match request.status {
                STATUS_OK => &self.disk.counting.completed,
                _ => &self.disk.counting.failed,
            };
            counter.fetch_add(1, Ordering::Relaxed);
            any = true;
        }
        if any && vring.needs_notification().unwrap_or(true) {
            let _ = vring.signal_used_queue();
        }
    }

    /// Writes data and status into the guest's memory; how many bytes.
    fn write_back(&self, request: &Request) -> u32 {
        let memory = self.memory.memory();
        let (mut written, mut status) = (0, request.status);
        if status == STATUS_OK {
            let mut places = request.writable.iter().copied();
            let mut place = places.next();
            for data in &request.data {
                let mut data = data.as_slice();
                while let (false, Some((address, room))) = (data.is_empty(), place) {
                    let (now, later) = data.split_at(room.min(data.len()));
                    if memory.write_slice(now, address).is_err() {
                        status = STATUS_ERROR;
                    }
                    written += now.len();
                    data = later;
                    place = match address.0.checked_add(now.len() as u64) {
                        Some(next) if now.len() < room => Some((GuestAddress(next), room - now.len())),
                        _ => places.next(),
                    };
                }
            }
        }
        if let Some(address) = request.status_at
            && memory.write_obj(status, address).is_ok()
        {
            written += 1;
        }
        u32::try_from(written).unwrap_or(u32::MAX)
    }

    /// Takes a ring's requests away from it: what is under way ends without it.
    fn stop(&self, ring: &Mutex<Ring>) {
        let mut ring = lock(ring);
        ring.generation += 1;
        ring.first = 0;
        ring.requests.clear();
        lock(&self.disk.gate).next_epoch();
        // The next driver of the ring is offered again what was not completed.
        if let Some(vring) = &ring.vring
            && let Ok(used) = vring.queue_used_idx()
        {
            vring.set_queue_next_avail(used);
        }
    }

    /// The machine is gone.
    pub fn forget(&self) {
        for ring in &self.rings {
            self.stop(ring);
            lock(ring).vring = None;
        }
        lock(&self.disk.gate).machine = None;
    }
}

impl VhostUserBackend for Machine {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        RINGS.into()
    }

    fn max_queue_size(&self) -> usize {
        RING_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << blk::VIRTIO_BLK_F_SEG_MAX
            | 1 << blk::VIRTIO_BLK_F_BLK_SIZE
            | 1 << blk::VIRTIO_BLK_F_TOPOLOGY
            | 1 << blk::VIRTIO_BLK_F_FLUSH
            | 1 << blk::VIRTIO_BLK_F_MQ
            | 1 << blk::VIRTIO_BLK_F_DISCARD
            | 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The rings themselves are told.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let (offset, size) = (usize::try_from(offset).unwrap_or(usize::MAX), usize::try_from(size).unwrap_or(usize::MAX));
        let config = self.disk.config();
        offset.checked_add(size).and_then(|end| config.get(offset..end)).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        // `memory` is the same object, and has the new regions already.
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()?;
        *lock(&self.exit) = Some(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    fn stop_vring(&self, index: u32) -> io::Result<()> {
        if let Some(ring) = usize::try_from(index).ok().and_then(|index| self.rings.get(index)) {
            self.stop(ring);
        }
        Ok(())
    }

    fn handle_event(&self, event: u16, events: EventSet, vrings: &[VringMutex], _thread: usize) -> io::Result<()> {
        let index = usize::from(event);
        let machine = lock(&self.disk.gate).machine.clone();
        let (Some(vring), Some(ring), Some(machine)) = (vrings.get(index), self.rings.get(index), machine) else {
            return Ok(());
        };
        if events.contains(EventSet::IN) {
            lock(ring).vring.get_or_insert_with(|| vring.clone());
            machine.process(index);
        }
        Ok(())
    }
}
