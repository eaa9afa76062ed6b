//! From the wire to the card's own types: the one place where a message of
//! control is judged. What passes here is trusted inside.

use std::net::Ipv4Addr;

use card_proto::card::{self, put_request, route, rule};
use dataplane::{
    Acl, AclRule, Address, ConnectionTracking, Dhcp, Limits, Mac, Mapping, Prefix, Protocol, ResolverConfig, Route, RouteTarget, Vni,
};

use crate::attachment::{Disk, Source};
use crate::instance::{BootSource, Instance};
use crate::nat_gateway::NatGateway;
use crate::network::Network;
use crate::object::{Id, Object};
use crate::port::{Port, Remote, Rule};
use crate::volume::{Spec, Volume};

/// A field that control got wrong; becomes gRPC INVALID_ARGUMENT.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} {rule}")]
pub struct Invalid {
    /// Which field.
    pub field: &'static str,
    /// The rule that it breaks.
    pub rule: &'static str,
}

/// Longest user data, as EC2 has it.
const USER_DATA_MAX: usize = 16 * 1024;
const PREFIXES_MAX: usize = 64;
const RULES_MAX: usize = 4096;
/// EC2 lets a VPC have 125 peers, and a port of its largest type 50 addresses.
const PEERS_MAX: usize = 256;
const ADDRESSES_MAX: usize = 256;

impl TryFrom<put_request::Object> for Object {
    type Error = Invalid;

    fn try_from(message: put_request::Object) -> Result<Self, Invalid> {
        Ok(match message {
            put_request::Object::Instance(message) => Self::Instance(message.try_into()?),
            put_request::Object::Port(message) => Self::Port(message.try_into()?),
            put_request::Object::Disk(message) => Self::Disk(message.try_into()?),
            put_request::Object::Volume(message) => Self::Volume(message.try_into()?),
            put_request::Object::Network(message) => Self::Network(message.try_into()?),
            put_request::Object::NatGateway(message) => Self::NatGateway(message.try_into()?),
        })
    }
}

impl TryFrom<card::Instance> for Instance {
    type Error = Invalid;

    fn try_from(message: card::Instance) -> Result<Self, Invalid> {
        let running = match message.power() {
            card::Power::Running => true,
            card::Power::Stopped => false,
            card::Power::Unspecified => return Err(Invalid { field: "instance.power", rule: "is RUNNING or STOPPED" }),
        };
        // The core makes the machine's generation of it, and 24 bits more.
        require(message.generation < 1 << 40, "instance.generation", "is below 2^40")?;
        require(0 < message.vcpus, "instance.vcpus", "is at least 1")?;
        require(2 << 20 <= message.memory_bytes, "instance.memory_bytes", "is at least 2 MiB")?;
        let source = message.boot_source.unwrap_or_default();
        require(!source.kernel.is_empty() || source.initrd.is_empty(), "instance.boot_source.initrd", "comes with a kernel")?;
        let line = source.command_line;
        require(
            line.len() <= 2048 && !line.contains(['\n', '\0']),
            "instance.boot_source.command_line",
            "is one line of at most 2048 bytes",
        )?;
        let mut metadata = message.metadata.ok_or(Invalid { field: "instance.metadata", rule: "is required" })?;
        for key in &mut metadata.public_keys {
            // A key file ends with a line break; the key does not.
            key.openssh.truncate(key.openssh.trim_end().len());
        }
        check_metadata(&metadata)?;
        Ok(Self {
            id: id(&message.id, "instance.id")?,
            generation: message.generation,
            running,
            boot: message.boot,
            vcpus: message.vcpus,
            memory_bytes: message.memory_bytes,
            boot_source: BootSource {
                kernel: object_key(source.kernel, "instance.boot_source.kernel")?,
                initrd: object_key(source.initrd, "instance.boot_source.initrd")?,
                command_line: line,
            },
            metadata,
            ports: usize::try_from(message.ports).unwrap_or(usize::MAX),
            disks: usize::try_from(message.disks).unwrap_or(usize::MAX),
        })
    }
}

