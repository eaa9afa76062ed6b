//! The public side: 1:1 translation, announcements, the 1,500-byte limit.

use std::time::Duration;

use super::lab::*;
use crate::counters::DropReason::*;
use crate::headers::{self, tcp as flag};
use crate::pipeline::{Device, ROUTER_MAC};
use crate::*;

const A: [u8; 4] = [10, 0, 0, 5];
const B: [u8; 4] = [10, 0, 0, 6];
const X: [u8; 4] = [198, 51, 100, 16];
const Y: [u8; 4] = [198, 51, 100, 17];
const INTERNET: [u8; 4] = [203, 0, 113, 9];

/// A has X on card 0, B has Y on `other`; both let TCP 22 in.
fn lab(other: u8) -> Lab {
    let mut lab = Lab::new(2);
    let with = |mut port: PortConfig, public: [u8; 4]| {
        port.public = Some(public.into());
        port.ingress = vec![tcp_rule(22, ANY), icmp_rule(ANY)];
        port
    };
    lab.place(0, vec![with(guest(1, 100, A), X)]);
    lab.place(other, vec![with(guest(2, 100, B), Y)]);
    lab.wait(Duration::from_secs(1));
    lab
}

fn internet(port: u16) -> End {
    End { mac: GATEWAY_MAC, ip: INTERNET.into(), port }
}

fn public_end(card: u8, ipv4: [u8; 4], port: u16) -> End {
    End { mac: public_mac(card), ip: ipv4.into(), port }
}

#[test]
fn a_connection_from_the_internet_reaches_the_private_address_and_back() {
    let mut lab = lab(1);
    let seen = lab.feed(0, Device::Public, &tcp(internet(4000), public_end(0, X, 22), flag::SYN, b"ssh"));
    let (ethernet, ip, transport) = parse(seen.only(0, 1));
    assert_eq!((ethernet.source, ethernet.destination), (ROUTER_MAC, end(A, 0).mac));
    assert_eq!((ip.source, ip.destination, ip.ttl), (INTERNET.into(), A.into(), 63));
    assert_eq!((transport.source_port, transport.destination_port), (4000, 22));
    let answer = tcp(end(A, 22), via_router(internet(4000)), flag::SYN | flag::ACK, b"banner");
    let seen = lab.send(0, 1, &answer);
    let (ethernet, ip, transport) = parse(seen.only_public());
    assert_eq!((ethernet.source, ethernet.destination), (public_mac(0), GATEWAY_MAC));
    assert_eq!((ip.source, ip.destination, ip.ttl), (X.into(), INTERNET.into(), 63));
    assert_eq!((transport.source_port, transport.destination_port), (22, 4000));
    // No rule, no entry.
    lab.feed(0, Device::Public, &tcp(internet(4000), public_end(0, X, 23), flag::SYN, b"")).nothing();
    assert_eq!(lab.drops(0, DeniedIngress), 1);
}

#[test]
fn a_guest_reaches_the_internet_under_its_public_address() {
    let mut lab = lab(1);
    for (out, back) in [
        (udp(end(A, 5353), via_router(internet(53)), b"odd"), udp(internet(53), public_end(0, X, 5353), b"even")),
        (ping(end(A, 0), via_router(internet(0)), 8, 9), ping(internet(0), public_end(0, X, 0), 0, 9)),
    ] {
        let seen = lab.send(0, 1, &out);
        assert_eq!(parse(seen.only_public()).1.source, std::net::Ipv4Addr::from(X));
        let seen = lab.feed(0, Device::Public, &back);
        assert_eq!(parse(seen.only(0, 1)).1.destination, std::net::Ipv4Addr::from(A));
    }
    // A neighbour on the public wire is reached directly, not by the gateway.
    let neighbour = End { mac: ROUTER_MAC, ip: [198, 51, 100, 99].into(), port: 53 };
    let seen = lab.send(0, 1, &udp(end(A, 1), neighbour, b"?"));
    let asked = crate::arp::parse(&seen.public[0][14..]).unwrap();
    assert_eq!((asked.sender, asked.target.1), ((public_mac(0), X.into()), neighbour.ip));
}

#[test]
fn without_public_address_or_route_nothing_leaves() {
    let mut lab = lab(1);
    let out = udp(end(A, 5353), via_router(internet(53)), b"?");
    lab.port(0, 1).public = None;
    lab.apply();
    assert!(lab.send(0, 1, &out).public.is_empty());
    lab.port(0, 1).public = Some(X.into());
    lab.port(0, 1).routes[0].target = RouteTarget::Blackhole;
    lab.apply();
    assert!(lab.send(0, 1, &out).public.iter().all(|frame| frame[12..14] != [8, 0]));
    lab.port(0, 1).routes.clear();
    lab.apply();
    assert!(lab.send(0, 1, &out).public.is_empty());
    assert_eq!((lab.drops(0, NoPublicAddress), lab.drops(0, Blackhole), lab.drops(0, NoRoute)), (1, 1, 1));
}

