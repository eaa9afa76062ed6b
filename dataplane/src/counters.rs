//! Counters of the packet path. One writer, the worker, adds with a plain load
//! and store; any thread reads. Every packet that does not reach somebody is
//! counted under one [`DropReason`], for the card and for its port if it has one.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::nat_gateway::NatGatewayCounters;
use crate::{NatGatewayId, PortId};

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// Why a packet ended here.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl DropReason {
            /// Every reason, in the order of the enum.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$variant,)+];

            /// The name under which metrics show it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(DropReason::$variant => $name,)+ }
            }
        }
    };
}

drop_reasons! {
    /// A header reaches beyond the frame.
    Truncated = "truncated",
    /// A header contradicts itself or the standard.
    BadHeader = "bad_header",
    /// The IPv4 header checksum is wrong.
    BadChecksum = "bad_checksum",
    /// Neither ARP nor IPv4.
    UnsupportedEthertype = "unsupported_ethertype",
    /// Multicast and broadcast have no meaning in a VPC.
    Multicast = "multicast",
    /// The guest sent from a MAC that is not its own.
    SpoofedMac = "spoofed_mac",
    /// The source address does not belong to the sender.
    SpoofedAddress = "spoofed_address",
    /// An ARP message names a sender that is not the port.
    SpoofedArp = "spoofed_arp",
    /// An ARP message that asks nothing of the card.
    ArpIgnored = "arp_ignored",
    /// A DHCP message that has no answer.
    DhcpIgnored = "dhcp_ignored",
    /// A message to the resolver that has no answer.
    ResolverIgnored = "resolver_ignored",
    /// A link-local address, or a protocol there, that the card does not serve.
    LinkLocal = "link_local",
    /// More than 1,024 packets a second to the card's own services.
    LinkLocalAllowance = "linklocal_allowance_exceeded",
    /// To the router or the resolver, and nothing that they serve.
    RouterUnserved = "router_unserved",
    /// On a wire, and neither to this card nor to all.
    NotForUs = "not_for_us",
    /// On the underlay, and not VXLAN.
    NotVxlan = "not_vxlan",
    /// VXLAN without the I flag.
    NoVni = "no_vni",
    /// VXLAN for a network that this card knows nothing of.
    UnknownVni = "unknown_vni",
    /// VXLAN from a card that the inner source address is not mapped to.
    UnmappedVtep = "unmapped_vtep",
    /// To an address that no port here has.
    UnknownDestination = "unknown_destination",
    /// No egress rule of the sender allows it.
    DeniedEgress = "denied_egress",
    /// No ingress rule of the receiver allows it.
    DeniedIngress = "denied_ingress",
    /// The network ACL of the sender's subnet denies it.
    DeniedAclEgress = "denied_acl_egress",
    /// The network ACL of the receiver's subnet denies it.
    DeniedAclIngress = "denied_acl_ingress",
    /// To an address that is not the receiver's, who checks that.
    NotOwnDestination = "not_own_destination",
    /// No route leads there.
    NoRoute = "no_route",
    /// The route's target is gone.
    Blackhole = "blackhole",
    /// Inside the VPC, and nobody has the address.
    NoMapping = "no_mapping",
    /// To the internet from a port without a public address.
    NoPublicAddress = "no_public_address",
    /// This card has no public side.
    NoPublicSide = "no_public_side",
    /// To an address of a NAT gateway, and of no connection of it.
    NatUnknown = "nat_unknown",
    /// TCP of a connection that the NAT gateway has forgotten; answered with a reset.
    NatForgotten = "nat_forgotten",
    /// The NAT gateway has no port left for that destination, or no room.
    NatExhausted = "nat_exhausted",
    /// Through a NAT gateway, and neither TCP nor UDP nor a ping.
    NatUnsupported = "nat_unsupported",
    /// Through a NAT gateway, and a fragment of TCP or ICMP.
    NatFragment = "nat_fragment",
    /// TTL ran out.
    TtlExpired = "ttl_expired",
    /// Longer than the link behind it takes, and not to be fragmented.
    TooLong = "too_long",
    /// A fragment whose first one did not pass here.
    FragmentUnknown = "fragment_unknown",
    /// A first fragment that hides part of its transport header.
    FragmentTiny = "fragment_tiny",
    /// Too many datagrams in fragments at once.
    FragmentTableFull = "fragment_table_full",
    /// No room to track one more connection.
    ConntrackAllowance = "conntrack_allowance_exceeded",
    /// More bits to an instance than its type allows.
    BandwidthIn = "bw_in_allowance_exceeded",
    /// More bits from an instance than its type allows.
    BandwidthOut = "bw_out_allowance_exceeded",
    /// More packets to and from an instance than its type allows.
    PacketRate = "pps_allowance_exceeded",
    /// Nobody answers ARP for the next hop.
    NeighbourUnresolved = "neighbour_unresolved",
    /// Too many packets wait for ARP.
    NeighbourQueueFull = "neighbour_queue_full",
    /// The device had no room.
    DeviceFull = "device_full",
    /// The port has no device.
    NoDevice = "no_device",
    /// From a device whose port is not configured.
    UnknownPort = "unknown_port",
    /// The card's services lag behind.
    PuntOverflow = "punt_overflow",
    /// The worker lags behind the card's services.
    InjectOverflow = "inject_overflow",
}

