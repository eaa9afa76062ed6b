//! The packet pipeline of a card, without any input or output of its own: frames
//! and the time go in, frames by device come out.
//!
//! ```text
//!  guest ----> guest_in ---- Local ----> guest_out ----> guest
//!                |  \                     ^    ^
//!             Remote  Public -(hairpin)---'    |
//!                |      \                      |
//!  underlay <----'       '----> public wire    |
//!  underlay ----> underlay_in -----------------|
//!  public   ----> public_in -------------------'
//! ```
//!
//! Every arrow into `guest_out` passes the receiving port's own policy, also
//! between two guests of one card. Each stage takes the packet by reference and
//! says what comes next, or why the packet ends here; `Pipeline::run` is the one place
//! that counts and frees.
//!
//! A port has a generation that rises when anything changed that its flows may
//! depend on. A flow of an older generation looks up its next hop again with its
//! next packet; that it may exist was decided once, when it was opened.

mod guest;
mod ingress;
mod inspect;
mod wire;

#[cfg(test)]
mod tests;

pub use inspect::{FlowPage, FlowSeen};

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rate_limit::TokenBucket;

use crate::action::{Origin, Output};
use crate::arp::{self, Neighbours};
use crate::counters::{Board, DropReason, Tally};
use crate::flow::{FLOWS_MAX, FlowTable, SWEEP_EVERY, Slot};
use crate::fragment::FragmentTable;
use crate::headers::ETHERNET;
use crate::packet::{Packet, Pool};
use crate::policy::{Locals, Map, Network, Port, Tables};
use crate::{Mac, PortId, Prefix, Settings, Vni, fragment, headers, vxlan};

/// The MAC of every subnet's router and of the card's services.
pub const ROUTER_MAC: Mac = Mac([0x0e, 0, 0, 0, 0, 1]);
/// Where guests find the instance metadata service.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Largest IP packet towards the internet.
pub const PUBLIC_MTU: u16 = 1500;

/// Packets a second that one port may send to the card's own services, as EC2.
const SERVICES_PER_S: u64 = 1024;
/// ICMP errors a second that the router sends to one port.
const ERRORS_PER_S: u64 = 100;
const ANNOUNCEMENTS: u8 = 3;
const ANNOUNCE_EVERY: Duration = Duration::from_millis(250);

/// A device of the card, as the pipeline names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Device {
    /// A guest's network card.
    Port(PortId),
    /// The wire between cards.
    Underlay,
    /// The wire to the internet.
    Public,
}

/// What a turn works with.
#[derive(Debug)]
pub struct Turn<'a> {
    /// Time since any fixed moment.
    pub now: Duration,
    /// Where buffers come from and go to.
    pub pool: &'a mut Pool,
    /// Where finished frames go.
    pub out: &'a mut Output,
}

/// What becomes of a packet after a stage.
enum Next {
    /// Through the ingress policy of a port.
    Ingress(Slot, Origin),
    /// To the guest.
    Deliver(Slot),
    /// To another card; the VXLAN header is in place.
    Underlay { vtep: Ipv4Addr, entropy: u64 },
    /// To the internet; addresses are translated.
    Public { hop: Ipv4Addr, sender: Ipv4Addr },
    /// To the card's services.
    Punt(Slot),
    /// Answered, or copied: the buffer is free.
    Done,
}

/// State of a card's packet path.
#[derive(Debug)]
pub struct Pipeline {
    settings: Settings,
    ports: Vec<Option<PortState>>,
    by_id: Map<PortId, Slot>,
    locals: Locals,
    networks: Map<Vni, Arc<Network>>,
    flows: FlowTable,
    fragments: FragmentTable,
    underlay: Neighbours,
    public: Option<Neighbours>,
    announcements: Vec<Announcement>,
    generation: u32,
    sweep_at: Duration,
    board: Arc<Board>,
}

#[derive(Debug)]
struct PortState {
    port: Arc<Port>,
    hot: Hot,
    services: TokenBucket,
    errors: TokenBucket,
    tally: Arc<Tally>,
}

