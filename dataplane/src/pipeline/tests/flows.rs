//! Security groups and the tracking of connections.

use std::time::Duration;

use super::lab::*;
use crate::counters::DropReason::*;
use crate::headers::{ICMP, tcp as flag};
use crate::*;

const A: [u8; 4] = [10, 0, 0, 5];
const B: [u8; 4] = [10, 0, 0, 6];

fn lab() -> Lab {
    let mut lab = Lab::new(2);
    lab.place(0, vec![guest(1, 100, A)]);
    lab.place(1, vec![guest(2, 100, B)]);
    lab
}

fn syn() -> Vec<u8> {
    tcp(end(A, 1234), end(B, 80), flag::SYN, b"")
}

/// A rule for them makes EC2 track what it lets in.
const NEIGHBOURS: Remote = Remote::Prefix(Prefix::new(std::net::Ipv4Addr::new(10, 0, 0, 0), 24));

/// Opens A:1234 -> B:80 until it is established.
fn establish(lab: &mut Lab) {
    lab.send(0, 1, &syn()).only(1, 2);
    lab.send(1, 2, &tcp(end(B, 80), end(A, 1234), flag::SYN | flag::ACK, b"")).only(0, 1);
    lab.send(0, 1, &tcp(end(A, 1234), end(B, 80), flag::ACK, b"")).only(1, 2);
}

#[test]
fn nothing_comes_in_by_default_and_a_rule_opens_exactly_its_port() {
    let mut lab = lab();
    lab.send(0, 1, &syn()).nothing();
    assert_eq!(lab.drops(1, DeniedIngress), 1);
    lab.port(1, 2).ingress = vec![tcp_rule(80, ANY)];
    lab.apply();
    lab.send(0, 1, &syn()).only(1, 2);
    for other in [79, 81] {
        lab.send(0, 1, &tcp(end(A, 1), end(B, other), flag::SYN, b"")).nothing();
    }
    lab.send(0, 1, &udp(end(A, 1), end(B, 80), b"")).nothing();
    lab.send(0, 1, &ping(end(A, 0), end(B, 0), 8, 1)).nothing();
    assert_eq!(lab.drops(1, DeniedIngress), 5);
}

#[test]
fn rules_name_prefixes_and_icmp_types() {
    let mut lab = lab();
    let rule = |icmp, remote| Rule { protocol: Protocol::Number(ICMP), ports: None, icmp, remote };
    let mut case = |rule: Rule, passes| {
        lab.port(1, 2).ingress = vec![rule];
        lab.apply();
        lab.now += Duration::from_secs(60);
        lab.wait(Duration::from_secs(2));
        assert_eq!(lab.send(0, 1, &ping(end(A, 0), end(B, 0), 8, 1)).guests.len(), usize::from(passes), "{rule:?}");
    };
    case(rule((Some(8), None), ANY), true);
    case(rule((Some(8), Some(0)), ANY), true);
    case(rule((Some(0), None), ANY), false);
    case(rule((Some(8), Some(1)), ANY), false);
    case(rule((None, None), Remote::Prefix(Prefix::new(A.into(), 32))), true);
    case(rule((None, None), Remote::Prefix(Prefix::new(B.into(), 32))), false);
}

#[test]
fn established_reply_passes_without_ingress_rule() {
    let mut lab = lab();
    lab.port(1, 2).ingress = vec![tcp_rule(80, ANY), udp_rule(53, ANY), icmp_rule(ANY)];
    lab.port(1, 2).egress = Vec::new();
    lab.apply();
    establish(&mut lab);
    lab.send(0, 1, &udp(end(A, 999), end(B, 53), b"?")).only(1, 2);
    lab.send(1, 2, &udp(end(B, 53), end(A, 999), b"!")).only(0, 1);
    lab.send(0, 1, &ping(end(A, 0), end(B, 0), 8, 42)).only(1, 2);
    lab.send(1, 2, &ping(end(B, 0), end(A, 0), 0, 42)).only(0, 1);
    assert_eq!(lab.all_drops(0) + lab.all_drops(1), 0);
    // What nobody asked for is no reply.
    lab.send(1, 2, &udp(end(B, 53), end(A, 998), b"!")).nothing();
    lab.send(1, 2, &ping(end(B, 0), end(A, 0), 0, 43)).nothing();
    lab.send(1, 2, &ping(end(B, 0), end(A, 0), 8, 42)).nothing();
    assert_eq!(lab.drops(1, DeniedEgress), 3);
}

