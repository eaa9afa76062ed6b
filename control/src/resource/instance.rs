//! Instances.
//!
//! ```text
//! pending (0) --> running (16) --> stopping (64) --> stopped (80) --> pending
//!    |               |                |                 |
//!    +---------------+-------+--------+-----------------+
//!                            v
//!                   shutting-down (32) --> terminated (48) --> forgotten after an hour
//! ```
//!
//! Requests move to pending, stopping and shutting-down; what the cards report
//! moves on from there ([`crate::reconcile`]). A claim on a host stands from
//! pending until stopped or terminated, and is given back only when the card has
//! forgotten the machine, its ports and its disks.

mod attribute;
mod launch;
mod state;
mod status;
#[cfg(test)]
mod tests;

use std::net::Ipv4Addr;
use std::sync::Arc;

pub use attribute::{describe_instance_attribute, modify_instance_attribute, modify_instance_metadata_options};
pub use launch::run_instances;
pub(crate) use state::{fail, guest_shut_down, running, stopped, terminated};
pub use state::{reboot_instances, start_instances, stop_instances, terminate_instances};
pub use status::describe_instance_status;

use super::filter::{Filters, Page};
use super::id::INSTANCE;
use super::{address, image, network_interface, tag};
use crate::error::ApiError;
use crate::model::{Instance, InstanceState, NetworkInterface, Time, Volume};
use crate::shape::Timestamp;
use crate::shapes::{
    self, DescribeInstancesRequest, DescribeInstancesResult, EbsInstanceBlockDevice, InstanceBlockDeviceMapping, InstanceNetworkInterface,
    InstanceNetworkInterfaceAssociation, InstanceNetworkInterfaceAttachment, InstancePrivateIpAddress, Reservation,
};
use crate::world::{Call, Tx};

/// How long a terminated instance stays visible.
const VISIBLE_MS: u64 = 60 * 60 * 1000;

/// The interfaces of an instance, the primary one first.
pub fn interfaces(tx: &Tx<'_>, account: &str, instance_id: &str) -> Vec<Arc<NetworkInterface>> {
    let mut interfaces = tx.find::<NetworkInterface>(account, "instance", instance_id);
    interfaces.sort_by_key(|interface| interface.attachment.as_ref().map(|attachment| attachment.device_index));
    interfaces
}

/// The volumes of an instance, by device name, so the root volume of `/dev/xvda` comes first.
pub fn volumes(tx: &Tx<'_>, account: &str, instance_id: &str) -> Vec<Arc<Volume>> {
    let mut volumes = tx.find::<Volume>(account, "instance", instance_id);
    volumes.sort_by(|a, b| a.attachment.as_ref().map(|a| &a.device).cmp(&b.attachment.as_ref().map(|b| &b.device)));
    volumes
}

/// The card on which an instance of the asking account has its console; none while it has no machine.
///
/// # Errors
/// The `Malformed` or `NotFound` answer about the id.
pub fn console_card(call: &Call<'_>, id: &str) -> Result<Option<String>, ApiError> {
    let instance = INSTANCE.row::<Instance>(call, id)?;
    Ok(instance.placement.as_ref().map(|placement| placement.card_id.clone()))
}

/// Forgets instances that were terminated an hour ago.
pub fn expire(tx: &mut Tx<'_>, now: Time) {
    let old = tx.all::<Instance>().filter(|instance| instance.terminated.is_some_and(|at| VISIBLE_MS < now.since_ms(at)));
    let old: Vec<_> = old.map(|instance| (instance.account_id.clone(), instance.id.clone())).collect();
    for (account, id) in old {
        tag::remove(tx, &account, &id);
        tx.delete::<Instance>(&account, &id);
    }
}

