//! EBS volumes.
//!
//! ```text
//! creating -> available -> in-use -> available -> deleting -> (gone)
//!                          attaching -> attached -> detaching
//! ```
//!
//! A storage card of the zone keeps the volume from creation on. Requests move
//! to creating, in-use/attaching, detaching and deleting; the reconciler moves on
//! when the cards say so. Encryption is recorded and shown as asked; the blocks
//! themselves are not encrypted yet.

use super::client_token::{self, Checked};
use super::filter::{Filters, Page};
use super::id::{INSTANCE, VOLUME, unsupported};
use super::tag;
use crate::error::ApiError;
use crate::model::{AttachmentState, Instance, InstanceState, Time, Volume, VolumeAttachment, VolumeState};
use crate::placement::Room;
use crate::shape::Timestamp;
use crate::shapes::{
    self, AttachVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, DescribeVolumesRequest, DescribeVolumesResult, DetachVolumeRequest,
};
use crate::world::{Call, Region, Tx};

/// What EC2 allows for one volume type.
struct Limits {
    kind: &'static str,
    size_gib: (u32, u32),
    /// Range and most IOPS for each GiB, where IOPS can be asked for.
    iops: Option<(u32, u32, u32)>,
    /// The IOPS of a volume for which nobody asked, by its size.
    default_iops: fn(u32) -> Option<u32>,
}

const fn unspecified(_: u32) -> Option<u32> {
    None
}

const LIMITS: [Limits; 7] = [
    Limits { kind: "gp2", size_gib: (1, 16_384), iops: None, default_iops: |size| Some(size.saturating_mul(3).clamp(100, 16_000)) },
    Limits { kind: "gp3", size_gib: (1, 65_536), iops: Some((3_000, 80_000, 500)), default_iops: |_| Some(3_000) },
    Limits { kind: "io1", size_gib: (4, 16_384), iops: Some((100, 64_000, 50)), default_iops: unspecified },
    Limits { kind: "io2", size_gib: (4, 65_536), iops: Some((100, 256_000, 1_000)), default_iops: unspecified },
    Limits { kind: "st1", size_gib: (125, 16_384), iops: None, default_iops: unspecified },
    Limits { kind: "sc1", size_gib: (125, 16_384), iops: None, default_iops: unspecified },
    Limits { kind: "standard", size_gib: (1, 1_024), iops: None, default_iops: unspecified },
];

/// gp3 alone has a throughput to choose, in MiB/s.
const GP3_THROUGHPUT: (u32, u32) = (125, 2_000);
/// gp3: most MiB/s are IOPS / this.
const GP3_IOPS_PER_MIB: u32 = 4;

/// The most volumes of one instance, as on Nitro.
pub const MOST_ATTACHMENTS: usize = 28;

/// Size and speed of a volume, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // as in the row
pub struct Form {
    pub kind: String,
    pub size_gib: u32,
    pub iops: Option<u32>,
    pub throughput_mib_s: Option<u32>,
}

impl Form {
    /// Checks a form against the limits of its type.
    ///
    /// # Errors
    /// `InvalidParameterValue` outside a range or ratio, `InvalidParameterCombination` for what the type has not, `MissingParameter`
    /// for IOPS that the type demands.
    pub fn new(kind: &str, size_gib: i32, iops: Option<i32>, throughput: Option<i32>) -> Result<Self, ApiError> {
        let limits = LIMITS.iter().find(|limits| limits.kind == kind).ok_or_else(|| ApiError::invalid_parameter("volumeType", kind))?;
        let (least, most) = limits.size_gib;
        let too = |word: &str, bound: &str, limit: u32| {
            ApiError::invalid_value(format!("Volume of {size_gib}GiB is too {word} for volume type {kind}; {bound} is {limit}GiB."))
        };
        let size_gib = u32::try_from(size_gib).unwrap_or(0);
        if size_gib < least {
            return Err(too("small", "minimum", least));
        }
        if most < size_gib {
            return Err(too("large", "maximum", most));
        }
        let iops = match (iops, limits.iops) {
            (Some(_), None) => {
                return Err(ApiError::invalid_combination(format!("The parameter iops is not supported for {kind} volumes.")));
            }
            (Some(iops), Some(range)) => Some(checked_iops(iops, range, size_gib)?),
            (None, Some(_)) if (limits.default_iops)(size_gib).is_none() => {
                return Err(ApiError::new("MissingParameter", format!("The parameter iops must be specified for {kind} volumes.")));
            }
            (None, _) => (limits.default_iops)(size_gib),
        };
        let throughput_mib_s = match throughput {
            None => (kind == "gp3").then_some(GP3_THROUGHPUT.0),
            Some(_) if kind != "gp3" => {
                return Err(ApiError::invalid_combination(format!("The parameter throughput is not supported for {kind} volumes.")));
            }
            Some(throughput) => Some(checked_throughput(throughput, iops.unwrap_or(0))?),
        };
        Ok(Self { kind: kind.to_owned(), size_gib, iops, throughput_mib_s })
    }
}

