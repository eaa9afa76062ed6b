//! What one card shall hold, computed from the rows: a pure function.
//!
//! A card is told no more than it needs: the VPCs that have a port on it, and of
//! them where the other ports are. Lists are sorted, so that equal wishes are
//! equal messages and a generation rises only when something changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use card_proto::card;
use ipnet::Ipv4Net;
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use crate::model::{
    AttachmentState, Card, DhcpOptions, Instance, InstanceState, NetworkInterface, ObjectKind, REGION, RouteTarget, RuleRemote,
    SecurityGroup, SecurityGroupRule, Subnet, Volume, Vpc,
};
use crate::resource::{address, instance, network_interface, route_table, tag, volume, vpc};
use crate::world::{Region, Tx};

/// An object for a card; the generation is set when it is sent.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // named after the messages
pub enum Object {
    Network(card::Network),
    Volume(card::Volume),
    Disk(card::Disk),
    Port(card::Port),
    Instance(card::Instance),
    NatGateway(card::NatGateway),
}

/// Kind and id: what names an object on a card.
pub type ObjectKey = (ObjectKind, String);

impl Object {
    /// Kind and id.
    pub fn key(&self) -> ObjectKey {
        match self {
            Self::Network(object) => (ObjectKind::Network, object.id.clone()),
            Self::Volume(object) => (ObjectKind::Volume, object.id.clone()),
            Self::Disk(object) => (ObjectKind::Disk, object.id.clone()),
            Self::Port(object) => (ObjectKind::Port, object.id.clone()),
            Self::Instance(object) => (ObjectKind::Instance, object.id.clone()),
            Self::NatGateway(object) => (ObjectKind::NatGateway, object.id.clone()),
        }
    }

    /// The generation, 0 before [`Object::with_generation`].
    pub fn generation(&self) -> u64 {
        match self {
            Self::Network(object) => object.generation,
            Self::Volume(object) => object.generation,
            Self::Disk(object) => object.generation,
            Self::Port(object) => object.generation,
            Self::Instance(object) => object.generation,
            Self::NatGateway(object) => object.generation,
        }
    }

    /// The object with its generation.
    #[must_use]
    pub fn with_generation(mut self, generation: u64) -> Self {
        match &mut self {
            Self::Network(object) => object.generation = generation,
            Self::Volume(object) => object.generation = generation,
            Self::Disk(object) => object.generation = generation,
            Self::Port(object) => object.generation = generation,
            Self::Instance(object) => object.generation = generation,
            Self::NatGateway(object) => object.generation = generation,
        }
        self
    }

    /// A hash that differs when the content does.
    pub fn content_hash(&self) -> String {
        let bytes = match self {
            Self::Network(object) => object.encode_to_vec(),
            Self::Volume(object) => object.encode_to_vec(),
            Self::Disk(object) => object.encode_to_vec(),
            Self::Port(object) => object.encode_to_vec(),
            Self::NatGateway(object) => object.encode_to_vec(),
            Self::Instance(object) => return instance_hash(object.clone()),
        };
        hex::encode(Sha256::digest(bytes))
    }
}

/// The tags are a map without an order, so they are hashed apart.
fn instance_hash(mut object: card::Instance) -> String {
    let tags = object.metadata.as_mut().map(|metadata| std::mem::take(&mut metadata.tags)).unwrap_or_default();
    let mut hash = Sha256::new_with_prefix(object.encode_to_vec());
    for (key, value) in tags.into_iter().collect::<BTreeMap<_, _>>() {
        for text in [key, value] {
            hash.update(u64::try_from(text.len()).unwrap_or(u64::MAX).to_be_bytes());
            hash.update(text);
        }
    }
    hex::encode(hash.finalize())
}

/// Whether an instance shall have a machine, its ports and its disks on its card.
pub(super) fn wants_machine(instance: &Instance) -> bool {
    match instance.state {
        InstanceState::Pending | InstanceState::Running => true,
        InstanceState::Stopping => !instance.halted,
        InstanceState::ShuttingDown | InstanceState::Terminated | InstanceState::Stopped => false,
    }
}

