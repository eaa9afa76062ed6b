//! Network ACLs: ordered rules at the border of a subnet.
//!
//! The first rule that matches decides, and what none matches does not pass. No
//! connection is known here: each direction is judged by its own list, with the
//! address beyond the border for the remote. Two guests of one subnet never cross
//! its border, and the services of the card are not beyond it.
//!
//! All packets of one direction of a flow have the same verdict, so the pipeline
//! keeps it with the decision for that direction, under the port's generation: a
//! new ACL is a new generation, and cuts established connections at once.

use std::net::Ipv4Addr;

use crate::headers::{Ipv4, Transport};
use crate::{Acl, AclRule, Prefix, security_group};

/// Whether a packet may leave `subnet`.
#[must_use]
pub fn lets_out(acl: Option<&Acl>, subnet: Prefix, ip: &Ipv4, transport: &Transport) -> bool {
    acl.is_none_or(|acl| subnet.contains(ip.destination) || allows(&acl.egress, ip.destination, ip, transport))
}

/// Whether a packet may enter `subnet`.
#[must_use]
pub fn lets_in(acl: Option<&Acl>, subnet: Prefix, ip: &Ipv4, transport: &Transport) -> bool {
    acl.is_none_or(|acl| subnet.contains(ip.source) || allows(&acl.ingress, ip.source, ip, transport))
}

fn allows(rules: &[AclRule], remote: Ipv4Addr, ip: &Ipv4, transport: &Transport) -> bool {
    let matches = |rule: &&AclRule| {
        rule.remote.contains(remote) && security_group::covers(rule.protocol, rule.ports, rule.icmp, ip.protocol, transport)
    };
    rules.iter().find(matches).is_some_and(|rule| rule.allow)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Protocol;
    use crate::headers::{ICMP, TCP};

    const SUBNET: Prefix = Prefix::new(Ipv4Addr::new(10, 0, 1, 0), 24);
    const ANY: Prefix = Prefix::new(Ipv4Addr::UNSPECIFIED, 0);

    fn rule(allow: bool, protocol: u8, ports: Option<(u16, u16)>, remote: Prefix) -> AclRule {
        AclRule { allow, protocol: Protocol::Number(protocol), ports, icmp: (None, None), remote }
    }

    fn packet(protocol: u8, source: [u8; 4], destination: [u8; 4]) -> Ipv4 {
        let mut bytes = [0; 20];
        crate::headers::write_ipv4(&mut bytes, (source.into(), destination.into()), protocol, (0, 0), 0);
        crate::headers::ipv4(&bytes).unwrap()
    }

    fn to(destination_port: u16) -> Transport {
        Transport { destination_port, ..Transport::default() }
    }

    #[test]
    fn the_first_rule_that_matches_decides_and_nothing_else_passes() {
        let narrow = Prefix::new(Ipv4Addr::new(192, 0, 2, 0), 24);
        let egress = vec![rule(false, TCP, Some((80, 80)), narrow), rule(true, TCP, Some((80, 90)), ANY)];
        let acl = Acl { ingress: Vec::new(), egress };
        let out = |destination, port| lets_out(Some(&acl), SUBNET, &packet(TCP, [10, 0, 1, 5], destination), &to(port));
        assert!(out([198, 51, 100, 1], 80), "the second rule");
        assert!(!out([192, 0, 2, 1], 80), "the first rule");
        assert!(out([192, 0, 2, 1], 81));
        assert!(!out([198, 51, 100, 1], 91), "no rule");
        assert!(!lets_in(Some(&acl), SUBNET, &packet(TCP, [198, 51, 100, 1], [10, 0, 1, 5]), &to(80)), "no rule for this direction");
    }

    #[test]
    fn within_the_subnet_and_without_an_acl_everything_passes() {
        let inside = packet(TCP, [10, 0, 1, 5], [10, 0, 1, 6]);
        let outside = packet(TCP, [10, 0, 1, 5], [10, 0, 2, 6]);
        let closed = Acl::default();
        assert!(lets_out(Some(&closed), SUBNET, &inside, &to(1)) && lets_in(Some(&closed), SUBNET, &inside, &to(1)));
        assert!(!lets_out(Some(&closed), SUBNET, &outside, &to(1)));
        assert!(lets_out(None, SUBNET, &outside, &to(1)) && lets_in(None, SUBNET, &outside, &to(1)));
    }

    #[test]
    fn icmp_is_judged_by_type_and_code() {
        let echo = AclRule { icmp: (Some(8), Some(0)), ..rule(true, ICMP, None, ANY) };
        let acl = Acl { ingress: vec![echo], egress: Vec::new() };
        let message = |icmp_type, icmp_code| Transport { icmp_type, icmp_code, ..Transport::default() };
        let ping = packet(ICMP, [192, 0, 2, 1], [10, 0, 1, 5]);
        assert!(lets_in(Some(&acl), SUBNET, &ping, &message(8, 0)));
        assert!(!lets_in(Some(&acl), SUBNET, &ping, &message(8, 1)));
        assert!(!lets_in(Some(&acl), SUBNET, &ping, &message(3, 0)));
    }
}