fn checked_iops(iops: i32, (least, most, per_gib): (u32, u32, u32), size_gib: u32) -> Result<u32, ApiError> {
    let number = u32::try_from(iops).unwrap_or(0);
    if number < least {
        return Err(ApiError::invalid_value(format!("Volume iops of {iops} is too low; minimum is {least}.")));
    }
    if most < number {
        return Err(ApiError::invalid_value(format!("Volume iops of {iops} is too high; maximum is {most}.")));
    }
    // The floor of a type is always allowed, however small the volume.
    if number != least && size_gib.saturating_mul(per_gib) < number {
        let ratio = f64::from(number) / f64::from(size_gib);
        return Err(ApiError::invalid_value(format!("Iops to volume size ratio of {ratio:.6} is too high; maximum is {per_gib}.000000.")));
    }
    Ok(number)
}

fn checked_throughput(throughput: i32, iops: u32) -> Result<u32, ApiError> {
    let (least, most) = GP3_THROUGHPUT;
    let number = u32::try_from(throughput).unwrap_or(0);
    if number < least {
        return Err(ApiError::invalid_value(format!("Volume throughput of {throughput} is too low; minimum is {least}.")));
    }
    if most < number {
        return Err(ApiError::invalid_value(format!("Volume throughput of {throughput} is too high; maximum is {most}.")));
    }
    if iops < number.saturating_mul(GP3_IOPS_PER_MIB) {
        let ratio = f64::from(number) / f64::from(iops);
        return Err(ApiError::invalid_value(format!(
            "Throughput (MiBps) to iops ratio of {ratio:.6} is too high; maximum is 0.250000 MiBps per iops."
        )));
    }
    Ok(number)
}

/// What is asked about encryption.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encryption {
    encrypted: bool,
    kms_key_id: Option<String>,
}

impl Encryption {
    /// Reads `Encrypted` and `KmsKeyId`.
    ///
    /// # Errors
    /// `InvalidParameterDependency` for a key without encryption.
    pub fn new(encrypted: Option<bool>, kms_key_id: Option<String>) -> Result<Self, ApiError> {
        let encrypted = encrypted == Some(true);
        if kms_key_id.is_some() && !encrypted {
            let message = "The parameter KmsKeyId requires the parameter Encrypted to be set.";
            return Err(ApiError::new("InvalidParameterDependency", message));
        }
        Ok(Self { encrypted, kms_key_id })
    }
}

/// What a new volume is made of.
#[allow(missing_docs)] // as in the row
pub struct NewVolume<'a> {
    pub account: &'a str,
    pub zone: &'a str,
    pub form: Form,
    pub encryption: Encryption,
    pub image_object: Option<String>,
    pub attachment: Option<VolumeAttachment>,
    /// Where its room was claimed.
    pub card_id: String,
}

