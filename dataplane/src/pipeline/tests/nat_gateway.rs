//! A NAT gateway, reached on its own card and from another one.

use std::net::Ipv4Addr;
use std::time::Duration;

use super::lab::*;
use crate::counters::DropReason::*;
use crate::headers::{self, tcp as flag};
use crate::pipeline::{Device, ROUTER_MAC};
use crate::*;

/// The instance, in a subnet that routes everything to the gateway.
const A: [u8; 4] = [10, 0, 1, 5];
const GATE: [u8; 4] = [10, 0, 0, 9];
const N: [u8; 4] = [198, 51, 100, 30];
const INTERNET: [u8; 4] = [203, 0, 113, 9];
/// A server of the gateway's card, and its public address.
const B: [u8; 4] = [10, 0, 0, 6];
const Y: [u8; 4] = [198, 51, 100, 17];
/// Where the gateway is.
const CARD: u8 = 0;

fn gateway() -> NatGatewayConfig {
    NatGatewayConfig {
        id: NatGatewayId(1),
        vni: Vni(100),
        mac: end(GATE, 0).mac,
        ipv4: GATE.into(),
        subnet: Prefix::new([10, 0, 0, 0].into(), 24),
        vpc_prefixes: vec![Prefix::new([10, 0, 0, 0].into(), 16)],
        routes: vec![route([0, 0, 0, 0], 0, RouteTarget::InternetGateway)],
        acl: None,
        public: vec![N.into()],
    }
}

/// A on card `at`, the gateway and B on card 0.
fn lab(at: u8) -> Lab {
    let mut lab = Lab::new(2);
    let mut a = guest(1, 100, A);
    a.routes = vec![route([0, 0, 0, 0], 0, RouteTarget::NatGateway(GATE.into()))];
    let mut b = guest(2, 100, B);
    b.public = Some(Y.into());
    b.ingress = vec![tcp_rule(80, ANY)];
    lab.place(CARD, vec![b]);
    lab.place_gateway(CARD, gateway());
    lab.place(at, vec![a]);
    lab.wait(Duration::from_secs(1));
    lab
}

fn internet(port: u16) -> End {
    End { mac: GATEWAY_MAC, ip: INTERNET.into(), port }
}

/// The public end of a connection, as the internet addresses it.
fn public(port: u16) -> End {
    End { mac: public_mac(CARD), ip: N.into(), port }
}

fn counters(lab: &Lab) -> NatGatewayCounters {
    lab.cards[usize::from(CARD)].pipeline.board().read().nat_gateways[&NatGatewayId(1)]
}

/// Opens TCP from A's `port` to the internet's port 80 and returns the public port.
#[track_caller]
fn open(lab: &mut Lab, at: u8, port: u16) -> u16 {
    let seen = lab.send(at, 1, &tcp(end(A, port), via_router(internet(80)), flag::SYN, b""));
    let (ethernet, ip, transport) = parse(seen.only_public());
    assert_eq!((ethernet.source, ethernet.destination), (public_mac(CARD), GATEWAY_MAC));
    // The router of A's subnet, and the gateway.
    assert_eq!((ip.source, ip.destination, ip.ttl), (N.into(), INTERNET.into(), 62));
    assert!(transport.source_port >= 1024 && transport.destination_port == 80);
    transport.source_port
}

#[test]
fn a_connection_goes_out_under_the_public_address_and_its_answers_come_back() {
    for at in [0, 1] {
        let mut lab = lab(at);
        let port = open(&mut lab, at, 1234);
        let answer = tcp(internet(80), public(port), flag::SYN | flag::ACK, b"");
        let seen = lab.feed(CARD, Device::Public, &answer);
        let (ethernet, ip, transport) = parse(seen.only(at, 1));
        assert_eq!((ethernet.source, ethernet.destination), (ROUTER_MAC, end(A, 0).mac));
        assert_eq!((ip.source, ip.destination, ip.ttl), (INTERNET.into(), A.into(), 63));
        assert_eq!((transport.source_port, transport.destination_port), (80, 1234));
        assert_ne!(open(&mut lab, at, 1235), port);
        assert_eq!(counters(&lab), NatGatewayCounters { active: 2, attempts: 2, established: 1, ..Default::default() });
        // UDP, and a ping by its identifier.
        let seen = lab.send(at, 1, &udp(end(A, 5353), via_router(internet(53)), b"odd"));
        let udp_port = parse(seen.only_public()).2.source_port;
        let seen = lab.feed(CARD, Device::Public, &udp(internet(53), public(udp_port), b"even"));
        assert_eq!(parse(seen.only(at, 1)).2.destination_port, 5353);
        let seen = lab.send(at, 1, &ping(end(A, 0), via_router(internet(0)), 8, 77));
        let (_, _, transport) = parse(seen.only_public());
        let seen = lab.feed(CARD, Device::Public, &ping(internet(0), public(0), 0, transport.source_port));
        assert_eq!(parse(seen.only(at, 1)).2.source_port, 77);
        assert_eq!(lab.all_drops(0) + lab.all_drops(1), 0);
    }
}

