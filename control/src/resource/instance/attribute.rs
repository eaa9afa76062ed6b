//! Attributes of instances: what can be changed live, and what only while stopped.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::{block_device, interfaces, volumes};
use crate::error::ApiError;
use crate::model::{Instance, InstanceState, MetadataOptions, NetworkInterface, Volume};
use crate::resource::id::{INSTANCE, unsupported};
use crate::resource::{instance_type, network_interface};
use crate::shapes::{
    self, AttributeBooleanValue, AttributeValue, BlobAttributeValue, DescribeInstanceAttributeRequest, InstanceAttribute,
    InstanceMetadataOptionsRequest, InstanceMetadataOptionsResponse, ModifyInstanceAttributeRequest, ModifyInstanceMetadataOptionsRequest,
    ModifyInstanceMetadataOptionsResult,
};
use crate::world::Call;

/// The most bytes of user data, decoded.
pub(super) const MOST_USER_DATA: usize = 16_384;

/// DescribeInstanceAttribute.
///
/// # Errors
/// The `Malformed` or `NotFound` answer about the id.
pub fn describe_instance_attribute(call: &mut Call<'_>, request: DescribeInstanceAttributeRequest) -> Result<InstanceAttribute, ApiError> {
    let id = INSTANCE.required(request.instance_id, "InstanceId")?;
    let instance = INSTANCE.row::<Instance>(call, &id)?;
    let interfaces = interfaces(&call.tx, &instance.account_id, &id);
    let primary = interfaces.first();
    let text = |value: &str| Some(AttributeValue { value: Some(value.to_owned()) });
    let flag = |value: bool| Some(AttributeBooleanValue { value: Some(value) });
    let mut answer = InstanceAttribute { instance_id: Some(id.clone()), ..Default::default() };
    match request.attribute.as_deref().unwrap_or_default() {
        "blockDeviceMapping" => {
            answer.block_device_mappings =
                volumes(&call.tx, &instance.account_id, &id).iter().filter_map(|volume| block_device(volume)).collect();
        }
        "disableApiStop" => answer.disable_api_stop = flag(instance.disable_api_stop),
        "disableApiTermination" => answer.disable_api_termination = flag(instance.disable_api_termination),
        "ebsOptimized" => answer.ebs_optimized = flag(instance.ebs_optimized),
        "enaSupport" => answer.ena_support = flag(true),
        "enclaveOptions" => answer.enclave_options = Some(shapes::EnclaveOptions { enabled: Some(false) }),
        "groupSet" => answer.groups = primary.map(|interface| network_interface::groups(&call.tx, interface)).unwrap_or_default(),
        "instanceInitiatedShutdownBehavior" => {
            answer.instance_initiated_shutdown_behavior = text(if instance.terminate_on_shutdown { "terminate" } else { "stop" });
        }
        "instanceType" => answer.instance_type = text(&instance.instance_type),
        "rootDeviceName" => answer.root_device_name = text(&instance.root_device_name),
        "sourceDestCheck" => answer.source_dest_check = primary.and_then(|interface| flag(interface.source_dest_check)),
        "userData" => {
            let encoded = Some(BASE64.encode(&instance.user_data)).filter(|text| !text.is_empty());
            answer.user_data = Some(AttributeValue { value: encoded });
        }
        // An instance here has no kernel or RAM disk image, product code or SR-IOV setting of its own.
        _ => {}
    }
    Ok(answer)
}

