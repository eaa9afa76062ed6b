//! The flow table: two candidate groups of 32 entries for each key.
//!
//! Each group has 32 tags of 16 bits in one cache line; a tag that matches leads to
//! the entry at the same place of the group, and its key is compared. So a probe is
//! never longer than two groups, whatever an attacker sends, an entry costs 64 bytes
//! and a tag of two, and the table never grows beyond its bound or moves as a whole.
//!
//! A key's hash is keyed too. A new entry takes a vacant way of its primary group,
//! else of its secondary; else an entry of these two moves to a vacant way of its
//! own other group. At the load of 0.94, which the bound stands for, one of those
//! exists but for once in more than 10^9 keys.

use std::time::Duration;

use bytemuck::Zeroable;

use super::{ESTABLISHED, Flow, Key, Slot, State, UNTRACKED, milliseconds, multiply_fold};
use crate::ConnectionTracking;
use crate::action::Egress;
use crate::counters::DropReason;
use crate::flow::Direction;
use crate::headers::Transport;
use crate::hop::{Hop, Hops, NextHop};
use crate::memory::Table;
use crate::vector::{Tags, WAYS, prefetch};

/// Connections that a card tracks at most, unless its settings say otherwise.
pub const FLOWS_MAX: usize = 1 << 18;
/// Connections that one port may hold of them, and those without an answer: this
/// many, or this part of a larger table.
const PORT_FLOWS: (u32, usize) = (1 << 17, 2);
const PORT_EMBRYONIC: (u32, usize) = (1 << 15, 8);
/// Groups looked into for an entry to evict.
const EVICT_GROUPS: usize = 8;
/// Entries that one port may have evicted in a millisecond for new ones of its own.
const PORT_EVICTIONS_PER_MS: u32 = 16;
/// Entries that one call of [`FlowTable::sweep`] looks at.
const SWEEP_ENTRIES: usize = 1 << 15;
/// Calls that go over all of the table take this long, and are at least so many.
const SWEEP_ALL: Duration = Duration::from_secs(1);
const SWEEP_PARTS: usize = 8;

/// Where an entry is; valid until an entry is inserted or removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowId(u32);

impl FlowId {
    fn new(group: usize, way: usize) -> Self {
        // The bound is below 2^30.
        Self(u32::try_from(group * WAYS + way).unwrap_or(u32::MAX))
    }

    /// The place of no entry.
    pub(crate) const NONE: Self = Self(u32::MAX);

    /// The place in the table.
    #[inline]
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }

    fn place(self) -> (usize, usize) {
        (self.0 as usize / WAYS, self.0 as usize % WAYS)
    }
}

