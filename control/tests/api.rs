//! The tenants' listener over TCP: signatures, both skins, and bad input.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::cast_possible_truncation)] // a test may fail

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use control::api::Api;
use control::model::{Card, Time};
use control::resource::account::{Credentials, create_account};
use control::resource::image;
use control::server;
use control::throttle::Throttle;
use control::world::{Region, World, Zone};
use sigv4::{Request, Signer};

struct Server {
    address: SocketAddr,
    credentials: Credentials,
    world: Arc<World>,
    _runtime: tokio::runtime::Runtime,
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    #[track_caller]
    fn is(&self, status: u16, text: &str) {
        assert_eq!(self.status, status, "{self:?}");
        assert!(self.body.contains(text), "no {text} in {self:?}");
    }

    #[track_caller]
    fn is_error(&self, status: u16, code: &str) {
        self.is(status, &format!("<Code>{code}</Code>"));
    }
}

impl Server {
    fn start() -> Self {
        Self::start_with(None)
    }

    fn start_with(throttle: Option<Throttle>) -> Self {
        let zone = |letter: char, number: u8| Zone { name: format!("us-east-1{letter}"), id: format!("use1-az{number}") };
        let public_pool = Ipv4Addr::new(198, 51, 100, 16)..=Ipv4Addr::new(198, 51, 100, 250);
        let region = Region { name: "us-east-1".into(), zones: vec![zone('a', 1), zone('b', 2)], public_pool };
        let world = Arc::new(World::in_memory(region, 7));
        let (created, _) = world.transact(|tx| create_account(tx, world.region(), Time::now()));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let api = Api::new(world.clone(), None, throttle);
        runtime.spawn(server::serve(listener, api.router(), std::future::pending()));
        Self { address, credentials: created.unwrap(), world, _runtime: runtime }
    }

    /// Gives the region a card with room in zone a, and an image; returns the id of the image.
    fn furnish(&self) -> String {
        let card = Card {
            id: "card-us-east-1a-1".into(),
            zone: "us-east-1a".into(),
            compute: true,
            storage: true,
            underlay_ip: Ipv4Addr::new(10, 255, 0, 11),
            storage_address: "10.255.0.11:4420".into(),
            initiator_nqn: "nqn.2026-11.cardinal:card:card-us-east-1a-1".into(),
            storage_bytes: 1 << 40,
            cores: 64,
            memory_bytes: 1 << 38,
            host_connected: true,
            machine: "sim".into(),
            watched: true,
            watched_since: Time::now(),
        };
        let (put, _) = self.world.transact(|tx| {
            tx.put(card);
            Ok::<(), ()>(())
        });
        put.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let manifest = r#"{"name": "mini", "description": "", "object": "mini.raw", "size_bytes": 1048576, "architecture": "x86_64",
            "platform": "Linux", "root_device_name": "/dev/xvda", "user": "ec2-user"}"#;
        std::fs::write(folder.path().join("mini.json"), manifest).unwrap();
        std::fs::write(folder.path().join("mini.raw"), vec![0; 1 << 20]).unwrap();
        image::register_folder(&self.world, folder.path(), Time::now()).unwrap();
        image::operator_image_id("mini")
    }

    /// The text of the first element of this name in an answer to an EC2 request.
    fn first(&self, form: &str, name: &str) -> String {
        let answer = self.ec2(form);
        let rest = answer.body.split(&format!("<{name}>")).nth(1).unwrap_or_else(|| panic!("no {name} in {answer:?}"));
        rest.split('<').next().unwrap().to_owned()
    }

    fn signer(&self, service: &str) -> Signer {
        Signer {
            access_key_id: self.credentials.access_key_id.clone(),
            secret_access_key: self.credentials.secret_access_key.clone(),
            region: "us-east-1".into(),
            service: service.into(),
        }
    }

    fn ec2(&self, form: &str) -> Answer {
        self.signed(&self.signer("ec2"), "POST", "/", &format!("Version=2016-11-15&{form}"), now_s(), &[])
    }

    fn rest(&self, method: &str, target: &str, body: &str) -> Answer {
        self.signed(&self.signer("execute-api"), method, target, body, now_s(), &[])
    }

    fn signed(&self, signer: &Signer, method: &str, target: &str, body: &str, at_s: i64, more: &[(&str, &str)]) -> Answer {
        let host = self.address.to_string();
        let mut headers = vec![("host", host.as_bytes())];
        headers.extend(more.iter().map(|(name, value)| (*name, value.as_bytes())));
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let added = signer.sign(&Request { method, path, query, headers: &headers, body: body.as_bytes() }, at_s);
        let mut sent: Vec<(&str, &str)> = added.iter().map(|(name, value)| (*name, value.as_str())).collect();
        sent.extend(more);
        self.send(method, target, &sent, body)
    }

    fn send(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let mut text = format!("{method} {target} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n", self.address);
        for (name, value) in headers {
            text += &format!("{name}: {value}\r\n");
        }
        text += &format!("content-length: {}\r\n\r\n{body}", body.len());
        self.raw(text.as_bytes()).unwrap_or_else(|| panic!("no answer to {method} {target}"))
    }

    /// Sends bytes and reads to the end; None when nothing came.
    fn raw(&self, bytes: &[u8]) -> Option<Answer> {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // The server may close while we still send.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text);
        let text = String::from_utf8(text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some(Answer { status, head: head.to_owned(), body: body.to_owned() })
    }
}

fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().try_into().unwrap()
}

#[test]
fn a_signed_request_is_answered_in_xml_with_a_request_id() {
    let server = Server::start();
    let answer = server.ec2("Action=DescribeRegions");
    answer.is(200, "<regionName>us-east-1</regionName>");
    answer.is(200, "<DescribeRegionsResponse xmlns=\"http://ec2.amazonaws.com/doc/2016-11-15/\"><requestId>");
    assert!(answer.head.contains("x-amzn-requestid: "), "{}", answer.head);
}

#[test]
fn a_presigned_request_is_answered() {
    let server = Server::start();
    let host = server.address.to_string();
    let headers = [("host", host.as_bytes())];
    let query = "Action=DescribeRegions&Version=2016-11-15";
    let request = Request { method: "GET", path: "/", query, headers: &headers, body: b"" };
    let query = server.signer("ec2").presign(&request, now_s(), 60);
    server.send("GET", &format!("/?{query}"), &[], "").is(200, "<regionName>us-east-1</regionName>");
    let query = server.signer("ec2").presign(&request, now_s() - 61, 60);
    server.send("GET", &format!("/?{query}"), &[], "").is_error(400, "RequestExpired");
}

#[test]
fn who_cannot_prove_who_he_is_is_refused_with_the_code_of_ec2() {
    let server = Server::start();
    let form = "Action=DescribeRegions&Version=2016-11-15";
    let ask = |signer: &Signer, at_s: i64, more: &[(&str, &str)]| server.signed(signer, "POST", "/", form, at_s, more);
    let right = server.signer("ec2");
    server.send("POST", "/", &[], form).is_error(403, "MissingAuthenticationToken");
    server.send("POST", "/", &[("authorization", "AWS4-HMAC-SHA256 x")], form).is_error(400, "IncompleteSignature");
    ask(&right, now_s() - 901, &[]).is_error(400, "RequestExpired");
    ask(&right, now_s() + 905, &[]).is_error(400, "RequestExpired");
    ask(&Signer { secret_access_key: "wrong".into(), ..right.clone() }, now_s(), &[]).is_error(401, "AuthFailure");
    ask(&Signer { access_key_id: "AKIANOBODY".into(), ..right.clone() }, now_s(), &[]).is_error(401, "AuthFailure");
    ask(&Signer { region: "eu-west-1".into(), ..right.clone() }, now_s(), &[]).is_error(403, "SignatureDoesNotMatch");
    ask(&Signer { service: "s3".into(), ..right.clone() }, now_s(), &[]).is_error(403, "SignatureDoesNotMatch");
    ask(&Signer { service: "sts".into(), ..right.clone() }, now_s(), &[]).is_error(403, "SignatureDoesNotMatch");
    ask(&right, now_s(), &[("x-amz-security-token", "token")]).is_error(401, "AuthFailure");
    let host = server.address.to_string();
    let headers = [("host", host.as_bytes())];
    let request = Request { method: "POST", path: "/", query: "", headers: &headers, body: form.as_bytes() };
    let added = right.sign(&request, now_s());
    let sent: Vec<(&str, &str)> = added.iter().map(|(name, value)| (*name, value.as_str())).collect();
    server.send("POST", "/", &sent, "Action=DescribeVpcs&Version=2016-11-15").is_error(401, "AuthFailure");
    server.send("POST", "/", &sent, form).is(200, "<regionName>us-east-1</regionName>");
}