/// DescribeInstances.
///
/// # Errors
/// The `Malformed` or `NotFound` answer about an id, `InvalidParameterCombination` for ids with a page size; those of filters and pages.
pub fn describe_instances(call: &mut Call<'_>, request: DescribeInstancesRequest) -> Result<DescribeInstancesResult, ApiError> {
    if request.max_results.is_some() && !request.instance_ids.is_empty() {
        return Err(ApiError::invalid_combination("The parameter instancesSet cannot be used with the parameter maxResults"));
    }
    let filters = Filters::new(request.filters, FILTERS)?;
    let page = Page::new("DescribeInstances", request.max_results, request.next_token.as_deref(), 1000)?;
    let rows = INSTANCE.rows::<Instance>(call, &request.instance_ids)?.into_values();
    let mut rows: Vec<_> = rows.filter(|instance| passes(call, &filters, instance)).map(|instance| (place(&instance), instance)).collect();
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    let (instances, next_token) = page.take(rows);
    Ok(DescribeInstancesResult { next_token, reservations: reservations(call, &instances) })
}

/// Instances stand by reservation, then in the order of their launch.
fn place(instance: &Instance) -> String {
    format!("{}/{:010}/{}", instance.reservation_id, instance.launch_index, instance.id)
}

/// Neighbours of one reservation are joined.
fn reservations(call: &Call<'_>, instances: &[Arc<Instance>]) -> Vec<Reservation> {
    instances.chunk_by(|a, b| a.reservation_id == b.reservation_id).map(|chunk| reservation(call, chunk)).collect()
}

fn reservation(call: &Call<'_>, instances: &[Arc<Instance>]) -> Reservation {
    Reservation {
        instances: instances.iter().map(|instance| shape(call, instance)).collect(),
        owner_id: Some(call.account().to_owned()),
        reservation_id: instances.first().map(|instance| instance.reservation_id.clone()),
        ..Default::default()
    }
}

fn shape(call: &Call<'_>, instance: &Instance) -> shapes::Instance {
    let interfaces = interfaces(&call.tx, &instance.account_id, &instance.id);
    let primary = interfaces.first();
    let public = primary.and_then(|interface| network_interface::association(call, interface));
    let private_dns_name = primary.map(|interface| network_interface::private_dns_name(call.region, interface.private_ip));
    let metadata = &instance.metadata_options;
    shapes::Instance {
        ami_launch_index: i32::try_from(instance.launch_index).ok(),
        architecture: Some(instance.architecture.clone()),
        block_device_mappings: volumes(&call.tx, &instance.account_id, &instance.id)
            .iter()
            .filter_map(|volume| block_device(volume))
            .collect(),
        client_token: Some(instance.client_token.clone().unwrap_or_default()),
        ebs_optimized: Some(instance.ebs_optimized),
        ena_support: Some(true),
        hypervisor: Some("xen".to_owned()),
        image_id: Some(instance.image_id.clone()),
        instance_id: Some(instance.id.clone()),
        instance_type: Some(instance.instance_type.clone()),
        key_name: instance.key_name.clone(),
        launch_time: Some(instance.launch_time.into()),
        metadata_options: Some(attribute::metadata_shape(metadata, "applied")),
        monitoring: Some(shapes::Monitoring { state: Some(if instance.monitoring { "enabled" } else { "disabled" }.to_owned()) }),
        network_interfaces: interfaces.iter().map(|interface| interface_shape(call, interface)).collect(),
        placement: Some(shapes::Placement {
            availability_zone: Some(instance.zone.clone()),
            availability_zone_id: call.region.zone(&instance.zone).map(|zone| zone.id.clone()),
            group_name: Some(String::new()),
            tenancy: Some("default".to_owned()),
            ..Default::default()
        }),
        platform: instance.platform.eq_ignore_ascii_case("windows").then(|| "windows".to_owned()),
        platform_details: Some(image::platform_details(&instance.platform)),
        private_dns_name: Some(private_dns_name.unwrap_or_default()),
        private_ip_address: primary.map(|interface| interface.private_ip.to_string()),
        public_dns_name: Some(public.as_ref().and_then(|public| public.public_dns_name.clone()).unwrap_or_default()),
        public_ip_address: public.and_then(|public| public.public_ip),
        root_device_name: Some(instance.root_device_name.clone()),
        root_device_type: Some("ebs".to_owned()),
        security_groups: primary.map(|interface| network_interface::groups(&call.tx, interface)).unwrap_or_default(),
        source_dest_check: primary.map(|interface| interface.source_dest_check),
        state: Some(state_shape(instance.state)),
        state_reason: instance
            .state_reason
            .as_ref()
            .map(|reason| shapes::StateReason { code: Some(reason.code.clone()), message: Some(reason.message.clone()) }),
        state_transition_reason: Some(instance.transition_reason.clone()),
        // What has no interface any more is in no network.
        subnet_id: primary.map(|interface| interface.subnet_id.clone()),
        tags: tag::shapes(&tag::of(&call.tx, &instance.account_id, &instance.id)),
        usage_operation: Some("RunInstances".to_owned()),
        usage_operation_update_time: Some(instance.created.into()),
        virtualization_type: Some("hvm".to_owned()),
        vpc_id: primary.map(|interface| interface.vpc_id.clone()),
        ..Default::default()
    }
}

