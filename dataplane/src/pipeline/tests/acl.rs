//! Network ACLs at the border of a subnet, on one card and on two.

use std::time::Duration;

use super::lab::*;
use crate::counters::DropReason::*;
use crate::headers::tcp as flag;
use crate::pipeline::{Device, ROUTER_MAC};
use crate::*;

const A: [u8; 4] = [10, 0, 0, 5];
const B: [u8; 4] = [10, 0, 0, 6];
const C: [u8; 4] = [10, 0, 1, 7];
const X: [u8; 4] = [198, 51, 100, 16];

const SUBNET_A: Prefix = Prefix::new(std::net::Ipv4Addr::new(10, 0, 0, 0), 24);
const EPHEMERAL: (u16, u16) = (1024, 65535);

/// A on card 0; B, and C in another subnet with a web server's ACL, on `other`.
fn lab(other: u8) -> Lab {
    let mut lab = Lab::new(2);
    let open = |mut port: PortConfig| {
        port.ingress = vec![tcp_rule(80, ANY), tcp_rule(22, ANY), udp_rule(80, ANY), icmp_rule(ANY)];
        port
    };
    lab.place(0, vec![open(guest(1, 100, A))]);
    lab.place(other, vec![open(guest(2, 100, B)), open(guest(3, 100, C))]);
    lab.port(other, 3).acl = Some(Acl {
        ingress: vec![acl_tcp(false, (22, 22), SUBNET_A), acl_tcp(true, (0, 1023), SUBNET_A)],
        egress: vec![acl_tcp(true, EPHEMERAL, SUBNET_A)],
    });
    lab.apply();
    lab
}

fn syn(port: u16) -> Vec<u8> {
    tcp(end(A, 1234), via_router(end(C, port)), flag::SYN, b"")
}

fn answer() -> Vec<u8> {
    tcp(end(C, 80), via_router(end(A, 1234)), flag::SYN | flag::ACK, b"")
}

#[test]
fn what_the_first_matching_rule_denies_dies_at_the_border() {
    for other in [0, 1] {
        let mut lab = lab(other);
        lab.send(0, 1, &syn(80)).only(other, 3);
        lab.send(other, 3, &answer()).only(0, 1);
        lab.send(0, 1, &syn(22)).nothing();
        assert_eq!(lab.drops(other, DeniedAclIngress), 1, "the groups would let it in");
        lab.send(0, 1, &udp(end(A, 1), via_router(end(C, 80)), b"")).nothing();
        assert_eq!(lab.drops(other, DeniedAclIngress), 2, "no rule is for it");
        assert_eq!(lab.cards[usize::from(other)].pipeline.board().read().ports[&PortId(3)].drops.get(DeniedAclIngress), 2);
    }
}

#[test]
fn an_answer_needs_a_rule_of_its_own_although_its_connection_is_tracked() {
    for other in [0, 1] {
        let mut lab = lab(other);
        lab.port(other, 3).acl.as_mut().unwrap().egress = vec![acl_tcp(true, (80, 80), EVERYWHERE)];
        lab.apply();
        lab.send(0, 1, &syn(80)).only(other, 3);
        lab.send(other, 3, &answer()).nothing();
        assert_eq!(lab.drops(other, DeniedAclEgress), 1);
    }
}

#[test]
fn a_new_rule_cuts_an_established_connection_both_ways_at_once() {
    for other in [0, 1] {
        let mut lab = lab(other);
        lab.send(0, 1, &syn(80)).only(other, 3);
        lab.send(other, 3, &answer()).only(0, 1);
        let forth = tcp(end(A, 1234), via_router(end(C, 80)), flag::ACK, b"GET");
        let back = tcp(end(C, 80), via_router(end(A, 1234)), flag::ACK, b"200");
        lab.send(0, 1, &forth).only(other, 3);
        let open = lab.port(other, 3).acl.replace(Acl::default());
        lab.apply();
        lab.send(0, 1, &forth).nothing();
        lab.send(other, 3, &back).nothing();
        assert_eq!((lab.drops(other, DeniedAclIngress), lab.drops(other, DeniedAclEgress)), (1, 1));
        lab.port(other, 3).acl = open;
        lab.apply();
        lab.send(0, 1, &forth).only(other, 3);
        lab.send(other, 3, &back).only(0, 1);
    }
}

