//! What the card tells the packet path: addresses of its own ([`Settings`], once)
//! and the desired state of every port and network ([`Snapshot`], whole, each
//! time that something changed).

use std::collections::HashMap;
use std::fmt;
use std::net::Ipv4Addr;

/// A port of this card: one elastic network interface of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId(pub u32);

/// VXLAN network identifier, 24 bits: one per VPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vni(pub u32);

/// A NAT gateway of this card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NatGatewayId(pub u32);

/// The allowance of an instance, numbered by the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AllowanceId(pub u32);

/// A security group, numbered by the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u32);

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// All stations.
    pub const BROADCAST: Mac = Mac([0xff; 6]);

    /// Whether the group bit is set: multicast or broadcast.
    #[must_use]
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An IPv4 prefix; bits of the address beyond the length do not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// Any address of the prefix.
    pub address: Ipv4Addr,
    /// 0..=32; more counts as 32.
    pub length: u8,
}

impl Prefix {
    /// The prefix of `length` bits that holds `address`.
    #[must_use]
    pub const fn new(address: Ipv4Addr, length: u8) -> Self {
        Self { address, length }
    }

    /// Whether `address` lies in the prefix.
    #[must_use]
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        (u32::from(address) ^ u32::from(self.address)) & self.bits() == 0
    }

    /// The netmask: 255.255.255.0 for a length of 24.
    #[must_use]
    pub fn mask(&self) -> Ipv4Addr {
        self.bits().into()
    }

    /// The address at `offset` from the first of the prefix.
    #[must_use]
    pub fn nth(&self, offset: u32) -> Ipv4Addr {
        (u32::from(self.address) & self.bits()).wrapping_add(offset).into()
    }

    fn bits(&self) -> u32 {
        u32::MAX.checked_shl(32 - u32::from(self.length.min(32))).unwrap_or(0)
    }
}

/// What the card is on its two wires; fixed for the life of a data plane.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The wire between cards.
    pub underlay: Underlay,
    /// The wire to the internet, on cards that have one.
    pub public: Option<PublicSide>,
    /// Connections that the card tracks at most; [`crate::flow::FLOWS_MAX`] unless
    /// there is a reason. Each costs 70 bytes once it was used.
    pub flows_max: usize,
    /// Secret of the flow hash; random at each start of the card, so that no
    /// sender can aim at one bucket of the table.
    pub seed: u64,
}

/// This card on the wire between cards.
#[derive(Debug, Clone, Copy)]
pub struct Underlay {
    /// Its VTEP address.
    pub address: Ipv4Addr,
    /// Length of the prefix that the other cards share.
    pub prefix_length: u8,
    /// Its Ethernet address there.
    pub mac: Mac,
    /// True: frames carry outer Ethernet, IP and UDP headers (devices `packet`
    /// and `dpdk`). False: they begin with the VXLAN header and name the other
    /// card in [`crate::packet::Packet::peer`] (device `udp`).
    pub encapsulated: bool,
}

/// This card on the public wire. It has no address of its own there: it answers
/// for the public addresses of its ports.
#[derive(Debug, Clone, Copy)]
pub struct PublicSide {
    /// Its Ethernet address there.
    pub mac: Mac,
    /// The router to the internet.
    pub gateway: Ipv4Addr,
    /// Length of the prefix that is on the wire itself.
    pub prefix_length: u8,
}

/// The whole configuration. Applying it replaces the one before; ports that did
/// not change keep their flows.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The ports of this card.
    pub ports: Vec<PortConfig>,
    /// The networks of those ports, and those that they are peered with.
    pub networks: Vec<NetworkConfig>,
    /// The NAT gateways of this card.
    pub nat_gateways: Vec<NatGatewayConfig>,
}

/// One port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortConfig {
    /// Its number on this card.
    pub id: PortId,
    /// Its VPC.
    pub vni: Vni,
    /// The only source MAC it may send from.
    pub mac: Mac,
    /// Its private address.
    pub ipv4: Ipv4Addr,
    /// Further private addresses.
    pub secondary: Vec<Address>,
    /// Its subnet; the first address is the network's, the second the router's.
    pub subnet: Prefix,
    /// What the implicit local route covers.
    pub vpc_prefixes: Vec<Prefix>,
    /// Public address, mapped 1:1 to the private one.
    pub public: Option<Ipv4Addr>,
    /// False lets the guest send from, and receive for, addresses that are not its own.
    pub source_dest_check: bool,
    /// Largest IP packet, offered by DHCP and enforced on what the guest sends.
    pub mtu: u16,
    /// What may open a connection to the guest: the union of its groups.
    pub ingress: Vec<Rule>,
    /// What the guest may open a connection to.
    pub egress: Vec<Rule>,
    /// The network ACL of its subnet; `None` lets everything pass.
    pub acl: Option<Acl>,
    /// How long idle connections are remembered.
    pub tracking: ConnectionTracking,
    /// What its instance may send and receive; `None`: all that the card can.
    pub allowance: Option<AllowanceConfig>,
    /// The route table without the local routes; the longest prefix wins.
    pub routes: Vec<Route>,
    /// What DHCP tells the guest.
    pub dhcp: Dhcp,
    /// The generation that this configuration is of; a new one makes the port's
    /// flows look up route and next hop again.
    pub generation: u64,
}