#[test]
fn nobody_outside_opens_a_connection() {
    for at in [0, 1] {
        let mut lab = lab(at);
        let port = open(&mut lab, at, 1234);
        let stranger = End { ip: [203, 0, 113, 10].into(), ..internet(80) };
        for from in [stranger, internet(81)] {
            lab.feed(CARD, Device::Public, &tcp(from, public(port), flag::SYN | flag::ACK, b"")).nothing();
        }
        lab.feed(CARD, Device::Public, &tcp(internet(80), public(port ^ 1), flag::SYN, b"")).nothing();
        lab.feed(CARD, Device::Public, &udp(internet(80), public(port), b"")).nothing();
        lab.feed(CARD, Device::Public, &ping(internet(0), public(0), 8, 1)).nothing();
        assert_eq!((lab.drops(CARD, NatUnknown), counters(&lab).drops), (5, 5));
        assert_eq!(counters(&lab).active, 1);
    }
}

#[test]
fn the_instance_hears_the_internet_from_the_gateways_card_only() {
    let mut lab = lab(1);
    open(&mut lab, 1, 1234);
    let inner = tcp(End { mac: ROUTER_MAC, ..internet(80) }, end(A, 1234), flag::SYN | flag::ACK, b"");
    lab.feed(1, Device::Underlay, &encapsulated(vtep(CARD), 1, 100, &inner)).only(1, 1);
    lab.feed(1, Device::Underlay, &encapsulated(vtep(7), 1, 100, &inner)).nothing();
    assert_eq!(lab.drops(1, UnmappedVtep), 1);
    lab.port(1, 1).routes = vec![route([0, 0, 0, 0], 0, RouteTarget::InternetGateway)];
    lab.apply();
    lab.feed(1, Device::Underlay, &encapsulated(vtep(CARD), 1, 100, &inner)).nothing();
    assert_eq!(lab.drops(1, UnmappedVtep), 2, "no route leads to the gateway any more");
}

#[test]
fn only_the_vpc_is_served_and_only_towards_the_internet() {
    let mut lab = lab(1);
    let to_gate = |from: End, to: End| encapsulated(vtep(1), CARD, 100, &tcp(from, End { mac: end(GATE, 0).mac, ..to }, flag::SYN, b""));
    let foreign = End { ip: [192, 168, 1, 1].into(), ..end(A, 1) };
    lab.feed(CARD, Device::Underlay, &to_gate(foreign, internet(80)));
    assert_eq!(lab.drops(CARD, UnmappedVtep), 1);
    for inside in [GATE, B, [10, 0, 7, 7]] {
        lab.feed(CARD, Device::Underlay, &to_gate(end(A, 1), end(inside, 80))).nothing();
    }
    assert_eq!(lab.drops(CARD, NoRoute), 3);
    // Its subnet has to lead to the internet.
    lab.cards[0].snapshot.nat_gateways[0].routes.clear();
    lab.apply();
    assert!(lab.send(1, 1, &tcp(end(A, 1), via_router(internet(80)), flag::SYN, b"")).public.is_empty());
    assert_eq!((lab.drops(CARD, NoRoute), counters(&lab).drops), (4, 5));
    // And a gateway that is gone is a black hole.
    lab.cards[0].snapshot.nat_gateways.clear();
    lab.network(100, |network| network.mappings.retain(|mapping| mapping.ip != Ipv4Addr::from(GATE)));
    lab.send(1, 1, &tcp(end(A, 1), via_router(internet(80)), flag::SYN, b""));
    assert_eq!(lab.drops(1, Blackhole), 1);
}

