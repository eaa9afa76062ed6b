//! Moves of the state machine: by request, and by what the cards report.
//!
//! | request   | pending | running  | stopping | stopped | shutting-down, terminated |
//! | --------- | ------- | -------- | -------- | ------- | ------------------------- |
//! | start     | as is   | as is    | refused  | pending | refused                   |
//! | stop      | refused | stopping | as is    | as is   | refused                   |
//! | reboot    | refused | as is    | refused  | refused | refused                   |
//! | terminate | shutting-down from each of them      | as is                     |
//!
//! Refused is `IncorrectInstanceState`. A request that names several instances
//! moves all or none.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::launch::no_capacity;
use super::{interfaces, state_shape, volumes};
use crate::error::ApiError;
use crate::event::{self, INSTANCE_RUNNING, INSTANCE_STOPPED, INSTANCE_TERMINATED};
use crate::model::{AttachmentState, Instance, InstanceState, StateReason, Time, Volume};
use crate::placement::{Demand, Room};
use crate::resource::id::{INSTANCE, unsupported};
use crate::resource::instance_type;
use crate::resource::{address, network_interface, volume};
use crate::shapes::{
    InstanceStateChange, RebootInstancesRequest, StartInstancesRequest, StartInstancesResult, StopInstancesRequest, StopInstancesResult,
    TerminateInstancesRequest, TerminateInstancesResult,
};
use crate::world::{Call, Tx};

/// StartInstances.
///
/// # Errors
/// `IncorrectInstanceState`, `InsufficientInstanceCapacity`.
pub fn start_instances(call: &mut Call<'_>, request: StartInstancesRequest) -> Result<StartInstancesResult, ApiError> {
    unsupported(&[("AdditionalInfo", request.additional_info.is_some())])?;
    let instances = named(call, &request.instance_ids)?;
    let mut room = Room::of(&call.tx);
    for instance in &instances {
        match instance.state {
            InstanceState::Stopped => start(call, &mut room, instance)?,
            InstanceState::Pending | InstanceState::Running => {}
            _ => return Err(incorrect(instance, "started")),
        }
    }
    Ok(StartInstancesResult { starting_instances: changes(call, &instances) })
}

fn start(call: &mut Call<'_>, room: &mut Room, instance: &Instance) -> Result<(), ApiError> {
    let disks = volumes(&call.tx, &instance.account_id, &instance.id);
    if !disks.iter().any(|disk| disk.attachment.as_ref().is_some_and(|attachment| attachment.root)) {
        let message = format!("Instance '{}' does not have a volume attached at root ({})", instance.id, instance.root_device_name);
        return Err(ApiError::new("IncorrectInstanceState", message));
    }
    let kind =
        instance_type::find(&instance.instance_type).ok_or_else(|| ApiError::invalid_parameter("instanceType", &instance.instance_type))?;
    let demand = Demand { vcpus: kind.vcpus, memory_mib: kind.memory_mib };
    let placement = room.claim_instance(&instance.zone, demand).ok_or_else(|| no_capacity(&instance.instance_type, &instance.zone))?;
    let now = call.now;
    call.tx.update::<Instance>(&instance.account_id, &instance.id, |row| {
        row.state = InstanceState::Pending;
        row.state_reason = Some(StateReason { code: "pending".to_owned(), message: "pending".to_owned() });
        row.transition_reason.clear();
        row.launch_time = now;
        row.placement = Some(placement);
        row.halted = false;
    });
    // With several interfaces there is no public address besides Elastic IPs.
    if let [interface] = interfaces(&call.tx, &instance.account_id, &instance.id).as_slice()
        && interface.associate_public_ip
    {
        address::auto_take(&mut call.tx, call.region, &instance.account_id, &interface.id)?;
    }
    Ok(())
}

