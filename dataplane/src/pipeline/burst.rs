//! The fast path: plain packets of known connections, a burst at a time.
//!
//! Plain is what almost every packet is: an untagged frame with IPv4 without options
//! and a right checksum, whole, TCP or UDP, no SYN, FIN or RST. A first pass over the
//! burst parses and hashes, a second compares tags, and each asks for the cache line
//! that the next one reads, so that the misses of many packets overlap. The last pass
//! goes packet by packet, in their order: if the entry is that of the packet, both
//! decided and settled, it is rewritten here; else the packet goes through
//! `Pipeline::run`, untouched, as if there were no fast path. `run` is the authority:
//! whatever this file does not recognise is not wrong, only slower.
//!
//! The order of the burst is kept, so an entry that `run` changes for one packet is
//! seen changed by the next. What the first two passes found may be stale by then;
//! the key in the entry tells.
//!
//! Which checks of `run` a packet may skip follows from the generation of a decision,
//! as [`flow`](crate::flow) says: all that look at addresses, ports and configuration.
//! Those that look at anything else are made here.

use std::net::Ipv4Addr;
use std::time::Duration;
use std::vec::Drain;

use super::{Device, Hot, Pipeline, PortState, Turn};
use crate::action::Output;
use crate::arp::Neighbours;
use crate::counters::{DropReason, Frames};
use crate::flow::{Direction, FlowId, Key, Slot, milliseconds};
use crate::headers::{self, ETHERNET, IPV4, UDP, read};
use crate::hop::{HEADER, Hop, OUTER};
use crate::packet::Packet;
use crate::policy::Local;
use crate::{Mac, Underlay, Vni, vxlan};

/// Packets looked at together: as many as have all their lines in a first-level cache
/// of 32 KiB. With 64, some are gone again when they are used.
const VECTOR: usize = 32;
/// Bytes of an IPv4 header and of TCP's up to the flags.
const INSIDE: usize = IPV4 + 14;
/// The same behind an Ethernet header, and that behind the outer headers.
const FRAME: usize = ETHERNET + INSIDE;
const WIRE: usize = OUTER + FRAME;

/// What the passes keep between bursts.
#[derive(Debug)]
pub(super) struct Fast {
    enabled: bool,
    ports: PortMemo,
    /// Whether the last burst from the wire held packets that were refused. Then most of
    /// the next ones will not be found either, and want no room.
    flooded: bool,
    /// Number of the burst; 0 is none.
    burst: u32,
    /// Cards that this burst sent to.
    used: Vec<Ipv4Addr>,
    /// Packets that did not need `run`.
    #[cfg(test)]
    pub(super) hits: u64,
}

/// What the first passes found out about a packet.
#[derive(Clone, Copy)]
struct Lane {
    key: Key,
    hash: u64,
    /// Where its flow is likely to be; none: not for the fast path.
    flow: FlowId,
    /// The receiving port, and the card that sent it.
    slot: Slot,
    vtep: u32,
    /// Bytes of IP.
    bytes: u16,
    ttl: u8,
    /// Only of a packet from the wire.
    protocol: u8,
}

/// A plain IPv4 packet.
struct Plain {
    protocol: u8,
    ttl: u8,
    bytes: u16,
    source: u32,
    destination: u32,
    /// Source and destination.
    ports: u32,
}

impl Fast {
    pub(super) fn new(enabled: bool) -> Self {
        Self {
            enabled,
            ports: PortMemo::default(),
            flooded: false,
            burst: 0,
            used: Vec::with_capacity(VECTOR),
            #[cfg(test)]
            hits: 0,
        }
    }

    #[cfg_attr(not(test), allow(clippy::unused_self, unused_variables))]
    fn count(&mut self, frames: Frames) {
        #[cfg(test)]
        {
            self.hits += frames.packets;
        }
    }

    /// Forgets which port has which address.
    pub(super) fn forget_ports(&mut self) {
        self.ports = PortMemo::default();
    }
}

impl Pipeline {
    /// What [`Pipeline::run`] does with each of the packets.
    pub(super) fn burst(&mut self, turn: &mut Turn<'_>, from: Device, at: Option<Slot>, packets: &mut Vec<Packet>) {
        let port = at.and_then(|slot| Some((slot, self.port(slot)?.hot)));
        let frames = self.settings.underlay.encapsulated && self.fast.enabled;
        match (from, port) {
            (Device::Port(_), Some((slot, hot))) if frames => self.guest_burst(turn, slot, &hot, packets),
            (Device::Underlay, _) if frames => self.wire_burst(turn, packets),
            _ => {
                for packet in packets.drain(..) {
                    self.run(turn, from, at, packet);
                }
            }
        }
    }