#[test]
fn a_public_address_of_the_same_card_is_reached_through_the_gateway() {
    for at in [0, 1] {
        let mut lab = lab(at);
        let y = End { mac: ROUTER_MAC, ip: Y.into(), port: 80 };
        let seen = lab.send(at, 1, &tcp(end(A, 1234), y, flag::SYN, b""));
        let (_, ip, transport) = parse(seen.only(CARD, 2));
        assert_eq!((ip.source, ip.destination), (N.into(), B.into()));
        let back = End { mac: ROUTER_MAC, ip: N.into(), port: transport.source_port };
        let seen = lab.send(CARD, 2, &tcp(end(B, 80), back, flag::SYN | flag::ACK, b""));
        let (_, ip, transport) = parse(seen.only(at, 1));
        assert_eq!((ip.source, ip.destination, transport.destination_port), (Y.into(), A.into(), 1234));
    }
}

#[test]
fn a_forgotten_connection_is_reset_towards_the_inside() {
    for at in [0, 1] {
        let mut lab = lab(at);
        let port = open(&mut lab, at, 1234);
        lab.feed(CARD, Device::Public, &tcp(internet(80), public(port), flag::SYN | flag::ACK, b"")).only(at, 1);
        lab.send(at, 1, &tcp(end(A, 1234), via_router(internet(80)), flag::ACK, b"")).only_public();
        lab.wait(Duration::from_secs(349));
        lab.feed(CARD, Device::Public, &tcp(internet(80), public(port), flag::ACK, b"")).only(at, 1);
        lab.wait(Duration::from_secs(351));
        lab.feed(CARD, Device::Public, &tcp(internet(80), public(port), flag::ACK, b"")).nothing();
        assert_eq!(counters(&lab).idle_timeouts, 1);
        let mut late = tcp(end(A, 1234), via_router(internet(80)), flag::ACK, b"late");
        let payload = late.split_off(34);
        let mut segment = payload.clone();
        headers::write(&mut segment, 8, 0x0102_0304u32.to_be_bytes());
        let seen = lab.send(at, 1, &frame(end(A, 1234), via_router(internet(80)), 6, (1, 0x4000), segment));
        let got = seen.only(at, 1);
        let (_, ip, transport) = parse(got);
        assert_eq!((ip.source, ip.destination), (INTERNET.into(), A.into()));
        assert_eq!((transport.source_port, transport.destination_port, transport.tcp_flags), (80, 1234, flag::RST));
        assert_eq!(headers::read::<4>(got, 34 + 4), Some(0x0102_0304u32.to_be_bytes()), "where the sender waits for it");
        assert!(seen.public.is_empty());
        assert_eq!(lab.drops(CARD, NatForgotten), 1);
        // A reset is not answered by a reset.
        lab.send(at, 1, &tcp(end(A, 1234), via_router(internet(80)), flag::RST, b"")).nothing();
        open(&mut lab, at, 1234);
    }
}

#[test]
fn the_acl_of_the_gateways_subnet_judges_all_four_crossings() {
    let inside = Prefix::new([10, 0, 1, 0].into(), 24);
    let full = Acl {
        ingress: vec![acl_tcp(true, (80, 80), inside), acl_tcp(true, (1024, 65535), EVERYWHERE)],
        egress: vec![acl_tcp(true, (80, 80), EVERYWHERE), acl_tcp(true, (1024, 65535), inside)],
    };
    for at in [0, 1] {
        let mut lab = lab(at);
        let mut with = |ingress: &[usize], egress: &[usize]| {
            let keep = |rules: &[AclRule], which: &[usize]| which.iter().map(|index| rules[*index]).collect();
            lab.cards[0].snapshot.nat_gateways[0].acl =
                Some(Acl { ingress: keep(&full.ingress, ingress), egress: keep(&full.egress, egress) });
            lab.apply();
            let seen = lab.send(at, 1, &tcp(end(A, 1234), via_router(internet(80)), flag::SYN, b""));
            let Some(out) = seen.public.iter().find(|frame| frame[12..14] == [8, 0]) else { return 0 };
            let port = parse(out).2.source_port;
            1 + lab.feed(CARD, Device::Public, &tcp(internet(80), public(port), flag::ACK, b"")).guests.len()
        };
        assert_eq!([with(&[1], &[0, 1]), with(&[0, 1], &[1]), with(&[0], &[0, 1]), with(&[0, 1], &[0])], [0, 0, 1, 1]);
        assert_eq!(with(&[0, 1], &[0, 1]), 2);
        assert_eq!((lab.drops(CARD, DeniedAclIngress), lab.drops(CARD, DeniedAclEgress)), (2, 2));
    }
}