fn state_shape(state: InstanceState) -> shapes::InstanceState {
    shapes::InstanceState { code: Some(state.code()), name: Some(state.name().to_owned()) }
}

fn block_device(volume: &Volume) -> Option<InstanceBlockDeviceMapping> {
    let attachment = volume.attachment.as_ref()?;
    let ebs = EbsInstanceBlockDevice {
        attach_time: Some(attachment.attach_time.into()),
        delete_on_termination: Some(attachment.delete_on_termination),
        status: Some(attachment.state.name().to_owned()),
        volume_id: Some(volume.id.clone()),
        ..Default::default()
    };
    Some(InstanceBlockDeviceMapping { device_name: Some(attachment.device.clone()), ebs: Some(ebs) })
}

fn interface_shape(call: &Call<'_>, interface: &NetworkInterface) -> InstanceNetworkInterface {
    let association = |ip: Ipv4Addr| {
        network_interface::association_of(call, interface, ip).map(|association| InstanceNetworkInterfaceAssociation {
            ip_owner_id: association.ip_owner_id,
            public_dns_name: association.public_dns_name,
            public_ip: association.public_ip,
            ..Default::default()
        })
    };
    let address = |ip: Ipv4Addr| InstancePrivateIpAddress {
        association: association(ip),
        primary: Some(ip == interface.private_ip),
        private_dns_name: Some(network_interface::private_dns_name(call.region, ip)),
        private_ip_address: Some(ip.to_string()),
    };
    let attachment = interface.attachment.as_ref().map(|attachment| InstanceNetworkInterfaceAttachment {
        attach_time: Some(attachment.attach_time.into()),
        attachment_id: Some(attachment.id.clone()),
        delete_on_termination: Some(attachment.delete_on_termination),
        device_index: i32::try_from(attachment.device_index).ok(),
        network_card_index: Some(0),
        status: Some(attachment.state.name().to_owned()),
        ..Default::default()
    });
    let private_ip_addresses: Vec<_> = interface.private_ips().map(address).collect();
    InstanceNetworkInterface {
        association: private_ip_addresses.first().and_then(|primary| primary.association.clone()),
        private_ip_addresses,
        attachment,
        connection_tracking_configuration: network_interface::instance_tracking_shape(interface),
        description: Some(interface.description.clone()),
        groups: network_interface::groups(&call.tx, interface),
        interface_type: Some("interface".to_owned()),
        mac_address: Some(interface.mac.to_string()),
        network_interface_id: Some(interface.id.clone()),
        owner_id: Some(interface.account_id.clone()),
        private_dns_name: Some(network_interface::private_dns_name(call.region, interface.private_ip)),
        private_ip_address: Some(interface.private_ip.to_string()),
        source_dest_check: Some(interface.source_dest_check),
        status: Some("in-use".to_owned()),
        subnet_id: Some(interface.subnet_id.clone()),
        vpc_id: Some(interface.vpc_id.clone()),
        ..Default::default()
    }
}