#[test]
fn an_echo_request_does_not_pass_as_the_reply_to_one() {
    let mut lab = lab();
    lab.port(1, 2).ingress = vec![icmp_rule(ANY)];
    lab.apply();
    lab.send(0, 1, &ping(end(A, 0), end(B, 0), 8, 42)).only(1, 2);
    // B may send anything, but A lets nothing in.
    lab.send(1, 2, &ping(end(B, 0), end(A, 0), 8, 42)).nothing();
    assert_eq!(lab.drops(0, DeniedIngress), 1);
    lab.send(1, 2, &ping(end(B, 0), end(A, 0), 0, 42)).only(0, 1);
}

#[test]
fn egress_rules_hold_what_they_do_not_name() {
    let mut lab = lab();
    lab.port(1, 2).ingress = vec![tcp_rule(80, ANY), tcp_rule(81, ANY)];
    lab.port(0, 1).egress = vec![tcp_rule(81, ANY)];
    lab.apply();
    lab.send(0, 1, &syn()).nothing();
    assert_eq!(lab.drops(0, DeniedEgress), 1);
    lab.send(0, 1, &tcp(end(A, 1), end(B, 81), flag::SYN, b"")).only(1, 2);
}

#[test]
fn a_group_rule_follows_membership() {
    let mut lab = lab();
    let group = GroupId(5);
    lab.port(1, 2).ingress = vec![tcp_rule(80, Remote::Group(group))];
    lab.apply();
    lab.send(0, 1, &syn()).nothing();
    lab.cards[1].snapshot.networks[0].groups.insert(group, vec![A.into()]);
    lab.apply();
    lab.send(0, 1, &syn()).only(1, 2);
    lab.cards[1].snapshot.networks[0].groups.insert(group, vec![B.into()]);
    lab.apply();
    lab.send(0, 1, &tcp(end(A, 5), end(B, 80), flag::SYN, b"")).nothing();
    assert_eq!(lab.drops(1, DeniedIngress), 2);
}

#[test]
fn revoking_closes_for_new_connections_while_tracked_ones_go_on() {
    let mut lab = lab();
    lab.port(1, 2).ingress = vec![tcp_rule(80, NEIGHBOURS)];
    lab.apply();
    establish(&mut lab);
    lab.port(1, 2).ingress.clear();
    lab.port(1, 2).generation = 2;
    lab.apply();
    lab.send(0, 1, &tcp(end(A, 1234), end(B, 80), flag::ACK, b"still here")).only(1, 2);
    lab.send(1, 2, &tcp(end(B, 80), end(A, 1234), flag::ACK, b"me too")).only(0, 1);
    lab.send(0, 1, &tcp(end(A, 1235), end(B, 80), flag::SYN, b"")).nothing();
    // A new connection with the ports of the old one is new.
    lab.send(0, 1, &syn()).nothing();
    assert_eq!(lab.drops(1, DeniedIngress), 2);
    lab.send(0, 1, &tcp(end(A, 1234), end(B, 80), flag::ACK, b"unharmed")).only(1, 2);
}

#[test]
fn a_syn_sent_again_after_the_rule_was_revoked_is_refused() {
    let mut lab = lab();
    lab.port(1, 2).ingress = vec![tcp_rule(80, ANY)];
    lab.apply();
    lab.send(0, 1, &syn()).only(1, 2);
    lab.port(1, 2).ingress.clear();
    lab.apply();
    lab.send(0, 1, &syn()).nothing();
}