    fn guest_burst(&mut self, turn: &mut Turn<'_>, slot: Slot, hot: &Hot, packets: &mut Vec<Packet>) {
        let now_ms = milliseconds(turn.now);
        let mut received = Frames::default();
        let mut rest = packets.drain(..);
        self.fast.burst = self.fast.burst.wrapping_add(1).max(1);
        while !rest.as_slice().is_empty() {
            let mut lanes = [Lane::NONE; VECTOR];
            for (lane, packet) in lanes.iter_mut().zip(rest.as_slice()) {
                if let Some(plain) = plain_from_guest(packet, hot) {
                    lane.key = Key::plain(slot, plain.protocol, plain.source, plain.destination, plain.ports);
                    (lane.bytes, lane.ttl) = (plain.bytes, plain.ttl);
                    lane.hash = self.flows.hash(&lane.key);
                    self.flows.prefetch(lane.hash);
                }
            }
            let count = rest.as_slice().len().min(VECTOR);
            self.find_candidates(&mut lanes, count, true);
            let mut lanes = lanes.iter().take(count);
            // Hits in a row have all that they need at hand; a miss may change any of it.
            while let Some(missed) = self.encapsulate(hot.generation, now_ms, &mut received, &mut turn.out.underlay, &mut lanes, &mut rest)
            {
                self.run(turn, Device::Port(hot.id), Some(slot), missed);
            }
        }
        if let Some(state) = self.port(slot) {
            state.tally.received(received);
        }
        self.fast.count(received);
        self.neighbours_used(turn.now);
    }

    fn wire_burst(&mut self, turn: &mut Turn<'_>, packets: &mut Vec<Packet>) {
        let now_ms = milliseconds(turn.now);
        let expected = Expected::new(&self.settings.underlay);
        let mut received = Frames::default();
        let (flooded, mut refused) = (std::mem::take(&mut self.fast.flooded), (Slot(0), 0));
        let mut rest = packets.drain(..);
        while !rest.as_slice().is_empty() {
            let mut lanes = [Lane::NONE; VECTOR];
            for (lane, packet) in lanes.iter_mut().zip(rest.as_slice()) {
                if let Some((vtep, vni, mac, plain)) = plain_from_wire(packet, &expected)
                    && let Some(slot) = self.port_behind(vni, mac)
                {
                    (lane.slot, lane.vtep, lane.bytes, lane.protocol) = (slot, vtep, plain.bytes, plain.protocol);
                    lane.key = Key::plain(slot, plain.protocol, plain.destination, plain.source, plain.ports.rotate_left(16));
                    lane.hash = self.flows.hash(&lane.key);
                    self.flows.prefetch(lane.hash);
                    if flooded {
                        self.flows.prefetch_second(lane.hash);
                    }
                }
            }
            let count = rest.as_slice().len().min(VECTOR);
            self.find_candidates(&mut lanes, count, !flooded);
            let mut lanes = lanes.iter().take(count);
            // Until something is opened, what the tags said of a new connection holds.
            let mut opened = false;
            while let Some((lane, missed)) = self.decapsulate(now_ms, &mut received, turn.out, &mut lanes, &mut rest) {
                if self.is_refused(turn.now, lane, opened) {
                    if refused.0 != lane.slot {
                        self.count_drops(Some(refused.0), DropReason::ConntrackAllowance, refused.1);
                        refused = (lane.slot, 0);
                    }
                    refused.1 += 1;
                    self.fast.flooded = true;
                    received.add(missed.len());
                    turn.pool.put(missed);
                } else {
                    self.run(turn, Device::Underlay, None, missed);
                    opened = true;
                }
            }
        }
        self.count_drops(Some(refused.0), DropReason::ConntrackAllowance, refused.1);
        self.board.underlay.received(received);
        self.fast.count(received);
    }

    /// Second pass: compares tags and asks for entries; also for those that new
    /// connections would have, if these are welcome.
    #[inline]
    fn find_candidates(&self, lanes: &mut [Lane; VECTOR], count: usize, welcome: bool) {
        for lane in lanes.iter_mut().take(count).filter(|lane| lane.bytes != 0) {
            lane.flow = self.flows.candidate(lane.hash, welcome);
        }
    }

