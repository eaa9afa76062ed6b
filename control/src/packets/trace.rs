//! Why a packet would pass or die, card by card.
//!
//! Each card walks its own tables as for a real packet and says what it looked at; this follows the packet from the sender's
//! card to the receiver's, and gives what the cards speak of the names that tenants know. Cards know rules and routes by
//! content alone, so a rule is found again among those of the port's groups by what it allows; two rules that allow the
//! same are both named.

use std::net::Ipv4Addr;
use std::sync::Arc;

use card_proto::card::explain_reply::End;
use card_proto::card::step::Seen;
use card_proto::card::{
    self, ExplainReply, ExplainRequest, GroupSeen, MappingSeen, RouteSeen, SourceSeen, Tunnel, explain_request, route, rule,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{card_of, interfaces, not_found, protocol_name, refused};
use crate::cards::Cards;
use crate::error::ApiError;
use crate::model::{Card, NetworkInterface, PublicIp, REGION, RouteTarget, SecurityGroup, Subnet};
use crate::reconcile;
use crate::resource::route_table;
use crate::world::{Tx, World};

/// Cards that a packet passes at most: its sender's, a gateway's, its receiver's, and room for a mistake.
const MOST_CARDS: usize = 6;
/// TCP's SYN: what opens a connection.
const SYN: u32 = 2;
/// TCP's ACK: what goes on with one.
const ACK: u32 = 16;
/// ICMP echo request.
const ECHO: u32 = 8;
const EPHEMERAL_PORT: u16 = 50_000;
const LENGTH: u16 = 60;

/// What is asked.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Ask {
    /// `i-...`, `eni-...`, or a public address on the internet's side.
    from: String,
    /// An address, or `i-...` or `eni-...` for its private one.
    to: String,
    /// `tcp`, `udp`, `icmp` or a number.
    protocol: String,
    /// To this port.
    port: Option<u16>,
    source_port: Option<u16>,
    /// Instead of the sender's own address.
    source: Option<Ipv4Addr>,
    icmp_type: Option<u8>,
    icmp_code: Option<u8>,
    /// Not the first packet of its connection.
    #[serde(default)]
    established: bool,
    /// Bytes of the IP packet.
    length: Option<u16>,
}

/// Where the packet is asked about next.
struct Visit {
    card: String,
    request: ExplainRequest,
}

/// Follows a packet.
pub(super) async fn trace(world: &World, cards: &Cards, ask: &Ask) -> Result<Value, ApiError> {
    let mut visit = world.read(|tx| begin(tx, ask)).0?;
    let mut hops = Vec::new();
    for _ in 0..MOST_CARDS {
        let reply = cards.explain(&visit.card, visit.request.clone()).await.map_err(|error| refused(&error))?;
        let (steps, end) = world.read(|tx| (steps(tx, &visit, &reply), end(tx, &visit.after(&reply), &reply))).0;
        hops.push(json!({"card": visit.card, "steps": steps}));
        match end {
            Next::Card(next) => visit = next,
            Next::End { passes, reason, text } => {
                return Ok(json!({"passes": passes, "reason": reason, "end": text, "hops": hops}));
            }
        }
    }
    Ok(
        json!({"passes": false, "reason": "loop", "end": format!("the packet passed {MOST_CARDS} cards and was still on its way"), "hops": hops}),
    )
}

