//! What a guest sends: the card's own services first, then the flow of the packet.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use super::{Hot, METADATA, Next, PUBLIC_MTU, Pipeline, ROUTER_MAC, Turn};
use crate::action::{Egress, Origin};
use crate::counters::DropReason;
use crate::explain::{Seen, Service, Witness};
use crate::flow::{Direction, Flow, FlowId, Key, Slot};
use crate::headers::{self, ETHERNET, Ethernet, Ipv4, Transport, UDP};
use crate::icmp::Error;
use crate::packet::Packet;
use crate::{anti_spoof, arp, dhcp, icmp, nat, policy, vxlan};

/// What a packet belongs to.
pub(super) enum Subject {
    /// A flow that is its own.
    Whole(Key, Transport),
    /// A later fragment of a flow's packet.
    Fragment(Key),
    /// An ICMP error about a packet of a tracked flow.
    Related(Key),
}

/// What was decided for a packet, before anything is changed for it.
pub(super) enum Judged<D> {
    /// It goes on with a flow.
    Known(FlowId, D),
    /// It opens one.
    Open(D),
}

/// What a guest's packet is for.
pub(super) enum Errand {
    /// To be forwarded.
    Forward,
    /// The card answers.
    Service(Service),
}

/// Where a packet for a public address goes.
pub(super) enum PublicWay {
    /// To a port of this card, which has the address.
    Hairpin(Slot),
    /// To this neighbour on the public wire, where the card has this MAC.
    Wire { hop: Ipv4Addr, mac: crate::Mac },
}

impl Pipeline {
    pub(super) fn guest_in(&mut self, turn: &mut Turn<'_>, slot: Slot, packet: &mut Packet) -> Result<Next, DropReason> {
        let state = self.port(slot).ok_or(DropReason::UnknownPort)?;
        let hot = state.hot;
        state.tally.received(packet.len());
        let (ethernet, payload) = headers::ethernet(packet.as_slice())?;
        if ethernet.source != hot.mac {
            return Err(DropReason::SpoofedMac);
        }
        match ethernet.ethertype {
            headers::TYPE_IPV4 => {}
            headers::TYPE_ARP => return self.guest_arp(turn, slot, &hot, packet),
            _ => return Err(DropReason::UnsupportedEthertype),
        }
        let ip = headers::ipv4(payload)?;
        // Short frames are padded to 60 bytes; padding is not part of the packet.
        if !packet.set_len(ETHERNET + ip.total_len) {
            return Err(DropReason::Truncated);
        }
        if let Some(next) = self.guest_services(turn, slot, &hot, &ethernet, &ip, packet)? {
            return Ok(next);
        }
        let payload = packet.as_slice().get(ETHERNET + ip.header_len..).unwrap_or_default();
        let subject = self.classify(slot, Direction::Egress, &ip, payload)?;
        let (egress, entropy) = match subject {
            Subject::Whole(key, transport) => {
                let hash = self.flows.hash(&key);
                let (id, egress) = match self.judge_egress(turn.now, (slot, &hot), (hash, &key), &ip, &transport, &mut ())? {
                    Judged::Known(id, egress) => (id, self.keep_egress(&hot, id, egress)),
                    Judged::Open(egress) => {
                        let mut flow = Flow::new(key, Direction::Egress);
                        flow.egress = (hot.generation, egress);
                        (self.flows.insert(turn.now, flow)?, egress)
                    }
                };
                self.flows.observe(id, turn.now, Direction::Egress, &transport);
                if ip.more_fragments && !self.fragments.insert(turn.now, slot, Direction::Egress, &ip, key) {
                    return Err(DropReason::FragmentTableFull);
                }
                (egress, hash)
            }
            Subject::Fragment(key) => {
                let hash = self.flows.hash(&key);
                let id = self.flows.find(hash, &key).ok_or(DropReason::FragmentUnknown)?;
                let egress = self.egress_of(slot, &hot, id, &ip, &mut ())?;
                (self.keep_egress(&hot, id, egress), hash)
            }
            Subject::Related(key) => (self.next_hop(slot, ip.destination, &mut ())?, self.flows.hash(&key)),
        };
        self.forward(turn, slot, &ip, egress, entropy, packet)
    }

    /// Finds out what a packet belongs to, from its transport header or its past.
    pub(super) fn classify(&self, slot: Slot, direction: Direction, ip: &Ipv4, payload: &[u8]) -> Result<Subject, DropReason> {
        if ip.fragment_offset != 0 {
            // A fragment within the first 24 bytes could rewrite the header that was judged. RFC 1858.
            if ip.protocol == headers::TCP && ip.fragment_offset < 3 {
                return Err(DropReason::FragmentTiny);
            }
            return self.fragments.find(slot, direction, ip).map(Subject::Fragment).ok_or(DropReason::FragmentUnknown);
        }
        let transport = headers::transport(ip, payload)?;
        if ip.protocol == headers::ICMP
            && icmp::is_error(transport.icmp_type)
            && let Some(key) = self.quoted_flow(slot, direction, ip, payload)
        {
            return Ok(Subject::Related(key));
        }
        Ok(Subject::Whole(Key::new(slot, direction, ip, &transport), transport))
    }

