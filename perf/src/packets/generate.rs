//! Traffic without a capture: connections between guests of this card and addresses
//! of other cards, made from templates and counters, so that 16 million of them
//! need no memory and no file.
//!
//! A pass holds one frame of each connection in each direction. Connection `i` of
//! `n` is remote `i mod remotes`, UDP port `1024 + i / remotes` there and 8080 at the
//! guest `remote mod guests`. Bursts alternate between the wire (any guest) and one
//! guest; both walk the connections in an order that looks random, and after the
//! first pass half a pass apart, so that neither finds warm what the other touched.
//!
//! The headers are written for each packet, the payload is not: on a card the
//! device puts it into memory, not the core. Sizes are of the guest's frame and count
//! 4 bytes of check sequence that are not in memory.

use std::net::Ipv4Addr;

use dataplane::packet::{Packet, Pool};
use dataplane::pipeline::Device;
use dataplane::{Mac, Mapping, NetworkConfig, PortConfig, PortId, Prefix, Protocol, Remote, Rule, Snapshot, Underlay, Vni, headers};

use super::frame::{self, ENCAPSULATION};
use super::source::{BURST, Source};
use super::world::{self, World};

const VNI: Vni = Vni(100);
const SERVICE: u16 = 8080;
const FIRST_PORT: u16 = 1024;
/// Connections of one remote address, and of one guest, at most.
const SHARE: u32 = 1 << 15;
const REMOTES_MIN: u32 = 64;
/// Cards around this one.
const CARDS: u32 = 64;
const CARD: Underlay =
    Underlay { address: Ipv4Addr::new(10, 255, 0, 1), prefix_length: 16, mac: Mac([0x02, 0, 0, 0xff, 0, 1]), encapsulated: true };
/// Bytes of a template: all headers of VXLAN, rounded up to cache lines.
const HEADERS: usize = 128;
const CHECK_SEQUENCE: usize = 4;
/// Where the remote's port stands in frames from the wire and from guests.
const PORT_IN_WIRE: usize = ENCAPSULATION + headers::ETHERNET + headers::IPV4;
const PORT_IN_GUEST: usize = headers::ETHERNET + headers::IPV4 + 2;

/// Lengths of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Size {
    /// 64 bytes.
    #[value(name = "64")]
    Small,
    /// 28 of 64, 16 of 570 and 4 of 1,518 bytes.
    #[value(name = "imix")]
    Imix,
    /// 1,518 bytes.
    #[value(name = "1518")]
    Full,
    /// 9,000 bytes.
    #[value(name = "9000")]
    Jumbo,
}

impl Size {
    /// Bytes of frames, one after another.
    fn sequence(self) -> &'static [usize] {
        match self {
            Size::Small => &[64],
            Size::Imix => &[64, 570, 64, 64, 570, 64, 1518, 64, 570, 64, 570, 64],
            Size::Full => &[1518],
            Size::Jumbo => &[9000],
        }
    }

    /// Mean bytes of a guest's frame.
    pub fn mean(self) -> f64 {
        let sequence = self.sequence();
        sequence.iter().sum::<usize>() as f64 / sequence.len() as f64
    }

    /// As the command line writes it.
    pub fn name(self) -> &'static str {
        match self {
            Size::Small => "64",
            Size::Imix => "imix",
            Size::Full => "1518",
            Size::Jumbo => "9000",
        }
    }
}

/// What traffic and world look like. Counts are powers of two, so that a connection
/// is taken apart with shifts.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Connections, a power of two.
    pub connections: u32,
    /// Guests, a power of two.
    pub guests: u32,
    /// Rules of each direction; the last one matches.
    pub rules: usize,
    /// Lengths of frames.
    pub size: Size,
}

impl Shape {
    /// At least `connections` of them, a power of two, over as many guests as a
    /// port's share of the flow table asks for.
    pub fn new(connections: u32, size: Size) -> Self {
        let connections = connections.clamp(256, 1 << 24).next_power_of_two();
        Self { connections, guests: (connections / SHARE).max(1), rules: 1, size }
    }

    fn remotes(&self) -> u32 {
        (self.connections / SHARE).max(REMOTES_MIN).max(self.guests)
    }

    /// The card and its surroundings.
    pub fn world(&self) -> World {
        let guests = (0..self.guests).map(|guest| self.port(guest)).collect();
        let remotes = (0..self.remotes()).map(|remote| Mapping::new(remote_address(remote), mac(remote_address(remote)), vtep(remote)));
        let ours = (0..self.guests).map(|guest| Mapping::new(guest_address(guest), mac(guest_address(guest)), CARD.address));
        let network = NetworkConfig::new(VNI, remotes.chain(ours).collect());
        World {
            settings: world::settings(CARD),
            snapshot: Snapshot { ports: guests, networks: vec![network], ..Snapshot::default() },
            neighbours: (0..CARDS).map(|card| (mac(vtep(card)), vtep(card))).collect(),
            notes: vec![format!(
                "{} connections between {} guests and {} remote addresses on {CARDS} cards, {} rules in each direction",
                self.connections,
                self.guests,
                self.remotes(),
                self.rules
            )],
        }
    }

