use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::*;
use crate::model::{InstanceState, KeyPair, SecurityGroup, Subnet};
use crate::reconcile::testbed::{ALICE, BOB, CARD_A, CARD_A2, Testbed, request};
use crate::resource::image::operator_image_id;
use crate::resource::network_interface::create_network_interface;
use crate::resource::vpc;
use crate::shapes::{
    AttributeBooleanValue, AttributeValue, BlobAttributeValue, BlockDeviceMapping, ConnectionTrackingSpecificationRequest,
    CreateNetworkInterfaceRequest, CreditSpecificationRequest, DescribeInstanceAttributeRequest, DescribeInstanceStatusRequest,
    EbsBlockDevice, EbsInstanceBlockDeviceSpecification, Filter, InstanceBlockDeviceMappingSpecification, InstanceMetadataOptionsRequest,
    InstanceNetworkInterfaceSpecification, ModifyInstanceAttributeRequest, ModifyInstanceMetadataOptionsRequest, Placement,
    RebootInstancesRequest, RunInstancesRequest, StartInstancesRequest, StopInstancesRequest, Tag, TagSpecification,
    TerminateInstancesRequest,
};

fn refused(bed: &Testbed, change: impl FnOnce(&mut RunInstancesRequest)) -> String {
    let mut request = request("us-east-1a");
    change(&mut request);
    let code = bed.code(ALICE, |call| run_instances(call, request));
    assert_eq!(bed.read(|tx| tx.all::<Instance>().count()), 0);
    code
}

fn mapping(device: &str, size: Option<i32>) -> BlockDeviceMapping {
    let ebs = EbsBlockDevice { volume_size: size, ..Default::default() };
    BlockDeviceMapping { device_name: Some(device.into()), ebs: Some(ebs), ..Default::default() }
}

fn subnet(bed: &Testbed, account: &str) -> String {
    bed.read(|tx| tx.list::<Subnet>(account).find(|subnet| subnet.zone == "us-east-1a").unwrap().id.clone())
}

fn another_group(bed: &Testbed, name: &str, vpc_id: &str) -> String {
    let mut tx = bed.world.begin();
    let id = tx.new_id("sg");
    tx.put(SecurityGroup {
        account_id: ALICE.into(),
        id: id.clone(),
        vpc_id: vpc_id.into(),
        name: name.into(),
        description: String::new(),
        rules: vec![],
    });
    tx.commit();
    id
}

