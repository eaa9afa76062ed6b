//! Attributes of an interface, one in each request.

use super::{CONNECTION_TRACKING, attachment_shape, checked_groups, groups};
use crate::error::ApiError;
use crate::model::{ConnectionTracking, NetworkInterface};
use crate::resource::id::{NETWORK_INTERFACE, NETWORK_INTERFACE_ATTACHMENT, unsupported};
use crate::shapes::{
    self, AttributeBooleanValue, AttributeValue, ConnectionTrackingConfiguration, ConnectionTrackingSpecificationRequest,
    DescribeNetworkInterfaceAttributeRequest, DescribeNetworkInterfaceAttributeResult, ModifyNetworkInterfaceAttributeRequest,
    ResetNetworkInterfaceAttributeRequest,
};
use crate::world::Call;

/// The longest description.
const LONGEST_DESCRIPTION: usize = 255;

/// Reads the description of an interface.
///
/// # Errors
/// `InvalidParameterValue` for one that is too long.
pub fn read_description(text: Option<String>) -> Result<String, ApiError> {
    let text = text.unwrap_or_default();
    if LONGEST_DESCRIPTION < text.chars().count() {
        let message = format!("Value for parameter description is invalid. It has more than {LONGEST_DESCRIPTION} characters.");
        return Err(ApiError::invalid_value(message));
    }
    Ok(text)
}

/// Changes the times of connection tracking that a request names.
///
/// # Errors
/// `InvalidParameterValue` for one outside its range.
pub fn track(mut tracking: ConnectionTracking, asked: &ConnectionTrackingSpecificationRequest) -> Result<ConnectionTracking, ApiError> {
    let [tcp, stream, udp] = CONNECTION_TRACKING;
    for (name, range, value, place) in [
        ("TcpEstablishedTimeout", tcp, asked.tcp_established_timeout, &mut tracking.tcp_established_s),
        ("UdpStreamTimeout", stream, asked.udp_stream_timeout, &mut tracking.udp_stream_s),
        ("UdpTimeout", udp, asked.udp_timeout, &mut tracking.udp_s),
    ] {
        let Some(value) = value else { continue };
        let seconds = u32::try_from(value).ok().filter(|seconds| range.contains(seconds)).ok_or_else(|| {
            let (low, high) = (range.start(), range.end());
            ApiError::invalid_value(format!("Value ({value}) for parameter {name} is invalid. Valid values are {low} to {high} seconds."))
        })?;
        *place = Some(seconds);
    }
    Ok(tracking)
}

/// The times that were set, if any was.
pub(super) fn tracking_shape(tracking: ConnectionTracking) -> Option<ConnectionTrackingConfiguration> {
    let seconds = |value: Option<u32>| value.and_then(|value| i32::try_from(value).ok());
    (tracking != ConnectionTracking::default()).then(|| ConnectionTrackingConfiguration {
        tcp_established_timeout: seconds(tracking.tcp_established_s),
        udp_stream_timeout: seconds(tracking.udp_stream_s),
        udp_timeout: seconds(tracking.udp_s),
    })
}

/// ModifyNetworkInterfaceAttribute.
///
/// # Errors
/// `InvalidParameterCombination` for none or several attributes, `InvalidGroup.NotFound`, `InvalidAttachmentID.NotFound`,
/// `InvalidParameterValue`, `UnsupportedOperation` for what no interface here has.
pub fn modify_network_interface_attribute(call: &mut Call<'_>, request: ModifyNetworkInterfaceAttributeRequest) -> Result<(), ApiError> {
    let attachment = request.attachment.as_ref();
    unsupported(&[
        ("AssociatePublicIpAddress", request.associate_public_ip_address.is_some()),
        ("AssociatedSubnetId", !request.associated_subnet_ids.is_empty()),
        ("EnaSrdSpecification", request.ena_srd_specification.is_some()),
        ("EnablePrimaryIpv6", request.enable_primary_ipv6 == Some(true)),
        ("Attachment.EnaQueueCount", attachment.is_some_and(|attachment| attachment.ena_queue_count.is_some())),
        ("Attachment.DefaultEnaQueueCount", attachment.is_some_and(|attachment| attachment.default_ena_queue_count.is_some())),
    ])?;
    let id = NETWORK_INTERFACE.required(request.network_interface_id, "NetworkInterfaceId")?;
    let interface = super::own(call, &id)?;
    let given = [
        request.attachment.is_some(),
        request.connection_tracking_specification.is_some(),
        request.description.is_some(),
        !request.groups.is_empty(),
        request.source_dest_check.is_some(),
    ];
    match given.iter().filter(|given| **given).count() {
        1 => {}
        0 => return Err(ApiError::invalid_combination("No attributes specified.")),
        _ => return Err(ApiError::invalid_combination("Fields for multiple attribute types specified")),
    }
    let mut row = NetworkInterface::clone(&interface);
    if let Some(changes) = request.attachment {
        let attachment_id = NETWORK_INTERFACE_ATTACHMENT.required(changes.attachment_id, "Attachment.AttachmentId")?;
        let delete = changes.delete_on_termination.ok_or_else(|| ApiError::missing_parameter("Attachment.DeleteOnTermination"))?;
        let own = row.attachment.as_mut().filter(|attachment| attachment.id == attachment_id);
        own.ok_or_else(|| NETWORK_INTERFACE_ATTACHMENT.not_found(&attachment_id))?.delete_on_termination = delete;
    } else if let Some(asked) = request.connection_tracking_specification {
        if asked == ConnectionTrackingSpecificationRequest::default() {
            return Err(ApiError::invalid_combination("No attributes specified."));
        }
        row.connection_tracking = track(row.connection_tracking, &asked)?;
    } else if let Some(description) = request.description {
        row.description = read_description(description.value)?;
    } else if let Some(flag) = request.source_dest_check {
        row.source_dest_check = flag.value.ok_or_else(|| ApiError::missing_parameter("SourceDestCheck.Value"))?;
    } else {
        row.security_group_ids = checked_groups(&call.tx, &row.account_id, &row.vpc_id, &request.groups)?;
    }
    call.tx.put(row);
    Ok(())
}

