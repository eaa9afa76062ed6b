//! Acceptance 11: bad input gets its exact code, and everything goes on serving.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use hw_sim::{Region, Seed, root_or_skip};

fn sim(name: &str) -> Region {
    Region::start(name, &["--zones", "1", "--machine", "sim"])
}

#[test]
fn each_bad_launch_gets_its_exact_code() {
    if !root_or_skip("bad launch") {
        return;
    }
    let region = sim("bad-launch");
    let image = region.image("mini");
    let with = |changes: &[(&'static str, &str)]| {
        let mut parameters =
            vec![("ImageId", image.clone()), ("InstanceType", "t3.micro".into()), ("MinCount", "1".into()), ("MaxCount", "1".into())];
        for (name, value) in changes {
            parameters.retain(|(known, _)| known != name);
            if !value.is_empty() {
                parameters.push((name, (*value).to_owned()));
            }
        }
        let borrowed: Vec<(&str, &str)> = parameters.iter().map(|(name, value)| (*name, value.as_str())).collect();
        region.refusal("RunInstances", &borrowed)
    };
    assert_eq!(with(&[("ImageId", "ami-0123456789abcdef0")]), "InvalidAMIID.NotFound");
    assert_eq!(with(&[("ImageId", "nonsense")]), "InvalidAMIID.Malformed");
    assert_eq!(with(&[("ImageId", "")]), "MissingParameter");
    assert_eq!(with(&[("InstanceType", "t9.enormous")]), "InvalidParameterValue");
    assert_eq!(with(&[("SubnetId", "subnet-0123456789abcdef0")]), "InvalidSubnetID.NotFound");
    assert_eq!(with(&[("SubnetId", "nonsense")]), "InvalidSubnetID.Malformed");
    assert_eq!(with(&[("KeyName", "absent")]), "InvalidKeyPair.NotFound");
    assert_eq!(with(&[("SecurityGroupId.1", "sg-0123456789abcdef0")]), "InvalidGroup.NotFound");
    assert_eq!(with(&[("SecurityGroupId.1", "nonsense")]), "InvalidGroupId.Malformed");
    assert_eq!(with(&[("MinCount", "0")]), "InvalidParameterValue");
    assert_eq!(with(&[("MinCount", "2")]), "InvalidParameterValue");
    assert_eq!(with(&[("MinCount", "x")]), "InvalidParameterValue");
    assert_eq!(with(&[("MinCount", "18"), ("MaxCount", "18"), ("InstanceType", "c5.2xlarge")]), "InsufficientInstanceCapacity");
    assert_eq!(with(&[("UserData", &"QUJD".repeat(50_000 / 3))]), "InvalidParameterValue");
    assert_eq!(with(&[("UserData", "***")]), "InvalidUserData.Malformed");
    assert_eq!(with(&[("Bogus", "1")]), "UnknownParameter");
    assert_eq!(with(&[("DryRun", "true")]), "DryRunOperation");

    // A group of one VPC with a subnet of another.
    let vpc = region.call("CreateVpc", &[("CidrBlock", "10.0.0.0/16")]).need("vpcId");
    let zone = region.call("DescribeAvailabilityZones", &[]).need("zoneName");
    let subnet =
        region.call("CreateSubnet", &[("VpcId", &vpc), ("CidrBlock", "10.0.0.0/28"), ("AvailabilityZone", &zone)]).need("subnetId");
    let group = region.call("DescribeSecurityGroups", &[("GroupName.1", "rack")]).need("groupId");
    assert_eq!(with(&[("SubnetId", &subnet), ("SecurityGroupId.1", &group)]), "InvalidParameter");
    // A /28 has 16 addresses of which 5 are reserved: the twelfth instance finds none.
    assert_eq!(
        with(&[("SubnetId", &subnet), ("MinCount", "12"), ("MaxCount", "12"), ("InstanceType", "t3.nano")]),
        "InsufficientFreeAddressesInSubnet"
    );

    assert_eq!(region.refusal("DescribeInstances", &[("InstanceId.1", "nonsense")]), "InvalidInstanceID.Malformed");
    assert_eq!(region.refusal("DescribeInstances", &[("InstanceId.1", "i-0123456789abcdef0")]), "InvalidInstanceID.NotFound");
    assert_eq!(region.refusal("DescribeInstances", &[("MaxResults", "3")]), "InvalidParameterValue");
    assert_eq!(region.refusal("DescribeInstances", &[("Filter.1.Name", "bogus"), ("Filter.1.Value.1", "x")]), "InvalidParameterValue");
    assert_eq!(region.refusal("FlyToTheMoon", &[]), "InvalidAction");
    assert_eq!(
        region.refusal(
            "AttachVolume",
            &[("VolumeId", "vol-0123456789abcdef0"), ("InstanceId", "i-0123456789abcdef0"), ("Device", "/dev/sdf")]
        ),
        "InvalidVolume.NotFound"
    );
    let (status, answer) = region.rest("POST", "/api/v1/instances", Some("{ not json"));
    assert_eq!(status, 400, "{answer}");
    let (status, _) = region.rest("GET", "/api/v1/nothing", None);
    assert_eq!(status, 404);
    assert!(region.call("DescribeInstances", &[]).all("instanceId").is_empty(), "a refused launch left an instance");
}

#[test]
fn signatures_are_verified_on_every_call() {
    if !root_or_skip("signature") {
        return;
    }
    let region = sim("signature");
    let keys = region.environment();
    let key = |name: &str| keys.iter().find(|(known, _)| *known == name).expect("a key").1.clone();
    let (id, secret) = (key("AWS_ACCESS_KEY_ID"), key("AWS_SECRET_ACCESS_KEY"));
    let code =
        |id: &str, secret: &str| region.try_call_as(&(id.into(), secret.into()), "DescribeRegions", &[]).expect_err("a refusal").code;
    // EC2 does not tell a wrong secret from a wrong key.
    assert_eq!(code(&id, &format!("{secret}x")), "AuthFailure");
    assert_eq!(code("AKIAABSENTABSENTABSE", &secret), "AuthFailure");
    let (status, body) = post(&region, b"Action=DescribeRegions&Version=2016-11-15", "");
    assert!(body.contains("<Code>MissingAuthenticationToken</Code>") && (400..=403).contains(&status), "{status} {body}");
}

/// An unsigned POST; the status and the body.
fn post(region: &Region, body: &[u8], headers: &str) -> (u16, String) {
    let host = region.endpoint().trim_start_matches("http://").to_owned();
    let mut stream = TcpStream::connect(&host).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
    let head = format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {}\r\n{headers}Connection: close\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).expect("head");
    // The server may answer and close before it has read everything.
    let _ = stream.write_all(body);
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text).into_owned();
    let status = text.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or(0);
    (status, text)
}

