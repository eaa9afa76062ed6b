//! Guests of a VPC, on one card and on two.

use std::time::Duration;

use super::lab::*;
use crate::counters::DropReason::*;
use crate::headers::{self, tcp as flag};
use crate::pipeline::{Device, ROUTER_MAC};
use crate::*;

const A: [u8; 4] = [10, 0, 0, 5];
const B: [u8; 4] = [10, 0, 0, 6];
const C: [u8; 4] = [10, 0, 1, 7];

/// A on card 0; B and C (another subnet) on `other`; all let TCP 80 and pings in.
fn lab(other: u8) -> Lab {
    let mut lab = Lab::new(2);
    let open = |mut port: PortConfig| {
        port.ingress = vec![tcp_rule(80, ANY), udp_rule(80, ANY), icmp_rule(ANY)];
        port
    };
    lab.place(0, vec![open(guest(1, 100, A))]);
    lab.place(other, vec![open(guest(2, 100, B)), open(guest(3, 100, C))]);
    lab
}

#[test]
fn a_frame_within_the_subnet_arrives_unchanged_on_either_card() {
    for other in [0, 1] {
        let mut lab = lab(other);
        let sent = tcp(end(A, 1234), end(B, 80), flag::SYN, b"hello");
        let seen = lab.send(0, 1, &sent);
        assert_eq!(seen.only(other, 2), sent);
        let answer = tcp(end(B, 80), end(A, 1234), flag::SYN | flag::ACK, b"");
        assert_eq!(lab.send(other, 2, &answer).only(0, 1), answer);
        assert_eq!(lab.all_drops(0) + lab.all_drops(1), 0);
    }
}

#[test]
fn between_subnets_the_router_takes_one_hop_and_its_own_mac() {
    for other in [0, 1] {
        let mut lab = lab(other);
        let sent = tcp(end(A, 1234), via_router(end(C, 80)), flag::SYN, b"hello");
        let seen = lab.send(0, 1, &sent);
        let got = seen.only(other, 3);
        let (ethernet, ip, _) = parse(got);
        assert_eq!((ethernet.source, ethernet.destination), (ROUTER_MAC, end(C, 80).mac));
        assert_eq!(ip.ttl, 63);
        assert_eq!(got[34..], sent[34..]);
    }
}

#[test]
fn the_last_hop_is_reported_by_the_router() {
    let mut lab = lab(1);
    let mut sent = udp(end(A, 1234), via_router(end(C, 80)), b"probe");
    sent[14 + 8] = 1;
    headers::write(&mut sent, 14 + 10, [0, 0]);
    let sum = headers::checksum(&sent[14..34]);
    headers::write(&mut sent, 14 + 10, sum.to_be_bytes());
    let seen = lab.send(0, 1, &sent);
    let (_, ip, transport) = parse(seen.only(0, 1));
    assert_eq!((ip.source, transport.icmp_type), ([10, 0, 0, 1].into(), 11));
    assert_eq!(seen.only(0, 1)[14 + 28..], sent[14..]);
    assert_eq!(lab.drops(0, TtlExpired), 1);
    // The hop that is not taken inside a subnet costs nothing.
    let mut direct = udp(end(A, 1234), end(B, 80), b"probe");
    direct[14 + 8] = 1;
    headers::write(&mut direct, 14 + 10, [0, 0]);
    let sum = headers::checksum(&direct[14..34]);
    headers::write(&mut direct, 14 + 10, sum.to_be_bytes());
    lab.send(0, 1, &direct).only(1, 2);
}

