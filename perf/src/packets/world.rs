//! The world that a trace was taken in, derived from the trace: who this card is,
//! which guests it has, where everybody else is.
//!
//! | what | from |
//! |---|---|
//! | the network | VNI 100, or the commonest of the trace if that does not occur |
//! | this card's VTEP and MAC | the commonest outer destination of that network, else 10.255.0.1 |
//! | other cards | outer sources; each inner source is mapped to the one it was first seen from |
//! | guests | `decap`: inner destinations; `decap-conntrack`: 10.0.1.5; else the senders of plain frames |
//! | who is remote | whoever a guest sends to and is no guest himself; `forward` has no remote |
//!
//! Of a connection in plain frames, the side that speaks first is the guest and the
//! other is out there: its frames come over the wire, in VXLAN. A trace that is all
//! VXLAN gives its inner frames to the cases that begin at a guest, and a trace
//! without VXLAN is put into VXLAN for those that begin at the wire. What could not
//! be taken apart, and what belongs to nobody, is played as it is.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::Ipv4Addr;

use dataplane::packet::FRAME_MAX;
use dataplane::pipeline::Device;
use dataplane::{
    Mac, Mapping, NetworkConfig, PortConfig, PortId, Prefix, Protocol, Remote, Rule, Settings, Snapshot, Underlay, Vni, headers,
};

use super::case::Policy;
use super::frame::{self, Frame, Inner};
use super::pcap::Trace;

/// The network that scripts name.
const VNI: Vni = Vni(100);
/// The guest that scripts name.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 5);
const CARD: Ipv4Addr = Ipv4Addr::new(10, 255, 0, 1);
const CARD_MAC: Mac = Mac([0x02, 0, 0, 0xff, 0, 1]);
/// Cards that remotes of unknown place are spread over.
const CARDS: u32 = 16;
/// The largest number of guests of a derived card.
const GUESTS_MAX: usize = 1 << 16;
const MTU: u16 = 9001;

/// Why no world comes out of a trace.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages name the fields
pub enum WorldError {
    #[error("frame {index} has {bytes} bytes; packets have at most {FRAME_MAX}")]
    TooLong { index: usize, bytes: usize },
    #[error("{0} guests send in this trace, and a card has at most {GUESTS_MAX}")]
    Guests(usize),
    #[error("no frame of the trace is IPv4 of a guest, so there is nothing to derive a network from")]
    Nobody,
}

/// The configuration of a card and the cards around it.
#[derive(Debug)]
pub struct World {
    /// The card itself.
    pub settings: Settings,
    /// Its ports and networks.
    pub snapshot: Snapshot,
    /// Other cards, by which ARP is answered.
    pub neighbours: Vec<(Mac, Ipv4Addr)>,
    /// What was derived, in sentences.
    pub notes: Vec<String>,
}

/// A world, and what arrives in it: each frame with its device, in order.
#[derive(Debug)]
pub struct Derived {
    /// The world.
    pub world: World,
    /// The frames.
    pub trace: Trace,
    /// Where each arrives.
    pub devices: Vec<Device>,
}

/// Where an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Guest,
    Remote { vtep: Option<Ipv4Addr> },
}

/// Where a frame is fed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Feed {
    /// From the guest that its source is, without outer headers.
    Guest(Inner),
    /// From the wire, as it stands.
    Wire,
    /// From the wire, in VXLAN from the card of its source.
    Wrapped(Inner),
}

impl PartialEq for Inner {
    fn eq(&self, other: &Self) -> bool {
        (self.source, self.destination) == (other.source, other.destination)
    }
}

impl Eq for Inner {}

