//! Cards on one underlay and one public wire, driven by hand.

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::action::Output;
use crate::arp;
use crate::counters::DropReason;
use crate::headers::{self, ETHERNET, IPV4};
use crate::packet::{Packet, Pool};
use crate::pipeline::{Device, Pipeline, ROUTER_MAC, Turn};
use crate::policy::Tables;
use crate::*;

pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub const GATEWAY_MAC: Mac = Mac([0x0a, 9, 9, 9, 9, 9]);
pub const ANY: Remote = Remote::Prefix(Prefix::new(Ipv4Addr::UNSPECIFIED, 0));
pub const MTU: u16 = 9001;

pub fn vtep(card: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 255, 0, card)
}

pub fn underlay_mac(card: u8) -> Mac {
    Mac([2, 0, 0, 0, 0xff, card])
}

pub fn public_mac(card: u8) -> Mac {
    Mac([2, 0, 0, 0, 0xee, card])
}

pub struct Card {
    pub pipeline: Pipeline,
    pub snapshot: Snapshot,
    tables: Tables,
    pool: Pool,
    out: Output,
}

/// What came out of the cards at their edges.
#[derive(Default, Debug)]
pub struct Seen {
    /// (card, port, frame)
    pub guests: Vec<(u8, u32, Vec<u8>)>,
    pub public: Vec<Vec<u8>>,
    pub underlay: Vec<Vec<u8>>,
    pub punted: Vec<Vec<u8>>,
}

pub struct Lab {
    pub cards: Vec<Card>,
    pub now: Duration,
    /// Whether ARP on the public wire is answered, for the gateway.
    pub gateway_answers: bool,
}

pub fn settings(card: u8) -> Settings {
    Settings {
        underlay: Underlay { address: vtep(card), prefix_length: 24, mac: underlay_mac(card), encapsulated: true },
        public: Some(PublicSide { mac: public_mac(card), gateway: GATEWAY, prefix_length: 24 }),
        flows_max: flow::FLOWS_MAX,
        seed: 7,
    }
}

impl Lab {
    /// Cards 0, 1, ... with nothing on them.
    pub fn new(cards: u8) -> Self {
        let card = |n| Card {
            pipeline: Pipeline::new(settings(n)),
            snapshot: Snapshot::default(),
            tables: Tables::default(),
            pool: Pool::new(256),
            out: Output::default(),
        };
        Self { cards: (0..cards).map(card).collect(), now: Duration::ZERO, gateway_answers: true }
    }

    /// Puts ports on a card and maps them in their network on all cards.
    pub fn place(&mut self, card: u8, ports: Vec<PortConfig>) {
        for port in ports {
            let mapping = Mapping { forwards: !port.source_dest_check, ..Mapping::new(port.ipv4, port.mac, vtep(card)) };
            for other in &mut self.cards {
                let networks = &mut other.snapshot.networks;
                if !networks.iter().any(|network| network.vni == port.vni) {
                    networks.push(NetworkConfig::new(port.vni, Vec::new()));
                }
                let network = networks.iter_mut().find(|network| network.vni == port.vni).unwrap();
                network.mappings.push(mapping);
            }
            self.cards[usize::from(card)].snapshot.ports.push(port);
        }
        self.apply();
    }

    /// Puts a NAT gateway on a card and maps it in its network on all cards.
    pub fn place_gateway(&mut self, card: u8, gateway: NatGatewayConfig) {
        for other in &mut self.cards {
            let networks = &mut other.snapshot.networks;
            if !networks.iter().any(|network| network.vni == gateway.vni) {
                networks.push(NetworkConfig::new(gateway.vni, Vec::new()));
            }
            let network = networks.iter_mut().find(|network| network.vni == gateway.vni).unwrap();
            network.mappings.push(Mapping::new(gateway.ipv4, gateway.mac, vtep(card)));
        }
        self.cards[usize::from(card)].snapshot.nat_gateways.push(gateway);
        self.apply();
    }

    /// Changes a network on every card.
    pub fn network(&mut self, vni: u32, change: impl Fn(&mut NetworkConfig)) {
        for card in &mut self.cards {
            card.snapshot.networks.iter_mut().filter(|network| network.vni == Vni(vni)).for_each(&change);
        }
        self.apply();
    }