#[test]
fn the_wire_carries_vxlan_with_the_vni_of_the_vpc() {
    let mut lab = lab(1);
    let sent = tcp(end(A, 1234), end(B, 80), flag::SYN, b"");
    let seen = lab.send(0, 1, &sent);
    let vxlan: Vec<_> = seen.underlay.iter().filter(|frame| frame[12..14] == [8, 0]).collect();
    assert_eq!(vxlan.len(), 1);
    let (ethernet, outer, udp) = {
        let (ethernet, bytes) = headers::ethernet(vxlan[0]).unwrap();
        let ip = headers::ipv4(bytes).unwrap();
        (ethernet, ip, headers::transport(&ip, &bytes[20..]).unwrap())
    };
    assert_eq!((ethernet.source, ethernet.destination), (underlay_mac(0), underlay_mac(1)));
    assert_eq!((outer.source, outer.destination, outer.protocol), (vtep(0), vtep(1), 17));
    assert!(outer.dont_fragment && udp.destination_port == 4789 && udp.source_port >= 0xc000);
    assert_eq!(crate::vxlan::decap(&vxlan[0][42..]).unwrap(), (Vni(100), &sent[..]));
    // One flow keeps its source port, and other flows have others.
    let port = |lab: &mut Lab, source| {
        let seen = lab.send(0, 1, &tcp(end(A, source), end(B, 80), flag::SYN, b""));
        headers::read::<2>(seen.underlay.last().unwrap(), 34).unwrap()
    };
    assert_eq!(port(&mut lab, 1234), udp.source_port.to_be_bytes());
    let ports: std::collections::HashSet<_> = (0..200).map(|source| port(&mut lab, source)).collect();
    assert!(ports.len() > 190);
}

#[test]
fn jumbo_frames_cross_cards_whole_and_longer_ones_do_not_leave() {
    for other in [0, 1] {
        let mut lab = lab(other);
        let sent = tcp(end(A, 1234), end(B, 80), flag::SYN, &vec![0x5a; 9001 - 40]);
        assert_eq!(sent.len(), 9015);
        assert_eq!(lab.send(0, 1, &sent).only(other, 2), sent);
        let long = tcp(end(A, 1234), end(B, 80), flag::ACK, &vec![0x5a; 9002 - 40]);
        lab.send(0, 1, &long).nothing();
        assert_eq!(lab.drops(0, TooLong), 1);
    }
}

#[test]
fn two_vpcs_with_the_same_addresses_never_mix() {
    for other in [0, 1] {
        let mut lab = lab(other);
        let mut twin = guest(12, 200, B);
        twin.ingress = vec![tcp_rule(80, ANY)];
        lab.place(0, vec![guest(11, 200, A)]);
        lab.place(other, vec![twin]);
        let sent = tcp(end(A, 1234), end(B, 80), flag::SYN, b"");
        lab.send(0, 1, &sent).only(other, 2);
        lab.send(0, 11, &sent).only(other, 12);
        // The flows of one do not serve the other either.
        let answer = tcp(end(B, 80), end(A, 1234), flag::SYN | flag::ACK, b"");
        lab.send(other, 2, &answer).only(0, 1);
        lab.send(other, 12, &answer).only(0, 11);
        let foreign = tcp(end(A, 1234), end(C, 80), flag::SYN, b"");
        lab.send(0, 11, &foreign).nothing();
        assert_eq!(lab.drops(0, NoMapping), 1);
    }
}

#[test]
fn a_port_that_moves_to_another_vpc_takes_no_flow_along() {
    let mut lab = Lab::new(1);
    lab.place(0, vec![guest(1, 100, A), guest(2, 100, B), guest(12, 200, B)]);
    lab.port(0, 2).ingress = vec![tcp_rule(80, ANY)];
    lab.apply();
    lab.send(0, 1, &tcp(end(A, 1234), end(B, 80), flag::SYN, b"")).only(0, 2);
    lab.port(0, 1).vni = Vni(200);
    lab.apply();
    lab.send(0, 12, &tcp(end(B, 80), end(A, 1234), flag::SYN | flag::ACK, b"")).nothing();
    assert_eq!(lab.drops(0, DeniedIngress), 1);
}

