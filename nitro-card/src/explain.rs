//! The packet path's explanations as messages: numbers become ids, rules become
//! what control wrote.

use card_proto::card::explain_reply::End as EndMessage;
use card_proto::card::step::Seen as SeenMessage;
use card_proto::card::{
    self, ExplainReply, FlowSeen, GroupSeen, InternetOut, MappingSeen, NatSeen, RouteSeen, SourceSeen, TunnelOut, route, rule,
};
use dataplane::action::Egress;
use dataplane::explain::{End, Explanation, Seen, Step};
use dataplane::flow::Direction;
use dataplane::{PortId, Prefix, Protocol, Remote, RouteTarget, Rule};

use crate::names::Names;
use crate::packets::{milliseconds, state_name};

/// EC2's "all protocols" on the wire.
const ALL_PROTOCOLS: u32 = 256;

/// The answer to control.
#[must_use]
pub fn reply(explanation: &Explanation, names: &Names) -> ExplainReply {
    let end = match explanation.end {
        End::Delivered(port) => EndMessage::Delivered(names.port(port)),
        End::Tunnel { vtep, vni } => EndMessage::TunnelOut(TunnelOut { underlay_ipv4: vtep.into(), vni: vni.0 }),
        End::Internet { source, hop } => EndMessage::InternetOut(InternetOut { source: source.into(), hop: hop.into() }),
        End::Service(service) => EndMessage::Service(service.name().to_owned()),
        End::Dropped(reason) => EndMessage::Dropped(reason.name().to_owned()),
    };
    ExplainReply { steps: explanation.steps.iter().map(|step| step_message(step, names)).collect(), end: Some(end) }
}

fn step_message(step: &Step, names: &Names) -> card::Step {
    let port = |port: Option<PortId>| port.map(|port| names.port(port)).unwrap_or_default();
    let seen = match step.seen {
        Seen::Source { address, vtep, believed } => {
            SeenMessage::Source(SourceSeen { address: address.into(), believed, underlay_ipv4: vtep.map_or(0, u32::from) })
        }
        Seen::Flow { known, reopened } => SeenMessage::Flow(FlowSeen {
            known: known.is_some(),
            state: known.map(|(state, _)| state_name(state).to_owned()).unwrap_or_default(),
            idle_ms: known.map_or(0, |(_, idle)| milliseconds(idle)),
            reopened,
        }),
        Seen::Group { direction, rules, matched } => SeenMessage::Group(GroupSeen {
            egress: direction == Direction::Egress,
            rules: u32::try_from(rules).unwrap_or(u32::MAX),
            matched: matched.map(|rule| rule_message(&rule, names)),
        }),
        Seen::Route { matched } => SeenMessage::Route(RouteSeen {
            local: matched.is_some_and(|route| route.target.is_none()),
            matched: matched.map(|route| card::Route { destination: Some(prefix(route.prefix)), target: route.target.map(target) }),
        }),
        Seen::Mapping { address, way } => SeenMessage::Mapping(mapping(address.into(), way, port(step.to))),
        Seen::Decided { egress } => SeenMessage::Mapping(mapping(0, Some(egress), port(step.to))),
        Seen::Nat { before, after, source } => SeenMessage::Nat(NatSeen { before: before.into(), after: after.into(), source }),
    };
    card::Step { port_id: port(step.port), seen: Some(seen) }
}

fn mapping(address: u32, way: Option<Egress>, port_id: String) -> MappingSeen {
    let (underlay_ipv4, public_ipv4) = match way {
        Some(Egress::Remote { vtep, .. }) => (vtep.into(), 0),
        Some(Egress::Public { address }) => (0, address.into()),
        Some(Egress::Local { .. }) | None => (0, 0),
    };
    MappingSeen { address, underlay_ipv4, port_id, public_ipv4 }
}

fn rule_message(rule: &Rule, names: &Names) -> card::Rule {
    let (protocol, (from_port, to_port)) = match rule.protocol {
        Protocol::Any => (ALL_PROTOCOLS, (-1, -1)),
        Protocol::Number(dataplane::headers::ICMP) => (1, (rule.icmp.0.map_or(-1, i32::from), rule.icmp.1.map_or(-1, i32::from))),
        Protocol::Number(number) => (number.into(), rule.ports.map_or((-1, -1), |(from, to)| (from.into(), to.into()))),
    };
    let remote = match rule.remote {
        Remote::Prefix(remote) => rule::Remote::Prefix(prefix(remote)),
        Remote::Group(group) => rule::Remote::GroupId(names.group(group)),
    };
    card::Rule { protocol, from_port, to_port, remote: Some(remote) }
}

fn prefix(prefix: Prefix) -> card::Prefix {
    card::Prefix { address: prefix.nth(0).into(), length: prefix.length.into() }
}

fn target(target: RouteTarget) -> route::Target {
    match target {
        RouteTarget::InternetGateway => route::Target::InternetGateway(true),
        RouteTarget::Blackhole => route::Target::Blackhole(true),
    }
}