/// ModifyInstanceAttribute, in both its forms: one named member, or `Attribute` with `Value`.
///
/// # Errors
/// `IncorrectInstanceState` for what needs a stopped instance, `InvalidInstanceAttributeValue` for an unknown type,
/// `InvalidParameterCombination` for none or several attributes, `UnsupportedOperation` for what no instance here has.
pub fn modify_instance_attribute(call: &mut Call<'_>, request: ModifyInstanceAttributeRequest) -> Result<(), ApiError> {
    let request = named_form(request)?;
    unsupported(&[
        ("EnaSupport", request.ena_support.is_some()),
        ("Kernel", request.kernel.is_some()),
        ("Ramdisk", request.ramdisk.is_some()),
        ("SriovNetSupport", request.sriov_net_support.is_some()),
    ])?;
    let id = INSTANCE.required(request.instance_id.clone(), "InstanceId")?;
    let instance = INSTANCE.row::<Instance>(call, &id)?;
    let given = [
        !request.block_device_mappings.is_empty(),
        request.disable_api_stop.is_some(),
        request.disable_api_termination.is_some(),
        request.ebs_optimized.is_some(),
        !request.groups.is_empty(),
        request.instance_initiated_shutdown_behavior.is_some(),
        request.instance_type.is_some(),
        request.source_dest_check.is_some(),
        request.user_data.is_some(),
    ];
    match given.iter().filter(|given| **given).count() {
        1 => {}
        0 => return Err(ApiError::invalid_combination("No attributes specified.")),
        _ => return Err(ApiError::invalid_combination("Fields for multiple attribute types specified")),
    }
    if matches!(instance.state, InstanceState::ShuttingDown | InstanceState::Terminated) {
        return Err(wrong_state(&instance, "running' or 'stopped"));
    }
    let account = instance.account_id.clone();
    if let Some(kind) = request.instance_type {
        need_stopped(&instance)?;
        let name = kind.value.unwrap_or_default();
        let kind = instance_type::find(&name)
            .ok_or_else(|| ApiError::new("InvalidInstanceAttributeValue", format!("The instance type '{name}' does not exist")))?;
        instance_type::check_architecture(kind, &instance.architecture)?;
        network_interface::check_fit(&call.tx, &instance, kind)?;
        call.tx.update::<Instance>(&account, &id, |row| row.instance_type = name);
    } else if let Some(data) = request.user_data {
        need_stopped(&instance)?;
        let data = data.value.unwrap_or_default().0;
        check_user_data(&data)?;
        call.tx.update::<Instance>(&account, &id, |row| row.user_data = data);
    } else if let Some(flag) = request.ebs_optimized {
        need_stopped(&instance)?;
        let on = value(flag, "EbsOptimized")?;
        call.tx.update::<Instance>(&account, &id, |row| row.ebs_optimized = on);
    } else if let Some(flag) = request.disable_api_termination {
        let on = value(flag, "DisableApiTermination")?;
        call.tx.update::<Instance>(&account, &id, |row| row.disable_api_termination = on);
    } else if let Some(flag) = request.disable_api_stop {
        let on = value(flag, "DisableApiStop")?;
        call.tx.update::<Instance>(&account, &id, |row| row.disable_api_stop = on);
    } else if let Some(behaviour) = request.instance_initiated_shutdown_behavior {
        let terminate = shutdown_behaviour(behaviour.value.as_deref().unwrap_or_default())?;
        call.tx.update::<Instance>(&account, &id, |row| row.terminate_on_shutdown = terminate);
    } else if let Some(flag) = request.source_dest_check {
        let on = value(flag, "SourceDestCheck")?;
        let primary = only_interface(call, &instance)?;
        call.tx.update::<NetworkInterface>(&account, &primary, |row| row.source_dest_check = on);
    } else if !request.groups.is_empty() {
        let primary = only_interface(call, &instance)?;
        let groups = network_interface::checked_groups(&call.tx, &account, &instance.vpc_id, &request.groups)?;
        call.tx.update::<NetworkInterface>(&account, &primary, |row| row.security_group_ids = groups);
    } else {
        for mapping in request.block_device_mappings {
            unsupported(&[("NoDevice", mapping.no_device.is_some()), ("VirtualName", mapping.virtual_name.is_some())])?;
            let device = mapping.device_name.ok_or_else(|| ApiError::missing_parameter("DeviceName"))?;
            let disks = volumes(&call.tx, &account, &id);
            let named = |volume: &&std::sync::Arc<Volume>| volume.attachment.as_ref().is_some_and(|attachment| attachment.device == device);
            let ebs = mapping.ebs.unwrap_or_default();
            let disk = disks.iter().find(named).filter(|volume| ebs.volume_id.as_ref().is_none_or(|id| *id == volume.id));
            let disk =
                disk.ok_or_else(|| ApiError::new("InvalidInstanceAttributeValue", format!("No device is currently mapped at {device}")))?;
            let delete = ebs.delete_on_termination.ok_or_else(|| ApiError::missing_parameter("DeleteOnTermination"))?;
            call.tx.update::<Volume>(&account, &disk.id, |row| {
                if let Some(attachment) = &mut row.attachment {
                    attachment.delete_on_termination = delete;
                }
            });
        }
    }
    Ok(())
}

