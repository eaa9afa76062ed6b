//! What a guest sends: the card's own services first, then the flow of the packet.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;

use super::{Hot, METADATA, Next, PUBLIC_MTU, Pipeline, ROUTER_MAC, Turn};
use crate::action::{Egress, Origin};
use crate::counters::{DropReason, Frames};
use crate::flow::{Direction, FlowId, Key, Slot};
use crate::headers::{self, ETHERNET, Ethernet, Ipv4, Transport, UDP};
use crate::hop::NextHop;
use crate::icmp::Error;
use crate::packet::Packet;
use crate::{anti_spoof, arp, datagram, dhcp, icmp, nat, policy, resolver, vxlan};

/// What a packet belongs to.
pub(super) enum Subject {
    /// A flow that is its own.
    Whole(Key, Transport),
    /// A later fragment of a flow's packet.
    Fragment(Key),
    /// An ICMP error about a packet of a tracked flow.
    Related(Key, Transport),
}

/// What the packets of a port that are decided like this share.
fn hop_of(hot: &Hot, egress: Egress) -> NextHop {
    let source = match egress {
        Egress::Local { routed: false, .. } | Egress::Remote { routed: false, .. } => hot.mac,
        Egress::Local { routed: true, .. } | Egress::Remote { routed: true, .. } | Egress::Public { .. } | Egress::Gateway { .. } => {
            ROUTER_MAC
        }
    };
    NextHop { source, egress }
}

impl Pipeline {
    pub(super) fn guest_in(&mut self, turn: &mut Turn<'_>, slot: Slot, packet: &mut Packet) -> Result<Next, DropReason> {
        let state = self.port(slot).ok_or(DropReason::UnknownPort)?;
        let hot = state.hot;
        state.tally.received(Frames::one(packet.len()));
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
                let found = self.flows.find(hash, &key);
                if found.is_none() && self.is_flooded(turn.now, slot, &hot, Direction::Egress, ip.protocol) {
                    return Err(DropReason::ConntrackAllowance);
                }
                let known = found.filter(|id| self.flows.get(*id).is_some_and(|flow| !flow.reopens(Direction::Egress, &transport)));
                let (id, egress) = match known {
                    Some(id) => (Some(id), self.egress_of(slot, &hot, id, &ip, Some(&transport))?),
                    None => self.open_egress(turn, slot, &hot, key, &ip, &transport)?,
                };
                if let Some(id) = id {
                    self.flows.observe(id, turn.now, Direction::Egress, &transport, ip.total_len);
                }
                if ip.more_fragments && !self.fragments.insert(turn.now, slot, Direction::Egress, &ip, key) {
                    return Err(DropReason::FragmentTableFull);
                }
                (egress, key.entropy())
            }
            Subject::Fragment(key) => {
                let hash = self.flows.hash(&key);
                let id = self.flows.find(hash, &key).ok_or(DropReason::FragmentUnknown)?;
                (self.egress_of(slot, &hot, id, &ip, None)?, key.entropy())
            }
            Subject::Related(key, transport) => (self.outward(slot, &ip, &transport)?, key.entropy()),
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
            return Ok(Subject::Related(key, transport));
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

    /// The decision of a flow, made again when the port has changed since; not for
    /// a later fragment, which has no ports to be judged by.
    fn egress_of(&mut self, slot: Slot, hot: &Hot, id: FlowId, ip: &Ipv4, transport: Option<&Transport>) -> Result<Egress, DropReason> {
        if let Some(egress) = self.flows.egress(id, hot.generation) {
            return Ok(egress);
        }
        let transport = transport.ok_or(DropReason::FragmentUnknown)?;
        self.review(slot, id, Direction::Egress, ip, transport)?;
        let egress = self.outward(slot, ip, transport)?;
        self.flows.decide_egress(id, hot.generation, hop_of(hot, egress));
        Ok(egress)
    }

    fn outward(&self, slot: Slot, ip: &Ipv4, transport: &Transport) -> Result<Egress, DropReason> {
        let state = self.port(slot).ok_or(DropReason::UnknownPort)?;
        policy::outward(&state.port, slot, ip, transport, &self.locals, self.settings.underlay.address)
    }

