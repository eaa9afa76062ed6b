//! RunInstances.
//!
//! The request is read into a [`Plan`] with every check that EC2 makes; then one
//! transaction claims hosts and shelves and makes all rows: instances, their
//! interfaces and volumes, tags, the event, the client token. The answer says
//! pending; [`crate::reconcile`] does the rest.

mod disks;
mod network;

use std::collections::BTreeMap;
use std::sync::Arc;

use disks::{Disk, disks};
use network::{Interface, network};

use super::attribute::{METADATA_DEFAULTS, decode_user_data, metadata_options, shutdown_behaviour};
use super::{place, reservation};
use crate::error::ApiError;
use crate::event::{self, INSTANCE_LAUNCH_REQUESTED};
use crate::model::{
    AttachmentState, Image, Instance, InstanceState, KeyPair, MetadataOptions, NetworkInterface, NetworkInterfaceAttachment, Placement,
    StateReason, Subnet, VolumeAttachment,
};
use crate::placement::{Demand, Room};
use crate::resource::client_token::{self, Checked};
use crate::resource::id::{IMAGE, INSTANCE, NETWORK_INTERFACE, NETWORK_INTERFACE_ATTACHMENT, VOLUME, unsupported};
use crate::resource::instance_type::{self, InstanceType};
use crate::resource::network_interface::{self, NewInterface};
use crate::resource::tag::{self, Specified};
use crate::resource::volume::{self, NewVolume};
use crate::resource::{address, image, subnet};
use crate::shapes::{Reservation, RunInstancesRequest};
use crate::world::Call;

/// RunInstances.
///
/// # Errors
/// The exact codes of EC2 for what is wrong with the request, `InsufficientInstanceCapacity` (as EC2, with status 500) when fewer than
/// `MinCount` fit.
pub fn run_instances(call: &mut Call<'_>, mut request: RunInstancesRequest) -> Result<Reservation, ApiError> {
    let token = request.client_token.take().filter(|token| !token.is_empty());
    request.dry_run = None;
    let fresh = match client_token::check(call, "RunInstances", token.as_deref(), &request)? {
        Checked::First(fresh) => fresh,
        Checked::Repeated(reservation_id) => return repeated(call, &reservation_id),
    };
    let plan = Plan::new(call, token, request)?;
    let reservation_id = call.tx.new_id("r");
    plan.launch(call, &reservation_id)?;
    fresh.remember(call, &reservation_id);
    Ok(of_reservation(call, &reservation_id))
}

fn repeated(call: &Call<'_>, reservation_id: &str) -> Result<Reservation, ApiError> {
    let instances = call.find::<Instance>("reservation", reservation_id);
    if instances.iter().all(|instance| instance.state == InstanceState::Terminated) {
        let message = "The request to launch an instance uses the same client token as a previous request for which the instance has been terminated.";
        return Err(ApiError::new("IdempotentInstanceTerminated", message));
    }
    Ok(of_reservation(call, reservation_id))
}

fn of_reservation(call: &Call<'_>, reservation_id: &str) -> Reservation {
    let mut instances = call.find::<Instance>("reservation", reservation_id);
    instances.sort_by_key(|instance| place(instance));
    reservation(call, &instances)
}

/// The answer when no host of the zone has the room.
pub(super) fn no_capacity(kind: &str, zone: &str) -> ApiError {
    let message = format!(
        "We currently do not have sufficient {kind} capacity in the Availability Zone you requested ({zone}). Our system will be working on provisioning additional capacity."
    );
    ApiError::with_status(500, "InsufficientInstanceCapacity", message)
}

