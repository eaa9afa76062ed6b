//! Acceptance 8: control, a card, and a host agent die at random moments.

use std::process::{Child, Stdio};
use std::time::Duration;

use hw_sim::{Instance, Region, Seed, root_or_skip};

/// What a guest may wait after its card serves its health page, at any moment.
/// The card has connected to its machine by then, so this is for a busy machine.
const RESUME_WITHIN_S: f64 = 0.5;
/// The same in the median, where a busy machine counts less.
const RESUME_MEDIAN_S: f64 = 0.2;
/// From the start of the card's process to the first answer, in the median; most
/// of it is DPDK's own start.
const RESTART_MEDIAN_S: f64 = 1.0;

/// How many random moments: a few in CI, all with `cargo rack test --long`.
fn moments() -> u64 {
    if std::env::var_os("CARDINAL_LONG").is_some() { 20 } else { 5 }
}

#[test]
fn a_launch_completes_once_when_control_dies_in_its_middle() {
    if !root_or_skip("control dies") {
        return;
    }
    // The machine `sim` makes launches fast, so that the moments fall within them.
    let region = Region::start("crash-control", &["--zones", "1", "--machine", "sim"]);
    let mut seed = Seed::new();
    let image = region.image("mini");
    for _ in 0..moments() {
        let parameters =
            [("ImageId", image.as_str()), ("InstanceType", "t3.micro"), ("MinCount", "1"), ("MaxCount", "1"), ("ClientToken", "")];
        let token = format!("token-{}", seed.word());
        let mut parameters = parameters.to_vec();
        parameters[4].1 = &token;
        let id = region.call("RunInstances", &parameters).need("instanceId");
        std::thread::sleep(Duration::from_millis(seed.below(60)));
        region.kill("control");
        std::thread::sleep(Duration::from_millis(seed.below(200)));
        region.restart("control");
        region.eventually("control serves again", 10, || {
            std::net::TcpStream::connect(region.endpoint().trim_start_matches("http://")).is_ok()
        });
        region.wait_state(&id, "running", 20);
        // The same token names the same instance: a repeated call runs nothing twice.
        assert_eq!(region.call("RunInstances", &parameters).need("instanceId"), id);
        let all = region.call("DescribeInstances", &[("Filter.1.Name", "instance-state-name"), ("Filter.1.Value.1", "running")]);
        assert_eq!(all.all("instanceId"), std::slice::from_ref(&id));
        region.terminate(&[&id]);
    }
}

/// Pings from the internet side every 20 ms, with a time stamp for each answer.
struct Pings(Child);

impl Pings {
    fn begin(region: &Region, instance: &Instance) -> Self {
        let namespace = region.ready("internet_namespace").as_str().expect("namespace");
        let child = std::process::Command::new("ip")
            .args(["netns", "exec", namespace, "ping", "-D", "-i", "0.02", "-W", "1", &instance.public_address])
            .stdout(Stdio::piped())
            .spawn()
            .expect("ping");
        Self(child)
    }

    /// Unix times of the answers.
    fn end(self) -> Vec<f64> {
        let _ = std::process::Command::new("kill").args(["-INT", &self.0.id().to_string()]).status();
        let output = self.0.wait_with_output().expect("ping");
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter(|line| line.contains("bytes from"))
            .filter_map(|line| line.strip_prefix('[')?.split_once(']')?.0.parse().ok())
            .collect()
    }
}

fn unix_now() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_secs_f64()
}

#[test]
fn guests_run_on_when_their_card_or_host_agent_dies() {
    if !root_or_skip("card dies") {
        return;
    }
    let region = Region::start("crash-card", &["--zones", "1"]);
    let mut seed = Seed::new();
    let guest = region.launch(&[]);
    region.wait_ssh(&guest, 60);
    let boot = region.ssh(&guest, "cat /proc/sys/kernel/random/boot_id");
    let card = region.card_of(&guest.id);
    let host = card.replace("card-", "host-");
    let machine = region.pids("qemu-system");

    let (mut from_start, mut after_up) = (Vec::new(), Vec::new());
    for moment in 0..moments() {
        let pings = Pings::begin(&region, &guest);
        std::thread::sleep(Duration::from_millis(500 + seed.below(1000)));
        region.kill(&card);
        std::thread::sleep(Duration::from_millis(50 + seed.below(1500)));
        let started = unix_now();
        region.restart(&card);
        // The card is up when it serves its health page.
        while !metrics_up(&region, &card) {
            assert!(unix_now() < started + 5.0, "the card is not up after 5 s");
            std::thread::sleep(Duration::from_millis(5));
        }
        let up = unix_now();
        std::thread::sleep(Duration::from_millis(2500));
        let answers = pings.end();
        let first = *answers.iter().find(|time| **time > started).expect("an answer after the restart");
        println!("card, moment {moment}: pings resume {:.3} s after its start, {:.3} s after it is up", first - started, first - up);
        from_start.push(first - started);
        after_up.push(first - up);
    }
    distribution("card, start to first answer", &mut from_start, (RESTART_MEDIAN_S, f64::MAX));
    distribution("card, up to first answer", &mut after_up, (RESUME_MEDIAN_S, RESUME_WITHIN_S));
    let mut gaps = Vec::new();
    for moment in 0..moments() {
        let pings = Pings::begin(&region, &guest);
        std::thread::sleep(Duration::from_millis(300 + seed.below(700)));
        region.kill(&host);
        std::thread::sleep(Duration::from_millis(seed.below(1000)));
        region.restart(&host);
        std::thread::sleep(Duration::from_millis(1000));
        let answers = pings.end();
        let gap = answers.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
        println!("host agent, moment {moment}: longest gap between pings {gap:.3} s");
        gaps.push(gap);
    }
    distribution("host agent, longest gap between pings", &mut gaps, (0.2, 0.8));
    assert_eq!(region.pids("qemu-system"), machine, "the machine is not the one that was launched");
    // On a busy machine one attempt may take too long; the pings have shown that nothing is lost.
    region.wait_ssh(&guest, 20);
    assert_eq!(region.ssh(&guest, "cat /proc/sys/kernel/random/boot_id"), boot);

    // The new agent has adopted the machine: it can stop it.
    region.terminate(&[&guest.id]);
    assert!(region.pids("qemu-system").is_empty());
}

/// Prints how seconds are spread, and holds their median and their largest to limits.
fn distribution(what: &str, seconds: &mut [f64], limits: (f64, f64)) {
    seconds.sort_by(f64::total_cmp);
    let at = |part: usize| seconds[(seconds.len() - 1) * part / 100];
    let (least, median, p90, most) = (at(0), at(50), at(90), at(100));
    println!("{what}: {least:.3} to {most:.3} s, median {median:.3}, p90 {p90:.3}, {} moments", seconds.len());
    assert!(median < limits.0 && most < limits.1, "{what}: more than {limits:?}");
}

fn metrics_up(region: &Region, card: &str) -> bool {
    let config = std::fs::read_to_string(region.dir().join(format!("{card}.toml"))).expect("card settings");
    let line = config.lines().find(|line| line.starts_with("metrics_listen")).expect("metrics_listen");
    std::net::TcpStream::connect(line.split('"').nth(1).expect("an address")).is_ok()
}
