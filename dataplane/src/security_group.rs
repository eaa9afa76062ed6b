//! Security groups: the rules of all groups of a port, as one union of allows.
//!
//! Nothing matches: nothing passes. Order has no effect. Of a tracked connection
//! only the first packet comes here, and its answers pass by the flow table. One
//! that is not tracked (see [`crate::policy::tracking`]) comes here with every new
//! configuration, each direction for itself.
//!
//! A set of rules is compiled once, off the worker's thread, so that a lookup costs
//! nearly the same for ten thousand rules as for five. What a rule asks of the
//! transport header becomes a few prefixes of 16 bits, of the destination port or of
//! ICMP type and code; each prefix that any rule has is a node, and a node holds the
//! addresses of all rules that have it, as disjoint ranges in order. A packet belongs
//! to one node of each length: its lookup is, for each length that the rules of its
//! protocol use (two as a rule: any port, one port), one search in a hash map and one
//! in sorted ranges. A range of ports has at most 30 prefixes, so nobody's rules make
//! more than 30 times themselves. The rules for any address are compiled once more by
//! themselves, for the question whether a connection needs tracking.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use crate::headers::{self, Ipv4, Transport};
use crate::policy::{Map, Network};
use crate::{Prefix, Protocol, Remote, Rule};

/// Length of a node that stands for any ICMP type with one code.
const CODE_ONLY: u8 = 17;

/// One place of the header's space: protocol, length and bits of a prefix. `None`
/// is all protocols.
type Node = (Option<u8>, u8, u16);

/// The rules of a port in one direction, ready for lookups.
#[derive(Debug, Default)]
pub struct RuleSet {
    all: Classifier,
    /// Those of them for any address.
    anybody: Classifier,
    /// Whether one of those is for all ports of TCP, and of UDP.
    all_tcp: bool,
    all_udp: bool,
}

impl RuleSet {
    /// Compiles rules; groups stand for the members that `network` has now.
    #[must_use]
    pub fn compile(rules: &[Rule], network: &Network) -> Self {
        let is_for_anybody = |rule: &&Rule| matches!(rule.remote, Remote::Prefix(Prefix { length: 0, .. }));
        let anybody: Vec<_> = rules.iter().filter(is_for_anybody).copied().collect();
        let all_of = |protocol| anybody.iter().any(|rule| is_for_all_ports(rule, protocol));
        Self {
            all: Classifier::compile(rules, network),
            all_tcp: all_of(headers::TCP),
            all_udp: all_of(headers::UDP_PROTOCOL),
            anybody: Classifier::compile(&anybody, network),
        }
    }

    /// Whether any rule lets `remote` open the connection that this packet begins.
    #[must_use]
    pub fn allows(&self, remote: Ipv4Addr, ip: &Ipv4, transport: &Transport) -> bool {
        self.all.allows(remote, ip, transport)
    }

    /// Whether a rule that does is for any address whatever.
    #[must_use]
    pub fn allows_anybody(&self, ip: &Ipv4, transport: &Transport) -> bool {
        self.anybody.allows(Ipv4Addr::UNSPECIFIED, ip, transport)
    }

    /// Whether there is any such rule for the protocol.
    #[must_use]
    pub fn knows_anybody(&self, protocol: u8) -> bool {
        [None, Some(protocol)].iter().any(|protocol| self.anybody.lengths.contains_key(protocol))
    }

    /// Whether answers to anybody pass on any port: some rule lets a whole protocol,
    /// TCP or UDP, through to any address.
    #[must_use]
    pub fn allows_all(&self, protocol: u8) -> bool {
        match protocol {
            headers::TCP => self.all_tcp,
            headers::UDP_PROTOCOL => self.all_udp,
            _ => false,
        }
    }
}

fn is_for_all_ports(rule: &Rule, protocol: u8) -> bool {
    match rule.protocol {
        Protocol::Any => true,
        Protocol::Number(number) => number == protocol && rule.ports.is_none_or(|ports| ports == (0, u16::MAX)),
    }
}

/// Whether a rule for these protocols, destination ports and ICMP messages is
/// about this packet.
pub(crate) fn covers(
    rule: Protocol,
    ports: Option<(u16, u16)>,
    icmp: (Option<u8>, Option<u8>),
    protocol: u8,
    transport: &Transport,
) -> bool {
    let number = match rule {
        Protocol::Any => return true,
        Protocol::Number(number) => number,
    };
    number == protocol
        && match number {
            headers::TCP | headers::UDP_PROTOCOL => ports.is_none_or(|(first, last)| (first..=last).contains(&transport.destination_port)),
            headers::ICMP => {
                icmp.0.is_none_or(|icmp_type| icmp_type == transport.icmp_type) && icmp.1.is_none_or(|code| code == transport.icmp_code)
            }
            _ => true,
        }
}

