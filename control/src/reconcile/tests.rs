use card_proto::card;

use super::testbed::{ALICE, BOB, CARD_A, CARD_A2, CARD_B, Testbed, dice, request};
use super::{Object, Operation};
use crate::event;
use crate::model::{
    AttachmentState, Card, CardObject, Instance, InstanceState, InternetGateway, NetworkInterface, ObjectKind, PublicIp, REGION,
    RouteTable, Time, VolumeState,
};
use crate::placement::Room;
use crate::resource::address::{allocate_address, associate_address};
use crate::resource::dhcp_options::{associate_dhcp_options, create_dhcp_options};
use crate::resource::instance::{reboot_instances, run_instances, start_instances, stop_instances, terminate_instances};
use crate::resource::network_interface::{
    assign_private_ip_addresses, attach_network_interface, create_network_interface, detach_network_interface,
    modify_network_interface_attribute,
};
use crate::resource::prefix_list::{create_managed_prefix_list, modify_managed_prefix_list};
use crate::resource::route_table::create_route;
use crate::resource::security_group_rule::authorize_security_group_ingress;
use crate::resource::volume::{attach_volume, create_volume, delete_volume, detach_volume};
use crate::shapes::{
    AddPrefixListEntry, AssignPrivateIpAddressesRequest, AssociateAddressRequest, AssociateDhcpOptionsRequest,
    AttachNetworkInterfaceRequest, AttachVolumeRequest, AuthorizeSecurityGroupIngressRequest, ConnectionTrackingSpecificationRequest,
    CreateDhcpOptionsRequest, CreateManagedPrefixListRequest, CreateNetworkInterfaceRequest, CreateRouteRequest, CreateVolumeRequest,
    DeleteVolumeRequest, DetachNetworkInterfaceRequest, DetachVolumeRequest, IpPermission, IpRange, ModifyManagedPrefixListRequest,
    ModifyNetworkInterfaceAttributeRequest, NewDhcpConfiguration, PrefixListId, RebootInstancesRequest, RemovePrefixListEntry,
    RunInstancesRequest, StartInstancesRequest, StopInstancesRequest, TerminateInstancesRequest,
};
use crate::store::{self, Sqlite};
use crate::world::{Entropy, Region, World};

fn stop(id: &str) -> StopInstancesRequest {
    StopInstancesRequest { instance_ids: vec![id.into()], ..Default::default() }
}

fn start(id: &str) -> StartInstancesRequest {
    StartInstancesRequest { instance_ids: vec![id.into()], ..Default::default() }
}

fn terminate(id: &str) -> TerminateInstancesRequest {
    TerminateInstancesRequest { instance_ids: vec![id.into()], ..Default::default() }
}

fn kinds_of_events(bed: &Testbed, id: &str) -> Vec<String> {
    bed.read(|tx| event::of_resource(tx, ALICE, id)).into_iter().map(|event| event.kind).collect()
}

#[test]
fn a_launch_goes_from_pending_to_running_with_each_event_once() {
    let mut bed = Testbed::new();
    let launched = bed.launch(request("us-east-1a")).remove(0);
    let id = launched.instance_id.unwrap();
    assert_eq!(launched.state.unwrap().name.as_deref(), Some("pending"));
    assert!(launched.public_ip_address.is_some(), "a default subnet gives a public address at once");
    bed.settle();
    let shape = bed.shape(&id);
    assert_eq!(shape.state.unwrap().code, Some(16));
    assert_eq!(shape.block_device_mappings[0].ebs.as_ref().unwrap().status.as_deref(), Some("attached"));
    assert_eq!(bed.volumes()[0].state, VolumeState::InUse);
    assert_eq!(kinds_of_events(&bed, &id), [event::INSTANCE_LAUNCH_REQUESTED, event::INSTANCE_RUNNING]);
    let card = &bed.cards[&bed.card_of(&id)];
    let port = card.port(&id);
    assert_eq!(std::net::Ipv4Addr::from(port.private_ipv4).to_string(), shape.private_ip_address.unwrap());
    assert_eq!(port.routes.len(), 1);
    assert!(port.vni != 0 && port.public_ipv4 != 0);
}

#[test]
fn a_settled_region_sends_nothing_more() {
    let mut bed = Testbed::new();
    bed.running();
    let puts: u64 = bed.cards.values().map(|card| card.puts).sum();
    for card in [CARD_A, CARD_A2, CARD_B] {
        bed.disconnect(card);
        bed.settle();
        bed.connect(card);
    }
    bed.settle();
    assert_eq!(bed.cards.values().map(|card| card.puts).sum::<u64>(), puts, "a card that has everything is told nothing");
}

#[test]
fn objects_are_sent_only_with_a_generation_that_is_already_in_the_rows() {
    let mut bed = Testbed::new();
    bed.launch(request("us-east-1a"));
    for (card_id, operation) in bed.step() {
        let (kind, id) = operation.key();
        let row = bed.read(|tx| tx.get::<CardObject>(REGION, &CardObject::row_id(&card_id, kind, &id))).unwrap();
        assert_eq!(row.generation, operation.generation());
    }
}