#[test]
fn bad_launches_are_refused_with_ec2s_code_and_leave_nothing() {
    let bed = Testbed::new();
    let foreign_subnet = subnet(&bed, BOB);
    let foreign_group = bed.read(|tx| tx.list::<SecurityGroup>(BOB).next().unwrap().id.clone());
    let own_subnet = subnet(&bed, ALICE);
    let other_vpc_group = another_group(&bed, "other", "vpc-0000000000000000f");
    type Change = Box<dyn Fn(&mut RunInstancesRequest)>;
    let cases: Vec<(&str, Change)> = vec![
        ("MissingParameter", Box::new(|r| r.image_id = None)),
        ("InvalidAMIID.Malformed", Box::new(|r| r.image_id = Some("mini".into()))),
        ("InvalidAMIID.NotFound", Box::new(|r| r.image_id = Some("ami-0123456789abcdef0".into()))),
        ("InvalidParameterValue", Box::new(|r| r.instance_type = Some("t3.colossal".into()))),
        ("InvalidParameterValue", Box::new(|r| r.instance_type = Some("t4g.micro".into()))),
        ("InvalidParameterValue", Box::new(|r| r.min_count = Some(0))),
        ("InvalidParameterValue", Box::new(|r| r.min_count = Some(2))),
        ("InvalidParameterValue", Box::new(|r| r.max_count = Some(-1))),
        ("InvalidKeyPair.NotFound", Box::new(|r| r.key_name = Some("none".into()))),
        ("InvalidGroup.NotFound", Box::new(|r| r.security_groups = vec!["none".into()])),
        ("InvalidGroup.NotFound", Box::new(|r| r.security_group_ids = vec!["sg-0123456789abcdef0".into()])),
        ("InvalidGroup.NotFound", Box::new(move |r| r.security_group_ids = vec![foreign_group.clone()])),
        ("InvalidGroupId.Malformed", Box::new(|r| r.security_group_ids = vec!["default".into()])),
        ("InvalidSubnetID.NotFound", Box::new(move |r| r.subnet_id = Some(foreign_subnet.clone()))),
        ("InvalidSubnetID.Malformed", Box::new(|r| r.subnet_id = Some("subnet-x".into()))),
        ("InvalidParameter", {
            let own_subnet = own_subnet.clone();
            Box::new(move |r| (r.subnet_id, r.security_group_ids) = (Some(own_subnet.clone()), vec![other_vpc_group.clone()]))
        }),
        ("InvalidParameterCombination", {
            let own_subnet = own_subnet.clone();
            Box::new(move |r| (r.subnet_id, r.security_groups) = (Some(own_subnet.clone()), vec!["default".into()]))
        }),
        ("InvalidParameterCombination", {
            let own_subnet = own_subnet.clone();
            Box::new(move |r| (r.subnet_id, r.network_interfaces) = (Some(own_subnet.clone()), vec![Default::default()]))
        }),
        (
            "InvalidParameterValue",
            Box::new(move |r| (r.subnet_id, r.placement) = (Some(own_subnet.clone()), request("us-east-1b").placement)),
        ),
        ("InvalidParameterValue", Box::new(|r| r.placement = request("eu-west-9z").placement)),
        ("MissingInput", Box::new(|r| r.placement = request("us-east-1c").placement)),
        ("InvalidParameterValue", Box::new(|r| r.private_ip_address = Some("10.9.9.9".into()))),
        ("InvalidParameterValue", Box::new(|r| r.private_ip_address = Some("172.31.0.3".into()))),
        ("InvalidParameterValue", Box::new(|r| r.private_ip_address = Some("address".into()))),
        ("InvalidUserData.Malformed", Box::new(|r| r.user_data = Some("#!/bin/sh".into()))),
        ("InvalidParameterValue", Box::new(|r| r.user_data = Some(BASE64.encode(vec![b'x'; 16_385])))),
        ("InvalidBlockDeviceMapping", Box::new(|r| r.block_device_mappings = vec![mapping("/dev/xvda", Some(0))])),
        (
            "InvalidBlockDeviceMapping",
            Box::new(|r| r.block_device_mappings = vec![mapping("/dev/sdf", Some(1)), mapping("/dev/sdf", Some(1))]),
        ),
        (
            "InvalidParameterValue",
            Box::new(|r| r.block_device_mappings = vec![mapping("/dev/sdf", Some(1)), mapping("/dev/xvdf", Some(1))]),
        ),
        ("MissingParameter", Box::new(|r| r.block_device_mappings = vec![mapping("/dev/sdf", None)])),
        ("InvalidParameterValue", Box::new(|r| r.block_device_mappings = vec![mapping("floppy", Some(1))])),
        ("InvalidParameterValue", Box::new(|r| r.client_token = Some("x".repeat(65)))),
        ("UnsupportedOperation", Box::new(|r| r.kernel_id = Some("aki-1".into()))),
        ("UnsupportedOperation", Box::new(|r| r.ipv6_address_count = Some(1))),
        ("MissingParameter", Box::new(|r| r.network_interfaces = vec![Default::default(), Default::default()])),
        ("UnsupportedOperation", Box::new(|r| r.placement = Some(Placement { tenancy: Some("host".into()), ..Default::default() }))),
        (
            "InvalidParameterCombination",
            Box::new(|r| {
                r.instance_type = Some("c5.large".into());
                r.credit_specification = Some(CreditSpecificationRequest { cpu_credits: Some("unlimited".into()) });
            }),
        ),
        (
            "InvalidParameterValue",
            Box::new(|r| {
                r.metadata_options = Some(InstanceMetadataOptionsRequest { http_put_response_hop_limit: Some(65), ..Default::default() });
            }),
        ),
    ];
    // The third zone loses its default subnet.
    let mut tx = bed.world.begin();
    let gone = tx.list::<Subnet>(ALICE).find(|subnet| subnet.zone == "us-east-1c").unwrap().id.clone();
    tx.delete::<Subnet>(ALICE, &gone);
    tx.commit();
    for (number, (expected, change)) in cases.into_iter().enumerate() {
        assert_eq!(refused(&bed, change), expected, "case {number}");
    }
    bed.read(|tx| assert_eq!((tx.all::<NetworkInterface>().count(), tx.all::<Volume>().count()), (0, 0)));
}