/// Derives the world of a trace for a case.
///
/// # Errors
/// [`WorldError`].
pub fn derive(case: Policy, trace: &Trace) -> Result<Derived, WorldError> {
    if let Some((index, frame)) = trace.iter().enumerate().find(|(_, frame)| frame.len() > FRAME_MAX - frame::ENCAPSULATION) {
        return Err(WorldError::TooLong { index, bytes: frame.len() });
    }
    let frames: Vec<Frame> = trace.iter().map(frame::dissect).collect();
    if frames.iter().all(|frame| frame.inner.is_none()) {
        return Err(WorldError::Nobody);
    }
    let mut survey = Survey::new(case, &frames);
    let feeds: Vec<Feed> = frames.iter().map(|frame| survey.place(case, frame)).collect();
    survey.load(case, trace, &frames, &feeds)
}

/// What is known of a trace's world so far.
struct Survey {
    vni: Vni,
    underlay: Underlay,
    /// Frames of VXLAN lose their outer headers.
    strip: bool,
    /// Plain frames get outer headers.
    wrap: bool,
    places: HashMap<Ipv4Addr, Place>,
    macs: HashMap<Ipv4Addr, Mac>,
    neighbours: Vec<(Mac, Ipv4Addr)>,
    known_cards: HashSet<Ipv4Addr>,
    notes: Vec<String>,
}

impl Survey {
    fn new(case: Policy, frames: &[Frame]) -> Self {
        let outers = || frames.iter().filter_map(|frame| frame.outer.as_ref());
        let vnis = commonest(outers().filter_map(|outer| outer.vni));
        let vni = if outers().any(|outer| outer.vni == Some(VNI)) { VNI } else { vnis.unwrap_or(VNI) };
        let us = commonest(outers().filter(|outer| outer.vni == Some(vni)).map(|outer| outer.destination.1));
        let us = us.or_else(|| commonest(outers().map(|outer| outer.destination.1)));
        let mac = us.and_then(|us| commonest(outers().filter(|outer| outer.destination.1 == us).map(|outer| outer.destination.0)));
        let underlay = Underlay { address: us.unwrap_or(CARD), prefix_length: 16, mac: mac.unwrap_or(CARD_MAC), encapsulated: true };
        let vxlan = outers().count();
        let plain = frames.iter().filter(|frame| frame.outer.is_none() && frame.inner.is_some()).count();
        let (strip, wrap) = (!case.is_decap() && plain == 0, case.is_decap() && vxlan == 0);
        let mut notes = vec![format!("{} frames: {vxlan} VXLAN, {plain} plain IPv4, {} other", frames.len(), frames.len() - vxlan - plain)];
        if strip {
            notes.push(format!("all frames of VNI {} lose their outer headers: {case} begins at a guest", vni.0));
        }
        if wrap {
            notes.push(format!("plain frames are put into VXLAN of VNI {}: {case} begins at the wire", vni.0));
        }
        let mut survey = Self {
            vni,
            underlay,
            strip,
            wrap,
            places: HashMap::new(),
            macs: HashMap::new(),
            neighbours: Vec::new(),
            known_cards: HashSet::new(),
            notes,
        };
        survey.places_of_wire(case, frames);
        survey
    }

    /// Finds who the frames of VXLAN come from and go to, before the plain ones
    /// are looked at.
    fn places_of_wire(&mut self, case: Policy, frames: &[Frame]) {
        if case == Policy::DecapConntrack {
            self.places.insert(GUEST, Place::Guest);
        }
        for frame in frames {
            let Some(outer) = frame.outer else { continue };
            let (mac, vtep) = outer.source;
            if vtep == self.underlay.address || outer.destination.1 != self.underlay.address {
                continue;
            }
            if self.known_cards.insert(vtep) {
                self.neighbours.push((mac, vtep));
            }
            if let Some(inner) = frame.inner.filter(|_| outer.vni == Some(self.vni) && !self.strip) {
                self.places.entry(inner.source.1).or_insert(Place::Remote { vtep: Some(vtep) });
                if case != Policy::DecapConntrack {
                    self.places.entry(inner.destination.1).or_insert(Place::Guest);
                }
                self.learn_macs(&inner);
            }
        }
    }