/// Makes the row of a volume.
pub fn insert(tx: &mut Tx<'_>, now: Time, new: NewVolume<'_>) -> Volume {
    let volume = Volume {
        account_id: new.account.to_owned(),
        id: tx.new_id(VOLUME.prefix),
        zone: new.zone.to_owned(),
        size_gib: new.form.size_gib,
        kind: new.form.kind,
        iops: new.form.iops,
        throughput_mib_s: new.form.throughput_mib_s,
        encrypted: new.encryption.encrypted,
        kms_key_id: new.encryption.kms_key_id,
        multi_attach: false,
        state: VolumeState::Creating,
        image_object: new.image_object,
        attachment: new.attachment,
        card_id: new.card_id,
        created: now,
    };
    tx.put(volume.clone());
    volume
}

/// The answer when no storage card of the zone has the room.
pub fn no_capacity() -> ApiError {
    let message =
        "There is not enough capacity to fulfill your EBS volume request in the Availability Zone. Try again later or use another zone.";
    ApiError::with_status(500, "InsufficientVolumeCapacity", message)
}

/// CreateVolume.
///
/// # Errors
/// `InvalidZone.NotFound`, `InsufficientVolumeCapacity`, `InvalidSnapshot.NotFound`, `MissingParameter`, those of forms, client tokens and tags.
pub fn create_volume(call: &mut Call<'_>, mut request: CreateVolumeRequest) -> Result<shapes::Volume, ApiError> {
    let token = request.client_token.take();
    request.dry_run = None;
    let fresh = match client_token::check(call, "CreateVolume", token.as_deref(), &request)? {
        Checked::First(fresh) => fresh,
        Checked::Repeated(id) => return Ok(shape(call, &*VOLUME.row::<Volume>(call, &id)?)),
    };
    unsupported(&[
        ("OutpostArn", request.outpost_arn.is_some()),
        ("Operator", request.operator.is_some()),
        ("VolumeInitializationRate", request.volume_initialization_rate.is_some()),
        ("MultiAttachEnabled", request.multi_attach_enabled == Some(true)),
    ])?;
    let zone = zone(call.region, request.availability_zone.as_deref(), request.availability_zone_id.as_deref())?;
    if let Some(snapshot) = &request.snapshot_id {
        return Err(no_snapshot(snapshot));
    }
    let Some(size) = request.size else {
        return Err(ApiError::new("MissingParameter", "The request must contain the parameter size/snapshot"));
    };
    let form = Form::new(request.volume_type.as_deref().unwrap_or("gp2"), size, request.iops, request.throughput)?;
    let encryption = Encryption::new(request.encrypted, request.kms_key_id)?;
    let tags = tag::specified(request.tag_specifications, &VOLUME)?;
    let account = call.account().to_owned();
    let card_id = Room::of(&call.tx).claim_volume(&zone, u64::from(form.size_gib)).ok_or_else(no_capacity)?;
    let new = NewVolume { account: &account, zone: &zone, form, encryption, image_object: None, attachment: None, card_id };
    let volume = insert(&mut call.tx, call.now, new);
    tag::set(&mut call.tx, &account, &VOLUME, &volume.id, tags);
    fresh.remember(call, &volume.id);
    Ok(shape(call, &volume))
}

fn zone(region: &Region, name: Option<&str>, id: Option<&str>) -> Result<String, ApiError> {
    let found = match (name, id) {
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid_combination("The parameters AvailabilityZone and AvailabilityZoneId exclude each other"));
        }
        (Some(name), None) => region.zone(name),
        (None, Some(id)) => region.zones.iter().find(|zone| zone.id == id),
        (None, None) => return Err(ApiError::missing_parameter("availabilityZone")),
    };
    let asked = name.or(id).unwrap_or_default();
    found.map(|zone| zone.name.clone()).ok_or_else(|| ApiError::new("InvalidZone.NotFound", format!("The zone '{asked}' does not exist.")))
}

/// There are no snapshots yet, so every snapshot id is an unknown one.
pub fn no_snapshot(id: &str) -> ApiError {
    const SNAPSHOT: &str = "snap-";
    let digits = id.strip_prefix(SNAPSHOT).unwrap_or_default();
    if matches!(digits.len(), 8 | 17) && digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return ApiError::new("InvalidSnapshot.NotFound", format!("The snapshot '{id}' does not exist."));
    }
    ApiError::malformed_id("InvalidSnapshotID", id, "snap-...")
}

