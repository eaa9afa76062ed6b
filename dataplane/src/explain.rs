//! Why a packet passes or dies, told by the code that decides it.
//!
//! Policy functions take a [`Witness`] and tell it what they looked at and what
//! they found. For a packet that is really there the witness is `()`, which the
//! compiler removes; for a packet that an operator asks about it takes notes. So
//! there is one policy, and an explanation cannot differ from the verdict.
//! [`Pipeline::explain`](crate::pipeline::Pipeline::explain) walks the stages.

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::action::Egress;
use crate::counters::DropReason;
use crate::flow::{Direction, State};
use crate::headers::Transport;
use crate::{PortId, Prefix, RouteTarget, Rule, Vni};

/// Whoever is told what a decision looked at.
pub trait Witness {
    /// One look, in the order in which they happen.
    fn saw(&mut self, seen: Seen);
}

/// Nobody asks.
impl Witness for () {
    #[inline(always)]
    fn saw(&mut self, _: Seen) {}
}

/// What a stage looked at, and what it found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// Whether the sender may use this source address.
    Source {
        /// The address.
        address: Ipv4Addr,
        /// The card that sent it, if one did.
        vtep: Option<Ipv4Addr>,
        /// It may.
        believed: bool,
    },
    /// The flow table, by the packet's own key.
    Flow {
        /// The connection: how far it has come, for how long it was idle.
        known: Option<(State, Duration)>,
        /// The packet begins it anew, so that policy decides again.
        reopened: bool,
    },
    /// The security groups of a port.
    Group {
        /// Which way the connection opens.
        direction: Direction,
        /// Rules in the union of its groups.
        rules: usize,
        /// The one that allows it; none: nothing does.
        matched: Option<Rule>,
    },
    /// The route table.
    Route {
        /// The longest prefix that holds the destination; none: no route does.
        matched: Option<Matched>,
    },
    /// The connection has a decision that still holds.
    Decided {
        /// It.
        egress: Egress,
    },
    /// Where an address of the VPC is.
    Mapping {
        /// The address.
        address: Ipv4Addr,
        /// The way to it; none: nobody has it.
        way: Option<Egress>,
    },
    /// An address was translated.
    Nat {
        /// What it was.
        before: Ipv4Addr,
        /// What it is now.
        after: Ipv4Addr,
        /// It is the source, not the destination.
        source: bool,
    },
}

/// A route that decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matched {
    /// Its destination.
    pub prefix: Prefix,
    /// Its target; none: local to the VPC.
    pub target: Option<RouteTarget>,
}

/// A packet that might come.
#[derive(Debug, Clone, Copy)]
pub struct Question {
    /// Where it enters the card.
    pub entry: Entry,
    /// From whom; `None`: the private address of the guest that sends it.
    pub source: Option<Ipv4Addr>,
    /// To whom.
    pub destination: Ipv4Addr,
    /// Protocol number.
    pub protocol: u8,
    /// Ports, flags, ICMP type and code.
    pub transport: Transport,
    /// Bytes of the IP packet.
    pub length: u16,
}

/// Where a packet enters a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// From the guest of a port.
    Guest(PortId),
    /// From another card, for a network.
    Vtep(Ipv4Addr, Vni),
    /// From the internet.
    Public,
}

/// One look of the walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// At which port; none before the packet belongs to one.
    pub port: Option<PortId>,
    /// What was seen.
    pub seen: Seen,
    /// The port that a mapping led to, on this card.
    pub to: Option<PortId>,
}

/// What becomes of the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It reaches the guest of a port.
    Delivered(PortId),
    /// It goes to another card.
    Tunnel {
        /// Which one.
        vtep: Ipv4Addr,
        /// In this network.
        vni: Vni,
    },
    /// It goes to the internet.
    Internet {
        /// From this address.
        source: Ipv4Addr,
        /// By this neighbour on the wire.
        hop: Ipv4Addr,
    },
    /// The card itself answers.
    Service(Service),
    /// It dies.
    Dropped(DropReason),
}

/// What the card answers itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// DHCP.
    Dhcp,
    /// The metadata service, over TCP.
    Metadata,
    /// A ping of the subnet's router.
    Router,
}

impl Service {
    /// One word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Service::Dhcp => "dhcp",
            Service::Metadata => "metadata",
            Service::Router => "router",
        }
    }
}

/// The whole walk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// In the order in which they happened.
    pub steps: Vec<Step>,
    /// How it ended.
    pub end: End,
}