    fn learn_macs(&mut self, inner: &Inner) {
        for (mac, address) in [inner.source, inner.destination] {
            if !mac.is_group() {
                self.macs.entry(address).or_insert(mac);
            }
        }
    }

    /// Decides where a frame is fed in, and notes who its ends are.
    fn place(&mut self, case: Policy, frame: &Frame) -> Feed {
        let Some(inner) = frame.inner else { return Feed::Wire };
        if let Some(outer) = frame.outer
            && !(self.strip && outer.vni == Some(self.vni))
        {
            return Feed::Wire;
        }
        let (source, destination) = (inner.source.1, inner.destination.1);
        self.learn_macs(&inner);
        // The sender's MAC is what its port checks, so it outweighs what others wrote.
        match (case, self.wrap) {
            (Policy::Forward, _) => {
                self.places.insert(source, Place::Guest);
                self.places.insert(destination, Place::Guest);
                Feed::Guest(inner)
            }
            (Policy::Decap | Policy::DecapConntrack, true) => {
                if self.places.get(&source) == Some(&Place::Guest) {
                    return Feed::Guest(inner);
                }
                self.places.entry(source).or_insert(Place::Remote { vtep: None });
                if case == Policy::Decap {
                    self.places.entry(destination).or_insert(Place::Guest);
                }
                Feed::Wrapped(inner)
            }
            (Policy::Decap | Policy::DecapConntrack, false) => match self.places.get(&source) {
                Some(Place::Guest) => Feed::Guest(inner),
                _ => Feed::Wire,
            },
            (Policy::Encap | Policy::ConntrackEncap, _) => {
                let from = match (self.places.get(&source), self.places.get(&destination)) {
                    (Some(place), _) => *place,
                    (None, Some(Place::Guest)) => Place::Remote { vtep: None },
                    (None, _) => Place::Guest,
                };
                self.places.insert(source, from);
                self.places.entry(destination).or_insert(Place::Remote { vtep: None });
                if from == Place::Guest { Feed::Guest(inner) } else { Feed::Wrapped(inner) }
            }
        }
    }

    fn load(mut self, case: Policy, trace: &Trace, frames: &[Frame], feeds: &[Feed]) -> Result<Derived, WorldError> {
        let ports = self.ports(case, feeds)?;
        let mut by_sender: HashMap<(Mac, Ipv4Addr), PortId> = HashMap::new();
        for port in &ports {
            by_sender.extend(port.addresses.iter().map(|address| ((port.mac, *address), port.id)));
        }
        let by_address: HashMap<Ipv4Addr, PortId> =
            ports.iter().flat_map(|port| port.addresses.iter().map(|address| (*address, port.id))).collect();
        let mappings = self.mappings(&ports);
        let vteps: HashMap<Ipv4Addr, Ipv4Addr> = mappings.iter().map(|mapping| (mapping.ip, mapping.vtep)).collect();

        let (mut played, mut devices) = (Trace::default(), Vec::with_capacity(feeds.len()));
        played.cut = trace.cut;
        for (index, (feed, frame)) in feeds.iter().zip(frames).enumerate() {
            let bytes = trace.get(index);
            let bare = frame.outer.filter(|outer| self.strip && outer.vni == Some(self.vni)).map_or(0, |outer| outer.at);
            let bare = bytes.get(bare..).unwrap_or_default();
            match feed {
                Feed::Wire => {
                    played.push(bytes);
                    devices.push(Device::Underlay);
                }
                Feed::Guest(inner) => {
                    played.push(bare);
                    // A forged MAC comes from the port that owns the address.
                    let id = by_sender.get(&inner.source).or_else(|| by_address.get(&inner.source.1));
                    devices.push(id.map_or(Device::Underlay, |id| Device::Port(*id)));
                }
                Feed::Wrapped(inner) => {
                    let vtep = vteps.get(&inner.source.1).copied().unwrap_or_else(|| card_of(inner.source.1));
                    let port = entropy(inner.source.1);
                    played.push(&frame::encapsulate(bare, (card_mac(vtep), vtep), &self.underlay, self.vni, port));
                    devices.push(Device::Underlay);
                }
            }
        }
        self.describe(case, &ports, &mappings, feeds);
        let network = NetworkConfig::new(self.vni, mappings);
        let every: BTreeSet<Ipv4Addr> = self.places.keys().copied().collect();
        let subnet_length = subnet_length(case, &every, feeds);
        let vpc_prefixes = vpc_prefixes(&every);
        let ports = ports.iter().map(|port| port.config(case, self.vni, subnet_length, &vpc_prefixes)).collect();
        let world = World {
            settings: settings(self.underlay),
            snapshot: Snapshot { ports, networks: vec![network], ..Snapshot::default() },
            neighbours: self.neighbours,
            notes: self.notes,
        };
        Ok(Derived { world, trace: played, devices })
    }

