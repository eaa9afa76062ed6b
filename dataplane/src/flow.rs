//! Flows: connections tracked at a port, with what was decided for them.
//!
//! One entry serves both directions of a connection at one port. Its key is the
//! five-tuple as that port sees it (local and remote), packed into 16 bytes:
//!
//! ```text
//! high: | slot of the port (24) | protocol (8) | local address (32) |
//! low:  | remote address (32) | local port (16) | remote port (16)  |
//! ```
//!
//! ICMP echo has the identifier for a local port, and 1 for a remote port if the
//! local side asks: so the echo requests of one side never pass as the replies of
//! the other.
//!
//! ```text
//! New ---reply, then ACK of the opener (TCP) / reply, then more (UDP) / reply (others)---> Established
//! New, Established ---RST, or FIN of both sides---> Closing
//! ```
//!
//! Only New and Closing entries are evicted to make room, and such as are not
//! tracked: their rules let them on again. An opening SYN on an entry that exists
//! is a new connection, and policy decides it anew.
//!
//! A decision stands under the generation that its port had: one that equals the
//! port's now says also that every check which depends on nothing but addresses,
//! ports and configuration was passed by an earlier packet of this direction: the
//! anti-spoofing, the network ACL, and of an untracked flow the security group. Ports
//! count their generations from 1, so 0 is no decision. The entry is one cache line:
//!
//! ```text
//! 0    key | 16 egress generation | 20 ingress generation | 24 next hop | 28 origin's VTEP
//! 32   last seen | 36 flags | 38 source MAC | 44 packets, twice | 52 bytes low, twice | 60 bytes high, twice
//! ```
//!
//! [`FlowTable`] keeps them.

use std::net::Ipv4Addr;
use std::time::Duration;

use bytemuck::Zeroable;

use crate::action::Origin;
use crate::headers::{self, Ipv4, Transport, tcp};
use crate::{ConnectionTracking, Mac};

mod table;

pub use table::{FLOWS_MAX, FlowId, FlowTable};

/// Index of a port in the pipeline's table of ports, below 2^24.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

/// Which way a packet goes, seen from a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the guest.
    Egress,
    /// To the guest.
    Ingress,
}

/// A connection as one port sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Zeroable)]
#[repr(C)]
pub struct Key {
    high: u64,
    low: u64,
}

impl Key {
    /// The key of nothing.
    pub(crate) const NONE: Self = Self { high: 0, low: 0 };

    /// The key of a packet at the port in `slot`.
    #[must_use]
    pub fn new(slot: Slot, direction: Direction, ip: &Ipv4, transport: &Transport) -> Self {
        let (source_port, destination_port) = (transport.source_port, transport.destination_port);
        let ((local, remote), (mut local_port, mut remote_port)) = match direction {
            Direction::Egress => ((ip.source, ip.destination), (source_port, destination_port)),
            Direction::Ingress => ((ip.destination, ip.source), (destination_port, source_port)),
        };
        if ip.protocol == headers::ICMP {
            let asks = matches!(transport.icmp_type, ICMP_ECHO | ICMP_TIMESTAMP);
            (local_port, remote_port) = match transport.icmp_type {
                ICMP_ECHO | ICMP_TIMESTAMP | ICMP_ECHO_REPLY | ICMP_TIMESTAMP_REPLY => {
                    (source_port, u16::from(asks == (direction == Direction::Egress)))
                }
                // No conversation: the message type stands for the ports.
                other => (u16::from_be_bytes([other, transport.icmp_code]), 2),
            };
        }
        Self {
            high: u64::from(slot.0) << 40 | u64::from(ip.protocol) << 32 | u64::from(u32::from(local)),
            low: u64::from(u32::from(remote)) << 32 | u64::from(local_port) << 16 | u64::from(remote_port),
        }
    }

    /// The key of a packet of TCP or UDP; `ports` are the local and the remote one.
    #[inline]
    pub(crate) fn plain(slot: Slot, protocol: u8, local: u32, remote: u32, ports: u32) -> Self {
        Self {
            high: u64::from(slot.0) << 40 | u64::from(protocol) << 32 | u64::from(local),
            low: u64::from(remote) << 32 | u64::from(ports),
        }
    }

