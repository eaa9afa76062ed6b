//! Interfaces that a tenant makes and deletes himself.

use super::attribute::{read_description, track};
use super::private_address::{self, Wanted};
use super::{MOST_INTERFACES, NewInterface, checked_groups, insert, remove, shape};
use crate::error::ApiError;
use crate::model::{ConnectionTracking, NetworkInterface, Subnet};
use crate::resource::client_token::{self, Checked};
use crate::resource::id::{NETWORK_INTERFACE, SUBNET, unsupported};
use crate::resource::tag;
use crate::shapes::{CreateNetworkInterfaceRequest, CreateNetworkInterfaceResult, DeleteNetworkInterfaceRequest};
use crate::world::Call;

/// CreateNetworkInterface.
///
/// # Errors
/// `InvalidSubnetID.NotFound`, `InvalidGroup.NotFound`, `SecurityGroupsPerInterfaceLimitExceeded`, `NetworkInterfaceLimitExceeded`,
/// `PrivateIpAddressLimitExceeded`, `IdempotentParameterMismatch`, those of addresses and tags.
pub fn create_network_interface(
    call: &mut Call<'_>,
    mut request: CreateNetworkInterfaceRequest,
) -> Result<CreateNetworkInterfaceResult, ApiError> {
    let token = request.client_token.take();
    request.dry_run = None;
    let fresh = match client_token::check(call, "CreateNetworkInterface", token.as_deref(), &request)? {
        Checked::First(fresh) => fresh,
        Checked::Repeated(id) => {
            let interface = NETWORK_INTERFACE.row::<NetworkInterface>(call, &id)?;
            return Ok(CreateNetworkInterfaceResult { network_interface: Some(shape(call, &interface)), client_token: token });
        }
    };
    unsupported(&[
        ("EnablePrimaryIpv6", request.enable_primary_ipv6 == Some(true)),
        ("InterfaceType", request.interface_type.is_some()),
        ("Ipv4PrefixCount", request.ipv4_prefix_count.is_some()),
        ("Ipv4Prefix", !request.ipv4_prefixes.is_empty()),
        ("Ipv6AddressCount", request.ipv6_address_count.is_some_and(|count| count != 0)),
        ("Ipv6Addresses", !request.ipv6_addresses.is_empty()),
        ("Ipv6PrefixCount", request.ipv6_prefix_count.is_some()),
        ("Ipv6Prefix", !request.ipv6_prefixes.is_empty()),
        ("Operator", request.operator.is_some()),
    ])?;
    let subnet_id = SUBNET.required(request.subnet_id, "SubnetId")?;
    let subnet = SUBNET.row::<Subnet>(call, &subnet_id)?;
    let account = call.account().to_owned();
    let security_group_ids = checked_groups(&call.tx, &account, &subnet.vpc_id, &request.groups)?;
    let list = request.private_ip_addresses;
    let addresses = Wanted::new(request.private_ip_address.as_deref(), list, request.secondary_private_ip_address_count)?;
    private_address::check_count(None, addresses.count())?;
    let asked = request.connection_tracking_specification.unwrap_or_default();
    let connection_tracking = track(ConnectionTracking::default(), &asked)?;
    let description = read_description(request.description)?;
    let tags = tag::specified(request.tag_specifications, &NETWORK_INTERFACE)?;
    if call.list::<NetworkInterface>().count() >= MOST_INTERFACES {
        let message = "The maximum number of network interfaces has been reached.";
        return Err(ApiError::new("NetworkInterfaceLimitExceeded", message));
    }
    let new = NewInterface {
        subnet: &subnet,
        addresses,
        security_group_ids,
        description,
        attachment: None,
        associate_public_ip: false,
        connection_tracking,
    };
    let interface = insert(&mut call.tx, call.now, new)?;
    tag::set(&mut call.tx, &account, &NETWORK_INTERFACE, &interface.id, tags);
    fresh.remember(call, &interface.id);
    Ok(CreateNetworkInterfaceResult { network_interface: Some(shape(call, &interface)), client_token: token })
}