#[test]
fn stop_gives_the_host_and_the_public_address_back_and_start_takes_new_ones() {
    let mut bed = Testbed::new();
    let id = bed.running();
    let before = bed.shape(&id);
    bed.call(ALICE, |call| stop_instances(call, stop(&id))).unwrap();
    assert_eq!(bed.state(&id), InstanceState::Stopping);
    bed.settle();
    assert_eq!(bed.state(&id), InstanceState::Stopped);
    let stopped = bed.shape(&id);
    assert_eq!(stopped.public_ip_address, None);
    assert_eq!(stopped.private_ip_address, before.private_ip_address);
    assert_eq!(stopped.state_reason.unwrap().code.as_deref(), Some("Client.UserInitiatedShutdown"));
    assert!(stopped.state_transition_reason.unwrap().starts_with("User initiated (20"));
    bed.read(|tx| {
        assert_eq!(tx.sum::<Instance>("vcpus", CARD_A) + tx.sum::<Instance>("vcpus", CARD_A2), 0);
        assert_eq!(tx.list::<PublicIp>(REGION).count(), 0);
    });
    assert!(bed.cards.values().all(|card| card.live(ObjectKind::Instance).count() + card.live(ObjectKind::Disk).count() == 0));
    assert_eq!(bed.volumes()[0].attachment.as_ref().unwrap().state, AttachmentState::Attached);
    let answer = bed.call(ALICE, |call| start_instances(call, start(&id))).unwrap();
    assert_eq!(answer.starting_instances[0].current_state.as_ref().unwrap().name.as_deref(), Some("pending"));
    bed.settle();
    assert_eq!(bed.state(&id), InstanceState::Running);
    assert!(bed.shape(&id).public_ip_address.is_some());
}

#[test]
fn terminate_leaves_nothing_and_the_instance_is_visible_for_an_hour() {
    let mut bed = Testbed::new();
    let ids = [bed.running(), bed.running()];
    for id in &ids {
        bed.call(ALICE, |call| terminate_instances(call, terminate(id))).unwrap();
        assert_eq!(bed.state(id), InstanceState::ShuttingDown);
    }
    bed.settle();
    bed.assert_no_residue();
    let again = bed.call(ALICE, |call| terminate_instances(call, terminate(&ids[0]))).unwrap();
    assert_eq!(again.terminating_instances[0].current_state.as_ref().unwrap().code, Some(48));
    let mut tx = bed.world.begin();
    bed.core.housekeep(&mut tx, bed.now.plus_ms(59 * 60 * 1000));
    tx.commit();
    assert_eq!(bed.shape(&ids[0]).subnet_id, None);
    let mut tx = bed.world.begin();
    bed.core.housekeep(&mut tx, bed.now.plus_ms(61 * 60 * 1000));
    tx.commit();
    assert_eq!(bed.read(|tx| tx.all::<Instance>().count()), 0);
}

#[test]
fn terminate_in_mid_launch_leaves_nothing() {
    for steps in 0..6 {
        let mut bed = Testbed::new();
        let id = bed.launch(request("us-east-1a"))[0].instance_id.clone().unwrap();
        for _ in 0..steps {
            let operations = bed.step();
            bed.deliver(operations);
        }
        bed.call(ALICE, |call| terminate_instances(call, terminate(&id))).unwrap();
        bed.settle();
        assert_eq!(bed.state(&id), InstanceState::Terminated, "after {steps} steps");
        bed.assert_no_residue();
    }
}

#[test]
fn terminate_of_a_stopped_instance_leaves_nothing() {
    let mut bed = Testbed::new();
    let id = bed.running();
    bed.call(ALICE, |call| stop_instances(call, stop(&id))).unwrap();
    bed.settle();
    bed.call(ALICE, |call| terminate_instances(call, terminate(&id))).unwrap();
    bed.settle();
    bed.assert_no_residue();
}

#[test]
fn every_change_of_state_that_is_not_in_the_table_is_refused() {
    use InstanceState::{Pending, Running, ShuttingDown, Stopped, Stopping, Terminated};
    let mut bed = Testbed::new();
    let id = bed.running();
    let refused = Err("IncorrectInstanceState".to_owned());
    let table = [
        (Pending, [Ok(Pending), refused.clone(), refused.clone(), Ok(ShuttingDown)]),
        (Running, [Ok(Running), Ok(Stopping), Ok(Running), Ok(ShuttingDown)]),
        (Stopping, [refused.clone(), Ok(Stopping), refused.clone(), Ok(ShuttingDown)]),
        (Stopped, [Ok(Pending), Ok(Stopped), refused.clone(), Ok(ShuttingDown)]),
        (ShuttingDown, [refused.clone(), refused.clone(), refused.clone(), Ok(ShuttingDown)]),
        (Terminated, [refused.clone(), refused.clone(), refused, Ok(Terminated)]),
    ];
    for (from, expected) in table {
        for (request, expected) in expected.into_iter().enumerate() {
            let mut tx = bed.world.begin();
            tx.update::<Instance>(ALICE, &id, |row| row.state = from);
            tx.commit();
            let result = bed.call(ALICE, |call| match request {
                0 => start_instances(call, start(&id)).map(|_| ()),
                1 => stop_instances(call, stop(&id)).map(|_| ()),
                2 => reboot_instances(call, RebootInstancesRequest { instance_ids: vec![id.clone()], ..Default::default() }),
                _ => terminate_instances(call, terminate(&id)).map(|_| ()),
            });
            let result = result.map(|()| bed.state(&id)).map_err(|error| error.code.into_owned());
            assert_eq!(result, expected, "request {request} from {from:?}");
            if result.is_err() {
                assert_eq!(bed.state(&id), from);
            }
        }
    }
}

#[test]
fn a_request_for_several_instances_moves_all_or_none() {
    let mut bed = Testbed::new();
    let (a, b) = (bed.running(), bed.running());
    bed.call(ALICE, |call| stop_instances(call, stop(&b))).unwrap();
    bed.settle();
    let both = RebootInstancesRequest { instance_ids: vec![a.clone(), b], ..Default::default() };
    assert_eq!(bed.code(ALICE, |call| reboot_instances(call, both)), "IncorrectInstanceState");
    assert_eq!(bed.row(&a).boot_count, 0);
}