/// A launch, checked.
struct Plan {
    least: u64,
    most: u64,
    image: Arc<Image>,
    kind: &'static InstanceType,
    demand: Demand,
    key: Option<Arc<KeyPair>>,
    /// Where it may go; the zone with the most room is taken.
    subnets: Vec<Arc<Subnet>>,
    /// The primary one first.
    interfaces: Vec<Interface>,
    disks: Vec<Disk>,
    user_data: Vec<u8>,
    metadata_options: MetadataOptions,
    disable_api_termination: bool,
    disable_api_stop: bool,
    terminate_on_shutdown: bool,
    ebs_optimized: bool,
    monitoring: bool,
    cpu_credits: Option<String>,
    token: Option<String>,
    tags: Specified,
}

/// What one instance got.
struct Claim {
    host: Placement,
    /// A storage card for each disk.
    shelves: Vec<String>,
}

impl Plan {
    fn new(call: &Call<'_>, token: Option<String>, mut request: RunInstancesRequest) -> Result<Self, ApiError> {
        refuse_unsupported(&request)?;
        let (least, most) = counts(request.min_count, request.max_count)?;
        let image_id = IMAGE.required(request.image_id.take(), "ImageId")?;
        let image = image::visible(call, &image_id).ok_or_else(|| IMAGE.not_found(&image_id))?;
        let kind = kind(request.instance_type.as_deref())?;
        instance_type::check_architecture(kind, &image.architecture)?;
        let key = match &request.key_name {
            None => None,
            Some(name) => {
                let found = call.find::<KeyPair>("name", name).into_iter().next();
                Some(found.ok_or_else(|| ApiError::new("InvalidKeyPair.NotFound", format!("The key pair '{name}' does not exist")))?)
            }
        };
        let (subnets, interfaces) = network(call, &mut request, kind, most)?;
        let credits = request.credit_specification.and_then(|credits| credits.cpu_credits);
        if let Some(word) = &credits {
            check_credits(kind, word)?;
        }
        Ok(Self {
            least,
            most,
            kind,
            demand: Demand { vcpus: kind.vcpus, memory_mib: kind.memory_mib },
            key,
            subnets,
            interfaces,
            disks: disks(&image, std::mem::take(&mut request.block_device_mappings))?,
            image,
            user_data: request.user_data.as_deref().map(decode_user_data).transpose()?.unwrap_or_default(),
            metadata_options: metadata_options(METADATA_DEFAULTS, request.metadata_options)?,
            disable_api_termination: request.disable_api_termination == Some(true),
            disable_api_stop: request.disable_api_stop == Some(true),
            terminate_on_shutdown: request
                .instance_initiated_shutdown_behavior
                .as_deref()
                .map(shutdown_behaviour)
                .transpose()?
                .unwrap_or(false),
            ebs_optimized: request.ebs_optimized == Some(true),
            monitoring: request.monitoring.and_then(|monitoring| monitoring.enabled) == Some(true),
            cpu_credits: credits,
            token,
            tags: Specified::new(request.tag_specifications, &[&INSTANCE, &VOLUME, &NETWORK_INTERFACE])?,
        })
    }

    fn launch(self, call: &mut Call<'_>, reservation_id: &str) -> Result<(), ApiError> {
        let room = Room::of(&call.tx);
        let subnet = self
            .subnet(&room)
            .ok_or_else(|| ApiError::new("MissingInput", "No subnets found for the default VPC. Please specify a subnet."))?;
        for (index, claim) in self.claims(call, room, &subnet)?.into_iter().enumerate() {
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            self.insert(call, reservation_id, index, &subnet, claim)?;
        }
        Ok(())
    }

    /// The subnet whose zone has the most room; the first of equals, so that small regions fill in order.
    fn subnet(&self, room: &Room) -> Option<Arc<Subnet>> {
        let mut best: Option<(u64, &Arc<Subnet>)> = None;
        for subnet in &self.subnets {
            let instances = room.instances(&subnet.zone, self.demand);
            if best.is_none_or(|(most, _)| most < instances) {
                best = Some((instances, subnet));
            }
        }
        best.map(|(_, subnet)| Arc::clone(subnet))
    }