    /// A UDP source port for packets that carry the connection: 14 bits which both
    /// ends derive alike, whatever port of whatever card they are.
    #[must_use]
    #[inline]
    pub fn entropy(self) -> u16 {
        let (addresses, ports) = (u64::from(halves(self.high).1) + (self.low >> 32), halves(self.low).1);
        let (protocol, local_port) = (self.high >> 32 & 0xff, u64::from(ports >> 16));
        // Of ICMP, only the identifier is the same at both ends.
        let remote_port = if protocol == u64::from(headers::ICMP) { 0 } else { u64::from(ports & 0xffff) };
        let ends = addresses << 25 | (local_port + remote_port) << 8 | protocol;
        let mixed = (ends ^ ends >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        0xc000 | u16::try_from(mixed >> 50).unwrap_or(0)
    }

    fn slot(self) -> Slot {
        // 24 bits are left after the shift.
        Slot(u32::try_from(self.high >> 40).unwrap_or(u32::MAX))
    }

    fn protocol(self) -> u8 {
        let [_, _, _, protocol, ..] = self.high.to_be_bytes();
        protocol
    }
}

const ICMP_ECHO_REPLY: u8 = 0;
const ICMP_ECHO: u8 = 8;
const ICMP_TIMESTAMP: u8 = 13;
const ICMP_TIMESTAMP_REPLY: u8 = 14;

/// How far a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Opened; the other side has not answered yet, or not been acknowledged.
    New,
    /// Both sides speak.
    Established,
    /// Ended; late segments still pass.
    Closing,
}

/// A tracked connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable)]
#[repr(C, align(64))]
pub struct Flow {
    key: Key,
    egress_generation: u32,
    ingress_generation: u32,
    hop: u32,
    vtep: u32,
    seen_ms: u32,
    flags: u16,
    source_mac: [u8; 6],
    packets: [u32; 2],
    bytes_low: [u32; 2],
    bytes_high: [u16; 2],
}

const _: () = assert!(size_of::<Flow>() == 64);

// The bits of `Flow::flags`.
const ESTABLISHED: u16 = 1;
const CLOSING: u16 = 1 << 1;
const OPENED_BY_INGRESS: u16 = 1 << 2;
const ANSWERED: u16 = 1 << 3;
/// And the bit above for ingress; the same for the next one.
const FIN_EGRESS: u16 = 1 << 4;
/// A packet of the direction without SYN, FIN and RST leaves the state as it is.
const SETTLED_EGRESS: u16 = 1 << 6;
const FROM_VTEP: u16 = 1 << 8;
const FROM_PUBLIC: u16 = 1 << 9;
const FROM: u16 = FROM_VTEP | FROM_PUBLIC;
/// The security group is asked again under each generation.
const UNTRACKED: u16 = 1 << 10;

impl Flow {
    /// A connection that a packet going in `direction` opens.
    #[must_use]
    pub fn new(key: Key, opener: Direction) -> Self {
        let flags = if opener == Direction::Ingress { OPENED_BY_INGRESS } else { 0 };
        let mut flow = Self { key, flags, ..Self::zeroed() };
        flow.settle();
        flow
    }

    /// How far it has come.
    #[must_use]
    pub fn state(&self) -> State {
        match self.flags & (ESTABLISHED | CLOSING) {
            0 => State::New,
            ESTABLISHED => State::Established,
            _ => State::Closing,
        }
    }

    /// The port that it is at.
    #[must_use]
    pub fn slot(&self) -> Slot {
        self.key.slot()
    }

    /// Which way its first packet went.
    #[must_use]
    pub fn opener(&self) -> Direction {
        if self.flags & OPENED_BY_INGRESS == 0 { Direction::Egress } else { Direction::Ingress }
    }

    /// Whether its security group is asked again with every new configuration.
    #[must_use]
    pub fn is_untracked(&self) -> bool {
        self.flags & UNTRACKED != 0
    }