/// Sends bytes and hangs up, whatever the peer says.
fn throw(address: &str, bytes: &[u8]) {
    let Ok(mut stream) = TcpStream::connect(address) else { panic!("{address} does not listen any more") };
    let _ = stream.set_write_timeout(Some(Duration::from_millis(500)));
    let _ = stream.write_all(bytes);
}

#[test]
fn garbage_on_every_port_disturbs_nobody() {
    if !root_or_skip("garbage") {
        return;
    }
    let region = sim("garbage");
    let mut seed = Seed::new();
    let image = region.image("mini");
    let run = |token: &str| {
        let parameters =
            [("ImageId", image.as_str()), ("InstanceType", "t3.nano"), ("MinCount", "1"), ("MaxCount", "1"), ("ClientToken", token)];
        let id = region.call("RunInstances", &parameters).need("instanceId");
        region.wait_state(&id, "running", 10);
        id
    };
    let kept = run("before");
    let tenant = region.endpoint().trim_start_matches("http://").to_owned();

    let (status, _) = post(&region, &vec![b'a'; 10 << 20], "Content-Type: application/x-www-form-urlencoded\r\n");
    assert!(status == 413 || status == 400 || status == 0, "10 MB were answered with {status}");
    for _ in 0..1000 {
        let length = seed.below(400) as usize;
        let mut bytes = seed.bytes(length);
        if seed.below(2) == 0 {
            let mut request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 300\r\nAuthorization: AWS4-HMAC-SHA256 Credential=".to_vec();
            request.append(&mut bytes);
            bytes = request;
        }
        throw(&tenant, &bytes);
    }
    run("after the API");

    for setting in ["listen", "storage"] {
        let address = address(&region, setting);
        for _ in 0..300 {
            let length = seed.below(600) as usize;
            let mut bytes = seed.bytes(length);
            if setting == "storage" && seed.below(2) == 0 {
                // An ICReq that is right, then garbage.
                let mut request = vec![0, 0, 128, 0, 128, 0, 0, 0];
                request.resize(128, 0);
                request.append(&mut bytes);
                bytes = request;
            }
            throw(&address, &bytes);
        }
        run(setting);
    }
    for process in region.processes() {
        let _ = region.pid(&process.name);
    }
    region.wait_state(&kept, "running", 5);
}

/// Where the one card listens: its gRPC port, or its NVMe/TCP port.
fn address(region: &Region, setting: &str) -> String {
    let text = std::fs::read_to_string(region.dir().join("card-a-1.toml")).expect("card settings");
    let lines: Vec<&str> = text.lines().collect();
    let section = if setting == "storage" { lines.iter().position(|line| *line == "[storage]").expect("[storage]") } else { 0 };
    let line = lines[section..].iter().find(|line| line.starts_with("listen")).expect("listen");
    line.split('"').nth(1).expect("an address").to_owned()
}