#[test]
fn within_the_subnet_and_to_the_cards_services_no_acl_is_asked() {
    for other in [0, 1] {
        let mut lab = lab(other);
        lab.port(0, 1).acl = Some(Acl::default());
        lab.port(other, 2).acl = Some(Acl::default());
        lab.apply();
        lab.send(0, 1, &tcp(end(A, 1234), end(B, 80), flag::SYN, b"")).only(other, 2);
        lab.send(other, 2, &tcp(end(B, 80), end(A, 1234), flag::SYN | flag::ACK, b"")).only(0, 1);
        let router = End { mac: ROUTER_MAC, ip: [10, 0, 0, 1].into(), port: 0 };
        lab.send(0, 1, &ping(end(A, 0), router, 8, 7)).only(0, 1);
        let metadata = End { mac: ROUTER_MAC, ip: crate::METADATA, port: 80 };
        assert_eq!(lab.send(0, 1, &tcp(end(A, 1), metadata, flag::SYN, b"")).punted.len(), 1);
        lab.send(0, 1, &syn(80)).nothing();
        assert_eq!(lab.drops(0, DeniedAclEgress), 1);
    }
}

#[test]
fn pings_and_errors_are_judged_by_type() {
    let icmp = |icmp_type| AclRule {
        icmp: (Some(icmp_type), None),
        protocol: Protocol::Number(1),
        ports: None,
        ..acl_tcp(true, (0, 0), EVERYWHERE)
    };
    let mut lab = lab(1);
    lab.port(1, 3).acl = Some(Acl { ingress: vec![icmp(8)], egress: vec![icmp(0)] });
    lab.apply();
    lab.send(0, 1, &ping(end(A, 0), via_router(end(C, 0)), 8, 7)).only(1, 3);
    lab.send(1, 3, &ping(end(C, 0), via_router(end(A, 0)), 0, 7)).only(0, 1);
    lab.send(1, 3, &ping(end(C, 0), via_router(end(A, 0)), 8, 7)).nothing();
    assert_eq!(lab.drops(1, DeniedAclEgress), 1);
    // An error about a tracked packet belongs to it for the groups, not for the ACL.
    let sent = ping(end(A, 0), via_router(end(C, 0)), 8, 7);
    let mut error = vec![3, 1, 0, 0, 0, 0, 0, 0];
    error.extend(&sent[14..]);
    lab.send(1, 3, &frame(end(C, 0), via_router(end(A, 0)), 1, (1, 0), error)).nothing();
    assert_eq!(lab.drops(1, DeniedAclEgress), 2);
}

#[test]
fn later_fragments_follow_the_verdict_of_the_first() {
    let mut lab = lab(1);
    let datagram = udp_datagram(end(A, 9), end(C, 80), &[1; 64]);
    let piece = |id, flags, bytes: &[u8]| frame(end(A, 9), via_router(end(C, 80)), 17, (id, flags), bytes.to_vec());
    lab.send(0, 1, &piece(1, 0x2000, &datagram[..32])).nothing();
    lab.send(0, 1, &piece(1, 4, &datagram[32..])).nothing();
    assert_eq!((lab.drops(1, DeniedAclIngress), lab.drops(1, FragmentUnknown)), (1, 1));
    lab.port(1, 3).acl = None;
    lab.apply();
    lab.send(0, 1, &piece(2, 0x2000, &datagram[..32])).only(1, 3);
    lab.send(0, 1, &piece(2, 4, &datagram[32..])).only(1, 3);
    // An ACL that comes in between stops the rest.
    lab.send(0, 1, &piece(3, 0x2000, &datagram[..32])).only(1, 3);
    lab.port(1, 3).acl = Some(Acl::default());
    lab.apply();
    lab.send(0, 1, &piece(3, 4, &datagram[32..])).nothing();
    assert_eq!(lab.drops(1, FragmentUnknown), 2);
}

#[test]
fn the_acl_stands_on_the_inside_of_the_address_translation() {
    let mut lab = lab(1);
    let internet = |port| End { mac: GATEWAY_MAC, ip: [203, 0, 113, 9].into(), port };
    lab.port(0, 1).public = Some(X.into());
    let only_nine = Prefix::new([203, 0, 113, 9].into(), 32);
    lab.port(0, 1).acl = Some(Acl { ingress: vec![acl_tcp(true, (22, 22), only_nine)], egress: vec![acl_tcp(true, EPHEMERAL, only_nine)] });
    lab.apply();
    lab.wait(Duration::from_secs(1));
    let x = |port| End { mac: public_mac(0), ip: X.into(), port };
    let seen = lab.feed(0, Device::Public, &tcp(internet(4000), x(22), flag::SYN, b""));
    assert_eq!(parse(seen.only(0, 1)).1.destination, std::net::Ipv4Addr::from(A));
    lab.send(0, 1, &tcp(end(A, 22), via_router(internet(4000)), flag::SYN | flag::ACK, b"")).only_public();
    lab.feed(0, Device::Public, &tcp(internet(4000), x(80), flag::SYN, b"")).nothing();
    let other = End { ip: [203, 0, 113, 10].into(), ..internet(4000) };
    lab.feed(0, Device::Public, &tcp(other, x(22), flag::SYN, b"")).nothing();
    assert_eq!(lab.drops(0, DeniedAclIngress), 2);
}