    /// The tracked flow that an ICMP error is about: it quotes a packet that went
    /// the other way, between the same two ends as far as the guest is one.
    fn quoted_flow(&self, slot: Slot, direction: Direction, ip: &Ipv4, payload: &[u8]) -> Option<Key> {
        let quote = payload.get(8..)?;
        let quoted = headers::ipv4_quoted(quote).ok()?;
        let transport = headers::transport_quoted(&quoted, quote.get(quoted.header_len..)?).ok()?;
        let (way, same_ends) = match direction {
            Direction::Egress => (Direction::Ingress, quoted.destination == ip.source && quoted.source == ip.destination),
            // Any router on the way may complain, but only to the sender.
            Direction::Ingress => (Direction::Egress, quoted.source == ip.destination),
        };
        let key = Key::new(slot, way, &quoted, &transport);
        (same_ends && self.flows.find(self.flows.hash(&key), &key).is_some()).then_some(key)
    }

    /// Decides on a packet from the guest, and changes nothing.
    pub(super) fn judge_egress(
        &self,
        now: Duration,
        (slot, hot): (Slot, &Hot),
        (hash, key): (u64, &Key),
        ip: &Ipv4,
        transport: &Transport,
        witness: &mut impl Witness,
    ) -> Result<Judged<Egress>, DropReason> {
        match self.known(now, (hash, key), Direction::Egress, transport, witness) {
            Some(id) => Ok(Judged::Known(id, self.egress_of(slot, hot, id, ip, witness)?)),
            None => {
                let port = &self.port(slot).ok_or(DropReason::UnknownPort)?.port;
                let place = (&self.locals, self.settings.underlay.address);
                Ok(Judged::Open(policy::egress(port, slot, ip, transport, place, witness)?))
            }
        }
    }

    /// The flow that a packet goes on with.
    pub(super) fn known(
        &self,
        now: Duration,
        (hash, key): (u64, &Key),
        direction: Direction,
        transport: &Transport,
        witness: &mut impl Witness,
    ) -> Option<FlowId> {
        let id = self.flows.find(hash, key);
        let flow = id.and_then(|id| self.flows.get(id));
        let reopened = flow.is_some_and(|flow| flow.reopens(direction, transport));
        witness.saw(Seen::Flow { known: flow.map(|flow| (flow.state(), flow.idle(now))), reopened });
        id.filter(|_| flow.is_some() && !reopened)
    }

    /// The decision of a flow, made again when the port has changed since.
    fn egress_of(&self, slot: Slot, hot: &Hot, id: FlowId, ip: &Ipv4, witness: &mut impl Witness) -> Result<Egress, DropReason> {
        match self.flows.get(id) {
            Some(flow) if flow.egress.0 == hot.generation => {
                witness.saw(Seen::Decided { egress: flow.egress.1 });
                Ok(flow.egress.1)
            }
            _ => self.next_hop(slot, ip.destination, witness),
        }
    }

    fn keep_egress(&mut self, hot: &Hot, id: FlowId, egress: Egress) -> Egress {
        if let Some(flow) = self.flows.get_mut(id).filter(|flow| flow.egress.0 != hot.generation) {
            flow.egress = (hot.generation, egress);
        }
        egress
    }

    fn next_hop(&self, slot: Slot, destination: Ipv4Addr, witness: &mut impl Witness) -> Result<Egress, DropReason> {
        let state = self.port(slot).ok_or(DropReason::UnknownPort)?;
        policy::next_hop(&state.port, slot, destination, (&self.locals, self.settings.underlay.address), witness)
    }

