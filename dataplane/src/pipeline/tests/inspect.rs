//! What operators see of the tables, and that looking changes none.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use super::lab::*;
use crate::action::{Egress, Origin};
use crate::explain::{End as Ending, Entry, Matched, Question, Seen as Noted};
use crate::flow::{Direction, State};
use crate::headers::{TCP, Transport, tcp as flag};
use crate::pipeline::FlowSeen;
use crate::*;

const A: [u8; 4] = [10, 0, 0, 5];
const B: [u8; 4] = [10, 0, 0, 6];

fn lab() -> Lab {
    let mut lab = Lab::new(2);
    lab.place(0, vec![guest(1, 100, A)]);
    lab.place(1, vec![guest(2, 100, B)]);
    lab.port(1, 2).ingress = vec![tcp_rule(80, ANY)];
    lab.apply();
    lab
}

fn flows(lab: &Lab, card: usize, port: Option<PortId>, limit: usize) -> Vec<FlowSeen> {
    let (mut flows, mut cursor) = (Vec::new(), Some(0));
    while let Some(at) = cursor {
        let page = lab.cards[card].pipeline.flows(lab.now, port, at, limit);
        assert!(page.flows.len() <= limit);
        flows.extend(page.flows);
        cursor = page.next;
    }
    flows
}

#[test]
fn connections_are_listed_in_pieces_each_once() {
    let mut lab = lab();
    for port in 1000..1100 {
        lab.send(0, 1, &tcp(end(A, port), end(B, 80), flag::SYN, b"")).only(1, 2);
    }
    lab.send(1, 2, &tcp(end(B, 80), end(A, 1000), flag::SYN | flag::ACK, b"")).only(0, 1);
    lab.send(0, 1, &tcp(end(A, 1000), end(B, 80), flag::ACK, b"")).only(1, 2);
    lab.now += Duration::from_secs(3);
    for limit in [1, 7, 1000] {
        let by_port: HashMap<u16, FlowSeen> = flows(&lab, 0, Some(PortId(1)), limit).into_iter().map(|flow| (flow.local.1, flow)).collect();
        assert_eq!(by_port.len(), 100, "in pieces of {limit}");
        let flow = &by_port[&1000];
        assert_eq!((flow.port, flow.protocol, flow.local, flow.remote), (PortId(1), TCP, (A.into(), 1000), (B.into(), 80)));
        assert_eq!((flow.state, flow.opener), (State::Established, Direction::Egress));
        assert_eq!((flow.idle, flow.idle_limit), (Duration::from_secs(3), Duration::from_secs(350)));
        assert!(matches!(flow.egress, Some((Egress::Remote { vtep: to, .. }, None)) if to == vtep(1)), "{flow:?}");
        assert_eq!(flow.ingress, Some(Origin::Vtep(vtep(1))));
        assert_eq!((by_port[&1001].state, by_port[&1001].ingress), (State::New, None));
    }
    assert_eq!(flows(&lab, 1, None, 64).len(), 100);
    assert!(flows(&lab, 0, Some(PortId(9)), 64).is_empty());
}

#[test]
fn an_explanation_names_what_decided_at_every_stage() {
    let mut lab = lab();
    let ask = |entry, port| Question {
        entry,
        source: Some(A.into()),
        destination: B.into(),
        protocol: TCP,
        transport: Transport { source_port: 1000, destination_port: port, tcp_flags: flag::SYN, ..Transport::default() },
        length: 60,
    };
    let explain = |lab: &Lab, card: usize, entry, port| lab.cards[card].pipeline.explain(lab.now, &ask(entry, port));
    let out = explain(&lab, 0, Entry::Guest(PortId(1)), 80);
    assert_eq!(out.end, Ending::Tunnel { vtep: vtep(1), vni: Vni(100) });
    assert!(out.steps.iter().all(|step| step.port == Some(PortId(1))), "{out:?}");
    let egress_rule = lab.port(0, 1).egress[0];
    let subnet = lab.port(0, 1).subnet;
    let seen: Vec<_> = out.steps.iter().map(|step| step.seen).collect();
    let [source, flow, group, route, mapping] = seen[..] else { panic!("{seen:?}") };
    assert_eq!(source, Noted::Source { address: A.into(), vtep: None, believed: true });
    assert_eq!(flow, Noted::Flow { known: None, reopened: false });
    assert_eq!(group, Noted::Group { direction: Direction::Egress, rules: 1, matched: Some(egress_rule) });
    assert!(
        matches!(route, Noted::Route { matched: Some(Matched { prefix, target: None }) } if prefix.contains(subnet.nth(0))),
        "{route:?}"
    );
    assert!(matches!(mapping, Noted::Mapping { address, way: Some(Egress::Remote { .. }) } if address == Ipv4Addr::from(B)), "{mapping:?}");

    let tunnel = Entry::Vtep(vtep(0), Vni(100));
    let rule = lab.port(1, 2).ingress[0];
    for (port, end, matched) in [(80, Ending::Delivered(PortId(2)), Some(rule)), (81, Ending::Dropped(DropReason::DeniedIngress), None)] {
        let into = explain(&lab, 1, tunnel, port);
        assert_eq!(into.end, end);
        let group = Noted::Group { direction: Direction::Ingress, rules: 1, matched };
        assert_eq!(into.steps.last().map(|step| step.seen), Some(group));
    }
    let stranger = explain(&lab, 1, Entry::Vtep(vtep(9), Vni(100)), 80);
    assert_eq!(stranger.end, Ending::Dropped(DropReason::UnmappedVtep));

    // Nothing was opened and nothing counted by all this.
    assert!(flows(&lab, 0, None, 64).is_empty() && flows(&lab, 1, None, 64).is_empty());
    assert_eq!((lab.all_drops(0), lab.all_drops(1)), (0, 0));
    // And when a connection is there, it is what decides.
    lab.send(0, 1, &tcp(end(A, 1000), end(B, 80), flag::SYN, b"")).only(1, 2);
    let mut later = ask(Entry::Guest(PortId(1)), 80);
    later.transport.tcp_flags = flag::ACK;
    let known = lab.cards[0].pipeline.explain(lab.now, &later);
    assert!(known.steps.iter().any(|step| matches!(step.seen, Noted::Flow { known: Some((State::New, _)), reopened: false })), "{known:?}");
    assert!(known.steps.iter().any(|step| matches!(step.seen, Noted::Decided { .. })) && known.steps.len() == 3, "{known:?}");
}