    /// One port for each MAC that sends, and one for each other guest. A MAC that
    /// sends from several addresses is a guest that routes, unless somebody sends
    /// to more than one of them: then each is a port of its own.
    fn ports(&self, case: Policy, feeds: &[Feed]) -> Result<Vec<Guest>, WorldError> {
        let receives: HashSet<Ipv4Addr> = feeds
            .iter()
            .filter_map(|feed| match feed {
                Feed::Guest(inner) | Feed::Wrapped(inner) => Some(inner.destination.1),
                Feed::Wire => None,
            })
            .collect();
        let (mut guests, mut owner, mut by_mac): (Vec<Guest>, HashMap<Ipv4Addr, usize>, HashMap<Mac, usize>) = Default::default();
        let add = |guests: &mut Vec<Guest>, address: Ipv4Addr, mac: Mac| {
            let id = PortId(u32::try_from(guests.len() + 1).unwrap_or(u32::MAX));
            guests.push(Guest { id, mac, addresses: vec![address] });
            guests.len() - 1
        };
        for feed in feeds {
            let Feed::Guest(inner) = feed else { continue };
            let (mac, address) = inner.source;
            if owner.contains_key(&address) {
                continue;
            }
            let router = by_mac.get(&mac).copied().filter(|_| !receives.contains(&address) && !case.is_decap());
            let index = match router {
                Some(index) => {
                    if let Some(guest) = guests.get_mut(index) {
                        guest.addresses.push(address);
                    }
                    index
                }
                None => add(&mut guests, address, mac),
            };
            by_mac.entry(mac).or_insert(index);
            owner.insert(address, index);
        }
        let mut silent: Vec<Ipv4Addr> = self
            .places
            .iter()
            .filter(|(address, place)| **place == Place::Guest && !owner.contains_key(*address))
            .map(|(a, _)| *a)
            .collect();
        silent.sort_unstable();
        for address in silent {
            add(&mut guests, address, self.mac(address));
        }
        if guests.len() > GUESTS_MAX { Err(WorldError::Guests(guests.len())) } else { Ok(guests) }
    }

    fn mac(&self, address: Ipv4Addr) -> Mac {
        self.macs.get(&address).copied().unwrap_or_else(|| {
            let [a, b, c, d] = address.octets();
            Mac([0x02, 0x10, a, b, c, d])
        })
    }

    fn mappings(&mut self, ports: &[Guest]) -> Vec<Mapping> {
        let us = self.underlay.address;
        let guests = ports.iter().flat_map(|port| port.addresses.iter().map(|address| Mapping::new(*address, port.mac, us)));
        let mut mappings: Vec<Mapping> = guests.collect();
        for (address, place) in &self.places {
            let Place::Remote { vtep } = place else { continue };
            let vtep = vtep.unwrap_or_else(|| card_of(*address));
            if self.known_cards.insert(vtep) {
                self.neighbours.push((card_mac(vtep), vtep));
            }
            mappings.push(Mapping::new(*address, self.mac(*address), vtep));
        }
        mappings.sort_by_key(|mapping| mapping.ip);
        mappings
    }