    fn port(&self, guest: u32) -> PortConfig {
        let address = guest_address(guest);
        let (ingress, egress) = (rules(self.rules, (SERVICE, SERVICE)), rules(self.rules, (0, u16::MAX)));
        PortConfig { ingress, egress, ..world::port(PortId(guest + 1), VNI, mac(address), address) }
    }

    /// The traffic.
    pub fn source(&self) -> Conversations {
        let lengths: Vec<usize> = {
            let mut lengths = self.size.sequence().to_vec();
            lengths.sort_unstable();
            lengths.dedup();
            lengths
        };
        let template = |remote: u32, length: usize, wire: bool| {
            let (near, far) = (guest_address(remote % self.guests), remote_address(remote));
            let payload = length - CHECK_SEQUENCE - headers::ETHERNET - headers::IPV4 - headers::UDP;
            if wire {
                let inner = frame::udp((mac(far), far, FIRST_PORT), (mac(near), near, SERVICE), payload);
                let from = (mac(vtep(remote)), vtep(remote));
                Template::new(&frame::encapsulate(&inner, from, &CARD, VNI, world::entropy(far)))
            } else {
                Template::new(&frame::udp((mac(near), near, SERVICE), (dataplane::ROUTER_MAC, far, FIRST_PORT), payload))
            }
        };
        let all = |wire| {
            let of = |length: &usize| (0..self.remotes()).map(|remote| template(remote, *length, wire)).collect();
            lengths.iter().map(of).collect::<Vec<Vec<Template>>>()
        };
        let kinds = self.size.sequence().iter().map(|length| lengths.iter().position(|other| other == length).unwrap_or(0)).collect();
        Conversations {
            connections: self.connections,
            guests: self.guests,
            remotes: self.remotes(),
            burst: u32::try_from(BURST).unwrap_or(64).min(self.connections / self.guests),
            wire: all(true),
            guest: all(false),
            kinds,
            drawn: 0,
            at: 0,
            from_guest: false,
            lag: 0,
        }
    }
}

/// The first bytes of a frame, and how long all of it is.
#[derive(Debug, Clone)]
struct Template {
    headers: [u8; HEADERS],
    length: usize,
}

impl Template {
    fn new(frame: &[u8]) -> Self {
        let mut headers = [0; HEADERS];
        headers.iter_mut().zip(frame).for_each(|(to, from)| *to = *from);
        Self { headers, length: frame.len() }
    }

    #[inline]
    fn write(&self, packet: &mut Packet, at: usize, port: u16) {
        if let Some(room) = packet.room_mut().first_chunk_mut::<HEADERS>() {
            *room = self.headers;
            headers::write(room, at, port.to_be_bytes());
        }
        // Templates are shorter than packets.
        let fits = packet.set_len(self.length);
        debug_assert!(fits);
    }
}

/// The traffic of a [`Shape`].
#[derive(Debug)]
pub struct Conversations {
    connections: u32,
    guests: u32,
    remotes: u32,
    burst: u32,
    /// By length and remote.
    wire: Vec<Vec<Template>>,
    guest: Vec<Vec<Template>>,
    /// Which length comes next, by turns.
    kinds: Vec<usize>,
    drawn: usize,
    /// The burst of the pass that comes next, in each direction.
    at: u32,
    from_guest: bool,
    /// How far the guests are behind the wire, in bursts.
    lag: u32,
}

impl Source for Conversations {
    fn pass(&self) -> u64 {
        2 * u64::from(self.connections)
    }

    #[inline]
    fn next(&mut self, pool: &mut Pool, burst: &mut Vec<Packet>) -> Device {
        self.from_guest = !self.from_guest;
        if self.from_guest { self.next_of_wire(pool, burst) } else { self.next_of_guest(pool, burst) }
    }
}

impl Conversations {
    /// The next burst from the wire; the next one of a guest is of the same place in
    /// the pass.
    #[inline]
    pub fn next_of_wire(&mut self, pool: &mut Pool, burst: &mut Vec<Packet>) -> Device {
        for number in 0..self.burst {
            let connection = shuffle(self.at * self.burst + number, self.connections);
            let remote = connection & (self.remotes - 1);
            self.push(pool, burst, true, remote, connection >> self.remotes.trailing_zeros());
        }
        Device::Underlay
    }

    /// The next burst of a guest, which ends the place in the pass.
    #[inline]
    pub fn next_of_guest(&mut self, pool: &mut Pool, burst: &mut Vec<Packet>) -> Device {
        let bursts = self.connections / self.burst;
        let at = (self.at + self.lag) & (bursts - 1);
        let (guest, share) = (at & (self.guests - 1), self.connections / self.guests);
        let (guests, remotes) = (self.guests.trailing_zeros(), self.remotes / self.guests);
        for number in 0..self.burst {
            let connection = shuffle((at >> guests) * self.burst + number, share);
            let remote = guest + ((connection & (remotes - 1)) << guests);
            self.push(pool, burst, false, remote, connection >> remotes.trailing_zeros());
        }
        self.advance();
        Device::Port(PortId(guest + 1))
    }