    /// Applies every card's snapshot and lets announcements go out.
    pub fn apply(&mut self) -> Seen {
        for card in &mut self.cards {
            card.tables = Tables::compile(&card.snapshot, &card.tables);
            card.pipeline.apply(self.now, &card.tables);
        }
        self.tick()
    }

    pub fn port(&mut self, card: u8, id: u32) -> &mut PortConfig {
        let ports = &mut self.cards[usize::from(card)].snapshot.ports;
        ports.iter_mut().find(|port| port.id == PortId(id)).unwrap()
    }

    /// Lets the guest of a port send a frame, and everything happen that follows.
    pub fn send(&mut self, card: u8, port: u32, frame: &[u8]) -> Seen {
        self.feed(card, Device::Port(PortId(port)), frame)
    }

    /// Gives a frame to a device and carries what comes out over the wires until
    /// nothing moves.
    pub fn feed(&mut self, card: u8, device: Device, frame: &[u8]) -> Seen {
        let mut seen = Seen::default();
        let mut todo = vec![(card, device, frame.to_vec())];
        while let Some((card, device, frame)) = todo.pop() {
            self.one(card, device, &frame);
            self.collect(card, &mut seen, &mut todo);
        }
        seen
    }

    /// Calls every due timer.
    pub fn tick(&mut self) -> Seen {
        let mut seen = Seen::default();
        let mut todo = Vec::new();
        for n in 0..self.cards.len() {
            let card = &mut self.cards[n];
            let mut turn = Turn { now: self.now, pool: &mut card.pool, out: &mut card.out };
            if card.pipeline.due().is_some_and(|due| due <= self.now) {
                card.pipeline.tick(&mut turn);
            }
            self.collect(u8::try_from(n).unwrap(), &mut seen, &mut todo);
        }
        while let Some((card, device, frame)) = todo.pop() {
            self.one(card, device, &frame);
            self.collect(card, &mut seen, &mut todo);
        }
        seen
    }

    /// Lets time pass, with every timer called when it is due.
    pub fn wait(&mut self, time: Duration) -> Seen {
        let (end, mut seen) = (self.now + time, Seen::default());
        loop {
            let due = self.cards.iter().filter_map(|card| card.pipeline.due()).min();
            self.now = due.map_or(end, |due| due.clamp(self.now, end));
            let more = self.tick();
            seen.guests.extend(more.guests);
            seen.public.extend(more.public);
            seen.underlay.extend(more.underlay);
            if self.now == end {
                return seen;
            }
        }
    }

    fn one(&mut self, card: u8, device: Device, frame: &[u8]) {
        let card = &mut self.cards[usize::from(card)];
        let mut packet = Packet::new();
        assert!(packet.copy_from(frame));
        let mut turn = Turn { now: self.now, pool: &mut card.pool, out: &mut card.out };
        card.pipeline.turn(&mut turn, device, &mut vec![packet]);
    }

    fn collect(&mut self, from: u8, seen: &mut Seen, todo: &mut Vec<(u8, Device, Vec<u8>)>) {
        let count = u8::try_from(self.cards.len()).unwrap();
        let card = &mut self.cards[usize::from(from)];
        for packet in card.out.underlay.drain(..) {
            let frame = packet.as_slice().to_vec();
            todo.extend(
                (0..count).filter(|to| *to != from && hears(&frame, underlay_mac(*to))).map(|to| (to, Device::Underlay, frame.clone())),
            );
            seen.underlay.push(frame);
        }
        for packet in card.out.public.drain(..) {
            let frame = packet.as_slice().to_vec();
            todo.extend(
                (0..count).filter(|to| *to != from && hears(&frame, public_mac(*to))).map(|to| (to, Device::Public, frame.clone())),
            );
            if self.gateway_answers
                && let Ok((_, body)) = headers::ethernet(&frame)
                && let Ok(message) = arp::parse(body)
                && (message.operation, message.target.1) == (arp::REQUEST, GATEWAY)
            {
                todo.push((from, Device::Public, arp_frame(arp::REPLY, (GATEWAY_MAC, GATEWAY), message.sender)));
            }
            seen.public.push(frame);
        }
        seen.punted.extend(card.out.punted.drain(..).map(|(_, packet)| packet.as_slice().to_vec()));
        card.out.drain_ports(&mut card.pool, |_, id, packets| {
            seen.guests.extend(packets.drain(..).map(|packet| (from, id.0, packet.as_slice().to_vec())));
        });
    }

