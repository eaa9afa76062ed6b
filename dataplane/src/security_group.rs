//! Security groups: the rules of all groups of a port, as one union of allows.
//!
//! Nothing matches: nothing passes. Order has no effect. Only the first packet of
//! a connection comes here; its answers pass by the flow table.

use std::net::Ipv4Addr;

use crate::headers::{self, Ipv4, Transport};
use crate::policy::Network;
use crate::{Protocol, Remote, Rule};

/// Whether any of `rules` lets `remote` open the connection that this packet begins.
#[must_use]
pub fn allows(rules: &[Rule], network: &Network, remote: Ipv4Addr, ip: &Ipv4, transport: &Transport) -> bool {
    rules.iter().any(|rule| matches(rule, network, remote, ip, transport))
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