/// ResetNetworkInterfaceAttribute: the source and destination check is on again.
///
/// # Errors
/// `InvalidParameterCombination` when no attribute is named.
pub fn reset_network_interface_attribute(call: &mut Call<'_>, request: ResetNetworkInterfaceAttributeRequest) -> Result<(), ApiError> {
    let id = NETWORK_INTERFACE.required(request.network_interface_id, "NetworkInterfaceId")?;
    let interface = super::own(call, &id)?;
    if request.source_dest_check.is_none() {
        return Err(ApiError::invalid_combination("No attributes specified."));
    }
    call.tx.update::<NetworkInterface>(&interface.account_id, &id, |row| row.source_dest_check = true);
    Ok(())
}

/// DescribeNetworkInterfaceAttribute.
///
/// # Errors
/// `InvalidNetworkInterfaceID.NotFound`, `MissingParameter` when no attribute is named.
pub fn describe_network_interface_attribute(
    call: &mut Call<'_>,
    request: DescribeNetworkInterfaceAttributeRequest,
) -> Result<DescribeNetworkInterfaceAttributeResult, ApiError> {
    let id = NETWORK_INTERFACE.required(request.network_interface_id, "NetworkInterfaceId")?;
    let interface = NETWORK_INTERFACE.row::<NetworkInterface>(call, &id)?;
    let mut answer = DescribeNetworkInterfaceAttributeResult { network_interface_id: Some(id), ..Default::default() };
    match request.attribute.as_deref().ok_or_else(|| ApiError::missing_parameter("Attribute"))? {
        "associatePublicIpAddress" => answer.associate_public_ip_address = Some(interface.associate_public_ip),
        "attachment" => answer.attachment = attachment_shape(&interface),
        "description" => answer.description = Some(AttributeValue { value: Some(interface.description.clone()) }),
        "groupSet" => answer.groups = groups(&call.tx, &interface),
        // The last word of the shape's enumeration.
        _ => answer.source_dest_check = Some(AttributeBooleanValue { value: Some(interface.source_dest_check) }),
    }
    Ok(answer)
}