/// Rules, ready to be asked which addresses they let through.
#[derive(Debug, Default)]
struct Classifier {
    /// Of each protocol, a bit for each length that has nodes.
    lengths: Map<Option<u8>, u32>,
    /// Where in `ranges` the addresses of a node are.
    nodes: Map<Node, (u32, u32)>,
    /// First and last address.
    ranges: Vec<(u32, u32)>,
}

impl Classifier {
    fn compile(rules: &[Rule], network: &Network) -> Self {
        let mut sets: BTreeMap<Node, Vec<(u32, u32)>> = BTreeMap::new();
        for rule in rules {
            let addresses: Vec<_> = match rule.remote {
                Remote::Prefix(prefix) => vec![(u32::from(prefix.nth(0)), u32::from(prefix.nth(0)) | !u32::from(prefix.mask()))],
                Remote::Group(group) => network.members(group).map(|member| (member.into(), member.into())).collect(),
            };
            nodes_of(rule, |node| sets.entry(node).or_default().extend(&addresses));
        }
        let mut classifier = Self::default();
        for (node, set) in sets {
            let start = classifier.ranges.len();
            union(set, &mut classifier.ranges);
            // Thirty times the rules and members of one port are far below 2^32.
            let [start, end] = [start, classifier.ranges.len()].map(|at| u32::try_from(at).unwrap_or(u32::MAX));
            *classifier.lengths.entry(node.0).or_default() |= 1 << node.1;
            classifier.nodes.insert(node, (start, end));
        }
        classifier
    }

    fn allows(&self, remote: Ipv4Addr, ip: &Ipv4, transport: &Transport) -> bool {
        let bits = match ip.protocol {
            headers::ICMP => u16::from_be_bytes([transport.icmp_type, transport.icmp_code]),
            _ => transport.destination_port,
        };
        self.allows_of(None, 0, remote) || self.allows_of(Some(ip.protocol), bits, remote)
    }

    fn allows_of(&self, protocol: Option<u8>, bits: u16, remote: Ipv4Addr) -> bool {
        let mut lengths = self.lengths.get(&protocol).copied().unwrap_or(0);
        while lengths != 0 {
            let length = u8::try_from(lengths.trailing_zeros()).unwrap_or(0);
            lengths &= lengths - 1;
            let prefix = if length == CODE_ONLY { bits & 0xff } else { bits & mask(length) };
            if let Some((start, end)) = self.nodes.get(&(protocol, length, prefix)) {
                let ranges = self.ranges.get(*start as usize..*end as usize).unwrap_or_default();
                let after = ranges.partition_point(|(first, _)| *first <= remote.into());
                if after.checked_sub(1).and_then(|at| ranges.get(at)).is_some_and(|(_, last)| u32::from(remote) <= *last) {
                    return true;
                }
            }
        }
        false
    }
}

/// The upper `length` of 16 bits.
fn mask(length: u8) -> u16 {
    u16::MAX.checked_shl(16 - u32::from(length.min(16))).unwrap_or(0)
}

/// Names the nodes of a rule.
fn nodes_of(rule: &Rule, mut node: impl FnMut(Node)) {
    let Protocol::Number(number) = rule.protocol else { return node((None, 0, 0)) };
    let protocol = Some(number);
    match (number, rule.ports, rule.icmp) {
        (headers::TCP | headers::UDP_PROTOCOL, Some((first, last)), _) => {
            // From the first port on, always the largest prefix that begins there and ends in time.
            let mut next = Some(first);
            while let Some(port) = next.filter(|port| *port <= last) {
                let fits = |length: &u8| port & !mask(*length) == 0 && port | !mask(*length) <= last;
                let length = (0..=16).find(fits).unwrap_or(16);
                node((protocol, length, port));
                next = (port | !mask(length)).checked_add(1);
            }
        }
        (headers::ICMP, _, (Some(icmp_type), Some(code))) => node((protocol, 16, u16::from_be_bytes([icmp_type, code]))),
        (headers::ICMP, _, (Some(icmp_type), None)) => node((protocol, 8, u16::from_be_bytes([icmp_type, 0]))),
        (headers::ICMP, _, (None, Some(code))) => node((protocol, CODE_ONLY, code.into())),
        _ => node((protocol, 0, 0)),
    }
}