#[test]
fn the_whole_of_a_request_reaches_the_rows_and_the_card() {
    let mut bed = Testbed::new();
    let mut tx = bed.world.begin();
    tx.put(KeyPair {
        account_id: ALICE.into(),
        id: "key-0123456789abcdef0".into(),
        name: "mine".into(),
        kind: "ed25519".into(),
        fingerprint: String::new(),
        public_key: "ssh-ed25519 AAAA mine".into(),
        created: Time(0),
    });
    tx.commit();
    let vpc = bed.read(|tx| vpc::default_vpc(tx, ALICE).unwrap().id.clone());
    let web = another_group(&bed, "web", &vpc);
    let tags = |kind: &str| TagSpecification {
        resource_type: Some(kind.into()),
        tags: vec![Tag { key: Some("Name".into()), value: Some("web-1".into()) }],
    };
    let interface = InstanceNetworkInterfaceSpecification {
        device_index: Some(0),
        subnet_id: Some(subnet(&bed, ALICE)),
        groups: vec![web.clone()],
        private_ip_address: Some("172.31.0.77".into()),
        associate_public_ip_address: Some(false),
        ..Default::default()
    };
    let launched = bed.launch(RunInstancesRequest {
        key_name: Some("mine".into()),
        user_data: Some(BASE64.encode("#!/bin/sh\n")),
        network_interfaces: vec![interface],
        block_device_mappings: vec![mapping("/dev/sda1", Some(20)), mapping("/dev/sdf", Some(5))],
        tag_specifications: vec![tags("instance"), tags("volume")],
        metadata_options: Some(InstanceMetadataOptionsRequest {
            http_tokens: Some("required".into()),
            instance_metadata_tags: Some("enabled".into()),
            http_put_response_hop_limit: Some(2),
            ..Default::default()
        }),
        ..request("us-east-1a")
    });
    let id = launched[0].instance_id.clone().unwrap();
    bed.settle();
    let shape = bed.shape(&id);
    assert_eq!(shape.private_ip_address.as_deref(), Some("172.31.0.77"));
    assert_eq!(shape.public_ip_address, None);
    assert_eq!(shape.tags[0].value.as_deref(), Some("web-1"));
    assert_eq!(shape.security_groups[0].group_name.as_deref(), Some("web"));
    let devices: Vec<_> = shape.block_device_mappings.iter().map(|mapping| mapping.device_name.clone().unwrap()).collect();
    assert_eq!(devices, ["/dev/sdf", "/dev/xvda"]);
    let mut sizes: Vec<_> =
        bed.volumes().iter().map(|volume| (volume.size_gib, volume.attachment.as_ref().unwrap().delete_on_termination)).collect();
    sizes.sort();
    assert_eq!(sizes, [(5, false), (20, true)]);
    let card = &bed.cards[&bed.card_of(&id)];
    let machine = card.live(crate::model::ObjectKind::Instance).next().unwrap();
    let crate::reconcile::Object::Instance(machine) = machine else { panic!("no machine") };
    let metadata = machine.metadata.as_ref().unwrap();
    assert_eq!(metadata.user_data, b"#!/bin/sh\n");
    assert_eq!(metadata.public_keys[0].openssh, "ssh-ed25519 AAAA mine");
    assert_eq!(metadata.tags["Name"], "web-1");
    assert_eq!(metadata.local_hostname, "ip-172-31-0-77.ec2.internal");
    assert_eq!(metadata.security_groups, ["web"]);
    assert!(metadata.options.unwrap().tokens_required);
    assert_eq!((machine.ports, machine.disks), (1, 2));
}

