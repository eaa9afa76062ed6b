//! In steady state the path of a packet allocates nothing: counted by the allocator.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dataplane::action::Output;
use dataplane::headers::{self, ETHERNET};
use dataplane::packet::{Packet, Pool};
use dataplane::pipeline::{Device, Pipeline, Turn};
use dataplane::policy::Tables;
use dataplane::{
    Mac, Mapping, NetworkConfig, PortConfig, PortId, Prefix, Protocol, Remote, Rule, Settings, Snapshot, Underlay, Vni, arp, flow, vxlan,
};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator with the arguments it came with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`, and this is the same one.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: as above; `start` came from `System`.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CARD: Underlay =
    Underlay { address: Ipv4Addr::new(10, 255, 0, 1), prefix_length: 24, mac: Mac([2, 0, 0, 0, 1, 1]), encapsulated: true };
const PEER: Underlay =
    Underlay { address: Ipv4Addr::new(10, 255, 0, 2), prefix_length: 24, mac: Mac([2, 0, 0, 0, 1, 2]), encapsulated: true };
const GUEST: (Mac, Ipv4Addr) = (Mac([2, 0, 0, 0, 2, 1]), Ipv4Addr::new(10, 0, 0, 5));
const OTHER: (Mac, Ipv4Addr) = (Mac([2, 0, 0, 0, 2, 2]), Ipv4Addr::new(10, 0, 0, 6));
const PORT: Device = Device::Port(PortId(1));

fn snapshot() -> Snapshot {
    let all = Prefix::new(Ipv4Addr::new(10, 0, 0, 0), 16);
    let rule = Rule { protocol: Protocol::Number(17), ports: None, icmp: (None, None), remote: Remote::Prefix(all) };
    let port = PortConfig {
        ingress: vec![rule],
        egress: vec![rule],
        ..PortConfig::new(PortId(1), Vni(100), GUEST.0, GUEST.1, Prefix::new(Ipv4Addr::new(10, 0, 0, 0), 24))
    };
    let mapping = |(mac, ip), vtep| Mapping::new(ip, mac, vtep);
    let mappings = vec![mapping(GUEST, CARD.address), mapping(OTHER, PEER.address)];
    Snapshot { ports: vec![port], networks: vec![NetworkConfig::new(Vni(100), mappings)], ..Snapshot::default() }
}

fn udp((source_mac, source): (Mac, Ipv4Addr), (mac, destination): (Mac, Ipv4Addr), ports: (u16, u16)) -> Vec<u8> {
    let mut frame = vec![0; 64];
    let (ethernet, ip) = frame.split_at_mut(ETHERNET);
    headers::write_ethernet(ethernet, mac, source_mac, headers::TYPE_IPV4);
    headers::write_ipv4(ip, (source, destination), headers::UDP_PROTOCOL, (0, 0), 30);
    headers::write(&mut frame, 34, ports.0.to_be_bytes());
    headers::write(&mut frame, 36, ports.1.to_be_bytes());
    headers::write(&mut frame, 38, 30u16.to_be_bytes());
    frame
}

fn encapsulated(inner: &[u8]) -> Vec<u8> {
    let mut packet = Packet::new();
    assert!(packet.copy_from(inner) && vxlan::push_header(&mut packet, Vni(100)));
    assert!(vxlan::push_outer(&mut packet, &PEER, CARD.address, 0xc000));
    headers::write(packet.as_mut_slice(), 0, CARD.mac.0);
    packet.as_slice().to_vec()
}

/// Runs `rounds` bursts of frames through the pipeline and returns how many came out.
fn run(pipeline: &mut Pipeline, pool: &mut Pool, out: &mut Output, burst: &mut Vec<Packet>, rounds: &[(Device, Vec<Vec<u8>>)]) -> usize {
    let mut count = 0;
    for (device, frames) in rounds {
        for frame in frames {
            let mut packet = pool.get();
            assert!(packet.copy_from(frame));
            burst.push(packet);
        }
        pipeline.turn(&mut Turn { now: Duration::from_secs(1), pool, out }, *device, burst);
        count += out.underlay.len();
        pool.put_all(&mut out.underlay);
        out.drain_ports(pool, |pool, _, packets| {
            count += packets.len();
            pool.put_all(packets);
        });
    }
    count
}

#[test]
fn neither_known_connections_nor_new_ones_allocate() {
    let mut pipeline = Pipeline::new(Settings { underlay: CARD, public: None, flows_max: flow::FLOWS_MAX, seed: 1 });
    pipeline.apply(Duration::ZERO, &Tables::compile(&snapshot(), &Tables::default()));
    let (mut pool, mut out, mut burst) = (Pool::new(256), Output::default(), Vec::new());
    let mut hello = Packet::new();
    let question = arp::Message { operation: arp::REQUEST, sender: (PEER.mac, PEER.address), target: (Mac([0; 6]), CARD.address) };
    arp::frame(&mut hello, Mac::BROADCAST, &question);
    let hello = (Device::Underlay, vec![hello.as_slice().to_vec()]);
    // Connections of `ports`, opened by the guest and answered.
    let talk = |ports: std::ops::Range<u16>| {
        let there = ports.clone().map(|port| udp(GUEST, OTHER, (port, 53))).collect();
        let back = ports.map(|port| encapsulated(&udp(OTHER, GUEST, (53, port)))).collect();
        [(PORT, there), (Device::Underlay, back)]
    };
    let (known, new) = (talk(0..64), talk(64..128));
    run(&mut pipeline, &mut pool, &mut out, &mut burst, &[hello]);
    run(&mut pipeline, &mut pool, &mut out, &mut burst, &known);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let mut count = 0;
    for _ in 0..100 {
        count += run(&mut pipeline, &mut pool, &mut out, &mut burst, &known);
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0, "known connections");
    assert_eq!(count, 100 * 128);
    assert_eq!(run(&mut pipeline, &mut pool, &mut out, &mut burst, &new), 128);
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0, "new connections");
}
