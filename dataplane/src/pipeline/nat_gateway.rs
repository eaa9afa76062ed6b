//! A NAT gateway between the VPC and the public wire: which packets it takes, what
//! it does to them, and where they go on. Ports and connections are
//! [`crate::nat_gateway`]'s.
//!
//! ```text
//! inside --> anti-spoof -> ACL in -> ACL out -> route -> translation --> public wire, or a public address of this card
//! inside <-- route <- ACL out <- ACL in <- translation <---------------- the same
//! ```
//!
//! The ACL is that of the gateway's subnet, which a packet enters and leaves. Every
//! packet is judged anew, so a change of the ACL or the route cuts at once.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use rate_limit::TokenBucket;

use super::{ERRORS_PER_S, Next, PUBLIC_MTU, Pipeline, ROUTER_MAC, Turn};
use crate::action::{Egress, Origin};
use crate::counters::{DropReason, NatTally};
use crate::flow::{Direction, Slot};
use crate::fragment::FragmentTable;
use crate::headers::{self, ETHERNET, IPV4, Ipv4, Transport, tcp};
use crate::icmp::{self, Error};
use crate::nat_gateway::{NatTable, Refusal, SWEEP_EVERY, Tuple};
use crate::packet::Packet;
use crate::policy::{GatewaySlot, NatGateway, Tables};
use crate::route::Target;
use crate::{NatGatewayId, RouteTarget, acl, anti_spoof, nat, vxlan};

/// A NAT gateway of this card.
#[derive(Debug)]
pub(super) struct Gateway {
    pub(super) gateway: Arc<NatGateway>,
    table: NatTable,
    /// The other end of datagrams in fragments.
    fragments: FragmentTable<(Ipv4Addr, u16)>,
    /// Resets and ICMP errors that it sends.
    answers: TokenBucket,
    sweep_at: Duration,
    tally: Arc<NatTally>,
}

/// All fragments of a gateway are under one name: its fragment table is its own.
const ITSELF: Slot = Slot(0);

/// What is to become of a packet from inside.
enum Verdict {
    Send {
        public: Ipv4Addr,
        port: u16,
    },
    /// It ends here, and its sender is told.
    Answer(DropReason, Reply),
}

#[derive(Clone, Copy)]
enum Reply {
    Error(Error),
    Reset,
}

impl Pipeline {
    /// Takes over the gateways of a configuration.
    pub(super) fn gateways_put(&mut self, now: Duration, tables: &Tables) {
        let wanted = |id: NatGatewayId| tables.nat_gateways.iter().any(|gateway| gateway.config.id == id);
        for place in &mut self.gateways {
            if let Some(id) = place.as_ref().map(|state| state.gateway.config.id).filter(|id| !wanted(*id)) {
                self.board.nat_gateway_remove(id);
                *place = None;
            }
        }
        for gateway in &tables.nat_gateways {
            let config = &gateway.config;
            if let Some(state) = self.gateways.iter_mut().flatten().find(|state| state.gateway.config.id == config.id) {
                if state.gateway.config.vni != config.vni {
                    // Equal addresses of another network are other machines.
                    state.table.clear();
                }
                if state.gateway.config.public != config.public {
                    state.table.set_public(&config.public);
                }
                state.gateway = Arc::clone(gateway);
                state.tally.set(&state.table.counters());
                continue;
            }
            let state = Gateway {
                gateway: Arc::clone(gateway),
                table: NatTable::new(&config.public, self.settings.seed ^ u64::from(config.id.0) << 32),
                fragments: FragmentTable::default(),
                answers: TokenBucket::new(ERRORS_PER_S, ERRORS_PER_S, now),
                sweep_at: now,
                tally: self.board.nat_gateway(config.id),
            };
            match self.gateways.iter_mut().find(|place| place.is_none()) {
                Some(vacant) => *vacant = Some(state),
                None => self.gateways.push(Some(state)),
            }
        }
    }

    /// When [`Pipeline::gateways_tick`] has something to do.
    pub(super) fn gateways_due(&self) -> Option<Duration> {
        self.gateways.iter().flatten().filter(|state| !state.table.is_empty()).map(|state| state.sweep_at).min()
    }