    /// Claims for as many instances as fit, `MinCount` at least.
    fn claims(&self, call: &Call<'_>, mut room: Room, subnet: &Subnet) -> Result<Vec<Claim>, ApiError> {
        let mut most = self.most;
        for (subnet, each) in self.addresses(subnet) {
            let instances = u64::from(subnet::available(&call.tx, subnet)).checked_div(each).unwrap_or(u64::MAX);
            if instances < self.least {
                let message =
                    format!("There are not enough free addresses in subnet '{}' to satisfy the requested number of instances.", subnet.id);
                return Err(ApiError::new("InsufficientFreeAddressesInSubnet", message));
            }
            most = most.min(instances);
        }
        let mut claims = Vec::new();
        let reached = |claims: &Vec<Claim>| u64::try_from(claims.len()).unwrap_or(u64::MAX);
        while reached(&claims) < most {
            let mut trial = room.clone();
            match self.claim(&mut trial, &subnet.zone) {
                Ok(claim) => claims.push(claim),
                Err(error) if reached(&claims) < self.least => return Err(error),
                Err(_) => break,
            }
            room = trial;
        }
        Ok(claims)
    }

    /// How many addresses each instance takes from which subnet.
    fn addresses<'a>(&'a self, launch: &'a Subnet) -> Vec<(&'a Subnet, u64)> {
        let mut all = BTreeMap::<&str, (&Subnet, u64)>::new();
        for interface in self.interfaces.iter().filter(|interface| interface.existing.is_none()) {
            let subnet = interface.subnet.as_deref().unwrap_or(launch);
            let (_, each) = all.entry(&subnet.id).or_insert((subnet, 0));
            *each = each.saturating_add(u64::try_from(interface.addresses.count()).unwrap_or(u64::MAX));
        }
        all.into_values().collect()
    }

    fn claim(&self, room: &mut Room, zone: &str) -> Result<Claim, ApiError> {
        let host = room.claim_instance(zone, self.demand).ok_or_else(|| no_capacity(self.kind.name, zone))?;
        let shelf = |disk: &Disk| room.claim_volume(zone, u64::from(disk.form.size_gib)).ok_or_else(volume::no_capacity);
        Ok(Claim { host, shelves: self.disks.iter().map(shelf).collect::<Result<_, _>>()? })
    }

    fn insert(&self, call: &mut Call<'_>, reservation_id: &str, index: u32, subnet: &Subnet, claim: Claim) -> Result<(), ApiError> {
        let (account, now) = (call.account().to_owned(), call.now);
        let id = call.tx.new_id(INSTANCE.prefix);
        let card_id = claim.host.card_id.clone();
        call.tx.put(Instance {
            account_id: account.clone(),
            id: id.clone(),
            reservation_id: reservation_id.to_owned(),
            launch_index: index,
            image_id: self.image.id.clone(),
            instance_type: self.kind.name.to_owned(),
            state: InstanceState::Pending,
            state_reason: Some(StateReason { code: "pending".to_owned(), message: "pending".to_owned() }),
            transition_reason: String::new(),
            key_name: self.key.as_ref().map(|key| key.name.clone()),
            public_key: self.key.as_ref().map(|key| key.public_key.clone()),
            vpc_id: subnet.vpc_id.clone(),
            subnet_id: subnet.id.clone(),
            zone: subnet.zone.clone(),
            user_data: self.user_data.clone(),
            metadata_options: self.metadata_options.clone(),
            disable_api_termination: self.disable_api_termination,
            disable_api_stop: self.disable_api_stop,
            terminate_on_shutdown: self.terminate_on_shutdown,
            ebs_optimized: self.ebs_optimized,
            monitoring: self.monitoring,
            cpu_credits: self.cpu_credits.clone(),
            root_device_name: self.image.root_device_name.clone(),
            architecture: self.image.architecture.clone(),
            platform: self.image.platform.clone(),
            boot: self.image.boot.clone(),
            launch_time: now,
            created: now,
            terminated: None,
            client_token: self.token.clone(),
            placement: Some(claim.host),
            boot_count: 0,
            halted: false,
        });
        tag::set(&mut call.tx, &account, &INSTANCE, &id, self.tags.tags(&INSTANCE));
        for interface in &self.interfaces {
            self.insert_interface(call, &account, &id, interface, interface.subnet.as_deref().unwrap_or(subnet))?;
        }
        for (disk, card_id) in self.disks.iter().zip(claim.shelves) {
            let attachment = VolumeAttachment {
                instance_id: id.clone(),
                device: disk.device.clone(),
                state: AttachmentState::Attaching,
                attach_time: now,
                delete_on_termination: disk.delete_on_termination,
                root: disk.root,
            };
            let new = NewVolume {
                account: &account,
                zone: &subnet.zone,
                form: disk.form.clone(),
                encryption: disk.encryption.clone(),
                image_object: disk.root.then(|| self.image.object.clone()),
                attachment: Some(attachment),
                card_id,
            };
            let volume = volume::insert(&mut call.tx, now, new);
            tag::set(&mut call.tx, &account, &VOLUME, &volume.id, self.tags.tags(&VOLUME));
        }
        let detail = [
            ("reservation", reservation_id),
            ("zone", subnet.zone.as_str()),
            ("instance-type", self.kind.name),
            ("card", card_id.as_str()),
        ];
        event::emit(&mut call.tx, now, &account, INSTANCE_LAUNCH_REQUESTED, &id, &detail);
        Ok(())
    }

    fn insert_interface(
        &self,
        call: &mut Call<'_>,
        account: &str,
        instance_id: &str,
        plan: &Interface,
        subnet: &Subnet,
    ) -> Result<(), ApiError> {
        let attachment = NetworkInterfaceAttachment {
            id: call.tx.new_id(NETWORK_INTERFACE_ATTACHMENT.prefix),
            instance_id: instance_id.to_owned(),
            device_index: plan.device_index,
            attach_time: call.now,
            delete_on_termination: plan.delete_on_termination,
            state: AttachmentState::Attaching,
        };
        if let Some(existing) = &plan.existing {
            call.tx.update::<NetworkInterface>(account, &existing.id, |row| row.attachment = Some(attachment));
            return Ok(());
        }
        let associate_public_ip = plan.public_ip.unwrap_or(subnet.map_public_ip_on_launch);
        let new = NewInterface {
            subnet,
            addresses: plan.addresses.clone(),
            security_group_ids: plan.groups.clone(),
            description: plan.description.clone(),
            attachment: Some(attachment),
            associate_public_ip,
            connection_tracking: plan.connection_tracking,
        };
        let interface = network_interface::insert(&mut call.tx, call.now, new)?;
        if associate_public_ip {
            address::auto_take(&mut call.tx, call.region, account, &interface.id)?;
        }
        tag::set(&mut call.tx, account, &NETWORK_INTERFACE, &interface.id, self.tags.tags(&NETWORK_INTERFACE));
        Ok(())
    }
}