    fn describe(&mut self, case: Policy, ports: &[Guest], mappings: &[Mapping], feeds: &[Feed]) {
        let Underlay { address, mac, .. } = self.underlay;
        self.notes.push(format!("this card is VTEP {address}, {mac}; VNI {}; {} other cards", self.vni.0, self.neighbours.len()));
        let first = ports.first().map(|port| format!(", the first {} {}", port.addresses.first().unwrap_or(&GUEST), port.mac));
        self.notes.push(format!("{} guests{}", ports.len(), first.unwrap_or_default()));
        let routers = ports.iter().filter(|port| port.addresses.len() > 1).count();
        if routers > 0 {
            self.notes.push(format!("{routers} guests send from several addresses: source/destination check off"));
        }
        let ours = mappings.iter().filter(|mapping| mapping.vtep == address).count();
        self.notes.push(format!("{} remote addresses mapped to their cards", mappings.len() - ours));
        let from_guest = feeds.iter().filter(|feed| matches!(feed, Feed::Guest(_))).count();
        self.notes.push(format!("of a pass, {from_guest} frames come from guests and {} from the wire", feeds.len() - from_guest));
        let groups = feeds.iter().filter(|feed| matches!(feed, Feed::Guest(inner) if inner.destination.0.is_group())).count();
        if groups > 0 {
            self.notes.push(format!("{groups} guest frames are addressed to a group MAC, which a VPC does not carry"));
        }
        self.notes.push(format!("rules of {case}: {}", rules_text(case)));
    }
}

/// A guest of the derived card.
struct Guest {
    id: PortId,
    mac: Mac,
    addresses: Vec<Ipv4Addr>,
}

impl Guest {
    fn config(&self, case: Policy, vni: Vni, subnet_length: u8, vpc_prefixes: &[Prefix]) -> PortConfig {
        let address = self.addresses.first().copied().unwrap_or(GUEST);
        let (ingress, egress) = rules(case);
        PortConfig {
            subnet: Prefix::new(address, subnet_length),
            vpc_prefixes: vpc_prefixes.to_vec(),
            source_dest_check: self.addresses.len() == 1,
            ingress,
            egress,
            ..port(self.id, vni, self.mac, address)
        }
    }
}

/// Connections of a card that is measured: as many as the largest case has.
const FLOWS_MAX: usize = 1 << 20;

/// What a card is that has this place on the underlay and no public side.
pub fn settings(underlay: Underlay) -> Settings {
    Settings { underlay, public: None, flows_max: FLOWS_MAX, seed: 0x05ee_d0f7_ab1e }
}

/// A source port of VXLAN for what an address sends, as the data plane has them.
pub fn entropy(address: Ipv4Addr) -> u16 {
    let [_, _, c, d] = address.octets();
    0xc000 | (u16::from_be_bytes([c, d]) & 0x3fff)
}

/// A port as a guest has it who asked for nothing: in a subnet of 256 addresses, and
/// without a rule.
pub fn port(id: PortId, vni: Vni, mac: Mac, ipv4: Ipv4Addr) -> PortConfig {
    PortConfig { vpc_prefixes: vec![Prefix::new(ipv4, 16)], mtu: MTU, ..PortConfig::new(id, vni, mac, ipv4, Prefix::new(ipv4, 24)) }
}

/// Ingress and egress rules of the guests of a case.
pub fn rules(case: Policy) -> (Vec<Rule>, Vec<Rule>) {
    let anywhere = Remote::Prefix(Prefix::new(Ipv4Addr::UNSPECIFIED, 0));
    let rule = |protocol, ports, remote| Rule { protocol, ports, icmp: (None, None), remote };
    let all = vec![rule(Protocol::Any, None, anywhere)];
    match case {
        Policy::Forward | Policy::Encap | Policy::Decap => (all.clone(), all),
        Policy::DecapConntrack => {
            let vpc = Remote::Prefix(Prefix::new(Ipv4Addr::new(10, 0, 0, 0), 16));
            (vec![rule(Protocol::Number(headers::UDP_PROTOCOL), Some((8080, 8080)), vpc)], all)
        }
        Policy::ConntrackEncap => {
            let protocols = [headers::TCP, headers::UDP_PROTOCOL, headers::ICMP];
            (Vec::new(), protocols.map(|protocol| rule(Protocol::Number(protocol), None, anywhere)).to_vec())
        }
    }
}