/// Everything that a card shall hold.
pub(super) fn objects(tx: &Tx<'_>, region: &Region, card_id: &str) -> BTreeMap<ObjectKey, Object> {
    let mut objects = Vec::new();
    let mut vpcs = BTreeMap::<(String, String), BTreeSet<String>>::new();
    for row in tx.find_all::<Instance>("card", card_id).iter().filter(|row| wants_machine(row)) {
        let account = row.account_id.as_str();
        let interfaces = instance::interfaces(tx, account, &row.id);
        let ports: Vec<card::Port> = interfaces.iter().filter_map(|interface| port(tx, region, row, interface)).collect();
        for port in &ports {
            let groups = vpcs.entry((account.to_owned(), port.vpc_id.clone())).or_default();
            groups.extend(remote_groups(port));
        }
        let disks: Vec<card::Disk> = instance::volumes(tx, account, &row.id).iter().filter_map(|volume| disk(tx, volume)).collect();
        objects.push(Object::Instance(machine(tx, region, row, &interfaces, ports.len(), disks.len())));
        objects.extend(ports.into_iter().map(Object::Port));
        objects.extend(disks.into_iter().map(Object::Disk));
    }
    for ((account, vpc_id), groups) in vpcs {
        objects.extend(network(tx, &account, &vpc_id, groups).map(Object::Network));
    }
    let volumes = tx.find_all::<Volume>("card", card_id);
    objects.extend(
        volumes.iter().filter(|volume| volume.state != crate::model::VolumeState::Deleting).map(|row| Object::Volume(block(tx, row))),
    );
    objects.into_iter().map(|object| (object.key(), object)).collect()
}

fn machine(
    tx: &Tx<'_>,
    region: &Region,
    row: &Instance,
    interfaces: &[std::sync::Arc<NetworkInterface>],
    ports: usize,
    disks: usize,
) -> card::Instance {
    let power = if row.state == InstanceState::Stopping { card::Power::Stopped } else { card::Power::Running };
    let (vcpus, memory_mib) = row.placement.as_ref().map_or((0, 0), |placement| (placement.vcpus, placement.memory_mib));
    card::Instance {
        id: row.id.clone(),
        generation: 0,
        power: power.into(),
        boot: row.boot_count,
        vcpus,
        memory_bytes: memory_mib << 20,
        boot_source: row.boot.as_ref().map(|boot| card::BootSource {
            kernel: boot.kernel.clone(),
            initrd: boot.initrd.clone(),
            command_line: boot.command_line.clone(),
        }),
        metadata: Some(metadata(tx, region, row, interfaces)),
        ports: u32::try_from(ports).unwrap_or(u32::MAX),
        disks: u32::try_from(disks).unwrap_or(u32::MAX),
    }
}

fn metadata(tx: &Tx<'_>, region: &Region, row: &Instance, interfaces: &[std::sync::Arc<NetworkInterface>]) -> card::Metadata {
    let primary = interfaces.first();
    let groups = primary.map(|interface| network_interface::groups(tx, interface)).unwrap_or_default();
    let public = primary.and_then(|interface| address::public_ip(tx, interface));
    let named = tx.get::<Vpc>(&row.account_id, &row.vpc_id).is_some_and(|vpc| vpc.dns_hostnames);
    let tags = tag::of(tx, &row.account_id, &row.id);
    card::Metadata {
        account_id: row.account_id.clone(),
        region: region.name.clone(),
        availability_zone: row.zone.clone(),
        availability_zone_id: region.zone(&row.zone).map(|zone| zone.id.clone()).unwrap_or_default(),
        image_id: row.image_id.clone(),
        instance_type: row.instance_type.clone(),
        reservation_id: row.reservation_id.clone(),
        launch_index: row.launch_index,
        local_hostname: primary.map(|interface| network_interface::private_dns_name(region, interface.private_ip)).unwrap_or_default(),
        public_hostname: public.filter(|_| named).map(|ip| network_interface::public_dns_name(region, ip)).unwrap_or_default(),
        security_groups: groups.into_iter().filter_map(|group| group.group_name).collect(),
        public_keys: row
            .key_name
            .iter()
            .zip(&row.public_key)
            .map(|(name, key)| card::PublicKey { name: name.clone(), openssh: key.clone() })
            .collect(),
        user_data: row.user_data.clone(),
        pending_time_s: row.launch_time.seconds(),
        tags: if row.metadata_options.tags_enabled {
            tags.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
        } else {
            Default::default()
        },
        options: Some(card::MetadataOptions {
            enabled: row.metadata_options.enabled,
            tokens_required: row.metadata_options.tokens_required,
            hop_limit: row.metadata_options.hop_limit,
            tags_enabled: row.metadata_options.tags_enabled,
        }),
    }
}

