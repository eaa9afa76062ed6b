//! Routes to ports that forward and to peered VPCs, on one card and on two.

use super::lab::*;
use crate::counters::DropReason::*;
use crate::headers::tcp as flag;
use crate::pipeline::Device;
use crate::*;

const A: [u8; 4] = [10, 0, 0, 5];
/// The middlebox.
const M: [u8; 4] = [10, 0, 1, 7];
const D: [u8; 4] = [10, 0, 2, 9];
const FAR: [u8; 4] = [192, 168, 7, 7];

fn far(port: u16) -> End {
    via_router(End { ip: FAR.into(), ..end(M, port) })
}

/// A on card 0, which reaches 192.168.0.0/16 and the subnet of D through M; M and D on `other`.
fn with_middlebox(other: u8) -> Lab {
    let mut lab = Lab::new(2);
    let open = |mut port: PortConfig| {
        port.ingress = vec![tcp_rule(80, ANY)];
        port
    };
    let mut a = open(guest(1, 100, A));
    let target = RouteTarget::NetworkInterface(M.into());
    a.routes.extend([route([192, 168, 0, 0], 16, target), route([10, 0, 2, 0], 24, target)]);
    let mut middlebox = open(guest(2, 100, M));
    middlebox.source_dest_check = false;
    lab.place(0, vec![a]);
    lab.place(other, vec![middlebox, open(guest(3, 100, D))]);
    lab
}

#[test]
fn a_route_leads_to_a_port_that_forwards_and_what_it_forwards_is_believed() {
    for other in [0, 1] {
        let mut lab = with_middlebox(other);
        let seen = lab.send(0, 1, &tcp(end(A, 1234), far(80), flag::SYN, b""));
        let (ethernet, ip, _) = parse(seen.only(other, 2));
        assert_eq!((ethernet.destination, ip.destination, ip.ttl), (end(M, 0).mac, FAR.into(), 63));
        // The answer comes from where nobody in the VPC is, through the same port.
        let from = End { mac: end(M, 0).mac, ip: FAR.into(), port: 80 };
        lab.send(other, 2, &tcp(from, via_router(end(A, 1234)), flag::SYN | flag::ACK, b"")).only(0, 1);
        // A route within the VPC that is longer than the local one wins, also where
        // the destination is on the middlebox's own card.
        lab.send(0, 1, &tcp(end(A, 1234), via_router(end(D, 80)), flag::SYN, b"")).only(other, 2);
    }
}

#[test]
fn a_port_that_checks_takes_nothing_for_others() {
    for other in [0, 1] {
        let mut lab = with_middlebox(other);
        lab.port(other, 2).source_dest_check = true;
        lab.network(100, |network| network.mappings.iter_mut().for_each(|mapping| mapping.forwards = false));
        lab.send(0, 1, &tcp(end(A, 1234), far(80), flag::SYN, b"")).nothing();
        assert_eq!(lab.drops(other, NotOwnDestination), 1);
        let from = End { mac: end(M, 0).mac, ip: FAR.into(), port: 80 };
        lab.send(other, 2, &tcp(from, via_router(end(A, 80)), flag::SYN, b"")).nothing();
        assert_eq!(lab.drops(other, SpoofedAddress), 1);
        // Nor is its card believed, should it be taken over.
        lab.feed(0, Device::Underlay, &encapsulated(vtep(1), 0, 100, &tcp(from, end(A, 80), flag::SYN, b""))).nothing();
        assert_eq!(lab.drops(0, UnmappedVtep), 1);
    }
}

#[test]
fn what_was_open_through_a_port_is_cut_when_it_checks_again() {
    let mut lab = with_middlebox(1);
    let syn = tcp(end(A, 1234), far(80), flag::SYN, b"");
    let ack = tcp(end(A, 1234), far(80), flag::ACK, b"");
    lab.send(0, 1, &syn).only(1, 2);
    lab.send(0, 1, &ack).only(1, 2);
    lab.port(1, 2).source_dest_check = true;
    lab.apply();
    lab.send(0, 1, &ack).nothing();
    assert_eq!(lab.drops(1, NotOwnDestination), 1);
}

#[test]
fn a_route_to_a_port_that_is_gone_is_a_black_hole() {
    let mut lab = with_middlebox(1);
    lab.network(100, |network| network.mappings.retain(|mapping| mapping.ip != std::net::Ipv4Addr::from(M)));
    lab.send(0, 1, &tcp(end(A, 1234), far(80), flag::SYN, b"")).nothing();
    assert_eq!(lab.drops(0, Blackhole), 1);
    // A port is no way to itself.
    let mut lab = with_middlebox(0);
    lab.port(0, 2).routes = vec![route(FAR, 32, RouteTarget::NetworkInterface(M.into()))];
    lab.apply();
    lab.send(0, 2, &tcp(end(M, 1), far(80), flag::SYN, b"")).nothing();
    assert_eq!(lab.drops(0, Blackhole), 1);
}