    pub fn drops(&self, card: u8, reason: DropReason) -> u64 {
        self.cards[usize::from(card)].pipeline.board().read().drops.get(reason)
    }

    /// Drops of all cards together, every reason.
    pub fn drops_by_reason(&self) -> Vec<(DropReason, u64)> {
        let cards: Vec<_> = self.cards.iter().map(|card| card.pipeline.board().read().drops).collect();
        DropReason::ALL.iter().map(|reason| (*reason, cards.iter().map(|drops| drops.get(*reason)).sum())).collect()
    }

    pub fn all_drops(&self, card: u8) -> u64 {
        self.cards[usize::from(card)].pipeline.board().read().drops.total()
    }
}

fn hears(frame: &[u8], mac: Mac) -> bool {
    frame[..6] == mac.0 || frame[..6] == [0xff; 6]
}

impl Seen {
    /// The one frame that a guest received; nobody else may have got any.
    #[track_caller]
    pub fn only(&self, card: u8, port: u32) -> &[u8] {
        match &self.guests[..] {
            [(c, p, frame)] if (*c, *p) == (card, port) => frame,
            other => panic!("expected one frame at card {card} port {port}, got {other:?}"),
        }
    }

    #[track_caller]
    pub fn nothing(&self) {
        assert!(self.guests.is_empty(), "{:?}", self.guests);
    }

    /// The one IP frame on the public wire.
    #[track_caller]
    pub fn only_public(&self) -> &[u8] {
        let ip: Vec<_> = self.public.iter().filter(|frame| frame[12..14] == [8, 0]).collect();
        assert_eq!(ip.len(), 1, "{:?}", self.public);
        ip[0]
    }
}

/// A port with MAC 02:00:<address>, in 10.0.<n>.0/24 of 10.0.0.0/16, that lets
/// everything out and nothing in.
pub fn guest(id: u32, vni: u32, ipv4: [u8; 4]) -> PortConfig {
    let [a, b, c, d] = ipv4;
    PortConfig {
        vpc_prefixes: vec![Prefix::new([a, b, 0, 0].into(), 16)],
        mtu: MTU,
        egress: vec![Rule { protocol: Protocol::Any, ports: None, icmp: (None, None), remote: ANY }],
        routes: vec![Route { destination: Prefix::new(Ipv4Addr::UNSPECIFIED, 0), target: RouteTarget::InternetGateway }],
        dhcp: Dhcp {
            hostname: "ip-10-0-0-5".into(),
            domain: "ec2.internal".into(),
            dns: vec![[10, 0, 0, 2].into()],
            ntp: vec![[169, 254, 169, 123].into()],
        },
        ..PortConfig::new(PortId(id), Vni(vni), Mac([2, 0, a, b, c, d]), ipv4.into(), Prefix::new([a, b, c, 0].into(), 24))
    }
}

/// Sends what begins with `prefix` to `target`.
pub fn route(prefix: [u8; 4], length: u8, target: RouteTarget) -> Route {
    Route { destination: Prefix::new(prefix.into(), length), target }
}

/// A rule of an ACL for TCP.
pub fn acl_tcp(allow: bool, ports: (u16, u16), remote: Prefix) -> AclRule {
    AclRule { allow, protocol: Protocol::Number(6), ports: Some(ports), icmp: (None, None), remote }
}

pub const EVERYWHERE: Prefix = Prefix::new(Ipv4Addr::UNSPECIFIED, 0);

pub fn tcp_rule(port: u16, remote: Remote) -> Rule {
    Rule { protocol: Protocol::Number(6), ports: Some((port, port)), icmp: (None, None), remote }
}

pub fn udp_rule(port: u16, remote: Remote) -> Rule {
    Rule { protocol: Protocol::Number(17), ports: Some((port, port)), icmp: (None, None), remote }
}

pub fn icmp_rule(remote: Remote) -> Rule {
    Rule { protocol: Protocol::Number(1), ports: None, icmp: (None, None), remote }
}

/// One end of a conversation, as its frames name it.
#[derive(Clone, Copy)]
pub struct End {
    pub mac: Mac,
    pub ip: Ipv4Addr,
    pub port: u16,
}

pub fn end(ipv4: [u8; 4], port: u16) -> End {
    let [a, b, c, d] = ipv4;
    End { mac: Mac([2, 0, a, b, c, d]), ip: ipv4.into(), port }
}