    /// Sends packets of a guest to other cards as their flows say, up to one that is
    /// not for the fast path: it is returned as it was.
    #[inline]
    fn encapsulate<'a>(
        &mut self,
        generation: u32,
        now_ms: u32,
        received: &mut Frames,
        out: &mut Vec<Packet>,
        lanes: &mut impl Iterator<Item = &'a Lane>,
        packets: &mut Drain<'_, Packet>,
    ) -> Option<Packet> {
        let Fast { burst, used, .. } = &mut self.fast;
        let epoch = self.underlay.epoch();
        let (flows, hops) = self.flows.parts();
        for lane in lanes {
            let mut packet = packets.next()?;
            let Some(flow) = flows.get_mut(lane.flow.index()) else { return Some(packet) };
            let Some(hop) = flow.hit_egress(&lane.key, generation).and_then(|hop| hops.get_mut(hop as usize)) else {
                return Some(packet);
            };
            if !hop.is_ready(epoch) && !refresh(hop, epoch, &self.underlay, &self.settings.underlay) {
                return Some(packet);
            }
            let len = packet.len();
            // RFC 791: a hop takes one, and who takes the last one has to say so.
            if hop.is_routed() && lane.ttl <= 1
                || !packet.reframe(packet.headroom().wrapping_sub(OUTER), OUTER + ETHERNET + usize::from(lane.bytes))
            {
                return Some(packet);
            }
            flow.count(now_ms, Direction::Egress, lane.bytes);
            if hop.touch(*burst) {
                used.push(hop.vtep());
            }
            if let Some((header, ip)) = packet.window_mut::<{ HEADER + IPV4 }>().and_then(|head| head.split_first_chunk_mut::<HEADER>()) {
                hop.write(header, lane.bytes, lane.key.entropy());
                if hop.is_routed() {
                    take_hop(ip);
                }
            }
            received.add(len);
            out.push(packet);
        }
        None
    }

    /// Whether `run` would find no flow for a plain packet of another card, and would not
    /// hear it because its port is flooded. A flood has to cost less than what it floods.
    #[inline]
    fn is_refused(&self, now: Duration, lane: &Lane, opened: bool) -> bool {
        lane.bytes != 0
            && lane.flow == FlowId::NONE
            && self.port(lane.slot).is_some_and(|state| {
                self.is_flooded(now, lane.slot, &state.hot, Direction::Ingress, lane.protocol)
                    && !(opened && self.flows.find(lane.hash, &lane.key).is_some())
            })
    }

    /// Makes packets of other cards those of guests as their flows say, likewise.
    #[inline]
    fn decapsulate<'a>(
        &mut self,
        now_ms: u32,
        received: &mut Frames,
        out: &mut Output,
        lanes: &mut impl Iterator<Item = &'a Lane>,
        packets: &mut Drain<'_, Packet>,
    ) -> Option<(&'a Lane, Packet)> {
        let mut sent = (Slot(0), Frames::default());
        let mut missed = None;
        let (flows, _) = self.flows.parts();
        for lane in lanes {
            let mut packet = packets.next()?;
            let len = packet.len();
            let hit = self.ports.get(lane.slot.0 as usize).and_then(Option::as_ref).and_then(|state| {
                let flow = flows.get_mut(lane.flow.index())?;
                Some((state, flow.hit_ingress(&lane.key, state.hot.generation, lane.vtep)?, flow))
            });
            let Some((state, source, flow)) = hit else {
                missed = Some((lane, packet));
                break;
            };
            if !packet.reframe(packet.headroom() + OUTER, ETHERNET + usize::from(lane.bytes)) {
                missed = Some((lane, packet));
                break;
            }
            flow.count(now_ms, Direction::Ingress, lane.bytes);
            if let Some(frame) = packet.window_mut::<ETHERNET>() {
                headers::set_macs(frame, state.hot.mac, source);
            }
            received.add(len);
            if sent.0 != lane.slot {
                count_sent(&self.ports, sent);
                sent = (lane.slot, Frames::default());
            }
            sent.1.add(packet.len());
            out.port(lane.slot, state.hot.id, packet);
        }
        count_sent(&self.ports, sent);
        missed
    }

    #[inline]
    fn port_behind(&mut self, vni: Vni, mac: Mac) -> Option<Slot> {
        let locals = &self.locals;
        self.fast.ports.get(vni, mac, || match locals.by_mac.get(&(vni, mac))? {
            Local::Port(slot) => Some(*slot),
            Local::Gateway(_) => None,
        })
    }

    fn neighbours_used(&mut self, now: Duration) {
        for vtep in self.fast.used.drain(..) {
            self.underlay.used(now, vtep);
        }
    }
}

impl Lane {
    const NONE: Self = Self { key: Key::NONE, hash: 0, flow: FlowId::NONE, slot: Slot(0), vtep: 0, bytes: 0, ttl: 0, protocol: 0 };
}