fn begin(tx: &Tx<'_>, ask: &Ask) -> Result<Visit, ApiError> {
    let protocol = match ask.protocol.as_str() {
        "icmp" => 1,
        "tcp" => 6,
        "udp" => 17,
        number => number.parse::<u8>().map_err(|_| ApiError::invalid_parameter("protocol", number))?,
    };
    let has_ports = matches!(protocol, 6 | 17);
    if has_ports && ask.port.is_none() {
        return Err(ApiError::missing_parameter("port"));
    }
    let destination = match ask.to.parse::<Ipv4Addr>() {
        Ok(address) => address,
        Err(_) => interfaces(tx, &ask.to).first().ok_or_else(|| not_found(&ask.to))?.private_ip,
    };
    let mut request = ExplainRequest {
        from: None,
        source: ask.source.map_or(0, u32::from),
        destination: destination.into(),
        protocol: protocol.into(),
        source_port: if has_ports || protocol == 1 { ask.source_port.unwrap_or(EPHEMERAL_PORT).into() } else { 0 },
        destination_port: if has_ports { ask.port.unwrap_or(0).into() } else { 0 },
        icmp_type: ask.icmp_type.map_or(if protocol == 1 { ECHO } else { 0 }, u32::from),
        icmp_code: ask.icmp_code.map_or(0, u32::from),
        tcp_flags: if protocol == 6 { if ask.established { ACK } else { SYN } } else { 0 },
        length: ask.length.unwrap_or(LENGTH).into(),
    };
    if let Ok(source) = ask.from.parse::<Ipv4Addr>() {
        request.source = source.into();
        let card = card_of_public(tx, destination).ok_or_else(|| not_found(&ask.to))?;
        request.from = Some(explain_request::From::Internet(true));
        return Ok(Visit { card, request });
    }
    let interface = interfaces(tx, &ask.from).into_iter().next().ok_or_else(|| not_found(&ask.from))?;
    let card = card_of(tx, &interface).ok_or_else(|| not_found(&ask.from))?;
    if ask.source.is_none() {
        request.source = interface.private_ip.into();
    }
    request.from = Some(explain_request::From::PortId(interface.id.clone()));
    Ok(Visit { card, request })
}

impl Visit {
    /// The packet as it leaves the card, after what was translated there.
    fn after(&self, reply: &ExplainReply) -> Self {
        let mut request = self.request.clone();
        for step in &reply.steps {
            match &step.seen {
                Some(Seen::Nat(nat)) if nat.source => request.source = nat.after,
                Some(Seen::Nat(nat)) => request.destination = nat.after,
                _ => {}
            }
        }
        Self { card: self.card.clone(), request }
    }
}

enum Next {
    Card(Visit),
    End { passes: bool, reason: String, text: String },
}

/// What comes after a card; `left` is the packet as it left it.
fn end(tx: &Tx<'_>, left: &Visit, reply: &ExplainReply) -> Next {
    let done = |passes, reason: &str, text: String| Next::End { passes, reason: reason.to_owned(), text };
    match &reply.end {
        Some(End::Delivered(port)) => done(true, "delivered", format!("delivered to {}", named(tx, port))),
        Some(End::Dropped(reason)) => done(false, reason, format!("dropped on {}: {reason}", left.card)),
        Some(End::Service(service)) => done(true, "service", format!("answered by {} itself: {service}", left.card)),
        Some(End::TunnelOut(out)) => {
            let own = tx.get::<Card>(REGION, &left.card).map_or(0, |card| card.underlay_ip.into());
            let Some(card) = card_by_underlay(tx, out.underlay_ipv4.into()) else {
                return done(false, "unknown_card", format!("sent to {}, where no card is", Ipv4Addr::from(out.underlay_ipv4)));
            };
            let from = explain_request::From::Tunnel(Tunnel { underlay_ipv4: own, vni: out.vni });
            Next::Card(Visit { card, request: ExplainRequest { from: Some(from), ..left.request.clone() } })
        }
        Some(End::InternetOut(out)) => match card_of_public(tx, left.request.destination.into()) {
            Some(card) => {
                let from = explain_request::From::Internet(true);
                Next::Card(Visit { card, request: ExplainRequest { from: Some(from), source: out.source, ..left.request.clone() } })
            }
            None => {
                let (source, hop) = (Ipv4Addr::from(out.source), Ipv4Addr::from(out.hop));
                done(true, "internet", format!("leaves for the internet as {source}, by {hop}"))
            }
        },
        None => done(false, "unknown", format!("{} gave no end", left.card)),
    }
}

fn card_by_underlay(tx: &Tx<'_>, address: Ipv4Addr) -> Option<String> {
    tx.all::<Card>().find(|card| card.underlay_ip == address).map(|card| card.id.clone())
}