/// Bytes of an Ethernet payload inside a VPC.
const MTU: u32 = 9_001;

fn port(tx: &Tx<'_>, region: &Region, instance: &Instance, interface: &NetworkInterface) -> Option<card::Port> {
    let account = interface.account_id.as_str();
    let vpc = tx.get::<Vpc>(account, &interface.vpc_id)?;
    let subnet = tx.get::<Subnet>(account, &interface.subnet_id)?;
    let groups: Vec<_> = interface.security_group_ids.iter().filter_map(|id| tx.get::<SecurityGroup>(account, id)).collect();
    let side = |egress: bool| {
        let mut rules: Vec<card::Rule> =
            groups.iter().flat_map(|group| &group.rules).filter(|rule| rule.egress == egress).filter_map(rule).collect();
        // An unordered union of allows, so each needs to stand only once.
        rules.sort_by_cached_key(|rule| rule.encode_to_vec());
        rules.dedup();
        rules
    };
    let mut security_group_ids = interface.security_group_ids.clone();
    security_group_ids.sort();
    Some(card::Port {
        id: interface.id.clone(),
        generation: 0,
        instance_id: instance.id.clone(),
        device_index: interface.attachment.as_ref().map_or(0, |attachment| attachment.device_index),
        vpc_id: vpc.id.clone(),
        subnet_id: subnet.id.clone(),
        vni: vpc.vni.0,
        mac: interface.mac.0.to_vec(),
        private_ipv4: interface.private_ip.into(),
        subnet: Some(prefix(subnet.cidr)),
        vpc_prefixes: vpc::cidrs(&vpc).map(|(_, cidr)| prefix(cidr)).collect(),
        public_ipv4: address::public_ip(tx, interface).map_or(0, u32::from),
        source_dest_check: interface.source_dest_check,
        mtu: MTU,
        ingress: side(false),
        egress: side(true),
        routes: routes(tx, &subnet),
        security_group_ids,
        dhcp: Some(dhcp(tx, region, &vpc, interface)),
        ..card::Port::default()
    })
}

fn prefix(cidr: Ipv4Net) -> card::Prefix {
    card::Prefix { address: cidr.network().into(), length: cidr.prefix_len().into() }
}

/// EC2's "all protocols" on the wire.
const ALL_PROTOCOLS: u32 = 256;

/// A rule as the card reads it; none for IPv6, which no port has.
pub(crate) fn rule(rule: &SecurityGroupRule) -> Option<card::Rule> {
    let remote = match &rule.remote {
        RuleRemote::Ipv4(cidr) => card::rule::Remote::Prefix(prefix(*cidr)),
        RuleRemote::Group { group_id, .. } => card::rule::Remote::GroupId(group_id.clone()),
        RuleRemote::Ipv6(_) => return None,
    };
    Some(card::Rule {
        protocol: rule.protocol.map_or(ALL_PROTOCOLS, u32::from),
        from_port: rule.from_port,
        to_port: rule.to_port,
        remote: Some(remote),
    })
}

fn remote_groups(port: &card::Port) -> impl Iterator<Item = String> {
    port.ingress.iter().chain(&port.egress).filter_map(|rule| match &rule.remote {
        Some(card::rule::Remote::GroupId(id)) => Some(id.clone()),
        _ => None,
    })
}

/// The routes of a subnet without the local ones; a target that is not there any more is a black hole.
fn routes(tx: &Tx<'_>, subnet: &Subnet) -> Vec<card::Route> {
    let Some(table) = route_table::of_subnet(tx, subnet) else { return Vec::new() };
    let route = |route: &crate::model::Route| {
        // A card cannot be told to route through a port yet.
        let open = matches!(route.target, RouteTarget::InternetGateway(_)) && route_table::is_active(tx, &table, route);
        let target = if open { card::route::Target::InternetGateway(true) } else { card::route::Target::Blackhole(true) };
        card::Route { destination: Some(prefix(route.destination)), target: Some(target) }
    };
    let mut routes: Vec<_> = table.routes.iter().map(route).collect();
    routes.sort_by_cached_key(prost::Message::encode_to_vec);
    routes
}

