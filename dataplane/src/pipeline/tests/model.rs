//! The packet path against a model of it that is slow and obvious: the same random
//! packets, rules and waits through both, and both must agree on every one.
//!
//! The model knows what EC2 promises and nothing of buckets, generations, headers
//! or bursts: a list of ports, a map of connections, and a few questions in order.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use super::lab::*;
use crate::counters::DropReason::{self, *};
use crate::explain::{End as Ending, Entry, Question, Seen as Noted};
use crate::headers::Transport;
use crate::headers::tcp::{ACK, FIN, RST, SYN};
use crate::*;

const CARDS: u8 = 3;
const FAR: [Ipv4Addr; 2] = [Ipv4Addr::new(203, 0, 113, 10), Ipv4Addr::new(192, 0, 2, 77)];
/// No timeout is a multiple of it or ends within the second after one, so that
/// the sweep's own pace never decides.
const WAIT: Duration = Duration::from_secs(17);

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 33) as usize % sides
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.roll(from.len())]
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Load {
    Tcp { from: u16, to: u16, flags: u8 },
    Udp { from: u16, to: u16 },
    Echo { id: u16, reply: bool },
}

#[derive(Debug, Clone, Copy)]
struct Shot {
    source: Ipv4Addr,
    destination: Ipv4Addr,
    load: Load,
}

/// A connection as the port at one of its ends names it: protocol, local and
/// remote address, local and remote port. Of echoes: the identifier, and whether
/// the local end asks.
type Name = (u8, Ipv4Addr, Ipv4Addr, u16, u16);

#[derive(Debug, PartialEq, Clone, Copy)]
enum Stage {
    New,
    Established,
    Closing,
}

#[derive(Debug)]
struct Connection {
    /// Whether the local end opened it.
    from_local: bool,
    answered: bool,
    local_ended: bool,
    remote_ended: bool,
    stage: Stage,
    seen: Duration,
}

/// What becomes of a packet.
#[derive(Debug, Default, PartialEq)]
struct Fate {
    /// Seen on the public wire, from and to these addresses.
    public: Option<(Ipv4Addr, Ipv4Addr)>,
    /// Received by the guest of a port.
    received: Option<(u32, Ipv4Addr, Ipv4Addr)>,
    dropped: Option<DropReason>,
}

/// Cards as they are configured, and the connections that their ports know.
struct Model {
    ports: Vec<PortConfig>,
    groups: HashMap<GroupId, Vec<Ipv4Addr>>,
    connections: HashMap<(PortId, Name), Connection>,
}

impl Model {
    /// A guest sends.
    fn sent(&mut self, now: Duration, id: PortId, shot: Shot) -> Fate {
        let port = self.port(id).clone();
        match self.leaves(now, &port, shot) {
            Err(reason) => Fate { dropped: Some(reason), ..Fate::default() },
            Ok(Way::To(receiver)) => self.arrives(now, receiver, shot),
            Ok(Way::Public(source)) => {
                let translated = Shot { source, ..shot };
                let owner = self.ports.iter().find(|other| other.public == Some(shot.destination)).map(|other| other.id);
                match owner {
                    // The card knows its own public addresses; others are found on the wire.
                    Some(owner) if card_of(owner) == card_of(id) => self.enters(now, owner, translated),
                    Some(owner) => Fate { public: Some((source, shot.destination)), ..self.enters(now, owner, translated) },
                    None => Fate { public: Some((source, shot.destination)), ..Fate::default() },
                }
            }
        }
    }

    /// The internet sends to the public address of a port.
    fn enters(&mut self, now: Duration, id: PortId, shot: Shot) -> Fate {
        let port = self.port(id).clone();
        if port.vpc_prefixes[0].contains(shot.source) {
            return Fate { dropped: Some(SpoofedAddress), ..Fate::default() };
        }
        self.arrives(now, id, Shot { destination: port.ipv4, ..shot })
    }

    fn leaves(&mut self, now: Duration, port: &PortConfig, shot: Shot) -> Result<Way, DropReason> {
        if shot.source != port.ipv4 {
            return Err(SpoofedAddress);
        }
        let way = self.way(port, shot.destination);
        let name = name(shot, true);
        if self.goes_on(now, port.id, name, true, shot.load) {
            let way = way?;
            self.observe(now, port.id, name, true, shot.load);
            return Ok(way);
        }
        if !self.allows(&port.egress, shot.destination, shot.load) {
            return Err(DeniedEgress);
        }
        let way = way?;
        self.open(now, port.id, name, true, shot.load);
        Ok(way)
    }