/// The card with the interface that has a public address.
fn card_of_public(tx: &Tx<'_>, address: Ipv4Addr) -> Option<String> {
    let holder = tx.get::<PublicIp>(REGION, &address.to_string())?;
    let interface = match holder.holder.strip_prefix("eipalloc-") {
        None => tx.get::<NetworkInterface>(&holder.account_id, &holder.holder)?,
        Some(_) => {
            let allocation = tx.get::<crate::model::Address>(&holder.account_id, &holder.holder)?;
            tx.get::<NetworkInterface>(&holder.account_id, &allocation.association.as_ref()?.network_interface_id)?
        }
    };
    card_of(tx, &interface)
}

/// An interface with its instance.
fn named(tx: &Tx<'_>, port: &str) -> String {
    let instance = interfaces(tx, port).first().and_then(|interface| Some(interface.attachment.as_ref()?.instance_id.clone()));
    instance.map_or_else(|| port.to_owned(), |instance| format!("{port} of {instance}"))
}

fn steps(tx: &Tx<'_>, visit: &Visit, reply: &ExplainReply) -> Vec<Value> {
    reply.steps.iter().filter_map(|step| step_json(tx, visit, step)).collect()
}

fn step_json(tx: &Tx<'_>, visit: &Visit, step: &card::Step) -> Option<Value> {
    let interface = interfaces(tx, &step.port_id).into_iter().next();
    let (stage, passes, text) = match step.seen.as_ref()? {
        Seen::Source(seen) => ("anti-spoof", seen.believed, source(tx, seen)),
        Seen::Flow(seen) if !seen.known => ("flow", true, "no connection is tracked: policy decides".to_owned()),
        Seen::Flow(seen) if seen.reopened => ("flow", true, format!("the {} connection would begin anew: policy decides", seen.state)),
        Seen::Flow(seen) => {
            ("flow", true, format!("part of a tracked connection ({}, idle {} ms): groups are not asked", seen.state, seen.idle_ms))
        }
        Seen::Group(seen) => {
            let rules = interface.as_deref().map(|interface| Rules::of(tx, interface)).unwrap_or_default();
            let mut value =
                json!({"port": step.port_id, "stage": "security-group", "passes": seen.matched.is_some(), "text": rules.text(seen)});
            if let (Some(found), Some(object)) = (&seen.matched, value.as_object_mut()) {
                object.insert("rules".to_owned(), rules.ids(seen.egress, found).into());
            }
            return Some(value);
        }
        Seen::Acl(seen) => {
            let way = if seen.egress { "out of" } else { "into" };
            let passes = seen.matched.as_ref().is_some_and(|rule| rule.allow);
            let text = match &seen.matched {
                Some(rule) => {
                    format!("rule {} of {} {way} the subnet {}", seen.position, seen.rules, if rule.allow { "allows" } else { "denies" })
                }
                None => format!("none of the {} rules {way} the subnet matches", seen.rules),
            };
            ("network-acl", passes, text)
        }
        Seen::Route(seen) => ("route", seen.matched.is_some(), route_text(tx, interface.as_deref(), seen)),
        Seen::Mapping(seen) => {
            let (passes, text) = mapping(tx, visit, interface.as_deref(), seen);
            ("mapping", passes, text)
        }
        Seen::Nat(seen) => {
            let (side, before, after) =
                (if seen.source { "source" } else { "destination" }, Ipv4Addr::from(seen.before), Ipv4Addr::from(seen.after));
            ("nat", true, format!("{side} {before} becomes {after}"))
        }
    };
    Some(json!({"port": step.port_id, "stage": stage, "passes": passes, "text": text}))
}

fn source(tx: &Tx<'_>, seen: &SourceSeen) -> String {
    let address = Ipv4Addr::from(seen.address);
    match (seen.underlay_ipv4, seen.believed) {
        (0, true) => format!("the sender may use {address}"),
        (0, false) => format!("{address} is not the sender's to use"),
        (underlay, believed) => {
            let underlay = Ipv4Addr::from(underlay);
            let card = card_by_underlay(tx, underlay).unwrap_or_else(|| underlay.to_string());
            format!("{address} is {}mapped to {card}", if believed { "" } else { "not " })
        }
    }
}