    /// Says so of a flow that is not in a table yet.
    pub fn set_untracked(&mut self, untracked: bool) {
        self.flags = if untracked { self.flags | UNTRACKED } else { self.flags & !UNTRACKED };
    }

    /// Whether a packet opens a connection anew instead of going on with this one.
    #[must_use]
    pub fn reopens(&self, direction: Direction, transport: &Transport) -> bool {
        let opens = self.key.protocol() == headers::TCP && transport.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN;
        // A simultaneous open or a SYN sent twice is decided again too: only a
        // SYN that is decided anew sees a rule that was revoked meanwhile.
        opens && (self.state() != State::New || self.opener() == direction)
    }

    /// Packets and bytes of IP that passed in a direction. Packets wrap around after
    /// 2^32 of them, so a reader takes differences, and at least once a minute.
    #[must_use]
    pub fn traffic(&self, direction: Direction) -> (u32, u64) {
        let [packets, low] = [self.packets, self.bytes_low].map(|both| pick(both, direction));
        (packets, u64::from(pick(self.bytes_high, direction)) << 32 | u64::from(low))
    }

    /// Where packets to the guest come from and the source MAC that they get, if
    /// that was decided under this generation.
    #[must_use]
    pub fn ingress(&self, generation: u32) -> Option<(Origin, Mac)> {
        let origin = match self.flags & FROM {
            0 => Origin::Local,
            FROM_VTEP => Origin::Vtep(self.vtep.into()),
            _ => Origin::Public,
        };
        (self.ingress_generation == generation).then_some((origin, Mac(self.source_mac)))
    }

    /// Decides that.
    pub fn decide_ingress(&mut self, generation: u32, origin: Origin, source_mac: Mac) {
        let (from, vtep) = match origin {
            Origin::Local => (0, Ipv4Addr::UNSPECIFIED),
            Origin::Vtep(vtep) => (FROM_VTEP, vtep),
            Origin::Public => (FROM_PUBLIC, Ipv4Addr::UNSPECIFIED),
        };
        self.ingress_generation = generation;
        self.flags = self.flags & !FROM | from;
        self.vtep = vtep.into();
        self.source_mac = source_mac.0;
    }

    /// The next hop of a packet from the guest without SYN, FIN and RST, if that
    /// was decided under this generation and the packet changes no state.
    #[inline]
    pub(crate) fn hit_egress(&self, key: &Key, generation: u32) -> Option<u32> {
        let hit = self.key == *key && self.egress_generation == generation && self.flags & SETTLED_EGRESS != 0;
        hit.then_some(self.hop)
    }

    /// The source MAC of such a packet to the guest from `vtep`, likewise.
    #[inline]
    pub(crate) fn hit_ingress(&self, key: &Key, generation: u32, vtep: u32) -> Option<Mac> {
        const WANTED: u16 = SETTLED_EGRESS << 1 | FROM_VTEP;
        let hit =
            self.key == *key && self.ingress_generation == generation && self.vtep == vtep && self.flags & (WANTED | FROM_PUBLIC) == WANTED;
        hit.then_some(Mac(self.source_mac))
    }

    /// Counts a packet of `bytes` of IP.
    #[inline]
    pub(crate) fn count(&mut self, now_ms: u32, direction: Direction, bytes: u16) {
        self.seen_ms = now_ms;
        let egress = direction == Direction::Egress;
        let [e, i] = &mut self.packets;
        let packets = if egress { e } else { i };
        *packets = packets.wrapping_add(1);
        let [e, i] = &mut self.bytes_low;
        let low = if egress { e } else { i };
        let carried;
        (*low, carried) = low.overflowing_add(bytes.into());
        let [e, i] = &mut self.bytes_high;
        let high = if egress { e } else { i };
        *high = high.wrapping_add(carried.into());
    }

