//! The fast path against the authority: the same frames through two pipelines, one
//! of which has no fast path. What comes out, in its order, and all counters and
//! flows have to be equal.

use std::collections::HashMap;
use std::time::Duration;

use super::lab::*;
use crate::action::Output;
use crate::arp;
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
        Self { pipeline: Pipeline::with_fast_path(settings, fast), pool: Pool::new(256), out: Output::default() }
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

/// Addresses on the card and, with the number of their card, elsewhere.
const HERE: [(u32, u32, [u8; 4]); 4] = [(1, 100, [10, 0, 0, 5]), (2, 100, [10, 0, 0, 6]), (3, 100, [10, 0, 1, 7]), (4, 200, [10, 0, 0, 5])];
const THERE: [(u8, [u8; 4]); 5] = [(1, [10, 0, 0, 20]), (1, [10, 0, 1, 21]), (2, [10, 0, 0, 22]), (3, [10, 0, 2, 23]), (3, [10, 0, 0, 24])];

fn random_rules(random: &mut Random) -> Vec<Rule> {
    let all = Rule { protocol: Protocol::Any, ports: None, icmp: (None, None), remote: ANY };
    match random.below(10) {
        0 => vec![],
        1 => vec![tcp_rule(80, ANY), udp_rule(53, Remote::Prefix(Prefix::new([10, 0, 0, 0].into(), 24)))],
        _ => vec![all],
    }
}

fn random_snapshot(random: &mut Random) -> Snapshot {
    let mut ports = Vec::new();
    for (id, vni, address) in HERE {
        if random.one_in(12) {
            continue;
        }
        let mut port = guest(id, vni, address);
        port.ingress = random_rules(random);
        port.egress = if random.one_in(6) { random_rules(random) } else { port.egress };
        port.source_dest_check = !random.one_in(4);
        port.mtu = random.pick(&[9001, 9001, 9001, 1500, 90]);
        port.public = (id == 1).then_some([198, 51, 100, 16].into());
        port.generation = random.next();
        ports.push(port);
    }
    let networks = [100, 200].map(|vni| {
        let mut mappings: Vec<_> = HERE
            .iter()
            .filter(|(_, of, _)| *of == vni)
            .map(|(_, _, ip)| Mapping { ip: (*ip).into(), mac: end(*ip, 0).mac, vtep: vtep(0) })
            .collect();
        for (card, ip) in THERE {
            // Sometimes an address has moved, or is gone.
            let card = if random.one_in(12) { 2 } else { card };
            if !random.one_in(20) {
                mappings.push(Mapping { ip: ip.into(), mac: end(ip, 0).mac, vtep: vtep(card) });
            }
        }
        NetworkConfig { vni: Vni(vni), mappings, groups: HashMap::new() }
    });
    Snapshot { ports, networks: networks.into() }
}

/// A frame between two ends, mostly of a connection that goes on.
fn random_frame(random: &mut Random, from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let ports = [1234, 80, 53];
    let (from, mut to) = (end(from, random.pick(&ports)), end(to, random.pick(&ports)));
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
    let (id, _, mine) = random.pick(&[HERE[0], HERE[0], HERE[1], HERE[2], HERE[3]]);
    let anybody = |random: &mut Random| if random.one_in(6) { random.pick(&HERE).2 } else { random.pick(&THERE).1 };
    let device = match random.below(12) {
        0 => Device::Public,
        1..6 => Device::Underlay,
        _ => Device::Port(PortId(id)),
    };
    let frames = (0..count).map(|_| {
        let mut frame = match device {
            Device::Port(_) => {
                let to = anybody(random);
                random_frame(random, mine, to)
            }
            Device::Underlay => {
                let (card, from) = random.pick(&THERE);
                let to = random.pick(&HERE[..3]).2;
                let vni = if random.one_in(20) { random.pick(&[200, 300]) } else { 100 };
                let mut inner = random_frame(random, from, to);
                if random.one_in(60) {
                    damage(random, &mut inner);
                }
                if random.one_in(50) {
                    let card = random.pick(&[1, 2, 3]);
                    arp_frame(arp::REPLY, (Mac([2, 0, 0, 0, 0xff, random.next() as u8 & 3]), vtep(card)), (underlay_mac(0), vtep(0)))
                } else {
                    encapsulated(vtep(if random.one_in(50) { 0 } else { card }), 0, vni, &inner)
                }
            }
            Device::Public => {
                let to = End { mac: public_mac(0), ip: [198, 51, 100, 16].into(), port: 80 };
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

fn run(seed: u64) {
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
    assert!(fast.pipeline.fast.hits > sent as u64 / 5, "seed {seed}: {} of {sent} took the fast path", fast.pipeline.fast.hits);
    assert_eq!(slow.pipeline.fast.hits, 0);
    assert!(counters.drops.iter().filter(|(_, count)| *count > 0).count() > 15, "seed {seed}: few kinds of drops: {:?}", counters.drops);
}

#[test]
fn the_fast_path_does_what_the_slow_one_does() {
    run(1);
}

/// As the one above, with seeds from the environment: `SEEDS=100 cargo test ... --ignored`.
#[test]
#[ignore = "minutes; for changes of the fast path"]
fn the_fast_path_does_what_the_slow_one_does_for_many_seeds() {
    let seeds = std::env::var("SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(50);
    (2..seeds).for_each(run);
}
