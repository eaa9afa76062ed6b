//! What the security groups say of a flow: when it is opened, and of one that is
//! not tracked again when its port changed.

use std::time::Duration;

use super::{Hot, Pipeline, Turn};
use crate::counters::DropReason;
use crate::flow::{Direction, Flow, FlowId, Key, Slot};
use crate::headers::{Ipv4, Transport};
use crate::policy::{self, Tracking};

impl Pipeline {
    /// Whether a packet of no known flow ends here unheard: its port is flooded with new
    /// ones, and this one would be tracked. It may be that the rules, had they been
    /// asked, would have refused it for their own reason.
    pub(super) fn is_flooded(&self, now: Duration, slot: Slot, hot: &Hot, opener: Direction, protocol: u8) -> bool {
        self.flows.refuses(slot, now) && hot.tracked.covers(opener, protocol)
    }

    /// The flow that a packet opens.
    pub(super) fn open(&self, slot: Slot, key: Key, direction: Direction, ip: &Ipv4, transport: &Transport) -> Result<Flow, DropReason> {
        let port = &self.port(slot).ok_or(DropReason::UnknownPort)?.port;
        let tracking = policy::tracking(port, direction, ip, transport);
        if tracking == Tracking::Denied {
            return Err(denied(direction));
        }
        let mut flow = Flow::new(key, direction);
        flow.set_untracked(tracking == Tracking::Untracked);
        Ok(flow)
    }

    /// Stores a flow. One that is not tracked passes also where there is no room for it.
    pub(super) fn remember(&mut self, turn: &Turn<'_>, flow: Flow) -> Result<Option<FlowId>, DropReason> {
        let untracked = flow.is_untracked();
        if !untracked && !self.may_track(flow.slot()) {
            return Err(DropReason::ConntrackAllowance);
        }
        match self.flows.insert(turn.now, flow) {
            Ok(id) => Ok(Some(id)),
            Err(_) if untracked => Ok(None),
            Err(reason) => Err(reason),
        }
    }

    /// Asks again for a packet of a flow that is not tracked. Where the rules track
    /// it now it is tracked from here on, but only while they would let it be opened.
    pub(super) fn review(
        &mut self,
        slot: Slot,
        id: FlowId,
        direction: Direction,
        ip: &Ipv4,
        transport: &Transport,
    ) -> Result<(), DropReason> {
        let Some(opener) = self.flows.get(id).filter(|flow| flow.is_untracked()).map(Flow::opener) else { return Ok(()) };
        let port = &self.port(slot).ok_or(DropReason::UnknownPort)?.port;
        let own = policy::tracking(port, direction, ip, transport);
        if own == Tracking::Denied {
            return Err(denied(direction));
        }
        let opened = if opener == direction { own } else { policy::tracking(port, opener, &turned(ip), &turned_ports(transport)) };
        if opened == Tracking::Tracked {
            self.flows.track(id);
        }
        Ok(())
    }
}

fn denied(direction: Direction) -> DropReason {
    match direction {
        Direction::Egress => DropReason::DeniedEgress,
        Direction::Ingress => DropReason::DeniedIngress,
    }
}

/// The packet that this one answers.
fn turned(ip: &Ipv4) -> Ipv4 {
    Ipv4 { source: ip.destination, destination: ip.source, ..*ip }
}

fn turned_ports(transport: &Transport) -> Transport {
    Transport { source_port: transport.destination_port, destination_port: transport.source_port, ..*transport }
}
