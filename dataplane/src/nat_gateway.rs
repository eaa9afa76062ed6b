//! The connections of a NAT gateway and the ports it gives them: many addresses
//! inside share a few public ones. RFC 4787, RFC 5382 and RFC 5508 by the
//! numbers of EC2. It knows nothing of packets, devices or routes; time is an
//! argument.
//!
//! ```text
//! inside:   | protocol | private address | port | remote address | port |
//! outside:  | protocol | public address  | port | remote address | port |
//! ```
//!
//! A connection has one entry under both names; of a ping the identifier is the
//! port, and the remote port is 0. The public port is drawn from 1024..=65535 and
//! is its own only towards that remote end, of which at most 55,000 connections
//! share one public address. One private address keeps one public address while
//! that has ports (RFC 4787 section 4.1, "paired").
//!
//! ```text
//!   opened inside ---> Open ---- RST, or FIN of both sides ----> Closing
//!                        | 350 s idle                              | 60 s idle
//!                        v                                         v
//!                    forgotten: TCP from inside that is no SYN is refused
//! ```
//!
//! Nothing outside opens a connection or keeps an unanswered one alive for longer
//! than its time: what matches no entry is not for anybody here.

use std::hash::BuildHasher;
use std::net::Ipv4Addr;
use std::time::Duration;

use foldhash::fast::FixedState;

use crate::headers::{self, tcp};

/// How long a connection without a packet is remembered.
pub const IDLE: Duration = Duration::from_secs(350);
/// The same for one that has ended: as long as the last segments of TCP live.
const CLOSING: Duration = Duration::from_secs(60);
/// Connections of one public address to one remote end.
pub const PER_DESTINATION: u32 = 55_000;
const PORT_FIRST: u16 = 1024;
/// Ports from there on.
const PORTS: u32 = 65_536 - PORT_FIRST as u32;
/// Connections of one gateway.
const CONNECTIONS_MAX: usize = 1 << 19;
/// Ports drawn by lot before the search goes on one by one.
const DRAWS: u32 = 64;
/// Calls of [`NatTable::sweep`] that go over all connections.
const SWEEP_PARTS: usize = 8;
/// How often [`NatTable::sweep`] wants to be called while there are connections.
pub const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// A connection as one side of the gateway names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// TCP, UDP or ICMP.
    pub protocol: u8,
    /// The end inside: its private address and port, or the public ones that stand for them.
    pub local: (Ipv4Addr, u16),
    /// The end outside.
    pub remote: (Ipv4Addr, u16),
}

/// Why a packet from inside has no translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// TCP that is part of no connection, and opens none.
    Forgotten,
    /// Every port towards that remote end is taken.
    Ports,
    /// The gateway holds as many connections as it can.
    Full,
}

/// What a gateway counts, by the names of its metrics in EC2.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NatGatewayCounters {
    /// `ActiveConnectionCount`: connections now.
    pub active: u64,
    /// `ConnectionAttemptCount`: connections that somebody inside opened.
    pub attempts: u64,
    /// `ConnectionEstablishedCount`: those of them that were answered.
    pub established: u64,
    /// `ErrorPortAllocation`: those that found no port.
    pub port_errors: u64,
    /// `IdleTimeoutCount`: those that were forgotten while open.
    pub idle_timeouts: u64,
    /// `PacketsDropCount`: packets that the gateway dropped.
    pub drops: u64,
}

#[derive(Debug, Clone, Copy)]
struct Connection {
    inside: Tuple,
    /// Its local end is the public address and port.
    outside: Tuple,
    last_seen: Duration,
    answered: bool,
    fin_inside: bool,
    fin_outside: bool,
    closing: bool,
    live: bool,
}

impl Connection {
    fn is_idle(&self, now: Duration) -> bool {
        now.saturating_sub(self.last_seen) >= if self.closing { CLOSING } else { IDLE }
    }

    fn seen(&mut self, now: Duration, flags: u8, from_inside: bool) {
        self.last_seen = now;
        if self.inside.protocol != headers::TCP {
            return;
        }
        self.fin_inside |= from_inside && flags & tcp::FIN != 0;
        self.fin_outside |= !from_inside && flags & tcp::FIN != 0;
        self.closing |= flags & tcp::RST != 0 || (self.fin_inside && self.fin_outside);
    }
}

type Map<K, V> = hashbrown::HashMap<K, V, FixedState>;

/// All connections of a gateway.
#[derive(Debug)]
pub struct NatTable {
    public: Vec<Ipv4Addr>,
    connections: Vec<Connection>,
    free: Vec<u32>,
    by_inside: Map<Tuple, u32>,
    by_outside: Map<Tuple, u32>,
    /// Connections by what their ports have to be distinct in: an outside name with port 0.
    used: Map<Tuple, u32>,
    hasher: FixedState,
    random: u64,
    cursor: usize,
    counters: NatGatewayCounters,
}