    fn open_egress(
        &mut self,
        turn: &mut Turn<'_>,
        slot: Slot,
        hot: &Hot,
        key: Key,
        ip: &Ipv4,
        transport: &Transport,
    ) -> Result<(Option<FlowId>, Egress), DropReason> {
        let flow = self.open(slot, key, Direction::Egress, ip, transport)?;
        let egress = self.outward(slot, ip, transport)?;
        let id = self.remember(turn, flow)?;
        if let Some(id) = id {
            self.flows.decide_egress(id, hot.generation, hop_of(hot, egress));
        }
        Ok((id, egress))
    }

    /// Rewrites a packet as decided, and says which way it goes.
    fn forward(
        &mut self,
        turn: &mut Turn<'_>,
        slot: Slot,
        ip: &Ipv4,
        egress: Egress,
        entropy: u16,
        packet: &mut Packet,
    ) -> Result<Next, DropReason> {
        let hot = &{ self.port(slot).ok_or(DropReason::UnknownPort)?.hot };
        let source = hop_of(hot, egress).source;
        match egress {
            Egress::Local { to, routed } => {
                if routed {
                    self.hop(turn, slot, hot, ip, packet)?;
                }
                // The receiving side puts the destination MAC.
                headers::set_macs(packet.as_mut_slice(), hot.mac, source);
                Ok(Next::Ingress(to, Origin::Local))
            }
            Egress::Remote { vtep, mac, vni, routed } => {
                if routed {
                    self.hop(turn, slot, hot, ip, packet)?;
                }
                headers::set_macs(packet.as_mut_slice(), mac, source);
                if !vxlan::push_header(packet, vni) {
                    return Err(DropReason::TooLong);
                }
                Ok(Next::Underlay { vtep, entropy })
            }
            Egress::Public { address } => {
                if ip.total_len > usize::from(PUBLIC_MTU) && ip.dont_fragment {
                    self.error(turn, slot, hot, ip, packet, Error::FragmentationNeeded { mtu: PUBLIC_MTU });
                    return Err(DropReason::TooLong);
                }
                self.hop(turn, slot, hot, ip, packet)?;
                let bytes = packet.as_mut_slice().get_mut(ETHERNET..).unwrap_or_default();
                nat::source(bytes, ip, address, None);
                self.public_out(ip.destination, address, packet)
            }
            Egress::Gateway { to } => {
                self.hop(turn, slot, hot, ip, packet)?;
                Ok(Next::GatewayOut(to, Origin::Local))
            }
        }
    }