/// The metadata service prints these values in lines, so none may hold a line break.
fn check_metadata(metadata: &card::Metadata) -> Result<(), Invalid> {
    let words = [
        (&metadata.account_id, "metadata.account_id"),
        (&metadata.region, "metadata.region"),
        (&metadata.availability_zone, "metadata.availability_zone"),
        (&metadata.availability_zone_id, "metadata.availability_zone_id"),
        (&metadata.image_id, "metadata.image_id"),
        (&metadata.instance_type, "metadata.instance_type"),
        (&metadata.reservation_id, "metadata.reservation_id"),
        (&metadata.local_hostname, "metadata.local_hostname"),
        (&metadata.public_hostname, "metadata.public_hostname"),
    ];
    for (word, field) in words {
        require(is_line(word), field, "has no control characters")?;
    }
    require(metadata.security_groups.iter().all(|name| is_line(name)), "metadata.security_groups", "has no control characters")?;
    let keys = &metadata.public_keys;
    require(keys.iter().all(|key| is_line(&key.name) && is_line(&key.openssh)), "metadata.public_keys", "has no control characters")?;
    require(metadata.user_data.len() <= USER_DATA_MAX, "metadata.user_data", "is at most 16 KiB")?;
    let options = metadata.options.as_ref().ok_or(Invalid { field: "metadata.options", rule: "is required" })?;
    require((1..=64).contains(&options.hop_limit), "metadata.options.hop_limit", "is 1..=64")
}

impl TryFrom<card::Port> for Port {
    type Error = Invalid;

    fn try_from(message: card::Port) -> Result<Self, Invalid> {
        let mtu = u16::try_from(message.mtu).ok().filter(|mtu| (68..=9001).contains(mtu));
        let subnet = message.subnet.ok_or(Invalid { field: "port.subnet", rule: "is required" })?;
        require(message.vpc_prefixes.len() <= PREFIXES_MAX, "port.vpc_prefixes", "are at most 64")?;
        let dhcp = message.dhcp.unwrap_or_default();
        let names = is_line(&dhcp.hostname) && is_line(&dhcp.domain) && dhcp.hostname.len() <= 255 && dhcp.domain.len() <= 255;
        require(names, "port.dhcp", "has names of at most 255 printable bytes")?;
        require(is_line(&message.vpc_id) && is_line(&message.subnet_id), "port.vpc_id", "has no control characters")?;
        require(message.security_group_ids.iter().all(|id| is_line(id)), "port.security_group_ids", "have no control characters")?;
        require(message.secondary.len() <= ADDRESSES_MAX, "port.secondary", "are at most 256")?;
        let secondary = |message: &card::Address| {
            let private = address(message.private_ipv4).ok_or(Invalid { field: "port.secondary", rule: "have private addresses" })?;
            Ok(Address { private, public: address(message.public_ipv4) })
        };
        Ok(Self {
            id: id(&message.id, "port.id")?,
            generation: message.generation,
            instance_id: id(&message.instance_id, "port.instance_id")?,
            device_index: message.device_index,
            vpc_id: message.vpc_id,
            subnet_id: message.subnet_id,
            vni: vni(message.vni, "port.vni")?,
            mac: mac(&message.mac, "port.mac")?,
            private_ipv4: address(message.private_ipv4).ok_or(Invalid { field: "port.private_ipv4", rule: "is required" })?,
            subnet: prefix(&subnet, "port.subnet")?,
            vpc_prefixes: message.vpc_prefixes.iter().map(|p| prefix(p, "port.vpc_prefixes")).collect::<Result<_, _>>()?,
            public_ipv4: address(message.public_ipv4),
            secondary: message.secondary.iter().map(secondary).collect::<Result<_, _>>()?,
            source_dest_check: message.source_dest_check,
            mtu: mtu.ok_or(Invalid { field: "port.mtu", rule: "is 68..=9001" })?,
            ingress: rules(message.ingress, "port.ingress")?,
            egress: rules(message.egress, "port.egress")?,
            acl: message.acl.map(|message| acl(&message, "port.acl")).transpose()?,
            tracking: tracking(&message.connection_tracking.unwrap_or_default())?,
            limits: message.limits.as_ref().map(limits),
            routes: routes(&message.routes, "port.routes")?,
            security_group_ids: message.security_group_ids,
            dhcp: Dhcp { hostname: dhcp.hostname, domain: dhcp.domain, dns: servers(&dhcp.dns), ntp: servers(&dhcp.ntp) },
        })
    }
}

/// As many servers as a DHCP option is asked to hold.
fn servers(addresses: &[u32]) -> Vec<Ipv4Addr> {
    addresses.iter().take(16).copied().map(Ipv4Addr::from).collect()
}