#[test]
fn a_client_token_makes_one_reservation_and_refuses_another_request() {
    let mut bed = Testbed::new();
    let tokened =
        |kind: &str| RunInstancesRequest { client_token: Some("once".into()), instance_type: Some(kind.into()), ..request("us-east-1a") };
    let first = bed.launch(tokened("t3.micro"));
    let second = bed.launch(tokened("t3.micro"));
    assert_eq!(first[0].instance_id, second[0].instance_id);
    assert_eq!(bed.code(ALICE, |call| run_instances(call, tokened("t3.small"))), "IdempotentParameterMismatch");
    let other = bed.call(BOB, |call| run_instances(call, tokened("t3.micro"))).unwrap();
    assert_ne!(other.instances[0].instance_id, first[0].instance_id, "tokens are an account's own");
    let id = first[0].instance_id.clone().unwrap();
    bed.call(ALICE, |call| terminate_instances(call, TerminateInstancesRequest { instance_ids: vec![id], ..Default::default() })).unwrap();
    bed.settle();
    assert_eq!(bed.code(ALICE, |call| run_instances(call, tokened("t3.micro"))), "IdempotentInstanceTerminated");
}

#[test]
fn a_foreign_instance_is_like_an_unknown_one_to_every_action() {
    let mut bed = Testbed::new();
    let id = bed.running();
    for id in [id.as_str(), "i-0123456789abcdef0"] {
        let ids = || vec![id.to_owned()];
        let one = || Some(id.to_owned());
        let codes = [
            bed.code(BOB, |call| describe_instances(call, DescribeInstancesRequest { instance_ids: ids(), ..Default::default() })),
            bed.code(BOB, |call| {
                describe_instance_status(call, DescribeInstanceStatusRequest { instance_ids: ids(), ..Default::default() })
            }),
            bed.code(BOB, |call| start_instances(call, StartInstancesRequest { instance_ids: ids(), ..Default::default() })),
            bed.code(BOB, |call| stop_instances(call, StopInstancesRequest { instance_ids: ids(), ..Default::default() })),
            bed.code(BOB, |call| reboot_instances(call, RebootInstancesRequest { instance_ids: ids(), ..Default::default() })),
            bed.code(BOB, |call| terminate_instances(call, TerminateInstancesRequest { instance_ids: ids(), ..Default::default() })),
            bed.code(BOB, |call| {
                describe_instance_attribute(
                    call,
                    DescribeInstanceAttributeRequest { instance_id: one(), attribute: Some("userData".into()), ..Default::default() },
                )
            }),
            bed.code(BOB, |call| {
                modify_instance_attribute(call, ModifyInstanceAttributeRequest { instance_id: one(), ..Default::default() })
            }),
            bed.code(BOB, |call| {
                modify_instance_metadata_options(call, ModifyInstanceMetadataOptionsRequest { instance_id: one(), ..Default::default() })
            }),
            bed.code(BOB, |call| console_card(call, id)),
        ];
        assert!(codes.iter().all(|code| code == "InvalidInstanceID.NotFound"), "{codes:?}");
    }
    let all = bed.call(BOB, |call| describe_instances(call, DescribeInstancesRequest::default())).unwrap();
    assert!(all.reservations.is_empty());
    assert_eq!(bed.state(&id), InstanceState::Running);
}