#[test]
fn reboot_raises_the_boot_count_on_the_card() {
    let mut bed = Testbed::new();
    let id = bed.running();
    bed.call(ALICE, |call| reboot_instances(call, RebootInstancesRequest { instance_ids: vec![id.clone()], ..Default::default() }))
        .unwrap();
    bed.settle();
    let card = &bed.cards[&bed.card_of(&id)];
    let Some(Object::Instance(machine)) = card.live(ObjectKind::Instance).next() else { panic!("no machine") };
    assert_eq!(machine.boot, 1);
    assert_eq!(bed.state(&id), InstanceState::Running);
}

#[test]
fn a_guest_that_switches_itself_off_stops_or_terminates() {
    for (behaviour, expected) in [("stop", InstanceState::Stopped), ("terminate", InstanceState::Terminated)] {
        let mut bed = Testbed::new();
        let request = RunInstancesRequest { instance_initiated_shutdown_behavior: Some(behaviour.into()), ..request("us-east-1a") };
        let id = bed.launch(request)[0].instance_id.clone().unwrap();
        bed.settle();
        let card = bed.card_of(&id);
        bed.poke(&card, |card| card.halt(&id));
        bed.settle();
        assert_eq!(bed.state(&id), expected);
        assert_eq!(bed.row(&id).state_reason.unwrap().code, "Client.InstanceInitiatedShutdown");
    }
}

#[test]
fn a_card_that_refuses_a_part_ends_the_launch_in_terminated() {
    for kind in [ObjectKind::Port, ObjectKind::Disk, ObjectKind::Volume, ObjectKind::Instance] {
        let mut bed = Testbed::new();
        for card in bed.cards.values_mut() {
            card.refuses = Some(kind);
            // Without its volume no disk would be there, and so no machine.
            card.slow = kind == ObjectKind::Volume;
        }
        let id = bed.launch(request("us-east-1a"))[0].instance_id.clone().unwrap();
        bed.settle();
        assert_eq!(bed.state(&id), InstanceState::Terminated, "{kind:?}");
        assert_eq!(bed.row(&id).state_reason.unwrap().code, "Server.InternalError");
        bed.assert_no_residue();
    }
}

#[test]
fn a_restart_of_control_in_mid_launch_completes_it_once() {
    for steps in 0..5 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.db");
        let open = || {
            let store = loop {
                // The thread of the world before lets the file go when it has written everything.
                match Sqlite::open(&path) {
                    Ok(store) => break store,
                    Err(_) => std::thread::sleep(std::time::Duration::from_millis(2)),
                }
            };
            let opened = store::open(store).unwrap();
            World::new(Region::for_tests(), opened.tables, Entropy::System, Box::new(opened.writer), opened.durable)
        };
        let mut before = Testbed::on(open());
        let id = before.launch(request("us-east-1a"))[0].instance_id.clone().unwrap();
        for _ in 0..steps {
            let operations = before.step();
            before.deliver(operations);
        }
        // What the last step wanted sent is lost.
        before.step();
        let cards = std::mem::take(&mut before.cards);
        drop(before);
        let mut after = Testbed::on(open());
        after.cards = cards;
        for card in [CARD_A, CARD_A2, CARD_B] {
            after.disconnect(card);
            after.connect(card);
        }
        after.settle();
        assert_eq!(after.state(&id), InstanceState::Running, "after {steps} steps");
        assert_eq!(kinds_of_events(&after, &id), [event::INSTANCE_LAUNCH_REQUESTED, event::INSTANCE_RUNNING]);
        assert_eq!(after.cards.values().map(|card| card.live(ObjectKind::Instance).count()).sum::<usize>(), 1);
        after.call(ALICE, |call| terminate_instances(call, terminate(&id))).unwrap();
        after.settle();
        after.assert_no_residue();
    }
}

#[test]
fn objects_wait_for_a_card_that_is_away_and_strangers_on_it_are_deleted() {
    let mut bed = Testbed::new();
    let id = bed.running();
    let card = bed.card_of(&id);
    bed.disconnect(&card);
    bed.settle();
    bed.call(ALICE, |call| terminate_instances(call, terminate(&id))).unwrap();
    bed.settle();
    assert_eq!(bed.state(&id), InstanceState::ShuttingDown, "only the card can say that the machine is gone");
    let stranger = card::Volume { id: "vol-00000000".into(), generation: 1_000_000, ..Default::default() };
    bed.cards
        .get_mut(&card)
        .unwrap()
        .objects
        .insert((ObjectKind::Volume, stranger.id.clone()), (Some(Object::Volume(stranger)), 1_000_000));
    bed.connect(&card);
    bed.settle();
    assert_eq!(bed.state(&id), InstanceState::Terminated);
    bed.assert_no_residue();
}

#[test]
fn a_lost_reply_is_made_good_at_the_next_connection() {
    let mut bed = Testbed::new();
    let id = bed.launch(request("us-east-1a"))[0].instance_id.clone().unwrap();
    let card_id = bed.card_of(&id);
    let operations = bed.step();
    // The card takes every second one; the connection breaks before any reply arrives.
    let card = bed.cards.get_mut(&card_id).unwrap();
    for (_, operation) in operations.into_iter().filter(|(to, _)| *to == card_id).step_by(2) {
        let generation = operation.generation();
        if let Operation::Put(object) = operation {
            card.objects.insert(object.key(), (Some(*object), generation));
        }
    }
    bed.disconnect(&card_id);
    bed.settle();
    bed.connect(&card_id);
    bed.settle();
    assert_eq!(bed.state(&id), InstanceState::Running);
}

