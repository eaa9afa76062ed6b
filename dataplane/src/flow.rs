//! The flow table: connections tracked at a port, with what was decided for them.
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
//! Lookup: two candidate buckets of 32 tags of 16 bits, one cache line each, found
//! by a keyed hash; a tag that matches leads to an entry, and its key is compared.
//! A probe is never longer than two buckets, whatever an attacker sends, and the
//! table never grows beyond its bound or moves.
//!
//! ```text
//! New ---reply, then ACK of the opener (TCP) / reply (others)---> Established
//! New, Established ---RST, or FIN of both sides---> Closing
//! ```
//!
//! Only New and Closing entries are evicted to make room. An opening SYN on an
//! entry that exists is a new connection, and policy decides it anew.

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::Mac;
use crate::action::{Egress, Origin};
use crate::counters::DropReason;
use crate::headers::{self, Ipv4, Transport, tcp};

/// Connections that a card tracks at most.
pub const FLOWS_MAX: usize = 1 << 18;
/// Connections that one port may hold of them.
const PORT_FLOWS_MAX: u32 = 1 << 17;
/// Connections without an answer that one port may hold.
const PORT_EMBRYONIC_MAX: u32 = 1 << 15;
/// Entries looked at for one to evict.
const EVICT_PROBES: usize = 128;
/// The table is swept once in this many calls of [`FlowTable::sweep`].
const SWEEP_PARTS: usize = 8;
/// How often [`FlowTable::sweep`] wants to be called while flows exist.
pub const SWEEP_EVERY: Duration = Duration::from_millis(125);

const WAYS: usize = 32;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    high: u64,
    low: u64,
}

impl Key {
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

    /// The port.
    #[must_use]
    pub fn slot(self) -> Slot {
        // 24 bits are left after the shift.
        Slot(u32::try_from(self.high >> 40).unwrap_or(u32::MAX))
    }

    /// The protocol number.
    #[must_use]
    pub fn protocol(self) -> u8 {
        let [_, _, _, protocol, ..] = self.high.to_be_bytes();
        protocol
    }

    /// Address and port, or identifier, of the port's side.
    #[must_use]
    pub fn local(self) -> (Ipv4Addr, u16) {
        let [_, _, _, _, a, b, c, d] = self.high.to_be_bytes();
        let [_, _, _, _, p, q, _, _] = self.low.to_be_bytes();
        (Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([p, q]))
    }