#[test]
fn filters_and_pages_select_instances() {
    let mut bed = Testbed::new();
    let counted = RunInstancesRequest {
        min_count: Some(3),
        max_count: Some(3),
        tag_specifications: vec![TagSpecification {
            resource_type: Some("instance".into()),
            tags: vec![Tag { key: Some("env".into()), value: Some("prod".into()) }],
        }],
        ..request("us-east-1a")
    };
    bed.launch(counted);
    bed.settle();
    bed.launch(RunInstancesRequest { min_count: Some(4), max_count: Some(4), ..request("us-east-1b") });
    let count = |name: &str, values: &[&str]| {
        let filter = Filter { name: Some(name.into()), values: values.iter().map(|value| (*value).to_owned()).collect() };
        let request = DescribeInstancesRequest { filters: vec![filter], ..Default::default() };
        bed.call(ALICE, |call| describe_instances(call, request))
            .map(|answer| answer.reservations.iter().map(|r| r.instances.len()).sum::<usize>())
    };
    for (name, values, expected) in [
        ("instance-state-name", &["running"][..], 3),
        ("instance-state-name", &["p*ing", "running"], 7),
        ("instance-state-code", &["0"], 4),
        ("tag:env", &["pr?d"], 3),
        ("tag-key", &["env"], 3),
        ("availability-zone", &["us-east-1b"], 4),
        ("image-id", &[operator_image_id("mini").as_str()], 7),
        ("network-interface.subnet-id", &["subnet-*"], 7),
        ("instance.group-name", &["default"], 7),
        ("block-device-mapping.device-name", &["/dev/xvda"], 7),
        ("vpc-id", &["vpc-00000000"], 0),
        ("instance-lifecycle", &["spot"], 0),
    ] {
        assert_eq!(count(name, values).unwrap(), expected, "{name} {values:?}");
    }
    assert_eq!(count("colour", &["red"]).unwrap_err().code, "InvalidParameterValue");
    let page = |token: Option<String>| {
        let request = DescribeInstancesRequest { max_results: Some(5), next_token: token, ..Default::default() };
        bed.call(ALICE, |call| describe_instances(call, request)).unwrap()
    };
    let first = page(None);
    let second = page(first.next_token.clone());
    assert_eq!(second.next_token, None);
    let ids = |answer: &DescribeInstancesResult| -> Vec<String> {
        answer
            .reservations
            .iter()
            .flat_map(|reservation| &reservation.instances)
            .map(|instance| instance.instance_id.clone().unwrap())
            .collect()
    };
    let mut all = ids(&first);
    assert_eq!(all.len(), 5);
    all.extend(ids(&second));
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 7);
    let both = DescribeInstancesRequest { max_results: Some(5), instance_ids: vec![all[0].clone()], ..Default::default() };
    assert_eq!(bed.code(ALICE, |call| describe_instances(call, both)), "InvalidParameterCombination");
}

#[test]
fn the_type_changes_only_while_stopped_and_the_next_start_has_it() {
    let mut bed = Testbed::new();
    let id = bed.running();
    let change = |kind: &str| ModifyInstanceAttributeRequest {
        instance_id: Some(id.clone()),
        instance_type: Some(AttributeValue { value: Some(kind.into()) }),
        ..Default::default()
    };
    assert_eq!(bed.code(ALICE, |call| modify_instance_attribute(call, change("t3.small"))), "IncorrectInstanceState");
    bed.call(ALICE, |call| stop_instances(call, StopInstancesRequest { instance_ids: vec![id.clone()], ..Default::default() })).unwrap();
    bed.settle();
    assert_eq!(bed.code(ALICE, |call| modify_instance_attribute(call, change("t3.colossal"))), "InvalidInstanceAttributeValue");
    bed.call(ALICE, |call| modify_instance_attribute(call, change("t3.small"))).unwrap();
    bed.call(ALICE, |call| start_instances(call, StartInstancesRequest { instance_ids: vec![id.clone()], ..Default::default() })).unwrap();
    bed.settle();
    assert_eq!(bed.row(&id).placement.unwrap().memory_mib, 2_048);
    assert_eq!(bed.state(&id), InstanceState::Running);
}