/// A private address, and the public one that is mapped 1:1 to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// What the guest knows.
    pub private: Ipv4Addr,
    /// What the internet knows.
    pub public: Option<Ipv4Addr>,
}

/// How long a connection without a packet is remembered, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionTracking {
    /// TCP, once established.
    pub tcp_established_s: u32,
    /// UDP, after more than one request and answer.
    pub udp_stream_s: u32,
    /// UDP before that.
    pub udp_s: u32,
}

impl Default for ConnectionTracking {
    /// What EC2 has when nobody chose, on its sixth generation of cards.
    fn default() -> Self {
        Self { tcp_established_s: 350, udp_stream_s: 180, udp_s: 30 }
    }
}

/// The allowance of an instance. Ports that name the same one share it; if they
/// differ in its limits, those of one of them count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllowanceConfig {
    /// Which one.
    pub id: AllowanceId,
    /// How much.
    pub limits: Limits,
}

/// What the type of an instance allows; what is 0 is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Each way, for ever.
    pub baseline_bits_per_s: u64,
    /// Each way, while credits last.
    pub burst_bits_per_s: u64,
    /// What may be spent above the baseline, each way.
    pub credit_bits: u64,
    /// Both ways together.
    pub packets_per_s: u64,
    /// Tracked at once.
    pub connections: u32,
}

/// A network ACL: what may cross the border of a subnet, each way. Rules are in
/// order, the first that matches decides, and what none matches does not pass.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Acl {
    /// Into the subnet.
    pub ingress: Vec<AclRule>,
    /// Out of it.
    pub egress: Vec<AclRule>,
}

/// One rule of a network ACL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AclRule {
    /// Whether what it matches passes.
    pub allow: bool,
    /// Which protocol.
    pub protocol: Protocol,
    /// TCP and UDP: destination ports, first and last. `None`: any.
    pub ports: Option<(u16, u16)>,
    /// ICMP: type and code, each `None` for any.
    pub icmp: (Option<u8>, Option<u8>),
    /// The addresses beyond the border.
    pub remote: Prefix,
}

/// One allow rule of a security group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Which protocol.
    pub protocol: Protocol,
    /// TCP and UDP: destination ports, first and last. `None`: any.
    pub ports: Option<(u16, u16)>,
    /// ICMP: type and code, each `None` for any.
    pub icmp: (Option<u8>, Option<u8>),
    /// Who is at the other end.
    pub remote: Remote,
}

/// Protocol of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// All protocols; ports and ICMP types do not matter then.
    Any,
    /// The IANA number.
    Number(u8),
}

/// The other end that a rule names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remote {
    /// Any address of the prefix.
    Prefix(Prefix),
    /// The private address of any member, as the network lists them.
    Group(GroupId),
}

/// One route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Where to.
    pub destination: Prefix,
    /// Through what.
    pub target: RouteTarget,
}

/// What a route leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteTarget {
    /// The public side, by 1:1 address translation.
    InternetGateway,
    /// The NAT gateway of the VPC with this private address.
    NatGateway(Ipv4Addr),
    /// The port of the VPC with this private address, which forwards for others.
    NetworkInterface(Ipv4Addr),
    /// The peered VPC with this VNI.
    Peer(Vni),
    /// Nowhere: the target of the route is gone.
    Blackhole,
}

/// What DHCP tells a guest beside its addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dhcp {
    /// Option 12, omitted when empty.
    pub hostname: String,
    /// Option 15, omitted when empty.
    pub domain: String,
    /// Option 6, omitted when empty.
    pub dns: Vec<Ipv4Addr>,
    /// Option 42, omitted when empty.
    pub ntp: Vec<Ipv4Addr>,
}

