//! The way to a guest: from another guest of the card, from another card, or from
//! the internet; always through the policy of the port.

use std::time::Duration;

use super::guest::{Judged, Subject};
use super::{Hot, Next, Pipeline, ROUTER_MAC, Turn};
use crate::action::Origin;
use crate::counters::DropReason;
use crate::explain::{Seen, Witness};
use crate::flow::{Direction, Flow, FlowId, Key, Slot};
use crate::headers::{self, ETHERNET, Ipv4, Transport};
use crate::packet::Packet;
use crate::policy::Port;
use crate::{Mac, anti_spoof, nat, policy};

impl Pipeline {
    pub(super) fn guest_out(&mut self, turn: &mut Turn<'_>, slot: Slot, origin: Origin, packet: &mut Packet) -> Result<Next, DropReason> {
        let hot = self.port(slot).ok_or(DropReason::UnknownPort)?.hot;
        let (ethernet, payload) = headers::ethernet(packet.as_slice())?;
        let ip = headers::ipv4(payload)?;
        let sender = ethernet.source;
        let subject = match self.classify(slot, Direction::Ingress, &ip, payload.get(ip.header_len..).unwrap_or_default()) {
            Ok(subject) => subject,
            // Who may not speak at all is counted as that, whatever he says.
            Err(reason) => return Err(self.source_mac(slot, &ip, origin, sender, &mut ()).err().unwrap_or(reason)),
        };
        let source_mac = match subject {
            Subject::Whole(key, transport) => {
                let (id, source_mac) =
                    match self.judge_ingress(turn.now, (slot, &hot), &key, (&ip, &transport), (origin, sender), &mut ())? {
                        Judged::Known(id, source_mac) => (id, self.keep_origin(&hot, id, origin, source_mac)),
                        Judged::Open(source_mac) => {
                            let mut flow = Flow::new(key, Direction::Ingress);
                            flow.ingress = (hot.generation, origin);
                            flow.source_mac = source_mac;
                            (self.flows.insert(turn.now, flow)?, source_mac)
                        }
                    };
                self.flows.observe(id, turn.now, Direction::Ingress, &transport);
                if ip.more_fragments && !self.fragments.insert(turn.now, slot, Direction::Ingress, &ip, key) {
                    return Err(DropReason::FragmentTableFull);
                }
                source_mac
            }
            Subject::Fragment(key) => {
                let id = self.flows.find(self.flows.hash(&key), &key).ok_or(DropReason::FragmentUnknown)?;
                let source_mac = self.origin_of(slot, &hot, id, &ip, (origin, sender), &mut ())?;
                self.keep_origin(&hot, id, origin, source_mac)
            }
            Subject::Related(_) => self.source_mac(slot, &ip, origin, sender, &mut ())?,
        };
        headers::set_macs(packet.as_mut_slice(), hot.mac, source_mac);
        Ok(Next::Deliver(slot))
    }

    /// A packet for the public address of the port in `slot` becomes one for its
    /// private address.
    pub(super) fn enter(&mut self, slot: Slot, packet: &mut Packet) -> Result<Next, DropReason> {
        let private = self.port(slot).ok_or(DropReason::UnknownPort)?.hot.ipv4;
        let bytes = packet.as_mut_slice().get_mut(ETHERNET..).unwrap_or_default();
        let ip = headers::ipv4(bytes)?;
        if ip.ttl <= 1 {
            return Err(DropReason::TtlExpired);
        }
        headers::decrement_ttl(bytes);
        nat::destination(bytes, &ip, private);
        Ok(Next::Ingress(slot, Origin::Public))
    }

    /// Decides on a packet to the guest, and changes nothing.
    pub(super) fn judge_ingress(
        &self,
        now: Duration,
        (slot, hot): (Slot, &Hot),
        key: &Key,
        (ip, transport): (&Ipv4, &Transport),
        (origin, sender): (Origin, Mac),
        witness: &mut impl Witness,
    ) -> Result<Judged<Mac>, DropReason> {
        match self.known(now, (self.flows.hash(key), key), Direction::Ingress, transport, witness) {
            Some(id) => Ok(Judged::Known(id, self.origin_of(slot, hot, id, ip, (origin, sender), witness)?)),
            None => {
                let source_mac = self.source_mac(slot, ip, origin, sender, witness)?;
                policy::ingress(&self.port(slot).ok_or(DropReason::UnknownPort)?.port, ip, transport, witness)?;
                Ok(Judged::Open(source_mac))
            }
        }
    }

    /// Checks that a packet of a known flow comes from where the flow's packets
    /// come from; that place is checked when it changed, or the port did.
    fn origin_of(
        &self,
        slot: Slot,
        hot: &Hot,
        id: FlowId,
        ip: &Ipv4,
        (origin, sender): (Origin, Mac),
        witness: &mut impl Witness,
    ) -> Result<Mac, DropReason> {
        match self.flows.get(id) {
            Some(flow) if flow.ingress == (hot.generation, origin) => Ok(flow.source_mac),
            _ => self.source_mac(slot, ip, origin, sender, witness),
        }
    }

    fn keep_origin(&mut self, hot: &Hot, id: FlowId, origin: Origin, source_mac: Mac) -> Mac {
        if let Some(flow) = self.flows.get_mut(id).filter(|flow| flow.ingress != (hot.generation, origin)) {
            flow.ingress = (hot.generation, origin);
            flow.source_mac = source_mac;
        }
        source_mac
    }

    /// Checks that a packet may come from `origin`, and says which source MAC the
    /// guest sees: the sender's within the subnet, else the router's.
    pub(super) fn source_mac(
        &self,
        slot: Slot,
        ip: &Ipv4,
        origin: Origin,
        sender: Mac,
        witness: &mut impl Witness,
    ) -> Result<Mac, DropReason> {
        let port: &Port = &self.port(slot).ok_or(DropReason::UnknownPort)?.port;
        let (vtep, checked) = match origin {
            // The sending side has checked the source and put the MAC.
            Origin::Local => return Ok(sender),
            Origin::Vtep(vtep) => {
                let in_subnet = port.config.subnet.contains(ip.source);
                let endpoint = anti_spoof::from_vtep(port, ip.source, vtep);
                (Some(vtep), endpoint.map(|endpoint| if in_subnet { endpoint.mac } else { ROUTER_MAC }))
            }
            Origin::Public => (None, anti_spoof::from_public(port, ip.source).map(|()| ROUTER_MAC)),
        };
        witness.saw(Seen::Source { address: ip.source, vtep, believed: checked.is_ok() });
        checked
    }
}
