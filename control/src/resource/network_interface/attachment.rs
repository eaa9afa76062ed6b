//! Attachments: which instance an interface belongs to, and at which place.
//!
//! ```text
//! (none) --attach--> attaching --the card has it plugged--> attached --detach--> detaching --the card forgot it--> (none)
//! ```
//!
//! A running machine takes and gives interfaces while it runs. While the instance is stopped no card has a say, and the first and the
//! last step are the same. What the cards report is taken in by [`crate::reconcile`].

use super::{MOST_ADDRESSES, private_address};
use crate::error::ApiError;
use crate::model::{AttachmentState, Instance, InstanceState, NetworkInterface, NetworkInterfaceAttachment};
use crate::resource::id::{INSTANCE, NETWORK_INTERFACE, NETWORK_INTERFACE_ATTACHMENT, unsupported};
use crate::resource::instance_type::{self, InstanceType};
use crate::resource::{address, instance};
use crate::shapes::{AttachNetworkInterfaceRequest, AttachNetworkInterfaceResult, DetachNetworkInterfaceRequest};
use crate::world::{Call, Tx};

/// Whether an instance of this type may have `count` interfaces.
///
/// # Errors
/// `AttachmentLimitExceeded`.
pub fn check_count(kind: &InstanceType, count: usize) -> Result<(), ApiError> {
    if count <= usize::try_from(kind.max_interfaces).unwrap_or(usize::MAX) {
        return Ok(());
    }
    let message = format!("Interface count {count} exceeds the limit for {}", kind.name);
    Err(ApiError::new("AttachmentLimitExceeded", message))
}

/// Whether the interfaces of an instance, with their addresses, fit another type.
///
/// # Errors
/// `AttachmentLimitExceeded`, `PrivateIpAddressLimitExceeded`.
pub fn check_fit(tx: &Tx<'_>, instance: &Instance, kind: &InstanceType) -> Result<(), ApiError> {
    let interfaces = instance::interfaces(tx, &instance.account_id, &instance.id);
    check_count(kind, interfaces.len())?;
    interfaces.iter().try_for_each(|interface| private_address::check_count(Some(kind), interface.private_ips().count()))
}

/// AttachNetworkInterface, to a running or a stopped instance.
///
/// # Errors
/// `InvalidNetworkInterface.InUse`, `IncorrectState`, `AttachmentLimitExceeded`, `PrivateIpAddressLimitExceeded`,
/// `InvalidParameterValue` for a place that is taken, `InvalidParameterCombination` for another zone.
pub fn attach_network_interface(
    call: &mut Call<'_>,
    request: AttachNetworkInterfaceRequest,
) -> Result<AttachNetworkInterfaceResult, ApiError> {
    unsupported(&[
        ("EnaQueueCount", request.ena_queue_count.is_some()),
        ("EnaSrdSpecification", request.ena_srd_specification.is_some()),
        ("NetworkCardIndex", request.network_card_index.is_some_and(|index| index != 0)),
    ])?;
    let id = NETWORK_INTERFACE.required(request.network_interface_id, "NetworkInterfaceId")?;
    let instance_id = INSTANCE.required(request.instance_id, "InstanceId")?;
    let index = read_index(request.device_index)?;
    let interface = super::own(call, &id)?;
    let instance = INSTANCE.row::<Instance>(call, &instance_id)?;
    if interface.attachment.is_some() {
        return Err(super::in_use(&id));
    }
    let state = match instance.state {
        InstanceState::Running => AttachmentState::Attaching,
        InstanceState::Stopped => AttachmentState::Attached,
        _ => return Err(unready(&instance)),
    };
    if interface.zone != instance.zone {
        let message = "You may not attach a network interface to an instance if they are not in the same availability zone";
        return Err(ApiError::invalid_combination(message));
    }
    let others = instance::interfaces(&call.tx, &instance.account_id, &instance_id);
    let at = |other: &NetworkInterface| other.attachment.as_ref().is_some_and(|attachment| attachment.device_index == index);
    if others.iter().any(|other| at(other)) {
        let message = format!("Instance '{instance_id}' already has an interface attached at device index '{index}'.");
        return Err(ApiError::invalid_value(message));
    }
    if let Some(kind) = instance_type::find(&instance.instance_type) {
        check_count(kind, others.len().saturating_add(1))?;
        private_address::check_count(Some(kind), interface.private_ips().count())?;
    }
    let attachment = NetworkInterfaceAttachment {
        id: call.tx.new_id(NETWORK_INTERFACE_ATTACHMENT.prefix),
        instance_id,
        device_index: index,
        attach_time: call.now,
        delete_on_termination: false,
        state,
    };
    let attachment_id = Some(attachment.id.clone());
    call.tx.update::<NetworkInterface>(&interface.account_id, &id, |row| row.attachment = Some(attachment));
    Ok(AttachNetworkInterfaceResult { attachment_id, network_card_index: Some(0) })
}