#[test]
fn no_instance_is_placed_on_a_card_that_is_away_or_without_its_host() {
    let mut bed = Testbed::new();
    bed.disconnect(CARD_B);
    bed.settle();
    assert_eq!(bed.code(ALICE, |call| run_instances(call, request("us-east-1b"))), "InsufficientInstanceCapacity");
    bed.cards.get_mut(CARD_B).unwrap().hello.host_connected = false;
    bed.connect(CARD_B);
    bed.settle();
    assert_eq!(bed.code(ALICE, |call| run_instances(call, request("us-east-1b"))), "InsufficientInstanceCapacity");
    bed.cards.get_mut(CARD_B).unwrap().hello.host_connected = true;
    bed.connect(CARD_B);
    bed.settle();
    assert!(bed.call(ALICE, |call| run_instances(call, request("us-east-1b"))).is_ok());
}

#[test]
fn capacity_bounds_the_launch_and_an_error_claims_nothing() {
    let bed = Testbed::new();
    // A t3.micro has 2 vCPUs: a card of 8 cores takes 4.
    let count = |least, most| RunInstancesRequest { min_count: Some(least), max_count: Some(most), ..request("us-east-1b") };
    assert_eq!(bed.code(ALICE, |call| run_instances(call, count(5, 5))), "InsufficientInstanceCapacity");
    assert_eq!(
        bed.read(|tx| (tx.all::<Instance>().count(), tx.all::<NetworkInterface>().count(), tx.list::<PublicIp>(REGION).count())),
        (0, 0, 0)
    );
    assert_eq!(bed.launch(count(2, 9)).len(), 4);
    assert_eq!(bed.code(ALICE, |call| run_instances(call, count(1, 1))), "InsufficientInstanceCapacity");
}

#[test]
fn a_rule_reaches_only_the_ports_of_its_group() {
    let mut bed = Testbed::new();
    let id = bed.running();
    let card_id = bed.card_of(&id);
    let group = bed.cards[&card_id].port(&id).security_group_ids[0].clone();
    let permission = IpPermission {
        ip_protocol: Some("tcp".into()),
        from_port: Some(22),
        to_port: Some(22),
        ip_ranges: vec![IpRange { cidr_ip: Some("203.0.113.0/24".into()), ..Default::default() }],
        ..Default::default()
    };
    let request = AuthorizeSecurityGroupIngressRequest { group_id: Some(group), ip_permissions: vec![permission], ..Default::default() };
    bed.call(ALICE, |call| authorize_security_group_ingress(call, request)).unwrap();
    let operations = bed.step();
    assert_eq!(operations.len(), 1, "{operations:?}");
    bed.deliver(operations);
    bed.settle();
    let port = bed.cards[&card_id].port(&id);
    assert!(port.ingress.iter().any(|rule| rule.protocol == 6 && rule.from_port == 22 && rule.to_port == 22));
}

#[test]
fn a_card_learns_of_other_ports_of_its_networks_and_of_no_other_network() {
    let mut bed = Testbed::new();
    let (a, b) = (bed.running(), bed.running());
    assert_ne!(bed.card_of(&a), bed.card_of(&b), "load spreads");
    let other = bed.call(BOB, |call| run_instances(call, request("us-east-1b"))).unwrap();
    assert_eq!(other.instances.len(), 1);
    bed.settle();
    let networks = |card: &str| -> Vec<card::Network> {
        let network = |object: &Object| if let Object::Network(network) = object { Some(network.clone()) } else { None };
        bed.cards[card].live(ObjectKind::Network).filter_map(network).collect()
    };
    assert_eq!(networks(CARD_A).len(), 1);
    assert_eq!(networks(CARD_A)[0].mappings, networks(CARD_A2)[0].mappings);
    let underlays: Vec<_> = networks(CARD_A)[0].mappings.iter().map(|mapping| mapping.underlay_ipv4).collect();
    assert_eq!(underlays.len(), 2);
    assert_ne!(underlays[0], underlays[1]);
    // The default group admits its own members.
    assert_eq!(networks(CARD_A)[0].groups[0].members.len(), 2);
    assert_eq!(networks(CARD_B).len(), 1);
    assert_ne!(networks(CARD_B)[0].vni, networks(CARD_A)[0].vni);
}