    pub(super) fn gateways_tick(&mut self, now: Duration) {
        for state in self.gateways.iter_mut().flatten().filter(|state| state.sweep_at <= now) {
            state.table.sweep(now);
            state.tally.set(&state.table.counters());
            state.sweep_at = now + SWEEP_EVERY;
        }
    }

    /// A packet from the VPC, on its way to the internet.
    pub(super) fn gateway_out(
        &mut self,
        turn: &mut Turn<'_>,
        to: GatewaySlot,
        origin: Origin,
        packet: &mut Packet,
    ) -> Result<Next, DropReason> {
        let state = self.gateway(to)?;
        let bytes = packet.as_slice().get(ETHERNET..).unwrap_or_default();
        let verdict = headers::ipv4(bytes).and_then(|ip| Ok((ip, state.outward(turn.now, &ip, bytes, origin)?)));
        let next = match verdict {
            Ok((ip, Verdict::Send { public, port })) => self.gateway_send(&ip, public, port, packet),
            Ok((ip, Verdict::Answer(reason, reply))) => {
                let state = self.gateway(to)?;
                let mut answer = turn.pool.get();
                let written = state.answers.take(turn.now, 1) && state.answer(&ip, reply, packet, &mut answer);
                // What ends here is counted here: its answer goes on in its place.
                std::mem::swap(packet, &mut answer);
                turn.pool.put(answer);
                if written {
                    state.table.dropped();
                    let next = self.gateway_inside(to, ip.source, packet);
                    self.count_drops(None, reason, 1);
                    next
                } else {
                    Err(reason)
                }
            }
            Err(reason) => Err(reason),
        };
        self.gateway_account(to, next)
    }

    /// A packet from the internet for a public address of a gateway.
    pub(super) fn gateway_in(&mut self, turn: &mut Turn<'_>, to: GatewaySlot, packet: &mut Packet) -> Result<Next, DropReason> {
        let next = self.gateway_receive(turn.now, to, packet);
        self.gateway_account(to, next)
    }

    fn gateway_receive(&mut self, now: Duration, to: GatewaySlot, packet: &mut Packet) -> Result<Next, DropReason> {
        let state = self.gateway(to)?;
        let bytes = packet.as_mut_slice().get_mut(ETHERNET..).unwrap_or_default();
        let ip = headers::ipv4(bytes)?;
        let (private, port) = state.inward(now, &ip, bytes)?;
        headers::decrement_ttl(bytes);
        nat::destination(bytes, &ip, private, port);
        self.gateway_inside(to, private, packet)
    }

    /// Translates a packet as decided, and says which way it goes.
    fn gateway_send(&mut self, ip: &Ipv4, public: Ipv4Addr, port: u16, packet: &mut Packet) -> Result<Next, DropReason> {
        let bytes = packet.as_mut_slice().get_mut(ETHERNET..).unwrap_or_default();
        headers::decrement_ttl(bytes);
        nat::source(bytes, ip, public, Some(port));
        self.public_out(ip.destination, public, packet)
    }

    /// Sends a packet to an address of the VPC, as the route table of the gateway's subnet has it.
    fn gateway_inside(&mut self, from: GatewaySlot, destination: Ipv4Addr, packet: &mut Packet) -> Result<Next, DropReason> {
        let card = self.settings.underlay.address;
        let site = &self.gateways.get(from.0 as usize).and_then(Option::as_ref).ok_or(DropReason::NoMapping)?.gateway.site;
        let way = match site.target(destination) {
            Some(Target::Local) => site.way(destination, &self.locals, card),
            Some(Target::Route(RouteTarget::NetworkInterface(port))) => site.way(port, &self.locals, card),
            _ => None,
        };
        match way.ok_or(DropReason::NoMapping)? {
            Egress::Local { to, .. } => {
                headers::set_macs(packet.as_mut_slice(), ROUTER_MAC, ROUTER_MAC);
                Ok(Next::Ingress(to, Origin::Local))
            }
            Egress::Remote { vtep, mac, vni, .. } => {
                headers::set_macs(packet.as_mut_slice(), mac, ROUTER_MAC);
                let entropy = entropy(destination);
                if vxlan::push_header(packet, vni) { Ok(Next::Underlay { vtep, entropy }) } else { Err(DropReason::TooLong) }
            }
            Egress::Public { .. } | Egress::Gateway { .. } => Err(DropReason::NoMapping),
        }
    }