/// Appends the union of `set` as disjoint ranges in order.
fn union(mut set: Vec<(u32, u32)>, ranges: &mut Vec<(u32, u32)>) {
    set.sort_unstable();
    let start = ranges.len();
    for (first, last) in set {
        match ranges.get_mut(start..).and_then(<[_]>::last_mut) {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => ranges.push((first, last)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::{GroupId, NetworkConfig, Vni};

    /// What a set of rules means, one after the other.
    fn any_allows(rules: &[Rule], groups: &HashMap<GroupId, Vec<Ipv4Addr>>, remote: Ipv4Addr, ip: &Ipv4, transport: &Transport) -> bool {
        rules.iter().any(|rule| {
            covers(rule.protocol, rule.ports, rule.icmp, ip.protocol, transport)
                && match rule.remote {
                    Remote::Prefix(prefix) => prefix.contains(remote),
                    Remote::Group(group) => groups.get(&group).is_some_and(|members| members.contains(&remote)),
                }
        })
    }

    fn port() -> impl Strategy<Value = u16> {
        prop_oneof![0u16..6, 65_530u16..=65_535, any::<u16>()]
    }

    /// Few values, so that rules and packets meet.
    fn address() -> impl Strategy<Value = Ipv4Addr> {
        prop_oneof![
            (0u32..8).prop_map(|n| (0x0a00_0000 + n).into()),
            Just(Ipv4Addr::BROADCAST),
            Just(Ipv4Addr::UNSPECIFIED),
            any::<Ipv4Addr>()
        ]
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let protocol = prop_oneof![
            1 => Just(Protocol::Any),
            9 => prop::sample::select(vec![1u8, 6, 17, 47]).prop_map(Protocol::Number)
        ];
        let byte = || proptest::option::of(0u8..4);
        let remote = prop_oneof![
            (address(), 0u8..=33).prop_map(|(address, length)| Remote::Prefix(Prefix::new(address, length))),
            (0u32..4).prop_map(|group| Remote::Group(GroupId(group)))
        ];
        (protocol, proptest::option::of((port(), port())), (byte(), byte()), remote).prop_map(|(protocol, ports, icmp, remote)| Rule {
            protocol,
            ports,
            icmp,
            remote,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn compiled_rules_allow_what_the_rules_one_by_one_do(
            rules in prop::collection::vec(rule(), 0..12),
            members in prop::collection::vec((0u32..3, address()), 0..8),
            packets in prop::collection::vec((prop::sample::select(vec![1u8, 6, 17, 47, 50]), address(), port(), 0u8..4, 0u8..4), 40),
        ) {
            let mut groups: HashMap<_, Vec<_>> = HashMap::new();
            for (group, member) in members {
                groups.entry(GroupId(group)).or_default().push(member);
            }
            let network = Network::new(&NetworkConfig { groups: groups.clone(), ..NetworkConfig::new(Vni(1), Vec::new()) });
            let compiled = RuleSet::compile(&rules, &network);
            let for_anybody: Vec<_> = rules.iter().filter(|rule| matches!(rule.remote, Remote::Prefix(prefix) if prefix.length == 0)).copied().collect();
            let mut bytes = [0; 20];
            headers::write_ipv4(&mut bytes, (Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST), 0, (0, 0), 0);
            let ip = headers::ipv4(&bytes).unwrap();
            for (protocol, remote, destination_port, icmp_type, icmp_code) in packets {
                let ip = Ipv4 { protocol, ..ip };
                let transport = match protocol {
                    1 => Transport { icmp_type, icmp_code, ..Transport::default() },
                    6 | 17 => Transport { destination_port, ..Transport::default() },
                    _ => Transport::default(),
                };
                prop_assert_eq!(compiled.allows(remote, &ip, &transport), any_allows(&rules, &groups, remote, &ip, &transport));
                prop_assert_eq!(compiled.allows_anybody(&ip, &transport), any_allows(&for_anybody, &groups, remote, &ip, &transport));
            }
        }

        #[test]
        fn all_ports_to_anybody_are_seen_whatever_else_the_rules_say(rules in prop::collection::vec(rule(), 0..12)) {
            let compiled = RuleSet::compile(&rules, &Network::default());
            for protocol in [headers::TCP, headers::UDP_PROTOCOL] {
                let expected = rules.iter().any(|rule| {
                    let anybody = matches!(rule.remote, Remote::Prefix(prefix) if prefix.length == 0);
                    let own = rule.protocol == Protocol::Number(protocol) && matches!(rule.ports, None | Some((0, 65535)));
                    anybody && (own || rule.protocol == Protocol::Any)
                });
                prop_assert_eq!(compiled.allows_all(protocol), expected);
            }
            prop_assert!(!compiled.allows_all(headers::ICMP));
        }

        #[test]
        fn a_range_of_ports_has_few_prefixes_and_no_port_twice(first in port(), last in port()) {
            let rule = Rule { protocol: Protocol::Number(6), ports: Some((first, last)), icmp: (None, None), remote: Remote::Group(GroupId(0)) };
            let (mut count, mut ports) = (0, 0u32);
            nodes_of(&rule, |(_, length, _)| {
                count += 1;
                ports += 1 << (16 - length);
            });
            prop_assert!(count <= 30);
            prop_assert_eq!(ports, u32::from(last).saturating_sub(first.into()) + u32::from(first <= last));
        }
    }
}
