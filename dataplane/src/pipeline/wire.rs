//! What arrives from the two wires: other cards and the internet.

use std::net::Ipv4Addr;

use super::{Next, Pipeline, Turn};
use crate::action::Origin;
use crate::counters::DropReason;
use crate::flow::Slot;
use crate::headers::{self, ETHERNET};
use crate::packet::Packet;
use crate::{Vni, arp, vxlan};

impl Pipeline {
    pub(super) fn underlay_in(&mut self, turn: &mut Turn<'_>, packet: &mut Packet) -> Result<Next, DropReason> {
        self.board.underlay.received(packet.len());
        let underlay = self.settings.underlay;
        let vtep = if underlay.encapsulated {
            let (ethernet, payload) = headers::ethernet(packet.as_slice())?;
            match ethernet.ethertype {
                headers::TYPE_ARP => return self.underlay_arp(turn, packet),
                headers::TYPE_IPV4 if ethernet.destination == underlay.mac => {}
                headers::TYPE_IPV4 => return Err(DropReason::NotForUs),
                _ => return Err(DropReason::UnsupportedEthertype),
            }
            let (vtep, range) = vxlan::outer(payload, &underlay)?;
            if !packet.pull_front(ETHERNET + range.start) || !packet.set_len(range.len()) {
                return Err(DropReason::Truncated);
            }
            vtep
        } else {
            packet.peer().ok_or(DropReason::NotVxlan)?
        };
        if vtep == underlay.address {
            // Our own guests are mapped to this address, and none of them is out there.
            return Err(DropReason::UnmappedVtep);
        }
        let (vni, inner) = vxlan::decap(packet.as_slice())?;
        let (ethernet, payload) = headers::ethernet(inner)?;
        if ethernet.ethertype != headers::TYPE_IPV4 {
            return Err(DropReason::UnsupportedEthertype);
        }
        let ip = headers::ipv4(payload)?;
        if !packet.pull_front(vxlan::VXLAN) || !packet.set_len(ETHERNET + ip.total_len) {
            return Err(DropReason::Truncated);
        }
        self.underlay_receiver((vtep, vni), (ip.source, ip.destination)).map(|slot| Next::Ingress(slot, Origin::Vtep(vtep)))
    }

    /// The port that a packet from another card is for.
    pub(super) fn underlay_receiver(
        &self,
        (vtep, vni): (Ipv4Addr, Vni),
        (source, destination): (Ipv4Addr, Ipv4Addr),
    ) -> Result<Slot, DropReason> {
        if let Some(slot) = self.locals.by_address.get(&(vni, destination)) {
            return Ok(*slot);
        }
        Err(match self.networks.get(&vni).map(|network| network.endpoint(source)) {
            None => DropReason::UnknownVni,
            Some(Some(endpoint)) if endpoint.vtep == vtep => DropReason::UnknownDestination,
            Some(_) => DropReason::UnmappedVtep,
        })
    }

    pub(super) fn public_in(&mut self, turn: &mut Turn<'_>, packet: &mut Packet) -> Result<Next, DropReason> {
        self.board.public.received(packet.len());
        let side = self.settings.public.ok_or(DropReason::NoPublicSide)?;
        let (ethernet, payload) = headers::ethernet(packet.as_slice())?;
        match ethernet.ethertype {
            headers::TYPE_ARP => return self.public_arp(turn, packet),
            headers::TYPE_IPV4 if ethernet.destination == side.mac => {}
            headers::TYPE_IPV4 => return Err(DropReason::NotForUs),
            _ => return Err(DropReason::UnsupportedEthertype),
        }
        let ip = headers::ipv4(payload)?;
        if !packet.set_len(ETHERNET + ip.total_len) {
            return Err(DropReason::Truncated);
        }
        match self.locals.by_public.get(&ip.destination) {
            Some(slot) => self.enter(*slot, packet),
            None => Err(DropReason::NotForUs),
        }
    }

    fn underlay_arp(&mut self, turn: &mut Turn<'_>, packet: &mut Packet) -> Result<Next, DropReason> {
        let message = arp::parse(packet.as_slice().get(ETHERNET..).unwrap_or_default())?;
        let underlay = self.settings.underlay;
        let asks_us = message.operation == arp::REQUEST && message.target.1 == underlay.address;
        self.underlay.learn(turn.now, &message, asks_us, &mut turn.out.underlay);
        if asks_us {
            let mut answer = turn.pool.get();
            let sender = (underlay.mac, underlay.address);
            let reply = arp::Message { operation: arp::REPLY, sender, target: message.sender };
            arp::frame(&mut answer, message.sender.0, &reply);
            turn.out.underlay.push(answer);
        }
        Ok(Next::Done)
    }

    fn public_arp(&mut self, turn: &mut Turn<'_>, packet: &mut Packet) -> Result<Next, DropReason> {
        let message = arp::parse(packet.as_slice().get(ETHERNET..).unwrap_or_default())?;
        let (Some(side), Some(neighbours)) = (self.settings.public, &mut self.public) else {
            return Err(DropReason::NoPublicSide);
        };
        let asked = message.target.1;
        let asks_us = message.operation == arp::REQUEST && self.locals.by_public.contains_key(&asked);
        neighbours.learn(turn.now, &message, asks_us, &mut turn.out.public);
        if asks_us {
            let mut answer = turn.pool.get();
            let reply = arp::Message { operation: arp::REPLY, sender: (side.mac, asked), target: message.sender };
            arp::frame(&mut answer, message.sender.0, &reply);
            turn.out.public.push(answer);
        }
        Ok(Next::Done)
    }
}