/// All connections of a card.
#[derive(Debug)]
pub struct FlowTable {
    secret: [u64; 4],
    tags: Table<Tags>,
    entries: Table<Flow>,
    hops: Hops,
    len: usize,
    usage: Vec<Usage>,
    /// Idle limits, by port.
    tracking: Vec<ConnectionTracking>,
    bound: usize,
    port_flows: u32,
    port_embryonic: u32,
    port_evictions_per_ms: u32,
    draws: u64,
    cursor: usize,
    /// When nothing was found to evict for any port.
    barren_ms: Option<u32>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Usage {
    flows: u32,
    embryonic: u32,
    untracked: u32,
    /// When nothing was found to evict for this port.
    barren_ms: Option<u32>,
    /// When entries were last evicted for this port, and how many in that millisecond.
    evicted: (u32, u32),
}

impl FlowTable {
    /// An empty table for at most `bound` connections, hashed under `seed`. Its
    /// memory is touched as it fills.
    #[must_use]
    pub fn new(bound: usize, seed: u64) -> Self {
        let bound = bound.clamp(1, 1 << 29);
        // 30 of 32 ways.
        let groups = bound.div_ceil(30);
        let mut state = seed;
        let secret = std::array::from_fn(|_| split_mix(&mut state));
        let quota = |(least, part)| u32::try_from(bound / part).unwrap_or(u32::MAX).max(least);
        Self {
            secret,
            tags: Table::zeroed(groups),
            entries: Table::zeroed(groups * WAYS),
            hops: Hops::default(),
            len: 0,
            usage: Vec::new(),
            tracking: Vec::new(),
            bound,
            port_flows: quota(PORT_FLOWS),
            port_embryonic: quota(PORT_EMBRYONIC),
            port_evictions_per_ms: PORT_EVICTIONS_PER_MS,
            draws: state,
            cursor: 0,
            barren_ms: None,
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
    fn find_in(&self, group: usize, tag: u16, key: &Key) -> Option<FlowId> {
        let ways = Ways(self.tags.get(group)?.matching(tag));
        ways.map(|way| FlowId::new(group, way)).find(|id| self.get(*id).is_some_and(|flow| flow.key == *key))
    }

    /// Fetches the line that [`FlowTable::candidate`] reads.
    #[inline]
    pub(crate) fn prefetch(&self, hash: u64) {
        if let Some(tags) = self.tags.get(Place::new(hash, self.tags.len()).primary) {
            prefetch(tags);
        }
    }

    /// Fetches the line that it reads if there is nothing in that one.
    #[inline]
    pub(crate) fn prefetch_second(&self, hash: u64) {
        if let Some(tags) = self.tags.get(Place::new(hash, self.tags.len()).secondary) {
            prefetch(tags);
        }
    }

    /// Where a connection is likely to be, by tags alone, with its entry under way; or,
    /// if it is `welcome`, that which it will have when it is new.
    #[inline]
    pub(crate) fn candidate(&self, hash: u64, welcome: bool) -> FlowId {
        let place = Place::new(hash, self.tags.len());
        let matching = |group: usize| self.tags.get(group).map_or(0, |tags| tags.matching(place.tag));
        let (mut group, mut ways) = (place.primary, matching(place.primary));
        if ways == 0 {
            (group, ways) = (place.secondary, matching(place.secondary));
            if ways == 0 {
                if !welcome {
                    return FlowId::NONE;
                }
                let vacant = self.tags.get(place.primary).map_or(0, |tags| tags.matching(0));
                if let Some(entry) = self.entries.get(FlowId::new(place.primary, vacant.trailing_zeros() as usize).index()) {
                    prefetch(entry);
                }
                return FlowId::NONE;
            }
        }
        let id = FlowId::new(group, ways.trailing_zeros() as usize);
        if let Some(entry) = self.entries.get(id.index()) {
            prefetch(entry);
        }
        id
    }

    /// The entry.
    #[must_use]
    #[inline]
    pub fn get(&self, id: FlowId) -> Option<&Flow> {
        self.entries.get(id.0 as usize)
    }

    /// The entry, to change its decisions.
    #[inline]
    pub fn get_mut(&mut self, id: FlowId) -> Option<&mut Flow> {
        self.entries.get_mut(id.0 as usize)
    }

    /// All entries, by [`FlowId::index`], and all next hops.
    #[inline]
    pub(crate) fn parts(&mut self) -> (&mut [Flow], &mut [Hop]) {
        (&mut self.entries, self.hops.all_mut())
    }

    /// What happens to packets from the guest, if that was decided under this generation.
    #[must_use]
    pub fn egress(&self, id: FlowId, generation: u32) -> Option<Egress> {
        let flow = self.get(id).filter(|flow| flow.egress_generation == generation)?;
        self.hops.egress(flow.hop)
    }

    /// Decides that.
    pub fn decide_egress(&mut self, id: FlowId, generation: u32, what: NextHop) {
        if let Some(flow) = self.entries.get_mut(id.0 as usize) {
            let before = std::mem::replace(&mut flow.hop, self.hops.hold(what));
            flow.egress_generation = generation;
            self.hops.release(before);
        }
    }

    /// Notes that a packet of the connection, of `bytes` of IP, passed.
    pub fn observe(&mut self, id: FlowId, now: Duration, direction: Direction, transport: &Transport, bytes: usize) {
        if let Some(flow) = self.entries.get_mut(id.0 as usize) {
            // The length of an IPv4 packet.
            flow.count(milliseconds(now), direction, u16::try_from(bytes).unwrap_or(u16::MAX));
            let before = flow.state();
            flow.observe(direction, transport);
            if before == State::New
                && flow.state() != State::New
                && let Some(usage) = self.usage.get_mut(flow.key.slot().0 as usize)
            {
                usage.embryonic -= 1;
            }
        }
    }

    /// Whether a port has its share of the table, and the time is not yet that some of
    /// it makes room: a new connection would be refused. A flood costs no more than
    /// this question then.
    #[must_use]
    #[inline]
    pub fn refuses(&self, slot: Slot, now: Duration) -> bool {
        self.usage.get(slot.0 as usize).is_some_and(|usage| self.is_at_share(usage) && self.is_spent(usage, milliseconds(now)))
    }

    /// Whether there was a search for room in this millisecond that found none, or
    /// enough of them that did.
    fn is_spent(&self, usage: &Usage, now_ms: u32) -> bool {
        usage.barren_ms == Some(now_ms) || usage.evicted.0 == now_ms && usage.evicted.1 >= self.port_evictions_per_ms
    }

    #[inline]
    fn is_at_share(&self, usage: &Usage) -> bool {
        usage.flows >= self.port_flows || usage.embryonic >= self.port_embryonic
    }

    /// Stores a new connection, in place of one that has the same key.
    ///
    /// # Errors
    /// [`DropReason::ConntrackAllowance`] when neither the port's share nor the
    /// table has room and nothing may be evicted now.
    pub fn insert(&mut self, now: Duration, mut flow: Flow) -> Result<FlowId, DropReason> {
        let hash = self.hash(&flow.key);
        let (slot, now_ms) = (flow.key.slot(), milliseconds(now));
        let place = Place::new(hash, self.tags.len());
        let usage = self.usage(slot);
        if let Some(same) = self.find(hash, &flow.key) {
            // That is room enough. Were it refused, whoever floods a port could end
            // the connections of others at it.
            self.remove(same);
        } else if self.is_at_share(&usage) {
            self.evict(now_ms, place.primary, Some(slot))?;
        } else if self.len >= self.bound {
            self.evict(now_ms, place.primary, None)?;
        }
        let vacant = self.vacancy(place.primary).or_else(|| self.vacancy(place.secondary));
        let vacant = vacant.or_else(|| self.make_way(place.primary)).or_else(|| self.make_way(place.secondary));
        let id = vacant.ok_or(DropReason::ConntrackAllowance)?;
        flow.seen_ms = now_ms;
        self.put(id, place.tag, flow);
        self.len += 1;
        if let Some(usage) = self.usage.get_mut(slot.0 as usize) {
            usage.flows += 1;
            usage.embryonic += 1;
            usage.untracked += u32::from(flow.is_untracked());
        }
        Ok(id)
    }

    /// Tracks a connection from here on.
    pub fn track(&mut self, id: FlowId) {
        // No vacant entry has the flag.
        let Some(flow) = self.entries.get_mut(id.index()).filter(|flow| flow.is_untracked()) else { return };
        flow.set_untracked(false);
        if let Some(usage) = self.usage.get_mut(flow.key.slot().0 as usize) {
            usage.untracked -= 1;
        }
    }

    /// Connections tracked at a port.
    #[must_use]
    pub fn tracked(&self, slot: Slot) -> u32 {
        self.usage.get(slot.0 as usize).map_or(0, |usage| usage.flows - usage.untracked)
    }

    /// Forgets a connection.
    pub fn remove(&mut self, id: FlowId) {
        let (group, way) = id.place();
        let Some((tags, flow)) = self.tags.get_mut(group).zip(self.entries.get_mut(id.0 as usize)) else { return };
        if tags.matching(0) >> way & 1 != 0 {
            return;
        }
        tags.set(way, 0);
        // A vacant entry equals no key: the one of zeros has an address that nobody has.
        let flow = std::mem::replace(flow, Flow::zeroed());
        self.hops.release(flow.hop);
        self.len -= 1;
        if let Some(usage) = self.usage.get_mut(flow.key.slot().0 as usize) {
            usage.flows -= 1;
            usage.embryonic -= u32::from(flow.state() == State::New);
            usage.untracked -= u32::from(flow.is_untracked());
        }
    }

    /// Changes how long idle connections of a port are remembered, those that it has included.
    pub fn set_tracking(&mut self, slot: Slot, tracking: ConnectionTracking) {
        let index = slot.0 as usize;
        if self.tracking.len() <= index {
            self.tracking.resize(index + 1, ConnectionTracking::default());
        }
        if let Some(place) = self.tracking.get_mut(index) {
            *place = tracking;
        }
    }

    /// Forgets all connections of a port.
    pub fn remove_port(&mut self, slot: Slot) {
        if self.usage(slot).flows > 0 {
            self.remove_where(0..self.tags.len(), |flow| flow.key.slot() == slot);
        }
    }

    /// Forgets the connections of one part of the table that were idle too long.
    pub fn sweep(&mut self, now: Duration) {
        let start = if self.cursor >= self.tags.len() { 0 } else { self.cursor };
        let end = (start + self.tags.len().div_ceil(self.sweep_parts())).min(self.tags.len());
        let now_ms = milliseconds(now);
        let tracking = std::mem::take(&mut self.tracking);
        self.remove_where(start..end, |flow| {
            let tracking = tracking.get(flow.key.slot().0 as usize).copied().unwrap_or_default();
            flow.is_over(now_ms, &tracking)
        });
        self.tracking = tracking;
        self.cursor = end;
    }

    /// How often [`FlowTable::sweep`] wants to be called while flows exist.
    #[must_use]
    pub fn sweep_every(&self) -> Duration {
        SWEEP_ALL / u32::try_from(self.sweep_parts()).unwrap_or(u32::MAX)
    }

    /// Calls of it that go over the whole table.
    fn sweep_parts(&self) -> usize {
        self.entries.len().div_ceil(SWEEP_ENTRIES).max(SWEEP_PARTS)
    }

    /// Connections tracked now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes the shares of ports small.
    #[cfg(test)]
    pub(crate) fn set_shares(&mut self, flows: u32, embryonic: u32, evictions_per_ms: u32) {
        (self.port_flows, self.port_embryonic, self.port_evictions_per_ms) = (flows, embryonic, evictions_per_ms);
    }

    /// Every entry, in the order of the table.
    #[cfg(test)]
    pub(crate) fn all(&self) -> Vec<Flow> {
        (0..self.tags.len()).flat_map(|group| self.occupied(group)).filter_map(|id| self.get(id).copied()).collect()
    }

    fn remove_where(&mut self, groups: std::ops::Range<usize>, condition: impl Fn(&Flow) -> bool) {
        for group in groups {
            for id in self.occupied(group) {
                if self.get(id).is_some_and(&condition) {
                    self.remove(id);
                }
            }
        }
    }

    fn occupied(&self, group: usize) -> impl Iterator<Item = FlowId> + use<> {
        Ways(self.tags.get(group).map_or(0, |tags| !tags.matching(0))).map(move |way| FlowId::new(group, way))
    }

    /// Makes room by forgetting a connection that is not established or not tracked,
    /// of one port or of any. Where to look is drawn by the hash of the new one, and then by lot,
    /// so that a flood cannot push out only the others'.
    fn evict(&mut self, now_ms: u32, start: usize, slot: Option<Slot>) -> Result<(), DropReason> {
        // Among the established a vain search is long: one a millisecond is enough. And
        // who floods a port gets a small part of the worker's time, not all of it.
        let spent = match slot {
            Some(slot) => self.usage.get(slot.0 as usize).is_some_and(|usage| self.is_spent(usage, now_ms)),
            None => self.barren_ms == Some(now_ms),
        };
        if spent {
            return Err(DropReason::ConntrackAllowance);
        }
        let mut group = start;
        for _ in 0..EVICT_GROUPS {
            let candidate = self.occupied(group).find(|id| {
                self.get(*id).is_some_and(|flow| {
                    flow.flags & (ESTABLISHED | UNTRACKED) != ESTABLISHED && slot.is_none_or(|slot| flow.key.slot() == slot)
                })
            });
            if let Some(id) = candidate {
                self.remove(id);
                if let Some(usage) = slot.and_then(|slot| self.usage.get_mut(slot.0 as usize)) {
                    let before = if usage.evicted.0 == now_ms { usage.evicted.1 } else { 0 };
                    usage.evicted = (now_ms, before + 1);
                }
                return Ok(());
            }
            group = reduce(super::halves(split_mix(&mut self.draws)).0, self.tags.len());
        }
        let barren = match slot {
            Some(slot) => self.usage.get_mut(slot.0 as usize).map(|usage| &mut usage.barren_ms),
            None => Some(&mut self.barren_ms),
        };
        if let Some(barren) = barren {
            *barren = Some(now_ms);
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

    fn vacancy(&self, group: usize) -> Option<FlowId> {
        let way = Ways(self.tags.get(group)?.matching(0)).next()?;
        Some(FlowId::new(group, way))
    }

    /// Moves an entry of a full group to its other group, and says what is vacant then.
    fn make_way(&mut self, group: usize) -> Option<FlowId> {
        for id in self.occupied(group) {
            let flow = *self.get(id)?;
            let place = Place::new(self.hash(&flow.key), self.tags.len());
            let other = if place.primary == group { place.secondary } else { place.primary };
            if let Some(vacant) = self.vacancy(other) {
                self.put(vacant, place.tag, flow);
                self.put(id, 0, Flow::zeroed());
                return Some(id);
            }
        }
        None
    }

    fn put(&mut self, id: FlowId, tag: u16, flow: Flow) {
        let (group, way) = id.place();
        if let Some((tags, entry)) = self.tags.get_mut(group).zip(self.entries.get_mut(id.0 as usize)) {
            tags.set(way, tag);
            *entry = flow;
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
    /// The groups follow from the upper bits of the two halves, the tag from lower ones.
    #[inline]
    fn new(hash: u64, groups: usize) -> Self {
        let (high, low) = super::halves(hash);
        let tag = u16::try_from((low & 0xfff) << 4 | high & 0xf).unwrap_or(0).max(1);
        Self { primary: reduce(low, groups), secondary: reduce(high, groups), tag }
    }
}

/// Spreads 32 random bits over `0..count`.
#[inline]
fn reduce(random: u32, count: usize) -> usize {
    // Below the count, as the upper half of a product of two 32-bit numbers.
    usize::try_from((u64::from(random) * count as u64) >> 32).unwrap_or(0)
}

/// A set of ways.
#[derive(Debug, Clone, Copy)]
struct Ways(u32);

impl Iterator for Ways {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        if self.0 == 0 {
            return None;
        }
        let way = self.0.trailing_zeros() as usize;
        self.0 &= self.0 - 1;
        Some(way)
    }
}

/// SplitMix64: spreads a seed over the words of the secret.
pub(super) fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
