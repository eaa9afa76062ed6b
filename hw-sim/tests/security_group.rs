//! Acceptance 4 and 5: what a security group and a public address let through.

use std::time::{Duration, Instant};

use hw_sim::{Instance, Region, root_or_skip};

const HELLO: &str = "setsid sh -c 'while :; do echo hello | nc -l -p 8080; done' >/dev/null 2>&1 &";

/// True when tcp/8080 of `to` answers `from`.
fn opens(region: &Region, from: &Instance, to: &Instance) -> bool {
    let probe = format!("nc -w 1 {} 8080 </dev/null | grep -q hello && echo open || echo closed", to.private_address);
    region.ssh(from, &probe) == "open"
}

fn rule<'a>(group: &'a str, remote: (&'a str, &'a str)) -> Vec<(&'a str, &'a str)> {
    vec![
        ("GroupId", group),
        ("IpPermissions.1.IpProtocol", "tcp"),
        ("IpPermissions.1.FromPort", "8080"),
        ("IpPermissions.1.ToPort", "8080"),
        remote,
    ]
}

#[test]
fn groups_open_and_close_ports_and_addresses_move() {
    if !root_or_skip("security_group") {
        return;
    }
    let region = Region::start("security_group", &["--zones", "2"]);
    let zones = region.call("DescribeAvailabilityZones", &[]).all("zoneName");
    let client = region.launch(&[("Placement.AvailabilityZone", &zones[0])]);
    let server = region.launch(&[("Placement.AvailabilityZone", &zones[1])]);
    region.wait_ssh(&client, 60);
    region.wait_ssh(&server, 60);
    let rack = region.call("DescribeSecurityGroups", &[("GroupName.1", "rack")]).need("groupId");
    let group = |name: &str| region.call("CreateSecurityGroup", &[("GroupName", name), ("GroupDescription", "test")]).need("groupId");
    let (servers, clients) = (group("servers"), group("clients"));
    let join = |instance: &Instance, groups: &[&str]| {
        let names: Vec<String> = (1..=groups.len()).map(|index| format!("GroupId.{index}")).collect();
        let mut parameters = vec![("InstanceId", instance.id.as_str())];
        parameters.extend(names.iter().map(String::as_str).zip(groups.iter().copied()));
        let _ = region.call("ModifyInstanceAttribute", &parameters);
    };
    join(&server, &[&rack, &servers]);
    let _ = region.ssh(&server, HELLO);

    // Default deny, while replies to the client's own connections need no rule.
    assert!(!opens(&region, &client, &server), "tcp/8080 is open without a rule");

    // A rule opens the port within a second.
    let anywhere = rule(&servers, ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0"));
    let _ = region.call("AuthorizeSecurityGroupIngress", &anywhere);
    std::thread::sleep(Duration::from_secs(1));
    assert!(opens(&region, &client, &server), "tcp/8080 is closed 1 s after the rule");
    let _ = region.call("RevokeSecurityGroupIngress", &anywhere);
    std::thread::sleep(Duration::from_secs(1));
    assert!(!opens(&region, &client, &server), "tcp/8080 is open 1 s after the rule went");

    // By group id: membership decides.
    let members = rule(&servers, ("IpPermissions.1.Groups.1.GroupId", &clients));
    let _ = region.call("AuthorizeSecurityGroupIngress", &members);
    std::thread::sleep(Duration::from_secs(1));
    assert!(!opens(&region, &client, &server), "a stranger to the group came in");
    join(&client, &[&rack, &clients]);
    std::thread::sleep(Duration::from_secs(1));
    assert!(opens(&region, &client, &server), "a member of the group was kept out");
    join(&client, &[&rack]);
    std::thread::sleep(Duration::from_secs(1));
    assert!(!opens(&region, &client, &server), "a former member came in");

    // A tracked connection outlives its rule; a new one does not get in. What a rule
    // for everybody lets in would not be tracked.
    let own = format!("{}/32", client.private_address);
    let only_client = rule(&servers, ("IpPermissions.1.IpRanges.1.CidrIp", &own));
    let _ = region.call("AuthorizeSecurityGroupIngress", &only_client);
    std::thread::sleep(Duration::from_secs(1));
    let _ = region.ssh(&server, "sudo killall sh nc; setsid sh -c 'while :; do nc -l -p 8080 -e cat; done' >/dev/null 2>&1 &");
    std::thread::sleep(Duration::from_millis(500));
    let talk = format!("(echo one; sleep 6; echo two; sleep 1) | nc {} 8080", server.private_address);
    let mut connection = region.ssh_command(&client);
    let connection = connection.arg(talk).stdout(std::process::Stdio::piped()).spawn().expect("ssh");
    std::thread::sleep(Duration::from_secs(3));
    let _ = region.call("RevokeSecurityGroupIngress", &only_client);
    let output = connection.wait_with_output().expect("ssh");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "one\ntwo\n", "the tracked connection was cut");
    assert!(!opens(&region, &client, &server), "a new connection came in after the rule went");

    elastic_address(&region, &client, &server);
    region.terminate(&[&client.id, &server.id]);
}

/// Acceptance 5: an Elastic IP moves within a second and survives stop and start.
fn elastic_address(region: &Region, first: &Instance, second: &Instance) {
    let answer = region.call("AllocateAddress", &[("Domain", "vpc")]);
    let (allocation, address) = (answer.need("allocationId"), answer.need("publicIp"));
    let who = |wanted: &Instance| {
        let mut there = wanted.clone();
        there.public_address = address.clone();
        region.try_ssh(&there, "hostname") == (true, format!("ip-{}", wanted.private_address.replace('.', "-")))
    };
    let give = |instance: &Instance| {
        let _ =
            region.call("AssociateAddress", &[("AllocationId", &allocation), ("InstanceId", &instance.id), ("AllowReassociation", "true")]);
    };
    give(first);
    std::thread::sleep(Duration::from_secs(1));
    assert!(who(first), "{address} does not reach {}", first.id);
    give(second);
    let begun = Instant::now();
    std::thread::sleep(Duration::from_secs(1));
    assert!(who(second), "{address} does not reach {} {:?} after it moved", second.id, begun.elapsed());

    let _ = region.call("StopInstances", &[("InstanceId.1", &second.id)]);
    region.wait_state(&second.id, "stopped", 40);
    let _ = region.call("StartInstances", &[("InstanceId.1", &second.id)]);
    region.wait_state(&second.id, "running", 40);
    assert_eq!(region.instance(&second.id).public_address, address);
    region.eventually("the address reaches its guest after stop and start", 60, || who(second));
    let association = region.call("DescribeAddresses", &[("AllocationId.1", &allocation)]).need("associationId");
    let _ = region.call("DisassociateAddress", &[("AssociationId", &association)]);
    let _ = region.call("ReleaseAddress", &[("AllocationId", &allocation)]);
    // The guests lost the address that came with their launch when they got the Elastic IP.
}