/// Builds the header of a hop anew, if the MAC of its card is known.
#[cold]
fn refresh(hop: &mut Hop, epoch: u32, neighbours: &Neighbours, underlay: &Underlay) -> bool {
    match hop.remote().and_then(|vtep| neighbours.mac(vtep)) {
        Some(mac) => {
            hop.build(epoch, underlay, mac);
            true
        }
        None => false,
    }
}

fn count_sent(ports: &[Option<PortState>], (slot, frames): (Slot, Frames)) {
    if let Some(state) = ports.get(slot.0 as usize).and_then(Option::as_ref) {
        state.tally.sent(frames);
    }
}

/// The bytes of a MAC in the first word of a frame.
const MAC_BYTES: u64 = u64::from_ne_bytes([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]);

/// What every frame from another card is sent to.
struct Expected {
    mac: u64,
    address: u32,
}

impl Expected {
    fn new(underlay: &Underlay) -> Self {
        let [a, b, c, d, e, f] = underlay.mac.0;
        Self { mac: u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]), address: underlay.address.into() }
    }
}

/// The packet in a frame of a guest, if it is plain and may be sent by its MAC and MTU.
#[inline]
fn plain_from_guest(packet: &Packet, hot: &Hot) -> Option<Plain> {
    let frame = packet.window::<FRAME>()?;
    let plain = plain(frame.last_chunk()?)?;
    let ours = u64::from_ne_bytes(read(frame, 6)?) == from_and_type(hot.mac.0);
    let fits = (ETHERNET + usize::from(plain.bytes) <= packet.len()) & (plain.bytes <= hot.mtu) & (packet.headroom() >= OUTER);
    (ours & fits & (frame[0] & 1 == 0)).then_some(plain)
}

/// The VTEP, the VNI, the receiver's MAC and the inner packet of a frame from the
/// underlay, if all of that is plain and for this card.
#[inline]
fn plain_from_wire(packet: &Packet, expected: &Expected) -> Option<(u32, Vni, Mac, Plain)> {
    let frame = packet.window::<WIRE>()?;
    let ip = Ip::read(frame.get(ETHERNET..)?.first_chunk()?)?;
    let udp_and_vxlan = read::<16>(frame, ETHERNET + IPV4)?;
    let [_, _, p0, p1, l0, l1, _, _, flags, _, _, _, v0, v1, v2, _] = udp_and_vxlan;
    let udp = usize::from(u16::from_be_bytes([l0, l1]));
    let outside = ip.is_whole()
        & (u64::from_ne_bytes(read(frame, 0)?) & MAC_BYTES == expected.mac)
        & (read::<2>(frame, 12)? == headers::TYPE_IPV4.to_be_bytes())
        & (ip.protocol() == headers::UDP_PROTOCOL)
        & (ip.destination == expected.address)
        & (ip.source() != expected.address)
        & (u16::from_be_bytes([p0, p1]) == vxlan::PORT)
        & vxlan::is_flagged(flags)
        & (ETHERNET + usize::from(ip.bytes()) <= packet.len())
        & (IPV4 + udp <= usize::from(ip.bytes()))
        & ip.is_right();
    let inner = frame.last_chunk::<FRAME>()?;
    let plain = plain(inner.last_chunk()?)?;
    let inside =
        (read::<2>(inner, 12)? == headers::TYPE_IPV4.to_be_bytes()) & (UDP + vxlan::VXLAN + ETHERNET + usize::from(plain.bytes) <= udp);
    let mac = Mac(read(inner, 0)?);
    (outside & inside).then(|| (ip.source(), Vni(u32::from_be_bytes([0, v0, v1, v2])), mac, plain))
}

/// The packet at the start of `bytes`, if it is plain. Whether all of it is there is
/// for the caller to see.
#[inline]
fn plain(bytes: &[u8; INSIDE]) -> Option<Plain> {
    let ip = Ip::read(bytes.first_chunk()?)?;
    let [.., l0, l1, _, _, _, _, _, _, offset, flags] = *bytes;
    let transport = match ip.protocol() {
        headers::UDP_PROTOCOL => {
            let length = u32::from(u16::from_be_bytes([l0, l1]));
            (8 <= length) & (20 + length <= u32::from(ip.bytes()))
        }
        headers::TCP => {
            let length = u32::from(offset >> 4) * 4;
            (20 <= length)
                & (20 + length <= u32::from(ip.bytes()))
                & (flags & (headers::tcp::SYN | headers::tcp::FIN | headers::tcp::RST) == 0)
        }
        _ => false,
    };
    let ports = u32::from_be_bytes(read(bytes, IPV4)?);
    let plain =
        Plain { protocol: ip.protocol(), ttl: ip.ttl(), bytes: ip.bytes(), source: ip.source(), destination: ip.destination, ports };
    (transport & ip.is_whole() & ip.is_right()).then_some(plain)
}

