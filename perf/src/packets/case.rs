//! What a run can be about, by name.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;

/// What packets meet, and where they come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Case {
    /// Packets of a capture.
    Capture(Policy),
    /// Packets made here.
    Generated(Load),
}

/// What the packets of a capture meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// Capture: guest to guest of one card; all rules allow.
    Forward,
    /// Capture: guest to wire by VXLAN; all rules allow.
    Encap,
    /// Capture: wire to guest by VXLAN; all rules allow.
    Decap,
    /// Capture: wire to the guest 10.0.1.5 of VNI 100, whose group lets in udp/8080 from 10.0.0.0/16.
    DecapConntrack,
    /// Capture: guest to wire under egress rules and no ingress rule; answers pass by their connection.
    ConntrackEncap,
}

/// A load that is made here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Load {
    /// 16 k connections, both directions: connection tracking, rules and VXLAN.
    #[value(name = "established-16k")]
    Established16k,
    /// 1 M connections likewise, in random order.
    #[value(name = "established-1m")]
    Established1m,
    /// Every packet opens a connection: 5 rules, route, mapping.
    Connections,
    /// One rule: established and new connections.
    #[value(name = "rules-1")]
    Rules1,
    /// 1,000 rules against one in the same run: established and new connections.
    #[value(name = "rules-1000")]
    Rules1000,
    /// 10,000 rules against one in the same run: established and new connections.
    #[value(name = "rules-10000")]
    Rules10000,
    /// One rule edit among 1,000 ports under load: how long packets are not served.
    Edit,
    /// 10 M new connections a second against 10 k established ones: what those get through.
    Flood,
}

impl Policy {
    /// Whether frames of a capture come from the wire unless they say otherwise.
    pub fn is_decap(self) -> bool {
        matches!(self, Policy::Decap | Policy::DecapConntrack)
    }
}

/// Name and description of every case, one a line.
pub fn list() -> String {
    let policies = Policy::value_variants().iter().filter_map(ValueEnum::to_possible_value);
    let loads = Load::value_variants().iter().filter_map(ValueEnum::to_possible_value);
    let line =
        |value: clap::builder::PossibleValue| format!("{:<16} {}\n", value.get_name(), value.get_help().cloned().unwrap_or_default());
    policies.chain(loads).map(line).collect()
}

impl FromStr for Case {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let policy = Policy::from_str(name, false).map(Case::Capture);
        policy.or_else(|_| Load::from_str(name, false).map(Case::Generated)).map_err(|_| "not a case; --list names them".to_owned())
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.to_possible_value().as_ref().map_or("", |value| value.get_name()))
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.to_possible_value().as_ref().map_or("", |value| value.get_name()))
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Case::Capture(policy) => policy.fmt(f),
            Case::Generated(load) => load.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_case_is_a_case_of_that_name() {
        for line in list().lines() {
            let name = line.split(' ').next().unwrap();
            assert_eq!(name.parse::<Case>().unwrap().to_string(), name);
        }
        assert!("ovs".parse::<Case>().is_err());
    }
}
