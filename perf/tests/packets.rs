//! `perf packets` as scripts use it: a capture in, one JSON object out.
//!
//! The captures are written here, byte by byte, so that the command is read
//! against the standards and not against its own writer.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use std::path::Path;
use std::process::Command;

use serde_json::Value;

const CARD: [u8; 4] = [192, 0, 2, 1];

fn checksum(header: &[u8]) -> u16 {
    let mut sum: u32 = header.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

fn ipv4_udp(source: [u8; 4], destination: [u8; 4], ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(28 + payload.len()).unwrap();
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
    ip[2..4].copy_from_slice(&length.to_be_bytes());
    ip.extend(source.into_iter().chain(destination));
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    ip.extend([ports.0, ports.1, length - 20, 0].into_iter().flat_map(u16::to_be_bytes));
    ip.extend(payload);
    ip
}

fn ethernet(packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    frame.extend(packet);
    frame
}

fn plain(source: [u8; 4], destination: [u8; 4], ports: (u16, u16)) -> Vec<u8> {
    ethernet(&ipv4_udp(source, destination, ports, &[0; 18]))
}

fn vxlan(vtep: [u8; 4], vni: u8, inner: &[u8]) -> Vec<u8> {
    let mut payload = vec![8, 0, 0, 0, 0, 0, vni, 0];
    payload.extend(inner);
    ethernet(&ipv4_udp(vtep, CARD, (50_000, 4789), &payload))
}

fn pcap(path: &Path, frames: &[Vec<u8>]) {
    let mut file = [0xa1b2_c3d4u32, 0x0002_0004, 0, 0, 65535, 1].into_iter().flat_map(u32::to_be_bytes).collect::<Vec<_>>();
    for frame in frames {
        let length = u32::try_from(frame.len()).unwrap();
        file.extend([0, 0, length, length].into_iter().flat_map(u32::to_be_bytes));
        file.extend(frame);
    }
    std::fs::write(path, file).unwrap();
}

fn perf(arguments: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_perf")).arg("packets").args(arguments).output().unwrap()
}

#[track_caller]
fn measure(case: &str, frames: &[Vec<u8>]) -> Value {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("trace.pcap");
    pcap(&file, frames);
    let output = perf(&["--pcap", file.to_str().unwrap(), "--case", case, "--seconds", "0.2", "--json", "-"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["case"], case);
    assert_eq!(report["every_pass_alike"], true, "{report:#}");
    assert_eq!(report["allocations"], 0, "{report:#}");
    for field in ["mpps", "cycles_per_packet", "ns_per_packet", "source_cycles_per_packet"] {
        assert!(report[field].as_f64().unwrap() > 0.0, "{field}");
    }
    let count = |field: &str| report[field].as_u64().unwrap();
    assert_eq!(count("offered"), count("delivered") + count("dropped_total"));
    report
}

#[track_caller]
fn check(report: &Value, delivered: u64, dropped: &[(&str, u64)], connections: Option<u64>) {
    let pass = &report["per_pass"];
    assert_eq!(pass["delivered"], delivered, "{report:#}");
    let expected: Value = dropped.iter().map(|(reason, count)| ((*reason).to_owned(), Value::from(*count))).collect();
    assert_eq!(pass["dropped"], expected, "{report:#}");
    if let Some(connections) = connections {
        assert_eq!(report["connections"], connections, "{report:#}");
    }
    let passes = report["offered"].as_u64().unwrap() / pass["frames"].as_u64().unwrap();
    assert_eq!(report["delivered"], delivered * passes);
}

/// What a rule lets in is delivered, and everything else dies for its own reason.
#[test]
fn decap_conntrack_delivers_what_the_rule_allows_and_nothing_else() {
    let (near, far) = ([192, 0, 2, 7], [192, 0, 2, 8]);
    let guest = [10, 0, 1, 5];
    let mut frames = Vec::new();
    for port in 0..500u16 {
        frames.push(vxlan(near, 100, &plain([10, 0, 7, 1], guest, (10_000 + port, 8080))));
    }
    for port in 0..40 {
        frames.push(vxlan(near, 100, &plain([10, 0, 7, 1], guest, (10_000 + port, 8081))));
    }
    for port in 0..30 {
        frames.push(vxlan(far, 100, &plain([10, 9, 7, 1], guest, (10_000 + port, 8080))));
    }
    for port in 0..20 {
        frames.push(vxlan(near, 200, &plain([10, 0, 7, 1], guest, (10_000 + port, 8080))));
    }
    for port in 0..10 {
        // An address that is mapped to another card.
        frames.push(vxlan(far, 100, &plain([10, 0, 7, 1], guest, (10_000 + port, 8080))));
    }
    for port in 0..5 {
        // To the guest's MAC, which the card goes by, and not to its address.
        frames.push(vxlan(near, 100, &plain([10, 0, 7, 1], [10, 0, 1, 6], (10_000 + port, 8080))));
    }
    let report = measure("decap-conntrack", &frames);
    let dropped = [("denied_ingress", 70), ("not_own_destination", 5), ("unknown_vni", 20), ("unmapped_vtep", 10)];
    check(&report, 500, &dropped, Some(500));
}

/// Without an ingress rule the answers of the wire pass only by their connection.
#[test]
fn conntrack_encap_lets_answers_in_and_strangers_not() {
    let (guest, peer) = ([10, 0, 1, 5], [10, 0, 2, 9]);
    let mut frames: Vec<_> = (0..100).map(|port| plain(guest, peer, (20_000 + port, 443))).collect();
    frames.extend((0..60).map(|port| plain(peer, guest, (443, 20_000 + port))));
    frames.extend((0..7).map(|port| plain(peer, guest, (444, 20_000 + port))));
    let report = measure("conntrack-encap", &frames);
    check(&report, 160, &[("denied_ingress", 7)], Some(100));
}

#[test]
fn encap_takes_plain_frames_and_the_inner_frames_of_vxlan() {
    let inner: Vec<_> = (0..100u8).map(|host| plain([10, 0, 7, host], [10, 0, 1, 5], (9000, 8080))).collect();
    check(&measure("encap", &inner), 100, &[], None);
    let outer: Vec<_> = inner.iter().map(|frame| vxlan([192, 0, 2, 7], 100, frame)).collect();
    check(&measure("encap", &outer), 100, &[], None);
}

#[test]
fn forward_and_decap_deliver_to_the_guest() {
    let inner: Vec<_> = (0..100u8).map(|host| plain([10, 0, 7, host], [10, 0, 1, 5], (9000, 8080))).collect();
    check(&measure("forward", &inner), 100, &[], None);
    let outer: Vec<_> = inner.iter().map(|frame| vxlan([192, 0, 2, 7], 100, frame)).collect();
    check(&measure("decap", &outer), 100, &[], None);
    check(&measure("decap", &inner), 100, &[], None);
}

#[track_caller]
fn generated(case: &str, more: &[&str]) -> Value {
    let output = perf(&[&["--case", case, "--seconds", "0.1"], more].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn established_connections_are_all_tracked_and_none_is_dropped() {
    for size in ["64", "imix", "1518", "9000"] {
        let report = generated("established-16k", &["--size", size, "--flows", "4096"]);
        assert_eq!(report["tracked_all"], true, "{report:#}");
        assert_eq!(report["connections"], 4096);
        assert_eq!((&report["dropped_total"], &report["allocations"]), (&Value::from(0), &Value::from(0)));
    }
}

#[test]
fn every_packet_of_connections_opens_one_and_an_edit_drops_none() {
    for (case, bar) in [("connections", "every packet opened a connection"), ("edit", "no packet of any port dropped by the pipeline")] {
        let report = generated(case, &[]);
        let bars = report["bars"].as_array().unwrap();
        assert!(bars.iter().any(|entry| entry["what"] == bar && entry["met"] == true), "{report:#}");
    }
}

#[test]
fn a_written_pass_is_a_capture_that_is_replayed() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pass.pcap");
    let output = perf(&["--case", "established-16k", "--flows", "1024", "--pcap-out", file.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = perf(&["--pcap", file.to_str().unwrap(), "--case", "decap-conntrack", "--seconds", "0.1"]);
    check(&serde_json::from_slice(&output.stdout).unwrap(), 2048, &[], Some(1024));
}

#[test]
fn broken_files_are_refused_with_a_sentence() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("broken.pcap");
    let run = || perf(&["--pcap", file.to_str().unwrap(), "--case", "decap"]);
    std::fs::write(&file, b"not a capture at all").unwrap();
    let output = run();
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("magic number of neither pcap nor pcapng"));
    pcap(&file, &[plain([10, 0, 1, 5], [10, 0, 1, 6], (1, 2))]);
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() - 1]).unwrap();
    let output = run();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("ends within a frame at byte 24"));
}

#[test]
fn cases_are_listed_by_name() {
    let output = perf(&["--list"]);
    let text = String::from_utf8(output.stdout).unwrap();
    for case in ["forward", "encap", "decap", "decap-conntrack", "conntrack-encap"] {
        assert!(text.lines().any(|line| line.split(' ').next() == Some(case)), "{case} in {text}");
    }
}