    fn arrives(&mut self, now: Duration, id: PortId, shot: Shot) -> Fate {
        let port = self.port(id).clone();
        let name = name(shot, false);
        if self.goes_on(now, id, name, false, shot.load) {
            self.observe(now, id, name, false, shot.load);
        } else if self.allows(&port.ingress, shot.source, shot.load) {
            self.open(now, id, name, false, shot.load);
        } else {
            return Fate { dropped: Some(DeniedIngress), ..Fate::default() };
        }
        Fate { received: Some((id.0, shot.source, shot.destination)), ..Fate::default() }
    }

    fn way(&self, port: &PortConfig, destination: Ipv4Addr) -> Result<Way, DropReason> {
        if port.vpc_prefixes[0].contains(destination) {
            let found = self.ports.iter().find(|other| other.vni == port.vni && other.ipv4 == destination && other.id != port.id);
            return found.map(|other| Way::To(other.id)).ok_or(NoMapping);
        }
        let routes = port.routes.iter().filter(|route| route.destination.contains(destination));
        match routes.max_by_key(|route| route.destination.length).map(|route| route.target) {
            None => Err(NoRoute),
            Some(RouteTarget::Blackhole) => Err(Blackhole),
            Some(RouteTarget::InternetGateway) => port.public.map(Way::Public).ok_or(NoPublicAddress),
        }
    }

    fn allows(&self, rules: &[Rule], remote: Ipv4Addr, load: Load) -> bool {
        rules.iter().any(|rule| {
            let protocol = match rule.protocol {
                Protocol::Any => true,
                Protocol::Number(number) => number == protocol(load),
            };
            let port = match (rule.protocol, load) {
                (Protocol::Any, _) => true,
                (_, Load::Tcp { to, .. } | Load::Udp { to, .. }) => rule.ports.is_none_or(|(first, last)| first <= to && to <= last),
                (_, Load::Echo { reply, .. }) => rule.icmp.0.is_none_or(|kind| kind == if reply { 0 } else { 8 }),
            };
            protocol
                && port
                && match rule.remote {
                    Remote::Prefix(prefix) => prefix.contains(remote),
                    Remote::Group(group) => self.groups.get(&group).is_some_and(|members| members.contains(&remote)),
                }
        })
    }

    /// Whether a packet belongs to a connection that its port knows.
    fn goes_on(&mut self, now: Duration, id: PortId, name: Name, from_local: bool, load: Load) -> bool {
        let Some(connection) = self.connections.get(&(id, name)) else { return false };
        if now - connection.seen >= idle_limit(name.0, connection.stage) {
            self.connections.remove(&(id, name));
            return false;
        }
        let opening = matches!(load, Load::Tcp { flags, .. } if flags & (SYN | ACK | RST | FIN) == SYN);
        !opening || (connection.stage == Stage::New && connection.from_local != from_local)
    }

    fn open(&mut self, now: Duration, id: PortId, name: Name, from_local: bool, load: Load) {
        let connection = Connection { from_local, answered: false, local_ended: false, remote_ended: false, stage: Stage::New, seen: now };
        self.connections.insert((id, name), connection);
        self.observe(now, id, name, from_local, load);
    }

    fn observe(&mut self, now: Duration, id: PortId, name: Name, from_local: bool, load: Load) {
        let connection = self.connections.get_mut(&(id, name)).unwrap();
        connection.seen = now;
        connection.answered |= from_local != connection.from_local;
        let Load::Tcp { flags, .. } = load else {
            if connection.answered {
                connection.stage = Stage::Established;
            }
            return;
        };
        let ended = if from_local { &mut connection.local_ended } else { &mut connection.remote_ended };
        *ended |= flags & FIN != 0;
        if flags & RST != 0 || (connection.local_ended && connection.remote_ended) {
            connection.stage = Stage::Closing;
        } else if connection.stage == Stage::New && connection.answered && from_local == connection.from_local && flags & ACK != 0 {
            connection.stage = Stage::Established;
        }
    }