const FILTERS: &[&str] = &[
    "affinity",
    "architecture",
    "availability-zone",
    "availability-zone-id",
    "block-device-mapping.attach-time",
    "block-device-mapping.delete-on-termination",
    "block-device-mapping.device-name",
    "block-device-mapping.status",
    "block-device-mapping.volume-id",
    "client-token",
    "dns-name",
    "ebs-optimized",
    "ena-support",
    "hypervisor",
    "image-id",
    "instance-id",
    "instance-lifecycle",
    "instance-state-code",
    "instance-state-name",
    "instance-type",
    "instance.group-id",
    "instance.group-name",
    "ip-address",
    "key-name",
    "launch-index",
    "launch-time",
    "metadata-options.http-endpoint",
    "metadata-options.http-tokens",
    "monitoring-state",
    "network-interface.addresses.association.public-ip",
    "network-interface.addresses.private-ip-address",
    "network-interface.association.public-ip",
    "network-interface.attachment.attachment-id",
    "network-interface.availability-zone",
    "network-interface.description",
    "network-interface.group-id",
    "network-interface.group-name",
    "network-interface.mac-address",
    "network-interface.network-interface-id",
    "network-interface.owner-id",
    "network-interface.private-dns-name",
    "network-interface.private-ip-address",
    "network-interface.source-dest-check",
    "network-interface.status",
    "network-interface.subnet-id",
    "network-interface.vpc-id",
    "owner-id",
    "placement-group-name",
    "platform",
    "platform-details",
    "private-dns-name",
    "private-ip-address",
    "reason",
    "reservation-id",
    "root-device-name",
    "root-device-type",
    "source-dest-check",
    "state-reason-code",
    "state-reason-message",
    "subnet-id",
    "tag",
    "tenancy",
    "virtualization-type",
    "vpc-id",
];

fn passes(call: &Call<'_>, filters: &Filters, instance: &Instance) -> bool {
    if filters.is_empty() {
        return true;
    }
    let (tx, account) = (&call.tx, instance.account_id.as_str());
    let interfaces = interfaces(tx, account, &instance.id);
    let primary = interfaces.first();
    let metadata = &instance.metadata_options;
    filters.pass(&tag::of(tx, account, &instance.id), |name, test| match name {
        "architecture" => test(&instance.architecture),
        "availability-zone" => test(&instance.zone),
        "availability-zone-id" => call.region.zone(&instance.zone).is_some_and(|zone| test(&zone.id)),
        "client-token" => instance.client_token.as_deref().is_some_and(test),
        "dns-name" => primary.is_some_and(|interface| {
            network_interface::association(call, interface).and_then(|public| public.public_dns_name).is_some_and(|name| test(&name))
        }),
        "ebs-optimized" => test(truth(instance.ebs_optimized)),
        "ena-support" => test("true"),
        "hypervisor" => test("xen"),
        "image-id" => test(&instance.image_id),
        "instance-id" => test(&instance.id),
        "instance-state-code" => test(&instance.state.code().to_string()),
        "instance-state-name" => test(instance.state.name()),
        "instance-type" => test(&instance.instance_type),
        "ip-address" => primary.is_some_and(|interface| public_ip(tx, interface, test)),
        "key-name" => instance.key_name.as_deref().is_some_and(test),
        "launch-index" => test(&instance.launch_index.to_string()),
        "launch-time" => test(&Timestamp::from(instance.launch_time).to_text()),
        "metadata-options.http-endpoint" => test(attribute::endpoint_word(metadata)),
        "metadata-options.http-tokens" => test(attribute::tokens_word(metadata)),
        "monitoring-state" => test(if instance.monitoring { "enabled" } else { "disabled" }),
        "owner-id" => test(account),
        "platform" => instance.platform.eq_ignore_ascii_case("windows") && test("windows"),
        "platform-details" => test(&image::platform_details(&instance.platform)),
        "private-dns-name" => {
            primary.is_some_and(|interface| test(&network_interface::private_dns_name(call.region, interface.private_ip)))
        }
        "private-ip-address" => primary.is_some_and(|interface| test(&interface.private_ip.to_string())),
        "reason" => test(&instance.transition_reason),
        "reservation-id" => test(&instance.reservation_id),
        "root-device-name" => test(&instance.root_device_name),
        "root-device-type" => test("ebs"),
        "source-dest-check" => primary.is_some_and(|interface| test(truth(interface.source_dest_check))),
        "state-reason-code" => instance.state_reason.as_ref().is_some_and(|reason| test(&reason.code)),
        "state-reason-message" => instance.state_reason.as_ref().is_some_and(|reason| test(&reason.message)),
        "subnet-id" => primary.is_some_and(|interface| test(&interface.subnet_id)),
        "tenancy" => test("default"),
        "virtualization-type" => test("hvm"),
        "vpc-id" => primary.is_some_and(|interface| test(&interface.vpc_id)),
        name => match name.split_once('.') {
            Some(("block-device-mapping", field)) => {
                tx.find::<Volume>(account, "instance", &instance.id).iter().any(|volume| volume_has(volume, field, test))
            }
            Some(("network-interface", field)) => interfaces.iter().any(|interface| interface_has(call, interface, field, test)),
            Some(("instance", field)) => primary.is_some_and(|interface| interface_has(call, interface, field, test)),
            // Placement groups, hosts and life cycles that no instance here has.
            _ => false,
        },
    })
}

