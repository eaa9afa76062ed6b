//! What an operator sees of packets: capture, trace, rates, connections.

use std::process::{Command, Output};

use hw_sim::{Region, root_or_skip};
use serde_json::Value;

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn a_dropped_packet_is_seen_explained_and_counted_until_a_rule_lets_it_pass() {
    if !root_or_skip("operator") {
        return;
    }
    let region = Region::start("operator", &["--zones", "2"]);
    let zones = region.call("DescribeAvailabilityZones", &[]).all("zoneName");
    let client = region.launch(&[("Placement.AvailabilityZone", &zones[0])]);
    let server = region.launch(&[("Placement.AvailabilityZone", &zones[1])]);
    region.wait_ssh(&client, 60);
    region.wait_ssh(&server, 60);
    let run = |arguments: &[&str]| region.packet(arguments).output().expect("cardinal packet");
    let trace = ["trace", "--from", &client.id, "--to", &server.private_address, "--port", "8080"];

    // The ping shows on the guest's device and on the wire between the cards.
    let file = region.dir().join("ping.pcapng");
    let name = file.to_str().expect("a path");
    let capture = ["capture", "--instance", &client.id, "--filter", "icmp", "--count", "4", "--seconds", "20", "-w", name];
    let capturing = region.packet(&capture).stderr(std::process::Stdio::piped()).spawn().expect("capture");
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(region.pings(&client, &server.private_address));
    let captured = capturing.wait_with_output().expect("capture");
    assert!(text(&captured).contains("4 frames, 0 lost"), "{}", text(&captured));
    let bytes = std::fs::read(&file).expect("capture file");
    let holds = |mark: &str| bytes.windows(mark.len()).any(|window| window == mark.as_bytes());
    assert!(holds(" guest") && holds("underlay"), "both places have names");
    let dump = text(&Command::new("tcpdump").args(["-nr", name]).output().expect("tcpdump"));
    assert!(dump.contains("VXLAN") && dump.matches("ICMP echo").count() == 4, "{dump}");

    // Without a rule it dies at the receiver, and everything says so.
    let before = run(&trace);
    let said = text(&before);
    assert!(!before.status.success() && said.contains("denied_ingress"), "{said}");
    assert!(said.contains("none of the") && said.contains("(rack)"), "the group is named: {said}");
    let (first, second) = (region.card_of(&client.id), region.card_of(&server.id));
    let (first_id, second_id) = (region.card_id(&first), region.card_id(&second));
    assert!(said.contains(&first_id) && said.contains(&second_id), "both cards are walked: {said}");
    let probe = format!("for n in 1 2 3 4 5 6; do nc -w 1 {} 8080 </dev/null; done; true", server.private_address);
    let dropping = std::thread::scope(|scope| {
        let knocking = scope.spawn(|| region.ssh(&client, &probe));
        let mut seen = false;
        while !knocking.is_finished() {
            let top: Value = serde_json::from_slice(&run(&["top", "--card", &second_id, "--once", "--json"]).stdout).expect("JSON");
            let devices = top["cards"][0]["devices"].as_array().expect("devices");
            seen |= devices.iter().any(|device| {
                device["instance"] == server.id.as_str() && device["rates"]["denied_ingress"].as_u64().is_some_and(|rate| rate > 0)
            });
        }
        seen
    });
    assert!(dropping, "top shows the drop at the server's port");

    // With the rule it passes, and the trace names the rule.
    let rack = region.call("DescribeSecurityGroups", &[("GroupName.1", "rack")]).need("groupId");
    let open = [
        ("GroupId", rack.as_str()),
        ("IpPermissions.1.IpProtocol", "tcp"),
        ("IpPermissions.1.FromPort", "8080"),
        ("IpPermissions.1.ToPort", "8080"),
        ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0"),
    ];
    let rule = region.call("AuthorizeSecurityGroupIngress", &open).need("securityGroupRuleId");
    region.eventually("the trace passes by the new rule", 5, || {
        let after = run(&trace);
        after.status.success() && text(&after).contains(&rule) && text(&after).contains(&server.id)
    });

    // An ssh session to the client is among its connections.
    let _ = region.ssh(&client, "true");
    let flows = text(&run(&["flows", "--port", &client.id]));
    assert!(flows.lines().any(|line| line.starts_with("tcp") && line.contains(":22") && line.contains("the internet")), "{flows}");
    assert!(region.card_metrics(&first).contains("dataplane_packets_total{device=\"eni-"), "metrics name the interface");
}
