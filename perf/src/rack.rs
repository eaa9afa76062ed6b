//! Figures of a whole region.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use hw_sim::Region;
use serde_json::{Value, json};

use crate::figure;
use crate::process;

/// How long an idle region is watched for one sample.
const WATCH: Duration = Duration::from_secs(10);

/// CPU and memory of a region of three cards without a guest.
pub fn idle(runs: usize) -> Result<Value> {
    let region = Region::start("perf-idle", &[]);
    // Reconnects and first convergence are not idleness.
    std::thread::sleep(Duration::from_secs(3));
    let pids: Vec<(String, i32)> = region.processes().iter().map(|process| (process.kind.clone(), region.pid(&process.name))).collect();
    let mut cpu = Vec::new();
    for _ in 0..runs {
        let before: f64 = pids.iter().map(|(_, pid)| process::cpu_s(*pid)).sum();
        let begun = Instant::now();
        std::thread::sleep(WATCH);
        let after: f64 = pids.iter().map(|(_, pid)| process::cpu_s(*pid)).sum();
        cpu.push((after - before) / begun.elapsed().as_secs_f64() * 100.0);
    }
    let memory = |kind: &str| {
        pids.iter().filter(|(known, _)| kind.is_empty() || known == kind).map(|(_, pid)| process::memory_mb(*pid)).sum::<f64>()
    };
    Ok(figure::report(
        "idle",
        json!({
            "cpu": figure::spread(&cpu, "% of one core"),
            "memory_mb": { "all": memory("").round(), "control": memory("control").round(), "cards": memory("card").round(), "hosts": memory("host").round() },
        }),
    ))
}

/// Seconds from `rack up` on built binaries to ready.
pub fn up(runs: usize) -> Result<Value> {
    let mut seconds = Vec::new();
    for _ in 0..runs {
        let begun = Instant::now();
        let region = Region::start("perf-up", &[]);
        seconds.push(begun.elapsed().as_secs_f64());
        drop(region);
    }
    Ok(figure::report("up", json!({ "ready": figure::spread(&seconds, "s") })))
}

/// Seconds from `RunInstances` to accepted, running, and the ssh banner.
pub fn launch(runs: usize) -> Result<Value> {
    let region = Region::start("perf-launch", &["--zones", "1"]);
    let image = region.image("mini");
    let (mut accepted, mut running, mut banner) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        let parameters = [
            ("ImageId", image.as_str()),
            ("InstanceType", "t3.micro"),
            ("MinCount", "1"),
            ("MaxCount", "1"),
            ("KeyName", "rack"),
            ("SecurityGroup.1", "rack"),
        ];
        let begun = Instant::now();
        let id = region.call("RunInstances", &parameters).need("instanceId");
        accepted.push(begun.elapsed().as_secs_f64());
        region.wait_state(&id, "running", 20);
        running.push(begun.elapsed().as_secs_f64());
        let address = region.instance(&id).public_address;
        let probe = format!("exec 3<>/dev/tcp/{address}/22 && head -c 4 <&3");
        while region.on_internet(&["timeout", "0.5", "bash", "-c", &probe]).stdout != b"SSH-" {
            if begun.elapsed() > Duration::from_secs(60) {
                bail!("no ssh banner within 60 s");
            }
        }
        banner.push(begun.elapsed().as_secs_f64());
        region.terminate(&[&id]);
    }
    let tcg = Command::new("qemu-system-x86_64")
        .arg("--version")
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned());
    Ok(figure::report(
        "launch",
        json!({
            "accepted": figure::spread(&accepted, "s"),
            "running": figure::spread(&running, "s"),
            "ssh_banner": figure::spread(&banner, "s"),
            "emulator": tcg.unwrap_or_default(),
        }),
    ))
}