#[test]
fn live_attributes_change_in_both_forms_and_one_at_a_time() {
    let mut bed = Testbed::new();
    let id = bed.running();
    let vpc = bed.row(&id).vpc_id;
    let web = another_group(&bed, "web", &vpc);
    let base = || ModifyInstanceAttributeRequest { instance_id: Some(id.clone()), ..Default::default() };
    let modify = |request| bed.call(ALICE, |call| modify_instance_attribute(call, request));
    let on = || Some(AttributeBooleanValue { value: Some(true) });
    modify(ModifyInstanceAttributeRequest { disable_api_termination: on(), ..base() }).unwrap();
    let terminate = || TerminateInstancesRequest { instance_ids: vec![id.clone()], ..Default::default() };
    assert_eq!(bed.code(ALICE, |call| terminate_instances(call, terminate())), "OperationNotPermitted");
    modify(ModifyInstanceAttributeRequest { attribute: Some("disableApiTermination".into()), value: Some("false".into()), ..base() })
        .unwrap();
    assert!(!bed.row(&id).disable_api_termination);
    modify(ModifyInstanceAttributeRequest { disable_api_stop: on(), ..base() }).unwrap();
    assert_eq!(
        bed.code(ALICE, |call| stop_instances(call, StopInstancesRequest { instance_ids: vec![id.clone()], ..Default::default() })),
        "OperationNotPermitted"
    );
    modify(ModifyInstanceAttributeRequest { groups: vec![web.clone()], ..base() }).unwrap();
    assert_eq!(bed.shape(&id).security_groups[0].group_id.as_deref(), Some(web.as_str()));
    modify(ModifyInstanceAttributeRequest { attribute: Some("sourceDestCheck".into()), value: Some("false".into()), ..base() }).unwrap();
    let keep = InstanceBlockDeviceMappingSpecification {
        device_name: Some("/dev/xvda".into()),
        ebs: Some(EbsInstanceBlockDeviceSpecification { delete_on_termination: Some(false), ..Default::default() }),
        ..Default::default()
    };
    modify(ModifyInstanceAttributeRequest { block_device_mappings: vec![keep], ..base() }).unwrap();
    assert!(!bed.volumes()[0].attachment.as_ref().unwrap().delete_on_termination);
    for (request, code) in [
        (base(), "InvalidParameterCombination"),
        (ModifyInstanceAttributeRequest { disable_api_stop: on(), disable_api_termination: on(), ..base() }, "InvalidParameterCombination"),
        (ModifyInstanceAttributeRequest { value: Some("x".into()), ..base() }, "MissingParameter"),
        (ModifyInstanceAttributeRequest { attribute: Some("instanceType".into()), ..base() }, "MissingParameter"),
        (ModifyInstanceAttributeRequest { user_data: Some(BlobAttributeValue::default()), ..base() }, "IncorrectInstanceState"),
        (ModifyInstanceAttributeRequest { groups: vec!["sg-0123456789abcdef0".into()], ..base() }, "InvalidGroup.NotFound"),
        (ModifyInstanceAttributeRequest { kernel: Some(AttributeValue::default()), ..base() }, "UnsupportedOperation"),
    ] {
        assert_eq!(modify(request).unwrap_err().code, code);
    }
    bed.settle();
    let card = &bed.cards[&bed.card_of(&id)];
    assert_eq!(card.port(&id).security_group_ids, [web]);
    assert!(!card.port(&id).source_dest_check);
}