#[test]
fn the_longest_prefix_decides() {
    let mut lab = lab(1);
    let narrow = Route { destination: Prefix::new(INTERNET.into(), 32), target: RouteTarget::Blackhole };
    lab.port(0, 1).routes.insert(0, narrow);
    lab.apply();
    lab.send(0, 1, &udp(end(A, 1), via_router(internet(53)), b"?"));
    assert_eq!(lab.drops(0, Blackhole), 1);
    let other = End { mac: ROUTER_MAC, ip: [203, 0, 113, 10].into(), port: 53 };
    lab.send(0, 1, &udp(end(A, 1), other, b"?")).only_public();
}

#[test]
fn an_address_of_the_vpc_cannot_come_from_the_internet() {
    let mut lab = lab(1);
    for source in [B, [10, 0, 7, 7], [127, 0, 0, 1], [0, 1, 2, 3], [224, 0, 0, 1], [169, 254, 169, 254]] {
        let spoofed = End { mac: GATEWAY_MAC, ip: source.into(), port: 4000 };
        lab.feed(0, Device::Public, &tcp(spoofed, public_end(0, X, 22), flag::SYN, b"")).nothing();
    }
    assert_eq!(lab.drops(0, SpoofedAddress), 6);
    lab.feed(0, Device::Public, &tcp(internet(1), public_end(0, Y, 22), flag::SYN, b"")).nothing();
    assert_eq!(lab.drops(0, NotForUs), 1);
}

#[test]
fn guests_meet_by_their_public_addresses_on_one_card_and_on_two() {
    for other in [0, 1] {
        let mut lab = lab(other);
        let target = End { mac: ROUTER_MAC, ip: Y.into(), port: 22 };
        let seen = lab.send(0, 1, &tcp(end(A, 1234), target, flag::SYN, b""));
        let (_, ip, _) = parse(seen.only(other, 2));
        assert_eq!((ip.source, ip.destination), (X.into(), B.into()));
        let back = End { mac: ROUTER_MAC, ip: X.into(), port: 1234 };
        let seen = lab.send(other, 2, &tcp(end(B, 22), back, flag::SYN | flag::ACK, b""));
        let (_, ip, _) = parse(seen.only(0, 1));
        assert_eq!((ip.source, ip.destination), (Y.into(), A.into()));
        // An error about it is translated with what it quotes.
        let mut error = vec![3, 3, 0, 0, 0, 0, 0, 0];
        error.extend(&tcp(End { ip: X.into(), ..end(A, 1234) }, end(B, 22), flag::SYN, b"")[14..]);
        let seen = lab.send(other, 2, &frame(end(B, 0), End { port: 0, ..back }, 1, (1, 0), error));
        let (_, ip, _) = parse(seen.only(0, 1));
        assert_eq!((ip.source, ip.destination), (Y.into(), A.into()));
        let quoted = headers::ipv4_quoted(&seen.only(0, 1)[42..]).unwrap();
        assert_eq!((quoted.source, quoted.destination), (A.into(), Y.into()));
    }
}

#[test]
fn an_address_that_appears_is_announced_three_times_and_answered_for() {
    let mut lab = Lab::new(1);
    let mut port = guest(1, 100, A);
    port.public = Some(X.into());
    lab.cards[0].snapshot.ports.push(port);
    let mut announced = lab.apply().public;
    announced.extend(lab.wait(Duration::from_secs(2)).public);
    assert_eq!(announced.len(), 3);
    for frame in &announced {
        let message = crate::arp::parse(&frame[14..]).unwrap();
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!((message.operation, message.sender, message.target.1), (1, (public_mac(0), X.into()), X.into()));
    }
    let question = |target: [u8; 4]| arp_frame(1, (GATEWAY_MAC, GATEWAY), (Mac([0; 6]), target.into()));
    let seen = lab.feed(0, Device::Public, &question(X));
    let answer = crate::arp::parse(&seen.public[0][14..]).unwrap();
    assert_eq!((answer.operation, answer.sender), (2, (public_mac(0), X.into())));
    assert!(lab.feed(0, Device::Public, &question(Y)).public.is_empty());
    // Unchanged configuration is not news.
    assert!(lab.apply().public.is_empty());
}

#[test]
fn a_public_address_moves_between_cards_within_a_second() {
    let mut lab = lab(1);
    lab.port(1, 2).public = None;
    // B reaches X before and after, from the card that X moves to.
    lab.port(0, 1).public = None;
    lab.port(1, 2).public = Some(X.into());
    let seen = lab.apply();
    assert!(!seen.public.is_empty(), "announced at once");
    lab.feed(0, Device::Public, &tcp(internet(7), public_end(0, X, 22), flag::SYN, b"")).nothing();
    let seen = lab.feed(1, Device::Public, &tcp(internet(7), public_end(1, X, 22), flag::SYN, b""));
    assert_eq!(parse(seen.only(1, 2)).1.destination, std::net::Ipv4Addr::from(B));
    assert_eq!(lab.drops(0, NotForUs), 1);
}