fn tracking(message: &card::ConnectionTracking) -> Result<ConnectionTracking, Invalid> {
    let seconds = |value: u32, default: u32, range: std::ops::RangeInclusive<u32>| match value {
        0 => Ok(default),
        value if range.contains(&value) => Ok(value),
        _ => Err(Invalid { field: "port.connection_tracking", rule: "has timeouts as EC2 allows them" }),
    };
    let default = ConnectionTracking::default();
    Ok(ConnectionTracking {
        tcp_established_s: seconds(message.tcp_established_s, default.tcp_established_s, 60..=432_000)?,
        udp_stream_s: seconds(message.udp_stream_s, default.udp_stream_s, 60..=180)?,
        udp_s: seconds(message.udp_s, default.udp_s, 30..=60)?,
    })
}

/// Every number is a limit, and 0 none.
fn limits(message: &card::Limits) -> Limits {
    Limits {
        baseline_bits_per_s: message.baseline_bits_per_s,
        burst_bits_per_s: message.burst_bits_per_s,
        credit_bits: message.credit_bits,
        packets_per_s: message.packets_per_s,
        connections: message.connections,
    }
}

fn acl(message: &card::Acl, field: &'static str) -> Result<Acl, Invalid> {
    let list = |messages: &[card::AclRule]| {
        require(messages.len() <= RULES_MAX, field, "has at most 4096 rules each way")?;
        messages.iter().map(|message| acl_rule(message, field)).collect::<Result<_, _>>()
    };
    Ok(Acl { ingress: list(&message.ingress)?, egress: list(&message.egress)? })
}

fn acl_rule(message: &card::AclRule, field: &'static str) -> Result<AclRule, Invalid> {
    let (protocol, ports, icmp) = matched(message.protocol, (message.from_port, message.to_port), field)?;
    let remote = message.remote.as_ref().ok_or(Invalid { field, rule: "has a remote in every rule" })?;
    Ok(AclRule { allow: message.allow, protocol, ports, icmp, remote: prefix(remote, field)? })
}

fn rules(messages: Vec<card::Rule>, field: &'static str) -> Result<Vec<Rule>, Invalid> {
    require(messages.len() <= RULES_MAX, field, "are at most 4096 rules")?;
    messages.into_iter().map(|message| rule(message, field)).collect()
}

fn rule(message: card::Rule, field: &'static str) -> Result<Rule, Invalid> {
    let (protocol, ports, icmp) = matched(message.protocol, (message.from_port, message.to_port), field)?;
    let remote = match message.remote {
        Some(rule::Remote::Prefix(remote)) => Remote::Prefix(prefix(&remote, field)?),
        Some(rule::Remote::GroupId(group)) => Remote::Group(group),
        None => return Err(Invalid { field, rule: "has a remote in every rule" }),
    };
    Ok(Rule { protocol, ports, icmp, remote })
}

/// Protocol, destination ports, ICMP type and code.
type Matched = (Protocol, Option<(u16, u16)>, (Option<u8>, Option<u8>));

/// What a rule is about, of a security group or an ACL.
fn matched(protocol: u32, range: (i32, i32), field: &'static str) -> Result<Matched, Invalid> {
    let protocol = match protocol {
        256 => Protocol::Any,
        number => Protocol::Number(u8::try_from(number).map_err(|_| Invalid { field, rule: "has protocols 0..=256" })?),
    };
    let (ports, icmp) = match protocol {
        Protocol::Number(TCP | UDP) => match range {
            (-1, -1) => (None, (None, None)),
            (from, to) => match (u16::try_from(from), u16::try_from(to)) {
                (Ok(from), Ok(to)) if from <= to => (Some((from, to)), (None, None)),
                _ => return Err(Invalid { field, rule: "has port ranges within 0..=65535" }),
            },
        },
        Protocol::Number(ICMP) => (None, (icmp_code(range.0, field)?, icmp_code(range.1, field)?)),
        _ => (None, (None, None)),
    };
    Ok((protocol, ports, icmp))
}

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;

fn icmp_code(code: i32, field: &'static str) -> Result<Option<u8>, Invalid> {
    match code {
        -1 => Ok(None),
        code => u8::try_from(code).map(Some).map_err(|_| Invalid { field, rule: "has ICMP types and codes -1..=255" }),
    }
}