#[test]
fn attributes_are_described_one_at_a_time() {
    let bed = Testbed::new();
    let launched = bed.launch(RunInstancesRequest { user_data: Some(BASE64.encode("hello")), ..request("us-east-1a") });
    let describe = |attribute: &str| {
        let request = DescribeInstanceAttributeRequest {
            instance_id: launched[0].instance_id.clone(),
            attribute: Some(attribute.into()),
            ..Default::default()
        };
        bed.call(ALICE, |call| describe_instance_attribute(call, request)).unwrap()
    };
    assert_eq!(describe("userData").user_data.unwrap().value.unwrap(), BASE64.encode("hello"));
    assert_eq!(describe("instanceType").instance_type.unwrap().value.as_deref(), Some("t3.micro"));
    assert_eq!(describe("instanceInitiatedShutdownBehavior").instance_initiated_shutdown_behavior.unwrap().value.as_deref(), Some("stop"));
    assert_eq!(describe("groupSet").groups.len(), 1);
    assert!(describe("groupSet").user_data.is_none());
}

#[test]
fn metadata_options_reach_the_card() {
    let mut bed = Testbed::new();
    let id = bed.running();
    let request =
        ModifyInstanceMetadataOptionsRequest { instance_id: Some(id.clone()), http_tokens: Some("required".into()), ..Default::default() };
    bed.call(ALICE, |call| modify_instance_metadata_options(call, request)).unwrap();
    bed.settle();
    let card = &bed.cards[&bed.card_of(&id)];
    let crate::reconcile::Object::Instance(machine) = card.live(crate::model::ObjectKind::Instance).next().unwrap() else {
        panic!("no machine")
    };
    assert!(machine.metadata.as_ref().unwrap().options.unwrap().tokens_required);
}

#[test]
fn the_status_follows_the_card() {
    let mut bed = Testbed::new();
    let id = bed.running();
    let status = |bed: &Testbed, all: bool| {
        let request = DescribeInstanceStatusRequest { include_all_instances: Some(all), ..Default::default() };
        let answer = bed.call(ALICE, |call| describe_instance_status(call, request)).unwrap();
        let word = |status: &shapes::InstanceStatus| {
            (status.system_status.clone().unwrap().status.unwrap(), status.instance_status.clone().unwrap().status.unwrap())
        };
        answer.instance_statuses.iter().map(word).collect::<Vec<_>>()
    };
    assert_eq!(status(&bed, false), [("ok".into(), "ok".into())]);
    for card in [CARD_A, CARD_A2] {
        bed.disconnect(card);
    }
    bed.settle();
    assert_eq!(status(&bed, false), [("impaired".into(), "insufficient-data".into())]);
    for card in [CARD_A, CARD_A2] {
        bed.connect(card);
    }
    bed.settle();
    bed.call(ALICE, |call| stop_instances(call, StopInstancesRequest { instance_ids: vec![id], ..Default::default() })).unwrap();
    assert_eq!(status(&bed, false), []);
    assert_eq!(status(&bed, true), [("not-applicable".into(), "not-applicable".into())]);
}

fn interface(index: i32) -> InstanceNetworkInterfaceSpecification {
    InstanceNetworkInterfaceSpecification { device_index: Some(index), ..Default::default() }
}

fn own_interface(bed: &Testbed, zone: &str) -> String {
    let subnet_id = bed.read(|tx| tx.list::<Subnet>(ALICE).find(|subnet| subnet.zone == zone).unwrap().id.clone());
    let request = CreateNetworkInterfaceRequest { subnet_id: Some(subnet_id), ..Default::default() };
    let made = bed.call(ALICE, |call| create_network_interface(call, request)).unwrap();
    made.network_interface.unwrap().network_interface_id.unwrap()
}

