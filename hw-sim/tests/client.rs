//! Acceptance 1: unmodified clients, the demo, and the document's REST requests.

use std::path::PathBuf;
use std::process::Command;

use hw_sim::{Region, project_root, root_or_skip};
use serde_json::json;

/// A virtual environment with awscli and boto3 as PyPI has them.
fn python() -> PathBuf {
    let venv = project_root().join("target/venv");
    if !venv.join("complete").exists() {
        let _ = std::fs::remove_dir_all(&venv);
        let run = |command: &mut Command| assert!(command.status().expect("python3").success(), "{command:?}");
        run(Command::new("python3").args(["-m", "venv"]).arg(&venv));
        run(Command::new(venv.join("bin/pip")).args(["install", "--quiet", "--disable-pip-version-check", "awscli", "boto3"]));
        std::fs::write(venv.join("complete"), "").expect("venv");
    }
    venv.join("bin")
}

fn tell(region: &Region, program: PathBuf, script: &str) {
    let path = format!("{}:{}", python().display(), std::env::var("PATH").unwrap_or_default());
    let status = Command::new(program)
        .arg(project_root().join("hw-sim/tests/clients").join(script))
        .arg(region.dir().join("keys/rack"))
        .arg(region.ready("internet_namespace").as_str().expect("namespace"))
        .envs(region.environment())
        .env("PATH", path)
        .env("AWS_PAGER", "")
        .env("AWS_CONFIG_FILE", "/dev/null")
        .env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        .status()
        .expect(script);
    assert!(status.success(), "{script}: {status}");
}

#[test]
fn demo_boto3_and_awscli_tell_the_same_story() {
    if !root_or_skip("client") {
        return;
    }
    let region = Region::start("client", &[]);
    let status = Command::new(Region::binary("rack")).args(["demo", "--dir"]).arg(region.dir()).status().expect("rack demo");
    assert!(status.success(), "rack demo: {status}");
    tell(&region, python().join("python"), "flow.py");
    tell(&region, "bash".into(), "flow.sh");
}

#[test]
fn the_documents_rest_requests_pass_as_printed() {
    if !root_or_skip("rest") {
        return;
    }
    let region = Region::start("rest", &["--machine", "sim"]);
    let image = region.image("mini");
    let subnet = region.call("DescribeSubnets", &[]).need("subnetId");
    let zone = region.call("DescribeSubnets", &[("SubnetId.1", &subnet)]).need("availabilityZone");
    let vpc = region.call("DescribeVpcs", &[]).need("vpcId");
    let _ = region.call("CreateKeyPair", &[("KeyName", "my-key-pair")]);
    let group = |name: &str| {
        region.call("CreateSecurityGroup", &[("GroupName", name), ("GroupDescription", "web"), ("VpcId", &vpc)]).need("groupId")
    };
    let (web, other) = (group("web-servers"), group("other"));

    // API 1, Launch Instance.
    let body = json!({
        "imageId": image, "instanceType": "t3.medium", "keyName": "my-key-pair", "securityGroupIds": [web], "subnetId": subnet,
        "userData": "#!/bin/bash\necho 'Hello World'",
        "storage": {"volumes": [{"deviceName": "/dev/sda1", "volumeType": "gp3", "volumeSize": 20, "deleteOnTermination": true}]},
        "tags": [{"key": "Name", "value": "web-server-1"}, {"key": "Environment", "value": "production"}],
        "minCount": 1, "maxCount": 1
    });
    let (status, answer) = region.rest("POST", "/api/v1/instances", Some(&body.to_string()));
    assert_eq!(status, 200, "{answer}");
    let launched = &answer["instances"][0];
    assert_eq!(launched["state"], "pending");
    assert_eq!(launched["instanceType"], "t3.medium");
    for field in ["instanceId", "launchTime", "privateIpAddress", "publicIpAddress"] {
        assert!(launched[field].is_string(), "{field} in {launched}");
    }
    let id = launched["instanceId"].as_str().expect("an id").to_owned();
    region.wait_state(&id, "running", 10);

    // API 2, Describe Instances.
    let (status, answer) = region.rest("GET", &format!("/api/v1/instances?instanceIds={id}"), None);
    assert_eq!(status, 200, "{answer}");
    let shown = &answer["instances"][0];
    for (field, value) in [("instanceId", &id), ("imageId", &image), ("vpcId", &vpc), ("subnetId", &subnet)] {
        assert_eq!(shown[field], **value);
    }
    assert_eq!(shown["state"], "running");
    assert_eq!(shown["securityGroups"], json!([{"groupId": web, "groupName": "web-servers"}]));
    assert!(shown["tags"].as_array().expect("tags").contains(&json!({"key": "Name", "value": "web-server-1"})));

    // API 6 while running: a type cannot change, groups can.
    let path = format!("/api/v1/instances/{id}");
    let (status, answer) = region.rest("PUT", &path, Some(r#"{"instanceType": "t3.large"}"#));
    assert_eq!((status, answer["error"]["code"].as_str()), (409, Some("IncorrectInstanceState")), "{answer}");

    // API 4, Stop Instance.
    let (status, answer) = region.rest("POST", &format!("{path}/stop"), None);
    assert_eq!((status, answer), (200, json!({"instanceId": id, "previousState": "running", "currentState": "stopping"})));
    region.wait_state(&id, "stopped", 10);

    // API 6, Modify Instance Attributes.
    let body = json!({"instanceType": "t3.large", "securityGroupIds": [web, other]});
    let (status, answer) = region.rest("PUT", &path, Some(&body.to_string()));
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer, json!({"instanceId": id, "modifications": {"instanceType": "t3.large", "securityGroups": [web, other]}}));

    // API 3, Start Instance.
    let (status, answer) = region.rest("POST", &format!("{path}/start"), None);
    assert_eq!((status, answer), (200, json!({"instanceId": id, "previousState": "stopped", "currentState": "pending"})));
    region.wait_state(&id, "running", 10);

    // API 9, Create Volume.
    let body = json!({
        "availabilityZone": zone, "volumeType": "gp3", "size": 100, "encrypted": true,
        "kmsKeyId": "arn:aws:kms:us-east-1:123456789012:key/12345678-1234-1234-1234-123456789012"
    });
    let (status, answer) = region.rest("POST", "/api/v1/volumes", Some(&body.to_string()));
    assert_eq!(status, 200, "{answer}");
    let volume = answer["volumeId"].as_str().expect("a volume").to_owned();
    for (field, value) in
        [("state", json!("creating")), ("size", json!(100)), ("volumeType", json!("gp3")), ("availabilityZone", json!(zone))]
    {
        assert_eq!(answer[field], value, "{field}");
    }
    region.wait_volume(&volume, "available");

    // API 10, Attach Volume.
    let body = json!({"instanceId": id, "device": "/dev/sdf"});
    let (status, answer) = region.rest("POST", &format!("/api/v1/volumes/{volume}/attach"), Some(&body.to_string()));
    assert_eq!((status, answer), (200, json!({"volumeId": volume, "instanceId": id, "device": "/dev/sdf", "state": "attaching"})));
    region.wait_volume(&volume, "in-use");

    // API 5, Terminate Instance, twice.
    let (status, answer) = region.rest("POST", &format!("{path}/terminate"), None);
    assert_eq!((status, answer), (200, json!({"instanceId": id, "previousState": "running", "currentState": "shutting-down"})));
    region.wait_state(&id, "terminated", 10);
    let (status, answer) = region.rest("POST", &format!("{path}/terminate"), None);
    assert_eq!((status, answer["currentState"].as_str()), (200, Some("terminated")));
}