    /// Rewrites a packet as decided, and says which way it goes.
    fn forward(
        &mut self,
        turn: &mut Turn<'_>,
        slot: Slot,
        ip: &Ipv4,
        egress: Egress,
        entropy: u64,
        packet: &mut Packet,
    ) -> Result<Next, DropReason> {
        let hot = &{ self.port(slot).ok_or(DropReason::UnknownPort)?.hot };
        let source_mac = |routed| if routed { ROUTER_MAC } else { hot.mac };
        match egress {
            Egress::Local { to, routed } => {
                if routed {
                    self.hop(turn, slot, hot, ip, packet)?;
                }
                // The receiving side puts the destination MAC.
                headers::set_macs(packet.as_mut_slice(), hot.mac, source_mac(routed));
                Ok(Next::Ingress(to, Origin::Local))
            }
            Egress::Remote { vtep, mac, routed } => {
                if routed {
                    self.hop(turn, slot, hot, ip, packet)?;
                }
                headers::set_macs(packet.as_mut_slice(), mac, source_mac(routed));
                if !vxlan::push_header(packet, hot.vni) {
                    return Err(DropReason::TooLong);
                }
                Ok(Next::Underlay { vtep, entropy })
            }
            Egress::Public { address } => {
                if too_long_for_public(ip) {
                    self.error(turn, slot, hot, ip, packet, Error::FragmentationNeeded { mtu: PUBLIC_MTU });
                    return Err(DropReason::TooLong);
                }
                self.hop(turn, slot, hot, ip, packet)?;
                let bytes = packet.as_mut_slice().get_mut(ETHERNET..).unwrap_or_default();
                nat::source(bytes, ip, address);
                match self.public_way(ip.destination)? {
                    PublicWay::Hairpin(to) => self.enter(to, packet),
                    PublicWay::Wire { hop, mac } => {
                        headers::set_macs(packet.as_mut_slice(), ROUTER_MAC, mac);
                        Ok(Next::Public { hop, sender: address })
                    }
                }
            }
        }
    }

    /// Which way a packet for a public address goes.
    pub(super) fn public_way(&self, destination: Ipv4Addr) -> Result<PublicWay, DropReason> {
        if let Some(to) = self.locals.by_public.get(&destination) {
            return Ok(PublicWay::Hairpin(*to));
        }
        let side = self.settings.public.ok_or(DropReason::NoPublicSide)?;
        let on_link = crate::Prefix::new(side.gateway, side.prefix_length).contains(destination);
        Ok(PublicWay::Wire { hop: if on_link { destination } else { side.gateway }, mac: side.mac })
    }

    /// Counts one hop, or tells the guest that it was the last.
    fn hop(&mut self, turn: &mut Turn<'_>, slot: Slot, hot: &Hot, ip: &Ipv4, packet: &mut Packet) -> Result<(), DropReason> {
        if ip.ttl <= 1 {
            self.error(turn, slot, hot, ip, packet, Error::TimeExceeded);
            return Err(DropReason::TtlExpired);
        }
        headers::decrement_ttl(packet.as_mut_slice().get_mut(ETHERNET..).unwrap_or_default());
        Ok(())
    }

    /// Sends an ICMP error about `offending` to the guest that sent it, within the
    /// port's allowance of errors.
    fn error(&mut self, turn: &mut Turn<'_>, slot: Slot, hot: &Hot, ip: &Ipv4, offending: &Packet, error: Error) {
        let now = turn.now;
        if !self.port_mut(slot).is_some_and(|state| state.errors.take(now, 1)) {
            return;
        }
        let mut reply = turn.pool.get();
        let bytes = offending.as_slice().get(ETHERNET..).unwrap_or_default();
        if icmp::error(&mut reply, error, bytes, ip, (hot.router, ROUTER_MAC), hot.mac) {
            self.deliver(turn, slot, reply);
        } else {
            turn.pool.put(reply);
        }
    }

    /// What is not forwarded: DHCP, metadata, the router; and the source check of
    /// all that is. `None` means that the packet is to be forwarded.
    fn guest_services(
        &mut self,
        turn: &mut Turn<'_>,
        slot: Slot,
        hot: &Hot,
        ethernet: &Ethernet,
        ip: &Ipv4,
        packet: &mut Packet,
    ) -> Result<Option<Next>, DropReason> {
        let payload = packet.as_slice().get(ETHERNET + ip.header_len..).unwrap_or_default();
        match errand(hot, ethernet.destination.is_group(), ip, || headers::transport(ip, payload), &mut ())? {
            Errand::Forward => Ok(None),
            Errand::Service(Service::Dhcp) => self.guest_dhcp(turn, slot, ip, packet).map(Some),
            Errand::Service(Service::Metadata) => {
                self.allow_service(turn, slot)?;
                Ok(Some(Next::Punt(slot)))
            }
            Errand::Service(Service::Router) => {
                self.allow_service(turn, slot)?;
                icmp::echo_reply(packet.as_mut_slice(), ip, hot.mac, ROUTER_MAC);
                Ok(Some(Next::Deliver(slot)))
            }
        }
    }

    fn guest_dhcp(&mut self, turn: &mut Turn<'_>, slot: Slot, ip: &Ipv4, packet: &Packet) -> Result<Next, DropReason> {
        self.allow_service(turn, slot)?;
        let port = self.port(slot).map(|state| Arc::clone(&state.port)).ok_or(DropReason::UnknownPort)?;
        let request = packet.as_slice().get(ETHERNET + ip.header_len + UDP..).unwrap_or_default();
        let mut reply = turn.pool.get();
        match dhcp::answer(&port, ROUTER_MAC, request, &mut reply) {
            Ok(()) => {
                self.deliver(turn, slot, reply);
                Ok(Next::Done)
            }
            Err(reason) => {
                turn.pool.put(reply);
                Err(reason)
            }
        }
    }

