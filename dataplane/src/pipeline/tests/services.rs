//! What the card answers itself: ARP, DHCP, ping; and what it hands to its services.

use std::net::Ipv4Addr;

use dhcproto::v4::{DhcpOption, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Decodable, Decoder, Encodable, Encoder};

use super::lab::*;
use crate::counters::DropReason::*;
use crate::headers::tcp as flag;
use crate::pipeline::{METADATA, ROUTER_MAC};
use crate::*;

const A: [u8; 4] = [10, 0, 0, 5];
const B: [u8; 4] = [10, 0, 0, 6];
const REMOTE: [u8; 4] = [10, 0, 0, 7];
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

fn lab() -> Lab {
    let mut lab = Lab::new(2);
    lab.place(0, vec![guest(1, 100, A), guest(2, 100, B)]);
    lab.place(1, vec![guest(3, 100, REMOTE), guest(4, 100, [10, 0, 1, 9])]);
    lab
}

#[test]
fn arp_is_answered_for_everybody_in_the_subnet_and_the_router() {
    let mut lab = lab();
    let a = end(A, 0);
    let mut ask = |target: Ipv4Addr| {
        let seen = lab.send(0, 1, &arp_frame(1, (a.mac, a.ip), (Mac([0; 6]), target)));
        seen.guests.first().map(|(_, _, frame)| {
            let message = crate::arp::parse(&frame[14..]).unwrap();
            assert_eq!((message.operation, message.target), (2, (a.mac, a.ip)));
            assert_eq!((&frame[..6], message.sender.1), (&a.mac.0[..], target));
            message.sender.0
        })
    };
    assert_eq!(ask(ROUTER), Some(ROUTER_MAC));
    assert_eq!(ask(METADATA), Some(ROUTER_MAC));
    assert_eq!(ask(B.into()), Some(end(B, 0).mac));
    assert_eq!(ask(REMOTE.into()), Some(end(REMOTE, 0).mac));
    for nobody in [[10, 0, 0, 99], [10, 0, 1, 9], A] {
        assert_eq!(ask(nobody.into()), None);
    }
    assert_eq!(lab.drops(0, ArpIgnored), 3);
}