#[test]
fn a_launch_makes_several_interfaces_and_takes_existing_ones() {
    let mut bed = Testbed::new();
    let own = own_interface(&bed, "us-east-1a");
    let second = InstanceNetworkInterfaceSpecification { network_interface_id: Some(own.clone()), ..interface(1) };
    let first = InstanceNetworkInterfaceSpecification {
        subnet_id: Some(subnet(&bed, ALICE)),
        secondary_private_ip_address_count: Some(1),
        ..interface(0)
    };
    let launch = RunInstancesRequest { network_interfaces: vec![second, first], ..request("us-east-1a") };
    let launched = bed.launch(launch).remove(0);
    let status = |shape: &crate::shapes::Instance| -> Vec<Option<String>> {
        shape.network_interfaces.iter().map(|interface| interface.attachment.as_ref().unwrap().status.clone()).collect()
    };
    assert_eq!(status(&launched), [Some("attaching".to_owned()), Some("attaching".to_owned())]);
    assert_eq!(launched.public_ip_address, None, "several interfaces get no public address by themselves");
    let id = launched.instance_id.unwrap();
    bed.settle();
    let shape = bed.shape(&id);
    assert_eq!(status(&shape), [Some("attached".to_owned()), Some("attached".to_owned())]);
    assert_eq!(shape.network_interfaces[0].private_ip_addresses.len(), 2);
    assert_eq!(shape.network_interfaces[1].network_interface_id.as_ref(), Some(&own));
    let terminate = TerminateInstancesRequest { instance_ids: vec![id], ..Default::default() };
    bed.call(ALICE, |call| terminate_instances(call, terminate)).unwrap();
    bed.settle();
    let left: Vec<_> = bed.read(|tx| tx.list::<NetworkInterface>(ALICE).map(|row| (row.id.clone(), row.attachment.is_none())).collect());
    assert_eq!(left, [(own, true)], "what the tenant made stays");
}

#[test]
fn interfaces_that_no_launch_can_have_are_refused() {
    let bed = Testbed::new();
    let (own, far) = (own_interface(&bed, "us-east-1a"), own_interface(&bed, "us-east-1b"));
    let public = InstanceNetworkInterfaceSpecification { associate_public_ip_address: Some(true), ..interface(0) };
    let existing = |id: &str, index| InstanceNetworkInterfaceSpecification { network_interface_id: Some(id.into()), ..interface(index) };
    let crowded = InstanceNetworkInterfaceSpecification { secondary_private_ip_address_count: Some(2), ..interface(0) };
    let slow = InstanceNetworkInterfaceSpecification {
        connection_tracking_specification: Some(ConnectionTrackingSpecificationRequest { udp_timeout: Some(61), ..Default::default() }),
        ..interface(0)
    };
    for (interfaces, code) in [
        (vec![interface(1)], "InvalidParameterValue"),
        (vec![interface(0), interface(0)], "InvalidParameterValue"),
        (vec![interface(1), interface(2)], "InvalidParameterValue"),
        (vec![interface(0), interface(1), interface(2)], "AttachmentLimitExceeded"),
        (vec![public, interface(1)], "InvalidParameterCombination"),
        (vec![existing(&own, 0), existing(&own, 1)], "InvalidNetworkInterface.InUse"),
        (vec![interface(0), existing(&far, 1)], "InvalidParameterCombination"),
        (vec![crowded], "PrivateIpAddressLimitExceeded"),
        (vec![slow], "InvalidParameterValue"),
    ] {
        let launch = RunInstancesRequest { network_interfaces: interfaces, ..request("us-east-1a") };
        assert_eq!(bed.code(ALICE, |call| run_instances(call, launch)), code);
    }
    let several = RunInstancesRequest { max_count: Some(2), network_interfaces: vec![existing(&own, 0)], ..request("us-east-1a") };
    assert_eq!(bed.code(ALICE, |call| run_instances(call, several)), "InvalidParameterCombination");
    let theirs = RunInstancesRequest { network_interfaces: vec![existing(&own, 0)], ..request("us-east-1a") };
    assert_eq!(bed.code(BOB, |call| run_instances(call, theirs)), "InvalidNetworkInterfaceID.NotFound");
}