/// What EC2 has and this region has not is refused, never ignored.
fn refuse_unsupported(request: &RunInstancesRequest) -> Result<(), ApiError> {
    let placement = request.placement.clone().unwrap_or_default();
    unsupported(&[
        ("AdditionalInfo", request.additional_info.is_some()),
        (
            "CapacityReservationSpecification",
            request.capacity_reservation_specification.as_ref().is_some_and(|asked| asked.capacity_reservation_target.is_some()),
        ),
        ("CpuOptions", request.cpu_options.is_some()),
        ("ElasticGpuSpecification", !request.elastic_gpu_specification.is_empty()),
        ("ElasticInferenceAccelerator", !request.elastic_inference_accelerators.is_empty()),
        ("EnablePrimaryIpv6", request.enable_primary_ipv6 == Some(true)),
        ("EnclaveOptions", request.enclave_options.as_ref().is_some_and(|asked| asked.enabled == Some(true))),
        ("HibernationOptions", request.hibernation_options.as_ref().is_some_and(|asked| asked.configured == Some(true))),
        ("IamInstanceProfile", request.iam_instance_profile.is_some()),
        ("InstanceMarketOptions", request.instance_market_options.is_some()),
        ("Ipv6AddressCount", request.ipv6_address_count.is_some_and(|count| count != 0)),
        ("Ipv6Address", !request.ipv6_addresses.is_empty()),
        ("KernelId", request.kernel_id.is_some()),
        ("LaunchTemplate", request.launch_template.is_some()),
        ("LicenseSpecification", !request.license_specifications.is_empty()),
        (
            "MaintenanceOptions",
            request.maintenance_options.as_ref().is_some_and(|asked| asked.auto_recovery.as_deref() == Some("disabled")),
        ),
        ("NetworkPerformanceOptions", request.network_performance_options.is_some()),
        ("Operator", request.operator.is_some()),
        (
            "PrivateDnsNameOptions",
            request.private_dns_name_options.as_ref().is_some_and(|asked| {
                asked.hostname_type.as_deref().is_some_and(|kind| kind != "ip-name")
                    || asked.enable_resource_name_dns_aaaa_record == Some(true)
                    || asked.enable_resource_name_dns_a_record == Some(true)
            }),
        ),
        ("RamdiskId", request.ramdisk_id.is_some()),
        ("SecondaryInterface", !request.secondary_interfaces.is_empty()),
        ("Placement.Affinity", placement.affinity.is_some()),
        ("Placement.GroupName", placement.group_name.is_some_and(|name| !name.is_empty())),
        ("Placement.GroupId", placement.group_id.is_some()),
        ("Placement.HostId", placement.host_id.is_some()),
        ("Placement.HostResourceGroupArn", placement.host_resource_group_arn.is_some()),
        ("Placement.PartitionNumber", placement.partition_number.is_some()),
        ("Placement.SpreadDomain", placement.spread_domain.is_some()),
        ("Placement.Tenancy", placement.tenancy.is_some_and(|tenancy| tenancy != "default")),
    ])
}