fn dns(name: &[&str]) -> Vec<u8> {
    let mut bytes = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

fn with_resolver() -> Lab {
    let mut lab = lab();
    let config = ResolverConfig { domain: "ec2.internal".into(), public_domain: None };
    lab.network(100, |network| network.resolver = Some(config.clone()));
    // Neither groups nor ACLs stand between a guest and its resolver.
    lab.port(0, 1).egress.clear();
    lab.port(0, 1).acl = Some(Acl::default());
    lab.apply();
    lab
}

#[test]
fn the_resolver_answers_at_both_addresses() {
    let mut lab = with_resolver();
    for address in [[10, 0, 0, 2], [169, 254, 169, 253]] {
        let server = End { mac: ROUTER_MAC, ip: address.into(), port: 53 };
        let question = arp_frame(1, (end(A, 0).mac, A.into()), (Mac([0; 6]), server.ip));
        let answer = crate::arp::parse(&lab.send(0, 1, &question).only(0, 1)[14..]).unwrap();
        assert_eq!(answer.sender, (ROUTER_MAC, server.ip));
        let seen = lab.send(0, 1, &udp(end(A, 4000), server, &dns(&["ip-10-0-1-9", "ec2", "internal"])));
        let (ethernet, ip, transport) = parse(seen.only(0, 1));
        assert_eq!((ethernet.source, ip.source, ip.destination), (ROUTER_MAC, server.ip, A.into()));
        assert_eq!((transport.source_port, transport.destination_port), (53, 4000));
        assert!(seen.only(0, 1).ends_with(&[10, 0, 1, 9]), "on another card, in another subnet");
        let seen = lab.send(0, 1, &udp(end(A, 4000), server, &dns(&["ip-10-0-1-10", "ec2", "internal"])));
        assert_eq!(seen.only(0, 1)[42 + 3], 0x83);
        lab.send(0, 1, &tcp(end(A, 4000), server, flag::SYN, b"")).nothing();
        lab.send(0, 1, &udp(end(A, 4000), End { port: 54, ..server }, &dns(&["x"]))).nothing();
        lab.send(0, 1, &udp(end(A, 4000), server, b"short")).nothing();
    }
    assert_eq!((lab.drops(0, RouterUnserved), lab.drops(0, ResolverIgnored)), (4, 2));
}

#[test]
fn a_vpc_without_a_resolver_has_none_there() {
    let mut lab = lab();
    let link_local = End { mac: ROUTER_MAC, ip: [169, 254, 169, 253].into(), port: 53 };
    lab.send(0, 1, &udp(end(A, 4000), link_local, &dns(&["x"]))).nothing();
    assert_eq!(lab.drops(0, LinkLocal), 1);
    lab.send(0, 1, &udp(end(A, 4000), End { ip: [10, 0, 0, 2].into(), ..link_local }, &dns(&["x"]))).nothing();
    assert_eq!(lab.drops(0, NoMapping), 1);
}

#[test]
fn the_resolver_shares_the_allowance_of_the_services() {
    let mut lab = with_resolver();
    let server = End { mac: ROUTER_MAC, ip: [169, 254, 169, 253].into(), port: 53 };
    for _ in 0..1030 {
        lab.send(0, 1, &udp(end(A, 4000), server, &dns(&["ec2", "internal"])));
    }
    assert_eq!(lab.drops(0, LinkLocalAllowance), 6);
    let metadata = End { mac: ROUTER_MAC, ip: METADATA, port: 80 };
    assert!(lab.send(0, 1, &tcp(end(A, 1), metadata, flag::SYN, b"")).punted.is_empty());
}

#[test]
fn the_router_answers_a_ping_and_nothing_else() {
    let mut lab = lab();
    lab.port(0, 1).egress.clear();
    lab.apply();
    let router = End { mac: ROUTER_MAC, ip: ROUTER, port: 22 };
    let seen = lab.send(0, 1, &ping(end(A, 0), router, 8, 7));
    let (ethernet, ip, transport) = parse(seen.only(0, 1));
    assert_eq!((ethernet.source, ip.source, ip.destination), (ROUTER_MAC, ROUTER, A.into()));
    assert_eq!((transport.icmp_type, transport.source_port), (0, 7));
    lab.send(0, 1, &tcp(end(A, 1), router, flag::SYN, b"")).nothing();
    assert_eq!(lab.drops(0, RouterUnserved), 1);
}

#[test]
fn metadata_goes_to_the_card_without_a_rule_and_within_its_allowance() {
    let mut lab = lab();
    lab.port(0, 1).egress.clear();
    lab.apply();
    let service = End { mac: ROUTER_MAC, ip: METADATA, port: 80 };
    let request = tcp(end(A, 1), service, flag::SYN, b"");
    assert_eq!(lab.send(0, 1, &request).punted, std::slice::from_ref(&request));
    lab.send(0, 1, &udp(end(A, 1), service, b"")).nothing();
    assert_eq!(lab.drops(0, LinkLocal), 1);
    let mut thief = end(A, 1);
    thief.ip = B.into();
    assert!(lab.send(0, 1, &tcp(thief, service, flag::SYN, b"")).punted.is_empty());
    // The service's stack asks for the guest by ARP, and gets the answer.
    let answer = arp_frame(2, (end(A, 0).mac, A.into()), (ROUTER_MAC, METADATA));
    assert_eq!(lab.send(0, 1, &answer).punted, [answer]);
    let punted: usize = (0..1100).map(|_| lab.send(0, 1, &request).punted.len()).sum();
    assert_eq!(punted, 1022);
    assert_eq!(lab.drops(0, LinkLocalAllowance), 78);
}

fn dhcp(kind: MessageType, change: impl FnOnce(&mut Message)) -> Vec<u8> {
    let mut message = Message::default();
    message.set_opcode(Opcode::BootRequest).set_xid(0x1234).set_chaddr(&end(A, 0).mac.0);
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    change(&mut message);
    let mut bytes = Vec::new();
    message.encode(&mut Encoder::new(&mut bytes)).unwrap();
    let client = End { ip: message.ciaddr(), ..end(A, 68) };
    udp(client, End { mac: Mac::BROADCAST, ip: Ipv4Addr::BROADCAST, port: 67 }, &bytes)
}

fn answer(lab: &mut Lab, request: &[u8]) -> Option<(headers::Ethernet, headers::Ipv4, Message)> {
    let seen = lab.send(0, 1, request);
    seen.guests.first().map(|(_, _, frame)| {
        let (ethernet, ip, transport) = parse(frame);
        assert_eq!((ip.source, transport.source_port, transport.destination_port), (ROUTER, 67, 68));
        (ethernet, ip, Message::decode(&mut Decoder::new(&frame[42..])).unwrap())
    })
}

#[test]
fn a_dhcp_exchange_gives_the_port_its_address_and_everything_else() {
    let mut lab = lab();
    let (ethernet, ip, offer) = answer(&mut lab, &dhcp(MessageType::Discover, |_| ())).unwrap();
    assert_eq!((offer.opts().msg_type(), offer.yiaddr()), (Some(MessageType::Offer), A.into()));
    assert_eq!((ethernet.destination, ip.destination), (end(A, 0).mac, A.into()));
    let request = |address: [u8; 4], server: Ipv4Addr| {
        dhcp(MessageType::Request, move |message| {
            message.opts_mut().insert(DhcpOption::RequestedIpAddress(address.into()));
            message.opts_mut().insert(DhcpOption::ServerIdentifier(server));
        })
    };
    let (_, _, ack) = answer(&mut lab, &request(A, ROUTER)).unwrap();
    assert_eq!((ack.opts().msg_type(), ack.yiaddr(), ack.xid()), (Some(MessageType::Ack), A.into(), 0x1234));
    let option = |code| ack.opts().get(code).cloned();
    assert_eq!(option(OptionCode::SubnetMask), Some(DhcpOption::SubnetMask([255, 255, 255, 0].into())));
    assert_eq!(option(OptionCode::Router), Some(DhcpOption::Router(vec![ROUTER])));
    assert_eq!(option(OptionCode::DomainNameServer), Some(DhcpOption::DomainNameServer(vec![[10, 0, 0, 2].into()])));
    assert_eq!(option(OptionCode::Hostname), Some(DhcpOption::Hostname("ip-10-0-0-5".into())));
    assert_eq!(option(OptionCode::DomainName), Some(DhcpOption::DomainName("ec2.internal".into())));
    assert_eq!(option(OptionCode::InterfaceMtu), Some(DhcpOption::InterfaceMtu(9001)));
    assert_eq!(option(OptionCode::AddressLeaseTime), Some(DhcpOption::AddressLeaseTime(3600)));
    assert_eq!(option(OptionCode::ServerIdentifier), Some(DhcpOption::ServerIdentifier(ROUTER)));

    let (ethernet, _, nak) = answer(&mut lab, &request(B, ROUTER)).unwrap();
    assert_eq!((nak.opts().msg_type(), ethernet.destination), (Some(MessageType::Nak), Mac::BROADCAST));
    assert!(answer(&mut lab, &request(A, [10, 0, 0, 99].into())).is_none(), "another server was chosen");
    // A renewal comes from the address itself.
    let (_, ip, ack) = answer(
        &mut lab,
        &dhcp(MessageType::Request, |message| {
            message.set_ciaddr(Ipv4Addr::from(A));
        }),
    )
    .unwrap();
    assert_eq!((ack.opts().msg_type(), ip.destination), (Some(MessageType::Ack), A.into()));
    let foreign = dhcp(MessageType::Discover, |message| {
        message.set_chaddr(&end(B, 0).mac.0);
    });
    assert!(answer(&mut lab, &foreign).is_none());
    assert!(answer(&mut lab, &dhcp(MessageType::Release, |_| ())).is_none());
    assert_eq!(lab.drops(0, DhcpIgnored), 3);
}

#[test]
fn broadcast_multicast_and_other_protocols_stay_with_the_guest() {
    let mut lab = lab();
    let mut send = |ip: [u8; 4], mac| lab.send(0, 1, &udp(end(A, 1), End { mac, ip: ip.into(), port: 9 }, b"")).nothing();
    send([10, 0, 0, 255], Mac::BROADCAST);
    send([255; 4], Mac::BROADCAST);
    send([224, 0, 0, 251], Mac([1, 0, 0x5e, 0, 0, 251]));
    send(B, Mac::BROADCAST);
    assert_eq!(lab.drops(0, Multicast), 4);
    let mut v6 = vec![0; 60];
    crate::headers::write_ethernet(&mut v6, Mac::BROADCAST, end(A, 0).mac, 0x86dd);
    lab.send(0, 1, &v6).nothing();
    assert_eq!(lab.drops(0, UnsupportedEthertype), 1);
}

#[test]
fn padding_of_short_frames_is_not_forwarded() {
    let mut lab = lab();
    lab.port(0, 2).ingress = vec![udp_rule(9, ANY)];
    lab.apply();
    let sent = udp(end(A, 1), end(B, 9), b"");
    let mut padded = sent.clone();
    padded.resize(60, 0xee);
    assert_eq!(lab.send(0, 1, &padded).only(0, 2), sent);
}