    fn port(&self, id: PortId) -> &PortConfig {
        self.ports.iter().find(|port| port.id == id).unwrap()
    }
}

enum Way {
    To(PortId),
    /// To the internet, from this address.
    Public(Ipv4Addr),
}

fn protocol(load: Load) -> u8 {
    match load {
        Load::Tcp { .. } => 6,
        Load::Udp { .. } => 17,
        Load::Echo { .. } => 1,
    }
}

fn name(shot: Shot, from_local: bool) -> Name {
    let (local, remote) = if from_local { (shot.source, shot.destination) } else { (shot.destination, shot.source) };
    let (a, b) = match shot.load {
        Load::Tcp { from, to, .. } | Load::Udp { from, to } if from_local => (from, to),
        Load::Tcp { from, to, .. } | Load::Udp { from, to } => (to, from),
        Load::Echo { id, reply } => (id, u16::from(reply != from_local)),
    };
    (protocol(shot.load), local, remote, a, b)
}

fn idle_limit(protocol: u8, stage: Stage) -> Duration {
    Duration::from_secs(match (protocol, stage) {
        (6, Stage::Established) => 350,
        (6, Stage::Closing) => 10,
        (17, Stage::Established) => 180,
        _ => 30,
    })
}

/// Ports are spread over the cards by their numbers.
fn card_of(id: PortId) -> u8 {
    u8::try_from(id.0).unwrap() % CARDS
}

/// Two VPCs of one block, each with ports in two subnets on three cards.
fn ports(dice: &mut Dice) -> Vec<PortConfig> {
    let place = |id: u32| {
        let (vni, subnet, host) = (100 + id / 5, (id % 2) as u8, 10 + (id % 5) as u8);
        let mut port = guest(id, vni, [10, 0, subnet, host]);
        port.public = (id % 3 != 1).then(|| Ipv4Addr::new(198, 51, 100, 20 + id as u8));
        port
    };
    let mut ports: Vec<_> = (0..10).map(place).collect();
    for port in &mut ports {
        reconfigure(dice, port);
    }
    ports
}

/// Rolls the rules and routes of a port anew.
fn reconfigure(dice: &mut Dice, port: &mut PortConfig) {
    port.ingress = rules(dice);
    port.egress = rules(dice);
    let everywhere = Prefix::new(Ipv4Addr::UNSPECIFIED, 0);
    port.routes = match dice.roll(6) {
        0 => Vec::new(),
        1 => vec![
            Route { destination: everywhere, target: RouteTarget::InternetGateway },
            Route { destination: Prefix::new(FAR[0], 24), target: RouteTarget::Blackhole },
        ],
        _ => vec![Route { destination: everywhere, target: RouteTarget::InternetGateway }],
    };
}

fn rules(dice: &mut Dice) -> Vec<Rule> {
    let rule = |dice: &mut Dice| {
        let remote = match dice.roll(6) {
            0 => Remote::Group(GroupId(1)),
            1 => Remote::Group(GroupId(2)),
            2 => Remote::Prefix(Prefix::new(Ipv4Addr::new(10, 0, 1, 0), 24)),
            3 => Remote::Prefix(Prefix::new(FAR[0], 32)),
            _ => ANY,
        };
        match dice.roll(5) {
            0 => Rule { protocol: Protocol::Any, ports: None, icmp: (None, None), remote },
            1 => udp_rule(53, remote),
            2 => Rule { icmp: (Some(8), None), ..icmp_rule(remote) },
            3 => Rule { ports: Some((0, 100)), ..tcp_rule(0, remote) },
            _ => tcp_rule(443, remote),
        }
    };
    (0..dice.roll(4)).map(|_| rule(dice)).collect()
}

/// Something that somebody may send, out of few enough things for connections to
/// be answered, closed and opened again.
fn shot(dice: &mut Dice, source: Ipv4Addr, destination: Ipv4Addr) -> Shot {
    let (from, to) = (dice.pick(&[53, 80, 443, 1000]), dice.pick(&[53, 80, 443, 1000]));
    let load = match dice.roll(4) {
        0 => Load::Udp { from, to },
        1 => Load::Echo { id: 1 + dice.roll(2) as u16, reply: dice.roll(2) == 0 },
        _ => Load::Tcp { from, to, flags: dice.pick(&[SYN, SYN | ACK, ACK, ACK, FIN | ACK, RST, RST | ACK, 0]) },
    };
    Shot { source, destination, load }
}