    fn gateway(&mut self, slot: GatewaySlot) -> Result<&mut Gateway, DropReason> {
        self.gateways.get_mut(slot.0 as usize).and_then(Option::as_mut).ok_or(DropReason::UnknownDestination)
    }

    fn gateway_account(&mut self, slot: GatewaySlot, next: Result<Next, DropReason>) -> Result<Next, DropReason> {
        if let Ok(state) = self.gateway(slot) {
            if next.is_err() {
                state.table.dropped();
            }
            state.tally.set(&state.table.counters());
        }
        next
    }
}

impl Gateway {
    /// Decides on a packet from inside.
    fn outward(&mut self, now: Duration, ip: &Ipv4, bytes: &[u8], origin: Origin) -> Result<Verdict, DropReason> {
        let site = &self.gateway.site;
        if let Origin::Vtep(vtep) = origin {
            anti_spoof::from_vpc(site, ip.source, vtep)?;
        }
        if ip.is_fragment() && ip.protocol != headers::UDP_PROTOCOL {
            return Err(DropReason::NatFragment);
        }
        self.routed(ip.destination)?;
        if ip.ttl <= 1 {
            return Ok(Verdict::Answer(DropReason::TtlExpired, Reply::Error(Error::TimeExceeded)));
        }
        if ip.total_len > usize::from(PUBLIC_MTU) && ip.dont_fragment {
            let error = Error::FragmentationNeeded { mtu: PUBLIC_MTU };
            return Ok(Verdict::Answer(DropReason::TooLong, Reply::Error(error)));
        }
        if ip.fragment_offset != 0 {
            let known = self.fragments.find(ITSELF, Direction::Egress, ip).ok_or(DropReason::FragmentUnknown)?;
            return Ok(Verdict::Send { public: known.0, port: known.1 });
        }
        let payload = bytes.get(ip.header_len..).unwrap_or_default();
        let transport = headers::transport(ip, payload)?;
        self.judge(ip, &transport)?;
        if ip.protocol == headers::ICMP && icmp::is_error(transport.icmp_type) {
            // It quotes an answer: the end inside is where that went.
            let (quoted, ports) = quote(payload).ok_or(DropReason::NatUnknown)?;
            let inside = Tuple { protocol: quoted.protocol, local: (quoted.destination, ports.1), remote: (quoted.source, ports.0) };
            let known = self.table.outward_related(now, for_ping(inside, ports)).filter(|_| quoted.destination == ip.source);
            let (public, port) = known.ok_or(DropReason::NatUnknown)?;
            return Ok(Verdict::Send { public, port });
        }
        let inside = tuple(ip, &transport, icmp::ECHO, true).ok_or(DropReason::NatUnsupported)?;
        match self.table.outward(now, inside, transport.tcp_flags) {
            Ok((public, port)) => {
                if ip.more_fragments && !self.fragments.insert(now, ITSELF, Direction::Egress, ip, (public, port)) {
                    return Err(DropReason::FragmentTableFull);
                }
                Ok(Verdict::Send { public, port })
            }
            Err(Refusal::Forgotten) if transport.tcp_flags & tcp::RST != 0 => Err(DropReason::NatForgotten),
            Err(Refusal::Forgotten) => Ok(Verdict::Answer(DropReason::NatForgotten, Reply::Reset)),
            Err(Refusal::Ports | Refusal::Full) => Err(DropReason::NatExhausted),
        }
    }