    /// Goes on to the next place of the pass.
    #[inline]
    pub fn advance(&mut self) {
        let bursts = self.connections / self.burst;
        self.at += 1;
        if self.at == bursts {
            self.at = 0;
            self.lag = bursts / 2;
        }
    }

    #[inline]
    fn push(&mut self, pool: &mut Pool, burst: &mut Vec<Packet>, wire: bool, remote: u32, port: u32) {
        let (templates, at) = if wire { (&self.wire, PORT_IN_WIRE) } else { (&self.guest, PORT_IN_GUEST) };
        self.drawn = if self.drawn + 1 < self.kinds.len() { self.drawn + 1 } else { 0 };
        let template = self.kinds.get(self.drawn).and_then(|kind| templates.get(*kind)).and_then(|remotes| remotes.get(remote as usize));
        if let Some(template) = template {
            let mut packet = pool.get();
            // At most SHARE ports for each remote, from FIRST_PORT on.
            template.write(&mut packet, at, FIRST_PORT + u16::try_from(port).unwrap_or(0));
            burst.push(packet);
        }
    }
}

/// A permutation of 0..`count`, a power of two, that looks random.
#[inline]
fn shuffle(index: u32, count: u32) -> u32 {
    let mask = count - 1;
    let mixed = index.wrapping_mul(0x9e37_79b1) & mask;
    let mixed = mixed ^ mixed >> (count.trailing_zeros() / 2).max(1);
    mixed.wrapping_mul(0x85eb_ca6b) & mask
}

/// `count` UDP rules, of which the last, to `ports` from the VPC, matches.
fn rules(count: usize, ports: (u16, u16)) -> Vec<Rule> {
    let rule = |ports, remote| Rule { protocol: Protocol::Number(headers::UDP_PROTOCOL), ports: Some(ports), icmp: (None, None), remote };
    let other = |number: u32| rule((1, 1023), Remote::Prefix(Prefix::new((0xac10_0000 + (number << 4)).into(), 28)));
    let mut rules: Vec<Rule> = (0..).map(other).take(count.saturating_sub(1)).collect();
    rules.push(rule(ports, Remote::Prefix(Prefix::new(Ipv4Addr::new(10, 0, 0, 0), 16))));
    rules
}

fn guest_address(guest: u32) -> Ipv4Addr {
    address(1, guest)
}

fn remote_address(remote: u32) -> Ipv4Addr {
    address(128, remote)
}

/// The address of number `number` in 10.0.`first`.0 and what follows: 200 a subnet.
fn address(first: u32, number: u32) -> Ipv4Addr {
    (0x0a00_0000 + ((first + number / 200) << 8) + 5 + number % 200).into()
}

fn vtep(remote: u32) -> Ipv4Addr {
    (0x0aff_0101 + remote % CARDS).into()
}

fn mac(address: Ipv4Addr) -> Mac {
    let [a, b, c, d] = address.octets();
    Mac([0x02, 0x10, a, b, c, d])
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn shuffling_is_a_permutation() {
        for bits in 6..14 {
            let count = 1 << bits;
            let seen: HashSet<u32> = (0..count).map(|index| shuffle(index, count)).collect();
            assert_eq!(seen.len(), count as usize);
            assert!(seen.iter().all(|index| *index < count));
        }
    }

    /// Both directions of every connection occur once in a pass, also in later passes.
    #[test]
    fn a_pass_holds_each_connection_once_in_each_direction() {
        let shape = Shape { guests: 4, ..Shape::new(1024, Size::Imix) };
        let (mut source, mut pool) = (shape.source(), Pool::new(64));
        for _ in 0..3 {
            let (mut wire, mut guest, mut frames) = (HashSet::new(), HashSet::new(), 0);
            while frames < source.pass() {
                let mut burst = Vec::new();
                let device = source.next(&mut pool, &mut burst);
                for packet in &burst {
                    let frame = frame::dissect(packet.as_slice());
                    let (inner, bytes) = (frame.inner.unwrap(), packet.as_slice());
                    match frame.outer {
                        Some(_) => {
                            let port: [u8; 2] = headers::read(bytes, PORT_IN_WIRE).unwrap();
                            assert!(wire.insert((inner.source.1, inner.destination.1, port)));
                        }
                        None => {
                            let port: [u8; 2] = headers::read(bytes, PORT_IN_GUEST).unwrap();
                            assert!(guest.insert((inner.destination.1, inner.source.1, port)));
                            assert_eq!(device, Device::Port(shape.port(u32::from(inner.source.1.octets()[3]) - 5).id));
                        }
                    }
                }
                frames += burst.len() as u64;
                pool.put_all(&mut burst);
            }
            assert_eq!((wire.len(), frames), (1024, 2048));
            assert_eq!(wire, guest);
        }
    }

    #[test]
    fn imix_has_the_mean_that_its_definition_gives() {
        assert!((Size::Imix.mean() - (28.0 * 64.0 + 16.0 * 570.0 + 4.0 * 1518.0) / 48.0).abs() < 1e-9);
    }
}