fn routes(messages: &[card::Route], field: &'static str) -> Result<Vec<Route>, Invalid> {
    require(messages.len() <= RULES_MAX, field, "are at most 4096")?;
    messages.iter().map(|message| route(message, field)).collect()
}

fn route(message: &card::Route, field: &'static str) -> Result<Route, Invalid> {
    let destination = message.destination.as_ref().ok_or(Invalid { field, rule: "have destinations" })?;
    let through = |message| address(message).ok_or(Invalid { field, rule: "have targets" });
    let target = match message.target {
        Some(route::Target::InternetGateway(true)) => RouteTarget::InternetGateway,
        Some(route::Target::Blackhole(true)) => RouteTarget::Blackhole,
        Some(route::Target::NatGateway(gateway)) => RouteTarget::NatGateway(through(gateway)?),
        Some(route::Target::NetworkInterface(port)) => RouteTarget::NetworkInterface(through(port)?),
        Some(route::Target::PeerVni(peer)) => RouteTarget::Peer(vni(peer, field)?),
        Some(route::Target::InternetGateway(false) | route::Target::Blackhole(false)) | None => {
            return Err(Invalid { field, rule: "have targets" });
        }
    };
    Ok(Route { destination: prefix(destination, field)?, target })
}

impl TryFrom<card::NatGateway> for NatGateway {
    type Error = Invalid;

    fn try_from(message: card::NatGateway) -> Result<Self, Invalid> {
        let subnet = message.subnet.ok_or(Invalid { field: "nat_gateway.subnet", rule: "is required" })?;
        require(message.vpc_prefixes.len() <= PREFIXES_MAX, "nat_gateway.vpc_prefixes", "are at most 64")?;
        require((1..=8).contains(&message.public_ipv4.len()), "nat_gateway.public_ipv4", "are 1 to 8 addresses")?;
        let public = |message: &u32| address(*message).ok_or(Invalid { field: "nat_gateway.public_ipv4", rule: "are addresses" });
        Ok(Self {
            id: id(&message.id, "nat_gateway.id")?,
            generation: message.generation,
            vni: vni(message.vni, "nat_gateway.vni")?,
            mac: mac(&message.mac, "nat_gateway.mac")?,
            private_ipv4: address(message.private_ipv4).ok_or(Invalid { field: "nat_gateway.private_ipv4", rule: "is required" })?,
            subnet: prefix(&subnet, "nat_gateway.subnet")?,
            vpc_prefixes: message.vpc_prefixes.iter().map(|p| prefix(p, "nat_gateway.vpc_prefixes")).collect::<Result<_, _>>()?,
            routes: routes(&message.routes, "nat_gateway.routes")?,
            acl: message.acl.map(|message| acl(&message, "nat_gateway.acl")).transpose()?,
            public_ipv4: message.public_ipv4.iter().map(public).collect::<Result<_, _>>()?,
        })
    }
}

impl TryFrom<card::Disk> for Disk {
    type Error = Invalid;

    fn try_from(message: card::Disk) -> Result<Self, Invalid> {
        require(is_line(&message.device_name) && !message.device_name.is_empty(), "disk.device_name", "is a name")?;
        require((1..=223).contains(&message.nqn.len()), "disk.nqn", "is 1 to 223 bytes")?;
        Ok(Self {
            id: id(&message.id, "disk.id")?,
            generation: message.generation,
            instance_id: id(&message.instance_id, "disk.instance_id")?,
            device_name: message.device_name,
            boot: message.boot,
            source: Source {
                nqn: message.nqn,
                address: message.address.parse().map_err(|_| Invalid { field: "disk.address", rule: "is ip:port" })?,
                size_bytes: size(message.size_bytes, "disk.size_bytes")?,
            },
            attach_time_s: message.attach_time_s,
        })
    }
}

impl TryFrom<card::Volume> for Volume {
    type Error = Invalid;

    fn try_from(message: card::Volume) -> Result<Self, Invalid> {
        require(message.initiator_nqn.len() <= 223, "volume.initiator_nqn", "is at most 223 bytes")?;
        let spec = Spec {
            size_bytes: size(message.size_bytes, "volume.size_bytes")?,
            image: object_key(message.image, "volume.image")?,
            initiator_nqn: Some(message.initiator_nqn).filter(|nqn| !nqn.is_empty()),
            iops: message.iops,
            throughput_mib_s: message.throughput_mib_s,
        };
        Ok(Self { id: id(&message.id, "volume.id")?, generation: message.generation, spec })
    }
}

