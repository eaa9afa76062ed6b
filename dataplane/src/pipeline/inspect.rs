//! What operators ask of the tables, between two bursts. Everything here takes the
//! pipeline by a shared reference: whoever asks changes nothing.

use std::net::Ipv4Addr;
use std::time::Duration;

use super::guest::{Errand, Judged, PublicWay, errand, too_long_for_public};
use super::{Hot, Pipeline};
use crate::action::{Egress, Origin};
use crate::counters::DropReason;
use crate::explain::{End, Entry, Explanation, Question, Seen, Step, Witness};
use crate::flow::{Direction, Flow, Key, Slot, State, UNDECIDED};
use crate::headers::{IPV4, Ipv4, Transport};
use crate::{Mac, PortId};

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

/// Hops that an explained packet has left: enough, as every sender's.
const TTL: u8 = 64;

/// Takes notes of a walk.
struct Notes<'a> {
    pipeline: &'a Pipeline,
    at: Option<Slot>,
    /// The connection that the packet would have opened by now.
    opened: Option<Key>,
    steps: Vec<Step>,
}

impl Notes<'_> {
    fn id(&self, slot: Slot) -> Option<PortId> {
        self.pipeline.port(slot).map(|state| state.hot.id)
    }
}

impl Witness for Notes<'_> {
    fn saw(&mut self, seen: Seen) {
        let to = match seen {
            Seen::Mapping { way: Some(Egress::Local { to, .. }), .. } | Seen::Decided { egress: Egress::Local { to, .. } } => self.id(to),
            _ => None,
        };
        self.steps.push(Step { port: self.at.and_then(|slot| self.id(slot)), seen, to });
    }
}

impl Pipeline {
    /// What would become of a whole packet, and why: the walk of a real one,
    /// through the same functions, with somebody who takes notes. It is not cut
    /// into fragments, its headers are sound, and no allowance is asked (packets a
    /// second to the card's services, connections of a port).
    #[must_use]
    pub fn explain(&self, now: Duration, question: &Question) -> Explanation {
        let mut notes = Notes { pipeline: self, at: None, opened: None, steps: Vec::new() };
        let end = self.walk(now, question, &mut notes).unwrap_or_else(End::Dropped);
        Explanation { steps: notes.steps, end }
    }

    fn walk(&self, now: Duration, question: &Question, notes: &mut Notes<'_>) -> Result<End, DropReason> {
        let mut ip = Ipv4 {
            header_len: IPV4,
            total_len: question.length.into(),
            id: 0,
            dont_fragment: true,
            more_fragments: false,
            fragment_offset: 0,
            ttl: TTL,
            protocol: question.protocol,
            source: question.source.unwrap_or(Ipv4Addr::UNSPECIFIED),
            destination: question.destination,
        };
        let transport = &question.transport;
        match question.entry {
            Entry::Guest(id) => {
                let slot = *self.by_id.get(&id).ok_or(DropReason::UnknownPort)?;
                notes.at = Some(slot);
                let hot = self.port(slot).ok_or(DropReason::UnknownPort)?.hot;
                ip.source = question.source.unwrap_or(hot.ipv4);
                self.walk_out(now, (slot, &hot), ip, transport, notes)
            }
            Entry::Vtep(vtep, vni) => {
                if vtep == self.settings.underlay.address {
                    return Err(DropReason::UnmappedVtep);
                }
                let slot = self.underlay_receiver((vtep, vni), (ip.source, ip.destination))?;
                self.walk_in(now, slot, Origin::Vtep(vtep), &ip, transport, notes)
            }
            Entry::Public => {
                self.settings.public.ok_or(DropReason::NoPublicSide)?;
                let slot = *self.locals.by_public.get(&ip.destination).ok_or(DropReason::NotForUs)?;
                self.walk_enter(now, slot, ip, transport, notes)
            }
        }
    }

    /// From the guest in `slot`.
    fn walk_out(
        &self,
        now: Duration,
        (slot, hot): (Slot, &Hot),
        mut ip: Ipv4,
        transport: &Transport,
        notes: &mut Notes<'_>,
    ) -> Result<End, DropReason> {
        if let Errand::Service(service) = errand(hot, false, &ip, || Ok(*transport), notes)? {
            return Ok(End::Service(service));
        }
        let key = Key::new(slot, Direction::Egress, &ip, transport);
        let judged = self.judge_egress(now, (slot, hot), (self.flows.hash(&key), &key), &ip, transport, notes)?;
        notes.opened = matches!(judged, Judged::Open(_)).then_some(key);
        let (Judged::Known(_, egress) | Judged::Open(egress)) = judged;
        match egress {
            Egress::Local { to, .. } => self.walk_in(now, to, Origin::Local, &ip, transport, notes),
            Egress::Remote { vtep, .. } => Ok(End::Tunnel { vtep, vni: hot.vni }),
            Egress::Public { address } => {
                if too_long_for_public(&ip) {
                    return Err(DropReason::TooLong);
                }
                notes.saw(Seen::Nat { before: ip.source, after: address, source: true });
                ip.source = address;
                match self.public_way(ip.destination)? {
                    PublicWay::Hairpin(to) => self.walk_enter(now, to, ip, transport, notes),
                    PublicWay::Wire { hop, .. } => Ok(End::Internet { source: address, hop }),
                }
            }
        }
    }

    /// By the public address of the port in `slot`.
    fn walk_enter(&self, now: Duration, slot: Slot, mut ip: Ipv4, transport: &Transport, notes: &mut Notes<'_>) -> Result<End, DropReason> {
        let private = self.port(slot).ok_or(DropReason::UnknownPort)?.hot.ipv4;
        notes.at = Some(slot);
        notes.saw(Seen::Nat { before: ip.destination, after: private, source: false });
        ip.destination = private;
        self.walk_in(now, slot, Origin::Public, &ip, transport, notes)
    }

    /// To the guest in `slot`.
    fn walk_in(
        &self,
        now: Duration,
        slot: Slot,
        origin: Origin,
        ip: &Ipv4,
        transport: &Transport,
        notes: &mut Notes<'_>,
    ) -> Result<End, DropReason> {
        notes.at = Some(slot);
        let hot = self.port(slot).ok_or(DropReason::UnknownPort)?.hot;
        let key = Key::new(slot, Direction::Ingress, ip, transport);
        if notes.opened == Some(key) {
            // A guest that speaks to its own public address meets the connection that it opened.
            notes.saw(Seen::Flow { known: Some((State::New, Duration::ZERO)), reopened: false });
            return self.source_mac(slot, ip, origin, Mac::BROADCAST, notes).map(|_| End::Delivered(hot.id));
        }
        // Whoever sent it has no influence on the verdict by its MAC.
        self.judge_ingress(now, (slot, &hot), &key, (ip, transport), (origin, Mac::BROADCAST), notes)?;
        Ok(End::Delivered(hot.id))
    }
}