#[test]
fn what_a_guest_may_not_claim_is_dropped_and_counted() {
    let mut lab = lab(1);
    let mut thief = end(A, 1234);
    thief.mac = end(B, 0).mac;
    lab.send(0, 1, &tcp(thief, end(B, 80), flag::SYN, b"")).nothing();
    assert_eq!(lab.drops(0, SpoofedMac), 1);
    thief = end(A, 1234);
    thief.ip = [10, 0, 0, 9].into();
    lab.send(0, 1, &tcp(thief, end(B, 80), flag::SYN, b"")).nothing();
    assert_eq!(lab.drops(0, SpoofedAddress), 1);
    for sender in [(end(A, 0).mac, B.into()), (end(B, 0).mac, A.into())] {
        let message = arp_frame(1, sender, (Mac([0; 6]), [10, 0, 0, 1].into()));
        let mut message = message.clone();
        message[6..12].copy_from_slice(&end(A, 0).mac.0);
        lab.send(0, 1, &message).nothing();
    }
    assert_eq!(lab.drops(0, SpoofedArp), 2);
    let counters = lab.cards[0].pipeline.board().read();
    assert_eq!(counters.ports[&PortId(1)].drops.total(), 4, "on the port's account too");
    assert_eq!(counters.underlay.tx_packets, 0);
}

#[test]
fn without_source_check_a_guest_may_route_for_others_but_not_for_nobody() {
    let mut lab = lab(0);
    lab.port(0, 1).source_dest_check = false;
    lab.apply();
    let mut other = end(A, 1234);
    other.ip = [192, 168, 7, 7].into();
    lab.send(0, 1, &tcp(other, end(B, 80), flag::SYN, b"")).only(0, 2);
    other.ip = [127, 0, 0, 1].into();
    lab.send(0, 1, &tcp(other, end(B, 80), flag::SYN, b"")).nothing();
    assert_eq!(lab.drops(0, SpoofedAddress), 1);
}

#[test]
fn vxlan_is_believed_only_from_the_card_that_the_mapping_names() {
    let mut lab = lab(1);
    let inner = tcp(end(A, 1234), end(B, 80), flag::SYN, b"");
    let stranger = vtep(77);
    lab.feed(1, Device::Underlay, &encapsulated(stranger, 1, 100, &inner)).nothing();
    assert_eq!(lab.drops(1, UnmappedVtep), 1);
    lab.feed(1, Device::Underlay, &encapsulated(vtep(0), 1, 999, &inner)).nothing();
    assert_eq!(lab.drops(1, UnknownVni), 1);
    let unmapped = tcp(end([10, 0, 0, 99], 1234), end(B, 80), flag::SYN, b"");
    lab.feed(1, Device::Underlay, &encapsulated(vtep(0), 1, 100, &unmapped)).nothing();
    assert_eq!(lab.drops(1, UnmappedVtep), 2);
    let nobody = tcp(end(A, 1234), end([10, 0, 0, 99], 80), flag::SYN, b"");
    lab.feed(1, Device::Underlay, &encapsulated(vtep(0), 1, 100, &nobody)).nothing();
    assert_eq!(lab.drops(1, UnknownDestination), 1);
    lab.feed(1, Device::Underlay, &encapsulated(vtep(0), 1, 100, &inner)).only(1, 2);
    // A flow that exists is no reason to believe another card.
    lab.feed(1, Device::Underlay, &encapsulated(stranger, 1, 100, &inner)).nothing();
    let later = tcp(end(A, 1234), end(B, 80), flag::ACK, b"");
    lab.feed(1, Device::Underlay, &encapsulated(stranger, 1, 100, &later)).nothing();
    assert_eq!(lab.drops(1, UnmappedVtep), 4);
    // The card's own address names its own guests only.
    lab.feed(1, Device::Underlay, &encapsulated(vtep(1), 1, 100, &tcp(end(C, 1), end(B, 80), flag::SYN, b""))).nothing();
    assert_eq!(lab.drops(1, UnmappedVtep), 5);
    let mut flagless = encapsulated(vtep(0), 1, 100, &inner);
    flagless[42] = 0;
    lab.feed(1, Device::Underlay, &flagless).nothing();
    assert_eq!(lab.drops(1, NoVni), 1);
}