#[test]
fn a_connection_that_both_sides_closed_is_forgotten_and_its_ports_reusable() {
    let mut lab = lab();
    lab.port(1, 2).ingress = vec![tcp_rule(80, ANY)];
    lab.apply();
    establish(&mut lab);
    lab.send(0, 1, &tcp(end(A, 1234), end(B, 80), flag::FIN | flag::ACK, b""));
    lab.send(1, 2, &tcp(end(B, 80), end(A, 1234), flag::FIN | flag::ACK, b""));
    lab.send(0, 1, &tcp(end(A, 1234), end(B, 80), flag::ACK, b"")).only(1, 2);
    lab.send(0, 1, &syn()).only(1, 2);
    lab.send(0, 1, &tcp(end(A, 1234), end(B, 80), flag::RST, b"")).only(1, 2);
    lab.wait(Duration::from_secs(12));
    assert_eq!(lab.cards[1].pipeline.board().read().flows, 0);
}

#[test]
fn idle_connections_live_as_long_as_their_protocol_says() {
    let mut lab = lab();
    lab.port(1, 2).ingress = vec![tcp_rule(80, ANY), udp_rule(53, ANY)];
    lab.apply();
    let reply = tcp(end(B, 80), end(A, 1234), flag::ACK, b"");
    establish(&mut lab);
    lab.wait(Duration::from_secs(348));
    lab.send(1, 2, &reply).only(0, 1);
    lab.wait(Duration::from_secs(352));
    lab.send(1, 2, &reply).nothing();
    assert_eq!(lab.drops(0, DeniedIngress), 1);

    let question = udp(end(A, 999), end(B, 53), b"?");
    let answer = udp(end(B, 53), end(A, 999), b"!");
    lab.send(0, 1, &question).only(1, 2);
    lab.wait(Duration::from_secs(32));
    lab.send(1, 2, &answer).nothing();
    // One question and its answer are no stream.
    lab.send(0, 1, &question).only(1, 2);
    lab.send(1, 2, &answer).only(0, 1);
    lab.wait(Duration::from_secs(32));
    lab.send(1, 2, &answer).nothing();
    lab.send(0, 1, &question).only(1, 2);
    lab.send(1, 2, &answer).only(0, 1);
    lab.send(0, 1, &question).only(1, 2);
    lab.wait(Duration::from_secs(178));
    lab.send(1, 2, &answer).only(0, 1);
    lab.wait(Duration::from_secs(182));
    lab.send(1, 2, &answer).nothing();
}

#[test]
fn a_port_has_idle_limits_of_its_own() {
    let mut lab = lab();
    lab.port(1, 2).ingress = vec![tcp_rule(80, ANY), udp_rule(53, ANY)];
    lab.port(0, 1).tracking = ConnectionTracking { tcp_established_s: 432_000, udp_stream_s: 60, udp_s: 60 };
    lab.port(1, 2).tracking = ConnectionTracking { tcp_established_s: 60, ..ConnectionTracking::default() };
    lab.apply();
    let flows = |lab: &Lab, card: usize| lab.cards[card].pipeline.board().read().flows;
    establish(&mut lab);
    let question = udp(end(A, 999), end(B, 53), b"?");
    lab.send(0, 1, &question).only(1, 2);
    lab.wait(Duration::from_secs(58));
    assert_eq!((flows(&lab, 0), flows(&lab, 1)), (2, 1), "of UDP, one waits for 60 s, the other for 30");
    lab.wait(Duration::from_secs(4));
    assert_eq!((flows(&lab, 0), flows(&lab, 1)), (1, 0));
    lab.wait(Duration::from_secs(432_000 - 64));
    assert_eq!(flows(&lab, 0), 1);
    // A shorter limit is for those that live already.
    lab.port(0, 1).tracking.tcp_established_s = 60;
    lab.apply();
    lab.wait(Duration::from_secs(2));
    assert_eq!(flows(&lab, 0), 0);
}

