//! What a run can be about, by name.

use std::fmt;

/// What the packets of a trace meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Case {
    /// Guest to guest of one card; all rules allow.
    Forward,
    /// Guest to wire by VXLAN; all rules allow.
    Encap,
    /// Wire to guest by VXLAN; all rules allow.
    Decap,
    /// Wire to the guest 10.0.1.5 of VNI 100, whose group lets in udp/8080 from 10.0.0.0/16.
    DecapConntrack,
    /// Guest to wire under egress rules, without an ingress rule: answers pass by their connection.
    ConntrackEncap,
}

impl Case {
    /// All of them.
    pub const ALL: [Case; 5] = [Case::Forward, Case::Encap, Case::Decap, Case::DecapConntrack, Case::ConntrackEncap];

    /// Whether frames of a trace come from the wire unless they say otherwise.
    pub fn is_decap(self) -> bool {
        matches!(self, Case::Decap | Case::DecapConntrack)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Case::Forward => "forward",
            Case::Encap => "encap",
            Case::Decap => "decap",
            Case::DecapConntrack => "decap-conntrack",
            Case::ConntrackEncap => "conntrack-encap",
        })
    }
}