const P: [u8; 4] = [10, 1, 0, 5];
const Q: [u8; 4] = [10, 2, 0, 5];

/// A in VPC 100 on card 0, P in VPC 200 on `other`, Q in VPC 300 there too; 200 is
/// peered with both.
fn with_peers(other: u8) -> Lab {
    let mut lab = Lab::new(2);
    let open = |mut port: PortConfig, routes: &[Route]| {
        port.ingress = vec![tcp_rule(80, Remote::Group(GroupId(1)))];
        port.routes = routes.to_vec();
        port
    };
    let to = |prefix, vni| route(prefix, 16, RouteTarget::Peer(Vni(vni)));
    lab.place(0, vec![open(guest(1, 100, A), &[to([10, 1, 0, 0], 200), to([10, 2, 0, 0], 200)])]);
    lab.place(other, vec![open(guest(2, 200, P), &[to([10, 0, 0, 0], 100), to([10, 2, 0, 0], 300)])]);
    lab.place(other, vec![open(guest(3, 300, Q), &[to([10, 1, 0, 0], 200), to([10, 0, 0, 0], 200)])]);
    let members = vec![A.into(), P.into(), Q.into()];
    for (vni, peers) in [(100, vec![Vni(200)]), (200, vec![Vni(100), Vni(300)]), (300, vec![Vni(200)])] {
        let groups = std::collections::HashMap::from([(GroupId(1), members.clone())]);
        lab.network(vni, |network| (network.peers, network.groups) = (peers.clone(), groups.clone()));
    }
    lab
}

#[test]
fn peers_reach_each_other_and_their_groups_count_on_both_sides() {
    for other in [0, 1] {
        let mut lab = with_peers(other);
        let seen = lab.send(0, 1, &tcp(end(A, 1234), via_router(end(P, 80)), flag::SYN, b""));
        let (ethernet, ip, _) = parse(seen.only(other, 2));
        assert_eq!((ethernet.destination, ip.source, ip.ttl), (end(P, 0).mac, A.into(), 63));
        lab.send(other, 2, &tcp(end(P, 80), via_router(end(A, 1234)), flag::SYN | flag::ACK, b"")).only(0, 1);
        lab.network(200, |network| network.groups.clear());
        lab.send(0, 1, &tcp(end(A, 1235), via_router(end(P, 80)), flag::SYN, b"")).nothing();
        assert_eq!(lab.drops(other, DeniedIngress), 1);
    }
}

#[test]
fn no_vpc_is_a_way_to_the_peers_of_its_peer() {
    for other in [0, 1] {
        let mut lab = with_peers(other);
        lab.send(0, 1, &tcp(end(A, 1234), via_router(end(Q, 80)), flag::SYN, b"")).nothing();
        assert_eq!(lab.drops(0, NoMapping), 1);
        // Nor for a port that sends in the name of others.
        lab.port(other, 2).source_dest_check = false;
        lab.apply();
        let posing = End { ip: Q.into(), ..end(P, 1) };
        lab.send(other, 2, &tcp(posing, via_router(end(A, 80)), flag::SYN, b"")).nothing();
        assert_eq!(lab.drops(other, SpoofedAddress), 1);
    }
}

#[test]
fn a_peer_is_believed_for_its_own_addresses_from_their_cards_only() {
    let mut lab = with_peers(1);
    let inner = |from| tcp(end(from, 1), end(A, 80), flag::SYN, b"");
    lab.feed(0, Device::Underlay, &encapsulated(vtep(1), 0, 100, &inner(P))).only(0, 1);
    lab.feed(0, Device::Underlay, &encapsulated(vtep(7), 0, 100, &inner(P))).nothing();
    lab.feed(0, Device::Underlay, &encapsulated(vtep(1), 0, 100, &inner(Q))).nothing();
    assert_eq!(lab.drops(0, UnmappedVtep), 2);
    // The peering ends: what it let in is cut with its next packet.
    lab.network(100, |network| network.peers.clear());
    let later = tcp(end(P, 1), end(A, 80), flag::ACK, b"");
    lab.feed(0, Device::Underlay, &encapsulated(vtep(1), 0, 100, &later)).nothing();
    assert_eq!(lab.drops(0, UnmappedVtep), 3);
    lab.send(0, 1, &tcp(end(A, 1234), via_router(end(P, 80)), flag::SYN, b"")).nothing();
    assert_eq!(lab.drops(0, Blackhole), 1);
}

#[test]
fn an_address_of_a_peer_cannot_come_from_the_internet() {
    let mut lab = with_peers(1);
    lab.port(0, 1).public = Some([198, 51, 100, 16].into());
    lab.apply();
    let to = End { mac: public_mac(0), ip: [198, 51, 100, 16].into(), port: 80 };
    let from = End { mac: GATEWAY_MAC, ..end(P, 1) };
    lab.feed(0, Device::Public, &tcp(from, to, flag::SYN, b"")).nothing();
    assert_eq!(lab.drops(0, SpoofedAddress), 1);
}