impl TryFrom<card::Network> for Network {
    type Error = Invalid;

    fn try_from(message: card::Network) -> Result<Self, Invalid> {
        let mapping = |mapping: &card::Mapping| {
            let ip = address(mapping.private_ipv4);
            let vtep = address(mapping.underlay_ipv4);
            let (Some(ip), Some(vtep)) = (ip, vtep) else {
                return Err(Invalid { field: "network.mappings", rule: "have both addresses" });
            };
            let mac = mac(&mapping.mac, "network.mappings")?;
            Ok(Mapping { ip, mac, vtep, forwards: mapping.forwards, public: address(mapping.public_ipv4) })
        };
        require(message.peers.len() <= PEERS_MAX, "network.peers", "are at most 256")?;
        Ok(Self {
            id: id(&message.id, "network.id")?,
            generation: message.generation,
            vni: vni(message.vni, "network.vni")?,
            mappings: message.mappings.iter().map(mapping).collect::<Result<_, _>>()?,
            groups: message.groups.into_iter().map(|group| (group.id, group.members.into_iter().map(Ipv4Addr::from).collect())).collect(),
            peers: message.peers.iter().map(|peer| vni(*peer, "network.peers")).collect::<Result<_, _>>()?,
            resolver: message.resolver.map(resolver).transpose()?,
        })
    }
}

fn resolver(message: card::Resolver) -> Result<ResolverConfig, Invalid> {
    let public_domain = Some(message.public_domain).filter(|_| message.hostnames);
    // A name has 255 bytes on the wire, and what stands before the domain takes up to 24 of them.
    let is_domain = |name: &String| {
        let label = |label: &str| (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        name.len() <= 224 && name.split('.').all(label)
    };
    let domains = std::iter::once(&message.domain).chain(&public_domain).all(is_domain);
    require(domains, "network.resolver", "has domain names of at most 224 bytes")?;
    Ok(ResolverConfig { domain: message.domain, public_domain })
}

/// An id of the wire.
///
/// # Errors
/// [`Invalid`] names `field`.
pub fn id(text: &str, field: &'static str) -> Result<Id, Invalid> {
    Id::parse(text).ok_or(Invalid { field, rule: "is 1 to 64 characters of a-z, 0-9 and -" })
}

fn require(holds: bool, field: &'static str, rule: &'static str) -> Result<(), Invalid> {
    if holds { Ok(()) } else { Err(Invalid { field, rule }) }
}

fn is_line(text: &str) -> bool {
    text.len() <= 64 * 1024 && !text.chars().any(char::is_control)
}

/// A key of the image store is a plain file name.
fn object_key(key: String, field: &'static str) -> Result<Option<String>, Invalid> {
    let plain = key.len() <= 255 && !key.starts_with('.') && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b));
    require(plain, field, "is a plain object key")?;
    Ok(Some(key).filter(|key| !key.is_empty()))
}

fn size(bytes: u64, field: &'static str) -> Result<u64, Invalid> {
    require(0 < bytes && bytes.is_multiple_of(512) && bytes <= 1 << 46, field, "is a multiple of 512, at most 64 TiB")?;
    Ok(bytes)
}

fn address(message: u32) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(message)).filter(|address| !address.is_unspecified())
}

fn mac(message: &[u8], field: &'static str) -> Result<Mac, Invalid> {
    let mac = Mac(message.try_into().map_err(|_| Invalid { field, rule: "has MAC addresses of 6 bytes" })?);
    require(!mac.is_group(), field, "has no group MAC addresses")?;
    Ok(mac)
}

fn vni(message: u32, field: &'static str) -> Result<Vni, Invalid> {
    require((1..=0xff_ffff).contains(&message), field, "is 1..=16777215")?;
    Ok(Vni(message))
}

fn prefix(message: &card::Prefix, field: &'static str) -> Result<Prefix, Invalid> {
    let length = u8::try_from(message.length).ok().filter(|length| *length <= 32);
    let length = length.ok_or(Invalid { field, rule: "has prefix lengths 0..=32" })?;
    Ok(Prefix::new(message.address.into(), length))
}

#[cfg(test)]
mod tests;