/// Reads a device index.
///
/// # Errors
/// `MissingParameter`, `InvalidParameterValue`.
pub fn read_index(index: Option<i32>) -> Result<u32, ApiError> {
    let index = index.ok_or_else(|| ApiError::missing_parameter("DeviceIndex"))?;
    // No instance type has more interfaces than an interface has addresses.
    let most = u32::try_from(MOST_ADDRESSES).unwrap_or(u32::MAX);
    u32::try_from(index).ok().filter(|index| *index < most).ok_or_else(|| ApiError::invalid_parameter("deviceIndex", &index.to_string()))
}

fn unready(instance: &Instance) -> ApiError {
    let message = format!("Instance '{}' is not 'running' or 'stopped'.", instance.id);
    ApiError::new("IncorrectState", message)
}

/// DetachNetworkInterface. `Force` adds nothing: a card takes a port away whether the guest has let go of it or not.
///
/// # Errors
/// `InvalidAttachmentID.NotFound`, `OperationNotPermitted` for the primary interface, `IncorrectState`.
pub fn detach_network_interface(call: &mut Call<'_>, request: DetachNetworkInterfaceRequest) -> Result<(), ApiError> {
    let attachment_id = NETWORK_INTERFACE_ATTACHMENT.required(request.attachment_id, "AttachmentId")?;
    let interface = call.find::<NetworkInterface>("attachment", &attachment_id).into_iter().next();
    let interface = interface.ok_or_else(|| NETWORK_INTERFACE_ATTACHMENT.not_found(&attachment_id))?;
    let attachment = interface.attachment.as_ref().ok_or_else(|| NETWORK_INTERFACE_ATTACHMENT.not_found(&attachment_id))?;
    if attachment.device_index == 0 {
        return Err(ApiError::new("OperationNotPermitted", "The network interface at device index 0 cannot be detached."));
    }
    if attachment.state == AttachmentState::Detaching {
        return Err(ApiError::new("IncorrectState", format!("Attachment '{attachment_id}' is in the 'detaching' state.")));
    }
    let instance = INSTANCE.row::<Instance>(call, &attachment.instance_id)?;
    match instance.state {
        InstanceState::Running => {
            call.tx.update::<NetworkInterface>(&interface.account_id, &interface.id, |row| {
                if let Some(attachment) = &mut row.attachment {
                    attachment.state = AttachmentState::Detaching;
                }
            });
        }
        InstanceState::Stopped => release(&mut call.tx, &interface.account_id, &interface.id),
        _ => return Err(unready(&instance)),
    }
    Ok(())
}

/// The card has the interface plugged, or will have it at the next start.
pub(crate) fn attached(tx: &mut Tx<'_>, account: &str, id: &str) {
    tx.update::<NetworkInterface>(account, id, |row| {
        if let Some(attachment) = &mut row.attachment {
            attachment.state = AttachmentState::Attached;
        }
    });
}