#[test]
fn errors_are_translated_by_the_packet_that_they_quote() {
    for at in [0, 1] {
        let mut lab = lab(at);
        let seen = lab.send(at, 1, &udp(end(A, 5353), via_router(internet(53)), b"odd"));
        let quoted = seen.only_public()[14..].to_vec();
        let router = End { mac: GATEWAY_MAC, ip: [192, 0, 2, 1].into(), port: 0 };
        let mut error = vec![3, 1, 0, 0, 0, 0, 0, 0];
        error.extend(&quoted);
        let seen = lab.feed(CARD, Device::Public, &frame(router, public(0), 1, (1, 0), error.clone()));
        let (_, ip, _) = parse(seen.only(at, 1));
        assert_eq!((ip.source, ip.destination), (router.ip, A.into()));
        let inner = &seen.only(at, 1)[42..];
        let ip = headers::ipv4_quoted(inner).unwrap();
        assert_eq!((ip.source, headers::read::<2>(inner, 20)), (A.into(), Some(5353u16.to_be_bytes())));
        assert_eq!(headers::transport_checksum(ip.source, ip.destination, 17, &inner[20..]), 0);
        // Not in the name of the VPC, and not about what was never sent.
        let neighbour = End { mac: GATEWAY_MAC, ..end(B, 0) };
        lab.feed(CARD, Device::Public, &frame(neighbour, public(0), 1, (1, 0), error.clone())).nothing();
        assert_eq!(lab.drops(CARD, SpoofedAddress), 1);
        headers::write(&mut error, 8 + 22, [0, 9]);
        lab.feed(CARD, Device::Public, &frame(router, public(0), 1, (1, 0), error)).nothing();
        assert_eq!(lab.drops(CARD, NatUnknown), 1);
        // The other way: A complains about an answer.
        let port = headers::read::<2>(&quoted, 20).map(u16::from_be_bytes).unwrap();
        let seen = lab.feed(CARD, Device::Public, &udp(internet(53), public(port), b"even"));
        let mut complaint = vec![3, 3, 0, 0, 0, 0, 0, 0];
        complaint.extend(&seen.only(at, 1)[14..]);
        let seen = lab.send(at, 1, &frame(end(A, 0), via_router(internet(0)), 1, (1, 0), complaint));
        let inner = &seen.only_public()[42..];
        let ip = headers::ipv4_quoted(inner).unwrap();
        assert_eq!((parse(seen.only_public()).1.source, ip.destination), (N.into(), N.into()));
        assert_eq!(headers::read::<2>(inner, 22), Some(port.to_be_bytes()));
    }
}

#[test]
fn datagrams_in_fragments_pass_both_ways_and_segments_do_not() {
    for at in [0, 1] {
        let mut lab = lab(at);
        let datagram = udp_datagram(end(A, 9), internet(53), &[1; 64]);
        let piece = |flags, bytes: &[u8]| frame(end(A, 9), via_router(internet(53)), 17, (7, flags), bytes.to_vec());
        let seen = lab.send(at, 1, &piece(0x2000, &datagram[..32]));
        let port = parse(seen.only_public()).2.source_port;
        let seen = lab.send(at, 1, &piece(4, &datagram[32..]));
        assert_eq!(parse(seen.only_public()).1.source, Ipv4Addr::from(N));
        let back = udp_datagram(internet(53), public(port), &[2; 64]);
        let piece = |flags, bytes: &[u8]| frame(internet(53), public(port), 17, (8, flags), bytes.to_vec());
        lab.feed(CARD, Device::Public, &piece(0x2000, &back[..32])).only(at, 1);
        let seen = lab.feed(CARD, Device::Public, &piece(4, &back[32..]));
        assert_eq!(parse(seen.only(at, 1)).1.destination, Ipv4Addr::from(A));
        lab.feed(CARD, Device::Public, &frame(internet(53), public(port), 17, (9, 4), vec![0; 32])).nothing();
        assert_eq!(lab.drops(CARD, FragmentUnknown), 1);
        let segment = tcp(end(A, 9), via_router(internet(80)), flag::SYN, &[0; 20])[34..].to_vec();
        let seen = lab.send(at, 1, &frame(end(A, 9), via_router(internet(80)), 6, (7, 0x2000), segment));
        assert!(seen.public.is_empty());
        assert_eq!(lab.drops(CARD, NatFragment), 1);
    }
}

