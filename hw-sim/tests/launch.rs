//! Acceptance 2: how fast a launch is, and what cloud-init does with it.

use std::time::{Duration, Instant};

use hw_sim::{Region, root_or_skip};

/// Seconds from a launch to the first byte of an ssh banner.
const BANNER_WITHIN: Duration = Duration::from_secs(10);

#[test]
fn mini_shows_its_ssh_banner_within_ten_seconds_of_run_instances() {
    if !root_or_skip("launch") {
        return;
    }
    let region = Region::start("launch", &["--zones", "1"]);
    // A first launch reads the kernel and the image into the page cache, as a
    // server that has run anything before has.
    let warm = region.launch(&[]);
    region.terminate(&[&warm.id]);

    let image = region.image("mini");
    let begun = Instant::now();
    let parameters = [
        ("ImageId", image.as_str()),
        ("MinCount", "1"),
        ("MaxCount", "1"),
        ("InstanceType", "t3.micro"),
        ("KeyName", "rack"),
        ("SecurityGroup.1", "rack"),
    ];
    let answer = region.call("RunInstances", &parameters);
    let accepted = begun.elapsed();
    let id = answer.need("instanceId");
    region.wait_state(&id, "running", 10);
    let running = begun.elapsed();
    let address = region.instance(&id).public_address;
    let probe = format!("exec 3<>/dev/tcp/{address}/22 && head -c 4 <&3");
    while region.on_internet(&["timeout", "0.5", "bash", "-c", &probe]).stdout != b"SSH-" {
        assert!(begun.elapsed() < Duration::from_secs(40), "no banner; console:\n{}", region.console(&id));
        std::thread::sleep(Duration::from_millis(50));
    }
    let banner = begun.elapsed();
    let console = region.console(&id);
    let sshd = console.lines().find(|line| line.starts_with("mini: sshd at")).unwrap_or("unknown").trim();
    println!(
        "launch: accepted {:.2} s, machine running {:.2} s, ssh banner {:.2} s (guest clock: {sshd})",
        accepted.as_secs_f64(),
        running.as_secs_f64(),
        banner.as_secs_f64()
    );
    assert!(banner < BANNER_WITHIN, "{banner:?}");
}

#[test]
fn debian_12_follows_cloud_init_once() {
    if !root_or_skip("cloud_init") {
        return;
    }
    let region = Region::start("cloud_init", &["--zones", "1"]);
    let image = region.image("debian-12");
    let script = "#!/bin/sh\necho ran >>/var/log/user-data-runs\n";
    let encoded = base64(script);
    let instance = region.launch(&[("ImageId", &image), ("InstanceType", "t3.small"), ("UserData", &encoded)]);
    assert_eq!(instance.user, "admin");
    region.wait_ssh(&instance, 120);
    let wanted = format!("ip-{}", instance.private_address.replace('.', "-"));
    assert_eq!(region.ssh(&instance, "hostname"), wanted);
    assert_eq!(region.ssh(&instance, "sudo cloud-init query platform"), "ec2");
    region.eventually("user data ran", 60, || region.try_ssh(&instance, "cat /var/log/user-data-runs") == (true, "ran".to_owned()));
    let boot = region.ssh(&instance, "cat /proc/sys/kernel/random/boot_id");

    let _ = region.call("RebootInstances", &[("InstanceId.1", &instance.id)]);
    region.eventually("the guest has rebooted", 180, || {
        let (up, now) = region.try_ssh(&instance, "cat /proc/sys/kernel/random/boot_id");
        up && now != boot
    });
    region.eventually("cloud-init is done", 120, || {
        region.try_ssh(&instance, "cloud-init status --wait >/dev/null; cloud-init status").1.contains("done")
    });
    assert_eq!(region.ssh(&instance, "cat /var/log/user-data-runs"), "ran");
}

fn base64(text: &str) -> String {
    use std::io::Write;
    let mut child = std::process::Command::new("base64")
        .arg("-w0")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("base64");
    child.stdin.take().expect("stdin").write_all(text.as_bytes()).expect("input");
    String::from_utf8(child.wait_with_output().expect("base64").stdout).expect("text")
}