fn counts(least: Option<i32>, most: Option<i32>) -> Result<(u64, u64), ApiError> {
    let count = |name: &str, value: Option<i32>| {
        let value = value.ok_or_else(|| ApiError::missing_parameter(name))?;
        u64::try_from(value)
            .ok()
            .filter(|count| 0 < *count)
            .ok_or_else(|| ApiError::invalid_value(format!("Value ({value}) for parameter {name} is invalid. Minimum is 1.")))
    };
    let (least, most) = (count("minCount", least)?, count("maxCount", most)?);
    if most < least {
        return Err(ApiError::invalid_value(format!(
            "Value ({most}) for parameter maxCount is invalid. It is lower than minCount ({least})."
        )));
    }
    Ok((least, most))
}

fn kind(name: Option<&str>) -> Result<&'static InstanceType, ApiError> {
    // EC2's default of 2006, which a catalogue need not have.
    let Some(name) = name else {
        return instance_type::find("m1.small").ok_or_else(|| ApiError::missing_parameter("InstanceType"));
    };
    instance_type::find(name).ok_or_else(|| ApiError::invalid_value(format!("Invalid value '{name}' for InstanceType.")))
}

fn check_credits(kind: &InstanceType, word: &str) -> Result<(), ApiError> {
    if !matches!(word, "standard" | "unlimited") {
        return Err(ApiError::invalid_parameter("cpuCredits", word));
    }
    if !kind.is_burstable() {
        let message = format!("The CreditSpecification parameter is not supported for instance type {}", kind.name);
        return Err(ApiError::invalid_combination(message));
    }
    Ok(())
}