    /// Decides on a packet from outside: the private end it is for. A later
    /// fragment has no port to translate.
    fn inward(&mut self, now: Duration, ip: &Ipv4, bytes: &[u8]) -> Result<(Ipv4Addr, Option<u16>), DropReason> {
        if ip.is_fragment() && ip.protocol != headers::UDP_PROTOCOL {
            return Err(DropReason::NatFragment);
        }
        if ip.ttl <= 1 {
            return Err(DropReason::TtlExpired);
        }
        if ip.fragment_offset != 0 {
            let known = self.fragments.find(ITSELF, Direction::Ingress, ip).ok_or(DropReason::FragmentUnknown)?;
            return Ok((known.0, None));
        }
        let payload = bytes.get(ip.header_len..).unwrap_or_default();
        let transport = headers::transport(ip, payload)?;
        let (private, port) = if ip.protocol == headers::ICMP && icmp::is_error(transport.icmp_type) {
            let (quoted, ports) = quote(payload).ok_or(DropReason::NatUnknown)?;
            let outside = Tuple { protocol: quoted.protocol, local: (quoted.source, ports.0), remote: (quoted.destination, ports.1) };
            let known = self.table.inward_related(now, for_ping(outside, ports)).filter(|_| quoted.source == ip.destination);
            // Any router on the way may complain, but none is in the VPC.
            if self.is_inside(ip.source) || anti_spoof::is_martian(ip.source) {
                return Err(DropReason::SpoofedAddress);
            }
            known.ok_or(DropReason::NatUnknown)?
        } else {
            let outside = tuple(ip, &transport, icmp::ECHO_REPLY, false).ok_or(DropReason::NatUnknown)?;
            self.table.inward(now, outside, transport.tcp_flags).ok_or(DropReason::NatUnknown)?
        };
        let translated = Ipv4 { destination: private, ..*ip };
        let to_port = |port| Transport { destination_port: port, ..transport };
        let transport = if ip.protocol == headers::ICMP { transport } else { to_port(port) };
        // Into the subnet to the gateway's own address, and out of it to the private one.
        self.judge_in(ip, &transport)?;
        self.judge_out(&translated, &transport)?;
        if ip.more_fragments && !self.fragments.insert(now, ITSELF, Direction::Ingress, ip, (private, port)) {
            return Err(DropReason::FragmentTableFull);
        }
        Ok((private, Some(port)))
    }

    /// Only what the route table leads to the internet may pass.
    fn routed(&self, destination: Ipv4Addr) -> Result<(), DropReason> {
        match self.gateway.site.target(destination) {
            Some(Target::Route(RouteTarget::InternetGateway)) if !anti_spoof::is_martian(destination) => Ok(()),
            Some(Target::Route(RouteTarget::Blackhole)) => Err(DropReason::Blackhole),
            _ => Err(DropReason::NoRoute),
        }
    }

    fn judge(&self, ip: &Ipv4, transport: &Transport) -> Result<(), DropReason> {
        self.judge_in(ip, transport).and_then(|()| self.judge_out(ip, transport))
    }

    fn judge_in(&self, ip: &Ipv4, transport: &Transport) -> Result<(), DropReason> {
        let config = &self.gateway.config;
        if acl::lets_in(config.acl.as_ref(), config.subnet, ip, transport) { Ok(()) } else { Err(DropReason::DeniedAclIngress) }
    }

    fn judge_out(&self, ip: &Ipv4, transport: &Transport) -> Result<(), DropReason> {
        let config = &self.gateway.config;
        if acl::lets_out(config.acl.as_ref(), config.subnet, ip, transport) { Ok(()) } else { Err(DropReason::DeniedAclEgress) }
    }

    fn is_inside(&self, address: Ipv4Addr) -> bool {
        let config = &self.gateway.config;
        config.vpc_prefixes.iter().chain([&config.subnet]).any(|prefix| prefix.contains(address))
    }

    /// Writes what the sender of `offending` is told. False when it may not be told.
    fn answer(&self, ip: &Ipv4, reply: Reply, offending: &Packet, packet: &mut Packet) -> bool {
        let bytes = offending.as_slice().get(ETHERNET..).unwrap_or_default();
        match reply {
            // The MACs are put on the way inside.
            Reply::Error(error) => icmp::error(packet, error, bytes, ip, (self.gateway.config.ipv4, ROUTER_MAC), ROUTER_MAC),
            Reply::Reset => reset(packet, bytes, ip),
        }
    }
}