#[test]
fn a_volume_is_attached_moved_and_deleted() {
    let mut bed = Testbed::new();
    let (a, b) = (bed.running(), bed.running());
    let create = CreateVolumeRequest { availability_zone: Some("us-east-1a".into()), size: Some(10), ..Default::default() };
    let created = bed.call(ALICE, |call| create_volume(call, create)).unwrap();
    assert_eq!(created.state.as_deref(), Some("creating"));
    let volume = created.volume_id.unwrap();
    let attach = |instance: &str| AttachVolumeRequest {
        device: Some("/dev/sdf".into()),
        instance_id: Some(instance.into()),
        volume_id: Some(volume.clone()),
        ..Default::default()
    };
    let detach = || DetachVolumeRequest { volume_id: Some(volume.clone()), ..Default::default() };
    let state = |bed: &Testbed| {
        bed.read(|tx| tx.get::<crate::model::Volume>(ALICE, &volume))
            .map(|row| (row.state, row.attachment.clone().map(|attachment| attachment.state)))
    };
    assert_eq!(bed.code(ALICE, |call| attach_volume(call, attach(&a))), "IncorrectState");
    bed.settle();
    assert_eq!(state(&bed), Some((VolumeState::Available, None)));
    let answer = bed.call(ALICE, |call| attach_volume(call, attach(&a))).unwrap();
    assert_eq!(answer.state.as_deref(), Some("attaching"));
    assert_eq!(bed.code(ALICE, |call| attach_volume(call, attach(&b))), "VolumeInUse");
    bed.settle();
    assert_eq!(state(&bed), Some((VolumeState::InUse, Some(AttachmentState::Attached))));
    assert_eq!(
        bed.code(ALICE, |call| delete_volume(call, DeleteVolumeRequest { volume_id: Some(volume.clone()), ..Default::default() })),
        "VolumeInUse"
    );
    let initiator = |bed: &Testbed| {
        let find =
            |object: &Object| if let Object::Volume(row) = object { (row.id == volume).then(|| row.initiator_nqn.clone()) } else { None };
        bed.cards.values().flat_map(|card| card.live(ObjectKind::Volume)).find_map(find).unwrap()
    };
    assert!(initiator(&bed).ends_with(&bed.card_of(&a)));
    bed.call(ALICE, |call| detach_volume(call, detach())).unwrap();
    assert_eq!(state(&bed), Some((VolumeState::InUse, Some(AttachmentState::Detaching))));
    bed.settle();
    assert_eq!(state(&bed), Some((VolumeState::Available, None)));
    assert_eq!(initiator(&bed), "");
    assert_eq!(bed.code(ALICE, |call| detach_volume(call, detach())), "IncorrectState");
    bed.call(ALICE, |call| attach_volume(call, attach(&b))).unwrap();
    bed.settle();
    assert!(initiator(&bed).ends_with(&bed.card_of(&b)));
    bed.call(ALICE, |call| terminate_instances(call, terminate(&b))).unwrap();
    bed.settle();
    assert_eq!(state(&bed), Some((VolumeState::Available, None)), "an attached volume stays unless told to go");
    bed.call(ALICE, |call| delete_volume(call, DeleteVolumeRequest { volume_id: Some(volume.clone()), ..Default::default() })).unwrap();
    assert_eq!(state(&bed), Some((VolumeState::Deleting, None)));
    bed.settle();
    assert_eq!(state(&bed), None);
}

#[test]
fn the_root_volume_is_detached_only_from_a_stopped_instance_which_then_needs_another() {
    let mut bed = Testbed::new();
    let id = bed.running();
    let root = bed.volumes()[0].id.clone();
    let detach = || DetachVolumeRequest { volume_id: Some(root.clone()), ..Default::default() };
    assert_eq!(bed.code(ALICE, |call| detach_volume(call, detach())), "OperationNotPermitted");
    bed.call(ALICE, |call| stop_instances(call, stop(&id))).unwrap();
    bed.settle();
    bed.call(ALICE, |call| detach_volume(call, detach())).unwrap();
    assert_eq!(bed.volumes()[0].state, VolumeState::Available);
    assert_eq!(bed.code(ALICE, |call| start_instances(call, start(&id))), "IncorrectInstanceState");
    let attach = AttachVolumeRequest {
        device: Some("/dev/xvda".into()),
        instance_id: Some(id.clone()),
        volume_id: Some(root.clone()),
        ..Default::default()
    };
    bed.call(ALICE, |call| attach_volume(call, attach)).unwrap();
    bed.call(ALICE, |call| start_instances(call, start(&id))).unwrap();
    bed.settle();
    assert_eq!(bed.state(&id), InstanceState::Running);
}

#[test]
fn a_forced_detach_frees_the_volume_while_the_card_is_away() {
    let mut bed = Testbed::new();
    let id = bed.running();
    let create = CreateVolumeRequest { availability_zone: Some("us-east-1a".into()), size: Some(1), ..Default::default() };
    let volume = bed.call(ALICE, |call| create_volume(call, create)).unwrap().volume_id.unwrap();
    bed.settle();
    let attach = AttachVolumeRequest {
        device: Some("/dev/sdf".into()),
        instance_id: Some(id.clone()),
        volume_id: Some(volume.clone()),
        ..Default::default()
    };
    bed.call(ALICE, |call| attach_volume(call, attach)).unwrap();
    bed.settle();
    let card = bed.card_of(&id);
    bed.disconnect(&card);
    bed.settle();
    let detach = |force| DetachVolumeRequest { volume_id: Some(volume.clone()), force: Some(force), ..Default::default() };
    bed.call(ALICE, |call| detach_volume(call, detach(false))).unwrap();
    bed.settle();
    assert_eq!(bed.code(ALICE, |call| detach_volume(call, detach(false))), "IncorrectState");
    bed.call(ALICE, |call| detach_volume(call, detach(true))).unwrap();
    let row = bed.read(|tx| tx.get::<crate::model::Volume>(ALICE, &volume)).unwrap();
    assert_eq!((row.state, row.attachment.clone()), (VolumeState::Available, None));
    bed.connect(&card);
    bed.settle();
    assert_eq!(bed.cards[&card].live(ObjectKind::Disk).count(), 1, "only the root disk is left");
}

#[test]
fn a_volume_of_another_zone_is_refused() {
    let mut bed = Testbed::new();
    let a = bed.running();
    let create = CreateVolumeRequest { availability_zone: Some("us-east-1b".into()), size: Some(1), ..Default::default() };
    let volume_id = bed.call(ALICE, |call| create_volume(call, create)).unwrap().volume_id;
    bed.settle();
    let attach = AttachVolumeRequest { device: Some("/dev/sdf".into()), instance_id: Some(a), volume_id, ..Default::default() };
    assert_eq!(bed.code(ALICE, |call| attach_volume(call, attach)), "InvalidVolume.ZoneMismatch");
}

