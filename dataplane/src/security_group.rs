//! Security groups: the rules of all groups of a port, as one union of allows.
//!
//! Nothing matches: nothing passes. Order has no effect. Of a tracked connection
//! only the first packet comes here, and its answers pass by the flow table. One
//! that is not tracked (see [`crate::policy::tracking`]) comes here with every new
//! configuration, each direction for itself.

use std::net::Ipv4Addr;

use crate::headers::{self, Ipv4, Transport};
use crate::policy::Network;
use crate::{Prefix, Protocol, Remote, Rule};

/// Whether any of `rules` lets `remote` open the connection that this packet begins.
#[must_use]
pub fn allows(rules: &[Rule], network: &Network, remote: Ipv4Addr, ip: &Ipv4, transport: &Transport) -> bool {
    rules.iter().any(|rule| matches(rule, network, remote, ip, transport))
}

/// Whether a rule that does is for any address whatever.
#[must_use]
pub fn allows_anybody(rules: &[Rule], protocol: u8, transport: &Transport) -> bool {
    let covers = |rule: &Rule| covers(rule.protocol, rule.ports, rule.icmp, protocol, transport);
    rules.iter().any(|rule| is_for_anybody(rule) && covers(rule))
}

/// Whether answers to anybody pass on any port: some rule lets a whole protocol,
/// TCP or UDP, through to any address.
#[must_use]
pub fn allows_all(rules: &[Rule], protocol: u8) -> bool {
    let whole = |rule: &Rule| match rule.protocol {
        Protocol::Any => true,
        Protocol::Number(number) => number == protocol && rule.ports.is_none_or(|ports| ports == (0, u16::MAX)),
    };
    rules.iter().any(|rule| is_for_anybody(rule) && whole(rule))
}

fn is_for_anybody(rule: &Rule) -> bool {
    matches!(rule.remote, Remote::Prefix(Prefix { length: 0, .. }))
}

/// Whether one rule does.
fn matches(rule: &Rule, network: &Network, remote: Ipv4Addr, ip: &Ipv4, transport: &Transport) -> bool {
    covers(rule.protocol, rule.ports, rule.icmp, ip.protocol, transport)
        && match rule.remote {
            Remote::Prefix(prefix) => prefix.contains(remote),
            Remote::Group(group) => network.is_member(group, remote),
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