fn rules_text(case: Policy) -> &'static str {
    match case {
        Policy::Forward | Policy::Encap | Policy::Decap => "everything in, everything out",
        Policy::DecapConntrack => "udp/8080 from 10.0.0.0/16 in, everything out",
        Policy::ConntrackEncap => "nothing in, all TCP, UDP and ICMP out",
    }
}

/// The card that an address of unknown place is on.
fn card_of(address: Ipv4Addr) -> Ipv4Addr {
    let [_, _, c, d] = address.octets();
    let number = (u32::from(c) * 31 + u32::from(d)) % CARDS;
    (u32::from(Ipv4Addr::new(10, 255, 1, 1)) + number).into()
}

fn card_mac(vtep: Ipv4Addr) -> Mac {
    let [a, b, c, d] = vtep.octets();
    Mac([0x02, 0xca, a, b, c, d])
}

/// The longest subnet in which no address that a guest sends to is the router's or
/// the broadcast address; 10.0.1.0/24 where scripts name the guest.
fn subnet_length(case: Policy, addresses: &BTreeSet<Ipv4Addr>, feeds: &[Feed]) -> u8 {
    if case == Policy::DecapConntrack {
        return 24;
    }
    let named: BTreeSet<Ipv4Addr> = feeds
        .iter()
        .filter_map(|feed| match feed {
            Feed::Guest(inner) => Some(inner.destination.1),
            _ => None,
        })
        .collect();
    let fits = |length: &u8| {
        !addresses.iter().any(|address| {
            let subnet = Prefix::new(*address, *length);
            let broadcast = Ipv4Addr::from(u32::from(subnet.nth(0)) | !u32::from(subnet.mask()));
            named.contains(&subnet.nth(1)) || named.contains(&broadcast)
        })
    };
    [24, 20, 16, 12, 8].into_iter().find(fits).unwrap_or(24)
}

/// The /16 of every address, or everything when they are many.
fn vpc_prefixes(addresses: &BTreeSet<Ipv4Addr>) -> Vec<Prefix> {
    let wide: BTreeSet<Ipv4Addr> = addresses.iter().map(|address| Prefix::new(*address, 16).nth(0)).collect();
    if wide.len() > 16 {
        return vec![Prefix::new(Ipv4Addr::UNSPECIFIED, 0)];
    }
    wide.into_iter().map(|address| Prefix::new(address, 16)).collect()
}