const REASONS: usize = DropReason::ALL.len();

/// Packets and bytes of one device; rx is what the card received from it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Frames received.
    pub rx_packets: u64,
    /// Bytes of them.
    pub rx_bytes: u64,
    /// Frames sent.
    pub tx_packets: u64,
    /// Bytes of them.
    pub tx_bytes: u64,
}

/// Drops by reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drops([u64; REASONS]);

impl Drops {
    /// Drops for one reason.
    #[must_use]
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0.get(reason as usize).copied().unwrap_or(0)
    }

    /// All reasons with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().copied().zip(self.0.iter().copied())
    }

    /// Drops for any reason.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

/// What one port has seen since it was configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortCounters {
    /// Traffic with its guest.
    pub traffic: Traffic,
    /// What was dropped on its account.
    pub drops: Drops,
    /// Connections that its instance may still have tracked, if that is limited.
    pub connections_left: Option<u32>,
}

/// A reading of all counters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters {
    /// Traffic with other cards.
    pub underlay: Traffic,
    /// Traffic with the internet.
    pub public: Traffic,
    /// All drops, those of ports included.
    pub drops: Drops,
    /// Connections tracked now.
    pub flows: u64,
    /// Each configured port.
    pub ports: BTreeMap<PortId, PortCounters>,
    /// Each configured NAT gateway.
    pub nat_gateways: BTreeMap<NatGatewayId, NatGatewayCounters>,
}

/// The live counters of one device.
#[derive(Debug)]
pub(crate) struct Tally {
    rx: [AtomicU64; 2],
    tx: [AtomicU64; 2],
    drops: [AtomicU64; REASONS],
    connections_left: AtomicU64,
}

/// No limit: no count of connections has 64 bits.
const UNLIMITED: u64 = u64::MAX;

/// Frames to be counted together.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Frames {
    pub(crate) packets: u64,
    bytes: u64,
}

impl Frames {
    /// A single one.
    pub(crate) fn one(bytes: usize) -> Self {
        Self { packets: 1, bytes: bytes as u64 }
    }

    /// One more.
    #[inline]
    pub(crate) fn add(&mut self, bytes: usize) {
        self.packets += 1;
        self.bytes += bytes as u64;
    }
}

impl Tally {
    pub(crate) fn set_connections_left(&self, left: Option<u32>) {
        self.connections_left.store(left.map_or(UNLIMITED, u64::from), Ordering::Relaxed);
    }

    fn connections_left(&self) -> Option<u32> {
        u32::try_from(read(&self.connections_left)).ok()
    }

    pub(crate) fn received(&self, frames: Frames) {
        add_frames(&self.rx, frames);
    }

    pub(crate) fn sent(&self, frames: Frames) {
        add_frames(&self.tx, frames);
    }

    pub(crate) fn dropped(&self, reason: DropReason, count: u64) {
        if let Some(cell) = self.drops.get(reason as usize) {
            add(cell, count);
        }
    }

    pub(crate) fn traffic(&self) -> Traffic {
        let [rx_packets, rx_bytes] = self.rx.each_ref().map(read);
        let [tx_packets, tx_bytes] = self.tx.each_ref().map(read);
        Traffic { rx_packets, rx_bytes, tx_packets, tx_bytes }
    }