#[test]
fn sts_says_who_the_caller_is() {
    let server = Server::start();
    let ask =
        |signer: &Signer, action: &str| server.signed(signer, "POST", "/", &format!("Action={action}&Version=2011-06-15"), now_s(), &[]);
    let account = &server.credentials.account_id;
    ask(&server.signer("sts"), "GetCallerIdentity").is(200, &format!("<Arn>arn:aws:iam::{account}:root</Arn>"));
    ask(&server.signer("sts"), "AssumeRole").is(400, "<Code>InvalidAction</Code>");
    let nobody = Signer { access_key_id: "AKIANOBODY".into(), ..server.signer("sts") };
    ask(&nobody, "GetCallerIdentity").is(403, "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">");
    ask(&nobody, "GetCallerIdentity").is_error(403, "InvalidClientTokenId");
}

#[test]
fn what_we_do_not_have_is_never_answered_with_success() {
    let server = Server::start();
    server.ec2("Action=CreateTransitGateway").is(400, "The action CreateTransitGateway is not valid for this web service.");
    server.ec2("Action=").is_error(400, "MissingAction");
    server.ec2("Action=DescribeRegions&Foo.1=2").is(400, "The parameter Foo.1 is not recognized");
    let old = server.signed(&server.signer("ec2"), "POST", "/", "Action=DescribeRegions&Version=2009-01-01", now_s(), &[]);
    old.is_error(400, "NoSuchVersion");
    server.send("GET", "/favicon.ico", &[], "").is_error(404, "InvalidRequest");
}

#[test]
fn a_dry_run_changes_nothing() {
    let server = Server::start();
    let count = || server.ec2("Action=DescribeVpcs").body.matches("<vpcId>").count();
    let before = count();
    server.ec2("Action=CreateVpc&CidrBlock=10.9.0.0%2F16&DryRun=true").is_error(412, "DryRunOperation");
    assert_eq!(count(), before);
    server.ec2("Action=CreateVpc&CidrBlock=10.9.0.0%2F16").is(200, "<cidrBlock>10.9.0.0/16</cidrBlock>");
    assert_eq!(count(), before + 1);
    server.ec2("Action=CreateVpc&CidrBlock=10.9.0.0%2F99&DryRun=true").is(400, "Invalid");
}

#[test]
fn the_network_of_a_vpc_is_made_over_the_wire_and_every_change_can_be_tried_first() {
    let server = Server::start();
    let vpc = server.first("Action=DescribeVpcs", "vpcId");
    let subnet = server.first("Action=DescribeSubnets&Filter.1.Name=availability-zone&Filter.1.Value.1=us-east-1a", "subnetId");
    let table = server.first("Action=DescribeRouteTables", "routeTableId");
    let tried = |form: &str| server.ec2(&format!("{form}&DryRun=true")).is_error(412, "DryRunOperation");
    let make = |form: &str, name: &str| {
        tried(form);
        server.first(form, name)
    };
    let done = |form: &str| {
        tried(form);
        server.ec2(form).is(200, "<return>true</return>");
    };
    let acl = make(
        &format!("Action=CreateNetworkAcl&VpcId={vpc}&TagSpecification.1.ResourceType=network-acl&TagSpecification.1.Tag.1.Key=k"),
        "networkAclId",
    );
    let entry = format!("NetworkAclId={acl}&RuleNumber=100&Egress=false");
    let rule = format!("{entry}&Protocol=6&RuleAction=allow&CidrBlock=10.0.0.0%2F8&PortRange.From=22&PortRange.To=22");
    done(&format!("Action=CreateNetworkAclEntry&{rule}"));
    done(&format!("Action=ReplaceNetworkAclEntry&{entry}&Protocol=1&RuleAction=deny&CidrBlock=10.0.0.0%2F8&Icmp.Type=8&Icmp.Code=-1"));
    let shown = server.ec2("Action=DescribeNetworkAcls&Filter.1.Name=entry.icmp.type&Filter.1.Value.1=8");
    shown.is(200, "<icmpTypeCode><code>-1</code><type>8</type></icmpTypeCode>");
    let held = format!("Filter.1.Name=association.subnet-id&Filter.1.Value.1={subnet}");
    let default = server.ec2(&format!("Action=DescribeNetworkAcls&{held}"));
    let association = default.body.split(&format!("<subnetId>{subnet}")).next().unwrap().rsplit("aclassoc-").next().unwrap();
    let association = association.split('<').next().unwrap();
    make(&format!("Action=ReplaceNetworkAclAssociation&AssociationId=aclassoc-{association}&NetworkAclId={acl}"), "newAssociationId");
    assert_eq!(server.first(&format!("Action=DescribeNetworkAcls&{held}"), "networkAclId"), acl);
    done(&format!("Action=DeleteNetworkAclEntry&{entry}"));
    server.ec2(&format!("Action=DeleteNetworkAcl&NetworkAclId={acl}")).is_error(400, "DependencyViolation");

    let elastic: Vec<String> = (0..2).map(|_| server.first("Action=AllocateAddress&Domain=vpc", "allocationId")).collect();
    let gateway = format!("Action=CreateNatGateway&SubnetId={subnet}&AllocationId={}&SecondaryAllocationId.1={}", elastic[0], elastic[1]);
    let nat = make(&format!("{gateway}&ClientToken=t"), "natGatewayId");
    assert_eq!(server.first(&format!("{gateway}&ClientToken=t"), "natGatewayId"), nat);
    let shown = server.ec2("Action=DescribeNatGateways&Filter.1.Name=state&Filter.1.Value.1=pending&MaxResults=5");
    shown.is(200, "<isPrimary>true</isPrimary>");
    assert_eq!(shown.body.matches("<associationId>eipassoc-").count(), 2);
    done(&format!("Action=CreateRoute&RouteTableId={table}&DestinationCidrBlock=198.18.0.0%2F15&NatGatewayId={nat}"));
    assert_eq!(make(&format!("Action=DeleteNatGateway&NatGatewayId={nat}"), "natGatewayId"), nat);
    server.ec2(&format!("Action=DescribeRouteTables&RouteTableId.1={table}")).is(200, "<state>blackhole</state>");

    let other = server.first("Action=CreateVpc&CidrBlock=10.8.0.0%2F16", "vpcId");
    let peering = make(&format!("Action=CreateVpcPeeringConnection&VpcId={vpc}&PeerVpcId={other}"), "vpcPeeringConnectionId");
    let named = format!("VpcPeeringConnectionId={peering}");
    assert_eq!(make(&format!("Action=AcceptVpcPeeringConnection&{named}"), "code"), "active");
    done(&format!("Action=ReplaceRoute&RouteTableId={table}&DestinationCidrBlock=198.18.0.0%2F15&{named}"));
    let options = "RequesterPeeringConnectionOptions.AllowDnsResolutionFromRemoteVpc=false";
    let answer = server.ec2(&format!("Action=ModifyVpcPeeringConnectionOptions&{named}&{options}"));
    answer.is(200, "<allowDnsResolutionFromRemoteVpc>false</allowDnsResolutionFromRemoteVpc>");
    done(&format!("Action=DeleteVpcPeeringConnection&{named}"));
    let shown = server.ec2(&format!("Action=DescribeVpcPeeringConnections&VpcPeeringConnectionId.1={peering}"));
    shown.is(200, &format!("<code>deleted</code><message>Deleted by {}</message>", server.credentials.account_id));
    server.ec2(&format!("Action=DescribeStaleSecurityGroups&VpcId={vpc}")).is(200, "<staleSecurityGroupSet/>");
}

#[test]
fn who_asks_too_often_is_refused_on_both_skins_and_nothing_is_done() {
    let server = Server::start_with(Some(Throttle::default()));
    let image = server.furnish();
    let query =
        |count: u32| server.ec2(&format!("Action=RunInstances&ImageId={image}&InstanceType=t3.nano&MinCount={count}&MaxCount={count}"));
    let rest = |count: u32| {
        let body = format!(r#"{{"imageId": "{image}", "instanceType": "t3.nano", "minCount": {count}, "maxCount": {count}}}"#);
        server.rest("POST", "/api/v1/instances", &body)
    };
    // More than the resource bucket holds.
    query(1_001).is_error(503, "RequestLimitExceeded");
    rest(1_001).is(503, r#"{"error":{"code":"RequestLimitExceeded","message":"Request limit exceeded."}"#);
    // The skins share the request bucket of five, which gains two a second while we ask.
    let (mut launched, mut refused) = (0, Vec::new());
    while refused.len() < 2 {
        for answer in [query(1), rest(1)] {
            match answer.status {
                200 => launched += 1,
                _ => refused.push(answer),
            }
        }
        assert!(launched < 40, "never refused");
    }
    assert!(5 <= launched, "{launched}: {refused:?}");
    for answer in &refused {
        answer.is(503, "RequestLimitExceeded");
    }
    assert_eq!(server.ec2("Action=DescribeInstances").body.matches("<instanceId>").count(), launched);
    // Who cannot prove who he is takes from nobody's bucket, and is told so.
    server.send("POST", "/", &[], "Action=RunInstances&Version=2016-11-15").is_error(403, "MissingAuthenticationToken");
    let metrics = server.send("GET", "/metrics", &[], "");
    metrics.is(200, r#"cardinal_api_throttled_total{action="RunInstances",bucket="resource"} 2"#);
    metrics.is(200, &format!(r#"cardinal_api_throttled_total{{action="RunInstances",bucket="request"}} {}"#, refused.len()));
}

#[test]
fn rest_refuses_in_json_with_a_fitting_status() {
    let server = Server::start();
    let launch = |body: &str| server.rest("POST", "/api/v1/instances", body);
    launch("{").is(400, "\"code\":\"MalformedRequestBody\"");
    launch("[]").is(400, "\"code\":\"InvalidParameterValue\"");
    launch(r#"{"imageId": 7}"#).is(400, "\"code\":\"InvalidParameterValue\"");
    launch(r#"{"imageID": "ami-1"}"#).is(400, "The parameter imageID is not recognized");
    server.rest("POST", "/api/v1/volumes", "{}").is(400, "The request must contain the parameter availabilityZone");
    server.rest("GET", "/api/v1/instances?instanceIds=i-0123456789abcdef0", "").is(404, "\"code\":\"InvalidInstanceID.NotFound\"");
    server.rest("GET", "/api/v1/instances?ids=i-0", "").is(400, "\"code\":\"UnknownParameter\"");
    server.rest("POST", "/api/v1/instances/i-0123456789abcdef0/start", "").is(404, "\"code\":\"InvalidInstanceID.NotFound\"");
    server.rest("PATCH", "/api/v1/instances", "").is(405, "\"code\":\"MethodNotAllowed\"");
    server.rest("GET", "/api/v1/cats", "").is(404, "\"requestId\":");
    server.send("GET", "/api/v1/instances", &[], "").is(403, "\"code\":\"MissingAuthenticationToken\"");
    server.rest("GET", "/api/v1/instances", "").is(200, "{\"instances\":[]}");
}

#[test]
fn a_body_of_ten_megabytes_gets_a_clear_answer() {
    let server = Server::start();
    let body = "x".repeat(10 << 20);
    server.send("POST", "/", &[], &body).is_error(413, "RequestEntityTooLarge");
    server.send("POST", "/api/v1/instances", &[], &body).is(413, "\"code\":\"RequestEntityTooLarge\"");
    let mut chunked = format!("POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n", body.len());
    chunked += &body;
    chunked += "\r\n0\r\n\r\n";
    server.raw(chunked.as_bytes()).unwrap().is_error(413, "RequestEntityTooLarge");
    let asked = format!("POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: {}\r\n\r\n", body.len());
    server.raw(asked.as_bytes()).unwrap().is_error(413, "RequestEntityTooLarge");
    server.ec2("Action=DescribeRegions").is(200, "us-east-1");
}

#[test]
fn garbage_and_cut_off_requests_disturb_nobody() {
    let server = Server::start();
    let whole = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 30\r\n\r\nAction=DescribeRegions&Version=";
    for end in 0..whole.len() {
        server.raw(&whole[..end]);
    }
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..300 {
        let mut bytes = vec![0; 1 + (state % 300) as usize];
        for byte in &mut bytes {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (state >> 56) as u8;
        }
        if let Some(answer) = server.raw(&bytes) {
            assert!((400..500).contains(&answer.status), "{answer:?}");
        }
    }
    server.ec2("Action=DescribeRegions").is(200, "us-east-1");
}

#[test]
fn the_requests_of_the_design_document_pass_as_printed() {
    let server = Server::start();
    let image = server.furnish();
    let subnet = server.first("Action=DescribeSubnets&Filter.1.Name=availability-zone&Filter.1.Value.1=us-east-1a", "subnetId");
    let group = server.first("Action=DescribeSecurityGroups", "groupId");
    server.ec2("Action=CreateKeyPair&KeyName=my-key-pair&KeyType=ed25519").is(200, "OPENSSH PRIVATE KEY");
    let body = r##"{
        "imageId": "ami-12345678", "instanceType": "t3.medium", "keyName": "my-key-pair", "securityGroupIds": ["sg-12345678"],
        "subnetId": "subnet-12345678", "userData": "#!/bin/bash\necho 'Hello World'",
        "storage": {"volumes": [{"deviceName": "/dev/sda1", "volumeType": "gp3", "volumeSize": 20, "deleteOnTermination": true}]},
        "tags": [{"key": "Name", "value": "web-server-1"}, {"key": "Environment", "value": "production"}],
        "minCount": 1, "maxCount": 1
    }"##;
    let body = body.replace("ami-12345678", &image).replace("sg-12345678", &group).replace("subnet-12345678", &subnet);
    let read = |answer: Answer| -> serde_json::Value {
        assert_eq!(answer.status, 200, "{answer:?}");
        serde_json::from_str(&answer.body).unwrap()
    };
    let keys = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let launched = read(server.rest("POST", "/api/v1/instances", &body));
    let instance = &launched["instances"][0];
    assert_eq!(keys(instance), ["instanceId", "instanceType", "launchTime", "privateIpAddress", "publicIpAddress", "state"], "{instance}");
    assert_eq!((&instance["state"], &instance["instanceType"]), (&"pending".into(), &"t3.medium".into()));
    let id = instance["instanceId"].as_str().unwrap();

    let listed = read(server.rest("GET", &format!("/api/v1/instances?instanceIds={id}"), ""));
    let instance = &listed["instances"][0];
    for key in ["instanceId", "state", "instanceType", "imageId", "launchTime", "privateIpAddress", "publicIpAddress", "vpcId", "subnetId"]
    {
        assert!(instance[key].is_string(), "{key}: {instance}");
    }
    assert_eq!(instance["securityGroups"], serde_json::json!([{"groupId": group, "groupName": "default"}]));
    assert!(instance["tags"].as_array().unwrap().contains(&serde_json::json!({"key": "Name", "value": "web-server-1"})));

    // No card makes it run here: starting it once more changes nothing, and what needs it stopped or running is refused.
    let started = read(server.rest("POST", &format!("/api/v1/instances/{id}/start"), ""));
    assert_eq!(started, serde_json::json!({"instanceId": id, "previousState": "pending", "currentState": "pending"}));
    server.rest("POST", &format!("/api/v1/instances/{id}/stop"), r#"{"hibernate": true}"#).is(400, "\"error\":");
    server.rest("POST", &format!("/api/v1/instances/{id}/stop"), "").is(409, "\"code\":\"IncorrectInstanceState\"");
    server.rest("PUT", &format!("/api/v1/instances/{id}"), r#"{"instanceType": "t3.large"}"#).is(409, "IncorrectInstanceState");
    let modified = read(server.rest("PUT", &format!("/api/v1/instances/{id}"), &format!(r#"{{"securityGroupIds": ["{group}"]}}"#)));
    assert_eq!(modified, serde_json::json!({"instanceId": id, "modifications": {"securityGroups": [group]}}));

    let body = r#"{
        "availabilityZone": "us-east-1a", "volumeType": "gp3", "size": 100, "encrypted": true,
        "kmsKeyId": "arn:aws:kms:us-east-1:123456789012:key/12345678-1234-1234-1234-123456789012"
    }"#;
    let volume = read(server.rest("POST", "/api/v1/volumes", body));
    for (key, value) in [("state", "creating"), ("volumeType", "gp3"), ("availabilityZone", "us-east-1a")] {
        assert_eq!(volume[key], value, "{volume}");
    }
    assert_eq!((&volume["size"], &volume["encrypted"]), (&100.into(), &true.into()));
    let volume_id = volume["volumeId"].as_str().unwrap();
    let attach = format!(r#"{{"instanceId": "{id}", "device": "/dev/sdf"}}"#);
    server.rest("POST", &format!("/api/v1/volumes/{volume_id}/attach"), &attach).is(409, "\"code\":\"IncorrectState\"");

    let terminated = read(server.rest("POST", &format!("/api/v1/instances/{id}/terminate"), ""));
    assert_eq!(keys(&terminated), ["currentState", "instanceId", "previousState"]);
    assert_eq!(terminated["previousState"], "pending");
}
