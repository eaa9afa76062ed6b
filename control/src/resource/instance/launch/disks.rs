//! The volumes of a launch, from the image and the block device mappings.

use std::collections::BTreeSet;

use crate::error::ApiError;
use crate::model::Image;
use crate::resource::id::unsupported;
use crate::resource::image;
use crate::resource::volume::{self, Encryption, Form};
use crate::shapes::{BlockDeviceMapping, EbsBlockDevice};

/// One volume of each instance.
#[derive(Clone)]
pub(super) struct Disk {
    pub(super) device: String,
    pub(super) form: Form,
    pub(super) encryption: Encryption,
    pub(super) root: bool,
    pub(super) delete_on_termination: bool,
}

/// Reads the block device mappings: what they say about the image's root volume, and further volumes.
pub(super) fn disks(image: &Image, mappings: Vec<BlockDeviceMapping>) -> Result<Vec<Disk>, ApiError> {
    let mut root_asked = EbsBlockDevice::default();
    let mut further = Vec::new();
    let mut devices = BTreeSet::new();
    for mapping in mappings {
        let device = mapping.device_name.ok_or_else(|| ApiError::missing_parameter("BlockDeviceMapping.DeviceName"))?;
        unsupported(&[("BlockDeviceMapping.VirtualName", mapping.virtual_name.is_some())])?;
        let root = is_root(image, &device);
        if !devices.insert(device.clone()) {
            let message = format!("The device '{device}' is used in more than one block-device mapping");
            return Err(ApiError::new("InvalidBlockDeviceMapping", message));
        }
        match (mapping.no_device, mapping.ebs) {
            (Some(_), _) if root => {
                return Err(ApiError::new("InvalidBlockDeviceMapping", format!("The root device '{device}' cannot be left out")));
            }
            // The images here map nothing but their root, so there is nothing else to leave out.
            (Some(_), _) => {}
            (None, None) => return Err(ApiError::missing_parameter("BlockDeviceMapping.Ebs")),
            (None, Some(ebs)) => {
                refuse_unsupported_ebs(&ebs)?;
                if root {
                    root_asked = ebs;
                } else {
                    further.push((device, ebs));
                }
            }
        }
    }
    let least = image::size_gib(image);
    let size = root_asked.volume_size.unwrap_or_else(|| i32::try_from(least).unwrap_or(i32::MAX));
    if u32::try_from(size).is_ok_and(|size| size < least) {
        let message = format!("Volume of size {size}GB is smaller than the image '{}', expect size >= {least}GB", image.id);
        return Err(ApiError::new("InvalidBlockDeviceMapping", message));
    }
    let kind = root_asked.volume_type.clone().unwrap_or_else(|| image::ROOT_VOLUME_TYPE.to_owned());
    let mut disks = vec![disk(image.root_device_name.clone(), root_asked, &kind, size, true)?];
    for (device, ebs) in further {
        volume::check_device(&device, disks.iter().map(|disk| disk.device.as_str()))?;
        let size = ebs
            .volume_size
            .ok_or_else(|| ApiError::new("MissingParameter", "The request must contain the parameter size or snapshotId"))?;
        let kind = ebs.volume_type.clone().unwrap_or_else(|| "gp2".to_owned());
        disks.push(disk(device, ebs, &kind, size, false)?);
    }
    if volume::MOST_ATTACHMENTS < disks.len() {
        let message = format!("An instance may have at most {} volumes", volume::MOST_ATTACHMENTS);
        return Err(ApiError::new("AttachmentLimitExceeded", message));
    }
    Ok(disks)
}

fn disk(device: String, ebs: EbsBlockDevice, kind: &str, size: i32, root: bool) -> Result<Disk, ApiError> {
    Ok(Disk {
        device,
        form: Form::new(kind, size, ebs.iops, ebs.throughput)?,
        encryption: Encryption::new(ebs.encrypted, ebs.kms_key_id)?,
        root,
        // As EC2: a root volume goes with its instance, others stay unless told to go.
        delete_on_termination: ebs.delete_on_termination.unwrap_or(root),
    })
}

fn refuse_unsupported_ebs(ebs: &EbsBlockDevice) -> Result<(), ApiError> {
    if let Some(snapshot) = &ebs.snapshot_id {
        return Err(volume::no_snapshot(snapshot));
    }
    unsupported(&[
        ("BlockDeviceMapping.Ebs.AvailabilityZone", ebs.availability_zone.is_some() || ebs.availability_zone_id.is_some()),
        ("BlockDeviceMapping.Ebs.EbsCardIndex", ebs.ebs_card_index.is_some_and(|index| index != 0)),
        ("BlockDeviceMapping.Ebs.OutpostArn", ebs.outpost_arn.is_some()),
        ("BlockDeviceMapping.Ebs.VolumeInitializationRate", ebs.volume_initialization_rate.is_some()),
    ])
}

/// Both of EC2's names for a root device mean the image's root, since a caller often knows only one of them.
fn is_root(image: &Image, device: &str) -> bool {
    const ROOTS: [&str; 2] = ["/dev/sda1", "/dev/xvda"];
    device == image.root_device_name || ROOTS.contains(&device) && ROOTS.contains(&image.root_device_name.as_str())
}