    fn port(&self) -> PortCounters {
        PortCounters { traffic: self.traffic(), drops: self.drops(), connections_left: self.connections_left() }
    }

    pub(crate) fn drops(&self) -> Drops {
        Drops(self.drops.each_ref().map(read))
    }
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            rx: Default::default(),
            tx: Default::default(),
            drops: std::array::from_fn(|_| AtomicU64::new(0)),
            connections_left: AtomicU64::new(UNLIMITED),
        }
    }
}

/// The live counters of a NAT gateway, as its table last said.
#[derive(Debug, Default)]
pub(crate) struct NatTally([AtomicU64; 6]);

impl NatTally {
    pub(crate) fn set(&self, counters: &NatGatewayCounters) {
        let NatGatewayCounters { active, attempts, established, port_errors, idle_timeouts, drops } = *counters;
        let values = [active, attempts, established, port_errors, idle_timeouts, drops];
        self.0.iter().zip(values).for_each(|(cell, value)| cell.store(value, Ordering::Relaxed));
    }

    fn read(&self) -> NatGatewayCounters {
        let [active, attempts, established, port_errors, idle_timeouts, drops] = self.0.each_ref().map(read);
        NatGatewayCounters { active, attempts, established, port_errors, idle_timeouts, drops }
    }
}

/// The live counters of a card. The lock is taken when ports come and go and by
/// readers, never for a packet.
#[derive(Debug, Default)]
pub(crate) struct Board {
    pub(crate) underlay: Tally,
    pub(crate) public: Tally,
    pub(crate) card: Tally,
    pub(crate) flows: AtomicU64,
    /// The one count that other threads than the worker add to.
    pub(crate) inject_overflow: AtomicU64,
    ports: Mutex<BTreeMap<PortId, Arc<Tally>>>,
    nat_gateways: Mutex<BTreeMap<NatGatewayId, Arc<NatTally>>>,
}

impl Board {
    /// The counters of a port, made at the first call.
    pub(crate) fn port(&self, id: PortId) -> Arc<Tally> {
        Arc::clone(self.ports.lock().unwrap_or_else(PoisonError::into_inner).entry(id).or_default())
    }

    pub(crate) fn port_remove(&self, id: PortId) {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// The counters of a NAT gateway, made at the first call.
    pub(crate) fn nat_gateway(&self, id: NatGatewayId) -> Arc<NatTally> {
        Arc::clone(self.nat_gateways.lock().unwrap_or_else(PoisonError::into_inner).entry(id).or_default())
    }

    pub(crate) fn nat_gateway_remove(&self, id: NatGatewayId) {
        self.nat_gateways.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    pub(crate) fn read(&self) -> Counters {
        let mut drops = self.card.drops();
        if let Some(cell) = drops.0.get_mut(DropReason::InjectOverflow as usize) {
            *cell = read(&self.inject_overflow);
        }
        let ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        let nat_gateways = self.nat_gateways.lock().unwrap_or_else(PoisonError::into_inner);
        Counters {
            underlay: self.underlay.traffic(),
            public: self.public.traffic(),
            drops,
            flows: read(&self.flows),
            ports: ports.iter().map(|(id, tally)| (*id, tally.port())).collect(),
            nat_gateways: nat_gateways.iter().map(|(id, tally)| (*id, tally.read())).collect(),
        }
    }
}

fn add_frames([packets, bytes]: &[AtomicU64; 2], frames: Frames) {
    add(packets, frames.packets);
    add(bytes, frames.bytes);
}

fn add(cell: &AtomicU64, count: u64) {
    // Only the worker writes, so load and store lose nothing and need no lock prefix.
    cell.store(cell.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
}

fn read(cell: &AtomicU64) -> u64 {
    cell.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_holds_every_reason_under_its_own_name() {
        let board = Board::default();
        for (count, reason) in (1..).zip(DropReason::ALL) {
            board.card.dropped(*reason, count);
        }
        let drops = board.card.drops();
        assert_eq!(drops.get(DropReason::Truncated), 1);
        assert_eq!(drops.iter().map(|(_, count)| count).collect::<Vec<_>>(), (1..=REASONS as u64).collect::<Vec<_>>());
        let names: std::collections::BTreeSet<_> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), REASONS);
    }
}