/// A VPC as this card needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Its VNI.
    pub vni: Vni,
    /// Where every address of it is.
    pub mappings: Vec<Mapping>,
    /// The members of the groups that its rules name, those in peered VPCs included.
    pub groups: HashMap<GroupId, Vec<Ipv4Addr>>,
    /// The VPCs that it is peered with, whose networks are in the snapshot too.
    pub peers: Vec<Vni>,
    /// Its name server, if it has one.
    pub resolver: Option<ResolverConfig>,
}

/// The name server of a VPC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolverConfig {
    /// Under which the private addresses have names: `ec2.internal`.
    pub domain: String,
    /// Under which the public addresses have names; `None` where they have none.
    pub public_domain: Option<String>,
}

/// A NAT gateway: it opens connections to the internet for ports of its VPC, from
/// public addresses of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NatGatewayConfig {
    /// Its number on this card.
    pub id: NatGatewayId,
    /// Its VPC.
    pub vni: Vni,
    /// Its MAC there.
    pub mac: Mac,
    /// Its private address.
    pub ipv4: Ipv4Addr,
    /// Its subnet.
    pub subnet: Prefix,
    /// What the implicit local route covers.
    pub vpc_prefixes: Vec<Prefix>,
    /// Of its subnet, without the local routes.
    pub routes: Vec<Route>,
    /// Of its subnet; `None` lets everything pass.
    pub acl: Option<Acl>,
    /// What the internet sees: one to eight addresses.
    pub public: Vec<Ipv4Addr>,
}

/// Where one private address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// The private address.
    pub ip: Ipv4Addr,
    /// The MAC of its port.
    pub mac: Mac,
    /// The card it is on, and the only one it is believed from.
    pub vtep: Ipv4Addr,
    /// Its port forwards for others: its card is believed for any address.
    pub forwards: bool,
    /// The public address that is mapped 1:1 to it.
    pub public: Option<Ipv4Addr>,
}

impl PortConfig {
    /// A port of one address in a VPC of one subnet, that nothing may pass.
    #[must_use]
    pub fn new(id: PortId, vni: Vni, mac: Mac, ipv4: Ipv4Addr, subnet: Prefix) -> Self {
        Self {
            id,
            vni,
            mac,
            ipv4,
            secondary: Vec::new(),
            subnet,
            vpc_prefixes: Vec::new(),
            public: None,
            source_dest_check: true,
            mtu: 9001,
            ingress: Vec::new(),
            egress: Vec::new(),
            acl: None,
            tracking: ConnectionTracking::default(),
            allowance: None,
            routes: Vec::new(),
            dhcp: Dhcp::default(),
            generation: 1,
        }
    }

    /// Its private addresses, each with the public one that is mapped to it.
    pub fn addresses(&self) -> impl Iterator<Item = Address> + '_ {
        std::iter::once(Address { private: self.ipv4, public: self.public }).chain(self.secondary.iter().copied())
    }

    /// Whether a private address is one of its own.
    #[must_use]
    pub fn owns(&self, address: Ipv4Addr) -> bool {
        self.addresses().any(|own| own.private == address)
    }

    /// The public address that is mapped to one of its own private ones.
    #[must_use]
    pub fn public_of(&self, private: Ipv4Addr) -> Option<Ipv4Addr> {
        self.addresses().find(|own| own.private == private)?.public
    }
}

impl Mapping {
    /// A mapping of a port that neither forwards nor has a public address.
    #[must_use]
    pub fn new(ip: Ipv4Addr, mac: Mac, vtep: Ipv4Addr) -> Self {
        Self { ip, mac, vtep, forwards: false, public: None }
    }
}

impl NetworkConfig {
    /// A network of its own: no groups, no peers, no name server.
    #[must_use]
    pub fn new(vni: Vni, mappings: Vec<Mapping>) -> Self {
        Self { vni, mappings, groups: HashMap::new(), peers: Vec::new(), resolver: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_of_every_length_hold_their_own_addresses() {
        let address = Ipv4Addr::new(10, 1, 2, 3);
        for length in 0..=32 {
            assert!(Prefix::new(address, length).contains(address));
        }
        assert!(Prefix::new(address, 0).contains(Ipv4Addr::BROADCAST));
        assert!(!Prefix::new(address, 32).contains(Ipv4Addr::new(10, 1, 2, 2)));
        let subnet = Prefix::new(address, 24);
        assert_eq!((subnet.mask(), subnet.nth(1)), (Ipv4Addr::new(255, 255, 255, 0), Ipv4Addr::new(10, 1, 2, 1)));
    }
}
