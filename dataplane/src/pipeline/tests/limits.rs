//! Allowances of instances, shared by their ports.

use std::time::Duration;

use super::lab::*;
use crate::counters::DropReason::*;
use crate::headers::tcp as flag;
use crate::*;

const A: [u8; 4] = [10, 0, 0, 5];
const A2: [u8; 4] = [10, 0, 0, 50];
const B: [u8; 4] = [10, 0, 0, 6];

/// A and A2 are ports of one instance on card 0; B is on `other`, without limits.
fn lab(other: u8, limits: Limits) -> Lab {
    let mut lab = Lab::new(2);
    let open = |mut port: PortConfig| {
        port.ingress = vec![udp_rule(80, ANY), tcp_rule(80, Remote::Prefix(port.vpc_prefixes[0]))];
        port
    };
    let limited = |mut port: PortConfig| {
        port.allowance = Some(AllowanceConfig { id: AllowanceId(1), limits });
        open(port)
    };
    lab.place(0, vec![limited(guest(1, 100, A)), limited(guest(2, 100, A2))]);
    lab.place(other, vec![open(guest(3, 100, B))]);
    lab
}

const BANDWIDTH: Limits = Limits { baseline_bits_per_s: 1_000_000, burst_bits_per_s: 0, credit_bits: 0, packets_per_s: 0, connections: 0 };

fn of_port(lab: &Lab, id: u32) -> PortCounters {
    lab.cards[0].pipeline.board().read().ports[&PortId(id)].clone()
}

#[test]
fn bandwidth_is_limited_each_way_and_shared_by_the_ports_of_an_instance() {
    for other in [0, 1] {
        let mut lab = lab(other, BANDWIDTH);
        let sent = udp(end(A, 1), end(B, 80), &[0; 8000]);
        let back = udp(end(B, 1), end(A2, 80), &[0; 8000]);
        let (mut out, mut into) = (0, 0);
        for _ in 0..40 {
            out += lab.send(0, 1, &sent).guests.len();
            into += lab.send(other, 3, &back).guests.len();
        }
        // 1,179,648 bits at once, of frames of 64,336.
        assert_eq!((out, into), (18, 18));
        assert_eq!((lab.drops(0, BandwidthOut), lab.drops(0, BandwidthIn)), (22, 22));
        assert_eq!((of_port(&lab, 1).drops.get(BandwidthOut), of_port(&lab, 2).drops.get(BandwidthIn)), (22, 22));
        lab.send(0, 2, &udp(end(A2, 1), end(B, 80), &[0; 8000])).nothing();
        // The other has no limits, and time earns the baseline.
        lab.wait(Duration::from_secs(1));
        out = (0..40).map(|_| lab.send(0, 1, &sent).guests.len()).sum();
        assert_eq!(out, 15, "a million bits");
    }
}

#[test]
fn packets_are_limited_both_ways_together() {
    let mut lab = lab(1, Limits { packets_per_s: 100, ..Limits::default() });
    let passed: usize = (0..50)
        .map(|_| {
            lab.send(0, 1, &udp(end(A, 1), end(B, 80), b"")).guests.len() + lab.send(1, 3, &udp(end(B, 1), end(A, 80), b"")).guests.len()
        })
        .sum();
    assert_eq!((passed, lab.drops(0, PacketRate)), (64, 36));
}

#[test]
fn tracked_connections_are_limited_and_untracked_ones_are_not() {
    let mut lab = lab(1, Limits { connections: 5, ..Limits::default() });
    let syn = |port| tcp(end(B, port), end(A, 80), flag::SYN, b"");
    for port in 0..5 {
        lab.send(1, 3, &syn(port)).only(0, 1);
    }
    assert_eq!(of_port(&lab, 2).connections_left, Some(0));
    lab.send(1, 3, &syn(5)).nothing();
    lab.send(1, 3, &tcp(end(B, 5), end(A2, 80), flag::SYN, b"")).nothing();
    assert_eq!(lab.drops(0, ConntrackAllowance), 2);
    lab.send(1, 3, &tcp(end(B, 4), end(A, 80), flag::ACK, b"")).only(0, 1);
    lab.send(1, 3, &udp(end(B, 5), end(A, 80), b"for everybody")).only(0, 1);
    lab.wait(Duration::from_secs(32));
    lab.send(1, 3, &syn(5)).only(0, 1);
    assert_eq!(of_port(&lab, 1).connections_left, Some(4));
    lab.port(0, 1).allowance = None;
    lab.apply();
    assert_eq!(of_port(&lab, 1).connections_left, None);
}

#[test]
fn a_change_that_does_not_concern_it_gives_no_new_credits() {
    let mut lab = lab(1, BANDWIDTH);
    let sent = udp(end(A, 1), end(B, 80), &[0; 8000]);
    for _ in 0..40 {
        lab.send(0, 1, &sent);
    }
    lab.port(0, 1).generation = 2;
    lab.apply();
    lab.send(0, 1, &sent).nothing();
    let limits = Limits { baseline_bits_per_s: 2_000_000, ..BANDWIDTH };
    for id in [1, 2] {
        lab.port(0, id).allowance = Some(AllowanceConfig { id: AllowanceId(1), limits });
    }
    lab.apply();
    lab.send(0, 1, &sent).only(1, 3);
}