/// What every packet of a port is checked against, in one cache line.
#[derive(Debug, Clone, Copy)]
struct Hot {
    id: PortId,
    vni: Vni,
    mac: Mac,
    ipv4: Ipv4Addr,
    router: Ipv4Addr,
    subnet: Prefix,
    mtu: u16,
    source_dest_check: bool,
    generation: u32,
}

impl Hot {
    fn new(port: &Port, generation: u32) -> Self {
        let config = &port.config;
        Self {
            id: config.id,
            vni: config.vni,
            mac: config.mac,
            ipv4: config.ipv4,
            router: port.router,
            subnet: config.subnet,
            mtu: config.mtu,
            source_dest_check: config.source_dest_check,
            generation,
        }
    }
}

/// A gratuitous ARP that is to be sent `left` more times.
#[derive(Debug)]
struct Announcement {
    address: Ipv4Addr,
    left: u8,
    due: Duration,
}

impl Pipeline {
    /// A pipeline without ports.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            ports: Vec::new(),
            by_id: Map::default(),
            locals: Locals::default(),
            networks: Map::default(),
            flows: FlowTable::new(FLOWS_MAX, settings.seed),
            fragments: FragmentTable::default(),
            underlay: Neighbours::new(settings.underlay.mac),
            public: settings.public.map(|side| Neighbours::new(side.mac)),
            announcements: Vec::new(),
            generation: 0,
            sweep_at: Duration::ZERO,
            board: Arc::default(),
            settings,
        }
    }

    pub(crate) fn board(&self) -> &Arc<Board> {
        &self.board
    }

    /// Takes over a configuration.
    pub fn apply(&mut self, now: Duration, tables: &Tables) {
        self.generation = self.generation.wrapping_add(1).max(1);
        let wanted: Map<PortId, ()> = tables.ports.iter().map(|port| (port.config.id, ())).collect();
        let gone: Vec<(PortId, Slot)> =
            self.by_id.iter().filter(|(id, _)| !wanted.contains_key(*id)).map(|(id, slot)| (*id, *slot)).collect();
        for (id, slot) in gone {
            self.port_remove(id, slot);
        }
        for port in &tables.ports {
            self.port_put(now, port);
        }
        self.networks.clone_from(&tables.networks);
        self.locals_rebuild(now);
    }

    /// Takes frames that arrived at a device and leaves `packets` empty.
    pub fn turn(&mut self, turn: &mut Turn<'_>, from: Device, packets: &mut Vec<Packet>) {
        let sent = (turn.out.underlay.len(), turn.out.public.len());
        let at = match from {
            Device::Port(id) => self.by_id.get(&id).copied(),
            Device::Underlay | Device::Public => None,
        };
        for packet in packets.drain(..) {
            self.run(turn, from, at, packet);
        }
        self.account(turn, sent);
    }

    /// Puts a frame of the card's services before the guest of a port.
    pub fn inject(&mut self, turn: &mut Turn<'_>, to: PortId, packet: Packet) {
        match self.by_id.get(&to) {
            Some(slot) => self.deliver(turn, *slot, packet),
            None => self.drop(turn, None, DropReason::UnknownPort, packet),
        }
    }

    /// When [`Pipeline::tick`] is to be called next if nothing happens before.
    #[must_use]
    pub fn due(&self) -> Option<Duration> {
        let sweep = (!self.flows.is_empty()).then_some(self.sweep_at);
        let public = self.public.as_ref().and_then(Neighbours::due);
        let announcement = self.announcements.iter().map(|announcement| announcement.due).min();
        [sweep, self.underlay.due(), public, announcement].into_iter().flatten().min()
    }

    /// Does what time asks for: ageing, questions about neighbours, announcements.
    pub fn tick(&mut self, turn: &mut Turn<'_>) {
        let sent = (turn.out.underlay.len(), turn.out.public.len());
        if self.sweep_at <= turn.now {
            self.flows.sweep(turn.now);
            self.sweep_at = turn.now + SWEEP_EVERY;
        }
        let mut lost = self.underlay.tick(turn.now, turn.pool, &mut turn.out.underlay);
        if let (Some(neighbours), Some(side)) = (&mut self.public, self.settings.public) {
            lost += neighbours.tick(turn.now, turn.pool, &mut turn.out.public);
            for announcement in self.announcements.iter_mut().filter(|announcement| announcement.due <= turn.now) {
                let address = announcement.address;
                turn.out.public.push(arp::question(side.mac, address, address, turn.pool));
                announcement.left -= 1;
                announcement.due = turn.now + ANNOUNCE_EVERY;
            }
        }
        self.announcements.retain(|announcement| announcement.left > 0);
        self.count_drops(None, DropReason::NeighbourUnresolved, lost);
        self.account(turn, sent);
    }

    /// Counts frames that a device, or the way to it, had no room for.
    pub fn device_dropped(&mut self, device: Device, reason: DropReason, count: u64) {
        let slot = match device {
            Device::Port(id) => self.by_id.get(&id).copied(),
            Device::Underlay | Device::Public => None,
        };
        self.count_drops(slot, reason, count);
    }

    fn run(&mut self, turn: &mut Turn<'_>, from: Device, mut at: Option<Slot>, mut packet: Packet) {
        let received = packet.bounds();
        let mut next = match from {
            Device::Port(_) => match at {
                Some(slot) => self.guest_in(turn, slot, &mut packet),
                None => Err(DropReason::UnknownPort),
            },
            Device::Underlay => self.underlay_in(turn, &mut packet),
            Device::Public => self.public_in(turn, &mut packet),
        };
        loop {
            next = match next {
                Ok(Next::Ingress(slot, origin)) => {
                    at = Some(slot);
                    self.guest_out(turn, slot, origin, &mut packet)
                }
                Ok(Next::Deliver(slot)) => return self.deliver(turn, slot, packet),
                Ok(Next::Underlay { vtep, entropy }) => return self.send_underlay(turn, at, packet, vtep, entropy),
                Ok(Next::Public { hop, sender }) => return self.send_public(turn, at, packet, hop, sender),
                Ok(Next::Punt(slot)) => {
                    if let Some(state) = self.port(slot) {
                        turn.out.punted.push((state.hot.id, packet));
                    }
                    return;
                }
                Ok(Next::Done) => return turn.pool.put(packet),
                Err(reason) => {
                    if at.is_none() {
                        // It belongs to nobody yet, so whoever captures sees it as it came.
                        packet.restore(received);
                    }
                    return self.drop(turn, at, reason, packet);
                }
            };
        }
    }

    /// Counts a packet that died, and frees it unless somebody wants to see it.
    fn drop(&self, turn: &mut Turn<'_>, at: Option<Slot>, reason: DropReason, packet: Packet) {
        self.count_drops(at, reason, 1);
        let port = at.and_then(|slot| self.port(slot)).map(|state| state.hot.id);
        turn.out.drop(turn.pool, port, reason, packet);
    }

    fn deliver(&mut self, turn: &mut Turn<'_>, slot: Slot, packet: Packet) {
        if let Some(state) = self.port(slot) {
            state.tally.sent(packet.len());
            turn.out.port(slot, state.hot.id, packet);
        }
    }

    fn send_underlay(&mut self, turn: &mut Turn<'_>, at: Option<Slot>, mut packet: Packet, vtep: Ipv4Addr, entropy: u64) {
        let underlay = self.settings.underlay;
        if !underlay.encapsulated {
            packet.set_peer(vtep);
            turn.out.underlay.push(packet);
        } else if vxlan::push_outer(&mut packet, &underlay, vtep, entropy) {
            let hop = (vtep, underlay.address);
            if let Err(reason) = self.underlay.send(turn.now, hop, packet, turn.pool, &mut turn.out.underlay) {
                self.count_drops(at, reason, 1);
            }
        } else {
            self.drop(turn, at, DropReason::TooLong, packet);
        }
    }

    fn send_public(&mut self, turn: &mut Turn<'_>, at: Option<Slot>, packet: Packet, hop: Ipv4Addr, sender: Ipv4Addr) {
        let Some(neighbours) = &mut self.public else {
            return self.drop(turn, at, DropReason::NoPublicSide, packet);
        };
        let (now, out) = (turn.now, &mut turn.out.public);
        let mut refused = 0;
        let mut send = |pool: &mut Pool, packet| {
            refused += u64::from(neighbours.send(now, (hop, sender), packet, pool, out).is_err());
        };
        if packet.len() <= ETHERNET + usize::from(PUBLIC_MTU) {
            send(turn.pool, packet);
        } else {
            if let Ok(ip) = headers::ipv4(packet.as_slice().get(ETHERNET..).unwrap_or_default()) {
                fragment::split(packet.as_slice(), &ip, PUBLIC_MTU.into(), turn.pool, send);
            }
            turn.pool.put(packet);
        }
        self.count_drops(at, DropReason::NeighbourQueueFull, refused);
    }

    fn port(&self, slot: Slot) -> Option<&PortState> {
        self.ports.get(slot.0 as usize)?.as_ref()
    }

    fn port_mut(&mut self, slot: Slot) -> Option<&mut PortState> {
        self.ports.get_mut(slot.0 as usize)?.as_mut()
    }

    fn port_put(&mut self, now: Duration, port: &Arc<Port>) {
        let generation = self.generation;
        if let Some(slot) = self.by_id.get(&port.config.id).copied() {
            let Some(state) = self.ports.get_mut(slot.0 as usize).and_then(Option::as_mut) else { return };
            if !Arc::ptr_eq(&state.port, port) {
                let moved = state.hot.vni != port.config.vni;
                state.port = Arc::clone(port);
                state.hot = Hot::new(port, generation);
                if moved {
                    // Equal addresses of another network are other machines.
                    self.flows.remove_port(slot);
                }
            }
            return;
        }
        let state = PortState {
            port: Arc::clone(port),
            hot: Hot::new(port, generation),
            services: TokenBucket::new(SERVICES_PER_S, SERVICES_PER_S, now),
            errors: TokenBucket::new(ERRORS_PER_S, ERRORS_PER_S, now),
            tally: self.board.port(port.config.id),
        };
        let index = self.ports.iter().position(Option::is_none).unwrap_or(self.ports.len());
        let Ok(number) = u32::try_from(index) else { return };
        match self.ports.get_mut(index) {
            Some(vacant) => *vacant = Some(state),
            None => self.ports.push(Some(state)),
        }
        self.by_id.insert(port.config.id, Slot(number));
    }

    fn port_remove(&mut self, id: PortId, slot: Slot) {
        self.by_id.remove(&id);
        self.flows.remove_port(slot);
        self.board.port_remove(id);
        if let Some(state) = self.ports.get_mut(slot.0 as usize) {
            *state = None;
        }
    }

    /// Indexes the ports by their addresses. When an index changed, flows of any
    /// port may lead elsewhere; a public address that is new here is announced.
    fn locals_rebuild(&mut self, now: Duration) {
        let mut locals = Locals::default();
        for (number, state) in (0..).zip(&self.ports) {
            let Some(config) = state.as_ref().map(|state| &state.port.config) else { continue };
            locals.by_address.insert((config.vni, config.ipv4), Slot(number));
            if let Some(address) = config.public {
                locals.by_public.insert(address, Slot(number));
            }
        }
        if locals.by_address != self.locals.by_address || locals.by_public != self.locals.by_public {
            for state in self.ports.iter_mut().flatten() {
                state.hot.generation = self.generation;
            }
        }
        let before = std::mem::replace(&mut self.locals, locals);
        self.announcements.retain(|announcement| self.locals.by_public.contains_key(&announcement.address));
        if self.public.is_some() {
            let new = self.locals.by_public.keys().filter(|address| !before.by_public.contains_key(*address));
            self.announcements.extend(new.map(|address| Announcement { address: *address, left: ANNOUNCEMENTS, due: now }));
        }
    }

    fn count_drops(&self, slot: Option<Slot>, reason: DropReason, count: u64) {
        if count > 0 {
            self.board.card.dropped(reason, count);
            if let Some(state) = slot.and_then(|slot| self.port(slot)) {
                state.tally.dropped(reason, count);
            }
        }
    }

    fn account(&self, turn: &Turn<'_>, (underlay, public): (usize, usize)) {
        turn.out.underlay.iter().skip(underlay).for_each(|packet| self.board.underlay.sent(packet.len()));
        turn.out.public.iter().skip(public).for_each(|packet| self.board.public.sent(packet.len()));
        self.board.flows.store(self.flows.len() as u64, Ordering::Relaxed);
    }
}
