//! The worker over devices in memory, in real time.

use std::net::Ipv4Addr;
use std::os::fd::RawFd;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::io::mem::MemPort;
use crate::{Dhcp, Mac, Mapping, NetworkConfig, PortConfig, Prefix, Protocol, Remote, Rule, Underlay, Vni, headers};

const WAIT: Duration = Duration::from_secs(5);

fn settings(card: u8) -> Settings {
    let address = Ipv4Addr::new(10, 255, 0, card);
    let underlay = Underlay { address, prefix_length: 24, mac: Mac([2, 0, 0, 0, 0, card]), encapsulated: true };
    Settings { underlay, public: None, seed: 1 }
}

fn port(n: u8) -> PortConfig {
    let any = Remote::Prefix(Prefix::new(Ipv4Addr::UNSPECIFIED, 0));
    let all = Rule { protocol: Protocol::Any, ports: None, icmp: (None, None), remote: any };
    PortConfig {
        id: PortId(n.into()),
        vni: Vni(7),
        mac: mac(n),
        ipv4: Ipv4Addr::new(10, 0, 0, n),
        subnet: Prefix::new(Ipv4Addr::new(10, 0, 0, 0), 24),
        vpc_prefixes: Vec::new(),
        public: None,
        source_dest_check: true,
        mtu: 9001,
        ingress: vec![all],
        egress: vec![all],
        routes: Vec::new(),
        dhcp: Dhcp::default(),
        generation: 1,
    }
}

fn mac(n: u8) -> Mac {
    Mac([2, 0, 0, 0, 1, n])
}

fn frame(from: u8, to: Ipv4Addr, to_mac: Mac, protocol: u8) -> Vec<u8> {
    let mut frame = vec![0; 54];
    headers::write_ethernet(&mut frame, to_mac, mac(from), headers::TYPE_IPV4);
    headers::write_ipv4(&mut frame[14..], (Ipv4Addr::new(10, 0, 0, from), to), protocol, (0, 0), 20);
    frame[46] = 0x50;
    frame
}

fn to_guest(from: u8, to: u8) -> Vec<u8> {
    frame(from, Ipv4Addr::new(10, 0, 0, to), mac(to), 99)
}

/// Two cards on one wire: guests 5 and 6 on the first, 7 on the second.
fn two_cards() -> (Vec<Dataplane>, Vec<MemPort>) {
    let (left, right) = MemPort::pair().unwrap();
    let mapping = |n, card| Mapping { ip: Ipv4Addr::new(10, 0, 0, n), mac: mac(n), vtep: Ipv4Addr::new(10, 255, 0, card) };
    let mappings = vec![mapping(5, 1), mapping(6, 1), mapping(7, 2)];
    let networks = vec![NetworkConfig { vni: Vni(7), mappings, groups: Default::default() }];
    let mut guests = Vec::new();
    let cards = [(1, left, vec![port(5), port(6)]), (2, right, vec![port(7)])].map(|(card, wire, ports)| {
        let dataplane = Dataplane::start(settings(card), Some(Box::new(wire)), None).unwrap();
        for port in &ports {
            let (device, guest) = MemPort::pair().unwrap();
            dataplane.port_attach(port.id, Box::new(device));
            guests.push(guest);
        }
        dataplane.apply(Arc::new(Snapshot { ports, networks: networks.clone() }));
        dataplane
    });
    (cards.into(), guests)
}

/// Sends until the configuration has arrived, then receives.
fn exchange(from: &MemPort, to: &MemPort, frame: &[u8]) {
    let started = Instant::now();
    while started.elapsed() < WAIT {
        assert!(from.send(frame));
        let sent = Instant::now();
        while sent.elapsed() < Duration::from_millis(50) {
            if to.receive().is_some_and(|got| got == frame) {
                return;
            }
            std::thread::yield_now();
        }
    }
    panic!("nothing arrived");
}

fn drain(port: &MemPort) {
    std::thread::sleep(Duration::from_millis(20));
    while port.receive().is_some() {}
}

#[test]
fn frames_pass_between_guests_of_one_card_and_of_two() {
    let (cards, guests) = two_cards();
    exchange(&guests[0], &guests[1], &to_guest(5, 6));
    exchange(&guests[0], &guests[2], &to_guest(5, 7));
    exchange(&guests[2], &guests[0], &to_guest(7, 5));
    let counters = cards[0].counters();
    assert!(counters.underlay.tx_packets > 0 && counters.underlay.rx_packets > 0 && counters.flows == 3);
    assert!(counters.ports[&PortId(5)].traffic.rx_packets >= 2);
}

#[test]
fn a_frame_wakes_a_sleeping_worker_at_once() {
    let (_cards, guests) = two_cards();
    exchange(&guests[0], &guests[1], &to_guest(5, 6));
    drain(&guests[1]);
    let mut times: Vec<_> = (0..20)
        .map(|_| {
            std::thread::sleep(Duration::from_millis(5));
            let sent = Instant::now();
            assert!(guests[0].send(&to_guest(5, 6)));
            while guests[1].receive().is_none() {
                assert!(sent.elapsed() < WAIT);
                std::thread::yield_now();
            }
            sent.elapsed()
        })
        .collect();
    times.sort();
    assert!(times[5] < Duration::from_millis(5), "{times:?}");
}