    /// Address and port of the other side.
    #[must_use]
    pub fn remote(self) -> (Ipv4Addr, u16) {
        let [a, b, c, d, _, _, p, q] = self.low.to_be_bytes();
        (Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([p, q]))
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
#[derive(Debug, Clone)]
pub struct Flow {
    key: Key,
    live: bool,
    state: State,
    opener: Direction,
    answered: bool,
    fin_egress: bool,
    fin_ingress: bool,
    last_seen_ms: u32,
    /// What happens to packets from the guest, valid for this generation of its port.
    pub egress: (u32, Egress),
    /// Where packets to the guest come from, valid for this generation.
    pub ingress: (u32, Origin),
    /// Source MAC of packets to the guest.
    pub source_mac: Mac,
}

/// Generation of a decision that was not made yet; ports count from 1.
pub const UNDECIDED: u32 = 0;

impl Flow {
    /// A connection that a packet going in `direction` opens.
    #[must_use]
    pub fn new(key: Key, opener: Direction) -> Self {
        Self {
            key,
            live: true,
            state: State::New,
            opener,
            answered: false,
            fin_egress: false,
            fin_ingress: false,
            last_seen_ms: 0,
            egress: (UNDECIDED, Egress::Public { address: Ipv4Addr::UNSPECIFIED }),
            ingress: (UNDECIDED, Origin::Local),
            source_mac: Mac::BROADCAST,
        }
    }

    /// Whose it is.
    #[must_use]
    pub fn key(&self) -> Key {
        self.key
    }

    /// Which side opened it.
    #[must_use]
    pub fn opener(&self) -> Direction {
        self.opener
    }

    /// For how long no packet of it passed.
    #[must_use]
    pub fn idle(&self, now: Duration) -> Duration {
        Duration::from_millis(milliseconds(now).wrapping_sub(self.last_seen_ms).into())
    }

    /// For how long none may pass before it is forgotten.
    #[must_use]
    pub fn idle_limit(&self) -> Duration {
        Duration::from_millis(self.idle_limit_ms().into())
    }

    /// How far it has come.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether a packet opens a connection anew instead of going on with this one.
    #[must_use]
    pub fn reopens(&self, direction: Direction, transport: &Transport) -> bool {
        let opens = self.key.protocol() == headers::TCP && transport.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN;
        // A simultaneous open or a SYN sent twice is decided again too: only a
        // SYN that is decided anew sees a rule that was revoked meanwhile.
        opens && (self.state != State::New || self.opener == direction)
    }

    fn idle_limit_ms(&self) -> u32 {
        match (self.key.protocol(), self.state) {
            (headers::TCP, State::New) => 30_000,
            (headers::TCP, State::Established) => 350_000,
            (headers::TCP, State::Closing) => 10_000,
            (headers::UDP_PROTOCOL, State::New) => 30_000,
            (headers::UDP_PROTOCOL, _) => 180_000,
            (headers::ICMP, _) => 30_000,
            _ => 600_000,
        }
    }

    fn observe(&mut self, direction: Direction, transport: &Transport) {
        self.answered |= direction != self.opener;
        if self.key.protocol() != headers::TCP {
            if self.answered {
                self.state = State::Established;
            }
            return;
        }
        let flags = transport.tcp_flags;
        match direction {
            Direction::Egress => self.fin_egress |= flags & tcp::FIN != 0,
            Direction::Ingress => self.fin_ingress |= flags & tcp::FIN != 0,
        }
        if flags & tcp::RST != 0 || (self.fin_egress && self.fin_ingress) {
            self.state = State::Closing;
        } else if self.state == State::New && self.answered && direction == self.opener && flags & tcp::ACK != 0 {
            self.state = State::Established;
        }
    }
}

/// Where an entry is; valid until the entry is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowId(u32);

/// All connections of a card.
#[derive(Debug)]
pub struct FlowTable {
    secret: [u64; 4],
    tags: Vec<Tags>,
    ids: Vec<[u32; WAYS]>,
    flows: Vec<Flow>,
    free: Vec<u32>,
    usage: Vec<Usage>,
    bound: usize,
    draws: u64,
    cursor: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct Usage {
    flows: u32,
    embryonic: u32,
}

impl FlowTable {
    /// An empty table for at most `bound` connections, hashed under `seed`. Its
    /// memory is touched as it fills.
    #[must_use]
    pub fn new(bound: usize, seed: u64) -> Self {
        let bound = bound.clamp(1, 1 << 30);
        // At most half of the ways are used, so that two full buckets do not happen.
        let buckets = (bound * 2 / WAYS).next_power_of_two();
        let mut state = seed;
        let secret = std::array::from_fn(|_| split_mix(&mut state));
        Self {
            secret,
            tags: vec![Tags::default(); buckets],
            ids: vec![[0; WAYS]; buckets],
            flows: Vec::with_capacity(bound),
            free: Vec::new(),
            usage: Vec::new(),
            bound,
            draws: state,
            cursor: 0,
        }
    }

    /// The keyed hash of a key.
    #[must_use]
    #[inline]
    pub fn hash(&self, key: &Key) -> u64 {
        let [a, b, c, d] = self.secret;
        multiply_fold(multiply_fold(key.high ^ a, key.low ^ b) ^ c, key.low ^ d)
    }

    /// Looks a connection up.
    #[must_use]
    #[inline]
    pub fn find(&self, hash: u64, key: &Key) -> Option<FlowId> {
        let place = Place::new(hash, self.tags.len());
        self.find_in(place.primary, place.tag, key).or_else(|| self.find_in(place.secondary, place.tag, key))
    }

    #[inline]
    fn find_in(&self, bucket: usize, tag: u16, key: &Key) -> Option<FlowId> {
        let ids = self.ids.get(bucket)?;
        for way in self.tags.get(bucket)?.matching(tag) {
            let id = *ids.get(way)?;
            if self.flows.get(id as usize).is_some_and(|flow| flow.key == *key) {
                return Some(FlowId(id));
            }
        }
        None
    }

    /// The entry.
    #[must_use]
    pub fn get(&self, id: FlowId) -> Option<&Flow> {
        self.flows.get(id.0 as usize)
    }

    /// The entry, to change its decisions.
    pub fn get_mut(&mut self, id: FlowId) -> Option<&mut Flow> {
        self.flows.get_mut(id.0 as usize)
    }

    /// Notes that a packet of the connection passed.
    pub fn observe(&mut self, id: FlowId, now: Duration, direction: Direction, transport: &Transport) {
        if let Some(flow) = self.flows.get_mut(id.0 as usize) {
            flow.last_seen_ms = milliseconds(now);
            let before = flow.state;
            flow.observe(direction, transport);
            if before == State::New
                && flow.state != State::New
                && let Some(usage) = self.usage.get_mut(flow.key.slot().0 as usize)
            {
                usage.embryonic -= 1;
            }
        }
    }

    /// Stores a new connection, in place of one that has the same key.
    ///
    /// # Errors
    /// [`DropReason::ConntrackAllowance`] when neither the port's share nor the
    /// table has room and nothing may be evicted.
    pub fn insert(&mut self, now: Duration, mut flow: Flow) -> Result<FlowId, DropReason> {
        let hash = self.hash(&flow.key);
        if let Some(same) = self.find(hash, &flow.key) {
            self.remove(same);
        }
        let slot = flow.key.slot();
        let usage = self.usage(slot);
        if usage.flows >= PORT_FLOWS_MAX || usage.embryonic >= PORT_EMBRYONIC_MAX {
            self.evict(Some(slot))?;
        } else if self.len() >= self.bound {
            self.evict(None)?;
        }
        flow.last_seen_ms = milliseconds(now);
        let place = Place::new(hash, self.tags.len());
        let (bucket, way) = self.vacancy(place.primary).or_else(|| self.vacancy(place.secondary)).ok_or(DropReason::ConntrackAllowance)?;
        let id = if let Some(id) = self.free.pop() {
            if let Some(entry) = self.flows.get_mut(id as usize) {
                *entry = flow;
            }
            id
        } else {
            self.flows.push(flow);
            // The bound is below 2^30.
            u32::try_from(self.flows.len() - 1).unwrap_or(u32::MAX)
        };
        self.set(bucket, way, place.tag, id);
        if let Some(usage) = self.usage.get_mut(slot.0 as usize) {
            usage.flows += 1;
            usage.embryonic += 1;
        }
        Ok(FlowId(id))
    }

    /// Forgets a connection.
    pub fn remove(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get_mut(id.0 as usize).filter(|flow| flow.live) else { return };
        flow.live = false;
        let (key, embryonic) = (flow.key, flow.state == State::New);
        let place = Place::new(self.hash(&key), self.tags.len());
        for bucket in [place.primary, place.secondary] {
            let Some((tags, ids)) = self.tags.get(bucket).zip(self.ids.get(bucket)) else { return };
            if let Some(way) = tags.matching(place.tag).find(|way| ids.get(*way) == Some(&id.0)) {
                self.set(bucket, way, 0, 0);
                break;
            }
        }
        self.free.push(id.0);
        if let Some(usage) = self.usage.get_mut(key.slot().0 as usize) {
            usage.flows -= 1;
            usage.embryonic -= u32::from(embryonic);
        }
    }

    /// Forgets all connections of a port.
    pub fn remove_port(&mut self, slot: Slot) {
        self.remove_where(0..self.flows.len(), |flow| flow.key.slot() == slot);
    }

    /// Forgets the connections of one part of the table that were idle too long.
    /// Eight calls go over all of it.
    pub fn sweep(&mut self, now: Duration) {
        let part = self.flows.len().div_ceil(SWEEP_PARTS);
        let start = if self.cursor >= self.flows.len() { 0 } else { self.cursor };
        let end = (start + part).min(self.flows.len());
        let now_ms = milliseconds(now);
        self.remove_where(start..end, |flow| now_ms.wrapping_sub(flow.last_seen_ms) >= flow.idle_limit_ms());
        self.cursor = end;
        if self.is_empty() {
            self.flows.clear();
            self.free.clear();
        }
    }

    /// Connections tracked now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.flows.len() - self.free.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Looks at no more than `places` entries from `cursor` on, and shows those that
    /// live and, with `slot`, belong to that port, until `show` says that it has
    /// enough. Returns where to go on; `None` at the end of the table.
    pub fn visit(&self, cursor: usize, places: usize, slot: Option<Slot>, mut show: impl FnMut(&Flow) -> bool) -> Option<usize> {
        let end = cursor.saturating_add(places).min(self.flows.len());
        for (index, flow) in self.flows.iter().enumerate().take(end).skip(cursor) {
            if flow.live && slot.is_none_or(|slot| flow.key.slot() == slot) && !show(flow) {
                return Some(index + 1);
            }
        }
        (end < self.flows.len()).then_some(end)
    }

    fn remove_where(&mut self, range: std::ops::Range<usize>, condition: impl Fn(&Flow) -> bool) {
        for index in range {
            if self.flows.get(index).is_some_and(|flow| flow.live && condition(flow)) {
                self.remove(FlowId(u32::try_from(index).unwrap_or(u32::MAX)));
            }
        }
    }

    /// Makes room by forgetting a connection that is not established, of one port
    /// or of any. Drawn by lot, so that a flood cannot push out only the others'.
    fn evict(&mut self, slot: Option<Slot>) -> Result<(), DropReason> {
        for _ in 0..EVICT_PROBES {
            // Below the length, as the upper half of a product of two 32-bit numbers.
            let draw = ((split_mix(&mut self.draws) >> 32) * self.flows.len() as u64) >> 32;
            let index = u32::try_from(draw).unwrap_or(u32::MAX);
            let candidate = self
                .flows
                .get(index as usize)
                .is_some_and(|flow| flow.live && flow.state != State::Established && slot.is_none_or(|slot| flow.key.slot() == slot));
            if candidate {
                self.remove(FlowId(index));
                return Ok(());
            }
        }
        Err(DropReason::ConntrackAllowance)
    }

    fn usage(&mut self, slot: Slot) -> Usage {
        let index = slot.0 as usize;
        if self.usage.len() <= index {
            self.usage.resize(index + 1, Usage::default());
        }
        self.usage.get(index).copied().unwrap_or_default()
    }

    fn vacancy(&self, bucket: usize) -> Option<(usize, usize)> {
        let way = self.tags.get(bucket)?.matching(0).next()?;
        Some((bucket, way))
    }

    fn set(&mut self, bucket: usize, way: usize, tag: u16, id: u32) {
        if let Some(tags) = self.tags.get_mut(bucket) {
            tags.set(way, tag);
        }
        if let Some(cell) = self.ids.get_mut(bucket).and_then(|ids| ids.get_mut(way)) {
            *cell = id;
        }
    }
}

/// Where a hash belongs. A tag is never 0, which marks a vacant way.
struct Place {
    primary: usize,
    secondary: usize,
    tag: u16,
}

impl Place {
    fn new(hash: u64, buckets: usize) -> Self {
        let [t0, t1, ..] = hash.to_be_bytes();
        let (low, high) = (hash & 0xff_ffff, (hash >> 24) & 0xff_ffff);
        let index = |bits: u64| usize::try_from(bits).unwrap_or(0) & (buckets - 1);
        Self { primary: index(low), secondary: index(high), tag: u16::from_be_bytes([t0, t1]).max(1) }
    }
}

/// The tags of a bucket in one cache line, four lanes of 16 bits to a word.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
struct Tags([u64; WAYS / 4]);

impl Tags {
    fn set(&mut self, way: usize, tag: u16) {
        let shift = (way & 3) * 16;
        if let Some(word) = self.0.get_mut(way >> 2) {
            *word = *word & !(0xffff << shift) | u64::from(tag) << shift;
        }
    }

    /// The ways whose tag equals `tag`. Whole words are compared: a lane of
    /// `differs` is zero where the tag is equal, and the addition carries into the
    /// top bit of every lane where it is not.
    #[inline]
    fn matching(&self, tag: u16) -> Ways {
        const LOW: u64 = 0x7fff_7fff_7fff_7fff;
        let wanted = u64::from(tag) * 0x0001_0001_0001_0001;
        let bits = self.0.iter().enumerate().fold(0, |bits, (index, word)| {
            let differs = word ^ wanted;
            let equal = !((differs & LOW).wrapping_add(LOW) | differs | LOW);
            bits | equal >> 15 << index
        });
        Ways(bits)
    }
}

/// A set of ways: bit 16 * lane + word stands for way 4 * word + lane.
#[derive(Debug, Clone, Copy)]
struct Ways(u64);

impl Iterator for Ways {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros() as usize;
        self.0 &= self.0 - 1;
        Some((bit & 15) << 2 | bit >> 4)
    }
}

#[inline]
fn multiply_fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    let [high, low] = [product >> 64, product & u128::from(u64::MAX)].map(|half| u64::try_from(half).unwrap_or(0));
    high ^ low
}

/// SplitMix64: spreads a seed over the words of the secret.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Milliseconds that wrap around after 49 days; only differences are used, and
/// the sweep forgets an entry long before they are ambiguous.
fn milliseconds(now: Duration) -> u32 {
    u32::try_from(now.as_millis() & u128::from(u32::MAX)).unwrap_or(0)
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use super::*;

    fn key(slot: u32, n: u32) -> Key {
        let ip = Ipv4 {
            header_len: 20,
            total_len: 40,
            id: 0,
            dont_fragment: false,
            more_fragments: false,
            fragment_offset: 0,
            ttl: 64,
            protocol: headers::TCP,
            source: (0x0a00_0000 + (n >> 16)).into(),
            destination: [10, 1, 0, 1].into(),
        };
        let transport = Transport { source_port: n as u16, destination_port: 80, ..Transport::default() };
        Key::new(Slot(slot), Direction::Egress, &ip, &transport)
    }

    fn segment(flags: u8) -> Transport {
        Transport { tcp_flags: flags, ..Transport::default() }
    }

    fn open(table: &mut FlowTable, key: Key) -> Result<FlowId, DropReason> {
        table.insert(Duration::ZERO, Flow::new(key, Direction::Egress))
    }

    fn establish(table: &mut FlowTable, id: FlowId) {
        table.observe(id, Duration::ZERO, Direction::Egress, &segment(tcp::SYN));
        table.observe(id, Duration::ZERO, Direction::Ingress, &segment(tcp::SYN | tcp::ACK));
        assert_eq!(table.get(id).unwrap().state(), State::New, "an answer alone may go to a forged source");
        table.observe(id, Duration::ZERO, Direction::Egress, &segment(tcp::ACK));
        assert_eq!(table.get(id).unwrap().state(), State::Established);
    }

    fn find(table: &FlowTable, key: &Key) -> Option<FlowId> {
        table.find(table.hash(key), key)
    }

    #[test]
    fn both_directions_of_a_connection_have_one_key() {
        let forth = Ipv4 { source: [1, 1, 1, 1].into(), destination: [2, 2, 2, 2].into(), ..quoted() };
        let back = Ipv4 { source: forth.destination, destination: forth.source, ..forth };
        let there = Transport { source_port: 7, destination_port: 9, ..Transport::default() };
        let here = Transport { source_port: 9, destination_port: 7, ..Transport::default() };
        let key = Key::new(Slot(3), Direction::Egress, &forth, &there);
        assert_eq!(key, Key::new(Slot(3), Direction::Ingress, &back, &here));
        assert_ne!(key, Key::new(Slot(4), Direction::Ingress, &back, &here));
        assert_ne!(key, Key::new(Slot(3), Direction::Ingress, &forth, &there));
        assert_eq!((key.slot(), key.protocol()), (Slot(3), headers::TCP));
    }

    fn quoted() -> Ipv4 {
        let mut bytes = [0; 20];
        headers::write_ipv4(&mut bytes, ([0; 4].into(), [0; 4].into()), headers::TCP, (0, 0), 20);
        headers::ipv4_quoted(&bytes).unwrap()
    }

    #[test]
    fn exactly_the_ways_with_the_tag_match() {
        let mut state = 3;
        for _ in 0..10_000 {
            let mut tags = Tags::default();
            let mut plain = [0u16; WAYS];
            for (way, cell) in plain.iter_mut().enumerate() {
                *cell = [0, 1, 0x7fff, 0x8000, 0xffff, 0x8001][(split_mix(&mut state) % 6) as usize];
                tags.set(way, *cell);
            }
            for tag in [0, 1, 0x7fff, 0x8000, 0xffff, 0x8001, 77] {
                let found: std::collections::BTreeSet<_> = tags.matching(tag).collect();
                assert_eq!(found, (0..WAYS).filter(|way| plain[*way] == tag).collect());
            }
        }
    }

    #[test]
    fn the_table_agrees_with_a_plain_map_under_churn() {
        let mut table = FlowTable::new(1 << 12, 42);
        let mut model = std::collections::BTreeMap::new();
        let mut state = 1;
        for _ in 0..200_000 {
            let random = split_mix(&mut state);
            let key = key(random as u32 & 3, (random >> 8) as u32 & 0xfff);
            if random >> 63 == 0 && model.len() < 1 << 11 {
                let id = open(&mut table, key).unwrap();
                model.insert(key.high ^ key.low, (key, id));
            } else if let Some((_, id)) = model.remove(&(key.high ^ key.low)) {
                table.remove(id);
            }
            assert_eq!(find(&table, &key), model.get(&(key.high ^ key.low)).map(|(_, id)| *id));
        }
        assert_eq!(table.len(), model.len());
        assert!(model.values().all(|(key, id)| find(&table, key) == Some(*id)));
    }

    #[test]
    fn a_full_table_evicts_the_embryonic_and_never_the_established() {
        let mut table = FlowTable::new(1024, 42);
        for n in 0..512 {
            let id = open(&mut table, key(1, n)).unwrap();
            establish(&mut table, id);
        }
        for n in 512..100_000 {
            open(&mut table, key(2, n)).unwrap();
        }
        assert_eq!(table.len(), 1024);
        for n in 0..512 {
            assert!(find(&table, &key(1, n)).is_some());
        }
        for n in 0..512 {
            let found = find(&table, &key(1, n)).unwrap();
            assert_eq!(table.get(found).unwrap().state(), State::Established);
        }
        let ids: Vec<_> = (512..100_000).filter_map(|n| find(&table, &key(2, n))).collect();
        assert_eq!(ids.len(), 512);
        ids.into_iter().for_each(|id| establish(&mut table, id));
        assert_eq!(open(&mut table, key(3, 1)), Err(DropReason::ConntrackAllowance));
    }

    #[test]
    fn a_flood_at_one_port_leaves_room_for_the_others() {
        let mut table = FlowTable::new(FLOWS_MAX, 42);
        for n in 0..FLOWS_MAX as u32 {
            open(&mut table, key(1, n)).unwrap();
        }
        assert_eq!(table.len(), PORT_EMBRYONIC_MAX as usize);
        open(&mut table, key(2, 1)).unwrap();
        table.remove_port(Slot(1));
        assert_eq!(table.len(), 1);
        assert!(find(&table, &key(2, 1)).is_some());
    }

    #[test]
    fn sweeping_all_parts_forgets_what_is_idle() {
        let mut table = FlowTable::new(1024, 42);
        let old = open(&mut table, key(1, 1)).unwrap();
        establish(&mut table, old);
        for n in 2..100 {
            open(&mut table, key(1, n)).unwrap();
        }
        for _ in 0..=SWEEP_PARTS {
            table.sweep(Duration::from_secs(29));
        }
        assert_eq!(table.len(), 99);
        for _ in 0..=SWEEP_PARTS {
            table.sweep(Duration::from_secs(31));
        }
        assert_eq!(table.len(), 1);
        for _ in 0..=SWEEP_PARTS {
            table.sweep(Duration::from_secs(351));
        }
        assert!(table.is_empty());
        open(&mut table, key(1, 1)).unwrap();
    }

    #[test]
    fn nearly_all_flows_find_room_in_their_two_buckets() {
        let mut table = FlowTable::new(1 << 16, 99);
        for n in 0..1 << 16 {
            let id = open(&mut table, key(n & 7, n)).unwrap();
            establish(&mut table, id);
        }
        assert_eq!(table.len(), 1 << 16);
    }
}
