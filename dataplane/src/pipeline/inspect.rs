//! What operators ask of the tables, between two bursts. Everything here takes the
//! pipeline by a shared reference: whoever asks changes nothing.

use std::net::Ipv4Addr;
use std::time::Duration;

use super::Pipeline;
use crate::PortId;
use crate::action::{Egress, Origin};
use crate::flow::{Direction, Flow, State, UNDECIDED};

/// Entries of the flow table that one question looks at: some microseconds of work.
const PLACES: usize = 4096;

/// A piece of the flow table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowPage {
    /// Connections, in no order.
    pub flows: Vec<FlowSeen>,
    /// Where the next piece begins; `None` when this was the last. A connection
    /// that comes or goes between two pieces may be missed.
    pub next: Option<usize>,
}

/// A tracked connection, as operators see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowSeen {
    /// At which port.
    pub port: PortId,
    /// Protocol number.
    pub protocol: u8,
    /// The port's side: address, and port or ICMP identifier.
    pub local: (Ipv4Addr, u16),
    /// The other side.
    pub remote: (Ipv4Addr, u16),
    /// How far it has come.
    pub state: State,
    /// Which way its first packet went.
    pub opener: Direction,
    /// Time without a packet.
    pub idle: Duration,
    /// How much of that it may have.
    pub idle_limit: Duration,
    /// What happens to packets from the guest, if that was decided, and the port
    /// that a local decision leads to.
    pub egress: Option<(Egress, Option<PortId>)>,
    /// Where packets to the guest come from, if some did.
    pub ingress: Option<Origin>,
}

impl Pipeline {
    /// The tracked connections of one port or of all, a piece at a time: at most
    /// `limit`, beginning at `cursor`. The pieces of a whole table are many, and
    /// each is short.
    #[must_use]
    pub fn flows(&self, now: Duration, port: Option<PortId>, cursor: usize, limit: usize) -> FlowPage {
        let slot = match port.map(|id| self.by_id.get(&id)) {
            Some(None) => return FlowPage { flows: Vec::new(), next: None },
            Some(Some(slot)) => Some(*slot),
            None => None,
        };
        let mut flows = Vec::new();
        let next = self.flows.visit(cursor, PLACES, slot, |flow| {
            flows.extend(self.flow_seen(now, flow));
            flows.len() < limit
        });
        FlowPage { flows, next }
    }

    fn flow_seen(&self, now: Duration, flow: &Flow) -> Option<FlowSeen> {
        let key = flow.key();
        let (egress, ingress) = (flow.egress, flow.ingress);
        let to = match egress.1 {
            Egress::Local { to, .. } => self.port(to).map(|state| state.hot.id),
            _ => None,
        };
        Some(FlowSeen {
            port: self.port(key.slot())?.hot.id,
            protocol: key.protocol(),
            local: key.local(),
            remote: key.remote(),
            state: flow.state(),
            opener: flow.opener(),
            idle: flow.idle(now),
            idle_limit: flow.idle_limit(),
            egress: (egress.0 != UNDECIDED).then_some((egress.1, to)),
            ingress: (ingress.0 != UNDECIDED).then_some(ingress.1),
        })
    }
}