fn frame_of(shot: Shot, from: Mac, to: Mac) -> Vec<u8> {
    let ends =
        |source, destination| (End { mac: from, ip: shot.source, port: source }, End { mac: to, ip: shot.destination, port: destination });
    match shot.load {
        Load::Tcp { from, to, flags } => {
            let (from, to) = ends(from, to);
            tcp(from, to, flags, b"data")
        }
        Load::Udp { from, to } => {
            let (from, to) = ends(from, to);
            udp(from, to, b"data")
        }
        Load::Echo { id, reply } => {
            let (from, to) = ends(0, 0);
            ping(from, to, if reply { 0 } else { 8 }, id)
        }
    }
}

/// What the lab saw, in the model's words. Every checksum has to be right.
fn fate(seen: &Seen, drops: &[(DropReason, u64)]) -> Fate {
    let ends = |frame: &[u8]| {
        let (_, ip, _) = parse(frame);
        (ip.source, ip.destination)
    };
    let public: Vec<_> = seen.public.iter().filter(|frame| frame[12..14] == [8, 0]).map(|frame| ends(frame)).collect();
    assert!(public.len() <= 1 && seen.guests.len() <= 1, "{seen:?}");
    assert!(drops.iter().map(|(_, count)| count).sum::<u64>() <= 1, "{drops:?}");
    let received = seen.guests.first().map(|(_, port, frame)| {
        let (source, destination) = ends(frame);
        (*port, source, destination)
    });
    Fate { public: public.first().copied(), received, dropped: drops.first().map(|(reason, _)| *reason) }
}

/// What the cards say beforehand would become of a packet, one after the other as
/// it would pass them.
fn explain(lab: &Lab, mut card: u8, mut entry: Entry, shot: Shot) -> Fate {
    let mut fate = Fate::default();
    let transport = match shot.load {
        Load::Tcp { from, to, flags } => Transport { source_port: from, destination_port: to, tcp_flags: flags, ..Transport::default() },
        Load::Udp { from, to } => Transport { source_port: from, destination_port: to, ..Transport::default() },
        Load::Echo { id, reply } => Transport { source_port: id, icmp_type: if reply { 0 } else { 8 }, ..Transport::default() },
    };
    let mut question =
        Question { entry, source: Some(shot.source), destination: shot.destination, protocol: protocol(shot.load), transport, length: 60 };
    loop {
        question.entry = entry;
        let explanation = lab.cards[usize::from(card)].pipeline.explain(lab.now, &question);
        for step in &explanation.steps {
            match step.seen {
                Noted::Nat { before, after, source: true } => assert_eq!(question.source.replace(after), Some(before)),
                Noted::Nat { before, after, source: false } => {
                    assert_eq!(std::mem::replace(&mut question.destination, after), before);
                }
                _ => {}
            }
        }
        match explanation.end {
            Ending::Delivered(port) => {
                fate.received = Some((port.0, question.source.unwrap(), question.destination));
                return fate;
            }
            Ending::Dropped(reason) => {
                fate.dropped = Some(reason);
                return fate;
            }
            Ending::Tunnel { vtep: to, vni } => {
                entry = Entry::Vtep(vtep(card), vni);
                card = to.octets()[3];
            }
            Ending::Internet { source, .. } => {
                fate.public = Some((source, question.destination));
                let ports = |card: &Card| card.snapshot.ports.iter().any(|port| port.public == Some(question.destination));
                match lab.cards.iter().position(ports) {
                    Some(owner) => (card, entry) = (owner as u8, Entry::Public),
                    None => return fate,
                }
            }
            Ending::Service(_) => return fate,
        }
    }
}