/// The same end, reached through the router.
pub fn via_router(end: End) -> End {
    End { mac: ROUTER_MAC, ..end }
}

pub fn frame(from: End, to: End, protocol: u8, (id, flags): (u16, u16), mut payload: Vec<u8>) -> Vec<u8> {
    let at = match protocol {
        6 => Some(16),
        17 => Some(6),
        1 => Some(2),
        _ => None,
    };
    if let Some(at) = at {
        headers::write(&mut payload, at, [0, 0]);
        let sum = match headers::transport_checksum(from.ip, to.ip, protocol, &payload) {
            0 if protocol == 17 => 0xffff,
            sum => sum,
        };
        headers::write(&mut payload, at, sum.to_be_bytes());
    }
    let mut bytes = vec![0; ETHERNET + IPV4];
    headers::write_ethernet(&mut bytes, to.mac, from.mac, headers::TYPE_IPV4);
    headers::write_ipv4(&mut bytes[ETHERNET..], (from.ip, to.ip), protocol, (id, flags), payload.len());
    bytes.extend(payload);
    bytes
}

pub fn tcp(from: End, to: End, flags: u8, data: &[u8]) -> Vec<u8> {
    let mut segment = vec![0; 20];
    headers::write(&mut segment, 0, from.port.to_be_bytes());
    headers::write(&mut segment, 2, to.port.to_be_bytes());
    headers::write(&mut segment, 12, [0x50, flags]);
    segment.extend(data);
    frame(from, to, 6, (1, 0x4000), segment)
}

pub fn udp_datagram(from: End, to: End, data: &[u8]) -> Vec<u8> {
    let mut datagram = vec![0; 8];
    headers::write(&mut datagram, 0, from.port.to_be_bytes());
    headers::write(&mut datagram, 2, to.port.to_be_bytes());
    headers::write(&mut datagram, 4, u16::try_from(8 + data.len()).unwrap().to_be_bytes());
    datagram.extend(data);
    datagram
}

pub fn udp(from: End, to: End, data: &[u8]) -> Vec<u8> {
    frame(from, to, 17, (1, 0), udp_datagram(from, to, data))
}

pub fn ping(from: End, to: End, icmp_type: u8, id: u16) -> Vec<u8> {
    let [i0, i1] = id.to_be_bytes();
    frame(from, to, 1, (1, 0), vec![icmp_type, 0, 0, 0, i0, i1, 0, 1, 1, 2, 3, 4])
}

pub fn arp_frame(operation: u16, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
    let mut packet = Packet::new();
    let to = if operation == arp::REQUEST { Mac::BROADCAST } else { target.0 };
    arp::frame(&mut packet, to, &arp::Message { operation, sender, target });
    packet.as_slice().to_vec()
}

/// Parses an IPv4 frame and proves that every checksum of it is right.
#[track_caller]
pub fn parse(frame: &[u8]) -> (headers::Ethernet, headers::Ipv4, headers::Transport) {
    let (ethernet, bytes) = headers::ethernet(frame).unwrap();
    let ip = headers::ipv4(bytes).unwrap();
    assert_eq!(bytes.len(), ip.total_len);
    let payload = &bytes[ip.header_len..];
    if !ip.is_fragment() && matches!(ip.protocol, 1 | 6 | 17) {
        assert_eq!(headers::transport_checksum(ip.source, ip.destination, ip.protocol, payload), 0, "transport checksum");
    }
    let transport = if ip.fragment_offset == 0 { headers::transport(&ip, payload).unwrap() } else { Default::default() };
    (ethernet, ip, transport)
}

/// A frame of another card's guest, as it comes over the underlay.
pub fn encapsulated(from: Ipv4Addr, to_card: u8, vni: u32, inner: &[u8]) -> Vec<u8> {
    let mut packet = Packet::new();
    assert!(packet.copy_from(inner) && vxlan::push_header(&mut packet, Vni(vni)));
    let sender = Underlay { address: from, prefix_length: 24, mac: Mac([2, 0, 0, 0, 1, 1]), encapsulated: true };
    assert!(vxlan::push_outer(&mut packet, &sender, vtep(to_card), 0xc000));
    headers::write(packet.as_mut_slice(), 0, underlay_mac(to_card).0);
    packet.as_slice().to_vec()
}