    /// Sends a packet whose source is translated, to the public side or, by a public
    /// address of this card, back in.
    pub(super) fn public_out(&self, destination: Ipv4Addr, sender: Ipv4Addr, packet: &mut Packet) -> Result<Next, DropReason> {
        if let Some(next) = self.public_enter(destination, packet) {
            return next;
        }
        let side = self.settings.public.ok_or(DropReason::NoPublicSide)?;
        headers::set_macs(packet.as_mut_slice(), ROUTER_MAC, side.mac);
        let on_link = crate::Prefix::new(side.gateway, side.prefix_length).contains(destination);
        Ok(Next::Public { hop: if on_link { destination } else { side.gateway }, sender })
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

    /// What is not forwarded: DHCP, metadata, resolver, the router; and the source check of
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
        let own = ip.source == hot.ipv4 || self.port(slot).is_some_and(|state| state.port.config.owns(ip.source));
        if ip.protocol == headers::UDP_PROTOCOL
            && (own || ip.source.is_unspecified())
            && (ip.destination.is_broadcast() || ip.destination == hot.router)
            && !ip.is_fragment()
        {
            let transport = headers::transport(ip, payload)?;
            if (transport.source_port, transport.destination_port) == (dhcp::CLIENT_PORT, dhcp::SERVER_PORT) {
                return self.guest_dhcp(turn, slot, ip, packet).map(Some);
            }
        }
        if !own && (hot.source_dest_check || anti_spoof::is_martian(ip.source)) {
            return Err(DropReason::SpoofedAddress);
        }
        if ip.total_len > usize::from(hot.mtu) {
            return Err(DropReason::TooLong);
        }
        if self.is_resolver(slot, ip.destination) {
            return self.guest_resolver(turn, slot, hot, ip, packet).map(Some);
        }
        if ip.destination.is_link_local() {
            if ip.destination != METADATA || ip.protocol != headers::TCP {
                return Err(DropReason::LinkLocal);
            }
            self.allow_service(turn, slot)?;
            return Ok(Some(Next::Punt(slot)));
        }
        if ip.destination == hot.router {
            let transport = headers::transport(ip, payload)?;
            if ip.protocol != headers::ICMP || transport.icmp_type != icmp::ECHO || ip.is_fragment() {
                return Err(DropReason::RouterUnserved);
            }
            self.allow_service(turn, slot)?;
            icmp::echo_reply(packet.as_mut_slice(), ip, hot.mac, ROUTER_MAC);
            return Ok(Some(Next::Deliver(slot)));
        }
        let subnet_broadcast = u32::from(hot.subnet.nth(0)) | !u32::from(hot.subnet.mask());
        if ethernet.destination.is_group() || ip.destination.octets()[0] >= 224 || u32::from(ip.destination) == subnet_broadcast {
            return Err(DropReason::Multicast);
        }
        if anti_spoof::is_martian(ip.destination) {
            return Err(DropReason::NoRoute);
        }
        Ok(None)
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

    fn is_resolver(&self, slot: Slot, address: Ipv4Addr) -> bool {
        let own = self.port(slot).and_then(|state| state.port.resolver);
        own.is_some_and(|own| own == address || address == resolver::ADDRESS)
    }

    fn guest_resolver(&mut self, turn: &mut Turn<'_>, slot: Slot, hot: &Hot, ip: &Ipv4, packet: &Packet) -> Result<Next, DropReason> {
        let payload = packet.as_slice().get(ETHERNET + ip.header_len..).unwrap_or_default();
        if ip.protocol != headers::UDP_PROTOCOL || ip.is_fragment() {
            return Err(DropReason::RouterUnserved);
        }
        let transport = headers::transport(ip, payload)?;
        if transport.destination_port != resolver::PORT {
            return Err(DropReason::RouterUnserved);
        }
        self.allow_service(turn, slot)?;
        let port = self.port(slot).map(|state| Arc::clone(&state.port)).ok_or(DropReason::UnknownPort)?;
        let query = payload.get(UDP..).unwrap_or_default();
        let names = port.site.network.resolver.as_ref();
        let answer = names.and_then(|names| names.answer(query, &*port)).ok_or(DropReason::ResolverIgnored)?;
        let ends = (SocketAddrV4::new(ip.destination, resolver::PORT), SocketAddrV4::new(ip.source, transport.source_port));
        let mut reply = turn.pool.get();
        if datagram::frame(&mut reply, (ROUTER_MAC, hot.mac), ends, &answer) {
            self.deliver(turn, slot, reply);
        } else {
            turn.pool.put(reply);
        }
        Ok(Next::Done)
    }

    /// Answers for every address of the subnet that somebody has, for the router,
    /// the resolver and the metadata service.
    fn guest_arp(&mut self, turn: &mut Turn<'_>, slot: Slot, hot: &Hot, packet: &mut Packet) -> Result<Next, DropReason> {
        let message = arp::parse(packet.as_slice().get(ETHERNET..).unwrap_or_default())?;
        let (mac, address) = message.sender;
        let owns = |address| self.port(slot).is_some_and(|state| state.port.config.owns(address));
        if mac != hot.mac || !(owns(address) || address.is_unspecified()) {
            return Err(DropReason::SpoofedArp);
        }
        let target = message.target.1;
        if message.operation == arp::REPLY && target == METADATA {
            // The service's own stack asked for the guest.
            self.allow_service(turn, slot)?;
            return Ok(Next::Punt(slot));
        }
        if message.operation != arp::REQUEST || owns(target) {
            return Err(DropReason::ArpIgnored);
        }
        let found = if target == hot.router || target == METADATA || self.is_resolver(slot, target) {
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
            None => self.port(slot)?.port.site.network.endpoint(address).map(|endpoint| endpoint.mac),
        }
    }

    fn allow_service(&mut self, turn: &Turn<'_>, slot: Slot) -> Result<(), DropReason> {
        let allowed = self.port_mut(slot).is_some_and(|state| state.services.take(turn.now, 1));
        if allowed { Ok(()) } else { Err(DropReason::LinkLocalAllowance) }
    }
}