fn route_text(tx: &Tx<'_>, interface: Option<&NetworkInterface>, seen: &RouteSeen) -> String {
    let Some(matched) = &seen.matched else { return "no route holds the destination".to_owned() };
    let prefix = prefix_text(matched.destination.as_ref());
    if seen.local {
        return format!("{prefix} is local to the VPC");
    }
    let table = interface.and_then(|interface| {
        let subnet = tx.get::<Subnet>(&interface.account_id, &interface.subnet_id)?;
        route_table::of_subnet(tx, &subnet)
    });
    let named = table.as_ref().and_then(|table| {
        let route = table.routes.iter().find(|route| route.destination.to_string() == prefix)?;
        Some(match &route.target {
            RouteTarget::InternetGateway(id) | RouteTarget::NetworkInterface(id) => id.clone(),
        })
    });
    let target = match &matched.target {
        Some(route::Target::Blackhole(_)) => "nowhere: its target is gone".to_owned(),
        Some(route::Target::InternetGateway(_)) => "the internet gateway".to_owned(),
        Some(route::Target::NatGateway(address)) => format!("the NAT gateway at {}", Ipv4Addr::from(*address)),
        Some(route::Target::NetworkInterface(address)) => format!("the interface with {}", Ipv4Addr::from(*address)),
        Some(route::Target::PeerVni(_)) => "a peered VPC".to_owned(),
        None => "a target that the card does not name".to_owned(),
    };
    let table = table.map_or_else(|| "the route table".to_owned(), |table| table.id.clone());
    format!("{prefix} of {table} leads to {target}{}", named.map(|id| format!(" ({id})")).unwrap_or_default())
}

fn mapping(tx: &Tx<'_>, visit: &Visit, interface: Option<&NetworkInterface>, seen: &MappingSeen) -> (bool, String) {
    let place = if !seen.port_id.is_empty() {
        Some(format!("{} on {}", named(tx, &seen.port_id), visit.card))
    } else if seen.underlay_ipv4 != 0 {
        let underlay = Ipv4Addr::from(seen.underlay_ipv4);
        let card = card_by_underlay(tx, underlay).unwrap_or_else(|| "a card that is not known".to_owned());
        let owner = interface.and_then(|interface| {
            let neighbours = tx.find::<NetworkInterface>(&interface.account_id, "vpc", &interface.vpc_id);
            neighbours.iter().find(|other| u32::from(other.private_ip) == seen.address).map(|other| named(tx, &other.id))
        });
        Some(format!("{}{card} ({underlay})", owner.map(|owner| format!("{owner} on ")).unwrap_or_default()))
    } else if seen.public_ipv4 != 0 {
        Some(format!("the internet as {}", Ipv4Addr::from(seen.public_ipv4)))
    } else {
        None
    };
    let address = Ipv4Addr::from(seen.address);
    match place {
        Some(place) if seen.address == 0 => (true, format!("the connection leads to {place}")),
        Some(place) => (true, format!("{address} is {place}")),
        None => {
            let vpc = interface.map_or("the VPC", |interface| interface.vpc_id.as_str());
            (false, format!("nobody else in {vpc} has {address}"))
        }
    }
}

/// The groups of an interface.
#[derive(Default)]
struct Rules {
    groups: Vec<Arc<SecurityGroup>>,
}

impl Rules {
    fn of(tx: &Tx<'_>, interface: &NetworkInterface) -> Self {
        let group = |id: &String| tx.get::<SecurityGroup>(&interface.account_id, id);
        Self { groups: interface.security_group_ids.iter().filter_map(group).collect() }
    }

    /// The rules that allow what `found` allows, with their groups.
    fn matching<'a>(&'a self, egress: bool, found: &'a card::Rule) -> impl Iterator<Item = (&'a SecurityGroup, &'a str)> {
        let same = move |written: &card::Rule| essence(written) == essence(found);
        self.groups.iter().flat_map(move |group| {
            let rules = group.rules.iter().filter(move |rule| rule.egress == egress && reconcile::rule(rule).as_ref().is_some_and(same));
            rules.map(|rule| (&**group, rule.id.as_str()))
        })
    }

    fn ids(&self, egress: bool, found: &card::Rule) -> Vec<String> {
        self.matching(egress, found).map(|(_, id)| id.to_owned()).collect()
    }

    fn text(&self, seen: &GroupSeen) -> String {
        let way = if seen.egress { "egress" } else { "ingress" };
        match &seen.matched {
            Some(found) => {
                let named: Vec<String> =
                    self.matching(seen.egress, found).map(|(group, id)| format!("{id} of {} ({})", group.id, group.name)).collect();
                // A rule that was edited between the two looks has no name any more.
                let named = if named.is_empty() { "a rule that has just changed".to_owned() } else { named.join(" and ") };
                format!("{way} rule {named} allows it: {}", rule_text(found))
            }
            None => {
                let groups: Vec<String> = self.groups.iter().map(|group| format!("{} ({})", group.id, group.name)).collect();
                format!("none of the {} {way} rules of {} allows it", seen.rules, groups.join(", "))
            }
        }
    }
}