#[test]
fn an_epoch_is_never_given_twice() {
    let world = World::in_memory(Region::for_tests(), 1);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let epochs: Vec<u64> =
        [Time(5_000), Time(5_000), Time(1_000)].into_iter().map(|now| runtime.block_on(super::take_over(&world, now)).unwrap()).collect();
    assert_eq!(epochs, [5, 6, 7]);
}

#[test]
fn random_operations_never_over_commit_a_host_and_leave_nothing() {
    for seed in 0..20 {
        let mut bed = Testbed::new();
        let mut next = dice(seed);
        for _ in 0..60 {
            let ids: Vec<String> = bed.read(|tx| tx.list::<Instance>(ALICE).map(|row| row.id.clone()).collect());
            let one = if ids.is_empty() { String::new() } else { ids[next(ids.len())].clone() };
            let zone = ["us-east-1a", "us-east-1b"][next(2)];
            let card = [CARD_A, CARD_A2, CARD_B][next(3)];
            match next(9) {
                0..=2 => drop(bed.call(ALICE, |call| run_instances(call, request(zone)))),
                3 => drop(bed.call(ALICE, |call| stop_instances(call, stop(&one)))),
                4 => drop(bed.call(ALICE, |call| start_instances(call, start(&one)))),
                5 => drop(bed.call(ALICE, |call| terminate_instances(call, terminate(&one)))),
                6 if bed.cards[card].connected => bed.disconnect(card),
                6 => bed.connect(card),
                7 => bed.settle(),
                _ => {
                    let operations = bed.step();
                    bed.deliver(operations);
                }
            }
            bed.read(|tx| {
                for card in tx.all::<Card>() {
                    assert!(tx.sum::<Instance>("vcpus", &card.id) <= u64::from(card.cores), "seed {seed}");
                }
                let counted: u64 =
                    tx.all::<Instance>().filter_map(|row| row.placement.as_ref()).map(|placement| u64::from(placement.vcpus)).sum();
                let summed: u64 = bed.cards.keys().map(|card| tx.sum::<Instance>("vcpus", card)).sum();
                assert_eq!(counted, summed, "seed {seed}");
            });
        }
        for card in [CARD_A, CARD_A2, CARD_B] {
            if !bed.cards[card].connected {
                bed.connect(card);
            }
        }
        bed.settle();
        let ids: Vec<String> = bed.read(|tx| tx.list::<Instance>(ALICE).map(|row| row.id.clone()).collect());
        for id in ids {
            let settled = matches!(bed.state(&id), InstanceState::Running | InstanceState::Stopped | InstanceState::Terminated);
            assert!(settled, "seed {seed}: {:?}", bed.row(&id));
            bed.call(ALICE, |call| terminate_instances(call, terminate(&id))).unwrap();
        }
        bed.settle();
        bed.assert_no_residue();
        assert_eq!(bed.read(Room::of).instances("us-east-1a", crate::placement::Demand { vcpus: 8, memory_mib: 1 }), 2);
    }
}

fn second_interface(bed: &Testbed, instance_id: &str) -> String {
    let subnet_id = bed.shape(instance_id).subnet_id;
    let request = CreateNetworkInterfaceRequest { subnet_id, secondary_private_ip_address_count: Some(1), ..Default::default() };
    let made = bed.call(ALICE, |call| create_network_interface(call, request)).unwrap().network_interface.unwrap();
    made.network_interface_id.unwrap()
}

fn attach_interface(bed: &Testbed, id: &str, instance_id: &str) -> String {
    let request = AttachNetworkInterfaceRequest {
        network_interface_id: Some(id.into()),
        instance_id: Some(instance_id.into()),
        device_index: Some(1),
        ..Default::default()
    };
    bed.call(ALICE, |call| attach_network_interface(call, request)).unwrap().attachment_id.unwrap()
}

fn detach_interface(bed: &Testbed, attachment_id: &str) {
    let request = DetachNetworkInterfaceRequest { attachment_id: Some(attachment_id.into()), ..Default::default() };
    bed.call(ALICE, |call| detach_network_interface(call, request)).unwrap();
}

fn interface_row(bed: &Testbed, id: &str) -> NetworkInterface {
    bed.read(|tx| NetworkInterface::clone(&tx.get::<NetworkInterface>(ALICE, id).unwrap()))
}

/// The ports of an instance on its card, by device index, and how many its machine waits for.
fn ports(bed: &Testbed, instance_id: &str) -> (Vec<card::Port>, u32) {
    let card = &bed.cards[&bed.card_of(instance_id)];
    let mut ports: Vec<card::Port> = card
        .live(ObjectKind::Port)
        .filter_map(|object| match object {
            Object::Port(port) if port.instance_id == instance_id => Some(port.clone()),
            _ => None,
        })
        .collect();
    ports.sort_by_key(|port| port.device_index);
    let wanted = card.live(ObjectKind::Instance).find_map(|object| match object {
        Object::Instance(machine) if machine.id == instance_id => Some(machine.ports),
        _ => None,
    });
    (ports, wanted.unwrap())
}