#[test]
fn the_last_hop_and_the_border_of_1500_bytes_are_reported_to_the_inside() {
    for at in [0, 1] {
        let mut lab = lab(at);
        let mut dying = udp(end(A, 9), via_router(internet(53)), b"");
        dying[22] = 2;
        headers::write(&mut dying, 24, [0, 0]);
        let sum = headers::checksum(&dying[14..34]);
        headers::write(&mut dying, 24, sum.to_be_bytes());
        let seen = lab.send(at, 1, &dying);
        let (_, ip, transport) = parse(seen.only(at, 1));
        assert_eq!((ip.source, transport.icmp_type), (GATE.into(), 11));
        assert_eq!(lab.drops(CARD, TtlExpired), 1);
        let seen = lab.send(at, 1, &tcp(end(A, 9), via_router(internet(80)), flag::SYN, &[1; 1461]));
        let (_, ip, transport) = parse(seen.only(at, 1));
        assert_eq!((ip.source, transport.icmp_type, transport.icmp_code), (GATE.into(), 3, 4));
        let seen = lab.send(at, 1, &udp(end(A, 9), via_router(internet(53)), &[7; 4000]));
        assert_eq!(seen.public.iter().filter(|frame| frame[12..14] == [8, 0]).count(), 3);
    }
}

#[test]
fn the_public_address_is_announced_and_answered_for() {
    let mut lab = Lab::new(1);
    lab.cards[0].snapshot.nat_gateways.push(gateway());
    let mut announced = lab.apply().public;
    announced.extend(lab.wait(Duration::from_secs(2)).public);
    assert_eq!(announced.len(), 3);
    let question = arp_frame(1, (GATEWAY_MAC, GATEWAY), (Mac([0; 6]), N.into()));
    let seen = lab.feed(0, Device::Public, &question);
    assert_eq!(crate::arp::parse(&seen.public[0][14..]).unwrap().sender, (public_mac(0), N.into()));
    lab.cards[0].snapshot.nat_gateways.clear();
    lab.apply();
    assert!(lab.feed(0, Device::Public, &question).public.is_empty());
    assert!(lab.cards[0].pipeline.board().read().nat_gateways.is_empty());
}

#[test]
fn what_goes_through_the_gateway_is_tracked_whatever_the_rules() {
    for at in [0, 1] {
        let mut lab = lab(at);
        let all = Rule { protocol: Protocol::Any, ports: None, icmp: (None, None), remote: ANY };
        lab.port(at, 1).ingress = vec![all];
        lab.apply();
        let port = open(&mut lab, at, 1234);
        lab.port(at, 1).ingress.clear();
        lab.port(at, 1).egress.clear();
        lab.apply();
        lab.feed(CARD, Device::Public, &tcp(internet(80), public(port), flag::SYN | flag::ACK, b"")).only(at, 1);
        lab.send(at, 1, &tcp(end(A, 1234), via_router(internet(80)), flag::ACK, b"")).only_public();
    }
}

#[test]
fn connections_survive_a_change_that_does_not_concern_them() {
    let mut lab = lab(1);
    let port = open(&mut lab, 1, 1234);
    lab.cards[0].snapshot.nat_gateways[0].public.push([198, 51, 100, 31].into());
    lab.apply();
    let answer = tcp(internet(80), public(port), flag::SYN | flag::ACK, b"");
    lab.feed(CARD, Device::Public, &answer).only(1, 1);
    lab.cards[0].snapshot.nat_gateways[0].public.remove(0);
    lab.apply();
    lab.feed(CARD, Device::Public, &answer).nothing();
    assert_eq!((counters(&lab).active, lab.drops(CARD, NotForUs)), (0, 1));
}
