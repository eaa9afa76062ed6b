//! The way to a guest: from another guest of the card, from another card, or from
//! the internet; always through the policy of the port.

use std::net::Ipv4Addr;

use super::guest::Subject;
use super::{Hot, Next, Pipeline, ROUTER_MAC, Turn};
use crate::action::Origin;
use crate::counters::DropReason;
use crate::flow::{Direction, FlowId, Key, Slot};
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
            Err(reason) => return Err(self.source_mac(slot, &ip, origin, sender).err().unwrap_or(reason)),
        };
        let source_mac = match subject {
            Subject::Whole(key, transport) => {
                let found = self.flows.find(self.flows.hash(&key), &key);
                if found.is_none() && self.is_flooded(turn.now, slot, &hot, Direction::Ingress, ip.protocol) {
                    return Err(DropReason::ConntrackAllowance);
                }
                let known = found.filter(|id| self.flows.get(*id).is_some_and(|flow| !flow.reopens(Direction::Ingress, &transport)));
                let (id, source_mac) = match known {
                    Some(id) => (Some(id), self.origin_check(slot, &hot, id, (&ip, Some(&transport)), (origin, sender))?),
                    None => self.open_ingress(turn, slot, &hot, key, (&ip, &transport), (origin, sender))?,
                };
                if let Some(id) = id {
                    self.flows.observe(id, turn.now, Direction::Ingress, &transport, ip.total_len);
                }
                if ip.more_fragments && !self.fragments.insert(turn.now, slot, Direction::Ingress, &ip, key) {
                    return Err(DropReason::FragmentTableFull);
                }
                source_mac
            }
            Subject::Fragment(key) => {
                let id = self.flows.find(self.flows.hash(&key), &key).ok_or(DropReason::FragmentUnknown)?;
                self.origin_check(slot, &hot, id, (&ip, None), (origin, sender))?
            }
            Subject::Related(_, transport) => self.inward(slot, (&ip, &transport), (origin, sender))?,
        };
        headers::set_macs(packet.as_mut_slice(), hot.mac, source_mac);
        Ok(Next::Deliver(slot))
    }

    /// Takes a packet to a public address of this card; `None` if it is none.
    pub(super) fn public_enter(&self, destination: Ipv4Addr, packet: &mut Packet) -> Option<Result<Next, DropReason>> {
        if let Some((slot, private)) = self.locals.by_public.get(&destination) {
            return Some(self.enter(*slot, *private, packet));
        }
        let gateway = self.locals.gateways_by_public.get(&destination)?;
        Some(Ok(Next::GatewayIn(*gateway)))
    }

    /// A packet for a public address of the port in `slot` becomes one for the
    /// private address that this stands for.
    fn enter(&self, slot: Slot, private: Ipv4Addr, packet: &mut Packet) -> Result<Next, DropReason> {
        let bytes = packet.as_mut_slice().get_mut(ETHERNET..).unwrap_or_default();
        let ip = headers::ipv4(bytes)?;
        if ip.ttl <= 1 {
            return Err(DropReason::TtlExpired);
        }
        headers::decrement_ttl(bytes);
        nat::destination(bytes, &ip, private, None);
        Ok(Next::Ingress(slot, Origin::Public))
    }

    /// Checks that a packet of a known flow comes from where the flow's packets
    /// come from; that place is checked when it changed, or the port did. A later
    /// fragment comes from where its first one came from, or not at all.
    fn origin_check(
        &mut self,
        slot: Slot,
        hot: &Hot,
        id: FlowId,
        (ip, transport): (&Ipv4, Option<&Transport>),
        (origin, sender): (Origin, Mac),
    ) -> Result<Mac, DropReason> {
        match self.flows.get(id).and_then(|flow| flow.ingress(hot.generation)) {
            Some((known, source_mac)) if known == origin => Ok(source_mac),
            _ => {
                let Some(transport) = transport else {
                    return Err(self.source_mac(slot, ip, origin, sender).err().unwrap_or(DropReason::FragmentUnknown));
                };
                let source_mac = self.inward(slot, (ip, transport), (origin, sender))?;
                self.review(slot, id, Direction::Ingress, ip, transport)?;
                if let Some(flow) = self.flows.get_mut(id) {
                    flow.decide_ingress(hot.generation, origin, source_mac);
                }
                Ok(source_mac)
            }
        }
    }

    fn open_ingress(
        &mut self,
        turn: &mut Turn<'_>,
        slot: Slot,
        hot: &Hot,
        key: Key,
        (ip, transport): (&Ipv4, &Transport),
        (origin, sender): (Origin, Mac),
    ) -> Result<(Option<FlowId>, Mac), DropReason> {
        let source_mac = self.inward(slot, (ip, transport), (origin, sender))?;
        let mut flow = self.open(slot, key, Direction::Ingress, ip, transport)?;
        flow.decide_ingress(hot.generation, origin, source_mac);
        Ok((self.remember(turn, flow)?, source_mac))
    }

    /// What is decided again when the port has changed: may the packet come from
    /// there, and to here. Says which source MAC the guest sees.
    fn inward(&self, slot: Slot, (ip, transport): (&Ipv4, &Transport), (origin, sender): (Origin, Mac)) -> Result<Mac, DropReason> {
        let source_mac = self.source_mac(slot, ip, origin, sender)?;
        let state = self.port(slot).ok_or(DropReason::UnknownPort)?;
        policy::inward(&state.port, ip, transport).map(|()| source_mac)
    }

    /// Checks that a packet may come from `origin`, and says which source MAC the
    /// guest sees: the sender's within the subnet, else the router's.
    fn source_mac(&self, slot: Slot, ip: &Ipv4, origin: Origin, sender: Mac) -> Result<Mac, DropReason> {
        let port: &Port = &self.port(slot).ok_or(DropReason::UnknownPort)?.port;
        match origin {
            // The sending side has checked the source and put the MAC.
            Origin::Local => Ok(sender),
            Origin::Vtep(vtep) => {
                let endpoint = anti_spoof::from_vtep(&port.site, ip.source, vtep)?;
                let neighbour = endpoint.filter(|_| port.config.subnet.contains(ip.source));
                Ok(neighbour.map_or(ROUTER_MAC, |endpoint| endpoint.mac))
            }
            Origin::Public => anti_spoof::from_public(port, ip.source).map(|()| ROUTER_MAC),
        }
    }
}