/// StopInstances. With `Force` the machine is not asked to shut down first.
///
/// # Errors
/// `IncorrectInstanceState`, `OperationNotPermitted` under stop protection, `UnsupportedHibernationConfiguration`.
pub fn stop_instances(call: &mut Call<'_>, request: StopInstancesRequest) -> Result<StopInstancesResult, ApiError> {
    let instances = named(call, &request.instance_ids)?;
    if request.hibernate == Some(true)
        && let Some(instance) = instances.first()
    {
        let message = format!("The instance '{}' is not configured for hibernation", instance.id);
        return Err(ApiError::new("UnsupportedHibernationConfiguration", message));
    }
    let abrupt = request.force == Some(true) || request.skip_os_shutdown == Some(true);
    let now = call.now;
    for instance in &instances {
        match instance.state {
            InstanceState::Running if instance.disable_api_stop => return Err(protected(instance, "stopped", "disableApiStop")),
            InstanceState::Running => {
                call.tx.update::<Instance>(&instance.account_id, &instance.id, |row| {
                    row.state = InstanceState::Stopping;
                    row.halted = abrupt;
                    by_user(row, now);
                });
            }
            InstanceState::Stopping if abrupt => {
                call.tx.update::<Instance>(&instance.account_id, &instance.id, |row| row.halted = true);
            }
            InstanceState::Stopping | InstanceState::Stopped => {}
            _ => return Err(incorrect(instance, "stopped")),
        }
    }
    Ok(StopInstancesResult { stopping_instances: changes(call, &instances) })
}

/// RebootInstances.
///
/// # Errors
/// `IncorrectInstanceState`.
pub fn reboot_instances(call: &mut Call<'_>, request: RebootInstancesRequest) -> Result<(), ApiError> {
    let instances = named(call, &request.instance_ids)?;
    for instance in &instances {
        if instance.state != InstanceState::Running {
            return Err(incorrect(instance, "rebooted"));
        }
        call.tx.update::<Instance>(&instance.account_id, &instance.id, |row| row.boot_count = row.boot_count.saturating_add(1));
    }
    Ok(())
}

/// TerminateInstances.
///
/// # Errors
/// `OperationNotPermitted` under termination protection.
pub fn terminate_instances(call: &mut Call<'_>, request: TerminateInstancesRequest) -> Result<TerminateInstancesResult, ApiError> {
    let instances = named(call, &request.instance_ids)?;
    let now = call.now;
    for instance in &instances {
        if matches!(instance.state, InstanceState::ShuttingDown | InstanceState::Terminated) {
            continue;
        }
        if instance.disable_api_termination {
            return Err(protected(instance, "terminated", "disableApiTermination"));
        }
        call.tx.update::<Instance>(&instance.account_id, &instance.id, |row| {
            row.state = InstanceState::ShuttingDown;
            by_user(row, now);
        });
    }
    Ok(TerminateInstancesResult { terminating_instances: changes(call, &instances) })
}

/// The instances of a request, each once.
fn named(call: &Call<'_>, ids: &[String]) -> Result<Vec<Arc<Instance>>, ApiError> {
    INSTANCE.check_all(ids)?;
    let missing: BTreeSet<&str> = ids.iter().filter(|id| call.get::<Instance>(id).is_none()).map(String::as_str).collect();
    let mut missing = missing.into_iter();
    match (missing.next(), missing.next()) {
        (None, _) => {}
        (Some(id), None) => return Err(INSTANCE.not_found(id)),
        (Some(first), Some(second)) => {
            let all: Vec<&str> = [first, second].into_iter().chain(missing).collect();
            let message = format!("The instance IDs '{}' do not exist", all.join(", "));
            return Err(ApiError::new("InvalidInstanceID.NotFound", message));
        }
    }
    let mut seen = BTreeSet::new();
    Ok(ids.iter().filter(|id| seen.insert(id.as_str())).filter_map(|id| call.get(id)).collect())
}

fn changes(call: &Call<'_>, before: &[Arc<Instance>]) -> Vec<InstanceStateChange> {
    let change = |old: &Arc<Instance>| InstanceStateChange {
        current_state: call.get::<Instance>(&old.id).map(|new| state_shape(new.state)),
        instance_id: Some(old.id.clone()),
        previous_state: Some(state_shape(old.state)),
    };
    before.iter().map(change).collect()
}

fn incorrect(instance: &Instance, done: &str) -> ApiError {
    let message = format!("The instance '{}' is not in a state from which it can be {done}.", instance.id);
    ApiError::new("IncorrectInstanceState", message)
}

fn protected(instance: &Instance, done: &str, attribute: &str) -> ApiError {
    let message = format!("The instance '{}' may not be {done}. Modify its '{attribute}' instance attribute and try again.", instance.id);
    ApiError::new("OperationNotPermitted", message)
}

fn by_user(instance: &mut Instance, now: Time) {
    instance.state_reason = Some(StateReason {
        code: "Client.UserInitiatedShutdown".to_owned(),
        message: "Client.UserInitiatedShutdown: User initiated shutdown".to_owned(),
    });
    instance.transition_reason = format!("User initiated ({})", now.gmt());
}