/// DeleteVolume.
///
/// # Errors
/// `VolumeInUse` while attached, `IncorrectState` while it is being made.
pub fn delete_volume(call: &mut Call<'_>, request: DeleteVolumeRequest) -> Result<(), ApiError> {
    let id = VOLUME.required(request.volume_id, "VolumeId")?;
    let volume = VOLUME.row::<Volume>(call, &id)?;
    if let Some(attachment) = &volume.attachment {
        let message = format!("Volume {id} is currently attached to {}", attachment.instance_id);
        return Err(ApiError::new("VolumeInUse", message));
    }
    match volume.state {
        VolumeState::Available | VolumeState::Error => {}
        VolumeState::Deleting => return Err(VOLUME.not_found(&id)),
        state => return Err(ApiError::new("IncorrectState", format!("Volume '{id}' is in the '{}' state.", state.name()))),
    }
    let account = call.account().to_owned();
    begin_delete(&mut call.tx, &account, &id);
    Ok(())
}

/// Lets a volume go; its row stays until the storage card has forgotten it.
pub fn begin_delete(tx: &mut Tx<'_>, account: &str, id: &str) {
    tx.update::<Volume>(account, id, |volume| {
        volume.attachment = None;
        volume.state = VolumeState::Deleting;
    });
}

/// AttachVolume.
///
/// # Errors
/// `VolumeInUse`, `IncorrectState`, `InvalidVolume.ZoneMismatch`, `AttachmentLimitExceeded`, `InvalidParameterValue` for the device.
pub fn attach_volume(call: &mut Call<'_>, request: AttachVolumeRequest) -> Result<shapes::VolumeAttachment, ApiError> {
    unsupported(&[("EbsCardIndex", request.ebs_card_index.is_some_and(|index| index != 0))])?;
    let id = VOLUME.required(request.volume_id, "VolumeId")?;
    let instance_id = INSTANCE.required(request.instance_id, "InstanceId")?;
    let device = request.device.ok_or_else(|| ApiError::missing_parameter("device"))?;
    let volume = VOLUME.row::<Volume>(call, &id)?;
    let instance = INSTANCE.row::<Instance>(call, &instance_id)?;
    if volume.attachment.is_some() {
        return Err(ApiError::new("VolumeInUse", format!("{id} is already attached to an instance")));
    }
    if volume.state != VolumeState::Available {
        return Err(ApiError::new("IncorrectState", format!("Volume '{id}' is not 'available'.")));
    }
    if !matches!(instance.state, InstanceState::Running | InstanceState::Stopped) {
        return Err(ApiError::new("IncorrectState", format!("Instance '{instance_id}' is not 'running'.")));
    }
    if volume.zone != instance.zone {
        let message = format!("The volume '{id}' is not in the same availability zone as instance '{instance_id}'");
        return Err(ApiError::new("InvalidVolume.ZoneMismatch", message));
    }
    let others = call.find::<Volume>("instance", &instance_id);
    if MOST_ATTACHMENTS <= others.len() {
        return Err(ApiError::new(
            "AttachmentLimitExceeded",
            format!("Instance '{instance_id}' already has {MOST_ATTACHMENTS} attachments."),
        ));
    }
    let taken: Vec<_> = others.iter().filter_map(|other| other.attachment.as_ref()).collect();
    check_device(&device, taken.iter().map(|attachment| attachment.device.as_str()))?;
    // A stopped instance that has lost its root volume can be given another one.
    let root = device_place(&device) == device_place(&instance.root_device_name);
    let attachment = VolumeAttachment {
        instance_id,
        device,
        // Without a machine there is no card to wait for.
        state: if instance.placement.is_some() { AttachmentState::Attaching } else { AttachmentState::Attached },
        attach_time: call.now,
        delete_on_termination: false,
        root,
    };
    let answer = attachment_shape(&id, &attachment, Some(AttachmentState::Attaching.name()));
    let account = call.account().to_owned();
    call.tx.update::<Volume>(&account, &id, |volume| {
        volume.state = VolumeState::InUse;
        volume.attachment = Some(attachment);
    });
    Ok(answer)
}