#[test]
fn a_rule_for_everybody_cuts_what_it_let_in_when_it_goes() {
    let mut lab = lab();
    lab.port(1, 2).ingress = vec![tcp_rule(80, ANY)];
    lab.apply();
    establish(&mut lab);
    let forth = tcp(end(A, 1234), end(B, 80), flag::ACK, b"GET");
    let back = tcp(end(B, 80), end(A, 1234), flag::ACK, b"200");
    // Another rule changes nothing for it.
    lab.port(1, 2).ingress.push(tcp_rule(81, ANY));
    lab.apply();
    lab.send(0, 1, &forth).only(1, 2);
    lab.port(1, 2).ingress.remove(0);
    lab.apply();
    lab.send(0, 1, &forth).nothing();
    assert_eq!(lab.drops(1, DeniedIngress), 1);
    lab.send(1, 2, &back).only(0, 1);
    // The answers are let out by their own rule, and die with that.
    lab.port(1, 2).ingress.insert(0, tcp_rule(80, ANY));
    lab.port(1, 2).egress.clear();
    lab.apply();
    lab.send(1, 2, &back).nothing();
    assert_eq!(lab.drops(1, DeniedEgress), 1);
    // The rules that are left track the connection, from its opener's next packet on.
    lab.send(0, 1, &forth).only(1, 2);
    lab.send(1, 2, &back).only(0, 1);
    lab.port(1, 2).ingress.clear();
    lab.apply();
    lab.send(0, 1, &forth).only(1, 2);
}

#[test]
fn what_a_guest_opens_to_everybody_is_not_tracked_either() {
    let mut lab = lab();
    let all = Rule { protocol: Protocol::Any, ports: None, icmp: (None, None), remote: ANY };
    lab.port(1, 2).ingress = vec![all];
    lab.port(0, 1).ingress = vec![all];
    lab.apply();
    establish(&mut lab);
    let forth = tcp(end(A, 1234), end(B, 80), flag::ACK, b"GET");
    let back = tcp(end(B, 80), end(A, 1234), flag::ACK, b"200");
    lab.port(0, 1).ingress.clear();
    lab.apply();
    lab.send(1, 2, &back).nothing();
    assert_eq!(lab.drops(0, DeniedIngress), 1);
    lab.port(0, 1).ingress = vec![all];
    lab.port(0, 1).egress.clear();
    lab.apply();
    lab.send(0, 1, &forth).nothing();
    lab.send(1, 2, &back).only(0, 1);
    assert_eq!(lab.drops(0, DeniedEgress), 1);
}

#[test]
fn pings_and_what_only_some_may_open_are_tracked() {
    let mut lab = lab();
    lab.port(1, 2).ingress = vec![icmp_rule(ANY), udp_rule(53, NEIGHBOURS), tcp_rule(80, ANY)];
    // No rule for all ports: answers need the connection.
    lab.port(1, 2).egress = vec![Rule { ports: Some((1, 65535)), ..tcp_rule(0, ANY) }];
    lab.apply();
    let (ping_in, ping_out) = (ping(end(A, 0), end(B, 0), 8, 5), ping(end(B, 0), end(A, 0), 0, 5));
    let question = udp(end(A, 999), end(B, 53), b"?");
    establish(&mut lab);
    lab.send(0, 1, &ping_in).only(1, 2);
    lab.send(0, 1, &question).only(1, 2);
    lab.port(1, 2).ingress.clear();
    lab.port(1, 2).egress.clear();
    lab.apply();
    lab.send(0, 1, &ping_in).only(1, 2);
    lab.send(1, 2, &ping_out).only(0, 1);
    lab.send(0, 1, &question).only(1, 2);
    lab.send(0, 1, &tcp(end(A, 1234), end(B, 80), flag::ACK, b"GET")).only(1, 2);
    assert_eq!(lab.all_drops(1), 0);
}

#[test]
fn a_guest_that_speaks_first_after_a_restart_of_the_card_goes_on() {
    let mut lab = lab();
    lab.port(1, 2).ingress = vec![tcp_rule(80, ANY)];
    lab.apply();
    establish(&mut lab);
    // Card 0 forgets everything: a new pipeline with the same configuration.
    lab.cards[0].pipeline = crate::pipeline::Pipeline::new(settings(0));
    lab.apply();
    lab.send(1, 2, &tcp(end(B, 80), end(A, 1234), flag::ACK, b"")).nothing();
    lab.send(0, 1, &tcp(end(A, 1234), end(B, 80), flag::ACK, b"")).only(1, 2);
    lab.send(1, 2, &tcp(end(B, 80), end(A, 1234), flag::ACK, b"")).only(0, 1);
}