fn dhcp(tx: &Tx<'_>, region: &Region, vpc: &Vpc, interface: &NetworkInterface) -> card::Dhcp {
    let name = network_interface::private_dns_name(region, interface.private_ip);
    let (hostname, own_domain) = name.split_once('.').unwrap_or((&name, ""));
    let options = tx.get::<DhcpOptions>(&vpc.account_id, &vpc.dhcp_options_id);
    let values = |key: &str| options.as_ref().and_then(|options| options.configurations.get(key)).cloned().unwrap_or_default();
    let dns = values("domain-name-servers");
    card::Dhcp {
        hostname: hostname.to_owned(),
        domain: values("domain-name").into_iter().next().unwrap_or_else(|| own_domain.to_owned()),
        // AmazonProvidedDNS is no address: no card resolves names yet, and a server that never answers would be worse than none.
        dns: dns.iter().filter_map(|server| server.parse::<Ipv4Addr>().ok()).map(u32::from).collect(),
        ..card::Dhcp::default()
    }
}

/// Where the ports of a VPC are, and who is in the groups that the card's rules name.
fn network(tx: &Tx<'_>, account: &str, vpc_id: &str, groups: BTreeSet<String>) -> Option<card::Network> {
    let vpc = tx.get::<Vpc>(account, vpc_id)?;
    let mut mappings = Vec::new();
    let mut members: BTreeMap<String, BTreeSet<u32>> = groups.into_iter().map(|group| (group, BTreeSet::new())).collect();
    for interface in tx.find::<NetworkInterface>(account, "vpc", vpc_id) {
        let owner = interface.attachment.as_ref().and_then(|attachment| tx.get::<Instance>(account, &attachment.instance_id));
        let Some(placement) = owner.filter(|owner| wants_machine(owner)).and_then(|owner| owner.placement.clone()) else { continue };
        let Some(underlay) = tx.get::<Card>(REGION, &placement.card_id).map(|card| card.underlay_ip) else { continue };
        // A card without an underlay has only neighbours on itself, which it finds without a mapping.
        if underlay.is_unspecified() {
            continue;
        }
        let private_ipv4 = u32::from(interface.private_ip);
        mappings.push(card::Mapping {
            private_ipv4,
            mac: interface.mac.0.to_vec(),
            underlay_ipv4: underlay.into(),
            ..card::Mapping::default()
        });
        for group in &interface.security_group_ids {
            if let Some(members) = members.get_mut(group) {
                members.insert(private_ipv4);
            }
        }
    }
    mappings.sort_by_key(|mapping| mapping.private_ipv4);
    let groups = members.into_iter().map(|(id, members)| card::Group { id, members: members.into_iter().collect() }).collect();
    Some(card::Network { id: vpc.id.clone(), generation: 0, vni: vpc.vni.0, mappings, groups, ..card::Network::default() })
}

/// The name under which an initiator finds a volume.
fn nqn(volume_id: &str) -> String {
    format!("nqn.2026-11.cardinal:volume:{volume_id}")
}

/// A volume as its instance's card sees it; none while it is on its way out, or while its storage card was never seen.
fn disk(tx: &Tx<'_>, row: &Volume) -> Option<card::Disk> {
    let attachment = row.attachment.as_ref().filter(|attachment| attachment.state != AttachmentState::Detaching)?;
    let storage = tx.get::<Card>(REGION, &row.card_id)?;
    Some(card::Disk {
        id: row.id.clone(),
        generation: 0,
        instance_id: attachment.instance_id.clone(),
        device_name: attachment.device.clone(),
        boot: attachment.root,
        nqn: nqn(&row.id),
        address: storage.storage_address.clone(),
        size_bytes: volume::size_bytes(row),
        attach_time_s: attachment.attach_time.seconds(),
    })
}

/// A volume as its storage card sees it. The initiator is let in until the attachment has ended, so that a detach can still flush.
fn block(tx: &Tx<'_>, row: &Volume) -> card::Volume {
    let owner = row.attachment.as_ref().and_then(|attachment| tx.get::<Instance>(&row.account_id, &attachment.instance_id));
    let placement = owner.and_then(|owner| owner.placement.clone());
    let initiator = placement.and_then(|placement| tx.get::<Card>(REGION, &placement.card_id)).map(|card| card.initiator_nqn.clone());
    card::Volume {
        id: row.id.clone(),
        generation: 0,
        size_bytes: volume::size_bytes(row),
        image: row.image_object.clone().unwrap_or_default(),
        initiator_nqn: initiator.unwrap_or_default(),
        iops: row.iops.unwrap_or(0),
        throughput_mib_s: row.throughput_mib_s.unwrap_or(0),
    }
}