/// Refuses a device name that EC2 does not know or that an instance already uses; `/dev/sdf` and `/dev/xvdf` are one device.
///
/// # Errors
/// `InvalidParameterValue`.
pub fn check_device<'a>(device: &str, mut taken: impl Iterator<Item = &'a str>) -> Result<(), ApiError> {
    let Some(place) = device_place(device) else {
        return Err(ApiError::invalid_value(format!(
            "Value ({device}) for parameter device is invalid. {device} is not a valid EBS device name."
        )));
    };
    if taken.any(|other| device_place(other) == Some(place)) {
        return Err(ApiError::invalid_value(format!(
            "Invalid value '{device}' for unixDevice. Attachment point {device} is already in use"
        )));
    }
    Ok(())
}

/// What stands behind `/dev/sd` or `/dev/xvd`: one or two letters, and a partition number on `sd` names.
fn device_place(device: &str) -> Option<&str> {
    let place = device.strip_prefix("/dev/xvd").or_else(|| device.strip_prefix("/dev/sd"))?;
    let letters = place.trim_end_matches(|character: char| character.is_ascii_digit());
    let number = place.get(letters.len()..).unwrap_or_default();
    let plain = matches!(letters.len(), 1 | 2) && letters.bytes().all(|byte| byte.is_ascii_lowercase());
    let numbered = number.is_empty() || number.parse::<u8>().is_ok_and(|number| (1..=15).contains(&number)) && !number.starts_with('0');
    (plain && numbered).then_some(place)
}

/// DetachVolume. With `Force` the volume is free at once: its storage card lets no other initiator in than the next one's.
///
/// # Errors
/// `IncorrectState` when it is not attached, `InvalidAttachment.NotFound` for another instance or device, `OperationNotPermitted` for
/// the root volume of an instance that is not stopped.
pub fn detach_volume(call: &mut Call<'_>, request: DetachVolumeRequest) -> Result<shapes::VolumeAttachment, ApiError> {
    let id = VOLUME.required(request.volume_id, "VolumeId")?;
    let volume = VOLUME.row::<Volume>(call, &id)?;
    let Some(attachment) = volume.attachment.clone() else {
        return Err(ApiError::new("IncorrectState", format!("Volume '{id}' is in the '{}' state.", volume.state.name())));
    };
    let instance_id = &attachment.instance_id;
    if let Some(asked) = &request.instance_id {
        INSTANCE.check(asked)?;
        call.get::<Instance>(asked).ok_or_else(|| INSTANCE.not_found(asked))?;
        if asked != instance_id {
            let message = format!("The volume '{id}' is not attached to instance '{asked}'.");
            return Err(ApiError::new("InvalidAttachment.NotFound", message));
        }
    }
    if let Some(device) = request.device.as_ref().filter(|device| **device != attachment.device) {
        let message = format!("The volume '{id}' is not attached to instance '{instance_id}' as device '{device}'.");
        return Err(ApiError::new("InvalidAttachment.NotFound", message));
    }
    let instance = call.get::<Instance>(instance_id);
    let placed = instance.as_ref().is_some_and(|instance| instance.placement.is_some());
    if attachment.root && placed {
        let message = format!("Unable to detach root volume '{id}' from instance '{instance_id}'");
        return Err(ApiError::new("OperationNotPermitted", message));
    }
    let force = request.force == Some(true);
    if attachment.state == AttachmentState::Detaching && !force {
        return Err(ApiError::new("IncorrectState", format!("Volume '{id}' is in the 'detaching' state.")));
    }
    let account = call.account().to_owned();
    call.tx.update::<Volume>(&account, &id, |volume| match &mut volume.attachment {
        Some(attachment) if placed && !force => attachment.state = AttachmentState::Detaching,
        _ => release(volume),
    });
    Ok(attachment_shape(&id, &attachment, Some(AttachmentState::Detaching.name())))
}

/// The size in bytes.
pub fn size_bytes(volume: &Volume) -> u64 {
    u64::from(volume.size_gib) << 30
}