/// What a rule allows, without what its protocol gives no meaning.
fn essence(rule: &card::Rule) -> (u32, i32, i32, Option<&rule::Remote>) {
    let (from, to) = if matches!(rule.protocol, 1 | 6 | 17) { (rule.from_port, rule.to_port) } else { (-1, -1) };
    (rule.protocol, from, to, rule.remote.as_ref())
}

fn rule_text(rule: &card::Rule) -> String {
    let remote = match &rule.remote {
        Some(rule::Remote::Prefix(prefix)) => prefix_text(Some(prefix)),
        Some(rule::Remote::GroupId(group)) => group.clone(),
        None => "anywhere".to_owned(),
    };
    let what = match essence(rule) {
        (protocol, -1, -1, _) => protocol_name(protocol),
        (1, kind, -1, _) => format!("icmp type {kind}"),
        (1, kind, code, _) => format!("icmp type {kind} code {code}"),
        (protocol, from, to, _) if from == to => format!("{} {from}", protocol_name(protocol)),
        (protocol, from, to, _) => format!("{} {from}-{to}", protocol_name(protocol)),
    };
    format!("{what}, {remote}")
}

fn prefix_text(prefix: Option<&card::Prefix>) -> String {
    let prefix = prefix.copied().unwrap_or_default();
    format!("{}/{}", Ipv4Addr::from(prefix.address), prefix.length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reconcile::testbed::{ALICE, CARD_A, CARD_B, Testbed, request};

    /// Two running instances of the default VPC, on two cards.
    fn pair(bed: &mut Testbed) -> [String; 2] {
        let ids = ["us-east-1a", "us-east-1b"].map(|zone| bed.launch(request(zone)).remove(0).instance_id.unwrap());
        bed.settle();
        ids
    }

    fn ask(from: &str, to: &str) -> Ask {
        serde_json::from_value(json!({"from": from, "to": to, "protocol": "tcp", "port": 22})).unwrap()
    }

    fn reply(steps: Vec<(&str, Seen)>, end: End) -> ExplainReply {
        let steps = steps.into_iter().map(|(port, seen)| card::Step { port_id: port.to_owned(), seen: Some(seen) }).collect();
        ExplainReply { steps, end: Some(end) }
    }

    fn texts(steps: &[Value]) -> Vec<(bool, String)> {
        steps.iter().map(|step| (step["passes"].as_bool().unwrap(), step["text"].as_str().unwrap().to_owned())).collect()
    }

    #[test]
    fn a_packet_is_followed_to_the_receivers_card() {
        let mut bed = Testbed::new();
        let [first, second] = pair(&mut bed);
        let (card, other) = (bed.card_of(&first), bed.card_of(&second));
        assert_eq!(other, CARD_B);
        let (from, to) = (bed.cards[&card].port(&first), bed.cards[&other].port(&second));
        let visit = bed.read(|tx| begin(tx, &ask(&first, &second))).unwrap();
        assert_eq!((visit.card.as_str(), visit.request.destination), (card.as_str(), to.private_ipv4));
        assert_eq!(visit.request.from, Some(explain_request::From::PortId(from.id.clone())));

        let (own, underlay) = (bed.cards[&card].hello.underlay_ipv4, bed.cards[&other].hello.underlay_ipv4);
        let way = MappingSeen { address: to.private_ipv4, underlay_ipv4: underlay, ..MappingSeen::default() };
        let answer =
            reply(vec![(&from.id, Seen::Mapping(way))], End::TunnelOut(card::TunnelOut { underlay_ipv4: underlay, vni: from.vni }));
        let said = texts(&bed.read(|tx| steps(tx, &visit, &answer)));
        assert!(said[0].0 && said[0].1.contains(&second) && said[0].1.contains(CARD_B), "{said:?}");
        let Next::Card(next) = bed.read(|tx| end(tx, &visit, &answer)) else { panic!("it goes on") };
        assert_eq!(next.card, other);
        assert_eq!(next.request.from, Some(explain_request::From::Tunnel(Tunnel { underlay_ipv4: own, vni: from.vni })));
        assert_eq!((next.request.source, next.request.tcp_flags), (from.private_ipv4, SYN));
    }

    #[test]
    fn a_rule_is_found_again_by_what_it_allows() {
        let mut bed = Testbed::new();
        let [first, second] = pair(&mut bed);
        let (card, other) = (bed.card_of(&first), bed.card_of(&second));
        let port = bed.cards[&card].port(&first);
        let group = bed.read(|tx| tx.get::<SecurityGroup>(ALICE, &port.security_group_ids[0])).unwrap();
        let rule = group.rules.iter().find(|rule| rule.egress).unwrap();
        let visit = bed.read(|tx| begin(tx, &ask(&first, &second))).unwrap();
        // The card has dropped what the protocol gives no meaning.
        let matched = card::Rule { from_port: -1, to_port: -1, ..port.egress[0].clone() };
        let seen = |matched| Seen::Group(GroupSeen { egress: true, rules: 1, matched });
        let gone = card::Rule { protocol: 6, from_port: 1, to_port: 1, ..matched.clone() };
        let answer = reply(
            vec![(&port.id, seen(Some(matched))), (&port.id, seen(None)), (&port.id, seen(Some(gone)))],
            End::Dropped("denied_egress".into()),
        );
        let steps = bed.read(|tx| steps(tx, &visit, &answer));
        assert_eq!(steps[0]["rules"], json!([rule.id]));
        let said = texts(&steps);
        assert!(said[0].0 && said[0].1.contains(&format!("{} of {} ({})", rule.id, group.id, group.name)), "{said:?}");
        assert!(!said[1].0 && said[1].1.contains("none of the 1 egress rules") && said[1].1.contains(&group.name), "{said:?}");
        assert!(said[2].1.contains("just changed"), "{said:?}");
        let Next::End { passes: false, reason, .. } = bed.read(|tx| end(tx, &visit, &answer)) else { panic!("it dies") };
        assert_eq!(reason, "denied_egress");
        let away = bed.read(|tx| begin(tx, &ask("i-0", &second)).err()).unwrap();
        assert_eq!((away.status, other.as_str()), (404, CARD_B));
    }

    #[test]
    fn what_was_translated_is_asked_about_translated() {
        let mut bed = Testbed::new();
        let [first, second] = pair(&mut bed);
        let card = bed.card_of(&first);
        assert_ne!(card, CARD_B);
        assert!(card.starts_with(CARD_A.trim_end_matches('1')));
        let public: Ipv4Addr = bed.shape(&second).public_ip_address.unwrap().parse().unwrap();
        let visit = bed.read(|tx| begin(tx, &ask(&first, &public.to_string()))).unwrap();
        let own = Ipv4Addr::new(198, 51, 100, 99).into();
        let nat = card::NatSeen { before: visit.request.source, after: own, source: true };
        let answer = reply(vec![("", Seen::Nat(nat))], End::InternetOut(card::InternetOut { source: own, hop: public.into() }));
        let Next::Card(next) = bed.read(|tx| end(tx, &visit.after(&answer), &answer)) else { panic!("the address is ours") };
        assert_eq!((next.card.as_str(), next.request.source, next.request.destination), (CARD_B, own, public.into()));
        assert_eq!(next.request.from, Some(explain_request::From::Internet(true)));
        let far = bed.read(|tx| begin(tx, &ask(&first, "203.0.113.9"))).unwrap();
        let Next::End { passes: true, reason, .. } = bed.read(|tx| end(tx, &far, &answer)) else { panic!("nobody here has it") };
        assert_eq!(reason, "internet");
    }
}
