//! Secondary private addresses, each with a public one of its own.

use std::time::Duration;

use super::lab::*;
use crate::counters::DropReason::*;
use crate::headers::tcp as flag;
use crate::pipeline::Device;
use crate::*;

const A: [u8; 4] = [10, 0, 0, 5];
const A2: [u8; 4] = [10, 0, 0, 50];
const B: [u8; 4] = [10, 0, 0, 6];
const X: [u8; 4] = [198, 51, 100, 16];
const X2: [u8; 4] = [198, 51, 100, 17];
const INTERNET: [u8; 4] = [203, 0, 113, 9];

fn second(port: u16) -> End {
    End { ip: A2.into(), ..end(A, port) }
}

fn lab(other: u8) -> Lab {
    let mut lab = Lab::new(2);
    let mut a = guest(1, 100, A);
    a.public = Some(X.into());
    a.ingress = vec![tcp_rule(80, ANY)];
    a.secondary = vec![Address { private: A2.into(), public: Some(X2.into()) }];
    let mut b = guest(2, 100, B);
    b.ingress = vec![tcp_rule(80, ANY)];
    lab.place(0, vec![a]);
    lab.place(other, vec![b]);
    lab.network(100, |network| network.mappings.push(Mapping::new(A2.into(), end(A, 0).mac, vtep(0))));
    lab.wait(Duration::from_secs(1));
    lab
}

#[test]
fn a_secondary_address_speaks_and_is_reached_like_the_first() {
    for other in [0, 1] {
        let mut lab = lab(other);
        lab.send(0, 1, &tcp(second(1234), end(B, 80), flag::SYN, b"")).only(other, 2);
        lab.send(other, 2, &tcp(end(B, 80), second(1234), flag::SYN | flag::ACK, b"")).only(0, 1);
        lab.send(other, 2, &tcp(end(B, 1), second(80), flag::SYN, b"")).only(0, 1);
        let question = arp_frame(1, (end(B, 0).mac, B.into()), (Mac([0; 6]), A2.into()));
        let answer = crate::arp::parse(&lab.send(other, 2, &question).only(other, 2)[14..]).unwrap();
        assert_eq!(answer.sender, (end(A, 0).mac, A2.into()));
        let own = arp_frame(1, (end(A, 0).mac, A2.into()), (Mac([0; 6]), B.into()));
        lab.send(0, 1, &own).only(0, 1);
        lab.port(0, 1).secondary.clear();
        lab.apply();
        lab.send(0, 1, &tcp(second(1234), end(B, 80), flag::SYN, b"")).nothing();
        lab.send(0, 1, &own).nothing();
        assert_eq!((lab.drops(0, SpoofedAddress), lab.drops(0, SpoofedArp)), (1, 1));
    }
}

#[test]
fn each_private_address_has_its_own_public_one() {
    let mut lab = lab(1);
    let internet = |port| End { mac: GATEWAY_MAC, ip: INTERNET.into(), port };
    for (private, public) in [(A, X), (A2, X2)] {
        let own = End { ip: private.into(), ..end(A, 80) };
        let x = End { mac: public_mac(0), ip: public.into(), port: 80 };
        let seen = lab.feed(0, Device::Public, &tcp(internet(9), x, flag::SYN, b""));
        assert_eq!(parse(seen.only(0, 1)).1.destination, std::net::Ipv4Addr::from(private));
        let seen = lab.send(0, 1, &tcp(own, via_router(internet(9)), flag::SYN | flag::ACK, b""));
        assert_eq!(parse(seen.only_public()).1.source, std::net::Ipv4Addr::from(public));
    }
    // What is not its own leaves under no public address of it.
    lab.port(0, 1).source_dest_check = false;
    lab.port(0, 1).secondary[0].public = None;
    lab.apply();
    for foreign in [A2, [10, 0, 0, 77]] {
        let from = End { ip: foreign.into(), ..end(A, 5) };
        assert!(lab.send(0, 1, &tcp(from, via_router(internet(80)), flag::SYN, b"")).public.is_empty());
    }
    assert_eq!(lab.drops(0, NoPublicAddress), 2);
}
