//! Acceptance 7: the life of an instance, seen from the guest and by its states.

use hw_sim::{Region, root_or_skip};

#[test]
fn a_guest_stops_grows_reboots_and_leaves_nothing() {
    if !root_or_skip("instance") {
        return;
    }
    let region = Region::start("instance", &["--zones", "1"]);
    let before = region.call("DescribeSubnets", &[]).need("availableIpAddressCount");
    let instance = region.launch(&[
        ("BlockDeviceMapping.1.DeviceName", "/dev/sdf"),
        ("BlockDeviceMapping.1.Ebs.VolumeSize", "1"),
        ("BlockDeviceMapping.1.Ebs.DeleteOnTermination", "false"),
    ]);
    region.wait_ssh(&instance, 60);
    assert_eq!(region.ssh(&instance, "nproc"), "2");
    let memory = |text: String| text.parse::<u64>().expect("kB");
    let read_memory = "awk '/MemTotal/ { print $2 }' /proc/meminfo";
    let small = memory(region.ssh(&instance, read_memory));
    assert!((800_000..=1_048_576).contains(&small), "{small} kB for 1 GiB");
    let boot = region.ssh(&instance, "cat /proc/sys/kernel/random/boot_id; echo kept | sudo tee /kept >/dev/null");

    let _ = region.call("RebootInstances", &[("InstanceId.1", &instance.id)]);
    region.eventually("the guest has rebooted", 60, || {
        let (up, now) = region.try_ssh(&instance, "cat /proc/sys/kernel/random/boot_id");
        up && now != boot
    });
    assert_eq!(region.state(&instance.id), "running");

    let _ = region.call("StopInstances", &[("InstanceId.1", &instance.id)]);
    region.wait_state(&instance.id, "stopped", 40);
    assert!(region.pids("qemu-system").is_empty(), "a stopped instance has a machine");
    let _ = region.call("ModifyInstanceAttribute", &[("InstanceId", &instance.id), ("InstanceType.Value", "c5.xlarge")]);
    let _ = region.call("StartInstances", &[("InstanceId.1", &instance.id)]);
    region.wait_state(&instance.id, "running", 40);
    let grown = region.instance(&instance.id);
    assert_eq!(grown.private_address, instance.private_address);
    region.wait_ssh(&grown, 60);
    assert_eq!(region.ssh(&grown, "nproc"), "4");
    let large = memory(region.ssh(&grown, read_memory));
    assert!((7_700_000..=8_388_608).contains(&large), "{large} kB for 8 GiB");
    assert_eq!(region.ssh(&grown, "cat /kept"), "kept");

    // A guest that powers itself off is stopped.
    let _ = region.try_ssh(&grown, "sudo poweroff");
    region.wait_state(&grown.id, "stopped", 40);

    region.terminate(&[&grown.id]);
    region.eventually("the root volume is deleted and the other one is kept", 10, || {
        region.call("DescribeVolumes", &[]).all("volumeId").len() == 1
    });
    let volumes = region.call("DescribeVolumes", &[]);
    let kept = volumes.need("volumeId");
    assert_eq!(volumes.need("status"), "available");
    let _ = region.call("DeleteVolume", &[("VolumeId", &kept)]);
    let mut left = Vec::new();
    let begun = std::time::Instant::now();
    while begun.elapsed().as_secs() < 10 {
        left = leftovers(&region, &grown.id, &kept);
        if left.is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(left.is_empty(), "left on card and host: {left:#?}");
    assert_eq!(region.call("DescribeSubnets", &[]).need("availableIpAddressCount"), before);
    assert!(region.call("DescribeNetworkInterfaces", &[]).all("networkInterfaceId").is_empty());
}

/// Files and processes that name an instance, its volumes or functions.
fn leftovers(region: &Region, instance: &str, volume: &str) -> Vec<String> {
    let mut found: Vec<String> = region.pids("qemu-system").iter().map(|pid| format!("machine {pid}")).collect();
    let output = std::process::Command::new("find")
        .arg(region.dir())
        .args([
            "(",
            "-name",
            &format!("*{instance}*"),
            "-o",
            "-name",
            "vol-*",
            "-o",
            "-name",
            "eni-*",
            "-o",
            "-name",
            &format!("*{volume}*"),
            "-o",
            "-name",
            "*.sock",
            ")",
        ])
        .args(["-not", "-name", "slot.sock", "-not", "-name", "admin.sock"])
        // A tombstone (kind, id and generation) fences late requests for an hour.
        .args(["-not", "-path", "*/desired/*"])
        .output()
        .expect("find");
    found.extend(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned));
    found
}

/// What each call does to an instance in each state: EC2's code, or none.
#[test]
fn every_illegal_change_of_state_is_refused() {
    if !root_or_skip("instance states") {
        return;
    }
    let region = Region::start("states", &["--zones", "1", "--machine", "sim"]);
    let image = region.image("mini");
    let run = || {
        region
            .call("RunInstances", &[("ImageId", &image), ("InstanceType", "t3.micro"), ("MinCount", "1"), ("MaxCount", "1")])
            .need("instanceId")
    };
    let stopped = run();
    region.wait_state(&stopped, "running", 10);
    let _ = region.call("StopInstances", &[("InstanceId.1", &stopped)]);
    region.wait_state(&stopped, "stopped", 30);
    let gone = run();
    region.terminate(&[&gone]);
    let running = run();
    region.wait_state(&running, "running", 10);

    let code = |action: &str, id: &str, more: &[(&str, &str)]| {
        let name = if action.starts_with("Modify") { "InstanceId" } else { "InstanceId.1" };
        let mut parameters = vec![(name, id)];
        parameters.extend(more);
        region.try_call(action, &parameters).err().map(|refusal| refusal.code)
    };
    let wrong = Some("IncorrectInstanceState".to_owned());
    let resize = [("InstanceType.Value", "t3.small")];
    // Terminated: nothing brings it back; terminating it again is fine.
    for action in ["StartInstances", "StopInstances", "RebootInstances"] {
        assert_eq!(code(action, &gone, &[]), wrong, "{action} of a terminated instance");
    }
    assert_eq!(code("ModifyInstanceAttribute", &gone, &resize), wrong);
    assert_eq!(code("TerminateInstances", &gone, &[]), None);
    // Stopped: stopping again is fine, a reboot is not.
    assert_eq!(code("StopInstances", &stopped, &[]), None);
    assert_eq!(code("RebootInstances", &stopped, &[]), wrong);
    assert_eq!(code("ModifyInstanceAttribute", &stopped, &resize), None);
    // Running: starting again is fine, a new type is not.
    assert_eq!(code("StartInstances", &running, &[]), None);
    assert_eq!(code("RebootInstances", &running, &[]), None);
    assert_eq!(code("ModifyInstanceAttribute", &running, &resize), wrong);
    // Protected from termination.
    let protect = [("DisableApiTermination.Value", "true")];
    assert_eq!(code("ModifyInstanceAttribute", &running, &protect), None);
    assert_eq!(code("TerminateInstances", &running, &[]), Some("OperationNotPermitted".to_owned()));
}