#[test]
fn a_guest_that_moved_to_another_card_is_followed_at_once() {
    let mut lab = Lab::new(3);
    lab.place(0, vec![guest(1, 100, A)]);
    lab.place(1, vec![guest(2, 100, B)]);
    lab.port(1, 2).ingress = vec![udp_rule(80, ANY)];
    lab.apply();
    let datagram = udp(end(A, 1234), end(B, 80), b"x");
    lab.send(0, 1, &datagram).only(1, 2);
    let moved = lab.cards[1].snapshot.ports.pop().unwrap();
    lab.cards[2].snapshot.ports.push(moved);
    for card in &mut lab.cards {
        card.snapshot.networks[0].mappings[1].vtep = vtep(2);
    }
    lab.apply();
    lab.send(0, 1, &datagram).only(2, 2);
    lab.send(2, 2, &udp(end(B, 80), end(A, 1234), b"y")).only(0, 1);
    let stale = encapsulated(vtep(1), 0, 100, &udp(end(B, 80), end(A, 1234), b"z"));
    lab.feed(0, Device::Underlay, &stale).nothing();
    assert_eq!(lab.drops(0, UnmappedVtep), 1, "the old card is no longer believed");
}

#[test]
fn an_unresolved_card_is_asked_for_again_and_its_packets_are_bounded() {
    let mut lab = lab(1);
    let silent = lab.cards.pop().unwrap();
    let mut questions = Vec::new();
    for source in 0..100 {
        questions.extend(lab.send(0, 1, &tcp(end(A, source), end(B, 80), flag::SYN, b"")).underlay);
    }
    assert_eq!(questions.len(), 1);
    assert_eq!(lab.drops(0, NeighbourQueueFull), 36);
    let seen = lab.wait(Duration::from_millis(350));
    assert_eq!(seen.underlay.len(), 2, "after 100 and 300 ms");
    lab.cards.push(silent);
    let mut seen = lab.wait(Duration::from_secs(1));
    seen.guests.retain(|(card, port, _)| (*card, *port) == (1, 2));
    assert_eq!(seen.guests.len(), 64, "what waited arrives once the card answers");
    lab.cards.pop();
    lab.now += Duration::from_secs(120);
    lab.wait(Duration::from_secs(1));
    lab.send(0, 1, &tcp(end(A, 1), end(B, 80), flag::SYN, b""));
    lab.wait(Duration::from_secs(10));
    assert_eq!(lab.drops(0, NeighbourUnresolved), 1);
}

#[test]
fn a_device_that_encapsulates_itself_gets_the_vxlan_payload_and_the_peer() {
    use crate::action::Output;
    use crate::packet::{Packet, Pool};
    use crate::pipeline::{Pipeline, Turn};
    use crate::policy::Tables;

    let mut snapshot = lab(1).cards.remove(0).snapshot;
    snapshot.ports[0].ingress = vec![tcp_rule(80, ANY)];
    let mut settings = settings(0);
    settings.underlay.encapsulated = false;
    let mut pipeline = Pipeline::new(settings);
    pipeline.apply(Duration::ZERO, &Tables::compile(&snapshot, &Tables::default()));
    let (mut pool, mut out) = (Pool::new(8), Output::default());
    let mut turn = Turn { now: Duration::ZERO, pool: &mut pool, out: &mut out };
    let sent = tcp(end(A, 1234), end(B, 80), flag::SYN, b"");
    let mut packet = Packet::new();
    assert!(packet.copy_from(&sent));
    pipeline.turn(&mut turn, Device::Port(PortId(1)), &mut vec![packet]);
    let mut packet = turn.out.underlay.pop().unwrap();
    assert_eq!(packet.peer(), Some(vtep(1)));
    assert_eq!(crate::vxlan::decap(packet.as_slice()).unwrap(), (Vni(100), &sent[..]));
    let answer = tcp(end(B, 80), end(A, 1234), flag::SYN | flag::ACK, b"");
    assert!(packet.copy_from(&answer) && crate::vxlan::push_header(&mut packet, Vni(100)));
    packet.set_peer(vtep(1));
    pipeline.turn(&mut turn, Device::Underlay, &mut vec![packet]);
    let mut got = 0;
    turn.out.drain_ports(turn.pool, |_, _, packets| got += packets.len());
    assert_eq!(got, 1);
}