/// Turns `Attribute=x&Value=y` into the member x.
fn named_form(mut request: ModifyInstanceAttributeRequest) -> Result<ModifyInstanceAttributeRequest, ApiError> {
    let Some(attribute) = request.attribute.take() else {
        return match request.value.take() {
            None => Ok(request),
            Some(_) => Err(ApiError::missing_parameter("Attribute")),
        };
    };
    let Some(text) = request.value.take() else {
        // Only the mapping has no form with a single value.
        return if attribute == "blockDeviceMapping" { Ok(request) } else { Err(ApiError::missing_parameter("Value")) };
    };
    let flag = |text: &str| match text {
        "true" => Ok(Some(AttributeBooleanValue { value: Some(true) })),
        "false" => Ok(Some(AttributeBooleanValue { value: Some(false) })),
        other => Err(ApiError::invalid_parameter("value", other)),
    };
    match attribute.as_str() {
        "disableApiStop" => request.disable_api_stop = flag(&text)?,
        "disableApiTermination" => request.disable_api_termination = flag(&text)?,
        "ebsOptimized" => request.ebs_optimized = flag(&text)?,
        "enaSupport" => request.ena_support = flag(&text)?,
        "sourceDestCheck" => request.source_dest_check = flag(&text)?,
        "groupSet" => request.groups = vec![text],
        "instanceInitiatedShutdownBehavior" => request.instance_initiated_shutdown_behavior = Some(AttributeValue { value: Some(text) }),
        "instanceType" => request.instance_type = Some(AttributeValue { value: Some(text) }),
        "kernel" => request.kernel = Some(AttributeValue { value: Some(text) }),
        "ramdisk" => request.ramdisk = Some(AttributeValue { value: Some(text) }),
        "sriovNetSupport" => request.sriov_net_support = Some(AttributeValue { value: Some(text) }),
        "userData" => {
            let data = decode_user_data(&text)?;
            request.user_data = Some(BlobAttributeValue { value: Some(crate::shape::Blob(data)) });
        }
        other => return Err(ApiError::invalid_value(format!("The attribute {other} cannot be modified with a single value."))),
    }
    Ok(request)
}

fn value(flag: AttributeBooleanValue, name: &str) -> Result<bool, ApiError> {
    flag.value.ok_or_else(|| ApiError::missing_parameter(&format!("{name}.Value")))
}

fn need_stopped(instance: &Instance) -> Result<(), ApiError> {
    if instance.state == InstanceState::Stopped { Ok(()) } else { Err(wrong_state(instance, "stopped")) }
}

fn wrong_state(instance: &Instance, wanted: &str) -> ApiError {
    ApiError::new("IncorrectInstanceState", format!("The instance '{}' is not in the '{wanted}' state.", instance.id))
}

fn only_interface(call: &Call<'_>, instance: &Instance) -> Result<String, ApiError> {
    match interfaces(&call.tx, &instance.account_id, &instance.id).as_slice() {
        [interface] => Ok(interface.id.clone()),
        _ => {
            let message = format!(
                "There are multiple interfaces attached to instance '{}'. Please specify an interface ID for the operation instead.",
                instance.id
            );
            Err(ApiError::new("InvalidInstanceID", message))
        }
    }
}

/// Reads `InstanceInitiatedShutdownBehavior`: whether the instance terminates.
pub(super) fn shutdown_behaviour(word: &str) -> Result<bool, ApiError> {
    match word {
        "stop" => Ok(false),
        "terminate" => Ok(true),
        other => Err(ApiError::invalid_parameter("instanceInitiatedShutdownBehavior", other)),
    }
}

/// Reads user data as it comes in a request: base64, line ends allowed.
pub(super) fn decode_user_data(text: &str) -> Result<Vec<u8>, ApiError> {
    let text: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let data = BASE64.decode(text).map_err(|_| ApiError::new("InvalidUserData.Malformed", "Invalid BASE64 encoding of user data."))?;
    check_user_data(&data)?;
    Ok(data)
}