/// Plays `packets` packets of one seed.
fn play(seed: u64, packets: usize) -> HashMap<Option<DropReason>, usize> {
    let mut dice = Dice(seed);
    let ports = ports(&mut dice);
    let mut lab = Lab::new(CARDS);
    for port in &ports {
        lab.place(card_of(port.id), vec![port.clone()]);
    }
    let mut model = Model { ports, groups: HashMap::new(), connections: HashMap::new() };
    let mut fates = HashMap::new();
    let mut counted = lab.drops_by_reason();
    for number in 0..packets {
        if dice.roll(400) == 0 {
            change(&mut dice, &mut lab, &mut model);
            counted = lab.drops_by_reason();
        }
        if dice.roll(300) == 0 {
            let _ = lab.wait(WAIT * dice.pick(&[1, 1, 1, 2, 11, 21]));
            counted = lab.drops_by_reason();
        }
        let sender = model.ports[dice.roll(model.ports.len())].clone();
        let receiver = model.ports[dice.roll(model.ports.len())].clone();
        let explained;
        let (fate_of_model, seen, shot) = if dice.roll(5) == 0 {
            let Some(public) = receiver.public else { continue };
            let shot = shot(&mut dice, FAR[number % 2], public);
            let card = card_of(receiver.id);
            explained = explain(&lab, card, Entry::Public, shot);
            let seen = lab.feed(card, pipeline::Device::Public, &frame_of(shot, GATEWAY_MAC, public_mac(card)));
            (model.enters(lab.now, receiver.id, shot), seen, shot)
        } else {
            let source = if dice.roll(50) == 0 { receiver.ipv4 } else { sender.ipv4 };
            let destination = match dice.roll(6) {
                0 => FAR[number % 2],
                1 => receiver.public.unwrap_or(FAR[0]),
                2 if dice.roll(10) == 0 => Ipv4Addr::new(10, 0, 0, 200),
                _ => receiver.ipv4,
            };
            let shot = shot(&mut dice, source, destination);
            let next = if sender.subnet.contains(destination) { receiver.mac } else { ROUTER_MAC };
            explained = explain(&lab, card_of(sender.id), Entry::Guest(sender.id), shot);
            let seen = lab.send(card_of(sender.id), sender.id.0, &frame_of(shot, sender.mac, next));
            (model.sent(lab.now, sender.id, shot), seen, shot)
        };
        let drops = lab.drops_by_reason();
        let new: Vec<_> =
            drops.iter().zip(&counted).filter(|(now, before)| now.1 > before.1).map(|(now, before)| (now.0, now.1 - before.1)).collect();
        let fate_of_lab = fate(&seen, &new);
        assert_eq!(fate_of_lab, fate_of_model, "seed {seed}, packet {number}: {shot:?} of {:?}", sender.id);
        assert_eq!(explained, fate_of_lab, "what was explained, seed {seed}, packet {number}: {shot:?} of {:?}", sender.id);
        *fates.entry(fate_of_model.dropped).or_default() += 1;
        counted = drops;
    }
    fates
}

/// One change that a tenant may make.
fn change(dice: &mut Dice, lab: &mut Lab, model: &mut Model) {
    match dice.roll(3) {
        0 => {
            let members = |dice: &mut Dice, ports: &[PortConfig]| {
                ports.iter().filter(|_| dice.roll(2) == 0).map(|port| port.ipv4).collect::<Vec<_>>()
            };
            model.groups = [1, 2].map(|id| (GroupId(id), members(dice, &model.ports))).into();
            for card in &mut lab.cards {
                card.snapshot.networks.iter_mut().for_each(|network| network.groups.clone_from(&model.groups));
            }
        }
        _ => {
            let index = dice.roll(model.ports.len());
            let port = &mut model.ports[index];
            reconfigure(dice, port);
            *lab.port(card_of(port.id), port.id.0) = port.clone();
        }
    }
    let _ = lab.apply();
}

#[test]
fn the_packet_path_agrees_with_the_model() {
    let mut fates: HashMap<Option<DropReason>, usize> = HashMap::new();
    for seed in 0..20 {
        for (dropped, count) in play(seed, 50_000) {
            *fates.entry(dropped).or_default() += count;
        }
    }
    // A model that nobody asks much proves little.
    for fate in [
        None,
        Some(DeniedEgress),
        Some(DeniedIngress),
        Some(NoMapping),
        Some(NoRoute),
        Some(Blackhole),
        Some(NoPublicAddress),
        Some(SpoofedAddress),
    ] {
        assert!(fates.get(&fate).is_some_and(|count| *count > 100), "{fate:?} in {fates:?}");
    }
}