/// Ends an attachment.
pub fn release(volume: &mut Volume) {
    volume.attachment = None;
    if volume.state == VolumeState::InUse {
        volume.state = VolumeState::Available;
    }
}

/// DescribeVolumes.
///
/// # Errors
/// The `Malformed` or `NotFound` answer about an id; those of filters and pages.
pub fn describe_volumes(call: &mut Call<'_>, request: DescribeVolumesRequest) -> Result<DescribeVolumesResult, ApiError> {
    if request.max_results.is_some() && !request.volume_ids.is_empty() {
        return Err(ApiError::invalid_combination("The parameter volumeSet cannot be used with the parameter maxResults"));
    }
    let filters = Filters::new(request.filters, FILTERS)?;
    let page = Page::new("DescribeVolumes", request.max_results, request.next_token.as_deref(), 1000)?;
    let rows = VOLUME.rows::<Volume>(call, &request.volume_ids)?;
    let passing = rows.into_iter().filter(|(_, volume)| passes(call, &filters, volume));
    let (volumes, next_token) = page.take(passing);
    Ok(DescribeVolumesResult { volumes: volumes.iter().map(|volume| shape(call, volume)).collect(), next_token })
}

const FILTERS: &[&str] = &[
    "attachment.attach-time",
    "attachment.delete-on-termination",
    "attachment.device",
    "attachment.instance-id",
    "attachment.status",
    "availability-zone",
    "availability-zone-id",
    "create-time",
    "encrypted",
    "fast-restored",
    "multi-attach-enabled",
    "size",
    "snapshot-id",
    "status",
    "tag",
    "throughput",
    "volume-id",
    "volume-type",
];

fn passes(call: &Call<'_>, filters: &Filters, volume: &Volume) -> bool {
    let attachment = volume.attachment.as_ref();
    filters.pass(&tag::of(&call.tx, &volume.account_id, &volume.id), |name, test| match name {
        "attachment.attach-time" => attachment.is_some_and(|attachment| test(&Timestamp::from(attachment.attach_time).to_text())),
        "attachment.delete-on-termination" => attachment.is_some_and(|attachment| test(truth(attachment.delete_on_termination))),
        "attachment.device" => attachment.is_some_and(|attachment| test(&attachment.device)),
        "attachment.instance-id" => attachment.is_some_and(|attachment| test(&attachment.instance_id)),
        "attachment.status" => attachment.is_some_and(|attachment| test(attachment.state.name())),
        "availability-zone" => test(&volume.zone),
        "availability-zone-id" => call.region.zone(&volume.zone).is_some_and(|zone| test(&zone.id)),
        "create-time" => test(&Timestamp::from(volume.created).to_text()),
        "encrypted" => test(truth(volume.encrypted)),
        "fast-restored" => test("false"),
        "multi-attach-enabled" => test(truth(volume.multi_attach)),
        "size" => test(&volume.size_gib.to_string()),
        "status" => test(volume.state.name()),
        "throughput" => volume.throughput_mib_s.is_some_and(|throughput| test(&throughput.to_string())),
        "volume-id" => test(&volume.id),
        "volume-type" => test(&volume.kind),
        // No volume comes from a snapshot.
        _ => false,
    })
}

fn truth(value: bool) -> &'static str {
    if value { "true" } else { "false" }
}

fn shape(call: &Call<'_>, volume: &Volume) -> shapes::Volume {
    let number = |value: Option<u32>| value.and_then(|value| i32::try_from(value).ok());
    shapes::Volume {
        attachments: volume.attachment.iter().map(|attachment| attachment_shape(&volume.id, attachment, None)).collect(),
        availability_zone: Some(volume.zone.clone()),
        availability_zone_id: call.region.zone(&volume.zone).map(|zone| zone.id.clone()),
        create_time: Some(volume.created.into()),
        encrypted: Some(volume.encrypted),
        iops: number(volume.iops),
        kms_key_id: volume.kms_key_id.clone(),
        multi_attach_enabled: Some(volume.multi_attach),
        size: number(Some(volume.size_gib)),
        snapshot_id: Some(String::new()),
        state: Some(volume.state.name().to_owned()),
        tags: tag::shapes(&tag::of(&call.tx, &volume.account_id, &volume.id)),
        throughput: number(volume.throughput_mib_s),
        volume_id: Some(volume.id.clone()),
        volume_type: Some(volume.kind.clone()),
        ..Default::default()
    }
}