fn commonest<T: Copy + Eq + std::hash::Hash + Ord>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: HashMap<T, usize> = HashMap::new();
    for value in values {
        *counts.entry(value).or_default() += 1;
    }
    counts.into_iter().max_by_key(|(value, count)| (*count, std::cmp::Reverse(*value))).map(|(value, _)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACS: [Mac; 2] = [Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2])];
    const US: Underlay =
        Underlay { address: Ipv4Addr::new(192, 0, 2, 1), prefix_length: 24, mac: Mac([2, 9, 9, 9, 9, 1]), encapsulated: true };

    fn plain(source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
        frame::udp((MACS[0], source, 1000), (MACS[1], destination, 8080), 22)
    }

    fn from_card(card: u8, vni: u32, inner: &[u8]) -> Vec<u8> {
        let from = (Mac([2, 9, 9, 9, 9, card]), Ipv4Addr::new(192, 0, 2, card));
        frame::encapsulate(inner, from, &US, Vni(vni), 0xc000)
    }

    fn host(number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 7, number)
    }

    #[track_caller]
    fn world(policy: Policy, frames: &[Vec<u8>]) -> Derived {
        let mut trace = Trace::default();
        frames.iter().for_each(|frame| trace.push(frame));
        let derived = derive(policy, &trace).unwrap();
        assert_eq!((derived.trace.len(), derived.devices.len()), (frames.len(), frames.len()));
        derived
    }

    #[test]
    fn the_card_is_who_the_network_sends_to_and_senders_are_where_they_were_first_seen() {
        let frames = [
            from_card(7, 100, &plain(host(1), GUEST)),
            from_card(8, 100, &plain(host(2), GUEST)),
            from_card(9, 100, &plain(host(1), GUEST)),
            from_card(9, 200, &plain(host(3), GUEST)),
        ];
        let Derived { world, devices, .. } = world(Policy::DecapConntrack, &frames);
        assert_eq!((world.settings.underlay.address, world.settings.underlay.mac), (US.address, US.mac));
        let mappings: Vec<_> = world.snapshot.networks[0].mappings.iter().map(|mapping| (mapping.ip, mapping.vtep.octets()[3])).collect();
        assert_eq!(mappings, [(GUEST, 1), (host(1), 7), (host(2), 8)], "not who is in another network");
        assert_eq!(world.snapshot.ports.len(), 1);
        let port = &world.snapshot.ports[0];
        assert_eq!((port.ipv4, port.mac, port.vni), (GUEST, MACS[1], VNI));
        assert_eq!(port.ingress, rules(Policy::DecapConntrack).0);
        assert_eq!(devices, [Device::Underlay; 4]);
        assert_eq!(world.neighbours.len(), 3);
    }

    #[test]
    fn whoever_speaks_first_is_the_guest_and_answers_come_over_the_wire() {
        let frames = [plain(GUEST, host(1)), plain(host(1), GUEST), plain(GUEST, host(2))];
        let Derived { world, trace, devices } = world(Policy::ConntrackEncap, &frames);
        let port = Device::Port(world.snapshot.ports[0].id);
        assert_eq!(devices, [port, Device::Underlay, port]);
        assert_eq!(trace.get(0), frames[0]);
        let outer = frame::dissect(trace.get(1)).outer.unwrap();
        assert_eq!((outer.vni, outer.destination.1), (Some(VNI), CARD));
        let mapped = world.snapshot.networks[0].mappings.iter().find(|mapping| mapping.ip == host(1)).unwrap();
        assert_eq!(outer.source.1, mapped.vtep);
    }

    #[test]
    fn a_mac_with_many_addresses_is_one_guest_that_routes_and_others_are_one_each() {
        let frames: Vec<_> = (1..=3).map(|number| plain(host(number), GUEST)).collect();
        let ports = world(Policy::Encap, &frames).world.snapshot.ports;
        assert_eq!((ports.len(), ports[0].source_dest_check), (1, false));
        // Somebody sends to each of them, so each needs its own address.
        let ports = world(Policy::Forward, &[frames, vec![plain(GUEST, host(1)), plain(GUEST, host(2))]].concat()).world.snapshot.ports;
        for address in [host(1), host(2), GUEST] {
            assert!(ports.iter().any(|port| port.ipv4 == address), "{address}");
        }
    }

    #[test]
    fn no_guest_sends_to_the_router_of_its_own_subnet() {
        let destination = Ipv4Addr::new(10, 0, 7, 1);
        let ports = world(Policy::Encap, &[plain(host(9), destination)]).world.snapshot.ports;
        assert_ne!(ports[0].subnet.nth(1), destination);
    }

    #[test]
    fn a_trace_without_a_guests_packet_has_no_world() {
        let mut trace = Trace::default();
        trace.push(&[0; 60]);
        assert!(matches!(derive(Policy::Decap, &trace), Err(WorldError::Nobody)));
        trace.push(&[0; FRAME_MAX]);
        assert!(matches!(derive(Policy::Decap, &trace), Err(WorldError::TooLong { index: 1, .. })));
    }
}