fn check_user_data(data: &[u8]) -> Result<(), ApiError> {
    if MOST_USER_DATA < data.len() {
        return Err(ApiError::invalid_value(format!("User data is limited to {MOST_USER_DATA} bytes")));
    }
    Ok(())
}

/// ModifyInstanceMetadataOptions.
///
/// # Errors
/// `IncorrectInstanceState` for a terminated instance, `InvalidParameterValue` for a hop limit outside 1..=64.
pub fn modify_instance_metadata_options(
    call: &mut Call<'_>,
    request: ModifyInstanceMetadataOptionsRequest,
) -> Result<ModifyInstanceMetadataOptionsResult, ApiError> {
    let id = INSTANCE.required(request.instance_id, "InstanceId")?;
    let instance = INSTANCE.row::<Instance>(call, &id)?;
    if matches!(instance.state, InstanceState::ShuttingDown | InstanceState::Terminated) {
        return Err(wrong_state(&instance, "running' or 'stopped"));
    }
    let asked = InstanceMetadataOptionsRequest {
        http_endpoint: request.http_endpoint,
        http_protocol_ipv6: request.http_protocol_ipv6,
        http_put_response_hop_limit: request.http_put_response_hop_limit,
        http_tokens: request.http_tokens,
        instance_metadata_tags: request.instance_metadata_tags,
    };
    if asked == InstanceMetadataOptionsRequest::default() {
        return Err(ApiError::missing_parameter("HttpTokens, HttpEndpoint, HttpPutResponseHopLimit or InstanceMetadataTags"));
    }
    let options = metadata_options(instance.metadata_options.clone(), Some(asked))?;
    let answer = metadata_shape(&options, "pending");
    call.tx.update::<Instance>(&instance.account_id, &id, |row| row.metadata_options = options);
    Ok(ModifyInstanceMetadataOptionsResult { instance_id: Some(id), instance_metadata_options: Some(answer) })
}

/// How the metadata service of a launch behaves when nothing is asked for.
pub(super) const METADATA_DEFAULTS: MetadataOptions =
    MetadataOptions { enabled: true, tokens_required: false, hop_limit: 1, tags_enabled: false };

/// Options with what a request asks for.
pub(super) fn metadata_options(
    mut options: MetadataOptions,
    asked: Option<InstanceMetadataOptionsRequest>,
) -> Result<MetadataOptions, ApiError> {
    let Some(asked) = asked else { return Ok(options) };
    unsupported(&[("MetadataOptions.HttpProtocolIpv6", asked.http_protocol_ipv6.as_deref() == Some("enabled"))])?;
    if let Some(word) = asked.http_endpoint {
        options.enabled = word == "enabled";
    }
    if let Some(word) = asked.http_tokens {
        options.tokens_required = word == "required";
    }
    if let Some(word) = asked.instance_metadata_tags {
        options.tags_enabled = word == "enabled";
    }
    if let Some(limit) = asked.http_put_response_hop_limit {
        options.hop_limit = u32::try_from(limit).ok().filter(|limit| (1..=64).contains(limit)).ok_or_else(|| {
            ApiError::invalid_value(format!(
                "Value ( {limit} ) for parameter httpPutResponseHopLimit is invalid. Expecting a value from 1 to 64."
            ))
        })?;
    }
    Ok(options)
}

/// Options as they stand in an answer.
pub(super) fn metadata_shape(options: &MetadataOptions, state: &str) -> InstanceMetadataOptionsResponse {
    InstanceMetadataOptionsResponse {
        http_endpoint: Some(endpoint_word(options).to_owned()),
        http_protocol_ipv6: Some("disabled".to_owned()),
        http_put_response_hop_limit: i32::try_from(options.hop_limit).ok(),
        http_tokens: Some(tokens_word(options).to_owned()),
        instance_metadata_tags: Some(if options.tags_enabled { "enabled" } else { "disabled" }.to_owned()),
        state: Some(state.to_owned()),
    }
}

pub(super) fn endpoint_word(options: &MetadataOptions) -> &'static str {
    if options.enabled { "enabled" } else { "disabled" }
}

pub(super) fn tokens_word(options: &MetadataOptions) -> &'static str {
    if options.tokens_required { "required" } else { "optional" }
}
