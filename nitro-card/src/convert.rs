//! From the wire to the card's own types: the one place where a message of
//! control is judged. What passes here is trusted inside.

use std::net::Ipv4Addr;

use card_proto::card::{self, put_request, route, rule};
use dataplane::{Dhcp, Mac, Mapping, Prefix, Protocol, Route, RouteTarget, Vni};

use crate::attachment::{Disk, Source};
use crate::instance::{BootSource, Instance};
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

impl TryFrom<put_request::Object> for Object {
    type Error = Invalid;

    fn try_from(message: put_request::Object) -> Result<Self, Invalid> {
        Ok(match message {
            put_request::Object::Instance(message) => Self::Instance(message.try_into()?),
            put_request::Object::Port(message) => Self::Port(message.try_into()?),
            put_request::Object::Disk(message) => Self::Disk(message.try_into()?),
            put_request::Object::Volume(message) => Self::Volume(message.try_into()?),
            put_request::Object::Network(message) => Self::Network(message.try_into()?),
            put_request::Object::NatGateway(_) => return Err(Invalid { field: "object", rule: "is no NAT gateway on this card" }),
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
            source_dest_check: message.source_dest_check,
            mtu: mtu.ok_or(Invalid { field: "port.mtu", rule: "is 68..=9001" })?,
            ingress: rules(message.ingress, "port.ingress")?,
            egress: rules(message.egress, "port.egress")?,
            routes: message.routes.iter().map(route).collect::<Result<_, _>>()?,
            security_group_ids: message.security_group_ids,
            dhcp: Dhcp { hostname: dhcp.hostname, domain: dhcp.domain, dns: dhcp.dns.into_iter().take(16).map(Ipv4Addr::from).collect() },
        })
    }
}

fn rules(messages: Vec<card::Rule>, field: &'static str) -> Result<Vec<Rule>, Invalid> {
    require(messages.len() <= RULES_MAX, field, "are at most 4096 rules")?;
    messages.into_iter().map(|message| rule(message, field)).collect()
}

fn rule(message: card::Rule, field: &'static str) -> Result<Rule, Invalid> {
    let protocol = match message.protocol {
        256 => Protocol::Any,
        number => Protocol::Number(u8::try_from(number).map_err(|_| Invalid { field, rule: "has protocols 0..=256" })?),
    };
    let range = (message.from_port, message.to_port);
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
    let remote = match message.remote {
        Some(rule::Remote::Prefix(remote)) => Remote::Prefix(prefix(&remote, field)?),
        Some(rule::Remote::GroupId(group)) => Remote::Group(group),
        None => return Err(Invalid { field, rule: "has a remote in every rule" }),
    };
    Ok(Rule { protocol, ports, icmp, remote })
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

fn route(message: &card::Route) -> Result<Route, Invalid> {
    let destination = message.destination.as_ref().ok_or(Invalid { field: "port.routes", rule: "have destinations" })?;
    let target = match message.target {
        Some(route::Target::InternetGateway(true)) => RouteTarget::InternetGateway,
        Some(route::Target::Blackhole(true)) => RouteTarget::Blackhole,
        _ => return Err(Invalid { field: "port.routes", rule: "have targets" }),
    };
    Ok(Route { destination: prefix(destination, "port.routes")?, target })
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
            Ok(Mapping { ip, mac: mac(&mapping.mac, "network.mappings")?, vtep })
        };
        Ok(Self {
            id: id(&message.id, "network.id")?,
            generation: message.generation,
            vni: vni(message.vni, "network.vni")?,
            mappings: message.mappings.iter().map(mapping).collect::<Result<_, _>>()?,
            groups: message.groups.into_iter().map(|group| (group.id, group.members.into_iter().map(Ipv4Addr::from).collect())).collect(),
        })
    }
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
mod tests {
    use super::*;

    fn port() -> card::Port {
        card::Port {
            id: "eni-1".into(),
            generation: 1,
            instance_id: "i-1".into(),
            vni: 7,
            mac: vec![2, 0, 0, 0, 0, 1],
            private_ipv4: 0x0a00_0105,
            subnet: Some(card::Prefix { address: 0x0a00_0100, length: 24 }),
            mtu: 9001,
            ..card::Port::default()
        }
    }

    /// `change` breaks a good port; the refusal has to name `field`.
    fn refused(field: &str, change: fn(&mut card::Port)) {
        let mut message = port();
        change(&mut message);
        assert_eq!(Port::try_from(message).unwrap_err().field, field);
    }

    #[test]
    fn a_bad_field_is_named() {
        assert!(Port::try_from(port()).is_ok());
        refused("port.id", |port| port.id = "../etc".into());
        refused("port.vni", |port| port.vni = 0);
        refused("port.vni", |port| port.vni = 1 << 24);
        refused("port.mac", |port| port.mac = vec![2; 5]);
        refused("port.mac", |port| port.mac = vec![0xff; 6]);
        refused("port.mtu", |port| port.mtu = 9002);
        refused("port.subnet", |port| port.subnet = None);
        refused("port.subnet", |port| port.subnet = Some(card::Prefix { address: 0, length: 33 }));
        refused("port.routes", |port| port.routes = vec![card::Route::default()]);
        refused("port.ingress", |port| port.ingress = vec![card::Rule { protocol: 6, ..card::Rule::default() }]);
        refused("port.dhcp", |port| port.dhcp = Some(card::Dhcp { hostname: "a\nb".into(), ..card::Dhcp::default() }));
    }

    #[test]
    fn rules_take_ports_for_tcp_and_codes_for_icmp() {
        let remote = Some(rule::Remote::GroupId("sg-1".into()));
        let tcp = card::Rule { protocol: 6, from_port: 22, to_port: 23, remote: remote.clone() };
        assert_eq!(rule(tcp.clone(), "x").unwrap().ports, Some((22, 23)));
        assert!(rule(card::Rule { from_port: 24, ..tcp.clone() }, "x").is_err());
        assert_eq!(rule(card::Rule { from_port: -1, to_port: -1, ..tcp }, "x").unwrap().ports, None);
        let icmp = card::Rule { protocol: 1, from_port: 8, to_port: -1, remote: remote.clone() };
        assert_eq!(rule(icmp, "x").unwrap().icmp, (Some(8), None));
        let any = card::Rule { protocol: 256, from_port: 0, to_port: 0, remote };
        assert_eq!(rule(any, "x").unwrap().protocol, Protocol::Any);
    }

    #[test]
    fn object_keys_stay_inside_the_store() {
        for key in ["../x", "a/b", ".hidden", "a\0b"] {
            assert!(object_key(key.into(), "x").is_err(), "{key:?}");
        }
        assert_eq!(object_key(String::new(), "x"), Ok(None));
        assert_eq!(object_key("mini-1.raw".into(), "x"), Ok(Some("mini-1.raw".into())));
    }
}