impl NatTable {
    /// A gateway with these addresses and no connection. `seed` makes its hashes
    /// and its choice of ports; nobody outside may know it.
    #[must_use]
    pub fn new(public: &[Ipv4Addr], seed: u64) -> Self {
        let hasher = FixedState::with_seed(seed);
        Self {
            public: public.to_vec(),
            connections: Vec::new(),
            free: Vec::new(),
            by_inside: Map::with_hasher(hasher.clone()),
            by_outside: Map::with_hasher(hasher.clone()),
            used: Map::with_hasher(hasher.clone()),
            hasher,
            random: seed,
            cursor: 0,
            counters: NatGatewayCounters::default(),
        }
    }

    /// Changes the addresses; connections of those that are gone are forgotten.
    pub fn set_public(&mut self, public: &[Ipv4Addr]) {
        self.public = public.to_vec();
        self.remove_where(0..self.connections.len(), |connection| !public.contains(&connection.outside.local.0));
    }

    /// Forgets all connections.
    pub fn clear(&mut self) {
        self.remove_where(0..self.connections.len(), |_| true);
    }

    /// The public end for a packet from inside, which opens a connection if there
    /// is none. `flags` are those of TCP.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn outward(&mut self, now: Duration, inside: Tuple, flags: u8) -> Result<(Ipv4Addr, u16), Refusal> {
        let opens = inside.protocol != headers::TCP || flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN;
        if let Some(index) = self.by_inside.get(&inside).copied()
            && let Some(connection) = self.connections.get_mut(index as usize)
        {
            // A SYN on a connection that has ended is a new one, which takes its port along.
            let anew = opens && connection.closing;
            if !connection.is_idle(now) && !anew {
                connection.seen(now, flags, true);
                return Ok(connection.outside.local);
            }
            self.expire(index);
        }
        if !opens {
            return Err(Refusal::Forgotten);
        }
        self.counters.attempts += 1;
        if self.counters.active >= CONNECTIONS_MAX as u64 {
            return Err(Refusal::Full);
        }
        let Some(outside) = self.allocate(now, inside) else {
            self.counters.port_errors += 1;
            return Err(Refusal::Ports);
        };
        self.insert(now, inside, outside);
        Ok(outside.local)
    }

    /// The private end for a packet from outside, if it belongs to a connection.
    pub fn inward(&mut self, now: Duration, outside: Tuple, flags: u8) -> Option<(Ipv4Addr, u16)> {
        let index = *self.by_outside.get(&outside)?;
        let connection = self.connections.get_mut(index as usize).filter(|connection| !connection.is_idle(now))?;
        connection.seen(now, flags, false);
        if !std::mem::replace(&mut connection.answered, true) {
            self.counters.established += 1;
        }
        Some(connection.inside.local)
    }

    /// The public end of a connection that an ICMP error from inside is about.
    #[must_use]
    pub fn outward_related(&self, now: Duration, inside: Tuple) -> Option<(Ipv4Addr, u16)> {
        Some(self.current(now, *self.by_inside.get(&inside)?)?.outside.local)
    }

    /// The private end of a connection that an ICMP error from outside is about.
    #[must_use]
    pub fn inward_related(&self, now: Duration, outside: Tuple) -> Option<(Ipv4Addr, u16)> {
        Some(self.current(now, *self.by_outside.get(&outside)?)?.inside.local)
    }

    /// Forgets the connections of one part of the table that were idle too long.
    pub fn sweep(&mut self, now: Duration) {
        let part = self.connections.len().div_ceil(SWEEP_PARTS);
        let start = if self.cursor >= self.connections.len() { 0 } else { self.cursor };
        let end = (start + part).min(self.connections.len());
        for index in start..end {
            if self.connections.get(index).is_some_and(|connection| connection.live && connection.is_idle(now)) {
                self.expire(u32::try_from(index).unwrap_or(u32::MAX));
            }
        }
        self.cursor = end;
    }

    /// Whether there is no connection.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.counters.active == 0
    }

    /// What it counts.
    #[must_use]
    pub fn counters(&self) -> NatGatewayCounters {
        self.counters
    }

    /// Counts a packet that the gateway dropped.
    pub fn dropped(&mut self) {
        self.counters.drops += 1;
    }

    fn current(&self, now: Duration, index: u32) -> Option<&Connection> {
        self.connections.get(index as usize).filter(|connection| !connection.is_idle(now))
    }

    /// A name outside that no connection has.
    fn allocate(&mut self, now: Duration, inside: Tuple) -> Option<Tuple> {
        let first = self.hasher.hash_one(inside.local.0);
        for offset in 0..self.public.len() as u64 {
            let index = usize::try_from((first % 8 + offset) % self.public.len() as u64).unwrap_or(0);
            let Some(address) = self.public.get(index).copied() else { continue };
            let end = Tuple { local: (address, 0), ..inside };
            if self.used.get(&end).is_none_or(|used| *used < PER_DESTINATION) {
                return self.port(now, end);
            }
        }
        None
    }

    fn port(&mut self, now: Duration, end: Tuple) -> Option<Tuple> {
        let mut offset = 0;
        // At most 55,000 of 64,512 are taken, so the lot finds one soon, and one by one for certain.
        for attempt in 0..DRAWS + PORTS {
            offset = if attempt <= DRAWS { self.draw() } else { (offset + 1) % PORTS };
            let port = PORT_FIRST + u16::try_from(offset).unwrap_or(0);
            let name = Tuple { local: (end.local.0, port), ..end };
            match self.by_outside.get(&name).copied() {
                None => return Some(name),
                Some(index) if self.current(now, index).is_none() => {
                    self.expire(index);
                    return Some(name);
                }
                Some(_) => {}
            }
        }
        None
    }

    /// SplitMix64; the upper half of a product with a 32-bit number is below [`PORTS`].
    fn draw(&mut self) -> u32 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        u32::try_from(((mixed >> 32) * u64::from(PORTS)) >> 32).unwrap_or(0)
    }

    fn insert(&mut self, now: Duration, inside: Tuple, outside: Tuple) {
        let connection = Connection {
            inside,
            outside,
            last_seen: now,
            answered: false,
            fin_inside: false,
            fin_outside: false,
            closing: false,
            live: true,
        };
        let index = match self.free.pop() {
            Some(index) => {
                if let Some(vacant) = self.connections.get_mut(index as usize) {
                    *vacant = connection;
                }
                index
            }
            None => {
                self.connections.push(connection);
                u32::try_from(self.connections.len() - 1).unwrap_or(u32::MAX)
            }
        };
        self.by_inside.insert(inside, index);
        self.by_outside.insert(outside, index);
        *self.used.entry(Tuple { local: (outside.local.0, 0), ..outside }).or_default() += 1;
        self.counters.active += 1;
    }

    /// Forgets a connection whose time is over.
    fn expire(&mut self, index: u32) {
        let open = self.connections.get(index as usize).is_some_and(|connection| !connection.closing);
        self.counters.idle_timeouts += u64::from(open);
        self.remove(index);
    }

    fn remove(&mut self, index: u32) {
        let Some(connection) = self.connections.get_mut(index as usize).filter(|connection| connection.live) else { return };
        connection.live = false;
        let (inside, outside) = (connection.inside, connection.outside);
        self.by_inside.remove(&inside);
        self.by_outside.remove(&outside);
        let end = Tuple { local: (outside.local.0, 0), ..outside };
        if let Some(used) = self.used.get_mut(&end) {
            *used -= 1;
            if *used == 0 {
                self.used.remove(&end);
            }
        }
        self.free.push(index);
        self.counters.active -= 1;
    }

    fn remove_where(&mut self, range: std::ops::Range<usize>, condition: impl Fn(&Connection) -> bool) {
        for index in range {
            if self.connections.get(index).is_some_and(|connection| connection.live && condition(connection)) {
                self.remove(u32::try_from(index).unwrap_or(u32::MAX));
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const PUBLIC: [Ipv4Addr; 2] = [Ipv4Addr::new(198, 51, 100, 30), Ipv4Addr::new(198, 51, 100, 31)];
    const SERVER: (Ipv4Addr, u16) = (Ipv4Addr::new(203, 0, 113, 9), 443);
    const S: Duration = Duration::from_secs(1);

    fn inside(protocol: u8, n: u32) -> Tuple {
        Tuple { protocol, local: (Ipv4Addr::from(0x0a00_0000 | n >> 12), 1000 + (n & 0xfff) as u16), remote: SERVER }
    }

    fn outside(protocol: u8, local: (Ipv4Addr, u16)) -> Tuple {
        Tuple { protocol, local, remote: SERVER }
    }

    #[test]
    fn every_connection_to_one_destination_has_a_name_of_its_own_and_finds_back() {
        let mut table = NatTable::new(&PUBLIC[..1], 1);
        let mut names = BTreeSet::new();
        for n in 0..PER_DESTINATION {
            let name = table.outward(Duration::ZERO, inside(headers::UDP_PROTOCOL, n), 0).unwrap();
            assert!(name.0 == PUBLIC[0] && name.1 >= PORT_FIRST && names.insert(name));
            assert_eq!(table.inward(Duration::ZERO, outside(headers::UDP_PROTOCOL, name), 0), Some(inside(headers::UDP_PROTOCOL, n).local));
        }
        let one_more = inside(headers::UDP_PROTOCOL, PER_DESTINATION);
        assert_eq!(table.outward(Duration::ZERO, one_more, 0), Err(Refusal::Ports));
        let counters = table.counters();
        assert_eq!((counters.attempts, counters.established, counters.port_errors), (55_001, 55_000, 1));
        // Another destination, another protocol and another address have ports of their own.
        let elsewhere = Tuple { remote: (SERVER.0, 80), ..one_more };
        assert!(table.outward(Duration::ZERO, elsewhere, 0).is_ok());
        assert!(table.outward(Duration::ZERO, Tuple { protocol: headers::ICMP, ..one_more }, 0).is_ok());
        table.set_public(&PUBLIC);
        assert_eq!(table.outward(Duration::ZERO, one_more, 0).map(|name| name.0), Ok(PUBLIC[1]));
        assert_eq!(
            table.outward(Duration::ZERO, inside(headers::UDP_PROTOCOL, 7), 0).map(|name| name.0),
            Ok(PUBLIC[0]),
            "it keeps its own"
        );
    }

    #[test]
    fn an_idle_connection_is_forgotten_after_350_s_and_its_tcp_refused() {
        let mut table = NatTable::new(&PUBLIC, 1);
        let (tcp_flow, udp_flow) = (inside(headers::TCP, 1), inside(headers::UDP_PROTOCOL, 1));
        assert_eq!(table.outward(Duration::ZERO, tcp_flow, tcp::ACK), Err(Refusal::Forgotten), "no SYN opened it");
        let name = table.outward(Duration::ZERO, tcp_flow, tcp::SYN).unwrap();
        assert!(table.inward(S, outside(headers::TCP, name), tcp::SYN | tcp::ACK).is_some());
        assert_eq!(table.outward(350 * S, tcp_flow, tcp::ACK), Ok(name));
        let before = 699 * S + Duration::from_millis(999);
        assert!(table.inward_related(before, outside(headers::TCP, name)).is_some());
        assert_eq!(table.inward(700 * S, outside(headers::TCP, name), tcp::ACK), None);
        assert_eq!(table.outward(700 * S, tcp_flow, tcp::ACK), Err(Refusal::Forgotten));
        assert!(table.outward(700 * S, udp_flow, 0).is_ok(), "a datagram opens again");
        assert_eq!((table.counters().idle_timeouts, table.counters().active), (1, 1));
        (0..=SWEEP_PARTS).for_each(|_| table.sweep(1050 * S));
        assert_eq!((table.counters().idle_timeouts, table.is_empty()), (2, true));
        assert!(table.used.is_empty() && table.by_inside.is_empty() && table.by_outside.is_empty());
    }

    #[test]
    fn an_ended_connection_gives_its_port_back_after_a_minute_and_counts_no_timeout() {
        let mut table = NatTable::new(&PUBLIC, 1);
        let flow = inside(headers::TCP, 1);
        let name = table.outward(Duration::ZERO, flow, tcp::SYN).unwrap();
        table.inward(S, outside(headers::TCP, name), tcp::FIN | tcp::ACK);
        table.outward(2 * S, flow, tcp::FIN | tcp::ACK).unwrap();
        assert!(table.inward(3 * S, outside(headers::TCP, name), tcp::ACK).is_some(), "the last acknowledgement passes");
        (0..=SWEEP_PARTS).for_each(|_| table.sweep(62 * S));
        assert!(!table.is_empty());
        (0..=SWEEP_PARTS).for_each(|_| table.sweep(63 * S));
        assert_eq!((table.counters().idle_timeouts, table.is_empty()), (0, true));
        // A reset ends it at once, and a new SYN is a new connection.
        table.outward(64 * S, flow, tcp::SYN).unwrap();
        table.outward(65 * S, flow, tcp::RST).unwrap();
        table.outward(66 * S, flow, tcp::SYN).unwrap();
        assert_eq!((table.counters().attempts, table.counters().active), (3, 1));
    }

    #[test]
    fn an_address_that_is_taken_away_takes_its_connections_along() {
        let mut table = NatTable::new(&PUBLIC, 1);
        for n in 0..64 {
            table.outward(Duration::ZERO, inside(headers::UDP_PROTOCOL, n << 12), 0).unwrap();
        }
        let kept = table.connections.iter().filter(|connection| connection.outside.local.0 == PUBLIC[0]).count();
        assert!((1..64).contains(&kept), "both are used");
        table.set_public(&PUBLIC[..1]);
        assert_eq!(table.counters().active, kept as u64);
    }
}