#[test]
fn metadata_frames_come_out_and_answers_go_in_and_both_queues_are_bounded() {
    let (cards, guests) = two_cards();
    exchange(&guests[0], &guests[1], &to_guest(5, 6));
    let request = frame(5, crate::METADATA, crate::ROUTER_MAC, 6);
    assert!(guests[0].send(&request));
    let (from, packet) = cards[0].punted().recv_timeout(WAIT).unwrap();
    assert_eq!((from, packet.as_slice()), (PortId(5), &request[..]));
    drain(&guests[0]);
    cards[0].inject(PortId(5), b"a frame as it is");
    let started = Instant::now();
    let got = loop {
        if let Some(got) = guests[0].receive() {
            break got;
        }
        assert!(started.elapsed() < WAIT);
    };
    assert_eq!(got, b"a frame as it is");
    for _ in 0..2 * SERVICE_QUEUE {
        assert!(guests[0].send(&request));
    }
    let started = Instant::now();
    while cards[0].counters().drops.get(DropReason::PuntOverflow) != SERVICE_QUEUE as u64 {
        assert!(started.elapsed() < WAIT, "{:?}", cards[0].counters().drops);
    }
    cards[0].inject(PortId(5), &[0; 10_000]);
    assert_eq!(cards[0].counters().drops.get(DropReason::InjectOverflow), 1);
}

#[test]
fn a_detached_port_loses_frames_until_it_is_attached_again() {
    let (cards, guests) = two_cards();
    exchange(&guests[0], &guests[1], &to_guest(5, 6));
    cards[0].port_detach(PortId(6));
    let started = Instant::now();
    while cards[0].counters().drops.get(DropReason::NoDevice) == 0 {
        assert!(guests[0].send(&to_guest(5, 6)) && started.elapsed() < WAIT);
        std::thread::sleep(Duration::from_millis(1));
    }
    let (device, guest) = MemPort::pair().unwrap();
    cards[0].port_attach(PortId(6), Box::new(device));
    exchange(&guests[0], &guest, &to_guest(5, 6));
}

/// A device without a descriptor, like a network card polled by its driver.
struct Polled(MemPort, Arc<AtomicBool>);

impl PacketIo for Polled {
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Packet>) {
        self.0.rx_burst(pool, out);
    }
    fn tx_burst(&mut self, pool: &mut Pool, packets: &mut Vec<Packet>) -> usize {
        self.0.tx_burst(pool, packets)
    }
    fn wait_fd(&self) -> Option<RawFd> {
        None
    }
}

impl Drop for Polled {
    fn drop(&mut self) {
        self.1.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_polled_device_is_served_and_closed_with_the_data_plane() {
    let (device, guest) = MemPort::pair().unwrap();
    let closed = Arc::new(AtomicBool::new(false));
    let dataplane = Dataplane::start(settings(1), None, None).unwrap();
    dataplane.port_attach(PortId(5), Box::new(Polled(device, Arc::clone(&closed))));
    let (other, second) = MemPort::pair().unwrap();
    dataplane.port_attach(PortId(6), Box::new(other));
    dataplane.apply(Arc::new(Snapshot { ports: vec![port(5), port(6)], networks: Vec::new() }));
    exchange(&guest, &second, &to_guest(5, 6));
    exchange(&second, &guest, &to_guest(6, 5));
    std::thread::sleep(Duration::from_millis(50));
    exchange(&guest, &second, &to_guest(5, 6));
    drop(dataplane);
    assert!(closed.load(Ordering::SeqCst));
}

#[test]
fn a_capture_sees_a_frame_on_both_sides_of_the_card_and_where_it_dies() {
    let (cards, guests) = two_cards();
    exchange(&guests[0], &guests[2], &to_guest(5, 7));
    let request = |filter| capture::Request {
        filter: capture::filter::Filter::parse(filter).unwrap(),
        snap_length: 9216,
        ..capture::Request::default()
    };
    let all = cards[0].capture(request("proto 99"));
    let dead = cards[0].capture(capture::Request { count: Some(1), ..request("dropped") });
    assert!(guests[0].send(&to_guest(5, 7)));
    let frames: Vec<_> = (0..2).map(|_| all.tapped.frames.recv_timeout(WAIT).unwrap()).collect();
    let seen: Vec<_> = frames.iter().map(|frame| (frame.point, frame.way, frame.length)).collect();
    assert_eq!(seen, [(capture::Point::Guest(PortId(5)), Way::In, 54), (capture::Point::Underlay, Way::Out, 54 + 50)]);
    assert_eq!(frames[0].bytes, to_guest(5, 7));
    assert!(guests[0].send(&to_guest(6, 7)), "somebody else's MAC");
    let frame = dead.tapped.frames.recv_timeout(WAIT).unwrap();
    assert_eq!((frame.point, frame.dropped), (capture::Point::Drop(Some(PortId(5))), Some(DropReason::SpoofedMac)));
    assert!(dead.tapped.frames.recv_timeout(WAIT).is_err(), "it ends by itself after one frame");
}