/// The times as instances show them.
pub(in crate::resource) fn instance_tracking_shape(
    interface: &NetworkInterface,
) -> Option<shapes::ConnectionTrackingSpecificationResponse> {
    tracking_shape(interface.connection_tracking).map(|times| shapes::ConnectionTrackingSpecificationResponse {
        tcp_established_timeout: times.tcp_established_timeout,
        udp_stream_timeout: times.udp_stream_timeout,
        udp_timeout: times.udp_timeout,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::shapes::NetworkInterfaceAttachmentChanges;

    fn modify(id: &str) -> ModifyNetworkInterfaceAttributeRequest {
        ModifyNetworkInterfaceAttributeRequest { network_interface_id: Some(id.into()), ..Default::default() }
    }

    fn described(fixture: &Fixture, id: &str, attribute: &str) -> DescribeNetworkInterfaceAttributeResult {
        let request = DescribeNetworkInterfaceAttributeRequest {
            network_interface_id: Some(id.into()),
            attribute: Some(attribute.into()),
            ..Default::default()
        };
        fixture.call(ALICE, |call| describe_network_interface_attribute(call, request)).unwrap()
    }

    #[test]
    fn each_attribute_is_changed_and_shown_alone() {
        let fixture = Fixture::new();
        let interface = fixture.instance(ALICE, "i-0123456789abcdef0");
        let id = interface.id.as_str();
        let change = |request| fixture.call(ALICE, |call| modify_network_interface_attribute(call, request)).unwrap();
        let text = |value: &str| Some(AttributeValue { value: Some(value.into()) });
        change(ModifyNetworkInterfaceAttributeRequest { description: text("uplink"), ..modify(id) });
        assert_eq!(described(&fixture, id, "description").description, text("uplink"));
        let off = Some(AttributeBooleanValue { value: Some(false) });
        change(ModifyNetworkInterfaceAttributeRequest { source_dest_check: off.clone(), ..modify(id) });
        let shown = described(&fixture, id, "sourceDestCheck");
        assert_eq!((shown.source_dest_check, shown.description), (off, None));
        let reset = ResetNetworkInterfaceAttributeRequest {
            network_interface_id: Some(id.into()),
            source_dest_check: Some("true".into()),
            dry_run: None,
        };
        fixture.call(ALICE, |call| reset_network_interface_attribute(call, reset)).unwrap();
        assert_eq!(described(&fixture, id, "sourceDestCheck").source_dest_check.unwrap().value, Some(true));
        let attachment_id = interface.attachment.clone().map(|attachment| attachment.id);
        let keep = NetworkInterfaceAttachmentChanges { attachment_id, delete_on_termination: Some(false), ..Default::default() };
        change(ModifyNetworkInterfaceAttributeRequest { attachment: Some(keep), ..modify(id) });
        assert_eq!(described(&fixture, id, "attachment").attachment.unwrap().delete_on_termination, Some(false));
        assert_eq!(described(&fixture, id, "groupSet").groups[0].group_name.as_deref(), Some("default"));
    }

    #[test]
    fn times_of_tracking_are_bounded_and_kept_one_by_one() {
        let fixture = Fixture::new();
        let id = fixture.interface(ALICE, &fixture.default_subnet(ALICE).id, None).unwrap().id;
        let times = |tcp: Option<i32>, stream: Option<i32>, udp: Option<i32>| ModifyNetworkInterfaceAttributeRequest {
            connection_tracking_specification: Some(ConnectionTrackingSpecificationRequest {
                tcp_established_timeout: tcp,
                udp_stream_timeout: stream,
                udp_timeout: udp,
            }),
            ..modify(&id)
        };
        for (tcp, stream, udp) in [
            (Some(59), None, None),
            (Some(432_001), None, None),
            (None, Some(59), None),
            (None, Some(181), None),
            (None, None, Some(29)),
            (None, None, Some(61)),
            (Some(-1), None, None),
        ] {
            let refused = fixture.refusal(ALICE, |call| modify_network_interface_attribute(call, times(tcp, stream, udp)));
            assert_eq!(refused, "InvalidParameterValue", "{tcp:?} {stream:?} {udp:?}");
        }
        for request in [times(Some(60), None, None), times(None, Some(180), None), times(None, None, Some(30))] {
            fixture.call(ALICE, |call| modify_network_interface_attribute(call, request)).unwrap();
        }
        let row = fixture.world.begin().get::<NetworkInterface>(ALICE, &id).unwrap();
        let expected = ConnectionTracking { tcp_established_s: Some(60), udp_stream_s: Some(180), udp_s: Some(30) };
        assert_eq!(row.connection_tracking, expected);
    }

    #[test]
    fn one_attribute_and_no_more_stands_in_a_request() {
        let fixture = Fixture::new();
        let id = fixture.interface(ALICE, &fixture.default_subnet(ALICE).id, None).unwrap().id;
        let two = ModifyNetworkInterfaceAttributeRequest {
            description: Some(AttributeValue { value: Some("x".into()) }),
            source_dest_check: Some(AttributeBooleanValue { value: Some(false) }),
            ..modify(&id)
        };
        let long = AttributeValue { value: Some("x".repeat(256)) };
        let keep = NetworkInterfaceAttachmentChanges {
            attachment_id: Some("eni-attach-0123456789abcdef0".into()),
            delete_on_termination: Some(true),
            ..Default::default()
        };
        for (request, code) in [
            (modify(&id), "InvalidParameterCombination"),
            (two, "InvalidParameterCombination"),
            (ModifyNetworkInterfaceAttributeRequest { description: Some(long), ..modify(&id) }, "InvalidParameterValue"),
            (ModifyNetworkInterfaceAttributeRequest { attachment: Some(keep), ..modify(&id) }, "InvalidAttachmentID.NotFound"),
            (ModifyNetworkInterfaceAttributeRequest { groups: vec!["sg-00000000".into()], ..modify(&id) }, "InvalidGroup.NotFound"),
        ] {
            assert_eq!(fixture.refusal(ALICE, |call| modify_network_interface_attribute(call, request)), code);
        }
        let refused = fixture.refusal(BOB, |call| modify_network_interface_attribute(call, modify(&id)));
        assert_eq!(refused, "InvalidNetworkInterfaceID.NotFound");
    }
}
