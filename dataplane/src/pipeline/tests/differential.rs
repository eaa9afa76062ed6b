//! The fast path against the authority: the same frames through two pipelines, one
//! of which has no fast path. What comes out, in its order, and all counters and
//! flows have to be equal.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use super::lab::*;
use crate::action::Output;
use crate::arp;
use crate::counters::{DropReason, Drops};
use crate::headers::{self, tcp as flag};
use crate::packet::{Packet, Pool};
use crate::pipeline::{Device, Pipeline, Turn};
use crate::policy::Tables;
use crate::*;

/// Packets of one run.
const PACKETS: usize = 120_000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, bound: usize) -> usize {
        self.next() as usize % bound
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// One pipeline with what it works with.
struct Side {
    pipeline: Pipeline,
    pool: Pool,
    out: Output,
}

/// All that came out of a side, by device, in order.
type Seen = (Vec<Vec<u8>>, Vec<Vec<u8>>, Vec<(PortId, Vec<u8>)>, Vec<(PortId, Vec<u8>)>);

impl Side {
    fn new(fast: bool) -> Self {
        let settings = Settings { flows_max: 600, ..settings(0) };
        let mut pipeline = Pipeline::with_fast_path(settings, fast);
        pipeline.flows.set_shares(400, 150, 2);
        Self { pipeline, pool: Pool::new(256), out: Output::default() }
    }

    fn turn(&mut self, now: Duration, device: Device, frames: &[Vec<u8>]) -> Seen {
        let mut packets = Vec::new();
        for frame in frames {
            let mut packet = Packet::new();
            assert!(packet.copy_from(frame));
            packets.push(packet);
        }
        self.pipeline.turn(&mut Turn { now, pool: &mut self.pool, out: &mut self.out }, device, &mut packets);
        self.seen()
    }

    fn tick(&mut self, now: Duration) -> Seen {
        if self.pipeline.due().is_some_and(|due| due <= now) {
            self.pipeline.tick(&mut Turn { now, pool: &mut self.pool, out: &mut self.out });
        }
        self.seen()
    }

    fn seen(&mut self) -> Seen {
        let bytes = |packets: &mut Vec<Packet>| packets.drain(..).map(|packet| packet.as_slice().to_vec()).collect::<Vec<_>>();
        let underlay = bytes(&mut self.out.underlay);
        let public = bytes(&mut self.out.public);
        let punted = self.out.punted.drain(..).map(|(id, packet)| (id, packet.as_slice().to_vec())).collect();
        let mut guests = Vec::new();
        self.out.drain_ports(&mut self.pool, |_, id, packets| guests.extend(bytes(packets).into_iter().map(|frame| (id, frame))));
        (underlay, public, punted, guests)
    }
}

/// Addresses on the card and, with the number of their card, elsewhere. VPC 300 is a peer of 100.
const HERE: [(u32, u32, [u8; 4]); 5] =
    [(1, 100, [10, 0, 0, 5]), (2, 100, [10, 0, 0, 6]), (3, 100, [10, 0, 1, 7]), (4, 200, [10, 0, 0, 5]), (5, 300, [10, 9, 0, 5])];
const THERE: [(u8, [u8; 4]); 6] =
    [(1, [10, 0, 0, 20]), (1, [10, 0, 1, 21]), (2, [10, 0, 0, 22]), (3, [10, 0, 2, 23]), (3, [10, 0, 0, 24]), (2, [10, 9, 0, 30])];
/// A second address of port 1, and a NAT gateway of this card and one of another.
const SECOND: [u8; 4] = [10, 0, 0, 8];
const NAT: [[u8; 4]; 2] = [[10, 0, 0, 40], [10, 0, 0, 41]];
const INTERNET: [[u8; 4]; 2] = [[203, 0, 113, 9], [192, 0, 2, 7]];

fn random_rules(random: &mut Random) -> Vec<Rule> {
    let all = |remote| Rule { protocol: Protocol::Any, ports: None, icmp: (None, None), remote };
    let inside = Remote::Prefix(Prefix::new([10, 0, 0, 0].into(), 8));
    match random.below(20) {
        0 => vec![],
        1 => vec![tcp_rule(80, ANY), udp_rule(53, Remote::Prefix(Prefix::new([10, 0, 0, 0].into(), 24)))],
        2 => vec![all(Remote::Group(GroupId(1)))],
        3 => vec![Rule { protocol: Protocol::Number(17), ..all(ANY) }, all(inside)],
        // Between rules for anybody nothing is tracked.
        4..12 => vec![all(ANY)],
        _ => vec![all(inside), Rule { protocol: Protocol::Number(1), ..all(ANY) }],
    }
}

fn random_acl(random: &mut Random) -> Option<Acl> {
    let all = AclRule { allow: true, protocol: Protocol::Any, ports: None, icmp: (None, None), remote: EVERYWHERE };
    let mut rules = || {
        let some =
            acl_tcp(false, random.pick(&[(53, 53), (80, 80), (1000, 2000)]), Prefix::new([10, 0, 0, 0].into(), random.pick(&[0, 16, 23])));
        if random.one_in(4) { vec![some] } else { vec![some, all] }
    };
    let acl = Acl { ingress: rules(), egress: rules() };
    random.one_in(3).then_some(acl)
}

fn random_routes(random: &mut Random) -> Vec<Route> {
    let outside = match random.below(4) {
        0 => RouteTarget::InternetGateway,
        1 => RouteTarget::NatGateway(NAT[0].into()),
        2 => RouteTarget::NatGateway(NAT[1].into()),
        _ => RouteTarget::NetworkInterface(random.pick(&[HERE[1].2, HERE[2].2, THERE[0].1]).into()),
    };
    let mut routes = vec![route([0, 0, 0, 0], 0, outside)];
    if !random.one_in(6) {
        routes.push(route([10, 9, 0, 0], 16, RouteTarget::Peer(Vni(300))));
        routes.push(route([10, 0, 0, 0], 15, RouteTarget::Peer(Vni(100))));
    }
    if random.one_in(6) {
        routes.push(route([203, 0, 113, 0], 24, RouteTarget::Blackhole));
    }
    routes
}

/// Tight enough that some of it is exceeded.
fn random_limits(random: &mut Random) -> Limits {
    Limits {
        packets_per_s: random.pick(&[0, 0, 3000]),
        baseline_bits_per_s: random.pick(&[0, 0, 20_000]),
        connections: random.pick(&[0, 12, 60]),
        ..Limits::default()
    }
}

fn random_snapshot(random: &mut Random) -> Snapshot {
    let mut ports = Vec::new();
    let instances = [random_limits(random), random_limits(random)];
    for (id, vni, address) in HERE {
        if random.one_in(12) {
            continue;
        }
        let mut port = guest(id, vni, address);
        port.ingress = random_rules(random);
        port.egress = if random.one_in(4) { random_rules(random) } else { port.egress };
        port.source_dest_check = !random.one_in(4);
        port.mtu = random.pick(&[9001, 9001, 9001, 1500, 90]);
        port.public = (id == 1).then_some([198, 51, 100, 16].into());
        if id == 1 && !random.one_in(6) {
            port.secondary.push(Address { private: SECOND.into(), public: random.one_in(2).then_some([198, 51, 100, 17].into()) });
        }
        port.acl = random_acl(random);
        port.routes = random_routes(random);
        if random.one_in(3) {
            let instance = random.below(2);
            port.allowance = Some(AllowanceConfig { id: AllowanceId(instance as u32), limits: instances[instance] });
        }
        port.tracking = ConnectionTracking {
            tcp_established_s: random.pick(&[350, 60]),
            udp_stream_s: random.pick(&[180, 60]),
            udp_s: random.pick(&[30, 60]),
        };
        port.generation = random.next();
        ports.push(port);
    }
    let forwarding = |ip: [u8; 4]| ports.iter().any(|port| port.ipv4 == Ipv4Addr::from(ip) && !port.source_dest_check);
    let networks = [100, 200, 300].map(|vni| {
        let mut mappings: Vec<_> = HERE
            .iter()
            .filter(|(_, of, _)| *of == vni)
            .map(|(_, _, ip)| Mapping { forwards: forwarding(*ip), ..Mapping::new((*ip).into(), end(*ip, 0).mac, vtep(0)) })
            .collect();
        for (card, ip) in THERE.iter().copied().filter(|(_, ip)| (ip[1] == 9) == (vni == 300)) {
            // Sometimes an address has moved, or is gone.
            let card = if random.one_in(12) { 2 } else { card };
            if !random.one_in(20) {
                mappings.push(Mapping { forwards: random.one_in(12), ..Mapping::new(ip.into(), end(ip, 0).mac, vtep(card)) });
            }
        }
        if vni == 100 {
            mappings.push(Mapping::new(SECOND.into(), end(HERE[0].2, 0).mac, vtep(0)));
            mappings.extend(NAT.iter().zip([0, 1]).map(|(ip, card)| Mapping::new((*ip).into(), end(*ip, 0).mac, vtep(card))));
        }
        let groups = HashMap::from([(GroupId(1), vec![THERE[0].1.into(), THERE[5].1.into(), HERE[1].2.into()])]);
        let peered = vni != 200 && !random.one_in(8);
        let peers = if peered { vec![Vni(400 - vni)] } else { Vec::new() };
        NetworkConfig { groups, peers, ..NetworkConfig::new(Vni(vni), mappings) }
    });
    let gateway = NatGatewayConfig {
        id: NatGatewayId(1),
        vni: Vni(100),
        mac: end(NAT[0], 0).mac,
        ipv4: NAT[0].into(),
        subnet: Prefix::new([10, 0, 0, 0].into(), 24),
        vpc_prefixes: vec![Prefix::new([10, 0, 0, 0].into(), 16)],
        routes: vec![route([0, 0, 0, 0], 0, RouteTarget::InternetGateway)],
        acl: random_acl(random),
        public: vec![[198, 51, 100, 40].into()],
    };
    let nat_gateways = if random.one_in(4) { Vec::new() } else { vec![gateway] };
    Snapshot { ports, networks: networks.into(), nat_gateways }
}

/// A frame between two ends, mostly of a connection that goes on.
fn random_frame(random: &mut Random, from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let ports = [1234, 80, 53];
    let client = if random.one_in(8) { 2000 + (random.next() as u16 & 0x3f) } else { random.pick(&ports) };
    let (from, mut to) = (end(from, client), end(to, random.pick(&ports)));
    if from.ip.octets()[2] != to.ip.octets()[2] {
        to = via_router(to);
    }
    let data = vec![0x5a; random.pick(&[0, 1, 5, 18, 60, 1400])];
    let flags = match random.below(60) {
        0 => flag::SYN,
        1 => flag::SYN | flag::ACK,
        2 => flag::FIN | flag::ACK,
        3 => random.next() as u8,
        _ => flag::ACK,
    };
    let mut frame = match random.below(10) {
        0 => ping(from, to, random.pick(&[8, 0, 3]), random.next() as u16 & 3),
        1..5 => udp(from, to, &data),
        _ => tcp(from, to, flags, &data),
    };
    if random.one_in(20) {
        frame[14 + 8] = random.pick(&[0, 1, 2, 255]);
        mend(&mut frame, 14);
    }
    if random.one_in(40) {
        headers::write(&mut frame, 14 + 6, random.pick(&[0x2000u16, 0x2001, 0x0003, 0x4000]).to_be_bytes());
        mend(&mut frame, 14);
    }
    frame
}

/// Puts the right checksum over an IPv4 header at `at`.
fn mend(frame: &mut [u8], at: usize) {
    if let Some(header) = frame.get_mut(at..at + 20) {
        header[10..12].fill(0);
        let sum = headers::checksum(header);
        headers::write(header, 10, sum.to_be_bytes());
    }
}

/// Damages a frame in some way, or pads it.
fn damage(random: &mut Random, frame: &mut Vec<u8>) {
    match random.below(5) {
        0 => frame.truncate(random.below(frame.len() + 1)),
        1 => frame.extend([0; 32]),
        _ => {
            for _ in 0..=random.below(3) {
                // Most fields that decide anything are in the first 110 bytes.
                let at = random.below(frame.len().min(110));
                frame[at] = if random.one_in(2) { random.next() as u8 } else { frame[at] ^ 1 << random.below(8) };
            }
            if random.one_in(2) {
                mend(frame, 14);
                mend(frame, 14 + 20 + 8 + 8 + 14);
            }
        }
    }
}

fn random_burst(random: &mut Random) -> (Device, Vec<Vec<u8>>) {
    let count = random.pick(&[1, 3, 32, 64, 70, 130]);
    let (id, _, mine) = random.pick(&[HERE[0], HERE[0], HERE[1], HERE[2], HERE[3], HERE[4]]);
    let anybody = |random: &mut Random| match random.below(24) {
        0..4 => random.pick(&HERE).2,
        4 => random.pick(&INTERNET),
        5 => SECOND,
        _ => random.pick(&THERE).1,
    };
    let device = match random.below(12) {
        0 => Device::Public,
        1..6 => Device::Underlay,
        _ => Device::Port(PortId(id)),
    };
    let frames = (0..count).map(|_| {
        let mut frame = match device {
            Device::Port(_) => {
                let to = anybody(random);
                let from = match random.below(12) {
                    0 => SECOND,
                    1 if random.one_in(3) => random.pick(&INTERNET),
                    _ => mine,
                };
                let mut frame = random_frame(random, from, to);
                // The card has one MAC, whatever address it speaks for.
                frame[6..12].copy_from_slice(&end(mine, 0).mac.0);
                frame
            }
            Device::Underlay => {
                let (card, mut from) = random.pick(&THERE);
                let (_, vni, behind) = random.pick(&[HERE[0], HERE[0], HERE[1], HERE[2], HERE[4]]);
                let to = match random.below(12) {
                    0 => SECOND,
                    1 => random.pick(&INTERNET),
                    _ => behind,
                };
                if random.one_in(12) {
                    from = random.pick(&INTERNET);
                }
                let vni = if random.one_in(20) { random.pick(&[100, 200, 300, 400]) } else { vni };
                let mut inner = random_frame(random, from, to);
                // The sender names the port, the gateway, or once in a while nobody.
                if !random.one_in(12) {
                    let mac = if random.one_in(12) { end(random.pick(&[NAT[0], HERE[1].2]), 0).mac } else { end(behind, 0).mac };
                    inner[..6].copy_from_slice(&mac.0);
                }
                if random.one_in(60) {
                    damage(random, &mut inner);
                }
                if random.one_in(50) {
                    let card = random.pick(&[1, 2, 3]);
                    arp_frame(arp::REPLY, (Mac([2, 0, 0, 0, 0xff, random.next() as u8 & 3]), vtep(card)), (underlay_mac(0), vtep(0)))
                } else {
                    let card = if random.one_in(12) { random.pick(&[1, 2, 3]) } else { card };
                    encapsulated(vtep(if random.one_in(50) { 0 } else { card }), 0, vni, &inner)
                }
            }
            Device::Public => {
                let to = End { mac: public_mac(0), ip: [198, 51, 100, random.pick(&[16, 16, 17, 40])].into(), port: 80 };
                tcp(End { mac: GATEWAY_MAC, ip: [203, 0, 113, 9].into(), port: random.next() as u16 & 7 }, to, random.pick(&[2, 16]), b"x")
            }
        };
        if random.one_in(30) {
            damage(random, &mut frame);
        }
        frame
    });
    (device, frames.collect())
}

fn run(seed: u64) -> Drops {
    let random = &mut Random(seed);
    let (mut fast, mut slow) = (Side::new(true), Side::new(false));
    let mut tables = Tables::default();
    let (mut now, mut sent) = (Duration::from_secs(1), 0);
    while sent < PACKETS {
        if sent == 0 || random.one_in(60) {
            tables = Tables::compile(&random_snapshot(random), &tables);
            fast.pipeline.apply(now, &tables);
            slow.pipeline.apply(now, &tables);
        }
        now += match random.below(200) {
            0 => Duration::from_secs(random.pick(&[12, 31, 61, 190])),
            _ => Duration::from_millis(random.next() & 0x1f),
        };
        assert_eq!(fast.tick(now), slow.tick(now), "seed {seed}: tick before packet {sent}");
        let (device, frames) = random_burst(random);
        let (left, right) = (fast.turn(now, device, &frames), slow.turn(now, device, &frames));
        if left != right {
            for (at, frame) in frames.iter().enumerate() {
                eprintln!("{at}: {frame:02x?}");
            }
            assert_eq!(left, right, "seed {seed}: burst from {device:?} before packet {sent}");
        }
        assert_eq!(fast.pipeline.board().read(), slow.pipeline.board().read(), "seed {seed}: counters before packet {sent}");
        sent += frames.len();
    }
    assert_eq!(fast.pipeline.flows.all(), slow.pipeline.flows.all(), "seed {seed}");
    let counters = fast.pipeline.board().read();
    assert!(fast.pipeline.fast.hits > sent as u64 / 12, "seed {seed}: {} of {sent} took the fast path", fast.pipeline.fast.hits);
    assert_eq!(slow.pipeline.fast.hits, 0);
    counters.drops
}

#[test]
fn the_fast_path_does_what_the_slow_one_does() {
    use DropReason::*;
    let drops = run(1);
    let refused = [DeniedAclEgress, DeniedAclIngress, DeniedEgress, DeniedIngress, SpoofedAddress, UnmappedVtep, NotOwnDestination];
    let limited = [PacketRate, BandwidthIn, BandwidthOut, ConntrackAllowance, NatUnknown, Blackhole, FragmentUnknown];
    for reason in refused.into_iter().chain(limited) {
        assert!(drops.get(reason) > 0, "never {reason:?} in {drops:?}");
    }
}

/// A flood of new connections at one port costs others nothing, and its own known ones
/// neither; what is refused is counted. What need not be tracked is not refused.
#[test]
fn a_flooded_port_refuses_new_connections_alone() {
    for fast in [true, false] {
        let mut side = Side::new(fast);
        let inside = Remote::Prefix(Prefix::new([10, 0, 0, 0].into(), 8));
        let mut ports = HERE.map(|(id, vni, address)| guest(id, vni, address));
        ports[0].ingress = vec![udp_rule(80, inside), tcp_rule(80, ANY)];
        ports[1].ingress = vec![udp_rule(80, inside)];
        let mappings = [HERE[0].2, HERE[1].2].map(|ip| Mapping::new(ip.into(), end(ip, 0).mac, vtep(0)));
        let there = THERE.map(|(card, ip)| Mapping::new(ip.into(), end(ip, 0).mac, vtep(card)));
        let network = NetworkConfig::new(Vni(100), mappings.into_iter().chain(there).collect());
        let snapshot = Snapshot { ports: ports[..2].to_vec(), networks: vec![network], ..Snapshot::default() };
        side.pipeline.apply(Duration::ZERO, &Tables::compile(&snapshot, &Tables::default()));
        let (card, remote) = THERE[0];
        let to = |address, frame: &dyn Fn(End, End) -> Vec<u8>, port| {
            encapsulated(vtep(card), 0, 100, &frame(end(remote, port), end(address, 80)))
        };
        let datagram = |from, to| udp(from, to, b"hello");
        let segment = |from, to| tcp(from, to, flag::ACK, b"hello");
        let flood: Vec<_> = (0..500).map(|n| to(HERE[0].2, &datagram, 1000 + n)).collect();
        let now = Duration::from_secs(1);
        let known = to(HERE[0].2, &datagram, 1);
        let answer = udp(end(HERE[0].2, 80), end(remote, 1), b"and you");
        for (device, frame) in [(Device::Underlay, &known), (Device::Port(PortId(1)), &answer), (Device::Underlay, &known)] {
            side.turn(now, device, std::slice::from_ref(frame));
        }
        // 150 fill the share, and two may make room.
        let (.., guests) = side.turn(now, Device::Underlay, &flood);
        assert_eq!(guests.len(), 152);
        assert_eq!(side.pipeline.board().read().drops.get(DropReason::ConntrackAllowance), 348);
        let rest = [known, to(HERE[1].2, &datagram, 7), to(HERE[0].2, &datagram, 7), to(HERE[0].2, &segment, 7)];
        let (.., guests) = side.turn(now, Device::Underlay, &rest);
        let receivers: Vec<_> = guests.iter().map(|(id, _)| id.0).collect();
        assert_eq!(receivers, [1, 1, 2], "the known one, the untracked one, and that of the other port");
        assert_eq!(side.pipeline.board().read().drops.get(DropReason::ConntrackAllowance), 349);
        let (.., guests) = side.turn(now + Duration::from_millis(1), Device::Underlay, &flood[400..]);
        assert_eq!(guests.len(), 2, "each millisecond some are let in");
    }
}

/// As the one above, with seeds from the environment: `SEEDS=100 cargo test ... --ignored`.
#[test]
#[ignore = "minutes; for changes of the fast path"]
fn the_fast_path_does_what_the_slow_one_does_for_many_seeds() {
    let seeds = std::env::var("SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(50);
    for seed in 2..seeds {
        run(seed);
    }
}