/// A UDP source port by the receiver alone, so that fragments, and answers of the
/// gateway itself, stay in order behind what went before them.
fn entropy(destination: Ipv4Addr) -> u16 {
    let mixed = u64::from(u32::from(destination)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    0xc000 | u16::try_from(mixed >> 50).unwrap_or(0)
}

/// The connection of a packet; of ICMP only queries of one type are part of any.
fn tuple(ip: &Ipv4, transport: &Transport, query: u8, outward: bool) -> Option<Tuple> {
    let protocol = ip.protocol;
    let (source, destination) = match protocol {
        headers::TCP | headers::UDP_PROTOCOL => (transport.source_port, transport.destination_port),
        headers::ICMP if transport.icmp_type == query && outward => (transport.source_port, 0),
        headers::ICMP if transport.icmp_type == query => (0, transport.source_port),
        _ => return None,
    };
    let (source, destination) = ((ip.source, source), (ip.destination, destination));
    let (local, remote) = if outward { (source, destination) } else { (destination, source) };
    Some(Tuple { protocol, local, remote })
}

/// The packet that an ICMP error quotes, and its ports.
fn quote(icmp: &[u8]) -> Option<(Ipv4, (u16, u16))> {
    let bytes = icmp.get(8..)?;
    let quoted = headers::ipv4_quoted(bytes).ok().filter(|quoted| quoted.fragment_offset == 0)?;
    let transport = headers::transport_quoted(&quoted, bytes.get(quoted.header_len..)?).ok()?;
    Some((quoted, (transport.source_port, transport.destination_port)))
}

/// A quoted ping has its identifier for the port inside.
fn for_ping(tuple: Tuple, (identifier, _): (u16, u16)) -> Tuple {
    match tuple.protocol {
        headers::ICMP => Tuple { local: (tuple.local.0, identifier), remote: (tuple.remote.0, 0), ..tuple },
        _ => tuple,
    }
}

/// Writes the reset that answers a segment of no connection, RFC 9293 section
/// 3.10.7.1: in the name of the remote end, at the sequence number that the sender
/// waits for.
fn reset(packet: &mut Packet, segment: &[u8], ip: &Ipv4) -> bool {
    const TCP: usize = 20;
    let Some([s0, s1, d0, d1, q0, q1, q2, q3, a0, a1, a2, a3, offset, flags]) =
        segment.get(ip.header_len..ip.total_len).and_then(|bytes| headers::read(bytes, 0))
    else {
        return false;
    };
    packet.reset();
    if !packet.set_len(ETHERNET + IPV4 + TCP) {
        return false;
    }
    let (sequence, acknowledged, answer) = if flags & tcp::ACK != 0 {
        ([a0, a1, a2, a3], [0; 4], tcp::RST)
    } else {
        let data = ip.total_len.saturating_sub(ip.header_len + usize::from(offset >> 4) * 4);
        // SYN and FIN take a place in the sequence. A packet is far below 2^32 bytes.
        let length = u32::try_from(data).unwrap_or(0) + u32::from(flags & tcp::SYN != 0) + u32::from(flags & tcp::FIN != 0);
        ([0; 4], u32::from_be_bytes([q0, q1, q2, q3]).wrapping_add(length).to_be_bytes(), tcp::RST | tcp::ACK)
    };
    let bytes = packet.as_mut_slice();
    headers::write_ethernet(bytes, ROUTER_MAC, ROUTER_MAC, headers::TYPE_IPV4);
    let Some(bytes) = bytes.get_mut(ETHERNET..) else { return false };
    headers::write_ipv4(bytes, (ip.destination, ip.source), headers::TCP, (0, 0), TCP);
    let Some(header) = bytes.get_mut(IPV4..) else { return false };
    headers::write(header, 0, [d0, d1, s0, s1]);
    headers::write(header, 4, sequence);
    headers::write(header, 8, acknowledged);
    headers::write(header, 12, [0x50, answer, 0, 0, 0, 0, 0, 0]);
    let sum = headers::transport_checksum(ip.destination, ip.source, headers::TCP, header);
    headers::write(header, 16, sum.to_be_bytes());
    true
}