#[test]
fn a_neighbour_card_follows_the_announcement_of_a_moved_address() {
    let mut lab = lab(1);
    let mut third = guest(3, 100, [10, 0, 0, 7]);
    third.public = Some([198, 51, 100, 18].into());
    third.ingress = vec![tcp_rule(22, ANY)];
    lab.place(1, vec![third]);
    let target = End { mac: ROUTER_MAC, ip: Y.into(), port: 22 };
    lab.send(0, 1, &tcp(end(A, 1), target, flag::SYN, b"")).only(1, 2);
    // Another machine on the wire announces Y: A's card follows.
    lab.port(1, 2).public = None;
    lab.apply();
    let announcement = arp_frame(1, (GATEWAY_MAC, Y.into()), (Mac([0; 6]), Y.into()));
    lab.feed(0, Device::Public, &announcement);
    let seen = lab.send(0, 1, &tcp(end(A, 2), target, flag::SYN, b""));
    assert_eq!(parse(seen.only_public()).0.destination, GATEWAY_MAC);
}

#[test]
fn longer_than_the_internet_takes_is_reported_or_cut() {
    let mut lab = lab(1);
    let sent = tcp(end(A, 1234), via_router(internet(80)), flag::SYN, &[1; 1461]);
    let seen = lab.send(0, 1, &sent);
    let got = seen.only(0, 1);
    let (_, ip, transport) = parse(got);
    assert_eq!((ip.source, transport.icmp_type, transport.icmp_code), ([10, 0, 0, 1].into(), 3, 4));
    assert_eq!(headers::read::<2>(got, 14 + 20 + 6), Some(1500u16.to_be_bytes()));
    assert!(got.len() <= 14 + 576);
    assert_eq!(lab.drops(0, TooLong), 1);
    lab.send(0, 1, &tcp(end(A, 1235), via_router(internet(80)), flag::SYN, &[1; 1460])).only_public();

    let seen = lab.send(0, 1, &udp(end(A, 1), via_router(internet(80)), &[7; 4000]));
    let pieces: Vec<_> = seen.public.iter().filter(|frame| frame[12..14] == [8, 0]).collect();
    assert_eq!(pieces.len(), 3);
    let mut datagram = Vec::new();
    for piece in pieces {
        let (_, ip, _) = parse(piece);
        assert!(piece.len() <= 1514 && ip.source == std::net::Ipv4Addr::from(X));
        datagram.extend(&piece[34..]);
    }
    assert_eq!(headers::transport_checksum(X.into(), INTERNET.into(), 17, &datagram), 0);
}

#[test]
fn errors_from_routers_of_the_internet_find_their_connection() {
    let mut lab = lab(1);
    let seen = lab.send(0, 1, &tcp(end(A, 1234), via_router(internet(80)), flag::SYN, b""));
    let quoted = seen.only_public()[14..].to_vec();
    let router = End { mac: GATEWAY_MAC, ip: [192, 0, 2, 1].into(), port: 0 };
    lab.port(0, 1).ingress.clear();
    lab.apply();
    let mut error = vec![3, 4, 0, 0, 0, 0, 5, 0];
    error.extend(&quoted[..28]);
    let seen = lab.feed(0, Device::Public, &frame(router, public_end(0, X, 0), 1, (1, 0), error.clone()));
    let (_, ip, _) = parse(seen.only(0, 1));
    assert_eq!((ip.source, ip.destination), (router.ip, A.into()));
    let inner = headers::ipv4_quoted(&seen.only(0, 1)[42..]).unwrap();
    assert_eq!((inner.source, inner.destination), (A.into(), INTERNET.into()));
    // About a connection that does not exist it is an ordinary ICMP message.
    headers::write(&mut error, 8 + 20, [0, 1]);
    lab.feed(0, Device::Public, &frame(router, public_end(0, X, 0), 1, (1, 0), error)).nothing();
    assert_eq!(lab.drops(0, DeniedIngress), 1);
}

#[test]
fn a_gateway_that_does_not_answer_is_asked_again() {
    let mut lab = lab(1);
    lab.gateway_answers = false;
    lab.send(0, 1, &udp(end(A, 1), via_router(internet(53)), b"?"));
    lab.wait(Duration::from_millis(150));
    lab.gateway_answers = true;
    let seen = lab.wait(Duration::from_secs(1));
    assert_eq!(parse(seen.only_public()).1.source, std::net::Ipv4Addr::from(X));
}