/// The card runs the machine.
pub(crate) fn running(tx: &mut Tx<'_>, now: Time, instance: &Instance) {
    tx.update::<Instance>(&instance.account_id, &instance.id, |row| {
        row.state = InstanceState::Running;
        row.state_reason = None;
    });
    event::emit(tx, now, &instance.account_id, INSTANCE_RUNNING, &instance.id, &[("zone", &instance.zone)]);
}

/// The guest has switched its machine off: the instance stops, or terminates when it was launched so.
pub(crate) fn guest_shut_down(tx: &mut Tx<'_>, now: Time, instance: &Instance) {
    tx.update::<Instance>(&instance.account_id, &instance.id, |row| {
        row.state = if row.terminate_on_shutdown { InstanceState::ShuttingDown } else { InstanceState::Stopping };
        row.halted = true;
        row.state_reason = Some(StateReason {
            code: "Client.InstanceInitiatedShutdown".to_owned(),
            message: "Client.InstanceInitiatedShutdown: Instance initiated shutdown".to_owned(),
        });
        row.transition_reason = format!("Instance initiated shutdown ({})", now.gmt());
    });
}

/// The card cannot run the machine: a launch ends in terminated, anything else in stopped.
pub(crate) fn fail(tx: &mut Tx<'_>, now: Time, instance: &Instance) {
    let launching = instance.state == InstanceState::Pending && instance.created == instance.launch_time;
    tx.update::<Instance>(&instance.account_id, &instance.id, |row| {
        row.state = if launching { InstanceState::ShuttingDown } else { InstanceState::Stopping };
        row.halted = true;
        let message = if launching {
            "Server.InternalError: Internal error on launch"
        } else {
            "Server.InternalError: An internal error stopped the instance"
        };
        row.state_reason = Some(StateReason { code: "Server.InternalError".to_owned(), message: message.to_owned() });
        row.transition_reason = format!("Server.InternalError ({})", now.gmt());
    });
}

/// The card has forgotten all of a stopping instance: its claim and its borrowed public address go back.
pub(crate) fn stopped(tx: &mut Tx<'_>, now: Time, instance: &Instance) {
    let (account, id) = (instance.account_id.as_str(), instance.id.as_str());
    for interface in interfaces(tx, account, id) {
        match interface.attachment.as_ref().map(|attachment| attachment.state) {
            Some(AttachmentState::Detaching) => network_interface::release(tx, account, &interface.id),
            _ => {
                address::auto_free(tx, account, &interface.id);
                network_interface::attached(tx, account, &interface.id);
            }
        }
    }
    for disk in volumes(tx, account, id) {
        tx.update::<Volume>(account, &disk.id, |row| match &mut row.attachment {
            Some(attachment) if attachment.state != AttachmentState::Detaching => attachment.state = AttachmentState::Attached,
            _ => volume::release(row),
        });
    }
    tx.update::<Instance>(account, id, |row| {
        row.state = InstanceState::Stopped;
        row.placement = None;
        row.halted = false;
    });
    event::emit(tx, now, account, INSTANCE_STOPPED, id, &[("zone", &instance.zone)]);
}

/// The card has forgotten all of an instance that shuts down: everything that it alone used goes.
pub(crate) fn terminated(tx: &mut Tx<'_>, now: Time, instance: &Instance) {
    let (account, id) = (instance.account_id.as_str(), instance.id.as_str());
    for interface in interfaces(tx, account, id) {
        if interface.attachment.as_ref().is_some_and(|attachment| attachment.delete_on_termination) {
            network_interface::remove(tx, account, &interface.id);
        } else {
            network_interface::release(tx, account, &interface.id);
        }
    }
    for disk in volumes(tx, account, id) {
        if disk.attachment.as_ref().is_some_and(|attachment| attachment.delete_on_termination) {
            volume::begin_delete(tx, account, &disk.id);
        } else {
            tx.update::<Volume>(account, &disk.id, volume::release);
        }
    }
    tx.update::<Instance>(account, id, |row| {
        row.state = InstanceState::Terminated;
        row.placement = None;
        row.terminated = Some(now);
        row.user_data.clear();
    });
    event::emit(tx, now, account, INSTANCE_TERMINATED, id, &[("zone", &instance.zone)]);
}