/// An interface leaves its instance; the public address that came with the launch goes back, an Elastic IP stays.
pub(crate) fn release(tx: &mut Tx<'_>, account: &str, id: &str) {
    address::auto_free(tx, account, id);
    tx.update::<NetworkInterface>(account, id, |row| {
        row.attachment = None;
        row.associate_public_ip = false;
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};

    const RUNNING: &str = "i-0123456789abcdef0";

    fn attach(id: &str, instance: &str, index: i32) -> AttachNetworkInterfaceRequest {
        AttachNetworkInterfaceRequest {
            network_interface_id: Some(id.into()),
            instance_id: Some(instance.into()),
            device_index: Some(index),
            ..Default::default()
        }
    }

    fn detach(id: &str) -> DetachNetworkInterfaceRequest {
        DetachNetworkInterfaceRequest { attachment_id: Some(id.into()), ..Default::default() }
    }

    fn set_state(fixture: &Fixture, state: InstanceState) {
        let mut tx = fixture.world.begin();
        tx.update::<Instance>(ALICE, RUNNING, |row| row.state = state);
        tx.commit();
    }

    fn state(fixture: &Fixture, id: &str) -> Option<AttachmentState> {
        let row = fixture.world.begin().get::<NetworkInterface>(ALICE, id).unwrap();
        row.attachment.as_ref().map(|attachment| attachment.state)
    }

    #[test]
    fn a_stopped_instance_takes_and_gives_at_once_and_a_running_one_waits_for_its_card() {
        let fixture = Fixture::new();
        let primary = fixture.instance(ALICE, RUNNING);
        let interface = fixture.interface(ALICE, &primary.subnet_id, None).unwrap();
        let answer = fixture.call(ALICE, |call| attach_network_interface(call, attach(&interface.id, RUNNING, 1))).unwrap();
        assert_eq!(state(&fixture, &interface.id), Some(AttachmentState::Attaching));
        let id = answer.attachment_id.unwrap();
        fixture.call(ALICE, |call| detach_network_interface(call, detach(&id))).unwrap();
        assert_eq!(state(&fixture, &interface.id), Some(AttachmentState::Detaching));
        assert_eq!(fixture.refusal(ALICE, |call| detach_network_interface(call, detach(&id))), "IncorrectState");
        fixture
            .call(ALICE, |call| {
                release(&mut call.tx, ALICE, &interface.id);
                Ok(())
            })
            .unwrap();
        set_state(&fixture, InstanceState::Stopped);
        let answer = fixture.call(ALICE, |call| attach_network_interface(call, attach(&interface.id, RUNNING, 1))).unwrap();
        assert_eq!(state(&fixture, &interface.id), Some(AttachmentState::Attached));
        fixture.call(ALICE, |call| detach_network_interface(call, detach(&answer.attachment_id.unwrap()))).unwrap();
        assert_eq!(state(&fixture, &interface.id), None);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_ec2s_codes() {
        let fixture = Fixture::new();
        let primary = fixture.instance(ALICE, RUNNING);
        let interface = fixture.interface(ALICE, &primary.subnet_id, None).unwrap();
        let elsewhere = {
            let tx = fixture.world.begin();
            tx.list::<crate::model::Subnet>(ALICE).find(|subnet| subnet.zone == "us-east-1b").unwrap().id.clone()
        };
        let far = fixture.interface(ALICE, &elsewhere, None).unwrap();
        for (id, instance, index, code) in [
            (interface.id.as_str(), RUNNING, 0, "InvalidParameterValue"),
            (&interface.id, RUNNING, -1, "InvalidParameterValue"),
            (&interface.id, RUNNING, 1000, "InvalidParameterValue"),
            (&interface.id, "i-0123456789abcdef1", 1, "InvalidInstanceID.NotFound"),
            (&far.id, RUNNING, 1, "InvalidParameterCombination"),
            (&primary.id, RUNNING, 1, "InvalidNetworkInterface.InUse"),
            ("eni-0123456789abcdef0", RUNNING, 1, "InvalidNetworkInterfaceID.NotFound"),
        ] {
            let refused = fixture.refusal(ALICE, |call| attach_network_interface(call, attach(id, instance, index)));
            assert_eq!(refused, code, "{id} {instance} {index}");
        }
        // A t3.micro takes two interfaces.
        fixture.call(ALICE, |call| attach_network_interface(call, attach(&interface.id, RUNNING, 1))).unwrap();
        let third = fixture.interface(ALICE, &primary.subnet_id, None).unwrap();
        let refused = fixture.refusal(ALICE, |call| attach_network_interface(call, attach(&third.id, RUNNING, 2)));
        assert_eq!(refused, "AttachmentLimitExceeded");
        for state in [InstanceState::Pending, InstanceState::Stopping, InstanceState::ShuttingDown, InstanceState::Terminated] {
            set_state(&fixture, state);
            let refused = fixture.refusal(ALICE, |call| attach_network_interface(call, attach(&third.id, RUNNING, 2)));
            assert_eq!(refused, "IncorrectState", "{state:?}");
        }
        let own = primary.attachment.unwrap().id;
        assert_eq!(fixture.refusal(ALICE, |call| detach_network_interface(call, detach(&own))), "OperationNotPermitted");
        assert_eq!(fixture.refusal(BOB, |call| detach_network_interface(call, detach(&own))), "InvalidAttachmentID.NotFound");
        let refused = fixture.refusal(ALICE, |call| detach_network_interface(call, detach("eni-1")));
        assert_eq!(refused, "InvalidNetworkInterfaceAttachmentId.Malformed");
    }
}