fn attachment_shape(volume_id: &str, attachment: &VolumeAttachment, state: Option<&str>) -> shapes::VolumeAttachment {
    shapes::VolumeAttachment {
        attach_time: Some(attachment.attach_time.into()),
        delete_on_termination: Some(attachment.delete_on_termination),
        device: Some(attachment.device.clone()),
        instance_id: Some(attachment.instance_id.clone()),
        state: Some(state.unwrap_or(attachment.state.name()).to_owned()),
        volume_id: Some(volume_id.to_owned()),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_have_ec2s_limits() {
        let code = |kind: &str, size, iops, throughput| Form::new(kind, size, iops, throughput).map_err(|error| error.code.to_string());
        for (kind, size, iops, throughput) in [
            ("gp2", 1, None, None),
            ("gp2", 16_384, None, None),
            ("gp3", 1, Some(3_000), None),
            ("gp3", 160, Some(80_000), Some(2_000)),
            ("io1", 4, Some(200), None),
            ("io2", 256, Some(256_000), None),
            ("st1", 125, None, None),
            ("standard", 1_024, None, None),
        ] {
            assert!(code(kind, size, iops, throughput).is_ok(), "{kind} {size}");
        }
        for (kind, size, iops, throughput, expected) in [
            ("gp2", 0, None, None, "InvalidParameterValue"),
            ("gp2", -1, None, None, "InvalidParameterValue"),
            ("gp2", 16_385, None, None, "InvalidParameterValue"),
            ("gp2", 10, Some(300), None, "InvalidParameterCombination"),
            ("gp2", 10, None, Some(125), "InvalidParameterCombination"),
            ("gp3", 10, Some(2_999), None, "InvalidParameterValue"),
            ("gp3", 10, Some(5_001), None, "InvalidParameterValue"),
            ("gp3", 10, None, Some(751), "InvalidParameterValue"),
            ("gp3", 10, None, Some(124), "InvalidParameterValue"),
            ("io1", 10, None, None, "MissingParameter"),
            ("io1", 3, Some(100), None, "InvalidParameterValue"),
            ("io1", 10, Some(501), None, "InvalidParameterValue"),
            ("sc1", 124, None, None, "InvalidParameterValue"),
            ("floppy", 1, None, None, "InvalidParameterValue"),
        ] {
            assert_eq!(code(kind, size, iops, throughput).unwrap_err(), expected, "{kind} {size} {iops:?} {throughput:?}");
        }
        assert_eq!(Form::new("gp2", 100, None, None).unwrap().iops, Some(300));
        assert_eq!(Form::new("gp3", 100, None, None).unwrap().throughput_mib_s, Some(125));
    }

    #[test]
    fn device_names_are_checked_and_two_spellings_are_one_device() {
        for device in ["/dev/sdf", "/dev/sda1", "/dev/xvdba", "/dev/sdp15"] {
            assert!(check_device(device, std::iter::empty()).is_ok(), "{device}");
        }
        for device in ["", "sdf", "/dev/sd", "/dev/sdabc", "/dev/sdf0", "/dev/sdf16", "/dev/sdF", "/dev/nvme1n1", "/dev/sdf/../x"] {
            assert_eq!(check_device(device, std::iter::empty()).unwrap_err().code, "InvalidParameterValue", "{device}");
        }
        assert!(check_device("/dev/sdf", ["/dev/xvdf"].into_iter()).is_err());
        assert!(check_device("/dev/sdf", ["/dev/xvdg"].into_iter()).is_ok());
    }

    #[test]
    fn a_key_needs_encryption() {
        assert_eq!(Encryption::new(None, Some("arn".into())).unwrap_err().code, "InvalidParameterDependency");
        assert!(Encryption::new(Some(true), Some("arn".into())).unwrap().encrypted);
    }
}