#[test]
fn an_interface_is_plugged_into_a_running_machine_and_unplugged_again() {
    let mut bed = Testbed::new();
    let id = bed.running();
    let second = second_interface(&bed, &id);
    let attachment = attach_interface(&bed, &second, &id);
    bed.settle();
    assert_eq!(interface_row(&bed, &second).attachment.unwrap().state, AttachmentState::Attached);
    let (plugged, wanted) = ports(&bed, &id);
    assert_eq!((plugged.len(), wanted), (2, 2));
    assert_eq!((plugged[1].id.as_str(), plugged[1].device_index), (second.as_str(), 1));
    assert_eq!(bed.row(&id).boot_count, 0, "without a reboot");
    // The card is away: the interface stays taken until the card has let go of it.
    let card = bed.card_of(&id);
    bed.disconnect(&card);
    bed.settle();
    detach_interface(&bed, &attachment);
    bed.settle();
    assert_eq!(interface_row(&bed, &second).attachment.unwrap().state, AttachmentState::Detaching);
    bed.connect(&card);
    bed.settle();
    assert_eq!(interface_row(&bed, &second).attachment, None);
    let (plugged, wanted) = ports(&bed, &id);
    assert_eq!((plugged.len(), wanted), (1, 1));
    assert_eq!(bed.state(&id), InstanceState::Running);
}

#[test]
fn a_detach_that_overtakes_its_attach_leaves_nothing() {
    for steps in 0..4 {
        let mut bed = Testbed::new();
        let id = bed.running();
        let second = second_interface(&bed, &id);
        let attachment = attach_interface(&bed, &second, &id);
        for _ in 0..steps {
            let operations = bed.step();
            bed.deliver(operations);
        }
        detach_interface(&bed, &attachment);
        bed.settle();
        assert_eq!(interface_row(&bed, &second).attachment, None, "after {steps} steps");
        assert_eq!(ports(&bed, &id).0.len(), 1);
    }
}

#[test]
fn a_stop_ends_a_detach_and_keeps_an_attachment() {
    let mut bed = Testbed::new();
    let id = bed.running();
    let second = second_interface(&bed, &id);
    attach_interface(&bed, &second, &id);
    bed.settle();
    bed.call(ALICE, |call| stop_instances(call, stop(&id))).unwrap();
    bed.settle();
    let attachment = interface_row(&bed, &second).attachment.unwrap();
    assert_eq!(attachment.state, AttachmentState::Attached);
    bed.call(ALICE, |call| start_instances(call, start(&id))).unwrap();
    bed.settle();
    assert_eq!(ports(&bed, &id).0.len(), 2);
    detach_interface(&bed, &attachment.id);
    bed.call(ALICE, |call| stop_instances(call, stop(&id))).unwrap();
    bed.settle();
    assert_eq!(interface_row(&bed, &second).attachment, None);
}

#[test]
fn secondary_addresses_and_times_of_tracking_reach_the_card_and_the_network() {
    let mut bed = Testbed::new();
    let (one, two) = (bed.running(), bed.running());
    let interface = bed.shape(&one).network_interfaces[0].network_interface_id.clone().unwrap();
    let request = AssignPrivateIpAddressesRequest {
        network_interface_id: Some(interface.clone()),
        private_ip_addresses: vec!["172.31.1.77".into()],
        ..Default::default()
    };
    bed.call(ALICE, |call| assign_private_ip_addresses(call, request)).unwrap();
    let allocated = bed.call(ALICE, |call| allocate_address(call, Default::default())).unwrap();
    let associate = AssociateAddressRequest {
        allocation_id: allocated.allocation_id,
        network_interface_id: Some(interface.clone()),
        private_ip_address: Some("172.31.1.77".into()),
        ..Default::default()
    };
    bed.call(ALICE, |call| associate_address(call, associate)).unwrap();
    let times = ModifyNetworkInterfaceAttributeRequest {
        network_interface_id: Some(interface),
        connection_tracking_specification: Some(ConnectionTrackingSpecificationRequest {
            tcp_established_timeout: Some(120),
            ..Default::default()
        }),
        ..Default::default()
    };
    bed.call(ALICE, |call| modify_network_interface_attribute(call, times)).unwrap();
    bed.settle();
    let (plugged, _) = ports(&bed, &one);
    let ip = u32::from(std::net::Ipv4Addr::new(172, 31, 1, 77));
    let public = u32::from(allocated.public_ip.unwrap().parse::<std::net::Ipv4Addr>().unwrap());
    assert_eq!(plugged[0].secondary, [card::Address { private_ipv4: ip, public_ipv4: public }]);
    assert_ne!(plugged[0].public_ipv4, public);
    assert_eq!(plugged[0].connection_tracking.unwrap(), card::ConnectionTracking { tcp_established_s: 120, ..Default::default() });
    let network = bed.cards[&bed.card_of(&two)].live(ObjectKind::Network).find_map(|object| match object {
        Object::Network(network) => Some(network.clone()),
        _ => None,
    });
    let network = network.unwrap();
    let mapping = network.mappings.iter().find(|mapping| mapping.private_ipv4 == ip).unwrap();
    assert_eq!(mapping.mac, plugged[0].mac);
    assert!(network.groups[0].members.contains(&ip), "a member by each of its addresses");
}

fn new_list(bed: &Testbed, cidrs: &[&str]) -> String {
    let request = CreateManagedPrefixListRequest {
        prefix_list_name: Some("offices".into()),
        address_family: Some("IPv4".into()),
        max_entries: Some(5),
        entries: cidrs.iter().map(|cidr| AddPrefixListEntry { cidr: Some((*cidr).to_owned()), description: None }).collect(),
        ..Default::default()
    };
    let made = bed.call(ALICE, |call| create_managed_prefix_list(call, request)).unwrap();
    made.prefix_list.unwrap().prefix_list_id.unwrap()
}