/// DeleteNetworkInterface. An Elastic IP that leads to it stays the account's.
///
/// # Errors
/// `InvalidParameterValue` while it is attached.
pub fn delete_network_interface(call: &mut Call<'_>, request: DeleteNetworkInterfaceRequest) -> Result<(), ApiError> {
    let id = NETWORK_INTERFACE.required(request.network_interface_id, "NetworkInterfaceId")?;
    let interface = super::own(call, &id)?;
    if interface.attachment.is_some() {
        return Err(ApiError::invalid_value(format!("Network interface '{id}' is currently in use.")));
    }
    remove(&mut call.tx, &interface.account_id, &id);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fixture::{ALICE, BOB, Fixture};
    use crate::resource::subnet::{self, delete_subnet};
    use crate::shapes::{self, DeleteSubnetRequest, PrivateIpAddressSpecification, Tag, TagSpecification};

    fn create(subnet: &str) -> CreateNetworkInterfaceRequest {
        CreateNetworkInterfaceRequest { subnet_id: Some(subnet.into()), ..Default::default() }
    }

    fn made(fixture: &Fixture, request: CreateNetworkInterfaceRequest) -> shapes::NetworkInterface {
        fixture.call(ALICE, |call| create_network_interface(call, request)).unwrap().network_interface.unwrap()
    }

    fn delete(id: &str) -> DeleteNetworkInterfaceRequest {
        DeleteNetworkInterfaceRequest { network_interface_id: Some(id.into()), dry_run: None }
    }

    #[test]
    fn a_new_interface_is_available_with_the_addresses_it_asked_for() {
        let fixture = Fixture::new();
        let subnet = fixture.default_subnet(ALICE);
        let before = subnet::available(&fixture.world.begin(), &subnet);
        let address = |ip: &str, primary| PrivateIpAddressSpecification { private_ip_address: Some(ip.into()), primary: Some(primary) };
        let tag = Tag { key: Some("Name".into()), value: Some("second".into()) };
        let request = CreateNetworkInterfaceRequest {
            description: Some("a second one".into()),
            private_ip_addresses: vec![address("172.31.1.10", true), address("172.31.1.11", false)],
            tag_specifications: vec![TagSpecification { resource_type: Some("network-interface".into()), tags: vec![tag] }],
            ..create(&subnet.id)
        };
        let shown = made(&fixture, request);
        assert_eq!((shown.status.as_deref(), shown.attachment), (Some("available"), None));
        assert_eq!(shown.private_ip_address.as_deref(), Some("172.31.1.10"));
        let [primary, other] = shown.private_ip_addresses.as_slice() else { panic!() };
        assert_eq!((primary.primary, other.primary), (Some(true), Some(false)));
        assert_eq!(other.private_dns_name.as_deref(), Some("ip-172-31-1-11.ec2.internal"));
        assert_eq!((shown.description.as_deref(), shown.tag_set.len()), (Some("a second one"), 1));
        assert_eq!(subnet::available(&fixture.world.begin(), &subnet), before - 2);
        let taken = CreateNetworkInterfaceRequest { private_ip_address: Some("172.31.1.11".into()), ..create(&subnet.id) };
        assert_eq!(fixture.refusal(ALICE, |call| create_network_interface(call, taken)), "InvalidIPAddress.InUse");
        let twice = CreateNetworkInterfaceRequest {
            private_ip_addresses: vec![address("172.31.1.20", true), address("172.31.1.20", false)],
            ..create(&subnet.id)
        };
        assert_eq!(fixture.refusal(ALICE, |call| create_network_interface(call, twice)), "InvalidIPAddress.InUse");
    }

    #[test]
    fn a_client_token_makes_one_interface() {
        let fixture = Fixture::new();
        let subnet = fixture.default_subnet(ALICE).id;
        let with = |description: &str| CreateNetworkInterfaceRequest {
            client_token: Some("token".into()),
            description: Some(description.into()),
            ..create(&subnet)
        };
        let first = made(&fixture, with("one"));
        assert_eq!(made(&fixture, with("one")).network_interface_id, first.network_interface_id);
        assert_eq!(fixture.refusal(ALICE, |call| create_network_interface(call, with("two"))), "IdempotentParameterMismatch");
    }

    #[test]
    fn an_interface_goes_when_it_is_not_attached_and_keeps_its_subnet_until_then() {
        let fixture = Fixture::new();
        let subnet = fixture.default_subnet(ALICE).id;
        let attached = fixture.instance(ALICE, "i-0123456789abcdef0");
        assert_eq!(fixture.refusal(ALICE, |call| delete_network_interface(call, delete(&attached.id))), "InvalidParameterValue");
        let other = {
            let tx = fixture.world.begin();
            tx.list::<Subnet>(ALICE).find(|row| row.id != subnet).unwrap().id.clone()
        };
        let id = made(&fixture, create(&other)).network_interface_id.unwrap();
        let leave = DeleteSubnetRequest { subnet_id: Some(other.clone()), dry_run: None };
        assert_eq!(fixture.refusal(ALICE, |call| delete_subnet(call, leave.clone())), "DependencyViolation");
        assert_eq!(fixture.refusal(BOB, |call| delete_network_interface(call, delete(&id))), "InvalidNetworkInterfaceID.NotFound");
        fixture.call(ALICE, |call| delete_network_interface(call, delete(&id))).unwrap();
        assert_eq!(fixture.refusal(ALICE, |call| delete_network_interface(call, delete(&id))), "InvalidNetworkInterfaceID.NotFound");
        fixture.call(ALICE, |call| delete_subnet(call, leave)).unwrap();
    }

    #[test]
    fn foreign_subnets_and_what_no_interface_here_has_are_refused() {
        let fixture = Fixture::new();
        let (own, foreign) = (fixture.default_subnet(ALICE).id, fixture.default_subnet(BOB).id);
        for (request, code) in [
            (create(&foreign), "InvalidSubnetID.NotFound"),
            (create("subnet-x"), "InvalidSubnetID.Malformed"),
            (CreateNetworkInterfaceRequest { ipv6_address_count: Some(1), ..create(&own) }, "UnsupportedOperation"),
            (CreateNetworkInterfaceRequest { interface_type: Some("efa".into()), ..create(&own) }, "UnsupportedOperation"),
            (CreateNetworkInterfaceRequest { groups: vec!["sg-00000000".into()], ..create(&own) }, "InvalidGroup.NotFound"),
            (
                CreateNetworkInterfaceRequest { secondary_private_ip_address_count: Some(50), ..create(&own) },
                "PrivateIpAddressLimitExceeded",
            ),
        ] {
            assert_eq!(fixture.refusal(ALICE, |call| create_network_interface(call, request)), code);
        }
    }
}