/// An IPv4 header without options, as two words in little-endian order and the rest:
/// fewer instructions than 20 bytes.
struct Ip {
    /// | 0x45 | service | length, 2 | identification, 2 | flags and offset, 2 |
    first: u64,
    /// | TTL | protocol | checksum, 2 | source, 4 |
    second: u64,
    destination: u32,
}

impl Ip {
    #[inline]
    fn read(bytes: &[u8; IPV4]) -> Option<Self> {
        let (first, second) = (u64::from_le_bytes(read(bytes, 0)?), u64::from_le_bytes(read(bytes, 8)?));
        Some(Self { first, second, destination: u32::from_be_bytes(read(bytes, 16)?) })
    }

    /// Version 4, no options, not a fragment.
    #[inline]
    fn is_whole(&self) -> bool {
        self.first & 0xff3f_0000_0000_00ff == 0x45
    }

    /// Bytes of header and payload.
    #[inline]
    fn bytes(&self) -> u16 {
        u16::try_from(self.first >> 16 & 0xffff).unwrap_or(0).swap_bytes()
    }

    #[inline]
    fn ttl(&self) -> u8 {
        u8::try_from(self.second & 0xff).unwrap_or(0)
    }

    #[inline]
    fn protocol(&self) -> u8 {
        u8::try_from(self.second >> 8 & 0xff).unwrap_or(0)
    }

    #[inline]
    fn source(&self) -> u32 {
        u32::try_from(self.second >> 32).unwrap_or(0).swap_bytes()
    }

    /// Whether the checksum is right, RFC 1071: the sum of the header's words, in any
    /// byte order and of any size of whole words, is a multiple of 0xffff. It is not
    /// 0, as the header is not.
    #[inline]
    fn is_right(&self) -> bool {
        const LOW: u64 = 0xffff_ffff;
        // That number times 0xffff is 1, modulo 2^64: only multiples of 0xffff become small by it.
        const INVERSE: u64 = 0xfffe_fffe_fffe_ffff;
        let (first, second) = (self.first, self.second);
        let last = u64::from(self.destination.swap_bytes());
        let sum = (first & LOW) + (first >> 32) + (second & LOW) + (second >> 32) + last;
        sum.wrapping_mul(INVERSE) <= u64::MAX / 0xffff
    }
}

/// Takes one from the TTL, as [`headers::decrement_ttl`] does.
#[inline]
fn take_hop(ip: &mut [u8]) {
    let Some([ttl, _, c0, c1]) = ip.get_mut(8..).and_then(|rest| rest.first_chunk_mut::<4>()) else { return };
    // RFC 1624, equation 3, for a word that becomes 0x100 less.
    let sum = u32::from(!u16::from_be_bytes([*c0, *c1])) + 0xfeff;
    let [_, _, n0, n1] = (!((sum & 0xffff) + (sum >> 16))).to_be_bytes();
    *ttl -= 1;
    (*c0, *c1) = (n0, n1);
}

/// A source MAC and the type of IPv4, as in a frame.
#[inline]
fn from_and_type([a, b, c, d, e, f]: [u8; 6]) -> u64 {
    let [t0, t1] = headers::TYPE_IPV4.to_be_bytes();
    u64::from_ne_bytes([a, b, c, d, e, f, t0, t1])
}

/// Which port has a MAC, for those seen lately. What stands behind the address alone,
/// or is no port, is for `run` to find.
#[derive(Debug)]
struct PortMemo([(u64, Vni, Slot); PortMemo::SIZE]);

impl Default for PortMemo {
    fn default() -> Self {
        // No VNI has more than 24 bits.
        Self([(0, Vni(u32::MAX), Slot(0)); Self::SIZE])
    }
}

impl PortMemo {
    const SIZE: usize = 256;

    #[inline]
    fn get(&mut self, vni: Vni, Mac([a, b, c, d, e, f]): Mac, look_up: impl FnOnce() -> Option<Slot>) -> Option<Slot> {
        let mac = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
        let [index, ..] = (mac ^ u64::from(vni.0) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
        let (known, of, slot) = self.0.get_mut(usize::from(index))?;
        if (*known, *of) != (mac, vni) {
            *slot = look_up()?;
            (*known, *of) = (mac, vni);
        }
        Some(*slot)
    }
}