fn prefix(cidr: &str) -> card::Prefix {
    let cidr: ipnet::Ipv4Net = cidr.parse().unwrap();
    card::Prefix { address: cidr.network().into(), length: cidr.prefix_len().into() }
}

#[test]
fn a_prefix_list_reaches_the_card_as_the_blocks_of_its_newest_version() {
    let mut bed = Testbed::new();
    let id = bed.running();
    let list = new_list(&bed, &["192.0.2.0/24", "198.51.100.0/24", "172.31.5.0/24"]);
    let shape = bed.shape(&id);
    let permission = IpPermission {
        ip_protocol: Some("tcp".into()),
        from_port: Some(22),
        to_port: Some(22),
        prefix_list_ids: vec![PrefixListId { prefix_list_id: Some(list.clone()), description: None }],
        ..Default::default()
    };
    let rule = AuthorizeSecurityGroupIngressRequest {
        group_id: shape.security_groups[0].group_id.clone(),
        ip_permissions: vec![permission],
        ..Default::default()
    };
    bed.call(ALICE, |call| authorize_security_group_ingress(call, rule)).unwrap();
    let (table, gateway) = bed.read(|tx| {
        let table = tx.list::<RouteTable>(ALICE).find(|table| table.vpc_id == *shape.vpc_id.as_ref().unwrap()).unwrap().clone();
        (table.id.clone(), tx.list::<InternetGateway>(ALICE).next().unwrap().id.clone())
    });
    for (cidr, list) in [(Some("192.0.2.0/24".to_owned()), None), (None, Some(list.clone()))] {
        let route = CreateRouteRequest {
            route_table_id: Some(table.clone()),
            destination_cidr_block: cidr,
            destination_prefix_list_id: list,
            gateway_id: Some(gateway.clone()),
            ..Default::default()
        };
        bed.call(ALICE, |call| create_route(call, route)).unwrap();
    }
    bed.settle();
    let port = ports(&bed, &id).0.remove(0);
    let sources = |port: &card::Port| -> Vec<card::Prefix> {
        port.ingress
            .iter()
            .filter(|rule| rule.from_port == 22)
            .filter_map(|rule| match rule.remote {
                Some(card::rule::Remote::Prefix(prefix)) => Some(prefix),
                _ => None,
            })
            .collect()
    };
    let destinations = |port: &card::Port| port.routes.iter().filter_map(|route| route.destination).collect::<Vec<_>>();
    for cidr in ["192.0.2.0/24", "198.51.100.0/24", "172.31.5.0/24"] {
        assert!(sources(&port).contains(&prefix(cidr)), "{cidr}");
    }
    let routes = destinations(&port);
    assert_eq!(routes.iter().filter(|found| **found == prefix("192.0.2.0/24")).count(), 1, "the route of its own beats the list");
    assert!(routes.contains(&prefix("198.51.100.0/24")));
    assert!(!routes.contains(&prefix("172.31.5.0/24")), "what is inside the VPC stays there");
    let change = ModifyManagedPrefixListRequest {
        prefix_list_id: Some(list),
        current_version: Some(1),
        add_entries: vec![AddPrefixListEntry { cidr: Some("203.0.113.0/24".into()), description: None }],
        remove_entries: vec![RemovePrefixListEntry { cidr: Some("198.51.100.0/24".into()) }],
        ..Default::default()
    };
    bed.call(ALICE, |call| modify_managed_prefix_list(call, change)).unwrap();
    bed.settle();
    let port = ports(&bed, &id).0.remove(0);
    assert!(sources(&port).contains(&prefix("203.0.113.0/24")) && !sources(&port).contains(&prefix("198.51.100.0/24")));
    assert!(destinations(&port).contains(&prefix("203.0.113.0/24")) && !destinations(&port).contains(&prefix("198.51.100.0/24")));
}

#[test]
fn dhcp_options_reach_the_card_and_none_are_none() {
    let mut bed = Testbed::new();
    let id = bed.running();
    let option = |key: &str, values: &[&str]| NewDhcpConfiguration {
        key: Some(key.into()),
        values: values.iter().map(|value| (*value).to_owned()).collect(),
    };
    let request = CreateDhcpOptionsRequest {
        dhcp_configurations: vec![
            option("domain-name", &["corp.example"]),
            option("domain-name-servers", &["10.0.0.2", "10.0.0.3"]),
            option("ntp-servers", &["10.0.0.4", "2001:db8::4"]),
        ],
        ..Default::default()
    };
    let set = bed.call(ALICE, |call| create_dhcp_options(call, request)).unwrap().dhcp_options.unwrap().dhcp_options_id;
    let vpc_id = bed.shape(&id).vpc_id;
    let hostname = ports(&bed, &id).0[0].dhcp.clone().unwrap().hostname;
    for (set, domain, dns, ntp) in
        [(set, "corp.example", vec![0x0a00_0002, 0x0a00_0003], vec![0x0a00_0004]), (Some("default".to_owned()), "", vec![], vec![])]
    {
        let associate = AssociateDhcpOptionsRequest { dhcp_options_id: set, vpc_id: vpc_id.clone(), dry_run: None };
        bed.call(ALICE, |call| associate_dhcp_options(call, associate)).unwrap();
        bed.settle();
        let told = ports(&bed, &id).0[0].dhcp.clone().unwrap();
        assert_eq!(told, card::Dhcp { hostname: hostname.clone(), domain: domain.into(), dns, ntp });
    }
}