fn volume_has(volume: &Volume, field: &str, test: &dyn Fn(&str) -> bool) -> bool {
    let Some(attachment) = &volume.attachment else { return false };
    match field {
        "attach-time" => test(&Timestamp::from(attachment.attach_time).to_text()),
        "delete-on-termination" => test(truth(attachment.delete_on_termination)),
        "device-name" => test(&attachment.device),
        "status" => test(attachment.state.name()),
        "volume-id" => test(&volume.id),
        _ => false,
    }
}

fn interface_has(call: &Call<'_>, interface: &NetworkInterface, field: &str, test: &dyn Fn(&str) -> bool) -> bool {
    match field {
        "addresses.association.public-ip" => {
            interface.private_ips().filter_map(|ip| address::public_ip_of(&call.tx, interface, ip)).any(|ip| test(&ip.to_string()))
        }
        "association.public-ip" => public_ip(&call.tx, interface, test),
        "addresses.private-ip-address" => interface.private_ips().any(|ip| test(&ip.to_string())),
        "private-ip-address" => test(&interface.private_ip.to_string()),
        "attachment.attachment-id" => interface.attachment.as_ref().is_some_and(|attachment| test(&attachment.id)),
        "availability-zone" => test(&interface.zone),
        "description" => test(&interface.description),
        "group-id" => interface.security_group_ids.iter().any(|id| test(id)),
        "group-name" => network_interface::groups(&call.tx, interface).iter().filter_map(|group| group.group_name.as_deref()).any(test),
        "mac-address" => test(&interface.mac.to_string()),
        "network-interface-id" => test(&interface.id),
        "owner-id" => test(&interface.account_id),
        "private-dns-name" => test(&network_interface::private_dns_name(call.region, interface.private_ip)),
        "source-dest-check" => test(truth(interface.source_dest_check)),
        "status" => test("in-use"),
        "subnet-id" => test(&interface.subnet_id),
        "vpc-id" => test(&interface.vpc_id),
        _ => false,
    }
}

fn public_ip(tx: &Tx<'_>, interface: &NetworkInterface, test: &dyn Fn(&str) -> bool) -> bool {
    address::public_ip(tx, interface).is_some_and(|ip: Ipv4Addr| test(&ip.to_string()))
}

fn truth(value: bool) -> &'static str {
    if value { "true" } else { "false" }
}
