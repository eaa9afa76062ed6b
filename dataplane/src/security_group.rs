//! Security groups: the rules of all groups of a port, as one union of allows.
//!
//! Nothing matches: nothing passes. Order has no effect. Only the first packet of
//! a connection comes here; its answers pass by the flow table.

use std::net::Ipv4Addr;

use crate::headers::{self, Ipv4, Transport};
use crate::policy::Network;
use crate::{Protocol, Remote, Rule};

/// The rule that lets `remote` open the connection that this packet begins, if any does.
#[must_use]
pub fn allowing<'a>(rules: &'a [Rule], network: &Network, remote: Ipv4Addr, ip: &Ipv4, transport: &Transport) -> Option<&'a Rule> {
    rules.iter().find(|rule| {
        covers(rule, ip.protocol, transport)
            && match rule.remote {
                Remote::Prefix(prefix) => prefix.contains(remote),
                Remote::Group(group) => network.is_member(group, remote),
            }
    })
}

fn covers(rule: &Rule, protocol: u8, transport: &Transport) -> bool {
    let number = match rule.protocol {
        Protocol::Any => return true,
        Protocol::Number(number) => number,
    };
    number == protocol
        && match number {
            headers::TCP | headers::UDP_PROTOCOL => {
                rule.ports.is_none_or(|(first, last)| (first..=last).contains(&transport.destination_port))
            }
            headers::ICMP => {
                rule.icmp.0.is_none_or(|icmp_type| icmp_type == transport.icmp_type)
                    && rule.icmp.1.is_none_or(|code| code == transport.icmp_code)
            }
            _ => true,
        }
}