    /// Which idle limit it lives under.
    fn class(&self) -> Class {
        match (self.key.protocol(), self.state()) {
            (headers::TCP, State::New) => Class::TcpNew,
            (headers::TCP, State::Established) => Class::TcpEstablished,
            (headers::TCP, State::Closing) => Class::TcpClosing,
            (headers::UDP_PROTOCOL, State::New) => Class::Udp,
            (headers::UDP_PROTOCOL, _) => Class::UdpStream,
            (headers::ICMP, _) => Class::Icmp,
            _ => Class::Other,
        }
    }

    /// Whether it was idle for too long.
    fn is_over(&self, now_ms: u32, tracking: &ConnectionTracking) -> bool {
        now_ms.wrapping_sub(self.seen_ms) >= self.class().idle_limit_ms(tracking)
    }

    /// Takes what a packet says about the state of the connection.
    fn observe(&mut self, direction: Direction, transport: &Transport) {
        let was_answered = self.flags & ANSWERED != 0;
        if direction != self.opener() {
            self.flags |= ANSWERED;
        }
        let answered = self.flags & ANSWERED != 0;
        if self.key.protocol() == headers::UDP_PROTOCOL {
            // One question with one answer is no conversation yet.
            if was_answered {
                self.flags |= ESTABLISHED;
            }
        } else if self.key.protocol() != headers::TCP {
            if answered {
                self.flags |= ESTABLISHED;
            }
        } else {
            let flags = transport.tcp_flags;
            if flags & tcp::FIN != 0 {
                self.flags |= FIN_EGRESS << usize::from(direction == Direction::Ingress);
            }
            if flags & tcp::RST != 0 || self.flags & (FIN_EGRESS * 3) == FIN_EGRESS * 3 {
                self.flags = self.flags & !ESTABLISHED | CLOSING;
            } else if self.state() == State::New && answered && direction == self.opener() && flags & tcp::ACK != 0 {
                self.flags |= ESTABLISHED;
            }
        }
        self.settle();
    }

    /// Works out which directions are settled. A new connection changes with an
    /// answer, and with what follows it: from the opener (TCP) or from either (UDP).
    fn settle(&mut self) {
        self.flags |= SETTLED_EGRESS * 3;
        if self.state() == State::New {
            let settled = match (self.flags & ANSWERED != 0, self.opener()) {
                (true, _) => 0,
                (false, Direction::Egress) => SETTLED_EGRESS,
                (false, Direction::Ingress) => SETTLED_EGRESS << 1,
            };
            self.flags = self.flags & !(SETTLED_EGRESS * 3) | settled;
        }
    }
}

/// Kinds of connections that have idle limits of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    TcpNew,
    TcpEstablished,
    TcpClosing,
    Udp,
    UdpStream,
    Icmp,
    Other,
}

impl Class {
    fn idle_limit_ms(self, tracking: &ConnectionTracking) -> u32 {
        match self {
            Class::TcpNew | Class::Icmp => 30_000,
            Class::TcpEstablished => tracking.tcp_established_s.saturating_mul(1000),
            Class::TcpClosing => 10_000,
            Class::Udp => tracking.udp_s.saturating_mul(1000),
            Class::UdpStream => tracking.udp_stream_s.saturating_mul(1000),
            Class::Other => 600_000,
        }
    }
}

fn pick<T>([egress, ingress]: [T; 2], direction: Direction) -> T {
    match direction {
        Direction::Egress => egress,
        Direction::Ingress => ingress,
    }
}

/// The upper and the lower half.
#[inline]
fn halves(word: u64) -> (u32, u32) {
    [word >> 32, word & 0xffff_ffff].map(|half| u32::try_from(half).unwrap_or(0)).into()
}

#[inline]
fn multiply_fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    let [high, low] = [product >> 64, product & u128::from(u64::MAX)].map(|half| u64::try_from(half).unwrap_or(0));
    high ^ low
}

/// Milliseconds that wrap around after 49 days; only differences are used, and
/// the sweep forgets an entry long before they are ambiguous.
#[inline]
pub(crate) fn milliseconds(now: Duration) -> u32 {
    u32::try_from(now.as_millis() & u128::from(u32::MAX)).unwrap_or(0)
}

#[cfg(test)]
mod tests;
