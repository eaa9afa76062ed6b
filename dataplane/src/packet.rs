//! A packet on its way through the card: one owned buffer with headroom.
//!
//! ```text
//! 0            start                 end               HEADROOM + FRAME_MAX
//! |  headroom    |  frame (as_slice)  |  tailroom                         |
//! ```
//!
//! The headroom takes the outer headers of an encapsulated frame (14 Ethernet,
//! 20 IPv4, 8 UDP, 8 VXLAN), so that encapsulation never copies the payload.
//! Invariant: `start <= end <= buffer.len()`, kept by every method here.

use std::net::Ipv4Addr;

/// Bytes kept free in front of a received frame.
pub const HEADROOM: usize = 128;
/// Largest frame carried: 9,001 bytes of IP, Ethernet and outer headers.
pub const FRAME_MAX: usize = 9216;

/// An Ethernet frame in an owned buffer.
#[derive(Clone)]
pub struct Packet {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    peer: Option<Ipv4Addr>,
}

impl Packet {
    /// An empty packet with [`HEADROOM`] in front and room for [`FRAME_MAX`] bytes.
    #[must_use]
    pub fn new() -> Self {
        Self { buffer: vec![0; HEADROOM + FRAME_MAX].into_boxed_slice(), start: HEADROOM, end: HEADROOM, peer: None }
    }

    /// The frame.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// The frame, to be changed in place.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        self.buffer.get_mut(self.start..self.end).unwrap_or_default()
    }

    /// All the room behind the headroom, whatever it holds: a device reads into
    /// it and then calls [`Packet::set_len`].
    pub fn room_mut(&mut self) -> &mut [u8] {
        self.buffer.get_mut(self.start..).unwrap_or_default()
    }

    /// Bytes of the frame.
    #[must_use]
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether the frame has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Sets the length of the frame, counted from where it starts. Returns false
    /// and changes nothing when the buffer has not that many bytes.
    #[must_use]
    pub fn set_len(&mut self, len: usize) -> bool {
        match self.start.checked_add(len) {
            Some(end) if end <= self.buffer.len() => {
                self.end = end;
                true
            }
            _ => false,
        }
    }

    /// Grows the frame by `count` bytes in front, taken from the headroom, and
    /// returns them to be filled. `None`: the headroom has not that many.
    #[must_use]
    pub fn push_front(&mut self, count: usize) -> Option<&mut [u8]> {
        let start = self.start.checked_sub(count)?;
        let header = self.buffer.get_mut(start..self.start)?;
        self.start = start;
        Some(header)
    }

    /// Takes `count` bytes off the front of the frame; they become headroom.
    /// Returns false and changes nothing when the frame is shorter.
    #[must_use]
    pub fn pull_front(&mut self, count: usize) -> bool {
        if self.len() < count {
            return false;
        }
        self.start += count;
        true
    }

    /// Where the frame begins and ends in the buffer, for [`Packet::restore`].
    #[must_use]
    pub fn bounds(&self) -> (usize, usize) {
        (self.start, self.end)
    }

    /// Makes the frame begin and end where it did before headers were taken off,
    /// with whatever its bytes are now.
    pub fn restore(&mut self, (start, end): (usize, usize)) {
        if start <= end && end <= self.buffer.len() {
            (self.start, self.end) = (start, end);
        }
    }

    /// Makes `frame` the content, behind a full headroom. Returns false and
    /// leaves the packet empty when it is longer than [`FRAME_MAX`].
    #[must_use]
    pub fn copy_from(&mut self, frame: &[u8]) -> bool {
        self.reset();
        match self.room_mut().get_mut(..frame.len()) {
            Some(room) => {
                room.copy_from_slice(frame);
                self.set_len(frame.len())
            }
            None => false,
        }
    }

    /// Empties the frame and gives the headroom back.
    pub fn reset(&mut self) {
        self.start = HEADROOM;
        self.end = HEADROOM;
        self.peer = None;
    }

    /// The other card's underlay address, where the device carries it beside the
    /// frame (device `udp`: the frame then begins with the VXLAN header): the
    /// source of a received packet, the destination of one to be sent.
    #[must_use]
    pub fn peer(&self) -> Option<Ipv4Addr> {
        self.peer
    }

    /// Sets [`Packet::peer`].
    pub fn set_peer(&mut self, peer: Ipv4Addr) {
        self.peer = Some(peer);
    }
}

impl Default for Packet {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Packet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packet").field("len", &self.len()).field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// Free packets of one worker. In steady state `get` and `put` only move
/// buffers; the bound keeps a burst from holding memory for ever.
#[derive(Debug)]
pub struct Pool {
    free: Vec<Packet>,
    bound: usize,
}

impl Pool {
    /// A pool that keeps at most `bound` free packets.
    #[must_use]
    pub fn new(bound: usize) -> Self {
        Self { free: Vec::with_capacity(bound), bound }
    }

    /// An empty packet; a new buffer only when no free one is left.
    #[must_use]
    pub fn get(&mut self) -> Packet {
        self.free.pop().unwrap_or_default()
    }

    /// Takes a packet back. Beyond the bound its buffer is freed.
    pub fn put(&mut self, mut packet: Packet) {
        if self.free.len() < self.bound {
            packet.reset();
            self.free.push(packet);
        }
    }

    /// Takes all of `packets` back.
    pub fn put_all(&mut self, packets: &mut Vec<Packet>) {
        for packet in packets.drain(..) {
            self.put(packet);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_pushed_and_pulled_without_moving_the_payload() {
        let mut packet = Packet::new();
        assert!(packet.copy_from(b"payload"));
        let payload = packet.as_slice().as_ptr();
        packet.push_front(4).unwrap().copy_from_slice(b"head");
        assert_eq!(packet.as_slice(), b"headpayload");
        assert!(packet.pull_front(4));
        assert_eq!(packet.as_slice(), b"payload");
        assert_eq!(packet.as_slice().as_ptr(), payload);
    }

    #[test]
    fn no_length_leaves_the_buffer() {
        let mut packet = Packet::new();
        assert!(packet.push_front(HEADROOM + 1).is_none());
        assert!(!packet.set_len(FRAME_MAX + 1));
        assert!(!packet.set_len(usize::MAX));
        assert!(packet.set_len(FRAME_MAX));
        assert!(!packet.pull_front(FRAME_MAX + 1));
        assert!(!packet.copy_from(&[0; FRAME_MAX + 1]));
        assert!(packet.is_empty());
    }

    #[test]
    fn pool_reuses_buffers_and_keeps_its_bound() {
        let mut pool = Pool::new(1);
        let mut first = pool.get();
        assert!(first.copy_from(b"x"));
        first.set_peer(Ipv4Addr::LOCALHOST);
        let address = first.room_mut().as_ptr();
        pool.put(first);
        pool.put(Packet::new());
        let mut again = pool.get();
        assert_eq!(again.room_mut().as_ptr(), address);
        assert!(again.is_empty() && again.peer().is_none());
        assert!(pool.free.is_empty());
    }
}
