//! A packet on its way through the card: one owned buffer with headroom.
//!
//! ```text
//! 0            start                 end               HEADROOM + FRAME_MAX
//! |  headroom    |  frame (as_slice)  |  tailroom                         |
//! ```
//!
//! The headroom takes the outer headers of an encapsulated frame (14 Ethernet,
//! 20 IPv4, 8 UDP, 8 VXLAN), so that encapsulation never copies the payload.
//! Invariant: `start <= end <= SIZE`, kept by every method here.

use std::net::Ipv4Addr;

/// Bytes kept free in front of a received frame.
pub const HEADROOM: usize = 128;
/// Largest frame carried: 9,001 bytes of IP, Ethernet and outer headers.
pub const FRAME_MAX: usize = 9216;

/// Bytes of a buffer: whole cache lines.
const SIZE: usize = HEADROOM + FRAME_MAX;

/// The bytes of a packet. On cache lines, so that a short frame is one of them.
#[derive(Clone)]
#[repr(align(64))]
struct Buffer([u8; SIZE]);

/// An Ethernet frame in an owned buffer. The handle has 16 bytes: bursts move it often.
#[derive(Clone)]
pub struct Packet {
    buffer: Box<Buffer>,
    start: u16,
    end: u16,
    /// 0.0.0.0 is none.
    peer: u32,
}

const START: u16 = 128;
const _: () = assert!(START as usize == HEADROOM && SIZE <= u16::MAX as usize && size_of::<Packet>() == 16);

impl Packet {
    /// An empty packet with [`HEADROOM`] in front and room for [`FRAME_MAX`] bytes.
    #[must_use]
    pub fn new() -> Self {
        Self { buffer: Box::new(Buffer([0; SIZE])), start: START, end: START, peer: 0 }
    }

    /// The frame.
    #[must_use]
    #[inline]
    pub fn as_slice(&self) -> &[u8] {
        self.buffer.0.get(self.start.into()..self.end.into()).unwrap_or_default()
    }

    /// The frame, to be changed in place.
    #[inline]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        self.buffer.0.get_mut(self.start.into()..self.end.into()).unwrap_or_default()
    }

    /// All the room behind the headroom, whatever it holds: a device reads into
    /// it and then calls [`Packet::set_len`].
    #[inline]
    pub fn room_mut(&mut self) -> &mut [u8] {
        self.buffer.0.get_mut(self.start.into()..).unwrap_or_default()
    }

    /// The first `N` bytes from where the frame starts, of which those beyond
    /// [`Packet::len`] are left over from other frames.
    #[must_use]
    #[inline]
    pub(crate) fn window<const N: usize>(&self) -> Option<&[u8; N]> {
        self.buffer.0.get(self.start.into()..)?.first_chunk()
    }

    /// As [`Packet::window`], to be changed in place.
    #[inline]
    pub(crate) fn window_mut<const N: usize>(&mut self) -> Option<&mut [u8; N]> {
        self.buffer.0.get_mut(self.start.into()..)?.first_chunk_mut()
    }

    /// Bytes of the frame.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        (self.end - self.start).into()
    }

    /// Whether the frame has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Sets the length of the frame, counted from where it starts. Returns false
    /// and changes nothing when the buffer has not that many bytes.
    #[must_use]
    #[inline]
    pub fn set_len(&mut self, len: usize) -> bool {
        match u16::try_from(len).ok().and_then(|len| self.start.checked_add(len)) {
            Some(end) if usize::from(end) <= SIZE => {
                self.end = end;
                true
            }
            _ => false,
        }
    }

    /// Grows the frame by `count` bytes in front, taken from the headroom, and
    /// returns them to be filled. `None`: the headroom has not that many.
    #[must_use]
    #[inline]
    pub fn push_front(&mut self, count: usize) -> Option<&mut [u8]> {
        let start = self.start.checked_sub(u16::try_from(count).ok()?)?;
        let header = self.buffer.0.get_mut(start.into()..self.start.into())?;
        self.start = start;
        Some(header)
    }

    /// Bytes that [`Packet::push_front`] can take.
    #[must_use]
    #[inline]
    pub(crate) fn headroom(&self) -> usize {
        self.start.into()
    }

    /// Moves the start of the frame to `start` in the buffer and sets its length.
    /// Returns false and changes nothing when that leaves the buffer.
    #[must_use]
    #[inline]
    pub(crate) fn reframe(&mut self, start: usize, len: usize) -> bool {
        match (u16::try_from(start), u16::try_from(start.wrapping_add(len))) {
            (Ok(start), Ok(end)) if start <= end && usize::from(end) <= SIZE => {
                (self.start, self.end) = (start, end);
                true
            }
            _ => false,
        }
    }

    /// Takes `count` bytes off the front of the frame; they become headroom.
    /// Returns false and changes nothing when the frame is shorter.
    #[must_use]
    #[inline]
    pub fn pull_front(&mut self, count: usize) -> bool {
        match u16::try_from(count) {
            Ok(less) if count <= self.len() => {
                self.start += less;
                true
            }
            _ => false,
        }
    }

    /// Makes `frame` the content, behind a full headroom. Returns false and
    /// leaves the packet empty when it is longer than [`FRAME_MAX`].
    #[must_use]
    #[inline]
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
    #[inline]
    pub fn reset(&mut self) {
        self.start = START;
        self.end = START;
        self.peer = 0;
    }

    /// The other card's underlay address, where the device carries it beside the
    /// frame (device `udp`: the frame then begins with the VXLAN header): the
    /// source of a received packet, the destination of one to be sent.
    #[must_use]
    pub fn peer(&self) -> Option<Ipv4Addr> {
        (self.peer != 0).then(|| self.peer.into())
    }

    /// Sets [`Packet::peer`].
    pub fn set_peer(&mut self, peer: Ipv4Addr) {
        self.peer = peer.into();
    }
}

impl Default for Packet {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Packet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packet").field("len", &self.len()).field("peer", &self.peer()).finish_non_exhaustive()
    }
}

/// Free packets of one worker, the last one used first: its lines are still in the
/// cache. In steady state `get` and `put` only move buffers; the bound keeps a burst from holding memory for ever.
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
    #[inline]
    pub fn get(&mut self) -> Packet {
        self.free.pop().unwrap_or_default()
    }

    /// Takes a packet back. Beyond the bound its buffer is freed.
    #[inline]
    pub fn put(&mut self, mut packet: Packet) {
        if self.free.len() < self.bound {
            packet.reset();
            self.free.push(packet);
        }
    }

    /// Takes all of `packets` back.
    #[inline]
    pub fn put_all(&mut self, packets: &mut Vec<Packet>) {
        packets.truncate(self.bound - self.free.len());
        packets.iter_mut().for_each(Packet::reset);
        self.free.append(packets);
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
