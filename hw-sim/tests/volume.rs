//! Acceptance 6: a volume moves between guests, and its storage process dies.

use std::process::Stdio;
use std::time::Duration;

use hw_sim::{Instance, Region, Seed, root_or_skip};

/// Fsync'ed writes during which the storage process dies twice.
const WRITES: usize = 150;

/// The disk that a hot-attached volume becomes in a guest with one disk.
const DISK: &str = "/dev/vdb";

fn attach(region: &Region, volume: &str, instance: &Instance) {
    let _ = region.call("AttachVolume", &[("VolumeId", volume), ("InstanceId", &instance.id), ("Device", "/dev/sdf")]);
    region.wait_volume(volume, "in-use");
    region.eventually("the guest sees the disk", 15, || region.try_ssh(instance, &format!("test -b {DISK}")).0);
}

fn detach(region: &Region, volume: &str, instance: &Instance) {
    let _ = region.call("DetachVolume", &[("VolumeId", volume)]);
    region.wait_volume(volume, "available");
    region.eventually("the guest lost the disk", 15, || !region.try_ssh(instance, &format!("test -b {DISK}")).0);
}

#[test]
fn a_volume_keeps_its_bytes_between_guests_and_through_the_death_of_its_storage() {
    if !root_or_skip("volume") {
        return;
    }
    let region = Region::start("volume", &["--zones", "1", "--hosts-per-zone", "2"]);
    let zone = region.call("DescribeAvailabilityZones", &[]).need("zoneName");
    // Two guests that do not fit on one card's host: 8 cores each.
    let first = region.launch(&[("InstanceType", "c5.xlarge"), ("Placement.AvailabilityZone", &zone)]);
    let second = region.launch(&[("InstanceType", "c5.2xlarge"), ("Placement.AvailabilityZone", &zone)]);
    assert_ne!(region.card_of(&first.id), region.card_of(&second.id));
    region.wait_ssh(&first, 60);
    region.wait_ssh(&second, 60);

    let volume = region.call("CreateVolume", &[("AvailabilityZone", &zone), ("Size", "1"), ("VolumeType", "gp3")]).need("volumeId");
    region.wait_volume(&volume, "available");
    attach(&region, &volume, &first);
    let write = format!(
        "sudo mkfs.ext4 -q {DISK} && sudo mkdir -p /data && sudo mount {DISK} /data && \
         sudo dd if=/dev/urandom of=/data/file bs=64k count=64 2>/dev/null && sudo sha256sum /data/file && sudo umount /data"
    );
    let written = region.ssh(&first, &write);
    assert_eq!(region.refusal("DeleteVolume", &[("VolumeId", &volume)]), "VolumeInUse");
    detach(&region, &volume, &first);
    attach(&region, &volume, &second);
    let read =
        region.ssh(&second, &format!("sudo mkdir -p /data && sudo mount {DISK} /data && sudo sha256sum /data/file && sudo umount /data"));
    assert_eq!(written, read);

    storage_dies_under_writes(&region, &second);
    detach(&region, &volume, &second);
    let _ = region.call("DeleteVolume", &[("VolumeId", &volume)]);
    region.terminate(&[&first.id, &second.id]);
}

/// A guest writes numbered blocks and notes each one on its other disk only
/// after fsync; whatever it noted has to be there in the end.
fn storage_dies_under_writes(region: &Region, guest: &Instance) {
    let mut seed = Seed::new();
    let writer = format!(
        "sudo bash -c 'i=0; while [ $i -lt {WRITES} ]; do i=$((i + 1)); \
         printf %08d $i | dd of=/dev/vdb bs=8 seek=$((i * 512)) conv=fsync,notrunc 2>/dev/null || {{ echo error; exit 1; }}; \
         echo $i; done'"
    );
    let mut command = region.ssh_command(guest);
    let child = command.arg(writer).stdout(Stdio::piped()).spawn().expect("ssh");
    // The card that serves the volume; both of the zone may, so find it by its target's port.
    let storage = storage_card(region);
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(500 + seed.below(1500)));
        region.kill(&storage);
        std::thread::sleep(Duration::from_millis(seed.below(1000)));
        region.restart(&storage);
    }
    let output = child.wait_with_output().expect("ssh");
    let acknowledged: Vec<u32> = String::from_utf8_lossy(&output.stdout).lines().filter_map(|line| line.parse().ok()).collect();
    assert!(output.status.success() && acknowledged.len() == WRITES, "the guest saw an error after {} writes", acknowledged.len());
    let check = format!(
        "sudo bash -c 'i=0; while [ $i -lt {WRITES} ]; do i=$((i + 1)); \
         [ \"$(dd if=/dev/vdb bs=8 skip=$((i * 512)) count=1 2>/dev/null)\" = \"$(printf %08d $i)\" ] || echo lost $i; done'"
    );
    let _ = region.ssh(guest, "sync; echo 3 | sudo tee /proc/sys/vm/drop_caches >/dev/null");
    assert_eq!(region.ssh(guest, &check), "");
}

/// The card whose folder holds the newest data volume.
fn storage_card(region: &Region) -> String {
    let answer = region.call("DescribeVolumes", &[("Filter.1.Name", "attachment.device"), ("Filter.1.Value.1", "/dev/sdf")]);
    let volume = answer.need("volumeId");
    for process in region.processes().iter().filter(|process| process.kind == "card") {
        let folder = region.dir().join(&process.name);
        let found = std::process::Command::new("find").arg(&folder).args(["-path", "*volume*", "-name", &format!("{volume}*")]).output();
        if found.is_ok_and(|output| !output.stdout.is_empty()) {
            return process.name.clone();
        }
    }
    panic!("no card stores {volume}")
}