#[test]
fn fragments_follow_the_verdict_on_the_first() {
    let mut lab = lab();
    lab.port(1, 2).ingress = vec![udp_rule(80, ANY)];
    lab.apply();
    let send = |lab: &mut Lab, port: u16, id: u16| {
        let datagram = udp_datagram(end(A, 1), end(B, port), &[7; 3000]);
        let (first, second) = datagram.split_at(1480);
        let (second, third) = second.split_at(1480);
        let mut count = 0;
        for (flags, piece) in [(0x2000, first), (0x2000 | 185, second), (370, third)] {
            let piece = raw(end(A, 1), end(B, port), 17, (id, flags), piece);
            count += lab.send(0, 1, &piece).guests.iter().filter(|(_, _, frame)| **frame == piece).count();
        }
        count
    };
    assert_eq!(send(&mut lab, 80, 1), 3);
    assert_eq!(send(&mut lab, 81, 2), 0);
    assert_eq!((lab.drops(1, DeniedIngress), lab.drops(1, FragmentUnknown)), (1, 2));
    // A piece alone has no ports and passes nowhere.
    lab.send(0, 1, &raw(end(A, 1), end(B, 80), 17, (3, 185), &[0; 100])).nothing();
    assert_eq!(lab.drops(0, FragmentUnknown), 1);
    // Nor does one whose transport header is cut, or that reaches back into it.
    lab.send(0, 1, &raw(end(A, 1), end(B, 80), 6, (4, 0x2000), &[0; 16])).nothing();
    lab.send(0, 1, &raw(end(A, 1), end(B, 80), 6, (4, 1), &[0; 16])).nothing();
    assert_eq!(lab.drops(0, FragmentTiny), 2);
    lab.wait(Duration::from_secs(6));
    assert_eq!(send(&mut lab, 80, 1), 3, "the table has room again");
}

/// An IPv4 frame whose payload is sent as it is.
fn raw(from: End, to: End, protocol: u8, fragment: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut bytes = frame(from, to, 255, fragment, payload.to_vec());
    bytes[14 + 9] = protocol;
    crate::headers::write(&mut bytes, 14 + 10, [0, 0]);
    let sum = crate::headers::checksum(&bytes[14..34]);
    crate::headers::write(&mut bytes, 14 + 10, sum.to_be_bytes());
    bytes
}

#[test]
fn an_icmp_error_passes_only_for_a_connection_that_exists() {
    let mut lab = lab();
    lab.port(1, 2).ingress = vec![udp_rule(53, ANY)];
    lab.port(1, 2).egress = Vec::new();
    lab.apply();
    let question = udp(end(A, 999), end(B, 53), b"?");
    lab.send(0, 1, &question).only(1, 2);
    let error = |quoted: &[u8]| {
        let mut message = vec![3, 3, 0, 0, 0, 0, 0, 0];
        message.extend(&quoted[14..]);
        frame(end(B, 0), end(A, 0), 1, (1, 0), message)
    };
    lab.send(1, 2, &error(&question)).only(0, 1);
    lab.send(1, 2, &error(&udp(end(A, 998), end(B, 53), b"?"))).nothing();
    assert_eq!(lab.drops(1, DeniedEgress), 1);
}

#[test]
fn protocols_without_ports_are_tracked_by_address() {
    let mut lab = lab();
    let gre = Rule { protocol: Protocol::Number(47), ports: None, icmp: (None, None), remote: ANY };
    lab.port(1, 2).ingress = vec![gre];
    lab.port(1, 2).egress = Vec::new();
    lab.apply();
    lab.send(1, 2, &frame(end(B, 0), end(A, 0), 47, (1, 0), vec![0; 20])).nothing();
    lab.send(0, 1, &frame(end(A, 0), end(B, 0), 47, (1, 0), vec![0; 20])).only(1, 2);
    lab.send(1, 2, &frame(end(B, 0), end(A, 0), 47, (1, 0), vec![0; 20])).only(0, 1);
    lab.send(0, 1, &frame(end(A, 0), end(B, 0), 50, (1, 0), vec![0; 20])).nothing();
}