    /// Answers for every address of the subnet that somebody has, for the router
    /// and for the metadata service.
    fn guest_arp(&mut self, turn: &mut Turn<'_>, slot: Slot, hot: &Hot, packet: &mut Packet) -> Result<Next, DropReason> {
        let message = arp::parse(packet.as_slice().get(ETHERNET..).unwrap_or_default())?;
        let (mac, address) = message.sender;
        if mac != hot.mac || (address != hot.ipv4 && !address.is_unspecified()) {
            return Err(DropReason::SpoofedArp);
        }
        let target = message.target.1;
        if message.operation == arp::REPLY && target == METADATA {
            // The service's own stack asked for the guest.
            self.allow_service(turn, slot)?;
            return Ok(Next::Punt(slot));
        }
        if message.operation != arp::REQUEST || target == hot.ipv4 {
            return Err(DropReason::ArpIgnored);
        }
        let found = if target == hot.router || target == METADATA {
            Some(ROUTER_MAC)
        } else if hot.subnet.contains(target) {
            self.mac_of(slot, hot, target)
        } else {
            None
        };
        let found = found.ok_or(DropReason::ArpIgnored)?;
        self.allow_service(turn, slot)?;
        let reply = arp::Message { operation: arp::REPLY, sender: (found, target), target: message.sender };
        arp::frame(packet, hot.mac, &reply);
        Ok(Next::Deliver(slot))
    }

    fn mac_of(&self, slot: Slot, hot: &Hot, address: Ipv4Addr) -> Option<crate::Mac> {
        match self.locals.by_address.get(&(hot.vni, address)) {
            Some(local) => self.port(*local).map(|state| state.hot.mac),
            None => self.port(slot)?.port.network.endpoint(address).map(|endpoint| endpoint.mac),
        }
    }

    fn allow_service(&mut self, turn: &Turn<'_>, slot: Slot) -> Result<(), DropReason> {
        let allowed = self.port_mut(slot).is_some_and(|state| state.services.take(turn.now, 1));
        if allowed { Ok(()) } else { Err(DropReason::LinkLocalAllowance) }
    }
}

/// Whether a packet would have to be cut for the internet and forbids it.
pub(super) fn too_long_for_public(ip: &Ipv4) -> bool {
    ip.total_len > usize::from(PUBLIC_MTU) && ip.dont_fragment
}

/// What a guest's packet is for, once its source address is believed; `transport`
/// reads its transport header.
pub(super) fn errand(
    hot: &Hot,
    to_group: bool,
    ip: &Ipv4,
    transport: impl Fn() -> Result<Transport, DropReason>,
    witness: &mut impl Witness,
) -> Result<Errand, DropReason> {
    let own = ip.source == hot.ipv4;
    if ip.protocol == headers::UDP_PROTOCOL
        && (own || ip.source.is_unspecified())
        && (ip.destination.is_broadcast() || ip.destination == hot.router)
        && !ip.is_fragment()
    {
        let transport = transport()?;
        if (transport.source_port, transport.destination_port) == (dhcp::CLIENT_PORT, dhcp::SERVER_PORT) {
            return Ok(Errand::Service(Service::Dhcp));
        }
    }
    let believed = own || !(hot.source_dest_check || anti_spoof::is_martian(ip.source));
    witness.saw(Seen::Source { address: ip.source, vtep: None, believed });
    if !believed {
        return Err(DropReason::SpoofedAddress);
    }
    if ip.total_len > usize::from(hot.mtu) {
        return Err(DropReason::TooLong);
    }
    if ip.destination.is_link_local() {
        let served = ip.destination == METADATA && ip.protocol == headers::TCP;
        return if served { Ok(Errand::Service(Service::Metadata)) } else { Err(DropReason::LinkLocal) };
    }
    if ip.destination == hot.router {
        let transport = transport()?;
        let served = ip.protocol == headers::ICMP && transport.icmp_type == icmp::ECHO && !ip.is_fragment();
        return if served { Ok(Errand::Service(Service::Router)) } else { Err(DropReason::RouterUnserved) };
    }
    let subnet_broadcast = u32::from(hot.subnet.nth(0)) | !u32::from(hot.subnet.mask());
    if to_group || ip.destination.octets()[0] >= 224 || u32::from(ip.destination) == subnet_broadcast {
        return Err(DropReason::Multicast);
    }
    if anti_spoof::is_martian(ip.destination) {
        return Err(DropReason::NoRoute);
    }
    Ok(Errand::Forward)
}
